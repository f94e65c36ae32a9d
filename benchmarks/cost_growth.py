"""Measure how step time and peak memory grow with n_layer, block_size, batch_size and vocab_size.

    python benchmarks/cost_growth.py [steps [device]]

For each of these settings, four models differ only in this setting; the others are those of BASE. The steps are those
of `nanogpt-accel bench` on random tokens, alternating between the four models. The table contains the medians, and the
exponents of power laws fitted to the four values. For comparison, it also contains the exponents of the FLOPs and of
the memory that `nanogpt-accel plan` computes. An exponent is below 1 if a part of the cost does not grow.
"""

import statistics
import sys

import numpy as np
from side_by_side import show

from nanogpt_accel.commands import bench
from nanogpt_accel.planning import sizing
from nanogpt_accel.recipe import load_recipe

BASE = {"n_layer": 2, "n_head": 4, "n_embd": 256, "block_size": 128, "batch_size": 4, "vocab_size": 1024}
FACTORS = (1, 2, 4, 8)
WARM_UP = 2


def make(device, sizes):
    keys = {key: value for key, value in sizes.items() if key != "vocab_size"}
    recipe = load_recipe(None, {**keys, "gradient_accumulation_steps": 1, "device": device, "compile": False})
    tokens = bench.RandomTokens(sizes["vocab_size"])
    return bench.Variant(recipe, bench.find_config(recipe, sizes["vocab_size"]), tokens, None, "", {})


def arithmetic(variant):
    """Return (FLOPs per step, peak bytes) of a variant, as `nanogpt-accel plan` computes them."""
    setup = variant.setup
    shape, batch, half = (
        setup.raw_model.config.to_dict(),
        setup.recipe.train.batch_size,
        setup.accelerator.mixed_precision,
    )
    options = {"batch": batch, "half": half != "no", "checkpointing": False, "device": variant.device.type}
    return setup.flops_per_token * setup.tokens_per_step, sum(sizing.memory(shape, "ddp", 1, 1, **options).values())


def exponent(values):
    return float(np.polyfit(np.log(FACTORS), np.log(values), 1)[0])


def main(steps=5, device="auto"):
    rows = []
    for key in ("n_layer", "block_size", "batch_size", "vocab_size"):
        variants = [make(device, {**BASE, key: BASE[key] * factor}) for factor in FACTORS]
        for variant in variants:
            for _ in range(WARM_UP):
                variant.step()
        seconds = [[] for _ in variants]
        for _ in range(steps):
            for i, variant in enumerate(variants):
                seconds[i].append(variant.step()["total"])
        seconds = [statistics.median(times) for times in seconds]
        memory = [variant.peak_memory() for variant in variants]
        flops, planned = zip(*map(arithmetic, variants), strict=True)
        rows.append(
            {
                "grows": f"{key} {', '.join(f'{BASE[key] * factor:,}' for factor in FACTORS)}",
                "ms per step": ", ".join(f"{1e3 * value:.1f}" for value in seconds),
                "exponent": f"{exponent(seconds):.2f}",
                "FLOPs exponent": f"{exponent(flops):.2f}",
                "peak MB": ", ".join(f"{value / 1e6:.0f}" for value in memory) if all(memory) else "-",
                "memory exponent": f"{exponent(memory):.2f}" if all(memory) else "-",
                "planned exponent": f"{exponent(planned):.2f}",
            }
        )
    show(f"Growth of cost from {BASE}; medians of {steps} steps", rows)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:3])
