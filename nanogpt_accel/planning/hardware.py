"""A table of GPUs, and functions that return the name, the peak FLOP/s and the peak memory of a device."""

import re
import sys
from typing import NamedTuple


class GPU(NamedTuple):
    peak_flops: float  # from the data sheet: dense matrix products in bf16, or in fp16 on GPUs without bf16
    memory: int  # GiB of the largest variant
    has_bf16: bool = True  # native, not emulated


# the function peak_flops uses the first name that matches, so "H100 PCIe" must come before "H100"
GPUS = {
    "GB200": GPU(2500e12, 186),
    "B200": GPU(2250e12, 180),
    "GH200": GPU(989e12, 96),
    "H200": GPU(989e12, 141),
    "H100 PCIe": GPU(756e12, 80),
    "H100 NVL": GPU(835e12, 94),
    "H100": GPU(989e12, 80),
    "H800": GPU(989e12, 80),
    "A100": GPU(312e12, 80),
    "A800": GPU(312e12, 80),
    "L40S": GPU(362e12, 48),
    "L40": GPU(181e12, 48),
    "L4": GPU(121e12, 24),
    "A10G": GPU(70e12, 24),
    "A10": GPU(125e12, 24),
    "A40": GPU(150e12, 48),
    "RTX 6000 Ada": GPU(364e12, 48),
    "RTX A6000": GPU(155e12, 48),
    "RTX 5090": GPU(209e12, 32),
    "RTX 4090": GPU(165e12, 24),
    "RTX 3090": GPU(71e12, 24),
    "MI300X": GPU(1307e12, 192),
    "MI250X": GPU(383e12, 128),
    "V100": GPU(125e12, 32, has_bf16=False),
    "T4": GPU(65e12, 16, has_bf16=False),
}


def peak_flops(device_name):
    """Return the peak FLOP/s of the device with this name, or None if the device is not in the table."""
    # match complete words: an RTX A4000 is not an A40
    return next((gpu.peak_flops for name, gpu in GPUS.items() if re.search(rf"\b{name}\b", device_name)), None)


def device_name(device):
    """Return the name of a CUDA device. For other devices, return their type in upper case, such as CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return device.type.upper()


def peak_memory(device):
    """Return the peak bytes allocated on a CUDA device. For other devices, return the peak resident memory of this
    process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
