"""meta.py: nanoGPT folders without text, from meta.pkl to samples."""

import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from data_files import MODEL, error_line, expect

from nanogpt_accel.__main__ import main
from nanogpt_accel.data.dataset import open_dataset
from nanogpt_accel.data.meta import read_meta, tokenizer_from_meta
from nanogpt_accel.recipe import SECTIONS

MOVES = {"stoi": {"e4": 0, "e5": 1, "Nf3": 2, "\n": 3}, "vocab_size": 4}
CODONS = {"stoi": {"".join(bases): i for i, bases in enumerate(itertools.product("ACGT", repeat=3))}}
SMILES = {"stoi": {"C": 0, "N": 1, "Cl": 2, "(": 3, ")": 4}}
PIECES = {"itos": {0: " the", 1: "a", 2: " cat", 3: "b"}}
CHARS = {"stoi": {"A": 0, "C": 1, "G": 2, "T": 3}}
PADDED = {"stoi": {"A": 1, "C": 2, "G": 3, "T": 4}, "vocab_size": 6}  # without a token for 0 and 5
NOTES = {"itos": [(60, 1), (62, 1), (64, 2)]}
DIGITS = {"stoi": {str(i): i for i in range(10)}}
SIZE = {"vocab_size": 10}


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(
        f"data: {{data_dir: d}}\nmodel: {MODEL}\noptimizer: {{warmup_iters: 0}}\n"
        "train: {max_iters: 1, eval_iters: 1, device: cpu}\nout_dir: run\n"
    )
    Path("d").mkdir()


def write(meta, n=300, dtype="<u2"):
    """Write a nanoGPT folder with random ids, and return the ids of train.bin."""
    pickle.dump(meta, open("d/meta.pkl", "wb"))
    size = meta.get("vocab_size") or len(meta.get("stoi") or meta["itos"])
    ids = np.random.default_rng(0).integers(0, size, n)
    ids.astype(dtype).tofile("d/train.bin")
    ids[:100].astype(dtype).tofile("d/val.bin")
    return ids.tolist()


@pytest.mark.parametrize(
    ("meta", "ids", "text"),
    [
        (SIZE, [5, 0, 9, 10 - 1], "5 0 9 9"),
        ({"vocab_size": 40}, [5, 17, 39], "5 17 39"),
        (DIGITS, [3, 1, 4, 1, 5], "31415"),  # characters, unlike the ids 0 to 9
        (MOVES, [0, 1, 2, 3, 0], "e4 e5 Nf3 \n e4"),
        (CODONS, [0, 63, 1], "AAA TTT AAC"),
        (SMILES, [0, 0, 3, 2, 4, 1], "CC(Cl)N"),
        (PIECES, [0, 2, 1, 3], " the catab"),
        (CHARS, [2, 0, 3], "GAT"),
        (PADDED, [1, 0, 2, 5], "A<0>C<5>"),
        (NOTES, [0, 2, 1], "(60, 1)(64, 2)(62, 1)"),
    ],
)
def test_samples_and_prompts_of_each_vocabulary(meta, ids, text, tmp_path):
    from transformers import AutoTokenizer

    write(meta)
    tokenizer = tokenizer_from_meta(read_meta("d/meta.pkl"))
    assert tokenizer.decode(ids) == text and tokenizer.encode(text).tolist() == ids == tokenizer.encode_prompt(text)
    tokenizer.save("d")
    other = AutoTokenizer.from_pretrained("d")
    assert other.decode(ids) == text and other(text)["input_ids"] == ids


@pytest.mark.parametrize(("meta", "size"), [(SIZE, 10), (MOVES, 4), (CODONS, 64), (NOTES, 3)])
def test_the_tokens_of_a_folder_without_text(meta, size):
    ids = write(meta)
    ours = open_dataset(SECTIONS["data"](data_dir="d"))
    assert ours.train.rows([0], len(ours.train))[0].tolist() == ids and len(ours.val) == 100
    assert ours.tokenizer.vocab_size == size and ours.text_bytes("val") is None


def test_a_run_trains_evaluates_and_samples(capsys):
    write({"vocab_size": 40})
    assert main(["train", "r.yaml"]) == 0
    assert "bits per byte" not in capsys.readouterr().out
    assert main(["evaluate", "run", "json=true"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["tokens"] == 99 and abs(results["val_loss"] - np.log(64)) < 0.2  # 40 ids, padded to 64
    assert "bits_per_byte" not in results
    sampled = {}
    for prompt in ([], ["prompt=7 39"]):
        assert main(["sample", "run", "num_samples=2", "max_new_tokens=5", "json=true", "device=cpu", *prompt]) == 0
        sampled[len(prompt)] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [sample["prompt"] for sample in sampled[0] + sampled[1]] == ["0", "0", "7 39", "7 39"]
    for sample in sampled[0] + sampled[1]:
        assert len(sample["text"].split(" ")) == 6 and all(int(i) < 40 for i in sample["text"].split())
    assert main(["sample", "run", "num_samples=1", "max_new_tokens=5", "device=cpu", "prompt=7 39"]) == 0  # streamed
    assert capsys.readouterr().out.startswith("7 39" + sampled[1][0]["text"] + "\n")
    expect(
        error_line(capsys, "prompt=7 40", command="sample", target="run"), "prompt='7 40': the tokenizer has no '40'"
    )
    assert main(["export", "run", "--to", "exported"]) == 0
    assert main(["data", "d", "peek=3"]) == 0
    assert "tokenizer wordlevel, vocabulary size 40, no end-of-text token" in capsys.readouterr().out


def test_a_vocabulary_above_65536_means_32_bits():
    ids = write({"vocab_size": 70_000}, dtype="<u4")
    ours = open_dataset(SECTIONS["data"](data_dir="d"))
    assert ours.train.rows([0], len(ours.train))[0].tolist() == ids and ours.manifest["dtype"] == "uint32"


def test_ids_in_another_format_next_to_a_meta_pkl():
    pickle.dump(MOVES, open("d/meta.pkl", "wb"))
    np.save("d/games.npy", np.array([0, 1, 2, 3] * 25, "u1"))
    ours = open_dataset(SECTIONS["data"](data_dir="d", val_fraction=0.2))
    assert ours.tokenizer.decode(ours.train.rows([0], 4)[0]) == "e4 e5 Nf3 \n"
    assert (len(ours.train), len(ours.val), ours.manifest["dtype"]) == (80, 20, "uint8")


def test_an_end_of_text_word_separates_documents():
    write({"stoi": {"<|endoftext|>": 0, "A1": 1, "B2": 2}})
    ours = open_dataset(SECTIONS["data"](data_dir="d", document_mask=True))
    assert ours.tokenizer.eot_id == 0 and ours.tokenizer.encode_prompt("A1<|endoftext|>B2") == [1, 0, 2]


def test_an_id_that_is_not_in_the_vocabulary(capsys):
    write(MOVES)
    np.full(50, 4, "<u2").tofile("d/val.bin")
    expect(error_line(capsys, command="train"), "d/val.bin: the val split contains the id 4", "vocabulary size 4")
    expect(error_line(capsys, command="train"), "correct stoi or vocab_size in its meta.pkl")


def test_the_error_for_a_corpus_with_a_meta_pkl_names_data_dir(capsys):
    write(SIZE)
    Path("text.yaml").write_text("data: {corpus: d, tokenizer: char}")
    assert "set data_dir=d instead of corpus" in error_line(capsys, target="text.yaml")
