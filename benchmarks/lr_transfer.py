"""Find the best learning rate at several widths, with the standard parametrization and with mup_base_width (muP).

    python benchmarks/lr_transfer.py RESULTS [optimizers=adamw,muon] [widths=64,128,256] [seeds=3] [key=value ...]
    python benchmarks/lr_transfer.py RESULTS PLOT.png

The first form trains each width with each learning rate of a factor-two grid, with one thread. Each run appends a line
of JSON to the file RESULTS; runs that the file has already are skipped. The second form prints a table of RESULTS and
writes a plot. The corpus is Python's standard library. Losses are over the same batches of the validation split.

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
# learning rate of the grid -> settings. With Muon, both of its learning rates change together
OPTIMIZERS = {
    "adamw": lambda rate: {"algorithm": "adamw", "learning_rate": rate},
    "muon": lambda rate: {"algorithm": "muon", "muon_learning_rate": rate, "learning_rate": rate / 3},
}
STEPS = {"adamw": 150, "muon": 100}
GRIDS = {"adamw": range(-9, -3), "muon": range(-6, -1)}  # powers of two


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


def measure(results, optimizers="adamw,muon", widths="64,128,256", seeds=3, **options):
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


def curve(lines, optimizer, is_mup, width):
    """Return {rate: mean loss over the seeds}. At the smallest width, both parametrizations have the same runs."""
    is_mup = is_mup and width != min(line["width"] for line in lines)
    found = {}
    for line in lines:
        if (line["optimizer"], line["mup"], line["width"]) == (optimizer, is_mup, width):
            found.setdefault(line["rate"], []).append(line["val_loss"])
    return {rate: statistics.mean(losses) for rate, losses in sorted(found.items())}


def best_rate(losses):
    """Return (best power of two, minimum of the parabola through the best one and its neighbours)."""
    best = min(losses, key=losses.get)
    if {best - 1, best + 1} <= losses.keys():
        left, middle, right = (losses[best + i] for i in (-1, 0, 1))
        return best, best + 0.5 * (left - right) / (left - 2 * middle + right)
    return best, math.nan


def report(results, image):
    lines = read(results)
    optimizers = list(dict.fromkeys(line["optimizer"] for line in lines))
    widths = sorted({line["width"] for line in lines})
    figure, _ = new_figure()
    figure.clear()
    figure.set_size_inches(10, 4 * len(optimizers))
    panels, rows = figure.subplots(len(optimizers), 2, sharey="row", squeeze=False), []
    for optimizer, panel_row in zip(optimizers, panels, strict=True):
        for is_mup, panel in zip((False, True), panel_row, strict=True):
            curves = {width: curve(lines, optimizer, is_mup, width) for width in widths}
            base, base_minimum = best_rate(curves[widths[0]])
            for width, losses in curves.items():
                best, minimum = best_rate(losses)
                rows.append(
                    {
                        "optimizer": optimizer,
                        "parametrization": "muP" if is_mup else "standard",
                        "n_embd": width,
                        "best rate": f"2^{best}",
                        "drift in steps": best - base,
                        "of the minimum": f"{minimum - base_minimum:.2f}",
                        "val loss": losses[best],
                        "with the best rate of the first width": losses[base],
                    }
                )
                rates = 2.0 ** np.array(list(losses))
                (drawn,) = panel.plot(rates, list(losses.values()), marker="o", label=f"n_embd {width}")
                panel.plot(2.0**best, losses[best], marker="*", markersize=15, color=drawn.get_color())
            panel.set_xscale("log", base=2)
            panel.set_title(f"{optimizer}, {'muP' if is_mup else 'standard'}")
            panel.set_xlabel("muon_learning_rate" if optimizer == "muon" else "learning_rate")
            panel.grid(alpha=0.3)
            lowest = min(min(losses.values()) for losses in curves.values())
            panel.set_ylim(lowest - 0.05, lowest + 1.2)
        panel_row[0].set_ylabel("validation loss (nats per token)")
        panel_row[0].legend()
    save_figure(figure, image)
    show(f"mean of {len({line['seed'] for line in lines})} seeds", rows)


if __name__ == "__main__":
    words = sys.argv[1:]
    if len(words) == 2 and "=" not in words[1]:
        report(*words)
    else:
        torch.set_num_threads(1)
        measure(words[0], **dict(word.split("=", 1) for word in words[1:]))
