"""Files to documents: plain text, lines, .jsonl, .csv and .parquet, also compressed. And .bin files to token ids.

A reader takes `spec`, the corpus for its messages, and `bad`, which is called with a line for each document that cannot
be read. To add a format of many documents per file, write a reader and add its suffix to READERS.
"""

import csv
import io
import json
import os
import re
from contextlib import contextmanager

import numpy as np

from ..utils.text import one_line
from .corpus import refuse, where

IDS_AT_ONCE = 2**22  # token ids that are read at a time


def suffix_of(path):
    """Return the suffix that tells the format: .jsonl for x.jsonl.gz."""
    return os.path.splitext(re.sub(r"\.(gz|zst)$", "", path.lower()))[1]


def file_state(path):
    """Return (bytes, time of the last change in ns) of a file; zeros if it is gone: reading it reports that."""
    try:
        stat = os.stat(path)
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def read_file(spec, path, column, lines, bad):
    """Yield the documents of a file.

    column: what has the text in formats with columns. lines: each line of a plain text file is a document.

    Raises:
        OSError: the file cannot be read or decompressed. ValueError: it lacks the column.
    """
    if reader := READERS.get(suffix_of(path)):
        return reader(spec, path, column, bad)
    return _read_lines(spec, path, bad) if lines else _read_whole(spec, path, bad)


def decode(spec, raw, path=None):
    """Return UTF-8 bytes as str, character for character: line ends stay as they are."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where(spec, path or spec)}: not UTF-8 text at byte {error.start}: convert it "
            "(iconv -t utf-8), or leave that file out"
        ) from None


def _read_whole(spec, path, bad):
    """Yield the one document of a plain text file."""
    with open_file(path) as file:
        raw = file.read()
    try:
        yield decode(spec, raw, path).removeprefix("\ufeff")  # a byte order mark is no text
    except ValueError as error:
        if bad is refuse:  # this message has a fix of its own
            raise
        bad(str(error))


def _numbered_lines(spec, path, bad):
    """Yield (number from 1, text) of each line of a file."""
    with open_file(path) as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                bad(f"{where(spec, path)}, line {number}: not UTF-8 text at byte {error.start} of the line")
                continue
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def _read_lines(spec, path, bad):
    for _, text in _numbered_lines(spec, path, bad):
        yield text.rstrip("\r\n")


def _read_jsonl(spec, path, column, bad):
    for number, line in _numbered_lines(spec, path, bad):
        if not line.strip():
            continue
        place = f"{where(spec, path)}, line {number}"
        try:
            row = json.loads(line)
            text = row[column]
            if not isinstance(text, str) or (r"\u" in line and not _is_unicode(text)):
                raise TypeError(f"{column} is no text")
        except json.JSONDecodeError as error:
            bad(f"{place}: not JSON ({error.msg})")
        except (ValueError, RecursionError) as error:
            bad(f"{place}: JSON that cannot be read ({one_line(error)})")
        except (TypeError, KeyError, IndexError):
            if number == 1 and bad is refuse and isinstance(row, dict):
                check_column(spec, path, column, list(row))
            bad(f"{place}: no object with a text in {column}")
        else:
            yield text


def _read_csv(spec, path, column, bad):
    rows = _csv_rows(spec, path, bad)
    _, columns = next(rows, (None, None))
    if not columns:
        bad(
            f"{where(spec, path)}, line 1: empty, so there is no column {column}, the text_column: begin "
            "the file with a line of the columns' names"
        )
        return
    check_column(spec, path, column, columns)
    at = columns.index(column)
    for place, row in rows:
        if len(row) > len(columns):
            bad(
                f"{place}: a row of {len(row)} values, but the first line names {len(columns)} "
                f"column{'s' * (len(columns) > 1)} (quote a text that holds the delimiter)"
            )
        elif row and len(row) <= at:
            bad(f"{place}: a row without {column}")
        elif row and not _is_unicode(row[at]):
            bad(f"{place}: not UTF-8 text")
        elif row:
            yield row[at]


def _csv_rows(spec, path, bad):
    """Yield (where it starts, values) of each row of a .csv or .tsv file; no values for a line that is not CSV."""
    csv.field_size_limit(2**31 - 1)
    with open_file(path) as raw:
        # Excel starts with a byte order mark; _read_csv finds bytes that are not UTF-8 row by row
        text = io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")
        # strict, or a quote that is never closed takes the rest of the file for one text
        rows = csv.reader(text, delimiter="," if suffix_of(path) == ".csv" else "\t", strict=True)
        while True:
            place = f"{where(spec, path)}, line {rows.line_num + 1}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                bad(f"{place}: not CSV ({error}; is a quote left open?)")
                row = []
            yield place, row


def _read_parquet(spec, path, column, bad):
    import pyarrow as pa
    import pyarrow.parquet as pq

    _check_opens(path)
    try:
        with pq.ParquetFile(path) as file:
            check_column(spec, path, column, file.schema_arrow.names)
            kind = file.schema_arrow.field(column).type
            held = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(held) or pa.types.is_large_string(held) or pa.types.is_string_view(held)):
                raise ValueError(f"{where(spec, path)}: {column} holds {kind}, not text: give another text_column")
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for text in arrow_texts(batch.column(0)):
                    number += 1
                    if text is None:
                        bad(f"{where(spec, path)}, row {number}: nothing in {column}, or not UTF-8 text")
                    else:
                        yield text
    except (pa.ArrowException, OSError) as error:
        raise OSError(f"not a whole parquet file ({one_line(error)})") from None


READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def arrow_texts(column):
    """Return the values of an Arrow column as str; None for a null and for bytes that are not UTF-8."""
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
    """Return False if a text has half of a surrogate pair, which no encoding can write."""
    try:
        text.encode("utf-8")
        return True
    except UnicodeEncodeError:
        return False


def check_column(spec, path, column, columns):
    """Raise ValueError unless exactly one of the columns has this name."""
    if columns.count(column) > 1:
        raise ValueError(
            f"{where(spec, path)}: {columns.count(column)} columns are named {column}: rename all but "
            "one, or give another text_column"
        )
    if column not in columns:
        raise ValueError(
            f"{where(spec, path)}: no column {column}; there are {', '.join(map(str, columns))}: give text_column"
        )


@contextmanager
def open_file(path):
    """Open a file as bytes, decompressed if its name ends in .gz or .zst."""
    if not path.lower().endswith((".gz", ".zst")):
        with open(path, "rb") as file:
            yield file
        return
    import pyarrow as pa

    compression = "gzip" if path.lower().endswith(".gz") else "zstd"
    _check_opens(path)
    try:
        with pa.CompressedInputStream(pa.OSFile(path), compression) as stream:
            yield io.BufferedReader(stream)
    except (pa.ArrowException, OSError) as error:
        raise OSError(f"not a whole {compression} file ({one_line(error)})") from None


def _check_opens(path):
    """Raise the system's own OSError if a file cannot be opened; Arrow's says less."""
    with open(path, "rb"):
        pass


# ---- token ids


def read_ids(spec, files, dtype, vocab_size, start):
    """Read token files in nanoGPT's form, bare numbers, as one sequence.

    Args:
        files: (path, bytes, time of its last change) of each, in order. dtype: of an id.
        start: number of the first id that is wanted.

    Returns:
        (number of ids in all the files, iterator over arrays of those from `start` on).

    Raises:
        ValueError: a file of another width, cut off, or with an id that is not below vocab_size.
    """
    dtype = np.dtype(dtype)
    form = f"{dtype.name} numbers, as a tokenizer of {vocab_size:,} symbols has them"
    for path, n_bytes, _ in files:
        if n_bytes == 0 or n_bytes % dtype.itemsize:
            raise ValueError(
                f"{where(spec, path)}: {n_bytes:,} bytes are no token ids ({form}): make the file whole, "
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
                        f"{where(spec, path)}: the id {ids[wrong]:,} at position {at + wrong:,}, but the "
                        f"tokenizer has only {vocab_size:,} symbols: give the tokenizer that made the "
                        f"ids, and these as {dtype.name} without a header"
                    )
                if at == 0 and (what := _resembles(ids)):
                    raise ValueError(f"{where(spec, path)}: looks like {what}: write the ids as {form}")
                yield ids
            if file_state(path) != (n_bytes, changed):
                raise ValueError(f"{where(spec, path)}: has changed while it was read: begin again when it is done")
            before += count

    return sum(n_bytes for _, n_bytes, _ in files) // dtype.itemsize, pieces()


def _resembles(ids):
    """Return what a file is whose first ids are no token ids; None for true ones."""
    head = ids[:4096].tobytes()
    if head.startswith(b"\x93NUMPY"):
        return "a file of numpy.save, which has a header (ids.tofile(path) writes none)"
    if len(head) > 64 and not head.translate(None, bytes(range(32, 127)) + b"\t\r\n"):
        return "text"
    if len(ids) > 64 and ids[::2].any() and not ids[1::2].any():
        return "wider numbers, for every second id is 0"
    return None


def _ids_at(spec, path, at, count, dtype):
    """Read `count` ids from position `at` of a file."""
    ids = np.empty(count, dtype)
    try:
        with open(path, "rb") as file:
            file.seek(at * dtype.itemsize)
            problem = None if file.readinto(ids) == ids.nbytes else "has become shorter"
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise ValueError(f"{where(spec, path)}: {problem}: make the file whole, or give another path")
    return ids
