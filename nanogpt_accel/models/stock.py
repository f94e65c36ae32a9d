"""Configs and weights of stock architectures (GPT-2, Llama, Qwen3, nanochat), to and from ours."""

import re

# the class that transformers ships for each form
FORMS = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "nanochat": "NanoChatForCausalLM",
}
# GPT-2's answer to each switch of GPTConfig; the other forms name where they differ
GPT2_DEFAULTS = {
    "n_kv_head": None,
    "head_dim": None,
    "n_inner": None,
    "bias": True,
    "norm": "layernorm",
    "norm_weight": True,
    "norm_eps": 1e-5,
    "embd_norm": False,
    "qk_norm": False,
    "position": "learned",
    "rope_theta": 10_000.0,
    "activation": "gelu",
    "logit_softcap": None,
    "tie_word_embeddings": True,
}
_LLAMA = {
    **GPT2_DEFAULTS,
    "norm": "rmsnorm",
    "norm_eps": 1e-6,
    "position": "rotary",
    "activation": "swiglu",
    "tie_word_embeddings": False,
}
# transformers' names of the activations that are ours
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "relu2": "relu2"}


# ---- configs


def from_stock_config(form, stored):
    """GPTConfig's fields for a stock config.json. Defaults are those of transformers' config classes.

    Raises:
        ValueError: a switch that GPT does not have. KeyError: something that it cannot do without.
    """

    def refuse(key, wanted):
        if stored.get(key, wanted) != wanted:
            raise ValueError(f"{key}={stored[key]} is not covered")

    special = {"bos_token_id": stored.get("bos_token_id"), "eos_token_id": stored.get("eos_token_id")}
    if form == "gpt2":
        refuse("scale_attn_weights", True)
        refuse("scale_attn_by_inverse_layer_idx", False)
        refuse("add_cross_attention", False)
        return (
            GPT2_DEFAULTS
            | special
            | {
                "vocab_size": stored["vocab_size"],
                "block_size": stored["n_positions"],
                "n_layer": stored["n_layer"],
                "n_head": stored["n_head"],
                "n_embd": stored["n_embd"],
                "n_inner": stored.get("n_inner"),
                "dropout": stored.get("resid_pdrop", 0.1),
                "norm_eps": stored.get("layer_norm_epsilon", 1e-5),
                "activation": _activation(stored.get("activation_function", "gelu_new")),
                "tie_word_embeddings": stored.get("tie_word_embeddings", True),
            }
        )

    # since transformers 5 there is rope_parameters, before it were rope_theta and rope_scaling
    rope = stored.get("rope_parameters") or {
        "rope_theta": stored.get("rope_theta", 10_000.0),
        **(stored.get("rope_scaling") or {}),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"rotary positions of type {kind} are not covered")
    config = (
        _LLAMA
        | special
        | {
            "vocab_size": stored["vocab_size"],
            "block_size": stored["max_position_embeddings"],
            "n_layer": stored["num_hidden_layers"],
            "n_head": stored["num_attention_heads"],
            "n_embd": stored["hidden_size"],
            "n_inner": stored["intermediate_size"],
            "n_kv_head": stored.get("num_key_value_heads"),
            "head_dim": stored.get("head_dim"),
            "dropout": stored.get("attention_dropout", 0.0),
            "norm_eps": stored.get("rms_norm_eps", 1e-6),
            "rope_theta": rope["rope_theta"],
            "bias": stored.get("attention_bias", False),
            "tie_word_embeddings": stored.get("tie_word_embeddings", False),
        }
    )
    if form == "nanochat":
        refuse("attention_bias", False)
        return config | {
            "norm_weight": False,
            "embd_norm": True,
            "qk_norm": True,
            "activation": _activation(stored.get("hidden_act", "relu2")),
            "logit_softcap": stored.get("final_logit_softcapping", 15.0),
        }
    refuse("hidden_act", "silu")
    if form == "llama":
        refuse("mlp_bias", config["bias"])
        return config
    refuse("attention_bias", False)
    if any(kind != "full_attention" for kind in stored.get("layer_types") or []) or (
        stored.get("use_sliding_window") and not stored.get("layer_types")
    ):
        raise ValueError("sliding-window attention is not covered")
    return config | {"qk_norm": True, "head_dim": stored.get("head_dim", 128)}


def _activation(name):
    if name not in _ACTIVATIONS:
        raise ValueError(f"the activation {name} is not covered")
    return _ACTIVATIONS[name]


def stock_form(config):
    """(form, []) of the stock model that computes exactly the same, or (the nearest form, what stands in its way as a
    list of key=value)."""
    per_head = config["n_embd"] / config["n_head"]
    rotary = {"norm": ["rmsnorm"], "position": ["rotary"]}
    plain = {"embd_norm": [False], "logit_softcap": [None]}
    fitting = {  # form -> {key: the values that it has an exact counterpart for}
        "gpt2": {
            **plain,
            "norm": ["layernorm"],
            "position": ["learned"],
            "qk_norm": [False],
            "n_kv_head": [config["n_head"]],
            "head_dim": [per_head],
            "activation": ["gelu", "gelu_new", "relu2"],
        },
        "llama": {
            **plain,
            **rotary,
            "qk_norm": [False],
            "activation": ["swiglu"],
            "n_head": [config["n_head"]] if per_head.is_integer() else [],
        },
        "qwen3": {**plain, **rotary, "qk_norm": [True], "activation": ["swiglu"], "bias": [False]},
        "nanochat": {
            **rotary,
            "qk_norm": [True],
            "activation": ["gelu", "gelu_new", "relu2"],
            "bias": [False],
            "norm_weight": [False],
            "embd_norm": [True],
        },
    }
    obstacles = {
        form: [f"{key}={config[key]}" for key, values in keys.items() if config[key] not in values]
        for form, keys in fitting.items()
    }
    nearest = min(obstacles, key=lambda form: len(obstacles[form]))
    return nearest, obstacles[nearest]


def stock_settings(form, config):
    """The arguments of transformers' own config of a form."""
    special = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    common = special | {
        "vocab_size": config["vocab_size"],
        "tie_word_embeddings": config["tie_word_embeddings"],
        "initializer_range": config.get("initializer_range", 0.02),
    }
    if form == "gpt2":
        return dict(
            common,
            n_positions=config["block_size"],
            n_layer=config["n_layer"],
            n_head=config["n_head"],
            n_embd=config["n_embd"],
            n_inner=config["n_inner"],
            activation_function=config["activation"],
            layer_norm_epsilon=config["norm_eps"],
            resid_pdrop=config["dropout"],
            embd_pdrop=config["dropout"],
            attn_pdrop=config["dropout"],
            n_ctx=config["block_size"],
        )  # n_ctx: llama.cpp's converter reads this name
    common |= dict(
        max_position_embeddings=config["block_size"],
        num_hidden_layers=config["n_layer"],
        num_attention_heads=config["n_head"],
        num_key_value_heads=config["n_kv_head"],
        head_dim=config["head_dim"],
        hidden_size=config["n_embd"],
        intermediate_size=config["n_inner"],
        rms_norm_eps=config["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": float(config["rope_theta"])},
    )
    if form == "nanochat":
        return dict(common, hidden_act=config["activation"], final_logit_softcapping=config["logit_softcap"])
    if form == "llama":
        common |= {"attention_bias": config["bias"], "mlp_bias": config["bias"]}
    return dict(common, hidden_act="silu")


# ---- weights

_GPT2_NAMES = {
    name: [name]
    for name in (
        "transformer.wte",
        "transformer.wpe",
        "transformer.h.{}.ln_1",
        "transformer.h.{}.attn.c_attn",
        "transformer.h.{}.attn.c_proj",
        "transformer.h.{}.ln_2",
        "transformer.h.{}.mlp.c_fc",
        "transformer.h.{}.mlp.c_proj",
        "transformer.ln_f",
        "lm_head",
    )
}
# our name -> theirs; several of theirs, one upon the other, are one of ours
_LLAMA_NAMES = {
    "transformer.wte": ["model.embed_tokens"],
    "transformer.h.{}.ln_1": ["model.layers.{}.input_layernorm"],
    "transformer.h.{}.attn.c_attn": [f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkv"],
    "transformer.h.{}.attn.q_norm": ["model.layers.{}.self_attn.q_norm"],
    "transformer.h.{}.attn.k_norm": ["model.layers.{}.self_attn.k_norm"],
    "transformer.h.{}.attn.c_proj": ["model.layers.{}.self_attn.o_proj"],
    "transformer.h.{}.ln_2": ["model.layers.{}.post_attention_layernorm"],
    "transformer.h.{}.mlp.c_fc": ["model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"],
    "transformer.h.{}.mlp.c_proj": ["model.layers.{}.mlp.down_proj"],
    "transformer.ln_f": ["model.norm"],
    "lm_head": ["lm_head"],
}
_NANOCHAT_NAMES = _LLAMA_NAMES | {
    "transformer.h.{}.mlp.c_fc": ["model.layers.{}.mlp.fc1"],
    "transformer.h.{}.mlp.c_proj": ["model.layers.{}.mlp.fc2"],
}
_NAMES = {"gpt2": _GPT2_NAMES, "llama": _LLAMA_NAMES, "qwen3": _LLAMA_NAMES, "nanochat": _NANOCHAT_NAMES}


def to_stock(form, config, weights):
    """A stock model's tensors by name, from ours. What ours lacks (biases, gains of norms) is not in it."""
    stock = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        layer = re.search(r"\d+|$", module)[0]
        theirs = _NAMES[form][re.sub(r"\.\d+\.", ".{}.", module)]
        for their, piece in zip(theirs, _split(tensor, len(theirs), config), strict=True):
            stock[f"{their.format(layer)}.{kind}"] = _transform(form, their, piece, config).contiguous()
    return stock


def from_stock(form, config, stock):
    """Our tensors by name, from a stock model's parameters; its zero biases are left out where config has no bias."""
    import torch

    weights, left = {}, {name for name in stock if config["bias"] or not name.endswith(".bias")}
    for ours, theirs in _NAMES[form].items():
        for layer in range(config["n_layer"]) if "{}" in ours else [None]:
            for kind in ("weight", "bias"):
                names = [f"{their.format(layer)}.{kind}" for their in theirs]
                if left.issuperset(names):
                    pieces = [_transform(form, name, stock[name], config) for name in names]
                    weights[f"{ours.format(layer)}.{kind}"] = torch.cat(pieces).contiguous()
                    left.difference_update(names)
    if left:
        raise ValueError(f"the weights {', '.join(sorted(left)[:3])} have no place in GPT")
    return weights


def _split(tensor, parts, config):
    """The tensors that stand one upon the other in ours: queries, keys and values; or a gate and what it gates."""
    if parts == 3:
        return tensor.split(
            [heads * config["head_dim"] for heads in (config["n_head"], config["n_kv_head"], config["n_kv_head"])]
        )
    return tensor.chunk(parts)


def _transform(form, name, tensor, config):
    """What has to be done to one of their tensors, or to a piece of ours, on the way; it is its own inverse."""
    if form == "gpt2" and (".attn." in name or ".mlp." in name) and tensor.dim() == 2:
        return tensor.t()  # OpenAI's Conv1D keeps its matrices as (in, out)
    if form == "nanochat" and re.search(r"\.[qk]_proj", name):
        # its rotary positions turn by -angle: a change of sign in the second half of each head makes up for it
        halves = tensor.unflatten(0, (-1, 2, config["head_dim"] // 2))  # (nh, 2, hs / 2, C)
        return (halves * tensor.new_tensor([1.0, -1.0]).view(1, 2, 1, 1)).flatten(0, 2)
    return tensor
