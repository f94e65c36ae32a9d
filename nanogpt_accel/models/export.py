"""Write a GPT as a model folder for other tools, and compare the logits of the folder with the source's."""

import os
import shutil
from pathlib import Path

import numpy as np

from ..data.tokenizer import Tokenizer
from ..hub.card import converted_card
from .load import check_tokenizer, load_model, load_strict, read_config
from .stock import ARCHITECTURES, nearest_architecture, to_stock_config, to_stock_weights


def export(source, to, form, keep_padding=False, dtype="float32", report=print):
    """Convert a model folder to another folder.

    Args:
        source: a model folder of any supported architecture. to: as in `write_model`. form: "stock" or "custom".
        keep_padding: whether a stock model keeps the entries that only round the vocabulary size up.
        dtype: of the weights, "float32", "bfloat16" or "float16". Both sides of the comparison are rounded to it.
        report: called with a line before each slow part.

    Returns:
        (class, difference, tokens): the name of the class that loads the folder, and what `write_model` returns.

    Raises:
        ValueError: no stock architecture computes the same as the model; the message names the switches.
    """
    source, config, tokenizer = Path(source), read_config(source), Tokenizer.load(source)
    if problems := check_tokenizer(tokenizer, config, source):
        raise ValueError(problems[0])
    name = "GPT"
    if form == "stock":
        form, obstacles = nearest_architecture(config)
        name = ARCHITECTURES[form].model_class
        if obstacles:
            raise ValueError(
                f"{source}: no stock model is the same; {name} comes nearest, but for "
                f"{', '.join(obstacles)}: form=custom writes the model with its own model.py, for "
                "trust_remote_code=True"
            )
    report(f"{source}: {config['n_layer']} layers, to be written as {name}")
    difference, tokens = write_model(
        load_model(source),
        to,
        form,
        tokenizer=tokenizer,
        card=converted_card(source, Path(to).name, needs_code=form == "custom"),
        dtype=dtype,
        report=report,
        rows=None if keep_padding else tokenizer.vocab_size,
    )
    return name, difference, tokens


def write_model(model, to, form, *, tokenizer, card, rows=None, dtype="float32", report=print):
    """Write a GPT as a folder that transformers loads, then load the folder and compare the logits on a text.

    Args:
        model: the GPT, in float32 on the CPU, in eval mode. to: a folder that does not exist yet or is empty.
        form: a key of ARCHITECTURES that supports the model, or "custom" for GPT itself with its model.py.
        tokenizer: of the model. card: text of README.md.
        rows: vocabulary size of a stock model, if it should be smaller than the model's.
        dtype: of the written weights; the model's own are rounded to it too.
        report: as in `export`.

    Returns:
        (difference, tokens): the largest absolute difference of the logits, and the number of tokens compared.

    Raises:
        RuntimeError: the logits differ; the folder is removed. OSError: the folder cannot be written.
    """
    import torch
    from safetensors import SafetensorError
    from transformers.utils import logging

    logging.disable_progress_bar()
    to, existed = Path(to), Path(to).exists()
    temporary = to / ".tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # a killed process may have left it
        temporary.mkdir(parents=True)
        report(f"writing {model.num_parameters():,} parameters")
        model.to(getattr(torch, dtype))
        vocab_size = model.config.vocab_size
        if form == "custom":
            model.save_pretrained(temporary)
        else:
            vocab_size = min(rows or vocab_size, vocab_size)
            _save_stock(model, temporary, form, vocab_size, tokenizer.vocab_size)
        tokenizer.save(temporary, max_length=model.config.block_size)
        (temporary / "README.md").write_text(card, encoding="utf-8")

        report("loading them again, to compare the logits")
        difference, tokens = _compare_logits(model.float(), temporary, to, tokenizer, vocab_size)
        # config.json last: without it a folder is not a model yet
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, to / file.name)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{to}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not existed and to.exists() and not any(to.iterdir()):
            to.rmdir()
    return difference, tokens


def _compare_logits(model, written, to, tokenizer, vocab_size):
    """Return (largest difference, number of tokens) for a model and the folder that was written from it."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = load_strict(AutoModelForCausalLM, written)
    ids = torch.from_numpy(_sample_ids(tokenizer, min(model.config.block_size, 1024)))[None]  # (1, T)
    with torch.no_grad():
        ours, theirs = model(ids).logits[..., :vocab_size], loaded(ids).logits
    if not ours.isfinite().all():
        raise ValueError(f"{to}: nothing was written, for the source's own logits are no numbers (nan or inf)")
    difference = (ours - theirs).abs().max().item()
    if not difference <= 1e-5 * max(1.0, ours.abs().max().item()):
        raise RuntimeError(f"{to}: the model as written differs from its source by {difference}; it was not kept")
    return difference, ids.numel()


def _save_stock(model, folder, form, vocab_size, n_tokens):
    """Save the model as a stock model with this vocabulary size, of which the tokenizer uses n_tokens entries."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = model.config.to_dict() | {"vocab_size": vocab_size}
    weights = {
        name: p.detach()[:vocab_size] if name in ("transformer.wte.weight", "lm_head.weight") else p.detach()
        for name, p in model.named_parameters()
    }
    weights = to_stock_weights(form, config, weights)
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(form, **to_stock_config(form, config)))
    stock.to(model.dtype)
    for name, parameter in stock.named_parameters():
        if name not in weights:  # zero for a bias that GPT does not have, one for the gain of a norm
            assert parameter.dim() == 1, name
            weights[name] = torch.full(parameter.shape, float(name.endswith("weight")), dtype=model.dtype)
    if form != "gpt2":
        stock.config.rope_theta = float(config["rope_theta"])  # transformers 4 reads it here, else silently uses 10,000
    stock.generation_config = GenerationConfig(
        bos_token_id=config["bos_token_id"],
        eos_token_id=config["eos_token_id"],
        suppress_tokens=list(range(n_tokens, vocab_size)) or None,
    )
    stock.save_pretrained(folder, state_dict=weights)


_TEXT = """A language model reads the beginning of a text and says how likely each symbol is to come next. Trained on
enough of it, the model has to learn spelling first, then grammar, and at last something of what the text is about.
It was 1948 when C. E. Shannon drew letters from a book by hand; "the process is laborious", he wrote, and stopped.
    def loss(logits, target): return -log_softmax(logits)[target]  # in nats
"""


def _sample_ids(tokenizer, length):
    """Return ids of a text to compare models on, (length,) int64, without characters that the tokenizer lacks."""
    text = _TEXT if tokenizer.kind != "char" else "".join(c for c in _TEXT if c in tokenizer.vocab)
    ids = tokenizer.encode(text) if text else range(tokenizer.vocab_size)
    return np.resize(np.asarray(ids, dtype=np.int64), length)
