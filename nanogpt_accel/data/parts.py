"""The parts of a corpus that several workers tokenize. Workers are processes on any number of machines with a shared
disk. See prepare.prepare_parts.

FOLDER/.token_parts has one subfolder for each combination of corpus and settings. A subfolder contains two files per
part. NAME.ids contains the ids of all documents, which are not divided into train and val yet. NAME.npy contains the
sizes of the documents (see encoding._runs) and is written last.
"""

import hashlib
import itertools
import json
import shutil
import time
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import numpy as np

from .. import __version__
from ..utils import locking
from ..utils.files import atomic_path, write_atomically
from ..utils.text import counted
from .token_files import disk_errors, lock_subfolder
from .tokenizer import Tokenizer

PARTS, FACTS = ".token_parts", "facts.json"


class Parts:
    """The parts of a corpus in a data folder. facts: the result of dataset.facts_of."""

    def __init__(self, folder, corpus, facts):
        # include the version of this package, because another version may divide the corpus differently
        self._corpus, self._facts = corpus, json.dumps(facts | {"version": __version__}, sort_keys=True)
        self.folder = Path(folder) / PARTS / hashlib.sha256(self._facts.encode()).hexdigest()[:16]

    @cached_property
    def all(self):
        """All parts, in order: [(split, number in the split), ...]."""
        splits = self._corpus.own_splits()
        return [(split, number) for split in splits for number in range(len(self._corpus.parts(split)))]

    @property
    def is_set_up(self):
        """Whether a worker has called set_up."""
        return (self.folder / FACTS).is_file()

    def set_up(self, tokenizer):
        """Create the folder. tokenizer: the Tokenizer if it was made from the corpus, otherwise None."""
        if self.folder.is_symlink():
            raise ValueError(f"{self.folder}: is a link; delete the link, or set data_dir to another folder")
        with disk_errors(self.folder.parents[1]):
            self.folder.mkdir(exist_ok=True)
            if tokenizer:
                tokenizer.save(self.folder)
            write_atomically(self.folder / FACTS, self._facts)

    def load_tokenizer(self):
        return Tokenizer.load(self.folder)

    def missing(self):
        """Return the incomplete parts, in the format of `all`."""
        complete = {path.stem for path in self.folder.glob("*.npy")}
        return [part for part in self.all if _name(part) not in complete]

    def describe_missing(self, workers):
        """Return text that lists the workers with incomplete parts: `worker 2 (3 parts, not running)`."""
        missing, texts = set(self.missing()), []
        for worker in range(workers):
            if count := len(missing.intersection(self.all[worker::workers])):
                process = locking.find_holder(*self._lock_files(worker, workers))
                texts.append(f"worker {worker} ({counted(count, 'part')}, {process or 'not running'})")
        return ", ".join(texts)

    @contextmanager
    def lock(self, worker, workers):
        """Lock the parts of a worker. Raise ValueError if another process is running as the same worker."""
        try:
            lock = locking.acquire(*self._lock_files(worker, workers))
        except BlockingIOError as error:
            problem = f"worker={worker}: {error} is already running as this worker"
            raise ValueError(f"{problem}; start each worker once, with numbers from 0 to {workers - 1}") from None
        try:
            yield
        finally:
            lock.release()

    def _lock_files(self, worker, workers):
        name = f"worker-{worker}-of-{workers}"
        return self.folder / f"{name}.lock", self.folder / f"{name}.json"

    def write(self, parts, chunks):
        """Write the files of `parts`. chunks: the result of encoding.tokenize, with parts instead of splits."""
        groups = itertools.groupby(itertools.chain.from_iterable(chunks), key=lambda run: run[0])
        found, runs = next(groups, (None, ()))
        with disk_errors(self.folder.parents[1]):
            for part in parts:
                is_found = part == found  # otherwise, the part has no documents
                self._write(part, runs if is_found else ())
                if is_found:
                    found, runs = next(groups, (None, ()))

    def _write(self, part, runs):
        all_sizes = [np.empty((0, 4), np.int64)]
        with atomic_path(self._path(part, ".ids")) as temporary, open(temporary, "wb") as file:
            for _, ids, sizes in runs:
                file.write(ids)
                all_sizes.append(sizes)
        with atomic_path(self._path(part, ".npy")) as temporary, open(temporary, "wb") as file:
            np.save(file, np.concatenate(all_sizes))

    def documents(self, split, done, dtype):
        """Yield (ids, sizes) of each document of a split, except for the first `done` documents.

        Raises:
            ValueError: a part is damaged.
        """
        for part in self.all:
            sizes = np.load(self._path(part, ".npy")) if part[0] == split else ()
            skipped = min(done, len(sizes))
            done -= skipped
            if skipped == len(sizes):
                continue
            path, ends = self._path(part, ".ids"), sizes[:, 0].cumsum()
            if path.stat().st_size != ends[-1] * np.dtype(dtype).itemsize:
                raise ValueError(f"{path}: was changed; delete {self.folder}, and start all workers again")
            ids = np.asarray(np.memmap(path, dtype, "r"))  # slices of a memmap object are slow
            for end, size in zip(ends[skipped:].tolist(), sizes[skipped:], strict=True):
                yield ids[end - int(size[0]) : end], size

    def _path(self, part, suffix):
        return self.folder / (_name(part) + suffix)


def _name(part):
    split, number = part
    return f"{split}-{number:05d}"


@contextmanager
def locked(folder, report):
    """Lock the parts of a data folder while they are set up. If another worker is setting them up, wait."""
    tries = 0
    while True:
        try:
            lock = lock_subfolder(folder, PARTS)[1]
            break
        except BlockingIOError as error:
            tries += 1
            if tries == 3:
                report(f"{error}; waiting")
            time.sleep(1)
    try:
        yield
    finally:
        lock.release()


def earlier_facts(folder):
    """Return the facts (see Parts) of all subfolders of .token_parts in a data folder, as a list."""
    found = []
    for path in Path(folder).glob(f"{PARTS}/*/{FACTS}"):
        with suppress(OSError, ValueError, TypeError):
            found.append(dict(json.loads(path.read_text(encoding="utf-8"))))
    return found


def delete_parts(folder):
    shutil.rmtree(Path(folder) / PARTS, ignore_errors=True)  # does not follow a link
