"""Update the model card of a repository on the Hub, and keep what users wrote there.

The text that nanogpt_accel writes is a section between two comments:

    <!-- nanogpt_accel: section 0f1e2d3c4b5a card 5a4b3c2d1e0f; a push replaces this section and keeps other text -->
    <!-- nanogpt_accel: end of section -->

The first comment contains hashes of the section and of the whole card. These show whether users edited the section or
the card.
"""

import hashlib
import re
from typing import NamedTuple

import yaml

_METADATA = re.compile(r"\A\s*---[ \t]*\r?\n(?P<yaml>.*?)^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)
_END = "<!-- nanogpt_accel: end of section -->"
_SECTION = re.compile(
    r"^<!-- nanogpt_accel: section (?P<hash>\w+)(?: card (?P<card_hash>\w+))?;[^\n]*-->\r?\n"
    rf"(?P<body>.*?)^{_END}[ \t]*\r?\n?",
    re.DOTALL | re.MULTILINE,
)
_COMMENT = re.compile(r"^<!-- nanogpt_accel: [^\n]*-->\r?\n?", re.MULTILINE)
_INDEX = re.compile(r"^model-index:.*?(?=^[\w\"']|\Z)", re.DOTALL | re.MULTILINE)


class _Card(NamedTuple):
    """The parts of a model card. Without a section, `hash` is "", and all text is in `before`."""

    metadata: str  # including the lines of three dashes
    before: str
    body: str  # text of the section
    after: str
    hash: str
    card_hash: str | None


def merge_card(current, new):
    """Return (card, note): the model card for a push. note is the reason why the text is not updated, or "".

    - If nobody edited the card on the Hub, the new card replaces it.
    - Otherwise, only the section of nanogpt_accel and the evaluation results in the metadata are replaced.
    - If the section itself was edited, or if its comments were deleted, the text is not changed.
    - A card that nanogpt_accel did not write keeps its text and metadata. The section and missing metadata are added.

    Args:
        current: the card on the Hub; "" if there is none. new: the card of the new model.
    """
    theirs, ours = _parse(current), _parse(new)
    if not ours.hash:
        ours = ours._replace(before="", body=_COMMENT.sub("", ours.before))
    if not current.strip() or theirs.card_hash == _hash(_text(theirs)):
        # if `new` has text of a user around the section, the next push must not replace the whole card
        return _join(ours, is_ours=not (ours.before + ours.after).strip()), ""
    metadata = _merge_metadata(theirs.metadata, ours.metadata, is_first=not theirs.hash)
    merged = theirs._replace(metadata=metadata)
    if theirs.hash and theirs.hash == _hash(theirs.body):
        return _join(merged._replace(body=ours.body)), ""
    if theirs.hash or "nanogpt_accel" in str((_load(theirs.metadata) or {}).get("tags")):
        return metadata + current[len(theirs.metadata) :], "the text that nanogpt_accel wrote was edited"
    return _join(merged._replace(body=ours.body)), ""


def _parse(card):
    match = _METADATA.match(card)
    metadata = match[0] if match else ""
    text = card[len(metadata) :]
    sections = list(_SECTION.finditer(text))
    if len(sections) != 1:
        return _Card(metadata, text, "", "", "", None)
    (found,) = sections
    before, after = text[: found.start()], text[found.end() :]
    return _Card(metadata, before, found["body"], after, found["hash"], found["card_hash"])


def _join(card, is_ours=False):
    """Return the text of a card. is_ours: whether the next push may replace the whole card."""
    before, body = card.before.rstrip() + "\n\n", card.body.strip() + "\n"
    card = card._replace(before=before if before.strip() else "\n", body=body)
    hashes = f"section {_hash(body)}" + (f" card {_hash(_text(card))}" if is_ours else "")
    note = "a push replaces this section and keeps other text"
    return f"{card.metadata}{card.before}<!-- nanogpt_accel: {hashes}; {note} -->\n{body}{_END}\n{card.after}"


def _text(card):
    """Return the text that the hash of a card is computed from."""
    return f"{card.metadata}{card.before}{card.body}{card.after}"


def _hash(text):
    """Return a short hash of a text, independent of line ends and trailing white space."""
    lines = "\n".join(line.rstrip() for line in text.splitlines()).strip()
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()[:12]


# ---- metadata


def _load(metadata):
    """Return the metadata of a card as a dict, or None if it is invalid."""
    try:
        values = yaml.safe_load(_METADATA.match(metadata)["yaml"]) if metadata else None
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: an impossible date
        return None
    return values or {} if isinstance(values, (dict, type(None))) else None


def _merge_metadata(theirs, ours, is_first):
    """Return the metadata `theirs`, updated with the evaluation results in `ours`.

    The lines are edited as text, because loading and dumping them would lose comments and quotes.

    is_first: whether this is the first push. The first push also adds the keys of `ours` that are missing in `theirs`.
    Later pushes do not add keys, because users may have deleted them.
    """
    if not theirs.strip():
        return ours if is_first else theirs
    values, new = _load(theirs), _load(ours)
    if values is None or new is None:
        return theirs
    changes = {key: value for key, value in new.items() if is_first and key not in values}
    if "model-index" in new:
        changes["model-index"] = _merge_results(values.get("model-index"), new["model-index"])
    changes = {key: value for key, value in changes.items() if value != values.get(key)}
    if not changes:
        return theirs
    start, end = _METADATA.match(theirs).span("yaml")
    lines = _INDEX.sub("", theirs[start:end]) if "model-index" in changes else theirs[start:end]
    lines = lines.rstrip() + "\n" + yaml.safe_dump(changes, sort_keys=False, allow_unicode=True)
    merged = theirs[:start] + lines + theirs[end:]
    return merged if _load(merged) == values | changes else theirs


def _merge_results(theirs, ours):
    """Return the model-index `theirs` with the results of `ours`. A result of `ours` replaces that of `theirs` for
    the same task, dataset and metric. If `theirs` is not valid, return it unchanged."""
    if theirs is None:
        return ours
    topic = lambda result: str([result["task"], result["dataset"], [m["type"] for m in result["metrics"]]])  # noqa: E731
    try:
        new = {topic(result): result for model in ours for result in model["results"]}
        (model,) = theirs
        results = [new.pop(topic(result), result) for result in model["results"]]
    except (KeyError, TypeError, ValueError):
        return theirs
    return [{**model, "results": [*results, *new.values()]}]
