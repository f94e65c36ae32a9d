"""Peak memory on a GPU, compared with planning/sizing.py."""

import gc

import pytest
import torch
from families import config_of
from on_gpu import DEVICE, IS_DRY
from shared import REPOSITORY

from nanogpt_accel.commands.bench import RandomTokens, Variant, find_config
from nanogpt_accel.planning import sizing
from nanogpt_accel.recipe import load_recipe

pytestmark = pytest.mark.gpu


def assert_planned(recipe, config):
    """Train some steps, and compare the peak memory with the plan."""
    train = recipe.train
    gc.collect()  # an earlier test may have left a model in reference cycles
    variant = Variant(recipe, config, {"random": RandomTokens(config.vocab_size)}, None, "", {})
    variant.step()
    planned = sizing.memory(
        config.resolved(),
        "ddp",
        1,
        1,
        batch=train.batch_size,
        half=True,
        checkpointing=train.activation_checkpointing,
        algorithm=recipe.optimizer.algorithm,
        device=DEVICE,
    )
    measured = variant.peak_memory()
    print(f"planned {sum(planned.values()) / 1e6:,.0f} MB, measured {measured / 1e6:,.0f} MB")
    assert sum(planned.values()) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["full", "checkpointing"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "nanochat"])
def test_memory_of_every_architecture_is_planned(family, checkpointing):
    if IS_DRY and (family in ("llama", "qwen3") or checkpointing):
        pytest.skip("tests/planning/test_sizing.py compares these on a CPU with MemTracker")
    size = {"vocab_size": 4096, "block_size": 512, "n_layer": 6, "n_embd": 512}
    if IS_DRY:
        size |= {"vocab_size": 8192, "block_size": 256, "n_layer": 1, "n_embd": 128}
    config = config_of(family, **size)
    options = {
        "batch_size": 9 if IS_DRY else 16,
        "block_size": config.block_size,
        "gradient_accumulation_steps": 2,
        "activation_checkpointing": checkpointing,
        "device": DEVICE,
        "mixed_precision": "bf16",
        "compile": False,
    }
    assert_planned(load_recipe(None, options), config)


@pytest.mark.parametrize("name", ["gpt2", "gpt2_fast"])
@pytest.mark.skipif(IS_DRY, reason="a CPU takes minutes for a step")
def test_memory_of_a_recipe_is_planned(name):
    options = {"gradient_accumulation_steps": 2, "compile": False, "mixed_precision": "bf16", "device": DEVICE}
    recipe = load_recipe(REPOSITORY / "recipes" / f"{name}.yaml", options)
    torch.manual_seed(0)
    assert_planned(recipe, find_config(recipe, 50257))
