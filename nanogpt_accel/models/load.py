"""Load a GPT from a model folder of any supported architecture."""

import json
import os
from pathlib import Path

from ..utils.text import one_line
from .stock import ARCHITECTURES, DEFAULTS, from_stock_config, from_stock_weights


def read_config(folder):
    """Return the config of a model folder as a dict of GPTConfig's fields, with defaults filled in for None.

    Raises:
        ValueError: GPT does not support the architecture or one of its features. The message gives the reason.
    """
    try:
        stored = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder}: config.json was deleted, probably because a training run pruned the checkpoint; try again"
        ) from None
    kind = stored.get("model_type")
    try:
        for name in stored.get("architectures") or []:
            if str(name).endswith(("Classification", "QuestionAnswering")):
                raise ValueError(f"{name} is not a language model, because it has no output head")
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
        raise ValueError(f"{folder}: config.json of model_type={kind} contains an invalid size") from None
    except KeyError as error:
        raise ValueError(f"{folder}: config.json of model_type={kind} has no {error.args[0]}") from None
    except ValueError as error:
        raise ValueError(
            f"{folder}: {error}. Supported models: nanogpt_accel, {', '.join(ARCHITECTURES)}, with default "
            "rotary embeddings and full attention"
        ) from None
    return config


def load_model(folder, **changes):
    """Load a model folder of any supported architecture as a GPT in float32 on the CPU, in eval mode.

    changes: config fields to override, such as dropout.

    Raises:
        ValueError: GPT does not support the architecture or a feature, or the weights do not fit the config.
    """
    from transformers import AutoModelForCausalLM

    from ..model import GPT, GPTConfig

    config = read_config(folder)
    if config.get("model_type") == "nanogpt_accel":
        return load_strict(GPT, folder, **changes)
    # load with transformers, which also reads sharded files and older formats
    stock = load_strict(AutoModelForCausalLM, folder)
    weights = {name: parameter.detach() for name, parameter in stock.named_parameters()}
    # `export` writes zero biases if the model has no biases
    config["bias"] = any(tensor.any() for name, tensor in weights.items() if name.endswith(".bias"))
    weights = from_stock_weights(stock.config.model_type, config, weights)
    return build_model(GPTConfig(**{**config, **changes}), weights)


def load_strict(model_class, folder, **changes):
    """Load a folder with from_pretrained in float32, and raise an error if the weights do not match the model.

    from_pretrained alone initializes missing weights at random and ignores unexpected ones.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would interfere with our output
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no table of missing weights, because the error below names them
    options = {"dtype": torch.float32, "local_files_only": True, "ignore_mismatched_sizes": True, **changes}
    try:
        model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:  # corrupted files may raise any exception
        raise ValueError(f"{folder}: cannot be loaded: {loading_error(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    wrong = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if model.config.model_type == "nanogpt_accel":  # older files of other models may contain unused buffers
        wrong |= set(info["unexpected_keys"])
    if wrong:
        names = ", ".join(sorted(wrong)[:3]) + ", ..." * (len(wrong) > 3)
        raise ValueError(f"{folder}: weights are missing, unexpected or differ in shape from config.json: {names}")
    if os.name == "nt":  # Windows cannot delete or replace a file while weights are memory-mapped from it
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model.eval()


def loading_error(error):
    """Return the message of an error on one line, without torch.load's advice about weights_only."""
    text = str(error).split("WeightsUnpickler error: ")[-1].split("Re-running `torch.load`")[0]
    return one_line(text.strip() or type(error).__name__)


def build_model(config, weights):
    """Return a GPT with these weights, in eval mode. Random initialization is skipped to save time.

    Raises:
        RuntimeError: a tensor is missing or unexpected, or has the wrong shape.
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
    problem = f"{folder}: the tokenizer has {n_tokens:,} tokens, but the model has only {vocab_size:,} embeddings"
    return [f"{problem}; use the tokenizer that the model was trained with"] if n_tokens > vocab_size else []


def fit_to_tokenizer(model, tokenizer):
    """Configure a model for its tokenizer: padding and end-of-text token, and the ids that `generate` must avoid."""
    has_pad = tokenizer.pad_id is not None and tokenizer.pad_id < model.config.vocab_size
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_id if has_pad else None
        if config.eos_token_id is None:
            config.bos_token_id = config.eos_token_id = tokenizer.eot_id
    model.generation_config.suppress_tokens = list(range(tokenizer.vocab_size, model.config.vocab_size)) or None
