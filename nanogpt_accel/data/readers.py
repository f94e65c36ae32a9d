"""Read documents from text, .jsonl, .csv and .parquet files, compressed or not.

In all functions, `spec` is the corpus setting, for messages, and `bad` is called with a message for each document that
cannot be read. To add a format with many documents per file, write a reader and add it to READERS.
"""

import csv
import io
import json
import os
import re
from contextlib import contextmanager, suppress

from ..utils.text import counted, one_line
from .corpus import location, refuse
from .remote import is_remote, name_of, open_remote, remote_state


def suffix_of(path):
    """Return the suffix of the format: .jsonl for x.jsonl.gz."""
    return os.path.splitext(re.sub(r"\.(gz|zst)$", "", name_of(path).lower()))[1]


def file_state(path):
    """Return (bytes, modification time in ns) of a file, or (0, 0) if it is missing; reading it reports the error."""
    if is_remote(path):
        return remote_state(path)
    try:
        stat = os.stat(path)
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def read_file(spec, path, column, lines, bad):
    """Yield the documents of a file.

    column: the text column, in formats with columns. lines: whether each line of a plain text file is a document.
    Raises OSError if the file cannot be read or decompressed, and ValueError if the column is missing.
    """
    if reader := READERS.get(suffix_of(path)):
        yield from reader(spec, path, column, bad)
    elif lines:
        for _, text in _numbered_lines(spec, path, bad):
            yield text.rstrip("\r\n")
    else:
        with open_file(path) as file:
            raw = file.read()
        try:
            yield decode(spec, raw, path).removeprefix("\ufeff")  # a byte order mark
        except ValueError as error:
            if bad is refuse:  # the message of decode() already contains a fix
                raise
            bad(str(error))


def decode(spec, raw, path=None):
    """Decode UTF-8 without changing line endings. Raises ValueError if the bytes `raw` are not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"{location(spec, path or spec)}: not UTF-8 text at byte {error.start}"
        raise ValueError(f"{problem}; convert it with iconv -t utf-8, or remove the file from the corpus") from None


def _numbered_lines(spec, path, bad):
    """Yield (line number, text) for each line of a file, counting from 1."""
    with open_file(path) as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                bad(f"{location(spec, path)}, line {number}: not UTF-8 text at byte {error.start} of the line")
                continue
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def _read_jsonl(spec, path, column, bad):
    for number, line in _numbered_lines(spec, path, bad):
        if not line.strip():
            continue
        place = f"{location(spec, path)}, line {number}"
        try:
            row = json.loads(line)
            text = row[column]
            if not isinstance(text, str) or (r"\u" in line and not _is_unicode(text)):
                raise TypeError
        except json.JSONDecodeError as error:
            bad(f"{place}: not JSON ({error.msg})")
        except (ValueError, RecursionError) as error:
            bad(f"{place}: the JSON cannot be read ({one_line(error)})")
        except (TypeError, KeyError, IndexError):
            if number == 1 and bad is refuse and isinstance(row, dict):
                check_column(spec, path, column, list(row))
            bad(f"{place}: not a JSON object with a string under the key {column}")
        else:
            yield text


def _read_csv(spec, path, column, bad):
    rows = _csv_rows(spec, path, bad)
    place, columns = next(rows, (f"{location(spec, path)}, line 1", None))
    if not columns:
        return bad(f"{place}: empty, so there is no column {column}; add a line of column names, or set text_column")
    check_column(spec, path, column, columns)
    index = columns.index(column)
    for place, row in rows:
        if len(row) > len(columns):
            bad(
                f"{place}: the row has {len(row)} values, but the first line has {counted(len(columns), 'column')} "
                "(values that contain the delimiter must be quoted)"
            )
        elif row and len(row) <= index:
            bad(f"{place}: the row has no value in column {column}")
        elif row and not _is_unicode(row[index]):
            bad(f"{place}: not UTF-8 text")
        elif row:
            yield row[index]


def _csv_rows(spec, path, bad):
    """Yield (location, values) for each row of a .csv or .tsv file. The values of an invalid row are []."""
    csv.field_size_limit(2**31 - 1)
    with open_file(path) as raw:
        # files from Excel start with a byte order mark; _read_csv reports bytes that are not UTF-8 row by row
        text = io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")
        # strict, because otherwise a missing quote would turn the rest of the file into one text
        rows = csv.reader(text, delimiter="," if suffix_of(path) == ".csv" else "\t", strict=True)
        while True:
            place = f"{location(spec, path)}, line {rows.line_num + 1}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                bad(f"{place}: not CSV ({error}; a closing quote may be missing)")
                row = []
            yield place, row


def _read_parquet(spec, path, column, bad):
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _open_for_arrow(path) as source:
        try:
            with pq.ParquetFile(source) as file:
                check_column(spec, path, column, file.schema_arrow.names)
                kind = file.schema_arrow.field(column).type
                values = kind.value_type if pa.types.is_dictionary(kind) else kind
                if not (
                    pa.types.is_string(values) or pa.types.is_large_string(values) or pa.types.is_string_view(values)
                ):
                    problem = f"{location(spec, path)}: column {column} contains {kind}, not text"
                    raise ValueError(f"{problem}; set text_column to another column")
                number = 0
                for batch in file.iter_batches(batch_size=1024, columns=[column]):
                    for text in arrow_texts(batch.column(0)):
                        number += 1
                        if text is None:
                            bad(f"{location(spec, path)}, row {number}: column {column} is null or not UTF-8 text")
                        else:
                            yield text
        except (pa.ArrowException, OSError) as error:
            raise OSError(f"not a complete parquet file ({one_line(error)})") from None


READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def arrow_texts(column):
    """Return the values of an Arrow column as str, with None for nulls and for bytes that are not UTF-8."""
    with suppress(UnicodeDecodeError):
        return column.to_pylist()
    texts = []
    for value in column:
        texts.append(None)
        with suppress(UnicodeDecodeError):
            texts[-1] = value.as_py()
    return texts


def _is_unicode(text):
    """Return whether a text has no lone surrogates, which UTF-8 cannot encode."""
    return text.encode("utf-8", "ignore").decode("utf-8") == text


def check_column(spec, path, column, columns):
    """Raise ValueError unless exactly one of the `columns` of a file is named `column`."""
    place, count = location(spec, path), columns.count(column)
    if count > 1:
        fix = "rename all but one, or set text_column to another column"
        raise ValueError(f"{place}: {count} columns are named {column}; {fix}")
    if not count:
        raise ValueError(f"{place}: no column {column}; set text_column to one of {', '.join(map(str, columns))}")


@contextmanager
def open_file(path):
    """Open a file as bytes, decompressed if its name ends in .gz or .zst."""
    name = name_of(path).lower()
    if not name.endswith((".gz", ".zst")):
        with open_remote(path) if is_remote(path) else open(path, "rb") as file:
            yield file
        return
    import pyarrow as pa

    compression = "gzip" if name.endswith(".gz") else "zstd"
    with _open_for_arrow(path) as source:
        try:
            with pa.CompressedInputStream(source, compression) as stream:
                yield io.BufferedReader(stream)
        except (pa.ArrowException, OSError) as error:
            raise OSError(f"not a complete {compression} file ({one_line(error)})") from None


@contextmanager
def _open_for_arrow(path):
    """Open a file with Arrow, which reads local files without Python."""
    import pyarrow as pa

    if is_remote(path):
        with open_remote(path) as file, pa.PythonFile(file, "r") as source:
            yield source
        return
    open(path, "rb").close()  # the OSError of open() is more precise than Arrow's
    with pa.OSFile(path) as source:
        yield source
