"""Measure how much faster an optimizer step with Muon is on 2 CPU processes if they share the orthogonalization.

    python benchmarks/muon_step.py [n_embd=768] [n_layer=2] [rounds=5]

The script alternates between steps with shared work and steps in which every process orthogonalizes all matrices. Each
process has one thread. The model has the shape of recipes/gpt2_fast.yaml, with fewer layers and a vocabulary of 8,192.
The times include AdamW's update of the other parameters. The ratio is the median of the ratios per round.
"""

import os
import statistics
import subprocess
import sys
import time

import torch
from accelerate import Accelerator
from side_by_side import RECIPES, show

from nanogpt_accel.distributed.muon_exchange import share_muon
from nanogpt_accel.model import GPT, GPTConfig
from nanogpt_accel.muon import orthogonalize_here
from nanogpt_accel.optim import make_optimizer
from nanogpt_accel.recipe import load_recipe


def main(n_embd=768, n_layer=2, rounds=5):
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    recipe = load_recipe(RECIPES / "gpt2_fast.yaml", {"n_embd": n_embd, "n_layer": n_layer, "block_size": 64})
    model = GPT(GPTConfig(vocab_size=8192, **recipe.shape))
    optimizer = make_optimizer(model, recipe.optimizer)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    share_muon(accelerator, model, optimizer)
    ways = {"every process all matrices": orthogonalize_here, "shared": optimizer.orthogonalize_buckets}
    seconds = {way: [] for way in ways}
    for _ in range(rounds + 1):  # the first round is a warm-up
        for way, function in ways.items():
            optimizer.orthogonalize_buckets = function
            accelerator.wait_for_everyone()
            start = time.perf_counter()
            optimizer.step()
            accelerator.wait_for_everyone()
            seconds[way].append(time.perf_counter() - start)
    if accelerator.is_main_process:
        before, after = (times[1:] for times in seconds.values())
        rows = [{"way": way, "ms per step": 1000 * statistics.median(times[1:])} for way, times in seconds.items()]
        show(f"Optimizer step of n_layer={n_layer} n_embd={n_embd} on 2 processes", rows)
        print(f"\nratio {statistics.median(b / a for a, b in zip(before, after, strict=True)):.2f}")


if __name__ == "__main__":
    if "RANK" in os.environ:
        main(**{key: int(value) for key, value in (word.split("=") for word in sys.argv[1:])})
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", __file__, *sys.argv[1:]]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        sys.exit(subprocess.run(command, env=environment).returncode)
