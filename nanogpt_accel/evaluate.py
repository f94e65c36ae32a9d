"""Loss, perplexity and bits per byte of a model on a validation split.

    nanogpt-accel evaluate runs/shakespeare_char                     # on the data that the run was trained with
    nanogpt-accel evaluate runs/a --recipe recipes/shakespeare_char.yaml eval_iters=200 --json
"""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from pydantic import BaseModel, ConfigDict, Field

from . import checkpoint, cli, dataset, interop, launch
from .recipe import FIELDS, SECTIONS, load_recipe

# what counts of a recipe's train section, for the help page
TRAIN = SimpleNamespace(model_fields={key: SECTIONS["train"].model_fields[key] for key in (
    "batch_size", "eval_iters", "device", "mixed_precision", "compile")})


class EvaluateOptions(BaseModel):
    """The options of `evaluate` itself; every key of a recipe can be given too."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str | None = Field(None, description="whose data to use; none: the run's own, from its run.yaml")
    split: str = Field("val", description="what to evaluate on: val, train, or test where the corpus has one")
    json_output: bool = Field(False, alias="json", description="print one JSON object and nothing else")


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel evaluate MODEL [--recipe RECIPE.yaml] [--json] [key=value ...]",
            "Loss (nats a token), perplexity and bits per byte of a model on a validation split: the whole of it "
            "unless eval_iters is given.\nMODEL is a run folder (its best checkpoint), a checkpoint folder, gpt2 to "
            "gpt2-xl, or another folder or Hub id of a GPT-2, Llama, Qwen3 or nanochat model.\nblock_size=N takes "
            "shorter samples than the longest that the model reads.",
            {"options": EvaluateOptions, "data": SECTIONS["data"], "train": TRAIN})
    fields = EvaluateOptions.model_fields
    target, given = cli.parse(argv, {**FIELDS, "recipe": fields["recipe"], "split": fields["split"],
                                    "json": fields["json_output"]})
    own = {key: given.pop(key) for key in ("recipe", "split", "json") if key in given}
    options, problems, _ = cli.validate(EvaluateOptions, own)
    if target is None:
        problems.append("which model? nanogpt-accel evaluate runs/NAME")
    if problems:
        raise ValueError("\n".join(problems))
    is_named = not {"corpus", "data_dir", "data.corpus", "data.data_dir"}.isdisjoint(given)
    path = recipe_path(target, options.recipe, is_named)
    recipe = load_recipe(path, {"eval_iters": "all", **given},
                         check=lambda r: dataset.check(r.data, 1) + launch.check_launcher())
    is_given = not {"block_size", "model.block_size"}.isdisjoint(given)
    evaluate(target, recipe, recipe.model.block_size if is_given else None, options.split, options.json_output)


def recipe_path(target, recipe, is_named):
    """The recipe to take the data from: the one that is given, or the run.yaml of the model's run; None where there is
    none and the options name the data."""
    if recipe is not None:
        return recipe
    for folder in (Path(target), Path(target).parent):
        if (folder / "run.yaml").is_file():
            return folder / "run.yaml"
    if is_named:
        return None
    hint = "" if Path(target).exists() else ", or correct the path: no such folder here"
    raise ValueError(f"{target}: there is no run.yaml beside it to say which data to use; add --recipe RECIPE.yaml, or "
                     f"corpus=... or data_dir=...{hint}")


def evaluate(target, recipe, block_size=None, split="val", as_json=False):
    """Print the scores of the model `target` on a split of a recipe's data, and return them.

    block_size: length of the samples in tokens; None: the longest that the model reads.
    """
    warn = lambda line: print(line, file=sys.stderr)  # noqa: E731
    folder = checkpoint.find_model(target, warn)
    config = interop.read_config(folder)
    block_size = block_size or config["block_size"]
    data = dataset.ready(recipe.data, launch.is_main(), report=warn)
    problems = (dataset.require_tokenizer(data, folder, key=target)
                or interop.check_tokenizer(data.tokenizer, config, folder))
    if split not in data.splits:
        problems.append(f"split={split}: {data.folder} has {', '.join(data.splits)}")
    elif len(data.splits[split]) <= block_size:
        problems.append(f"block_size={block_size}: a sample takes {block_size + 1:,} tokens, but the {split} split of "
                        f"{data.folder} has {len(data.splits[split]):,}: take a smaller block_size")
    if config["position"] == "learned" and block_size > config["block_size"]:
        problems.append(f"block_size={block_size}: {folder} reads at most {config['block_size']} tokens")
    if problems:
        raise ValueError("\n".join(problems))

    from transformers.utils import logging as transformers_logging

    from . import cpu, metrics
    from .batches import evaluation_batches, model_inputs

    transformers_logging.disable_progress_bar()
    accelerator = launch.make_accelerator(recipe.train.device, recipe.train.mixed_precision, recipe.train.compile)
    model = interop.load_model(folder).to(accelerator.device)
    cpu.tune(model, accelerator)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    tokens = data.splits[split]
    batches = evaluation_batches(len(tokens), block_size, recipe.train.batch_size, recipe.train.eval_iters)
    to_inputs = partial(model_inputs, eot_id=data.tokenizer.eot_id if recipe.data.document_mask else None)
    loss = metrics.mean_loss(model, tokens, batches, to_inputs, accelerator)
    scores = metrics.scores(loss, len(tokens), data.text_bytes(split), split=split)
    scores["tokens"] = sum(len(starts) * length for starts, length in batches)
    if accelerator.is_main_process:
        if as_json:
            print(json.dumps({"model": str(folder), "data": str(data.folder), "split": split, **scores}))
        else:
            print(f"{folder} on {data.folder}, {scores.pop('tokens'):,} tokens: {metrics.describe(scores)}")
    accelerator.end_training()
    return scores


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
