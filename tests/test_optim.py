"""optim.py: learning rate and parameter groups as in nanoGPT, AdamW as in torch, and Muon compared with torch's."""

import copy
import json
import math
import os
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from reference import nanogpt_lr
from runs import SMALL, checkpoint, losses, numbers, tensors, write_recipe

from nanogpt_accel.__main__ import main
from nanogpt_accel.model import GPT, GPTConfig
from nanogpt_accel.muon import orthogonalize
from nanogpt_accel.optim import learning_rate, make_optimizer, parameter_groups
from nanogpt_accel.recipe import Optimizer, load_recipe
from nanogpt_accel.training import check_optimizer, check_saved_optimizer

# ---- the learning rate


@pytest.mark.parametrize(
    "schedule",
    [
        {"learning_rate": 1e-3, "warmup_iters": 100, "lr_decay_iters": 2000, "min_lr": 1e-4},
        {"learning_rate": 6e-4, "warmup_iters": 0, "lr_decay_iters": 500, "min_lr": 0.0},
        {"learning_rate": 6e-4, "warmup_iters": 1, "lr_decay_iters": 3, "min_lr": 6e-4},
    ],
)
def test_cosine_schedule_equals_nanogpt(schedule):
    for step in range(schedule["lr_decay_iters"] + 300):
        assert learning_rate(step, schedule="cosine", **schedule) == nanogpt_lr(step, **schedule), step


def test_cosine_schedule_at_known_points():
    def rate(step):
        return learning_rate(step, schedule="cosine", learning_rate=1.0, warmup_iters=9, lr_decay_iters=109, min_lr=0.2)

    assert [rate(step) for step in (0, 4, 8, 9)] == pytest.approx([0.1, 0.5, 0.9, 1.0])
    assert rate(59) == pytest.approx(0.6) and rate(34) == pytest.approx(0.6 + 0.4 * math.sqrt(0.5))
    assert rate(109) == pytest.approx(0.2) and rate(110) == rate(10**9) == 0.2
    falling = [rate(step) for step in range(9, 110)]
    assert falling == sorted(falling, reverse=True) and min(falling) >= 0.2


def test_warmup_may_end_at_the_last_decay_step():
    # the recipe lets warmup_iters reach lr_decay_iters, where nanoGPT divides by zero
    rates = [
        learning_rate(step, schedule="cosine", learning_rate=1.0, warmup_iters=4, lr_decay_iters=4, min_lr=0.1)
        for step in range(7)
    ]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 0.1, 0.1])


def test_constant_schedule():
    rates = [
        learning_rate(step, schedule="constant", learning_rate=0.5, warmup_iters=4, lr_decay_iters=10, min_lr=0.1)
        for step in range(1000)
    ]
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4]) and rates[4:] == [0.5] * 996


def test_warmup_stable_decay_schedule():
    """The schedule is compared with exact fractions: it is linear between the points (-1, 0), (w, top), (N - d, top)
    and (N, low)."""
    top, low, w, N, fraction = Fraction(3, 2), Fraction(1, 4), 5, 40, Fraction(3, 8)
    d = N * fraction
    for step in range(60):
        wanted = (
            top * (step + 1) / (w + 1)
            if step <= w
            else top
            if step <= N - d
            else top + (low - top) * (step - (N - d)) / d
            if step <= N
            else low
        )
        found = learning_rate(
            step,
            schedule="warmup_stable_decay",
            learning_rate=1.5,
            warmup_iters=w,
            lr_decay_iters=N,
            min_lr=0.25,
            decay_fraction=0.375,
        )
        assert found == pytest.approx(float(wanted), rel=1e-12), step


@pytest.mark.parametrize("warmup_iters", [0, 1])
def test_warmup_stable_decay_with_decay_from_the_first_step(warmup_iters):
    rates = [
        learning_rate(
            step,
            schedule="warmup_stable_decay",
            learning_rate=1.0,
            warmup_iters=warmup_iters,
            lr_decay_iters=4,
            min_lr=0.0,
            decay_fraction=1.0,
        )
        for step in range(6)
    ]
    assert rates == pytest.approx([[1.0, 0.5][warmup_iters], 0.75, 0.5, 0.25, 0.0, 0.0])


# ---- the groups


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def model(request):
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=17, block_size=8, n_layer=2, n_head=2, n_embd=32, bias=request.param))


def test_weight_decay_applies_to_matrices_and_embeddings_only(model):
    decay, plain = parameter_groups(model, weight_decay=0.3)
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    name_of = {id(p): name for name, p in model.named_parameters()}
    decayed = [name_of[id(p)] for p in decay["params"]]
    others = [name_of[id(p)] for p in plain["params"]]
    # a list of the layers, because the code selects parameters by their number of dimensions
    blocks = [
        f"transformer.h.{i}.{layer}.weight"
        for i in range(2)
        for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert decayed == ["transformer.wte.weight", "transformer.wpe.weight", *blocks]
    norms = [f"transformer.h.{i}.{ln}" for i in range(2) for ln in ("ln_1", "ln_2")] + ["transformer.ln_f"]
    biases = [name for name, _ in model.named_parameters() if name.endswith(".bias")]
    assert sorted(others) == sorted([f"{norm}.weight" for norm in norms] + biases)
    assert len(biases) == (13 if model.config.bias else 0)
    # in the order of the model, so that a saved state matches its parameters; each one once, also the tied one
    order = [name for name, _ in model.named_parameters()]
    assert [name for name in order if name in decayed] == decayed
    assert [name for name in order if name in others] == others
    assert len(decayed) + len(others) == len(set(decayed + others)) == len(order)
    assert any(p is model.lm_head.weight for p in decay["params"])


def test_frozen_parameters_are_in_no_group(model):
    model.transformer.wpe.weight.requires_grad_(False)
    params = [p for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert len(params) == len(list(model.parameters())) - 1
    assert not any(p is model.transformer.wpe.weight for p in params)


def test_no_group_is_empty():
    """An optimizer that is named by its class is restored on the device of the first parameter of each group, so each
    group must have one."""
    shape = {"vocab_size": 17, "block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 32}
    (group,) = parameter_groups(GPT(GPTConfig(**shape, norm_weight=False)), 0.1)
    assert group["weight_decay"] == 0.1 and all(p.dim() == 2 for p in group["params"])


# ---- learning rates and initial weights at another width (muP)


def wide(**switches):
    """A GPT that is 4 times as wide as mup_base_width."""
    torch.manual_seed(0)
    shape = {"vocab_size": 17, "block_size": 8, "n_layer": 2, "n_head": 4, "n_embd": 64, "mup_base_width": 16}
    return GPT(GPTConfig(**shape | switches))


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "not tied"])
@pytest.mark.parametrize("algorithm", ["adamw", "muon", "torch.optim.NAdam"])
def test_learning_rates_at_4_times_the_base_width(algorithm, is_tied):
    """The factors of Yang et al. (2022), table 3, for Adam: hidden and output weights 1/4, all others 1. A tied head
    gets its factor from the norm in front of it."""
    model = wide(bias=True, tie_word_embeddings=is_tied)
    settings = Optimizer(algorithm=algorithm, learning_rate=1e-2, muon_learning_rate=3e-2, weight_decay=0.1)
    found = {}
    for group in make_optimizer(model, settings).param_groups:
        found |= {id(p): (group["lr_scale"], group["weight_decay"]) for p in group["params"]}
    assert len(found) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        is_matrix = p.dim() == 2
        is_hidden = ".h." in name and is_matrix
        is_scaled = is_hidden or name.startswith("transformer.ln_f" if is_tied else "lm_head")
        wanted = 0.25 if is_scaled else 1.0, is_matrix * (0.4 if is_scaled else 0.1)
        if is_hidden and algorithm == "muon":
            wanted = 3.0, 0.0  # the ratio of the learning rates, and muon_weight_decay
        assert found[id(p)] == pytest.approx(wanted), name


def test_nothing_changes_at_the_base_width():
    plain, same = wide(mup_base_width=None), wide(mup_base_width=64)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), same.parameters(), strict=True))
    for settings in (Optimizer(), Optimizer(algorithm="muon")):
        groups = [make_optimizer(model, settings).param_groups for model in (plain, same)]
        assert len(groups[0]) == len(groups[1]) == (3 if settings.algorithm == "muon" else 2)
        for one, other in zip(*groups, strict=True):
            assert [p.shape for p in one["params"]] == [p.shape for p in other["params"]]
            assert {**one, "params": 0} == {**other, "params": 0}


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "not tied"])
def test_training_equals_that_with_multipliers_in_the_forward_pass(is_tied):
    """muP's other form (Yang et al. 2022, table 8): the initial weights do not depend on the width; instead, the output
    of the head is multiplied by 1/4. AdamW then gives the same losses, because its steps do not depend on the scale of
    the gradient."""
    ours, theirs = wide(tie_word_embeddings=is_tied), wide(tie_word_embeddings=is_tied)
    head = theirs.transformer.ln_f if is_tied else theirs.lm_head
    with torch.no_grad():
        head.weight.mul_(4)
    theirs.lm_head.register_forward_hook(lambda module, args, output: output / 4)
    hidden = [p for p in theirs.transformer.h.parameters() if p.dim() == 2]
    others = [p for p in theirs.parameters() if not any(p is q for q in hidden)]
    options = {"betas": (0.9, 0.95), "weight_decay": 0.0, "eps": 1e-30}
    optimizers = [
        torch.optim.AdamW(parameter_groups(ours, 0.0), lr=1e-2, **options),
        torch.optim.AdamW([{"params": hidden, "lr": 1e-2 / 4}, {"params": others}], lr=1e-2, **options),
    ]
    for group in optimizers[0].param_groups:
        group["lr"] *= group["lr_scale"]
    ids, losses = torch.randint(0, 17, (4, 8)), []
    for _ in range(5):
        pair = [model(ids, labels=ids).loss for model in (ours, theirs)]
        losses.append([loss.item() for loss in pair])
        for loss, optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    losses = torch.tensor(losses)
    torch.testing.assert_close(losses[:, 0], losses[:, 1], rtol=1e-5, atol=0)
    assert losses[-1, 0] < losses[0, 0] - 0.1


# ---- AdamW


def adamw_step(p, grad, state, lr, beta1, beta2, weight_decay, t):
    """Algorithm 2 of Loshchilov and Hutter (2019), in float64."""
    state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * grad
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * grad**2
    m, v = state["m"] / (1 - beta1**t), state["v"] / (1 - beta2**t)
    return p - lr * (m / (v.sqrt() + 1e-8) + weight_decay * p)


def test_optimizer_is_adamw(model):
    arguments = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95}
    ours = make_optimizer(model, Optimizer(learning_rate=1e-2, **arguments))
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
            by_hand[name] = adamw_step(
                by_hand[name], p.grad.double(), states[name], lr, 0.9, 0.95, 0.1 if p.dim() >= 2 else 0.0, t
            )
        ours.step()
        unfused.step()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
            torch.testing.assert_close(p.double(), by_hand[name], rtol=0, atol=1e-6)


# ---- optimizers by name; test_resume.py in tests/checkpoint tests their state


def test_an_optimizer_by_name_gets_the_groups_and_the_options(model):
    options = {"momentum": 0.9, "nesterov": True}
    settings = Optimizer(algorithm="torch.optim.SGD", options=options, learning_rate=0.1, weight_decay=0.3)
    optimizer = make_optimizer(model, settings)
    assert type(optimizer) is torch.optim.SGD
    found = [
        [group[key] for key in ("lr", "weight_decay", "momentum", "nesterov", "lr_scale")]
        for group in optimizer.param_groups
    ]
    assert found == [[0.1, 0.3, 0.9, True, 1.0], [0.1, 0.0, 0.9, True, 1.0]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("{eps: 1e-6, eps: 1e-5}", "must be valid YAML"),
        ("[1]", "must have the form {KEY: VALUE}"),
        ("{since: 2024-01-01}", "must only contain numbers, strings"),
    ],
)
def test_options_that_are_no_mapping_of_plain_values_are_refused(refused, options, words):
    with refused(ValueError, "optimizer.options=", words):
        load_recipe(None, {"algorithm": "torch.optim.NAdam", "options": options})


def test_options_on_a_command_line_are_yaml():
    recipe = load_recipe(
        None, {"algorithm": "torch.optim.NAdam", "options": "{eps: 1e-6, betas: [0.9, 1e-1], foreach: null}"}
    )
    assert recipe.optimizer.options == {"eps": 1e-6, "betas": [0.9, 0.1], "foreach": None}
    in_python = load_recipe(None, {"algorithm": "torch.optim.NAdam", "options": {"betas": (0.9, 0.1)}})
    assert in_python.optimizer.options == {"betas": [0.9, 0.1]}  # run.yaml has no tuples


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"algorithm": "torch.optim.Adafactr"},
            ["optimizer.algorithm=torch.optim.Adafactr", "did you mean Adafactor?"],
        ),
        (
            {"algorithm": "torch.nn.Linear"},
            ["optimizer.algorithm=torch.nn.Linear", "torch.nn has no optimizer Linear"],
        ),
        ({"algorithm": "torch.optim.Optimizer", "weight_decay": 0.0}, ["algorithm=torch.optim.Optimizer: cannot be"]),
        ({"algorithm": "tiny_run.Counting"}, ["algorithm=tiny_run.Counting: a step changes n_steps, which"]),
        ({"algorithm": "torch.optim.LBFGS"}, ["optimizer.algorithm=torch.optim.LBFGS", "closure"]),
        ({"algorithm": "tiny_run.Switched"}, ["optimizer.algorithm=tiny_run.Switched", "train() and eval()"]),
        ({"algorithm": "torch.optim.SparseAdam", "weight_decay": 0.0}, ["algorithm=torch.optim.SparseAdam", "a step"]),
        ({"algorithm": "torch.optim.Rprop"}, ["optimizer.weight_decay=0.1", "Rprop", "set weight_decay=0"]),
        (
            {"algorithm": "torch.optim.SGD", "options": {"betas": [0.9, 0.99]}},
            ["optimizer.options={betas: [0.9, 0.99]}", "torch.optim.SGD does not accept them", "'betas'"],
        ),
        ({"algorithm": "torch.optim.SGD", "options": {"lr": 0.1}}, ["options={lr: 0.1}", "remove lr", "learning_rate"]),
    ],
)
def test_a_mistake_in_an_optimizer_by_name_is_found_before_the_run(refused, settings, words):
    with refused(ValueError, *words):
        load_recipe(None, settings, check=lambda recipe: check_optimizer(recipe.optimizer))


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({"algorithm": "adamw"}, {"algorithm": "muon"}, "optimizer.algorithm=muon: checkpoint contains the optimizer"),
        ({"algorithm": "muon"}, {"algorithm": "torch.optim.NAdam"}, "state of algorithm=muon; set algorithm=muon"),
        ({"options": {}}, {"options": {"amsgrad": True}}, "optimizer.options={amsgrad: True}: checkpoint contains"),
        (
            {"options": {"amsgrad": True}},
            {"options": {"eps": 1e-6}},
            "optimizer state of options={amsgrad: True}; set options=",
        ),
        ({"options": {"eps": 1e-6}}, {"options": {"betas": [0.5, 0.9]}}, None),
        ({"algorithm": "adamw"}, {"algorithm": "adamw"}, None),
    ],
)
def test_a_checkpoint_only_continues_with_an_optimizer_of_the_same_state(tmp_path, monkeypatch, before, now, words):
    """The check does not use run.yaml, because a user may have edited it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint" / "state").mkdir(parents=True)
    (tmp_path / "run.yaml").write_text(f"optimizer: {now}")
    saved = {"algorithm": "torch.optim.Adam", "options": {}} | before
    (tmp_path / "checkpoint" / "state" / "trainer.json").write_text(json.dumps({"optimizer": saved}))
    problems = check_saved_optimizer(Path("checkpoint"), Optimizer(**{"algorithm": "torch.optim.Adam", **now}))
    assert problems == [] if words is None else len(problems) == 1 and words in problems[0]


@pytest.mark.parametrize(("algorithm", "is_refused"), [("torch.optim.Adafactor", True), ("torch.optim.NAdam", False)])
def test_only_optimizers_with_state_like_the_parameters_are_sharded(monkeypatch, algorithm, is_refused):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    problems = check_optimizer(Optimizer(algorithm=algorithm))
    assert len(problems) == is_refused and all("FSDP2" in line and "multi_gpu.yaml" in line for line in problems)


# ---- Muon

MUON = {
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "beta1": 0.8,
    "beta2": 0.95,
    "algorithm": "muon",
    "muon_learning_rate": 0.05,
    "muon_momentum": 0.9,
    "muon_weight_decay": 0.2,
}


def modern(seed=0, activation="relu2"):
    """A GPT with tall, wide and square matrices, RMSNorm weights, and an untied head."""
    torch.manual_seed(seed)
    return GPT(
        GPTConfig(
            vocab_size=17,
            block_size=8,
            n_layer=3,
            n_head=4,
            n_kv_head=2,
            n_embd=32,
            n_inner=48,
            norm="rmsnorm",
            qk_norm=True,
            position="rotary",
            activation=activation,
            tie_word_embeddings=False,
        )
    )


def give_gradients(models, seed):
    """Give each model the same random gradients, whose scale differs between parameters."""
    generator = torch.Generator().manual_seed(seed)
    for i, parameters in enumerate(zip(*(model.parameters() for model in models), strict=True)):
        grad = torch.randn(parameters[0].shape, generator=generator) * 10.0 ** (i % 5 - 3)
        for p in parameters:
            p.grad = grad.clone()


def train_ours_and_torchs(steps, activation):
    """Return two models after some steps: one trained by our Muon, one by torch's Muon and AdamW."""
    ours, theirs = modern(activation=activation), modern(activation=activation)
    optimizer = make_optimizer(ours, Optimizer(**MUON))
    named = dict(theirs.named_parameters())
    # these contain several matrices, which torch's Muon gets one by one
    rows = {"c_attn": [32, 16, 16], "c_fc": [48, 48] if activation == "swiglu" else [48]}
    matrices = {
        name: list(map(torch.nn.Parameter, p.detach().clone().split(rows.get(name.split(".")[-2], 999))))
        for name, p in named.items()
        if ".h." in name and p.dim() == 2
    }
    hidden = [matrix for name in matrices for matrix in matrices[name]]
    others = [p for name, p in named.items() if ".h." not in name and p.dim() == 2]
    vectors = [p for p in named.values() if p.dim() == 1]
    assert len(hidden) == 3 * (7 if activation == "swiglu" else 6) and len(others) == 2 and len(vectors) == 3 * 4 + 1
    muon = torch.optim.Muon(hidden, lr=0.05, momentum=0.9, weight_decay=0.2)
    adamw = torch.optim.AdamW(
        [{"params": others, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.8, 0.95),
        fused=True,
    )
    for t in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (t + 1) * group["lr_scale"]  # as train does it
        muon.param_groups[0]["lr"] = 0.05 / (t + 1)
        for group in adamw.param_groups:
            group["lr"] = 1e-2 / (t + 1)
        give_gradients((ours, theirs), t)
        for name in matrices:
            for matrix, grad in zip(
                matrices[name], named[name].grad.split([len(p) for p in matrices[name]]), strict=True
            ):
                matrix.grad = grad
        for one in (optimizer, muon, adamw):
            one.step()
    for name in matrices:
        named[name].data = torch.cat([matrix.data for matrix in matrices[name]])
    return ours, theirs


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_muon_equals_torch_in_float32(monkeypatch, activation):
    # torch always rounds to bfloat16, ours only on GPUs
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    start = modern(activation=activation)
    ours, theirs = train_ours_and_torchs(5, activation)
    for (name, p), q, begin in zip(ours.named_parameters(), theirs.parameters(), start.parameters(), strict=True):
        moved = (q - begin).abs().max()
        assert moved > 1e-2, name
        assert (p - q).abs().max() <= 1e-4 * moved, name
        if ".h." not in name or p.dim() == 1:
            assert torch.equal(p, q), name  # the same kernel


def test_muon_equals_torch_up_to_bfloat16():
    start = modern()
    ours, theirs = train_ours_and_torchs(1, "relu2")
    for (name, p), q, begin in zip(ours.named_parameters(), theirs.parameters(), start.parameters(), strict=True):
        assert (p - q).norm() <= 0.03 * (q - begin).norm(), name


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 48), (1, 1, 5)])
def test_orthogonalize_keeps_singular_vectors_and_sets_values_near_one(shape):
    """Compared with the singular value decomposition in float64."""
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64)
    found = orthogonalize(matrices * torch.tensor([1e-3, 1.0, 1e3][: shape[0]]).view(-1, 1, 1)).double()
    assert found.shape == shape
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    values = u.mT @ found @ vh.mT
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    assert (values - torch.diag_embed(diagonal)).abs().max() < 1e-4
    # the Newton-Schulz polynomial applied to each singular value
    x = s / matrices.norm(dim=(-2, -1))[:, None]
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    torch.testing.assert_close(diagonal, x, rtol=0, atol=1e-4)
    assert (diagonal[s > 0.1 * s.amax(-1, keepdim=True)] > 0.6).all() and (diagonal < 1.25).all()


def test_zero_gradients_change_nothing():
    # with zero_init, the first layers of each block have zero gradients at the first step
    assert not orthogonalize(torch.zeros(2, 4, 3)).any()
    model = modern()
    optimizer = make_optimizer(model, Optimizer(**MUON | {"muon_weight_decay": 0.0}))
    before = copy.deepcopy(model.state_dict())
    model.transformer.h[0].mlp.c_fc.weight.grad = torch.zeros(48, 32)  # the other gradients are None
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert list(optimizer.state) == [model.transformer.h[0].mlp.c_fc.weight]


def test_muon_gets_the_matrices_of_the_blocks_only():
    """AdamW gets the embeddings, the head and the norms."""
    model = modern()
    optimizer = make_optimizer(model, Optimizer(**MUON))
    name_of = {id(p): name for name, p in model.named_parameters()}
    muon, adamw = (
        [name_of[id(p)] for group in optimizer.param_groups for p in group["params"] if group["use_muon"] is use]
        for use in (True, False)
    )
    assert muon == [
        f"transformer.h.{i}.{layer}.weight"
        for i in range(3)
        for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert sorted(muon + adamw) == sorted(name_of.values())
    assert not any(
        p is q
        for group in optimizer.param_groups
        if group["use_muon"]
        for p in group["params"]
        for q in (model.transformer.wte.weight, model.lm_head.weight)
    )
    # frozen parameters are in no group
    model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    left = [p for group in make_optimizer(model, Optimizer(**MUON)).param_groups for p in group["params"]]
    assert len(left) == len(name_of) - 1


def test_muon_continues_exactly_from_its_state_dict():
    ours, twin = modern(), modern()
    optimizer = make_optimizer(ours, Optimizer(**MUON))
    for t in range(3):
        give_gradients((ours,), t)
        optimizer.step()
    twin.load_state_dict(ours.state_dict())
    other = make_optimizer(twin, Optimizer(**MUON))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for t in range(3, 6):
        give_gradients((ours, twin), t)
        optimizer.step()
        other.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), twin.parameters(), strict=True))
    fields = {name: set(optimizer.state[p]) for name, p in ours.named_parameters()}
    for name, found in fields.items():
        is_hidden = ".h." in name and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        assert found == ({"momentum_buffer"} if is_hidden else {"step", "exp_avg", "exp_avg_sq"}), name


def test_muon_skips_steps_with_overflowed_fp16_gradients():
    """The gradient scaler checks the gradients, because Muon, unlike a fused optimizer, does not."""
    model = modern()
    optimizer = make_optimizer(model, Optimizer(**MUON))
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    (
        scaler.scale(model(torch.zeros(1, 8, dtype=torch.long), labels=torch.zeros(1, 8, dtype=torch.long)).loss)
        * math.inf
    ).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert scaler.get_scale() == 1.0


MUON_RECIPE = SMALL | {
    "mup_base_width": 16,
    "mixed_precision": None,
    "block_size": 16,
    "dropout": 0.1,
    "norm": "rmsnorm",
    "position": "rotary",
    "activation": "relu2",
    "qk_norm": True,
    "tie_word_embeddings": False,
    "zero_init": True,
    "algorithm": "muon",
    "learning_rate": 1e-2,
    "muon_learning_rate": 0.03,
    "muon_weight_decay": 0.1,
    "schedule": "warmup_stable_decay",
    "warmup_iters": 2,
    "decay_fraction": 0.5,
    "min_lr": 0.0,
    "lr_decay_iters": 12,
    "gradient_accumulation_steps": 2,
    "max_iters": 12,
    "eval_interval": 6,
    "eval_iters": 2,
}


def test_muon_run_resumes_bitwise_equal(tmp_path, monkeypatch, capsys):
    """The run uses mup_base_width, so that there are more parameter groups."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the sea, the sea; a ship and no sea. " * 60)
    write_recipe(tmp_path, **MUON_RECIPE, corpus="text.txt")
    undisturbed, resumed = Path("runs/undisturbed"), Path("runs/resumed")
    assert main(["train", "tiny.yaml", f"out_dir={undisturbed}"]) == 0
    assert main(["train", "tiny.yaml", f"out_dir={resumed}", "max_iters=6"]) == 0
    assert main(["train", str(resumed), "max_iters=12"]) == 0
    saved = [tensors(checkpoint(run, 12)) for run in (undisturbed, resumed)]
    assert saved[0].keys() == saved[1].keys()
    assert {file for file, _ in saved[0]} == {"model.safetensors", os.path.join("state", "optimizer.safetensors")}
    assert [key for key in saved[0] if not torch.equal(saved[0][key], saved[1][key])] == []
    found = losses(undisturbed)
    assert found == losses(resumed) and len(found) == 12 and found[11] < 0.8 * found[0]
    rates = {line["step"]: line["learning_rate"] for line in numbers(undisturbed) if "loss" in line}
    assert rates == pytest.approx({step: 1e-2 * min(1, (step + 1) / 3, (12 - step) / 6) for step in range(12)})
    printed = capsys.readouterr()
    assert "muP: n_embd is 2 times mup_base_width=16; " in printed.out
    assert main(["train", str(resumed), "max_iters=13", "mup_base_width=none"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.mup_base_width=None: " in line and "set mup_base_width=16" in line
