"""One page about runs: what they learned, how fast, what they wrote meanwhile, and how their recipes differ.

    nanogpt-accel report runs/gpt2
    nanogpt-accel report runs/gpt2 runs/llama out=compare.html

The page holds everything itself, asks no network for anything, and follows the reader's light or dark mode. The same
curves lie beside it as PNGs. It reads metrics.jsonl, samples.jsonl, expect.json and run.yaml, so a run that still
goes on has a page too.
"""

import html
import json
import math
import re
import statistics
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from ..checkpoint.run_folder import check_lock
from ..recipe import Recipe, load_recipe
from ..tracking.metrics_log import read_metrics
from ..utils import cli
from ..utils.fields import show_value, validate
from ..utils.text import duration

MOST_RUNS, MOST_POINTS, MOST_SAMPLES = 8, 800, 30
COLORS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#0891b2", "#db2777", "#ca8a04", "#64748b")
CHARTS = {  # name in metrics.jsonl: (title, unit, what to divide by)
    "loss": ("Loss", "nats a token", 1),
    "learning_rate": ("Learning rate", "", 1),
    "grad_norm": ("Gradient norm", "before clipping", 1),
    "tokens_per_second": ("Throughput", "tokens/s", 1),
    "peak_memory": ("Peak memory", "GiB", 2**30),
    "mfu": ("Model FLOPs utilization", "share of the peak", 1),
}


class ReportOptions(BaseModel):
    """The options of `report`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    out: str = Field("", description="the page to write; empty: report.html, in the folder of the run where it is one")


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel report RUN [RUN ...] [out=FILE.html]",
            "One HTML page, and PNGs beside it, about one run or several laid over each other.",
            {"options": ReportOptions},
        )
    targets, given = cli.parse(argv, ReportOptions.model_fields, n_targets=MOST_RUNS)
    options, problems, _ = validate(ReportOptions, given)
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
    if problems:
        raise ValueError("\n".join(problems))
    runs = [read_run(Path(target), name) for target, name in zip(targets, names(targets), strict=True)]
    try:
        out.write_text(page(runs), encoding="utf-8")
        images = write_images(runs, out)
    except OSError as error:
        raise OSError(f"out={out}: cannot be written ({error.strerror or error})") from None
    for run in runs:
        for note in run["notes"]:
            print(f"{run['name']}: {note}")
    print(f"wrote {out}" + (f" and {', '.join(path.name for path in images)} beside it" if images else ""))


def names(targets):
    """The last part of each path, or the whole path where two are the same."""
    last = [visible(Path(target).resolve().name) for target in targets]
    return [name if last.count(name) == 1 else visible(target) for name, target in zip(last, targets, strict=True)]


# ---- what a run folder holds


def read_run(folder, name):
    """A run as a dictionary of plain values.

    `series`: {chart: {step, seconds, value, low, high}, lists of one length}, and `val_loss`, which is drawn with the
    loss. seconds: of training alone, for metrics.jsonl has no clock; None where they are not known. low and high: the
    extremes of the steps that a thinned point stands for. `notes`: what is missing, in words.
    """
    notes, recipe = [], None
    try:
        recipe = load_recipe(folder / "run.yaml")
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if (folder / "run.yaml").is_file() else "there is no run.yaml"
        notes.append(f"{reason}; so there are no tokens, no times and no recipe here")
    lines = read_metrics(folder / "metrics.jsonl")
    logged = 0
    if (folder / "metrics.jsonl").is_file():
        logged = len((folder / "metrics.jsonl").read_bytes().splitlines())
    if not lines:
        notes.append(
            "metrics.jsonl is empty: nothing is logged yet"
            if not logged
            else "metrics.jsonl holds no line that can be read"
        )
    elif len(lines) < logged:
        notes.append(
            f"metrics.jsonl is torn after step {lines[-1]['step']:,}: {logged - len(lines)} of its lines are left out"
        )
    tokens_per_step = recipe and (
        recipe.train.batch_size * recipe.train.gradient_accumulation_steps * recipe.model.block_size
    )
    clock = training_seconds(lines, tokens_per_step)
    series = {}
    for key in (*CHARTS, "val_loss"):
        scale = CHARTS[key][2] if key in CHARTS else 1
        points = [
            (line["step"], seconds, number(line, key) / scale)
            for line, seconds in zip(lines, clock, strict=True)
            if number(line, key) is not None
        ]
        if points:
            series[key] = thin(points)
    samples = [line for line in read_metrics(folder / "samples.jsonl") if isinstance(line.get("text"), str)]
    kept = sorted(
        {
            round(i * (len(samples) - 1) / max(min(len(samples), MOST_SAMPLES) - 1, 1))
            for i in range(min(len(samples), MOST_SAMPLES))
        }
    )
    return {
        "name": name,
        "recipe": recipe,
        "notes": notes,
        "series": series,
        "tokens_per_step": tokens_per_step,
        "samples": [samples[i] for i in kept],
        "facts": facts(folder, recipe, lines, clock, tokens_per_step),
    }


def number(line, key):
    """A finite number of a line, else None."""
    value = line.get(key)
    return value if type(value) in (int, float) and math.isfinite(value) else None


def training_seconds(lines, tokens_per_step):
    """For each line the seconds spent on training steps until then: a training line tells the speed of the steps since
    the one before it. None where the speed or the tokens of a step are not known."""
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
    """Columns of at most MOST_POINTS points (step, seconds, value): each stands for neighbours, with their mean and
    their extremes, so that a spike stays visible."""
    size = -(-len(points) // MOST_POINTS)
    columns = {"step": [], "seconds": [], "value": [], "low": [], "high": []}
    for start in range(0, len(points), size):
        group = points[start : start + size]
        values = [value for _, _, value in group]
        step, seconds, _ = group[-1]
        for key, value in zip(
            columns, (step, seconds, statistics.fmean(values), min(values), max(values)), strict=True
        ):
            columns[key].append(value if value is None else float(f"{value:.6g}"))  # as exact as a curve is drawn
    return columns


def facts(folder, recipe, lines, clock, tokens_per_step):
    """{title: text} of a run, for the table at the top."""
    steps = [line["step"] + 1 for line in lines if "loss" in line]
    done = max([*steps, *(line["step"] for line in lines)], default=0)
    max_iters = recipe.train.max_iters if recipe else None
    state = f"{done:,} steps"
    if max_iters and done < max_iters:
        goes_on = bool(check_lock(folder))
        state = f"{done:,} of {max_iters:,} steps, " + ("going on" if goes_on else "stopped")
    evaluations = [(line["val_loss"], line["step"]) for line in lines if number(line, "val_loss") is not None]
    speeds = [number(line, "tokens_per_second") for line in lines if number(line, "tokens_per_second")]
    memory = [number(line, "peak_memory") for line in lines if number(line, "peak_memory")]
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
    """What expect.json says, in words; empty without one."""
    try:
        found = json.loads((folder / "expect.json").read_text(encoding="utf-8"))
        spread = f" +- {found['tolerance']:g}" if found["tolerance"] is not None else ""
        outcome = found["verdict"] or ("another recipe" if found["changed"] else "no verdict")
        return f"{found['expected']:.3f}{spread}, got {found['got']:.3f}: {outcome}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def differences(runs):
    """(titles of columns, rows of (key, values)): where the recipes differ from each other, or a single one from the
    defaults. Where a run lies and what it expects is no difference."""
    known = [(run["name"], run["recipe"]) for run in runs if run["recipe"]]
    if len(known) == 1:
        known.insert(0, ("default", Recipe()))
    tables = []
    for _, recipe in known:
        values = recipe.model_dump(exclude={"out_dir", "overwrite", "expect"})
        tables.append(
            {
                f"{section}.{key}" if isinstance(leaf, dict) else section: value
                for section, leaf in values.items()
                for key, value in (leaf.items() if isinstance(leaf, dict) else ((section, leaf),))
            }
        )
    rows = [
        (key, [show_value(table[key]) for table in tables])
        for key in (tables[0] if tables else ())
        if any(table[key] != tables[0][key] for table in tables)
    ]
    return [name for name, _ in known], rows


# ---- images


def write_images(runs, out):
    """Draw each curve against the steps into a PNG beside the page; returns the paths."""
    from matplotlib.figure import Figure

    paths = []
    for key, (title, unit, _) in CHARTS.items():
        if not any(key in run["series"] for run in runs):
            continue
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for i, run in enumerate(runs):
            if key in run["series"]:
                columns = run["series"][key]
                axes.plot(
                    columns["step"],
                    columns["value"],
                    color=COLORS[i],
                    linewidth=0.8 if key == "loss" else 1.2,
                    alpha=0.6 if key == "loss" else 1,
                    label=run["name"] + (" train" if key == "loss" else ""),
                )
            if key == "loss" and "val_loss" in run["series"]:
                columns = run["series"]["val_loss"]
                axes.plot(
                    columns["step"],
                    columns["value"],
                    color=COLORS[i if len(runs) > 1 else 1],
                    marker="o",
                    markersize=3,
                    label=f"{run['name']} validation, last {columns['value'][-1]:.4f}",
                )
        axes.set(title=title, xlabel="step", ylabel=unit)
        axes.grid(alpha=0.3)
        axes.legend()
        paths.append(out.with_name(f"{out.stem}-{key}.png"))
        figure.savefig(paths[-1], dpi=120)
    return paths


# ---- the page


def page(runs):
    """The page as text."""
    escape = html.escape
    title = " and ".join(run["name"] for run in runs)
    columns = list(dict.fromkeys(key for run in runs for key in run["facts"]))
    overview = table(
        ["run", *columns],
        [
            [swatch(i) + escape(run["name"]), *(escape(run["facts"].get(key, "")) for key in columns)]
            for i, run in enumerate(runs)
        ],
    )
    notes = "".join(
        f"<p class=note>{escape(run['name'])}: {escape(note)}.</p>" for run in runs for note in run["notes"]
    )
    figures = "".join(
        f'<figure id="{key}"><figcaption>{escape(name)}<small>{escape(unit)}</small></figcaption>'
        "<div class=plot></div></figure>"
        for key, (name, unit, _) in CHARTS.items()
        if any(key in run["series"] for run in runs)
    )
    samples = "".join(
        f"<h3>{swatch(i)}{escape(run['name'])}</h3>"
        + "".join(
            f"<details{' open' if line is run['samples'][-1] else ''}><summary>after {line['step']:,} steps</summary>"
            f"<pre>{escape(visible(line['text']))}</pre></details>"
            for line in run["samples"]
        )
        for i, run in enumerate(runs)
        if run["samples"]
    )
    titles, rows = differences(runs)
    against = "from the defaults" if len(runs) == 1 else "from each other"
    recipes = ""
    if titles:
        recipes = (
            f"<h2>Recipe</h2><p>Where it differs {against}:</p>"
            if len(runs) == 1
            else f"<h2>Recipes</h2><p>Where they differ {against}:</p>"
        )
        recipes += (
            table(
                ["key", *map(escape, titles)],
                [
                    [f"<code>{escape(key)}</code>", *(f"<code>{escape(visible(value))}</code>" for value in values)]
                    for key, values in rows
                ],
            )
            if rows
            else "<p>nowhere</p>"
        )
        recipes += "".join(
            f"<details><summary>{escape(run['name'])}: run.yaml</summary><pre>"
            f"{escape(visible(run['recipe'].to_yaml()))}</pre></details>"
            for run in runs
            if run["recipe"]
        )
    data = json.dumps(
        [{"name": run["name"], "tokens": run["tokens_per_step"], "series": run["series"]} for run in runs]
    ).replace("<", "\\u003c")
    parts = {
        "TITLE": escape(title),
        "OVERVIEW": overview,
        "NOTES": notes,
        "FIGURES": CONTROLS + f"<div id=figures>{figures}</div>" if figures else "",
        "SAMPLES": f"<h2>Samples</h2>{samples}" if samples else "",
        "RECIPES": recipes,
        "DATA": data,
        "COLORS": json.dumps(COLORS),
    }
    return re.sub(r"@([A-Z]+)@", lambda match: parts[match[1]], PAGE)


def swatch(i):
    return f'<i style="background:{COLORS[i]}"></i>'


def visible(text):
    """A text without the control characters that no page may hold."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)


def table(titles, rows):
    """Of cells that are HTML already."""
    head = "".join(f"<th>{title}" for title in titles)
    return (
        f"<div class=wide><table><thead><tr>{head}</thead><tbody>"
        + "".join("<tr>" + "".join(f"<td>{cell}" for cell in row) for row in rows)
        + "</tbody></table></div>"
    )


CONTROLS = """<h2>Curves</h2><noscript><p class=note>The curves here need JavaScript; the PNGs beside this page do not.
</noscript><form id=controls><fieldset><legend>against</legend>
<label><input type=radio name=axis value=step checked>steps</label>
<label><input type=radio name=axis value=tokens>tokens</label>
<label><input type=radio name=axis value=seconds>time in training</label></fieldset>
<label><input type=checkbox name=log>logarithmic loss</label><span id=legend></span></form>
<p class=hint>Loss: the thin line is training, the one with dots is validation. A shade shows the extremes where a point
stands for several steps. Time counts training steps alone, not evaluations and checkpoints.</p>
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>@TITLE@</title>
<style>
:root { color-scheme: light dark; --ink: #1f2937; --faint: #6b7280; --line: #e5e7eb; --paper: #fff; --card: #f9fafb }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --faint: #9ca3af; --line: #374151; --paper: #111827; --card: #1a2333 }
}
body { margin: 0 auto; max-width: 1100px; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 0 1rem } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem } h3 { font-size: 1rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .35rem 1rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--faint); font-weight: 500 }
i { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .45em }
.note { border-left: 3px solid #ca8a04; padding-left: .7rem } .hint, small { color: var(--faint); font-size: .85rem }
small { margin-left: .6em; font-weight: 400 }
form { display: flex; flex-wrap: wrap; gap: .4rem 1.5rem; align-items: center }
fieldset { border: 0; padding: 0; margin: 0; display: flex; gap: .8rem } legend { float: left; color: var(--faint) }
label { white-space: nowrap; cursor: pointer; margin-right: .6rem }
#figures { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem }
figure { margin: 0; padding: .8rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  min-width: 0 }
figure#loss { grid-column: 1 / -1 } figcaption { font-weight: 600 }
@media (max-width: 700px) { #figures { grid-template-columns: 1fr } }
.plot { position: relative } svg { display: block; width: 100% }
svg text { fill: var(--faint); font-size: 11px } .grid { stroke: var(--line) } .cross { stroke: var(--faint) }
.tip { position: absolute; top: 0; pointer-events: none; background: var(--paper); border: 1px solid var(--line);
  border-radius: 6px; padding: .3rem .6rem; font-size: .8rem; white-space: nowrap; font-variant-numeric: tabular-nums }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: .8rem; font-size: .85rem } summary { cursor: pointer; padding: .15rem 0 }
</style></head><body>
<h1>@TITLE@</h1>
@OVERVIEW@
@NOTES@
@FIGURES@
@SAMPLES@
@RECIPES@
<script>
const runs = @DATA@, colors = @COLORS@
const form = document.getElementById("controls")
const hidden = new Set()

// the x of every point of a series, or null where it is not known
function xs(run, columns, axis) {
  if (axis === "tokens") return run.tokens ? columns.step.map(step => step * run.tokens) : null
  if (axis === "seconds") return columns.seconds.includes(null) ? null : columns.seconds
  return columns.step
}

function lines(key, axis) {
  const found = []
  runs.forEach((run, i) => {
    if (hidden.has(i)) return
    for (const name of key === "loss" ? ["loss", "val_loss"] : [key]) {
      const columns = run.series[name], x = columns && xs(run, columns, axis)
      const isVal = name === "val_loss"
      if (x) found.push({x, y: columns.value, low: columns.low, high: columns.high, isVal,
        color: colors[isVal && runs.length === 1 ? 1 : i],
        name: (runs.length > 1 ? run.name : "") + (key === "loss" ? (isVal ? " validation" : " training") : "")})
    }
  })
  return found
}

function short(value) {
  const size = Math.abs(value)
  for (const [unit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]])
    if (size >= unit) return +(value / unit).toPrecision(4) + letter
  return size && size < 1e-4 ? value.toExponential(2).replace(/0+e/, "e").replace(".e", "e")
                             : String(+value.toPrecision(4))
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough))
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= rough), found = []
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(n * step)
  return found
}

function element(name, attributes, parent, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name)
  for (const key in attributes) made.setAttribute(key, attributes[key])
  if (text !== undefined) made.textContent = text
  parent.appendChild(made)
  return made
}

function draw(figure) {
  const key = figure.id, axis = form.elements.axis.value, all = lines(key, axis)
  const plot = figure.querySelector(".plot")
  plot.replaceChildren()
  if (!all.length) {
    plot.textContent = axis === "step" ? "no run to show" : "not known of these runs"
    return
  }
  const width = plot.clientWidth || 500, height = key === "loss" ? 380 : 220
  const left = 52, right = width - 12, top = 10, bottom = height - 26
  const isLog = key === "loss" && form.elements.log.checked && all.every(line => Math.min(...line.low) > 0)
  const scale = isLog ? Math.log10 : value => value
  let [x0, x1] = [Math.min(...all.map(l => l.x[0])), Math.max(...all.map(l => l.x[l.x.length - 1]))]
  let y0 = scale(Math.min(...all.flatMap(l => l.low))), y1 = scale(Math.max(...all.flatMap(l => l.high)))
  if (x0 === x1) x1 = x0 + 1
  if (key !== "loss" && key !== "learning_rate") y0 = Math.min(y0, 0)
  const margin = y0 === y1 ? Math.abs(y0) * .1 || 1 : (y1 - y0) * .05
  y1 += margin
  y0 -= y0 === 0 ? 0 : margin
  const px = x => left + (x - x0) / (x1 - x0) * (right - left)
  const py = y => bottom - (scale(y) - y0) / (y1 - y0) * (bottom - top)
  const [unit, letter] = axis !== "seconds" ? [1, ""] : x1 < 120 ? [1, " s"] : x1 < 7200 ? [60, " min"] : [3600, " h"]
  const label = x => short(x / unit) + letter

  const svg = element("svg", {viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": key}, plot)
  let marks = ticks(y0, y1, 5)
  if (isLog) {
    const powers = [1, 1.5, 2, 3, 4, 5, 7].flatMap(m => [-3, -2, -1, 0, 1, 2].map(p => m * 10 ** p))
    marks = powers.filter(v => scale(v) >= y0 && scale(v) <= y1)
  }
  for (const y of marks) {
    element("line", {x1: left, x2: right, y1: py(y), y2: py(y), class: "grid"}, svg)
    element("text", {x: left - 6, y: py(y) + 4, "text-anchor": "end"}, svg, short(y))
  }
  for (const x of ticks(x0 / unit, x1 / unit, Math.max(2, Math.floor(width / 110))))
    element("text", {x: px(x * unit), y: height - 8, "text-anchor": "middle"}, svg, label(x * unit))
  for (const line of all) {
    const n = line.x.map((_, i) => i)
    if (n.some(i => line.high[i] > line.low[i])) {
      const up = n.map(i => `${px(line.x[i]).toFixed(1)},${py(line.high[i]).toFixed(1)}`)
      const down = n.map(i => `${px(line.x[i]).toFixed(1)},${py(line.low[i]).toFixed(1)}`).reverse()
      element("polygon", {points: up.concat(down).join(" "), fill: line.color, opacity: .15}, svg)
    }
    element("polyline", {points: n.map(i => `${px(line.x[i]).toFixed(1)},${py(line.y[i]).toFixed(1)}`).join(" "),
      fill: "none", stroke: line.color, "stroke-linejoin": "round",
      "stroke-width": line.isVal ? 2 : key === "loss" ? 1 : 1.5,
      opacity: key === "loss" && !line.isVal ? .65 : 1}, svg)
    if (line.isVal || n.length === 1)
      for (const i of n.length > 60 ? [n.length - 1] : n)
        element("circle", {cx: px(line.x[i]), cy: py(line.y[i]), r: 3, fill: line.color}, svg)
  }

  const cross = element("line", {y1: top, y2: bottom, class: "cross", visibility: "hidden"}, svg)
  const tip = document.createElement("div")
  tip.className = "tip"
  tip.hidden = true
  plot.appendChild(tip)
  svg.addEventListener("mousemove", event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) * width / box.width
    const x = x0 + (Math.min(Math.max(at, left), right) - left) / (right - left) * (x1 - x0)
    cross.setAttribute("x1", px(x))
    cross.setAttribute("x2", px(x))
    cross.setAttribute("visibility", "visible")
    tip.replaceChildren(`${axis === "step" ? "step " : ""}${label(axis === "step" ? Math.round(x) : x)}`)
    for (const line of all) {
      let near = 0
      line.x.forEach((value, i) => { if (Math.abs(value - x) < Math.abs(line.x[near] - x)) near = i })
      const row = document.createElement("div"), dot = document.createElement("i")
      dot.style.background = line.color
      row.append(dot, `${line.name} ${short(line.y[near])}`)
      tip.append(row)
    }
    tip.hidden = false
    tip.style.left = px(x) < width / 2 ? px(x) + 12 + "px" : "auto"
    tip.style.right = px(x) < width / 2 ? "auto" : width - px(x) + 12 + "px"
  })
  svg.addEventListener("mouseleave", () => { tip.hidden = true; cross.setAttribute("visibility", "hidden") })
}

if (form) {
  const all = () => document.querySelectorAll("figure").forEach(draw)
  const axes = ["tokens", "seconds"]
  for (const axis of axes) {
    const known = runs.some(run => Object.values(run.series).some(columns => xs(run, columns, axis)))
    form.querySelector(`[value=${axis}]`).disabled = !known
  }
  if (runs.length > 1) runs.forEach((run, i) => {
    const label = document.createElement("label"), box = document.createElement("input")
    const dot = document.createElement("i")
    box.type = "checkbox"
    box.checked = true
    dot.style.background = colors[i]
    box.addEventListener("change", () => box.checked ? hidden.delete(i) : hidden.add(i))
    label.append(box, dot, run.name)
    document.getElementById("legend").append(label)
  })
  form.addEventListener("change", all)
  addEventListener("resize", all)
  all()
}
</script></body></html>
"""


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
