"""Measure the time from the start of the process to the end of the first training step on a CPU, and nanoGPT's time.

    python benchmarks/start.py NANOGPT TEXT [pairs]

NANOGPT is a checkout of nanoGPT, TEXT is tinyshakespeare's input.txt. The tokens are prepared before the measurement.
The two programs alternate, with the settings of the CPU command of nanoGPT's README, and are killed after their first
step. Before that step, they evaluate 1 or 20 batches of each split. The script prints the medians of the pairs. If
other programs use the machine, the processor time is more reliable. It includes our second thread, which loads torch's
libraries.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from side_by_side import CPU_COMMAND, copy_nanogpt, environment, ours, show, theirs, write_characters

RECIPE = "shakespeare_char_cpu.yaml"


def seconds_to_first_step(command, folder):
    """Return (seconds, seconds of processor time) from the start of a process to the line of its first step."""
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("iter 0:"):
                seconds, cpu = time.perf_counter() - start, psutil.Process(process.pid).cpu_times()
                process.kill()
                return seconds, cpu.user + cpu.system
    raise RuntimeError(f"{' '.join(command)}: exit status {process.returncode} before the first step")


def main(nanogpt, text, pairs=10):
    text, rows = Path(text).resolve(), []
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_nanogpt(nanogpt, folder)
        write_characters(copy, text)
        prepare = ours(RECIPE, f"corpus={text}", command="prepare")
        subprocess.run(prepare, cwd=folder, env=environment(), check=True, stdout=subprocess.DEVNULL)
        for batches in (1, 20):
            option = f"--eval_iters={batches}"
            pairs_of_times = []
            for _ in range(pairs):
                a = seconds_to_first_step(theirs(*CPU_COMMAND, option), copy)
                own = (f"corpus={text}", "eval_train=true", "out_dir=run", "overwrite=true", option)
                pairs_of_times.append((a, seconds_to_first_step(ours(RECIPE, *own), folder)))
            row = {"batches evaluated per split": batches}
            for i, kind in enumerate(("seconds", "seconds of processor time")):
                both = [(a[i], b[i]) for a, b in pairs_of_times]
                row |= {f"nanoGPT, {kind}": statistics.median(a for a, _ in both)}
                row |= {f"ours, {kind}": statistics.median(b for _, b in both)}
                row |= {f"ratio of {kind}": statistics.median(b / a for a, b in both)}
            rows.append(row)
    show(f"Start to first step, medians of {pairs} pairs", rows)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
