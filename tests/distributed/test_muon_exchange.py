"""muon_exchange.py: matrices are assigned evenly to the ranks, and the ranks compute the same as one process.

The ranks are threads with a substitute for torch.distributed. Real processes are in test_sharding.py.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from nanogpt_accel.distributed.muon_exchange import (
    deal,
    orthogonalization_flops,
    orthogonalize_replicated,
    orthogonalize_sharded,
)
from nanogpt_accel.muon import Matrix, orthogonalize_here
from nanogpt_accel.planning import sizing
from nanogpt_accel.recipe import load_recipe

# ---- who orthogonalizes what


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 4, 7, 8, 100])
def test_deal_is_even_and_balanced(n_ranks):
    buckets = [(36, 36, 5), (36, 51, 9), (51, 36, 1), (7, 200, 2)]
    owners = deal(buckets, n_ranks)
    assert [len(of_bucket) for of_bucket in owners] == [5, 9, 1, 2] and owners == deal(buckets, n_ranks)
    costs = [orthogonalization_flops(rows, columns) for rows, columns, _ in buckets]
    work = [0] * n_ranks
    for of_bucket, cost in zip(owners, costs, strict=True):
        counts = [of_bucket.count(rank) for rank in range(n_ranks)]
        assert max(counts) - min(counts) <= 1
        work = [w + n * cost for w, n in zip(work, counts, strict=True)]
    assert max(work) - min(work) <= max(costs)


def test_cost_is_the_flops_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    from nanogpt_accel.muon import orthogonalize

    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.randn(2, 12, 20))
    assert 2 * orthogonalization_flops(20, 12) == counter.get_total_flops()


# ---- the same result


class World:
    """torch.distributed for ranks that are threads. It counts the bytes that each rank receives from the others."""

    def __init__(self, size, monkeypatch):
        self.size, self.barrier, self.sent = size, threading.Barrier(size, timeout=60), [None] * size
        self.received, self.here = [0] * size, threading.local()
        monkeypatch.setattr(distributed, "get_world_size", lambda group: size)
        monkeypatch.setattr(distributed, "get_rank", lambda group: self.here.rank)
        monkeypatch.setattr(distributed, "all_gather_single", self.all_gather, raising=False)
        monkeypatch.setattr(distributed, "all_to_all_single", self.all_to_all)

    def run(self, function):
        """Return [function(rank) for all ranks], each in a thread."""

        def call(rank):
            self.here.rank = rank
            return function(rank)

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(call, range(self.size)))

    def exchange(self, value):
        self.sent[self.here.rank] = value
        self.barrier.wait()
        found = list(self.sent)
        self.barrier.wait()
        return found

    def count(self, n_bytes):
        self.received[self.here.rank] += n_bytes
        return SimpleNamespace(wait=lambda: None)

    def all_gather(self, out, x, group, async_op):
        out.copy_(torch.cat(self.exchange(x)))
        return self.count(out.nbytes - x.nbytes)

    def all_to_all(self, out, x, n_in, n_out, group, async_op):
        assert (sum(n_in), sum(n_out)) == (len(out), len(x))
        out.copy_(torch.cat([parts[self.here.rank] for parts in self.exchange(x.split(n_out))]))
        return self.count(out.nbytes - n_in[self.here.rank] * x.itemsize)


# one block with sizes that are not divisible by the number of ranks; several blocks
SHAPES = [
    {"n_layer": 1, "n_embd": 36, "n_head": 2, "n_kv_head": 1, "n_inner": 51},
    {"n_layer": 5, "n_embd": 24, "n_head": 3},
]


def make_buckets(shape, n_shards=1, shard=0):
    """Return the buckets of a rank, as Muon._start_muon builds them, with random updates."""
    generator = torch.Generator().manual_seed(0)  # not the global one, because the ranks are threads
    width, keys, inner = shape["n_embd"], shape["n_kv_head"] * shape["head_dim"], shape["n_inner"]
    weights = [([width, keys, keys], width), ([width], width), ([inner, inner], width), ([width], inner)]
    buckets = {}
    for rows, columns in weights * shape["n_layer"]:
        update = torch.randn(sum(rows), columns, generator=generator)
        per_shard, first = -(-sum(rows) // n_shards), 0
        for n in rows:
            bounds = [min(max(i * per_shard - first, 0), n) for i in range(n_shards + 1)]
            part = update[first + bounds[shard] : first + bounds[shard + 1]]
            buckets.setdefault(tuple(sorted((n, columns))), []).append(Matrix(part, part, (n, columns), bounds))
            first += n
    return list(buckets.values())


@pytest.mark.parametrize("settings", SHAPES, ids=["one block", "five blocks"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_ranks_compute_the_same_bits_as_one_process(monkeypatch, layout, size, settings):
    """Some cases have more ranks than matrices of a shape, or ranks that have no row of a matrix."""
    shape = load_recipe(None, settings | {"activation": "swiglu"}).shape
    alone = [x for _, x in orthogonalize_here(make_buckets(shape))()]
    world = World(size, monkeypatch)

    def orthogonalize(rank):
        """Return pairs (the rows of a matrix that the rank has, their update), in the order of `alone`."""
        if layout == "ddp":
            buckets, function = make_buckets(shape), orthogonalize_replicated
        else:
            buckets, function = make_buckets(shape, size, rank), orthogonalize_sharded
        found = {id(matrix): x.clone() for matrix, x in function(buckets, None)()}
        matrices = [matrix for bucket in buckets for matrix in bucket]
        return [
            (slice(*m.bounds) if layout == "ddp" else slice(*m.bounds[rank : rank + 2]), found[id(m)]) for m in matrices
        ]

    for of_rank in world.run(orthogonalize):
        assert all(torch.equal(x, full[rows]) for (rows, x), full in zip(of_rank, alone, strict=True))
    planned = sizing.muon_cost(shape, layout, size, device="cpu")["exchanged"]
    print(layout, size, world.received, planned)
    assert sum(world.received) / size <= 1.05 * planned
