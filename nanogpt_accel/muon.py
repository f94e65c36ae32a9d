"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), with AdamW for parameters that are not matrices."""

import torch
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from .utils.packaged import packaged


def fused_row_counts(model):
    """Return {weight: [number of rows of each matrix]} for weights that concatenate several matrices: the query, key
    and value projections of attention, and the two input projections of SwiGLU."""
    rows = {block.attn.c_attn.weight: block.attn.split_sizes for block in model.transformer.h}
    rows |= {block.mlp.c_fc.weight: [model.config.n_inner] * 2 for block in model.transformer.h if block.mlp.is_gated}
    return rows


def check_unsharded(optimizer):
    """Raise a ValueError if the parameters that Muon updates are sharded."""
    for group in optimizer.param_groups:
        if group.get("use_muon") and any(p.dim() != 2 or isinstance(p, DTensor) for p in group["params"]):
            raise ValueError(
                "optimizer.algorithm=muon does not support sharded parameters (FSDP, DeepSpeed ZeRO); set "
                "algorithm=adamw, or use a launch config without sharding, such as "
                f"{packaged('configs/multi_gpu.yaml')}"
            )


class Muon(torch.optim.Optimizer):
    """Use Muon for parameter groups with use_muon=True, and AdamW for the other groups.

    Muon computes an update with Nesterov momentum and replaces it with the nearest orthogonal matrix, so that a few
    directions with large gradients do not dominate. The updates are the same as in torch.optim.Muon, but matrices of
    the same shape (or transposed shape) are processed in one batch instead of one after another.

    fused_rows: the result of fused_row_counts, to orthogonalize matrices in a fused weight separately.
    """

    def __init__(self, groups, fused_rows):
        super().__init__(groups, {})
        self.fused_rows = fused_rows

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            step = self._step_muon if group["use_muon"] else self._step_adamw
            step(group, params)
        return loss

    def _step_muon(self, group, params):
        grads = [p.grad for p in params]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov momentum
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        by_shape = {}  # sorted shape -> [(matrix, update)]
        for p, update in zip(params, updates, strict=True):
            rows = self.fused_rows.get(p, len(p))
            for matrix, part in zip(p.split(rows), update.split(rows), strict=True):
                by_shape.setdefault(tuple(sorted(matrix.shape)), []).append((matrix, part))
        for pairs in by_shape.values():
            orthogonal = orthogonalize(torch.stack([part.mT if is_tall(part) else part for _, part in pairs]))
            for (matrix, _), part in zip(pairs, orthogonal, strict=True):
                # a tall orthogonal matrix has outputs of smaller RMS than its inputs; this factor compensates for it
                scale = max(1.0, len(matrix) / matrix.shape[1]) ** 0.5
                matrix.add_(part.mT if is_tall(matrix) else part, alpha=-group["lr"] * scale)

    def _step_adamw(self, group, params):
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device)
                self.state[p] |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        first_moments, second_moments, steps = (
            [self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        options = {name: group[name] for name in ("lr", "weight_decay", "fused")}
        options |= {"beta1": group["betas"][0], "beta2": group["betas"][1], "eps": 1e-8}
        grads = [p.grad for p in params]
        adamw(params, grads, first_moments, second_moments, [], steps, amsgrad=False, maximize=False, **options)


def is_tall(matrix):
    return matrix.shape[-2] > matrix.shape[-1]


def orthogonalize(matrices):
    """Return matrices with the same singular vectors and with singular values near 1 (0.7 to 1.2).

    This is a Newton-Schulz iteration, x <- a x + b (x x^T) x + c (x x^T)^2 x, with coefficients that increase small
    singular values as fast as possible (Jordan et al. 2024). bfloat16 is precise enough, and much faster on GPUs.

    Args:
        matrices: (n, rows, columns) with rows <= columns, so that x x^T is smaller than x^T x.

    Returns:
        A tensor of the same shape, in bfloat16 on CUDA and in float32 on other devices.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # so that all singular values are at most 1
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
