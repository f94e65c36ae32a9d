"""Names and places of the files of a checkpoint."""

import json
import re
from pathlib import Path

TRAINER = "state/trainer.json"
INDEX = "state/index.json"  # size and hash of each file of a checkpoint
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")  # without these there is no model
CHECKPOINT_NAME = re.compile(r"checkpoint-([0-9]{1,12})$")


def checkpoint_path(run, step):
    return Path(run) / checkpoint_name(step)


def list_checkpoints(run):
    """The checkpoint folders of a run, oldest first; whole or not."""
    found = [path for path in Path(run).glob("checkpoint-*") if CHECKPOINT_NAME.match(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(CHECKPOINT_NAME.match(path.name)[1]))


def checkpoint_name(step):
    return f"checkpoint-{step:06d}"


def is_checkpoint(path):
    """Whether a folder holds anything of a checkpoint, and not only has its name."""
    return any((path / name).is_file() for name in (*MODEL_FILES, TRAINER))


def read_trainer(path):
    """The trainer.json of a checkpoint."""
    return json.loads((Path(path) / "state" / "trainer.json").read_text(encoding="utf-8"))
