"""Read and verify data folders: those of this package, described by manifest.json, and those of other projects.

    manifest = read_manifest(folder)
    check_content(folder, manifest, vocab_size)

If a folder has a manifest, its data are complete, because manifest.json is moved to the folder after all other files.
"""

import json
import os
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..utils.text import counted, one_line
from .find_tokenizer import TOKENIZERS, load_tokenizer
from .foreign_tokens import OTHER_TOKENIZER, file_entries, find_splits, find_token_files, open_splits
from .meta import read_meta, vocabulary_facts
from .parts import PARTS
from .token_files import AGAIN, SPLITS, VERSION, is_split_file, sha256_of_split, token_file
from .tokenizer import Tokenizer

SAMPLED_ABOVE = 2**30  # bytes; for a larger split of another project, only a sample of each file is hashed
VERIFIED_BELOW = 2**26  # bytes; a smaller data folder is verified each time it is opened, which takes up to 0.2 seconds
CHECKED_PLACES, CHECKED_TOKENS = 64, 2**18  # number of places per split where ids are checked, and tokens per place


def describe_split(manifest, split):
    """Return the size of a split as text: `2 files, 1,000 tokens, 20 documents, 4.100 bytes per token`.

    For token files of another project, only the number of tokens is known.
    """
    counts, files = manifest["splits"][split], manifest["corpus"].get("split_files", {}).get(split)
    size = f"{counted(files, 'file')}, " if files else ""
    size += counted(counts["tokens"], "token")
    if counts["bytes"] is not None:
        size += f", {counted(counts['documents'], 'document')}"
        size += f", {counts['bytes'] / counts['tokens']:.3f} bytes per token"
    return size


def is_data_folder(folder):
    """Return whether a folder contains a manifest.json of this package, or token files of another project."""
    return (Path(folder) / "manifest.json").is_file() or bool(find_token_files(folder))


def read_manifest(folder, tokenizer="gpt2", eos_token=None, val_fraction=0.0005, split_by="auto"):
    """Return the manifest of a data folder, after checking the values in it and the sizes of the token files.

    For a folder of nanoGPT or another project, a manifest is created in memory. In this manifest, "nanogpt" is true,
    "bytes" and "documents" are None, and "tokenizer" has the key "stoi" if there is a meta.pkl. If a split has more
    than SAMPLED_ABOVE bytes, its "sha256" is "sampled:" and a hash of the first MiB, the last MiB and the size of each
    file. With a hash of all bytes, a run on OpenWebText would read 17 GB at each start.

    Args:
        tokenizer, eos_token, val_fraction, split_by: settings of the data section; see recipe.Data. They are only used
            for a folder of another project.

    Returns:
        {"version", "corpus", "tokenizer", "val_fraction", "split_seed", "has_own_val", "dtype", "splits"}.
        "has_own_val" is false if val was taken from the training data. "splits" has the keys "train", "val" and
        optionally "test". Each value is {"tokens", "bytes", "documents", "sha256", "files": [{"name", "tokens"}, ...]}.

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
        return _foreign_manifest(folder, tokenizer, eos_token, val_fraction, split_by)
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
        raise ValueError(f"{path}: version {version} is not supported (supported: versions 1 and {VERSION}); {AGAIN}")
    itemsize, splits = np.dtype(manifest["dtype"]).itemsize, manifest["splits"]
    for entry in [entry for counts in splits.values() for entry in counts["files"]]:
        file, expected = folder / entry["name"], entry.get("offset", 0) + entry["tokens"] * itemsize
        size = file.stat().st_size if file.is_file() else 0
        is_foreign = os.path.isabs(entry["name"])  # a split may use only a part of such a file
        if size < expected or (size > expected and not is_foreign):
            raise ValueError(
                f"{file}: {size:,} bytes, but {path if is_foreign else 'the manifest'} requires {expected:,} "
                f"({entry['tokens']:,} tokens of {itemsize} bytes); {'restore the file, or ' * is_foreign}{AGAIN}"
            )
    # manifest.json lists the splits in the order in which they were first written
    manifest["splits"] = {split: splits[split] for split in (*SPLITS, "test") if split in splits}
    return manifest


def _describe(folder):
    """Return a message that says why the folder is not a data folder, and how to fix this."""
    if (folder / "run.yaml").is_file():
        import yaml

        try:
            data = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))["data"]["data_dir"]
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            data = None
        return "a run folder, not a data folder; use " + (
            f"its data_dir {data}" if data else "the data_dir of its run.yaml"
        )
    if (folder / ".partial").is_dir() or (folder / PARTS).is_dir():
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
    offset: int = Field(0, ge=0)


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
    dtype: Literal["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
    splits: dict[Literal["train", "val", "test"], _Split]


def _validate(manifest):
    """Raise ValueError if a value is invalid. In a manifest of version 1, first add a list of files to each split."""
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
    has_foreign_files = manifest["corpus"].get("kind") == "ids"
    for split, counts in splits.items():
        names = [file["name"] for file in counts["files"]]
        for name in names:
            if has_foreign_files and os.path.isabs(name):
                continue
            if not is_split_file(name, split) or names.count(name) > 1:
                raise ValueError(f"splits.{split}.files: {name!r} is listed twice, or is not a file name of this split")
        total = sum(file["tokens"] for file in counts["files"])
        if counts["tokens"] != total:
            raise ValueError(f"splits.{split}.tokens: {counts['tokens']:,}, but the files have {total:,} in total")


def check_content(folder, manifest, vocab_size, verify_all=False):
    """Verify the token files against the hashes of the manifest, and the ids against the vocabulary size.

    If the files have VERIFIED_BELOW bytes or more in total, they are hashed only with `verify_all`. The ids are checked
    at CHECKED_PLACES evenly spaced places per split. Token files of other projects have no hashes to verify.

    Raises:
        ValueError: the content has changed, or an id is not in the vocabulary.
    """
    splits = {split: token_file(folder, manifest, split) for split in manifest["splits"]}
    is_foreign = manifest.get("nanogpt")
    size = sum(len(tokens) * tokens.dtype.itemsize for tokens in splits.values())
    should_hash = not is_foreign and (verify_all or size < VERIFIED_BELOW)
    for split, tokens in splits.items() if should_hash else ():
        if sha256_of_split(tokens) != manifest["splits"][split]["sha256"]:
            place = f"{tokens.paths[0]}{' or another file of this split' if tokens.paths[1:] else ''}"
            raise ValueError(
                f"{place}: has changed since it was written (its SHA-256 differs from manifest.json); {AGAIN}"
            )
    for split, tokens in splits.items():
        length = min(CHECKED_TOKENS, len(tokens))
        places = min(CHECKED_PLACES, -(-len(tokens) // length)) if length else 0  # fewer for a short split
        for start in np.linspace(0, len(tokens) - length, places).astype(np.int64):
            ids = tokens.rows([start], length)
            for wrong in [i for i in (ids.min(), ids.max()) if not 0 <= i < vocab_size]:
                fix = OTHER_TOKENIZER if is_foreign else AGAIN
                fix = "correct stoi or vocab_size in its meta.pkl" if "stoi" in manifest["tokenizer"] else fix
                raise ValueError(
                    f"{tokens.paths[0]}: the {split} split contains the id {wrong:,}, but the tokenizer has vocabulary "
                    f"size {vocab_size:,}; {fix}"
                )


def _foreign_manifest(folder, tokenizer, eos_token, val_fraction, split_by):
    """Return the manifest of a folder of another project. Arguments: see read_manifest."""
    vocabulary = _find_vocabulary(folder, tokenizer, eos_token)
    files = find_token_files(folder)
    own_names = [folder / f"{split}.bin" for split in SPLITS]
    paths = own_names if set(own_names) <= set(files) else files  # if train.bin and val.bin exist, ignore other files
    found, splits = find_splits(paths, split_by), {}
    for split, tokens in open_splits(found, vocabulary["vocab_size"], val_fraction).items():
        is_large = len(tokens) * tokens.dtype.itemsize > SAMPLED_ABOVE
        splits[split] = {
            "tokens": len(tokens),
            "bytes": None,
            "documents": None,
            "sha256": sha256_of_split(tokens, sampled=is_large),
            "files": file_entries(tokens, folder),
        }
    return {
        "version": VERSION,
        "nanogpt": True,
        "corpus": {"kind": "nanogpt", "name": folder.resolve().name},
        "tokenizer": vocabulary,
        "val_fraction": None if "val" in found else val_fraction,
        "split_seed": None,
        "has_own_val": "val" in found,
        "dtype": tokens.dtype.name,
        "splits": splits,
    }


def _find_vocabulary(folder, tokenizer, eos_token):
    """Return the "tokenizer" entry for the manifest of a folder of another project.

    If the folder contains a meta.pkl or a tokenizer.json, the tokenizer is read from this file. Otherwise, the argument
    `tokenizer` names it.
    """
    is_named = tokenizer not in TOKENIZERS  # a folder or a Hub id
    meta, own = folder / "meta.pkl", folder / "tokenizer.json"
    if eos_token and not is_named and (meta.is_file() or not own.is_file()):
        used = "its meta.pkl" if meta.is_file() else "the tokenizer of GPT-2"
        fix = "leave eos_token out" + ", or set tokenizer to a folder or a Hub id" * (not meta.is_file())
        raise ValueError(f"eos_token={eos_token}: data_dir={folder} uses {used}, so eos_token cannot be changed; {fix}")
    if meta.is_file():
        if is_named:
            fix = "remove meta.pkl, or set tokenizer=gpt2"
            raise ValueError(f"tokenizer={tokenizer}: data_dir={folder} has a meta.pkl; {fix}")
        return vocabulary_facts(read_meta(meta))
    if own.is_file():
        if is_named and not load_tokenizer(tokenizer).is_same(Tokenizer.load(folder)):
            problem = f"data_dir={folder} has a different tokenizer.json"
            raise ValueError(f"tokenizer={tokenizer}: {problem}; remove that file, or leave tokenizer out")
        tokenizer = str(folder.absolute())
    elif not is_named:
        if tokenizer != "gpt2":
            problem = f"data_dir={folder} contains token ids, but no meta.pkl and no tokenizer.json"
            raise ValueError(f"tokenizer={tokenizer}: {problem}; copy one of these to data_dir, or set tokenizer=gpt2")
        return {"kind": "gpt2", "vocab_size": 50257, "eot_id": 50256}
    loaded = load_tokenizer(tokenizer, eos_token)
    facts = {key: getattr(loaded, key) for key in ("kind", "vocab_size", "eot_id")}
    return facts | {"asked": tokenizer, "eos_token": eos_token}
