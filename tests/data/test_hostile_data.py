"""What hostile or damaged data end in: exit status 2 and one line that names the key, the file and the remedy."""

import csv
import gzip
import json
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanogpt_accel.__main__ import main
from nanogpt_accel.data import dataset, prepare, readers, token_files
from nanogpt_accel.data import manifest as manifests
from nanogpt_accel.data.sources import find_corpus
from nanogpt_accel.recipe import SECTIONS

TEXTS = [f"{i} bottles of beer on the wall" for i in range(60)]
MODEL = "{n_layer: 1, n_head: 1, n_embd: 8, block_size: 8}"


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(
        f"data: {{corpus: x.jsonl, tokenizer: char, val_fraction: 0.2, data_dir: out}}\nmodel: {MODEL}\n"
        "optimizer: {warmup_iters: 0}\ntrain: {max_iters: 1, eval_iters: 1, device: cpu}\nout_dir: run\n"
    )
    Path("x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return tmp_path


def refused(capsys, *words, command="prepare", target="r.yaml"):
    """The one line that the command ends in."""
    capsys.readouterr()
    assert main([command, target, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def expect(line, *words):
    assert [word for word in words if word not in line] == [], line


def prepared(capsys, *words):
    """The documents that prepare finds, as a set: which split takes one is another test's matter."""
    assert main(["prepare", "r.yaml", *words]) == 0
    found = dataset.open_dataset(SECTIONS["data"](data_dir="out"))
    ids = np.concatenate([file.rows([0], len(file))[0] for file in found.splits.values()])
    return set(found.tokenizer.decode(ids).split("<|endoftext|>")[:-1])


def texts(path, **options):
    return list(find_corpus(str(path), **options).documents())


# ---- tables


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"n,text\n1,a\n2,b, c\n3,d\n", ["line 3", "3 values", "2 columns", "skip_bad_documents"]),
        (b"text\na\nb, c\n", ["line 3", "2 values", "1 column "]),
        (b'n,text\n1,a\n2,"b\n3,c\n4,d\n', ["line 3", "not CSV", "quote", "skip_bad_documents"]),
        (b'n,text\n1,a\n2,"b"c\n3,d\n', ["line 3", "not CSV"]),
        (b"text,text\na,b\n", ["2 columns are named text", "rename", "text_column"]),
        (b"", ["line 1", "empty", "no column text", "text_column"]),
        (b"\ntext\na\n", ["line 1", "empty", "text_column"]),
        (b"\xef\xbb\xbf", ["line 1", "empty", "text_column"]),
    ],
)
def test_a_csv_that_is_none(capsys, raw, words):
    Path("t.csv").write_bytes(raw)
    expect(refused(capsys, "corpus=t.csv"), "corpus=t.csv", "t.csv", *words)
    assert not Path("out").exists()


def test_the_rest_of_a_csv_outlives_its_bad_rows(capsys):
    Path("t.csv").write_bytes(
        b'n,text\n1,a text\n2,b,c\n3,"d"e\n\n4,"f ""text""\nin two lines"\n5\n6,g text\n7,"h\n8,i\n'
    )
    found = prepared(capsys, "corpus=t.csv", "skip_bad_documents=true", "val_fraction=0.5")
    assert found == {"a text", 'f "text"\nin two lines', "g text"}  # what follows the open quote is part of it


def test_csv_as_pythons_own_reader_has_it():
    """On sound files, with every quoting that the csv module writes, nothing but DictReader's answers."""
    rows = [(i, text) for i, text in enumerate(["a", "b,c", '"q"', "x\ny", " s ", "\t", "'", "é\u2028", '""', "\\"])]
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC):
        for end in ("\n", "\r\n"):
            with open("t.csv", "w", encoding="utf-8", newline="") as file:
                csv.writer(file, quoting=quoting, lineterminator=end).writerows([("n", "text"), *rows])
            with open("t.csv", encoding="utf-8", newline="") as file:
                assert texts("t.csv") == [row["text"] for row in csv.DictReader(file)] == [text for _, text in rows]


def test_a_parquet_with_two_columns_of_that_name(capsys):
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), "t.parquet")
    expect(refused(capsys, "corpus=t.parquet"), "corpus=t.parquet", "2 columns are named text", "text_column")


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_every_kind_of_text_of_arrow_is_text(kind):
    values = ["a", "ж€", "a", "", "b" * 100]
    column = pa.array(values).dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else pa.array(values, kind)
    pq.write_table(pa.table({"text": column}), "t.parquet")
    assert pq.read_schema("t.parquet").field("text").type == kind
    assert texts("t.parquet") == [text for text in values if text]


def test_a_byte_order_mark_is_no_text():
    mark = b"\xef\xbb\xbf"
    Path("t.txt").write_bytes(mark + "ж text\ufeff\n".encode())
    Path("t.jsonl").write_bytes(mark + b'{"text": "a"}\n{"text": "b"}\n')
    Path("t.tsv").write_bytes(mark + b"text\na\n")
    assert texts("t.txt") == ["ж text\ufeff\n"] and texts("t.txt", lines=True) == ["ж text\ufeff"]
    assert texts("t.jsonl") == ["a", "b"] and texts("t.tsv") == ["a"]


# ---- files


def test_pipes_and_sockets_below_a_folder_are_left_alone():
    folder = Path("notes")
    folder.mkdir()
    (folder / "a.txt").write_text("a text")
    os.mkfifo(folder / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(folder / "s.txt"))
        assert texts("notes") == texts("notes/*.txt") == ["a text"]


def test_a_pipe_or_a_device_as_corpus(capsys):
    os.mkfifo("pipe.txt")
    Path("gone.txt").symlink_to("nowhere.txt")
    Path("round.txt").symlink_to("round.txt")
    for name, word in (("pipe.txt", "a pipe"), ("/dev/zero", "device"), ("gone.txt", "link"), ("round.txt", "link")):
        expect(refused(capsys, f"corpus={name}"), f"corpus={name}", word, "another path")


def broken(kind):
    folder = Path("notes")
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.txt").write_text(f"{i} bottles")
    name = {"zst": "b.txt.zst", "gz": "b.jsonl.gz", "parquet": "b.parquet"}.get(kind, "b.txt")
    if kind in ("dangling", "circular"):
        (folder / name).symlink_to("nowhere.txt" if kind == "dangling" else name)
    elif kind == "parquet":
        pq.write_table(pa.table({"text": TEXTS}), folder / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:-9])
    elif kind == "gz":
        (folder / name).write_bytes(gzip.compress(b'{"text": "a"}\n')[:-9])
    else:
        (folder / name).write_bytes(b"no zstd at all")
    return f"notes/{name}"


@pytest.mark.parametrize("kind", ["dangling", "circular", "zst", "gz", "parquet"])
def test_a_file_that_cannot_be_read_is_named_or_left_out(capsys, kind):
    name = broken(kind)
    expect(refused(capsys, "corpus=notes"), "corpus=notes", name, "mend it", "skip_bad_documents=true")
    assert not Path("out").exists()
    assert {f"{i} bottles" for i in range(5)} <= prepared(capsys, "corpus=notes", "skip_bad_documents=true")
    out = capsys.readouterr().out
    assert name in out and "left out" in out


def test_a_file_that_vanishes_while_the_corpus_is_read():
    broken("gz")
    found = find_corpus("notes")
    os.remove("notes/3.txt")
    problems = []
    assert list(found.documents(bad=problems.append)) == [f"{i} bottles" for i in (0, 1, 2, 4)]
    assert len(problems) == 2 and "notes/3.txt: No such file" in problems[0]


def test_a_single_text_that_is_broken_has_its_own_remedy(capsys):
    Path("t.txt.gz").write_bytes(gzip.compress(b"text")[:-5])
    line = refused(capsys, "corpus=t.txt.gz", "skip_bad_documents=true")
    expect(line, "corpus=t.txt.gz", "not a whole gzip file", "another path")
    assert "skip_bad_documents" not in line, "that is set, and does not help"


def test_where_nothing_remains_the_first_reason_is_said(capsys):
    Path("t.jsonl").write_text('{"text": 1}\n[]\n')
    expect(
        refused(capsys, "corpus=t.jsonl", "skip_bad_documents=true"),
        "corpus=t.jsonl",
        "no text in it",
        "t.jsonl, line 1: no object with a text in text",
    )


def test_a_vocabulary_that_no_machine_holds(capsys):
    expect(refused(capsys, "tokenizer=bpe", "vocab_size=1e12"), "vocab_size", "1000000")


# ---- manifests


DAMAGE = {  # what is wrong -> (the key in the message, its change)
    "corpus": ("corpus", lambda m: m.pop("corpus")),
    "corpus text": ("corpus", lambda m: m.update(corpus="x")),
    "name": ("corpus.name", lambda m: m["corpus"].pop("name")),
    "corpus splits": ("corpus.splits", lambda m: m["corpus"].update(splits=3)),
    "tokenizer": ("tokenizer", lambda m: m.update(tokenizer=None)),
    "fingerprint": ("tokenizer.fingerprint", lambda m: m["tokenizer"].pop("fingerprint")),
    "vocab_size": ("tokenizer.vocab_size", lambda m: m["tokenizer"].update(vocab_size="9")),
    "val_fraction": ("val_fraction", lambda m: m.pop("val_fraction")),
    "val_fraction list": ("val_fraction", lambda m: m.update(val_fraction=[])),
    "dtype": ("dtype", lambda m: m.update(dtype="float16")),
    "dtype object": ("dtype", lambda m: m.update(dtype="O")),
    "splits": ("splits", lambda m: m.update(splits=[])),
    "no val": ("splits.val", lambda m: m["splits"].pop("val")),
    "test null": ("splits.test", lambda m: m["splits"].update(test=None)),
    "unknown split": ("splits.exam", lambda m: m["splits"].update(exam=m["splits"]["val"])),
    "sha256": ("splits.val.sha256", lambda m: m["splits"]["val"].update(sha256=5)),
    "bytes": ("splits.train.bytes", lambda m: m["splits"]["train"].update(bytes="many")),
    "documents": ("splits.train.documents", lambda m: m["splits"]["train"].pop("documents")),
    "tokens": ("splits.train.tokens", lambda m: m["splits"]["train"].update(tokens=3)),
    "tokens negative": ("splits.train.tokens", lambda m: m["splits"]["train"].update(tokens=-1)),
    "tokens true": ("splits.train.tokens", lambda m: m["splits"]["train"].update(tokens=True)),
    "files empty": ("splits.val.files", lambda m: m["splits"]["val"].update(files=[])),
    "files absent": ("splits.val.files", lambda m: m["splits"]["val"].pop("files")),
    "file text": ("splits.val.files.0", lambda m: m["splits"]["val"].update(files=["val.bin"])),
    "file above": ("splits.val.files", lambda m: m["splits"]["val"]["files"][0].update(name="../val.bin")),
    "file absolute": ("splits.val.files", lambda m: m["splits"]["val"]["files"][0].update(name="/etc/passwd")),
    "another split's": ("splits.val.files", lambda m: m["splits"]["val"]["files"][0].update(name="train.bin")),
    "file twice": (
        "splits.val.files",
        lambda m: m["splits"]["val"]["files"].append({"name": m["splits"]["val"]["files"][0]["name"], "tokens": 0}),
    ),
    "version text": ("version", lambda m: m.update(version="2")),
    "version gone": ("version", lambda m: m.pop("version")),
    "nanogpt": ("nanogpt", lambda m: m.update(nanogpt=True)),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A prepared folder, to be copied."""
    folder = tmp_path_factory.mktemp("sound")
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare.prepare(
        SECTIONS["data"](
            corpus=str(folder / "x.jsonl"), tokenizer="char", val_fraction=0.2, data_dir=str(folder / "out")
        ),
        lambda line: None,
    )
    return folder / "out"


@pytest.fixture
def out(sound):
    return Path(shutil.copytree(sound, "out"))


def test_a_manifest_of_the_wrong_shape(capsys, out):
    sound = (out / "manifest.json").read_text()
    for name, (key, change) in DAMAGE.items():
        manifest = json.loads(sound)
        change(manifest)
        (out / "manifest.json").write_text(json.dumps(manifest))
        for command, target in (("prepare", "r.yaml"), ("data", "out"), ("train", "r.yaml")):
            line = refused(capsys, command=command, target=target)
            expect(line, "out/manifest.json: damaged", f" {key}: ", "delete the folder and prepare it again")
        assert not Path("run").exists(), name
    (out / "manifest.json").write_text("[" * 200_000)
    expect(refused(capsys), "out/manifest.json: damaged", "prepare it again")
    (out / "manifest.json").write_text(sound)
    assert main(["data", "out"]) == 0


# ---- token files


def test_content_that_changed_at_the_same_size(capsys, out):
    ids = np.fromfile(out / "val.bin", "<u2")
    ids[7] = (ids[7] + 1) % 5
    ids.tofile(out / "val.bin")
    for command, target in (("prepare", "r.yaml"), ("data", "out"), ("train", "r.yaml")):
        expect(refused(capsys, command=command, target=target), "out/val.bin", "changed since", "prepare it again")


def test_large_files_are_verified_where_it_is_asked_for(capsys, monkeypatch, out):
    monkeypatch.setattr(manifests, "VERIFIED_BELOW", 0)
    ids = np.fromfile(out / "train.bin", "<u2")
    ids[7] = (ids[7] + 1) % 5
    ids.tofile(out / "train.bin")
    assert main(["prepare", "r.yaml", "corpus=x.jsonl"]) == 0
    expect(refused(capsys, command="data", target="out"), "out/train.bin", "changed since")


@pytest.mark.parametrize("verified", [0, 2**26])
def test_ids_that_the_tokenizer_has_not(capsys, monkeypatch, out, verified):
    monkeypatch.setattr(manifests, "VERIFIED_BELOW", verified)
    ids = np.fromfile(out / "train.bin", "<u2")
    ids[-1] = 60_000
    ids.tofile(out / "train.bin")
    line = refused(capsys, command="train")
    expect(line, "out/train.bin", "prepare it again", *([] if verified else ["60,000", "symbols"]))


def test_a_nanogpt_folder_of_another_tokenizers_ids(capsys, gpt2_files):
    Path("out").mkdir()
    for name in ("train.bin", "val.bin"):
        np.array([0, 50256, 50257] * 9, "<u2").tofile(f"out/{name}")
    for command, target in (("train", "r.yaml"), ("data", "out")):
        expect(refused(capsys, command=command, target=target), "out/train.bin", "50,257 symbols", "prepare.py")


@pytest.mark.parametrize("length", [1, 63, 64, 640, 6400, 6399])
def test_the_places_that_are_looked_at(monkeypatch, length):
    """First, last and evenly between; of what is short, all."""
    monkeypatch.setattr(manifests, "LOOK_TOKENS", 10)
    Path("out").mkdir()
    manifest = {"nanogpt": True, "dtype": "uint16", "splits": {"train": {"files": [{"name": "train.bin"}]}}}
    seen = np.zeros(length, bool)
    real = token_files.TokenFile.rows

    def rows(self, starts, length):
        for start in starts:
            seen[start : start + length] = True
        return real(self, starts, length)

    monkeypatch.setattr(token_files.TokenFile, "rows", rows)
    np.zeros(length, "<u2").tofile("out/train.bin")
    manifests.check_content("out", manifest, 1)
    assert seen[0] and seen[-1] and seen.sum() >= min(length, 640)
    assert np.diff(np.flatnonzero(seen)).max(initial=0) <= length / 63 + 1


def test_token_files_without_their_manifest_are_noticed_first(capsys, out, monkeypatch):
    (out / "manifest.json").unlink()
    monkeypatch.setattr(prepare, "_prepare", lambda *args: pytest.fail("the corpus is read"))
    for command in ("prepare", "train"):
        expect(refused(capsys, command=command), "data_dir=out", "train.bin", "another data_dir")
    (out / "val.bin").unlink()
    (out / "tokenizer.json").unlink()
    expect(refused(capsys), "data_dir=out", "holds train.bin", "another data_dir")


# ---- token ids as corpus


def one_wrong(dtype, at, value):
    ids = np.arange(3000, dtype=dtype)
    ids[at] = value
    return ids.tobytes()


@pytest.mark.parametrize(
    ("raw", "given", "words"),
    [
        (b"", [], ["0 bytes are no token ids", "uint16", "50,257 symbols", "another path"]),
        (b"\0", [], ["1 bytes are no token ids"]),
        (bytes(3001), [], ["3,001 bytes are no token ids"]),
        (bytes(2), [], ["1 token ids leave nothing for train", "val_fraction=0.2"]),
        (bytes(6), ["val_fraction=0.9"], ["3 token ids leave nothing for train", "val_fraction=0.9"]),
        (
            one_wrong("<u2", 2345, 50257),
            [],
            ["the id 50,257 at position 2,345", "50,257 symbols", "tokenizer", "uint16"],
        ),
        (np.arange(1, 3000, dtype="<u4").tobytes(), [], ["every second id is 0", "wider numbers", "uint16"]),
        (np.arange(1, 3000, dtype="<i8").tobytes(), [], ["every second id is 0", "wider numbers", "uint16"]),
        (np.arange(1, 400, dtype="<u4").tobytes(), [], ["every second id is 0"]),
        (b"\x93NUMPY\x01\x00" + b" " * 120 + bytes(6000), [], ["numpy.save", "header", "tofile"]),
        (b"To be, or not to be:\n" * 100, [], ["looks like text"]),
        (one_wrong("<i4", 0, -1), [], ["the id 65,535 at position 0", "uint16"]),
        # the header of llm.c's and modded-nanogpt's files: 256 numbers, of which the first is this
        (np.array([20240520, 1, 3000], "<i4").tobytes() + bytes(1012), [], ["position 0", "header"]),
        (bytes(6000), ["tokenizer=char"], ["tokenizer=char", "made of a text", "corpus=a.bin holds token ids", "gpt2"]),
        (bytes(6000), ["tokenizer=bpe"], ["tokenizer=bpe", "made of a text", "corpus=a.bin holds token ids", "gpt2"]),
        (bytes(6000), ["limit_tokens=50"], ["limit_tokens=50", "is one text", "a shorter file"]),
        (bytes(6000), ["limit_documents=5"], ["limit_documents=5", "is one text", "a shorter file"]),
    ],
)
def test_ids_that_are_none(capsys, gpt2_files, raw, given, words):
    Path("a.bin").write_bytes(raw)
    line = refused(capsys, "corpus=a.bin", "tokenizer=gpt2", *given)
    expect(line, "corpus=a.bin", *words)
    assert "lines=true" not in line and not Path("out").exists()


def test_which_of_many_files_of_ids_is_meant(capsys, gpt2_files, monkeypatch):
    monkeypatch.setattr(readers, "IDS_AT_ONCE", 3)
    for name in ("a.bin", "b.bin", "c.bin"):
        Path(name).write_bytes(one_wrong("<u2", 7, 60_000 if name == "b.bin" else 7))
    expect(refused(capsys, "corpus=?.bin", "tokenizer=gpt2"), "corpus=?.bin: b.bin: the id 60,000 at position 7,")
    Path("c.bin").write_bytes(bytes(7))
    for command in ("prepare", "train"):
        line = refused(capsys, "corpus=?.bin", "tokenizer=gpt2", command=command)
        expect(line, "corpus=?.bin: c.bin: 7 bytes are no token ids")
    assert not Path("out").exists() and not Path("run").exists()


def test_a_file_of_ids_that_changes_or_goes(capsys, gpt2_files, monkeypatch):
    real = dataset.check_fits

    def meanwhile(data, corpus):
        real(data, corpus)
        changes.pop(0)()

    for module in (dataset, prepare):
        monkeypatch.setattr(module, "check_fits", meanwhile)
    file = Path("a.bin")
    for change, *words in (
        (lambda: os.truncate(file, 100), "corpus=a.bin: has become shorter", "file whole"),
        (file.unlink, "corpus=a.bin: No such file", "file whole"),
        (lambda: file.write_bytes(b"\1\0" * 3000), "corpus=a.bin: has changed", "begin again"),
    ):
        file.write_bytes(bytes(6000))
        changes = [lambda: None, change]  # asked first by the check of the recipe
        expect(refused(capsys, "corpus=a.bin", "tokenizer=gpt2"), *words)
        assert not Path("out").exists()


# ---- the tokenizer beside them


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tokenizer.json", None, ["out/tokenizer.json: gone"]),
        ("tokenizer.json", "", ["out/tokenizer.json: not a tokenizer.json"]),
        ("tokenizer.json", "another's", ["out/tokenizer.json: not the tokenizer that made"]),
        ("tokenizer_config.json", "{", ["out/tokenizer_config.json: not JSON"]),
        ("tokenizer_config.json", "[" * 200_000, ["out/tokenizer_config.json: not JSON"]),
        ("tokenizer_config.json", '{"eos_token": "0"}', ["out/tokenizer.json: not the tokenizer that made"]),
    ],
)
def test_a_tokenizer_that_is_not_the_one(capsys, out, name, text, words):
    if text == "another's":
        dataset.Tokenizer.char(["abc"]).save(out)
    elif text is None:
        (out / name).unlink()
    else:
        (out / name).write_text(text)
    for command, target in (("prepare", "r.yaml"), ("train", "r.yaml"), ("data", "out")):
        line = refused(capsys, command=command, target=target)
        expect(line, *words, "prepare it again")
        assert name == "tokenizer.json" or "eos_token" in text or "tokenizer.json" not in line
