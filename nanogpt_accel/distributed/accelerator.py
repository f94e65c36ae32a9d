"""Create the Accelerator from the settings of the launcher and the recipe."""

import hashlib
import os
import platform
import sys
from datetime import timedelta
from importlib import import_module
from pathlib import Path

from .. import __version__
from ..utils.packaged import packaged
from ..utils.text import one_line
from . import rendezvous
from .launcher import launcher_requests, world_size

PACKAGE = Path(__file__).parents[1]


def pick_device(device):
    """Return the torch.device for a recipe's `device`. auto: the CPU if the launcher requests it, otherwise
    the first of CUDA, MPS and CPU that is available.

    Raises:
        ValueError: torch does not find this device.
    """
    import torch

    checks = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [name for name, is_available in checks.items() if is_available]
    if device == "auto":
        return torch.device("cpu" if launcher_requests("CPU") else available[0])
    chosen = torch.device(device)
    if chosen.type not in available:
        problem = f"torch {torch.__version__} finds no such device"
        raise ValueError(f"device={device}: {problem}; device=auto uses {available[0]}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device}: the last CUDA device is cuda:{torch.cuda.device_count() - 1}")
    return chosen


def make_accelerator(
    device="auto", mixed_precision="auto", compile=False, trackers=(), logging_dir=None, collective_timeout=600
):
    """Return an Accelerator with the given settings, after checking that they work on this machine.

    Args:
        device: auto, cpu, cuda, cuda:N or mps.
        mixed_precision: auto, no, fp16 or bf16; see pick_precision.
        compile: true, false, "auto" (see should_compile) or "regional" (compile one block, reuse it for all blocks).
        trackers: names of Accelerate's trackers. logging_dir: the folder for their files.
        collective_timeout: seconds that a process waits for the others before it ends the run with an error.

    Raises:
        ValueError: the device is not available or does not support the settings, or Accelerate does not see all
            processes that the launcher started.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import InitProcessGroupKwargs, TorchDynamoPlugin

    processes = world_size()
    # Accelerate keeps global state. Without a reset, a second Accelerator in a notebook would use the device,
    # precision and compilation of the first. Processes that the notebook forks would assume a world size of 1.
    is_stale = processes == 1 or PartialState._shared_state.get("num_processes") != processes
    AcceleratorState._reset_state(reset_partial_state=is_stale)
    os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    chosen = pick_device(device)
    launched = f"WORLD_SIZE={processes}"
    if chosen.index is not None:
        if processes > 1:
            raise ValueError(f"device={device}: all processes ({launched}) would use this GPU; set device=cuda")
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
        torch.cuda.set_device(chosen)
    if sys.platform == "win32" and chosen.type == "cuda" and processes > 1:
        raise ValueError(f"{launched}: several GPUs need NCCL, which Windows does not have; use one process or WSL2")
    precision = pick_precision(mixed_precision, chosen.type)
    if (chosen.type, precision) == ("mps", "bf16") and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise ValueError("mixed_precision=bf16: on MPS, bf16 requires macOS 14; set mixed_precision=fp16 or no")
    torch.set_float32_matmul_precision("high")  # TF32 if the hardware has it, as in nanoGPT
    try:
        accelerator = Accelerator(
            cpu=chosen.type == "cpu",  # otherwise Accelerate does not connect processes that have no GPU
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
    except (ValueError, KeyError, ImportError) as error:  # due to a launcher setting that check_launcher does not check
        names = [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_"))]
        fix = f"check the config file of `accelerate launch` and {', '.join(sorted(names))}"
        raise ValueError(f"Accelerate cannot use the launcher's settings: {one_line(error)}; {fix}") from error
    rendezvous.close()
    if processes != accelerator.num_processes:
        raise ValueError(
            f"{launched}: the launcher started {processes} processes, but Accelerate sees "
            f"{accelerator.num_processes}; to train on CPUs, set ACCELERATE_USE_CPU=true; to train on GPUs, use "
            "`accelerate launch --multi_gpu` or torchrun"
        )
    for kind in ("FSDP", "DEEPSPEED"):
        if launcher_requests(kind) and accelerator.distributed_type != kind:
            raise ValueError(
                f"the launcher requests {kind}, which Accelerate does not support on {chosen.type}; use "
                f"{packaged('configs/multi_gpu.yaml')} or {packaged('configs/cpu_2proc.yaml')}"
            )
    return accelerator


def environment(device, mixed_precision):
    """Return {name: text} of the device, the precision and the software versions. They must be equal on all ranks."""
    chosen = pick_device(device).type
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(PACKAGE.rglob("*.py"))))
    return {
        "device": chosen,
        "mixed_precision": pick_precision(mixed_precision, chosen),
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{name: import_module(name).__version__ for name in ("torch", "accelerate", "transformers", "numpy")},
        "nanogpt_accel": f"{__version__}, code {code.hexdigest()[:8]}",
    }


def should_compile(compile, device_type):
    """Return whether to compile the model with a recipe's `compile` setting. auto: compile on CUDA, except on Windows
    (torch has no Triton there) and with DeepSpeed (torch.compile does not support its hooks)."""
    if compile != "auto":
        return bool(compile)
    return device_type == "cuda" and sys.platform != "win32" and not launcher_requests("DEEPSPEED")


def pick_precision(mixed_precision, device_type):
    """Return the precision to use: no, fp16, bf16 or fp8. For mixed_precision=auto, use the launcher's setting,
    or auto_precision if that setting is "no", the default of `accelerate launch`."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision != "auto":
        return mixed_precision
    return launched if launched != "no" else auto_precision(device_type, has_native_bf16(device_type))


def auto_precision(device_type, has_bf16):
    """Return the precision of mixed_precision=auto: bf16 if it is supported natively, else fp16 on CUDA, else no."""
    return "bf16" if has_bf16 else "fp16" if device_type == "cuda" else "no"


def has_native_bf16(device_type):
    """Return whether the hardware multiplies matrices faster in bfloat16 than in float32. CPUs need AMX or
    AVX512-BF16 for this; with both, training steps are 1.3 to 2 times as fast."""
    import torch

    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)() if device_type == "cpu" else {}
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
