"""locking.py: a lock names its holder and ends with its process; file systems without locks are supported."""

import errno
import json
import os
import platform
import subprocess
import sys
import time

import pytest

from nanogpt_accel.utils import locking
from nanogpt_accel.utils.locking import acquire, find_holder

OTHER = """
import sys
from nanogpt_accel.utils.locking import acquire
lock = acquire(*sys.argv[1:])
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def files(tmp_path):
    return tmp_path / "lock", tmp_path / "holder.json"


@pytest.fixture
def other(files):
    """Another process that has the lock."""
    command = [sys.executable, "-c", OTHER, *map(str, files)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_the_holder_is_named_until_it_is_killed(files, other):
    name = f"process {other.pid} on {platform.node()}"
    with pytest.raises(BlockingIOError) as caught:
        acquire(*files)
    assert str(caught.value) == find_holder(*files) == name
    files[1].write_text("no JSON")
    assert find_holder(*files) == "another process"
    other.kill()
    other.wait()
    assert find_holder(*files) is None
    acquire(*files).release()


def test_looking_for_a_holder_writes_nothing(files):
    assert find_holder(*files) is None and not files[0].exists()
    lock = acquire(*files)
    assert json.loads(files[1].read_text()) == {"host": platform.node(), "pid": os.getpid()}
    assert find_holder(*files) == f"process {os.getpid()} on {platform.node()}", "within one process too"
    lock.release()
    lock.release()
    files[1].unlink()
    assert find_holder(*files) is None and not files[1].exists()


# ---- without flock

NO_FLOCK = """
import errno, fcntl, os, socket, sys
from nanogpt_accel.utils import locking

def flock(*args):
    raise OSError(getattr(errno, sys.argv[3]), "no flock")

fcntl.flock, locking.LEASE_S = flock, 1
if sys.argv[4] == "elsewhere":
    socket.gethostname = lambda: "elsewhere"
lock = locking.acquire(*sys.argv[1:3])
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def no_flock(monkeypatch, files):
    """Return a function: no_flock("ENOSYS", where) starts another process that has the lock, on a file system without
    flock."""
    import fcntl

    started = []

    def start(name, where="here"):
        def flock(*args):
            raise OSError(getattr(errno, name), "no flock")

        monkeypatch.setattr(fcntl, "flock", flock)
        monkeypatch.setattr(locking, "LEASE_S", 1)
        words = [sys.executable, "-c", NO_FLOCK, *map(str, files), name, where]
        started.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "locked\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_without_flock_a_dead_process_on_this_host_blocks_nothing(files, no_flock, number, monkeypatch):
    process = no_flock(number)
    process.kill()
    process.wait()
    monkeypatch.setattr(locking, "LEASE_S", 1)
    assert (files[0].parent / "lock.lease").exists()
    lock = acquire(*files)
    assert json.loads(files[1].read_text())["pid"] == os.getpid()
    lock.release()
    assert not (files[0].parent / "lock.lease").exists()


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_without_flock_a_living_process_is_named_with_the_file_to_delete(files, no_flock, where):
    """The error comes as soon as the other process renews its lease, not only when the lease would expire."""
    process, start = no_flock("ENOSYS", where), time.monotonic()
    with pytest.raises(BlockingIOError) as caught:
        acquire(*files)
    name = f"process {process.pid} on {platform.node()} (if it has ended, delete {files[0]}.lease)"
    assert str(caught.value) == find_holder(*files) == name
    assert time.monotonic() - start < locking.LEASE_S + 5


@pytest.mark.slow
def test_without_flock_a_dead_process_on_another_host_blocks_for_a_moment(files, no_flock):
    process = no_flock("ENOSYS", "elsewhere")
    process.kill()
    process.wait()
    start = time.monotonic()
    acquire(*files).release()
    assert 0.9 < time.monotonic() - start < 10


def test_a_lock_file_that_cannot_be_created_raises(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught:
        acquire(tmp_path / "file" / "lock", tmp_path / "holder.json")
    assert not isinstance(caught.value, BlockingIOError)
