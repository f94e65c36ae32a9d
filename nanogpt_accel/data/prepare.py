"""Prepare a corpus: read its documents, tokenize them, and write the token files.

If a preparation is interrupted, its complete documents are kept, and the next preparation resumes after them.
"""

import hashlib
import itertools
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass

import numpy as np

from ..tracking.console import TextProgress
from ..utils.files import nearest_existing
from ..utils.text import counted, data_size
from .corpus import Corpus
from .dataset import SPLIT_SEED, check_fits, corpus_of, data_folder, facts_of, is_prepared, open_dataset
from .encoding import tokenize
from .foreign_tokens import file_entries, find_cut, read_ids
from .manifest import is_data_folder
from .token_files import SPLITS, Writer, earlier_attempt, find_active_process, sha256_of_split
from .tokenizer import Tokenizer

COUNTED_BELOW = 2**27  # bytes; the documents of a smaller corpus are counted first, to avoid an empty split
LARGE_TEXT = 2**30  # bytes; for a larger single text, the memory use (4 to 11 times its size) is reported


def prepare(data, report=print, workers=None):
    """Tokenize the corpus into its data folder, or resume an interrupted preparation.

    README.md in this folder describes how the splits are made.

    Args:
        data: the data section of a recipe.
        report: called with each line of progress output.
        workers: tokenizer threads, by default one per processor. The result does not depend on it.

    Returns:
        The path of the data folder. If the folder is already complete, it is not changed.

    Raises:
        ValueError, OSError: the corpus or a setting is invalid, or the folder cannot be written.
    """
    folder = data_folder(data)
    if is_data_folder(folder):
        return folder
    try:
        _prepare(folder, data, report, workers)
    except (KeyboardInterrupt, SystemExit):
        if not find_active_process(folder):  # otherwise another process is preparing it
            kept = earlier_attempt(folder)[1]
            resume = "; run the same command to resume" if kept else ""
            report(f"{folder}: interrupted; {counted(kept, 'document')} kept{resume}")
        raise
    return folder


def ready(data, is_main, report=print):
    """Open the data folder as a Dataset. If needed, the main process prepares it first, while the others wait."""
    if is_main:
        prepare(data, report)
    while not is_prepared(data):
        time.sleep(0.5)
    return open_dataset(data)


def _prepare(folder, data, report, workers):
    _wait_for_others(folder, report)
    if is_data_folder(folder):
        return
    start = time.perf_counter()
    corpus = _pin(corpus_of(data), folder)
    check_fits(data, corpus)
    facts = facts_of(data, corpus)
    _check_resources(folder, corpus, data, report)
    corpus.check_files(_bad_handler(data))
    tokenizer = _make_tokenizer(data, corpus, report)
    if not corpus.is_single and tokenizer.eot_id is None:
        raise ValueError(
            f"tokenizer={data.tokenizer}: has no end-of-text token to separate the documents of "
            f"corpus={data.corpus}; set tokenizer to gpt2, char or bpe, or use a corpus that is a single text"
        )
    all_facts = facts | {"fingerprint": tokenizer.fingerprint}
    forced = _find_forced(corpus, data)
    while True:
        with _sigterm_as_exit(), _open_writer(folder, tokenizer.dtype, all_facts, data.shard_tokens, report) as writer:
            if writer is None or writer.is_finished:  # completed by another process or by an earlier attempt
                return
            made = {key: getattr(tokenizer, key) for key in ("kind", "vocab_size", "fingerprint", "eot_id")}
            facts_made = facts | {"tokenizer": facts["tokenizer"] | made}
            if corpus.ids:
                writer.finish(facts_made | _check_ids(data, corpus, tokenizer, report), tokenizer.save)
                report(f"{folder}: refers to {counted(corpus.source['files'], 'file')} of token ids, without a copy")
                return
            attempt = _Attempt(data, corpus, tokenizer, writer, report, workers)
            earlier = attempt.written_bytes()
            forced = attempt.write(forced)
            if not forced:
                writer.finish(facts_made, tokenizer.save)
                break
            writer.discard()
    size, seconds = attempt.written_bytes(), time.perf_counter() - start
    new = f" ({data_size(size - earlier)} in this attempt)" if earlier else ""
    speed = data_size((size - earlier) / seconds)
    report(f"{folder}: {data_size(size)} of text{new} in {seconds:,.1f} s ({speed}/s)")


def _pin(corpus, folder):
    """Return the corpus. Pin a Hub data set to its latest commit, or to that of an interrupted preparation."""
    if corpus.pin is None:
        return corpus
    earlier = earlier_attempt(folder)[0].get("corpus", {})
    commit = earlier.pop("commit", None)
    return corpus.pin(commit if earlier == corpus.source else None)


def _bad_handler(data):
    """With skip_bad_documents, return a callback that ignores documents that cannot be read. Otherwise return None."""
    return (lambda problem: None) if data.skip_bad_documents else None


# ---- before anything is written


def _check_resources(folder, corpus, data, report):
    """Report the number of files, and the disk space and memory that a large corpus needs. Raise OSError if the disk
    has too little free space."""
    if corpus.skipped or corpus.source.get("files", 1) > 1:
        kinds = sorted(corpus.skipped.items(), key=lambda kind: (-kind[1], kind[0]))
        shown = ", ".join(f"{count:,} {suffix}" for suffix, count in kinds[:10]) + ", ..." * (len(kinds) > 10)
        skipped = f"; {sum(corpus.skipped.values()):,} skipped ({shown})" if kinds else ""
        report(f"corpus={data.corpus}: {counted(corpus.source['files'], 'file')} to read{skipped}")
    if corpus.bytes is None or corpus.ids:
        return
    # An id has 2 bytes. A BPE token covers about 4 bytes of text, or 3 if the BPE was trained on other text.
    need = corpus.bytes * (2 if data.tokenizer == "char" else 2 / 3)
    written = sum(file.stat().st_size for file in folder.glob(".partial/*.bin"))
    free = shutil.disk_usage(nearest_existing(folder)).free + written
    if need > 2**30:
        report(f"{folder}: needs about {need / 1e9:,.1f} GB of disk space; {free / 1e9:,.1f} GB are free")
    if need > free and not (data.limit_documents or data.limit_tokens):
        raise OSError(
            f"data_dir={folder}: the token files need about {need / 1e9:,.1f} GB, but only {free / 1e9:,.1f} GB "
            "are free; set data_dir to another disk" + ("" if corpus.is_single else ", or set limit_tokens")
        )
    if corpus.is_single and corpus.bytes > LARGE_TEXT:
        report(
            f"corpus={data.corpus}: a single text of {corpus.bytes / 1e9:,.1f} GB is tokenized in memory and needs "
            f"at least {4 * corpus.bytes / 1e9:,.0f} GB; to stream it, set lines=true or split it into several files"
        )


def _make_tokenizer(data, corpus, report):
    if data.tokenizer == "gpt2":
        return Tokenizer.gpt2()
    if data.tokenizer not in ("char", "bpe"):
        return Tokenizer.load(os.path.expanduser(data.tokenizer))
    documents = itertools.chain.from_iterable(
        itertools.islice(corpus.documents(split, _bad_handler(data)), data.limit_documents)
        for split in corpus.own_splits()
    )
    if data.tokenizer == "char":
        return Tokenizer.char(documents, add_eot=not corpus.is_single)
    report(f"training a BPE tokenizer with {data.vocab_size:,} tokens on {corpus.name}")
    tokenizer = Tokenizer.train_bpe(documents, data.vocab_size)
    if tokenizer.vocab_size < data.vocab_size:
        problem = "the corpus is too small for this vocabulary size"
        report(f"vocab_size={data.vocab_size}: {problem}; the tokenizer has only {tokenizer.vocab_size:,} tokens")
    return tokenizer


# ---- token ids


def _check_ids(data, corpus, tokenizer, report):
    """Read all ids of a corpus of token files once. Return {"dtype", "splits"} for the manifest.

    The ids are not copied: the manifest contains the paths of the files. An end-of-text id ends a document. A document
    that is cut is counted in train and in val.

    Raises:
        ValueError: a file is damaged or has an id that is not in the vocabulary.
    """
    splits, token_bytes, done = {}, tokenizer.token_bytes(), 0
    with TextProgress("ids", corpus.bytes, report) as progress:
        for split, tokens in corpus.ids(tokenizer.vocab_size, data.val_fraction).items():
            documents, n_bytes = 0, 0
            for ids in read_ids(data.corpus, tokens, tokenizer.vocab_size):
                documents += int(np.count_nonzero(ids == tokenizer.eot_id))
                n_bytes += 0 if token_bytes is None else int(token_bytes[ids].sum())
                done += len(ids)
                progress(documents=documents, bytes=done * tokens.dtype.itemsize, tokens=done)
            splits[split] = {
                "tokens": len(tokens),
                "bytes": None if token_bytes is None else n_bytes,
                "documents": documents + int(ids[-1] != tokenizer.eot_id),
                "sha256": sha256_of_split(tokens),
                "files": file_entries(tokens),
            }
    return {"dtype": tokens.dtype.name, "splits": splits}


# ---- locking and interruptions


def _wait_for_others(folder, report):
    """Wait until no other process is preparing the folder."""
    is_reported = False
    while process := find_active_process(folder):
        if not is_reported:
            report(f"{folder}: another process is preparing it ({process}); waiting for it")
        is_reported = True
        time.sleep(1)


def _open_writer(folder, dtype, facts, shard_tokens, report):
    """Wait for other processes, then return a Writer, or nullcontext() if one of them has prepared the folder."""
    while not is_data_folder(folder):
        _wait_for_others(folder, report)
        with suppress(BlockingIOError):
            writer = Writer(folder, dtype, facts, shard_tokens)
            if writer.position:
                report(f"{folder}: resuming an interrupted preparation")
            return writer
    return nullcontext()


@contextmanager
def _sigterm_as_exit():
    """Raise SystemExit on SIGTERM, so that the Writer commits its documents. An existing handler is not replaced."""
    is_main_thread = threading.current_thread() is threading.main_thread()  # other threads cannot set handlers
    if not is_main_thread or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ---- assign documents to splits


def _draw(number):
    """Return a hash of the number of a document, as a float in [0, 1)."""
    digest = hashlib.blake2b(f"{SPLIT_SEED} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


class _Assignment:
    """Assigns documents to train and val by a hash of their number.

    forced: {document number: split}, overrides the hash. nearest: {split: [hash, number]}, the document with the lowest
    hash for val, and the one with the highest hash for train.
    """

    def __init__(self, val_fraction, forced=(), nearest=()):
        self.val_fraction, self.forced, self.nearest = val_fraction, dict(forced), dict(nearest)

    def split_of(self, number):
        return self.forced.get(number, "val" if _draw(number) < self.val_fraction else "train")

    def record(self, number):
        """Keep a document in `nearest` if its hash is the lowest or the highest so far."""
        draw = [_draw(number), number]
        self.nearest["val"] = min(self.nearest.get("val", [2, 0]), draw)
        self.nearest["train"] = max(self.nearest.get("train", [-1, 0]), draw)

    def to_force(self, empty):
        """Return {document number: split} that assigns the nearest document to each empty split."""
        return {self.nearest[split][1]: split for split in empty}


def _find_forced(corpus, data):
    """Return {document number: split} to override the hash if it would leave a split of a small corpus empty, else {}.

    A large corpus is not checked in advance. If one of its splits is empty in the end, all documents are written again.
    """
    if corpus.is_single or corpus.bytes is None or corpus.bytes > COUNTED_BELOW or "val" in corpus.own_splits():
        return {}
    assignment, empty, number = _Assignment(data.val_fraction), set(SPLITS), -1
    documents = corpus.documents(bad=_bad_handler(data))
    for number, _ in enumerate(itertools.islice(documents, data.limit_documents)):
        assignment.record(number)
        empty.discard(assignment.split_of(number))
        if not empty:
            return {}
    return assignment.to_force(empty) if number > 0 else {}  # fewer than two documents are an error later


class _BadDocuments:
    """Counts the skipped documents, and reports the first three."""

    def __init__(self, count, report):
        self.count, self.report = count, report

    def __call__(self, problem):
        self.count += 1
        if self.count <= 3:
            self.report(f"skipped: {problem}")

    def summarize(self):
        if self.count > 3:
            self.report(f"... and {self.count - 3:,} more")
        if self.count:
            self.report(f"{counted(self.count, 'bad document')} skipped")


@dataclass(frozen=True)
class _Attempt:
    """One attempt to write the token files of a corpus."""

    data: object  # the data section
    corpus: Corpus
    tokenizer: Tokenizer
    writer: Writer
    report: Callable
    workers: int | None

    def write(self, forced):
        """Write all splits. If one is empty, return {document number: split} to force in a second attempt, else {}."""
        if self.writer.position == "all":  # the earlier attempt stopped in finish()
            return {}
        if not self.corpus.is_single:
            return self.write_documents(forced)
        text = next(self.corpus.documents())
        cut = find_cut(len(text), self.data.val_fraction, "characters", f"corpus={self.corpus.source['name']}")
        for split, part in (("train", text[:cut]), ("val", text[cut:])):
            self.writer.write(split, self.tokenizer.encode(part), len(part.encode()))
        return {}

    def write_documents(self, forced):
        """Write the documents of all splits. Return the same as write()."""
        splits, writer = self.corpus.own_splits(), self.writer
        start = {"split": 0, "documents": 0, "bad": 0, "draws": {}, "forced": list(forced.items())}
        position = writer.position or start
        assignment = _Assignment(self.data.val_fraction, position["forced"], position["draws"])
        bad = _BadDocuments(position["bad"], self.report)
        has_val = "val" in splits
        for index in range(position["split"], len(splits)):
            done = position["documents"] if index == position["split"] else 0
            is_shared = not has_val and splits[index] == "train"  # val is taken from the train documents
            done = self.write_split(index, done, assignment, is_shared, bad)
            if is_shared and done < 2:
                fix = "or set `corpus` to a single file, so that the end of its text becomes val"
                if self.data.limit_tokens and self.remaining_tokens(SPLITS) <= 0:
                    fix = f"or raise limit_tokens above {self.data.limit_tokens}"
                raise ValueError(
                    f"corpus={self.corpus.source['name']}: a single document cannot be split into train and val; "
                    f"use more documents, {fix}"
                )
        bad.summarize()
        # a second attempt is cheap, because a split can only be empty if the corpus is small
        return {} if has_val else assignment.to_force(split for split in SPLITS if split not in writer.counts)

    def write_split(self, index, done, assignment, is_shared, bad):
        """Write the documents of a split of the corpus, up to limit_tokens. Return the number of documents.

        index: index of the split in own_splits(). done: number of its documents that an earlier attempt wrote.
        is_shared: divide the documents between train and val, as `assignment` says.
        """
        split = self.corpus.own_splits()[index]
        targets = SPLITS if is_shared else (split,)
        if done and self.remaining_tokens(targets) <= 0:
            return done
        bad_before = bad.count  # a resumed attempt counts the bad documents of this split again
        documents = self.corpus.documents(split, bad if self.data.skip_bad_documents else None)
        documents = itertools.islice(documents, done, self.data.limit_documents)
        split_of = assignment.split_of if is_shared else lambda number: split
        with (
            closing(tokenize(documents, done, split_of, self.tokenizer, self.workers)) as chunks,
            TextProgress(split, self.corpus.bytes, self.report) as progress,
        ):
            for runs in chunks:
                for target, ids, sizes in runs:
                    if (remaining := self.remaining_tokens(targets)) <= 0:
                        break
                    # include the document that reaches the limit; sizes: tokens and bytes per document
                    sizes = sizes[: int(np.searchsorted(sizes[:, 0].cumsum(), remaining)) + 1]
                    self.writer.write(target, ids[: sizes[:, 0].sum()], int(sizes[:, 1].sum()), len(sizes))
                    for number in range(done, done + len(sizes) if is_shared else done):
                        assignment.record(number)
                    done += len(sizes)
                position = {"split": index, "documents": done, "bad": bad_before}
                position |= {"draws": assignment.nearest, "forced": list(assignment.forced.items())}
                self.writer.commit(position)
                self.show(progress)
                if self.remaining_tokens(targets) <= 0:
                    break
        return done

    def remaining_tokens(self, splits):
        """Return how many more tokens limit_tokens allows for these splits in total."""
        return (self.data.limit_tokens or float("inf")) - self.writer.total("tokens", splits)

    def written_bytes(self):
        """Return the bytes of text written so far."""
        return self.writer.total("bytes")

    def show(self, progress):
        writer = self.writer
        progress(documents=writer.total("documents"), bytes=self.written_bytes(), tokens=writer.total("tokens"))
