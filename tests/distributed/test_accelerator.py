"""accelerator.py: device, precision and compilation of a run, and the Accelerator that is made for them."""

import os
from types import SimpleNamespace

import accelerate
import pytest
import torch
from accelerate.utils import DistributedType
from launching import run_python

from nanogpt_accel.distributed.accelerator import (
    environment,
    make_accelerator,
    pick_device,
    pick_precision,
    should_compile,
)

pytestmark = pytest.mark.usefixtures("no_launcher")


@pytest.fixture
def machine(monkeypatch):
    """Return a function that sets what torch reports: after machine(cuda=2), torch reports two CUDA devices."""

    def make(cuda=0, mps=False, bf16=False, emulated=False, amx=False, avx512_bf16=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or (emulated and including_emulation)
        )
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx, "avx512_bf16": avx512_bf16}, raising=False
        )

    return make


# ---- devices


def test_device_auto_picks_cuda_then_mps_then_cpu(machine):
    machine(cuda=1, mps=True)
    assert pick_device("auto") == torch.device("cuda")
    machine(mps=True)
    assert pick_device("auto") == torch.device("mps")
    machine()
    assert pick_device("auto") == torch.device("cpu")


def test_device_auto_picks_the_cpu_if_the_launcher_requests_it(machine, monkeypatch):
    machine(cuda=1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")  # as `accelerate launch --cpu` writes it
    assert pick_device("auto") == torch.device("cpu") and pick_device("cuda") == torch.device("cuda")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    assert pick_device("auto") == torch.device("cuda")


def test_device_by_name(machine):
    machine(cuda=4)
    assert pick_device("cuda:3") == torch.device("cuda:3") and pick_device("cuda") == torch.device("cuda")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("here", "device", "words"),
    [
        ({}, "cuda", ["device=cuda:", "no such device", "device=auto uses cpu"]),
        ({}, "cuda:1", ["device=cuda:1:", "device=auto uses cpu"]),
        ({}, "mps", ["device=mps:", "device=auto uses cpu"]),
        ({"cuda": 2}, "mps", ["device=mps:", "device=auto uses cuda"]),
        ({"cuda": 2}, "cuda:2", ["device=cuda:2", "the last CUDA device is cuda:1"]),
    ],
)
def test_missing_device_is_refused_with_an_alternative(refused, machine, here, device, words):
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
        # 2) the launcher, unless it has its default
        ("auto", "bf16", {}, "cpu", "bf16"),
        ("auto", "fp8", {"bf16": True}, "cuda", "fp8"),
        ("auto", "no", {"bf16": True}, "cuda", "bf16"),
        # 3) bf16 if the hardware supports it: not a T4, which emulates it; a CPU with AMX or AVX512-BF16
        ("auto", None, {"amx": True}, "cpu", "bf16"),
        ("auto", None, {"avx512_bf16": True}, "cpu", "bf16"),
        ("auto", None, {"avx512_bf16": True}, "mps", "no"),
        ("auto", "no", {"amx": True}, "cpu", "bf16"),
        ("no", None, {"amx": True}, "cpu", "no"),
        ("auto", None, {"amx": True}, "cuda", "fp16"),
        ("auto", None, {"bf16": True}, "cuda", "bf16"),
        ("auto", None, {"emulated": True}, "cuda", "fp16"),
        ("auto", None, {}, "cuda", "fp16"),
        # 4) float32
        ("auto", None, {"bf16": True}, "cpu", "no"),
        ("auto", None, {"bf16": True}, "mps", "no"),
    ],
)
def test_precision_comes_from_recipe_then_launcher_then_hardware(
    monkeypatch, machine, asked, launched, here, device, expected
):
    machine(cuda=1, **here)
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert pick_precision(asked, device) == expected


# ---- the accelerator


@pytest.fixture
def made(monkeypatch):
    """The arguments that make_accelerator passes to Accelerator, which is replaced."""
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
def test_arguments_for_accelerator(machine, made, here, device, compile, is_cpu, is_compiled):
    machine(**here)
    make_accelerator(device, "no", compile, ["tensorboard"], logging_dir="runs/x")
    (asked,) = made
    assert asked["cpu"] is is_cpu and asked["mixed_precision"] == "no"
    assert asked["dynamo_plugin"].backend.value.lower() == ("inductor" if is_compiled else "no")
    assert asked["log_with"] == ["tensorboard"] and asked["project_dir"] == "runs/x"
    # the training loop accumulates, so that the environment cannot change it
    assert "gradient_accumulation_steps" not in asked
    assert torch.get_float32_matmul_precision() == "high"


def test_deepspeed_is_compiled_only_on_request(monkeypatch):
    assert should_compile("auto", "cuda") and should_compile("regional", "cuda")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert not should_compile("auto", "cuda") and should_compile(True, "cuda")


def test_cuda_device_by_number_with_several_processes_is_refused(machine, made, monkeypatch, refused):
    machine(cuda=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused(ValueError, "device=cuda:1", "WORLD_SIZE=2", "device=cuda"):
        make_accelerator("cuda:1")


def test_cuda_device_by_number_is_set_for_torch_and_accelerate(machine, made, monkeypatch):
    machine(cuda=4)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "restored by monkeypatch")
    make_accelerator("cuda:3", "no")
    assert chosen == [torch.device("cuda:3")] and os.environ["ACCELERATE_TORCH_DEVICE"] == "cuda:3"


def test_world_size_that_accelerate_does_not_see_is_refused(refused, machine, made, monkeypatch):
    machine()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused(ValueError, "WORLD_SIZE=2", "Accelerate sees 1", "ACCELERATE_USE_CPU=true", "--multi_gpu"):
        make_accelerator("cpu")


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharding_that_accelerate_would_ignore_is_refused(refused, machine, monkeypatch, made, name):
    machine()
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    monkeypatch.setattr(
        accelerate,
        "Accelerator",
        lambda **options: SimpleNamespace(num_processes=1, distributed_type=DistributedType.MULTI_CPU),
    )
    with refused(ValueError, f"the launcher requests {name}", "does not support on cpu", "configs/cpu_2proc.yaml"):
        make_accelerator("cpu")
    monkeypatch.setattr(
        accelerate,
        "Accelerator",
        lambda **options: SimpleNamespace(num_processes=1, distributed_type=DistributedType(name)),
    )
    make_accelerator("cpu")


def test_make_accelerator_in_a_new_process():
    """A new process is needed, because Accelerate keeps its state until the process ends."""
    script = (
        "from nanogpt_accel.distributed.accelerator import make_accelerator\n"
        "a = make_accelerator('cpu')\n"
        "print(a.device.type, a.mixed_precision, a.num_processes, a.is_main_process)"
    )
    done = run_python("-c", script)
    assert done.stdout.split() == ["cpu", pick_precision("auto", "cpu"), "1", "True"]


def test_environment_names_what_must_be_the_same_on_all_ranks(machine):
    machine(amx=True)
    found = environment("auto", "auto")
    assert (found["device"], found["mixed_precision"], found["torch"]) == ("cpu", "bf16", torch.__version__)
    assert "code " in found["nanogpt_accel"] and found == environment("cpu", "bf16")


@pytest.mark.parametrize(
    ("name", "value"),
    [("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "abc"), ("ACCELERATE_DEBUG_MODE", "x")],
)
def test_settings_that_accelerate_rejects_get_one_line(refused, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with refused(ValueError, "Accelerate cannot use the launcher's settings", name):
        make_accelerator("cpu", "no")
