"""One Accelerator, made of what the launcher says and what the recipe asks for; and guards around it."""

import os

# Accelerate's trackers -> the module that each needs
TRACKERS = {"aim": "aim", "clearml": "clearml", "comet_ml": "comet_ml", "dvclive": "dvclive", "mlflow": "mlflow",
            "swanlab": "swanlab", "tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}


def check_launch(gradient_accumulation_steps, trackers=()):
    """What is wrong with the launch as far as it shows before torch is imported: a list of problems."""
    from importlib.util import find_spec

    problems = []
    processes = world_size()
    if gradient_accumulation_steps % processes:
        low = gradient_accumulation_steps // processes * processes
        fitting = " or ".join(str(n) for n in (low, low + processes) if n)
        fewer = " or ".join(str(n) for n in range(1, processes) if gradient_accumulation_steps % n == 0)
        problems.append(f"train.gradient_accumulation_steps={gradient_accumulation_steps} cannot be shared by "
                        f"{processes} processes (its product with batch_size makes the step): set it to {fitting}, or "
                        f"run {fewer} processes")
    problems += check_launcher()
    for name in trackers:
        if name not in TRACKERS:
            problems.append(f"tracking.trackers={name}: there are {', '.join(TRACKERS)}")
        elif find_spec(TRACKERS[name]) is None:
            problems.append(f"tracking.trackers={name}: not installed here, pip install {TRACKERS[name]}")
    return problems


def check_launcher():
    """Whether WORLD_SIZE was set by a launcher, which sets more than that, as a list of problems."""
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world_size() == 1 or not missing:
        return []
    return [f"WORLD_SIZE={world_size()} is set, but not {', '.join(missing)}: launch with `accelerate launch` or "
            "torchrun, or unset WORLD_SIZE"]


def world_size():
    """Number of processes that the launcher started, by its environment variable."""
    value = os.environ.get("WORLD_SIZE", "1")
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"WORLD_SIZE={value}: this variable is the launcher's number of processes; unset it")
    return int(value)


def is_main():
    """True on the process that prepares, logs and saves."""
    return world_size() == 1 or os.environ.get("RANK", "0") == "0"


def pick_device(device):
    """The torch.device of a recipe's `device`; auto takes CUDA, then MPS, then the CPU.

    Raises:
        ValueError: torch does not see that device here.
    """
    import torch

    here = [name for name, found in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))
            if found] + ["cpu"]
    if device == "auto":
        return torch.device(here[0])
    chosen = torch.device(device)
    if chosen.type not in here:
        raise ValueError(f"device={device}: torch {torch.__version__} sees no such device here; device=auto takes "
                         f"{here[0]}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device}: the last CUDA device here is cuda:{torch.cuda.device_count() - 1}")
    return chosen


def make_accelerator(device="auto", mixed_precision="auto", compile=False, trackers=(), logging_dir=None):
    """An Accelerator for the chosen device and precision.

    Args:
        device: auto, cpu, cuda, cuda:N or mps.
        mixed_precision: auto, no, fp16 or bf16; see pick_precision.
        compile: "auto" compiles on CUDA, where it pays; or true or false.
        trackers: names of Accelerate's trackers. logging_dir: where those that write files put them.

    Raises:
        ValueError: a device that is not here, or processes that do not see each other.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import TorchDynamoPlugin

    chosen = pick_device(device)
    if chosen.index is not None:
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
        torch.cuda.set_device(chosen)
    should_compile = chosen.type == "cuda" if compile == "auto" else compile
    torch.set_float32_matmul_precision("high")  # TF32 where the hardware has it, as nanoGPT allows
    accelerator = Accelerator(
        # without a GPU, processes do not see each other unless Accelerate is told that the CPU is meant
        cpu=chosen.type == "cpu",
        mixed_precision=pick_precision(mixed_precision, chosen.type),
        dynamo_plugin=TorchDynamoPlugin(backend="inductor" if should_compile else "no", dynamic=False),
        log_with=list(trackers) or None,
        project_dir=logging_dir,
    )
    if world_size() != accelerator.num_processes:
        raise ValueError(f"the launcher started WORLD_SIZE={world_size()} processes but Accelerate sees "
                         f"{accelerator.num_processes}: on CPU set ACCELERATE_USE_CPU=true, on GPUs launch with "
                         "--multi_gpu or torchrun")
    return accelerator


def start_trackers(accelerator, project, config, name, folder):
    """Start the Accelerator's trackers. config: flat; name: of the run; folder: where wandb puts its files.

    Raises:
        ValueError: a tracker does not start; the message holds its own reason.
    """
    try:
        accelerator.init_trackers(project, config=config, init_kwargs={"wandb": {"name": name, "dir": str(folder)}})
    except Exception as error:  # every tracker has errors of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"tracking.trackers: one does not start: {reason} (without a network or an account: "
                         "WANDB_MODE=offline, or trackers=tensorboard)") from None


def pick_precision(mixed_precision, device_type):
    """no, fp16, bf16 or fp8. An explicit value of the recipe wins.

    auto: 1) what the launcher says, where it says more than its default "no" (which it also passes on when
    nobody was asked); 2) bf16 where a CUDA device really has it rather than emulates it; 3) fp16 on other CUDA
    devices; 4) no elsewhere, for bf16 was seen to be slower on CPUs.
    """
    import torch

    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision != "auto":
        return mixed_precision
    if launched != "no":
        return launched
    if device_type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "no"
