"""Characters that a tokenizer loses are reported before the corpus is tokenized."""

import json
from pathlib import Path

import pytest
from data_files import jsonl, prepared, section
from tokenizer_kinds import TEXTS, tokenizer_json
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from nanogpt_accel.data.dataset import data_folder
from nanogpt_accel.data.prepare import prepare


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()


def use(text, eos="</s>"):
    Path("mine/tokenizer.json").write_text(text)
    Path("mine/tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))


def without_unknown_token(normalizer=None):
    """A BPE of a few characters, which drops all others silently."""
    backend = Backend(models.BPE({c: i for i, c in enumerate("abcdefghilmnorstuwy .,")}, []))
    backend.decoder = decoders.Fuse()
    if normalizer:
        backend.normalizer = normalizer
    backend.add_special_tokens(["</s>"])
    return backend.to_str()


def warnings(lines):
    return [line for line in lines if line.startswith("warning: tokenizer=mine")]


@pytest.mark.parametrize("is_single", [True, False])
def test_lost_characters_are_counted(is_single):
    use(without_unknown_token())
    texts = ["the world 世界, the 世 end. "] * 30
    Path("x.txt").write_text("".join(texts))
    jsonl("x.jsonl", texts)
    _, lines = prepared(corpus="x.txt" if is_single else "x.jsonl", tokenizer="mine")
    changed, lost = warnings(lines)
    assert f"{1 if is_single else 30} of the first {'1 document' if is_single else '30 documents'}" in changed
    assert "90 of 750 characters are lost: '世' (60), '界' (30)" in lost and "bits per byte" in lost


@pytest.mark.parametrize("is_single", [True, False])
def test_a_text_of_unknown_characters_only_is_refused(refused, is_single):
    use(without_unknown_token())
    Path("x.txt").write_text("世界" * 99)
    jsonl("x.jsonl", ["世界"] * 99)
    data = section(corpus="x.txt" if is_single else "x.jsonl", tokenizer="mine")
    with refused(ValueError, "tokenizer=mine", "none of the characters", "gpt2, char or bpe"):
        prepare(data, lambda line: None)
    assert not data_folder(data).exists()


def test_a_split_of_unknown_characters_only_is_refused(refused):
    use(without_unknown_token())
    Path("x.txt").write_text("abc" * 99 + "世界" * 99)
    with refused(ValueError, "tokenizer=mine", "no token", "val split"):
        prepare(section(corpus="x.txt", tokenizer="mine"), lambda line: None)


@pytest.mark.parametrize("kind", ["words", "unigram", "word pieces", "suffixes"])
def test_an_unknown_token_is_a_loss_too(refused, kind):
    use(tokenizer_json(kind))
    Path("x.txt").write_text("girl went " * 20 + "Щ")
    _, lines = prepared(corpus="x.txt", tokenizer="mine")
    assert "'Щ' (1)" in warnings(lines)[-1]
    Path("y.txt").write_text("ЖЩ" * 20)
    with refused(ValueError, "tokenizer=mine", "none of the characters of corpus=y.txt"):
        prepare(section(corpus="y.txt", tokenizer="mine", data_dir="y"), lambda line: None)


def test_what_a_normalizer_changes_is_lost():
    Path("x.txt").write_text("Bad  day, a girl was. " * 20)
    for normalizer, lost in (
        (normalizers.Lowercase(), "'B' (20)"),
        (normalizers.Replace("y", "d"), "'y' (20)"),
        (normalizers.Replace("  ", " "), "' ' (20)"),
    ):
        use(without_unknown_token(normalizer))
        _, lines = prepared(corpus="x.txt", tokenizer="mine", data_dir=str(len(lost)) + lost[1])
        assert lost in warnings(lines)[-1]


def test_spaces_that_are_added_are_shown():
    backend = Backend(models.WordLevel({"girl": 0, ",": 1, "a": 2, "<unk>": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>"])
    use(backend.to_str())
    Path("x.txt").write_text(" ".join(["girl, a"] * 20))
    _, lines = prepared(corpus="x.txt", tokenizer="mine")
    (line,) = warnings(lines)
    assert "'girl, a girl, a girl' becomes 'girl , a girl , a gi'" in line


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback", "unigram with bytes"])
def test_no_warning_if_nothing_is_lost(kind):
    use(tokenizer_json(kind))
    Path("x.txt").write_text(" ".join(TEXTS.values()) * 3)
    _, lines = prepared(corpus="x.txt", tokenizer="mine")
    assert warnings(lines) == []
