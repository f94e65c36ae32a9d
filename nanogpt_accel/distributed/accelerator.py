"""Make the Accelerator from the launcher's and the recipe's settings."""

import os
import sys
from datetime import timedelta

from ..utils.fields import raise_problems
from .launcher import launcher_requests, world_size


def pick_device(device):
    """The torch.device of a recipe's `device`; auto takes the CPU where the launcher says so, else CUDA, MPS, CPU.

    Raises:
        ValueError: torch does not see that device here.
    """
    import torch

    here = [
        name
        for name, found in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))
        if found
    ] + ["cpu"]
    if device == "auto":
        is_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
        return torch.device("cpu" if is_cpu else here[0])
    chosen = torch.device(device)
    if chosen.type not in here:
        raise ValueError(
            f"device={device}: torch {torch.__version__} sees no such device here; device=auto takes {here[0]}"
        )
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device}: the last CUDA device here is cuda:{torch.cuda.device_count() - 1}")
    return chosen


def make_accelerator(
    device="auto", mixed_precision="auto", compile=False, trackers=(), logging_dir=None, collective_timeout=600
):
    """An Accelerator for the chosen device and precision.

    Args:
        device: auto, cpu, cuda, cuda:N or mps.
        mixed_precision: auto, no, fp16 or bf16; see pick_precision.
        compile: see compiles; "regional" compiles a block once for all.
        trackers: names of Accelerate's trackers. logging_dir: where those that write files put them.
        collective_timeout: seconds that a process waits for the others before the run ends.

    Raises:
        ValueError: a device that is not here, or processes that do not see each other.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs, TorchDynamoPlugin

    # where a notebook makes a second one, it would take over the device, precision and compilation of the first
    AcceleratorState._reset_state(reset_partial_state=world_size() == 1)
    chosen = pick_device(device)
    os.environ.pop("ACCELERATE_TORCH_DEVICE", None)  # an earlier run's, in a notebook
    if chosen.index is not None:
        if world_size() > 1:
            raise ValueError(
                f"device={device}: all WORLD_SIZE={world_size()} processes would take this one; with "
                "device=cuda each takes its own"
            )
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
        torch.cuda.set_device(chosen)
    if sys.platform == "win32" and chosen.type == "cuda" and world_size() > 1:
        raise ValueError(
            f"WORLD_SIZE={world_size()}: GPUs talk to each other by NCCL, which Windows has not: use one "
            "process, or WSL2"
        )
    precision = pick_precision(mixed_precision, chosen.type)
    if (chosen.type, precision) == ("mps", "bf16") and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise ValueError("mixed_precision=bf16: on MPS it takes macOS 14; take fp16 or no")
    torch.set_float32_matmul_precision("high")  # TF32 where the hardware has it, as nanoGPT allows
    accelerator = Accelerator(
        # without a GPU, processes do not see each other unless Accelerate is told that the CPU is meant
        cpu=chosen.type == "cpu",
        mixed_precision=precision,
        dynamo_plugin=TorchDynamoPlugin(
            backend="inductor" if should_compile(compile, chosen.type) else "no",
            dynamic=False,
            use_regional_compilation=compile == "regional",
        ),
        log_with=list(trackers) or None,
        project_dir=logging_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=collective_timeout))],
    )
    if world_size() != accelerator.num_processes:
        raise ValueError(
            f"the launcher started WORLD_SIZE={world_size()} processes but Accelerate sees "
            f"{accelerator.num_processes}: on CPU set ACCELERATE_USE_CPU=true, on GPUs launch with "
            "--multi_gpu or torchrun"
        )
    for kind in ("FSDP", "DEEPSPEED"):
        if launcher_requests(kind) and accelerator.distributed_type != kind:
            raise ValueError(
                f"the launcher asks for {kind}, and Accelerate does not shard on {chosen.type}: take "
                "configs/multi_gpu.yaml, or configs/cpu_2proc.yaml"
            )
    return accelerator


def assert_ranks_agree(accelerator, **facts):
    """Check that all processes are about to do the same.

    facts: dictionaries of plain values, by what they are: the recipe, the data.

    Raises:
        ValueError: on every process, with what differs and where.
    """
    from accelerate.utils import gather_object

    if accelerator.num_processes == 1:
        return
    first, *others = gather_object([facts])
    problems = []
    for rank, other in enumerate(others, 1):
        for what, values in first.items():
            differing = [key for key in values | other[what] if values.get(key) != other[what].get(key)]
            problems += [
                f"{what}: {key}={other[what].get(key)} on process {rank}, and {values.get(key)} on process 0: "
                "all have to see the same recipe, options and files"
                for key in differing
            ]
    raise_problems(problems)


def should_compile(compile, device_type):
    """Whether a recipe's `compile` compiles the model: "auto" does on CUDA, where it pays, but not under Windows, where
    torch comes without Triton, nor with DeepSpeed, whose hooks it does not know."""
    if compile != "auto":
        return bool(compile)
    return device_type == "cuda" and sys.platform != "win32" and not launcher_requests("DEEPSPEED")


def pick_precision(mixed_precision, device_type):
    """no, fp16, bf16 or fp8. An explicit value of the recipe wins.

    auto: 1) what the launcher says, where it says more than its default "no" (which it also passes on when
    nobody was asked); 2) auto_precision.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision != "auto":
        return mixed_precision
    if launched != "no":
        return launched
    return auto_precision(device_type, has_native_bf16(device_type))


def auto_precision(device_type, has_bf16):
    """Return what mixed_precision=auto means on a device: bf16 if it is native, fp16 on other CUDA devices, else no."""
    return "bf16" if has_bf16 else "fp16" if device_type == "cuda" else "no"


def has_native_bf16(device_type):
    """Whether the device computes in bfloat16 and does not emulate it, nor is slower with it; of CPUs those with
    Intel's AMX are known not to be."""
    import torch

    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device_type == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
