"""File locks, with a file that names the holder. If a process dies, the operating system releases its locks."""

import errno
import json
import os
import platform
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout


def acquire(lock_file, holder_file):
    """Lock a file without waiting, write the process id and host to `holder_file`, and return the lock.

    The lock is released when the process ends or by its release(), which may be called more than once. If the file
    system does not support locks (ENOLCK, EOPNOTSUPP), nothing is locked. Without flock (ENOSYS), filelock uses the
    existence of the file as the lock.

    Raises:
        BlockingIOError: another process has the lock; the message names it, as in find_holder.
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
    """Return the lock holder as `process N on HOST`, or None. Nothing is written to the disk.

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
