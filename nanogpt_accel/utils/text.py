"""Numbers and errors as text for people."""

import re


def counted(number, noun):
    """1 document, 2,000 documents."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def data_size(n_bytes):
    """Bytes as MB, or as kB where that is less than one."""
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:,.1f} kB"


def duration(seconds):
    """Seconds as 2:05, 1:02:05 or 3d 1:02:05."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    text = f"{hours}:{minutes:02}:{seconds:02}" if hours or days else f"{minutes}:{seconds:02}"
    return f"{days}d {text}" if days else text


def file_name(text):
    """Return a text as part of a file name: letters, digits, _, . and - stay, anything else becomes -."""
    return re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII)


def one_line(error):
    """Return the text of an error in one line of at most 200 characters, or its type if it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__
