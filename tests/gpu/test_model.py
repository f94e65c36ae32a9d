"""The model, sampling and Muon on a GPU, compared with the stock models of transformers and with torch's Muon."""

import pytest
import torch
from on_gpu import DEVICE
from stock_models import T_MAX, N, save_stock
from torch.nn import functional as F

from nanogpt_accel.batches import model_inputs
from nanogpt_accel.models.generation import generate
from nanogpt_accel.models.load import load_model
from nanogpt_accel.muon import Muon

pytestmark = pytest.mark.gpu
EOT = N - 1
ARCHITECTURES = ["gpt2", "llama", "qwen3", "nanochat"]


@pytest.fixture
def pair(request, tmp_path):
    """Return a model of transformers, and the GPT with the same weights."""
    torch.set_float32_matmul_precision("highest")  # no TF32
    theirs = save_stock(request.param, tmp_path / "theirs")
    return theirs.to(DEVICE), load_model(tmp_path / "theirs").eval().to(DEVICE)


def random_ids(*shape):
    return torch.randint(0, EOT, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("pair", ARCHITECTURES, indirect=True)
def test_logits_and_gradients_equal_those_of_transformers(pair):
    theirs, ours = pair
    ids = random_ids(4, T_MAX).to(DEVICE)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-3)  # of logits of up to 100
    losses = [model(ids, labels=ids).loss for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    grads = [model.get_input_embeddings().weight.grad for model in (ours, theirs)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-4)
    assert (grads[0] - grads[1]).norm() < 1e-3 * grads[1].norm()


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("pair", ARCHITECTURES, indirect=True)
def test_document_mask_equals_the_documents_one_by_one(pair, autocast):
    theirs, ours = pair
    rows = random_ids(3, T_MAX + 1)
    borders = [[7, 8, 20], [], [1, T_MAX - 1]]  # where documents start
    for row, starts in zip(rows, borders, strict=True):
        row[starts] = EOT
    total = 0.0
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        masked, unmasked = ours(**model_inputs(rows, DEVICE, EOT)), ours(**model_inputs(rows, DEVICE))
        for row, starts in zip(rows.to(DEVICE), borders, strict=True):
            for start, stop in zip([0, *starts], [*starts, T_MAX], strict=True):
                logits = theirs(row[None, start:stop]).logits[0].float()
                total += F.cross_entropy(logits, row[start + 1 : stop + 1], reduction="sum").item()
    assert masked.loss.item() == pytest.approx(total / (3 * T_MAX), rel=2e-2 if autocast else 1e-4)
    assert (masked.logits - unmasked.logits).abs().max() > 1  # so the mask does something


@pytest.mark.parametrize("pair", ARCHITECTURES, indirect=True)
def test_greedy_texts_equal_those_of_transformers(pair):
    theirs, ours = pair
    prompts, n_new = [random_ids(length).tolist() for length in (5, 2, 9)], 16
    texts = generate(ours, prompts, seeds=[0, 1, 2], vocab_size=N, max_new_tokens=n_new, temperature=0, overflow="stop")
    for prompt, text in zip(prompts, texts, strict=True):  # a batch with padding, compared with one prompt at a time
        expected = theirs.generate(
            torch.tensor([prompt], device=DEVICE),
            max_new_tokens=n_new,
            min_new_tokens=n_new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        assert text == expected[0, len(prompt) :].tolist()


def test_muon_equals_torchs_up_to_bfloat16():
    torch.manual_seed(0)
    shapes = [(128, 128), (128, 512), (512, 128), (128, 128)]
    first = [torch.randn(shape, device=DEVICE) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in first] for _ in range(2))
    settings = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    optimizers = [
        Muon([{"params": ours, "use_muon": True, "rows": [[len(p)] for p in ours], "lr_scale": 1.0, **settings}]),
        torch.optim.Muon(theirs, **settings),
    ]
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, start in zip(ours, theirs, first, strict=True):
        assert (p - q).norm() < 0.03 * (q - start).norm()
