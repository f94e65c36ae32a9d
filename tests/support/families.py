"""Small models of every architecture that GPTConfig covers, and their parameters counted by part."""

import torch

from nanogpt_accel.model import GPT, GPTConfig

LENGTH = 64
FAMILIES = {
    "gpt2": {},
    "openai": {"bias": True, "activation": "gelu_new"},
    "llama": {"norm": "rmsnorm", "position": "rotary", "activation": "swiglu", "n_kv_head": 2, "n_inner": 352},
    "qwen3": {
        "norm": "rmsnorm",
        "position": "rotary",
        "activation": "swiglu",
        "n_kv_head": 2,
        "n_inner": 352,
        "qk_norm": True,
        "head_dim": 48,
    },
    "nanochat": {
        "norm": "rmsnorm",
        "norm_weight": False,
        "position": "rotary",
        "activation": "relu2",
        "qk_norm": True,
        "embd_norm": True,
        "logit_softcap": 15,
        "tie_word_embeddings": False,
    },
    "odd": {"norm": "rmsnorm", "bias": True, "qk_norm": True, "activation": "relu2", "embd_norm": True},
}


def config_of(name, **changes):
    return GPTConfig(
        **{
            "vocab_size": 512,
            "block_size": LENGTH,
            "n_layer": 3,
            "n_head": 4,
            "n_embd": 128,
            **FAMILIES[name],
            **changes,
        }
    )


def counted_by_part(config):
    """Return {part: number of parameters}, counted in a GPT."""
    with torch.device("meta"):
        model = GPT(config)
    parts = dict.fromkeys(("embedding", "position", "attention", "mlp", "norms", "head"), 0)
    for name, parameter in model.named_parameters():  # a tied head appears only as wte
        words = name.split(".")
        part = (
            "embedding"
            if "wte" in words
            else "position"
            if "wpe" in words
            else "head"
            if "lm_head" in words
            else "norms"
            if any(word.startswith("ln_") or word.endswith("_norm") for word in words)
            else "attention"
            if "attn" in words
            else "mlp"
        )
        parts[part] += parameter.numel()
    assert sum(parts.values()) == model.num_parameters()
    return parts
