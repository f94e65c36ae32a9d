"""locking.py: a lock names its holder and ends with its process; file systems without locks are supported."""

import errno
import json
import os
import platform
import subprocess
import sys

import pytest

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


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_supported(files, monkeypatch, number):
    import fcntl

    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    acquire(*files).release()


def test_a_lock_file_that_cannot_be_created_raises(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught:
        acquire(tmp_path / "file" / "lock", tmp_path / "holder.json")
    assert not isinstance(caught.value, BlockingIOError)
