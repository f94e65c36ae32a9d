"""Measure how fast a recipe trains on this machine, and how long each part of a step takes.

    nanogpt-accel bench recipes/gpt2.yaml gradient_accumulation_steps=1
    nanogpt-accel bench recipes/gpt2.yaml --compare compile,loss
    accelerate launch --config_file configs/multi_gpu.yaml -m nanogpt_accel bench recipes/gpt2.yaml --profile trace.json

The steps are the same as in train.py, with the same model, optimizer, precision, batches and Accelerator. The
command does not download data or weights, and it does not evaluate or save the model.

With `--coordinate-check plot.png`, the command does not measure the speed. It measures how much the first training
steps change the activations at several widths (the coordinate check of muP).
"""

import itertools
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path

from pydantic import Field

from ..data import dataset, run_data
from ..distributed.launcher import check_launch, is_main, world_size
from ..models.shape import model_shape
from ..optim import learning_rate
from ..planning import coordinate_check
from ..planning.hardware import device_name
from ..recipe import FIELDS, SECTIONS, load_recipe
from ..training import Setup, accelerator_for, check_optimizer
from ..utils import cli
from ..utils.fields import Int, Ints, Section, Words, nearest, raise_problems, show_value
from ..utils.text import counted, printable

# the values of --compare: {axis: [(name of a variant, settings that it changes), ...]}; variants_of adds those of
# batch_size, which depend on the recipe
AXES = {
    "compile": [("eager", {"compile": False}), ("compiled", {"compile": True})],
    "attention": [("sdpa", {"attention": "sdpa"}), ("eager attention", {"attention": "eager"})],
    "loss": [("full loss", {"chunked": False}), ("chunked loss", {"chunked": True})],
    "optimizer": [("adamw", {"algorithm": "adamw"}), ("muon", {"algorithm": "muon"})],
    "batch_size": [],
}
PARTS = ("data", "forward", "backward", "optimizer")


class BenchOptions(Section):
    """The options of `bench`, in addition to the keys of a recipe."""

    steps: Int = Field(10, ge=1, description="number of measured steps; the reported times are medians over them")
    warmup: Int = Field(3, ge=1, description="number of warm-up steps before the measured steps")
    compare: Words = Field([], description=f"settings to vary: {', '.join(AXES)}; all combinations are measured")
    profile: str | None = Field(None, description="write a trace of two steps to this file; open it in ui.perfetto.dev")
    coordinate_check: str | None = Field(
        None,
        description="instead of the speed, measure how much the first training steps change the activations at several "
        "widths, with and without mup_base_width; write a plot to this file",
    )
    widths: Ints = Field(
        [],
        description="for coordinate_check: the values of n_embd to compare; n_head, n_kv_head and n_inner scale with "
        "n_embd. Default: the smallest supported width of 64 or more, and 2, 4 and 8 times this width",
    )
    json_output: bool = Field(False, alias="json", description="print one JSON object and nothing else")


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel bench RECIPE [steps=10] [--compare AXIS,...] [--profile FILE] [--coordinate-check FILE] "
            "[--json] [key=value ...]",
            "Measure a recipe's training speed on this machine: time per part of a step, tokens/s, MFU, peak memory.",
            {"options": BenchOptions, **SECTIONS},
        )
    target, options, overrides, problems = cli.parse_with_recipe(argv, BenchOptions, FIELDS)
    if target is None:
        problems.append("RECIPE is missing; usage: nanogpt-accel bench gpt2")
    for axis in options.compare:
        if axis not in AXES:
            problems.append(f"compare={axis}: unknown axis{nearest(axis, AXES)}; choose from {', '.join(AXES)}")
    if options.coordinate_check and (options.compare or options.profile):
        problems.append("coordinate_check: cannot be combined with compare or profile; run `bench` twice")
    if options.widths and not options.coordinate_check:
        fix = "remove widths; to change the width of the model, set n_embd"
        problems.append(f"widths={show_value(options.widths)}: only used with coordinate_check; {fix}")
    for key in ("profile", "coordinate_check"):
        file = getattr(options, key)
        if file and not (folder := Path(file).absolute().parent).is_dir():
            problems.append(f"{key}={file}: the folder {folder} does not exist; create it, or change {key}")
    raise_problems(problems)
    measure, describe = (check_coordinates, report_coordinates) if options.coordinate_check else (bench, report)
    recipe = load_recipe(target, overrides, check=check)
    figures = measure(recipe, options)
    if is_main():
        lines = [json.dumps({"recipe": target, **figures})] if options.json_output else describe(target, figures)
        print(printable("\n".join(lines)))


def check(recipe):
    """Check a recipe. Return a list of problems. Missing data is not a problem: `bench` then uses random tokens."""
    problems = check_launch(recipe.train.gradient_accumulation_steps) + check_optimizer(recipe.optimizer)
    if run_data.is_prepared(recipe.data):
        problems += run_data.check(recipe.data, recipe.model.block_size)
    return problems


def variants_of(recipe, axes):
    """Return [(name, changed settings), ...]: one entry for each combination of the variants of these axes.

    axes: list of keys of AXES. If it is empty, the only entry is the unchanged recipe.
    """
    size = recipe.train.batch_size
    sizes = [(f"batch_size={n}", {"batch_size": n}) for n in (size // 2, size, 2 * size) if n]
    variants = []
    for chosen in itertools.product(*(sizes if axis == "batch_size" else AXES[axis] for axis in axes)):
        settings = {key: value for _, changes in chosen for key, value in changes.items()}
        variants.append((", ".join(name for name, _ in chosen) or "recipe", settings))
    return variants


def find_data(recipe):
    """Return (training tokens by source, vocabulary size, id of the end-of-text token, description of the data)."""
    data = recipe.data
    if run_data.is_prepared(data):
        prepared = run_data.open_run_data(recipe, recipe.model.block_size)
        tokenizer, folders = prepared.tokenizer, [str(source.folder) for source in prepared.sources.values()]
        return prepared.train, tokenizer.vocab_size, tokenizer.eot_id, ", ".join(folders)
    first, *others = run_data.sections(data).values()
    vocab_size = dataset.guess_vocab_size(first, [])
    missing = f"{dataset.data_folder(first)} is" if not others else "some of the sources are"
    source = f"random tokens, vocabulary size {vocab_size:,} ({missing} not prepared)"
    return dict.fromkeys(data.sources, RandomTokens(vocab_size)), vocab_size, vocab_size - 1, source


class RandomTokens:
    """A million random token ids, with the interface of TokenFile."""

    def __init__(self, vocab_size):
        import numpy as np

        self._ids = np.random.default_rng(0).integers(0, vocab_size, 2**20)

    def __len__(self):
        return len(self._ids)

    def rows(self, starts, length):
        return self._ids[starts[:, None] + range(length)]


def find_config(recipe, vocab_size):
    """Return the GPTConfig of the recipe's model, without loading pretrained weights."""
    from ..model import GPTConfig

    others = {key: getattr(recipe.model, key) for key in ("dropout", "initializer_range", "zero_init")}
    return GPTConfig(**model_shape(recipe, vocab_size), **others)


def bench(recipe, options):
    """Run the benchmark and return its results as a dictionary, in seconds, bytes and tokens per second.

    Raises:
        ValueError: a setting of the recipe is not supported on this machine.
    """
    tokens, vocab_size, eot_id, source = find_data(recipe)

    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    config = find_config(recipe, vocab_size)
    variants = [Variant(recipe, config, tokens, eot_id, *variant) for variant in variants_of(recipe, options.compare)]
    for variant in variants:
        for _ in range(options.warmup):
            variant.step()
    times = {variant: [] for variant in variants}
    for _ in range(options.steps):  # alternate, so that the load of other programs affects all variants equally
        for variant in variants:
            times[variant].append(variant.step())
    figures = [figures_of(variant, times[variant]) for variant in variants]
    for line in figures:
        line["ratio"] = line["tokens_per_second"] / figures[0]["tokens_per_second"]
    first = variants[0]
    if options.profile:
        first.profile(options.profile)
    accelerator = first.setup.accelerator
    return {
        "device": device_name(first.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "mixed_precision": accelerator.mixed_precision,
        "data": source,
        "steps": options.steps,
        "warmup": options.warmup,
        "parameters": first.setup.num_parameters,
        "flops_per_token": first.setup.flops_per_token,
        "block_size": config.block_size,
        "micro_batches": recipe.train.gradient_accumulation_steps,
        "profile": options.profile,
        "variants": figures,
    }


def figures_of(variant, steps):
    """Return the results of a variant as a dictionary. steps: the results of Variant.step, one per measured step."""
    setup = variant.setup
    speeds = [setup.tokens_per_step / step["total"] for step in steps]
    speed, peak = statistics.median(speeds), setup.peak_flops
    return {
        "name": variant.name,
        "settings": {key: str(value) for key, value in variant.settings.items()},
        "batch_size": setup.recipe.train.batch_size,
        "tokens_per_step": setup.tokens_per_step,
        "seconds": {part: statistics.median(step[part] for step in steps) for part in (*PARTS, "total")},
        "tokens_per_second": speed,
        "slowest": min(speeds),
        "fastest": max(speeds),
        "mfu": setup.flops_per_token * speed / (peak * setup.accelerator.num_processes) if peak else None,
        "peak_memory": variant.peak_memory(),
    }


class Variant:
    """A model that is trained to measure the time of each part of a step.

    settings: {key: value} for the settings that differ from the recipe.
    """

    def __init__(self, recipe, config, tokens, eot_id, name, settings):
        import torch

        from ..distributed import sharding
        from ..model import GPT

        self.name, self.settings, self.number = name, settings, 0
        changed = {key: settings[key] for key in ("compile", "algorithm", "batch_size") if key in settings}
        recipe = recipe.replace(trackers=[], **changed)
        accelerator = accelerator_for(recipe)
        torch.manual_seed(recipe.seed)
        sharding.disable_zero3_init(accelerator)
        self.setup = Setup(recipe, accelerator, GPT(config), tokens, eot_id)
        model, self.device = self.setup.raw_model, accelerator.device
        if "chunked" in settings:  # at least four chunks, so that small models use the chunked loss too
            n_logits = recipe.train.batch_size * config.block_size * config.vocab_size
            model.largest_logits = min(2**27, n_logits / 4) if settings["chunked"] else math.inf
        if "attention" in settings:
            model.set_attn_implementation(settings["attention"])
        self.setup.model.train()
        self.inputs = self.setup.fetch(0, 0)

    def step(self):
        """Run one step as in train.py. Return {part: seconds}, with the time of the whole step as "total".

        On CUDA, the CPU loads the data while the GPU computes, so the sum of the parts can be more than the total.
        """
        setup, accelerator, recipe, step = self.setup, self.setup.accelerator, self.setup.recipe, self.number
        marks, data_seconds = [], 0.0
        self.synchronize()
        step_start = time.perf_counter()
        lr = learning_rate(step, **recipe.lr_schedule)
        for group in setup.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        for micro_step in range(setup.micro_steps):
            with accelerator.accumulate(setup.model):
                setup.seed_dropout(step, micro_step)
                start = self.mark()
                loss = setup.model(**self.inputs, return_logits=False).loss
                forward = self.mark()
                data_start = time.perf_counter()
                self.inputs = setup.fetch(step, micro_step + 1)
                data_seconds += time.perf_counter() - data_start
                backward = self.mark()
                accelerator.backward(loss)
                marks.append((start, forward, backward, self.mark()))
        update = self.mark()
        accelerator.clip_grad_norm_(setup.model.parameters(), recipe.optimizer.grad_clip or math.inf)
        setup.optimizer.step()
        setup.optimizer.zero_grad()
        end = self.mark()
        self.synchronize()
        self.number += 1
        return {
            "data": data_seconds,
            "forward": sum(between(start, forward) for start, forward, _, _ in marks),
            "backward": sum(between(backward, stop) for _, _, backward, stop in marks),
            "optimizer": between(update, end),
            "total": time.perf_counter() - step_start,
        }

    def mark(self):
        """Return a timestamp: an event on CUDA, the current time on other devices."""
        import torch

        if self.device.type != "cuda":  # timed events can hang on MPS (pytorch/pytorch#196395)
            self.synchronize()
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event

    def synchronize(self):
        """Wait until the device has finished its work."""
        import torch

        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def peak_memory(self):
        """Run one more step and return its peak memory in bytes, or None on MPS, which does not report it."""
        import torch

        if self.device.type == "mps":
            return None
        storages = {}  # weights, buffers and optimizer state, which are kept between steps
        state = [value for fields in self.setup.optimizer.state.values() for value in fields.values()]
        for tensor in (*self.setup.model.parameters(), *self.setup.model.buffers(), *state):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device.type:
                local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
        kept = sum(storages.values())
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)  # includes the memory of other variants
            self.step()
            return kept + torch.cuda.max_memory_allocated(self.device) - before
        # the CPU allocator has no statistics, but the profiler records each allocation
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            self.profile(file, steps=1, profile_memory=True)
            events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
        memory = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
        return kept + max(itertools.accumulate((n_bytes for _, n_bytes in memory), initial=0))

    def profile(self, file, steps=2, profile_memory=False):
        """Run `steps` more steps and write a Chrome trace of them."""
        import torch
        from torch.profiler import ProfilerActivity

        # hide the messages that the profiler's C++ code logs at level 5 whenever it starts or stops
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        with torch.profiler.profile(activities=activities, profile_memory=profile_memory) as profiler:
            for _ in range(steps):
                self.step()
        if self.setup.accelerator.is_main_process:
            profiler.export_chrome_trace(str(file))


def between(start, end):
    """Return the seconds between two results of Variant.mark."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def report(target, figures):
    """Yield the results of `bench` as lines of text. target: path of the recipe."""
    threads = f", {figures['threads']} threads" if figures["device"] == "CPU" else ""
    yield (
        f"{target} on {figures['processes']} x {figures['device']}, mixed precision {figures['mixed_precision']}, "
        f"torch {figures['torch']}{threads}"
    )
    yield f"data: {figures['data']}"
    sizes = f"block_size={figures['block_size']}, gradient_accumulation_steps={figures['micro_batches']}"
    steps = f"medians of {figures['steps']} steps after {figures['warmup']} warm-up steps, in ms"
    yield f"{figures['parameters']:,} parameters, {sizes}; {steps}\n"
    width = max(len(line["name"]) for line in figures["variants"])
    yield (
        f"{'':<{width}} {'data':>9} {'forward':>9} {'backward':>9} {'optimizer':>9} {'total':>9} {'tokens/s':>11} "
        f"{'slowest ... fastest':>19} {'MFU':>6} {'peak MB':>9} {'ratio':>6}"
    )
    for line in figures["variants"]:
        parts = " ".join(f"{line['seconds'][part] * 1e3:>9.2f}" for part in (*PARTS, "total"))
        spread = f"{line['slowest']:,.0f} ... {line['fastest']:,.0f}"
        mfu = f"{line['mfu']:.1%}" if line["mfu"] else "-"
        peak = f"{line['peak_memory'] / 1e6:,.0f}" if line["peak_memory"] else "-"
        yield (
            f"{line['name']:<{width}} {parts} {line['tokens_per_second']:>11,.0f} {spread:>19} {mfu:>6} {peak:>9} "
            f"{line['ratio']:>6.2f}"
        )
    if figures["profile"]:
        yield f"\n{figures['profile']}: open it at ui.perfetto.dev"


# ---- the coordinate check


def smallest_width(model):
    """Return the smallest n_embd to which the model can be scaled: n_head, n_kv_head and n_inner are scaled by the same
    factor and must be integers.

    model: the model section of a recipe.
    """
    return model.n_embd // math.gcd(model.n_embd, model.n_head, model.n_kv_head or 0, model.n_inner or 0)


def at_width(recipe, width):
    """Return the recipe with n_embd=width. n_head, n_kv_head and n_inner scale with n_embd; head_dim does not change.

    width: a multiple of smallest_width(recipe.model).
    """
    sizes = {key: getattr(recipe.model, key) for key in ("n_head", "n_kv_head", "n_inner")}
    sizes = {key: size and size * width // recipe.model.n_embd for key, size in sizes.items()}
    return recipe.replace(**sizes, n_embd=width, head_dim=recipe.shape["head_dim"])


def check_coordinates(recipe, options):
    """Run the coordinate check, and return its results as a dictionary.

    Train the recipe's model for a few steps at several widths, with and without mup_base_width, and write a plot of the
    activations and of their changes.

    Raises:
        ValueError: a setting is not supported.
    """
    model, smallest = recipe.model, smallest_width(recipe.model)
    first = smallest * math.ceil(64 / smallest)
    widths = sorted(set(options.widths)) or [first, 2 * first, 4 * first, 8 * first]
    problems = []
    if len(widths) < 2 or any(width < 1 or width % smallest for width in widths):
        fix = f"set at least two multiples of {smallest}, so that n_head and n_inner can scale with the width"
        problems.append(f"widths={show_value(widths)}: {fix}")
    if not run_data.is_prepared(recipe.data):
        problem = f"coordinate_check={options.coordinate_check}: the data are not prepared"
        problems.append(f"{problem}, and a model learns nothing from random tokens; run `nanogpt-accel prepare` first")
    if model.tie_word_embeddings and not model.norm_weight:
        problem = "model.tie_word_embeddings=true: muP with tied embeddings requires a final norm with a weight"
        problems.append(f"{problem}; set norm_weight=true or tie_word_embeddings=false")
    if world_size() > 1:
        problems.append("coordinate_check: runs in a single process; start it without accelerate launch")
    raise_problems(problems)

    # in float32, because rounding to bfloat16 also changes activations
    settings = {"schedule": "constant", "warmup_iters": 0, "mixed_precision": "no", "compile": False}
    recipe = recipe.replace(init_from="scratch", **settings)
    tokens, vocab_size, eot_id, source = find_data(recipe)
    base, results = model.mup_base_width or widths[0], {}
    for name, base_width in (("standard", None), ("muP", base)):
        results[name] = {}
        for width in widths:
            wide = at_width(recipe, width).replace(mup_base_width=base_width)
            variant = Variant(wide, find_config(wide, vocab_size), tokens, eot_id, name, {})
            arguments = variant.setup.raw_model, variant.inputs, variant.step, options.steps
            results[name][width] = coordinate_check.measure(*arguments)
    coordinate_check.plot(results, widths, options.coordinate_check)
    rows = []
    for name, by_width in results.items():
        for kind in coordinate_check.KINDS:
            changes = list(zip(*(by_width[width][kind] for width in widths), strict=True))[1:]
            slopes = [coordinate_check.slope(widths, sizes) for sizes in changes]
            rows.append({"name": name, "activations": kind, "changes": changes, "slopes": slopes})
    options = {"plot": options.coordinate_check, "steps": options.steps, "widths": widths, "mup_base_width": base}
    return {**options, "data": source, "rows": rows}


def report_coordinates(target, figures):
    """Yield the results of check_coordinates as lines of text. target: path of the recipe."""
    steps = figures["steps"]
    yield f"{target}: RMS of the change of the activations after {counted(steps, 'step')}, in float32"
    yield f"data: {figures['data']}; muP: mup_base_width={figures['mup_base_width']}\n"
    widths = "".join(f"{f'n_embd {width}':>13}" for width in figures["widths"])
    yield f"{'':<25}{widths}{'slope':>9}{'after 1 step':>15}"
    for row in figures["rows"]:
        changes = "".join(f"{size:>13.3g}" for size in row["changes"][-1])
        slopes = f"{row['slopes'][-1]:>9.2f}{row['slopes'][0]:>15.2f}"
        yield f"{row['name']:<9}{row['activations']:<16}{changes}{slopes}"
    yield "\nslope of log(change) over log(n_embd). 0: same change at all widths; 1: change proportional to the width"
    yield f"plot: {figures['plot']}"
