"""Small random models of every stock architecture: as GPT, and as the model classes of transformers."""

import os

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nanogpt_accel.data.tokenizer import Tokenizer
from nanogpt_accel.model import GPT, GPTConfig

CHARS = "\n !\"',-.:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
N = len(CHARS) + 1  # tokens; the last one is end-of-text
ROWS, T_MAX = 80, 32  # vocabulary size with much padding, context length
SUPPORTED = ("Supported models: nanogpt_accel", "gpt2", "llama", "qwen3", "nanochat")


def randomize(model):
    """Randomize all parameters, including biases and norm weights, so that tests notice if one of them is lost."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3).add_(p.dim() == 1)
    return model.eval()


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def assert_close(ours, theirs, atol=1e-5):
    assert theirs.std() > 0.5  # not a comparison of zeros
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


LLAMA = {
    "norm": "rmsnorm",
    "norm_eps": 2e-3,
    "position": "rotary",
    "rope_theta": 700.0,
    "activation": "swiglu",
    "n_inner": 56,
}
QWEN3 = {**LLAMA, "qk_norm": True}
NANOCHAT = {**LLAMA, "activation": "relu2", "norm_weight": False, "embd_norm": True, "qk_norm": True}
ROPE = {"rope_type": "default", "rope_theta": 700.0}
STOCK = {  # switches of GPTConfig, the class that computes the same, and the expected keys of its config.json
    "gpt2": (
        {"bias": True, "activation": "gelu_new"},
        GPT2LMHeadModel,
        {"activation_function": "gelu_new", "n_inner": 128, "n_positions": T_MAX, "layer_norm_epsilon": 1e-5},
    ),
    "gpt2 without biases": (
        {"norm_eps": 2e-3, "n_inner": 48},
        GPT2LMHeadModel,
        {"activation_function": "gelu", "n_inner": 48, "layer_norm_epsilon": 2e-3},
    ),
    "gpt2 with a head": (
        {"activation": "relu2", "tie_word_embeddings": False, "norm_weight": False},
        GPT2LMHeadModel,
        {"activation_function": "relu2", "tie_word_embeddings": False},
    ),
    "llama": (
        LLAMA,
        LlamaForCausalLM,
        {
            "hidden_act": "silu",
            "rms_norm_eps": 2e-3,
            "rope_parameters": ROPE,
            "intermediate_size": 56,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
        },
    ),
    "llama with biases": (
        {**LLAMA, "bias": True, "n_kv_head": 2, "tie_word_embeddings": False},
        LlamaForCausalLM,
        {
            "attention_bias": True,
            "mlp_bias": True,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
            "max_position_embeddings": T_MAX,
        },
    ),
    "llama with wide heads": ({**LLAMA, "head_dim": 10, "norm_weight": False}, LlamaForCausalLM, {"head_dim": 10}),
    "qwen3": (
        {**QWEN3, "n_kv_head": 1, "head_dim": 12},
        Qwen3ForCausalLM,
        {
            "num_key_value_heads": 1,
            "head_dim": 12,
            "rms_norm_eps": 2e-3,
            "rope_parameters": ROPE,
            "attention_bias": False,
            "use_sliding_window": False,
        },
    ),
    "qwen3 with a head": ({**QWEN3, "tie_word_embeddings": False}, Qwen3ForCausalLM, {"tie_word_embeddings": False}),
    "nanochat": (
        {**NANOCHAT, "n_kv_head": 2, "logit_softcap": 3.0, "tie_word_embeddings": False},
        NanoChatForCausalLM,
        {
            "hidden_act": "relu2",
            "final_logit_softcapping": 3.0,
            "num_key_value_heads": 2,
            "rope_parameters": ROPE,
            "rms_norm_eps": 2e-3,
        },
    ),
    "nanochat without a cap": (
        {**NANOCHAT, "activation": "gelu"},
        NanoChatForCausalLM,
        {"hidden_act": "gelu", "final_logit_softcapping": None},
    ),
}


def gpt(**switches):
    shape = {
        "vocab_size": ROWS,
        "block_size": T_MAX,
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        "eos_token_id": N - 1,
        "bos_token_id": N - 1,
    }
    return randomize(GPT(GPTConfig(**shape | switches)))


def save_model(model, folder, tokenizer=None):
    """Save a GPT and its tokenizer as a model folder of this toolkit."""
    model.save_pretrained(folder)
    (tokenizer or Tokenizer.char([CHARS], add_eot=True)).save(folder, max_length=T_MAX)
    return folder


SHAPE = {
    "vocab_size": N,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": T_MAX,
    "rms_norm_eps": 2e-3,
    "rope_parameters": ROPE,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GPT2 = {
    "vocab_size": N,
    "n_positions": T_MAX,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
STOCK_MODELS = {
    "gpt2": lambda **changes: GPT2LMHeadModel(GPT2Config(**GPT2 | changes)),
    "gpt2 with a head": lambda: GPT2LMHeadModel(
        GPT2Config(**GPT2, activation_function="gelu", tie_word_embeddings=False, n_inner=48, layer_norm_epsilon=2e-3)
    ),
    "llama": lambda **changes: LlamaForCausalLM(LlamaConfig(**SHAPE | changes)),
    "llama with biases": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=6)
    ),
    "qwen3": lambda **changes: Qwen3ForCausalLM(Qwen3Config(**SHAPE | {"head_dim": 12} | changes)),
    "nanochat": lambda **changes: NanoChatForCausalLM(
        NanoChatConfig(**SHAPE | {"final_logit_softcapping": 4.0} | changes)
    ),
    "nanochat without a cap": lambda: NanoChatForCausalLM(
        NanoChatConfig(
            **SHAPE, final_logit_softcapping=None, hidden_act="gelu_pytorch_tanh", head_dim=10, tie_word_embeddings=True
        )
    ),
}


def save_stock(case, folder="theirs", **changes):
    """Return a random stock model, and save it with transformers."""
    model = randomize(STOCK_MODELS[case](**changes))
    model.save_pretrained(folder)
    Tokenizer.char([CHARS], add_eot=True).save(folder)
    return model


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)
