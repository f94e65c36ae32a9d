"""local_files.py: which files of a path, a folder or a glob are read, and which are errors."""

import gzip
import json
import os
import socket
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import TEXTS, documents_found, error_line, expect, jsonl, lines, small_corpus_and_recipe, table, texts

from nanogpt_accel.data import sources
from nanogpt_accel.data.local_files import TABLE_SUFFIXES, TEXT_SUFFIXES
from nanogpt_accel.data.sources import find_corpus


def test_a_folder_gives_its_text_files_in_order_and_unchanged(folder):
    corpus = find_corpus(str(folder))
    assert list(corpus.documents()) == ["pass\n", "one\r\n", "two", "ж€𝄞"]
    assert list(corpus.documents()) == list(corpus.documents())
    assert not corpus.is_single
    assert corpus.name == "my-notes"
    assert corpus.source["kind"] == "files" and corpus.source["files"] == 5


def test_a_file_is_one_text(folder):
    corpus = find_corpus(str(folder / "b" / "1.txt"))
    assert corpus.is_single and corpus.name == "1" and list(corpus.documents()) == ["one\r\n"]


def test_a_glob_takes_any_suffix(folder):
    assert texts(folder / "*.png") == ["no"]
    assert texts(folder / "**" / "*.md") == ["two"]


def test_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert texts("~/b/2.md") == ["two"]


def test_the_source_changes_with_the_content_and_not_with_the_place(folder, tmp_path):
    before = find_corpus(str(folder)).source
    assert json.loads(json.dumps(before)) == before
    assert find_corpus(str(folder)).source == before
    moved = folder.rename(tmp_path / "elsewhere").rename(folder)
    assert find_corpus(str(moved)).source == before
    (folder / "b" / "2.md").write_text("2.0")
    assert find_corpus(str(folder)).source != before


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


def test_a_folder_without_text(refused, tmp_path):
    (tmp_path / "x.png").write_bytes(b"\x89PNG")
    with refused(ValueError, f"corpus={tmp_path}", "contains no text file", ".txt", ".parquet", "glob"):
        find_corpus(str(tmp_path))


def test_token_files_are_no_text(tmp_path):
    for name in ("train.bin", "val.bin"):
        np.arange(100, dtype=np.uint16).tofile(tmp_path / name)
    for spec, files in (("", 2), ("train.bin", 1), ("*.bin", 2)):
        found = find_corpus(str(tmp_path / spec))
        assert found.is_single and found.read is None
        assert (found.source["kind"], found.source["files"], found.bytes) == ("ids", files, 200 * files)
        lengths = [len(tokens) for tokens in found.ids(100, 0.1).values()]
        assert lengths == ([90, 10] if files == 1 else [100, 100])
    (tmp_path / "input.txt").write_text("nanoGPT's prepare.py leaves the text next to them")
    assert texts(tmp_path) == ["nanoGPT's prepare.py leaves the text next to them"]


@pytest.mark.parametrize(
    ("spec", "lines", "named"),
    [("x.bin", True, ""), ("*", False, ": x.bin"), ("x.bin.gz", False, ""), ("*.bin*", False, ": x.bin")],
)
def test_token_ids_are_read_from_bin_files_alone(refused, tmp_path, monkeypatch, spec, lines, named):
    monkeypatch.chdir(tmp_path)
    for name in ("x.bin", "x.bin.gz", "y.txt"):
        np.arange(100, dtype=np.uint16).tofile(name)
    with refused(
        ValueError, f"corpus={spec}{named}", "contains token ids", "remove text files", ".gz", "do not set lines=true"
    ):
        find_corpus(spec, lines=lines)


def test_skipped_files_are_counted(folder):
    (folder / "b" / "x.PNG").touch()
    (folder / "Makefile").touch()
    found = find_corpus(str(folder))
    assert found.skipped == {".png": 2, "without a suffix": 1} and found.source["files"] == 5
    assert find_corpus(str(folder / "a.py")).skipped == {}


def test_the_readme_names_every_suffix():
    page = (Path(sources.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert [
        suffix
        for suffix in TEXT_SUFFIXES + TABLE_SUFFIXES
        if f"{suffix} " not in page.replace(",", " ").replace("\n", " ")
    ] == []


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz", "x.tgz", "x.pdf", "x.csv.xz"])
def test_unsupported_formats(refused, folder, name):
    (folder / name).write_bytes(b"PK")
    for spec in (folder / name, folder / f"*{name[1:]}"):
        with refused(ValueError, f"corpus={spec}", "is not supported", "unpack", ".parquet"):
            find_corpus(str(spec))
    assert name not in str(find_corpus(str(folder)).source)


def test_json_files_of_a_folder_are_read_if_nothing_else_is_there(tmp_path):
    rows = '[{"text": "a"}, {"text": "b"}]'
    (tmp_path / "a.json").write_text(rows)
    (tmp_path / "README.md").write_text("about a")
    assert texts(tmp_path) == ["a", "b"]
    (tmp_path / "b.py").write_text("import a")  # next to code, a JSON file probably contains settings
    assert texts(tmp_path) == ["about a", "import a"]
    assert find_corpus(str(tmp_path)).skipped == {".json": 1}


# ---- output of this package


def outputs(root):
    files = {
        "runs/a/run.yaml": "data: {}",
        "runs/a/samples.jsonl": '{"text": "generated"}',
        "runs/a/checkpoint-000001/README.md": "a model card",
        "data/x/manifest.json": "{}",
        "data/x/train.bin": "",
        "data/x/notes.txt": "next to the tokens",
        "refers/manifest.json": "{}",  # to token files in another folder
        "refers/tokenizer.json": "{}",
        "exported/config.json": "{}",
        "exported/model.safetensors": "",
        "exported/README.md": "a model card",
        "exported/model.py": "class GPT",
        "web/manifest.json": "{}",
        "web/index.html": "<p>a page</p>",
        "config/config.json": "{}",
        "config/a.md": "a manual",
        "mine.txt": "my text",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


MINE = ["a manual", "my text", "<p>a page</p>"]


@pytest.mark.parametrize("spec", [".", "{}", "**/*.[!j]*"])
def test_our_own_output_is_not_read(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    outputs(tmp_path)
    corpus = find_corpus(spec.format(tmp_path))
    found = list(corpus.documents())
    assert [text for text in found if text in MINE] == MINE
    assert not {"a model card", "class GPT", "generated", "next to the tokens"} & set(found)
    (note,) = [note for note in corpus.notes if "skipping" in note]
    count = 3 if "*" in spec else 4  # refers/ only has .json files
    assert f"skipping {count} outputs of nanogpt-accel, such as runs, checkpoints, prepared data or reports (" in note
    assert all(name in note for name in ("data/x", "exported")) and "checkpoint-" not in note


def test_a_new_run_does_not_change_the_corpus(tmp_path):
    (tmp_path / "mine.txt").write_text("my text")
    (tmp_path / "more.txt").write_text("more text")
    before = find_corpus(str(tmp_path)).source
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "run.yaml").touch()
    (tmp_path / "runs" / "a" / "README.md").write_text("a model card")
    assert find_corpus(str(tmp_path)).source == before


def test_a_report_is_not_read(tmp_path, monkeypatch, call):
    """`report` on several runs writes its page to the current folder, which may be the folder of a corpus."""
    monkeypatch.chdir(tmp_path)
    outputs(tmp_path)
    Path("runs/a/metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    Path("runs/a/run.yaml").write_text("")
    call("report", "runs/a", "runs/a")
    for spec in (".", "**/*.html"):
        corpus = find_corpus(spec)
        assert "<p>a page</p>" in corpus.documents() and not any("<title>" in text for text in corpus.documents())
        assert any("report.html" in note for note in corpus.notes)
    assert "<title>" in texts("report.html")[0], "a file that is named is read"


def test_our_own_output_as_corpus(refused, tmp_path):
    outputs(tmp_path)
    with refused(ValueError, f"corpus={tmp_path}/runs/a: a run folder, not a text", "another path"):
        find_corpus(f"{tmp_path}/runs/a")
    with refused(ValueError, f"corpus={tmp_path}/refers: contains prepared data", f"data_dir={tmp_path}/refers"):
        find_corpus(f"{tmp_path}/refers")
    assert texts(tmp_path / "exported" / "*.md") == ["a model card"], "a glob that names the folder is explicit"
    assert texts(tmp_path / "runs" / "a" / "samples.jsonl") == ["generated"]
    with refused(FileNotFoundError, f"corpus={tmp_path}/runs/*/*.jsonl", "except files that this package wrote"):
        find_corpus(f"{tmp_path}/runs/*/*.jsonl")


def test_not_utf8_names_the_file_and_the_byte(refused, folder):
    (folder / "b" / "3.txt").write_bytes(b"abc\xff")
    with refused(ValueError, f"corpus={folder}", folder / "b" / "3.txt", "byte 3", "iconv"):
        texts(folder)


def test_empty_text(refused, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).touch()
    with refused(ValueError, "corpus=a.txt", "contains no text"):
        texts(tmp_path / "a.txt")
    with refused(ValueError, f"corpus={tmp_path.name}", "contains no text"):
        texts(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(refused, folder):
    (folder / "a.py").chmod(0)
    with refused(ValueError, f"corpus={folder}", "a.py", "Permission denied"):
        texts(folder)


# ---- pipes, links and damaged files, seen from the command


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_corpus_and_recipe()
    return tmp_path


@pytest.mark.usefixtures("work")
def test_pipes_and_sockets_below_a_folder_are_left_alone():
    folder = Path("notes")
    folder.mkdir()
    (folder / "a.txt").write_text("a text")
    os.mkfifo(folder / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(folder / "s.txt"))
        assert texts("notes") == texts("notes/*.txt") == ["a text"]


@pytest.mark.usefixtures("work")
def test_a_pipe_or_a_device_as_corpus(capsys):
    os.mkfifo("pipe.txt")
    Path("gone.txt").symlink_to("nowhere.txt")
    Path("round.txt").symlink_to("round.txt")
    for name, word in (("pipe.txt", "pipes"), ("/dev/zero", "device"), ("gone.txt", "link"), ("round.txt", "link")):
        expect(error_line(capsys, f"corpus={name}"), f"corpus={name}", word, "another path")


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
@pytest.mark.usefixtures("work")
def test_a_file_that_cannot_be_read_is_named_or_skipped(capsys, kind):
    name = broken(kind)
    expect(error_line(capsys, "corpus=notes"), "corpus=notes", name, "fix the data", "skip_bad_documents=true")
    assert not Path("out").exists()
    assert {f"{i} bottles" for i in range(5)} <= documents_found(capsys, "corpus=notes", "skip_bad_documents=true")
    out = capsys.readouterr().out
    assert name in out and "skipped" in out


@pytest.mark.usefixtures("work")
def test_a_file_that_vanishes_while_the_corpus_is_read():
    broken("gz")
    found = find_corpus("notes")
    os.remove("notes/3.txt")
    problems = []
    assert list(found.documents(bad=problems.append)) == [f"{i} bottles" for i in (0, 1, 2, 4)]
    assert len(problems) == 2 and "notes/3.txt: No such file" in problems[0]
