"""Restore the optimizer and the gradient scaler from a checkpoint that was saved by any number of processes."""

import json
import os
from functools import partial
from pathlib import Path

from ..utils.nested import unpack
from ..utils.text import quoted
from .layout import SHARD_PATH, read_trainer
from .verify import read_index


def load_optimizer(path, accelerator, model, optimizer):
    """Load the optimizer state of the checkpoint folder `path` into a new optimizer, prepared by the Accelerator.

    Raises:
        ValueError: the optimizer state does not match the model.
    """
    from ..distributed import sharding

    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    tensors, layout = _open_shards(Path(path), shapes)
    fields = {}  # PARAMETER -> [FIELD, ...]
    for key in (key for key in tensors if key not in layout["nested"]):
        name, _, field = key.rpartition("/")
        fields.setdefault(name, []).append(field)
    read_full = partial(_read_full, tensors, layout)
    values = {
        name: {field: unpack(plain, read_full) for field, plain in pairs} for name, pairs in layout["values"].items()
    }
    groups = [{key: unpack(plain, read_full) for key, plain in group.items()} for group in layout["groups"]]
    read = partial(_read_rows, tensors, layout)
    sharding.restore_optimizer(accelerator, model, optimizer, fields, read, values, groups)


def read_optimizer(path, shapes):
    """Return the optimizer state of a checkpoint as {PARAMETER: {FIELD: tensor}}. An example of a FIELD is exp_avg.

    shapes: {PARAMETER: shape} of the model.
    """
    (tensors, layout), state = _open_shards(Path(path), shapes), {}
    for key in (key for key in tensors if key not in layout["nested"]):
        name, _, field = key.rpartition("/")
        state.setdefault(name, {})[field] = _read_rows(tensors, layout, name, field, 0, shapes[name][0])
    return state


def load_scaler(source, accelerator):
    """Restore the state of fp16's gradient scaler from a checkpoint."""
    saved = read_trainer(source)["scaler"]
    if accelerator.scaler is not None and saved is not None:
        accelerator.scaler.load_state_dict(saved)


def _open_shards(path, shapes):
    """Open the optimizer state of a checkpoint. shapes: {PARAMETER: shape} of the model.

    Returns:
        (tensors, layout). tensors: {"PARAMETER/FIELD": [(first row, open file), ...]}; an example of a FIELD is
        exp_avg. Each file contains some rows of the tensor; `first row` is the index of the first of these rows in the
        full tensor. layout: the layout of the first file, see sharding.optimizer_shard.
    """
    from safetensors import SafetensorError, safe_open

    tensors, layout, fix = {}, {}, f"to load only the weights, set init_from={quoted(path)}"
    for file in (path / name for name in sorted(read_index(path)) if SHARD_PATH.match(name)):
        try:
            shard = safe_open(file, framework="pt")
            metadata, of_shard = shard.metadata(), {"other_shape": [], "nested": [], "values": {}, "groups": []}
            if "layout" in metadata:
                of_shard = json.loads(metadata["layout"])
            else:  # earlier versions stored only the first rows
                of_shard["first_rows"] = json.loads(metadata["first_rows"])
            first_rows = of_shard["first_rows"]
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{file}: not an optimizer state of nanogpt_accel ({error}); {fix}") from None
        layout = layout or of_shard  # only the first shard has other entries than "first_rows"
        for key in shard.keys():  # noqa: SIM118 (not a dict)
            name, shape = key.rpartition("/")[0], tuple(shard.get_slice(key).get_shape())
            dims = slice(1 if key in first_rows else 0, None)  # a shard has fewer rows, so compare the other dimensions
            has_any_shape = not shape or key in layout["other_shape"]
            is_like = name in shapes and (has_any_shape or shape[dims] == shapes[name][dims])
            if key not in layout["nested"] and not is_like:
                raise ValueError(f"{file}: from another run: the parameter {name} does not match this model; {fix}")
            tensors.setdefault(key, []).append((first_rows.get(key, 0), shard))
    tensors = {key: sorted(shards, key=lambda item: item[0]) for key, shards in tensors.items()}
    return tensors, layout


def _read_full(tensors, layout, key):
    """Return a tensor that is stored in only one file, with the strides that it had when it was saved.

    If a matrix has other strides, MKL may multiply it with another kernel, which rounds differently.
    """
    import torch

    ((_, file),) = tensors[key]
    tensor = file.get_tensor(key)
    strides = layout.get("strides", {}).get(key)  # earlier versions did not store them
    if strides is None:
        return tensor.clone()
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)


def _read_rows(tensors, layout, name, field, start, stop):
    """Return rows `start` to `stop` - 1 of the optimizer state `field` of the parameter `name`.

    If the state is a scalar, or has another shape than the parameter, return all of it.
    """
    import torch

    key, parts = f"{name}/{field}", []
    shape = tensors[key][0][1].get_slice(key).get_shape()
    is_complete = len(tensors[key]) == 1 and (not shape or shape[0] == stop - start)
    if is_complete or key in layout["other_shape"]:
        return _read_full(tensors, layout, key)
    for first, file in tensors[key]:
        shard = file.get_slice(key)
        low, high = max(start - first, 0), min(stop - first, shard.get_shape()[0])
        if low < high:
            parts.append(shard[low:high])
    rows = torch.cat(parts) if len(parts) != 1 else parts[0]
    return rows.clone() if os.name == "nt" else rows  # Windows cannot delete a file that is mapped to memory
