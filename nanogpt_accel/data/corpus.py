"""A corpus of documents or token ids, read lazily."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Corpus:
    """Training data: a single text, many documents, or token ids."""

    name: str  # short, for file names
    source: dict  # JSON values that identify the content, for the manifest
    is_single: bool  # whether the corpus is one text or one sequence of ids, and not a set of documents
    read: Callable | None  # read(split, bad) -> iterator over the documents, see documents(); None for token ids
    splits: tuple | Callable = ("train",)  # the corpus's own splits, or a function that returns them
    parts: Callable | None = None  # parts(split) -> one function per part of the split: bad -> iterator over documents
    bytes: int | None = None  # approximate size of the text, if known
    sizes: list | None = None  # bytes of each training file, in order, if every file is one document
    pin: Callable | None = None  # for a Hub data set: pin(commit, or None for the latest) -> the Corpus at this commit
    first: Callable | None = None  # for files: first(bad) -> iterator over the documents that check_files reads
    skipped: dict = field(default_factory=dict)  # for a folder: {suffix: number of files that are not read}
    notes: tuple = ()  # lines about the choice of files, reported when the corpus is prepared
    ids: Callable | None = None  # for token ids: ids(vocab_size, val_fraction) -> {split: TokenFile}

    def own_splits(self):
        """Return the names of the splits, "train" first. For a Hub data set, this may send a request to the Hub."""
        return self.splits() if callable(self.splits) else self.splits

    def check_files(self, bad=None):
        """Read the first document of some files. Raise ValueError if a file cannot be opened or has no text column.

        bad: see documents().
        """
        for _ in self.first(bad or refuse) if self.first else ():
            pass

    def documents(self, split="train", bad=None, part=None):
        """Yield each non-empty document as a str. Can be called more than once.

        A single text is yielded in chunks, each of which ends at the end of a word; see readers.read_text.

        bad: called with a one-line message for each document that cannot be read; the document is then skipped. If
            `bad` is None, such a document raises ValueError.
        part: index of a part in `parts(split)`. If given, yield only the documents of this part; it may have none.

        Raises:
            ValueError: the corpus cannot be read, downloaded or decoded, or all documents are empty.
        """
        is_empty, problems = True, []

        def skip(problem):
            if not problems:
                problems.append(problem)
            bad(problem)

        handler = skip if bad else refuse
        for text in self.read(split, handler) if part is None else self.parts(split)[part](handler):
            if text:
                is_empty = False
                yield text
        if is_empty and part is None:
            reason = f" that can be read (first error: {problems[0]})" if problems else ""
            where = f"the {split} split contains" if len(self.own_splits()) > 1 else "contains"
            raise ValueError(f"corpus={self.source['name']}: {where} no text{reason}; set `corpus` to another path")


def refuse(problem):
    """Raise ValueError for a document that cannot be read. Used as `bad` if skip_bad_documents is not set."""
    raise ValueError(f"{problem}; fix the data, or set skip_bad_documents=true to skip such documents")


def location(spec, path):
    """Return the prefix of messages about a file: `corpus=SPEC: PATH`, or only `corpus=SPEC` if SPEC is this path."""
    return f"corpus={spec}" + (f": {path}" if path != os.path.expanduser(spec) else "")
