"""Processes that use the GPU: a run that is killed and resumed, and FSDP2 with one rank."""

import signal
import subprocess
import sys

import pytest
from launching import TIMEOUT_S, Job, launch, package_env
from on_gpu import IS_DRY, RECIPE, largest_difference, short_run, step_losses
from runs import checkpoint, ordered_numbers

from nanogpt_accel.models.load import load_model
from nanogpt_accel.train import train

pytestmark = pytest.mark.gpu


def words(settings):
    return [f"{key}={value}" for key, value in settings.items()]


class Process(Job):
    """A training in a new process. A forked process could not use CUDA after its parent has queried the devices."""

    def __init__(self, run, argv):
        super().__init__(run)
        command = [sys.executable, "-m", "nanogpt_accel.train", *map(str, argv)]
        with open(self.output, "ab") as file:
            self.process = subprocess.Popen(command, env=package_env(), stdout=file, stderr=file)

    def exit_codes(self):
        return [self.process.poll()]

    def kill(self):
        self.process.kill()
        self.process.wait(TIMEOUT_S)


def test_resume_after_sigkill(text, tmp_path):
    """Some GPU kernels are not deterministic, so losses on a GPU may differ by rounding."""
    run, n_steps = tmp_path / "run", 100
    settings = short_run(text, run, dropout=0.2, max_iters=n_steps, save_interval=20)
    job = Process(run, [RECIPE, *words(settings)])
    try:
        job.wait_until(lambda: job.n_steps() >= 30)
    finally:
        job.kill()
    assert job.exit_codes() == [-signal.SIGKILL]
    _, resumed = train(RECIPE, **settings | {"resume": "auto"})
    assert checkpoint(run, n_steps).is_dir() and len(ordered_numbers(run)) == n_steps + 2
    _, never_killed = train(RECIPE, **settings | {"out_dir": str(tmp_path / "never_killed")})
    difference = largest_difference(step_losses(resumed), step_losses(never_killed))
    print(f"largest difference {difference:.2g}")
    assert difference == 0 if IS_DRY else difference < 0.05


def test_fsdp2_computes_the_same_as_one_process(text, tmp_path):
    """There is one rank on a GPU, and two in the dry form, because Accelerate does not shard on one CPU process."""
    run = tmp_path / "fsdp2"
    settings = short_run(text, run, max_iters=10, eval_interval=5, gradient_accumulation_steps=2)
    module, processes = ("sharded_on_cpu", 2) if IS_DRY else ("nanogpt_accel.train", 1)
    options = [f"--num_processes={processes}", "--main_process_port=0"]
    launch("fsdp2.yaml", *options, cwd=tmp_path, module=module, argv=[RECIPE, *words(settings)])
    _, alone = train(RECIPE, **settings | {"out_dir": str(tmp_path / "alone")})
    sharded = ordered_numbers(run)
    assert largest_difference(step_losses(sharded), step_losses(alone)) < 2e-2
    assert load_model(checkpoint(run, 10)).num_parameters() > 1000  # a checkpoint that needs no sharding
