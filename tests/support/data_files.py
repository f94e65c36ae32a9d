"""Documents, files of every format that contain them, and helpers that prepare and read them."""

import csv
import gzip
import hashlib
import json
import os
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanogpt_accel.__main__ import main
from nanogpt_accel.data import dataset
from nanogpt_accel.data.dataset import open_dataset
from nanogpt_accel.data.manifest import is_data_folder, read_manifest
from nanogpt_accel.data.prepare import prepare
from nanogpt_accel.data.sources import find_corpus
from nanogpt_accel.data.token_files import Writer
from nanogpt_accel.recipe import SECTIONS

ENV = os.environ | {"PYTHONPATH": str(Path(dataset.__file__).parents[2])}


def documents(count, seed=5):
    """Return one-line texts that are difficult for formats: quotes, commas, tabs, backslashes, rare characters."""
    rng = random.Random(seed)
    words = [
        "so",
        "it",
        "goes",
        '"',
        "''",
        ",",
        ";",
        "\t",
        "\\n",
        "\\",
        "naïve",
        "Ω≈ç",
        "你好",
        "👩‍🚀",
        "\u2028",
        "\x85",
        "\x0b",
        "<|endoftext|>",
        "{}",
        "#",
        " ",
        "0.5",
        "NULL",
        "nan",
    ]
    return [f"{i}: " + " ".join(rng.choices(words, k=rng.randrange(40))) for i in range(count)]


DOCS = documents(200)
WORDS = ["so", "it's", "don't", "'ll", "12", "x1", "naïve", "你好，世界", "🙂", "<|endoftext|>", "...", "'", "—"]
# the last five are white space for Python or for Unicode, but not a good place to cut a text
SPACES = [" ", "  ", "\n", "\n\n", "\r\n", "\t", " \n ", "\u3000", "\xa0", "\x1c", "\x0b", "\x85", " \u2028 "]


def text_with_spaces(n_words, seed=7):
    """Return a text of words and white space of many kinds."""
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice(SPACES) * (rng.random() < 0.7) for _ in range(n_words))


def section(**given):
    return SECTIONS["data"](**{"tokenizer": "char", "val_fraction": 0.2, "data_dir": "out"} | given)


def prepared(workers=None, **given):
    lines = []
    folder = prepare(section(**given), lines.append, threads=workers)
    return dataset.open_dataset(SECTIONS["data"](data_dir=str(folder))), lines


def ids(file):
    return np.concatenate([np.fromfile(path, file.dtype) for path in file.paths]).tolist()


def content(folder):
    """Return {name: bytes} of the files in a folder and its subfolders."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def dealt(texts, val_fraction=0.2):
    """Return the documents of the splits, [train, val], by the documented rule: a document belongs to val if blake2b of
    "SEED NUMBER" is below val_fraction * 2**64."""
    hashes = [hashlib.blake2b(f"2357 {i}".encode(), digest_size=8).digest() for i in range(len(texts))]
    is_val = [int.from_bytes(digest, "big") < val_fraction * 2**64 for digest in hashes]
    return [[text for text, val in zip(texts, is_val, strict=True) if val is side] for side in (False, True)]


def char_ids(texts, part):
    """Return the ids of the documents `part`, each followed by the end-of-text id. The vocabulary has one id per
    character of `texts`, and then the end-of-text id."""
    vocab = {character: i for i, character in enumerate(sorted(set("".join(texts))))}
    return [i for text in part for i in [*map(vocab.__getitem__, text), len(vocab)]]


# ---- formats


def table(path, texts, **options):
    """Write a table with pyarrow or the csv module."""
    if path.endswith(".parquet"):
        pq.write_table(pa.table({"n": list(range(len(texts))), "text": texts}), path, **options)
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, delimiter="\t" if path.endswith(".tsv") else ",")
            rows.writerows([("n", "text"), *enumerate(texts)])


def jsonl(path, texts, **options):
    raw = "".join(json.dumps({"n": i, "text": text}, **options) + "\n" for i, text in enumerate(texts)).encode()
    Path(path).write_bytes(packed(path, raw))


def packed(path, raw):
    if path.endswith(".gz"):
        return gzip.compress(raw)
    return pa.compress(raw, "zstd", asbytes=True) if path.endswith(".zst") else raw


def lines(path, texts):
    Path(path).write_bytes(packed(path, "".join(text + "\n" for text in texts).encode()))


FORMATS = {
    "x.parquet": lambda path, texts: table(path, texts, row_group_size=7),
    "large.parquet": lambda path, texts: pq.write_table(pa.table({"text": pa.array(texts, pa.large_string())}), path),
    "x.jsonl": jsonl,
    "plain.ndjson": lambda path, texts: jsonl(path, texts, ensure_ascii=False),
    "x.jsonl.gz": jsonl,
    "x.jsonl.zst": jsonl,
    "x.csv": table,
    "x.tsv": table,
    "x.txt": lines,
    "x.log.gz": lines,
}


def is_lines(name):
    return FORMATS[name] is lines


GOOD = ["a text", "b text", "c text", "d text"]
ROWS = [
    "",
    " = Robert <unk> = \n",
    "",
    " He is an actor . \n",
    " Born in 1970 , he = acts = . \n",
    "",
    " = = Career = = \n",
    "",
    " = = = 2000 – 2005 = = = \n",
    " A play . \n",
    "",
    " = X = \n",
    "",
    " One letter . \n",
    "",
    " = E = mc2 = \n",
    " = = Proof = = \n",
    " None . \n",
    "",
]


# ---- commands


TEXTS = [f"{i} bottles of beer on the wall" for i in range(60)]


MODEL = "{n_layer: 1, n_head: 1, n_embd: 8, block_size: 8}"


def error_line(capsys, *words, command="prepare", target="r.yaml"):
    """Return the only line on stderr of a command that fails."""
    capsys.readouterr()
    assert main([command, target, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def expect(line, *words):
    assert [word for word in words if word not in line] == [], line


def documents_found(capsys, *words):
    """Return the set of documents that prepare finds, in any split."""
    assert main(["prepare", "r.yaml", *words]) == 0
    found = dataset.open_dataset(SECTIONS["data"](data_dir="out"))
    ids = np.concatenate([file.rows([0], len(file))[0] for file in found.splits.values()])
    return set(found.tokenizer.decode(ids).split("<|endoftext|>")[:-1])


def texts(path, **options):
    return list(find_corpus(str(path), **options).documents())


def refusal(capsys, *words):
    """Return the only line on stderr of a preparation that fails, and check that it leaves no data folder."""
    assert main(["prepare", "r.yaml", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert not is_data_folder("out") and not Path("out").exists()
    return line


FACTS = {
    "corpus": {"kind": "files", "name": "input.txt"},
    "val_fraction": 0.1,
    "seed": None,
    "tokenizer": {"asked": "char", "kind": "char", "vocab_size": 9, "fingerprint": "f", "eot_id": None},
}


def save_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def write(folder, train=range(1000), val=(7, 8, 9), dtype=np.uint16, facts=FACTS, shard_tokens=10**8):
    """Write three documents for train and one for val, or the remaining ones after an earlier attempt."""
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


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def raw(file):
    return b"".join(path.read_bytes() for path in file.paths)


def opened(data, report=lambda line: None):
    prepare(data, report)
    return open_dataset(data)


def small_corpus_and_recipe():
    """Write x.jsonl, and an r.yaml that prepares it and trains one step."""
    Path("r.yaml").write_text(
        f"data: {{corpus: x.jsonl, tokenizer: char, val_fraction: 0.2, data_dir: out}}\nmodel: {MODEL}\n"
        "optimizer: {warmup_iters: 0}\ntrain: {max_iters: 1, eval_iters: 1, device: cpu}\nout_dir: run\n"
    )
    Path("x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
