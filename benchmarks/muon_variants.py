"""Compare variants of Muon, and averages of the weights, by the loss that a recipe reaches.

    python benchmarks/muon_variants.py RECIPE RESULTS [corpus=TEXT] [seeds=5] [variants=plain,normuon] [rates=1]
    python benchmarks/muon_variants.py RESULTS

RECIPE is shakespeare_char_fast or quickstart. Each run appends a line of JSON to the file RESULTS; runs that are
already in the file are skipped. The second form prints a table of RESULTS: the differences from `plain` with the same
seed, and their standard errors. Losses are over the full validation split.

`rates` multiply Muon's learning rate. With tune=true, the last tenth of the training data replaces the validation
split, so that a rate is not selected on the split whose loss is reported. Other options, such as max_iters=100, are
settings of the recipe.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from side_by_side import RECIPES, show

import nanogpt_accel.optim
from nanogpt_accel import evaluation, muon, training
from nanogpt_accel.recipe import load_recipe

train = importlib.import_module("nanogpt_accel.train")  # the package has a function of this name

POLAR_EXPRESS = [  # Amsel et al. 2025, arXiv 2505.16932: five steps, with their safety factor of 1.01
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
EMA_DECAYS = (0.8, 0.9, 0.95, 0.98)
LAST = 5  # checkpoints to average, a twentieth of the run apart
VARIANTS = {
    "plain": {},
    "polar_express": {"polar_express": True},
    "normuon": {"normuon": 0.95},
    "momentum_warmup": {"momentum_warmup": 0.3},  # from 0.85, over this fraction of the run
    "rms_scale": {"rms_scale": True},
    "decay_0.03": {"decay": 0.03},
    "decay_0.1": {"decay": 0.1},
    "decay_0.3": {"decay": 0.3},
    "cautious_0.03": {"decay": 0.03, "cautious": True},
    "cautious_0.1": {"decay": 0.1, "cautious": True},
    "cautious_0.3": {"decay": 0.3, "cautious": True},
}


def polar_express(matrices):
    x = matrices.float()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01).clamp(min=1e-7)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Variant(muon.Muon):
    """Muon for one process, with the switches of VARIANTS."""

    def __init__(self, groups, switches, max_iters):
        super().__init__(groups)
        self.switches, self.max_iters = switches, max_iters
        self.n_steps, self.seconds, self.variances, self.averages = 0, 0.0, {}, {}

    @torch.no_grad()
    def step(self, closure=None):
        start = time.process_time()
        for group in self.param_groups:
            (self.step_matrices if group["use_muon"] else self._step_adamw)(group)
        self.n_steps += 1
        self.seconds += time.process_time() - start
        if self.switches:  # weights are averaged only with plain Muon
            return
        weights = [p.detach() for group in self.param_groups for p in group["params"]]
        for decay in EMA_DECAYS:
            average = self.averages.setdefault(f"ema {decay}", [w.clone() for w in weights])
            torch._foreach_lerp_(average, weights, 1 - decay)
        places = [self.max_iters - i * self.max_iters // 20 for i in range(LAST)]
        if self.n_steps in places:
            average = self.averages.setdefault(f"last {LAST}", [torch.zeros_like(w) for w in weights])
            torch._foreach_add_(average, weights, alpha=1 / LAST)

    def step_matrices(self, group):
        on, momentum = self.switches, group["momentum"]
        if "momentum_warmup" in on:
            done = min(1.0, self.n_steps / (on["momentum_warmup"] * self.max_iters))
            momentum = min(momentum, 0.85) + done * (momentum - min(momentum, 0.85))
        by_shape = {}
        for p, rows in zip(group["params"], group["rows"], strict=True):
            buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            buffer.lerp_(p.grad, 1 - momentum)
            update = p.grad.lerp(buffer, momentum)
            for i, (matrix, part) in enumerate(zip(p.split(rows), update.split(rows), strict=True)):
                by_shape.setdefault(tuple(sorted(matrix.shape)), []).append((matrix, part, (p, i)))
        for parts in by_shape.values():
            stack = torch.stack([part.mT if muon.is_tall(part) else part for _, part, _ in parts])
            orthogonal = (polar_express if "polar_express" in on else muon.orthogonalize)(stack)
            for (matrix, part, key), update in zip(parts, orthogonal, strict=True):
                update = update.mT if muon.is_tall(part) else update
                if "normuon" in on:  # Li et al. 2025, arXiv 2510.05491: the same RMS for each output neuron over time
                    variance = self.variances.setdefault(key, torch.zeros(len(update), 1))
                    variance.lerp_(update.square().mean(1, keepdim=True), 1 - on["normuon"])
                    normal = update / (variance.sqrt() + 1e-8)
                    update = normal * (update.norm() / normal.norm().clamp(min=1e-8))
                scale = max(1.0, len(matrix) / matrix.shape[1]) ** 0.5
                if "rms_scale" in on:  # Liu et al. 2025 (Moonlight), divided by its value for an n_embd x n_embd matrix
                    scale = (max(matrix.shape) / 128) ** 0.5
                if "decay" in on:
                    mask = (update * matrix > 0) if "cautious" in on else 1  # Chen et al. 2025, arXiv 2510.12402
                    matrix.mul_(1 - group["lr"] * on["decay"] * mask)
                matrix.add_(update, alpha=-group["lr"] * scale)


class Part:
    """Some of the tokens of a TokenFile."""

    def __init__(self, tokens, start, stop):
        self.tokens, self.start, self.stop = tokens, start, stop

    def __len__(self):
        return self.stop - self.start

    def rows(self, starts, length):
        return self.tokens.rows(starts + self.start, length)


def run(recipe, options, variant, rate, seed, tune, folder):
    """Train once; return {name of the weights: validation loss} and the CPU seconds of an optimizer step."""
    made, setups = [], []

    def make(model, settings):
        groups = plain(model, settings)
        made.append(Variant(groups.param_groups, VARIANTS[variant], max_iters))
        for group in made[-1].param_groups:
            if group["use_muon"]:
                group["lr_scale"] *= rate
        return made[-1]

    def opened(recipe, console):
        recipe, data, source = open_data(recipe, console)
        if tune:
            (name, dataset), tokens = next(iter(data.sources.items())), data.main.train
            n = len(tokens) * 9 // 10
            splits = {"train": Part(tokens, 0, n), "val": Part(tokens, n, len(tokens))}
            data = dataclasses.replace(data, sources={name: dataclasses.replace(dataset, splits=splits)})
        return recipe, data, source

    def evaluated(setup, data, *arguments):
        setups.append((setup, setup.raw_model, data.main.val))
        return evaluate(setup, data, *arguments)

    plain, open_data, evaluate = nanogpt_accel.optim.OPTIMIZERS["muon"], train.open_data, train.evaluate
    max_iters = load_recipe(RECIPES / f"{recipe}.yaml", options).train.max_iters
    nanogpt_accel.optim.OPTIMIZERS["muon"], train.open_data, train.evaluate = make, opened, evaluated
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train.train(
                RECIPES / f"{recipe}.yaml",
                **options,
                seed=seed,
                out_dir=f"{folder}/run",
                overwrite=True,
                quiet=True,
                data_dir=f"{folder}/{recipe}",
                eval_iters="all",
                eval_interval=max_iters,
                sample_tokens=0,
                eval_first=False,
            )
    finally:
        nanogpt_accel.optim.OPTIMIZERS["muon"], train.open_data, train.evaluate = plain, open_data, evaluate
    (optimizer,), (setup, model, val) = made, setups[-1]
    lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    losses = {"final": [line["val_loss"] for line in lines if "val_loss" in line][-1]}
    weights = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    if not math.isfinite(losses["final"]) or tune:
        return losses, optimizer.seconds / optimizer.n_steps
    batches = training.evaluation_batches(len(val), setup.recipe.model.block_size, setup.recipe.train.batch_size, "all")
    for name, average in optimizer.averages.items():
        torch._foreach_copy_(weights, average)
        losses[name] = evaluation.mean_loss(model, val, batches, setup.to_inputs, setup.accelerator)
    return losses, optimizer.seconds / optimizer.n_steps


def measure(recipe, results, seeds=5, variants="", rates="1", tune="false", **options):
    """Train the runs that are missing in the file `results`. options: settings of the recipe, such as corpus."""
    tune = tune == "true"
    is_done = set(map(key_of, read(results)))
    name = f"{recipe} of {options['max_iters']} steps" if "max_iters" in options else recipe
    with tempfile.TemporaryDirectory() as folder:
        # seeds are the outer loop: after an interruption, most seeds have runs of all variants
        for seed in range(1337, 1337 + int(seeds)):
            for variant in variants.split(",") if variants else VARIANTS:
                for rate in map(float, rates.split(",")):
                    line = {"recipe": name, "tune": tune, "variant": variant, "rate": rate, "seed": seed}
                    if key_of(line) in is_done:
                        continue
                    losses, seconds = run(recipe, options, variant, rate, seed, tune, folder)
                    line |= {"losses": losses, "optimizer_seconds": seconds}
                    with open(results, "a") as file:
                        print(json.dumps(line), file=file)


def read(results):
    return [json.loads(line) for line in Path(results).read_text().splitlines()] if Path(results).exists() else []


def key_of(line):
    return tuple(line[name] for name in ("recipe", "tune", "variant", "rate", "seed"))


def report(results):
    lines = read(results)
    for recipe, tune in sorted({(line["recipe"], line["tune"]) for line in lines}):
        found = [line for line in lines if (line["recipe"], line["tune"]) == (recipe, tune)]
        base = {line["seed"]: line for line in found if (line["variant"], line["rate"]) == ("plain", 1)}
        rows = []
        for variant, rate in dict.fromkeys((line["variant"], line["rate"]) for line in found):
            these = [
                line for line in found if (line["variant"], line["rate"]) == (variant, rate) and line["seed"] in base
            ]
            for name in dict.fromkeys(name for line in these for name in line["losses"]):
                of_name = [line for line in these if name in line["losses"]]
                pairs = [(line["losses"][name], base[line["seed"]]["losses"]["final"]) for line in of_name]
                gains = [theirs - ours for ours, theirs in pairs]
                cost = [line["optimizer_seconds"] / base[line["seed"]]["optimizer_seconds"] for line in of_name]
                rows.append(
                    {
                        "variant": variant,
                        "rate": rate,
                        "weights": name,
                        "seeds": len(of_name),
                        "val loss": statistics.mean(ours for ours, _ in pairs),
                        "gain": statistics.mean(gains),
                        "standard error": statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else math.nan,
                        "optimizer's CPU time, relative": statistics.median(cost),
                    }
                )
        show(f"{recipe}, {'end of the training data' if tune else 'validation split'}", rows)


if __name__ == "__main__":
    words = sys.argv[1:]
    if len(words) == 1:
        report(*words)
    else:
        torch.set_num_threads(1)
        measure(*words[:2], **dict(word.split("=", 1) for word in words[2:]))
