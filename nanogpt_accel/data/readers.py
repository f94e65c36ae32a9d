"""Read documents from text, .jsonl, .csv and .parquet files, compressed or not.

In all functions, `spec` is the corpus setting, for messages, and `bad` is called with a message for each document that
cannot be read. To add a format with many documents per file, write a reader and add it to READERS.
"""

import codecs
import csv
import functools
import io
import itertools
import json
import os
import re
from contextlib import contextmanager, suppress

from ..utils.text import counted, one_line, quoted
from .corpus import location, refuse
from .remote import is_remote, name_of, open_remote, remote_state

HEAD = 2**16  # bytes at the start of a file from which its format is recognized
CHUNK = 2**20  # bytes of plain text that are read at a time
# Matches a text up to the end of its last word that is followed by white space. The tokenizers that encode a text in
# chunks never have a token across this position.
WORD_END = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # first bytes -> compression
DELIMITERS = ",;\t|"
# first bytes of files that are not text -> what they contain, and the fix
OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive, so unpack it",
    b"\x1f\x8b": "gzip data inside a compressed file, so decompress it",
    b"BZh": "bzip2 data, so decompress it",
    b"\xfd7zXZ": "xz data, so decompress it",
    b"7z\xbc\xaf": "a 7z archive, so unpack it",
    b"PAR1": "parquet data, so give it the suffix .parquet",
    b"%PDF": "a PDF document, so convert it to text",
}


def suffix_of(path):
    """Return the suffix of a path without .gz or .zst: .jsonl for x.jsonl.gz."""
    return os.path.splitext(re.sub(r"\.(gz|zst)$", "", name_of(path).lower()))[1]


def file_state(path):
    """Return (bytes, modification time in ns) of a file, or (0, 0) if it is missing. read_file reports this later."""
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
    if has_rows(path):
        yield from READERS.get(suffix_of(path), _read_json)(spec, path, column, bad)
    elif lines:
        for _, text in _numbered_lines(spec, path, bad):
            yield text.rstrip("\r\n")
    else:
        try:
            yield "".join(read_text(spec, path))
        except ValueError as error:
            if bad is refuse:  # the message already contains a fix, and refuse() would add another one
                raise
            bad(str(error))


def read_text(spec, path):
    """Yield a plain text in chunks, so that it may be larger than the memory. A chunk ends at the end of a word.

    Raises OSError if the file cannot be read or decompressed, and ValueError if it is not UTF-8.
    """
    decoder, n_bytes, parts, is_last = codecs.getincrementaldecoder("utf-8")(), 0, [], False
    with open_file(path) as file:
        while not is_last:
            block = file.read(CHUNK)
            raw, is_last = decoder.getstate()[0] + block, len(block) < CHUNK
            try:
                text = decoder.decode(block, final=is_last)
            except UnicodeDecodeError as error:
                raise _not_utf8(spec, path, raw, n_bytes + len(block) - len(raw) + error.start) from None
            if n_bytes == 0:
                text = text.removeprefix("\ufeff")  # a byte order mark
            n_bytes += len(block)
            if not is_last and (end := WORD_END.match(text)):
                yield "".join([*parts, text[: end.end()]])
                parts, text = [], text[end.end() :]
            parts.append(text)
    yield "".join(parts)


def has_rows(path):
    """Return whether a file has rows with a text column, and is not plain text."""
    suffix = suffix_of(path)
    if suffix != ".json":
        return suffix in READERS
    with suppress(OSError), open_file(path) as file:  # read_file raises the error later
        return file.read(HEAD).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"[", b"{")
    return False


def looks_like_json(path):
    """Return whether a plain text file starts like JSON: an array of objects, or two lines with one object each."""
    with suppress(OSError), open_file(path) as file:
        head = file.read(HEAD)
        return bool(re.match(rb'\s*\[\s*\{\s*"', head)) or _has_json_lines(head)
    return False


def decode(spec, raw, path=None):
    """Decode UTF-8 without changing line endings. Raises ValueError if the bytes `raw` are not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(spec, path, raw, error.start) from None


def _not_utf8(spec, path, raw, position):
    """Return the error for a text that is not UTF-8. raw: bytes that include the first invalid byte. position: index of
    the invalid byte in the file. path: the file, or None if the text is not from a file."""
    fix = f"{how_to_convert(raw, path)}, or remove the file from the corpus" if path else "set `corpus` to a path"
    return ValueError(f"{location(spec, path or spec)}: not UTF-8 text at byte {position}; {fix}")


def how_to_convert(raw, path):
    """Return a message that says how to convert a file to UTF-8. raw: bytes that include the first invalid byte."""
    for magic, problem in OTHER_FORMATS.items():
        if raw.startswith(magic):
            return f"it contains {problem}"
    encoding, condition = "WINDOWS-1252", "if its encoding is WINDOWS-1252"
    try:
        raw.decode(encoding)
    except UnicodeDecodeError:
        encoding, condition = "ENCODING", "using its encoding (such as GB18030) as ENCODING"
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding, condition = "UTF-16", "because its encoding is UTF-16"
    if is_remote(path):
        condition, path = f"download it and, {condition}", os.path.basename(name_of(path))
    file, new = quoted(path), quoted(f"{path}.new")
    convert = f"iconv -f {encoding} -t UTF-8"
    command = f"{convert} {file} > {new} && mv {new} {file}"
    for suffix, tool in ((".gz", "gzip"), (".zst", "zstd")):
        if str(path).lower().endswith(suffix):
            command = f"{tool} -dc {file} | {convert} | {tool} -c > {new} && mv {new} {file}"
    return f"{condition}, convert it with `{command}`"


def _numbered_lines(spec, path, bad):
    """Yield (line number, text) for each line of a file, counting from 1."""
    with open_file(path) as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                problem = f"{location(spec, path)}, line {number}: not UTF-8 text at byte {error.start} of the line"
                bad(f"{problem} ({how_to_convert(line, path)})")
                continue
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def _read_jsonl(spec, path, column, bad):
    for number, line in _numbered_lines(spec, path, bad):
        if not line.strip():
            continue
        place = f"{location(spec, path)}, line {number}"
        try:
            row = json.loads(line)
            text = row[column] if column in row else _nested(row, column)
            if not isinstance(text, str) or (r"\u" in line and not _is_unicode(text)):
                raise TypeError
        except json.JSONDecodeError as error:
            bad(f"{place}: not JSON ({error.msg})")
        except (ValueError, RecursionError) as error:
            bad(f"{place}: the JSON cannot be read ({one_line(error)})")
        except (TypeError, KeyError, IndexError):
            if number == 1 and bad is refuse and isinstance(row, dict):
                check_column(spec, path, column, _keys(row))
            bad(f"{place}: not a JSON object with a string under the key {column}")
        else:
            yield text


def _read_json(spec, path, column, bad):
    """Yield the texts of a .json file, which is read into memory.

    The file may contain an array of objects or of strings, an object with such an array (text_column=KEY.COLUMN), an
    object with columns (as written by pandas), a single object, or one object per line.
    """
    with open_file(path) as file:
        raw = file.read().removeprefix(b"\xef\xbb\xbf")
    if _has_json_lines(raw):
        yield from _read_jsonl(spec, path, column, bad)
        return
    try:
        rows = json.loads(decode(spec, raw, path))
        rows = _array(rows) or rows
    except (json.JSONDecodeError, RecursionError) as error:
        return bad(f"{location(spec, path)}: not JSON ({one_line(error)})")
    prefix, columns = "", []
    if isinstance(rows, dict):
        key = column.partition(".")[0]
        arrays = {name: values for name, value in rows.items() if (values := _array(value))}
        columns = _keys({name: arrays[name][0] if name in arrays else value for name, value in rows.items()})
        if column not in rows and key in arrays:
            prefix = f"{key}."
        rows = arrays.get(column if column in rows else key, [rows])
    inner = column.removeprefix(prefix)
    for number, row in enumerate(rows, 1):
        try:
            text = row if isinstance(row, str) else row[inner] if inner in row else _nested(row, inner)
            if not isinstance(text, str) or not _is_unicode(text):
                raise TypeError
        except (TypeError, KeyError, IndexError):
            if number == 1 and bad is refuse and isinstance(row, dict):
                check_column(spec, path, column, columns or _keys(row))
            bad(f"{location(spec, path)}, item {number}: not a JSON object with a string under the key {column}")
        else:
            yield text


def _array(value):
    """Return a JSON array as a list. Also return a list for an object such as {"0": value, "1": value}, because pandas
    writes rows and columns in this form. Return None for other values."""
    if isinstance(value, dict) and all(map(str.isdecimal, value)):
        return list(value.values())
    return value if isinstance(value, list) else None


def _has_json_lines(raw):
    """Return whether the first two lines of a file are JSON objects."""
    lines = raw.lstrip().split(b"\n", 2)[:2]
    try:
        return len(lines) > 1 and all(isinstance(json.loads(line), dict) for line in lines)
    except (ValueError, RecursionError):
        return False


def _nested(row, column):
    """Return the value of a column such as content.text in nested dictionaries."""
    for key in column.split("."):
        row = row[key]
    return row


def _keys(row):
    """Return the possible values of the setting text_column for a JSON object. For {"content": {"text": ...}}, this is
    content.text."""
    columns = []
    for key, value in row.items():
        columns += [f"{key}.{name}" for name in _keys(value)] if isinstance(value, dict) else [key]
    return columns


def _read_csv(spec, path, column, bad):
    rows = _csv_rows(spec, path, column, bad)
    place, columns = next(rows, (f"{location(spec, path)}, line 1", None))
    if not columns:
        return bad(f"{place}: empty, but must contain the column names, such as {column}")
    if not _is_unicode("".join(columns)):
        raw = ",".join(columns).encode("utf-8", "surrogateescape")
        raise ValueError(f"{place}: not UTF-8 text; {how_to_convert(raw, path)}")
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
            raw = row[index].encode("utf-8", "surrogateescape")
            bad(f"{place}: not UTF-8 text ({how_to_convert(raw, path)})")
        elif row:
            yield row[index]


def _delimiter(header, column, usual):
    """Guess the delimiter of a table from its first line, which contains the names of the columns.

    Return `usual` if it gives a column named `column`. Otherwise, return another delimiter that gives this column. If
    there is none, return the delimiter that gives the most columns.
    """
    columns = {}
    for delimiter in (usual, *DELIMITERS):
        with suppress(csv.Error, StopIteration):
            columns[delimiter] = next(csv.reader([header], delimiter=delimiter, strict=True))
    if usual not in columns or column in columns[usual]:  # not in `columns` if a quoted name contains a line end
        return usual
    return max(columns, key=lambda delimiter: (column in columns[delimiter], len(columns[delimiter])))


def _csv_rows(spec, path, column, bad):
    """Yield (location, values) for each row of a .csv or .tsv file. The values of an invalid row are []."""
    csv.field_size_limit(2**31 - 1)
    with open_file(path) as raw:
        # files from Excel start with a byte order mark; with surrogateescape, _read_csv can report an invalid row
        text = io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")
        header = text.readline()
        # strict, because otherwise a missing quote would turn the rest of the file into one text
        delimiter = _delimiter(header, column, "," if suffix_of(path) == ".csv" else "\t")
        rows = csv.reader(itertools.chain([header] if header else [], text), delimiter=delimiter, strict=True)
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

    with _open(path) as raw:
        try:
            # with pre_buffer=True, the default, pyarrow keeps all data in memory until the file is closed
            with pq.ParquetFile(_arrow_file(raw, path), pre_buffer=False) as file:
                schema = file.schema_arrow
                check_column(spec, path, column, arrow_columns(schema))
                _check_text_column(spec, path, column, schema)
                number = 0
                for batch in file.iter_batches(batch_size=1024, columns=[column]):
                    for text in arrow_texts(arrow_column(batch, column)):
                        number += 1
                        if text is None:
                            bad(f"{location(spec, path)}, row {number}: column {column} is null or not UTF-8 text")
                        else:
                            yield text
        except (pa.ArrowException, OSError) as error:
            raise OSError(f"not a complete parquet file ({one_line(error)})") from None


def _check_text_column(spec, path, column, schema):
    """Raise ValueError if a column of an Arrow schema is not text. column: a name, or content.text for a struct."""
    import pyarrow as pa

    fields = [column] if column in schema.names else column.split(".")
    kind = functools.reduce(lambda kind, name: kind.field(name).type, fields[1:], schema.field(fields[0]).type)
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(values) or pa.types.is_large_string(values) or pa.types.is_string_view(values)):
        problem = f"{location(spec, path)}: column {column} contains {kind}, not text"
        raise ValueError(f"{problem}; set text_column to another column")


READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def arrow_columns(fields):
    """Return the possible values of the setting text_column for an Arrow schema, such as content.text for a struct."""
    import pyarrow as pa

    columns = []
    for field in fields:
        is_struct = pa.types.is_struct(field.type)
        columns += [f"{field.name}.{name}" for name in arrow_columns(field.type)] if is_struct else [field.name]
    return columns


def arrow_column(table, column):
    """Return a column of an Arrow table. For a field of a struct, column is a name such as content.text."""
    if column in table.schema.names:
        return table.column(column)
    import pyarrow.compute as pc

    name, *fields = column.split(".")
    return pc.struct_field(table.column(name), fields)


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
    """Raise ValueError unless exactly one column of a file is named `column`. columns: the names of all columns."""
    place, count = location(spec, path), columns.count(column)
    if count > 1:
        fix = "rename all but one, or set text_column to another column"
        raise ValueError(f"{place}: {count} columns are named {column}; {fix}")
    if not count:
        names = ", ".join(map(quoted, columns[:20])) + ", ..." * (len(columns) > 20)
        fix = f"set text_column to one of {names}" if columns else "it has no columns at all"
        raise ValueError(f"{place}: no column {column}; {fix}")


@contextmanager
def open_file(path):
    """Open a file as bytes, decompressed if it has the suffix or the first bytes of a gzip or zstd file."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(os.path.splitext(name_of(path))[1].lower())
    with _open(path) as file:
        compression = compression or COMPRESSED.get(file.peek(4)[:4]) or COMPRESSED.get(file.peek(2)[:2])
        if not compression:
            yield file
            return
        import pyarrow as pa

        try:
            with pa.CompressedInputStream(_arrow_file(file, path), compression) as stream:
                yield io.BufferedReader(stream)
        except pa.ArrowMemoryError as error:
            raise MemoryError(str(error)) from None
        except (pa.ArrowException, OSError) as error:
            raise OSError(f"not a complete {compression} file ({one_line(error)})") from None


def _open(path):
    """Open a file as bytes with Python, because the errors of open() are more precise than those of Arrow."""
    return open_remote(path) if is_remote(path) else open(path, "rb")


def _arrow_file(file, path):
    """Return an Arrow file for an open file. Arrow opens a local file again, because this makes reading faster."""
    import pyarrow as pa

    return pa.PythonFile(file, "r") if is_remote(path) else pa.OSFile(os.fsencode(path))
