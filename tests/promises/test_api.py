"""The promise of the Python API: train() and load_recipe() in a notebook, and the Python code of the README."""

import importlib
import inspect
import re
import shutil
import threading
from pathlib import Path

import pytest
from launching import run_python
from runs import numbers, weights, write_recipe
from shared import REPOSITORY, WITHOUT_THE_PACKAGE

import nanogpt_accel
from nanogpt_accel.recipe import load_recipe
from nanogpt_accel.tracking.metrics_log import History, read_metrics


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
    with pytest.raises(ValueError, match=r"^max_iters: a recipe cannot be changed .*train\(PATH, max_iters=2\)"):
        train(load_recipe(tiny), max_iters=2)
    model, history = train(load_recipe(tiny, {"overwrite": True, "max_iters": 2}))
    assert history[-1]["step"] == 2


def test_train_continues_a_run_folder_as_the_command_does(tiny, call, refused):
    from nanogpt_accel.train import train

    train(tiny, out_dir="runs/function")
    shutil.copytree("runs/function", "runs/command", symlinks=True)
    _, history = train(Path("runs/function"), max_iters=7, learning_rate=2e-3)
    call("train", "runs/command", "max_iters=7", "learning_rate=2e-3")
    assert [line["step"] for line in history.steps] == [*range(7)] and history[-1]["step"] == 7
    assert numbers("runs/function") == numbers("runs/command")
    assert weights("runs/function", 7) == weights("runs/command", 7)
    recipe, other = (load_recipe(f"runs/{run}").replace(out_dir="") for run in ("function", "command"))
    assert recipe == other and recipe.train.max_iters == 7  # run.yaml too
    # the same mistakes are refused, in the same words
    Path("empty").mkdir()
    for target, overrides in (
        ("empty", {}),
        ("runs/function", {"out_dir": "elsewhere"}),
        ("runs/function", {"n_layer": 3}),
        ("runs/function", {"n_layers": 3}),
        ("runs/missing", {}),
    ):
        with pytest.raises((ValueError, OSError)) as caught:
            train(target, **overrides)
        said = call("train", target, *(f"{key}={value}" for key, value in overrides.items()), status=2)
        assert said == f"error: {caught.value}\n"


def test_history_separates_steps_from_evaluations_and_plots_itself(tiny):
    import matplotlib

    from nanogpt_accel.train import train

    matplotlib.use("agg")
    _, history = train(tiny, max_iters=3)
    assert [line["step"] for line in history.steps] == [0, 1, 2] and all("loss" in line for line in history.steps)
    assert [line["step"] for line in history.evaluations] == [0, 2, 3]
    assert all("val_loss" in line and "loss" not in line for line in history.evaluations)
    assert history == read_metrics("runs/tiny/metrics.jsonl") and isinstance(history, list)
    assert repr(history) == "<History: 3 logged steps, 3 evaluations; see .steps, .evaluations and .plot()>"
    axes = history.plot()
    curves = [list(map(tuple, line.get_xydata())) for line in axes.lines]
    assert curves == [
        [(line["step"], line["loss"]) for line in history.steps],
        [(line["step"], line["val_loss"]) for line in history.evaluations],
    ]
    assert history[:2].__class__ is list and History(history[:2]).plot(axes) is axes and len(axes.lines) == 4
    assert History().plot(axes) is axes and len(axes.lines) == 4  # a history without lines can be plotted


def test_help_of_train_starts_with_its_purpose():
    from nanogpt_accel.train import train

    first, blank, *rest = inspect.getdoc(train).splitlines()
    assert first.startswith("Train a GPT") and blank == "" and "max_iters=100" in rest[0]


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
def test_notebook_shows_the_progress_once_the_sample_as_one_text_and_plots(tiny):
    """Run the cells in a real kernel."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    settings = "max_iters=200, eval_interval=100, log_interval=1, sample_tokens=40, sample_prompt='the'"
    cells = [
        f"from nanogpt_accel.train import train\nmodel, history = train({tiny!r}, {settings})",
        "history",
        "history.plot();",
        "from matplotlib import pyplot\npyplot.plot([1, 2]);",  # the notebook's own plots still appear
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": "."}}).execute()
    training, history, plot, own_plot = (cell.outputs for cell in notebook.cells)
    displays = [output for output in training if output.output_type == "display_data"]
    assert len(displays) == 1 and "200/200, loss" in displays[0].data["text/html"]
    prints = [output.text for output in training if output.get("name") == "stdout"]
    (sample,) = [text for text in prints if "A sample of 40 tokens" in text]
    assert len(sample.split("-\n")[1].partition("\n-")[0]) == 3 + 40 and not any("iter " in text for text in prints)
    assert history[0].data["text/plain"].startswith("<History: 200 logged steps, 3 evaluations")
    assert [len(output.data["image/png"]) > 5000 for output in (*plot, *own_plot)] == [True, True]


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
    for order in (lines, lines[::-1]):  # in either order, without the package, and without a question about custom code
        code = "\n".join([WITHOUT_THE_PACKAGE, imports, *order])
        assert "custom code" not in run_python("-c", code, cwd=tmp_path).stdout
