"""Prepare a corpus: read its documents, tokenize them, and write the token files.

If a preparation is interrupted, the documents that are already written are kept, and the next call of `prepare` resumes
after them. Several workers can divide the work, see prepare_parts.
"""

import hashlib
import itertools
import shutil
import signal
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Callable
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np

from ..distributed.launcher import is_main
from ..distributed.rendezvous import connect
from ..tracking.console import TextProgress
from ..utils.files import nearest_existing
from ..utils.text import counted, data_size
from .corpus import Corpus
from .dataset import (
    SPLIT_SEED,
    check_fits,
    corpus_of,
    data_folder,
    facts_of,
    is_prepared,
    larger_val_fractions,
    may_increase_val,
    open_dataset,
)
from .encoding import join, tokenize
from .find_tokenizer import load_tokenizer
from .foreign_tokens import cut_index, file_entries, read_ids
from .local_files import refuse_larger_val
from .losses import report_losses
from .manifest import describe_split, is_data_folder, read_manifest
from .parts import PARTS, Parts, delete_parts, earlier_facts, locked
from .token_files import SPLITS, Writer, earlier_attempt, find_active_process, sha256_of_split
from .tokenizer import EOT, EncodingError, Tokenizer

COUNTED_BELOW = 2**27  # bytes; in a smaller corpus, measure all documents first, so that none is written twice
MANY = 20  # documents; with fewer, val is not drawn at random, because their sizes can be very different
FOLDER_CACHE_S = 60  # seconds that NFS may need to show new files to another machine
MADE = ("char", "bpe")  # tokenizers that are made from the corpus
LARGE_TEXT = 2**30  # bytes; warn that a larger single text may need much memory (4 to 11 times its size)


def prepare(data, report=print, threads=None):
    """Tokenize the corpus into its data folder, or resume an interrupted preparation.

    nanogpt_accel/data/README.md describes how documents are assigned to the splits.

    Args:
        data: the data section of a recipe.
        report: called with each line of progress output.
        threads: tokenizer threads, by default one per processor. The token files do not depend on their number.

    Returns:
        The path of the data folder. If the folder is already complete, it is not changed.

    Raises:
        ValueError, OSError: the corpus or a setting is invalid, or the folder cannot be written.
    """
    folder = data_folder(data)
    if is_data_folder(folder):
        _warn_about_sizes(folder, report)
        delete_parts(folder)
        return folder
    try:
        _prepare(folder, data, report, threads)
    except (KeyboardInterrupt, SystemExit):
        if not find_active_process(folder):  # otherwise another process is preparing it
            kept = earlier_attempt(folder)[1]
            resume = "; run the same command to resume" if kept else ""
            report(f"{folder}: interrupted; {counted(kept, 'document')} kept{resume}")
        raise
    delete_parts(folder)
    return folder


def ready(data, report=print, block_size=0, timeout=600):
    """Open the data folder. If needed, prepare it first; see _ready.

    If val_fraction was not set, and val has fewer tokens than a sample (block_size + 1), val_fraction is increased.

    Returns:
        (the data section with the val_fraction that was used, the Dataset).
    """
    found = _ready(data, report, timeout)
    fractions = larger_val_fractions(data, found.manifest, block_size) if may_increase_val(data, found.manifest) else []
    for fraction in fractions:
        if len(found.val) <= block_size:
            reason = f"val had only {counted(len(found.val), 'token')}, fewer than block_size + 1 = {block_size + 1:,}"
            report(f"val_fraction={fraction} instead of {data.val_fraction}, because {reason}")
            data = data.model_copy(update={"val_fraction": fraction})
            found = _ready(data, report, timeout)
    return data, found


def _ready(data, report, timeout):
    """Open the data folder as a Dataset. If needed, prepare it first.

    The main process prepares it. On a machine that does not share the disk of the main process, the first rank prepares
    it again. The other ranks wait. timeout: collective_timeout, seconds to wait for a rank that does not respond.
    """
    ranks = connect(timeout)
    is_found = ranks.exchange(is_prepared(data), "looking for the token files")
    blind = [] if all(is_found) else ranks.find_blind(data_folder(data))
    machine = ranks.machines[ranks.rank]  # the first rank on this machine
    preparer = machine if machine in blind else 0
    if ranks.rank == preparer:
        host = ranks.hosts[ranks.rank]
        with ranks.working(f"token files of rank {preparer}"):
            prepare(data, report if is_main() else lambda line: print(f"{host}: {line}", flush=True))
    for other in {0, *blind} - {ranks.rank}:
        ranks.wait_for(f"token files of rank {other}", other, "preparing the token files")
    deadline = time.monotonic() + FOLDER_CACHE_S
    while ranks.rank != preparer and not is_prepared(data) and time.monotonic() < deadline:
        time.sleep(0.5)
    return open_dataset(data)


def prepare_parts(data, worker, workers, report=print, threads=None):
    """Tokenize the parts of the corpus that belong to one of several workers. A part is one or several files.

    The worker that finishes last then calls `prepare`, which joins the parts. The token files are the same as those of
    a single process: the index of a document decides whether it is in train or val, and `prepare` knows all indices.

    Args:
        data, report, threads: see prepare.
        worker, workers: number of this worker, from 0, and number of workers.

    Returns:
        Whether the caller must call `prepare` next. True if all parts or the data folder are complete, or if the corpus
        cannot be divided and this is worker 0.

    Raises:
        ValueError, OSError: see prepare; or another process is running as this worker.
    """
    folder = data_folder(data)
    if is_data_folder(folder):
        return True
    corpus = corpus_of(data)
    check_fits(data, corpus)
    corpus.check_files(_bad_handler(data))
    if reason := _why_undivided(corpus, data):
        report(f"{folder}: worker 0 prepares this folder alone, because {reason}")
        return worker == 0
    _check_resources(folder, corpus, data, report, copies=2)
    with _signals_as_exit():
        with locked(folder, report):
            if is_data_folder(folder):
                return True
            corpus = _pin(corpus, folder)
            parts = Parts(folder, corpus, facts_of(data, corpus))
            if not parts.is_set_up:
                parts.set_up(_make_tokenizer(data, corpus, report) if data.tokenizer in MADE else None)
        tokenizer = _open_tokenizer(corpus, data, parts, report)
        try:
            with parts.lock(worker, workers), _unknown_characters(data):
                _write_parts(parts, worker, workers, corpus, data, tokenizer, report, threads)
        except OSError:
            if not is_data_folder(folder):
                raise
            return True  # another process has completed the folder, and deleted the parts
    deadline = time.monotonic() + FOLDER_CACHE_S
    while parts.missing() and not is_data_folder(folder):
        if time.monotonic() > deadline:
            report(
                f"{folder}: worker {worker} has completed its parts, and waited {FOLDER_CACHE_S} s for "
                f"{parts.describe_missing(workers)}; the last worker to finish completes the folder"
            )
            return False
        time.sleep(1)
    return True


def _write_parts(parts, worker, workers, corpus, data, tokenizer, report, threads):
    """Tokenize the parts of a worker that are not complete yet."""
    own, missing = parts.all[worker::workers], set(parts.missing())
    left = [part for part in own if part in missing]
    bad, totals = _BadDocuments(0, report), np.zeros(4, np.int64)  # totals: documents, tokens, bytes, special tokens
    current = None  # the part that is being read

    def documents():
        nonlocal current
        for current in left:
            split, number = current
            yield from corpus.documents(split, bad if data.skip_bad_documents else None, number)

    def watch(chunks):
        for runs in chunks:
            yield runs
            for _, _, sizes in runs:
                totals[:] += (len(sizes), *sizes[:, :3].sum(axis=0))
            progress(documents=int(totals[0]), bytes=int(totals[2]), tokens=int(totals[1]))

    try:
        with (
            closing(tokenize(documents(), 0, lambda _: current, tokenizer, threads)) as chunks,
            TextProgress(f"worker {worker}", None, report) as progress,
        ):
            parts.write(left, watch(chunks))
    except (KeyboardInterrupt, SystemExit):
        kept = len(set(own).difference(parts.missing()))
        report(f"worker {worker}: interrupted; {kept} of {len(own)} parts kept; run the same command to resume")
        raise
    bad.summarize()
    report(f"worker {worker}: tokenized {counted(len(left), 'part')}, {data_size(int(totals[2]))} of text")


def _prepare(folder, data, report, threads):
    _wait_for_others(folder, report)
    if is_data_folder(folder):
        return
    start = time.perf_counter()
    corpus = _pin(corpus_of(data), folder)
    check_fits(data, corpus)
    facts = facts_of(data, corpus)
    _check_resources(folder, corpus, data, report)
    corpus.check_files(_bad_handler(data))
    parts = Parts(folder, corpus, facts)
    tokenizer = _open_tokenizer(corpus, data, parts, report)
    all_facts = facts | {"fingerprint": tokenizer.fingerprint}
    cut = _plan_cut(corpus, data)
    while True:
        with _signals_as_exit(), _open_writer(folder, tokenizer.dtype, all_facts, data.shard_tokens, report) as writer:
            if writer is None or writer.is_finished:  # completed by another process or by an earlier attempt
                return
            made = {key: getattr(tokenizer, key) for key in ("kind", "vocab_size", "fingerprint", "eot_id")}
            facts_made = facts | {
                "tokenizer": facts["tokenizer"] | made,
                "has_own_val": "val" in corpus.own_splits(),
            }
            if corpus.ids:
                manifest = writer.finish(facts_made | _check_ids(data, corpus, tokenizer, report), tokenizer.save)
                report(f"{folder}: uses {counted(corpus.source['files'], 'file')} of token ids without copying them")
                _report_splits(manifest, report)
                return
            has_parts = parts.is_set_up and not parts.missing()
            attempt = _Attempt(data, corpus, tokenizer, writer, report, threads, parts if has_parts else None)
            earlier = attempt.written_bytes()
            with _unknown_characters(data):
                cut = attempt.write(cut)
            if not cut:
                _check_sizes(corpus, data, writer)
                _report_special_tokens(data, tokenizer, writer, report)
                manifest = writer.finish(facts_made, tokenizer.save)
                break
            writer.discard()
    size, seconds = attempt.written_bytes(), time.perf_counter() - start
    new = f" ({data_size(size - earlier)} in this attempt)" if earlier else ""
    speed = data_size((size - earlier) / seconds)
    report(f"{folder}: {data_size(size)} of text{new} in {seconds:,.1f} s ({speed}/s)")
    _report_splits(manifest, report)


def _report_splits(manifest, report):
    for split in manifest["splits"]:
        report(f"{split}: {describe_split(manifest, split)}")


def _pin(corpus, folder):
    """Return the corpus. Pin a Hub data set to the commit of an interrupted preparation, or to the latest commit."""
    if corpus.pin is None:
        return corpus
    for facts in (earlier_attempt(folder)[0], *earlier_facts(folder)):
        earlier = facts.get("corpus")
        commit = earlier.pop("commit", None) if isinstance(earlier, dict) else None
        if earlier == corpus.source:
            return corpus.pin(commit)
    return corpus.pin(None)


@contextmanager
def _unknown_characters(data):
    """Convert an EncodingError to a ValueError that names the settings `tokenizer` and `corpus`."""
    try:
        yield
    except EncodingError as error:
        raise ValueError(
            f"tokenizer={data.tokenizer}: cannot encode corpus={data.corpus}: {error}; set tokenizer to gpt2 or bpe, "
            "or use another corpus"
        ) from None


def _bad_handler(data):
    """With skip_bad_documents, return a callback that ignores documents that cannot be read. Otherwise return None."""
    return (lambda problem: None) if data.skip_bad_documents else None


# ---- checks before anything is written


def _why_undivided(corpus, data):
    """Return the reason why several workers cannot divide a corpus, or None."""
    if corpus.ids or corpus.is_single:
        return f"corpus={data.corpus} " + (
            "contains token ids, which are not copied" if corpus.ids else "is a single text"
        )
    if corpus.parts is None or sum(len(corpus.parts(split)) for split in corpus.own_splits()) < 2:
        return f"corpus={data.corpus} does not consist of several files"
    if limits := [key for key in ("limit_documents", "limit_tokens") if getattr(data, key)]:
        return f"{limits[0]} is set"
    return "val is the end of the text" if _plan_cut(corpus, data) else None


def _check_resources(folder, corpus, data, report, copies=1):
    """Report the number of files, and the disk space and memory that a large corpus needs. Raise OSError if the disk
    has too little free space. copies: number of times that the tokens are stored."""
    if corpus.skipped or corpus.source.get("files", 1) > 1:
        kinds = sorted(corpus.skipped.items(), key=lambda kind: (-kind[1], kind[0]))
        shown = ", ".join(f"{count:,} {suffix}" for suffix, count in kinds[:10]) + ", ..." * (len(kinds) > 10)
        skipped = f"; {sum(corpus.skipped.values()):,} skipped ({shown})" if kinds else ""
        report(f"corpus={data.corpus}: {counted(corpus.source['files'], 'file')} to read{skipped}")
    for note in corpus.notes:
        report(note)
    if corpus.bytes is None or corpus.ids:
        return
    # An id has 2 bytes. A BPE token has about 4 bytes of text, or 3 if the BPE was trained on other text: assume 3.
    need = corpus.bytes * (2 if data.tokenizer == "char" else 2 / 3) * copies
    written = sum(file.stat().st_size for file in (*folder.glob(".partial/*.bin"), *folder.glob(f"{PARTS}/*/*.ids")))
    free = shutil.disk_usage(nearest_existing(folder)).free + written
    if need > 2**30:
        report(f"{folder}: needs about {need / 1e9:,.1f} GB of disk space; {free / 1e9:,.1f} GB are free")
    if need > free and not (data.limit_documents or data.limit_tokens):
        raise OSError(
            f"data_dir={folder}: the token files need about {need / 1e9:,.1f} GB, but only {free / 1e9:,.1f} GB "
            "are free; set data_dir to another disk" + ("" if corpus.is_single else ", or set limit_tokens")
        )
    if corpus.is_single and corpus.bytes > LARGE_TEXT and data.tokenizer not in ("gpt2", "char", "bpe"):
        report(
            f"tokenizer={data.tokenizer}: tokenizing a single text of {corpus.bytes / 1e9:,.1f} GB can need "
            f"{4 * corpus.bytes / 1e9:,.0f} GB of memory or more; to read it in parts, set lines=true or split the file"
        )


def _open_tokenizer(corpus, data, parts, report):
    """Return the tokenizer, after checking that it can encode the corpus.

    parts: the Parts of the corpus. If workers have made a tokenizer from the corpus, it is loaded from there.
    """
    is_made = data.tokenizer in MADE and parts.is_set_up
    tokenizer = parts.load_tokenizer() if is_made else _make_tokenizer(data, corpus, report)
    if not corpus.is_single and tokenizer.eot_id is None:
        raise ValueError(
            f"tokenizer={data.tokenizer}: has no end-of-text token to separate the documents of "
            f"corpus={data.corpus}; set eos_token to one of its tokens, or set tokenizer=gpt2 or tokenizer=bpe"
        )
    if not corpus.ids:  # for token ids, it is unknown how special tokens in the text were encoded
        tokenizer.special_tokens = data.special_tokens
    with _unknown_characters(data):
        report_losses(corpus, data, tokenizer, report, bad=_bad_handler(data))
    return tokenizer


def _make_tokenizer(data, corpus, report):
    if data.tokenizer == "gpt2":
        return Tokenizer.gpt2()
    if data.tokenizer not in MADE:
        return load_tokenizer(data.tokenizer, data.eos_token)
    documents = itertools.chain.from_iterable(
        itertools.islice(corpus.documents(split, _bad_handler(data)), data.limit_documents)
        for split in corpus.own_splits()
    )
    has_special = data.special_tokens == "tokens"
    if has_special:
        documents = itertools.chain.from_iterable(text.split(EOT) for text in documents)
    if data.tokenizer == "char":
        return Tokenizer.char(documents, add_eot=has_special or not corpus.is_single)
    report(f"training a BPE tokenizer with {data.vocab_size:,} tokens on {corpus.name}")
    tokenizer = Tokenizer.train_bpe(documents, data.vocab_size)
    if tokenizer.vocab_size < data.vocab_size:
        problem = "the corpus is too small for this vocabulary size"
        report(f"vocab_size={data.vocab_size}: {problem}; the tokenizer has only {tokenizer.vocab_size:,} tokens")
    return tokenizer


# ---- token ids


def _check_ids(data, corpus, tokenizer, report):
    """Read all ids of a corpus of token files once. Return {"dtype", "splits"} for the manifest.

    The ids are not copied: the manifest contains the paths of the files. An end-of-text id ends a document. If the
    start of val is inside a document, this document is counted in both train and val.

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
    if "val" not in corpus.own_splits():
        _report_rule(data, report, is_cut=True)
    return {"dtype": tokens.dtype.name, "splits": splits}


# ---- locking and interruptions


def _wait_for_others(folder, report):
    """Wait until no other process is preparing the folder."""
    is_reported = False
    while process := find_active_process(folder):
        if not is_reported:
            report(f"{folder}: waiting for another process that is preparing this folder ({process})")
        is_reported = True
        time.sleep(1)


def _open_writer(folder, dtype, facts, shard_tokens, report):
    """Wait for other processes, then return a Writer, or nullcontext() if one of them has prepared the folder."""
    while not is_data_folder(folder):
        _wait_for_others(folder, report)
        try:
            writer = Writer(folder, dtype, facts, shard_tokens)
        except BlockingIOError:
            continue
        except ValueError:
            if not is_data_folder(folder):
                raise
            break  # another process has completed it since the last check
        if writer.position:
            report(f"{folder}: resuming an interrupted preparation")
        return writer
    return nullcontext()


@contextmanager
def _signals_as_exit():
    """Let SIGTERM and SIGUSR1 raise SystemExit, so that the Writer commits. Keep handlers that are already set."""
    handlers = {}
    if threading.current_thread() is threading.main_thread():  # other threads cannot set handlers
        for name, status in (("SIGTERM", 128 + signal.SIGTERM), ("SIGUSR1", 75)):
            number = getattr(signal, name, None)  # Windows has no SIGUSR1
            if number and signal.getsignal(number) == signal.SIG_DFL:
                handlers[number] = signal.signal(number, lambda *_, status=status: sys.exit(status))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ---- assign documents to splits


def _draw(number):
    """Return a hash of a document's index, as a float in [0, 1)."""
    digest = hashlib.blake2b(f"{SPLIT_SEED} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _plan_cut(corpus, data):
    """Decide how to divide documents into train and val. Return the position where val starts (the cut, see _find_cut),
    or None if val is drawn at random, or if the corpus has its own val.

    If the sizes of the documents are not known in advance (large or Hub corpora, limit_tokens), val is first drawn at
    random. If this gives unsuitable splits (see is_unsuitable), all documents are written again with a cut.
    """
    if corpus.is_single or corpus.bytes is None or data.limit_tokens or "val" in corpus.own_splits():
        return None
    if corpus.sizes:
        is_read = not _can_be_drawn(corpus.sizes[: data.limit_documents], data.val_fraction)
    else:
        is_read = corpus.bytes <= COUNTED_BELOW
    return _find_cut(corpus, data, data.limit_documents) if is_read else None


def _find_cut(corpus, data, limit, is_needed=False):
    """Return the position in the first `limit` documents where val starts (the cut), or None to draw val at random.

    The cut is moved to the nearest end of a document if the move changes the size of the smaller split by at most a
    quarter. Otherwise, it is inside a document. is_needed: whether to return a cut even if val can be drawn at random.

    Returns:
        [number of complete documents before the cut, number of characters before the cut in the next document, number
        of documents if limit_tokens is set, else None].
    """
    documents = corpus.documents(bad=_bad_handler(data))
    sizes = [len(text) for text in itertools.islice(documents, limit)]
    if not is_needed and _can_be_drawn(sizes, data.val_fraction):
        return None
    length, ends = sum(sizes), list(itertools.accumulate(sizes))
    cut = _cut_text(corpus, data, length)
    end = min(ends, key=lambda end: abs(end - cut))
    if abs(end - cut) <= min(cut, length - cut) / 4:
        cut = end
    before = bisect_right(ends, cut)
    return [before, cut - sum(sizes[:before]), len(sizes) if data.limit_tokens else None]


def _can_be_drawn(sizes, val_fraction):
    """Return whether train and val have suitable sizes if val is drawn at random (by the hash of a document's index).

    There must be at least MANY documents, and each split must have between half and twice its share of the text. In
    addition, val must have at most half of the text if val_fraction is at most 0.5. sizes: the size of each document.
    """
    if len(sizes) < MANY:
        return False
    share = sum(size for number, size in enumerate(sizes) if _draw(number) < val_fraction) / sum(sizes)
    parts = ((share, val_fraction), (1 - share, 1 - val_fraction))
    return all(wanted / 2 <= part <= 2 * wanted for part, wanted in parts) and (share <= 0.5 or val_fraction > 0.5)


def _cut_text(corpus, data, length):
    """Return the index where val starts in a text of `length` characters."""
    return cut_index(length, data.val_fraction, "characters", f"corpus={corpus.source['name']}")


def _report_rule(data, report, is_cut):
    rule = "the end of the text" if is_cut else "documents drawn at random"
    report(f"corpus={data.corpus}: val is {rule} (val_fraction={data.val_fraction})")


def _cut_documents(documents, cut, tokenizer):
    """Yield the documents. If the cut is inside a document, yield its two parts. cut: the result of _find_cut."""
    before, characters, count = cut
    for number, text in enumerate(itertools.islice(documents, count)):
        if number == before and characters:
            characters = tokenizer.move_cut(text, characters)
            yield text[:characters]
            text = text[characters:]
        yield text


def _check_sizes(corpus, data, writer):
    """Raise ValueError if file names define the splits, and val is larger than train."""
    is_limited = data.limit_documents or data.limit_tokens
    if not corpus.source.get("split_files") or data.split_by == "name" or is_limited or "val" not in writer.counts:
        return
    train, val = (writer.counts[split]["tokens"] for split in SPLITS)
    if val > train:
        refuse_larger_val(f"corpus={data.corpus}", counted(val, "token"), counted(train, "token"))


def _report_special_tokens(data, tokenizer, writer, report):
    """Report the number of special tokens in the text and how they were encoded. Special tokens in prompts are encoded
    in the same way or, if the text contains no special tokens, as their ids."""
    count = sum(counts.get("special_tokens", 0) for counts in writer.counts.values())
    tokens = ", ".join(sorted(tokenizer.special)[:3]) or EOT
    if data.special_tokens == "tokens":
        report(f"corpus={data.corpus}: {counted(count, 'special token')} in the text became ids ({tokens})")
    elif count:
        fix = f"to encode {tokens} as ids, set special_tokens=tokens"
        if tokenizer.special and EOT not in tokenizer.special:
            fix += f" (the tokenizer has no {EOT}; in the corpus, replace {EOT} by one of these tokens)"
        report(f"corpus={data.corpus}: {counted(count, 'special token')} in the text, encoded as ordinary text; {fix}")
    else:
        tokenizer.special_tokens = None


def _warn_about_sizes(folder, report):
    """Warn if val is larger than train, although val_fraction is at most 0.5.

    Earlier versions could write such a folder, because they drew val at random even from a few documents.
    """
    if not (folder / "manifest.json").is_file():  # token files of another project, which read_manifest would hash
        return
    manifest = read_manifest(folder)
    corpus, splits = manifest["corpus"], manifest["splits"]
    if corpus.get("kind") != "files" or "split_files" in corpus or manifest["val_fraction"] > 0.5:
        return
    if splits["val"]["tokens"] > splits["train"]["tokens"]:
        wrong = f"val is larger than train, but val_fraction is {manifest['val_fraction']}"
        report(f"warning: {folder}: {wrong}; to fix the split sizes, delete this folder and prepare it again")


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
    threads: int | None
    parts: Parts | None  # the complete parts of all workers; joined instead of tokenizing the text, if there is no cut

    def write(self, cut):
        """Write all splits. Return None or, if the splits are unsuitable, the cut for the next attempt.

        cut: the result of _find_cut.
        """
        if self.writer.position == "all":  # the earlier attempt stopped in finish()
            return None
        if not self.corpus.is_single:
            return self.write_documents(cut)
        self.write_text()
        _report_rule(self.data, self.report, is_cut=True)
        return None

    def write_text(self):
        """Write a single text. With special_tokens=tokens, special tokens do not count as bytes of the text."""
        tokenizer, writer, data, chunks = self.tokenizer, self.writer, self.data, self.corpus.documents
        # gpt2, char and bpe have no tokens that cross the end of a chunk; other tokenizers must encode the text at once
        if not tokenizer.is_lossless or any(map(str.isspace, "".join(tokenizer.special))):
            chunks = lambda: ["".join(self.corpus.documents())]  # noqa: E731
        cut = _cut_text(self.corpus, data, sum(map(len, chunks())))  # relative to the start of the chunk
        ends_in_eot = {}
        with TextProgress("text", self.corpus.bytes, self.report) as progress:
            for text in chunks():
                here = tokenizer.move_cut(text, cut) if 0 < cut < len(text) else max(cut, 0)
                cut -= len(text)
                for split, part in (("train", text[:here]), ("val", text[here:])):
                    ids, n_bytes = tokenizer.encode_document(part), len(part.encode())
                    n_special, special_bytes = tokenizer.count_special(part)
                    if data.special_tokens == "tokens":
                        n_bytes -= special_bytes
                    if len(ids):
                        n_documents = int(np.count_nonzero(ids == tokenizer.eot_id)) + (split not in ends_in_eot)
                        writer.write(split, ids, n_bytes, n_documents)
                        ends_in_eot[split] = ids[-1] == tokenizer.eot_id
                        self.count_special(split, n_special)
                self.show(progress)
        for split in SPLITS:
            if split not in writer.counts:
                problem = f"has no token for the text of the {split} split of corpus={data.corpus}"
                raise ValueError(f"tokenizer={data.tokenizer}: {problem}; set tokenizer to gpt2, char or bpe")
            writer.counts[split]["documents"] -= int(ends_in_eot[split])  # no document starts after an EOT at the end

    def count_special(self, split, count):
        """Add a number of special tokens to the counts of a split."""
        if count:
            counts = self.writer.counts[split]
            counts["special_tokens"] = counts.get("special_tokens", 0) + count

    def write_documents(self, cut):
        """Write the documents of all splits. Arguments and return value: see write()."""
        splits, writer = self.corpus.own_splits(), self.writer
        position = writer.position or {"split": 0, "documents": 0, "bad": 0, "cut": cut}
        cut = position.get("cut")  # missing if an older version wrote the position
        bad = _BadDocuments(position["bad"], self.report)
        has_val = "val" in splits
        for index in range(position["split"], len(splits)):
            done = position["documents"] if index == position["split"] else 0
            is_shared = not has_val and splits[index] == "train"  # val is taken from the train documents
            done = self.write_split(index, done, cut, is_shared, bad)
            if is_shared and not cut and self.is_unsuitable(done):
                return _find_cut(self.corpus, self.data, done, is_needed=True)
            if is_shared:
                _report_rule(self.data, self.report, is_cut=bool(cut))
        bad.summarize()
        return None

    def is_unsuitable(self, count):
        """Return whether a random val is unsuitable: few documents, an empty split, or val larger than train."""
        counts, val_fraction = self.writer.counts, self.data.val_fraction
        if count < MANY or any(split not in counts for split in SPLITS):
            return True
        return counts["val"]["bytes"] > counts["train"]["bytes"] and val_fraction <= 0.5

    def write_split(self, index, done, cut, is_shared, bad):
        """Write the documents of a split of the corpus, up to limit_tokens. Return the number of documents.

        done: number of documents that are already written. cut: None, or the result of _find_cut. is_shared: whether
        these documents are divided between train and val, by the cut or at random.
        """
        split = self.corpus.own_splits()[index]
        targets = SPLITS if is_shared else (split,)
        has_limit = not (is_shared and cut)  # with a cut, the number of documents is already limited
        if done and has_limit and self.remaining_tokens(targets) <= 0:
            return done
        bad_before = bad.count  # for commit(); a resumed attempt counts the bad documents of this split again
        documents = self.corpus.documents(split, bad if self.data.skip_bad_documents else None)
        documents = itertools.islice(documents, self.data.limit_documents)
        documents = itertools.islice(
            _cut_documents(documents, cut, self.tokenizer) if is_shared and cut else documents, done, None
        )
        split_of = self.split_of(split, cut, is_shared)
        if self.parts and not cut:
            chunks = join(self.parts.documents(split, done, self.tokenizer.dtype), done, split_of)
        else:
            chunks = tokenize(documents, done, split_of, self.tokenizer, self.threads)
        with (
            closing(chunks),
            TextProgress(split, self.corpus.bytes, self.report) as progress,
        ):
            for runs in chunks:
                for target, ids, sizes in runs:
                    remaining = self.remaining_tokens(targets) if has_limit else float("inf")
                    if remaining <= 0:
                        break
                    # include the document that reaches the limit; sizes: tokens, bytes, special tokens per document
                    sizes = sizes[: int(np.searchsorted(sizes[:, 0].cumsum(), remaining)) + 1]
                    ids = ids[: sizes[:, 0].sum()]
                    n_documents = int(np.count_nonzero(ids == self.tokenizer.eot_id))  # several if a text contains EOT
                    self.writer.write(target, ids, int(sizes[:, 1].sum()), n_documents)
                    self.count_special(target, int(sizes[:, 2].sum()))
                    done += len(sizes)
                self.writer.commit({"split": index, "documents": done, "bad": bad_before, "cut": cut})
                self.show(progress)
                if has_limit and self.remaining_tokens(targets) <= 0:
                    break
        if self.parts and not done:
            next(documents)  # nothing was written, so this raises the error about a split without text
        return done

    def split_of(self, split, cut, is_shared):
        """Return a function that maps the index of a document to its split."""
        if not is_shared:
            return lambda number: split
        if cut:
            n_train = cut[0] + (cut[1] > 0)
            return lambda number: "train" if number < n_train else "val"
        return lambda number: "val" if _draw(number) < self.data.val_fraction else "train"

    def remaining_tokens(self, splits):
        """Return how many more tokens limit_tokens allows for these splits in total."""
        return (self.data.limit_tokens or float("inf")) - self.writer.total("tokens", splits)

    def written_bytes(self):
        """Return the bytes of text written so far."""
        return self.writer.total("bytes")

    def show(self, progress):
        writer = self.writer
        progress(documents=writer.total("documents"), bytes=self.written_bytes(), tokens=writer.total("tokens"))
