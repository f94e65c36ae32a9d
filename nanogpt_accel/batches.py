"""Select the tokens of each batch as a pure function of (seed, step).

There is no state between steps, so a run can resume at any step, and the samples of a step are the same for any number
of processes. A sample is a sequence of block_size + 1 tokens. Samples are numbered in the order of training: with G =
batch_size * gradient_accumulation_steps, step s uses samples s*G to (s+1)*G - 1.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

WINDOW = 256  # number of samples whose start positions are computed together
_ROUNDS = 6  # of the Feistel network in `shuffled`; 4 are enough in theory, but small permutations need more


@dataclass(frozen=True)
class Batches:
    """The batches of a training run.

    Args:
        tokens: a TokenFile, or any object with len() and rows(starts, length) -> int64 array (len(starts), length).
        batch_size: sequences per micro-batch.
        micro_batches: micro-batches per step, over all processes.
        sampling: "shuffle" uses each block once per epoch, with a new order and new block boundaries in every epoch;
            "random" draws random crops with replacement, as in nanoGPT.
    """

    tokens: object
    block_size: int
    batch_size: int
    micro_batches: int
    seed: int
    sampling: str = "shuffle"

    def __call__(self, step, micro_batch):
        """Return the tokens of a micro-batch, inputs and targets, as an int64 array (batch_size, block_size + 1)."""
        return self.tokens.rows(self.starts(step, micro_batch), self.block_size + 1)

    def starts(self, step, micro_batch):
        """Return the positions in the token file at which a micro-batch's sequences start: (batch_size,) int64."""
        first = (step * self.micro_batches + micro_batch) * self.batch_size
        numbers = range(first // WINDOW, (first + self.batch_size - 1) // WINDOW + 1)
        starts = np.concatenate(
            [_window_starts(i, len(self.tokens), self.block_size, self.seed, self.sampling) for i in numbers]
        )
        return starts[first % WINDOW :][: self.batch_size]


# for WINDOW samples together, because numpy takes as long for one batch as for hundreds of samples
@lru_cache(maxsize=4)
def _window_starts(number, n_tokens, block_size, seed, sampling):
    """Return the start positions of the samples from number * WINDOW to (number + 1) * WINDOW - 1: (WINDOW,) int64."""
    samples = np.arange(number * WINDOW, (number + 1) * WINDOW, dtype=np.uint64)
    if sampling == "random":
        return _random_starts(samples, n_tokens, block_size, seed_of(seed, 1))
    n_blocks, max_shift = epoch_shape(n_tokens, block_size)
    starts = np.empty(WINDOW, dtype=np.int64)
    epochs, places = samples // np.uint64(n_blocks), samples % np.uint64(n_blocks)
    for epoch in np.unique(epochs):  # a window may include the end of an epoch
        is_in_epoch = epochs == epoch
        key = seed_of(seed, 2, int(epoch))
        shift = key % (max_shift + 1)  # so that every epoch has different block boundaries
        starts[is_in_epoch] = shuffled(places[is_in_epoch], n_blocks, key).astype(np.int64) * block_size + shift
    return starts


def _random_starts(samples, n_tokens, block_size, key):
    return (mix(samples, key) % np.uint64(n_tokens - block_size)).astype(np.int64)


def model_inputs(rows, device="cpu", eot_id=None):
    """Convert rows of tokens to keyword arguments of the model, and move them to a device.

    Args:
        rows: (B, T + 1) int64 array: the first T tokens of a row are the inputs, the last T the targets.
        eot_id: end-of-text token, to mask attention across documents; None: no mask. Positions restart at 0 at each of
            these tokens, which is treated as the start of the next document. transformers' causal mask prevents
            attention across such a restart (Krell et al. 2021, Efficient Sequence Packing).

    Returns:
        dict of (B, T) tensors: input_ids, shift_labels, and position_ids if eot_id is given.
    """
    import torch

    rows, is_cuda = torch.as_tensor(rows), torch.device(device).type == "cuda"
    rows = (rows.pin_memory() if is_cuda else rows).to(device, non_blocking=is_cuda)  # asynchronous on CUDA
    input_ids, shift_labels = rows[:, :-1], rows[:, 1:]
    if eot_id is None:
        return {"input_ids": input_ids, "shift_labels": shift_labels}
    positions = rows.new_ones(input_ids.shape).cumsum(1) - 1  # 0, 1, 2, ...
    document_starts = (positions * (input_ids == eot_id)).cummax(1).values
    return {"input_ids": input_ids, "shift_labels": shift_labels, "position_ids": positions - document_starts}


def epoch_shape(n_tokens, block_size):
    """Return (blocks per epoch, maximum shift of the block boundaries). One block is left out to allow the shift."""
    n_blocks = max((n_tokens - 1) // block_size - 1, 1)
    return n_blocks, n_tokens - 1 - n_blocks * block_size


def evaluation_batches(n_tokens, block_size, batch_size, eval_iters, seed=0):
    """Return the batches of an evaluation, the same in every call: a list of (start positions, targets per sequence).

    eval_iters: "all": every token except the first is a target once, in blocks of block_size and a shorter last block.
        A number: this many batches of random crops.
    """
    if eval_iters == "all":
        n_blocks, n_rest = divmod(n_tokens - 1, block_size)
        starts = np.arange(n_blocks, dtype=np.int64) * block_size
        last = [(np.array([n_blocks * block_size]), n_rest)] if n_rest else []
    else:
        samples = np.arange(eval_iters * batch_size, dtype=np.uint64)
        starts, last = _random_starts(samples, n_tokens, block_size, seed_of(seed, 3)), []
    return [(starts[i : i + batch_size], block_size) for i in range(0, len(starts), batch_size)] + last


def sliding_windows(n_tokens, block_size, stride, batch_size):
    """Return overlapping windows for an evaluation. In these, most targets have more context than in separate blocks.

    As in transformers' guide "Perplexity of fixed-length models", a window of block_size tokens starts every `stride`
    tokens, and every token except the first is scored in one window. With stride = block_size, windows do not overlap,
    and the first token of each window is not scored.

    Returns:
        list of (starts, length, counted), one per batch: the start positions of its windows, the number of targets per
        window, and how many of these are scored, at the end of the window.
    """
    batches, end = [], 0
    for start in range(0, n_tokens, stride):
        previous_end, end = end, min(start + block_size, n_tokens)
        length = end - start - 1
        counted = min(end - previous_end, length)
        if batches and batches[-1][1:] == (length, counted) and len(batches[-1][0]) < batch_size:
            batches[-1][0].append(start)
        elif length:  # a window of one token has no target
            batches.append(([start], length, counted))
        if end == n_tokens:
            break
    return [(np.array(starts), length, counted) for starts, length, counted in batches]


def seed_of(*numbers):
    """Return a 63-bit seed derived from integers such as (seed, step, micro-batch), for dropout and the batch order."""
    low, high = np.random.SeedSequence(numbers).generate_state(2)
    return (int(high) << 32 | int(low)) >> 1


def shuffled(places, n, key):
    """Return the elements at `places` of a pseudorandom permutation of 0..n-1, without computing all of it.

    A Feistel network permutes the numbers below the smallest power of 4 that is at least n. Results of n or more are
    permuted again (cycle walking). Therefore, the cost per element does not depend on n.
    Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains (2002).

    places: (k,) uint64, indices into the permutation. key: selects the permutation. The result is (k,) uint64 too.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = np.array(places, dtype=np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for i in range(_ROUNDS):
            # not key + i, because mix only uses the sum of value and key: the rounds would be shifted copies of each
            # other, and permutations of fewer than 100 elements would be far from uniform
            left, right = right, left ^ (mix(right, key + (i << 40)) & mask)
        result[outside] = left << half | right
        outside = result >= n
    return result


def mix(values, key):
    """Return a 64-bit hash of each value and the key, computed with SplitMix64's finalizer (Steele, Lea, Flood 2014).

    values: (k,) uint64, like the result. The arithmetic is modulo 2**64.
    """
    key = (key * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = values * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
