"""tokens.py: files that nanoGPT could read, a manifest that can be believed, and nothing half done."""

import contextlib
import gc
import hashlib
import json
import os
import pickle
import platform
import subprocess
import sys

import numpy as np
import pytest

from nanogpt_accel.data import manifest
from nanogpt_accel.data import token_files as module
from nanogpt_accel.data.manifest import differences, is_data_folder, read_manifest, read_meta
from nanogpt_accel.data.token_files import TokenFile, Writer, token_paths

FACTS = {
    "corpus": {"kind": "files", "name": "input.txt"},
    "val_fraction": 0.1,
    "seed": None,
    "tokenizer": {"asked": "char", "kind": "char", "vocab_size": 9, "fingerprint": "f", "eot_id": None},
}


def save_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def write(folder, train=range(1000), val=(7, 8, 9), dtype=np.uint16, facts=FACTS, shard_tokens=10**8):
    """Write three documents for train and one for val, or what is left of that after an earlier attempt."""
    documents = [("train", part, len(part) * 2) for part in np.array_split(np.array(train), 3)]
    documents.append(("val", np.array(val), 3))
    with Writer(folder, dtype, facts, shard_tokens) as writer:
        if writer.is_finished:
            return read_manifest(folder)
        done = len(documents) if writer.position == "all" else writer.position
        for number, document in enumerate(documents[done:], done + 1):
            writer.write(*document)
            writer.commit(number)
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


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_whoever_is_told_to_stop_keeps_what_was_complete(tmp_path, error):
    """Up to the last commit(), though no time for one has come; a defect keeps nothing that was not committed."""
    with pytest.raises(error), Writer(tmp_path / "data", np.uint16, FACTS, 300) as writer:
        for number in range(4):
            writer.write("train", np.arange(200), 9)
            writer.commit(number + 1)
        writer.write("val", np.arange(5), 9)  # half of what comes next
        raise error
    assert not is_data_folder(tmp_path / "data")
    if error is RuntimeError:
        assert names(tmp_path) == [] and module.earlier_attempt(tmp_path / "data")[1] == 0
        return
    assert module.earlier_attempt(tmp_path / "data")[1] == 4
    with Writer(tmp_path / "data", np.uint16, FACTS, 300) as writer:
        assert (writer.position, writer.counts) == (4, {"train": {"tokens": 800, "bytes": 36, "documents": 4}})
        writer.write("val", np.arange(5), 9)
        writer.finish(FACTS, save_tokenizer)
    manifest = read_manifest(tmp_path / "data")
    files = token_paths(tmp_path / "data", manifest, "train")
    assert [*TokenFile(files, "uint16").rows([0], 800)[0]] == [*range(200)] * 4 and len(files) == 2


def test_a_folder_that_is_something_else(refused, tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "data" / name)
    with refused(FileNotFoundError, f"data_dir={tmp_path / 'data'}", "in it: a, b"):
        read_manifest(tmp_path / "data")
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "tokenizer.json").write_text("{}")  # a run has one, of its best checkpoint
    for text, words in (("data: {data_dir: data/a}", "its own are in data/a"), ("[", "data_dir of its run.yaml")):
        (run / "run.yaml").write_text(text)
        with pytest.raises(FileNotFoundError) as caught:
            read_manifest(run)
        message = str(caught.value)
        assert message.startswith(f"data_dir={run}: a run") and words in message and "delete" not in message
    with pytest.raises(ValueError, match="another data_dir$"):
        write(run)
    with refused(FileNotFoundError, "prepare them first"):
        read_manifest(tmp_path / "nothing")


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
    """What a machine that dies is here: nothing that comes after it happens."""


def die(monkeypatch, after):
    """The process dies at one of the calls that make something last: the one with this number."""

    def dying(real):
        def call(*args, **options):
            if next(left, None) is None:
                raise Dead
            return real(*args, **options)

        return call

    left = iter(range(after))
    for name in ("replace", "rename", "fsync", "truncate"):
        monkeypatch.setattr(module.os, name, dying(getattr(os, name)))
    monkeypatch.setattr(module.shutil, "rmtree", lambda *args, **options: None)  # a dead process cleans nothing up


@pytest.mark.parametrize("shard_tokens", [300, 10**8])
@pytest.mark.parametrize("commit_seconds", [0, 20])
def test_a_crash_at_any_point_leaves_work_that_can_be_finished(monkeypatch, tmp_path, commit_seconds, shard_tokens):
    monkeypatch.setattr(module, "COMMIT_SECONDS", commit_seconds)
    manifest = write(tmp_path / "whole", shard_tokens=shard_tokens)
    whole = {f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()}
    for point in range(99):
        folder = tmp_path / f"crash{point}"
        with monkeypatch.context() as patch:
            die(patch, after=point)
            try:
                write(folder, shard_tokens=shard_tokens)
            except Dead:
                assert not is_data_folder(folder), "half of it is never taken for data"
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
    """Whatever the number of files in place when the machine dies, they are not read as data, and another attempt that
    is made of other facts does not mix its files with them."""
    left, real = iter(range(moves)), os.replace

    def replace(source, target):  # of progress.json, of manifest.json in .partial, then the four moves
        if next(left, None) is None:
            raise Dead
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        patch.setattr(module.shutil, "rmtree", lambda *args, **options: None)
        with pytest.raises(Dead):
            write(tmp_path / "data")
    assert not is_data_folder(tmp_path / "data")
    other = FACTS | {"val_fraction": 0.2}
    if moves <= 2:  # nothing is in its place yet, and the remains are in nobody's way
        assert write(tmp_path / "data", facts=other)["val_fraction"] == 0.2
    else:
        has_tokens = moves > 3  # where none has moved yet, nobody is told to delete the folder
        with refused(
            ValueError if has_tokens else FileNotFoundError,
            f"data_dir={tmp_path / 'data'}",
            "delete" if has_tokens else "goes on where that stopped",
        ):
            read_manifest(tmp_path / "data")
        with refused(
            ValueError,
            f"data_dir={tmp_path / 'data'}",
            "tokenizer.json",
            "delete" if has_tokens else "take another data_dir",
        ):
            write(tmp_path / "data", facts=other)
        gc.collect()  # the Writer that was refused holds its lock as long as there is a trace of it
        assert write(tmp_path / "data")["val_fraction"] == 0.1  # the one that it is made of finds the rest


def test_a_crash_while_the_files_are_hashed_costs_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0)

    def dead(*args, **options):
        raise Dead

    with monkeypatch.context() as patch, pytest.raises(Dead):
        patch.setattr(module, "_sha256", dead)
        write(tmp_path, shard_tokens=300)  # train has three files, val one
    with Writer(tmp_path, np.uint16, FACTS, 300) as writer:
        assert writer.position == 4, "all four documents were committed"


def test_other_facts_begin_anew(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0)
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
def test_progress_that_cannot_be_believed_begins_anew(monkeypatch, tmp_path, damage):
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0)
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


@pytest.mark.parametrize("name", ["manifest.json", "train.bin", "val.bin", "tokenizer.json"])
def test_nothing_is_overwritten(refused, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with refused(ValueError, f"data_dir={tmp_path}", name, "another data_dir"):
        write(tmp_path)
    assert names(tmp_path) == [name] and (tmp_path / name).read_text() == "mine"


def test_two_processes_that_prepare_at_once(tmp_path):
    """One of them is kept out, by a lock that ends with the process that holds it."""
    script = (
        "import sys, numpy as np; from nanogpt_accel.data.token_files import Writer\n"
        "writer = Writer(sys.argv[1], np.uint16)\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=f"process {other.pid} on .* prepares it") as caught:
            write(tmp_path)
        assert f"data_dir={tmp_path}" in str(caught.value) and not is_data_folder(tmp_path)
        assert module.at_work(tmp_path) == f"process {other.pid} on {platform.node()}"
        other.kill()
        other.wait()
        assert module.at_work(tmp_path) is None
    write(tmp_path)
    assert names(tmp_path) == ["manifest.json", "tokenizer.json", "train.bin", "val.bin"]


def test_a_writer_that_cannot_begin_lets_go_of_the_folder(refused, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(module.Writer, "_continue", lambda self: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with refused(OSError, f"data_dir={tmp_path}", "Input/output error"):
            Writer(tmp_path, np.uint16)
    write(tmp_path)  # no lock stands in the way
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
    with refused(OSError, tmp_path / "0.bin", "shorter", "prepare it again"):
        file.rows([980], 50)


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


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        "\ud800",
        '{"version": 1, "dtype": "?", "splits": {}}',
        '{"version": 1, "dtype": "uint16", "splits": {"train": {"tokens": 1}}}',
    ],
)
def test_a_damaged_manifest(refused, tmp_path, content):
    write(tmp_path)
    (tmp_path / "manifest.json").write_text(content, errors="surrogatepass")
    with refused(ValueError, tmp_path / "manifest.json", "damaged", "prepare it again"):
        read_manifest(tmp_path)


def test_a_manifest_of_another_version(refused, tmp_path):
    manifest = write(tmp_path) | {"version": 3}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with refused(ValueError, "version 3", "version 2", "prepare it again"):
        read_manifest(tmp_path)


def test_a_manifest_of_version_1_is_still_read(tmp_path):
    manifest = write(tmp_path)
    old = json.loads(json.dumps(manifest)) | {"version": 1}  # it had one file for each split, and no list of them
    for counts in old["splits"].values():
        del counts["files"]
    (tmp_path / "manifest.json").write_text(json.dumps(old))
    assert read_manifest(tmp_path)["splits"] == manifest["splits"]
    assert token_paths(tmp_path, read_manifest(tmp_path), "val") == [tmp_path / "val.bin"]


@pytest.mark.parametrize("folder", ["", "missing"])
def test_no_token_files(refused, tmp_path, folder):
    with refused(FileNotFoundError, f"data_dir={tmp_path / folder}", "prepare them first"):
        read_manifest(tmp_path / folder)


def test_differences_name_the_keys_and_both_values():
    held = {"corpus": "input.txt", "tokenizer": "char", "val_fraction": 0.1}
    assert differences(held, {}, "data/x") == differences(held, held, "data/x") == []
    problems = differences(held, {"corpus": "python", "tokenizer": "gpt2", "val_fraction": 0.2}, "data/x")
    assert [problem.split(",")[0] for problem in problems] == ["corpus=python", "tokenizer=gpt2", "val_fraction=0.2"]
    assert all(
        "data_dir=data/x" in problem and str(value) in problem
        for problem, value in zip(problems, held.values(), strict=True)
    )


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
        "train": {
            "tokens": 100,
            "bytes": None,
            "documents": None,
            "sha256": sha256(nanogpt / "train.bin"),
            "files": [{"name": "train.bin", "tokens": 100}],
        },
        "val": {
            "tokens": 10,
            "bytes": None,
            "documents": None,
            "sha256": sha256(nanogpt / "val.bin"),
            "files": [{"name": "val.bin", "tokens": 10}],
        },
    }


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_nanogpt_folder_with_meta_is_char(nanogpt, protocol):
    (nanogpt / "meta.pkl").write_bytes(pickle.dumps(META, protocol))
    held = read_manifest(nanogpt)["tokenizer"]
    assert held == {"kind": "char", "vocab_size": 2, "eot_id": None, "stoi": STOI}


def test_large_files_are_hashed_in_part(nanogpt, monkeypatch):
    monkeypatch.setattr(manifest, "SAMPLED_ABOVE", 2**21)
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
    attacks = {
        "system": Calls(os.system, f"touch {mark}"),
        "open": Calls(open, str(mark), "w"),
        "exec": Calls(exec, f"open({str(mark)!r}, 'w')"),
        "getattr": Calls(getattr, os, "sep"),
    }
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


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"\x80\x05",
        b"(lp0\n.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x02Pid.",
        pickle.dumps([1, 2]),
        pickle.dumps({"stoi": {}}),
        pickle.dumps({"stoi": 3}),
        pickle.dumps({"vocab_size": 3}),
        pickle.dumps(META)[:-5],
    ],
)
def test_a_damaged_meta(refused, nanogpt, content):
    (nanogpt / "meta.pkl").write_bytes(content)
    with refused(ValueError, nanogpt / "meta.pkl", "prepare.py"):
        read_manifest(nanogpt)
