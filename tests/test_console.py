"""console.py: plain lines in a file, a live line in a terminal, silence on the other processes."""

import io
import re
import sys
import time
from datetime import timedelta

import pytest

from nanogpt_accel.console import Console, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on where it is told to."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_plain_lines_where_no_terminal_is(capsys, clock):
    console = Console()
    console.start(0, 100)
    console.say("model: small [bold]x[/bold]")
    clock[0] += 8
    console.step(3, 2.34567, 0.01234, 9876.54, None)
    clock[0] += 2
    console.step(4, 2.0, 1.5, 1_234_567.8, 0.4321)
    console.stop()
    console.write("RO")
    console.write("MEO")
    console.say()
    assert capsys.readouterr().out.splitlines() == [
        "model: small [bold]x[/bold]",
        "iter 3: loss 2.3457, time 12.34ms, 9,877 tokens/s, 3:12 left",  # 4 steps in 8 s, 96 are left
        "iter 4: loss 2.0000, time 1500.00ms, 1,234,568 tokens/s, mfu 43.21%, 3:10 left",
        "ROMEO",
    ]


def test_the_time_left_counts_from_where_a_resumed_run_begins(capsys, clock):
    console = Console()
    console.start(90, 100)
    clock[0] += 30
    console.step(92, 1.0, 1.0, 1.0, None)  # 3 steps in 30 s, 7 are left
    assert capsys.readouterr().out.endswith(", 1:10 left\n")
    clock[0] += 70
    console.step(99, 1.0, 1.0, 1.0, None)
    assert capsys.readouterr().out.endswith(", 0:00 left\n")


def test_silent_where_disabled(monkeypatch, capsys):
    for stdout in (sys.stdout, Terminal()):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            console = Console(enabled=False)
            console.start(0, 10)
            console.say("hello")
            console.write("hello")
            console.step(0, 1.0, 1.0, 1.0, 0.5)
            console.stop()
        assert not isinstance(stdout, Terminal) or stdout.getvalue() == ""
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_live_line(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    console = Console()
    console.start(10, 50)
    long = "a line that is longer than the terminal is wide, " * 4 + "[bold]end[/bold]"
    console.say(long)
    console.step(29, 1.2345, 0.5, 6789.0, 0.25)
    console.stop()
    console.say("after")
    console.stop()  # once more does nothing
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert long in text  # neither cut nor wrapped nor read as markup
    assert "30/50" in text and "loss 1.2345, 6,789 tokens/s, mfu 25.00%" in text
    assert text.endswith("after\n")
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h")  # the cursor is back


@pytest.mark.parametrize("seconds", [0, 1, 59, 60, 61, 125, 3599, 3600, 3725, 86399, 86400, 90061, 263125, 8640000])
def test_duration(seconds):
    text = duration(seconds)
    match = re.fullmatch(r"(?:(\d+)d )?(?:(\d+):)?(\d+):(\d\d)", text)
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    assert timedelta(days=days, hours=hours, minutes=minutes, seconds=rest).total_seconds() == seconds
    assert hours < 24 and minutes < 60 and rest < 60
    assert match[1] is not None or seconds < 86400
    if seconds >= 3600:
        assert len(match[3]) == 2


def test_duration_as_it_is_read():
    assert [duration(s) for s in (0.4, 5, 59.6, 125, 3725, 263_125)] == [
        "0:00", "0:05", "1:00", "2:05", "1:02:05", "3d 1:05:25"]
