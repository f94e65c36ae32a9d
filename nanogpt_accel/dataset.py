"""From a recipe's data section to a folder of token files, and back as something to train on.

`data` is a recipe's data section; only its attributes are used: corpus, tokenizer, vocab_size, data_dir and
val_fraction.
"""

import difflib
import hashlib
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .corpus import find_corpus, source_name
from .tokenizer import Tokenizer
from .tokens import SPLITS, TokenFile, Writer, differences, is_data_folder, read_manifest

SPLIT_SEED = 2357  # nanoGPT's; fixed, so that validation losses of runs with other seeds can be compared
TOKENIZERS = ("gpt2", "char", "bpe")
BATCH = 2**23  # characters that are tokenized together; the result does not depend on it


@dataclass(frozen=True)
class Dataset:
    """A prepared data folder: its manifest, its tokenizer and the two files of ids."""

    folder: Path
    manifest: dict
    tokenizer: Tokenizer
    train: TokenFile
    val: TokenFile

    @property
    def identity(self):
        """What makes the tokens these: a checkpoint keeps it, and a run goes on with the same only."""
        hashes = {split: counts["sha256"] for split, counts in self.manifest["splits"].items()}
        return {"tokenizer": self.tokenizer.fingerprint} | hashes

    @property
    def val_bytes(self):
        """Size of the validation text as UTF-8; None where the folder does not say."""
        return self.manifest["splits"]["val"]["bytes"]


def data_folder(data):
    """Where the token files are or will be.

    data_dir if it is given; else data/CORPUS_TOKENIZER-HASH, whose hash is over all that decides the tokens:
    what changes them changes the folder, and nothing is overwritten.

    Raises:
        ValueError, FileNotFoundError: no such corpus or tokenizer.
    """
    if data.data_dir:
        return Path(os.path.expanduser(data.data_dir))
    corpus = find_corpus(data.corpus)
    identity = json.dumps(_facts(data, corpus), sort_keys=True)
    name = os.path.basename(os.path.abspath(data.tokenizer))
    if data.tokenizer == "bpe":
        name = f"bpe{data.vocab_size}"
    name = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)
    return Path("data") / f"{corpus.name}_{name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def is_prepared(data):
    """True where the token files are there: open_dataset opens them or says what is wrong with them."""
    return is_data_folder(data_folder(data))


def check(data, block_size=None):
    """What is wrong with the data section as far as that can be known without tokenizing or a download.

    Args:
        data: the section. block_size: where given, the length of data that are prepared already is checked too.

    Returns:
        A list of problems, one line each.
    """
    problems = []
    if not (data.data_dir and is_prepared(data)):  # else the corpus is not needed
        for look in (lambda: find_corpus(data.corpus), lambda: _asked(data)):
            try:
                look()
            except (ValueError, OSError) as error:
                problems.append(str(error))
    if problems:
        return problems
    folder = data_folder(data)
    if folder.exists() and not folder.is_dir():
        return [f"data_dir={folder}: not a folder: give one that holds train.bin and val.bin, or will"]
    if is_data_folder(folder):
        try:
            manifest = read_manifest(folder)
            problems += _differences(data, manifest)
        except (ValueError, OSError) as error:
            return [*problems, str(error)]
        if block_size:
            counts = {split: manifest["splits"][split]["tokens"] for split in SPLITS}
            problems += _too_short(counts, folder, block_size)
    return problems


def prepare(data, report=print):
    """Tokenize the corpus, unless that has been done.

    A single text is cut as nanoGPT cuts it: the first 1 - val_fraction of its characters train, the rest
    validate, and no symbol is added. Of several documents each goes to one of the two by a hash of its
    number, and is followed by the end-of-text symbol. Each side gets at least one document.

    Args:
        data: the section. report: called with a line now and then.

    Returns:
        The folder.

    Raises:
        ValueError, OSError: what stands in the way, in one line.
    """
    folder = data_folder(data)
    if is_data_folder(folder):
        return folder
    corpus = find_corpus(data.corpus)
    facts = _facts(data, corpus)
    start = time.perf_counter()
    tokenizer = _make_tokenizer(data, corpus, report)
    if not corpus.is_single and tokenizer.eot_id is None:
        raise ValueError(f"tokenizer={data.tokenizer}: has no end-of-text symbol to set between the "
                         f"documents of corpus={data.corpus}: take gpt2, char or bpe, or a single text")
    forced = {}  # document -> split, where the hash left one split empty
    while True:
        with Writer(folder, tokenizer.dtype) as writer:
            if corpus.is_single:
                _write_single(writer, tokenizer, corpus, data.val_fraction)
            else:
                forced = _write_documents(writer, tokenizer, corpus, data.val_fraction, forced, report)
            if not forced:
                facts["tokenizer"] |= {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size,
                                       "fingerprint": tokenizer.fingerprint, "eot_id": tokenizer.eot_id}
                writer.finish(facts, tokenizer.save)
                break
    size = sum(counts["bytes"] for counts in writer.counts.values()) / 1e6
    seconds = time.perf_counter() - start
    report(f"{folder}: {size:,.1f} MB of text in {seconds:,.1f} s ({size / seconds:,.1f} MB/s)")
    return folder


def open_dataset(data):
    """The Dataset of a prepared folder.

    Where data_dir is given, the corpus need not be there any more; where its manifest contradicts what the
    recipe asks for, that is an error. In a nanoGPT folder its own tokenizer holds, whatever the recipe says.

    Raises:
        FileNotFoundError: not prepared. ValueError: damaged, or not what the recipe asks for.
    """
    folder = data_folder(data)
    manifest = read_manifest(folder)
    if problems := _differences(data, manifest):
        raise ValueError("\n".join(problems))
    if not manifest.get("nanogpt"):
        tokenizer = Tokenizer.load(folder)
        if tokenizer.fingerprint != manifest["tokenizer"]["fingerprint"]:
            raise ValueError(f"{folder / 'tokenizer.json'}: not the tokenizer that made the token files: "
                             "delete the folder and prepare it again")
    else:
        stoi = manifest["tokenizer"].get("stoi")
        tokenizer = Tokenizer.char_from_meta(stoi) if stoi else Tokenizer.gpt2()
        manifest["tokenizer"]["fingerprint"] = tokenizer.fingerprint
    files = [TokenFile(folder / f"{split}.bin", manifest["dtype"]) for split in SPLITS]
    return Dataset(folder, manifest, tokenizer, *files)


def ready(data, is_main, report=print):
    """The Dataset, prepared first where it is missing: by the main process, while the others wait for it."""
    if is_main:
        prepare(data, report)
    while not is_prepared(data):
        time.sleep(0.5)
    return open_dataset(data)


def require_tokenizer(dataset, folder, key):
    """A list of problems: whether the model in `folder` reads other ids than the data hold. key: for the message."""
    held = Tokenizer.load(folder)
    if held.is_same(dataset.tokenizer):
        return []
    return [f"{key}: {folder} reads {held.kind} tokens ({held.vocab_size:,} symbols), but {dataset.folder} holds "
            f"{dataset.tokenizer.kind} ones ({dataset.tokenizer.vocab_size:,}): prepare with tokenizer={folder}"]


def require_block(dataset, block_size):
    """A list of problems: the splits that hold no block_size + 1 tokens, which is one sample."""
    return _too_short({"train": len(dataset.train), "val": len(dataset.val)}, dataset.folder, block_size)


def _too_short(counts, folder, block_size):
    other = {"train": "smaller", "val": "larger"}
    return [f"block_size={block_size}: a sample takes {block_size + 1:,} tokens, but {folder / split}.bin "
            f"has {count:,}: take a smaller block_size, a larger corpus or a {other[split]} val_fraction"
            for split, count in counts.items() if count < block_size + 1]


def _facts(data, corpus):
    """What decides the tokens, as plain values. A single text is cut without chance, so it has no seed."""
    return {"corpus": corpus.source, "tokenizer": {"asked": _asked(data)}, "val_fraction": data.val_fraction,
            "split_seed": None if corpus.is_single else SPLIT_SEED}


def _asked(data):
    """The tokenizer that the section asks for, as text: of a folder, its content counts and not its name."""
    if data.tokenizer in TOKENIZERS:
        return f"bpe vocab_size={data.vocab_size}" if data.tokenizer == "bpe" else data.tokenizer
    if not os.path.isdir(os.path.expanduser(data.tokenizer)):
        close = difflib.get_close_matches(data.tokenizer, TOKENIZERS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise FileNotFoundError(f"tokenizer={data.tokenizer}: no such tokenizer{hint}; there are "
                                f"{', '.join(TOKENIZERS)}, and any folder that holds a tokenizer.json")
    return f"tokenizer.json-{Tokenizer.load(os.path.expanduser(data.tokenizer)).fingerprint[:16]}"


def _differences(data, manifest):
    """Problems where an explicit data_dir holds something else than the section asks for.

    A key that stands at its default asks for nothing: a recipe with data_dir alone takes what is there. The
    corpus is compared by name and never opened; it may be long gone.
    """
    if not data.data_dir or manifest.get("nanogpt"):
        return []
    fields = getattr(type(data), "model_fields", {})  # of a pydantic section; plain attributes all count
    given = {key for key in ("corpus", "tokenizer", "val_fraction")
             if key not in fields or getattr(data, key) != fields[key].default}
    return differences(
        manifest, data.data_dir,
        corpus=source_name(data.corpus) if "corpus" in given else None,
        tokenizer=_asked(data) if "tokenizer" in given else None,
        val_fraction=data.val_fraction if "val_fraction" in given else None)


def _make_tokenizer(data, corpus, report):
    if data.tokenizer == "gpt2":
        return Tokenizer.gpt2()
    if data.tokenizer == "char":
        return Tokenizer.char(corpus.documents(), add_eot=not corpus.is_single)
    if data.tokenizer == "bpe":
        report(f"training a BPE of {data.vocab_size:,} symbols on {corpus.name}")
        return Tokenizer.train_bpe(corpus.documents(), data.vocab_size)
    return Tokenizer.load(os.path.expanduser(data.tokenizer))


def _write_single(writer, tokenizer, corpus, val_fraction):
    text = next(corpus.documents())
    cut = int(len(text) * (1 - val_fraction))  # nanoGPT's int(n*0.9)
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        if not part:
            raise ValueError(f"corpus={corpus.source['name']}: {len(text):,} characters leave nothing for "
                             f"{split} at val_fraction={val_fraction}: take a larger corpus or another "
                             "val_fraction")
        writer.write(split, tokenizer.encode(part), len(part.encode()))


def _write_documents(writer, tokenizer, corpus, val_fraction, forced, report):
    """Write all documents; if one split stays empty, return {document: split} to force in another try."""
    draws = {}  # split -> (draw, number) of the document nearest to it
    count, size, batch = 0, 0, []
    start = shown = time.perf_counter()

    def flush():
        encoded = tokenizer.encode_batch([text for _, text in batch])
        for (split, text), ids in zip(batch, encoded, strict=True):
            writer.write(split, np.append(ids, np.array(tokenizer.eot_id, ids.dtype)), len(text.encode()))
        batch.clear()

    waiting = 0  # characters in the batch
    for count, text in enumerate(corpus.documents(), 1):
        draw = _draw(count - 1)
        draws["val"] = min(draws.get("val", (2, 0)), (draw, count - 1))
        draws["train"] = max(draws.get("train", (-1, 0)), (draw, count - 1))
        batch.append((forced.get(count - 1, "val" if draw < val_fraction else "train"), text))
        waiting += len(text)
        size += len(text)
        if waiting >= BATCH:
            flush()
            waiting = 0
            if time.perf_counter() - shown > 5:
                shown = time.perf_counter()
                report(f"{count:,} documents, {size / 1e6:,.0f} MB, {size / 1e6 / (shown - start):,.1f} MB/s")
    if count < 2:
        raise ValueError(f"corpus={corpus.source['name']}: one document cannot be both train and val: take "
                         "more documents, or the file itself as corpus, whose end is val then")
    flush()
    # another try with the nearest document moved is cheap: only a small corpus leaves a split empty
    return {draws[split][1]: split for split in SPLITS if not writer.counts[split]["documents"]}


def _draw(index):
    """A number in [0, 1) for a document, the same whatever came before it."""
    digest = hashlib.blake2b(f"{SPLIT_SEED} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
