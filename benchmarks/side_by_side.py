"""What the benchmarks beside nanoGPT share: its folder and data, whole processes that are watched, and the table."""

import datetime
import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
# what nanoGPT's README says for a CPU, after config/train_shakespeare_char.py
CPU_COMMAND = [
    "config/train_shakespeare_char.py",
    "--device=cpu",
    "--compile=False",
    "--eval_iters=20",
    "--log_interval=1",
    "--block_size=64",
    "--batch_size=12",
    "--n_layer=4",
    "--n_head=4",
    "--n_embd=128",
    "--lr_decay_iters=2000",
    "--dropout=0.0",
]


def machine():
    """One line: processor, threads, torch, date."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    what = names[0] if names else platform.processor()
    if torch.cuda.is_available():
        what = torch.cuda.get_device_name()
    return (
        f"{what}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, "
        f"{datetime.date.today()}"
    )


def copy_nanogpt(checkout, folder):
    """A copy of nanoGPT's programs in which to leave data and checkpoints; returns its path."""
    copy = Path(folder) / "nanogpt"
    (copy / "data").mkdir(parents=True)
    for name in ("train.py", "model.py", "configurator.py"):
        shutil.copy(Path(checkout) / name, copy)
    shutil.copytree(Path(checkout) / "config", copy / "config")
    return copy


def write_characters(copy, text):
    """The files that data/shakespeare_char/prepare.py writes, without its download."""
    text = Path(text).read_text(encoding="utf-8")
    chars = sorted(set(text))
    stoi = {char: i for i, char in enumerate(chars)}
    ids, cut = np.array([stoi[char] for char in text], dtype=np.uint16), int(len(text) * 0.9)
    folder = copy / "data" / "shakespeare_char"
    folder.mkdir()
    ids[:cut].tofile(folder / "train.bin")
    ids[cut:].tofile(folder / "val.bin")
    meta = {"vocab_size": len(chars), "stoi": stoi, "itos": dict(enumerate(chars))}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def environment():
    """The variables of a process that imports this checkout and prints its lines at once."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path}


def ours(recipe, *options):
    return [sys.executable, "-m", "nanogpt_accel.train", str(RECIPES / recipe), *map(str, options)]


def theirs(*options):
    return [sys.executable, "train.py", *map(str, options)]


def watch(command, folder):
    """Run a process to its end; returns [(seconds since its start, line of its output)].

    Raises:
        RuntimeError: it failed; the message holds the end of its output.
    """
    began = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        lines = [(time.perf_counter() - began, line.rstrip()) for line in process.stdout]
    if process.returncode:
        raise RuntimeError(
            f"{' '.join(command)}: exit status {process.returncode}\n" + "\n".join(line for _, line in lines[-15:])
        )
    return [*lines, (time.perf_counter() - began, "")]


def step_times(lines):
    """[(step, seconds since the start)] from the lines `iter 7: loss ...`, which both programs print."""
    return [(int(match[1]), seconds) for seconds, line in lines if (match := re.match(r"iter (\d+): loss", line))]


def steady_seconds(lines, skip):
    """Mean seconds of a step after the first `skip` ones."""
    (first, start), (last, end) = step_times(lines)[skip], step_times(lines)[-1]
    return (end - start) / (last - first)


def show(title, rows):
    """Print a table. rows: dictionaries with the same keys."""
    print(f"\n{title}\n{machine()}\n")
    print("| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(_cell, row.values())) + " |")


def _cell(value):
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
