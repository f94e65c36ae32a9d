"""Compare GPT-2 124M on one GPU with nanoGPT: tokens/s, MFU, and tokens to the same loss.

    python benchmarks/gpu.py NANOGPT DATA [minutes]
    python benchmarks/gpu.py NANOGPT --dry        # test the script on a CPU with a tiny model

DATA is a folder with train.bin and val.bin in GPT-2's tokens, such as nanoGPT's data/openwebtext. Without network
access, TIKTOKEN_CACHE_DIR must contain the two files of GPT-2's tokenizer. Each measurement is a separate process:

1. recipes/gpt2.yaml against nanoGPT's config/train_gpt2.py: block_size 1,024, the same micro-batch size, compiled,
   bfloat16, two rounds. Tokens/s are computed from the times of the log lines. fp8 (configs/fp8.yaml) needs torchao.
2. `nanogpt-accel bench` with other micro-batch sizes, and with the full and the chunked loss, to find the best setting.
3. recipes/gpt2.yaml for the given minutes (default: 15), including the learning rate decay; then recipes/gpt2_fast.yaml
   for the same number of tokens. The result is how many tokens the second needs to reach the final loss of the first.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from side_by_side import RECIPES, ROOT, copy_nanogpt, environment, ours, show, steady_seconds, theirs, watch

from nanogpt_accel.planning.hardware import peak_flops
from nanogpt_accel.planning.sizing import flops_per_token
from nanogpt_accel.recipe import load_recipe

FULL = {
    "block_size": 1024,
    "batch_size": 16,
    "micro": 4,
    "steps": 60,
    "skip": 20,
    "log": 10,
    "shape": [],
    "device": "cuda",
    "startup_seconds": 90,
    "micro_per_run": 32,
    "eval_iters": 20,
}
DRY = {
    "block_size": 64,
    "batch_size": 4,
    "micro": 2,
    "steps": 12,
    "skip": 4,
    "log": 1,
    "device": "cpu",
    "shape": ["--n_layer=2", "--n_head=2", "--n_embd=64"],
    "startup_seconds": 0,
    "micro_per_run": 2,
    "eval_iters": 2,
}


def write_toy_data(folder):
    """Write tokens with a skewed distribution, which a model can learn."""
    ids = (50257 * np.random.default_rng(0).random(400_000) ** 6).astype(np.uint16)
    folder.mkdir()
    ids[:360_000].tofile(folder / "train.bin")
    ids[360_000:].tofile(folder / "val.bin")
    return folder


def speeds(copy, folder, data, size):
    """Measure the speed of nanoGPT and of recipes/gpt2.yaml. Return (rows of the table, tokens/s of the recipe)."""
    tokens = size["batch_size"] * size["micro"] * size["block_size"]
    # with --log_interval=1, nanoGPT waits for the GPU in every step, so both programs log less often
    common = [
        f"--batch_size={size['batch_size']}",
        f"--block_size={size['block_size']}",
        *size["shape"],
        f"--gradient_accumulation_steps={size['micro']}",
        f"--max_iters={size['steps']}",
        f"--log_interval={size['log']}",
        f"--device={size['device']}",
        "--eval_interval=1000000",
        "--eval_iters=1",
        "--warmup_iters=10",
        f"--lr_decay_iters={size['steps']}",
        f"--compile={size['device'] == 'cuda'}",
    ]
    mine = ours("gpt2.yaml", f"data_dir={data}", "overwrite=true", "out_dir=speed", "keep_last=1", *common)
    fp8 = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "configs" / "fp8.yaml"),
        *mine[1:],
    ]
    programs = {
        "nanoGPT": (theirs("config/train_gpt2.py", "--wandb_log=False", "--dataset=given", *common), copy),
        "recipes/gpt2.yaml": (mine, folder),
    }
    if size["device"] == "cuda":
        programs["recipes/gpt2.yaml in fp8"] = (fp8, folder)
    measured = {program: [] for program in programs}
    for _ in range(2):
        for program, (command, where) in programs.items():
            try:
                # there is a line every `log` steps
                measured[program].append(tokens / steady_seconds(watch(command, where), size["skip"] // size["log"]))
            except RuntimeError as error:
                if program in ("nanoGPT", "recipes/gpt2.yaml"):
                    raise
                print(error)
    overrides = dict(word.lstrip("-").split("=") for word in common[1:2] + size["shape"])
    shape = load_recipe(RECIPES / "gpt2.yaml", overrides).shape
    flops = flops_per_token(shape | {"vocab_size": 50304})
    peak = gpu_peak() if size["device"] == "cuda" else None
    rows = []
    for program, values in measured.items():
        if values:
            speed = statistics.median(values)
            rows.append(
                {
                    "program": program,
                    "tokens/s": speed,
                    "MFU": f"{flops * speed / peak:.1%}" if peak else "-",
                    "times nanoGPT's": speed / statistics.median(measured["nanoGPT"]),
                }
            )
    return rows, statistics.median(measured["recipes/gpt2.yaml"])


def gpu_peak():
    import torch

    return peak_flops(torch.cuda.get_device_name())


def best_setting(folder, data, size):
    words = [
        f"data_dir={data}",
        f"block_size={size['block_size']}",
        f"batch_size={size['batch_size']}",
        *size["shape"],
        f"device={size['device']}",
        "gradient_accumulation_steps=1",
        "compare=batch_size,loss",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "nanogpt_accel", "bench", str(RECIPES / "gpt2.yaml"), *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment(),
    )
    print("\n" + done.stdout + done.stderr[-2000:] * bool(done.returncode))  # the next part does not need its result


def tokens_to_loss(folder, data, size, minutes, speed):
    """Train both recipes. Return the table: final losses, and the tokens that each needs for the final loss of gpt2."""
    tokens = size["batch_size"] * size["micro_per_run"] * size["block_size"]  # 0.5M, as in the recipes
    steps = max(20, int((60 * minutes - size["startup_seconds"]) * speed / tokens))
    every = max(1, steps // 20)
    options = [
        f"data_dir={data}",
        f"block_size={size['block_size']}",
        f"batch_size={size['batch_size']}",
        f"gradient_accumulation_steps={size['micro_per_run']}",
        *size["shape"],
        f"device={size['device']}",
        f"max_iters={steps}",
        f"lr_decay_iters={steps}",
        f"eval_interval={every}",
        f"eval_iters={size['eval_iters']}",
        "eval_train=false",
        f"save_interval={steps}",
        "keep_last=1",
        "overwrite=true",
    ]
    losses = {}
    for recipe, own in (("gpt2", [f"warmup_iters={min(2000, steps // 10)}"]), ("gpt2_fast", [])):
        watch(ours(f"{recipe}.yaml", *options, *own, f"out_dir={recipe}"), folder)
        log = (Path(folder) / recipe / "metrics.jsonl").read_text().splitlines()
        losses[recipe] = {line["step"]: line["val_loss"] for line in map(json.loads, log) if "val_loss" in line}
    goal = losses["gpt2"][steps]
    reached = next((step for step, loss in losses["gpt2_fast"].items() if loss <= goal), None)
    share = f"{reached / steps:.0%}" if reached is not None else "not reached"
    return [
        {"recipe": "gpt2", "tokens": f"{steps * tokens:,}", "val loss": goal, "tokens to its loss": "100%"},
        {
            "recipe": "gpt2_fast",
            "tokens": f"{steps * tokens:,}",
            "val loss": losses["gpt2_fast"][steps],
            "tokens to its loss": share,
        },
    ]


def main(nanogpt, data, minutes=15.0):
    size = DRY if data == "--dry" else FULL
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data, minutes = (write_toy_data(folder / "toy"), 0.1) if size is DRY else (Path(data).resolve(), minutes)
        copy = copy_nanogpt(nanogpt, folder)
        (copy / "data" / "given").symlink_to(data)
        rows, speed = speeds(copy, folder, data, size)
        show("GPT-2 against nanoGPT: speed", rows)
        best_setting(folder, data, size)
        show("Tokens to the same loss", tokens_to_loss(folder, data, size, minutes, speed))


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(float, sys.argv[3:]))
