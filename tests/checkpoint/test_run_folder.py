"""The run folder loads as its best checkpoint, keeps the best and the last ones, and keeps the files of the user."""

import os
import shutil
from pathlib import Path

import pytest
from tiny_run import TEXT, disk_is_full, is_equal, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanogpt_accel.checkpoint.layout import checkpoint_path, list_checkpoints
from nanogpt_accel.checkpoint.run_folder import (
    best_checkpoint,
    check_run_folder,
    check_writable,
    prepare_run_folder,
)
from nanogpt_accel.checkpoint.verify import find_corruption, latest_valid

# ---- publish


def test_the_run_folder_loads_as_the_best_checkpoint(run):
    run.save(10, best_step=10)
    best = weights(run.model)
    run.save(20, best_step=10)
    last = weights(run.model)
    assert not is_equal(best, last)
    assert is_equal(weights(AutoModelForCausalLM.from_pretrained(run.folder)), best)
    run.save(30, best_step=30)
    newer = weights(run.model)
    assert is_equal(weights(AutoModelForCausalLM.from_pretrained(run.folder)), newer)
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT and tokenizer.model_max_length == 8
    assert tokenizer(TEXT).input_ids == [sorted(set(TEXT)).index(c) for c in TEXT]
    # the run folder has links to the files of the model, but not to the files that only resuming needs
    assert not (run.folder / "state").exists() and (run.folder / "model.safetensors").is_symlink()
    assert run.leftovers() == []


def test_without_evaluations_the_run_folder_loads_as_the_last_checkpoint(run):
    run.save(10)
    run.save(20)
    assert is_equal(weights(AutoModelForCausalLM.from_pretrained(run.folder)), weights(run.model))


def test_a_moved_run_folder_still_loads(run, tmp_path):
    run.save(10)
    moved = run.folder.rename(tmp_path / "moved")
    assert find_corruption(moved, resumable=False) is None
    AutoModelForCausalLM.from_pretrained(moved)


def test_where_links_are_not_allowed_files_are_copied(run, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("a privilege is not held")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    run.save(10, best_step=10)
    run.save(20, best_step=20)
    assert not any(path.is_symlink() for path in run.folder.iterdir())
    assert is_equal(weights(AutoModelForCausalLM.from_pretrained(run.folder)), weights(run.model))


def test_the_best_checkpoint_is_the_best_that_exists_else_the_latest(saved, tmp_path):
    run, ten, twenty = saved.folder, *list_checkpoints(saved.folder)
    assert best_checkpoint(run, 10) == ten and best_checkpoint(run, 20) == twenty
    assert best_checkpoint(run, None) == twenty
    assert best_checkpoint(run, 15) == ten  # 15 could not be saved, so return the published checkpoint
    shutil.rmtree(ten)
    assert best_checkpoint(run, 10) == twenty
    checkpoint_path(run, 30).mkdir()  # a folder of the user
    assert best_checkpoint(run, None) == twenty
    shutil.rmtree(twenty)
    for step in (None, 10):
        assert best_checkpoint(run, step) is None and best_checkpoint(tmp_path / "no such run", step) is None


# ---- prune


@pytest.mark.parametrize(
    ("keep_last", "best", "expected"),
    [
        (1, [1, 1, 1, 1, 1], [1, 5]),  # the first one stays the best
        (1, [1, 2, 3, 4, 5], [5]),
        (2, [1, 2, 2, 2, 2], [2, 4, 5]),
        (3, [1, 1, 1, 4, 4], [3, 4, 5]),
        (2, [None] * 5, [4, 5]),
        (9, [1, 1, 1, 1, 1], [1, 2, 3, 4, 5]),
    ],
)
def test_pruning_keeps_the_last_checkpoints_and_the_best(run, keep_last, best, expected):
    for step, best_step in enumerate(best, 1):
        run.save(step, best_step, keep_last)
    assert run.steps() == expected and run.leftovers() == []


def test_pruning_compares_steps_as_numbers(run):
    """As text, checkpoint-1000000 comes before checkpoint-999999."""
    for step in (999_998, 999_999, 1_000_000):
        run.save(step, keep_last=1)
    assert run.steps() == [1_000_000]


def test_the_previous_best_checkpoint_stays_if_the_best_could_not_be_saved(saved, monkeypatch):
    best = weights(AutoModelForCausalLM.from_pretrained(saved.folder))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_is_full)
        with pytest.raises(OSError, match="No space left"):
            saved.save(30, best_step=30)
    saved.save(40, best_step=30)
    saved.save(50, best_step=30)
    assert saved.steps() == [10, 40, 50]
    assert is_equal(weights(AutoModelForCausalLM.from_pretrained(saved.folder)), best)
    saved.save(60, best_step=60)
    assert saved.steps() == [50, 60]


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_run_that_resumed_before_a_corrupted_checkpoint_keeps_what_it_saves(run, keep_last):
    """10 is valid and 20 is corrupted: the run resumes from 10 and keeps the checkpoint 15."""
    run.save(10, 10, keep_last)
    shutil.rmtree(run.save(20, 10, keep_last) / "state")
    assert latest_valid(run.folder, warn=lambda line: None).name == "checkpoint-000010"
    path = run.save(15, 10, keep_last)
    assert find_corruption(path) is None and latest_valid(run.folder, warn=pytest.fail) == path
    run.save(20, 10, keep_last)
    assert run.steps()[-1] == 20


def test_saving_keeps_files_of_the_user_that_have_a_name_of_ours(saved):
    """Such files also do not prevent a save or a resume."""
    for name in ("checkpoint-000003", "checkpoint-000090", ".checkpoint-notes"):
        (saved.folder / name).mkdir()
        (saved.folder / name / "notes.txt").write_text("mine")
    (saved.folder / ".checkpoint-000005.old").write_text("a file in the way")
    saved.save(30, best_step=10)
    saved.save(40, best_step=10)
    assert [
        (saved.folder / name / "notes.txt").read_text()
        for name in ("checkpoint-000003", "checkpoint-000090", ".checkpoint-notes")
    ] == ["mine"] * 3
    assert latest_valid(saved.folder, lambda line: None).name == "checkpoint-000040"
    assert not (saved.folder / ".checkpoint-000005.old").exists()


# ---- a new run in an old folder


def test_a_new_run_deletes_the_previous_run_but_no_files_of_the_user(saved):
    own = ["notes.txt", "report-mine.png", "nonfinite-notes.json"]
    for name in ("metrics.jsonl", "report.html", "report-loss.png", "nonfinite-12.json", *own):
        (saved.folder / name).write_text("{}\n")
    prepare_run_folder(saved.folder, "seed: 1\n", is_resumed=True)
    assert saved.steps() == [10, 20] and (saved.folder / "metrics.jsonl").exists()
    (saved.folder / "checkpoint-7").mkdir()
    (saved.folder / "checkpoint-7" / "thesis.txt").write_text("mine")
    prepare_run_folder(saved.folder, "seed: 2\n", is_resumed=False)
    assert sorted(path.name for path in saved.folder.iterdir()) == sorted([*own, "checkpoint-7", "run.yaml"])
    assert (saved.folder / "checkpoint-7" / "thesis.txt").read_text() == "mine"
    assert (saved.folder / "run.yaml").read_text() == "seed: 2\n"


@pytest.mark.parametrize("name", ["metrics.jsonl", "report.html", "report-loss.png", "nonfinite-3.json", "config.json"])
def test_a_new_run_does_not_overwrite_files_of_the_user(tmp_path, name):
    (tmp_path / name).write_text("mine")
    (problem,) = check_run_folder(tmp_path)
    assert f"out_dir={tmp_path}" in problem and name in problem


def test_a_file_in_the_path_of_out_dir_is_a_problem(tmp_path):
    (tmp_path / "file").touch()
    assert check_writable(tmp_path / "a" / "b" / "c") == []
    (problem,) = check_writable(tmp_path / "file" / "run")
    assert f"out_dir={tmp_path / 'file' / 'run'}" in problem and f"{tmp_path / 'file'} is a file" in problem
