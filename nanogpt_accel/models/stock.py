"""Convert configs and weights between GPT and the stock architectures GPT-2, Llama, Qwen3 and nanochat.

To add an architecture, write a section like those below, and add it to ARCHITECTURES.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from ..recipe import Model

# the architecture of nanoGPT's GPT-2, without sizes; recipes and GPTConfig have the same defaults
DEFAULTS = Model().model_dump(
    exclude={"n_layer", "n_head", "n_embd", "block_size"}
    | {"init_from", "dropout", "pad_vocab_to_multiple_of", "initializer_range", "zero_init", "depth"}
)
# The fields of GPTConfig that the conversions below handle, and fields that do not change the logits. `export` refuses
# a model that uses any other field. If you handle a new field, add it here, and its values to each `supported` below
_CONVERTED = {
    *("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "head_dim", "n_embd", "n_inner", "bias"),
    *("norm", "norm_weight", "norm_eps", "embd_norm", "qk_norm", "position", "rope_theta", "activation"),
    *("logit_softcap", "tie_word_embeddings", "dropout", "initializer_range", "zero_init", "mup_base_width"),
    *("use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
}
# name of an activation in transformers -> name in GPTConfig
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "relu2": "relu2"}
_UNGATED = ["gelu", "gelu_new", "relu2"]


class Architecture(NamedTuple):
    """A model class of transformers, with functions to convert its config and weights."""

    model_class: str
    read_config: Callable  # config.json -> fields of GPTConfig that differ from DEFAULTS
    write_config: Callable  # config -> arguments of the config class
    supported: Callable  # config -> {field: values that the class supports}
    weight_names: dict  # module of GPT -> modules of the class, whose weights GPT stores concatenated
    # (name in the class, tensor, config) -> converted tensor; this function is its own inverse
    convert_weight: Callable = lambda name, tensor, config: tensor


def _require(stored, **values):
    for key, value in values.items():
        if stored.get(key, value) != value:
            raise ValueError(f"{key}={stored[key]} is not supported")


def _read_keys(keys, stored):
    """Return the fields of GPTConfig from config.json. keys: {field: key of config.json}."""
    fields = {field: stored[key] for field, key in keys.items()}
    if "activation" in fields:
        if fields["activation"] not in _ACTIVATIONS:
            raise ValueError(f"{keys['activation']}={fields['activation']} is not supported")
        fields["activation"] = _ACTIVATIONS[fields["activation"]]
    return fields


# ---- GPT-2

_GPT2_KEYS = {
    **{key: key for key in ("vocab_size", "n_layer", "n_head", "n_embd", "n_inner", "tie_word_embeddings")},
    "block_size": "n_positions",
    "dropout": "resid_pdrop",
    "norm_eps": "layer_norm_epsilon",
    "activation": "activation_function",
}
_GPT2_BLOCK = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
_GPT2_MODULES = ["wte", "wpe", *(f"h.{{}}.{name}" for name in _GPT2_BLOCK), "ln_f"]


def _read_gpt2(stored):
    _require(stored, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    # defaults of GPT2Config
    defaults = {"n_inner": None, "resid_pdrop": 0.1, "layer_norm_epsilon": 1e-5}
    defaults |= {"activation_function": "gelu_new", "tie_word_embeddings": True}
    return {"bias": True, **_read_keys(_GPT2_KEYS, defaults | stored)}


def _write_gpt2(config):
    stored = {key: config[field] for field, key in _GPT2_KEYS.items()}
    n_ctx = config["block_size"]  # llama.cpp's converter reads this key
    return {**stored, "embd_pdrop": config["dropout"], "attn_pdrop": config["dropout"], "n_ctx": n_ctx}


def _convert_gpt2(name, tensor, config):
    # OpenAI's Conv1D stores matrices as (in, out)
    return tensor.t() if (".attn." in name or ".mlp." in name) and tensor.dim() == 2 else tensor


GPT2 = Architecture(
    model_class="GPT2LMHeadModel",
    read_config=_read_gpt2,
    write_config=_write_gpt2,
    supported=lambda config: {
        "embd_norm": [False],
        "logit_softcap": [None],
        "norm": ["layernorm"],
        "position": ["learned"],
        "qk_norm": [False],
        "n_kv_head": [config["n_head"]],
        "head_dim": [config["n_embd"] / config["n_head"]],
        "activation": _UNGATED,
    },
    weight_names={f"transformer.{name}": [f"transformer.{name}"] for name in _GPT2_MODULES} | {"lm_head": ["lm_head"]},
    convert_weight=_convert_gpt2,
)

# ---- Llama (Qwen3 and nanochat use the same keys and weight names)

_LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
}
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
_RMSNORM_AND_ROTARY = {"norm": ["rmsnorm"], "position": ["rotary"]}
_LLAMA_SUPPORTED = {**_RMSNORM_AND_ROTARY, "embd_norm": [False], "logit_softcap": [None], "activation": ["swiglu"]}


def _read_llama_keys(stored, keys=_LLAMA_KEYS, **defaults):
    # transformers 5 writes rope_parameters, earlier versions write rope_theta and rope_scaling
    old_rope = {"rope_theta": stored.get("rope_theta", 10_000.0), **(stored.get("rope_scaling") or {})}
    rope = stored.get("rope_parameters") or old_rope
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    _require({**rope, "rope_type": rope_type}, rope_type="default", partial_rotary_factor=1.0)
    defaults |= {"num_key_value_heads": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    return {
        **_read_keys(keys, {"head_dim": None} | defaults | stored),
        "dropout": stored.get("attention_dropout", 0.0),
        "norm": "rmsnorm",
        "position": "rotary",
        "rope_theta": rope["rope_theta"],
    }


def _write_llama_keys(config, keys=_LLAMA_KEYS, **more):
    rope = {"rope_type": "default", "rope_theta": float(config["rope_theta"])}
    return {**{key: config[field] for field, key in keys.items()}, "rope_parameters": rope, **more}


def _read_llama(stored):
    bias = stored.get("attention_bias", False)
    _require(stored, hidden_act="silu", mlp_bias=bias)
    return {**_read_llama_keys(stored), "activation": "swiglu", "bias": bias}


LLAMA = Architecture(
    model_class="LlamaForCausalLM",
    read_config=_read_llama,
    write_config=lambda config: _write_llama_keys(
        config, attention_bias=config["bias"], mlp_bias=config["bias"], hidden_act="silu"
    ),
    supported=lambda config: {
        **_LLAMA_SUPPORTED,
        "qk_norm": [False],
        "n_head": [config["n_head"]] if config["n_embd"] % config["n_head"] == 0 else [],  # a constraint of LlamaConfig
    },
    weight_names=_LLAMA_NAMES,
)

# ---- Qwen3


def _read_qwen3(stored):
    _require(stored, hidden_act="silu", attention_bias=False)
    has_window = stored.get("use_sliding_window")
    if set(stored.get("layer_types") or ["sliding" if has_window else "full_attention"]) != {"full_attention"}:
        raise ValueError("sliding-window attention is not supported")
    return {**_read_llama_keys(stored, head_dim=128), "activation": "swiglu", "qk_norm": True}


QWEN3 = Architecture(
    model_class="Qwen3ForCausalLM",
    read_config=_read_qwen3,
    write_config=lambda config: _write_llama_keys(config, hidden_act="silu"),
    supported=lambda config: {**_LLAMA_SUPPORTED, "qk_norm": [True], "bias": [False]},
    weight_names=_LLAMA_NAMES,
)

# ---- nanochat

_NANOCHAT_KEYS = {**_LLAMA_KEYS, "activation": "hidden_act", "logit_softcap": "final_logit_softcapping"}


def _read_nanochat(stored):
    _require(stored, attention_bias=False)
    fields = _read_llama_keys(stored, _NANOCHAT_KEYS, hidden_act="relu2", final_logit_softcapping=15.0)
    return {**fields, "norm_weight": False, "embd_norm": True, "qk_norm": True}


def _convert_nanochat(name, tensor, config):
    if not re.search(r"\.[qk]_proj", name):
        return tensor
    # nanochat rotates in the opposite direction; negating the second half of each head compensates for this
    halves = tensor.unflatten(0, (-1, 2, config["head_dim"] // 2))  # (nh, 2, hs / 2, C)
    return (halves * tensor.new_tensor([1.0, -1.0]).view(1, 2, 1, 1)).flatten(0, 2)


NANOCHAT = Architecture(
    model_class="NanoChatForCausalLM",
    read_config=_read_nanochat,
    write_config=lambda config: _write_llama_keys(config, _NANOCHAT_KEYS),
    supported=lambda config: {
        **_RMSNORM_AND_ROTARY,
        "qk_norm": [True],
        "activation": _UNGATED,
        "bias": [False],
        "norm_weight": [False],
        "embd_norm": [True],
    },
    weight_names={
        **_LLAMA_NAMES,
        "transformer.h.{}.mlp.c_fc": ["model.layers.{}.mlp.fc1"],
        "transformer.h.{}.mlp.c_proj": ["model.layers.{}.mlp.fc2"],
    },
    convert_weight=_convert_nanochat,
)

# model_type in config.json -> Architecture
ARCHITECTURES = {"gpt2": GPT2, "llama": LLAMA, "qwen3": QWEN3, "nanochat": NANOCHAT}

# ---- configs


def from_stock_config(model_type, stored):
    """Convert a stock config.json to GPTConfig's fields. Missing keys have the defaults of transformers' config class.

    Raises:
        ValueError: GPT does not support a feature of the model. KeyError: a required key is missing.
    """
    special = {key: stored.get(key) for key in ("bos_token_id", "eos_token_id")}
    return DEFAULTS | special | ARCHITECTURES[model_type].read_config(stored)


def to_stock_config(model_type, config):
    """Convert GPTConfig's fields to arguments of transformers' config class."""
    common = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    common["initializer_range"] = config.get("initializer_range", 0.02)
    return common | ARCHITECTURES[model_type].write_config(config)


def find_obstacles(config, supported):
    """Return the settings of a config that are not supported, as key=value. supported: {field: supported values}."""
    return [f"{key}={config[key]}" for key in supported if config[key] not in supported[key]]


def nearest_architecture(config, model_types=tuple(ARCHITECTURES)):
    """Return (model_type, obstacles) for the closest stock architecture. Obstacles are the settings of this config that
    the architecture does not support, as key=value. Without obstacles, the exported model gives the same logits."""
    obstacles = {name: find_obstacles(config, ARCHITECTURES[name].supported(config)) for name in model_types}
    nearest = min(obstacles, key=lambda model_type: len(obstacles[model_type]))
    return nearest, obstacles[nearest]


def unknown_settings(config):
    """Return the settings that no conversion handles, as key=value. A user may have added such fields to GPTConfig.

    Settings that are off (false, none or 0) are not returned. This function imports GPT, which takes seconds, so call
    find_obstacles first.

    config: the fields of GPTConfig. Missing fields have their defaults.
    """
    from ..model import GPTConfig

    fields = GPTConfig.__annotations__.keys() | DEFAULTS.keys()
    values = {key: value for key, value in (GPTConfig().to_dict() | config).items() if key in fields}
    return [f"{key}={values[key]} (unknown to export)" for key in values if key not in _CONVERTED and values[key]]


# ---- weights


def unknown_weights(model_type, names):
    """Return the names of GPT's weights that have no equivalent in the stock architecture. For example, a user may have
    added a module with weights to model.py."""
    modules = ARCHITECTURES[model_type].weight_names
    known = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    return [name for name in names if _pattern(name) not in known]


def _pattern(name):
    """Return the name of a module or weight with {} instead of the layer's index, as in weight_names."""
    return re.sub(r"\.\d+\.", ".{}.", name)


def to_stock_weights(model_type, config, weights):
    """Convert GPT's weights to a stock model's {name: tensor}. Biases and norm weights that only the stock model has
    are not in the result."""
    architecture, stock = ARCHITECTURES[model_type], {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        layer = re.search(r"\d+|$", module)[0]
        modules = architecture.weight_names[_pattern(module)]
        sizes = len(tensor) // len(modules)
        if len(modules) == 3:  # query, key and value projections
            sizes = [config[key] * config["head_dim"] for key in ("n_head", "n_kv_head", "n_kv_head")]
        for module, part in zip(modules, tensor.split(sizes), strict=True):
            stock[f"{module.format(layer)}.{kind}"] = architecture.convert_weight(module, part, config).contiguous()
    return stock


def from_stock_weights(model_type, config, stock):
    """Convert a stock model's weights to GPT's {name: tensor}. If config["bias"] is false, omit the biases."""
    import torch

    architecture, weights = ARCHITECTURES[model_type], {}
    remaining = {name for name in stock if config["bias"] or not name.endswith(".bias")}
    for ours, theirs in architecture.weight_names.items():
        for layer in range(config["n_layer"]) if "{}" in ours else [None]:
            for kind in ("weight", "bias"):
                names = [f"{module.format(layer)}.{kind}" for module in theirs]
                if remaining.issuperset(names):
                    parts = [architecture.convert_weight(name, stock[name], config) for name in names]
                    weights[f"{ours.format(layer)}.{kind}"] = torch.cat(parts).contiguous()
                    remaining.difference_update(names)
    if remaining:
        raise ValueError(f"the model has weights that GPT does not support: {', '.join(sorted(remaining)[:3])}")
    return weights
