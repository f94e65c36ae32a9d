"""cpu.py: linear layers by oneDNN against torch's own, and which models are left alone."""

import copy
import resource
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nanogpt_accel import cpu
from nanogpt_accel.cpu import OneDNNLinear
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
@pytest.mark.parametrize("n_out", [32, 192])  # one branch of the weight's gradient each
def test_it_is_nn_linear(shape, n_out, bias):
    plain, ours = twins(48, n_out, bias)
    x = torch.randn(shape)
    grad = torch.randn(*shape[:-1], n_out)
    inputs = [x.clone().requires_grad_() for _ in range(3)]
    exact = copy.deepcopy(plain).double()
    outputs = [plain(inputs[0]), ours(inputs[1]), exact(inputs[2].double())]
    for output, g in zip(outputs, (grad, grad, grad.double()), strict=True):
        output.backward(g)
    assert outputs[1].shape == outputs[0].shape and outputs[1].dtype == torch.float32
    for what in (lambda i, m, o: o, lambda i, m, o: i.grad, lambda i, m, o: m.weight.grad,
                 lambda i, m, o: m.bias.grad if bias else None):
        found = [what(i, m, o) for i, m, o in zip(inputs, (plain, ours, exact), outputs, strict=True)]
        if found[0] is None:
            assert found[1] is None
            continue
        scale = found[2].abs().max()
        assert (found[1] - found[0]).abs().max() <= 1e-5 * scale
        assert (found[1] - found[2]).abs().max() <= 1e-5 * scale  # and as near to the truth


@needs_mkldnn
def test_inputs_in_any_layout():
    plain, ours = twins(48, 32, True)
    wide = torch.randn(6, 5, 3 * 48)
    for x in (torch.randn(48, 7).t(), wide[..., 48:96], wide[::2, :, :48], torch.randn(1, 48).expand(9, 48)):
        assert not x.is_contiguous()
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
    # and gradients that come back transposed or expanded
    x = torch.randn(7, 48)
    for reduce in (lambda y: (y.t() * torch.arange(7.0)).sum(), lambda y: y.sum()):
        grads = [torch.autograd.grad(reduce(m(x)), m.parameters()) for m in (plain, ours)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-4)


@needs_mkldnn
def test_only_the_gradients_that_are_needed():
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
def test_repeatable_to_the_bit():
    _, ours = twins(48, 32, True)
    x, grad = torch.randn(40, 8, 48), torch.randn(40, 8, 32)

    def once():
        mine = x.clone().requires_grad_()
        output = ours(mine)
        return [output, *torch.autograd.grad(output, [mine, *ours.parameters()], grad)]

    first = once()
    for _ in range(5):
        torch.empty(1_000_003).fill_(1.0)  # other memory, other alignment
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@needs_mkldnn
def test_a_model_computes_the_same(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=32, bias=True))
    ids = torch.randint(64, (4, 16))
    twin = copy.deepcopy(model)
    monkeypatch.setattr(cpu, "keep_memory", lambda: False)
    monkeypatch.setattr(cpu, "has_slow_mkl", lambda: True)
    assert cpu.tune(twin, SimpleNamespace(device=torch.device("cpu"), mixed_precision="no")) == (
        "linear layers by oneDNN")
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


@pytest.mark.parametrize(("device", "precision", "compile"), [
    ("cuda", "no", False), ("mps", "no", False), ("cpu", "bf16", False), ("cpu", "fp16", False), ("cpu", "no", True)])
def test_the_layers_of_others_are_left_alone(monkeypatch, device, precision, compile):
    monkeypatch.setattr(cpu, "keep_memory", lambda: device == "cpu" or pytest.fail("looked at this CPU"))
    monkeypatch.setattr(cpu, "has_slow_mkl", lambda: pytest.fail("looked at this CPU"))
    model = nn.Sequential(nn.Linear(4, 4))
    accelerator = SimpleNamespace(device=SimpleNamespace(type=device), mixed_precision=precision)
    said = cpu.tune(model, accelerator, compile)
    assert said == ("memory kept between steps" if device == "cpu" else "") and type(model[0]) is nn.Linear


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("slow", [True, False])
def test_tune_says_what_it_did(monkeypatch, memory, slow):
    class Special(nn.Linear):
        pass

    monkeypatch.setattr(cpu, "keep_memory", lambda: memory)
    monkeypatch.setattr(cpu, "has_slow_mkl", lambda: slow)
    model = nn.Sequential(nn.Linear(4, 4), Special(4, 4), nn.LayerNorm(4))
    said = cpu.tune(model, SimpleNamespace(device=torch.device("cpu"), mixed_precision="no"), "auto")
    assert ("memory" in said, "oneDNN" in said) == (memory, slow)
    # another class's forward is not taken from it
    assert [type(m) for m in model] == [OneDNNLinear if slow else nn.Linear, Special, nn.LayerNorm]


@pytest.mark.parametrize(("capability", "mkldnn", "vendor", "expected"), [
    ("AVX512", True, "AuthenticAMD", True), ("AVX512", True, "GenuineIntel", False),
    ("AVX2", True, "AuthenticAMD", False), ("AVX512", False, "AuthenticAMD", False)])
def test_has_slow_mkl(monkeypatch, tmp_path, capability, mkldnn, vendor, expected):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nvendor_id : {vendor}\n")
    monkeypatch.setattr(cpu, "Path", lambda name: tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: mkldnn)
    assert cpu.has_slow_mkl() is expected


def test_memory_is_kept():
    if not cpu.keep_memory():
        pytest.skip("this C library has no mallopt")

    def faults(size):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(size // 4).fill_(1.0)  # freed at once
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    # 40 MiB, which glibc by itself maps anew each time: 10,240 pages of 4 kB. It takes a few rounds until all free
    # places that are large enough have been used once
    size = 40 * 2**20
    assert min(sum(faults(size) for _ in range(5)) for _ in range(8)) < 500


def test_without_mallopt_nothing_happens(monkeypatch):
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda name: SimpleNamespace())
    assert cpu.keep_memory() is False


@needs_mkldnn
def test_loss_and_linear_of_one_row():
    # a single token, as generate with a cache feeds it
    plain, ours = twins(48, 32, False)
    x = torch.randn(1, 1, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), F.linear(x, plain.weight), rtol=1e-5, atol=1e-6)
