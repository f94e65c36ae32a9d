"""The promise for Windows and macOS, checked on Linux.

All commands run while as_on_windows.py imitates Windows. For MPS, fakes test the choice of device, precision and
compilation, and that float64 is not used. Computations on MPS are not tested.
"""

import ast
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from as_on_windows import POSIX_MODULES, POSIX_OS, WINDOWS_SIGNALS, Without
from safetensors.torch import load_file
from shared import REPOSITORY
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices
from transformers import AutoModelForCausalLM

from nanogpt_accel.__main__ import main
from nanogpt_accel.batches import model_inputs
from nanogpt_accel.checkpoint.run_folder import best_checkpoint, is_published, prepare_run_folder, publish
from nanogpt_accel.checkpoint.save import _prepare_temp_dir
from nanogpt_accel.commands import bench, doctor
from nanogpt_accel.data import sources
from nanogpt_accel.distributed import accelerator
from nanogpt_accel.distributed.accelerator import make_accelerator, pick_device, pick_precision, should_compile
from nanogpt_accel.distributed.stop import StopSignals
from nanogpt_accel.evaluation import window_losses
from nanogpt_accel.models import generation
from nanogpt_accel.planning.hardware import peak_memory
from nanogpt_accel.tracking.console import Console
from nanogpt_accel.tracking.metrics_log import read_metrics
from nanogpt_accel.utils import cli, files
from nanogpt_accel.utils.files import rename_folder

PACKAGE = REPOSITORY / "nanogpt_accel"
RECIPE = """
out_dir: runs/tiny
data: {corpus: texts, tokenizer: char, val_fraction: 0.3}
model: {n_layer: 1, n_embd: 16, n_head: 2, block_size: 16, dropout: 0.1}
optimizer: {learning_rate: 3e-3, warmup_iters: 2, lr_decay_iters: 8}
train: {batch_size: 2, gradient_accumulation_steps: 1, max_iters: 4, eval_interval: 2, eval_iters: 2, log_interval: 1,
        device: cpu, sample_interval: 3, sample_tokens: 30, sample_prompt: "при"}
checkpoint: {keep_last: 1}
"""
COMMANDS = [
    "train recipe.yaml",
    "train runs/tiny max_iters=8",  # prunes the first checkpoint while it is in use
    "train recipe.yaml out_dir=runs/other init_from=runs/tiny max_iters=2",
    "train recipe.yaml out_dir=runs/other overwrite=true async_save=true max_iters=2",
    "sample runs/tiny num_samples=1 max_new_tokens=30",
    "evaluate runs/tiny",
    "export runs/tiny --to stock",
    "data data/{data}",
    "report runs/tiny",
    "sweep recipe.yaml learning_rate=1e-3,2e-3 --table",
    "plan recipe.yaml",
    "doctor",
    "recipes --copy gpt2",
    "configs --path cpu",
]


def write_project(folder):
    """Write a recipe and its texts, with characters that cp1252 lacks."""
    draw = random.Random(2)
    words = ["".join(draw.choice("etaoinshrdlu☃привет") for _ in range(draw.randint(2, 7))) for _ in range(150)]
    (folder / "texts" / "deeper").mkdir(parents=True)
    for number in range(6):
        text = "\n".join(" ".join(draw.choice(words) for _ in range(9)) for _ in range(60))
        (folder / "texts" / ("deeper" * (number % 2)) / f"{number}.txt").write_text(text, encoding="utf-8", newline="")
        os.utime(folder / "texts" / ("deeper" * (number % 2)) / f"{number}.txt", ns=(10**18, 10**18))
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The folder of a run of eight steps on Linux."""
    folder = tmp_path_factory.mktemp("linux")
    write_project(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "recipe.yaml", "max_iters=8"]) == 0
    return folder


@pytest.fixture(scope="module")
def there(tmp_path_factory, here):
    """(folder, output) of all commands as on Windows."""
    if sys.platform != "linux":
        pytest.skip("as_on_windows.py needs Linux: it reads the open files from /proc")
    folder = tmp_path_factory.mktemp("windows")
    write_project(folder)
    (data,) = (path.name for path in (here / "data").iterdir())
    commands = [command.format(data=data).split(" ") for command in COMMANDS]
    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "warn_default_encoding",
            REPOSITORY / "tests" / "support" / "as_on_windows.py",
            json.dumps(commands),
        ],
        cwd=folder,
        capture_output=True,
        timeout=240,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
    )
    output = done.stdout.decode("cp1252")
    assert done.returncode == 0, output + done.stderr.decode("cp1252")
    assert json.loads(output.splitlines()[-1]) == [0] * len(COMMANDS), output + done.stderr.decode("cp1252")
    return folder, output


# ---- Windows


def test_every_command_succeeds_as_on_windows(there):
    folder, output = there
    assert "warning: " not in output and "?" in output  # instead of characters that the terminal lacks
    left = {path.name for run in (folder / "runs").iterdir() for path in run.iterdir() if path.is_dir()}
    assert left == {"checkpoint-000008", "checkpoint-000002"}  # 2 is that of the other run
    assert [path for path in folder.rglob(".*") if path.name != ".lock.json"] == []
    assert re.search(r"stock: GPT2LMHeadModel, largest logit difference .*: [0-9.]+e-\d+|: 0\.0e\+00", output)


def test_numbers_as_on_windows_equal_those_of_linux(here, there):
    folder, _ = there
    ours, theirs = (read_metrics(run / "runs" / "tiny" / "metrics.jsonl") for run in (here, folder))
    assert len(ours) == 13  # 8 steps and 5 evaluations
    for mine, other in zip(ours, theirs, strict=True):
        assert other.pop("peak_memory", None) == (2**28 if "loss" in mine else None)
        for key in mine.keys() - {"tokens_per_second", "peak_memory"}:
            assert mine[key] == other[key], (mine["step"], key)
    (name,) = (path.name for path in (here / "data").iterdir())  # the name has a hash of paths with slashes
    for file in ("train.bin", "val.bin", "tokenizer.json"):
        assert (here / "data" / name / file).read_bytes() == (folder / "data" / name / file).read_bytes()
    mine, other = (json.loads((run / "data" / name / "manifest.json").read_text()) for run in (here, folder))
    assert mine == other


def test_run_folder_without_links_loads_as_its_best_checkpoint(there):
    folder, _ = there
    run = folder / "runs" / "tiny"
    assert not any(path.is_symlink() for path in run.iterdir())
    weights = load_file(run / "checkpoint-000008" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(run)
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())


def test_file_names_are_valid_on_windows(there):
    folder, _ = there
    for path in folder.rglob("*"):
        assert re.fullmatch(r'[^<>:"/\\|?*\x00-\x1f]*[^<>:"/\\|?*\x00-\x1f. ]', path.name), path
        assert not re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", path.name), path
        assert len(str(path.relative_to(folder))) < 120


def test_posix_only_names_are_used_only_after_a_check():
    assert {name for name in POSIX_OS if hasattr(os, name)} > {"getuid", "setpriority", "kill"}
    found = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id == "os" and node.attr in POSIX_OS:
                    found.add((path.stem, f"os.{node.attr}"))
                if node.value.id == "signal" and re.match("SIG[A-Z]", node.attr) and node.attr not in WINDOWS_SIGNALS:
                    found.add((path.stem, f"signal.{node.attr}"))
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {(path.stem, name) for name in names if name.partition(".")[0] in POSIX_MODULES}
    assert found == {
        ("save", "os.setpriority"),
        ("save", "os.PRIO_PROCESS"),  # used on Linux only
        ("hardware", "resource"),  # its ImportError is handled
        ("launcher", "os.sched_getaffinity"),  # if it exists
    }


@pytest.fixture
def no_links(monkeypatch):
    def symlink_to(self, target, target_is_directory=False):
        raise OSError(22, "A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", symlink_to)


@pytest.fixture
def copied(here, tmp_path, no_links):
    """A run of one checkpoint whose files are copied, not linked, into the run folder."""
    run = tmp_path / "run"
    shutil.copytree(here / "runs" / "tiny" / "checkpoint-000008", run / "checkpoint-000008")
    shutil.copy(here / "runs" / "tiny" / "run.yaml", run)
    publish(run, 8, run / "checkpoint-000008")
    assert (run / "model.safetensors").is_file() and not (run / "model.safetensors").is_symlink()
    return run


def test_copies_instead_of_links_are_recognized(copied):
    (copied / "notes.txt").write_text("mine")
    assert is_published(copied / "model.safetensors") and is_published(copied / "README.md")
    assert not is_published(copied / "notes.txt") and not is_published(copied / "run.yaml")
    # correct copies are not written again, because a model may be large
    before = os.stat(copied / "model.safetensors").st_ino
    publish(copied, 8, copied / "checkpoint-000008")
    assert os.stat(copied / "model.safetensors").st_ino == before
    # if a better checkpoint could not be saved, the previous one stays the best
    shutil.copytree(copied / "checkpoint-000008", copied / "checkpoint-000010")
    assert best_checkpoint(copied, 9, copied / "checkpoint-000010") == copied / "checkpoint-000008"


def test_new_run_deletes_copies_with_their_checkpoints(copied):
    (copied / "notes.txt").write_text("mine")
    prepare_run_folder(copied, "seed: 1\n", is_resumed=False)
    # otherwise find_model would load the remaining files
    assert {path.name for path in copied.iterdir()} == {"run.yaml", "notes.txt"}


def test_rename_of_a_busy_folder_is_retried(tmp_path, monkeypatch):
    tries = []

    def rename(source, target):
        tries.append(source)
        if len(tries) < 3:  # as if a virus scanner has one of its files open
            raise PermissionError(13, "Access is denied")
        os.rename(source, target)

    (tmp_path / "new").mkdir()
    monkeypatch.setattr(files, "os", Without(os, POSIX_OS, name="nt", rename=rename))
    rename_folder(tmp_path / "new", tmp_path / "final")
    assert len(tries) == 3 and (tmp_path / "final").is_dir()


def test_undeletable_leftovers_do_not_prevent_a_save(tmp_path, monkeypatch):
    def rmtree(path, **more):
        raise PermissionError(13, "The process cannot access the file because it is being used by another process")

    (tmp_path / ".checkpoint-000002.old" / "state").mkdir(parents=True)
    monkeypatch.setattr(files.shutil, "rmtree", rmtree)
    _prepare_temp_dir(tmp_path / ".checkpoint-000004.tmp", 1)
    assert (tmp_path / ".checkpoint-000004.tmp" / "state").is_dir()
    with pytest.raises(PermissionError):  # but it never writes into the files of another checkpoint
        _prepare_temp_dir(tmp_path / ".checkpoint-000004.tmp", 1)


def test_ctrl_break_is_a_stop_signal(monkeypatch):
    number = signal.SIGUSR2  # SIGBREAK is 21 on Windows
    monkeypatch.setattr(signal, "SIGBREAK", number, raising=False)
    monkeypatch.delattr(signal, "SIGUSR1")
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            with pytest.raises(SystemExit):
                os.kill(os.getpid(), number)
            signals.armed = True
            os.kill(os.getpid(), number)
            assert signals.received
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_output_replaces_characters_that_its_encoding_lacks(monkeypatch):
    log = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", log)
    console = Console()
    console.say("a снег b")
    console.write("été ☃")
    console.say()
    log.flush()
    assert log.buffer.getvalue().decode("cp1252").replace(os.linesep, "\n") == "a ???? b\nété ?\n"


def test_invalid_file_name_is_an_error_for_the_user(capsys):
    def command(argv):
        error = OSError(22, "The filename, directory name, or volume label syntax is incorrect: 'runs/a?b'")
        error.winerror = 123
        raise error

    assert cli.run(command, []) == 2
    assert "runs/a?b" in capsys.readouterr().err


def test_corpus_glob_on_another_drive(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("some words")
    monkeypatch.chdir(tmp_path)

    def relpath(path, start=os.curdir):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", relpath)
    assert list(sources.find_corpus(f"{tmp_path}/*.txt").documents()) == ["some words"]


def test_corpus_python_with_windows_line_endings_is_the_same_text(tmp_path, monkeypatch):
    (tmp_path / "os.py").write_bytes(b"import abc\r\n\r\nname = 'nt'\r\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(sources.find_corpus("python").documents()) == ["import abc\n\nname = 'nt'\n"]


@pytest.fixture
def windows(monkeypatch):
    for module in (accelerator, doctor):
        monkeypatch.setattr(module, "sys", Without(sys, set(), platform="win32"))


@pytest.mark.parametrize(
    "compile, device, elsewhere, under_windows",
    [
        ("auto", "cuda", True, False),
        ("auto", "mps", False, False),
        ("auto", "cpu", False, False),
        (True, "cuda", True, True),
        (True, "mps", True, True),
        ("regional", "cpu", True, True),
        (False, "cuda", False, False),
    ],
)
def test_should_compile_by_device_and_system(request, compile, device, elsewhere, under_windows):
    assert should_compile(compile, device) is elsewhere
    request.getfixturevalue("windows")
    assert should_compile(compile, device) is under_windows


def test_doctor_names_the_compiler_of_the_system(windows, monkeypatch):
    monkeypatch.setattr(doctor, "COMPILE", "import sys; sys.stderr.buffer.write(b'no \\x81 compiler'); sys.exit(1)")
    finding = doctor.compiling(torch.device("cuda"), full=True)
    assert finding["state"] == "warning" and "cl of Visual Studio" in finding["fix"]  # not needed by default


def test_several_gpus_on_windows_are_refused(windows, monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerator, "pick_device", lambda device: torch.device("cuda"))
    with refused(ValueError, "WORLD_SIZE=2", "NCCL", "WSL2"):
        make_accelerator()


def test_peak_memory_on_windows(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # an import of it fails
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(peak_wset=12345))
    assert peak_memory(torch.device("cpu")) == 12345


# ---- MPS


class OnMps(torch.Tensor):
    """A tensor that refuses float64 until it is copied to the CPU, like those of MPS."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        found = super().__torch_function__(function, types, args, kwargs or {})
        if function is torch.Tensor.cpu:
            return found.as_subclass(torch.Tensor)
        if isinstance(found, OnMps) and found.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return found


def test_fake_mps_tensor_refuses_float64():
    with pytest.raises(TypeError):
        torch.ones(2).as_subclass(OnMps).double()
    assert torch.ones(2).as_subclass(OnMps).cpu().double().dtype == torch.float64


def test_no_float64_on_mps():
    class Model(torch.nn.Module):
        def forward(self, **inputs):
            return SimpleNamespace(logits=torch.zeros(2, 9, 40).as_subclass(OnMps))

    tokens = SimpleNamespace(rows=lambda starts, length: np.ones((len(starts), length), np.int64))
    accelerator = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"), gather=lambda x: x)
    sums, counts = window_losses(Model(), tokens, [(np.array([0, 1]), 9, 5)], model_inputs, accelerator)
    assert sums.dtype == np.float64 and np.allclose(sums, 5 * np.log(40)) and counts.tolist() == [5, 5]
    sample = generation._Sampler([torch.Generator().manual_seed(1)], 40, temperature=0.8, top_k=5, top_p=0.9)
    scores = sample(None, torch.randn(1, 40).as_subclass(OnMps))
    assert (scores == 0).sum() == 1


@pytest.fixture
def mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)


def test_device_and_precision_on_a_mac(mps, monkeypatch, refused):
    assert pick_device("auto") == pick_device("mps") == torch.device("mps")
    assert pick_precision("auto", "mps") == "no"
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: (major, minor) < (14, 0))
    with refused(ValueError, "mixed_precision=bf16", "macOS 14", "fp16"):
        make_accelerator("mps", "bf16")
    assert "mps" in _get_fused_kernels_supported_devices()  # optim.make_optimizer relies on it


def test_bench_on_mps_uses_the_clock(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waited.append(1))
    variant = bench.Variant.__new__(bench.Variant)
    variant.device = SimpleNamespace(type="mps")
    start, end = variant.mark(), variant.mark()
    assert len(waited) == 2 and 0 <= bench.between(start, end) < 60
    assert variant.peak_memory() is None


def test_doctor_does_not_look_for_cuda_kernels_on_mps(monkeypatch):
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *sizes, device, **more: randn(*sizes, **more))
    finding = doctor.attention(SimpleNamespace(type="mps"))
    assert finding == {"what": "attention", "found": "sdpa: math", "state": "ok", "fix": ""}
