"""Tokenizers: GPT-2's BPE, characters, a BPE trained on the corpus, or any tokenizer.json.

Every tokenizer is defined by its tokenizer.json, so transformers' AutoTokenizer loads what `save` writes without our
code. Two kinds have encoders that are faster than the tokenizers library: characters use a lookup table, and byte-level
BPEs use tiktoken, which returns the same ids more than ten times as fast.
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
GPT2_VOCAB_SHA256 = "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f"
# GPT-2's regular expression for words: tiktoken's r50k_pat_str with the first four alternatives in a group. The
# fancy-regex crate matches the group with an automaton, without backtracking, and takes 0.6 times as long.
GPT2_WORDS = r"""(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"""
LONGEST_WORD = 1000  # maximum bytes per word when a BPE is trained
BPE_TEXT_LIMIT = 200_000_000  # maximum characters to train a BPE on; more would need memory and change few merges


class Tokenizer:
    """A tokenizer defined by a tokenizer.json, with fast encoders.

    Args:
        text: the content of a tokenizer.json.
        eot: the end-of-text token, which ends a document; ignored if it is not in the vocabulary.

    Attributes:
        kind: "gpt2", "char", "bpe" (another byte-level BPE), or the model type in tokenizer.json, lowercase.
        dtype: np.uint16, or np.uint32 if the vocabulary is larger than 2**16.
    """

    def __init__(self, text, eot=EOT):
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_str(text)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"not a tokenizer.json: {one_line(error)}") from None
        self._backend.encode_special_tokens = True  # special tokens in a corpus are plain text
        self._backend.no_truncation()
        self._backend.no_padding()
        self.text = text
        self.vocab = self._backend.get_vocab(with_added_tokens=True)  # token -> id
        self.vocab_size = max(self.vocab.values()) + 1
        self.eot = eot if eot in self.vocab else None
        self.eot_id = self.vocab.get(eot)
        self.dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        self._spec = json.loads(text)
        self.kind = self._find_kind()

    def _find_kind(self):
        model, splitter = self._spec["model"]["type"], (self._spec.get("pre_tokenizer") or {}).get("type")
        if (model, splitter) == ("WordLevel", "Split") and not self._spec.get("normalizer"):
            if all(len(token) == 1 or token == self.eot for token in self.vocab):
                return "char"
        if (model, splitter) == ("BPE", "ByteLevel"):
            lines = "\n".join(sorted(self.vocab, key=self.vocab.get))
            return "gpt2" if hashlib.sha256(lines.encode()).hexdigest() == GPT2_VOCAB_SHA256 else "bpe"
        return model.lower()

    @cached_property
    def _table(self):
        """For "char": the id of each code point, -1 if it has none. All higher code points use the last entry."""
        if self.kind != "char":
            return None
        ids = {ord(token): i for token, i in self.vocab.items() if token != self.eot}
        table = np.full(max(ids, default=0) + 2, -1, dtype=np.int32)
        table[list(ids)] = list(ids.values())
        return table

    @cached_property
    def _bpe(self):
        """For a byte-level BPE: an equivalent tiktoken Encoding, or None if there is none."""
        if self.kind not in ("gpt2", "bpe"):
            return None
        # tiktoken merges any pair that is a token, the tokenizers library only the pairs in its merges. The results are
        # equal if the merges can build every token from its bytes. For GPT-2, the two are known to agree.
        tokenize = self._backend.model.tokenize
        if self.kind == "bpe" and any(len(tokenize(token)) != 1 for token in self.vocab if token != self.eot):
            return None
        return _tiktoken(self._spec, self.eot)

    def for_thread(self):
        """Return a copy for use in one thread. A shared tokenizer took 1.3 times as long, because a Rust regular
        expression takes a lock in all threads except the first that used it (regex-automata, util::pool)."""
        own = copy.copy(self)
        if self._bpe is not None:
            own._bpe = copy.copy(self._bpe)  # has its own regular expressions, but shares the vocabulary
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

        add_eot: add the end-of-text token as the last id, by default if there are several documents.
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
        """Train a byte-level BPE with up to `vocab_size` tokens, or fewer if the text has too few pairs.

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
    def load(cls, folder):
        """Load the tokenizer of a folder with a tokenizer.json, with vocab.json and merges.txt, or with a GPT-2 model.

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
        config, config_path = {}, os.path.join(folder, "tokenizer_config.json")
        if os.path.isfile(config_path):
            try:
                with open(config_path, encoding="utf-8") as file:
                    config = json.load(file)
            except (ValueError, RecursionError) as error:
                fix = f"fix the file, or delete it if the end-of-text token is {EOT}"
                raise ValueError(f"{config_path}: not JSON ({one_line(error)}); {fix}") from None
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
            eot = config.get("eos_token") if isinstance(config, dict) else None
            eot = eot.get("content") if isinstance(eot, dict) else eot
            return cls(text, eot if isinstance(eot, str) else EOT)
        except ValueError as error:  # raised by json, the UTF-8 decoder or Tokenizer
            raise ValueError(f"{path}: {error}") from None

    def is_same(self, other):
        """Return whether both encode every text to the same ids. Copies of GPT-2's may differ in other settings."""
        return self.fingerprint == other.fingerprint or self.kind == other.kind == "gpt2"

    @cached_property
    def fingerprint(self):
        """The SHA-256 of the tokenizer.json, independent of formatting, padding and truncation."""
        spec = self._spec | {"truncation": None, "padding": None}
        return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()

    def encode(self, text):
        """Encode a text to ids of self.dtype, shape (n,). Special tokens in the text are treated as plain text.

        Raises:
            ValueError: the text has characters that are not in the vocabulary.
        """
        if self._table is not None:
            points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
            ids = self._table[np.minimum(points, len(self._table) - 1)]
            if ids.size and ids.min() < 0:
                unknown = [f"{c!r} (U+{ord(c):04X})" for c in sorted(set(text) - set(self.vocab))]
                more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
                raise ValueError(f"the tokenizer has no {', '.join(unknown[:8])}{more}")
            return ids.astype(self.dtype)
        if self._bpe is not None:
            try:
                return self._bpe.encode_to_numpy(text, disallowed_special=()).astype(self.dtype)
            except ValueError:  # fancy-regex fails at a million characters of white space
                pass
        try:
            return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=self.dtype)
        except Exception:  # the library raises bare Exceptions
            parts = {part for part, _ in self._backend.pre_tokenizer.pre_tokenize_str(text)}
            unknown = sorted(map(repr, parts - set(self.vocab)))
            raise ValueError(f"the tokenizer has no {', '.join(unknown[:8])}") from None

    def encode_batch(self, texts):
        """Encode a list of texts. This releases the GIL; each thread needs its own copy from for_thread()."""
        if self._bpe is not None or self._table is not None:
            return [self.encode(text) for text in texts]
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def encode_prompt(self, text):
        """Encode a prompt to list[int]. Unlike in encode(), an end-of-text token in the text becomes a single id."""
        if self.eot is None and EOT in text:
            raise ValueError(f"the tokenizer has no {EOT}")
        ids = []
        for i, part in enumerate(text.split(self.eot) if self.eot else [text]):
            ids += [self.eot_id] * (i > 0) + self.encode(part).tolist()
        return ids

    def check_prompt(self, text, block_size, key):
        """Check a prompt. Return a list of problems, which start with `key`. block_size: maximum tokens, or None."""
        try:
            length = len(self.encode_prompt(text))
        except ValueError as error:
            return [f"{key}={text!r}: {error}; use another prompt"]
        if length and (block_size is None or length <= block_size):
            return []
        limit = f"1 to block_size={block_size}" if block_size else "1 or more"
        fix = "shorten it" if length else "give at least one token"
        return [f"{key}={text[:40]!r}: {length} tokens, must be {limit}; {fix}"]

    def token_bytes(self):
        """Return the number of UTF-8 bytes per id, shape (vocab_size,), 0 for end-of-text. None if unknown."""
        if self._table is None and self._bpe is None:
            return None
        sizes = np.zeros(self.vocab_size, np.int64)
        for token, i in self.vocab.items():  # byte-level BPEs write each byte as one character
            sizes[i] = 0 if token == self.eot else len(token.encode() if self.kind == "char" else token)
        return sizes

    def decode(self, ids):
        """Decode ids to text, including special tokens. Bytes of incomplete characters become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, folder, max_length=None):
        """Write tokenizer.json and tokenizer_config.json. max_length: the model's context in tokens."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # exists in transformers 4 and 5
            "clean_up_tokenization_spaces": False,  # True would make decode() drop spaces before commas
            # without it transformers 4 returns token_type_ids, which its GPT-2 adds to the embedding
            "model_input_names": ["input_ids", "attention_mask"],
        }
        if self.eot:
            config |= {"bos_token": self.eot, "eos_token": self.eot}
        if self.eot and self.kind in ("gpt2", "bpe"):
            config["unk_token"] = self.eot  # as in OpenAI's tokenizer; never needed, but ctranslate2 requires it
        if max_length:
            config["model_max_length"] = max_length
        files = {"tokenizer.json": self.text, "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
        for name, text in files.items():
            with open(os.path.join(folder, name), "w", encoding="utf-8", newline="") as file:
                file.write(text)


def _is_gpt2_model(folder):
    """Return whether a folder has a GPT-2 model with GPT-2's vocabulary size. Its tokenizer is then GPT-2's."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "gpt2" and config.get("vocab_size") == 50257


def _truncate(documents, limit):
    """Yield the documents up to `limit` characters in total."""
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
    return backend.to_str()


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
    return backend.to_str()


def _tiktoken(spec, eot):
    """Return the byte-level BPE of a tokenizer.json as a tiktoken Encoding, or None if the ids would differ.

    tiktoken first merges the pair whose token has the lowest id. The tokenizers library first merges the pair that is
    first in the list of merges. So the ids must be in the order of that list.
    """
    splitter, model = spec["pre_tokenizer"] or {}, spec["model"]
    if splitter.get("type") != "ByteLevel" or splitter["add_prefix_space"] or not splitter.get("use_regex", True):
        return None
    if spec.get("normalizer") or model.get("ignore_merges") or any(a["content"] != eot for a in spec["added_tokens"]):
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
