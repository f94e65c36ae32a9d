"""The folder of a run: check, lock and prepare it, link the best checkpoint into it, and prune older checkpoints."""

import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from ..utils import locking
from ..utils.files import nearest_existing, remove_checkpoint, write_atomically
from .layout import CHECKPOINT_NAME, MODEL_FILES, checkpoint_path, is_checkpoint, list_checkpoints
from .verify import is_corrupted

LOCK, LOCK_HOLDER = ".lock", ".lock.json"  # a training process locks the first and writes its id to the second
# files that a run and `report` write next to the checkpoints
_OUTPUT = re.compile(
    r"(metrics|samples)\.jsonl|expect\.json|loss\.png|nonfinite-\d+\.json|report\.html|"
    r"report-(loss|learning_rate|grad_norm|tokens_per_second|peak_memory|mfu)\.png"
)
# files that `publish` links from a checkpoint
_PUBLISHED = {*MODEL_FILES, "README.md", "model.py", "generation_config.json", "tokenizer_config.json"}


# ---- checks: each returns a list of problems


def check_writable(folder, key="out_dir"):
    """Check that files can be written to a folder, which may not exist yet. key: the option that sets the folder."""
    if os.path.islink(folder) and not os.path.exists(folder):
        return [f"{key}={folder}: broken link; set `{key}` to another folder"]
    place = nearest_existing(folder)
    if not place.is_dir():
        return [f"{key}={folder}: {place} is a file; set `{key}` to another folder"]
    try:
        with tempfile.TemporaryFile(dir=place):  # os.access is not enough: for root, it is true even in /proc and /sys
            return []
    except OSError as error:
        return [f"{key}={folder}: cannot write to {place} ({error.strerror}); set `{key}` to another folder"]


def check_empty(folder, key):
    """Check that a folder is writable, empty, and not inside a run folder. key: the option that sets the folder."""
    folder = Path(folder)
    if folder.is_dir() and any(file.name != ".tmp" for file in folder.iterdir()):  # a killed export leaves a .tmp
        return [f"{key}={folder}: the folder is not empty; set `{key}` to a new or empty folder"]
    return _check_outside_runs(folder, key) or check_writable(folder, key)


def check_new_file(file, key):
    """Check that a file does not exist, is writable, and is not in a run folder. key: the option that sets the file."""
    file = Path(file)
    if os.path.lexists(file):
        return [f"{key}={file}: exists already; delete it, or set `{key}` to a new file"]
    return _check_outside_runs(file, key) or check_writable(file.parent, key)


def _check_outside_runs(path, key):
    for parent in path.absolute().resolve().parents:
        if CHECKPOINT_NAME.match(parent.name) or (parent / "run.yaml").is_file():
            return [f"{key}={path}: inside the run folder {parent}; set `{key}` to a path outside of it"]
    return []


def check_run_folder(folder):
    """Check that a new run would not overwrite the user's own files in a folder."""
    folder = Path(folder)
    problems = [
        f"out_dir={folder}: {name} is a folder, but a run writes a file with this name; set out_dir to another folder"
        for name in ("run.yaml", "metrics.jsonl", "samples.jsonl", "loss.png")
        if (folder / name).is_dir()
    ]
    if problems or not folder.is_dir() or (folder / "run.yaml").exists():  # every run has a run.yaml
        return problems
    names = sorted(path.name for path in folder.iterdir() if path.name in _PUBLISHED or _OUTPUT.fullmatch(path.name))
    names = [name for name in names if not is_published(folder / name)]
    if names:
        problem = f"contains {', '.join(names)}, which a run would overwrite"
        return [f"out_dir={folder}: {problem}; set out_dir to another folder"]
    return []


def check_lock(run):
    """Check that no other process is training in a run folder."""
    try:
        if (Path(run) / LOCK).exists():
            lock_run(run).release()
        return []
    except ValueError as error:
        return [str(error)]


def find_trainer(run):
    """Return the process that trains in a run folder, as `process N on HOST`, or None.

    Raises:
        OSError: the lock file cannot be opened or locked, so it is unknown whether a process trains in the folder.
    """
    return locking.find_holder(Path(run) / LOCK, Path(run) / LOCK_HOLDER)


# ---- start of a run


def lock_run(run):
    """Lock a run folder for this process, and return the lock. Call release() of the lock to unlock the folder.

    The folder is also unlocked when the process ends.

    Raises:
        ValueError: another process is training in the folder, or the folder cannot be locked.
    """
    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    try:
        return locking.acquire(run / LOCK, run / LOCK_HOLDER)
    except BlockingIOError as holder:
        problem = f"{holder} is training in this folder; wait for the process to end, stop it"
    except OSError as error:
        problem = f"cannot lock {run / LOCK} ({error.strerror}); remove this file"
    raise ValueError(f"out_dir={run}: {problem}, or set out_dir to another folder")


def prepare_run_folder(run, recipe, is_resumed):
    """Create the run folder and write the text `recipe` to run.yaml. If the run is not resumed, first delete the
    checkpoints, links and logs of the previous run."""
    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    for leftover in run.glob(".push-*"):  # links of a process that was killed during a push
        shutil.rmtree(leftover, ignore_errors=True)
    if not is_resumed:
        for path in run.iterdir():
            if is_published(path) or _OUTPUT.fullmatch(path.name):
                path.unlink()
        # delete the checkpoints last, because is_published compares copies with them
        for path in filter(is_checkpoint, list_checkpoints(run)):
            remove_checkpoint(path)
    write_atomically(run / "run.yaml", recipe)  # an empty run.yaml after a crash would mean default settings


# ---- after each save


def best_checkpoint(run, best_step, latest=None):
    """Return the checkpoint of a run with the best validation loss.

    If the checkpoint of best_step does not exist, for example because the disk was full, return the previous best
    checkpoint: `publish` linked its files into the run folder. If the previous best checkpoint does not exist, or if
    the run was not evaluated, return the latest checkpoint.

    Args:
        best_step: step of the best validation loss; None if the run was not evaluated.
        latest: the latest valid checkpoint. None: find the latest checkpoint without verifying it.
    """
    if latest is None:
        latest = next(filter(is_checkpoint, reversed(list_checkpoints(run))), None)
    if best_step is None:
        return latest
    candidates = checkpoint_path(run, best_step), _published_from(Path(run) / "model.safetensors")
    return next((path for path in candidates if path is not None and path.exists()), latest)


def publish(run, best_step, latest):
    """Link the files of the best checkpoint into the run folder, so that the run folder can be loaded as a model. If
    symbolic links are not permitted, copy the files. By default, Windows does not permit them."""
    checkpoint = best_checkpoint(run, best_step, latest)
    for file in checkpoint.iterdir():
        if file.is_file() and _published_from(run / file.name) != checkpoint:
            temporary = run / f".{file.name}.link"
            temporary.unlink(missing_ok=True)
            try:
                temporary.symlink_to(Path(checkpoint.name) / file.name)
            except OSError:
                shutil.copy2(file, temporary)  # _published_from recognizes the copy by its modification time
            os.replace(temporary, run / file.name)


def is_published(path):
    """Return whether a file is a link or copy made by `publish`."""
    return _published_from(path) is not None


def _published_from(path):
    """If a file in the run folder is a link or copy made by `publish`, return the checkpoint folder with the original.
    Otherwise return None."""
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
    """Delete old checkpoints, but keep the last `keep_last` and the best one. latest: the checkpoint just saved."""
    checkpoints = list_checkpoints(run)
    until_latest = checkpoints[: checkpoints.index(latest) + 1]
    kept = {best_checkpoint(run, best_step, latest), *until_latest[-keep_last:]}
    # Delete later checkpoints only if they are corrupted: the run skipped these when it resumed. If a later checkpoint
    # is valid, it belongs to another run.
    corrupted = filter(is_corrupted, checkpoints[len(until_latest) :])
    for path in filter(is_checkpoint, [*until_latest, *corrupted]):
        if path not in kept:
            remove_checkpoint(path)
