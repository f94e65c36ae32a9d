"""tokens.py: files that nanoGPT could read, a manifest that can be believed, and nothing half done."""

import hashlib
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from nanogpt_accel import tokens as module
from nanogpt_accel.tokens import TokenFile, Writer, differences, is_data_folder, read_manifest, read_meta

FACTS = {"corpus": {"kind": "files", "name": "input.txt"}, "val_fraction": 0.1, "seed": None,
         "tokenizer": {"asked": "char", "kind": "char", "vocab_size": 9, "fingerprint": "f", "eot_id": None}}


def save_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def write(folder, train=range(1000), val=(7, 8, 9), dtype=np.uint16, facts=FACTS):
    with Writer(folder, dtype) as writer:
        for part in np.array_split(np.array(train), 3):
            writer.write("train", part, len(part) * 2)
        writer.write("val", np.array(val), 3)
        return writer.finish(facts, save_tokenizer)


def names(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*"))


# ---- writing


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_the_files_are_nanogpts(tmp_path, dtype):
    folder = tmp_path / "a" / "b"
    manifest = write(folder, dtype=dtype)
    assert np.memmap(folder / "train.bin", dtype=dtype, mode="r").tolist() == list(range(1000))
    assert np.memmap(folder / "val.bin", dtype=dtype, mode="r").tolist() == [7, 8, 9]
    assert names(folder) == ["manifest.json", "tokenizer.json", "train.bin", "val.bin"]
    assert names(tmp_path) == ["a", "a/b", *[f"a/b/{name}" for name in names(folder)]]
    assert read_manifest(folder) == manifest == FACTS | {
        "version": 1, "dtype": np.dtype(dtype).name, "splits": {
            "train": {"tokens": 1000, "bytes": 2000, "documents": 3, "sha256": sha256(folder / "train.bin")},
            "val": {"tokens": 3, "bytes": 3, "documents": 1, "sha256": sha256(folder / "val.bin")}}}


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


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


def test_a_tokenizer_that_cannot_be_saved(refused, tmp_path):
    def fail(folder):
        raise OSError(28, "No space left on device")

    with refused(OSError, f"data_dir={tmp_path / 'data'}", "No space left on device", "set data_dir"), \
            Writer(tmp_path / "data", np.uint16) as writer:
        writer.finish(FACTS, fail)
    assert names(tmp_path) == []


def test_a_disk_that_fills_up(tmp_path):
    """A limit on the size of files fails like a full disk: in write() or, later, in the flush."""
    code = ("import resource, sys, numpy as np; from nanogpt_accel import cli, tokens\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
            "def command(argv):\n"
            "    with tokens.Writer(argv[0], np.uint16) as writer:\n"
            "        for _ in range(int(argv[1])):\n"
            "            writer.write('train', np.arange(25_001), 1)\n"
            "        writer.finish({}, lambda folder: None)\n"
            "sys.exit(cli.run(command, sys.argv[1:]))\n")
    for count in ("1", "9"):
        command = [sys.executable, "-c", code, tmp_path / "data", count]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "File too large" in done.stderr and "set data_dir" in done.stderr
        assert names(tmp_path) == []


@pytest.mark.parametrize("moves", range(4))
def test_a_crash_between_the_moves_is_never_taken_for_data(refused, monkeypatch, tmp_path, moves):
    """Whatever the number of files in place when the machine dies, they are not read as data."""
    class Dead(BaseException):
        pass

    def replace(source, target):
        if next(left, None) is None:
            raise Dead
        real(source, target)

    left, real = iter(range(moves)), os.replace
    monkeypatch.setattr(os, "replace", replace)
    # a dead process cleans nothing up
    monkeypatch.setattr(module.shutil, "rmtree", lambda *args, **options: None)
    with pytest.raises(Dead):
        write(tmp_path / "data")
    monkeypatch.undo()
    assert not is_data_folder(tmp_path / "data")
    if moves == 0:
        write(tmp_path / "data")  # the remains of the other attempt are in nobody's way
        assert is_data_folder(tmp_path / "data")
    else:
        with refused(ValueError, f"data_dir={tmp_path / 'data'}", "delete"):
            read_manifest(tmp_path / "data")
        with refused(ValueError, f"data_dir={tmp_path / 'data'}", "tokenizer.json", "delete"):
            write(tmp_path / "data")


@pytest.mark.parametrize("name", ["manifest.json", "train.bin", "val.bin", "tokenizer.json"])
def test_nothing_is_overwritten(refused, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with refused(ValueError, f"data_dir={tmp_path}", name, "another data_dir"):
        write(tmp_path)
    assert names(tmp_path) == [name] and (tmp_path / name).read_text() == "mine"


def test_two_processes_that_prepare_at_once(refused, tmp_path):
    with Writer(tmp_path, np.uint16) as slow, Writer(tmp_path, np.uint16) as other:
        manifest = write(tmp_path)
        for part in np.array_split(np.arange(1000), 3):
            slow.write("train", part, len(part) * 2)
        slow.write("val", np.array([7, 8, 9]), 3)
        assert slow.finish(FACTS, save_tokenizer) == manifest  # the same: no harm
        other.write("train", np.arange(9), 9)
        with refused(ValueError, "manifest.json", "another data_dir"):
            other.finish(FACTS, save_tokenizer)
    assert read_manifest(tmp_path) == manifest
    assert names(tmp_path) == ["manifest.json", "tokenizer.json", "train.bin", "val.bin"]


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


# ---- manifests


def test_truncated_files(refused, tmp_path):
    write(tmp_path)
    with open(tmp_path / "train.bin", "r+b") as file:
        file.truncate(1998)
    with refused(ValueError, tmp_path / "train.bin", "1,998 bytes", "2,000", "1,000 tokens", "delete"):
        read_manifest(tmp_path)
    (tmp_path / "train.bin").unlink()
    with refused(ValueError, tmp_path / "train.bin", "0 bytes", "prepare it again"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", [
    "", "{", "[]", "{}", "\ud800", '{"version": 1, "dtype": "?", "splits": {}}',
    '{"version": 1, "dtype": "uint16", "splits": {"train": {"tokens": 1}}}'])
def test_a_damaged_manifest(refused, tmp_path, content):
    write(tmp_path)
    (tmp_path / "manifest.json").write_text(content, errors="surrogatepass")
    with refused(ValueError, tmp_path / "manifest.json", "damaged", "prepare it again"):
        read_manifest(tmp_path)


def test_a_manifest_of_another_version(refused, tmp_path):
    manifest = write(tmp_path) | {"version": 2}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with refused(ValueError, "version 2", "version 1", "prepare it again"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("folder", ["", "missing"])
def test_no_token_files(refused, tmp_path, folder):
    with refused(FileNotFoundError, f"data_dir={tmp_path / folder}", "prepare them first"):
        read_manifest(tmp_path / folder)


def test_differences_name_the_keys_and_both_values(tmp_path):
    manifest = write(tmp_path)
    assert differences(manifest, tmp_path) == []
    assert differences(manifest, tmp_path, corpus="input.txt", tokenizer="char", val_fraction=0.1) == []
    problems = differences(manifest, "data/x", corpus="python", tokenizer="gpt2", val_fraction=0.2)
    assert [p.split(",")[0] for p in problems] == ["corpus=python", "tokenizer=gpt2", "val_fraction=0.2"]
    values = ("corpus=input.txt", "tokenizer=char", "val_fraction=0.1")
    for problem, held in zip(problems, values, strict=True):
        assert f"data_dir=data/x was prepared with {held}: leave" in problem and "another data_dir" in problem


# ---- nanoGPT's folders


@pytest.fixture
def nanogpt(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(10, dtype=np.uint16).tofile(tmp_path / "val.bin")
    return tmp_path


STOI = {"a": 0, "b": 1}
META = {"vocab_size": 2, "itos": {0: "a", 1: "b"}, "stoi": STOI}


def test_a_nanogpt_folder_without_meta_is_gpt2(nanogpt):
    manifest = read_manifest(nanogpt)
    assert manifest["nanogpt"] and manifest["dtype"] == "uint16"
    assert manifest["tokenizer"] == {"kind": "gpt2", "vocab_size": 50257, "eot_id": 50256}
    assert manifest["splits"] == {
        "train": {"tokens": 100, "bytes": None, "documents": None, "sha256": sha256(nanogpt / "train.bin")},
        "val": {"tokens": 10, "bytes": None, "documents": None, "sha256": sha256(nanogpt / "val.bin")}}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_nanogpt_folder_with_meta_is_char(nanogpt, protocol):
    (nanogpt / "meta.pkl").write_bytes(pickle.dumps(META, protocol))
    held = read_manifest(nanogpt)["tokenizer"]
    assert held == {"kind": "char", "vocab_size": 2, "eot_id": None, "stoi": STOI}


def test_large_files_are_hashed_in_part(nanogpt, monkeypatch):
    monkeypatch.setattr(module, "SAMPLED_ABOVE", 2**21)
    seen = set()
    for place in (None, 0, 2**21, 2**22 - 1):  # unchanged, the head, the middle, the tail
        ids = np.zeros(2**21, dtype=np.uint16)
        if place is not None:
            ids.view(np.uint8)[place] = 1
        ids.tofile(nanogpt / "train.bin")
        digest = read_manifest(nanogpt)["splits"]["train"]["sha256"]
        assert digest.startswith("sampled:")
        seen.add(digest)
    assert len(seen) == 3, "head and tail count, the middle does not"
    assert read_manifest(nanogpt)["splits"]["val"]["sha256"] == sha256(nanogpt / "val.bin")


def test_an_odd_size(refused, nanogpt):
    (nanogpt / "val.bin").write_bytes(b"123")
    with refused(ValueError, nanogpt / "val.bin", "3 bytes", "16-bit", "prepare.py"):
        read_manifest(nanogpt)


class Calls:
    """Pickles as a call of what it is given."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_hostile_meta_runs_nothing(refused, nanogpt, protocol):
    mark = nanogpt / "executed"
    attacks = {"system": Calls(os.system, f"touch {mark}"), "open": Calls(open, str(mark), "w"),
               "exec": Calls(exec, f"open({str(mark)!r}, 'w')"), "getattr": Calls(getattr, os, "sep")}
    for name, attack in attacks.items():
        for content in (attack, META | {"extra": [attack]}):
            try:
                raw = pickle.dumps(content, protocol)
            except TypeError:  # a module does not pickle: spell the attack out
                raw = b"c__builtin__\ngetattr\n(cos\nX\x03\x00\x00\x00septR."
            (nanogpt / "meta.pkl").write_bytes(raw)
            with refused(ValueError, nanogpt / "meta.pkl", name, "asks for", "prepare.py"):
                read_manifest(nanogpt)
            assert not mark.exists()
    pickle.loads(pickle.dumps(attacks["open"], protocol)).close()
    assert mark.exists(), "the attack would have worked"


def test_a_meta_with_numpy_values_is_refused_too(refused, nanogpt):
    (nanogpt / "meta.pkl").write_bytes(pickle.dumps(META | {"vocab_size": np.int64(2)}))
    with refused(ValueError, "meta.pkl", "numpy"):
        read_meta(nanogpt / "meta.pkl")


@pytest.mark.parametrize("content", [
    b"", b"hello", b"\x80\x05", b"(lp0\n.", b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.", b"\x80\x02Pid.",
    pickle.dumps([1, 2]), pickle.dumps({"stoi": {}}), pickle.dumps({"stoi": 3}),
    pickle.dumps({"vocab_size": 3}), pickle.dumps(META)[:-5]])
def test_a_damaged_meta(refused, nanogpt, content):
    (nanogpt / "meta.pkl").write_bytes(content)
    with refused(ValueError, nanogpt / "meta.pkl", "prepare.py"):
        read_manifest(nanogpt)
