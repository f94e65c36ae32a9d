"""run.py: a run locks its folder before it decides anything, and ends cleanly whatever happens in the training loop."""

import itertools
import math
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from accelerate import Accelerator
from runs import SMALL, write_recipe
from shared import REPOSITORY

from nanogpt_accel import train as module
from nanogpt_accel.__main__ import main
from nanogpt_accel.checkpoint import save
from nanogpt_accel.checkpoint.layout import list_checkpoints
from nanogpt_accel.checkpoint.run_folder import check_lock
from nanogpt_accel.recipe import load_recipe
from nanogpt_accel.tracking.metrics_log import read_metrics
from nanogpt_accel.train import train
from nanogpt_accel.utils.cli import Stopped

SETTINGS = SMALL | {"max_iters": 8, "eval_interval": 4}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return str(write_recipe(tmp_path, **SETTINGS))


def steps_of(run):
    return [line["step"] for line in read_metrics(Path(run) / "metrics.jsonl") if "loss" in line]


# ---- the lock


def test_the_checkpoint_is_chosen_under_the_lock(recipe, monkeypatch):
    train(recipe, out_dir="run")
    real, found = module.find_checkpoint, []

    def find_checkpoint(recipe, data, console):
        found.append(subprocess.run([sys.executable, "-c", PROBE, recipe.out_dir], cwd=REPOSITORY).returncode)
        return real(recipe, data, console)

    monkeypatch.setattr(module, "find_checkpoint", find_checkpoint)
    out_dir = str(Path("run").absolute())
    train(recipe, out_dir=out_dir, init_from="resume", max_iters=10)
    assert found == [3], "another process could have taken the folder"
    assert steps_of("run") == list(range(10))


PROBE = """
import sys
from nanogpt_accel.checkpoint.run_folder import check_lock
sys.exit(3 if check_lock(sys.argv[1]) else 0)
"""


@pytest.mark.parametrize("resume", ["auto", "no"])
def test_a_run_that_another_process_wrote_meanwhile_is_kept(recipe, monkeypatch, resume):
    """Between the checks of the command line and the lock, another process trains in the same folder and ends."""
    real, calls = module.open_data, itertools.count()

    def open_data(recipe, console):
        if next(calls) == 0:
            shutil.copytree("other", "run")
        return real(recipe, console)

    train(recipe, out_dir="other")
    monkeypatch.setattr(module, "open_data", open_data)
    before = Path("other/metrics.jsonl").read_bytes()
    if resume == "no":
        with pytest.raises(ValueError, match="already contains a run"):
            train(recipe, out_dir="run")
        assert Path("run/metrics.jsonl").read_bytes() == before
    else:
        train(recipe, out_dir="run", resume="auto", max_iters=10)
        assert steps_of("run") == list(range(10))
        assert Path("run/metrics.jsonl").read_bytes().startswith(before[: before.index(b'"step": 7')])
    assert [path.name for path in list_checkpoints("run")][:2] == ["checkpoint-000004", "checkpoint-000008"]


@pytest.mark.slow
def test_of_two_resumes_at_once_one_trains(recipe, tmp_path):
    train(recipe, out_dir="run")
    command = [sys.executable, "-m", "nanogpt_accel", "train", str(tmp_path / "run"), "max_iters=600"]
    jobs = [subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [job.communicate()[1] for job in jobs]
    assert sorted(job.returncode for job in jobs) == [0, 2], errors
    assert sum("is training in this folder" in error for error in errors) == 1
    assert steps_of("run") == list(range(600))


@pytest.mark.parametrize("options", [{}, {"eval_only": True}])
def test_a_run_whose_checkpoints_are_all_corrupted_is_refused(recipe, options):
    """A changed byte does not change the size of a file, so only the comparison of hashes, after the first checks,
    finds it."""
    train(recipe, out_dir="run")
    for path in list_checkpoints("run"):
        data = bytearray((path / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (path / "model.safetensors").write_bytes(data)
    with pytest.raises(
        ValueError, match="out_dir=run: all checkpoints are corrupted; to start over, set overwrite=true"
    ):
        train(recipe, out_dir="run", init_from="resume", max_iters=10, **options)


def test_paths_that_cannot_be_a_run_folder_are_refused(recipe):
    train(recipe, out_dir="run")
    Path("run/metrics.jsonl").unlink()
    Path("run/metrics.jsonl").mkdir()
    with pytest.raises(ValueError, match="metrics.jsonl"):
        train(recipe, out_dir="run", init_from="resume", max_iters=10)
    Path("link").symlink_to("nowhere")
    with pytest.raises(ValueError, match="out_dir=link: broken link"):
        train(recipe, out_dir="link")
    with pytest.raises(ValueError, match="out_dir='a.0b' contains a null byte|null byte"):
        train(recipe, out_dir="a\0b")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_users_file_with_the_name_of_a_checkpoint_is_kept(recipe, capsys, kind):
    Path("run").mkdir()
    users = Path("run/checkpoint-000004")
    if kind == "folder":
        users.mkdir()
        users = users / "thesis.txt"
    users.write_text("mine")
    train(recipe, out_dir="run", overwrite=kind == "folder")  # without overwrite, a folder of this name is refused
    assert users.read_text() == "mine"
    assert "run/checkpoint-000004 exists and is not a checkpoint; move it" in capsys.readouterr().out
    assert Path("run/checkpoint-000008/model.safetensors").is_file()


def test_an_evaluation_is_logged_once_though_the_run_was_killed_after_it(recipe, monkeypatch):
    """The run is stopped before an evaluation, resumed, and killed between the evaluation and the next checkpoint."""
    asked = itertools.count()
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(module.Stopper, "all_ranks_agreed", lambda self: next(asked) == 4)
        train(recipe, out_dir="run")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(Accelerator, "backward", fail_at(0, RuntimeError("killed")))
        train(recipe, out_dir="run", init_from="resume")
    train(recipe, out_dir="run", init_from="resume")
    evaluated = [line["step"] for line in read_metrics(Path("run/metrics.jsonl")) if "val_loss" in line]
    assert evaluated == [0, 4, 8] and steps_of("run") == [*range(8)]


# ---- the end


def fail_at(step, error):
    """Return a replacement for Accelerator.backward that fails at a micro-step."""
    backward, calls = Accelerator.backward, itertools.count()

    def failing(self, loss, **options):
        if next(calls) == step:
            raise error
        return backward(self, loss, **options)

    return failing


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt(), FloatingPointError("nan")])
def test_an_error_in_the_loop_ends_trackers_and_releases_the_lock(recipe, monkeypatch, error):
    from accelerate.tracking import TensorBoardTracker

    finished = []
    monkeypatch.setattr(TensorBoardTracker, "finish", lambda self: finished.append(1))
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "backward", fail_at(4 * 5, error))
        with pytest.raises(type(error)) as caught:  # which keeps the frames alive, as a notebook does
            train(recipe, out_dir="run", trackers="tensorboard")
    assert finished == [1] and check_lock("run") == []
    assert [path.name for path in list_checkpoints("run")] == ["checkpoint-000004"] and steps_of("run") == [*range(5)]
    _, history = train("run/run.yaml", init_from="resume")
    assert [line["step"] for line in history if "loss" in line] == [*range(8)]
    del caught


def test_a_run_that_cannot_start_leaves_nothing(recipe, monkeypatch):
    monkeypatch.setattr(module, "set_up", lambda *args: (_ for _ in ()).throw(ValueError("no such device")))
    with pytest.raises(ValueError, match="no such device"):
        train(recipe, out_dir="runs/new")
    assert not Path("runs/new").exists()


def test_a_stop_after_a_step_that_was_not_logged_saves_no_nan(recipe, monkeypatch):
    """The step's loss is finite and its gradient is not, so the weights that would be saved are NaN."""
    calls, asked = itertools.count(), itertools.count()
    clip = Accelerator.clip_grad_norm_

    def clip_grad_norm_(self, parameters, max_norm):
        norm = clip(self, parameters, max_norm)
        return norm * math.nan if next(calls) == 2 else norm

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clip_grad_norm_)
    monkeypatch.setattr(module.Stopper, "all_ranks_agreed", lambda self: next(asked) == 3)
    with pytest.raises(FloatingPointError, match="gradient norm of step 2 is nan"):
        train(recipe, out_dir="run", log_interval=100, eval_interval=100)
    assert list_checkpoints("run") == []


def test_eval_only_of_a_resumed_run_ignores_a_stop_that_is_due(recipe, capsys):
    train(recipe, out_dir="run")
    before = sorted(path.name for path in Path("run").iterdir())
    assert main(["train", "run", "eval_only=true", "max_hours=1e-9"]) == 0
    assert "step 8: " in capsys.readouterr().out
    assert sorted(path.name for path in Path("run").iterdir()) == before


def test_a_stopped_run_whose_save_fails_names_the_error_and_the_older_checkpoint(recipe, monkeypatch):
    """The exit status is that of a stopped run, so that a scheduler requeues the job."""
    asked = itertools.count()
    monkeypatch.setattr(module.Stopper, "all_ranks_agreed", lambda self: next(asked) == 6)
    write, calls = save._write_model, itertools.count()

    def full(*args):
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        write(*args)

    monkeypatch.setattr(save, "_write_model", full)
    with pytest.raises(Stopped, match="after 6 of 8 steps, but .*No space left.*; resume from checkpoint-000004"):
        train(recipe, out_dir="run")


def test_the_error_of_a_run_without_a_checkpoint_is_not_hidden_by_its_push(recipe, monkeypatch, capsys):
    """No checkpoint could be written, so there is nothing to push either. The user must see the error of the disk."""
    pushed = []

    class Pusher:
        repo, private, branch, pushed = "me/run", False, None, None

        def __init__(self, *args):
            pass

        def push(self, path, message):
            pushed.append(path)

        def wait(self):
            pass

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nanogpt_accel.checkpoint.run.BackgroundPush", Pusher)
    monkeypatch.setattr("nanogpt_accel.train.create_repository", lambda recipe: "me/run")
    monkeypatch.setattr("nanogpt_accel.checkpoint.save._write_model", full)
    with pytest.raises(OSError, match="last checkpoint could not be written.*No space left"):
        train(load_recipe(recipe, {"out_dir": "run"}))
    assert pushed == [] and "not pushed to the Hub" in capsys.readouterr().out


def test_skipped_steps_do_not_replace_good_checkpoints(recipe):
    """With this learning rate, a step makes the weights finite but useless, and all later steps are skipped."""
    settings = {"out_dir": "run", "save_interval": 1, "keep_last": 2, "eval_interval": 1000, "eval_first": False}
    train(recipe, **settings)
    before = [path.name for path in list_checkpoints("run")]
    with pytest.raises(FloatingPointError, match="latest valid checkpoint is run/checkpoint-00000[89]"):
        train("run/run.yaml", init_from="resume", max_iters=40, learning_rate=1e38, grad_clip=0, on_nonfinite="skip")
    assert before[-1] in [path.name for path in list_checkpoints("run")]


def test_an_interrupt_while_the_thread_of_a_save_starts_is_reported_and_waited_for(recipe, monkeypatch):
    """Ctrl-C arrives inside Thread.start(). The thread runs, but join() would raise an error that it was never
    started."""
    start, calls = threading.Thread.start, itertools.count()

    def interrupted(self):
        is_save = getattr(self, "_target", None) is not None and self._target.__name__ == "_write_in_background"
        start(self)
        if is_save and next(calls) == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, out_dir="run", async_save=True)
    assert check_lock("run") == [] and not list(Path("run").glob(".checkpoint*"))
    train(recipe, out_dir="run", resume="auto", async_save=True)
    assert steps_of("run") == [*range(8)]


def test_ctrl_c_before_the_run_started_suggests_the_same_command(recipe, monkeypatch, capsys):
    monkeypatch.setattr(module, "set_up", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["train", recipe, "out_dir=runs/new"]) == 130
    assert "the run had not started yet; use the same command again" in capsys.readouterr().err
