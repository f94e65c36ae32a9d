"""Load a GPT from a model folder of any supported architecture."""

import json
import os
from pathlib import Path

from ..utils.text import one_line
from .stock import ARCHITECTURES, DEFAULTS, from_stock_config, from_stock_weights


def read_config(folder):
    """Return the config of a model folder as a dict of GPTConfig's fields, with every None of the shape resolved.

    Raises:
        ValueError: GPT does not support the architecture or one of its features; the message names it.
    """
    try:
        stored = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder}: config.json was deleted; a training run prunes old checkpoints. Try again"
        ) from None
    kind = stored.get("model_type")
    try:
        if kind == "nanogpt_accel":
            config = {**DEFAULTS, "bos_token_id": None, "eos_token_id": None, **stored}
        elif kind in ARCHITECTURES:
            config = from_stock_config(kind, stored)
        else:
            raise ValueError(f"model_type={kind} is not supported")
        config["n_kv_head"] = config["n_kv_head"] or config["n_head"]
        config["head_dim"] = config["head_dim"] or config["n_embd"] // config["n_head"]
        config["n_inner"] = config["n_inner"] or 4 * config["n_embd"]
        for key in ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_inner"):
            if not isinstance(config[key], int) or config[key] < 1:
                raise ValueError(f"{key}={config[key]!r} is not a positive integer")
    except (TypeError, AttributeError, ZeroDivisionError):
        raise ValueError(f"{folder}: config.json of model_type={kind} contains a size that is not a number") from None
    except KeyError as error:
        raise ValueError(f"{folder}: config.json of model_type={kind} has no {error.args[0]}") from None
    except ValueError as error:
        raise ValueError(
            f"{folder}: {error}. Supported are models of this toolkit and {', '.join(ARCHITECTURES)}, with default "
            "rotary embeddings and full attention"
        ) from None
    return config


def load_model(folder, **changes):
    """Load a model folder of any supported architecture as a GPT in float32 on the CPU, in eval mode.

    changes: fields of the config to override, such as dropout.

    Raises:
        ValueError: GPT does not support the architecture or a feature, or the weights do not fit the config.
    """
    from transformers import AutoModelForCausalLM

    from ..model import GPT, GPTConfig

    config = read_config(folder)
    if config.get("model_type") == "nanogpt_accel":
        return load_strict(GPT, folder, **changes)
    # transformers also reads sharded files and older file formats
    stock = load_strict(AutoModelForCausalLM, folder)
    weights = {name: parameter.detach() for name, parameter in stock.named_parameters()}
    # `export` writes a model without biases as one with zero biases
    config["bias"] = any(tensor.any() for name, tensor in weights.items() if name.endswith(".bias"))
    weights = from_stock_weights(stock.config.model_type, config, weights)
    return build_model(GPTConfig(**{**config, **changes}), weights)


def load_strict(model_class, folder, **changes):
    """Load a folder with from_pretrained in float32, and raise an error if the weights do not fit.

    from_pretrained alone initializes missing weights at random and ignores unexpected ones.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would mix with our output
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the error below replaces its table of missing weights
    options = {"dtype": torch.float32, "local_files_only": True, "ignore_mismatched_sizes": True, **changes}
    try:
        model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:  # corrupted files raise almost any exception
        raise ValueError(f"{folder}: cannot be loaded: {loading_error(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    wrong = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if model.config.model_type == "nanogpt_accel":  # older files of other models may contain unused tables
        wrong |= set(info["unexpected_keys"])
    if wrong:
        names = ", ".join(sorted(wrong)[:3]) + ", ..." * (len(wrong) > 3)
        raise ValueError(f"{folder}: weights missing, unexpected or of another shape than in config.json: {names}")
    if os.name == "nt":  # Windows cannot delete or replace a file while weights are memory-mapped from it
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model.eval()


def loading_error(error):
    """Return the reason of an error in one line, without torch.load's advice on weights_only."""
    text = str(error).split("WeightsUnpickler error: ")[-1].split("Re-running `torch.load`")[0]
    return one_line(text.strip() or type(error).__name__)


def build_model(config, weights):
    """Return a GPT with these weights, in eval mode, without the time that random initialization takes.

    Raises:
        RuntimeError: a tensor is missing, unexpected or has the wrong shape.
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
    """Check that the model has an embedding for every token. Return a list of problems."""
    n_tokens, vocab_size = tokenizer.vocab_size, config["vocab_size"]
    problem = f"{folder}: the tokenizer has {n_tokens:,} tokens, but the model only has embeddings for {vocab_size:,}"
    return [f"{problem}; one of the two belongs to another model"] if n_tokens > vocab_size else []


def fit_to_tokenizer(model, tokenizer):
    """Set the model's end-of-text token if it is missing, and never generate the padding of the vocabulary."""
    for config in (model.config, model.generation_config):
        if config.eos_token_id is None:
            config.bos_token_id = config.eos_token_id = tokenizer.eot_id
    model.generation_config.suppress_tokens = list(range(tokenizer.vocab_size, model.config.vocab_size)) or None
