"""Check whether a text is the same after encoding and decoding."""

import itertools
from collections import Counter

from ..utils.text import counted

SAMPLED_DOCUMENTS = 1000
SAMPLED_CHARACTERS = 1_000_000  # in total


def report_losses(corpus, data, tokenizer, report, bad=None):
    """Encode and decode the first documents of a corpus, and report the characters that are lost.

    Also compare gigatoken's ids for these documents with those of the regular encoder; see Tokenizer.check_fast.

    Raises:
        ValueError: none of the characters are in the vocabulary.
    """
    if corpus.ids or tokenizer.is_lossless:
        return
    n_documents = n_changed = n_characters = 0
    lost, example, is_any_kept = Counter(), None, False
    for text in itertools.islice(corpus.documents(bad=bad), SAMPLED_DOCUMENTS):
        text = text[: SAMPLED_CHARACTERS - n_characters]
        tokenizer.check_fast(text)
        decoded, lost_here = _decode_again(text, tokenizer)
        n_documents, n_characters = n_documents + 1, n_characters + len(text)
        is_any_kept = is_any_kept or decoded == text or bool(decoded.strip())  # ignore spaces: some tokenizers add them
        if decoded != text:
            n_changed += 1
            lost += lost_here
            example = example or _first_difference(text, decoded)
        if n_characters >= SAMPLED_CHARACTERS:
            break
    if not is_any_kept:
        problem = f"none of the characters of corpus={data.corpus} are in the vocabulary"
        raise ValueError(f"tokenizer={data.tokenizer}: {problem}; set tokenizer to gpt2, char or bpe")
    if not n_changed:
        return
    documents = f"encoding and decoding changes {n_changed:,} of the first {counted(n_documents, 'document')}"
    report(f"warning: tokenizer={data.tokenizer}: {documents}: for example, {example[0]!r} becomes {example[1]!r}")
    if lost:
        problem = (
            f"{_describe(lost, n_characters)}; bits per byte will be too low, because the number of bytes includes the "
            "lost characters"
        )
        report(f"warning: tokenizer={data.tokenizer}: {problem}")


def describe_losses(text, tokenizer):
    """Return a message that lists the characters of a text that the tokenizer loses, or "" if it loses none."""
    lost = Counter() if tokenizer.is_lossless else _decode_again(text, tokenizer)[1]
    return _describe(lost, len(text)) if lost else ""


def _decode_again(text, tokenizer):
    """Encode and decode a text. Return (decoded text without unknown tokens, Counter of the lost characters)."""
    ids = tokenizer.encode_document(text)
    decoded = tokenizer.decode(ids if tokenizer.unk_id is None else ids[ids != tokenizer.unk_id])
    return decoded, Counter(text) - Counter(decoded)


def _describe(lost, n_characters):
    shown = ", ".join(f"{character!r} ({count:,})" for character, count in lost.most_common(8))
    more = f" and {len(lost) - 8} more" if len(lost) > 8 else ""
    return f"{lost.total():,} of {counted(n_characters, 'character')} are lost: {shown}{more}"


def _first_difference(text, decoded, length=20):
    """Return a few characters of both texts, starting shortly before the first difference."""
    pairs = enumerate(zip(text, decoded, strict=False))
    start = next((i for i, (a, b) in pairs if a != b), min(len(text), len(decoded)))
    start = max(start - length // 2, 0)
    return text[start : start + length], decoded[start : start + length]
