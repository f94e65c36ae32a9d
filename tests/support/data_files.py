"""Documents, and files of every format that hold them."""

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

from nanogpt_accel.data import dataset
from nanogpt_accel.data.prepare import prepare
from nanogpt_accel.recipe import SECTIONS

ENV = os.environ | {"PYTHONPATH": str(Path(dataset.__file__).parents[2])}


def documents(count, seed=5):
    """Texts of one line with what formats stumble over: quotes, commas, tabs, backslashes, rare characters."""
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


def section(**given):
    return SECTIONS["data"](**{"tokenizer": "char", "val_fraction": 0.2, "data_dir": "out"} | given)


def prepared(workers=None, **given):
    lines = []
    folder = prepare(section(**given), lines.append, workers=workers)
    return dataset.open_dataset(SECTIONS["data"](data_dir=str(folder))), lines


def ids(file):
    return np.concatenate([np.fromfile(path, file.dtype) for path in file.paths]).tolist()


def content(folder):
    """{name: bytes}, of subfolders too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def dealt(texts, val_fraction=0.2):
    """[train, val] by the rule in words: blake2b of "SEED NUMBER" as a fraction of 2**64, below val_fraction is val."""
    hashes = [hashlib.blake2b(f"2357 {i}".encode(), digest_size=8).digest() for i in range(len(texts))]
    is_val = [int.from_bytes(digest, "big") < val_fraction * 2**64 for digest in hashes]
    return [[text for text, val in zip(texts, is_val, strict=True) if val is side] for side in (False, True)]


def char_ids(texts, part):
    """The ids of some documents, where every character of `texts` has one, and then the end of a document."""
    symbols = {symbol: i for i, symbol in enumerate(sorted(set("".join(texts))))}
    return [i for text in part for i in [*map(symbols.__getitem__, text), len(symbols)]]


# ---- formats


def table(path, texts, **options):
    """A table as pyarrow and the csv module write it."""
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
