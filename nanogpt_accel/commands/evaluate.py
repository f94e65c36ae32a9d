"""Loss, perplexity and bits per byte of a model on a validation split or a text, and its scores in lm-eval's tasks.

nanogpt-accel evaluate runs/shakespeare_char                     # on the data that the run was trained with
nanogpt-accel evaluate runs/a --recipe recipes/shakespeare_char.yaml eval_iters=200 --json
nanogpt-accel evaluate gpt2-large text=wikitext2 split=test stride=512      # as in transformers' guide
nanogpt-accel evaluate gpt2 tasks=hellaswag,lambada_openai
"""

import json
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

from pydantic import BaseModel, ConfigDict, Field

from ..data import dataset
from ..data.prepare import ready
from ..data.sources import joined_text
from ..data.token_files import TokenArray
from ..data.tokenizer import Tokenizer
from ..distributed.accelerator import make_accelerator, pick_device
from ..distributed.launcher import check_launcher, is_main
from ..models.find import find_model
from ..models.load import check_tokenizer, load_model, read_config
from ..recipe import FIELDS, SECTIONS, load_recipe
from ..tracking.console import Console, Progress
from ..utils import cli
from ..utils.fields import Int

# what counts of a recipe's train section, for the help page
TRAIN = SimpleNamespace(
    model_fields={
        key: SECTIONS["train"].model_fields[key]
        for key in ("batch_size", "eval_iters", "device", "mixed_precision", "compile")
    }
)


class EvaluateOptions(BaseModel):
    """The options of `evaluate` itself; every key of a recipe can be given too."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str | None = Field(None, description="whose data to use; none: the run's own, from its run.yaml")
    split: str = Field("val", description="what to evaluate on: val, train, or test where the corpus has one")
    stride: Int | None = Field(
        None,
        ge=1,
        description="predict each token from at least block_size - stride tokens "
        "before it, in windows that overlap; none: in blocks side by side",
    )
    text: str | None = Field(
        None,
        description="evaluate on this text instead: a file, or wikitext2, whose lines are "
        "joined as in transformers' guide to perplexity",
    )
    tasks: str | None = Field(
        None,
        description="tasks of lm-eval instead, such as hellaswag,lambada_openai (pip install 'nanogpt_accel[eval]')",
    )
    tasks_dir: str | None = Field(None, description="a folder of lm-eval's task files of your own")
    num_fewshot: Int | None = Field(None, ge=0, description="examples before each question of a task; none: the task's")
    limit: Int | None = Field(None, ge=1, description="for a taste: so many questions of a task")
    json_output: bool = Field(False, alias="json", description="print one JSON object and nothing else")


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel evaluate MODEL [--recipe RECIPE.yaml] [--json] [key=value ...]",
            "Loss (nats a token), perplexity and bits per byte of a model on a validation split: the whole of it "
            "unless eval_iters is given.\nMODEL is a run folder (its best checkpoint), a checkpoint folder, gpt2 to "
            "gpt2-xl, or another folder or Hub id of a GPT-2, Llama, Qwen3 or nanochat model.\nblock_size=N takes "
            "shorter samples than the longest that the model reads.",
            {"options": EvaluateOptions, "data": SECTIONS["data"], "train": TRAIN},
        )
    target, options, given, problems = cli.parse_with_recipe(argv, EvaluateOptions, FIELDS)
    if target is None:
        problems.append("which model? nanogpt-accel evaluate runs/NAME")
    if problems:
        raise ValueError("\n".join(problems))
    device = {key: value for key, value in given.items() if key.rpartition(".")[2] in TRAIN.model_fields}
    if options.tasks:
        return run_tasks(target, load_recipe(None, device), options)
    named = {key.removeprefix("data.") for key in given} & {"corpus", "data_dir", "tokenizer"}
    is_named = not named.isdisjoint({"corpus", "data_dir"}) and options.recipe is None
    # 1) the recipe that is given; 2) the data that the options name, in the tokens of the model; 3) the run's own data
    path = None if options.text or is_named else recipe_path(target, options.recipe)
    if is_named and named.isdisjoint({"tokenizer", "data_dir"}):
        given["tokenizer"] = tokenizer_of(target)
    recipe = load_recipe(
        path,
        {"eval_iters": "all", **(device if options.text else given)},
        check=lambda r: ([] if options.text else dataset.check(r.data, 1)) + check_launcher(),
    )
    is_given = not {"block_size", "model.block_size"}.isdisjoint(given)
    evaluate(target, recipe, options, recipe.model.block_size if is_given else None)


def recipe_path(target, recipe):
    """The recipe to take the data from: the one that is given, or the run.yaml of the model's run."""
    if recipe is not None:
        return recipe
    for folder in (Path(target), Path(target).parent):
        if (folder / "run.yaml").is_file():
            return folder / "run.yaml"
    hint = "" if Path(target).exists() else ", or correct the path: no such folder here"
    raise ValueError(
        f"{target}: there is no run.yaml beside it to say which data to use; add --recipe RECIPE.yaml, or "
        f"corpus=... or data_dir=...{hint}"
    )


def tokenizer_of(target):
    """The `tokenizer` key that gives a model's own tokens: gpt2, or the folder that holds its tokenizer.json."""
    folder = find_model(target, warn=lambda line: None, bars=is_main())
    return "gpt2" if Tokenizer.load(folder).kind == "gpt2" else str(folder)


def evaluate(target, recipe, options, block_size=None):
    """Print the scores of the model `target` on a split of a recipe's data, or on options.text, and return them.

    block_size: length of the samples in tokens; None: the longest that the model reads.
    """
    console = Console(is_main(), stderr=True)
    folder = find_model(target, console, bars=console.is_heard)
    config = read_config(folder)
    block_size = block_size or config["block_size"]
    name, tokens, text_bytes, eot_id, problems = (
        open_text(options, folder) if options.text else open_split(recipe, options, folder, config, target, console)
    )
    if tokens is not None and len(tokens) <= block_size and not (options.text and options.stride):
        problems.append(
            f"block_size={block_size}: a sample takes {block_size + 1:,} tokens, but {name} has "
            f"{len(tokens):,}: take a smaller block_size"
        )
    if config["position"] == "learned" and block_size > config["block_size"]:
        problems.append(f"block_size={block_size}: {folder} reads at most {config['block_size']} tokens")
    if options.stride and options.stride > block_size:
        problems.append(
            f"stride={options.stride}: is above block_size={block_size}, and would leave out what lies "
            "between the windows"
        )
    if options.stride and recipe.train.eval_iters != "all":
        problems.append(
            f"eval_iters={recipe.train.eval_iters}: windows with a stride cover the whole text; leave out "
            "one of the two"
        )
    if problems:
        raise ValueError("\n".join(problems))

    from transformers.utils import logging as transformers_logging

    from ..batches import evaluation_batches, model_inputs, sliding_windows
    from ..distributed import cpu
    from ..evaluation import describe, mean_and_error, scores, window_losses

    transformers_logging.disable_progress_bar()
    accelerator = make_accelerator(recipe.train.device, recipe.train.mixed_precision, recipe.train.compile)
    model = load_model(folder).to(accelerator.device)
    cpu.tune(model, accelerator)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    if options.stride:
        windows = sliding_windows(len(tokens), block_size, options.stride, recipe.train.batch_size)
    else:
        windows = [
            (starts, length, length)
            for starts, length in evaluation_batches(
                len(tokens), block_size, recipe.train.batch_size, recipe.train.eval_iters
            )
        ]
    to_inputs = partial(model_inputs, device=accelerator.device, eot_id=eot_id if recipe.data.document_mask else None)
    if accelerator.state.dynamo_plugin.backend != "NO":
        console.say("compiling: the first batch takes a while")
    with Progress("evaluating", len(windows), console, "batches") as progress:
        sums, counts = window_losses(model, tokens, windows, to_inputs, accelerator, progress)
    loss, error = mean_and_error(sums, counts)
    split = "text" if options.text and Path(options.text).is_file() else options.split
    found = scores(loss, len(tokens), text_bytes, split=split, error=error)
    found["tokens"] = int(counts.sum())
    if accelerator.is_main_process:
        if options.json_output:
            print(json.dumps({"model": str(folder), "data": name, "split": split, **found}))
        else:
            print(f"{folder} on {name}, {found.pop('tokens'):,} tokens: {describe(found)}")
    accelerator.end_training()
    return found


def open_split(recipe, options, folder, config, target, console):
    """(name, tokens, bytes of its text, end-of-text id, problems) of a split of the recipe's data."""
    data = ready(recipe.data, is_main(), report=console)
    problems = dataset.require_tokenizer(data, folder, key=target) or check_tokenizer(data.tokenizer, config, folder)
    if options.split not in data.splits:
        problems.append(f"split={options.split}: {data.folder} has {', '.join(data.splits)}")
        return str(data.folder), None, None, None, problems
    return (
        str(data.folder),
        data.splits[options.split],
        data.text_bytes(options.split),
        data.tokenizer.eot_id,
        problems,
    )


def open_text(options, folder):
    """The same of a text, in the tokens of the model's own tokenizer."""
    path = Path(options.text)
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else joined_text(options.text, options.split)
    except UnicodeDecodeError as error:
        raise ValueError(f"text={path}: not UTF-8 text at byte {error.start}: convert it (iconv -t utf-8)") from None
    tokenizer = Tokenizer.load(folder)
    tokens = TokenArray(tokenizer.encode(text))
    problems = [] if len(tokens) > 1 else [f"text={path}: has {len(tokens)} tokens, and there is nothing to predict"]
    return options.text, tokens, len(text.encode()), tokenizer.eot_id, problems


def run_tasks(target, recipe, options):
    """Print the scores of a model in tasks of lm-eval (EleutherAI's evaluation harness), and return them."""
    if find_spec("lm_eval") is None:
        raise ValueError(f"tasks={options.tasks}: lm-eval is not installed here: pip install 'nanogpt_accel[eval]'")
    console = Console(is_main(), stderr=True)
    folder = find_model(target, console, bars=console.is_heard)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from .. import model  # noqa: F401 (lets AutoModelForCausalLM know the class)

    tasks = [task.strip() for task in options.tasks.split(",") if task.strip()]
    manager = TaskManager(include_path=options.tasks_dir)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(
            f"tasks={','.join(unknown)}: lm-eval has no such task; `lm-eval ls tasks` shows them, and "
            "tasks_dir=FOLDER adds your own"
        )
    device = pick_device(recipe.train.device)
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32" if device.type == "cpu" else "auto"},
        tasks=tasks,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        batch_size=recipe.train.batch_size,
        device=str(device),
        task_manager=manager,
    )
    if found is None:  # on all processes but the first
        return None
    scores = {
        task: {key: value for key, value in values.items() if isinstance(value, (int, float))}
        for task, values in found["results"].items()
    }
    if options.json_output:
        print(json.dumps({"model": str(folder), "tasks": scores}))
    else:
        for task, values in scores.items():
            # lm-eval's names are metric,filter; the error of a metric is metric_stderr,filter
            shown = [
                f"{key.split(',')[0]} {value:.4f}" + (f" +- {error:.4f}" if error is not None else "")
                for key, value in values.items()
                if "_stderr" not in key and "," in key
                for error in [values.get(key.replace(",", "_stderr,"))]
            ]
            print(f"{folder} in {task}: {', '.join(shown)}")
    return scores


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
