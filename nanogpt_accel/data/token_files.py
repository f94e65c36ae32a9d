"""Token files on disk in nanoGPT's form, train.bin and val.bin, and a manifest.json that says what they are.

    with Writer(folder, np.uint16) as writer:
        writer.write("train", ids, len(raw_bytes))
        writer.finish({"corpus": ...}, save_tokenizer)
    manifest = read_manifest(folder)
    x = TokenFile(token_paths(folder, manifest, "train"), manifest["dtype"]).rows([0, 7], 256)

A split of more than `shard_tokens` lies in several files, train-00000.bin and so on, that are read as one. A manifest
means complete data: it is the last file to appear. A folder of nanoGPT's own is read as well.
"""

import hashlib
import itertools
import json
import os
import pickle
import platform
import re
import shutil
import time
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

import numpy as np
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

VERSION = 2  # 1 had one file for each split, and no list of them
SPLITS = ("train", "val")
FILES = ("train.bin", "val.bin", "tokenizer.json", "manifest.json")
SHARD_TOKENS = 100_000_000  # tokens of a file: 200 MB, as much work as a crash can cost at most
COMMIT_SECONDS = 20  # between two points that a killed preparation can go on from; the first comes after a tenth
SAMPLED_ABOVE = 2**30  # bytes of a nanoGPT file above which only its head, tail and size are hashed
VERIFIED_BELOW = 2**26  # bytes of token files that are hashed each time they are opened: a fifth of a second
_NOT_MOVED = ("lock", "holder.json", "progress.json")  # files of .partial that are no part of the data
LOOKS, LOOK_TOKENS = 64, 2**18  # places of a split where the ids are looked at, and how many there
_AGAIN = "delete the folder and prepare it again"
_AGAIN_NANOGPT = "make it again with nanoGPT's prepare.py"


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
        """The ids at starts[i] ... starts[i] + length - 1, as int64 of shape (len(starts), length).

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
                        raise OSError(f"{self.paths[i]}: has become shorter since it was opened: {_AGAIN}")
                    done += len(piece)
        return ids.astype(np.int64)


class TokenArray:
    """Token ids in memory, (n,), read as a TokenFile is."""

    def __init__(self, ids):
        self._ids = ids

    def __len__(self):
        return len(self._ids)

    def rows(self, starts, length):
        """The ids at starts[i] ... starts[i] + length - 1, as int64 of shape (len(starts), length)."""
        return np.stack([self._ids[start : start + length] for start in starts]).astype(np.int64)


class Writer:
    """Writes a data folder as the tokens come, out of sight until all of it is there, and goes on where an interrupted
    one stopped.

    The files grow in FOLDER/.partial, on the same disk whatever is mounted where. finish() moves them to their
    places, the manifest last. What was committed stays for the next attempt; where nothing was, leaving the `with`
    block without finish() removes all of it. Ctrl-C and sys.exit() commit all up to the last commit().

    Args:
        folder: the data folder. dtype: np.uint16 or np.uint32.
        facts: plain values that decide the tokens. An attempt that was made of others is thrown away.
        shard_tokens: a file that has so many is closed, and the next one begun.

    Attributes:
        position: what the last commit() of an earlier attempt was given, 0 where there is none.
        is_finished: an earlier attempt had only the moves left to do; they are done, and so is all.

    Raises:
        ValueError: the folder holds such files already. OSError: it cannot be written.
        BlockingIOError: another process is at work in it.
    """

    def __init__(self, folder, dtype, facts=None, shard_tokens=SHARD_TOKENS):
        self.folder, self.dtype, self.shard_tokens = Path(folder), np.dtype(dtype), shard_tokens
        self.partial = self.folder / ".partial"
        self._facts = json.loads(json.dumps([facts or {}, self.dtype.name, shard_tokens]))
        refuse_to_overwrite(folder)
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.partial / "lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            raise BlockingIOError(f"data_dir={folder}: {_holder(self.partial)} prepares it") from None
        except OSError as error:
            raise OSError(
                f"data_dir={folder}: cannot be written ({error.strerror}): set data_dir to a folder that can"
            ) from None
        with suppress(OSError):  # only a help for others
            holder = {"host": platform.node(), "pid": os.getpid()}
            (self.partial / "holder.json").write_text(json.dumps(holder), encoding="utf-8")
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
        """Take up what an earlier attempt committed, or begin anew."""
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
            elif path.name not in ("lock", "holder.json") and not (is_usable and path.name == "progress.json"):
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
        self._progress = json.dumps(
            {"facts": self._facts, "position": position, "counts": self.counts, "files": self.files}
        )
        if time.monotonic() - self._committed_at >= COMMIT_SECONDS / (1 if self._has_committed else 10):
            with _naming(self.folder):
                self._commit()

    def _commit(self):
        for file in self._open.values():
            _flush(file)
        _write_text(self.partial / "progress.json", self._progress)
        self._has_committed, self._committed_at = True, time.monotonic()

    def _close(self, split):
        if split in self._open:
            _flush(self._open[split])
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
                digest = _sha256_of_all([self.partial / file["name"] for file in files])
                files = [{**file, "name": self._final_name(file["name"])} for file in files]
                splits[split] = self.counts[split] | {"sha256": digest, "files": files}
            manifest = {"version": VERSION, **facts, "dtype": self.dtype.name, "splits": splits}
            save_tokenizer(self.partial)
            self._progress = json.dumps(
                {"facts": self._facts, "position": "all", "counts": self.counts, "files": self.files}
            )
            self._commit()
            _write_text(self.partial / "manifest.json", json.dumps(manifest, indent=2) + "\n")
            self._publish()
        return manifest

    def _publish(self):
        """Move the finished files to their places. Done again, it does what is left to do."""
        names = sorted(f.name for f in self.partial.iterdir() if f.name not in _NOT_MOVED)
        # the tokenizer first: .bin files without a manifest pass for nanoGPT's, but not beside its file
        for name in sorted(names, key=lambda n: (n == "manifest.json", n.endswith(".bin"), n)):
            os.replace(self.partial / name, self.folder / self._final_name(name))
        self.is_finished = True
        shutil.rmtree(self.partial, ignore_errors=True)

    def _final_name(self, name):
        """The name that nanoGPT gives it, train.bin, for the only file of a split."""
        split = name.partition("-")[0]
        return f"{split}.bin" if name.endswith("-00000.bin") and len(self.files[split]) == 1 else name


def refuse_to_overwrite(folder, moves=True):
    """Raise ValueError where a Writer would overwrite files of a data folder. moves: let those be that an interrupted
    one had moved there already, with others left to move."""
    folder = Path(folder)
    if moves and (folder / ".partial" / "manifest.json").exists():
        return
    if found := [name for name in FILES if (folder / name).exists()]:
        has_tokens = any(name.endswith(".bin") for name in found)
        raise ValueError(
            f"data_dir={folder}: holds {', '.join(found)} already, and nothing is "
            f"overwritten: take another data_dir{', or delete that folder' * has_tokens}"
        )


def _flush(file):
    file.flush()
    os.fsync(file.fileno())  # or a power cut could keep the manifest and lose the tokens


def _write_text(path, text):
    """Write a file whole or not at all."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(text)
        _flush(file)
    os.replace(f"{path}.tmp", path)


@contextmanager
def _naming(folder):
    """Puts the data folder's name into the errors of the disk."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"data_dir={folder}: cannot write the token files ({error.strerror or error}), and they "
            "do not count as done: make room, or set data_dir to another disk"
        ) from None


def earlier_facts(folder):
    """The facts of an attempt that was interrupted in this folder; {} where there is none."""
    try:
        text = (Path(folder) / ".partial" / "progress.json").read_text(encoding="utf-8")
        return json.loads(text)["facts"][0]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return {}


def earlier_documents(folder):
    """Documents that an interrupted attempt has left in this folder, to go on from."""
    try:
        counts = json.loads((Path(folder) / ".partial" / "progress.json").read_text(encoding="utf-8"))["counts"]
        return sum(count["documents"] for count in counts.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0


def at_work(folder):
    """Who prepares this folder now, as `process N on HOST`; None: nobody."""
    partial = Path(folder) / ".partial"
    if not (partial / "lock").exists():
        return None
    try:
        with FileLock(partial / "lock", timeout=0):
            return None
    except Timeout:
        return _holder(partial)
    except OSError:  # it has gone meanwhile, or cannot be written, which the Writer will say
        return None


def _holder(partial):
    try:
        holder = json.loads((partial / "holder.json").read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def is_data_folder(folder):
    """True where there is a data folder: ours, which has a manifest, or nanoGPT's, which has none."""
    has = {name: (Path(folder) / name).is_file() for name in FILES}
    # .bin files beside a tokenizer.json are ours, amid the moves of finish() or after a crash between them
    return has["manifest.json"] or (has["train.bin"] and has["val.bin"] and not has["tokenizer.json"])


class _Form(BaseModel):
    """A part of manifest.json. More keys than these may stand in it."""

    model_config = ConfigDict(strict=True, extra="allow")


class _File(_Form):
    name: str
    tokens: int = Field(ge=0)


class _Split(_Form):
    tokens: int = Field(ge=0)
    bytes: int | None = Field(ge=0)
    documents: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    files: list[_File] = Field(min_length=1)


class _Corpus(_Form):
    name: str
    splits: dict[str, str] = {}


class _Tokenizer(_Form):
    asked: str
    kind: str
    vocab_size: int = Field(ge=1)
    fingerprint: str
    eot_id: int | None = Field(ge=0)


class _Manifest(_Form):
    corpus: _Corpus
    tokenizer: _Tokenizer
    val_fraction: float = Field(gt=0, lt=1)
    dtype: Literal["uint16", "uint32"]
    splits: dict[Literal["train", "val", "test"], _Split]


def _check_form(manifest):
    """Raise ValueError with the key of the first thing that is not as Writer.finish writes it."""
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(key) for key in first["loc"] if key != "[key]")
        raise ValueError(f"{where}: {first['msg'].replace('Input should', 'must')}" if where else "no object") from None
    if "nanogpt" in manifest:  # stands only in the one that is made in memory
        raise ValueError("nanogpt: no key of this file")
    for split in SPLITS:
        if split not in manifest["splits"]:
            raise ValueError(f"splits.{split}: Field required")
    for split, counts in manifest["splits"].items():
        names = [file["name"] for file in counts["files"]]
        for name in names:
            if not re.fullmatch(rf"{split}(-\d{{5,}})?\.bin", name) or names.count(name) > 1:
                raise ValueError(
                    f"splits.{split}.files: {name!r} is not the name of one of its files, or stands there twice"
                )
        total = sum(file["tokens"] for file in counts["files"])
        if counts["tokens"] != total:
            raise ValueError(f"splits.{split}.tokens: {counts['tokens']:,}, but its files have {total:,}")


def read_manifest(folder):
    """What a data folder holds, after a look at the sizes of its files. Their content is check_content's matter.

    A nanoGPT folder has no manifest.json; one is made in memory: dtype uint16, kind "char" and `stoi` where
    there is a meta.pkl, else "gpt2"; "bytes" and "documents" are None, and `nanogpt` is true. Its "sha256" is
    that of the whole file, or up to SAMPLED_ABOVE; of a larger one "sampled:" and that of its first and last
    MiB and its size, so that a run's start does not read 17 GB.

    Returns:
        {"version", "corpus", "tokenizer", "val_fraction", "split_seed", "dtype", "splits": {"train" and "val", maybe
        "test": {"tokens", "bytes", "documents", "sha256", "files": [{"name", "tokens"}, ...]}}}

    Raises:
        FileNotFoundError: no token files. ValueError: they are damaged; one line with the remedy.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not is_data_folder(folder):
        if any(folder.glob("*.bin")):
            raise ValueError(
                f"data_dir={folder}: token files without a manifest.json, maybe not whole: take "
                f"another data_dir, or {_AGAIN}"
            )
        raise FileNotFoundError(f"data_dir={folder}: {_instead(folder)}")
    if not path.is_file():
        return _nanogpt_manifest(folder)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        version = manifest.get("version") if isinstance(manifest, dict) else 0
        if type(version) is not int:
            raise ValueError(f"version: {version!r} is no whole number")
        if version in (1, VERSION):
            _check_form(_with_files(manifest) if version == 1 else manifest)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: {' '.join(str(error).split())}: {_AGAIN}") from None
    if version not in (1, VERSION):
        raise ValueError(f"{path}: version {version}, this program reads version {VERSION}: {_AGAIN}")
    itemsize = np.dtype(manifest["dtype"]).itemsize
    sizes = {
        folder / file["name"]: file["tokens"] * itemsize
        for counts in manifest["splits"].values()
        for file in counts["files"]
    }
    for file, size in sizes.items():
        found = file.stat().st_size if file.is_file() else 0
        if found != size:
            raise ValueError(
                f"{file}: {found:,} bytes, but the manifest says {size:,} "
                f"({size // itemsize:,} tokens of {itemsize} bytes): {_AGAIN}"
            )
    splits = manifest["splits"]  # in the order in which their first documents were met
    manifest["splits"] = {split: splits[split] for split in (*SPLITS, "test") if split in splits}
    return manifest


def _instead(folder):
    """What a folder without token files is, as far as that helps to find the right one."""
    if (folder / "run.yaml").is_file():
        import yaml

        try:
            data = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))["data"]["data_dir"]
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            data = None
        return f"a run, no token files: {f'its own are in {data}' if data else 'give the data_dir of its run.yaml'}"
    if (folder / ".partial").is_dir():
        return "its preparation was interrupted or still goes on: prepare it, which goes on where that stopped"
    inner = sorted(path.name for path in folder.iterdir() if is_data_folder(path)) if folder.is_dir() else []
    if inner:
        more = f" and {len(inner) - 10:,} more" if len(inner) > 10 else ""
        return f"no data folder itself; give one of those in it: {', '.join(inner[:10])}{more}"
    return "no train.bin and val.bin there: prepare them first, or give the right data_dir"


def _with_files(manifest):
    """A manifest of version 1, which had one file for each split and no list of them, with that list put in."""
    splits = manifest.get("splits")
    for split, counts in (splits if isinstance(splits, dict) else {}).items():
        if isinstance(counts, dict):
            counts["files"] = [{"name": f"{split}.bin", "tokens": counts.get("tokens")}]
    return manifest


def check_content(folder, manifest, vocab_size, whole=False):
    """Hold the token files of a manifest against its hashes, and their ids against the size of the vocabulary.

    Files of VERIFIED_BELOW bytes together are hashed, larger ones only where it is asked for by `whole`, for that
    reads all of them. The ids are looked at in LOOKS places of each split, spread evenly: what is wrong between these
    in a large file is not seen. A nanoGPT folder says no hashes to hold against.

    Raises:
        ValueError: other content, or an id that the tokenizer has not.
    """
    paths = {split: token_paths(folder, manifest, split) for split in manifest["splits"]}
    again = _AGAIN_NANOGPT if manifest.get("nanogpt") else _AGAIN
    if not manifest.get("nanogpt"):
        size = sum(path.stat().st_size for files in paths.values() for path in files)
        for split, files in paths.items() if whole or size < VERIFIED_BELOW else ():
            if _sha256_of_all(files) != manifest["splits"][split]["sha256"]:
                raise ValueError(
                    f"{files[0]}{' and the others' if files[1:] else ''}: changed since it was written "
                    f"(the SHA-256 in manifest.json is another): {again}"
                )
    for split, files in paths.items():
        tokens = TokenFile(files, manifest["dtype"])
        length = min(LOOK_TOKENS, len(tokens))
        looks = min(LOOKS, -(-len(tokens) // length)) if length else 0  # as many as cover a short split
        for start in np.linspace(0, len(tokens) - length, looks).astype(np.int64):
            highest = tokens.rows([start], length).max()
            if highest >= vocab_size:
                raise ValueError(
                    f"{files[0]}: the {split} tokens hold the id {highest:,}, but the tokenizer has only "
                    f"{vocab_size:,} symbols: these are another tokenizer's tokens: {again}"
                )


def token_paths(folder, manifest, split):
    """The files of a split, in order."""
    return [Path(folder) / file["name"] for file in manifest["splits"][split]["files"]]


def differences(held, wanted, folder):
    """What a run wants against what a data folder holds, both as {key: value}. folder: for the messages.

    Returns:
        A list of problems, one line each; empty where the folder fits.
    """
    return [
        f"{key}={wanted[key]}, but data_dir={folder} was prepared with {key}={held[key]}: leave {key} "
        "out to take that, or set another data_dir"
        for key in wanted
        if wanted[key] != held[key]
    ]


def _nanogpt_manifest(folder):
    splits = {}
    for split in SPLITS:
        file = folder / f"{split}.bin"
        size = file.stat().st_size
        if size % 2:
            raise ValueError(f"{file}: {size:,} bytes, an odd number, is no file of 16-bit ids: {_AGAIN_NANOGPT}")
        splits[split] = {
            "tokens": size // 2,
            "bytes": None,
            "documents": None,
            "sha256": _sha256(file),
            "files": [{"name": file.name, "tokens": size // 2}],
        }
    meta = folder / "meta.pkl"
    stoi = read_meta(meta) if meta.is_file() else None
    if stoi:
        tokenizer = {"kind": "char", "vocab_size": len(stoi), "eot_id": None, "stoi": stoi}
    else:
        tokenizer = {"kind": "gpt2", "vocab_size": 50257, "eot_id": 50256}
    return {
        "version": VERSION,
        "nanogpt": True,
        "corpus": {"kind": "nanogpt", "name": folder.resolve().name},
        "tokenizer": tokenizer,
        "val_fraction": None,
        "split_seed": None,
        "dtype": "uint16",
        "splits": splits,
    }


def _sha256_of_all(paths):
    """The SHA-256 of a split: its file's, or that of the hexadecimal ones of its files, written one after the other."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashlib lets go of Python's lock
        hashes = list(pool.map(lambda path: _sha256(path, whole=True), paths))
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _sha256(path, whole=False):
    digest, size = hashlib.sha256(), os.stat(path).st_size
    with open(path, "rb") as file:
        if size > SAMPLED_ABOVE and not whole:
            digest.update(file.read(2**20))
            file.seek(-(2**20), os.SEEK_END)
            digest.update(file.read(2**20) + str(size).encode())
            return f"sampled:{digest.hexdigest()}"
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, tuples, text and numbers. Whatever else a pickle names is refused, not imported."""

    def find_class(self, module, name):
        raise ValueError(f"asks for {module}.{name}, and a pickle that asks for code is not read")


def read_meta(path):
    """stoi of a nanoGPT meta.pkl: {character: id}.

    Raises:
        ValueError: the pickle holds more than plain values (none of it is run), or no stoi.
    """
    with open(path, "rb") as file:
        try:
            meta = _PlainUnpickler(file).load()
        except OSError:
            raise
        except ValueError as error:
            raise ValueError(f"{path}: {error}: {_AGAIN_NANOGPT}") from None
        except Exception as error:  # a damaged pickle raises almost anything
            raise ValueError(
                f"{path}: not a pickle of plain values ({type(error).__name__}): {_AGAIN_NANOGPT}"
            ) from None
    stoi = meta.get("stoi") if isinstance(meta, dict) else None
    if not isinstance(stoi, dict) or not stoi:
        raise ValueError(f"{path}: has no stoi, the ids of its characters: {_AGAIN_NANOGPT}")
    return stoi
