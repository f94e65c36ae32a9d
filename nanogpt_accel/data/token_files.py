"""Token files in nanoGPT's form, train.bin and val.bin: read by the row, written so that interruptions cost little.

    with Writer(folder, np.uint16) as writer:
        writer.write("train", ids, len(raw_bytes))
        writer.finish({"corpus": ...}, save_tokenizer)
    x = TokenFile([folder / "train.bin"], "uint16").rows([0, 7], 256)

A split of more than `shard_tokens` has several files, train-00000.bin and so on, that are read as one.
"""

import hashlib
import itertools
import json
import os
import shutil
import time
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from ..utils import locking
from ..utils.files import flush_file, sha256, write_atomically

VERSION = 2  # of manifest.json; 1 had one file for each split, and no list of them
SPLITS = ("train", "val")
FILES = ("train.bin", "val.bin", "tokenizer.json", "manifest.json")
SHARD_TOKENS = 100_000_000  # tokens per file: 200 MB, the most work that a crash can cost
COMMIT_SECONDS = 20  # between two points from which a killed preparation can continue; the first comes after a tenth
LOCK_FILES = ("lock", "holder.json")  # in .partial
AGAIN = "delete the folder and prepare it again"


class TokenFile:
    """One sequence of token ids in a file, or in several that follow each other, read by the row.

    Args:
        paths: the file, or a list of files in order. dtype: of the ids, "uint16" or "uint32".
    """

    def __init__(self, paths, dtype):
        self.paths = [Path(path) for path in (paths if isinstance(paths, (list, tuple)) else [paths])]
        self.dtype = np.dtype(dtype)
        lengths = [os.stat(path).st_size // self.dtype.itemsize for path in self.paths]
        self._ends = list(itertools.accumulate(lengths))  # index of the first token after each file

    def __len__(self):
        return self._ends[-1]

    def rows(self, starts, length):
        """Return the ids at starts[i] ... starts[i] + length - 1, as int64 of shape (len(starts), length).

        Raises:
            OSError: a file is gone, or has become shorter.
        """
        starts = np.asarray(starts, dtype=np.int64)
        ids = np.empty((len(starts), length), dtype=self.dtype)
        assert not len(starts) or (0 <= starts.min() and starts.max() + length <= len(self)), (
            f"a row beyond {self.paths[-1]}"
        )
        # plain reads, not a memory map: that takes three times as long for short rows and, kept open, counts all the
        # pages it has read as resident. Files are opened anew, for hundreds of them are more than may stay open
        with ExitStack() as stack:
            files = {}
            for row, start in zip(ids, starts.tolist(), strict=True):
                done = 0
                while done < length:  # a row may begin in one file and end in another
                    at = start + done
                    i = bisect_right(self._ends, at)
                    if i not in files:
                        files[i] = stack.enter_context(open(self.paths[i], "rb", buffering=0))
                    piece = row[done : done + self._ends[i] - at]
                    files[i].seek((at - (self._ends[i - 1] if i else 0)) * self.dtype.itemsize)
                    if files[i].readinto(piece) != piece.nbytes:
                        raise OSError(f"{self.paths[i]}: has become shorter since it was opened: {AGAIN}")
                    done += len(piece)
        return ids.astype(np.int64)


class TokenArray:
    """Token ids in memory, (n,), read like a TokenFile."""

    def __init__(self, ids):
        self._ids = ids

    def __len__(self):
        return len(self._ids)

    def rows(self, starts, length):
        """Return the ids at starts[i] ... starts[i] + length - 1, as int64 of shape (len(starts), length)."""
        return np.stack([self._ids[start : start + length] for start in starts]).astype(np.int64)


class Writer:
    """Writes a data folder as the tokens come, hidden until it is complete, and continues where an interrupted attempt
    stopped.

    The files grow in FOLDER/.partial, on the same disk whatever is mounted where. finish() moves them to their
    places, the manifest last. What was committed stays for the next attempt; if nothing was, leaving the `with`
    block without finish() removes all of it. Ctrl-C and sys.exit() commit all up to the last commit().

    Args:
        folder: the data folder. dtype: np.uint16 or np.uint32.
        facts: plain values that decide the tokens. An earlier attempt with others is thrown away.
        shard_tokens: a file that has so many is closed, and the next one started.

    Attributes:
        position: what the last commit() of an earlier attempt was given, 0 without one.
        is_finished: an earlier attempt had only the moves left to do; they are done, and so is all.

    Raises:
        ValueError: the folder holds such files already. OSError: it cannot be written.
        BlockingIOError: another process prepares it.
    """

    def __init__(self, folder, dtype, facts=None, shard_tokens=SHARD_TOKENS):
        self.folder, self.dtype, self.shard_tokens = Path(folder), np.dtype(dtype), shard_tokens
        self.partial = self.folder / ".partial"
        self._facts = json.loads(json.dumps([facts or {}, self.dtype.name, shard_tokens]))
        refuse_to_overwrite(folder)
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = locking.acquire(*(self.partial / name for name in LOCK_FILES))
        except BlockingIOError as error:
            raise BlockingIOError(f"data_dir={folder}: {error} prepares it") from None
        except OSError as error:
            raise OSError(
                f"data_dir={folder}: cannot be written ({error.strerror}): set data_dir to a folder that can"
            ) from None
        self._progress = None  # what the last commit() was given and how much was written then
        self._open = {}  # split -> the file that grows
        self._committed_at = time.monotonic()
        try:
            with _naming(self.folder):
                self._continue()
        except BaseException:
            self._lock.release()
            raise

    def _continue(self):
        """Continue with what an earlier attempt committed, or start anew."""
        try:
            progress = json.loads((self.partial / "progress.json").read_text(encoding="utf-8"))
            self.position, self.counts, self.files = (progress[key] for key in ("position", "counts", "files"))
            is_usable = progress["facts"] == self._facts
            self.is_finished = is_usable and (self.partial / "manifest.json").exists()
            sizes = {
                file["name"]: file["tokens"] * self.dtype.itemsize for files in self.files.values() for file in files
            }
            is_usable = is_usable and (
                self.is_finished or all((self.partial / name).stat().st_size >= size for name, size in sizes.items())
            )
        except (OSError, ValueError, KeyError, TypeError):
            is_usable = self.is_finished = False
        self._has_committed = is_usable
        if self.is_finished:
            return self._publish()
        if not is_usable:
            refuse_to_overwrite(self.folder, moves=False)
            self.position, self.counts, self.files, sizes = 0, {}, {}, {}
        for path in self.partial.iterdir():
            if path.name in sizes:
                os.truncate(path, sizes[path.name])  # what came after the commit is made again
            elif path.name not in LOCK_FILES and not (is_usable and path.name == "progress.json"):
                path.unlink()

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        is_told_to_stop = kind is not None and issubclass(kind, (KeyboardInterrupt, SystemExit))
        if is_told_to_stop and self._progress and not self.is_finished:
            with suppress(OSError):  # an earlier commit holds then
                self._commit()
        for file in self._open.values():
            with suppress(OSError):  # a full disk is reported by the write that failed
                file.close()
        if not self.is_finished and not self._has_committed:
            shutil.rmtree(self.partial, ignore_errors=True)
        self._lock.release()
        for folder in (self.partial, self.folder):  # (under Windows what is locked is still there)
            with suppress(OSError):  # goes only where it is empty
                folder.rmdir()

    def discard(self):
        """Throw away what was committed: the next attempt begins anew."""
        self._has_committed, self._progress = False, None

    def write(self, split, ids, n_bytes, documents=1):
        """Append ids, (n,) whole numbers, to a split. n_bytes: the size of their text as UTF-8; None: not known."""
        files = self.files.setdefault(split, [])
        with _naming(self.folder):
            if not files or files[-1]["tokens"] >= self.shard_tokens:
                self._close(split)
                files.append({"name": f"{split}-{len(files):05d}.bin", "tokens": 0})
            if split not in self._open:
                self._open[split] = open(self.partial / files[-1]["name"], "ab")  # noqa: SIM115 (grows on)
            self._open[split].write(np.ascontiguousarray(ids, dtype=self.dtype))
        files[-1]["tokens"] += len(ids)
        counts = self.counts.setdefault(split, {"tokens": 0, "bytes": 0, "documents": 0})
        counts["tokens"] += len(ids)
        counts["bytes"] = None if n_bytes is None else counts["bytes"] + n_bytes
        counts["documents"] += documents

    def commit(self, position):
        """Say that all up to `position`, a plain value, is written; now and then this is made to last."""
        self._note_progress(position)
        if time.monotonic() - self._committed_at >= COMMIT_SECONDS / (1 if self._has_committed else 10):
            with _naming(self.folder):
                self._commit()

    def _note_progress(self, position):
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
        """Make the folder real and return its manifest.

        Args:
            facts: {"corpus": {"name", ...}, "tokenizer": {"asked", "kind", "vocab_size", "fingerprint",
                "eot_id"}, "val_fraction", "split_seed"}: plain values for the manifest.
            save_tokenizer: a function that writes the tokenizer's files into the folder it is given.
        """
        with _naming(self.folder):
            for split in list(self._open):
                self._close(split)
            splits = {}
            for split, files in self.files.items():
                digest = sha256_of_split([self.partial / file["name"] for file in files])
                files = [{**file, "name": self._final_name(file["name"])} for file in files]
                splits[split] = self.counts[split] | {"sha256": digest, "files": files}
            manifest = {"version": VERSION, **facts, "dtype": self.dtype.name, "splits": splits}
            save_tokenizer(self.partial)
            self._note_progress("all")
            self._commit()
            write_atomically(self.partial / "manifest.json", json.dumps(manifest, indent=2) + "\n")
            self._publish()
        return manifest

    def _publish(self):
        """Move the finished files to their places. Done again, it does what is left to do."""
        names = sorted(f.name for f in self.partial.iterdir() if f.name not in (*LOCK_FILES, "progress.json"))
        # the tokenizer first: .bin files without a manifest pass for nanoGPT's, but not beside its file
        for name in sorted(names, key=lambda n: (n == "manifest.json", n.endswith(".bin"), n)):
            os.replace(self.partial / name, self.folder / self._final_name(name))
        self.is_finished = True
        shutil.rmtree(self.partial, ignore_errors=True)

    def _final_name(self, name):
        """Return the name in the data folder: train.bin, as nanoGPT has it, for the only file of a split."""
        split = name.partition("-")[0]
        return f"{split}.bin" if name.endswith("-00000.bin") and len(self.files[split]) == 1 else name


def refuse_to_overwrite(folder, moves=True):
    """Raise ValueError if a Writer would overwrite files of a data folder. moves: accept those that an interrupted one
    had moved there already, with others left to move."""
    folder = Path(folder)
    if moves and (folder / ".partial" / "manifest.json").exists():
        return
    if found := [name for name in FILES if (folder / name).exists()]:
        has_tokens = any(name.endswith(".bin") for name in found)
        raise ValueError(
            f"data_dir={folder}: holds {', '.join(found)} already, and nothing is "
            f"overwritten: take another data_dir{', or delete that folder' * has_tokens}"
        )


@contextmanager
def _naming(folder):
    """Put the data folder's name into the errors of the disk."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"data_dir={folder}: cannot write the token files ({error.strerror or error}), and they "
            "do not count as done: make room, or set data_dir to another disk"
        ) from None


def earlier_attempt(folder):
    """Return (facts, number of documents) of an attempt that was interrupted in this folder; ({}, 0) without one."""
    try:
        progress = json.loads((Path(folder) / ".partial" / "progress.json").read_text(encoding="utf-8"))
        return progress["facts"][0], sum(counts["documents"] for counts in progress["counts"].values())
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return {}, 0


def at_work(folder):
    """Return who prepares this folder now, as `process N on HOST`, or None."""
    try:
        return locking.find_holder(*(Path(folder) / ".partial" / name for name in LOCK_FILES))
    except OSError:  # it has gone meanwhile, or cannot be written, which the Writer will say
        return None


def token_paths(folder, manifest, split):
    """Return the files of a split, in order."""
    return [Path(folder) / file["name"] for file in manifest["splits"][split]["files"]]


def sha256_of_split(paths):
    """Return the SHA-256 of a split: its file's, or that of those of its files in hexadecimal, one after the other."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashlib lets go of Python's lock
        hashes = list(pool.map(sha256, paths))
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
