"""A run that gets a signal, reaches max_hours or loses a process ends on all ranks with a valid checkpoint, and resumes
exactly."""

import os
import signal
import time

import pytest
import torch
from launching import Ranks, run_python, torchrun_variables, train_on_ranks
from runs import SMALL, checkpoint, losses, numbers, trainer, weights, write_recipe

from nanogpt_accel.checkpoint.layout import list_checkpoints
from nanogpt_accel.checkpoint.verify import find_corruption
from nanogpt_accel.distributed.stop import StopSignals, lost_process

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and fork are POSIX's")
STEPS = 80  # enough for a signal to arrive before the end
SETTINGS = SMALL | {"bias": True, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    # with Muon, which also tests that two processes that divide its work resume exactly
    return write_recipe(folder, **SETTINGS, max_iters=STEPS, eval_interval=40, keep_last=20, algorithm="muon")


@pytest.fixture(scope="module")
def undisturbed(recipe):
    """Return a function undisturbed(processes) that returns the folder of a complete run."""
    runs = {}

    def get(processes):
        if processes not in runs:
            runs[processes] = recipe.parent / f"undisturbed_{processes}"
            start(recipe, runs[processes], processes).end()
        return runs[processes]

    return get


def start(recipe, run, processes, *options, **more):
    return Ranks(
        run,
        [recipe, f"out_dir={run}", *options],
        "multi_gpu.yaml" if processes > 1 else None,
        processes,
        **more,
    )


def check_stopped(job, run):
    """Check that all ranks ended with status 75 after the same step and saved it; return the step."""
    assert set(job.end()) == {75}, job.says()
    said = job.says()
    (line,) = [line for line in said.splitlines() if line.startswith("stopped ")]
    step = int(line.split("after ")[1].split(" of ")[0])
    assert f"resume from checkpoint-{step:06d} with: nanogpt-accel train {run}" in line
    assert "Traceback" not in said and "error" not in said
    path = checkpoint(run, step)
    assert find_corruption(path) is None and trainer(run, step)["step"] == step
    assert max(losses(run)) == step - 1
    return step


def check_resume(run, reference, processes):
    """Resume a run, and check that it equals the undisturbed one."""
    train_on_ranks(run, [run], "multi_gpu.yaml" if processes > 1 else None, processes)
    assert numbers(run) == numbers(reference)
    assert weights(run, STEPS) == weights(reference, STEPS)


# ---- signals and max_hours


@pytest.mark.parametrize(
    ("number", "ranks"),
    [
        (signal.SIGTERM, [1]),
        pytest.param(signal.SIGTERM, [0], marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, [0, 1], marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, [0, 1], marks=pytest.mark.slow),
    ],
)
def test_signal_to_any_rank_stops_both_after_the_same_step(recipe, undisturbed, tmp_path, number, ranks):
    run = tmp_path / "run"
    job = start(recipe, run, 2)
    job.wait_for_step(20)
    job.signal(number, *ranks)
    assert 20 < check_stopped(job, run) < STEPS
    assert ("stopped by " + number.name in job.says()) == (0 in ranks)
    check_resume(run, undisturbed(2), 2)


@pytest.mark.slow
@pytest.mark.parametrize("when", [39, 40])
def test_stop_signal_around_an_evaluation_resumes_exactly(recipe, undisturbed, tmp_path, when):
    """The run may stop at a step that evaluates and saves anyway."""
    run = tmp_path / "run"
    for stop in (when, when + 15, when + 30):
        options = [f"max_iters={STEPS}"]
        job = Ranks(run, [run, *options]) if run.exists() else start(recipe, run, 1)
        job.wait_for_step(stop)
        job.signal(signal.SIGUSR1)
        check_stopped(job, run)
    check_resume(run, undisturbed(1), 1)


@pytest.mark.slow
def test_stop_signal_with_async_save_resumes_exactly(recipe, undisturbed, tmp_path):
    run = tmp_path / "run"
    job = start(recipe, run, 2, "async_save=true")
    job.wait_for_step(30)
    job.signal(signal.SIGTERM, 1)
    check_stopped(job, run)
    check_resume(run, undisturbed(2), 2)


@pytest.mark.slow
def test_max_hours_stops_the_run_and_resume_auto_continues_it(recipe, undisturbed, tmp_path):
    for hours in ("1e-4", "2e-4", "4e-4", "8e-4"):  # 0.36 s may be over before the first step
        run = tmp_path / hours
        job = start(recipe, run, 1, f"max_hours={hours}", "resume=auto")
        job.end()
        if list_checkpoints(run):
            break
    assert 0 < check_stopped(job, run) < STEPS
    resumed = start(recipe, run, 1, "resume=auto")
    assert resumed.end() == [0] and "resuming" in resumed.says()
    assert numbers(run) == numbers(undisturbed(1))


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
def test_first_ctrl_c_is_noted_and_a_later_one_ends_the_process(armed, pauses, status, out):
    """Outside of the training loop (armed=False), the first one ends the process, as usual in Python."""
    done = run_python("-c", CTRL_C.format(armed=armed, pauses=pauses), status=None)
    assert done.returncode in (status, -signal.SIGINT) if status == 1 else done.returncode == status, done.stderr
    assert done.stdout == out and ("KeyboardInterrupt" in done.stderr) == (not armed)


def test_usr1_before_the_loop_ends_the_process_with_status_75():
    signals = StopSignals()
    with pytest.raises(SystemExit) as caught:
        signals._handle(signal.SIGUSR1, None)
    assert caught.value.code == 75
    signals.armed = True
    signals._handle(signal.SIGUSR1, None)
    assert signals.received == "SIGUSR1"


# ---- a process that is killed or hangs


@pytest.mark.slow
@pytest.mark.parametrize(("number", "victim"), [(signal.SIGKILL, 1), (signal.SIGKILL, 0), (signal.SIGSTOP, 1)])
def test_losing_a_process_ends_the_other_and_the_run_resumes_exactly(recipe, undisturbed, tmp_path, number, victim):
    run, time_out = tmp_path / "run", 8
    job = start(recipe, run, 2, f"collective_timeout={time_out}")
    job.wait_for_step(50)  # there is a checkpoint
    job.signal(number, victim)
    start_time = time.monotonic()
    job.processes[1 - victim].join(time_out + 30)
    status, seconds = job.exit_codes()[1 - victim], time.monotonic() - start_time
    job.kill()  # the one that hangs, after SIGSTOP
    print(f"{number.name} to rank {victim}: status {status} after {seconds:.1f} s")
    said = job.says()
    assert status == 2, said
    (line,) = [line for line in said.splitlines() if "error: " in line]
    assert "another process of this run exited" in line and "resume from checkpoint-000040 with: " in line
    assert "Traceback" not in said
    assert [find_corruption(path) for path in list_checkpoints(run)] == [None]
    train_on_ranks(run, [run, "collective_timeout=600"], "multi_gpu.yaml", 2)
    assert numbers(run) == numbers(undisturbed(2))


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (torch.distributed.DistBackendError("NCCL watchdog\nmore"), True),
        (RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3"), True),
        (RuntimeError("Timed out waiting 8000ms for recv operation to complete"), True),
        (RuntimeError("CUDA out of memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
    ],
)
def test_errors_of_a_lost_process_are_recognized(monkeypatch, error, is_lost):
    assert lost_process(error, 600) is None  # with a single process
    for name, value in torchrun_variables(0, 2).items():
        monkeypatch.setenv(name, value)
    reason = lost_process(error, 600)
    assert (reason is not None) == is_lost and "\n" not in (reason or "")


# ---- ranks with different settings


@pytest.mark.slow
@pytest.mark.parametrize("option", ["learning_rate=1e-3", "seed=2"])
def test_ranks_with_different_recipes_refuse_to_start(recipe, tmp_path, option):
    run = tmp_path / "run"
    words = [recipe, f"out_dir={run}"]
    job = Ranks(run, [words, [*words, option]], "multi_gpu.yaml", 2)
    assert job.end() == [2, 2]
    lines = [line for line in job.says().splitlines() if "error: " in line]
    assert len(lines) == 2 and all(option.partition("=")[0] in line for line in lines), job.says()
    assert "Traceback" not in job.says() and not run.exists()


def test_stop_before_a_due_evaluation_leaves_it_to_the_resumed_run(tmp_path, monkeypatch):
    """The resumed run evaluates first, and then knows whether the checkpoint is the best one."""
    from nanogpt_accel.__main__ import main
    from nanogpt_accel.distributed.stop import Stopper

    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, **SETTINGS, max_iters=6, eval_interval=2)
    assert main(["train", str(recipe), "out_dir=undisturbed"]) == 0
    calls = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(Stopper, "all_ranks_agreed", lambda self: next(calls) == 4)
        assert main(["train", str(recipe), "out_dir=stopped"]) == 75
    path = checkpoint(tmp_path / "stopped", 4)
    before = (path / "state" / "trainer.json").stat().st_mtime_ns
    assert trainer(tmp_path / "stopped", 4)["evaluated"] is False and find_corruption(path) is None
    assert main(["train", "stopped"]) == 0
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "undisturbed")
    assert not path.exists() or (path / "state" / "trainer.json").stat().st_mtime_ns == before
    assert [trainer(tmp_path / run, 6)["best_step"] for run in ("stopped", "undisturbed")] == [6, 6]
    assert weights(tmp_path / "stopped", 6) == weights(tmp_path / "undisturbed", 6)


def test_on_nonfinite_skip_with_deepspeed_is_refused(tmp_path, monkeypatch, capsys):
    from nanogpt_accel.__main__ import main

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert main(["train", str(write_recipe(tmp_path)), f"out_dir={tmp_path / 'run'}", "on_nonfinite=skip"]) == 2
    assert "train.on_nonfinite=skip: not supported with DeepSpeed" in capsys.readouterr().err
