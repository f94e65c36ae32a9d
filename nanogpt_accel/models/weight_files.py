"""Find the weight files of a model folder, and read the names and shapes of their tensors without loading them."""

import json
import re
from pathlib import Path

from ..utils.text import one_line

# in the order in which from_pretrained looks for them; an index lists the files of a sharded model
_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# prefixes that torch.compile and DistributedDataParallel add to the names of the weights
WRAPPER_PREFIX = r"^(?:_orig_mod\.|module\.)+"


def weight_files(folder):
    """Return the names of the files that from_pretrained loads weights from. These files may be missing or corrupted.

    Other files with weights are ignored, for example an index that was left next to a complete model.safetensors.

    Raises:
        ValueError: the index is corrupted.
    """
    name = next((name for name in _NAMES if (Path(folder) / name).is_file()), _NAMES[0])
    if not name.endswith(".json"):
        return [name]
    try:
        index = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
        files = set(index["weight_map"].values())
        # from_pretrained requires the key "metadata"
        is_valid = isinstance(index["metadata"], dict) and all(re.fullmatch(r"[\w.-]+", file) for file in files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_valid = False
    if not is_valid or not files:
        raise ValueError(f"{name} is corrupted")
    return sorted(files)


def read_shapes(folder):
    """Return {name: shape} for the tensors of a model, from the headers of its weight files.

    Raises:
        ValueError: a file is corrupted, or does not contain a dictionary of tensors. The message names the file.
    """
    shapes = {}
    for file in weight_files(folder):
        path = Path(folder) / file
        try:
            shapes |= _read_header(path)
        except Exception as error:  # corrupted files may raise any exception
            raise ValueError(f"{path}: cannot be read: {loading_error(error)}") from error
    return {name: tuple(shape) for name, shape in shapes.items()}


def _read_header(path):
    """Return {name: shape} for the tensors of a safetensors file or of a file that torch.save wrote."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="np") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    import torch

    content = torch.load(path, map_location="meta", weights_only=True)  # does not read the values of the tensors
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError("it does not contain a dictionary of tensors")
    return {name: tensor.shape for name, tensor in content.items()}


def loading_error(error):
    """Return the message of an error on one line, without torch.load's advice about weights_only."""
    text = str(error).split("WeightsUnpickler error: ")[-1].split("Re-running `torch.load`")[0]
    return one_line(text.strip() or type(error).__name__)
