"""manifest.py: damaged manifests and token files, and nanoGPT's folders."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_files import TEXTS, error_line, expect, sha256, small_corpus_and_recipe, write

from nanogpt_accel.__main__ import main
from nanogpt_accel.data import dataset, prepare, token_files
from nanogpt_accel.data import manifest as manifests
from nanogpt_accel.data.manifest import read_manifest
from nanogpt_accel.data.meta import read_meta
from nanogpt_accel.data.token_files import token_file
from nanogpt_accel.recipe import SECTIONS


def test_a_folder_that_is_something_else(refused, tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "data" / name)
    with refused(FileNotFoundError, f"data_dir={tmp_path / 'data'}", "in it: a, b"):
        read_manifest(tmp_path / "data")
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "tokenizer.json").write_text("{}")  # a run folder has the tokenizer of its best checkpoint
    for text, words in (("data: {data_dir: data/a}", "its data_dir data/a"), ("[", "data_dir of its run.yaml")):
        (run / "run.yaml").write_text(text)
        with pytest.raises(FileNotFoundError) as caught:
            read_manifest(run)
        message = str(caught.value)
        assert message.startswith(f"data_dir={run}: a run") and words in message and "delete" not in message
    with pytest.raises(ValueError, match="data_dir to another folder$"):
        write(run)
    with refused(FileNotFoundError, "prepare the data first"):
        read_manifest(tmp_path / "nothing")


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
    with refused(ValueError, "version 3", "versions 1 and 2", "prepare it again"):
        read_manifest(tmp_path)


def test_a_manifest_of_version_1_is_still_read(tmp_path):
    manifest = write(tmp_path)
    old = json.loads(json.dumps(manifest)) | {"version": 1}  # one file per split, and no list of files
    for counts in old["splits"].values():
        del counts["files"]
    (tmp_path / "manifest.json").write_text(json.dumps(old))
    assert read_manifest(tmp_path)["splits"] == manifest["splits"]
    assert token_file(tmp_path, read_manifest(tmp_path), "val").paths == [tmp_path / "val.bin"]


@pytest.mark.parametrize("folder", ["", "missing"])
def test_no_token_files(refused, tmp_path, folder):
    with refused(FileNotFoundError, f"data_dir={tmp_path / folder}", "prepare the data first"):
        read_manifest(tmp_path / folder)


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
    monkeypatch.setattr(manifests, "SAMPLED_ABOVE", 2**21)
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
    with refused(ValueError, nanogpt / "val.bin", "3 bytes cannot be uint16 ids", "restore the file"):
        read_manifest(nanogpt)


class Calls:
    """An object that is pickled as a call of a function."""

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
            except TypeError:  # a module cannot be pickled: write this attack as bytes
                raw = b"c__builtin__\ngetattr\n(cos\nX\x03\x00\x00\x00septR."
            (nanogpt / "meta.pkl").write_bytes(raw)
            with refused(ValueError, nanogpt / "meta.pkl", name, "contains", "prepare.py"):
                read_manifest(nanogpt)
            assert not mark.exists()
    pickle.loads(pickle.dumps(attacks["open"], protocol)).close()
    assert mark.exists(), "the attack would have worked"


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_meta_with_numpy_numbers(refused, nanogpt, protocol):
    """np.unique and max() return NumPy numbers, and nanoGPT accepts them in meta.pkl."""
    for content, expected in (
        ({"vocab_size": np.int64(2)}, 2),
        ({"vocab_size": np.uint16(7)}, 7),
        ({"stoi": {c: np.int32(i) for i, c in enumerate("ab")}}, STOI),
        ({"itos": list(np.unique(["a", "b"]))}, STOI),
    ):
        (nanogpt / "meta.pkl").write_bytes(pickle.dumps(content, protocol))
        assert read_meta(nanogpt / "meta.pkl") == expected
    for value in (np.float64(2), np.arange(2), np.datetime64("2026-01-01"), np.array([{}])[0:1]):
        (nanogpt / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": value}, protocol))
        with refused(ValueError, "meta.pkl", "prepare.py"):
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
        pickle.dumps({"vocab_size": 0}),
        pickle.dumps({"vocab_size": True}),
        pickle.dumps({"vocab_size": 10**12}),
        pickle.dumps({"stoi": {"a": 0, "b": 2}}),
        pickle.dumps({"stoi": {"a": 0, "b": True}}),
        pickle.dumps({"stoi": {1: 0, "1": 1}}),
        pickle.dumps({"itos": ["a", "a"]}),
        pickle.dumps(META)[:-5],
    ],
)
def test_a_damaged_meta(refused, nanogpt, content):
    (nanogpt / "meta.pkl").write_bytes(content)
    with refused(ValueError, nanogpt / "meta.pkl", "prepare.py"):
        read_manifest(nanogpt)


# ---- a prepared folder that was damaged, seen from the commands


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_corpus_and_recipe()
    return tmp_path


DAMAGE = {  # name -> (the key in the message, the change)
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
def out(sound, work):
    return Path(shutil.copytree(sound, "out"))


def test_a_manifest_of_the_wrong_shape(capsys, out):
    sound = (out / "manifest.json").read_text()
    for name, (key, change) in DAMAGE.items():
        manifest = json.loads(sound)
        change(manifest)
        (out / "manifest.json").write_text(json.dumps(manifest))
        for command, target in (("prepare", "r.yaml"), ("data", "out"), ("train", "r.yaml")):
            line = error_line(capsys, command=command, target=target)
            expect(line, "out/manifest.json: damaged", f" {key}: ", "delete the folder and prepare it again")
        assert not Path("run").exists(), name
    (out / "manifest.json").write_text("[" * 200_000)
    expect(error_line(capsys), "out/manifest.json: damaged", "prepare it again")
    (out / "manifest.json").write_text(sound)
    assert main(["data", "out"]) == 0


def test_content_that_changed_at_the_same_size(capsys, out):
    ids = np.fromfile(out / "val.bin", "<u2")
    ids[7] = (ids[7] + 1) % 5
    ids.tofile(out / "val.bin")
    for command, target in (("prepare", "r.yaml"), ("data", "out"), ("train", "r.yaml")):
        expect(error_line(capsys, command=command, target=target), "out/val.bin", "changed since", "prepare it again")


def test_large_files_are_verified_by_the_data_command(capsys, monkeypatch, out):
    monkeypatch.setattr(manifests, "VERIFIED_BELOW", 0)
    ids = np.fromfile(out / "train.bin", "<u2")
    ids[7] = (ids[7] + 1) % 5
    ids.tofile(out / "train.bin")
    assert main(["prepare", "r.yaml", "corpus=x.jsonl"]) == 0
    expect(error_line(capsys, command="data", target="out"), "out/train.bin", "changed since")


@pytest.mark.parametrize("verified", [0, 2**26])
def test_ids_outside_of_the_vocabulary(capsys, monkeypatch, out, verified):
    monkeypatch.setattr(manifests, "VERIFIED_BELOW", verified)
    ids = np.fromfile(out / "train.bin", "<u2")
    ids[-1] = 60_000
    ids.tofile(out / "train.bin")
    line = error_line(capsys, command="train")
    expect(line, "out/train.bin", "prepare it again", *([] if verified else ["60,000", "vocabulary size"]))


@pytest.mark.usefixtures("work")
def test_a_nanogpt_folder_of_another_tokenizers_ids(capsys, gpt2_files):
    Path("out").mkdir()
    for name in ("train.bin", "val.bin"):
        np.array([0, 50256, 50257] * 9, "<u2").tofile(f"out/{name}")
    expect(
        error_line(capsys, command="train"), "tokenizer=char: data_dir=out contains token ids, but no meta.pkl", "gpt2"
    )
    for command, target, words in (("train", "r.yaml", ["tokenizer=gpt2"]), ("data", "out", [])):
        expect(
            error_line(capsys, *words, command=command, target=target),
            "out/train.bin",
            "vocabulary size 50,257",
            "set tokenizer to the folder of the tokenizer.json",
        )


@pytest.mark.parametrize("length", [1, 63, 64, 640, 6400, 6399])
@pytest.mark.usefixtures("work")
def test_the_places_that_are_checked(monkeypatch, length):
    """The check reads the first, the last and evenly spaced places of a split, or all of a short split."""
    monkeypatch.setattr(manifests, "CHECKED_TOKENS", 10)
    Path("out").mkdir()
    manifest = {
        "nanogpt": True,
        "dtype": "uint16",
        "splits": {"train": {"files": [{"name": "train.bin", "tokens": length}]}},
    }
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
        expect(error_line(capsys, command=command), "data_dir=out", "train.bin", "data_dir to another folder")
    (out / "val.bin").unlink()
    (out / "tokenizer.json").unlink()
    expect(error_line(capsys), "data_dir=out", "contains train.bin", "data_dir to another folder")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tokenizer.json", None, ["out/tokenizer.json: missing"]),
        ("tokenizer.json", "", ["out/tokenizer.json: not a tokenizer.json"]),
        ("tokenizer.json", "another's", ["out/tokenizer.json: the token files were made with another tokenizer"]),
        ("tokenizer_config.json", "{", ["out/tokenizer_config.json: not JSON"]),
        ("tokenizer_config.json", "[" * 200_000, ["out/tokenizer_config.json: not JSON"]),
        (
            "tokenizer_config.json",
            '{"eos_token": "0"}',
            ["out/tokenizer.json: the token files were made with another tokenizer"],
        ),
    ],
)
def test_another_or_a_damaged_tokenizer(capsys, out, name, text, words):
    if text == "another's":
        dataset.Tokenizer.char(["abc"]).save(out)
    elif text is None:
        (out / name).unlink()
    else:
        (out / name).write_text(text)
    for command, target in (("prepare", "r.yaml"), ("train", "r.yaml"), ("data", "out")):
        line = error_line(capsys, command=command, target=target)
        expect(line, *words, "prepare it again")
        assert name == "tokenizer.json" or "eos_token" in text or "tokenizer.json" not in line
