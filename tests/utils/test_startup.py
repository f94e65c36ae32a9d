"""startup.py: torch's library is loaded early."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from launching import run_python

from nanogpt_accel.utils import startup


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux")
def test_preload_torch_loads_the_library_in_a_thread():
    """The library is loaded without importing torch. If torch is missing, the later import reports this."""
    lib = Path(find_spec("torch").origin).parent / "lib"
    if (lib / "libtorch_cuda.so").exists():
        pytest.skip("a CUDA build of torch")
    script = """
import sys, threading
from nanogpt_accel.utils import startup
startup.preload_torch()
for thread in set(threading.enumerate()) - {threading.main_thread()}:
    thread.join()
print("libtorch_cpu.so" in open("/proc/self/maps").read(), "torch" in sys.modules)
import torch
print(torch.ones(2) @ torch.ones(2))
"""
    assert run_python("-c", script).stdout.split() == ["True", "False", "tensor(2.)"]


def test_preload_torch_without_torch_or_threads(monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(startup.threading.Thread, "start", start)
    startup.preload_torch()
    monkeypatch.setattr(startup, "find_spec", lambda name: None)
    startup.preload_torch()
    assert os.environ["GOMP_SPINCOUNT"]
