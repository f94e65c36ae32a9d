"""tasks.py: lm-eval tasks during training, and DCLM's CORE. They need the package lm-eval."""

import importlib.util
import json
from pathlib import Path

import pytest
from launching import train_on_ranks
from runs import SMALL, make_text, numbers, weights, write_lm_eval_task, write_recipe

from nanogpt_accel.models import tasks
from nanogpt_accel.recipe import load_recipe
from nanogpt_accel.train import train
from nanogpt_accel.training import check_recipe, run_tasks

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="pip install lm-eval")
SETTINGS = SMALL | {"n_layer": 1, "tokenizer": "bpe", "vocab_size": 260, "max_iters": 8, "eval_interval": 2}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe, in the current folder, and a task of 22 questions in tasks/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    run_tasks.cache_clear()
    words = sorted(set(make_text(400).split()))
    rows = [{"question": words[i], "choices": [f" {words[-i]}", " of"], "answer": i % 2} for i in range(1, 23)]
    Path("tasks").mkdir()
    write_lm_eval_task(tmp_path / "tasks", rows, "parity")
    return write_recipe(tmp_path, **SETTINGS)


TASKS = {"tasks": ["parity"], "tasks_dir": "tasks", "tasks_interval": 4}


# ---- without lm-eval


def test_missing_lm_eval_is_reported_before_the_run(monkeypatch, refused, tmp_path):
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    monkeypatch.setattr(tasks.metadata, "version", lambda name: "0.4.11")
    with refused(ValueError, "train.tasks=hellaswag,core: requires lm-eval 0.4.12 or newer; run pip install"):
        load_recipe(write_recipe(tmp_path, tasks=["hellaswag", "core"]), check=check_recipe)


def test_tasks_are_due_at_their_interval_and_at_the_end(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, tasks=["x"], max_iters=22, eval_interval=4, tasks_interval=8))
    assert [step for step in range(23) if recipe.should_run_tasks(step)] == [0, 8, 16, 22]
    assert load_recipe(write_recipe(tmp_path, tasks=["x"], max_iters=6, eval_interval=2)).should_run_tasks(4)
    assert not load_recipe(write_recipe(tmp_path)).should_run_tasks(0)


def test_core_average_is_the_mean_of_the_centred_accuracies():
    perfect = {f"core_{name}": {"acc,none": 1.0} for name in tasks.CORE}
    chance = {f"core_{name}": {"acc,none": 0.0, "acc_norm,none": task[2]} for name, task in tasks.CORE.items()}
    assert tasks.core_average(perfect) == 1 and tasks.core_average(chance) == pytest.approx(0)
    one = chance | {"core_boolq": {"exact_match,get-answer": 0.81}}
    assert tasks.core_average(one) == pytest.approx((0.81 - 0.62) / 0.38 / 21)
    assert tasks.core_average({"boolq": {"acc,none": 1.0}}) is None


# ---- with lm-eval


@needs_lm_eval
@pytest.mark.slow
def test_tasks_during_training_equal_evaluate_and_change_no_number(recipe, call):
    train(str(recipe), out_dir="plain")
    train(str(recipe), out_dir="with_tasks", **TASKS)
    lines = numbers("with_tasks")
    found = {line["step"]: line.pop("parity/acc") for line in lines if "parity/acc" in line}
    assert lines == numbers("plain") and weights("with_tasks", 8) == weights("plain", 8)
    assert list(found) == [0, 4, 8] and len(set(found.values())) > 1
    for step in (4, 8):
        words = (f"with_tasks/checkpoint-{step:06d}", "tasks=parity", "tasks_dir=tasks", "device=cpu", "batch_size=4")
        assert json.loads(call("evaluate", *words, "--json"))["tasks"]["parity"]["acc,none"] == found[step]
    train(str(recipe), out_dir="limited", **TASKS, tasks_limit=5, max_iters=0)
    (line,) = numbers("limited")
    assert line["parity/acc"] * 5 == pytest.approx(round(line["parity/acc"] * 5))


@needs_lm_eval
@pytest.mark.slow
def test_ranks_divide_the_questions(recipe):
    settings = [f"{key}={value[0] if key == 'tasks' else value}" for key, value in TASKS.items()]
    for processes in (1, 2):
        out = Path(f"ranks{processes}").absolute()
        train_on_ranks(out, [recipe, f"out_dir={out}", *settings], processes=processes)
    one, two = ([line["parity/acc"] for line in numbers(f"ranks{n}") if "parity/acc" in line] for n in (1, 2))
    assert one == two and len(one) == 3


@needs_lm_eval
@pytest.mark.slow
def test_a_task_that_cannot_be_loaded_is_one_line_before_the_data_are_prepared(recipe, call):
    Path("tasks/rows.jsonl").unlink()
    line = call("train", recipe, "tasks=parity", "tasks_dir=tasks", status=2).splitlines()[-1]
    assert (
        line.startswith("error: train.tasks=parity: lm-eval cannot load this task or its dataset")
        and "rows.jsonl" in line
    )
    line = call("train", recipe, "tasks=no_such_task", status=2).splitlines()[-1]
    assert "train.tasks=no_such_task: unknown to lm-eval" in line
    assert not Path("tokens").exists()


@needs_lm_eval
@pytest.mark.slow
def test_lm_eval_has_all_tasks_of_core():
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    assert [task for task, *_ in tasks.CORE.values() if not manager.match_tasks([task])] == []
