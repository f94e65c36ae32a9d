"""The optimizer: parameter groups, AdamW, and the learning rate of a step."""

import math

import torch


def learning_rate(step, *, schedule, learning_rate, warmup_iters, lr_decay_iters, min_lr):
    """Learning rate of a step, nanoGPT's: linear warm-up, then a cosine down to min_lr, or constant."""
    # 1) linear warm-up
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if schedule == "constant":
        return learning_rate
    # 2) past the decay, the lowest rate
    if step > lr_decay_iters:
        return min_lr
    # 3) in between, half a cosine
    done = (step - warmup_iters) / max(1, lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * done)) * (learning_rate - min_lr)


def parameter_groups(model, weight_decay):
    """nanoGPT's two groups: matrices and embeddings decay, biases and norms do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def make_optimizer(model, *, learning_rate, weight_decay, beta1, beta2):
    """AdamW (Loshchilov and Hutter 2019), the fused kernel where the device has one.

    Fused works on CUDA, CPU and MPS; it is one pass over the parameters instead of about ten.
    """
    device_type = next(model.parameters()).device.type
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=learning_rate, betas=(beta1, beta2),
                             fused=device_type in ("cuda", "cpu", "mps"))
