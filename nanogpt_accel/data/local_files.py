"""A path, a folder or a glob as a Corpus: which files it means, in which order, and what identifies them."""

import glob
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from pathlib import Path

from ..utils.text import file_name
from .corpus import Corpus, where
from .readers import READERS, file_state, open_file, read_file, read_ids, suffix_of

# what a folder is searched for; a glob or a file takes any suffix
TEXT_SUFFIXES = tuple(
    ".txt .text .md .rst .tex .html .py .c .h .cc .cpp .hpp .cu .rs .go .java .js .ts .sh .sql .r .jl".split()
)
TABLE_SUFFIXES = tuple(READERS)  # before .gz or .zst
# not text, and the name says it better than the first byte that is not UTF-8
OTHER_SUFFIXES = tuple(
    ".zip .tar .tgz .bz2 .xz .7z .rar .lz4 .arrow .feather .orc .avro .npy .pkl .pt "
    ".pdf .doc .docx .odt .epub .xls .xlsx".split()
)


def path_exists(spec):
    """Whether there is anything to look for: a glob, or a path that exists, be it a link to nothing."""
    path = os.path.expanduser(spec)
    return glob.has_magic(path) or os.path.lexists(path)


def base_name(spec):
    """Return the last part of a path, whatever folder it is seen from."""
    return os.path.basename(os.path.abspath(os.path.expanduser(spec)))


def local_corpus(spec, column, lines):
    """Return the Corpus of the files that a path or glob means, ordered by their names below it.

    Args:
        column: what has the text in files of many documents. lines: whether each line of a plain text is a document.

    Raises:
        FileNotFoundError: no file matches. ValueError: nothing to read there.
    """
    root, files, left_out = _find_files(spec)
    _check_formats(spec, files, lines)
    files = [(name, path, *file_state(path)) for name, path in _in_order(root, files)]
    listing = hashlib.sha256()
    for name, _, n_bytes, changed in files:
        listing.update(f"{name}\0{n_bytes}\0{changed}\n".encode("utf-8", "surrogateescape"))
    name = base_name(spec)
    stem = os.path.splitext(name)[0] if len(files) == 1 else name
    short = file_name(stem).strip("-.") or "text"
    size = sum(n_bytes for _, _, n_bytes, _ in files)
    source = {"kind": "files", "name": name, "files": len(files), "bytes": size, "listing": listing.hexdigest()}
    files = [file[1:] for file in files]
    if _has_ids(files[0][0]):
        return Corpus(
            short[:40],
            source | {"kind": "ids"},
            True,
            None,
            bytes=size,
            ids=lambda dtype, vocab_size, start: read_ids(spec, files, dtype, vocab_size, start),
        )
    has_tables = any(suffix_of(path) in TABLE_SUFFIXES for path, _, _ in files)
    source |= {"column": column} if has_tables else {}
    source |= {"lines": True} if lines else {}
    is_single = len(files) == 1 and not has_tables and not lines
    # compressed text is about three times as long as its file
    size = sum(n_bytes * (3 if _is_compressed(path) else 1) for path, n_bytes, _ in files)

    def read_one(path, bad):
        try:
            yield from read_file(spec, path, column, lines, bad)
        except OSError as error:  # also of a file that is cut off or has gone since it was listed
            problem = f"{where(spec, path)}: {error.strerror or error}"
            if is_single:
                raise ValueError(f"{problem}: make the file whole, or give another path") from None
            bad(problem)

    def read(split, bad):
        return itertools.chain.from_iterable(read_one(path, bad) for path, _, _ in files)

    def first(bad):
        for number, (path, _, _) in enumerate(files):
            if number == 0 or suffix_of(path) in TABLE_SUFFIXES:
                yield from itertools.islice(read_one(path, bad), 1)

    return Corpus(short[:40], source, is_single, read, bytes=size, first=first, left_out=left_out)


def _find_files(spec):
    """Return (the folder that names are given below, paths, {suffix: number of files left out})."""
    path = os.path.expanduser(spec)
    if os.path.isfile(path):
        return os.path.dirname(path), [path], {}
    if os.path.isdir(path):
        return path, *_files_below(spec, path)
    if glob.has_magic(path):
        files = [file for file in glob.glob(path, recursive=True) if _is_file(file)]
        if not files:
            raise FileNotFoundError(f"corpus={spec}: no file matches this glob")
        return ".", files, {}
    is_dangling = os.path.islink(path) and not os.path.exists(path)
    what = "a link to nothing: mend it" if is_dangling else "a pipe, a device or a socket: write its text to a file"
    raise ValueError(f"corpus={spec}: {what}, or give another path")


def _files_below(spec, folder):
    """Return (the files of text below a folder, {suffix: number of the other files})."""
    suffixes, found = TEXT_SUFFIXES + TABLE_SUFFIXES, walk(folder)
    files = [file for file in found if suffix_of(file) in suffixes and _is_file(file)]
    if not files and os.path.isfile(os.path.join(folder, "train.bin")):
        raise ValueError(f"corpus={spec}: holds token ids, not text: give data_dir={spec} instead")
    if not files:
        raise ValueError(
            f"corpus={spec}: no file of text ({' '.join(suffixes)}) below this "
            f"folder: name the files by a glob, such as '{os.path.join(spec, '*.log')}'"
        )
    left_out = Counter(map(suffix_of, found)) - Counter(map(suffix_of, files))
    return files, {suffix or "without a suffix": count for suffix, count in left_out.items()}


def walk(root, skipped=None):
    """Return the files below a folder that are not hidden, in one order on every machine. skipped: a regular expression
    of names of folders."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".") and not (skipped and skipped.fullmatch(f))]
        found += [os.path.join(folder, f) for f in files if not f.startswith(".")]
    return sorted(found, key=lambda f: Path(f).parts)


def _check_formats(spec, files, lines):
    """Raise ValueError for files of a format that is not supported, and for token ids among files of text."""
    ids = [file for file in files if _has_ids(file)]
    if ids and (lines or len(ids) < len(files) or any(map(_is_compressed, ids))):
        raise ValueError(
            f"{where(spec, ids[0])}: holds token ids, which are read from .bin files alone, unpacked: "
            "name no file of text and no .gz or .zst with them, and leave out lines"
        )
    if other := [file for file in files if suffix_of(file) in OTHER_SUFFIXES]:
        raise ValueError(
            f"{where(spec, other[0])}: {suffix_of(other[0])} is no known format: unpack or convert it to "
            f"plain text or {', '.join(TABLE_SUFFIXES)}, each also with .gz or .zst"
        )
    json_file = next((file for file in files if suffix_of(file) == ".json"), None)
    if json_file and _has_json_lines(json_file):
        raise ValueError(
            f"{where(spec, json_file)}: each of its lines is a JSON object: rename it to .jsonl, and "
            "text_column says which of their keys holds the text"
        )


def _has_json_lines(path):
    """Whether the first lines of a file, two or more of them, are JSON objects."""
    try:
        with open_file(path) as file:
            found = [json.loads(line) for line in itertools.islice(file, 10) if line.strip()]
    except (OSError, ValueError, RecursionError):
        return False
    return len(found) > 1 and all(isinstance(row, dict) for row in found)


def _in_order(root, files):
    """Return (name below the root, path) of each file, sorted by name; shard 10 of token ids comes after shard 9."""
    named = sorted((_name_below(root or ".", file), file) for file in files)
    if _has_ids(files[0]):
        named.sort(key=lambda file: [p.zfill(20) if p.isdigit() else p for p in re.split(r"(\d+)", file[0])])
    return named


def _name_below(root, path):
    """Return the name of a file below a folder, with slashes on every machine."""
    try:
        return Path(os.path.relpath(path, root)).as_posix()
    except ValueError:  # a glob of another drive of Windows
        return Path(path).as_posix()


def _is_file(path):
    """Whether a path is a regular file, or a link to nothing, which is refused when it is read. Pipes and devices,
    which could be read for ever, are not."""
    return os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


def _has_ids(path):
    return suffix_of(path) == ".bin"


def _is_compressed(path):
    return path.lower().endswith((".gz", ".zst", ".parquet"))
