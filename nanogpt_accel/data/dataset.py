"""From a recipe's data section to a folder of token files, and back as something to train on.

`data` is a recipe's data section; only its attributes are used.
"""

import difflib
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..tracking.console import TextProgress
from ..utils.text import counted, data_size
from .sources import find_corpus, source_name
from .token_files import (
    SPLITS,
    TokenFile,
    Writer,
    at_work,
    check_content,
    differences,
    earlier_documents,
    earlier_facts,
    is_data_folder,
    read_manifest,
    refuse_to_overwrite,
    token_paths,
)
from .tokenizer import Tokenizer

SPLIT_SEED = 2357  # nanoGPT's; fixed, so that validation losses of runs with other seeds can be compared
TOKENIZERS = ("gpt2", "char", "bpe")
COUNTED_BELOW = 2**27  # bytes of a corpus whose documents are dealt out on trial first
LARGE_TEXT = 2**30  # bytes of a single text above which its need of memory, 4 to 11 times as much, is worth a line
CHUNK = 2**19  # characters that one worker tokenizes at a time; what is written does not depend on the workers
AHEAD = 16  # chunks that wait for a worker: work for a third of a second of two, while a file is flushed to the disk


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
        """What makes the tokens these: a checkpoint keeps it, and a run goes on with the same only."""
        hashes = {split: self.manifest["splits"][split]["sha256"] for split in SPLITS}
        return {"tokenizer": self.tokenizer.fingerprint} | hashes

    def text_bytes(self, split):
        """Size of the text of a split as UTF-8; None where the folder does not say."""
        return self.manifest["splits"][split]["bytes"]


def data_folder(data):
    """Where the token files are or will be.

    data_dir if it is given; else data/CORPUS_TOKENIZER-HASH, whose hash is over all that decides the tokens:
    what changes them changes the folder, and nothing is overwritten.

    Raises:
        ValueError, FileNotFoundError: no such corpus or tokenizer.
    """
    if data.data_dir:
        return Path(os.path.expanduser(data.data_dir))
    corpus = _corpus(data)
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
        for look in (lambda: _check_fits(data, _corpus(data)), lambda: _asked(data)):
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
        problems += in_the_way
    else:
        try:
            manifest = read_manifest(folder)
            problems += _differences(data, manifest)
        except (ValueError, OSError) as error:
            return [*problems, str(error)]
        if block_size:
            counts = {split: manifest["splits"][split]["tokens"] for split in SPLITS}
            problems += _too_short(counts, folder, block_size)
    return problems


def prepare(data, report=print, workers=None):
    """Tokenize the corpus, unless that has been done; go on where an interrupted preparation stopped.

    A single text is cut as nanoGPT cuts it: the first 1 - val_fraction of its characters train, the rest
    validate, and no symbol is added. A corpus of token ids is cut alike, and copied. Documents are followed by the
    end-of-text symbol. Where the corpus has a validation split of its own, that is it; else each document goes to one
    of the two by a hash of its number, and each side gets at least one document.

    Args:
        data: the section. report: called with a line now and then.
        workers: threads that tokenize; None: one for each processor. The result does not depend on it.

    Returns:
        The folder.

    Raises:
        ValueError, OSError: what stands in the way, in one line.
    """
    folder = data_folder(data)
    if not is_data_folder(folder):
        with _in_order(folder, report):
            _prepare(folder, data, report, workers)
    return folder


@contextmanager
def _in_order(folder, report):
    """Tells the user of an interrupted preparation what is kept."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        kept = earlier_documents(folder)
        if not at_work(folder):  # else this process was only waiting
            report(
                f"{folder}: interrupted; "
                + (
                    f"{counted(kept, 'document')} {'is' if kept == 1 else 'are'} kept, the same command goes on"
                    if kept
                    else "nothing is kept"
                )
            )
        raise


@contextmanager
def _unwinding():
    """Where SIGTERM would end the process at once, it unwinds as Ctrl-C does, so that a Writer commits what it has."""
    handled = threading.current_thread() is threading.main_thread() and (  # others may not set handlers
        signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    )
    if handled:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        if handled:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _prepare(folder, data, report, workers):
    _wait_for_others(folder, report)
    if is_data_folder(folder):
        return
    start = time.perf_counter()
    corpus = _pinned(_corpus(data), folder)
    _check_fits(data, corpus)
    facts = _facts(data, corpus)
    if corpus.left_out or corpus.source.get("files", 1) > 1:
        kinds = sorted(corpus.left_out.items(), key=lambda kind: (-kind[1], kind[0]))
        shown = ", ".join(f"{count:,} {suffix}" for suffix, count in kinds[:10]) + ", ..." * (len(kinds) > 10)
        report(
            f"corpus={data.corpus}: {counted(corpus.source['files'], 'file')} to read"
            + (f"; {sum(corpus.left_out.values()):,} left out ({shown})" if kinds else "")
        )
    _check_space(folder, corpus, data, report)
    if corpus.is_single and not corpus.ids and (corpus.bytes or 0) > LARGE_TEXT:
        report(
            f"corpus={data.corpus}: one text of {corpus.bytes / 1e9:,.1f} GB is read whole, which takes "
            f"{4 * corpus.bytes / 1e9:,.0f} GB of memory or more; lines=true, or several files, are streamed"
        )
    corpus.look((lambda problem: None) if data.skip_bad_documents else None)
    tokenizer = _make_tokenizer(data, corpus, report)
    if not corpus.is_single and tokenizer.eot_id is None:
        raise ValueError(
            f"tokenizer={data.tokenizer}: has no end-of-text symbol to set between the "
            f"documents of corpus={data.corpus}: take gpt2, char or bpe, or a single text"
        )
    forced = _forced(corpus, data)
    while True:
        decides = facts | {"fingerprint": tokenizer.fingerprint}
        with _unwinding(), _writer(folder, tokenizer.dtype, decides, data.shard_tokens, report) as writer:
            if writer is None or writer.is_finished:  # by another process, or by an earlier one
                return
            earlier = _size(writer, corpus)
            if corpus.ids:
                _write_ids(writer, tokenizer, corpus, data.val_fraction, report)
            elif corpus.is_single:
                _write_single(writer, tokenizer, corpus, data.val_fraction)
            else:
                forced = _write_documents(writer, tokenizer, corpus, data, forced, report, workers)
            if not forced:
                facts["tokenizer"] |= {
                    "kind": tokenizer.kind,
                    "vocab_size": tokenizer.vocab_size,
                    "fingerprint": tokenizer.fingerprint,
                    "eot_id": tokenizer.eot_id,
                }
                writer.finish(facts, tokenizer.save)
                break
            writer.discard()
    size, seconds = _size(writer, corpus), time.perf_counter() - start
    here = f", {data_size(size - earlier)} of it now," if earlier else ""
    report(
        f"{folder}: {data_size(size)} of {'token ids' if corpus.ids else 'text'}{here} in {seconds:,.1f} s "
        f"({data_size((size - earlier) / seconds)}/s)"
    )


def _wait_for_others(folder, report):
    """Until no other process is at work in the folder."""
    waited = False
    while other := at_work(folder):
        if not waited:
            report(f"{folder}: another process prepares it ({other}); waiting for it")
        waited = True
        time.sleep(1)


@contextmanager
def _writer(folder, dtype, facts, shard_tokens, report):
    """A Writer, as soon as no other process is at work in the folder; None where that one has finished the work."""
    while True:
        if is_data_folder(folder):
            yield None
            return
        try:
            writer = Writer(folder, dtype, facts, shard_tokens)
            break
        except BlockingIOError:
            _wait_for_others(folder, report)
    with writer:
        if writer.position:
            report(f"{folder}: going on where an earlier attempt stopped")
        yield writer


def _check_space(folder, corpus, data, report):
    """Say what the token files will need on the disk, where the size of the text is known.

    Raises:
        OSError: there is not as much.
    """
    if corpus.bytes is None:
        return
    # ids of 2 bytes; a BPE makes a token of some 4 bytes of text, and of 3 where it knows little of it
    need = corpus.bytes * (1 if corpus.ids else 2 if data.tokenizer == "char" else 2 / 3)
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free + sum(file.stat().st_size for file in folder.glob(".partial/*.bin"))
    if need > 2**30:
        report(f"{folder}: about {need / 1e9:,.1f} GB on the disk, of which {free / 1e9:,.1f} GB are free")
    if need > free and not (data.limit_documents or data.limit_tokens):
        raise OSError(
            f"data_dir={folder}: the token files need about {need / 1e9:,.1f} GB, and {free / 1e9:,.1f} are "
            "free: set data_dir to another disk" + ", or limit_tokens" * (not corpus.is_single)
        )


def open_dataset(data, verify=False):
    """The Dataset of a prepared folder.

    Where data_dir is given, the corpus need not be there any more; where its manifest contradicts what the
    recipe asks for, that is an error. In a nanoGPT folder its own tokenizer holds, whatever the recipe says.

    Token files of less than 64 MiB together are held against the manifest's SHA-256; of larger ones only the ids in
    some places are looked at, unless `verify` asks to read them all, as `nanogpt-accel data FOLDER` does.

    Raises:
        FileNotFoundError: not prepared. ValueError: damaged, or not what the recipe asks for.
    """
    folder = data_folder(data)
    manifest = read_manifest(folder)
    if problems := _differences(data, manifest):
        raise ValueError("\n".join(problems))
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
    """The tokenizer that lies in a data folder of ours.

    Raises:
        ValueError: it is gone, damaged, or not the one that made the token files.
    """
    path, again = folder / "tokenizer.json", "delete the folder and prepare it again"
    if not path.is_file():
        raise ValueError(f"{path}: gone, and the token files mean nothing without it: put it back, or {again}")
    try:
        tokenizer = Tokenizer.load(folder)
    except ValueError as error:
        raise ValueError(f"{error}: or {again}") from None
    held = manifest["tokenizer"]
    if (
        (tokenizer.fingerprint, tokenizer.vocab_size) != (held["fingerprint"], held["vocab_size"])
        or (held["eot_id"] not in (None, tokenizer.eot_id))
        or tokenizer.dtype.__name__ != manifest["dtype"]
    ):
        raise ValueError(f"{path}: not the tokenizer that made the token files: {again}")
    return tokenizer


def ready(data, is_main, report=print):
    """The Dataset, prepared first where it is missing: by the main process, while the others wait for it."""
    if is_main:
        prepare(data, report)
    while not is_prepared(data):
        time.sleep(0.5)
    return open_dataset(data)


def guess_vocab_size(data, assumed):
    """Symbols of a tokenizer that is not there before the data are prepared. What is not certain is put into `assumed`
    in words."""
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
    """A list of problems: whether the model in `folder` reads other ids than the data hold. key: for the message."""
    held = Tokenizer.load(folder)
    if held.is_same(dataset.tokenizer):
        return []
    return [
        f"{key}: {folder} reads {held.kind} tokens ({held.vocab_size:,} symbols), but {dataset.folder} holds "
        f"{dataset.tokenizer.kind} ones ({dataset.tokenizer.vocab_size:,}): prepare with tokenizer={folder}"
    ]


def require_block(dataset, block_size):
    """A list of problems: the splits that hold no block_size + 1 tokens, which is one sample."""
    return _too_short({"train": len(dataset.train), "val": len(dataset.val)}, dataset.folder, block_size)


def _too_short(counts, folder, block_size):
    other = {"train": "smaller", "val": "larger"}
    return [
        f"block_size={block_size}: a sample takes {block_size + 1:,} tokens, but {folder / split}.bin "
        f"has {count:,}: take a smaller block_size, a larger corpus or a {other[split]} val_fraction"
        for split, count in counts.items()
        if count < block_size + 1
    ]


def _corpus(data):
    return find_corpus(
        data.corpus,
        text_column=data.text_column,
        lines=data.lines,
        dataset_config=data.dataset_config,
        dataset_split=data.dataset_split,
        revision=data.revision,
    )


def _check_fits(data, corpus):
    """Raise ValueError where a limit is given for a single text, which has no documents to leave out, or a tokenizer is
    to be made of token ids."""
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


def _pinned(corpus, folder):
    """Of a Hub data set: the corpus at one commit, that of an interrupted attempt even where its branch has moved."""
    if corpus.pin is None:
        return corpus
    earlier = earlier_facts(folder).get("corpus", {})
    commit = earlier.pop("commit", None)
    return corpus.pin(commit if earlier == corpus.source else None)


def _facts(data, corpus):
    """What decides the tokens, as plain values. A single text is cut without chance, so it has no seed."""
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
    """The tokenizer that the section asks for, as text: of a folder, its content counts and not its name."""
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
    """Problems where an explicit data_dir holds something else than the section asks for.

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


def _make_tokenizer(data, corpus, report):
    if data.tokenizer == "gpt2":
        return Tokenizer.gpt2()
    if data.tokenizer == "char":
        return Tokenizer.char(_all_documents(data, corpus), add_eot=not corpus.is_single)
    if data.tokenizer == "bpe":
        report(f"training a BPE of {data.vocab_size:,} symbols on {corpus.name}")
        tokenizer = Tokenizer.train_bpe(_all_documents(data, corpus), data.vocab_size)
        if tokenizer.vocab_size < data.vocab_size:
            report(
                f"the text has pairs for {tokenizer.vocab_size:,} symbols only, fewer than vocab_size={data.vocab_size}"
            )
        return tokenizer
    return Tokenizer.load(os.path.expanduser(data.tokenizer))


def _all_documents(data, corpus):
    """The documents of every split, for a tokenizer that is made of them."""
    bad = (lambda problem: None) if data.skip_bad_documents else None
    for split in corpus.own_splits():
        yield from itertools.islice(corpus.documents(split, bad), data.limit_documents)


def _forced(corpus, data):
    """{document: split} where the hash would leave a split of a small corpus empty. A large one is not read twice for
    that; there it shows in the end, if ever, and costs another try."""
    if corpus.is_single or corpus.bytes is None or corpus.bytes > COUNTED_BELOW or "val" in corpus.own_splits():
        return {}
    bad = (lambda problem: None) if data.skip_bad_documents else None
    low, high = (2, 0), (-1, 0)  # draw and number of the two documents that are nearest to val and to train
    for number, _ in enumerate(itertools.islice(corpus.documents(bad=bad), data.limit_documents)):
        low, high = min(low, (_draw(number), number)), max(high, (_draw(number), number))
        if low[0] < data.val_fraction <= high[0]:
            return {}
    if low[1] == high[1]:
        return {}  # one document or none, which is refused later
    return {low[1]: "val"} if low[0] >= data.val_fraction else {high[1]: "train"}


def _write_single(writer, tokenizer, corpus, val_fraction):
    if writer.position:  # killed when all was written
        return
    text = next(corpus.documents())
    cut = _cut(len(text), "characters", corpus, val_fraction)
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        writer.write(split, tokenizer.encode(part), len(part.encode()))


def _cut(length, of_what, corpus, val_fraction):
    """Where to cut a single text or sequence of ids; both sides get something."""
    cut = int(length * (1 - val_fraction))  # nanoGPT's int(n*0.9)
    for split, size in (("train", cut), ("val", length - cut)):
        if not size:
            raise ValueError(
                f"corpus={corpus.source['name']}: {length:,} {of_what} leave nothing for {split} at "
                f"val_fraction={val_fraction}: take a larger corpus or another val_fraction"
            )
    return cut


def _write_ids(writer, tokenizer, corpus, val_fraction, report):
    """Copy token ids. An end-of-text id ends a document; the one that the cut goes through counts on both sides."""
    if writer.position == "all":
        return
    done = writer.position
    length, pieces = corpus.ids(tokenizer.dtype, tokenizer.vocab_size, done)
    cut = _cut(length, "token ids", corpus, val_fraction)
    n_bytes = tokenizer.symbol_bytes()
    with TextProgress("ids", corpus.bytes, report) as progress:
        for ids in pieces:
            left = max(cut - done, 0)  # for train
            for split, part, end in (("train", ids[:left], cut), ("val", ids[left:], length)):
                if not len(part):
                    continue
                done += len(part)
                # a document begins with a split and after each end of text, but for that at the very end
                documents = (split not in writer.counts) + np.count_nonzero(part == tokenizer.eot_id)
                documents -= done == end and part[-1] == tokenizer.eot_id
                writer.write(split, part, None if n_bytes is None else int(n_bytes[part].sum()), int(documents))
            writer.commit(done)
            progress(**_written(writer) | {"bytes": _size(writer, corpus)})


def _write_documents(writer, tokenizer, corpus, data, forced, report, workers):
    """Write all documents; if one split stays empty, return {document: split} to force in another try."""
    splits = corpus.own_splits()
    deals = "val" not in splits  # validation documents are dealt out of train
    position = writer.position or {"split": 0, "documents": 0, "bad": 0, "draws": {}, "forced": list(forced.items())}
    if position == "all":
        return {}
    forced = dict(position["forced"])
    draws = position["draws"]  # split -> [draw, number] of the document nearest to it
    bad = _Bad(position["bad"], report) if data.skip_bad_documents else None
    for at in range(position["split"], len(splits)):
        done = position["documents"] if at == position["split"] else 0  # documents of this split that are written
        bad_before = bad.count if bad else 0  # those of this split are met again
        is_dealt = deals and splits[at] == "train"
        targets = SPLITS if is_dealt else (splits[at],)

        def room(targets=targets):
            return (data.limit_tokens or float("inf")) - _written(writer, targets)["tokens"]

        if done and room() <= 0:
            continue
        documents = itertools.islice(corpus.documents(splits[at], bad), done, data.limit_documents)

        def deal(number, at=at, is_dealt=is_dealt):
            if not is_dealt:
                return splits[at]
            return forced.get(number, "val" if _draw(number) < data.val_fraction else "train")

        with (
            closing(_tokenized(documents, done, deal, tokenizer, workers)) as chunks,
            TextProgress(splits[at], corpus.bytes, report) as progress,
        ):
            for runs in chunks:
                for split, ids, sizes in runs:
                    if room() <= 0:
                        break
                    # up to the document that reaches the limit; sizes: of each its tokens and its bytes
                    sizes = sizes[: int(np.searchsorted(sizes[:, 0].cumsum(), room())) + 1]
                    writer.write(split, ids[: sizes[:, 0].sum()], int(sizes[:, 1].sum()), len(sizes))
                    for number in range(done, done + len(sizes) if is_dealt else done):
                        draw = [_draw(number), number]
                        draws["val"] = min(draws.get("val", [2, 0]), draw)
                        draws["train"] = max(draws.get("train", [-1, 0]), draw)
                    done += len(sizes)
                writer.commit(
                    {"split": at, "documents": done, "bad": bad_before, "draws": draws, "forced": list(forced.items())}
                )
                progress(**_written(writer))
                if room() <= 0:
                    break
        if is_dealt and done < 2:
            raise ValueError(
                f"corpus={corpus.source['name']}: one document cannot be both train and val: take "
                "more documents, "
                + (
                    f"a limit_tokens above {data.limit_tokens}"
                    if data.limit_tokens and room() <= 0
                    else "or the file itself as corpus, whose end is val then"
                )
            )
    if bad is not None and bad.count:
        if bad.count > bad.SHOWN:
            report(f"... and {bad.count - bad.SHOWN:,} more")
        report(f"{counted(bad.count, 'bad document')} {'was' if bad.count == 1 else 'were'} left out")
    # another try with the nearest document moved is cheap: only a small corpus leaves a split empty
    return {draws[split][1]: split for split in SPLITS if deals and split not in writer.counts}


def _written(writer, splits=(*SPLITS, "test")):
    """The documents, bytes of text and tokens that are written so far, over these splits."""
    found = [writer.counts[split] for split in splits if split in writer.counts]
    return {key: sum(counts[key] or 0 for counts in found) for key in ("documents", "bytes", "tokens")}


def _size(writer, corpus):
    """Bytes of the corpus that are written so far: those of its ids, where it is ids and no text."""
    return _written(writer)["tokens"] * writer.dtype.itemsize if corpus.ids else _written(writer)["bytes"]


class _Bad:
    """Counts documents that cannot be read, and shows the first ones."""

    SHOWN = 3

    def __init__(self, count, report):
        self.count, self.report = count, report

    def __call__(self, problem):
        self.count += 1
        if self.count <= self.SHOWN:
            self.report(f"left out: {problem}")


def _tokenized(documents, number, deal, tokenizer, workers):
    """Yield, chunk by chunk in order, runs of documents that go to the same split: (split, ids, sizes), as of _encode.

    number: of the first document. deal: number -> split. A chunk ends with the document that fills it, so the chunks
    depend on the documents alone. A few are on their way at a time, which bounds the memory.
    """
    workers = workers or os.cpu_count()
    own = threading.local()

    def begin():
        own.tokenizer = tokenizer.for_thread()

    # threads, for tiktoken and tokenizers let go of Python's lock while they are at work
    with ThreadPoolExecutor(workers, initializer=begin) as pool:
        pending = deque()
        try:
            for chunk in _chunks(documents, number, deal):
                pending.append(pool.submit(lambda chunk: _encode(own.tokenizer, chunk), chunk))
                if len(pending) > workers + AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for chunk in pending:  # nobody waits for them where the work ends early
                chunk.cancel()


def _chunks(documents, number, deal):
    """Lists of (split, text), of about CHUNK characters each."""
    chunk, size = [], 0
    for number, text in enumerate(documents, number):  # noqa: B020 (goes on from the number given)
        chunk.append((deal(number), text))
        size += len(text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode(tokenizer, chunk):
    """The runs of a chunk: (split, ids with the end-of-text symbol after each document, sizes). sizes: the tokens and
    the bytes of each, of shape (documents, 2)."""
    runs = []
    for split, group in itertools.groupby(chunk, key=lambda document: document[0]):
        texts = [text for _, text in group]
        eot = np.array([tokenizer.eot_id], tokenizer.dtype)
        encoded = tokenizer.encode_batch(texts)
        sizes = [(len(ids) + 1, len(text.encode())) for ids, text in zip(encoded, texts, strict=True)]
        ids = np.concatenate([part for ids in encoded for part in (ids, eot)])
        runs.append((split, ids, np.array(sizes, np.int64)))
    return runs


def _draw(index):
    """A number in [0, 1) for a document, the same whatever came before it."""
    digest = hashlib.blake2b(f"{SPLIT_SEED} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
