"""Read and verify data folders: those of this package, described by manifest.json, and those of nanoGPT.

    manifest = read_manifest(folder)
    check_content(folder, manifest, vocab_size)

If a folder has a manifest, its data are complete, because the manifest is the last file to be moved there.
"""

import hashlib
import json
import os
import pickle
import re
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..utils.files import sha256
from ..utils.text import counted, one_line
from .token_files import AGAIN, FILES, SPLITS, VERSION, TokenFile, sha256_of_split, token_paths

SAMPLED_ABOVE = 2**30  # bytes; for larger nanoGPT files, only the first MiB, the last MiB and the size are hashed
VERIFIED_BELOW = 2**26  # bytes; smaller data are hashed each time they are opened, which takes 0.2 seconds
CHECKED_PLACES, CHECKED_TOKENS = 64, 2**18  # number of places per split where ids are checked, and tokens per place
AGAIN_NANOGPT = "prepare it again with nanoGPT's prepare.py"


def describe_split(counts):
    """Return the size of a split as text. A nanoGPT folder only has the tokens. counts: the split in the manifest."""
    size = counted(counts["tokens"], "token")
    if counts["bytes"] is not None:
        size += f", {counted(counts['documents'], 'document')}"
        size += f", {counts['bytes'] / counts['tokens']:.3f} bytes per token"
    return size


def is_data_folder(folder):
    """Return whether a folder has token files: our own with a manifest, or nanoGPT's without one."""
    has = {name: (Path(folder) / name).is_file() for name in FILES}
    # .bin files next to a tokenizer.json are ours, before Writer.finish() has moved the manifest
    return has["manifest.json"] or (has["train.bin"] and has["val.bin"] and not has["tokenizer.json"])


def read_manifest(folder):
    """Return the manifest of a data folder. Check its values and the file sizes first.

    For a nanoGPT folder, create a manifest in memory: `nanogpt` is true, the tokenizer has `stoi` if there is a
    meta.pkl, and "bytes" and "documents" are None. If a file has more than SAMPLED_ABOVE bytes, its "sha256" is
    "sampled:" and a hash of its first MiB, last MiB and size, so that a run does not have to read 17 GB when it starts.

    Returns:
        {"version", "corpus", "tokenizer", "val_fraction", "split_seed", "dtype", "splits"}, where "splits" has the keys
        "train", "val" and optionally "test", each with {"tokens", "bytes", "documents", "sha256", "files": [{"name",
        "tokens"}, ...]}.

    Raises:
        FileNotFoundError: the folder has no token files.
        ValueError: the manifest or the token files are damaged.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not is_data_folder(folder):
        if any(folder.glob("*.bin")):
            problem = "the token files may be incomplete, because manifest.json is missing"
            raise ValueError(f"data_dir={folder}: {problem}; set data_dir to another folder, or {AGAIN}")
        raise FileNotFoundError(f"data_dir={folder}: {_describe(folder)}")
    if not path.is_file():
        return _nanogpt_manifest(folder)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        version = manifest.get("version") if isinstance(manifest, dict) else None
        if type(version) is not int:
            raise ValueError(f"version: {version!r} is not an integer")
        if version in (1, VERSION):
            _validate(manifest)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: {one_line(error)}; {AGAIN}") from None
    if version not in (1, VERSION):
        raise ValueError(f"{path}: version {version} is not supported (supported: version {VERSION}); {AGAIN}")
    itemsize, splits = np.dtype(manifest["dtype"]).itemsize, manifest["splits"]
    for entry in [entry for counts in splits.values() for entry in counts["files"]]:
        file, expected = folder / entry["name"], entry["tokens"] * itemsize
        size = file.stat().st_size if file.is_file() else 0
        if size != expected:
            raise ValueError(
                f"{file}: {size:,} bytes, but the manifest requires {expected:,} "
                f"({entry['tokens']:,} tokens of {itemsize} bytes); {AGAIN}"
            )
    # manifest.json lists the splits in the order in which they were first written
    manifest["splits"] = {split: splits[split] for split in (*SPLITS, "test") if split in splits}
    return manifest


def _describe(folder):
    """Return a message: why the folder is not a data folder, and which folder to use instead."""
    if (folder / "run.yaml").is_file():
        import yaml

        try:
            data = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))["data"]["data_dir"]
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            data = None
        return "a run folder, not a data folder; use " + (
            f"its data_dir {data}" if data else "data_dir of its run.yaml"
        )
    if (folder / ".partial").is_dir():
        return "its preparation was interrupted or is still running; run prepare to resume it"
    inner = sorted(path.name for path in folder.iterdir() if is_data_folder(path)) if folder.is_dir() else []
    if inner:
        more = f" and {len(inner) - 10:,} more" if len(inner) > 10 else ""
        return f"not a data folder; use one of the data folders in it: {', '.join(inner[:10])}{more}"
    return "contains no train.bin and val.bin; prepare the data first, or correct data_dir"


class _Base(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _File(_Base):
    name: str
    tokens: int = Field(ge=0)


class _Split(_Base):
    tokens: int = Field(ge=0)
    bytes: int | None = Field(ge=0)
    documents: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    files: list[_File] = Field(min_length=1)


class _Corpus(_Base):
    name: str
    splits: dict[str, str] = {}


class _Tokenizer(_Base):
    asked: str
    kind: str
    vocab_size: int = Field(ge=1)
    fingerprint: str
    eot_id: int | None = Field(ge=0)


class _Manifest(_Base):
    corpus: _Corpus
    tokenizer: _Tokenizer
    val_fraction: float = Field(gt=0, lt=1)
    dtype: Literal["uint16", "uint32"]
    splits: dict[Literal["train", "val", "test"], _Split]


def _validate(manifest):
    """Raise ValueError if a value is invalid. A manifest of version 1 has no list of files, so add it."""
    splits = manifest.get("splits")
    if manifest["version"] == 1 and isinstance(splits, dict):
        for split, counts in splits.items():
            if isinstance(counts, dict):
                counts["files"] = [{"name": f"{split}.bin", "tokens": counts.get("tokens")}]
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if part != "[key]")
        raise ValueError(f"{key}: {first['msg'].replace('Input should', 'must')}") from None
    if "nanogpt" in manifest:  # only manifests that are created in memory have this key
        raise ValueError("nanogpt: unknown key")
    for split in SPLITS:
        if split not in splits:
            raise ValueError(f"splits.{split}: Field required")
    for split, counts in splits.items():
        names = [file["name"] for file in counts["files"]]
        for name in names:
            if not re.fullmatch(rf"{split}(-\d{{5,}})?\.bin", name) or names.count(name) > 1:
                raise ValueError(f"splits.{split}.files: {name!r} is a duplicate or not a file name of this split")
        total = sum(file["tokens"] for file in counts["files"])
        if counts["tokens"] != total:
            raise ValueError(f"splits.{split}.tokens: {counts['tokens']:,}, but the files have {total:,} in total")


def check_content(folder, manifest, vocab_size, verify_all=False):
    """Verify the token files against the hashes of the manifest, and the ids against the vocabulary size.

    Files of more than VERIFIED_BELOW bytes in total are hashed only with `verify_all`. The ids are checked at
    CHECKED_PLACES evenly spaced places per split. A nanoGPT folder has no hashes to verify.

    Raises:
        ValueError: the content has changed, or an id is not in the vocabulary.
    """
    paths = {split: token_paths(folder, manifest, split) for split in manifest["splits"]}
    is_nanogpt = manifest.get("nanogpt")
    size = sum(path.stat().st_size for files in paths.values() for path in files)
    should_hash = not is_nanogpt and (verify_all or size < VERIFIED_BELOW)
    for split, files in paths.items() if should_hash else ():
        if sha256_of_split(files) != manifest["splits"][split]["sha256"]:
            place = f"{files[0]}{' or another file of this split' if files[1:] else ''}"
            raise ValueError(
                f"{place}: has changed since it was written (its SHA-256 differs from manifest.json); {AGAIN}"
            )
    for split, files in paths.items():
        tokens = TokenFile(files, manifest["dtype"])
        length = min(CHECKED_TOKENS, len(tokens))
        places = min(CHECKED_PLACES, -(-len(tokens) // length)) if length else 0  # fewer for a short split
        for start in np.linspace(0, len(tokens) - length, places).astype(np.int64):
            highest = tokens.rows([start], length).max()
            if highest >= vocab_size:
                raise ValueError(
                    f"{files[0]}: the {split} split contains the id {highest:,}, but the tokenizer has vocabulary "
                    f"size {vocab_size:,}; {AGAIN_NANOGPT if is_nanogpt else AGAIN}"
                )


def _nanogpt_manifest(folder):
    splits = {}
    for split in SPLITS:
        file = folder / f"{split}.bin"
        size = file.stat().st_size
        if size % 2:
            raise ValueError(f"{file}: not 16-bit ids: {size:,} bytes is not a multiple of 2; {AGAIN_NANOGPT}")
        splits[split] = {
            "tokens": size // 2,
            "bytes": None,
            "documents": None,
            "sha256": sha256(file) if size <= SAMPLED_ABOVE else _sampled_sha256(file, size),
            "files": [{"name": file.name, "tokens": size // 2}],
        }
    tokenizer = {"kind": "gpt2", "vocab_size": 50257, "eot_id": 50256}
    if (folder / "meta.pkl").is_file():
        stoi = read_meta(folder / "meta.pkl")
        tokenizer = {"kind": "char", "vocab_size": len(stoi), "eot_id": None, "stoi": stoi}
    return {
        "version": VERSION,
        "nanogpt": True,
        "corpus": {"kind": "nanogpt", "name": folder.resolve().name},
        "tokenizer": tokenizer,
        "val_fraction": None,
        "split_seed": None,
        "dtype": "uint16",
        "splits": splits,
    }


def _sampled_sha256(path, size):
    """Return "sampled:" followed by a SHA-256 of the first MiB, the last MiB and the size of a file."""
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(2**20))
        file.seek(-(2**20), os.SEEK_END)
        digest.update(file.read(2**20) + str(size).encode())
    return f"sampled:{digest.hexdigest()}"


class _PlainUnpickler(pickle.Unpickler):
    """Reads only dicts, lists, tuples, strings and numbers. Never imports a class or function."""

    def find_class(self, module, name):
        raise ValueError(f"contains {module}.{name}, but only dicts, lists, tuples, strings and numbers are allowed")


def read_meta(path):
    """Return the stoi of a nanoGPT meta.pkl, {character: id}. No code in the pickle is executed.

    Raises:
        ValueError: the pickle has no stoi, or contains classes or functions.
    """
    with open(path, "rb") as file:
        try:
            meta = _PlainUnpickler(file).load()
        except OSError:
            raise
        except Exception as error:  # a damaged pickle can raise almost any exception
            problem = f"cannot be read ({type(error).__name__}: {one_line(error)})"
            raise ValueError(f"{path}: {problem}; {AGAIN_NANOGPT}") from None
    stoi = meta.get("stoi") if isinstance(meta, dict) else None
    if not isinstance(stoi, dict) or not stoi:
        raise ValueError(f"{path}: has no stoi, the map from characters to ids; {AGAIN_NANOGPT}")
    return stoi
