"""Run a Python program, and print its peak memory every second.

    python benchmarks/with_peak_memory.py SCRIPT [ARGUMENT ...]
    python benchmarks/with_peak_memory.py -m MODULE [ARGUMENT ...]

This is the memory that torch allocated on the GPU, or the resident memory of the process if it does not use CUDA.
"""

import os
import runpy
import sys
import threading
import time


def report():
    import torch

    from nanogpt_accel.planning.hardware import peak_memory

    while True:
        time.sleep(1)
        device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
        sys.stdout.write(f"\npeak memory: {peak_memory(device)}\n")  # one call, so as not to split other lines


if __name__ == "__main__":
    threading.Thread(target=report, daemon=True).start()
    sys.path[0] = os.getcwd()
    is_module = sys.argv[1] == "-m"
    sys.argv = sys.argv[2:] if is_module else sys.argv[1:]
    run = runpy.run_module if is_module else runpy.run_path
    run(sys.argv[0], run_name="__main__", **({"alter_sys": True} if is_module else {}))
