"""The folder of a run: its lock, the links to the best checkpoint, pruning."""

import errno
import json
import os
import platform
import re
import shutil
from contextlib import suppress
from pathlib import Path

from ..utils.files import remove_checkpoint
from .layout import CHECKPOINT_NAME, checkpoint_path, is_checkpoint, list_checkpoints
from .verify import find_corruption

LOCK, LOCK_HOLDER = ".lock", ".lock.json"  # of a run folder that is being trained in
# what a run, and `report` after it, writes beside the checkpoints
_OUTPUT = re.compile(
    r"(metrics|samples)\.jsonl|expect\.json|loss\.png|nonfinite-\d+\.json|report\.html|"
    r"report-(loss|learning_rate|grad_norm|tokens_per_second|peak_memory|mfu)\.png"
)


def prune(run, best_step, final, keep_last):
    """Delete the checkpoints that are neither among the newest nor the best."""
    best = _best_checkpoint(run, best_step, final)
    found = list_checkpoints(run)
    kept = found[: found.index(final) + 1][-keep_last:]
    for old in found:
        # later ones are damaged, for the run went back behind them; or another training's, and not ours to delete. A
        # folder that only has such a name is the user's
        is_ours = is_checkpoint(old) and (old < final or find_corruption(old) is not None)
        if old not in kept and old != best and is_ours:
            remove_checkpoint(old)


def prepare_run_folder(run, recipe, is_resumed):
    """Make the run folder and write run.yaml (the text `recipe`) into it; a run that is not resumed clears away the
    checkpoints, links and logs of the one before it."""
    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    for leftover in run.glob(".push-*"):  # links of a process that was killed while it pushed
        shutil.rmtree(leftover, ignore_errors=True)
    if not is_resumed:
        for path in run.iterdir():
            if is_published(path) or _OUTPUT.fullmatch(path.name):
                path.unlink()
        for path in filter(is_checkpoint, list_checkpoints(run)):  # by which a copy in a link's place was known
            remove_checkpoint(path)
    temporary = run / "run.yaml.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(recipe)
        file.flush()
        os.fsync(file.fileno())  # an empty run.yaml would go on as another run
    os.replace(temporary, run / "run.yaml")


def lock_run(run):
    """Take a run folder for this process, until it ends or releases it: the operating system's lock on a file, which
    also says who holds it. A process that died holds nothing.

    Raises:
        ValueError: another process has it.
    """
    from filelock import FileLock, Timeout

    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    held = FileLock(run / LOCK, timeout=0)
    try:
        held.acquire()
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):  # a file system without locks; a run there does without
            return held
        if not isinstance(error, Timeout):
            raise ValueError(
                f"out_dir={run}: {run / LOCK} cannot be locked ({error.strerror}); move it away, or take "
                "another out_dir"
            ) from None
        raise ValueError(
            f"out_dir={run}: {_holder(run)} is training in it; wait for its end, stop it, or take another out_dir"
        ) from None
    with suppress(OSError):  # only a help for others
        (run / LOCK_HOLDER).write_text(json.dumps({"host": platform.node(), "pid": os.getpid()}), encoding="utf-8")
    return held


def check_lock(run):
    """Whether another process is training in a run folder, as a list of problems."""
    if not (Path(run) / LOCK).exists():
        return []
    try:
        lock_run(run).release()
    except ValueError as error:
        return [str(error)]
    return []


def _holder(run):
    try:
        holder = json.loads((run / LOCK_HOLDER).read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def check_run_folder(folder):
    """Whether a new run may begin in a folder, as a list of problems: files of the user's own are not touched."""
    folder = Path(folder)
    names = (
        "README.md",
        "model.py",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    )
    folders = [name for name in ("run.yaml", "metrics.jsonl", "samples.jsonl", "loss.png") if (folder / name).is_dir()]
    if folders:
        return [
            f"out_dir={folder}: {', '.join(folders)} is a folder there, and a run writes such a file; take another "
            "out_dir"
        ]
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    own = [name for name in found if (name in names or _OUTPUT.fullmatch(name)) and not is_published(folder / name)]
    if own and not (folder / "run.yaml").exists():  # a run that was begun has one
        return [f"out_dir={folder}: holds {', '.join(own)}, but no run; take another out_dir"]
    return []


def _best_checkpoint(run, best_step, final):
    """The best checkpoint that is there: where saving the very best one failed, the one that was the best before."""
    if best_step is None:
        return final
    best, before = checkpoint_path(run, best_step), _published_from(run / "model.safetensors") or final
    return best if best.exists() else before if before.exists() else final


def publish(run, best_step, final):
    """Let the run folder itself load as its best checkpoint: a link for each file, replaced one by one. Where there are
    no links, as under Windows without the right to make them, a copy."""
    checkpoint = _best_checkpoint(run, best_step, final)
    for file in checkpoint.iterdir():
        if file.is_file() and _published_from(run / file.name) != checkpoint:
            temporary = run / f".{file.name}.link"
            temporary.unlink(missing_ok=True)
            try:
                temporary.symlink_to(Path(checkpoint.name) / file.name)
            except OSError:
                shutil.copy2(file, temporary)  # with its time, which _origin knows it by
            os.replace(temporary, run / file.name)


def is_published(path):
    """True for one of the links or copies that _publish makes."""
    return _published_from(path) is not None


def _published_from(path):
    """The checkpoint folder that a file of the run folder is a link to, or a copy from; None where it is neither."""
    if path.is_symlink():
        name = os.path.dirname(os.readlink(path))
        return path.parent / name if CHECKPOINT_NAME.match(name) else None
    for folder in list_checkpoints(path.parent) if path.is_file() else ():
        with suppress(OSError):
            copied, held = os.stat(path), os.stat(folder / path.name)
            if (copied.st_size, copied.st_mtime_ns) == (held.st_size, held.st_mtime_ns):
                return folder
    return None


def best_checkpoint(run, best_step):
    """Return the best checkpoint of a run, or the latest if the best one could not be saved; None without any."""
    found = list_checkpoints(run)
    best = [path for path in found if best_step is not None and path == checkpoint_path(run, best_step)]
    return (best or found[-1:] or [None])[0]
