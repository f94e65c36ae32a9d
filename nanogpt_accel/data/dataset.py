"""Find, check and open the data folder that a recipe's data section describes. prepare.py creates this folder.

In all functions, `data` is the data section of a recipe, or any object with the same attributes.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from ..utils.fields import raise_problems
from ..utils.text import file_name, quoted
from .find_tokenizer import TOKENIZERS, hub_id, load_tokenizer
from .foreign_tokens import is_token_file
from .manifest import check_content, is_data_folder, read_manifest
from .meta import tokenizer_from_meta
from .sources import find_corpus, source_name
from .token_files import AGAIN, SPLITS, refuse_to_overwrite, token_file
from .tokenizer import EOT, Tokenizer

LARGER_VAL = (0.01, 0.1, 0.5)  # values for val_fraction if the user did not set it and val is shorter than a sample
SPLIT_SEED = 2357  # nanoGPT's seed; fixed, so that validation losses of runs with different seeds can be compared


@dataclass(frozen=True)
class Dataset:
    """A prepared data folder: its manifest, tokenizer and token files."""

    folder: Path
    manifest: dict
    tokenizer: Tokenizer
    splits: dict  # "train", "val" and optionally "test" -> TokenFile

    @property
    def train(self):
        return self.splits["train"]

    @property
    def val(self):
        return self.splits["val"]

    @property
    def identity(self):
        """Hashes of the tokenizer, train and val. A run only resumes from a checkpoint that has the same hashes."""
        hashes = {split: self.manifest["splits"][split]["sha256"] for split in SPLITS}
        return {"tokenizer": self.tokenizer.fingerprint} | hashes

    def text_bytes(self, split):
        """Return the number of bytes of a split's text in UTF-8, or None if unknown."""
        return self.manifest["splits"][split]["bytes"]


def data_folder(data):
    """Return the folder of the token files: data_dir if it is set, otherwise data/CORPUS_TOKENIZER-HASH.

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
    """Check the data section without downloading or tokenizing the corpus. Return a list of problems, one line each.

    block_size: if given, and the data are prepared, also check that train and val are not shorter than a sample.
    """
    problems = []
    if not (data.data_dir and is_prepared(data)):  # prepared data can be used without the corpus
        # without this check, a misspelled data_dir would start to prepare the default corpus, OpenWebText
        if data.data_dir and not _is_set(data, "corpus"):
            if file := _named_like_token_file(data.data_dir):
                fix = "set data_dir to a folder with token files, or set corpus too"
                return [f"data_dir={data.data_dir}: contains {file}, but no complete set of token files; {fix}"]
            if not (data_folder(data) / ".partial").is_dir():
                try:
                    manifest_of(data, data_folder(data))
                except OSError as error:
                    return [f"{error}, or set corpus too"]
        for function in (lambda: check_fits(data, corpus_of(data)), lambda: _tokenizer_identity(data)):
            try:
                function()
            except (ValueError, OSError) as error:
                problems.append(str(error))
    if problems:
        return problems
    folder = data_folder(data)
    if folder.exists() and not folder.is_dir():
        return [f"data_dir={folder}: not a folder; set data_dir to a data folder or a new folder"]
    try:
        refuse_to_overwrite(folder)
    except ValueError as error:  # not returned yet, because another process may complete the folder in the meantime
        problems = [str(error)]
    if not is_data_folder(folder):
        return problems
    try:
        manifest = manifest_of(data, folder)
        problems = _differences(data, manifest)
    except (ValueError, OSError) as error:
        return [str(error)]
    if block_size and not (larger_val_fractions(data, manifest, block_size) and may_increase_val(data, manifest)):
        problems += require_block(data, manifest, block_size)
    return problems


def _is_set(data, key):
    """Return whether the user set a key.

    If overrides change corpus, tokenizer or data_dir, val_fraction from the recipe file does not count (see
    load_recipe).
    """
    return key in getattr(data, "model_fields_set", vars(data))


def _named_like_token_file(folder):
    """Return the name of a .bin, .npy or .ds file in a folder, or None.

    Also return None if the preparation of the folder was interrupted.
    """
    folder = Path(os.path.expanduser(folder))
    if not folder.is_dir() or (folder / ".partial").is_dir():
        return None
    return min((path.name for path in folder.iterdir() if is_token_file(path)), default=None)


def corpus_of(data):
    """Return the Corpus of the data section."""
    keys = ("text_column", "lines", "split_by", "dataset_config", "dataset_split", "revision")
    return find_corpus(data.corpus, **{key: getattr(data, key) for key in keys})


def check_fits(data, corpus):
    """Raise ValueError if limit_documents, limit_tokens or the tokenizer cannot be used with this kind of corpus."""
    if data.eos_token and data.tokenizer in TOKENIZERS:
        raise ValueError(
            f"eos_token={data.eos_token}: tokenizer={data.tokenizer} uses {EOT}; leave eos_token out, or set tokenizer "
            "to a folder or a Hub id"
        )
    if corpus.ids and data.tokenizer in ("char", "bpe"):
        fix = "set tokenizer to gpt2, or to the folder of the tokenizer.json that the ids were made with"
        if os.path.isfile(os.path.join(data.corpus, "meta.pkl")):
            fix = f"set data_dir={quoted(data.corpus)} instead of corpus, to use its meta.pkl"
        raise ValueError(
            f"tokenizer={data.tokenizer}: requires text, but corpus={data.corpus} contains token ids; {fix}"
        )
    limits = [f"{key}={getattr(data, key)}" for key in ("limit_documents", "limit_tokens") if getattr(data, key)]
    if corpus.is_single and limits:
        what = "contains token ids" if corpus.ids else "is a single text"
        shorten = "" if corpus.ids else ", shorten the file with head -c, or set lines=true for one document per line"
        problem = f"corpus={data.corpus} {what}, which cannot be limited"
        raise ValueError(f"{', '.join(limits)}: {problem}; remove the limit{shorten}")


def facts_of(data, corpus):
    """Return all settings that determine the tokens, as JSON values.

    For a single text or token ids, split_seed is None, because val is the last part of the corpus.
    """
    optional = ("limit_documents", "limit_tokens", "skip_bad_documents", "eos_token")
    hub = {"hub": data.tokenizer} if hub_id(data.tokenizer) else {}
    return {
        "corpus": corpus.source,
        "tokenizer": {"asked": _tokenizer_identity(data), **hub},
        "val_fraction": data.val_fraction,
        "split_seed": None if corpus.is_single else SPLIT_SEED,
        **{key: getattr(data, key) for key in optional if getattr(data, key)},
        **({"special_tokens": data.special_tokens} if data.special_tokens != "text" else {}),
    }


def _tokenizer_identity(data):
    """Return a string that identifies the tokenizer: a built-in name, or the hash of the tokenizer.json."""
    if data.tokenizer in TOKENIZERS:
        return f"bpe vocab_size={data.vocab_size}" if data.tokenizer == "bpe" else data.tokenizer
    return f"tokenizer.json-{load_tokenizer(data.tokenizer, data.eos_token).fingerprint[:16]}"


def _differences(data, manifest):
    """Return a list of problems: settings of `data` that differ from those that data_dir was prepared with.

    Settings with their default value are not compared, so a recipe that sets only data_dir accepts any data. The
    corpus is only compared by name, because it may no longer exist.
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
        "special_tokens": manifest.get("special_tokens", "text"),
        "eos_token": manifest.get("eos_token"),
    }
    if manifest["tokenizer"].get("hub") == data.tokenizer:  # compare the Hub ids, to avoid a download
        prepared["tokenizer"] = data.tokenizer
    identities = {"corpus": lambda: source_name(data.corpus), "tokenizer": lambda: _tokenizer_identity(data)}
    fields = getattr(type(data), "model_fields", {})  # if `data` is a plain object without defaults, compare all keys
    problems = []
    for key, value in prepared.items():
        setting = getattr(data, key)
        if key in fields and setting == fields[key].default:
            continue
        if key in identities and setting != value:
            setting = identities[key]()
        if setting != value:
            problems.append(
                f"{key}={setting}, but data_dir={data.data_dir} was prepared with {key}={value}; remove {key} to use "
                "these data, or set data_dir to another folder"
            )
    return problems


def open_dataset(data, verify=False):
    """Open a prepared data folder as a Dataset.

    If data_dir is set, the corpus itself is not needed. A folder of another project is opened with the tokenizer in its
    meta.pkl or tokenizer.json, if it has one of them.

    Args:
        verify: whether to compare the SHA-256 of large token files with the manifest, as `nanogpt-accel data FOLDER`
            does. If the token files have less than 64 MiB in total, their SHA-256 is always compared. In addition, a
            sample of the ids is always checked against the vocabulary size.

    Raises:
        FileNotFoundError: the data folder does not exist.
        ValueError: a file is damaged, or the data were prepared with other settings.
    """
    folder = data_folder(data)
    manifest = manifest_of(data, folder)
    raise_problems(_differences(data, manifest))
    tokenizer = _load_tokenizer(folder, manifest)
    if data.document_mask and tokenizer.eot_id is None:
        raise ValueError(f"data.document_mask=true: {folder} has no end-of-text tokens; set document_mask=false")
    check_content(folder, manifest, tokenizer.vocab_size, verify_all=verify)
    splits = {split: token_file(folder, manifest, split) for split in manifest["splits"]}
    return Dataset(folder, manifest, tokenizer, splits)


def manifest_of(data, folder):
    """Return the manifest of the data folder. folder: data_folder(data). Raises the errors of read_manifest."""
    return read_manifest(folder, data.tokenizer, data.eos_token, data.val_fraction, data.split_by)


def _load_tokenizer(folder, manifest):
    """Load the tokenizer of a data folder, and check that the token files were made with it."""
    if manifest.get("nanogpt"):
        facts = manifest["tokenizer"]
        if "asked" in facts:
            tokenizer = load_tokenizer(facts["asked"], facts["eos_token"])
        else:
            is_gpt2 = facts["kind"] == "gpt2"
            tokenizer = Tokenizer.gpt2() if is_gpt2 else tokenizer_from_meta(facts["stoi"] or facts["vocab_size"])
        facts["fingerprint"] = tokenizer.fingerprint
        return tokenizer
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
    is_foreign = manifest["corpus"].get("kind") == "ids"  # these files can have any integer type
    if not is_same or not (is_foreign or tokenizer.dtype.__name__ == manifest["dtype"]):
        raise ValueError(f"{path}: the token files were made with another tokenizer; {AGAIN}")
    return tokenizer


def guess_vocab_size(data, assumed):
    """Estimate the vocabulary size before the data are prepared. For bpe and char, add a note to the list `assumed`."""
    if data.tokenizer == "bpe":
        assumed.append(f"vocabulary size {data.vocab_size:,} (vocab_size); it may be smaller for a small corpus")
        return data.vocab_size
    if data.tokenizer == "char":
        is_known = data.corpus == "shakespeare"
        assumed.append("65 characters" if is_known else "256 characters; prepare the data to count them")
        return 65 if is_known else 256
    return 50257 if data.tokenizer == "gpt2" else load_tokenizer(data.tokenizer, data.eos_token).vocab_size


def require_tokenizer(dataset, folder, key):
    """Check that the dataset was prepared with the tokenizer of the model in `folder`. Return a list of problems.

    key: the setting that the message starts with.
    """
    model, data = Tokenizer.load(folder), dataset.tokenizer
    if model.is_same(data):
        return []
    return [
        f"{key}: {folder} has a {model.kind} tokenizer (vocabulary size {model.vocab_size:,}), but {dataset.folder} "
        f"has a {data.kind} tokenizer (vocabulary size {data.vocab_size:,}); prepare the data with tokenizer={folder}"
    ]


def larger_val_fractions(data, manifest, block_size):
    """Return larger values of val_fraction that should give val at least one sample (block_size + 1 tokens).

    The list is empty if val already has enough tokens, or if val is not taken from the training text. It is also empty
    for old manifests, which do not say where val is from.
    """
    train, val = (manifest["splits"][split]["tokens"] for split in SPLITS)
    if val > block_size or manifest.get("has_own_val", True):
        return []
    return [value for value in LARGER_VAL if value > data.val_fraction and value * (train + val) > block_size]


def may_increase_val(data, manifest):
    """Return whether val_fraction may be increased.

    It may not if the user set it, or if data_dir contains token files that `prepare` already split into train and val.
    """
    return not _is_set(data, "val_fraction") and (not data.data_dir or manifest.get("nanogpt", False))


def require_block(data, manifest, block_size):
    """Check that train and val have at least the block_size + 1 tokens of a sample. Return a list of problems."""
    problems, fractions = [], larger_val_fractions(data, manifest, block_size)
    larger_val = "more validation data" if manifest.get("has_own_val") else "a larger corpus or a larger val_fraction"
    if fractions:
        larger_val = f"a larger corpus or val_fraction={fractions[0]}"
        larger_val += " and another data_dir" if data.data_dir and not manifest.get("nanogpt") else ""
    for split, fix in (("train", "a larger corpus or a smaller val_fraction"), ("val", larger_val)):
        if (count := manifest["splits"][split]["tokens"]) <= block_size:
            problems.append(
                f"block_size={block_size}: a sample has {block_size + 1:,} tokens, but the {split} split of "
                f"{data_folder(data)} has {count:,}; set a smaller block_size, or use {fix}"
            )
    return problems
