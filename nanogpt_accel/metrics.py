"""What a run measures: throughput, MFU, memory, the file metrics.jsonl, and the plot of it."""

import errno
import json
import math
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

# Dense bf16 (fp16 on the older two) tensor-core peak in FLOP/s, from the makers' data sheets. The first name
# that is part of the device's name counts, so the more special ones stand first.
PEAK_FLOPS = {
    "GB200": 2500e12, "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
    "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "A10G": 70e12, "A10": 125e12, "A40": 150e12, "RTX 6000 Ada": 364e12, "RTX A6000": 155e12,
    "RTX 5090": 209e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "MI300X": 1307e12, "MI250X": 383e12,
    "V100": 125e12, "T4": 65e12,
}


def peak_flops(device_name):
    """Peak FLOP/s of a device by its name, or None for one that is not in the table."""
    # as words of their own: an RTX A4000 is no A40
    return next((flops for name, flops in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


def device_name(device):
    """A torch.device's name: the GPU's, or the processor's kind."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return device.type.upper()


def flops_per_token(n_params, n_layer, n_embd, block_size):
    """FLOPs of forward and backward for one token: 6 N + 12 L C T (PaLM, appendix B), as nanoGPT counts.

    n_params: parameters that multiply, that is, all but the position embedding.
    """
    return 6 * n_params + 12 * n_layer * n_embd * block_size


def peak_memory(device):
    """Bytes: the largest amount allocated on a CUDA device so far, elsewhere the process's largest resident size."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def perplexity(loss):
    """exp(loss), inf where that overflows. loss: nats a token."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss, tokens, text_bytes):
    """Bits a byte of text, comparable between tokenizers; None where the size of the text is not known."""
    return loss / math.log(2) * tokens / text_bytes if text_bytes else None


def scores(loss, tokens, text_bytes, train_loss=None, split="val", error=None):
    """What an evaluation reports, by name. loss, tokens and text_bytes: of the whole split. error: of the loss."""
    found = {"train_loss": train_loss, f"{split}_loss": loss, "standard_error": error, "perplexity": perplexity(loss),
             "bits_per_byte": bits_per_byte(loss, tokens, text_bytes)}
    return {name: value for name, value in found.items() if value is not None}


def describe(scores):
    """Scores in nanoGPT's words: train loss 1.2345, val loss 1.2345, perplexity 3.44, ..."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.{2 if name == 'perplexity' else 4}f}"
                     for name, value in scores.items())


def verdict(got, expected, tolerance):
    """Whether a validation loss is the expected one within its tolerance, in words; nats a token."""
    if abs(got - expected) <= tolerance + 1e-9:
        return "reproduced"
    return f"not reproduced, {abs(got - expected):.3f} {'higher' if got > expected else 'lower'}"


def mean_loss(model, tokens, batches, to_inputs, accelerator, progress=None):
    """Mean loss in nats a token over fixed batches, shared by all processes; the same number on each of them.

    Args:
        model: the prepared model; it is put into eval mode for the time being.
        tokens: the token file, with rows(starts, length).
        batches: a list of (starts, length), as batches.evaluation_batches makes it.
        to_inputs: rows of tokens -> the model's keyword arguments, batches.model_inputs for the device.
        accelerator: gathers the losses.
        progress: called with the number of batches that are done since the last call, by all processes.
    """
    import torch

    was_training = model.training
    model.eval()
    world, rank = accelerator.num_processes, accelerator.process_index
    shape = len(batches[0][0]), batches[0][1]  # no batch is larger than the first
    losses = []
    with torch.no_grad():
        # every process makes the same number of calls, as sharded models need; what is too many is not counted
        for i in range(-(-len(batches) // world)):
            starts, length = batches[min(i * world + rank, len(batches) - 1)]
            inputs = to_inputs(tokens.rows(starts, length + 1))
            losses.append(model(**filled_up(inputs, shape), return_logits=False).loss.float())
            if progress is not None:
                progress(min(world, len(batches) - i * world))
    model.train(was_training)
    gathered = accelerator.gather(torch.stack(losses)).view(world, -1).T.flatten().tolist()  # in order of batches
    weights = [len(starts) * length for starts, length in batches]
    return math.fsum(loss * weight for loss, weight in zip(gathered, weights, strict=False)) / sum(weights)


def filled_up(inputs, shape):
    """The model's inputs, (b, t) each, with rows and places added that do not count, up to `shape`, (B, T): a compiled
    model would be compiled again for each other shape."""
    from torch.nn import functional as F

    def fill(values, value):
        return F.pad(values, (0, shape[1] - values.shape[1], 0, shape[0] - values.shape[0]), value=value)

    return {key: fill(values, -100 if key == "shift_labels" else 0) for key, values in inputs.items()}


def window_losses(model, tokens, windows, to_inputs, accelerator, progress=None):
    """Losses of fixed windows one by one, shared by all processes; the same numbers on each of them.

    Args:
        model, tokens, to_inputs, accelerator, progress: as for mean_loss.
        windows: a list of (starts, length, counted), as batches.sliding_windows makes it.

    Returns:
        (sums, counts): nats of the predictions that count, and their number, of each window, (n,) float64.
    """
    import torch
    from torch.nn import functional as F

    model.eval()
    world, rank = accelerator.num_processes, accelerator.process_index
    most, longest = max(len(starts) for starts, _, _ in windows), max(length for _, length, _ in windows)
    found = []
    with torch.no_grad():
        for i in range(-(-len(windows) // world)):  # as many calls on every process, as in mean_loss
            starts, length, counted = windows[min(i * world + rank, len(windows) - 1)]
            inputs = to_inputs(tokens.rows(starts, length + 1))
            targets = inputs.pop("shift_labels")[:, length - counted:]
            logits = model(**filled_up(inputs, (most, longest)), use_cache=False).logits
            logits = logits[:len(starts), length - counted:length].float()
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            sums = losses.view(len(starts), counted).sum(1)
            found.append(F.pad(torch.stack([sums, torch.full_like(sums, counted)]), (0, most - len(starts))))
            if progress is not None:
                progress(min(world, len(windows) - i * world))
    gathered = accelerator.gather(torch.stack(found)).view(world, -1, 2, most).transpose(0, 1)  # in order of windows
    sums, counts = gathered.flatten(0, 1)[:len(windows)].transpose(0, 1).flatten(1).cpu().double().numpy()
    return sums[counts > 0], counts[counts > 0]


def mean_and_error(sums, counts):
    """(mean, its standard error) of losses a token, from window_losses: the windows are the sample, for the tokens of
    one are not independent of each other. The error of a ratio (Cochran 1977, chapter 2); None of a single window."""
    mean = sums.sum() / counts.sum()
    n = len(sums)
    if n < 2:
        return float(mean), None
    return float(mean), float(math.sqrt(n / (n - 1) * ((sums - mean * counts) ** 2).sum()) / counts.sum())


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
        kept = [line for line in read_metrics(self.path)
                if line["step"] < step or (line["step"] == step and "val_loss" in line)]
        temporary = self.path.with_name(self.path.name + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in kept))
            file.flush()
            os.fsync(file.fileno())  # before the log of all steps makes way for it
        os.replace(temporary, self.path)

    def write(self, **values):
        # JSON has no NaN
        values = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in values.items()}
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
        self._losses = np.array(losses[-self.MOST:])

    def is_one(self, loss):
        """Whether this loss, the next one of the log, is a spike."""
        before = self._losses
        if math.isfinite(loss):
            self._losses = np.append(before, loss)[-self.MOST:]
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
        axes.plot(*zip(*val, strict=True), label=f"validation, last {val[-1][1]:.4f}", marker="o", markersize=3,
                  color="tab:orange")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(image_path, dpi=120)
