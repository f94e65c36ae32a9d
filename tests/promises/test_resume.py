"""The promise of exact resume: a run that is killed at any moment and resumed equals the run that was never killed.

Dropout is on in all runs. Most runs are forked (see launching.py), but these are also real processes.
"""

import os
import random
import re
import time

import pytest
from launching import Ranks, Torchrun
from runs import SMALL, copy_without, largest_difference, make_text, ordered_numbers, trainer, weights, write_recipe

pytestmark = pytest.mark.skipif(os.name != "posix", reason="SIGKILL and fork are POSIX's")
STEPS, SAVE = 40, 8


@pytest.fixture
def start():
    """Return a function start(run, argv, processes=1) that starts Ranks. Ranks that still run at the end of the test
    are killed."""
    jobs = []

    def start(run, argv, processes=1, kind=Ranks):
        jobs.append(kind(run, argv, processes=processes))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


# ---- the reference runs, which are never killed


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("resume"), **SMALL, max_iters=STEPS, eval_interval=SAVE)


def run_reference(recipe, processes):
    run = recipe.parent / f"never_killed_{processes}"
    Ranks(run, [recipe, f"out_dir={run}"], processes=processes).finish()
    assert len(ordered_numbers(run)) == STEPS + STEPS // SAVE + 1
    assert {trainer(run, step)["processes"] for step in range(SAVE, STEPS + 1, SAVE)} == {processes}
    return run


@pytest.fixture(scope="module")
def one(recipe):
    return run_reference(recipe, 1)


@pytest.fixture(scope="module")
def two(recipe, one):
    return run_reference(recipe, 2)


# ---- killed


def test_resume_after_sigkill_is_bitwise_equal(start, recipe, one, tmp_path):
    run = tmp_path / "run"
    # save often, so that a kill meets a save; the interval does not change the numbers
    first = [recipe, f"out_dir={run}", "save_interval=2"]
    again = [run]

    for argv, steps in ((first, 5), (again, 4), (again, 7)):
        job = start(run, argv)
        job.wait_until(lambda job=job, steps=steps: job.n_steps() >= steps)
        job.kill()

    job = start(run, again)
    job.wait_until(lambda: any(run.glob(".checkpoint-*")))
    job.kill()
    assert any(run.glob(".checkpoint-*"))  # an incomplete checkpoint

    job = start(run, again)
    job.finish()
    assert ordered_numbers(run) == ordered_numbers(one)
    assert weights(run, STEPS) == weights(one, STEPS)
    assert not list(run.glob(".checkpoint-*"))
    resumed = [int(step) for step in re.findall(r"resuming .* from checkpoint-(\d+)", job.output.read_text())]
    assert len(resumed) == 4 and resumed == sorted(resumed)


def test_run_killed_before_its_first_checkpoint_starts_again_only_if_asked(start, recipe, one, tmp_path):
    run = tmp_path / "run"
    job = start(run, [recipe, f"out_dir={run}"])
    job.wait_until(lambda: job.n_steps() >= 3)
    job.kill()
    job = start(run, [run])
    assert job.end() == [2]
    assert "nothing to resume" in job.says() and "init_from=scratch" in job.says()
    start(run, [run, "init_from=scratch"]).finish()
    assert ordered_numbers(run) == ordered_numbers(one)


def test_resume_of_two_processes_after_sigkill_is_bitwise_equal(start, recipe, two, tmp_path):
    run = tmp_path / "run"
    job = start(run, [recipe, f"out_dir={run}"], 2, kind=Torchrun)
    job.wait_until(lambda: job.n_steps() >= SAVE + 2)
    job.kill()
    job = start(run, [run], 2)
    job.wait_until(lambda: job.n_steps() >= SAVE + 5)
    job.kill()
    start(run, [run], 2).finish()
    assert ordered_numbers(run) == ordered_numbers(two)
    assert weights(run, STEPS) == weights(two, STEPS)


def test_resume_repairs_an_incomplete_last_line_of_the_metrics(start, two, tmp_path):
    run = tmp_path / "run"
    copy_without(two, run, STEPS)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-4]) + lines[-4][:17])
    start(run, [run], 2).finish()
    assert ordered_numbers(run) == ordered_numbers(two)


# ---- another number of processes


def test_two_processes_compute_the_same_as_one(one, two):
    assert largest_difference(one, two) < 1e-5


@pytest.mark.parametrize(("started_on", "resumed_on"), [(2, 1), (1, 2)])
def test_resume_with_another_number_of_processes(start, one, two, tmp_path, started_on, resumed_on):
    run, source = tmp_path / "run", {1: one, 2: two}[started_on]
    copy_without(source, run, *range(2 * SAVE, STEPS + 1, SAVE))
    start(run, [run], resumed_on).finish()
    assert largest_difference(run, source) < 1e-5
    before = [line for line in ordered_numbers(source) if line["step"] < SAVE]
    assert ordered_numbers(run)[: len(before)] == before
    assert trainer(run, STEPS)["processes"] == resumed_on and trainer(run, STEPS)["step"] == STEPS


def test_raising_max_iters_of_a_finished_run_equals_one_long_run(start, recipe, one, tmp_path):
    """`train RUN max_iters=N`: k steps and then N - k equal N steps, if the learning rate schedule is the same."""
    run = tmp_path / "run"
    start(run, [recipe, f"out_dir={run}", f"max_iters={SAVE}", f"lr_decay_iters={STEPS}"]).finish()
    start(run, [run, f"max_iters={STEPS}"]).finish()
    assert ordered_numbers(run) == ordered_numbers(one)


# ---- a mix of sources


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    """A recipe with three sources, two stages and a validation set. The second stage starts between two checkpoints."""
    folder = tmp_path_factory.mktemp("mix")
    for seed, name in enumerate("abc"):
        (folder / f"{name}.txt").write_text(make_text(2000, seed=seed))
    sources = [
        {"corpus": str(folder / f"{name}.txt"), "weight": weight} for name, weight in zip("abc", (6, 3, 1), strict=True)
    ]
    settings = SMALL | {"max_iters": 24, "eval_interval": SAVE, "tokenizer": "bpe", "vocab_size": 260}
    stages = [{"from": 12, "mix": [{"name": "b", "weight": 1}, {"name": "c", "weight": 2}]}]
    validation = {"held": sources[0] | {"split": "all"}}
    del validation["held"]["weight"]
    return write_recipe(folder, corpus=None, mix=sources, stages=stages, validation=validation, **settings)


@pytest.fixture(scope="module")
def mix_run(mix):
    run = mix.parent / "never_killed"
    Ranks(run, [mix, f"out_dir={run}"]).finish()
    return run


def test_resume_after_sigkill_in_the_middle_of_a_stage_is_bitwise_equal(start, mix, mix_run, tmp_path):
    run = tmp_path / "run"
    job = start(run, [mix, f"out_dir={run}"])
    for step in (10, 14, 19):  # in the first stage, and twice in the second
        job.wait_for_step(step)
        job.kill()
        job = start(run, [run])
    job.finish()
    assert ordered_numbers(run) == ordered_numbers(mix_run) and weights(run, 24) == weights(mix_run, 24)
    assert {"val_loss/held", "val_loss/c"} < ordered_numbers(run)[-1].keys()


@pytest.mark.slow
def test_a_mix_on_two_processes_and_resumed_on_one_equals_one_process(start, mix, mix_run, tmp_path):
    run = tmp_path / "run"
    start(run, [mix, f"out_dir={run}", "max_iters=16", "lr_decay_iters=24"], 2).finish()
    start(run, [run, "max_iters=24"]).finish()
    assert largest_difference(run, mix_run) < 1e-5


# ---- many kills


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_resume_after_ten_random_kills_is_bitwise_equal(start, recipe, tmp_path, processes, seed):
    rng, run, reference = random.Random(seed), tmp_path / "run", tmp_path / "reference"
    options = ["max_iters=200", f"seed={seed}", "keep_last=2"]
    start(reference, [recipe, f"out_dir={reference}", *options], processes).finish()
    argv, kills = [recipe, f"out_dir={run}", "save_interval=2", *options], 0
    while kills < 10:
        job = start(run, argv, processes)
        steps = rng.randint(0 if kills else 4, 14)
        job.wait_until(lambda job=job, steps=steps: job.n_steps() >= steps)
        time.sleep(rng.random() * 0.06)  # at any point of a step, a save or an evaluation
        kills += None in job.exit_codes()
        job.kill()
        argv = [run]
    start(run, argv, processes).finish()
    assert ordered_numbers(run) == ordered_numbers(reference)
    assert weights(run, 200) == weights(reference, 200)
