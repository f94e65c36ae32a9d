"""Load model folders: config.json of old and new versions, unsupported features, missing and invalid weights."""

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_models import ROPE, SUPPORTED, Evil, N, assert_close, gpt, logits, save_model, save_stock
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer

from nanogpt_accel.__main__ import main
from nanogpt_accel.data.tokenizer import EOT, Tokenizer
from nanogpt_accel.model import GPTConfig
from nanogpt_accel.models.load import load_model, read_config
from nanogpt_accel.models.stock import nearest_architecture


@pytest.mark.parametrize(
    "merges",
    [
        "h e\nt h\nt he\nĠ the\nĠ t",
        "h e\nt h\nt he\nĠ t\nĠt he",  # these merges never build Ġthe from its bytes, but tiktoken would
    ],
)
def test_vocab_json_and_merges_txt_without_tokenizer_json(ids, merges):
    """GPT-2's older format: vocab.json and merges.txt, no tokenizer.json."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = [*bytes_to_unicode().values(), *(line.replace(" ", "") for line in merges.splitlines())]
    stock = save_stock("gpt2", vocab_size=len(symbols) + 1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("theirs", name).unlink()
    Path("theirs/vocab.json").write_text(json.dumps({s: i for i, s in enumerate([*symbols, EOT])}))
    Path("theirs/merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    text = "In the other hand: äöü\n\n  thethe"
    wanted = GPT2Tokenizer.from_pretrained("theirs")(text)["input_ids"]
    assert len(wanted) < len(text.encode()) - 5
    assert Tokenizer.load("theirs").encode(text).tolist() == wanted
    assert main(["export", "theirs", "--to", "ours", "form=custom"]) == 0
    assert AutoTokenizer.from_pretrained("ours")(text)["input_ids"] == wanted
    assert_close(logits(AutoModelForCausalLM.from_pretrained("ours"), ids), logits(stock, ids))


def test_read_config_of_transformers_4(ids):
    """transformers 4 wrote rope_theta at the top level, and left out keys with default values."""
    stock = save_stock("qwen3", attention_bias=False)
    config = json.loads(Path("theirs/config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"] = None
    for key in ("layer_types", "attention_bias", "hidden_act", "tie_word_embeddings", "use_sliding_window"):
        config.pop(key, None)
    Path("theirs/config.json").write_text(json.dumps(config))
    assert read_config("theirs")["rope_theta"] == 700.0
    assert_close(logits(load_model("theirs"), ids), logits(stock, ids))


def test_read_config_fills_missing_keys_with_the_defaults_of_gptconfig():
    first = {
        "activation": "gelu_new",
        "bias": True,
        "block_size": 24,
        "dropout": 0.0,
        "eos_token_id": None,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "nanogpt_accel",
        "n_embd": 36,
        "n_head": 4,
        "n_layer": 2,
        "use_cache": True,
        "vocab_size": 65,
    }
    Path("config.json").write_text(json.dumps(first))
    filled = read_config(".")
    assert filled.items() >= first.items()
    assert (
        filled.items()
        >= {
            "n_kv_head": 4,
            "head_dim": 9,
            "n_inner": 144,
            "norm": "layernorm",
            "norm_weight": True,
            "norm_eps": 1e-5,
            "embd_norm": False,
            "qk_norm": False,
            "position": "learned",
            "logit_softcap": None,
            "tie_word_embeddings": True,
        }.items()
    )
    assert nearest_architecture(filled) == ("gpt2", [])
    # missing keys have the defaults of GPTConfig
    Path("config.json").write_text(
        json.dumps({k: first[k] for k in ("model_type", "n_embd", "n_head", "n_layer", "block_size", "vocab_size")})
    )
    filled = read_config(".")
    config = GPTConfig(n_embd=36, n_head=4, n_layer=2, block_size=24, vocab_size=65).resolved()
    assert {key: filled[key] for key in config if key in filled} == {
        key: value for key, value in config.items() if key in filled
    }


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("gpt2", {"model_type": "bert"}, ["model_type=bert"]),
        ("llama", {"model_type": "mistral"}, ["model_type=mistral"]),
        ("gpt2", {"model_type": "gpt_neo"}, ["model_type=gpt_neo"]),
        ("gpt2", {"model_type": None}, ["model_type=None"]),
        ("llama", {"rope_parameters": LLAMA3}, ["rope_type=llama3"]),
        (
            "llama",
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
            ["rope_type=linear"],
        ),
        (
            "qwen3",
            {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            ["rope_type=yarn"],
        ),
        ("llama", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor=0.5"]),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, ["sliding-window attention"]),
        ("qwen3", {"layer_types": None, "use_sliding_window": True}, ["sliding-window attention"]),
        ("qwen3", {"attention_bias": True}, ["attention_bias=True"]),
        ("qwen3", {"hidden_act": "gelu"}, ["hidden_act=gelu"]),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx=True"]),
        ("gpt2", {"scale_attn_weights": False}, ["scale_attn_weights=False"]),
        ("gpt2", {"add_cross_attention": True}, ["add_cross_attention=True"]),
        ("gpt2", {"activation_function": "silu"}, ["=silu is not supported"]),
        ("llama", {"mlp_bias": True}, ["mlp_bias=True"]),
        ("llama", {"attention_bias": True}, ["mlp_bias=False"]),
        ("llama", {"hidden_act": "relu"}, ["hidden_act=relu"]),
        ("nanochat", {"hidden_act": "silu"}, ["=silu is not supported"]),
        ("nanochat", {"attention_bias": True}, ["attention_bias=True"]),
    ],
)
def test_unsupported_features_are_named(refused, case, changes, words):
    save_stock(case)
    config = json.loads(Path("theirs/config.json").read_text()) | changes
    Path("theirs/config.json").write_text(json.dumps(config))
    for read in (read_config, load_model):
        with refused(ValueError, "theirs", *words, *SUPPORTED):
            read("theirs")


@pytest.mark.parametrize(
    ("case", "key"),
    [
        ("gpt2", "n_embd"),
        ("llama", "hidden_size"),
        ("gpt2", "vocab_size"),
        ("nanochat", "num_attention_heads"),
        ("qwen3", "max_position_embeddings"),
    ],
)
def test_a_missing_key_of_config_json_is_named(refused, case, key):
    save_stock(case)
    config = json.loads(Path("theirs/config.json").read_text())
    del config[key]
    Path("theirs/config.json").write_text(json.dumps(config))
    with refused(ValueError, "theirs: config.json", case, f"has no {key}"):
        read_config("theirs")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_head", 0),
        ("n_layer", "two"),
        ("n_embd", -4),
        ("n_embd", [1]),
        ("vocab_size", None),
    ],
)
def test_an_invalid_shape_in_config_json_is_refused(capsys, field, value):
    save_model(gpt(), "ours")
    config = json.loads(Path("ours/config.json").read_text())
    Path("ours/config.json").write_text(json.dumps(config | {field: value, "head_dim": None}))
    assert main(["export", "ours", "to=out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ours: ") and not Path("out").exists()


@pytest.mark.parametrize("case", ["ours", "gpt2", "llama"])
def test_a_missing_weight_is_an_error_and_not_initialized(refused, case):
    if case == "ours":
        save_model(gpt(), "theirs")
    else:
        save_stock(case)
    weights = load_file("theirs/model.safetensors")
    gone = [name for name in weights if ".1.mlp" in name][0]
    save_file(
        {name: tensor for name, tensor in weights.items() if name != gone}, "theirs/model.safetensors", {"format": "pt"}
    )
    with refused(ValueError, "theirs", gone):
        load_model("theirs")


@pytest.mark.parametrize("content", ["hostile", "junk"])
def test_invalid_or_hostile_weights_are_refused(capsys, content):
    save_stock("gpt2")
    Path("theirs/model.safetensors").unlink()
    if content == "hostile":
        torch.save({"transformer.wte.weight": Evil()}, "theirs/pytorch_model.bin")
    else:
        Path("theirs/pytorch_model.bin").write_text("junk")
    status = None
    with suppress(Exception):
        status = main(["export", "theirs", "--to", "ours"])
    assert not Path("hacked").exists() and os.listdir() == ["theirs"]
    assert status == 2 and "error: theirs" in capsys.readouterr().err


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(capsys):
    save_model(gpt(vocab_size=40), "ours")
    assert main(["export", "ours", "--to", "theirs"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "ours" in line and str(N) in line and "40" in line
