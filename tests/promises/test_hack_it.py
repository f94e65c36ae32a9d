"""The promise of the README that the package is easy to extend: its examples work on a copy of the package."""

import math
import re
import shutil

import pytest
from launching import package_env, run_python
from runs import numbers, write_recipe
from shared import REPOSITORY

STEPS, WARMUP, DECAY, LR, MIN_LR = 8, 2, 6, 1e-2, 1e-3


def code_blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (REPOSITORY / page).read_text(encoding="utf-8"), re.DOTALL | re.M)


def apply_diff(diff, file):
    """Add the lines of a diff that start with + below its first line, which the file contains exactly once."""
    first, *added = diff.splitlines()
    assert first.startswith(" ") and added and all(line.startswith("+") for line in added)
    text, line = file.read_text(encoding="utf-8"), first[1:] + "\n"
    assert text.count(line) == 1, f"{file.name} does not contain the line of the diff: {line}"
    file.write_text(text.replace(line, line + "".join(line[1:] + "\n" for line in added)), encoding="utf-8")


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The training steps that a copy of the package logs, after the examples of the pages were applied to it."""
    folder = tmp_path_factory.mktemp("hack_it")
    copy = shutil.copytree(
        REPOSITORY / "nanogpt_accel", folder / "nanogpt_accel", ignore=shutil.ignore_patterns("__pycache__")
    )
    (schedule,) = [block for block in code_blocks("README.md", "python") if "SCHEDULES[" in block]
    with open(copy / "optim.py", "a", encoding="utf-8") as file:
        file.write("\n\n" + schedule)
    (metric,) = code_blocks("CONTRIBUTING.md", "diff")
    apply_diff(metric, copy / "train.py")
    settings = {"warmup_iters": WARMUP, "lr_decay_iters": DECAY, "learning_rate": LR, "min_lr": MIN_LR}
    recipe = write_recipe(folder, **settings, schedule="linear", max_iters=STEPS, out_dir=str(folder / "run"))
    env = package_env(PYTHONPATH=str(folder))
    run_python("-m", "nanogpt_accel.train", recipe, env=env, cwd=folder)
    return [line for line in numbers(folder / "run") if "loss" in line]


def test_schedule_of_the_readme_trains_with_its_learning_rates(logged):
    warmup = [LR * (step + 1) / (WARMUP + 1) for step in range(WARMUP)]
    decay = [
        LR - (LR - MIN_LR) * min(step - WARMUP, DECAY - WARMUP) / (DECAY - WARMUP) for step in range(WARMUP, STEPS)
    ]
    assert [line["learning_rate"] for line in logged] == pytest.approx([*warmup, *decay], rel=1e-12)


def test_metric_of_the_page_is_logged_at_every_step(logged):
    assert len(logged) == STEPS
    assert [line["perplexity"] for line in logged] == [math.exp(line["loss"]) for line in logged]
