"""A model is found by a run folder, a checkpoint, another model's folder or a Hub id."""

import os
import shutil

import pytest
from tiny_run import TinyRun

from nanogpt_accel.checkpoint.layout import list_checkpoints
from nanogpt_accel.models.find import find_model


@pytest.fixture
def run(tmp_path):
    """A run with the checkpoints 10 and 20; 10 is the best."""
    run = TinyRun(tmp_path / "run")
    run.save(10, best_step=10)
    run.save(20, best_step=10)
    return run


def test_a_run_folder_stands_for_its_best_checkpoint(run):
    ten, twenty = list_checkpoints(run.folder)
    assert find_model(run.folder) == find_model(str(run.folder)) == ten  # the best one
    assert find_model(twenty) == twenty
    run.save(30)  # the best checkpoint is unknown
    assert find_model(run.folder).name == "checkpoint-000030"


def test_the_latest_valid_checkpoint_is_taken_if_the_best_is_corrupted(run):
    ten, twenty = list_checkpoints(run.folder)
    os.truncate(ten / "model.safetensors", 10)
    assert find_model(run.folder) == twenty
    shutil.rmtree(ten)
    assert find_model(run.folder) == twenty


def test_an_exported_folder_is_found(run, tmp_path):
    shutil.copytree(run.folder / "checkpoint-000010", tmp_path / "export")
    shutil.rmtree(tmp_path / "export" / "state")
    assert find_model(tmp_path / "export") == tmp_path / "export"


@pytest.mark.parametrize(
    ("target", "kind", "words"),
    [
        ("./nowhere", FileNotFoundError, ["./nowhere", "no such folder"]),
        ("a/b/c", FileNotFoundError, ["a/b/c", "no such folder"]),
        ("/no/such/place", FileNotFoundError, ["/no/such/place", "no such folder"]),
        ("runs/no--such", ValueError, ["runs/no--such: no such folder", "not a valid name"]),
        ("runs/..", ValueError, ["runs/..: no such folder"]),
        ("empty", ValueError, ["empty", "neither a run nor a model folder", "config.json is missing"]),
        (
            "nobody/no-such-model",
            ValueError,
            ["nobody/no-such-model: no such folder", "the Hub cannot be reached"],
        ),
        ("no-such-model", ValueError, ["no-such-model: no such folder", "the Hub cannot be reached"]),
    ],
)
def test_a_target_without_a_model_says_what_was_looked_for(refused, tmp_path, monkeypatch, target, kind, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with refused(kind, *words):
        find_model(target)
