"""Check what this machine and this launch can do, and say what to fix before a run.

    nanogpt-accel doctor
    accelerate launch --config_file configs/multi_gpu.yaml -m nanogpt_accel.doctor    # also between the processes

The exit status is 1 if something would stop a training run, else 0, also if there are warnings.

(`accelerate env` and torch.utils.collect_env print versions for bug reports. They compare none with what this package
needs, try nothing and suggest no fix, so only findings of our own can say what to do.)
"""

import json
import netrc
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path

import yaml
from pydantic import Field

from ..checkpoint.run_folder import check_writable
from ..distributed.accelerator import has_native_bf16, make_accelerator, should_compile
from ..distributed.launcher import check_launcher, is_main
from ..utils import cli
from ..utils.fields import Int, Section, raise_problems
from ..utils.files import cache_folder
from ..utils.text import first_line

OPTIONAL = ("wandb", "tensorboard", "deepspeed", "torchao", "lm_eval", "triton")
EXCHANGED = 64 * 2**20  # bytes of an all-reduce
ROUNDS = 5
COMPILE = """
import sys, torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU(), torch.nn.Linear(16, 1)).to(sys.argv[1])
x = torch.randn(4, 16, device=sys.argv[1])
compiled = torch.compile(model)(x)
compiled.sum().backward()
torch.testing.assert_close(compiled, model(x), rtol=1e-3, atol=1e-3)
"""


class DoctorOptions(Section):
    """The options of `doctor`."""

    compile_limit: Int = Field(
        120, ge=0, description="seconds that torch.compile may take to show that it works; 0: do not try"
    )
    json_output: bool = Field(False, alias="json", description="print one JSON object and nothing else")


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel doctor [key=value ...]",
            "Versions, devices, attention, torch.compile, the way between the processes of this "
            "launch, disk and caches: what is there, and what to fix.",
            {"options": DoctorOptions},
        )
    target, options, problems = cli.parse_options(argv, DoctorOptions)
    if target is not None:
        problems.append(f"{target}: doctor takes no target")
    raise_problems(problems)
    findings = examine(options.compile_limit)
    if is_main():
        if options.json_output:
            print(json.dumps({"ok": not is_broken(findings), "findings": findings}))
        else:
            for finding in findings:
                fix = f": {finding['fix']}" if finding["fix"] else ""
                print(f"{finding['state']:<8} {finding['what']:<16} {finding['found']}{fix}")
    if is_broken(findings):
        raise SystemExit(1)


def examine(compile_limit):
    """Return a list of findings {what, found, state, fix}. state: ok, warning, or broken if training cannot run."""
    findings = versions()
    if not is_broken(findings):  # else a package is missing, and nothing below could run
        findings += [broken("launch", problem) for problem in check_launcher()]
    if is_broken(findings):
        return findings
    try:
        accelerator = make_accelerator(collective_timeout=120)
    except ValueError as error:
        return [*findings, broken("launch", str(error))]
    except RuntimeError as error:  # the processes cannot connect
        fix = "look at MASTER_ADDR, MASTER_PORT and the network"
        return [*findings, broken("launch", first_line(error), "set USE_LIBUV=0" if "libuv" in str(error) else fix)]
    try:
        findings += exchange(accelerator)
    except RuntimeError as error:
        return [*findings, broken("processes", first_line(error), "NCCL_DEBUG=INFO tells more")]
    if accelerator.is_main_process:
        findings += devices(accelerator.device)
        findings += [precision(accelerator), attention(accelerator.device)]
        findings += compiling(accelerator.device, compile_limit)
        findings += [accelerate_config(), disk(), *caches(), *tokens()]
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return findings


def finding(state, what, found, fix=""):
    return {"what": what, "found": found, "state": state, "fix": fix}


ok, warning, broken = (partial(finding, state) for state in ("ok", "warning", "broken"))


def is_broken(findings):
    return any(finding["state"] == "broken" for finding in findings)


def versions():
    """Check the versions of Python, of the required packages and of the optional ones."""
    from packaging.requirements import Requirement

    found = [ok("python", f"{platform.python_version()} on {platform.platform()}")]
    try:
        needed = metadata.requires("nanogpt_accel")
    except metadata.PackageNotFoundError:
        return [*found, warning("nanogpt_accel", "is not installed, so what it needs is not known", "pip install -e .")]
    for requirement in map(Requirement, needed):
        name, fix = requirement.name, f"pip install '{requirement}'"
        if requirement.marker is not None:  # of an extra
            continue
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            found.append(broken(name, "not installed", fix))
            continue
        # prereleases: the version of a torch build is 2.13.0+cpu
        is_tested = requirement.specifier.contains(version, prereleases=True)
        found.append(ok(name, version) if is_tested else warning(name, f"{version}, not tried with this package", fix))
    for name in OPTIONAL:
        with suppress(metadata.PackageNotFoundError):
            found.append(ok(name, metadata.version(name)))
    return found


def devices(device):
    """Check processors, memory and every GPU that torch sees; each GPU computes a matrix product."""
    import psutil
    import torch

    memory = psutil.virtual_memory()
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"
    room = f"{memory.total / 2**30:.1f} GiB of memory, {memory.available / 2**30:.1f} free"
    found = [ok("processor", f"{cores}, {room}")]
    for i in range(torch.cuda.device_count()):
        what, name = f"cuda:{i}", torch.cuda.get_device_name(i)
        try:
            free, total = torch.cuda.mem_get_info(i)
            matrix = torch.ones(64, 64, device=what)
            matrix.mm(matrix).sum().item()
        except RuntimeError as error:
            fix = "another build of torch (pytorch.org), or CUDA_VISIBLE_DEVICES without it"
            found.append(broken(what, f"{name} does not compute ({first_line(error)})", fix))
            continue
        text = f"{name}, {total / 2**30:.1f} GiB, {free / 2**30:.1f} free, CUDA {torch.version.cuda}"
        is_free = free > total / 2
        found.append(ok(what, text) if is_free else warning(what, text, "somebody else uses it: nvidia-smi shows who"))
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        text = f"there is a driver of NVIDIA, but torch {torch.__version__} sees no GPU"
        found.append(warning("cuda", text, "install the CUDA build of torch (pytorch.org), or update the driver"))
    return [*found, ok("trains on", str(device))]


def precision(accelerator):
    """Check which precision mixed_precision=auto uses, and whether bf16 is native."""
    taken, device = f"mixed_precision=auto takes {accelerator.mixed_precision}", accelerator.device.type
    if device not in ("cuda", "cpu"):
        return ok("precision", taken)
    real = "bf16 is real here, by AMX" if device == "cpu" else "bf16 is real here"
    emulated = "bf16 would be emulated here, and slow"
    return ok("precision", f"{taken}; {real if has_native_bf16(device) else emulated}")


def attention(device):
    """Check which kernels of scaled_dot_product_attention run forward and backward on the device."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    works = []
    dtype = torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    names = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    for name in names if device.type != "mps" else ("MATH",):  # MPS ignores the choice
        q = torch.randn(1, 2, 64, 64, device=device, dtype=dtype, requires_grad=True)
        try:
            with warnings.catch_warnings(), sdpa_kernel([getattr(SDPBackend, name)]):
                warnings.simplefilter("ignore")  # each unavailable kernel warns
                scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
            works.append(name.removesuffix("_ATTENTION").lower())
        except RuntimeError:
            pass
    if works == ["math"] and device.type != "mps":
        text = "sdpa: math alone, which is slow and takes memory"
        return warning("attention", text, "a newer torch or GPU has flash")
    return ok("attention", f"sdpa: {', '.join(works)}") if works else broken("attention", "no kernel of sdpa works")


def compiling(device, limit):
    """Check torch.compile in a subprocess, because it may hang or crash."""
    if not limit:
        return []
    is_default = should_compile("auto", device.type)
    failure = partial(broken if is_default else warning, "torch.compile")
    compiler = "cl, of Visual Studio" if sys.platform == "win32" else "g++ or clang++"
    fix = "train with compile=false; " if is_default else "needed for compile=true alone; "
    fix += f"it takes a C++ compiler ({compiler}), and on GPUs triton"
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, str(device)],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=limit,
            env={**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"},  # so that a timeout leaves no workers behind
        )
    except subprocess.TimeoutExpired:
        return [failure(f"did nothing within compile_limit={limit} s", fix)]
    if done.returncode:
        return [failure(f"fails ({(done.stderr.strip().splitlines() or ['no message'])[-1]})", fix)]
    return [ok("torch.compile", f"works, {time.monotonic() - start:.0f} s with the start of a process")]


def exchange(accelerator):
    """Check an all-reduce between the processes of this launch, with the backend of the gradients and with gloo."""
    import torch
    from torch import distributed

    if accelerator.num_processes == 1:
        return [ok("processes", "one; for more: accelerate launch -m nanogpt_accel.doctor")]
    world, found = accelerator.num_processes, []
    backends = [(distributed.get_backend(), None, accelerator.device)]
    if accelerator.device.type != "cpu":  # ranks agree on a stop over gloo
        backends.append(("gloo", distributed.new_group(backend="gloo"), torch.device("cpu")))
    for name, group, device in backends:
        tensor = torch.ones(EXCHANGED // 4, device=device)
        distributed.all_reduce(tensor, group=group)
        is_correct = bool((tensor == world).all())
        tensor.zero_()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(ROUNDS):
            distributed.all_reduce(tensor, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        speed = EXCHANGED * ROUNDS / (time.perf_counter() - start)
        text = f"{name}: {world} processes, all-reduce of {EXCHANGED >> 20} MiB at {speed / 1e9:.3g} GB/s"
        wrong = broken("processes", f"{name}: the sum over {world} processes is wrong", "see NCCL_DEBUG=INFO")
        found.append(ok("processes", text) if is_correct else wrong)
    return found


def accelerate_config():
    """Check the default config file of `accelerate launch`."""
    from accelerate.commands.config.config_args import default_config_file

    path = Path(default_config_file)
    if not path.is_file():
        return ok("launcher", f"no {path}: `accelerate launch` takes --config_file, such as configs/multi_gpu.yaml")
    try:
        values = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        return warning("launcher", f"{path} cannot be read ({first_line(error)})", "accelerate config writes a new one")
    keys = ("distributed_type", "num_processes", "mixed_precision")
    text = f"{path}: " + ", ".join(f"{key} {values[key]}" for key in keys if key in values)
    if values.get("distributed_type") == "MULTI_CPU":
        fix = "accelerate launch --config_file configs/cpu_2proc.yaml"
        return warning("launcher", f"{text}, which starts one process alone", fix)
    return ok("launcher", text)


def disk():
    """Check the free space of the current folder, where data/ and runs/ are created."""
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free
    text = f"{folder}: {free / 2**30:.1f} GiB free"
    if not can_write(folder):
        return broken("disk", f"{folder} cannot be written to", "go to another folder, or give data_dir and out_dir")
    if free < 2**30:
        fix = "make room, or go to another disk"
        return broken("disk", text, fix) if free < 2**26 else warning("disk", text, fix)
    return ok("disk", text)


def caches():
    """Check that the cache folders are writable."""
    from huggingface_hub import constants

    folders = {
        "HF_HOME": constants.HF_HOME,
        "TIKTOKEN_CACHE_DIR": os.environ.get("TIKTOKEN_CACHE_DIR")
        or os.path.join(tempfile.gettempdir(), "data-gym-cache"),
        "NANOGPT_ACCEL_CACHE": cache_folder(),
    }
    return [
        ok("cache", f"{name}: {folder}")
        if can_write(Path(folder))
        else warning("cache", f"{name}: {folder} cannot be written to", f"set {name} to a folder that can")
        for name, folder in folders.items()
    ]


def can_write(folder):
    """Return whether a folder is writable, or can be created."""
    return not check_writable(folder)


def tokens():
    """Check for credentials of the Hub and of wandb, without showing them."""
    from huggingface_hub import get_token

    try:
        machines = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        machines = {}
    has_wandb = bool(os.environ.get("WANDB_API_KEY")) or "api.wandb.ai" in machines
    return [
        ok("token", "Hugging Face: " + ("present" if get_token() else "none; push takes one: hf auth login")),
        ok("token", "wandb: " + ("present" if has_wandb else "none; trackers=wandb takes one: wandb login")),
    ]
