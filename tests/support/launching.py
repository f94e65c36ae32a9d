"""What tests of several processes share: a tiny recipe, ranks forked with the environment that accelerate's launcher
would give them, and the real launcher.

A process that is only asked to start takes seconds to import torch. So ranks are forked from one that has done so, and
get the variables from accelerate's own code; test_configs.py launches the config files for good.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import pytest
from safetensors import safe_open

import nanogpt_accel
from nanogpt_accel.tracking.metrics_log import read_metrics

ROOT = Path(nanogpt_accel.__file__).parents[1]
TESTS = Path(__file__).parent
CONFIGS = ROOT / "configs"
LIMIT = 300  # seconds for anything that is waited for
STEPS, SAVE = 50, 25
RECIPE = """
data: {{corpus: {folder}/text.txt, tokenizer: char, val_fraction: 0.1, data_dir: {folder}/tokens}}
model: {{n_layer: 2, n_embd: 32, n_head: 2, block_size: 32, dropout: 0.2, bias: true}}
optimizer: {{learning_rate: 3e-3, warmup_iters: 5}}
train: {{batch_size: 4, gradient_accumulation_steps: 4, max_iters: {steps}, eval_interval: {save}, eval_iters: 3,
         device: cpu, mixed_precision: no}}
checkpoint: {{keep_last: 9}}
"""
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "nanogpt_accel.train",
        "nanogpt_accel.distributed.cpu",
        "nanogpt_accel.model",
        "accelerate",
        "torch.distributed",
        "matplotlib.figure",
    ]
)
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="pip install deepspeed")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def write_recipe(folder, recipe=RECIPE, **sizes):
    """A recipe on words that look like words, with absolute paths; returns its path."""
    draw = random.Random(2)
    words = ["".join(draw.choice("etaoinshrdlu") for _ in range(draw.randint(2, 7))) for _ in range(150)]
    (folder / "text.txt").write_text(" ".join(draw.choice(words) for _ in range(4000)))
    path = folder / "recipe.yaml"
    path.write_text(recipe.format(folder=folder, **(sizes or {"steps": STEPS, "save": SAVE})))
    return path


# ---- ranks that are forked


def parse_launch(words):
    """accelerate's own reading of `accelerate launch WORDS`, with what its config file says."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


def launcher_variables(config, processes, options=()):
    """What `accelerate launch --config_file configs/CONFIG --num_processes N OPTIONS` sets, by accelerate's code."""
    from accelerate.utils.launch import prepare_multi_gpu_env

    args = parse_launch(
        [
            "--config_file",
            str(CONFIGS / config),
            "--num_processes",
            str(processes),
            "--main_process_port",
            "0",
            "--num_machines",
            "1",
            *options,
            "-m",
            "nanogpt_accel.train",
        ]
    )
    found = prepare_multi_gpu_env(args)
    return {name: value for name, value in found.items() if os.environ.get(name) != value}


def forked(argv, env, output, before):
    """What a forked rank does."""
    os.environ.update(env)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if env.get("ACCELERATE_USE_FSDP") == "true":
        import sharded_on_cpu  # noqa: F401
    from nanogpt_accel import train
    from nanogpt_accel.utils import cli

    if before is not None:
        before()
    sys.exit(cli.run(train.main, argv))


class Ranks:
    """A training on forked processes.

    run: its folder, of which nothing has to be there. argv: as after `nanogpt-accel train`, or a list of those, one
    for each rank. config: a file of configs/, none for one process. before: a function that each rank calls first.
    """

    def __init__(self, run, argv, config=None, processes=1, options=(), before=None):
        self.output = Path(f"{run}.output")
        self.output.touch()
        self.begun, self.processes = self.output.stat().st_size, []
        variables = launcher_variables(config, processes, options) if config else {}
        port = free_port()
        for rank in range(processes):
            if processes > 1:  # what torchrun adds
                variables |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(processes),
                    "LOCAL_WORLD_SIZE": str(processes),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            words = argv[rank] if isinstance(argv[0], list) else argv
            process = FORKS.Process(target=forked, args=(words, dict(variables), self.output, before))
            process.start()
            self.processes.append(process)

    def says(self):
        """What this job has printed."""
        return self.output.read_bytes()[self.begun :].decode()

    def wait_until(self, condition):
        end = time.monotonic() + LIMIT
        while not condition():
            if time.monotonic() > end or None not in self.exit_codes():
                self.kill()
                pytest.fail(f"waited in vain\n{self.says()}")
            time.sleep(0.001)

    def wait_for_step(self, step):
        self.wait_until(lambda: f"\niter {step}:" in self.says())

    def signal(self, number, *ranks):
        for rank in ranks or range(len(self.processes)):
            os.kill(self.processes[rank].pid, number)

    def exit_codes(self):
        return [process.exitcode for process in self.processes]

    def end(self, limit=LIMIT):
        """Wait for the end of all ranks; returns their exit statuses."""
        end = time.monotonic() + limit
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        found = self.exit_codes()
        if None in found:
            self.kill()
            pytest.fail(f"not at an end after {limit} s: {found}\n{self.says()}")
        return found

    def kill(self):
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
                process.join(LIMIT)


def finish(*arguments, **options):
    """Train to the end on forked ranks, which has to be a good one; returns what it said."""
    job = Ranks(*arguments, **options)
    assert set(job.end()) == {0}, job.says()
    return job.says()


def forked_command(argv, env, output):
    """What a forked process does: as `env ... nanogpt-accel ARGV >> OUTPUT`."""
    os.environ.update(env)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from nanogpt_accel.__main__ import main

    sys.exit(main(argv))


# ---- the real launcher


def launch_command(config, *options, module="nanogpt_accel.train", argv):
    """(command, environment) of `accelerate launch --config_file configs/CONFIG OPTIONS -m MODULE ARGV`."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    env |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    if "deepspeed" in str(config):
        env["DS_ACCELERATOR"] = "cpu"
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIGS / config),
        *map(str, options),
        "-m",
        module,
        *map(str, argv),
    ]
    return command, env


def launch(config, *options, cwd, **arguments):
    """Run launch_command to its end, which has to be a good one; returns what it printed."""
    command, env = launch_command(config, *options, **arguments)
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- what a run left behind


def numbers(run):
    """All that metrics.jsonl holds but times and memory."""
    return [
        {k: v for k, v in line.items() if k not in ("tokens_per_second", "mfu", "peak_memory")}
        for line in read_metrics(Path(run) / "metrics.jsonl")
    ]


def ordered_numbers(run):
    """All that metrics.jsonl holds but times and memory. Every step stands once, in order."""
    lines = [
        {k: v for k, v in line.items() if k not in ("tokens_per_second", "mfu", "peak_memory")}
        for line in read_metrics(run / "metrics.jsonl")
    ]
    places = [(line["step"], "val_loss" not in line) for line in lines]  # an evaluation comes before its step
    assert places == sorted(set(places))
    assert [line["step"] for line in lines if "loss" in line] == list(range(lines[-1]["step"]))
    assert all({"loss", "grad_norm", "learning_rate"} < set(line) or "val_loss" in line for line in lines)
    return lines


def losses(run, first_step=0):
    """{step: loss} from that step on."""
    return {line["step"]: line["loss"] for line in numbers(run) if "loss" in line and line["step"] >= first_step}


def relative_difference(run, other, first_step=0):
    """The largest relative difference between the losses of two runs, which did the same steps."""
    one, two = losses(run, first_step), losses(other, first_step)
    assert one and one.keys() == two.keys()
    return max(abs(one[step] - two[step]) / two[step] for step in two)


def trainer(run, step=STEPS):
    return json.loads((Path(run) / f"checkpoint-{step:06d}" / "state" / "trainer.json").read_text())


def tensors(folder):
    """{(file, name): tensor} of all safetensors files below a folder."""
    found = {}
    for file in sorted(Path(folder).rglob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {(str(file.relative_to(folder)), name): opened.get_tensor(name) for name in opened.keys()}
    return found


def copy_without(source, target, *steps):
    """A copy of a run that never came to the checkpoints of those steps."""
    shutil.copytree(source, target, symlinks=True)
    for step in steps:
        shutil.rmtree(target / f"checkpoint-{step:06d}")
    return target
