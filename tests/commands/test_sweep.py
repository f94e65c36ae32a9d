"""sweep: the grid, its checks, and the promise that an interrupted sweep ends with the same table.

Most tests train the points in this process. The slow ones start real processes, and kill them.
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from launching import TIMEOUT_S, launch, package_env
from runs import checkpoint, numbers, trainer, val_losses, write_recipe
from shared import REPOSITORY

from nanogpt_accel import train
from nanogpt_accel.__main__ import main
from nanogpt_accel.checkpoint.run import Run
from nanogpt_accel.checkpoint.run_folder import lock_run
from nanogpt_accel.commands import sweep
from nanogpt_accel.recipe import FIELDS, Optimizer, load_recipe
from nanogpt_accel.utils import cli

GRID = ["n_layer=1,2", "learning_rate=1e-2,1e-3"]
NAMES = [f"learning_rate={rate},n_layer={n}" for rate in ("0.01", "0.001") for n in (1, 2)]
RATES, FIRST, SECOND = "learning_rate=1e-2,1e-3", "learning_rate=0.01", "learning_rate=0.001"  # the sweep of most tests
FOLDER = Path("runs/tiny-sweep")


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "POLL_S", 0)


@pytest.fixture
def tiny(work, tmp_path):
    return write_recipe(tmp_path)


class Fake:
    """A process that has ended."""

    def __init__(self, status=1):
        self.returncode = status

    def poll(self):
        return self.returncode


def train_in_process(started):
    """Return a replacement for sweep.start that trains in this process, and adds the name of the point to a list."""

    def start(point, env):
        started.append(point.name)
        point.log.parent.mkdir(parents=True, exist_ok=True)
        with open(point.log, "a") as log, redirect_stdout(log), redirect_stderr(log):
            status = cli.run(train.main, sweep.words_of(point))
        return Fake(status)

    return start


@pytest.fixture
def started(monkeypatch):
    """A list of the names of the points that were trained in this process."""
    names = []
    monkeypatch.setattr(sweep, "start", train_in_process(names))
    return names


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a recipe and its finished sweep."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sweep, "start", train_in_process([]))
        assert main(["sweep", str(write_recipe(folder)), RATES]) == 0
    return folder


@pytest.fixture
def copy(finished, tmp_path, work):
    """The recipe of the finished sweep, whose runs are copied to the current folder."""
    shutil.copytree(finished / "runs", tmp_path / "runs", symlinks=True)
    return finished / "tiny.yaml"


def table(out):
    """Return the words of each row of the table in the output of a sweep, without the training time."""
    lines = out.splitlines()
    (title,) = (line for line in lines if line.split()[:1] == ["index"])
    start, end = title.index(" time ") + 1, title.index("status")
    rows = [line[:start] + line[end:] for line in lines]
    return [row.split() for row in rows if row[:6].strip(" *").isdecimal()]


def results(folder=FOLDER):
    return list(csv.DictReader((Path(folder) / "results.csv").read_text().splitlines()))


# ---- the grid


def test_points_have_numbers_and_names_that_do_not_depend_on_order_and_notation(tiny, call):
    expected = [f"{i}  {name}" for i, name in enumerate(NAMES, 1)]
    for grid in (GRID, GRID[::-1], ["--learning-rate", "0.01,1_0e-4", "model.n_layer= 1,2"]):
        assert [line.strip() for line in call("sweep", tiny, *grid, "--list").splitlines()] == expected
    out = call("sweep", tiny, "bias=true,False", "eval_iters=all,2", "algorithm=adamw,muon", "--list")
    assert out.splitlines()[0] == "  1  algorithm=adamw,bias=true,eval_iters=all" and len(out.splitlines()) == 8


def test_texts_and_lists_are_not_split(tiny):
    options, points = sweep.parse(
        [str(tiny), "seed=1,2", "trackers=wandb,tensorboard", "sample_prompt=a, b", "tasks=x,y"]
    )
    assert options.jobs == 1 and [point.name for point in points] == ["seed=1", "seed=2"]
    sweep.load(points, options)
    (recipe, _) = (point.recipe for point in points)
    assert recipe.tracking.trackers == ["wandb", "tensorboard"] and recipe.train.sample_prompt == "a, b"
    with_text = {key for key in FIELDS if "." not in key and not sweep.is_split(key)}
    assert {
        "corpus",
        "mix",
        "stages",
        "validation",
        "options",
        "data_dir",
        "tokenizer",
        "init_from",
        "mirror",
    } < with_text


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["n_layr=1,2"], ["unknown key n_layr (did you mean n_layer?)"]),
        (["n_layer=1"], ["no key has several values; for example, add learning_rate=5e-3,1e-2,2e-2"]),
        (["tokenizer=char,bpe"], ["2e-2; tokenizer is not split at its commas"]),
        (["learning_rate=1e-3,2e-3,0.001"], ["learning_rate=1e-3,2e-3,0.001: 0.001 is given twice"]),
        (["n_layer=1,2", "model.n_layer=3"], ["model.n_layer: is given twice"]),
        ([*GRID, "index=5"], ["index=5: the sweep has 4 points"]),
        ([*GRID, "index=1", "jobs=2"], ["jobs=2: not used with index=1"]),
        ([*GRID, "val_loss=3"], ["val_loss: expected results can only be set in a recipe file"]),
        ([*GRID, "eval_only=true"], ["train.eval_only=true: not supported for a sweep"]),
        ([*GRID, "init_from=resume"], ["model.init_from=resume: a sweep resumes"]),
        ([*GRID, "init_from=somewhere"], ["model.n_layer: has no effect with init_from=somewhere"]),
        ([*GRID, "push_to_hub=true"], ["hub.push_to_hub=true: not supported"]),
        # a problem of some points is reported once, and names them; a problem of all points is reported without names
        (
            ["n_head=3,2,x", "learning_rate=1e-3,-1", "batch_size=0"],
            [
                "error: learning_rate=0.001,n_head=3 and 1 other point: model.n_embd=16 is not divisible",
                "error: train.batch_size=0: ",
                "error: learning_rate=0.001,n_head=x and 1 other point: model.n_head=x: must be an integer",
                "error: learning_rate=-1,n_head=3 and 2 other points: optimizer.learning_rate=-1: must be greater than",
            ],
        ),
    ],
)
def test_problems_of_all_points_are_reported_together(tiny, call, started, words, messages):
    lines = call("sweep", tiny, *words, status=2).splitlines()
    assert len(lines) == len(messages), lines
    assert [message for message in messages if not any(message in line for line in lines)] == []
    assert not started and not Path("runs").exists()


def test_several_ranks_need_an_index(tiny, call, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "add index=N" in call("sweep", tiny, *GRID, status=2)


# ---- training


def test_each_point_is_a_normal_run(finished, call, tmp_path):
    runs, rows = finished / FOLDER, results(finished / FOLDER)
    assert [row["point"] for row in rows] == [FIRST, SECOND]
    for row in rows:
        assert (row["status"], row["steps"], row["tokens"]) == ("done", "8", str(8 * 2 * 16))
        losses = val_losses(runs / row["point"])
        assert (float(row["val_loss"]), float(row["best_val_loss"])) == (losses[-1], min(losses))
    alone = tmp_path / "alone"
    call("train", finished / "tiny.yaml", "learning_rate=1e-3", f"out_dir={alone}")
    assert numbers(runs / SECOND) == numbers(alone) != numbers(runs / FIRST)


def test_a_finished_sweep_trains_nothing_and_prints_the_same_table(copy, finished, call, started):
    before = (FOLDER / "results.csv").read_bytes()
    (FOLDER / "results.csv").unlink()
    first, second = call("sweep", copy, RATES), call("sweep", copy, RATES, "--table")
    assert table(first) == table(second) and started == []
    assert (FOLDER / "results.csv").read_bytes() == before
    assert "  index  learning_rate  val_loss  best_val_loss  tokens  time  status\n" in first
    losses = [f"{float(row['val_loss']):.4f}" for row in results()]  # the last ones are the lowest
    marks = [["*"] * (loss == min(losses)) for loss in losses]
    assert table(first) == [
        [*marks[0], "1", "0.01", losses[0], losses[0], "256", "done"],
        [*marks[1], "2", "0.001", losses[1], losses[1], "256", "done"],
    ]


def test_a_done_point_that_lost_its_metrics_does_not_stop_the_table(copy, call):
    (FOLDER / FIRST / "metrics.jsonl").write_text("")
    first, second = table(call("sweep", copy, RATES, "--table"))
    lost, kept = (first, second) if "-" in first else (second, first)
    assert lost[-1] == "done" and "*" not in lost and kept[0] == "*"


def test_names_that_are_too_long_for_a_file_are_refused(tiny, call):
    keys = [key for key in Optimizer.model_fields if key not in ("algorithm", "options", "schedule")]
    values = [f"{key}=0.{'1' * 20},0.2" for key in keys]
    with pytest.raises(ValueError, match=r"^the names of the run folders have up to \d+ bytes, but at most 250 are"):
        sweep.parse([str(tiny), *values])


def test_more_values_add_points_and_keep_the_others(copy, call, started):
    call("sweep", copy, f"{RATES},2e-3")
    assert started == ["learning_rate=0.002"] and [row["status"] for row in results()] == ["done"] * 3


class Killed(BaseException):
    """An exception that no code catches, like SIGKILL."""


# each point saves after 4 and 8 steps
@pytest.mark.parametrize("save", [3, *(pytest.param(save, marks=pytest.mark.slow) for save in (1, 2))])
def test_a_killed_sweep_ends_with_the_same_table(tiny, finished, call, started, monkeypatch, save):
    saves, save_run = [], Run.save

    def save_or_die(*arguments):
        saves.append(save_run(*arguments))
        if len(saves) == save:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", save_or_die)
        with pytest.raises(Killed):
            main(["sweep", str(tiny), RATES])
    n_done = save // 2
    assert started == [FIRST, SECOND][: n_done + save % 2]
    del started[:]
    out = call("sweep", tiny, RATES)
    assert started == [FIRST, SECOND][n_done:]
    assert (FOLDER / "results.csv").read_bytes() == (finished / FOLDER / "results.csv").read_bytes()
    for name in (FIRST, SECOND):
        assert numbers(FOLDER / name) == numbers(finished / FOLDER / name)
    assert ("resuming" in (FOLDER / f"{started[0]}.log").read_text()) == bool(save % 2)
    assert f"{SECOND}: done, validation loss {float(results()[1]['val_loss']):.4f}\n" in out


def test_a_failing_point_does_not_stop_the_others(tiny, capsys, started):
    """The loss of a point becomes NaN. Repeating the command gives the same table and exit status, and does not train
    this point again."""
    words = ["sweep", str(tiny), "learning_rate=1e38,1e-2", "grad_clip=0", "eval_first=false"]
    tables = []
    for trained in (["learning_rate=1e+38", "learning_rate=0.01"], []):
        del started[:]
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert "error: 1 of 2 points are done" in ended.value.code and "learning_rate=1e+38.log" in ended.value.code
        assert started == trained
        tables.append(table(capsys.readouterr().out))
    assert tables[0] == tables[1] and [row[-1] for row in tables[0]] == ["diverged", "done"]
    assert tables[0][0][:4] == ["1", "1e+38", "-", "-"] and tables[0][1][0] == "*"


def test_a_changed_setting_is_refused_or_trained_again(copy, call, started):
    words = ["sweep", copy, RATES, "weight_decay=0.2"]
    (error,) = call(*words, status=2).splitlines()
    problem = f"the run in {FOLDER} was trained with other settings: weight_decay=0.1 instead of 0.2"
    assert error == (
        f"error: {problem}; set out_dir to another folder than {FOLDER}, or overwrite=true to replace the run"
    )
    for words_of_table in ([*words, "--table"], ["sweep", copy, RATES, "seed=7", "max_iters=16", "--table"]):
        out = call(*words_of_table)
        assert [row[2:] for row in table(out)] == [["-", "-", "0", "other", "settings"]] * 2
    assert "seed=1337 instead of 7, max_iters=8 instead of 16" in out
    assert not started
    # only the points with other settings are trained again, and from the start
    call("train", FOLDER / SECOND, "weight_decay=0.2", "max_iters=12")
    (error,) = call("sweep", copy, RATES, status=2).splitlines()
    assert error.startswith(
        f"error: {SECOND}: {problem.replace('0.1 instead of 0.2', '0.2 instead of 0.1')}, max_iters"
    )
    before = results()  # the table of other settings did not replace the file
    call("sweep", copy, RATES, "overwrite=true")
    assert started == [SECOND] and results() == before


@pytest.mark.parametrize(
    "words",
    [
        ["corpus=text.txt"],  # val_fraction=0.0005 gives too few tokens and is increased; "?" cannot be encoded
        ["corpus=text.txt", "val_fraction=0.1", "n_kv_head=1", "validation={other: {corpus: other.txt, split: all}}"],
        ["mix=[{corpus: text.txt, weight: 1}, {corpus: other.txt, weight: 2}]", "val_fraction=0.1", "sample_tokens=0"],
        ["corpus=text.txt", "depth=2", "sample_tokens=0"],
    ],
    ids=["corpus", "validation", "mix", "depth"],
)
def test_values_that_a_run_adds_to_run_yaml_are_no_changes(tiny, call, words):
    text = Path("text.txt").read_text()
    Path("other.txt").write_text("".join(sorted(text)))
    recipe = write_recipe(Path(), corpus=None, val_fraction=None, sample_tokens=2, sample_prompt="?", max_iters=2)
    words = ["sweep", recipe, "seed=1,2", "index=1", *words]
    call(*words)
    assert "seed=1: done" in call(*words)
    for key, before, value in (("limit_documents", "none", 9), ("document_mask", "false", "true")):
        assert f"{key}={before} instead of {value}" in call(*words, f"{key}={value}", status=2)
    Path("text.txt").write_text(text[::-1])  # the same settings, but other data
    assert "was trained with other settings: token files of " in call(*words, status=2)
    call(*words, "overwrite=true")
    assert "seed=1: done" in call(*words, "overwrite=true")


def test_data_are_prepared_before_the_first_point(tiny, call, started, monkeypatch):
    recipe, seen = write_recipe(Path(), data_dir=None, corpus="text.txt", val_fraction=None), []
    monkeypatch.setattr(
        sweep, "start", lambda *_: seen.append(len(list(Path("data").glob("*/manifest.json")))) or Fake()
    )
    with pytest.raises(SystemExit):
        main(["sweep", str(recipe), "val_fraction=0.1,0.2", "seed=1,2"])
    assert seen == [2] * 4
    assert "block_size=5000: a sample has 5,001 tokens" in call(
        "sweep", recipe, "val_fraction=0.1,0.2", "block_size=5000", status=2
    )


@pytest.mark.parametrize("when", ["before", "at the same time"])
def test_a_point_that_another_process_trains_is_waited_for(tiny, call, started, monkeypatch, when):
    """This happens if a sweep is killed while the training of a point continues."""
    locks, train_here = [], sweep.start
    if when == "before":
        locks.append(lock_run(FOLDER / "seed=1"))

    def start(point, env):
        if not locks:  # this training finds a lock
            locks.append(lock_run(point.folder))
            return Fake()
        process = train_here(point, env)
        if len(started) == 1:
            locks[0].release()
        return process

    monkeypatch.setattr(sweep, "start", start)
    out = call("sweep", tiny, "seed=1,2", "max_iters=2")
    assert started == ["seed=2", "seed=1"] and [row["status"] for row in results()] == ["done"] * 2
    assert out.count(f"seed=1: waiting, because process {os.getpid()} on ") == (when == "before")


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_a_signal_stops_the_running_trainings(tiny, capsys, monkeypatch):
    calls = []

    def start(point, env):
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(point.name)
        return SimpleNamespace(
            poll=lambda: None, terminate=lambda: calls.append("terminate"), wait=lambda: calls.append("wait")
        )

    monkeypatch.setattr(sweep, "start", start)
    assert main(["sweep", str(tiny), *GRID, "jobs=2"]) == 75
    assert calls == [*NAMES[:2], "terminate", "terminate", "wait", "wait"]
    assert "stopped by SIGTERM: 0 of 4 points are done; the same command continues the sweep" in capsys.readouterr().err


def test_index_trains_one_point_in_this_process(tiny, call, finished, started):
    call("sweep", tiny, *GRID, "index=3")
    assert [path.name for path in FOLDER.iterdir()] == [NAMES[2]] and not started
    assert numbers(FOLDER / NAMES[2]) == numbers(finished / FOLDER / SECOND)  # TINY has one layer, too
    assert f"{NAMES[2]}: done; to train it again, delete" in call("sweep", tiny, *GRID, "index=3")
    rows = table(call("sweep", tiny, *GRID, "--table"))
    assert [row[-1] for row in rows] == ["started", "started", "done", "started"]
    assert results()[2]["val_loss"] == results(finished / FOLDER)[1]["val_loss"]
    for command in ("sample", "evaluate"):  # the name of the folder has = and ,
        call(command, FOLDER / NAMES[2], "device=cpu", *(["max_new_tokens=1"] if command == "sample" else []))


def test_jobs_share_the_cores_and_the_gpus(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8), raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")

    def environments(device="auto", jobs=3):
        found = [sweep.environment(device, slot, jobs) for slot in range(jobs)]
        return [(env.get("OMP_NUM_THREADS"), env.get("CUDA_VISIBLE_DEVICES")) for env in found]

    assert environments() == [("2", "4"), ("2", "7"), ("2", "4")]
    assert environments("cpu") == [("2", "4,7")] * 3 and environments(jobs=1) == [(None, "4,7")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert environments() == [("5", "")] * 3
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert environments() == [("5", "0"), ("5", "1"), ("5", "0")]


def test_each_point_has_its_own_mirror(tiny, tmp_path):
    options, points = sweep.parse([str(tiny), *GRID, f"mirror={tmp_path}/copy/"])
    sweep.load(points, options)
    assert [point.recipe.checkpoint.mirror for point in points] == [f"{tmp_path}/copy/{name}" for name in NAMES]


# ---- real processes


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Return (arguments of a sweep of three seeds, its folder). The sweep was trained without an interruption in this
    process."""
    folder = tmp_path_factory.mktemp("seeds")
    words = ["sweep", str(write_recipe(folder, keep_last=1)), "seed=1,2,3", "max_iters=600", "eval_interval=200"]
    words += ["save_interval=50"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "start", train_in_process([]))
        assert main([*words, f"out_dir={folder}/undisturbed"]) == 0
    return words, folder / "undisturbed"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals and sessions are POSIX's")
@pytest.mark.parametrize("end", ["the sweep is killed", "all are killed", "SIGTERM", "SIGUSR1", "a training is killed"])
def test_an_interrupted_sweep_ends_with_the_same_table(seeds, end, tmp_path):
    words, undisturbed = seeds
    folder = tmp_path / "sweep"
    words = [sys.executable, "-m", "nanogpt_accel", *words, f"out_dir={folder}", "jobs=2"]
    options = {"env": package_env(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(words, start_new_session=True, **options)
    deadline = time.monotonic() + TIMEOUT_S
    while not checkpoint(folder / "seed=2", 50).is_dir():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    if end == "all are killed":
        os.killpg(process.pid, signal.SIGKILL)
    elif end == "the sweep is killed":
        process.kill()
    elif end == "a training is killed":
        os.kill(json.loads((folder / "seed=2" / ".lock.json").read_text())["pid"], signal.SIGKILL)
    else:
        process.send_signal(getattr(signal, end))
    out, status = process.communicate(timeout=TIMEOUT_S)[0], process.returncode
    if end.startswith("SIG"):
        assert status == 75 and f"stopped by {end}: 0 of 3 points are done" in out, out
        assert "saving a checkpoint" in (folder / "seed=2.log").read_text()
    elif end == "a training is killed":
        assert status == 1 and "seed=2: ended by signal 9 (Killed), perhaps because" in out, out
        assert [row["status"] for row in results(folder)] == ["done", "unfinished", "done"]
    done = subprocess.run(words, timeout=TIMEOUT_S, **options)
    assert done.returncode == 0, done.stdout
    assert ("waiting, because process" in done.stdout) == (end == "the sweep is killed"), done.stdout
    assert (folder / "results.csv").read_bytes() == (undisturbed / "results.csv").read_bytes()
    for name in ("seed=1", "seed=2", "seed=3"):
        assert numbers(folder / name) == numbers(undisturbed / name)


@pytest.mark.slow
def test_several_ranks_train_one_point(tmp_path):
    recipe = write_recipe(tmp_path, gradient_accumulation_steps=2)
    argv = ["sweep", recipe, "seed=1,2", "index=2", f"out_dir={tmp_path}/sweep"]
    out = launch("cpu_2proc.yaml", module="nanogpt_accel", argv=argv, cwd=tmp_path)
    assert "(2 processes" in out and trainer(tmp_path / "sweep" / "seed=2", 8)["processes"] == 2
    assert not (tmp_path / "sweep" / "seed=1").exists()
    out = launch("cpu_2proc.yaml", module="nanogpt_accel", argv=argv, cwd=tmp_path)
    assert out.count("seed=2: done; to train it again, delete") == 1


# ---- wandb's agent


@pytest.mark.slow  # importing wandb takes seconds
def test_the_agent_of_wandb_can_start_a_run(tiny, tmp_path):
    """Run the example of the documentation with the command line that wandb itself builds."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    page = (REPOSITORY / "nanogpt_accel" / "commands" / "README.md").read_text(encoding="utf-8")
    (example,) = [text for text in page.split("```yaml\n") if text.startswith("program:")]
    example = yaml.safe_load(example.partition("```")[0])
    chosen = {"learning_rate": 0.00123, "n_layer": 2, "bias": True}
    assert set(chosen) == set(example["parameters"]) and example["metric"]["name"] == "val_loss"
    words = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in chosen.items()}})
    command = []
    for word in utils.create_sweep_command(example["command"]):
        command += words["args"] if word == "${args}" else [word]
    program = tmp_path / "nanogpt-accel"
    program.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    program.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WANDB_RUN_ID": "a1b2c3"}
    name, *argv = json.loads(subprocess.run(command, env=env, capture_output=True, check=True, text=True).stdout)
    target, options = cli.parse(argv, FIELDS)
    recipe = load_recipe(target, options)
    assert (name, recipe.tracking.trackers, recipe.out_dir) == ("train", ["wandb"], "runs/agent/a1b2c3")
    assert (recipe.optimizer.learning_rate, recipe.model.n_layer, recipe.model.bias) == (0.00123, 2, True)
