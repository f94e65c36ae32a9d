"""Compare the time to a validation loss of 1.88 on a CPU: shakespeare_char_fast.yaml and nanoGPT's CPU command.

    python benchmarks/time_to_loss.py NANOGPT TEXT [seeds [steps of nanoGPT]]

NANOGPT is a checkout of nanoGPT, TEXT is tinyshakespeare's input.txt. The tokens are prepared before the measurement.
Each run is a separate process: one of nanoGPT, then one of the recipe per seed. All losses are over the full validation
split. The time of the recipe ends when it prints this loss, before it saves and plots. nanoGPT's loss is measured after
its run, with `nanogpt-accel import` and `evaluate`.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from side_by_side import CPU_COMMAND, RECIPES, copy_nanogpt, environment, ours, show, theirs, watch, write_characters

LOSS, SEED = 1.88, 1337


def command(folder, *words):
    return subprocess.run(
        [sys.executable, "-m", "nanogpt_accel", *map(str, words)],
        cwd=folder,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    ).stdout


def main(nanogpt, text, seeds=5, steps=2000):
    text, recipe = Path(text).resolve(), RECIPES / "shakespeare_char_fast.yaml"
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_nanogpt(nanogpt, folder)
        write_characters(copy, text)
        command(folder, "prepare", recipe, f"corpus={text}")
        lines = watch(theirs(*CPU_COMMAND, f"--max_iters={steps}", f"--eval_interval={min(250, steps)}"), copy)
        their_seconds = lines[-1][0]
        command(
            folder,
            "import",
            copy / "out-shakespeare-char" / "ckpt.pt",
            "--to",
            "imported",
            f"tokenizer={copy}/data/shakespeare_char/meta.pkl",
        )
        loss = json.loads(command(folder, "evaluate", "imported", f"data_dir={copy}/data/shakespeare_char", "--json"))
        rows = [
            {
                "program": f"nanoGPT, {steps:,} steps",
                "seed": SEED,
                "seconds to the loss": their_seconds,
                "seconds in total": their_seconds,
                "val loss": loss["val_loss"],
                "share of nanoGPT's time": 1.0,
            }
        ]
        for seed in range(SEED, SEED + seeds):
            lines = watch(ours(recipe.name, f"corpus={text}", f"seed={seed}", f"out_dir=fast-{seed}"), folder)
            log = (Path(folder) / f"fast-{seed}" / "metrics.jsonl").read_text().splitlines()
            losses = [line["val_loss"] for line in map(json.loads, log) if "val_loss" in line]
            (seconds,) = [seconds for seconds, line in lines if line.startswith("step ")]
            rows.append(
                {
                    "program": recipe.stem,
                    "seed": seed,
                    "seconds to the loss": seconds,
                    "seconds in total": lines[-1][0],
                    "val loss": losses[-1],
                    "share of nanoGPT's time": seconds / their_seconds,
                }
            )
    fast = rows[1:]
    show(f"Time to a validation loss of {LOSS}", rows)
    print(
        f"\n{sum(row['val loss'] <= LOSS for row in fast)} of {len(fast)} seeds at or below {LOSS}; median "
        f"{statistics.median(row['seconds to the loss'] for row in fast):.1f} s"
    )


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
