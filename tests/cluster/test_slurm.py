"""configs/slurm/*.sbatch, unchanged, on a real Slurm: `apt-get install slurm-wlm`, then `pytest -m slow tests/cluster`.

The options on the command line of sbatch replace those in the scripts: fewer GPUs, a time limit of minutes.
"""

import json
import time

import pytest
from data_files import DOCS, content
from launching import Ranks
from runs import SMALL, losses, relative_difference, trainer, write_recipe
from shared import REPOSITORY
from slurm import TIMEOUT_S, Slurm, needs_slurm

from nanogpt_accel.data.prepare import prepare
from nanogpt_accel.recipe import load_recipe

pytestmark = [pytest.mark.slow, needs_slurm]
SINGLE, MULTI = "configs/slurm/single_node.sbatch", "configs/slurm/multi_node.sbatch"
SWEEP = "configs/slurm/sweep.sbatch"
PREPARE = "configs/slurm/prepare.sbatch"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with Slurm(tmp_path_factory.mktemp("slurm") / "slurm") as found:
        yield found


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    path = write_recipe(folder, **SMALL, max_iters=40, eval_interval=1000, eval_first=False, keep_last=20)
    prepare(load_recipe(path, {}).data)
    return path


def words(gpus=1, minutes=30, seconds=60):
    """Return options for sbatch. seconds: how long before the time limit the job gets its signal."""
    return [f"--gpus-per-node={gpus}", "--cpus-per-task=1", f"--time={minutes}", f"--signal=B:USR1@{seconds}"]


def wait_for_steps(slurm, job, run, count):
    end = time.monotonic() + TIMEOUT_S
    while not (run / "metrics.jsonl").is_file() or len(losses(run)) < count:
        assert time.monotonic() < end and slurm.state(job)[0] in ("PENDING", "RUNNING"), slurm.log(job)
        time.sleep(0.2)


def test_two_machines_reach_the_time_limit_and_complete_with_the_same_losses(slurm, recipe, tmp_path):
    """DDP on 4 processes sums in another order after a restart; a low learning rate keeps the difference small."""
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    argv = [recipe, f"out_dir={run}", "max_iters=1500", "learning_rate=1e-5"]
    job = slurm.submit(MULTI, *argv, sbatch=words(gpus=2, minutes=2), config="configs/multi_node.yaml")
    state, restarts = slurm.wait(job)
    log = slurm.log(job)
    assert state == "COMPLETED" and restarts >= 1, log
    assert "stopped by " in log and "(4 processes x 1)" in log and log.count("requeued: ") == restarts
    assert "machine 0 of 2 starts: " in log and "machine 1 of 2 starts: " in log
    assert trainer(run, 1500)["processes"] == 4
    Ranks(undisturbed, [*argv[:1], f"out_dir={undisturbed}", *argv[2:]], "multi_gpu.yaml", 4).finish()
    assert relative_difference(run, undisturbed) < 1e-5


def test_scancel_saves_a_checkpoint(slurm, recipe, tmp_path):
    run = tmp_path / "run"
    argv = [recipe, f"out_dir={run}", "max_iters=100000"]
    job = slurm.submit(SINGLE, *argv, sbatch=words(gpus=2), config="configs/multi_gpu.yaml")
    wait_for_steps(slurm, job, run, 5)
    slurm.run("scancel", str(job))
    assert slurm.wait(job) == ("CANCELLED", 0)
    end = time.monotonic() + 60
    while not list(run.glob("checkpoint-*")):
        assert time.monotonic() < end, slurm.log(job)
        time.sleep(0.2)


def test_a_recipe_that_fails_is_not_requeued(slurm, recipe, tmp_path):
    job = slurm.submit(MULTI, recipe, f"out_dir={tmp_path}/run", "n_heads=3", sbatch=words())
    assert slurm.wait(job) == ("FAILED", 0)
    assert "unknown key n_heads" in slurm.log(job) and "requeued" not in slurm.log(job)


def test_two_jobs_on_one_machine_do_not_disturb_each_other(slurm, recipe, tmp_path):
    options = [*words(gpus=2), "--nodelist=node1"]
    jobs = [
        slurm.submit(SINGLE, recipe, f"out_dir={tmp_path}/{name}", sbatch=options, config="configs/multi_gpu.yaml")
        for name in ("a", "b")
    ]
    assert [slurm.wait(job) for job in jobs] == [("COMPLETED", 0)] * 2, "\n".join(map(slurm.log, jobs))
    assert [trainer(tmp_path / name, 40)["processes"] for name in ("a", "b")] == [2, 2]


def test_each_task_of_an_array_trains_a_point_and_is_requeued_alone(slurm, recipe, tmp_path):
    folder = tmp_path / "sweep"
    argv = [recipe, "max_iters=40,1000", f"out_dir={folder}"]
    job = slurm.submit(SWEEP, *argv, sbatch=[*words(), "--array=1-2", f"--output={slurm.folder}/%A_%a.log"])
    wait_for_steps(slurm, f"{job}_2", folder / "max_iters=1000", 5)
    slurm.run("scancel", "--batch", "--signal=USR1", f"{job}_2")  # the signal that SLURM sends before the time limit
    for task, steps in ((1, 40), (2, 1000)):
        assert slurm.wait(f"{job}_{task}") == ("COMPLETED", task - 1), slurm.log(f"{job}_{task}")
        log = slurm.log(f"{job}_{task}")
        assert log.count("requeued: resume=auto") == log.count("stopped by SIGUSR1") == task - 1, log
        assert trainer(folder / f"max_iters={steps}", steps)["step"] == steps
    assert len(list(folder.iterdir())) == 2 and not list(REPOSITORY.glob(".requeue-*"))


SLOW_START = """
import sys, time
if "nanogpt_accel.train" in sys.orig_argv[:4]:  # not the launcher
    time.sleep(90)
"""


def test_a_job_without_progress_is_not_requeued_for_ever(slurm, recipe, tmp_path):
    """The signal comes before the first step. The first attempt counts the data that were prepared before the job."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_START)
    argv, options = [recipe, f"out_dir={tmp_path}/run"], words(minutes=3, seconds=170)
    job = slurm.submit(SINGLE, *argv, sbatch=options, config="configs/cpu.yaml", before=tmp_path)
    assert slurm.wait(job) == ("FAILED", 3), slurm.log(job)
    assert slurm.log(job).count("error: not requeued: 3 attempts in a row without a new checkpoint") == 1
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_an_array_prepares_the_bytes_of_one_process(slurm, tmp_path):
    """The bytes are also the same if one worker is submitted as a separate array."""
    (tmp_path / "texts").mkdir()
    for number in range(7):
        rows = [json.dumps({"text": text}) for text in DOCS[number * 28 : (number + 1) * 28]]
        (tmp_path / f"texts/{number}.jsonl").write_text("\n".join(rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {{corpus: {tmp_path}/texts, tokenizer: bpe, vocab_size: 300, val_fraction: 0.2}}\n")
    prepare(load_recipe(recipe, {"data_dir": str(tmp_path / "one")}).data)
    for folder, arrays in (("three", ["0-2"]), ("two and one", ["0-1", "2"])):
        jobs = []
        for array in arrays:
            argv = [recipe, f"data_dir={tmp_path}/{folder}", *(["workers=3"] if arrays[1:] else [])]
            options = ["--cpus-per-task=1", "--time=10", f"--array={array}", f"--output={slurm.folder}/%A_%a.log"]
            job = slurm.submit(PREPARE, *argv, sbatch=options)
            jobs += [f"{job}_{task}" for task in range(int(array[0]), int(array[-1]) + 1)]
        assert [slurm.wait(job) for job in jobs] == [("COMPLETED", 0)] * 3, "\n".join(map(slurm.log, jobs))
        assert content(tmp_path / folder) == content(tmp_path / "one")
