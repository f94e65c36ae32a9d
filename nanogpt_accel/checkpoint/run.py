"""A run: its folder, and everything that writes to the folder or reports progress during training."""

import traceback
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from ..distributed.launcher import is_main, world_size
from ..distributed.rendezvous import connect
from ..hub.background import BackgroundPush
from ..hub.card import checkpoint_card
from ..hub.transfer import create
from ..recipe import load_recipe
from ..tracking.trackers import Trackers
from ..utils.text import quoted
from .layout import read_trainer
from .mirror import BackgroundMirror, clear_mirror, prepare_mirror
from .run_folder import LOCK, LOCK_HOLDER, best_checkpoint, lock_run, prepare_run_folder
from .save import Saver
from .verify import latest_valid


class Run:
    """Writes the results of a run: run.yaml, metrics.jsonl, samples.jsonl, trackers, checkpoints, pushes to the Hub.

    `with Run(recipe, console) as run:` locks the run folder, so that no other process can train in it. All ranks must
    call `start`, `save` and `finish_pushing`; `start` opens the logs and trackers. The other methods do nothing on
    ranks other than 0. The end of the `with` block closes the logs and trackers and releases the lock.

    Raises:
        ValueError: another process is training in this folder, or the folder cannot be locked.
    """

    def __init__(self, recipe, console, repository=None):
        """repository: Hub repository for the checkpoints (see create_repository); None: do not push."""
        self.recipe, self.console, self.repository = recipe, console, repository
        self.folder = Path(recipe.out_dir)
        self.setup = self.stopper = self.saver = self.trackers = self.pusher = self.mirror = None
        self._lock = self._metrics = self._samples = self._spikes = None

    def __enter__(self):
        self._is_new = not self.folder.exists()
        ranks = connect(self.recipe.train.collective_timeout)
        if not is_main():  # do not look for checkpoints before the main process has prepared the folder
            ranks.wait_for("run folder", 0, "preparing the run folder")
            return self
        with ranks.working("run folder"):
            self._lock = lock_run(self.folder)
            try:
                prepare_mirror(self.recipe, self.console.say)
            except BaseException:
                self._lock.release()
                raise
        return self

    def start(self, setup, data, state, stopper, is_resumed):
        """Write run.yaml, open the logs and trackers, and create the Saver.

        A new run first deletes the files that an earlier run wrote to the folder. A resumed run deletes all log lines
        that were written after the checkpoint from which it resumes.

        setup: the Setup. data: the RunData. state: the TrainState. stopper: the Stopper.
        """
        from ..tracking.metrics_log import MetricsLog, Spikes, read_metrics

        self.setup, self.data, self.stopper, self.recipe = setup, data, stopper, setup.recipe
        recipe, console, accelerator = self.recipe, self.console, setup.accelerator
        self._recipe_to_save = recipe_to_save(recipe, data)
        metrics_path, resume_step = self.folder / "metrics.jsonl", state.step if is_resumed else None
        if is_main():
            if not is_resumed:
                clear_mirror(recipe)
            prepare_run_folder(self.folder, self._recipe_to_save.to_yaml(), is_resumed)
            self._metrics = MetricsLog(metrics_path, resume_step, console.say, keep_evaluation=state.evaluated)
            self._spikes = Spikes(metrics_path)
            if recipe.train.sample_interval:
                self._samples = MetricsLog(self.folder / "samples.jsonl", resume_step, console.say)
            if self.repository is not None:
                self.pusher = BackgroundPush(
                    self.repository, self.folder, console.say, recipe.hub.hub_private, recipe.hub.hub_branch
                )
            if recipe.checkpoint.mirror:
                settings = recipe.checkpoint
                self.mirror = BackgroundMirror(
                    settings.mirror, self.folder, console.say, settings.keep_last, recipe.train.collective_timeout
                )
        accelerator.wait_for_everyone()
        self.saver = Saver(
            self.folder,
            accelerator,
            data.tokenizer,
            recipe.checkpoint.keep_last,
            recipe.checkpoint.async_save,
            console.say,
            on_saved=self._push,
            timeout=recipe.train.collective_timeout,
        )
        name = recipe.tracking.run_name or self.folder.name
        self.trackers = Trackers(
            accelerator, recipe.tracking.project, recipe.flat(), state.step, self.folder, name, console.say
        )
        if is_resumed and is_main():  # log this step's evaluation again, because tensorboard's purge_step removed it
            for line in read_metrics(metrics_path):
                if line["step"] == state.step:
                    self.trackers.log({key: value for key, value in line.items() if key != "step"}, state.step)

    # ---- called by the training loop

    def log_evaluation(self, step, scores):
        """Write the scores of an evaluation, {name: number}, to metrics.jsonl and the trackers."""
        if is_main():
            self._metrics.write(step=step, **scores)
            self.trackers.log(scores, step)

    def log_step(self, step, metrics, seconds, skips=0):
        """Write the metrics of a step to metrics.jsonl, the trackers and the console.

        Args:
            metrics: {name: number}, with "loss" in nats per token. seconds: mean seconds per step since the last call.
            skips: number of steps skipped so far.
        """
        from ..planning.hardware import peak_memory

        if not is_main():
            return
        setup = self.setup
        speed = setup.tokens_per_step / seconds
        values = {**metrics, "tokens_per_second": speed, "peak_memory": peak_memory(setup.accelerator.device)}
        values |= {f"share/{source}": share for source, share in setup.batches.shares(step).items()}
        if self._spikes.is_spike(metrics["loss"]):
            values["spike"] = True
        if skips:
            values["skipped_steps"] = skips
        if setup.peak_flops:
            values["mfu"] = setup.flops_per_token * speed / (setup.peak_flops * setup.accelerator.num_processes)
        self._metrics.write(step=step, **values)
        self.trackers.log(values, step)
        notes = ["spike"] * ("spike" in values) + [f"{skips} steps skipped"] * bool(skips)
        self.console.step(step, metrics["loss"], seconds, speed, values.get("mfu"), notes)

    def log_sample(self, step, text):
        """Write a generated text to samples.jsonl and to the trackers that can display text, on rank 0."""
        if self._samples is not None:
            self._samples.write(step=step, text=text)
            self.trackers.log_text("sample", text, step)

    def save(self, state, optimizer):
        """Save a checkpoint. All ranks must call this."""
        if self._metrics is not None:
            self._metrics.flush()
        accelerator = self.setup.accelerator
        trainer = asdict(state) | {
            "data": self.data.identity,
            "seed": self.recipe.seed,
            "processes": accelerator.num_processes,
            "mixed_precision": accelerator.mixed_precision,
            "optimizer": self.recipe.optimizer.model_dump(include={"algorithm", "options"}),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        }
        card = checkpoint_card(self._recipe_to_save, self.data, trainer, self.setup.num_parameters) if is_main() else ""
        self.saver.save(trainer, self.setup.raw_model, optimizer, card)

    # ---- the end

    def finish_pushing(self, best_step):
        """Wait for pending copies to the mirror and pushes to the Hub. Then push the best checkpoint to the Hub, unless
        the last push contained it. All ranks must call this."""
        if self.mirror is not None:
            self.console.say(f"waiting until {self.folder.name} is copied to {self.mirror.repo}")
            self.mirror.wait()
            is_complete = self.mirror.pushed == best_checkpoint(self.folder, None)
            state = "copied to" if is_complete else "warning: the latest checkpoint is not copied to"
            self.console.say(f"{state} {self.mirror.repo}")
        if self.recipe.checkpoint.mirror:
            # the other ranks wait for rank 0, because a launcher would end it 30 seconds after they exit
            self.setup.accelerator.wait_for_everyone()
        pusher = self.pusher
        if pusher is None:
            return
        self.console.say(f"waiting until {self.folder.name} is pushed to the Hub")
        pusher.wait()
        top = best_checkpoint(self.folder, best_step)
        if top is not None and pusher.pushed != top:
            step = read_trainer(top)["step"]
            pusher.push(top, f"{self.folder.name}, step {step}{', best validation loss' if step == best_step else ''}")
            pusher.wait()
        command = (
            f"nanogpt-accel push {quoted(self.folder)} {pusher.repo} form=custom"
            + " private=true" * pusher.private
            + (f" branch={pusher.branch}" if pusher.branch else "")
        )
        is_pushed = top is not None and pusher.pushed == top
        self.console.say(
            f"pushed to the Hub: {pusher.repo}" if is_pushed else f"not pushed to the Hub; retry with: {command}",
            always=True,
        )

    def _push(self, path):
        """Copy a checkpoint folder to the mirror and to the Hub in the background, if that is enabled."""
        if self.mirror is not None:
            self.mirror.push(path, path.name)
        if self.pusher is not None:
            trainer = read_trainer(path)
            self.pusher.push(path, f"{self.folder.name}, step {trainer['step']}, validation loss {loss_text(trainer)}")

    def __exit__(self, kind, error, trace):
        self.console.stop()
        try:
            if self.saver is not None:
                self.saver.wait()  # finish a background save before the lock is released
        except Exception:
            if kind is None:  # otherwise, report the error that ended the loop
                raise
        finally:
            for log in (self._metrics, self._samples):
                if log is not None:
                    log.close()
            self._end_training(kind, trace)
            if self._lock is not None:
                if self._is_new and self.saver is None:  # the run did not start: delete what it created
                    for name in (LOCK, LOCK_HOLDER):
                        (self.folder / name).unlink(missing_ok=True)
                self._lock.release()
                if self._is_new and self.saver is None:
                    with suppress(OSError):
                        self.folder.rmdir()

    def _end_training(self, kind, trace):
        """Close the trackers and destroy the process group. If this rank failed, and others may still be running, only
        close the trackers."""
        if self.setup is None:
            return
        accelerator = self.setup.accelerator
        if kind is not None and not issubclass(kind, FloatingPointError):
            # other ranks may be waiting for this rank in a collective, and only the end of this process ends it safely
            for tracker in accelerator.trackers:
                with suppress(Exception):
                    tracker.finish()
            return
        # DDP's reducer must not be the last owner of the process group. It would join gloo's threads without releasing
        # the GIL, and a thread that is still freeing the last barrier needs the GIL (a deadlock in 2 of 100 runs)
        traceback.clear_frames(trace)
        self.setup.release()
        self.stopper.close()
        with suppress(Exception):  # errors of trackers
            accelerator.end_training()


def create_repository(recipe):
    """Create the Hub repository for the checkpoints if it does not exist, and return its name. If push_to_hub is false,
    or on ranks other than 0, do nothing and return None.

    Raises:
        PermissionError: the Hub refuses the request, for example because the token has no write access.
    """
    if not recipe.hub.push_to_hub or not is_main():
        return None
    repository = recipe.hub.hub_model_id or Path(recipe.out_dir).name
    try:
        return create(repository, recipe.hub.hub_private, recipe.hub.hub_branch)
    except ConnectionError as error:
        print(f"warning: {error}; the run continues, and every push tries again to reach the Hub")
        return repository


def recipe_to_save(recipe, data):
    """Return the recipe for run.yaml and the model cards.

    data_dir is set to the folders of the data, and `start` of each stage is set to its first step; see
    RunData.pin. If the run is resumed, init_from is copied from the existing run.yaml. overwrite and mix_change are
    false.
    """
    init_from = recipe.model.init_from
    if init_from == "resume":
        with suppress(ValueError, OSError):  # run.yaml is missing or invalid
            init_from = load_recipe(Path(recipe.out_dir) / "run.yaml", {}).model.init_from
    recipe = recipe.model_copy(update={"data": data.pin(recipe.data)})
    return recipe.replace(init_from=init_from, overwrite=False, mix_change=False)


def loss_text(trainer):
    return "not evaluated" if trainer["val_loss"] is None else f"{trainer['val_loss']:.4f} nats per token"


def how_to_resume(out_dir):
    """Return instructions for resuming a run. Callers add them to the end of a message."""
    saved = latest_valid(out_dir, thorough=False)
    if saved is None and not (Path(out_dir) / "run.yaml").is_file():
        return "the run had not started yet; use the same command again"
    out_dir = quoted(out_dir)
    if saved is None:
        return f"no checkpoint was saved yet; start over with: nanogpt-accel train {out_dir} init_from=scratch"
    launched = " (or the same launch command with this folder instead of the recipe)" * (world_size() > 1)
    return f"resume from {saved.name} with: nanogpt-accel train {out_dir}{launched}"
