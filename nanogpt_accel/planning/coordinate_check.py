"""The coordinate check of muP: whether a training step changes the activations by the same amount at any width.

Source: Yang et al. 2022, arXiv 2203.03466, appendix D.1.
"""

import numpy as np

from ..tracking.metrics_log import new_figure, save_figure

KINDS = ("attention", "MLP", "residual stream", "logits")


def activations(model, inputs):
    """Return {kind: [output of each layer of this kind, ...]} of a GPT in eval mode."""
    import torch

    found = {kind: [] for kind in KINDS}

    def recorder(kind):
        return lambda module, args, output: found[kind].append(output[0] if kind == "attention" else output)

    layers = [(kind, layer) for block in model.transformer.h for kind, layer in zip(KINDS, (block.attn, block.mlp, block))]
    hooks = [layer.register_forward_hook(recorder(kind)) for kind, layer in [*layers, ("logits", model.lm_head)]]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        model(**inputs)
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return found


def rms(tensors, before=None):
    """Return the root mean square of all entries of the tensors, or of their differences from the tensors `before`."""
    changes = tensors if before is None else [now - then for now, then in zip(tensors, before, strict=True)]
    return sum(x.float().square().mean().item() / len(changes) for x in changes) ** 0.5


def measure(model, inputs, train_step, steps):
    """Return {kind: [RMS of the activations at the start, RMS of their change after 1 step, after 2 steps, ...]}.

    train_step: function that makes a training step.
    """
    start = activations(model, inputs)
    sizes = {kind: [rms(start[kind])] for kind in KINDS}
    for _ in range(steps):
        train_step()
        now = activations(model, inputs)
        for kind in KINDS:
            sizes[kind].append(rms(now[kind], start[kind]))
    return sizes


def slope(widths, sizes):
    """Return the slope of log(size) over log(width): 0 if the size does not depend on the width, 1 if it is
    proportional to the width."""
    return float(np.polyfit(np.log(widths), np.log(sizes), 1)[0])


def plot(found, widths, path):
    """Write a plot. found: {name: {width: result of measure}}, with a row of panels for each name."""
    figure, _ = new_figure()
    figure.clear()
    figure.set_size_inches(3.2 * len(KINDS), 3 * len(found))
    axes = figure.subplots(len(found), len(KINDS), sharex=True, sharey="col", squeeze=False)
    for (name, by_width), row in zip(found.items(), axes, strict=True):
        for kind, panel in zip(KINDS, row, strict=True):
            columns = zip(*(by_width[width][kind] for width in widths), strict=True)
            for step, sizes in enumerate(columns):
                label = f"change after {step} step{'s' * (step != 1)}" if step else "initial activations"
                style = {"color": f"C{step - 1}"} if step else {"color": "black", "linestyle": "dashed"}
                panel.loglog(widths, sizes, marker="o", markersize=3, label=label, **style)
            panel.set_title(f"{kind}, {name}")
            panel.grid(alpha=0.3)
            panel.set_xticks(widths, map(str, widths))
            panel.minorticks_off()
        row[0].set_ylabel("RMS")
    for panel in axes[-1]:
        panel.set_xlabel("n_embd")
    axes[0][0].legend(fontsize="small")
    figure.tight_layout()
    save_figure(figure, path)
