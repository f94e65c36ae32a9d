"""Load the tokenizer of the setting `tokenizer` from a folder or from the Hugging Face Hub."""

import copy
import difflib
import functools
import os
from pathlib import Path

from ..hub.transfer import download_tokenizer, is_model_id
from ..utils.text import one_line
from .readers import file_state
from .tokenizer import Tokenizer

TOKENIZERS = ("gpt2", "char", "bpe")
SLOW_FILES = ("*.model", "vocab.txt", "vocab.json")  # of tokenizers without a tokenizer.json


def hub_id(spec):
    """Return the Hub id in the setting `tokenizer`, or None if the setting is a built-in name or a folder."""
    if spec.startswith("hub:"):
        return spec.removeprefix("hub:")
    is_folder = spec in TOKENIZERS or os.path.isdir(os.path.expanduser(spec))
    return spec if "/" in spec and not is_folder and is_model_id(spec) else None


def load_tokenizer(spec, eos_token=None):
    """Load a tokenizer from a folder or from the Hub.

    Args:
        spec: a folder, hub:USER/NAME or USER/NAME, optionally with @REVISION.
        eos_token: the end-of-text token. By default, it is read from the files of the tokenizer.

    Raises:
        FileNotFoundError: there is no such tokenizer. ValueError: its files cannot be downloaded or read.
    """
    name = hub_id(spec)
    folder = _download(name) if name else os.path.expanduser(spec)
    if not os.path.isdir(folder):
        close = difflib.get_close_matches(spec, TOKENIZERS, n=1)
        problem = "no such tokenizer" + (f" (did you mean {close[0]}?)" if close else "")
        fix = f"use {', '.join(TOKENIZERS)}, a folder with a tokenizer.json, or hub:USER/NAME"
        raise FileNotFoundError(f"tokenizer={spec}: {problem}; {fix}")
    files = tuple((file.name, *file_state(file)) for file in sorted(Path(folder).iterdir()))
    tokenizer = copy.copy(_load(folder, eos_token, files))  # a copy, because callers set special_tokens
    if eos_token not in (None, tokenizer.eot):
        tokens = ", ".join(sorted(tokenizer.special)[:10]) or "none"
        problem = f"tokenizer={spec} has no such token; its special tokens are: {tokens}"
        raise ValueError(f"eos_token={eos_token}: {problem}")
    return tokenizer


@functools.cache  # one request per process
def _download(name):
    try:
        return download_tokenizer(name)
    except ValueError as error:
        raise ValueError(f"tokenizer={error}") from None


@functools.lru_cache(maxsize=2)  # a command loads a tokenizer about ten times, and a large tokenizer.json takes seconds
def _load(folder, eos_token, files):
    """Load a tokenizer. files: names, sizes and modification times; if they change, the cached result is not used."""
    try:
        tokenizer = Tokenizer.load(folder, eos_token)
    except FileNotFoundError:
        if not any(file for pattern in SLOW_FILES for file in Path(folder).glob(pattern)):
            raise
        tokenizer = _convert(folder, eos_token)
    tokenizer.fingerprint  # noqa: B018 (computes the cached value, which the copies then share)
    return tokenizer


def _convert(folder, eos_token):
    """Convert a tokenizer without a tokenizer.json, such as a SentencePiece model, with transformers."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # no warnings, because they repeat the error raised below
    try:
        original = AutoTokenizer.from_pretrained(folder)
        text = original.backend_tokenizer.to_str()
    except Exception as error:  # of many types, for example ImportError for a missing package
        problem = f"has no tokenizer.json, and transformers cannot convert its tokenizer ({one_line(error)})"
        fix = (
            "for a SentencePiece model, run pip install sentencepiece protobuf, or copy a tokenizer.json to the folder"
        )
        raise ValueError(f"tokenizer={folder}: {problem}; {fix}") from None
    config = {key: getattr(original, key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return Tokenizer(text, config | ({"eos_token": eos_token} if eos_token else {}))
