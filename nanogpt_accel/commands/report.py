"""Write one HTML page about one run or several: curves, throughput, samples, and how their recipes differ.

    nanogpt-accel report runs/gpt2
    nanogpt-accel report runs/gpt2 runs/llama out=compare.html

The page (report.html) is self-contained, makes no network requests and follows the reader's light or dark mode. The
same curves are written next to it as PNGs. The command reads metrics.jsonl, samples.jsonl, expect.json and run.yaml, so
it also works while a run is training.
"""

import json
import math
import re
import statistics
from pathlib import Path

from pydantic import Field

from ..checkpoint.run_folder import check_lock
from ..recipe import SECTION_OF, Recipe, load_recipe
from ..tracking.metrics_log import read_metrics
from ..utils import cli
from ..utils.fields import Section, raise_problems, show_value
from ..utils.text import duration, first_line

MOST_RUNS, MOST_POINTS, MOST_SAMPLES = 8, 800, 30
COLORS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#0891b2", "#db2777", "#ca8a04", "#64748b")
CHARTS = {  # name in metrics.jsonl: (title, unit, divisor)
    "loss": ("Loss", "nats a token", 1),
    "learning_rate": ("Learning rate", "", 1),
    "grad_norm": ("Gradient norm", "before clipping", 1),
    "tokens_per_second": ("Throughput", "tokens/s", 1),
    "peak_memory": ("Peak memory", "GiB", 2**30),
    "mfu": ("Model FLOPs utilization", "share of the peak", 1),
}


class ReportOptions(Section):
    """The options of `report`."""

    out: str = Field("", description="the page to write; empty: report.html, in the folder of the run where it is one")


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel report RUN [RUN ...] [out=FILE.html]",
            "One HTML page, and PNGs beside it, about one run or several laid over each other.",
            {"options": ReportOptions},
        )
    targets, options, problems = cli.parse_options(argv, ReportOptions, MOST_RUNS)
    if not targets:
        problems.append("which run? nanogpt-accel report runs/NAME")
    for target in targets:
        if not any((Path(target) / name).is_file() for name in ("metrics.jsonl", "run.yaml")):
            problems.append(f"{target}: holds neither metrics.jsonl nor run.yaml, so it is no run")
    out = Path(options.out or (Path(targets[0]) / "report.html" if len(targets) == 1 else "report.html"))
    if out.suffix.lower() not in (".html", ".htm"):
        problems.append(f"out={out}: a page's name ends with .html")
    elif options.out and not out.parent.is_dir():
        problems.append(f"out={out}: there is no folder {out.parent}")
    raise_problems(problems)
    runs = [read_run(Path(target), name) for target, name in zip(targets, names(targets), strict=True)]
    text = page(runs)
    try:
        out.write_text(text, encoding="utf-8")
        images = write_images(runs, out)
    except OSError as error:
        raise OSError(f"out={out}: cannot be written ({error.strerror or error})") from None
    for run in runs:
        for note in run["notes"]:
            print(f"{run['name']}: {note}")
    print(f"wrote {out}" + (f" and {', '.join(path.name for path in images)} beside it" if images else ""))


def names(targets):
    """Return the last part of each path, or the whole path if two runs have the same name."""
    last = [visible(Path(target).resolve().name) for target in targets]
    return [name if last.count(name) == 1 else visible(target) for name, target in zip(last, targets, strict=True)]


# ---- the run folder


def read_run(folder, name):
    """Return a run as a dictionary of plain values.

    `series`: {chart: columns of thin()}, and `val_loss`, which is drawn in the chart of the loss. The seconds count
    training steps only, because metrics.jsonl has no clock; None if unknown. `notes`: what is missing, in words.
    """
    recipe, notes = read_recipe(folder)
    lines = read_metrics(folder / "metrics.jsonl")
    notes += check_metrics(folder / "metrics.jsonl", lines)
    tokens_per_step = recipe and (
        recipe.train.batch_size * recipe.train.gradient_accumulation_steps * recipe.model.block_size
    )
    clock = training_seconds(lines, tokens_per_step)
    series = {}
    for key in (*CHARTS, "val_loss"):
        scale = CHARTS[key][2] if key in CHARTS else 1
        points = [
            (line["step"], seconds, value / scale)
            for line, seconds in zip(lines, clock, strict=True)
            if (value := number(line, key)) is not None
        ]
        if points:
            series[key] = thin(points)
    samples = [line for line in read_metrics(folder / "samples.jsonl") if isinstance(line.get("text"), str)]
    if len(samples) > MOST_SAMPLES:  # evenly spaced, with the first and the last
        samples = [samples[round(i * (len(samples) - 1) / (MOST_SAMPLES - 1))] for i in range(MOST_SAMPLES)]
    return {
        "name": name,
        "recipe": recipe,
        "notes": notes,
        "series": series,
        "tokens_per_step": tokens_per_step,
        "samples": samples,
        "facts": facts(folder, recipe, lines, clock, tokens_per_step),
    }


def read_recipe(folder):
    """Return (the Recipe of a run or None, notes)."""
    try:
        return load_recipe(folder / "run.yaml"), []
    except (ValueError, OSError) as error:
        reason = first_line(error) if (folder / "run.yaml").is_file() else "there is no run.yaml"
        return None, [f"{reason}; so there are no tokens, no times and no recipe here"]


def check_metrics(path, lines):
    """Return notes on lines of metrics.jsonl that cannot be read. lines: those that can."""
    logged = len(path.read_bytes().splitlines()) if path.is_file() else 0
    if not logged:
        return ["metrics.jsonl is empty: nothing is logged yet"]
    if not lines:
        return ["metrics.jsonl holds no line that can be read"]
    if len(lines) < logged:
        left_out = f"{logged - len(lines)} of its lines are left out"
        return [f"metrics.jsonl is torn after step {lines[-1]['step']:,}: {left_out}"]
    return []


def number(line, key):
    """Return a value of a line if it is a finite number, else None."""
    value = line.get(key)
    return value if type(value) in (int, float) and math.isfinite(value) else None


def training_seconds(lines, tokens_per_step):
    """Return for each line the seconds spent on training steps so far: a training line has the throughput since the
    previous one. None if the throughput or the tokens per step are unknown."""
    seconds, before, clock = 0.0, -1, []
    for line in lines:
        if "loss" in line:
            speed = number(line, "tokens_per_second")
            if seconds is not None and tokens_per_step and speed:
                seconds += (line["step"] - before) * tokens_per_step / speed
            else:
                seconds = None
            before = line["step"]
        clock.append(seconds if tokens_per_step else None)
    return clock


def thin(points):
    """Return points (step, seconds, value) as columns {step, seconds, value, low, high} of at most MOST_POINTS points.

    Each point is the mean of its neighbours, with their extremes in low and high, so that a spike stays visible.
    """
    size = -(-len(points) // MOST_POINTS)
    columns = {"step": [], "seconds": [], "value": [], "low": [], "high": []}
    for start in range(0, len(points), size):
        group = points[start : start + size]
        values = [value for _, _, value in group]
        step, seconds, _ = group[-1]
        point = (step, seconds, statistics.fmean(values), min(values), max(values))
        for column, value in zip(columns.values(), point, strict=True):
            column.append(value if value is None else float(f"{value:.6g}"))  # enough digits for a curve
    return columns


def facts(folder, recipe, lines, clock, tokens_per_step):
    """Return {title: text} of a run, for the table at the top."""
    steps = [line["step"] + 1 for line in lines if "loss" in line]
    done = max([*steps, *(line["step"] for line in lines)], default=0)
    max_iters = recipe.train.max_iters if recipe else None
    state = f"{done:,} steps"
    if max_iters and done < max_iters:
        goes_on = bool(check_lock(folder))
        state = f"{done:,} of {max_iters:,} steps, " + ("going on" if goes_on else "stopped")
    evaluations = [(line["val_loss"], line["step"]) for line in lines if number(line, "val_loss") is not None]
    speeds = list(filter(None, (number(line, "tokens_per_second") for line in lines)))
    memory = list(filter(None, (number(line, "peak_memory") for line in lines)))
    found = {"steps": state}
    if evaluations:
        best, at = min(evaluations)
        found["best validation loss"] = f"{best:.4f} at step {at:,}"
        found["last"] = f"{evaluations[-1][0]:.4f}"
    if tokens_per_step:
        found["tokens"] = f"{done * tokens_per_step:,}"
    if clock and clock[-1]:
        found["time in training"] = duration(clock[-1])
    if speeds:
        found["tokens/s"] = f"{statistics.median(speeds):,.0f}"
    if memory:
        found["peak memory"] = f"{max(memory) / 2**30:.2f} GiB"
    if expected := read_expectation(folder):
        found["expected"] = expected
    return found


def read_expectation(folder):
    """Return the outcome in expect.json in words; empty without the file."""
    try:
        found = json.loads((folder / "expect.json").read_text(encoding="utf-8"))
        spread = f" +- {found['tolerance']:g}" if found["tolerance"] is not None else ""
        outcome = found["verdict"] or ("another recipe" if found["changed"] else "no verdict")
        return f"{found['expected']:.3f}{spread}, got {found['got']:.3f}: {outcome}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def differences(runs):
    """Return (column titles, rows of (key, values)): the settings that differ between the recipes, or between a single
    recipe and the defaults. out_dir, overwrite and the expectation do not count."""
    known = [(run["name"], run["recipe"]) for run in runs if run["recipe"]]
    if len(known) == 1:
        known.insert(0, ("default", Recipe()))
    titles = [name for name, _ in known]
    recipes = [recipe.model_dump() for _, recipe in known]
    rows = []
    for key, section in SECTION_OF.items():
        if key not in ("out_dir", "overwrite") and section != "expect":
            values = [recipe[section][key] if section else recipe[key] for recipe in recipes]
            if any(value != values[0] for value in values):
                rows.append((f"{section}.{key}" if section else key, [show_value(value) for value in values]))
    return titles, rows


# ---- images


def write_images(runs, out):
    """Draw each curve over the steps into a PNG next to the page, and return the paths."""
    from matplotlib.figure import Figure

    paths = []
    for key, (title, unit, _) in CHARTS.items():
        if not any(key in run["series"] for run in runs):
            continue
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        style, suffix = ({"linewidth": 0.8, "alpha": 0.6}, " train") if key == "loss" else ({"linewidth": 1.2}, "")
        for i, run in enumerate(runs):
            if columns := run["series"].get(key):
                axes.plot(columns["step"], columns["value"], color=COLORS[i], label=run["name"] + suffix, **style)
            if key == "loss" and (columns := run["series"].get("val_loss")):
                color = COLORS[i if len(runs) > 1 else 1]
                label = f"{run['name']} validation, last {columns['value'][-1]:.4f}"
                axes.plot(columns["step"], columns["value"], color=color, marker="o", markersize=3, label=label)
        axes.set(title=title, xlabel="step", ylabel=unit)
        axes.grid(alpha=0.3)
        axes.legend()
        paths.append(out.with_name(f"{out.stem}-{key}.png"))
        figure.savefig(paths[-1], dpi=120)
    return paths


# ---- the page


def page(runs):
    """Return the page as text."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["visible"] = visible
    recipes, rows = differences(runs)
    return environment.get_template("report.html").render(
        title=" and ".join(run["name"] for run in runs),
        runs=runs,
        facts=list(dict.fromkeys(key for run in runs for key in run["facts"])),
        charts=[(key, chart) for key, chart in CHARTS.items() if any(key in run["series"] for run in runs)],
        recipes=recipes,
        differences=rows,
        data=[{"name": run["name"], "tokens": run["tokens_per_step"], "series": run["series"]} for run in runs],
        colors=COLORS,
    )


def visible(text):
    """Replace control characters, which HTML does not allow."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)
