"""Measure the time to compute the positions of a batch and to read it, from files larger than the CPU caches.

    python benchmarks/loader.py [folder]

The script writes 4 GB of random ids to the folder (by default a temporary one), first as one file and then as 20, and
reads 10,000 batches of 12 x 65 tokens from them: as one corpus, and as a mix of three sources in two stages,
alternately. Then it reads the first batch from a sparse file of 9 billion tokens. It prints the growth of resident
memory, the time per batch, and how much more processor time the mix takes than one corpus. For comparison, a step with
nanoGPT's CPU settings takes 24 ms on two cores; times are also printed as percentages of it. At the end, the script
removes the files.
"""

import statistics
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil

from nanogpt_accel.batches import Batches, Mixture
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
    """Read BATCHES batches as one corpus and as a mix, alternating every 100 batches, and print the times."""
    tokens, order = TokenFile(paths, "uint16"), {"block_size": 64, "batch_size": 12, "micro_batches": 1, "seed": 1337}
    shares = {"web": Fraction(7, 10), "code": Fraction(2, 10), "wiki": Fraction(1, 10)}
    stages = ((0, shares), (BATCHES // 2, {"code": Fraction(1, 3), "wiki": Fraction(2, 3)}))
    readers = {
        "one corpus": Batches(tokens, **order),
        "mix of 3": Mixture(dict.fromkeys(shares, tokens), stages, **order),
    }
    for batches in readers.values():
        for step in range(100):
            batches(step, 0)
    before, seconds, processor = resident(), {name: [] for name in readers}, {name: [] for name in readers}
    for first in range(100, 100 + BATCHES, 100):
        for name, batches in readers.items():
            turn = time.process_time()
            for step in range(first, first + 100):
                start = time.perf_counter()
                batches(step, 0)
                seconds[name].append(time.perf_counter() - start)
            processor[name].append((time.process_time() - turn) / 100)
    for name, times in seconds.items():
        mean, median = statistics.mean(times), statistics.median(times)
        print(
            f"{len(paths)} file{'s' * (len(paths) > 1)}, {name}: {mean * 1e3:.3f} ms per batch, median "
            f"{median * 1e3:.3f} ms ({median / STEP_SECONDS:.2%} of a step)",
            flush=True,
        )
    one, mix = processor.values()
    cost = statistics.median(b - a for a, b in zip(one, mix, strict=True))
    print(
        f"  the mix takes {cost * 1e3:.3f} ms of processor time more per batch ({cost / STEP_SECONDS:.2%} of a step, "
        f"median over turns); {resident() - before:+.1f} MB after {2 * BATCHES:,} batches",
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
