"""The promises of a safe run: one trainer per folder, the same numbers without a home folder, Hub or trackers or with a
jumping clock, damaged files are found, malicious files run no code, no token is written, memory does not grow."""

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
from types import SimpleNamespace

import psutil
import pytest
import torch
from launching import package_env, run_python
from runs import checkpoint, copy_without, losses, numbers, weights, write_recipe
from shared import REPOSITORY
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from nanogpt_accel import train, training
from nanogpt_accel.__main__ import main
from nanogpt_accel.checkpoint.layout import INDEX, list_checkpoints
from nanogpt_accel.checkpoint.run_folder import check_lock
from nanogpt_accel.checkpoint.save import Saver
from nanogpt_accel.checkpoint.verify import _hash_once, latest_valid
from nanogpt_accel.commands import report
from nanogpt_accel.tracking.console import Console
from nanogpt_accel.tracking.metrics_log import read_metrics

PACKAGE = REPOSITORY / "nanogpt_accel"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("safety")
    return write_recipe(folder, lr_decay_iters=8, keep_last=None)


@pytest.fixture(scope="module")
def undisturbed(recipe):
    """The folder of an undisturbed run, for reading only."""
    folder = recipe.parent / "undisturbed"
    assert main(["train", str(recipe), f"out_dir={folder}"]) == 0
    return folder


@pytest.fixture
def copy(undisturbed, tmp_path):
    return shutil.copytree(undisturbed, tmp_path / "copy", symlinks=True)


# ---- two trainers in one folder


LOCK_RUN = """
import sys, time
from nanogpt_accel.checkpoint.run_folder import lock_run
held = lock_run(sys.argv[1])
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def trainer(copy):
    """Another process that has locked the run folder `copy`."""
    process = subprocess.Popen([sys.executable, "-c", LOCK_RUN, copy], stdout=subprocess.PIPE, env=package_env())
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_second_trainer_in_a_run_folder_is_refused(recipe, copy, trainer, capsys, monkeypatch):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    monkeypatch.setattr(train, "run_training", pytest.fail)  # refused before anything slow starts
    for argv in (
        [str(copy), "max_iters=9"],
        [str(recipe), f"out_dir={copy}", "overwrite=true"],
        [str(recipe), f"out_dir={copy}", "resume=auto"],
    ):
        assert main(["train", *argv]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(
            f"error: out_dir={copy}: process {trainer.pid} on {platform.node()} is training in this folder"
        )
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    assert main(["sample", str(copy), "max_new_tokens=1", "device=cpu"]) == 0  # reading is allowed


def test_lock_of_a_killed_trainer_is_free(copy, trainer):
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    assert check_lock(copy) == []
    assert json.loads((copy / ".lock.json").read_text())["pid"] == os.getpid()
    (copy / ".lock.json").write_text("no JSON")
    assert check_lock(copy) == []


def test_run_folder_is_locked_until_the_end_of_the_training(recipe, tmp_path, monkeypatch):
    run, found = tmp_path / "run", []
    save = Saver.save
    monkeypatch.setattr(Saver, "save", lambda *args: (found.append(check_lock(run)), save(*args)))
    assert main(["train", str(recipe), f"out_dir={run}"]) == 0
    assert [len(problems) for problems in found] == [1, 1] and f"process {os.getpid()} on" in found[0][0]
    assert check_lock(run) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks_can_be_trained_on(copy, monkeypatch, number):
    import fcntl

    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert check_lock(copy) == []
    assert main(["train", str(copy), "max_iters=9"]) == 0


# ---- optional results


def test_failing_plot_sample_and_push_are_warnings(recipe, undisturbed, tmp_path, monkeypatch, capsys):
    """Samples during training restore the training mode, so that dropout continues."""

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("nanogpt_accel.models.generation.generate", fail)
    monkeypatch.setattr(train, "plot_losses", fail)
    monkeypatch.setattr("nanogpt_accel.checkpoint.run.Run.finish_pushing", fail)
    run = tmp_path / "run"
    capsys.readouterr()
    assert (
        main(["train", str(recipe), f"out_dir={run}", "sample_interval=4", "sample_tokens=4", "sample_prompt=the"]) == 0
    )
    said = capsys.readouterr()
    assert [line for line in said.out.splitlines() if line.startswith("warning:")] == [
        "warning: no sample after 4 steps (out of memory)",
        f"warning: {run / 'loss.png'} cannot be written (out of memory)",
        "warning: no sample after 8 steps (out of memory)",
        f"warning: {run} cannot be pushed to the Hub (out of memory)",
    ]
    assert f"The run is in {run}" in said.out and said.err == ""
    assert numbers(run) == numbers(undisturbed) and weights(run, 8) == weights(undisturbed, 8)


def test_sharded_model_that_does_not_fit_on_one_device_does_not_fail_the_run(copy, monkeypatch, capsys):
    def fail(folder):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(training, "is_sharded", lambda accelerator: True)
    monkeypatch.setattr(training, "load_model", fail)
    setup = SimpleNamespace(accelerator=None)
    assert training.finished_model(setup, SimpleNamespace(out_dir=copy), Console()) is None
    said = capsys.readouterr().out
    assert said == f"warning: {copy / 'checkpoint-000008'} cannot be loaded after the training (out of memory)\n"


# ---- trackers


def test_failing_tracker_is_one_warning_and_changes_no_number(recipe, undisturbed, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    from accelerate.tracking import TensorBoardTracker

    def fail(*args, **kwargs):
        raise ConnectionError("its server is down")

    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    monkeypatch.setattr(TensorBoardTracker, "finish", fail)
    run = tmp_path / "run"
    assert main(["train", str(recipe), f"out_dir={run}", "trackers=tensorboard"]) == 0
    assert capsys.readouterr().out.count("its server is down") == 1
    assert numbers(run) == numbers(undisturbed) and weights(run, 8) == weights(undisturbed, 8)


@pytest.fixture(scope="module")
def tracked(recipe, tmp_path_factory):
    """A run with the tracker tensorboard, and the command that started it, without out_dir."""
    pytest.importorskip("tensorboard")
    run, command = tmp_path_factory.mktemp("tracked") / "run", ["train", str(recipe), "trackers=tensorboard"]
    command += ["project=p", "sample_interval=4", "sample_tokens=4"]
    assert main([*command, f"out_dir={run}"]) == 0
    return run, command


@pytest.mark.parametrize(
    "case, lost, words, n_steps",
    [
        ("resumed", [8], None, 8),  # the checkpoints that are lost, as if the run had been killed before
        ("resumed twice", [8], None, 8),
        ("killed before the first checkpoint", [4, 8], [], 8),
        ("overwritten", [], ["overwrite=true"], 8),
        ("overwritten by a shorter run", [], ["overwrite=true", "max_iters=6"], 6),
    ],
)
def test_tensorboard_has_each_step_once(tracked, tmp_path, case, lost, words, n_steps):
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator  # that of the server
    from tensorboard.util.tensor_util import make_ndarray

    source, command = tracked
    run = copy_without(source, tmp_path / "run", *lost)
    assert main(["train", str(run)] if words is None else [*command, f"out_dir={run}", *words]) == 0
    if case == "resumed twice":
        shutil.rmtree(checkpoint(run, 8))
        assert main(["train", str(run)]) == 0
    logged = EventAccumulator(str(run / "p"), size_guidance={"tensors": 0}).Reload()  # 0: all values
    values = {event.step: make_ndarray(event.tensor_proto).item() for event in logged.Tensors("loss")}
    assert values == pytest.approx(losses(run))
    for tag, steps in ("loss", [*range(n_steps)]), ("val_loss", [0, 4, n_steps]), ("sample/text_summary", [4, n_steps]):
        assert [event.step for event in logged.Tensors(tag)] == steps


def test_wandb_resumes_the_same_run(recipe, tmp_path, monkeypatch, request):
    wandb = pytest.importorskip("wandb")
    request.addfinalizer(wandb.teardown)  # wandb keeps its mode until the process ends
    asked, init = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: (asked.append(options), init(mode="disabled"))[1])
    first_run = ["train", str(recipe), f"out_dir={tmp_path / 'run'}", "trackers=wandb", "max_iters=1"]
    assert main(first_run) == 0
    assert main(["train", str(tmp_path / "run"), "max_iters=2"]) == 0
    assert main([*first_run, "overwrite=true"]) == 0
    first, resumed, new = (options["id"] for options in asked)
    assert first == resumed != new
    assert {options["resume"] for options in asked} == {"allow"}


# ---- no home folder, no Hub, no network


def test_without_home_hub_or_network_the_run_is_the_same_and_no_token_is_written(recipe, undisturbed, tmp_path):
    """The tokens of the Hub and of wandb are in the environment, and must appear in no file and no output."""
    pytest.importorskip("wandb")
    secrets = {"HF_TOKEN": "hf_SecretOfTheHub", "WANDB_API_KEY": "5ec2e7" * 6 + "abcd"}
    gone = ("HF_HOME", "HF_HUB_OFFLINE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR")
    env = package_env(
        **secrets,
        HOME="/proc/no-such-home",
        HF_ENDPOINT="http://127.0.0.1:1",
        WANDB_MODE="offline",
        NANOGPT_ACCEL_CACHE="/proc/no-such-cache",
    )
    env = {key: value for key, value in env.items() if key not in gone}
    run = tmp_path / "run"
    words = [
        "train",
        recipe,
        f"out_dir={run}",
        "push_to_hub=true",
        "hub_model_id=me/mine",
        "trackers=wandb",
    ]
    done = run_python("-m", "nanogpt_accel", *words, env=env, cwd=tmp_path)
    assert "not pushed" in done.stdout and "not pushed to the Hub" in done.stdout and "Traceback" not in done.stderr
    assert numbers(run) == numbers(undisturbed) and weights(run, 8) == weights(undisturbed, 8)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20 and any(path.suffix == ".wandb" for path in files)
    for secret in secrets.values():
        assert secret not in done.stdout + done.stderr
        assert [path for path in files if secret.encode() in path.read_bytes()] == []


# ---- the clock


def test_durations_use_a_monotonic_clock():
    """The system clock may jump; time.monotonic and time.perf_counter do not."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in ("time.time", "time.time_ns", "datetime.now", "datetime.utcnow"), file
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                assert not {alias.name for alias in node.names} & {"time", "time_ns"}, file


def test_system_clock_that_jumps_back_changes_no_number(recipe, undisturbed, tmp_path, monkeypatch):
    clock = iter(range(2_000_000_000, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    run = tmp_path / "run"
    assert main(["train", str(recipe), f"out_dir={run}", "max_hours=1"]) == 0
    assert numbers(run) == numbers(undisturbed) and weights(run, 8) == weights(undisturbed, 8)
    assert all(line.get("tokens_per_second", 1) > 0 for line in read_metrics(run / "metrics.jsonl"))


# ---- damaged files


def test_any_changed_byte_of_a_checkpoint_is_found_and_named(copy):
    older, newer = list_checkpoints(copy)
    files = sorted(path.relative_to(newer).as_posix() for path in newer.rglob("*") if path.is_file())
    assert len(files) == 10
    rng = random.Random(6)

    def flip(file, place):
        content = bytearray(file.read_bytes())
        content[place] ^= 1 << rng.randrange(8)
        file.write_bytes(content)

    for name in files:
        file = newer / name
        original = file.read_bytes()
        places = [0, len(original) // 2, len(original) - 1, *(rng.randrange(len(original)) for _ in range(5))]
        corruptions = [lambda file, place=place: flip(file, place) for place in places]
        sizes = (0, 1, len(original) // 2, len(original) - 1)
        corruptions += [lambda file, size=size: os.truncate(file, size) for size in sizes]
        corruptions += [Path.unlink, lambda file: file.write_bytes(file.read_bytes() + b"\0")]
        for corrupt in corruptions:
            corrupt(file)
            _hash_once.cache_clear()  # as in another process
            listed, lines = sorted(copy.rglob("*")), []
            found = latest_valid(copy, lines.append)
            if name == "README.md":  # which users may edit
                assert (found, lines) == (newer, [])
            else:
                (line,) = lines
                # a changed index may name the file whose hash or name it contains
                suspects = files if name == INDEX else [name]
                assert found == older and str(newer) in line and any(name in line for name in suspects), (name, line)
            assert sorted(copy.rglob("*")) == listed  # no file is deleted
            file.write_bytes(original)
    _hash_once.cache_clear()
    assert latest_valid(copy, pytest.fail) == newer


# ---- malicious files


OUTPUTS = ["run.yaml", "metrics.jsonl", "samples.jsonl", "loss.png", "expect.json", "report.html", "report-loss.png"]


@pytest.mark.skipif(os.name == "nt", reason="links require a privilege")
def test_links_in_a_run_folder_from_elsewhere_are_not_written_through(copy, tmp_path, monkeypatch):
    """The targets of the links do not change, whether the links have the names of outputs or of temporary files."""
    victims, pid = tmp_path / "victims", os.getpid()
    victims.mkdir()
    names = [".lock.json", *OUTPUTS, *(f"{name}.tmp-{pid}" for name in OUTPUTS), "metrics.jsonl.tmp", "README.md"]
    names += [".README.md.link", ".model.safetensors.link"]
    for name in names:
        victim, link = victims / name.strip("."), copy / name
        victim.write_bytes(link.read_bytes() if link.is_file() else b"important")
        link.unlink(missing_ok=True)
        link.symlink_to(victim)
    for name in (".checkpoint-000009.tmp", ".checkpoint-000008.old", ".checkpoint-000004.tmp", ".push-1"):
        (victims / name.strip(".")).mkdir()
        (victims / name.strip(".") / "file").write_text("important")
        (copy / name).symlink_to(victims / name.strip("."))
    before = {path: path.read_bytes() for path in victims.rglob("*") if path.is_file()}
    assert main(["train", str(copy), "max_iters=9", "sample_interval=1", "sample_tokens=2", "keep_last=1"]) == 0
    monkeypatch.setattr(report, "CHARTS", {"loss": report.CHARTS["loss"]})
    assert main(["report", str(copy)]) == 0
    assert {path: path.read_bytes() for path in victims.rglob("*") if path.is_file()} == before
    assert list(losses(copy)) == list(range(9))
    assert not any((copy / name).is_symlink() for name in OUTPUTS if name != "expect.json")


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


COMMANDS = [
    ["sample", "{}", "max_new_tokens=1", "device=cpu"],
    ["evaluate", "{}", "recipe={recipe}", "device=cpu"],
    ["export", "{}", "to=exported"],
    ["train", "{recipe}", "init_from={}", "out_dir=new"],
]


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_malicious_pickle_in_a_model_folder_is_not_executed(recipe, undisturbed, tmp_path, monkeypatch, capsys, form):
    monkeypatch.chdir(tmp_path)
    folder, mark = tmp_path / "model", tmp_path / "executed"
    tokenizer = AutoTokenizer.from_pretrained(undisturbed)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_layer=1, n_head=2, n_embd=16))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(model.state_dict(), file)
    assert main(["sample", str(folder), "max_new_tokens=1", "device=cpu"]) == 0  # a harmless file can be read
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


def test_model_py_of_a_model_folder_is_not_executed(recipe, copy, tmp_path, monkeypatch, capsys):
    """Every checkpoint contains a model.py. Here it is malicious, and then config.json requests it, too."""
    monkeypatch.chdir(tmp_path)
    mark, folder = tmp_path / "executed", checkpoint(copy, 8)
    (folder / "model.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    for words in COMMANDS:
        assert main([word.format(folder, recipe=recipe) for word in words]) == 0, words
        assert not mark.exists(), words
    shutil.rmtree("exported")
    shutil.rmtree("new")
    config = json.loads((folder / "config.json").read_text())
    auto_map = {name: "model." + name for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": auto_map}))
    for words in COMMANDS:
        capsys.readouterr()
        assert main([word.format(folder, recipe=recipe) for word in words]) == 2, words
        assert str(folder) in capsys.readouterr().err and not mark.exists(), words
    with pytest.raises(AttributeError):  # the class does not exist
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert mark.exists(), "the attack would have worked"


# ---- long runs


@pytest.mark.slow
@pytest.mark.parametrize("in_background", [False, True])
def test_memory_files_and_threads_do_not_grow_over_a_long_run(recipe, tmp_path, in_background):
    """The run has 3,000 steps, 150 checkpoints and 150 evaluations."""
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
        env=package_env(),
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


# ---- many random kills


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("in_background", [False, True])
def test_run_survives_random_kills(processes, in_background):
    """The run is killed 10 times. `python tests/support/torture.py 100` kills it more often."""
    words = ["10", "--processes", str(processes), *["--async"] * in_background]
    done = run_python(REPOSITORY / "tests" / "support" / "torture.py", *words, timeout=900)
    assert "10 kills" in done.stdout and " 0 differences" in done.stdout
