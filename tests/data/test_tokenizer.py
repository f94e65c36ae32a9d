"""tokenizer.py: the ids of nanoGPT, tiktoken and the tokenizers library; files that transformers loads."""

import itertools
import json
import random
import subprocess
import sys

import numpy as np
import pytest

from nanogpt_accel.data.tokenizer import EOT, Tokenizer

STRANGE = [
    "",
    " ",
    "\n\n \n",
    "a  b   c ",
    " hello , world . it's we'll ’s",
    "def f(x):\n        return x\n",
    "\r\n\t\v\x00\x1f\x7f",
    "\u2028\u2029\u00a0\u3000x\u1680",
    "naïve café ﬁ ß Ω≈ç√",
    "你好，世界 한국어 العربية עברית",
    "👩\u200d👩\u200d👧 🇺🇳 e\u0301 \u200b\ufeff",
    "𝄞𝔘\U0010ffff",
    "1234567890 3.14159 0x7f ½ ² ①",
    "a" * 1000,
    f"a{EOT}b {EOT}",
]


def random_texts(count, seed):
    """Return texts of characters from many Unicode blocks."""
    rng = random.Random(seed)
    pools = [
        range(32, 127),
        range(0, 256),
        range(0x300, 0x700),
        range(0x2000, 0x2100),
        range(0x4E00, 0x9FFF),
        range(0x1F300, 0x1F700),
    ]
    lengths = [rng.randrange(40) for _ in range(count)]
    return ["".join(chr(rng.choice(rng.choice(pools))) for _ in range(length)) for length in lengths]


@pytest.fixture(scope="module")
def gpt2(gpt2_files):
    return Tokenizer.gpt2()


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.train_bpe(SAMPLE, 600)


SAMPLE = [open(random.__file__, encoding="utf-8").read(), open(json.__file__, encoding="utf-8").read()]


# ---- characters


def nanogpt_char(text):
    """data/shakespeare_char/prepare.py"""
    chars = sorted(list(set(text)))
    stoi = {ch: i for i, ch in enumerate(chars)}
    return stoi, [stoi[c] for c in text]


def test_char_is_nanogpts(shakespeare):
    text = shakespeare.read_bytes().decode()
    tokenizer = Tokenizer.char([text])
    stoi, ids = nanogpt_char(text)
    assert tokenizer.encode(text).tolist() == ids
    assert tokenizer.vocab == stoi
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eot_id) == ("char", 65, None)
    assert tokenizer.decode(ids[:1000]) == text[:1000]


@pytest.mark.parametrize("text", [t for t in STRANGE if t])
def test_char_of_any_text(text):
    tokenizer = Tokenizer.char([text])
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16 and ids.tolist() == nanogpt_char(text)[1]
    assert tokenizer.decode(ids) == text
    assert [list(e) for e in tokenizer.encode_batch([text, text[:3]])] == [list(ids), list(ids[:3])]


def test_char_of_documents_ends_with_the_end_of_text():
    tokenizer = Tokenizer.char(iter(["ba", "dc"]))
    assert tokenizer.vocab == {"a": 0, "b": 1, "c": 2, "d": 3, EOT: 4} and tokenizer.eot_id == 4
    assert tokenizer.encode_prompt(f"ab{EOT}{EOT}c") == [0, 1, 4, 4, 2]
    assert tokenizer.decode([0, 4, 1]) == f"a{EOT}b"
    assert Tokenizer.char(["ba"], add_eot=True).eot_id == 2
    assert Tokenizer.char(["ba", "dc"], add_eot=False).eot_id is None


def test_char_names_unknown_characters(refused):
    tokenizer = Tokenizer.char(["abc"])
    for encode in (tokenizer.encode, tokenizer.encode_prompt):
        with refused(ValueError, "'z' (U+007A)", "'€' (U+20AC)", "'\\x00' (U+0000)"):
            encode("az€a\0")
    with refused(ValueError, EOT):
        tokenizer.encode_prompt(f"a{EOT}")
    with refused(ValueError, "and 18 more"):
        tokenizer.encode("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def test_char_from_meta_keeps_its_ids():
    stoi = {"b": 0, "a": 2, "\n": 1}
    tokenizer = Tokenizer.char_from_meta(stoi)
    assert tokenizer.encode("ab\n").tolist() == [2, 0, 1] and tokenizer.decode([2, 0, 1]) == "ab\n"
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eot_id) == ("char", 3, None)


@pytest.mark.parametrize(
    "stoi",
    [None, {}, [], {"ab": 0}, {"a": 1}, {"a": 0, "b": 0}, {"a": "0"}, {0: "a"}, {"a": 0.0}, {"a": True, "b": False}],
)
def test_char_from_a_meta_that_is_none(refused, stoi):
    with refused(ValueError, "meta.pkl", "stoi"):
        Tokenizer.char_from_meta(stoi)


# ---- GPT-2


def test_gpt2_is_tiktokens(gpt2, shared_data):
    import tiktoken

    reference = tiktoken.get_encoding("gpt2")
    assert (gpt2.kind, gpt2.vocab_size, gpt2.eot_id) == ("gpt2", 50257, reference.eot_token)
    files = [f.read_bytes().decode() for f in shared_data.glob("*/*.txt")]
    for text in files + STRANGE + random_texts(500, seed=1):
        ids = gpt2.encode(text)
        assert ids.dtype == np.uint16 and ids.tolist() == reference.encode_ordinary(text)
        assert gpt2.encode_prompt(text) == reference.encode(text, allowed_special={EOT})
        assert gpt2.decode(ids[:5000]) == reference.decode(ids[:5000].tolist())


def test_gpt2_cuts_words_as_tiktoken_does(gpt2):
    """Every text of up to five characters, one for each case of the pattern, and long runs of one character."""
    import tiktoken

    reference = tiktoken.get_encoding("gpt2")
    texts = ["".join(t) for n in range(1, 6) for t in itertools.product("al1!' \n\u3000", repeat=n)]
    texts += [f"a'{end} b" for end in ("s", "d", "m", "t", "ll", "ve", "re", "S", "LL", "l", "v", "r")]
    texts += [
        left + character * 300_000 + right for character in " \nx1!" for left in ("", "x") for right in ("", "x", "\n")
    ]
    for text in texts:
        assert gpt2.encode(text).tolist() == reference.encode_ordinary(text), repr(text[:20])


def test_more_white_space_than_tiktoken_takes(gpt2, bpe):
    """If its regular expression fails, the tokenizers library encodes the text."""
    text = "ab" + " " * 1_200_000 + "x" + "\n" * 1_100_000
    for tokenizer in (gpt2, bpe):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_bpe_of_endless_words():
    texts = [*SAMPLE, "a" + "\n" * 1_000_000 + "b", "x" * 1_000_000]  # took many minutes
    assert Tokenizer.train_bpe(texts, 300).vocab_size == 300


def test_gpt2_batches(gpt2):
    texts = STRANGE + random_texts(50, seed=2)
    assert [ids.tolist() for ids in gpt2.encode_batch(texts)] == [gpt2.encode(t).tolist() for t in texts]


@pytest.mark.parametrize("error", [OSError("no route to host"), ValueError("Hash mismatch"), RuntimeError("x" * 300)])
def test_gpt2_that_cannot_be_downloaded(refused, monkeypatch, error):
    import tiktoken.load

    def read_file_cached(url, sha256):
        raise error

    monkeypatch.setattr(tiktoken.load, "read_file_cached", read_file_cached)
    with refused(ValueError, "tokenizer=gpt2", "https://", type(error).__name__, "TIKTOKEN_CACHE_DIR"):
        Tokenizer.gpt2()


# ---- a BPE of our own


def test_bpe_knows_every_text(bpe):
    assert (bpe.kind, bpe.vocab_size, bpe.eot_id) == ("bpe", 600, 599)
    for text in STRANGE + random_texts(200, seed=3) + SAMPLE:
        ids = bpe.encode(text)
        assert ids.dtype == np.uint16 and bpe.eot_id not in ids
        assert bpe.decode(ids) == text
    assert bpe.encode_prompt(f"{EOT}for") == [599, *bpe.encode("for")]
    assert len(bpe.encode(SAMPLE[0])) < len(SAMPLE[0]) / 1.8


def test_bpe_by_tiktoken_is_the_librarys(bpe):
    """The two libraries join pairs by different rules, but agree if ids and merges are in the same order."""
    assert bpe._bpe is not None
    texts = STRANGE + random_texts(500, seed=4) + SAMPLE + ["ab" * 50, "aaab" * 33, "eeee in in inin"]
    ours = bpe.encode_batch(texts)
    library = bpe._backend.encode_batch(texts, add_special_tokens=False)
    assert [ids.tolist() for ids in ours] == [encoding.ids for encoding in library]


def test_bpe_is_the_same_in_every_process(bpe):
    code = (
        "import json, random; from nanogpt_accel.data.tokenizer import Tokenizer; "
        "texts = [open(m.__file__, encoding='utf-8').read() for m in (random, json)]; "
        "print(Tokenizer.train_bpe(texts, 600).fingerprint)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == bpe.fingerprint == Tokenizer.train_bpe(iter(SAMPLE), 600).fingerprint


def test_bpe_of_a_small_text_has_fewer_tokens():
    tokenizer = Tokenizer.train_bpe(["ab ab ab"], 4096)
    assert 257 < tokenizer.vocab_size < 265 and tokenizer.eot_id == tokenizer.vocab_size - 1


def test_bpe_is_trained_on_a_bounded_text(monkeypatch):
    from nanogpt_accel.data import tokenizer as module

    monkeypatch.setattr(module, "BPE_TEXT_LIMIT", 100)
    taken = []

    def documents():
        for text in ("ab " * 20, "cd " * 20, "ef " * 20):
            taken.append(text)
            yield text

    bounded = Tokenizer.train_bpe(documents(), 300)
    assert len(taken) == 2
    assert bounded.fingerprint == Tokenizer.train_bpe(["ab " * 20, ("cd " * 20)[:40]], 300).fingerprint


def test_ids_that_do_not_follow_the_merges_are_left_to_the_library(bpe):
    """Swap the ids of two tokens: tiktoken would join in another order."""
    spec = json.loads(bpe.text)
    vocab = spec["model"]["vocab"]
    first, second = [left + right for left, right in spec["model"]["merges"][:2]]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    tokenizer = Tokenizer(json.dumps(spec))
    assert tokenizer._bpe is None and tokenizer.kind == "bpe"
    swap = {vocab[first]: vocab[second], vocab[second]: vocab[first]}
    for text in [*SAMPLE, f"x{EOT}y"]:
        assert tokenizer.encode(text).tolist() == [swap.get(i, i) for i in bpe.encode(text).tolist()]
        assert [ids.tolist() for ids in tokenizer.encode_batch([text])] == [tokenizer.encode(text).tolist()]


# ---- files


@pytest.fixture(params=["gpt2", "char", "char of documents", "bpe"])
def any_kind(request):
    if request.param in ("gpt2", "bpe"):
        return request.getfixturevalue(request.param)
    return Tokenizer.char([*SAMPLE, "\t"], add_eot=request.param == "char of documents")


def test_transformers_loads_what_we_save(any_kind, tmp_path):
    from transformers import AutoTokenizer

    any_kind.save(tmp_path, max_length=64)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == theirs.bos_token_id == any_kind.eot_id
    assert len(theirs) == any_kind.vocab_size and theirs.model_max_length == 64
    for text in [" it 's , as . in  random ", "\n\tif self:\n\n", *SAMPLE]:
        assert theirs(text, verbose=False)["input_ids"] == any_kind.encode(text).tolist()
        assert theirs.decode(any_kind.encode(text)) == text
    if any_kind.eot:
        prompt = f"{EOT}def f{EOT}"
        assert theirs(prompt)["input_ids"] == any_kind.encode_prompt(prompt)
        assert theirs.decode(any_kind.encode_prompt(prompt), skip_special_tokens=True) == "def f"
    # next to the config of a model of any type it is the same tokenizer
    for model_type in ("gpt2", "qwen3"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        assert theirs("if  self")["input_ids"] == any_kind.encode("if  self").tolist()


def test_load_is_the_inverse_of_save(any_kind, tmp_path):
    any_kind.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.kind, again.vocab, again.eot_id) == (any_kind.kind, any_kind.vocab, any_kind.eot_id)
    assert again.fingerprint == any_kind.fingerprint and len(again.fingerprint) == 64
    assert (again._table is None, again._bpe is None) == (any_kind._table is None, any_kind._bpe is None)
    assert again.encode(SAMPLE[1]).tolist() == any_kind.encode(SAMPLE[1]).tolist()
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec, indent=4), encoding="utf-8")
    cut = Tokenizer.load(tmp_path)
    assert cut.fingerprint == any_kind.fingerprint and len(cut.encode("a = [1, 2, 3, 4, 5]")) > 4


def test_fingerprints_differ(bpe):
    tokenizers = [
        Tokenizer.char(["ab"]),
        Tokenizer.char(["ac"]),
        Tokenizer.char(["ab"], add_eot=True),
        bpe,
        Tokenizer.train_bpe(SAMPLE, 500),
    ]
    assert len({t.fingerprint for t in tokenizers}) == len(tokenizers)


def test_another_tokenizer_json(tmp_path):
    """A tokenizer of words, with another end-of-text token and ids above 16 bits."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(models.WordLevel({"<unk>": 0, "hello": 1, "world": 70000}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>"])
    backend.enable_truncation(2)  # a setting for batches of sentences, not for a corpus
    backend.enable_padding(length=4)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.kind == "wordlevel"
    assert tokenizer.eot == "</s>" and tokenizer.eot_id == tokenizer.vocab["</s>"]
    assert tokenizer.encode("hello world x").tolist() == [1, 70000, 0]
    assert [e.tolist() for e in tokenizer.encode_batch(["hello", "x world x"])] == [[1], [0, 70000, 0]]
    assert tokenizer.encode("hello").dtype == np.uint32 == tokenizer.dtype and tokenizer.vocab_size > 2**16
    assert tokenizer.encode_prompt("hello</s>world") == [1, tokenizer.eot_id, 70000]
    assert tokenizer.eot_id not in tokenizer.encode("hello</s>world")


def test_a_folder_without_a_tokenizer(refused, tmp_path):
    with refused(FileNotFoundError, tmp_path / "tokenizer.json", "copy the model's tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_a_file_that_is_not_a_tokenizer(refused, tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with refused(ValueError, tmp_path / "tokenizer.json"):
        Tokenizer.load(tmp_path)
