"""Special tokens that are typed in a corpus or in a prompt: one setting decides for both."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from data_files import ENV, ids, jsonl, prepared, section
from tokenizer_kinds import tokenizer_json

from nanogpt_accel.data import encoding, prepare
from nanogpt_accel.data.dataset import check, data_folder, open_dataset
from nanogpt_accel.data.tokenizer import EOT, Tokenizer
from nanogpt_accel.recipe import SECTIONS

STORIES = [f"One day, girl {i} went out.\n" for i in range(60)]
TYPED = EOT.join(STORIES)  # as in TinyStories' TinyStoriesV2-GPT4-train.txt
FOUND = "59 special tokens in the text"


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("stories.txt").write_text(TYPED)


def found(lines):
    return [line for line in lines if "special token" in line]


def test_the_default_keeps_the_ids_of_nanogpt_and_prints_the_number(gpt2_files):
    import tiktoken

    ours, lines = prepared(corpus="stories.txt", tokenizer="gpt2", val_fraction=0.21)
    cut = int(len(TYPED) * (1 - 0.21))
    gpt2 = tiktoken.get_encoding("gpt2")
    assert ids(ours.train) == gpt2.encode_ordinary(TYPED[:cut])
    assert ids(ours.val) == gpt2.encode_ordinary(TYPED[cut:])
    (line,) = found(lines)
    assert FOUND in line and "set special_tokens=tokens" in line
    assert ours.tokenizer.encode_prompt(f"a{EOT}b") == gpt2.encode_ordinary(f"a{EOT}b")


def test_tokens_are_tiktokens(gpt2_files):
    import tiktoken

    ours, lines = prepared(corpus="stories.txt", tokenizer="gpt2", val_fraction=0.21, special_tokens="tokens")
    gpt2 = tiktoken.get_encoding("gpt2")
    expected = gpt2.encode(TYPED, allowed_special="all")
    assert ids(ours.train) + ids(ours.val) == expected and expected.count(50256) == 59
    assert FOUND in found(lines)[0]
    splits = ours.manifest["splits"]
    assert sum(split["bytes"] for split in splits.values()) == len("".join(STORIES))
    assert splits["train"]["documents"] + splits["val"]["documents"] == 61  # one story is cut
    assert ours.tokenizer.encode_prompt(f"a{EOT}b") == gpt2.encode(f"a{EOT}b", allowed_special="all")


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_a_vocabulary_made_from_the_corpus_has_no_parts_of_the_marker(tokenizer):
    ours, _ = prepared(
        corpus="stories.txt", tokenizer=tokenizer, vocab_size=300, val_fraction=0.21, special_tokens="tokens"
    )
    together = ids(ours.train) + ids(ours.val)
    assert together.count(ours.tokenizer.eot_id) == 59 and ours.tokenizer.decode(together) == TYPED
    assert not {"<", "|"} & ours.tokenizer.vocab.keys() or tokenizer == "bpe"
    assert not [token for token in ours.tokenizer.vocab if "endof" in token and token != EOT]


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_text_is_text_in_prompts_too(tokenizer):
    ours, lines = prepared(corpus="stories.txt", tokenizer=tokenizer, vocab_size=300, val_fraction=0.21)
    assert FOUND in found(lines)[0]
    prompt = ours.tokenizer.encode_prompt(f"One{EOT}")
    assert ours.tokenizer.eot_id not in prompt and ours.tokenizer.decode(prompt) == f"One{EOT}"


def test_a_corpus_without_special_tokens_is_as_before():
    Path("plain.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in STORIES))
    ours, lines = prepared(corpus="plain.jsonl")
    assert found(lines) == [] and ours.tokenizer.special_tokens is None
    assert "special_tokens" not in json.dumps(ours.manifest)
    assert "split_special" not in Path("out/tokenizer_config.json").read_text()
    assert ours.tokenizer.encode_prompt(EOT) == [ours.tokenizer.eot_id]


@pytest.mark.parametrize("chunk", [2**19, 100])
def test_documents_that_end_with_a_marker_do_not_get_a_second_one(monkeypatch, chunk):
    monkeypatch.setattr(encoding, "CHUNK", chunk)
    texts = [f"{i} one{EOT}two{EOT}" if i % 2 else f"{i} three" for i in range(40)]
    jsonl("x.jsonl", texts)
    ours, lines = prepared(2, corpus="x.jsonl", special_tokens="tokens")
    assert "40 special tokens" in found(lines)[0]
    together = ids(ours.train) + ids(ours.val)
    assert together.count(ours.tokenizer.eot_id) == 60
    parts = [part for text in texts for part in text.removesuffix(EOT).split(EOT)]
    assert sorted(ours.tokenizer.decode(together).removesuffix(EOT).split(EOT)) == sorted(parts)
    splits = ours.manifest["splits"].values()
    assert sum(split["bytes"] for split in splits) == len("".join(texts).replace(EOT, ""))
    assert sum(split["documents"] for split in splits) == 60


def test_the_special_tokens_of_another_tokenizer():
    Path("mine").mkdir()
    Path("mine/tokenizer.json").write_text(tokenizer_json("byte-level", eos="</s>"))
    Path("mine/tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    Path("x.txt").write_text("One day.</s>Two days.</s>" * 9)
    text, lines = prepared(corpus="x.txt", tokenizer="mine", data_dir="text")
    assert "18 special tokens" in found(lines)[0] and text.tokenizer.eot_id not in ids(text.train)
    tokens, lines = prepared(corpus="x.txt", tokenizer="mine", data_dir="tokens", special_tokens="tokens")
    assert "18 special tokens" in found(lines)[0]
    assert (ids(tokens.train) + ids(tokens.val)).count(tokens.tokenizer.eot_id) == 18


def test_a_marker_that_the_tokenizer_does_not_have():
    Path("mine").mkdir()
    Path("mine/tokenizer.json").write_text(tokenizer_json("byte-level", eos="</s>"))
    Path("mine/tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    _, lines = prepared(corpus="stories.txt", tokenizer="mine", val_fraction=0.21)
    assert FOUND in found(lines)[0] and f"the tokenizer has no {EOT}; in the corpus, replace" in found(lines)[0]


@pytest.mark.parametrize("where", range(1, len(EOT)))
def test_a_cut_never_divides_a_marker(where):
    text = "a" * (50 - where) + EOT + "b" * (50 - len(EOT) + where)  # 100 characters
    Path("x.txt").write_text(text)
    ours, _ = prepared(corpus="x.txt", val_fraction=0.5, special_tokens="tokens")
    eot = ours.tokenizer.eot_id
    assert ids(ours.train) == [0] * (50 - where) + [eot] and set(ids(ours.val)) == {1}


def test_the_setting_is_part_of_the_data_folder_only_if_it_is_tokens():
    data = {"corpus": "stories.txt", "data_dir": None, "tokenizer": "char"}
    plain, tokens = section(**data), section(**data, special_tokens="tokens")
    assert data_folder(plain) != data_folder(tokens)
    folder = prepare.prepare(tokens, lambda line: None)
    (problem,) = check(SECTIONS["data"](data_dir=str(prepare.prepare(plain, print)), special_tokens="tokens"))
    assert "special_tokens=tokens" in problem and "prepared with special_tokens=text" in problem
    assert open_dataset(SECTIONS["data"](data_dir=str(folder))).tokenizer.special_tokens == "tokens"


def test_document_mask_uses_typed_markers():
    with_mask = {"corpus": "stories.txt", "special_tokens": "tokens", "document_mask": True}
    ours = open_dataset(section(**with_mask, data_dir=str(prepare.prepare(section(**with_mask), print))))
    from nanogpt_accel.batches import model_inputs

    row = ours.train.rows([0], 100)
    positions = model_inputs(row, eot_id=ours.tokenizer.eot_id)["position_ids"][0].tolist()
    assert positions[: len(STORIES[0])] == [*range(len(STORIES[0]))] and positions.count(0) == 4


def test_the_setting_is_saved_with_the_tokenizer_and_read_by_transformers():
    """The test runs in a new process, because transformers is slow to import."""
    for value, is_split in (("text", True), ("tokens", False)):
        ours, _ = prepared(corpus="stories.txt", tokenizer="bpe", vocab_size=300, data_dir=value, special_tokens=value)
        ours.tokenizer.save(value)
        again = Tokenizer.load(value)
        prompt = f"day{EOT}One"
        assert again.special_tokens == value
        load = f"AutoTokenizer.from_pretrained({value!r})"
        script = f"from transformers import AutoTokenizer; print({load}({prompt!r}).input_ids)"
        theirs = subprocess.run([sys.executable, "-c", script], env=ENV, capture_output=True, text=True, check=True)
        assert json.loads(theirs.stdout) == again.encode_prompt(prompt)
        assert (again.eot_id in again.encode_prompt(prompt)) is not is_split
