"""Tokenizers: GPT-2's BPE, characters, a BPE trained on the corpus, or any tokenizer.json.

Every tokenizer is defined by a tokenizer.json. transformers' AutoTokenizer can load the files that `save` writes, and
does not need our code. Some tokenizers have encoders that are faster than the tokenizers library: characters use a
lookup table, and byte-level BPEs use tiktoken, which returns the same ids more than ten times as fast. The documents of
a corpus are encoded with gigatoken if it supports the tokenizer: see fast_bpe.py.
"""

import copy
import hashlib
import itertools
import json
import os
import re
from contextlib import suppress
from functools import cached_property

import numpy as np

from ..utils.text import data_size, one_line
from .fast_bpe import FastBPE, is_safe

EOT = "<|endoftext|>"  # between documents
# Added to the tokenizer in a model folder if the model has an unused embedding. It is not part of the vocabulary here:
# no text is encoded to it, and it is never sampled. The end-of-text token is not used for padding: collators exclude
# the padding token from the loss, so a fine-tuned model would not learn to end its texts.
PAD = "<|pad|>"
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
# SHA-256 of GPT-2's vocabulary in the order of the ids, one entry per line
GPT2_VOCAB_SHA256 = "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f"
# GPT-2's regular expression for words: tiktoken's r50k_pat_str, but with the first four alternatives in a group. The
# fancy-regex crate matches this group with an automaton, without backtracking, so encoding takes 0.6 times as long.
GPT2_WORDS = r"""(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"""
LONGEST_WORD = 1000  # maximum bytes per word when a BPE is trained
BPE_TEXT_LIMIT = 200_000_000  # maximum characters to train a BPE on; more text needs memory, but changes few merges
MAX_VOCAB_SIZE = 2**24  # more than any tokenizer has; arrays of this length still fit into memory
BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")  # the tokens for single bytes in tokenizers such as Llama 2's
FIRST_BYTE_POINT = 0x10FF00  # Tokenizer.decode adds this to a byte above 0x7F to get a private-use code point
BYTES = re.compile(f"[{chr(FIRST_BYTE_POINT + 0x80)}-{chr(FIRST_BYTE_POINT + 0xFF)}]+")


class EncodingError(ValueError):
    """A text has characters or words that are not in the vocabulary."""


class Tokenizer:
    """A tokenizer defined by a tokenizer.json, with fast encoders.

    Args:
        text: the content of a tokenizer.json.
        config: the content of the tokenizer_config.json in the same folder. eos_token has priority over eos_token_id.

    Attributes:
        kind: "gpt2", "char", "bpe" (another byte-level BPE), or the model type in tokenizer.json, lowercase.
        vocab: {token: id}, including special tokens. If the last token is only used for padding, it is left out.
        eot, eot_id: the token that ends a document, or None if the vocabulary has none.
        pad, pad_id: the padding token and its id. If the token is not in the vocabulary, and all ids below vocab_size
            are used, pad_id is vocab_size. If some are unused, pad_id is None, because the tokenizers library would
            give the padding token one of the unused ids.
        special: the special tokens. If they occur in a text, encode() treats them as plain text.
        special_tokens: how to encode special tokens in a text. "text": as ordinary text; "tokens": as their ids; None:
            as text in a corpus, and as ids in a prompt. tokenizer_config.json stores this as split_special_tokens.
        dtype: np.uint16, or np.uint32 if the vocabulary is larger than 2**16.
    """

    def __init__(self, text, config=None):
        config = config or {}
        names = {key: _token_name(config.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        self.pad = names["pad_token"] or PAD
        parsed = _parse(text)
        is_pad_only = names["pad_token"] not in (None, EOT, names["bos_token"], names["eos_token"], names["unk_token"])
        self.text = _clean(text, parsed.spec, self.pad if is_pad_only else None)
        self._parsed = parsed if self.text == text else _parse(self.text)
        self._backend, self._spec, self.vocab = self._parsed.backend, self._parsed.spec, self._parsed.vocab
        if not self.vocab:
            raise ValueError("the vocabulary is empty")
        self.vocab_size = max(self.vocab.values()) + 1
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(f"the largest id is {self.vocab_size - 1:,}, but the limit is {MAX_VOCAB_SIZE - 1:,}")
        self.eot = names["eos_token"] or _token_of(config.get("eos_token_id"), self.vocab) or EOT
        if self.eot not in self.vocab:
            self.eot = None
        self.eot_id = self.vocab.get(self.eot)
        self.pad_id = self.vocab.get(self.pad, self.vocab_size if len(self.vocab) == self.vocab_size else None)
        self.dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        added = self._spec.get("added_tokens") or []
        self.special = {token["content"] for token in added if token["special"]} | {self.eot} - {None}
        self._added = [token for token in added if not token["special"] and token["content"] != self.eot]
        # save() writes these to tokenizer_config.json, because transformers does not read them from tokenizer.json
        self._settings = {key: name for key, name in names.items() if key != "eos_token" and name in self.vocab}
        if config.get("chat_template"):
            self._settings["chat_template"] = config["chat_template"]
        is_split = config.get("split_special_tokens")
        self.special_tokens = ("text" if is_split else "tokens") if isinstance(is_split, bool) else None
        self.kind = self._find_kind()
        self._original = None  # if this is a copy from for_thread(): the Tokenizer that was copied
        self._has_byte_fallback = '"ByteFallback"' in json.dumps(self._spec.get("decoder"))

    def _find_kind(self):
        model, splitter = self._spec["model"]["type"], (self._spec.get("pre_tokenizer") or {}).get("type")
        if (model, splitter) == ("WordLevel", "Split") and not self._spec.get("normalizer") and not self._added:
            if all(len(token) == 1 or token == self.eot for token in self._spec["model"]["vocab"]):
                return "char"
        if (model, splitter) == ("BPE", "ByteLevel"):
            lines = "\n".join(sorted(self.vocab, key=self.vocab.get))
            return "gpt2" if hashlib.sha256(lines.encode()).hexdigest() == GPT2_VOCAB_SHA256 else "bpe"
        return model.lower()

    @cached_property
    def _table(self):
        """For "char": the id per code point, or -1 if the code point is not in the vocabulary. Otherwise None.

        The last entry, -1, is used for all code points above the largest one in the vocabulary.
        """
        if self.kind != "char":
            return None
        ids = {ord(token): i for token, i in self._spec["model"]["vocab"].items() if len(token) == 1}
        table = np.full(max(ids, default=0) + 2, -1, dtype=np.int32)
        table[list(ids)] = list(ids.values())
        return table

    @cached_property
    def _bpe(self):
        """For a byte-level BPE: a tiktoken Encoding, or None if tiktoken would return other ids than this tokenizer."""
        if self._original is not None:
            return copy.copy(self._original._bpe)  # the copy has its own regular expressions, but the same vocabulary
        if self.kind not in ("gpt2", "bpe"):
            return None
        # tiktoken merges two tokens if the result is in the vocabulary. The tokenizers library merges them only if the
        # pair is in its list of merges. The ids are equal if the merges can build every token from its bytes. This is
        # known to be true for GPT-2.
        tokenize, tokens = self._backend.model.tokenize, self._spec["model"]["vocab"]
        if self.kind == "bpe" and any(len(tokenize(token)) != 1 for token in tokens if token != self.eot):
            return None
        return _tiktoken(self._spec, self.eot)

    @cached_property
    def _fast(self):
        """For a BPE: a FastBPE that returns the same ids as `encode`, or None. Only encode_batch uses it."""
        if self._spec["model"]["type"] != "BPE":
            return None
        try:
            return FastBPE(self._spec)
        except (ImportError, ValueError):  # no gigatoken for this platform, or it does not support this tokenizer
            return None

    def check_fast(self, text):
        """Encode a text with gigatoken and without it. If the ids differ, do not use gigatoken for this tokenizer."""
        if self._fast is not None and is_safe(text):
            (ids,) = self._fast.encode_batch([text])
            if not np.array_equal(ids, self.encode(text)):
                self._fast = None

    @property
    def splits_like_gpt2(self):
        """Whether this is a byte-level BPE that splits a text into words like GPT-2's tokenizer."""
        return self._spec["model"]["type"] == "BPE" and _splits_like_gpt2(self._spec)

    @property
    def is_lossless(self):
        """Whether decoding the ids of a text is known to return the same text."""
        is_gpt2 = self.kind == "gpt2" and self.splits_like_gpt2 and not self._added  # avoids the slow creation of _bpe
        return is_gpt2 or self._table is not None or self._bpe is not None

    @cached_property
    def unk_id(self):
        """The id of unknown characters or words, or None."""
        model = self._spec["model"]
        return model.get("unk_id", self.vocab.get(model.get("unk_token")))

    def for_thread(self):
        """Return a copy for use in one thread.

        If threads share a tokenizer, encoding takes 1.3 times as long. The reason is a lock in regex-automata
        (util::pool). All threads must acquire it, except the thread that used the regular expression first.
        """
        own = copy.copy(self)
        own.__dict__.pop("_bpe", None)
        own._original = self
        if self._fast is not None:
            own._fast = self._fast.for_thread()
        return own

    @classmethod
    def gpt2(cls):
        """Return GPT-2's tokenizer, from the two files that tiktoken downloads and caches."""
        from tiktoken.load import read_file_cached
        from tokenizers import models

        files = {}
        for name, sha256 in GPT2_SHA256.items():
            try:
                files[name] = read_file_cached(GPT2_URL + name, sha256).decode("utf-8")
            except Exception as error:  # errors of requests, a wrong hash, a cache that cannot be written
                problem = type(error).__name__ + (f": {error}" if len(str(error)) < 100 else "")
                raise ValueError(
                    f"tokenizer=gpt2: cannot read {GPT2_URL}{name} ({problem}); run tiktoken.get_encoding('gpt2') on a "
                    "machine with a network, and set TIKTOKEN_CACHE_DIR to a copy of its cache folder"
                ) from None
        vocab = json.loads(files["encoder.json"])
        merges = [tuple(line.split()) for line in files["vocab.bpe"].split("\n")[1:-1]]  # the first line is the version
        return cls(_byte_level_json(models.BPE(vocab, merges), is_gpt2=True))

    @classmethod
    def char(cls, documents, add_eot=None):
        """Return a tokenizer with one id per character of the documents, sorted by code point as in nanoGPT.

        add_eot: whether to add the end-of-text token as the last id. By default, add it if there are several documents.
        """
        characters, count = set(), 0
        for count, text in enumerate(documents, 1):  # noqa: B007 (count is used below)
            characters.update(text)
        if add_eot is None:
            add_eot = count > 1
        return cls(_char_json({character: i for i, character in enumerate(sorted(characters))}, add_eot))

    @classmethod
    def char_from_meta(cls, stoi):
        """Return the tokenizer of a nanoGPT meta.pkl. stoi: {character: id}."""
        is_stoi = isinstance(stoi, dict) and stoi and all(isinstance(s, str) and len(s) == 1 for s in stoi)
        if not is_stoi or sorted(map(repr, stoi.values())) != sorted(map(repr, range(len(stoi)))):
            raise ValueError("meta.pkl: stoi must map each character to a different id from 0 to n - 1")
        return cls(_char_json(stoi, add_eot=False))

    @classmethod
    def train_bpe(cls, documents, vocab_size):
        """Train a byte-level BPE with `vocab_size` tokens, or fewer if the text has too few pairs to merge.

        The training text is all documents, including validation, up to BPE_TEXT_LIMIT characters. The vocabulary
        contains all 256 bytes, so every text can be encoded. The last id is the end-of-text token.
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers import models, pre_tokenizers, trainers

        backend = Backend(models.BPE())
        # without a maximum length, a "word" of a million line ends takes too long
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.FixedLength(LONGEST_WORD)]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        backend.train_from_iterator(_truncate(documents, BPE_TEXT_LIMIT), trainer)
        return cls(_byte_level_json(backend.model))

    @classmethod
    def load(cls, folder, eos_token=None):
        """Load the tokenizer of a folder with a tokenizer.json, with vocab.json and merges.txt, or with a GPT-2 model.

        eos_token: the end-of-text token. By default, it is read from the files of the folder.

        Raises FileNotFoundError if the folder has none of these, and ValueError if a file is damaged.
        """
        path = os.path.join(folder, "tokenizer.json")
        if not os.path.isfile(path):
            files = [os.path.join(folder, name) for name in ("vocab.json", "merges.txt")]
            if all(map(os.path.isfile, files)):
                from tokenizers import models

                try:
                    return cls(_byte_level_json(models.BPE.from_file(*files), is_gpt2=True))
                except Exception as error:  # the library raises bare Exceptions
                    raise ValueError(f"{', '.join(files)}: cannot be read as a GPT-2 tokenizer: {error}") from None
            if _is_gpt2_model(folder):
                return cls.gpt2()
            raise FileNotFoundError(f"{path}: no such file; copy the model's tokenizer to {folder}")
        vocab_size, size = _read_model_config(folder).get("vocab_size"), os.path.getsize(path)
        # Large tokenizers have about 130 bytes per token. Refuse much larger files, because parsing two million tokens
        # would take 10 seconds.
        if isinstance(vocab_size, int) and size > 10_000_000 + 1000 * vocab_size:
            problem = f"{data_size(size)} is too large for the vocab_size={vocab_size:,} of config.json"
            raise ValueError(f"{path}: {problem}; use the tokenizer that the model was trained with")
        config = _read_config(folder, "tokenizer_config.json")
        if eos_token or not config.get("eos_token"):
            config |= {"eos_token": eos_token} if eos_token else _find_eos(folder)
        template_path = os.path.join(folder, "chat_template.jinja")
        if os.path.isfile(template_path):
            try:
                with open(template_path, encoding="utf-8") as file:
                    config["chat_template"] = file.read()
            except ValueError as error:
                raise ValueError(f"{template_path}: not UTF-8 ({one_line(error)}); fix or delete the file") from None
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
            return cls(text, config)
        except ValueError as error:  # raised by json, the UTF-8 decoder or Tokenizer
            raise ValueError(f"{path}: {error}") from None

    def is_same(self, other):
        """Return whether both tokenizers encode every text to the same ids. Settings that do not change the ids are not
        compared, because transformers changes some of them when it saves a tokenizer."""
        return self.kind == other.kind == "gpt2" or self._encoding_rules() == other._encoding_rules()

    def _encoding_rules(self):
        spec = json.loads(self._backend.to_str())  # in the format of the installed version of the library
        added = [token for token in spec["added_tokens"] if not token["special"]]
        return self.vocab, added, spec["normalizer"], spec["pre_tokenizer"], spec["model"]

    @property
    def fingerprint(self):
        """The SHA-256 of the tokenizer.json, independent of formatting, padding and truncation."""
        return self._parsed.fingerprint

    def encode(self, text):
        """Encode a text to ids of self.dtype, shape (n,). Special tokens in the text are treated as ordinary text.

        Raises:
            EncodingError: the text has characters or words that are not in the vocabulary.
        """
        if self._table is not None:
            points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
            ids = self._table[np.minimum(points, len(self._table) - 1)]
            if ids.size and ids.min() < 0:
                raise EncodingError(self._unknown(text))
            return ids.astype(self.dtype)
        if self._bpe is not None:
            try:
                return self._bpe.encode_to_numpy(text, disallowed_special=()).astype(self.dtype)
            except ValueError:  # fancy-regex fails at a million characters of white space
                pass
        try:
            return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=self.dtype)
        except Exception as error:  # the library raises bare Exceptions
            raise EncodingError(self._unknown(text) or f"the tokenizer fails: {one_line(error)}") from None

    def _unknown(self, text):
        """Return a message that lists the characters or words of a text that are not in the vocabulary, or ""."""
        added = sorted((re.escape(token["content"]) for token in self._added), key=len, reverse=True)
        texts = re.split("|".join(added), text) if added else [text]  # the model does not see added tokens
        parts, unknown = set("".join(texts)), []
        if self.kind != "char":
            with suppress(Exception):  # text that is not valid Unicode, or no pre-tokenizer
                split = self._backend.pre_tokenizer.pre_tokenize_str
                parts = {part for text in texts for part, _ in split(text)}
        for part in sorted(parts):
            try:
                self._backend.model.tokenize(part)
            except Exception:  # the library raises bare Exceptions
                unknown.append(f"{part!r} (U+{ord(part):04X})" if len(part) == 1 else repr(part[:40]))
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        return f"the tokenizer has no {', '.join(unknown[:8])}{more}" if unknown else ""

    def _split_special(self, text):
        """Split a text at its special tokens. In the returned list, every second part is a special token."""
        special = sorted(map(re.escape, self.special), key=len, reverse=True)
        return re.split(f"({'|'.join(special)})", text) if special else [text]

    def encode_with_special(self, text):
        """Encode a text to ids, shape (n,). Special tokens in the text become their ids."""
        parts = self._split_special(text)
        return self._join(parts, [self.encode(part) for part in parts[::2]])

    def _join(self, parts, encoded):
        """Return the ids of a text. parts: the result of _split_special. encoded: the ids of each part that is not a
        special token."""
        ids = [np.array([], self.dtype)] * len(parts)
        ids[::2], ids[1::2] = encoded, [[self.vocab[token]] for token in parts[1::2]]
        return np.concatenate(ids).astype(self.dtype)

    def encode_document(self, text):
        """Encode a text of a corpus to ids, shape (n,)."""
        return self.encode_with_special(text) if self.special_tokens == "tokens" else self.encode(text)

    def count_special(self, text):
        """Return (number of special tokens in a text, number of their bytes).

        If special_tokens is not "tokens", <|endoftext|> is counted even if it is not in the vocabulary.
        """
        tokens = self.special if self.special_tokens == "tokens" else self.special | {EOT}
        counts = [(text.count(token), len(token.encode())) for token in tokens]
        return sum(count for count, _ in counts), sum(count * size for count, size in counts)

    def move_cut(self, text, cut):
        """Return the position `cut` in a text. If it is inside a special token, return the end of this token instead.

        Special tokens only matter with special_tokens=tokens. Otherwise, they are ordinary text.
        """
        for token in self.special if self.special_tokens == "tokens" else ():
            start = text.find(token, max(cut - len(token) + 1, 0), cut + len(token) - 1)
            if start >= 0:
                return start + len(token)
        return cut

    def encode_batch(self, texts):
        """Encode a list of documents to a list of integer arrays, which may have a larger dtype than self.dtype.

        This releases the GIL. Use one copy per thread, see for_thread.
        """
        if self.special_tokens != "tokens":
            return self._encode_texts(texts)
        split = [self._split_special(text) for text in texts]
        encoded = iter(self._encode_texts([part for parts in split for part in parts[::2]]))
        return [self._join(parts, [next(encoded) for _ in parts[::2]]) for parts in split]

    def _encode_texts(self, texts):
        """Encode each text to an array of ids. Special tokens in the texts are treated as ordinary text."""
        if self._fast is not None:
            are_safe = [is_safe(text) for text in texts]
            safe = itertools.compress(texts, are_safe)
            encoded = iter(self._fast.encode_batch(list(safe)))
            pairs = zip(texts, are_safe, strict=True)
            return [next(encoded) if ok else self.encode(text) for text, ok in pairs]
        if self._bpe is not None or self._table is not None:
            return [self.encode(text) for text in texts]
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception:  # encode() raises an error that names the unknown characters
            return [self.encode(text) for text in texts]
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def encode_prompt(self, text):
        """Encode a prompt to list[int]. Special tokens become their ids, except if special_tokens is "text"."""
        if self.special_tokens == "text":
            return self.encode(text).tolist()
        if self.eot is None and EOT in text:
            raise ValueError(f"the tokenizer has no {EOT}")
        return self.encode_with_special(text).tolist()

    def check_prompt(self, text, block_size, key):
        """Check a prompt. Return a list of problems, which start with `key`. block_size: maximum tokens, or None."""
        try:
            length = len(self.encode_prompt(text))
        except ValueError as error:
            return [f"{key}={text[:40]!r}: {error}; use another prompt"]
        if length and (block_size is None or length <= block_size):
            return []
        limit = f"1 to block_size={block_size}" if block_size else "1 or more"
        fix = "shorten it" if length else "give at least one token"
        return [f"{key}={text[:40]!r}: {length} tokens, must be {limit}; {fix}"]

    def default_prompt(self):
        """Return a line end as in nanoGPT. If it cannot be encoded, return the first token that can be encoded."""
        texts = ["\n", *(self.decode([token_id]) for token_id in range(min(self.vocab_size, 100)))]
        return next((text for text in texts if not self.check_prompt(text, None, "prompt")), texts[1])

    def token_bytes(self):
        """Return the number of UTF-8 bytes per id, shape (vocab_size,), 0 for special tokens. None if unknown."""
        if self._table is None and self._bpe is None:
            return None
        sizes = np.zeros(self.vocab_size, np.int64)
        for token, i in self.vocab.items():
            if self.kind == "char":
                sizes[i] = len(token.encode()) if len(token) == 1 else 0
            else:
                sizes[i] = 0 if token in self.special else len(token)  # the vocabulary has one character per byte
        return sizes

    def decode(self, ids):
        """Decode ids to text, including special tokens. Bytes of incomplete characters become U+FFFD."""
        ids = [int(i) for i in ids]
        if not self._has_byte_fallback:
            return self._backend.decode(ids, skip_special_tokens=False)
        # If one character is incomplete, the tokenizers library replaces all consecutive bytes by U+FFFD. Therefore,
        # its decoder gets a private-use code point for each byte above 0x7F, and BYTES.sub decodes these bytes.
        tokens = [token for i in ids if (token := self._backend.id_to_token(i)) is not None]
        tokens = [_byte_character(t) if BYTE_TOKEN.fullmatch(t) else t for t in tokens]
        return BYTES.sub(_decode_bytes, self._backend.decoder.decode(tokens))

    def save(self, folder, max_length=None, has_pad=False):
        """Write tokenizer.json and tokenizer_config.json.

        max_length: the model's context in tokens. has_pad: whether the model has an embedding for `pad_id`.
        """
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # exists in transformers 4 and 5
            "clean_up_tokenization_spaces": False,  # True would make decode() drop spaces before commas
            # without this key, transformers 4 also returns token_type_ids, and its GPT-2 adds an embedding for them
            "model_input_names": ["input_ids", "attention_mask"],
        }
        if self.eot:
            config |= {"bos_token": self.eot, "eos_token": self.eot}
        if self.eot and self.kind in ("gpt2", "bpe"):
            # as in OpenAI's tokenizer; a byte-level BPE has no unknown tokens, but ctranslate2 requires this key
            config["unk_token"] = self._spec["model"].get("unk_token") or self.eot
        config |= self._settings
        if self.special_tokens:
            config["split_special_tokens"] = self.special_tokens == "text"
        if max_length:
            config["model_max_length"] = max_length
        text = self.text
        if has_pad:
            config["pad_token"] = self.pad
        if has_pad and self.pad not in self.vocab:
            spec, switches = json.loads(text), ("single_word", "lstrip", "rstrip", "normalized")
            token = {"id": self.pad_id, "content": self.pad, **dict.fromkeys(switches, False), "special": True}
            text = json.dumps(spec | {"added_tokens": [*(spec.get("added_tokens") or []), token]}, ensure_ascii=False)
        files = {"tokenizer.json": text, "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
        for name, text in files.items():
            with open(os.path.join(folder, name), "w", encoding="utf-8", newline="") as file:
                file.write(text)


class _Parsed:
    """The content of a tokenizer.json: the Tokenizer of the tokenizers library, the JSON, and {token: id}."""

    def __init__(self, text, backend=None):
        from tokenizers import Tokenizer as Backend

        try:
            self.backend = backend or Backend.from_str(text)
        except Exception as error:  # the library raises bare Exceptions
            problem = "not a tokenizer.json, or written by a newer version of the tokenizers library"
            raise ValueError(f"{problem}: {one_line(error)}") from None
        self.backend.encode_special_tokens = True  # special tokens in a corpus are plain text
        self.spec, self.vocab = json.loads(text), self.backend.get_vocab(with_added_tokens=True)
        self.spec["model"].setdefault("type", type(self.backend.model).__name__)  # missing in old files

    @cached_property
    def fingerprint(self):
        spec = self.spec | {"truncation": None, "padding": None}
        return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()


_last_parsed = {}  # {text: _Parsed}


def _parse(text, backend=None):
    """Return the _Parsed of a tokenizer.json. backend: the Tokenizer of the tokenizers library, if it exists already.

    The last result is cached. Parsing GPT-2's tokenizer takes 0.15 s, and a new data folder needs the same tokenizer
    twice: when the folder is written and when it is opened.
    """
    parsed = _last_parsed.get(text)
    if parsed is None:
        parsed = _Parsed(text, backend)
        _last_parsed.clear()
        _last_parsed[text] = parsed
    return parsed


def _to_json(backend):
    """Return the tokenizer.json of a Tokenizer of the tokenizers library. Cache this Tokenizer for _parse."""
    text = backend.to_str()
    _parse(text, backend)
    return text


def _clean(text, spec, pad):
    """Return a tokenizer.json without truncation and padding settings. If the last token is `pad`, it is left out.

    spec: the content of the JSON text.
    """
    added, vocab = spec.get("added_tokens") or [], spec["model"]["vocab"]
    used = vocab.values() if isinstance(vocab, dict) else range(len(vocab))  # a Unigram model has a list
    last = max(added, key=lambda token: token["id"], default=None)
    is_pad = last is not None and last["content"] == pad and last["special"] and last["id"] > max(used, default=-1)
    if not (is_pad or spec.get("truncation") or spec.get("padding")):
        return text
    changes = {
        "truncation": None,
        "padding": None,
        "added_tokens": [token for token in added if not (is_pad and token is last)],
    }
    return json.dumps(spec | changes, ensure_ascii=False)


def _token_name(value):
    """Return the string of a token in tokenizer_config.json. value: a string, an object with "content", or None."""
    name = value.get("content") if isinstance(value, dict) else value
    return name if isinstance(name, str) else None


def _byte_character(token):
    """Return the ASCII character of a byte token such as <0x41>, or a private-use character for a byte above 0x7F."""
    byte = int(token[3:5], 16)
    return chr(byte if byte < 0x80 else FIRST_BYTE_POINT + byte)


def _decode_bytes(match):
    """Decode consecutive private-use characters of _byte_character as UTF-8. An incomplete character becomes U+FFFD."""
    return bytes(ord(character) - FIRST_BYTE_POINT for character in match[0]).decode("utf-8", "replace")


def _read_config(folder, name):
    """Return the content of a JSON file, or {} if it does not exist or contains no object."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (ValueError, RecursionError) as error:
        fix = f"fix the file, or delete it if the end-of-text token is {EOT}"
        raise ValueError(f"{path}: not JSON ({one_line(error)}); {fix}") from None
    return config if isinstance(config, dict) else {}


def _find_eos(folder):
    """Return {"eos_token": ...} from special_tokens_map.json, or {"eos_token_id": ...} from generation_config.json."""
    token = _token_name(_read_config(folder, "special_tokens_map.json").get("eos_token"))
    ids = _read_config(folder, "generation_config.json").get("eos_token_id")
    first = ids[0] if isinstance(ids, list) and ids else ids
    return {"eos_token": token} if token else {"eos_token_id": first}


def _token_of(token_id, vocab):
    """Return the token with this id, or None if there is none."""
    return next((token for token, i in vocab.items() if i == token_id), None) if token_id is not None else None


def _read_model_config(folder):
    """Return the config.json of a model folder, or {} if it is missing or corrupted."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _is_gpt2_model(folder):
    """Return whether a folder has a GPT-2 model with 50,257 tokens, which is assumed to use GPT-2's tokenizer."""
    config = _read_model_config(folder)
    return config.get("model_type") == "gpt2" and config.get("vocab_size") == 50257


def _truncate(documents, limit):
    """Yield the documents until they have `limit` characters in total. The last one may be truncated."""
    for text in documents:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return


def _char_json(vocab, add_eot):
    """Return the tokenizer.json of a character tokenizer. vocab: {character: id}."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    # <unk> is not in the vocabulary, so that an unknown character is an error, as in nanoGPT
    backend = Backend(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    if add_eot:
        backend.add_special_tokens([AddedToken(EOT, normalized=False)])
    return _to_json(backend)


def _byte_level_json(model, is_gpt2=False):
    """Return the tokenizer.json of a byte-level BPE, with the end-of-text token as its last id."""
    from tokenizers import AddedToken, decoders, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if is_gpt2:
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens([AddedToken(EOT, normalized=False)])
    return _to_json(backend)


def _splits_like_gpt2(spec):
    """Return whether a BPE splits a text into words like GPT-2's tokenizer. spec: the content of tokenizer.json."""
    splitter = spec["pre_tokenizer"] or {}
    if splitter.get("type") != "ByteLevel" or splitter["add_prefix_space"] or not splitter.get("use_regex", True):
        return False
    return not (spec.get("normalizer") or spec["model"].get("ignore_merges"))


def _tiktoken(spec, eot):
    """Return the byte-level BPE of a tokenizer.json as a tiktoken Encoding, or None if the ids would differ.

    tiktoken first merges the pair whose merged token has the lowest id. The tokenizers library first merges the pair
    that comes first in the list of merges. So both give the same result only if the ids are in the order of that list.
    """
    model = spec["model"]
    if not _splits_like_gpt2(spec):
        return None
    # Special tokens are not used to encode a text, but other added tokens are, and tiktoken does not support these.
    if any(not token["special"] and token["content"] != eot for token in spec.get("added_tokens") or []):
        return None
    # GPT-2 represents a visible byte by its own character, and the other bytes by the characters from U+0100 on
    visible = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    byte_of = {chr(b): b for b in visible}
    byte_of |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in visible)}
    vocab = {token: i for token, i in model["vocab"].items() if token != eot}
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    ids = sorted(vocab.get(c, -1) for c in byte_of)
    ids += [vocab.get(left + right, -1) for left, right in pairs]
    if ids[0] < 0 or ids != sorted(set(ids)) or len(ids) != len(vocab):
        return None
    import tiktoken

    ranks = {bytes([byte_of[c] for c in token]): i for token, i in vocab.items()}
    # Without any special token, tiktoken's search for special tokens stops at every character, and encoding takes 1.4
    # times as long.
    special_tokens = {eot or EOT: max(ranks.values()) + 1}
    return tiktoken.Encoding("byte-level BPE", pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens=special_tokens)
