"""The coordinate check of muP: measure whether a training step changes the activations by the same amount at any width.

Source: Yang et al. 2022, arXiv 2203.03466, appendix D.1.
"""

import numpy as np

from ..tracking.metrics_log import new_figure, save_figure
from ..utils.text import counted

KINDS = ("attention", "MLP", "residual stream", "logits")


def activations(model, inputs):
    """Return {kind: [output of each layer of this kind, ...]} of a GPT in eval mode."""
    import torch

    found = {kind: [] for kind in KINDS}

    def recorder(kind):
        return lambda module, args, output: found[kind].append(output[0] if kind == "attention" else output)

    layers = [("logits", model.lm_head)]
    for block in model.transformer.h:
        layers += [("attention", block.attn), ("MLP", block.mlp), ("residual stream", block)]
    hooks = [layer.register_forward_hook(recorder(kind)) for kind, layer in layers]
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

    train_step: function that runs one training step.
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


def plot(results, widths, path):
    """Write a plot with a row of panels for each name. results: {name: {width: result of `measure`}}."""
    size = 3 * len(KINDS), 2.8 * len(results)
    figure, panels = new_figure(len(results), len(KINDS), size, sharex=True, sharey="col", squeeze=False)
    from matplotlib.ticker import NullLocator  # after new_figure: its import of matplotlib also works in notebooks

    for (name, by_width), row in zip(results.items(), panels, strict=True):
        for kind, panel in zip(KINDS, row, strict=True):
            start, *changes = zip(*(by_width[width][kind] for width in widths), strict=True)
            panel.loglog(widths, start, "k--", label="activations at the start")
            for step, sizes in enumerate(changes, 1):
                label = f"change after {counted(step, 'step')}" if step in (1, len(changes)) else None
                color = (step / len(changes), 0.4, 0.9 - 0.8 * step / len(changes))  # from blue to red
                panel.loglog(widths, sizes, color=color, marker="o", markersize=3, label=label)
            panel.set_title(f"{kind}, {name}", fontsize="medium")
            panel.set_xticks(widths, map(str, widths))
            panel.xaxis.set_minor_locator(NullLocator())  # but keep those of the y axis, which may have no major ticks
            panel.grid(alpha=0.3)
        row[0].set_ylabel("RMS")
    for panel in panels[-1]:
        panel.set_xlabel("n_embd")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save_figure(figure, path)
