"""launch.py: what is wrong with a launch before torch is there, and which device and precision a run takes."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import accelerate
import pytest
import torch
from accelerate.utils import DistributedType

from nanogpt_accel.distributed.accelerator import (
    assert_ranks_agree,
    make_accelerator,
    pick_device,
    pick_precision,
    should_compile,
)
from nanogpt_accel.distributed.launcher import check_launch, check_launcher, is_main, world_size
from nanogpt_accel.distributed.stop import lost_process
from nanogpt_accel.tracking.trackers import TRACKERS, check_trackers

LAUNCHED = ["WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in list(os.environ):
        if name.startswith("ACCELERATE_") or name in LAUNCHED:
            monkeypatch.delenv(name)


def launched(monkeypatch, processes, rank=0):
    """The environment of one of several processes, as torchrun and `accelerate launch` set it."""
    values = {
        "WORLD_SIZE": processes,
        "RANK": rank,
        "LOCAL_RANK": rank,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 29500,
    }
    assert set(values) == set(LAUNCHED)
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def machine(monkeypatch):
    """`machine(cuda=2)`: a machine with two CUDA devices, as far as torch tells."""

    def make(cuda=0, mps=False, bf16=False, emulated=False, amx=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or (emulated and including_emulation)
        )
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)

    return make


# ---- the batch arithmetic


@pytest.mark.parametrize(("micro_batches", "processes"), [(1, 1), (40, 1), (40, 8), (8, 8), (6, 3)])
def test_a_share_that_comes_out_even(monkeypatch, micro_batches, processes):
    launched(monkeypatch, processes)
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
def test_a_share_that_does_not(monkeypatch, micro_batches, processes, values, counts):
    launched(monkeypatch, processes)
    (problem,) = check_launch(micro_batches)
    assert problem.startswith(
        f"train.gradient_accumulation_steps={micro_batches} cannot be shared by {processes} processes"
    )
    first, second = re.search(r"set it to ([\d or]+), or run ([\d or]+) process(?:es)?$", problem).groups()
    offered = [{int(n) for n in part.split(" or ")} for part in (first, second)]
    assert offered == [values, counts]
    # each remedy is one
    assert all(value % processes == 0 for value in offered[0]) and all(micro_batches % n == 0 for n in offered[1])
    launched(monkeypatch, max(counts))
    assert check_launch(micro_batches) == []


def test_a_world_size_that_no_launcher_set(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    (problem,) = check_launch(8)
    assert problem.startswith("WORLD_SIZE=2 is set, but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT: launch with")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert check_launch(8) == []


# ---- what a launcher's config asks for


def test_a_launcher_that_started_one_of_several(monkeypatch):
    """What `accelerate launch --cpu --num_processes 2` and distributed_type: MULTI_CPU leave in the environment."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert check_launcher() == []  # --cpu alone: one process, as it was asked for
    monkeypatch.setenv("MASTER_PORT", "29500")
    (problem,) = check_launcher()
    assert "started one" in problem and "MULTI_CPU" in problem and "configs/cpu_2proc.yaml" in problem
    monkeypatch.setenv("PMI_SIZE", "2")  # mpirun tells the processes of each other in its own way
    assert check_launcher() == []


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, ["fsdp_version=1", "fsdp_version: 2", "fsdp2.yaml"]),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            ["fsdp_activation_checkpointing=true", "leave it to the recipe", "activation_checkpointing=true"],
        ),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, ["MEGATRON_LM", "configs/fsdp2.yaml"]),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, ["mixed_precision: fp8", "pip install torchao"]),
        *(
            ({f"PARALLELISM_CONFIG_{kind}_SIZE": "2"}, [f"parallelism_config_{kind.lower()}_size=2", "set it to 1"])
            for kind in ("TP", "CP", "SP")
        ),
    ],
)
def test_what_does_not_train_right(monkeypatch, variables, words):
    monkeypatch.setattr("nanogpt_accel.distributed.launcher.FP8_BACKENDS", ("no_such_module",))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (problem,) = check_launcher()
    assert [word for word in words if word not in problem] == []


def test_what_does_train_right(monkeypatch):
    monkeypatch.setattr(
        "nanogpt_accel.distributed.launcher.FP8_BACKENDS", ("no_such_module", "json")
    )  # one of them is there
    for name, value in {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
        "PARALLELISM_CONFIG_TP_SIZE": "1",
        "ACCELERATE_MIXED_PRECISION": "fp8",
    }.items():
        monkeypatch.setenv(name, value)
    assert check_launcher() == []


# ---- the same on all processes


def test_the_same_on_all_processes(refused, monkeypatch):
    def require(*gathered):
        monkeypatch.setattr("accelerate.utils.gather_object", lambda own: list(gathered))
        assert_ranks_agree(SimpleNamespace(num_processes=len(gathered)), **gathered[0])

    facts = {"recipe": {"seed": 1, "learning_rate": 1e-3}, "data": {"train": "abc"}}
    require(facts, facts, facts)
    with refused(ValueError, "recipe: seed=2 on process 2, and 1 on process 0"):
        require(facts, facts, {**facts, "recipe": {"seed": 2, "learning_rate": 1e-3}})
    with refused(ValueError, "data: val=x on process 1, and None on process 0"):
        require(facts, {**facts, "data": {"train": "abc", "val": "x"}})
    with pytest.raises(ValueError) as caught:
        require(facts, {"recipe": {"seed": 2, "learning_rate": 1e-3}, "data": {"train": "?"}})
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (torch.distributed.DistBackendError("NCCL watchdog\nmore"), True),
        (RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3"), True),
        (RuntimeError("Timed out waiting 8000ms for recv operation to complete"), True),
        (RuntimeError("CUDA out of memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
    ],
)
def test_a_process_that_is_lost(monkeypatch, error, is_lost):
    assert lost_process(error) is None  # one process alone
    launched(monkeypatch, 2)
    reason = lost_process(error)
    assert (reason is not None) == is_lost and "\n" not in (reason or "")


# ---- trackers


def test_trackers(monkeypatch):
    assert check_trackers([]) == []
    problems = check_trackers(["wandbb", "tensorboard", "nothing"])
    assert [p.partition(":")[0] for p in problems if "there are" in p] == [
        "tracking.trackers=wandbb",
        "tracking.trackers=nothing",
    ]
    assert "wandb" in problems[0] and "tensorboard" in problems[0]
    monkeypatch.setattr("nanogpt_accel.tracking.trackers.find_spec", lambda name: None)
    assert check_trackers(["wandb"]) == ["tracking.trackers=wandb: not installed here, pip install wandb"]


def test_the_trackers_are_accelerates():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(TRACKERS) == {getattr(name, "value", name) for name in LOGGER_TYPE_TO_CLASS}


# ---- processes


def test_processes_by_the_environment(monkeypatch):
    assert world_size() == 1 and is_main() is True
    for rank in range(4):
        launched(monkeypatch, 4, rank)
        assert world_size() == 4 and is_main() is (rank == 0)


# ---- devices


def test_auto_takes_the_best_device(machine):
    machine(cuda=1, mps=True)
    assert pick_device("auto") == torch.device("cuda")
    machine(mps=True)
    assert pick_device("auto") == torch.device("mps")
    machine()
    assert pick_device("auto") == torch.device("cpu")


def test_auto_takes_the_cpu_that_the_launcher_asks_for(machine, monkeypatch):
    machine(cuda=1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")  # as `accelerate launch --cpu` writes it
    assert pick_device("auto") == torch.device("cpu") and pick_device("cuda") == torch.device("cuda")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    assert pick_device("auto") == torch.device("cuda")


def test_a_device_by_name(machine):
    machine(cuda=4)
    assert pick_device("cuda:3") == torch.device("cuda:3") and pick_device("cuda") == torch.device("cuda")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("here", "device", "words"),
    [
        ({}, "cuda", ["device=cuda:", "no such device", "device=auto takes cpu"]),
        ({}, "cuda:1", ["device=cuda:1:", "device=auto takes cpu"]),
        ({}, "mps", ["device=mps:", "device=auto takes cpu"]),
        ({"cuda": 2}, "mps", ["device=mps:", "device=auto takes cuda"]),
        ({"cuda": 2}, "cuda:2", ["device=cuda:2", "the last CUDA device here is cuda:1"]),
    ],
)
def test_a_device_that_is_not_here(refused, machine, here, device, words):
    machine(**here)
    with refused(ValueError, *words):
        pick_device(device)


# ---- precision


@pytest.mark.parametrize(
    ("asked", "launched", "here", "device", "expected"),
    [
        # 1) the recipe
        ("bf16", None, {}, "cpu", "bf16"),
        ("no", "bf16", {"bf16": True}, "cuda", "no"),
        ("fp16", "bf16", {}, "cuda", "fp16"),
        # 2) the launcher, where it says more than its default
        ("auto", "bf16", {}, "cpu", "bf16"),
        ("auto", "fp8", {"bf16": True}, "cuda", "fp8"),
        ("auto", "no", {"bf16": True}, "cuda", "bf16"),
        # 3) bf16 where the hardware has it, which a T4 only emulates, and a CPU has where it has AMX
        ("auto", None, {"amx": True}, "cpu", "bf16"),
        ("auto", "no", {"amx": True}, "cpu", "bf16"),
        ("no", None, {"amx": True}, "cpu", "no"),
        ("auto", None, {"amx": True}, "cuda", "fp16"),
        ("auto", None, {"bf16": True}, "cuda", "bf16"),
        ("auto", None, {"emulated": True}, "cuda", "fp16"),
        ("auto", None, {}, "cuda", "fp16"),
        # 4) none elsewhere
        ("auto", None, {"bf16": True}, "cpu", "no"),
        ("auto", None, {"bf16": True}, "mps", "no"),
    ],
)
def test_pick_precision(monkeypatch, machine, asked, launched, here, device, expected):
    machine(cuda=1, **here)
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert pick_precision(asked, device) == expected


# ---- the accelerator


@pytest.fixture
def made(monkeypatch):
    """What make_accelerator asks of Accelerate, which is not started."""
    calls = []

    def Accelerator(**arguments):
        calls.append(arguments)
        return SimpleNamespace(num_processes=1, arguments=arguments)

    monkeypatch.setattr(accelerate, "Accelerator", Accelerator)
    before = torch.get_float32_matmul_precision()
    yield calls
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("here", "device", "compile", "is_cpu", "is_compiled"),
    [
        ({}, "auto", "auto", True, False),
        ({}, "cpu", True, True, True),
        ({}, "cpu", False, True, False),
        ({"cuda": 1}, "auto", "auto", False, True),
        ({"cuda": 1}, "cuda", False, False, False),
        ({"cuda": 1}, "cpu", "auto", True, False),
        ({"mps": True}, "auto", "auto", False, False),
    ],
)
def test_what_accelerate_is_asked_for(machine, made, here, device, compile, is_cpu, is_compiled):
    machine(**here)
    make_accelerator(device, "no", compile, ["tensorboard"], logging_dir="runs/x")
    (asked,) = made
    assert asked["cpu"] is is_cpu and asked["mixed_precision"] == "no"
    assert asked["dynamo_plugin"].backend.value.lower() == ("inductor" if is_compiled else "no")
    assert asked["log_with"] == ["tensorboard"] and asked["project_dir"] == "runs/x"
    # accumulation is the loop's own, so that the environment cannot change it
    assert "gradient_accumulation_steps" not in asked
    assert torch.get_float32_matmul_precision() == "high"


def test_deepspeed_is_compiled_only_where_it_is_asked_for(monkeypatch):
    assert should_compile("auto", "cuda") and should_compile("regional", "cuda")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert not should_compile("auto", "cuda") and should_compile(True, "cuda")


def test_one_cuda_device_is_not_for_several_processes(machine, made, monkeypatch, refused):
    machine(cuda=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused(ValueError, "device=cuda:1", "WORLD_SIZE=2", "device=cuda"):
        make_accelerator("cuda:1")


def test_one_cuda_device_of_several(machine, made, monkeypatch):
    machine(cuda=4)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "so that it is put back")
    make_accelerator("cuda:3", "no")
    assert chosen == [torch.device("cuda:3")] and os.environ["ACCELERATE_TORCH_DEVICE"] == "cuda:3"


def test_processes_that_do_not_see_each_other(refused, machine, made, monkeypatch):
    machine()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused(ValueError, "WORLD_SIZE=2", "Accelerate sees 1", "ACCELERATE_USE_CPU=true", "--multi_gpu"):
        make_accelerator("cpu")


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharding_that_accelerate_would_leave_out(refused, machine, monkeypatch, made, name):
    machine()
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    monkeypatch.setattr(
        accelerate,
        "Accelerator",
        lambda **options: SimpleNamespace(num_processes=1, distributed_type=DistributedType.MULTI_CPU),
    )
    with refused(ValueError, f"the launcher asks for {name}", "does not shard on cpu", "configs/cpu_2proc.yaml"):
        make_accelerator("cpu")
    monkeypatch.setattr(
        accelerate,
        "Accelerator",
        lambda **options: SimpleNamespace(num_processes=1, distributed_type=DistributedType(name)),
    )
    make_accelerator("cpu")


def test_a_real_accelerator():
    """In a process of its own, for Accelerate keeps its state for the whole process."""
    script = (
        "from nanogpt_accel.distributed.accelerator import make_accelerator\n"
        "a = make_accelerator('cpu')\n"
        "print(a.device.type, a.mixed_precision, a.num_processes, a.is_main_process)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cpu", pick_precision("auto", "cpu"), "1", "True"]
