"""cpu.py: linear layers with oneDNN and attention in bfloat16 compared with torch's, and models that stay unchanged."""

import copy
import resource
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nanogpt_accel.distributed import cpu
from nanogpt_accel.distributed.cpu import OneDNNLinear, sdpa_float32_backward
from nanogpt_accel.model import GPT, GPTConfig

needs_mkldnn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def twins(n_in, n_out, bias):
    torch.manual_seed(0)
    plain = nn.Linear(n_in, n_out, bias=bias)
    other = copy.deepcopy(plain)
    other.__class__ = OneDNNLinear
    return plain, other


@needs_mkldnn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (64, 48), (4, 16, 48), (1, 1, 48), (2, 3, 4, 48)])
@pytest.mark.parametrize("n_out", [32, 192])  # one value for each branch of the weight gradient
def test_onednn_linear_equals_nn_linear(shape, n_out, bias):
    plain, ours = twins(48, n_out, bias)
    x = torch.randn(shape)
    grad = torch.randn(*shape[:-1], n_out)
    inputs = [x.clone().requires_grad_() for _ in range(3)]
    exact = copy.deepcopy(plain).double()
    outputs = [plain(inputs[0]), ours(inputs[1]), exact(inputs[2].double())]
    for output, g in zip(outputs, (grad, grad, grad.double()), strict=True):
        output.backward(g)
    assert outputs[1].shape == outputs[0].shape and outputs[1].dtype == torch.float32
    for what in (
        lambda i, m, o: o,
        lambda i, m, o: i.grad,
        lambda i, m, o: m.weight.grad,
        lambda i, m, o: m.bias.grad if bias else None,
    ):
        found = [what(i, m, o) for i, m, o in zip(inputs, (plain, ours, exact), outputs, strict=True)]
        if found[0] is None:
            assert found[1] is None
            continue
        scale = found[2].abs().max()
        assert (found[1] - found[0]).abs().max() <= 1e-5 * scale
        assert (found[1] - found[2]).abs().max() <= 1e-5 * scale  # and it is as accurate


@needs_mkldnn
def test_onednn_linear_takes_any_memory_layout():
    plain, ours = twins(48, 32, True)
    wide = torch.randn(6, 5, 3 * 48)
    for x in (torch.randn(48, 7).t(), wide[..., 48:96], wide[::2, :, :48], torch.randn(1, 48).expand(9, 48)):
        assert not x.is_contiguous()
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
    # gradients may be transposed or expanded
    x = torch.randn(7, 48)
    for reduce in (lambda y: (y.t() * torch.arange(7.0)).sum(), lambda y: y.sum()):
        grads = [torch.autograd.grad(reduce(m(x)), m.parameters()) for m in (plain, ours)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-4)


@needs_mkldnn
def test_onednn_linear_computes_only_required_gradients():
    _, ours = twins(48, 32, True)
    x = torch.randn(5, 48, requires_grad=True)
    ours.requires_grad_(False)
    (grad,) = torch.autograd.grad(ours(x).sum(), x)
    torch.testing.assert_close(grad, ours.weight.sum(0).expand(5, 48))
    ours.weight.requires_grad_(True)
    ours(x.detach()).sum().backward()
    assert ours.bias.grad is None
    torch.testing.assert_close(ours.weight.grad, x.detach().sum(0).expand(32, 48))


@needs_mkldnn
def test_onednn_linear_is_bitwise_repeatable():
    _, ours = twins(48, 32, True)
    x, grad = torch.randn(40, 8, 48), torch.randn(40, 8, 32)

    def once():
        mine = x.clone().requires_grad_()
        output = ours(mine)
        return [output, *torch.autograd.grad(output, [mine, *ours.parameters()], grad)]

    first = once()
    for _ in range(5):
        torch.empty(1_000_003).fill_(1.0)  # so that memory and alignment differ
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@needs_mkldnn
def test_tuned_model_computes_the_same_and_is_saved_untuned(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=32, bias=True))
    ids = torch.randint(64, (4, 16))
    twin = copy.deepcopy(model)
    monkeypatch.setattr(cpu, "keep_memory", lambda: False)
    monkeypatch.setattr(cpu, "has_slow_mkl", lambda: True)
    assert cpu.tune(twin, SimpleNamespace(device=torch.device("cpu"), mixed_precision="no")) == (
        "linear layers with oneDNN"
    )
    assert [type(m) for m in twin.modules() if isinstance(m, nn.Linear)] == [OneDNNLinear] * 9
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert twin.lm_head.weight is twin.transformer.wte.weight
    losses = [m(ids, labels=ids).loss for m in (model, twin)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-4 * p.grad.abs().max(), name
    twin.save_pretrained(tmp_path)
    assert all(type(m) is not OneDNNLinear for m in GPT.from_pretrained(tmp_path).modules())


@pytest.mark.parametrize(
    ("device", "precision", "compile"),
    [("cuda", "no", False), ("cuda", "bf16", False), ("mps", "no", False), ("cpu", "fp16", False), ("cpu", "no", True)],
)
def test_tune_changes_no_layers_on_other_devices_or_if_compiled(monkeypatch, device, precision, compile):
    monkeypatch.setattr(cpu, "keep_memory", lambda: device == "cpu" or pytest.fail("looked at this CPU"))
    monkeypatch.setattr(cpu, "has_slow_mkl", lambda: pytest.fail("looked at this CPU"))
    model = nn.Sequential(nn.Linear(4, 4))
    accelerator = SimpleNamespace(device=SimpleNamespace(type=device), mixed_precision=precision)
    said = cpu.tune(model, accelerator, compile)
    assert said == ("memory kept between steps" if device == "cpu" else "") and type(model[0]) is nn.Linear


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("slow", [True, False])
def test_tune_reports_its_changes(monkeypatch, memory, slow):
    class Special(nn.Linear):
        pass

    monkeypatch.setattr(cpu, "keep_memory", lambda: memory)
    monkeypatch.setattr(cpu, "has_slow_mkl", lambda: slow)
    model = nn.Sequential(nn.Linear(4, 4), Special(4, 4), nn.LayerNorm(4))
    said = cpu.tune(model, SimpleNamespace(device=torch.device("cpu"), mixed_precision="no"), "auto")
    assert ("memory" in said, "oneDNN" in said) == (memory, slow)
    # a subclass keeps its forward
    assert [type(m) for m in model] == [OneDNNLinear if slow else nn.Linear, Special, nn.LayerNorm]


@pytest.mark.parametrize(
    ("capability", "mkldnn", "vendor", "expected"),
    [
        ("AVX512", True, "AuthenticAMD", True),
        ("AVX512", True, "GenuineIntel", False),
        ("AVX2", True, "AuthenticAMD", False),
        ("AVX512", False, "AuthenticAMD", False),
    ],
)
def test_has_slow_mkl_only_on_amd_with_avx512_and_onednn(monkeypatch, tmp_path, capability, mkldnn, vendor, expected):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nvendor_id : {vendor}\n")
    monkeypatch.setattr(cpu, "Path", lambda name: tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: mkldnn)
    assert cpu.has_slow_mkl() is expected


def test_keep_memory_avoids_page_faults():
    if not cpu.keep_memory():
        pytest.skip("this C library has no mallopt")

    def faults(size):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(size // 4).fill_(1.0)  # freed immediately
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    # 40 MiB, which glibc maps again each time by default: 10,240 pages of 4 kB. It takes a few rounds until all free
    # blocks that are large enough have been used once
    size = 40 * 2**20
    assert min(sum(faults(size) for _ in range(5)) for _ in range(8)) < 500


def test_keep_memory_without_mallopt_does_nothing(monkeypatch):
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda name: SimpleNamespace())
    assert cpu.keep_memory() is False


@needs_mkldnn
def test_onednn_linear_of_a_single_token():
    # as in generate with a cache
    plain, ours = twins(48, 32, False)
    x = torch.randn(1, 1, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), F.linear(x, plain.weight), rtol=1e-5, atol=1e-6)


# ---- attention in bfloat16


def heads(n_head, n_kv_head, T=48, hs=16):
    """Return queries, keys, values and a gradient in bfloat16, with the memory layout of the model."""
    torch.manual_seed(0)
    make = lambda n: torch.randn(3, T, n, hs, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()  # noqa: E731
    return make(n_head), make(n_kv_head), make(n_kv_head), torch.randn(3, T, n_head, hs, dtype=torch.bfloat16)


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_attention_in_bf16_is_as_accurate_as_torchs(n_kv_head, masked):
    q, k, v, grad = heads(4, n_kv_head)
    module = SimpleNamespace(num_key_value_groups=4 // n_kv_head, is_causal=True, training=True)
    mask = torch.ones(48, 48, dtype=torch.bool).tril()
    if masked:  # two documents
        mask[30:, :30] = False
    # exact: attention in float64, written out
    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    wide = [x.repeat_interleave(4 // n_kv_head, dim=1) for x in (k64, v64)]
    scores = (q64 @ wide[0].mT * 0.3).masked_fill(~mask, -torch.inf)
    exact = (scores.softmax(-1) @ wide[1]).transpose(1, 2)
    exact_grads = torch.autograd.grad(exact, (q64, k64, v64), grad.double())
    given = mask[None, None] if masked else None
    errors = {}
    for name, attention in (("torch", ALL_ATTENTION_FUNCTIONS["sdpa"]), ("ours", sdpa_float32_backward)):
        y, weights = attention(module, q, k, v, given, dropout=0.0, scaling=0.3)
        grads = torch.autograd.grad(y, (q, k, v), grad)
        assert weights is None and y.dtype == torch.bfloat16 and y.shape == (3, 48, 4, 16)
        assert all(g.dtype == torch.bfloat16 and g.shape == x.shape for g, x in zip(grads, (q, k, v), strict=True))
        errors[name] = [error(y, exact), *map(error, grads, exact_grads)]
    for theirs, ours in zip(errors["torch"], errors["ours"], strict=True):
        assert ours <= 0.005 and ours <= 1.1 * theirs


def test_attention_without_gradients_or_in_float32_is_torchs():
    q, k, v, _ = heads(4, 2)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True, training=True)
    theirs = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with torch.no_grad():
        assert torch.equal(sdpa_float32_backward(module, q, k, v, None)[0], theirs(module, q, k, v, None)[0])
    q, k, v = (x.detach().float().requires_grad_() for x in (q, k, v))
    ours, plain = (f(module, q, k, v, None)[0] for f in (sdpa_float32_backward, theirs))
    assert torch.equal(ours, plain) and type(ours.grad_fn) is type(plain.grad_fn)


def test_attention_uses_the_dropout_mask_of_torch():
    q, k, v, grad = heads(4, 4)
    module = SimpleNamespace(num_key_value_groups=1, is_causal=True, training=True)
    wanted = [x.detach().float().requires_grad_() for x in (q, k, v)]
    outputs = []
    for attention, inputs in ((sdpa_float32_backward, (q, k, v)), (ALL_ATTENTION_FUNCTIONS["sdpa"], wanted)):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inputs[0].dtype == torch.bfloat16):
            y, _ = attention(module, *inputs, None, dropout=0.5)
        outputs.append([y, *torch.autograd.grad(y, inputs, grad.to(y.dtype))])
    for found, exact in zip(*outputs, strict=True):
        assert error(found, exact.double()) <= 0.005


@pytest.mark.parametrize("switches", [{}, {"position": "rotary", "qk_norm": True, "norm": "rmsnorm", "n_kv_head": 1}])
def test_tuned_model_in_bf16_has_the_gradients_of_float32(switches):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=64, block_size=32, n_layer=2, n_head=2, n_embd=32, **switches))
    ids = torch.randint(64, (8, 32))
    # two documents in a row: positions restart, and the mask with them
    position_ids = torch.arange(32).remainder(20).expand(8, 32)
    for documents in ({}, {"position_ids": position_ids}):
        grads = {}
        for name in ("float32", "torch", "ours"):
            twin = copy.deepcopy(model)
            if name == "ours":
                said = cpu.tune(twin, SimpleNamespace(device=torch.device("cpu"), mixed_precision="bf16"))
                assert twin.config._attn_implementation == "sdpa_float32_backward" and "bf16" not in said
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=name != "float32"):
                loss = twin(ids, labels=ids, **documents).loss
            loss.backward()
            grads[name] = torch.cat([p.grad.flatten() for p in twin.parameters()])
        errors = {name: error(grads[name], grads["float32"].double()) for name in ("torch", "ours")}
        assert errors["ours"] <= 0.02 and errors["ours"] <= 1.1 * errors["torch"]


def test_saved_config_does_not_name_our_attention(tmp_path):
    model = GPT(GPTConfig(vocab_size=64, block_size=16, n_layer=1, n_head=2, n_embd=32))
    cpu.tune(model, SimpleNamespace(device=torch.device("cpu"), mixed_precision="bf16"))
    model.save_pretrained(tmp_path)
    assert "float32_backward" not in (tmp_path / "config.json").read_text()
    assert GPT.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
