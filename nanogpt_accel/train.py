"""Train a GPT from a recipe.

    nanogpt-accel train recipes/quickstart.yaml
    accelerate launch -m nanogpt_accel.train recipes/gpt2.yaml learning_rate=3e-4
    nanogpt-accel train runs/gpt2                # goes on from the newest checkpoint of that run

`main` does what is cheap, so that a mistake is answered before torch is imported: it reads the recipe, checks
it, and prepares the data. `train` is the loop, top to bottom in the order in which things happen.
"""

import gc
import json
import math
import sys
import threading
import time
import types
from contextlib import suppress
from functools import partial
from pathlib import Path

from .checkpoint.layout import checkpoint_path, list_checkpoints, read_trainer
from .checkpoint.resume import load_optimizer
from .checkpoint.run_folder import check_lock, check_run_folder, lock_run, prepare_run_folder
from .checkpoint.save import Saver
from .checkpoint.verify import find_corruption, latest_valid, shape_differences
from .data import dataset
from .data.prepare import ready
from .distributed.accelerator import assert_ranks_agree, make_accelerator
from .distributed.launcher import check_launch, is_main, launcher_requests, world_size
from .distributed.stop import StopConsensus, StopSignals, lost_process
from .hub.background import BackgroundPush
from .hub.card import model_card
from .hub.transfer import check_push, create
from .models.find import find_model, may_be_model, nanogpt_hint
from .models.load import check_tokenizer, fit_to_tokenizer, load_model, read_config
from .recipe import FIELDS, SECTIONS, SETTINGS, Recipe, load_recipe
from .tracking.console import Console
from .tracking.trackers import Trackers, check_trackers
from .utils import cli
from .utils.fields import validate
from .utils.files import check_writable
from .utils.text import duration


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel train RECIPE.yaml | RUN_FOLDER [key=value ...]",
            "Train a recipe, or continue a run folder from its newest checkpoint.",
            {"run": Recipe, **SETTINGS},
        )
    target, options = cli.parse(argv, FIELDS)
    if target is None:
        raise ValueError("what to train? nanogpt-accel train RECIPE.yaml, such as recipes/quickstart.yaml")
    if Path(target).is_dir():
        if not (Path(target) / "run.yaml").is_file():
            raise ValueError(f"{target}: no run.yaml in this folder, so it is no run; give a recipe or a run folder")
        if "out_dir" in options:
            raise ValueError(
                f"out_dir={options['out_dir']}: the run goes on in {target}; for another folder begin a "
                f"new run with init_from={target}"
            )
        options = {"init_from": "resume", "resume": "no", **options, "out_dir": target}
        target = Path(target) / "run.yaml"
    recipe = resolve_resume(load_recipe(target, options, check=check))
    try:
        with StopSignals() as signals:
            train(recipe, signals)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_go_on(recipe.out_dir)) from None
    except RuntimeError as error:
        if reason := lost_process(error):
            raise ConnectionError(
                f"another process of this run is gone or did not answer within collective_timeout="
                f"{recipe.train.collective_timeout:g} s ({reason}): "
                f"{how_to_go_on(recipe.out_dir)}"
            ) from error
        raise


def resolve_resume(recipe):
    """The recipe with init_from=resume where resume=auto finds a whole checkpoint."""
    if recipe.checkpoint.resume == "no" or not latest_valid(recipe.out_dir, lambda line: None, thorough=False):
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"init_from": "resume"})})


def how_to_go_on(out_dir):
    saved = latest_valid(out_dir, thorough=False)
    if saved is None:
        return f"no checkpoint was saved yet; to begin again: nanogpt-accel train {out_dir} init_from=scratch"
    launched = world_size() > 1
    return f"go on from {saved.name} with: nanogpt-accel train {out_dir}" + (
        " (or the same launch, with this folder in the recipe's place)" if launched else ""
    )


def check(recipe):
    """Everything that can be known to be wrong before anything slow: a list of problems."""
    recipe = resolve_resume(recipe)
    problems = dataset.check(recipe.data, recipe.model.block_size)
    problems += check_launch(recipe.train.gradient_accumulation_steps) + check_trackers(recipe.tracking.trackers)
    if recipe.train.sample_interval and (launcher_requests("FSDP") or launcher_requests("DEEPSPEED")):
        problems.append(
            f"train.sample_interval={recipe.train.sample_interval}: a model that lies in pieces writes no "
            "samples; leave it out with FSDP2 and DeepSpeed"
        )
    if recipe.train.on_nonfinite == "skip" and launcher_requests("DEEPSPEED"):
        problems.append(
            "train.on_nonfinite=skip: DeepSpeed makes its step with the backward pass, and leaves none "
            "out; take on_nonfinite=stop, or configs/fsdp2.yaml"
        )
    out_dir, init_from = Path(recipe.out_dir), recipe.model.init_from
    saved, may_begin = list_checkpoints(out_dir), recipe.overwrite or recipe.train.eval_only
    held = check_lock(out_dir) if is_main() and not recipe.train.eval_only else []
    if held:  # all else may change while that run goes on
        problems += held
    elif init_from == "resume":
        newest = latest_valid(out_dir, warn=lambda line: None, thorough=False)
        if newest is None:
            what = "no whole checkpoint" if saved else "no checkpoint"
            problems.append(
                f"nothing to resume: {what} in out_dir={out_dir}; to start over: the same command with "
                "init_from=scratch"
            )
        else:
            problems += shape_differences(newest, read_config(newest), recipe.shape)
    elif saved and not may_begin and not latest_valid(out_dir, warn=lambda line: None, thorough=False):
        problems.append(
            f"out_dir={out_dir} holds a run without a whole checkpoint ({saved[-1].name}: "
            f"{find_corruption(saved[-1])}): replace it with overwrite=true, or take another out_dir"
        )
    elif saved and not may_begin:
        problems.append(
            f"out_dir={out_dir} already holds a run ({saved[-1].name}): go on with `nanogpt-accel train "
            f"{out_dir}`, replace it with overwrite=true, or take another out_dir"
        )
    elif not saved and not recipe.train.eval_only:
        problems += check_run_folder(out_dir)
    if init_from not in ("scratch", "resume") and not may_be_model(init_from):
        problems.append(
            f"model.init_from={init_from}: "
            + (nanogpt_hint(init_from) or "neither scratch, resume, a folder that exists, nor a Hub id")
        )
    if recipe.overwrite and out_dir.resolve() in (Path(init_from).resolve(), Path(init_from).resolve().parent):
        problems.append(
            f"model.init_from={init_from}: lies in out_dir={out_dir}, which overwrite=true clears; take another out_dir"
        )
    if not recipe.train.eval_only:
        problems += check_writable(out_dir)
    if recipe.hub.push_to_hub:
        problems += check_push(recipe.hub.hub_model_id or out_dir.name, "hub.hub_model_id")
    return problems


def open_data(recipe, console):
    """The recipe's token files, prepared where they are missing, after the checks that need the tokens.

    Returns:
        (dataset, source): source is the folder whose weights the run begins with, None for a new model.
    """
    data = ready(recipe.data, is_main(), console)
    block_size, init_from = recipe.model.block_size, recipe.model.init_from
    problems = dataset.require_block(data, block_size)
    if recipe.train.sample_tokens:
        problems += data.tokenizer.check_prompt(recipe.train.sample_prompt, block_size, "train.sample_prompt")
    source = None
    if init_from == "resume":
        source = latest_valid(recipe.out_dir, console)
        if read_trainer(source)["data"] != data.identity:
            problems.append(
                f"{source} was trained on other data than {data.folder} holds now: set data_dir to the "
                f"folder it began with, or begin a new run with init_from={source} and another out_dir"
            )
    elif init_from != "scratch":
        source = find_model(init_from, console, bars=console.is_heard)
        config = read_config(source)
        problems += dataset.require_tokenizer(data, source, key=f"model.init_from={init_from}") or check_tokenizer(
            data.tokenizer, config, source
        )
        longest = config["block_size"]
        if config["position"] == "learned" and block_size > longest:
            problems.append(
                f"model.block_size={block_size}: {source} reads at most {longest} tokens; "
                f"set block_size={longest} or less"
            )
    if problems:
        raise ValueError("\n".join(problems))
    return data, source


def train(recipe, signals=None):
    """Run a recipe to its end.

    signals: a launch.StopSignals; None: signals do what they always do.

    Returns:
        The trained GPT; of a sharded run on the main process alone, from its last checkpoint.

    Raises:
        ValueError: something in the recipe cannot be done here.
        FloatingPointError: the loss is no longer a number; the message names the step and the last checkpoint.
        OSError: the last checkpoint could not be written.
        cli.Stopped: a signal or max_hours ended it early; the message says how it goes on.
    """
    began = time.monotonic()
    signals = signals or StopSignals()
    console = Console(is_main(), recipe.tracking.quiet)
    repository = ask_hub(recipe)
    data, source = open_data(recipe, console)
    out_dir, is_resumed = Path(recipe.out_dir), recipe.model.init_from == "resume"

    # torch and transformers take seconds to import, so they wait until everything else is known to be right
    import torch
    from transformers.utils import logging as transformers_logging

    from .batches import Batches, evaluation_batches, model_inputs, seed_of
    from .distributed import cpu, sharding
    from .evaluation import describe, mean_loss, scores
    from .optim import check_unsharded, learning_rate, make_optimizer
    from .planning.hardware import device_name, peak_flops, peak_memory
    from .planning.sizing import flops_per_token
    from .tracking.metrics_log import MetricsLog, Spikes, read_metrics

    transformers_logging.disable_progress_bar()
    accelerator = make_accelerator(
        recipe.train.device,
        recipe.train.mixed_precision,
        recipe.train.compile,
        recipe.tracking.trackers,
        logging_dir=recipe.out_dir,
        collective_timeout=recipe.train.collective_timeout,
    )
    assert_ranks_agree(accelerator, recipe=recipe.flat(), data=data.identity, beginning={"source": str(source)})
    device, on_main = accelerator.device, accelerator.is_main_process

    # model: new, or with the weights of a checkpoint
    torch.manual_seed(recipe.seed)
    sharding.disable_zero3_init(accelerator)
    model = make_model(recipe, data.tokenizer, source, is_hollow=sharding.is_fsdp(accelerator) and not on_main)
    console.say(
        f"resuming {out_dir} from {source.name}"
        if is_resumed
        else f"beginning with the weights of {source}"
        if source
        else "beginning with new weights"
    )
    if source is not None and not is_resumed:  # the shape is the source's; run.yaml has to say so, or nothing resumes
        shape = {key: getattr(model.config, key) for key in recipe.shape}
        unheeded = [
            f"{key}={recipe.shape[key]}"
            for key in recipe.model.model_fields_set & shape.keys()
            if recipe.shape[key] != shape[key]
        ]
        if unheeded:
            console.say(f"their shape holds, and not the recipe's {', '.join(sorted(unheeded))}")
        section, problems, _ = validate(SECTIONS["model"], recipe.model.model_dump() | shape, "model.")
        if problems:
            raise ValueError(f"{source}: no run can have its shape: {'; '.join(problems)}")
        recipe = recipe.model_copy(update={"model": section})
    if recipe.train.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    is_sharded = sharding.is_fsdp(accelerator) or sharding.is_deepspeed(accelerator)
    tuned = ""
    if not is_sharded:  # which moves it piece by piece
        model.to(device)
        tuned = cpu.tune(model, accelerator, recipe.train.compile)

    # batch arithmetic: gradient_accumulation_steps counts micro-batches over all processes
    batch_size, block_size = recipe.train.batch_size, recipe.model.block_size
    micro_batches = recipe.train.gradient_accumulation_steps
    micro_steps = micro_batches // accelerator.num_processes
    accelerator.gradient_accumulation_steps = micro_steps
    tokens_per_step = micro_batches * batch_size * block_size
    max_iters = recipe.train.max_iters

    # data: the training stream, and the fixed batches of the evaluations
    batches = Batches(data.train, block_size, batch_size, micro_batches, recipe.seed, recipe.data.sampling)
    val_batches = evaluation_batches(len(data.val), block_size, batch_size, recipe.train.eval_iters)
    train_batches = evaluation_batches(len(data.train), block_size, batch_size, len(val_batches))
    to_inputs = partial(
        model_inputs, device=device, eot_id=data.tokenizer.eot_id if recipe.data.document_mask else None
    )

    # optimizer, and everything into Accelerate's hands
    optimizer = make_optimizer(
        model,
        learning_rate=recipe.optimizer.learning_rate,
        weight_decay=recipe.optimizer.weight_decay,
        beta1=recipe.optimizer.beta1,
        beta2=recipe.optimizer.beta2,
        algorithm=recipe.optimizer.algorithm,
        muon_learning_rate=recipe.optimizer.muon_learning_rate,
        muon_momentum=recipe.optimizer.muon_momentum,
        muon_weight_decay=recipe.optimizer.muon_weight_decay,
    )
    summary = model_summary(model)
    token_flops = flops_per_token(
        num_matmul_params(model), model.config.n_layer, model.config.n_head * model.config.head_dim, block_size
    )
    peak = peak_flops(device_name(device))
    model, optimizer = sharding.prepare(
        accelerator,
        model,
        optimizer,
        batch_size=batch_size,
        micro_steps=micro_steps,
        grad_clip=recipe.optimizer.grad_clip,
    )
    check_unsharded(optimizer)
    raw_model = accelerator.unwrap_model(model, keep_torch_compile=False)
    is_compiled = accelerator.state.dynamo_plugin.backend != "NO"

    # where the run stands
    first_step, best_val_loss, best_step, val_loss, lr, skips, skips_in_a_row = 0, math.inf, None, None, None, 0, 0
    if is_resumed:
        load_optimizer(source, accelerator, raw_model, optimizer)
        trainer = read_trainer(source)
        first_step, val_loss, best_step, lr = (
            trainer[key] for key in ("step", "val_loss", "best_step", "learning_rate")
        )
        best_val_loss = math.inf if best_step is None else trainer["best_val_loss"]
        skips, skips_in_a_row = trainer["skips"], trainer["skips_in_a_row"]
        if accelerator.scaler is not None and trainer["scaler"] is not None:
            accelerator.scaler.load_state_dict(trainer["scaler"])

    # the run folder
    record = as_it_ran(recipe, data)
    log = samples = pusher = lock = None
    if not recipe.train.eval_only:
        if on_main:
            lock = lock_run(out_dir)
            prepare_run_folder(out_dir, record.to_yaml(), is_resumed)
            log = MetricsLog(
                out_dir / "metrics.jsonl", resume_step=first_step if is_resumed else None, warn=console.say
            )
            if recipe.train.sample_interval:
                samples = MetricsLog(
                    out_dir / "samples.jsonl", resume_step=first_step if is_resumed else None, warn=console.say
                )
            if repository is not None:
                pusher = BackgroundPush(repository, out_dir, console.say, recipe.hub.hub_private, recipe.hub.hub_branch)
        accelerator.wait_for_everyone()
        saver = Saver(
            out_dir,
            accelerator,
            data.tokenizer,
            recipe.checkpoint.keep_last,
            recipe.checkpoint.async_save,
            console.say,
            on_saved=partial(push, pusher, out_dir),
        )
        trackers = Trackers(
            accelerator,
            recipe.tracking.project,
            recipe.flat(),
            first_step,
            out_dir,
            name=recipe.tracking.run_name or out_dir.name,
            warn=console.say,
        )
        if is_resumed and on_main:  # tensorboard's purge took the evaluation of that step along
            for line in read_metrics(out_dir / "metrics.jsonl"):
                if line["step"] == first_step:
                    trackers.log({key: value for key, value in line.items() if key != "step"}, first_step)

    console.say(f"model: {summary}")
    console.say(
        f"data: {data.folder}, {len(data.train):,} training and {len(data.val):,} validation tokens, "
        f"{data.tokenizer.vocab_size:,} symbols"
    )
    if not recipe.train.eval_only:
        console.say(
            f"batch: {batch_size} sequences of {block_size} tokens x {micro_batches} "
            f"micro-batch{'es' * (micro_batches != 1)} (processes: {accelerator.num_processes}, of each: "
            f"{micro_steps}) = {tokens_per_step:,} tokens a step; {max_iters:,} steps are "
            f"{max_iters * tokens_per_step:,} tokens, "
            f"{max_iters * tokens_per_step / len(data.train):.2f} epochs"
        )
        if peak:
            seconds = (
                max(max_iters - first_step, 0)
                * tokens_per_step
                * token_flops
                / (0.4 * peak * accelerator.num_processes)
            )
            console.say(f"time: {duration(seconds)} if it comes to an MFU of 40%; measured after a few steps")
    console.say(
        ", ".join(
            filter(
                None,
                (
                    f"device: {device_name(device)}",
                    f"mixed precision {accelerator.mixed_precision}",
                    f"attention {raw_model.config._attn_implementation}",
                    "compiled" if is_compiled else None,
                    tuned,
                    None if peak or device.type == "cpu" else "no MFU: the table has no peak FLOP/s of this device",
                ),
            )
        )
    )

    def fetch(step, micro_step):
        """The model's inputs for this process's micro-batch, on their way to the device."""
        return to_inputs(batches(step, micro_step * accelerator.num_processes + accelerator.process_index))

    def save(step):
        """A checkpoint after `step` steps; all processes take part."""
        trainer = {
            "step": step,
            "evaluated": evaluates or is_evaluated,
            "val_loss": val_loss,
            "best_step": best_step,
            "best_val_loss": None if best_step is None else best_val_loss,
            "data": data.identity,
            "learning_rate": lr,
            "seed": recipe.seed,
            "processes": accelerator.num_processes,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
            "skips": skips,
            "skips_in_a_row": skips_in_a_row,
        }
        if log is not None:
            log.flush()
        saver.save(trainer, raw_model, optimizer, checkpoint_card(record, data, trainer))

    def settle(step, losses):
        """Losses of the steps up to `step` as floats, means of all processes; one that is no number ends the run."""
        losses = accelerator.reduce(torch.stack(losses), reduction="mean").tolist()
        bad = [i for i, value in enumerate(losses) if not math.isfinite(value)]
        if bad and not may_skip:
            bad_step = step - len(losses) + 1 + bad[0]
            raise came_apart(bad_step, f"loss of step {bad_step} is {losses[bad[0]]}")
        return losses

    def came_apart(step, what):
        """The error that ends a run whose numbers went wrong; the batch of `step` is kept for a look."""
        saver.wait()
        kept = out_dir / f"nonfinite-{step}.json"
        if step is not None and on_main:
            with suppress(OSError):
                keep_batch(kept, step, batches, micro_batches, data.tokenizer)
        return FloatingPointError(stopped_by(what + (f" (its batch: {kept})" if step is not None else ""), out_dir))

    if first_step >= max_iters and not recipe.train.eval_only:
        console.say(f"the run has done its max_iters={max_iters} steps; a higher max_iters goes on")
    console.start(first_step, max_iters, recipe.train.eval_interval, is_compiled)
    gc.set_threshold(
        *cli.GC_THRESHOLD
    )  # what was imported is there, and a checkpoint leaves a copy of the model in a cycle
    agreement, signals.armed = StopConsensus(accelerator, recipe.train.collective_timeout), True
    model.train()
    inputs = fetch(first_step, 0)
    may_skip = recipe.train.on_nonfinite == "skip"
    spikes = Spikes(out_dir / "metrics.jsonl")
    losses, interval_start, is_stopped, last_step = [], time.perf_counter(), False, max(first_step, max_iters)
    for step in range(first_step, last_step + 1):
        is_end = step == last_step

        # a signal or max_hours ends the run on all processes after the same step
        hours = (time.monotonic() - began) / 3600
        if hours > (recipe.train.max_hours or math.inf):
            signals.received = signals.received or f"max_hours={recipe.train.max_hours:g}"
        is_stopped = agreement.any(signals.received) and not is_end

        # evaluate, and save checkpoints: the best one and the last ones. A resumed step has been saved, and evaluated
        # too unless it was stopped
        is_first_resumed = is_resumed and step == first_step and not recipe.train.eval_only
        is_evaluated = is_first_resumed and trainer["evaluated"]
        is_due = step % recipe.train.eval_interval == 0 and (step > 0 or recipe.train.eval_first)
        evaluates = (is_due or is_end or recipe.train.eval_only) and not (is_evaluated or is_stopped)
        saves = step > 0 and (step % recipe.save_interval == 0 or is_end or is_stopped) and not is_first_resumed
        if evaluates:
            train_loss = None
            with console.evaluating(len(val_batches) + len(train_batches) * recipe.train.eval_train) as progress:
                if recipe.train.eval_train:
                    train_loss = mean_loss(model, data.train, train_batches, to_inputs, accelerator, progress)
                val_loss = mean_loss(model, data.val, val_batches, to_inputs, accelerator, progress)
            found = scores(val_loss, len(data.val), data.text_bytes("val"), train_loss)
            console.say(f"step {step}: " + describe(found), always=is_end or recipe.train.eval_only)
            if recipe.train.eval_only:
                break
            if not math.isfinite(val_loss):
                raise came_apart(None, f"validation loss after {step} steps is {val_loss}")
            if log is not None:
                log.write(step=step, **found)
            trackers.log(found, step)
            if val_loss < best_val_loss:
                best_val_loss, best_step = val_loss, step
                saves = step > 0  # the best one is saved whatever save_interval says
        if saves:
            if losses:  # (after a step that was not logged)
                settle(step - 1, losses)
            save(step)

        # a sample while the run goes on; the last one is written when it is done. What a sample draws is its own, and
        # no step takes up what was drawn before it
        writes_sample = (
            step > 0 and step % (recipe.train.sample_interval or math.inf) == 0 and not (is_end or is_stopped)
        )
        if writes_sample and on_main:
            text = write_sample(recipe, data, raw_model)
            console.say(f"sample after {step} steps: {recipe.train.sample_prompt}{text}")
            keep_sample(samples, trackers, step, recipe.train.sample_prompt + text)
        if evaluates or saves or writes_sample:
            interval_start = time.perf_counter()  # the log tells the speed of training alone
        if is_end or is_stopped:
            break

        # the learning rate of this step
        lr = learning_rate(
            step,
            schedule=recipe.optimizer.schedule,
            learning_rate=recipe.optimizer.learning_rate,
            warmup_iters=recipe.optimizer.warmup_iters,
            lr_decay_iters=recipe.lr_decay_iters,
            min_lr=recipe.min_lr,
            decay_fraction=recipe.optimizer.decay_fraction,
        )
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if (
            is_resumed
            and step == first_step
            and not math.isclose(
                lr, trainer["learning_rate"], rel_tol=0.2, abs_tol=0.05 * recipe.optimizer.learning_rate
            )
        ):
            console.say(
                f"the learning rate goes on with {lr:.2e} after {trainer['learning_rate']:.2e}: the schedule "
                "is another one now (max_iters, lr_decay_iters, learning_rate)"
            )

        # forward and backward over the micro-batches; gradients are exchanged with the last one
        loss = torch.zeros((), device=device)
        for micro_step in range(micro_steps):
            with accelerator.accumulate(model):
                # dropout follows from the micro-batch, not from the process that happens to compute it, nor from what
                # was drawn before: so a resumed run repeats it to the last bit, on any number of processes
                torch.manual_seed(
                    seed_of(recipe.seed, 0, step, micro_step * accelerator.num_processes + accelerator.process_index)
                )
                micro_loss = model(**inputs, return_logits=False).loss
                # fetch the next batch while the device is at work on this one
                inputs = fetch(step, micro_step + 1) if micro_step + 1 < micro_steps else fetch(step + 1, 0)
                accelerator.backward(micro_loss)  # divides by the number of micro-steps
                loss += micro_loss.detach() / micro_steps
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), recipe.optimizer.grad_clip or math.inf)
        # on_nonfinite=skip waits for the device at every step. fp16's scaler meets infinities on its way, and leaves
        # those steps out by itself (inside of the fused AdamW, so that Accelerate does not know)
        is_skipped = may_skip and not math.isfinite(sharding.as_float(grad_norm))
        if accelerator.scaler is not None or not is_skipped:
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        if may_skip:
            is_skipped = is_skipped or accelerator.optimizer_step_was_skipped
            skips, skips_in_a_row = skips + is_skipped, (skips_in_a_row + 1) * is_skipped
            if skips_in_a_row > recipe.train.max_skips:
                raise came_apart(step, f"steps {step - skips_in_a_row + 1} to {step} had no finite gradient")

        # log; the only place where the processor waits for the device. The last step before an evaluation or a
        # checkpoint is always logged, so that no checkpoint is written of a model that has come apart
        is_before_save = (step + 1) % recipe.train.eval_interval == 0 or (step + 1) % recipe.save_interval == 0
        if step % recipe.train.log_interval == 0 or is_before_save or step + 1 == max_iters:
            losses, grad_norm = settle(step, losses), sharding.as_float(grad_norm)
            seconds = (time.perf_counter() - interval_start) / len(losses)
            is_scaling = accelerator.scaler is not None and accelerator.scaler.get_scale() >= 1  # or it found no scale
            if not (math.isfinite(grad_norm) or may_skip or is_scaling or accelerator.optimizer_step_was_skipped):
                raise came_apart(step, f"gradient norm of step {step} is {grad_norm}")
            values = {
                "loss": losses[-1],
                "learning_rate": lr,
                "grad_norm": grad_norm,
                "tokens_per_second": tokens_per_step / seconds,
                "peak_memory": peak_memory(device),
            }
            if spikes.is_one(losses[-1]):
                values["spike"] = True
            if skips:
                values["skipped_steps"] = skips
            if peak:
                values["mfu"] = token_flops * tokens_per_step / seconds / (peak * accelerator.num_processes)
            if log is not None:
                log.write(step=step, **values)
            trackers.log(values, step)
            notes = ["spike"] * ("spike" in values) + [f"{skips} steps left out"] * bool(skips)
            console.step(step, values["loss"], seconds, values["tokens_per_second"], values.get("mfu"), notes)
            losses, interval_start = [], time.perf_counter()

    console.stop()
    if not recipe.train.eval_only:
        saver.wait()
    if is_sharded:  # the model is whole in its checkpoint alone
        saved = latest_valid(out_dir) if on_main and not recipe.train.eval_only else None
        raw_model = load_model(saved).to(device) if saved else None
    if on_main and recipe.train.eval_only:
        hold_to_expectation(recipe, val_loss, val_loss, console)
    elif on_main:
        log.close()
        if not is_stopped:
            text = finish(recipe, data, raw_model, console)
            if samples is not None:
                keep_sample(samples, trackers, step, recipe.train.sample_prompt + text)
                samples.close()
            hold_to_expectation(recipe, val_loss, None if best_step is None else best_val_loss, console)
        if pusher is not None:
            finish_pushing(pusher, out_dir, best_step, console)
    # DDP's reducer must not be the last to hold the process group: it joins gloo's threads while it holds Python's
    # lock, and a thread that still frees the last barrier waits for that lock, for ever in 2 runs of 100
    del model
    accelerator.free_memory()
    agreement.close()
    with suppress(Exception):  # trackers that cannot say goodbye
        accelerator.end_training()
    if lock is not None:
        lock.release()
    if is_stopped:
        raise cli.Stopped(
            f"stopped by {signals.received or 'a signal to another process'} after {step:,} of "
            f"{max_iters:,} steps; {how_to_go_on(out_dir)}"
        )
    if not recipe.train.eval_only and saver.trouble:
        raise OSError(
            f"{out_dir}: all steps are done, but the last checkpoint could not be written ({saver.trouble}); "
            f"{how_to_go_on(out_dir)}"
        )
    return raw_model


def make_model(recipe, tokenizer, source, is_hollow=False):
    """A GPT in float32 on the CPU: a new one, or the one whose weights the folder `source` holds. is_hollow: of a new
    one the shape alone, for a process that is sent the weights of the main one."""
    from .distributed.sharding import init_empty
    from .model import GPT, GPTConfig

    if source is None:
        multiple = recipe.model.pad_vocab_to_multiple_of
        config = GPTConfig(
            vocab_size=-(-tokenizer.vocab_size // multiple) * multiple,
            dropout=recipe.model.dropout,
            initializer_range=recipe.model.initializer_range,
            zero_init=recipe.model.zero_init,
            **recipe.shape,
        )
        model = init_empty(lambda: GPT(config)) if is_hollow else GPT(config)
    else:
        model = load_model(source, dropout=recipe.model.dropout)
        model.set_block_size(recipe.model.block_size)
    fit_to_tokenizer(model, tokenizer)
    return model


def as_it_ran(recipe, data):
    """The recipe for run.yaml and the model cards. It names the folder of the tokens, so that the run goes on with
    these whatever becomes of the text, and what the run began with; it does not ask to overwrite the run it is in."""
    section, began = recipe.data.model_copy(update={"data_dir": data.folder.as_posix()}), recipe.model.init_from
    if began == "resume":
        with suppress(ValueError, OSError):  # a run.yaml that somebody has broken
            began = load_recipe(Path(recipe.out_dir) / "run.yaml", {}).model.init_from
    model = recipe.model.model_copy(update={"init_from": began})
    return recipe.model_copy(update={"data": section, "model": model, "overwrite": False})


def num_matmul_params(model):
    """Number of parameters that multiply something for each token: all but those of embeddings that are only read."""
    read = [model.transformer.wpe] + ([] if model.config.tie_word_embeddings else [model.transformer.wte])
    return model.num_parameters() - sum(table.weight.numel() for table in read if table is not None)


def model_summary(model):
    from .planning import sizing

    config = model.config
    parts = ", ".join(f"{part} {n:,}" for part, n in sizing.parameters(config.to_dict()).items() if n)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return (
        f"{model.num_parameters():,} parameters ({parts}), {config.n_layer} layers of {config.n_head} "
        f"heads, {config.n_embd} wide, {config.vocab_size:,} rows of vocabulary; weight decay on {len(decayed)} "
        f"tensors with {sum(p.numel() for p in decayed):,}, none on {len(others)} with "
        f"{sum(p.numel() for p in others):,}"
    )


def stopped_by(what, out_dir):
    """The message of a run whose numbers went wrong."""
    saved = latest_valid(out_dir)
    remedy = (
        f"the last good checkpoint is {saved}; go on from it with a lower rate: nanogpt-accel train {out_dir} "
        "learning_rate=..."
        if saved
        else "no checkpoint was saved yet; begin again with a lower learning_rate"
    )
    return f"the {what}: {remedy}"


def keep_batch(path, step, batches, micro_batches, tokenizer):
    """Write down the global batch of a step: where each sequence begins in the training tokens, and its text."""
    starts = [start for micro_batch in range(micro_batches) for start in batches.starts(step, micro_batch).tolist()]
    rows = [row for micro_batch in range(micro_batches) for row in batches(step, micro_batch).tolist()]
    sequences = [{"start": start, "text": tokenizer.decode(row)} for start, row in zip(starts, rows, strict=True)]
    path.write_text(json.dumps({"step": step, "sequences": sequences}, indent=1), encoding="utf-8")


def write_sample(recipe, data, model, on_text=None):
    """The text that the model writes after sample_prompt; the model trains on as it did. on_text: takes the pieces."""
    from .models.generation import generate, text_after

    train, decode = recipe.train, data.tokenizer.decode
    was_training = model.training
    model.eval()
    prompt = data.tokenizer.encode_prompt(train.sample_prompt)
    (ids,) = generate(
        model,
        [prompt],
        seeds=[recipe.seed],
        vocab_size=data.tokenizer.vocab_size,
        max_new_tokens=train.sample_tokens,
        temperature=0.8,
        top_k=200,
        decode=decode,
        on_text=on_text,
    )
    model.train(was_training)
    return text_after(decode, prompt, ids)


def keep_sample(samples, trackers, step, text):
    """Write a sample into samples.jsonl, and to the trackers that show text."""
    samples.write(step=step, text=text)
    trackers.log_text("sample", text, step)


def hold_to_expectation(recipe, last, best, console):
    """Say how a run's validation loss compares with what the recipe expects, and keep it in expect.json.

    last, best: nats a token; None where there was no evaluation.
    """
    from . import evaluation

    expect, max_iters = recipe.expect, recipe.train.max_iters
    got = best if expect.evaluation == "best" else last
    if expect.val_loss is None or got is None:
        return
    steps, verdict, where = max_iters if expect.steps is None else expect.steps, None, ""
    if expect.changed:
        where = f" with the recipe unchanged (here other: {', '.join(expect.changed)})"
    elif steps != max_iters and not recipe.train.eval_only:
        where = f" after {steps:,} steps (here {max_iters:,})"
    elif expect.tolerance is not None:
        verdict = evaluation.verdict(got, expect.val_loss, expect.tolerance)
    expected = f"{expect.val_loss:.3f}" + (f" +- {expect.tolerance:g}" if expect.tolerance is not None else "")
    source = f" ({expect.source})" if expect.source else ""
    console.say(f"expected {expected}{source}{where}, got {got:.3f}" + (f": {verdict}" if verdict else ""), always=True)
    if not recipe.train.eval_only:
        found = {
            "expected": expect.val_loss,
            "tolerance": expect.tolerance,
            "evaluation": expect.evaluation,
            "got": got,
            "step": max_iters,
            "verdict": verdict,
            "changed": expect.changed,
            "source": expect.source,
        }
        with suppress(OSError):
            (Path(recipe.out_dir) / "expect.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def finish(recipe, data, model, console):
    """What a finished run shows: the plot, a sample, and what to try next. Returns the sample's text, empty without."""
    from .tracking.metrics_log import plot_losses

    out_dir = Path(recipe.out_dir)
    try:
        plot_losses(out_dir / "metrics.jsonl", out_dir / "loss.png")
    except OSError as error:
        console.say(f"warning: {out_dir / 'loss.png'} cannot be written ({error})")
    text = ""
    if recipe.train.sample_tokens and model is not None:
        console.say(f"\nA sample of {recipe.train.sample_tokens} tokens:\n{'-' * 60}")
        console.write(recipe.train.sample_prompt)
        model.eval()
        text = write_sample(recipe, data, model, on_text=console.write)
        console.say(f"\n{'-' * 60}")
    prompt = json.dumps(recipe.train.sample_prompt.strip() or "The", ensure_ascii=False)
    console.say(
        f"\nThe run is in {out_dir}: metrics.jsonl, loss.png and checkpoints. To try next:\n"
        f"  nanogpt-accel sample {out_dir} --prompt {prompt}\n"
        f"  nanogpt-accel evaluate {out_dir}\n"
        f"  nanogpt-accel train {out_dir} max_iters={2 * recipe.train.max_iters}",
        always=True,
    )
    return text


def ask_hub(recipe):
    """The repository that the checkpoints go to, made where it is missing; None where the recipe asks for no push, and
    on all processes but the main one.

    Raises:
        PermissionError: the Hub does not let this token push there.
    """
    wanted = recipe.hub
    if not wanted.push_to_hub or recipe.train.eval_only or not is_main():
        return None
    repository = wanted.hub_model_id or Path(recipe.out_dir).name
    try:
        return create(repository, wanted.hub_private, wanted.hub_branch)
    except ConnectionError as error:
        print(f"warning: {error}; the run goes on, and every checkpoint tries again")
        return repository


def checkpoint_card(recipe, data, trainer):
    """The README.md of a checkpoint."""
    return model_card(
        Path(recipe.out_dir).name,
        f"A GPT trained with nanogpt_accel on the corpus `{data.manifest['corpus']['name']}`, tokenizer "
        f"`{data.tokenizer.kind}`.\nCheckpoint after {trainer['step']:,} steps; validation loss: {loss_of(trainer)}. "
        f"It reads {recipe.model.block_size:,} tokens.",
        needs_code=True,
        more=f"The recipe, where it differs from the defaults:\n\n```yaml\n{recipe.to_yaml(brief=True)}```\n",
    )


def loss_of(trainer):
    return "not evaluated" if trainer["val_loss"] is None else f"{trainer['val_loss']:.4f} nats a token"


def push(pusher, out_dir, path):
    """Send a checkpoint on its way to the Hub, where the recipe asks for it."""
    if pusher is not None:
        trainer = read_trainer(path)
        pusher.push(path, f"{out_dir.name}, step {trainer['step']}, validation loss {loss_of(trainer)}")


def finish_pushing(pusher, out_dir, best_step, console):
    """Wait for what is on its way; the best checkpoint is what stays on top."""
    console.say(f"waiting for the Hub to take {out_dir.name}")
    pusher.wait()
    best = None if best_step is None else checkpoint_path(out_dir, best_step)
    top = best if best is not None and best.exists() else list_checkpoints(out_dir)[-1]
    if pusher.pushed != top:
        step = read_trainer(top)["step"]
        pusher.push(top, f"{out_dir.name}, step {step}{', the best one' if top == best else ''}")
        pusher.wait()
    command = (
        f"nanogpt-accel push {out_dir} {pusher.repo} form=custom"
        + " private=true" * pusher.private
        + (f" branch={pusher.branch}" if pusher.branch else "")
    )
    console.say(
        f"the Hub has it: {pusher.repo}" if pusher.pushed == top else f"the Hub has not got it: {command}", always=True
    )


_AT_WORK = threading.Lock()


class _Callable(types.ModuleType):
    """Lets `from nanogpt_accel import train` give what a notebook wants to call, and not only this module."""

    def __call__(self, recipe, **overrides):
        """Run a recipe from Python.

        recipe: the path of one, with overrides such as max_iters=100; or a Recipe as load_recipe makes it.

        Returns:
            (model, history): the trained GPT, and the objects of metrics.jsonl, one for each logged step and
            evaluation.

        Raises:
            ValueError: one line for each thing that is wrong; and what `train` raises.
        """
        from .tracking.metrics_log import read_metrics

        if not isinstance(recipe, Recipe):
            recipe = load_recipe(recipe, overrides, check)
        elif problems := check(recipe):
            raise ValueError("\n".join(problems))
        if not _AT_WORK.acquire(blocking=False):
            raise ValueError(
                "another thread of this process is training, and the two would share their random "
                "numbers: wait for it, or train in a process of its own"
            )
        try:
            model = train(resolve_resume(recipe))
        finally:
            _AT_WORK.release()
        return model, read_metrics(Path(recipe.out_dir) / "metrics.jsonl")


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
