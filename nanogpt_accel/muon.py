"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), with AdamW for the parameters that are no matrices."""

import torch
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw


def rows_of_fused(model):
    """{matrix: the rows of each} of those that hold several, one below the other, to multiply with all at once: the
    queries', keys' and values', and SwiGLU's gate and what it gates."""
    rows = {block.attn.c_attn.weight: block.attn.split_sizes for block in model.transformer.h}
    rows |= {block.mlp.c_fc.weight: [model.config.n_inner] * 2 for block in model.transformer.h if block.mlp.is_gated}
    return rows


def check_unsharded(optimizer):
    """Raises:
    ValueError: Muon is to orthogonalize what is no matrix but a piece of one.
    """
    for group in optimizer.param_groups:
        if group.get("use_muon") and any(p.dim() != 2 or isinstance(p, DTensor) for p in group["params"]):
            raise ValueError(
                "optimizer.algorithm=muon: works on whole matrices, and here they lie in pieces on "
                "several devices (FSDP, DeepSpeed): take algorithm=adamw, or a config that does not "
                "shard, such as configs/multi_gpu.yaml"
            )


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the groups with use_muon, AdamW for the others.

    Muon is Nesterov momentum, of which each matrix is replaced by an orthogonal one near it: then what a matrix learns
    is not ruled by the few directions in which its gradients are large. The numbers are those of torch.optim.Muon,
    which takes the matrices one by one; here all of one shape, or of this shape transposed, are worked on together.

    rows: {matrix: the rows of each} of matrices that hold several; each is orthogonalized by itself.
    """

    def __init__(self, groups, rows):
        super().__init__(groups, {})
        self.rows = rows

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
        updates = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov's
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        by_shape = {}  # shape, the longer side last -> [(matrix, its update)]
        for p, update in zip(params, updates, strict=True):
            rows = self.rows.get(p, len(p))
            for matrix, part in zip(p.split(rows), update.split(rows), strict=True):
                by_shape.setdefault(tuple(sorted(matrix.shape)), []).append((matrix, part))
        for pairs in by_shape.values():
            found = orthogonalize(torch.stack([part.mT if is_tall(part) else part for _, part in pairs]))
            for (matrix, _), part in zip(pairs, found, strict=True):
                # an orthogonal matrix that makes a vector longer has larger elements to do it with
                matrix.add_(
                    part.mT if is_tall(matrix) else part,
                    alpha=-group["lr"] * max(1.0, len(matrix) / matrix.shape[1]) ** 0.5,
                )

    def _step_adamw(self, group, params):
        for p in params:
            if not self.state[p]:
                self.state[p].update(
                    step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
                )
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )


def is_tall(matrix):
    return matrix.shape[-2] > matrix.shape[-1]


def orthogonalize(matrices):
    """Matrices with the same singular vectors whose singular values are all near 1 (0.7 to 1.2).

    Five steps of a Newton-Schulz iteration, x <- a x + b (x x^T) x + c (x x^T)^2 x, whose coefficients raise small
    singular values as fast as can be (Jordan et al. 2024). It bears bfloat16, which GPUs are much faster at.

    matrices: (n, rows, columns), no more rows than columns, for x x^T is the smaller one of the two Gram matrices then.
    Returns the same shape, in bfloat16 on CUDA and in float32 elsewhere.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
