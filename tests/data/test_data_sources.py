"""Data preparation from end to end: every format of file, interruptions at any moment, many shards, and bad input."""

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
from collections import namedtuple
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import (
    DOCS,
    ENV,
    FORMATS,
    GOOD,
    ROWS,
    char_ids,
    content,
    dealt,
    documents,
    ids,
    is_lines,
    jsonl,
    lines,
    packed,
    prepared,
    section,
    table,
)

from nanogpt_accel.__main__ import main
from nanogpt_accel.data import dataset, encoding, hub_datasets, prepare, readers, sources, token_files
from nanogpt_accel.data.corpus import Corpus
from nanogpt_accel.data.manifest import is_data_folder
from nanogpt_accel.recipe import SECTIONS


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """Corpora and data folders lie below the working directory, and a recipe that leaves the corpus open."""
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("data: {tokenizer: char, val_fraction: 0.2, data_dir: out}\n")
    return tmp_path


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_documents_in_every_format_by_any_workers(monkeypatch, name):
    FORMATS[name](name, DOCS)
    for workers, chunk in ((1, 2**19), (2, 2**19), (2, 300), (1, 1), (3, 4000)):
        monkeypatch.setattr(encoding, "CHUNK", chunk)
        ours, _ = prepared(workers, corpus=name, lines=is_lines(name), data_dir=f"out {workers} {chunk}")
        for file, part in zip((ours.train, ours.val), dealt(DOCS), strict=True):
            assert file.paths[0].read_bytes() == np.array(char_ids(DOCS, part), "<u2").tobytes()
        counts = ours.manifest["splits"]
        assert [counts[split]["bytes"] for split in ("train", "val")] == [
            sum(len(text.encode()) for text in part) for part in dealt(DOCS)
        ]


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl.zst", "x.log.gz"])
def test_the_tokens_are_tiktokens(gpt2_files, monkeypatch, name):
    import tiktoken

    gpt2 = tiktoken.get_encoding("gpt2")
    FORMATS[name](name, DOCS)
    for workers, chunk in ((1, 2**19), (2, 300)):
        monkeypatch.setattr(encoding, "CHUNK", chunk)
        ours, _ = prepared(workers, corpus=name, lines=is_lines(name), tokenizer="gpt2", data_dir=f"out {workers}")
        for file, part in zip((ours.train, ours.val), dealt(DOCS), strict=True):
            wanted = [i for text in part for i in [*gpt2.encode_ordinary(text), gpt2.eot_token]]
            assert file.paths[0].read_bytes() == np.array(wanted, "<u2").tobytes()


def test_a_bpe_of_our_own_does_not_depend_on_format_workers_or_chunks(monkeypatch):
    found = []
    for name in ("x.parquet", "x.jsonl.gz", "x.csv", "x.txt"):
        for workers, chunk in ((1, 2**19), (2, 300)):
            monkeypatch.setattr(encoding, "CHUNK", chunk)
            FORMATS[name](name, DOCS)
            folder = f"out {name} {workers}"
            prepared(workers, corpus=name, lines=is_lines(name), tokenizer="bpe", vocab_size=400, data_dir=folder)
            found.append({file: raw for file, raw in content(folder).items() if file != "manifest.json"})
    assert len(found[0]) == 4 and found.count(found[0]) == len(found)


@pytest.mark.parametrize("chunk", [1, 700, 2**19])
def test_shards_follow_each_other_for_any_chunk(monkeypatch, chunk):
    monkeypatch.setattr(encoding, "CHUNK", chunk)
    jsonl("x.jsonl", DOCS)
    ours, _ = prepared(2, corpus="x.jsonl", shard_tokens=1000)
    for split, part in zip(("train", "val"), dealt(DOCS), strict=True):
        assert ids(ours.splits[split]) == char_ids(DOCS, part)
        files = ours.manifest["splits"][split]["files"]
        assert [os.path.getsize(Path("out", file["name"])) for file in files] == [2 * file["tokens"] for file in files]
        assert all(file["tokens"] >= 1000 for file in files[:-1])
    if chunk < 2**19:
        assert [file["name"] for file in ours.manifest["splits"]["train"]["files"]][:2] == [
            "train-00000.bin",
            "train-00001.bin",
        ]


def test_a_document_keeps_its_line_ends_and_delimiters():
    texts = ["a\r\nb\n\n", 'say "x, y"\r', "\n", "tab\there ", "  two  spaces  "]
    for name in ("x.csv", "x.tsv", "x.jsonl", "x.parquet"):
        FORMATS[name](name, texts)
        assert list(sources.find_corpus(name).documents()) == texts, name
    Path("x.txt").write_bytes(b"a\r\n\r\n b \xe2\x80\xa8c\x0cd\nlast")  # a line ends at \n and nowhere else
    assert list(sources.find_corpus("x.txt", lines=True).documents()) == ["a", " b \u2028c\x0cd", "last"]


def test_a_folder_of_several_formats_is_read_in_the_order_of_its_names(work):
    Path("f/sub").mkdir(parents=True)
    jsonl("f/b.jsonl.gz", ["b0", "b1"])
    table("f/a.parquet", ["a0", "a1"])
    lines("f/c.txt.zst", ["c0", "c1"])
    table("f/sub/d.csv", ["d0"])
    Path("f/ignored.zip").write_bytes(b"PK")
    assert list(sources.find_corpus("f").documents()) == ["a0", "a1", "b0", "b1", "c0\nc1\n", "d0"]
    assert list(sources.find_corpus("f", lines=True).documents()) == ["a0", "a1", "b0", "b1", "c0", "c1", "d0"]
    assert list(sources.find_corpus("f/*.jsonl.*").documents()) == ["b0", "b1"]


def test_compressed_files_of_several_members_are_read_whole():
    """As pigz, bgzip and `cat a.gz b.gz` make them."""
    raw = [b'{"text": "a"}\n', b'{"text": "b"}\n{"te', b'xt": "c"}\n']
    for name in ("x.jsonl.gz", "x.jsonl.zst"):
        Path(name).write_bytes(b"".join(packed(name, part) for part in raw))
        assert list(sources.find_corpus(name).documents()) == ["a", "b", "c"]


def test_another_column_is_another_text():
    Path("x.jsonl").write_text('{"text": "a", "story": "once"}\n{"text": "b", "story": "upon"}\n')
    folders = [
        dataset.data_folder(section(corpus="x.jsonl", text_column=column, data_dir=None))
        for column in ("text", "story")
    ]
    assert folders[0] != folders[1]
    assert list(sources.find_corpus("x.jsonl", text_column="story").documents()) == ["once", "upon"]


# ---- token ids


def sides(folder):
    """The bytes of the two token files, each of which may lie in many."""
    return [
        b"".join(path.read_bytes() for path in sorted(Path(folder).glob(f"{split}*.bin"))) for split in ("train", "val")
    ]


@pytest.mark.parametrize(("at_once", "shard_tokens"), [(2**22, 10**8), (33_333, 10**8), (7001, 20_000)])
def test_token_ids_are_cut_as_nanogpt_cuts_a_text_and_copied(
    shakespeare, gpt2_files, monkeypatch, at_once, shard_tokens
):
    import tiktoken

    monkeypatch.setattr(readers, "IDS_AT_ONCE", at_once)
    text, gpt2 = shakespeare.read_text(encoding="utf-8"), tiktoken.get_encoding("gpt2")
    everything = gpt2.encode_ordinary(text)
    np.array(everything, np.uint16).tofile("x.bin")
    n = len(everything)
    train, val = everything[: int(n * 0.9)], everything[int(n * 0.9) :]
    ours, said = prepared(corpus="x.bin", tokenizer="gpt2", val_fraction=0.1, shard_tokens=shard_tokens)
    assert sides("out") == [np.array(part, "<u2").tobytes() for part in (train, val)]
    assert [ids(ours.train), ids(ours.val)] == [train, val] and ours.tokenizer.kind == "gpt2"
    held = ours.manifest
    assert (held["corpus"]["kind"], held["corpus"]["bytes"], held["split_seed"]) == ("ids", 2 * n, None)
    sizes = [len(gpt2.decode_bytes(part)) for part in (train, val)]
    assert [counts["bytes"] for counts in held["splits"].values()] == sizes and sum(sizes) == len(text.encode())
    assert [counts["documents"] for counts in held["splits"].values()] == [1, 1]
    assert f"{2 * n / 1e3:,.1f} kB of token ids in " in said[-1]


@pytest.mark.parametrize("at_once", [2**22, 100, 1])
def test_several_files_of_ids_are_one_sequence_in_the_order_of_their_names(monkeypatch, at_once):
    monkeypatch.setattr(readers, "IDS_AT_ONCE", at_once)
    texts = [text.replace("<|endoftext|>", "the end") for text in DOCS[:40]]
    char = dataset.Tokenizer.char(texts)
    Path("tok").mkdir()
    char.save("tok")
    everything = np.array(char_ids(texts, texts), np.uint16)
    Path("f").mkdir()
    borders = [0, 3, 4, 997, len(everything)]
    for i, (start, end) in enumerate(zip(borders, borders[1:], strict=False)):
        everything[start:end].tofile(f"f/{5 * i}.bin")  # 10 comes after 5
    for val_fraction in (0.2, (len(texts[-1]) + 0.5) / len(everything)):  # amid a document, and between two
        name = f"out {val_fraction}"
        ours, said = prepared(corpus="f/*.bin", tokenizer="tok", val_fraction=val_fraction, data_dir=name)
        cut = int(len(everything) * (1 - val_fraction))
        assert sides(name) == [everything[:cut].tobytes(), everything[cut:].tobytes()]
        assert "corpus=f/*.bin: 4 files to read" in said
        for part, counts in zip((everything[:cut], everything[cut:]), ours.manifest["splits"].values(), strict=True):
            pieces = char.decode(part).removesuffix("<|endoftext|>").split("<|endoftext|>")
            assert counts["documents"] == len(pieces)
            assert counts["bytes"] == sum(len(piece.encode()) for piece in pieces)
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
    """The folder of a tokenizer of 70,000 symbols, whose ids say nothing of the bytes of a text."""
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
    assert sides("out") == [everything[:2400].tobytes(), everything[2400:].tobytes()]
    ours = dataset.open_dataset(section(corpus="x.bin", tokenizer="tok"))
    assert ours.manifest["dtype"] == "uint32" and ours.text_bytes("train") is ours.text_bytes("val") is None
    assert "train: 2,400 tokens\nval: 600 tokens\n" in capsys.readouterr().out
    assert main(["data", "out"]) == 0
    assert "train: 2,400 tokens, 1 file\n" in capsys.readouterr().out


def test_told_to_stop_amid_ids_it_goes_on_and_reads_no_more_than_the_rest(gpt2_files, monkeypatch):
    monkeypatch.setattr(readers, "IDS_AT_ONCE", 100)
    everything = np.random.default_rng(0).integers(0, 50257, 5000).astype("<u2")
    for name, part in (("a.bin", everything[:1950]), ("b.bin", everything[1950:])):
        part.tofile(name)
    given = {"corpus": "?.bin", "tokenizer": "gpt2", "shard_tokens": 1000}
    prepared(**given, data_dir="straight")
    real, read, stops = readers._ids_at, [], [10, 35]

    def ids_at(spec, path, at, *rest):
        if stops and len(read) == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt
        read.append((path, at))
        return real(spec, path, at, *rest)

    monkeypatch.setattr(readers, "_ids_at", ids_at)
    for kept in (1, 1):  # a text without an end is one document
        said = []
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(section(**given), said.append)
        assert said[-1] == f"out: interrupted; {kept} document is kept, the same command goes on"
    _, said = prepared(**given)
    assert "out: going on where an earlier attempt stopped" in said
    assert read == [("a.bin", at) for at in range(0, 1950, 100)] + [("b.bin", at) for at in range(0, 3050, 100)]
    assert content("out") == content("straight")
    assert sides("out") == [everything[:4000].tobytes(), everything[4000:].tobytes()]


def test_killed_when_all_ids_were_written(gpt2_files, monkeypatch):
    np.arange(3000, dtype=np.uint16).tofile("x.bin")
    given = {"corpus": "x.bin", "tokenizer": "gpt2"}
    prepared(**given, data_dir="straight")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            token_files,
            "write_atomically",
            lambda path, text, real=token_files.write_atomically: (
                real(path, text) if "manifest" not in str(path) else (_ for _ in ()).throw(KeyboardInterrupt)
            ),
        )
        prepared(**given)
    assert json.loads(Path("out/.partial/progress.json").read_text())["position"] == "all"
    prepared(**given)
    assert content("out") == content("straight")


# ---- interruptions

CHILD = """
import json, os, signal, sys
from nanogpt_accel.data import encoding, prepare, token_files as tokens
from nanogpt_accel.recipe import SECTIONS
given, moves, prepare.COUNTED_BELOW, tokens.COMMIT_SECONDS = map(json.loads, sys.argv[1:])
encoding.CHUNK = 400
real = os.replace
def replace(source, target):
    global moves
    if os.path.basename(os.path.dirname(target)) == "out":  # a move to its place
        if moves == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        moves -= 1
    real(source, target)
os.replace = replace
prepare.prepare(SECTIONS["data"](**given), lambda line: print(line, flush=True), workers=2)
"""


def child(moves=-1, counted_below=2**28, commit_seconds=0, **given):
    """A process that prepares, commits all the time, and kills itself after so many of the final moves."""
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
    """Time of the last change; 0 where there is no such file."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def committed(folder):
    """Files that the last commit calls finished: {name: inode}."""
    try:
        files = json.loads(Path(folder, ".partial", "progress.json").read_text())["files"].values()
    except FileNotFoundError:
        return {}
    paths = [Path(folder, ".partial", file["name"]) for of_split in files for file in of_split[:-1]]
    return {path.name: path.stat().st_ino for path in paths if path.exists()}


def test_killed_at_random_moments_it_goes_on_and_ends_with_the_same_bytes():
    jsonl("x.jsonl", documents(3000))
    given = {"corpus": "x.jsonl", "shard_tokens": 5000}
    prepared(corpus="x.jsonl", shard_tokens=5000, data_dir="whole/out")  # with other chunks, for one thing
    process = child(**given, data_dir="straight/out")
    assert process.wait() == 0
    whole = content("straight/out")
    assert len(whole) > 12, "many shards"

    rng, kills, finished, progress = random.Random(), 0, {}, Path("out/.partial/progress.json")
    while True:
        stamp = stamp_of(progress)
        process = child(**given)
        until(lambda stamp=stamp: stamp_of(progress) not in (0, stamp), process)  # it has got on a bit
        time.sleep(rng.random() * 0.15 * 1.1**kills)  # a disk that others use gets longer and longer
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_it_keeps_what_is_written(number):
    jsonl("x.jsonl", documents(20_000))
    process = child(commit_seconds=10**9, corpus="x.jsonl")
    written = Path("out/.partial/train-00000.bin")
    until(lambda: written.exists() and written.stat().st_size > 50_000, process)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: -signal.SIGINT, signal.SIGTERM: 128 + signal.SIGTERM}[number]
    counts = json.loads(Path("out/.partial/progress.json").read_text())["counts"]
    kept = counts["train"]["documents"] + counts["val"]["documents"]
    assert f"out: interrupted; {kept:,} documents are kept, the same command goes on\n" in said and kept > 100
    _, lines = prepared(corpus="x.jsonl")
    assert "out: going on where an earlier attempt stopped" in lines
    prepared(corpus="x.jsonl", data_dir="straight")
    assert content("out") == content("straight")


def test_told_to_stop_before_anything_is_written(monkeypatch):
    jsonl("x.jsonl", DOCS)
    monkeypatch.setattr(prepare, "_make_tokenizer", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    said, before = [], signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(section(corpus="x.jsonl"), said.append)
    assert said == ["out: interrupted; nothing is kept"] and not Path("out").exists()
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
    line = prepared(corpus="x.jsonl")[1][-1]
    seconds = float(line.split(" in ")[1].split(" s ")[0])
    assert f"{size / 1e3:,.1f} kB of text, {(size - earlier) / 1e3:,.1f} kB of it now, in " in line
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
    marked.write_bytes(raw)  # what nobody would write: still there in the end if it was left alone
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
def test_killed_between_the_moves_where_the_hash_leaves_val_empty(monkeypatch, counted_below):
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
def test_other_facts_begin_anew(change):
    for name, texts in (("x.jsonl", documents(2000)), ("y.jsonl", documents(300, seed=6))):
        jsonl(name, texts)
    process = child(corpus="x.jsonl", shard_tokens=1000)
    until(lambda: len(committed("out")) >= 2)
    process.kill()
    process.wait()
    given = {"corpus": "x.jsonl", "shard_tokens": 1000} | change
    ours, said = prepared(**given)
    assert not any("going on" in line for line in said)
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
    assert "2 bad documents were left out" in said


def test_two_that_prepare_at_once():
    """The second waits for the lock, then finds the work done. The first is stopped, to be sure of the order."""
    jsonl("x.jsonl", documents(2000))
    first = child(corpus="x.jsonl")
    until(Path("out/.partial/progress.json").exists, first)
    first.send_signal(signal.SIGSTOP)
    second = child(corpus="x.jsonl")
    try:
        assert f"(process {first.pid} on {platform.node()}); waiting for it" in second.stdout.readline()
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


def test_one_that_waits_goes_on_where_the_other_was_killed():
    jsonl("x.jsonl", documents(2000))
    first = child(corpus="x.jsonl")
    until(Path("out/.partial/progress.json").exists, first)
    first.send_signal(signal.SIGSTOP)
    second = child(corpus="x.jsonl")
    assert "waiting for it" in second.stdout.readline()
    first.kill()
    first.wait()
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 0 and "going on where an earlier attempt stopped" in said
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


# ---- many shards


def test_many_shards_are_read_as_one_sequence():
    rng = np.random.default_rng(0)
    sizes = [1000, 1, 37, 0, 2500, 64, 700]
    parts = [rng.integers(0, 2**16, size).astype(np.uint16) for size in sizes]
    paths = [Path(f"train-{i:05d}.bin") for i in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        part.tofile(path)
    file, whole = token_files.TokenFile(paths, "uint16"), np.concatenate(parts)
    assert len(file) == len(whole) == sum(sizes)
    borders = np.cumsum(sizes)
    for length in (1, 2, 65, 1000, len(whole)):
        starts = rng.integers(0, len(whole) - length + 1, 200)
        near = (borders[:, None] + np.arange(-length, 2)).ravel()  # every row that touches a border
        starts = np.concatenate([starts, near[(near >= 0) & (near + length <= len(whole))]])
        assert np.array_equal(file.rows(starts, length), whole[starts[:, None] + np.arange(length)])
    for start, length in ((-1, 5), (len(whole) - 4, 5)):
        with pytest.raises(AssertionError):
            file.rows([start], length)


def sparse(folder, files, n_bytes):
    """Files of zeros that take no room on the disk."""
    folder.mkdir()
    paths = [folder / f"train-{i:05d}.bin" for i in range(files)]
    for path in paths:
        path.touch()
        os.truncate(path, n_bytes)
    return paths


def test_a_run_on_18_gb_starts_at_once(work):
    (path,) = sparse(work / "owt", 1, 18 * 10**9)
    assert path.stat().st_blocks < 1000, "the test itself takes no room"
    from nanogpt_accel.batches import Batches

    start = time.process_time()
    batches = Batches(token_files.TokenFile(path, "uint16"), 1024, 12, 40, seed=1)
    assert batches(0, 0).shape == (12, 1025) and len(batches.tokens) == 9 * 10**9
    assert time.process_time() - start < 0.5


@pytest.mark.slow
def test_memory_stays_flat_over_ten_thousand_batches(work):
    paths = sparse(work / "many", 20, 2 * 10**8)
    script = (
        "import resource, sys\n"
        "from nanogpt_accel.batches import Batches; from nanogpt_accel.data.token_files import TokenFile\n"
        "batches = Batches(TokenFile(sys.argv[1:], 'uint16'), 256, 4, 1, seed=1)\n"
        "peaks = []\n"
        "for step in range(10_100):\n"
        "    batches(step, 0)\n"
        "    if step in (100, 10_099):\n"
        "        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        "print(peaks[1] - peaks[0])\n"
    )  # of a process of its own: a peak never comes down
    done = subprocess.run([sys.executable, "-c", script, *paths], env=ENV, capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 4e6


# ---- bad input


def refusal(capsys, *words):
    """The one line that the command says, and that nothing is left which counts as done."""
    assert main(["prepare", "r.yaml", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert not is_data_folder("out") and not Path("out").exists()
    return line


def parquet(columns):
    pq.write_table(pa.table(columns), "t.parquet")
    return Path("t.parquet").read_bytes()


LONG = "".join(json.dumps({"text": text}) + "\n" for text in DOCS).encode()
BAD = [
    # the column is missing: those that are there are named
    ("x.jsonl", lambda: b'{"story": "a", "n": 1}\n', ["no column text", "story, n", "text_column"]),
    ("x.csv", lambda: b"story,n\na,1\n", ["no column text", "story, n", "text_column"]),
    ("x.tsv", lambda: b"story\tn\na\t1\n", ["no column text", "story, n", "text_column"]),
    ("x.csv", lambda: b"", ["no column text", "text_column"]),
    ("x.parquet", lambda: parquet({"story": ["a"], "n": [1]}), ["no column text", "story, n", "text_column"]),
    # a broken line: the file and its number
    ("x.jsonl", lambda: b'{"text": "a"}\n{"text": "b"\n', ["x.jsonl, line 2", "not JSON", "skip_bad_documents=true"]),
    ("x.jsonl.gz", lambda: gzip.compress(b'{"text": "a"}\n\n{"text": "b"\n'), ["x.jsonl.gz, line 3", "not JSON"]),
    ("x.jsonl", lambda: b'{"text": "a"}\n["b"]\n', ["x.jsonl, line 2", "no object with a text in text"]),
    ("x.jsonl", lambda: b'{"text": "a"}\n"text"\n', ["x.jsonl, line 2", "no object"]),
    ("x.jsonl", lambda: b'{"text": "a"}\n{"n": 1}\n', ["x.jsonl, line 2", "no object"]),
    ("x.jsonl", lambda: b'{"text": "a"}\n{"text": null}\n', ["x.jsonl, line 2", "no object"]),
    ("x.jsonl", lambda: b'{"text": 3}\n', ["x.jsonl, line 1", "no object with a text in text"]),
    ("x.csv", lambda: b"n,text\n1,a\n2\n", ["x.csv, line 3", "a row without text"]),
    # not UTF-8
    ("x.jsonl", lambda: b'{"text": "a"}\n{"text": "b\xff"}\n', ["x.jsonl, line 2", "not UTF-8", "byte 11"]),
    ("x.csv", lambda: b"text\na\nb\xff\n", ["x.csv", "line 3", "not UTF-8"]),
    # cut off on the way
    *[
        (
            f"x.jsonl{suffix}",
            lambda suffix=suffix, cut=cut: packed(suffix, LONG)[:cut],
            [f"x.jsonl{suffix}", f"not a whole {kind} file"],
        )
        for suffix, kind in ((".gz", "gzip"), (".zst", "zstd"))
        for cut in (1, 1000, -1)
    ],
    ("x.jsonl.gz", lambda: LONG, ["x.jsonl.gz", "not a whole gzip file"]),
    ("x.jsonl.zst", lambda: LONG, ["x.jsonl.zst", "not a whole zstd file"]),
    ("x.txt.gz", lambda: gzip.compress(LONG)[:-5], ["x.txt.gz", "not a whole gzip file"]),
    ("x.parquet", lambda: parquet({"text": DOCS})[:-1], ["x.parquet", "not a whole parquet file"]),
    ("x.parquet", lambda: parquet({"text": DOCS})[:1000], ["x.parquet", "not a whole parquet file"]),
    ("x.parquet", lambda: b"", ["x.parquet", "not a whole parquet file"]),
    ("x.parquet", lambda: LONG, ["x.parquet", "not a whole parquet file"]),
    # no text there
    ("x.parquet", lambda: parquet({"text": [1, 2]}), ["x.parquet", "text holds int64, not text", "text_column"]),
    ("x.parquet", lambda: parquet({"text": [["a"]]}), ["x.parquet", "text holds list<", "not text"]),
    ("x.parquet", lambda: parquet({"text": ["a", None, "b"]}), ["x.parquet, row 2", "nothing in text"]),
    ("x.parquet", lambda: parquet({"text": ["", ""]}), ["corpus=x.parquet", "no text in it"]),
    ("x.jsonl", lambda: b"\n\n", ["corpus=x.jsonl", "no text in it"]),
    ("x.csv", lambda: b"text\n", ["corpus=x.csv", "no text in it"]),
    ("x.jsonl.gz", lambda: b"", ["corpus=x.jsonl.gz", "no text in it"]),
    # one document cannot be two
    ("x.jsonl", lambda: b'{"text": "a"}\n{"text": ""}\n', ["corpus=x.jsonl", "one document cannot be both"]),
]


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [pytest.param(*row, id=f"{i}-{row[0]}-{row[2][1]}".replace("/", " ")) for i, row in enumerate(BAD)],
)
@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_one_line_for_bad_input(capsys, name, make, words, tokenizer):
    Path(name).write_bytes(make())
    line = refusal(capsys, f"corpus={name}", f"tokenizer={tokenizer}", "vocab_size=300")
    assert [word for word in words if word not in line] == [], line


def test_a_line_of_text_that_is_not_utf8(capsys):
    Path("x.txt").write_bytes(b"a\nb\xff\nc\n")
    line = refusal(capsys, "corpus=x.txt", "lines=true")
    assert "x.txt, line 2: not UTF-8 text at byte 1 of the line" in line


@pytest.mark.parametrize(
    "text",
    [r'"\ud83d x"', '"x", "n": ' + "9" * 5000, '"x", "n": ' + "[" * 200_000],
    ids=["half a surrogate pair", "a number of 5000 digits", "200,000 brackets"],
)
def test_json_that_python_stumbles_over(capsys, text):
    Path("x.jsonl").write_text(f'{{"text": "a"}}\n{{"text": {text}}}\n{{"text": "b"}}\n')
    assert "x.jsonl, line 2" in refusal(capsys, "corpus=x.jsonl")
    assert main(["prepare", "r.yaml", "corpus=x.jsonl", "skip_bad_documents=true"]) == 0


@pytest.mark.parametrize(
    ("name", "raw", "bad"),
    [
        (
            "x.jsonl",
            b'{"text": "a text"}\n{"text": 1}\n{"text": "b text"}\n{"te\n{"text": "\xff"}\n[]\n{"text": "c text"}\n'
            b'{"text": ""}\n{"text": "d text"}\n',
            4,
        ),
        ("x.txt", b"a text\nb text\n\xff\xff\n\nc text\nd\xe4\nd text", 2),
        ("x.csv", b'n,text\n1,a text\n2\n3,"b text"\n4,\n5,c text\n6\n7,d text\n', 2),
        ("x.parquet", {"text": ["a text", None, "b text", "", "c text", None, None, "d text"]}, 3),
    ],
)
@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_bad_documents_are_left_out_and_counted(capsys, name, raw, bad, tokenizer):
    Path(name).write_bytes(parquet(raw) if isinstance(raw, dict) else raw)
    words = [f"corpus={name}", "lines=true", f"tokenizer={tokenizer}", "vocab_size=300", "val_fraction=0.12"]
    assert all(dealt(GOOD, 0.12)), "no second try, which would say it all again"
    refusal(capsys, *words)
    assert main(["prepare", "r.yaml", *words, "skip_bad_documents=true"]) == 0
    out, err = capsys.readouterr()
    assert f"\n{bad} bad documents were left out\n" in out and err == ""
    assert out.count("left out: ") == min(bad, 3) and name in out
    ours = dataset.open_dataset(section(corpus=name, tokenizer=tokenizer, vocab_size=300, val_fraction=0.12))
    texts = [
        text for file in (ours.train, ours.val) for text in ours.tokenizer.decode(ids(file)).split("<|endoftext|>")[:-1]
    ]
    assert sorted(texts) == GOOD
    assert sum(counts["documents"] for counts in ours.manifest["splits"].values()) == len(GOOD)


@pytest.mark.parametrize("name", ["x.csv", "x.parquet"])
def test_a_row_that_is_not_utf8_is_left_out_too(name):
    if name == "x.csv":
        Path(name).write_bytes(b"text\na text\nb\xff\nc text\nd text\n")
    else:
        offsets, data = pa.array([0, 6, 8, 14], pa.int32()).buffers()[1], pa.py_buffer(b"a textb\xffc text")
        pq.write_table(pa.table({"text": pa.StringArray.from_buffers(3, offsets, data)}), name)
    assert main(["prepare", "r.yaml", f"corpus={name}", "skip_bad_documents=true"]) == 0


def test_a_csv_with_a_byte_order_mark():
    Path("x.csv").write_bytes("\ufefftext,n\r\na,1\r\nb,2\r\n".encode())
    assert list(sources.find_corpus("x.csv").documents()) == ["a", "b"]


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
    assert "data_dir=out" in done.stderr and "File too large" in done.stderr and "make room" in done.stderr
    assert not is_data_folder("out") and sorted(os.listdir("out")) == [".partial"]
    ours, said = prepared(corpus="x.jsonl")
    assert any("going on where an earlier attempt stopped" in line for line in said)
    texts = documents(3000)
    assert [ids(ours.train), ids(ours.val)] == [char_ids(texts, part) for part in dealt(texts)]


Usage = namedtuple("Usage", "total used free")


def test_too_little_room_is_said_before_anything_is_written(capsys, monkeypatch):
    lines("x.txt", documents(3000))
    size = os.path.getsize("x.txt")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2 * size, size, size))  # a char takes two bytes
    line = refusal(capsys, "corpus=x.txt", "lines=true")
    assert "data_dir=out" in line and "GB" in line and "limit_tokens" in line
    assert main(["prepare", "r.yaml", "corpus=x.txt", "lines=true", "limit_tokens=1000"]) == 0


def test_ids_need_as_much_room_as_they_take(gpt2_files, capsys, monkeypatch):
    np.arange(3000, dtype=np.uint16).tofile("x.bin")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(9000, 3001, 5999))
    line = refusal(capsys, "corpus=x.bin", "tokenizer=gpt2")
    assert "data_dir=out" in line and "another disk" in line and "limit_tokens" not in line
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(9000, 3000, 6000))
    assert main(["prepare", "r.yaml", "corpus=x.bin", "tokenizer=gpt2"]) == 0


def test_going_on_needs_room_for_the_rest_only(monkeypatch):
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
    assert not any("memory" in line for line in prepared(corpus="x.txt")[1])
    shutil.rmtree("out")
    monkeypatch.setattr(prepare, "LARGE_TEXT", 10_000)
    (line,) = [line for line in prepared(corpus="x.txt")[1] if "memory" in line]
    assert "corpus=x.txt" in line and "lines=true" in line
    shutil.rmtree("out")
    lines("x.txt", DOCS * 10)
    assert os.path.getsize("x.txt") > 10_000
    assert not any("memory" in line for line in prepared(corpus="x.txt", lines=True)[1])


# ---- a taste


def test_a_limit_of_documents_takes_the_first_ones():
    jsonl("x.jsonl", DOCS)
    ours, _ = prepared(corpus="x.jsonl", limit_documents=50)
    assert [ids(ours.train), ids(ours.val)] == [char_ids(DOCS[:50], part) for part in dealt(DOCS[:50])]
    one, other = (dataset.data_folder(section(corpus="x.jsonl", data_dir=None, limit_documents=n)) for n in (50, None))
    assert one != other


def reaching(texts, limit):
    """How many of the texts, each with its end, have so many tokens."""
    return next(n for n in range(1, len(texts) + 1) if sum(len(text) + 1 for text in texts[:n]) >= limit)


@pytest.mark.parametrize("limit", [3000, sum(len(text) + 1 for text in DOCS[:9])])
def test_a_limit_of_tokens_stops_at_the_end_of_the_document_that_reaches_it(monkeypatch, limit):
    jsonl("x.jsonl", DOCS)
    taken = reaching(DOCS, limit)
    for workers, chunk in ((1, 2**19), (2, 2**19), (2, 100), (1, 1)):
        monkeypatch.setattr(encoding, "CHUNK", chunk)
        ours, _ = prepared(workers, corpus="x.jsonl", limit_tokens=limit, data_dir=f"out {workers} {chunk}")
        assert [ids(ours.train), ids(ours.val)] == [char_ids(DOCS, part) for part in dealt(DOCS[:taken])]


@pytest.mark.parametrize("counted_below", [2**27, 0])
def test_a_limit_before_the_first_document_of_val(monkeypatch, counted_below):
    """The nearest one of those that are taken goes there, and none of those beyond."""
    monkeypatch.setattr(prepare, "COUNTED_BELOW", counted_below)
    jsonl("x.jsonl", DOCS)
    share = [int.from_bytes(hashlib.blake2b(f"2357 {i}".encode(), digest_size=8).digest(), "big") for i in range(200)]
    limit = sum(len(text) + 1 for text in DOCS[:5])
    nearest = min(range(5), key=share.__getitem__)
    for name, val_fraction in (("a", 1e-9), ("b", (min(share) + 1) / 2**64)):  # none at all, and one beyond the limit
        ours, _ = prepared(corpus="x.jsonl", limit_tokens=limit, val_fraction=val_fraction, data_dir=name)
        assert ids(ours.val) == char_ids(DOCS, [DOCS[nearest]])
        assert ids(ours.train) == char_ids(DOCS, DOCS[:nearest] + DOCS[nearest + 1 : 5])


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
    assert f"{limit}: corpus=x.txt is one text" in line and "lines=true" in line
    assert main(["prepare", "r.yaml", "corpus=x.txt", f"{limit}0", "lines=true"]) == 0


def test_limits_that_leave_one_document(capsys):
    jsonl("x.jsonl", DOCS)
    assert "limit_documents=1: must be 2 or more, for one document cannot be both" in refusal(
        capsys, "corpus=x.jsonl", "limit_documents=1"
    )
    assert "a limit_tokens above 1" in refusal(capsys, "corpus=x.jsonl", "limit_tokens=1")


# ---- what the user is told


def test_thirty_bad_documents_are_three_and_a_number():
    Path("x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCS) + "[]\n" * 30)
    _, said = prepared(corpus="x.jsonl", skip_bad_documents=True)
    at = next(i for i, line in enumerate(said) if "left out:" in line)
    assert [line.split(":")[0] for line in said[at : at + 3]] == ["left out"] * 3
    assert said[at + 3 : at + 5] == ["... and 27 more", "30 bad documents were left out"]


def test_every_table_is_looked_at_before_a_bpe_is_trained(capsys):
    Path("f").mkdir()
    jsonl("f/a.jsonl", DOCS)
    Path("f/b.csv").write_text("story\na\n")
    Path("f/ignored.zip").touch()
    assert main(["prepare", "r.yaml", "corpus=f", "tokenizer=bpe"]) == 2
    out, err = capsys.readouterr()
    assert err == "error: corpus=f: f/b.csv: no column text; there are story: give text_column\n"
    assert out == "corpus=f: 2 files to read; 1 left out (1 .zip)\n" and not Path("out").exists()
    Path("f/b.csv").unlink()
    assert main(["prepare", "r.yaml", "corpus=f", "tokenizer=bpe", "vocab_size=9000"]) == 0
    held = len(json.loads(Path("out/tokenizer.json").read_text())["model"]["vocab"]) + 1
    assert f"pairs for {held:,} symbols only, fewer than vocab_size=9000" in capsys.readouterr().out and held < 9000


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
    assert main(["data", "."]) == 2
    assert capsys.readouterr().err == "error: data_dir=.: no data folder itself; give one of those in it: out\n"


# ---- what is there and what is asked for


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tokenizer=bpe"], ["tokenizer=bpe vocab_size=4096", "prepared with tokenizer=char"]),
        (["corpus=y.jsonl"], ["corpus=y.jsonl", "prepared with corpus=x.jsonl"]),
        (["val_fraction=0.5"], ["val_fraction=0.5", "prepared with val_fraction=0.2"]),
        (["text_column=story"], ["text_column=story", "prepared with"]),
    ],
)
def test_a_folder_that_holds_something_else(capsys, words, expected):
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


# ---- documents stay documents


def corpus_of(monkeypatch, splits):
    """The recipe's corpus has these splits of its own: {split: documents}."""
    found = Corpus(
        "mine", {"kind": "hub", "name": "mine"}, False, lambda split, bad: iter(splits[split]), tuple(splits)
    )
    monkeypatch.setattr(dataset, "find_corpus", lambda spec, **options: found)


def test_an_end_of_text_follows_each_document_and_val_takes_whole_ones():
    jsonl("x.jsonl", DOCS)
    ours, _ = prepared(corpus="x.jsonl", val_fraction=0.1)
    for file, part in zip((ours.train, ours.val), dealt(DOCS, 0.1), strict=True):
        found = ids(file)
        assert found[-1] == ours.tokenizer.eot_id
        ends = [i for i, token in enumerate(found) if token == ours.tokenizer.eot_id]
        assert len(ends) == len(part) > 5
        starts = [0, *(end + 1 for end in ends)]
        texts = [ours.tokenizer.decode(found[start:end]) for start, end in zip(starts, ends, strict=False)]
        assert texts == part  # "<|endoftext|>" in a text is text: it has no id of its own


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


def test_an_article_begins_at_a_heading_of_the_first_level():
    """Rows of WikiText: ` = Title = `, ` = = Section = = `, empty ones and lines of text."""
    articles = [text for text in hub_datasets.GROUPED["articles"](iter(ROWS)) if text]
    assert articles == ["".join(ROWS[1:11]), "".join(ROWS[11:15]), "".join(ROWS[15:])]
    assert [text for text in hub_datasets.GROUPED["articles"](iter([])) if text] == []


def test_wikitexts_validation_split_is_sixty_articles(shared_data):
    rows = (shared_data / "wikitext2" / "valid.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    rows = ["" if row == " \n" else row for row in rows]  # as the Hub has an empty line
    articles = list(hub_datasets.GROUPED["articles"](iter(rows)))
    assert len([*filter(None, articles)]) == 60, "as its paper says"
    assert "".join(articles) == "".join(rows) and articles[1].startswith(" = Homarus gammarus = \n")


def test_sentences_are_put_together_in_pieces():
    rows = [f"sentence {i} ." for i in range(2500)]
    pieces = list(hub_datasets.GROUPED["sentences"](iter(rows)))
    assert [piece.count("\n") + 1 for piece in pieces] == [1024, 1024, 452]
    assert "\n".join(pieces).split("\n") == rows
