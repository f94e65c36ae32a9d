"""Read nanoGPT's ckpt.pt."""

import pickle
import re

from .load import build_model, loading_error


def read_nanogpt(path, activation="gelu"):
    """Load a nanoGPT ckpt.pt, including one of a compiled or DDP model. Code in the file is not executed.

    activation: "gelu" for nanoGPT since May 2023, "gelu_new" for checkpoints of older versions.

    Returns:
        (model, info): the GPT, and a dict with nanoGPT's `iter_num`, `best_val_loss` and `config`, which may be None.

    Raises:
        ValueError: the file is not a nanoGPT checkpoint, or contains objects other than tensors and plain values.
    """
    import torch

    from ..model import GPTConfig

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = f"refused, because it contains objects other than tensors and plain values ({loading_error(error)})"
        raise ValueError(f"{path}: {reason}") from None
    except Exception as error:  # a corrupted file may raise any exception
        raise ValueError(f"{path}: not a file written by torch.save, or corrupted ({loading_error(error)})") from error
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise ValueError(f"{path}: not a checkpoint of nanoGPT's train.py: `model` and `model_args` are missing")
    try:
        layers = {name.partition(".h.")[2].partition(".")[0] for name in content["model"] if ".h." in name}
        if len(layers) != content["model_args"]["n_layer"]:
            raise ValueError(f"n_layer={content['model_args']['n_layer']}, but the file contains {len(layers)} layers")
        config = GPTConfig(**{"bias": True, **content["model_args"]}, activation=activation)
        weights = {re.sub(r"^(_orig_mod\.|module\.)+", "", k): tensor.float() for k, tensor in content["model"].items()}
        for name in [name for name in weights if name.endswith(".attn.bias")] + ["lm_head.weight"]:
            weights.pop(name, None)  # the causal mask in older versions, and the tied output head
        model = build_model(config, weights)
    except Exception as error:  # the entries may have any type
        raise ValueError(f"{path}: the weights do not match model_args ({loading_error(error)})") from error
    return model, {key: content.get(key) for key in ("iter_num", "best_val_loss", "config")}
