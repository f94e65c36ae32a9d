"""parts.py and prepare_parts: several workers write the same bytes as one process."""

import dataclasses
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_files import DOCS, ENV, content, documents, error_line, expect, jsonl, lines, prepared, section, table

from nanogpt_accel.__main__ import main
from nanogpt_accel.commands import prepare as command
from nanogpt_accel.data import dataset, encoding, local_files, parts, prepare, token_files
from nanogpt_accel.data.corpus import Corpus
from nanogpt_accel.data.manifest import read_manifest
from nanogpt_accel.data.prepare import prepare_parts


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """Run in an empty folder. Chunks are short, no worker waits for other workers, and files are not flushed to
    disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # flushing takes most of the time
    monkeypatch.setattr(encoding, "CHUNK", 300)
    monkeypatch.setattr(prepare, "FOLDER_CACHE_S", -1)
    Path("r.yaml").write_text("data: {tokenizer: char, val_fraction: 0.2, corpus: c, data_dir: out}\n")


def corpus(names=tuple("0123456"), write=jsonl, texts=DOCS, suffix=".jsonl"):
    """Write a folder of files with the same number of documents, except for the last file."""
    Path("c").mkdir()
    count = len(texts) // len(names)
    for number, name in enumerate(names):
        stop = (number + 1) * count if number + 1 < len(names) else None
        Path("c", name).parent.mkdir(exist_ok=True)
        write(f"c/{name}{suffix}", texts[number * count : stop])


def one_by_one(texts):
    """Write each text to its own file."""
    Path("c").mkdir()
    for number, text in enumerate(texts):
        Path(f"c/{number:04d}.txt").write_bytes(text.encode())


def work_as(data, order, workers=3, report=lambda line: None):
    """Run the workers one after the other. The last one must join the parts."""
    *others, last = [prepare_parts(data, worker, workers, report) for worker in order]
    assert last and not any(others)
    prepare.prepare(data, report)


CORPORA = {
    "jsonl": corpus,
    "csv": functools.partial(corpus, write=table, suffix=".csv"),
    "lines": functools.partial(corpus, write=lines, suffix=".txt"),
    "own splits": functools.partial(corpus, ("train/1", "train/2", "train/3", "valid/1", "test/1")),
    "a document per file": functools.partial(one_by_one, DOCS[:40]),
    "bad rows": functools.partial(corpus, texts=[None, *DOCS[:60], 7, *DOCS[60:], 8]),
    "empty files": functools.partial(corpus, tuple("0123456789"), texts=DOCS[:20] + [""] * 80),
}


BPE = {"tokenizer": "bpe", "vocab_size": 300, "special_tokens": "tokens"}


@pytest.mark.parametrize(
    ("name", "order", "options"),
    [*((name, (0, 1, 2), {}) for name in CORPORA), ("jsonl", (1, 2, 0), BPE), ("own splits", (2, 1, 0), BPE)],
)
def test_three_workers_write_the_same_bytes_as_one(name, order, options):
    CORPORA[name]()
    given = {"corpus": "c", "shard_tokens": 1000, "lines": name == "lines", "skip_bad_documents": name == "bad rows"}
    prepared(**given, **options, data_dir="one")
    work_as(section(**given, **options), order)
    assert content("out") == content("one")
    assert len(content("one")) > 8 or name in ("empty files", "a document per file")


def test_small_files_are_grouped(monkeypatch):
    one_by_one(DOCS[:60])
    monkeypatch.setattr(local_files, "MOST_PARTS", 10)
    prepared(corpus="c", data_dir="one")
    data = section(corpus="c")
    assert not prepare_parts(data, 0, 2)
    written = sorted(path.stem for path in Path("out/.token_parts").glob("*/*.npy"))
    assert written[:2] == ["train-00000", "train-00002"] and 3 <= len(written) <= 5
    work_as(data, (0, 1), workers=2)
    assert content("out") == content("one")


def test_more_workers_than_parts_and_another_number_of_workers(monkeypatch):
    corpus()
    prepared(corpus="c", data_dir="one")
    data = section(corpus="c")
    assert not prepare_parts(data, 1, 3)  # parts 1 and 4
    work_as(data, (0, 8, 2, 3, 5, 6), workers=9)
    assert content("out") == content("one")
    before = {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    assert prepare_parts(data, 2, 3), "the folder is complete"
    assert before == {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}


def test_a_bpe_is_trained_once(monkeypatch):
    corpus()
    made = []
    real = prepare._make_tokenizer
    monkeypatch.setattr(prepare, "_make_tokenizer", lambda *args: made.append(1) or real(*args))
    work_as(section(corpus="c", tokenizer="bpe", vocab_size=300), (1, 2, 0))
    assert made == [1]


def test_all_workers_read_the_same_commit_of_a_hub_dataset(monkeypatch):
    commits = iter("ab")
    source = {"kind": "hub", "name": "mine"}

    def pin(commit):
        return dataclasses.replace(found, source=source | {"commit": commit or next(commits)})

    def read_parts(split):
        return [lambda bad, start=start: iter(DOCS[start : start + 60]) for start in range(0, 200, 60)]

    found = Corpus("mine", source, False, lambda split, bad: iter(DOCS), parts=read_parts, pin=pin)
    monkeypatch.setattr(dataset, "find_corpus", lambda spec, **options: found)
    data = section(corpus="mine")
    work_as(data, (1, 2, 0))
    assert json.loads(Path("out/manifest.json").read_text())["corpus"]["commit"] == "a"
    assert next(commits) == "b"
    commits = iter("a")
    prepared(corpus="mine", data_dir="one")
    assert content("out") == content("one")


# ---- interruptions


class Stop(BaseException):
    """Raised to interrupt a worker, as if its process had been killed."""


def fail_at(monkeypatch, place, name, count, error):
    """Let the call number `count` of a function or method raise an error."""
    real, calls = getattr(place, name), iter(range(1, count))

    def failing(*args):
        if next(calls, None) is None:
            raise error
        return real(*args)

    monkeypatch.setattr(place, name, failing)


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_a_worker_that_is_killed_keeps_its_parts(monkeypatch, error):
    corpus()
    prepared(corpus="c", data_dir="one")
    data, said = section(corpus="c"), []
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(encoding, "GROUP", 1)  # one call of _encode per chunk
        fail_at(patch, encoding, "_encode", 9, error)  # in the third part
        prepare_parts(data, 0, 2, said.append, threads=1)
    kept = {path: path.stat().st_ino for path in Path("out").rglob("train-*")}
    assert [path.name for path in sorted(kept)][:2] == ["train-00000.ids", "train-00000.npy"]
    line = f"worker 0: interrupted; {len(kept) // 2} of 4 parts kept; run the same command to resume"
    assert (said[-1] == line) == (error is KeyboardInterrupt)
    assert not prepare_parts(data, 0, 2)
    assert {path: path.stat().st_ino for path in kept} == kept
    work_as(data, (1,), workers=2)
    assert content("out") == content("one")


def test_a_worker_that_is_killed_while_it_joins_the_parts(monkeypatch):
    corpus()
    monkeypatch.setattr(token_files, "COMMIT_SECONDS", 0)
    prepared(corpus="c", data_dir="one", shard_tokens=1000)
    data, said = section(corpus="c", shard_tokens=1000), []
    with monkeypatch.context() as patch, pytest.raises(Stop):
        fail_at(patch, token_files.Writer, "commit", 20, Stop)
        work_as(data, (2, 1, 0))
    work_as(data, (1,), report=said.append)
    assert "out: resuming an interrupted preparation" in said and content("out") == content("one")


def test_a_split_that_must_be_cut_after_all(monkeypatch):
    """If the hash leaves val empty, the last worker tokenizes the text again."""
    corpus(texts=DOCS[:30])
    monkeypatch.setattr(prepare, "COUNTED_BELOW", 0)
    prepared(corpus="c", data_dir="one", val_fraction=0.001)
    work_as(section(corpus="c", val_fraction=0.001), (0, 1, 2))
    assert content("out") == content("one")


@pytest.mark.parametrize("place", ["_check_resources", "_open_tokenizer", "tokenize"])
def test_a_folder_that_another_process_completes_in_the_meantime(monkeypatch, place):
    corpus()
    prepared(corpus="c", data_dir="one")
    real = getattr(prepare, place)

    def after_another(*args, **options):
        monkeypatch.setattr(prepare, place, real)
        prepared(corpus="c")
        return real(*args, **options)

    monkeypatch.setattr(prepare, place, after_another)
    assert prepare_parts(section(corpus="c"), 1, 3)
    prepared(corpus="c")
    assert content("out") == content("one")


# ---- workers that do not come, or come twice


def test_missing_workers_are_named(monkeypatch):
    corpus()
    data, said = section(corpus="c"), []
    monkeypatch.setattr(prepare, "FOLDER_CACHE_S", 0)
    assert not prepare_parts(data, 0, 3, said.append)
    assert said[-2].startswith("worker 0: tokenized 3 parts, ")
    with pytest.raises(FileNotFoundError, match="its preparation was interrupted or is still running"):
        read_manifest("out")
    others = "worker 1 (2 parts, not running), worker 2 (2 parts, {})"
    assert f"waited 0 s for {others.format('not running')}; the last worker to finish completes" in said[-1]
    with parts.Parts("out", *facts_of(data)).lock(2, 3):
        prepare_parts(data, 0, 3, said.append)
        process = f"process {os.getpid()} on {platform.node()}"
        expect(said[-1], others.format(process))
        with pytest.raises(ValueError, match=f"worker=2: {process} is already running as this worker"):
            prepare_parts(data, 2, 3)


def facts_of(data):
    found = prepare.corpus_of(data)
    return found, prepare.facts_of(data, found)


def test_workers_wait_for_the_one_that_makes_the_tokenizer(monkeypatch):
    corpus()
    said, seconds = [], []
    Path("out").mkdir()
    lock = token_files.lock_subfolder("out", ".token_parts")[1]
    monkeypatch.setattr(time, "sleep", lambda s: seconds.append(s) or (len(seconds) == 5 and lock.release()))
    prepare_parts(section(corpus="c"), 0, 3, said.append)
    assert len(seconds) == 5
    waiting = f"data_dir=out: process {os.getpid()} on {platform.node()} is preparing this folder; waiting"
    assert said.count(waiting) == 1


# ---- corpora that are not divided


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"corpus": "c/0.jsonl"}, "corpus=c/0.jsonl does not consist of several files"),
        ({"corpus": "x.txt"}, "corpus=x.txt is a single text"),
        ({"corpus": "x.npy", "tokenizer": "gpt2"}, "corpus=x.npy contains token ids, which are not copied"),
        ({"corpus": "python"}, "corpus=python does not consist of several files"),
        ({"limit_documents": 50}, "limit_documents is set"),
        ({"limit_tokens": 500}, "limit_tokens is set"),
        ({"val_fraction": 0.001}, "val is the end of the text"),
    ],
)
def test_worker_0_prepares_what_cannot_be_divided(given, reason):
    import numpy as np

    corpus()
    Path("x.txt").write_text("so it goes. " * 100)
    np.save("x.npy", np.zeros(1000, "<u2"))
    data, said = section(**{"corpus": "c"} | given), []
    assert [prepare_parts(data, worker, 3, said.append) for worker in (0, 1, 2)] == [True, False, False]
    assert said == [f"out: worker 0 prepares this folder alone, because {reason}"] * 3
    assert not Path("out").exists()


# ---- errors


def test_a_part_that_was_changed(refused):
    corpus()
    data = section(corpus="c")
    for worker in (0, 1, 2):
        prepare_parts(data, worker, 3)
    path = next(Path("out").rglob("train-00003.ids"))
    os.truncate(path, 10)
    with refused(ValueError, f"{path}: was changed; delete {path.parent}"):
        prepare.prepare(data)
    shutil.rmtree(path.parent)
    work_as(data, (0, 1, 2))


def test_a_split_without_text_is_the_same_error(refused):
    corpus(("train/1", "train/2", "valid/1"), texts=DOCS[:40] + [""] * 20)
    for attempt in (prepared, lambda **given: work_as(section(**given), (0, 1, 2))):
        with refused(ValueError, "corpus=c: the val split contains no text"):
            attempt(corpus="c")


@pytest.mark.skipif(os.name == "nt", reason="links require a privilege")
def test_a_link_is_neither_written_nor_deleted(refused):
    corpus()
    Path("elsewhere/abc").mkdir(parents=True)
    Path("elsewhere/abc/facts.json").write_text("{}")
    Path("out").mkdir()
    Path("out/.token_parts").symlink_to("../elsewhere")
    with refused(ValueError, "out/.token_parts: is a link"):
        prepare_parts(section(corpus="c"), 0, 3)
    prepared(corpus="c")
    assert list(content("elsewhere")) == ["abc/facts.json"]


def test_a_bad_document_stops_its_worker_only(refused, monkeypatch):
    corpus(texts=[*DOCS[:50], None, *DOCS[50:]])
    prepared(corpus="c", skip_bad_documents=True, data_dir="made")
    monkeypatch.setattr(prepare, "COUNTED_BELOW", 0)
    data = section(corpus="c", tokenizer="made")
    assert not prepare_parts(data, 0, 3) and not prepare_parts(data, 2, 3)
    with refused(ValueError, "corpus=c: c/1.jsonl, line 23", "skip_bad_documents=true"):
        prepare_parts(data, 1, 3)
    assert len([*Path("out").glob(".token_parts/*/*.npy")]) == 5 and not [*Path("out").rglob("*.tmp*")]


# ---- the command

MIX = "mix=[{corpus: c, weight: 1}, {corpus: d, weight: 1}]"


def test_the_command_divides_the_work(capsys):
    corpus()
    prepared(corpus="c", data_dir="one")
    outputs = []
    for worker in (0, 2, 1):
        assert main(["prepare", "r.yaml", f"worker={worker}", "workers=3"]) == 0
        outputs.append(capsys.readouterr().out)
    assert ["\ntokenizer: char, vocabulary size " in text for text in outputs] == [False, False, True]
    assert content("out") == content("one")
    assert main(["prepare", "r.yaml", "worker=1", "workers=3"]) == 0
    assert capsys.readouterr().out.startswith("out: already prepared\n")


@pytest.mark.parametrize(
    ("words", "ranks", "expected"),
    [
        (["worker=3", "workers=3"], 1, "worker=3: must be below workers=3"),
        (["worker=1"], 1, "worker=1: must be below workers=1"),
        (["workers=0"], 1, "workers=0: must be greater than or equal to 1"),
        (["workers=2"], 2, "workers=2: not supported with accelerate launch or torchrun"),
        (["workers=2", MIX], 1, "workers=2: not supported for several sources with tokenizer=char"),
    ],
)
def test_each_mistake_is_one_line(capsys, monkeypatch, words, ranks, expected):
    corpus()
    shutil.copytree("c", "d")
    Path("r.yaml").write_text("data: {tokenizer: char}\n")
    monkeypatch.setattr(command, "world_size", lambda: ranks)
    expect(error_line(capsys, *words), expected)


def test_each_source_of_a_mix_is_divided(monkeypatch):
    corpus()
    shutil.copytree("c", "d")
    made = prepared(corpus="c", data_dir="made")[0].folder
    Path("r.yaml").write_text(f"data: {{tokenizer: {made}, val_fraction: 0.2}}\n")
    for folder, workers in (("one", [[]]), ("two", [["worker=1", "workers=2"], ["worker=0", "workers=2"]])):
        Path(folder).mkdir()
        sources = [f"{{corpus: {name}, weight: 1, data_dir: {folder}/{name}}}" for name in ("c", "d")]
        for words in workers:
            assert main(["prepare", "r.yaml", f"mix=[{', '.join(sources)}]", *words]) == 0
    assert content("one") == content("two") and "d/train.bin" in content("two")


# ---- real processes


CHILD = """
import sys, time
from nanogpt_accel.data import encoding
from nanogpt_accel.__main__ import main
encoding.CHUNK = 300
if "slow" in sys.argv:
    real = encoding._encode
    encoding._encode = lambda *args: time.sleep(0.01) or real(*args)
sys.exit(main(["prepare", "r.yaml", "shard_tokens=5000", *sys.argv[1:3]]))
"""


def child(worker, *words):
    command = [sys.executable, "-c", CHILD, f"worker={worker}", "workers=3", *words]
    return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_three_processes_of_which_one_is_killed_and_started_again():
    corpus(tuple(f"{number:02}" for number in range(30)), texts=documents(6000))
    prepared(corpus="c", shard_tokens=5000, data_dir="one")
    killed, *others = child(1, "slow"), child(0), child(2)
    end = time.monotonic() + 60
    while not any(Path("out").glob(".token_parts/*/train-00004.npy")):
        assert time.monotonic() < end and killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    kept = {path: path.stat().st_ino for path in Path("out").glob(".token_parts/*/*.npy")}
    assert not any(Path("out").glob(".token_parts/*/train-00028.npy")), "killed before its last part"
    again = child(1)
    said = [process.communicate(timeout=120)[0] for process in (*others, again)]
    assert [process.returncode for process in (*others, again)] == [0, 0, 0], "\n".join(said)
    assert json.loads(Path("out/manifest.json").read_text())["splits"]["train"]["tokens"] > 100_000
    assert sum("B/s)" in text for text in said) == 1, "one of them joins the parts"
    assert "worker 1: tokenized 10 parts" not in said[2] and kept
    assert content("out") == content("one") and len(content("out")) > 20
