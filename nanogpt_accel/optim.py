"""Learning rate schedules and optimizers.

To add a schedule, write a function like `cosine` and add it to SCHEDULES. To add an optimizer, write a function like
`adamw` and add it to OPTIMIZERS. Recipes can then select it. Recipes can also name any optimizer class. torch is
imported only when an optimizer is created, because recipe.py imports this file and must load quickly.
"""

import math
from importlib import import_module

from .utils.fields import nearest
from .utils.text import first_line

# ---- learning rate


def cosine(step, *, learning_rate, warmup_iters, lr_decay_iters, min_lr, **others):
    """Decay the learning rate to min_lr along half a cosine, as in nanoGPT. The decay ends at step lr_decay_iters."""
    if step > lr_decay_iters:
        return min_lr
    decay_ratio = (step - warmup_iters) / max(1, lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * decay_ratio)) * (learning_rate - min_lr)


def warmup_stable_decay(step, *, learning_rate, lr_decay_iters, min_lr, decay_fraction, **others):
    """Keep the learning rate constant, then decay it linearly to min_lr (MiniCPM, Hu et al. 2024).

    decay_fraction: length of the decay, as a fraction of lr_decay_iters.
    """
    if step > lr_decay_iters:
        return min_lr
    remaining = (lr_decay_iters - step) / (decay_fraction * lr_decay_iters)
    return min_lr + min(1.0, remaining) * (learning_rate - min_lr)


def constant(step, *, learning_rate, **others):
    return learning_rate


SCHEDULES = {"cosine": cosine, "constant": constant, "warmup_stable_decay": warmup_stable_decay}


def learning_rate(step, *, schedule, learning_rate, warmup_iters, **others):
    """Return the learning rate of a step: linear warm-up as in nanoGPT, then the schedule.

    schedule: a key of SCHEDULES. others: lr_decay_iters, min_lr, decay_fraction; see Recipe.lr_schedule.
    """
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    return SCHEDULES[schedule](step, learning_rate=learning_rate, warmup_iters=warmup_iters, **others)


# ---- optimizers


def width_scales(model):
    """Return {parameter: learning rate multiplier} for the parameters whose multiplier is not 1.

    The recipe's learning rates and initializer_range were tuned at n_embd = model.mup_base_width. With the maximal
    update parametrization (muP), they are also right for a model that is m = n_embd / mup_base_width times as wide,
    because a training step changes the output of each layer by the same amount at any width:

                                     std of the initial weights    learning rate with AdamW    with Muon
        embeddings, norms, biases    1                             1                           1 (AdamW)
        matrices in the blocks       1 / sqrt(m)                   1 / m                       1
        output head                  1 / m                         1 / m                       1 / m (AdamW)
        final norm, if the head      1 / m (the initial value,     1 / m                       1 / m (AdamW)
        is tied to the embedding     not a std)

    AdamW changes every weight by about the learning rate, so the change of an output grows with the number of inputs.
    Muon's update has the same spectral norm at any width, so it needs no factor. A tied head shares the weights of the
    embedding, which must not be scaled. Instead, the norm in front of the head scales the logits by 1 / m.
    GPT._init_weights sets the std.

    Sources: Yang et al. 2022, arXiv 2203.03466, table 3; for Muon Yang, Simon and Bernstein 2023, arXiv 2310.17813.
    """
    m = getattr(getattr(model, "config", None), "width_multiplier", 1.0)
    if m == 1:  # mup_base_width is None or equal to n_embd
        return {}
    last = model.transformer.ln_f if model.config.tie_word_embeddings else model.lm_head
    matrices = [p for p in model.transformer.h.parameters() if p.dim() >= 2]
    return dict.fromkeys([*matrices, *last.parameters()], 1 / m)


def parameter_groups(model, weight_decay):
    """Return nanoGPT's two groups: matrices and embeddings with weight decay, biases and norms without weight decay.
    With mup_base_width, the parameters in width_scales are in separate groups.

    The learning rate of a group is the scheduled learning rate times the lr_scale of the group.
    """
    scales, groups = width_scales(model), {(True, 1.0): [], (False, 1.0): []}  # (has decay, lr_scale) -> parameters
    for p in model.parameters():
        if p.requires_grad:
            groups.setdefault((p.dim() >= 2, scales.get(p, 1.0)), []).append(p)
    # a step decays weights by learning rate * weight_decay; divide by scale, so that this does not depend on the width
    return [
        {"params": parameters, "weight_decay": weight_decay / scale if has_decay else 0.0, "lr_scale": scale}
        for (has_decay, scale), parameters in groups.items()
        if parameters
    ]


def adamw_settings(model, settings):
    """Return keyword arguments for AdamW (Loshchilov and Hutter 2019). settings: the optimizer section of a recipe."""
    # the fused kernel makes one pass over the parameters instead of about ten
    is_fused = next(model.parameters()).device.type in ("cuda", "cpu", "mps")
    return {"lr": settings.learning_rate, "betas": (settings.beta1, settings.beta2), "fused": is_fused}


def adamw(model, settings):
    """Return an AdamW optimizer for all parameters."""
    import torch

    return torch.optim.AdamW(parameter_groups(model, settings.weight_decay), **adamw_settings(model, settings))


def muon(model, settings):
    """Return an optimizer that uses Muon for the matrices in the blocks and AdamW for all other parameters."""
    from .muon import Muon, fused_row_counts

    matrices = [p for p in model.transformer.h.parameters() if p.requires_grad and p.dim() == 2]
    ids = {id(p) for p in matrices}
    groups = parameter_groups(model, settings.weight_decay)
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in ids]
        group |= {"use_muon": False, **adamw_settings(model, settings)}
    fused = fused_row_counts(model)
    muon_group = {
        "params": matrices,
        "rows": [fused.get(p, [len(p)]) for p in matrices],
        "use_muon": True,
        "lr": settings.muon_learning_rate,
        "momentum": settings.muon_momentum,
        "weight_decay": settings.muon_weight_decay,
        "lr_scale": settings.muon_learning_rate / settings.learning_rate,
    }
    return Muon([*groups, muon_group])


OPTIMIZERS = {"adamw": adamw, "muon": muon}


def optimizer_class(name):
    """Return the optimizer class with this dotted name, such as torch.optim.Adafactor.

    Raises:
        ValueError: the module cannot be imported, or it does not have this optimizer.
    """
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(module), attribute, None)
    except (Exception, SystemExit) as error:  # a broken package may raise any error, and a script may call sys.exit
        problem = f"cannot import {module} ({first_line(error)}); install its package"
        raise ValueError(f"optimizer.algorithm={name}: {problem}") from None
    import torch

    def is_optimizer(value):
        return isinstance(value, type) and issubclass(value, torch.optim.Optimizer)

    if not is_optimizer(found):
        classes = [key for key, value in vars(import_module(module)).items() if is_optimizer(value)]
        raise ValueError(
            f"optimizer.algorithm={name}: {module} has no optimizer {attribute}{nearest(attribute, classes)}"
        )
    return found


def by_name(model, settings):
    """Return an optimizer of the class that settings.algorithm names, with nanoGPT's parameter groups."""
    groups = parameter_groups(model, settings.weight_decay)
    optimizer = optimizer_class(settings.algorithm)(groups, lr=settings.learning_rate, **settings.options)
    # keep the initial values: checkpoints store only the values that changed later, see sharding.changed_values
    optimizer.initial_groups = [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    return optimizer


def make_optimizer(model, settings):
    """Return the optimizer for a model. settings: the optimizer section of a recipe."""
    return OPTIMIZERS.get(settings.algorithm, by_name)(model, settings)
