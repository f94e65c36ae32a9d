"""Functions shared by the benchmarks: set up nanoGPT and its data, run timed processes, and print a table."""

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
# the CPU command of nanoGPT's README
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
    """Return processor, threads, load, torch version and date as one line."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    device = names[0] if names else platform.processor()
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return (
        f"{device}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, "
        f"{datetime.date.today()}"
    )


def copy_nanogpt(checkout, folder):
    """Copy nanoGPT's programs to a new folder, in which it writes its data and checkpoints. Return the new folder."""
    copy = Path(folder) / "nanogpt"
    (copy / "data").mkdir(parents=True)
    for name in ("train.py", "model.py", "configurator.py"):
        shutil.copy(Path(checkout) / name, copy)
    shutil.copytree(Path(checkout) / "config", copy / "config")
    return copy


def write_characters(copy, text):
    """Write the files that nanoGPT's data/shakespeare_char/prepare.py writes. copy: folder from copy_nanogpt."""
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
    """Return environment variables for a process that imports this checkout and prints without buffering."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path}


def ours(recipe, *options, command="train"):
    return [sys.executable, "-m", "nanogpt_accel", command, str(RECIPES / recipe), *map(str, options)]


def theirs(*options):
    return [sys.executable, "train.py", *map(str, options)]


def watch(command, folder):
    """Run a process and return [(seconds since the start, line of output)].

    Raises:
        RuntimeError: the process failed; the message contains the end of its output.
    """
    start = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        lines = [(time.perf_counter() - start, line.rstrip()) for line in process.stdout]
    if process.returncode:
        raise RuntimeError(
            f"{' '.join(command)}: exit status {process.returncode}\n" + "\n".join(line for _, line in lines[-15:])
        )
    return [*lines, (time.perf_counter() - start, "")]


def step_times(lines):
    """Return [(step, seconds since the start)] of the lines `iter 7: loss ...`, which both programs print."""
    return [(int(match[1]), seconds) for seconds, line in lines if (match := re.match(r"iter (\d+): loss", line))]


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
