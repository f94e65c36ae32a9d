"""One Accelerator, made of what the launcher says and what the recipe asks for; guards around it; and an orderly stop
on all processes."""

import os
import secrets
import signal
import sys
import threading
import time
from datetime import timedelta

# Accelerate's trackers -> the module that each needs
TRACKERS = {"aim": "aim", "clearml": "clearml", "comet_ml": "comet_ml", "dvclive": "dvclive", "mlflow": "mlflow",
            "swanlab": "swanlab", "tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}
TEXT_TRACKERS = ("comet_ml", "tensorboard", "wandb")
FP8_BACKENDS = ("torchao", "transformer_engine", "msamp")  # any of these modules will do for Accelerate


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
                        f"run {fewer} process{'es' * (fewer != '1')}")
    problems += check_launcher()
    for name in trackers:
        if name not in TRACKERS:
            problems.append(f"tracking.trackers={name}: there are {', '.join(TRACKERS)}")
        elif find_spec(TRACKERS[name]) is None:
            problems.append(f"tracking.trackers={name}: not installed here, pip install {TRACKERS[name]}")
    return problems


def check_launcher():
    """Whether WORLD_SIZE was set by a launcher, which sets more than that, as a list of problems."""
    from importlib.util import find_spec

    problems = []
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world_size() > 1 and missing:
        problems.append(f"WORLD_SIZE={world_size()} is set, but not {', '.join(missing)}: launch with `accelerate "
                        "launch` or torchrun, or unset WORLD_SIZE")
    # what `accelerate launch --cpu --num_processes 2` and a config of type MULTI_CPU leave behind: they were asked for
    # several processes and start one
    is_mpi = any(name in os.environ for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"))
    if {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ and not is_mpi:
        problems.append("accelerate launch was asked for several processes and started one, as it does with --cpu and "
                        "with distributed_type: MULTI_CPU: use --config_file configs/cpu_2proc.yaml, or torchrun")
    for name, wanted, remedy in (
            ("FSDP_VERSION", "2", "set fsdp_version: 2 in the config file, as configs/fsdp2.yaml does"),
            ("FSDP_ACTIVATION_CHECKPOINTING", "false", "leave it to the recipe: activation_checkpointing=true")):
        value = os.environ.get(name, wanted)
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and value.lower() != wanted:
            problems.append(f"{name.lower()}={value}: this model does not train right with it: {remedy}")
    if os.environ.get("ACCELERATE_USE_MEGATRON_LM", "").lower() == "true":
        problems.append("distributed_type: MEGATRON_LM: not for this model; shard it with configs/fsdp2.yaml")
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp8" and not any(map(find_spec, FP8_BACKENDS)):
        problems.append("mixed_precision: fp8 of the launcher needs a library that is not installed here: pip install "
                        "torchao")
    for kind in ("TP", "CP", "SP"):
        size = os.environ.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1")
        if size != "1":
            problems.append(f"parallelism_config_{kind.lower()}_size={size}: only data-parallel sharding is done here; "
                            "set it to 1")
    return problems


def world_size():
    """Number of processes that the launcher started, by its environment variable."""
    value = os.environ.get("WORLD_SIZE", "1")
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"WORLD_SIZE={value}: this variable is the launcher's number of processes; unset it")
    return int(value)


def asks_for(kind):
    """True where the launcher asks for this kind of sharding, FSDP or DEEPSPEED."""
    return os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true"


def is_main():
    """True on the process that prepares, logs and saves."""
    return world_size() == 1 or os.environ.get("RANK", "0") == "0"


def pick_device(device):
    """The torch.device of a recipe's `device`; auto takes the CPU where the launcher says so, else CUDA, MPS, CPU.

    Raises:
        ValueError: torch does not see that device here.
    """
    import torch

    here = [name for name, found in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))
            if found] + ["cpu"]
    if device == "auto":
        is_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
        return torch.device("cpu" if is_cpu else here[0])
    chosen = torch.device(device)
    if chosen.type not in here:
        raise ValueError(f"device={device}: torch {torch.__version__} sees no such device here; device=auto takes "
                         f"{here[0]}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device}: the last CUDA device here is cuda:{torch.cuda.device_count() - 1}")
    return chosen


def make_accelerator(device="auto", mixed_precision="auto", compile=False, trackers=(), logging_dir=None,
                     collective_timeout=600):
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
            raise ValueError(f"device={device}: all WORLD_SIZE={world_size()} processes would take this one; with "
                             "device=cuda each takes its own")
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
        torch.cuda.set_device(chosen)
    if sys.platform == "win32" and chosen.type == "cuda" and world_size() > 1:
        raise ValueError(f"WORLD_SIZE={world_size()}: GPUs talk to each other by NCCL, which Windows has not: use one "
                         "process, or WSL2")
    precision = pick_precision(mixed_precision, chosen.type)
    if (chosen.type, precision) == ("mps", "bf16") and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise ValueError("mixed_precision=bf16: on MPS it takes macOS 14; take fp16 or no")
    torch.set_float32_matmul_precision("high")  # TF32 where the hardware has it, as nanoGPT allows
    accelerator = Accelerator(
        # without a GPU, processes do not see each other unless Accelerate is told that the CPU is meant
        cpu=chosen.type == "cpu",
        mixed_precision=precision,
        dynamo_plugin=TorchDynamoPlugin(backend="inductor" if compiles(compile, chosen.type) else "no", dynamic=False,
                                        use_regional_compilation=compile == "regional"),
        log_with=list(trackers) or None,
        project_dir=logging_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=collective_timeout))],
    )
    if world_size() != accelerator.num_processes:
        raise ValueError(f"the launcher started WORLD_SIZE={world_size()} processes but Accelerate sees "
                         f"{accelerator.num_processes}: on CPU set ACCELERATE_USE_CPU=true, on GPUs launch with "
                         "--multi_gpu or torchrun")
    for kind in ("FSDP", "DEEPSPEED"):
        if asks_for(kind) and accelerator.distributed_type != kind:
            raise ValueError(f"the launcher asks for {kind}, and Accelerate does not shard on {chosen.type}: take "
                             "configs/multi_gpu.yaml, or configs/cpu_2proc.yaml")
    return accelerator


def require_same(accelerator, **facts):
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
            problems += [f"{what}: {key}={other[what].get(key)} on process {rank}, and {values.get(key)} on process 0: "
                         "all have to see the same recipe, options and files" for key in differing]
    if problems:
        raise ValueError("\n".join(problems))


def lost_process(error):
    """Why a collective operation failed, as one line, where `error` says that another process is gone or silent; else
    None."""
    import torch

    words = ("connection closed by peer", "connection reset", "broken pipe", "timed out", "timeout", "socket")
    text = str(error)
    is_lost = isinstance(error, torch.distributed.DistError) or any(word in text.lower() for word in words)
    return (text.strip().splitlines() or [type(error).__name__])[0] if is_lost and world_size() > 1 else None


class StopSignals:
    """Notes SIGTERM, SIGINT, SIGUSR1 and Windows' SIGBREAK, for the loop to stop in order; a second Ctrl-C leaves at
    once.

    with StopSignals() as signals: ...; `armed` says that there is a loop which looks at `received`. Until then all but
    SIGUSR1 end the process as always.
    """

    def __init__(self):
        self.received, self.armed, self._last, self._before = None, False, 0.0, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            # (SIGUSR1 is there under POSIX, SIGBREAK under Windows: Ctrl-Break, and what one process can send another)
            for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGBREAK"):
                if hasattr(signal, name):
                    self._before[name] = signal.signal(getattr(signal, name), self._note)
        return self

    def __exit__(self, *error):
        for name, handler in self._before.items():
            signal.signal(getattr(signal, name), handler)

    def _note(self, number, frame):
        # Ctrl-C reaches the processes of a launcher twice: from the terminal, and from the launcher
        is_second = number == signal.SIGINT and self.received and time.monotonic() - self._last > 2
        self._last = time.monotonic()
        if is_second:
            os._exit(130)
        if not self.armed and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.armed and number in (signal.SIGTERM, getattr(signal, "SIGBREAK", None)):
            sys.exit(128 + number)
        self.received = self.received or signal.Signals(number).name


class Agreement:
    """Lets all processes know, step by step, whether one of them wants to stop, without waiting for the device.

    The answer is that of the step before: the exchange, over gloo between the processors, is done by then.
    """

    def __init__(self, accelerator, collective_timeout=600):
        import torch

        self.accelerator, self._exchange = accelerator, None
        if accelerator.num_processes > 1:
            self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=collective_timeout))

    def any(self, wish):
        """Whether any process wished it at the call before; to be called by all, the same number of times."""
        import torch

        if self.accelerator.num_processes == 1:
            return bool(wish)
        before, flag = self._exchange, torch.tensor([int(bool(wish))])
        self._exchange = (torch.distributed.all_reduce(flag, group=self._group, async_op=True), flag)
        if before is None:
            return False
        before[0].wait()
        return bool(before[1].item())

    def close(self):
        """Wait for the last exchange, so that the processes may part."""
        if self._exchange is not None:
            self._exchange[0].wait()


class Trackers:
    """The Accelerator's trackers of a run, which are left alone where they fail: a run costs more than its plot.

    Args:
        project: the trackers' project. config: flat. first_step: where the run goes on; a resumed one goes on as the
            same run of the tracker. folder: the run folder, where those that write files put them. name: of the run.
        warn: takes a line.

    Raises:
        ValueError: a tracker does not start; the message holds its own reason.
    """

    def __init__(self, accelerator, project, config, first_step, folder, name, warn=print):
        self.accelerator, self.warn, self._is_warned = accelerator, warn, False
        options = {"wandb": {"name": name, "dir": str(folder)}}
        if accelerator.is_main_process and any(str(tracker) == "wandb" for tracker in accelerator.log_with):
            options["wandb"] |= {"id": self._wandb_id(folder, is_new=first_step == 0), "resume": "allow"}
        if first_step:
            options["tensorboard"] = {"purge_step": first_step}  # what a lost part of the run wrote after it
        try:
            accelerator.init_trackers(project, config=config, init_kwargs=options)
        except Exception as error:  # every tracker has errors of its own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"tracking.trackers: one does not start: {reason} (without a network or an account: "
                             "WANDB_MODE=offline, or trackers=tensorboard)") from None

    def log_text(self, name, text, step):
        """For those that show text."""
        for tracker in self.accelerator.trackers:
            if tracker.name in TEXT_TRACKERS:
                self._try(tracker.log, {name: text}, step)

    def log(self, values, step):
        self._try(self.accelerator.log, values, step)

    def _try(self, log, values, step):
        try:
            log(values, step=step)
        except Exception as error:
            if not self._is_warned:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                self.warn(f"warning: a tracker fails ({reason}); the run goes on, and metrics.jsonl has everything")
            self._is_warned = True

    @staticmethod
    def _wandb_id(folder, is_new):
        """The id of the run at wandb, kept in the run folder."""
        file = folder / ".wandb_id"
        if is_new or not file.is_file():
            file.write_text(secrets.token_hex(4), encoding="utf-8")
        return file.read_text(encoding="utf-8").strip()


def compiles(compile, device_type):
    """Whether a recipe's `compile` compiles the model: "auto" does on CUDA, where it pays, but not under Windows, where
    torch comes without Triton, nor with DeepSpeed, whose hooks it does not know."""
    if compile != "auto":
        return bool(compile)
    return device_type == "cuda" and sys.platform != "win32" and not asks_for("DEEPSPEED")


def pick_precision(mixed_precision, device_type):
    """no, fp16, bf16 or fp8. An explicit value of the recipe wins.

    auto: 1) what the launcher says, where it says more than its default "no" (which it also passes on when
    nobody was asked); 2) bf16 where the device has it, see has_bf16; 3) fp16 on other CUDA devices; 4) no elsewhere.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision != "auto":
        return mixed_precision
    if launched != "no":
        return launched
    return "bf16" if has_bf16(device_type) else "fp16" if device_type == "cuda" else "no"


def has_bf16(device_type):
    """Whether the device computes in bfloat16 and does not emulate it, nor is slower with it; of CPUs those with
    Intel's AMX are known not to be."""
    import torch

    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device_type == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
