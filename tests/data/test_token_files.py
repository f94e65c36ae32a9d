"""token_files.py: nanoGPT's format, crashes at any time, and reading."""

import contextlib
import errno
import gc
import hashlib
import json
import os
import platform
import subprocess
import sys
import time

import numpy as np
import pytest
from data_files import ENV, FACTS, names, save_tokenizer, sha256, write

from nanogpt_accel.data import token_files
from nanogpt_accel.data.manifest import is_data_folder, read_manifest
from nanogpt_accel.data.token_files import TokenFile, Writer, token_file
from nanogpt_accel.utils import locking

# ---- writing


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_the_files_are_nanogpts(tmp_path, dtype):
    folder = tmp_path / "a" / "b"
    manifest = write(folder, dtype=dtype)
    assert np.memmap(folder / "train.bin", dtype=dtype, mode="r").tolist() == list(range(1000))
    assert np.memmap(folder / "val.bin", dtype=dtype, mode="r").tolist() == [7, 8, 9]
    assert names(folder) == ["manifest.json", "tokenizer.json", "train.bin", "val.bin"]
    assert names(tmp_path) == ["a", "a/b", *[f"a/b/{name}" for name in names(folder)]]
    assert (
        read_manifest(folder)
        == manifest
        == FACTS
        | {
            "version": 2,
            "dtype": np.dtype(dtype).name,
            "splits": {
                "train": {
                    "tokens": 1000,
                    "bytes": 2000,
                    "documents": 3,
                    "sha256": sha256(folder / "train.bin"),
                    "files": [{"name": "train.bin", "tokens": 1000}],
                },
                "val": {
                    "tokens": 3,
                    "bytes": 3,
                    "documents": 1,
                    "sha256": sha256(folder / "val.bin"),
                    "files": [{"name": "val.bin", "tokens": 3}],
                },
            },
        }
    )


def test_a_folder_that_is_there_keeps_its_other_files(tmp_path):
    (tmp_path / "readme.md").write_text("mine")
    write(tmp_path)
    assert names(tmp_path) == ["manifest.json", "readme.md", "tokenizer.json", "train.bin", "val.bin"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_leaving_early_leaves_nothing(tmp_path, error):
    with pytest.raises(error), Writer(tmp_path / "data", np.uint16) as writer:
        writer.write("train", np.arange(100_000), 1)
        assert not is_data_folder(tmp_path / "data")
        raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interruption_keeps_complete_documents(tmp_path, error):
    """Everything up to the last commit() call is kept on an interruption, but not after another exception."""
    with pytest.raises(error), Writer(tmp_path / "data", np.uint16, FACTS, 300) as writer:
        for number in range(4):
            writer.write("train", np.arange(200), 9)
            writer.commit(number + 1)
        writer.write("val", np.arange(5), 9)  # not yet committed
        raise error
    assert not is_data_folder(tmp_path / "data")
    if error is RuntimeError:
        assert names(tmp_path) == [] and token_files.earlier_attempt(tmp_path / "data")[1] == 0
        return
    assert token_files.earlier_attempt(tmp_path / "data")[1] == 4
    with Writer(tmp_path / "data", np.uint16, FACTS, 300) as writer:
        assert (writer.position, writer.counts) == (4, {"train": {"tokens": 800, "bytes": 36, "documents": 4}})
        writer.write("val", np.arange(5), 9)
        writer.finish(FACTS, save_tokenizer)
    manifest = read_manifest(tmp_path / "data")
    files = token_file(tmp_path / "data", manifest, "train").paths
    assert [*TokenFile(files, "uint16").rows([0], 800)[0]] == [*range(200)] * 4 and len(files) == 2


def test_splits_come_in_one_order(tmp_path):
    with Writer(tmp_path, np.uint16) as writer:
        for split in ("test", "val", "train"):
            writer.write(split, np.arange(3), 3)
        writer.finish(FACTS, save_tokenizer)
    assert list(read_manifest(tmp_path)["splits"]) == ["train", "val", "test"]


def test_a_tokenizer_that_cannot_be_saved(refused, tmp_path):
    def fail(folder):
        raise OSError(28, "No space left on device")

    with (
        refused(OSError, f"data_dir={tmp_path / 'data'}", "No space left on device", "set data_dir"),
        Writer(tmp_path / "data", np.uint16) as writer,
    ):
        writer.finish(FACTS, fail)
    assert names(tmp_path) == []


def test_a_disk_that_fills_up(tmp_path):
    """A limit on the size of files fails like a full disk: in write() or, later, in the flush."""
    code = (
        "import resource, sys, numpy as np\n"
        "from nanogpt_accel.utils import cli; from nanogpt_accel.data import token_files as tokens\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "def command(argv):\n"
        "    with tokens.Writer(argv[0], np.uint16) as writer:\n"
        "        for _ in range(int(argv[1])):\n"
        "            writer.write('train', np.arange(25_001), 1)\n"
        "        writer.finish({}, lambda folder: None)\n"
        "sys.exit(cli.run(command, sys.argv[1:]))\n"
    )
    for count in ("1", "9"):
        command = [sys.executable, "-c", code, tmp_path / "data", count]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "File too large" in done.stderr and "set data_dir" in done.stderr
        assert names(tmp_path) == []


class Dead(BaseException):
    """A crash of the machine: nothing after it happens."""


def die(monkeypatch, after):
    """Raise Dead in the system call with this number that changes the disk."""

    def dying(real):
        def call(*args, **options):
            if next(left, None) is None:
                raise Dead
            return real(*args, **options)

        return call

    left = iter(range(after))
    for name in ("replace", "rename", "fsync", "truncate"):
        monkeypatch.setattr(token_files.os, name, dying(getattr(os, name)))
    monkeypatch.setattr(token_files.shutil, "rmtree", lambda *args, **options: None)  # a dead process cleans nothing up


@pytest.mark.parametrize("shard_tokens", [300, 10**8])
@pytest.mark.parametrize("commit_seconds", [0, 20])
def test_a_crash_at_any_point_leaves_work_that_can_be_finished(monkeypatch, tmp_path, commit_seconds, shard_tokens):
    monkeypatch.setattr(token_files, "COMMIT_SECONDS", commit_seconds)
    manifest = write(tmp_path / "whole", shard_tokens=shard_tokens)
    whole = {f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()}
    for point in range(99):
        folder = tmp_path / f"crash{point}"
        with monkeypatch.context() as patch:
            die(patch, after=point)
            try:
                write(folder, shard_tokens=shard_tokens)
            except Dead:
                assert not is_data_folder(folder), "an incomplete folder is never used as data"
            else:
                break
        with monkeypatch.context() as patch:  # and the second attempt dies too
            die(patch, after=point % 4)
            with contextlib.suppress(Dead):
                write(folder, shard_tokens=shard_tokens)
        if not is_data_folder(folder):
            assert write(folder, shard_tokens=shard_tokens) == manifest
        assert read_manifest(folder) == manifest
        assert {f.name: f.read_bytes() for f in folder.iterdir() if f.name != ".partial"} == whole
    assert point >= (10 if commit_seconds else 20), "the moves are among the points"


@pytest.mark.parametrize("moves", range(6))
def test_a_crash_between_the_moves_is_never_taken_for_data(refused, monkeypatch, tmp_path, moves):
    """After any number of moves the files are not used as data, and an attempt with other facts does not mix its files
    with them."""
    left, real = iter(range(moves)), os.replace

    def replace(source, target):  # of progress.json, of manifest.json in .partial, then the four moves
        if next(left, None) is None:
            raise Dead
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        patch.setattr(token_files.shutil, "rmtree", lambda *args, **options: None)
        with pytest.raises(Dead):
            write(tmp_path / "data")
    assert not is_data_folder(tmp_path / "data")
    other = FACTS | {"val_fraction": 0.2}
    if moves <= 2:  # no file has been moved, so .partial can be replaced
        assert write(tmp_path / "data", facts=other)["val_fraction"] == 0.2
    else:
        has_tokens = moves > 3  # without .bin files in the folder, the message does not suggest to delete it
        with refused(
            ValueError if has_tokens else FileNotFoundError,
            f"data_dir={tmp_path / 'data'}",
            "delete" if has_tokens else "run prepare to resume it",
        ):
            read_manifest(tmp_path / "data")
        with refused(
            ValueError,
            f"data_dir={tmp_path / 'data'}",
            "tokenizer.json",
            "delete" if has_tokens else "set data_dir to another folder",
        ):
            write(tmp_path / "data", facts=other)
        gc.collect()  # releases the lock of the Writer that failed
        assert write(tmp_path / "data")["val_fraction"] == 0.1  # the same facts complete it


def test_a_crash_while_the_files_are_hashed_costs_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(token_files, "COMMIT_SECONDS", 0)

    def dead(*args, **options):
        raise Dead

    with monkeypatch.context() as patch, pytest.raises(Dead):
        patch.setattr(token_files, "_join_hashes", dead)
        write(tmp_path, shard_tokens=300)  # train has three files, val one
    with Writer(tmp_path, np.uint16, FACTS, 300) as writer:
        assert writer.position == 4, "all four documents were committed"


@pytest.mark.parametrize("shard_tokens", [100, 300, 1000])
@pytest.mark.parametrize("ends", [[], [90], [150, 270]])
def test_hashes_are_those_of_the_files_however_often_the_writer_was_interrupted(
    monkeypatch, tmp_path, shard_tokens, ends
):
    monkeypatch.setattr(token_files, "COMMIT_SECONDS", 0)
    ids = np.arange(320, dtype=np.uint16)
    for end in (*ends, None):
        with contextlib.suppress(Dead), Writer(tmp_path, np.uint16, FACTS, shard_tokens) as writer:
            for i in range(writer.position, len(ids), 10):
                writer.write("train", ids[i : i + 10], 10)
                writer.commit(i + 10)
                if end is not None and i + 10 >= end:
                    writer.write("train", ids[:5], 10)  # not committed
                    raise Dead
            manifest = writer.finish(FACTS, save_tokenizer)
    files = [tmp_path / file["name"] for file in manifest["splits"]["train"]["files"]]
    assert b"".join(file.read_bytes() for file in files) == ids.tobytes() and len(files) == -(-320 // shard_tokens)
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    joined = hashes[0] if len(files) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    assert manifest["splits"]["train"]["sha256"] == joined


def test_other_facts_start_over(monkeypatch, tmp_path):
    monkeypatch.setattr(token_files, "COMMIT_SECONDS", 0)
    for facts, dtype, shard_tokens in (
        (FACTS, np.uint16, 300),
        (FACTS | {"val_fraction": 0.2}, np.uint16, 300),
        (FACTS, np.uint32, 300),
        (FACTS, np.uint16, 400),
    ):
        with Writer(tmp_path, dtype, facts, shard_tokens) as writer:
            assert (writer.position, writer.counts, writer.files) == (0, {}, {})
            writer.write("train", np.arange(350), 9)
            writer.commit(1)
        with Writer(tmp_path, dtype, facts, shard_tokens) as writer:
            assert writer.position == 1 and writer.counts["train"]["tokens"] == 350


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", None])
def test_damaged_progress_starts_over(monkeypatch, tmp_path, damage):
    monkeypatch.setattr(token_files, "COMMIT_SECONDS", 0)
    with Writer(tmp_path, np.uint16) as writer:
        writer.write("train", np.arange(350), 9)
        writer.commit(1)
    if damage is None:  # fewer tokens than it says
        os.truncate(tmp_path / ".partial" / "train-00000.bin", 100)
    else:
        (tmp_path / ".partial" / "progress.json").write_text(damage)
    with Writer(tmp_path, np.uint16) as writer:
        assert (writer.position, writer.files) == (0, {})
    assert names(tmp_path) == []


def interrupted(folder):
    """Write the first part of a data folder, with progress.json; return its folder .partial."""
    with pytest.raises(KeyboardInterrupt), Writer(folder, np.uint16) as writer:
        writer.write("train", np.arange(10), 9)
        writer.commit(1)
        raise KeyboardInterrupt
    return folder / ".partial"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[
            ("files", {"train": [{"name": name, "tokens": 2}]})
            for name in (
                "../../victim",
                "../victim-00000.bin",
                "train-00000.bin/../../../victim",
                "VICTIM",
                "..\\..\\victim",
                "val-00000.bin",
                "lock",
                "progress.json",
                "..",
                "",
                "train-0.bin",
                "train-00000.bin\n",
                None,
                5,
                ["train-00000.bin"],
            )
        ],
        ("files", {"../../victim": [{"name": "../../victim-00000.bin", "tokens": 2}]}),
        ("files", {"train": [{"name": "train-00000.bin", "tokens": -1}]}),
        ("files", {"train": [{"name": "train-00000.bin", "tokens": "2"}]}),
        ("files", {"train": {}}),
        ("files", []),
        ("counts", {"../../victim": {"tokens": 1, "bytes": 1, "documents": 1}}),
        ("counts", {"train": {"tokens": "x", "bytes": 1, "documents": 1}}),
        ("counts", {"train": 5}),
        ("counts", None),
        ("facts", [5, "uint16", 5]),
        ("facts", 5),
    ],
)
def test_progress_of_another_program_starts_over(tmp_path, key, value):
    """A data folder from elsewhere may contain any names. Nothing outside of the folder is written."""
    victims = [tmp_path / "victim", tmp_path / "victim-00000.bin", tmp_path / "data" / "victim-00000.bin"]
    partial = interrupted(tmp_path / "data")
    for victim in victims:
        victim.write_text("important")
    progress = json.loads((partial / "progress.json").read_text()) | {key: value}
    (partial / "progress.json").write_text(json.dumps(progress).replace("VICTIM", str(victims[0])))
    assert token_files.earlier_attempt(tmp_path / "data") == ({}, 0)
    with Writer(tmp_path / "data", np.uint16) as writer:
        assert (writer.position, writer.counts, writer.files) == (0, {}, {})
        writer.write("train", np.arange(3), 9)
        writer.write("val", np.arange(3), 9)
        writer.finish(FACTS, save_tokenizer)
    assert all(victim.read_text() == "important" for victim in victims)
    assert read_manifest(tmp_path / "data")["splits"]["train"]["tokens"] == 3


@pytest.mark.skipif(os.name == "nt", reason="links require a privilege")
@pytest.mark.parametrize("name", ["train-00000.bin", "val-00000.bin", "holder.json", "progress.json", "tokenizer.json"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_in_an_interrupted_folder_are_not_written_through(tmp_path, name, link):
    partial, victim = interrupted(tmp_path / "data"), tmp_path / "victim"
    content = (partial / "progress.json").read_bytes() if name == "progress.json" else b"important" * 99
    victim.write_bytes(content)
    (partial / name).unlink(missing_ok=True)
    link(victim, partial / name)
    os.symlink(victim, partial / f"progress.json.tmp-{os.getpid()}")
    os.symlink(victim, partial / f"manifest.json.tmp-{os.getpid()}")
    write(tmp_path / "data", facts={})
    assert victim.read_bytes() == content and not any(path.is_symlink() for path in (tmp_path / "data").iterdir())


@pytest.mark.skipif(os.name == "nt", reason="links require a privilege")
def test_partial_folder_that_is_a_link_is_refused(refused, tmp_path):
    """The Writer deletes unknown files in it."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("important")
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "victim", tmp_path / "data" / ".partial")
    with refused(ValueError, tmp_path / "data" / ".partial", "is a link", "delete the link"):
        write(tmp_path / "data")
    assert names(tmp_path / "victim") == ["file"]
    os.remove(tmp_path / "data" / ".partial")
    os.symlink(tmp_path / "gone", tmp_path / "data" / ".partial")
    with refused(ValueError, "is a link"):
        write(tmp_path / "data")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no flock")
def test_second_writer_is_refused_on_a_file_system_without_flock(monkeypatch, tmp_path):
    """The lock is then a lease file in .partial, which the Writer must neither delete nor move."""
    import fcntl

    def flock(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    lease = locking.SoftFileLease
    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locking, "SoftFileLease", lambda file, **options: lease(file, **options | {"timeout": 0.1}))
    with Writer(tmp_path / "data", np.uint16) as writer:
        writer.write("train", np.arange(5), 5)
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on .* is preparing this folder"):
            Writer(tmp_path / "data", np.uint16)
        writer.write("val", np.arange(5), 5)
        writer.finish(FACTS, save_tokenizer)
    assert names(tmp_path / "data") == ["manifest.json", "tokenizer.json", "train.bin", "val.bin"]


@pytest.mark.skipif(os.name == "nt", reason="links require a privilege")
def test_lock_file_that_is_a_link_is_refused(refused, tmp_path):
    partial = interrupted(tmp_path / "data")
    (tmp_path / "victim").write_text("important")
    (partial / "lock").unlink()
    os.symlink(tmp_path / "victim", partial / "lock")
    with refused(OSError, f"data_dir={tmp_path / 'data'}", "symbolic links"):
        write(tmp_path / "data", facts={})
    assert (tmp_path / "victim").read_text() == "important"


@pytest.mark.parametrize("name", ["manifest.json", "train.bin", "val.bin", "tokenizer.json"])
def test_nothing_is_overwritten(refused, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with refused(ValueError, f"data_dir={tmp_path}", name, "data_dir to another folder"):
        write(tmp_path)
    assert names(tmp_path) == [name] and (tmp_path / name).read_text() == "mine"


def test_two_processes_that_prepare_at_once(tmp_path):
    """A lock, which ends with its process, excludes the second one."""
    script = (
        "import sys, numpy as np; from nanogpt_accel.data.token_files import Writer\n"
        "writer = Writer(sys.argv[1], np.uint16)\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(BlockingIOError, match=f"process {other.pid} on .* is preparing this folder") as caught:
            write(tmp_path)
        assert f"data_dir={tmp_path}" in str(caught.value) and not is_data_folder(tmp_path)
        assert token_files.find_active_process(tmp_path) == f"process {other.pid} on {platform.node()}"
        other.kill()
        other.wait()
        assert token_files.find_active_process(tmp_path) is None
    write(tmp_path)
    assert names(tmp_path) == ["manifest.json", "tokenizer.json", "train.bin", "val.bin"]


def test_a_writer_that_fails_releases_its_lock(refused, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(
            token_files.Writer, "_resume", lambda self: (_ for _ in ()).throw(OSError(5, "Input/output error"))
        )
        with refused(OSError, f"data_dir={tmp_path}", "Input/output error"):
            Writer(tmp_path, np.uint16)
    write(tmp_path)  # is not locked
    assert is_data_folder(tmp_path)


def test_a_folder_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").touch()
    with refused(OSError, f"data_dir={tmp_path / 'file' / 'data'}", "set data_dir"):
        Writer(tmp_path / "file" / "data", np.uint16)


# ---- reading


def test_rows(tmp_path):
    rng = np.random.default_rng(0)
    for dtype in (np.uint16, np.uint32):
        ids = rng.integers(0, np.iinfo(dtype).max, 5000, dtype=dtype, endpoint=True)
        ids.tofile(tmp_path / "x.bin")
        file = TokenFile(tmp_path / "x.bin", np.dtype(dtype).name)
        starts = rng.integers(0, 5000 - 64, 32)
        rows = file.rows(starts, 65)
        assert len(file) == 5000 and rows.shape == (32, 65) and rows.dtype == np.int64
        assert rows.tolist() == [ids[s : s + 65].tolist() for s in starts]
        assert file.rows([0, 4000], 1000).tolist() == [ids[:1000].tolist(), ids[4000:].tolist()]
        assert file.rows([], 8).shape == (0, 8)
        for start in (-1, 4937):
            with pytest.raises(AssertionError):
                file.rows([0, start], 64)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's count of resident pages")
def test_reading_keeps_memory_flat(tmp_path):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    np.zeros(2**25, dtype=np.uint16).tofile(tmp_path / "x.bin")  # 64 MiB
    file = TokenFile(tmp_path / "x.bin", "uint16")
    file.rows([0], 64)
    before = resident()
    for start in range(0, 2**25, 2**17):
        file.rows(range(start, start + 2**17, 2**11), 64)  # touches every page
    assert resident() - before < 2**23


def test_a_file_that_shrinks_amid_a_run(refused, tmp_path):
    for i in range(2):
        np.arange(1000, dtype=np.uint16).tofile(tmp_path / f"{i}.bin")
    file = TokenFile([tmp_path / "0.bin", tmp_path / "1.bin"], "uint16")
    os.truncate(tmp_path / "0.bin", 1999)
    assert file.rows([900, 1500], 50)[:, 0].tolist() == [900, 500]
    with refused(OSError, tmp_path / "0.bin", "truncated", "prepare it again"):
        file.rows([980], 50)


def test_many_shards_are_read_as_one_sequence(tmp_path):
    rng = np.random.default_rng(0)
    sizes = [1000, 1, 37, 0, 2500, 64, 700]
    parts = [rng.integers(0, 2**16, size).astype(np.uint16) for size in sizes]
    paths = [tmp_path / f"train-{i:05d}.bin" for i in range(len(parts))]
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
    """Create sparse files of zeros, which need no disk space."""
    folder.mkdir()
    paths = [folder / f"train-{i:05d}.bin" for i in range(files)]
    for path in paths:
        path.touch()
        os.truncate(path, n_bytes)
    return paths


def test_a_run_on_18_gb_starts_immediately(tmp_path):
    (path,) = sparse(tmp_path / "owt", 1, 18 * 10**9)
    assert path.stat().st_blocks < 1000, "the file of the test is sparse"
    from nanogpt_accel.batches import Batches

    start = time.process_time()
    batches = Batches(token_files.TokenFile(path, "uint16"), 1024, 12, 40, seed=1)
    assert batches(0, 0).shape == (12, 1025) and len(batches.tokens) == 9 * 10**9
    assert time.process_time() - start < 0.5


@pytest.mark.slow
def test_memory_stays_flat_over_ten_thousand_batches(tmp_path):
    paths = sparse(tmp_path / "many", 20, 2 * 10**8)
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
    )  # in a separate process, because the peak never decreases
    done = subprocess.run([sys.executable, "-c", script, *paths], env=ENV, capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 4e6
