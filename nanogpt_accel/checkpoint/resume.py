"""Restore the optimizer state of a checkpoint, whatever number of processes saved it."""

import json
import os
from pathlib import Path

from .verify import SHARD_PATH, read_index


def load_optimizer(path, accelerator, model, optimizer):
    """Put the saved optimizer state of a checkpoint into a fresh, prepared optimizer of the same model, whatever number
    of processes saved it.

    Raises:
        ValueError: the state is that of another model.
    """
    from safetensors import SafetensorError, safe_open

    from ..distributed import sharding

    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    places = {}  # "PARAMETER/FIELD" -> [(first row, file)], in order of the rows
    fields = {}  # PARAMETER -> {FIELD: None}, in order
    for file in (Path(path) / name for name in sorted(read_index(Path(path))) if SHARD_PATH.match(name)):
        try:
            opened = safe_open(file, framework="pt")
            first_rows = json.loads(opened.metadata()["first_rows"])
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{file}: no optimizer state of this toolkit ({error}); take the weights alone with init_from={path}"
            ) from None
        for key in opened.keys():  # noqa: SIM118 (no dict)
            name, _, field = key.rpartition("/")
            shape = tuple(opened.get_slice(key).get_shape())
            if name not in shapes or (shape and shape[key in first_rows :] != shapes[name][key in first_rows :]):
                raise ValueError(
                    f"{file}: {name} is no parameter of this model, or of another shape: the file is of "
                    f"another run; take the weights alone with init_from={path}"
                )
            places.setdefault(key, []).append((first_rows.get(key, 0), opened))
            fields.setdefault(name, {})[field] = None

    def read(name, field, start, stop):
        """Rows start to stop - 1 of a field, from the files that hold them."""
        import torch

        key, parts = f"{name}/{field}", []
        for first, opened in sorted(places[key], key=lambda place: place[0]):
            part = opened.get_slice(key)
            if not part.get_shape():
                parts = [opened.get_tensor(key)]
                break
            low, high = max(start - first, 0), min(stop - first, part.get_shape()[0])
            if low < high:
                parts.append(part[low:high])
        found = torch.cat(parts) if len(parts) != 1 else parts[0]
        return found.clone() if os.name == "nt" else found  # Windows deletes no file that is mapped, as `found` is

    sharding.restore_optimizer(accelerator, model, optimizer, fields, read)
