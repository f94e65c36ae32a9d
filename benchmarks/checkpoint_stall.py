"""How long the loop stands still for a checkpoint: async_save against a save that it waits for.

    python benchmarks/checkpoint_stall.py TEXT [rounds [saves]]

Whole processes in turn, a model of 30M parameters (360 MB a checkpoint), a checkpoint every 20 steps. TEXT: a text
file of some 100 KB or more. A stall is the time between the lines of the steps around a save, less the median time
between lines without one. Steps beside a background save are slower; the last column says how much all took.
"""

import statistics
import sys
import tempfile
from pathlib import Path

from side_by_side import ours, show, step_times, watch

INTERVAL = 20
MODEL = ("n_layer=9", "n_head=8", "n_embd=512", "block_size=32", "batch_size=1", "pad_vocab_to_multiple_of=4096")


def stalls(lines):
    """(seconds of each stall, median seconds of a step, seconds from the first step to the last)."""
    times = dict(step_times(lines))
    gaps = {step: times[step] - times[step - 1] for step in times if step - 1 in times and step > 2}
    usual = statistics.median(gap for step, gap in gaps.items() if step % INTERVAL)
    return [gap - usual for step, gap in gaps.items() if step % INTERVAL == 0], usual, max(times.values()) - times[0]


def main(text, rounds=3, saves=4):
    text, found = Path(text).resolve(), {"false": [], "true": []}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(rounds):
            for mode, measured in found.items():
                lines = watch(ours("shakespeare_char_cpu.yaml", f"corpus={text}", f"out_dir={mode}-{i}", *MODEL,
                                   f"max_iters={INTERVAL * (saves + 1)}", "eval_interval=1000000", "eval_iters=1",
                                   "eval_first=false", f"save_interval={INTERVAL}", "keep_last=1", "sample_tokens=0",
                                   f"async_save={mode}"), folder)
                measured.append(stalls(lines))
    rows = []
    for mode, measured in found.items():
        stall = statistics.median(seconds for run, _, _ in measured for seconds in run)
        rows.append({"async_save": mode, "stall, s": stall,
                     "of the blocking one": stall / rows[0]["stall, s"] if rows else 1.0,
                     "longest, s": max(seconds for run, _, _ in measured for seconds in run),
                     "a step, s": statistics.median(usual for _, usual, _ in measured),
                     "all, s": statistics.median(total for _, _, total in measured)})
    show(f"Stall of the loop by a checkpoint, {rounds} runs of {saves} saves each", rows)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
