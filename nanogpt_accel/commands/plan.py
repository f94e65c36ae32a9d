"""Estimate the parameters, FLOPs, memory and time of a run, and find launch configurations that fit into memory.

    nanogpt-accel plan recipes/gpt2.yaml gpus=8 gpu=a100 mfu=0.37
    nanogpt-accel plan recipes/gpt2.yaml n_layer=48 n_head=25 n_embd=1600 gpus=64 --json
    nanogpt-accel plan recipes/gpt2_depth.yaml flops=1e19 fit=runs/ladder --to large.yaml

The command only does arithmetic (planning/sizing.py, planning/scaling_law.py), so it needs no torch, data or GPU.
"""

import glob
import math
import os
import re
from functools import partial
from pathlib import Path

import yaml
from pydantic import Field

from ..checkpoint.finished_runs import differences, fit_ladder, read_ladder
from ..data import dataset, run_data
from ..distributed.accelerator import auto_precision
from ..models.shape import model_shape
from ..planning import scaling_law, sizing
from ..planning.hardware import GPUS
from ..recipe import FIELDS, SECTIONS, SETTINGS, FloatOrNone, load_recipe
from ..scaling import known_shape, scaling_params
from ..utils import cli
from ..utils.fields import Float, Int, Section, nearest, raise_problems, show_value
from ..utils.files import write_atomically
from ..utils.packaged import packaged
from ..utils.text import duration, printable, quoted, short, to_json

GIB = 2**30
RESERVE = 0.1  # share of GPU memory reserved for the CUDA context, kernel workspaces and fragmentation
SMALL = 50e6  # parameters; smaller models are limited by kernel launches, not by FLOPs
NVLINK, INFINIBAND = 450e9, 50e9  # bytes per second per GPU: NVLink 4 within a machine, 400 Gb/s between machines
# number of training tokens, used if a corpus is not prepared; from nanoGPT's data/*/readme.md, with the val_fraction of
# the recipes
TRAIN_TOKENS = {
    ("openwebtext", "gpt2"): 9_035_582_198,
    ("shakespeare", "gpt2"): 301_966,
    ("shakespeare", "char"): 1_003_854,
}
# `predict` warns above these limits: compute relative to the largest finished run; factor between the tokens per
# parameter of the run and of the finished runs; epochs
FAR, OFF_THE_LINE, MANY_EPOCHS = 10, 1.5, 4
MAX_DEPTH = 1000  # upper limit of the setting depth
MAX_SKIPPED = 30  # the search for a depth ends after this many invalid depths in a row
TITLES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}


class PlanOptions(Section):
    """The options of `plan`, in addition to the keys of a recipe."""

    gpus: Int = Field(1, ge=1, description="number of GPUs")
    gpus_per_node: Int = Field(8, ge=1, description="number of GPUs per machine")
    gpu: str = Field("", description=f"GPU model: {', '.join(GPUS)}; default: H100, or none if device is cpu or mps")
    gpu_memory: Float = Field(0, ge=0, description="memory per GPU in GiB; 0: the value from the GPU's data sheet")
    mfu: Float = Field(
        0.4,
        gt=0,
        le=1,
        description="expected model FLOPs utilization; nanoGPT reaches 0.37 on one A100, llm-foundry 0.43 on 8 A100s",
    )
    dollars_per_hour: FloatOrNone = Field(None, gt=0, description="price of one GPU for one hour; default: no cost")
    fit: str = Field(
        "",
        description="folder of finished runs, or a quoted pattern such as 'runs/ladder/*'. A scaling law is fitted to "
        "their losses and predicts the loss of the recipe",
    )
    flops: FloatOrNone = Field(
        None,
        gt=0,
        description="compute budget in FLOPs; the scaling law from `fit` chooses the depth and the number of steps",
    )
    to: str = Field("", description="recipe file to write, with the depth and number of steps from `flops` and `fit`")
    json_output: bool = Field(False, alias="json", description="print one JSON object and nothing else")


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel plan RECIPE [gpus=8] [gpu=h100] [mfu=0.4] [fit=RUNS] [flops=1e19 --to FILE] [--json] "
            "[key=value ...]",
            "Print parameters, FLOPs, memory, time and checkpoint size of a run, and the files in configs/ with which "
            "the run fits into memory. With fit=RUNS, also predict its validation loss.",
            {"options": PlanOptions, **SETTINGS},
        )
    target, options, overrides, problems = cli.parse_with_recipe(argv, PlanOptions, FIELDS)
    if target is None:
        problems.append("RECIPE is missing; usage: nanogpt-accel plan gpt2")
    raise_problems(problems + check_fit(options, overrides))
    runs = os.path.expanduser(options.fit)
    ladder = read_ladder(sorted(glob.glob(runs)) or [runs]) if runs else None
    law = fit_ladder(ladder) if ladder else None
    if options.flops:
        overrides |= choose_size(target, overrides, options.flops, law)
    recipe = load_recipe(target, overrides, check=lambda recipe: check(recipe, options))
    figures = plan(recipe, options)
    if options.flops and figures["flops"] > 1.1 * options.flops:
        raise ValueError(
            f"flops={options.flops:g}: too few for one step of the recipe; set flops to at least {figures['flops']:.2g}"
        )
    if law:
        figures["prediction"] = predict(recipe, figures, ladder, law)
    if options.to:
        write_recipe(options.to, recipe, figures["prediction"], argv, keeps_out_dir="out_dir" in overrides)
    text = to_json({"recipe": target, **figures}) if options.json_output else "\n".join(report(target, figures))
    print(printable(text))
    if options.to and not options.json_output:
        print(f"wrote {options.to}; to train it: nanogpt-accel train {quoted(options.to)}")


def check(recipe, options):
    """Return a list of problems that would prevent the launch."""
    problems = run_data.check(recipe.data, recipe.model.block_size)
    micro_batches, gpus, per_node = recipe.train.gradient_accumulation_steps, options.gpus, options.gpus_per_node
    if micro_batches % gpus:
        low = micro_batches // gpus * gpus
        divisible = " or ".join(str(n) for n in (low, low + gpus) if n)
        problems.append(
            f"train.gradient_accumulation_steps={micro_batches}: not divisible by gpus={gpus}; "
            f"set it to {divisible}, or change gpus"
        )
    if gpus > per_node and gpus % per_node:
        problems.append(f"gpus={gpus}: not a multiple of gpus_per_node={per_node}; change one of them")
    gpu, unknown = find_gpu(recipe, options)
    if options.dollars_per_hour and gpu is None and not unknown:
        device, price = recipe.train.device, f"{options.dollars_per_hour:g}"
        fix = "set gpu, or remove dollars_per_hour"
        problems.append(f"dollars_per_hour={price}: the duration of the run on device={device} is unknown; {fix}")
    return problems + unknown


def check_fit(options, overrides):
    """Return a list of problems with the options fit, flops and to."""
    problems, to = [], Path(options.to)
    if options.flops and not options.fit:
        problems.append(f"flops={options.flops:g}: needs a scaling law; set fit to a folder of finished runs")
    if options.to and not options.flops:
        problems.append(f"to={to}: needs flops and fit, which choose the recipe to write; set both")
    if options.to and to.exists():
        problems.append(f"to={to}: already exists; set `to` to another file")
    elif options.to and not to.parent.is_dir():
        problems.append(f"to={to}: the folder {to.parent} does not exist; create it")
    elif options.to and to.suffix != ".yaml":
        problems.append(f"to={to}: must end with .yaml")
    chosen = {"depth", "n_layer", "max_iters"}
    if options.flops and (given := [key for key in overrides if key.rpartition(".")[2] in chosen]):
        problems.append(f"flops={options.flops:g}: chooses depth and max_iters; remove {', '.join(given)}")
    return problems


def find_gpu(recipe, options):
    """Return (name of the GPU in GPUS, list of problems). The name is None for a CPU, MPS or an unknown GPU."""
    if not options.gpu:
        return (None if recipe.train.device in ("cpu", "mps") else "H100"), []
    short_name = lambda name: re.sub(r"[\s_-]", "", name.lower())  # noqa: E731  so that rtx4090 matches
    names, typed = {short_name(name): name for name in GPUS}, short_name(options.gpu)
    if typed in names:
        return names[typed], []
    return None, [f"gpu={options.gpu}: unknown GPU{nearest(typed, names)}; choose one of {', '.join(GPUS)}"]


# ---- the figures


def plan(recipe, options):
    """Return all estimates for a run as a dictionary. The units are bytes, seconds and FLOPs, unless the key names
    another unit."""
    train, gpus, gpu = recipe.train, options.gpus, find_gpu(recipe, options)[0]
    vocab_size, train_tokens, assumed = find_data(recipe)
    shape = model_shape(recipe, vocab_size)
    precision = train.mixed_precision
    if precision == "auto":
        precision = auto_precision("cuda" if gpu else "cpu", gpu is not None and GPUS[gpu].has_bf16)
    half = precision != "no"
    size = run_size(recipe, shape, train_tokens)
    assumed += assumptions(recipe, options, gpu, precision, size["parameters"]["total"])
    assumed += [
        f"{key}={show_value(value)} does not change the estimates, because plan does not know this setting"
        for key, value in shape.items()
        if value and key not in sizing.COUNTED
    ]

    memory_of = partial(  # (layout, shards, batch, checkpointing) -> bytes by part
        sizing.memory,
        shape,
        processes=gpus,
        half=half,
        algorithm=recipe.optimizer.algorithm,
        device="cuda" if gpu else train.device,
        dropout=recipe.model.dropout,
        trains=not train.eval_only,
    )
    layouts = find_layouts(gpus, options.gpus_per_node, recipe.optimizer.algorithm, gpu, train.device)
    memory = memory_by_layout(memory_of, layouts, train)
    micro_steps, links = train.gradient_accumulation_steps // gpus, {"near": NVLINK, "far": INFINIBAND}
    for layout, (_, shards) in layouts.items():
        where = (shape, layout, shards, gpus)
        memory[layout]["exchange_seconds"] = gpu and sizing.exchange_seconds(
            *where, micro_steps=micro_steps, half=half, machine=options.gpus_per_node, **links
        )
        memory[layout]["muon_seconds"] = 0.0
        if gpu and recipe.optimizer.algorithm == "muon" and size["steps"]:
            speed = options.mfu * GPUS[gpu].peak_flops
            memory[layout]["muon_seconds"] = sizing.muon_seconds(
                *where, flops_per_second=speed, machine=options.gpus_per_node, **links
            )
    limit = (options.gpu_memory or GPUS[gpu].memory) * GIB * (1 - RESERVE) if gpu else None
    fitting = [layout for layout in layouts if limit is None or memory[layout]["total"] <= limit]
    chosen = memory[fitting[0] if fitting else "ddp"]
    return {
        "gpu": gpu,
        "device": train.device,
        "gpus": gpus,
        "mfu": options.mfu,
        "mixed_precision": precision,
        "usable_memory": limit,
        "assumed": assumed,
        "starts": [step for step, _ in recipe.stages],
        "scaled": list(recipe.derived),
        **size,
        **run_time(size, chosen["exchange_seconds"], chosen["muon_seconds"], gpu, options),
        "memory": memory,
        "fitting": fitting,
        "activation_checkpointing": train.activation_checkpointing,
        "config": chosen["config"] if fitting else None,
        "remedy": None if fitting else find_fix(train, gpus, memory_of, layouts, limit),
    }


def find_data(recipe):
    """Return (vocabulary size, numbers of training tokens, list of assumptions).

    The vocabulary size is None if a pretrained model defines it. The numbers of tokens are {source: number}; a
    number is None if it is unknown.
    """
    assumed, vocab_size, train_tokens, sections = [], None, {}, run_data.sections(recipe.data)
    for name in recipe.data.sources:
        data = sections[name]
        if run_data.has_tokenizer(recipe.data, data) and dataset.is_prepared(data):
            manifest = dataset.manifest_of(data, dataset.data_folder(data))
            train_tokens[name] = manifest["splits"]["train"]["tokens"]
            vocab_size = vocab_size or manifest["tokenizer"]["vocab_size"]
            continue
        known = None if data.limit_documents else TRAIN_TOKENS.get((data.corpus, data.tokenizer))
        if known:
            assumed.append(f"{data.corpus} has {known:,} training tokens, as counted by nanoGPT")
        train_tokens[name] = known and min(known, data.limit_tokens or known)
    # pretrained weights define the vocabulary size
    if vocab_size is None and recipe.model.init_from in ("scratch", "resume"):
        vocab_size = dataset.guess_vocab_size(next(iter(sections.values())), assumed)
    return vocab_size, train_tokens, assumed


def assumptions(recipe, options, gpu, precision, n_params):
    """Return a list of assumptions about hardware and speed, as text."""
    train, assumed = recipe.train, []
    if gpu and precision == "no":
        assumed.append("half-precision speed; training with mixed_precision=no is much slower")
    if gpu is None and train.mixed_precision == "auto" and train.device != "mps":
        assumed.append(
            "the CPU has neither AMX nor AVX512-BF16, and trains in float32; with one of them, it would use bf16, "
            "which needs less memory"
        )
    if train.activation_checkpointing:
        fix = "to include them, set a lower mfu"
        assumed.append(f"the times exclude recomputed activations (about a third more FLOPs); {fix}")
    if gpu and n_params < SMALL:
        assumed.append(
            f"mfu={options.mfu:g}, which is too high for a model this small: nanoGPT's shakespeare_char reaches "
            "about 0.1 (3 minutes on an A100)"
        )
    return assumed


def run_size(recipe, shape, train_tokens):
    """Return the estimates that do not depend on the hardware: parameters, FLOPs, tokens, checkpoints, scaling laws."""
    train = recipe.train
    parts = sizing.parameters(shape)
    n_params, flops_per_token = sum(parts.values()), sizing.flops_per_token(shape)
    tokens_per_step = train.gradient_accumulation_steps * train.batch_size * shape["block_size"]
    steps = 0 if train.eval_only else train.max_iters
    tokens = steps * tokens_per_step
    total_tokens = sum(train_tokens.values()) if all(train_tokens.values()) else None
    optimal_params, optimal_tokens = scaling_law.optimal_size(tokens * flops_per_token) if tokens else (0, 0)
    return {
        "vocab_size": shape["vocab_size"],
        "block_size": shape["block_size"],
        "batch_size": train.batch_size,
        "parameters": {**parts, "total": n_params},
        "flops_per_token": flops_per_token,
        "forward_flops": sizing.forward_flops(shape),
        "flops": tokens * flops_per_token,
        "micro_batches": train.gradient_accumulation_steps,
        "tokens_per_step": tokens_per_step,
        "steps": steps,
        "tokens": tokens,
        "train_tokens": total_tokens,
        "epochs": tokens / total_tokens if total_tokens else None,
        "sources": run_data.mix_table(recipe, train_tokens) if len(train_tokens) > 1 else [],
        "checkpoint_bytes": sizing.checkpoint_bytes(shape, recipe.optimizer.algorithm),
        "checkpoints": recipe.checkpoint.keep_last + 1,
        "tokens_per_parameter": tokens / n_params,
        "optimal_tokens": scaling_law.optimal_tokens(n_params),
        "optimal_parameters_for_flops": optimal_params,
        "optimal_tokens_for_flops": optimal_tokens,
    }


def run_time(size, exchange, muon, gpu, options):
    """Return the estimated time per step and in total as a dictionary. Without a GPU, all values are None.

    size: the result of run_size. exchange: seconds of communication per step. Communication overlaps with computation,
    so the time per step is the longer of the two times, plus the seconds of Muon's update.
    """
    keys = ("computing_seconds", "exchange_seconds", "muon_seconds")
    keys += ("seconds_per_step", "tokens_per_second_per_gpu", "days", "dollars")
    if gpu is None:
        return dict.fromkeys(keys)
    flops_per_second = options.mfu * GPUS[gpu].peak_flops * options.gpus
    computing = size["tokens_per_step"] * size["flops_per_token"] / flops_per_second
    seconds = max(computing, exchange) + muon
    speed, days = size["tokens_per_step"] / options.gpus / seconds, size["steps"] * seconds / 86400
    dollars = options.dollars_per_hour and days * 24 * options.gpus * options.dollars_per_hour
    return dict(zip(keys, (computing, exchange, muon, seconds, speed, days, dollars), strict=True))


def find_layouts(gpus, gpus_per_node, algorithm, gpu, device):
    """Return {layout: (file in configs/, number of shards)}, the simplest first. Layouts: ddp, fsdp2, zero2, zero3."""
    if gpu is None:
        return {"ddp": ("mps.yaml" if device == "mps" else "cpu.yaml" if gpus == 1 else "cpu_2proc.yaml", 1)}
    if gpus == 1:
        return {"ddp": ("single_gpu.yaml", 1)}
    if gpus <= gpus_per_node:
        ddp, fsdp2 = ("multi_gpu.yaml", 1), ("fsdp2.yaml", gpus)
    else:  # hybrid sharding: each machine has one copy of the model
        ddp, fsdp2 = ("multi_node.yaml", 1), ("fsdp2_multi_node.yaml", gpus_per_node)
    if algorithm != "adamw":  # not supported with DeepSpeed
        return {"ddp": ddp, "fsdp2": fsdp2}
    zero2, zero3 = ("deepspeed_zero2.yaml", gpus), ("deepspeed_zero3.yaml", gpus)
    return {"ddp": ddp, "fsdp2": fsdp2, "zero2": zero2, "zero3": zero3}


def memory_by_layout(memory_of, layouts, train):
    """Return {layout: {part: bytes}} for the layouts from find_layouts, with totals.

    memory_of: function of layout, shards, batch and checkpointing that returns {part: bytes}.
    """
    memory = {}
    for layout, (config, shards) in layouts.items():
        full, checkpointed = (
            memory_of(layout, shards, batch=train.batch_size, checkpointing=value) for value in (False, True)
        )
        parts = checkpointed if train.activation_checkpointing else full
        memory[layout] = {
            "config": config,
            "shards": shards,
            **parts,
            "total": sum(parts.values()),
            "activations_without_checkpointing": full["activations"],
            "activations_with_checkpointing": checkpointed["activations"],
        }
    return memory


def find_fix(train, gpus, memory_of, layouts, limit):
    """Return advice, as text, on how to make the run fit into `limit` bytes per GPU.

    memory_of: see memory_by_layout.
    """

    def fits(batch, checkpointing):
        parts = (memory_of(name, n, batch=batch, checkpointing=checkpointing) for name, (_, n) in layouts.items())
        return min(sum(sizes.values()) for sizes in parts) <= limit

    sequences = train.batch_size * train.gradient_accumulation_steps  # per step; the advice must not change it
    for checkpointing in dict.fromkeys((train.activation_checkpointing, True)):
        switch = " activation_checkpointing=true" if checkpointing > train.activation_checkpointing else ""
        if switch and fits(train.batch_size, True):
            return f"set{switch}"
        for smaller in range(train.batch_size - 1, 0, -1):
            if sequences % (smaller * gpus) == 0 and fits(smaller, checkpointing):
                return f"set batch_size={smaller} gradient_accumulation_steps={sequences // smaller}{switch}"
    return "use more GPUs with FSDP2, GPUs with more memory, a smaller model or a smaller block_size"


# ---- scaling laws


def choose_size(target, overrides, flops, law):
    """Choose the depth of a recipe for a compute budget. Return {"depth", "tokens_per_parameter"}, as overrides.

    With a law of the form L(N, D), choose the depth with the lowest predicted loss. With L(C), or if the overrides
    contain tokens_per_parameter, choose the depth at which the recipe needs about `flops` FLOPs.
    Then set tokens_per_parameter so that the run uses the whole budget.
    """
    has_ratio = law.form == "L(C)" or any(key.endswith("tokens_per_parameter") for key in overrides)
    vocab_size, best = find_data(load_recipe(target, overrides))[0], None  # best: (score, depth, tokens per parameter)
    # warmup_iters is left out while depths are tried, because it can be too long for the number of steps at a depth
    settings = {key: value for key, value in overrides.items() if key.rpartition(".")[2] != "warmup_iters"}
    for depth in range(1, MAX_DEPTH + 1):
        try:
            recipe = load_recipe(target, {**settings, "depth": depth})
        except ValueError:  # for example, n_head=4 on the command line, but this width is not divisible by 4
            if depth - (best[1] if best else 0) < MAX_SKIPPED:
                continue
            if best:
                break
            raise
        shape = model_shape(recipe, vocab_size)
        tokens = flops / sizing.flops_per_token(shape)
        if has_ratio:
            score = abs(math.log(tokens / (recipe.train.max_iters * recipe.tokens_per_step)))
        else:
            point = {"n_params": scaling_params(shape), "tokens": tokens}
            score = scaling_law.expected_loss(law.constants, point)
        if best is None or score < best[0]:
            best = score, depth, tokens / scaling_params(known_shape(recipe))
        elif depth > best[1] + 3:  # the score has one minimum; rounded sizes only cause small bumps
            break
    if best[1] == MAX_DEPTH:
        raise ValueError(f"flops={flops:g}: too many for the largest depth, {MAX_DEPTH}; set flops to a lower number")
    return {"depth": best[1], "tokens_per_parameter": best[2]}


def predict(recipe, figures, ladder, law):
    """Return the predicted loss of a recipe, its interval and warnings, as a dictionary.

    Raises:
        ValueError: the losses of the recipe and of the runs cannot be compared.
    """
    if recipe.model.init_from not in ("scratch", "resume"):
        problem = f"a scaling law only predicts runs from scratch, but model.init_from={recipe.model.init_from}"
        raise ValueError(f"fit: {problem}; remove fit")
    if not figures["tokens"]:
        raise ValueError("fit: the recipe does not train (eval_only=true or max_iters=0); remove fit")
    problems, warnings = differences(ladder, recipe)
    raise_problems([f"fit: {problem}" for problem in problems])
    n_params = scaling_params(recipe.shape | {"vocab_size": figures["vocab_size"]})
    tokens, flops = figures["tokens"], figures["flops"]
    loss, low, high = map(float, law.predict(n_params, tokens, flops))
    times, ratio = law.extrapolation(flops), law.ratio_to_line(n_params, tokens)
    if times > FAR:
        warnings.append(
            f"this run needs {times:.3g} times the FLOPs of the largest finished run; above {FAR} times, the law may "
            "not hold"
        )
    if ratio > OFF_THE_LINE:
        warnings.append(
            f"the tokens per parameter differ by a factor of {ratio:.2g} from those of the finished runs. The law "
            "does not include their effect, so the prediction may be too high or too low; add runs with other values "
            "of tokens_per_parameter"
        )
    if (figures["epochs"] or 0) > MANY_EPOCHS:
        warnings.append(
            f"the run has {figures['epochs']:.1f} epochs; above {MANY_EPOCHS}, repeated tokens are worth less than new "
            "ones (Muennighoff et al. 2023), so the loss may be higher"
        )
    if law.at_bound:
        constants = f"constant{'s' * (len(law.at_bound) > 1)} {', '.join(law.at_bound)}"
        warnings.append(f"the finished runs do not determine the law's {constants}; add larger or more runs")
    return {
        "loss": loss,
        "low": low,
        "high": high,
        "n_params": n_params,
        "law": law.formula,
        "form": law.form,
        "reason": law.reason,
        "runs": len(law.runs),
        "times_largest_compute": times,
        "notes": ladder.notes,
        "warnings": warnings,
    }


def write_recipe(path, recipe, prediction, argv, keeps_out_dir):
    """Write a recipe file with the predicted loss as its expected loss, so that the run reports whether the prediction
    was right."""
    values = recipe.model_dump(exclude_unset=True, exclude={"expect"} | (set() if keeps_out_dir else {"out_dir"}))
    for name in values.keys() & SECTIONS.keys():
        values[name] = {key: value for key, value in values[name].items() if value is not None}
    loss, low, high = (round(prediction[key], 4) for key in ("loss", "low", "high"))
    source = (
        f"predicted with the scaling law {prediction['form']}, fitted to {prediction['runs']} runs; "
        f"90% interval {low} to {high}"
    )
    values["expect"] = {"val_loss": loss, "tolerance": round(max(high - loss, loss - low, 1e-4), 4), "source": source}
    header = [
        f"The size for a compute budget, chosen with the scaling law {prediction['law']}",
        f"written by: nanogpt-accel plan {' '.join(map(quoted, argv))}",
        f"to train:   nanogpt-accel train {quoted(path)}",
    ]
    comments = "".join(f"# {' '.join(line.split())}\n" for line in header)
    body = yaml.safe_dump({name: value for name, value in values.items() if value != {}}, sort_keys=False)
    write_atomically(path, f"{comments}\n{body}")


def prediction_lines(prediction):
    """Yield lines of text: the predicted loss and its warnings."""
    interval = f"90% interval of a run: {prediction['low']:.3f} to {prediction['high']:.3f}"
    yield f"loss         {prediction['loss']:.3f} nats per token; {interval}"
    times = f"this run needs {prediction['times_largest_compute']:.3g} times the FLOPs of the largest"
    yield f"             {prediction['law']}, fitted to {prediction['runs']} runs; {times}"
    yield from (f"note: {note}" for note in prediction["notes"])
    yield from (f"warning: {warning}" for warning in prediction["warnings"])


# ---- the figures as text


def report(target, figures):
    """Yield the result of `plan` as lines of text. target: path of the recipe."""
    n_micro, total = figures["micro_batches"], figures["parameters"]["total"]
    device = f"{figures['gpus']} x {figures['gpu']}" if figures["gpu"] else f"device={figures['device']}"
    parts = ", ".join(f"{part} {n:,}" for part, n in figures["parameters"].items() if n and part != "total")
    flops = figures["forward_flops"]
    shares = (
        f"{part} {sum(n for key, n in flops.items() if key.startswith(part)) / sum(flops.values()):.0%}"
        for part in ("attention", "mlp", "head")
    )
    yield f"{target} on {device}, mixed precision {figures['mixed_precision']}"
    yield ""
    yield from (f"scaled       {line}" for line in figures["scaled"])
    yield f"parameters   {total:,}: {parts}"
    yield f"             vocabulary size {figures['vocab_size']:,}, context length {figures['block_size']:,}"
    yield f"FLOPs        {figures['flops_per_token']:.4g} per token, forward and backward; forward: {', '.join(shares)}"
    yield (
        f"step         {figures['batch_size']} sequences of {figures['block_size']:,} tokens x {n_micro} "
        f"micro-batch{'es' * (n_micro > 1)} = {figures['tokens_per_step']:,} tokens"
    )
    yield from run_lines(figures, total)
    size = f"{figures['checkpoint_bytes'] / 1e9:.3g} GB"
    yield f"checkpoint   {size} (weights and optimizer state); up to {figures['checkpoints']} checkpoints are kept"
    yield ""
    yield from memory_lines(figures)
    yield from (f"assumed: {line}" for line in figures["assumed"])


def run_lines(figures, n_params):
    """Yield lines of text: tokens, FLOPs, scaling laws and time of the run."""
    if not figures["tokens"]:
        yield "run          no training steps (eval_only=true or max_iters=0)"
        return
    epochs = f", {figures['epochs']:.2f} epochs" if figures["epochs"] and not figures["sources"] else ""
    yield f"run          {figures['steps']:,} steps, {figures['tokens']:,} tokens{epochs}, {figures['flops']:.3g} FLOPs"
    if figures["sources"]:
        title = "mix"
        for line in run_data.describe_mix(figures["starts"], figures["sources"]):
            yield f"{title:<12} {line}"
            title = ""
    optimal = figures["optimal_tokens"]
    yield (
        f"Chinchilla   {figures['tokens_per_parameter']:,.4g} tokens per parameter; compute-optimal: "
        f"{optimal / n_params:.3g} per parameter, {short(optimal)} tokens"
    )
    if "prediction" not in figures:  # with fit, use the law that was fitted to runs on these data instead
        yield (
            f"             optimal for these FLOPs: {short(figures['optimal_parameters_for_flops'])} parameters and "
            f"{short(figures['optimal_tokens_for_flops'])} tokens"
        )
    if figures["gpu"]:
        days, seconds = figures["days"], figures["seconds_per_step"]
        yield (
            f"time         {f'{days:.3g} days' if days >= 1 else duration(days * 86400)}: {seconds:.3g} s per step, "
            f"{figures['tokens_per_second_per_gpu']:,.0f} tokens/s per GPU"
        )
        communication = f", communication {figures['exchange_seconds']:.2g} s" if figures["gpus"] > 1 else ""
        muon = f", Muon {figures['muon_seconds']:.2g} s" if figures["muon_seconds"] else ""
        yield (
            f"             per step: computation {figures['computing_seconds']:.3g} s at {figures['mfu']:.0%} MFU"
            + communication
            + muon
        )
    if figures["dollars"]:
        yield f"cost         {figures['dollars']:,.2f} dollars"
    if "prediction" in figures:
        yield from prediction_lines(figures["prediction"])


def memory_lines(figures):
    """Yield lines of text: a table of memory by layout (DDP, FSDP2, ...), and the layouts that fit."""
    columns = ("weights", "gradients", "optimizer", "copies", "activations", "logits", "total")
    memory, fitting, gpus = figures["memory"], figures["fitting"], figures["gpus"]
    unit, size = ("GiB", GIB) if any(parts["total"] >= GIB for parts in memory.values()) else ("MiB", 2**20)
    yield f"{f'{unit} per GPU' if figures['gpu'] else unit:<12} " + " ".join(f"{name:>11}" for name in columns)
    for layout, parts in memory.items():
        row = " ".join(f"{parts[name] / size:>11.2f}" for name in columns)
        yield f"{TITLES[layout] if gpus > 1 else 'one process':<12} {row}{'' if layout in fitting else '  too large'}"
    full, checkpointed = (memory["ddp"][f"activations_{how}_checkpointing"] / size for how in ("without", "with"))
    yield f"activations  {full:.2f} {unit}; with activation_checkpointing=true {checkpointed:.2f} {unit}"
    yield ""
    limit = (
        f"{figures['usable_memory'] / GIB:.1f} GiB ({1 - RESERVE:.0%} of the GPU's memory)" if figures["gpu"] else ""
    )
    if not fitting:
        yield f"no configuration fits into {limit}: {figures['remedy']}"
        return
    config, *others = (memory[layout]["config"] for layout in fitting)
    config = quoted(packaged(f"configs/{config}"))
    if not figures["gpu"] and gpus > 2:
        config += f" --num_processes {gpus}"
    start = f"fits into {limit}: " if limit else "launch with "
    yield start + config + (f"; also {', '.join(others)}" if others else "")
