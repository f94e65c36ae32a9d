"""The promise of the Python API: train() and load_recipe() in a notebook, and the Python code of the README."""

import importlib
import re
import threading
from pathlib import Path

import pytest
from launching import run_python
from runs import write_recipe
from shared import REPOSITORY, WITHOUT_THE_PACKAGE

import nanogpt_accel
from nanogpt_accel.recipe import load_recipe


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return str(write_recipe(tmp_path, dropout=None, max_iters=4, eval_interval=2))


@pytest.mark.parametrize("first", ["function", "module"])
def test_train_is_callable_after_any_order_of_imports(tiny, first):
    if first == "module":
        importlib.import_module("nanogpt_accel.train")
    from nanogpt_accel.train import train

    model, history = train(tiny, max_iters=3)
    assert type(model).__name__ == "GPT" and model.config.n_embd == 16
    assert [line["step"] for line in history if "val_loss" in line] == [0, 2, 3]
    assert [line["step"] for line in history if "grad_norm" in line] == [0, 1, 2]
    # a second run in the same folder needs overwrite; and train takes a Recipe as well as a path
    with pytest.raises(ValueError, match="already contains a run"):
        train(tiny)
    with pytest.raises(ValueError, match="max_iters: a Recipe cannot be changed"):
        train(load_recipe(tiny), max_iters=2)
    model, history = train(load_recipe(tiny, {"overwrite": True, "max_iters": 2}))
    assert history[-1]["step"] == 2


def test_second_run_of_a_process_may_have_another_precision(tiny):
    """Accelerate would keep the settings of the first run."""
    from nanogpt_accel.train import train

    losses = [
        train(tiny, mixed_precision=precision, out_dir=f"runs/{i}")[1][-1]["val_loss"]
        for i, precision in enumerate(("no", "bf16", "no"))
    ]
    assert losses[0] == losses[2] != losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_two_trainings_in_threads_of_one_process_are_refused(tiny, monkeypatch):
    """They would share a random number generator."""
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


def test_unknown_key_from_python_is_refused(tiny):
    from nanogpt_accel.train import train

    with pytest.raises(ValueError, match="unknown key n_layers"):
        train(tiny, n_layers=3)


def test_every_public_name_has_a_docstring():
    for name in nanogpt_accel.__all__:
        assert (getattr(nanogpt_accel, name).__doc__ or "").strip(), name


@pytest.mark.slow
def test_python_code_of_the_readme_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    loading = [block for block in blocks if "AutoModelForCausalLM" in block]
    training = [block for block in blocks if "nanogpt_accel.train import train" in block]
    schedule = [block for block in blocks if "SCHEDULES[" in block]  # run by test_hack_it.py
    assert len(loading) == len(training) == len(schedule) == 1 and len(blocks) == 3
    code = training[0].replace(
        "max_iters=100", "max_iters=51, n_layer=1, n_embd=32, n_head=2, vocab_size=300, corpus='text', eval_iters=2"
    )
    code += loading[0].replace("runs/shakespeare_char_cpu", "runs/notebook")
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / "text" / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 40)
    (tmp_path / "recipes").symlink_to(REPOSITORY / "recipes")
    run_python("-c", code, cwd=tmp_path)
    imports, _, *lines = loading[0].replace("runs/shakespeare_char_cpu", "runs/notebook").splitlines()
    for order in (lines, lines[::-1]):  # in either order, without the package, and without a question
        code = "\n".join([WITHOUT_THE_PACKAGE, imports, *order])
        assert "custom code" not in run_python("-c", code, cwd=tmp_path).stdout
