"""tokenizer.py: the ids of nanoGPT, tiktoken and the tokenizers library; files that transformers loads."""

import itertools
import json
import random
import subprocess
import sys

import numpy as np
import pytest
from data_files import text_with_spaces

from nanogpt_accel.data import readers
from nanogpt_accel.data.tokenizer import EOT, PAD, Tokenizer

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


@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
@pytest.mark.parametrize("chunk", [4, 64, 2**12])
def test_the_chunks_of_a_text_have_the_ids_of_the_text(request, monkeypatch, tmp_path, kind, chunk):
    """readers.read_text only cuts where the regular expression of GPT-2 always ends a word."""
    monkeypatch.setattr(readers, "CHUNK", chunk)
    tokenizer = request.getfixturevalue(kind)
    text = text_with_spaces(2000) + " ".join(STRANGE) + " ".join(random_texts(300, seed=4)) + SAMPLE[1]
    (tmp_path / "x.txt").write_bytes(text.encode())
    chunks = list(readers.read_text("x.txt", str(tmp_path / "x.txt")))
    assert len(chunks) > 10
    assert np.array_equal(np.concatenate([tokenizer.encode(chunk) for chunk in chunks]), tokenizer.encode(text))


# ---- characters


def nanogpt_char(text):
    """Encode a text as nanoGPT's data/shakespeare_char/prepare.py does."""
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


def test_characters_inside_an_added_token_are_not_unknown(refused):
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(Tokenizer.char(["ab"]).text)
    backend.add_tokens([AddedToken("<XY>", normalized=False), AddedToken("<XY>z", normalized=False)])
    tokenizer = Tokenizer(backend.to_str())
    assert tokenizer.encode("ab<XY>a<XY>z").tolist() == [0, 1, 2, 0, 3]
    with refused(ValueError, "the tokenizer has no 'Q' (U+0051)"):
        tokenizer.encode("a<XY>Q<XY>z")
    with pytest.raises(ValueError, match="the tokenizer has no 'X' [^,]*$"):
        tokenizer.encode("X<XY>")


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
    """The texts are all texts of up to five characters, with one character for each case of the pattern, and long runs
    of one character."""
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
    """If the regular expression of tiktoken fails on a text, the tokenizers library encodes it."""
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


# ---- padding, and tokenizers that transformers has saved again


@pytest.fixture(params=["char", "char of documents", "bpe"])
def small_kind(request):
    """A tokenizer of each kind in any_kind except gpt2, which transformers takes seconds to load."""
    if request.param == "bpe":
        return request.getfixturevalue("bpe")
    return Tokenizer.char([*SAMPLE, "\t"], add_eot=request.param == "char of documents")


TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"


def facts(tokenizer):
    is_fast = (tokenizer._table is not None, tokenizer._bpe is not None)
    return tokenizer.kind, tokenizer.vocab, tokenizer.vocab_size, tokenizer.eot_id, is_fast


def test_the_padding_token_is_not_part_of_the_vocabulary(small_kind, tmp_path):
    from transformers import AutoTokenizer

    small_kind.save(tmp_path, has_pad=True)
    again, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert facts(again) == facts(small_kind) and again.fingerprint == small_kind.fingerprint
    assert (again.pad, again.pad_id) == (theirs.pad_token, theirs.pad_token_id) == (PAD, small_kind.vocab_size)
    assert len(theirs) == small_kind.vocab_size + 1
    assert theirs(SAMPLE[0], verbose=False)["input_ids"] == small_kind.encode(SAMPLE[0]).tolist()
    padded = theirs(["if", "if self"], padding=True)
    n = len(padded["input_ids"][1]) - len(small_kind.encode("if"))
    assert padded["input_ids"][0] == [*small_kind.encode("if"), *[again.pad_id] * n]
    assert theirs.decode(padded["input_ids"][0], skip_special_tokens=True) == "if"
    if small_kind.kind == "bpe":  # as plain text it is not the padding token
        assert again.pad_id not in again.encode_prompt(f"a{PAD}")


def test_a_tokenizer_that_transformers_saved_again_is_the_same(small_kind, tmp_path):
    """Truncation, padding and a post-processor in its tokenizer.json do not change the ids of a text."""
    from transformers import AutoTokenizer

    small_kind.save(tmp_path, has_pad=True)
    theirs = AutoTokenizer.from_pretrained(tmp_path, padding_side="left")
    theirs(["if self", "if"], padding=True, truncation=True, max_length=2)
    theirs.save_pretrained(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert spec["truncation"]["max_length"] == 2 and spec["padding"]["direction"] == "Left"
    again = Tokenizer.load(tmp_path)
    assert facts(again) == facts(small_kind) and again.is_same(small_kind) and small_kind.is_same(again)
    assert again.encode(SAMPLE[1]).tolist() == small_kind.encode(SAMPLE[1]).tolist()
    again.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert spec["truncation"] is spec["padding"] is None


def test_special_tokens_that_transformers_added(small_kind, tmp_path):
    from transformers import AutoTokenizer

    small_kind.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.add_special_tokens({"pad_token": "[PAD]"})  # alone it is only used for padding
    theirs.save_pretrained(tmp_path)
    padded = Tokenizer.load(tmp_path)
    assert facts(padded) == facts(small_kind) and padded.is_same(small_kind)
    assert (padded.pad, padded.pad_id) == ("[PAD]", small_kind.vocab_size) == (theirs.pad_token, theirs.pad_token_id)
    padded.save(tmp_path, has_pad=True)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.pad_token, theirs.pad_token_id) == (padded.pad, padded.pad_id)

    theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    theirs.chat_template = TEMPLATE
    theirs.save_pretrained(tmp_path)
    chat = Tokenizer.load(tmp_path)
    assert chat.vocab_size == len(theirs) == small_kind.vocab_size + 3 and not chat.is_same(small_kind)
    assert chat.pad_id == small_kind.vocab_size and chat.eot_id == small_kind.eot_id
    assert chat.encode(SAMPLE[0]).tolist() == small_kind.encode(SAMPLE[0]).tolist()
    assert facts(chat)[-1] == facts(small_kind)[-1], "slower than without the special tokens"
    prompt = theirs.apply_chat_template([{"content": "def f"}], tokenize=False)
    assert chat.encode_prompt(prompt) == theirs(prompt)["input_ids"] and chat.vocab["<|im_end|>"] in chat.encode_prompt(
        prompt
    )
    assert chat.token_bytes() is None or chat.token_bytes()[small_kind.vocab_size :].tolist() == [0, 0, 0]
    chat.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert (saved.chat_template, saved.pad_token, len(saved)) == (TEMPLATE, "[PAD]", len(theirs))
    assert saved(prompt)["input_ids"] == theirs(prompt)["input_ids"]


def test_a_char_tokenizer_with_added_words_is_the_librarys(refused, tmp_path):
    from transformers import AutoTokenizer

    Tokenizer.char(["abc"]).save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.add_tokens(["abba"])  # unlike a special token it is part of texts
    theirs.save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == 4 and tokenizer.encode("aabbac").tolist() == theirs("aabbac")["input_ids"] == [
        0,
        3,
        2,
    ]
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["a", text])):
        with refused(ValueError, "no 'z' (U+007A), '€' (U+20AC)"):
            encode("az€")


def test_an_end_of_text_token_for_padding_stays_one(bpe, tmp_path):
    """Users of GPT-2 often set pad_token = eos_token."""
    from transformers import AutoTokenizer

    bpe.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.pad_token = theirs.eos_token
    theirs.save_pretrained(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert facts(again) == facts(bpe) and (again.pad, again.pad_id) == (EOT, bpe.eot_id)
    again.save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token == EOT


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
    assert tokenizer.pad_id is None  # the library would give it an id in the middle


def test_words_that_another_tokenizer_does_not_have_are_named(refused):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers

    backend = Backend(models.WordLevel({"hello": 0, "world": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.normalizer = normalizers.Lowercase()
    tokenizer = Tokenizer(backend.to_str())
    assert tokenizer.encode("Hello WORLD").tolist() == [0, 1]
    for encode in (tokenizer.encode, tokenizer.encode_prompt, lambda text: tokenizer.encode_batch(["hello", text])):
        with refused(ValueError, "the tokenizer has no", "'Bonjour'", "'€' (U+20AC)"):
            encode("Bonjour world €")


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_text_that_is_not_unicode(refused, bpe, kind):
    """Python decodes invalid UTF-8 on the command line to surrogates."""
    tokenizer = bpe if kind == "bpe" else Tokenizer.char(["abc"])
    with refused(ValueError, r"'\udcff' (U+DCFF)"):
        tokenizer.encode_prompt("a\udcff")


def test_a_tokenizer_json_of_another_version(refused, bpe):
    """Old files, like GPT-2's on the Hub, have no type and merges as text; new versions may have new types."""
    spec = json.loads(bpe.text)
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    del spec["model"]["type"]
    old = Tokenizer(json.dumps(spec))
    assert facts(old) == facts(bpe) and old.is_same(bpe)
    assert old.encode(SAMPLE[0]).tolist() == bpe.encode(SAMPLE[0]).tolist()
    spec["pre_tokenizer"] = {"type": "ByteLevel3000"}
    with refused(ValueError, "not a tokenizer.json, or written by a newer version of the tokenizers library"):
        Tokenizer(json.dumps(spec))


def test_a_folder_without_a_tokenizer(refused, tmp_path):
    with refused(FileNotFoundError, tmp_path / "tokenizer.json", "copy the model's tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(("vocab", "words"), [({}, "empty"), ({"a": 2**24}, "limit"), ({"a": 2**32 - 1}, "limit")])
def test_a_vocabulary_that_is_empty_or_too_large_is_refused(refused, bpe, vocab, words):
    spec = json.loads(bpe.text) | {"added_tokens": []}
    for model in (
        {"type": "WordLevel", "vocab": vocab, "unk_token": "a"},
        {"type": "BPE", "vocab": vocab, "merges": []},
    ):
        with refused(ValueError, words):
            Tokenizer(json.dumps(spec | {"model": model}))


def test_a_tokenizer_that_is_much_larger_than_its_model_is_refused_before_it_is_parsed(refused, tmp_path, bpe):
    bpe.save(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "config.json").write_text('{"vocab_size": 64}')
    assert Tokenizer.load(tmp_path).vocab == bpe.vocab
    (tmp_path / "tokenizer.json").write_text(text + " " * 11_000_000)
    with refused(ValueError, tmp_path / "tokenizer.json", "vocab_size=64", "trained with"):
        Tokenizer.load(tmp_path)
    for config in ('{"vocab_size": 2000}', "[" * 100_000):
        (tmp_path / "config.json").write_text(config)
        assert Tokenizer.load(tmp_path).vocab == bpe.vocab


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_a_file_that_is_not_a_tokenizer(refused, tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with refused(ValueError, tmp_path / "tokenizer.json"):
        Tokenizer.load(tmp_path)
