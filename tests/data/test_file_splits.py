"""file_splits.py: which names of files and folders are splits, and which tokens end up in which split."""

import json
from pathlib import Path

import pytest
from data_files import char_ids, ids, jsonl, opened, packed, prepared, refusal, table

from nanogpt_accel.__main__ import main
from nanogpt_accel.data import dataset, encoding, prepare, token_files
from nanogpt_accel.data.dataset import corpus_of, facts_of
from nanogpt_accel.data.file_splits import PART_OF_WORD, SPLIT_OF, splits_by_name
from nanogpt_accel.data.sources import find_corpus
from nanogpt_accel.recipe import Data


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("data: {tokenizer: char, val_fraction: 0.1, data_dir: out}\n")
    return tmp_path


def write(files):
    """Write {path: text or rows}. A table has several rows."""
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            Path(name).write_text(content, newline="")
        else:
            (jsonl if ".jsonl" in name else table)(name, content)


BIG, SMALL = "".join(f"line {i}\n" for i in range(3000)), "".join(f"other {i}\n" for i in range(9))


def test_train_and_valid_are_the_files_of_that_name(capsys):
    """train.txt has 3,000 lines, and valid.txt has 9."""
    write({"d/train.txt": BIG, "d/valid.txt": SMALL})
    assert main(["prepare", "r.yaml", "corpus=d"]) == 0
    data = dataset.open_dataset(Data(data_dir="out"))
    assert [ids(data.train), ids(data.val)] == [char_ids([BIG, SMALL], [text]) for text in (BIG, SMALL)]
    out = capsys.readouterr().out
    assert "corpus=d: train is 1 file (train.txt)\ncorpus=d: val is 1 file (valid.txt)\n" in out
    for split, text in (("train", BIG), ("val", SMALL)):
        assert f"{split}: 1 file, {len(text) + 1:,} tokens, 1 document, " in out


SPLITS = {
    "case": {"Train.txt": "train", "VAL.TXT": "val"},
    "prefix": {"train_books.txt": "train", "train_web.txt": "train", "valid.txt": "val"},
    "wikitext": {"wiki.train.txt": "train", "wiki.valid.txt": "val", "wiki.test.txt": "test"},
    "tinystories": {"TinyStories-train.txt": "train", "TinyStoriesV2-GPT4-train.txt": "train", "X-valid.txt": "val"},
    "shards": {
        "data/train-00000-of-00002.parquet": "train",
        "data/train-00001-of-00002.parquet": "train",
        "data/validation-00000-of-00001.parquet": "val",
    },
    "folders": {
        "train/0.jsonl": "train",
        "train/test_flight.jsonl": "train",
        "dev/0.jsonl": "val",
        "test/0.jsonl": "test",
    },
    "a folder and a file": {"train/a.txt": "train", "train/b.txt": "train", "val.txt": "val"},
    "languages": {"en/train.txt": "train", "de/train.txt": "train", "en/dev.txt": "val", "de/dev.txt": "val"},
    "a folder called test": {"test/train.txt": "train", "test/val.txt": "val"},
    "formats": {"train.csv": "train", "validation.jsonl.gz": "val"},
    "with others": {"train.jsonl": "train", "dev.jsonl": "val", "README.md": None, "notes.txt": None},
    "only described": {"train_1.txt": "train", "valid.txt": "val", "README.md": None, "LICENSE.txt": None},
}


@pytest.mark.parametrize("files", SPLITS.values(), ids=SPLITS)
def test_names_that_people_use(files):
    for name, split in files.items():
        texts = [f"{name} {i} " + "so it goes " * 20 * (split == "train") for i in range(2)]
        write({f"d/{name}": texts[0] if Path(name).suffix.lower() in (".txt", ".md") else texts})
    corpus, found = find_corpus("d"), {}
    for split in corpus.own_splits():
        found |= {text.split()[0]: split for text in corpus.documents(split)}
    assert found == {name: split for name, split in files.items() if split}
    assert corpus.source["files"] == len(found) and not corpus.is_single
    left_out = [name for name, split in files.items() if not split]
    assert all(any(name in note and "skipping" in note for note in corpus.notes) for name in left_out)


@pytest.mark.parametrize(
    "names",
    [
        ["training_day.txt", "latest.txt", "contest.txt", "invalid.txt"],
        ["training_day.txt", "test_pilot.txt", "casablanca.txt"],
        ["test.txt", "a.txt"],
        ["valid.txt", "test.txt"],
        ["train.py", "test.py", "model.py"],
        ["the_train.txt", "the_test.txt", "a.txt", "b.txt", "c.txt", "d.txt", "e.txt"],
        ["train.md", "test.md"],
        ["train_test.txt", "dev_train.txt"],
    ],
)
def test_names_that_only_contain_such_words(names):
    assert splits_by_name(dict.fromkeys(names, 100)) == {}
    write({f"d/{name}": name for name in names})
    corpus = find_corpus("d")
    assert corpus.own_splits() == ("train",) and list(corpus.documents()) == sorted(names)
    assert "split_files" not in corpus.source
    assert all("are not used as splits" in note for note in corpus.notes)


def test_the_quick_search_finds_every_word():
    assert all(PART_OF_WORD.search(word) and PART_OF_WORD.search(word.upper()) for word in SPLIT_OF)


def test_names_that_are_not_used_are_reported_and_can_be_used():
    """The third file contains most of the text."""
    write({"d/train.txt": "some text " * 9, "d/val.txt": "val", "d/book.txt": BIG})
    (note,) = find_corpus("d").notes
    assert (
        note == "corpus=d: file names such as train.txt, val.txt are not used as splits; to use them, set split_by=name"
    )
    corpus = find_corpus("d", split_by="name")
    assert {split: list(corpus.documents(split)) for split in corpus.own_splits()} == {
        "train": ["some text " * 9],
        "val": ["val"],
    }
    assert any("skipping 1 file without a split in the name (book.txt)" in note for note in corpus.notes)


@pytest.mark.parametrize("spec", ["d/*.txt", "d/**", "d/t*/../*.txt", "{}/d/*.txt"])
def test_a_glob(work, spec):
    write({"d/train.txt": BIG, "d/val.txt": SMALL, "d/t/x.md": "x"})
    corpus = find_corpus(spec.format(work))
    assert [list(corpus.documents(split)) for split in corpus.own_splits()] == [[BIG], [SMALL]]


def test_folders_above_the_corpus_do_not_count():
    write({"train/dev/a.txt": "a", "train/dev/b.txt": "b", "val/c.txt": "c"})
    assert find_corpus("train/dev").own_splits() == find_corpus("train/dev/*.txt").own_splits() == ("train",)
    assert find_corpus("train/dev/a.txt").is_single


def test_links_count_by_their_own_name():
    write({"blobs/1": BIG, "blobs/2": SMALL})
    Path("d").mkdir()
    Path("d/train.txt").symlink_to("../blobs/1")
    Path("d/test.txt").symlink_to("../blobs/2")
    ours, _ = prepared(corpus="d")
    assert list(ours.splits) == ["train", "val", "test"]
    assert ids(ours.splits["test"]) == char_ids([BIG, SMALL], [SMALL])
    cut = int(len(BIG) * 0.8)
    assert [ids(ours.train), ids(ours.val)] == [char_ids([BIG, SMALL], [part]) for part in (BIG[:cut], BIG[cut:])]


def test_a_larger_validation_split_is_an_error_unless_it_is_asked_for(capsys):
    write({"d/train.txt": SMALL, "d/valid.txt": BIG})
    line = refusal(capsys, "corpus=d")
    assert "corpus=d: the validation files (" in line and "split_by=name" in line and "split_by=val_fraction" in line
    ours, _ = prepared(corpus="d", split_by="name", data_dir="named")
    assert [ids(ours.train), ids(ours.val)] == [char_ids([BIG, SMALL], [text]) for text in (SMALL, BIG)]
    ours, _ = prepared(corpus="d", split_by="val_fraction", data_dir="pool")
    text = SMALL + BIG
    cut = int(len(text) * 0.8)
    assert ours.tokenizer.decode(ids(ours.val)) == text[cut:] + "<|endoftext|>"


def test_a_larger_validation_split_in_tokens(capsys):
    """A table of equal size may contain less text."""
    Path("d").mkdir()
    Path("d/train.jsonl").write_text(json.dumps({"text": "a", "more": "b" * 1000}) + "\n")
    Path("d/val.jsonl").write_text(json.dumps({"text": "a" * 500}) + "\n")
    line = refusal(capsys, "corpus=d")
    assert "the validation files (501 tokens) are larger than the training files (2 tokens)" in line


def test_split_by_name_needs_names(capsys):
    write({"d/a.txt": "a", "d/b.txt": "b"})
    assert "split_by=name: the names of the files in corpus=d do not" in refusal(capsys, "corpus=d", "split_by=name")


def test_the_identity_changes_only_if_the_names_count():
    write({"d/train.txt": BIG, "d/valid.txt": SMALL, "e/a.txt": BIG, "e/b.txt": SMALL})
    sources = [find_corpus(spec, split_by=by).source for spec in "de" for by in ("auto", "val_fraction")]
    assert sources[0] != sources[1] and sources[2] == sources[3] and set(sources[1]) == set(sources[2])
    write({"d/README.md": "about"})
    assert find_corpus("d").source == sources[0], "a file that is left out does not change the data"


# ---- without names


def tail(texts, val_fraction):
    """Return [train, val] as documented: val is the end of the text; it starts between documents if one ends nearby."""
    text = "".join(texts)
    cut = int(len(text) * (1 - val_fraction))
    ends = [sum(map(len, texts[: i + 1])) for i in range(len(texts))]
    nearest = min(ends, key=lambda end: abs(end - cut))
    if abs(nearest - cut) * 4 <= min(cut, len(text) - cut):
        cut = nearest
    parts, start = ([], []), 0
    for document in texts:
        for side, part in zip(parts, (document[: max(cut - start, 0)], document[max(cut - start, 0) :]), strict=True):
            side.extend([part] * bool(part))
        start += len(document)
    return parts


@pytest.mark.parametrize(
    ("texts", "val_fraction"),
    [
        ([BIG, SMALL], 0.1),
        ([SMALL, BIG], 0.1),
        ([SMALL, BIG, SMALL, SMALL], 0.0005),
        (["b" * 900, "a" * 100], 0.1),  # exactly between two documents
        (["one document of several words"], 0.3),
        ([f"{i} equal documents" for i in range(6)], 0.2),
        ([BIG] + ["short"] * 40, 0.2),  # many documents, but one of them is nearly all of the text
        (["short"] * 5 + [BIG] + ["x"] * 30, 0.2),
    ],
)
def test_val_fraction_is_a_share_of_the_text(monkeypatch, texts, val_fraction):
    jsonl("x.jsonl", texts)
    Path("d").mkdir()
    for i, text in enumerate(texts):
        Path(f"d/{i:02}.txt").write_text(text)
    train, val = tail(texts, val_fraction)
    share = sum(map(len, val)) / sum(map(len, texts))
    assert abs(share - val_fraction) <= val_fraction / 4 + 1e-4
    for corpus, counted_below in (("x.jsonl", 2**27), ("d", 0))[
        : len(texts)
    ]:  # a single file gets no end-of-text token
        monkeypatch.setattr(prepare, "COUNTED_BELOW", counted_below)
        ours, said = prepared(corpus=corpus, val_fraction=val_fraction, data_dir=f"out-{corpus}")
        assert [ids(ours.train), ids(ours.val)] == [char_ids(texts, train), char_ids(texts, val)]
        assert f"corpus={corpus}: val is the end of the text (val_fraction={val_fraction})" in said


@pytest.mark.parametrize("texts", [[BIG, SMALL], [SMALL] * 28 + [BIG, SMALL], ["all in train"] * 25])
def test_a_large_table_is_written_again_if_a_split_is_empty_or_val_is_larger(monkeypatch, texts):
    monkeypatch.setattr(prepare, "COUNTED_BELOW", 0)
    assert [number for number in range(30) if prepare._draw(number) < 0.03] == [28]
    jsonl("x.jsonl", texts)
    ours, _ = prepared(corpus="x.jsonl", val_fraction=0.03)
    assert [ids(ours.train), ids(ours.val)] == [char_ids(texts, part) for part in tail(texts, 0.03)]


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".csv", ".parquet"])
def test_a_handful_of_files_in_every_format(suffix):
    texts = [BIG, SMALL, "third " * 50]
    Path("d").mkdir()
    for name, text in zip("abc", texts, strict=True):
        path = f"d/{name}{suffix}"
        if ".txt" in suffix:
            Path(path).write_bytes(packed(path, text.encode()))
        else:
            table(path, [text])
    ours = opened(Data(corpus="d", tokenizer="char", val_fraction=0.05))
    assert [ids(ours.train), ids(ours.val)] == [char_ids(texts, part) for part in tail(texts, 0.05)]


def test_a_cut_with_a_limit_is_in_the_documents_within_the_limit():
    texts = [BIG, SMALL, SMALL]
    jsonl("x.jsonl", texts)
    ours, _ = prepared(corpus="x.jsonl", limit_documents=2, data_dir="documents")
    both = [char_ids(texts, part) for part in tail(texts[:2], 0.2)]
    assert [ids(ours.train), ids(ours.val)] == both
    ours, _ = prepared(corpus="x.jsonl", limit_tokens=len(BIG) + 10, data_dir="tokens")
    assert [ids(ours.train), ids(ours.val)] == both


def test_an_interrupted_cut_is_resumed(monkeypatch):
    texts = [f"{i}: " + "so it goes. " * (200 if i == 3 else 1) for i in range(12)]
    jsonl("x.jsonl", texts)
    monkeypatch.setattr(encoding, "CHUNK", 10)
    monkeypatch.setattr(token_files, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(prepare, "COUNTED_BELOW", 0)
    real, calls = token_files.Writer.write, iter(range(1000))

    def stop(self, *args):
        if next(calls) in (6, 18, 24):  # in the first attempt and in the second
            raise KeyboardInterrupt
        real(self, *args)

    monkeypatch.setattr(token_files.Writer, "write", stop)
    stops = 0
    while not dataset.is_prepared(Data(data_dir="out")):
        try:
            prepared(corpus="x.jsonl")
        except KeyboardInterrupt:
            stops += 1
    ours = dataset.open_dataset(Data(data_dir="out"))
    assert stops == 3
    assert [ids(ours.train), ids(ours.val)] == [char_ids(texts, part) for part in tail(texts, 0.2)]


def test_data_that_an_earlier_version_started_are_completed():
    """The position that an earlier version saved has other keys: no cut, but `forced`, the document for an otherwise
    empty val."""
    data = Data(corpus="x.jsonl", tokenizer="char", val_fraction=0.2, data_dir="out")
    texts = [f"text {i}" for i in range(100)]
    jsonl("x.jsonl", texts)
    straight, _ = prepared(corpus="x.jsonl", data_dir="straight")
    tokenizer = straight.tokenizer
    facts = facts_of(data, corpus_of(data)) | {"fingerprint": tokenizer.fingerprint}
    with pytest.raises(KeyboardInterrupt), token_files.Writer("out", tokenizer.dtype, facts) as writer:
        for number, text in enumerate(texts[:30]):
            split = "val" if prepare._draw(number) < 0.2 else "train"
            writer.write(split, [*tokenizer.encode(text), tokenizer.eot_id], len(text))
        writer.commit({"split": 0, "documents": 30, "bad": 0, "draws": {"val": [0, 1], "train": [1, 2]}, "forced": []})
        raise KeyboardInterrupt
    ours, said = prepared(corpus="x.jsonl")
    assert "out: resuming an interrupted preparation" in said
    assert [ids(ours.train), ids(ours.val)] == [ids(straight.train), ids(straight.val)]


def test_data_of_an_earlier_version_are_used_with_a_warning(capsys):
    """The earlier version also selected the documents of val at random if there were few, so val could be nearly all of
    the text."""
    write({"d/a.txt": BIG, "d/b.txt": SMALL})
    data = Data(corpus="d", tokenizer="char", val_fraction=0.1, data_dir="out")
    tokenizer = opened(Data(corpus="d", tokenizer="char", data_dir="other")).tokenizer
    facts = facts_of(data, corpus_of(data))
    with token_files.Writer("out", tokenizer.dtype, facts) as writer:
        for split, text in (("train", SMALL), ("val", BIG)):
            writer.write(split, tokenizer.encode(text), len(text))
        made = {key: getattr(tokenizer, key) for key in ("kind", "vocab_size", "fingerprint", "eot_id")}
        writer.finish(facts | {"tokenizer": facts["tokenizer"] | made}, tokenizer.save)
    assert main(["prepare", "r.yaml", "corpus=d"]) == 0
    out = capsys.readouterr().out
    assert "out: already prepared" in out and f"val: {len(BIG):,} tokens" in out
    assert "warning: out: val is larger than train, but val_fraction is 0.1; " in out
