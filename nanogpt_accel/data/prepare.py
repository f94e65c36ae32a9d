"""From a recipe's data section to its folder of token files: documents -> token ids -> Writer.

An interrupted preparation keeps what was complete, and the next one continues there.
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
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np

from ..tracking.console import TextProgress
from ..utils.files import nearest_existing
from ..utils.text import counted, data_size
from .corpus import Corpus
from .dataset import SPLIT_SEED, check_fits, corpus_of, data_folder, facts_of, is_prepared, open_dataset
from .encoding import tokenize
from .manifest import is_data_folder
from .token_files import SPLITS, Writer, at_work, earlier_attempt
from .tokenizer import Tokenizer

COUNTED_BELOW = 2**27  # bytes of a corpus whose documents are assigned to splits on trial first
LARGE_TEXT = 2**30  # bytes of a single text above which its need of memory, 4 to 11 times as much, is worth a line


def prepare(data, report=print, workers=None):
    """Tokenize the corpus, unless that has been done; continue where an interrupted preparation stopped.

    A single text is cut as nanoGPT cuts it: the first 1 - val_fraction of its characters are train, the rest val, and
    no token is added. A corpus of token ids is cut alike, and copied. Documents are followed by the end-of-text token.
    If the corpus has a validation split of its own, that is val; else each document goes to one of the two by a hash of
    its number, and each split gets at least one document.

    Args:
        data: the section. report: called with a line now and then.
        workers: threads that tokenize; None: one per processor. The result does not depend on it.

    Returns:
        The folder.

    Raises:
        ValueError, OSError: the corpus or the settings are wrong, or the folder cannot be written; in one line.
    """
    folder = data_folder(data)
    if is_data_folder(folder):
        return folder
    try:
        _prepare(folder, data, report, workers)
    except (KeyboardInterrupt, SystemExit):
        if not at_work(folder):  # else this process was only waiting
            _, kept = earlier_attempt(folder)
            is_kept = f"{counted(kept, 'document')} {'is' if kept == 1 else 'are'} kept, the same command goes on"
            report(f"{folder}: interrupted; {is_kept if kept else 'nothing is kept'}")
        raise
    return folder


def ready(data, is_main, report=print):
    """Return the Dataset, prepared first if it is missing: by the main process, while the others wait for it."""
    if is_main:
        prepare(data, report)
    while not is_prepared(data):
        time.sleep(0.5)
    return open_dataset(data)


@dataclass(frozen=True)
class _Job:
    """What the steps of one preparation share."""

    data: object  # the data section
    corpus: Corpus
    tokenizer: Tokenizer
    report: Callable
    workers: int | None


def _prepare(folder, data, report, workers):
    _wait_for_others(folder, report)
    if is_data_folder(folder):
        return
    start = time.perf_counter()
    corpus = _pinned(corpus_of(data), folder)
    check_fits(data, corpus)
    facts = facts_of(data, corpus)
    _announce(folder, corpus, data, report)
    corpus.look(_bad_handler(data))
    tokenizer = _make_tokenizer(data, corpus, report)
    if not corpus.is_single and tokenizer.eot_id is None:
        raise ValueError(
            f"tokenizer={data.tokenizer}: has no end-of-text symbol to set between the "
            f"documents of corpus={data.corpus}: take gpt2, char or bpe, or a single text"
        )
    job = _Job(data, corpus, tokenizer, report, workers)
    decides = facts | {"fingerprint": tokenizer.fingerprint}
    forced = _forced(corpus, data)
    while True:
        with _unwinding(), _writer(folder, tokenizer.dtype, decides, data.shard_tokens, report) as writer:
            if writer is None or writer.is_finished:  # by another process, or by an earlier one
                return
            earlier = _size(writer, corpus)
            forced = _write(job, writer, forced)
            if not forced:
                made = {key: getattr(tokenizer, key) for key in ("kind", "vocab_size", "fingerprint", "eot_id")}
                writer.finish(facts | {"tokenizer": facts["tokenizer"] | made}, tokenizer.save)
                break
            writer.discard()
    size, seconds = _size(writer, corpus), time.perf_counter() - start
    here = f", {data_size(size - earlier)} of it now," if earlier else ""
    report(
        f"{folder}: {data_size(size)} of {'token ids' if corpus.ids else 'text'}{here} in {seconds:,.1f} s "
        f"({data_size((size - earlier) / seconds)}/s)"
    )


def _pinned(corpus, folder):
    """Return a Hub data set at one commit, that of an interrupted attempt even if its branch has moved."""
    if corpus.pin is None:
        return corpus
    earlier = earlier_attempt(folder)[0].get("corpus", {})
    commit = earlier.pop("commit", None)
    return corpus.pin(commit if earlier == corpus.source else None)


def _bad_handler(data):
    """Return `bad` for a pass that reports nothing: skip documents that cannot be read, or (None) refuse them."""
    return (lambda problem: None) if data.skip_bad_documents else None


# ---- before anything is written


def _announce(folder, corpus, data, report):
    """Report what will be read and how much room and memory it needs.

    Raises:
        OSError: the disk has too little room.
    """
    if corpus.left_out or corpus.source.get("files", 1) > 1:
        kinds = sorted(corpus.left_out.items(), key=lambda kind: (-kind[1], kind[0]))
        shown = ", ".join(f"{count:,} {suffix}" for suffix, count in kinds[:10]) + ", ..." * (len(kinds) > 10)
        report(
            f"corpus={data.corpus}: {counted(corpus.source['files'], 'file')} to read"
            + (f"; {sum(corpus.left_out.values()):,} left out ({shown})" if kinds else "")
        )
    if corpus.bytes is not None:
        _check_space(folder, corpus, data, report)
    if corpus.is_single and not corpus.ids and (corpus.bytes or 0) > LARGE_TEXT:
        report(
            f"corpus={data.corpus}: one text of {corpus.bytes / 1e9:,.1f} GB is read whole, which takes "
            f"{4 * corpus.bytes / 1e9:,.0f} GB of memory or more; lines=true, or several files, are streamed"
        )


def _check_space(folder, corpus, data, report):
    # ids of 2 bytes; a BPE makes a token of some 4 bytes of text, and of 3 if it knows little of it
    need = corpus.bytes * (1 if corpus.ids else 2 if data.tokenizer == "char" else 2 / 3)
    free = shutil.disk_usage(nearest_existing(folder)).free + sum(
        file.stat().st_size for file in folder.glob(".partial/*.bin")
    )
    if need > 2**30:
        report(f"{folder}: about {need / 1e9:,.1f} GB on the disk, of which {free / 1e9:,.1f} GB are free")
    if need > free and not (data.limit_documents or data.limit_tokens):
        raise OSError(
            f"data_dir={folder}: the token files need about {need / 1e9:,.1f} GB, and {free / 1e9:,.1f} are "
            "free: set data_dir to another disk" + ", or limit_tokens" * (not corpus.is_single)
        )


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
    """Yield the documents of every split, for a tokenizer that is made of them."""
    for split in corpus.own_splits():
        yield from itertools.islice(corpus.documents(split, _bad_handler(data)), data.limit_documents)


# ---- one process at a time, which may be interrupted


def _wait_for_others(folder, report):
    """Wait until no other process prepares the folder."""
    waited = False
    while other := at_work(folder):
        if not waited:
            report(f"{folder}: another process prepares it ({other}); waiting for it")
        waited = True
        time.sleep(1)


@contextmanager
def _writer(folder, dtype, facts, shard_tokens, report):
    """Open a Writer as soon as no other process prepares the folder; None if that one has finished the work."""
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


@contextmanager
def _unwinding():
    """Turn a SIGTERM that would end the process at once into SystemExit, so that a Writer commits what it has."""
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


# ---- a single text or sequence of ids, cut in two


def _write(job, writer, forced):
    """Write the corpus; if a split stayed empty, return {document: split} to force in another attempt."""
    if not job.corpus.is_single:
        return _write_documents(job, writer, forced)
    if writer.position == "all":  # killed when all was written
        return {}
    if job.corpus.ids:
        _write_ids(job, writer)
    else:
        _write_single(job, writer)
    return {}


def _write_single(job, writer):
    text = next(job.corpus.documents())
    cut = _cut(len(text), "characters", job)
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        writer.write(split, job.tokenizer.encode(part), len(part.encode()))


def _cut(length, of_what, job):
    """Return where to cut a single text or sequence of ids; both sides get something."""
    val_fraction = job.data.val_fraction
    cut = int(length * (1 - val_fraction))  # nanoGPT's int(n*0.9)
    for split, size in (("train", cut), ("val", length - cut)):
        if not size:
            raise ValueError(
                f"corpus={job.corpus.source['name']}: {length:,} {of_what} leave nothing for {split} at "
                f"val_fraction={val_fraction}: take a larger corpus or another val_fraction"
            )
    return cut


def _write_ids(job, writer):
    """Copy token ids. An end-of-text id ends a document; the one that the cut goes through counts on both sides."""
    corpus, eot_id = job.corpus, job.tokenizer.eot_id
    done = writer.position
    length, pieces = corpus.ids(job.tokenizer.dtype, job.tokenizer.vocab_size, done)
    cut = _cut(length, "token ids", job)
    n_bytes = job.tokenizer.symbol_bytes()
    with TextProgress("ids", corpus.bytes, job.report) as progress:
        for ids in pieces:
            left = max(cut - done, 0)  # for train
            for split, part, end in (("train", ids[:left], cut), ("val", ids[left:], length)):
                if not len(part):
                    continue
                done += len(part)
                # a document starts with a split and after each end of text, but for that at the very end
                documents = (split not in writer.counts) + np.count_nonzero(part == eot_id)
                documents -= done == end and part[-1] == eot_id
                writer.write(split, part, None if n_bytes is None else int(n_bytes[part].sum()), int(documents))
            writer.commit(done)
            progress(**_written(writer) | {"bytes": _size(writer, corpus)})


def _written(writer, splits=(*SPLITS, "test")):
    """Return the documents, bytes of text and tokens that are written so far, over these splits."""
    found = [writer.counts[split] for split in splits if split in writer.counts]
    return {key: sum(counts[key] or 0 for counts in found) for key in ("documents", "bytes", "tokens")}


def _size(writer, corpus):
    """Return the bytes of the corpus that are written so far: those of its ids if it has no text."""
    return _written(writer)["tokens"] * writer.dtype.itemsize if corpus.ids else _written(writer)["bytes"]


# ---- documents, each to one split


def _draw(number):
    """Return a number in [0, 1) for a document, the same whatever came before it."""
    digest = hashlib.blake2b(f"{SPLIT_SEED} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


class _Assignment:
    """Assigns documents by their number to train and val.

    forced: {number: split} to assign against the hash. nearest: split -> [draw, number] of the document nearest to it.
    """

    def __init__(self, val_fraction, forced=(), nearest=()):
        self.val_fraction, self.forced, self.nearest = val_fraction, dict(forced), dict(nearest)

    def split_of(self, number):
        return self.forced.get(number, "val" if _draw(number) < self.val_fraction else "train")

    def note(self, number):
        """Note that there is a document with this number."""
        draw = [_draw(number), number]
        self.nearest["val"] = min(self.nearest.get("val", [2, 0]), draw)
        self.nearest["train"] = max(self.nearest.get("train", [-1, 0]), draw)

    def to_force(self, empty):
        """Return {number: split} that gives each of the empty splits the document nearest to it."""
        return {self.nearest[split][1]: split for split in empty}


def _forced(corpus, data):
    """Return {document: split} if the hash would leave a split of a small corpus empty. A large one is not read twice
    for that; there it shows in the end, if ever, and costs another attempt."""
    if corpus.is_single or corpus.bytes is None or corpus.bytes > COUNTED_BELOW or "val" in corpus.own_splits():
        return {}
    assignment, empty, number = _Assignment(data.val_fraction), set(SPLITS), -1
    documents = corpus.documents(bad=_bad_handler(data))
    for number, _ in enumerate(itertools.islice(documents, data.limit_documents)):
        assignment.note(number)
        empty.discard(assignment.split_of(number))
        if not empty:
            return {}
    return assignment.to_force(empty) if number > 0 else {}  # one document or none is refused later


class _Bad:
    """Counts documents that cannot be read, and shows the first ones."""

    SHOWN = 3

    def __init__(self, count, report):
        self.count, self.report = count, report

    def __call__(self, problem):
        self.count += 1
        if self.count <= self.SHOWN:
            self.report(f"left out: {problem}")

    def summarize(self):
        if self.count > self.SHOWN:
            self.report(f"... and {self.count - self.SHOWN:,} more")
        if self.count:
            self.report(f"{counted(self.count, 'bad document')} {'was' if self.count == 1 else 'were'} left out")


def _write_documents(job, writer, forced):
    """Write all documents; if a split stayed empty, return {document: split} to force in another attempt."""
    splits = job.corpus.own_splits()
    position = writer.position or {"split": 0, "documents": 0, "bad": 0, "draws": {}, "forced": list(forced.items())}
    if position == "all":
        return {}
    assignment = _Assignment(job.data.val_fraction, position["forced"], position["draws"])
    bad = _Bad(position["bad"], job.report)
    has_val = "val" in splits
    for at in range(position["split"], len(splits)):
        done = position["documents"] if at == position["split"] else 0  # documents of this split that are written
        is_shared = not has_val and splits[at] == "train"  # val documents are taken from train
        done = _write_split(job, writer, at, done, assignment, is_shared, bad)
        if is_shared and done < 2:
            is_limited = job.data.limit_tokens and _room(job, writer, SPLITS) <= 0
            raise ValueError(
                f"corpus={job.corpus.source['name']}: one document cannot be both train and val: take "
                "more documents, "
                + (
                    f"a limit_tokens above {job.data.limit_tokens}"
                    if is_limited
                    else "or the file itself as corpus, whose end is val then"
                )
            )
    bad.summarize()
    # another attempt with the nearest document moved is cheap: only a small corpus leaves a split empty
    return {} if has_val else assignment.to_force(split for split in SPLITS if split not in writer.counts)


def _write_split(job, writer, at, done, assignment, is_shared, bad):
    """Write the documents of the corpus's split number `at`, from number `done` on, up to limit_tokens.

    is_shared: assign them to train and val; else they all are that split's.

    Returns:
        How many documents of this split are written.
    """
    split = job.corpus.own_splits()[at]
    targets = SPLITS if is_shared else (split,)
    if done and _room(job, writer, targets) <= 0:
        return done
    bad_before = bad.count  # whoever continues meets those of this split again
    documents = job.corpus.documents(split, bad if job.data.skip_bad_documents else None)
    documents = itertools.islice(documents, done, job.data.limit_documents)
    split_of = assignment.split_of if is_shared else lambda number: split
    with (
        closing(tokenize(documents, done, split_of, job.tokenizer, job.workers)) as chunks,
        TextProgress(split, job.corpus.bytes, job.report) as progress,
    ):
        for runs in chunks:
            for target, ids, sizes in runs:
                if (room := _room(job, writer, targets)) <= 0:
                    break
                # up to the document that reaches the limit; sizes: the tokens and the bytes of each
                sizes = sizes[: int(np.searchsorted(sizes[:, 0].cumsum(), room)) + 1]
                writer.write(target, ids[: sizes[:, 0].sum()], int(sizes[:, 1].sum()), len(sizes))
                for number in range(done, done + len(sizes) if is_shared else done):
                    assignment.note(number)
                done += len(sizes)
            forced = list(assignment.forced.items())
            writer.commit(
                {"split": at, "documents": done, "bad": bad_before, "draws": assignment.nearest, "forced": forced}
            )
            progress(**_written(writer))
            if _room(job, writer, targets) <= 0:
                break
    return done


def _room(job, writer, splits):
    """Return how many tokens limit_tokens still allows for these splits together."""
    return (job.data.limit_tokens or float("inf")) - _written(writer, splits)["tokens"]
