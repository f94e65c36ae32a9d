"""Imports point down: a folder or a top-level file may only import from lower LAYERS.

The tests read the syntax trees, so that imports inside functions count too.
"""

import ast
import sys
from pathlib import Path

import pytest

import nanogpt_accel
from nanogpt_accel.__main__ import COMMANDS

PACKAGE = Path(nanogpt_accel.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# from top to bottom; parts on the same line may not import each other
LAYERS = [
    {"__main__"},
    {"commands"},
    {"train"},
    {"training", "run"},
    {"models"},
    {"checkpoint"},
    {"data", "evaluation", "planning"},
    {"distributed", "hub", "tracking"},
    {"recipe", "batches"},
    {"optim", "scaling"},
    {"model", "muon"},
    {"utils"},
]
# commands/import_nanogpt.py and the other commands may not import each other either
SIDE_BY_SIDE = {"commands"}


def part_of(module):
    """The folder or top-level file of a module, given as dotted path below the package."""
    return module.partition(".")[0]


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(source, module):
    """Return (modules of the package, top packages of others) that a source imports anywhere in it.

    module: dotted path of the source below the package, such as data.sources.
    """
    known = {name_of(path) for path in FILES} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    ours, others = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["nanogpt_accel", *module.split(".")][: -node.level] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top != "nanogpt_accel":
                others.add(top)
                continue
            while rest and rest not in known:  # a name in a module
                rest = rest.rpartition(".")[0]
            if rest:
                ours.add(rest)
    return ours, others


def depth(module):
    return next((i for i, layer in enumerate(LAYERS) if part_of(module) in layer), None)


def test_the_reader_of_imports_sees_every_form():
    source = """
import os.path, nanogpt_accel.recipe
from . import dataset
from .tokenizer import Tokenizer
from ..utils import cli
from .. import __version__
from nanogpt_accel import batches
from nanogpt_accel.model import GPT
def f():
    from ..train import main
    import torch.nn as nn
"""
    ours, others = imports(source, "data.sources")
    assert ours == {"recipe", "data.dataset", "data.tokenizer", "utils.cli", "batches", "model", "train"}
    assert others == {"os", "torch"}


def test_every_part_is_in_a_layer():
    parts = {part_of(name_of(path)) for path in FILES} - {"__init__"}
    assert parts <= set().union(*LAYERS), "a new folder or top-level file: add it to LAYERS"


@pytest.mark.parametrize(
    "module", [name_of(path) for path in FILES if path.parent != PACKAGE or path.stem != "__init__"]
)
def test_imports_point_down(module):
    ours, _ = imports((PACKAGE / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8"), module)
    for other in ours:
        if part_of(other) == part_of(module):
            assert part_of(module) not in SIDE_BY_SIDE, f"{module} imports {other}, which is not below it"
        else:
            assert depth(other) > depth(module), f"{module} imports {other}, which is not below it"


def test_no_cycles_inside_a_folder():
    """All imports count, also those inside functions. Without cycles, each folder can be read from the bottom up."""
    graph = {name_of(path): imports(path.read_text(encoding="utf-8"), name_of(path))[0] for path in FILES}
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for other in sorted(graph.get(module, ())):
                visit(other)
            path.pop()
            done.add(module)

    for module in sorted(graph):
        visit(module)


def test_the_model_travels_alone():
    """A checkpoint's copy of model.py must work if only torch, transformers and their dependencies are installed."""
    ours, others = imports((PACKAGE / "model.py").read_text(encoding="utf-8"), "model")
    assert ours == set()
    assert others - set(sys.stdlib_module_names) == {"torch", "transformers", "huggingface_hub"}


def test_the_table_imports_a_command_by_name_only():
    tree = ast.parse((PACKAGE / "__main__.py").read_text(encoding="utf-8"))
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module"
    ]
    inside = [node for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)]
    assert len(calls) == 1 and calls[0] in inside
    for command in COMMANDS:
        file = {"train": "train", "import": "commands/import_nanogpt"}.get(command, f"commands/{command}")
        tree = ast.parse((PACKAGE / f"{file}.py").read_text(encoding="utf-8"))
        main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
        assert [argument.arg for argument in main.args.args] == ["argv"], command


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_module_says_what_it_is(path):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert len(text) > 20
    if path.name == "__init__.py" and path.parent != PACKAGE:
        assert len(text.splitlines()) <= 5, "three lines: what comes in, what goes out, where to add something"


def test_the_top_of_the_package_is_short():
    assert len(list(PACKAGE.glob("*.py"))) <= 11
