"""Read nanoGPT's ckpt.pt."""

import pickle
import re

from .load import build_model, loading_error


def read_nanogpt(path, activation="gelu"):
    """The GPT of a nanoGPT ckpt.pt, of a compiled or DDP model too, and what else the file tells.

    activation: "gelu", nanoGPT's since May 2023; checkpoints of older versions have "gelu_new".

    Returns:
        (model, info): info holds nanoGPT's `iter_num`, `best_val_loss` and `config`, where they are there.

    Raises:
        ValueError: no such checkpoint. What a pickle could do besides holding tensors and plain values is refused.
    """
    import torch

    from ..model import GPTConfig

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: refused, for more than tensors and plain values is in it ({loading_error(error)})"
        ) from None
    except Exception as error:  # torch raises almost anything for a file that is not what it should be
        raise ValueError(f"{path}: not a file that torch.save wrote ({loading_error(error)})") from error
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise ValueError(f"{path}: not a checkpoint of nanoGPT's train.py: no `model` and `model_args` in it")
    try:
        layers = {name.partition(".h.")[2].partition(".")[0] for name in content["model"] if ".h." in name}
        if len(layers) != content["model_args"]["n_layer"]:
            raise ValueError(f"n_layer={content['model_args']['n_layer']}, and {len(layers)} are there")
        config = GPTConfig(**{"bias": True, **content["model_args"]}, activation=activation)
        weights = {
            re.sub(r"^(_orig_mod\.|module\.)+", "", name): tensor.float() for name, tensor in content["model"].items()
        }
        for name in [name for name in weights if name.endswith(".attn.bias")] + ["lm_head.weight"]:
            weights.pop(name, None)  # the causal mask of older versions; and the head, which is the embedding
        model = build_model(config, weights)
    except Exception as error:  # in such a file anything may stand under these names
        raise ValueError(f"{path}: its weights do not fit its model_args ({loading_error(error)})") from error
    return model, {key: content.get(key) for key in ("iter_num", "best_val_loss", "config")}
