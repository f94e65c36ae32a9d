"""remote.py: the corpus of a URL is the same as that of local files, and errors about access contain a fix."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from data_files import ENV, FORMATS, content, documents, error_line, expect, jsonl, prepared, section
from hub_server import HubServer

from nanogpt_accel.data import local_files, readers
from nanogpt_accel.data.remote import find, is_remote, name_of
from nanogpt_accel.data.sources import find_corpus, source_name

DOCS = documents(60)


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """Write the formats of local files into the folder `local`."""
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("data: {tokenizer: char, val_fraction: 0.2, data_dir: out}\n")
    Path("local/sub").mkdir(parents=True)
    for name in ("x.parquet", "x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.csv"):
        FORMATS[name](f"local/{name}", DOCS)
    Path("local/sub/one.txt").write_text("one file\nof text\n" * 99)
    Path("local/.hidden.txt").write_text("not read")


@pytest.fixture
def memory():
    """Copy the folder `local` to memory://bucket, fsspec's file system for tests."""
    import fsspec

    fs = fsspec.filesystem("memory")
    if fs.exists("/bucket"):  # of another test in this process: `put` would copy to bucket/local
        fs.rm("/bucket", recursive=True)
    fs.put("local", "memory://bucket", recursive=True)
    yield fs
    fs.rm("/", recursive=True)


def tokens_of(folder):
    """Return the files of a data folder except manifest.json, and the splits in manifest.json."""
    files = content(folder)
    return files, json.loads(files.pop("manifest.json"))["splits"]


def assert_same(url, path, **given):
    """Prepare a URL and a local path, and compare all bytes."""
    for name, corpus in (("remote", url), ("local copy", path)):
        shutil.rmtree(name, ignore_errors=True)
        prepared(corpus=corpus, data_dir=name, **given)
    assert tokens_of("remote") == tokens_of("local copy")


@pytest.mark.parametrize(
    "spec",
    ["sub/one.txt", "x.parquet", "x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.csv", "x.*", "**/*.txt", "", "sub/*.txt"],
)
def test_a_url_gives_the_bytes_of_the_local_files(memory, spec):
    assert_same(f"memory://bucket/{spec}", f"local/{spec}")


@pytest.mark.parametrize("spec", ["named", "named/*.txt", "named/**"])
def test_names_of_remote_files_are_splits(memory, spec):
    for name, text in (("train.txt", "training text " * 9), ("valid.txt", "valid")):
        memory.pipe(f"/bucket/named/{name}", text.encode())
    corpus = find_corpus(f"memory://bucket/{spec}")
    assert {split: [*corpus.documents(split)] for split in corpus.own_splits()} == {
        "train": ["training text " * 9],
        "val": ["valid"],
    }


def test_our_own_output_is_not_read_in_a_remote_folder(memory):
    for name in (
        "mine/a.txt",
        "mine/runs/x/run.yaml",
        "mine/runs/x/samples.jsonl",
        "mine/runs/x/checkpoint-1/model.py",
    ):
        memory.pipe(f"/bucket/{name}", b"a text")
    corpus = find_corpus("memory://bucket/mine")
    assert list(corpus.documents()) == ["a text"]
    assert any(
        "skipping 1 output of nanogpt-accel" in note and "(memory://bucket/mine/runs/x)" in note
        for note in corpus.notes
    )


def test_formats_are_recognized_by_content(memory):
    memory.pipe("/bucket/c/gzip.jsonl", Path("local/x.jsonl.gz").read_bytes())
    memory.pipe("/bucket/d/x.json", b'[{"text": "one"}, {"text": "two"}]')
    for spec, texts in (("c/gzip.jsonl", DOCS), ("d/x.json", ["one", "two"]), ("d", ["one", "two"])):
        assert list(find_corpus(f"memory://bucket/{spec}").documents()) == texts


def test_names_and_urls():
    assert all(map(is_remote, ("s3://b/x", "gs://b/*.txt", "https://h/x?a=1", "hf://datasets/a/b/x", "memory://x")))
    assert not any(map(is_remote, ("s3/b", "/x://y", "hub:a/b", "C:\\x", "./x.txt", "~/x")))
    assert (
        name_of("https://h/x.jsonl.gz?token=1#part") == "https://h/x.jsonl.gz"
        and name_of("s3://b/a?.txt") == "s3://b/a?.txt"
    )
    assert readers.suffix_of("https://h/x.jsonl.gz?token=1") == ".jsonl"
    assert source_name("https://h/d/x.jsonl?token=1") == local_files.base_name("s3://b/x.jsonl") == "x.jsonl"


def test_a_changed_file_gets_another_folder(memory):
    before = find_corpus("memory://bucket/sub/one.txt").source
    assert before == find_corpus("memory://bucket/sub/one.txt").source
    memory.pipe("/bucket/sub/one.txt", b"another length")
    assert before != find_corpus("memory://bucket/sub/one.txt").source


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("memory://bucket/no.txt", ["no such file", "another URL"]),
        ("memory://bucket/*.log", ["no such file", "another URL"]),
        ("nosuch://bucket/x.txt", ["Protocol not known: nosuch"]),
        ("memory://bucket/sub/x.zip", [".zip is not supported"]),
        ("memory://bucket/ids.bin", ["token ids must be on this machine", "download"]),
        ("memory://bucket/cut.jsonl.gz", ["not a complete gzip file"]),
        ("memory://bucket/latin.txt", ["not UTF-8", "download it and", "iconv -f WINDOWS-1252 -t UTF-8 latin.txt >"]),
    ],
)
def test_errors_are_one_line(memory, capsys, spec, words):
    memory.pipe("/bucket/sub/x.zip", b"PK")
    memory.pipe("/bucket/ids.bin", np.arange(100, dtype="<u2").tobytes())
    memory.pipe("/bucket/cut.jsonl.gz", Path("local/x.jsonl.gz").read_bytes()[:200])
    memory.pipe("/bucket/latin.txt", b"caf\xe9")
    expect(error_line(capsys, f"corpus={spec}"), f"corpus={spec}", *words)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("spec", "package"), [("s3://b/x.txt", "s3fs"), ("gs://b/*.txt", "gcsfs"), ("https://h/x.txt", "aiohttp")]
)
def test_a_missing_package_is_named(monkeypatch, capsys, spec, package):
    from fsspec.registry import _registry

    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "fsspec.implementations.http", None)
    for protocol in ("s3", "gs", "https"):
        monkeypatch.delitem(_registry, protocol, raising=False)
    expect(error_line(capsys, f"corpus={spec}"), f"corpus={spec}: the package for", f"run `pip install {package}`")


def test_a_connection_that_breaks_is_no_bad_document(memory, monkeypatch, capsys):
    """skip_bad_documents must not skip the rest of a corpus because of the network."""
    from fsspec.implementations.memory import MemoryFile

    monkeypatch.setattr(MemoryFile, "read", lambda *args: (_ for _ in ()).throw(ConnectionResetError("reset by peer")))
    for name in ("sub/one.txt", "x.jsonl.gz", "x.parquet", "*.jsonl"):
        line = error_line(capsys, f"corpus=memory://bucket/{name}", "skip_bad_documents=true")
        expect(line, "cannot be read (ConnectionResetError: reset by peer)", "check the URL and the network")


# ---- real servers


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["sub/one.txt", "x.jsonl.gz?token=1", "*.jsonl"])
def test_https_gives_the_bytes_of_the_local_files(spec):
    """The server is Python's http.server, which lists folders and does not support range requests."""
    pytest.importorskip("aiohttp", reason="pip install aiohttp")
    import functools
    import http.server
    import threading

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory="local")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert_same(f"{url}/{spec}", f"local/{spec.partition('?')[0]}")
        with pytest.raises(ValueError, match=r"no such file.*404"):
            find_corpus(f"{url}/no.txt")
        server.shutdown()


@pytest.mark.slow
def test_hf_gives_the_bytes_of_the_local_files(tmp_path):
    with HubServer() as hub:
        hub.add("datasets/me/stories", content("local"))
        env = ENV | hub.env(tmp_path / "home")
        for name in ("x.jsonl.gz", "x.parquet", "sub/one.txt", "x.*"):
            spec = f"hf://datasets/me/stories/{name}"
            command = [sys.executable, "-m", "nanogpt_accel", "prepare", "r.yaml", f"corpus={spec}", "data_dir=remote"]
            subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
            prepared(corpus=f"local/{name}", data_dir="straight")
            assert tokens_of("remote") == tokens_of("straight")
            shutil.rmtree("remote")
            shutil.rmtree("straight")
        command[-2] = "corpus=hf://datasets/me/stories/no.txt"
        process = subprocess.run(command, env=env, capture_output=True, text=True)
        (line,) = process.stderr.splitlines()
        expect(line, "error: corpus=hf://datasets/me/stories/no.txt: no such file")


@pytest.fixture(scope="module")
def s3():
    """Start moto's S3 server on 127.0.0.1, and return s3fs's file system. Child processes use it too."""
    pytest.importorskip("s3fs", reason="pip install s3fs")
    server = pytest.importorskip("moto.server", reason="pip install 'moto[server]'")
    server = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        import s3fs

        fs = s3fs.S3FileSystem(skip_instance_cache=True)
        fs.mkdir("bucket")
        yield fs
    server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["sub/one.txt", "x.*", "", "x.jsonl.zst", "x.parquet"])
def test_s3_gives_the_bytes_of_the_local_files(s3, spec):
    s3.put("local/", "s3://bucket/a/", recursive=True)
    assert_same(f"s3://bucket/a/{spec}", f"local/{spec}")


@pytest.mark.slow
def test_gs_gives_the_bytes_of_the_local_files(monkeypatch):
    """The server is an emulator of Google's JSON API. gcsfs must not ask it for the kind of the bucket with gRPC."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    gcsfs = pytest.importorskip("gcsfs", reason="pip install gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="pip install gcp-storage-emulator")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")
    with emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket"):
        fs = gcsfs.GCSFileSystem(token="anon")
        for name in ("x.jsonl", "x.parquet", "sub/one.txt"):
            fs.pipe(f"bucket/a/{name}", Path("local", name).read_bytes())
        for spec in ("x.jsonl", "x.parquet", "*.jsonl", "sub"):
            assert_same(f"gs://bucket/a/{spec}", f"local/{spec}")
        with pytest.raises(ValueError, match="no such file"):
            find_corpus("gs://bucket/a/no.txt")


KILLED = """
import json, sys
from nanogpt_accel.data import encoding, prepare, token_files
from nanogpt_accel.recipe import SECTIONS
encoding.CHUNK, token_files.COMMIT_SECONDS = 400, 0
prepare.prepare(SECTIONS["data"](**json.loads(sys.argv[1])), threads=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["big.jsonl", "big*.jsonl"])
def test_killed_midway_it_resumes_from_s3(s3, spec):
    for name, seed in (("big.jsonl", 1), ("big2.jsonl", 2)):
        jsonl(f"local/{name}", documents(4000, seed))
        s3.put(f"local/{name}", f"s3://bucket/{name}")
    given = {"corpus": f"s3://bucket/{spec}", "data_dir": "remote"}
    progress = Path("remote/.partial/progress.json")
    kept = []
    for _ in range(2):
        command = [sys.executable, "-c", KILLED, json.dumps(section(**given).model_dump())]
        process = subprocess.Popen(command, env=ENV | dict(os.environ), stdout=subprocess.DEVNULL)
        end, before = time.monotonic() + 120, progress.read_bytes() if progress.exists() else b""
        while not progress.exists() or progress.read_bytes() == before:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept.append(json.loads(progress.read_text())["position"]["documents"])
    assert 0 < kept[0] < kept[1] < 4000
    _, said = prepared(**given)
    assert "remote: resuming an interrupted preparation" in said
    prepared(corpus=f"local/{spec}", data_dir="straight")
    assert tokens_of("remote") == tokens_of("straight")


@pytest.mark.slow
def test_access_to_s3_is_explained(s3, monkeypatch, capsys):
    line = error_line(capsys, "corpus=s3://no-such-bucket/x.txt")
    expect(line, "corpus=s3://no-such-bucket/x.txt: no such file", "NoSuchBucket")
    expect(error_line(capsys, "corpus=s3://bucket/no.txt"), "no such file")
    s3.pipe("bucket/private.txt", b"secret")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "none")
    for setting, reason in ((None, "NoCredentialsError"), ("true", "PermissionError")):
        if setting:
            monkeypatch.setenv("FSSPEC_S3_ANON", setting)
        command = [sys.executable, "-m", "nanogpt_accel", "prepare", "r.yaml", "corpus=s3://bucket/private.txt"]
        process = subprocess.run(command, env=ENV | dict(os.environ), capture_output=True, text=True)
        assert process.returncode == 2
        (line,) = process.stderr.splitlines()
        expect(line, f"cannot be read ({reason}", "AWS_ACCESS_KEY_ID", "`aws configure`", "FSSPEC_S3_ANON=true")


@pytest.mark.slow
def test_a_public_bucket_needs_no_credentials(s3, monkeypatch):
    s3.mkdir("public", acl="public-read")
    s3.pipe("public/x.txt", b"to be or not to be", ACL="public-read")
    monkeypatch.setenv("FSSPEC_S3_ANON", "true")
    command = [sys.executable, "-m", "nanogpt_accel", "prepare", "r.yaml", "corpus=s3://public/x.txt"]
    env = {key: value for key, value in (ENV | dict(os.environ)).items() if "ACCESS_KEY" not in key}
    assert subprocess.run(command, env=env).returncode == 0
    assert find("s3://public/*.txt") == (["s3://public/x.txt"], False)
    assert sum(len(raw) for name, raw in content("out").items() if name.endswith(".bin")) == 2 * 18
