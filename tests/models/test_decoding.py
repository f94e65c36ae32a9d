"""Text is decoded id by id, and equals the text of all ids, with each kind of tokenizer."""

import random
import re
from functools import cache
from pathlib import Path

import pytest
from tokenizer_kinds import MAKERS, TEXTS, tokenizer_json

from nanogpt_accel.data.find_tokenizer import load_tokenizer
from nanogpt_accel.data.meta import tokenizer_from_meta
from nanogpt_accel.data.tokenizer import Tokenizer
from nanogpt_accel.models.generation import TextStream, text_after

KINDS = [*MAKERS, "char"]
BYTE_KINDS = ["byte fallback", "unigram with bytes"]


@cache
def tokenizer_of(kind):
    return Tokenizer.char(TEXTS.values()) if kind == "char" else Tokenizer(tokenizer_json(kind))


def streamed(tokenizer, prompt_ids, new_ids):
    stream = TextStream(tokenizer.decode, prompt_ids)
    return "".join([*map(stream.add, new_ids), stream.flush()])


def random_ids(tokenizer, language, rng):
    """Return ids of a part of a text, of which some are replaced by random ids, and maybe cut inside a character."""
    text = TEXTS[language]
    start = rng.randrange(len(text))
    ids = tokenizer.encode(text[start : start + rng.randrange(1, 12)]).tolist()
    ids = [rng.randrange(tokenizer.vocab_size) if rng.random() < rng.choice([0, 0.3, 1]) else i for i in ids]
    return ids[: rng.randrange(len(ids) + 1)]


def check_random_sequences(kind, language, count):
    tokenizer, rng = tokenizer_of(kind), random.Random(f"{kind} {language}")
    for _ in range(count):
        prompt, new = random_ids(tokenizer, language, rng), random_ids(tokenizer, language, rng)
        if tokenizer.decode(prompt).endswith("\ufffd"):
            prompt = []  # a prompt is a text, and ends with a complete character
        assert tokenizer.decode(prompt) + streamed(tokenizer, prompt, new) == tokenizer.decode(prompt + new)
        assert streamed(tokenizer, prompt, new) == text_after(tokenizer.decode, prompt, new)


@pytest.mark.parametrize(
    ("meta", "text"),
    [
        ({"do": 0, "re": 1, "mi": 2}, "do mi re do"),
        ({"C": 0, "N": 1, "Cl": 2}, "CClNC"),
        ({"do": 0, " re": 1}, "do re redo"),
        (12, "0 11 3 0"),
    ],
)
def test_tokens_of_a_meta_pkl(meta, text):
    tokenizer = tokenizer_from_meta(meta)
    ids = tokenizer.encode_prompt(text)
    assert tokenizer.decode(ids) == text
    for n in range(1, len(ids)):
        assert tokenizer.decode(ids[:n]) + streamed(tokenizer, ids[:n], ids[n:]) == text


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_random_ids_are_streamed_as_they_are_decoded(kind, language):
    check_random_sequences(kind, language, count=60)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_random_id_sequences(kind):
    for language in TEXTS:
        check_random_sequences(kind, language, count=10_000 // len(TEXTS) + 1)


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("kind", ["byte-level", *BYTE_KINDS])
def test_a_stream_gives_the_text_back_character_by_character(kind, language):
    """Whenever the ids end with a complete character, all of the text is shown; U+FFFD never is."""
    tokenizer, text = tokenizer_of(kind), TEXTS[language]
    ids = tokenizer.encode(text).tolist()
    stream, shown = TextStream(tokenizer.decode, []), ""
    for n, new_id in enumerate(ids, 1):
        shown += stream.add(new_id)
        so_far = tokenizer.decode(ids[:n])
        assert shown == so_far if not so_far.endswith("\ufffd") else text.startswith(shown)
    assert shown == text and stream.flush() == ""


@pytest.mark.parametrize("kind", BYTE_KINDS)
def test_a_text_that_ends_inside_a_character_keeps_its_other_characters(kind):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode("散步👍").tolist()
    assert tokenizer.decode(ids) == "散步👍"
    for n in (1, 2, 3):
        assert tokenizer.decode(ids[:-n]) == streamed(tokenizer, [], ids[:-n]) == "散步\ufffd"
    e, lead = tokenizer.vocab["<0x65>"], tokenizer.vocab["<0xE4>"]
    assert tokenizer.decode([*ids, lead, e]) == streamed(tokenizer, [], [*ids, lead, e]) == "散步👍\ufffde"


@pytest.mark.parametrize("kind", BYTE_KINDS)
def test_bytes_are_decoded_as_python_decodes_them(kind):
    """The text of random ids equals the bytes of their tokens, decoded by Python."""
    tokenizer, rng = tokenizer_of(kind), random.Random(kind)
    tokens = {i: token for token, i in tokenizer.vocab.items()}
    for _ in range(1000):
        ids = [rng.choice([*range(tokenizer.vocab_size), *[tokenizer.vocab["<0xE4>"]] * 20]) for _ in range(8)]
        raw = b"".join(
            bytes([int(t[3:5], 16)]) if re.fullmatch("<0x..>", t) else t.replace("▁", " ").encode()
            for t in (tokens[i] for i in ids)
        )
        expected = raw.decode("utf-8", "replace")
        assert tokenizer.decode(ids).removeprefix(" ") == expected.removeprefix(" ")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("language", TEXTS)
def test_valid_texts_are_decoded_as_the_library_decodes_them(kind, language):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(TEXTS[language]).tolist()
    assert tokenizer.decode(ids) == tokenizer._backend.decode(ids, skip_special_tokens=False)


def test_ids_without_a_token_do_not_drop_a_space():
    """A vocabulary may have unused ids, which have no text."""
    import json

    spec = json.loads(tokenizer_json("words"))
    spec["model"]["vocab"] = {"<unk>": 0, "a": 20, "b": 21}
    tokenizer = Tokenizer(json.dumps(spec | {"added_tokens": []}))
    assert streamed(tokenizer, [20], [*range(1, 15), 21]) == tokenizer.decode([20, 21])[1:] == " b"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_texts_are_decoded_as_sentencepiece_decodes_them(model_type):
    """Some texts end inside a character. SentencePiece then writes one U+FFFD per byte."""
    sentencepiece = pytest.importorskip("sentencepiece")
    sentences = iter([TEXTS["English"], TEXTS["Chinese"]] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_prefix="m",
        vocab_size=330,
        hard_vocab_limit=False,
        model_type=model_type,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    Path("tokenizer.model").write_bytes(Path("m.model").read_bytes())
    Path("tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}')
    ours, theirs = load_tokenizer("."), sentencepiece.SentencePieceProcessor(model_file="m.model")
    rng = random.Random(0)
    for text in TEXTS.values():
        ids = theirs.encode(text)
        assert ours.encode(text).tolist() == ids
        for length in range(len(ids)):
            assert ours.decode(ids[:length]).rstrip("\ufffd") == theirs.decode(ids[:length]).rstrip("\ufffd")
        start = rng.randrange(len(ids))
        assert streamed(ours, ids[:start], ids[start:]) == text_after(ours.decode, ids[:start], ids[start:])
