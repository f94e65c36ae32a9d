"""Train a GPT from a recipe.

    nanogpt-accel train recipes/quickstart.yaml
    accelerate launch -m nanogpt_accel.train recipes/gpt2.yaml learning_rate=3e-4
    nanogpt-accel train runs/gpt2                # continue from the latest checkpoint of that run

From Python: `from nanogpt_accel.train import train; model, history = train("recipes/quickstart.yaml", max_iters=100)`

Read `training_loop` first: it shows what happens in a run, from start to end. Data order and dropout are functions of
(seed, step), so a checkpoint needs only the weights, the optimizer's state, fp16's gradient scaler and `TrainState`.
training.py builds everything that the loop uses; checkpoint/run.py writes all files of a run.
"""

import math
import sys
import threading
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

from .checkpoint.layout import read_trainer
from .checkpoint.resume import load_optimizer, load_scaler
from .checkpoint.run import Run, create_repository, how_to_resume
from .distributed.launcher import is_main
from .distributed.rendezvous import share_failures
from .distributed.stop import Stopper, StopSignals, lost_process
from .evaluation import describe
from .optim import learning_rate
from .recipe import FIELDS, SETTINGS, Recipe
from .tracking.console import Console
from .tracking.expectation import report_expectation
from .tracking.metrics_log import History, plot_losses, read_metrics
from .training import (
    NonFinite,
    check_out_dir,
    check_recipe,
    data_changes,
    describe_run,
    evaluate,
    find_checkpoint,
    finished_model,
    is_sharded,
    load_target,
    open_data,
    resolve_resume,
    set_up,
    warn_if_precision_changed,
    write_sample,
)
from .utils import cli, startup
from .utils.fields import how_to_override, raise_problems
from .utils.text import quoted

_TRAINING = threading.Lock()  # one training per process


@dataclass
class TrainState:
    """The progress of a run. A checkpoint stores it in state/trainer.json."""

    step: int = 0  # steps done, including skipped ones
    evaluated: bool = False  # whether val_loss was measured at this step
    val_loss: float | None = None  # of the last evaluation, nats per token
    best_step: int | None = None
    best_val_loss: float | None = None
    learning_rate: float | None = None  # of the last step
    skips: int = 0  # steps skipped because their gradient was not finite
    skips_in_a_row: int = 0
    named_scores: dict = field(default_factory=dict)  # {name: score}, last evaluation on validation sets and tasks
    data_changes: list = field(default_factory=list)  # one entry per resume with changed data (mix_change=true)

    @classmethod
    def load(cls, checkpoint):
        trainer = read_trainer(checkpoint)  # the last fields are missing in old checkpoints
        return cls(**{field.name: trainer[field.name] for field in fields(cls) if field.name in trainer})

    def record(self, scores, deciding):
        """Record the scores of this step; return whether the validation loss named `deciding` is the best so far."""
        self.evaluated, self.val_loss = True, scores["val_loss"]
        self.named_scores = {name: score for name, score in scores.items() if "/" in name}
        is_best = self.best_val_loss is None or scores[deciding] < self.best_val_loss
        if is_best:
            self.best_step, self.best_val_loss = self.step, scores[deciding]
        return is_best

    def advance(self, lr):
        """Record that a step with learning rate `lr` is done."""
        self.step, self.evaluated, self.learning_rate = self.step + 1, False, lr


def training_loop(setup, data, run, state, stopper, console):
    """Train until max_iters, or until a signal or max_hours stops the run. Return whether the run was stopped early."""
    import torch

    recipe, accelerator, model, optimizer = setup.recipe, setup.accelerator, setup.model, setup.optimizer
    first_step = state.step  # 0, or the step of the checkpoint that the run resumes from
    last_step = max(first_step, recipe.train.max_iters)
    nonfinite = NonFinite(setup, run, data.tokenizer)
    losses, grad_norm = [], None  # on the device: losses since the last logged step; last gradient norm

    model.train()
    inputs = setup.fetch(first_step, 0)
    for step in range(first_step, last_step + 1):
        is_last = step == last_step
        is_stopping = stopper.all_ranks_agreed() and not is_last

        # evaluate, unless the resumed checkpoint was saved after the evaluation of this step
        is_best = False
        if (is_last or recipe.should_evaluate(step)) and not (state.evaluated or is_stopping):
            scores = evaluate(setup, data, console, step)
            console.say(f"step {step}: {describe(scores)}", always=is_last)
            nonfinite.check_val_loss(step, scores)
            run.log_evaluation(step, scores)
            is_best = state.record(scores, recipe.best_loss)

        # save at a new best validation loss, at the end, and every save_interval steps except while steps are skipped
        is_due = (recipe.should_save(step) and not state.skips_in_a_row) or is_last or is_stopping
        if (is_due and step > first_step) or (is_best and step > 0):  # first_step is 0 or already saved
            if losses:  # the losses since the last logged step are not checked yet
                nonfinite.check(step - 1, losses, grad_norm)
            run.save(state, optimizer)
        if is_last or is_stopping:
            return is_stopping

        # sample
        if recipe.should_sample(step) and is_main():
            with console.optional(f"no sample after {step} steps"):
                text = recipe.train.sample_prompt + write_sample(recipe, data.tokenizer, setup.raw_model)
                console.say(f"sample after {step} steps: {text}")
                run.log_sample(step, text)

        # learning rate
        lr = learning_rate(step, **recipe.lr_schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        # forward and backward over the micro-batches; DDP all-reduces the gradients in the last micro-batch
        if not losses:
            since = time.perf_counter()
        loss = torch.zeros((), device=accelerator.device)
        for micro_step in range(setup.micro_steps):
            with accelerator.accumulate(model):
                setup.seed_dropout(step, micro_step)
                micro_loss = model(**inputs, return_logits=False).loss
                # fetch the inputs of the next micro-batch, or of the next step, while the device works
                inputs = setup.fetch(step, micro_step + 1)
                accelerator.backward(micro_loss)  # divides the loss by the number of micro-steps
                loss += micro_loss.detach() / setup.micro_steps

        # clip and step; with on_nonfinite=skip the CPU waits here for the gradient norm
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), recipe.optimizer.grad_clip or math.inf)
        if not nonfinite.should_skip(grad_norm):
            optimizer.step()
        nonfinite.count_skips(state, grad_norm)  # raises if more than max_skips in a row
        optimizer.zero_grad()
        losses.append(loss)
        state.advance(lr)

        # log: copy the losses from the device, check them, and write the last one with the other metrics
        if recipe.should_log(step):
            loss_values, norm = nonfinite.check(step, losses, grad_norm)
            seconds = (time.perf_counter() - since) / len(losses)
            metrics = {"loss": loss_values[-1], "learning_rate": lr, "grad_norm": norm}
            run.log_step(step, metrics, seconds, state.skips)
            losses = []


def run_training(recipe, signals):
    """Run a recipe: prepare its data, train or evaluate the model, and return the model.

    signals: a StopSignals, which records signals such as SIGTERM.

    Returns:
        The trained GPT. If it is sharded, the main process returns a GPT with the weights of the last checkpoint, and
        the other processes return None.

    Raises:
        ValueError: the recipe cannot run on this machine.
        FloatingPointError: a loss or gradient is not finite; the message names the step and the last checkpoint.
        OSError: the last checkpoint could not be written.
        cli.Stopped: a signal or max_hours ended the run early; the message says how to resume.
    """
    started = time.monotonic()
    console = Console(is_main(), recipe.tracking.quiet)
    if recipe.train.eval_only:
        return evaluate_only(recipe, console)
    repository = create_repository(recipe)
    recipe, data, source = open_data(recipe, console)  # source: folder of the initial weights, or None
    with Run(recipe, console, repository) as run:
        # check again under the lock: another process may have trained in this folder since the first check
        recipe = resolve_resume(recipe)
        raise_problems(check_out_dir(recipe))
        is_resumed = recipe.model.init_from == "resume"
        if is_resumed:
            source = find_checkpoint(recipe, data, console)
        setup = set_up(recipe, data, source, console)
        recipe, state = setup.recipe, TrainState()
        if is_resumed:
            state = TrainState.load(source)
            state.data_changes += data_changes(source, data)
            load_optimizer(source, setup.accelerator, setup.raw_model, setup.optimizer)
            load_scaler(source, setup.accelerator)
            warn_if_schedule_changed(recipe, state, console)
            warn_if_precision_changed(source, setup.accelerator, console)
        stopper = Stopper(setup.accelerator, signals, recipe.train.max_hours, started, recipe.train.collective_timeout)
        run.start(setup, data, state, stopper, is_resumed)
        describe_run(setup, data, state.step, console)
        console.start(state.step, recipe.train.max_iters, recipe.train.eval_interval, setup.is_compiled)
        startup.resume_gc()  # saving leaves models in reference cycles, which only garbage collection frees
        is_stopped = training_loop(setup, data, run, state, stopper, console)
        console.stop()
        run.saver.wait()
        model = finished_model(setup, recipe, console)
        if is_main() and not is_stopped:
            finish(recipe, data, model, run, state, console)
        with console.optional(f"{recipe.out_dir} cannot be pushed to the Hub"):
            run.finish_pushing(state.best_step)
    lost = f", but the last checkpoint could not be written ({run.saver.error})" if run.saver.error else ""
    if is_stopped:
        steps = f"{state.step:,} of {recipe.train.max_iters:,} steps"
        raise cli.Stopped(f"stopped by {stopper.reason} after {steps}{lost}; {how_to_resume(recipe.out_dir)}")
    if lost:
        raise OSError(f"{recipe.out_dir}: training is complete{lost}; {how_to_resume(recipe.out_dir)}")
    return model


def evaluate_only(recipe, console):
    """Evaluate a recipe's model once and return it, without writing any files."""
    recipe, data, source = open_data(recipe, console)
    if recipe.model.init_from == "resume":
        source = find_checkpoint(recipe, data, console)
    setup = set_up(recipe, data, source, console)
    step = TrainState.load(source).step if recipe.model.init_from == "resume" else 0
    describe_run(setup, data, step, console)
    scores = evaluate(setup, data, console, recipe.train.max_iters)
    console.say(f"step {step}: {describe(scores)}", always=True)
    if is_main():
        report_expectation(recipe, scores["val_loss"], scores["val_loss"], console)
    model = None if is_sharded(setup.accelerator) else setup.raw_model
    setup.release()
    setup.accelerator.end_training()
    return model


def warn_if_schedule_changed(recipe, state, console):
    """Warn if a changed schedule makes the learning rate jump at the first step of a resumed run."""
    before, now = state.learning_rate, learning_rate(state.step, **recipe.lr_schedule)
    # an unchanged schedule changes the learning rate by less than 20% per step, except when the rate is small (during
    # the warm-up and at the end of the decay)
    if state.step < recipe.train.max_iters and not math.isclose(
        now, before, rel_tol=0.2, abs_tol=0.05 * recipe.optimizer.learning_rate
    ):
        console.say(
            f"the learning rate changes from {before:.2e} to {now:.2e}, because the schedule was changed "
            "(max_iters, lr_decay_iters or learning_rate)"
        )


def finish(recipe, data, model, run, state, console):
    """After a run, plot the losses, print a sample and commands to try next, and compare the loss with `expect`."""
    with console.optional(f"{run.folder / 'loss.png'} cannot be written"):
        plot_losses(run.folder / "metrics.jsonl", run.folder / "loss.png")
    prompt, folder = recipe.train.sample_prompt, quoted(run.folder)
    if recipe.train.sample_tokens and model is not None:
        with console.optional(f"no sample after {state.step} steps"):
            console.write(f"\nA sample of {recipe.train.sample_tokens} tokens:\n{'-' * 60}\n{prompt}")
            text = write_sample(recipe, data.tokenizer, model, on_text=console.write)
            console.say(f"\n{'-' * 60}")
            run.log_sample(state.step, prompt + text)
    words = [word for word in (prompt.strip(), "The") if not data.tokenizer.check_prompt(word, None, "prompt")]
    console.say(
        f"\nThe run is in {run.folder}: metrics.jsonl, loss.png and checkpoints. To try next:\n"
        f"  nanogpt-accel sample {folder}{' --prompt ' + quoted(words[0]) if words else ''}\n"
        f"  nanogpt-accel evaluate {folder}\n"
        f"  nanogpt-accel train {folder} max_iters={2 * max(recipe.train.max_iters, state.step, 1)}",
        always=True,
    )
    report_expectation(recipe, state.val_loss, state.best_val_loss, console)


# ---- the command and the Python function


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel train RECIPE | RUN_FOLDER [key=value ...]",
            "Train a recipe, or continue a run from its latest checkpoint. `nanogpt-accel recipes` lists all recipes.",
            {"run": Recipe, **SETTINGS},
        )
    target, options = cli.parse(argv, FIELDS)
    if target is None:
        raise ValueError("RECIPE or RUN_FOLDER is missing; usage: nanogpt-accel train quickstart")
    recipe = resolve_resume(load_target(target, options))
    try:
        with StopSignals() as signals:
            run_training(recipe, signals)
    except KeyboardInterrupt:  # Ctrl-C before the loop; in the loop, cli.Stopped is raised
        raise KeyboardInterrupt(how_to_resume(recipe.out_dir)) from None
    except RuntimeError as error:
        if lost := lost_process(error, recipe.train.collective_timeout):
            raise ConnectionError(f"{lost}; {how_to_resume(recipe.out_dir)}") from error
        raise


def train(recipe, **overrides):
    """Train a GPT from a recipe, or continue a run. This is the Python version of the command `nanogpt-accel train`.

    model, history = train("recipes/quickstart.yaml", max_iters=100, out_dir="runs/test")
    model, history = train("runs/test", max_iters=200)  # continue from the latest checkpoint
    history.plot()

    Args:
        recipe: path or name of a recipe, path of a run folder, or a Recipe from load_recipe.
        overrides: settings that replace those of the recipe, as on the command line.

    Returns:
        (model, history): the trained GPT, and a History with all logged lines. history.steps has the lines of training
        steps, and history.evaluations has the lines of evaluations. history.plot() plots the losses.

    Raises:
        ValueError: the recipe has problems; the message has one line per problem.
        Other exceptions: see `run_training`.
    """
    startup.limit_openmp_spinning()
    if not isinstance(recipe, Recipe):
        recipe = load_target(recipe, overrides)
    elif overrides:
        raise ValueError(how_to_override(overrides))
    else:
        raise_problems(check_recipe(recipe))
    if not _TRAINING.acquire(blocking=False):
        raise ValueError(
            "another thread of this process is training, and two runs in one process would share a random number "
            "generator; wait until the other run has finished, or train in another process"
        )
    try:
        # StopSignals without `with` installs no handlers, so signals keep their default action
        model = run_training(resolve_resume(recipe), StopSignals())
    finally:
        _TRAINING.release()
    return model, History(read_metrics(Path(recipe.out_dir) / "metrics.jsonl"))


if __name__ == "__main__":
    sys.exit(cli.run(share_failures(main), sys.argv[1:]))
