"""Build the data, the model and the optimizer of a recipe, for the commands `train` and `bench`.

torch and transformers are not imported at the top, so that `check_recipe` reports mistakes in a recipe quickly.
"""

import functools
import inspect
import json
import math
from contextlib import suppress
from functools import partial
from pathlib import Path

from .batches import Batches, Mixture, evaluation_batches, model_inputs, seed_of
from .checkpoint.layout import list_checkpoints, read_trainer
from .checkpoint.mirror import check_mirror
from .checkpoint.run_folder import check_lock, check_run_folder, check_writable
from .checkpoint.verify import find_corruption, latest_valid, shape_differences
from .data import dataset, run_data
from .distributed.accelerator import environment, make_accelerator
from .distributed.launcher import check_launch, is_main, launcher_requests, world_size
from .distributed.rendezvous import assert_ranks_agree, connect
from .evaluation import mean_loss, scores
from .hub.transfer import check_push
from .models.find import find_model, may_be_model, nanogpt_hint
from .models.load import check_tokenizer, fit_to_tokenizer, load_model, read_config
from .models.tasks import check_tasks, load_tasks, task_scores
from .optim import OPTIMIZERS, make_optimizer, optimizer_class
from .planning import sizing
from .planning.hardware import device_name, peak_flops
from .recipe import SECTIONS, load_recipe
from .tracking.trackers import check_trackers
from .utils.fields import raise_problems, show_value, validate
from .utils.files import write_atomically
from .utils.nested import pack
from .utils.packaged import packaged
from .utils.text import duration, first_line, quoted

# ---- checks before anything slow


def load_target(target, options):
    """Return the Recipe for the target of the `train` command.

    target: the path or name of a recipe, or the folder of a run to resume. options: {key: value or text} that replace
    settings of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there are problems; the message has one line per problem.
    """
    if (Path(target) / "run.yaml").is_file():
        if "out_dir" in options:
            raise ValueError(
                f"out_dir={options['out_dir']}: a resumed run stays in {target}; to write to another folder, start a "
                f"new run with init_from={quoted(target)}"
            )
        # init_from=resume fails if there is no checkpoint; with resume=auto in run.yaml, the run would start over
        options = {"init_from": "resume", "resume": "no", **options, "out_dir": str(target)}
        target = Path(target) / "run.yaml"
    return load_recipe(target, options, check=check_recipe)


def resolve_resume(recipe):
    """Return the recipe. If it has resume=auto and out_dir contains a valid checkpoint, set init_from=resume."""
    if recipe.checkpoint.resume == "no" or not latest_valid(recipe.out_dir, lambda line: None, thorough=False):
        return recipe
    return recipe.replace(init_from="resume")


def check_recipe(recipe):
    """Check everything that can be checked before anything slow starts. Return a list of problems."""
    recipe = resolve_resume(recipe)
    out_dir, train = Path(recipe.out_dir), recipe.train
    problems = run_data.check(recipe.data, recipe.model.block_size)
    problems += check_launch(train.gradient_accumulation_steps)
    problems += check_trackers(recipe.tracking.trackers, recipe.tracking.project)
    problems += check_tasks(train.tasks, train.tasks_dir, "train.") if train.tasks else []
    if launcher_requests("FSDP") or launcher_requests("DEEPSPEED"):
        unsupported = {"sample_interval": "sampling during training", "tasks": "evaluation on tasks during training"}
        problems += [
            f"train.{key}={show_value(getattr(train, key))}: {what} is not supported for sharded models; remove {key}, "
            "or launch without FSDP2 and DeepSpeed"
            for key, what in unsupported.items()
            if getattr(train, key)
        ]
    if train.on_nonfinite == "skip" and launcher_requests("DEEPSPEED"):
        problems.append(
            "train.on_nonfinite=skip: not supported with DeepSpeed, which updates the weights in the backward pass; "
            f"set on_nonfinite=stop, or launch with {packaged('configs/fsdp2.yaml')}"
        )
    problems += check_optimizer(recipe.optimizer)
    # if another process trains in out_dir, do not check the contents of the folder, because they still change
    locked = check_lock(out_dir) if is_main() and not train.eval_only else []
    problems += locked or check_out_dir(recipe)
    if not train.eval_only:
        problems += check_writable(out_dir)
        problems += check_mirror(recipe) if is_main() and not problems else []
    if recipe.hub.push_to_hub:
        problems += check_push(recipe.hub.hub_model_id or out_dir.name, "hub.hub_model_id")
    return problems


def check_optimizer(settings):
    """Check that the launcher supports the optimizer. If `algorithm` is an optimizer class, also try it with its
    options on a small model. Return all problems. settings: the optimizer section of a recipe."""
    algorithm = f"optimizer.algorithm={settings.algorithm}"
    if settings.algorithm != "adamw" and launcher_requests("DEEPSPEED"):
        fix = f"set algorithm=adamw, or launch with {packaged('configs/fsdp2.yaml')}"
        return [f"{algorithm}: not supported with DeepSpeed; {fix}"]
    if settings.algorithm in OPTIMIZERS:
        return []
    try:
        found = optimizer_class(settings.algorithm)
    except ValueError as error:
        return [str(error)]
    import torch

    from .distributed import sharding

    options = f"optimizer.options={show_value(settings.options)}"
    if given := sorted({"lr", "weight_decay"} & settings.options.keys()):
        return [f"{options}: remove {' and '.join(given)}; use the keys learning_rate and weight_decay instead"]
    closure = inspect.signature(found.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        return [f"{algorithm}: step() needs a closure, which is not supported; choose another optimizer"]
    if hasattr(found, "eval"):  # schedule-free optimizers
        return [f"{algorithm}: needs calls to train() and eval(), which are not supported; choose another optimizer"]
    model, states = torch.nn.Linear(3, 2), []
    try:
        optimizer = make_optimizer(model, settings)
    except Exception as error:  # an optimizer class may raise any exception for invalid options
        if settings.options:
            return [f"{options}: {settings.algorithm} does not accept them: {first_line(error)}"]
        fix = "set its required arguments in optimizer.options"
        return [f"{algorithm}: cannot be created with only parameter groups and lr: {first_line(error)}; {fix}"]
    if settings.weight_decay and "weight_decay" not in optimizer.defaults:
        key = f"optimizer.weight_decay={settings.weight_decay:g}"
        return [f"{key}: {settings.algorithm} does not support it; set weight_decay=0"]
    try:
        before = _attributes(optimizer)
        _take_step(model, optimizer)
        if changed := [key for key, value in _attributes(optimizer).items() if value != before.get(key)]:
            problem = f"a step changes {', '.join(changed)}, which checkpoints do not store, so resume is not exact"
            return [f"{algorithm}: {problem}; choose another optimizer"]
        for p, fields in optimizer.state.items():
            states.append((p.shape, {}))
            pack(fields, "its state", states[-1][1])
        sharding.changed_values(optimizer)
    except Exception as error:
        return [f"{algorithm}: with {options}, a step fails, or its state cannot be saved: {first_line(error)}"]
    is_like = all(x.shape in ((), shape) for shape, tensors in states for x in tensors.values())
    if launcher_requests("FSDP") and not is_like:
        problem = "not supported with FSDP2, because its state does not have the shape of the parameters"
        return [f"{algorithm}: {problem}; launch with {packaged('configs/multi_gpu.yaml')}"]
    return []


def _take_step(model, optimizer):
    """Make one optimizer step in which every gradient is 1."""
    import torch

    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()


def _attributes(optimizer):
    """Return {name: value as text} for the attributes of an optimizer that checkpoints do not store.

    Other attributes than numbers, lists, dicts and tensors are left out.
    """
    import torch

    values = {key: vars(optimizer)[key] for key in vars(optimizer).keys() - {"state", "param_groups", "defaults"}}
    kinds = int, float, list, dict, torch.Tensor
    return {key: repr(value) for key, value in values.items() if isinstance(value, kinds)}


def _state_names(settings):
    """Return the names of the values that an optimizer class stores per parameter. If the class fails, return None."""
    import torch

    model = torch.nn.Linear(3, 2)
    with suppress(Exception):  # check_optimizer reports the problem
        optimizer = make_optimizer(model, settings)
        _take_step(model, optimizer)
        return {name for state in optimizer.state.values() for name in state}


def check_saved_optimizer(checkpoint, settings):
    """Check that an optimizer can continue with the state in a checkpoint. Return a list of problems.

    settings: the optimizer section of the recipe.
    """
    before = read_trainer(checkpoint).get("optimizer")
    with suppress(OSError, ValueError):  # earlier versions of this package stored these settings only in run.yaml
        before = before or load_recipe(checkpoint.parent / "run.yaml").optimizer.model_dump()
    for key in ("algorithm", "options") if before else ():
        value, now = before[key], getattr(settings, key)
        is_same = value == now
        if key == "options" and not is_same:  # options may change if the optimizer stores the same values as before
            is_same = _state_names(settings) in (None, _state_names(settings.model_copy(update={key: value})))
        if not is_same:
            saved = show_value(value)
            fix = f"set {key}={saved}, or start a new run with init_from={quoted(checkpoint)} and another out_dir"
            problem = f"{checkpoint} contains the optimizer state of {key}={saved}; {fix}"
            return [f"optimizer.{key}={show_value(now)}: {problem}"]
    return []


def check_out_dir(recipe):
    """Check that the run can resume, overwrite or start in out_dir, and that init_from exists. Return all problems."""
    out_dir, init_from = Path(recipe.out_dir), recipe.model.init_from
    saved, is_new = list_checkpoints(out_dir), not (recipe.overwrite or recipe.train.eval_only)
    latest = latest_valid(out_dir, warn=lambda line: None, thorough=False)
    problems = []
    if init_from == "resume" and latest is None:
        problems.append(
            f"out_dir={out_dir}: nothing to resume, because there is no {'valid ' * bool(saved)}checkpoint in this "
            "folder; to start over, set init_from=scratch"
        )
    elif init_from == "resume":
        problems += shape_differences(latest, read_config(latest), recipe.shape)
        problems += check_saved_optimizer(latest, recipe.optimizer)
    elif saved and is_new and latest is None:
        problems.append(
            f"out_dir={out_dir}: contains a run without a valid checkpoint ({saved[-1].name}: "
            f"{find_corruption(saved[-1])}); overwrite it with overwrite=true, or set out_dir to another folder"
        )
    elif saved and is_new:
        problems.append(
            f"out_dir={out_dir}: already contains a run ({saved[-1].name}); continue it with `nanogpt-accel train "
            f"{quoted(out_dir)}`, overwrite it with overwrite=true, or set out_dir to another folder"
        )
    if not recipe.train.eval_only and (not saved or (out_dir / "run.yaml").is_file()):
        problems += check_run_folder(out_dir)
    is_model = init_from not in ("scratch", "resume")
    if is_model and not may_be_model(init_from):
        problems.append(
            f"model.init_from={init_from}: "
            + (nanogpt_hint(init_from) or "must be scratch, resume, an existing folder or a Hub id")
        )
    if recipe.overwrite and is_model and out_dir.resolve() in Path(init_from, "_").resolve().parents[:2]:
        problems.append(
            f"model.init_from={init_from}: is in out_dir={out_dir}, which overwrite=true deletes; change out_dir"
        )
    return problems


# ---- data and initial weights


def check_ranks(recipe):
    """Connect to the other ranks. Raise ValueError if the machines do not share out_dir, or if the ranks have different
    recipes, devices or software."""
    if world_size() == 1:
        return
    timeout = recipe.train.collective_timeout
    ranks = connect(timeout)
    if blind := [] if recipe.train.eval_only else ranks.find_blind(recipe.out_dir):
        raise ValueError(
            f"out_dir={recipe.out_dir}: {ranks.describe(blind)} cannot see the files that {ranks.describe([0])} writes "
            "there; set out_dir to a folder on a disk that all machines share"
        )
    assert_ranks_agree(
        timeout,
        environment=environment(recipe.train.device, recipe.train.mixed_precision),
        recipe=recipe.flat(),
    )


def open_data(recipe, console):
    """Prepare the data of a recipe if necessary, open them, and find the model to start from.

    Returns:
        (recipe, data, source). recipe: the recipe, in which find_sample_prompt may have replaced sample_prompt. data: a
        RunData. source: the folder of the initial weights, or None for a new model. For a resumed run, source is also
        None, because find_checkpoint selects the checkpoint after the run folder is locked.

    Raises:
        ValueError: too few tokens, a sample prompt that cannot be encoded, or a model that does not fit the data.
    """
    check_ranks(recipe)
    block_size, init_from, source = recipe.model.block_size, recipe.model.init_from, None
    if recipe.train.tasks:  # before the data are prepared, because the dataset of a task may be unavailable
        console.say(f"loading lm-eval and its tasks {', '.join(recipe.train.tasks)}")
        run_tasks(tuple(recipe.train.tasks), recipe.train.tasks_dir)
    data = run_data.open_run_data(recipe, block_size, console)
    problems = run_data.require_blocks(recipe.data, data, block_size)
    if recipe.train.sample_tokens:
        recipe, prompt_problems = find_sample_prompt(recipe, data.tokenizer, console)
        problems += prompt_problems
    if init_from not in ("scratch", "resume"):
        source = find_model(init_from, console, bars=console.is_verbose)
        config = read_config(source)
        problems += dataset.require_tokenizer(data.main, source, key=f"model.init_from={init_from}") or check_tokenizer(
            data.tokenizer, config, source
        )
        longest = config["block_size"]
        if config["position"] == "learned" and block_size > longest:
            problems.append(
                f"model.block_size={block_size}: the context length of {source} is {longest}; "
                f"set block_size={longest} or less"
            )
    raise_problems(problems)
    return recipe, data, source


def find_sample_prompt(recipe, tokenizer, console):
    """Return (recipe, list of problems). Replace a sample_prompt that the tokenizer cannot encode with the default
    prompt of the `sample` command. Keep a prompt from the command line, or from a recipe file whose data are used."""
    prompt, block_size = recipe.train.sample_prompt, recipe.model.block_size
    problems = tokenizer.check_prompt(prompt, block_size, "train.sample_prompt")
    default = tokenizer.default_prompt()
    if not problems or "sample_prompt" in recipe.train.model_fields_set or default == prompt:
        return recipe, [f"{problem}, or set sample_tokens=0 for no samples" for problem in problems]
    console.say(f"{problems[0].partition(';')[0]}; using sample_prompt={default!r} instead")
    return recipe.replace(sample_prompt=default), tokenizer.check_prompt(default, block_size, "train.sample_prompt")


@functools.cache  # a run uses the same tasks in every evaluation
def run_tasks(names, tasks_dir):
    """Return the lm-eval tasks of a run. names: tuple of the setting train.tasks."""
    return load_tasks(names, tasks_dir, section="train.")


def find_checkpoint(recipe, data, console):
    """Return the latest valid checkpoint of a run.

    Raises:
        ValueError: no checkpoint is valid, or the latest valid checkpoint was trained on different data.
    """
    source = latest_valid(recipe.out_dir, console)
    if source is None:  # check_out_dir has only compared file sizes; this call of latest_valid also compared hashes
        raise ValueError(f"out_dir={recipe.out_dir}: all checkpoints are corrupted; to start over, set overwrite=true")
    before, now = read_trainer(source)["data"], data.identity
    if before == now:
        return source
    if before["tokenizer"] == now["tokenizer"] and recipe.checkpoint.mix_change:
        console.say(f"mix_change=true: the data differ from those of {source}: {run_data.differences(before, now)}")
        return source
    fix = f"start a new run with init_from={quoted(source)} and another out_dir"
    if before["tokenizer"] == now["tokenizer"]:
        fix += ", or set mix_change=true to continue with the changed data"
    if "sources" in now:
        raise ValueError(
            f"{source}: trained on different data: {run_data.differences(before, now)}; {fix}. Changing an "
            "earlier mix also changes the order of the tokens; to avoid this, add a stage that starts at a later step"
        )
    raise ValueError(
        f"{source}: trained on different data than those in {data.main.folder}; set data_dir to the folder with its "
        f"training data, or {fix}"
    )


def data_changes(source, data):
    """Return a list of new entries for TrainState.data_changes.

    If `data`, a RunData, differ from the data of the checkpoint `source`, the list has one entry with the step and the
    data of the checkpoint. Otherwise, it is empty.
    """
    trainer = read_trainer(source)
    return [] if trainer["data"] == data.identity else [{"step": trainer["step"], "data_before": trainer["data"]}]


def warn_if_precision_changed(source, accelerator, console):
    """Warn if the checkpoint `source` was trained in another precision, for example on a CPU without bfloat16."""
    now, before = accelerator.mixed_precision, read_trainer(source).get("mixed_precision")  # None: an older checkpoint
    if before not in (None, now):
        console.say(
            f"the precision changes: the run was trained with mixed_precision={before}, and continues with "
            f"mixed_precision={now}; to continue with the same precision, set mixed_precision={before}"
        )


def make_model(recipe, tokenizer, source, on_meta=False):
    """Return a GPT in float32 on the CPU: loaded from the folder `source`, or a new one if `source` is None.

    on_meta: do not initialize the weights of a new model, because this rank receives those of the main process.
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
    """Return the recipe with the architecture of a loaded model, so that the run can be resumed from run.yaml. config:
    the GPTConfig of the model. source: the folder that it was loaded from.

    Raises:
        ValueError: a recipe cannot express the architecture.
    """
    shape = {key: getattr(config, key) for key in recipe.shape}
    ignored = [
        f"{key}={recipe.shape[key]}"
        for key in recipe.model.model_fields_set & shape.keys()
        if recipe.shape[key] != shape[key]
    ]
    if ignored:
        console.say(f"using the architecture of {source}; ignoring the recipe's {', '.join(sorted(ignored))}")
    section, problems, _ = validate(SECTIONS["model"], recipe.model.model_dump() | shape, "model.")
    if problems:
        raise ValueError(f"{source}: a recipe cannot express this model's architecture: {'; '.join(problems)}")
    return recipe.model_copy(update={"model": section})


# ---- model and optimizer, prepared by Accelerate


class Setup:
    """Everything that a training step needs: the model and its optimizer, prepared by Accelerate, and the batches.

    Args:
        model: a GPT on the CPU.
        tokens: the training tokens of each source: {name: TokenFile}. eot_id: id of the end-of-text token, or None.

    Attributes:
        model: the prepared model, which the loop calls. raw_model: the GPT inside it.
        micro_steps: micro-batches per step on each rank.
        summary, cpu_tuning: strings for the log that describe the model and the changes for faster training on a CPU.
    """

    def __init__(self, recipe, accelerator, model, tokens, eot_id):
        from .distributed import cpu, sharding

        self.recipe, self.accelerator, train = recipe, accelerator, recipe.train
        self.summary, self.num_parameters, self.cpu_tuning = describe_model(model), model.num_parameters(), ""
        if train.activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if not is_sharded(accelerator):  # a sharded model is moved shard by shard
            model.to(accelerator.device)
            self.cpu_tuning = cpu.tune(model, accelerator, train.compile)
        micro_batches = train.gradient_accumulation_steps  # per step, over all ranks
        batch_size, block_size = train.batch_size, recipe.model.block_size
        self.micro_steps = accelerator.gradient_accumulation_steps = micro_batches // accelerator.num_processes
        self.tokens_per_step = recipe.tokens_per_step
        order = block_size, batch_size, micro_batches, recipe.seed, recipe.data.sampling
        is_mix = len(tokens) > 1
        self.batches = Mixture(tokens, recipe.stages, *order) if is_mix else Batches(*tokens.values(), *order)
        eot_id = eot_id if recipe.data.document_mask else None
        self.to_inputs = partial(model_inputs, device=accelerator.device, eot_id=eot_id)
        self.model, self.optimizer = sharding.prepare(
            accelerator,
            model,
            make_optimizer(model, recipe.optimizer),
            batch_size=batch_size,
            micro_steps=self.micro_steps,
            grad_clip=recipe.optimizer.grad_clip,
        )
        self.raw_model = accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def flops_per_token(self):
        return sizing.flops_per_token(self.raw_model.config.resolved())

    @property
    def peak_flops(self):
        """Peak FLOP/s of the device, or None if planning/hardware.py does not list it."""
        return peak_flops(device_name(self.accelerator.device))

    @property
    def is_compiled(self):
        return self.accelerator.state.dynamo_plugin.backend != "NO"

    def micro_batch(self, micro_step):
        """Return the index of this rank's micro-batch among all micro-batches of a step."""
        return micro_step * self.accelerator.num_processes + self.accelerator.process_index

    def fetch(self, step, micro_step):
        """Return the model's inputs for this rank's micro-batch; the copy to the device is asynchronous."""
        return self.to_inputs(self.batches(step, self.micro_batch(micro_step)))

    def seed_dropout(self, step, micro_step):
        """Seed dropout per step and micro-batch, so that a resumed run uses the same masks on any number of ranks."""
        import torch

        seed = seed_of(self.recipe.seed, 0, step, self.micro_batch(micro_step))
        if self.accelerator.device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)  # seeds the generators of all devices; on a CPU, this would take 0.6 ms

    def release(self):
        """Free the model and the optimizer, including Accelerate's references to them."""
        self.model = self.optimizer = None
        self.accelerator.free_memory()


def is_sharded(accelerator):
    """Return whether weights and optimizer state are split over the ranks."""
    return accelerator.distributed_type in ("FSDP", "DEEPSPEED")


def accelerator_for(recipe):
    """Create the Accelerator for a recipe; see distributed/accelerator.py."""
    train = recipe.train
    return make_accelerator(
        train.device,
        train.mixed_precision,
        train.compile,
        recipe.tracking.trackers,
        logging_dir=recipe.out_dir,
        collective_timeout=train.collective_timeout,
    )


def set_up(recipe, data, source, console):
    """Return the Setup of a run. The model has the weights in the folder `source`, or random weights if source is
    None."""
    # imported only after all checks, because torch and transformers take seconds to import
    import torch
    from transformers.utils import logging as transformers_logging

    from .distributed import sharding

    transformers_logging.disable_progress_bar()
    # compare the ranks before Accelerate connects them: if a rank has failed, connecting takes until collective_timeout
    facts = {
        "recipe": recipe.flat(),
        "data": {key: str(value) for key, value in data.identity.items()},
        "init_from": {"source": str(source)},
    }
    assert_ranks_agree(recipe.train.collective_timeout, **facts)
    accelerator = accelerator_for(recipe)
    torch.manual_seed(recipe.seed)
    sharding.disable_zero3_init(accelerator)
    on_meta = sharding.is_fsdp(accelerator) and not accelerator.is_main_process
    model = make_model(recipe, data.tokenizer, source, on_meta)
    is_resumed = recipe.model.init_from == "resume"
    console.say(
        f"resuming {recipe.out_dir} from {source.name}"
        if is_resumed
        else f"starting from the weights of {source}"
        if source
        else "starting from scratch, with randomly initialized weights"
    )
    if source is not None and not is_resumed:
        recipe = adopt_shape(recipe, model.config, source, console)
    return Setup(recipe, accelerator, model, data.train, data.tokenizer.eot_id)


# ---- called by the loop


def evaluate(setup, data, console, step=0):
    """Evaluate the model on all validation sets, and return {name: score}.

    With eval_train=true, also evaluate on training data. If tasks are due at this step, also evaluate on the tasks.
    With several sources, val_loss and train_loss are means over the sources, weighted by their shares of the first mix.
    """
    recipe = setup.recipe
    sizes = recipe.model.block_size, recipe.train.batch_size
    val = {
        name: (tokens, evaluation_batches(len(tokens), *sizes, recipe.train.eval_iters))
        for name, tokens in data.val_sets.items()
    }
    train = {}
    for name in data.stages[0][1] if recipe.train.eval_train else ():
        train[name] = data.train[name], evaluation_batches(len(data.train[name]), *sizes, len(val[name][1]))
    model, to_inputs, accelerator = setup.model, setup.to_inputs, setup.accelerator
    with console.evaluating(sum(len(batches) for _, batches in [*train.values(), *val.values()])) as progress:
        train, val = (
            {name: mean_loss(model, *item, to_inputs, accelerator, progress) for name, item in sets.items()}
            for sets in (train, val)
        )
    results = scores(data.mean(val), *data.val_size(), data.mean(train) if train else None)
    results |= {f"val_loss/{name}": loss for name, loss in val.items()} if len(val) > 1 else {}
    if recipe.should_run_tasks(step):
        tasks = run_tasks(tuple(recipe.train.tasks), recipe.train.tasks_dir)
        results |= task_scores(setup, data, tasks, recipe.train.tasks_limit)
    return results


def is_finite(grad_norm):
    """Return whether a gradient norm, which may be a tensor on the device, is finite. This waits for the device."""
    from .distributed.sharding import as_float

    return math.isfinite(as_float(grad_norm))


class NonFinite:
    """Detect a loss or gradient norm that is NaN or Inf, and end the run or skip the step.

    In fp16, infinite gradients are normal while the gradient scaler searches for its scale. The scaler skips the steps
    with infinite gradients.
    """

    def __init__(self, setup, run, tokenizer):
        self.setup, self.run, self.tokenizer = setup, run, tokenizer
        self.accelerator, train = setup.accelerator, setup.recipe.train
        self.may_skip, self.max_skips = train.on_nonfinite == "skip", train.max_skips

    def should_skip(self, grad_norm):
        """Return True if on_nonfinite=skip and the gradient norm is not finite. In fp16, return False, because the
        gradient scaler skips the step."""
        return self.may_skip and self.accelerator.scaler is None and not is_finite(grad_norm)

    def count_skips(self, state, grad_norm):
        """Count this step if it was skipped. Call this after the optimizer step.

        Raises:
            FloatingPointError: more than max_skips steps in a row were skipped.
        """
        if not self.may_skip:
            return
        was_skipped = self.accelerator.optimizer_step_was_skipped or not is_finite(grad_norm)
        state.skips += was_skipped
        state.skips_in_a_row = (state.skips_in_a_row + 1) * was_skipped
        if state.skips_in_a_row > self.max_skips:
            first = state.step - state.skips_in_a_row + 1
            what = f"gradients of steps {first} to {state.step} are not finite"
            raise self.error(f"{what}; at most {self.max_skips} steps in a row can be skipped (max_skips)", state.step)

    def check(self, step, losses, grad_norm):
        """Return the losses of the steps up to `step`, averaged over all ranks, and the last gradient norm, as floats.

        Raises:
            FloatingPointError: on_nonfinite=stop, and a loss or the gradient norm is not finite.
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
        # below a scale of 1, the gradients are infinite at any scale, so they are an error in fp16 too
        is_scaling = scaler is not None and scaler.get_scale() >= 1
        if not (math.isfinite(grad_norm) or is_scaling or self.accelerator.optimizer_step_was_skipped):
            raise self.error(f"gradient norm of step {step} is {grad_norm}", step)
        return losses, grad_norm

    def check_val_loss(self, step, scores):
        """Raise FloatingPointError if a validation loss is not finite."""
        for name, loss in scores.items():
            if name.startswith("val_loss") and not math.isfinite(loss):
                where = name.replace("val_loss", "").replace("/", " on ")
                raise self.error(f"validation loss{where} after {step} steps is {loss}")

    def error(self, what, step=None):
        """Return the error that ends the run. what: the problem. step: the step whose batch is saved, or None."""
        self.run.saver.wait()
        out_dir = Path(self.setup.recipe.out_dir)
        if step is not None:
            file = out_dir / f"nonfinite-{step}.json"
            if self.accelerator.is_main_process:
                with suppress(OSError):
                    self.write_batch(file, step)
            what += f" (the batch is saved in {file})"
        saved = latest_valid(out_dir)
        fix = "no checkpoint was saved yet; start over with a lower learning_rate"
        if saved:
            fix = (
                f"the latest valid checkpoint is {saved}; resume from it with a lower learning rate: "
                f"nanogpt-accel train {quoted(out_dir)} learning_rate=..."
            )
        return FloatingPointError(f"{what}; {fix}")

    def write_batch(self, path, step):
        """Write the global batch of a step as JSON: for each sequence, its start in the training data and its text."""
        batches, numbers = self.setup.batches, range(self.setup.recipe.train.gradient_accumulation_steps)
        places = [place for number in numbers for place in batches.describe(step, number)]
        rows = [row for number in numbers for row in batches(step, number).tolist()]
        sequences = [{**place, "text": self.tokenizer.decode(row)} for place, row in zip(places, rows, strict=True)]
        write_atomically(path, json.dumps({"step": step, "sequences": sequences}, indent=1))


def write_sample(recipe, tokenizer, model, on_text=None):
    """Return the text that the model generates after sample_prompt. on_text: called with each new chunk of text.

    Sampling uses a separate random number generator, so it does not affect training.
    """
    from .models.generation import generate, text_after

    was_training = model.training
    model.eval()
    prompt = tokenizer.encode_prompt(recipe.train.sample_prompt)
    try:
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
    finally:
        model.train(was_training)  # training continues if a sample cannot be generated
    return text_after(tokenizer.decode, prompt, ids)


def finished_model(setup, recipe, console):
    """Return the trained GPT. If it is sharded, the main process loads it from the last checkpoint, and the other
    processes return None. If loading fails, for example because the device has too little memory, return None."""
    if not is_sharded(setup.accelerator):
        return setup.raw_model
    saved = latest_valid(recipe.out_dir) if is_main() else None
    if saved:
        with console.optional(f"{saved} cannot be loaded after the training"):
            return load_model(saved).to(setup.accelerator.device)


# ---- the first lines of a run


def describe_model(model):
    config = model.config
    parts = ", ".join(f"{part} {n:,}" for part, n in sizing.parameters(config.resolved()).items() if n)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return (
        f"{model.num_parameters():,} parameters ({parts}); n_layer {config.n_layer}, n_head {config.n_head}, "
        f"n_embd {config.n_embd}, vocabulary size {config.vocab_size:,}; weight decay on {len(decayed)} tensors "
        f"({sum(p.numel() for p in decayed):,} parameters), not on {len(others)} "
        f"({sum(p.numel() for p in others):,})"
    )


def describe_run(setup, data, first_step, console):
    """Print the model, the data, the batch, the expected time and the device."""
    recipe, accelerator = setup.recipe, setup.accelerator
    train, tokens_per_step, device = recipe.train, setup.tokens_per_step, accelerator.device
    for line in recipe.derived:
        console.say(f"scaled: {line}")
    console.say(f"model: {setup.summary}")
    vocabulary, sizes = f"vocabulary size {data.tokenizer.vocab_size:,}", {n: len(t) for n, t in data.train.items()}
    if len(data.sources) > 1:
        console.say(f"data: a mix of {len(data.sources)} sources, {vocabulary}")
        for line in run_data.describe_mix([step for step, _ in recipe.stages], run_data.mix_table(recipe, sizes)):
            console.say(line)
    else:
        console.say(
            f"data: {data.main.folder}, {len(data.main.train):,} training and {len(data.main.val):,} validation "
            f"tokens, {vocabulary}"
        )
    for name, tokens in data.validation.items():
        console.say(f"validation set {name}: {tokens.folder}, {len(tokens):,} tokens")
    if not train.eval_only:
        n_tokens, micro_batches = train.max_iters * tokens_per_step, train.gradient_accumulation_steps
        console.say(
            f"batch: {train.batch_size} sequences of {recipe.model.block_size} tokens x {micro_batches} "
            f"micro-batch{'es' * (micro_batches != 1)} ({accelerator.num_processes} "
            f"process{'es' * (accelerator.num_processes != 1)} x {setup.micro_steps}) = {tokens_per_step:,} tokens per "
            f"step; {train.max_iters:,} steps are {n_tokens:,} tokens"
            + (f", {n_tokens / sizes.popitem()[1]:.2f} epochs" if len(sizes) == 1 else "")
        )
        if recipe.warmup_iters < recipe.optimizer.warmup_iters:
            console.say(
                f"warm-up: {recipe.warmup_iters} steps instead of {recipe.optimizer.warmup_iters}, because the "
                f"learning rate schedule only has lr_decay_iters={recipe.lr_decay_iters} steps"
            )
        if setup.peak_flops:
            flops = max(train.max_iters - first_step, 0) * tokens_per_step * setup.flops_per_token
            seconds = flops / (0.4 * setup.peak_flops * accelerator.num_processes)
            console.say(f"time: {duration(seconds)} at an MFU of 40%; a measured estimate follows after a few steps")
    config = setup.raw_model.config
    if (m := config.width_multiplier) != 1:
        sizes = f"n_head={config.n_head / m:g}, n_inner={config.n_inner / m:g}"
        console.say(
            f"muP: n_embd is {m:g} times mup_base_width={config.mup_base_width}; use the learning rates of a model "
            f"with n_embd={config.mup_base_width}, {sizes} and head_dim={config.head_dim}"
        )
    details = [
        f"device: {device_name(device)}",
        f"mixed precision {accelerator.mixed_precision}",
        f"attention {setup.raw_model.config._attn_implementation}",
        "compiled" if setup.is_compiled else None,
        setup.cpu_tuning,
        None if setup.peak_flops or device.type == "cpu" else "no MFU (peak FLOP/s of this device unknown)",
    ]
    console.say(", ".join(filter(None, details)))
    if first_step >= train.max_iters and not train.eval_only:
        console.say(f"max_iters={train.max_iters}: all steps are done; set a higher max_iters to continue")
