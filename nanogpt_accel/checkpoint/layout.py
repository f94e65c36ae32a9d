"""Names and paths of checkpoints and of their files."""

import json
import os
import re
from pathlib import Path

TRAINER = "state/trainer.json"
INDEX = "state/index.json"  # contains the size and hash of every file except README.md
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")  # required to load the model
CHECKPOINT_NAME = re.compile(r"checkpoint-([0-9]{1,12})$")
SHARD_PATH = re.compile(r"state/optimizer(-\d{5}-of-\d{5})?\.safetensors$")


def checkpoint_path(run, step):
    return Path(run) / f"checkpoint-{step:06d}"


def shard_path(index, num_shards):
    """Return the path of a shard of the optimizer state, relative to the checkpoint."""
    number = "" if num_shards == 1 else f"-{index + 1:05d}-of-{num_shards:05d}"
    return f"state/optimizer{number}.safetensors"


def list_checkpoints(run):
    """Return the checkpoint folders of a run, valid or not, oldest first.

    Raises:
        OSError: the run folder cannot be read.
    """
    try:
        with os.scandir(run) as entries:  # Path.glob would ignore a PermissionError
            folders = [Path(entry) for entry in entries if CHECKPOINT_NAME.match(entry.name) and entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(folders, key=lambda path: int(CHECKPOINT_NAME.match(path.name)[1]))


def is_checkpoint(path):
    """Return whether a folder contains checkpoint files. Users may have other folders named checkpoint-N."""
    return any((path / name).is_file() for name in (*MODEL_FILES, TRAINER))


def read_trainer(path):
    """Return the content of a checkpoint's trainer.json."""
    return json.loads((Path(path) / TRAINER).read_text(encoding="utf-8"))
