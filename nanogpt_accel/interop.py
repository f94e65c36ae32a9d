"""Models to and from what others hold them in: GPT-2, Llama, Qwen3 and nanochat as transformers ships them, and
nanoGPT's ckpt.pt.

A `config` here is a dictionary with the fields of GPTConfig. A form is transformers' model_type of a stock model:
"gpt2", "llama", "qwen3", "nanochat". The mappings are exact: no number is rounded, and export proves it by logits.
"""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np

from . import hub
from .tokenizer import Tokenizer

# the class that transformers ships for each form
FORMS = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM",
         "nanochat": "NanoChatForCausalLM"}
# GPT-2's answer to each switch of GPTConfig; the other forms name where they differ
_GPT2 = {"n_kv_head": None, "head_dim": None, "n_inner": None, "bias": True, "norm": "layernorm", "norm_weight": True,
         "norm_eps": 1e-5, "embd_norm": False, "qk_norm": False, "position": "learned", "rope_theta": 10_000.0,
         "activation": "gelu", "logit_softcap": None, "tie_word_embeddings": True}
_LLAMA = {**_GPT2, "norm": "rmsnorm", "norm_eps": 1e-6, "position": "rotary", "activation": "swiglu",
          "tie_word_embeddings": False}
# transformers' names of the activations that are ours
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "relu2": "relu2"}


# ---- what a folder holds


def read_config(folder):
    """The config of a model folder of any form, with every None resolved.

    Raises:
        ValueError: a family or a switch that GPT does not cover; the message names it.
    """
    try:
        stored = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder}: gone while it was read; a run that is training prunes its older checkpoints: try "
                         "again") from None
    kind = stored.get("model_type")
    try:
        if kind == "nanogpt_accel":
            config = {**_GPT2, "bias": False, "bos_token_id": None, "eos_token_id": None, **stored}
        elif kind in FORMS:
            config = _from_stock_config(kind, stored)
        else:
            raise ValueError(f"a model of type {kind}")
        config["n_kv_head"] = config["n_kv_head"] or config["n_head"]
        config["head_dim"] = config["head_dim"] or config["n_embd"] // config["n_head"]
        config["n_inner"] = config["n_inner"] or 4 * config["n_embd"]
        for key in ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_inner"):
            if not isinstance(config[key], int) or config[key] < 1:
                raise ValueError(f"{key}={config[key]!r} is no shape of a model")
    except (TypeError, AttributeError, ZeroDivisionError):
        raise ValueError(f"{folder}: config.json of type {kind} holds a shape that is no number") from None
    except KeyError as error:
        raise ValueError(f"{folder}: config.json of type {kind} lacks {error.args[0]}") from None
    except ValueError as error:
        raise ValueError(f"{folder}: {error}; taken are this toolkit's own and {', '.join(FORMS)}, with plain rotary "
                         "positions and full attention") from None
    return config


def load_model(folder, **changes):
    """The GPT of a model folder of any form, in float32 on the CPU and in eval mode.

    changes: fields of the config to set, such as dropout.

    Raises:
        ValueError: a family or a switch that GPT does not cover, or weights that do not fit the config.
    """
    from transformers import AutoModelForCausalLM

    from .model import GPT, GPTConfig

    config = read_config(folder)
    if config.get("model_type") == "nanogpt_accel":
        return _load_whole(GPT, folder, **changes)
    # transformers knows the shards, the old names and the old files of its own models
    stock = _load_whole(AutoModelForCausalLM, folder)
    weights = {name: parameter.detach() for name, parameter in stock.named_parameters()}
    # zero biases are how `export` writes that there are none
    config["bias"] = any(tensor.any() for name, tensor in weights.items() if name.endswith(".bias"))
    return _assemble(GPTConfig(**{**config, **changes}), from_stock(stock.config.model_type, config, weights))


def read_nanogpt(path, activation="gelu"):
    """The GPT of a nanoGPT ckpt.pt, of a compiled or DDP model too, and what else the file tells.

    activation: "gelu", nanoGPT's since May 2023; checkpoints of older versions have "gelu_new".

    Returns:
        (model, info): info holds nanoGPT's `iter_num`, `best_val_loss` and `config`, where they are there.

    Raises:
        ValueError: no such checkpoint. What a pickle could do besides holding tensors and plain values is refused.
    """
    import torch

    from .model import GPTConfig

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: refused, for more than tensors and plain values is in it "
                         f"({_first_line(error)})") from None
    except Exception as error:  # torch raises almost anything for a file that is not what it should be
        raise ValueError(f"{path}: not a file that torch.save wrote ({_first_line(error)})") from error
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise ValueError(f"{path}: not a checkpoint of nanoGPT's train.py: no `model` and `model_args` in it")
    try:
        layers = {name.partition(".h.")[2].partition(".")[0] for name in content["model"] if ".h." in name}
        if len(layers) != content["model_args"]["n_layer"]:
            raise ValueError(f"n_layer={content['model_args']['n_layer']}, and {len(layers)} are there")
        config = GPTConfig(**{"bias": True, **content["model_args"]}, activation=activation)
        weights = {re.sub(r"^(_orig_mod\.|module\.)+", "", name): tensor.float()
                   for name, tensor in content["model"].items()}
        for name in [name for name in weights if name.endswith(".attn.bias")] + ["lm_head.weight"]:
            weights.pop(name, None)  # the causal mask of older versions; and the head, which is the embedding
        model = _assemble(config, weights)
    except Exception as error:  # in such a file anything may stand under these names
        raise ValueError(f"{path}: its weights do not fit its model_args ({_first_line(error)})") from error
    return model, {key: content.get(key) for key in ("iter_num", "best_val_loss", "config")}


def _first_line(error):
    """The reason that an error gives, in one line of bearable length."""
    text = str(error).split("WeightsUnpickler error: ")[-1].split("Re-running `torch.load`")[0]
    return " ".join(text.split())[:200] or type(error).__name__


def _load_whole(model_class, folder, **changes):
    """from_pretrained in float32, but weights that do not fit are an error; by itself it draws random ones in the place
    of what is missing, and leaves out what is too many."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would stand among our lines
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # and its table of what is missing is said in our words
    try:
        model, info = model_class.from_pretrained(folder, dtype=torch.float32, local_files_only=True,
                                                  ignore_mismatched_sizes=True, output_loading_info=True, **changes)
    except Exception as error:  # transformers raises almost anything for files that are not what they should be
        raise ValueError(f"{folder}: cannot be loaded: {_first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    wrong = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if model.config.model_type == "nanogpt_accel":  # others' files may hold tables that are of no use any more
        wrong |= set(info["unexpected_keys"])
    if wrong:
        raise ValueError(f"{folder}: model.safetensors does not fit config.json, for what is missing, too many or of "
                         f"another shape there: {', '.join(sorted(wrong)[:3])}{', ...' if len(wrong) > 3 else ''}")
    if os.name == "nt":  # which deletes and replaces no file that is mapped into memory, as the weights are
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model.eval()


def _assemble(config, weights):
    """A GPT with these weights, without the time that it takes to draw others first.

    Raises:
        RuntimeError: a tensor is missing, too many, or of another shape.
    """
    import torch

    from .model import GPT

    with torch.device("meta"):
        model = GPT(config)
    tied = {"lm_head.weight": weights["transformer.wte.weight"]} if config.tie_word_embeddings else {}
    model.load_state_dict(weights | tied, assign=True)
    model.tie_weights()
    return model.eval()


def check_tokenizer(tokenizer, config, folder):
    """Whether the model of a folder has a row for each symbol, as a list of problems."""
    if tokenizer.vocab_size <= config["vocab_size"]:
        return []
    return [f"{folder}: its tokenizer has {tokenizer.vocab_size:,} symbols, but the model only "
            f"{config['vocab_size']:,} rows for them: one of the two belongs to another model"]


def fit_to_tokenizer(model, tokenizer):
    """Tell a model what its ids mean, in place: which one ends a text, where that is not known yet, and that rows of
    the embedding which only round it up are no tokens, so that no `generate` draws them."""
    for config in (model.config, model.generation_config):
        if config.eos_token_id is None:
            config.bos_token_id = config.eos_token_id = tokenizer.eot_id
    model.generation_config.suppress_tokens = list(range(tokenizer.vocab_size, model.config.vocab_size)) or None


# ---- folders for others


def export(source, to, form, keep_padding=False, dtype="float32", report=print):
    """Write the model of a folder as another folder.

    Args:
        source: a model folder of any form. to: as in `write`. form: "stock" or "custom".
        dtype: of the weights, "float32", "bfloat16" or "float16"; they are rounded to it first, so that the comparison
            stays exact. keep_padding: whether a stock form keeps the rows of the vocabulary that only round it up.
        report: called with a line about each thing that takes a while.

    Returns:
        (class, difference, tokens): the name of the class that loads it, and what `write` returns.

    Raises:
        ValueError: no stock architecture computes what the model does; the message names the switches in the way.
    """
    source, config, tokenizer = Path(source), read_config(source), Tokenizer.load(source)
    if problems := check_tokenizer(tokenizer, config, source):
        raise ValueError(problems[0])
    if form == "stock":
        form, obstacles = stock_form(config)
        if obstacles:
            raise ValueError(f"{source}: no stock model is the same; {FORMS[form]} comes nearest, but for "
                             f"{', '.join(obstacles)}: form=custom writes the model with its own model.py, for "
                             "trust_remote_code=True")
    report(f"{source}: {config['n_layer']} layers, to be written as {FORMS.get(form, 'GPT')}")
    card = hub.converted_card(source, Path(to).name, needs_code=form == "custom")
    difference, tokens = write(load_model(source), to, form, tokenizer=tokenizer, card=card, dtype=dtype, report=report,
                               rows=None if keep_padding else tokenizer.vocab_size)
    return FORMS.get(form, "GPT"), difference, tokens


def write(model, to, form, *, tokenizer, card, rows=None, dtype="float32", report=print):
    """Write a GPT as a folder that transformers loads, and load it again to compare the logits on a text.

    Args:
        model: the GPT, in float32 on the CPU, in eval mode. to: a folder that does not exist yet, or is empty.
        form: a key of FORMS that stock_form() gave, or "custom" for GPT itself with its model.py.
        tokenizer: of the model. card: text of README.md.
        rows: of a stock form's vocabulary, where they are to be fewer than the model's.
        dtype: of the weights that are written; the model's own are rounded to it too.
        report: as in `export`.

    Returns:
        (difference, tokens): the largest difference of a logit, and the number of tokens compared.

    Raises:
        RuntimeError: the folder does not compute what the model does; it is not kept.
        OSError: it cannot be written.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    to, existed = Path(to), Path(to).exists()
    temporary = to / ".tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir(parents=True)
        dtype = getattr(torch, dtype)
        report(f"writing {model.num_parameters():,} parameters")
        model.to(dtype)
        if form == "custom":
            rows = model.config.vocab_size
            model.save_pretrained(temporary)
        else:
            rows = min(rows or model.config.vocab_size, model.config.vocab_size)
            _save_stock(model, temporary, form, rows, tokenizer.vocab_size)
        tokenizer.save(temporary, max_length=model.config.block_size)
        (temporary / "README.md").write_text(card, encoding="utf-8")

        report("loading them again, to compare the logits")
        model.float()
        loaded = _load_whole(AutoModelForCausalLM, temporary)
        ids = torch.from_numpy(_probe(tokenizer, min(model.config.block_size, 1024)))[None]  # (1, T)
        with torch.no_grad():
            ours, theirs = model(ids).logits[..., :rows], loaded(ids).logits
        if not ours.isfinite().all():
            raise ValueError(f"{to}: nothing was written, for the source's own logits are no numbers (nan or inf)")
        difference = (ours - theirs).abs().max().item()
        if not difference <= 1e-5 * max(1.0, ours.abs().max().item()):
            raise RuntimeError(f"{to}: the model as written differs from its source by {difference}; it was not kept")
        # config.json last: without it a folder is no model yet
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, to / file.name)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{to}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not existed and to.exists() and not any(to.iterdir()):
            to.rmdir()
    return difference, ids.numel()


def _save_stock(model, folder, form, rows, n_tokens):
    """save_pretrained of a stock model with GPT's weights, the vocabulary cut to `rows`. Of these, n_tokens are
    symbols of the tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = model.config.to_dict() | {"vocab_size": rows}
    weights = {name: p.detach()[:rows] if name in ("transformer.wte.weight", "lm_head.weight") else p.detach()
               for name, p in model.named_parameters()}
    weights = to_stock(form, config, weights)
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(form, **_stock_settings(form, config)))
    stock.to(model.dtype)
    for name, parameter in stock.named_parameters():
        if name not in weights:  # a bias that GPT has not is zero there, the gain of a norm one
            assert parameter.dim() == 1, name
            weights[name] = torch.full(parameter.shape, float(name.endswith("weight")), dtype=model.dtype)
    if form != "gpt2":
        stock.config.rope_theta = float(config["rope_theta"])  # transformers 4 reads it here, or silently takes 10,000
    stock.generation_config = GenerationConfig(
        bos_token_id=config["bos_token_id"], eos_token_id=config["eos_token_id"],
        suppress_tokens=list(range(n_tokens, rows)) or None)
    stock.save_pretrained(folder, state_dict=weights)


_TEXT = """A language model reads the beginning of a text and says how likely each symbol is to come next. Trained on
enough of it, the model has to learn spelling first, then grammar, and at last something of what the text is about.
It was 1948 when C. E. Shannon drew letters from a book by hand; "the process is laborious", he wrote, and stopped.
    def loss(logits, target): return -log_softmax(logits)[target]  # in nats
"""


def _probe(tokenizer, length):
    """Ids of a text to compare models on, (length,) int64; of symbols that the tokenizer lacks, none."""
    text = _TEXT if tokenizer.kind != "char" else "".join(c for c in _TEXT if c in tokenizer.vocab)
    ids = tokenizer.encode(text) if text else range(tokenizer.vocab_size)
    return np.resize(np.asarray(ids, dtype=np.int64), length)


# ---- configs


def _from_stock_config(form, stored):
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
        return _GPT2 | special | {
            "vocab_size": stored["vocab_size"], "block_size": stored["n_positions"], "n_layer": stored["n_layer"],
            "n_head": stored["n_head"], "n_embd": stored["n_embd"], "n_inner": stored.get("n_inner"),
            "dropout": stored.get("resid_pdrop", 0.1), "norm_eps": stored.get("layer_norm_epsilon", 1e-5),
            "activation": _activation(stored.get("activation_function", "gelu_new")),
            "tie_word_embeddings": stored.get("tie_word_embeddings", True)}

    # since transformers 5 there is rope_parameters, before it were rope_theta and rope_scaling
    rope = stored.get("rope_parameters") or {"rope_theta": stored.get("rope_theta", 10_000.0),
                                             **(stored.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"rotary positions of type {kind} are not covered")
    config = _LLAMA | special | {
        "vocab_size": stored["vocab_size"], "block_size": stored["max_position_embeddings"],
        "n_layer": stored["num_hidden_layers"], "n_head": stored["num_attention_heads"],
        "n_embd": stored["hidden_size"], "n_inner": stored["intermediate_size"],
        "n_kv_head": stored.get("num_key_value_heads"), "head_dim": stored.get("head_dim"),
        "dropout": stored.get("attention_dropout", 0.0), "norm_eps": stored.get("rms_norm_eps", 1e-6),
        "rope_theta": rope["rope_theta"], "bias": stored.get("attention_bias", False),
        "tie_word_embeddings": stored.get("tie_word_embeddings", False)}
    if form == "nanochat":
        refuse("attention_bias", False)
        return config | {"norm_weight": False, "embd_norm": True, "qk_norm": True,
                         "activation": _activation(stored.get("hidden_act", "relu2")),
                         "logit_softcap": stored.get("final_logit_softcapping", 15.0)}
    refuse("hidden_act", "silu")
    if form == "llama":
        refuse("mlp_bias", config["bias"])
        return config
    refuse("attention_bias", False)
    if any(kind != "full_attention" for kind in stored.get("layer_types") or []) or (
            stored.get("use_sliding_window") and not stored.get("layer_types")):
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
        "gpt2": {**plain, "norm": ["layernorm"], "position": ["learned"], "qk_norm": [False],
                 "n_kv_head": [config["n_head"]], "head_dim": [per_head], "activation": ["gelu", "gelu_new", "relu2"]},
        "llama": {**plain, **rotary, "qk_norm": [False], "activation": ["swiglu"],
                  "n_head": [config["n_head"]] if per_head.is_integer() else []},
        "qwen3": {**plain, **rotary, "qk_norm": [True], "activation": ["swiglu"], "bias": [False]},
        "nanochat": {**rotary, "qk_norm": [True], "activation": ["gelu", "gelu_new", "relu2"], "bias": [False],
                     "norm_weight": [False], "embd_norm": [True]},
    }
    obstacles = {form: [f"{key}={config[key]}" for key, values in keys.items() if config[key] not in values]
                 for form, keys in fitting.items()}
    nearest = min(obstacles, key=lambda form: len(obstacles[form]))
    return nearest, obstacles[nearest]


def _stock_settings(form, config):
    """The arguments of transformers' own config of a form."""
    special = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    common = special | {"vocab_size": config["vocab_size"], "tie_word_embeddings": config["tie_word_embeddings"],
                        "initializer_range": config.get("initializer_range", 0.02)}
    if form == "gpt2":
        return dict(
            common, n_positions=config["block_size"], n_layer=config["n_layer"], n_head=config["n_head"],
            n_embd=config["n_embd"], n_inner=config["n_inner"], activation_function=config["activation"],
            layer_norm_epsilon=config["norm_eps"], resid_pdrop=config["dropout"], embd_pdrop=config["dropout"],
            attn_pdrop=config["dropout"], n_ctx=config["block_size"])  # n_ctx: llama.cpp's converter reads this name
    common |= dict(
        max_position_embeddings=config["block_size"], num_hidden_layers=config["n_layer"],
        num_attention_heads=config["n_head"], num_key_value_heads=config["n_kv_head"], head_dim=config["head_dim"],
        hidden_size=config["n_embd"], intermediate_size=config["n_inner"], rms_norm_eps=config["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": float(config["rope_theta"])})
    if form == "nanochat":
        return dict(common, hidden_act=config["activation"],
                    final_logit_softcapping=config["logit_softcap"])
    if form == "llama":
        common |= {"attention_bias": config["bias"], "mlp_bias": config["bias"]}
    return dict(common, hidden_act="silu")


# ---- weights

_GPT2_NAMES = {name: [name] for name in (
    "transformer.wte", "transformer.wpe", "transformer.h.{}.ln_1", "transformer.h.{}.attn.c_attn",
    "transformer.h.{}.attn.c_proj", "transformer.h.{}.ln_2", "transformer.h.{}.mlp.c_fc",
    "transformer.h.{}.mlp.c_proj", "transformer.ln_f", "lm_head")}
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
_NANOCHAT_NAMES = _LLAMA_NAMES | {"transformer.h.{}.mlp.c_fc": ["model.layers.{}.mlp.fc1"],
                                  "transformer.h.{}.mlp.c_proj": ["model.layers.{}.mlp.fc2"]}
_NAMES = {"gpt2": _GPT2_NAMES, "llama": _LLAMA_NAMES, "qwen3": _LLAMA_NAMES, "nanochat": _NANOCHAT_NAMES}


def to_stock(form, config, weights):
    """A stock model's tensors by name, from ours. What ours lacks (biases, gains of norms) is not in it."""
    stock = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        layer = re.search(r"\d+|$", module)[0]
        theirs = _NAMES[form][re.sub(r"\.\d+\.", ".{}.", module)]
        for their, piece in zip(theirs, _split(tensor, len(theirs), config), strict=True):
            stock[f"{their.format(layer)}.{kind}"] = _turn(form, their, piece, config).contiguous()
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
                    pieces = [_turn(form, name, stock[name], config) for name in names]
                    weights[f"{ours.format(layer)}.{kind}"] = torch.cat(pieces).contiguous()
                    left.difference_update(names)
    if left:
        raise ValueError(f"the weights {', '.join(sorted(left)[:3])} have no place in GPT")
    return weights


def _split(tensor, parts, config):
    """The tensors that stand one upon the other in ours: queries, keys and values; or a gate and what it gates."""
    if parts == 3:
        return tensor.split([heads * config["head_dim"] for heads in
                             (config["n_head"], config["n_kv_head"], config["n_kv_head"])])
    return tensor.chunk(parts)


def _turn(form, name, tensor, config):
    """What has to be done to one of their tensors, or to a piece of ours, on the way; it is its own inverse."""
    if form == "gpt2" and (".attn." in name or ".mlp." in name) and tensor.dim() == 2:
        return tensor.t()  # OpenAI's Conv1D keeps its matrices as (in, out)
    if form == "nanochat" and re.search(r"\.[qk]_proj", name):
        # its rotary positions turn by -angle: a change of sign in the second half of each head makes up for it
        halves = tensor.unflatten(0, (-1, 2, config["head_dim"] // 2))  # (nh, 2, hs / 2, C)
        return (halves * tensor.new_tensor([1.0, -1.0]).view(1, 2, 1, 1)).flatten(0, 2)
    return tensor
