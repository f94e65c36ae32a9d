"""Any corruption of a checkpoint is found, and the latest valid one is taken instead."""

import json
import os
from pathlib import Path

import pytest
from tiny_run import FILES

from nanogpt_accel.checkpoint.layout import list_checkpoints
from nanogpt_accel.checkpoint.verify import find_corruption, latest_valid, shape_differences
from nanogpt_accel.models.find import find_model
from nanogpt_accel.models.load import read_config


def test_a_valid_checkpoint_has_no_corruption(folder):
    for path in list_checkpoints(folder):
        assert find_corruption(path) is None and find_corruption(str(path)) is None


SPOILERS = [
    (Path.unlink, "missing"),
    (lambda file: os.truncate(file, 0), "corrupted"),
    (lambda file: os.truncate(file, 1), "corrupted"),
    # half of a JSON file; all but the last byte of a safetensors file
    (
        lambda file: os.truncate(file, file.stat().st_size // 2 if file.suffix == ".json" else file.stat().st_size - 1),
        "corrupted",
    ),
    (lambda file: file.write_bytes(b"\xff" * 99), "corrupted"),
]


@pytest.mark.parametrize("name", FILES)
def test_corruption_names_the_file(folder, name):
    older, newer = list_checkpoints(folder)
    before = (newer / name).read_bytes()
    for spoil, word in SPOILERS:
        (newer / name).write_bytes(before)
        assert find_corruption(newer) is None
        spoil(newer / name)
        assert find_corruption(newer) == f"{name} is {word}"
        assert (find_corruption(newer, resumable=False) is None) == name.startswith("state/")
        lines = []
        assert latest_valid(folder, lines.append) == older
        (line,) = lines
        assert str(newer) in line and name in line and word in line


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.pop("state/optimizer.safetensors"),
        lambda facts: facts.update({"../../elsewhere": {"size": 1, "sha256": "0"}}),
        lambda facts: facts.update({"config.json": None}),
        lambda facts: facts.update({"a" * 400: {"size": 1, "sha256": "0"}}),
    ],
)
def test_an_edited_index_is_corrupted(folder, change):
    newer = list_checkpoints(folder)[-1]
    index = json.loads((newer / "state" / "index.json").read_text())
    change(index["files"])
    (newer / "state" / "index.json").write_text(json.dumps(index))
    assert find_corruption(newer) == "state/index.json is corrupted"


def test_a_deeply_nested_index_is_corrupted(folder):
    newer = list_checkpoints(folder)[-1]
    (newer / "state" / "index.json").write_text("[" * 200_000)
    assert find_corruption(newer) == "state/index.json is corrupted"


def test_a_checkpoint_renamed_to_another_step_is_skipped(folder):
    """If the run resumed from it, the checkpoints saved later would have lower numbers than this one, which would still
    count as the latest."""
    list_checkpoints(folder)[-1].rename(folder / "checkpoint-000099")
    lines = []
    assert latest_valid(folder, lines.append).name == "checkpoint-000010"
    assert "checkpoint-000099: state/trainer.json is corrupted or belongs to another step" in lines[0]


def test_without_a_valid_checkpoint_none_is_found(refused, folder):
    for path in list_checkpoints(folder):
        (path / "config.json").unlink()
    lines = []
    assert latest_valid(folder, lines.append) is None and len(lines) == 2
    with refused(ValueError, folder, "does not contain a valid checkpoint"):
        find_model(folder, warn=lambda line: None)
    assert latest_valid(folder / "nowhere", pytest.fail) is None


def test_each_difference_in_shape_is_a_problem(folder):
    path = list_checkpoints(folder)[0]
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 8, "bias": True, "activation": "gelu"}
    config = read_config(path)
    assert shape_differences(path, config, shape) == []
    problems = shape_differences(path, config, shape | {"n_layer": 2, "bias": False, "n_inner": 7})
    assert len(problems) == 2
    assert "model.n_layer=2" in problems[0] and "n_layer=1" in problems[0] and "model.bias=False" in problems[1]
    assert "model.n_inner=7" in shape_differences(path, config, shape | {"n_inner": 7})[0]
