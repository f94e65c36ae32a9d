"""Find the best learning rate at several widths, with the standard parametrization and with mup_base_width (muP).

    python benchmarks/lr_transfer.py RESULTS [optimizers=adamw,muon] [widths=64,256] [seeds=2] [key=value ...]
    python benchmarks/lr_transfer.py RESULTS PLOT.png

The first form trains each width with each learning rate of a grid of powers of two, with one thread. Each run appends a
line of JSON to the file RESULTS; runs that are already in the file are skipped. The second form prints a table of
RESULTS and writes a plot. The corpus is Python's standard library. All losses are over the same batches of the
validation split.

The model is that of quickstart.yaml, with n_inner = 4 * n_embd. The first width is the mup_base_width, at which both
parametrizations are the same. Other options, such as max_iters=300, are settings of the recipe.
"""

import contextlib
import importlib
import io
import json
import math
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from side_by_side import show

from nanogpt_accel.tracking.metrics_log import new_figure, save_figure

train = importlib.import_module("nanogpt_accel.train").train  # the package has a function of this name

HEAD_DIM = 32
SETTINGS = {
    "vocab_size": 512,
    "block_size": 64,
    "n_inner": None,
    "batch_size": 16,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "eval_first": False,
    "eval_iters": 40,
    "sample_tokens": 0,
    "quiet": True,
    "overwrite": True,
}
# learning rate of the grid -> settings. A run with Muon has two learning rates, which change together
OPTIMIZERS = {
    "adamw": lambda rate: {"algorithm": "adamw", "learning_rate": rate},
    "muon": lambda rate: {"algorithm": "muon", "muon_learning_rate": rate, "learning_rate": rate / 3},
}
STEPS = {"adamw": 150, "muon": 100}
GRIDS = {"adamw": range(-9, -3), "muon": range(-6, -1)}  # exponents of two


def run(optimizer, width, base, rate, seed, options, folder):
    """Train once and return the validation loss."""
    settings = SETTINGS | OPTIMIZERS[optimizer](2.0**rate) | options
    steps = int(settings.setdefault("max_iters", STEPS[optimizer]))
    settings |= {"eval_interval": steps, "log_interval": steps}
    settings |= {"n_embd": width, "n_head": width // HEAD_DIM, "mup_base_width": base, "seed": seed}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            history = train("quickstart", **settings, data_dir=f"{folder}/data", out_dir=f"{folder}/run")[1]
    except FloatingPointError:
        return math.inf
    return history.evaluations[-1]["val_loss"]


def measure(results, optimizers="adamw,muon", widths="64,256", seeds=2, **options):
    """Train the runs that are missing in the file `results`."""
    widths, is_done = [int(width) for width in widths.split(",")], {key_of(line) for line in read(results)}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1337, 1337 + int(seeds)):
            for optimizer in optimizers.split(","):
                for rate in GRIDS[optimizer]:
                    for width, is_mup in [(width, is_mup) for width in widths for is_mup in (False, True)]:
                        line = {"optimizer": optimizer, "mup": is_mup, "width": width, "rate": rate, "seed": seed}
                        if key_of(line) in is_done or (is_mup and width == widths[0]):
                            continue
                        base = widths[0] if is_mup else None
                        line["val_loss"] = run(optimizer, width, base, rate, seed, options, folder)
                        with open(results, "a") as file:
                            print(json.dumps(line), file=file)


def read(results):
    return [json.loads(line) for line in Path(results).read_text().splitlines()] if Path(results).exists() else []


def key_of(line):
    return tuple(line[key] for key in ("optimizer", "mup", "width", "rate", "seed"))


def curves_of(lines, is_mup):
    """Return {width: {rate: mean loss}}. At the first width, both parametrizations have the same runs."""
    widths, found = sorted({line["width"] for line in lines}), {}
    for width in widths:
        of_width = [line for line in lines if line["width"] == width and line["mup"] == (is_mup and width != widths[0])]
        rates = sorted({line["rate"] for line in of_width})
        found[width] = {
            rate: statistics.mean(line["val_loss"] for line in of_width if line["rate"] == rate) for rate in rates
        }
    return found


def report(results, image):
    by_optimizer, rows = {}, []
    for line in read(results):
        by_optimizer.setdefault(line["optimizer"], []).append(line)
    figure, axes = new_figure()
    axes.remove()
    figure.set_size_inches(10, 4 * len(by_optimizer))
    panels = figure.subplots(len(by_optimizer), 2, sharey="row", squeeze=False)
    for (optimizer, lines), panel_row in zip(by_optimizer.items(), panels, strict=True):
        counts = Counter(line["seed"] for line in lines)
        seeds = [seed for seed, n in counts.items() if n == max(counts.values())]  # without seeds that lack some runs
        lines = [line for line in lines if line["seed"] in seeds]
        for is_mup, panel in zip((False, True), panel_row, strict=True):
            name, curves = "muP" if is_mup else "standard", curves_of(lines, is_mup)
            best_rates = {width: min(losses, key=losses.get) for width, losses in curves.items()}
            base = next(iter(best_rates.values()))
            for width, losses in curves.items():
                best = best_rates[width]
                rows.append(
                    {
                        "optimizer": optimizer,
                        "seeds": len(seeds),
                        "parametrization": name,
                        "n_embd": width,
                        "best rate": f"2^{best}",
                        "drift, steps of the grid": best - base,
                        "val loss": losses[best],
                        "with the best rate of the first width": losses[base],
                    }
                )
                label, rates = f"n_embd {width}", 2.0 ** np.array(list(losses))
                (drawn,) = panel.plot(rates, list(losses.values()), marker="o", label=label)
                panel.plot(2.0**best, losses[best], marker="*", markersize=15, color=drawn.get_color())
            panel.set_xscale("log", base=2)
            panel.set_title(f"{optimizer}, {name} (stars: best learning rate of the grid)", fontsize="medium")
            panel.set_xlabel("muon_learning_rate" if optimizer == "muon" else "learning_rate")
            panel.grid(alpha=0.3)
        lowest = min(line["val_loss"] for line in lines)
        panel_row[0].set_ylim(lowest - 0.05, lowest + 1)
        panel_row[0].set_ylabel("validation loss (nats per token)")
        panel_row[0].legend()
    save_figure(figure, image)
    show("losses are means over the seeds", rows)


if __name__ == "__main__":
    words = sys.argv[1:]
    if len(words) == 2 and "=" not in words[1]:
        report(*words)
    else:
        torch.set_num_threads(1)
        measure(words[0], **dict(word.split("=", 1) for word in words[1:]))
