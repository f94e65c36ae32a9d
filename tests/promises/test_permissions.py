"""Colleagues can read what a command writes if the umask lets them. An unreadable file is not a corrupted file."""

import os
import shutil

import numpy as np
import pytest
from permissions import modes_apply
from runs import checkpoint, write_recipe

from nanogpt_accel.__main__ import main
from nanogpt_accel.checkpoint.layout import list_checkpoints
from nanogpt_accel.checkpoint.run_folder import prune
from nanogpt_accel.checkpoint.verify import find_corruption, is_corrupted, latest_valid
from nanogpt_accel.data.token_files import Writer

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes")


# ---- modes of written files


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_all_written_files_have_the_mode_that_the_umask_gives(tmp_path, umask, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = os.umask(umask)
    try:
        recipe = write_recipe(tmp_path, out_dir="run", sample_interval=4, sample_tokens=4, trackers=["tensorboard"])
        for command in (
            ["prepare", "tiny.yaml"],
            ["prepare", "tiny.yaml", "tokenizer=bpe", "vocab_size=300", "data_dir=bpe"],
            ["train", "tiny.yaml"],
            ["train", "run", "max_iters=9", "async_save=true"],
            ["export", "run", "to=stock"],
            ["export", "run", "to=custom", "form=custom", "dtype=bfloat16"],
            ["report", "run"],
        ):
            assert main(command) == 0, command
        (tmp_path / "plain folder").mkdir()
    finally:
        os.umask(before)
    assert recipe.stat().st_mode & 0o777 == 0o666 & ~umask
    written = [path for path in tmp_path.rglob("*") if not path.is_symlink()]
    assert len([path for path in written if path.suffix == ".safetensors"]) == 2 * 3 + 2
    plain_file, plain_folder = (tmp_path / name for name in ("text.txt", "plain folder"))
    wrong = {
        str(path.relative_to(tmp_path)): oct(path.stat().st_mode)
        for path in written
        if path.stat().st_mode != (plain_folder if path.is_dir() else plain_file).stat().st_mode
    }
    assert wrong == {}


# ---- files that cannot be read


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The recipe of a run with checkpoints at steps 4 and 8."""
    recipe = write_recipe(tmp_path_factory.mktemp("trained"))
    assert main(["train", str(recipe), f"out_dir={recipe.parent / 'run'}"]) == 0
    return recipe


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained.parent / "run", tmp_path / "run", symlinks=True)


@pytest.fixture
def closed():
    """Return a function closed(path) that makes a file or folder unreadable for everybody until the end of the test."""
    modes = {}

    def close(path):
        modes[path] = path.stat().st_mode
        path.chmod(0)

    yield close
    for path, mode in modes.items():
        path.chmod(mode)


FILES = ["config.json", "model.safetensors", "tokenizer.json", "state/index.json", "state/trainer.json"]


@pytest.mark.parametrize("name", [*FILES, "state/optimizer.safetensors", "state", "."])
def test_checkpoint_that_cannot_be_read_is_neither_skipped_nor_pruned(trained, run, closed, capsys, name):
    latest = checkpoint(run, 8)
    closed(latest / name)
    capsys.readouterr()
    with modes_apply():
        with pytest.raises(PermissionError):
            find_corruption(latest)
        with pytest.raises(PermissionError):
            latest_valid(run, pytest.fail)
        assert not is_corrupted(latest)
        for words in ([str(run), "max_iters=9"], [str(trained), f"out_dir={run}", "resume=auto", "max_iters=9"]):
            assert main(["train", *words]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"error: {latest}") and "permission denied; to " in line
            assert line.endswith(
                f"can run chmod {'a+r' if (run / latest / name).is_file() else 'a+rx'} {latest / name}"
            )
        prune(run, 4, checkpoint(run, 4), keep_last=1)  # a run that resumed from step 4
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-000004", "checkpoint-000008"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "state/trainer.json"])
def test_sampling_from_a_model_that_cannot_be_read_says_so(run, closed, capsys, name):
    closed(checkpoint(run, 8) / name)
    with modes_apply():
        for target in (run, checkpoint(run, 8)) if "state" not in name else (run,):
            assert main(["sample", str(target), "max_new_tokens=1", "device=cpu"]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert f"{name}: permission denied; to make it readable, its owner can run chmod a+r" in line


def test_sampling_needs_no_optimizer_state(run, closed, capsys):
    closed(checkpoint(run, 8) / "state" / "optimizer.safetensors")
    with modes_apply():
        assert main(["sample", str(run), "max_new_tokens=1", "device=cpu"]) == 0
    assert capsys.readouterr().err == ""


def test_interrupted_preparation_that_cannot_be_read_is_not_deleted(tmp_path, closed):
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path, np.uint16) as writer:
        writer.write("train", [1, 2], 2)
        writer.commit(1)
        raise KeyboardInterrupt
    closed(tmp_path / ".partial" / "progress.json")
    with modes_apply(), pytest.raises(OSError, match="Permission denied"):
        Writer(tmp_path, np.uint16)
    assert (tmp_path / ".partial" / "train-00000.bin").stat().st_size == 4


def test_corpus_that_cannot_be_read_is_named(tmp_path, closed, capsys):
    recipe = write_recipe(tmp_path)
    closed(tmp_path / "text.txt")
    with modes_apply():
        assert main(["prepare", str(recipe)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "text.txt") in line and "ermission denied" in line
