"""What the launcher asked for, from its environment variables, and whether that can work."""

import os

FP8_BACKENDS = ("torchao", "transformer_engine", "msamp")  # any of these modules will do for Accelerate


def check_launch(gradient_accumulation_steps):
    """What is wrong with the launch as far as it shows before torch is imported: a list of problems."""
    problems = []
    processes = world_size()
    if gradient_accumulation_steps % processes:
        low = gradient_accumulation_steps // processes * processes
        fitting = " or ".join(str(n) for n in (low, low + processes) if n)
        fewer = " or ".join(str(n) for n in range(1, processes) if gradient_accumulation_steps % n == 0)
        problems.append(
            f"train.gradient_accumulation_steps={gradient_accumulation_steps} cannot be shared by "
            f"{processes} processes (its product with batch_size makes the step): set it to {fitting}, or "
            f"run {fewer} process{'es' * (fewer != '1')}"
        )
    return problems + check_launcher()


def check_launcher():
    """Whether WORLD_SIZE was set by a launcher, which sets more than that, as a list of problems."""
    from importlib.util import find_spec

    problems = []
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world_size() > 1 and missing:
        problems.append(
            f"WORLD_SIZE={world_size()} is set, but not {', '.join(missing)}: launch with `accelerate "
            "launch` or torchrun, or unset WORLD_SIZE"
        )
    # what `accelerate launch --cpu --num_processes 2` and a config of type MULTI_CPU leave behind: they were asked for
    # several processes and start one
    is_mpi = any(name in os.environ for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"))
    if {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ and not is_mpi:
        problems.append(
            "accelerate launch was asked for several processes and started one, as it does with --cpu and "
            "with distributed_type: MULTI_CPU: use --config_file configs/cpu_2proc.yaml, or torchrun"
        )
    for name, wanted, remedy in (
        ("FSDP_VERSION", "2", "set fsdp_version: 2 in the config file, as configs/fsdp2.yaml does"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "false", "leave it to the recipe: activation_checkpointing=true"),
    ):
        value = os.environ.get(name, wanted)
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and value.lower() != wanted:
            problems.append(f"{name.lower()}={value}: this model does not train right with it: {remedy}")
    if os.environ.get("ACCELERATE_USE_MEGATRON_LM", "").lower() == "true":
        problems.append("distributed_type: MEGATRON_LM: not for this model; shard it with configs/fsdp2.yaml")
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp8" and not any(map(find_spec, FP8_BACKENDS)):
        problems.append(
            "mixed_precision: fp8 of the launcher needs a library that is not installed here: pip install torchao"
        )
    for kind in ("TP", "CP", "SP"):
        size = os.environ.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1")
        if size != "1":
            problems.append(
                f"parallelism_config_{kind.lower()}_size={size}: only data-parallel sharding is done here; set it to 1"
            )
    return problems


def world_size():
    """Number of processes that the launcher started, by its environment variable."""
    value = os.environ.get("WORLD_SIZE", "1")
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"WORLD_SIZE={value}: this variable is the launcher's number of processes; unset it")
    return int(value)


def launcher_requests(kind):
    """True where the launcher asks for this kind of sharding, FSDP or DEEPSPEED."""
    return os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true"


def is_main():
    """True on the process that prepares, logs and saves."""
    return world_size() == 1 or os.environ.get("RANK", "0") == "0"
