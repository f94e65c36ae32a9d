"""Read the launcher's settings from the environment, and check that they are supported."""

import os
import sys

from ..utils.packaged import packaged

FP8_BACKENDS = ("torchao", "transformer_engine", "msamp")  # Accelerate needs one of these modules for fp8


def check_launch(gradient_accumulation_steps):
    """Check the number of processes and the launcher's settings. Return a list of problems."""
    problems, processes = [], world_size()
    if gradient_accumulation_steps % processes:
        low = gradient_accumulation_steps // processes * processes
        multiples = " or ".join(str(n) for n in (low, low + processes) if n)
        divisors = " or ".join(str(n) for n in range(1, processes) if gradient_accumulation_steps % n == 0)
        problems.append(
            f"train.gradient_accumulation_steps={gradient_accumulation_steps}: not divisible by {processes} processes; "
            f"set it to {multiples}, or run {divisors} process{'es' * (divisors != '1')}"
        )
    return problems + check_launcher()


def check_launcher():
    """Check the launcher's settings. Return a list of problems."""
    from importlib.util import find_spec

    problems = []
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world_size() > 1 and missing and _process_group() is None:
        problem = f"WORLD_SIZE={world_size()}: {', '.join(missing)} not set"
        problems.append(f"{problem}; launch with `accelerate launch` or torchrun, or unset WORLD_SIZE")
    # `accelerate launch` sets these variables if it was asked for several processes on the CPU but starts only one
    is_mpi = any(name in os.environ for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"))
    if {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ and not is_mpi:
        problems.append(
            "accelerate launch started one process instead of several (this happens with --cpu and distributed_type: "
            f"MULTI_CPU); use --config_file {packaged('configs/cpu_2proc.yaml')}, or torchrun"
        )
    for name, supported, fix in (
        ("FSDP_VERSION", "2", f"set fsdp_version: 2 in the config file, as in {packaged('configs/fsdp2.yaml')}"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "false", "set activation_checkpointing=true in the recipe instead"),
    ):
        value = os.environ.get(name, supported)
        if launcher_requests("FSDP") and value.lower() != supported:
            problems.append(f"{name.lower()}={value}: gives wrong results with this model; {fix}")
    if launcher_requests("MEGATRON_LM"):
        fix = f"to shard the model, use {packaged('configs/fsdp2.yaml')}"
        problems.append(f"distributed_type: MEGATRON_LM: not supported; {fix}")
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp8" and not any(map(find_spec, FP8_BACKENDS)):
        problems.append("mixed_precision: fp8: requires an fp8 library, such as torchao; run pip install torchao")
    for kind in ("TP", "CP", "SP"):
        size = os.environ.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1")
        if size != "1":
            name = f"parallelism_config_{kind.lower()}_size"
            problems.append(f"{name}={size}: only data-parallel sharding is supported; set it to 1")
    return problems


def _process_group():
    """Return torch.distributed if the process group is already initialized, else None. Does not import torch.

    Accelerate's debug_launcher initializes the process group before it calls `train`, and does not set RANK.
    """
    distributed = sys.modules.get("torch.distributed")
    is_connected = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed if is_connected else None


def world_size():
    """Return the number of processes that the launcher started."""
    if group := _process_group():
        return group.get_world_size()
    value = os.environ.get("WORLD_SIZE", "1")
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"WORLD_SIZE={value}: not a number of processes; unset this variable")
    return int(value)


def launcher_requests(kind):
    """Return whether the launcher requests `kind`, which is CPU, FSDP, DEEPSPEED or MEGATRON_LM."""
    # Accelerate accepts all of these; debug_launcher sets ACCELERATE_USE_CPU=yes
    return os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() in ("1", "true", "yes", "y", "t", "on")


def is_main():
    """Return whether this is the main process, which prepares, logs and saves."""
    if group := _process_group():
        return group.get_rank() == 0
    return world_size() == 1 or os.environ.get("RANK", "0") == "0"
