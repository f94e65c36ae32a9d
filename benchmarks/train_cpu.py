"""Compare training speed on a CPU with nanoGPT, for the models of nanoGPT's CPU setting and of its GPU setting.

    python benchmarks/train_cpu.py NANOGPT TEXT [rounds [steps [steps of the larger model]]]

NANOGPT is a checkout of nanoGPT, TEXT is tinyshakespeare's input.txt. Each measurement is a separate process, which
evaluates 20 training and 20 validation batches before the first step. nanoGPT runs without torch.compile, as in its
README; the small model runs a second time with torch.compile. On CPUs with AMX, nanogpt_accel uses bfloat16 by default,
while nanoGPT uses float32, so a second run of nanogpt_accel uses float32 too.

The script prints the medians of the rounds: tokens/s without the first steps, from the times of the log lines, and
seconds from the start of the process to the first step.
"""

import statistics
import sys
import tempfile
from pathlib import Path

from side_by_side import (
    CPU_COMMAND,
    copy_nanogpt,
    ours,
    show,
    steady_seconds,
    step_times,
    theirs,
    watch,
    write_characters,
)

SMALL = "4 layers of 128, block 64, batch 12"
LARGE = "6 layers of 384, block 256, batch 16"
LARGER = ("--block_size=256", "--batch_size=16", "--n_layer=6", "--n_head=6", "--n_embd=384")


def main(nanogpt, text, rounds=5, steps=250, larger_steps=30):
    text, rows = Path(text).resolve(), []
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_nanogpt(nanogpt, folder)
        write_characters(copy, text)
        for name, n, shape, tokens, skip in (
            (SMALL, steps, (), 12 * 64, 10),
            (LARGE, larger_steps, LARGER, 16 * 256, 3),
        ):
            programs = ["nanoGPT", *["nanoGPT --compile=True"] * (name == SMALL), "ours", "ours mixed_precision=no"]
            speeds, starts = {program: [] for program in programs}, {program: [] for program in programs}
            for _ in range(rounds):
                no_more_evaluations = f"--eval_interval={10 * n}"
                for program in programs:
                    _, *own = program.split()
                    if program.startswith("nanoGPT"):
                        lines = watch(theirs(*CPU_COMMAND, *shape, f"--max_iters={n}", no_more_evaluations, *own), copy)
                    else:
                        options = (
                            f"corpus={text}",
                            "out_dir=run",
                            "overwrite=true",
                            f"max_iters={n}",
                            "sample_tokens=0",
                            "keep_last=1",
                            *shape,
                            no_more_evaluations,
                            *own,
                        )
                        lines = watch(ours("shakespeare_char_cpu.yaml", *options), folder)
                    speeds[program].append(tokens / steady_seconds(lines, skip))
                    starts[program].append(step_times(lines)[0][1])
            ratios = {
                program: [a / b for a, b in zip(speeds[program], speeds["nanoGPT"], strict=True)]
                for program in programs
            }
            rows += [
                {
                    "model": name,
                    "program": program,
                    "tokens/s": statistics.median(speeds[program]),
                    "times nanoGPT's (median of pairs)": statistics.median(ratios[program]),
                    "seconds to the first step": statistics.median(starts[program]),
                }
                for program in speeds
            ]
    show(f"Training on the CPU, {rounds} rounds", rows)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
