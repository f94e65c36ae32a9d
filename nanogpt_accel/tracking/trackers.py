"""Log to the experiment trackers of Accelerate (wandb, tensorboard, ...). If a tracker fails, the run continues."""

import secrets
from importlib.util import find_spec

from ..utils.text import first_line

# Accelerate's names of the trackers, which are also their module names
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
TEXT_TRACKERS = ("comet_ml", "tensorboard", "wandb")


def check_trackers(names):
    """Check that Accelerate supports these trackers and that they are installed. Return a list of problems."""
    problems = []
    for name in names:
        if name not in TRACKERS:
            problems.append(f"tracking.trackers={name}: not supported; choose from {', '.join(TRACKERS)}")
        elif find_spec(name) is None:
            problems.append(f"tracking.trackers={name}: not installed; run pip install {name}")
    return problems


class Trackers:
    """Log to the trackers of an Accelerator. If logging fails, print a warning.

    Args:
        project: name of the project in the trackers. config: flat dictionary of the settings.
        first_step: 0 for a new run. If a run is resumed, trackers continue their record of this run at first_step.
        folder: run folder, for trackers that write files. name: name of the run in wandb.
        warn: function that prints a line.

    Raises:
        ValueError: a tracker could not be started.
    """

    def __init__(self, accelerator, project, config, first_step, folder, name, warn=print):
        self.accelerator, self.warn, self._has_warned = accelerator, warn, False
        # tensorboard removes values of earlier runs in this folder that were logged at this step or later: after the
        # checkpoint from which the run resumes, or, in a new run with overwrite=true, all values
        options = {"wandb": {"name": name, "dir": str(folder)}, "tensorboard": {"purge_step": first_step}}
        if accelerator.is_main_process and any(str(tracker) == "wandb" for tracker in accelerator.log_with):
            id_file = folder / ".wandb_id"
            if first_step == 0 or not id_file.is_file():
                id_file.write_text(secrets.token_hex(4), encoding="utf-8")
            options["wandb"] |= {"id": id_file.read_text(encoding="utf-8").strip(), "resume": "allow"}
        try:
            accelerator.init_trackers(project, config=config, init_kwargs=options)
        except Exception as error:  # trackers raise different exceptions
            raise ValueError(
                f"tracking.trackers: cannot start a tracker: {first_line(error)}; if you have no network or no "
                "account, set WANDB_MODE=offline or trackers=tensorboard"
            ) from None

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
