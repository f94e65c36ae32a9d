"""optim.py: nanoGPT's learning rate and groups, and torch's AdamW."""

import math

import pytest
import torch

from nanogpt_accel.model import GPT, GPTConfig
from nanogpt_accel.optim import learning_rate, make_optimizer, parameter_groups

# ---- the learning rate


def nanogpt_lr(it, learning_rate, warmup_iters, lr_decay_iters, min_lr):
    """get_lr of nanoGPT's train.py."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    assert 0 <= decay_ratio <= 1
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
    return min_lr + coeff * (learning_rate - min_lr)


@pytest.mark.parametrize("schedule", [
    {"learning_rate": 1e-3, "warmup_iters": 100, "lr_decay_iters": 2000, "min_lr": 1e-4},
    {"learning_rate": 6e-4, "warmup_iters": 0, "lr_decay_iters": 500, "min_lr": 0.0},
    {"learning_rate": 6e-4, "warmup_iters": 1, "lr_decay_iters": 3, "min_lr": 6e-4},
])
def test_the_cosine_is_nanogpts(schedule):
    for step in range(schedule["lr_decay_iters"] + 300):
        assert learning_rate(step, schedule="cosine", **schedule) == nanogpt_lr(step, **schedule), step


def test_landmarks_of_the_cosine():
    def rate(step):
        return learning_rate(step, schedule="cosine", learning_rate=1.0, warmup_iters=9, lr_decay_iters=109, min_lr=0.2)

    assert [rate(step) for step in (0, 4, 8, 9)] == pytest.approx([0.1, 0.5, 0.9, 1.0])
    assert rate(59) == pytest.approx(0.6) and rate(34) == pytest.approx(0.6 + 0.4 * math.sqrt(0.5))
    assert rate(109) == pytest.approx(0.2) and rate(110) == rate(10**9) == 0.2
    falling = [rate(step) for step in range(9, 110)]
    assert falling == sorted(falling, reverse=True) and min(falling) >= 0.2


def test_warm_up_up_to_the_end():
    # the recipe lets warmup_iters reach lr_decay_iters, where nanoGPT divides by zero
    rates = [learning_rate(step, schedule="cosine", learning_rate=1.0, warmup_iters=4, lr_decay_iters=4, min_lr=0.1)
             for step in range(7)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 0.1, 0.1])


def test_constant():
    rates = [learning_rate(step, schedule="constant", learning_rate=0.5, warmup_iters=4, lr_decay_iters=10, min_lr=0.1)
             for step in range(1000)]
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4]) and rates[4:] == [0.5] * 996


# ---- the groups


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def model(request):
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=17, block_size=8, n_layer=2, n_head=2, n_embd=32, bias=request.param))


def test_matrices_decay_and_nothing_else(model):
    decay, plain = parameter_groups(model, weight_decay=0.3)
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    name_of = {id(p): name for name, p in model.named_parameters()}
    decayed = [name_of[id(p)] for p in decay["params"]]
    others = [name_of[id(p)] for p in plain["params"]]
    # by what the layers are, not by their dimensions
    blocks = [f"transformer.h.{i}.{layer}.weight" for i in range(2)
              for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert decayed == ["transformer.wte.weight", "transformer.wpe.weight", *blocks]
    norms = [f"transformer.h.{i}.{ln}" for i in range(2) for ln in ("ln_1", "ln_2")] + ["transformer.ln_f"]
    biases = [name for name, _ in model.named_parameters() if name.endswith(".bias")]
    assert sorted(others) == sorted([f"{norm}.weight" for norm in norms] + biases)
    assert len(biases) == (13 if model.config.bias else 0)
    # in the order of the model, so that a saved state finds its parameters again; and each one once, the tied too
    order = [name for name, _ in model.named_parameters()]
    assert [name for name in order if name in decayed] == decayed
    assert [name for name in order if name in others] == others
    assert len(decayed) + len(others) == len(set(decayed + others)) == len(order)
    assert any(p is model.lm_head.weight for p in decay["params"])


def test_frozen_parameters_are_left_out(model):
    model.transformer.wpe.weight.requires_grad_(False)
    params = [p for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert len(params) == len(list(model.parameters())) - 1
    assert not any(p is model.transformer.wpe.weight for p in params)


# ---- AdamW


def adamw_step(p, grad, state, lr, beta1, beta2, weight_decay, t):
    """Algorithm 2 of Loshchilov and Hutter (2019), in float64."""
    state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * grad
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * grad**2
    m, v = state["m"] / (1 - beta1**t), state["v"] / (1 - beta2**t)
    return p - lr * (m / (v.sqrt() + 1e-8) + weight_decay * p)


def test_the_optimizer_is_adamw(model):
    arguments = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95}
    ours = make_optimizer(model, learning_rate=1e-2, **arguments)
    assert type(ours) is torch.optim.AdamW and ours.defaults["fused"] is True

    torch.manual_seed(0)
    twin = GPT(model.config)
    twin.load_state_dict(model.state_dict())
    groups = parameter_groups(twin, 0.1)
    unfused = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=False)
    by_hand = {name: p.detach().double() for name, p in model.named_parameters()}
    states = {name: {} for name in by_hand}

    for t in range(1, 6):
        lr = 1e-2 / t
        for optimizer in (ours, unfused):
            for group in optimizer.param_groups:
                group["lr"] = lr
        generator = torch.Generator().manual_seed(t)
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
            by_hand[name] = adamw_step(by_hand[name], p.grad.double(), states[name], lr, 0.9, 0.95,
                                       0.1 if p.dim() >= 2 else 0.0, t)
        ours.step()
        unfused.step()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
            torch.testing.assert_close(p.double(), by_hand[name], rtol=0, atol=1e-6)
