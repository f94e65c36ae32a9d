"""Measure the time to compute the positions of a batch and to read it, from files larger than the CPU caches.

    python benchmarks/loader.py [folder]

The script writes 4 GB of random ids to the folder (by default a temporary one), first as one file and then as 20, and
reads 10,000 batches of 12 x 65 tokens from them. Then it reads the first batch from a sparse file of 9 billion tokens.
It prints the growth of resident memory and the time per batch, also as a percentage of the 24 ms that a step of
nanoGPT's CPU setting takes on two cores. At the end, it removes the files.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from nanogpt_accel.batches import Batches
from nanogpt_accel.data.token_files import TokenFile

TOKENS = 2**31
STEP_SECONDS = 0.024
BATCHES = 10_000


def write(folder, files):
    """Write TOKENS random ids to files of about the same size."""
    ids = np.random.default_rng(0).integers(0, 50257, TOKENS // 32, dtype=np.uint16)
    paths = [folder / f"{files}-{i:05d}.bin" for i in range(files)]
    for path in paths:
        with open(path, "wb") as file:
            for _ in range(32):
                file.write(ids[: len(ids) // files])
    return paths


def resident():
    return psutil.Process().memory_info().rss / 1e6


def measure(paths):
    batches = Batches(TokenFile(paths, "uint16"), block_size=64, batch_size=12, micro_batches=1, seed=1337)
    for step in range(100):
        batches(step, 0)
    before, seconds = resident(), []
    for step in range(100, 100 + BATCHES):
        start = time.perf_counter()
        batches(step, 0)
        seconds.append(time.perf_counter() - start)
    mean, median = statistics.mean(seconds), statistics.median(seconds)
    print(
        f"{len(paths)} file{'s' * (len(paths) > 1)}: {mean * 1e3:.3f} ms per batch, median {median * 1e3:.3f} ms "
        f"({median / STEP_SECONDS:.2%} of a step); {resident() - before:+.1f} MB after {BATCHES:,} batches",
        flush=True,
    )


def first_batch(path):
    with open(path, "wb") as file:
        file.truncate(2 * 9_000_000_000)
    start = time.perf_counter()
    Batches(TokenFile(path, "uint16"), block_size=1024, batch_size=12, micro_batches=40, seed=1337)(0, 0)
    print(f"9 billion tokens: {(time.perf_counter() - start) * 1e3:.1f} ms for the first batch")


def main(folder=None):
    with tempfile.TemporaryDirectory(dir=folder) as work:
        for files in (1, 20):
            paths = write(Path(work), files)
            measure(paths)
            for path in paths:
                path.unlink()
        first_batch(Path(work) / "sparse.bin")


if __name__ == "__main__":
    main(*sys.argv[1:])
