"""model.py: what libraries read from GPT besides calling it, such as signatures, class names and config fields."""

import copy
import dataclasses
import inspect
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, config_of
from shared import WITHOUT_THE_PACKAGE
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    StaticCache,
    Trainer,
    TrainingArguments,
)

from nanogpt_accel.model import AUTO_CLASSES, DERIVED_SIZES, GPT, GPTConfig, GPTModel

each_family = pytest.mark.parametrize("family", FAMILIES)
T = 12


def tiny(family, **changes):
    torch.manual_seed(1)
    return GPT(config_of(family, **{"vocab_size": 65, "n_layer": 2, "initializer_range": 0.2, **changes})).eval()


@pytest.fixture
def ids():
    return torch.randint(0, 65, (2, T), generator=torch.Generator().manual_seed(2))


def shapes(config):
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}


# ---- signatures and class names


def test_labels_is_the_only_parameter_with_label_in_its_name():
    """Trainer expects a column in the dataset for every such parameter, and reports no eval_loss if one is missing."""
    for model_class in set(AUTO_CLASSES.values()) - {GPTConfig}:
        names = [name for name in inspect.signature(model_class.forward).parameters if "label" in name]
        assert names == ([] if model_class is GPTModel else ["labels"]), model_class


def test_trainer_evaluates_and_smooths_labels(tmp_path, ids):
    """The losses are those of torch's cross-entropy with the labels shifted by one."""
    model = tiny("gpt2")
    rows = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    logits, targets = model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    for smoothing in (0.0, 1e-9, 0.1):
        args = TrainingArguments(tmp_path, label_smoothing_factor=smoothing, use_cpu=True, report_to=[])
        loss = Trainer(model, args, eval_dataset=rows).evaluate()["eval_loss"]
        assert loss == pytest.approx(F.cross_entropy(logits, targets, label_smoothing=smoothing).item(), abs=1e-6)


def test_trainer_divides_by_the_number_of_targets(tmp_path, ids):
    """Trainer counts the targets itself. Its first training loss must be that of the untrained model."""
    model = tiny("gpt2")
    expected = model(ids, labels=ids).loss.item()
    args = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "max_steps": 1, "logging_steps": 1}
    args = TrainingArguments(tmp_path, **args, use_cpu=True, report_to=[], save_strategy="no")
    trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in ids.tolist()])
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-4)  # Trainer rounds to 4 digits


# ---- config fields


@each_family
def test_derived_sizes_are_not_stored(family, tmp_path):
    config = config_of(family)
    given = {key: value for key, value in FAMILIES[family].items() if key in DERIVED_SIZES}
    GPT(config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for stored in (config.to_dict(), written, vars(config)):
        assert {key: stored[key] for key in DERIVED_SIZES if stored.get(key) is not None} == given
    # a field that may be added later: None stays None in config.json
    unset = {field.name for field in dataclasses.fields(GPTConfig) if field.default is None} - set(FAMILIES[family])
    assert [key for key in unset & set(GPTConfig.__annotations__) if written.get(key) is not None] == []


@each_family
def test_derived_sizes_follow_every_way_to_change_a_config(family, tmp_path):
    changed = {"n_embd": 64, "n_head": 2}
    expected = shapes(config_of(family, **changed))
    assigned = config_of(family)
    assigned.n_embd, assigned.n_head = 64, 2
    updated = config_of(family)
    updated.update_from_string("n_embd=64,n_head=2")
    config_of(family).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path, **changed)
    renamed = AutoConfig.from_pretrained(tmp_path, hidden_size=64, num_attention_heads=2)
    for config in (assigned, updated, loaded, renamed):
        assert shapes(config) == expected
        assert (config.hidden_size, config.num_attention_heads) == (64, 2)
        assert config.intermediate_size == config.n_inner and config.num_key_value_heads == config.n_kv_head


def test_given_sizes_can_be_changed(tmp_path):
    config_of("qwen3").save_pretrained(tmp_path)
    for key in ("n_kv_head", "num_key_value_heads"):
        assert AutoConfig.from_pretrained(tmp_path, **{key: 1}).n_kv_head == 1


@each_family
def test_copies_of_a_config_are_equal(family):
    config = config_of(family)
    copies = copy.deepcopy(config), pickle.loads(pickle.dumps(config)), GPTConfig(**config.to_dict())
    for same in (*copies, GPTConfig.from_dict(config.to_dict())):
        assert same.to_dict() == config.to_dict() and same.resolved() == config.resolved()


def test_inconsistent_change_is_refused_when_the_model_is_built(refused):
    config = config_of("gpt2")
    config.n_head = 3
    with refused(ValueError, "n_embd=128", "n_head=3"):
        GPT(config)


def test_shared_heads_are_in_the_dictionary_that_peft_reads():
    assert config_of("qwen3").to_dict()["num_key_value_heads"] == 2
    assert "num_key_value_heads" not in config_of("gpt2").to_dict()


# ---- the body and the classifiers


@each_family
def test_auto_model_loads_the_body(family, ids, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is GPTModel and model.base_model is model.transformer
    hidden = model(ids, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(body(ids).last_hidden_state, hidden)


@each_family
def test_classifiers_use_the_weights_of_the_body(family, ids, tmp_path):
    """With right padding, the logits of a sequence are the scores of its last token."""
    model = tiny(family, pad_token_id=64)
    model.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    padded = ids.clone()
    padded[:, 7:] = 64
    padded[:, :7] = padded[:, :7].clamp(max=63)
    hidden = model.transformer(padded[:, :7]).last_hidden_state[:, -1]
    torch.testing.assert_close(classifier(padded).logits, classifier.score(hidden), rtol=0, atol=1e-5)
    tagger = AutoModelForTokenClassification.from_pretrained(tmp_path, num_labels=4).eval()
    assert torch.equal(tagger(ids).logits, tagger.score(model.transformer(ids).last_hidden_state))


# ---- caches


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])  # learned and rotary positions
def test_static_cache_gives_the_same_logits_without_a_graph_break(family, ids):
    """fullgraph=True raises an error if the model reads a tensor, such as the length of a static cache."""
    model = tiny(family, n_layer=1)
    expected = model(ids).logits
    cache = StaticCache(config=model.config, max_cache_len=T)
    torch._dynamo.reset()  # torch limits how often it compiles one function
    forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        logits = [forward(ids[:, :5], cache=cache).logits, forward(ids[:, 5:], cache=cache).logits]
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=1e-5)


# ---- models in one process


def test_each_model_folder_runs_its_own_code(tmp_path):
    """Load two folders with different copies of model.py in one process, which cannot import the package."""
    for name in ("first", "second"):
        GPT(config_of("gpt2", n_layer=1)).save_pretrained(tmp_path / name)
        with open(tmp_path / name / "model.py", "a") as file:
            file.write(f'\nGPT.origin = "{name}"\n')
    code = """
from transformers import AutoModelForCausalLM
models = [AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True) for name in ("first", "second")]
assert [model.origin for model in models] == ["first", "second"]
"""
    (tmp_path / "script.py").write_text(WITHOUT_THE_PACKAGE + code)
    env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


# ---- inputs


def test_positions_that_start_again_may_be_longer_than_block_size():
    """Packed documents give the same logits as each document alone. DataCollatorWithFlattening of Trainer packs in this
    way."""
    model = tiny("gpt2", block_size=16)
    ids = torch.randint(0, 65, (1, 24), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(12).repeat(2).unsqueeze(0)
    logits = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits[:, 12:], model(ids[:, 12:]).logits, rtol=0, atol=1e-5)


def test_left_padding_does_not_count_for_block_size():
    model = tiny("gpt2", block_size=16)
    ids = torch.randint(0, 64, (1, 4), generator=torch.Generator().manual_seed(3))
    padded, mask = F.pad(ids, (14, 0), value=64), F.pad(torch.ones_like(ids), (14, 0))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 64}
    alone = model.generate(ids, **options)[:, 4:]
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 18:], alone)


def test_generating_more_than_block_size_is_refused_with_the_fix(refused, ids):
    with refused(ValueError, "block_size=16", "set max_new_tokens"):
        tiny("gpt2", block_size=16).generate(ids, max_new_tokens=8)


@each_family
def test_fewer_layers_can_be_used(family, ids):
    """Self-speculative decoding of transformers lowers the number of layers in the config."""
    model, shallow = tiny(family), tiny(family)
    shallow.transformer.h = shallow.transformer.h[:1]
    model.config.num_hidden_layers = 1
    assert torch.equal(model(ids, use_cache=False).logits, shallow(ids, use_cache=False).logits)


def test_exactly_one_kind_of_input_is_required(refused, ids):
    model = tiny("gpt2")
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": model.transformer.wte(ids)}):
        with refused(ValueError, "exactly one of input_ids and inputs_embeds"):
            model(**inputs)


def test_an_edited_dictionary_of_a_config_is_used():
    fields = config_of("llama").to_dict()
    for n_kv_head in (1, 4):
        assert GPTConfig(**fields | {"n_kv_head": n_kv_head}).num_key_value_heads == n_kv_head


@pytest.mark.parametrize("key", ["vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_inner", "n_kv_head"])
def test_sizes_below_one_are_refused(key):
    with pytest.raises(Exception, match=f"{key}=0"):
        config_of("gpt2", **{key: 0})
