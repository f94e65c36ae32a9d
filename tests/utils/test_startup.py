"""startup.py: libraries are loaded early, and transformers is imported with one scan of its models."""

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers
from launching import run_python
from transformers.utils import import_utils

from nanogpt_accel.utils import startup


def test_transformers_models_has_the_same_names_with_one_scan(monkeypatch):
    """The truth is the module that transformers creates."""
    original, scan = import_module("transformers.models"), import_utils.define_import_structure
    monkeypatch.delitem(sys.modules, "transformers.models")
    monkeypatch.setattr(transformers, "models", original, raising=False)  # importing it again replaces this
    scans = scan.cache_info().misses
    startup.import_transformers()
    assert scan.cache_info().misses == scans  # only cached results
    created = sys.modules["transformers.models"]
    assert created is not original and sorted(dir(created)) == sorted(dir(original))
    assert created.LlamaConfig is original.LlamaConfig and import_utils.define_import_structure is scan
    folder = Path(transformers.__file__).parent / "models"
    found = startup.without_prefix(scan(folder, prefix="models"), "models.")
    assert found == scan(str(folder / "__init__.py"))


def test_import_transformers_works_with_versions_that_do_not_scan(monkeypatch):
    monkeypatch.delattr(import_utils, "define_import_structure")
    startup.import_transformers()


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux")
def test_preload_torch_loads_the_library_in_a_thread():
    """Without importing torch. If torch is missing, the error message comes from its import."""
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
