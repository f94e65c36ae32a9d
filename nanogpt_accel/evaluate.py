"""Loss, perplexity and bits per byte of a model on a validation split.

    nanogpt-accel evaluate runs/shakespeare_char                     # on the data that the run was trained with
    nanogpt-accel evaluate runs/a --recipe recipes/shakespeare_char.yaml eval_iters=200 --json
"""

import json
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from . import checkpoint, cli, dataset, interop, launch
from .recipe import FIELDS, SECTIONS, load_recipe


class EvaluateOptions(BaseModel):
    """The options of `evaluate` itself; every key of a recipe can be given too."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str | None = Field(None, description="whose data to use; none: the run's own, from its run.yaml")
    json_output: bool = Field(False, alias="json", description="print one JSON object and nothing else")


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel evaluate MODEL [--recipe RECIPE.yaml] [--json] [key=value ...]",
            "Loss (nats a token), perplexity and bits per byte of a model on a validation split: the whole of it "
            "unless eval_iters is given.\nMODEL is a run folder (its best checkpoint), a checkpoint folder, gpt2 to "
            "gpt2-xl, or another folder or Hub id of a GPT-2, Llama, Qwen3 or nanochat model.\nblock_size=N takes "
            "shorter samples than the longest that the model reads. Of the train section, batch_size, eval_iters, "
            "device, mixed_precision and compile count.",
            {"options": EvaluateOptions, "data": SECTIONS["data"], "train": SECTIONS["train"]})
    fields = EvaluateOptions.model_fields
    target, given = cli.parse(argv, {**FIELDS, "recipe": fields["recipe"], "json": fields["json_output"]})
    own = {key: given.pop(key) for key in ("recipe", "json") if key in given}
    options, problems, _ = cli.validate(EvaluateOptions, own)
    if target is None:
        problems.append("which model? nanogpt-accel evaluate runs/NAME")
    if problems:
        raise ValueError("\n".join(problems))
    path = recipe_path(target, options.recipe)
    recipe = load_recipe(path, {"eval_iters": "all", **given},
                         check=lambda r: dataset.check(r.data, 1) + launch.check_launcher())
    is_given = not {"block_size", "model.block_size"}.isdisjoint(given)
    evaluate(target, recipe, recipe.model.block_size if is_given else None, as_json=options.json_output)


def recipe_path(target, recipe):
    """The recipe to take the data from: the one that is named, or the run.yaml of the model's run."""
    if recipe is not None:
        return recipe
    for folder in (Path(target), Path(target).parent):
        if (folder / "run.yaml").is_file():
            return folder / "run.yaml"
    hint = "" if Path(target).exists() else ", or correct the path: no such folder here"
    raise ValueError(f"{target}: there is no run.yaml beside it to say which data to use; add --recipe RECIPE.yaml"
                     f"{hint}")


def evaluate(target, recipe, block_size=None, as_json=False):
    """Print the scores of the model `target` on the validation split of a recipe's data, and return them.

    block_size: length of the samples in tokens; None: the longest that the model reads.
    """
    warn = lambda line: print(line, file=sys.stderr)  # noqa: E731
    folder = checkpoint.find_model(target, warn)
    config = interop.read_config(folder)
    block_size = block_size or config["block_size"]
    data = dataset.ready(recipe.data, launch.is_main(), report=warn)
    problems = (dataset.require_tokenizer(data, folder, key=target)
                or interop.check_tokenizer(data.tokenizer, config, folder))
    problems += dataset.require_block(data, block_size)
    if config["position"] == "learned" and block_size > config["block_size"]:
        problems.append(f"block_size={block_size}: {folder} reads at most {config['block_size']} tokens")
    if problems:
        raise ValueError("\n".join(problems))

    from transformers.utils import logging as transformers_logging

    from . import cpu, metrics
    from .batches import evaluation_batches

    transformers_logging.disable_progress_bar()
    accelerator = launch.make_accelerator(recipe.train.device, recipe.train.mixed_precision, recipe.train.compile)
    model = interop.load_model(folder).to(accelerator.device)
    cpu.tune(model, accelerator)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    batches = evaluation_batches(len(data.val), block_size, recipe.train.batch_size, recipe.train.eval_iters)
    val_loss = metrics.mean_loss(model, data.val, batches, accelerator)
    scores = metrics.scores(val_loss, len(data.val), data.val_bytes)
    scores["tokens"] = sum(len(starts) * length for starts, length in batches)
    if accelerator.is_main_process:
        if as_json:
            print(json.dumps({"model": str(folder), "data": str(data.folder), **scores}))
        else:
            print(f"{folder} on {data.folder}, {scores.pop('tokens'):,} tokens: {metrics.describe(scores)}")
    accelerator.end_training()
    return scores


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
