"""Show a fitted scaling law: a figure for the PNG and the page of `report --fit`, and tables of numbers."""

import math

import numpy as np

from ..tracking.metrics_log import new_figure
from .scaling_law import FORMS, expected_loss, iso_flops

LAW, BAND, OPTIMUM = "#ea580c", "#fdba74", "#16a34a"
BUDGETS = (1, 4, 10, 100)  # times the largest compute of the runs


def short(number):
    """Return a number with a suffix: 12.3M for 12,345,678."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def power(number):
    """Return a large number with an exponent: 1.2e19."""
    return f"{number:.2g}".replace("e+", "e")


def formula(law):
    """Return the law with its constants as text: L = 1.82 + 482 / N^0.348 + 2.09e+03 / D^0.366."""
    letters = {"n_params": "N", "tokens": "D", "flops": "C"}
    terms = [f"{law.constants[A]:.4g} / {letters[x]}^{law.constants[a]:.3g}" for A, a, x in FORMS[law.form]]
    return " + ".join([f"L = {law.constants['E']:.4g}", *terms])


def constants_table(law):
    """Return the rows (name, value, interval, note) of the constants, as text."""
    rows = []
    for name, value in law.constants.items():
        low, high = law.interval(name)
        note = "at its bound: the runs do not determine it" if name in law.at_bound else ""
        rows.append((name, f"{value:.4g}", f"{low:.4g} to {high:.4g}", note))
    return rows


def budgets_table(law):
    """Return the rows (budget, parameters, tokens, loss) for some budgets, as text. Intervals are in parentheses."""
    rows, largest = [], max(run.flops for run in law.runs)
    for factor in BUDGETS:
        flops = factor * largest
        (n_params, tokens), intervals = law.size(flops), law.size_interval(flops)
        loss, low, high = law.predict(n_params, tokens, flops)
        cells = [short(n_params), short(tokens)]
        if intervals:
            pairs = zip(cells, intervals, strict=True)
            cells = [f"{cell} ({short(low_end)} to {short(high_end)})" for cell, (low_end, high_end) in pairs]
        rows.append((f"{power(flops)} ({factor}x)", *cells, f"{loss:.3f} ({low:.3f} to {high:.3f})"))
    return rows


def runs_table(law):
    """Return the rows (run, parameters, tokens, FLOPs, loss, difference from the law) of the runs, as text."""
    rows = []
    for run in sorted(law.runs, key=lambda run: run.flops):
        difference = run.loss / law.predict(*run[1:4])[0] - 1
        rows.append(
            (
                run.name,
                short(run.n_params),
                short(run.tokens),
                power(run.flops),
                f"{run.loss:.4f}",
                f"{difference:+.2%}",
            )
        )
    return rows


# ---- the figure


def draw(law):
    """Return a matplotlib figure: loss against compute with the extrapolation, and isoFLOP curves or loss by size."""
    figure, _ = new_figure()
    figure.clear()
    figure.set_size_inches(14, 6)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _draw_compute(law, left)
    curves = iso_flops(law.runs)
    if curves:
        _draw_iso_flops(law, curves, right)
    elif law.form == "L(N, D)":
        _draw_tokens(law, right)
    else:
        _draw_sizes(law, right)
    for axes in (left, right):
        axes.grid(alpha=0.25, which="major")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _colors(law):
    """Return {number of parameters: color}, from light for the smallest to dark for the largest model."""
    from matplotlib import colormaps

    sizes = sorted({run.n_params for run in law.runs})
    return {n: colormaps["viridis_r"](0.15 + 0.8 * i / max(1, len(sizes) - 1)) for i, n in enumerate(sizes)}


def _scale_losses(axes, low, high):
    """Set a logarithmic loss axis with about six plain numbers as ticks."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    margin = (high / low) ** 0.06
    axes.set_yscale("log")
    axes.set_ylim(low / margin, high * margin)
    ticks = [tick for tick in MaxNLocator(7).tick_values(low, high) if low / margin <= tick <= high * margin]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.set_ylabel("validation loss (nats per token)")


def _scale_counts(axes, which="x"):
    """Set a logarithmic axis whose ticks are written as 300K, 1M, 3M."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    subs = (1.0, 2.0, 5.0) if high / low < 100 else (1.0, 3.0) if high / low < 3000 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def _draw_compute(law, axes):
    flops = np.array([run.flops for run in law.runs])
    smallest, largest = flops.min(), flops.max()
    budgets = np.geomspace(smallest / 1.3, 13 * largest, 200)
    loss, low, high = law.predict(*law.size(budgets), budgets)
    axes.fill_between(budgets, low, high, color=BAND, alpha=0.45, linewidth=0, label="90% interval of a new run")
    within = budgets <= largest
    name = "compute-optimal" if law.form == "L(N, D)" else "law"
    axes.plot(budgets[within], loss[within], color=LAW, linewidth=2, label=f"{name}: {formula(law)}")
    axes.plot(budgets[~within], loss[~within], color=LAW, linewidth=2, linestyle=(0, (4, 2)), label="extrapolation")
    colors = _colors(law)
    for i, run in enumerate(law.runs):
        label = "finished runs" if i == len(law.runs) - 1 else None
        color = colors[run.n_params]
        axes.plot(run.flops, run.loss, "o", color=color, markersize=7, markeredgecolor="white", zorder=3, label=label)
    for factor in (4, 10):
        at = factor * largest
        value, lowest, highest = (float(number) for number in law.predict(*law.size(at), at))
        axes.errorbar(
            at, value, [[value - lowest], [highest - value]], color=LAW, fmt="D", markersize=5, capsize=4, zorder=3
        )
        axes.annotate(
            f"{factor}x compute\n{value:.3f}\n[{lowest:.3f}, {highest:.3f}]",
            (at, highest),
            xytext=(0, 10),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9,
        )
    axes.set_xscale("log")
    axes.axvline(largest, color="#9ca3af", linewidth=1, linestyle=":")
    _scale_losses(axes, low.min(), max(high.max(), max(run.loss for run in law.runs)))
    axes.set_xlabel("compute C (FLOPs)")
    axes.set_title("Loss against compute", loc="left", fontweight="bold")
    axes.legend(loc="lower left", fontsize=9, frameon=False)


def _draw_iso_flops(law, curves, axes):
    from matplotlib import colormaps

    sizes = [run.n_params for curve in curves for run in curve["runs"]]
    losses = [run.loss for curve in curves for run in curve["runs"]]
    grid = np.geomspace(min(sizes) / 1.3, max(sizes) * 1.3, 200)
    optima = [(curve["n_params"], curve) for curve in curves if curve["n_params"]]
    for i, curve in enumerate(curves):
        color = colormaps["viridis_r"](0.15 + 0.8 * i / max(1, len(curves) - 1))
        own = [run.n_params for run in curve["runs"]]
        near = grid[(grid >= min(own) / 1.2) & (grid <= max(own) * 1.2)]
        axes.plot(near, np.polyval(curve["parabola"], np.log(near)), color=color, linewidth=1.5)
        axes.plot(own, [run.loss for run in curve["runs"]], "o", color=color, markeredgecolor="white", markersize=7)
        right = max(curve["runs"], key=lambda run: run.n_params)
        axes.annotate(
            power(curve["flops"]),
            (right.n_params, right.loss),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=color,
        )
    if optima:
        points = [(n, float(np.polyval(curve["parabola"], math.log(n)))) for n, curve in optima]
        axes.plot(
            *zip(*points, strict=True), "v", color=LAW, markersize=8, zorder=4, label="lowest point of a parabola"
        )
    if law.form == "L(N, D)":
        budgets = np.geomspace(curves[0]["flops"], curves[-1]["flops"], 50)
        n_params, tokens = law.size(budgets)
        axes.plot(
            n_params,
            expected_loss(law.constants, {"n_params": n_params, "tokens": tokens}),
            color=LAW,
            linestyle="--",
            label="compute-optimal, by the law",
        )
    axes.set_xlim(grid[0], grid[-1] * 1.6)
    _scale_losses(axes, min(losses), max(losses))
    _scale_counts(axes)
    axes.set_xlabel("parameters N")
    axes.set_title("IsoFLOP curves: equal compute, different sizes", loc="left", fontweight="bold")
    axes.legend(loc="upper right", fontsize=9, frameon=False)


def _draw_tokens(law, axes):
    colors = _colors(law)
    all_tokens = [run.tokens for run in law.runs]
    grid = np.geomspace(min(all_tokens) / 1.3, max(all_tokens) * 1.3, 100)
    for n_params, color in colors.items():
        runs = [run for run in law.runs if run.n_params == n_params]
        axes.plot(
            grid, expected_loss(law.constants, {"n_params": n_params, "tokens": grid}), color=color, linewidth=1.5
        )
        label = f"{short(n_params)} parameters"
        axes.plot(
            [run.tokens for run in runs],
            [run.loss for run in runs],
            "o",
            color=color,
            markeredgecolor="white",
            markersize=7,
            label=label,
        )
    losses = [run.loss for run in law.runs]
    axes.set_xlim(grid[0], grid[-1])
    _scale_losses(axes, min(losses), max(losses))
    _scale_counts(axes)
    axes.set_xlabel("training tokens D")
    axes.set_title("Loss against tokens: runs, and the law for each size", loc="left", fontweight="bold")
    axes.legend(loc="upper right", fontsize=9, frameon=False)


def _draw_sizes(law, axes):
    budgets = np.geomspace(min(run.flops for run in law.runs) / 1.3, max(run.flops for run in law.runs) * 13, 200)
    n_params, tokens = law.size(budgets)
    loss, low, high = law.predict(n_params, tokens, budgets)
    axes.fill_between(n_params, low, high, color=BAND, alpha=0.45, linewidth=0)
    axes.plot(n_params, loss, color=LAW, linewidth=2, linestyle="--")
    colors = _colors(law)
    for run in law.runs:
        axes.plot(
            run.n_params, run.loss, "o", color=colors[run.n_params], markeredgecolor="white", markersize=7, zorder=3
        )
    axes.set_xlim(n_params[0], n_params[-1])
    _scale_losses(axes, low.min(), max(high.max(), max(run.loss for run in law.runs)))
    _scale_counts(axes)
    axes.set_xlabel("parameters N")
    axes.set_title("Loss against size", loc="left", fontweight="bold")
