"""Files and folders: hash, write and flush to disk, rename, delete."""

import hashlib
import os
import shutil
import time
from contextlib import suppress


def sha256(file):
    digest, buffer = hashlib.sha256(), bytearray(2**16)  # a larger one per file makes the heap grow, 41 MB with 4 MiB
    with open(file, "rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def write_text_atomically(path, text):
    """Write a text file completely or not at all, even if the machine goes down."""
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def remove_checkpoint(folder):
    """Rename a checkpoint to a hidden name, then delete it: a half-deleted one must not look like a checkpoint."""
    hidden = folder.with_name(f".{folder.name}.old")
    if hidden.exists():
        delete(hidden)
    rename_folder(folder, hidden)
    delete(hidden)


def rename_folder(folder, target):
    """Rename a folder. Windows refuses this while a file in it is open, and virus scanners open new files for a
    moment; so try again for 2 seconds."""
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
    """Flush a folder, and every file and folder in it, to disk."""
    for place, _, files in os.walk(folder):
        for name in files:
            # Windows flushes only what is open for writing
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
