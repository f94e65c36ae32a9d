"""The shape of a recipe's model, without its weights."""

from pathlib import Path

from ..planning.sizing import GPT2_SHAPES
from .find import find_model
from .load import read_config


def model_shape(recipe, vocab_size):
    """Return the shape of a recipe's model: the fields of GPTConfig that define it, with every None resolved.

    Args:
        vocab_size: of the tokenizer. It is only used for a new model; pretrained weights have their own.

    Raises:
        ValueError: init_from names weights that are not on this machine, or an architecture that GPT does not support.
    """
    init_from, block_size = recipe.model.init_from, recipe.model.block_size
    if init_from in ("scratch", "resume"):
        return recipe.shape | {"vocab_size": recipe.padded_vocab_size(vocab_size)}
    if init_from in GPT2_SHAPES:
        return recipe.shape | GPT2_SHAPES[init_from] | {"block_size": block_size}
    if not Path(init_from).is_dir():
        raise ValueError(
            f"model.init_from={init_from}: the shape of this model is unknown, because it is not on this machine. "
            "Give the path of its folder, or init_from=scratch with n_layer, n_head and n_embd"
        )
    config = read_config(find_model(init_from))
    return {key: config[key] for key in ("vocab_size", *recipe.shape)} | {"block_size": block_size}
