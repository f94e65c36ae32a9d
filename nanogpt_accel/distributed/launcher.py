"""Read the launcher's settings from the environment, and check that they are supported."""

import os
import re
import socket
import sys

from ..utils.packaged import packaged

PRECISIONS = ("no", "fp16", "bf16", "fp8")
TRUE, FALSE = ("1", "true", "yes", "y", "t", "on"), ("0", "false", "no", "n", "f", "off")  # as Accelerate reads them
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # Accelerate uses them like WORLD_SIZE
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

    problems = _check_ranks()
    # `accelerate launch` sets these variables if it was asked for several processes on the CPU but starts only one
    if {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ and not problems:
        problems.append(
            "accelerate launch started one process instead of several (this happens with --cpu and distributed_type: "
            f"MULTI_CPU); use --config_file {packaged('configs/cpu_2proc.yaml')}, or torchrun"
        )
    for kind in ("CPU", "FSDP", "DEEPSPEED", "MEGATRON_LM"):
        value = os.environ.get(f"ACCELERATE_USE_{kind}", "false")
        if value.lower() not in (*TRUE, *FALSE):
            problems.append(f"ACCELERATE_USE_{kind}={value}: must be true or false")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in PRECISIONS:
        problems.append(f"ACCELERATE_MIXED_PRECISION={precision}: must be {', '.join(PRECISIONS)}, or not set")
    if launcher_requests("DEEPSPEED") and find_spec("deepspeed") is None:
        problems.append("distributed_type: DEEPSPEED: DeepSpeed is not installed; run pip install deepspeed")
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
    if precision == "fp8" and not any(map(find_spec, FP8_BACKENDS)):
        problems.append("mixed_precision: fp8: requires an fp8 library, such as torchao; run pip install torchao")
    for kind in ("TP", "CP", "SP"):
        size = os.environ.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1")
        if size != "1":
            name = f"parallelism_config_{kind.lower()}_size"
            problems.append(f"{name}={size}: only data-parallel sharding is supported; set it to 1")
    return problems


def _check_ranks():
    """Check the variables with which the processes connect, such as RANK and MASTER_ADDR. Return a list of problems."""
    numbers = {"RANK": 0, "LOCAL_RANK": -1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}  # name -> minimum
    problems = [
        f"{name}={os.environ[name]}: must be an integer of at least {minimum}; unset it, or launch with "
        "`accelerate launch` or torchrun"
        for name, minimum in numbers.items()
        if name in os.environ and not (re.fullmatch(r"-?\d+", os.environ[name]) and int(os.environ[name]) >= minimum)
    ]
    mpi = [f"{name}={os.environ[name]}" for name in MPI_SIZES if os.environ.get(name, "1") != "1"]
    if mpi and "WORLD_SIZE" not in os.environ:
        problems.append(
            f"{mpi[0]}: mpirun is not supported; launch with `accelerate launch` or torchrun, or unset this variable"
        )
    processes, is_launched = world_size(), os.environ.get("LOCAL_RANK", "-1") != "-1"
    if problems or process_group() or not (processes > 1 or is_launched):
        return problems
    cause = f"WORLD_SIZE={processes}" if processes > 1 else f"LOCAL_RANK={os.environ['LOCAL_RANK']}"
    needed = ("RANK", "LOCAL_RANK", *(() if processes > 1 else ("WORLD_SIZE",)), "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if name not in os.environ]:
        fix = f"launch with `accelerate launch` or torchrun, or unset {cause.partition('=')[0]}"
        return [f"{cause}: {', '.join(missing)} not set; {fix}"]
    number, port, address = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"]), os.environ["MASTER_ADDR"]
    if number >= processes:
        problems.append(f"RANK={number}: must be below WORLD_SIZE={processes}")
    if not 1 <= port <= 65535:  # with MULTI_CPU, Accelerate may set 0, but check_launcher has a better message for that
        problems.append(f"MASTER_PORT={port}: must be a port, 1 to 65535")
    try:
        if not address:
            raise OSError("empty")
        socket.getaddrinfo(address, None)
    except OSError as error:
        problems.append(
            f"MASTER_ADDR={address}: no such host ({error.strerror or error}); set it to the host name or address of "
            "the main process"
        )
    return problems


def process_group():
    """Return torch.distributed if the process group is already initialized, else None. Does not import torch.

    Accelerate's debug_launcher initializes the process group before it calls `train`, and does not set RANK.
    """
    distributed = sys.modules.get("torch.distributed")
    is_connected = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed if is_connected else None


def world_size():
    """Return the number of processes that the launcher started."""
    if group := process_group():
        return group.get_world_size()
    value = os.environ.get("WORLD_SIZE", "1")
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"WORLD_SIZE={value}: not a number of processes; unset this variable")
    return int(value)


def launcher_requests(kind):
    """Return whether the launcher requests `kind`, which is CPU, FSDP, DEEPSPEED or MEGATRON_LM."""
    return os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() in TRUE  # debug_launcher sets ACCELERATE_USE_CPU=yes


def rank():
    """Return the global rank of this process."""
    if group := process_group():
        return group.get_rank()
    value = os.environ.get("RANK", "0") if world_size() > 1 else "0"
    return int(value) if value.isdecimal() else -1  # check_launcher reports the invalid value


def is_main():
    """Return whether this is the main process, which prepares, logs and saves."""
    return rank() == 0


def count_processors():
    """Return the number of processors that this process may use. A cluster may give a job only a part of a machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
