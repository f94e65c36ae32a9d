"""encoding.py: the ids are the same for any format, number of threads and chunk size."""

import os
from pathlib import Path

import numpy as np
import pytest
from data_files import DOCS, FORMATS, char_ids, content, dealt, ids, is_lines, jsonl, prepared

from nanogpt_accel.data import encoding


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """Run in an empty directory with a recipe that does not set the corpus."""
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


SLOW_NAMES = [pytest.param(name, marks=pytest.mark.slow) for name in ("x.jsonl.zst", "x.log.gz")]


@pytest.mark.parametrize("name", ["x.parquet", *SLOW_NAMES])
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


@pytest.mark.parametrize(("group", "threads"), [(1, 1), (3, 2), (100, 4)])
def test_the_ends_of_the_files_depend_only_on_the_chunks(monkeypatch, group, threads):
    """The hashes of a data set with several files must not change with the way in which the work is divided."""
    assert encoding.CHUNK == 2**19, "with another number, runs cannot resume on data that are prepared again"
    monkeypatch.setattr(encoding, "CHUNK", 700)
    monkeypatch.setattr(encoding, "GROUP", group)
    jsonl("x.jsonl", DOCS)
    ours, _ = prepared(threads, corpus="x.jsonl", shard_tokens=1000)
    val, sizes, in_chunk, last = dealt(DOCS)[1], {"train": [0], "val": [0]}, 0, None
    for text in DOCS:
        split = "val" if text in val else "train"
        if (split != last or not in_chunk) and sizes[split][-1] >= 1000:  # a run of documents starts
            sizes[split].append(0)
        sizes[split][-1] += len(text) + 1
        in_chunk, last = (in_chunk + len(text)) * (in_chunk + len(text) < 700), split
    files = {split: ours.manifest["splits"][split]["files"] for split in sizes}
    assert {split: [file["tokens"] for file in files[split]] for split in sizes} == sizes
    assert len(sizes["train"]) > 3


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


def test_an_end_of_text_follows_each_document_and_val_has_complete_documents():
    jsonl("x.jsonl", DOCS)
    ours, _ = prepared(corpus="x.jsonl", val_fraction=0.1)
    for file, part in zip((ours.train, ours.val), dealt(DOCS, 0.1), strict=True):
        found = ids(file)
        assert found[-1] == ours.tokenizer.eot_id
        ends = [i for i, token in enumerate(found) if token == ours.tokenizer.eot_id]
        assert len(ends) == len(part) > 5
        starts = [0, *(end + 1 for end in ends)]
        texts = [ours.tokenizer.decode(found[start:end]) for start, end in zip(starts, ends, strict=False)]
        assert texts == part  # "<|endoftext|>" in a text is plain text and not the end-of-text id
