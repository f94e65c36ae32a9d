"""Check this machine and this launch before a run, and suggest fixes.

    nanogpt-accel doctor
    nanogpt-accel doctor --full                       # also compiles a model
    accelerate launch --config_file configs/multi_gpu.yaml -m nanogpt_accel doctor    # also tests communication

The exit status is 1 if training would fail. Warnings do not change the exit status. In contrast to `accelerate env`,
the command compares versions with the requirements of this package, runs small tests on the devices and suggests fixes.
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
from importlib.util import find_spec
from pathlib import Path

import yaml
from pydantic import Field

from ..checkpoint.run_folder import check_writable
from ..distributed.accelerator import has_native_bf16, make_accelerator, should_compile
from ..distributed.launcher import check_launcher, is_main
from ..utils import cli
from ..utils.fields import Section, raise_problems
from ..utils.files import cache_folder
from ..utils.packaged import packaged
from ..utils.text import first_line, printable, quoted

GIB = 2**30
COMPILE_LIMIT_S = 300  # the test of torch.compile took 20 s on 2 idle CPU cores, and 98 s on 2 busy cores
OPTIONAL = ("wandb", "tensorboard", "deepspeed", "torchao", "lm_eval", "triton")
ALL_REDUCE_BYTES, ROUNDS = 64 * 2**20, 5
NCCL_FIX = "set NCCL_DEBUG=INFO for details"
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

    full: bool = Field(False, description="also run the slow check: compile and run a small model with torch.compile")
    json_output: bool = Field(False, alias="json", description="print one JSON object and nothing else")


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel doctor [--full] [--json]",
            "Check versions, devices, attention, communication between processes, disk, caches and credentials, and "
            "suggest fixes.",
            {"options": DoctorOptions},
        )
    target, options, problems = cli.parse_options(argv, DoctorOptions)
    if target is not None:
        problems.append(f"{target}: `doctor` accepts only options; remove this argument")
    raise_problems(problems)
    findings = examine(options.full)
    if is_main() and options.json_output:
        print(json.dumps({"ok": not is_broken(findings), "findings": findings}))
    elif is_main():
        for finding in findings:
            text = ": ".join(filter(None, (finding["found"], finding["fix"])))
            print(printable(f"{finding['state']:<8} {finding['what']:<16} {text}"))
    if is_broken(findings):
        raise SystemExit(1)


def examine(full):
    """Return a list of findings {what, found, state, fix}. The state is ok, warning or broken (training would fail).

    full: also run the slow check.
    """
    findings = versions()
    if not is_broken(findings):  # the next checks import the required packages
        findings += [broken("launch", problem) for problem in check_launcher()]
    if is_broken(findings):
        return findings
    try:
        accelerator = make_accelerator(collective_timeout=120 + full * COMPILE_LIMIT_S)
    except ValueError as error:
        return [*findings, broken("launch", str(error))]
    except RuntimeError as error:  # the processes cannot connect to each other
        fix = "set USE_LIBUV=0" if "libuv" in str(error) else "check MASTER_ADDR, MASTER_PORT and the network"
        return [*findings, broken("launch", first_line(error), fix)]
    try:
        findings += communication(accelerator)
    except RuntimeError as error:
        return [*findings, broken("processes", first_line(error), NCCL_FIX)]
    if accelerator.is_main_process:
        findings += devices(accelerator.device)
        findings += [precision(accelerator), attention(accelerator.device)]
        findings += [compiling(accelerator.device, full), accelerate_config(), disk(), *caches(), *tokens()]
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return findings


def finding(state, what, found, fix=""):
    return {"what": what, "found": found, "state": state, "fix": fix}


ok, warning, broken = (partial(finding, state) for state in ("ok", "warning", "broken"))


def is_broken(findings):
    return any(finding["state"] == "broken" for finding in findings)


def versions():
    """Check the versions of Python and of required and optional packages. Return a list of findings."""
    from packaging.requirements import Requirement

    found = [ok("python", f"{platform.python_version()} on {platform.platform()}")]
    try:
        needed = metadata.requires("nanogpt_accel")
    except metadata.PackageNotFoundError:
        return [*found, warning("nanogpt_accel", "not installed, so required versions are unknown", "pip install -e .")]
    for requirement in map(Requirement, needed):
        name, fix = requirement.name, f"pip install '{requirement}'"
        if requirement.marker is not None:  # only needed for an extra
            continue
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            found.append(broken(name, "not installed", fix))
            continue
        is_tested = requirement.specifier.contains(version, prereleases=True)
        found.append(ok(name, version) if is_tested else warning(name, f"{version}, not tested with this package", fix))
    for name in OPTIONAL:
        with suppress(metadata.PackageNotFoundError):
            found.append(ok(name, metadata.version(name)))
    return found


def devices(device):
    """Check the CPU and the memory, and run a matmul on each GPU. Return a list of findings."""
    import psutil
    import torch

    memory = psutil.virtual_memory()
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    found = [ok("processor", f"{cores}, {memory.total / GIB:.1f} GiB of memory, {memory.available / GIB:.1f} GiB free")]
    for i in range(torch.cuda.device_count()):
        what, name = f"cuda:{i}", torch.cuda.get_device_name(i)
        try:
            free, total = torch.cuda.mem_get_info(i)
            matrix = torch.ones(64, 64, device=what)
            matrix.mm(matrix).sum().item()
        except RuntimeError as error:
            fix = "install another build of torch (pytorch.org), or exclude this GPU with CUDA_VISIBLE_DEVICES"
            found.append(broken(what, f"{name}: a matrix product failed ({first_line(error)})", fix))
            continue
        text = f"{name}, {total / GIB:.1f} GiB, {free / GIB:.1f} GiB free, CUDA {torch.version.cuda}"
        is_free = free > total / 2
        found.append(ok(what, text) if is_free else warning(what, text, "other processes use this GPU; see nvidia-smi"))
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        text = f"torch {torch.__version__} finds no GPU, but an NVIDIA driver is installed"
        found.append(warning("cuda", text, "install the CUDA build of torch (pytorch.org), or update the driver"))
    return [*found, ok("trains on", str(device))]


def precision(accelerator):
    """Check which precision mixed_precision=auto selects, and whether the device computes bf16 natively."""
    text, device = f"mixed_precision=auto selects {accelerator.mixed_precision}", accelerator.device.type
    if device not in ("cuda", "cpu"):
        return ok("precision", text)
    return ok("precision", f"{text}; bf16 is {'native' if has_native_bf16(device) else 'emulated and slow'}")


def attention(device):
    """Check which kernels of scaled_dot_product_attention run forward and backward on the device."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    works, dtype = [], torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    names = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    for name in names if device.type != "mps" else ("MATH",):  # MPS ignores sdpa_kernel
        q = torch.randn(1, 2, 64, 64, device=device, dtype=dtype, requires_grad=True)
        try:
            with warnings.catch_warnings(), sdpa_kernel([getattr(SDPBackend, name)]):
                warnings.simplefilter("ignore")  # torch warns about each unavailable kernel
                scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
            works.append(name.removesuffix("_ATTENTION").lower())
        except RuntimeError:
            pass
    if works == ["math"] and device.type != "mps":
        return warning(
            "attention",
            "sdpa: only the math kernel is available, which is slow and needs more memory",
            "use a newer torch or GPU",
        )
    return ok("attention", f"sdpa: {', '.join(works)}") if works else broken("attention", "sdpa: no kernel works")


def compiling(device, full):
    """Check whether torch.compile works.

    full: compile and run a small model in a subprocess, because the compilation may hang or crash. Otherwise, only
        check that triton and a C compiler are installed if the device uses torch.compile by default.
    """
    is_default = should_compile("auto", device.type)
    failure = partial(broken if is_default else warning, "torch.compile")
    compiler = "cl of Visual Studio" if sys.platform == "win32" else "g++ or clang++"
    fix = f"install a C++ compiler ({compiler}) and, for GPUs, triton"
    fix += ", or set compile=false" if is_default else "; only needed for compile=true"
    if not full:
        has_compiler = any(map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))))
        if is_default and not (has_compiler and find_spec("triton")):
            return failure("triton or a C compiler is missing", fix)
        return ok("torch.compile", "not tested; to compile a small model, run nanogpt-accel doctor --full")
    env = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # no worker processes, which a timeout would not end
    command, text = [sys.executable, "-c", COMPILE, str(device)], {"encoding": "utf-8", "errors": "replace"}
    start = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, timeout=COMPILE_LIMIT_S, env=env, **text)
    except subprocess.TimeoutExpired:
        return failure(f"timed out after {COMPILE_LIMIT_S} s", fix)
    if done.returncode:
        return failure(f"failed ({(done.stderr.strip().splitlines() or ['no message'])[-1]})", fix)
    return ok("torch.compile", f"works; took {time.monotonic() - start:.0f} s, including the start of a process")


def communication(accelerator):
    """Check and time an all-reduce between all processes, with the backend used for gradients and with gloo."""
    import torch
    from torch import distributed

    world, found = accelerator.num_processes, []
    if world == 1:
        return [ok("processes", "one; to test communication, run accelerate launch -m nanogpt_accel doctor")]
    backends = [(distributed.get_backend(), None, accelerator.device)]
    if accelerator.device.type != "cpu":  # ranks use gloo to agree on when to stop
        backends.append(("gloo", distributed.new_group(backend="gloo"), torch.device("cpu")))
    for name, group, device in backends:
        synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
        tensor = torch.ones(ALL_REDUCE_BYTES // 4, device=device)
        distributed.all_reduce(tensor, group=group)
        is_correct = bool((tensor == world).all())
        tensor.zero_()
        synchronize()
        start = time.perf_counter()
        for _ in range(ROUNDS):
            distributed.all_reduce(tensor, group=group)
        synchronize()
        speed = ALL_REDUCE_BYTES * ROUNDS / (time.perf_counter() - start)
        text = f"{name}: {world} processes, all-reduce of {ALL_REDUCE_BYTES >> 20} MiB at {speed / 1e9:.3g} GB/s"
        wrong = broken("processes", f"{name}: wrong result of an all-reduce over {world} processes", NCCL_FIX)
        found.append(ok("processes", text) if is_correct else wrong)
    return found


def accelerate_config():
    """Check the default config file of `accelerate launch`."""
    from accelerate.commands.config.config_args import default_config_file

    path = Path(default_config_file)
    if not path.is_file():
        config = quoted(packaged("configs/multi_gpu.yaml"))
        return ok("launcher", f"{path} does not exist; use accelerate launch --config_file {config}")
    try:
        values = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        return warning("launcher", f"{path} cannot be read ({first_line(error)})", "run accelerate config again")
    keys = ("distributed_type", "num_processes", "mixed_precision")
    text = f"{path}: " + ", ".join(f"{key} {values[key]}" for key in keys if key in values)
    if values.get("distributed_type") == "MULTI_CPU":
        fix = f"use accelerate launch --config_file {quoted(packaged('configs/cpu_2proc.yaml'))}"
        return warning("launcher", f"{text}; with MULTI_CPU, accelerate starts a single process", fix)
    return ok("launcher", text)


def disk():
    """Check the free space of the current folder, where data/ and runs/ are created."""
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free
    if check_writable(folder):
        return broken("disk", f"{folder} is not writable", "cd to a writable folder, or set data_dir and out_dir")
    state = broken if free < 2**26 else warning if free < GIB else ok
    fix = "" if state is ok else "free some space, or cd to a folder on another disk"
    return state("disk", f"{folder}: {free / GIB:.1f} GiB free", fix)


def caches():
    """Check that the cache folders are writable."""
    from huggingface_hub import constants

    tiktoken = os.environ.get("TIKTOKEN_CACHE_DIR") or os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folders = {"HF_HOME": constants.HF_HOME, "TIKTOKEN_CACHE_DIR": tiktoken, "NANOGPT_ACCEL_CACHE": cache_folder()}
    return [
        warning("cache", f"{name}: {folder} is not writable", f"set {name} to a writable folder")
        if check_writable(Path(folder))
        else ok("cache", f"{name}: {folder}")
        for name, folder in folders.items()
    ]


def tokens():
    """Check for credentials of the Hub and of wandb, without printing them."""
    from huggingface_hub import get_token

    try:
        machines = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        machines = {}
    has_wandb = bool(os.environ.get("WANDB_API_KEY")) or "api.wandb.ai" in machines
    return [
        ok("token", "Hugging Face: " + ("present" if get_token() else "none; to push, run hf auth login")),
        ok("token", "wandb: " + ("present" if has_wandb else "none; for trackers=wandb, run wandb login")),
    ]
