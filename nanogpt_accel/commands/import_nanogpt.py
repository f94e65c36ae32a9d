"""Read a nanoGPT ckpt.pt and write it as a model folder of this toolkit.

nanogpt-accel import nanoGPT/out-shakespeare-char/ckpt.pt --to imported
nanogpt-accel train recipes/shakespeare_char.yaml init_from=imported out_dir=runs/more
"""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field

from ..checkpoint.run_folder import check_empty
from ..data.manifest import read_meta
from ..data.tokenizer import Tokenizer
from ..hub.card import model_card
from ..models.export import write_model
from ..models.load import fit_to_tokenizer
from ..models.nanogpt import read_nanogpt
from ..tracking.console import Console
from ..utils import cli
from ..utils.fields import Section, raise_problems


class ImportOptions(Section):
    """The options of `import`."""

    to: str = Field("", description="the folder to write; it must not exist yet, or be empty")
    tokenizer: str = Field(
        "auto",
        description="gpt2, a nanoGPT meta.pkl, or a folder that holds a tokenizer.json; "
        "auto: nanoGPT's data/DATASET/meta.pkl beside the checkpoint's folder, else gpt2",
    )
    activation: Literal["gelu", "gelu_new"] = Field(
        "gelu", description="gelu: nanoGPT since May 2023; gelu_new: checkpoints of older versions"
    )


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel import CKPT.pt --to FOLDER [key=value ...]",
            "Read a checkpoint of nanoGPT's train.py and write a model folder: for sample, evaluate, "
            "export, push, and as init_from of a run. Weights only; nothing in the file is executed.",
            {"options": ImportOptions},
        )
    target, options, problems = cli.parse_options(argv, ImportOptions)
    to = os.path.expanduser(options.to)
    if target is not None and (Path(target) / "ckpt.pt").is_file():
        target = str(Path(target) / "ckpt.pt")
    if target is None:
        problems.append("which checkpoint? nanogpt-accel import CKPT.pt --to FOLDER")
    elif not Path(target).is_file():
        problems.append(f"{target}: no such file")
    if not options.to:
        problems.append("where to? nanogpt-accel import CKPT.pt --to FOLDER")
    else:
        problems += check_empty(to, "to")
    raise_problems(problems)

    model, info = read_nanogpt(target, options.activation)
    dataset = str(info["config"].get("dataset", "")) if isinstance(info["config"], dict) else ""
    tokenizer = find_tokenizer(options.tokenizer, Path(target), dataset, model.config.vocab_size)
    fit_to_tokenizer(model, tokenizer)
    try:
        loss = f"{float(info['best_val_loss']):.4f} nats a token"
    except (TypeError, ValueError, RuntimeError):  # missing, or not a number
        loss = "unknown"
    facts = f"{info['iter_num']} steps, best validation loss {loss}"
    card = model_card(
        Path(to).name, f"A GPT trained with nanoGPT on its data set `{dataset}`: {facts}.", needs_code=True
    )
    difference, tokens = write_model(model, to, "custom", tokenizer=tokenizer, card=card, report=Console(stderr=True))
    print(
        f"{to}: {model.num_parameters():,} parameters, {tokenizer.kind} tokens, {facts}; largest difference "
        f"of a logit over {tokens:,} tokens: {difference:.1e}"
    )


def find_tokenizer(asked, checkpoint_file, dataset, vocab_size):
    """Return the Tokenizer of the checkpoint's ids. asked: the option `tokenizer`.

    Raises:
        ValueError: it cannot be found, or has more tokens than the model.
    """
    meta = checkpoint_file.resolve().parent.parent / "data" / dataset / "meta.pkl"
    has_meta = bool(dataset) and os.path.isfile(meta)  # unlike Path.is_file, false for a name that is too long
    if asked == "auto" and not has_meta and vocab_size not in (50257, 50304):
        raise ValueError(
            f"{checkpoint_file}: a vocabulary of {vocab_size} symbols, and no {meta} to say which they "
            "are: give tokenizer=PATH of that file"
        )
    if asked == "auto":
        asked = str(meta) if has_meta else "gpt2"
    if asked == "gpt2":
        tokenizer = Tokenizer.gpt2()
    elif asked.endswith(".pkl"):
        if not Path(asked).is_file():
            raise ValueError(f"tokenizer={asked}: no such file")
        stoi = read_meta(asked)
        tokenizer = Tokenizer.char_from_meta(stoi) if stoi else Tokenizer.gpt2()
    else:
        tokenizer = Tokenizer.load(asked)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer={asked}: {tokenizer.vocab_size:,} symbols, more than the {vocab_size:,} of "
            f"{checkpoint_file}: it belongs to another model"
        )
    return tokenizer
