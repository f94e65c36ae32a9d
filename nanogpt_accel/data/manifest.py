"""manifest.json and nanoGPT's own folders: what a data folder contains, and whether its files are what that says.

    manifest = read_manifest(folder)
    check_content(folder, manifest, vocab_size)

A manifest means complete data: it is the last file to appear.
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
from ..utils.text import one_line
from .token_files import AGAIN, FILES, SPLITS, VERSION, TokenFile, sha256_of_split, token_paths

SAMPLED_ABOVE = 2**30  # bytes of a nanoGPT file above which only its head, tail and size are hashed
VERIFIED_BELOW = 2**26  # bytes of token files that are hashed each time they are opened: a fifth of a second
LOOKS, LOOK_TOKENS = 64, 2**18  # places of a split where the ids are checked, and how many there
AGAIN_NANOGPT = "make it again with nanoGPT's prepare.py"


def is_data_folder(folder):
    """Whether a folder has token files: ours, with a manifest, or nanoGPT's, without."""
    has = {name: (Path(folder) / name).is_file() for name in FILES}
    # .bin files beside a tokenizer.json are ours, amid the moves of finish() or after a crash between them
    return has["manifest.json"] or (has["train.bin"] and has["val.bin"] and not has["tokenizer.json"])


def read_manifest(folder):
    """Return what a data folder contains, and check the sizes of its files. check_content checks what is in them.

    A nanoGPT folder has no manifest.json; one is made in memory: dtype uint16, kind "char" and `stoi` if there is a
    meta.pkl, else "gpt2"; "bytes" and "documents" are None, and `nanogpt` is true. Its "sha256" is that of the whole
    file, or, above SAMPLED_ABOVE, "sampled:" and that of its first and last MiB and its size, so that a run's start
    does not read 17 GB.

    Returns:
        {"version", "corpus", "tokenizer", "val_fraction", "split_seed", "dtype", "splits": {"train" and "val", maybe
        "test": {"tokens", "bytes", "documents", "sha256", "files": [{"name", "tokens"}, ...]}}}

    Raises:
        FileNotFoundError: no token files. ValueError: they are damaged; one line with the fix.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not is_data_folder(folder):
        if any(folder.glob("*.bin")):
            raise ValueError(
                f"data_dir={folder}: token files without a manifest.json, maybe not whole: take "
                f"another data_dir, or {AGAIN}"
            )
        raise FileNotFoundError(f"data_dir={folder}: {_instead(folder)}")
    if not path.is_file():
        return _nanogpt_manifest(folder)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        version = manifest.get("version") if isinstance(manifest, dict) else 0
        if type(version) is not int:
            raise ValueError(f"version: {version!r} is no whole number")
        if version in (1, VERSION):
            _check_form(_with_files(manifest) if version == 1 else manifest)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: {one_line(error)}: {AGAIN}") from None
    if version not in (1, VERSION):
        raise ValueError(f"{path}: version {version}, this program reads version {VERSION}: {AGAIN}")
    itemsize = np.dtype(manifest["dtype"]).itemsize
    sizes = {
        folder / file["name"]: file["tokens"] * itemsize
        for counts in manifest["splits"].values()
        for file in counts["files"]
    }
    for file, size in sizes.items():
        found = file.stat().st_size if file.is_file() else 0
        if found != size:
            raise ValueError(
                f"{file}: {found:,} bytes, but the manifest says {size:,} "
                f"({size // itemsize:,} tokens of {itemsize} bytes): {AGAIN}"
            )
    splits = manifest["splits"]  # in the order in which their first documents were met
    manifest["splits"] = {split: splits[split] for split in (*SPLITS, "test") if split in splits}
    return manifest


def _instead(folder):
    """Return what a folder without token files is, as far as that helps to find the right one."""
    if (folder / "run.yaml").is_file():
        import yaml

        try:
            data = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))["data"]["data_dir"]
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            data = None
        return f"a run, no token files: {f'its own are in {data}' if data else 'give the data_dir of its run.yaml'}"
    if (folder / ".partial").is_dir():
        return "its preparation was interrupted or still goes on: prepare it, which goes on where that stopped"
    inner = sorted(path.name for path in folder.iterdir() if is_data_folder(path)) if folder.is_dir() else []
    if inner:
        more = f" and {len(inner) - 10:,} more" if len(inner) > 10 else ""
        return f"no data folder itself; give one of those in it: {', '.join(inner[:10])}{more}"
    return "no train.bin and val.bin there: prepare them first, or give the right data_dir"


def _with_files(manifest):
    """Return a manifest of version 1, which had one file for each split and no list of them, with that list."""
    splits = manifest.get("splits")
    for split, counts in (splits if isinstance(splits, dict) else {}).items():
        if isinstance(counts, dict):
            counts["files"] = [{"name": f"{split}.bin", "tokens": counts.get("tokens")}]
    return manifest


class _Form(BaseModel):
    """A part of manifest.json, which may have more keys than these."""

    model_config = ConfigDict(strict=True, extra="allow")


class _File(_Form):
    name: str
    tokens: int = Field(ge=0)


class _Split(_Form):
    tokens: int = Field(ge=0)
    bytes: int | None = Field(ge=0)
    documents: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    files: list[_File] = Field(min_length=1)


class _Corpus(_Form):
    name: str
    splits: dict[str, str] = {}


class _Tokenizer(_Form):
    asked: str
    kind: str
    vocab_size: int = Field(ge=1)
    fingerprint: str
    eot_id: int | None = Field(ge=0)


class _Manifest(_Form):
    corpus: _Corpus
    tokenizer: _Tokenizer
    val_fraction: float = Field(gt=0, lt=1)
    dtype: Literal["uint16", "uint32"]
    splits: dict[Literal["train", "val", "test"], _Split]


def _check_form(manifest):
    """Raise ValueError with the key of the first thing that Writer.finish would not write."""
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(key) for key in first["loc"] if key != "[key]")
        raise ValueError(f"{where}: {first['msg'].replace('Input should', 'must')}" if where else "no object") from None
    if "nanogpt" in manifest:  # only the one that is made in memory has it
        raise ValueError("nanogpt: no key of this file")
    for split in SPLITS:
        if split not in manifest["splits"]:
            raise ValueError(f"splits.{split}: Field required")
    for split, counts in manifest["splits"].items():
        names = [file["name"] for file in counts["files"]]
        for name in names:
            if not re.fullmatch(rf"{split}(-\d{{5,}})?\.bin", name) or names.count(name) > 1:
                raise ValueError(
                    f"splits.{split}.files: {name!r} is not the name of one of its files, or stands there twice"
                )
        total = sum(file["tokens"] for file in counts["files"])
        if counts["tokens"] != total:
            raise ValueError(f"splits.{split}.tokens: {counts['tokens']:,}, but its files have {total:,}")


def check_content(folder, manifest, vocab_size, whole=False):
    """Verify the token files by the hashes of the manifest, and their ids by the vocabulary size.

    Files of less than VERIFIED_BELOW bytes together are hashed, larger ones only if `whole`, because that reads all of
    them. The ids are checked in LOOKS places of each split, spread evenly: what is wrong between these in a large file
    is not found. A nanoGPT folder has no hashes to verify.

    Raises:
        ValueError: other content, or an id that the tokenizer lacks.
    """
    paths = {split: token_paths(folder, manifest, split) for split in manifest["splits"]}
    again = AGAIN_NANOGPT if manifest.get("nanogpt") else AGAIN
    if not manifest.get("nanogpt"):
        size = sum(path.stat().st_size for files in paths.values() for path in files)
        for split, files in paths.items() if whole or size < VERIFIED_BELOW else ():
            if sha256_of_split(files) != manifest["splits"][split]["sha256"]:
                raise ValueError(
                    f"{files[0]}{' and the others' if files[1:] else ''}: changed since it was written "
                    f"(the SHA-256 in manifest.json is another): {again}"
                )
    for split, files in paths.items():
        tokens = TokenFile(files, manifest["dtype"])
        length = min(LOOK_TOKENS, len(tokens))
        looks = min(LOOKS, -(-len(tokens) // length)) if length else 0  # as many as cover a short split
        for start in np.linspace(0, len(tokens) - length, looks).astype(np.int64):
            highest = tokens.rows([start], length).max()
            if highest >= vocab_size:
                raise ValueError(
                    f"{files[0]}: the {split} tokens hold the id {highest:,}, but the tokenizer has only "
                    f"{vocab_size:,} symbols: these are another tokenizer's tokens: {again}"
                )


def _nanogpt_manifest(folder):
    splits = {}
    for split in SPLITS:
        file = folder / f"{split}.bin"
        size = file.stat().st_size
        if size % 2:
            raise ValueError(f"{file}: {size:,} bytes, an odd number, is no file of 16-bit ids: {AGAIN_NANOGPT}")
        splits[split] = {
            "tokens": size // 2,
            "bytes": None,
            "documents": None,
            "sha256": sha256(file) if size <= SAMPLED_ABOVE else _sampled_sha256(file, size),
            "files": [{"name": file.name, "tokens": size // 2}],
        }
    meta = folder / "meta.pkl"
    stoi = read_meta(meta) if meta.is_file() else None
    if stoi:
        tokenizer = {"kind": "char", "vocab_size": len(stoi), "eot_id": None, "stoi": stoi}
    else:
        tokenizer = {"kind": "gpt2", "vocab_size": 50257, "eot_id": 50256}
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
    """Return "sampled:" and the SHA-256 of the first and the last MiB of a file and its size."""
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(2**20))
        file.seek(-(2**20), os.SEEK_END)
        digest.update(file.read(2**20) + str(size).encode())
    return f"sampled:{digest.hexdigest()}"


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, tuples, text and numbers. Anything else that a pickle names is refused, not imported."""

    def find_class(self, module, name):
        raise ValueError(f"asks for {module}.{name}, and a pickle that asks for code is not read")


def read_meta(path):
    """Return the stoi of a nanoGPT meta.pkl: {character: id}.

    Raises:
        ValueError: the pickle holds more than plain values (none of it is run), or no stoi.
    """
    with open(path, "rb") as file:
        try:
            meta = _PlainUnpickler(file).load()
        except OSError:
            raise
        except ValueError as error:
            raise ValueError(f"{path}: {error}: {AGAIN_NANOGPT}") from None
        except Exception as error:  # a damaged pickle raises almost anything
            raise ValueError(
                f"{path}: not a pickle of plain values ({type(error).__name__}): {AGAIN_NANOGPT}"
            ) from None
    stoi = meta.get("stoi") if isinstance(meta, dict) else None
    if not isinstance(stoi, dict) or not stoi:
        raise ValueError(f"{path}: has no stoi, the ids of its characters: {AGAIN_NANOGPT}")
    return stoi


def differences(held, wanted, folder):
    """Compare what a run wants with what a data folder has, both as {key: value}. folder: for the messages.

    Returns:
        A list of problems, one line each; empty if the folder fits.
    """
    return [
        f"{key}={wanted[key]}, but data_dir={folder} was prepared with {key}={held[key]}: leave {key} "
        "out to take that, or set another data_dir"
        for key in wanted
        if wanted[key] != held[key]
    ]
