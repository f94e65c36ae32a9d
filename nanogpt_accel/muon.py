"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), with AdamW for all other parameters.

With several processes, distributed/muon_exchange.py divides the work: each process orthogonalizes some of the matrices.
"""

from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw


def fused_row_counts(model):
    """Return {weight: [number of rows of each matrix]} for weights that concatenate several matrices: the query, key
    and value projections of attention, and the two input projections of SwiGLU."""
    rows = {block.attn.c_attn.weight: block.attn.split_sizes for block in model.transformer.h}
    rows |= {block.mlp.c_fc.weight: [model.config.n_inner] * 2 for block in model.transformer.h if block.mlp.is_gated}
    return rows


class Matrix(NamedTuple):
    """A matrix to update: a weight, or one of the matrices in a fused weight. FSDP2 shards its rows over processes."""

    weight: torch.Tensor  # the rows on this process, a view of the parameter
    update: torch.Tensor  # the Nesterov momentum of the same rows
    shape: tuple  # of the full matrix
    bounds: list  # shard i of the parameter contains the rows bounds[i] to bounds[i + 1] - 1 of the matrix


class Muon(torch.optim.Optimizer):
    """Use Muon for parameter groups with use_muon=True, and AdamW for the other groups.

    Muon computes an update with Nesterov momentum and replaces it with the nearest orthogonal matrix, so that a few
    directions with large gradients do not dominate. The updates are the same as in torch.optim.Muon, but matrices of
    the same shape (or transposed shape) are processed in one batch instead of one after another.

    groups: parameter groups. A group with use_muon=True also has `rows`: for each parameter, a list of the row counts
    of the matrices in it. The matrices of a parameter are orthogonalized separately.
    """

    def __init__(self, groups):
        super().__init__(groups, {})
        self.orthogonalize_buckets = orthogonalize_here  # with several processes, share_muon replaces this function

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        started = [(group, self._start_muon(group)) for group in self.param_groups if group["use_muon"]]
        for group in self.param_groups:
            if not group["use_muon"]:
                self._step_adamw(group)  # runs while the processes exchange Muon's results
        for group, finish in started:
            for matrix, orthogonal in finish():
                rows, columns = matrix.shape
                # an orthogonal matrix keeps the norm of its input. A tall one spreads this norm over more outputs, so
                # their RMS is smaller. This factor compensates for that
                scale = max(1.0, rows / columns) ** 0.5
                matrix.weight.add_(orthogonal, alpha=-group["lr"] * scale)
        return loss

    def _start_muon(self, group):
        """Update the momentum, and start to orthogonalize the updates. Return a function that waits for the results and
        yields pairs (Matrix, orthogonalized update). The update contains only the rows that this process has."""
        active = [(p, rows) for p, rows in zip(group["params"], group["rows"], strict=True) if p.grad is not None]
        for p, _ in active:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        weights, grads = [local(p) for p, _ in active], [local(p.grad) for p, _ in active]
        momenta = [local(self.state[p]["momentum_buffer"]) for p, _ in active]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov momentum
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        buckets = {}  # sorted shape -> [Matrix]
        for (p, rows), update in zip(active, updates, strict=True):
            for matrix in split_matrices(p, update, rows):
                buckets.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
        return self.orthogonalize_buckets(list(buckets.values()))

    def _step_adamw(self, group):
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device)
                self.state[p] |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        first_moments, second_moments, steps = (
            [local(self.state[p][name]) for p in params] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        options = {name: group[name] for name in ("lr", "weight_decay", "fused")}
        options |= {"beta1": group["betas"][0], "beta2": group["betas"][1], "eps": 1e-8}
        weights, grads = [local(p) for p in params], [local(p.grad) for p in params]
        adamw(weights, grads, first_moments, second_moments, [], steps, amsgrad=False, maximize=False, **options)


def local(tensor):
    """Return the rows of a tensor that this process has: all rows, unless FSDP2 shards the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def split_matrices(p, update, rows):
    """Return the Matrix objects of a parameter. update: the parameter's momentum on this process. rows: see Muon."""
    n_shards, shard = 1, 0
    if isinstance(p, DTensor):  # FSDP2 shards rows over the last dimension of the mesh
        n_shards, shard = p.device_mesh.size(-1), p.device_mesh.get_local_rank(p.device_mesh.ndim - 1)
    per_shard, first, bounds = -(-len(p) // n_shards), 0, []
    for n in rows:
        bounds.append([min(max(i * per_shard - first, 0), n) for i in range(n_shards + 1)])
        first += n
    counts = [b[shard + 1] - b[shard] for b in bounds]
    parts = zip(local(p).split(counts), update.split(counts), rows, bounds, strict=True)
    return [Matrix(weight, part, (n, p.shape[1]), b) for weight, part, n, b in parts]


def orthogonalize_here(buckets):
    """Orthogonalize all matrices without other processes. Return the function that Muon._start_muon returns."""
    bucket_results = [zip(bucket, orthogonalize_all([m.update for m in bucket]), strict=True) for bucket in buckets]
    return lambda: (pair for pairs in bucket_results for pair in pairs)


def orthogonalize_all(matrices):
    """Return the orthogonalized matrices as a list. All must have the same shape, or that shape transposed."""
    wide = torch.stack([matrix.mT if is_tall(matrix) else matrix for matrix in matrices])
    return [x.mT if is_tall(matrix) else x for matrix, x in zip(matrices, orthogonalize(wide), strict=True)]


def is_tall(matrix):
    return matrix.shape[-2] > matrix.shape[-1]


def work_dtype(tensor):
    """Return the dtype for orthogonalizing: bfloat16 on CUDA (precise enough and much faster), otherwise float32."""
    return torch.bfloat16 if tensor.is_cuda else torch.float32


def orthogonalize(matrices):
    """Return the matrices with their singular values changed to about 1 (0.7 to 1.2) and the same singular vectors.

    This is a Newton-Schulz iteration, x <- a x + b (x x^T) x + c (x x^T)^2 x, with coefficients that increase small
    singular values as fast as possible (Jordan et al. 2024).

    Args:
        matrices: (n, rows, columns) with rows <= columns, so that x x^T is smaller than x^T x.

    Returns:
        A tensor of the same shape, in work_dtype.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(work_dtype(matrices))
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # so that all singular values are at most 1
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
