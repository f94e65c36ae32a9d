"""batches.py: the tokens of each step, checked by counting, by chi-square and against the published SplitMix64."""

import itertools
import math
import time
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from launching import run_python

from nanogpt_accel.batches import Batches, Mixture, epoch_shape, evaluation_batches, mix, seed_of, shuffled
from nanogpt_accel.data.token_files import TokenFile


class Counting:
    """A token file in which the id of each token is its position, so that a batch shows its positions. Reading beyond
    the end fails."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def rows(self, starts, length):
        starts = np.asarray(starts)
        assert starts.dtype == np.int64 and starts.min() >= 0 and starts.max() + length <= self.n
        return starts[:, None] + np.arange(length)


def permutation(n, key):
    return shuffled(np.arange(n, dtype=np.uint64), n, key).tolist()


def chi_square_excess(counts, expected):
    """Return the chi-square statistic of counts, in standard deviations above its mean. A value above 5 does not happen
    by chance."""
    counts = np.asarray(counts, dtype=float).ravel()
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


# ---- the hash


def test_mix_is_splitmix64():
    golden = 0x9E3779B97F4A7C15
    key = 1234567 * pow(golden, -1, 2**64) % 2**64  # mix(i, key) is output i of SplitMix64 seeded with key * golden
    # https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64
    assert mix(np.arange(5, dtype=np.uint64), key).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_seeds_are_distinct_and_fit_an_int64():
    grid = list(itertools.product((0, 1, 1337, 2**40), (0, 1, 2, 3), range(30), (0, 1, 7)))
    seeds = [seed_of(*numbers) for numbers in grid]
    assert len(set(seeds)) == len(grid) and min(seeds) >= 0 and max(seeds) < 2**63
    assert max(seeds) > 2**62 and seed_of(1337, 0, 5, 2) == seed_of(1337, 0, 5, 2)
    # every bit is random: half of n fair bits are set, with standard deviation sqrt(n) / 2
    for bit in range(63):
        ones = sum(seed >> bit & 1 for seed in seeds)
        assert abs(ones - len(seeds) / 2) < 5 * math.sqrt(len(seeds)) / 2


# ---- the permutation

SIZES = [1, 2, 3, 5, 6, 7, 10, 100, 999, 10_007, *(2**k + d for k in (2, 3, 4, 7, 8, 13) for d in (-1, 0, 1))]


@pytest.mark.parametrize("n", sorted(set(SIZES)))
def test_shuffled_is_a_permutation(n):
    for key in (0, 1, 1337, 2**63 - 1):
        assert sorted(permutation(n, key)) == list(range(n))


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 16, 64])
def test_permutation_places_are_uniform(n):
    """Over many keys, every element is equally often at every place, and every pair at the first two places."""
    keys = 1000
    orders = np.array([permutation(n, seed_of(7, 2, k)) for k in range(keys)], dtype=np.int64)
    counts = np.zeros((n, n))
    np.add.at(counts, (np.arange(n)[None].repeat(keys, 0), orders), 1)
    assert counts.sum(0).tolist() == [keys] * n
    assert chi_square_excess(counts, keys / n) < 5
    if n > 2:
        pairs = np.zeros((n, n))
        np.add.at(pairs, (orders[:, 0], orders[:, 1]), 1)
        assert chi_square_excess(pairs[~np.eye(n, dtype=bool)], keys / (n * (n - 1))) < 5


def test_permutations_of_four_are_uniform():
    keys = 2400
    orders, counts = np.unique([permutation(4, seed_of(3, 2, k)) for k in range(keys)], axis=0, return_counts=True)
    assert len(orders) == 24 and chi_square_excess(counts, 100) < 5


@pytest.mark.parametrize("n", [1003, 2**14, 100_003])
def test_long_permutation_has_no_pattern(n):
    first, second = np.array(permutation(n, 5)), np.array(permutation(n, 6))
    for a, b in ((np.arange(n), first), (first[:-1], first[1:]), (first, second)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(n)
    bins = np.zeros((10, 10))
    np.add.at(bins, (np.arange(n) * 10 // n, first * 10 // n), 1)
    assert chi_square_excess(bins, n / 100) < 5
    # the mean distance of two random elements is n / 3; the number of fixed points is Poisson with mean 1
    assert abs(np.abs(np.diff(first)).mean() / (n / 3) - 1) < 5 / math.sqrt(n)
    assert (first == np.arange(n)).sum() < 9


def shuffled_in_python(place, n, key):
    """Return shuffled() of one place, computed with Python integers."""

    def mixed(value, key):
        z = (value + key + 1) * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    half = 1
    while 4**half < n:
        half += 1
    while True:
        left, right = divmod(place, 2**half)
        for i in range(6):
            left, right = right, left ^ mixed(right, key + i * 2**40) % 2**half
        place = left * 2**half + right
        if place < n:
            return place


def test_batch_order_never_changes_between_versions():
    """If the order changed, a run that is resumed with another version would read some blocks twice."""
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 17, 999, 15_684, 2**20, 8_823_811, 9_035_582_198):
        for key in (0, 1, 2**63 - 1, *rng.integers(0, 2**63, 3).tolist()):
            places = [0, n - 1, *rng.integers(0, n, 10).tolist()]
            assert shuffled(np.array(places, np.uint64), n, key).tolist() == [
                shuffled_in_python(p, n, key) for p in places
            ]
    for n_tokens, block_size, first in ((1_003_854, 256, 3 * 3920 - 300), (9_035_582_198, 1024, 2**40), (130, 64, 0)):
        blocks, slack = epoch_shape(n_tokens, block_size)
        expected = []
        for sample in range(first, first + 600):
            epoch, place = divmod(sample, blocks)
            low, high = np.random.SeedSequence((1337, 2, epoch)).generate_state(2).tolist()
            key = (high * 2**32 + low) // 2
            expected.append(shuffled_in_python(place, blocks, key) * block_size + key % (slack + 1))
        starts = [Batches(Counting(n_tokens), block_size, 1, 1, 1337).starts(s, 0) for s in range(first, first + 600)]
        assert np.concatenate(starts).tolist() == expected


@pytest.mark.parametrize("sampling", ["shuffle", "random"])
def test_sequence_order_does_not_depend_on_the_batch_size(sampling):
    def stream(batch_size):
        batches = Batches(Counting(70_001), 7, batch_size, 1, 5, sampling)
        return np.concatenate([batches.starts(step, 0) for step in range(-(-3000 // batch_size))])[:3000].tolist()

    assert stream(1) == stream(12) == stream(255) == stream(256) == stream(257) == stream(3000)


# ---- epochs


@pytest.mark.parametrize(
    ("n_tokens", "block_size", "batch_size", "micro_batches"),
    [(1000, 8, 4, 3), (1001, 8, 5, 1), (777, 64, 3, 2), (66, 64, 1, 1), (130, 64, 4, 2), (193, 64, 2, 1)],
)
def test_epoch_contains_every_block_once(n_tokens, block_size, batch_size, micro_batches):
    batches = Batches(Counting(n_tokens), block_size, batch_size, micro_batches, seed=1337)
    blocks, _ = epoch_shape(n_tokens, block_size)
    # at most one block and a remainder are left out, but never the only block
    assert blocks == max(1, (n_tokens - 1) // block_size - 1)
    steps = range(-(-7 * blocks // (batch_size * micro_batches)))
    stream = [start for step in steps for m in range(micro_batches) for start in batches.starts(step, m).tolist()]
    shifts = set()
    for epoch in range(7):
        starts = sorted(stream[epoch * blocks : (epoch + 1) * blocks])
        shift = starts[0]
        assert starts == [shift + i * block_size for i in range(blocks)]
        shifts.add(shift)
    assert len(shifts) > 1  # the boundaries differ between epochs


@pytest.mark.parametrize(
    ("sizes", "block_size", "batch_size"),
    [([1000, 1, 37, 0, 2500, 64, 701], 7, 12), ([333, 334, 335], 33, 5), ([90, 7, 1003], 100, 3), ([10_007], 64, 12)],
)
def test_epoch_over_several_files_contains_every_block_once(tmp_path, sizes, block_size, batch_size):
    """Token i has the id i, so that rows show their positions. The files have odd sizes."""
    paths, ends = [tmp_path / f"train-{i:05d}.bin" for i in range(len(sizes))], np.cumsum(sizes)
    for path, size, end in zip(paths, sizes, ends.tolist(), strict=True):
        np.arange(end - size, end, dtype=np.uint32).tofile(path)
    batches = Batches(TokenFile(paths, "uint32"), block_size, batch_size, 1, seed=11)
    blocks, _ = epoch_shape(sum(sizes), block_size)
    epochs = 4000 // blocks + 1
    rows = np.concatenate([batches(step, 0) for step in range(-(-epochs * blocks // batch_size))])[: epochs * blocks]
    assert (np.diff(rows) == 1).all() and rows.shape == (epochs * blocks, block_size + 1)
    targets = np.sort(rows[:, 1:].reshape(epochs, -1))  # the targets of an epoch are consecutive, none twice
    assert (np.diff(targets) == 1).all() and targets.shape[1] == blocks * block_size
    starts = rows[:, 0].reshape(epochs, blocks)
    order = (starts - starts.min(1, keepdims=True)) // block_size
    # the order is random: every tenth of the blocks is equally often in every tenth of the epoch
    parts = min(10, blocks)
    tenths = np.arange(blocks) * parts // blocks
    seen, expected = np.zeros((parts, parts)), epochs * np.outer(np.bincount(tenths), np.bincount(tenths)) / blocks
    np.add.at(seen, (np.broadcast_to(tenths, order.shape), tenths[order]), 1)
    assert chi_square_excess(seen, expected.ravel()) < 5
    following = (np.diff(order) == 1).mean()  # two consecutive blocks follow each other with probability 1 / blocks
    assert abs(following * blocks - 1) < 5 / math.sqrt(order.size / blocks)


def test_block_boundaries_shift_uniformly_between_epochs():
    n_tokens, block_size = 100, 8
    batches = Batches(Counting(n_tokens), block_size, batch_size=11, micro_batches=1, seed=3)
    assert epoch_shape(n_tokens, block_size) == (11, 11)
    shifts = [min(batches.starts(step, 0).tolist()) for step in range(1800)]  # one step is one epoch here
    assert chi_square_excess(np.bincount(shifts, minlength=12), 150) < 5


@pytest.mark.parametrize(("n_tokens", "block_size"), [(100, 8), (97, 8), (191, 64), (128, 64), (66, 64)])
@pytest.mark.parametrize("sampling", ["shuffle", "random"])
def test_every_token_is_used_in_the_long_run(n_tokens, block_size, sampling):
    batches = Batches(Counting(n_tokens), block_size, batch_size=2000, micro_batches=1, seed=3, sampling=sampling)
    assert set(batches(0, 0).flatten().tolist()) == set(range(n_tokens))


@pytest.mark.parametrize("sampling", ["shuffle", "random"])
def test_epochs_and_seeds_have_different_orders(sampling):
    def stream(seed, first):
        batches = Batches(Counting(100_001), 10, 50, 4, seed, sampling)
        return [s for step in range(first, first + 50) for m in range(4) for s in batches.starts(step, m).tolist()]

    one, two, other = stream(1, 0), stream(1, 50), stream(2, 0)
    assert len(one) == 10_000  # about one epoch
    for a, b in ((one, two), (one, other), (two, other)):
        same = sum(x == y for x, y in zip(a, b, strict=True))
        assert same < 10 and abs(np.corrcoef(a, b)[0, 1]) < 0.05


# ---- steps and processes


@pytest.mark.parametrize("sampling", ["shuffle", "random"])
def test_batch_is_a_pure_function_of_seed_step_and_micro_batch(sampling, tmp_path):
    arguments = {"block_size": 16, "batch_size": 3, "micro_batches": 4, "seed": 11, "sampling": sampling}
    places = list(itertools.product(range(40), range(4)))
    batches = Batches(Counting(500), **arguments)
    forward = {place: batches(*place).tolist() for place in places}
    again = Batches(Counting(500), **arguments)
    for place in sorted(places, key=lambda p: seed_of(*p)):
        assert again(*place).tolist() == forward[place]
    # the batches are also the same in another process, where Python hashes have another salt
    script = (
        "import numpy as np; from nanogpt_accel.batches import Batches\n"
        f"b = Batches(range(500), **{arguments!r})\nprint([b.starts(s, m).tolist() for s, m in {places!r}])"
    )
    done = run_python("-c", script)
    assert done.stdout.strip() == str([[row[0] for row in forward[place]] for place in places])


@pytest.mark.parametrize("sampling", ["shuffle", "random"])
def test_global_batch_does_not_depend_on_the_number_of_processes(sampling):
    def samples(step, world):
        batches = Batches(Counting(900), block_size=16, batch_size=3, micro_batches=8, seed=5, sampling=sampling)
        # process r of W takes micro-batch m * W + r
        return sorted(batches(step, m * world + rank).tolist() for rank in range(world) for m in range(8 // world))

    for step in (0, 1, 2, 17):
        one = samples(step, 1)
        assert len(one) == 8
        assert one == samples(step, 2) == samples(step, 4) == samples(step, 8)


@pytest.mark.parametrize("sampling", ["shuffle", "random"])
@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_no_read_beyond_the_file(sampling, block_size):
    for extra in (*range(1, 5), block_size, block_size + 1, 2 * block_size, 2 * block_size + 2):
        for seed in range(3):
            batches = Batches(Counting(block_size + extra), block_size, 9, 2, seed, sampling)
            for step in range(12):
                assert batches(step, step % 2).shape == (9, block_size + 1)  # Counting raises an error beyond the end


def test_targets_are_the_next_tokens(tmp_path):
    ids = np.random.default_rng(0).integers(0, 2**16, 3000).astype(np.uint16)
    ids.tofile(tmp_path / "train.bin")
    batches = Batches(TokenFile(tmp_path / "train.bin", "uint16"), 32, 6, 2, seed=1)
    for step, micro_batch in ((0, 0), (0, 1), (40, 1)):
        rows = batches(step, micro_batch)
        x, y = rows[:, :-1], rows[:, 1:]
        assert rows.dtype == np.int64 and x.shape == y.shape == (6, 32)
        for row, (start, xi, yi) in enumerate(zip(batches.starts(step, micro_batch), x, y, strict=True)):
            assert xi.tolist() == ids[start : start + 32].tolist(), row
            assert yi.tolist() == ids[start + 1 : start + 33].tolist(), row


@pytest.mark.parametrize("n_tokens", [65, 70, 164])
def test_random_sampling_is_uniform(n_tokens):
    batches = Batches(Counting(n_tokens), 64, batch_size=500, micro_batches=2, seed=1337, sampling="random")
    starts = np.concatenate([batches.starts(step, m) for step in range(20) for m in range(2)])
    places = n_tokens - 64  # nanoGPT's torch.randint(len(data) - block_size)
    assert starts.min() == 0 and starts.max() == places - 1
    if places > 1:
        assert chi_square_excess(np.bincount(starts), 20_000 / places) < 5
        pairs = np.zeros((places, places))
        np.add.at(pairs, (starts[:-1], starts[1:]), 1)
        assert chi_square_excess(pairs, 19_999 / places**2) < 5


# ---- mixtures


def shares(*weights):
    """Return weights as shares of the sources "0", "1", ..., as a recipe does."""
    weights = [Fraction(str(weight)) for weight in weights]
    return {str(i): weight / sum(weights) for i, weight in enumerate(weights) if weight}


def mixture(sizes, stages, block_size=8, batch_size=5, micro_batches=4, seed=1337, **options):
    tokens = {str(i): Counting(size) for i, size in enumerate(sizes)}
    return Mixture(tokens, stages, block_size, batch_size, micro_batches, seed, **options)


@pytest.mark.parametrize("sampling", ["shuffle", "random"])
def test_a_mixture_of_one_source_has_the_batches_of_this_source(sampling):
    alone = Batches(Counting(901), 8, 7, 3, seed=5, sampling=sampling)
    mixed = Mixture({"a": Counting(901)}, ((0, {"a": Fraction(1)}),), 8, 7, 3, seed=5, sampling=sampling)
    for step in (*range(60), 10**6):  # more than one block of the mixture, and several epochs of the sources
        assert all((alone(step, m) == mixed(step, m)).all() for m in range(3))
        assert mixed.describe(step, 1) == [{"source": "a", **place} for place in alone.describe(step, 1)]


def test_shares_of_a_mixture_are_exact_in_every_thousand_samples():
    rng = np.random.default_rng(0)
    many = [(7, 3), (0.7, 0.2, 0.1), (1, 1, 1), (0.9999, 0.0001), (0.3331, 0.3333, 0.3336)]
    many += [tuple(rng.dirichlet(np.full(n, 0.4)).round(7) + 1e-7) for n in (2, 3, 4, 5, 8, 8)]
    for weights in many:
        shared = shares(*weights)
        wanted = np.array([float(share) for share in shared.values()])
        mixed = mixture([10**9] * len(weights), ((0, shared),), seed=len(weights))
        for first in (0, 10**9):
            sources, _ = mixed.samples(first, 20_000)
            used = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
            thousands = np.diff(used[999::1000], axis=0, prepend=0)
            assert np.abs(thousands - 1000 * wanted).max() < 1.001, weights  # within one sample
            # and evenly spread: no source is ahead or behind by more than a few samples at any time
            assert np.abs(used - wanted * np.arange(1, 20_001)[:, None]).max() < 3, weights
    for weights in ((0.7, 0.2, 0.1), (0.123, 0.877)):  # shares that are multiples of 1/1000 are exact
        used = np.bincount(mixture([999] * len(weights), ((0, shares(*weights)),)).samples(5000, 1000)[0])
        assert used.tolist() == [round(1000 * weight) for weight in weights]


STAGES = ((0, shares(6, 3, 1)), (97, shares(1, 0, 1)), (230, shares(2, 2, 1)))  # steps, not multiples of a block


def test_each_source_of_a_mixture_has_its_own_epochs_over_all_stages():
    """The samples of a source are those of Batches on this source alone, in order, without gaps."""
    sizes = (1201, 650, 3001)
    mixed = mixture(sizes, STAGES)
    places = [place for step in range(500) for m in range(4) for place in mixed.describe(step, m)]
    rows = np.concatenate([mixed(step, m) for step in range(500) for m in range(4)])
    assert rows[:, 0].tolist() == [place["start"] for place in places] and (np.diff(rows) == 1).all()
    for name, size in zip("012", sizes, strict=True):
        starts = [place["start"] for place in places if place["source"] == name]
        assert starts == Batches(Counting(size), 8, len(starts), 1, seed=1337).starts(0, 0).tolist()
        blocks = epoch_shape(size, 8)[0]
        assert len(starts) > 3 * blocks
        for epoch in range(3):
            assert len(set(starts[epoch * blocks : (epoch + 1) * blocks])) == blocks
    by_step = [mixed.shares(step) for step in range(500)]
    for (start, shared), end in zip(STAGES, (97, 230, 500), strict=True):
        for name in "012":
            mean = np.mean([by_step[step][name] for step in range(start, end)])
            assert abs(mean - shared.get(name, 0)) * (end - start) * 20 < 3  # within 3 samples
    assert max(shared["1"] for shared in by_step[97:230]) == 0


def test_order_within_a_source_of_a_mixture_is_random():
    """A chi-square test checks that every tenth of the blocks of a source is equally often in every tenth of its
    epoch."""
    size, blocks, epochs = 10_001, epoch_shape(10_001, 8)[0], 20
    mixed = mixture((size, 5003), ((0, shares(0.3, 0.7)),))
    sources, starts = mixed.samples(0, round(blocks * epochs / 0.3) + 1000)
    starts = starts[sources == 0][: blocks * epochs].reshape(epochs, blocks)
    order = (starts - starts.min(1, keepdims=True)) // 8
    tenths, seen = np.arange(blocks) * 10 // blocks, np.zeros((10, 10))
    np.add.at(seen, (np.broadcast_to(tenths, order.shape), tenths[order]), 1)
    expected = epochs * np.outer(np.bincount(tenths), np.bincount(tenths)) / blocks
    assert chi_square_excess(seen, expected.ravel()) < 5


def test_mixture_is_a_pure_function_of_the_step_for_any_number_of_processes():
    def samples(step, world):
        mixed = mixture((901, 500, 700), STAGES)  # a new object, as in a resumed run
        return sorted(mixed(step, m * world + rank).tolist() for rank in range(world) for m in range(4 // world))

    forward = mixture((901, 500, 700), STAGES)
    batches = {step: sorted(forward(step, m).tolist() for m in range(4)) for step in range(240)}
    for step in (239, 0, 96, 97, 98, 229, 230, 17):
        assert samples(step, 1) == samples(step, 2) == samples(step, 4) == batches[step]
    assert batches[0] != sorted(mixture((901, 500, 700), STAGES, seed=2)(0, m).tolist() for m in range(4))


def test_a_new_stage_changes_no_earlier_batch():
    """A run can be resumed with another mix, even with new sources, and keeps the order of its tokens."""
    before = mixture((901, 500), ((0, shares(2, 1)),))
    after = mixture((901, 500, 700), ((0, shares(2, 1)), (60, shares(0, 1, 1))))
    assert all((before(step, m) == after(step, m)).all() for step in range(60) for m in range(4))
    assert before.describe(60, 0) != after.describe(60, 0)


# ---- evaluation


@pytest.mark.parametrize("block_size", [1, 8, 50])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_eval_iters_all_covers_every_target_once(block_size, batch_size):
    for n_tokens in (*range(block_size + 1, 3 * block_size + 3), 200, 201, 208, 209):
        targets = []
        for starts, length in evaluation_batches(n_tokens, block_size, batch_size, "all"):
            rows = Counting(n_tokens).rows(starts, length + 1)
            assert 1 <= len(starts) <= batch_size and 1 <= length <= block_size
            targets += rows[:, 1:].flatten().tolist()
        assert sorted(targets) == list(range(1, n_tokens))


def test_eval_iters_number_gives_fixed_random_crops():
    arguments = (5000, 64, 12, 20)
    fixed = evaluation_batches(*arguments)
    np.random.seed(1)  # other code that uses random numbers
    again = evaluation_batches(*arguments)
    assert [(s.tolist(), n) for s, n in fixed] == [(s.tolist(), n) for s, n in again]
    assert [(len(s), n) for s, n in fixed] == [(12, 64)] * 20
    # a larger number of batches starts with the same batches, and they differ from training batches of any seed
    assert np.array_equal(evaluation_batches(5000, 64, 12, 40)[19][0], fixed[19][0])
    starts = np.concatenate([s for s, _ in fixed])
    for seed in range(5):
        training = Batches(Counting(5000), 64, 240, 1, seed, "random").starts(0, 0)
        assert (training == starts).sum() < 5


def test_evaluation_crops_are_uniform_and_inside():
    for n_tokens in (9, 10, 40):
        starts = np.concatenate([s for s, _ in evaluation_batches(n_tokens, 8, 10, 1000)])
        places = n_tokens - 8
        assert starts.min() == 0 and starts.max() == places - 1
        assert places == 1 or chi_square_excess(np.bincount(starts), 10_000 / places) < 5


# ---- cost


@pytest.mark.parametrize("sampling", ["shuffle", "random"])
def test_cost_does_not_depend_on_the_number_of_tokens(sampling):
    n_tokens = 9_035_582_198
    batches = Batches(Counting(n_tokens), 1024, 12, 40, seed=1337, sampling=sampling)
    batches(0, 0)
    tracemalloc.start()
    start_time = time.process_time()
    largest = 0
    for step in (0, 1, 17_999, 599_999, 10**9):
        for m in (0, 39):
            largest = max(largest, batches.starts(step, m).max())
    evaluation_batches(n_tokens, 1024, 12, 20)
    seconds = time.process_time() - start_time
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6 and seconds < 1
    assert 0.9 * n_tokens < largest <= n_tokens - 1025  # the largest of 120 random positions
