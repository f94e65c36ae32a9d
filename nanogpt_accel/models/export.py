"""Write a GPT as a model folder for other tools, and check that the written model gives the same logits."""

import os
import shutil
from pathlib import Path

import numpy as np

from ..data.tokenizer import Tokenizer
from ..hub.card import converted_card
from ..utils.fields import raise_problems
from .load import check_tokenizer, load_model, load_strict, read_config
from .stock import ARCHITECTURES, nearest_architecture, to_stock_config, to_stock_weights

# sample text for the comparison of the logits
_TEXT = """A language model reads the start of a text and predicts which token comes next. If it is trained on enough
text, it learns spelling first, then grammar, and in the end something of what the text is about.
In 1948, C. E. Shannon drew letters from a book by hand; "the process is laborious", he wrote, and stopped.
    def loss(logits, target): return -log_softmax(logits)[target]  # in nats
"""


def export(source, to, form, keep_padding=False, dtype="float32", report=print, repo=None, branch=None):
    """Convert a model and write it to a new folder.

    Args:
        source: a model folder of any supported architecture. to, dtype, report: see `write_model`.
        form: "stock" for a model class of transformers, "custom" for GPT with its model.py.
        keep_padding: keep the padded vocabulary size in a stock model.
        repo, branch: Hub repository and branch to name in the model card, if the folder will be uploaded.

    Returns:
        (name of the model class, largest absolute difference of the logits, number of tokens compared)

    Raises:
        ValueError: no stock architecture supports the model. The message names the unsupported settings.
    """
    source, config, tokenizer = Path(source), read_config(source), Tokenizer.load(source)
    raise_problems(check_tokenizer(tokenizer, config, source))
    name = "GPT"
    if form == "stock":
        form, obstacles = nearest_architecture(config)
        name = ARCHITECTURES[form].model_class
        if obstacles:
            raise ValueError(
                f"{source}: no stock architecture supports this model. The closest is {name}, but it does not support "
                f"{', '.join(obstacles)}. Set form=custom to export the model with its model.py; it then requires "
                "trust_remote_code=True"
            )
    report(f"exporting {source} as {name}")
    place = {"needs_code": form == "custom", "repo": repo, "branch": branch}
    card = converted_card(source, Path(to).name, tokenizer, config["block_size"], **place)
    vocab_size = None if keep_padding else tokenizer.vocab_size
    options = {"tokenizer": tokenizer, "card": card, "vocab_size": vocab_size, "dtype": dtype, "report": report}
    return name, *write_model(load_model(source), to, form, **options)


def write_model(model, to, form, *, tokenizer, card, vocab_size=None, dtype="float32", report=print):
    """Write a GPT as a model folder for transformers, load the folder, and compare the logits on a sample text.

    Args:
        model: the GPT, in float32 on the CPU, in eval mode. Its weights are rounded to dtype in place.
        to: a new or empty folder.
        form: a key of ARCHITECTURES that supports the model, or "custom" for GPT with its model.py.
        tokenizer: the model's Tokenizer. card: the text of README.md.
        vocab_size: vocabulary size of the stock model, which may be smaller to remove padding. None: that of the GPT.
        dtype: dtype of the written weights: "float32", "bfloat16" or "float16".
        report: called with a line of text before each slow operation.

    Returns:
        (largest absolute difference of the logits, number of tokens compared)

    Raises:
        RuntimeError: the logits differ, so the written files were removed. OSError: the folder cannot be written.
    """
    import torch
    from safetensors import SafetensorError
    from transformers.utils import logging

    logging.disable_progress_bar()
    to, existed = Path(to), Path(to).exists()
    temporary = to / ".tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # from an interrupted export
        temporary.mkdir(parents=True)
        report(f"writing {model.num_parameters():,} parameters")
        model.to(getattr(torch, dtype))
        if form == "custom":
            vocab_size = model.config.vocab_size
            model.save_pretrained(temporary)
        else:
            vocab_size = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
            _save_stock(model, temporary, form, vocab_size, tokenizer.vocab_size)
        tokenizer.save(temporary, max_length=model.config.block_size)
        (temporary / "README.md").write_text(card, encoding="utf-8")

        report("loading the written model to compare the logits")
        difference, tokens = _compare_logits(model.float(), temporary, to, tokenizer, vocab_size)
        # config.json last, because a folder without config.json is not recognized as a model
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
    """Load the folder `written` and compare its first vocab_size logits with those of the model. Return (largest
    absolute difference, number of tokens compared). to: the final folder, for error messages."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = load_strict(AutoModelForCausalLM, written)
    text = _TEXT if tokenizer.kind != "char" else "".join(c for c in _TEXT if c in tokenizer.vocab)
    try:
        ids = tokenizer.encode(text) if text else range(tokenizer.vocab_size)
    except ValueError:  # a vocabulary without these words
        ids = range(tokenizer.vocab_size)
    ids = torch.tensor(np.resize(np.asarray(ids, dtype=np.int64), (1, min(model.config.block_size, 1024))))  # (1, T)
    with torch.no_grad():
        ours, theirs = model(ids).logits[..., :vocab_size], loaded(ids).logits
    if not ours.isfinite().all():
        raise ValueError(f"{to}: nothing was written, because the logits of the source model contain NaN or Inf")
    difference = (ours - theirs).abs().max().item()
    if not difference <= 1e-5 * max(1.0, ours.abs().max().item()):
        raise RuntimeError(f"{to}: removed, because its logits differ from those of the source model by {difference}")
    return difference, ids.numel()


def _save_stock(model, folder, form, vocab_size, n_tokens):
    """Save the model in the architecture `form` with vocab_size embeddings. n_tokens: vocabulary of the tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = model.config.resolved() | {"vocab_size": vocab_size}
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for name in weights.keys() & {"transformer.wte.weight", "lm_head.weight"}:
        weights[name] = weights[name][:vocab_size]
    weights = to_stock_weights(form, config, weights)
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(form, **to_stock_config(form, config)))
    stock.to(model.dtype)
    for name, parameter in stock.named_parameters():
        if name not in weights:  # a bias or norm weight that GPT does not have: set it to zeros or ones
            assert parameter.dim() == 1, name
            weights[name] = torch.full(parameter.shape, float(name.endswith("weight")), dtype=model.dtype)
    if form != "gpt2":
        stock.config.rope_theta = float(config["rope_theta"])  # for transformers 4, whose default is 10,000
    stock.generation_config = GenerationConfig(
        bos_token_id=config["bos_token_id"],
        eos_token_id=config["eos_token_id"],
        suppress_tokens=list(range(n_tokens, vocab_size)) or None,
    )
    stock.save_pretrained(folder, state_dict=weights)
