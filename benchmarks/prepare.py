"""Compare the speed of `prepare` with nanoGPT's script and with tiktoken alone, on a parquet file of Python source.

    python benchmarks/prepare.py [rounds [megabytes]]

Each measurement is a separate process: `nanogpt-accel prepare`; a copy of nanoGPT's data/openwebtext/prepare.py, which
reads the same file with one process per core; and tiktoken alone. For tiktoken, the time excludes startup, reading and
writing. Of three configurations, the fastest one counts: threads, threads with one Encoding each, or processes. The
file contains the given number of megabytes (default: 31.5) of installed Python sources. The script prints seconds and
the medians of the ratios. If other programs use the machine, trust the ratio of the processor times more.
"""

import os
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

RECIPE = "data: {{corpus: {file}, tokenizer: gpt2, val_fraction: 0.0005, data_dir: {out}}}\n"
NANOGPT = """
import os, sys
import numpy as np
import tiktoken
from datasets import load_dataset
file, out = sys.argv[1:]
enc = tiktoken.get_encoding("gpt2")
dataset = load_dataset("parquet", data_files=file, cache_dir=out)
split = dataset["train"].train_test_split(test_size=0.0005, seed=2357, shuffle=True)
split["val"] = split.pop("test")
def process(example):
    ids = enc.encode_ordinary(example["text"]) + [enc.eot_token]
    return {"ids": ids, "len": len(ids)}
tokenized = split.map(process, remove_columns=["text"], num_proc=os.cpu_count())
for name, dset in tokenized.items():
    length = np.sum(dset["len"], dtype=np.uint64)
    arr = np.memmap(os.path.join(out, name + ".bin"), dtype=np.uint16, mode="w+", shape=(length,))
    idx, total = 0, min(1024, len(dset))
    for i in range(total):
        batch = dset.shard(num_shards=total, index=i, contiguous=True).with_format("numpy")
        batch = np.concatenate(batch["ids"])
        arr[idx : idx + len(batch)] = batch
        idx += len(batch)
    arr.flush()
"""
TIKTOKEN = """
import os, sys, threading, time
import pyarrow.parquet as pq
import tiktoken
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
texts = pq.read_table(sys.argv[1])["text"].to_pylist()
enc, n = tiktoken.get_encoding("gpt2"), os.cpu_count()
def encode(texts, enc=enc):
    for text in texts:
        enc.encode_to_numpy(text, disallowed_special=())
def ready():
    own.enc = tiktoken.Encoding("own", pat_str=enc._pat_str, mergeable_ranks=enc._mergeable_ranks,
                                special_tokens=enc._special_tokens)
    barrier.wait()
encode(texts[:2])
parts, own, barrier, seconds = [texts[i::4 * n] for i in range(4 * n)], threading.local(), threading.Barrier(n), []
for work in (encode, lambda texts: encode(texts, own.enc)):
    with ThreadPoolExecutor(n, initializer=ready) as pool:
        list(pool.map(lambda i: own.enc, range(n)))
        start = time.perf_counter()
        list(pool.map(work, parts))
        seconds.append(time.perf_counter() - start)
start = time.perf_counter()
workers = [get_context("fork").Process(target=encode, args=(texts[i::n],)) for i in range(n)]
for worker in workers: worker.start()
for worker in workers: worker.join()
print(*seconds, time.perf_counter() - start)
"""


def write_corpus(path, n_bytes):
    texts, size = [], 0
    for folder in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for file in sorted(Path(folder).rglob("*.py")):
            if size < n_bytes and (text := file.read_bytes().decode("utf-8", errors="ignore")):
                texts.append(text)
                size += len(text.encode())
    pq.write_table(pa.table({"text": texts}), path, row_group_size=500)
    print(f"{len(texts):,} documents, {size / 1e6:.1f} MB")


def run(*command):
    """Run a process. Return its seconds, its processor time including its child processes, and its output."""
    start, before = time.perf_counter(), os.times()
    done = subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True, text=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, cpu, done.stdout


def main(rounds=3, megabytes=31.5):
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    speedups, cpu_ratios, shares = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        file = folder / "corpus.parquet"
        write_corpus(file, megabytes * 1e6)
        for i in range(rounds):
            recipe = folder / "recipe.yaml"
            recipe.write_text(RECIPE.format(file=file, out=folder / f"ours{i}"))
            ours, our_cpu, output = run("-m", "nanogpt_accel", "prepare", recipe)
            (folder / f"theirs{i}").mkdir()
            theirs, their_cpu, _ = run("-c", NANOGPT, file, folder / f"theirs{i}")
            configurations = [float(word) for word in run("-c", TIKTOKEN, file)[2].split()]
            alone = min(configurations)
            tokenizing = float(re.search(r"([\d.]+) s \(", output)[1])  # the time that prepare prints
            speedups.append(theirs / ours)
            cpu_ratios.append(their_cpu / our_cpu)
            shares.append(alone / tokenizing)
            print(
                f"prepare {ours:.1f} s ({our_cpu:.1f} s of processor time), including {tokenizing:.1f} s for text to "
                f"files; nanoGPT {theirs:.1f} s ({their_cpu:.1f} s); tiktoken alone "
                "{:.1f}, {:.1f} and {:.1f} s".format(*configurations),
                flush=True,
            )
    print(
        f"medians: {statistics.median(speedups):.2f} times the speed of nanoGPT, with 1/"
        f"{statistics.median(cpu_ratios):.2f} of its processor time; {statistics.median(shares):.0%} of the speed of "
        "tiktoken alone"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *map(float, sys.argv[2:3]))
