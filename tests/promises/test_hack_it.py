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


def add_switch(copy):
    """Add a model switch, as CONTRIBUTING.md describes: a field of GPTConfig, its use, and a key of the recipe."""
    for name, line, added in (
        ("model.py", "    zero_init: bool = False", "    embd_scale: bool = False\n"),
        ("model.py", "        if self.config.embd_norm:\n", "        x = x * (1 + 1e-6 * self.config.embd_scale)\n"),
        (
            "recipe.py",
            "    zero_init: bool = Field(",
            '    embd_scale: bool = Field(False, description="scale the embedding")\n',
        ),
    ):
        text = (copy / name).read_text(encoding="utf-8")
        assert text.count(line) == 1
        (copy / name).write_text(text.replace(line, added + line), encoding="utf-8")


# what a researcher does with the switch; each command prints its exit status
SCRIPT = """
import sys
from nanogpt_accel.__main__ import main
for words in (
    "train RECIPE",
    "train RECIPE out_dir=on embd_scale=true",
    "train on max_iters=9",
    "train run max_iters=9",
    "export run --to off",
    "export on --to stock",
    "export on --to custom form=custom",
    "plan RECIPE embd_scale=true",
):
    print(f"-- {words}:", main(words.replace("RECIPE", sys.argv[1]).split()), flush=True)
"""


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """(folder, output): the runs of a copy of the package, after the examples of the pages were applied to it."""
    folder = tmp_path_factory.mktemp("hack_it")
    copy = shutil.copytree(
        REPOSITORY / "nanogpt_accel", folder / "nanogpt_accel", ignore=shutil.ignore_patterns("__pycache__")
    )
    (schedule,) = [block for block in code_blocks("README.md", "python") if "SCHEDULES[" in block]
    with open(copy / "optim.py", "a", encoding="utf-8") as file:
        file.write("\n\n" + schedule)
    (metric,) = code_blocks("CONTRIBUTING.md", "diff")
    apply_diff(metric, copy / "train.py")
    add_switch(copy)
    settings = {"warmup_iters": WARMUP, "lr_decay_iters": DECAY, "learning_rate": LR, "min_lr": MIN_LR}
    recipe = write_recipe(folder, **settings, schedule="linear", max_iters=STEPS, out_dir=str(folder / "run"))
    env = package_env(PYTHONPATH=str(folder))
    done = run_python("-c", SCRIPT, recipe, env=env, cwd=folder)
    return folder, done.stdout + done.stderr


@pytest.fixture(scope="module")
def logged(changed):
    """The first training steps of the run without the switch."""
    return [line for line in numbers(changed[0] / "run") if "loss" in line][:STEPS]


def test_a_new_model_switch_trains_resumes_and_is_not_exported_as_a_stock_model_by_accident(changed):
    """The effect of the switch is too small to be found by comparing logits."""
    folder, output = changed
    statuses = dict(re.findall(r"^-- (.*): (\d+)$", output, re.MULTILINE))
    assert [words for words, status in statuses.items() if status != "0"] == ["export on --to stock"], output
    assert len(statuses) == 8 and (folder / "off" / "config.json").exists() and not (folder / "stock").exists()
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "does not support embd_scale=True (unknown to export)" in error and "form=custom" in error
    assert "embd_scale: bool" in (folder / "custom" / "model.py").read_text()
    assert "assumed: embd_scale=true does not change the estimates, because plan does not know this setting" in output


def test_schedule_of_the_readme_trains_with_its_learning_rates(logged):
    warmup = [LR * (step + 1) / (WARMUP + 1) for step in range(WARMUP)]
    decay = [
        LR - (LR - MIN_LR) * min(step - WARMUP, DECAY - WARMUP) / (DECAY - WARMUP) for step in range(WARMUP, STEPS)
    ]
    assert [line["learning_rate"] for line in logged] == pytest.approx([*warmup, *decay], rel=1e-12)


def test_metric_of_the_page_is_logged_at_every_step(logged):
    assert len(logged) == STEPS
    assert [line["perplexity"] for line in logged] == [math.exp(line["loss"]) for line in logged]
