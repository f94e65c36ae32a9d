"""Evaluate a model: loss, perplexity and bits per byte on a validation split or a text, or scores on lm-eval tasks.

nanogpt-accel evaluate runs/shakespeare_char                     # on the data that the run was trained with
nanogpt-accel evaluate runs/a --recipe recipes/shakespeare_char.yaml eval_iters=200 --json
nanogpt-accel evaluate gpt2-large text=wikitext2 split=test stride=512      # as in transformers' perplexity guide
nanogpt-accel evaluate gpt2 tasks=hellaswag,lambada_openai
"""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from pydantic import Field

from ..data import dataset, run_data
from ..data.losses import describe_losses
from ..data.readers import how_to_convert
from ..data.sources import joined_text
from ..data.token_files import TokenArray
from ..data.tokenizer import EncodingError, Tokenizer
from ..distributed.accelerator import make_accelerator, pick_device
from ..distributed.launcher import check_launcher, is_main
from ..models.find import check_model, find_model
from ..models.load import check_tokenizer, check_weights, load_model, read_config
from ..models.tasks import check_tasks, core_average, load_tasks, score_tasks
from ..recipe import FIELDS, SECTIONS, load_recipe
from ..tracking.console import Console, Progress
from ..utils import cli
from ..utils.fields import Int, Section, Words, raise_problems
from ..utils.text import printable, to_json

# the keys of a recipe's train section that `evaluate` uses, for the help page
_TRAIN_KEYS = ("batch_size", "eval_iters", "device", "mixed_precision", "compile")
TRAIN = SimpleNamespace(model_fields={key: SECTIONS["train"].model_fields[key] for key in _TRAIN_KEYS})


class EvaluateOptions(Section):
    """The options of `evaluate`, in addition to the keys of a recipe."""

    recipe: str | None = Field(None, description="recipe that defines the data; default: run.yaml of the model's run")
    split: str = Field("val", description="split to evaluate on: val or train; some corpora also have test")
    stride: Int | None = Field(
        None,
        ge=1,
        description="distance in tokens between the starts of overlapping windows; default: windows do not overlap",
    )
    text: str | None = Field(
        None,
        description="text file to evaluate on, or wikitext2: WikiText-2 as in the perplexity guide of transformers",
    )
    tasks: Words = Field(
        [],
        description="lm-eval tasks, such as hellaswag,lambada_openai, or core (DCLM's CORE set); requires the package "
        "lm-eval",
    )
    tasks_dir: str | None = Field(None, description="folder with your own lm-eval task files")
    num_fewshot: Int | None = Field(None, ge=0, description="few-shot examples per prompt; default: set by the task")
    limit: Int | None = Field(None, ge=1, description="use at most this many questions per task")
    json_output: bool = Field(False, alias="json", description="print one JSON object and nothing else")


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel evaluate MODEL [--recipe RECIPE] [--json] [key=value ...]",
            "Compute the loss in nats per token, perplexity and bits per byte of a model on the full validation split. "
            "With eval_iters=N, use only N batches.\nMODEL is a run folder (its best checkpoint), a checkpoint folder, "
            "gpt2 to gpt2-xl, or another folder or Hub id of a GPT-2, Llama, Qwen3 or NanoChat model.\nblock_size=N "
            "evaluates samples of N tokens; the default is the model's context length.",
            {"options": EvaluateOptions, "data": SECTIONS["data"], "train": TRAIN},
        )
    target, options, given, problems = cli.parse_with_recipe(argv, EvaluateOptions, FIELDS)
    if target is None:
        problems.append("MODEL is missing; usage: nanogpt-accel evaluate runs/NAME")
    raise_problems(problems)
    train_keys = {key: value for key, value in given.items() if key.rpartition(".")[2] in TRAIN.model_fields}
    if options.tasks:
        return evaluate_tasks(target, load_recipe(None, train_keys), options)
    if options.text:
        recipe = load_recipe(None, {"eval_iters": "all", **train_keys}, check=lambda recipe: check_launcher())
    else:
        recipe = load_data_recipe(target, options.recipe, given)
    has_block_size = not {"block_size", "model.block_size"}.isdisjoint(given)
    evaluate(target, recipe, options, recipe.model.block_size if has_block_size else None)


class Text(NamedTuple):
    """The tokens to evaluate on."""

    name: str
    tokens: object  # supports len() and rows(starts, length)
    n_bytes: int | None  # None if unknown
    eot_id: int | None


def load_data_recipe(target, path, given):
    """Load the recipe that defines the data to evaluate on.

    path: file of the recipe. None: if `given` contains corpus or data_dir, these define the data; otherwise, load
        run.yaml of the run that trained the model `target`. If `given` contains corpus, but neither data_dir nor
        tokenizer, the text is encoded with the tokenizer of the model.
    given: recipe settings from the command line.
    """
    keys = {key.removeprefix("data.") for key in given} & {"corpus", "data_dir", "tokenizer"}
    if path is None and keys & {"corpus", "data_dir"}:
        if keys == {"corpus"}:
            folder = find_model(target, warn=lambda line: None, bars=is_main())
            tokenizer = Tokenizer.load(folder)
            defaults = {"special_tokens": tokenizer.special_tokens or "text"}
            given = {**defaults, **given, "tokenizer": "gpt2" if tokenizer.kind == "gpt2" else str(folder)}
    elif path is None:
        path = run_recipe(target)
    given = {"eval_iters": "all", **given}
    return load_recipe(path, given, check=lambda recipe: run_data.check(recipe.data, 1) + check_launcher())


def run_recipe(target):
    """Return the path of a run's run.yaml. target: the run folder, or a checkpoint folder in the run folder."""
    for folder in (Path(target), Path(target).parent):
        if (folder / "run.yaml").is_file():
            return folder / "run.yaml"
    reason = "no run.yaml in or next to this folder" if Path(target).exists() else "no such folder"
    raise ValueError(f"{target}: {reason}, so the data is unknown; add --recipe RECIPE, corpus=... or data_dir=...")


def evaluate(target, recipe, options, block_size=None):
    """Print the scores of a model on a split of a recipe's data, or on options.text.

    block_size: length of the samples in tokens; None: the model's context length.
    """
    console = Console(is_main(), stderr=True)
    folder = find_model(target, console, bars=console.is_verbose)
    config = read_config(folder)
    block_size = block_size or config["block_size"]
    if options.text:
        texts, problems = open_text(options, folder, config, console)
    else:
        texts, problems = open_splits(recipe, options, folder, block_size, config, target, console)
    for text in texts:
        problems += check_windows(text, block_size, recipe, options, config, folder)
    raise_problems(problems)

    from ..evaluation import describe, mean_and_error, scores

    accelerator = make_accelerator(recipe.train.device, recipe.train.mixed_precision, recipe.train.compile)
    model, found = load_for_evaluation(folder, accelerator), []
    split = "text" if options.text and Path(options.text).is_file() else options.split
    for text in texts:
        sums, counts = compute_losses(model, text, block_size, options.stride, recipe, accelerator, console)
        loss, error = mean_and_error(sums, counts)
        results = scores(loss, len(text.tokens), text.n_bytes, split=split, error=error)
        found.append({"data": text.name, "split": split, **results, "tokens": int(counts.sum())})
        if accelerator.is_main_process and not options.json_output:
            print(printable(f"{folder} on {text.name}, {int(counts.sum()):,} tokens: {describe(results)}"))
    if accelerator.is_main_process and options.json_output:
        print(to_json({"model": str(folder), **(found[0] if len(found) == 1 else {"sets": found})}))
    accelerator.end_training()


def open_splits(recipe, options, folder, block_size, config, target, console):
    """Open options.split of each source of the recipe's data. For split=val, also open the recipe's validation sets.
    Prepare the data if needed. Return (list of Text, list of problems)."""
    data, split = run_data.open_run_data(recipe, block_size, console), options.split
    problems = dataset.require_tokenizer(data.main, folder, key=target)
    problems = problems or check_tokenizer(data.tokenizer, config, folder)
    texts, eot_id = [], data.tokenizer.eot_id
    for source in data.sources.values():
        if split in source.splits:
            texts.append(Text(str(source.folder), source.splits[split], source.text_bytes(split), eot_id))
        else:
            problems.append(f"split={split}: not in {source.folder}, which only has {', '.join(source.splits)}")
    for name, tokens in data.validation.items() if split == "val" else ():
        texts.append(Text(name, tokens, None, eot_id))
    return texts, problems


def open_text(options, folder, config, console):
    """Return ([Text], list of problems) for options.text, encoded with the tokenizer of the model in `folder`."""
    path = Path(options.text)
    try:
        # utf-8-sig removes a byte order mark
        text = path.read_text(encoding="utf-8-sig") if path.is_file() else joined_text(options.text, options.split)
    except UnicodeDecodeError as error:
        fix = how_to_convert(path.read_bytes(), path)
        raise ValueError(f"text={path}: not UTF-8 text at byte {error.start}; {fix}") from None
    tokenizer = Tokenizer.load(folder)
    try:
        tokens = TokenArray(tokenizer.encode_document(text))
    except EncodingError as error:
        fix = "remove this text from the file, or evaluate a model with another tokenizer"
        raise ValueError(f"text={path}: with the tokenizer of {folder}, {error}; {fix}") from None
    if lost := describe_losses(text, tokenizer):
        problem = f"{lost}; bits per byte is too low, because its byte count includes the lost characters"
        console.say(f"warning: text={path}: with the tokenizer of {folder}, {problem}")
    problems = check_tokenizer(tokenizer, config, folder)
    problems += [] if len(tokens) > 1 else [f"text={path}: must have at least 2 tokens, but has {len(tokens)}"]
    return [Text(options.text, tokens, len(text.encode()), tokenizer.eot_id)], problems


def check_windows(text, block_size, recipe, options, config, folder):
    """Check block_size and stride against the model and the text. Return a list of problems."""
    stride, eval_iters, context, problems = options.stride, recipe.train.eval_iters, config["block_size"], []
    has_windows = options.text and stride  # sliding windows may be shorter than block_size
    if len(text.tokens) <= block_size and not has_windows:
        size = f"{text.name} has {len(text.tokens):,} tokens, but a sample needs {block_size + 1:,}"
        problems.append(f"block_size={block_size}: {size}; set a smaller block_size")
    if config["position"] == "learned" and block_size > context:
        problems.append(f"block_size={block_size}: must not exceed {context}, the context length of {folder}")
    if stride and stride > block_size:
        problems.append(
            f"stride={stride}: must not exceed block_size={block_size}, because tokens between windows would be skipped"
        )
    if stride and eval_iters != "all":
        problems.append(f"eval_iters={eval_iters}: not supported with stride={stride}; remove one of them")
    return problems


def load_for_evaluation(folder, accelerator):
    from ..distributed import cpu

    model = load_model(folder).to(accelerator.device)
    cpu.tune(model, accelerator)
    return accelerator.prepare_model(model, evaluation_mode=True)


def compute_losses(model, text, block_size, stride, recipe, accelerator, console):
    """Evaluate a model. Return (sums, counts): per window, the sum of the losses and the number of tokens."""
    from ..batches import evaluation_batches, model_inputs, sliding_windows
    from ..evaluation import window_losses

    train = recipe.train
    if stride:
        windows = sliding_windows(len(text.tokens), block_size, stride, train.batch_size)
    else:
        batches = evaluation_batches(len(text.tokens), block_size, train.batch_size, train.eval_iters)
        windows = [(starts, length, length) for starts, length in batches]
    eot_id = text.eot_id if recipe.data.document_mask else None
    to_inputs = partial(model_inputs, device=accelerator.device, eot_id=eot_id)
    if accelerator.state.dynamo_plugin.backend != "NO":
        console.say("compiling the model: the first batch takes longer")
    with Progress("evaluating", len(windows), console, "batches") as progress:
        return window_losses(model, text.tokens, windows, to_inputs, accelerator, progress)


def evaluate_tasks(target, recipe, options):
    """Print the scores of a model on tasks of lm-eval (EleutherAI's evaluation harness)."""
    raise_problems(check_tasks(options.tasks, options.tasks_dir) + check_model(target))
    device = pick_device(recipe.train.device)
    console = Console(is_main(), stderr=True)
    console.say(f"loading lm-eval and its tasks {', '.join(options.tasks)}")
    tasks = load_tasks(options.tasks, options.tasks_dir, options.num_fewshot)  # before the model is downloaded
    from lm_eval.models.huggingface import HFLM

    folder = find_model(target, console, bars=console.is_verbose)
    # lm-eval initializes weights that it does not find with random values, so check their names first. check_weights
    # also registers GPT with AutoModelForCausalLM, which lm-eval uses
    if check_weights(folder)[-1]:
        problem = "the names of the weights start with module. or _orig_mod., which lm-eval does not support"
        raise ValueError(f"{folder}: {problem}; export the model first")
    dtype = "float32" if device.type == "cpu" else "auto"
    lm = HFLM(pretrained=str(folder), dtype=dtype, batch_size=recipe.train.batch_size, device=str(device))
    scores = score_tasks(lm, tasks, options.limit)
    if scores is None:  # not the main process
        return
    core = core_average(scores)
    if options.json_output:
        print(to_json({"model": str(folder), "tasks": scores} | ({} if core is None else {"core": core})))
        return
    for task, values in scores.items():
        print(printable(f"{folder} on {task}: {describe_task(values)}"))
    if core is not None:
        print(printable(f"{folder} on core: centered accuracy {core:.4f}"))


def describe_task(values):
    """Format the scores of a task. lm-eval calls a score "metric,filter" and its std. error "metric_stderr,filter"."""
    parts = []
    for key, value in values.items():
        if "," in key and "_stderr" not in key:
            error = values.get(key.replace(",", "_stderr,"))
            parts.append(f"{key.split(',')[0]} {value:.4f}" + (f" +- {error:.4f}" if error is not None else ""))
    return ", ".join(parts)
