"""A lock on a file that says which process holds it.

    lock = acquire(folder / ".lock", folder / ".lock.json")   # BlockingIOError: process 123 on HOST
    ...
    lock.release()

The operating system keeps the lock, so a process that died holds nothing.
"""

import errno
import json
import os
import platform
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout


def acquire(lock_file, holder_file):
    """Lock a file for this process without waiting, and write this process's id and host into another file.

    On a file system that supports no locks (ENOLCK, EOPNOTSUPP) the process continues without one. (If flock is
    missing altogether, ENOSYS, filelock itself marks the lock by a file that counts until its process ends.)

    Returns:
        The lock; its release() may be called more than once. It is also released when the process ends.

    Raises:
        BlockingIOError: another process holds it; the text of the error is find_holder's.
        OSError: the file cannot be created or locked.
    """
    lock = FileLock(lock_file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(_read_holder(holder_file)) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        return lock
    with suppress(OSError):  # only used in messages of other processes
        holder = {"host": platform.node(), "pid": os.getpid()}
        Path(holder_file).write_text(json.dumps(holder), encoding="utf-8")
    return lock


def find_holder(lock_file, holder_file):
    """Return who holds the lock, as `process N on HOST`, or None if nobody does. Writes nothing.

    Raises:
        OSError: the file cannot be locked.
    """
    if not Path(lock_file).exists():
        return None
    try:
        with FileLock(lock_file, timeout=0):
            return None
    except Timeout:
        return _read_holder(holder_file)


def _read_holder(holder_file):
    try:
        holder = json.loads(Path(holder_file).read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
