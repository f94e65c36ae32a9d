"""How long the loop stands still for a checkpoint: async_save against a save that it waits for.

    python benchmarks/checkpoint_stall.py TEXT [rounds [saves]]

Whole processes in turn, a model of 30M parameters (360 MB a checkpoint), a checkpoint every 60 steps. TEXT: a text
file of some 100 KB or more. The loop stands still for what lies between the lines of the steps around a save and is
not the step itself. On a CPU the next step is late besides, for the writing takes what the training would have; the
last column says how much all took.
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
    """(seconds of each standstill, seconds that each next step is late, median of a step, first step to last)."""
    times = dict(step_times(lines))
    took = {
        int(match[1]): float(match[2]) / 1000
        for _, line in lines
        if (match := re.match(r"iter (\d+): .* time ([\d.]+)ms", line))
    }
    usual = statistics.median(seconds for step, seconds in took.items() if step > 2)
    saved = [step for step in times if step and step % INTERVAL == 0]
    still = [times[step] - times[step - 1] - took[step] for step in saved]
    return still, [took[step] - usual for step in saved], usual, max(times.values()) - times[0]


def main(text, rounds=3, saves=4):
    text, found = Path(text).resolve(), {"false": [], "true": []}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(rounds):
            for mode, measured in found.items():
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
    for mode, measured in found.items():
        still, late = (statistics.median(seconds for run in measured for seconds in run[i]) for i in (0, 1))
        rows.append(
            {
                "async_save": mode,
                "stands still, s": still,
                "of the blocking one": still / rows[0]["stands still, s"] if rows else 1.0,
                "next step late by, s": late,
                "a step, s": statistics.median(usual for _, _, usual, _ in measured),
                "all, s": statistics.median(total for *_, total in measured),
            }
        )
    show(f"Stall of the loop by a checkpoint, {rounds} runs of {saves} saves each", rows)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
