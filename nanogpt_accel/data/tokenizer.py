"""Text to token ids and back: GPT-2's BPE, characters, a BPE trained on the corpus, or any tokenizer.json.

A tokenizer of any kind is its tokenizer.json, so transformers' AutoTokenizer loads what `save` writes without our code.
Two kinds are encoded faster than by the tokenizers library: characters by a table, and a BPE of GPT-2's form by
tiktoken, which gives the same ids more than ten times as fast.
"""

import copy
import hashlib
import json
import os
from functools import cached_property

import numpy as np

from ..utils.text import one_line

EOT = "<|endoftext|>"  # between documents
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
# SHA-256 of GPT-2's vocabulary in the order of the ids, one entry per line
GPT2_SYMBOLS = "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f"
# how GPT-2 splits a text into words, as tiktoken's r50k_pat_str, but with the first four kinds in a group: the
# fancy-regex crate, which backtracks for the look-ahead, leaves that to an automaton and takes 0.6 times as long
GPT2_WORDS = r"""(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"""
LONGEST_WORD = 1000  # bytes per word when a BPE is trained
BPE_TEXT_LIMIT = 200_000_000  # characters a BPE is trained on: more costs memory and changes few merges


class Tokenizer:
    """A tokenizer.json and fast ways through it.

    Args:
        text: the content of a tokenizer.json. eot: the token that ends a document, if it has that one.

    Attributes:
        kind: "gpt2", "char", "bpe" (another byte-level BPE), or the tokenizers library's name of the model.
        vocab_size: number of ids. eot_id: id of the end-of-text token, or None.
        dtype: np.uint16, or np.uint32 where that is too small for the ids.

    Raises:
        ValueError: not a tokenizer.json.
    """

    def __init__(self, text, eot=EOT):
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_str(text)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"not a tokenizer.json: {one_line(error)}") from None
        self._backend.encode_special_tokens = True  # a corpus is plain text, whatever it happens to spell
        self._backend.no_truncation()
        self._backend.no_padding()
        self.text = text
        self.vocab = self._backend.get_vocab(with_added_tokens=True)  # symbol -> id
        self.vocab_size = max(self.vocab.values()) + 1
        self.eot = eot if eot in self.vocab else None
        self.eot_id = self.vocab.get(eot)
        self.dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        self._spec = json.loads(text)
        self.kind = self._kind()

    def _kind(self):
        spec = self._spec
        model, splitter = spec["model"]["type"], (spec.get("pre_tokenizer") or {}).get("type")
        if (model, splitter) == ("WordLevel", "Split") and not spec.get("normalizer"):
            if all(len(symbol) == 1 or symbol == self.eot for symbol in self.vocab):
                return "char"
        if (model, splitter) == ("BPE", "ByteLevel"):
            lines = "\n".join(sorted(self.vocab, key=self.vocab.get))
            return "gpt2" if hashlib.sha256(lines.encode()).hexdigest() == GPT2_SYMBOLS else "bpe"
        return model.lower()

    @cached_property
    def _table(self):
        """For characters: the ids by code point, -1 without one; the last entry is for all code points above."""
        if self.kind != "char":
            return None
        symbols = {ord(s): i for s, i in self.vocab.items() if s != self.eot}
        table = np.full(max(symbols, default=0) + 2, -1, dtype=np.int32)
        table[list(symbols)] = list(symbols.values())
        return table

    @cached_property
    def _bpe(self):
        """For a byte-level BPE: the same as a tiktoken Encoding, if it can be one; made for the first text."""
        if self.kind not in ("gpt2", "bpe"):
            return None
        # tiktoken joins any two that make a symbol, the tokenizers library only what its merges name. That is the same
        # where the merges make every symbol out of its own bytes; GPT-2's two implementations are known to agree
        makes = self._backend.model.tokenize
        if self.kind == "bpe" and any(len(makes(symbol)) != 1 for symbol in self.vocab if symbol != self.eot):
            return None
        return _tiktoken(self._spec, self.eot)

    def for_thread(self):
        """Return the same tokenizer for one thread. A regular expression of Rust's is fast in the thread that used it
        first and takes locks in all others (regex-automata, util::pool): a shared one took 1.3 times as long.
        """
        own = copy.copy(self)
        if self._bpe is not None:
            own._bpe = copy.copy(self._bpe)  # makes its regular expressions anew; the table of symbols is shared
        return own

    @classmethod
    def gpt2(cls):
        """Return GPT-2's own, from the two files that tiktoken caches, with the ids of tiktoken and transformers.

        Raises:
            ValueError: they do not exist and cannot be downloaded.
        """
        from tiktoken.load import read_file_cached
        from tokenizers import models, processors

        files = {}
        for name, sha256 in GPT2_SHA256.items():
            try:
                files[name] = read_file_cached(GPT2_URL + name, sha256).decode("utf-8")
            except Exception as error:  # requests' errors, a wrong hash, a cache that cannot be written
                reason = type(error).__name__ + (f": {error}" if len(str(error)) < 100 else "")
                raise ValueError(
                    f"tokenizer=gpt2: cannot read {GPT2_URL}{name} ({reason}): run "
                    "tiktoken.get_encoding('gpt2') where there is a network, and set "
                    "TIKTOKEN_CACHE_DIR to a copy of the folder that keeps its files"
                ) from None
        vocab = json.loads(files["encoder.json"])
        lines = files["vocab.bpe"].split("\n")[1:-1]  # the first one is a version
        merges = [tuple(line.split()) for line in lines]
        return cls(_byte_level(models.BPE(vocab, merges), processors.ByteLevel(trim_offsets=False)))

    @classmethod
    def char(cls, documents, add_eot=None):
        """Make one id per character that occurs, in nanoGPT's order: sorted by code point.

        add_eot: make the end-of-text token the last id; None: if there are several documents.
        """
        symbols, count = set(), 0
        for count, text in enumerate(documents, 1):  # noqa: B007 (the count is read below)
            symbols.update(text)
        if add_eot is None:
            add_eot = count > 1
        return cls(_char_json({s: i for i, s in enumerate(sorted(symbols))}, add_eot))

    @classmethod
    def char_from_meta(cls, stoi):
        """Return the characters of a nanoGPT meta.pkl: stoi is {character: id}.

        Raises:
            ValueError: stoi is something else.
        """
        if not (
            isinstance(stoi, dict)
            and stoi
            and all(isinstance(s, str) and len(s) == 1 for s in stoi)
            and sorted(map(repr, stoi.values())) == sorted(map(repr, range(len(stoi))))
        ):
            raise ValueError("meta.pkl: its stoi does not map each character to an id of its own, 0 to n - 1")
        return cls(_char_json(stoi, add_eot=False))

    @classmethod
    def train_bpe(cls, documents, vocab_size):
        """Train a byte-level BPE with up to `vocab_size` tokens (fewer if the text has too few pairs).

        It is trained on all the documents, validation too, up to BPE_TEXT_LIMIT characters: 200 million. It always has
        the 256 bytes, so that nothing is ever unknown; the last id is the end-of-text token. The same documents give
        the same tokenizer.
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers import models, pre_tokenizers, trainers

        backend = Backend(models.BPE())
        # (a "word" of a million line ends would take for ever)
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.FixedLength(LONGEST_WORD)]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        backend.train_from_iterator(_capped(documents, BPE_TEXT_LIMIT), trainer)
        return cls(_byte_level(backend.model))

    @classmethod
    def load(cls, folder):
        """Load the tokenizer of a folder with a tokenizer.json, ours or another's, or with GPT-2's older two files.

        Raises:
            FileNotFoundError: no such file. ValueError: the file is not what its name says.
        """
        path = os.path.join(folder, "tokenizer.json")
        files = [os.path.join(folder, name) for name in ("vocab.json", "merges.txt")]
        if not os.path.isfile(path) and all(map(os.path.isfile, files)):
            return cls._from_gpt2_files(*files)
        if not os.path.isfile(path):
            if _is_bare_gpt2(folder):
                return cls.gpt2()
            raise FileNotFoundError(
                f"{path}: no such file, so {folder} holds no tokenizer: put in the one that the model was trained with"
            )
        config, beside = {}, os.path.join(folder, "tokenizer_config.json")
        if os.path.isfile(beside):
            try:
                with open(beside, encoding="utf-8") as file:
                    config = json.load(file)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{beside}: not JSON ({one_line(error)}): mend it, or remove it where the end of text is {EOT}"
                ) from None
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
            eot = config.get("eos_token") if isinstance(config, dict) else None
            eot = eot.get("content") if isinstance(eot, dict) else eot
            return cls(text, eot if isinstance(eot, str) else EOT)
        except ValueError as error:  # of JSON, UTF-8 and our own
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def _from_gpt2_files(cls, vocab, merges):
        from tokenizers import models, processors

        try:
            return cls(_byte_level(models.BPE.from_file(vocab, merges), processors.ByteLevel(trim_offsets=False)))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{vocab}, {merges}: not the two files of GPT-2's BPE: {error}") from None

    def is_same(self, other):
        """Whether both give every text the same ids. (GPT-2's own is published with different settings around it.)"""
        return self.fingerprint == other.fingerprint or self.kind == other.kind == "gpt2"

    @cached_property
    def fingerprint(self):
        """The SHA-256 of the tokenizer.json in a canonical form: layout, padding and truncation do not count."""
        spec = self._spec | {"truncation": None, "padding": None}
        return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()

    def encode(self, text):
        """Return the ids of plain text, (n,) of self.dtype. A special token that the text spells is text like any.

        Raises:
            ValueError: the text has characters that the tokenizer lacks; they are named.
        """
        if self._table is not None:
            points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
            ids = self._table[np.minimum(points, len(self._table) - 1)]
            if ids.size and ids.min() < 0:
                raise ValueError(f"the tokenizer has no {_show(set(text) - set(self.vocab))}")
        elif self._bpe is not None:
            try:
                ids = self._bpe.encode_to_numpy(text, disallowed_special=())
            except ValueError:  # fancy-regex gives up at a million characters of white space
                ids = self._encode_by_library(text)
        else:
            ids = self._encode_by_library(text)
        return ids.astype(self.dtype)

    def _encode_by_library(self, text):
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def symbol_bytes(self):
        """Return the bytes of UTF-8 per id, (vocab_size,), 0 for the end of text; None if a tokenizer is neither of
        characters nor a BPE of GPT-2's form."""
        if self._table is None and self._bpe is None:
            return None
        sizes = np.zeros(self.vocab_size, np.int64)
        for symbol, i in self.vocab.items():  # GPT-2 writes each byte as one character
            sizes[i] = 0 if symbol == self.eot else len(symbol.encode() if self.kind == "char" else symbol)
        return sizes

    def encode_batch(self, texts):
        """Return encode() of each text. Callers may run it in threads, each with a for_thread() of its own: what takes
        the time releases Python's lock."""
        if self._bpe is not None or self._table is not None:
            return [self.encode(text) for text in texts]
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def encode_prompt(self, text):
        """Return the ids of a prompt as list[int]; <|endoftext|>, or what this tokenizer has for it, is one token.

        Raises:
            ValueError: the tokenizer lacks a character of the prompt.
        """
        if self.eot is None and EOT in text:
            raise ValueError(f"the tokenizer has no {EOT}")
        ids = []
        for i, part in enumerate(text.split(self.eot) if self.eot else [text]):
            ids += [self.eot_id] * (i > 0) + self.encode(part).tolist()
        return ids

    def check_prompt(self, text, block_size, key):
        """Return what keeps a model from continuing a prompt, as a list of problems.

        block_size: the most tokens that it takes; None: any number. key: the prompt's name in the message.
        """
        try:
            length = len(self.encode_prompt(text))
        except ValueError as error:
            return [f"{key}={text!r}: {error}: take another prompt"]
        if length and (block_size is None or length <= block_size):
            return []
        limit = f"1 to block_size={block_size}" if block_size else "1 or more"
        return [
            f"{key}={text[:40]!r}: {length} tokens, and it must be {limit}: "
            f"{'shorten it' if length else 'give at least one'}"
        ]

    def decode(self, ids):
        """Return the text of ids; special tokens are shown, and bytes that are no complete character become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, folder, max_length=None):
        """Write tokenizer.json and tokenizer_config.json. max_length: the model's context in tokens."""
        # the class name works in transformers 4 and 5; a "clean-up" would drop spaces before commas in decode
        # and transformers 4 would also give token_type_ids, which its GPT-2 adds to the embedding
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        if self.eot:
            config |= {"bos_token": self.eot, "eos_token": self.eot}
        if self.eot and self.kind in ("gpt2", "bpe"):
            config["unk_token"] = self.eot  # as OpenAI's has, though no byte is unknown; ctranslate2 asks for one
        if max_length:
            config["model_max_length"] = max_length
        files = {"tokenizer.json": self.text, "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
        for name, text in files.items():
            with open(os.path.join(folder, name), "w", encoding="utf-8", newline="") as file:
                file.write(text)


def _is_bare_gpt2(folder):
    """Whether a folder has a GPT-2 model without a tokenizer, which can only be GPT-2's."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "gpt2" and config.get("vocab_size") == 50257


def _show(symbols):
    """Return a few characters as a message names them."""
    names = [f"{s!r} (U+{ord(s):04X})" for s in sorted(symbols)]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _capped(documents, limit):
    """Yield the documents up to `limit` characters in all."""
    for text in documents:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return


def _char_json(vocab, add_eot):
    """Return the tokenizer.json of single characters. vocab: {character: id}."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    # no such symbol as <unk> is in the vocabulary: an unknown character is an error, as in nanoGPT, and never
    # a silent something else
    backend = Backend(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    if add_eot:
        backend.add_special_tokens([AddedToken(EOT, normalized=False)])
    return backend.to_str()


def _byte_level(model, post_processor=None):
    """Return the tokenizer.json of a byte-level BPE as GPT-2 has it, with the end-of-text token last."""
    from tokenizers import AddedToken, decoders, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if post_processor:
        backend.post_processor = post_processor
    backend.add_special_tokens([AddedToken(EOT, normalized=False)])
    return backend.to_str()


def _tiktoken(spec, eot):
    """Return a tokenizer.json's byte-level BPE as a tiktoken Encoding, or None if that would encode otherwise.

    tiktoken joins the pair whose token has the lowest id, the tokenizers library the pair that comes first
    among the merges; so the order of the two has to be one.
    """
    splitter, model = spec["pre_tokenizer"] or {}, spec["model"]
    if splitter.get("type") != "ByteLevel":
        return None
    if splitter["add_prefix_space"] or not splitter.get("use_regex", True) or spec.get("normalizer"):
        return None
    if model.get("ignore_merges") or any(a["content"] != eot for a in spec["added_tokens"]):
        return None
    # GPT-2 writes a byte as a character: itself where that can be seen, else the next one from U+0100 on
    visible = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    byte_of = {chr(b): b for b in visible}
    byte_of |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in visible)}
    symbols = {symbol: i for symbol, i in model["vocab"].items() if symbol != eot}
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    ids = sorted(symbols.get(c, -1) for c in byte_of)
    ids += [symbols.get(left + right, -1) for left, right in pairs]
    if ids[0] < 0 or ids != sorted(set(ids)) or len(ids) != len(symbols):
        return None
    import tiktoken

    ranks = {bytes([byte_of[c] for c in symbol]): i for symbol, i in symbols.items()}
    # some special symbol there must be, though none is ever looked for: without one tiktoken's search for it stops at
    # every character, and all takes 1.4 times as long
    return tiktoken.Encoding(
        "byte-level BPE",
        pat_str=GPT2_WORDS,
        mergeable_ranks=ranks,
        special_tokens={eot or EOT: max(ranks.values()) + 1},
    )
