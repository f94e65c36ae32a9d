"""Imports point one way: commands import the recipe and the parts, parts nothing of the package, and no command
another. Read from the syntax trees, so that an import inside a function counts too."""

import ast
import sys
from pathlib import Path

import pytest

import nanogpt_accel
from nanogpt_accel.__main__ import COMMANDS

PACKAGE = Path(nanogpt_accel.__file__).parent
MODULES = {path.stem: path for path in PACKAGE.glob("*.py")}

PARTS = {"model", "tokenizer", "corpus", "tokens", "batches", "optim", "metrics", "console", "generation", "launch",
         "cpu", "hub", "sizing", "sharding"}
GLUED = {"dataset": {"corpus", "tokenizer", "tokens", "console"}, "checkpoint": {"hub", "model", "sharding"},
         "interop": {"model", "tokenizer", "hub"}}
MAY_IMPORT = {
    "__init__": set(),  # loads its public names when they are asked for
    "__main__": {"cli"},  # and a command by its name, when it runs
    "cli": set(),
    "recipe": {"cli"},
    **{part: set() for part in PARTS},
    **GLUED,  # of a few parts
    **{command: PARTS | GLUED.keys() | {"cli", "recipe"} for command in COMMANDS},
}


def imports(source):
    """(modules of the package, others' top packages) that a source imports, anywhere in it."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = ("nanogpt_accel." if node.level else "") + (node.module or "")
            names = [f"{module.rstrip('.')}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top != "nanogpt_accel":
                others.add(top)
            elif rest != "__version__":
                ours.add(rest.partition(".")[0])
    return ours, others


def test_the_reader_of_imports_sees_every_form():
    source = """
import os.path, nanogpt_accel.recipe
from . import cli, __version__
from .tokens import Writer
from nanogpt_accel import batches
from nanogpt_accel.model import GPT
def f():
    from .train import main
    import torch.nn as nn
"""
    assert imports(source) == ({"recipe", "cli", "tokens", "batches", "model", "train"}, {"os", "torch"})


def test_every_module_has_its_place():
    assert set(MODULES) == set(MAY_IMPORT), "a new module: say in MAY_IMPORT what it may import"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_one_way(name):
    ours, _ = imports(MODULES[name].read_text(encoding="utf-8"))
    assert ours <= MAY_IMPORT[name], f"{name}.py imports {sorted(ours - MAY_IMPORT[name])}"


def test_the_model_travels_alone():
    """Where its copy in a checkpoint is loaded, there are torch and transformers, and what these bring."""
    _, others = imports(MODULES["model"].read_text(encoding="utf-8"))
    assert others - set(sys.stdlib_module_names) == {"torch", "transformers", "huggingface_hub"}


def test_the_table_imports_a_command_by_name_only():
    tree = ast.parse(MODULES["__main__"].read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)
             and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module"]
    inside = [node for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)]
    assert len(calls) == 1 and calls[0] in inside
    for command in COMMANDS:
        tree = ast.parse(MODULES[command].read_text(encoding="utf-8"))
        main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
        assert [argument.arg for argument in main.args.args] == ["argv"], command


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_module_says_what_it_is(name):
    assert len(ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8"))) or "") > 40
