"""launcher.py: mistakes in a launch, found in the environment before torch is imported."""

import re

import pytest
from launching import torchrun_variables

from nanogpt_accel.distributed.launcher import check_launch, check_launcher, is_main, world_size

pytestmark = pytest.mark.usefixtures("no_launcher")


def set_launched(monkeypatch, processes, rank=0):
    """Set the environment of one of several ranks."""
    for name, value in torchrun_variables(rank, processes).items():
        monkeypatch.setenv(name, value)


def test_world_size_and_main_process_come_from_the_environment(monkeypatch):
    assert world_size() == 1 and is_main() is True
    for rank in range(4):
        set_launched(monkeypatch, 4, rank)
        assert world_size() == 4 and is_main() is (rank == 0)


# ---- the batch arithmetic


@pytest.mark.parametrize(("micro_batches", "processes"), [(1, 1), (40, 1), (40, 8), (8, 8), (6, 3)])
def test_accumulation_divisible_by_the_processes_is_accepted(monkeypatch, micro_batches, processes):
    set_launched(monkeypatch, processes)
    assert check_launch(micro_batches) == []


@pytest.mark.parametrize(
    ("micro_batches", "processes", "values", "counts"),
    [
        (40, 16, {32, 48}, {1, 2, 4, 5, 8, 10}),
        (1, 2, {2}, {1}),
        (5, 4, {4, 8}, {1}),
        (9, 4, {8, 12}, {1, 3}),
        (7, 8, {8}, {1, 7}),
    ],
)
def test_accumulation_not_divisible_by_the_processes_is_refused_with_fixes(
    monkeypatch, micro_batches, processes, values, counts
):
    set_launched(monkeypatch, processes)
    (problem,) = check_launch(micro_batches)
    assert problem.startswith(
        f"train.gradient_accumulation_steps={micro_batches}: not divisible by {processes} processes"
    )
    first, second = re.search(r"set it to ([\d or]+), or run ([\d or]+) process(?:es)?$", problem).groups()
    offered = [{int(n) for n in part.split(" or ")} for part in (first, second)]
    assert offered == [values, counts]
    # every suggested value is valid
    assert all(value % processes == 0 for value in offered[0]) and all(micro_batches % n == 0 for n in offered[1])
    set_launched(monkeypatch, max(counts))
    assert check_launch(micro_batches) == []


def test_world_size_without_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    (problem,) = check_launch(8)
    assert problem.startswith(
        "WORLD_SIZE=2: LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set; launch with `accelerate launch`"
    )
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert check_launch(8) == []


# ---- settings of the launcher


def test_launcher_that_started_one_process_of_several_is_refused(monkeypatch):
    """`accelerate launch --cpu --num_processes 2` and distributed_type: MULTI_CPU set these variables."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert check_launcher() == []  # --cpu alone requests one process
    monkeypatch.setenv("MASTER_PORT", "29500")
    (problem,) = check_launcher()
    assert (
        "started one process instead of several" in problem
        and "MULTI_CPU" in problem
        and "configs/cpu_2proc.yaml" in problem
    )
    monkeypatch.setenv("PMI_SIZE", "2")
    (problem,) = check_launcher()
    assert problem.startswith("PMI_SIZE=2: mpirun is not supported")


LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x: must be an integer"),
        ({"RANK": "x"}, "RANK=x: must be an integer"),
        (LAUNCHED | {"RANK": "5"}, "RANK=5: must be below WORLD_SIZE=2"),
        (LAUNCHED | {"WORLD_SIZE": "1", "RANK": "3"}, "RANK=3: must be below WORLD_SIZE=1"),
        (LAUNCHED | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999: must be a port, 1 to 65535"),
        (LAUNCHED | {"MASTER_PORT": "0"}, "MASTER_PORT=0: must be a port, 1 to 65535"),
        (LAUNCHED | {"MASTER_ADDR": ""}, "MASTER_ADDR=: no such host (empty)"),
        (LAUNCHED | {"MASTER_ADDR": "no such host"}, "MASTER_ADDR=no such host: no such host"),
        ({"ACCELERATE_MIXED_PRECISION": ""}, "ACCELERATE_MIXED_PRECISION=: must be no, fp16, bf16, fp8, or not set"),
        ({"ACCELERATE_MIXED_PRECISION": "fp4"}, "ACCELERATE_MIXED_PRECISION=fp4: must be no, fp16"),
        ({"ACCELERATE_USE_FSDP": "maybe"}, "ACCELERATE_USE_FSDP=maybe: must be true or false"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DEEPSPEED: DeepSpeed is not installed; run pip install deepspeed"),
        *(({name: "2"}, f"{name}=2: mpirun is not supported") for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")),
    ],
)
def test_variables_that_make_no_sense_get_one_line(monkeypatch, variables, words):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (problem,) = check_launcher()
    assert words in problem


@pytest.mark.parametrize("variables", [LAUNCHED, LAUNCHED | {"PMI_SIZE": "2"}, {"LOCAL_RANK": "-1"}, {"PMI_SIZE": "1"}])
def test_variables_of_launchers_are_accepted(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert check_launcher() == []


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, ["fsdp_version=1", "fsdp_version: 2", "fsdp2.yaml"]),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            ["fsdp_activation_checkpointing=true", "set activation_checkpointing=true in the recipe"],
        ),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, ["MEGATRON_LM", "configs/fsdp2.yaml"]),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, ["mixed_precision: fp8", "pip install torchao"]),
        *(
            ({f"PARALLELISM_CONFIG_{kind}_SIZE": "2"}, [f"parallelism_config_{kind.lower()}_size=2", "set it to 1"])
            for kind in ("TP", "CP", "SP")
        ),
    ],
)
def test_unsupported_launcher_settings_are_refused(monkeypatch, variables, words):
    monkeypatch.setattr("nanogpt_accel.distributed.launcher.FP8_BACKENDS", ("no_such_module",))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (problem,) = check_launcher()
    assert [word for word in words if word not in problem] == []


def test_supported_launcher_settings_are_accepted(monkeypatch):
    monkeypatch.setattr(
        "nanogpt_accel.distributed.launcher.FP8_BACKENDS", ("no_such_module", "json")
    )  # one of them is installed
    for name, value in {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
        "PARALLELISM_CONFIG_TP_SIZE": "1",
        "ACCELERATE_MIXED_PRECISION": "fp8",
    }.items():
        monkeypatch.setenv(name, value)
    assert check_launcher() == []
