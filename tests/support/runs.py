"""A tiny recipe, and functions to read the results of its runs: metrics, weights, training state."""

import json
import random
import shutil
from pathlib import Path

import yaml
from safetensors import safe_open

from nanogpt_accel.planning.scaling_law import expected_loss
from nanogpt_accel.planning.sizing import flops_per_token
from nanogpt_accel.recipe import SECTION_OF, load_recipe
from nanogpt_accel.scaling import scaling_params
from nanogpt_accel.tracking.metrics_log import read_metrics

# one layer and 8 steps: a run takes about a second on a CPU
TINY = {
    "tokenizer": "char",
    "val_fraction": 0.1,
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "block_size": 16,
    "dropout": 0.2,
    "learning_rate": 1e-2,
    "warmup_iters": 0,
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_iters": 8,
    "eval_interval": 4,
    "eval_iters": 2,
    "device": "cpu",
    "keep_last": 9,
}
# for runs that are compared across processes: two layers, and micro-batches for 1, 2 or 4 ranks
SMALL = {
    "n_layer": 2,
    "n_embd": 32,
    "block_size": 32,
    "warmup_iters": 5,
    "batch_size": 4,
    "gradient_accumulation_steps": 4,
    "eval_iters": 3,
    "mixed_precision": "no",
}
MEASURED = {"tokens_per_second", "mfu", "peak_memory"}  # differ between two runs of the same recipe


# ---- before a run


def make_text(n_words, letters="etaoinshrdlu", seed=2):
    """Return text made of 150 different words, so that a tiny model can learn something."""
    rng = random.Random(seed)
    words = ["".join(rng.choice(letters) for _ in range(rng.randint(2, 7))) for _ in range(150)]
    return "".join(rng.choice(words) + rng.choice("     \n") for _ in range(n_words))


def write_recipe(folder, name="tiny.yaml", **settings):
    """Write a tiny recipe and its text into a folder.

    Args:
        settings: values by key, which override or extend TINY; None leaves a key out. Without `corpus`, text.txt is
            written and used, and its tokens go to tokens/.

    Returns:
        The path of the recipe. Its paths are absolute, so it can be used from any folder.
    """
    if "corpus" not in settings:
        (folder / "text.txt").write_text(make_text(4000))
        settings = {"corpus": str(folder / "text.txt"), "data_dir": str(folder / "tokens")} | settings
    recipe = {}
    for key, value in (TINY | settings).items():
        if value is not None:
            section = recipe.setdefault(SECTION_OF[key], {}) if SECTION_OF[key] else recipe
            section[key] = value
    (folder / name).write_text(yaml.safe_dump(recipe))
    return folder / name


# ---- finished runs for scaling laws

HASHES = {"tokenizer": "t" * 64, "train": "a" * 64, "val": "b" * 64}  # of the data of these runs


def write_finished_run(folder, law, error=0.0, recipe="python_depth", data=HASHES, vocab_size=512, trainer=(), **keys):
    """Write the files of a finished run that a scaling law needs.

    Args:
        law: {constant: value}. The last validation loss is the loss that the law predicts, times 1 + error.
        recipe: the name of a recipe. keys: its overrides. data, trainer: content of trainer.json.
    """
    recipe = load_recipe(recipe, {"out_dir": str(folder), **keys})
    folder, shape = Path(folder), recipe.shape | {"vocab_size": recipe.padded_vocab_size(vocab_size)}
    tokens = recipe.train.max_iters * recipe.tokens_per_step
    point = {"n_params": scaling_params(shape), "tokens": tokens, "flops": tokens * flops_per_token(shape)}
    values = {"step": recipe.train.max_iters, "val_loss": expected_loss(law, point) * (1 + error), "data": data}
    path = checkpoint(folder, recipe.train.max_iters)
    (path / "state").mkdir(parents=True)
    (folder / "run.yaml").write_text(recipe.to_yaml())
    (path / "config.json").write_text(json.dumps({"vocab_size": shape["vocab_size"]}))
    (path / "state" / "trainer.json").write_text(json.dumps(values | dict(trainer)))
    return folder


LAW = {"E": 1.5, "A": 40.0, "a": 0.3, "B": 300.0, "b": 0.35}


def write_grid(folder, law=LAW):
    """Write nine finished runs without noise, whose tokens per parameter differ."""
    for depth in (2, 4, 8):
        for max_iters in (100, 300, 900):
            write_finished_run(folder / f"depth={depth},{max_iters}", law, depth=depth, max_iters=max_iters)
    return folder


# a task of lm-eval: choose one of two continuations
LM_EVAL_TASK = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
target_delimiter: ""
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def write_lm_eval_task(folder, rows, *names):
    """Write tasks with the same questions to a folder. rows: a list of {"question", "choices", "answer"}."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in names:
        text = LM_EVAL_TASK.replace("NAME", name).replace("FILE", str(folder / "rows.jsonl"))
        (folder / f"{name}.yaml").write_text(text)


# ---- after a run


def numbers(run):
    """Return the lines of metrics.jsonl without times and memory: equal for two runs that computed the same."""
    lines = read_metrics(Path(run) / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def ordered_numbers(run):
    """Return numbers(run) after checking that every step was logged exactly once and in order."""
    lines = numbers(run)
    places = [(line["step"], "val_loss" not in line) for line in lines]  # an evaluation comes before its step
    assert places == sorted(set(places))
    assert [line["step"] for line in lines if "loss" in line] == list(range(lines[-1]["step"]))
    assert all({"loss", "grad_norm", "learning_rate"} < set(line) or "val_loss" in line for line in lines)
    return lines


def losses(run, first_step=0):
    """Return {step: training loss} from a step on."""
    return {line["step"]: line["loss"] for line in numbers(run) if "loss" in line and line["step"] >= first_step}


def val_losses(run):
    """Return the validation losses in order."""
    return [line["val_loss"] for line in numbers(run) if "val_loss" in line]


def relative_difference(run, other, first_step=0):
    """Return the largest relative difference between the losses of two runs of the same steps."""
    one, two = losses(run, first_step), losses(other, first_step)
    assert one and one.keys() == two.keys()
    return max(abs(one[step] - two[step]) / two[step] for step in two)


def largest_difference(run, other):
    """Return the largest absolute difference between all numbers of two runs of the same steps."""
    pairs = list(zip(numbers(run), numbers(other), strict=True))
    assert all(list(a) == list(b) for a, b in pairs)
    return max(abs(a[key] - b[key]) for a, b in pairs for key in a)


def checkpoint(run, step):
    return Path(run) / f"checkpoint-{step:06d}"


def trainer(run, step):
    """Return state/trainer.json of a checkpoint."""
    return json.loads((checkpoint(run, step) / "state" / "trainer.json").read_text())


def weights(run, step):
    """Return the bytes of model.safetensors of a checkpoint: equal only if every weight is bitwise equal."""
    return (checkpoint(run, step) / "model.safetensors").read_bytes()


def tensors(folder):
    """Return {(file, name): tensor} of all safetensors files below a folder."""
    found = {}
    for file in sorted(Path(folder).rglob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {(str(file.relative_to(folder)), name): opened.get_tensor(name) for name in opened.keys()}
    return found


def copy_without(source, target, *steps):
    """Copy a run without its checkpoints of these steps, as if it had been killed before them; return the copy."""
    shutil.copytree(source, target, symlinks=True)
    for step in steps:
        shutil.rmtree(checkpoint(target, step))
    return target
