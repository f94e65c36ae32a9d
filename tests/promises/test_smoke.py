"""nanoGPT's smoke test, `max_iters=100 eval_iters=10 log_interval=1`, works with every recipe, in a tiny shape."""

import json
import random
import string

import pytest
from shared import REPOSITORY

from nanogpt_accel.__main__ import main
from nanogpt_accel.recipe import load_recipe

RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))
SMOKE = ["max_iters=20", "eval_iters=2", "log_interval=1"]  # fewer steps than in nanoGPT, to save time
SHAPE = ["n_layer=1", "n_head=2", "n_embd=16", "n_kv_head=1", "n_inner=16"]
SMALL = ["block_size=16", "batch_size=1", "gradient_accumulation_steps=1", "tokenizer=char", "corpus=text.txt"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a text and a run, for the recipes that start from the weights of a model."""
    folder = tmp_path_factory.mktemp("smoke")
    letters = random.Random(1)
    (folder / "text.txt").write_text("".join(letters.choices(string.printable, k=40_000)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipe = str(REPOSITORY / "recipes/shakespeare_char_cpu.yaml")
        assert main(["train", recipe, *SMOKE, *SHAPE, *SMALL, "out_dir=model"]) == 0
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_few_steps_of_every_recipe(path, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    recipe = load_recipe(path)
    shape = SHAPE if recipe.model.init_from == "scratch" else ["init_from=model"]
    assert main(["train", str(path), *SMOKE, *shape, *SMALL, "compile=false"]) == 0
    printed = capsys.readouterr().out
    if recipe.train.eval_only:
        return
    lines = [json.loads(line) for line in (folder / "runs" / path.stem / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(20))
    is_shortened = recipe.warmup_iters > 0 and recipe.optimizer.lr_decay_iters is None
    assert ("warm-up: 2 steps instead of" in printed) == is_shortened, printed
