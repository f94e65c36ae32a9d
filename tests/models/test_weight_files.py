"""Damaged and hostile weight files, and which of the files in a folder are loaded."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_models import assert_close, gpt, logits, save_model, save_stock
from transformers import AutoModelForCausalLM

from nanogpt_accel.checkpoint.verify import find_file_corruption
from nanogpt_accel.models.find import find_model
from nanogpt_accel.models.load import load_model

MODEL, INDEX, BIN = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"


def make_model(case="gpt2"):
    """Save a model to the folder `theirs`. Return it and its weights."""
    model = gpt() if case == "ours" else save_stock(case)
    if case == "ours":
        save_model(model, "theirs")
    return model, load_file(f"theirs/{MODEL}")


def load(folder="theirs"):
    """Load a model as the commands do."""
    return load_model(find_model(folder))


def write_index(weight_map, name=INDEX):
    Path("theirs", name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change_config(**changes):
    config = json.loads(Path("theirs/config.json").read_text())
    Path("theirs/config.json").write_text(json.dumps(config | changes))


# ---- which files are loaded


def stale_index():
    write_index({"transformer.wte.weight": "model-00001-of-00002.safetensors"})


def stale_bin():
    Path("theirs", BIN).write_bytes(b"junk")


def damaged_other_file():
    Path("theirs/other.safetensors").write_bytes(b"junk")


def stale_bin_index():
    weights = load_file(f"theirs/{MODEL}")
    os.remove(f"theirs/{MODEL}")
    torch.save(weights, f"theirs/{BIN}")
    write_index({"transformer.wte.weight": "pytorch_model-00001-of-00002.bin"}, f"{BIN}.index.json")


def bin_next_to_index():
    weights = load_file(f"theirs/{MODEL}")
    os.rename(f"theirs/{MODEL}", "theirs/model-00001-of-00001.safetensors")
    write_index(dict.fromkeys(weights, "model-00001-of-00001.safetensors"))
    Path("theirs", BIN).write_bytes(b"junk")


def bin_of_torch_1_5():
    weights = load_file(f"theirs/{MODEL}")
    os.remove(f"theirs/{MODEL}")
    torch.save(weights, f"theirs/{BIN}", _use_new_zipfile_serialization=False)


OTHER_FILES = [stale_index, stale_bin, damaged_other_file, stale_bin_index, bin_next_to_index, bin_of_torch_1_5]


@pytest.mark.parametrize("add", OTHER_FILES, ids=lambda add: add.__name__)
def test_the_same_files_are_loaded_as_by_transformers(ids, add):
    model, _ = make_model()
    add()
    assert_close(logits(load(), ids), logits(AutoModelForCausalLM.from_pretrained("theirs"), ids))
    assert_close(logits(load(), ids), logits(model, ids))


@pytest.mark.parametrize("case", ["ours", "gpt2", "llama"])
@pytest.mark.parametrize(("prefix", "is_bin"), [("module.", True), ("module._orig_mod.", False)])
def test_the_prefixes_of_ddp_and_compile_are_removed(ids, case, prefix, is_bin):
    model, weights = make_model(case)
    weights = {prefix + name: tensor for name, tensor in weights.items()}
    if is_bin:
        os.remove(f"theirs/{MODEL}")
        torch.save(weights, f"theirs/{BIN}")
    else:
        save_file(weights, f"theirs/{MODEL}", {"format": "pt"})
    loaded = load()
    assert_close(logits(loaded, ids), logits(model, ids))
    loaded.save_pretrained("saved")
    assert load_file("saved/model.safetensors").keys() == {name for name, _ in loaded.named_parameters()}


def test_lm_eval_gets_no_weights_that_it_would_initialize_at_random(capsys, call, monkeypatch):
    _, weights = make_model()
    save_file({f"module.{name}": tensor for name, tensor in weights.items()}, f"theirs/{MODEL}", {"format": "pt"})
    for name in ("check_tasks", "load_tasks"):
        monkeypatch.setattr(f"nanogpt_accel.commands.evaluate.{name}", lambda *args: [])
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", SimpleNamespace(HFLM=pytest.fail))
    error = call("evaluate", "theirs", "tasks=hellaswag", status=2)
    assert "theirs: the names of the weights start with module." in error


@pytest.mark.parametrize("case", ["ours", "gpt2", "llama"])
def test_names_without_the_prefix_of_the_body_and_only_the_tied_head(ids, case):
    model, weights = make_model(case)
    head = {"wte.weight": "lm_head.weight"} if model.config.tie_word_embeddings else {}
    weights = {name.removeprefix(f"{model.base_model_prefix}."): tensor for name, tensor in weights.items()}
    save_file({head.get(name, name): tensor for name, tensor in weights.items()}, f"theirs/{MODEL}", {"format": "pt"})
    assert_close(logits(load(), ids), logits(model, ids))


# ---- damaged files

WEIGHT_MAPS = [
    [],
    ["transformer.wte.weight"],
    None,
    3,
    {},
    {"a": 3},
    {"a": ["x"]},
    {"a": "../theirs/model-1.safetensors"},
    {"a": "/etc/passwd"},
    {"a": "x\0y"},
    {"a": ""},
]


@pytest.mark.parametrize("index", [INDEX, f"{BIN}.index.json"])
def test_an_invalid_index_is_refused(refused, index):
    make_model()
    os.rename(f"theirs/{MODEL}", "theirs/model-1.safetensors")
    contents = [json.dumps({"metadata": {}, "weight_map": weight_map}) for weight_map in WEIGHT_MAPS]
    contents += ["[]", "{}", '{"weight_map": {"a": "model-1.safetensors"}}', "[" * 100_000, '{"a": ' * 100_000, ""]
    for content in contents:
        Path("theirs", index).write_text(content)
        with refused(ValueError, f"theirs: neither a run nor a model folder: {index} is corrupted"):
            load()


def test_a_missing_shard_is_named(refused):
    make_model()
    os.remove(f"theirs/{MODEL}")
    write_index({"a": "model-00001-of-00002.safetensors"})
    with refused(ValueError, "theirs", "model-00001-of-00002.safetensors is missing"):
        load()


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_truncated_bin_file_is_named(refused, is_zip):
    _, weights = make_model()
    os.remove(f"theirs/{MODEL}")
    torch.save(weights, f"theirs/{BIN}", _use_new_zipfile_serialization=is_zip)
    assert find_file_corruption(Path("theirs"), BIN) is None
    for size in (os.path.getsize(f"theirs/{BIN}") - 1, 5000, 100, 1, 0):
        os.truncate(f"theirs/{BIN}", size)
        with refused(ValueError, "theirs", BIN):
            load()


def test_a_bin_file_without_tensors_is_named(refused):
    make_model()
    os.remove(f"theirs/{MODEL}")
    for content in ([1, 2], {"model": {"a": torch.zeros(2)}}, {"a": 3}, torch.zeros(2), None):
        torch.save(content, f"theirs/{BIN}")
        with refused(ValueError, f"theirs/{BIN}: cannot be read", "dictionary of tensors"):
            load()


def test_unexpected_names_are_shown(refused):
    _, weights = make_model("ours")
    save_file({f"model.{name}": tensor for name, tensor in weights.items()}, f"theirs/{MODEL}", {"format": "pt"})
    words = "transformer.wte.weight is missing, but there is model.transformer."
    with refused(ValueError, f"theirs: {MODEL} does not match config.json: ", words):
        load()


# ---- sizes in config.json that do not match the files

HOSTILE = {  # without the check, most of these took more than 8 seconds
    "ours": ["n_embd", "n_layer", "vocab_size", "block_size", "n_inner", "head_dim"],
    "gpt2": ["n_embd", "n_layer", "vocab_size", "n_positions", "n_inner"],
    "llama": ["hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "head_dim"],
    "qwen3": ["num_hidden_layers", "num_key_value_heads"],
    "nanochat": ["hidden_size", "num_hidden_layers"],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_huge_size_is_refused_before_a_model_is_built(refused, monkeypatch, case):
    make_model(case)
    config = Path("theirs/config.json").read_text()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    for key in HOSTILE[case]:
        for value, words in ((10**6, "config.json"), (10**18, "is not an integer from 1 to"), (10**40, "is not")):
            Path("theirs/config.json").write_text(config)
            change_config(**{key: value})
            with refused(ValueError, "theirs: ", words):
                load()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("n_embd", 64, "the shape of transformer.wte.weight is (80, 32) instead of (80, 64)"),
        ("n_embd", 16, "the shape of transformer.wte.weight is (80, 32) instead of (80, 16)"),
        ("n_layer", 3, "transformer.h.2.ln_1.weight is missing"),
        ("n_layer", 1, "unexpected: transformer.h.1."),
        ("tie_word_embeddings", False, "lm_head.weight is missing"),
        ("bias", True, "transformer.h.0.ln_1.bias is missing"),
    ],
)
def test_the_difference_between_config_json_and_the_weights_is_named(refused, key, value, words):
    make_model("ours")
    change_config(**{key: value})
    with refused(ValueError, "theirs: ", words):
        load()


def test_keys_of_transformers_in_config_json_have_no_effect(ids):
    """For example, a large num_labels makes transformers create a dictionary of labels."""
    common = {"return_dict": False, "output_hidden_states": True, "id2label": {"0": "a"}, "dtype": "float16"}
    for case, more in (("ours", {}), ("llama", {"num_labels": 10**9, "attn_implementation": "nobody/code"})):
        model, _ = make_model(case)
        change_config(**common, **more)
        loaded = load()
        assert_close(logits(loaded, ids), logits(model, ids))
        assert loaded(ids, use_cache=False).keys() == {"logits"} and loaded.config.num_labels == 2


def test_a_setting_that_this_version_does_not_have_is_refused(refused, ids):
    """The model would compute something else than with the version that saved it."""
    model, _ = make_model("ours")
    change_config(value_residual=False, windows=None)  # these are off
    assert_close(logits(load(), ids), logits(model, ids))
    change_config(value_residual=True)
    with refused(ValueError, "theirs: config.json", "value_residual=True", "use the version that saved the model"):
        load()


@pytest.mark.parametrize(
    ("case", "key"), [("ours", "x"), ("ours", "n_embd"), ("llama", "rope_parameters"), ("gpt2", "x")]
)
def test_a_deeply_nested_config_json_is_refused(refused, case, key):
    make_model(case)
    config = json.loads(Path("theirs/config.json").read_text()) | {key: "HERE"}
    for depth in (980, 100_000, *([] if case == "gpt2" else [500, 900])):  # other keys of a stock model are ignored
        for left, right in (("[", "]"), ('{"a":', "}")):
            nested = json.dumps(config).replace('"HERE"', left * depth + "1" + right * depth)
            Path("theirs/config.json").write_text(nested)
            with refused(ValueError, "theirs: "):
                load()


def test_a_generation_config_that_cannot_be_saved_is_replaced(ids):
    model, _ = make_model("ours")
    for content in ('{"output_attentions": true}', '{"temperature": "x"}', "[", "[" * 100_000):
        Path("theirs/generation_config.json").write_text(content)
        loaded = load()
        loaded.save_pretrained("saved")
        assert_close(logits(loaded, ids), logits(model, ids))
