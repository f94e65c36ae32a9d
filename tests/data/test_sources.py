"""corpus.py: every source of text, character for character, and what is said where there is none."""

import hashlib
import http.server
import json
import os
import platform
import re
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from nanogpt_accel.data import sources as module
from nanogpt_accel.data.local_files import TABLE_SUFFIXES, TEXT_SUFFIXES
from nanogpt_accel.data.sources import find_corpus, source_name


def texts(spec):
    return list(find_corpus(str(spec)).documents())


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "my notes"
    (root / "b").mkdir(parents=True)
    (root / ".git").mkdir()
    files = {
        "b/2.md": "two",
        "b/1.txt": "one\r\n",
        "a.py": "\ufeffpass\n",
        "z.TXT": "ж€𝄞",
        "empty.txt": "",
        ".hidden.txt": "no",
        ".git/x.txt": "no",
        "picture.png": "no",
    }
    for name, text in files.items():
        (root / name).write_bytes(text.encode())
    return root


# ---- local files


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


def test_shakespeare_has_every_character(shakespeare):
    (text,) = texts(shakespeare)
    assert len(text) == 1_115_394
    assert hashlib.sha256(text.encode()).hexdigest() == module.URLS["shakespeare"][1]


def test_the_source_changes_with_the_content_and_not_with_the_place(folder, tmp_path):
    before = find_corpus(str(folder)).source
    assert json.loads(json.dumps(before)) == before
    assert find_corpus(str(folder)).source == before
    moved = folder.rename(tmp_path / "elsewhere").rename(folder)
    assert find_corpus(str(moved)).source == before
    (folder / "b" / "2.md").write_text("2.0")
    assert find_corpus(str(folder)).source != before


@pytest.mark.parametrize("spec", ["python", "shakespeare", "openwebtext"])
def test_source_name_of_a_builtin(spec):
    assert source_name(spec) == find_corpus(spec).source["name"] == spec


def test_source_name_of_a_path(folder):
    for spec in (folder, f"{folder}/", folder / "b" / "1.txt", folder / "*.png"):
        assert source_name(str(spec)) == find_corpus(str(spec)).source["name"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("shakespear", ["corpus=shakespear", "did you mean shakespeare?", "python, shakespeare, openwebtext"]),
        ("no/such/file.txt", ["corpus=no/such/file.txt", "that exists"]),
        ("no/such/*.txt", ["corpus=no/such/*.txt", "no file matches"]),
        ("", ["corpus="]),
    ],
)
def test_what_does_not_exist_is_refused_at_once(refused, spec, words):
    with refused(FileNotFoundError, *words):
        find_corpus(spec)


def test_a_folder_without_text(refused, tmp_path):
    (tmp_path / "x.png").write_bytes(b"\x89PNG")
    with refused(ValueError, f"corpus={tmp_path}", "no file of text", ".txt", ".parquet", "glob"):
        find_corpus(str(tmp_path))


def test_token_files_are_one_sequence_and_no_text(refused, tmp_path):
    for name in ("train.bin", "val.bin"):
        np.arange(100, dtype=np.uint16).tofile(tmp_path / name)
    with refused(ValueError, f"corpus={tmp_path}: holds token ids", f"data_dir={tmp_path}"):
        find_corpus(str(tmp_path))
    for name, files in (("train.bin", 1), ("*.bin", 2)):
        found = find_corpus(str(tmp_path / name))
        assert found.is_single and found.read is None
        assert (found.source["kind"], found.source["files"], found.bytes) == ("ids", files, 200 * files)
        for start in (0, 1, 99, 100, 101, 200):
            count, pieces = found.ids(np.uint16, 100, start)
            assert count == 100 * files
            assert [i for piece in pieces for i in piece] == [*range(100), *range(100)][start:count]
    (tmp_path / "input.txt").write_text("nanoGPT's prepare.py leaves the text beside them")
    assert texts(tmp_path) == ["nanoGPT's prepare.py leaves the text beside them"]


@pytest.mark.parametrize(
    ("spec", "lines", "named"),
    [("x.bin", True, ""), ("*", False, ": x.bin"), ("x.bin.gz", False, ""), ("*.bin*", False, ": x.bin")],
)
def test_token_ids_are_read_from_bin_files_alone(refused, tmp_path, monkeypatch, spec, lines, named):
    monkeypatch.chdir(tmp_path)
    for name in ("x.bin", "x.bin.gz", "y.txt"):
        np.arange(100, dtype=np.uint16).tofile(name)
    with refused(ValueError, f"corpus={spec}{named}", "holds token ids", "no file of text", ".gz", "leave out lines"):
        find_corpus(spec, lines=lines)


def test_what_is_left_out_is_counted(folder):
    (folder / "b" / "x.PNG").touch()
    (folder / "Makefile").touch()
    found = find_corpus(str(folder))
    assert found.left_out == {".png": 2, "without a suffix": 1} and found.source["files"] == 5
    assert find_corpus(str(folder / "a.py")).left_out == {}


def test_the_page_names_every_suffix():
    page = (Path(module.__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert [
        suffix
        for suffix in TEXT_SUFFIXES + TABLE_SUFFIXES
        if f"{suffix} " not in page.replace(",", " ").replace("\n", " ")
    ] == []


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz", "x.tgz", "x.pdf", "x.csv.xz"])
def test_formats_that_are_not_known(refused, folder, name):
    (folder / name).write_bytes(b"PK")
    for spec in (folder / name, folder / f"*{name[1:]}"):
        with refused(ValueError, f"corpus={spec}", "no known format", "unpack", ".parquet"):
            find_corpus(str(spec))
    assert name not in str(find_corpus(str(folder)).source)


def test_json_whose_lines_are_objects_is_jsonl(refused, tmp_path):
    path = tmp_path / "notes.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    with refused(ValueError, f"corpus={path}: each of its lines", "rename it to .jsonl", "text_column"):
        find_corpus(str(path))
    for text in ('{\n  "text": "a"\n}\n', '[{"text": "a"},\n{"text": "b"}]\n', "1\n2\n"):
        path.write_text(text)
        assert texts(path) == [text]


def test_a_wrong_column_is_said_alike_in_every_format(monkeypatch, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    Path("x.jsonl").write_text('{"story": "a", "n": 1}\n')
    Path("x.csv").write_text("story,n\na,1\n")
    pq.write_table(pa.table({"story": ["a"], "n": [1]}), "x.parquet")
    said = set()
    for name in ("x.jsonl", "x.csv", "x.parquet"):
        with pytest.raises(ValueError) as caught:
            texts(name)
        said.add(str(caught.value).replace(name, "FILE"))
    assert said == {"corpus=FILE: no column text; there are story, n: give text_column"}


def test_not_utf8_names_the_file_and_the_byte(refused, folder):
    (folder / "b" / "3.txt").write_bytes(b"abc\xff")
    with refused(ValueError, f"corpus={folder}", folder / "b" / "3.txt", "byte 3", "iconv"):
        texts(folder)


def test_empty_text(refused, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).touch()
    with refused(ValueError, "corpus=a.txt", "no text in it"):
        texts(tmp_path / "a.txt")
    with refused(ValueError, f"corpus={tmp_path.name}", "no text in it"):
        texts(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(refused, folder):
    (folder / "a.py").chmod(0)
    with refused(ValueError, f"corpus={folder}", "a.py", "Permission denied"):
        texts(folder)


# ---- python


def test_python_is_the_library_of_this_interpreter():
    corpus = find_corpus("python")
    documents = list(corpus.documents())
    root = Path(sysconfig.get_path("stdlib"))
    assert corpus.name == f"python-{platform.python_version()}" == f"python-{corpus.source['revision']}"
    assert documents == list(find_corpus("python").documents())
    assert sum(map(len, documents)) > 5_000_000
    for name in ("os.py", "json/decoder.py", "this.py"):
        assert (root / name).read_bytes().decode() in documents
    for name in ("pydoc_data/topics.py", "encodings/cp1252.py", "test/test_grammar.py"):
        if (root / name).is_file():  # some distributions leave the tests out
            assert (root / name).read_bytes().decode() not in documents
    assert not any("import torch" in text for text in documents)


def test_python_without_sources(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    with refused(ValueError, "corpus=python", "python311.zip", "corpus=shakespeare"):
        find_corpus("python")


# ---- downloads


class Server(http.server.BaseHTTPRequestHandler):
    body, announce, status, asked = b"", 0, 200, 0

    def do_GET(self):
        type(self).asked += 1
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body) + self.announce))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on this machine that stands behind the name shakespeare, and expects its own body."""
    handler = type("Handler", (Server,), {"body": "To be, or not\r\nto be: ж\n".encode()})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{httpd.server_port}/input.txt"
        sha256 = hashlib.sha256(handler.body).hexdigest()
        monkeypatch.setitem(module.URLS, "shakespeare", (url, sha256))
        handler.url = url
        yield handler
        httpd.shutdown()


def cached():
    return Path(os.environ["NANOGPT_ACCEL_CACHE"]) / "shakespeare.txt"


def test_a_download_is_kept_and_checked(server):
    corpus = find_corpus("shakespeare")
    assert server.asked == 0, "find_corpus must not download"
    assert list(corpus.documents()) == [server.body.decode()] == texts("shakespeare")
    assert server.asked == 1
    assert corpus.is_single and corpus.name == "shakespeare"
    assert [f.name for f in cached().parent.iterdir()] == ["shakespeare.txt"]
    cached().write_bytes(b"To be")  # a damaged copy is not believed
    assert texts("shakespeare") == [server.body.decode()]
    assert server.asked == 2


def test_the_cache_follows_xdg(server, monkeypatch, tmp_path):
    monkeypatch.delenv("NANOGPT_ACCEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    texts("shakespeare")
    assert (tmp_path / "nanogpt_accel" / "shakespeare.txt").read_bytes() == server.body


def test_a_download_with_another_content(server, refused):
    expected = hashlib.sha256(server.body).hexdigest()
    server.body = b"<html>sign in first</html>"
    got = hashlib.sha256(server.body).hexdigest()
    with refused(ValueError, "corpus=shakespeare", server.url, got, expected, "corpus=PATH"):
        texts("shakespeare")
    assert not cached().exists()


@pytest.mark.parametrize(("status", "announce", "reason"), [(404, 0, "Not Found"), (200, 9, "IncompleteRead")])
def test_a_download_that_fails(server, refused, status, announce, reason):
    server.status, server.announce = status, announce
    with refused(ValueError, "corpus=shakespeare", server.url, reason, "corpus=PATH"):
        texts("shakespeare")
    assert not cached().exists()


def test_no_server(refused, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/input.txt"
    monkeypatch.setitem(module.URLS, "shakespeare", (url, "00"))
    with refused(ValueError, "corpus=shakespeare", url, "refused", "corpus=PATH"):
        texts("shakespeare")


def test_a_server_that_never_answers(refused, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/input.txt"
        monkeypatch.setitem(module.URLS, "shakespeare", (url, "00"))
        start = time.monotonic()
        with refused(ValueError, "corpus=shakespeare", url, "timed out", "corpus=PATH"):
            texts("shakespeare")
        assert time.monotonic() - start < 2


def test_a_cache_that_cannot_be_written(server, refused, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOGPT_ACCEL_CACHE", str(tmp_path / "file" / "cache"))
    with refused(OSError, tmp_path / "file" / "cache", "NANOGPT_ACCEL_CACHE"):
        texts("shakespeare")


# ---- the Hub


def test_openwebtext_streams_the_rows_of_the_hub(monkeypatch):
    import datasets

    def load_dataset(path, config=None, **options):
        asked.append((path, config, options))
        return datasets.Dataset.from_dict({"n": [1, 2, 3], "text": ["a", "", "b"]}).to_iterable_dataset()

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = find_corpus("openwebtext")
    assert asked == [] and not corpus.is_single
    assert list(corpus.documents()) == ["a", "b"]
    assert asked == [
        (
            "Skylion007/openwebtext",
            "plain_text",
            {"split": "train", "revision": corpus.source["revision"], "streaming": True},
        )
    ]
    assert re.fullmatch("[0-9a-f]{40}", corpus.source["revision"]), "the same recipe means the same text"


def test_openwebtext_without_a_network(refused):
    with refused(ValueError, "corpus=openwebtext", "Skylion007/openwebtext", "HF_HUB_OFFLINE", "corpus=PATH"):
        texts("openwebtext")


def test_an_error_amid_the_stream(refused, monkeypatch):
    import datasets

    def rows():
        yield {"text": "a"}
        raise ConnectionResetError("reset by peer\nsecond line")

    features = datasets.Features({"text": datasets.Value("string")})
    stream = datasets.IterableDataset.from_generator(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, config, **options: stream)
    with refused(ValueError, "corpus=openwebtext", "ConnectionResetError: reset by peer"):
        texts("openwebtext")


# ---- start-up


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from nanogpt_accel.commands import prepare; from nanogpt_accel.data.sources import find_corpus; "
        "find_corpus('openwebtext'); find_corpus('python'); "
        "print({'torch', 'transformers', 'datasets', 'pyarrow', 'tokenizers', 'tiktoken'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "set()\n"
