"""A corpus: documents or token ids, read when they are asked for."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Corpus:
    """Text to learn from.

    name: short and fit for a file name. source: plain values that identify the content, for the manifest.
    is_single: true if it is one text, to be cut in two; else it is documents, each of which goes to one split.
    read: (split, bad) -> documents; None if the corpus is token ids. splits: those that the corpus itself has, or a
        function that asks for them.
    bytes: about the size of the text, None if unknown.
    pin: of a Hub data set: commit, None for the newest -> the same Corpus read at it; its source names the commit,
        unless its revision is one.
    first: of files: bad -> the first document of each file that contains many, and of the very first file.
    left_out: of a folder: {suffix: number of files that are not read}.
    ids: of token files, which have one sequence and no text: (dtype, vocab_size, start) -> what read_ids returns.
    """

    name: str
    source: dict
    is_single: bool
    read: Callable | None
    splits: tuple | Callable = ("train",)
    bytes: int | None = None
    pin: Callable | None = None
    first: Callable | None = None
    left_out: dict = field(default_factory=dict)
    ids: Callable | None = None

    def own_splits(self):
        """Return the splits that the corpus itself has, "train" first. May ask the Hub for those of a data set."""
        return self.splits() if callable(self.splits) else self.splits

    def look(self, bad=None):
        """Raise ValueError if a file lacks the column or cannot be opened, before anything slow starts; bad: as of
        documents()."""
        for _ in self.first(bad or refuse) if self.first else ():
            pass

    def documents(self, split="train", bad=None):
        """Yield the documents that are not empty, each as one str; may be called again.

        bad: called with a line for each document that cannot be read, which is then left out; None: it is an error.

        Raises:
            ValueError: text that is not UTF-8, cannot be read or fetched, or no text at all.
        """
        empty, left_out = True, []

        def note(problem):
            if not left_out:
                left_out.append(problem)
            bad(problem)

        for text in self.read(split, note if bad else refuse):
            if text:
                empty = False
                yield text
        if empty:
            reason = f" but what cannot be read (first: {left_out[0]})" if left_out else ""
            raise ValueError(f"corpus={self.source['name']}: there is no text in it{reason}: give another path")


def refuse(problem):
    """Raise ValueError for a document that cannot be read."""
    raise ValueError(f"{problem}: mend it, or go on without it by skip_bad_documents=true")


def where(spec, path):
    """Return how a message about a file of the corpus `spec` starts."""
    return f"corpus={spec}" + (f": {path}" if path != os.path.expanduser(spec) else "")
