"""Write a GPT as a model folder for other tools, and verify it by its logits."""

import os
import shutil
from pathlib import Path

import numpy as np

from ..data.tokenizer import Tokenizer
from ..hub.card import converted_card
from .load import check_tokenizer, load_model, load_strict, read_config
from .stock import FORMS, stock_form, stock_settings, to_stock

# ---- folders for others


def export(source, to, form, keep_padding=False, dtype="float32", report=print):
    """Write the model of a folder as another folder.

    Args:
        source: a model folder of any form. to: as in `write`. form: "stock" or "custom".
        dtype: of the weights, "float32", "bfloat16" or "float16"; they are rounded to it first, so that the comparison
            stays exact. keep_padding: whether a stock form keeps the rows of the vocabulary that only round it up.
        report: called with a line about each thing that takes a while.

    Returns:
        (class, difference, tokens): the name of the class that loads it, and what `write` returns.

    Raises:
        ValueError: no stock architecture computes what the model does; the message names the switches in the way.
    """
    source, config, tokenizer = Path(source), read_config(source), Tokenizer.load(source)
    if problems := check_tokenizer(tokenizer, config, source):
        raise ValueError(problems[0])
    if form == "stock":
        form, obstacles = stock_form(config)
        if obstacles:
            raise ValueError(
                f"{source}: no stock model is the same; {FORMS[form]} comes nearest, but for "
                f"{', '.join(obstacles)}: form=custom writes the model with its own model.py, for "
                "trust_remote_code=True"
            )
    report(f"{source}: {config['n_layer']} layers, to be written as {FORMS.get(form, 'GPT')}")
    card = converted_card(source, Path(to).name, needs_code=form == "custom")
    difference, tokens = write_model(
        load_model(source),
        to,
        form,
        tokenizer=tokenizer,
        card=card,
        dtype=dtype,
        report=report,
        rows=None if keep_padding else tokenizer.vocab_size,
    )
    return FORMS.get(form, "GPT"), difference, tokens


def write_model(model, to, form, *, tokenizer, card, rows=None, dtype="float32", report=print):
    """Write a GPT as a folder that transformers loads, and load it again to compare the logits on a text.

    Args:
        model: the GPT, in float32 on the CPU, in eval mode. to: a folder that does not exist yet, or is empty.
        form: a key of FORMS that stock_form() gave, or "custom" for GPT itself with its model.py.
        tokenizer: of the model. card: text of README.md.
        rows: of a stock form's vocabulary, where they are to be fewer than the model's.
        dtype: of the weights that are written; the model's own are rounded to it too.
        report: as in `export`.

    Returns:
        (difference, tokens): the largest difference of a logit, and the number of tokens compared.

    Raises:
        RuntimeError: the folder does not compute what the model does; it is not kept.
        OSError: it cannot be written.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    to, existed = Path(to), Path(to).exists()
    temporary = to / ".tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir(parents=True)
        dtype = getattr(torch, dtype)
        report(f"writing {model.num_parameters():,} parameters")
        model.to(dtype)
        if form == "custom":
            rows = model.config.vocab_size
            model.save_pretrained(temporary)
        else:
            rows = min(rows or model.config.vocab_size, model.config.vocab_size)
            _save_stock(model, temporary, form, rows, tokenizer.vocab_size)
        tokenizer.save(temporary, max_length=model.config.block_size)
        (temporary / "README.md").write_text(card, encoding="utf-8")

        report("loading them again, to compare the logits")
        model.float()
        loaded = load_strict(AutoModelForCausalLM, temporary)
        ids = torch.from_numpy(_probe(tokenizer, min(model.config.block_size, 1024)))[None]  # (1, T)
        with torch.no_grad():
            ours, theirs = model(ids).logits[..., :rows], loaded(ids).logits
        if not ours.isfinite().all():
            raise ValueError(f"{to}: nothing was written, for the source's own logits are no numbers (nan or inf)")
        difference = (ours - theirs).abs().max().item()
        if not difference <= 1e-5 * max(1.0, ours.abs().max().item()):
            raise RuntimeError(f"{to}: the model as written differs from its source by {difference}; it was not kept")
        # config.json last: without it a folder is no model yet
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, to / file.name)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{to}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not existed and to.exists() and not any(to.iterdir()):
            to.rmdir()
    return difference, ids.numel()


def _save_stock(model, folder, form, rows, n_tokens):
    """save_pretrained of a stock model with GPT's weights, the vocabulary cut to `rows`. Of these, n_tokens are
    symbols of the tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = model.config.to_dict() | {"vocab_size": rows}
    weights = {
        name: p.detach()[:rows] if name in ("transformer.wte.weight", "lm_head.weight") else p.detach()
        for name, p in model.named_parameters()
    }
    weights = to_stock(form, config, weights)
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(form, **stock_settings(form, config)))
    stock.to(model.dtype)
    for name, parameter in stock.named_parameters():
        if name not in weights:  # a bias that GPT has not is zero there, the gain of a norm one
            assert parameter.dim() == 1, name
            weights[name] = torch.full(parameter.shape, float(name.endswith("weight")), dtype=model.dtype)
    if form != "gpt2":
        stock.config.rope_theta = float(config["rope_theta"])  # transformers 4 reads it here, or silently takes 10,000
    stock.generation_config = GenerationConfig(
        bos_token_id=config["bos_token_id"],
        eos_token_id=config["eos_token_id"],
        suppress_tokens=list(range(n_tokens, rows)) or None,
    )
    stock.save_pretrained(folder, state_dict=weights)


_TEXT = """A language model reads the beginning of a text and says how likely each symbol is to come next. Trained on
enough of it, the model has to learn spelling first, then grammar, and at last something of what the text is about.
It was 1948 when C. E. Shannon drew letters from a book by hand; "the process is laborious", he wrote, and stopped.
    def loss(logits, target): return -log_softmax(logits)[target]  # in nats
"""


def _probe(tokenizer, length):
    """Ids of a text to compare models on, (length,) int64; of symbols that the tokenizer lacks, none."""
    text = _TEXT if tokenizer.kind != "char" else "".join(c for c in _TEXT if c in tokenizer.vocab)
    ids = tokenizer.encode(text) if text else range(tokenizer.vocab_size)
    return np.resize(np.asarray(ids, dtype=np.int64), length)
