"""The three doors lead to one function, and two processes are two: launched as a user launches them."""

import contextlib
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nanogpt_accel
from nanogpt_accel.__main__ import main
from nanogpt_accel.tracking.metrics_log import read_metrics

LIMIT = 120  # seconds for one launch
STEPS = 4
RECIPE = f"""
data: {{corpus: text.txt, tokenizer: char, val_fraction: 0.1}}
model: {{n_layer: 2, n_embd: 32, n_head: 2, block_size: 32, dropout: 0.2}}
optimizer: {{learning_rate: 1e-2, warmup_iters: 2}}
train: {{batch_size: 4, gradient_accumulation_steps: 4, max_iters: {STEPS}, eval_interval: 2, eval_iters: 3,
         device: cpu, mixed_precision: no}}
"""
DOORS = {
    "command": None,  # nanogpt-accel, whose entry point is called in this process
    "module": ["-m", "nanogpt_accel.train"],
    "accelerate": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "-m", "nanogpt_accel.train"],
    # two processes on a CPU, FACTS.md: with --cpu alone it would silently be one
    "two": [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
        "--main_process_port=0",
        "-m",
        "nanogpt_accel.train",
    ],
}


def here(folder, argv):
    """main(argv) in that folder, with one thread, as the launched ones have."""
    threads, out = torch.get_num_threads(), io.StringIO()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
            patch.chdir(folder)
            status = main(argv)
    finally:
        torch.set_num_threads(threads)
    return subprocess.CompletedProcess(argv, status, out.getvalue(), "")


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """launched(door, ...) runs the recipe through a door in a folder of its own; returns the folder and the output."""

    def launch(door, *options):
        folder = tmp_path_factory.mktemp(door)
        draw = random.Random(4)
        (folder / "text.txt").write_text("".join(draw.choice("abcdefgh ") for _ in range(20_000)))
        (folder / "latin.txt").write_bytes("Übung ".encode("latin-1") * 99)
        (folder / "tiny.yaml").write_text(RECIPE)
        if door == "command":
            return folder, here(folder, ["train", "tiny.yaml", *options])
        env = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
        env |= {
            "OMP_NUM_THREADS": "1",
            "HF_HOME": str(folder / "no accelerate config"),
            "PYTHONPATH": str(Path(nanogpt_accel.__file__).parents[1]),
        }
        if door == "two":
            env["ACCELERATE_USE_CPU"] = "true"
        done = subprocess.run(
            [sys.executable, *DOORS[door], "tiny.yaml", *options],
            cwd=folder,
            env=env,
            text=True,
            capture_output=True,
            timeout=LIMIT,
        )
        return folder, done

    return launch


@pytest.fixture(scope="module")
def runs(launched):
    """{door: (run folder, what it printed)} of all the doors, each on data that were not prepared before."""
    found = {}
    for door in DOORS:
        folder, done = launched(door)
        assert done.returncode == 0, done.stderr
        found[door] = (folder / "runs" / "tiny", done.stdout)
    return found


def numbers(run):
    return [
        {k: v for k, v in line.items() if k not in ("tokens_per_second", "mfu", "peak_memory")}
        for line in read_metrics(run / "metrics.jsonl")
    ]


def trainer(run):
    return json.loads((run / f"checkpoint-{STEPS:06d}" / "state" / "trainer.json").read_text())


def test_three_doors_to_one_function(runs):
    first = runs["command"][0]
    assert len(numbers(first)) == STEPS + 3
    for door in ("module", "accelerate"):
        run = runs[door][0]
        assert numbers(run) == numbers(first)
        model = "checkpoint-000004/model.safetensors"
        assert (run / model).read_bytes() == (first / model).read_bytes()
        assert trainer(run) == trainer(first)
    assert trainer(first)["processes"] == 1


def test_two_launched_are_two(runs):
    run, out = runs["two"]
    assert trainer(run)["processes"] == 2
    (arithmetic,) = [line for line in out.splitlines() if line.startswith("batch: ")]
    assert "512 tokens a step" in arithmetic and "512 tokens a step" in runs["command"][1]


def test_two_do_what_one_does(runs):
    one, two = numbers(runs["command"][0]), numbers(runs["two"][0])
    assert [list(line) for line in one] == [list(line) for line in two]
    assert max(abs(a[key] - b[key]) for a, b in zip(one, two, strict=True) for key in a) < 1e-5


def test_missing_data_are_prepared_once(runs):
    for run, out in runs.values():
        (folder,) = (run.parents[1] / "data").iterdir()
        (line,) = [line for line in out.splitlines() if line.startswith("data/")]
        assert "B of text" in line and line.startswith(f"data/{folder.name}")
        assert sorted(file.name for file in folder.iterdir()) == [
            "manifest.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "train.bin",
            "val.bin",
        ]


def test_one_process_speaks(runs):
    """Two processes print what one prints: no line twice, and the same ones."""
    one, two = ([line.split(":")[0] for line in runs[door][1].splitlines()] for door in ("command", "two"))
    assert one[0].startswith("data/") and two[0].startswith("data/")  # a name that depends on the file's time
    assert one[1:] == two[1:]


def test_a_mistake_that_only_the_main_process_meets(launched):
    """The text is found unfit when it is prepared, while the other process waits for the data: both end."""
    folder, done = launched("two", "corpus=latin.txt")
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "corpus=latin.txt" in line and "not UTF-8" in line
    assert not (folder / "runs").exists()
