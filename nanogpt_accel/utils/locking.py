"""File locks. A second file names the process that has the lock. If a process dies, its locks are released."""

import errno
import json
import os
import platform
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, SoftFileLease, Timeout

LEASE_S = 30  # without flock: seconds until a lock is free if the process that has it does not renew it
RENEWALS = 10  # renewals per LEASE_S; a waiting process stops waiting as soon as it sees one
_NO_FLOCK = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


def acquire(lock_file, holder_file):
    """Lock a file, write the process id and host to `holder_file`, and return the lock.

    The lock is released when the process ends, or by lock.release(), which can be called more than once. If the file
    system does not support flock, a lease is used instead. LOCK_FILE.lease contains the host, process id, start time
    and boot id, and a thread renews the lease. The lease of a dead process on this host is free immediately. The lease
    of a process on another host is free after LEASE_S seconds without renewal, so this function may wait that long. It
    stops waiting when the lease is renewed.

    Raises:
        BlockingIOError: another process has the lock. The message names this process: `process N on HOST`.
        OSError: the file cannot be created or locked.
    """
    lock = _lock(lock_file, holder_file)
    with suppress(OSError):  # only used in messages of other processes
        holder = {"host": platform.node(), "pid": os.getpid()}
        Path(holder_file).unlink(missing_ok=True)  # if it is a link, do not write to its target
        with open(holder_file, "x", encoding="utf-8") as file:
            file.write(json.dumps(holder))
    return lock


def find_holder(lock_file, holder_file):
    """Return the process that has the lock, as `process N on HOST`, or None. See `acquire`.

    Raises:
        OSError: the file cannot be locked.
    """
    if not Path(lock_file).exists():
        return None
    try:
        _lock(lock_file, holder_file).release()
        return None
    except BlockingIOError as error:
        return str(error)


def _lock(lock_file, holder_file):
    lease_file = Path(f"{lock_file}.lease")
    try:
        lock = FileLock(lock_file, timeout=0, fallback_to_soft=False)
        try:
            lock.acquire()
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            durations = {"lease_duration": LEASE_S, "heartbeat_interval": LEASE_S / RENEWALS}
            lock, renewed = SoftFileLease(lease_file, timeout=LEASE_S + 5, **durations), _time_of_change(lease_file)
            lock.acquire(cancel_check=lambda: _time_of_change(lease_file) not in (None, renewed))
        return lock
    except Timeout:
        fix = f" (if it has ended, delete {lease_file})" if lease_file.exists() else ""
        raise BlockingIOError(_read_holder(holder_file) + fix) from None


def _time_of_change(file):
    """Return the time of the last change of a file, or None if there is no such file."""
    with suppress(OSError):
        return file.stat().st_mtime_ns


def _read_holder(holder_file):
    try:
        holder = json.loads(Path(holder_file).read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
