"""document_mask: with attention within documents only, a batch gives the same results as each document alone."""

import json

import pytest
import torch
from runs import val_losses, write_recipe
from torch.nn import functional as F

from nanogpt_accel.__main__ import main
from nanogpt_accel.batches import model_inputs
from nanogpt_accel.model import GPT, GPTConfig

EOT = 9
ROWS = torch.tensor(
    [
        [3, 1, 4, EOT, 5, 2, 6, 5, EOT, EOT, 3, 5, 8],  # the end of a document, a complete one, an empty one, ...
        [EOT, 7, 7, 1, 2, 3, 4, 5, 6, 7, 8, 1, EOT],
        [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5],
    ]
)
SHAPES = {"gpt2": {}, "llama": dict(norm="rmsnorm", position="rotary", activation="swiglu", n_kv_head=2)}


def model(**shape):
    torch.manual_seed(3)
    return GPT(GPTConfig(vocab_size=10, block_size=16, n_layer=2, n_head=4, n_embd=32, initializer_range=0.3, **shape))


def test_positions_restart_with_each_document():
    inputs = model_inputs(ROWS, eot_id=EOT)
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0, 0, 1, 2], list(range(12)), list(range(12))]
    assert torch.equal(inputs["input_ids"], ROWS[:, :-1]) and torch.equal(inputs["shift_labels"], ROWS[:, 1:])
    assert model_inputs(ROWS).keys() == {"input_ids", "shift_labels"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
def test_masked_loss_equals_the_documents_one_by_one(shape, attention):
    gpt = model(**SHAPES[shape])
    gpt.set_attn_implementation(attention)
    inputs = model_inputs(ROWS, eot_id=EOT)
    masked = gpt(**inputs)
    losses = []
    for row in ROWS:
        borders = [0] + [i for i in range(1, 12) if row[i] == EOT] + [12]
        for start, stop in zip(borders, borders[1:], strict=False):
            alone = gpt(input_ids=row[None, start:stop]).logits[0]
            losses.append(F.cross_entropy(alone, row[start + 1 : stop + 1], reduction="sum"))
    assert masked.loss.item() == pytest.approx(sum(losses).item() / 36, rel=1e-5)
    unmasked = gpt(**model_inputs(ROWS)).loss.item()
    assert abs(unmasked - masked.loss.item()) > 1e-2  # so the test would notice a mask that masks nothing


def test_no_gradient_crosses_a_document_boundary():
    gpt = model()
    embeddings = gpt.get_input_embeddings()(ROWS[:1, :-1]).detach().requires_grad_()
    positions = model_inputs(ROWS[:1], eot_id=EOT)["position_ids"]
    gpt(inputs_embeds=embeddings, position_ids=positions).logits[0, 7].sum().backward()
    assert embeddings.grad[0].abs().sum(-1).ne(0).tolist() == [3 <= i <= 7 for i in range(12)]


def write_tiny(folder, **data):
    shape = {"n_embd": 32, "block_size": 32, "dropout": None, "batch_size": 4}
    write_recipe(folder, **shape, max_iters=2, eval_interval=2, eval_iters="all", **data)


def test_training_and_evaluate_use_the_mask(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = [" ".join("abcdefgh"[i % 8] * (i % 7 + 1) for i in range(n)) for n in range(3, 60)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_tiny(tmp_path, corpus="texts.jsonl", val_fraction=0.2)
    losses = {}
    for mask in ("true", "false"):
        assert main(["train", "tiny.yaml", f"document_mask={mask}", f"out_dir={mask}"]) == 0
        losses[mask] = val_losses(mask)
    assert all(abs(a - b) > 1e-7 for a, b in zip(*losses.values(), strict=True))
    capsys.readouterr()
    assert main(["evaluate", "true", "--json"]) == 0  # with document_mask, which run.yaml contains
    assert json.loads(capsys.readouterr().out)["val_loss"] == pytest.approx(losses["true"][-1], rel=1e-5)
    assert main(["evaluate", "true", "--json", "document_mask=false"]) == 0
    assert json.loads(capsys.readouterr().out)["val_loss"] != pytest.approx(losses["true"][-1], rel=1e-7)


def test_document_mask_needs_a_corpus_of_documents(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("abcdefgh" * 200)
    write_tiny(tmp_path, corpus="one.txt", document_mask=True)
    assert main(["train", "tiny.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "data.document_mask=true" in line and "no end-of-text tokens" in line
