"""Read the vocabulary of a nanoGPT meta.pkl: characters, words, or only the number of ids.

nanoGPT trains on any ids below vocab_size. The ids may stand for music, chess moves or DNA instead of text. They are
decoded to the tokens in meta.pkl or, if it has no tokens, to numbers.
"""

import pickle
import re

import numpy as np

from ..utils.text import one_line
from .tokenizer import Tokenizer

AGAIN = "prepare it again with nanoGPT's prepare.py"
LARGEST = 1_000_000  # maximum vocabulary size; without a limit, a damaged file could use up the memory


class _NumpyType:
    """Replaces numpy.dtype while a pickle is read."""

    def __init__(self, code, *_):
        self.code = code

    def __setstate__(self, state):  # (version, byte order, ...)
        if not re.fullmatch(r"[<>|]", state[1]) or not re.fullmatch(r"[biuU]\d+", self.code):
            raise ValueError(f"contains a numpy value of type {self.code}")
        self.type = np.dtype(state[1] + self.code)


def _numpy_scalar(kind, raw):
    """Return the Python value of a numpy scalar in a pickle, such as a vocab_size computed as `ids.max() + 1`."""
    return np.frombuffer(raw, kind.type)[0].item()


class _PlainUnpickler(pickle.Unpickler):
    """Reads only dicts, lists, tuples, strings and numbers. Never imports a class or function."""

    def find_class(self, module, name):
        if (module, name) == ("numpy", "dtype"):
            return _NumpyType
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "scalar":
            return _numpy_scalar
        raise ValueError(f"contains {module}.{name}, but only dicts, lists, tuples, strings and numbers are allowed")


def read_meta(path):
    """Return the vocabulary of a nanoGPT meta.pkl. No code in the pickle is executed.

    Returns:
        {token: id}, from `stoi` or the inverse of `itos`. Tokens that are not strings, such as (pitch, duration),
        become strings. If vocab_size is larger than the number of tokens, each id without a token gets a token such as
        <65>. If meta.pkl has only a vocab_size, this number is returned instead of a dictionary.

    Raises:
        ValueError: the pickle has no vocabulary, contains classes or functions, or the ids are not 0 to n - 1.
    """
    with open(path, "rb") as file:
        try:
            meta = _PlainUnpickler(file).load()
        except OSError:
            raise
        except Exception as error:  # a damaged pickle can raise almost any exception
            problem = f"cannot be read ({type(error).__name__}: {one_line(error)})"
            raise ValueError(f"{path}: {problem}; {AGAIN}") from None
    meta = meta if isinstance(meta, dict) else {}
    stoi, itos, size = (meta.get(key) for key in ("stoi", "itos", "vocab_size"))
    if stoi is None and itos is None and type(size) is int and 1 <= size <= LARGEST:
        return size
    if isinstance(stoi, dict):
        pairs = list(stoi.items())
    elif isinstance(itos, dict):
        pairs = [(token, i) for i, token in itos.items()]
    else:
        pairs = [(token, i) for i, token in enumerate(itos)] if isinstance(itos, (list, tuple)) else []
    if not pairs:
        problem = f"has no stoi (the map from tokens to ids), no itos and no vocab_size from 1 to {LARGEST:,}"
        raise ValueError(f"{path}: {problem}; {AGAIN}")
    vocab = {str(token): i for token, i in pairs}
    if type(size) is int and len(pairs) < size <= LARGEST:
        unused = sorted(set(range(size)) - {i for _, i in pairs if type(i) is int})
        vocab |= {f"<{i}>": i for i in unused}
        pairs += [(f"<{i}>", i) for i in unused]
    # compare repr() of the ids, because they can be of any type, and True == 1
    if len(vocab) < len(pairs) or sorted(map(repr, vocab.values())) != sorted(map(repr, range(len(vocab)))):
        problem = f"stoi must map each token to a different id from 0 to {len(pairs) - 1:,}"
        raise ValueError(f"{path}: {problem}; {AGAIN}")
    return vocab


def vocabulary_facts(meta):
    """Return the "tokenizer" entry of a manifest. meta: the result of read_meta. "stoi" is None if meta is a number."""
    stoi = meta if isinstance(meta, dict) else None
    size = len(stoi) if stoi else meta
    kind = "char" if stoi and _has_characters(stoi) else "wordlevel"
    return {"kind": kind, "vocab_size": size, "eot_id": None, "stoi": stoi}


def tokenizer_from_meta(meta):
    """Return the Tokenizer of a meta.pkl. meta: the result of read_meta, {token: id} or the vocabulary size.

    In a text, there is one space between two tokens. There is none if the vocabulary has a token with a space (" the"),
    or if most of its tokens are single characters (C, N, Cl and Br in SMILES).
    """
    vocab = meta if isinstance(meta, dict) else {str(i): i for i in range(meta)}
    if isinstance(meta, dict) and _has_characters(vocab):
        return Tokenizer.char_from_meta(vocab)
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    # <unk> is not in the vocabulary, so that an unknown word is an error, as in nanoGPT
    backend = Backend(models.WordLevel(vocab, unk_token="<unk>"))
    is_joined = any(" " in token for token in vocab) or 2 * sum(len(token) == 1 for token in vocab) > len(vocab)
    if isinstance(meta, dict) and is_joined:
        longest_first = sorted(filter(None, vocab), key=len, reverse=True)
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), "isolated")
        backend.decoder = decoders.Fuse()
    else:
        # in a Sequence, because Tokenizer would otherwise treat a vocabulary of the ids 0 to 9 as characters
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed")])
    return Tokenizer(backend.to_str())


def _has_characters(vocab):
    return all(len(token) == 1 for token in vocab)
