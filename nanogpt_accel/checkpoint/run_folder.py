"""The folder of a run: check it, lock it, prepare it, publish the best checkpoint in it, prune older ones."""

import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from ..utils import locking
from ..utils.files import nearest_existing, remove_checkpoint, write_atomically
from .layout import CHECKPOINT_NAME, MODEL_FILES, checkpoint_path, is_checkpoint, list_checkpoints
from .verify import find_corruption

LOCK, LOCK_HOLDER = ".lock", ".lock.json"  # while a process trains in the folder
# what a run, and `report` after it, writes next to the checkpoints
_OUTPUT = re.compile(
    r"(metrics|samples)\.jsonl|expect\.json|loss\.png|nonfinite-\d+\.json|report\.html|"
    r"report-(loss|learning_rate|grad_norm|tokens_per_second|peak_memory|mfu)\.png"
)
# the files that `publish` links from a checkpoint
_PUBLISHED = {*MODEL_FILES, "README.md", "model.py", "generation_config.json", "tokenizer_config.json"}


# ---- check: each returns a list of problems


def check_writable(folder, key="out_dir"):
    """Check that files can be written to a folder that may not exist yet. key: the option that names the folder."""
    place = nearest_existing(folder)
    if not place.is_dir():
        return [f"{key}={folder}: {place} is a file; take another folder"]
    try:
        with tempfile.TemporaryFile(dir=place):  # os.access says yes to root, even for /proc and /sys
            return []
    except OSError as error:
        return [f"{key}={folder}: cannot write in {place} ({error.strerror}); take another folder"]


def check_empty(folder, key):
    """Check that a new model folder can be made: writable, empty, and outside of runs, which prune their folder."""
    folder = Path(folder)
    if folder.is_symlink() and not folder.exists():
        return [f"{key}={folder}: a link to nothing; give another folder"]
    if folder.is_dir() and any(file.name != ".tmp" for file in folder.iterdir()):  # (of an export that was killed)
        return [f"{key}={folder}: holds something already; give a folder that does not exist yet, or is empty"]
    for parent in folder.absolute().resolve().parents:
        if CHECKPOINT_NAME.match(parent.name) or (parent / "run.yaml").is_file():
            return [f"{key}={folder}: lies in the run {parent}; give a folder outside"]
    return check_writable(folder, key)


def check_run_folder(folder):
    """Check that a new run in a folder overwrites no files of the user's."""
    folder = Path(folder)
    folders = [name for name in ("run.yaml", "metrics.jsonl", "samples.jsonl", "loss.png") if (folder / name).is_dir()]
    if folders:
        return [
            f"out_dir={folder}: {', '.join(folders)} is a folder there, and a run writes such a file; take another "
            "out_dir"
        ]
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    names = [name for name in found if name in _PUBLISHED or _OUTPUT.fullmatch(name)]
    users = [name for name in names if not is_published(folder / name)]
    if users and not (folder / "run.yaml").exists():  # every run has one
        return [f"out_dir={folder}: holds {', '.join(users)}, but no run; take another out_dir"]
    return []


def check_lock(run):
    """Check that no other process is training in a run folder."""
    if not (Path(run) / LOCK).exists():
        return []
    try:
        lock_run(run).release()
    except ValueError as error:
        return [str(error)]
    return []


# ---- start of a run


def lock_run(run):
    """Lock a run folder for this process, until it ends or calls release() of the lock that is returned.

    Raises:
        ValueError: another process is training in the folder.
    """
    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    try:
        return locking.acquire(run / LOCK, run / LOCK_HOLDER)
    except BlockingIOError as holder:
        raise ValueError(
            f"out_dir={run}: {holder} is training in it; wait for its end, stop it, or take another out_dir"
        ) from None
    except OSError as error:
        raise ValueError(
            f"out_dir={run}: {run / LOCK} cannot be locked ({error.strerror}); move it away, or take another out_dir"
        ) from None


def prepare_run_folder(run, recipe, is_resumed):
    """Make the run folder and write run.yaml, with the text `recipe`. If the run is not resumed, first delete the
    checkpoints, links and logs of the previous run."""
    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    for leftover in run.glob(".push-*"):  # links of a process that was killed while it pushed
        shutil.rmtree(leftover, ignore_errors=True)
    if not is_resumed:
        for path in run.iterdir():
            if is_published(path) or _OUTPUT.fullmatch(path.name):
                path.unlink()
        for path in filter(is_checkpoint, list_checkpoints(run)):  # last: is_published compares copies with them
            remove_checkpoint(path)
    write_atomically(run / "run.yaml", recipe)  # with an empty run.yaml another run would resume


# ---- after each save


def best_checkpoint(run, best_step, latest=None):
    """Return the best checkpoint of a run that exists, else the latest one, else None.

    If the best one could not be saved, the one that is published is the best before it.

    Args:
        best_step: step of the best validation loss; None if the run was not evaluated.
        latest: the latest checkpoint, if known; later ones may be corrupted.
    """
    if latest is None:
        latest = next(filter(is_checkpoint, reversed(list_checkpoints(run))), None)
    if best_step is None:
        return latest
    candidates = checkpoint_path(run, best_step), _published_from(Path(run) / "model.safetensors")
    return next((path for path in candidates if path is not None and path.exists()), latest)


def publish(run, best_step, latest):
    """Make the run folder load as its best checkpoint: link each file of the checkpoint into it, one by one. Where
    links are not allowed (Windows without the privilege), copy the files."""
    checkpoint = best_checkpoint(run, best_step, latest)
    for file in checkpoint.iterdir():
        if file.is_file() and _published_from(run / file.name) != checkpoint:
            temporary = run / f".{file.name}.link"
            temporary.unlink(missing_ok=True)
            try:
                temporary.symlink_to(Path(checkpoint.name) / file.name)
            except OSError:
                shutil.copy2(file, temporary)  # keeps the time, by which _published_from recognizes it
            os.replace(temporary, run / file.name)


def is_published(path):
    """Return whether a file is one of the links or copies that `publish` makes."""
    return _published_from(path) is not None


def _published_from(path):
    """Return the checkpoint folder to which a file of the run folder is linked, or from which it is copied, or None."""
    if path.is_symlink():
        name = os.path.dirname(os.readlink(path))
        return path.parent / name if CHECKPOINT_NAME.match(name) else None
    for folder in list_checkpoints(path.parent) if path.is_file() else ():
        with suppress(OSError):
            copied, original = os.stat(path), os.stat(folder / path.name)
            if (copied.st_size, copied.st_mtime_ns) == (original.st_size, original.st_mtime_ns):
                return folder
    return None


def prune(run, best_step, latest, keep_last):
    """Delete all checkpoints except the last `keep_last` and the best one. latest: the one that was just saved."""
    found = list_checkpoints(run)
    until_latest = found[: found.index(latest) + 1]
    kept = {best_checkpoint(run, best_step, latest), *until_latest[-keep_last:]}
    # a later one is deleted only if it is corrupted, because the run resumed before it; a valid one belongs to another
    # run, and a folder without files of a checkpoint to the user
    corrupted = [path for path in found[len(until_latest) :] if find_corruption(path) is not None]
    for path in filter(is_checkpoint, until_latest + corrupted):
        if path not in kept:
            remove_checkpoint(path)
