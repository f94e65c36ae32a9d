"""Experiment trackers (wandb, tensorboard, ...) through Accelerate; their failures never end a run."""

import secrets
from importlib.util import find_spec

# Accelerate's names, which are also the modules that have to be installed
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
TEXT_TRACKERS = ("comet_ml", "tensorboard", "wandb")


def check_trackers(names):
    """Return a list of problems: trackers that Accelerate does not know or that are not installed."""
    problems = []
    for name in names:
        if name not in TRACKERS:
            problems.append(f"tracking.trackers={name}: there are {', '.join(TRACKERS)}")
        elif find_spec(name) is None:
            problems.append(f"tracking.trackers={name}: not installed here, pip install {name}")
    return problems


class Trackers:
    """The Accelerator's trackers of a run, which are left alone where they fail: a run costs more than its plot.

    Args:
        project: the trackers' project. config: flat. first_step: where the run goes on; a resumed one goes on as the
            same run of the tracker. folder: the run folder, where those that write files put them. name: of the run.
        warn: takes a line.

    Raises:
        ValueError: a tracker does not start; the message holds its own reason.
    """

    def __init__(self, accelerator, project, config, first_step, folder, name, warn=print):
        self.accelerator, self.warn, self._is_warned = accelerator, warn, False
        options = {"wandb": {"name": name, "dir": str(folder)}}
        if accelerator.is_main_process and any(str(tracker) == "wandb" for tracker in accelerator.log_with):
            options["wandb"] |= {"id": self._wandb_id(folder, is_new=first_step == 0), "resume": "allow"}
        if first_step:
            options["tensorboard"] = {"purge_step": first_step}  # what a lost part of the run wrote after it
        try:
            accelerator.init_trackers(project, config=config, init_kwargs=options)
        except Exception as error:  # every tracker has errors of its own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"tracking.trackers: one does not start: {reason} (without a network or an account: "
                "WANDB_MODE=offline, or trackers=tensorboard)"
            ) from None

    def log_text(self, name, text, step):
        """For those that show text."""
        for tracker in self.accelerator.trackers:
            if tracker.name in TEXT_TRACKERS:
                self._try(tracker.log, {name: text}, step)

    def log(self, values, step):
        self._try(self.accelerator.log, values, step)

    def _try(self, log, values, step):
        try:
            log(values, step=step)
        except Exception as error:
            if not self._is_warned:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                self.warn(f"warning: a tracker fails ({reason}); the run goes on, and metrics.jsonl has everything")
            self._is_warned = True

    @staticmethod
    def _wandb_id(folder, is_new):
        """The id of the run at wandb, kept in the run folder."""
        file = folder / ".wandb_id"
        if is_new or not file.is_file():
            file.write_text(secrets.token_hex(4), encoding="utf-8")
        return file.read_text(encoding="utf-8").strip()
