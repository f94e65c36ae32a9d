"""Determine the architecture of a recipe's model without loading its weights."""

from pathlib import Path

from ..planning.sizing import GPT2_SHAPES
from .find import find_model
from .load import read_config


def model_shape(recipe, vocab_size):
    """Return the fields of GPTConfig that define a recipe's architecture, with defaults filled in for None.

    Args:
        vocab_size: vocabulary size of the tokenizer. Ignored for a pretrained model.

    Raises:
        ValueError: the model in init_from is not on this machine, or GPT does not support its architecture.
    """
    init_from, block_size = recipe.model.init_from, recipe.model.block_size
    if init_from in ("scratch", "resume"):
        return recipe.shape | {"vocab_size": recipe.padded_vocab_size(vocab_size)}
    if init_from in GPT2_SHAPES:
        return recipe.shape | GPT2_SHAPES[init_from] | {"block_size": block_size}
    if not Path(init_from).is_dir():
        raise ValueError(
            f"model.init_from={init_from}: the architecture of this model is unknown, because the model is not on "
            "this machine; set init_from to the local folder of the model, or describe its architecture with "
            "init_from=scratch, n_layer, n_head and n_embd"
        )
    config = read_config(find_model(init_from))
    return {key: config[key] for key in ("vocab_size", *recipe.shape)} | {"block_size": block_size}
