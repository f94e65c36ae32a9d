"""evaluation.py: scores, and the mean loss of a split on any number of processes."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanogpt_accel.batches import evaluation_batches, model_inputs
from nanogpt_accel.evaluation import bits_per_byte, describe, mean_loss, perplexity, scores

# ---- scores


def test_perplexity_and_bits_per_byte():
    assert perplexity(0.0) == 1.0 and perplexity(math.log(50_257)) == pytest.approx(50_257)
    assert perplexity(1e4) == math.inf and perplexity(math.inf) == math.inf
    # guessing one of 256 bytes takes 8 bits per byte, for any tokenizer
    assert bits_per_byte(math.log(256), tokens=100, text_bytes=100) == pytest.approx(8)
    assert bits_per_byte(2 * math.log(256), tokens=50, text_bytes=100) == pytest.approx(8)
    assert bits_per_byte(1.0, 100, None) is None


def test_scores_and_their_description():
    assert scores(math.log(4), 100, 200) == {
        "val_loss": math.log(4),
        "perplexity": pytest.approx(4),
        "bits_per_byte": pytest.approx(1),
    }
    assert list(scores(1.0, 100, None, train_loss=0.5)) == ["train_loss", "val_loss", "perplexity"]
    text = describe(scores(1.25, 100, 200, train_loss=0.5))
    assert text == "train loss 0.5000, val loss 1.2500, perplexity 3.49, bits per byte 0.9017"


# ---- the mean loss of an evaluation


class Reading:
    """Tokens in memory, with the interface of a token file."""

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
    """The Accelerator of one rank of several. Its `gather` returns `others`, the tensors of all ranks."""

    def __init__(self, world=1, rank=0, others=None):
        self.num_processes, self.process_index, self.others = world, rank, others
        self.device = torch.device("cpu")
        self.gathered = None

    def gather(self, tensor):
        self.gathered = tensor
        return tensor if self.others is None else torch.cat(self.others)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(7, 7, generator=generator).log_softmax(-1)
    ids = torch.randint(7, (103,), generator=generator).numpy()
    by_hand = math.fsum(-table[a, b].item() for a, b in zip(ids[:-1], ids[1:], strict=True)) / 102
    return table, ids, by_hand


@pytest.mark.parametrize(("block_size", "batch_size"), [(10, 4), (10, 1), (16, 3), (102, 2), (51, 2), (100, 1)])
def test_mean_loss_is_the_mean_over_tokens(data, block_size, batch_size):
    table, ids, by_hand = data
    model = Bigram(table).train()
    batches = evaluation_batches(len(ids), block_size, batch_size, "all")
    loss = mean_loss(model, Reading(ids), batches, model_inputs, Processes())
    assert loss == pytest.approx(by_hand, rel=1e-6) and model.calls == len(batches)
    assert len(model.shapes) == 1  # otherwise torch.compile would compile again
    assert model.training  # restored
    mean_loss(model.eval(), Reading(ids), batches, model_inputs, Processes())
    assert not model.training


def test_batches_are_weighted_by_their_tokens(data):
    table, ids, by_hand = data
    batches = evaluation_batches(len(ids), 10, 4, "all")  # 40, 40, 20 and a tail of 2 targets
    assert [len(starts) * length for starts, length in batches] == [40, 40, 20, 2]
    means = [mean_loss(Bigram(table), Reading(ids), [batch], model_inputs, Processes()) for batch in batches]
    assert abs(sum(means) / 4 - by_hand) > 1e-3  # so the test would notice a mean of means
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
    shared = [rank.gathered for rank in ranks]
    for rank in range(world):
        loss = mean_loss(Bigram(table), Reading(ids), batches, model_inputs, Processes(world, rank, shared))
        assert loss == pytest.approx(by_hand, rel=1e-6)
