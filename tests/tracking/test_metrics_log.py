"""metrics.py: scores, metrics.jsonl and its repair, and the mean loss of an evaluation."""

import json
import math
import os
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanogpt_accel.batches import evaluation_batches, model_inputs
from nanogpt_accel.evaluation import bits_per_byte, describe, mean_loss, perplexity, scores
from nanogpt_accel.tracking.metrics_log import MetricsLog, plot_losses, read_metrics

# ---- arithmetic


def test_perplexity_and_bits_per_byte():
    assert perplexity(0.0) == 1.0 and perplexity(math.log(50_257)) == pytest.approx(50_257)
    assert perplexity(1e4) == math.inf and perplexity(math.inf) == math.inf
    # guessing among 256 equally likely bytes takes 8 bits a byte, whatever a token is
    assert bits_per_byte(math.log(256), tokens=100, text_bytes=100) == pytest.approx(8)
    assert bits_per_byte(2 * math.log(256), tokens=50, text_bytes=100) == pytest.approx(8)
    assert bits_per_byte(1.0, 100, None) is None


def test_scores():
    assert scores(math.log(4), 100, 200) == {
        "val_loss": math.log(4),
        "perplexity": pytest.approx(4),
        "bits_per_byte": pytest.approx(1),
    }
    assert list(scores(1.0, 100, None, train_loss=0.5)) == ["train_loss", "val_loss", "perplexity"]
    text = describe(scores(1.25, 100, 200, train_loss=0.5))
    assert text == "train loss 0.5000, val loss 1.2500, perplexity 3.49, bits per byte 0.9017"


# ---- metrics.jsonl


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def a_run(path, first, last, resume_step=None, every=5, tag=""):
    """Steps first to last - 1 as the loop logs them, an evaluation before each fifth and at the end."""
    log = MetricsLog(path, resume_step)
    for step in range(first, last + 1):
        if (step % every == 0 or step == last) and step != resume_step:
            log.write(step=step, val_loss=100 - step, by=tag)
        if step < last:
            log.write(step=step, loss=50 - step, by=tag)
    log.close()


def steps(lines, key):
    return [line["step"] for line in lines if key in line]


def test_a_line_is_there_as_soon_as_it_is_written(path):
    log = MetricsLog(path)
    log.write(step=0, loss=1 / 3, mfu=None)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 0, "loss": 1 / 3, "mfu": None}]
    log.write(step=1, loss=2.5)
    assert path.read_text().count("\n") == 2 and path.read_text().endswith("\n")
    log.close()


@pytest.mark.parametrize("stopped", [12, 15, 17, 19])
def test_after_a_resume_each_step_stands_once(path, stopped):
    """The run is killed at step `stopped` and goes on from the checkpoint of step 10."""
    a_run(path, 0, 40, tag="whole")
    whole = [(line["step"], "loss" in line) for line in read_metrics(path)]
    path.unlink()
    log = MetricsLog(path)
    for step in range(stopped):
        if step % 5 == 0:
            log.write(step=step, val_loss=100 - step, by="first")
        log.write(step=step, loss=50 - step, by="first")
    log.close()
    a_run(path, 10, 40, resume_step=10, tag="second")

    lines = read_metrics(path)
    assert [(line["step"], "loss" in line) for line in lines] == whole
    assert steps(lines, "loss") == list(range(40)) and steps(lines, "val_loss") == list(range(0, 41, 5))
    # the evaluation at the checkpoint is of the first part, the training of that step of the second
    at_ten = [line for line in lines if line["step"] == 10]
    assert [(("val_loss" in line), line["by"]) for line in at_ten] == [(True, "first"), (False, "second")]
    assert all(line["by"] == ("first" if line["step"] < 10 else "second") for line in lines if line["step"] != 10)


def test_a_resume_at_the_end_keeps_all(path):
    a_run(path, 0, 10)
    before = path.read_text()
    MetricsLog(path, resume_step=10).close()
    assert path.read_text() == before


@pytest.mark.parametrize("torn", ['{"step": 7, "lo', "{", '{"step": 7, "loss": 4', "\0\0\0\0", '"'])
def test_a_torn_last_line_is_mended(path, torn):
    a_run(path, 0, 7)
    before = read_metrics(path)
    with open(path, "a") as file:
        file.write(torn)
    assert read_metrics(path) == before
    log = MetricsLog(path, resume_step=7)
    log.write(step=7, loss=1.0)
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]  # every line is whole
    assert lines[-1] == {"step": 7, "loss": 1.0}
    assert lines[:-1] == [line for line in before if line["step"] < 7 or "val_loss" in line]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def test_resuming_without_a_log_begins_one(path):
    assert read_metrics(path) == []
    log = MetricsLog(path, resume_step=5)
    log.write(step=5, loss=1.0)
    log.close()
    assert read_metrics(path) == [{"step": 5, "loss": 1.0}]


# ---- the plot


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


@pytest.mark.filterwarnings("error")  # such as matplotlib's, of a legend of nothing
@pytest.mark.parametrize(
    "lines",
    [
        [{"step": s, "loss": 4 - s / 10} for s in range(20)] + [{"step": 20, "val_loss": 2.0}],
        [{"step": 0, "val_loss": 2.0}],
        [{"step": 0, "loss": 2.0}],
    ],
)
def test_plot_losses(path, tmp_path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_losses(path, tmp_path / "loss.png")
    width, height = png_size(tmp_path / "loss.png")
    assert width > 400 and height > 200 and os.path.getsize(tmp_path / "loss.png") > 5000


# ---- the mean loss of an evaluation


class Reading:
    """Tokens in memory, as a token file gives them."""

    def __init__(self, ids):
        self.ids = np.asarray(ids)

    def rows(self, starts, length):
        return np.stack([self.ids[start : start + length] for start in starts])


class Bigram(torch.nn.Module):
    """A model whose log-probabilities are a table."""

    def __init__(self, table):
        super().__init__()
        self.table, self.calls, self.shapes = table, 0, set()

    def forward(self, input_ids, shift_labels, return_logits):
        assert not return_logits and not self.training and not torch.is_grad_enabled()
        self.calls += 1
        self.shapes.add(input_ids.shape)
        counts = shift_labels != -100
        terms = -self.table[input_ids[counts], shift_labels[counts]]
        return SimpleNamespace(loss=terms.mean())


class Processes:
    """An accelerator that is one of several; what the others gave is put in beforehand."""

    def __init__(self, world=1, rank=0, others=None):
        self.num_processes, self.process_index, self.others = world, rank, others
        self.device = torch.device("cpu")
        self.given = None

    def gather(self, tensor):
        self.given = tensor
        return tensor if self.others is None else torch.cat(self.others)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(7, 7, generator=generator).log_softmax(-1)
    ids = torch.randint(7, (103,), generator=generator).numpy()
    by_hand = math.fsum(-table[a, b].item() for a, b in zip(ids[:-1], ids[1:], strict=True)) / 102
    return table, ids, by_hand


@pytest.mark.parametrize(("block_size", "batch_size"), [(10, 4), (10, 1), (16, 3), (102, 2), (51, 2), (100, 1)])
def test_mean_loss_is_over_tokens(data, block_size, batch_size):
    table, ids, by_hand = data
    model = Bigram(table).train()
    batches = evaluation_batches(len(ids), block_size, batch_size, "all")
    loss = mean_loss(model, Reading(ids), batches, model_inputs, Processes())
    assert loss == pytest.approx(by_hand, rel=1e-6) and model.calls == len(batches)
    assert len(model.shapes) == 1  # or a compiled model would be compiled again
    assert model.training  # as it was
    mean_loss(model.eval(), Reading(ids), batches, model_inputs, Processes())
    assert not model.training


def test_batches_of_unequal_size_count_by_their_tokens(data):
    table, ids, by_hand = data
    batches = evaluation_batches(len(ids), 10, 4, "all")  # 40, 40, 20 and a tail of 2 targets
    assert [len(starts) * length for starts, length in batches] == [40, 40, 20, 2]
    means = [mean_loss(Bigram(table), Reading(ids), [batch], model_inputs, Processes()) for batch in batches]
    assert abs(sum(means) / 4 - by_hand) > 1e-3  # so the mean of means would show
    mean = mean_loss(Bigram(table), Reading(ids), batches, model_inputs, Processes())
    assert mean == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("world", [2, 3, 4, 5, 8])
def test_mean_loss_is_the_same_on_any_number_of_processes(data, world):
    table, ids, by_hand = data
    batches = evaluation_batches(len(ids), 10, 4, "all")
    ranks = [Processes(world, rank, others=[torch.zeros(-(-len(batches) // world))] * world) for rank in range(world)]
    models = [Bigram(table) for _ in ranks]
    for model, rank in zip(models, ranks, strict=True):
        mean_loss(model, Reading(ids), batches, model_inputs, rank)
    assert len({model.calls for model in models}) == 1  # sharded models need the same number of calls
    shared = [rank.given for rank in ranks]
    for rank in range(world):
        loss = mean_loss(Bigram(table), Reading(ids), batches, model_inputs, Processes(world, rank, shared))
        assert loss == pytest.approx(by_hand, rel=1e-6)
