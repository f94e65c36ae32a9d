"""Restore the optimizer state of a checkpoint; any number of processes may have saved it."""

import json
import os
from pathlib import Path

from .layout import SHARD_PATH
from .verify import read_index


def load_optimizer(path, accelerator, model, optimizer):
    """Load the optimizer state of a checkpoint into a new, prepared optimizer of the same model.

    Raises:
        ValueError: the state belongs to another model.
    """
    from ..distributed import sharding

    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    tensors = _open_shards(Path(path), shapes)
    fields = {}  # PARAMETER -> [FIELD, ...]
    for key in tensors:
        name, _, field = key.rpartition("/")
        fields.setdefault(name, []).append(field)

    def read(name, field, start, stop):
        return _read_rows(tensors, f"{name}/{field}", start, stop)

    sharding.restore_optimizer(accelerator, model, optimizer, fields, read)


def _open_shards(path, shapes):
    """Return {"PARAMETER/FIELD": [(first row, opened file), ...]}, sorted by row. shapes: of the model's parameters."""
    from safetensors import SafetensorError, safe_open

    tensors = {}
    for file in (path / name for name in sorted(read_index(path)) if SHARD_PATH.match(name)):
        try:
            opened = safe_open(file, framework="pt")
            first_rows = json.loads(opened.metadata()["first_rows"])
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{file}: no optimizer state of this toolkit ({error}); take the weights alone with init_from={path}"
            ) from None
        for key in opened.keys():  # noqa: SIM118 (no dict)
            name, shape = key.rpartition("/")[0], tuple(opened.get_slice(key).get_shape())
            dims = slice(1 if key in first_rows else 0, None)  # the first dimension of a shard has only some rows
            if name not in shapes or (shape and shape[dims] != shapes[name][dims]):
                raise ValueError(
                    f"{file}: {name} is no parameter of this model, or of another shape: the file is of "
                    f"another run; take the weights alone with init_from={path}"
                )
            tensors.setdefault(key, []).append((first_rows.get(key, 0), opened))
    return {key: sorted(shards, key=lambda shard: shard[0]) for key, shards in tensors.items()}


def _read_rows(tensors, key, start, stop):
    """Return rows start to stop - 1 of a tensor of _open_shards, or all of a scalar."""
    import torch

    parts = []
    for first, opened in tensors[key]:
        shard = opened.get_slice(key)
        if not shard.get_shape():
            parts = [opened.get_tensor(key)]
            break
        low, high = max(start - first, 0), min(stop - first, shard.get_shape()[0])
        if low < high:
            parts.append(shard[low:high])
    rows = torch.cat(parts) if len(parts) != 1 else parts[0]
    return rows.clone() if os.name == "nt" else rows  # Windows deletes no file that is mapped to memory, as rows is
