"""Measure training on one GPU, next to nanoGPT and nanochat: tokens/s, MFU, peak memory, and tokens to the same loss.

    python benchmarks/gpu.py NANOGPT [--nanochat CHECKOUT] [--data FOLDER] [--seconds 540]
    python benchmarks/gpu.py NANOGPT --dry        # test the script on a CPU with tiny models

NANOGPT is a checkout of nanoGPT. FOLDER contains train.bin and val.bin in GPT-2's tokens, such as nanoGPT's
data/openwebtext. Without --data, the script tokenizes the Python source files of this machine. This requires the two
files of GPT-2's tokenizer in TIKTOKEN_CACHE_DIR. If they are missing, the script trains on random tokens and skips
nanochat. No network is needed.

Every result is appended to gpu.jsonl, in $OUT or in the current folder, as soon as it is known. The parts, in order:

1. GPT-2 (124M), block_size 1,024, bfloat16, compiled: recipes/gpt2.yaml, nanoGPT's config/train_gpt2.py, and nanochat
   with depth 12. Each of the three runs with its own training script, and is killed as soon as its speed is measured.
2. The time of each part of a step of recipes/gpt2.yaml, and a trace of two steps: gpu_trace.json, for ui.perfetto.dev.
3. The same as part 1 with about 1B parameters: 12 layers of width 2,560, so that compiling takes as long as for 124M.
4. recipes/gpt2.yaml and recipes/gpt2_fast.yaml for the same number of tokens, in the time that is left.

A program without a result within its time limit is killed, and the script continues. MFU counts FLOPs as nanoGPT does;
for nanochat, it is the MFU that nanochat prints. With the same layers, nanochat has more parameters, because it has
value embeddings. Without FlashAttention 3, nanochat is slower than it could be.
"""

import argparse
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from side_by_side import RECIPES, ROOT, copy_nanogpt, environment, machine, show

from nanogpt_accel.planning.hardware import peak_flops
from nanogpt_accel.planning.sizing import flops_per_token
from nanogpt_accel.recipe import load_recipe

FULL = {
    "device": "cuda",
    "block_size": 1024,
    "micro": 4,
    "log": 10,
    "measured_seconds": 8,
    "megabytes": 60,
    "limit": 120,  # seconds for a program, including its start
    "reserve": 130,  # seconds to keep for part 4
    "startup": 45,  # estimated seconds before the first step, in part 4
    "eval_iters": 20,
    "sizes": {
        "124M": {"shape": {"n_layer": 12, "n_head": 12, "n_embd": 768}, "batch_size": 16, "aspect_ratio": 64},
        "1B": {"shape": {"n_layer": 12, "n_head": 20, "n_embd": 2560}, "batch_size": 8, "aspect_ratio": 213},
    },
}
DRY = FULL | {
    "device": "cpu",
    "block_size": 64,
    "micro": 2,
    "log": 1,
    "measured_seconds": 0.5,
    "megabytes": 2,
    "reserve": 60,
    "startup": 30,
    "eval_iters": 2,
    "sizes": {
        "124M": {"shape": {"n_layer": 2, "n_head": 2, "n_embd": 64}, "batch_size": 4, "aspect_ratio": 64},
        "1B": {"shape": {"n_layer": 2, "n_head": 2, "n_embd": 128}, "batch_size": 4, "aspect_ratio": 64},
    },
}
STEP = re.compile(r"iter (\d+): loss|step (\d+)/\d+ ")  # log lines of nanoGPT and nanogpt_accel; of nanochat
NANOCHAT_SPECIAL = (
    "bos user_start user_end assistant_start assistant_end python_start python_end output_start output_end"
)


class Results:
    """Appends results to a file, and computes the time that is left."""

    def __init__(self, folder, seconds):
        self.file, self.deadline = Path(folder) / "gpu.jsonl", time.monotonic() + seconds

    def seconds_left(self):
        return self.deadline - time.monotonic()

    def add(self, part, **values):
        line = {"part": part, "seconds_left": round(self.seconds_left()), **values}
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        return line


# ---- data, without a network


def source_texts(megabytes):
    """Return the Python files of this machine as a list of texts."""
    texts, n_left = [], megabytes * 1e6
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in Path(root).rglob("*.py"):
            text = path.read_text(encoding="utf-8", errors="ignore")
            texts.append(text)
            n_left -= len(text)
            if n_left < 0:
                return texts
    return texts


def write_parquet(folder, texts):
    """Write the documents as nanochat expects them: the last file is the validation split."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    cut = len(texts) * 49 // 50
    for i, part in enumerate((texts[:cut], texts[cut:])):
        pq.write_table(pa.table({"text": part}), folder / f"shard_{i:05d}.parquet", row_group_size=1024)
    return folder


def write_random_tokens(folder):
    """Write random tokens with unequal frequencies, which a model can learn. Also write a meta.pkl, so that no
    tokenizer is needed. Return the folder."""
    ids = (50257 * np.random.default_rng(0).random(4_000_000) ** 6).astype(np.uint16)
    folder.mkdir()
    ids[:3_600_000].tofile(folder / "train.bin")
    ids[3_600_000:].tofile(folder / "val.bin")
    itos = {i: chr(256 + i) for i in range(50304)}
    meta = {"vocab_size": 50304, "itos": itos, "stoi": {char: i for i, char in itos.items()}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def write_data(folder, megabytes):
    """Return (folder of token files, folder of parquet files or None)."""
    if not Path(os.environ.get("TIKTOKEN_CACHE_DIR") or "?").is_dir():
        print("TIKTOKEN_CACHE_DIR is not set to a folder: training on random tokens, without nanochat")
        return write_random_tokens(folder / "tokens"), None
    parquet = write_parquet(folder / "nanochat_base" / "base_data_climbmix", source_texts(megabytes))
    words = [f"corpus={parquet}", f"data_dir={folder / 'tokens'}", "val_fraction=0.02"]
    command = [sys.executable, "-m", "nanogpt_accel", "prepare", str(RECIPES / "gpt2.yaml"), *words]
    if subprocess.run(command, env=environment()).returncode:
        print("training on random tokens, without nanochat")
        return write_random_tokens(folder / "random_tokens"), None
    return folder / "tokens", parquet


def write_nanochat_tokenizer(folder):
    """Write GPT-2's tokenizer with nanochat's special tokens, in the files that nanochat reads."""
    import tiktoken
    import torch

    gpt2 = tiktoken.get_encoding("gpt2")
    # 50,304 entries, as many as in the other programs
    names = [f"<|{name}|>" for name in NANOCHAT_SPECIAL.split()]
    names += [f"<|unused_{i}|>" for i in range(50304 - 50256 - len(names))]
    special = {name: 50256 + i for i, name in enumerate(names)}
    encoding = tiktoken.Encoding(
        "nanochat", pat_str=gpt2._pat_str, mergeable_ranks=gpt2._mergeable_ranks, special_tokens=special
    )
    n_bytes = [len(encoding.decode_single_token_bytes(i)) for i in range(50256)] + [0] * len(special)
    folder.mkdir(parents=True)
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    torch.save(torch.tensor(n_bytes, dtype=torch.int32), folder / "token_bytes.pt")


# ---- run a program until its speed is measured


def run_steps(command, folder, limit, skip, seconds, **variables):
    """Run a training program until it has logged its steps for some seconds, and return the results.

    Args:
        limit: seconds after which the program is killed in any case.
        skip: first step to measure. seconds: how long to measure.

    Returns:
        dict with "seconds_per_step", "peak_memory" in bytes, "first_step" (seconds from the start of the process to the
        log line of the first step) and "last_line".

    Raises:
        RuntimeError: no result within the limit; the message contains the end of the output.
    """
    start, steps, memory, lines = time.perf_counter(), [], None, []
    command = [sys.executable, str(ROOT / "benchmarks" / "with_peak_memory.py"), *map(str, command)]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that end() also kills the processes that compile
    )

    def end():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    timer = threading.Timer(limit, end)
    timer.start()
    try:
        for line in process.stdout:
            lines.append(line.rstrip())
            if match := STEP.match(line):
                steps.append((int(match[1] or match[2]), time.perf_counter(), line.rstrip()))
            elif match := re.match(r"peak memory: (\d+)", line):
                memory = int(match[1])
                counted = [step for step in steps if step[0] >= skip]
                if len(counted) > 2 and counted[-1][1] - counted[0][1] > seconds:
                    break
    finally:
        timer.cancel()
        end()
        process.wait()
        process.stdout.close()
    counted = [step for step in steps if step[0] >= skip]
    if len(counted) < 2 or process.returncode > 0:  # the status is negative if end() killed it
        output = "\n".join(line for line in lines if line and "peak memory" not in line)
        raise RuntimeError(
            f"no result after {time.perf_counter() - start:.0f} s; its output ends with:\n{output[-3000:]}"
        )
    return {
        "seconds_per_step": (counted[-1][1] - counted[0][1]) / (counted[-1][0] - counted[0][0]),
        "peak_memory": memory,
        "first_step": steps[0][1] - start,
        "last_line": counted[-1][2],
    }


def gpu_peak(device):
    import torch

    return peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None


# ---- parts 1 and 3: speed


def programs(size, settings, nanochat, data):
    """Return {program: (command, folder, environment variables)} for one model size. settings: FULL or DRY."""
    device, block_size, batch_size = settings["device"], settings["block_size"], size["batch_size"]
    tokens = batch_size * settings["micro"] * block_size
    is_compiled = device == "cuda"
    common = [
        *(f"--{key}={value}" for key, value in size["shape"].items()),
        f"--batch_size={batch_size}",
        f"--block_size={block_size}",
        f"--gradient_accumulation_steps={settings['micro']}",
        f"--log_interval={settings['log']}",  # not every step, because nanoGPT waits for the GPU when it logs
        f"--device={device}",
        f"--compile={is_compiled}",
        "--max_iters=1000000",
        "--lr_decay_iters=1000000",
        "--eval_interval=1000000",
        "--eval_iters=1",
    ]
    own = [f"data_dir={data}", "eval_first=false", "overwrite=true", "sample_tokens=0", "out_dir=speed"]
    found = {
        "recipes/gpt2.yaml": (["-m", "nanogpt_accel.train", RECIPES / "gpt2.yaml", *own, *common], ".", {}),
        "nanoGPT": (
            ["train.py", "config/train_gpt2.py", "--wandb_log=False", "--dataset=given", *common],
            "nanogpt",
            {} if is_compiled else {"TORCHDYNAMO_DISABLE": "1"},
        ),
    }
    if nanochat:
        words = [
            f"--depth={size['shape']['n_layer']}",
            f"--aspect-ratio={size['aspect_ratio']}",
            f"--max-seq-len={block_size}",
            f"--device-batch-size={batch_size}",
            f"--total-batch-size={tokens}",
            f"--device-type={device}",
            "--window-pattern=L",  # without flash attention 3, there is no efficient sliding window
            "--num-iterations=1000000",
            "--eval-every=-1",
            "--core-metric-every=-1",
            "--sample-every=-1",
        ]
        # offline: use flash attention 3 if it is in the cache, and do not try to download it
        variables = {"NANOCHAT_BASE_DIR": str(Path("nanochat_base").absolute()), "HF_HUB_OFFLINE": "1"}
        variables |= {} if is_compiled else {"TORCHDYNAMO_DISABLE": "1"}
        found["nanochat"] = (["-m", "scripts.base_train", *words], "nanochat", variables)
    return found


def speeds(part, size, settings, nanochat, data, results, reserve):
    """Measure the programs with one model size, and show a table. Return tokens/s of recipes/gpt2.yaml, or None."""
    overrides = size["shape"] | {"block_size": settings["block_size"]}
    flops = flops_per_token(load_recipe(RECIPES / "gpt2.yaml", overrides).shape | {"vocab_size": 50304})
    tokens = size["batch_size"] * settings["micro"] * settings["block_size"]
    peak, rows = gpu_peak(settings["device"]), []
    for program, (command, folder, variables) in programs(size, settings, nanochat, data).items():
        limit = min(settings["limit"], results.seconds_left() - reserve)
        if limit < 20:
            results.add(part, program=program, error="no time left")
            continue
        try:
            skip = 2 * settings["log"]
            measured = run_steps(command, folder, limit, skip, settings["measured_seconds"], **variables)
        except RuntimeError as error:
            results.add(part, program=program, error=str(error))
            continue
        speed = tokens / measured["seconds_per_step"]
        mfu = flops * speed / peak if peak else None
        if program == "nanochat":
            printed = re.search(r"bf16_mfu: ([\d.]+)", measured["last_line"])
            mfu = float(printed[1]) / 100 if peak and printed else None
        row = {
            "program": program,
            "tokens_per_second": speed,
            "mfu": mfu,
            "peak_memory": measured["peak_memory"],
            "first_step": measured["first_step"],
        }
        results.add(part, tokens_per_step=tokens, **row)
        rows.append(row)
    if rows:
        show(f"{part}: speed", [_readable(row) for row in rows])
    return next((row["tokens_per_second"] for row in rows if row["program"] == "recipes/gpt2.yaml"), None)


def _readable(row):
    return {
        "program": row["program"],
        "tokens/s": row["tokens_per_second"],
        "MFU": f"{row['mfu']:.1%}" if row["mfu"] else "-",
        "peak GB": row["peak_memory"] / 1e9 if row["peak_memory"] else "-",
        "start to first step, s": row["first_step"],
    }


# ---- part 2: the parts of a step


def breakdown(settings, data, results, trace):
    size = settings["sizes"]["124M"]
    words = [
        f"data_dir={data}",
        f"block_size={settings['block_size']}",
        f"batch_size={size['batch_size']}",
        *(f"{key}={value}" for key, value in size["shape"].items()),
        f"device={settings['device']}",
        "gradient_accumulation_steps=1",
        f"profile={trace}",
        "json=true",
    ]
    command = [sys.executable, "-m", "nanogpt_accel", "bench", str(RECIPES / "gpt2.yaml"), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=settings["limit"])
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        figures = json.loads(done.stdout)["variants"][0]
        results.add("parts of a step", trace=str(trace), **figures)
    except (RuntimeError, subprocess.TimeoutExpired, ValueError) as error:
        results.add("parts of a step", error=str(error))


# ---- part 4: tokens to the same loss


def equal_tokens(settings, data, speed, results):
    """Train both recipes for the same number of tokens, in the time that is left. Compare their validation losses after
    the last step that both of them have evaluated."""
    size, n_micro = settings["sizes"]["124M"], 2 * settings["micro"]
    tokens = size["batch_size"] * n_micro * settings["block_size"]
    each = (results.seconds_left() - 10) / 2
    steps = min(5000, int((each - settings["startup"]) * 0.85 * speed / tokens))
    if steps < 20:
        return results.add("equal tokens", error="no time left")
    if settings is DRY:
        steps = 20
    every = max(1, steps // 10)
    options = {
        "data_dir": data,
        "block_size": settings["block_size"],
        "batch_size": size["batch_size"],
        "gradient_accumulation_steps": n_micro,
        **({} if settings["device"] == "cuda" else size["shape"]),
        "device": settings["device"],
        "max_iters": steps,
        "lr_decay_iters": steps,
        "log_interval": 10,
        "eval_interval": every,
        "eval_iters": settings["eval_iters"],
        "eval_first": "false",
        "save_interval": steps,
        "sample_tokens": 0,
        "keep_last": 1,
        "overwrite": "true",
    }
    losses = {}
    for recipe, own in (("gpt2", {"warmup_iters": min(2000, steps // 10)}), ("gpt2_fast", {})):
        words = [f"{key}={value}" for key, value in (options | own | {"out_dir": recipe}).items()]
        command = ["-m", "nanogpt_accel.train", RECIPES / f"{recipe}.yaml", *words]
        error = None
        try:
            run_steps(command, ".", each if recipe == "gpt2" else results.seconds_left(), 0, 1e6)
        except RuntimeError as failure:
            error = str(failure)
        log = Path(recipe) / "metrics.jsonl"
        lines = map(json.loads, log.read_text().splitlines() if log.exists() else [])
        losses[recipe] = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
        results.add("equal tokens", recipe=recipe, tokens_per_step=tokens, val_losses=losses[recipe], error=error)
    common = sorted(losses["gpt2"].keys() & losses["gpt2_fast"].keys())
    if common:
        goal, last = losses["gpt2"][common[-1]], common[-1]
        reached = next((step for step in common if losses["gpt2_fast"][step] <= goal), None)
        show(
            f"After {last * tokens:,} tokens",
            [
                {"recipe": "gpt2", "val loss": goal, "tokens to its loss": "100%"},
                {
                    "recipe": "gpt2_fast",
                    "val loss": losses["gpt2_fast"][last],
                    "tokens to its loss": f"{reached / last:.0%}" if reached else "not reached",
                },
            ],
        )


def copy_nanochat(checkout, folder):
    """Copy nanochat's package and scripts, and add empty modules for imported packages that are not needed here."""
    for name in ("nanochat", "scripts", "tasks"):
        shutil.copytree(Path(checkout) / name, folder / "nanochat" / name)
    for name in ("wandb", "rustbpe"):
        if find_spec(name) is None:
            (folder / "nanochat" / f"{name}.py").touch()
    write_nanochat_tokenizer(folder / "nanochat_base" / "tokenizer")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanogpt", type=Path, metavar="NANOGPT")
    parser.add_argument("--nanochat", type=Path, metavar="CHECKOUT")
    parser.add_argument("--data", type=Path, metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exception, so that run_steps kills its program
    settings = DRY if options.dry else FULL
    out = Path(os.environ.get("OUT") or ".").resolve()
    results = Results(out, options.seconds)
    results.add("start", machine=machine())
    given = {key: path.resolve() for key, path in vars(options).items() if isinstance(path, Path)}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        folder = Path(folder)
        data, parquet = (given["data"], None) if "data" in given else write_data(folder, settings["megabytes"])
        (copy_nanogpt(given["nanogpt"], folder) / "data" / "given").symlink_to(data)
        nanochat = "nanochat" in given and parquet is not None
        if nanochat:
            try:
                copy_nanochat(given["nanochat"], folder)
            except (ImportError, OSError, AttributeError) as error:
                results.add("124M", program="nanochat", error=str(error))
                nanochat = False
        sizes, reserve = settings["sizes"], settings["reserve"]
        speed = speeds("124M", sizes["124M"], settings, nanochat, data, results, reserve)
        if results.seconds_left() > reserve + 60:
            breakdown(settings, data, results, out / "gpu_trace.json")
        speeds("1B", sizes["1B"], settings, nanochat, data, results, reserve)
        if speed:
            equal_tokens(settings, data, speed, results)
        os.chdir(ROOT)
    return 0 if speed else 1


if __name__ == "__main__":
    sys.exit(main())
