"""interop.py, `export` and `import`: models to and from transformers' own GPT-2, Llama, Qwen3 and nanochat, and from
nanoGPT's ckpt.pt. What is right is said by transformers' models and by nanoGPT's formulas, written out below."""

import json
import os
import pickle
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared import WITHOUT_THE_PACKAGE
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nanogpt_accel.__main__ import main
from nanogpt_accel.data.tokenizer import EOT, Tokenizer
from nanogpt_accel.model import GPT, GPTConfig
from nanogpt_accel.models.export import export
from nanogpt_accel.models.load import load_model, read_config
from nanogpt_accel.models.nanogpt import read_nanogpt
from nanogpt_accel.models.stock import ARCHITECTURES, nearest_architecture

find_tokenizer = import_module("nanogpt_accel.commands.import_nanogpt").find_tokenizer  # its name is a keyword

CHARS = "\n !\"',-.:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
N = len(CHARS) + 1  # symbols, the last one ends a text
ROWS, T_MAX = 80, 32  # of the embedding, a good deal of padding
FAMILIES = ("this toolkit's own", "gpt2", "llama", "qwen3", "nanochat")


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ids():
    return torch.randint(N, (3, T_MAX), generator=torch.Generator().manual_seed(3))


def randomised(model):
    """All its parameters drawn anew: nothing is zero or one that could be left out unseen."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3).add_(p.dim() == 1)
    return model.eval()


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def close(ours, theirs, atol=1e-5):
    assert theirs.std() > 0.5  # not a comparison of zeros
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


# ---- out: a folder that transformers loads as one of its own

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
STOCK = {  # our switches -> the class that computes the same, and what its config.json has to say
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
    return randomised(GPT(GPTConfig(**shape | switches)))


def saved(model, folder, tokenizer=None):
    """A model folder as this toolkit has it."""
    model.save_pretrained(folder)
    (tokenizer or Tokenizer.char([CHARS], add_eot=True)).save(folder, max_length=T_MAX)
    return folder


@pytest.mark.parametrize("vocab", ["cut", "keep"])
@pytest.mark.parametrize("case", STOCK)
def test_export_is_stock(capsys, ids, case, vocab):
    switches, stock_class, fields = STOCK[case]
    model = gpt(**switches)
    saved(model, "ours")
    assert main(["export", "ours", "--to", "theirs", f"vocab={vocab}"]) == 0
    assert stock_class.__name__ in capsys.readouterr().out

    theirs, info = AutoModelForCausalLM.from_pretrained("theirs", output_loading_info=True)
    assert type(theirs) is stock_class
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    rows = N if vocab == "cut" else ROWS
    close(logits(theirs.eval(), ids), logits(model, ids)[..., :rows])

    config = json.loads(Path("theirs/config.json").read_text())
    fields = fields | {
        "vocab_size": rows,
        "bos_token_id": N - 1,
        "eos_token_id": N - 1,
        "dtype": "float32",
        "architectures": [stock_class.__name__],
    }
    assert {key: config.get(key) for key in fields} == fields
    assert "auto_map" not in config and not list(Path("theirs").glob("*.py"))
    generation = json.loads(Path("theirs/generation_config.json").read_text())
    assert generation.get("suppress_tokens") == (list(range(N, ROWS)) if vocab == "keep" else None)
    assert generation["eos_token_id"] == N - 1
    text = AutoTokenizer.from_pretrained("theirs")("To be, or not", return_tensors="np")["input_ids"][0]
    assert "".join(CHARS[i] for i in text) == "To be, or not"


def test_padding_that_is_kept_is_never_drawn():
    model = gpt()
    with torch.no_grad():
        model.transformer.wte.weight[N:] *= 30  # the likeliest by far
    assert export(saved(model, "ours"), "theirs", "stock", keep_padding=True)[0] == "GPT2LMHeadModel"
    theirs = AutoModelForCausalLM.from_pretrained("theirs")
    prompt = torch.arange(4)[None]
    assert (logits(theirs, prompt)[0, -1].argmax() >= N) and theirs.generation_config.suppress_tokens
    new = theirs.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert new.max() < N


@pytest.mark.parametrize("case", STOCK)
def test_ours_to_stock_and_back_loses_no_bit(case):
    switches, _, _ = STOCK[case]
    model = gpt(**switches)
    export(saved(model, "ours"), "theirs", "stock", keep_padding=True)
    back = load_model("theirs")
    assert type(back) is GPT and not back.training and all(p.requires_grad for p in back.parameters())
    before, after = dict(model.named_parameters()), dict(back.named_parameters())
    # where norms have no gain, theirs has one of ones
    gains = after.keys() - before.keys()
    assert bool(gains) == (case in ("llama with wide heads", "gpt2 with a head"))
    assert not before.keys() - after.keys() and all((after[name] == 1).all() for name in gains)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for key in set(GPTConfig().to_dict()) - {"norm_weight", "architectures", "dtype"}:
        assert getattr(back.config, key, None) == getattr(model.config, key, None), key


def test_export_of_a_run_or_of_a_stock_folder_is_the_same(ids):
    """What has gone through a stock form may go through another command again."""
    model = gpt(**QWEN3)
    saved(model, "ours")
    for source, to, form in (("ours", "one", "stock"), ("one", "two", "custom"), ("two", "three", "stock")):
        assert main(["export", source, f"--to={to}", f"form={form}"]) == 0
    assert type(AutoModelForCausalLM.from_pretrained("two")) is GPT
    # and the card says each time how the folder is loaded
    assert ["trust_remote_code" in Path(to, "README.md").read_text() for to in ("one", "two", "three")] == [
        False,
        True,
        False,
    ]
    one, three = load_file("one/model.safetensors"), load_file("three/model.safetensors")
    assert one.keys() == three.keys() and all(torch.equal(one[name], three[name]) for name in one)
    assert json.loads(Path("one/config.json").read_text()) == json.loads(Path("three/config.json").read_text())


# ---- in: folders that transformers wrote

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
THEIRS = {
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


def theirs(case, folder="theirs", **changes):
    """A random stock model, and a folder that transformers wrote of it."""
    model = randomised(THEIRS[case](**changes))
    model.save_pretrained(folder)
    Tokenizer.char([CHARS], add_eot=True).save(folder)
    return model


@pytest.mark.parametrize("case", THEIRS)
@pytest.mark.parametrize("written", ["whole", "sharded", "bin", "bfloat16"])
def test_import_of_what_transformers_wrote(ids, case, written):
    stock = theirs(case)
    if written == "sharded":
        Path("theirs/model.safetensors").unlink()
        stock.save_pretrained("theirs", max_shard_size="10KB")
        assert len(list(Path("theirs").glob("*.safetensors"))) > 3
    elif written == "bin":
        Path("theirs/model.safetensors").unlink()
        torch.save(stock.state_dict(), "theirs/pytorch_model.bin")
    elif written == "bfloat16":
        for p in stock.parameters():
            p.data = p.data.bfloat16().float()
        stock.save_pretrained("theirs", state_dict={k: v.bfloat16() for k, v in stock.state_dict().items()})
        assert {t.dtype for t in load_file("theirs/model.safetensors").values()} == {torch.bfloat16}
    ours = load_model("theirs", dropout=0.25)
    assert type(ours) is GPT and not ours.training and ours.config.dropout == 0.25
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    close(logits(ours, ids), logits(stock, ids))
    assert (ours.config.bos_token_id, ours.config.eos_token_id) == (1, 2)


@pytest.mark.parametrize("case", THEIRS)
def test_stock_to_ours_and_back_loses_no_bit(case):
    stock = theirs(case)
    assert main(["export", "theirs", "--to=ours", "form=custom"]) == 0
    assert main(["export", "ours", "--to=back"]) == 0
    back = AutoModelForCausalLM.from_pretrained("back")
    assert type(back) is type(stock)
    before, after = stock.state_dict(), back.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "merges",
    [
        "h e\nt h\nt he\nĠ the\nĠ t",
        "h e\nt h\nt he\nĠ t\nĠt he",  # merges that never make Ġthe of its bytes; tiktoken would
    ],
)
def test_a_tokenizer_of_two_files(ids, merges):
    """GPT-2's older form: vocab.json and merges.txt, no tokenizer.json."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = [*bytes_to_unicode().values(), *(line.replace(" ", "") for line in merges.splitlines())]
    stock = theirs("gpt2", vocab_size=len(symbols) + 1)
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
    close(logits(AutoModelForCausalLM.from_pretrained("ours"), ids), logits(stock, ids))


def test_a_config_of_older_transformers(ids):
    """rope_theta stood at the top before there was rope_parameters, and what was the default was left out."""
    stock = theirs("qwen3", attention_bias=False)
    config = json.loads(Path("theirs/config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"] = None
    for key in ("layer_types", "attention_bias", "hidden_act", "tie_word_embeddings", "use_sliding_window"):
        config.pop(key, None)
    Path("theirs/config.json").write_text(json.dumps(config))
    assert read_config("theirs")["rope_theta"] == 700.0
    close(logits(load_model("theirs"), ids), logits(stock, ids))


def test_a_config_of_our_first_version_is_filled():
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
    # and what is not said is what GPTConfig takes for granted
    Path("config.json").write_text(
        json.dumps({k: first[k] for k in ("model_type", "n_embd", "n_head", "n_layer", "block_size", "vocab_size")})
    )
    filled = read_config(".")
    config = GPTConfig(n_embd=36, n_head=4, n_layer=2, block_size=24, vocab_size=65).to_dict()
    assert {key: filled[key] for key in config if key in filled} == {
        key: value for key, value in config.items() if key in filled
    }


# ---- what is not covered


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
        ("gpt2", {"model_type": "bert"}, ["a model of type bert"]),
        ("llama", {"model_type": "mistral"}, ["a model of type mistral"]),
        ("gpt2", {"model_type": "gpt_neo"}, ["a model of type gpt_neo"]),
        ("gpt2", {"model_type": None}, ["a model of type None"]),
        ("llama", {"rope_parameters": LLAMA3}, ["rotary positions of type llama3"]),
        (
            "llama",
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
            ["rotary positions of type linear"],
        ),
        (
            "qwen3",
            {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            ["rotary positions of type yarn"],
        ),
        ("llama", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}, ["rotary positions"]),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, ["sliding-window attention"]),
        ("qwen3", {"layer_types": None, "use_sliding_window": True}, ["sliding-window attention"]),
        ("qwen3", {"attention_bias": True}, ["attention_bias=True"]),
        ("qwen3", {"hidden_act": "gelu"}, ["hidden_act=gelu"]),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx=True"]),
        ("gpt2", {"scale_attn_weights": False}, ["scale_attn_weights=False"]),
        ("gpt2", {"add_cross_attention": True}, ["add_cross_attention=True"]),
        ("gpt2", {"activation_function": "silu"}, ["activation silu"]),
        ("llama", {"mlp_bias": True}, ["mlp_bias=True"]),
        ("llama", {"attention_bias": True}, ["mlp_bias=False"]),
        ("llama", {"hidden_act": "relu"}, ["hidden_act=relu"]),
        ("nanochat", {"hidden_act": "silu"}, ["activation silu"]),
        ("nanochat", {"attention_bias": True}, ["attention_bias=True"]),
    ],
)
def test_what_is_not_covered_is_named(refused, case, changes, words):
    theirs(case)
    config = json.loads(Path("theirs/config.json").read_text()) | changes
    Path("theirs/config.json").write_text(json.dumps(config))
    for read in (read_config, load_model):
        with refused(ValueError, "theirs", *words, *FAMILIES):
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
def test_a_config_that_lacks_something(refused, case, key):
    theirs(case)
    config = json.loads(Path("theirs/config.json").read_text())
    del config[key]
    Path("theirs/config.json").write_text(json.dumps(config))
    with refused(ValueError, "theirs: config.json", case, f"lacks {key}"):
        read_config("theirs")


@pytest.mark.parametrize("case", ["ours", "gpt2", "llama"])
def test_a_weight_that_is_missing_is_not_drawn_at_random(refused, case):
    if case == "ours":
        saved(gpt(), "theirs")
    else:
        theirs(case)
    weights = load_file("theirs/model.safetensors")
    gone = [name for name in weights if ".1.mlp" in name][0]
    save_file(
        {name: tensor for name, tensor in weights.items() if name != gone}, "theirs/model.safetensors", {"format": "pt"}
    )
    with refused(ValueError, "theirs", gone):
        load_model("theirs")


@pytest.mark.parametrize("content", ["hostile", "junk"])
def test_weights_that_are_no_weights(capsys, content):
    theirs("gpt2")
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


def test_a_tokenizer_with_more_symbols_than_the_model(capsys):
    saved(gpt(vocab_size=40), "ours")
    assert main(["export", "ours", "--to", "theirs"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "ours" in line and str(N) in line and "40" in line


# ---- which form


@pytest.mark.parametrize(
    ("switches", "form", "obstacles"),
    [
        ({"position": "rotary"}, "gpt2", ["position=rotary"]),
        ({"norm": "rmsnorm"}, "gpt2", ["norm=rmsnorm"]),
        ({"activation": "swiglu"}, "gpt2", ["activation=swiglu"]),
        ({"qk_norm": True}, "gpt2", ["qk_norm=True"]),
        ({"embd_norm": True}, "gpt2", ["embd_norm=True"]),
        ({"logit_softcap": 15.0}, "gpt2", ["logit_softcap=15.0"]),
        ({"n_kv_head": 2}, "gpt2", ["n_kv_head=2"]),
        ({"head_dim": 12}, "gpt2", ["head_dim=12"]),
        ({"n_kv_head": 1, "logit_softcap": 15.0}, "gpt2", ["n_kv_head=1", "logit_softcap=15.0"]),
        ({**LLAMA, "position": "learned"}, "llama", ["position=learned"]),
        ({**LLAMA, "norm": "layernorm"}, "llama", ["norm=layernorm"]),
        ({**LLAMA, "logit_softcap": 30.0, "n_kv_head": 2}, "llama", ["logit_softcap=30.0"]),
        ({**LLAMA, "embd_norm": True}, "llama", ["embd_norm=True"]),
        ({**LLAMA, "activation": "gelu"}, "llama", ["activation=gelu"]),
        ({**QWEN3, "bias": True}, None, None),  # Llama without qk_norm or Qwen3 without biases are as near
        ({**QWEN3, "logit_softcap": 15.0}, "qwen3", ["logit_softcap=15.0"]),
        ({**NANOCHAT, "norm_weight": True}, "nanochat", ["norm_weight=True"]),
        ({**NANOCHAT, "embd_norm": False}, None, None),  # nanochat or, but for relu2, Qwen3
        ({**NANOCHAT, "bias": True}, "nanochat", ["bias=True"]),
    ],
)
def test_what_has_no_nearest_architecture(refused, ids, switches, form, obstacles):
    """The switches in the way are named, and no others; form=custom takes them all."""
    model = gpt(**switches)
    saved(model, "ours")
    nearest, found = nearest_architecture(read_config("ours"))
    assert (nearest, set(found)) == (form, set(obstacles)) if form else len(found) == 1
    with refused(
        ValueError,
        "ours: no stock model is the same",
        ARCHITECTURES[nearest].model_class,
        *found,
        "form=custom",
        "trust_remote_code=True",
    ):
        export("ours", "theirs", "stock")
    assert not Path("theirs").exists()
    assert main(["export", "ours", "--to", "custom", "form=custom"]) == 0
    copy = AutoModelForCausalLM.from_pretrained("custom", trust_remote_code=True)
    assert torch.equal(logits(copy, ids), logits(model, ids)) and Path("custom/model.py").is_file()
    assert "trust_remote_code=True" in Path("custom/README.md").read_text()


def test_a_default_gpt2_has_a_nearest_architecture():
    config = GPTConfig().to_dict()
    assert nearest_architecture(config) == ("gpt2", [])
    for key, value in (("bias", True), ("n_inner", 100), ("norm_eps", 1e-6), ("tie_word_embeddings", False)):
        assert nearest_architecture(config | {key: value}) == ("gpt2", [])


# ---- nanoGPT's checkpoints

NANOGPT = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": T_MAX, "vocab_size": N - 1, "dropout": 0.1}


def nanogpt(bias=True):
    """The state dict of a nanoGPT model: the head is the embedding, and both have their name in it."""
    generator = torch.Generator().manual_seed(6)
    C, weights = 32, {}

    def add(name, *shape):
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) * 0.3 + (len(shape) == 1)
        if bias and not name.endswith(("wte", "wpe")):
            weights[f"{name}.bias"] = torch.randn(shape[:1], generator=generator) * 0.3

    add("transformer.wte", N - 1, C)
    add("transformer.wpe", T_MAX, C)
    for i in range(2):
        h = f"transformer.h.{i}"
        for name, shape in (
            ("ln_1", [C]),
            ("attn.c_attn", [3 * C, C]),
            ("attn.c_proj", [C, C]),
            ("ln_2", [C]),
            ("mlp.c_fc", [4 * C, C]),
            ("mlp.c_proj", [C, 4 * C]),
        ):
            add(f"{h}.{name}", *shape)
    add("transformer.ln_f", C)
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights


def nanogpt_logits(w, ids, gelu=F.gelu):
    """The forward of nanoGPT's model.py."""

    def norm(x, name):
        return F.layer_norm(x, (32,), w[f"{name}.weight"], w.get(f"{name}.bias"), 1e-5)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    T = ids.shape[1]
    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][:T]
    for i in range(2):
        h = f"transformer.h.{i}"
        q, k, v = (
            y.view(-1, T, 4, 8).transpose(1, 2)
            for y in linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").split(32, dim=2)
        )
        att = (q @ k.transpose(-2, -1) / 8**0.5).masked_fill(torch.ones(T, T).tril() == 0, -torch.inf).softmax(-1)
        x = x + linear((att @ v).transpose(1, 2).reshape(-1, T, 32), f"{h}.attn.c_proj")
        x = x + linear(gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")), f"{h}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


def write_ckpt(path, weights, **model_args):
    """What nanoGPT's train.py saves."""
    some = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(some.parameters())
    some(torch.ones(2)).sum().backward()
    optimizer.step()
    torch.save(
        {
            "model": weights,
            "optimizer": optimizer.state_dict(),
            "model_args": NANOGPT | model_args,
            "iter_num": 2000,
            "best_val_loss": torch.tensor(1.4697),
            "config": {"dataset": "shakespeare_char", "batch_size": 12, "compile": True, "device": "cpu"},
        },
        path,
    )


def write_meta(path, characters=CHARS):
    stoi = {c: i for i, c in enumerate(characters)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps({"vocab_size": len(stoi), "stoi": stoi, "itos": {i: c for c, i in stoi.items()}}))
    return path


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("version", ["plain", "compiled", "ddp and compiled", "old", "half"])
def test_read_nanogpt(ids, bias, version):
    weights = nanogpt(bias)
    kept, prefix, args = weights, "", {"bias": bias}
    if version == "old":  # the causal mask was in the state dict before flash attention
        mask = torch.ones(T_MAX, T_MAX).tril().view(1, 1, T_MAX, T_MAX)
        kept = weights | {f"transformer.h.{i}.attn.bias": mask for i in range(2)}
        args = args if not bias else {}  # and there was no such option
    elif version == "half":
        kept = {name: tensor.half() for name, tensor in weights.items()}
        weights = {name: tensor.float() for name, tensor in kept.items()}
    elif version != "plain":
        prefix = "_orig_mod." if version == "compiled" else "module._orig_mod."
    write_ckpt("ckpt.pt", {prefix + name: tensor for name, tensor in kept.items()}, **args)
    model, info = read_nanogpt("ckpt.pt")
    ids = ids.clamp(max=N - 2)
    assert type(model) is GPT and not model.training and model.config.bias is bias and model.config.dropout == 0.1
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    close(logits(model, ids), nanogpt_logits(weights, ids))
    assert info["iter_num"] == 2000 and info["config"]["dataset"] == "shakespeare_char"
    assert float(info["best_val_loss"]) == pytest.approx(1.4697)


def test_read_nanogpt_of_the_tanh_days(ids):
    write_ckpt("ckpt.pt", nanogpt(), bias=True)
    meta = write_meta(Path("meta.pkl"))
    ids = ids.clamp(max=N - 2)
    wanted = nanogpt_logits(nanogpt(), ids, gelu=lambda x: F.gelu(x, approximate="tanh"))
    assert (wanted - nanogpt_logits(nanogpt(), ids)).abs().max() > 1e-4
    close(logits(read_nanogpt("ckpt.pt", "gelu_new")[0], ids), wanted)
    assert main(["import", "ckpt.pt", "--to=imported", f"tokenizer={meta}", "activation=gelu_new"]) == 0
    close(logits(AutoModelForCausalLM.from_pretrained("imported"), ids), wanted)


@pytest.mark.parametrize("bias", [True, False])
def test_import_writes_a_model_folder(capsys, ids, bias):
    weights, ids = nanogpt(bias), ids.clamp(max=N - 2)
    write_meta(Path("data/shakespeare_char/meta.pkl"))
    Path("out").mkdir()
    write_ckpt("out/ckpt.pt", weights, bias=bias)
    assert main(["import", "out/ckpt.pt", "--to", "imported"]) == 0
    out = capsys.readouterr().out
    count = sum(tensor.numel() for name, tensor in weights.items() if name != "lm_head.weight")
    assert all(word in out for word in (f"{count:,} parameters", "char tokens", "2000 steps", "1.4697"))
    wanted = nanogpt_logits(weights, ids)
    close(logits(AutoModelForCausalLM.from_pretrained("imported"), ids), wanted)
    assert Tokenizer.load("imported").encode("To be").tolist() == [CHARS.index(c) for c in "To be"]
    assert main(["sample", "imported", "prompt=To be", "num_samples=1", "max_new_tokens=5", "temperature=0"]) == 0
    text = capsys.readouterr().out
    prompt = [CHARS.index(c) for c in "To be"]
    for _ in range(5):
        prompt.append(nanogpt_logits(weights, torch.tensor([prompt]))[0, -1].argmax().item())
    assert text == "".join(CHARS[i] for i in prompt) + "\n---------------\n"
    # and on to the stock form, without a symbol of ours in between
    assert main(["export", "imported", "--to", "stock"]) == 0
    close(logits(GPT2LMHeadModel.from_pretrained("stock").eval(), ids), wanted)


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("place", ["config", "model", "whole"])
def test_a_hostile_checkpoint_does_nothing(capsys, form, place):
    content = {"model": nanogpt(), "model_args": NANOGPT, "config": {}}
    content = Evil() if place == "whole" else content | {place: {"x": Evil()}}
    if form == "bare":
        Path("ckpt.pt").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, "ckpt.pt", _use_new_zipfile_serialization=form == "zip")
    assert main(["import", "ckpt.pt", "--to", "imported"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ckpt.pt: ") and ("refused" in line) == (form == "zip")
    assert not Path("hacked").exists() and not Path("imported").exists()
    # a reader that executes pickles would have run it
    if form == "bare":
        pickle.loads(Path("ckpt.pt").read_bytes())
    else:
        torch.load("ckpt.pt", weights_only=False)
    assert Path("hacked").exists()


def without(name):
    return {key: tensor for key, tensor in nanogpt().items() if key != name}


def truncated(length):
    write_ckpt("ckpt.pt", nanogpt())
    os.truncate("ckpt.pt", length)


FIT = "its weights do not fit its model_args"
NO_CKPT = "not a checkpoint of nanoGPT's train.py"


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda: Path("ckpt.pt").write_text("no checkpoint"), "not a file that torch.save wrote"),
        (lambda: Path("ckpt.pt").write_bytes(b""), "not a file that torch.save wrote"),
        (lambda: truncated(100), "not a file that torch.save wrote"),
        *(
            (
                lambda config=config: torch.save(
                    {"model": nanogpt(), "model_args": NANOGPT, "config": config}, "ckpt.pt"
                ),
                "ckpt.pt: a vocabulary of 63 symbols",
            )
            for config in ("x", {"dataset": 3})
        ),
        (lambda: truncated(20_000), "not a file that torch.save wrote"),
        (lambda: torch.save({"model_state": {}}, "ckpt.pt"), NO_CKPT),
        (lambda: torch.save(nanogpt(), "ckpt.pt"), NO_CKPT),
        (lambda: torch.save(torch.zeros(3), "ckpt.pt"), NO_CKPT),
        (lambda: torch.save([1, 2], "ckpt.pt"), NO_CKPT),
        (lambda: write_ckpt("ckpt.pt", nanogpt(), n_layer=3), FIT),
        (lambda: write_ckpt("ckpt.pt", nanogpt(), n_layer=1), FIT),
        (lambda: write_ckpt("ckpt.pt", nanogpt(), block_size=2 * T_MAX), FIT),
        (lambda: write_ckpt("ckpt.pt", nanogpt(), n_head=5), FIT),
        (lambda: write_ckpt("ckpt.pt", nanogpt(), n_embd="wide"), FIT),
        (lambda: write_ckpt("ckpt.pt", nanogpt(), bias=False), FIT),
        (lambda: write_ckpt("ckpt.pt", nanogpt(bias=False), bias=True), FIT),
        (lambda: write_ckpt("ckpt.pt", without("transformer.ln_f.weight")), FIT),
        (lambda: write_ckpt("ckpt.pt", without("transformer.wte.weight")), FIT),
        (lambda: write_ckpt("ckpt.pt", {}), FIT),
        (lambda: write_ckpt("ckpt.pt", [1, 2]), FIT),
        (lambda: write_ckpt("ckpt.pt", nanogpt() | {"transformer.wte.weight": 3}), FIT),
        (lambda: torch.save({"model": nanogpt(), "model_args": "small"}, "ckpt.pt"), FIT),
    ],
)
def test_what_is_no_nanogpt_checkpoint(capsys, write, words):
    write()
    assert main(["import", "ckpt.pt", "--to", "imported"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ckpt.pt: ") and words in line and len(line) < 400
    assert not Path("imported").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["which checkpoint?", "where to?"]),
        (["nowhere.pt", "to=x"], ["nowhere.pt: no such file"]),
        (["full", "to=x"], ["full: no such file"]),
        (["ckpt.pt", "to=full"], ["to=full: holds something already"]),
        (["ckpt.pt", "to=ckpt.pt"], ["to=ckpt.pt: ckpt.pt is a file"]),
        (["ckpt.pt", "to=x", "activation=relu"], ["activation=relu: must be 'gelu' or 'gelu_new'"]),
        (["ckpt.pt", "to=x", "tokeniser=gpt2"], ["unknown key tokeniser (did you mean tokenizer?)"]),
    ],
)
def test_import_asked_wrongly(capsys, argv, words):
    Path("full").mkdir()
    Path("full/file").touch()
    Path("ckpt.pt").touch()
    assert main(["import", *argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines, strict=True))
    assert not Path("x").exists() and os.listdir("full") == ["file"]


# ---- which tokenizer


def test_the_tokenizer_beside_the_checkpoint_or_the_one_that_is_given(refused):
    Path("out").mkdir()
    ckpt = Path("out/ckpt.pt")
    with refused(
        ValueError, "out/ckpt.pt", "vocabulary of 64 symbols", "data/shakespeare_char/meta.pkl", "tokenizer=PATH"
    ):
        find_tokenizer("auto", ckpt, "shakespeare_char", 64)
    write_meta(Path("data/shakespeare_char/meta.pkl"), "cab")
    assert find_tokenizer("auto", ckpt, "shakespeare_char", 64).encode("abc").tolist() == [1, 2, 0]
    other = write_meta(Path("elsewhere/meta.pkl"), "bac")
    assert find_tokenizer(str(other), ckpt, "shakespeare_char", 64).encode("abc").tolist() == [1, 0, 2]
    Tokenizer.char(["abc"]).save("elsewhere")
    assert find_tokenizer("elsewhere", ckpt, "shakespeare_char", 3).encode("cab").tolist() == [2, 0, 1]
    for asked in (str(other), "elsewhere"):
        with refused(ValueError, f"tokenizer={asked}: 3 symbols", "2 of out/ckpt.pt", "another model"):
            find_tokenizer(asked, ckpt, "", 2)
    with refused(ValueError, "tokenizer=no/meta.pkl: no such file"):
        find_tokenizer("no/meta.pkl", ckpt, "", 64)
    with refused(FileNotFoundError, "out/tokenizer.json"):
        find_tokenizer("out", ckpt, "", 64)
    Path("evil.pkl").write_bytes(pickle.dumps({"stoi": Evil()}))
    with refused(ValueError, "evil.pkl"):
        find_tokenizer("evil.pkl", ckpt, "", 64)
    assert not Path("hacked").exists()


@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_gpt2s_tokenizer_is_known_by_its_size(gpt2_files, refused, vocab_size):
    assert find_tokenizer("auto", Path("out/ckpt.pt"), "openwebtext", vocab_size).kind == "gpt2"
    with refused(ValueError, "tokenizer=gpt2: 50,257 symbols, more than the 64"):
        find_tokenizer("gpt2", Path("out/ckpt.pt"), "openwebtext", 64)


# ---- a folder is whole or not there


@pytest.mark.parametrize("form", ["stock", "custom"])
@pytest.mark.parametrize("existed", [True, False])
def test_a_model_that_was_written_wrong_is_not_kept(monkeypatch, form, existed):
    saved(gpt(), "ours")
    if existed:
        Path("theirs").mkdir()
    save = Tokenizer.save

    def save_and_spoil(tokenizer, folder, max_length):
        save(tokenizer, folder, max_length)
        weights = load_file(f"{folder}/model.safetensors")
        weights["transformer.ln_f.weight"][0] += 1e-3
        save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})

    monkeypatch.setattr(Tokenizer, "save", save_and_spoil)
    with pytest.raises(RuntimeError, match="theirs: the model as written differs from its source"):
        export("ours", "theirs", form)
    assert sorted(os.listdir()) == ["ours", "theirs"][: 1 + existed]
    assert not existed or os.listdir("theirs") == []


def test_export_into_the_folder_that_one_is_in(monkeypatch, tmp_path):
    saved(gpt(), "ours")
    Path("here").mkdir()
    monkeypatch.chdir("here")
    assert main(["export", "../ours", "--to", "."]) == 0
    assert (tmp_path / "here" / "model.safetensors").is_file()


def test_a_model_of_nan_is_not_kept(refused):
    model = gpt()
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = torch.nan
    saved(model, "ours")
    with refused(ValueError, "theirs: nothing was written", "nan"):
        export("ours", "theirs", "stock")
    assert os.listdir() == ["ours"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_what_was_interrupted(monkeypatch, refused, error):
    saved(gpt(), "ours")

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(Tokenizer, "save", fail)
    if isinstance(error, OSError):
        with refused(OSError, "theirs: cannot be written", "No space left"):
            export("ours", "theirs", "stock")
    else:
        with pytest.raises(KeyboardInterrupt):
            export("ours", "theirs", "stock")
    assert os.listdir() == ["ours"]


def test_export_into_an_empty_folder_or_a_deep_one():
    saved(gpt(), "ours")
    Path("empty").mkdir()
    for to in ("empty", "deep/er/theirs"):
        assert main(["export", "ours", "--to", to]) == 0
        assert sorted(os.listdir(to)) == [
            "README.md",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    assert os.listdir("deep/er") == ["theirs"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["which model?", "where to?"]),
        (["ours"], ["where to?"]),
        (["ours", "to=full"], ["to=full: holds something already"]),
        (["ours", "to=ours"], ["to=ours: holds something already"]),
        (["ours", "to=full/file"], ["to=full/file: full/file is a file"]),
        (["ours", "to=x", "form=llama"], ["form=llama: must be 'stock' or 'custom'"]),
        (["nowhere/", "to=x"], ["nowhere/"]),
        (["full", "to=x"], ["full: neither a run nor a model folder"]),
    ],
)
def test_export_asked_wrongly(capsys, argv, words):
    saved(gpt(), "ours")
    Path("full").mkdir()
    Path("full/file").touch()
    assert main(["export", *argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines, strict=True))
    assert not Path("x").exists() and os.listdir("full") == ["file"]


# ---- elsewhere

PIPELINES = (
    WITHOUT_THE_PACKAGE
    + """
import json
from transformers import pipeline

json.dump({folder: pipeline("text-generation", model=folder)("To be", max_new_tokens=20, do_sample=False)[0]
           for folder in sys.argv[1:]}, open("texts.json", "w"))
"""
)


def test_transformers_pipeline_writes_what_sample_writes(capsys):
    wanted = {}
    for form, case, vocab in (
        ("gpt2", "gpt2 without biases", "cut"),
        ("llama", "llama with biases", "keep"),
        ("qwen3", "qwen3", "cut"),
        ("nanochat", "nanochat", "keep"),
    ):
        saved(gpt(**STOCK[case][0], eos_token_id=None), f"{form}-ours")
        assert main(["export", f"{form}-ours", f"to={form}", f"vocab={vocab}"]) == 0
        capsys.readouterr()
        assert (
            main(["sample", f"{form}-ours", "prompt=To be", "temperature=0", "max_new_tokens=20", "num_samples=1"]) == 0
        )
        wanted[form] = {"generated_text": capsys.readouterr().out.removesuffix("\n---------------\n")}
        assert len(set(wanted[form]["generated_text"])) > 6
    Path("script.py").write_text(PIPELINES)
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, "script.py", *wanted], env=env, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("texts.json").read_text()) == wanted


# ---- places and numbers that others stumbled over


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("run/checkpoint-000999", "lies in the run"),
        ("run/checkpoint-000002/copy", "lies in the run"),
        ("run/x/y", "lies in the run"),
        ("dangling", "a link to nothing"),
    ],
)
def test_an_export_is_no_part_of_a_run(capsys, to, words):
    """A run takes such a folder for its own checkpoint, and prunes it."""
    Path("run").mkdir()
    Path("run/run.yaml").touch()
    Path("dangling").symlink_to("nowhere")
    saved(gpt(), "ours")
    assert main(["export", "ours", f"to={to}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"to={to}" in line and words in line
    assert os.listdir("run") == ["run.yaml"]


def test_a_home_folder_is_meant(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    saved(gpt(), "ours")
    assert main(["export", "ours", "to=~/out"]) == 0
    assert (tmp_path / "home" / "out" / "config.json").is_file() and not Path("~").exists()


@pytest.mark.parametrize("form", ["stock", "custom"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_on_request(form, dtype, ids):
    model = gpt()
    saved(model, "ours")
    assert main(["export", "ours", "to=out", f"dtype={dtype}", f"form={form}"]) == 0
    written = load_file("out/model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {getattr(torch, dtype)}
    assert json.loads(Path("out/config.json").read_text())["dtype"] == dtype
    rounded = logits(model.to(getattr(torch, dtype)).float(), ids)[..., :N]
    loaded = AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32).eval()
    close(logits(loaded, ids)[..., :N], rounded)


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
def test_a_config_that_is_no_shape(capsys, field, value):
    saved(gpt(), "ours")
    config = json.loads(Path("ours/config.json").read_text())
    Path("ours/config.json").write_text(json.dumps(config | {field: value, "head_dim": None}))
    assert main(["export", "ours", "to=out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ours: ") and not Path("out").exists()


@pytest.mark.parametrize("content", ["[]", '{"eos_token": {"a": 1}}', '{"eos_token": ["a"]}', '{"eos_token": 3}'])
def test_an_odd_tokenizer_config_does_not_matter(content):
    saved(gpt(), "ours")
    Path("ours/tokenizer_config.json").write_text(content)
    Path("ours/README.md").write_bytes(b"caf\xe9")
    assert main(["export", "ours", "to=out"]) == 0


def test_what_a_ckpt_says_cannot_hold_us_up(capsys, refused):
    write_ckpt("ckpt.pt", nanogpt(), n_layer=10**7)
    assert main(["import", "ckpt.pt", "to=out"]) == 2
    assert "n_layer=10000000" in capsys.readouterr().err
    with refused(ValueError, "vocabulary of 64 symbols"):
        find_tokenizer("auto", Path("/ckpt.pt"), "x" * 5000, 64)


def test_nanogpts_own_folder_is_told_the_way(capsys):
    Path("out").mkdir()
    write_ckpt("out/ckpt.pt", nanogpt())
    for argv in (
        ["sample", "out/ckpt.pt"],
        ["sample", "out"],
        ["export", "out", "to=x"],
        ["evaluate", "out", "corpus=python"],
    ):
        assert main(argv) == 2
        assert "nanogpt-accel import out/ckpt.pt --to FOLDER" in capsys.readouterr().err
