"""Read and write nanoGPT's ckpt.pt."""

import os
import pickle
import re
from pathlib import Path

from ..checkpoint.layout import read_trainer
from ..checkpoint.resume import read_optimizer
from ..checkpoint.verify import find_corruption
from ..optim import parameter_groups
from ..recipe import Recipe, load_recipe
from ..utils.text import file_name, first_line
from .load import build_model
from .stock import find_obstacles
from .weight_files import WRAPPER_PREFIX, loading_error

# the keys of nanoGPT's model_args; GPTConfig uses the same names
_MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")


def read_nanogpt(path, activation="gelu"):
    """Load a nanoGPT ckpt.pt, including one of a compiled or DDP model. Code in the file is not executed.

    activation: "gelu" for nanoGPT since May 2023, "gelu_new" for checkpoints of older versions.

    Returns:
        (model, info): the GPT, and a dict with nanoGPT's `iter_num`, `best_val_loss` and `config`. Entries that the
        file does not contain are None.

    Raises:
        ValueError: the file is not a nanoGPT checkpoint, or contains objects other than tensors and plain values.
    """
    import torch

    from ..model import GPTConfig

    try:
        # no mmap on Windows, which cannot rename a memory-mapped file: `export` reads a file and then renames it
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name != "nt")
    except pickle.UnpicklingError as error:
        reason = f"refused, because it contains objects other than tensors and plain values ({loading_error(error)})"
        raise ValueError(f"{path}: {reason}") from None
    except Exception as error:  # a corrupted file may raise any exception
        raise ValueError(f"{path}: not a file written by torch.save, or corrupted ({loading_error(error)})") from error
    if isinstance(content, dict) and any(str(key).endswith(".attn.c_q.weight") for key in content):
        raise ValueError(
            f"{path}: a checkpoint of nanochat, not of nanoGPT. nanochat models since January 2026 are not supported "
            "(value embeddings, window pattern, residual scales, smear, backout). If the checkpoint is older, convert "
            "it with convert_nanochat_checkpoints.py from transformers' repository, and use the folder that this "
            "script writes"
        )
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise ValueError(f"{path}: not a checkpoint of nanoGPT's train.py: `model` and `model_args` are missing")
    try:
        layers = {name.partition(".h.")[2].partition(".")[0] for name in content["model"] if ".h." in name}
        if len(layers) != content["model_args"]["n_layer"]:
            raise ValueError(f"n_layer={content['model_args']['n_layer']}, but the file contains {len(layers)} layers")
        config = GPTConfig(**{"bias": True, **content["model_args"]}, activation=activation)
        weights = {re.sub(WRAPPER_PREFIX, "", k): tensor.float() for k, tensor in content["model"].items()}
        for name in [name for name in weights if name.endswith(".attn.bias")] + ["lm_head.weight"]:
            weights.pop(name, None)  # the causal masks of older versions, and the tied head, which build_model adds
        model = build_model(config, weights)
    except Exception as error:  # the entries may have any type
        raise ValueError(f"{path}: the weights do not match model_args ({loading_error(error)})") from error
    return model, {key: content.get(key) for key in ("iter_num", "best_val_loss", "config")}


def nanogpt_obstacles(config, tokenizer):
    """Return the settings of a model that nanoGPT does not support."""
    supported = {
        "position": ["learned"],
        "norm": ["layernorm"],
        "norm_weight": [True],
        "norm_eps": [1e-5],
        "embd_norm": [False],
        "qk_norm": [False],
        "activation": ["gelu"],
        "n_kv_head": [config["n_head"]],
        "head_dim": [config["n_embd"] / config["n_head"]],
        "n_inner": [4 * config["n_embd"]],
        "logit_softcap": [None],
        "tie_word_embeddings": [True],
    }
    obstacles = find_obstacles(config, supported)
    if tokenizer.kind not in ("gpt2", "char"):
        obstacles.append(f"tokenizer={tokenizer.kind} (only gpt2 and char are supported)")
    return obstacles


def write_nanogpt(path, model, config, tokenizer, source):
    """Write a ckpt.pt for nanoGPT's sample.py and train.py.

    If `source` is a checkpoint of a run, the file contains the checkpoint's step and best validation loss, and its
    optimizer state if the run used AdamW. Otherwise, the file contains a new AdamW optimizer, because nanoGPT's
    train.py cannot resume without an optimizer.

    Args:
        config: the fields of GPTConfig. Vocabulary entries of the model above config["vocab_size"] are removed.
        source: the folder of the model.

    Returns:
        (dataset, is_resumable): the dataset name for nanoGPT, and whether the file contains optimizer state of a run.
    """
    import torch

    source, rows = Path(source), config["vocab_size"]
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:rows].clone()
    weights["lm_head.weight"] = weights["transformer.wte.weight"]

    has_recipe, is_checkpoint = (source.parent / "run.yaml").is_file(), find_corruption(source) is None
    recipe = load_recipe(source.parent) if has_recipe else Recipe()
    trainer = read_trainer(source) if is_checkpoint else {"step": 0, "best_val_loss": None}
    optimizer = _adamw_state(model, recipe.optimizer, source if is_checkpoint else None, rows)
    corpus = "+".join(recipe.data.sources) if recipe.data.mix else recipe.data.corpus
    dataset = file_name(Path(corpus if has_recipe else source.resolve()).stem)
    dataset += "_char" * (tokenizer.kind == "char")
    content = {
        "model": weights,
        "optimizer": optimizer,
        "model_args": {key: config[key] for key in _MODEL_ARGS},
        "iter_num": trainer["step"],
        "best_val_loss": 1e9 if trainer["best_val_loss"] is None else trainer["best_val_loss"],  # as in train.py
        "config": {"dataset": dataset},
    }
    try:
        torch.save(content, path)
    except RuntimeError as error:  # torch's error if the disk is full
        raise OSError(first_line(error)) from None
    return dataset, bool(optimizer["state"])


def _adamw_state(model, settings, checkpoint, rows):
    """Return the state_dict of an AdamW optimizer. If the checkpoint contains AdamW state, the state_dict includes it.

    settings: the optimizer section of a recipe. checkpoint: folder or None. rows: vocabulary size of the ckpt.pt.
    """
    import torch

    betas = (settings.beta1, settings.beta2)
    optimizer = torch.optim.AdamW(parameter_groups(model, settings.weight_decay), settings.learning_rate, betas)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    saved = read_optimizer(checkpoint, shapes) if checkpoint else {}
    content = optimizer.state_dict()
    is_adamw = settings.algorithm == "adamw"  # the fields are not enough: RAdam's state has the same
    if is_adamw and all(saved.get(name, {}).keys() == {"step", "exp_avg", "exp_avg_sq"} for name in ordered):
        for key in ("exp_avg", "exp_avg_sq"):
            saved["transformer.wte.weight"][key] = saved["transformer.wte.weight"][key][:rows].clone()
        content["state"] = {i: saved[name] for i, name in enumerate(ordered)}
    return content


def write_meta(path, tokenizer):
    """Write a character tokenizer as a meta.pkl for nanoGPT."""
    itos = {i: token for token, i in tokenizer.vocab.items()}
    stoi = {token: i for token, i in tokenizer.vocab.items() if token != tokenizer.eot}
    Path(path).write_bytes(pickle.dumps({"vocab_size": tokenizer.vocab_size, "itos": itos, "stoi": stoi}))
