"""Tokenize documents in threads, each of which takes a chunk of documents at a time."""

import itertools
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

CHUNK = 2**19  # characters per chunk; the token files do not depend on it
AHEAD = 16  # chunks that wait for a thread, so that two threads have work while a file is flushed for 0.3 seconds


def tokenize(documents, number, split_of, tokenizer, workers=None):
    """Yield, chunk by chunk in order, runs of documents of the same split, as _encode returns them.

    Only a few chunks are in progress at a time, which bounds the memory. number: of the first document. split_of:
    number -> split. workers: threads, by default one per processor.
    """
    workers = workers or os.cpu_count()
    local = threading.local()
    # threads are enough, because tiktoken and tokenizers release the GIL
    with ThreadPoolExecutor(workers, initializer=lambda: setattr(local, "tokenizer", tokenizer.for_thread())) as pool:
        pending = deque()
        try:
            for chunk in _chunks(documents, number, split_of):
                pending.append(pool.submit(lambda chunk: _encode(local.tokenizer, chunk), chunk))
                if len(pending) > workers + AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:  # if the caller stops early
                future.cancel()


def _chunks(documents, number, split_of):
    """Yield lists of (split, text), of about CHUNK characters each."""
    chunk, size = [], 0
    for number, text in enumerate(documents, number):  # noqa: B020 (starts at the given number)
        chunk.append((split_of(number), text))
        size += len(text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode(tokenizer, chunk):
    """Return [(split, ids, sizes), ...]: the ids end each document with the end-of-text token, and sizes are the tokens
    and bytes of each document, shape (documents, 2)."""
    runs, eot = [], np.array([tokenizer.eot_id], tokenizer.dtype)
    for split, group in itertools.groupby(chunk, key=lambda document: document[0]):
        texts = [text for _, text in group]
        encoded = tokenizer.encode_batch(texts)
        sizes = [(len(ids) + 1, len(text.encode())) for ids, text in zip(encoded, texts, strict=True)]
        ids = np.concatenate([part for ids in encoded for part in (ids, eot)])
        runs.append((split, ids, np.array(sizes, np.int64)))
    return runs
