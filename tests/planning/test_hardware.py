"""The table of GPUs, and the name and peak memory of the current device."""

import numpy as np
import pytest
import torch

from nanogpt_accel.planning.hardware import GPUS, device_name, peak_flops, peak_memory


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_finds_its_own_row(name):  # so specific names must come before general ones
    assert peak_flops(f"NVIDIA {name} 80GB") == GPUS[name].peak_flops
    assert GPUS[name].memory >= 16 and GPUS[name].has_bf16 == (name not in ("V100", "T4"))


@pytest.mark.parametrize(
    ("name", "flops"),
    [  # dense bf16, NVIDIA's and AMD's data sheets
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A40", 150e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA RTX 6000 Ada Generation", 364e12),
        ("AMD Instinct MI300X", 1307e12),
        ("Tesla T4", 65e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("CPU", None),
        ("MPS", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("", None),
    ],
)
def test_peak_flops_of_the_names_that_torch_reports(name, flops):
    assert peak_flops(name) == flops


@pytest.mark.parametrize(
    "name",
    [
        "Quadro RTX 4000",
        "NVIDIA RTX A4000",
        "NVIDIA RTX A1000",
        "NVIDIA RTX 4000 Ada Generation",
        "NVIDIA T400",
        "NVIDIA T400 4GB",
        "NVIDIA A16",
        "NVIDIA A2",
        "NVIDIA GeForce RTX 4080",
        "NVIDIA T1000",
    ],
)
def test_a_device_that_is_not_in_the_table_has_no_peak(name):
    assert peak_flops(name) is None


def test_device_name_without_a_gpu():
    assert device_name(torch.device("cpu")) == "CPU"


def test_peak_memory_is_in_bytes():
    peak = peak_memory(torch.device("cpu"))
    block = np.ones(64 * 2**20, dtype=np.uint8)
    assert peak_memory(torch.device("cpu")) >= peak > 10 * 2**20  # bytes, not kilobytes
    assert peak < 2**37 and len(block)
