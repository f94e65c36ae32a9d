"""Format numbers and errors for messages and for JSON."""

import json
import math
import os
import re
import shlex
import subprocess
import sys

# control characters (except tab, line feed and carriage return), Unicode line separators, and surrogates
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def counted(number, noun):
    """Return a number with its noun: 1 document, 2,000 documents."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def short(number):
    """Return a number with a suffix: 12.3M for 12,345,678."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def data_size(n_bytes):
    """Return a number of bytes in MB, or in kB if it is below 1 MB."""
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:,.1f} kB"


def duration(seconds):
    """Format seconds as 2:05, 1:02:05 or 3d 1:02:05."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    text = f"{hours}:{minutes:02}:{seconds:02}" if hours or days else f"{minutes}:{seconds:02}"
    return f"{days}d {text}" if days else text


def aligned(rows):
    """Return the rows of a table as lines of text in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def first_line(error):
    """Return the first line of an error's message, or its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(error, limit=200):
    """Return an error's message as one line of at most `limit` characters, or its type if it has no message."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def to_json(value, indent=None):
    """Return a value as JSON. NaN and infinite numbers become null, because JSON has no such numbers."""

    def finite(value):
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), indent=indent)


def quoted(word):
    """Return a path or another word as it must be written in a command line, with quotes if it needs them."""
    return subprocess.list2cmdline([str(word)]) if os.name == "nt" else shlex.quote(str(word))


def printable(text):
    r"""Escape the control characters in a text (ESC becomes \x1b), so that a terminal does not execute them."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def encoding_problem(name):
    """Return why a path or another argument cannot be used, or None.

    The argument must have the same bytes in the encoding of the system as in UTF-8, because libraries in Rust and C++
    use UTF-8 for paths.
    """
    encoding = sys.getfilesystemencoding()
    try:
        if os.fsencode(name) == name.encode():
            return None
    except UnicodeEncodeError:  # bytes that are not UTF-8 or, in a C locale, characters that are not ASCII
        pass
    if encoding != "utf-8":
        return f"cannot be used with the encoding {encoding} of this locale; set PYTHONUTF8=1"
    return "must be UTF-8; use another name"


def file_name(text):
    """Make a text usable as a file name: replace all characters except letters, digits, _, . and - with -."""
    return re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII)
