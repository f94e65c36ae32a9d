"""Select the tokens of each batch as a pure function of (seed, step).

There is no state between steps, so a run can resume at any step, and the samples of a step are the same for any number
of processes. A sample is a sequence of block_size + 1 tokens. Samples are numbered in the order of training: with G =
batch_size * gradient_accumulation_steps, step s uses samples s*G to (s+1)*G - 1.
"""

import itertools
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

WINDOW = 256  # number of samples whose start positions are computed together
_ROUNDS = 6  # rounds of the Feistel network in `shuffled`; 4 are enough in theory, but small permutations need more


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

    def describe(self, step, micro_batch):
        """Return a description of each sequence of a micro-batch, as a list of dictionaries."""
        return [{"start": start} for start in self.starts(step, micro_batch).tolist()]

    def shares(self, step):
        """Return {source: share of the sequences of a step}; {} for a single source."""
        return {}


# compute WINDOW samples together, because numpy takes as long for one batch as for hundreds of samples
@lru_cache(maxsize=4)
def _window_starts(number, *arguments):
    """Return the start positions of samples number * WINDOW to (number + 1) * WINDOW - 1, as an int64 array."""
    return _sample_starts(range(number * WINDOW, (number + 1) * WINDOW), *arguments)


def _sample_starts(samples, n_tokens, block_size, seed, sampling):
    """Return the start positions in the token file of a range of samples, as an int64 array (len(samples),)."""
    samples = np.arange(samples.start, samples.stop, dtype=np.uint64)
    if sampling == "random":
        return _random_starts(samples, n_tokens, block_size, seed_of(seed, 1))
    n_blocks, max_shift = epoch_shape(n_tokens, block_size)
    starts = np.empty(len(samples), dtype=np.int64)
    epochs, places = samples // np.uint64(n_blocks), samples % np.uint64(n_blocks)
    for epoch in np.unique(epochs):  # the samples may include the end of an epoch
        is_in_epoch = epochs == epoch
        key = seed_of(seed, 2, int(epoch))
        shift = key % (max_shift + 1)  # so that every epoch has different block boundaries
        starts[is_in_epoch] = shuffled(places[is_in_epoch], n_blocks, key).astype(np.int64) * block_size + shift
    return starts


def _random_starts(samples, n_tokens, block_size, key):
    return (mix(samples, key) % np.uint64(n_tokens - block_size)).astype(np.int64)


class Mixture:
    """The batches of a training run on several sources, with the interface of Batches.

    The source of a sample depends only on the seed and the number of the sample. Each stage is divided into blocks of
    BLOCK samples. In every block, each source has its share of the samples, rounded up or down, and these samples are
    spread evenly. The samples of each source are numbered from 0 over all stages. Sample k of a source is the same as
    sample k of a run on this source alone. So with sampling="shuffle", an epoch of a source uses each of its sequences
    once.

    Args:
        tokens: {source: its tokens}; see Batches.
        stages: ((first step, {source: share as a Fraction}), ...). The first stage starts at step 0; the shares of a
            stage sum to 1; a source that is not listed is not used.
        block_size, batch_size, micro_batches, seed, sampling: see Batches.
    """

    BLOCK = 1000  # samples per block
    CYCLE = 1024  # blocks per cycle; over a cycle, rounding up and down cancel out

    def __init__(self, tokens, stages, block_size, batch_size, micro_batches, seed, sampling="shuffle"):
        self.names, self.block_size = list(tokens), block_size
        self.batch_size, self.micro_batches = batch_size, micro_batches
        self.tokens = list(tokens.values())
        self.order = block_size, seed, sampling
        self.phases = mix(np.arange(len(tokens), dtype=np.uint64), seed_of(seed, 4)) / 2.0**64  # in [0, 1)
        self.first_samples = [step * batch_size * micro_batches for step, _ in stages]  # of each stage
        # per stage, the ends of the parts of a block (see _blocks), in units of 1 / CYCLE samples
        self.ends = []
        for _, shares in stages:
            ends = itertools.accumulate(shares.get(name, 0) * self.BLOCK * self.CYCLE for name in tokens)
            self.ends.append(np.array([int(end) for end in ends]))
        self.counts = [np.zeros(len(tokens), np.int64)]  # samples from each source before each stage
        for stage, (first, end) in enumerate(itertools.pairwise(self.first_samples)):
            block, rest = divmod(end - first, self.BLOCK)
            sources, _ = self._block(stage, block)
            used = self._blocks(stage, block) + np.bincount(sources[:rest], minlength=len(tokens))
            self.counts.append(self.counts[stage] + used)
        self._block = lru_cache(maxsize=2)(self._block)

    def _blocks(self, stage, n):
        """Return the number of samples from each source in the first n blocks of a stage.

        A block is divided by systematic sampling (Madow 1949). Every source has a part of the interval from 0 to BLOCK;
        the length of this part is the source's share of BLOCK samples. Every block has an offset below 1, which shifts
        all parts. The number of samples from a source is the number of integers in its shifted part. This is its share,
        rounded up or down. From block to block, the offset increases by about the golden ratio, modulo 1. The offsets
        are multiples of 1 / CYCLE. A cycle of CYCLE blocks uses each multiple from 0 to 1 - 1 / CYCLE once.
        """
        cycles, rest = divmod(n, self.CYCLE)
        offsets = np.arange(rest) * 633 % self.CYCLE
        ends = self.ends[stage]
        return np.diff(cycles * ends + ((ends[:, None] + offsets) // self.CYCLE).sum(1), prepend=0)

    def _block(self, stage, n):
        """Return (source, start position) of the samples in block n of a stage: two arrays (BLOCK,)."""
        done = self._blocks(stage, n)
        counts = self._blocks(stage, n + 1) - done
        firsts = (self.counts[stage] + done).tolist()
        starts = [
            _sample_starts(range(first, first + count), len(tokens), *self.order)
            for tokens, first, count in zip(self.tokens, firsts, counts.tolist(), strict=True)
        ]
        sources = np.repeat(np.arange(len(counts)), counts)
        # spread the samples of each source evenly over the block
        places = np.concatenate([np.arange(count) for count in counts])
        order = np.argsort((places + self.phases[sources]) / counts[sources], kind="stable")
        return sources[order], np.concatenate(starts)[order]

    def samples(self, first, count):
        """Return the sources and the start positions of `count` samples from number `first` on: two arrays (count,)."""
        stage = bisect_right(self.first_samples, first) - 1
        offset = first - self.first_samples[stage]
        numbers = range(offset // self.BLOCK, -(-(offset + count) // self.BLOCK))
        blocks = zip(*(self._block(stage, n) for n in numbers), strict=True)
        return tuple(np.concatenate(parts)[offset % self.BLOCK :][:count] for parts in blocks)

    def __call__(self, step, micro_batch):
        """Return the tokens of a micro-batch, inputs and targets, as an int64 array (batch_size, block_size + 1)."""
        sources, starts = self.samples((step * self.micro_batches + micro_batch) * self.batch_size, self.batch_size)
        rows = np.empty((self.batch_size, self.block_size + 1), np.int64)
        for source in np.unique(sources):
            rows[sources == source] = self.tokens[source].rows(starts[sources == source], self.block_size + 1)
        return rows

    def describe(self, step, micro_batch):
        """Return the source and the start position of each sequence of a micro-batch, as a list of dictionaries."""
        sources, starts = self.samples((step * self.micro_batches + micro_batch) * self.batch_size, self.batch_size)
        return [{"source": self.names[i], "start": start} for i, start in zip(sources, starts.tolist(), strict=True)]

    def shares(self, step):
        """Return {source: share of the sequences of a step}."""
        size = self.batch_size * self.micro_batches
        counts = np.bincount(self.samples(step * size, size)[0], minlength=len(self.names))
        return dict(zip(self.names, (counts / size).tolist(), strict=True))


def model_inputs(rows, device="cpu", eot_id=None):
    """Convert rows of tokens to keyword arguments of the model, and move them to a device.

    Args:
        rows: (B, T + 1) int64 array: the first T tokens of a row are the inputs, the last T the targets.
        eot_id: id of the end-of-text token, to mask attention across documents; None: no mask. Each end-of-text token
            starts a new document and has position 0. transformers' causal mask recognizes documents by their positions
            and prevents attention between documents (Krell et al. 2021, Efficient Sequence Packing).

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
    """Return (blocks per epoch, maximum shift of the block boundaries). The data contain
    (n_tokens - 1) // block_size blocks. An epoch uses one block less, to leave room for the shift, but it uses at least
    one block."""
    n_blocks = max((n_tokens - 1) // block_size - 1, 1)
    return n_blocks, n_tokens - 1 - n_blocks * block_size


def evaluation_batches(n_tokens, block_size, batch_size, eval_iters, seed=0):
    """Return the batches of an evaluation: a list of (start positions, targets per sequence). Calls with the same
    arguments return the same batches.

    eval_iters: "all" or a number of batches. With "all", the sequences are consecutive blocks of block_size targets and
        a shorter last block, so every token except the first is a target once. With a number, the sequences are random
        crops.
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
    """Return overlapping windows for an evaluation, which give most targets more context than separate blocks do.

    As in transformers' guide "Perplexity of fixed-length models", a window of block_size tokens starts every `stride`
    tokens. If stride < block_size, every token except the first is scored in exactly one window. If stride =
    block_size, windows do not overlap, and the first token of each window is not scored.

    Returns:
        A list with one (starts, length, counted) per batch. starts: the start positions of the windows. length: the
        number of targets per window. counted: the number of scored targets per window; only the last ones are scored.
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
    """Return the elements at `places` of a pseudorandom permutation of 0..n-1, without computing the others.

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
            # mix only uses the sum of value and key. With key + i, the rounds would therefore be shifted copies of each
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
