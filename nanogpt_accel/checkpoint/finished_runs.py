"""Read the results of finished runs, as points for a scaling law."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from ..data import dataset, run_data
from ..planning.scaling_law import Run, fit
from ..planning.sizing import flops_per_token
from ..recipe import Recipe, load_recipe
from ..scaling import scaling_params
from ..utils.fields import show_value
from ..utils.text import first_line, printable
from .layout import list_checkpoints, read_trainer

# The runs of a fit may differ in size, number of steps, batch size, seed, and the numbers of the section optimizer,
# such as the learning rate. They must not differ in LAW_KEYS or in the other settings of the model, because these
# settings change the law.
SIZE_KEYS = {"n_layer", "n_head", "n_embd", "n_kv_head", "head_dim", "n_inner", "initializer_range"}
OTHER_KEYS = {"init_from", "pad_vocab_to_multiple_of"}  # settings that do not change the trained model
LAW_KEYS = {"optimizer": ("algorithm", "schedule"), "data": ("sampling", "document_mask"), "train": ("eval_iters",)}


class Ladder(NamedTuple):
    """Finished runs that can share a scaling law.

    recipe, vocab_size, data: the recipe of the first run, its model's vocabulary size, and the hashes of its data.
    notes: lines of text that say which other runs were not used, and why.
    """

    runs: list
    recipe: Recipe
    vocab_size: int
    data: dict
    notes: list


def read_ladder(targets):
    """Read finished runs.

    If runs with the same size and number of tokens have different settings, only the runs with the best settings are
    used. The best settings have the lowest mean loss over all seeds.

    Args:
        targets: run folders, or folders that contain runs, such as the folder of a sweep.

    Returns:
        Ladder

    Raises:
        ValueError: no run is finished, or the runs cannot share a law.
    """
    found, notes = [], []  # found: (Run, recipe, vocab_size, data)
    folders = find_runs(targets)
    for folder, name in zip(folders, unique_names(folders), strict=True):
        try:
            found.append(_read_run(folder, name))
        except (ValueError, OSError, KeyError, TypeError) as error:
            notes.append(f"{name}: not used: {first_line(error)}")
    if not found:
        raise ValueError("\n".join(notes))
    _require_same(found)
    groups = {}  # (parameters, tokens) -> settings without the seed -> runs
    for run, recipe, *_ in found:
        train = recipe.train
        settings = f"{recipe.model} {recipe.optimizer} {train.batch_size} {train.gradient_accumulation_steps}"
        groups.setdefault((run.n_params, run.tokens), {}).setdefault(settings, []).append(run)
    runs = []
    for by_settings in groups.values():
        best = min(by_settings.values(), key=lambda group: sum(run.loss for run in group) / len(group))
        runs += best
        if others := [run.name for group in by_settings.values() if group is not best for run in group]:
            names = ", ".join(run.name for run in best)
            notes.append(f"{', '.join(others)}: not used: runs of the same size have a lower loss ({names})")
    return Ladder(runs, *found[0][1:], notes)


def fit_ladder(ladder):
    """Fit a law to the runs of a ladder. If there are too few, the ValueError also says why other runs are not used."""
    try:
        return fit(ladder.runs)
    except ValueError as error:
        raise ValueError("\n".join([str(error), *ladder.notes])) from None


def find_runs(targets):
    """Return the run folders in `targets`. Each target is a run folder, or a folder that contains run folders.

    If at least one target is a folder, targets that are files are ignored: the pattern sweep/* also matches the logs of
    a sweep.

    Raises:
        ValueError: a target does not exist or contains no runs, or all targets are files.
    """
    folders, problems, paths = [], [], list(map(Path, targets))
    for target in [path for path in paths if not path.is_file()] or paths:
        found = [target / "run.yaml"] if (target / "run.yaml").is_file() else sorted(target.glob("*/run.yaml"))
        folders += [file.parent for file in found]
        if not found:
            reason = "contains no runs" if target.is_dir() else "not a folder" if target.exists() else "no such folder"
            problems.append(f"{target}: {reason}; give the path of a run folder")
    if problems:
        raise ValueError("\n".join(problems))
    return list({folder.resolve(): folder for folder in folders}.values())


def unique_names(folders):
    """Return a name for each run: the last parts of its path, as many as are needed to tell the runs apart.

    folders: different folders.
    """
    paths = [folder.resolve().parts for folder in folders]
    counts = Counter(path[-n:] for path in paths for n in range(1, len(path) + 1))
    names = [next(path[-n:] for n in range(1, len(path) + 1) if counts[path[-n:]] == 1) for path in paths]
    return [printable("/".join(name)) for name in names]


def _read_run(folder, name):
    """Return (Run, recipe, vocab_size, data) of a run. Raise ValueError if the run is not finished."""
    recipe = load_recipe(folder / "run.yaml")
    if recipe.model.init_from not in ("scratch", "resume"):
        raise ValueError(f"the run started from the weights of {recipe.model.init_from}")
    checkpoints, steps = list_checkpoints(folder), recipe.train.max_iters
    if not checkpoints:
        raise ValueError("the run has no checkpoint")
    trainer = read_trainer(checkpoints[-1])
    if trainer["step"] < steps or not steps:
        raise ValueError(f"the last checkpoint is at step {trainer['step']:,} of {steps:,}")
    if not isinstance(trainer["val_loss"], float) or not 0 < trainer["val_loss"] < math.inf:
        raise ValueError(f"the last validation loss is {trainer['val_loss']}")
    vocab_size = json.loads((checkpoints[-1] / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    if type(vocab_size) is not int or vocab_size < 1:
        raise ValueError(f"{checkpoints[-1] / 'config.json'}: vocab_size={vocab_size} is not valid")
    shape = recipe.shape | {"vocab_size": vocab_size}
    tokens = steps * recipe.tokens_per_step
    run = Run(name, scaling_params(shape), tokens, tokens * flops_per_token(shape), trainer["val_loss"])
    if not isinstance(trainer["data"], dict):
        raise ValueError("the last checkpoint does not contain the hashes of the data")
    return run, recipe, vocab_size, trainer["data"]


def law_settings(recipe):
    """Return {setting: value} for the settings that change the scaling law, without those that select the data."""
    keys = LAW_KEYS | {"model": sorted(type(recipe.model).model_fields.keys() - SIZE_KEYS - OTHER_KEYS)}
    return {f"{name}.{key}": getattr(getattr(recipe, name), key) for name in keys for key in keys[name]}


def differences(ladder, recipe):
    """Compare a recipe with the runs of a ladder.

    Returns:
        (problems, warnings): lists of text lines. A problem is a reason why the losses cannot be compared at all. A
        warning is a reason why the law may not hold for the recipe.
    """
    problems, warnings = [], []
    ours, theirs = law_settings(recipe), law_settings(ladder.recipe)
    changed = [
        f"{key}={show_value(theirs[key])} instead of {show_value(ours[key])}"
        for key in ours
        if ours[key] != theirs[key]
    ]
    if changed:
        warnings.append(f"the runs have {'; '.join(changed)}, so the loss may differ")
    sources = ladder.data.get("sources", [ladder.data])
    if run_data.is_prepared(recipe.data):
        sections = [run_data.sections(recipe.data)[name] for name in recipe.data.sources]
        splits = [dataset.manifest_of(data, dataset.data_folder(data))["splits"] for data in sections]
        if [split["val"]["sha256"] for split in splits] != [source["val"] for source in sources]:
            problems.append("the recipe and the runs have different validation data, so losses cannot be compared")
        elif [split["train"]["sha256"] for split in splits] != [source["train"] for source in sources]:
            warnings.append("the recipe and the runs have different training data, so the loss may differ")
        return problems, warnings
    mine, theirs = _data_settings(recipe.data), _data_settings(ladder.recipe.data)
    for key in mine:
        if mine[key] != theirs.get(key):
            values = f"{show_value(mine[key])}, but the runs have {show_value(theirs.get(key))}"
            problems.append(
                f"data.{key}={values}, so losses cannot be compared; use the data of the runs, or other runs"
            )
    return problems, warnings


def _data_settings(data):
    """Return the settings that determine the text and the tokens, for data that are not prepared yet."""
    size = {"vocab_size": data.vocab_size} if data.tokenizer == "bpe" else {}
    return {"corpus": [source.corpus for source in data.sources.values()], "tokenizer": data.tokenizer, **size}


def _require_same(found):
    """Raise ValueError if the settings or the data of runs differ. found: list of (Run, recipe, vocab_size, data)."""
    problems, names = [], {}  # names: {setting: {value as text: [name of a run, ...]}}
    for run, recipe, vocab_size, data in found:
        mixes = [stage["mix"] for stage in data.get("stages", [])]  # without first steps, which depend on max_iters
        facts = {"vocab_size": vocab_size, "data": str({**data, "stages": mixes}), **law_settings(recipe)}
        for key, value in facts.items():
            names.setdefault(key, {}).setdefault(show_value(value), []).append(run.name)
    for key, by_value in names.items():
        if len(by_value) > 1 and key == "data":
            text = " / ".join(", ".join(runs) for runs in by_value.values())
            problems.append(f"the data, tokenizers or validation splits differ: {text}; use runs with the same data")
        elif len(by_value) > 1:
            text = "; ".join(f"{value} in {', '.join(runs)}" for value, runs in by_value.items())
            problems.append(f"{key} differs: {text}; use runs that all have the same {key}")
    if problems:
        raise ValueError("\n".join(f"these runs cannot share a scaling law: {problem}" for problem in problems))
