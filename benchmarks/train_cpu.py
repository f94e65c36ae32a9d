"""Compare training speed on a CPU with nanoGPT, for the models of nanoGPT's CPU setting and of its GPU setting.

    python benchmarks/train_cpu.py NANOGPT TEXT [rounds [steps per block]]

NANOGPT is a checkout of nanoGPT, TEXT is tinyshakespeare's input.txt. Every program is a process. Only one of them runs
at a time: the script lets each program make a block of steps, stops it with SIGSTOP, and continues the next one. So the
compared steps are seconds apart, and the load of other programs affects all of them. The script prints the medians of
the blocks, and the medians of the ratios per round. The larger model has fewer rounds and shorter blocks.

nanoGPT runs without torch.compile, as in its README; the small model runs a second time with torch.compile. On CPUs
with AMX or AVX512-BF16, nanogpt_accel uses bfloat16 by default, while nanoGPT uses float32, so nanogpt_accel also
runs in float32.

Two more programs only compute the matrix products of the linear layers of a step, forward and backward, in float32 and
in bfloat16. No training step in the same precision can be faster than these products. The last column is the share of
this limit that a program reaches.
"""

import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from side_by_side import CPU_COMMAND, copy_nanogpt, environment, ours, show, theirs, write_characters

# batch size, block size, layers, heads, width
MODELS = {
    "4 layers of 128, block 64, batch 12": (12, 64, 4, 4, 128),
    "6 layers of 384, block 256, batch 16": (16, 256, 6, 6, 384),
}
VOCAB_SIZE = 66
FOREVER = 10**6  # steps
SKIPPED = 2  # log lines to skip after SIGCONT: an unread line, and the line of the step that SIGSTOP interrupted


class Program:
    """A process that prints a line `iter N: ...` per step, and is stopped between blocks of steps."""

    def __init__(self, command, folder):
        self.command = command
        self.process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True)
        self.wait_for_steps(SKIPPED)
        self.process.send_signal(signal.SIGSTOP)

    def wait_for_steps(self, count):
        for line in self.process.stdout:
            count -= line.startswith("iter ")
            if not count:
                return
        raise RuntimeError(f"{' '.join(self.command)}: exit status {self.process.wait()}")

    def block(self, steps):
        """Run some steps and return the seconds per step."""
        self.process.send_signal(signal.SIGCONT)
        self.wait_for_steps(SKIPPED)
        start = time.perf_counter()
        self.wait_for_steps(steps)
        seconds = time.perf_counter() - start
        self.process.send_signal(signal.SIGSTOP)
        return seconds / steps

    def kill(self):
        self.process.kill()
        self.process.wait()


def products(dtype, batch_size, block_size, n_layer, n_head, n_embd):
    """Compute the products of the linear layers of a step again and again, and print a line for each step."""
    import torch

    rows, dtype = batch_size * block_size, getattr(torch, dtype)
    shapes = [(n_embd, 3 * n_embd), (n_embd, n_embd), (n_embd, 4 * n_embd), (4 * n_embd, n_embd)] * n_layer
    layers = [
        [torch.randn(size, dtype=dtype) for size in ((rows, k), (n, k), (rows, n))]
        for k, n in [*shapes, (n_embd, VOCAB_SIZE)]
    ]
    for step in range(FOREVER):
        for x, weight, grad in layers:
            x @ weight.t(), grad @ weight, grad.t() @ x
        print(f"iter {step}: loss 0", flush=True)


def flops(batch_size, block_size, n_layer, n_head, n_embd):
    """Return the FLOPs of the products of a step."""
    return 6 * batch_size * block_size * (12 * n_layer * n_embd**2 + n_embd * VOCAB_SIZE)


def programs(copy, text, sizes, has_compile):
    """Return {name: (command, folder)}."""
    keys = ("batch_size", "block_size", "n_layer", "n_head", "n_embd")
    shape = [f"--{key}={size}" for key, size in zip(keys, sizes, strict=True)]
    shape += [f"--eval_interval={FOREVER}", f"--max_iters={FOREVER}", "--eval_iters=1"]
    nanogpt = theirs(*CPU_COMMAND, *shape)
    found = {"nanoGPT": (nanogpt, copy)}
    if has_compile:
        found["nanoGPT --compile=True"] = [*nanogpt, "--compile=True"], copy
    for name in ("ours", "ours mixed_precision=no"):
        own = (f"corpus={text}", f"out_dir={'-'.join(name.split())}", "overwrite=true", *shape, *name.split()[1:])
        found[name] = ours("shakespeare_char_cpu.yaml", *own), copy
    for dtype in ("float32", "bfloat16"):
        found[f"products in {dtype}"] = [sys.executable, __file__, "products", dtype, *map(str, sizes)], copy
    return found


def main(nanogpt, text, rounds=10, steps=10):
    text, rows = Path(text).resolve(), []
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_nanogpt(nanogpt, folder)
        write_characters(copy, text)
        for name, sizes in MODELS.items():
            is_small = name == next(iter(MODELS))
            running, n_rounds, n_steps = {}, rounds, steps
            if not is_small:
                n_rounds, n_steps = math.ceil(rounds / 3), math.ceil(steps / 5)
            try:
                for program, (command, place) in programs(copy, text, sizes, is_small).items():
                    running[program] = Program(command, place)
                blocks = {program: [] for program in running}
                for _ in range(n_rounds):
                    for program, process in running.items():
                        blocks[program].append(process.block(n_steps))
            finally:
                for process in running.values():
                    process.kill()
            rows += rows_of(name, sizes, blocks)
    show(f"Training on the CPU, {rounds} rounds of blocks of {steps} steps", rows)


def rows_of(name, sizes, blocks):
    """Return the rows of the table for a model. blocks: {program: seconds per step of each block}."""
    rows = []
    for program, seconds in blocks.items():
        limit = blocks["products in bfloat16" if program == "ours" and uses_bf16() else "products in float32"]
        if program.startswith("products"):
            limit = seconds
        rows.append(
            {
                "model": name,
                "program": program,
                "ms per step": 1e3 * statistics.median(seconds),
                "tokens/s": sizes[0] * sizes[1] / statistics.median(seconds),
                "speed relative to nanoGPT": ratio(blocks["nanoGPT"], seconds),
                "GFLOP/s of the products": flops(*sizes) / statistics.median(seconds) / 1e9,
                "share of the limit": ratio(limit, seconds),
            }
        )
    return rows


def ratio(a, b):
    """Return the median of the ratios per round."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def uses_bf16():
    """Return whether nanogpt_accel uses bfloat16 by default."""
    from nanogpt_accel.distributed.accelerator import pick_precision

    return pick_precision("auto", "cpu") == "bf16"


if __name__ == "__main__":
    if sys.argv[1] == "products":
        products(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        main(*sys.argv[1:3], *map(int, sys.argv[3:]))
