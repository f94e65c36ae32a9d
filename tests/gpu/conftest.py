"""Fixtures for the tests that need a GPU."""

import pytest
import torch
from on_gpu import IS_DRY, write_text


@pytest.fixture(autouse=True)
def gpu(request):
    """Skip tests with the marker `gpu` on a machine without a GPU."""
    if request.node.get_closest_marker("gpu") and not (IS_DRY or torch.cuda.is_available()):
        pytest.skip("torch finds no CUDA device; NANOGPT_ACCEL_GPU_DRY=1 runs these tests on the CPU")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture
def backend(monkeypatch):
    """In the dry form, let compile=true only trace the model, because Inductor takes a minute on a CPU."""
    if IS_DRY:
        import accelerate.utils

        plugin = accelerate.utils.TorchDynamoPlugin

        def traced(backend, **options):
            return plugin(backend="eager" if backend == "inductor" else backend, **options)

        monkeypatch.setattr(accelerate.utils, "TorchDynamoPlugin", traced)
    torch._dynamo.reset()
