"""Start processes of the package: a plain process, forked ranks, torchrun or `accelerate launch`.

A new process takes seconds to import torch. So most tests of several ranks fork them from a server process that has
imported everything, with the environment variables that accelerate's own code computes for a file of configs/.
test_configs.py uses the real launcher.
"""

import os
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest
from shared import REPOSITORY

CONFIGS = REPOSITORY / "configs"
SUPPORT = Path(__file__).parent
TIMEOUT_S = 300  # for every wait
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


# ---- a plain process


def package_env(**variables):
    """Return an environment in which Python finds this package and tests/support, without launcher settings."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    paths = [str(REPOSITORY), str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return env | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)} | variables


def run_python(*words, status=0, env=None, **options):
    """Run `python WORDS`, require its exit status (None: any), and return the CompletedProcess with its text.

    Args:
        env: replaces package_env().
        options: for subprocess.run.
    """
    options = {"capture_output": True, "text": True, "timeout": TIMEOUT_S} | options
    done = subprocess.run([sys.executable, *map(str, words)], env=env or package_env(), **options)
    assert status is None or done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---- the environment of a rank


def torchrun_variables(rank, processes, port=29500):
    """Return what torchrun sets for one rank of several."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def parse_launch(words):
    """Return what accelerate itself reads from `accelerate launch WORDS` and its config file."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


def launcher_variables(config, processes, options=()):
    """Return what `accelerate launch --config_file configs/CONFIG --num_processes N OPTIONS` sets."""
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = f"--config_file {CONFIGS / config} --num_processes {processes} --main_process_port 0 --num_machines 1"
    found = prepare_multi_gpu_env(parse_launch([*words.split(), *options, "-m", "nanogpt_accel.train"]))
    return {name: value for name, value in found.items() if os.environ.get(name) != value}


# ---- a training that runs alongside the test


class Job:
    """The processes of one training. Their output is appended to RUN.output, next to the run folder."""

    def __init__(self, run):
        self.output = Path(f"{run}.output")
        self.output.touch()
        self._start = self.output.stat().st_size  # size of the output of earlier jobs of this run

    def says(self):
        """Return what this job has printed so far."""
        return self.output.read_bytes()[self._start :].decode()

    def n_steps(self):
        """Return the number of steps that this job has reported so far."""
        return self.says().count("\niter ")

    def has_ended(self):
        return None not in self.exit_codes()

    def wait_until(self, condition):
        """Wait for a condition. Raise an AssertionError if the job ends before the condition is true."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            if time.monotonic() > deadline or None not in self.exit_codes():
                self.kill()
                raise AssertionError(f"the job ended or timed out before the condition was met\n{self.says()}")
            time.sleep(0.0005)

    def wait_for_step(self, step):
        self.wait_until(lambda: f"\niter {step}:" in self.says())

    def end(self):
        """Wait for the end of all processes; return their exit statuses."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self.has_ended():
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"still running after {TIMEOUT_S} s\n{self.says()}")
            time.sleep(0.005)
        return self.exit_codes()

    def finish(self):
        """Wait for the end, which must be a success; return the output."""
        assert set(self.end()) == {0}, self.says()
        return self.says()


def train_in_rank(argv, variables, output, before):
    """Run `nanogpt-accel train ARGV >> OUTPUT`; the main function of a forked rank."""
    os.environ.update(variables)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if variables.get("ACCELERATE_USE_FSDP") == "true":
        import sharded_on_cpu  # noqa: F401
    from nanogpt_accel import train
    from nanogpt_accel.distributed.rendezvous import share_failures
    from nanogpt_accel.utils import cli

    if before is not None:
        before()
    sys.exit(cli.run(share_failures(train.main), argv))


class Ranks(Job):
    """A training on forked ranks.

    Args:
        run: the run folder, which need not exist.
        argv: the words after `nanogpt-accel train`, or one such list per rank.
        config: a file of configs/ whose launcher settings the ranks get.
        options: more words for `accelerate launch`.
        before: a function that each rank calls before it trains.
    """

    def __init__(self, run, argv, config=None, processes=1, options=(), before=None):
        super().__init__(run)
        self.processes = []
        settings = launcher_variables(config, processes, options) if config else {}
        port = free_port()
        for rank in range(processes):
            variables = settings | (torchrun_variables(rank, processes, port) if processes > 1 else {})
            words = argv[rank] if isinstance(argv[0], list) else argv
            words = [str(word) for word in words]
            process = FORKS.Process(target=train_in_rank, args=(words, variables, self.output, before))
            process.start()
            self.processes.append(process)

    def signal(self, number, *ranks):
        """Send a signal to these ranks, or to all."""
        for rank in ranks or range(len(self.processes)):
            os.kill(self.processes[rank].pid, number)

    def exit_codes(self):
        return [process.exitcode for process in self.processes]

    def kill(self):
        """Send SIGKILL to all ranks, and wait until they have ended."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(TIMEOUT_S)


class Torchrun(Job):
    """A training started by torchrun, with the same arguments as Ranks."""

    def __init__(self, run, argv, processes):
        super().__init__(run)
        words = ["--nproc_per_node", processes, "--master_port", free_port(), "-m", "nanogpt_accel.train", *argv]
        command = [sys.executable, "-m", "torch.distributed.run", *map(str, words)]
        with open(self.output, "ab") as file:
            self.launcher = subprocess.Popen(
                command, env=package_env(), stdout=file, stderr=file, start_new_session=True
            )

    def exit_codes(self):
        return [self.launcher.poll()]

    def kill(self):
        """Send SIGKILL to the launcher and to its ranks, which are in separate process groups."""
        if self.launcher.poll() is None:
            killed = [*psutil.Process(self.launcher.pid).children(recursive=True), psutil.Process(self.launcher.pid)]
            for process in killed:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    pass
            self.launcher.wait(TIMEOUT_S)
            psutil.wait_procs(killed, TIMEOUT_S)


def _call_launcher(name, recipe, options, output):
    """The main function of a forked process that calls a launcher of Accelerate. This does not need a notebook."""
    import accelerate

    from nanogpt_accel.train import train

    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    accelerate.PartialState(cpu=True)  # as if this process had trained before; the new processes inherit this state
    getattr(accelerate, name)(train, (recipe,), num_processes=2, **options)


def train_from_python(launcher, recipe, output):
    """Call Accelerate's debug_launcher or notebook_launcher with `train` and two processes; return what they print."""
    options = {"use_port": str(free_port())} if launcher == "notebook_launcher" else {}
    process = FORKS.Process(target=_call_launcher, args=(launcher, str(recipe), options, output))
    process.start()
    process.join(TIMEOUT_S)
    assert process.exitcode == 0, output.read_text()
    return output.read_text()


def train_on_ranks(*arguments, **options):
    """Train to the end on forked ranks, see Ranks; return the output."""
    return Ranks(*arguments, **options).finish()


# ---- the real launcher


def launch_words(config, *options, module="nanogpt_accel.train", argv=()):
    """Return the words after `python` for `accelerate launch --config_file configs/CONFIG OPTIONS -m MODULE ARGV`."""
    words = ["-m", "accelerate.commands.launch", "--config_file", CONFIGS / config, *options, "-m", module, *argv]
    return [str(word) for word in words]


def launch_env(config):
    """Return the environment for launch_words(config)."""
    return package_env(**({"DS_ACCELERATOR": "cpu"} if "deepspeed" in str(config) else {}))


def launch(config, *options, cwd, module="nanogpt_accel.train", argv):
    """Run `accelerate launch` and return its output. The exit status must be 0."""
    words = launch_words(config, *options, module=module, argv=argv)
    return run_python(*words, env=launch_env(config), cwd=cwd).stdout
