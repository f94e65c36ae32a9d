"""Verify checkpoints, and find the latest valid one."""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from ..utils.files import sha256
from .layout import CHECKPOINT_NAME, INDEX, MODEL_FILES, SHARD_PATH, TRAINER, list_checkpoints, read_trainer


def latest_valid(run, warn=print, resumable=True, thorough=True):
    """Return the latest valid checkpoint of a run, or None.

    Args:
        warn: called with a one-line message for each corrupted checkpoint that is skipped.
        resumable, thorough: see find_corruption.
    """
    for path in reversed(list_checkpoints(run)):
        problem = find_corruption(path, resumable, thorough)
        if problem is None:
            return path
        warn(f"warning: {path}: {problem}; using the previous checkpoint")
    return None


def find_corruption(path, resumable=True, thorough=True):
    """Return a message about the first missing or corrupted file of a checkpoint, or None if the checkpoint is valid.

    Files are compared with state/index.json. In a copy without state/, JSON files must parse, and safetensors files
    must be as long as their header says.

    Args:
        resumable: whether the checkpoint must contain a valid state/, which is needed to resume a run.
        thorough: compare hashes with the index, not only sizes.
    """
    path = Path(path)
    index = read_index(path)
    if index is None and resumable:
        return f"{INDEX} is {'corrupted' if (path / INDEX).exists() else 'missing'}"
    if index is None:
        return next(filter(None, (find_file_corruption(path, name) for name in MODEL_FILES)), None)
    index = {name: entry for name, entry in index.items() if resumable or not name.startswith("state/")}
    for name, entry in index.items():  # sizes first, because hashing takes seconds
        if not (path / name).is_file():
            return f"{name} is missing"
        if os.path.getsize(path / name) != entry["size"]:
            return f"{name} is corrupted"
    if resumable and not _has_matching_trainer(path):
        return f"{TRAINER} is corrupted or belongs to another step"
    if not thorough:
        return None
    with ThreadPoolExecutor() as pool:
        hashes = dict(zip(index, pool.map(_hash_of, [path / name for name in index]), strict=True))
    return next((f"{name} is corrupted" for name, entry in index.items() if hashes[name] != entry["sha256"]), None)


def find_file_corruption(path, name):
    """Return a message if a JSON or safetensors file is missing or cannot be parsed, else None."""
    from safetensors import SafetensorError, safe_open

    try:
        if name.endswith(".json"):
            if not isinstance(json.loads((path / name).read_text(encoding="utf-8")), dict):
                return f"{name} is corrupted"
        else:
            with safe_open(path / name, framework="np"):
                pass
    except FileNotFoundError:
        return f"{name} is missing"
    except (SafetensorError, ValueError, OSError):
        return f"{name} is corrupted"
    return None


def read_index(path):
    """Return {file: {"size": bytes, "sha256": hash}} of a checkpoint, or None if its index is missing or corrupted."""
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))["files"]
        is_valid = (
            index.keys() >= {*MODEL_FILES, TRAINER}
            and any(map(SHARD_PATH.match, index))
            and all(re.fullmatch(r"(state/)?[\w.-]{1,200}", name) for name in index)
            and all(entry.keys() == {"size", "sha256"} for entry in index.values())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return index if is_valid else None


def _has_matching_trainer(path):
    """Return whether trainer.json is valid and its step is the one in the folder name."""
    try:
        trainer = read_trainer(path)
        has_step = trainer["step"] == int(CHECKPOINT_NAME.match(path.name)[1])
        return has_step and isinstance(trainer["best_step"], (int, type(None)))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _hash_of(file):
    """Return the hash of a file, or None if it cannot be read. Hashes are cached until the file changes."""
    try:
        stat = os.stat(file)
        return _hash_once(file, stat.st_size, stat.st_mtime_ns, stat.st_ino)
    except OSError:
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
