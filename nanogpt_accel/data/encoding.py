"""Tokenize documents in several threads."""

import itertools
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..distributed.launcher import count_processors

# Characters per chunk. Token files only end at the end of a chunk, so another number would change the hashes of large
# data sets, and a run could not resume on data that were prepared again.
CHUNK = 2**19
GROUP = 4  # chunks that a thread encodes together; with fewer, threads wait longer for each other
AHEAD = 4  # extra groups in the queue; they keep two threads busy while the caller flushes a file (0.3 seconds)


def tokenize(documents, number, split_of, tokenizer, threads=None):
    """Encode documents in threads. For each chunk of documents, in order, yield a list of runs, see _runs.

    documents: iterator over texts; only a few groups of chunks are in memory at a time. number: index of the first
    document. split_of: function that returns the split of the document with a given index. threads: number of threads,
    by default one per processor.
    """
    threads = threads or count_processors()
    local = threading.local()
    # threads are enough, because tiktoken and tokenizers release the GIL
    with ThreadPoolExecutor(threads, initializer=lambda: setattr(local, "tokenizer", tokenizer.for_thread())) as pool:
        pending = deque()
        try:
            chunks = _chunks(documents, number, split_of)
            while group := list(itertools.islice(chunks, GROUP)):
                pending.append(pool.submit(lambda group: _encode(local.tokenizer, group), group))
                if len(pending) > threads + AHEAD:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for future in pending:  # if the caller stops early
                future.cancel()


def join(documents, number, split_of):
    """Yield the same chunks as `tokenize` from documents that are already encoded.

    documents: iterator over (ids, sizes), one pair per document; for sizes, see _runs. number, split_of: see
    tokenize.
    """
    for chunk in _chunks(documents, number, split_of, lambda document: document[1][3]):
        runs = []
        for split, group in itertools.groupby(chunk, key=lambda document: document[0]):
            ids, sizes = zip(*(document for _, document in group), strict=True)
            runs.append((split, np.concatenate(ids), np.stack(sizes)))
        yield runs


def _chunks(documents, number, split_of, length=len):
    """Yield chunks: lists of (split, document) with about CHUNK characters in total.

    length: function that returns the number of characters of a document. Other arguments: see tokenize.
    """
    chunk, size = [], 0
    for number, document in enumerate(documents, number):  # noqa: B020 (starts at the given number)
        chunk.append((split_of(number), document))
        size += length(document)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode(tokenizer, group):
    """Encode a group of chunks. For each chunk, return a list of runs, see _runs."""
    encoded = iter(tokenizer.encode_batch([text for chunk in group for _, text in chunk]))
    return [_runs(tokenizer, chunk, encoded) for chunk in group]


def _runs(tokenizer, chunk, encoded):
    """Return the runs of a chunk: [(split, ids, sizes), ...]. A run consists of consecutive documents of one split.

    ids: the ids of all documents of the run; each document ends with the end-of-text token. sizes: array of shape
    (documents, 4) with the numbers of tokens, bytes, special tokens and characters of each document. encoded: iterator
    over the ids of the documents.
    """
    runs, eot, has_ids = [], np.array([tokenizer.eot_id], tokenizer.dtype), tokenizer.special_tokens == "tokens"
    for split, documents in itertools.groupby(chunk, key=lambda document: document[0]):
        parts, sizes = [], []
        for _, text in documents:
            ids = next(encoded)
            if has_ids and ids.size and ids[-1] == tokenizer.eot_id:
                ids = ids[:-1]  # a text that ends with the end-of-text token does not get a second one
            n_special, special_bytes = tokenizer.count_special(text)
            sizes.append((len(ids) + 1, len(text.encode()) - has_ids * special_bytes, n_special, len(text)))
            parts += [ids, eot]
        ids = np.concatenate(parts, dtype=tokenizer.dtype, casting="same_kind")
        runs.append((split, ids, np.array(sizes, np.int64)))
    return runs
