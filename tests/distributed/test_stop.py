"""A run that is told to stop, or loses a process, ends on all its processes with a whole checkpoint, and goes on as if
nothing had been."""

import os
import signal
import subprocess
import sys
import time

import pytest
from launching import ROOT, Ranks, finish, losses, numbers, trainer, write_recipe

from nanogpt_accel.checkpoint.layout import checkpoint_path, list_checkpoints
from nanogpt_accel.checkpoint.verify import find_corruption

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and fork are POSIX's")
LONG = 80  # steps: enough for a signal to meet the run on its way
OPTIONS = [f"max_iters={LONG}", "eval_interval=40", "keep_last=20"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("signals"))


@pytest.fixture(scope="module")
def calm(recipe):
    """calm(processes): a run that nobody disturbed."""
    runs = {}

    def get(processes):
        if processes not in runs:
            runs[processes] = recipe.parent / f"calm_{processes}"
            begin(recipe, runs[processes], processes).end()
        return runs[processes]

    return get


def begin(recipe, run, processes, *options, **more):
    return Ranks(
        run,
        [str(recipe), f"out_dir={run}", *OPTIONS, *options],
        "multi_gpu.yaml" if processes > 1 else None,
        processes,
        **more,
    )


def stopped_well(job, run):
    """All ranks ended alike, after the same step, and saved it; returns the step."""
    assert set(job.end()) == {75}, job.says()
    said = job.says()
    (line,) = [line for line in said.splitlines() if line.startswith("stopped ")]
    step = int(line.split("after ")[1].split(" of ")[0])
    assert f"go on from checkpoint-{step:06d} with: nanogpt-accel train {run}" in line
    assert "Traceback" not in said and "error" not in said
    path = checkpoint_path(run, step)
    assert find_corruption(path) is None and trainer(run, step)["step"] == step
    assert max(losses(run)) == step - 1
    return step


def goes_on_as_if_nothing_had_been(recipe, run, calm, processes):
    finish(run, [str(run)], "multi_gpu.yaml" if processes > 1 else None, processes)
    assert numbers(run) == numbers(calm)
    name = f"checkpoint-{LONG:06d}/model.safetensors"
    assert (run / name).read_bytes() == (calm / name).read_bytes()


# ---- told to stop


@pytest.mark.parametrize(
    ("number", "ranks"),
    [
        (signal.SIGTERM, [1]),
        pytest.param(signal.SIGTERM, [0], marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, [0, 1], marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, [0, 1], marks=pytest.mark.slow),
    ],
)
def test_two_processes_are_told(recipe, calm, tmp_path, number, ranks):
    run = tmp_path / "run"
    job = begin(recipe, run, 2)
    job.wait_for_step(20)
    job.signal(number, *ranks)
    assert 20 < stopped_well(job, run) < LONG
    assert ("stopped by " + number.name in job.says()) == (0 in ranks)
    goes_on_as_if_nothing_had_been(recipe, run, calm(2), 2)


@pytest.mark.slow
@pytest.mark.parametrize("when", [39, 40])
def test_told_around_an_evaluation(recipe, calm, tmp_path, when):
    """The step at which the run stops may be one that evaluates and saves by itself."""
    run = tmp_path / "run"
    for stop in (when, when + 15, when + 30):
        options = [f"max_iters={LONG}"]
        job = Ranks(run, [str(run), *options]) if run.exists() else begin(recipe, run, 1)
        job.wait_for_step(stop)
        job.signal(signal.SIGUSR1)
        stopped_well(job, run)
    goes_on_as_if_nothing_had_been(recipe, run, calm(1), 1)


@pytest.mark.slow
def test_a_run_that_saves_in_the_background(recipe, calm, tmp_path):
    run = tmp_path / "run"
    job = begin(recipe, run, 2, "async_save=true")
    job.wait_for_step(30)
    job.signal(signal.SIGTERM, 1)
    stopped_well(job, run)
    goes_on_as_if_nothing_had_been(recipe, run, calm(2), 2)


@pytest.mark.slow
def test_out_of_time(recipe, calm, tmp_path):
    """max_hours; and `resume=auto` with the same command goes on, or begins."""
    for hours in ("1e-4", "2e-4", "4e-4", "8e-4"):  # 0.36 s may be over before the first step is made
        run = tmp_path / hours
        job = begin(recipe, run, 1, f"max_hours={hours}", "resume=auto")
        job.end()
        if list_checkpoints(run):
            break
    assert 0 < stopped_well(job, run) < LONG
    begun_again = begin(recipe, run, 1, "resume=auto")
    assert begun_again.end() == [0] and "resuming" in begun_again.says()
    assert numbers(run) == numbers(calm(1))


CTRL_C = """
import os, signal, sys, time
from nanogpt_accel.distributed.stop import StopSignals

with StopSignals() as signals:
    signals.armed = {armed}
    for pause in {pauses}:
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGINT)
    print("still here", signals.received)
"""


@pytest.mark.parametrize(
    ("armed", "pauses", "status", "out"),
    [
        (True, [0], 0, "still here SIGINT\n"),
        (True, [0, 0.1], 0, "still here SIGINT\n"),  # once from the terminal, once from the launcher
        (True, [0, 2.2], 130, ""),
        (False, [0], 1, ""),
    ],
)
def test_ctrl_c(armed, pauses, status, out):
    """The first one is noted, the second one leaves at once; outside of the loop the first one does."""
    done = subprocess.run(
        [sys.executable, "-c", CTRL_C.format(armed=armed, pauses=pauses)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode in (status, -signal.SIGINT) if status == 1 else done.returncode == status, done.stderr
    assert done.stdout == out and ("KeyboardInterrupt" in done.stderr) == (not armed)


# ---- a process that is gone, or silent


@pytest.mark.slow
@pytest.mark.parametrize(("number", "victim"), [(signal.SIGKILL, 1), (signal.SIGKILL, 0), (signal.SIGSTOP, 1)])
def test_a_lost_process(recipe, calm, tmp_path, number, victim):
    run, time_out = tmp_path / "run", 8
    job = begin(recipe, run, 2, f"collective_timeout={time_out}")
    job.wait_for_step(50)  # there is a checkpoint
    job.signal(number, victim)
    began = time.monotonic()
    job.processes[1 - victim].join(time_out + 30)
    status, seconds = job.exit_codes()[1 - victim], time.monotonic() - began
    job.kill()  # the one that was stopped
    print(f"{number.name} to rank {victim}: status {status} after {seconds:.1f} s")
    said = job.says()
    assert status == 2, said
    (line,) = [line for line in said.splitlines() if "error: " in line]
    assert "another process of this run is gone" in line and "go on from checkpoint-000040 with: " in line
    assert "Traceback" not in said
    assert [find_corruption(path) for path in list_checkpoints(run)] == [None]
    finish(run, [str(run), "collective_timeout=600"], "multi_gpu.yaml", 2)
    assert numbers(run) == numbers(calm(2))


# ---- processes that are about to do different things


@pytest.mark.slow
@pytest.mark.parametrize("option", ["learning_rate=1e-3", "seed=2"])
def test_different_recipes(recipe, tmp_path, option):
    run = tmp_path / "run"
    words = [str(recipe), f"out_dir={run}"]
    job = Ranks(run, [words, [*words, option]], "multi_gpu.yaml", 2)
    assert job.end() == [2, 2]
    lines = [line for line in job.says().splitlines() if "error: " in line]
    assert len(lines) == 2 and all(option.partition("=")[0] in line for line in lines), job.says()
    assert "Traceback" not in job.says() and not run.exists()


def test_stopped_where_an_evaluation_was_due(tmp_path, monkeypatch):
    """The evaluation is left for the next time, which also finds that its checkpoint is the best one."""
    from nanogpt_accel.__main__ import main
    from nanogpt_accel.distributed.stop import Stopper

    monkeypatch.chdir(tmp_path)
    options = ["max_iters=6", "eval_interval=2", "device=cpu"]
    recipe = write_recipe(tmp_path)
    assert main(["train", str(recipe), "out_dir=calm", *options]) == 0
    calls = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(Stopper, "all_ranks_agreed", lambda self: next(calls) == 4)
        assert main(["train", str(recipe), "out_dir=told", *options]) == 75
    path = tmp_path / "told" / "checkpoint-000004"
    before = (path / "state" / "trainer.json").stat().st_mtime_ns
    assert trainer(tmp_path / "told", 4)["evaluated"] is False and find_corruption(path) is None
    assert main(["train", "told"]) == 0
    assert numbers(tmp_path / "told") == numbers(tmp_path / "calm")
    assert not path.exists() or (path / "state" / "trainer.json").stat().st_mtime_ns == before
    assert [trainer(tmp_path / run, 6)["best_step"] for run in ("told", "calm")] == [6, 6]
    weights = [(tmp_path / run / "checkpoint-000006" / "model.safetensors").read_bytes() for run in ("told", "calm")]
    assert weights[0] == weights[1]


def test_skipping_does_not_go_with_deepspeed(tmp_path, monkeypatch, capsys):
    from nanogpt_accel.__main__ import main

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert main(["train", str(write_recipe(tmp_path)), f"out_dir={tmp_path / 'run'}", "on_nonfinite=skip"]) == 2
    assert "train.on_nonfinite=skip: DeepSpeed" in capsys.readouterr().err
