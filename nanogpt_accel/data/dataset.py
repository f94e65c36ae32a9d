"""What a recipe's data section asks for: the folder of token files, what is wrong with it, and the folder as a Dataset.

`data` is a recipe's data section; only its attributes are used. Nothing is written here: that is prepare.py's work.
"""

import difflib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from ..utils.fields import raise_problems
from ..utils.text import file_name
from .manifest import check_content, differences, is_data_folder, read_manifest
from .sources import find_corpus, source_name
from .token_files import AGAIN, SPLITS, TokenFile, refuse_to_overwrite, token_paths
from .tokenizer import Tokenizer

SPLIT_SEED = 2357  # nanoGPT's; fixed, so that validation losses of runs with other seeds can be compared
TOKENIZERS = ("gpt2", "char", "bpe")


@dataclass(frozen=True)
class Dataset:
    """A prepared data folder: its manifest, its tokenizer and the two files of ids."""

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
        """What identifies the tokens: a checkpoint stores it, and a run resumes only with the same."""
        hashes = {split: self.manifest["splits"][split]["sha256"] for split in SPLITS}
        return {"tokenizer": self.tokenizer.fingerprint} | hashes

    def text_bytes(self, split):
        """Return the size of the text of a split as UTF-8, or None if the folder does not say."""
        return self.manifest["splits"][split]["bytes"]


def data_folder(data):
    """Return the folder where the token files are or will be.

    That is data_dir if it is set, else data/CORPUS_TOKENIZER-HASH. The hash covers all that decides the tokens, so that
    another setting makes another folder, and nothing is overwritten.

    Raises:
        ValueError, FileNotFoundError: no such corpus or tokenizer.
    """
    if data.data_dir:
        return Path(os.path.expanduser(data.data_dir))
    corpus = corpus_of(data)
    identity = json.dumps(facts_of(data, corpus), sort_keys=True)
    is_bpe = data.tokenizer == "bpe"
    name = f"bpe{data.vocab_size}" if is_bpe else file_name(os.path.basename(os.path.abspath(data.tokenizer)))
    return Path("data") / f"{corpus.name}_{name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def is_prepared(data):
    """Whether the token files exist: open_dataset opens them or says what is wrong with them."""
    return is_data_folder(data_folder(data))


def check(data, block_size=None):
    """Check the data section as far as possible without tokenizing or a download.

    Args:
        data: the section. block_size: if given, the length of data that are prepared already is checked too.

    Returns:
        A list of problems, one line each.
    """
    problems = []
    if not (data.data_dir and is_prepared(data)):  # else the corpus is not needed
        for look in (lambda: check_fits(data, corpus_of(data)), lambda: _asked(data)):
            try:
                look()
            except (ValueError, OSError) as error:
                problems.append(str(error))
    if problems:
        return problems
    folder = data_folder(data)
    if folder.exists() and not folder.is_dir():
        return [f"data_dir={folder}: not a folder: give one that holds train.bin and val.bin, or will"]
    try:
        refuse_to_overwrite(folder)
        in_the_way = []
    except ValueError as error:  # asked first: amid another process's moves that folder may become one of data
        in_the_way = [str(error)]
    if not is_data_folder(folder):
        return in_the_way
    try:
        manifest = read_manifest(folder)
        problems = _differences(data, manifest)
    except (ValueError, OSError) as error:
        return [str(error)]
    if block_size:
        counts = {split: manifest["splits"][split]["tokens"] for split in SPLITS}
        problems += _too_short(counts, folder, block_size)
    return problems


def corpus_of(data):
    """Return the Corpus that the section names."""
    return find_corpus(
        data.corpus,
        text_column=data.text_column,
        lines=data.lines,
        dataset_config=data.dataset_config,
        dataset_split=data.dataset_split,
        revision=data.revision,
    )


def check_fits(data, corpus):
    """Raise ValueError for a limit on a single text, which has no documents to leave out, or a tokenizer to be made of
    token ids."""
    if corpus.ids and data.tokenizer in ("char", "bpe"):
        raise ValueError(
            f"tokenizer={data.tokenizer}: is made of a text, but corpus={data.corpus} holds token ids: "
            "take gpt2, or the folder of the tokenizer.json that made them"
        )
    limits = [f"{key}={getattr(data, key)}" for key in ("limit_documents", "limit_tokens") if getattr(data, key)]
    if corpus.is_single and limits:
        raise ValueError(
            f"{', '.join(limits)}: corpus={data.corpus} is one text, which is taken whole: leave that "
            "out, give a shorter file (head -c cuts one)"
            + ("" if corpus.ids else ", or take lines=true, which makes documents of its lines")
        )


def facts_of(data, corpus):
    """Return what decides the tokens, as plain values. A single text is cut without chance, so it has no seed."""
    limits = {
        key: getattr(data, key)
        for key in ("limit_documents", "limit_tokens", "skip_bad_documents")
        if getattr(data, key)
    }
    return {
        "corpus": corpus.source,
        "tokenizer": {"asked": _asked(data)},
        "val_fraction": data.val_fraction,
        "split_seed": None if corpus.is_single else SPLIT_SEED,
        **limits,
    }


def _asked(data):
    """Return the tokenizer that the section asks for, as text: of a folder, its content counts and not its name."""
    if data.tokenizer in TOKENIZERS:
        return f"bpe vocab_size={data.vocab_size}" if data.tokenizer == "bpe" else data.tokenizer
    if not os.path.isdir(os.path.expanduser(data.tokenizer)):
        close = difflib.get_close_matches(data.tokenizer, TOKENIZERS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise FileNotFoundError(
            f"tokenizer={data.tokenizer}: no such tokenizer{hint}; there are "
            f"{', '.join(TOKENIZERS)}, and any folder that holds a tokenizer.json"
        )
    return f"tokenizer.json-{Tokenizer.load(os.path.expanduser(data.tokenizer)).fingerprint[:16]}"


def _differences(data, manifest):
    """Return the problems if data_dir is set and contains something else than the section asks for.

    A key that stands at its default asks for nothing: a recipe with data_dir alone takes what is there. The
    corpus is compared by name and never opened; it may be long gone.
    """
    if not data.data_dir or manifest.get("nanogpt"):
        return []
    fields = getattr(type(data), "model_fields", {})  # of a pydantic section; plain attributes all count
    corpus = manifest["corpus"]
    held = {
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
    wanted = {key: getattr(data, key) for key in held if key not in fields or getattr(data, key) != fields[key].default}
    wanted |= {"corpus": source_name(data.corpus)} if "corpus" in wanted else {}
    wanted |= {"tokenizer": _asked(data)} if "tokenizer" in wanted else {}
    return differences(held, wanted, data.data_dir)


def open_dataset(data, verify=False):
    """Open the token files of a prepared folder as a Dataset.

    If data_dir is set, the corpus need not exist any more; a manifest that contradicts the recipe is an error. In a
    nanoGPT folder its own tokenizer is used, whatever the recipe says.

    Token files of less than 64 MiB together are verified by the manifest's SHA-256; of larger ones only the ids in
    some places are checked, unless `verify` asks to read them all, as `nanogpt-accel data FOLDER` does.

    Raises:
        FileNotFoundError: not prepared. ValueError: damaged, or not what the recipe asks for.
    """
    folder = data_folder(data)
    manifest = read_manifest(folder)
    raise_problems(_differences(data, manifest))
    if not manifest.get("nanogpt"):
        tokenizer = _own_tokenizer(folder, manifest)
    else:
        stoi = manifest["tokenizer"].get("stoi")
        tokenizer = Tokenizer.char_from_meta(stoi) if stoi else Tokenizer.gpt2()
        manifest["tokenizer"]["fingerprint"] = tokenizer.fingerprint
    if data.document_mask and tokenizer.eot_id is None:
        raise ValueError(f"data.document_mask=true: {folder} is one text without end-of-text tokens; leave it out")
    check_content(folder, manifest, tokenizer.vocab_size, whole=verify)
    splits = {split: TokenFile(token_paths(folder, manifest, split), manifest["dtype"]) for split in manifest["splits"]}
    return Dataset(folder, manifest, tokenizer, splits)


def _own_tokenizer(folder, manifest):
    """Load the tokenizer of a data folder of ours.

    Raises:
        ValueError: it is gone, damaged, or not the one that made the token files.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: gone, and the token files mean nothing without it: put it back, or {AGAIN}")
    try:
        tokenizer = Tokenizer.load(folder)
    except ValueError as error:
        raise ValueError(f"{error}: or {AGAIN}") from None
    held = manifest["tokenizer"]
    if (
        (tokenizer.fingerprint, tokenizer.vocab_size) != (held["fingerprint"], held["vocab_size"])
        or (held["eot_id"] not in (None, tokenizer.eot_id))
        or tokenizer.dtype.__name__ != manifest["dtype"]
    ):
        raise ValueError(f"{path}: not the tokenizer that made the token files: {AGAIN}")
    return tokenizer


def guess_vocab_size(data, assumed):
    """Return the vocabulary size of a tokenizer before the data are prepared. What is uncertain is appended to
    `assumed`, in words."""
    if data.tokenizer == "gpt2":
        return 50257
    if data.tokenizer == "bpe":
        assumed.append(f"{data.vocab_size:,} symbols, as vocab_size asks; a small text makes fewer")
        return data.vocab_size
    if data.tokenizer == "char":
        symbols = 65 if data.corpus == "shakespeare" else 256
        assumed.append(f"{symbols} characters" + ("" if symbols == 65 else "; preparing the data counts them"))
        return symbols
    return Tokenizer.load(data.tokenizer).vocab_size


def require_tokenizer(dataset, folder, key):
    """Return a list of problems: the model in `folder` reads other ids than the data contain. key: for the message."""
    held = Tokenizer.load(folder)
    if held.is_same(dataset.tokenizer):
        return []
    return [
        f"{key}: {folder} reads {held.kind} tokens ({held.vocab_size:,} symbols), but {dataset.folder} holds "
        f"{dataset.tokenizer.kind} ones ({dataset.tokenizer.vocab_size:,}): prepare with tokenizer={folder}"
    ]


def require_block(dataset, block_size):
    """Return a list of problems: the splits that have less than block_size + 1 tokens, which is one sample."""
    return _too_short({"train": len(dataset.train), "val": len(dataset.val)}, dataset.folder, block_size)


def _too_short(counts, folder, block_size):
    other = {"train": "smaller", "val": "larger"}
    return [
        f"block_size={block_size}: a sample takes {block_size + 1:,} tokens, but {folder / split}.bin "
        f"has {count:,}: take a smaller block_size, a larger corpus or a {other[split]} val_fraction"
        for split, count in counts.items()
        if count < block_size + 1
    ]
