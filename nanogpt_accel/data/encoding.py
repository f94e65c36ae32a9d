"""Documents to token ids, in threads that each take a chunk of documents at a time."""

import itertools
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

CHUNK = 2**19  # characters that one worker tokenizes at a time; what is written does not depend on the workers
AHEAD = 16  # chunks that wait for a worker: work for a third of a second of two, while a file is flushed to the disk


def tokenize(documents, number, split_of, tokenizer, workers=None):
    """Yield, chunk by chunk in order, runs of documents that go to the same split: (split, ids, sizes), as of _encode.

    A chunk ends with the document that fills it, so the chunks depend on the documents alone. A few are on their way at
    a time, which bounds the memory.

    Args:
        documents: the texts. number: of the first one. split_of: number -> split. workers: None: one per processor.
    """
    workers = workers or os.cpu_count()
    own = threading.local()

    def begin():
        own.tokenizer = tokenizer.for_thread()

    # threads, for tiktoken and tokenizers let go of Python's lock while they are at work
    with ThreadPoolExecutor(workers, initializer=begin) as pool:
        pending = deque()
        try:
            for chunk in _chunks(documents, number, split_of):
                pending.append(pool.submit(lambda chunk: _encode(own.tokenizer, chunk), chunk))
                if len(pending) > workers + AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for chunk in pending:  # nobody waits for them if the work ends early
                chunk.cancel()


def _chunks(documents, number, split_of):
    """Yield lists of (split, text), of about CHUNK characters each."""
    chunk, size = [], 0
    for number, text in enumerate(documents, number):  # noqa: B020 (goes on from the number given)
        chunk.append((split_of(number), text))
        size += len(text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode(tokenizer, chunk):
    """Return the runs of a chunk: (split, ids with the end-of-text token after each document, sizes). sizes: the tokens
    and the bytes of each document, (documents, 2)."""
    runs = []
    for split, group in itertools.groupby(chunk, key=lambda document: document[0]):
        texts = [text for _, text in group]
        eot = np.array([tokenizer.eot_id], tokenizer.dtype)
        encoded = tokenizer.encode_batch(texts)
        sizes = [(len(ids) + 1, len(text.encode())) for ids, text in zip(encoded, texts, strict=True)]
        ids = np.concatenate([part for ids in encoded for part in (ids, eot)])
        runs.append((split, ids, np.array(sizes, np.int64)))
    return runs
