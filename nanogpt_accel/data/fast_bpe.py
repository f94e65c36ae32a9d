"""Encode texts with gigatoken, a BPE encoder that caches the ids of words and is many times as fast as tiktoken.

gigatoken (github.com/marcelroed/gigatoken) returns the same ids as tiktoken and the tokenizers library, except for the
texts for which `is_safe` returns False. FastBPE raises ValueError for tokenizers that gigatoken does not support.
"""

import copy
import json
import re

import numpy as np

# Letters and digits that are new in Unicode 17. gigatoken 0.10 knows them; tiktoken 0.13 and tokenizers 0.22 do not.
# tests/data/test_fast_bpe.py compares the ids of all other characters.
NEW_CHARACTERS = re.compile(
    "[\u088f\u0c5c\u0cdc\ua7ce\ua7cf\ua7d2\ua7d4\ua7f1\U00010940-\U00010959\U00010ec5-\U00010ec7"
    "\U00011db0-\U00011de9\U00016ea0-\U00016ed3\U00016ff2-\U00016ff6\U000187f8-\U000187ff\U00018d09-\U00018d1e"
    "\U00018d80-\U00018df2\U0001e6c0-\U0001e6ff\U0002b73a-\U0002b73f\U0002cea2-\U0002cead\U000323b0-\U00033479]"
)
LONGEST = 4_000_000  # maximum characters per text; the time for a word grows faster than the length of the word
CACHE_BYTES = 2**28  # the cache is emptied if the memory of the process has grown by more than this
CACHE_LEAST = 10_000_000  # keep the cache for at least this many characters; the memory may grow for other reasons


class FastBPE:
    """The encoder of a tokenizer.json. Special tokens in a text are encoded as ordinary text.

    Use one FastBPE per thread (see for_thread), so that each thread has its own cache.

    Raises:
        ValueError: gigatoken does not support this tokenizer.
    """

    _encoder = None  # gigatoken's tokenizer with its cache, created when it is needed

    def __init__(self, spec):
        import gigatoken
        import psutil

        if any(not token["special"] for token in spec.get("added_tokens") or []):
            raise ValueError("gigatoken handles added tokens differently from the tokenizers library")
        if re.search('"(Precompiled|NFK?[CD])"', json.dumps(spec.get("normalizer"))):
            raise ValueError("gigatoken uses another version of Unicode to normalize texts")
        self._json = json.dumps(spec | {"added_tokens": [], "post_processor": None})
        self._memory_in_use = lambda: psutil.Process().memory_info().rss
        self._memory_at_start = self._memory_in_use()
        self._new = gigatoken.Tokenizer.from_json
        self._empty_cache()

    def _empty_cache(self):
        self._encoder, self._characters = None, 0  # free the memory of the old cache before creating a new one
        try:
            self._encoder = self._new(self._json)
        except RuntimeError as error:
            raise ValueError(str(error)) from None

    def for_thread(self):
        """Return a copy with its own cache."""
        own = copy.copy(self)
        # creating an encoder takes 0.1 s, so the first copy takes over the encoder of the original
        own._encoder, own._characters = self.__dict__.pop("_encoder", None), 0
        return own

    def encode_batch(self, texts):
        """Encode texts for which is_safe returns True. Return uint32 arrays of shape (n,). This releases the GIL."""
        if not texts:
            return []
        if self._encoder is None or (self._characters > CACHE_LEAST and self._has_grown()):
            self._empty_cache()
        self._characters += sum(map(len, texts))
        ids = self._encoder.encode_batch(texts, parallel=False).layout  # an awkward.contents.ListOffsetArray
        return np.split(ids.content.data, ids.offsets.data[1:-1])

    def _has_grown(self):
        return self._memory_in_use() - self._memory_at_start > CACHE_BYTES


def is_safe(text):
    """Return whether gigatoken encodes this text in linear time and to the same ids as the tokenizers library."""
    if len(text) > LONGEST:
        return False
    if text.isascii():
        return True
    try:
        data = text.encode()
    except UnicodeEncodeError:  # an unpaired surrogate
        return False
    # the first bytes of NEW_CHARACTERS in UTF-8; few texts contain them, and `in` is much faster than `re`
    may_be_new = b"\xf0" in data or b"\xe0" in data or b"\xea\x9f" in data
    return not (may_be_new and NEW_CHARACTERS.search(text))
