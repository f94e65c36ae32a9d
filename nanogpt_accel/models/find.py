"""Find the folder of a model: a run, a checkpoint, another model folder or a Hub id."""

import json
from pathlib import Path

from ..checkpoint.layout import checkpoint_path, list_checkpoints, read_trainer
from ..checkpoint.verify import find_corruption, find_file_corruption, latest_valid
from ..hub.transfer import download, is_model_id


def may_be_model(target):
    """Return whether a target is an existing folder or has the form of a Hub id."""
    return Path(target).is_dir() or (is_model_id(target) and not Path(target).exists())


def check_model(target):
    """Check that a target may be a model, without reading any file of it. Return a list of problems."""
    return [] if may_be_model(target) else [f"{target}: {nanogpt_hint(target) or 'no such folder'}"]


def nanogpt_hint(target):
    """Return how to import a nanoGPT ckpt.pt, given its path or its folder; "" for any other target."""
    path = Path(target)
    file = path if path.suffix == ".pt" else path / "ckpt.pt"
    return (
        f"is a nanoGPT checkpoint. Convert it with: nanogpt-accel import {file} --to FOLDER" if file.is_file() else ""
    )


def find_model(target, warn=print, bars=True):
    """Return the local folder of a model. For a run folder, that is its best checkpoint; a Hub model is downloaded.

    Args:
        target: a run folder, a checkpoint, another model folder, or a Hub id.
        warn: called with one line per warning. bars: see `download`.

    Raises:
        ValueError, FileNotFoundError: the target is not a model that can be loaded; the message gives the reason.
    """
    path = Path(target)
    for problem in check_model(target):
        raise FileNotFoundError(problem)
    if not path.is_dir():
        path = download(str(target), warn, bars)
    elif list_checkpoints(path):
        return _best_valid(path, target, warn)
    if problem := _find_model_corruption(path):
        kind = "neither a run nor a model folder" if Path(target).is_dir() else "not a model folder"
        raise ValueError(f"{target}: {nanogpt_hint(target) or f'{kind}: {problem}'}")
    return path


def _best_valid(run, target, warn):
    """Return the best checkpoint of a run if it is valid, else the latest valid one."""
    latest = latest_valid(run, warn, resumable=False)
    if latest is None:
        raise ValueError(f"{target}: this run folder has no valid checkpoint")
    best_step = read_trainer(latest)["best_step"] if find_corruption(latest) is None else None
    best = latest if best_step is None else checkpoint_path(run, best_step)
    return best if find_corruption(best, resumable=False) is None else latest


def _find_model_corruption(path):
    """Return which file of a model folder of any origin is missing or corrupted, as text, or None."""
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
