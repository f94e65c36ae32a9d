"""Compute the loss, perplexity and bits per byte of a model on a split."""

import math


def perplexity(loss):
    """Return exp(loss), or inf if that overflows. loss: nats per token."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss, tokens, text_bytes):
    """Convert a loss in nats per token to bits per byte of text, which can be compared across tokenizers. Return None
    if text_bytes is not known."""
    return loss / math.log(2) * tokens / text_bytes if text_bytes else None


def scores(loss, tokens, text_bytes, train_loss=None, split="val", error=None):
    """Return the results of an evaluation as {name: value}, without values that are None.

    loss, train_loss: nats per token. tokens, text_bytes: size of the full split. error: standard error of the loss.
    """
    values = {"train_loss": train_loss, f"{split}_loss": loss, "standard_error": error, "perplexity": perplexity(loss)}
    values["bits_per_byte"] = bits_per_byte(loss, tokens, text_bytes)
    return {name: value for name, value in values.items() if value is not None}


def describe(scores):
    """Format the scores in nanoGPT's style: train loss 1.2345, val loss 1.2345, perplexity 3.44, ..."""
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.{2 if name == 'perplexity' else 4}f}" for name, value in scores.items()
    )


def mean_loss(model, tokens, batches, to_inputs, accelerator, progress=None):
    """Return the mean loss over batches, in nats per token. The ranks divide the batches and return the same value.

    Args:
        model: the prepared model. It is switched to eval mode during the call.
        tokens: the TokenFile, or a similar object; see batches.Batches.
        batches: a list of (starts, length), from batches.evaluation_batches.
        to_inputs: function that converts rows of tokens to the model's keyword arguments; see batches.model_inputs.
        accelerator: used to gather the losses.
        progress: function, called on all ranks with the number of batches completed since the last call.
    """

    def batch_loss(inputs, starts, length):
        return model(**inputs, return_logits=False).loss.float()

    losses = _evaluate_batches(model, tokens, batches, to_inputs, accelerator, progress, batch_loss).tolist()
    weights = [len(starts) * length for starts, length in batches]
    return math.fsum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)


def window_losses(model, tokens, windows, to_inputs, accelerator, progress=None):
    """Return the loss of each window. The ranks divide the windows, and all return the same values.

    Args:
        model, tokens, to_inputs, accelerator, progress: see mean_loss.
        windows: a list of (starts, length, counted), from batches.sliding_windows.

    Returns:
        (sums, counts): the sum of the losses of each window in nats, and the number of losses of each window. Both are
        float64 arrays (n_windows,).
    """
    import torch
    from torch.nn import functional as F

    def window_sums(inputs, starts, length, counted):
        targets = inputs.pop("shift_labels")  # (B, T)
        logits = model(**inputs, use_cache=False).logits  # (B, T, V)
        part = slice(len(starts)), slice(length - counted, length)
        losses = F.cross_entropy(logits[part].float().flatten(0, 1), targets[part].flatten(), reduction="none")
        sums = losses.view(len(starts), counted).sum(1)
        return F.pad(torch.stack([sums, torch.full_like(sums, counted)]), (0, len(logits) - len(starts)))  # (2, B)

    results = _evaluate_batches(model, tokens, windows, to_inputs, accelerator, progress, window_sums)  # (n, 2, B)
    sums, counts = results.transpose(0, 1).flatten(1).cpu().double().numpy()
    return sums[counts > 0], counts[counts > 0]


def _evaluate_batches(model, tokens, batches, to_inputs, accelerator, progress, evaluate):
    """Return the results of evaluate(inputs, *batch) for all batches, on every rank, as a tensor (n_batches, ...)."""
    import torch

    was_training = model.training
    model.eval()
    world, rank = accelerator.num_processes, accelerator.process_index
    # pad all inputs to the same shape, because a compiled model is recompiled for each new shape
    shape = max(len(starts) for starts, *_ in batches), max(length for _, length, *_ in batches)
    results = []
    with torch.no_grad():
        # sharded models need the same number of calls on every rank, so the last batch may be evaluated several times;
        # the additional results are removed below
        for i in range(0, len(batches), world):
            batch = batches[min(i + rank, len(batches) - 1)]
            starts, length, *_ = batch
            results.append(evaluate(_pad_inputs(to_inputs(tokens.rows(starts, length + 1)), shape), *batch))
            if progress is not None:
                progress(min(world, len(batches) - i))
    model.train(was_training)
    gathered = accelerator.gather(torch.stack(results)).view(world, -1, *results[0].shape)
    return gathered.transpose(0, 1).flatten(0, 1)[: len(batches)]  # in the order of `batches`


def _pad_inputs(inputs, shape):
    """Pad the model's inputs from (b, t) to `shape`, (B, T). The padding has no effect on the loss."""
    from torch.nn import functional as F

    b, t = inputs["input_ids"].shape
    padding = (0, shape[1] - t, 0, shape[0] - b)
    return {key: F.pad(ids, padding, value=-100 if key == "shift_labels" else 0) for key, ids in inputs.items()}


def mean_and_error(sums, counts):
    """Return (mean loss per token, its standard error), from the results of window_losses.

    The standard error is that of a ratio estimator (Cochran 1977, chapter 2). The tokens of a window are correlated, so
    the windows are the independent samples. With a single window, the error is None.
    """
    mean, n = sums.sum() / counts.sum(), len(sums)
    if n < 2:
        return float(mean), None
    return float(mean), float(math.sqrt(n / (n - 1) * ((sums - mean * counts) ** 2).sum()) / counts.sum())
