"""What a run needs before it costs anything: parameters, FLOPs, memory, time, and which of configs/ fits.

    nanogpt-accel plan recipes/gpt2.yaml gpus=8 gpu=a100 mfu=0.37
    nanogpt-accel plan recipes/gpt2.yaml n_layer=48 n_head=25 n_embd=1600 gpus=64 --json

Arithmetic on the recipe (sizing.py), so it answers at once and needs neither torch, data nor a GPU.
"""

import json
import re
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from ..data import dataset
from ..planning import sizing
from ..planning.hardware import GPU_MEMORY, PEAK_FLOPS
from ..recipe import FIELDS, SETTINGS, load_recipe
from ..utils import cli
from ..utils.fields import Float, Int, nearest
from ..utils.text import duration

GIB = 2**30
RESERVE = 0.1  # share of a GPU's memory for CUDA itself, the kernels' work space and fragments
SMALL = 50e6  # parameters below which a GPU waits for its next kernel more than it computes
NO_BF16 = ("V100", "T4")
# bytes a second of one GPU to the others: NVLink 4 in one machine, 400 Gb/s InfiniBand between machines
NVLINK, INFINIBAND = 450e9, 50e9
# training tokens of what is not prepared here: nanoGPT's counts (data/*/readme.md), at the recipes' val_fraction
TRAIN_TOKENS = {
    ("openwebtext", "gpt2"): 9_035_582_198,
    ("shakespeare", "gpt2"): 301_966,
    ("shakespeare", "char"): 1_003_854,
}
TITLES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}


class PlanOptions(BaseModel):
    """The options of `plan` itself; every key of a recipe can be given too."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpus: Int = Field(1, ge=1, description="how many")
    gpus_per_node: Int = Field(8, ge=1, description="GPUs of one machine")
    gpu: str = Field(
        "", description=f"{', '.join(PEAK_FLOPS)}; empty: H100, or none where the recipe's device is no GPU"
    )
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
    if problems:
        raise ValueError("\n".join(problems))
    recipe = load_recipe(target, given, check=lambda recipe: check(recipe, options))
    found = plan(recipe, options)
    print(json.dumps({"recipe": target, **found}) if options.json_output else "\n".join(report(target, found)))


def check(recipe, options):
    """What stands in the way of the launch: a list of problems."""
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
    """(its name in the table or None, problems). None: the recipe's device is no GPU of the table."""
    if not options.gpu:
        return (None if recipe.train.device in ("cpu", "mps") else "H100"), []
    names = {plain(name): name for name in PEAK_FLOPS}
    if plain(options.gpu) in names:
        return names[plain(options.gpu)], []
    return None, [
        f"gpu={options.gpu}: not in the table{nearest(plain(options.gpu), names)}; there are {', '.join(PEAK_FLOPS)}"
    ]


def plain(name):
    """A GPU's name as people type it: rtx4090 for RTX 4090."""
    return re.sub(r"[\s_-]", "", name.lower())


def plan(recipe, options):
    """All figures of a run as one dictionary of plain values; bytes, seconds and FLOPs where the key does not say."""
    assumed = []
    shape, train_tokens = find_shape(recipe, assumed)
    gpu, _ = find_gpu(recipe, options)
    train, algorithm = recipe.train, recipe.optimizer.algorithm
    precision = pick_precision(train.mixed_precision, gpu)
    if gpu and precision == "no":
        assumed.append("the peak is that of half precision; mixed_precision=no stays far below it")
    if gpu is None and train.mixed_precision == "auto" and train.device != "mps":
        assumed.append("a CPU without AMX, which trains in float32; one with AMX takes bf16, and less memory")
    if train.activation_checkpointing:
        assumed.append("mfu counts no FLOPs twice, but the blocks are computed again, a third more: state a lower one")

    parts = sizing.parameters(shape)
    n_params = sum(parts.values())
    if gpu and n_params < SMALL:
        assumed.append(
            f"mfu={options.mfu:g}, which so small a model does not reach: nanoGPT's shakespeare_char, 3 "
            "minutes on an A100, had about 0.1"
        )
    flops_per_token = sizing.flops_per_token(
        sizing.num_matmul_params(shape), shape["n_layer"], shape["n_head"] * shape["head_dim"], shape["block_size"]
    )
    tokens_per_step = train.gradient_accumulation_steps * train.batch_size * shape["block_size"]
    max_iters = 0 if train.eval_only else train.max_iters
    tokens = max_iters * tokens_per_step
    flops = tokens * flops_per_token
    optimal = sizing.optimal_size(flops) if flops else (0, 0)

    size = {
        "half": precision != "no",
        "algorithm": algorithm,
        "cpu": gpu is None,
        "dropout": recipe.model.dropout,
        "trains": not train.eval_only,
    }
    layouts = find_layouts(options.gpus, options.gpus_per_node, algorithm, gpu, train.device)

    def needed(layout, batch_size, checkpointing):
        return sizing.memory(
            shape, layout, layouts[layout][1], options.gpus, batch=batch_size, checkpointing=checkpointing, **size
        )

    memory = {}
    for layout, (config, shards) in layouts.items():
        bytes_by_part = needed(layout, train.batch_size, train.activation_checkpointing)
        exchange = sizing.exchange_seconds(
            shape,
            layout,
            shards,
            options.gpus,
            micro_steps=train.gradient_accumulation_steps // options.gpus,
            half=size["half"],
            machine=options.gpus_per_node,
            near=NVLINK,
            far=INFINIBAND,
        )
        memory[layout] = {
            "config": config,
            "shards": shards,
            **bytes_by_part,
            "total": sum(bytes_by_part.values()),
            "exchange_seconds": exchange if gpu else None,
            "activations_without_checkpointing": needed(layout, train.batch_size, False)["activations"],
            "activations_with_checkpointing": needed(layout, train.batch_size, True)["activations"],
        }
    limit = (options.gpu_memory or GPU_MEMORY[gpu]) * GIB * (1 - RESERVE) if gpu else None
    fitting = [layout for layout in layouts if limit is None or memory[layout]["total"] <= limit]

    # the exchange goes on beside the computing, so at best the longer one of the two counts
    computing = exchange = seconds = None
    if gpu:
        computing = tokens_per_step * flops_per_token / (options.mfu * PEAK_FLOPS[gpu] * options.gpus)
        exchange = memory[fitting[0] if fitting else next(iter(layouts))]["exchange_seconds"]
        seconds = max(computing, exchange)

    def least(batch_size, checkpointing):
        """Bytes of the leanest layout with other settings."""
        return min(sum(needed(layout, batch_size, checkpointing).values()) for layout in layouts)

    return {
        "gpu": gpu,
        "device": train.device,
        "gpus": options.gpus,
        "mfu": options.mfu,
        "mixed_precision": precision,
        "usable_memory": limit,
        "assumed": assumed,
        "vocab_size": shape["vocab_size"],
        "block_size": shape["block_size"],
        "batch_size": train.batch_size,
        "parameters": {**parts, "total": n_params},
        "flops_per_token": flops_per_token,
        "forward_flops": sizing.forward_flops(shape),
        "flops": flops,
        "micro_batches": train.gradient_accumulation_steps,
        "tokens_per_step": tokens_per_step,
        "steps": max_iters,
        "tokens": tokens,
        "train_tokens": train_tokens,
        "epochs": tokens / train_tokens if train_tokens else None,
        "tokens_per_parameter": tokens / n_params,
        "optimal_tokens": sizing.optimal_tokens(n_params),
        "optimal_parameters_for_flops": optimal[0],
        "optimal_tokens_for_flops": optimal[1],
        "checkpoint_bytes": sizing.checkpoint_bytes(shape, algorithm),
        "checkpoints": recipe.checkpoint.keep_last + 1,
        "computing_seconds": computing,
        "exchange_seconds": exchange,
        "seconds_per_step": seconds,
        "tokens_per_second_per_gpu": tokens_per_step / options.gpus / seconds if gpu else None,
        "days": max_iters * seconds / 86400 if gpu else None,
        "memory": memory,
        "fitting": fitting,
        "activation_checkpointing": train.activation_checkpointing,
        "config": layouts[fitting[0]][0] if fitting else None,
        "remedy": None if fitting else find_remedy(recipe, options.gpus, least, limit),
    }


def find_shape(recipe, assumed):
    """(the model's shape, training tokens or None). What is not known here is put into `assumed` in words.

    Raises:
        ValueError: the shape comes with weights that are not here.
    """
    data, init_from = recipe.data, recipe.model.init_from
    vocab_size = train_tokens = None
    if dataset.is_prepared(data):
        manifest = dataset.read_manifest(dataset.data_folder(data))
        vocab_size = manifest["tokenizer"]["vocab_size"]
        train_tokens = manifest["splits"]["train"]["tokens"]
    else:
        train_tokens = TRAIN_TOKENS.get((data.corpus, data.tokenizer)) if not data.limit_documents else None
        if train_tokens:
            assumed.append(f"{train_tokens:,} training tokens, nanoGPT's count for {data.corpus}")
            train_tokens = min(train_tokens, data.limit_tokens or train_tokens)
    if init_from in ("scratch", "resume"):
        if vocab_size is None:
            vocab_size = dataset.guess_vocab_size(data, assumed)
        multiple = recipe.model.pad_vocab_to_multiple_of
        return {**recipe.shape, "vocab_size": -(-vocab_size // multiple) * multiple}, train_tokens
    if init_from in sizing.GPT2_SHAPES:
        shape = sizing.GPT2_SHAPES[init_from]
    else:
        from ..models.find import find_model
        from ..models.load import read_config

        if not Path(init_from).is_dir():
            raise ValueError(
                f"model.init_from={init_from}: the shape comes with these weights, which are not here; "
                "give their folder, or init_from=scratch with n_layer, n_head, n_embd"
            )
        shape = read_config(find_model(init_from))
    return {**shape, "block_size": recipe.model.block_size}, train_tokens


def pick_precision(mixed_precision, gpu):
    """What `auto` will mean on this GPU (launch.pick_precision asks the real one)."""
    if mixed_precision != "auto":
        return mixed_precision
    return "no" if gpu is None else "fp16" if gpu in NO_BF16 else "bf16"


def find_layouts(gpus, gpus_per_node, algorithm, gpu, device):
    """{layout: (file in configs/, processes that share)}, the simplest first."""
    if gpu is None:
        return {"ddp": ("mps.yaml" if device == "mps" else "cpu.yaml" if gpus == 1 else "cpu_2proc.yaml", 1)}
    if gpus == 1:
        return {"ddp": ("single_gpu.yaml", 1)}
    if gpus <= gpus_per_node:
        ddp, fsdp2 = ("multi_gpu.yaml", 1), ("fsdp2.yaml", gpus)
    else:  # hybrid sharding: a machine shares one copy of the model
        ddp, fsdp2 = ("multi_node.yaml", 1), ("fsdp2_multi_node.yaml", gpus_per_node)
    if algorithm == "muon":  # it works on whole matrices
        return {"ddp": ddp}
    return {
        "ddp": ddp,
        "fsdp2": fsdp2,
        "zero2": ("deepspeed_zero2.yaml", gpus),
        "zero3": ("deepspeed_zero3.yaml", gpus),
    }


def find_remedy(recipe, gpus, least, limit):
    """What to change where no layout fits, in words. least: (batch_size, checkpointing) -> bytes."""
    batch_size, micro_batches = recipe.train.batch_size, recipe.train.gradient_accumulation_steps
    for checkpointing in dict.fromkeys((recipe.train.activation_checkpointing, True)):
        switch = " activation_checkpointing=true" if checkpointing > recipe.train.activation_checkpointing else ""
        if switch and least(batch_size, True) <= limit:
            return f"{switch.strip()} fits"
        # the same tokens a step in smaller micro-batches
        for smaller in range(batch_size - 1, 0, -1):
            if batch_size * micro_batches % (smaller * gpus) == 0 and least(smaller, checkpointing) <= limit:
                return (
                    f"batch_size={smaller} gradient_accumulation_steps={batch_size * micro_batches // smaller}"
                    f"{switch} fits"
                )
    return "more gpus (sharded by FSDP2), a larger gpu, or a smaller model or block_size"


def report(target, found):
    """The plan as lines of text."""
    parts = dict(found["parameters"])
    total = parts.pop("total")
    device = f"{found['gpus']} x {found['gpu']}" if found["gpu"] else f"device={found['device']}"
    yield f"{target} on {device}, mixed precision {found['mixed_precision']}"
    yield ""
    yield f"parameters   {total:,}: " + ", ".join(f"{key} {n:,}" for key, n in parts.items() if n)
    yield f"             {found['vocab_size']:,} rows of vocabulary, {found['block_size']:,} tokens of context"
    yield (
        f"FLOPs        {found['flops_per_token']:.4g} a token, forward and backward; forward: "
        + ", ".join(f"{key} {share:.0%}" for key, share in flop_shares(found["forward_flops"]).items())
    )
    yield (
        f"step         {found['batch_size']} sequences of {found['block_size']:,} tokens x {found['micro_batches']} "
        f"micro-batch{'es' * (found['micro_batches'] > 1)} = {found['tokens_per_step']:,} tokens"
    )
    if found["tokens"]:
        epochs = f", {found['epochs']:.2f} epochs" if found["epochs"] else ""
        yield f"run          {found['steps']:,} steps, {found['tokens']:,} tokens{epochs}, {found['flops']:.3g} FLOPs"
        yield (
            f"Chinchilla   {found['tokens_per_parameter']:,.4g} tokens a parameter; compute-optimal are about 20, "
            f"{short(20 * total)} tokens (Chinchilla's approach 2: {short(found['optimal_tokens'])})"
        )
        yield (
            f"             these FLOPs would be best spent on {short(found['optimal_parameters_for_flops'])} "
            f"parameters and {short(found['optimal_tokens_for_flops'])} tokens (approach 3)"
        )
    else:
        yield "run          no steps: the recipe evaluates only, or max_iters=0"
    if found["gpu"] and found["tokens"]:
        days = found["days"]
        yield (
            f"time         {f'{days:.3g} days' if days >= 1 else duration(days * 86400)}: "
            f"{found['seconds_per_step']:.3g} s a step, "
            f"{found['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU"
        )
        wire = f"; on the wire {found['exchange_seconds']:.2g} s" if found["gpus"] > 1 else ""
        yield (
            f"             a step computes for {found['computing_seconds']:.3g} s at an MFU of {found['mfu']:.0%}"
            + wire
        )
    yield (
        f"checkpoint   {found['checkpoint_bytes'] / 1e9:.3g} GB, weights and optimizer; up to "
        f"{found['checkpoints']} are kept"
    )
    yield ""
    columns = ("weights", "gradients", "optimizer", "copies", "activations", "logits", "total")
    is_small = all(needed["total"] < GIB for needed in found["memory"].values())
    unit, size = ("MiB", 2**20) if is_small else ("GiB", GIB)
    yield f"{f'{unit} a GPU' if found['gpu'] else unit:<12} " + " ".join(f"{name:>11}" for name in columns)
    for layout, needed in found["memory"].items():
        title = TITLES[layout] if found["gpus"] > 1 else "one process"
        yield (
            f"{title:<12} "
            + " ".join(f"{needed[name] / size:>11.2f}" for name in columns)
            + ("" if layout in found["fitting"] else "  too much")
        )
    needed = next(iter(found["memory"].values()))
    yield (
        f"activations  {needed['activations_without_checkpointing'] / size:.2f} {unit}, with "
        f"activation_checkpointing=true {needed['activations_with_checkpointing'] / size:.2f}"
    )
    yield ""
    room = f"{found['usable_memory'] / GIB:.1f} GiB (a tenth is reserved)" if found["gpu"] else ""
    if found["config"]:
        others = [f"configs/{found['memory'][layout]['config']}" for layout in found["fitting"][1:]]
        count = f" --num_processes {found['gpus']}" if not found["gpu"] and found["gpus"] > 2 else ""
        yield (
            (f"fits into {room}: " if room else "launch with ")
            + f"configs/{found['config']}{count}"
            + (f"; also {', '.join(others)}" if others else "")
        )
    else:
        yield f"nothing fits into {room}: {found['remedy']}"
    for line in found["assumed"]:
        yield f"assumed: {line}"


def short(number):
    """12.3M for 12,345,678."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def flop_shares(flops):
    """Shares of attention, mlp and head in the forward FLOPs."""
    total, shares = sum(flops.values()), {}
    for key, value in flops.items():
        part = key.partition("/")[0]
        shares[part] = shares.get(part, 0) + value / total
    return shares


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
