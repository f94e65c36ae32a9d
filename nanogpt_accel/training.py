"""What the loop needs, built from a recipe: data, model, optimizer, precision. `train` and `bench` share it.

Nothing heavy is imported at the top, so that `check_recipe` answers before torch is loaded.
"""

import json
import math
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .batches import Batches, evaluation_batches, model_inputs, seed_of
from .checkpoint.layout import list_checkpoints, read_trainer
from .checkpoint.run_folder import check_lock, check_run_folder, check_writable
from .checkpoint.verify import find_corruption, latest_valid, shape_differences
from .data import dataset
from .data.prepare import ready
from .distributed.accelerator import assert_ranks_agree, make_accelerator
from .distributed.launcher import check_launch, is_main, launcher_requests
from .evaluation import mean_loss, scores
from .hub.transfer import check_push
from .models.find import find_model, may_be_model, nanogpt_hint
from .models.load import check_tokenizer, fit_to_tokenizer, load_model, read_config
from .optim import make_optimizer
from .planning import sizing
from .planning.hardware import device_name, peak_flops
from .recipe import SECTIONS
from .tracking.trackers import check_trackers
from .utils.fields import raise_problems, validate
from .utils.text import duration

# ---- checks before anything slow


def resolve_resume(recipe):
    """Return the recipe, with init_from=resume if resume=auto finds a valid checkpoint."""
    if recipe.checkpoint.resume == "no" or not latest_valid(recipe.out_dir, lambda line: None, thorough=False):
        return recipe
    return recipe.replace(init_from="resume")


def check_recipe(recipe):
    """Return everything that can be known to be wrong before anything slow starts, as a list of problems."""
    recipe = resolve_resume(recipe)
    out_dir, train = Path(recipe.out_dir), recipe.train
    problems = dataset.check(recipe.data, recipe.model.block_size)
    problems += check_launch(train.gradient_accumulation_steps) + check_trackers(recipe.tracking.trackers)
    if train.sample_interval and (launcher_requests("FSDP") or launcher_requests("DEEPSPEED")):
        problems.append(
            f"train.sample_interval={train.sample_interval}: a model that lies in pieces writes no "
            "samples; leave it out with FSDP2 and DeepSpeed"
        )
    if train.on_nonfinite == "skip" and launcher_requests("DEEPSPEED"):
        problems.append(
            "train.on_nonfinite=skip: DeepSpeed makes its step with the backward pass, and leaves none "
            "out; take on_nonfinite=stop, or configs/fsdp2.yaml"
        )
    # while another process trains in the folder, everything else about it may change
    locked = check_lock(out_dir) if is_main() and not train.eval_only else []
    problems += locked or check_out_dir(recipe)
    if not train.eval_only:
        problems += check_writable(out_dir)
    if recipe.hub.push_to_hub:
        problems += check_push(recipe.hub.hub_model_id or out_dir.name, "hub.hub_model_id")
    return problems


def check_out_dir(recipe):
    """Return a list of problems: what the run would resume, overwrite or start from."""
    out_dir, init_from = Path(recipe.out_dir), recipe.model.init_from
    saved, is_new = list_checkpoints(out_dir), not (recipe.overwrite or recipe.train.eval_only)
    latest = latest_valid(out_dir, warn=lambda line: None, thorough=False)
    problems = []
    if init_from == "resume" and latest is None:
        problems.append(
            f"nothing to resume: {'no whole checkpoint' if saved else 'no checkpoint'} in out_dir={out_dir}; to start "
            "over: the same command with init_from=scratch"
        )
    elif init_from == "resume":
        problems += shape_differences(latest, read_config(latest), recipe.shape)
    elif saved and is_new and latest is None:
        problems.append(
            f"out_dir={out_dir} holds a run without a whole checkpoint ({saved[-1].name}: "
            f"{find_corruption(saved[-1])}): replace it with overwrite=true, or take another out_dir"
        )
    elif saved and is_new:
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
    return problems


# ---- data, and what the run starts from


def open_data(recipe, console):
    """Open the token files of a recipe, prepared first if they are missing, and find the model to start from.

    Returns:
        (Dataset, folder of the weights that init_from names). The folder is None for a new model, and for a resumed
        run, which takes its checkpoint once it has the lock of the run folder; see find_checkpoint.

    Raises:
        ValueError: too few tokens, a sample prompt that cannot be encoded, or a model that does not fit the data.
    """
    data = ready(recipe.data, is_main(), console)
    block_size, init_from, source = recipe.model.block_size, recipe.model.init_from, None
    problems = dataset.require_block(data, block_size)
    if recipe.train.sample_tokens:
        problems += data.tokenizer.check_prompt(recipe.train.sample_prompt, block_size, "train.sample_prompt")
    if init_from not in ("scratch", "resume"):
        source = find_model(init_from, console, bars=console.is_verbose)
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
    raise_problems(problems)
    return data, source


def find_checkpoint(recipe, data, console):
    """Return the latest valid checkpoint of a run.

    Raises:
        ValueError: it was trained on other data.
    """
    source = latest_valid(recipe.out_dir, console)
    if read_trainer(source)["data"] != data.identity:
        raise ValueError(
            f"{source} was trained on other data than {data.folder} holds now: set data_dir to the "
            f"folder it began with, or begin a new run with init_from={source} and another out_dir"
        )
    return source


def make_model(recipe, tokenizer, source, on_meta=False):
    """Create a GPT in float32 on the CPU, or load its weights from the folder `source`.

    on_meta: of a new model, create the parameters without values, for a rank that receives those of the main process.
    """
    from .distributed.sharding import init_empty
    from .model import GPT, GPTConfig

    if source is None:
        config = GPTConfig(
            vocab_size=recipe.padded_vocab_size(tokenizer.vocab_size),
            dropout=recipe.model.dropout,
            initializer_range=recipe.model.initializer_range,
            zero_init=recipe.model.zero_init,
            **recipe.shape,
        )
        model = init_empty(lambda: GPT(config)) if on_meta else GPT(config)
    else:
        model = load_model(source, dropout=recipe.model.dropout)
        model.set_block_size(recipe.model.block_size)
    fit_to_tokenizer(model, tokenizer)
    return model


def adopt_shape(recipe, config, source, console):
    """Return the recipe with the shape of the model that it starts from, as run.yaml has to say to be resumable.

    Raises:
        ValueError: a shape that no recipe can have.
    """
    shape = {key: getattr(config, key) for key in recipe.shape}
    ignored = [
        f"{key}={recipe.shape[key]}"
        for key in recipe.model.model_fields_set & shape.keys()
        if recipe.shape[key] != shape[key]
    ]
    if ignored:
        console.say(f"their shape holds, and not the recipe's {', '.join(sorted(ignored))}")
    section, problems, _ = validate(SECTIONS["model"], recipe.model.model_dump() | shape, "model.")
    if problems:
        raise ValueError(f"{source}: no run can have its shape: {'; '.join(problems)}")
    return recipe.model_copy(update={"model": section})


# ---- model, optimizer and precision in Accelerate's hands


@dataclass
class Setup:
    """What a step of training needs; made by `make_setup`."""

    recipe: object
    accelerator: object
    model: object  # as accelerator.prepare returns it; call this one
    raw_model: object  # the GPT inside
    optimizer: object
    batches: Batches
    to_inputs: object  # rows of tokens -> keyword arguments of the model, on their way to the device
    micro_steps: int  # micro-batches of a step on each rank
    num_parameters: int
    cpu_tuning: str  # what was changed to train faster on a CPU, for the log
    summary: str  # of the model, for the log

    @property
    def tokens_per_step(self):
        train = self.recipe.train
        return train.gradient_accumulation_steps * train.batch_size * self.recipe.model.block_size

    @property
    def flops_per_token(self):
        return sizing.flops_per_token(self.raw_model.config.to_dict())

    @property
    def peak_flops(self):
        """FLOP/s of the device, or None if the table of hardware does not have it."""
        return peak_flops(device_name(self.accelerator.device))

    @property
    def is_compiled(self):
        return self.accelerator.state.dynamo_plugin.backend != "NO"

    def micro_batch(self, micro_step):
        """Number of this rank's micro-batch among those of a step on all ranks."""
        return micro_step * self.accelerator.num_processes + self.accelerator.process_index

    def fetch(self, step, micro_step):
        """The model's inputs for this rank's micro-batch, on their way to the device."""
        return self.to_inputs(self.batches(step, self.micro_batch(micro_step)))

    def seed_dropout(self, step, micro_step):
        """Let dropout follow from the micro-batch, not from the rank that computes it or from what was drawn before:
        a resumed run repeats it bit by bit, on any number of ranks."""
        import torch

        torch.manual_seed(seed_of(self.recipe.seed, 0, step, self.micro_batch(micro_step)))

    def release(self):
        """Let go of the model, the optimizer and what Accelerate keeps of them."""
        self.model = self.optimizer = None
        self.accelerator.free_memory()


def is_sharded(accelerator):
    """Return whether weights and optimizer state are split over the ranks."""
    return accelerator.distributed_type in ("FSDP", "DEEPSPEED")


def accelerator_for(recipe):
    """Return the Accelerator of a recipe, see distributed/accelerator.py."""
    train = recipe.train
    return make_accelerator(
        train.device,
        train.mixed_precision,
        train.compile,
        recipe.tracking.trackers,
        logging_dir=recipe.out_dir,
        collective_timeout=train.collective_timeout,
    )


def make_setup(recipe, accelerator, model, tokens, eot_id):
    """Return the Setup of a model: moved to the device, with its optimizer, sharded or wrapped as the launcher says.

    tokens: the training tokens, with rows(starts, length). eot_id: id of the end-of-text token, or None.
    """
    from .distributed import cpu, sharding
    from .muon import check_unsharded

    train = recipe.train
    if train.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    cpu_tuning = ""
    if not is_sharded(accelerator):  # a sharded model is moved shard by shard
        model.to(accelerator.device)
        cpu_tuning = cpu.tune(model, accelerator, train.compile)
    # gradient_accumulation_steps counts micro-batches over all ranks
    micro_steps = train.gradient_accumulation_steps // accelerator.num_processes
    accelerator.gradient_accumulation_steps = micro_steps
    num_parameters, summary = model.num_parameters(), describe_model(model)
    optimizer = make_optimizer(model, recipe.optimizer)
    model, optimizer = sharding.prepare(
        accelerator,
        model,
        optimizer,
        batch_size=train.batch_size,
        micro_steps=micro_steps,
        grad_clip=recipe.optimizer.grad_clip,
    )
    check_unsharded(optimizer)
    return Setup(
        recipe,
        accelerator,
        model,
        accelerator.unwrap_model(model, keep_torch_compile=False),
        optimizer,
        Batches(
            tokens,
            recipe.model.block_size,
            train.batch_size,
            train.gradient_accumulation_steps,
            recipe.seed,
            recipe.data.sampling,
        ),
        partial(model_inputs, device=accelerator.device, eot_id=eot_id if recipe.data.document_mask else None),
        micro_steps,
        num_parameters,
        cpu_tuning,
        summary,
    )


def set_up(recipe, data, source, console):
    """Return the Setup of a run: a new model, or one with the weights of the folder `source`."""
    # torch and transformers take seconds to import, so they wait until everything else is known to be right
    import torch
    from transformers.utils import logging as transformers_logging

    from .distributed import sharding

    transformers_logging.disable_progress_bar()
    accelerator = accelerator_for(recipe)
    assert_ranks_agree(accelerator, recipe=recipe.flat(), data=data.identity, beginning={"source": str(source)})
    torch.manual_seed(recipe.seed)
    sharding.disable_zero3_init(accelerator)
    on_meta = sharding.is_fsdp(accelerator) and not accelerator.is_main_process
    model = make_model(recipe, data.tokenizer, source, on_meta)
    is_resumed = recipe.model.init_from == "resume"
    console.say(
        f"resuming {recipe.out_dir} from {source.name}"
        if is_resumed
        else f"beginning with the weights of {source}"
        if source
        else "beginning with new weights"
    )
    if source is not None and not is_resumed:
        recipe = adopt_shape(recipe, model.config, source, console)
    return make_setup(recipe, accelerator, model, data.train, data.tokenizer.eot_id)


# ---- during the run


def evaluate(setup, data, console):
    """Return the scores of the model, {name: number}: fixed batches of both splits, shared by all ranks."""
    recipe, train_loss = setup.recipe, None
    block_size, batch_size = recipe.model.block_size, recipe.train.batch_size
    val_batches = evaluation_batches(len(data.val), block_size, batch_size, recipe.train.eval_iters)
    train_batches = []
    if recipe.train.eval_train:
        train_batches = evaluation_batches(len(data.train), block_size, batch_size, len(val_batches))
    model, to_inputs, accelerator = setup.model, setup.to_inputs, setup.accelerator
    with console.evaluating(len(val_batches) + len(train_batches)) as progress:
        if train_batches:
            train_loss = mean_loss(model, data.train, train_batches, to_inputs, accelerator, progress)
        val_loss = mean_loss(model, data.val, val_batches, to_inputs, accelerator, progress)
    return scores(val_loss, len(data.val), data.text_bytes("val"), train_loss)


class NonFinite:
    """Decides what a loss or a gradient norm that is NaN or Inf means: the end of the run, or a skipped step.

    on_nonfinite=skip waits for the device at every step. fp16's gradient scaler meets infinities while it searches its
    scale, and skips those steps itself (inside the fused AdamW, so Accelerate does not know).
    """

    def __init__(self, setup, run, tokenizer):
        self.setup, self.run, self.tokenizer = setup, run, tokenizer
        self.accelerator, train = setup.accelerator, setup.recipe.train
        self.may_skip, self.max_skips = train.on_nonfinite == "skip", train.max_skips

    def step_or_skip(self, state, grad_norm):
        """Make the optimizer's step, unless the gradient is not finite and the recipe says to skip such steps.

        Raises:
            FloatingPointError: more than max_skips steps in a row were skipped.
        """
        from .distributed.sharding import as_float

        skips = self.may_skip and not math.isfinite(as_float(grad_norm))
        if self.accelerator.scaler is not None or not skips:
            self.setup.optimizer.step()
        if not self.may_skip:
            return
        skips = skips or self.accelerator.optimizer_step_was_skipped
        state.skips += skips
        state.skips_in_a_row = (state.skips_in_a_row + 1) * skips
        if state.skips_in_a_row > self.max_skips:
            first = state.step - state.skips_in_a_row + 1
            raise self.error(f"steps {first} to {state.step} had no finite gradient", state.step)

    def check(self, step, losses, grad_norm):
        """Return (losses of the steps up to `step`, means over all ranks; the last gradient norm) as floats.

        Raises:
            FloatingPointError: one of them is not finite, and the run does not skip such steps.
        """
        import torch

        from .distributed.sharding import as_float

        losses = self.accelerator.reduce(torch.stack(losses), reduction="mean").tolist()
        grad_norm = as_float(grad_norm)
        if self.may_skip:
            return losses, grad_norm
        for i, loss in enumerate(losses, step - len(losses) + 1):
            if not math.isfinite(loss):
                raise self.error(f"loss of step {i} is {loss}", i)
        scaler = self.accelerator.scaler
        is_scaling = scaler is not None and scaler.get_scale() >= 1  # below 1 it found no scale
        if not (math.isfinite(grad_norm) or is_scaling or self.accelerator.optimizer_step_was_skipped):
            raise self.error(f"gradient norm of step {step} is {grad_norm}", step)
        return losses, grad_norm

    def check_val_loss(self, step, loss):
        """Raise FloatingPointError if a validation loss is not finite."""
        if not math.isfinite(loss):
            raise self.error(f"validation loss after {step} steps is {loss}")

    def error(self, what, step=None):
        """Return the error that ends the run; the batch of `step` is written to the run folder first."""
        self.run.saver.wait()
        out_dir = Path(self.setup.recipe.out_dir)
        if step is not None:
            file = out_dir / f"nonfinite-{step}.json"
            if self.accelerator.is_main_process:
                with suppress(OSError):
                    self.write_batch(file, step)
            what += f" (its batch: {file})"
        saved = latest_valid(out_dir)
        remedy = "no checkpoint was saved yet; begin again with a lower learning_rate"
        if saved:
            remedy = (
                f"the last good checkpoint is {saved}; go on from it with a lower rate: nanogpt-accel train {out_dir} "
                "learning_rate=..."
            )
        return FloatingPointError(f"the {what}: {remedy}")

    def write_batch(self, path, step):
        """Write the global batch of a step: the start of each sequence in the training tokens, and its text."""
        batches, numbers = self.setup.batches, range(self.setup.recipe.train.gradient_accumulation_steps)
        starts = [start for number in numbers for start in batches.starts(step, number).tolist()]
        rows = [row for number in numbers for row in batches(step, number).tolist()]
        sequences = [
            {"start": start, "text": self.tokenizer.decode(row)} for start, row in zip(starts, rows, strict=True)
        ]
        path.write_text(json.dumps({"step": step, "sequences": sequences}, indent=1), encoding="utf-8")


def write_sample(recipe, tokenizer, model, on_text=None):
    """Return the text that the model writes after sample_prompt. on_text: called with each piece of it as it comes.

    It draws from a generator of its own, so the training continues as without it.
    """
    from .models.generation import generate, text_after

    was_training = model.training
    model.eval()
    prompt = tokenizer.encode_prompt(recipe.train.sample_prompt)
    (ids,) = generate(
        model,
        [prompt],
        seeds=[recipe.seed],
        vocab_size=tokenizer.vocab_size,
        max_new_tokens=recipe.train.sample_tokens,
        temperature=0.8,
        top_k=200,
        decode=tokenizer.decode,
        on_text=on_text,
    )
    model.train(was_training)
    return text_after(tokenizer.decode, prompt, ids)


# ---- lines at the start of a run


def describe_model(model):
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


def describe_run(setup, data, first_step, console):
    """Print what is about to happen: model, data, batch, time, device."""
    recipe, accelerator = setup.recipe, setup.accelerator
    train, tokens_per_step, device = recipe.train, setup.tokens_per_step, accelerator.device
    console.say(f"model: {setup.summary}")
    console.say(
        f"data: {data.folder}, {len(data.train):,} training and {len(data.val):,} validation tokens, "
        f"{data.tokenizer.vocab_size:,} symbols"
    )
    if not train.eval_only:
        n_tokens, micro_batches = train.max_iters * tokens_per_step, train.gradient_accumulation_steps
        console.say(
            f"batch: {train.batch_size} sequences of {recipe.model.block_size} tokens x {micro_batches} "
            f"micro-batch{'es' * (micro_batches != 1)} (processes: {accelerator.num_processes}, of each: "
            f"{setup.micro_steps}) = {tokens_per_step:,} tokens a step; {train.max_iters:,} steps are "
            f"{n_tokens:,} tokens, {n_tokens / len(data.train):.2f} epochs"
        )
        if setup.peak_flops:
            flops = max(train.max_iters - first_step, 0) * tokens_per_step * setup.flops_per_token
            seconds = flops / (0.4 * setup.peak_flops * accelerator.num_processes)
            console.say(f"time: {duration(seconds)} if it comes to an MFU of 40%; measured after a few steps")
    details = [
        f"device: {device_name(device)}",
        f"mixed precision {accelerator.mixed_precision}",
        f"attention {setup.raw_model.config._attn_implementation}",
        "compiled" if setup.is_compiled else None,
        setup.cpu_tuning,
        None if setup.peak_flops or device.type == "cpu" else "no MFU: the table has no peak FLOP/s of this device",
    ]
    console.say(", ".join(filter(None, details)))
    if first_step >= train.max_iters and not train.eval_only:
        console.say(f"the run has done its max_iters={train.max_iters} steps; a higher max_iters goes on")
