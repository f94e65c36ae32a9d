"""What a notebook user imports; and the Python of the README, run as it stands there."""

import importlib
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import nanogpt_accel
from nanogpt_accel.recipe import load_recipe

REPOSITORY = Path(__file__).parents[2]
RECIPE = """
data: {corpus: text.txt, tokenizer: char, val_fraction: 0.1}
model: {n_layer: 1, n_embd: 16, n_head: 2, block_size: 16}
optimizer: {warmup_iters: 0}
train: {batch_size: 2, gradient_accumulation_steps: 1, max_iters: 4, eval_interval: 2, eval_iters: 2, device: cpu}
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("abcdefgh " * 300)
    Path("tiny.yaml").write_text(RECIPE)
    return "tiny.yaml"


@pytest.mark.parametrize("first", ["function", "module"])
def test_train_can_be_called_whatever_was_imported_before(tiny, first):
    if first == "module":
        importlib.import_module("nanogpt_accel.train")
    from nanogpt_accel.train import train

    model, history = train(tiny, max_iters=3)
    assert type(model).__name__ == "GPT" and model.config.n_embd == 16
    assert [line["step"] for line in history if "val_loss" in line] == [0, 2, 3]
    assert [line["step"] for line in history if "grad_norm" in line] == [0, 1, 2]
    # a second run of the same notebook is asked what it wants, and a Recipe does as well as a path
    with pytest.raises(ValueError, match="already holds a run"):
        train(tiny)
    model, history = train(load_recipe(tiny, {"overwrite": True, "max_iters": 2}))
    assert history[-1]["step"] == 2


def test_a_second_run_may_compute_in_another_way(tiny):
    """Accelerate would hand on what the first one was told."""
    from nanogpt_accel.train import train

    losses = [
        train(tiny, mixed_precision=precision, out_dir=f"runs/{i}")[1][-1]["val_loss"]
        for i, precision in enumerate(("no", "bf16", "no"))
    ]
    assert losses[0] == losses[2] != losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_trainings_in_threads_of_one_process(tiny, monkeypatch):
    """They would draw from one generator."""
    from nanogpt_accel.train import run_training as real
    from nanogpt_accel.train import train

    found = []

    def other():
        try:
            train(tiny, out_dir="runs/other")
        except ValueError as error:
            found.append(str(error))

    def meanwhile(recipe, signals):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return real(recipe, signals)

    monkeypatch.setattr("nanogpt_accel.train.run_training", meanwhile)
    train(tiny)
    assert "another thread" in found[0] and not Path("runs/other").exists()


def test_a_wrong_key_from_python(tiny):
    from nanogpt_accel.train import train

    with pytest.raises(ValueError, match="unknown key n_layers"):
        train(tiny, n_layers=3)


def test_every_public_name_is_there():
    for name in nanogpt_accel.__all__:
        assert (getattr(nanogpt_accel, name).__doc__ or "").strip(), name


@pytest.mark.slow
def test_the_python_of_the_readme(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    loading = [block for block in blocks if "AutoModelForCausalLM" in block]
    training = [block for block in blocks if "nanogpt_accel.train import train" in block]
    assert len(loading) == len(training) == 1 and len(blocks) == 2
    code = training[0].replace(
        "max_iters=100", "max_iters=51, n_layer=1, n_embd=32, n_head=2, vocab_size=300, corpus='text', eval_iters=2"
    )
    code += loading[0].replace("runs/shakespeare_char_cpu", "runs/notebook")
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / "text" / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 40)
    (tmp_path / "recipes").symlink_to(REPOSITORY / "recipes")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr
