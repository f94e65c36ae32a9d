"""Train a grid of settings: one run per point of the grid, each in its own folder and process.

    nanogpt-accel sweep quickstart learning_rate=5e-3,1e-2,2e-2 n_layer=2,4 jobs=2
    nanogpt-accel sweep quickstart learning_rate=5e-3,1e-2,2e-2 n_layer=2,4 --table
    accelerate launch -m nanogpt_accel sweep quickstart learning_rate=5e-3,1e-2,2e-2 index=3

The run folders are the only state of a sweep. A point is done if its folder contains the checkpoint of the last step.
Otherwise, its run resumes from the latest valid checkpoint. So the same command continues an interrupted sweep.
"""

import csv
import io
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from .. import train
from ..checkpoint.layout import list_checkpoints, read_trainer
from ..checkpoint.run_folder import find_trainer
from ..checkpoint.verify import latest_valid
from ..data import dataset, run_data
from ..distributed.launcher import count_processors, is_main, world_size
from ..distributed.stop import StopSignals
from ..recipe import (
    FIELDS,
    LOSS_SECTIONS,
    LOSS_TRAIN_KEYS,
    SECTION_OF,
    SECTIONS,
    SETTINGS,
    Corpus,
    Recipe,
    find_recipe,
    load_recipe,
)
from ..tracking.console import Console
from ..tracking.metrics_log import number, read_metrics, training_seconds
from ..training import check_recipe
from ..utils import cli
from ..utils.fields import Int, Name, Section, raise_problems, show_value, type_name, unknown_key, validate
from ..utils.files import write_atomically
from ..utils.text import aligned, counted, duration, first_line, printable, quoted

POLL_S = 0.2
MAX_NAME = 250  # bytes in the name of a point; its log is called NAME.log, and file names have at most 255 bytes
DONE, DIVERGED, RUNNING, CHANGED = "done", "diverged", "running", "other settings"


class SweepOptions(Section):
    """The options of `sweep`, in addition to the keys of a recipe."""

    out_dir: Name = Field("", description="folder of the sweep; default: the recipe's out_dir plus -sweep")
    jobs: Int = Field(1, ge=1, description="number of points that are trained at the same time")
    index: Int | None = Field(
        None,
        ge=1,
        description="train only the point with this number, in this process; with accelerate launch, in all processes",
    )
    list_points: bool = Field(False, alias="list", description="print the points with their numbers, and do not train")
    table: bool = Field(False, description="print the table of results, and do not train")
    overwrite: bool = Field(
        False, description="if a run folder contains a run with other settings, replace this run; keep all other runs"
    )


@dataclass
class Point:
    """A point of the grid.

    values: the settings that the sweep varies. settings: all settings of the command line, including `values`. Both are
    {key: text}. target: file of the recipe. recipe: the Recipe of this point, which `load` sets.
    """

    number: int
    values: dict
    target: Path
    settings: dict
    recipe: Recipe | None = None

    @property
    def name(self):
        return ",".join(f"{key}={value}" for key, value in self.values.items())

    @property
    def folder(self):
        return Path(self.recipe.out_dir)

    @property
    def log(self):
        return self.folder.with_name(f"{self.folder.name}.log")


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel sweep RECIPE key=VALUE,VALUE,... [jobs=N] [--list] [--table] [key=value ...]",
            "Train a recipe with all combinations of the values, one run per combination. The same command continues "
            "an interrupted sweep. Keys are those of `nanogpt-accel train`.",
            {"options": SweepOptions, **SETTINGS},
        )
    options, points = parse(argv)
    console = Console(is_main())
    if options.list_points:
        for point in points:
            console.say(f"{point.number:>3}  {point.name}")
        return
    load(points, options, None if options.table else check_point)
    if options.table:
        show(points, console)
    elif options.index:
        train_here(*points, console)
    else:
        with StopSignals() as signals:
            prepare([point for point in points if find_status(point) not in (DONE, DIVERGED)], console)
            signals.armed = True
            failures = train_all(points, options.jobs, signals, console)
        show(points, console)
        report_end(points, failures, signals)


# ---- the points


def parse(argv):
    """Return (SweepOptions, list of Points) of a command line. With the option `index`, the list has only the point
    with this number.

    Raises:
        ValueError: there are problems with the grid; the message has one line per problem.
    """
    target, options, settings, problems = cli.parse_with_recipe(argv, SweepOptions, FIELDS)
    if target is None:
        problems.append("RECIPE is missing; usage: nanogpt-accel sweep quickstart learning_rate=5e-3,1e-2,2e-2")
    if options.index and options.jobs > 1:
        problems.append(f"jobs={options.jobs}: not used with index={options.index}; remove one of them")
    if world_size() > 1 and not (options.index or options.list_points or options.table):
        problems.append("index is missing: with accelerate launch, all processes train the same point; add index=N")
    varied, fixed, unsplit = {}, {}, ""
    for key, text in settings.items():
        leaf = key.rpartition(".")[2]
        if key not in FIELDS:
            problems.append(unknown_key(key, FIELDS))
        elif leaf in varied or leaf in {other.rpartition(".")[2] for other in fixed}:
            problems.append(f"{key}: is given twice; remove one of them")
        elif "," in text and is_split(key):
            varied[leaf] = [canonical(leaf, value.strip()) for value in text.split(",")]
            if twice := [value for value in dict.fromkeys(varied[leaf]) if varied[leaf].count(value) > 1]:
                problems.append(f"{key}={text}: {' and '.join(twice)} is given twice; remove one of them")
        else:
            fixed[key] = text
            unsplit += f"; {key} is not split at its commas, because its values are texts or lists" * ("," in text)
    if not varied and not problems:
        problems.append(f"no key has several values; for example, add learning_rate=5e-3,1e-2,2e-2{unsplit}")
    raise_problems(problems)
    file, keys, points = find_recipe(target), sorted(varied), []  # the order on the command line does not matter
    for i, values in enumerate(itertools.product(*map(varied.get, keys)), 1):
        values = dict(zip(keys, values, strict=True))
        points.append(Point(i, values, file, fixed | values))
    if (longest := max(len(point.name.encode()) for point in points)) > MAX_NAME:
        problem = f"the names of the run folders have up to {longest} bytes, but at most {MAX_NAME} are allowed"
        raise ValueError(f"{problem}; vary fewer keys")
    if options.index and options.index > len(points):
        raise ValueError(f"index={options.index}: the sweep has {counted(len(points), 'point')}")
    return options, points[options.index - 1 : options.index] if options.index else points


def is_split(key):
    """Return whether commas separate the values of a key. This is true for numbers, booleans and choices, because such
    a value cannot contain a comma itself."""
    return type_name(FIELDS[key].annotation).split("|")[0] not in ("TEXT", "A,B,...", "YAML", "{KEY: VALUE}")


def canonical(key, text):
    """Return a value in the form for names and tables: 1e-3 becomes 0.001. An invalid value is returned as it is."""
    section, problems, _ = validate(SECTIONS.get(SECTION_OF[key], Recipe), {key: text})
    return text if problems else show_value(getattr(section, key))


def load(points, options, check=None):
    """Load the recipe of each point. check: function that takes a point, and returns a list of problems.

    Raises:
        ValueError: there are problems; the message has one line per problem. If a problem does not affect all points,
            its line starts with the affected points.
    """
    problems = {}  # problem -> [name of a point, ...]
    for point in points:
        try:
            _load(point, options, check)
        except ValueError as error:
            for problem in str(error).split("\n"):
                problems.setdefault(problem, []).append(point.name)
    lines = []
    for problem, names in problems.items():
        others = f" and {counted(len(names) - 1, 'other point')}" * (len(names) > 1)
        lines.append(problem if len(names) == len(points) else f"{names[0]}{others}: {problem}")
    raise_problems(lines)


def _load(point, options, check):
    def place(recipe):
        folder = os.path.expanduser(options.out_dir or f"{recipe.out_dir}-sweep")
        placed = recipe.replace(out_dir=os.path.join(folder, point.name), resume="auto", overwrite=False)
        if mirror := recipe.checkpoint.mirror:
            placed = placed.replace(mirror=f"{mirror.rstrip('/')}/{point.name}")
        if options.overwrite and changes(placed, with_data=True):
            placed = placed.replace(resume="no", overwrite=True)
        return placed

    def check_placed(recipe):
        point.recipe = place(recipe)
        return check(point) if check else []

    point.recipe = place(load_recipe(point.target, point.settings, check_placed))


def check_point(point):
    """Check everything that can be checked before the first point is trained. Return a list of problems."""
    recipe, folder = point.recipe, point.folder.parent
    problems = []
    if recipe.train.eval_only:
        problems.append("train.eval_only=true: not supported for a sweep; remove eval_only")
    if recipe.model.init_from == "resume":
        problems.append("model.init_from=resume: a sweep resumes its runs automatically; remove init_from")
    if recipe.model.init_from not in ("scratch", "resume"):
        problems += [
            f"model.{key}: has no effect with init_from={recipe.model.init_from}, because the loaded model defines the "
            f"architecture; remove {key}"
            for key in point.values
            if key in recipe.shape and key != "block_size"
        ]
    if recipe.hub.push_to_hub:
        problems.append(
            "hub.push_to_hub=true: not supported for a sweep; remove it, and push one run with `nanogpt-accel push`"
        )
    if (folder / "run.yaml").is_file():
        problems.append(f"out_dir={folder}: is a run folder; set out_dir to another folder")
    if problems:
        return problems
    if not recipe.overwrite and (changed := changes(recipe, with_data=True)):
        fix = f"set out_dir to another folder than {folder}, or overwrite=true to replace the run"
        return [f"the run in {folder} was trained with other settings: {', '.join(changed)}; {fix}"]
    return check_recipe(recipe) if find_status(point) not in (DONE, DIVERGED, RUNNING) else []


# ---- the state of a run, read from its folder


def find_status(point):
    """Return the status of the run in a point's folder: done, diverged, running, other settings, unfinished or not
    started."""
    if changes(point.recipe, with_data=point.recipe.overwrite):
        return CHANGED
    with suppress(FileNotFoundError):  # another process may delete old checkpoints at this moment
        latest = latest_valid(point.folder, warn=lambda line: None, thorough=False)
        if latest and read_trainer(latest)["step"] >= point.recipe.train.max_iters:
            return DONE
    # only on the main process: find_trainer briefly locks the folder, so several ranks would find each other
    if is_main() and find_trainer(point.folder):
        return RUNNING
    if any(point.folder.glob("nonfinite-*.json")):
        return DIVERGED
    return "unfinished" if (point.folder / "run.yaml").is_file() else "not started"


def changes(recipe, with_data=False):
    """Compare the run in out_dir with the recipe. Return the differences in settings that affect the result, as a list
    of strings.

    with_data: also compare the content of the corpus, which takes longer.
    """
    file = Path(recipe.out_dir) / "run.yaml"
    if not file.is_file():
        return [f"{file} is missing"] if list_checkpoints(recipe.out_dir) else []
    try:
        saved = load_recipe(file)
    except (ValueError, OSError) as error:
        return [first_line(error)]
    before, now = settings_of(saved, saved, with_data), settings_of(recipe, saved, with_data)
    return [
        f"{key}={show_value(before[key])} instead of {show_value(value)}"
        for key, value in now.items()
        if key in before and before[key] != value
    ]


def settings_of(recipe, saved, with_data):
    """Return the settings of a recipe that affect the result, with defaults filled in, as {key: value}.

    saved: the recipe in run.yaml. The run itself writes some settings to this file: the folders of the token files, a
        larger val_fraction if val was too small, and the architecture of the model from init_from. Such settings do
        not count as changes by the user.
    """
    data = recipe.data
    keys = {"seed", *LOSS_TRAIN_KEYS, "mixed_precision", "on_nonfinite", "max_skips"}
    keys |= {key for key, section in SECTION_OF.items() if section in LOSS_SECTIONS}
    keys -= {*Corpus.model_fields, "mix", "stages", "validation", "shard_tokens"}
    values = {key: value for key, value in recipe.flat().items() if key in keys} | recipe.shape
    if recipe.model.init_from != "scratch":
        values = {key: value for key, value in values.items() if key not in recipe.shape or key == "block_size"}
    values["stages"] = [
        f"{', '.join(f'{name} {share}' for name, share in mix.items())} from step {step}" for step, mix in recipe.stages
    ]
    values["validation"] = [f"{name} ({member.split})" for name, member in data.validation.items()]
    for name, member in {**data.sources, **data.validation}.items():
        section, prefix = member.section(data), f"{name}." * (len(data.sources) > 1 or name in data.validation)
        corpus = {key: getattr(section, key) for key in Corpus.model_fields if key not in ("data_dir", "val_fraction")}
        if section.data_dir:
            corpus["data_dir"] = str(dataset.data_folder(section))
        if "val_fraction" in section.model_fields_set:
            corpus["val_fraction"] = section.val_fraction
        values |= {f"{prefix}{key}": value for key, value in corpus.items()}
    with suppress(ValueError, OSError):  # the corpus was deleted
        used = run_data.sections(saved.data)
        for name, section in run_data.sections(data).items() if with_data else ():
            if name in used and "val_fraction" not in section.model_fields_set:
                section = section.model_copy(update={"val_fraction": used[name].val_fraction})
            values[f"token files of {name}"] = str(dataset.data_folder(section))
    return values


# ---- training


def train_here(point, console):
    """Train a point in this process, which may be one of several ranks."""
    if (status := find_status(point)) in (DONE, DIVERGED):
        console.say(f"{point.name}: {status}; to train it again, delete {point.folder}")
    else:
        train.main(words_of(point))


def words_of(point):
    """Return the arguments of `nanogpt-accel train` for a point."""
    recipe = point.recipe
    own = {"out_dir": recipe.out_dir, "overwrite": recipe.overwrite}
    own |= {"resume": recipe.checkpoint.resume, "mirror": recipe.checkpoint.mirror}
    settings = point.settings | {key: show_value(value) for key, value in own.items()}
    return [str(point.target), *(f"{key}={value}" for key, value in settings.items())]


def prepare(points, console):
    """Prepare the data of all points before the training starts. Otherwise, several jobs could prepare the same data.

    Raises:
        ValueError: the data of a point are invalid, or have too few tokens.
    """
    prepared = set()
    for point in points:
        data, block_size = point.recipe.data, point.recipe.model.block_size
        if (key := (data.model_dump_json(), block_size)) not in prepared:
            prepared.add(key)
            opened = run_data.open_run_data(point.recipe, block_size, console)
            problems = run_data.require_blocks(data, opened, block_size)
            raise_problems([f"{point.name}: {problem}" for problem in problems])


def train_all(points, jobs, signals, console):
    """Train the points that are not done, `jobs` at a time. Return {name of a point: exit status} of all that failed.

    If another process is already training a point, wait until that process ends. For example, the training processes
    of an earlier sweep continue if the sweep is killed. If a signal arrives, start no further points, and stop the
    training processes. Each of them saves a checkpoint before it ends.
    """
    waiting, running, told, failures = list(points), {}, set(), {}  # running: {slot: (point, process)}
    try:
        while (waiting or running) and not signals.received:
            for slot, (point, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    if process.returncode and find_trainer(point.folder):  # another process locked the folder first
                        waiting.append(point)
                    elif process.returncode:
                        failures[point.name] = process.returncode
                        console.say(f"{point.name}: {how_it_ended(point, process.returncode)}")
                    else:
                        console.say(f"{point.name}: done, validation loss {loss_text(result(point)['val_loss'])}")
            for slot in sorted(set(range(jobs)) - running.keys()):
                if point := next_point(waiting, told, console):
                    console.say(f"{point.name}: training; the output is in {point.log}")
                    running[slot] = point, start(point, environment(point.recipe.train.device, slot, jobs))
            time.sleep(POLL_S)
    finally:
        for _, process in running.values():
            if os.name == "posix":  # on Windows, the console sends Ctrl-C and Ctrl-Break to all of its processes
                process.terminate()
        for _, process in running.values():
            process.wait()
    return failures


def next_point(waiting, told, console):
    """Return the next point to train, or None. Remove it from `waiting`, together with points that are done.

    A point that another process is training stays in `waiting`, and is reported once. told: names of the points that
    were already reported.
    """
    for point in list(waiting):
        if trainer := find_trainer(point.folder):
            if point.name not in told:
                console.say(f"{point.name}: waiting, because {trainer} is training it")
            told.add(point.name)
            continue
        waiting.remove(point)
        if find_status(point) not in (DONE, DIVERGED):
            return point
    return None


def start(point, env):
    """Start the training of a point in a new process. Its output is appended to the log of the point."""
    point.log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "nanogpt_accel.train", *words_of(point)]
    with open(point.log, "ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)


def environment(device, slot, jobs):
    """Return the environment variables for the training in a slot. If several jobs run at the same time, each of them
    gets a part of the CPU cores, and one GPU.

    device: the setting train.device. slot: from 0 to jobs - 1.
    """
    env = dict(os.environ)
    if jobs == 1:
        return env
    env.setdefault("OMP_NUM_THREADS", str(max(1, count_processors() // jobs)))
    if device in ("auto", "cuda"):
        gpus = [gpu for gpu in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        if "CUDA_VISIBLE_DEVICES" not in env:
            import torch

            gpus = list(map(str, range(torch.cuda.device_count())))
        if gpus:
            env["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return env


def how_it_ended(point, exit_status):
    """Return why the training of a point failed, as text."""
    if exit_status < 0:
        hint = ", perhaps because the machine has too little memory" * (exit_status == -9)
        return f"ended by signal {-exit_status} ({signal.strsignal(-exit_status)}){hint}"
    lines = ["no output"]
    with suppress(OSError):  # the file was deleted
        lines += point.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"exit status {exit_status}: {printable(lines[-1])}"


def report_end(points, failures, signals):
    """If any points are not done, report them and exit. The exit status is 75 after a signal or max_hours, else 1."""
    left = [point for point in points if find_status(point) != DONE]
    state = f"{len(points) - len(left)} of {counted(len(points), 'point')} are done"
    if left and (signals.received or {failures.get(point.name) for point in left} == {75}):
        reason = signals.received or "max_hours"
        raise cli.Stopped(f"stopped by {reason}: {state}; the same command continues the sweep")
    if left:
        lines = [f"error: {state}; the same command continues the unfinished ones"]
        for point in left:
            reason = how_it_ended(point, failures[point.name]) if point.name in failures else find_status(point)
            lines.append(f"  {point.name}: {reason}; see {point.log}")
        sys.exit("\n".join(lines))


# ---- the results


def result(point):
    """Return the results of a point as a dictionary {column: value}. Unknown values are None."""
    recipe, status = point.recipe, find_status(point)
    lines = [] if status == CHANGED else read_metrics(point.folder / "metrics.jsonl")
    losses, best = (
        [value for line in lines if (value := number(line, key)) is not None] for key in ("val_loss", recipe.best_loss)
    )
    steps = max((line["step"] + ("loss" in line) for line in lines), default=0)
    return {
        "point": point.name,
        **point.values,
        "status": status,
        "steps": steps,
        "tokens": steps * recipe.tokens_per_step,
        "val_loss": losses[-1] if losses else None,
        "best_val_loss": min(best, default=None),
        "seconds": training_seconds(lines, recipe.tokens_per_step)[-1] if lines else None,
    }


def loss_text(loss):
    return "-" if loss is None else f"{loss:.4f}"


def show(points, console):
    """Print the table of results, and write results.csv to the folder of the sweep.

    The file contains no times, so an interrupted and continued sweep writes the same file as an uninterrupted one.
    """
    results = [result(point) for point in points]
    done = [row["best_val_loss"] for row in results if row["status"] == DONE]
    lowest = min((loss for loss in done if loss is not None), default=math.inf)  # None: metrics.jsonl is damaged
    lines = [("", "index", *points[0].values, "val_loss", "best_val_loss", "tokens", "time", "status")]
    for point, row in zip(points, results, strict=True):
        mark = "*" * (row["status"] == DONE and row["best_val_loss"] == lowest)
        time_text = "-" if row["seconds"] is None else duration(row["seconds"])
        texts = loss_text(row["val_loss"]), loss_text(row["best_val_loss"]), f"{row['tokens']:,}", time_text
        lines.append((mark, str(point.number), *point.values.values(), *texts, row["status"]))
    if not console.enabled:
        return
    print("\n".join(aligned(lines)))
    for point, row in zip(points, results, strict=True):
        if row["status"] == CHANGED:
            console.say(f"{point.name}: the run has other settings: {', '.join(changes(point.recipe))}")
    file = points[0].folder.with_name("results.csv")
    if file.parent.is_dir() and CHANGED not in [row["status"] for row in results]:
        text = io.StringIO(newline="")
        columns = [key for key in results[0] if key != "seconds"]
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(results)
        with console.optional(f"{file} cannot be written"):
            write_atomically(file, text.getvalue())
            console.say(f"wrote {file}; * marks the lowest validation loss")
            console.say(f"to plot the curves: nanogpt-accel report {quoted(file.parent)}")
