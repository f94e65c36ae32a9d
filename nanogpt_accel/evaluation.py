"""Loss over a split, perplexity, bits per byte."""

import math


def perplexity(loss):
    """exp(loss), inf where that overflows. loss: nats a token."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss, tokens, text_bytes):
    """Bits a byte of text, comparable between tokenizers; None where the size of the text is not known."""
    return loss / math.log(2) * tokens / text_bytes if text_bytes else None


def scores(loss, tokens, text_bytes, train_loss=None, split="val", error=None):
    """What an evaluation reports, by name. loss, tokens and text_bytes: of the whole split. error: of the loss."""
    found = {
        "train_loss": train_loss,
        f"{split}_loss": loss,
        "standard_error": error,
        "perplexity": perplexity(loss),
        "bits_per_byte": bits_per_byte(loss, tokens, text_bytes),
    }
    return {name: value for name, value in found.items() if value is not None}


def describe(scores):
    """Scores in nanoGPT's words: train loss 1.2345, val loss 1.2345, perplexity 3.44, ..."""
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.{2 if name == 'perplexity' else 4}f}" for name, value in scores.items()
    )


def verdict(got, expected, tolerance):
    """Whether a validation loss is the expected one within its tolerance, in words; nats a token."""
    if abs(got - expected) <= tolerance + 1e-9:
        return "reproduced"
    return f"not reproduced, {abs(got - expected):.3f} {'higher' if got > expected else 'lower'}"


def mean_loss(model, tokens, batches, to_inputs, accelerator, progress=None):
    """Mean loss in nats a token over fixed batches, shared by all processes; the same number on each of them.

    Args:
        model: the prepared model; it is put into eval mode for the time being.
        tokens: the token file, with rows(starts, length).
        batches: a list of (starts, length), as batches.evaluation_batches makes it.
        to_inputs: rows of tokens -> the model's keyword arguments, batches.model_inputs for the device.
        accelerator: gathers the losses.
        progress: called with the number of batches that are done since the last call, by all processes.
    """
    import torch

    was_training = model.training
    model.eval()
    world, rank = accelerator.num_processes, accelerator.process_index
    shape = len(batches[0][0]), batches[0][1]  # no batch is larger than the first
    losses = []
    with torch.no_grad():
        # every process makes the same number of calls, as sharded models need; what is too many is not counted
        for i in range(-(-len(batches) // world)):
            starts, length = batches[min(i * world + rank, len(batches) - 1)]
            inputs = to_inputs(tokens.rows(starts, length + 1))
            losses.append(model(**pad_inputs(inputs, shape), return_logits=False).loss.float())
            if progress is not None:
                progress(min(world, len(batches) - i * world))
    model.train(was_training)
    gathered = accelerator.gather(torch.stack(losses)).view(world, -1).T.flatten().tolist()  # in order of batches
    weights = [len(starts) * length for starts, length in batches]
    return math.fsum(loss * weight for loss, weight in zip(gathered, weights, strict=False)) / sum(weights)


def pad_inputs(inputs, shape):
    """The model's inputs, (b, t) each, with rows and places added that do not count, up to `shape`, (B, T): a compiled
    model would be compiled again for each other shape."""
    from torch.nn import functional as F

    def fill(values, value):
        return F.pad(values, (0, shape[1] - values.shape[1], 0, shape[0] - values.shape[0]), value=value)

    return {key: fill(values, -100 if key == "shift_labels" else 0) for key, values in inputs.items()}


def window_losses(model, tokens, windows, to_inputs, accelerator, progress=None):
    """Losses of fixed windows one by one, shared by all processes; the same numbers on each of them.

    Args:
        model, tokens, to_inputs, accelerator, progress: as for mean_loss.
        windows: a list of (starts, length, counted), as batches.sliding_windows makes it.

    Returns:
        (sums, counts): nats of the predictions that count, and their number, of each window, (n,) float64.
    """
    import torch
    from torch.nn import functional as F

    model.eval()
    world, rank = accelerator.num_processes, accelerator.process_index
    most, longest = max(len(starts) for starts, _, _ in windows), max(length for _, length, _ in windows)
    found = []
    with torch.no_grad():
        for i in range(-(-len(windows) // world)):  # as many calls on every process, as in mean_loss
            starts, length, counted = windows[min(i * world + rank, len(windows) - 1)]
            inputs = to_inputs(tokens.rows(starts, length + 1))
            targets = inputs.pop("shift_labels")[:, length - counted :]
            logits = model(**pad_inputs(inputs, (most, longest)), use_cache=False).logits
            logits = logits[: len(starts), length - counted : length].float()
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            sums = losses.view(len(starts), counted).sum(1)
            found.append(F.pad(torch.stack([sums, torch.full_like(sums, counted)]), (0, most - len(starts))))
            if progress is not None:
                progress(min(world, len(windows) - i * world))
    gathered = accelerator.gather(torch.stack(found)).view(world, -1, 2, most).transpose(0, 1)  # in order of windows
    sums, counts = gathered.flatten(0, 1)[: len(windows)].transpose(0, 1).flatten(1).cpu().double().numpy()
    return sums[counts > 0], counts[counts > 0]


def mean_and_error(sums, counts):
    """(mean, its standard error) of losses a token, from window_losses: the windows are the sample, for the tokens of
    one are not independent of each other. The error of a ratio (Cochran 1977, chapter 2); None of a single window."""
    mean = sums.sum() / counts.sum()
    n = len(sums)
    if n < 2:
        return float(mean), None
    return float(mean), float(math.sqrt(n / (n - 1) * ((sums - mean * counts) ** 2).sum()) / counts.sum())
