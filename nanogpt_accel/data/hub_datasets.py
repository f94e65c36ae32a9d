"""A data set of the Hugging Face Hub as a Corpus, streamed and pinned to a commit."""

import functools
import re
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from ..utils.text import file_name, one_line
from .corpus import Corpus
from .readers import arrow_texts, check_column


@dataclass(frozen=True)
class HubSet:
    """A data set on the Hub. splits: ours -> the Hub's; without "val", validation documents are taken from train.
    grouped: how rows make documents, a name of GROUPED, if a row is not a document."""

    id: str
    revision: str
    config: str | None = None
    splits: dict = field(default_factory=lambda: {"train": "train"})
    column: str = "text"
    grouped: str | None = None
    about: str = ""


def hub_corpus(spec, found):
    """Return the Corpus of a HubSet. Nothing is asked of the Hub before the text or the splits are.

    spec: hub:USER/SET, whose splits the Hub is asked for, or the name of a built-in set, which has those of the table.
    """
    is_builtin = not spec.startswith("hub:")
    source = {
        "kind": "hub",
        "name": spec,
        "id": found.id,
        "config": found.config,
        "revision": found.revision,
        "column": found.column,
        "splits": dict(found.splits),
    }

    def pin(commit):
        if re.fullmatch("[0-9a-f]{40}", found.revision or ""):
            return corpus  # the revision is a commit, and a pinned one asks the Hub nothing
        commit = commit or _newest_commit(spec, found)
        return replace(hub_corpus(spec, replace(found, revision=commit)), source=source | {"commit": commit})

    @functools.cache
    def all_splits():
        return found.splits if "val" in found.splits or is_builtin else _find_splits(spec, found)

    def read(split, bad):
        return _read(spec, found, found.splits.get(split) or all_splits()[split], bad)

    short = file_name(spec.removeprefix("hub:"))
    short += f"-{found.config}" if not is_builtin and found.config else ""
    corpus = Corpus(short[:60], source, False, read, lambda: tuple(all_splits()), pin=pin)
    return corpus


def _find_splits(spec, found):
    """Return {ours: the Hub's} with the validation and test splits that the data set has on the Hub."""
    from datasets import get_dataset_split_names

    with _hub_errors(spec, found):
        names = get_dataset_split_names(found.id, found.config, revision=found.revision)
    splits = dict(found.splits)
    for split, candidates in {"val": ("validation", "val", "valid", "dev"), "test": ("test",)}.items():
        if theirs := [name for name in candidates if name in names and name != splits["train"]]:
            splits[split] = theirs[0]
    return splits


def _newest_commit(spec, found):
    """Return the commit that a branch or a tag means now."""
    from huggingface_hub import HfApi

    with _hub_errors(spec, found):
        return HfApi().dataset_info(found.id, revision=found.revision).sha


def _read(spec, found, split, bad):
    """Return an iterator over the documents of a split, by the Hub's name."""
    from datasets import load_dataset

    with _hub_errors(spec, found):
        rows = load_dataset(found.id, found.config, split=split, revision=found.revision, streaming=True)
        columns = rows.column_names or list(next(iter(rows), {}))
        if found.column in columns:
            rows = rows.select_columns([found.column]).with_format("arrow")
    check_column(spec, found.id, found.column, columns)
    texts = _row_texts(spec, found, rows, bad)
    return GROUPED[found.grouped](texts) if found.grouped else texts


def _row_texts(spec, found, rows, bad):
    with _hub_errors(spec, found):
        number = 0
        for table in rows.iter(batch_size=1000):  # as Arrow tables, ten times as fast as row by row
            for text in arrow_texts(table.column(found.column)):
                number += 1
                if isinstance(text, str):
                    yield text
                else:
                    bad(f"corpus={spec}: row {number}: no text in {found.column}")


@contextmanager
def _hub_errors(spec, found):
    """Turn what the Hub's clients raise, errors of five libraries, into one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("corpus="):
            raise
        place = (
            found.id
            + (f" ({found.config})" if found.config else "")
            + (f" at {found.revision}" if found.revision else "")
        )
        raise ValueError(
            f"corpus={spec}: cannot read {place} from the Hugging Face Hub "
            f"({type(error).__name__}: {one_line(error)}): look at its name, dataset_config, "
            "dataset_split, the network, HF_HUB_OFFLINE and HF_ENDPOINT (a gated set wants `hf auth "
            "login`), or give a path as corpus=PATH"
        ) from error


def _articles(rows):
    """Join the lines of WikiText to articles, each from a heading of the first level (` = Title = `) on."""
    lines = []
    for row in rows:
        if re.fullmatch(r" = [^=].*[^=] = \n?| = [^=] = \n?", row) and lines:
            yield "".join(lines)
            lines = []
        lines.append(row)
    yield "".join(lines)


def _sentences(rows, count=1024):
    """Join the sentences of BookCorpus, which are in order but do not show where a book ends, to chunks of so many."""
    lines = []
    for row in rows:
        lines.append(row)
        if len(lines) == count:
            yield "\n".join(lines)
            lines = []
    yield "\n".join(lines)


GROUPED = {"articles": _articles, "sentences": _sentences}
