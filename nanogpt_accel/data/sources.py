"""Where text comes from: a builtin name, a Hub data set, or local files, folders and globs.

    corpus = find_corpus("shakespeare")   # cheap, downloads nothing
    for text in corpus.documents():       # one str a file, line or row, read when it is asked for
        ...

A builtin is an entry of a table below; a new one is a line there.
"""

import csv
import difflib
import glob
import hashlib
import http.client
import io
import itertools
import json
import os
import platform
import re
import sysconfig
import urllib.request
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

# name -> (URL, SHA-256) of one UTF-8 text
URLS = {
    "shakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
}


@dataclass(frozen=True)
class HubSet:
    """A data set on the Hub. splits: ours -> the Hub's; without "val", validation documents are dealt out of train.
    grouped: how rows make documents, a name of GROUPED, where a row is not one."""

    id: str
    revision: str
    config: str | None = None
    splits: dict = field(default_factory=lambda: {"train": "train"})
    column: str = "text"
    grouped: str | None = None
    about: str = ""


# Pinned, so that the same recipe means the same text. datasets >= 4 runs no scripts, so where the main branch holds
# nothing else the revision is the Hub's own parquet conversion of it.
HUB = {
    "openwebtext": HubSet(
        "Skylion007/openwebtext",
        "79d93d786212f7344586290adb811d4ae6a1762c",
        "plain_text",
        about="8,013,769 web pages that Reddit linked, 40 GB, CC0",
    ),
    "bookcorpus": HubSet(
        "bookcorpus/bookcorpus",
        "refs/convert/parquet",
        "plain_text",
        grouped="sentences",
        about="74 million sentences of novels, 4.9 GB, license unknown",
    ),
    "wikitext2": HubSet(
        "Salesforce/wikitext",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        "wikitext-2-raw-v1",
        {"train": "train", "val": "validation", "test": "test"},
        grouped="articles",
        about="720 Wikipedia articles, 13 MB, CC BY-SA 4.0",
    ),
    "fineweb_edu": HubSet(
        "HuggingFaceFW/fineweb-edu",
        "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
        "sample-10BT",
        about="9,672,101 educational web pages, 50 GB, 10 billion tokens, ODC-By",
    ),
    "tinystories": HubSet(
        "roneneldan/TinyStories",
        "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
        None,
        {"train": "train", "val": "validation"},
        about="2.1 million stories in words of small children, 2 GB, CDLA-Sharing 1.0",
    ),
}
BUILTIN = ("python", *URLS, *HUB)

# what a folder is searched for; a glob or a file takes any suffix
TEXT_SUFFIXES = (
    ".txt",
    ".text",
    ".md",
    ".rst",
    ".tex",
    ".html",
    ".py",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".hpp",
    ".cu",
    ".rs",
    ".go",
    ".java",
    ".js",
    ".ts",
    ".sh",
    ".sql",
    ".r",
    ".jl",
)
# files of many documents each, by the suffix before .gz or .zst
TABLE_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
# what is no text, so that its name tells more than its first byte that is not UTF-8
OTHER_SUFFIXES = (
    ".zip",
    ".tar",
    ".tgz",
    ".bz2",
    ".xz",
    ".7z",
    ".rar",
    ".lz4",
    ".arrow",
    ".feather",
    ".orc",
    ".avro",
    ".npy",
    ".pkl",
    ".pt",
    ".pdf",
    ".doc",
    ".docx",
    ".odt",
    ".epub",
    ".xls",
    ".xlsx",
)

# Folders of the standard library that teach a model little: tests (half of all the bytes), and tables that a
# program wrote: encodings/ is a hundred code pages, pydoc_data/ the manual as one literal, config-*/ and
# _sysconfigdata* hold the build paths of one machine. And site-packages, which is not the library.
PYTHON_SKIPPED = re.compile(r"(test|tests|idle_test|encodings|pydoc_data|config-.*|.*-packages|__pycache__)")

TIMEOUT = 30  # seconds without an answer after which a download is given up
IDS_AT_ONCE = 2**22  # token ids that are read at a time


@dataclass(frozen=True)
class Corpus:
    """Text to learn from.

    name: short and fit for a file name. source: plain values that identify the content, for the manifest.
    is_single: true where it is one text, to be cut in two; else it is documents, to be dealt out whole.
    read: (split, bad) -> documents; None of ids. splits: those that the corpus itself has, or a function that asks for
        them.
    bytes: about the size of the text, None where that is not known.
    pin: of a Hub data set: commit, None for the newest -> the same Corpus read at it; its source names the commit,
        unless its revision is one.
    first: of files: bad -> the first document of each that holds many, and of the very first file.
    left_out: of a folder: {suffix: number of files that are not read}.
    ids: of token files, which hold one sequence and no text: (dtype, vocab_size, start) -> what _ids returns.
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
        """The splits that the corpus has by itself, "train" first; of a Hub data set it may be asked for them."""
        return self.splits() if callable(self.splits) else self.splits

    def look(self, bad=None):
        """Raise ValueError where a file lacks the column or cannot be opened, before anything slow begins; bad: as of
        documents()."""
        for _ in self.first(bad or _refuse) if self.first else ():
            pass

    def documents(self, split="train", bad=None):
        """Yield the documents that are not empty, each as one str; may be called again.

        bad: called with a line for each document that cannot be read, which is then left out; None: it is an error.

        Raises ValueError for text that is not UTF-8, cannot be read or fetched, or is not there at all.
        """
        empty, left_out = True, []

        def note(problem):
            if not left_out:
                left_out.append(problem)
            bad(problem)

        for text in self.read(split, note if bad else _refuse):
            if text:
                empty = False
                yield text
        if empty:
            reason = f" but what cannot be read (first: {left_out[0]})" if left_out else ""
            raise ValueError(f"corpus={self.source['name']}: there is no text in it{reason}: give another path")


def _refuse(problem):
    raise ValueError(f"{problem}: mend it, or go on without it by skip_bad_documents=true")


def find_corpus(spec, *, text_column="text", lines=False, dataset_config=None, dataset_split="train", revision=None):
    """The Corpus that `spec` names: a builtin, hub:USER/SET, or a local file, folder or glob.

    A builtin name wins over a path; write ./python for a folder of that name.

    Args:
        text_column: what holds the text in .jsonl, .csv, .parquet and on the Hub. lines: whether each line of a plain
            text file is a document. dataset_config, dataset_split, revision: of hub:USER/SET.

    Raises:
        FileNotFoundError: no such name or path. ValueError: nothing to read there.
    """
    if spec == "python":
        return _python()
    if spec in URLS:
        source = {"kind": "url", "name": spec, "sha256": URLS[spec][1]}
        return Corpus(spec, source, True, lambda split, bad: iter([_decode(spec, _fetch(spec, *URLS[spec]))]))
    if spec in HUB:
        return _hub(spec, HUB[spec])
    if spec.startswith("hub:"):
        if not re.fullmatch(r"hub:[\w-][\w.-]*(/[\w.-]+)?", spec):
            raise ValueError(f"corpus={spec}: a data set of the Hub is named hub:USER/SET")
        return _hub(spec, HubSet(spec[4:], revision, dataset_config, {"train": dataset_split}, text_column))
    return _local(spec, text_column, lines)


def source_name(spec):
    """The `name` in the source of find_corpus(spec), without a look at the disk."""
    if spec in BUILTIN or spec.startswith("hub:"):
        return spec
    return os.path.basename(os.path.abspath(os.path.expanduser(spec)))


def _local(spec, column, lines):
    """The files that a path or glob means, ordered by their names below it."""
    path, left_out = os.path.expanduser(spec), {}
    if os.path.isfile(path):
        root, files = os.path.dirname(path), [path]
    elif os.path.isdir(path):
        root, walked = path, _walk(path)
        files = [f for f in walked if _suffix(f) in TEXT_SUFFIXES + TABLE_SUFFIXES and _is_file(f)]
        left_out = Counter(map(_suffix, walked)) - Counter(map(_suffix, files))
        left_out = {suffix or "without a suffix": count for suffix, count in left_out.items()}
        if not files and os.path.isfile(os.path.join(path, "train.bin")):
            raise ValueError(f"corpus={spec}: holds token ids, not text: give data_dir={spec} instead")
        if not files:
            raise ValueError(
                f"corpus={spec}: no file of text ({' '.join(TEXT_SUFFIXES + TABLE_SUFFIXES)}) below this "
                f"folder: name the files by a glob, such as '{os.path.join(spec, '*.log')}'"
            )
    elif glob.has_magic(path):
        root, files = ".", [f for f in glob.glob(path, recursive=True) if _is_file(f)]
        if not files:
            raise FileNotFoundError(f"corpus={spec}: no file matches this glob")
    elif os.path.lexists(path):
        raise ValueError(
            f"corpus={spec}: "
            + (
                "a link to nothing: mend it"
                if os.path.islink(path) and not os.path.exists(path)
                else "a pipe, a device or a socket: write its text to a file"
            )
            + ", or give another path"
        )
    else:
        # (a path is no misspelt name)
        close = [] if os.path.dirname(spec) else difflib.get_close_matches(spec, BUILTIN, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise FileNotFoundError(
            f"corpus={spec}: no such corpus{hint}; there are {', '.join(BUILTIN)}, "
            "and any text file, folder or glob that exists"
        )
    tokens = [f for f in files if _suffix(f) == ".bin"]
    if tokens and (lines or len(tokens) < len(files) or any(map(_is_compressed, tokens))):
        raise ValueError(
            f"{_where(spec, tokens[0])}: holds token ids, which are read from .bin files alone, unpacked: "
            "name no file of text and no .gz or .zst with them, and leave out lines"
        )
    if other := [f for f in files if _suffix(f) in OTHER_SUFFIXES]:
        raise ValueError(
            f"{_where(spec, other[0])}: {_suffix(other[0])} is no known format: unpack or convert it to "
            f"plain text or {', '.join(TABLE_SUFFIXES)}, each also with .gz or .zst"
        )
    if (json_file := next((f for f in files if _suffix(f) == ".json"), None)) and _holds_json_lines(json_file):
        raise ValueError(
            f"{_where(spec, json_file)}: each of its lines is a JSON object: rename it to .jsonl, and "
            "text_column says which of their keys holds the text"
        )
    files = sorted((_below(root or ".", f), f) for f in files)
    if tokens:  # one sequence: shard 10 comes after shard 9
        files.sort(
            key=lambda file: [part.zfill(20) if part.isdigit() else part for part in re.split(r"(\d+)", file[0])]
        )
    listing = hashlib.sha256()
    size = 0
    for name, file in files:
        n_bytes, changed = _size(file)
        size += n_bytes
        listing.update(f"{name}\0{n_bytes}\0{changed}\n".encode("utf-8", "surrogateescape"))
    name = source_name(spec)
    source = {"kind": "files", "name": name, "files": len(files), "bytes": size, "listing": listing.hexdigest()}
    stem = os.path.splitext(name)[0] if len(files) == 1 else name
    short = re.sub(r"[^\w.-]+", "-", stem, flags=re.ASCII).strip("-.") or "text"
    if tokens:
        listed = [(file, *_size(file)) for _, file in files]
        return Corpus(
            short[:40],
            source | {"kind": "ids"},
            True,
            None,
            bytes=size,
            ids=lambda dtype, vocab_size, start: _ids(spec, listed, np.dtype(dtype), vocab_size, start),
        )

    has_tables = any(_suffix(file) in TABLE_SUFFIXES for _, file in files)
    source |= {"column": column} if has_tables else {}
    source |= {"lines": True} if lines else {}

    def read_file(file, bad):
        try:
            if _suffix(file) in TABLE_SUFFIXES or lines:
                yield from _rows(spec, file, column, bad)
            else:
                yield from _whole(spec, file, bad)
        except OSError as error:  # also of a file that is cut off or has gone since it was listed
            problem = f"{_where(spec, file)}: {error.strerror or error}"
            if is_single:
                raise ValueError(f"{problem}: make the file whole, or give another path") from None
            bad(problem)

    def read(split, bad):
        for _, file in files:
            yield from read_file(file, bad)

    def first(bad):
        for number, (_, file) in enumerate(files):
            if number == 0 or _suffix(file) in TABLE_SUFFIXES:
                yield from itertools.islice(read_file(file, bad), 1)

    is_single = len(files) == 1 and not has_tables and not lines
    # compressed text is about three times as long as its file
    size = sum(_size(f)[0] * (3 if _is_compressed(f) else 1) for _, f in files)
    return Corpus(short[:40], source, is_single, read, bytes=size, first=first, left_out=left_out)


def _below(root, path):
    """The name of a file below a folder, with slashes on every machine."""
    try:
        return Path(os.path.relpath(path, root)).as_posix()
    except ValueError:  # a glob of another drive of Windows
        return Path(path).as_posix()


def _where(spec, path):
    """How a message about a file of the corpus begins."""
    return f"corpus={spec}" + (f": {path}" if path != os.path.expanduser(spec) else "")


def _holds_json_lines(path):
    """True where the first lines of a file, two or more of them, are JSON objects."""
    try:
        with _open(path) as file:
            found = [json.loads(line) for line in itertools.islice(file, 10) if line.strip()]
    except (OSError, ValueError, RecursionError):
        return False
    return len(found) > 1 and all(isinstance(row, dict) for row in found)


def _is_file(path):
    """True for a regular file, and for a link to nothing, which is refused when it is read; false for a pipe or a
    device, which could be read for ever."""
    return os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


def _size(path):
    """(bytes, time of the last change in ns) of a file; zeros where it is gone, which is refused when it is read."""
    try:
        stat = os.stat(path)
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def _suffix(path):
    """The suffix that says what is in a file: .jsonl of x.jsonl.gz."""
    return os.path.splitext(re.sub(r"\.(gz|zst)$", "", path.lower()))[1]


def _is_compressed(path):
    return path.lower().endswith((".gz", ".zst", ".parquet"))


def _ids(spec, files, dtype, vocab_size, start):
    """The ids of token files in nanoGPT's form, bare numbers, as one sequence.

    Args:
        files: (path, bytes, time of its last change) of each, in order. dtype: np.dtype of an id.
        start: number of the first id that is wanted.

    Returns:
        (number of ids in all the files, iterator over arrays of those from `start` on).

    Raises:
        ValueError: a file of another width, cut off, or with an id that is not below vocab_size.
    """
    form = f"{dtype.name} numbers, as a tokenizer of {vocab_size:,} symbols has them"
    for path, n_bytes, _ in files:
        if n_bytes == 0 or n_bytes % dtype.itemsize:
            raise ValueError(
                f"{_where(spec, path)}: {n_bytes:,} bytes are no token ids ({form}): make the file whole, "
                "or give another path"
            )

    def pieces():
        before = 0  # ids of the files before this one
        for path, n_bytes, changed in files:
            count = n_bytes // dtype.itemsize
            for at in range(max(start - before, 0), count, IDS_AT_ONCE):
                ids = _ids_at(spec, path, at, min(IDS_AT_ONCE, count - at), dtype)
                if ids.max() >= vocab_size:
                    wrong = int(np.argmax(ids >= vocab_size))
                    raise ValueError(
                        f"{_where(spec, path)}: the id {ids[wrong]:,} at position {at + wrong:,}, but the "
                        f"tokenizer has only {vocab_size:,} symbols: give the tokenizer that made the "
                        f"ids, and these as {dtype.name} without a header"
                    )
                if at == 0 and (what := _resembles(ids)):
                    raise ValueError(f"{_where(spec, path)}: looks like {what}: write the ids as {form}")
                yield ids
            if _size(path) != (n_bytes, changed):
                raise ValueError(f"{_where(spec, path)}: has changed while it was read: begin again when it is done")
            before += count

    return sum(n_bytes for _, n_bytes, _ in files) // dtype.itemsize, pieces()


def _resembles(ids):
    """What the beginning of a file is that would pass for ids; None of true ones."""
    head = ids[:4096].tobytes()
    if head.startswith(b"\x93NUMPY"):
        return "a file of numpy.save, which has a header (ids.tofile(path) writes none)"
    if len(head) > 64 and not head.translate(None, bytes(range(32, 127)) + b"\t\r\n"):
        return "text"
    if len(ids) > 64 and ids[::2].any() and not ids[1::2].any():
        return "wider numbers, for every second id is 0"
    return None


def _ids_at(spec, path, at, count, dtype):
    ids = np.empty(count, dtype)
    try:
        with open(path, "rb") as file:
            file.seek(at * dtype.itemsize)
            problem = None if file.readinto(ids) == ids.nbytes else "has become shorter"
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise ValueError(f"{_where(spec, path)}: {problem}: make the file whole, or give another path")
    return ids


def _whole(spec, path, bad):
    """The one document of a plain text file."""
    with _open(path) as file:
        raw = file.read()
    try:
        yield _decode(spec, raw, path).removeprefix("\ufeff")  # a byte order mark is no text
    except ValueError as error:
        if bad is _refuse:  # its message has a remedy of its own
            raise
        bad(str(error))


def _rows(spec, path, column, bad):
    """The documents of a file that holds many: a row of a table each, or a line of plain text."""
    suffix = _suffix(path)
    if suffix == ".parquet":
        yield from _parquet_rows(spec, path, column, bad)
    elif suffix in (".csv", ".tsv"):
        with _open(path) as raw:
            csv.field_size_limit(2**31 - 1)
            # (Excel begins with a byte order mark; bytes that are no UTF-8 are found row by row below)
            text = io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")
            # (strict, or a quote that is never closed takes the rest of the file for one text)
            rows = csv.reader(text, delimiter="," if suffix == ".csv" else "\t", strict=True)
            columns, line = None, 1  # the names of the first row, and where the row at hand begins
            while True:
                where = f"{_where(spec, path)}, line {line}"
                try:
                    row = next(rows)
                except StopIteration:
                    break
                except csv.Error as error:
                    bad(f"{where}: not CSV ({error}; is a quote left open?)")
                    row = []
                if columns is None:
                    if not row:
                        break
                    _check_column(spec, path, column, row)
                    columns, at = row, row.index(column)
                elif len(row) > len(columns):
                    bad(
                        f"{where}: a row of {len(row)} values, but the first line names {len(columns)} "
                        f"column{'s' * (len(columns) > 1)} (quote a text that holds the delimiter)"
                    )
                elif row and len(row) <= at:
                    bad(f"{where}: a row without {column}")
                elif row and not _is_unicode(row[at]):
                    bad(f"{where}: not UTF-8 text")
                elif row:
                    yield row[at]
                line = rows.line_num + 1
            if columns is None:
                bad(
                    f"{_where(spec, path)}, line 1: empty, so there is no column {column}, the text_column: begin "
                    "the file with a line of the columns' names"
                )
    else:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                where = f"{_where(spec, path)}, line {number}"
                try:
                    text = line.decode("utf-8")
                    text = text.removeprefix("\ufeff") if number == 1 else text  # a byte order mark is no text
                    if suffix in (".jsonl", ".ndjson"):
                        if not text.strip():
                            continue
                        row = json.loads(text)
                        text = row[column]
                        if not isinstance(text, str) or (rb"\u" in line and not _is_unicode(text)):
                            raise TypeError(f"{column} is no text")
                    else:
                        text = text.rstrip("\r\n")
                except UnicodeDecodeError as error:
                    bad(f"{where}: not UTF-8 text at byte {error.start} of the line")
                except json.JSONDecodeError as error:
                    bad(f"{where}: not JSON ({error.msg})")
                except (ValueError, RecursionError) as error:
                    bad(f"{where}: JSON that cannot be read ({_one_line(error)})")
                except (TypeError, KeyError, IndexError):
                    if number == 1 and bad is _refuse and isinstance(row, dict):
                        _check_column(spec, path, column, list(row))
                    bad(f"{where}: no object with a text in {column}")
                else:
                    yield text


def _parquet_rows(spec, path, column, bad):
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open(path, "rb"):  # to learn the system's own reason where it cannot be
        pass
    try:
        with pq.ParquetFile(path) as file:
            _check_column(spec, path, column, file.schema_arrow.names)
            kind = file.schema_arrow.field(column).type
            held = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(held) or pa.types.is_large_string(held) or pa.types.is_string_view(held)):
                raise ValueError(f"{_where(spec, path)}: {column} holds {kind}, not text: give another text_column")
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for text in _texts(batch.column(0)):
                    number += 1
                    if text is None:
                        bad(f"{_where(spec, path)}, row {number}: nothing in {column}, or not UTF-8 text")
                    else:
                        yield text
    except (pa.ArrowException, OSError) as error:
        raise OSError(f"not a whole parquet file ({_one_line(error)})") from None


def _texts(column):
    """The values of an Arrow column as str; None where there is none or its bytes are no UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        pass

    def read(value):
        try:
            return value.as_py()
        except UnicodeDecodeError:
            return None

    return [read(value) for value in column]


def _is_unicode(text):
    """False where a text holds half of a surrogate pair, which no encoding can write."""
    try:
        text.encode("utf-8")
        return True
    except UnicodeEncodeError:
        return False


def _check_column(spec, path, column, columns):
    if columns.count(column) > 1:
        raise ValueError(
            f"{_where(spec, path)}: {columns.count(column)} columns are named {column}: rename all but "
            "one, or give another text_column"
        )
    if column not in columns:
        raise ValueError(
            f"{_where(spec, path)}: no column {column}; there are {', '.join(map(str, columns))}: give text_column"
        )


def _one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def _open(path):
    """A file as bytes, decompressed where its name ends in .gz or .zst."""
    if not path.lower().endswith((".gz", ".zst")):
        with open(path, "rb") as file:
            yield file
        return
    import pyarrow as pa

    compression = "gzip" if path.lower().endswith(".gz") else "zstd"
    with open(path, "rb"):  # to learn the system's own reason where it cannot be
        pass
    try:
        with pa.CompressedInputStream(pa.OSFile(path), compression) as stream:
            yield io.BufferedReader(stream)
    except (pa.ArrowException, OSError) as error:
        raise OSError(f"not a whole {compression} file ({_one_line(error)})") from None


def _python():
    """The source of the running interpreter's standard library: real text with no network, some 10 MB."""
    root = sysconfig.get_path("stdlib")
    if not os.path.isfile(os.path.join(root, "os.py")):
        raise ValueError(
            f"corpus=python: this Python has no library sources in {root}: take "
            "corpus=shakespeare or the path of some text"
        )

    def read(split, bad):
        for file in _walk(root, PYTHON_SKIPPED):
            if file.endswith(".py") and not os.path.basename(file).startswith("_sysconfigdata"):
                try:
                    yield _read(file).decode("utf-8").replace("\r\n", "\n")  # as Windows' Python has them
                except UnicodeDecodeError:  # lib2to3 has files in other encodings, as fixtures
                    continue

    version = platform.python_version()
    return Corpus(f"python-{version}", {"kind": "python", "name": "python", "revision": version}, False, read)


def _walk(root, skipped=None):
    """The files below `root` that are not hidden, in one order on every machine."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".") and not (skipped and skipped.fullmatch(f))]
        found += [os.path.join(folder, f) for f in files if not f.startswith(".")]
    return sorted(found, key=lambda f: Path(f).parts)


def _read(path):
    with open(path, "rb") as file:
        return file.read()


def _decode(spec, raw, path=None):
    """UTF-8 bytes as str, character for character: line ends stay as they are."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{_where(spec, path or spec)}: not UTF-8 text at byte {error.start}: convert it "
            "(iconv -t utf-8), or leave that file out"
        ) from None


def _fetch(name, url, sha256):
    """The bytes behind a URL, kept in the cache folder and checked each time that they are read."""
    cache = os.environ.get("NANOGPT_ACCEL_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "nanogpt_accel"
    )
    path = os.path.join(cache, f"{name}.txt")
    if os.path.isfile(path):
        raw = _read(path)
        if hashlib.sha256(raw).hexdigest() == sha256:
            return raw
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            raw = answer.read()
    except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
        reason = getattr(error, "reason", None) or error
        raise ValueError(
            f"corpus={name}: cannot download {url} ({reason}): with a copy of that file, give its path as corpus=PATH"
        ) from None
    got = hashlib.sha256(raw).hexdigest()
    if got != sha256:
        raise ValueError(
            f"corpus={name}: {url} has changed: its SHA-256 is {got}, expected {sha256}: with a "
            "copy of the right file, give its path as corpus=PATH"
        )
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        os.makedirs(cache, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(raw)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(
            f"corpus={name}: cannot keep the download in {cache} ({error.strerror}): set "
            "NANOGPT_ACCEL_CACHE to a folder that can be written"
        ) from None
    return raw


def _hub(spec, found):
    """The Corpus of a Hub data set. Nothing is asked of the Hub before the text or the splits are."""
    source = {
        "kind": "hub",
        "name": spec,
        "id": found.id,
        "config": found.config,
        "revision": found.revision,
        "column": found.column,
        "splits": dict(found.splits),
    }

    def pin(commit):
        if re.fullmatch("[0-9a-f]{40}", found.revision or ""):
            return corpus  # the revision is a commit, and a pinned one asks the Hub nothing
        commit = commit or _newest_commit(spec, found)
        return replace(_hub(spec, replace(found, revision=commit)), source=source | {"commit": commit})

    def splits():
        if "val" in found.splits or spec in HUB:
            return tuple(found.splits)
        from datasets import get_dataset_split_names

        with _hub_errors(spec, found):
            names = get_dataset_split_names(found.id, found.config, revision=found.revision)
        ours = {"val": ("validation", "val", "valid", "dev"), "test": ("test",)}
        for split, candidates in ours.items():
            if theirs := [name for name in candidates if name in names and name != found.splits["train"]]:
                found.splits[split] = theirs[0]
        return tuple(found.splits)

    def read(split, bad):
        from datasets import load_dataset

        with _hub_errors(spec, found):
            rows = load_dataset(
                found.id, found.config, split=found.splits[split], revision=found.revision, streaming=True
            )
            columns = rows.column_names or list(next(iter(rows), {}))
            if found.column in columns:
                rows = rows.select_columns([found.column]).with_format("arrow")
        _check_column(spec, found.id, found.column, columns)
        texts = _hub_texts(spec, found, rows, bad)
        return GROUPED[found.grouped](texts) if found.grouped else texts

    short = re.sub(r"[^\w.-]+", "-", spec.removeprefix("hub:"), flags=re.ASCII)
    short += f"-{found.config}" if spec.startswith("hub:") and found.config else ""
    corpus = Corpus(short[:60], source, False, read, splits, pin=pin)
    return corpus


def joined_text(name, split):
    """A built-in set of the Hub as one str, its rows joined by empty lines: how transformers' guide to perplexity and
    what was published after it read raw WikiText-2.

    Raises:
        ValueError: no such set, or the Hub cannot be read.
    """
    if name not in HUB or split not in HUB[name].splits:
        raise ValueError(
            f"text={name}: no such file, and no built-in set with a {split} split; there are "
            f"{', '.join(known for known in HUB if split in HUB[known].splits)}"
        )
    return "\n\n".join(_hub(name, replace(HUB[name], grouped=None)).read(split, None))


def _newest_commit(spec, found):
    """The commit that a branch or a tag means now."""
    from huggingface_hub import HfApi

    with _hub_errors(spec, found):
        return HfApi().dataset_info(found.id, revision=found.revision).sha


def _hub_texts(spec, found, rows, bad):
    with _hub_errors(spec, found):
        number = 0
        for table in rows.iter(batch_size=1000):  # as Arrow tables, ten times as fast as row by row
            for text in _texts(table.column(found.column)):
                number += 1
                if isinstance(text, str):
                    yield text
                else:
                    bad(f"corpus={spec}: row {number}: no text in {found.column}")


@contextmanager
def _hub_errors(spec, found):
    """Turn what the Hub's clients raise, errors of five libraries, into one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("corpus="):
            raise
        where = (
            found.id
            + (f" ({found.config})" if found.config else "")
            + (f" at {found.revision}" if found.revision else "")
        )
        raise ValueError(
            f"corpus={spec}: cannot read {where} from the Hugging Face Hub "
            f"({type(error).__name__}: {_one_line(error)}): look at its name, dataset_config, "
            "dataset_split, the network, HF_HUB_OFFLINE and HF_ENDPOINT (a gated set wants `hf auth "
            "login`), or give a path as corpus=PATH"
        ) from error


def _articles(rows):
    """Of WikiText, whose rows are lines: the articles, each from a heading of the first level (` = Title = `) on."""
    lines = []
    for row in rows:
        if re.fullmatch(r" = [^=].*[^=] = \n?| = [^=] = \n?", row) and lines:
            yield "".join(lines)
            lines = []
        lines.append(row)
    yield "".join(lines)


def _sentences(rows, count=1024):
    """Of BookCorpus, whose rows are sentences in order, but without a sign where a book ends: pieces of so many."""
    lines = []
    for row in rows:
        lines.append(row)
        if len(lines) == count:
            yield "\n".join(lines)
            lines = []
    yield "\n".join(lines)


GROUPED = {"articles": _articles, "sentences": _sentences}
