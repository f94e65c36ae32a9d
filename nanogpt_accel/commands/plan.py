"""Compute what a run will need: parameters, FLOPs, memory, time, and which of configs/ fits.

    nanogpt-accel plan recipes/gpt2.yaml gpus=8 gpu=a100 mfu=0.37
    nanogpt-accel plan recipes/gpt2.yaml n_layer=48 n_head=25 n_embd=1600 gpus=64 --json

This is arithmetic on the recipe (planning/sizing.py): it answers immediately and needs no torch, data or GPU.
"""

import json
import re
from functools import partial

from pydantic import Field

from ..data import dataset
from ..data.manifest import read_manifest
from ..distributed.accelerator import auto_precision
from ..models.shape import model_shape
from ..planning import sizing
from ..planning.hardware import GPUS
from ..recipe import FIELDS, SETTINGS, load_recipe
from ..utils import cli
from ..utils.fields import Float, Int, Section, nearest, raise_problems
from ..utils.text import duration

GIB = 2**30
RESERVE = 0.1  # share of a GPU's memory for CUDA itself, workspaces of kernels and fragmentation
SMALL = 50e6  # parameters; a GPU waits for kernel launches most of the time if the model is smaller
NVLINK, INFINIBAND = 450e9, 50e9  # bytes per second per GPU: NVLink 4 within a machine, 400 Gb/s between machines
# training tokens of corpora that are not prepared here: nanoGPT's counts (data/*/readme.md), recipes' val_fraction
TRAIN_TOKENS = {
    ("openwebtext", "gpt2"): 9_035_582_198,
    ("shakespeare", "gpt2"): 301_966,
    ("shakespeare", "char"): 1_003_854,
}
TITLES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}


class PlanOptions(Section):
    """The options of `plan` itself; every key of a recipe can be given too."""

    gpus: Int = Field(1, ge=1, description="how many")
    gpus_per_node: Int = Field(8, ge=1, description="GPUs of one machine")
    gpu: str = Field("", description=f"{', '.join(GPUS)}; empty: H100, or none where the recipe's device is no GPU")
    gpu_memory: Float = Field(0, ge=0, description="GiB of one GPU; 0: as the data sheet says")
    mfu: Float = Field(
        0.4,
        gt=0,
        le=1,
        description="share of the GPU's peak that the model's FLOPs will reach: 0.37 "
        "in nanoGPT on one A100, 0.43 in llm-foundry on eight",
    )
    json_output: bool = Field(False, alias="json", description="print one JSON object and nothing else")


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel plan RECIPE.yaml [gpus=8] [gpu=h100] [mfu=0.4] [--json] [key=value ...]",
            "Parameters, FLOPs, memory by part, time and checkpoint size of a run, and which of configs/ fits.",
            {"options": PlanOptions, **SETTINGS},
        )
    target, options, given, problems = cli.parse_with_recipe(argv, PlanOptions, FIELDS)
    if target is None:
        problems.append("what to plan? nanogpt-accel plan RECIPE.yaml, such as recipes/gpt2.yaml")
    raise_problems(problems)
    recipe = load_recipe(target, given, check=lambda recipe: check(recipe, options))
    found = plan(recipe, options)
    print(json.dumps({"recipe": target, **found}) if options.json_output else "\n".join(report(target, found)))


def check(recipe, options):
    """Return the reasons why this run cannot be launched, a list of problems."""
    problems = dataset.check(recipe.data, recipe.model.block_size)
    micro_batches, gpus = recipe.train.gradient_accumulation_steps, options.gpus
    if micro_batches % gpus:
        low = micro_batches // gpus * gpus
        fitting = " or ".join(str(n) for n in (low, low + gpus) if n)
        problems.append(
            f"train.gradient_accumulation_steps={micro_batches} cannot be shared by gpus={gpus} (its "
            f"product with batch_size makes the step): set it to {fitting}, or another number of gpus"
        )
    if gpus > options.gpus_per_node and gpus % options.gpus_per_node:
        problems.append(f"gpus={gpus}: more than one machine takes whole ones of gpus_per_node={options.gpus_per_node}")
    return problems + find_gpu(recipe, options)[1]


def find_gpu(recipe, options):
    """Return (name in GPUS or None, problems). None: the recipe does not train on a GPU of the table."""
    if not options.gpu:
        return (None if recipe.train.device in ("cpu", "mps") else "H100"), []
    names, typed = {short_name(name): name for name in GPUS}, short_name(options.gpu)
    if typed in names:
        return names[typed], []
    return None, [f"gpu={options.gpu}: not in the table{nearest(typed, names)}; there are {', '.join(GPUS)}"]


def short_name(name):
    """Return a GPU's name as people type it: rtx4090 for RTX 4090."""
    return re.sub(r"[\s_-]", "", name.lower())


# ---- the figures


def plan(recipe, options):
    """Return all figures of a run as one dictionary; bytes, seconds and FLOPs if the key does not say otherwise."""
    train, gpu = recipe.train, find_gpu(recipe, options)[0]
    vocab_size, train_tokens, assumed = find_data(recipe)
    shape = model_shape(recipe, vocab_size)
    precision = train.mixed_precision
    if precision == "auto":
        precision = auto_precision("cuda" if gpu else "cpu", gpu is not None and GPUS[gpu].has_bf16)
    size = run_size(recipe, shape, train_tokens)

    needed = partial(  # (layout, shards, batch, checkpointing) -> bytes by part
        sizing.memory,
        shape,
        processes=options.gpus,
        half=precision != "no",
        algorithm=recipe.optimizer.algorithm,
        cpu=gpu is None,
        dropout=recipe.model.dropout,
        trains=not train.eval_only,
    )
    layouts = find_layouts(options.gpus, options.gpus_per_node, recipe.optimizer.algorithm, gpu, train.device)
    memory = memory_by_layout(needed, layouts, train)
    for layout, figures in memory.items():
        figures["exchange_seconds"] = gpu and sizing.exchange_seconds(
            shape,
            layout,
            figures["shards"],
            options.gpus,
            micro_steps=train.gradient_accumulation_steps // options.gpus,
            half=precision != "no",
            machine=options.gpus_per_node,
            near=NVLINK,
            far=INFINIBAND,
        )
    limit = (options.gpu_memory or GPUS[gpu].memory) * GIB * (1 - RESERVE) if gpu else None
    fitting = [layout for layout in layouts if limit is None or memory[layout]["total"] <= limit]
    chosen = memory[fitting[0] if fitting else next(iter(layouts))]
    return {
        "gpu": gpu,
        "device": train.device,
        "gpus": options.gpus,
        "mfu": options.mfu,
        "mixed_precision": precision,
        "usable_memory": limit,
        "assumed": assumed + assumptions(recipe, options, gpu, precision, size["parameters"]["total"]),
        **size,
        **scaling_laws(size["parameters"]["total"], size["tokens"], size["flops"]),
        **run_time(size, chosen["exchange_seconds"], gpu, options),
        "memory": memory,
        "fitting": fitting,
        "activation_checkpointing": train.activation_checkpointing,
        "config": chosen["config"] if fitting else None,
        "remedy": None if fitting else find_remedy(train, options.gpus, partial(least_memory, needed, layouts), limit),
    }


def find_data(recipe):
    """Return (vocabulary size of the tokenizer, training tokens or None, assumptions in words)."""
    data, assumed = recipe.data, []
    if dataset.is_prepared(data):
        manifest = read_manifest(dataset.data_folder(data))
        return manifest["tokenizer"]["vocab_size"], manifest["splits"]["train"]["tokens"], assumed
    train_tokens = None if data.limit_documents else TRAIN_TOKENS.get((data.corpus, data.tokenizer))
    if train_tokens:
        assumed.append(f"{train_tokens:,} training tokens, nanoGPT's count for {data.corpus}")
        train_tokens = min(train_tokens, data.limit_tokens or train_tokens)
    is_new = recipe.model.init_from in ("scratch", "resume")  # pretrained weights have a vocabulary of their own
    return dataset.guess_vocab_size(data, assumed) if is_new else None, train_tokens, assumed


def assumptions(recipe, options, gpu, precision, n_params):
    """Return what the figures assume about hardware and speed, in words."""
    train, assumed = recipe.train, []
    if gpu and precision == "no":
        assumed.append("the peak is that of half precision; mixed_precision=no stays far below it")
    if gpu is None and train.mixed_precision == "auto" and train.device != "mps":
        assumed.append("a CPU without AMX, which trains in float32; one with AMX takes bf16, and less memory")
    if train.activation_checkpointing:
        assumed.append("mfu counts no FLOPs twice, but the blocks are computed again, a third more: state a lower one")
    if gpu and n_params < SMALL:
        assumed.append(
            f"mfu={options.mfu:g}, which so small a model does not reach: nanoGPT's shakespeare_char, 3 "
            "minutes on an A100, had about 0.1"
        )
    return assumed


def run_size(recipe, shape, train_tokens):
    """Return the figures that do not depend on the hardware: parameters, FLOPs, tokens and checkpoints."""
    train = recipe.train
    parts = sizing.parameters(shape)
    flops_per_token = sizing.flops_per_token(shape)
    tokens_per_step = train.gradient_accumulation_steps * train.batch_size * shape["block_size"]
    steps = 0 if train.eval_only else train.max_iters
    tokens = steps * tokens_per_step
    return {
        "vocab_size": shape["vocab_size"],
        "block_size": shape["block_size"],
        "batch_size": train.batch_size,
        "parameters": {**parts, "total": sum(parts.values())},
        "flops_per_token": flops_per_token,
        "forward_flops": sizing.forward_flops(shape),
        "flops": tokens * flops_per_token,
        "micro_batches": train.gradient_accumulation_steps,
        "tokens_per_step": tokens_per_step,
        "steps": steps,
        "tokens": tokens,
        "train_tokens": train_tokens,
        "epochs": tokens / train_tokens if train_tokens else None,
        "checkpoint_bytes": sizing.checkpoint_bytes(shape, recipe.optimizer.algorithm),
        "checkpoints": recipe.checkpoint.keep_last + 1,
    }


def scaling_laws(n_params, tokens, flops):
    """Return how the run compares with Chinchilla's compute-optimal sizes."""
    optimal_params, optimal_tokens = sizing.optimal_size(flops) if flops else (0, 0)
    return {
        "tokens_per_parameter": tokens / n_params,
        "optimal_tokens": sizing.optimal_tokens(n_params),
        "optimal_parameters_for_flops": optimal_params,
        "optimal_tokens_for_flops": optimal_tokens,
    }


def run_time(size, exchange, gpu, options):
    """Return the seconds per step and the days of the run; all None without a GPU.

    exchange: seconds of communication per step. It overlaps with the computation, so at best the longer one counts.
    """
    if gpu is None:
        keys = ("computing_seconds", "exchange_seconds", "seconds_per_step", "tokens_per_second_per_gpu", "days")
        return dict.fromkeys(keys)
    flops_per_second = options.mfu * GPUS[gpu].peak_flops * options.gpus
    computing = size["tokens_per_step"] * size["flops_per_token"] / flops_per_second
    seconds = max(computing, exchange)
    return {
        "computing_seconds": computing,
        "exchange_seconds": exchange,
        "seconds_per_step": seconds,
        "tokens_per_second_per_gpu": size["tokens_per_step"] / options.gpus / seconds,
        "days": size["steps"] * seconds / 86400,
    }


def find_layouts(gpus, gpus_per_node, algorithm, gpu, device):
    """Return {layout: (file in configs/, shards)}, the simplest first."""
    if gpu is None:
        return {"ddp": ("mps.yaml" if device == "mps" else "cpu.yaml" if gpus == 1 else "cpu_2proc.yaml", 1)}
    if gpus == 1:
        return {"ddp": ("single_gpu.yaml", 1)}
    if gpus <= gpus_per_node:
        ddp, fsdp2 = ("multi_gpu.yaml", 1), ("fsdp2.yaml", gpus)
    else:  # hybrid sharding: each machine has one copy of the model
        ddp, fsdp2 = ("multi_node.yaml", 1), ("fsdp2_multi_node.yaml", gpus_per_node)
    if algorithm == "muon":  # needs unsharded matrices
        return {"ddp": ddp}
    return {
        "ddp": ddp,
        "fsdp2": fsdp2,
        "zero2": ("deepspeed_zero2.yaml", gpus),
        "zero3": ("deepspeed_zero3.yaml", gpus),
    }


def memory_by_layout(needed, layouts, train):
    """Return {layout: bytes by part, their total, and activations with and without checkpointing}."""
    found = {}
    for layout, (config, shards) in layouts.items():
        with_checkpointing, without = (
            needed(layout, shards, batch=train.batch_size, checkpointing=value) for value in (True, False)
        )
        parts = with_checkpointing if train.activation_checkpointing else without
        found[layout] = {
            "config": config,
            "shards": shards,
            **parts,
            "total": sum(parts.values()),
            "activations_without_checkpointing": without["activations"],
            "activations_with_checkpointing": with_checkpointing["activations"],
        }
    return found


def least_memory(needed, layouts, batch_size, checkpointing):
    """Return the bytes of the layout that needs the least, with other settings than the recipe's."""
    return min(
        sum(needed(layout, shards, batch=batch_size, checkpointing=checkpointing).values())
        for layout, (_, shards) in layouts.items()
    )


def find_remedy(train, gpus, least, limit):
    """Return what to change if no layout fits, in words. least: (batch_size, checkpointing) -> bytes."""
    tokens = train.batch_size * train.gradient_accumulation_steps
    for checkpointing in dict.fromkeys((train.activation_checkpointing, True)):
        switch = " activation_checkpointing=true" if checkpointing > train.activation_checkpointing else ""
        if switch and least(train.batch_size, True) <= limit:
            return f"{switch.strip()} fits"
        # the same tokens per step in smaller micro-batches
        for smaller in range(train.batch_size - 1, 0, -1):
            if tokens % (smaller * gpus) == 0 and least(smaller, checkpointing) <= limit:
                return f"batch_size={smaller} gradient_accumulation_steps={tokens // smaller}{switch} fits"
    return "more gpus (sharded by FSDP2), a larger gpu, or a smaller model or block_size"


# ---- the figures as text


def report(target, found):
    """Yield the plan as lines of text."""
    device = f"{found['gpus']} x {found['gpu']}" if found["gpu"] else f"device={found['device']}"
    yield f"{target} on {device}, mixed precision {found['mixed_precision']}"
    yield ""
    yield from size_lines(found)
    yield from scaling_lines(found)
    if found["gpu"] and found["tokens"]:
        yield from time_lines(found)
    yield (
        f"checkpoint   {found['checkpoint_bytes'] / 1e9:.3g} GB, weights and optimizer; up to "
        f"{found['checkpoints']} are kept"
    )
    yield ""
    yield from memory_lines(found)
    yield ""
    yield from launch_lines(found)
    for line in found["assumed"]:
        yield f"assumed: {line}"


def size_lines(found):
    total = found["parameters"]["total"]
    parts = ", ".join(f"{key} {n:,}" for key, n in found["parameters"].items() if n and key != "total")
    shares = ", ".join(f"{key} {share:.0%}" for key, share in flop_shares(found["forward_flops"]).items())
    yield f"parameters   {total:,}: {parts}"
    yield f"             {found['vocab_size']:,} rows of vocabulary, {found['block_size']:,} tokens of context"
    yield f"FLOPs        {found['flops_per_token']:.4g} a token, forward and backward; forward: {shares}"
    yield (
        f"step         {found['batch_size']} sequences of {found['block_size']:,} tokens x {found['micro_batches']} "
        f"micro-batch{'es' * (found['micro_batches'] > 1)} = {found['tokens_per_step']:,} tokens"
    )


def scaling_lines(found):
    if not found["tokens"]:
        yield "run          no steps: the recipe evaluates only, or max_iters=0"
        return
    epochs = f", {found['epochs']:.2f} epochs" if found["epochs"] else ""
    yield f"run          {found['steps']:,} steps, {found['tokens']:,} tokens{epochs}, {found['flops']:.3g} FLOPs"
    yield (
        f"Chinchilla   {found['tokens_per_parameter']:,.4g} tokens a parameter; compute-optimal are about 20, "
        f"{short(20 * found['parameters']['total'])} tokens (Chinchilla's approach 2: {short(found['optimal_tokens'])})"
    )
    yield (
        f"             these FLOPs would be best spent on {short(found['optimal_parameters_for_flops'])} "
        f"parameters and {short(found['optimal_tokens_for_flops'])} tokens (approach 3)"
    )


def time_lines(found):
    days = f"{found['days']:.3g} days" if found["days"] >= 1 else duration(found["days"] * 86400)
    speed = f"{found['seconds_per_step']:.3g} s a step, {found['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU"
    wire = f"; on the wire {found['exchange_seconds']:.2g} s" if found["gpus"] > 1 else ""
    yield f"time         {days}: {speed}"
    yield f"             a step computes for {found['computing_seconds']:.3g} s at an MFU of {found['mfu']:.0%}{wire}"


def memory_lines(found):
    columns = ("weights", "gradients", "optimizer", "copies", "activations", "logits", "total")
    memory = found["memory"]
    is_small = all(needed["total"] < GIB for needed in memory.values())
    unit, size = ("MiB", 2**20) if is_small else ("GiB", GIB)
    yield f"{f'{unit} a GPU' if found['gpu'] else unit:<12} " + " ".join(f"{name:>11}" for name in columns)
    for layout, needed in memory.items():
        title = TITLES[layout] if found["gpus"] > 1 else "one process"
        row = " ".join(f"{needed[name] / size:>11.2f}" for name in columns)
        yield f"{title:<12} {row}{'' if layout in found['fitting'] else '  too much'}"
    needed = next(iter(memory.values()))
    yield (
        f"activations  {needed['activations_without_checkpointing'] / size:.2f} {unit}, with "
        f"activation_checkpointing=true {needed['activations_with_checkpointing'] / size:.2f}"
    )


def launch_lines(found):
    room = f"{found['usable_memory'] / GIB:.1f} GiB (a tenth is reserved)" if found["gpu"] else ""
    if not found["config"]:
        yield f"nothing fits into {room}: {found['remedy']}"
        return
    others = ", ".join(f"configs/{found['memory'][layout]['config']}" for layout in found["fitting"][1:])
    count = f" --num_processes {found['gpus']}" if not found["gpu"] and found["gpus"] > 2 else ""
    yield (
        (f"fits into {room}: " if room else "launch with ")
        + f"configs/{found['config']}{count}"
        + (f"; also {others}" if others else "")
    )


def short(number):
    """Return a number as text with a suffix: 12.3M for 12,345,678."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def flop_shares(flops):
    """Return the shares of attention, mlp and head in the forward FLOPs."""
    total, shares = sum(flops.values()), {}
    for key, value in flops.items():
        part = key.partition("/")[0]
        shares[part] = shares.get(part, 0) + value / total
    return shares
