"""Files and folders: hash, write and flush to disk, rename, delete."""

import hashlib
import math
import os
import shutil
import stat
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from .text import quoted


def cache_folder():
    """Return the folder for files that this package downloads. huggingface_hub and tiktoken have their own folders."""
    parent = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.environ.get("NANOGPT_ACCEL_CACHE") or os.path.join(parent, "nanogpt_accel")


def sha256(file, offset=0, size=None):
    """Return the SHA-256 of a file in hexadecimal, or if `size` is set, of the `size` bytes that start at `offset`."""
    digest, buffer = hashlib.sha256(), bytearray(2**16)  # larger blocks (4 MiB) are not faster, and need a larger heap
    remaining = math.inf if size is None else size
    with open(file, "rb", buffering=0) as opened:
        opened.seek(offset)
        while remaining and (count := opened.readinto(memoryview(buffer)[: min(remaining, len(buffer))])):
            digest.update(memoryview(buffer)[:count])
            remaining -= count
    return digest.hexdigest()


def write_atomically(path, content):
    """Write text or bytes to a file atomically: a crash never leaves an incomplete file."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_path(path):
    """Yield a temporary path to write a file to. Then flush the file to disk and rename it, or delete it on error.

    If `path` or the temporary path is a link, for example in a downloaded folder, the link is replaced, not followed.
    """
    temporary = Path(f"{path}.tmp-{os.getpid()}")  # other processes may write the same file at the same time
    try:
        temporary.unlink(missing_ok=True)
        open(temporary, "xb").close()
        yield temporary
        with open(temporary, "r+b") as file:
            flush_file(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def flush_file(file):
    """Flush an open file to disk, so that it survives a power failure."""
    file.flush()
    os.fsync(file.fileno())


def copy_mode(source, folder):
    """Set the mode of all files in a folder to the mode of the file `source`, which was created with open().

    This is the mode that the umask allows. Without this function, other users could not load the model, because
    safetensors creates files with mode 0600 regardless of the umask. In addition, transformers gives the copy of
    model.py the mode of the original.
    """
    mode = stat.S_IMODE(os.stat(source).st_mode)
    for place, _, files in os.walk(folder):
        for file in (os.path.join(place, name) for name in files):
            if stat.S_IMODE(os.stat(file).st_mode) != mode:
                with suppress(OSError):  # some network file systems have no modes
                    os.chmod(file, mode)


def permission_denied(path):
    """Return a message about a file or folder that this process has no permission to read or write, with the fix."""
    path = os.path.abspath(path)
    may = partial(os.access, effective_ids=os.access in os.supports_effective_ids)
    closed = next((parent for parent in reversed(Path(path).parents) if not may(parent, os.X_OK)), None)
    if closed is not None:
        fix = f"to open the folder, its owner can run chmod a+rx {quoted(closed)}"
    elif os.path.exists(path) and not may(path, os.R_OK):
        mode = "a+rx" if os.path.isdir(path) else "a+r"
        fix = f"to make it readable, its owner can run chmod {mode} {quoted(path)}"
    else:
        place = path if os.path.exists(path) else Path(path).parent
        fix = f"to make it writable, its owner can run chmod u+w {quoted(place)}"
    return f"{path}: permission denied; {fix}"


def nearest_existing(folder):
    """Return a folder or, if it does not exist, the nearest existing parent."""
    places = [Path(folder), *Path(folder).parents]
    return next((place for place in places if place.exists()), places[-1])


def remove_checkpoint(folder):
    """Rename a checkpoint to a hidden name and delete it, so that a partly deleted checkpoint is never visible."""
    hidden = folder.with_name(f".{folder.name}.old")
    if os.path.lexists(hidden):
        delete(hidden)
    rename_folder(folder, hidden)
    delete(hidden)


def rename_folder(folder, target):
    """Rename a folder. Windows rejects this while a virus scanner has a new file open, so retry for up to 2 seconds."""
    for _ in range(20 if os.name == "nt" else 0):
        with suppress(PermissionError):
            return os.rename(folder, target)
        time.sleep(0.1)
    os.rename(folder, target)


def delete(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def flush_tree(folder):
    """Flush a folder and everything in it to disk."""
    for place, _, files in os.walk(folder):
        for name in files:
            # Windows flushes only files that are open for writing
            with open(os.path.join(place, name), "rb" if os.name == "posix" else "r+b") as file:
                os.fsync(file.fileno())
        flush_folder(place)


def flush_folder(folder):
    if os.name == "posix":  # Windows cannot open folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
