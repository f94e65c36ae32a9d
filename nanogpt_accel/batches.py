"""Which tokens make up the batch of a step: a pure function of (seed, step).

Nothing is carried from step to step, so a run resumes anywhere by counting, and the samples of a step are the
same set on any number of processes. The samples of a run are numbered: step s takes samples s*G to (s+1)*G - 1,
where G = batch_size * gradient_accumulation_steps, micro-batch by micro-batch.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

WINDOW = 256  # samples whose places are computed at a time
_ROUNDS = 6  # of the Feistel network; four make a pseudorandom permutation in theory, two more for small domains


@dataclass(frozen=True)
class Batches:
    """The training stream.

    tokens: anything with len() and rows(starts, length) -> (len(starts), length) int64.
    batch_size: sequences of a micro-batch. micro_batches: micro-batches of a step, over all processes.
    sampling: "shuffle" takes every block once an epoch, in a new order and with new block borders each epoch;
        "random" takes crops at random places, with replacement, as nanoGPT does.
    """

    tokens: object
    block_size: int
    batch_size: int
    micro_batches: int
    seed: int
    sampling: str = "shuffle"

    def __call__(self, step, micro_batch):
        """Tokens of one micro-batch of a step: (batch_size, block_size + 1) int64, inputs and targets overlapping."""
        return self.tokens.rows(self.starts(step, micro_batch), self.block_size + 1)

    def starts(self, step, micro_batch):
        """Where the sequences of one micro-batch begin in the token file: (batch_size,) int64."""
        first = (step * self.micro_batches + micro_batch) * self.batch_size
        last = first + self.batch_size - 1
        windows = [
            _window(number, len(self.tokens), self.block_size, self.seed, self.sampling)
            for number in range(first // WINDOW, last // WINDOW + 1)
        ]
        begin = first % WINDOW
        return np.concatenate(windows)[begin : begin + self.batch_size]


# numpy takes as long for the dozen samples of a batch as for hundreds; each is still a function of its number alone
@lru_cache(maxsize=4)
def _window(number, n_tokens, block_size, seed, sampling):
    """Where the samples number * WINDOW ... (number + 1) * WINDOW - 1 begin: (WINDOW,) int64."""
    samples = np.arange(number * WINDOW, (number + 1) * WINDOW, dtype=np.uint64)
    if sampling == "random":
        return (mix(samples, seed_of(seed, 1)) % np.uint64(n_tokens - block_size)).astype(np.int64)
    blocks, slack = epoch_shape(n_tokens, block_size)
    starts = np.empty(WINDOW, dtype=np.int64)
    epochs, places = samples // np.uint64(blocks), samples % np.uint64(blocks)
    for epoch in np.unique(epochs):  # a window can span the end of an epoch
        chosen = epochs == epoch
        key = seed_of(seed, 2, int(epoch))
        # a shift of all borders, so that the model does not see the same cuts in every epoch
        shift = key % (slack + 1)
        starts[chosen] = shuffled(places[chosen], blocks, key).astype(np.int64) * block_size + shift
    return starts


def model_inputs(rows, device="cpu", eot_id=None):
    """What the model is called with, as keyword arguments, for rows of tokens; on their way to the device.

    Args:
        rows: (B, T + 1) int64 array, inputs and targets overlapping.
        eot_id: with this end-of-text token, attention stays inside documents: positions begin again at 0 with each
            end-of-text, which opens the document after it (as it does in sampling), and transformers' causal mask
            takes that as a border (Krell et al. 2021, Efficient Sequence Packing). None: all of a row is seen.

    Returns:
        dict: input_ids and shift_labels, (B, T) each, and position_ids, (B, T), where eot_id is given.
    """
    import torch

    rows, is_cuda = torch.as_tensor(rows), torch.device(device).type == "cuda"
    rows = (rows.pin_memory() if is_cuda else rows).to(device, non_blocking=is_cuda)  # so nobody waits for the GPU
    input_ids, shift_labels = rows[:, :-1], rows[:, 1:]
    if eot_id is None:
        return {"input_ids": input_ids, "shift_labels": shift_labels}
    places = rows.new_ones(input_ids.shape).cumsum(1) - 1  # 0, 1, 2, ...
    starts = (places * (input_ids == eot_id)).cummax(1).values  # of the document that a token stands in
    return {"input_ids": input_ids, "shift_labels": shift_labels, "position_ids": places - starts}


def epoch_shape(n_tokens, block_size):
    """(blocks of an epoch, largest shift of their borders); one block is given up to leave room for the shift."""
    whole = (n_tokens - 1) // block_size
    blocks = max(whole - 1, 1)
    return blocks, n_tokens - 1 - blocks * block_size


def evaluation_batches(n_tokens, block_size, batch_size, eval_iters, seed=0):
    """The fixed batches of an evaluation, as a list of (starts, length): sequences of `length` predictions each.

    eval_iters "all" covers every token after the first exactly once, in blocks of block_size and a shorter last
    one. A number gives that many batches of random crops, the same ones at every call.
    """
    if eval_iters != "all":
        samples = np.arange(eval_iters * batch_size, dtype=np.uint64)
        starts = (mix(samples, seed_of(seed, 3)) % np.uint64(n_tokens - block_size)).astype(np.int64)
        return [(starts[i : i + batch_size], block_size) for i in range(0, len(starts), batch_size)]
    whole, rest = divmod(n_tokens - 1, block_size)
    starts = np.arange(whole, dtype=np.int64) * block_size
    batches = [(starts[i : i + batch_size], block_size) for i in range(0, whole, batch_size)]
    return batches + ([(np.array([whole * block_size]), rest)] if rest else [])


def sliding_windows(n_tokens, block_size, stride, batch_size):
    """Windows that overlap, so that a token is predicted from more than what its block holds before it: as
    (starts, length, counted), of whose `length` predictions the last `counted` count, and all together every token
    after the first once.

    The windows are those of transformers' guide "Perplexity of fixed-length models": block_size tokens each, stride
    apart. With stride = block_size none overlap, and as there the first token of each is left out.
    """
    windows, end = [], 0
    for start in range(0, n_tokens, stride):
        before, end = end, min(start + block_size, n_tokens)
        windows.append((start, end - start - 1, min(end - before, end - start - 1)))
        if end == n_tokens:
            break
    batches = []
    for start, length, counted in windows:
        if not length:  # one token, with nothing before it
            continue
        if batches and batches[-1][1:] == (length, counted) and len(batches[-1][0]) < batch_size:
            batches[-1][0].append(start)
        else:
            batches.append(([start], length, counted))
    return [(np.array(starts), length, counted) for starts, length, counted in batches]


def seed_of(*numbers):
    """A 63-bit seed from whole numbers, such as (seed, step, micro-batch); for dropout and for the order."""
    low, high = np.random.SeedSequence(numbers).generate_state(2)
    return (int(high) << 32 | int(low)) >> 1


def shuffled(places, n, key):
    """The places-th elements of a pseudorandom permutation of 0..n-1, without building the permutation.

    A Feistel network permutes the smallest square of a power of two that holds n; what falls outside 0..n-1 is
    put through again (cycle walking). So a file of billions of tokens costs as much as a small one.
    Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains (2002).

    Args:
        places: (k,) uint64, each below n. n: size of the domain. key: which permutation.

    Returns:
        (k,) uint64.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = np.array(places, dtype=np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for i in range(_ROUNDS):
            # rounds far apart, for mix sees the sum only: with key + i they are shifts of one another, and
            # permutations of less than 100 places come out far from evenly
            left, right = right, left ^ (mix(right, key + (i << 40)) & mask)
        result[outside] = left << half | right
        outside = result >= n
    return result


def mix(values, key):
    """A 64-bit hash of each value under a key: SplitMix64's finalizer (Steele, Lea, Flood 2014).

    values: (k,) uint64. Returns (k,) uint64; the arithmetic wraps.
    """
    key = (key * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = values * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
