"""Load a GPT from a model folder of any supported architecture."""

import json
import os
from pathlib import Path

from .stock import FORMS, GPT2_DEFAULTS, from_stock, from_stock_config

# ---- what a folder holds


def read_config(folder):
    """The config of a model folder of any form, with every None resolved.

    Raises:
        ValueError: a family or a switch that GPT does not cover; the message names it.
    """
    try:
        stored = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder}: gone while it was read; a run that is training prunes its older checkpoints: try again"
        ) from None
    kind = stored.get("model_type")
    try:
        if kind == "nanogpt_accel":
            config = {**GPT2_DEFAULTS, "bias": False, "bos_token_id": None, "eos_token_id": None, **stored}
        elif kind in FORMS:
            config = from_stock_config(kind, stored)
        else:
            raise ValueError(f"a model of type {kind}")
        config["n_kv_head"] = config["n_kv_head"] or config["n_head"]
        config["head_dim"] = config["head_dim"] or config["n_embd"] // config["n_head"]
        config["n_inner"] = config["n_inner"] or 4 * config["n_embd"]
        for key in ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_inner"):
            if not isinstance(config[key], int) or config[key] < 1:
                raise ValueError(f"{key}={config[key]!r} is no shape of a model")
    except (TypeError, AttributeError, ZeroDivisionError):
        raise ValueError(f"{folder}: config.json of type {kind} holds a shape that is no number") from None
    except KeyError as error:
        raise ValueError(f"{folder}: config.json of type {kind} lacks {error.args[0]}") from None
    except ValueError as error:
        raise ValueError(
            f"{folder}: {error}; taken are this toolkit's own and {', '.join(FORMS)}, with plain rotary "
            "positions and full attention"
        ) from None
    return config


def load_model(folder, **changes):
    """The GPT of a model folder of any form, in float32 on the CPU and in eval mode.

    changes: fields of the config to set, such as dropout.

    Raises:
        ValueError: a family or a switch that GPT does not cover, or weights that do not fit the config.
    """
    from transformers import AutoModelForCausalLM

    from ..model import GPT, GPTConfig

    config = read_config(folder)
    if config.get("model_type") == "nanogpt_accel":
        return load_strict(GPT, folder, **changes)
    # transformers knows the shards, the old names and the old files of its own models
    stock = load_strict(AutoModelForCausalLM, folder)
    weights = {name: parameter.detach() for name, parameter in stock.named_parameters()}
    # zero biases are how `export` writes that there are none
    config["bias"] = any(tensor.any() for name, tensor in weights.items() if name.endswith(".bias"))
    return build_model(GPTConfig(**{**config, **changes}), from_stock(stock.config.model_type, config, weights))


def short_reason(error):
    """The reason that an error gives, in one line of bearable length."""
    text = str(error).split("WeightsUnpickler error: ")[-1].split("Re-running `torch.load`")[0]
    return " ".join(text.split())[:200] or type(error).__name__


def load_strict(model_class, folder, **changes):
    """from_pretrained in float32, but weights that do not fit are an error; by itself it draws random ones in the place
    of what is missing, and leaves out what is too many."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would stand among our lines
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # and its table of what is missing is said in our words
    try:
        model, info = model_class.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **changes,
        )
    except Exception as error:  # transformers raises almost anything for files that are not what they should be
        raise ValueError(f"{folder}: cannot be loaded: {short_reason(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    wrong = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if model.config.model_type == "nanogpt_accel":  # others' files may hold tables that are of no use any more
        wrong |= set(info["unexpected_keys"])
    if wrong:
        raise ValueError(
            f"{folder}: model.safetensors does not fit config.json, for what is missing, too many or of "
            f"another shape there: {', '.join(sorted(wrong)[:3])}{', ...' if len(wrong) > 3 else ''}"
        )
    if os.name == "nt":  # which deletes and replaces no file that is mapped into memory, as the weights are
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model.eval()


def build_model(config, weights):
    """A GPT with these weights, without the time that it takes to draw others first.

    Raises:
        RuntimeError: a tensor is missing, too many, or of another shape.
    """
    import torch

    from ..model import GPT

    with torch.device("meta"):
        model = GPT(config)
    tied = {"lm_head.weight": weights["transformer.wte.weight"]} if config.tie_word_embeddings else {}
    model.load_state_dict(weights | tied, assign=True)
    model.tie_weights()
    return model.eval()


def check_tokenizer(tokenizer, config, folder):
    """Whether the model of a folder has a row for each symbol, as a list of problems."""
    if tokenizer.vocab_size <= config["vocab_size"]:
        return []
    return [
        f"{folder}: its tokenizer has {tokenizer.vocab_size:,} symbols, but the model only "
        f"{config['vocab_size']:,} rows for them: one of the two belongs to another model"
    ]


def fit_to_tokenizer(model, tokenizer):
    """Tell a model what its ids mean, in place: which one ends a text, where that is not known yet, and that rows of
    the embedding which only round it up are no tokens, so that no `generate` draws them."""
    for config in (model.config, model.generation_config):
        if config.eos_token_id is None:
            config.bos_token_id = config.eos_token_id = tokenizer.eot_id
    model.generation_config.suppress_tokens = list(range(tokenizer.vocab_size, model.config.vocab_size)) or None
