"""Divide Muon's work over processes: each process orthogonalizes some of the matrices and sends the results.

Under DDP, every process updates the momentum of all matrices. So every process has the complete optimizer state, which
checkpoints need, and only the results are exchanged (an all-gather). If the state takes too much memory, use FSDP2.

Under FSDP2, the momentum is sharded by rows. The rows of a matrix are sent to the process that orthogonalizes it, and
the results are sent back (two all-to-alls). With hybrid sharding, each copy of the model does this separately, and the
copies exchange nothing.

The matrices of one shape form a bucket. The collective operation of a bucket runs while the next bucket is
orthogonalized and AdamW updates the other parameters. nanochat and Dion (github.com/microsoft/dion) do the same.
"""

from functools import partial


def deal(buckets, n_ranks):
    """Assign matrices to ranks. The result is the same on all ranks.

    The matrices of each shape are divided evenly, which limits the padding of the all-gather. If their number is not
    divisible by n_ranks, the ranks with the least work get the remaining ones. The most expensive shapes are assigned
    first.

    Args:
        buckets: a list of (rows, columns, number of matrices).

    Returns:
        A list per bucket, with the rank of each matrix.
    """
    work, owners = [0] * n_ranks, [[] for _ in buckets]
    costs = [orthogonalization_flops(rows, columns) for rows, columns, _ in buckets]
    for i in sorted(range(len(buckets)), key=lambda i: -costs[i]):
        counts = [0] * n_ranks
        for _ in range(buckets[i][2]):
            rank = min(range(n_ranks), key=lambda rank: (counts[rank], work[rank]))
            counts[rank] += 1
            work[rank] += costs[i]
            owners[i].append(rank)
    return owners


def orthogonalization_flops(rows, columns):
    """Return the FLOPs of muon.orthogonalize for one matrix: five iterations with three products each."""
    low, high = sorted((rows, columns))
    return 5 * (4 * low**2 * high + 2 * low**3)


def share_muon(accelerator, model, optimizer):
    """Let the processes divide Muon's work. model, optimizer: as prepared by Accelerate."""
    from ..muon import Muon

    muon = getattr(optimizer, "optimizer", optimizer)
    if accelerator.num_processes == 1 or not isinstance(muon, Muon):
        return
    mesh = getattr(next(model.parameters()), "device_mesh", None)
    if mesh is None:
        muon.orthogonalize_buckets = partial(orthogonalize_replicated, group=None)
    else:
        muon.orthogonalize_buckets = partial(orthogonalize_sharded, group=mesh.get_group(mesh.ndim - 1))


def _deal(buckets, group):
    """Return (owners of each bucket's matrices, this rank, number of ranks)."""
    from torch import distributed

    size = distributed.get_world_size(group)
    owners = deal([(*bucket[0].shape, len(bucket)) for bucket in buckets], size)
    return owners, distributed.get_rank(group), size


def orthogonalize_replicated(buckets, group):
    """Start to orthogonalize matrices whose momentum is replicated on all processes of a group. Return a function that
    waits for the results and yields them, see Muon._start_muon."""
    from torch import distributed

    from ..muon import is_tall, orthogonalize_all, work_dtype

    all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor  # torch < 2.13
    all_owners, rank, size = _deal(buckets, group)
    started = []
    for bucket, owners in zip(buckets, all_owners, strict=True):
        n_slots = max(map(owners.count, owners))
        first = bucket[0].update
        # a rank with fewer matrices leaves its last slot unused
        mine = first.new_empty(n_slots, *sorted(first.shape), dtype=work_dtype(first))
        own = [matrix.update for matrix, owner in zip(bucket, owners, strict=True) if owner == rank]
        for slot, x in zip(mine, orthogonalize_all(own) if own else (), strict=False):
            slot.copy_(x.mT if is_tall(x) else x)
        gathered = mine.new_empty(size * n_slots, *mine.shape[1:])
        work = all_gather(gathered, mine, group, async_op=True)
        started.append((bucket, owners, gathered, work))

    def finish():
        for bucket, owners, gathered, work in started:
            work.wait()
            slots = [iter(part) for part in gathered.chunk(size)]
            for matrix, owner in zip(bucket, owners, strict=True):
                x = next(slots[owner])
                yield matrix, x.mT if is_tall(matrix.update) else x

    return finish


def orthogonalize_sharded(buckets, group):
    """Start to orthogonalize matrices whose rows are sharded over a group. Return a function that waits for the
    results and yields them, see Muon._start_muon."""
    import torch

    from ..muon import orthogonalize_all, work_dtype

    all_owners, rank, size = _deal(buckets, group)
    started = []
    for bucket, owners in zip(buckets, all_owners, strict=True):
        dealt = [[] for _ in range(size)]  # the matrices that each rank orthogonalizes; rows are sent in this order
        for m, owner in zip(bucket, owners, strict=True):
            dealt[owner].append(m)
        rows = [m.update.flatten() for matrices in dealt for m in matrices]
        n_out = [sum(m.update.numel() for m in matrices) for matrices in dealt]
        n_in = [sum(count_elements(m, r) for m in dealt[rank]) for r in range(size)]
        sent = torch.cat(rows).to(work_dtype(rows[0]))
        started.append((dealt, n_out, n_in, *_all_to_all(sent, n_out, n_in, group)))

    returned = []
    for dealt, n_out, n_in, received, work in started:
        work.wait()
        mine = dealt[rank]
        by_rank = [part.split([count_elements(m, r) for m in mine]) for r, part in enumerate(received.split(n_in))]
        own = [torch.cat([parts[i] for parts in by_rank]).view(m.shape) for i, m in enumerate(mine)]
        own = orthogonalize_all(own) if own else []
        rows = [x[slice(*m.bounds[r : r + 2])].flatten() for r in range(size) for m, x in zip(mine, own, strict=True)]
        sent = torch.cat(rows) if rows else received
        returned.append((dealt, *_all_to_all(sent, n_in, n_out, group)))

    def finish():
        for dealt, received, work in returned:
            work.wait()
            matrices = [m for matrices in dealt for m in matrices]
            for m, x in zip(matrices, received.split([m.update.numel() for m in matrices]), strict=True):
                yield m, x.view_as(m.update)

    return finish


def count_elements(matrix, rank):
    """Return the number of elements of a sharded matrix that a rank stores."""
    return (matrix.bounds[rank + 1] - matrix.bounds[rank]) * matrix.shape[1]


def _all_to_all(sent, n_out, n_in, group):
    """Start an all-to-all. Return (tensor to receive into, handle to wait for).

    n_out, n_in: number of elements that this rank sends to each rank, and receives from each rank.
    """
    from torch import distributed

    received = sent.new_empty(sum(n_in))
    return received, distributed.all_to_all_single(received, sent, n_in, n_out, group, async_op=True)
