"""sources.py: the names of corpora, the Python library, and downloads."""

import hashlib
import http.server
import os
import platform
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pytest
from data_files import texts

from nanogpt_accel.data import sources
from nanogpt_accel.data.sources import find_corpus, source_name


def test_shakespeare_has_every_character(shakespeare):
    text = "".join(texts(shakespeare))  # read in chunks
    assert len(text) == 1_115_394
    assert hashlib.sha256(text.encode()).hexdigest() == sources.URLS["shakespeare"][1]


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
        ("no/such/file.txt", ["corpus=no/such/file.txt", "existing file"]),
        ("no/such/*.txt", ["corpus=no/such/*.txt", "no file matches"]),
        ("", ["corpus="]),
    ],
)
def test_a_name_that_does_not_exist(refused, spec, words):
    with refused(FileNotFoundError, *words):
        find_corpus(spec)


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
    """A local server for the corpus shakespeare, whose SHA-256 is changed to that of the served text."""
    handler = type("Handler", (Server,), {"body": "To be, or not\r\nto be: ж\n".encode()})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{httpd.server_port}/input.txt"
        sha256 = hashlib.sha256(handler.body).hexdigest()
        monkeypatch.setitem(sources.URLS, "shakespeare", (url, sha256))
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
    cached().write_bytes(b"To be")  # a damaged copy is replaced
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
    monkeypatch.setitem(sources.URLS, "shakespeare", (url, "00"))
    with refused(ValueError, "corpus=shakespeare", url, "refused", "corpus=PATH"):
        texts("shakespeare")


def test_a_server_that_never_answers(refused, monkeypatch):
    monkeypatch.setattr(sources, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/input.txt"
        monkeypatch.setitem(sources.URLS, "shakespeare", (url, "00"))
        start = time.monotonic()
        with refused(ValueError, "corpus=shakespeare", url, "timed out", "corpus=PATH"):
            texts("shakespeare")
        assert time.monotonic() - start < 2


def test_a_cache_that_cannot_be_written(server, refused, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOGPT_ACCEL_CACHE", str(tmp_path / "file" / "cache"))
    with refused(OSError, tmp_path / "file" / "cache", "NANOGPT_ACCEL_CACHE"):
        texts("shakespeare")


# ---- start-up


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from nanogpt_accel.commands import prepare; from nanogpt_accel.data.sources import find_corpus; "
        "find_corpus('openwebtext'); find_corpus('python'); "
        "print({'torch', 'transformers', 'datasets', 'pyarrow', 'tokenizers', 'tiktoken'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "set()\n"
