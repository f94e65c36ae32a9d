"""Write an HTML page that shows or compares runs: curves, throughput, samples and differences between recipes.

    nanogpt-accel report runs/gpt2
    nanogpt-accel report runs/gpt2 runs/llama out=compare.html
    nanogpt-accel report --fit runs/ladder

The page is self-contained, makes no network requests and supports light and dark mode. The command also writes
each chart as a PNG file to the folder of the page. Runs that are still training are supported. With --fit, the page
shows the scaling law of finished runs instead.
"""

import base64
import json
import math
import statistics
from pathlib import Path

from pydantic import Field

from ..checkpoint.finished_runs import fit_ladder, read_ladder, unique_names
from ..checkpoint.run_folder import find_trainer
from ..planning import law_figure
from ..recipe import SECTION_OF, Recipe, load_recipe
from ..tracking.console import Console
from ..tracking.metrics_log import new_figure, number, read_metrics, save_figure, training_seconds
from ..utils import cli
from ..utils.fields import Section, raise_problems, show_value
from ..utils.files import write_atomically
from ..utils.text import aligned, counted, duration, file_name, first_line, printable

MAX_RUNS, MAX_POINTS, MAX_SAMPLES = 8, 800, 30
MAX_TARGETS = 10_000  # maximum number of arguments for --fit
COLORS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#0891b2", "#db2777", "#ca8a04", "#64748b")
CHARTS = {  # name in metrics.jsonl: (title, unit, divisor)
    "loss": ("Loss", "nats per token", 1),
    "learning_rate": ("Learning rate", "", 1),
    "grad_norm": ("Gradient norm", "before clipping", 1),
    "tokens_per_second": ("Throughput", "tokens/s", 1),
    "peak_memory": ("Peak memory", "GiB", 2**30),
    "mfu": ("Model FLOPs utilization", "share of the peak FLOP/s", 1),
}
GROUPS = {  # prefix of names such as val_loss/wiki: (title, unit); one chart per prefix
    "val_loss": ("Validation loss by set", "nats per token"),
    "share": ("Sources", "share of the sequences of a step"),
}


class ReportOptions(Section):
    """The options of `report`."""

    out: str = Field("", description="path of the page; default: report.html, in the folder RUN if only one is given")
    fit: bool = Field(
        False,
        description="fit a scaling law to finished runs",
    )


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel report RUN [RUN ...] [--fit] [out=FILE.html]",
            "Write an HTML page, and PNGs, with the curves of one or several runs. RUN is a run folder, or a folder "
            "that contains runs, such as the folder of a sweep. With --fit, write a page and a PNG with the scaling "
            "law of finished runs.",
            {"options": ReportOptions},
        )
    targets, options, problems = cli.parse_options(argv, ReportOptions, MAX_TARGETS)
    if not targets:
        problems.append("RUN is missing; usage: nanogpt-accel report runs/NAME")
    folders = run_folders(targets) if not options.fit else []
    if len(folders) > MAX_RUNS:
        problems.append(
            f"{len(folders)} runs: at most {MAX_RUNS} fit on a page; give fewer, or add --fit for a scaling law"
        )
    for folder in folders:
        if not is_run(folder):
            reason = "contains no run" if folder.exists() else "no such folder"
            problems.append(f"{folder}: {reason}; give the path of a folder with metrics.jsonl or run.yaml")
    name = "law.html" if options.fit else "report.html"
    out = Path(options.out or (Path(targets[0]) / name if len(targets) == 1 else name))
    if out.suffix.lower() not in (".html", ".htm"):
        problems.append(f"out={out}: must end with .html")
    elif options.out and not out.parent.is_dir():
        problems.append(f"out={out}: no such folder {out.parent}; create it, or set out to another path")
    raise_problems(problems)
    console = Console()
    if options.fit:
        return report_law(read_ladder(targets), out, console)
    runs = [read_run(folder, name) for folder, name in zip(folders, unique_names(folders), strict=True)]
    write_page(out, page(runs))
    images = []
    for line in table(runs):  # print does not wrap long lines, in contrast to the console
        print(line)
    for run in runs:
        for note in run["notes"]:
            console.say(f"{run['name']}: {note}")
    with console.optional("the PNGs cannot be written"):
        images = write_images(runs, out)
    console.say(f"wrote {out}" + (f" and {counted(len(images), 'PNG')}: {out.stem}-*.png" if images else ""))


def report_law(ladder, out, console):
    """Fit a law to finished runs, print it, and write its page and PNG. ladder: the result of read_ladder."""
    law = fit_ladder(ladder)
    image, encoded = out.with_suffix(".png"), ""
    with console.optional("the PNG cannot be written"):
        save_figure(law_figure.draw(law), image)
        encoded = base64.b64encode(image.read_bytes()).decode()
    tables, symbols = law_figure.tables(law), law_figure.SYMBOLS[law.form]
    write_page(out, render("law.html", law=law, symbols=symbols, tables=tables, notes=ladder.notes, image=encoded))
    print(f"{law.formula}\n{law.form}: {law.reason}")
    for title, rows in tables.items():
        print(f"\n{title}")
        for line in aligned(rows):
            print(f"  {line}")
    print()
    for note in ladder.notes:
        console.say(f"note: {note}")
    console.say(f"wrote {out}" + (f" and {image.name}" if encoded else ""))


def write_page(out, text):
    try:
        write_atomically(out, text)
    except OSError as error:
        raise OSError(f"out={out}: cannot be written ({error.strerror or error})") from None


# ---- the run folder


def is_run(folder):
    return any((folder / name).is_file() for name in ("metrics.jsonl", "run.yaml"))


def run_folders(targets):
    """Return the run folders in `targets`. Each target is a run folder, or a folder that contains run folders. If it is
    neither, the result contains the target itself."""
    folders = []
    for target in map(Path, targets):
        is_parent = target.is_dir() and not is_run(target)
        folders += (sorted(filter(is_run, target.iterdir())) if is_parent else []) or [target]
    return list({folder.resolve(): folder for folder in folders}.values())


def read_run(folder, name):
    """Read a run folder. Return a dictionary of plain values for the page.

    "series" is {metric: result of `downsample`}. "notes" is a list of problems, as text. Because metrics.jsonl
    has no timestamps, the training time is computed from the throughput. This excludes the time of evaluations and
    of saving checkpoints.
    """
    recipe, tokens_per_step, notes = read_recipe(folder)
    lines = read_metrics(folder / "metrics.jsonl")
    notes += check_metrics(folder / "metrics.jsonl", lines)
    clock = training_seconds(lines, tokens_per_step)
    series = {}
    for key in (*CHARTS, "val_loss", *other_metrics(lines)):
        scale = CHARTS[key][2] if key in CHARTS else 1
        values = [(line["step"], seconds, number(line, key)) for line, seconds in zip(lines, clock, strict=True)]
        if points := [(step, seconds, value / scale) for step, seconds, value in values if value is not None]:
            series[key] = downsample(points)
    samples = [line for line in read_metrics(folder / "samples.jsonl") if isinstance(line.get("text"), str)]
    if len(samples) > MAX_SAMPLES:  # show evenly spaced samples, including the first and the last
        samples = [samples[round(i * (len(samples) - 1) / (MAX_SAMPLES - 1))] for i in range(MAX_SAMPLES)]
    return {
        "name": name,
        "recipe": recipe,
        "notes": notes,
        "series": series,
        "tokens_per_step": tokens_per_step,
        "samples": samples,
        "summary": summary(folder, recipe, lines, clock, tokens_per_step),
    }


def read_recipe(folder):
    """Return (Recipe, tokens per step, list of problems). If run.yaml cannot be loaded, the first two are None."""
    try:
        recipe = load_recipe(folder / "run.yaml")
    except (ValueError, OSError) as error:
        reason = first_line(error) if (folder / "run.yaml").is_file() else "run.yaml is missing"
        return None, None, [f"{reason}; the page shows no tokens, times or settings"]
    return recipe, recipe.tokens_per_step, []


def other_metrics(lines):
    """Return the names of two kinds of metrics: training metrics not in CHARTS, and scores such as val_loss/wiki."""
    known = {*CHARTS, "val_loss", "step", "skipped_steps"}
    names = [key for line in lines for key in line if key not in known and ("loss" in line or "/" in key)]
    return list(dict.fromkeys(names))


def check_metrics(path, lines):
    """Return a list of problems with metrics.jsonl, as text. path: the file. lines: its valid lines, parsed."""
    n_logged = len(path.read_bytes().splitlines()) if path.is_file() else 0
    if not n_logged:
        return ["metrics.jsonl is missing or empty"]
    if not lines:
        return ["metrics.jsonl has no valid lines"]
    if len(lines) < n_logged:
        ignored = counted(n_logged - len(lines), "line")
        return [f"metrics.jsonl is damaged after step {lines[-1]['step']:,}; ignored {ignored}"]
    return []


def downsample(points):
    """Reduce a list of (step, seconds, value) to MAX_POINTS points. Return {column: list of numbers}.

    The columns are step, seconds, value, low and high. A value is the mean of a group of points; low and high are the
    minimum and maximum of the group, so that spikes stay visible.
    """
    size = -(-len(points) // MAX_POINTS)
    columns = {"step": [], "seconds": [], "value": [], "low": [], "high": []}
    for start in range(0, len(points), size):
        group = points[start : start + size]
        values = [value for _, _, value in group]
        step, seconds, _ = group[-1]
        point = (step, seconds, statistics.fmean(values), min(values), max(values))
        for column, value in zip(columns.values(), point, strict=True):
            column.append(value if value is None else float(f"{value:.6g}"))  # few digits, for a small page
    return columns


def progress(folder):
    """Return whether an unfinished run is running or stopped, as text."""
    try:
        return "running" if find_trainer(folder) else "stopped"
    except OSError as error:  # for example, the folder belongs to another user
        return f"running or stopped (.lock: {error.strerror or error})"


def summary(folder, recipe, lines, clock, tokens_per_step):
    """Return {title: text} of a run, for the table at the top of the page. clock: the result of training_seconds."""
    values = lambda key: [value for line in lines if (value := number(line, key))]  # noqa: E731
    n_steps = max((line["step"] + ("loss" in line) for line in lines), default=0)
    max_iters = recipe.train.max_iters if recipe else None
    entries = {"steps": f"{n_steps:,} steps"}
    if max_iters and n_steps < max_iters:
        entries["steps"] = f"{n_steps:,} of {max_iters:,} steps, {progress(folder)}"
    if evaluations := [(line["val_loss"], line["step"]) for line in lines if number(line, "val_loss") is not None]:
        (best, step), (last, _) = min(evaluations), evaluations[-1]
        entries |= {"best validation loss": f"{best:.4f} at step {step:,}", "last": f"{last:.4f}"}
    if tokens_per_step:
        entries["tokens"] = f"{n_steps * tokens_per_step:,}"
    if clock and clock[-1]:
        entries["training time"] = duration(clock[-1])
    if speeds := values("tokens_per_second"):
        entries["tokens/s"] = f"{statistics.median(speeds):,.0f}"
    if memory := values("peak_memory"):
        entries["peak memory"] = f"{max(memory) / 2**30:.2f} GiB"
    if expectation := read_expectation(folder):
        entries["expected"] = expectation
    return entries


def read_expectation(folder):
    """Return the content of a run's expect.json as text, or an empty string if the file is missing or invalid."""
    try:
        content = json.loads((folder / "expect.json").read_text(encoding="utf-8"))
        tolerance = f" +- {content['tolerance']:g}" if content["tolerance"] is not None else ""
        outcome = content["verdict"] or ("settings changed" if content["changed"] else "no verdict")
        got = math.nan if content["got"] is None else content["got"]  # JSON has no NaN
        return f"{content['expected']:.3f}{tolerance}, got {got:.3f}: {outcome}"
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return ""


def differences(runs):
    """Compare the recipes of the runs. Return (names of the runs, [(key, values), ...]) for the settings that differ.

    out_dir, overwrite and the section `expect` are not compared. A single recipe is compared with the defaults.
    """
    recipes = [(run["name"], run["recipe"]) for run in runs if run["recipe"]]
    if len(recipes) == 1:
        recipes.insert(0, ("default", Recipe()))
    titles = [name for name, _ in recipes]
    recipes = [recipe.model_dump() for _, recipe in recipes]
    rows = []
    for key, section in SECTION_OF.items():
        if key not in ("out_dir", "overwrite") and section != "expect":
            values = [recipe[section][key] if section else recipe[key] for recipe in recipes]
            if any(value != values[0] for value in values):
                rows.append((f"{section}.{key}" if section else key, [show_value(value) for value in values]))
    return titles, rows


# ---- the summary in the terminal


def table(runs):
    """Return the summaries of runs as lines of text in aligned columns. runs: list of results of read_run."""
    titles = ("steps", "best validation loss", "last", "training time")
    rows = [("run", *titles)]
    rows += [(run["name"], *(run["summary"].get(title, "-") for title in titles)) for run in runs]
    return aligned(rows)


# ---- images


def write_images(runs, out):
    """Write one PNG per chart to the folder of the page `out`, with steps on the x axis. Return the paths."""
    paths = []
    for key, title, unit, names in charts_of(runs):
        figure, axes = new_figure()
        for i, run in enumerate(runs):
            for j, name in enumerate(names):
                if columns := run["series"].get(name):
                    style = style_of(run, key, name, len(names))
                    color = COLORS[(i if len(runs) > 1 else j) % len(COLORS)]
                    line = ("-", "--", ":", "-.")[j % 4 if len(runs) > 1 and key != "loss" else 0]
                    axes.plot(columns["step"], columns["value"], color=color, linestyle=line, **style)
        axes.set(title=title, xlabel="step", ylabel=unit)
        axes.grid(alpha=0.3)
        axes.legend()
        paths.append(out.with_name(f"{out.stem}-{file_name(key)}.png"))
        save_figure(figure, paths[-1])
    return paths


def style_of(run, key, name, n_names):
    """Return the label and the line style of a metric in a chart, as arguments of matplotlib's plot."""
    if name == "loss":
        return {"label": f"{run['name']} train", "linewidth": 0.8, "alpha": 0.6}
    if name == "val_loss":
        last = run["series"][name]["value"][-1]
        return {"label": f"{run['name']} validation, last {last:.4f}", "marker": "o", "markersize": 3}
    part = f" {name.removeprefix(key + '/')}" if n_names > 1 else ""
    return {"label": run["name"] + part, "linewidth": 1.2}


def charts_of(runs):
    """Return a list of (key, title, unit, [metric, ...]) for the charts that have data, in their order on the page."""
    names = list(dict.fromkeys(name for run in runs for name in run["series"]))
    charts = {key: [key] for key in CHARTS} | {"loss": ["loss", "val_loss"]}
    for name in names:
        if name not in CHARTS and name != "val_loss":
            charts.setdefault(name.partition("/")[0], []).append(name)
    found = []
    for key, metrics in charts.items():
        title, unit, *_ = CHARTS.get(key) or GROUPS.get(key) or (key.replace("_", " "), "")
        if metrics := [name for name in metrics if name in names]:
            found.append((key, title, unit, metrics))
    return found


# ---- the page


def page(runs):
    """Return the HTML page of runs as text. runs: list of results of read_run."""
    recipes, rows = differences(runs)
    return render(
        "report.html",
        title=" and ".join(run["name"] for run in runs),
        runs=runs,
        titles=list(dict.fromkeys(title for run in runs for title in run["summary"])),
        charts=charts_of(runs),
        recipes=recipes,
        differences=rows,
        data=[{"name": run["name"], "tokens": run["tokens_per_step"], "series": run["series"]} for run in runs],
        colors=COLORS,
    )


def render(template, **values):
    """Return an HTML page as text. template: a file in the folder of this module."""
    from jinja2 import Environment, FileSystemLoader

    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["printable"] = printable
    return environment.get_template(template).render(**values)
