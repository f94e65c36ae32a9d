"""Make file permissions apply to tests that run as root."""

import ctypes
import os
import sys
from contextlib import contextmanager

import pytest

_VERSION = 0x20080522  # of the structures of capset in linux/capability.h
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1 << 1, 1 << 2  # root's right to ignore the modes of files


@contextmanager
def modes_apply():
    """Within the block, file modes also apply to root, in this thread and in the threads that it starts."""
    if os.name != "posix":
        pytest.skip("needs POSIX modes")
    if os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("root can read all files")
    libc = ctypes.CDLL(None, use_errno=True)
    header, capabilities = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, capabilities) == 0
    effective = capabilities[0]
    capabilities[0] = effective & ~(_DAC_OVERRIDE | _DAC_READ_SEARCH)
    assert libc.capset(header, capabilities) == 0
    try:
        yield
    finally:
        capabilities[0] = effective
        assert libc.capset(header, capabilities) == 0
