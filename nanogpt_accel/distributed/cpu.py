"""Make training and sampling on CPUs faster. The results change only by rounding.

With the CPU settings in nanoGPT's README, `tune` reduces the time per step from 36 to 24 ms in float32 on 2 cores of an
AMD EPYC with AVX-512, and from 40 to 20 ms in bfloat16 on 2 cores of an Intel Xeon with AMX. `tune_generation` is for
sampling.
"""

import ctypes
import platform
from pathlib import Path

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def tune(model, accelerator, compile=False):
    """Change a model on the CPU, in place, so that it trains faster. Return the changes as text for the log, or ""."""
    if accelerator.device.type != "cpu":
        return ""
    changes = []
    if keep_memory():
        changes.append("memory kept between steps")
    if accelerator.mixed_precision == "no" and compile is not True and has_slow_mkl():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDNNLinear  # the parameters and their names stay the same
        changes.append("linear layers with oneDNN")
    if accelerator.mixed_precision == "bf16" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("sdpa_float32_backward")
    return ", ".join(changes)


def tune_generation(model):
    """Change a model on the CPU, in place, so that it generates faster. Do not use it for training.

    For one token at a time, a linear layer multiplies a matrix by a vector, and reading the matrix limits the speed. If
    out_features > in_features, MKL reads the matrix 1.4 times as fast if it is column-major (19 instead of 13 GB/s for
    768 x 3072 in float32 on 2 cores). For the lm_head, the factor is 2.
    """
    if model.device.type != "cpu":
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.out_features > module.in_features:
            module.weight.data = module.weight.data.t().contiguous().t()  # column-major


def keep_memory():
    """Let glibc's malloc keep freed memory, and return whether that is supported. By default, every step returns the
    memory of its activations to the system and gets it back page by page: 2,500 page faults per step."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 2**30) and mallopt(M_TRIM_THRESHOLD, 2**30))


def has_slow_mkl():
    """Return whether this is an AMD CPU with AVX-512. On AMD CPUs, MKL (torch's default) does not use AVX-512, but
    oneDNN does."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else platform.processor()
    return "AuthenticAMD" in text


class OneDNNLinear(nn.Linear):
    """An nn.Linear that uses oneDNN in the forward and the backward pass, with the same operator as torch.compile."""

    def forward(self, x):
        return _OneDNNLinear.apply(x, self.weight, self.bias)


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):  # (..., K), (N, K), (N,)
        ctx.save_for_backward(x, weight)
        return _times(x, weight, bias)  # (..., N)

    @staticmethod
    def backward(ctx, grad):  # (..., N)
        x, weight = ctx.saved_tensors
        rows, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])  # (M, N), (M, K)
        grad_x = _times(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            # (N, K); oneDNN copies the first operand of the product, so make the smaller one the first
            is_smaller = rows.shape[1] <= x.shape[1]
            grad_weight = _times(rows.t(), x.t()) if is_smaller else _times(x.t(), rows.t()).t()
        return grad_x, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def _times(x, weight, bias=None):
    """Return x @ weight.T + bias, computed with oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def sdpa_float32_backward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Compute attention like transformers' "sdpa", but with the backward pass in float32. This is faster on CPUs with
    AMX: for 12 sequences of 64 tokens with 4 heads of size 32, the backward pass takes 0.9 ms in float32 and 4.8 ms in
    bfloat16.

    query: (B, nh, T, hs), key and value: (B, nkv, T, hs). Returns ((B, T, nh, hs), None), without attention weights.
    """
    if query.dtype != torch.bfloat16 or not (torch.is_grad_enabled() and query.requires_grad):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if attention_mask is not None or dropout > 0:  # torch's bfloat16 kernels for these cases are slow
        inputs = query.float(), key.float(), value.float()
        with torch.autocast("cpu", enabled=False):
            y, _ = sdpa_attention_forward(module, *inputs, attention_mask, dropout, scaling, **kwargs)
        return y.to(query.dtype), None
    if module.num_key_value_groups > 1:
        key = key.repeat_interleave(module.num_key_value_groups, dim=1)  # (B, nh, T, hs)
        value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    return _CausalAttention.apply(query, key, value, scaling).transpose(1, 2), None


class _CausalAttention(torch.autograd.Function):
    """Causal attention with the CPU kernels of scaled_dot_product_attention. The backward pass is in float32."""

    @staticmethod
    def forward(ctx, query, key, value, scaling):  # (B, nh, T, hs) each
        y, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, is_causal=True, scale=scaling
        )
        ctx.save_for_backward(query, key, value, y, logsumexp)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx, grad):
        *tensors, logsumexp = ctx.saved_tensors
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad.float(), *(tensor.float() for tensor in tensors), logsumexp, 0.0, is_causal=True, scale=ctx.scaling
        )
        return *(g.to(grad.dtype) for g in grads), None


AttentionInterface.register("sdpa_float32_backward", sdpa_float32_backward)
AttentionMaskInterface.register("sdpa_float32_backward", sdpa_mask)
