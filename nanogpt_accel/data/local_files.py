"""A corpus of files: a file, a folder or a glob, on this machine or at a URL."""

import glob
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path

from ..utils.text import file_name
from .corpus import Corpus, location
from .foreign_tokens import (
    find_layout,
    find_token_files,
    find_unexpected,
    is_token_file,
    natural_order,
    open_splits,
    without_companions,
)
from .readers import READERS, file_state, open_file, read_file, suffix_of
from .remote import find, is_remote, name_of

# files in a folder are read if they have one of these suffixes; a single file or a glob may have any suffix
TEXT_SUFFIXES = tuple(
    ".txt .text .md .rst .tex .html .py .c .h .cc .cpp .hpp .cu .rs .go .java .js .ts .sh .sql .r .jl".split()
)
TABLE_SUFFIXES = tuple(READERS)  # each can be followed by .gz or .zst
# not supported; an error that names the suffix is clearer than one about the first byte that is not UTF-8
OTHER_SUFFIXES = tuple(
    ".zip .tar .tgz .bz2 .xz .7z .rar .lz4 .arrow .feather .orc .avro .pkl .pt "
    ".pdf .doc .docx .odt .epub .xls .xlsx".split()
)


def path_exists(spec):
    """Return whether a corpus setting is a URL, a glob or an existing path. A broken link counts as existing."""
    path = os.path.expanduser(spec)
    return is_remote(spec) or glob.has_magic(path) or os.path.lexists(path)


def base_name(spec):
    """Return the last part of the absolute path, or of the URL, of a corpus setting."""
    return os.path.basename(os.path.abspath(os.path.expanduser(name_of(spec))))


def local_corpus(spec, column, lines):
    """Return the Corpus of a file, a folder or a glob. Files are read in the order of their names.

    column: the text column of .jsonl, .csv and similar files. lines: whether each line of a plain text is a document.
    Raises FileNotFoundError if no file matches, and ValueError if a file is not supported.
    """
    root, paths, skipped = _find_files(spec)
    _check_formats(spec, paths, lines)
    files, listing = [], hashlib.sha256()
    for name, path in _sort(root, paths):
        n_bytes, changed = file_state(path)
        files.append((path, n_bytes, changed))
        listing.update(f"{name}\0{n_bytes}\0{changed}\n".encode("utf-8", "surrogateescape"))
    name = base_name(spec)
    stem = os.path.splitext(name)[0] if len(files) == 1 else name
    short = (file_name(stem).strip("-.") or "text")[:40]
    size = sum(n_bytes for _, n_bytes, _ in files)
    source = {"kind": "files", "name": name, "files": len(files), "bytes": size, "listing": listing.hexdigest()}
    if is_token_file(files[0][0]):
        for path, _, _ in files:
            find_layout(path, spec)  # reports a damaged header
        source |= {"kind": "ids"}
        return Corpus(short, source, True, None, bytes=size, ids=lambda *args: _open_ids(spec, files, *args))
    has_tables = any(suffix_of(path) in TABLE_SUFFIXES for path in paths)
    source |= {"column": column} if has_tables else {}
    source |= {"lines": True} if lines else {}
    is_single = len(files) == 1 and not has_tables and not lines
    # text is about three times as large as its compressed file
    size = sum(n_bytes * (3 if _is_compressed(path) else 1) for path, n_bytes, _ in files)

    def read_one(path, bad):
        try:
            yield from read_file(spec, path, column, lines, bad)
        except OSError as error:  # for example, because the file is truncated or was deleted in the meantime
            problem = f"{location(spec, path)}: {error.strerror or error}"
            if is_single:
                raise ValueError(f"{problem}; restore the file, or set `corpus` to another path") from None
            bad(problem)

    def read(split, bad):
        return itertools.chain.from_iterable(read_one(path, bad) for path, _, _ in files)

    def first(bad):
        for number, (path, _, _) in enumerate(files):
            if number == 0 or suffix_of(path) in TABLE_SUFFIXES:
                yield from itertools.islice(read_one(path, bad), 1)

    return Corpus(short, source, is_single, read, bytes=size, first=first, skipped=skipped)


def _open_ids(spec, files, tokenizer_size, val_fraction):
    """Return the splits of a corpus of token ids; see foreign_tokens.open_splits. files: see local_corpus."""
    for path, *state in files:
        if file_state(path) != tuple(state):
            problem = "was changed or removed while the command was running"
            raise ValueError(f"{location(spec, path)}: {problem}; run it again when the file is complete")
    return open_splits([path for path, _, _ in files], tokenizer_size, val_fraction, spec)


def _find_files(spec):
    """Return (folder that file names are relative to, paths of the files, {suffix: number of skipped files})."""
    path = os.path.expanduser(spec)
    if is_remote(spec):
        paths, is_folder = find(spec)
        return (spec, *_find_text_files(spec, paths)) if is_folder else (".", without_companions(paths), {})
    if os.path.isfile(path):
        path = re.sub(r"\.idx$", ".bin", path)  # the index of a Megatron-LM file
        return os.path.dirname(path), [path], {}
    if os.path.isdir(path):
        return path, *_find_text_files(spec, walk(path), path)
    if glob.has_magic(path):
        files = without_companions(file for file in glob.glob(path, recursive=True) if _is_file(file))
        if not files:
            raise FileNotFoundError(f"corpus={spec}: no file matches this glob; set `corpus` to another path")
        return ".", files, {}
    problem = "pipes, devices and sockets are not supported; write the text to a file"
    if os.path.islink(path) and not os.path.exists(path):
        problem = "broken link; fix the link"
    raise ValueError(f"corpus={spec}: {problem}, or set `corpus` to another path")


def _find_text_files(spec, paths, folder=None):
    """Return (paths of all files with a supported suffix, {suffix: number of other files}). paths: all files in the
    folder tree of the corpus. folder: the folder, if it is on this machine."""
    suffixes = TEXT_SUFFIXES + TABLE_SUFFIXES
    files = [file for file in paths if suffix_of(file) in suffixes and _is_file(file)]
    if files and folder and (token_file := find_unexpected(folder)):
        globs = " or ".join(f"'{os.path.join(spec, '*' + suffix_of(str(path)))}'" for path in (token_file, files[0]))
        raise ValueError(f"corpus={spec}: contains both text and token files ({token_file.name}); set corpus={globs}")
    if not files and folder and (token_files := find_token_files(folder)):
        return [str(path) for path in token_files], {}
    if not files:
        raise ValueError(
            f"corpus={spec}: contains no text file ({' '.join(suffixes)}); for other suffixes use a glob such as "
            f"'{os.path.join(spec, '*.log')}'"
        )
    skipped = Counter(map(suffix_of, paths)) - Counter(map(suffix_of, files))
    return files, {suffix or "without a suffix": count for suffix, count in skipped.items()}


def walk(root, excluded=None):
    """Return the files in a folder and its subfolders, except hidden ones. excluded: regex for folder names to skip."""
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".") and not (excluded and excluded.fullmatch(f))]
        paths += [os.path.join(folder, f) for f in files if not f.startswith(".")]
    return sorted(paths, key=lambda path: Path(path).parts)  # the same order on every system


def _check_formats(spec, files, lines):
    """Raise ValueError for unsupported formats, and for token files that are compressed or mixed with other files."""
    ids = [file for file in files if is_token_file(re.sub(r"\.(gz|zst)$", "", file))]
    if ids and (lines or len(ids) < len(files) or any(map(_is_compressed, ids))):
        raise ValueError(
            f"{location(spec, ids[0])}: contains token ids, which cannot be compressed or mixed with text; "
            "decompress .gz and .zst files, remove text files from the path, and do not set lines"
        )
    if ids and is_remote(ids[0]):
        raise ValueError(
            f"{location(spec, ids[0])}: token ids must be on this machine, because training reads them in random "
            "order; download the files, and set corpus to the copy"
        )
    if other := [file for file in files if suffix_of(file) in OTHER_SUFFIXES]:
        raise ValueError(
            f"{location(spec, other[0])}: {suffix_of(other[0])} is not supported; unpack it, or convert it to plain "
            f"text or {', '.join(TABLE_SUFFIXES)}, optionally compressed (.gz, .zst)"
        )
    json_file = next((file for file in files if suffix_of(file) == ".json"), None)
    if json_file and _has_json_lines(json_file):
        raise ValueError(
            f"{location(spec, json_file)}: each line is a JSON object; rename the file to .jsonl, and set text_column "
            "to the key of the text"
        )


def _has_json_lines(path):
    """Return whether a file has several lines and the first 10 are JSON objects."""
    try:
        with open_file(path) as file:
            rows = [json.loads(line) for line in itertools.islice(file, 10) if line.strip()]
    except (OSError, ValueError, RecursionError):
        return False
    return len(rows) > 1 and all(isinstance(row, dict) for row in rows)


def _sort(root, paths):
    """Return [(name relative to the root, path), ...], sorted by name; for token files, by the numbers in the name."""

    def name_of(path):
        with suppress(ValueError):  # on Windows, the path can be on another drive
            path = os.path.relpath(path, root or ".")
        return Path(path).as_posix()

    named = sorted((name_of(path), path) for path in paths)
    return sorted(named, key=lambda file: natural_order(file[0])) if is_token_file(paths[0]) else named


def _is_file(path):
    """Return whether a path is a regular file or a broken link. Reading a broken link reports the error."""
    return is_remote(path) or os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


def _is_compressed(path):
    return name_of(path).lower().endswith((".gz", ".zst", ".parquet"))
