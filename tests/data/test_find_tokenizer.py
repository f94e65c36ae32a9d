"""Tokenizers of folders and of a local server that stands for the Hub, and their end-of-text tokens."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_files import ENV, ids, jsonl, prepared, section
from hub_server import HubServer
from tokenizer_kinds import tokenizer_json

from nanogpt_accel.data.dataset import check, data_folder, facts_of, open_dataset
from nanogpt_accel.data.find_tokenizer import hub_id, load_tokenizer
from nanogpt_accel.data.prepare import prepare
from nanogpt_accel.data.tokenizer import EOT, Tokenizer
from nanogpt_accel.recipe import SECTIONS, load_recipe

TEXTS = [f"One day, girl {i} went out." for i in range(40)]
MAIN, OLD = tokenizer_json("byte-level", eos="</s>"), tokenizer_json("byte-level", eos="<|im_end|>")
# run several commands in one process, because the imports take seconds
COMMANDS = """
import json, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from nanogpt_accel.__main__ import main
results = []
for words in json.load(sys.stdin):
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        status = main(words)
    results.append([status, out.getvalue() + err.getvalue()])
print(json.dumps(results))
"""


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl("x.jsonl", TEXTS)
    Path("r.yaml").write_text("data: {corpus: x.jsonl, val_fraction: 0.2}\n")


def folder(name="mine", text=MAIN, **files):
    """Write a tokenizer. files: {name without .json: content}."""
    Path(name).mkdir(exist_ok=True)
    Path(name, "tokenizer.json").write_text(text)
    for file, content in files.items():
        Path(name, f"{file}.json").write_text(json.dumps(content))
    return name


def run(commands, env):
    child = subprocess.run(
        [sys.executable, "-c", COMMANDS], input=json.dumps(commands), env=env, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def token_files(name):
    """Write a folder of nanoGPT's token files without a tokenizer."""
    Path(name).mkdir()
    for split in ("train", "val"):
        np.arange(100, dtype=np.uint16).tofile(f"{name}/{split}.bin")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("hub:me/tok", "me/tok"),
        ("hub:gpt2-large", "gpt2-large"),
        ("me/tok@v1", "me/tok@v1"),
        ("me/tok", "me/tok"),
        *((spec, None) for spec in ("gpt2", "char", "bpe", "gpt3", "./me/tok", "../tok", "/me/tok", "~/tok", "a/b/c")),
    ],
)
def test_what_is_a_hub_id(spec, expected):
    assert hub_id(spec) == expected


def test_an_existing_folder_is_not_a_hub_id():
    Path("me/tok").mkdir(parents=True)
    assert hub_id("me/tok") is None and hub_id("hub:me/tok") == "me/tok"


def test_tokenizers_of_the_hub(tmp_path):
    """Name a tokenizer by its id, with a revision, and with a prefix. Afterwards, the data folder works without the
    Hub."""
    with HubServer({"hf_me": "me"}) as hub:
        config = json.dumps({"eos_token": "</s>"}).encode()
        hub.add("me/tok", {"tokenizer.json": MAIN.encode(), "tokenizer_config.json": config, "model.safetensors": b"x"})
        old = {"tokenizer.json": OLD.encode(), "special_tokens_map.json": b'{"eos_token": {"content": "<|im_end|>"}}'}
        hub.add("me/old", old, revision="v1")
        specs = {"a": "hub:me/tok", "b": "me/tok", "c": "me/old@v1", "d": "hub:me/old@v1"}
        commands = [["prepare", "r.yaml", f"tokenizer={spec}", f"data_dir={out}"] for out, spec in specs.items()]
        for spec in ("me/none", "hub:me/tok@v9", "hub:a b"):
            commands.append(["prepare", "r.yaml", f"tokenizer={spec}"])
        token_files("there")
        commands.append(["prepare", "r.yaml", "data_dir=there", "tokenizer=me/tok"])
        results = run(commands, hub.env(tmp_path / "home"))
    assert [status for status, _ in results] == [0] * 4 + [2] * 3 + [0], results
    for (_, message), words in zip(
        results[4:7],
        (
            ["tokenizer=me/none", "no such model on the Hub"],
            ["tokenizer=me/tok@v9", "no such branch"],
            ["tokenizer=a b"],
        ),
        strict=True,
    ):
        assert all(word in message for word in words) and len(message.splitlines()) == 1
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    for out, (text, eos) in {
        "a": (MAIN, "</s>"),
        "b": (MAIN, "</s>"),
        "c": (OLD, "<|im_end|>"),
        "d": (OLD, "<|im_end|>"),
    }.items():
        assert Path(out, "tokenizer.json").read_text() == text
        assert json.loads(Path(out, "tokenizer_config.json").read_text())["eos_token"] == eos
        data = SECTIONS["data"](corpus="x.jsonl", val_fraction=0.2, tokenizer=specs[out], data_dir=out)
        assert check(data) == []
        assert (
            ids(prepared(data_dir=out, tokenizer="gpt2", val_fraction=0.0005)[0].train)[-1]
            == Tokenizer.load(out).eot_id
        )


def test_a_tokenizer_is_loaded_once_and_again_if_it_changes(monkeypatch):
    Path("tok").mkdir()
    loads, load = [], Tokenizer.load
    monkeypatch.setattr(Tokenizer, "load", lambda *args: loads.append(args) or load(*args))
    for text, count in (("ab", 1), ("abc", 2)):
        Tokenizer.char([text]).save("tok")
        first, second = load_tokenizer("tok"), load_tokenizer("tok")
        first.special_tokens = "tokens"
        assert second.special_tokens is None and first.vocab_size == second.vocab_size == len(text)
        assert len(loads) == count and first.fingerprint == second.fingerprint == load("tok").fingerprint


def test_the_hub_that_cannot_be_reached(refused):
    with refused(ValueError, "tokenizer=me/gone", "no such folder", "the Hub cannot be reached"):
        load_tokenizer("me/gone")
    with refused(FileNotFoundError, "tokenizer=gpt3", "did you mean gpt2?", "hub:USER/NAME"):
        load_tokenizer("gpt3")


# ---- the end-of-text token


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({"tokenizer_config": {"eos_token": "</s>"}}, "</s>"),
        ({"tokenizer_config": {"eos_token": {"content": "</s>"}}}, "</s>"),
        ({"special_tokens_map": {"eos_token": "</s>"}}, "</s>"),
        ({"special_tokens_map": {"eos_token": {"content": "</s>", "lstrip": False}}}, "</s>"),
        ({"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": "</s>"}}, "</s>"),
        ({"generation_config": {"eos_token_id": "ID"}}, "</s>"),
        ({"generation_config": {"eos_token_id": ["ID", 3]}}, "</s>"),
        ({"tokenizer_config": {"eos_token": "</s>"}, "generation_config": {"eos_token_id": 5}}, "</s>"),
        ({"generation_config": {"eos_token_id": 10**9}}, None),
        ({"generation_config": {"eos_token_id": []}}, None),
        ({}, None),
    ],
)
def test_the_end_of_text_token_is_found(files, eos):
    text = json.dumps(files).replace('"ID"', str(Tokenizer(MAIN).vocab["</s>"]))
    tokenizer = load_tokenizer(folder(**json.loads(text)))
    assert tokenizer.eot == eos and tokenizer.eot_id == tokenizer.vocab.get(eos)
    Path("again").mkdir()
    tokenizer.save("again")
    assert Tokenizer.load("again").eot == eos


def test_an_end_of_text_token_with_id_0():
    """For example, generation_config.json of Pythia has <|endoftext|> with id 0."""
    spec = json.loads(MAIN)
    spec["model"]["vocab"] = {"<|stop|>": 0} | {token: i + 1 for token, i in spec["model"]["vocab"].items()}
    spec["added_tokens"] = [{**spec["added_tokens"][0], "id": 0, "content": "<|stop|>"}]
    tokenizer = load_tokenizer(folder(text=json.dumps(spec), generation_config={"eos_token_id": 0}))
    assert (tokenizer.eot, tokenizer.eot_id) == ("<|stop|>", 0)


def test_a_damaged_file_is_named(refused):
    folder()
    Path("mine/special_tokens_map.json").write_text("{")
    with refused(ValueError, "special_tokens_map.json", "not JSON"):
        load_tokenizer("mine")


def test_eos_token_is_set():
    folder(generation_config={"eos_token_id": 3})
    ours, _ = prepared(corpus="x.jsonl", tokenizer="mine", eos_token="</s>")
    assert ours.tokenizer.eot == "</s>" and ids(ours.train).count(ours.tokenizer.vocab["</s>"]) > 20
    data = {"corpus": "x.jsonl", "tokenizer": "mine"}
    assert check(section(**data, eos_token="</s>")) == []
    (problem,) = check(section(**data, eos_token="!"))
    assert problem.startswith("eos_token=!") and "prepared with eos_token=</s>" in problem


def test_wrong_values_of_eos_token(refused):
    folder()
    data = {"corpus": "x.jsonl", "data_dir": "new"}
    for tokenizer in ("gpt2", "char", "bpe"):
        (problem,) = check(section(**data, tokenizer=tokenizer, eos_token="</s>"))
        assert problem.startswith(f"eos_token=</s>: tokenizer={tokenizer} uses {EOT}")
    (problem,) = check(section(**data, tokenizer="mine", eos_token="<eos>"))
    assert problem == "eos_token=<eos>: tokenizer=mine has no such token; its special tokens are: </s>"
    with refused(ValueError, "tokenizer=mine", "no end-of-text token", "set eos_token"):
        prepare(section(**data, tokenizer="mine"), lambda line: None)


def test_the_setting_changes_the_data_folder_only_if_it_is_set():
    from nanogpt_accel.data.dataset import corpus_of

    folder(tokenizer_config={"eos_token": "</s>"})
    data = section(corpus="x.jsonl", tokenizer="mine", data_dir=None)
    facts = facts_of(data, corpus_of(data))
    assert "eos_token" not in facts and facts["tokenizer"].keys() == {"asked"}
    assert data_folder(section(corpus="x.jsonl", tokenizer="mine", data_dir=None, eos_token="a")) != data_folder(data)


# ---- files without a tokenizer.json


@pytest.mark.slow
def test_a_vocabulary_of_bert_is_converted():
    """The test runs in a new process, because transformers takes seconds to import."""
    Path("bert").mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "day", "girl", "went", "out", ",", ".", *"0123456789"]
    Path("bert/vocab.txt").write_text("\n".join([*words, *(f"##{digit}" for digit in "0123456789")]))
    Path("bert/config.json").write_text('{"model_type": "bert"}')
    ((status, out),) = run([["prepare", "r.yaml", "tokenizer=bert", "eos_token=[SEP]", "data_dir=out"]], ENV)
    assert status == 0 and "vocabulary size 32" in out and "'O' (40)" in out, out
    ours, _ = prepared(data_dir="out", tokenizer="gpt2", val_fraction=0.0005)
    assert ids(ours.train)[:3] == [5, 6, 10] and ours.tokenizer.eot == "[SEP]"


@pytest.mark.slow
def test_a_vocabulary_that_cannot_be_converted():
    Path("broken").mkdir()
    Path("broken/tokenizer.model").write_bytes(b"no SentencePiece model")
    ((status, out),) = run([["prepare", "r.yaml", "tokenizer=broken"]], ENV)
    assert status == 2 and "broken" in out and "convert" in out and len(out.splitlines()) == 1, out


def test_the_tokenizer_of_token_files_of_another_project():
    """The `tokenizer` of the recipe also applies to token files in a data_dir from the command line."""
    token_files("there")
    Path("own.yaml").write_text(f"data: {{corpus: x.jsonl, tokenizer: {folder()}, eos_token: </s>}}\n")
    data = load_recipe("own.yaml", {"data_dir": "there"}).data
    tokenizer = open_dataset(data).tokenizer
    assert tokenizer.text == MAIN and tokenizer.eot == "</s>"
