"""Start commands faster. Nearly all of the time until the first training step is spent on imports.

`python benchmarks/start.py` compares this time with nanoGPT's.
"""

import atexit
import ctypes
import gc
import os
import sys
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

_GC_THRESHOLD = gc.get_threshold()  # Python's default
_RARELY = 1_000_000  # new objects between garbage collections during imports; torch and transformers create 600,000


def limit_openmp_spinning():
    """Let waiting OpenMP threads spin less, unless OMP_WAIT_POLICY or GOMP_SPINCOUNT is set. Call it before importing
    torch.

    With the default, steps of 76 ms took 170 to 2,800 ms if another program used the same core. A limit of 1,000 spins
    avoids this and costs nothing on an idle machine.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def pause_gc():
    """Avoid garbage collection during the imports of torch and transformers, and when Python exits.

    By default, Python collects after every 700 new objects, which takes 0.6 s during the imports, and 0.9 s at exit.
    """
    gc.set_threshold(_RARELY)
    atexit.register(gc.freeze)


def resume_gc():
    """Collect garbage as usual again, if `pause_gc` was called."""
    if gc.get_threshold()[0] == _RARELY:
        gc.freeze()
        gc.unfreeze()  # moves all objects to the oldest generation; otherwise, the next collection takes 0.2 s
        gc.set_threshold(*_GC_THRESHOLD)


def preload_torch():
    """Start to load torch's largest library in a thread, which saves 0.15 s if a second core is free.

    `import torch` holds the GIL while it loads this library. A call through ctypes releases the GIL, so the main thread
    can read the recipe and open the data meanwhile. If the call fails, `import torch` reports the reason later. A CUDA
    build of torch is not loaded early, because it must load other libraries first.
    """
    limit_openmp_spinning()
    spec = find_spec("torch") if sys.platform == "linux" else None
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent / "lib"
    library = folder / "libtorch_cpu.so"
    if library.exists() and not (folder / "libtorch_cuda.so").exists():
        with suppress(RuntimeError):  # the system's limit on threads is reached
            threading.Thread(target=ctypes.CDLL(None).dlopen, args=(os.fsencode(library), os.RTLD_NOW)).start()
