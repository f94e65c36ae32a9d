"""metrics.jsonl: write it, read it, detect loss spikes, plot it."""

import errno
import json
import math
import os
from contextlib import suppress
from pathlib import Path

import numpy as np


class MetricsLog:
    """metrics.jsonl: one JSON object a line, each with its `step`; evaluations carry `val_loss`.

    The line of training step s is written after step s is done; an evaluation at step s comes before it.
    """

    def __init__(self, path, resume_step=None, warn=print):
        """Open for appending. resume_step: the step of the checkpoint that goes on; lines that a later, lost part
        of the run wrote are cut, so that each step stands once. warn: takes a line."""
        self.path, self.warn = Path(path), warn
        if resume_step is not None:
            self._cut(resume_step)
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
        self._waiting = b""  # lines that a full disk did not take

    def _cut(self, step):
        kept = [
            line
            for line in read_metrics(self.path)
            if line["step"] < step or (line["step"] == step and "val_loss" in line)
        ]
        temporary = self.path.with_name(self.path.name + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in kept))
            file.flush()
            os.fsync(file.fileno())  # before the log of all steps makes way for it
        os.replace(temporary, self.path)

    def write(self, **values):
        # JSON has no NaN
        values = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        is_first_trouble, self._waiting = not self._waiting, self._waiting + json.dumps(values).encode() + b"\n"
        trouble = self._append()
        if trouble and is_first_trouble:
            self.warn(f"warning: {self.path} cannot be written ({trouble}); the run goes on and tries again")

    def _append(self):
        """Write what waits; the error where that does not work."""
        size = os.fstat(self.file.fileno()).st_size
        try:
            if self.file.write(self._waiting) < len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._waiting = b""
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self.file.fileno(), size)  # no line in part
            return error

    def flush(self):
        """Let the lines reach the disk itself, ahead of a checkpoint: a machine that goes down leaves no checkpoint
        without the lines before it."""
        with suppress(OSError):
            os.fsync(self.file.fileno())

    def close(self):
        if self._waiting and (trouble := self._append()):
            lost = len(self._waiting.splitlines())
            self.warn(f"warning: {self.path}: its last lines, {lost}, are lost ({trouble})")
        self.file.close()


def read_metrics(path):
    """The objects of a metrics.jsonl; a last line that a crash cut short is left out."""
    lines = []
    if os.path.exists(path):
        for text in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                break  # nothing whole follows a torn line
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                break
            lines.append(line)
    return lines


class Spikes:
    """Tells a loss that jumps: more than 7 standard deviations above the mean of the up to 1,000 before it, as OLMo 2
    counts them (OLMo team 2025). It begins with what metrics.jsonl holds, so a resumed run goes on as it was."""

    LEAST, MOST = 100, 1000  # losses to compare with

    def __init__(self, metrics_path):
        losses = [line["loss"] for line in read_metrics(metrics_path) if line.get("loss") is not None]
        self._losses = np.array(losses[-self.MOST :])

    def is_one(self, loss):
        """Whether this loss, the next one of the log, is a spike."""
        before = self._losses
        if math.isfinite(loss):
            self._losses = np.append(before, loss)[-self.MOST :]
        return bool(len(before) >= self.LEAST and loss > before.mean() + 7 * before.std())


def plot_losses(metrics_path, image_path):
    """Draw training and validation loss against the step into a PNG."""
    from matplotlib.figure import Figure  # without pyplot, which is for windows and notebooks and keeps what is drawn

    lines = read_metrics(metrics_path)
    train = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    val = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if train:
        axes.plot(*zip(*train, strict=True), label="train", linewidth=0.8, color="tab:blue", alpha=0.7)
    if val:
        axes.plot(
            *zip(*val, strict=True),
            label=f"validation, last {val[-1][1]:.4f}",
            marker="o",
            markersize=3,
            color="tab:orange",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(image_path, dpi=120)
