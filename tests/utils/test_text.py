"""text.py: durations, sizes and counts for people."""

import re
import shlex
import unicodedata
from datetime import timedelta

import pytest

from nanogpt_accel.utils.text import duration, printable, quoted


@pytest.mark.parametrize("seconds", [0, 1, 59, 60, 61, 125, 3599, 3600, 3725, 86399, 86400, 90061, 263125, 8640000])
def test_duration_can_be_read_back(seconds):
    text = duration(seconds)
    match = re.fullmatch(r"(?:(\d+)d )?(?:(\d+):)?(\d+):(\d\d)", text)
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    assert timedelta(days=days, hours=hours, minutes=minutes, seconds=rest).total_seconds() == seconds
    assert hours < 24 and minutes < 60 and rest < 60
    assert match[1] is not None or seconds < 86400
    if seconds >= 3600:
        assert len(match[3]) == 2


def test_duration_examples():
    assert [duration(s) for s in (0.4, 5, 59.6, 125, 3725, 263_125)] == [
        "0:00",
        "0:05",
        "1:00",
        "2:05",
        "1:02:05",
        "3d 1:05:25",
    ]


@pytest.mark.parametrize("word", ["runs/a", "runs/with space", "My Drive/it's", "$HOME", "a;b", "ROMEO:", "näive"])
def test_quoted_words_can_be_pasted(word):
    assert shlex.split(f"nanogpt-accel train {quoted(word)} max_iters=2")[2] == word
    assert quoted("runs/a") == "runs/a"


def test_printable_text_has_no_control_characters():
    """Those of C0 and C1, except white space; line separators; and lone surrogates, which are undecodable bytes."""
    kinds = ("Cc", "Cs", "Zl", "Zp")
    controls = {chr(i) for i in range(0xFFFF) if unicodedata.category(chr(i)) in kinds} - set("\t\n\r")
    assert len(controls) == 62 + 2048 + 2
    text = "".join(map(chr, range(0xFFFF)))
    assert set(printable(text)) == set(text) - controls
    assert printable("\x1b[31mred\x07 \x9b2J \udcff") == r"\x1b[31mred\x07 \x9b2J \udcff"
    assert printable("a\u2028b\u2029c") == r"a\u2028b\u2029c"  # separate lines, as a line feed does
    assert printable("ü 漢 🙂 a\tb\r\nc") == "ü 漢 🙂 a\tb\r\nc"
