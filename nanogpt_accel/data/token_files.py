"""Read and write token files in nanoGPT's format: train.bin and val.bin, which store consecutive token ids.

foreign_tokens.py finds the ids in files of other formats.

    with Writer(folder, np.uint16) as writer:
        writer.write("train", ids, len(raw_bytes))
        writer.finish({"corpus": ...}, save_tokenizer)
    x = TokenFile([folder / "train.bin"], "uint16").rows([0, 7], 256)

A split of more than `shard_tokens` tokens has several files, train-00000.bin and so on, which are read as one sequence.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import time
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ..utils import locking
from ..utils.files import delete, flush_file, sha256, write_atomically

VERSION = 2  # of manifest.json; version 1 had one file per split and no list of files
SPLITS = ("train", "val")
FILES = ("train.bin", "val.bin", "tokenizer.json", "manifest.json")
SHARD_TOKENS = 100_000_000  # tokens per file: 200 MB
COMMIT_SECONDS = 20  # between flushes to disk; a crash loses at most this much work. The first flush is after 2 seconds
LOCK_FILES = ("lock", "holder.json")  # in .partial; if the file system does not support flock, also lock.lease
AGAIN = "delete the folder and prepare it again"


class TokenFile:
    """A sequence of token ids, stored in one file or in several consecutive files.

    paths: one path, or a list of paths in order. dtype: an integer type, such as "uint16".
    spans: [(offset in bytes, number of ids), ...], the part of each file to use. By default, all of each file is used.
    """

    def __init__(self, paths, dtype, spans=None):
        self.paths = [Path(path) for path in (paths if isinstance(paths, (list, tuple)) else [paths])]
        self.dtype = np.dtype(dtype)
        self.spans = spans or [(0, os.stat(path).st_size // self.dtype.itemsize) for path in self.paths]
        self._ends = list(itertools.accumulate(length for _, length in self.spans))  # index after the last id of a file

    def __len__(self):
        return self._ends[-1]

    def rows(self, starts, length):
        """Return the ids at starts[i] ... starts[i] + length - 1, as int64 of shape (len(starts), length).

        Raises:
            OSError: a file is missing or was truncated.
        """
        starts = np.asarray(starts, dtype=np.int64)
        ids = np.empty((len(starts), length), dtype=self.dtype)
        is_inside = not len(starts) or (0 <= starts.min() and starts.max() + length <= len(self))
        assert is_inside, f"row out of range: {self.paths[-1]}"
        # No memory map: it takes three times as long for short rows, and all pages that were read count as resident
        # memory. Files are opened in each call, because there can be more files than a process may keep open.
        with ExitStack() as stack:
            files = {}
            for row, start in zip(ids, starts.tolist(), strict=True):
                done = 0
                while done < length:  # a row can continue in the next file
                    position = start + done
                    i = bisect_right(self._ends, position)
                    if i not in files:
                        files[i] = stack.enter_context(open(self.paths[i], "rb", buffering=0))
                    part = row[done : done + self._ends[i] - position]
                    index = position - (self._ends[i - 1] if i else 0)
                    files[i].seek(self.spans[i][0] + index * self.dtype.itemsize)
                    if files[i].readinto(part) != part.nbytes:
                        raise OSError(f"{self.paths[i]}: was truncated after it was opened; {AGAIN}")
                    done += len(part)
        return ids.astype(np.int64)


class TokenArray:
    """Token ids in memory, shape (n,), with the interface of TokenFile."""

    def __init__(self, ids):
        self._ids = ids

    def __len__(self):
        return len(self._ids)

    def rows(self, starts, length):
        return np.stack([self._ids[start : start + length] for start in starts]).astype(np.int64)


class Writer:
    """Writes a data folder, or resumes an interrupted attempt to write it.

    The files are written to FOLDER/.partial. finish() moves them to FOLDER, the manifest last. commit() records a
    position, and every COMMIT_SECONDS it also flushes the files and the position to disk. On Ctrl-C or sys.exit(), the
    last recorded position is flushed too. The next attempt resumes at the position that was last flushed. If the
    `with` block ends without finish(), and nothing was flushed, .partial is deleted.

    Args:
        folder: the data folder.
        dtype: np.uint16 or np.uint32.
        facts: JSON values that determine the tokens. An earlier attempt with different facts is deleted.
        shard_tokens: number of tokens after which another file starts.

    Attributes:
        position: the position at which this attempt resumes, as passed to commit(), or 0 if it starts over.
        is_finished: whether the folder is complete. If an earlier attempt was interrupted in finish(), the constructor
            completes the folder.

    Raises:
        ValueError: the folder already contains token files, or .partial is a link.
        BlockingIOError: another process is preparing the folder.
    """

    def __init__(self, folder, dtype, facts=None, shard_tokens=SHARD_TOKENS):
        self.folder, self.dtype, self.shard_tokens = Path(folder), np.dtype(dtype), shard_tokens
        self._facts = json.loads(json.dumps([facts or {}, self.dtype.name, shard_tokens]))
        refuse_to_overwrite(folder)
        self.partial, self._lock = lock_subfolder(folder, ".partial")
        self._progress = None  # JSON of the state at the last commit() call
        self._open = {}  # split -> open file
        self._hashes = {}  # name of a file that this attempt started -> SHA-256 of what was written to it
        self._committed_at = time.monotonic()
        try:
            with disk_errors(self.folder):
                self._resume()
        except BaseException:
            self._lock.release()
            raise

    def _resume(self):
        """Resume from the last commit of an earlier attempt, or start over."""
        itemsize = self.dtype.itemsize
        try:
            progress = _read_progress(self.folder)
            self.position, self.counts, self.files = (progress[key] for key in ("position", "counts", "files"))
            sizes = {file["name"]: file["tokens"] * itemsize for files in self.files.values() for file in files}
            is_usable = progress["facts"] == self._facts
            self.is_finished = is_usable and (self.partial / "manifest.json").exists()
            if is_usable and not self.is_finished:
                is_usable = all(_own_size(self.partial / name) >= size for name, size in sizes.items())
        except (FileNotFoundError, ValueError):
            is_usable = self.is_finished = False
        self._has_committed = is_usable
        if self.is_finished:
            return self._publish()
        if not is_usable:
            refuse_to_overwrite(self.folder, accept_moved=False)
            self.position, self.counts, self.files, sizes = 0, {}, {}, {}
        for path in self.partial.iterdir():
            if path.name in sizes:
                os.truncate(path, sizes[path.name])  # to the size at the last commit
            elif not path.name.startswith(LOCK_FILES) and not (is_usable and path.name == "progress.json"):
                delete(path)

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        is_interrupted = kind is not None and issubclass(kind, (KeyboardInterrupt, SystemExit))
        if is_interrupted and self._progress and not self.is_finished:
            with suppress(OSError):  # the previous commit remains valid
                self._commit()
        for file in self._open.values():
            with suppress(OSError):  # write() has already reported a full disk
                file.close()
        if not self.is_finished and not self._has_committed:
            shutil.rmtree(self.partial, ignore_errors=True)
        self._lock.release()
        for folder in (self.partial, self.folder):  # again, because Windows cannot delete a file while it is locked
            with suppress(OSError):  # only an empty folder is removed
                folder.rmdir()

    def discard(self):
        """Discard all commits, so that the next attempt starts over."""
        self._has_committed, self._progress = False, None

    def write(self, split, ids, n_bytes, documents=1):
        """Append the ids of documents, shape (n,), to a split. n_bytes: size of the text in UTF-8, None if unknown."""
        files = self.files.setdefault(split, [])
        with disk_errors(self.folder):
            if not files or files[-1]["tokens"] >= self.shard_tokens:
                self._close(split)
                files.append({"name": f"{split}-{len(files):05d}.bin", "tokens": 0})
                self._hashes[files[-1]["name"]] = hashlib.sha256()
            if split not in self._open:
                self._open[split] = open(self.partial / files[-1]["name"], "ab")  # noqa: SIM115 (closed in _close)
            data = np.ascontiguousarray(ids, dtype=self.dtype)
            self._open[split].write(data)
        if files[-1]["name"] in self._hashes:
            self._hashes[files[-1]["name"]].update(data)  # now, because reading a large file again takes long
        files[-1]["tokens"] += len(ids)
        counts = self.counts.setdefault(split, {"tokens": 0, "bytes": 0, "documents": 0})
        counts["tokens"] += len(ids)
        counts["bytes"] = None if n_bytes is None else counts["bytes"] + n_bytes
        counts["documents"] += documents

    def total(self, key, splits=None):
        """Return the sum of "tokens", "bytes" or "documents" over these splits (default: all)."""
        return sum(self.counts[split][key] or 0 for split in splits or self.counts if split in self.counts)

    def commit(self, position):
        """Record that the data up to `position` are written. Every COMMIT_SECONDS, also flush the files to disk."""
        self._record(position)
        if time.monotonic() - self._committed_at >= COMMIT_SECONDS / (1 if self._has_committed else 10):
            with disk_errors(self.folder):
                self._commit()

    def _record(self, position):
        progress = {"facts": self._facts, "position": position, "counts": self.counts, "files": self.files}
        self._progress = json.dumps(progress)

    def _commit(self):
        for file in self._open.values():
            flush_file(file)
        write_atomically(self.partial / "progress.json", self._progress)
        self._has_committed, self._committed_at = True, time.monotonic()

    def _close(self, split):
        if split in self._open:
            flush_file(self._open[split])
            self._open.pop(split).close()

    def finish(self, facts, save_tokenizer):
        """Complete the data folder and return its manifest.

        facts: JSON values for the manifest: {"corpus": {"name", ...}, "tokenizer": {"asked", "kind", "vocab_size",
        "fingerprint", "eot_id"}, "val_fraction", "split_seed"}. If write() was never called, because the token
        files are in another folder, `facts` also has "dtype" and "splits". save_tokenizer: function that writes the
        tokenizer to a folder.
        """
        with disk_errors(self.folder):
            for split in list(self._open):
                self._close(split)
            splits = {}
            for split, files in self.files.items():
                paths = [self.partial / file["name"] for file in files]
                known = [self._hashes.get(path.name) for path in paths]
                hashes = [
                    found.hexdigest() if found else sha256(path) for found, path in zip(known, paths, strict=True)
                ]
                digest = _join_hashes(hashes)
                files = [{**file, "name": self._final_name(file["name"])} for file in files]
                splits[split] = self.counts[split] | {"sha256": digest, "files": files}
            manifest = {"version": VERSION, **facts}
            manifest |= {key: facts.get(key, own) for key, own in (("dtype", self.dtype.name), ("splits", splits))}
            save_tokenizer(self.partial)
            self._record("all")
            self._commit()
            write_atomically(self.partial / "manifest.json", json.dumps(manifest, indent=2) + "\n")
            self._publish()
        return manifest

    def _publish(self):
        """Move the finished files to the data folder. If an earlier call was interrupted, move the remaining files."""
        names = sorted(f.name for f in self.partial.iterdir() if not f.name.startswith((*LOCK_FILES, "progress.json")))
        # the tokenizer first: .bin files with neither a manifest nor tokenizer.json would count as a nanoGPT folder
        for name in sorted(names, key=lambda n: (n == "manifest.json", n.endswith(".bin"), n)):
            os.replace(self.partial / name, self.folder / self._final_name(name))
        self.is_finished = True
        shutil.rmtree(self.partial, ignore_errors=True)

    def _final_name(self, name):
        """Return the final name of a file in .partial. If a split has one file, this is SPLIT.bin, as in nanoGPT."""
        split = name.partition("-")[0]
        return f"{split}.bin" if name.endswith("-00000.bin") and len(self.files.get(split, ())) == 1 else name


def lock_subfolder(folder, name):
    """Create and lock a hidden subfolder of a data folder. Return (path, lock).

    Raises:
        ValueError: the subfolder is a link. Writing to it could change or delete files elsewhere.
        BlockingIOError: another process has the lock.
    """
    path = Path(folder) / name
    if path.is_symlink():
        raise ValueError(f"{path}: is a link; delete the link, or set data_dir to another folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        return path, locking.acquire(*(path / file for file in LOCK_FILES))
    except BlockingIOError as error:
        raise BlockingIOError(f"data_dir={folder}: {error} is preparing this folder") from None
    except OSError as error:
        problem = f"data_dir={folder}: cannot be written ({error.strerror})"
        raise OSError(f"{problem}; set data_dir to a writable folder") from None


def is_split_file(name, split):
    """Return whether a name from manifest.json or progress.json is SPLIT.bin or SPLIT-NUMBER.bin, without a folder."""
    return re.fullmatch(rf"{re.escape(split)}(-\d{{5,}})?\.bin", name) is not None


class _Base(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _File(_Base):
    name: str
    tokens: int = Field(ge=0)


class _Counts(_Base):
    tokens: int = Field(ge=0)
    bytes: int | None = Field(ge=0)
    documents: int = Field(ge=0)


class _Progress(_Base):
    facts: tuple[dict, str, int]
    position: Any
    counts: dict[Literal["train", "val", "test"], _Counts]
    files: dict[Literal["train", "val", "test"], list[_File]]


def _read_progress(folder):
    """Return the content of progress.json in the folder .partial of a data folder.

    Raises:
        OSError, ValueError: the file cannot be read, or has an invalid value.
    """
    text = (Path(folder) / ".partial" / "progress.json").read_text(encoding="utf-8")
    files = _Progress.model_validate_json(text).files
    if not all(is_split_file(file.name, split) for split in files for file in files[split]):
        raise ValueError("files: contains a name that is not SPLIT.bin or SPLIT-NUMBER.bin")
    return json.loads(text)


def _own_size(file):
    """Return the size of a file, or -1 for a symbolic or hard link, because writing would change a file elsewhere."""
    status = os.lstat(file)
    return status.st_size if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1 else -1


def refuse_to_overwrite(folder, accept_moved=True):
    """Raise ValueError if a Writer would overwrite files. accept_moved: accept files that an interrupted finish() has
    already moved to the folder."""
    folder = Path(folder)
    if accept_moved and (folder / ".partial" / "manifest.json").exists():
        return
    if names := [name for name in FILES if (folder / name).exists()]:
        problem = f"data_dir={folder}: already contains {', '.join(names)}, which would be overwritten"
        delete = ", or delete this folder" if any(name.endswith(".bin") for name in names) else ""
        raise ValueError(f"{problem}; set data_dir to another folder{delete}")


@contextmanager
def disk_errors(folder):
    """Add the data folder and the fix to the message of an OSError."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"data_dir={folder}: cannot write the token files ({error.strerror or error}), so the folder is "
            "incomplete; free some disk space, or set data_dir to another disk"
        ) from None


def earlier_attempt(folder):
    """Return (`facts` of the Writer, number of written documents) of an interrupted attempt, or ({}, 0)."""
    try:
        progress = _read_progress(folder)
        return progress["facts"][0], sum(counts["documents"] for counts in progress["counts"].values())
    except (OSError, ValueError):
        return {}, 0


def find_active_process(folder):
    """Return the process that is preparing this folder, as `process N on HOST`, or None."""
    try:
        return locking.find_holder(*(Path(folder) / ".partial" / name for name in LOCK_FILES))
    except OSError:  # .partial was removed in the meantime, or is not writable (the Writer reports this)
        return None


def token_file(folder, manifest, split):
    """Return the TokenFile of a split. For files that are not in `folder`, the manifest contains absolute paths."""
    files = manifest["splits"][split]["files"]
    spans = [(file.get("offset", 0), file["tokens"]) for file in files]
    return TokenFile([Path(folder) / file["name"] for file in files], manifest["dtype"], spans)


def sha256_of_split(tokens, sampled=False):
    """Return the SHA-256 of a TokenFile. If it has several files, this is the hash of their concatenated hex digests.

    sampled: hash only the size, the first MiB and the last MiB of each file. The result starts with "sampled:".
    """

    def hash_one(path, span):
        offset, size = span[0], span[1] * tokens.dtype.itemsize
        if not sampled:
            return sha256(path, offset, size)
        with open(path, "rb") as file:
            file.seek(offset)
            digest = hashlib.sha256(file.read(min(2**20, size)))
            file.seek(offset + max(size - 2**20, 0))
            digest.update(file.read(min(2**20, size)) + str(size).encode())
        return digest.hexdigest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashlib releases the GIL
        hashes = list(pool.map(hash_one, tokens.paths, tokens.spans))
    return f"sampled:{_join_hashes(hashes)}" if sampled else _join_hashes(hashes)


def _join_hashes(hashes):
    """Return the hash of a split. hashes: the hex digest of each of its files."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
