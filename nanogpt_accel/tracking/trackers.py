"""Log to the experiment trackers of Accelerate (wandb, tensorboard, ...). If a tracker fails, the run continues."""

import os
import re
import secrets
from contextlib import suppress
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path

from ..utils.files import write_atomically
from ..utils.text import file_name, first_line, quoted

# Accelerate's names of the trackers, which are also their module names
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
TEXT_TRACKERS = ("comet_ml", "tensorboard", "wandb")
# trackers that choose the id of a run themselves -> the attribute that contains the id
ID_OF = {"aim": "hash", "clearml": "id", "mlflow": "info.run_id"}
# what a tracker cannot do
LIMITS = {
    "clearml": "its files are in ClearML's cache folder, not in the run folder",
    "dvclive": "in a DVC repository, each resume creates another experiment, which also contains the earlier steps",
    "mlflow": "if a resumed run changes settings, MLflow still shows the original settings",
}
_MLFLOW_URIS = set()  # the tracking URIs that earlier runs of this process have set
# environment variable for using a tracker without a network or an account
OFFLINE = {
    "clearml": "CLEARML_OFFLINE_MODE=1",
    "comet_ml": "COMET_START_ONLINE=false",
    "swanlab": "SWANLAB_MODE=offline",
    "wandb": "WANDB_MODE=offline",
}


def check_trackers(names, project=""):
    """Check that Accelerate supports these trackers, and that they are installed. Return a list of problems."""
    problems = []
    for name in names:
        if name not in TRACKERS:
            problems.append(f"tracking.trackers={name}: not supported; choose from {', '.join(TRACKERS)}")
        elif find_spec(name) is None:
            problems.append(f"tracking.trackers={name}: not installed; run pip install {name}")
    if "tensorboard" in names and (".." in Path(project).parts or Path(project).is_absolute()):
        problems.append(
            f"tracking.project={project}: is also the name of tensorboard's folder in out_dir; remove / and .. from it"
        )
    return problems


class Trackers:
    """Log to the trackers of an Accelerator. If logging fails, print a warning.

    Args:
        project: name of the project in the trackers. config: flat dictionary of the settings.
        first_step: 0 for a new run. If a run is resumed, each tracker continues its record of the run at first_step.
        folder: run folder, to which trackers write their files if they support that. name: name of the run.
        warn: function that prints a line.

    Raises:
        ValueError: a tracker could not be started.
    """

    def __init__(self, accelerator, project, config, first_step, folder, name, warn=print):
        self.accelerator, self.warn, self._has_warned = accelerator, warn, False
        names, is_main = [str(tracker) for tracker in accelerator.log_with], accelerator.is_main_process
        for tracker in names if is_main else ():
            if tracker in LIMITS:
                warn(f"trackers={tracker}: {LIMITS[tracker]}")
        ids = {tracker: _read_id(folder, tracker) for tracker in names if first_step}
        try:
            options = {
                tracker: _options(tracker, ids.get(tracker), project, first_step, folder.absolute(), name)
                for tracker in (names if is_main else ())
            }
            accelerator.init_trackers(project, init_kwargs=options)
            for tracker in accelerator.trackers:
                if is_main and tracker.name == "aim":
                    tracker.tracker.name = name
                if is_main and tracker.name in ID_OF:
                    _save_id(folder, tracker.name, attrgetter(ID_OF[tracker.name])(tracker.tracker))
                if not (tracker.name == "mlflow" and ids.get("mlflow")):  # MLflow rejects changed parameters
                    tracker.store_init_configuration(config)
        except Exception as error:  # trackers raise different exceptions
            offline = [OFFLINE[tracker] for tracker in names if tracker in OFFLINE]
            fix = f"if you have no network or no account, set {' or '.join([*offline, 'trackers=tensorboard'])}"
            if saved := [quoted(folder / f".{tracker}_id") for tracker in ids if ids[tracker]]:
                fix += f"; if the tracker does not have the run any more, delete {', '.join(saved)}"
            raise ValueError(f"tracking.trackers: cannot start a tracker: {first_line(error)}; {fix}") from None

    def log(self, values, step):
        """Log a dictionary {name: number}."""
        self._try(self.accelerator.log, values, step)

    def log_text(self, name, text, step):
        """Log a text to the trackers that support text."""
        for tracker in self.accelerator.trackers:
            if tracker.name in TEXT_TRACKERS:
                self._try(tracker.log, {name: text}, step)

    def _try(self, log, values, step):
        try:
            log(values, step=step)
        except Exception as error:
            if not self._has_warned:
                reason = first_line(error)
                self.warn(f"warning: a tracker failed ({reason}); training continues, and metrics.jsonl has all values")
            self._has_warned = True


def _read_id(folder, tracker):
    """Return the id of this run in a tracker, if an earlier process saved it in the run folder; otherwise None."""
    with suppress(OSError, ValueError):
        text = (folder / f".{tracker}_id").read_text(encoding="utf-8").strip()
        return text if re.fullmatch(r"[\w-]{1,100}", text) else None


def _save_id(folder, tracker, run_id):
    write_atomically(folder / f".{tracker}_id", run_id)
    return run_id


def _options(tracker, run_id, project, first_step, folder, name):
    """Return the keyword arguments for Accelerate's tracker class, which passes some of them to a function such as
    wandb.init.

    run_id: the id of the run to continue, or None to start a new run.
    """
    is_resumed = first_step > 0
    if tracker in ("comet_ml", "swanlab", "wandb"):  # these trackers accept any id for a new run
        run_id = run_id or _save_id(folder, tracker, secrets.token_hex(16))
    match tracker:
        case "tensorboard":
            # remove the existing values of this step and later steps. In a resumed run, these are the values after its
            # checkpoint; in a new run with overwrite=true, all values of the previous run
            return {"purge_step": first_step}
        case "wandb":
            is_disabled = os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on")  # as in Trainer
            options = {"name": name, "dir": str(folder), "id": run_id, "resume": "allow"}
            return options | ({"mode": "disabled"} if is_disabled else {})
        case "swanlab":
            return {"name": name, "log_dir": str(folder / "swanlog"), "id": run_id, "resume": "allow"}
        case "comet_ml":
            from comet_ml import ExperimentConfig

            config = ExperimentConfig(name=name, offline_directory=str(folder / "comet_ml"))
            return {"experiment_key": run_id, "experiment_config": config}
        case "trackio":  # continues the last run with this name; reads TRACKIO_DIR when trackio is imported
            os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))
            return {"name": name, "resume": "allow" if is_resumed else "never"}
        case "aim":  # Accelerate sets aim's repository to the run folder
            return {"experiment": project} | ({"run_hash": run_id, "force_resume": True} if run_id else {})
        case "mlflow":
            return _mlflow_options(run_id, folder, name)
        case "clearml":  # continue_last_task=0: continue the task, and do not add an offset to the step numbers
            task = {"reuse_last_task_id": run_id, "continue_last_task": 0} if run_id else {"reuse_last_task_id": False}
            return {"task_name": os.environ.get("CLEARML_TASK", name)} | task
        case "dvclive":  # DVC uses the name of the experiment as a git reference
            options = {"dir": str(folder / "dvclive"), "dvcyaml": str(folder / "dvc.yaml"), "exp_name": file_name(name)}
            return options | {"resume": is_resumed}


def _mlflow_options(run_id, folder, name):
    """Return the arguments of MLflow. MLflow writes to a database in the run folder, unless the user has set a URI."""
    import mlflow

    has_own_uri = not mlflow.is_tracking_uri_set() or mlflow.get_tracking_uri() in _MLFLOW_URIS
    if "MLFLOW_TRACKING_URI" not in os.environ and has_own_uri:
        _MLFLOW_URIS.add(uri := f"sqlite:///{folder / 'mlflow.db'}")
        mlflow.set_tracking_uri(uri)
    return {"run_id": run_id} if run_id else {"run_name": name}
