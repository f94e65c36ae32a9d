"""A small tokenizer.json of each kind, trained on texts in scripts that need several bytes per character."""

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

TEXTS = {
    "Chinese": "你好，世界。今天天气很好，我们去公园散步。",
    "Japanese": "こんにちは、世界。吾輩は猫である。名前はまだ無い。",
    "Arabic": "مرحبا بالعالم، كيف حالك اليوم؟",
    "Hindi": "नमस्ते दुनिया, आप कैसे हैं? यह एक वाक्य है।",
    "emoji": "👩\u200d👩\u200d👧 🇺🇳 👍🏽 ❤️ 😀😀",
    "English": "One day, a little girl went  to the park.",
}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _byte_level():
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return backend, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)


def _byte_fallback():
    """The kind that Llama 2 uses: a BPE of characters, with bytes for all other characters."""
    characters = ["▁", *sorted(set(TEXTS["English"]) - {" "}), "你", "世"]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *BYTES, *characters, "▁a", "▁t"])}
    merges = [("▁", "a"), ("▁", "t")]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend, None


def _unigram_bytes():
    """A Unigram model of SentencePiece with byte_fallback."""
    pieces = [("<unk>", 0.0), *((byte, -20.0) for byte in BYTES), ("▁", -2.0), *((c, -3.0) for c in "aeinotrhlg你。")]
    backend = Backend(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return backend, None


def _unigram():
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend, trainers.UnigramTrainer(
        vocab_size=150, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )


def _words():
    backend = Backend(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend, trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False)


def _word_pieces():
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)


def _suffixes():
    """The kind that GPT-1 uses: a BPE that marks the end of a word."""
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.BPEDecoder()
    return backend, trainers.BpeTrainer(
        vocab_size=250, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )


MAKERS = {
    "byte-level": _byte_level,
    "byte fallback": _byte_fallback,
    "unigram with bytes": _unigram_bytes,
    "unigram": _unigram,
    "words": _words,
    "word pieces": _word_pieces,
    "suffixes": _suffixes,
}


def tokenizer_json(kind, eos="</s>"):
    """Return the tokenizer.json of this kind, with an end-of-text token."""
    backend, trainer = MAKERS[kind]()
    if trainer:
        backend.train_from_iterator(TEXTS.values(), trainer)
    backend.add_special_tokens([AddedToken(eos, normalized=False)])
    return backend.to_str()
