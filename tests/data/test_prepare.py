"""prepare.py: nanoGPT's ids, splits of documents, limits, and interruptions at any time."""

import gzip
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from data_files import (
    DOCS,
    ENV,
    char_ids,
    content,
    dealt,
    documents,
    error_line,
    expect,
    ids,
    jsonl,
    lines,
    opened,
    prepared,
    refusal,
    section,
    text_with_spaces,
)
from tokenizer_kinds import tokenizer_json

from nanogpt_accel.__main__ import main
from nanogpt_accel.commands import prepare as command
from nanogpt_accel.data import dataset, encoding, foreign_tokens, prepare, readers, token_files
from nanogpt_accel.data.corpus import Corpus
from nanogpt_accel.data.dataset import data_folder
from nanogpt_accel.data.manifest import is_data_folder
from nanogpt_accel.recipe import SECTIONS, Data
from nanogpt_accel.utils import cli


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """Run in an empty directory with a recipe that does not set the corpus."""
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("data: {tokenizer: char, val_fraction: 0.2, data_dir: out}\n")
    return tmp_path


# ---- a single text


def test_shakespeare_char_is_nanogpts(shakespeare):
    # data/shakespeare_char/prepare.py
    data = shakespeare.read_bytes().decode()
    chars = sorted(list(set(data)))
    stoi = {ch: i for i, ch in enumerate(chars)}
    n = len(data)
    train_ids = np.array([stoi[c] for c in data[: int(n * 0.9)]], dtype=np.uint16)
    val_ids = np.array([stoi[c] for c in data[int(n * 0.9) :]], dtype=np.uint16)

    ours = opened(Data(corpus=str(shakespeare), tokenizer="char", val_fraction=0.1))
    assert ours.train.paths[0].read_bytes() == train_ids.tobytes()
    assert ours.val.paths[0].read_bytes() == val_ids.tobytes()
    assert (len(ours.train), len(ours.val), ours.tokenizer.vocab_size) == (1_003_854, 111_540, 65)
    splits = ours.manifest["splits"]
    assert [splits[s]["bytes"] for s in splits] == [1_003_854, 111_540]
    assert splits["val"]["sha256"] == hashlib.sha256(val_ids.tobytes()).hexdigest()
    assert ours.manifest["corpus"]["bytes"] == 1_115_394 and ours.manifest["split_seed"] is None


def test_shakespeare_gpt2_is_nanogpts(shakespeare, gpt2_files):
    import tiktoken

    data = shakespeare.read_bytes().decode()
    enc = tiktoken.get_encoding("gpt2")
    ours = opened(Data(corpus=str(shakespeare), tokenizer="gpt2", val_fraction=0.1))
    assert ids(ours.train) == enc.encode_ordinary(data[: int(len(data) * 0.9)])
    assert ids(ours.val) == enc.encode_ordinary(data[int(len(data) * 0.9) :])
    assert (len(ours.train), len(ours.val)) == (301_966, 36_059)


@pytest.mark.parametrize("text", ["ж€𝄞" * 10, "a\r\nb\r<|endoftext|>" * 5])
def test_any_single_text(work, text):
    (work / "x.txt").write_bytes(text.encode())
    for tokenizer in ("char", "bpe"):
        ours = opened(Data(corpus="x.txt", tokenizer=tokenizer, vocab_size=300, val_fraction=0.25))
        cut = int(len(text) * 0.75)
        assert ours.tokenizer.decode(ids(ours.train)) == text[:cut]
        assert ours.tokenizer.decode(ids(ours.val)) == text[cut:]
        splits = ours.manifest["splits"]
        assert [splits[s]["bytes"] for s in splits] == [len(text[:cut].encode()), len(text[cut:].encode())]
        assert ours.tokenizer.eot_id not in ids(ours.train)


@pytest.mark.parametrize("special_tokens", ["text", "tokens"])
@pytest.mark.parametrize("tokenizer", ["char", "bpe", "words", "byte fallback"])
def test_text_that_is_read_in_chunks_has_the_ids_of_the_whole_text(monkeypatch, tokenizer, special_tokens):
    """This also holds if a chunk ends inside a special token, and for tokenizers that cannot encode chunks."""
    text = text_with_spaces(600)
    val_fraction = next(f / 1000 for f in range(300, 400) if "<|" in text[: int(len(text) * (1 - f / 1000))][-5:])
    Path("x.txt").write_bytes(text.encode())
    if tokenizer in ("words", "byte fallback"):
        Path(tokenizer).mkdir()
        Path(tokenizer, "tokenizer.json").write_text(tokenizer_json(tokenizer, "<|endoftext|>"))
    given = {"corpus": "x.txt", "tokenizer": tokenizer, "val_fraction": val_fraction, "vocab_size": 300}
    results = []
    for chunk in (2**20, 5, 300):
        monkeypatch.setattr(readers, "CHUNK", chunk)
        data, _ = prepared(**given, special_tokens=special_tokens)
        results.append((ids(data.train), ids(data.val), data.manifest))
        shutil.rmtree("out")
    assert results == results[:1] * 3
    train, val, _ = results[0]
    cut = data.tokenizer.move_cut(text, int(len(text) * (1 - val_fraction)))
    assert train == data.tokenizer.encode_document(text[:cut]).tolist()
    assert val == data.tokenizer.encode_document(text[cut:]).tolist()


def test_a_large_text_needs_little_memory(monkeypatch):
    """The peak of the memory is below the size of the text. Without chunks, it would be more than ten times the
    size."""
    monkeypatch.setattr(readers, "CHUNK", 2**16)
    text = b"so it goes. 123\n" * 2**19
    Path("x.txt.gz").write_bytes(gzip.compress(text))
    tracemalloc.start()
    data, _ = prepared(corpus="x.txt.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data.train) + len(data.val) == len(text) and peak < len(text)


@pytest.mark.parametrize(("text", "val_fraction", "split"), [("abc", 0.9, "train"), ("a", 0.5, "train")])
def test_a_text_too_short_to_cut(refused, work, text, val_fraction, split):
    (work / "x.txt").write_text(text)
    data = Data(corpus="x.txt", tokenizer="char", val_fraction=val_fraction)
    with refused(
        ValueError, "corpus=x.txt", f"has {len(text)} characters, so the {split} split", f"val_fraction={val_fraction}"
    ):
        prepare.prepare(data)
    assert not data_folder(data).exists()


# ---- documents


def end_of_text(texts, val_fraction):
    """Return [train, val] of a few documents, as documented: cut as nanoGPT cuts a text, or where a document ends."""
    cut = int(len("".join(texts)) * (1 - val_fraction))
    ends = [len("".join(texts[: i + 1])) for i in range(len(texts))]
    end = min(ends, key=lambda end: abs(end - cut))
    cut = end if 4 * abs(end - cut) <= min(cut, ends[-1] - cut) else cut
    parts = [
        [text[: max(cut - start, 0)] for start, text in zip([0, *ends], texts, strict=False)],
        [text[max(cut - start, 0) :] for start, text in zip([0, *ends], texts, strict=False)],
    ]
    return [[*filter(None, part)] for part in parts]


@pytest.mark.parametrize("val_fraction", [0.002, 0.3, 0.5, 0.998])
@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_documents_are_assigned_to_splits_and_end_with_eot(notes, tokenizer, val_fraction):
    texts = [f.read_text() for f in sorted(notes.iterdir())]
    ours = opened(Data(corpus="notes", tokenizer=tokenizer, vocab_size=300, val_fraction=val_fraction))
    eot, encode = ours.tokenizer.eot_id, ours.tokenizer.encode
    assert eot == ours.tokenizer.vocab_size - 1
    for file, part in zip((ours.train, ours.val), end_of_text(texts, val_fraction), strict=True):
        assert part
        assert ids(file) == [i for text in part for i in [*encode(text).tolist(), eot]]
        counts = ours.manifest["splits"][file.paths[0].stem]
        assert counts["documents"] == len(part) and counts["bytes"] == sum(len(t.encode()) for t in part)


def test_documents_of_gpt2(gpt2_files):
    import tiktoken

    enc = tiktoken.get_encoding("gpt2")
    jsonl("x.jsonl", DOCS)
    ours, _ = prepared(corpus="x.jsonl", tokenizer="gpt2")
    for file, part in zip((ours.train, ours.val), dealt(DOCS), strict=True):  # data/openwebtext/prepare.py
        assert ids(file) == [i for text in part for i in [*enc.encode_ordinary(text), enc.eot_token]]


def test_the_result_does_not_depend_on_chunks(notes, monkeypatch):
    hashes = set()
    for size in (1, 50, 2**20):
        monkeypatch.setattr(encoding, "CHUNK", size)
        ours = opened(Data(corpus="notes", tokenizer="bpe", val_fraction=0.3, data_dir=f"chunk{size}"))
        hashes.add(json.dumps([ours.manifest["splits"], ours.tokenizer.fingerprint]))
    assert len(hashes) == 1


def test_empty_documents_do_not_count(notes):
    data = Data(corpus="notes", tokenizer="char", val_fraction=0.3)
    before = opened(data)
    (notes / "01 empty.txt").touch()
    after = opened(data)
    assert after.folder != before.folder
    assert after.manifest["splits"] == before.manifest["splits"]


def test_one_document_is_cut(notes):
    for file in sorted(notes.iterdir())[1:]:
        file.write_text("")
    ours = opened(Data(corpus="notes", tokenizer="bpe", vocab_size=300, val_fraction=0.3))
    parts = [ours.tokenizer.decode(ids(file)) for file in (ours.train, ours.val)]
    assert parts == ["note " + "<|endoftext|>", "0: " + "<|endoftext|>"]


def test_python_corpus_offline():
    ours = opened(Data(corpus="python", tokenizer="char", val_fraction=0.05))
    assert len(ours.train) > 5_000_000 and 0.02 < len(ours.val) / len(ours.train) < 0.1
    assert ours.folder.name.startswith(f"python-{ours.manifest['corpus']['revision']}_char-")


def corpus_of(monkeypatch, splits):
    """Replace the corpus by one with its own splits: {split: documents}."""
    found = Corpus(
        "mine", {"kind": "hub", "name": "mine"}, False, lambda split, bad: iter(splits[split]), tuple(splits)
    )
    monkeypatch.setattr(dataset, "find_corpus", lambda spec, **options: found)


def test_splits_of_its_own_are_taken_as_they_are(monkeypatch):
    splits = {"train": DOCS[:100], "val": DOCS[100:103], "test": ["", *DOCS[150:]]}
    corpus_of(monkeypatch, splits)
    for number, chunk in enumerate((1, 2**19)):
        monkeypatch.setattr(encoding, "CHUNK", chunk)
        ours, _ = prepared(corpus="mine", data_dir=f"out{number}")
        used = DOCS[:103] + DOCS[150:]
        assert list(ours.splits) == ["train", "val", "test"]
        for split, texts in splits.items():
            assert ids(ours.splits[split]) == char_ids(used, filter(None, texts))
            assert ours.manifest["splits"][split]["documents"] == len([*filter(None, texts)])


def test_a_test_split_of_its_own_never_gets_into_train(monkeypatch):
    corpus_of(monkeypatch, {"train": DOCS[:100], "test": DOCS[100:]})
    ours, _ = prepared(corpus="mine")
    assert [ids(ours.train), ids(ours.val)] == [char_ids(DOCS, part) for part in dealt(DOCS[:100])]
    assert ids(ours.splits["test"]) == char_ids(DOCS, DOCS[100:])


def test_killed_amid_the_second_of_its_own_splits(monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", 300)
    monkeypatch.setattr(token_files, "COMMIT_SECONDS", 0)
    corpus_of(monkeypatch, {"train": DOCS[:100], "val": DOCS[100:150], "test": DOCS[150:]})
    prepared(corpus="mine", data_dir="straight")
    real, calls = token_files.Writer.write, 0

    def write(self, *args):
        nonlocal calls
        calls += 1
        if calls in (10, 40, 62):
            raise KeyboardInterrupt
        real(self, *args)

    monkeypatch.setattr(token_files.Writer, "write", write)
    stops = 0
    while not is_data_folder("out"):
        try:
            prepared(corpus="mine")
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 2 and content("out") == content("straight")


# ---- token ids


def all_ids(ours):
    """Return [train, val] of a Dataset, as lists of ids."""
    return [tokens.rows([0], len(tokens))[0].tolist() for tokens in (ours.train, ours.val)]


@pytest.mark.parametrize("at_once", [2**22, 33_333])
def test_token_ids_are_cut_as_nanogpt_cuts_a_text_and_not_copied(shakespeare, gpt2_files, monkeypatch, at_once):
    import tiktoken

    monkeypatch.setattr(foreign_tokens, "IDS_AT_ONCE", at_once)
    text, gpt2 = shakespeare.read_text(encoding="utf-8"), tiktoken.get_encoding("gpt2")
    everything = gpt2.encode_ordinary(text)
    np.array(everything, np.uint16).tofile("x.bin")
    n = len(everything)
    train, val = everything[: int(n * 0.9)], everything[int(n * 0.9) :]
    ours, said = prepared(corpus="x.bin", tokenizer="gpt2", val_fraction=0.1)
    assert sorted(content("out")) == ["manifest.json", "tokenizer.json", "tokenizer_config.json"]
    assert all_ids(ours) == [train, val] and ours.tokenizer.kind == "gpt2"
    manifest = ours.manifest
    assert (manifest["corpus"]["kind"], manifest["corpus"]["bytes"], manifest["split_seed"]) == ("ids", 2 * n, None)
    sizes = [len(gpt2.decode_bytes(part)) for part in (train, val)]
    assert [counts["bytes"] for counts in manifest["splits"].values()] == sizes and sum(sizes) == len(text.encode())
    assert [counts["documents"] for counts in manifest["splits"].values()] == [1, 1]
    assert [counts["sha256"] for counts in manifest["splits"].values()] == [
        hashlib.sha256(np.array(part, "<u2").tobytes()).hexdigest() for part in (train, val)
    ]
    assert said[-4:-2] == [
        "corpus=x.bin: val is the end of the text (val_fraction=0.1)",
        "out: uses 1 file of token ids without copying them",
    ]


@pytest.mark.parametrize("at_once", [2**22, 100, 1])
def test_several_files_of_ids_are_one_sequence_in_the_order_of_their_names(monkeypatch, at_once):
    monkeypatch.setattr(foreign_tokens, "IDS_AT_ONCE", at_once)
    texts = [text.replace("<|endoftext|>", "the end") for text in DOCS[:40]]
    char = dataset.Tokenizer.char(texts)
    Path("tok").mkdir()
    char.save("tok")
    everything = np.array(char_ids(texts, texts), np.uint16)
    Path("f").mkdir()
    borders = [0, 3, 4, 997, len(everything)]
    for i, (start, end) in enumerate(zip(borders, borders[1:], strict=False)):
        everything[start:end].tofile(f"f/{5 * i}.bin")  # 10 comes after 5
    for val_fraction in (0.2, (len(texts[-1]) + 0.5) / len(everything)):  # inside a document, and between two documents
        name = f"out {val_fraction}"
        ours, said = prepared(corpus="f/*.bin", tokenizer="tok", val_fraction=val_fraction, data_dir=name)
        cut = int(len(everything) * (1 - val_fraction))
        assert all_ids(ours) == [everything[:cut].tolist(), everything[cut:].tolist()]
        assert "corpus=f/*.bin: 4 files to read" in said
        for part, counts in zip((everything[:cut], everything[cut:]), ours.manifest["splits"].values(), strict=True):
            texts_of_part = char.decode(part).removesuffix("<|endoftext|>").split("<|endoftext|>")
            assert counts["documents"] == len(texts_of_part)
            assert counts["bytes"] == sum(len(text.encode()) for text in texts_of_part)
    assert counts["documents"] == 1 and char.decode(everything[cut:]) == texts[-1] + "<|endoftext|>"


def test_ids_of_a_bpe_of_our_own_know_their_text():
    text = " ".join(DOCS)
    Path("x.txt").write_text(text, encoding="utf-8", newline="")
    first, _ = prepared(corpus="x.txt", tokenizer="bpe", vocab_size=400, data_dir="text")
    np.array(ids(first.train) + ids(first.val), np.uint16).tofile("x.bin")
    ours, _ = prepared(corpus="x.bin", tokenizer="text")
    assert ours.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert sum(counts["bytes"] for counts in ours.manifest["splits"].values()) == len(text.encode())


def many_words():
    """Save a tokenizer with 70,000 tokens, whose size in bytes is unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    Path("tok").mkdir()
    backend = Tokenizer(models.WordLevel({f"word{i}": i for i in range(70_000)}, unk_token="word0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save("tok/tokenizer.json")


def test_ids_of_a_large_vocabulary_take_32_bits(capsys):
    many_words()
    everything = np.random.default_rng(0).integers(0, 70_000, 3000).astype(np.uint32)
    everything[[0, -1]] = 69_999
    everything.tofile("x.bin")
    assert main(["prepare", "r.yaml", "corpus=x.bin", "tokenizer=tok"]) == 0
    ours = dataset.open_dataset(section(corpus="x.bin", tokenizer="tok"))
    assert all_ids(ours) == [everything[:2400].tolist(), everything[2400:].tolist()]
    assert ours.manifest["dtype"] == "uint32" and ours.text_bytes("train") is ours.text_bytes("val") is None
    assert "train: 2,400 tokens\nval: 600 tokens\n" in capsys.readouterr().out
    assert main(["data", "out"]) == 0
    assert "train: 2,400 tokens, 1 file\n" in capsys.readouterr().out


def test_words_that_the_tokenizer_does_not_have_are_named(refused):
    many_words()
    Path("words").mkdir()
    text = Path("tok/tokenizer.json").read_text().replace('"unk_token": "word0"', '"unk_token": "<unk>"')
    Path("words/tokenizer.json").write_text(text)
    Path("one.txt").write_text("word1 word2 others\n" * 9)
    with refused(ValueError, "tokenizer=words", "the tokenizer has no 'others'", "corpus=one.txt"):
        prepared(corpus="one.txt", tokenizer="words")


def test_interrupted_while_ids_are_read(gpt2_files, monkeypatch):
    np.arange(3000, dtype=np.uint16).tofile("x.bin")
    given = {"corpus": "x.bin", "tokenizer": "gpt2"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "sha256_of_split", lambda tokens: (_ for _ in ()).throw(KeyboardInterrupt))
        prepared(**given)
    assert not Path("out").exists()
    assert all_ids(prepared(**given)[0]) == [[*range(2400)], [*range(2400, 3000)]]


# ---- limits


def test_a_limit_of_documents_takes_the_first_ones():
    jsonl("x.jsonl", DOCS)
    ours, _ = prepared(corpus="x.jsonl", limit_documents=50)
    assert [ids(ours.train), ids(ours.val)] == [char_ids(DOCS[:50], part) for part in dealt(DOCS[:50])]
    one, other = (dataset.data_folder(section(corpus="x.jsonl", data_dir=None, limit_documents=n)) for n in (50, None))
    assert one != other


def reaching(texts, limit):
    """Return the number of texts, each with its end-of-text token, that reaches a number of tokens."""
    return next(n for n in range(1, len(texts) + 1) if sum(len(text) + 1 for text in texts[:n]) >= limit)


@pytest.mark.parametrize("limit", [3000, sum(len(text) + 1 for text in DOCS[:9])])
def test_a_limit_of_tokens_stops_at_the_end_of_the_document_that_reaches_it(monkeypatch, limit):
    jsonl("x.jsonl", DOCS)
    taken = reaching(DOCS, limit)
    for workers, chunk in ((1, 2**19), (2, 2**19), (2, 100), (1, 1)):
        monkeypatch.setattr(encoding, "CHUNK", chunk)
        ours, _ = prepared(workers, corpus="x.jsonl", limit_tokens=limit, data_dir=f"out {workers} {chunk}")
        parts = dealt(DOCS[:taken]) if taken >= 20 else end_of_text(DOCS[:taken], 0.2)
        assert [ids(ours.train), ids(ours.val)] == [char_ids(DOCS, part) for part in parts]


@pytest.mark.parametrize("counted_below", [2**27, 0])
def test_a_limit_before_the_first_document_of_val(monkeypatch, counted_below):
    """In this case, val is the end of the text within the limit."""
    monkeypatch.setattr(prepare, "COUNTED_BELOW", counted_below)
    jsonl("x.jsonl", DOCS)
    for number in (5, 40):  # a few documents, and many of which the hash selects none
        limit = sum(len(text) + 1 for text in DOCS[:number])
        ours, _ = prepared(corpus="x.jsonl", limit_tokens=limit, val_fraction=0.01, data_dir=f"out{number}")
        parts = end_of_text(DOCS[:number], 0.01)
        assert [ids(ours.train), ids(ours.val)] == [char_ids(DOCS, part) for part in parts]


def test_a_limit_of_tokens_holds_for_each_split_of_its_own(monkeypatch):
    splits = {"train": DOCS[:100], "val": DOCS[100:150], "test": DOCS[150:]}
    corpus_of(monkeypatch, splits)
    ours, _ = prepared(corpus="mine", limit_tokens=500)
    for split, texts in splits.items():
        assert ids(ours.splits[split]) == char_ids(DOCS, texts[: reaching(texts, 500)])


@pytest.mark.parametrize("limit", ["limit_tokens=50", "limit_documents=5"])
def test_a_single_text_has_no_documents_to_limit(capsys, limit):
    lines("x.txt", DOCS)
    line = refusal(capsys, "corpus=x.txt", limit)
    assert f"{limit}: corpus=x.txt is a single text" in line and "lines=true" in line
    assert main(["prepare", "r.yaml", "corpus=x.txt", f"{limit}0", "lines=true"]) == 0


def test_limits_that_leave_one_document(capsys):
    jsonl("x.jsonl", DOCS)
    assert "limit_documents=1: must be 2 or more, because train and val need" in refusal(
        capsys, "corpus=x.jsonl", "limit_documents=1"
    )
    ours, _ = prepared(corpus="x.jsonl", limit_tokens=1)
    assert [ids(ours.train), ids(ours.val)] == [char_ids(DOCS, part) for part in end_of_text(DOCS[:1], 0.2)]


# ---- interruptions


CHILD = """
import json, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a script ignores it
from nanogpt_accel.data import encoding, prepare, token_files as tokens
from nanogpt_accel.recipe import SECTIONS
given, moves, prepare.COUNTED_BELOW, tokens.COMMIT_SECONDS = map(json.loads, sys.argv[1:])
encoding.CHUNK = 400
real = os.replace
def replace(source, target):
    global moves
    if os.path.basename(os.path.dirname(target)) == "out":  # a final move
        if moves == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        moves -= 1
    real(source, target)
os.replace = replace
prepare.prepare(SECTIONS["data"](**given), lambda line: print(line, flush=True), threads=2)
"""


def child(moves=-1, counted_below=2**28, commit_seconds=0, **given):
    """Start a process that prepares and commits every chunk. It kills itself after `moves` of the moves at the end."""
    command = [
        sys.executable,
        "-c",
        CHILD,
        json.dumps(section(**given).model_dump()),
        str(moves),
        str(counted_below),
        str(commit_seconds),
    ]
    return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, text=True)


def until(condition, process=None, seconds=30):
    end = time.monotonic() + seconds
    while not condition() and (process is None or process.poll() is None):
        assert time.monotonic() < end
        time.sleep(0.001)


def stamp_of(path):
    """Return the time of the last change of a file, or 0 if it does not exist."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def committed(folder):
    """Return {name: inode} of the files that are finished in the last commit."""
    try:
        files = json.loads(Path(folder, ".partial", "progress.json").read_text())["files"].values()
    except FileNotFoundError:
        return {}
    paths = [Path(folder, ".partial", file["name"]) for of_split in files for file in of_split[:-1]]
    return {path.name: path.stat().st_ino for path in paths if path.exists()}


@pytest.mark.slow
def test_killed_at_random_times_it_resumes_and_ends_with_the_same_bytes():
    jsonl("x.jsonl", documents(3000))
    given = {"corpus": "x.jsonl", "shard_tokens": 5000}
    prepared(corpus="x.jsonl", shard_tokens=5000, data_dir="whole/out")  # with a different chunk size
    process = child(**given, data_dir="straight/out")
    assert process.wait() == 0
    whole = content("straight/out")
    assert len(whole) > 12, "many shards"

    rng, kills, finished, progress = random.Random(), 0, {}, Path("out/.partial/progress.json")
    while True:
        stamp = stamp_of(progress)
        process = child(**given)
        until(lambda stamp=stamp: stamp_of(progress) not in (0, stamp), process)  # it has made progress
        time.sleep(rng.random() * 0.15 * 1.1**kills)  # longer each time, because a busy disk is slow
        process.kill()
        status = process.wait()
        finished |= {name: mark for name, mark in committed("out").items() if name not in finished}
        if status == 0:
            break
        kills += 1
        if is_data_folder("out"):  # killed in the very last line
            break
        assert kills < 60
    assert kills >= 3
    assert content("out") == whole
    assert {name: Path("out", name).stat().st_ino for name in finished} == finished and len(finished) > 3
    for split in ("train", "val"):
        one, other = (dataset.open_dataset(SECTIONS["data"](data_dir=name)) for name in ("out", "whole/out"))
        assert ids(one.splits[split]) == ids(other.splits[split])


SLOW_SIGNALS = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("number", [signal.SIGUSR1, *SLOW_SIGNALS])
def test_an_interrupted_preparation_keeps_its_documents(number):
    jsonl("x.jsonl", documents(60_000))
    process = child(commit_seconds=10**9, corpus="x.jsonl")
    written = Path("out/.partial/train-00000.bin")
    until(lambda: written.exists() and written.stat().st_size > 50_000, process)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    statuses = {signal.SIGINT: -signal.SIGINT, signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGUSR1: 75}
    assert process.returncode == statuses[number]
    counts = json.loads(Path("out/.partial/progress.json").read_text())["counts"]
    kept = counts["train"]["documents"] + counts["val"]["documents"]
    assert f"out: interrupted; {kept:,} documents kept; run the same command to resume\n" in said and kept > 100
    _, lines = prepared(corpus="x.jsonl")
    assert "out: resuming an interrupted preparation" in lines
    prepared(corpus="x.jsonl", data_dir="straight")
    assert content("out") == content("straight")


def test_interrupted_before_anything_is_written(monkeypatch):
    jsonl("x.jsonl", DOCS)
    monkeypatch.setattr(prepare, "_make_tokenizer", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    said, before = [], signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(section(corpus="x.jsonl"), said.append)
    assert said == ["out: interrupted; 0 documents kept"] and not Path("out").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_rate_is_that_of_this_attempt(monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", 100)
    jsonl("x.jsonl", DOCS)
    real, calls = token_files.Writer.commit, iter(range(20))

    def commit(self, position):
        real(self, position)
        if next(calls, None) is None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(token_files.Writer, "commit", commit)
        prepared(corpus="x.jsonl")
    earlier = json.loads(Path("out/.partial/progress.json").read_text())["counts"]
    earlier = earlier["train"]["bytes"] + earlier["val"]["bytes"]
    size = len("".join(DOCS).encode())
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    line = prepared(corpus="x.jsonl")[1][-3]
    seconds = float(line.split(" in ")[-1].split(" s ")[0])
    assert f"{size / 1e3:,.1f} kB of text ({(size - earlier) / 1e3:,.1f} kB in this attempt) in " in line
    assert line.endswith(f" ({(size - earlier) / 1e3 / seconds:,.1f} kB/s)")


def test_a_finished_shard_is_not_written_again():
    jsonl("x.jsonl", documents(2000))
    given = {"corpus": "x.jsonl", "shard_tokens": 5000}
    assert child(**given, data_dir="straight/out").wait() == 0
    process = child(**given)
    until(lambda: len(committed("out")) >= 2, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    marked = Path("out/.partial/train-00000.bin")
    raw = bytearray(marked.read_bytes())
    raw[100] ^= 255
    marked.write_bytes(raw)  # a byte that no attempt would write
    assert child(**given).wait() == 0
    straight, ours = content("straight/out"), content("out")
    assert ours["train-00000.bin"] == raw and sorted(ours) == sorted(straight)
    assert {name for name in ours if ours[name] != straight[name]} == {"train-00000.bin", "manifest.json"}


@pytest.mark.parametrize("moves", range(5))
def test_killed_between_the_moves(moves):
    jsonl("x.jsonl", DOCS)
    given = {"corpus": "x.jsonl", "shard_tokens": 2000}
    process = child(moves, **given)
    assert process.wait() == -signal.SIGKILL
    assert not is_data_folder("out") and not dataset.is_prepared(section(**given))
    ours, said = prepared(**given)
    assert [line for line in said if "B/s" in line] == [], "only the moves were left to do"
    assert child(**given, data_dir="straight/out").wait() == 0
    assert content("out") == content("straight/out")
    assert ids(ours.train) == char_ids(DOCS, dealt(DOCS)[0])


@pytest.mark.parametrize("counted_below", [2**28, 0])
def test_killed_between_the_moves_if_the_hash_leaves_val_empty(monkeypatch, counted_below):
    monkeypatch.setattr(prepare, "COUNTED_BELOW", counted_below)
    jsonl("x.jsonl", ["one", "two", "three"])
    given = {"corpus": "x.jsonl", "val_fraction": 1e-9}
    assert child(1, counted_below, **given).wait() == -signal.SIGKILL
    ours, _ = prepared(**given)
    assert ours.manifest["splits"]["val"]["documents"] == 1


@pytest.mark.parametrize(
    "change",
    [
        {"val_fraction": 0.3},
        {"limit_documents": 100},
        {"corpus": "y.jsonl"},
        {"tokenizer": "bpe", "vocab_size": 300},
        {"shard_tokens": 3000},
    ],
)
def test_other_facts_start_over(change):
    for name, texts in (("x.jsonl", documents(2000)), ("y.jsonl", documents(300, seed=6))):
        jsonl(name, texts)
    process = child(corpus="x.jsonl", shard_tokens=1000)
    until(lambda: len(committed("out")) >= 2)
    process.kill()
    process.wait()
    given = {"corpus": "x.jsonl", "shard_tokens": 1000} | change
    ours, said = prepared(**given)
    assert not any("resuming" in line for line in said)
    prepared(**given, data_dir="fresh")
    assert content("out") == content("fresh")


def test_a_limit_of_tokens_means_the_same_after_a_kill(monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", 400)
    monkeypatch.setattr(token_files, "COMMIT_SECONDS", 0)
    jsonl("x.jsonl", DOCS)
    prepared(corpus="x.jsonl", limit_tokens=3000, data_dir="straight")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(token_files.Writer, "finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        prepared(corpus="x.jsonl", limit_tokens=3000)
    prepared(corpus="x.jsonl", limit_tokens=3000)
    assert content("out") == content("straight")


def test_bad_documents_are_counted_once_after_a_kill(monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", 400)
    monkeypatch.setattr(token_files, "COMMIT_SECONDS", 0)
    jsonl("x.jsonl", DOCS)
    Path("x.jsonl").write_text("{\n[]\n" + Path("x.jsonl").read_text())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(token_files.Writer, "finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        prepared(corpus="x.jsonl", skip_bad_documents=True)
    _, said = prepared(corpus="x.jsonl", skip_bad_documents=True)
    assert "2 bad documents skipped" in said


def test_two_processes_that_prepare():
    """The second process waits for the lock, and then finds complete data. The first one is stopped while it has the
    lock, so that the order is certain."""
    jsonl("x.jsonl", documents(2000))
    first = child(corpus="x.jsonl")
    until(Path("out/.partial/progress.json").exists, first)
    first.send_signal(signal.SIGSTOP)
    second = child(corpus="x.jsonl")
    try:
        assert f"preparing this folder (process {first.pid} on {platform.node()})" in second.stdout.readline()
        assert not is_data_folder("out")
    finally:
        first.send_signal(signal.SIGCONT)
    said = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert [text.count("B/s)\n") for text in said] == [1, 0]
    files = sorted(content("out"))
    assert [*files, len(content("out")["train.bin"])] == [
        "manifest.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "train.bin",
        "val.bin",
        2 * len(char_ids(documents(2000), dealt(documents(2000))[0])),
    ]


def test_a_waiting_process_resumes_after_the_other_is_killed():
    jsonl("x.jsonl", documents(2000))
    first = child(corpus="x.jsonl")
    until(Path("out/.partial/progress.json").exists, first)
    first.send_signal(signal.SIGSTOP)
    second = child(corpus="x.jsonl")
    assert "waiting for another process" in second.stdout.readline()
    first.kill()
    first.wait()
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 0 and "resuming an interrupted preparation" in said
    child(corpus="x.jsonl", data_dir="straight/out").wait()
    assert content("out") == content("straight/out")


def test_another_finishes_while_this_one_makes_its_tokenizer(monkeypatch):
    jsonl("x.jsonl", DOCS)
    real = prepare._make_tokenizer

    def slow(*args):
        monkeypatch.setattr(prepare, "_make_tokenizer", real)
        prepared(corpus="x.jsonl")
        return real(*args)

    monkeypatch.setattr(prepare, "_make_tokenizer", slow)
    assert prepare.prepare(section(corpus="x.jsonl"), print) == Path("out")


def test_another_finishes_while_this_one_waits_for_it(monkeypatch):
    jsonl("x.jsonl", DOCS)
    real, calls = prepare._wait_for_others, []

    def wait(folder, report):
        real(folder, report)
        calls.append(folder)
        if len(calls) == 2:  # before the files are opened
            prepared(corpus="x.jsonl")

    monkeypatch.setattr(prepare, "_wait_for_others", wait)
    assert prepare.prepare(section(corpus="x.jsonl"), print) == Path("out")


# ---- the disk


def test_a_disk_that_fills_up_leaves_nothing_that_counts_as_done():
    jsonl("x.jsonl", documents(3000))
    script = (
        "import resource, sys\n"
        "from nanogpt_accel.data import encoding, token_files as tokens; from nanogpt_accel.__main__ import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))\n"
        "tokens.COMMIT_SECONDS, encoding.CHUNK = 0, 400\n"
        "sys.exit(main(['prepare', 'r.yaml', 'corpus=x.jsonl']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=ENV, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "data_dir=out" in done.stderr and "File too large" in done.stderr and "free some disk space" in done.stderr
    assert not is_data_folder("out") and sorted(os.listdir("out")) == [".partial"]
    ours, said = prepared(corpus="x.jsonl")
    assert any("resuming an interrupted preparation" in line for line in said)
    texts = documents(3000)
    assert [ids(ours.train), ids(ours.val)] == [char_ids(texts, part) for part in dealt(texts)]


Usage = namedtuple("Usage", "total used free")


def test_a_full_disk_is_reported_before_anything_is_written(capsys, monkeypatch):
    lines("x.txt", documents(3000))
    size = os.path.getsize("x.txt")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2 * size, size, size))  # a char takes two bytes
    line = refusal(capsys, "corpus=x.txt", "lines=true")
    assert "data_dir=out" in line and "GB" in line and "limit_tokens" in line
    assert main(["prepare", "r.yaml", "corpus=x.txt", "lines=true", "limit_tokens=1000"]) == 0


def test_resuming_needs_disk_space_for_the_rest_only(monkeypatch):
    lines("x.txt", documents(3000))
    process = child(corpus="x.txt", lines=True)
    written = Path("out/.partial/train-00000.bin")
    need = 2 * os.path.getsize("x.txt")
    until(lambda: written.exists() and written.stat().st_size > need / 4, process)
    process.kill()
    process.wait()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(need, need / 5, need * 4 / 5))
    prepared(corpus="x.txt", lines=True)


def test_a_large_single_text_is_announced(monkeypatch):
    Path("x.txt").write_text("so it goes. " * 1000)
    Path("words").mkdir()
    Path("words/tokenizer.json").write_text(tokenizer_json("words"))
    words = {"corpus": "x.txt", "tokenizer": "words"}
    assert not any("memory" in line for line in prepared(**words)[1])
    shutil.rmtree("out")
    monkeypatch.setattr(prepare, "LARGE_TEXT", 10_000)
    (line,) = [line for line in prepared(**words)[1] if "memory" in line]
    assert "tokenizer=words" in line and "lines=true" in line
    shutil.rmtree("out")
    assert not any("memory" in line for line in prepared(corpus="x.txt")[1])  # it is streamed
    shutil.rmtree("out")
    lines("x.txt", DOCS * 10)
    assert os.path.getsize("x.txt") > 10_000
    assert not any("memory" in line for line in prepared(corpus="x.txt", lines=True)[1])


# ---- messages


def test_prepare_twice_writes_once(notes):
    data, lines = Data(corpus="notes", tokenizer="char", val_fraction=0.3), []
    folder = prepare.prepare(data, lines.append)
    assert lines[0] == "corpus=notes: 12 files to read"
    assert lines[1] == "corpus=notes: val is the end of the text (val_fraction=0.3)"
    assert str(folder) in lines[2] and lines[2].endswith("B/s)")
    assert [line.split(":")[0] for line in lines[3:]] == ["train", "val"]
    times = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    assert prepare.prepare(data, lines.append) == folder and len(lines) == 5
    assert times == {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}


def test_long_work_reports_its_progress(notes, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", 50)
    clock = iter(range(0, 10_000, 3))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    lines = []
    data = Data(corpus="notes", tokenizer="bpe", vocab_size=300, val_fraction=0.3)
    assert prepare.ready(data, lines.append)[1].folder == data_folder(data)
    assert lines[:2] == ["corpus=notes: 12 files to read", "training a BPE tokenizer with 300 tokens on notes"]
    lines = [line for line in lines[2:-3] if "too small" not in line and "val is" not in line]
    assert len(lines) > 3 and all("document" in line and "B/s" in line for line in lines)


def write_texts(documents, characters):
    Path("x.jsonl").write_text("".join(json.dumps({"text": "ab" * 50}) + "\n" for _ in range(documents)))
    Path("x.txt").write_text("ab" * (characters // 2))


@pytest.mark.parametrize(
    ("corpus", "length", "block_size", "fraction"),
    [
        ("x.txt", 20_000, 9, None),  # 0.0005 of the text is 10 tokens
        ("x.txt", 20_000, 10, 0.01),
        ("x.txt", 20_000, 199, 0.01),
        ("x.txt", 20_000, 200, 0.1),
        ("x.txt", 20_000, 9_999, 0.5),
        ("x.jsonl", 200, 50, 0.01),
        ("x.jsonl", 200, 1000, 0.1),
    ],
)
def test_val_is_as_long_as_a_sample(corpus, length, block_size, fraction):
    write_texts(length, length)
    data = Data(corpus=corpus, tokenizer="char")
    lines = []
    used, found = prepare.ready(data, lines.append, block_size)
    assert used.val_fraction == (fraction or 0.0005) and len(found.val) > block_size
    changes = [line for line in lines if "because val had only" in line]
    assert len(changes) == (fraction is not None)
    assert all(line.startswith(f"val_fraction={fraction} instead of 0.0005") for line in changes)
    assert found.folder == data_folder(used) and found.manifest["val_fraction"] == used.val_fraction
    assert dataset.check(data, block_size) == [] and not dataset.require_block(used, found.manifest, block_size)
    content_before = content("data")
    assert prepare.ready(data, lines.append, block_size)[1].folder == found.folder  # nothing is prepared again
    assert content("data") == content_before


def test_val_fraction_that_was_set_is_not_changed():
    write_texts(200, 20_000)
    for given, words in (
        ({"val_fraction": 0.0005}, "or use a larger corpus or val_fraction=0.01"),
        ({"data_dir": "out"}, "or use a larger corpus or val_fraction=0.01 and another data_dir"),
    ):
        data = Data(corpus="x.txt", tokenizer="char", **given)
        used, found = prepare.ready(data, print, 100)
        assert used == data and len(found.val) == 10
        for problems in (dataset.check(data, 100), dataset.require_block(data, found.manifest, 100)):
            assert problems[0].endswith(words)


def test_val_of_the_corpus_itself_is_not_changed(gpt2_files):
    write_texts(200, 20_000)
    Path("d").mkdir()
    shutil.move("x.txt", "d/train.txt")
    Path("d/val.txt").write_text("ab")
    used, found = prepare.ready(Data(corpus="d", tokenizer="char"), print, 100)
    assert used.val_fraction == 0.0005 and len(found.val) == 3
    (problem,) = dataset.check(used, 100)
    assert problem.endswith("set a smaller block_size, or use more validation data")
    np.arange(1000, dtype="<u2").tofile("d/train.bin")
    np.arange(3, dtype="<u2").tofile("d/val.bin")
    Path("d/train.txt").unlink()
    assert prepare.ready(Data(data_dir="d"), print, 100)[0].val_fraction == 0.0005
    np.save("tokens.npy", np.zeros(1000, "<u2"))
    Path("e").mkdir()
    shutil.move("tokens.npy", "e")
    used, found = prepare.ready(Data(data_dir="e"), print, 50)  # the files are not changed
    assert used.val_fraction == 0.1 and len(found.val) == 100


def test_the_command_reports_its_progress(recipe, capsys, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", 50)
    clock = iter(range(0, 10_000, 3))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    command.main([recipe])
    assert capsys.readouterr().out.count(" documents (") > 3


def test_thirty_bad_documents_are_three_and_a_number():
    Path("x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCS) + "[]\n" * 30)
    _, said = prepared(corpus="x.jsonl", skip_bad_documents=True)
    at = next(i for i, line in enumerate(said) if "skipped:" in line)
    assert [line.split(":")[0] for line in said[at : at + 3]] == ["skipped"] * 3
    assert "... and 27 more" in said and "30 bad documents skipped" in said


def test_every_table_is_checked_before_a_bpe_is_trained(capsys):
    Path("f").mkdir()
    jsonl("f/a.jsonl", DOCS)
    Path("f/b.csv").write_text("story\na\n")
    Path("f/ignored.zip").touch()
    assert main(["prepare", "r.yaml", "corpus=f", "tokenizer=bpe"]) == 2
    out, err = capsys.readouterr()
    assert err == "error: corpus=f: f/b.csv: no column text; set text_column to one of story\n"
    assert out == "corpus=f: 2 files to read; 1 skipped (1 .zip)\n" and not Path("out").exists()
    Path("f/b.csv").unlink()
    assert main(["prepare", "r.yaml", "corpus=f", "tokenizer=bpe", "vocab_size=9000"]) == 0
    size = len(json.loads(Path("out/tokenizer.json").read_text())["model"]["vocab"]) + 1
    assert (
        f"vocab_size=9000: the corpus is too small for this vocabulary size; the tokenizer has only {size:,} tokens"
        in capsys.readouterr().out
        and size < 9000
    )


def test_the_command_that_shows_a_folder(capsys):
    jsonl("x.jsonl", ["b" * 300, "a", "c"])
    assert main(["prepare", "r.yaml", "corpus=x.jsonl", "val_fraction=1e-9"]) == 0
    capsys.readouterr()
    assert main(["data", "out", "peek=350"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) < 130 and out.index("\ntrain: ") < out.index("\nval: ")
    assert ", 1 file; tokenizer" in out and ", 1 document, " in out and "1 documents" not in out
    shown = [line for line in out.splitlines() if set(line) <= set(" b'")]
    assert len(shown) >= 2 and all(len(line) <= 110 for line in shown), "in lines"
    manifest = Path("out/manifest.json")
    manifest.write_text(manifest.read_text().replace('"x.jsonl"', '"\\u001b[2J"'))  # as in a folder from elsewhere
    assert main(["data", "out"]) == 0 and r"out: \x1b[2J, 1 file; tokenizer" in capsys.readouterr().out
    assert main(["data", "."]) == 2
    assert capsys.readouterr().err == "error: data_dir=.: not a data folder; use one of the data folders in it: out\n"


# ---- the command


@pytest.fixture
def recipe(notes):
    Path("notes.yaml").write_text("data:\n  corpus: notes\n  tokenizer: char\n  val_fraction: 0.3\n")
    return "notes.yaml"


def test_the_command_prints_a_summary(recipe, capsys):
    command.main([recipe])
    first = capsys.readouterr().out
    (folder,) = Path("data").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    splits = manifest["splits"]
    assert str(folder) in first and f"tokenizer: char, vocabulary size {manifest['tokenizer']['vocab_size']}" in first
    for split in ("train", "val"):
        counts = splits[split]
        assert f"{split}: {counts['tokens']:,} tokens, {counts['documents']} documents" in first
        assert f"{counts['bytes'] / counts['tokens']:.3f} bytes per token" in first
    command.main([recipe])
    assert capsys.readouterr().out.startswith(f"{folder}: already prepared\n")
    command.main([recipe, f"data_dir={folder}", "corpus=notes"])
    assert "already prepared" in capsys.readouterr().out


def test_the_command_shows_its_keys(capsys):
    command.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"{key}=" in out for key in Data.model_fields) and "prepare RECIPE" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["RECIPE is missing; usage: nanogpt-accel prepare"]),
        (["nots.yaml"], ["nots.yaml: no such recipe", "notes"]),
        (
            ["notes.yaml", "corpus=note", "tokenizer=car", "val_fraction=2"],
            ["corpus=note", "tokenizer=car", "val_fraction=2"],
        ),
        (["notes.yaml", "corpus=bad.txt"], ["corpus=bad.txt", "byte 1"]),
    ],
)
def test_each_mistake_is_one_line(recipe, capsys, words, expected):
    Path("bad.txt").write_bytes(b"a\xff")
    assert cli.run(command.main, words) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in expected) and "Traceback" not in err
    assert err.count("error: ") == err.count("\n") == max(1, len(words) - 1)


def test_in_a_separate_process(recipe):
    """Run the command as a user does: first with a full disk, then with enough space."""
    env = os.environ | {"PYTHONPATH": str(Path(dataset.__file__).parents[2])}
    command = [sys.executable, "-m", "nanogpt_accel", "prepare", recipe]
    full = f"ulimit -f 0; exec {' '.join(command)}"
    done = subprocess.run(["bash", "-c", full], capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "File too large" in done.stderr and list(Path("data").iterdir()) == []
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stderr == "" and "train: " in done.stdout


def test_a_vocabulary_that_is_too_large(capsys):
    expect(error_line(capsys, "corpus=python", "tokenizer=bpe", "vocab_size=1e12"), "vocab_size", "1000000")


# ---- a folder that exists


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tokenizer=bpe"], ["tokenizer=bpe vocab_size=4096", "prepared with tokenizer=char"]),
        (["corpus=y.jsonl"], ["corpus=y.jsonl", "prepared with corpus=x.jsonl"]),
        (["val_fraction=0.5"], ["val_fraction=0.5", "prepared with val_fraction=0.2"]),
        (["text_column=story"], ["text_column=story", "prepared with"]),
    ],
)
def test_a_folder_with_other_contents(capsys, words, expected):
    Path("x.jsonl").write_text("".join(json.dumps({"text": text, "story": text[::-1]}) + "\n" for text in DOCS))
    jsonl("y.jsonl", DOCS)
    assert main(["prepare", "r.yaml", "corpus=x.jsonl"]) == 0
    before = content("out")
    capsys.readouterr()
    assert main(["prepare", "r.yaml", "corpus=x.jsonl", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert [word for word in [*expected, "data_dir=out"] if word not in line] == [], line
    assert content("out") == before


def test_a_shard_that_is_missing_or_cut(capsys):
    jsonl("x.jsonl", documents(1000))
    assert child(corpus="x.jsonl", shard_tokens=3000).wait() == 0
    os.truncate("out/train-00001.bin", 10)
    assert main(["prepare", "r.yaml", "corpus=x.jsonl"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "out/train-00001.bin: 10 bytes" in line and "prepare it again" in line
    os.remove("out/train-00001.bin")
    assert main(["prepare", "r.yaml", "corpus=x.jsonl"]) == 2
    assert "out/train-00001.bin: 0 bytes" in capsys.readouterr().err
