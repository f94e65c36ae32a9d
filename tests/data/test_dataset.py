"""dataset.py: the name, the checks and the opening of a data folder."""

import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from data_files import ids, opened, section

from nanogpt_accel.data import dataset, prepare, sources
from nanogpt_accel.data.dataset import check, data_folder, is_prepared, open_dataset, require_block
from nanogpt_accel.data.tokenizer import Tokenizer
from nanogpt_accel.recipe import SECTIONS, Data


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """Run in an empty directory, which contains the default data folders."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- folders


def test_every_key_that_decides_the_tokens_has_its_folder(notes):
    base = {"corpus": "notes", "tokenizer": "bpe", "vocab_size": 300, "val_fraction": 0.1}
    changes = [{}, {"vocab_size": 301}, {"val_fraction": 0.2}, {"tokenizer": "char"}, {"corpus": "notes/01.txt"}]
    folders = [data_folder(Data(**base | change)) for change in changes]
    assert len(set(folders)) == len(folders)
    assert folders[0].parent == Path("data") and folders[0].name.startswith("notes_bpe300-")
    # keys that do not change the tokens do not change the folder: sampling, and vocab_size without a bpe
    assert data_folder(Data(**base, sampling="random")) == folders[0]
    char = base | {"tokenizer": "char"}
    assert data_folder(Data(**char | {"vocab_size": 999})) == folders[3]


def test_a_changed_corpus_gets_a_new_folder(notes):
    data = Data(corpus="notes", tokenizer="char", val_fraction=0.3)
    before = opened(data)
    assert is_prepared(data)
    (notes / "00.txt").write_text("something else")
    assert not is_prepared(data)
    assert opened(data).folder != before.folder and before.folder.is_dir()


def test_plain_attributes_are_enough(notes):
    section = SECTIONS["data"](corpus="notes", tokenizer="char", data_dir="here", val_fraction=0.3)
    data = SimpleNamespace(**section.model_dump())
    assert check(data) == []
    assert opened(data).folder == Path("here")
    assert check(data) == check(section) == []
    other = {"tokenizer": "bpe", "corpus": "python"}
    assert len(check(SimpleNamespace(**vars(data) | other))) == len(check(section.model_copy(update=other))) == 2


def test_a_tokenizer_folder(refused, notes):
    first = opened(Data(corpus="notes", tokenizer="bpe", vocab_size=300, val_fraction=0.3))
    data = Data(corpus="notes", tokenizer=str(first.folder), val_fraction=0.3)
    again = opened(data)
    assert again.folder != first.folder and again.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert ids(again.train) == ids(first.train)
    # a copy of the folder is the same tokenizer
    shutil.copytree(first.folder, "elsewhere")
    elsewhere = data.model_copy(update={"tokenizer": "elsewhere"})
    assert data_folder(elsewhere).name.split("-")[-1] == data_folder(data).name.split("-")[-1]
    # a tokenizer without an end-of-text token cannot separate documents; an unknown character is an error
    Path("single").mkdir()
    Tokenizer.char([(notes / "01.txt").read_text()]).save("single")
    with refused(ValueError, "tokenizer=single", "end-of-text", "corpus=notes"):
        prepare.prepare(Data(corpus="notes", tokenizer="single"))
    (notes / "z.md").write_text("€" * 10)
    with refused(ValueError, "'€' (U+20AC)"):
        prepare.prepare(Data(corpus="notes/z.md", tokenizer="single", val_fraction=0.3))


def test_another_column_is_another_text():
    Path("x.jsonl").write_text('{"text": "a", "story": "once"}\n{"text": "b", "story": "upon"}\n')
    folders = [
        dataset.data_folder(section(corpus="x.jsonl", text_column=column, data_dir=None))
        for column in ("text", "story")
    ]
    assert folders[0] != folders[1]
    assert list(sources.find_corpus("x.jsonl", text_column="story").documents()) == ["once", "upon"]


# ---- data_dir is set


@pytest.fixture
def mine(notes):
    """A prepared folder whose corpus was deleted."""
    data = Data(corpus="notes", tokenizer="bpe", vocab_size=300, val_fraction=0.3, data_dir="mine")
    opened(data)
    shutil.rmtree(notes)
    return data


def test_data_dir_does_not_need_its_corpus(mine, monkeypatch):
    monkeypatch.setattr(dataset, "find_corpus", lambda spec: pytest.fail("the corpus was touched"))
    for data in (mine, Data(data_dir="mine"), Data(data_dir="mine", corpus="somewhere/else/notes/")):
        assert check(data, block_size=8) == [] and is_prepared(data)
        assert prepare.prepare(data) == Path("mine")
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
def test_data_dir_with_other_contents(refused, mine, change, words):
    data = mine.model_copy(update=change)
    (problem,) = check(data)
    assert all(word in problem for word in words) and "data_dir=mine" in problem
    with refused(ValueError, *words, "data_dir=mine"):
        open_dataset(data)


def test_differences_name_the_keys_and_both_values():
    manifest = {"corpus": {"name": "input.txt"}, "tokenizer": {"asked": "char"}, "val_fraction": 0.1}
    data = SimpleNamespace(**section(corpus="input.txt", val_fraction=0.1, data_dir="data/x").model_dump())
    assert dataset._differences(data, manifest) == []
    data.corpus, data.tokenizer, data.val_fraction = "python", "gpt2", 0.2
    problems = dataset._differences(data, manifest)
    assert [problem.split(",")[0] for problem in problems] == ["corpus=python", "tokenizer=gpt2", "val_fraction=0.2"]
    assert all(
        "data_dir=data/x" in problem and str(value) in problem
        for problem, value in zip(problems, ("input.txt", "char", 0.1), strict=True)
    )


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
    data = Data(corpus="no such corpus", tokenizer="bpe" if meta else "gpt2", data_dir=str(folder))
    assert check(data) == [] and is_prepared(data) and prepare.prepare(data) == folder
    ours = open_dataset(data)
    assert ours.tokenizer.kind == ("char" if meta else "gpt2")
    assert ours.tokenizer.decode(ours.train.rows([0], len(rows))[0]) == text
    assert ours.manifest["tokenizer"]["fingerprint"] == ours.tokenizer.fingerprint
    assert sorted(f.name for f in folder.iterdir()) == before


# ---- the check before a run


def test_check_finds_all_at_once(work):
    (work / "file").touch()
    problems = check(Data(corpus="pyton", tokenizer="chr"))
    assert len(problems) == 2
    assert "corpus=pyton" in problems[0] and "did you mean python?" in problems[0]
    assert "tokenizer=chr" in problems[1] and "did you mean char?" in problems[1]
    (problem,) = check(Data(corpus="python", data_dir="file"))
    assert "data_dir=file" in problem and "not a folder" in problem
    (work / "out" / ".partial").mkdir(parents=True)
    for name in ("train.bin", ".partial/manifest.json"):  # interrupted while the files were moved
        (work / "out" / name).touch()
    assert check(Data(data_dir="out")) == []
    (work / "tok").mkdir()
    (problem,) = check(Data(corpus="python", tokenizer="tok"))
    assert "tok/tokenizer.json" in problem
    assert os.listdir(work / "tok") == [] and not (work / "data").exists()


def test_too_short_for_a_block(notes):
    data = Data(corpus="notes", tokenizer="char", val_fraction=0.3)
    ours = opened(data)
    train, val = len(ours.train), len(ours.val)
    assert val < train
    assert require_block(data, ours.manifest, val - 1) == []
    for problems in (require_block(data, ours.manifest, val), check(data, block_size=val)):
        (problem,) = problems
        assert f"block_size={val}:" in problem and f"the val split of {ours.folder} has {val};" in problem
        assert "val_fraction=0.5" in problem
    assert len(require_block(data, ours.manifest, train)) == 2
    assert len(check(data.model_copy(update={"data_dir": str(ours.folder)}), block_size=train)) == 2
