"""The promise of exact resume: killed at any moment and continued, a run's numbers are those of one never killed.

Dropout is on everywhere. A process that was only asked to start takes seconds to import torch, so most runs here are
forked_command from one that has done so (multiprocessing's forkserver); what is killed is a real process all the same.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest
from launching import FORKS, forked_command, free_port, ordered_numbers, write_recipe

import nanogpt_accel

pytestmark = pytest.mark.skipif(os.name != "posix", reason="SIGKILL and fork are POSIX's")
LIMIT = 90  # seconds for anything that is waited for
STEPS, SAVE = 40, 8
RECIPE = """
data: {{corpus: {folder}/text.txt, tokenizer: char, val_fraction: 0.1, data_dir: {folder}/tokens}}
model: {{n_layer: 2, n_embd: 32, n_head: 2, block_size: 32, dropout: 0.2}}
optimizer: {{learning_rate: 1e-2, warmup_iters: 5}}
train: {{batch_size: 4, gradient_accumulation_steps: 4, max_iters: {steps}, eval_interval: {save}, eval_iters: 3,
         device: cpu, mixed_precision: no}}
checkpoint: {{keep_last: 9}}
"""


# ---- processes


class Job:
    """A training that runs beside the test, as one process or as several ranks of a group."""

    def __init__(self, run, argv, processes=1, by_torchrun=False):
        self.run, self.output = Path(run), Path(f"{run}.output")
        self.output.touch()
        self.before = self.output.stat().st_size  # what earlier jobs have said about this run
        self.forks, self.launcher = [], None
        if by_torchrun:
            env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(nanogpt_accel.__file__).parents[1])}
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                f"--nproc_per_node={processes}",
                f"--master_port={free_port()}",
                "-m",
                "nanogpt_accel",
                *argv,
            ]
            with open(self.output, "ab") as file:
                self.launcher = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
            return
        env, port = {}, free_port()
        for rank in range(processes):
            if processes > 1:  # what torchrun sets
                env = {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(processes),
                    "LOCAL_WORLD_SIZE": str(processes),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            process = FORKS.Process(target=forked_command, args=(argv, env, self.output))
            process.start()
            self.forks.append(process)

    def exit_codes(self):
        return [self.launcher.poll()] if self.launcher else [process.exitcode for process in self.forks]

    def finish(self):
        """Wait for the end, which must be a good one."""
        self.wait_until(lambda: None not in self.exit_codes(), may_end=True)
        assert set(self.exit_codes()) == {0}, self.output.read_text()

    def wait_until(self, condition, may_end=False):
        end = time.monotonic() + LIMIT
        while not condition():
            if time.monotonic() > end or not may_end and None not in self.exit_codes():
                self.kill()
                pytest.fail(f"waited in vain\n{self.output.read_text()}")
            time.sleep(0.0005)

    def steps(self):
        """Number of steps that this job has reported so far."""
        return self.output.read_bytes()[self.before :].count(b"\niter ")

    def kill(self):
        """SIGKILL to every process of the job, whichever groups they have made for themselves."""
        pids = [process.pid for process in self.forks]
        if self.launcher:
            pids = [p.pid for p in psutil.Process(self.launcher.pid).children(recursive=True)] + [self.launcher.pid]
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for process in self.forks:
            process.join(LIMIT)
        if self.launcher:
            self.launcher.wait(LIMIT)
        psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], LIMIT)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(run, argv, ...) -> Job. Whatever still runs at the end is killed."""
    jobs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # sums of floats depend on the number of threads
        forkserver.ensure_running()

    def start(*args, **kwargs):
        jobs.append(Job(*args, **kwargs))
        return jobs[-1]

    yield start
    for job in jobs:
        if None in job.exit_codes():
            job.kill()


# ---- the runs that were never killed


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("resume"), RECIPE, steps=STEPS, save=SAVE)


def reference(start, recipe, processes):
    run = recipe.parent / f"never_killed_{processes}"
    start(run, ["train", str(recipe), f"out_dir={run}"], processes).finish()
    found = ordered_numbers(run)
    assert len(found) == STEPS + STEPS // SAVE + 1
    assert {
        json.loads((run / f"checkpoint-{step:06d}/state/trainer.json").read_text())["processes"]
        for step in range(SAVE, STEPS + 1, SAVE)
    } == {processes}
    return run


@pytest.fixture(scope="module")
def one(start, recipe):
    return reference(start, recipe, 1)


@pytest.fixture(scope="module")
def two(start, recipe, one):
    return reference(start, recipe, 2)


def differs(run, other):
    """The largest difference between the numbers of two runs."""
    assert [list(line) for line in ordered_numbers(run)] == [list(line) for line in ordered_numbers(other)]
    return max(
        abs(a[key] - b[key]) for a, b in zip(ordered_numbers(run), ordered_numbers(other), strict=True) for key in a
    )


def weights(run, step=STEPS):
    return (run / f"checkpoint-{step:06d}" / "model.safetensors").read_bytes()


# ---- killed


def test_killed_at_several_moments(start, recipe, one, tmp_path):
    run = tmp_path / "run"
    # often saved, so that a save is met; when a run is saved makes no difference to it
    begin = ["train", str(recipe), f"out_dir={run}", "save_interval=2"]
    go_on = ["train", str(run)]

    for argv, steps in ((begin, 5), (go_on, 4), (go_on, 7)):
        job = start(run, argv)
        job.wait_until(lambda job=job, steps=steps: job.steps() >= steps)
        job.kill()

    job = start(run, go_on)
    job.wait_until(lambda: any(run.glob(".checkpoint-*")))
    job.kill()
    assert any(run.glob(".checkpoint-*"))  # half a checkpoint lies there

    job = start(run, go_on)
    job.finish()
    assert ordered_numbers(run) == ordered_numbers(one)
    assert weights(run) == weights(one)
    assert not list(run.glob(".checkpoint-*"))
    resumed = [int(step) for step in re.findall(r"resuming .* from checkpoint-(\d+)", job.output.read_text())]
    assert len(resumed) == 4 and resumed == sorted(resumed)


def test_killed_before_the_first_checkpoint(start, recipe, one, tmp_path):
    run = tmp_path / "run"
    job = start(run, ["train", str(recipe), f"out_dir={run}"])
    job.wait_until(lambda: job.steps() >= 3)
    job.kill()
    job = start(run, ["train", str(run)])
    job.wait_until(lambda: None not in job.exit_codes(), may_end=True)
    assert job.exit_codes() == [2]
    assert "nothing to resume" in job.output.read_text() and "init_from=scratch" in job.output.read_text()
    start(run, ["train", str(run), "init_from=scratch"]).finish()
    assert ordered_numbers(run) == ordered_numbers(one)


def test_two_processes_killed(start, recipe, two, tmp_path):
    run = tmp_path / "run"
    job = start(run, ["train", str(recipe), f"out_dir={run}"], 2, by_torchrun=True)
    job.wait_until(lambda: job.steps() >= SAVE + 2)
    job.kill()
    job = start(run, ["train", str(run)], 2)
    job.wait_until(lambda: job.steps() >= SAVE + 5)
    job.kill()
    start(run, ["train", str(run)], 2).finish()
    assert ordered_numbers(run) == ordered_numbers(two)
    assert weights(run) == weights(two)


def test_a_torn_last_line(start, two, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(two, run, symlinks=True)
    shutil.rmtree(run / f"checkpoint-{STEPS:06d}")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-4]) + lines[-4][:17])
    start(run, ["train", str(run)], 2).finish()
    assert ordered_numbers(run) == ordered_numbers(two)


# ---- another number of processes


def test_two_processes_do_what_one_does(one, two):
    assert differs(one, two) < 1e-5


@pytest.mark.parametrize(("begun", "goes_on"), [(2, 1), (1, 2)])
def test_goes_on_with_another_number_of_processes(start, one, two, tmp_path, begun, goes_on):
    run, source = tmp_path / "run", {1: one, 2: two}[begun]
    shutil.copytree(source, run, symlinks=True)
    for step in range(2 * SAVE, STEPS + 1, SAVE):
        shutil.rmtree(run / f"checkpoint-{step:06d}")
    start(run, ["train", str(run)], goes_on).finish()
    assert differs(run, source) < 1e-5
    before = [line for line in ordered_numbers(source) if line["step"] < SAVE]
    assert ordered_numbers(run)[: len(before)] == before
    trainer = json.loads((run / f"checkpoint-{STEPS:06d}/state/trainer.json").read_text())
    assert trainer["processes"] == goes_on and trainer["step"] == STEPS


def test_a_longer_run_is_a_run_that_went_on(start, recipe, one, tmp_path):
    """`train RUN max_iters=...`: N steps equal k plus N - k, where the schedule is the same."""
    run = tmp_path / "run"
    start(run, ["train", str(recipe), f"out_dir={run}", f"max_iters={SAVE}", f"lr_decay_iters={STEPS}"]).finish()
    start(run, ["train", str(run), f"max_iters={STEPS}"]).finish()
    assert ordered_numbers(run) == ordered_numbers(one)


# ---- the long version


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_ten_times_at_random(start, recipe, tmp_path, processes, seed):
    draw, run, calm = random.Random(seed), tmp_path / "run", tmp_path / "calm"
    options = ["max_iters=200", f"seed={seed}", "keep_last=2"]
    start(calm, ["train", str(recipe), f"out_dir={calm}", *options], processes).finish()
    argv, deaths = ["train", str(recipe), f"out_dir={run}", "save_interval=2", *options], 0
    while deaths < 10:
        job = start(run, argv, processes)
        steps = draw.randint(0 if deaths else 4, 14)
        job.wait_until(lambda job=job, steps=steps: job.steps() >= steps)
        time.sleep(draw.random() * 0.06)  # anywhere in a step, a save or an evaluation
        deaths += None in job.exit_codes()
        job.kill()
        argv = ["train", str(run)]
    start(run, argv, processes).finish()
    assert ordered_numbers(run) == ordered_numbers(calm)
    assert weights(run, 200) == weights(calm, 200)
