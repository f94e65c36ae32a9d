"""Measure how long a checkpoint blocks the training loop, with and without async_save.

    python benchmarks/checkpoint_stall.py TEXT [rounds [saves]]

Each measurement is a separate process that trains a model of 30M parameters (360 MB per checkpoint) and saves every 60
steps. TEXT is a text file of at least 100 KB. The blocked time is the time from the log line before a save to the one
after it, minus the time of the step between them. On a CPU, the next step is also slower, because writing uses the same
cores. The last column is the time from the first to the last step of a run.
"""

import re
import statistics
import sys
import tempfile
from pathlib import Path

from side_by_side import ours, show, step_times, watch

INTERVAL = 60
MODEL = ("n_layer=9", "n_head=8", "n_embd=512", "block_size=32", "batch_size=1", "pad_vocab_to_multiple_of=4096")


def stalls(lines):
    """Return (blocked times, delays, median step time, time from the first to the last step) of a run, in seconds.

    blocked times: one per save. delays: how much longer than the median the step after each save takes.
    """
    times = dict(step_times(lines))
    step_seconds = {
        int(match[1]): float(match[2]) / 1000
        for _, line in lines
        if (match := re.match(r"iter (\d+): .* time ([\d.]+)ms", line))
    }
    median = statistics.median(seconds for step, seconds in step_seconds.items() if step > 2)
    saved = [step for step in times if step and step % INTERVAL == 0]
    blocked = [times[step] - times[step - 1] - step_seconds[step] for step in saved]
    return blocked, [step_seconds[step] - median for step in saved], median, max(times.values()) - times[0]


def main(text, rounds=3, saves=4):
    text, runs = Path(text).resolve(), {"false": [], "true": []}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(rounds):
            for mode, measured in runs.items():
                lines = watch(
                    ours(
                        "shakespeare_char_cpu.yaml",
                        f"corpus={text}",
                        f"out_dir={mode}-{i}",
                        *MODEL,
                        f"max_iters={INTERVAL * (saves + 1)}",
                        "eval_interval=1000000",
                        "eval_iters=1",
                        "eval_first=false",
                        f"save_interval={INTERVAL}",
                        "keep_last=1",
                        "sample_tokens=0",
                        f"async_save={mode}",
                    ),
                    folder,
                )
                measured.append(stalls(lines))
    rows = []
    for mode, measured in runs.items():
        blocked, delay = (statistics.median(seconds for run in measured for seconds in run[i]) for i in (0, 1))
        rows.append(
            {
                "async_save": mode,
                "loop blocked, s": blocked,
                "relative": blocked / rows[0]["loop blocked, s"] if rows else 1.0,
                "delay of the next step, s": delay,
                "step, s": statistics.median(median for _, _, median, _ in measured),
                "run, s": statistics.median(total for *_, total in measured),
            }
        )
    show(f"Time that a checkpoint blocks the loop, {rounds} runs with {saves} saves each", rows)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
