"""What torch leaves undone on CPUs.

`tune`, for training, makes the step of nanoGPT's CPU setting a third shorter in float32 on 2 cores of an AMD EPYC with
AVX-512 (36 ms without it, 24 with), and half as long in bfloat16 on 2 of an Intel Xeon with AMX (40 ms and 20).
`tune_generation` is for sampling. Nothing here changes what is computed, only how floats are rounded.
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
    """Make a model that trains on the CPU faster in place; leave any other as it is.

    Returns:
        What was done, in words for the log; empty where nothing was.
    """
    if accelerator.device.type != "cpu":
        return ""
    done = []
    if keep_memory():
        done.append("memory kept between steps")
    if accelerator.mixed_precision == "no" and compile is not True and has_slow_mkl():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDNNLinear  # the same parameters under the same names, another forward
        done.append("linear layers by oneDNN")
    if accelerator.mixed_precision == "bf16" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("sdpa_float32_backward")
    return ", ".join(done)


def tune_generation(model):
    """Make a model on the CPU faster at one token at a time, in place; elsewhere leave it as it is. Not for training.

    Then a linear layer is a matrix times a vector, which takes as long as it takes to read the matrix. MKL reads one
    that widens 1.4 times as fast, and the head twice as fast, where the input dimension comes first in memory.
    (Measured on 2 cores: 13 and 19 GB/s for 768 x 3072, float32.)
    """
    if model.device.type != "cpu":
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.out_features > module.in_features:
            module.weight.data = module.weight.data.t().contiguous().t()  # the same matrix, laid out by columns


def keep_memory():
    """Tell glibc's malloc to keep what is freed. Otherwise every step gives its activations back to the system and
    gets them again page by page: 2,500 page faults a step. Returns False where there is no such malloc."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 2**30) and mallopt(M_TRIM_THRESHOLD, 2**30))


def has_slow_mkl():
    """True on AMD processors with AVX-512: MKL, torch's default for float32, does not use it there; oneDNN does."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else platform.processor()
    return "AuthenticAMD" in text


class OneDNNLinear(nn.Linear):
    """nn.Linear whose three products are oneDNN's, through the operator that torch.compile uses on CPUs."""

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
        rows = grad.reshape(-1, grad.shape[-1])  # (M, N)
        grad_x = _times(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            x = x.reshape(-1, x.shape[-1])  # (M, K)
            # the first operand is copied, so let it be the smaller one
            if rows.shape[1] <= x.shape[1]:
                grad_weight = _times(rows.t(), x.t())  # (N, K)
            else:
                grad_weight = _times(x.t(), rows.t()).t()
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias


def _times(x, weight, bias=None):
    """x @ weight.T + bias."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def sdpa_float32_backward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """transformers' "sdpa" for training in bfloat16 on a CPU, where torch's backward pass of it takes five times as
    long as in float32 (12 x 4 heads, 64 x 32 each: 4.8 ms and 0.9), for its matrices are too small for AMX.

    query: (B, nh, T, hs), key and value: (B, nkv, T, hs). Returns (B, T, nh, hs), and None for the weights.
    """
    if query.dtype != torch.bfloat16 or not (torch.is_grad_enabled() and query.requires_grad):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if attention_mask is not None or dropout > 0:  # for these torch has other kernels, which are slow both ways
        with torch.autocast("cpu", enabled=False):
            y, _ = sdpa_attention_forward(
                module, query.float(), key.float(), value.float(), attention_mask, dropout, scaling, **kwargs
            )
        return y.to(query.dtype), None
    if module.num_key_value_groups > 1:
        key = key.repeat_interleave(module.num_key_value_groups, dim=1)  # (B, nh, T, hs)
        value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    return _CausalAttention.apply(query, key, value, scaling).transpose(1, 2), None


class _CausalAttention(torch.autograd.Function):
    """The operators of scaled_dot_product_attention on CPUs, forward as they are, backward in float32."""

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
