"""Write and read metrics.jsonl, detect loss spikes, and plot the losses."""

import errno
import json
import math
import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..utils.files import atomic_path, write_atomically
from ..utils.text import counted, to_json


class MetricsLog:
    """Write metrics.jsonl. Each line is a JSON object with a `step`. Lines of evaluations also have a `val_loss`.

    Training step s is logged after it is done. The evaluation at step s is done and logged before training step s.

    resume_step: step of the checkpoint that the run resumes from, or None. Lines that were logged after saving this
        checkpoint are removed, so that each step is logged once.
    keep_evaluation: keep the evaluation at resume_step. Set this if the checkpoint was saved after this evaluation.
    warn: function that prints a line.
    """

    def __init__(self, path, resume_step=None, warn=print, keep_evaluation=True):
        self.path, self.warn = Path(path), warn
        if resume_step is not None:
            self._truncate(resume_step, keep_evaluation)
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed in close)
        self._pending = b""  # lines that could not be written yet, for example because the disk was full

    def _truncate(self, step, keep_evaluation):
        lines = read_metrics(self.path)
        last = [line for line in lines if line["step"] == step and "val_loss" in line] if keep_evaluation else []
        lines = [line for line in lines if line["step"] < step] + last
        write_atomically(self.path, "".join(to_json(line) + "\n" for line in lines))

    def write(self, **values):
        """Append a line. If that fails, print a warning, and write the line in a later call."""
        is_new_error, self._pending = not self._pending, self._pending + to_json(values).encode() + b"\n"
        error = self._append()
        if error and is_new_error:
            self.warn(f"warning: {self.path} cannot be written ({error}); training continues and retries later")

    def _append(self):
        """Write the pending lines. Return the error if that fails."""
        size = os.fstat(self.file.fileno()).st_size
        try:
            if self.file.write(self._pending) < len(self._pending):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._pending = b""
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self.file.fileno(), size)  # remove an incomplete line
            return error

    def flush(self):
        """Flush to disk. Called before each checkpoint, so that all lines before it survive a power failure."""
        with suppress(OSError):
            os.fsync(self.file.fileno())

    def close(self):
        if self._pending and (error := self._append()):
            n_lines = len(self._pending.splitlines())
            self.warn(f"warning: {self.path} cannot be written ({error}); lines missing at the end: {n_lines}")
        self.file.close()


def read_metrics(path):
    """Return the objects in a metrics.jsonl file. If the last line is incomplete after a crash, omit it."""
    lines = []
    if os.path.exists(path):
        for text in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text, parse_int=_parse_int)
            except (ValueError, RecursionError):
                break  # only the last line can be incomplete
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                break
            lines.append(line)
    return lines


def number(line, key):
    """Return the value of `key` in a line of metrics.jsonl (a dictionary), or None if it is not a finite number."""
    value = line.get(key)
    return value if type(value) in (int, float) and math.isfinite(value) else None


def training_seconds(lines, tokens_per_step):
    """Return a list: the training time in seconds up to each line of metrics.jsonl. Unknown times are None.

    The throughput in a line is the mean since the previous line with a training loss.
    """
    seconds, previous, clock = 0.0, -1, []
    for line in lines:
        if "loss" in line:
            speed = number(line, "tokens_per_second")
            if seconds is not None and tokens_per_step and speed:
                seconds += (line["step"] - previous) * tokens_per_step / speed
            else:
                seconds = None
            previous = line["step"]
        clock.append(seconds if tokens_per_step else None)
    return clock


def _points(lines, key):
    """Return [(step, value), ...] for the lines in which the value of `key` is a number."""
    return [(line["step"], line[key]) for line in lines if isinstance(line.get(key), (int, float))]


def _parse_int(digits):
    """Convert a JSON integer. If it has 19 or more digits, return a float, because it may not fit into an int64."""
    return int(digits) if len(digits) < 19 else float(digits)


class Spikes:
    """Detect loss spikes: losses more than 7 standard deviations above the mean of the previous 1,000 losses (OLMo team
    2025, OLMo 2). A resumed run reads the previous losses from metrics.jsonl, so that it detects the same spikes."""

    MIN_LOSSES, MAX_LOSSES = 100, 1000

    def __init__(self, metrics_path):
        losses = [loss for _, loss in _points(read_metrics(metrics_path), "loss")]
        self._losses = np.array(losses[-self.MAX_LOSSES :])

    def is_spike(self, loss):
        """Add the next logged loss, and return whether it is a spike."""
        previous = self._losses
        if math.isfinite(loss):
            self._losses = np.append(previous, loss)[-self.MAX_LOSSES :]
        return bool(len(previous) >= self.MIN_LOSSES and loss > previous.mean() + 7 * previous.std())


FIGURE = {"figsize": (8, 4.5), "layout": "constrained"}


class History(list):
    """The lines of metrics.jsonl as dictionaries, in the order in which they were logged.

    steps: the lines of training steps, with `loss`, `learning_rate`, `grad_norm` and `tokens_per_second`.
    evaluations: the lines of evaluations, with `val_loss`. `step` counts the steps before the evaluation.
    """

    @property
    def steps(self):
        return [line for line in self if "val_loss" not in line]

    @property
    def evaluations(self):
        return [line for line in self if "val_loss" in line]

    def plot(self, axes=None):
        """Plot the training and validation losses, and return the axes. axes: matplotlib axes to plot into; by
        default, those of a new figure, which a notebook shows below the cell."""
        if axes is None:
            try:
                from matplotlib import pyplot

                axes = pyplot.figure(**FIGURE).subplots()
            except ImportError:  # MPLBACKEND is that of a notebook, and this backend is not installed here
                _, axes = new_figure()
        return draw_losses(self, axes)

    def __repr__(self):
        counts = f"{counted(len(self.steps), 'logged step')}, {counted(len(self.evaluations), 'evaluation')}"
        return f"<History: {counts}; see .steps, .evaluations and .plot()>"


def new_figure(rows=1, columns=1, size=FIGURE["figsize"], **options):
    """Return a matplotlib figure for an image file, and its axes.

    rows, columns: number of plots. size: width and height in inches. options: other arguments of Figure.subplots.
    """
    # A notebook sets MPLBACKEND for its processes; matplotlib may refuse to be imported if that backend is not
    # installed here. The backend is restored, because the notebook itself needs it for its own plots.
    backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
        from matplotlib.figure import Figure  # not pyplot, which keeps every figure in memory
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend is not None:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    figure = Figure(**FIGURE | {"figsize": size})
    return figure, figure.subplots(rows, columns, **options)


def save_figure(figure, path):
    """Write a figure to a PNG file."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def plot_losses(metrics_path, image_path):
    """Plot the training and validation losses over steps to a PNG file."""
    figure, axes = new_figure()
    draw_losses(read_metrics(metrics_path), axes)
    save_figure(figure, image_path)


def draw_losses(lines, axes):
    """Draw the losses in lines of metrics.jsonl into matplotlib axes, and return the axes."""
    train, val = _points(lines, "loss"), _points(lines, "val_loss")
    if train:
        axes.plot(*zip(*train, strict=True), label="train", linewidth=0.8, color="tab:blue", alpha=0.7)
    if val:
        label = f"validation, last {val[-1][1]:.4f}"
        axes.plot(*zip(*val, strict=True), label=label, marker="o", markersize=3, color="tab:orange")
    names = dict.fromkeys(name for line in lines for name in line if name.startswith("val_loss/"))
    for i, name in enumerate(names, 2):
        if points := _points(lines, name):
            label = f"{name.removeprefix('val_loss/')}, last {points[-1][1]:.4f}"
            axes.plot(*zip(*points, strict=True), label=label, marker="o", markersize=2, linewidth=0.8, color=f"C{i}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if train or val:
        axes.legend()
    return axes
