"""dataset.py and prepare.py: from a recipe's data section to token files, against nanoGPT's own algorithm."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nanogpt_accel.commands import prepare as command
from nanogpt_accel.data import dataset, encoding
from nanogpt_accel.data.dataset import check, data_folder, is_prepared, open_dataset, require_block
from nanogpt_accel.data.prepare import prepare
from nanogpt_accel.data.tokenizer import Tokenizer
from nanogpt_accel.recipe import SECTIONS, Data
from nanogpt_accel.utils import cli


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """The default data folders lie below the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def notes(work):
    """Twelve documents of different length."""
    folder = work / "notes"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02}.txt").write_text(f"note {i}: " + "so it goes. " * i)
    return folder


def raw(file):
    return b"".join(path.read_bytes() for path in file.paths)


def ids(file):
    return np.frombuffer(raw(file), dtype=file.dtype).tolist()


def prepared(data, report=lambda line: None):
    prepare(data, report)
    return open_dataset(data)


# ---- a single text


def test_shakespeare_char_is_nanogpts(shakespeare):
    # data/shakespeare_char/prepare.py
    data = shakespeare.read_bytes().decode()
    chars = sorted(list(set(data)))
    stoi = {ch: i for i, ch in enumerate(chars)}
    n = len(data)
    train_ids = np.array([stoi[c] for c in data[: int(n * 0.9)]], dtype=np.uint16)
    val_ids = np.array([stoi[c] for c in data[int(n * 0.9) :]], dtype=np.uint16)

    ours = prepared(Data(corpus=str(shakespeare), tokenizer="char", val_fraction=0.1))
    assert ours.train.paths[0].read_bytes() == train_ids.tobytes()
    assert ours.val.paths[0].read_bytes() == val_ids.tobytes()
    assert (len(ours.train), len(ours.val), ours.tokenizer.vocab_size) == (1_003_854, 111_540, 65)
    splits = ours.manifest["splits"]
    assert [splits[s]["bytes"] for s in splits] == [1_003_854, 111_540]
    assert splits["val"]["sha256"] == hashlib.sha256(val_ids.tobytes()).hexdigest()
    assert ours.manifest["corpus"]["bytes"] == 1_115_394 and ours.manifest["split_seed"] is None


def test_shakespeare_gpt2_is_nanogpts(shakespeare, gpt2_files):
    import tiktoken

    data = shakespeare.read_bytes().decode()
    enc = tiktoken.get_encoding("gpt2")
    ours = prepared(Data(corpus=str(shakespeare), tokenizer="gpt2", val_fraction=0.1))
    assert ids(ours.train) == enc.encode_ordinary(data[: int(len(data) * 0.9)])
    assert ids(ours.val) == enc.encode_ordinary(data[int(len(data) * 0.9) :])
    assert (len(ours.train), len(ours.val)) == (301_966, 36_059)


@pytest.mark.parametrize("text", ["ж€𝄞" * 10, "a\r\nb\r<|endoftext|>" * 5])
def test_any_single_text(work, text):
    (work / "x.txt").write_bytes(text.encode())
    for tokenizer in ("char", "bpe"):
        ours = prepared(Data(corpus="x.txt", tokenizer=tokenizer, vocab_size=300, val_fraction=0.25))
        cut = int(len(text) * 0.75)
        assert ours.tokenizer.decode(ids(ours.train)) == text[:cut]
        assert ours.tokenizer.decode(ids(ours.val)) == text[cut:]
        splits = ours.manifest["splits"]
        assert [splits[s]["bytes"] for s in splits] == [len(text[:cut].encode()), len(text[cut:].encode())]
        assert ours.tokenizer.eot_id not in ids(ours.train)


@pytest.mark.parametrize(("text", "val_fraction", "split"), [("abc", 0.9, "train"), ("a", 0.5, "train")])
def test_a_text_too_short_to_cut(refused, work, text, val_fraction, split):
    (work / "x.txt").write_text(text)
    data = Data(corpus="x.txt", tokenizer="char", val_fraction=val_fraction)
    with refused(ValueError, "corpus=x.txt", f"nothing for {split}", f"val_fraction={val_fraction}"):
        prepare(data)
    assert not data_folder(data).exists()


# ---- documents


def dealt(texts, val_fraction):
    """The rule in words: blake2b of "SEED INDEX" as a fraction of 2**64, below val_fraction is val."""
    share = [
        int.from_bytes(hashlib.blake2b(f"2357 {i}".encode(), digest_size=8).digest(), "big") / 2**64
        for i in range(len(texts))
    ]
    val = {i for i in range(len(texts)) if share[i] < val_fraction}
    if not val:
        val = {min(range(len(texts)), key=share.__getitem__)}
    if len(val) == len(texts):
        val.remove(max(range(len(texts)), key=share.__getitem__))
    return [t for i, t in enumerate(texts) if i not in val], [t for i, t in enumerate(texts) if i in val]


@pytest.mark.parametrize("val_fraction", [1e-6, 0.3, 0.5, 0.999999])
@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_documents_are_dealt_out_whole_and_end_with_eot(notes, tokenizer, val_fraction):
    texts = [f.read_text() for f in sorted(notes.iterdir())]
    ours = prepared(Data(corpus="notes", tokenizer=tokenizer, vocab_size=300, val_fraction=val_fraction))
    eot, encode = ours.tokenizer.eot_id, ours.tokenizer.encode
    assert eot == ours.tokenizer.vocab_size - 1
    for file, part in zip((ours.train, ours.val), dealt(texts, val_fraction), strict=True):
        assert part
        assert ids(file) == [i for text in part for i in [*encode(text).tolist(), eot]]
        counts = ours.manifest["splits"][file.paths[0].stem]
        assert counts["documents"] == len(part) and counts["bytes"] == sum(len(t.encode()) for t in part)


def test_documents_of_gpt2(notes, gpt2_files):
    import tiktoken

    enc = tiktoken.get_encoding("gpt2")
    train, val = dealt([f.read_text() for f in sorted(notes.iterdir())], 0.3)
    ours = prepared(Data(corpus="notes", tokenizer="gpt2", val_fraction=0.3))
    for file, part in ((ours.train, train), (ours.val, val)):  # data/openwebtext/prepare.py
        assert ids(file) == [i for text in part for i in [*enc.encode_ordinary(text), enc.eot_token]]


def test_the_result_does_not_depend_on_chunks(notes, monkeypatch):
    hashes = set()
    for size in (1, 50, 2**20):
        monkeypatch.setattr(encoding, "CHUNK", size)
        ours = prepared(Data(corpus="notes", tokenizer="bpe", val_fraction=0.3, data_dir=f"chunk{size}"))
        hashes.add(json.dumps([ours.manifest["splits"], ours.tokenizer.fingerprint]))
    assert len(hashes) == 1


def test_empty_documents_do_not_count(notes):
    data = Data(corpus="notes", tokenizer="char", val_fraction=0.3)
    before = prepared(data)
    (notes / "01 empty.txt").touch()
    after = prepared(data)
    assert after.folder != before.folder
    assert after.manifest["splits"] == before.manifest["splits"]


def test_one_document_cannot_be_split(refused, notes):
    for file in sorted(notes.iterdir())[1:]:
        file.write_text("")
    for tokenizer in ("char", "bpe"):
        data = Data(corpus="notes", tokenizer=tokenizer)
        with refused(ValueError, "corpus=notes", "one document"):
            prepare(data, print)
        assert not data_folder(data).exists()


def test_python_corpus_offline():
    ours = prepared(Data(corpus="python", tokenizer="char", val_fraction=0.05))
    assert len(ours.train) > 5_000_000 and 0.02 < len(ours.val) / len(ours.train) < 0.1
    assert ours.folder.name.startswith(f"python-{ours.manifest['corpus']['revision']}_char-")


# ---- folders


def test_every_key_that_decides_the_tokens_has_its_folder(notes):
    base = {"corpus": "notes", "tokenizer": "bpe", "vocab_size": 300, "val_fraction": 0.1}
    changes = [{}, {"vocab_size": 301}, {"val_fraction": 0.2}, {"tokenizer": "char"}, {"corpus": "notes/01.txt"}]
    folders = [data_folder(Data(**base | change)) for change in changes]
    assert len(set(folders)) == len(folders)
    assert folders[0].parent == Path("data") and folders[0].name.startswith("notes_bpe300-")
    # not what leaves the tokens as they are: the sampling, vocab_size without a bpe
    assert data_folder(Data(**base, sampling="random")) == folders[0]
    char = base | {"tokenizer": "char"}
    assert data_folder(Data(**char | {"vocab_size": 999})) == folders[3]


def test_a_changed_corpus_gets_a_new_folder(notes):
    data = Data(corpus="notes", tokenizer="char", val_fraction=0.3)
    before = prepared(data)
    assert is_prepared(data)
    (notes / "00.txt").write_text("something else")
    assert not is_prepared(data)
    assert prepared(data).folder != before.folder and before.folder.is_dir()


def test_prepare_twice_writes_once(notes):
    data, lines = Data(corpus="notes", tokenizer="char", val_fraction=0.3), []
    folder = prepare(data, lines.append)
    assert len(lines) == 2 and str(folder) in lines[1] and lines[1].endswith("B/s)")
    times = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    assert prepare(data, lines.append) == folder and len(lines) == 2
    assert times == {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}


def test_long_work_reports_its_progress(notes, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", 50)
    clock = iter(range(0, 10_000, 3))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    lines = []
    data = Data(corpus="notes", tokenizer="bpe", vocab_size=300, val_fraction=0.3)
    assert dataset.ready(data, True, lines.append).folder == data_folder(data)
    assert lines[:2] == ["corpus=notes: 12 files to read", "training a BPE of 300 symbols on notes"]
    lines = [line for line in lines[2:-1] if "symbols only" not in line]
    assert len(lines) > 3 and all("document" in line and "B/s" in line for line in lines)


def test_the_command_reports_its_progress(recipe, capsys, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", 50)
    clock = iter(range(0, 10_000, 3))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    command.main([recipe])
    assert capsys.readouterr().out.count(" documents (") > 3


def test_plain_attributes_are_enough(notes):
    section = SECTIONS["data"](corpus="notes", tokenizer="char", data_dir="here", val_fraction=0.3)
    data = SimpleNamespace(**section.model_dump())
    assert check(data) == []
    assert prepared(data).folder == Path("here")
    assert check(data) == check(section) == []
    other = {"tokenizer": "bpe", "corpus": "python"}
    assert len(check(SimpleNamespace(**vars(data) | other))) == len(check(section.model_copy(update=other))) == 2


def test_a_tokenizer_folder(refused, notes):
    first = prepared(Data(corpus="notes", tokenizer="bpe", vocab_size=300, val_fraction=0.3))
    data = Data(corpus="notes", tokenizer=str(first.folder), val_fraction=0.3)
    again = prepared(data)
    assert again.folder != first.folder and again.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert ids(again.train) == ids(first.train)
    # the same content in another place is the same tokenizer
    shutil.copytree(first.folder, "elsewhere")
    elsewhere = data.model_copy(update={"tokenizer": "elsewhere"})
    assert data_folder(elsewhere).name.split("-")[-1] == data_folder(data).name.split("-")[-1]
    # one without an end-of-text cannot keep documents apart, and one without a symbol cannot read them
    Path("single").mkdir()
    Tokenizer.char([(notes / "01.txt").read_text()]).save("single")
    with refused(ValueError, "tokenizer=single", "end-of-text", "corpus=notes"):
        prepare(Data(corpus="notes", tokenizer="single"))
    (notes / "z.md").write_text("€" * 10)
    with refused(ValueError, "'€' (U+20AC)"):
        prepare(Data(corpus="notes/z.md", tokenizer="single", val_fraction=0.3))


# ---- an explicit data_dir


@pytest.fixture
def mine(notes):
    """A prepared folder whose corpus is gone."""
    data = Data(corpus="notes", tokenizer="bpe", vocab_size=300, val_fraction=0.3, data_dir="mine")
    prepared(data)
    shutil.rmtree(notes)
    return data


def test_data_dir_does_not_need_its_corpus(mine, monkeypatch):
    monkeypatch.setattr(dataset, "find_corpus", lambda spec: pytest.fail("the corpus was touched"))
    for data in (mine, Data(data_dir="mine"), Data(data_dir="mine", corpus="somewhere/else/notes/")):
        assert check(data, block_size=8) == [] and is_prepared(data)
        assert prepare(data) == Path("mine")
        assert open_dataset(data).folder == Path("mine")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"corpus": "python"}, ["corpus=python", "corpus=notes"]),
        ({"tokenizer": "char"}, ["tokenizer=char", "tokenizer=bpe vocab_size=300"]),
        ({"vocab_size": 400}, ["tokenizer=bpe vocab_size=400", "tokenizer=bpe vocab_size=300"]),
        ({"val_fraction": 0.1}, ["val_fraction=0.1", "val_fraction=0.3"]),
    ],
)
def test_data_dir_that_holds_something_else(refused, mine, change, words):
    data = mine.model_copy(update=change)
    (problem,) = check(data)
    assert all(word in problem for word in words) and "data_dir=mine" in problem
    with refused(ValueError, *words, "data_dir=mine"):
        open_dataset(data)


def test_a_changed_tokenizer_in_the_data_folder(refused, mine):
    Tokenizer.char(["abc"]).save("mine")
    with refused(ValueError, Path("mine/tokenizer.json"), "prepare it again"):
        open_dataset(mine)


def test_a_truncated_data_folder(refused, mine):
    with open("mine/train.bin", "ab") as file:
        file.write(b"1")
    (problem,) = check(mine)
    assert "mine/train.bin" in problem and "prepare it again" in problem
    with refused(ValueError, "mine/train.bin", "prepare it again"):
        open_dataset(mine)


def test_not_prepared(refused, notes):
    with refused(FileNotFoundError, "data_dir=there", "prepare"):
        open_dataset(Data(corpus="notes", data_dir="there"))


@pytest.mark.parametrize("meta", [True, False])
def test_a_nanogpt_folder_is_used_as_it_is(request, refused, work, meta):
    if not meta:
        request.getfixturevalue("gpt2_files")
    folder = work / "shakespeare_char"
    folder.mkdir()
    text = "hello world, " * 20 if meta else "Hello world<|endoftext|>" * 60
    chars = sorted(set(text))
    stoi = {c: i for i, c in enumerate(chars)}
    rows = [stoi[c] for c in text] if meta else [15496, 995, 50256] * 60
    np.array(rows, dtype=np.uint16).tofile(folder / "train.bin")
    np.array(rows[:99], dtype=np.uint16).tofile(folder / "val.bin")
    if meta:
        content = {"vocab_size": len(chars), "stoi": stoi, "itos": dict(enumerate(chars))}
        (folder / "meta.pkl").write_bytes(pickle.dumps(content))
    before = sorted(f.name for f in folder.iterdir())
    data = Data(corpus="no such corpus", tokenizer="bpe", data_dir=str(folder))
    assert check(data) == [] and is_prepared(data) and prepare(data) == folder
    ours = open_dataset(data)
    assert ours.tokenizer.kind == ("char" if meta else "gpt2")
    assert ours.tokenizer.decode(ours.train.rows([0], len(rows))[0]) == text
    assert ours.manifest["tokenizer"]["fingerprint"] == ours.tokenizer.fingerprint
    assert sorted(f.name for f in folder.iterdir()) == before


# ---- the pre-flight


def test_check_finds_all_at_once(work):
    (work / "file").touch()
    problems = check(Data(corpus="pyton", tokenizer="chr"))
    assert len(problems) == 2
    assert "corpus=pyton" in problems[0] and "did you mean python?" in problems[0]
    assert "tokenizer=chr" in problems[1] and "did you mean char?" in problems[1]
    (problem,) = check(Data(corpus="python", data_dir="file"))
    assert "data_dir=file" in problem and "not a folder" in problem
    (work / "tok").mkdir()
    (problem,) = check(Data(corpus="python", tokenizer="tok"))
    assert "tok/tokenizer.json" in problem
    assert os.listdir(work / "tok") == [] and not (work / "data").exists()


def test_too_short_for_a_block(notes):
    data = Data(corpus="notes", tokenizer="char", val_fraction=0.3)
    ours = prepared(data)
    train, val = len(ours.train), len(ours.val)
    assert val < train
    assert require_block(ours, val - 1) == []
    for problems in (require_block(ours, val), check(data, block_size=val)):
        (problem,) = problems
        assert f"block_size={val}:" in problem and f"{ours.folder}/val.bin has {val}:" in problem
        assert "larger val_fraction" in problem
    assert len(require_block(ours, train)) == 2
    assert len(check(data.model_copy(update={"data_dir": str(ours.folder)}), block_size=train)) == 2


# ---- the command


@pytest.fixture
def recipe(notes):
    Path("notes.yaml").write_text("data:\n  corpus: notes\n  tokenizer: char\n  val_fraction: 0.3\n")
    return "notes.yaml"


def test_the_command_prints_a_summary(recipe, capsys):
    command.main([recipe])
    first = capsys.readouterr().out
    (folder,) = Path("data").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    splits = manifest["splits"]
    assert str(folder) in first and f"tokenizer: char, {manifest['tokenizer']['vocab_size']} symbols" in first
    for split in ("train", "val"):
        counts = splits[split]
        assert f"{split}: {counts['tokens']:,} tokens, {counts['documents']} documents" in first
        assert f"{counts['bytes'] / counts['tokens']:.3f} bytes a token" in first
    command.main([recipe])
    assert capsys.readouterr().out.startswith(f"{folder}: prepared already\n")
    command.main([recipe, f"data_dir={folder}", "corpus=notes"])
    assert "prepared already" in capsys.readouterr().out


def test_the_command_shows_its_keys(capsys):
    command.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"{key}=" in out for key in Data.model_fields) and "prepare RECIPE" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["prepare needs a recipe", "nanogpt-accel prepare"]),
        (["nots.yaml"], ["nots.yaml: no such recipe", "notes"]),
        (
            ["notes.yaml", "corpus=note", "tokenizer=car", "val_fraction=2"],
            ["corpus=note", "tokenizer=car", "val_fraction=2"],
        ),
        (["notes.yaml", "corpus=bad.txt"], ["corpus=bad.txt", "byte 1"]),
    ],
)
def test_mistakes_end_in_a_line_each(recipe, capsys, words, expected):
    Path("bad.txt").write_bytes(b"a\xff")
    assert cli.run(command.main, words) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in expected) and "Traceback" not in err
    assert err.count("error: ") == err.count("\n") == max(1, len(words) - 1)


def test_a_process_of_its_own(recipe):
    """As a user starts it, where the disk fills up, then where it does not."""
    env = os.environ | {"PYTHONPATH": str(Path(dataset.__file__).parents[2])}
    command = [sys.executable, "-m", "nanogpt_accel", "prepare", recipe]
    full = f"ulimit -f 0; exec {' '.join(command)}"
    done = subprocess.run(["bash", "-c", full], capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "File too large" in done.stderr and list(Path("data").iterdir()) == []
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stderr == "" and "train: " in done.stdout
