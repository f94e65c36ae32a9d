"""The shape of a recipe's model equals that of the model that `train` creates or loads."""

from families import config_of

from nanogpt_accel.model import GPT, GPTConfig
from nanogpt_accel.models.shape import model_shape
from nanogpt_accel.recipe import load_recipe


def test_a_new_model_has_the_recipes_shape_and_a_padded_vocabulary():
    recipe = load_recipe(None, {"n_layer": 3, "n_embd": 96, "n_head": 3, "pad_vocab_to_multiple_of": 64})
    assert model_shape(recipe, 50257) == recipe.shape | {"vocab_size": 50304}
    assert model_shape(recipe, 50257)["head_dim"] == 32


def test_openais_weights_have_their_own_shape_but_the_recipes_block_size():
    recipe = load_recipe(None, {"init_from": "gpt2-medium", "n_layer": 3, "block_size": 32})
    shape = model_shape(recipe, None)
    assert (shape["n_layer"], shape["n_embd"], shape["vocab_size"], shape["block_size"]) == (24, 1024, 50257, 32)


def test_a_folder_of_weights_has_its_own_shape_but_the_recipes_block_size(tmp_path):
    config = config_of("llama", dropout=0.3)
    GPT(config).save_pretrained(tmp_path / "weights")
    recipe = load_recipe(None, {"init_from": str(tmp_path / "weights"), "block_size": 32})
    shape = model_shape(recipe, None)
    assert shape == {key: config.resolved()[key] for key in shape} | {"block_size": 32}
    assert GPTConfig(**shape).dropout == 0 and shape.keys() == recipe.shape.keys() | {"vocab_size"}


def test_weights_that_are_not_here_have_no_shape(refused):
    with refused(ValueError, "init_from=someone/model", "not on this machine", "n_layer"):
        model_shape(load_recipe(None, {"init_from": "someone/model"}), None)
