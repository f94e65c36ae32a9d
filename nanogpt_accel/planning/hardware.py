"""One table of GPUs, and what the current device is and uses."""

import re
import sys

# Dense bf16 (fp16 on the older two) tensor-core peak in FLOP/s, from the makers' data sheets. The first name
# that is part of the device's name counts, so the more special ones stand first.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 150e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 155e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
    "V100": 125e12,
    "T4": 65e12,
}

# What a GPU's name stands for, in GiB by the makers' data sheets; of those that come in two sizes the larger one. The
# names are those of metrics.PEAK_FLOPS.
GPU_MEMORY = {
    "GB200": 186,
    "B200": 180,
    "GH200": 96,
    "H200": 141,
    "H100 PCIe": 80,
    "H100 NVL": 94,
    "H100": 80,
    "H800": 80,
    "A100": 80,
    "A800": 80,
    "L40S": 48,
    "L40": 48,
    "L4": 24,
    "A10G": 24,
    "A10": 24,
    "A40": 48,
    "RTX 6000 Ada": 48,
    "RTX A6000": 48,
    "RTX 5090": 32,
    "RTX 4090": 24,
    "RTX 3090": 24,
    "MI300X": 192,
    "MI250X": 128,
    "V100": 32,
    "T4": 16,
}


def peak_flops(device_name):
    """Peak FLOP/s of a device by its name, or None for one that is not in the table."""
    # as words of their own: an RTX A4000 is no A40
    return next((flops for name, flops in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


def device_name(device):
    """A torch.device's name: the GPU's, or the processor's kind."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return device.type.upper()


def peak_memory(device):
    """Bytes: the largest amount allocated on a CUDA device so far, elsewhere the process's largest resident size."""
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
