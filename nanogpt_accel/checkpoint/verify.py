"""Verify checkpoints, and find the latest valid one.

A checkpoint is corrupted if a file is missing or has the wrong content. If a file cannot be read, for example because
of its permissions, the checkpoint may still be valid. In this case, the functions raise OSError, so that a run neither
resumes from an older checkpoint nor deletes this one.
"""

import json
import os
import re
import stat
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from ..utils.files import sha256
from .layout import CHECKPOINT_NAME, INDEX, MODEL_FILES, SHARD_PATH, TRAINER, list_checkpoints, read_trainer

_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


def latest_valid(run, warn=print, resumable=True, thorough=True):
    """Return the latest valid checkpoint of a run, or None.

    Args:
        warn: called with a one-line message for each corrupted checkpoint that is skipped.
        resumable, thorough: see find_corruption.

    Raises:
        OSError: a file of a checkpoint cannot be read, so it is unknown whether the checkpoint is valid.
    """
    for path in reversed(list_checkpoints(run)):
        problem = find_corruption(path, resumable, thorough)
        if problem is None:
            return path
        warn(f"warning: {path}: {problem}; skipping this checkpoint")
    return None


def find_corruption(path, resumable=True, thorough=True):
    """Return a message about the first missing or corrupted file of a checkpoint, or None if the checkpoint is valid.

    Sizes and hashes of the files are compared with state/index.json. If a copy of a checkpoint has no state/, its JSON
    files are parsed instead, and the size of its safetensors file is compared with the header of the file.

    Args:
        resumable: whether the checkpoint must contain a valid state/, which is needed to resume a run.
        thorough: whether to compare the hashes too. If False, only the sizes are compared, which is fast.

    Raises:
        OSError: a file cannot be read.
    """
    path = Path(path)
    index = read_index(path)
    if index is None and resumable:
        return f"{INDEX} is {'corrupted' if (path / INDEX).exists() else 'missing'}"
    if index is None:
        return next(filter(None, (find_file_corruption(path, name) for name in MODEL_FILES)), None)
    index = {name: entry for name, entry in index.items() if resumable or not name.startswith("state/")}
    for name, entry in index.items():  # sizes first, because hashing takes seconds
        size = _size_of(path / name)
        if size is None:
            return f"{name} is missing"
        if size != entry["size"]:
            return f"{name} is corrupted"
    if resumable and not has_matching_trainer(path):
        return f"{TRAINER} is corrupted or belongs to another step"
    if not thorough:
        return None
    with ThreadPoolExecutor() as pool:
        hashes = dict(zip(index, pool.map(_hash_of, [path / name for name in index]), strict=True))
    return next((f"{name} is corrupted" for name, entry in index.items() if hashes[name] != entry["sha256"]), None)


def is_corrupted(path):
    """Return whether a checkpoint is corrupted. If it cannot be read, return False, because it may be valid."""
    try:
        return find_corruption(path) is not None
    except OSError:
        return False


def find_file_corruption(path, name):
    """Return a message if a JSON file or a file with weights is missing or cannot be parsed, else None.

    Raises:
        OSError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    if _size_of(path / name) is None:
        return f"{name} is missing"
    try:
        if name.endswith(".json"):
            is_valid = isinstance(json.loads((path / name).read_text(encoding="utf-8")), dict)
        elif name.endswith(".bin"):  # written by torch.save: a zip file or, before torch 1.6, a pickle
            with open(path / name, "rb") as file:
                is_valid = zipfile.is_zipfile(file) or (file.seek(0) == 0 and file.read(1) == b"\x80")
        else:
            with safe_open(path / name, framework="np"):
                is_valid = True
    except (SafetensorError, ValueError, RecursionError):
        is_valid = False
    return None if is_valid else f"{name} is corrupted"


def read_index(path):
    """Return {file: {"size": bytes, "sha256": hash}} from state/index.json, or None if it is missing or invalid.

    Raises:
        OSError: the index cannot be read.
    """
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))["files"]
        is_valid = (
            index.keys() >= {*MODEL_FILES, TRAINER}
            and any(map(SHARD_PATH.match, index))
            and all(re.fullmatch(r"(state/)?[\w.-]{1,200}", name) for name in index)
            and all(entry.keys() == {"size", "sha256"} for entry in index.values())
        )
    except (*_MISSING, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return index if is_valid else None


def has_matching_trainer(path):
    """Return whether trainer.json is valid and contains the step that is in the name of the folder."""
    try:
        trainer = read_trainer(path)
        has_step = trainer["step"] == int(CHECKPOINT_NAME.match(path.name)[1])
        return has_step and isinstance(trainer["best_step"], (int, type(None)))
    except (*_MISSING, ValueError, KeyError, TypeError, RecursionError):
        return False


def _size_of(file):
    """Return the size of a file, or None if it is missing. Raise OSError if the file exists but cannot be
    opened, because safetensors would report an unreadable file as missing."""
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            return None
        open(file, "rb").close()
    except _MISSING:
        return None
    return status.st_size


def _hash_of(file):
    """Return the hash of a file, or None if it was deleted. Hashes are cached until the file changes."""
    try:
        status = os.stat(file)
        return _hash_once(file, status.st_size, status.st_mtime_ns, status.st_ino)
    except _MISSING:
        return None


@lru_cache(maxsize=1024)  # limit the cache, because a long run writes many files
def _hash_once(file, size, mtime_ns, inode):
    return sha256(file)


def shape_differences(path, config, shape):
    """Return a problem for each architecture setting in `shape` that differs from the `config` of a checkpoint."""
    differing = [key for key in shape if shape[key] != config[key]]
    # these are derived from n_head and n_embd by default, so do not report them in addition to n_head and n_embd
    independent = [key for key in differing if key not in ("n_kv_head", "head_dim", "n_inner")]
    return [
        f"model.{key}={shape[key]}: {path} has {key}={config[key]}, and a resumed run keeps its architecture; set "
        f"{key}={config[key]}, or set out_dir to another folder to start a new run"
        for key in independent or differing
    ]
