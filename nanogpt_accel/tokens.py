"""Token files on disk in nanoGPT's form, train.bin and val.bin, and a manifest.json that says what they are.

    with Writer(folder, np.uint16) as writer:
        writer.write("train", ids, len(raw_bytes))
        writer.finish({"corpus": ...}, save_tokenizer)
    manifest = read_manifest(folder)
    x = TokenFile(folder / "train.bin", manifest["dtype"]).rows([0, 7], 256)

A manifest means complete data: it is the last file to appear. A folder of nanoGPT's own is read as well.
"""

import hashlib
import json
import os
import pickle
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

VERSION = 1
SPLITS = ("train", "val")
FILES = ("train.bin", "val.bin", "tokenizer.json", "manifest.json")
SAMPLED_ABOVE = 2**30  # bytes of a nanoGPT file above which only its head, tail and size are hashed
_AGAIN = "delete the folder and prepare it again"
_AGAIN_NANOGPT = "make it again with nanoGPT's prepare.py"


class TokenFile:
    """A file of token ids, read by the row.

    Args:
        path: the file. dtype: of its ids, "uint16" or "uint32".
    """

    def __init__(self, path, dtype):
        self.path = Path(path)
        self.dtype = np.dtype(dtype)
        self._length = os.stat(path).st_size // self.dtype.itemsize

    def __len__(self):
        return self._length

    def rows(self, starts, length):
        """The ids at starts[i] ... starts[i] + length - 1, as int64 of shape (len(starts), length)."""
        starts = np.asarray(starts, dtype=np.int64)
        out = np.empty((len(starts), length), dtype=np.int64)
        if len(starts):
            assert 0 <= starts.min() and starts.max() + length <= len(self), f"a row beyond {self.path}"
            # a new map each time, as in nanoGPT: the pages of one that stays open add up in resident memory,
            # https://stackoverflow.com/questions/45132940/numpy-memmap-memory-usage-want-to-iterate-once
            data = np.memmap(self.path, dtype=self.dtype, mode="r")
            for row, start in zip(out, starts, strict=True):
                row[:] = data[start : start + length]
        return out


class Writer:
    """Writes a data folder as the tokens come, out of sight until all of it is there.

    The files grow in FOLDER/.tmp-*, on the same disk whatever is mounted where. finish() moves them to their
    places, the manifest last; leaving the `with` block without it removes them.

    Args:
        folder: the data folder. dtype: np.uint16 or np.uint32.

    Raises:
        ValueError: the folder holds such files already. OSError: it cannot be written.
    """

    def __init__(self, folder, dtype):
        self.folder, self.dtype = Path(folder), np.dtype(dtype)
        self._refuse_to_overwrite()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self.folder))
        except OSError as error:
            raise OSError(f"data_dir={folder}: cannot be written ({error.strerror}): set data_dir to a "
                          "folder that can") from None
        self._files = {split: open(self.temporary / f"{split}.bin", "wb") for split in SPLITS}
        self._hashes = {split: hashlib.sha256() for split in SPLITS}
        self.counts = {split: {"tokens": 0, "bytes": 0, "documents": 0} for split in SPLITS}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for file in self._files.values():
            with suppress(OSError):  # a full disk is reported by the write that failed
                file.close()
        shutil.rmtree(self.temporary, ignore_errors=True)
        with suppress(OSError):  # goes only where it is empty
            self.folder.rmdir()

    def write(self, split, ids, n_bytes, documents=1):
        """Append ids, (n,) whole numbers, to a split. n_bytes: the size of their text as UTF-8."""
        raw = np.ascontiguousarray(ids, dtype=self.dtype).tobytes()
        with _naming(self.folder):
            self._files[split].write(raw)
        self._hashes[split].update(raw)
        self.counts[split]["tokens"] += len(ids)
        self.counts[split]["bytes"] += n_bytes
        self.counts[split]["documents"] += documents

    def finish(self, facts, save_tokenizer):
        """Make the folder real and return its manifest.

        Args:
            facts: {"corpus": {"name", ...}, "tokenizer": {"asked", "kind", "vocab_size", "fingerprint",
                "eot_id"}, "val_fraction", "split_seed"}: plain values for the manifest.
            save_tokenizer: a function that writes the tokenizer's files into the folder it is given.
        """
        manifest = {"version": VERSION, **facts, "dtype": self.dtype.name, "splits": {
            split: self.counts[split] | {"sha256": self._hashes[split].hexdigest()} for split in SPLITS}}
        with _naming(self.folder):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())  # or a power cut could keep the manifest and lose the tokens
                file.close()
            save_tokenizer(self.temporary)
            with open(self.temporary / "manifest.json", "w", encoding="utf-8") as file:
                file.write(json.dumps(manifest, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            if (self.folder / "manifest.json").exists() and read_manifest(self.folder) == manifest:
                return manifest  # another process prepared the same meanwhile
            self._refuse_to_overwrite()
            # the tokenizer first: .bin files without a manifest pass for nanoGPT's, but not beside its file
            names = sorted(f.name for f in self.temporary.iterdir())
            for name in sorted(names, key=lambda n: (n == "manifest.json", n.endswith(".bin"), n)):
                os.replace(self.temporary / name, self.folder / name)
        return manifest

    def _refuse_to_overwrite(self):
        if found := [name for name in FILES if (self.folder / name).exists()]:
            raise ValueError(f"data_dir={self.folder}: holds {', '.join(found)} already, and nothing is "
                             "overwritten: take another data_dir, or delete that folder")


@contextmanager
def _naming(folder):
    """Puts the data folder's name into the errors of the disk."""
    try:
        yield
    except OSError as error:
        raise OSError(f"data_dir={folder}: cannot write the token files ({error.strerror or error}), nothing "
                      "was kept: make room, or set data_dir to another disk") from None


def is_data_folder(folder):
    """True where there is a data folder: ours, which has a manifest, or nanoGPT's, which has none."""
    has = {name: (Path(folder) / name).is_file() for name in FILES}
    # .bin files beside a tokenizer.json are ours, amid the moves of finish() or after a crash between them
    return has["manifest.json"] or (has["train.bin"] and has["val.bin"] and not has["tokenizer.json"])


def read_manifest(folder):
    """What a data folder holds, after a look at the sizes of its files.

    A nanoGPT folder has no manifest.json; one is made in memory: dtype uint16, kind "char" and `stoi` where
    there is a meta.pkl, else "gpt2"; "bytes" and "documents" are None, and `nanogpt` is true. Its "sha256" is
    that of the whole file, or up to SAMPLED_ABOVE; of a larger one "sampled:" and that of its first and last
    MiB and its size, so that a run's start does not read 17 GB.

    Returns:
        {"version", "corpus", "tokenizer", "val_fraction", "split_seed", "dtype", "splits": {"train" and "val":
        {"tokens", "bytes", "documents", "sha256"}}}

    Raises:
        FileNotFoundError: no token files. ValueError: they are damaged; one line with the remedy.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not is_data_folder(folder):
        if any((folder / name).exists() for name in FILES):
            raise ValueError(f"data_dir={folder}: token files without a manifest.json, maybe not whole: take "
                             f"another data_dir, or {_AGAIN}")
        raise FileNotFoundError(f"data_dir={folder}: no train.bin and val.bin there: prepare them first, or "
                                "give the right data_dir")
    if not path.is_file():
        return _nanogpt_manifest(folder)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        version = manifest["version"]
        itemsize = np.dtype(manifest["dtype"]).itemsize
        sizes = {split: manifest["splits"][split]["tokens"] * itemsize for split in SPLITS}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({type(error).__name__}: {error}): {_AGAIN}") from None
    if version != VERSION:
        raise ValueError(f"{path}: version {version}, this program reads version {VERSION}: {_AGAIN}")
    for split, size in sizes.items():
        file = folder / f"{split}.bin"
        found = file.stat().st_size if file.is_file() else 0
        if found != size:
            raise ValueError(f"{file}: {found:,} bytes, but the manifest says {size:,} "
                             f"({size // itemsize:,} tokens of {itemsize} bytes): {_AGAIN}")
    return manifest


def differences(manifest, folder, corpus=None, tokenizer=None, val_fraction=None):
    """What a run wants against what a data folder holds.

    Args:
        manifest: of read_manifest. folder: for the messages. corpus: the name in the corpus's source.
        tokenizer: as in the manifest's "asked". val_fraction: a share. None: any will do.

    Returns:
        A list of problems, one line each; empty where the folder fits.
    """
    held = {"corpus": manifest["corpus"].get("name"), "tokenizer": manifest["tokenizer"].get("asked"),
            "val_fraction": manifest["val_fraction"]}
    wanted = {"corpus": corpus, "tokenizer": tokenizer, "val_fraction": val_fraction}
    return [f"{key}={wanted[key]}, but data_dir={folder} was prepared with {key}={held[key]}: leave {key} "
            "out to take that, or set another data_dir"
            for key in wanted if wanted[key] is not None and wanted[key] != held[key]]


def _nanogpt_manifest(folder):
    splits = {}
    for split in SPLITS:
        file = folder / f"{split}.bin"
        size = file.stat().st_size
        if size % 2:
            raise ValueError(f"{file}: {size:,} bytes, an odd number, is no file of 16-bit ids: "
                             f"{_AGAIN_NANOGPT}")
        splits[split] = {"tokens": size // 2, "bytes": None, "documents": None,
                         "sha256": _sha256(file, size)}
    meta = folder / "meta.pkl"
    stoi = read_meta(meta) if meta.is_file() else None
    if stoi:
        tokenizer = {"kind": "char", "vocab_size": len(stoi), "eot_id": None, "stoi": stoi}
    else:
        tokenizer = {"kind": "gpt2", "vocab_size": 50257, "eot_id": 50256}
    return {"version": VERSION, "nanogpt": True, "corpus": {"kind": "nanogpt", "name": folder.resolve().name},
            "tokenizer": tokenizer, "val_fraction": None, "split_seed": None, "dtype": "uint16", "splits": splits}


def _sha256(path, size):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if size > SAMPLED_ABOVE:
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
            raise ValueError(f"{path}: not a pickle of plain values ({type(error).__name__}): "
                             f"{_AGAIN_NANOGPT}") from None
    stoi = meta.get("stoi") if isinstance(meta, dict) else None
    if not isinstance(stoi, dict) or not stoi:
        raise ValueError(f"{path}: has no stoi, the ids of its characters: {_AGAIN_NANOGPT}")
    return stoi
