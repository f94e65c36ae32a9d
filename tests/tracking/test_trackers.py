"""trackers.py: which trackers a recipe may name, and that each of them has one run, its name and its files.

The fakes have the functions that Accelerate's trackers call, and record the arguments. The slow tests run the real
packages, if they are installed, offline and in a new process, because some of them change other packages.
"""

import json
import os
import shutil
import sqlite3
import sys
import zipfile
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
from launching import package_env, run_python
from runs import write_recipe

from nanogpt_accel.tracking import trackers
from nanogpt_accel.tracking.trackers import LIMITS, TRACKERS, Trackers, check_trackers


def test_unknown_and_missing_trackers_are_refused(monkeypatch):
    assert check_trackers([]) == []
    problems = check_trackers(["wandbb", "tensorboard", "nothing"])
    assert [p.partition(":")[0] for p in problems if "not supported" in p] == [
        "tracking.trackers=wandbb",
        "tracking.trackers=nothing",
    ]
    assert "wandb" in problems[0] and "tensorboard" in problems[0]
    monkeypatch.setattr("nanogpt_accel.tracking.trackers.find_spec", lambda name: None)
    assert check_trackers(["wandb"]) == ["tracking.trackers=wandb: not installed; run pip install wandb"]


@pytest.mark.parametrize("project", ["../x", "a/../../x", "/tmp/x"])
def test_project_outside_of_the_run_folder_is_refused(project):
    """tensorboard takes it as a folder, and a recipe from elsewhere may contain any name."""
    (problem,) = check_trackers(["tensorboard"], project)
    assert problem.startswith(f"tracking.project={project}: ") and check_trackers(["wandb"], project) == []
    assert check_trackers(["tensorboard"], "my project/a..b") == []


def test_tracker_names_are_those_of_accelerate():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(TRACKERS) == {getattr(name, "value", name) for name in LOGGER_TYPE_TO_CLASS}


# ---- one run, with its name, in the run folder


class Settings(dict):
    def update(self, values, allow_val_change=False):
        super().update(values)


class FakeRun:
    """The run of any tracker. options: the arguments with which the run was started."""

    settings_of = {}  # id -> settings; they stay when a run is continued

    def __init__(self, *, id=None, **options):
        self.id = self.hash = id or f"given-{len(self.settings_of)}"
        self.options, self.settings = options, self.settings_of.setdefault(self.id, Settings())
        self.info = SimpleNamespace(run_id=self.id)

    def connect_configuration(self, values):
        self.settings.update(values)

    def __setitem__(self, key, values):  # aim
        self.settings.update(values)

    log_parameters = log_params = connect_configuration
    finish = end = close = lambda self: None


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Return a function start(tracker, first_step) that starts a run in tmp_path as in a new process, and returns (its
    FakeRun, lines of output)."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    from nanogpt_accel.distributed.accelerator import make_accelerator

    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "TRACKIO_DIR", "CLEARML_TASK", "WANDB_DISABLED"):
        monkeypatch.setenv(name, "")  # so that it is restored after the test
        monkeypatch.delenv(name)
    monkeypatch.setattr(trackers, "_MLFLOW_URIS", set())
    started, uri = [], []

    def new(id=None, **options):
        run = FakeRun(id=id, **options)
        run.uri = list(uri)
        started.append(run)
        return run

    def log_params(values):  # MLflow refuses changes
        run = started[-1]
        if any(key in run.settings and run.settings[key] != value for key, value in values.items()):
            raise ValueError("Changing param values is not allowed")
        run.settings.update(values)

    class Task:
        current_task = staticmethod(lambda: None)
        init = staticmethod(lambda reuse_last_task_id, **options: new(reuse_last_task_id or None, **options))

    fakes = {
        "wandb": {"init": new, "config": Settings()},
        "swanlab": {"init": new, "config": Settings()},
        "trackio": {"init": new, "config": Settings()},
        "comet_ml": {
            "__version__": "3.50.0",
            "start": lambda experiment_key, **options: new(experiment_key, **options),
            "ExperimentConfig": lambda **options: options,
        },
        "aim": {"Run": lambda run_hash=None, **options: new(run_hash, **options)},
        "dvclive": {"Live": new},
        "clearml": {"Task": Task},
        "mlflow": {
            "is_tracking_uri_set": lambda: bool(uri),
            "get_tracking_uri": lambda: uri[-1],
            "set_tracking_uri": uri.append,
            "search_experiments": lambda filter_string: [],
            "create_experiment": lambda **options: "1",
            "start_run": lambda run_id, **options: new(run_id, **options),
            "log_params": log_params,
            "utils": SimpleNamespace(
                validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=99, MAX_PARAMS_TAGS_PER_BATCH=100)
            ),
        },
    }

    def start(tracker, first_step, config=None):
        module = ModuleType(tracker)
        vars(module).update(fakes[tracker])
        monkeypatch.setitem(sys.modules, tracker, module)
        accelerator = make_accelerator("cpu", logging_dir=tmp_path)
        accelerator.log_with = [tracker]
        lines = []
        Trackers(accelerator, "proj", config or {"a": 1}, first_step, tmp_path, "my run", lines.append)
        assert type(accelerator.trackers[0]) is LOGGER_TYPE_TO_CLASS[tracker]
        return started[-1], lines

    return start


@pytest.mark.parametrize("tracker", sorted(set(TRACKERS) - {"tensorboard"}))
def test_each_tracker_continues_its_run_with_its_name_in_the_run_folder(start, tmp_path, tracker):
    first, lines = start(tracker, 0)
    again, _ = start(tracker, 5)
    third, _ = start(tracker, 7)
    new, _ = start(tracker, 0)  # with overwrite=true
    assert lines == ([f"trackers={tracker}: {LIMITS[tracker]}"] if tracker in LIMITS else [])
    # one run
    if tracker == "dvclive":
        assert [run.options["resume"] for run in (first, again, third, new)] == [False, True, True, False]
    elif tracker == "trackio":  # by its name
        assert [run.options["resume"] for run in (first, again, third, new)] == ["never", "allow", "allow", "never"]
    else:
        assert first.id == again.id == third.id != new.id
    # its name
    shown = {
        "aim": lambda run: run.name,
        "clearml": lambda run: run.options["task_name"],
        "comet_ml": lambda run: run.options["experiment_config"]["name"],
        "dvclive": lambda run: run.options["exp_name"].replace("-", " "),
        "mlflow": lambda run: run.options["run_name"] or "my run",  # only if the run is new
    }.get(tracker, lambda run: run.options["name"])
    assert [shown(run) for run in (first, again, new)] == ["my run"] * 3
    # its files
    folder = str(tmp_path)
    places = {
        "aim": lambda run: run.options["repo"],
        "clearml": lambda run: folder,  # LIMITS says so
        "comet_ml": lambda run: run.options["experiment_config"]["offline_directory"],
        "mlflow": lambda run: run.uri[-1].removeprefix("sqlite:///"),
        "swanlab": lambda run: run.options["log_dir"],
        "trackio": lambda run: os.environ["TRACKIO_DIR"],
    }.get(tracker, lambda run: run.options["dir"])
    assert all(str(places(run)).startswith(folder) for run in (first, again, new))


def test_changed_settings_do_not_end_a_resumed_run(start):
    """MLflow refuses other values of parameters."""
    for tracker in sorted(set(TRACKERS) - {"tensorboard"}):
        start(tracker, 0, {"max_iters": 8, "init_from": "scratch"})
        start(tracker, 8, {"max_iters": 9, "init_from": "resume"})


def test_settings_of_the_user_for_mlflow_and_trackio_apply(start, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    run, _ = start("mlflow", 0)
    assert run.uri == []
    monkeypatch.setenv("TRACKIO_DIR", "mine")
    start("trackio", 0)
    assert os.environ["TRACKIO_DIR"] == "mine"


@pytest.mark.parametrize("tracker", ["wandb", "swanlab", "comet_ml", "aim", "mlflow", "clearml"])
@pytest.mark.parametrize("content", ["../../x", "", "a b", "x" * 200, None])
def test_id_file_from_elsewhere_is_replaced(start, tmp_path, tracker, content):
    victim, file = tmp_path / "victim", tmp_path / f".{tracker}_id"
    victim.write_text("../../x" if content is None else content)
    file.symlink_to(victim) if content is None else file.write_text(content)
    run, _ = start(tracker, 5)
    assert file.read_text() == run.id != content and not file.is_symlink()
    assert victim.read_text() == ("../../x" if content is None else content)


def test_run_that_cannot_be_started_says_how_to_go_on(start, monkeypatch, refused, tmp_path):
    def fail(**options):
        raise RuntimeError("no such run")

    start("mlflow", 0)
    monkeypatch.setattr("accelerate.tracking.MLflowTracker.start", lambda self: fail())
    with refused(
        ValueError, "cannot start a tracker: no such run", "trackers=tensorboard", str(tmp_path / ".mlflow_id")
    ):
        start("mlflow", 5)
    with pytest.raises(ValueError) as caught:
        start("mlflow", 0)
    assert ".mlflow_id" not in str(caught.value)
    monkeypatch.setattr("accelerate.tracking.SwanLabTracker.start", lambda self: fail())
    with refused(ValueError, "set SWANLAB_MODE=offline or trackers=tensorboard"):
        start("swanlab", 0)


@pytest.mark.parametrize("value", ["true", "1", "YES", "on", "false", "0", "", None])
def test_wandb_disabled_counts_like_the_mode_disabled(start, monkeypatch, value):
    """WANDB_DISABLED has the same meaning in transformers' Trainer."""
    if value is not None:
        monkeypatch.setenv("WANDB_DISABLED", value)
    run, _ = start("wandb", 0)
    assert run.options.get("mode") == ("disabled" if value in ("true", "1", "YES", "on") else None)


# ---- the real packages


def steps_in_mlflow(run):
    with sqlite3.connect(run / "mlflow.db") as database:
        assert database.execute("select name from runs").fetchall() == [("my run",)]
        assert ("proj",) in database.execute("select name from experiments").fetchall()
        return database.execute("select step from metrics where key = 'loss'").fetchall()


def steps_in_trackio(run):
    with sqlite3.connect(run / "trackio" / "proj.db") as database:
        assert len(database.execute("select distinct run_name, run_id from metrics").fetchall()) == 1
        lines = database.execute("select step, metrics, run_name from metrics").fetchall()
        return [(step,) for step, metrics, name in lines if "loss" in json.loads(metrics) and name == "my run"]


def steps_in_swanlab(run):
    names = [path.name for path in (run / "swanlog").glob("run-*")]
    assert len(names) == 2 and len({name.rpartition("-")[2] for name in names}) == 1


def steps_in_comet(run):
    names = [path.name for path in (run / "comet_ml").glob("*.zip")]
    assert len(names) == 2 and len({name.partition("-")[0] for name in names}) == 1
    lines = []
    for name in names:
        with zipfile.ZipFile(run / "comet_ml" / name) as file:
            lines += map(json.loads, file.read("messages.json").decode().splitlines())
    assert "my run" in json.dumps(lines)
    metrics = [line["payload"]["metric"] for line in lines if line["type"] == "metric_msg"]
    return [(metric["step"],) for metric in metrics if metric["metricName"] == "loss"]


def steps_in_aim(run):
    assert len(list((run / ".aim" / "meta" / "chunks").iterdir())) == 1
    with sqlite3.connect(run / ".aim" / "run_metadata.sqlite") as database:
        assert database.execute("select name from run").fetchall() == [("my run",)]


def steps_in_dvclive(run):
    lines = (run / "dvclive" / "plots" / "metrics" / "loss.tsv").read_text().splitlines()
    assert (run / "dvc.yaml").is_file()
    return [(int(line.split("\t")[0]),) for line in lines[1:]]


def steps_in_clearml(run):
    (folder,) = [path for path in (run.parent / "home/.clearml/cache/offline").iterdir() if path.is_dir()]
    assert json.loads((folder / "task.json").read_text())["name"] == "my run"
    events = [event for line in (folder / "metrics.jsonl").read_text().splitlines() for event in json.loads(line)]
    return [(event["iter"],) for event in events if event["metric"] == "grad_norm"]


REAL = {
    "aim": ({}, steps_in_aim),
    "clearml": ({"CLEARML_OFFLINE_MODE": "1"}, steps_in_clearml),
    "comet_ml": ({"COMET_START_ONLINE": "false"}, steps_in_comet),
    "dvclive": ({}, steps_in_dvclive),
    "mlflow": ({}, steps_in_mlflow),
    "swanlab": ({"SWANLAB_MODE": "offline"}, steps_in_swanlab),
    "trackio": ({}, steps_in_trackio),
}


@pytest.mark.slow
@pytest.mark.parametrize("tracker", sorted(REAL))
def test_real_tracker_has_one_run_in_the_run_folder(tmp_path, tracker):
    """The last checkpoint is deleted, as if the run had been killed, so that four steps are logged again."""
    if find_spec(tracker) is None:
        pytest.skip(f"pip install {tracker}")
    variables, steps_in = REAL[tracker]
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    env = package_env(HOME=str(tmp_path / "home"), **variables)
    words = ["train", recipe, f"out_dir={run}", f"trackers={tracker}", "project=proj", "run_name=my run"]
    run_python("-m", "nanogpt_accel", *words, env=env, cwd=tmp_path)
    shutil.rmtree(run / "checkpoint-000008")
    run_python("-m", "nanogpt_accel", "train", run, env=env, cwd=tmp_path)
    steps = steps_in(run)
    assert steps is None or sorted(steps) == [(step,) for step in sorted([*range(8), *range(4, 8)])]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "run", "text.txt", "tiny.yaml", "tokens"]
