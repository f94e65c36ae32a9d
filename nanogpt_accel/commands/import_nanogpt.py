"""Convert a nanoGPT ckpt.pt to a model folder of this package.

nanogpt-accel import nanoGPT/out-shakespeare-char/ckpt.pt --to imported
nanogpt-accel train recipes/shakespeare_char.yaml init_from=imported out_dir=runs/more
"""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field

from ..checkpoint.run_folder import check_empty
from ..data.find_tokenizer import TOKENIZERS, load_tokenizer
from ..data.meta import read_meta, tokenizer_from_meta
from ..data.tokenizer import Tokenizer
from ..hub.card import model_card
from ..models.export import write_model
from ..models.nanogpt import read_nanogpt
from ..tracking.console import Console
from ..utils import cli
from ..utils.fields import Section, raise_problems
from ..utils.text import printable


class ImportOptions(Section):
    """The options of `import`."""

    to: str = Field("", description="output folder; must be empty or not exist yet")
    tokenizer: str = Field(
        "auto",
        description="auto, gpt2, the path of a meta.pkl of nanoGPT, a folder with a tokenizer.json, or hub:USER/NAME. "
        "auto: use the meta.pkl next to CKPT.pt, otherwise nanoGPT's data/DATASET/meta.pkl, otherwise gpt2 (only if "
        "the model has GPT-2's vocabulary size)",
    )
    activation: Literal["gelu", "gelu_new"] = Field(
        "gelu", description="activation function; use gelu_new for checkpoints from before May 2023"
    )


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel import CKPT.pt --to FOLDER [key=value ...]",
            "Convert a checkpoint of nanoGPT's train.py to a model folder for sample, evaluate, export, push and "
            "init_from. Code in the checkpoint file is never executed.",
            {"options": ImportOptions},
        )
    target, options, problems = cli.parse_options(argv, ImportOptions)
    to = os.path.expanduser(options.to)
    usage = "nanogpt-accel import CKPT.pt --to FOLDER"
    if target is not None and (Path(target) / "ckpt.pt").is_file():
        target = str(Path(target) / "ckpt.pt")
    if target is None:
        problems.append(f"CKPT.pt is missing; usage: {usage}")
    elif not Path(target).is_file():
        problems.append(f"{target}: no such file")
    problems += check_empty(to, "to") if to else [f"--to is missing; usage: {usage}"]
    raise_problems(problems)

    model, info = read_nanogpt(target, options.activation)
    dataset = str(info["config"].get("dataset", "")) if isinstance(info["config"], dict) else ""
    tokenizer = find_tokenizer(options.tokenizer, Path(target), dataset, model.config.vocab_size)
    try:
        loss = float(info["best_val_loss"])
    except (TypeError, ValueError, RuntimeError):  # missing, or not a number
        loss = None
    summary = f"{info['iter_num']} steps, best validation loss " + ("unknown" if loss is None else f"{loss:.4f}")
    card = model_card(
        Path(to).resolve().name,
        f"A GPT language model, trained with nanoGPT on its data set `{dataset}`: {summary}.",
        tokenizer,
        model.config.block_size,
        needs_code=True,
        corpora=[{"kind": "nanogpt", "name": dataset}],
        val_loss=loss,
    )
    difference, tokens = write_model(model, to, "custom", tokenizer=tokenizer, card=card, report=Console(stderr=True))
    check = f"largest logit difference over {tokens:,} tokens: {difference:.1e}"
    print(printable(f"{to}: {model.num_parameters():,} parameters, {tokenizer.kind} tokenizer, {summary}; {check}"))


def find_tokenizer(setting, checkpoint_file, dataset, vocab_size):
    """Return the Tokenizer of a nanoGPT checkpoint.

    setting: the option `tokenizer`. dataset: the option `dataset` in nanoGPT's config.

    Raises:
        ValueError: the tokenizer cannot be found, or has a larger vocabulary than the model.
    """
    folder = checkpoint_file.resolve().parent
    meta = folder / "meta.pkl"  # written by `export`
    if dataset and not meta.is_file():
        meta = folder.parent / "data" / dataset / "meta.pkl"
    has_meta = os.path.isfile(meta)  # Path.is_file raises an error if the name is too long
    if setting == "auto" and not has_meta and vocab_size not in (50257, 50304):
        raise ValueError(
            f"{checkpoint_file}: the tokenizer of this model (vocabulary size {vocab_size}) is unknown, because {meta} "
            "does not exist; set tokenizer to the path of the meta.pkl of this model"
        )
    if setting == "auto":
        setting = str(meta) if has_meta else "gpt2"
    if setting == "gpt2":
        tokenizer = Tokenizer.gpt2()
    elif setting.endswith(".pkl"):
        if not Path(setting).is_file():
            raise ValueError(f"tokenizer={setting}: no such file")
        tokenizer = tokenizer_from_meta(read_meta(setting))
    elif setting in TOKENIZERS:
        fix = "set tokenizer to a meta.pkl or a folder"
        raise ValueError(f"tokenizer={setting}: cannot be built without the training text; {fix}")
    else:
        tokenizer = load_tokenizer(setting)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer={setting}: has {tokenizer.vocab_size:,} tokens, but the vocabulary size of {checkpoint_file} "
            f"is only {vocab_size:,}; set tokenizer to the tokenizer that the model was trained with"
        )
    return tokenizer
