"""The data folder of a recipe's data section: find it, check it, and open it as a Dataset.

`data` is a data section or any object with its attributes. This file writes nothing; prepare.py does.
"""

import difflib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from ..utils.fields import raise_problems
from ..utils.text import file_name
from .manifest import check_content, is_data_folder, read_manifest
from .sources import find_corpus, source_name
from .token_files import AGAIN, SPLITS, TokenFile, refuse_to_overwrite, token_paths
from .tokenizer import Tokenizer

SPLIT_SEED = 2357  # nanoGPT's; fixed, so that validation losses of runs with different seeds can be compared
TOKENIZERS = ("gpt2", "char", "bpe")


@dataclass(frozen=True)
class Dataset:
    """A prepared data folder: its manifest, tokenizer and token files."""

    folder: Path
    manifest: dict
    tokenizer: Tokenizer
    splits: dict  # "train", "val" and maybe "test" -> TokenFile

    @property
    def train(self):
        return self.splits["train"]

    @property
    def val(self):
        return self.splits["val"]

    @property
    def identity(self):
        """Hashes of the tokens, which a checkpoint stores; a run resumes only with the same ones."""
        hashes = {split: self.manifest["splits"][split]["sha256"] for split in SPLITS}
        return {"tokenizer": self.tokenizer.fingerprint} | hashes

    def text_bytes(self, split):
        """Return the size of the text of a split in UTF-8, or None if unknown."""
        return self.manifest["splits"][split]["bytes"]


def data_folder(data):
    """Return the folder of the token files: data_dir, or data/CORPUS_TOKENIZER-HASH.

    The hash covers everything that determines the tokens. Raises ValueError or FileNotFoundError if the corpus or the
    tokenizer does not exist.
    """
    if data.data_dir:
        return Path(os.path.expanduser(data.data_dir))
    corpus = corpus_of(data)
    identity = json.dumps(facts_of(data, corpus), sort_keys=True)
    is_bpe = data.tokenizer == "bpe"
    name = f"bpe{data.vocab_size}" if is_bpe else file_name(os.path.basename(os.path.abspath(data.tokenizer)))
    return Path("data") / f"{corpus.name}_{name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def is_prepared(data):
    """Return whether the token files exist. open_dataset checks whether they are valid."""
    return is_data_folder(data_folder(data))


def check(data, block_size=None):
    """Check the data section without tokenizing or downloading anything.

    block_size: if given, also check that prepared data are long enough. Returns a list of problems, one line each.
    """
    problems = []
    if not (data.data_dir and is_prepared(data)):  # else the corpus is not needed
        for function in (lambda: check_fits(data, corpus_of(data)), lambda: _tokenizer_identity(data)):
            try:
                function()
            except (ValueError, OSError) as error:
                problems.append(str(error))
    if problems:
        return problems
    folder = data_folder(data)
    if folder.exists() and not folder.is_dir():
        return [f"data_dir={folder}: not a folder; set a folder that contains train.bin and val.bin, or a new one"]
    try:
        refuse_to_overwrite(folder)
    except ValueError as error:  # checked first, because another process may be completing this folder
        problems = [str(error)]
    if not is_data_folder(folder):
        return problems
    try:
        manifest = read_manifest(folder)
        problems = _differences(data, manifest)
    except (ValueError, OSError) as error:
        return [str(error)]
    counts = {split: manifest["splits"][split]["tokens"] for split in SPLITS}
    return problems + (_too_short(counts, folder, block_size) if block_size else [])


def corpus_of(data):
    """Return the Corpus of the data section."""
    keys = ("text_column", "lines", "dataset_config", "dataset_split", "revision")
    return find_corpus(data.corpus, **{key: getattr(data, key) for key in keys})


def check_fits(data, corpus):
    """Raise ValueError if the limits or the tokenizer do not fit the kind of the corpus."""
    if corpus.ids and data.tokenizer in ("char", "bpe"):
        raise ValueError(
            f"tokenizer={data.tokenizer}: is made from a text, but corpus={data.corpus} contains token ids; use gpt2, "
            "or the folder of the tokenizer.json that made them"
        )
    limits = [f"{key}={getattr(data, key)}" for key in ("limit_documents", "limit_tokens") if getattr(data, key)]
    if corpus.is_single and limits:
        lines = "" if corpus.ids else ", or set lines=true for one document per line"
        raise ValueError(
            f"{', '.join(limits)}: corpus={data.corpus} is one text, which cannot be limited; remove the limit, or "
            f"use a shorter file (cut with head -c){lines}"
        )


def facts_of(data, corpus):
    """Return what determines the tokens, as plain values. The split of a single text does not depend on a seed."""
    limits = ("limit_documents", "limit_tokens", "skip_bad_documents")
    return {
        "corpus": corpus.source,
        "tokenizer": {"asked": _tokenizer_identity(data)},
        "val_fraction": data.val_fraction,
        "split_seed": None if corpus.is_single else SPLIT_SEED,
        **{key: getattr(data, key) for key in limits if getattr(data, key)},
    }


def _tokenizer_identity(data):
    """Return a text that identifies the tokenizer setting: for a folder, its content and not its name."""
    if data.tokenizer in TOKENIZERS:
        return f"bpe vocab_size={data.vocab_size}" if data.tokenizer == "bpe" else data.tokenizer
    if not os.path.isdir(os.path.expanduser(data.tokenizer)):
        close = difflib.get_close_matches(data.tokenizer, TOKENIZERS, n=1)
        problem = "no such tokenizer" + (f" (did you mean {close[0]}?)" if close else "")
        fix = f"use {', '.join(TOKENIZERS)}, or a folder with a tokenizer.json"
        raise FileNotFoundError(f"tokenizer={data.tokenizer}: {problem}; {fix}")
    return f"tokenizer.json-{Tokenizer.load(os.path.expanduser(data.tokenizer)).fingerprint[:16]}"


def _differences(data, manifest):
    """Return a list of problems if data_dir contains something else than the section requires.

    A key with its default value requires nothing, so a recipe with only data_dir accepts any data. The corpus may no
    longer exist, so only its name is compared.
    """
    if not data.data_dir or manifest.get("nanogpt"):
        return []
    corpus = manifest["corpus"]
    prepared = {
        "corpus": corpus.get("name"),
        "tokenizer": manifest["tokenizer"].get("asked"),
        "val_fraction": manifest["val_fraction"],
        "text_column": corpus.get("column", "text"),
        "lines": corpus.get("lines", False),
        "dataset_config": corpus.get("config"),
        "dataset_split": corpus.get("splits", {}).get("train", "train"),
        "revision": corpus.get("revision"),
        "limit_documents": manifest.get("limit_documents"),
        "limit_tokens": manifest.get("limit_tokens"),
    }
    identities = {"corpus": lambda: source_name(data.corpus), "tokenizer": lambda: _tokenizer_identity(data)}
    fields = getattr(type(data), "model_fields", {})  # of a pydantic section; all plain attributes are compared
    problems = []
    for key, value in prepared.items():
        setting = getattr(data, key)
        if key in fields and setting == fields[key].default:
            continue
        setting = identities[key]() if key in identities else setting
        if setting != value:
            problems.append(
                f"{key}={setting}, but data_dir={data.data_dir} was prepared with {key}={value}; remove {key} to use "
                "these data, or set another data_dir"
            )
    return problems


def open_dataset(data, verify=False):
    """Open the token files of a prepared folder as a Dataset.

    If data_dir is set, the corpus is not needed. A nanoGPT folder is used with its own tokenizer. By default only token
    files of less than 64 MiB in total are verified against the SHA-256 of the manifest, and some ids of larger ones are
    checked. verify: verify all token files, as `nanogpt-accel data FOLDER` does.

    Raises:
        FileNotFoundError: not prepared.
        ValueError: damaged, or different from the recipe.
    """
    folder = data_folder(data)
    manifest = read_manifest(folder)
    raise_problems(_differences(data, manifest))
    if not manifest.get("nanogpt"):
        tokenizer = _load_tokenizer(folder, manifest)
    else:
        stoi = manifest["tokenizer"].get("stoi")
        tokenizer = Tokenizer.char_from_meta(stoi) if stoi else Tokenizer.gpt2()
        manifest["tokenizer"]["fingerprint"] = tokenizer.fingerprint
    if data.document_mask and tokenizer.eot_id is None:
        raise ValueError(f"data.document_mask=true: {folder} is one text without end-of-text tokens; set it to false")
    check_content(folder, manifest, tokenizer.vocab_size, verify_all=verify)
    splits = {split: TokenFile(token_paths(folder, manifest, split), manifest["dtype"]) for split in manifest["splits"]}
    return Dataset(folder, manifest, tokenizer, splits)


def _load_tokenizer(folder, manifest):
    """Load the tokenizer of a data folder, and check that it made the token files."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: missing, so the token files cannot be decoded; restore it, or {AGAIN}")
    try:
        tokenizer = Tokenizer.load(folder)
    except ValueError as error:
        raise ValueError(f"{error}; or {AGAIN}") from None
    expected = manifest["tokenizer"]
    is_same = (tokenizer.fingerprint, tokenizer.vocab_size) == (expected["fingerprint"], expected["vocab_size"])
    is_same = is_same and expected["eot_id"] in (None, tokenizer.eot_id)
    if not is_same or tokenizer.dtype.__name__ != manifest["dtype"]:
        raise ValueError(f"{path}: not the tokenizer that made the token files; {AGAIN}")
    return tokenizer


def guess_vocab_size(data, assumed):
    """Return the vocabulary size of data that are not prepared, and append uncertain assumptions to `assumed`."""
    if data.tokenizer == "bpe":
        assumed.append(f"vocabulary size {data.vocab_size:,} (vocab_size); a small corpus results in a smaller one")
        return data.vocab_size
    if data.tokenizer == "char":
        is_known = data.corpus == "shakespeare"
        assumed.append("65 characters" if is_known else "256 characters; prepare the data to count them")
        return 65 if is_known else 256
    return 50257 if data.tokenizer == "gpt2" else Tokenizer.load(data.tokenizer).vocab_size


def require_tokenizer(dataset, folder, key):
    """Return a list of problems if the model in `folder` has another tokenizer than the data. key: for the message."""
    model, data = Tokenizer.load(folder), dataset.tokenizer
    if model.is_same(data):
        return []
    return [
        f"{key}: {folder} has a {model.kind} tokenizer (vocabulary size {model.vocab_size:,}), but {dataset.folder} "
        f"has a {data.kind} tokenizer ({data.vocab_size:,}); prepare the data with tokenizer={folder}"
    ]


def require_block(dataset, block_size):
    """Return a list of problems: the splits with less than the block_size + 1 tokens of one sample."""
    return _too_short({"train": len(dataset.train), "val": len(dataset.val)}, dataset.folder, block_size)


def _too_short(counts, folder, block_size):
    other = {"train": "smaller", "val": "larger"}
    return [
        f"block_size={block_size}: a sample has {block_size + 1:,} tokens, but {folder / split}.bin has {count:,}; "
        f"set a smaller block_size, a larger corpus or a {other[split]} val_fraction"
        for split, count in counts.items()
        if count < block_size + 1
    ]
