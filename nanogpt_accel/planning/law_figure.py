"""Show a fitted scaling law: a figure for the PNG and the page of `report --fit`, and tables of numbers."""

import math
import re

import numpy as np

from ..tracking.metrics_log import new_figure
from ..utils.text import short
from .scaling_law import expected_loss, iso_flops

LAW, BAND = "#ea580c", "#fdba74"  # colors
SYMBOLS = {
    "L(N, D)": "N: parameters of the matrices in the blocks and of the head. D: training tokens.",
    "L(C)": "C: training FLOPs.",
}
UNKNOWN = 1000  # if the ends of an interval differ by this factor or more, the tables show "unknown" instead
BUDGETS = (1, 4, 10, 100)  # multiples of the FLOPs of the largest run


def power(number):
    """Return a large number with an exponent: 1.2e19."""
    return f"{number:.2g}".replace("e+", "e")


def tables(law):
    """Return tables of the constants, the budgets and the runs as {title: rows of text}. The first row of a table has
    the column names."""
    size = "compute-optimal " if law.form == "L(N, D)" else ""
    titles = ("budget in FLOPs", f"{size}parameters", f"{size}tokens", "loss of a run (90% interval)")
    return {
        f"Constants, from {len(law.runs)} runs": [("constant", "value", "90% interval"), *_constants(law)],
        "Budgets (4x: 4 times the FLOPs of the largest run)": [titles, *_budgets(law)],
        "Runs": [("run", "parameters", "tokens", "FLOPs", "loss", "difference from the law"), *_runs(law)],
    }


def _constants(law):
    for name, value in law.constants.items():
        low, high = law.interval(name)
        note = "; at a bound: the runs do not determine it" if name in law.at_bound else ""
        yield name, f"{value:.4g}", f"{low:.4g} to {high:.4g}{note}"
    yield "noise of a run", f"{law.noise:.2%}", ""


def _budgets(law):
    largest = max(run.flops for run in law.runs)
    for factor in BUDGETS:
        flops = factor * largest
        size, intervals = law.size(flops), law.size_interval(flops)
        loss, low, high = law.predict(*size, flops)
        cells = [short(value) for value in size]
        if intervals:
            cells = [f"{cell} ({_range(*interval)})" for cell, interval in zip(cells, intervals, strict=True)]
        yield f"{power(flops)} ({factor}x)", *cells, f"{loss:.3f} ({low:.3f} to {high:.3f})"


def _range(low, high):
    return f"{short(low)} to {short(high)}" if high < UNKNOWN * low else "unknown"


def _runs(law):
    for run in sorted(law.runs, key=lambda run: run.flops):
        difference = run.loss / law.predict(run.n_params, run.tokens, run.flops)[0] - 1
        sizes = short(run.n_params), short(run.tokens), power(run.flops)
        yield run.name, *sizes, f"{run.loss:.4f}", f"{difference:+.2%}"


# ---- the figure


def draw(law):
    """Return a matplotlib figure with two plots.

    Left: loss against compute, with the extrapolation. Right: isoFLOP curves, if the runs are on at least two
    isoFLOP curves. Otherwise, the right plot shows loss against tokens for L(N, D), or the differences of the losses
    from the law for L(C).
    """
    figure, (left, right) = new_figure(columns=2, size=(13.5, 5.6))
    _draw_compute(law, left)
    curves = iso_flops(law.runs)
    if len(curves) > 1:  # a single curve may be a coincidence
        _draw_iso_flops(law, curves, right)
    elif law.form == "L(N, D)":
        _draw_tokens(law, right)
    else:
        _draw_differences(law, right)
    for axes in (left, right):
        axes.grid(alpha=0.25, which="major")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _shades(keys):
    """Return {key: color}, from light for the smallest to dark for the largest key."""
    from matplotlib import colormaps

    keys = sorted(set(keys))
    return {key: colormaps["viridis_r"](0.15 + 0.8 * i / max(1, len(keys) - 1)) for i, key in enumerate(keys)}


def _plot_runs(axes, x, y, color, **others):
    axes.plot(x, y, "o", color=color, markersize=7, markeredgecolor="white", zorder=3, **others)


def _scale_losses(axes, low, high):
    """Make the y axis a logarithmic loss axis with about six ticks, labeled with plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    margin = (high / low) ** 0.06
    axes.set_yscale("log")
    axes.set_ylim(low / margin, high * margin)
    low, high = axes.get_ylim()
    ticks = [tick for tick in MaxNLocator(8).tick_values(low, high) if low <= tick <= high]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.set_ylabel("validation loss (nats per token)")


def _scale_counts(axes, low, high):
    """Make the x axis logarithmic, with labels such as 300K, 1M, 3M."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(low, high)
    subs = (1.0, 2.0, 5.0) if high / low < 100 else (1.0, 3.0) if high / low < 3000 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def _draw_compute(law, axes):
    flops, losses = np.array([run.flops for run in law.runs]), [run.loss for run in law.runs]
    largest, is_optimal = flops.max(), law.form == "L(N, D)"
    budgets = np.geomspace(flops.min() / 1.3, 16 * largest, 200)
    loss, low, high = law.predict(*law.size(budgets), budgets)
    is_within = budgets <= largest
    axes.fill_between(budgets, low, high, color=BAND, alpha=0.45, linewidth=0, label="90% interval of a new run")
    axes.plot(budgets[is_within], loss[is_within], color=LAW, label="law, compute-optimal" if is_optimal else "law")
    axes.plot(budgets[~is_within], loss[~is_within], color=LAW, linestyle=(0, (4, 2)), label="extrapolation")
    colors = _shades(run.n_params for run in law.runs)
    for i, run in enumerate(law.runs):
        label = "finished runs; darker: more parameters" if i == len(law.runs) - 1 else None
        _plot_runs(axes, run.flops, run.loss, colors[run.n_params], label=label)
    for factor, is_above in ((4, True), (10, False)):
        at = factor * largest
        value, lowest, highest = (float(number) for number in law.predict(*law.size(at), at))
        bars = [[value - lowest], [highest - value]]
        axes.errorbar(at, value, bars, color=LAW, fmt="D", markersize=5, capsize=4, zorder=3)
        text = f"{factor}x compute: {value:.3f}\n{lowest:.3f} to {highest:.3f}"
        place = {"xytext": (4, 6), "va": "bottom"} if is_above else {"xytext": (12, -6), "va": "top", "ha": "right"}
        axes.annotate(text, (at, highest if is_above else lowest), textcoords="offset points", fontsize=9, **place)
    axes.axvline(largest, color="#9ca3af", linewidth=1, linestyle=":", label="largest run")
    axes.set_xscale("log")
    axes.set_xlim(budgets[0] / 1.3, budgets[-1] * (budgets[-1] / budgets[0]) ** 0.12)  # with space for the labels
    top = max(high.max(), *losses)
    _scale_losses(axes, low.min() / (top / low.min()) ** 0.12, top)
    axes.set_xlabel("compute C (FLOPs)")
    axes.set_title("Loss against compute", loc="left", fontweight="bold")
    axes.legend(loc="lower left", fontsize=9, frameon=False)
    rows = [(name, value, interval.partition(";")[0]) for name, value, interval in _constants(law)]
    text = "\n".join(f"{name} = {value}" + f" ({interval})" * bool(interval) for name, value, interval in rows)
    place = {"transform": axes.transAxes, "ha": "right", "va": "top", "bbox": {"color": "white", "pad": 2}}
    axes.text(0.98, 0.97, _mathtext(law.formula), fontsize=13, **place)
    axes.text(0.98, 0.88, text, fontsize=9, color="#4b5563", **place)


def _mathtext(text):
    return "$" + re.sub(r"\^([\d.]+)", r"^{\1}", text).replace(" / ", "/") + "$"


def _draw_iso_flops(law, curves, axes):
    sizes, losses = ([value for curve in curves for value in of(curve)] for of in (_sizes_of, _losses_of))
    colors = _shades(curve["flops"] for curve in curves)
    lowest = []
    for curve in curves:
        color, own = colors[curve["flops"]], _sizes_of(curve)
        near = np.geomspace(min(own) / 1.2, max(own) * 1.2, 100)
        axes.plot(near, np.polyval(curve["parabola"], np.log(near)), color=color)
        _plot_runs(axes, own, _losses_of(curve), color)
        last = max(curve["runs"], key=lambda run: run.n_params)
        place = {"xytext": (9, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{power(curve['flops'])} FLOPs", (last.n_params, last.loss), color=color, fontsize=9, **place)
        if curve["n_params"]:
            lowest.append((curve["n_params"], np.polyval(curve["parabola"], math.log(curve["n_params"]))))
    if lowest:
        axes.plot(*zip(*lowest, strict=True), "v", color=LAW, markersize=8, zorder=4, label="lowest point of a curve")
    if law.form == "L(N, D)":
        n_params, tokens = law.size(np.geomspace(curves[0]["flops"], curves[-1]["flops"], 50))
        loss = expected_loss(law.constants, {"n_params": n_params, "tokens": tokens})
        axes.plot(n_params, loss, color=LAW, linestyle="--", label="law, compute-optimal")
    _scale_counts(axes, min(sizes) / 1.4, max(sizes) * 3)
    _scale_losses(axes, min(losses), max(losses))
    axes.set_xlabel("parameters N")
    axes.set_title("IsoFLOP curves: equal compute, different sizes", loc="left", fontweight="bold")
    axes.legend(loc="lower left", fontsize=9, frameon=False)


def _sizes_of(curve):
    return [run.n_params for run in curve["runs"]]


def _losses_of(curve):
    return [run.loss for run in curve["runs"]]


def _draw_tokens(law, axes):
    tokens, losses = [run.tokens for run in law.runs], [run.loss for run in law.runs]
    grid = np.geomspace(min(tokens) / 1.3, max(tokens) * 1.3, 100)
    for n_params, color in _shades(run.n_params for run in law.runs).items():
        axes.plot(grid, expected_loss(law.constants, {"n_params": n_params, "tokens": grid}), color=color)
        points = [(run.tokens, run.loss) for run in law.runs if run.n_params == n_params]
        _plot_runs(axes, *zip(*points, strict=True), color, label=f"{short(n_params)} parameters")
    _scale_counts(axes, grid[0], grid[-1])
    _scale_losses(axes, min(losses), max(losses))
    axes.set_xlabel("training tokens D")
    axes.set_title("Loss against tokens: the runs, and the law for each size", loc="left", fontweight="bold")
    axes.legend(loc="upper right", fontsize=9, frameon=False)


def _draw_differences(law, axes):
    """Draw the differences of the losses from the law in percent, against the number of parameters. In a plot of the
    losses, the interval would be too narrow to see."""
    flops = [run.flops for run in law.runs]
    budgets = np.geomspace(min(flops) / 1.3, 16 * max(flops), 200)
    n_params, tokens = law.size(budgets)
    loss, low, high = law.predict(n_params, tokens, budgets)
    axes.fill_between(n_params, 100 * (low / loss - 1), 100 * (high / loss - 1), color=BAND, alpha=0.45, linewidth=0)
    axes.axhline(0, color=LAW, zorder=1)
    colors = _shades(run.n_params for run in law.runs)
    for run in law.runs:
        fitted, _, _ = law.predict(run.n_params, run.tokens, run.flops)
        _plot_runs(axes, run.n_params, 100 * (run.loss / fitted - 1), colors[run.n_params])
    axes.axvline(max(run.n_params for run in law.runs), color="#9ca3af", linewidth=1, linestyle=":")
    _scale_counts(axes, n_params[0], n_params[-1])
    axes.set_xlabel("parameters N (tokens and compute grow with N)")
    axes.set_ylabel("difference from the law (%)")
    axes.set_title("Difference from the law, and its 90% interval", loc="left", fontweight="bold")
