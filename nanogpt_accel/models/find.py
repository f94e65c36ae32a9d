"""Find the folder of a model: a run, a checkpoint, another folder or a Hub id."""

import json
from pathlib import Path

from ..checkpoint.layout import CHECKPOINT_NAME, checkpoint_path, list_checkpoints, read_trainer
from ..checkpoint.verify import find_corruption, find_file_corruption, latest_valid
from ..hub.transfer import download, is_model_id
from ..utils.files import check_writable


def check_empty(folder, key):
    """Whether a model folder can be made at a place: that it can be written to, holds nothing yet, and is no part of a
    run, which prunes what it does not know. A list of problems. key: for the message."""
    folder = Path(folder)
    if folder.is_symlink() and not folder.exists():
        return [f"{key}={folder}: a link to nothing; give another folder"]
    if folder.is_dir() and any(file.name != ".tmp" for file in folder.iterdir()):  # (of an export that was killed)
        return [f"{key}={folder}: holds something already; give a folder that does not exist yet, or is empty"]
    for parent in folder.absolute().resolve().parents:
        if CHECKPOINT_NAME.match(parent.name) or (parent / "run.yaml").is_file():
            return [f"{key}={folder}: lies in the run {parent}; give a folder outside"]
    return check_writable(folder, key)


def check_model(target):
    """Whether a target names a model, as far as that is known without a look into it: a list of problems."""
    return [] if may_be_model(target) else [f"{target}: {nanogpt_hint(target) or 'no such folder'}"]


def find_model(target, warn=print, bars=True):
    """The local folder of a model: of a run folder its best checkpoint, a checkpoint folder, another model's folder,
    or what a Hub id stands for. warn: takes a line. bars: as for hub.download.

    Raises:
        ValueError, FileNotFoundError: nothing there that can be loaded; the message says what was looked for.
    """
    path = Path(target)
    for problem in check_model(target):
        raise FileNotFoundError(problem)
    if not path.is_dir():
        path = download(str(target), warn, bars)
    elif list_checkpoints(path):
        newest = latest_valid(path, warn, resumable=False)
        if newest is None:
            raise ValueError(f"{target}: no whole checkpoint in this run folder")
        best_step = read_trainer(newest)["best_step"] if find_corruption(newest) is None else None
        best = newest if best_step is None else checkpoint_path(path, best_step)
        return best if find_corruption(best, resumable=False) is None else newest
    trouble = _find_model_corruption(path)
    if trouble and (hint := nanogpt_hint(target)):
        raise ValueError(f"{target}: {hint}")
    if trouble:
        raise ValueError(
            f"{target}: {'neither a run nor' if Path(target).is_dir() else 'not'} a model folder: {trouble}"
        )
    return path


def nanogpt_hint(target):
    """What to do with a ckpt.pt of nanoGPT, or a folder that holds one; empty for anything else."""
    path = Path(target)
    file = path if path.suffix == ".pt" else path / "ckpt.pt"
    return f"nanoGPT's: nanogpt-accel import {file} --to FOLDER makes it a model" if file.is_file() else ""


def may_be_model(target):
    """True for a folder that exists and for what has the form of a Hub id."""
    return Path(target).is_dir() or (is_model_id(target) and not Path(target).exists())


def _find_model_corruption(path):
    """What is missing or broken in a model folder of any origin, as text; None where it is whole."""
    weights = sorted(path.glob("*.safetensors"))
    if not weights and list(path.glob("pytorch_model*.bin")):
        return find_file_corruption(path, "config.json")
    names = ["config.json"] + [file.name for file in weights or [path / "model.safetensors"]]
    if (path / "model.safetensors.index.json").is_file():
        names.append("model.safetensors.index.json")
        if find_file_corruption(path, names[-1]) is None:
            index = json.loads((path / names[-1]).read_text(encoding="utf-8"))
            names += sorted(set(index.get("weight_map", {}).values()) - set(names))
    return next(filter(None, (find_file_corruption(path, name) for name in names)), None)
