"""`recipes` and `configs`: the lists, copies of recipes, paths of configs."""

import re
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import yaml
from shared import REPOSITORY

from nanogpt_accel.recipe import load_recipe

NAMES = {
    folder: sorted(path.stem for path in (REPOSITORY / folder).glob("*.yaml")) for folder in ("recipes", "configs")
}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("folder", NAMES)
@pytest.mark.parametrize("columns", [40, 80, 200])
def test_list_has_every_name_and_fits_the_terminal(call, monkeypatch, folder, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = call(folder).partition("\n\n")[0]
    assert re.findall(r"^\S+", out, re.MULTILINE) == NAMES[folder]
    assert max(map(len, out.splitlines())) <= max(columns, 43)  # a path may be longer


def test_list_of_recipes_says_what_they_come_to(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    entries = dict(re.findall(r"^(\w+)\n    (.*\n    .*)$", call("recipes"), re.MULTILINE))
    assert entries.keys() == set(NAMES["recipes"])
    for name, text in entries.items():
        expect = yaml.safe_load((REPOSITORY / "recipes" / f"{name}.yaml").read_text())["expect"]
        assert expect["hardware"] in text and expect.get("time", "") in text and expect["source"] in text
        assert f"validation loss: {expect.get('val_loss', 'unknown')}" in text
    assert "best validation loss: 1.4697 +- 0.015 (" in entries["shakespeare_char"]


def test_broken_recipe_of_a_clone_does_not_hide_the_others(call, monkeypatch, tmp_path):
    monkeypatch.setattr("nanogpt_accel.utils.packaged.packaged", lambda name: tmp_path / name)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("n_layer: [")
    (tmp_path / "recipes" / "other.yaml").write_text("# Train a poet.\nexpect: {val_loss: 2}\n")
    out = call("recipes")
    assert "invalid YAML" in out and "other\n    Train a poet.\n" in out and "validation loss: 2\n" in out


@pytest.mark.parametrize("name", NAMES["recipes"])
def test_copy_is_the_same_recipe_with_its_own_command(call, name):
    printed = call("recipes", "--copy", name, "--to", "my copy.yaml")
    assert printed == "wrote my copy.yaml; to train it: nanogpt-accel train 'my copy.yaml'\n"
    text, original = (path.read_text() for path in (Path("my copy.yaml"), REPOSITORY / "recipes" / f"{name}.yaml"))
    copied, packaged = (load_recipe(recipe).replace(out_dir="") for recipe in ("my copy.yaml", name))
    assert copied == packaged.model_copy(update={"expect": copied.expect}) and copied.expect.val_loss is None
    assert f"recipes/{name}.yaml" not in text and re.search(r"^#   .*'my copy.yaml'", text, re.MULTILINE)
    (schema,) = re.findall(r"^# yaml-language-server: \$schema=(\S+)$", text, re.MULTILINE)
    assert Path(unquote(urlparse(schema).path)).samefile(REPOSITORY / "recipes" / "recipe.schema.json")
    assert len(text.splitlines()) == len(original.partition("\nexpect:")[0].splitlines())


def test_copy_never_replaces_a_file(call):
    assert "wrote gpt2.yaml" in call("recipes", "--copy", "gpt2")
    Path("gpt2.yaml").write_text("seed: 1")
    assert "to=gpt2.yaml: already exists" in call("recipes", "--copy", "gpt2", status=2)
    Path("folder").mkdir()
    assert "to=folder: already exists" in call("recipes", "--copy", "gpt2", "--to", "folder", status=2)
    assert "the folder gone does not exist" in call("recipes", "--copy", "gpt2", "--to", "gone/x.yaml", status=2)
    assert "to=gpt2.yaml/x: the folder" in call("recipes", "--copy", "gpt2", "--to", "gpt2.yaml/x", status=2)
    assert Path("gpt2.yaml").read_text() == "seed: 1"
    # the packaged recipe, not the user's file of this name
    assert call("recipes", "--copy", "gpt2", "--to", "fresh.yaml") and load_recipe("fresh.yaml").seed == 1337


@pytest.mark.parametrize("name", NAMES["configs"])
def test_path_of_a_config_is_a_file(call, name):
    path = Path(call("configs", "--path", name).removesuffix("\n"))
    assert path.is_absolute() and path.samefile(REPOSITORY / "configs" / f"{name}.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipes", "--copy", "quikstart"], "quikstart: no such file in the recipes of this package (did you mean"),
        (["configs", "--path", "fsdp3"], "fsdp3: no such file in the configs of this package (did you mean fsdp2?)"),
        (["configs", "path=zzz"], "zzz: no such file in the configs of this package; `nanogpt-accel configs` lists"),
        (["recipes", "gpt2"], "gpt2: `recipes` accepts only options; to copy a recipe, use --copy gpt2"),
        (["configs", "cpu"], "cpu: `configs` accepts only options; for the path of a config, use --path cpu"),
        (["recipes", "to=x.yaml"], "to=x.yaml: the recipe to copy is missing; add --copy NAME"),
        (["recipes", "--copy"], "--copy: the value is missing"),
    ],
)
def test_mistake_gets_one_line(call, words, message):
    (line,) = call(*words, status=2).splitlines()
    assert line.startswith(f"error: {message}")


def test_other_commands_accept_names(call, tmp_path):
    assert "124,373,760" in call("plan", "gpt2") and "on 8 x H100" in call("plan", "recipes/gpt2.yaml", "gpus=8")
    (tmp_path / "text.txt").write_text("a small text\n" * 60)
    assert "train: " in call("prepare", "shakespeare_char", "corpus=text.txt")
    for command in ("plan", "bench", "prepare", "train"):
        message = call(command, "quikstart", status=2)
        assert message == "error: quikstart: no such recipe or run folder (did you mean quickstart?)\n"
        Path("llama").mkdir(exist_ok=True)
        assert "llama: not a run folder" in call(command, "llama", status=2)
