"""How fast a recipe trains here, and where the time of a step goes.

    nanogpt-accel bench recipes/gpt2.yaml gradient_accumulation_steps=1
    nanogpt-accel bench recipes/gpt2.yaml --compare compile,loss
    accelerate launch --config_file configs/multi_gpu.yaml -m nanogpt_accel bench recipes/gpt2.yaml --profile trace.json

The steps are those of train.py: the same model, optimizer, precision and batches, prepared by the same Accelerator.
Nothing is downloaded, evaluated or saved.
"""

import itertools
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

from pydantic import Field

from ..data import dataset
from ..distributed.launcher import check_launch, is_main
from ..models.shape import model_shape
from ..optim import learning_rate
from ..planning.hardware import device_name
from ..recipe import FIELDS, SECTIONS, load_recipe
from ..training import Setup, accelerator_for
from ..utils import cli
from ..utils.fields import Int, Section, Words, nearest, raise_problems

# axis -> what its variants change, as (word, {key of the recipe or of Variant: value}); batch_size: see variants_of
AXES = {
    "compile": [("eager", {"compile": False}), ("compiled", {"compile": True})],
    "attention": [("sdpa", {"attention": "sdpa"}), ("eager attention", {"attention": "eager"})],
    "loss": [("loss at once", {"in_pieces": False}), ("loss in pieces", {"in_pieces": True})],
    "optimizer": [("adamw", {"algorithm": "adamw"}), ("muon", {"algorithm": "muon"})],
    "batch_size": [],
}
PARTS = ("data", "forward", "backward", "optimizer")


class BenchOptions(Section):
    """The options of `bench` itself; every key of a recipe can be given too."""

    steps: Int = Field(10, ge=1, description="steps that count; the medians are over these")
    warmup: Int = Field(3, ge=1, description="steps before them, which compile and reserve memory")
    compare: Words = Field(
        [], description=f"run variants in turn, a step each: {', '.join(AXES)}; of several, every combination"
    )
    profile: str | None = Field(
        None, description="write a trace of two more steps of the first variant to this file, for ui.perfetto.dev"
    )
    json_output: bool = Field(False, alias="json", description="print one JSON object and nothing else")


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel bench RECIPE.yaml [steps=10] [--compare AXIS,...] [--profile FILE] [--json] [key=value ...]",
            "Time of a step by part, tokens/s, MFU and peak memory of a recipe on this machine.",
            {"options": BenchOptions, **SECTIONS},
        )
    target, options, given, problems = cli.parse_with_recipe(argv, BenchOptions, FIELDS)
    if target is None:
        problems.append("what to time? nanogpt-accel bench RECIPE.yaml, such as recipes/gpt2.yaml")
    for axis in options.compare:
        if axis not in AXES:
            problems.append(f"compare={axis}: not an axis{nearest(axis, AXES)}; there are {', '.join(AXES)}")
    if options.profile and not Path(options.profile).absolute().parent.is_dir():
        problems.append(f"profile={options.profile}: no such folder; make it, or give another file")
    raise_problems(problems)
    recipe = load_recipe(target, given, check=check)
    found = bench(recipe, options)
    if is_main():
        print(json.dumps({"recipe": target, **found}) if options.json_output else "\n".join(report(target, found)))


def check(recipe):
    """What stands in the way: a list of problems. The corpus may be missing, as random tokens take as long."""
    problems = check_launch(recipe.train.gradient_accumulation_steps)
    if dataset.is_prepared(recipe.data):
        problems += dataset.check(recipe.data, recipe.model.block_size)
    return problems


def variants_of(recipe, axes):
    """[(name, settings)] of every combination of the axes' variants; one without a name where there are no axes."""
    half, same, twice = recipe.train.batch_size // 2, recipe.train.batch_size, 2 * recipe.train.batch_size
    sizes = [(f"batch_size={size}", {"batch_size": size}) for size in (half, same, twice) if size]
    found = []
    for chosen in itertools.product(*(sizes if axis == "batch_size" else AXES[axis] for axis in axes)):
        settings = {key: value for _, changes in chosen for key, value in changes.items()}
        found.append((", ".join(word for word, _ in chosen) or "as the recipe says", settings))
    return found


def find_data(recipe):
    """Return (tokens, vocabulary size and end-of-text token of the tokenizer, description of the tokens' source)."""
    data = recipe.data
    if dataset.is_prepared(data):
        found = dataset.open_dataset(data)
        tokens, where = found.train, str(found.folder)
        vocab_size, eot_id = found.tokenizer.vocab_size, found.tokenizer.eot_id
    else:
        vocab_size = dataset.guess_vocab_size(data, [])
        tokens, eot_id = RandomTokens(vocab_size), vocab_size - 1
        where = f"random tokens of {vocab_size:,} symbols ({dataset.data_folder(data)} is not prepared)"
    return tokens, vocab_size, eot_id, where


class RandomTokens:
    """A million random ids, in place of a token file."""

    def __init__(self, vocab_size):
        import numpy as np

        self._ids = np.random.default_rng(0).integers(0, vocab_size, 2**20)

    def __len__(self):
        return len(self._ids)

    def rows(self, starts, length):
        return self._ids[starts[:, None] + range(length)]


def find_config(recipe, vocab_size):
    """Return the GPTConfig of the recipe's model; of pretrained weights only the shape counts here."""
    from ..model import GPTConfig

    return GPTConfig(**model_shape(recipe, vocab_size), dropout=recipe.model.dropout)


def bench(recipe, options):
    """Return all figures as one dictionary of plain values: seconds, bytes, tokens per second.

    Raises:
        ValueError: something in the recipe cannot be done here.
    """
    tokens, vocab_size, eot_id, where = find_data(recipe)

    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    config = find_config(recipe, vocab_size)
    variants = [
        Variant(recipe, config, tokens, eot_id, name, settings)
        for name, settings in variants_of(recipe, options.compare)
    ]
    for variant in variants:
        for _ in range(options.warmup):
            variant.step()
    seconds = {variant: [] for variant in variants}
    for _ in range(options.steps):  # alternate, so that other load on the machine affects all variants
        for variant in variants:
            seconds[variant].append(variant.step())
    first = variants[0]
    figures = [figures_of(variant, seconds[variant]) for variant in variants]
    for one in figures:
        one["ratio"] = one["tokens_per_second"] / figures[0]["tokens_per_second"]
    if options.profile:
        first.profile(options.profile)
    accelerator = first.setup.accelerator
    return {
        "device": device_name(first.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "mixed_precision": accelerator.mixed_precision,
        "data": where,
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
    """Return the figures of a variant. steps: what its `step` returned, one per step."""
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
    """A model and what trains it, made by training.Setup; `step` does one step and times its parts."""

    def __init__(self, recipe, config, tokens, eot_id, name, settings):
        """settings: what differs from the recipe, see AXES."""
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
        if "in_pieces" in settings:  # several chunks, also if the model's rule makes one
            n_logits = recipe.train.batch_size * config.block_size * config.vocab_size
            model.largest_logits = min(2**27, n_logits / 4) if settings["in_pieces"] else math.inf
        if "attention" in settings:
            model.set_attn_implementation(settings["attention"])
        self.setup.model.train()
        self.inputs = self.setup.fetch(0, 0)

    def step(self):
        """Make one step in the order of train.py's loop; return seconds by part, and in total.

        On CUDA the parts are the device's time. Data are read while the device works, so their part is the processor's
        time, and the total is less than the sum.
        """
        setup, accelerator, recipe, step = self.setup, self.setup.accelerator, self.setup.recipe, self.number
        marks, reading = [], 0.0
        self.synchronize()
        started = time.perf_counter()
        lr = learning_rate(step, **recipe.lr_schedule)
        for group in setup.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        for micro_step in range(setup.micro_steps):
            with accelerator.accumulate(setup.model):
                setup.seed_dropout(step, micro_step)
                start = self.mark()
                loss = setup.model(**self.inputs, return_logits=False).loss
                forward = self.mark()
                before = time.perf_counter()
                self.inputs = setup.fetch(step, micro_step + 1)
                reading += time.perf_counter() - before
                backward = self.mark()
                accelerator.backward(loss)
                marks.append((start, forward, backward, self.mark()))
        last = self.mark()
        accelerator.clip_grad_norm_(setup.model.parameters(), recipe.optimizer.grad_clip or math.inf)
        setup.optimizer.step()
        setup.optimizer.zero_grad()
        end = self.mark()
        self.synchronize()
        self.number += 1
        return {
            "data": reading,
            "forward": sum(between(a, b) for a, b, _, _ in marks),
            "backward": sum(between(c, d) for _, _, c, d in marks),
            "optimizer": between(last, end),
            "total": time.perf_counter() - started,
        }

    def mark(self):
        """This point in time, in the queue of a CUDA device."""
        import torch

        if self.device.type != "cuda":  # events of MPS can hang where they are timed (pytorch/pytorch#196395)
            self.synchronize()
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event

    def synchronize(self):
        """Wait until the device has done what it was given."""
        import torch

        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def peak_memory(self):
        """Bytes of tensors at the peak of one more step: weights, gradients, optimizer state, activations and the work
        of the kernels. None on MPS, which does not tell."""
        import torch

        if self.device.type == "mps":
            return None
        held = {}  # what this variant keeps from step to step
        state = [value for fields in self.setup.optimizer.state.values() for value in fields.values()]
        for tensor in (*self.setup.model.parameters(), *self.setup.model.buffers(), *state):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device.type:
                local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                held[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
        held = sum(held.values())
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)  # other variants' too
            self.step()
            return held + torch.cuda.max_memory_allocated(self.device) - before
        # the CPU's allocator keeps no count, but the profiler sees all that it gives and takes
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            self.profile(file, steps=1, profile_memory=True)
            events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
        memory = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
        return held + max(itertools.accumulate((n_bytes for _, n_bytes in memory), initial=0))

    def profile(self, file, steps=2, profile_memory=False):
        """Write a Chrome trace of some more steps."""
        import torch
        from torch.profiler import ProfilerActivity

        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        with torch.profiler.profile(activities=activities, profile_memory=profile_memory) as profiler:
            for _ in range(steps):
                self.step()
        if self.setup.accelerator.is_main_process:
            profiler.export_chrome_trace(str(file))


def between(start, end):
    """Seconds from one mark to another."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def report(target, found):
    """The figures as lines of text."""
    yield (
        f"{target} on {found['processes']} x {found['device']}, mixed precision {found['mixed_precision']}, torch "
        f"{found['torch']}" + (f", {found['threads']} threads" if found["device"] == "CPU" else "")
    )
    yield f"data: {found['data']}"
    yield (
        f"{found['parameters']:,} parameters; micro-batches of a step: {found['micro_batches']}; tokens of a "
        f"sequence: {found['block_size']:,}; medians of {found['steps']} steps after {found['warmup']}, in ms"
    )
    yield ""
    width = max(len(line["name"]) for line in found["variants"])
    yield (
        f"{'':<{width}} {'data':>9} {'forward':>9} {'backward':>9} {'optimizer':>9} {'total':>9} {'tokens/s':>11} "
        f"{'slowest ... fastest':>19} {'MFU':>6} {'peak MB':>9} {'ratio':>6}"
    )
    for line in found["variants"]:
        seconds = line["seconds"]
        spread = f"{line['slowest']:,.0f} ... {line['fastest']:,.0f}"
        yield (
            f"{line['name']:<{width}} "
            + " ".join(f"{seconds[part] * 1e3:>9.2f}" for part in (*PARTS, "total"))
            + f" {line['tokens_per_second']:>11,.0f} {spread:>19} "
            + (f"{line['mfu']:>6.1%}" if line["mfu"] else f"{'-':>6}")
            + (f" {line['peak_memory'] / 1e6:>9,.0f}" if line["peak_memory"] else f" {'-':>9}")
            + f" {line['ratio']:>6.2f}"
        )
    if found["profile"]:
        yield f"\n{found['profile']}: open it at ui.perfetto.dev"
