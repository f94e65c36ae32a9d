"""The promise that the command, `python -m`, `accelerate launch` and Accelerate's launchers for Python train the same,
and that two launched processes train together."""

import contextlib
import io
import subprocess

import pytest
import torch
from launching import package_env, run_python, train_from_python
from runs import SMALL, largest_difference, make_text, numbers, trainer, weights, write_recipe

from nanogpt_accel.__main__ import main

STEPS = 4
SETTINGS = SMALL | {"warmup_iters": 2, "max_iters": STEPS, "eval_interval": 2}
ENTRY_POINTS = {
    "command": None,  # nanogpt-accel, called in this process
    "module": ["-m", "nanogpt_accel.train"],
    "accelerate": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "-m", "nanogpt_accel.train"],
    # with --cpu instead of --multi_gpu, Accelerate would silently start one process
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


def run_here(folder, argv):
    """Run main(argv) in a folder, with one thread as in the launched processes."""
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
    """Return a function launched(entry_point, ...) that trains the recipe in a new folder, and returns (folder,
    CompletedProcess)."""

    def launch(entry_point, *options):
        folder = tmp_path_factory.mktemp(entry_point)
        (folder / "text.txt").write_text(make_text(4000))
        (folder / "latin.txt").write_bytes("Übung ".encode("latin-1") * 99)
        write_recipe(folder, **SETTINGS, corpus="text.txt")
        if entry_point == "command":
            return folder, run_here(folder, ["train", "tiny.yaml", *options])
        env = package_env(HF_HOME=str(folder / "no accelerate config"))
        if entry_point == "two":
            env["ACCELERATE_USE_CPU"] = "true"
        return folder, run_python(*ENTRY_POINTS[entry_point], "tiny.yaml", *options, status=None, env=env, cwd=folder)

    return launch


@pytest.fixture(scope="module")
def runs(launched):
    """{entry point: (run folder, output)}, each on data that were not prepared before."""
    found = {}
    for entry_point in ENTRY_POINTS:
        folder, done = launched(entry_point)
        assert done.returncode == 0, done.stderr
        found[entry_point] = (folder / "runs" / "tiny", done.stdout)
    return found


def test_all_entry_points_compute_the_same(runs):
    first = runs["command"][0]
    assert len(numbers(first)) == STEPS + 3
    for entry_point in ("module", "accelerate"):
        run = runs[entry_point][0]
        assert numbers(run) == numbers(first)
        assert weights(run, STEPS) == weights(first, STEPS)
        assert trainer(run, STEPS) == trainer(first, STEPS)
    assert trainer(first, STEPS)["processes"] == 1


def test_launching_two_processes_gives_two_ranks_and_the_same_batch(runs):
    run, out = runs["two"]
    assert trainer(run, STEPS)["processes"] == 2
    (arithmetic,) = [line for line in out.splitlines() if line.startswith("batch: ")]
    assert "512 tokens per step" in arithmetic and "512 tokens per step" in runs["command"][1]


def test_two_processes_compute_the_same_as_one(runs):
    assert largest_difference(runs["command"][0], runs["two"][0]) < 1e-5


@pytest.mark.parametrize("launcher", ["debug_launcher", "notebook_launcher"])
def test_launchers_for_python_start_two_processes_that_compute_the_same_as_one(runs, tmp_path, launcher):
    recipe = write_recipe(tmp_path, **SETTINGS, out_dir=str(tmp_path / "run"))
    printed = train_from_python(launcher, recipe, tmp_path / "output")
    assert printed.count("(2 processes x 2) = 512 tokens per step") == 1  # only the main process prints
    assert trainer(tmp_path / "run", STEPS)["processes"] == 2
    assert largest_difference(runs["command"][0], tmp_path / "run") < 1e-5


def test_missing_data_is_prepared_once(runs):
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


def test_only_the_main_process_prints(runs):
    """Two processes print the same lines as one, each once."""
    one, two = ([line.split(":")[0] for line in runs[name][1].splitlines()] for name in ("command", "two"))
    # the name of the data folder depends on the file's time
    one, two = (["data/" if line.startswith("data/") else line for line in lines] for lines in (one, two))
    assert one.count("data/") == 1 and one == two


def test_error_in_the_main_process_ends_both(launched):
    """The main process finds invalid text while the other one waits for the data."""
    folder, done = launched("two", "corpus=latin.txt")
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "corpus=latin.txt" in line and "not UTF-8" in line
    assert not (folder / "runs").exists()
