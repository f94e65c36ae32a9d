"""Find the folder of a model that a user names: a run, a checkpoint, another model folder or a Hub id."""

import json
from pathlib import Path

from ..checkpoint.layout import checkpoint_path, list_checkpoints, read_trainer
from ..checkpoint.run_folder import is_published
from ..checkpoint.verify import find_corruption, find_file_corruption, has_matching_trainer, latest_valid
from ..hub.transfer import download, is_model_id
from ..utils.text import quoted
from .weight_files import weight_files


def may_be_model(target):
    """Return whether `target`, which a user gave as a model, is an existing folder or looks like a Hub id."""
    return Path(target).is_dir() or (is_model_id(target) and not Path(target).exists())


def check_model(target):
    """Check that `target`, which a user gave as a model, is a folder or looks like a Hub id. Return the problems."""
    return [] if may_be_model(target) else [f"{target}: {nanogpt_hint(target) or 'no such folder'}"]


def nanogpt_hint(target):
    """If `target` is a ckpt.pt of nanoGPT or a folder with a ckpt.pt, return a hint how to import it, otherwise ""."""
    path = Path(target)
    file = path if path.suffix == ".pt" else path / "ckpt.pt"
    command = f"nanogpt-accel import {quoted(file)} --to FOLDER"
    return f"convert this nanoGPT checkpoint with: {command}" if file.is_file() else ""


def find_model(target, warn=print, bars=True):
    """Return the local folder of a model: the best checkpoint of a run, a model folder, or a downloaded Hub model.

    Args:
        target: a run folder, a checkpoint, another model folder, or a Hub id.
        warn: function that prints a line. bars: whether to show progress bars for a download, in a terminal.

    Raises:
        ValueError, FileNotFoundError: the target cannot be loaded as a model; the message gives the reason.
    """
    path = Path(target)
    for problem in check_model(target):
        raise FileNotFoundError(problem)
    if not path.is_dir():
        path = download(str(target), warn, bars)
    elif list_checkpoints(path) and not _has_own_model(path):
        return _best_valid(path, target, warn)
    if (path / "adapter_config.json").is_file():
        raise ValueError(f"{target}: a PEFT adapter, not a model; save the model that merge_and_unload() returns")
    if problem := _find_model_corruption(path):
        kind = "neither a run nor a model folder" if Path(target).is_dir() else "not a model folder"
        raise ValueError(f"{target}: {nanogpt_hint(target) or f'{kind}: {problem}'}")
    return path


def _has_own_model(path):
    """Return whether a folder with checkpoints also contains a model that is not a link to a checkpoint. For example,
    transformers' Trainer saves the final or the best model in the folder of its checkpoints."""
    config = path / "config.json"
    return config.is_file() and not is_published(config) and not (path / "run.yaml").is_file()


def _best_valid(run, target, warn):
    """Return the best checkpoint of a run. If it is not valid, return the latest valid checkpoint."""
    latest = latest_valid(run, warn, resumable=False)
    if latest is None:
        raise ValueError(f"{target}: the run folder does not contain a valid checkpoint; use another model")
    best = latest
    if has_matching_trainer(latest) and (best_step := read_trainer(latest)["best_step"]) is not None:
        best = checkpoint_path(run, best_step)
    elif find_file_corruption(latest, "trainer_state.json") is None:  # written by transformers' Trainer
        state = json.loads((latest / "trainer_state.json").read_text(encoding="utf-8"))
        best = run / Path(str(state.get("best_model_checkpoint") or latest)).name
    return best if find_corruption(best, resumable=False) is None else latest


def _find_model_corruption(path):
    """Return a description of the first missing or corrupted file of a model folder, or None."""
    try:
        names = ["config.json", *weight_files(path)]
    except ValueError as error:
        return str(error)
    return next(filter(None, (find_file_corruption(path, name) for name in names)), None)
