"""Experiment trackers (wandb, tensorboard, ...) through Accelerate. If one fails, the run continues."""

import secrets
from importlib.util import find_spec

from ..utils.text import first_line

# Accelerate's names, which are also the names of the modules
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
TEXT_TRACKERS = ("comet_ml", "tensorboard", "wandb")


def check_trackers(names):
    """Return a list of problems: trackers that Accelerate does not support or that are not installed."""
    problems = []
    for name in names:
        if name not in TRACKERS:
            problems.append(f"tracking.trackers={name}: not supported; choose from {', '.join(TRACKERS)}")
        elif find_spec(name) is None:
            problems.append(f"tracking.trackers={name}: not installed; run pip install {name}")
    return problems


class Trackers:
    """The Accelerator's trackers of a run. An error while logging is only a warning.

    Args:
        config: flat dictionary of the settings.
        first_step: above 0, the run is resumed and continues the tracker's run.
        folder: run folder, for trackers that write files.
        warn: function that takes a line.

    Raises:
        ValueError: a tracker cannot be started.
    """

    def __init__(self, accelerator, project, config, first_step, folder, name, warn=print):
        self.accelerator, self.warn, self._has_warned = accelerator, warn, False
        options = {"wandb": {"name": name, "dir": str(folder)}}
        if accelerator.is_main_process and any(str(tracker) == "wandb" for tracker in accelerator.log_with):
            id_file = folder / ".wandb_id"
            if first_step == 0 or not id_file.is_file():
                id_file.write_text(secrets.token_hex(4), encoding="utf-8")
            options["wandb"] |= {"id": id_file.read_text(encoding="utf-8").strip(), "resume": "allow"}
        if first_step:
            options["tensorboard"] = {"purge_step": first_step}  # removes the values logged after the checkpoint
        try:
            accelerator.init_trackers(project, config=config, init_kwargs=options)
        except Exception as error:  # each tracker has its own exceptions
            raise ValueError(
                f"tracking.trackers: cannot start a tracker: {first_line(error)}; without a network or an account, "
                "set WANDB_MODE=offline or trackers=tensorboard"
            ) from None

    def log(self, values, step):
        """Log {name: number}."""
        self._try(self.accelerator.log, values, step)

    def log_text(self, name, text, step):
        """Log a text in the trackers that display texts."""
        for tracker in self.accelerator.trackers:
            if tracker.name in TEXT_TRACKERS:
                self._try(tracker.log, {name: text}, step)

    def _try(self, log, values, step):
        try:
            log(values, step=step)
        except Exception as error:
            if not self._has_warned:
                reason = first_line(error)
                self.warn(f"warning: a tracker failed ({reason}); training continues, metrics.jsonl has all values")
            self._has_warned = True
