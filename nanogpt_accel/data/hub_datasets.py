"""A corpus from the Hugging Face Hub, streamed and pinned to a commit."""

import functools
import itertools
import re
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from ..utils.text import file_name, one_line
from .corpus import Corpus
from .readers import arrow_column, arrow_columns, arrow_texts, check_column


@dataclass(frozen=True)
class HubSet:
    """A data set on the Hub."""

    id: str
    revision: str
    config: str | None = None
    splits: dict = field(default_factory=lambda: {"train": "train"})  # our name -> name on the Hub
    column: str = "text"
    grouped: str | None = None  # key of GROUPED, if a document consists of several rows


def hub_corpus(spec, hub_set):
    """Return the Corpus of a HubSet. Nothing is requested from the Hub until the text or the splits are needed.

    spec: the corpus setting, which is a built-in name or hub:USER/SET. For hub:USER/SET, the Hub is asked which
    validation and test splits the data set has.
    """
    is_builtin = not spec.startswith("hub:")
    source = {"kind": "hub", "name": spec}
    source |= {key: getattr(hub_set, key) for key in ("id", "config", "revision", "column")}
    source["splits"] = dict(hub_set.splits)

    def pin(commit):
        if re.fullmatch("[0-9a-f]{40}", hub_set.revision or ""):
            return corpus  # the revision is already a commit
        commit = commit or _latest_commit(spec, hub_set)
        return replace(hub_corpus(spec, replace(hub_set, revision=commit)), source=source | {"commit": commit})

    @functools.cache
    def all_splits():
        return hub_set.splits if "val" in hub_set.splits or is_builtin else _find_splits(spec, hub_set)

    def open_split(split):
        return _open(spec, hub_set, hub_set.splits.get(split) or all_splits()[split])

    def read(split, bad):
        texts = _read(spec, hub_set, open_split(split), bad)
        return GROUPED[hub_set.grouped](texts) if hub_set.grouped else texts

    @functools.cache
    def parts(split):
        rows = open_split(split)
        count = rows.num_shards  # files
        return [lambda bad, i=i: _read(spec, hub_set, rows.shard(count, i), bad) for i in range(count)]

    name = file_name(spec.removeprefix("hub:"))
    name += f"-{hub_set.config}" if not is_builtin and hub_set.config else ""
    # if a document consists of several rows, it may continue in the next file, so the files cannot be divided
    divided = None if hub_set.grouped else parts
    corpus = Corpus(name[:60], source, False, read, lambda: tuple(all_splits()), parts=divided, pin=pin)
    return corpus


def _find_splits(spec, hub_set):
    """Return {split: its name on the Hub}. The keys are "train" and, if the data set has them, "val" and "test"."""
    from datasets import get_dataset_split_names

    with _hub_errors(spec, hub_set):
        names = get_dataset_split_names(hub_set.id, hub_set.config, revision=hub_set.revision)
    splits = dict(hub_set.splits)
    for split, candidates in {"val": ("validation", "val", "valid", "dev"), "test": ("test",)}.items():
        if matches := [name for name in candidates if name in names and name != splits["train"]]:
            splits[split] = matches[0]
    return splits


def _latest_commit(spec, hub_set):
    from huggingface_hub import HfApi

    with _hub_errors(spec, hub_set):
        return HfApi().dataset_info(hub_set.id, revision=hub_set.revision).sha


def _open(spec, hub_set, split):
    """Return the rows of a split as an IterableDataset. split: its name on the Hub."""
    from datasets import load_dataset

    with _hub_errors(spec, hub_set):
        return load_dataset(hub_set.id, hub_set.config, split=split, revision=hub_set.revision, streaming=True)


def _read(spec, hub_set, rows, bad):
    """Yield the texts of an IterableDataset. bad: see Corpus.documents."""
    with _hub_errors(spec, hub_set):
        columns, column = rows.column_names or list(next(iter(rows), {})), hub_set.column
        name = column if column in columns else column.partition(".")[0]  # `content` for the column content.text
        check_column(spec, hub_set.id, name if name in columns else column, columns)
        rows = rows.select_columns([name]).with_format("arrow")
        number = 0
        for table in rows.iter(batch_size=1000):  # ten times as fast as reading single rows
            check_column(spec, hub_set.id, column, arrow_columns(table.schema))
            for text in arrow_texts(arrow_column(table, column)):
                number += 1
                if isinstance(text, str):
                    yield text
                else:
                    bad(f"corpus={spec}: row {number}: no text in column {column}")


@contextmanager
def _hub_errors(spec, hub_set):
    """Convert any error of `datasets` and of the libraries that it uses to a ValueError with a one-line message."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("corpus="):
            raise
        config = f" ({hub_set.config})" if hub_set.config else ""
        revision = f" at {hub_set.revision}" if hub_set.revision else ""
        raise ValueError(
            f"corpus={spec}: cannot read {hub_set.id}{config}{revision} from the Hugging Face Hub "
            f"({type(error).__name__}: {one_line(error)}); check the name, dataset_config, dataset_split, the network, "
            "HF_HUB_OFFLINE and HF_ENDPOINT (a gated set requires `hf auth login`), or set corpus=PATH to a local copy"
        ) from error


def _articles(rows):
    """Join the lines of WikiText into articles. An article starts with a first-level heading (` = Title = `)."""
    lines = []
    for row in rows:
        if re.fullmatch(r" = [^=].*[^=] = \n?| = [^=] = \n?", row) and lines:
            yield "".join(lines)
            lines = []
        lines.append(row)
    yield "".join(lines)


def _sentences(rows):
    """Join every 1024 sentences of BookCorpus into a document, because the data set does not mark where a book ends."""
    rows = iter(rows)
    while lines := list(itertools.islice(rows, 1024)):
        yield "\n".join(lines)


GROUPED = {"articles": _articles, "sentences": _sentences}
