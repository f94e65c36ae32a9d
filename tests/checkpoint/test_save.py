"""A checkpoint is saved completely or not at all, and a save that fails leaves the older ones untouched."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from tiny_run import CARD, FILES, TOKENIZER, TinyRun, disk_is_full, is_equal, weights
from transformers import AutoModelForCausalLM, GenerationConfig

import nanogpt_accel
from nanogpt_accel.checkpoint import save
from nanogpt_accel.checkpoint.layout import checkpoint_path, list_checkpoints, read_trainer
from nanogpt_accel.checkpoint.verify import latest_valid
from nanogpt_accel.model import GPT
from nanogpt_accel.models.find import find_model
from nanogpt_accel.utils.files import flush_tree


def test_a_checkpoint_is_a_hub_repository(run):
    path = run.save(500, best_step=500)
    assert path == run.folder / "checkpoint-000500"
    found = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert found == {*FILES, "generation_config.json", "tokenizer_config.json", "README.md", "model.py"}
    source = Path(nanogpt_accel.__file__).with_name("model.py")
    assert (path / "model.py").read_bytes() == source.read_bytes()
    assert (path / "README.md").read_text() == CARD
    assert json.loads((path / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"] == "model.GPT"
    # floats are stored exactly
    assert read_trainer(path) == {"step": 500, "best_step": 500, "val_loss": 1 / 3, "best_val_loss": 0.1 + 0.2}


def test_a_large_save_that_the_run_waits_for_is_announced(run, monkeypatch):
    small = run.save(10)
    monkeypatch.setattr(
        "nanogpt_accel.checkpoint.save.LARGE", sum(p.nbytes for p in run.model.parameters())
    )  # with AdamW's two moments, a checkpoint is larger
    large = run.save(20)
    assert run.said == [f"saved {small}", f"saving {large}, 0 MB", f"saved {large}"]


def test_saving_the_same_step_replaces_a_corrupted_checkpoint(saved):
    os.truncate(saved.folder / "checkpoint-000020" / "model.safetensors", 5)
    saved.save(20, best_step=10)
    assert saved.steps() == [10, 20] and saved.leftovers() == []


def test_every_file_is_flushed_before_the_rename(run, monkeypatch):
    order, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (order.append("rename"), rename(a, b)))
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc to name the flushed files by")
    path = run.save(10)
    before = {Path(name).name for name in order[: order.index("rename")]}
    assert before >= {file.name for file in path.rglob("*")}
    assert order[order.index("rename") + 1] == str(run.folder)  # the folder is flushed after the rename


# ---- in the background


def test_a_background_save_writes_the_configs_of_the_moment_of_the_save(tmp_path, monkeypatch):
    """A sample replaces model.generation_config while the checkpoint is still being written."""
    run, may_write, write = TinyRun(tmp_path / "run", in_background=True), threading.Event(), save._write_model
    run.model.generation_config.eos_token_id = run.model.config.eos_token_id = 3

    def write_later(*args):
        assert may_write.wait(60)
        write(*args)

    monkeypatch.setattr(save, "_write_model", write_later)
    run.start_save(10)
    run.model.generation_config = GenerationConfig()
    run.model.config.eos_token_id = None
    may_write.set()
    run.saver.wait()
    for name in ("config.json", "generation_config.json"):
        assert json.loads((checkpoint_path(run.folder, 10) / name).read_text())["eos_token_id"] == 3, name


# ---- a save that fails


@pytest.mark.parametrize("where", ["model", "tokenizer", "optimizer", "trainer", "fsync", "flush", "rename"])
def test_a_failed_save_leaves_older_checkpoints_untouched(saved, monkeypatch, where):
    best = weights(AutoModelForCausalLM.from_pretrained(saved.folder))
    with monkeypatch.context() as patch:
        if where == "model":
            # half of the weights reach the disk, and then it is full
            def half(model, folder, **kwargs):
                (folder / "model.safetensors").write_bytes(b"\0" * 100)
                disk_is_full()

            patch.setattr(GPT, "save_pretrained", half)
        elif where == "tokenizer":
            patch.setattr(TOKENIZER, "save", disk_is_full)
        elif where == "optimizer":
            patch.setattr("safetensors.torch.save_file", disk_is_full)
        elif where == "trainer":
            patch.setattr("nanogpt_accel.checkpoint.save.json.dumps", disk_is_full)
        elif where == "fsync":
            patch.setattr(os, "fsync", disk_is_full)
        elif where == "flush":
            patch.setattr(save, "flush_tree", disk_is_full)
        else:
            patch.setattr(os, "rename", disk_is_full)
        with pytest.raises(OSError, match="No space left"):
            saved.save(30, best_step=30)
    assert "checkpoint-000030 is NOT SAVED: " in saved.said[-1] and "No space left" in saved.said[-1]
    assert saved.steps() == [10, 20]
    assert is_equal(weights(AutoModelForCausalLM.from_pretrained(saved.folder)), best)
    assert latest_valid(saved.folder, pytest.fail).name == "checkpoint-000020"
    saved.save(30, best_step=30)  # the disk has space again
    assert saved.steps() == [20, 30] and saved.leftovers() == []


def test_an_error_after_the_rename_loses_nothing(saved, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("nanogpt_accel.checkpoint.save.publish", disk_is_full)  # the links of the run folder
        saved.save(30, best_step=30)
    assert "checkpoint-000030 is saved, but updating links" in saved.said[-1] and "No space left" in saved.said[-1]
    assert saved.steps() == [10, 20, 30]
    saved.save(40, best_step=30)
    assert saved.steps() == [30, 40] and saved.leftovers() == []
    assert read_trainer(find_model(saved.folder))["step"] == 30


def test_an_interrupted_pruning_leaves_no_half_checkpoint(saved, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", disk_is_full)
        saved.save(30, best_step=30)
    assert saved.steps() == [20, 30] and saved.leftovers() == [".checkpoint-000010.old"]
    saved.save(40, best_step=30)
    assert saved.steps() == [30, 40] and saved.leftovers() == []


def test_a_checkpoint_that_did_not_reach_the_disk_is_not_trusted(saved, monkeypatch):
    flush = flush_tree

    def lose(folder):
        flush(folder)
        os.truncate(folder / "model.safetensors", 1000)

    monkeypatch.setattr("nanogpt_accel.checkpoint.save.flush_tree", lose)
    with pytest.raises(OSError, match=r"model\.safetensors is corrupted"):
        saved.save(30, best_step=30)
    assert [path.name for path in list_checkpoints(saved.folder)][:2] == ["checkpoint-000010", "checkpoint-000020"]
    assert latest_valid(saved.folder, warn=lambda line: None).name == "checkpoint-000020"
    AutoModelForCausalLM.from_pretrained(saved.folder)  # still the best of the older ones


def test_a_shard_that_never_comes_is_not_waited_for_longer_than_collective_timeout(run):
    """A process that cannot see the disk never writes its shard."""
    run.save(10)
    run.saver.timeout = 0.5
    snapshot = run.saver._take_snapshot({"step": 20, "best_step": None}, run.model, run.optimizer, CARD)
    save._prepare_temp_dir(snapshot.temporary, 0)
    snapshot.num_shards = 2
    run.saver._write(snapshot)
    late = "was not written in time: the limit is 80% of collective_timeout"
    assert f"state/optimizer-00002-of-00002.safetensors {late}" in run.saver.error
    assert run.steps() == [10] and run.leftovers() == []
