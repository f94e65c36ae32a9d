"""A save that fails at any of its file operations loses nothing: the run continues, and the next save succeeds."""

import builtins
import errno
import gc
import io
import json
import os
import random
import resource
import shutil
import subprocess

import pytest
import safetensors.torch
import torch
import transformers.modeling_utils
from tiny_run import ACCELERATOR, TinyRun, make_adamw

from nanogpt_accel.__main__ import main
from nanogpt_accel.checkpoint.layout import checkpoint_path, list_checkpoints
from nanogpt_accel.checkpoint.resume import load_optimizer
from nanogpt_accel.checkpoint.save import _write_model
from nanogpt_accel.checkpoint.verify import find_corruption, latest_valid
from nanogpt_accel.model import GPT
from nanogpt_accel.tracking.metrics_log import MetricsLog, read_metrics

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)


class Faults:
    """Counts all operations that change files. `lasting` operations fail, starting with the operation number `at`."""

    def __init__(self, patch, folder):
        self.folder, self.seen, self.at, self.kind, self.lasting = str(folder), [], None, errno.ENOSPC, 1
        for module in (builtins, io):
            patch.setattr(module, "open", self._opening(module.open))
        for name in ("mkdir", "rename", "replace", "symlink", "unlink", "rmdir", "fsync", "statvfs"):
            patch.setattr(os, name, self._failing(name, getattr(os, name)))
        save_file = self._failing("save_file", safetensors.torch.save_file)
        patch.setattr(safetensors.torch, "save_file", save_file)
        patch.setattr(transformers.modeling_utils, "safe_save_file", save_file)

    def arm(self, at, kind=errno.ENOSPC, lasting=1):
        self.seen, self.at, self.kind, self.lasting = [], at, kind, lasting

    def step(self, name):
        self.seen.append(name)
        if self.at is not None and self.at <= len(self.seen) < self.at + self.lasting:
            raise OSError(self.kind, os.strerror(self.kind))

    def _failing(self, name, function):
        def call(*args, **kwargs):
            self.step(name)
            return function(*args, **kwargs)

        return call

    def _opening(self, function):
        def call(file, mode="r", *args, **kwargs):
            if not set(mode) & set("wax+") or not str(file).startswith(self.folder):
                return function(file, mode, *args, **kwargs)
            self.step("open")
            return Written(function(file, mode, *args, **kwargs), self)

        return call


class Written:
    """A file whose writes are counted as operations."""

    def __init__(self, file, faults):
        self._file, self._faults = file, faults

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def write(self, content):
        self._faults.step("write")
        return self._file.write(content)


class Run(TinyRun):
    """A run that records its saves; a save may fail."""

    def __init__(self, folder, in_background):
        super().__init__(folder, in_background=in_background)
        self.saved = {}  # step -> weights

    def save(self, step):
        self.start_save(step)
        self.saved[step] = self.model.transformer.wte.weight.detach().clone()
        self.saver.wait()

    def latest(self):
        """The step of the latest checkpoint, which loads as it was saved. All others are valid, too."""
        steps, path = self.steps(), latest_valid(self.folder, warn=pytest.fail)
        model = GPT.from_pretrained(path)
        assert torch.equal(model.transformer.wte.weight, self.saved[steps[-1]])
        load_optimizer(path, ACCELERATOR, model, make_adamw(model))
        return steps[-1]


@pytest.fixture
def faults(monkeypatch, tmp_path):
    return Faults(monkeypatch, tmp_path)


def sweep(run, faults, numbers=slice(None), kinds=ERRORS, lasting=1):
    """Let operations of a save fail: one save per operation and kind of error.

    numbers: which of the operations, in their order. lasting: number of operations that fail in a row.
    """
    for step in (1, 2, 3):  # so that there is something to prune
        faults.arm(None)
        run.save(step)
    operations = list(faults.seen)
    assert set(operations) == {
        "mkdir",
        "statvfs",
        "open",
        "write",
        "save_file",
        "fsync",
        "rename",
        "replace",
        "symlink",
        "unlink",
        "rmdir",
    }
    for number in range(1, len(operations) + 1)[numbers]:
        for kind in kinds:
            before, step = step, step + 1
            run.said.clear()
            faults.arm(number, kind, lasting)
            run.save(step)
            assert len(faults.seen) >= number
            faults.arm(None)
            error, latest = run.saver.error, run.latest()
            if error is not None:
                assert os.strerror(kind) in error and "NOT SAVED" in run.said[-1] and latest in (before, step)
            else:
                assert latest == step and "NOT SAVED" not in "".join(run.said)
            step += 1
            run.save(step)
            assert run.said[-1] == f"saved {checkpoint_path(run.folder, step)}"
            assert [find_corruption(path) for path in list_checkpoints(run.folder)] == [None, None]
            assert not list(run.folder.glob(".checkpoint-*"))
    assert run.latest() == step


@pytest.mark.parametrize("in_background", [False, True])
def test_a_save_with_a_failing_operation_loses_nothing(tmp_path, faults, in_background):
    sweep(
        Run(tmp_path / "run", in_background), faults, slice(int(in_background), None, 8), kinds=[ERRORS[in_background]]
    )


@pytest.mark.slow
@pytest.mark.parametrize("lasting", [1, 3, 1000])
@pytest.mark.parametrize("in_background", [False, True])
def test_a_save_with_any_failing_operation_and_any_error_loses_nothing(tmp_path, faults, in_background, lasting):
    sweep(Run(tmp_path / "run", in_background), faults, lasting=lasting)


@pytest.mark.parametrize("in_background", [False, True])
def test_files_that_are_written_only_in_part_lose_nothing(tmp_path, in_background):
    """A limit on the size of files is a real error below all libraries, including those in Rust."""
    run = Run(tmp_path / "run", in_background)
    run.save(1)
    sizes = sorted({file.stat().st_size for file in list_checkpoints(run.folder)[0].rglob("*") if file.is_file()})
    assert len(sizes) > 7
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step, size in enumerate(sizes):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))
            run.save(2 * step + 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "too large" in run.saver.error and "NOT SAVED" in run.said[-1]
        assert run.latest() == 2 * step + 1
        run.save(2 * step + 3)
        assert run.latest() == 2 * step + 3 and not list(run.folder.glob(".checkpoint-*"))


def test_a_bug_in_the_background_thread_is_raised_in_the_main_thread(tmp_path, monkeypatch):
    run = Run(tmp_path / "run", in_background=True)
    monkeypatch.setattr("nanogpt_accel.checkpoint.save._write_model", lambda *args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run.save(1)
    with pytest.raises(ZeroDivisionError):
        run.saver.wait()


# ---- a complete training run


STEPS, SAVE = 12, 3
RECIPE = """
data: {{corpus: {folder}/text.txt, tokenizer: char, val_fraction: 0.1, data_dir: {folder}/tokens}}
model: {{n_layer: 1, n_embd: 16, n_head: 2, block_size: 16, dropout: 0.2}}
optimizer: {{learning_rate: 1e-2, warmup_iters: 0}}
train: {{batch_size: 2, gradient_accumulation_steps: 1, max_iters: {steps}, eval_interval: {save}, eval_iters: 2,
         device: cpu}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    draw = random.Random(3)
    (folder / "text.txt").write_text("".join(draw.choice("etaoin \n") for _ in range(5000)))
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, steps=STEPS, save=SAVE))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def calm(recipe):
    """The run in which nothing fails."""
    folder = recipe.parent / "calm"
    assert main(["train", str(recipe), f"out_dir={folder}"]) == 0
    return folder


def numbers(run):
    return [
        {key: line[key] for key in ("step", "loss", "val_loss", "grad_norm") if key in line}
        for line in read_metrics(run / "metrics.jsonl")
    ]


def weights(run):
    return (run / f"checkpoint-{STEPS:06d}" / "model.safetensors").read_bytes()


def full_at(patch, steps):
    """The disk is full when the checkpoints of these steps are written."""
    write = _write_model

    def fail(temporary, *args):
        if json.loads(temporary.name.removeprefix(".checkpoint-").removesuffix(".tmp").lstrip("0")) in steps:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(temporary, *args)

    patch.setattr("nanogpt_accel.checkpoint.save._write_model", fail)


@pytest.mark.parametrize("in_background", [False, True])
def test_a_run_continues_after_a_save_that_fails(recipe, calm, tmp_path, monkeypatch, capsys, in_background):
    run = tmp_path / "run"
    full_at(monkeypatch, {6, 9})
    assert main(["train", str(recipe), f"out_dir={run}", f"async_save={in_background}"]) == 0
    said = capsys.readouterr().out
    assert [f"checkpoint-{step:06d} is NOT SAVED" in said for step in (3, 6, 9, 12)] == [False, True, True, False]
    assert weights(run) == weights(calm) and numbers(run) == numbers(calm)
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-000003", "checkpoint-000012"]


@pytest.mark.parametrize("in_background", [False, True])
def test_a_run_whose_last_save_fails_can_be_resumed(recipe, calm, tmp_path, monkeypatch, capsys, in_background):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        full_at(patch, {12})
        assert main(["train", str(recipe), f"out_dir={run}", f"async_save={in_background}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "No space left" in line
    assert f"resume from checkpoint-000009 with: nanogpt-accel train {run}" in line
    assert main(["train", str(run)]) == 0  # the disk has space again
    assert weights(run) == weights(calm) and numbers(run) == numbers(calm)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 600 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], stderr=subprocess.DEVNULL
        ).returncode
    ):
        pytest.skip("no right to mount a file system")
    yield folder
    gc.collect()  # a resumed model is mapped from its file, and part of a reference cycle
    subprocess.run(["umount", folder], check=True)


def test_a_run_on_a_full_disk_can_be_resumed(recipe, calm, small_disk, capsys):
    """This disk is really full: the first checkpoint fits, then another program takes all remaining space."""
    run, ballast = small_disk / "run", small_disk / "ballast"
    assert main(["train", str(recipe), f"out_dir={run}", "max_iters=3", "lr_decay_iters=12"]) == 0
    (run / "loss.png").unlink()
    room = shutil.disk_usage(small_disk).free
    ballast.write_bytes(bytes(room - 4096 * 3))  # room for the lock and run.yaml alone
    capsys.readouterr()
    assert main(["train", str(run), f"max_iters={STEPS}"]) == 2
    said, errors = capsys.readouterr()
    (line,) = errors.splitlines()
    assert said.count("is NOT SAVED") == 3 and "loss.png cannot be written" in said
    assert line.startswith("error: ") and "resume from checkpoint-000003" in line
    ballast.unlink()
    assert main(["train", str(run)]) == 0
    assert weights(run) == weights(calm) and numbers(run) == numbers(calm)


def test_lines_that_a_full_disk_refused_are_written_later(tmp_path):
    """As soon as the disk has space again, these lines are written, in order and without an incomplete line."""
    said = []
    log = MetricsLog(tmp_path / "metrics.jsonl", warn=said.append)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in range(60):
        try:
            if 10 <= step < 20 or step >= 50:  # there is room for a part of a line
                resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 7, limits[1]))
            log.write(step=step, loss=1 / 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        text = (tmp_path / "metrics.jsonl").read_text()
        assert not text or text.endswith("}\n")
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(60))
    assert len(said) == 2 and all("cannot be written" in line for line in said)
