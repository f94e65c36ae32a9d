"""Find out whether a checkpoint is complete and uncorrupted, and which valid one is the latest."""

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
        warn: takes a line about each corrupted checkpoint that is skipped.
        resumable, thorough: as for find_corruption.
    """
    for path in reversed(list_checkpoints(run)):
        problem = find_corruption(path, resumable, thorough)
        if problem is None:
            return path
        warn(f"warning: {path}: {problem}; taking the checkpoint before it")
    return None


def find_corruption(path, resumable=True, thorough=True):
    """Return which file of a checkpoint is missing or damaged, as text, or None if the checkpoint is valid.

    Args:
        resumable: also verify state/ and require its index, which has the size and hash of every file.
        thorough: compare hashes, not only sizes. Without an index (a folder that was copied without its state/) JSON
            files must parse and safetensors files must have the length that their header states.
    """
    path = Path(path)
    index = read_index(path)
    if index is None and resumable:
        return f"{INDEX} is {'damaged' if (path / INDEX).exists() else 'missing'}"
    if index is None:
        return next(filter(None, (find_file_corruption(path, name) for name in MODEL_FILES)), None)
    index = {name: entry for name, entry in index.items() if resumable or not name.startswith("state/")}
    for name, entry in index.items():  # before anything is read
        if not (path / name).is_file():
            return f"{name} is missing"
        if os.path.getsize(path / name) != entry["size"]:
            return f"{name} is damaged"
    if resumable and not _has_matching_trainer(path):
        return f"{TRAINER} is not that of this checkpoint"
    return _find_hash_mismatch(path, index) if thorough else None


def _find_hash_mismatch(path, index):
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(_hash_of, [path / name for name in index])
        for (name, entry), found in zip(index.items(), hashes, strict=True):
            if found != entry["sha256"]:
                return f"{name} is damaged"
    return None


def find_file_corruption(path, name):
    """Return whether a JSON or safetensors file is missing or damaged, judged by the file alone, as text, or None."""
    from safetensors import SafetensorError, safe_open

    try:
        if name.endswith(".json"):
            if not isinstance(json.loads((path / name).read_text(encoding="utf-8")), dict):
                return f"{name} is damaged"
        else:
            with safe_open(path / name, framework="np"):
                pass
    except FileNotFoundError:
        return f"{name} is missing"
    except (SafetensorError, ValueError, OSError):
        return f"{name} is damaged"
    return None


def read_index(path):
    """Return {file: {"size": bytes, "sha256": hash}} of a checkpoint, or None if its index is missing or damaged."""
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
    """Return whether trainer.json has the step of the folder's name: a run resumes at that step."""
    try:
        trainer = read_trainer(path)
        has_step = trainer["step"] == int(CHECKPOINT_NAME.match(path.name)[1])
        return has_step and isinstance(trainer["best_step"], (int, type(None)))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _hash_of(file):
    """Return the hash of a file, or None; an unchanged file is read only once."""
    try:
        stat = os.stat(file)
        return _hash_once(file, stat.st_size, stat.st_mtime_ns, stat.st_ino)
    except OSError:
        return None


@lru_cache(maxsize=1024)  # the files of some checkpoints; a long run writes many
def _hash_once(file, size, mtime_ns, inode):
    return sha256(file)


def shape_differences(path, config, shape):
    """Return a problem for each value of `shape` that differs from the `config` of the checkpoint at `path`."""
    differing = [key for key in shape if shape[key] != config[key]]
    # these follow from n_head and n_embd unless they are given, so they are not problems of their own
    independent = [key for key in differing if key not in ("n_kv_head", "head_dim", "n_inner")]
    return [
        f"model.{key}={shape[key]}: the checkpoint {path} has {key}={config[key]}, and a run goes on with the "
        "shape that it began with"
        for key in independent or differing
    ]
