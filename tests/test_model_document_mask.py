"""document_mask: attention that stays inside a document, against the documents one by one."""

import json

import pytest
import torch
from torch.nn import functional as F

from nanogpt_accel.__main__ import main
from nanogpt_accel.batches import model_inputs
from nanogpt_accel.model import GPT, GPTConfig
from nanogpt_accel.tracking.metrics_log import read_metrics

EOT = 9
ROWS = torch.tensor(
    [
        [3, 1, 4, EOT, 5, 2, 6, 5, EOT, EOT, 3, 5, 8],  # a document's end, a whole one, an empty one, ...
        [EOT, 7, 7, 1, 2, 3, 4, 5, 6, 7, 8, 1, EOT],
        [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5],
    ]
)
SHAPES = {"gpt2": {}, "llama": dict(norm="rmsnorm", position="rotary", activation="swiglu", n_kv_head=2)}


def model(**shape):
    torch.manual_seed(3)
    return GPT(GPTConfig(vocab_size=10, block_size=16, n_layer=2, n_head=4, n_embd=32, initializer_range=0.3, **shape))


def test_positions_begin_again_with_each_document():
    inputs = model_inputs(ROWS, eot_id=EOT)
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0, 0, 1, 2], list(range(12)), list(range(12))]
    assert torch.equal(inputs["input_ids"], ROWS[:, :-1]) and torch.equal(inputs["shift_labels"], ROWS[:, 1:])
    assert model_inputs(ROWS).keys() == {"input_ids", "shift_labels"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_is_its_documents_one_by_one(shape, attention):
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
    assert abs(unmasked - masked.loss.item()) > 1e-2  # so a mask that masks nothing would show


def test_nothing_of_another_document_reaches_a_token():
    gpt = model()
    embeddings = gpt.get_input_embeddings()(ROWS[:1, :-1]).detach().requires_grad_()
    positions = model_inputs(ROWS[:1], eot_id=EOT)["position_ids"]
    gpt(inputs_embeds=embeddings, position_ids=positions).logits[0, 7].sum().backward()
    assert embeddings.grad[0].abs().sum(-1).ne(0).tolist() == [3 <= i <= 7 for i in range(12)]


RECIPE = """
data: {corpus: texts.jsonl, tokenizer: char, val_fraction: 0.2}
model: {n_layer: 1, n_embd: 32, n_head: 2, block_size: 32}
optimizer: {warmup_iters: 0}
train: {batch_size: 4, gradient_accumulation_steps: 1, max_iters: 2, eval_interval: 2, eval_iters: all, device: cpu}
"""


def test_a_run_and_its_evaluation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = [" ".join("abcdefgh"[i % 8] * (i % 7 + 1) for i in range(n)) for n in range(3, 60)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    losses = {}
    for mask in ("true", "false"):
        assert main(["train", "tiny.yaml", f"document_mask={mask}", f"out_dir={mask}"]) == 0
        lines = read_metrics(tmp_path / mask / "metrics.jsonl")
        losses[mask] = [line["val_loss"] for line in lines if "val_loss" in line]
    assert all(abs(a - b) > 1e-7 for a, b in zip(*losses.values(), strict=True))
    capsys.readouterr()
    assert main(["evaluate", "true", "--json"]) == 0  # by its own run.yaml, with the mask
    assert json.loads(capsys.readouterr().out)["val_loss"] == pytest.approx(losses["true"][-1], rel=1e-5)
    assert main(["evaluate", "true", "--json", "document_mask=false"]) == 0
    assert json.loads(capsys.readouterr().out)["val_loss"] != pytest.approx(losses["true"][-1], rel=1e-7)


def test_one_text_has_no_borders(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("abcdefgh" * 200)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    assert main(["train", "tiny.yaml", "corpus=one.txt", "document_mask=true"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "data.document_mask=true" in line and "one text" in line
