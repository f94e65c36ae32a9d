"""Compute the loss over a split, perplexity and bits per byte."""

import math


def perplexity(loss):
    """Return exp(loss), or inf if that overflows. loss: nats per token."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss, tokens, text_bytes):
    """Return bits per byte of text, which are comparable between tokenizers; None if the text's size is unknown."""
    return loss / math.log(2) * tokens / text_bytes if text_bytes else None


def scores(loss, tokens, text_bytes, train_loss=None, split="val", error=None):
    """Return the scores of an evaluation by name. loss, tokens, text_bytes: of the whole split. error: of the loss."""
    found = {
        "train_loss": train_loss,
        f"{split}_loss": loss,
        "standard_error": error,
        "perplexity": perplexity(loss),
        "bits_per_byte": bits_per_byte(loss, tokens, text_bytes),
    }
    return {name: value for name, value in found.items() if value is not None}


def describe(scores):
    """Format scores as nanoGPT does: train loss 1.2345, val loss 1.2345, perplexity 3.44, ..."""
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.{2 if name == 'perplexity' else 4}f}" for name, value in scores.items()
    )


def mean_loss(model, tokens, batches, to_inputs, accelerator, progress=None):
    """Return the mean loss over fixed batches in nats per token, computed by all ranks; the same on each rank.

    Args:
        model: the prepared model; it is in eval mode during the call.
        tokens: the token file, with rows(starts, length).
        batches: a list of (starts, length), from batches.evaluation_batches.
        to_inputs: rows of tokens -> the model's keyword arguments, from batches.model_inputs.
        accelerator: gathers the losses.
        progress: called on all ranks with the number of batches completed since the last call.
    """

    def batch_loss(inputs, starts, length):
        return model(**inputs, return_logits=False).loss.float()

    losses = _evaluate_batches(model, tokens, batches, to_inputs, accelerator, progress, batch_loss).tolist()
    weights = [len(starts) * length for starts, length in batches]
    return math.fsum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)


def window_losses(model, tokens, windows, to_inputs, accelerator, progress=None):
    """Return the loss of each fixed window, computed by all ranks; the same on each rank.

    Args:
        model, tokens, to_inputs, accelerator, progress: see mean_loss.
        windows: a list of (starts, length, counted), from batches.sliding_windows.

    Returns:
        (sums, counts): nats of the predictions that count, and their number, per window, (n,) float64.
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

    found = _evaluate_batches(model, tokens, windows, to_inputs, accelerator, progress, window_sums)  # (n, 2, B)
    sums, counts = found.transpose(0, 1).flatten(1).cpu().double().numpy()
    return sums[counts > 0], counts[counts > 0]


def _evaluate_batches(model, tokens, batches, to_inputs, accelerator, progress, evaluate):
    """Return evaluate(inputs, *batch) of every batch as one tensor, (n_batches, ...), on each rank. inputs: padded to
    the largest batch, because a compiled model recompiles for each new shape."""
    import torch

    was_training = model.training
    model.eval()
    world, rank = accelerator.num_processes, accelerator.process_index
    shape = max(len(starts) for starts, *_ in batches), max(length for _, length, *_ in batches)
    found = []
    with torch.no_grad():
        # sharded models need the same number of calls on every rank; surplus results are dropped
        for i in range(0, len(batches), world):
            batch = batches[min(i + rank, len(batches) - 1)]
            starts, length, *_ = batch
            found.append(evaluate(pad_inputs(to_inputs(tokens.rows(starts, length + 1)), shape), *batch))
            if progress is not None:
                progress(min(world, len(batches) - i))
    model.train(was_training)
    gathered = accelerator.gather(torch.stack(found)).view(world, -1, *found[0].shape)
    return gathered.transpose(0, 1).flatten(0, 1)[: len(batches)]  # in the order of the batches


def pad_inputs(inputs, shape):
    """Pad the model's inputs, (b, t) each, to `shape`, (B, T); the padding has no effect on the loss."""
    from torch.nn import functional as F

    def pad(values, value):
        return F.pad(values, (0, shape[1] - values.shape[1], 0, shape[0] - values.shape[0]), value=value)

    return {key: pad(values, -100 if key == "shift_labels" else 0) for key, values in inputs.items()}


def mean_and_error(sums, counts):
    """Return (mean, standard error) of the loss per token, from window_losses.

    The windows are the sample, because tokens of one window are not independent. The error is that of a ratio estimator
    (Cochran 1977, chapter 2); None for a single window."""
    mean = sums.sum() / counts.sum()
    n = len(sums)
    if n < 2:
        return float(mean), None
    return float(mean), float(math.sqrt(n / (n - 1) * ((sums - mean * counts) ** 2).sum()) / counts.sum())
