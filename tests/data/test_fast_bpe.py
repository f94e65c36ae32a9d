"""gigatoken's ids are those of tiktoken and of the tokenizers library."""

import copy
import json
import random
import sys
import unicodedata

import numpy as np
import pytest
from tokenizer_kinds import MAKERS, TEXTS, tokenizer_json
from tokenizers import Tokenizer as Backend

from nanogpt_accel.data import fast_bpe
from nanogpt_accel.data.fast_bpe import FastBPE, is_safe
from nanogpt_accel.data.tokenizer import EOT, Tokenizer

pytest.importorskip("gigatoken", reason="no gigatoken for this platform")

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
WORDS = [
    *" \n\t'abcXYZ019éßİſ’“”…–日本語😀",
    "'s",
    "'LL",
    "the ",
    "  ",
    "\r\n",
    "ﬁ",
    "e\u0301",
    "\xa0",
    *TEXTS.values(),
]
WORDS += [EOT, "<s>", "</s>", "<unk>", "▁", "<0x41>"]


@pytest.fixture(scope="module")
def gpt2(gpt2_files):
    return Tokenizer.gpt2()


@pytest.fixture(scope="module")
def encode(gpt2):
    """Return tiktoken's encoder, a function from texts to lists of ids."""
    tiktoken = pytest.importorskip("tiktoken")
    return tiktoken.get_encoding("gpt2").encode_ordinary_batch


def fast_ids(tokenizer, texts):
    return [ids.tolist() for ids in FastBPE(json.loads(tokenizer.text)).encode_batch(texts)]


def random_texts(number, seed):
    rng, categories = random.Random(seed), {}
    for point in range(0, 0x110000, 7):
        categories.setdefault(unicodedata.category(chr(point)), []).append(chr(point))
    pools = [pool for name, pool in categories.items() if name != "Cs"]
    texts = []
    for _ in range(number):
        words = WORDS if rng.random() < 0.6 else [*rng.choice(pools), *rng.choice(pools), *WORDS[:20]]
        texts.append("".join(rng.choices(words, k=rng.choice((1, 2, 3, 5, 8, 13, 30)))))
    return [text for text in texts if is_safe(text)]


CONTEXTS = ["{}'s", *(pytest.param(context, marks=pytest.mark.slow) for context in ("a{}1", " {}!", "  {}  "))]


@pytest.mark.parametrize("context", CONTEXTS)
def test_every_character_in_gpt2(gpt2, encode, context):
    """The tokens show whether a character is taken for a letter, a digit, white space or something else."""
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    parts = [context.format(chr(point)) for point in points if is_safe(chr(point))]
    assert len(points) - 5000 < len(parts) < len(points)
    texts = ["\n".join(parts[i : i + 5000]) for i in range(0, len(parts), 5000)]
    assert fast_ids(gpt2, texts) == encode(texts)


@pytest.mark.parametrize("number", [2000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_random_texts_in_gpt2(gpt2, encode, number):
    texts = random_texts(number, seed=number)
    assert len(texts) > 0.9 * number and fast_ids(gpt2, texts) == encode(texts)


@pytest.mark.parametrize(
    "text", ["", "a" * 10**5, " " * 10**5, "\n" * 10**5, "ab" * 10**5, "日" * 10**5, " \t\n" * 10**5]
)
def test_hostile_texts_in_gpt2(gpt2, encode, text):
    assert fast_ids(gpt2, [text, "b"]) == encode([text, "b"])


SPEC = json.loads(tokenizer_json("byte-level", EOT))
SPLIT = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
BYTES = SPEC["pre_tokenizer"] | {"use_regex": False}
VARIANTS = {
    "llama3": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BYTES]}},
    "prefix space": {"pre_tokenizer": SPEC["pre_tokenizer"] | {"add_prefix_space": True}},
    "ignore_merges": {"model": SPEC["model"] | {"ignore_merges": True}},
    "NFC": {"normalizer": {"type": "NFC"}},
    "lowercase": {"normalizer": {"type": "Lowercase"}},
    "unknown regex": {"pre_tokenizer": SPLIT | {"pattern": {"Regex": r"\w+|\W"}}},
}
REFUSED = {"unigram with bytes", "unigram", "words", "word pieces", "suffixes", "NFC", "lowercase", "unknown regex"}


@pytest.mark.parametrize("kind", [*MAKERS, *VARIANTS])
def test_other_tokenizers_are_the_same_or_refused(kind):
    text = tokenizer_json(kind) if kind in MAKERS else json.dumps(SPEC | VARIANTS[kind])
    if kind in REFUSED:
        with pytest.raises(ValueError):
            FastBPE(json.loads(text))
        return
    backend, texts = Backend.from_str(text), random_texts(2000, seed=1)
    backend.encode_special_tokens = True
    expected = [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]
    assert [ids.tolist() for ids in FastBPE(json.loads(text)).encode_batch(texts)] == expected


def test_tokens_that_are_not_special_are_refused():
    """gigatoken ignores their single_word setting."""
    token = SPEC["added_tokens"][0] | {"id": 999, "content": "the", "special": False}
    with pytest.raises(ValueError):
        FastBPE(SPEC | {"added_tokens": [token]})


@pytest.mark.parametrize("special_tokens", ["text", "tokens"])
def test_batches_with_new_and_special_characters(gpt2, special_tokens):
    """Texts that gigatoken would encode differently are encoded without it."""
    tokenizer = copy.copy(gpt2)
    tokenizer.special_tokens = special_tokens
    texts = ["One day", "", f"a{EOT}b{EOT}{EOT}", EOT, "\U00032548's", "\ua7cf's", "नमस्ते's", "😀's", "\ua720's"]
    assert [is_safe(text) for text in texts] == [True] * 4 + [False] * 2 + [True] * 3
    batch = tokenizer.for_thread().encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode_document(text).tolist() for text in texts]
    assert all(ids.dtype in (np.uint16, np.uint32) for ids in batch)


def test_texts_that_are_encoded_without_gigatoken(monkeypatch):
    monkeypatch.setattr(fast_bpe, "LONGEST", 5)
    assert [is_safe(text) for text in ("five5", "six666", "\ud800")] == [True, False, False]


def test_cache_is_emptied(gpt2, monkeypatch):
    monkeypatch.setattr(fast_bpe, "CACHE_BYTES", -(10**12))
    monkeypatch.setattr(fast_bpe, "CACHE_LEAST", 100)
    fast, texts, encoders = FastBPE(json.loads(gpt2.text)), random_texts(100, seed=2), set()
    for _ in range(3):
        batch = fast.encode_batch(texts)
        assert [ids.tolist() for ids in batch] == [gpt2.encode(text).tolist() for text in texts]
        encoders.add(fast._encoder)
    assert len(encoders) == 3


def test_threads_do_not_share_encoders(gpt2):
    """The first copy for a thread takes the encoder of the original tokenizer, and the original then creates a new
    one."""
    original, expected = Tokenizer(gpt2.text), [gpt2.encode("One day").tolist()]
    encoder = original._fast._encoder
    threads = [original.for_thread() for _ in range(2)]
    for tokenizer in (*threads, original):
        assert [ids.tolist() for ids in tokenizer.encode_batch(["One day"])] == expected
    encoders = [tokenizer._fast._encoder for tokenizer in (*threads, original)]
    assert encoders[0] is encoder and len(set(map(id, encoders))) == 3
    assert threads[0]._bpe is not original._bpe and threads[0].encode("One day").tolist() == expected[0]


def test_gigatoken_is_optional(gpt2, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)  # so that it cannot be imported
    tokenizer = Tokenizer(gpt2.text)
    assert tokenizer._fast is None
    assert [ids.tolist() for ids in tokenizer.encode_batch(["One day"])] == [gpt2.encode("One day").tolist()]


def test_other_ids_disable_gigatoken(gpt2):
    tokenizer = Tokenizer(gpt2.text)
    tokenizer.check_fast("One day")
    assert tokenizer._fast is not None

    class Wrong:
        def encode_batch(self, texts):
            return [np.array([1, 2, 3])]

    tokenizer._fast = Wrong()
    tokenizer.check_fast("One day")
    assert tokenizer._fast is None
