"""What torch leaves undone on CPUs.

`tune`, for training, makes a small GPT's step a third shorter: 36 ms without it, 24 with, for nanoGPT's CPU setting
on 2 cores of an AMD EPYC with AVX-512. `tune_generation` is for sampling.
Nothing here changes what is computed, only in which order floats are summed.
"""

import ctypes
import platform
from pathlib import Path

import torch
from torch import nn


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
