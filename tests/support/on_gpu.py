"""What the tests in tests/gpu share: the device, and short runs of recipes/shakespeare_char.yaml.

With NANOGPT_ACCEL_GPU_DRY=1, the same tests run on the CPU with tiny models, to test the tests.
"""

import json
import os
import string

import torch
from runs import make_text
from shared import REPOSITORY

IS_DRY = os.environ.get("NANOGPT_ACCEL_GPU_DRY") == "1"
DEVICE = "cpu" if IS_DRY else "cuda"
RECIPE = REPOSITORY / "recipes" / "shakespeare_char.yaml"
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 4}


def short_run(text, out_dir, **changes):
    """Return settings that make RECIPE short, without dropout and torch.compile. text: a file from write_text."""
    settings = {
        "corpus": str(text),
        "data_dir": str(text.parent / "tokens"),
        "out_dir": str(out_dir),
        "device": DEVICE,
        "mixed_precision": "bf16",
        "compile": False,
        "dropout": 0.0,
        "max_iters": 20,
        "warmup_iters": 10,
        "eval_interval": 1000,
        "eval_iters": 2,
        "log_interval": 1,
        "sample_tokens": 0,
        "keep_last": 1,
    }
    return settings | (TINY if IS_DRY else {}) | changes


def write_text(path):
    """Write documents with as many different characters as tiny Shakespeare has."""
    letters = string.ascii_letters + "!$&',-.:;?3"
    documents = [make_text(400, letters, seed) for seed in range(100)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def step_losses(lines):
    """Return the training losses in metrics.jsonl, in the order of the steps."""
    return [line["loss"] for line in lines if "loss" in line]


def largest_difference(ours, theirs):
    assert len(ours) == len(theirs)
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


class NoSynchronization(torch.utils._python_dispatch.TorchDispatchMode):
    """Raise an error if a value is read from a tensor: torch.cuda.set_sync_debug_mode for the dry form."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"{function} would wait for the GPU")
        return function(*args, **(kwargs or {}))
