"""What a run survives: a second trainer, trackers and a Hub that fail, a home that is not there, clocks that jump,
damage to any file, hostile files; and what it keeps to itself."""

import ast
import errno
import json
import os
import pickle
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from shared import REPOSITORY
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import nanogpt_accel
from nanogpt_accel import train
from nanogpt_accel.__main__ import main
from nanogpt_accel.checkpoint.layout import INDEX, list_checkpoints
from nanogpt_accel.checkpoint.run_folder import check_lock
from nanogpt_accel.checkpoint.save import Saver
from nanogpt_accel.checkpoint.verify import _hash_once, latest_valid
from nanogpt_accel.tracking.metrics_log import read_metrics

RECIPE = """
data: {{corpus: {folder}/text.txt, tokenizer: char, val_fraction: 0.1, data_dir: {folder}/tokens}}
model: {{n_layer: 1, n_embd: 16, n_head: 2, block_size: 16, dropout: 0.2}}
optimizer: {{learning_rate: 1e-2, warmup_iters: 0, lr_decay_iters: 8}}
train: {{batch_size: 2, gradient_accumulation_steps: 1, max_iters: 8, eval_interval: 4, eval_iters: 2, device: cpu}}
"""
PACKAGE = Path(nanogpt_accel.__file__).parent


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("safety")
    draw = random.Random(3)
    (folder / "text.txt").write_text("".join(draw.choice("etaoin \n") for _ in range(5000)))
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def calm(recipe):
    """A run that nothing disturbs; for reading only."""
    folder = recipe.parent / "calm"
    assert main(["train", str(recipe), f"out_dir={folder}"]) == 0
    return folder


@pytest.fixture
def copy(calm, tmp_path):
    return shutil.copytree(calm, tmp_path / "copy", symlinks=True)


def numbers(run):
    return [
        {key: line[key] for key in ("step", "loss", "val_loss", "grad_norm") if key in line}
        for line in read_metrics(run / "metrics.jsonl")
    ]


def weights(run):
    return (run / "checkpoint-000008" / "model.safetensors").read_bytes()


# ---- two trainers in one folder


HOLDER = """
import sys, time
from nanogpt_accel.checkpoint.run_folder import lock_run
held = lock_run(sys.argv[1])
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def trainer(copy):
    """Another process that is training in `copy`."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, copy], stdout=subprocess.PIPE, cwd=PACKAGE.parent)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_trainer_is_refused(recipe, copy, trainer, capsys, monkeypatch):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    monkeypatch.setattr(train, "run_training", pytest.fail)  # nothing slow is begun
    for argv in (
        [str(copy), "max_iters=9"],
        [str(recipe), f"out_dir={copy}", "overwrite=true"],
        [str(recipe), f"out_dir={copy}", "resume=auto"],
    ):
        assert main(["train", *argv]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: out_dir={copy}: process {trainer.pid} on {platform.node()} is training in it")
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    assert main(["sample", str(copy), "max_new_tokens=1", "device=cpu"]) == 0  # readers are welcome


def test_a_trainer_that_died_holds_nothing(copy, trainer):
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    assert check_lock(copy) == []
    assert json.loads((copy / ".lock.json").read_text())["pid"] == os.getpid()
    (copy / ".lock.json").write_text("no JSON")
    assert check_lock(copy) == []


def test_a_training_holds_its_folder_to_the_end(recipe, tmp_path, monkeypatch):
    run, found = tmp_path / "run", []
    save = Saver.save
    monkeypatch.setattr(Saver, "save", lambda *args: (found.append(check_lock(run)), save(*args)))
    assert main(["train", str(recipe), f"out_dir={run}"]) == 0
    assert [len(problems) for problems in found] == [1, 1] and f"process {os.getpid()} on" in found[0][0]
    assert check_lock(run) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(copy, monkeypatch, number):
    import fcntl

    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert check_lock(copy) == []
    assert main(["train", str(copy), "max_iters=9"]) == 0


# ---- trackers


def test_a_tracker_that_fails_is_said_once(recipe, calm, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    from accelerate.tracking import TensorBoardTracker

    def fail(*args, **kwargs):
        raise ConnectionError("its server is down")

    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    monkeypatch.setattr(TensorBoardTracker, "finish", fail)
    run = tmp_path / "run"
    assert main(["train", str(recipe), f"out_dir={run}", "trackers=tensorboard"]) == 0
    assert capsys.readouterr().out.count("its server is down") == 1
    assert numbers(run) == numbers(calm) and weights(run) == weights(calm)


def test_tensorboard_shows_each_step_once(recipe, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    assert main(["train", str(recipe), f"out_dir={run}", "trackers=tensorboard", "project=p"]) == 0
    shutil.rmtree(run / "checkpoint-000008")  # as if it had been killed before
    assert main(["train", str(run)]) == 0
    logged = EventAccumulator(str(run / "p")).Reload()
    assert [event.step for event in logged.Scalars("loss")] == list(range(8))
    assert [event.value for event in logged.Scalars("loss")] == pytest.approx(
        [line["loss"] for line in numbers(run) if "loss" in line]
    )
    assert [event.step for event in logged.Scalars("val_loss")] == [0, 4, 8]


def test_wandb_goes_on_as_the_same_run(recipe, tmp_path, monkeypatch, request):
    wandb = pytest.importorskip("wandb")
    request.addfinalizer(wandb.teardown)  # it keeps its mode for the process
    asked, init = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: (asked.append(options), init(mode="disabled"))[1])
    begin = ["train", str(recipe), f"out_dir={tmp_path / 'run'}", "trackers=wandb", "max_iters=1"]
    assert main(begin) == 0
    assert main(["train", str(tmp_path / "run"), "max_iters=2"]) == 0
    assert main([*begin, "overwrite=true"]) == 0
    first, resumed, anew = (options["id"] for options in asked)
    assert first == resumed != anew
    assert {options["resume"] for options in asked} == {"allow"}


# ---- everything outside is down


def test_the_outside_is_down_and_secrets_stay_secret(recipe, calm, tmp_path):
    """No home, no Hub, no tracker's server; tokens in the environment. The run is the same."""
    pytest.importorskip("wandb")
    secrets = {"HF_TOKEN": "hf_SecretOfTheHub", "WANDB_API_KEY": "5ec2e7" * 6 + "abcd"}
    gone = ("HF_HOME", "HF_HUB_OFFLINE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR")
    env = (
        {key: value for key, value in os.environ.items() if key not in gone}
        | secrets
        | {
            "HOME": "/proc/no-such-home",
            "HF_ENDPOINT": "http://127.0.0.1:1",
            "WANDB_MODE": "offline",
            "PYTHONPATH": str(PACKAGE.parent),
            "NANOGPT_ACCEL_CACHE": "/proc/no-such-cache",
        }
    )
    run = tmp_path / "run"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "nanogpt_accel",
            "train",
            str(recipe),
            f"out_dir={run}",
            "push_to_hub=true",
            "hub_model_id=me/mine",
            "trackers=wandb",
        ],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "not pushed" in done.stdout and "the Hub has not got it" in done.stdout and "Traceback" not in done.stderr
    assert numbers(run) == numbers(calm) and weights(run) == weights(calm)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20 and any(path.suffix == ".wandb" for path in files)
    for secret in secrets.values():
        assert secret not in done.stdout + done.stderr
        assert [path for path in files if secret.encode() in path.read_bytes()] == []


# ---- the clock


def test_durations_are_not_taken_from_the_clock_on_the_wall():
    """It jumps; time.monotonic and time.perf_counter do not."""
    for file in sorted(PACKAGE.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in ("time.time", "time.time_ns", "datetime.now", "datetime.utcnow"), file
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                assert not {alias.name for alias in node.names} & {"time", "time_ns"}, file


def test_a_clock_that_jumps_back(recipe, calm, tmp_path, monkeypatch):
    clock = iter(range(2_000_000_000, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    run = tmp_path / "run"
    assert main(["train", str(recipe), f"out_dir={run}", "max_hours=1"]) == 0
    assert numbers(run) == numbers(calm) and weights(run) == weights(calm)
    assert all(line.get("tokens_per_second", 1) > 0 for line in read_metrics(run / "metrics.jsonl"))


# ---- damage, byte by byte


def test_any_damage_to_any_file_is_named(copy):
    older, newer = list_checkpoints(copy)
    files = sorted(path.relative_to(newer).as_posix() for path in newer.rglob("*") if path.is_file())
    assert len(files) == 10
    draw = random.Random(6)

    def flip(file, place):
        content = bytearray(file.read_bytes())
        content[place] ^= 1 << draw.randrange(8)
        file.write_bytes(content)

    for name in files:
        file = newer / name
        whole = file.read_bytes()
        places = [0, len(whole) // 2, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(5))]
        spoilers = [lambda file, place=place: flip(file, place) for place in places]
        sizes = (0, 1, len(whole) // 2, len(whole) - 1)
        spoilers += [lambda file, size=size: os.truncate(file, size) for size in sizes]
        spoilers += [Path.unlink, lambda file: file.write_bytes(file.read_bytes() + b"\0")]
        for spoil in spoilers:
            spoil(file)
            _hash_once.cache_clear()  # as another process sees it
            listed, lines = sorted(copy.rglob("*")), []
            found = latest_valid(copy, lines.append)
            if name == "README.md":  # which people may write into
                assert (found, lines) == (newer, [])
            else:
                (line,) = lines
                # a flip in the index may accuse a file whose hash or name it holds
                accused = files if name == INDEX else [name]
                assert found == older and str(newer) in line and any(name in line for name in accused), (name, line)
            assert sorted(copy.rglob("*")) == listed  # nothing is deleted
            file.write_bytes(whole)
    _hash_once.cache_clear()
    assert latest_valid(copy, pytest.fail) == newer


# ---- hostile files


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


COMMANDS = [
    ["sample", "{}", "max_new_tokens=1", "device=cpu"],
    ["evaluate", "{}", "recipe={recipe}", "device=cpu"],
    ["export", "{}", "to=exported"],
    ["train", "{recipe}", "init_from={}", "out_dir=begun"],
]


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_hostile_weights_of_a_model_folder(recipe, calm, tmp_path, monkeypatch, capsys, form):
    monkeypatch.chdir(tmp_path)
    folder, mark = tmp_path / "model", tmp_path / "executed"
    tokenizer = AutoTokenizer.from_pretrained(calm)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_layer=1, n_head=2, n_embd=16))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(model.state_dict(), file)
    assert main(["sample", str(folder), "max_new_tokens=1", "device=cpu"]) == 0  # a good one of this form is read
    content = model.state_dict() | {"evil": Evil(mark)}
    if form == "bare":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    for words in COMMANDS:
        capsys.readouterr()
        assert main([word.format(folder, recipe=recipe) for word in words]) == 2, words
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert str(folder) in line and not mark.exists(), words
    if form == "bare":
        pickle.loads(file.read_bytes())["evil"].close()
    else:
        torch.load(file, weights_only=False)["evil"].close()
    assert mark.exists(), "the attack would have worked"


def test_code_that_lies_with_a_model_is_not_run(recipe, copy, tmp_path, monkeypatch, capsys):
    """A checkpoint travels with its model.py; here this is another one, and then the config asks for it, too."""
    monkeypatch.chdir(tmp_path)
    mark, folder = tmp_path / "executed", copy / "checkpoint-000008"
    (folder / "model.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    for words in COMMANDS:
        assert main([word.format(folder, recipe=recipe) for word in words]) == 0, words
        assert not mark.exists(), words
    shutil.rmtree("exported")
    shutil.rmtree("begun")
    config = json.loads((folder / "config.json").read_text())
    auto_map = {name: "model." + name for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": auto_map}))
    for words in COMMANDS:
        capsys.readouterr()
        assert main([word.format(folder, recipe=recipe) for word in words]) == 2, words
        assert str(folder) in capsys.readouterr().err and not mark.exists(), words
    with pytest.raises(AttributeError):  # it has no such class
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert mark.exists(), "the attack would have worked"


# ---- long runs


@pytest.mark.slow
@pytest.mark.parametrize("in_background", [False, True])
def test_a_long_run_does_not_grow(recipe, tmp_path, in_background):
    """Memory, open files and threads of a process over 3,000 steps, 150 checkpoints and 150 evaluations."""
    run = tmp_path / "run"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "nanogpt_accel",
            "train",
            str(recipe),
            f"out_dir={run}",
            "max_iters=3000",
            "eval_interval=20",
            f"async_save={in_background}",
            "trackers=tensorboard",
        ],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGE.parent)},
    )
    seen, watched = [], psutil.Process(process.pid)  # (step, resident bytes, open files, threads)
    while process.poll() is None:
        lines = read_metrics(run / "metrics.jsonl")
        if lines and process.poll() is None:
            seen.append((lines[-1]["step"], watched.memory_info().rss, watched.num_fds(), watched.num_threads()))
        time.sleep(0.1)
    assert process.returncode == 0
    early, late = ([moment for moment in seen if low <= moment[0] < high] for low, high in ((600, 1400), (2200, 2980)))
    assert len(early) > 20 and len(late) > 20
    rss, files, threads = (
        [statistics.median(moment[i] for moment in part) for part in (early, late)] for i in (1, 2, 3)
    )
    print(f"in background {in_background}: resident {rss}, files {files}, threads {threads}")
    assert rss[1] - rss[0] < 4e6 and abs(files[1] - files[0]) <= 1 and abs(threads[1] - threads[0]) <= 1
    assert max(moment[2] for moment in late) <= max(moment[2] for moment in early) + 3
    assert max(moment[3] for moment in late) <= max(moment[3] for moment in early) + 2


# ---- the torturer


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("in_background", [False, True])
def test_the_torturer(processes, in_background):
    """A few kills; `python tests/support/torture.py 100` are many."""
    words = ["10", "--processes", str(processes), *["--async"] * in_background]
    done = subprocess.run(
        [sys.executable, REPOSITORY / "tests" / "support" / "torture.py", *words],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 kills" in done.stdout and " 0 differences" in done.stdout
