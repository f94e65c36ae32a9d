"""model.py: the GPT compared with GPT-2, Llama, Qwen3 and nanochat of transformers with the same weights, and its
behaviour as a Hugging Face model."""

import json
import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from shared import WITHOUT_THE_PACKAGE
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nanogpt_accel.model import GPT, GPTConfig

V, T_MAX = 65, 24
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def tiny(**changes):
    """A GPT with weights large enough that its attention is not uniform."""
    torch.manual_seed(1)
    shape = {"vocab_size": V, "block_size": T_MAX, "n_layer": 2, "n_head": 4, "n_embd": 32, "initializer_range": 0.2}
    return GPT(GPTConfig(**shape | changes)).eval()


def pair(bias, activation):
    """Return our GPT and GPT-2 of transformers, with the same random parameters."""
    torch.manual_seed(2)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V,
            n_positions=T_MAX,
            n_layer=2,
            n_head=4,
            n_embd=32,
            activation_function=activation,
            bos_token_id=0,
            eos_token_id=None,
        )
    ).eval()
    ours = tiny(bias=bias, activation=activation)
    weights = {}
    with torch.no_grad():
        for name, p in gpt2.named_parameters():
            p.normal_(std=0.05 if p.dim() == 1 else 0.3).add_(name.endswith("weight") and "ln_" in name)
            if name.endswith("bias") and not bias:
                p.zero_()
            else:
                weights[name] = p.t() if name.endswith(TRANSPOSED) else p  # the matrix of Conv1D is transposed
        assert sorted(weights) == sorted(name for name, _ in ours.named_parameters())
        for name, p in ours.named_parameters():
            p.copy_(weights[name])
    return ours, gpt2


STOCK = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "nanochat": (NanoChatConfig, NanoChatForCausalLM),
}
# an eps that changes the fifth digit, and a rope_theta other than the default
ROTARY = {"norm": "rmsnorm", "norm_eps": 3e-3, "position": "rotary", "rope_theta": 500.0}
NANOCHAT = {**ROTARY, "norm_weight": False, "embd_norm": True, "qk_norm": True, "activation": "relu2"}
MODERN = {
    "llama": ("llama", {**ROTARY, "activation": "swiglu", "n_inner": 88}),
    "llama with biases": ("llama", {**ROTARY, "activation": "swiglu", "bias": True, "tie_word_embeddings": False}),
    "llama with one kv head": (
        "llama",
        {**ROTARY, "activation": "swiglu", "n_kv_head": 1, "head_dim": 10, "n_inner": 48},
    ),
    "qwen3": (
        "qwen3",
        {
            **ROTARY,
            "activation": "swiglu",
            "qk_norm": True,
            "n_kv_head": 2,
            "head_dim": 12,
            "tie_word_embeddings": False,
        },
    ),
    "nanochat": ("nanochat", {**NANOCHAT, "n_kv_head": 2, "logit_softcap": 4.0, "tie_word_embeddings": False}),
    "nanochat without a cap": ("nanochat", NANOCHAT),
}


def translated(stock, of):
    """Return {name in GPT: of(parameter)} for the parameters of a transformers model, in GPT's layout.

    Args:
        of: returns the parameter itself, or something linear in it, such as its gradient.
    """
    config = stock.config
    names = {
        "model.embed_tokens": "wte",
        "model.norm": "ln_f",
        "input_layernorm": "ln_1",
        "self_attn.o_proj": "attn.c_proj",
        "post_attention_layernorm": "ln_2",
        "self_attn.q_norm": "attn.q_norm",
        "self_attn.k_norm": "attn.k_norm",
        "mlp.down_proj": "mlp.c_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    stacked = {
        "self_attn.q_proj": ("attn.c_attn", 0),
        "self_attn.k_proj": ("attn.c_attn", 1),
        "self_attn.v_proj": ("attn.c_attn", 2),
        "mlp.gate_proj": ("mlp.c_fc", 0),
        "mlp.up_proj": ("mlp.c_fc", 1),
    }
    whole, parts = {}, {}
    for name, p in stock.named_parameters():
        tensor, (module, kind) = of(p), name.rsplit(".", 1)
        _, _, layer, inner = module.split(".", 3) if ".layers." in module else (None, None, None, module)
        place = "transformer." + (f"h.{layer}." if layer else "")
        if config.model_type == "nanochat" and inner in ("self_attn.q_proj", "self_attn.k_proj"):
            # cos(-a) = cos(a), sin(-a) = -sin(a): rotating (x, y) by -a is rotating (x, -y) by a and negating y
            tensor = tensor.clone()
            for head in tensor.split(config.head_dim):
                head[config.head_dim // 2 :].neg_()
        if inner in stacked:
            ours, rank = stacked[inner]
            parts.setdefault(f"{place}{ours}.{kind}", {})[rank] = tensor
        else:
            whole[name if inner == "lm_head" else f"{place}{names[inner]}.{kind}"] = tensor
    return whole | {name: torch.cat([found[i] for i in sorted(found)]) for name, found in parts.items()}


def modern(case):
    """Return our GPT and a modern model of transformers, with the same random parameters."""
    form, switches = MODERN[case]
    ours = tiny(**switches)
    c = ours.config
    shape = {
        "vocab_size": V,
        "max_position_embeddings": T_MAX,
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.head_dim,
        "intermediate_size": c.n_inner,
        "rms_norm_eps": 3e-3,
        "tie_word_embeddings": c.tie_word_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if form == "llama":
        shape |= {"attention_bias": c.bias, "mlp_bias": c.bias}
    if form == "nanochat":
        shape["final_logit_softcapping"] = c.logit_softcap
    config_class, model_class = STOCK[form]
    torch.manual_seed(2)
    stock = model_class(config_class(**shape)).eval()
    with torch.no_grad():
        for name, p in stock.named_parameters():
            p.normal_(std=0.18).add_(name.endswith("norm.weight"))
        weights = translated(stock, lambda p: p)
        assert sorted(weights) == sorted(name for name, _ in ours.named_parameters())
        for name, p in ours.named_parameters():
            assert p.shape == weights[name].shape, name
            p.copy_(weights[name])
    return ours, stock


@pytest.fixture
def ids():
    # without 0, which is the padding token in generate
    return torch.randint(1, V, (3, T_MAX), generator=torch.Generator().manual_seed(3))


each_modern = pytest.mark.parametrize("case", MODERN)
both_families = pytest.mark.parametrize(("bias", "activation"), [(True, "gelu_new"), (False, "gelu")])


# ---- the same function as GPT-2


def check_logits_and_loss(mine, theirs, min_std):
    assert theirs.logits.std() > min_std  # so that the test does not compare zeros
    torch.testing.assert_close(mine.logits, theirs.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(mine.loss, theirs.loss, rtol=0, atol=1e-5)


@both_families
def test_logits_loss_and_gradients_equal_gpt2(ids, bias, activation):
    ours, gpt2 = pair(bias, activation)
    labels = ids.clone()
    labels[0, :7] = -100
    mine, theirs = ours(ids, labels=labels), gpt2(ids, labels=labels)
    check_logits_and_loss(mine, theirs, min_std=1)
    mine.loss.backward()
    theirs.loss.backward()
    wanted = dict(gpt2.named_parameters())
    for name, p in ours.named_parameters():
        grad = wanted[name].grad
        torch.testing.assert_close(p.grad, grad.t() if name.endswith(TRANSPOSED) else grad, rtol=1e-4, atol=1e-6)


@each_modern
def test_logits_loss_and_gradients_equal_llama_qwen3_nanochat(ids, case):
    ours, stock = modern(case)
    labels = ids.clone()
    labels[0, :7] = -100
    for attention in ("eager", "sdpa"):
        for model in (ours, stock):
            model.set_attn_implementation(attention)
            model.zero_grad()
        mine, theirs = ours(ids, labels=labels), stock(ids, labels=labels)
        check_logits_and_loss(mine, theirs, min_std=0.7)
        mine.loss.backward()
        theirs.loss.backward()
        wanted = translated(stock, lambda p: p.grad)
        for name, p in ours.named_parameters():
            assert p.grad.abs().max() > 1e-3, name
            torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("case", "switch"),
    [
        ("qwen3", {"norm": "layernorm"}),
        ("qwen3", {"norm_eps": 1e-5}),
        ("qwen3", {"position": "learned"}),
        ("qwen3", {"rope_theta": 10_000.0}),
        ("qwen3", {"qk_norm": False}),
        ("nanochat", {"activation": "gelu"}),
        ("nanochat", {"embd_norm": False}),
        ("nanochat", {"logit_softcap": None}),
        ("nanochat", {"logit_softcap": 5}),
    ],
)
def test_every_switch_changes_the_logits(ids, case, switch):
    """If GPT ignored a switch, the comparisons above would fail."""
    ours, stock = modern(case)
    other = tiny(**{**MODERN[case][1], **switch})
    other.load_state_dict(ours.state_dict(), strict=False)
    assert (other(ids).logits - stock(ids).logits).abs().max() > 1e-3


def test_norm_without_weight_equals_weight_one(ids):
    for switches in (MODERN["qwen3"][1], {"bias": False}):
        plain, gained = tiny(**{**switches, "norm_weight": False}), tiny(**switches)
        gained.load_state_dict(plain.state_dict(), strict=False)
        assert not [name for name, _ in plain.named_parameters() if "ln_" in name or "norm" in name]
        assert torch.equal(plain(ids).logits, gained(ids).logits)


def test_gelu_and_gelu_new_differ(ids):
    exact, tanh = tiny(activation="gelu"), tiny(activation="gelu_new")
    x = torch.linspace(-4, 4, 101)
    torch.testing.assert_close(exact.transformer.h[0].mlp.act(x), x / 2 * (1 + torch.erf(x / math.sqrt(2))))
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    torch.testing.assert_close(tanh.transformer.h[0].mlp.act(x), x / 2 * (1 + torch.tanh(inner)))
    assert (exact(ids).logits - tanh(ids).logits).abs().max() > 1e-4


def test_model_without_bias_has_no_bias_parameters():
    names = [name for name, _ in tiny().named_parameters()]
    assert len(names) == 2 + 2 * 6 + 1 and all(name.endswith("weight") for name in names)


# ---- the loss


def test_labels_are_shifted_and_shift_labels_are_not(ids):
    model = tiny()
    labels = ids.clone()
    labels[1, 5:9] = -100
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    output = model(ids, labels=labels)
    assert torch.equal(output.loss, model(ids, shift_labels=shifted).loss)
    # by hand: the mean of -log p(next) over all targets that are not ignored
    log_p = output.logits.double().log_softmax(-1)
    terms = [-log_p[b, t, labels[b, t + 1]] for b in range(3) for t in range(T_MAX - 1) if labels[b, t + 1] >= 0]
    assert len(terms) == 3 * (T_MAX - 1) - 4
    assert output.loss.item() == pytest.approx(sum(terms).item() / len(terms), abs=1e-5)
    assert output.loss.dtype == torch.float32 and output.past_key_values is None
    # shift_labels may have a target for the last position
    full = torch.randint(V, ids.shape)
    assert model(ids, shift_labels=full).loss.item() == pytest.approx(
        F.nll_loss(log_p.flatten(0, 1), full.flatten()).item(), abs=1e-5
    )


def test_num_items_in_batch_weights_unequal_micro_batches(ids):
    model = tiny()
    labels = ids.clone()
    labels[0, 3:] = -100  # two targets in the first row, all others in the second and third
    count = 2 + 2 * (T_MAX - 1)
    whole = model(ids, labels=labels).loss
    parts = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss for i in range(3)]
    torch.testing.assert_close(sum(parts), whole)
    plain = [model(ids[i : i + 1], labels=labels[i : i + 1]).loss for i in range(3)]
    assert abs(sum(plain) / 3 - whole) > 1e-3  # the mean of means differs


# ---- attention, masks and the cache


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("chunks", [[1] * T_MAX, [7, 1, 5, 11], [T_MAX - 1, 1]])
def test_logits_with_cache_equal_those_without(ids, attention, chunks):
    model = tiny(bias=True)
    full = model(ids).logits
    model.set_attn_implementation(attention)
    cache, done = None, 0
    for size in chunks:
        output = model(ids[:, done : done + size], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(output.logits, full[:, done : done + size], rtol=0, atol=1e-5)
        cache, done = output.past_key_values, done + size
        assert cache.get_seq_length() == done


@each_modern
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_with_cache_equal_llama_qwen3_nanochat(ids, case, attention):
    ours, stock = modern(case)
    full = stock(ids).logits
    ours.set_attn_implementation(attention)
    cache, done = None, 0
    for size in (7, 1, 5, 11):
        output = ours(ids[:, done : done + size], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(output.logits, full[:, done : done + size], rtol=0, atol=1e-5)
        cache, done = output.past_key_values, done + size
    # the cache contains shared heads once
    assert cache.layers[0].keys.shape == (3, ours.config.n_kv_head, T_MAX, ours.config.head_dim)


def test_eager_and_sdpa_attention_agree(ids):
    model = tiny(bias=True)
    mask = torch.ones_like(ids)
    mask[0, :6] = mask[2, :1] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    for kwargs in ({}, {"attention_mask": mask}, {"attention_mask": mask, "position_ids": places}):
        model.set_attn_implementation("sdpa")
        sdpa = model(ids, **kwargs).logits
        model.set_attn_implementation("eager")
        seen = mask.bool()
        torch.testing.assert_close(model(ids, **kwargs).logits[seen], sdpa[seen], rtol=0, atol=1e-5)


def test_attention_is_causal(ids):
    model = tiny()
    before = model(ids).logits
    ids[:, 10] = (ids[:, 10] + 1) % V
    change = (model(ids).logits - before).abs().amax((0, 2))
    assert change[:10].max() == 0 and change[10:].min() > 1e-4


def test_eager_attention_weights_sum_to_one(ids):
    model = tiny(attn_implementation="eager")
    attentions = model(ids, output_attentions=True).attentions
    assert [a.shape for a in attentions] == [(3, 4, T_MAX, T_MAX)] * 2
    for a in attentions:
        torch.testing.assert_close(a.sum(-1), torch.ones(3, 4, T_MAX))
        assert a.triu(1).abs().max() == 0


# ---- generate


@both_families
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_equals_gpt2(ids, bias, activation, use_cache):
    ours, gpt2 = pair(bias, activation)
    arguments = {"max_new_tokens": T_MAX - 5, "do_sample": False, "pad_token_id": 0, "use_cache": use_cache}
    mine, theirs = ours.generate(ids[:, :5], **arguments), gpt2.generate(ids[:, :5], **arguments)
    assert mine.shape == (3, T_MAX) and torch.equal(mine, theirs)
    assert len(set(mine[:, 5:].flatten().tolist())) > 3  # not one repeated token


@each_modern
def test_greedy_generation_beyond_block_size_equals_llama_qwen3_nanochat(ids, case):
    ours, stock = modern(case)
    arguments = {"max_new_tokens": T_MAX, "do_sample": False, "pad_token_id": 0}
    mine, theirs = ours.generate(ids[:, :5], **arguments), stock.generate(ids[:, :5], **arguments)
    assert mine.shape == (3, T_MAX + 5) and torch.equal(mine, theirs)
    assert len(set(mine[:, 5:].flatten().tolist())) > 3


@each_modern
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padded_logits_equal_llama_qwen3_nanochat(ids, case, attention):
    ours, stock = modern(case)
    mask = torch.ones_like(ids)
    mask[0, :9] = mask[2, :1] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    ours.set_attn_implementation(attention)
    mine, seen = ours(ids, attention_mask=mask, position_ids=places).logits, mask.bool()
    theirs = stock(ids, attention_mask=mask, position_ids=places).logits
    torch.testing.assert_close(mine[seen], theirs[seen], rtol=0, atol=1e-5)
    # and equal to the sequence without padding; rotary positions are relative, so also without position_ids
    alone = stock(ids[:1, 9:]).logits[0]
    torch.testing.assert_close(mine[0, 9:], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours(ids, attention_mask=mask).logits[0, 9:], alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("switches", [{"bias": True}, *(MODERN[case][1] for case in ("qwen3", "nanochat"))])
def test_left_padding_does_not_change_generation(ids, switches):
    model = tiny(**switches)
    prompts = [ids[0, :9], ids[1, :4], ids[2, :1]]
    batch = torch.stack([F.pad(p, (9 - len(p), 0), value=7) for p in prompts])
    mask = torch.stack([F.pad(torch.ones_like(p), (9 - len(p), 0)) for p in prompts])
    together = model.generate(batch, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert together.shape == (3, 21)
    for p, row in zip(prompts, together, strict=True):
        alone = model.generate(p[None], max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert row[9:].tolist() == alone[0, len(p) :].tolist()


# ---- options of forward


def test_logits_to_keep_last_positions(ids):
    model = tiny()
    full = model(ids).logits
    assert full.shape == (3, T_MAX, V) and torch.equal(model(ids, logits_to_keep=0).logits, full)
    for keep in (1, 5, T_MAX):
        kept = model(ids, logits_to_keep=keep).logits
        assert kept.shape == (3, keep, V)
        torch.testing.assert_close(kept, full[:, -keep:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["qwen3", "nanochat"])
def test_logits_to_keep_given_positions(ids, case):
    ours, stock = modern(case)
    full = stock(ids).logits
    for keep in ([0], [3, 17, 5], [T_MAX - 1, -1]):
        kept = ours(ids, logits_to_keep=torch.tensor(keep)).logits
        torch.testing.assert_close(kept, full[:, keep], rtol=0, atol=1e-5)


def test_inputs_embeds_replace_input_ids(ids):
    model = tiny()
    assert torch.equal(model(inputs_embeds=model.transformer.wte(ids)).logits, model(ids).logits)


def test_hidden_states_equal_gpt2(ids):
    ours, gpt2 = pair(True, "gelu_new")
    mine = ours(ids, output_hidden_states=True).hidden_states
    theirs = gpt2(ids, output_hidden_states=True).hidden_states
    assert len(mine) == len(theirs) == 3  # the input of each block, and the output of the last norm
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert ours(ids).hidden_states is None


def test_return_dict_false_returns_a_tuple(ids):
    model = tiny()
    loss, logits = model(ids, labels=ids, return_dict=False)
    assert loss.shape == () and logits.shape == (3, T_MAX, V)


def test_no_cache_in_training_or_with_a_loss(ids):
    model = tiny()
    assert model(ids).past_key_values.get_seq_length() == T_MAX
    assert model(ids, labels=ids).past_key_values is None
    assert model.train()(ids).past_key_values is None


# ---- refusals


def test_sequence_longer_than_block_size_is_refused(refused, ids):
    model = tiny()
    with refused(ValueError, f"sequence of {T_MAX + 1} tokens", f"block_size={T_MAX}"):
        model(torch.cat([ids, ids[:, :1]], dim=1))
    cache = model(ids, use_cache=True).past_key_values
    with refused(ValueError, f"sequence of {T_MAX + 2} tokens", f"block_size={T_MAX}"):
        model(ids[:, :2], past_key_values=cache)


@pytest.mark.parametrize("case", ["llama", "qwen3", "nanochat"])
def test_rotary_positions_extend_beyond_block_size(ids, case):
    ours, stock = modern(case)
    long = torch.cat([ids, ids.flip(1), ids], dim=1)  # three times block_size
    wanted = stock(long).logits
    torch.testing.assert_close(ours(long).logits, wanted, rtol=0, atol=2e-5)
    cache = ours(ids, use_cache=True).past_key_values
    torch.testing.assert_close(
        ours(long[:, T_MAX:], past_key_values=cache).logits, wanted[:, T_MAX:], rtol=0, atol=2e-5
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_embd": 30}, "n_embd=30 is not divisible by n_head=4"),
        ({"activation": "relu"}, "activation='relu' must be one of gelu, gelu_new, relu2, swiglu"),
        ({"n_kv_head": 3}, "n_head=4 is not divisible by n_kv_head=3"),
        ({"n_kv_head": 8}, "n_head=4 is not divisible by n_kv_head=8"),
        ({"position": "rotary", "n_embd": 36}, "head_dim=9 is odd"),
        ({"position": "rotary", "head_dim": 7}, "head_dim=7 is odd"),
        ({"norm": "batchnorm"}, "norm='batchnorm' must be one of layernorm, rmsnorm"),
        ({"position": "alibi"}, "position='alibi' must be one of learned, rotary"),
    ],
)
def test_invalid_shapes_are_refused(change, words):
    with pytest.raises(StrictDataclassClassValidationError, match=words):
        tiny(**change)


# ---- initialisation


@pytest.mark.parametrize("n_layer", [2, 8])
def test_residual_projections_start_with_smaller_weights(n_layer):
    C = 128
    model = GPT(GPTConfig(vocab_size=512, block_size=128, n_layer=n_layer, n_head=4, n_embd=C, bias=True))
    scaled = 0
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif "ln_" in name:
            assert (p == 1).all()
        else:
            is_scaled = name.endswith("c_proj.weight")
            scaled += is_scaled
            std = 0.02 / math.sqrt(2 * n_layer) if is_scaled else 0.02
            # of n normal numbers, the std has standard error std / sqrt(2 n), the mean std / sqrt(n)
            n = p.numel()
            assert abs(p.std().item() / std - 1) < 5 / math.sqrt(2 * n), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(n), name
            # normally distributed: 4.55 % are beyond two standard deviations
            beyond = (p.abs() > 2 * std).float().mean().item()
            assert abs(beyond - 0.0455) < 5 * math.sqrt(0.0455 * 0.9545 / n), name
    assert scaled == 2 * n_layer


def test_initial_weights_of_a_modern_gpt():
    C, L, width = 128, 3, 96
    model = GPT(
        GPTConfig(
            vocab_size=512,
            n_layer=L,
            n_head=4,
            n_kv_head=2,
            head_dim=48,
            n_embd=C,
            n_inner=width,
            bias=True,
            norm="rmsnorm",
            embd_norm=True,
            qk_norm=True,
            position="rotary",
            activation="swiglu",
            tie_word_embeddings=False,
        )
    )
    weights = dict(model.named_parameters())
    stds = {
        "lm_head": 0.02,
        "transformer.wte": 0.02,
        "attn.c_attn": 0.02,
        "mlp.c_fc": 0.02,
        "attn.c_proj": 0.02 / math.sqrt(2 * L),
        "mlp.c_proj": 0.02 / math.sqrt(2 * L),
    }
    for name, p in weights.items():
        std = next((std for end, std in stds.items() if name.endswith(f"{end}.weight")), None)
        if std is None:  # a bias, or the weight of a norm
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name
        else:
            assert abs(p.std().item() / std - 1) < 5 / math.sqrt(2 * p.numel()), name
    assert sum(("ln_" in name or "_norm" in name) and name.endswith("weight") for name in weights) == 4 * L + 2
    assert weights["transformer.h.0.mlp.c_fc.weight"].shape == (2 * width, C)
    assert not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"])


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "not tied"])
def test_initial_weights_at_4_times_the_base_width(is_tied):
    """Yang et al. (2022), table 3: the variance is 1/4 for hidden weights and 1/16 for the head, if it is not tied."""
    plain, scaled = (
        tiny(initializer_range=0.02, tie_word_embeddings=is_tied, mup_base_width=width) for width in (None, 8)
    )
    for (name, p), q in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        is_last = name.startswith("transformer.ln_f" if is_tied else "lm_head")
        factor = 0.25 if is_last else 0.5 if ".h." in name and p.dim() == 2 else 1.0
        torch.testing.assert_close(q, p * factor, rtol=1e-6, atol=0, msg=name)
    assert (scaled.lm_head.weight is scaled.transformer.wte.weight) is is_tied
    with pytest.raises(StrictDataclassClassValidationError, match="mup_base_width"):
        tiny(mup_base_width=8, norm_weight=False)


def test_zero_init_makes_blocks_the_identity(ids):
    model = tiny(zero_init=True)
    hidden = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(hidden[0], hidden[1])  # the inputs of the first and of the second block
    for name, p in model.named_parameters():
        assert p.any() != name.endswith("c_proj.weight"), name
    model(ids, labels=ids).loss.backward()  # and they can be trained
    assert all(block.attn.c_proj.weight.grad.any() for block in model.transformer.h)


def test_initial_loss_is_log_of_the_vocabulary_size(ids):
    loss = tiny(initializer_range=0.02)(ids, labels=ids).loss
    assert loss.item() == pytest.approx(math.log(V), abs=0.1)


# ---- tied weights and size


@pytest.mark.parametrize(
    ("vocab_size", "bias", "count"),
    [
        (50257, False, 124_337_664),  # nanoGPT's transformer_sizing.ipynb
        (50257, True, 124_439_808),  # OpenAI's weights as transformers counts them
        (50304, False, 124_337_664 + 47 * 768),
    ],
)
def test_number_of_parameters_of_gpt2(vocab_size, bias, count):
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=vocab_size, bias=bias))
        if vocab_size == 50257 and bias:
            assert GPT2LMHeadModel(GPT2Config()).num_parameters() == count
    assert model.num_parameters() == sum(p.numel() for p in model.parameters()) == count
    assert "lm_head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("form", STOCK)
def test_number_of_parameters_equals_llama_qwen3_nanochat(form):
    """The models have the depth and width of GPT-2, and a third of the heads for keys and values."""
    C, L, nh, nkv, hs, vocab = 768, 12, 12, 4, 64, 50304
    matrices = C * (nh + 2 * nkv) * hs + nh * hs * C
    count = {
        "llama": 2 * vocab * C + L * (matrices + 3 * C * 2048 + 2 * C) + C,  # a gate of 8/3 C, two norms per block
        "qwen3": vocab * C + L * (matrices + 3 * C * 2048 + 2 * C + 2 * hs) + C,
        "nanochat": 2 * vocab * C + L * (matrices + 2 * C * 4 * C),
    }[form]
    switches = {k: v for k, v in MODERN[form][1].items() if k != "head_dim"}
    switches |= {
        "n_kv_head": nkv,
        "n_inner": 4 * C if form == "nanochat" else 2048,
        "tie_word_embeddings": form == "qwen3",
    }
    config_class, model_class = STOCK[form]
    with torch.device("meta"):
        model = GPT(GPTConfig(**switches))
        stock = model_class(
            config_class(
                vocab_size=vocab,
                hidden_size=C,
                num_hidden_layers=L,
                num_attention_heads=nh,
                num_key_value_heads=nkv,
                head_dim=hs,
                intermediate_size=switches["n_inner"],
                tie_word_embeddings=form == "qwen3",
            )
        )
    assert model.num_parameters() == stock.num_parameters() == count


def test_head_and_embedding_stay_tied(tmp_path, ids):
    model = tiny()
    model.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    for m in (model, loaded):
        assert m.lm_head.weight is m.transformer.wte.weight
        assert m.num_parameters() == V * 32 + T_MAX * 32 + 2 * (12 * 32 * 32 + 2 * 32) + 32
    loaded(ids, labels=ids).loss.backward()
    torch.optim.SGD(loaded.parameters(), lr=1.0).step()
    assert loaded.lm_head.weight.data_ptr() == loaded.transformer.wte.weight.data_ptr()
    assert not torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    # the file contains the tied weight once
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(name for name, _ in model.named_parameters())


# ---- training


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("switches", [{"bias": True}, *(MODERN[case][1] for case in ("qwen3", "nanochat"))])
def test_gradient_checkpointing_keeps_gradients_with_dropout(ids, switches):
    def gradients(seed, checkpointing):
        model = tiny(dropout=0.2, **switches).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        calls = []
        model.transformer.h[0].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
        torch.manual_seed(seed)
        model(ids, labels=ids).loss.backward()
        return [p.grad for p in model.parameters()], len(calls)

    (plain, once), (again, twice) = gradients(5, False), gradients(5, True)
    assert (once, twice) == (1, 2)  # the block really ran again in the backward pass
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    other, _ = gradients(6, True)
    assert not torch.equal(plain[0], other[0])  # dropout was on


@each_modern
def test_bf16_autocast_is_close_to_float32(ids, case):
    """bfloat16 rounds to 2^-9 of a value. Two blocks round about twenty times, and the softmax amplifies some of these
    errors. So errors of a few per cent of the standard deviation of the logits are expected. They must not be larger
    than in transformers."""
    ours, stock = modern(case)
    was_always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # otherwise a warning that another test has seen is not repeated
    try:
        with warnings.catch_warnings(), torch.autocast("cpu", dtype=torch.bfloat16):
            warnings.simplefilter("error")
            output = ours(ids, labels=ids)
            output.loss.backward()
    finally:
        torch.set_warn_always(was_always)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in ours.parameters())
    assert output.loss.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = stock(ids).logits
    exact = stock(ids).logits
    far, as_far = ((logits - exact).std().item() / exact.std().item() for logits in (output.logits, theirs))
    assert 1e-4 < far < 0.06 and far < 1.5 * as_far


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_dropout_equals_gpt2(ids, attention):
    """In train mode and with the same seed, GPT and GPT-2 of transformers compute the same logits."""
    ours, gpt2 = pair(True, "gelu_new")
    for model in (ours, gpt2):
        model.set_attn_implementation(attention)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        model.train()
    ours.config.dropout = 0.3  # for the attention weights
    for block in gpt2.transformer.h:
        block.attn.attn_dropout.p = 0.3
    logits = []
    for model in (ours, gpt2):
        torch.manual_seed(4)
        logits.append(model(ids).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    with torch.no_grad():
        assert not torch.equal(ours(ids).logits, logits[0])
        # evaluation has no dropout and no scaling
        torch.testing.assert_close(ours.eval()(ids).logits, gpt2.eval()(ids).logits, rtol=0, atol=1e-5)


def test_dropout_probability_is_that_of_the_config():
    model = tiny(dropout=0.25)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}
    assert sum(isinstance(m, torch.nn.Dropout) for m in model.modules()) == 1 + 2 * 2


# ---- folders


def test_auto_model_loads_a_saved_folder(tmp_path, ids):
    model = tiny(bias=True, activation="gelu_new", eos_token_id=3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is GPT and not loaded.training
    assert loaded.config.activation == "gelu_new" and loaded.config.bias is True and loaded.config.eos_token_id == 3
    assert torch.equal(loaded(ids).logits, model(ids).logits)


ELSEWHERE = (
    WITHOUT_THE_PACKAGE
    + """
import json
import torch
from transformers import AutoModelForCausalLM

ids = torch.tensor(json.load(open("ids.json")))
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not model.training
    assert (model.lm_head.weight is model.transformer.wte.weight) == model.config.tie_word_embeddings
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    new = model.generate(ids[:, :5], max_new_tokens=9, do_sample=False, pad_token_id=0)
    torch.save({"logits": model(ids).logits, "new": new}, f"{folder}/result.pt")
    json.dump({"module": type(model).__module__, "file": sys.modules[type(model).__module__].__file__},
              open(f"{folder}/where.json", "w"))
"""
)


def test_process_without_the_package_loads_a_saved_folder(tmp_path, ids):
    models = {
        "gpt2": tiny(bias=True, activation="gelu_new"),
        "qwen3": modern("qwen3")[0],
        "nanochat": modern("nanochat without a cap")[0],
    }
    for folder, model in models.items():
        model.save_pretrained(tmp_path / folder)
        assert json.loads((tmp_path / folder / "config.json").read_text())["auto_map"] == {
            "AutoConfig": "model.GPTConfig",
            "AutoModel": "model.GPTModel",
            "AutoModelForCausalLM": "model.GPT",
            "AutoModelForSequenceClassification": "model.GPTForSequenceClassification",
            "AutoModelForTokenClassification": "model.GPTForTokenClassification",
        }
    (tmp_path / "ids.json").write_text(json.dumps(ids.tolist()))
    (tmp_path / "script.py").write_text(ELSEWHERE)
    env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "script.py", *models], cwd=tmp_path, env=env, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for folder, model in models.items():
        where = json.loads((tmp_path / folder / "where.json").read_text())
        assert where["module"].startswith("transformers_modules.") and str(tmp_path / "hf") in where["file"]
        result = torch.load(tmp_path / folder / "result.pt", weights_only=True)
        assert (result["logits"] - model(ids).logits).abs().max().item() == 0.0
        new = model.generate(ids[:, :5], max_new_tokens=9, do_sample=False, pad_token_id=0)
        assert torch.equal(result["new"], new)


@each_modern
def test_saved_folder_keeps_every_switch(tmp_path, ids, case):
    ours, stock = modern(case)
    ours.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is GPT
    assert {key: getattr(loaded.config, key) for key in MODERN[case][1]} == MODERN[case][1]
    assert torch.equal(loaded(ids).logits, ours(ids).logits)
    torch.testing.assert_close(loaded(ids).logits, stock(ids).logits, rtol=0, atol=1e-5)


def test_config_of_the_first_version_loads(tmp_path, ids):
    """This config lacks the options that were added later, and has another name for norm_eps."""
    model = tiny()
    model.save_pretrained(tmp_path)
    first = {
        "activation": "gelu",
        "architectures": ["GPT"],
        "bias": False,
        "block_size": T_MAX,
        "bos_token_id": None,
        "auto_map": {"AutoConfig": "model.GPTConfig", "AutoModelForCausalLM": "model.GPT"},
        "dropout": 0.0,
        "dtype": "float32",
        "eos_token_id": None,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "nanogpt_accel",
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 2,
        "pad_token_id": None,
        "tie_word_embeddings": True,
        "transformers_version": "5.23.0",
        "use_cache": True,
        "vocab_size": V,
    }
    (tmp_path / "config.json").write_text(json.dumps(first))
    assert torch.equal(GPT.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


# ---- another context length


def test_smaller_block_size_keeps_the_function(refused, tmp_path, ids):
    model = tiny(bias=True)
    full = model(ids).logits
    whole_size = model.num_parameters()
    model.set_block_size(10)
    assert model.num_parameters() == whole_size - (T_MAX - 10) * 32
    torch.testing.assert_close(model(ids[:, :10]).logits, full[:, :10], rtol=0, atol=1e-5)
    with refused(ValueError, "11 tokens", "block_size=10"):
        model(ids[:, :11])
    model.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.config.block_size == 10 and loaded.transformer.wpe.weight.shape == (10, 32)
    assert torch.equal(loaded(ids[:, :10]).logits, model(ids[:, :10]).logits)
    loaded.train()(ids[:, :10], labels=ids[:, :10]).loss.backward()
    assert loaded.transformer.wpe.weight.grad.shape == (10, 32)


def test_same_block_size_changes_nothing(ids):
    model = tiny()
    before = model(ids).logits
    model.set_block_size(T_MAX)
    assert torch.equal(model(ids).logits, before)


def test_rotary_models_may_have_a_larger_block_size(tmp_path, ids):
    ours, stock = modern("qwen3")
    size = ours.num_parameters()
    for length in (2 * T_MAX, 10):
        ours.set_block_size(length)
        assert ours.config.block_size == ours.config.max_position_embeddings == length
        assert ours.num_parameters() == size
        torch.testing.assert_close(ours(ids).logits, stock(ids).logits, rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).config.block_size == 10
