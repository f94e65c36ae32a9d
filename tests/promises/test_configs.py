"""The promise of configs/: every file parses in accelerate's own loader and launches the processes that it names.

CPU processes replace the GPUs, at most two per file. The SLURM scripts run in bash with replacements for srun and
scontrol.
"""

import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from launching import (
    CONFIGS,
    TIMEOUT_S,
    find_spec,
    free_port,
    launch,
    launch_env,
    launch_words,
    package_env,
    run_python,
    train_on_ranks,
)
from runs import SMALL, losses, numbers, relative_difference, trainer, write_recipe

from nanogpt_accel.commands.plan import find_layouts
from nanogpt_accel.data.token_files import Writer
from nanogpt_accel.utils import cli

# file -> (type, processes, machines)
EXPECTED = {
    "cpu": ("NO", 1, 1),
    "cpu_2proc": ("MULTI_GPU", 2, 1),
    "single_gpu": ("NO", 1, 1),
    "mps": ("NO", 1, 1),
    "fp8": ("NO", 1, 1),
    "multi_gpu": ("MULTI_GPU", 8, 1),
    "multi_node": ("MULTI_GPU", 16, 2),
    "fsdp2": ("FSDP", 8, 1),
    "fsdp2_multi_node": ("FSDP", 16, 2),
    "deepspeed_zero2": ("DEEPSPEED", 8, 1),
    "deepspeed_zero3": ("DEEPSPEED", 8, 1),
}
STEPS = 4


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    settings = SMALL | {"bias": True, "learning_rate": 3e-3, "warmup_iters": 1}
    return write_recipe(tmp_path_factory.mktemp("configs"), **settings, max_iters=STEPS, eval_interval=2)


@pytest.fixture(scope="module")
def reference(recipe):
    """The folder of a run of STEPS steps by one process without a launcher."""
    run = recipe.parent / "one"
    train_on_ranks(run, [recipe, f"out_dir={run}"])
    return run


# ---- the files


def test_every_config_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_config_parses_and_sets_only_what_belongs_to_the_launcher(name):
    found = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # (refuses unknown keys)
    assert (found.distributed_type, found.num_processes, found.num_machines) == EXPECTED[name]
    assert found.mixed_precision == ("fp8" if name == "fp8" else None)  # the recipe sets it for all others
    # the recipe sets the batch; a config that sets it would silently override the recipe
    assert "gradient_accumulation_steps" not in {**found.deepspeed_config, **found.fsdp_config}
    assert found.dynamo_config == {}
    if found.distributed_type == "FSDP":
        assert found.fsdp_config["fsdp_version"] == 2 and not found.fsdp_config["fsdp_activation_checkpointing"]
    if found.parallelism_config:
        assert math.prod(found.parallelism_config.values()) == found.num_processes
        assert found.parallelism_config["parallelism_config_dp_replicate_size"] == found.num_machines


@pytest.mark.parametrize("name", EXPECTED)
def test_config_opens_with_its_command(name):
    """The header of a config has the command, which test_readme.py parses, and the line that starts with "Change"."""
    text = (CONFIGS / f"{name}.yaml").read_text()
    head = text.split("compute_environment")[0]
    assert f"\n#   accelerate launch --config_file configs/{name}.yaml " in head and "\n# Change " in head
    assert all(len(line) <= 120 for line in text.splitlines())


def test_configs_that_plan_recommends_exist():
    named = {
        file
        for gpus in (1, 2, 8, 9, 64)
        for gpu, device in (("h100", "auto"), (None, "cpu"), (None, "mps"))
        for file, _ in find_layouts(gpus, 8, "adamw", gpu, device).values()
    }
    assert len(named) > 5 and {Path(file).stem for file in named} <= EXPECTED.keys()


def test_configs_that_pages_and_code_name_exist():
    texts = [
        *CONFIGS.glob("*.md"),
        *CONFIGS.glob("*.yaml"),
        *CONFIGS.glob("slurm/*"),
        CONFIGS.parent / "README.md",
        *(CONFIGS.parent / "nanogpt_accel").rglob("*.py"),
    ]
    for text in texts:
        for named in re.findall(r"\bconfigs/[\w./]*\w", text.read_text()):
            assert (CONFIGS.parent / named).exists(), f"{text}: {named}"


# ---- launching


def n_processes(out):
    """Return the number of processes that the training reports."""
    (line,) = [line for line in out.splitlines() if line.startswith("batch: ")]
    return int(re.search(r"\((\d+) process", line)[1])


def test_cpu_2proc_starts_two_processes(recipe, reference, tmp_path):
    out = launch("cpu_2proc.yaml", cwd=tmp_path, argv=[recipe, f"out_dir={tmp_path}/run"])
    assert n_processes(out) == 2 and trainer(tmp_path / "run", STEPS)["processes"] == 2
    assert relative_difference(tmp_path / "run", reference) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, (_, _, machines) in EXPECTED.items() if machines == 1])
def test_config_launches_and_trains(name, recipe, reference, tmp_path):
    """The test launches 2 processes instead of 8 GPUs. The model is sharded if the config requests it."""
    kind, n_expected, _ = EXPECTED[name]
    if kind == "DEEPSPEED" and find_spec("deepspeed") is None:
        pytest.skip("pip install deepspeed")
    if name == "fp8" and find_spec("torchao") is None:
        pytest.skip("pip install torchao")
    n_expected = min(n_expected, 2)
    options = [] if n_expected == 1 else ["--num_processes=2", "--main_process_port=0"]
    module = "sharded_on_cpu" if kind in ("FSDP", "DEEPSPEED") else "nanogpt_accel.train"
    out = launch(f"{name}.yaml", *options, module=module, cwd=tmp_path, argv=[recipe, f"out_dir={tmp_path}/run"])
    assert n_processes(out) == n_expected and trainer(tmp_path / "run", STEPS)["processes"] == n_expected
    difference = relative_difference(tmp_path / "run", reference)
    print(f"{name}: {difference:.1e}")
    if name == "fp8":
        assert "mixed precision fp8" in out and 1e-7 < difference < 0.02
    else:
        assert difference < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "each"), [("multi_node", 1), ("multi_node", 2), ("fsdp2_multi_node", 2)])
def test_two_launchers_of_a_multi_node_config_train_together(name, each, recipe, reference, tmp_path):
    port, nodes = free_port(), []
    module = "sharded_on_cpu" if name.startswith("fsdp2") else "nanogpt_accel.train"
    options = [
        "--num_machines=2",
        f"--num_processes={2 * each}",
        f"--main_process_port={port}",
        "--main_process_ip=127.0.0.1",
    ]
    if name.startswith("fsdp2"):
        options += ["--parallelism_config_dp_replicate_size=2", "--parallelism_config_dp_shard_size=2"]
    for rank in range(2):
        words = launch_words(
            f"{name}.yaml", f"--machine_rank={rank}", *options, module=module, argv=[recipe, f"out_dir={tmp_path}/run"]
        )
        nodes.append(
            subprocess.Popen(
                [sys.executable, *words],
                cwd=tmp_path,
                env=launch_env(name),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    outs = [node.communicate(timeout=TIMEOUT_S)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outs
    assert n_processes(outs[0]) == 2 * each and "batch: " not in outs[1]
    assert trainer(tmp_path / "run", STEPS)["processes"] == 2 * each
    difference = relative_difference(tmp_path / "run", reference)
    print(f"{name}, two of {each}: {difference:.1e}")
    assert difference < 1e-5


@pytest.mark.slow
def test_default_config_of_accelerate_is_used(recipe, reference, tmp_path):
    """`accelerate config default` writes it, and `accelerate launch` finds it without --config_file."""
    env = package_env(HF_HOME=str(tmp_path))
    accelerate = ["-m", "accelerate.commands.accelerate_cli"]
    run_python(*accelerate, "config", "default", env=env)
    assert (tmp_path / "accelerate" / "default_config.yaml").is_file()
    run_python(*accelerate, "launch", "-m", "nanogpt_accel.train", recipe, f"out_dir={tmp_path}/run", env=env)
    assert relative_difference(tmp_path / "run", reference) < 1e-5


@pytest.mark.slow
def test_multi_cpu_is_refused(recipe, tmp_path):
    """On a CPU, `accelerate config` writes distributed_type: MULTI_CPU, with which Accelerate runs one process instead
    of two."""
    config = yaml.safe_load((CONFIGS / "cpu_2proc.yaml").read_text()) | {"distributed_type": "MULTI_CPU"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    done = run_python(*launch_words(tmp_path / "mine.yaml", argv=[recipe, f"out_dir={tmp_path}/run"]), status=None)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "MULTI_CPU" in line and "configs/cpu_2proc.yaml" in line and not (tmp_path / "run").exists()


# ---- SLURM

# like SLURM's: starts one task per machine, and forwards signals to the tasks, not to their children
SRUN = """#!{python}
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
nodes = int(os.environ["SLURM_NNODES"])
tasks = [subprocess.Popen(words, env=os.environ | {{"SLURM_NODEID": str(i), "SLURM_PROCID": str(i)}})
         for i in range(nodes)]
def forward(number, frame):
    for task in tasks:
        task.send_signal(number)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, forward)
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "{calls}"; fi
"""


@pytest.fixture
def job(tmp_path):
    """Return a function job(script, config, argv) that starts a batch job as SLURM does and returns its Popen.
    job.calls() returns the calls of scontrol."""
    bin, started = tmp_path / "bin", []
    bin.mkdir()
    calls = tmp_path / "calls"
    calls.touch()
    launcher = f'#!/bin/bash\nexec {sys.executable} -m accelerate.commands.accelerate_cli "$@"\n'
    for name, text in (
        ("srun", SRUN.format(python=sys.executable)),
        ("scontrol", SCONTROL.format(calls=calls)),
        ("accelerate", launcher),
    ):
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)

    def start(script, config, argv, nodes=1, gpus=1):
        env = launch_env(config)
        env |= {
            "PATH": f"{bin}:{env['PATH']}",
            "CONFIG": str(CONFIGS / config),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_NNODES": str(nodes),
            "SLURM_GPUS_ON_NODE": str(gpus),
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_ARRAY_JOB_ID": "8",
            "SLURM_ARRAY_TASK_ID": "2",
        }
        with open(tmp_path / "log", "ab") as log:
            started.append(
                subprocess.Popen(
                    ["bash", str(CONFIGS / "slurm" / script), *argv],
                    env=env,
                    cwd=CONFIGS.parent,
                    stdout=log,
                    stderr=log,
                )
            )
        return started[-1]

    start.calls = lambda: calls.read_text().splitlines()
    start.log = tmp_path / "log"
    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()  # on_each_node.sh and the launcher forward it
            process.wait(TIMEOUT_S)
    (CONFIGS.parent / f".requeue-{os.getpid()}.json").unlink(missing_ok=True)


def reach_time_limit(job, process, run):
    """Wait for two steps, and send the script what SLURM sends it shortly before the time limit."""
    end = time.monotonic() + TIMEOUT_S
    while not (run / "metrics.jsonl").is_file() or len(losses(run)) < 2:
        assert process.poll() is None and time.monotonic() < end, job.log.read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(TIMEOUT_S) != 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pkill") is None, reason="on_each_node.sh uses pkill")
def test_slurm_job_is_requeued_and_resumes_exactly(job, recipe, tmp_path):
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    argv = [str(recipe), f"out_dir={run}", "max_iters=100", "eval_interval=50", "eval_first=false"]
    process = job("single_node.sbatch", "cpu.yaml", argv)
    reach_time_limit(job, process, run)
    (saved,) = run.glob("checkpoint-*")
    assert 0 < int(saved.name[-6:]) < 100
    assert job.calls() == [f"requeue {os.getpid()}"]

    assert job("single_node.sbatch", "cpu.yaml", argv).wait(TIMEOUT_S) == 0  # as SLURM starts it again
    log = job.log.read_text()
    assert "stopped by SIGUSR1" in log and f"resuming {run} from {saved.name}" in log
    assert len(job.calls()) == 1
    argv[1] = f"out_dir={undisturbed}"
    train_on_ranks(undisturbed, argv)
    assert numbers(run) == numbers(undisturbed)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pkill") is None, reason="on_each_node.sh uses pkill")
def test_slurm_task_of_a_sweep_is_requeued_and_resumes_exactly(job, recipe, tmp_path):
    """The second task of a job array trains the second point."""
    folder, undisturbed = tmp_path / "sweep", tmp_path / "undisturbed"
    argv = [str(recipe), "max_iters=100", "eval_interval=50", "eval_first=false"]
    words = [*argv, "learning_rate=1e-3,2e-3", f"out_dir={folder}"]
    process, run = job("sweep.sbatch", "cpu.yaml", words), folder / "learning_rate=0.002"
    reach_time_limit(job, process, run)
    assert job.calls() == ["requeue 8_2"], job.log.read_text()
    assert "requeued: resume=auto" in job.log.read_text()
    assert job("sweep.sbatch", "cpu.yaml", words).wait(TIMEOUT_S) == 0, job.log.read_text()
    assert len(job.calls()) == 1 and [path.name for path in folder.iterdir()] == [run.name]
    train_on_ranks(undisturbed, [*argv, "learning_rate=2e-3", f"out_dir={undisturbed}"])
    assert numbers(run) == numbers(undisturbed)


@pytest.mark.slow
def test_slurm_job_of_two_machines_is_requeued_and_resumes(job, recipe, tmp_path):
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    argv = [str(recipe), f"out_dir={run}", "max_iters=100", "eval_interval=50", "eval_first=false"]
    process = job("multi_node.sbatch", "multi_node.yaml", argv, nodes=2, gpus=2)
    reach_time_limit(job, process, run)
    assert job.calls() == [f"requeue {os.getpid()}"]
    assert job("multi_node.sbatch", "multi_node.yaml", argv, nodes=2, gpus=2).wait(TIMEOUT_S) == 0
    log = job.log.read_text()
    assert "stopped by SIGUSR1" in log and log.count("(4 processes ") == 2 and len(job.calls()) == 1
    argv[1] = f"out_dir={undisturbed}"
    train_on_ranks(undisturbed, argv, "multi_gpu.yaml", 4)
    assert relative_difference(run, undisturbed) < 1e-5


@pytest.mark.slow
def test_slurm_job_that_fails_is_not_requeued(job, recipe, tmp_path):
    assert (
        job("single_node.sbatch", "cpu.yaml", [str(recipe), f"out_dir={tmp_path}/run", "n_heads=3"]).wait(TIMEOUT_S)
        != 0
    )
    assert "n_head" in job.log.read_text() and job.calls() == []


def test_slurm_job_is_requeued_while_it_makes_progress(tmp_path, monkeypatch, capsys):
    """A new checkpoint or newly prepared documents are progress. After three attempts without progress, the job is not
    requeued."""
    requeue = runpy.run_path(str(CONFIGS / "slurm" / "requeue.py"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    argv, run = [str(write_recipe(tmp_path)), "out_dir=run"], tmp_path / "run"

    def is_requeued():
        try:
            return cli.run(requeue["main"], argv) == 0
        except SystemExit as end:
            assert str(end).startswith("error: not requeued: 3 attempts in a row without a new checkpoint")
            return False

    assert [is_requeued() for _ in range(2)] == [True, True]
    with pytest.raises(SystemExit), Writer(tmp_path / "tokens", "uint16") as writer:  # interrupted after 5 documents
        writer.write("train", [1, 2, 3], n_bytes=3, documents=5)
        writer.commit(5)
        sys.exit(75)
    assert [is_requeued() for _ in range(3)] == [True, True, True]
    (run / "checkpoint-000010").mkdir(parents=True)
    assert [is_requeued() for _ in range(3)] == [True, True, True]
    assert not is_requeued() and not list(tmp_path.glob(".requeue*"))
    argv[:] = ["run", "n_layer=2"]
    assert not is_requeued() and "run.yaml" in capsys.readouterr().err


def test_slurm_scripts_are_valid_bash():
    scripts = sorted((CONFIGS / "slurm").iterdir())
    assert [path.name for path in scripts] == [
        "multi_node.sbatch",
        "on_each_node.sh",
        "prepare.sbatch",
        "requeue.py",
        "single_node.sbatch",
        "sweep.sbatch",
    ]
    for path in scripts:
        if path.suffix == ".py":
            continue
        subprocess.run(["bash", "-n", str(path)], check=True, timeout=TIMEOUT_S)
        if path.suffix == ".sbatch":
            needed = {"#SBATCH --requeue"} | ({"#SBATCH --signal=B:USR1@300"} if path.stem != "prepare" else set())
            assert needed <= set(path.read_text().splitlines())
