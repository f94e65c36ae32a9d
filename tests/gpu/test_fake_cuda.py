"""Devices and dtypes on CUDA without a GPU: a CUDA build of torch runs the forward pass on fake tensors.

The backward pass needs a device. These tests run by default, if torch is a CUDA build.
"""

import pytest
import torch
from families import LENGTH, config_of
from torch._subclasses.fake_tensor import FakeTensorMode

from nanogpt_accel.model import GPT

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this build of torch has no CUDA")


@pytest.fixture
def autocast():
    """Autocast to bfloat16 on CUDA. torch.autocast would disable itself without a GPU."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", False)
    torch.clear_autocast_cache()


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "document_mask"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "nanochat"])
def test_forward_pass_stays_on_cuda(autocast, family, masked):
    with FakeTensorMode():
        with torch.device("cuda"):
            model = GPT(config_of(family))
            rows = torch.zeros(2, LENGTH + 1, dtype=torch.long)
        inputs = {"input_ids": rows[:, :-1], "shift_labels": rows[:, 1:]}
        if masked:
            inputs["position_ids"] = torch.ones_like(rows[:, 1:]).cumsum(1) - 1
        output = model(**inputs)
        has_softcap = model.config.logit_softcap is not None  # computed in float32, if there are labels
        assert output.logits.dtype == (torch.float32 if has_softcap else torch.bfloat16)
        model.largest_logits = 2 * LENGTH * 100  # the chunked loss
        for loss in (output.loss, model(**inputs, return_logits=False).loss):
            assert loss.device == torch.device("cuda", 0) and loss.dtype == torch.float32 and loss.shape == ()
