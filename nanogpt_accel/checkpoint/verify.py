"""Find out whether a checkpoint is complete and uncorrupted, and which valid one is the latest."""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from ..utils.files import sha256
from .layout import CHECKPOINT_NAME, INDEX, MODEL_FILES, TRAINER, list_checkpoints, read_trainer

SHARD_PATH = re.compile(r"state/optimizer(-\d{5}-of-\d{5})?\.safetensors$")


def find_corruption(path, resumable=True, thorough=True):
    """What is missing or broken in a checkpoint folder, as text; None where it is whole.

    resumable: also look at state/, and insist on its index, which knows the size and hash of every file.
    thorough: compare hashes, not sizes alone. Without an index (a folder that came without its state/), JSON files
        have to parse and safetensors files to have the length that their header says.
    """
    path = Path(path)
    facts = read_index(path)
    if facts is None and resumable:
        return f"{INDEX} is {'damaged' if (path / INDEX).exists() else 'missing'}"
    if facts is None:
        return next(filter(None, (find_file_corruption(path, name) for name in MODEL_FILES)), None)
    facts = {name: known for name, known in facts.items() if resumable or not name.startswith("state/")}
    for name, known in facts.items():  # before anything is read
        if not (path / name).is_file():
            return f"{name} is missing"
        if os.path.getsize(path / name) != known["size"]:
            return f"{name} is damaged"
    if resumable and not _has_matching_trainer(path):
        return f"{TRAINER} is not that of this checkpoint"
    if thorough:
        with ThreadPoolExecutor() as pool:
            found = pool.map(_hash_of, [path / name for name in facts])
            for (name, known), hash_now in zip(facts.items(), found, strict=True):
                if hash_now != known["sha256"]:
                    return f"{name} is damaged"
    return None


def find_file_corruption(path, name):
    """Whether a JSON file parses and a safetensors file has the length that its header says, as `damage` tells it."""
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
    """{file: {"size": bytes, "sha256": hash}} of a checkpoint, or None where there is no whole index."""
    try:
        facts = json.loads((path / INDEX).read_text(encoding="utf-8"))["files"]
        is_whole = (
            facts.keys() >= {*MODEL_FILES, TRAINER}
            and any(map(SHARD_PATH.match, facts))
            and all(re.fullmatch(r"(state/)?[\w.-]{1,200}", name) for name in facts)
            and all(known.keys() == {"size", "sha256"} for known in facts.values())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return facts if is_whole else None


def _has_matching_trainer(path):
    """Whether trainer.json is that of a checkpoint of this name: its step decides where the run goes on."""
    try:
        trainer = read_trainer(path)
        return trainer["step"] == int(CHECKPOINT_NAME.match(path.name)[1]) and isinstance(
            trainer["best_step"], (int, type(None))
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _hash_of(file):
    """The hash of a file, read once for as long as the file does not change."""
    try:
        facts = os.stat(file)
        return _hash_once(file, facts.st_size, facts.st_mtime_ns, facts.st_ino)
    except OSError:
        return None


@lru_cache(maxsize=1024)  # the files of some checkpoints; a long run writes many
def _hash_once(file, size, changed, number):
    return sha256(file)


def latest_valid(run, warn=print, resumable=True, thorough=True):
    """The newest whole checkpoint of a run, or None where there is none. `warn` gets a line for each damaged one.

    resumable, thorough: as in `damage`.
    """
    for path in reversed(list_checkpoints(run)):
        trouble = find_corruption(path, resumable, thorough)
        if trouble is None:
            return path
        warn(f"warning: {path}: {trouble}; taking the checkpoint before it")
    return None


def shape_differences(path, config, shape):
    """Where a model's shape, {key: value}, differs from the `config` of the checkpoint at `path`: a list of
    problems."""
    differing = [key for key in shape if shape[key] != config[key]]
    # these follow from n_head and n_embd unless they are given, and are no second mistake
    own = [key for key in differing if key not in ("n_kv_head", "head_dim", "n_inner")]
    return [
        f"model.{key}={shape[key]}: the checkpoint {path} has {key}={config[key]}, and a run goes on with the "
        "shape that it began with"
        for key in own or differing
    ]
