"""foreign_tokens.py: token files of llm.c, modded-nanogpt, Megatron-LM, datatrove and numpy, from their layouts.

The writers below use only struct and numpy, and follow the sources that foreign_tokens.py names. Once, the Megatron and
datatrove files were also compared with those of megatron-core 0.16.1 and datatrove 0.10.1, which are equal.
"""

import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from data_files import MODEL, content, error_line, expect, sha256

from nanogpt_accel.__main__ import main
from nanogpt_accel.data import foreign_tokens
from nanogpt_accel.data.dataset import open_dataset
from nanogpt_accel.data.prepare import prepare
from nanogpt_accel.data.tokenizer import Tokenizer
from nanogpt_accel.recipe import SECTIONS
from nanogpt_accel.utils.text import quoted

SIZE = 401  # vocabulary size of the tokenizer in the folder tok: 400 characters and end-of-text
EOT = SIZE - 1


def draw(n, seed=0, size=SIZE):
    """Return n random ids with end-of-text ids among them."""
    ids = np.random.default_rng(seed).integers(0, size, n)
    ids[7::100] = EOT
    return ids


def write_llmc(path, ids, magic=20240520, version=1, count=None):
    header = [magic, version, len(ids) if count is None else count] + [0] * 253
    dtype = "<u4" if magic == 20240801 else "<u2"
    Path(path).write_bytes(struct.pack("<256i", *header) + np.asarray(ids, dtype).tobytes())


def write_megatron(prefix, documents, code=8, modes=False, **change):
    """Write PREFIX.bin and PREFIX.idx with one sequence per document. change: wrong values for the index."""
    dtype = {4: "<i4", 8: "<u2"}[code]
    ids = np.concatenate(documents).astype(dtype)
    lengths = change.get("lengths", [len(document) for document in documents])
    offsets = change.get("offsets", [sum(lengths[:i]) * ids.itemsize for i in range(len(lengths))])
    index = b"MMIDIDX\x00\x00" + struct.pack("<QB", change.get("version", 1), code)
    index += struct.pack("<QQ", change.get("sequences", len(lengths)), change.get("ends", len(lengths) + 1))
    index += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(lengths)}q", *offsets)
    index += struct.pack(f"<{len(lengths) + 1}q", *range(len(lengths) + 1))
    Path(f"{prefix}.bin").write_bytes(ids.tobytes())
    Path(f"{prefix}.idx").write_bytes(index + bytes(len(lengths) * modes))


def write_datatrove(path, documents, size=2, index=True, metadata=True):
    code = {2: "H", 4: "I"}[size]
    ids = np.concatenate(documents).tolist()
    Path(path).write_bytes(struct.pack(f"<{len(ids)}{code}", *ids))
    ends = np.cumsum([len(document) for document in documents]).tolist()
    if index:
        Path(f"{path}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    if metadata:
        Path(f"{path}.metadata").write_text(f"gpt2|{size}\n{len(ids)}\n{len(ids)} T")


def documents(n, seed=0, size=SIZE):
    """Return n documents of different lengths that end with end-of-text."""
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(0, EOT, rng.integers(1, 60)) * (size // SIZE), EOT) for _ in range(n)]


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(
        f"data: {{tokenizer: tok}}\nmodel: {MODEL}\noptimizer: {{warmup_iters: 0}}\n"
        "train: {max_iters: 1, eval_iters: 1, device: cpu}\nout_dir: run\n"
    )
    Path("tok").mkdir()
    Tokenizer.char(map(chr, range(0x100, 0x100 + EOT)), add_eot=True).save("tok")


def ids_of(**data):
    """Return {split: ids} of a data section, prepared if needed, and the Dataset."""
    section = SECTIONS["data"](**{"tokenizer": "tok"} | data)
    prepare(section, lambda line: None)
    ours = open_dataset(section, verify=True)
    return {split: tokens.rows([0], len(tokens))[0].tolist() for split, tokens in ours.splits.items()}, ours


def large_tokenizer(size=70_000):
    """Replace the tokenizer in the folder tok with one of 70,000 words."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    Backend(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0")).save("tok/tokenizer.json")


# ---- every format as corpus and as data_dir


def write_fineweb(folder):
    """Write modded-nanogpt's shards. Sorted as text, the numbers in their names have another order."""
    train = [draw(3000, 1), draw(2000, 2), draw(1000, 3)]
    for number, ids in zip((1, 2, 10), train, strict=True):
        write_llmc(f"{folder}/fineweb_train_{number}.bin", ids)
    write_llmc(f"{folder}/fineweb_val_000000.bin", draw(500, 4))
    return np.concatenate(train), draw(500, 4)


def write_llama(folder):
    ids = draw(4000, 5, 70_000)
    write_llmc(f"{folder}/tiny_shakespeare_train.bin", ids, 20240801, 7)
    write_llmc(f"{folder}/tiny_shakespeare_val.bin", ids[:300], 20240801, 7)
    large_tokenizer()
    return ids, ids[:300]


def write_two_megatron(folder):
    write_megatron(f"{folder}/train_text_document", documents(50), 4)
    write_megatron(f"{folder}/valid_text_document", documents(9, 1), 4, modes=True)
    return np.concatenate(documents(50)), np.concatenate(documents(9, 1))


def write_one_megatron(folder):
    write_megatron(f"{folder}/my-gpt2_text_document", documents(200))
    ids = np.concatenate(documents(200))
    return ids[: int(len(ids) * 0.9)], ids[int(len(ids) * 0.9) :]


def write_two_datatrove(folder):
    write_datatrove(f"{folder}/00000_train.ds", documents(50))
    write_datatrove(f"{folder}/00001_train.ds", documents(40, 1))
    write_datatrove(f"{folder}/00000_validation.ds", documents(9, 2))
    for suffix in (".ds", ".ds.index"):  # files of a worker without documents
        Path(f"{folder}/00002_train{suffix}").touch()
    return np.concatenate(documents(50) + documents(40, 1)), np.concatenate(documents(9, 2))


def write_large_datatrove(folder):
    """Only the index contains the size of an id."""
    write_datatrove(f"{folder}/0_0_shuffled.ds", documents(100, 3, 70_000), 4, metadata=False)
    large_tokenizer()
    ids = np.concatenate(documents(100, 3, 70_000))
    return ids[: int(len(ids) * 0.9)], ids[int(len(ids) * 0.9) :]


def write_npy(dtype):
    def write(folder):
        """Write files with the names that build-nanogpt's fineweb.py uses."""
        for split, number, n in (("train", 1, 3000), ("train", 2, 100), ("val", 0, 200)):
            np.save(f"{folder}/edufineweb_{split}_{number:06d}.npy", draw(n, n).astype(dtype))
        return np.concatenate([draw(3000, 3000), draw(100, 100)]), draw(200, 200)

    return write


FORMATS = {
    "modded-nanogpt": write_fineweb,
    "llm.c uint32": write_llama,
    "Megatron int32": write_two_megatron,
    "Megatron uint16": write_one_megatron,
    "datatrove uint16": write_two_datatrove,
    "datatrove uint32": write_large_datatrove,
    "npy uint16": write_npy("<u2"),
    "npy int64": write_npy("<i8"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_token_files_are_read_where_they_are(name):
    Path("there").mkdir()
    train, val = FORMATS[name]("there")
    before = content("there")
    for given in ({"data_dir": "there"}, {"corpus": "there/*", "data_dir": "glob"}):
        found, ours = ids_of(**given, val_fraction=0.1)
        assert found == {"train": train.tolist(), "val": val.tolist()}, given
        assert content("there") == before
    assert sorted(content("glob")) == ["manifest.json", "tokenizer.json", "tokenizer_config.json"]
    if ours.tokenizer.vocab_size == SIZE:
        counts = ours.manifest["splits"].values()
        assert [split["documents"] for split in counts] == [
            int((ids == EOT).sum() + (ids[-1] != EOT)) for ids in (train, val)
        ]
        assert [split["bytes"] for split in counts] == [int(2 * (ids != EOT).sum()) for ids in (train, val)]


def test_training_reads_them_from_a_folder_and_from_a_corpus():
    Path("there").mkdir()
    train, val = write_fineweb("there")
    assert ids_of(corpus=os.path.abspath("there/*.bin"))[0] == {"train": train.tolist(), "val": val.tolist()}
    for given in ({"corpus": "there"}, {"data_dir": "there"}):
        assert main(["train", "r.yaml", "overwrite=true", *(f"{key}={value}" for key, value in given.items())]) == 0
        assert ids_of(**given)[0] == {"train": train.tolist(), "val": val.tolist()}
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert any("val_loss" in line for line in metrics)


def test_special_tokens_of_a_prompt_become_ids_if_the_corpus_has_only_ids():
    Path("there").mkdir()
    write_fineweb("there")
    assert ids_of(corpus="there")[1].tokenizer.special_tokens is None


def test_files_without_a_tokenizer_are_gpt2s(gpt2_files):
    ids = np.append(draw(1000), 50256)
    write_llmc("x.bin", ids)
    found, ours = ids_of(data_dir=".", tokenizer="gpt2", val_fraction=0.1)
    assert ours.tokenizer.kind == "gpt2" and found["train"] + found["val"] == ids.tolist()


def test_a_file_alone_is_cut_whatever_its_name(capsys):
    write_llmc("fineweb_val_000000.bin", draw(1000))
    found, _ = ids_of(corpus="fineweb_val_000000.bin", data_dir="a", val_fraction=0.25)
    assert found == {"train": draw(1000)[:750].tolist(), "val": draw(1000)[750:].tolist()}
    np.save("tokens.npy", draw(1000).reshape(10, 100).astype("<u2"))  # rows of 100 ids
    assert ids_of(corpus="tokens.npy", data_dir="b", val_fraction=0.25)[0] == found
    write_megatron("one", [draw(1000)])
    assert ids_of(corpus="one.idx", data_dir="c", val_fraction=0.25)[0] == found
    assert main(["data", "b"]) == 0
    assert "train: 750 tokens, " in capsys.readouterr().out


def test_the_test_split_and_folders():
    for split, n in (("train", 400), ("dev", 100), ("test", 50)):
        Path("x", split).mkdir(parents=True)
        write_llmc(f"x/{split}/part-0.bin", draw(n, n))
    found, _ = ids_of(corpus="x/*/*.bin", data_dir="out")
    assert {split: len(ids) for split, ids in found.items()} == {"train": 400, "val": 100, "test": 50}
    assert found["test"] == draw(50, 50).tolist()


def test_split_by_applies_to_a_folder_of_token_files(capsys):
    Path("there").mkdir()
    train, val = write_fineweb("there")
    found, _ = ids_of(data_dir="there", split_by="val_fraction", val_fraction=0.5)
    assert found == {"train": [*train, *val][:3250], "val": [*train, *val][3250:]}
    assert main(["train", "r.yaml", "data_dir=there", "split_by=val_fraction", "val_fraction=0.5"]) == 0
    assert "3,250 training and 3,250 validation tokens" in capsys.readouterr().out
    Path("one").mkdir()
    write_llmc("one/a.bin", draw(1000))
    line = error_line(capsys, "data_dir=one", "split_by=name", "overwrite=true", command="train")
    expect(line, "split_by=name: the names of the files in data_dir=one do not define splits")


def test_eos_token_is_not_ignored(capsys, gpt2_files):
    Path("there").mkdir()
    write_llmc("there/a.bin", draw(1000))
    line = error_line(capsys, "data_dir=there", "tokenizer=gpt2", "eos_token=<s>", command="train")
    expect(line, "eos_token=<s>: data_dir=there uses the tokenizer of GPT-2, so eos_token cannot be changed")
    Path("there/meta.pkl").write_bytes(pickle.dumps({"vocab_size": SIZE}))
    line = error_line(capsys, "data_dir=there", "tokenizer=gpt2", "eos_token=7", command="train")
    expect(line, "eos_token=7: data_dir=there uses its meta.pkl, so eos_token cannot be changed")
    line = error_line(capsys, "data_dir=there", "tokenizer=tok", command="train")
    expect(line, "tokenizer=tok: data_dir=there has a meta.pkl", "set tokenizer=gpt2")


def test_a_name_above_the_files_does_not_count():
    Path("dev/train").mkdir(parents=True)
    for i in range(3):
        write_llmc(f"dev/train/{i}.bin", draw(100, i))
    found, _ = ids_of(corpus="dev/train/*.bin", data_dir="out", val_fraction=0.1)
    assert [len(ids) for ids in found.values()] == [270, 30]
    assert found["val"] == draw(100, 2)[70:].tolist()


def test_names_are_splits_by_the_rules_for_texts(capsys):
    for split, n in (("train", 100), ("val", 300), ("notes", 10)):
        write_llmc(f"x_{split}.bin", draw(n, n))
    everything = np.concatenate([draw(n, n) for n in (10, 100, 300)]).tolist()  # in the order of the names
    line = error_line(capsys, "corpus=x_*.bin", "data_dir=out")
    expect(line, "corpus=x_*.bin: the validation files (", "are larger than the training files (", "split_by=name")
    for command in (["split_by=name"], ["split_by=val_fraction", "val_fraction=0.1"]):
        assert main(["prepare", "r.yaml", "corpus=x_*.bin", *command]) == 0
    out = capsys.readouterr().out
    expect(out, "train is 1 file (x_train.bin)", "skipping 1 file without a split in the name (x_notes.bin)")
    expect(out, "val: 1 file, 300 tokens", "corpus=x_*.bin: val is the end of the text (val_fraction=0.1)")
    found, _ = ids_of(corpus="x_*.bin", split_by="name")
    assert found == {"train": draw(100, 100).tolist(), "val": draw(300, 300).tolist()}
    found, _ = ids_of(corpus="x_*.bin", split_by="val_fraction", val_fraction=0.1)
    assert found == {"train": everything[:369], "val": everything[369:]}
    write_llmc("a.bin", draw(100))
    expect(error_line(capsys, "corpus=a.bin", "split_by=name"), "split_by=name: the names of the files in corpus=a.bin")


def test_headerless_files_that_are_named_after_splits():
    """These are nanoGPT's files with other names, so their dtype depends on the size of the vocabulary."""
    Path("there").mkdir()
    for split, n in (("train", 300), ("val", 100)):
        draw(n, n).astype("<u2").tofile(f"there/owt_{split}.bin")
    found, ours = ids_of(data_dir="there")
    assert found == {"train": draw(300, 300).tolist(), "val": draw(100, 100).tolist()}
    assert ours.identity["train"] == sha256(Path("there/owt_train.bin"))
    large_tokenizer()
    for split, n in (("train", 300), ("val", 100)):
        draw(n, n, 70_000).astype("<u4").tofile(f"there/owt_{split}.bin")
    found, ours = ids_of(data_dir="there", tokenizer="tok")
    assert found["train"] == draw(300, 300, 70_000).tolist() and ours.manifest["dtype"] == "uint32"


def test_a_tokenizer_in_the_folder_is_used(capsys):
    Path("there").mkdir()
    char = Tokenizer.char(["to be"], add_eot=True)
    char.save("there")
    write_llmc("there/a_train.bin", char.encode("to be or".replace(" or", "")))
    write_llmc("there/a_val.bin", char.encode("bet"))
    for words in ({"tokenizer": "gpt2"}, {"tokenizer": "there"}):  # the default, and the same tokenizer
        found, ours = ids_of(data_dir="there", **words)
        assert ours.tokenizer.decode(found["train"]) == "to be" and ours.tokenizer.decode(found["val"]) == "bet"
    line = error_line(capsys, "data_dir=there", "tokenizer=tok", command="train")
    expect(line, "tokenizer=tok: data_dir=there has a different tokenizer.json", "leave tokenizer out")
    assert main(["train", "r.yaml", "data_dir=there", "block_size=2"]) == 0  # r.yaml has tokenizer: tok


def test_large_files_are_sampled_for_their_identity(monkeypatch):
    from nanogpt_accel.data import manifest

    monkeypatch.setattr(manifest, "SAMPLED_ABOVE", 2000)
    Path("there").mkdir()
    write_fineweb("there")
    first = open_dataset(SECTIONS["data"](data_dir="there", tokenizer="tok")).identity
    assert first["train"].startswith("sampled:") and not first["val"].startswith("sampled:")
    ids = draw(1000, 3)
    ids[-1] = 5
    write_llmc("there/fineweb_train_10.bin", ids)
    assert open_dataset(SECTIONS["data"](data_dir="there", tokenizer="tok")).identity["train"] != first["train"]


# ---- damaged and unsuitable files


def damaged():
    """Yield (name, function that writes x.*, words of the message)."""
    ids = draw(100)
    yield "truncated", lambda: write_llmc("x.bin", ids, count=101), ["1,224 bytes", "requires 1,226", "101 tokens"]
    yield "trailing", lambda: write_llmc("x.bin", ids, count=99), ["1,224 bytes", "requires 1,222"]
    yield "negative", lambda: write_llmc("x.bin", ids, count=-1), ["llm.c header", "-1 tokens"]
    yield "no ids", lambda: write_llmc("x.bin", []), ["llm.c header", "0 tokens"]
    yield "version", lambda: write_llmc("x.bin", ids, version=2), ["version 2 and", "version 1 and"]
    yield "llama version", lambda: write_llmc("x.bin", ids, 20240801, 1), ["version 1 and", "version 7 and"]
    yield "short", lambda: Path("x.bin").write_bytes(struct.pack("<3i", 20240520, 1, 4)), ["llm.c header", "12 bytes"]
    yield "magic only", lambda: Path("x.bin").write_bytes(struct.pack("<i", 20240520)), ["llm.c header", "4 bytes"]
    yield "evaluation", lambda: write_llmc("x.bin", ids, 20240522), ["multiple-choice"]
    yield "model", lambda: write_llmc("x.bin", ids, 20240326, 3, 1024), ["file of llm.c", "20240326", "20240520 or"]
    yield "other magic", lambda: write_llmc("x.bin", ids, 7, 1), ["starts like a file of llm.c", "magic number 7 "]
    docs = [ids[:60], ids[60:]]
    yield "no MMIDIDX", lambda: (write_megatron("x", docs), Path("x.idx").write_bytes(b"TNTIDX" * 9)), ["MMIDIDX"]
    yield "empty idx", lambda: (write_megatron("x", docs), Path("x.idx").write_bytes(b"")), ["MMIDIDX"]
    yield "cut idx", lambda: (write_megatron("x", docs), os.truncate("x.idx", 50)), ["50 bytes", "requires 82"]
    yield "index version", lambda: write_megatron("x", docs, version=2), ["version 2"]
    yield "float", lambda: _megatron_code(docs, 6), ["code 6"]
    yield "unknown code", lambda: _megatron_code(docs, 77), ["code 77"]
    yield "huge", lambda: write_megatron("x", docs, sequences=2**61), ["x.idx has 82 bytes", "3 document ends"]
    yield "negative length", lambda: write_megatron("x", docs, lengths=[-1, 101]), ["one after the other"]
    yield "gap", lambda: write_megatron("x", docs, offsets=[0, 122]), ["one after the other"]
    yield "more ids", lambda: write_megatron("x", docs, lengths=[60, 41]), ["200 bytes", "requires 202"]
    yield "index of ds", lambda: (write_datatrove("x.ds", docs), os.truncate("x.ds.index", 12)), ["x.ds.index"]
    yield "empty index", lambda: (write_datatrove("x.ds", docs), os.truncate("x.ds.index", 0)), ["0 tokens"]
    yield "cut ds", lambda: (write_datatrove("x.ds", docs), os.truncate("x.ds", 198)), ["198 bytes", "100 tokens"]
    yield "odd ds", lambda: (write_datatrove("x.ds", docs, index=False), os.truncate("x.ds", 199)), ["199 bytes"]
    yield "no ids in ds", lambda: [Path(f"x.ds{end}").touch() for end in ("", ".index")], ["no token ids"]
    yield "no ids in npy", lambda: np.save("x.npy", ids[:0]), ["no token ids"]
    yield "no ids in Megatron", lambda: write_megatron("x", [ids[:0]]), ["no token ids"]
    yield "npy text", lambda: Path("x.npy").write_bytes(b"\x93NUMPY\1\0" + b"(" * 5000), ["not a numpy.save file"]
    yield "npy empty", lambda: Path("x.npy").touch(), ["not a numpy.save file"]
    yield "npy header", lambda: _npy("{'descr': '<u2', 'fortran_order': False, 'shape': (101,)}"), ["requires"]
    yield "npy negative", lambda: _npy("{'descr': '<u2', 'fortran_order': False, 'shape': (-1,)}"), ["shape (-1,)"]
    yield "npy code", lambda: _npy("{'descr': __import__('os'), 'shape': (1,)}"), ["not a numpy.save file"]
    yield "npy float", lambda: np.save("x.npy", ids.astype("<f4")), ["float32", "not a sequence of ids"]
    yield "npy objects", lambda: np.save("x.npy", np.array([{}], object), allow_pickle=True), ["object", "not a seq"]
    yield "npy big", lambda: np.save("x.npy", ids.astype(">u2")), [">u2", "little-endian"]
    yield "npy number", lambda: np.save("x.npy", np.uint16(5)), ["shape ()"]
    yield "npy columns", lambda: np.save("x.npy", np.asfortranarray(ids.reshape(4, 25))), ["shape (4, 25)"]
    yield "npy truncated", lambda: (np.save("x.npy", ids), os.truncate("x.npy", 500)), ["500 bytes", "requires 928"]


def _megatron_code(docs, code):
    write_megatron("x", docs)
    raw = bytearray(Path("x.idx").read_bytes())
    raw[17] = code
    Path("x.idx").write_bytes(raw)


def _npy(header):
    text = header.ljust(117).encode() + b"\n"
    Path("x.npy").write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + bytes(200))


@pytest.mark.parametrize(("name", "write", "words"), [pytest.param(*case, id=case[0]) for case in damaged()])
def test_a_damaged_file_is_one_clear_line(capsys, name, write, words):
    write()
    (path,) = [path for path in Path().iterdir() if path.suffix in foreign_tokens.SUFFIXES]
    for command in ("prepare", "train"):
        line = error_line(capsys, f"corpus={path}", "data_dir=out", command=command)
        expect(line, f"corpus={path}", *words)
        assert not Path("out").exists() and not Path("run").exists()
    if path.suffix != ".npy":
        expect(error_line(capsys, "data_dir=.", command="train"), *words)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda: write_llmc("a.bin", draw(100, 0, 70_000), 20240801, 7), ["vocabulary size 401", "at byte 1,"]),
        (lambda: write_megatron("a", [np.arange(50), [401, 1]]), ["the id 401 at byte 100"]),
        (lambda: np.save("a.npy", np.array([5] * 70 + [-1], "<i4")), ["the id -1 at byte 408"]),
        (lambda: np.save("a.npy", np.array([5] * 70 + [2**63], "<u8")), ["the id -9,223"]),
        (lambda: write_datatrove("a.ds", [np.array([65535] + [3] * 50)]), ["the id 65,535 at byte 0"]),
    ],
)
def test_ids_outside_of_the_vocabulary(capsys, write, words):
    write()
    path = next(path.name for path in Path().iterdir() if path.suffix in foreign_tokens.SUFFIXES)
    line = error_line(capsys, f"corpus={path}", "data_dir=out", "val_fraction=0.4")
    expect(line, f"corpus={path}: contains", "set tokenizer to the folder of the tokenizer.json", *words)
    line = error_line(capsys, "data_dir=.", "val_fraction=0.4", command="train")
    expect(line, f"{path}: the ", "split contains the id", "set tokenizer to the folder of the tokenizer.json")


def test_a_readme_next_to_token_files_is_not_the_corpus(capsys):
    for name, write in (("it's a", write_fineweb), ("b", write_two_megatron), ("c", write_npy("<u2"))):
        Path(name).mkdir()
        write(name)
        Path(name, "README.md").write_text("# Data\n")
        suffix = ".npy" if name == "c" else ".bin"
        line = error_line(capsys, f"corpus={name}", "data_dir=out")
        expect(
            line,
            f"corpus={name}: contains both text and token files",
            f"set corpus={quoted(f'{name}/*{suffix}')} or {quoted(f'{name}/*.md')}",
        )
        assert len(ids_of(corpus=f"{name}/*{suffix}", data_dir=f"out {name}")[0]) == 2


def test_an_unreadable_file(capsys):
    os.symlink("gone.bin", "x.bin")
    expect(error_line(capsys, "corpus=*.bin", "data_dir=out"), "corpus=*.bin: x.bin: No such file", "restore the file")


def test_files_that_do_not_belong_together(capsys):
    write_llmc("a_train.bin", draw(100))
    write_llmc("a_val.bin", draw(100))
    np.save("a_train.npy", draw(100).astype("<u2"))
    line = error_line(capsys, "corpus=a_*", "data_dir=out")
    expect(line, "corpus=a_*: contains token files with the suffixes .bin, .npy", "same ids twice", "'*.bin'")
    write_llmc("b_train.bin", draw(100), 20240801, 7)
    expect(error_line(capsys, "corpus=*.bin", "data_dir=out"), "different types (uint16, uint32)", "of one type")


def test_a_folder_with_an_array_that_is_no_token_file_can_be_prepared(capsys):
    """Embeddings or a checkpoint in data_dir=. are not mistaken for token files."""
    np.save("embeddings.npy", np.zeros(5, "<f4"))
    Path("pytorch_model.bin").write_bytes(bytes(100))
    Path("x.txt").write_text("to be or not to be")
    Path("own.yaml").write_text("data: {corpus: x.txt, tokenizer: char, val_fraction: 0.5}\n")
    line = error_line(capsys, "data_dir=.", target="own.yaml")
    expect(line, "data_dir=.: contains embeddings.npy, but no complete set of token files", "or set corpus too")
    assert main(["prepare", "own.yaml", "data_dir=.", "corpus=x.txt"]) == 0
    found, _ = ids_of(corpus="x.txt", tokenizer="char", data_dir=".", val_fraction=0.5)
    assert [len(ids) for ids in found.values()] == [9, 9]


def test_a_file_that_goes_or_shrinks_after_it_was_prepared(capsys):
    write_llmc("x.bin", draw(1000))
    ids_of(corpus="x.bin", data_dir="out", val_fraction=0.1)
    os.truncate("x.bin", 2000)
    expect(error_line(capsys, target="out", command="data"), "x.bin: 2,000 bytes", "out/manifest.json requires 2,824")
    os.remove("x.bin")
    line = error_line(capsys, "data_dir=out", command="train")
    expect(line, f"{os.path.abspath('x.bin')}: 0 bytes", "restore the file, or delete the folder and prepare it again")
    write_llmc("x.bin", draw(1000, 9))
    expect(error_line(capsys, target="out", command="data"), "x.bin", "has changed since it was written")


def test_a_manifest_of_text_cannot_refer_to_other_files(capsys):
    write_llmc("x.bin", draw(1000))
    ids_of(corpus="x.bin", data_dir="out", val_fraction=0.1)
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["splits"]["val"]["files"] == [{"name": os.path.abspath("x.bin"), "tokens": 100, "offset": 2824}]
    manifest["corpus"]["kind"] = "files"
    Path("out/manifest.json").write_text(json.dumps(manifest))
    expect(error_line(capsys, target="out", command="data"), "damaged", "not a file name of this split")
