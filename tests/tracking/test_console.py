"""console.py: plain lines in a file, a live line in a terminal, no output on the other processes."""

import builtins
import errno
import io
import multiprocessing
import os
import re
import sys
import time
import types

import pytest

from nanogpt_accel.tracking.console import Console, Progress, TextProgress
from nanogpt_accel.tracking.notebook import EMPTY
from nanogpt_accel.utils.text import duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(terminal):
    """Return the text that a terminal got, without control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())


@pytest.fixture
def terminals(monkeypatch):
    """Return a function that replaces stdout and stderr by terminals and returns both. A fixture could not replace them
    directly, because pytest replaces them after it."""

    def put():
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        out, err = Terminal(), Terminal()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        return out, err

    return put


@pytest.fixture
def clock(monkeypatch):
    """A list with the time, which only the test changes."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_output_to_a_file_is_plain_lines(capsys, clock):
    console = Console()
    console.start(0, 100, 1000)
    console.say("model: small [bold]x[/bold]")
    clock[0] += 8
    console.step(3, 2.34567, 0.01234, 9876.54, None)
    clock[0] += 2
    console.step(4, 2.0, 2, 1_234_567.8, 0.4321, ["spike"])
    console.stop()
    console.write("RO")
    console.write("MEO")
    console.say()
    assert capsys.readouterr().out.splitlines() == [
        "model: small [bold]x[/bold]",
        "iter 3: loss 2.3457, time 12.34ms, 9,877 tokens/s",  # the first step is not representative
        "iter 4: loss 2.0000, time 2000.00ms, 1,234,568 tokens/s, mfu 43.21%, spike, 3:10 left",  # 95 steps of 2 s
        "ROMEO",
    ]


@pytest.mark.parametrize("is_live", [False, True])
def test_control_characters_are_shown(terminals, is_live):
    """A generated text or the name of a file may contain escape sequences, such as one that clears the screen."""
    out, _ = terminals()
    console = Console()
    if is_live:
        console.open_line("step", 9)
    out.truncate(0)
    console.say("a sample: \x1b[2J\x1b]0;title\x07 \x9b2J \x08")
    console.write("\x1b[2J")
    console.stop()
    assert r"a sample: \x1b[2J\x1b]0;title\x07 \x9b2J \x08" in out.getvalue()
    assert "\x1b[2J" not in out.getvalue() and "\x1b]" not in out.getvalue() and "\x9b" not in out.getvalue()


def test_closed_stream_is_not_a_terminal(monkeypatch):
    """Under pythonw, sys.stdout and sys.stderr are None."""
    for stderr in (False, True):
        monkeypatch.setattr(sys, "stderr" if stderr else "stdout", None)
        console = Console(stderr=stderr)
        assert console.open_line("step", 9) is None
        console.say("a line")


@pytest.mark.parametrize("interval", [7, 10, 30, 1000])
def test_time_left_is_exact_if_steps_and_evaluations_keep_their_durations(capsys, clock, interval):
    """Steps take 3 s and evaluations 40 s; the first ones are slower."""
    console, first, last = Console(), 4, 50
    total = 900 + 3 * (last - first) + 40 * (2 + len([s for s in range(first + 1, last) if s % interval == 0]))
    console.start(first, last, interval, is_compiled=True)
    for step in range(first, last + 1):
        if step % interval == 0 or step == last or step == first:
            with console.evaluating(10) as progress:
                clock[0] += 4 + 300 * (step == first)
                progress(1)
                clock[0] += 36
                progress(9)
        if step < last:
            clock[0] += 3 + 600 * (step == first)
            console.step(step, 1.0, 3 + 600 * (step == first), 1.0, None)
            lines = capsys.readouterr().out.splitlines()
            if step == first:
                assert (
                    lines[:-1]
                    == [
                        "compiling: the first step takes a while",
                        "evaluating: 1 of 10 batches",
                        "compiled: step 4 finished after 15:43",
                    ]
                    and "left" not in lines[-1]
                )
            else:
                estimate = [f"time: about {duration(total)} in total since step 4"]
                assert lines[:-1] == estimate * (step == first + 5)
                left = f", {duration(total + 100 - clock[0])} left" if step + 1 < last else " tokens/s"
                assert lines[-1].endswith(left)
    assert clock[0] == 100 + total


def test_disabled_console_prints_nothing(monkeypatch, capsys):
    for stdout in (sys.stdout, Terminal()):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            console = Console(enabled=False)
            console.start(0, 10, 5)
            console.say("hello")
            console.write("hello")
            console.step(0, 1.0, 1.0, 1.0, 0.5)
            console.stop()
        assert not isinstance(stdout, Terminal) or stdout.getvalue() == ""
    assert capsys.readouterr() == ("", "")


def test_terminal_shows_a_live_line(terminals):
    terminal, _ = terminals()
    console = Console()
    console.start(10, 50, 5)
    console.say("neither [bold]markup[/bold] nor :smile:")
    console.step(29, 1.2345, 0.5, 6789.0, 0.25)
    console.stop()
    console.say("after")
    console.stop()  # a second stop does nothing
    text = shown(terminal)
    assert "neither [bold]markup[/bold] nor :smile:\n" in text
    assert "10/50" in text and "30/50, loss 1.2345, 6,789 tokens/s, mfu 25.00%" in text
    assert "iter 29: loss 1.2345, time 500.00ms, 6,789 tokens/s, mfu 25.00%\n" in text  # a line above the live line
    assert text.endswith("after\n")
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h")  # it reappears


@pytest.mark.parametrize("is_live", [True, False])
def test_lines_wrap_at_words_except_commands_and_long_words(terminals, monkeypatch, is_live):
    out, _ = terminals()
    monkeypatch.setenv("COLUMNS", "40")
    console = Console()
    if is_live:
        console.start(0, 50, 5)
    text = "word-with-hyphens " * 4, "  nanogpt-accel " + "runs/a " * 10, "/a/long/path" * 5, "", "wide \u4e2d" * 9
    console.say("\n".join(text))
    console.stop()
    lines = [line.rstrip() for line in shown(out).replace("\r", "\n").split("\n")]
    for line in ("word-with-hyphens word-with-hyphens", text[1].rstrip(), text[2][:40], text[2][40:]):
        assert line in lines
    assert "wide " + "\u4e2dwide " * 4 + "\u4e2dwide" in lines  # a wide character has two columns


def test_lines_of_fast_steps_are_printed_together(terminals, monkeypatch):
    """Each print redraws the live line, which takes a millisecond."""
    out, _ = terminals()
    now, prints = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = Console()
    console.start(0, 2000, 500)
    real = console._print
    console._print = lambda text, end="\n": (prints.append(text), real(text, end))
    for step in range(300):
        now[0] += 0.01
        console.step(step, 1.0, 0.01, 1.0, None)
        if step == 150:
            console.say("an evaluation")
    console.stop()
    assert len(prints) < 300 * 0.01 / 0.1 + 5
    shown_steps = re.findall(r"iter (\d+): loss|(an evaluation)", shown(out))
    expected = [(str(step), "") for step in range(300)]
    assert shown_steps == [*expected[:151], ("", "an evaluation"), *expected[151:]]


def test_closed_terminal_does_not_end_the_run(terminals):
    """For example, if the connection to the machine is lost, and nohup keeps the process running."""
    out, _ = terminals()
    console = Console()
    console.start(0, 50, 5)
    console.step(0, 1.0, 1.0, 1.0, None)

    def write(text):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    out.write = write
    console.say("text")
    with console.evaluating(10) as progress:
        progress(10)
    for step in range(1, 10):
        console.step(step, 1.0, 1.0, 1.0, None)
    console.stop()
    assert console.live is None and sys.stdout is out


def test_terminal_that_cannot_show_a_character_gets_question_marks(terminals, monkeypatch):
    out, _ = terminals()
    ascii_file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    ascii_file.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", ascii_file)
    console = Console()
    console.start(0, 50, 5)
    console.say("a \u2192 b")
    console.write("c \u2192 d")
    console.stop()
    ascii_file.flush()
    text = ascii_file.buffer.getvalue().decode("ascii")
    assert "a ? b" in text and "c ? d" in text


def test_error_of_an_optional_result_is_a_warning(capsys):
    with Console(quiet=True).optional("run/loss.png cannot be written"):
        raise RuntimeError("no\nfonts")
    assert capsys.readouterr().out == "warning: run/loss.png cannot be written (no fonts)\n"


# ---- notebooks


@pytest.fixture
def notebook(monkeypatch):
    """A replacement for IPython in the kernel of a notebook. Its value is a list with one list [content, ...] per
    output."""
    outputs = []

    class Handle:
        def __init__(self, content):
            self.contents = [content]
            outputs.append(self.contents)

        def update(self, content, raw=False):
            self.contents.append(content)

    ipython, module = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    module.display = lambda content, raw, display_id: Handle(content)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    kernel = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setattr(builtins, "get_ipython", lambda: kernel, raising=False)
    return outputs


def as_text(table):
    from rich.console import Console as Terminal

    terminal = Terminal(file=io.StringIO(), width=100, force_jupyter=False)
    terminal.print(table)
    return terminal.file.getvalue()


def test_notebook_shows_one_live_output_and_no_line_per_step(notebook, capsys, clock):
    console = Console()
    with Progress("preparing", 30, console, "documents") as progress:
        progress(10)
    console.start(0, 50, 5)
    console.say("a line")
    with console.evaluating(10) as progress:
        clock[0] += 1
        progress(10)
        console.live.refresh()
    for step in range(50):
        console.step(step, 1.0, 0.5, 6789.0, None)
    console.stop()
    preparing, training = notebook
    assert "preparing" in as_text(preparing[1]) and preparing[-1] == EMPTY  # removed at the end
    assert any("10 of 10 batches" in as_text(content) for content in training[1:])
    assert len(training) < 10  # not one update per step
    (line,) = as_text(training[-1]).splitlines()
    assert line.startswith("step") and "50/50, loss 1.0000, 6,789 tokens/s" in line  # this stays
    assert capsys.readouterr().out == "a line\n"


def test_notebook_and_file_get_a_sample_as_one_text(notebook, monkeypatch):
    prints = []
    monkeypatch.setattr(sys.stdout, "write", lambda text: prints.append(text))
    console = Console()
    console.say("A sample:")
    for character in "ROMEO:\nAy":
        console.write(character)
    console.say("\n---")
    assert [text for text in prints if text != "\n"] == ["A sample:", "ROMEO:\nAy\n---"]


def test_a_rank_of_a_notebook_prints_lines(notebook, monkeypatch, capsys):
    """notebook_launcher forks the ranks, which cannot write to the kernel's outputs."""
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    console = Console()
    console.start(0, 50, 5)
    console.step(0, 1.0, 0.5, 1.0, None)
    console.stop()
    assert notebook == [] and capsys.readouterr().out.startswith("iter 0: loss 1.0000")


# ---- other displays


def test_evaluation_has_its_own_live_line(terminals, clock):
    out, _ = terminals()
    console = Console()
    console.start(0, 50, 5)
    with console.evaluating(40) as progress:
        for _ in range(4):
            progress(10)
            clock[0] += 2
        console.live.refresh()
        lines = shown(out).splitlines()
        assert "0/50" in lines[-2] and lines[-1].startswith("evaluating")
        assert "40 of 40 batches, about 0:00 left" in lines[-1]
    console.step(0, 1.0, 0.5, 1.0, None)
    console.stop()
    *_, last = shown(out).splitlines()
    assert last.startswith("step") and "1/50" in last  # it stays, unlike that of the evaluation
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h")


def test_long_evaluation_is_logged_once_per_minute(capsys, clock):
    console = Console()
    console.start(0, 50, 5)
    with console.evaluating(200) as progress:
        for _ in range(100):
            clock[0] += 1
            progress(2)
    assert capsys.readouterr().out.splitlines() == ["evaluating: 120 of 200 batches, about 0:40 left"]


def test_progress_is_logged_every_few_seconds(clock):
    lines = []
    with Progress("evaluating", 1000, lines.append, "batches") as progress:
        clock[0] += 60  # the first report is not representative
        progress(10)
        for _ in range(99):
            clock[0] += 1
            progress(10)
    done = [int(line.split()[1]) for line in lines]
    assert lines[0] == "evaluating: 10 of 1,000 batches"
    assert lines[1:] == [f"evaluating: {n} of 1,000 batches, about {duration((1000 - n) / 10)} left" for n in done[1:]]
    assert done == list(range(10, 1000, 50))


def test_progress_of_resumed_work_of_unknown_size(clock):
    lines = []
    with TextProgress("train", None, lines.append) as progress:
        progress(documents=1000, bytes=50_000_000, tokens=9)  # from an earlier run
        clock[0] += 10
        progress(documents=1100, bytes=53_000_000, tokens=2000)
    assert lines == ["train: 1,100 documents (10/s), 53.0 MB (300.0 kB/s), 2,000 tokens"]


def test_live_line_of_progress_is_removed_at_the_end(terminals, clock):
    out, err = terminals()
    console = Console(stderr=True)
    with Progress("evaluating", 30, console, "batches") as progress:
        clock[0] += 1
        progress(10)
        console.live.refresh()
        console("warning: a line that stays")
        print("the result")
    console.say("after")
    assert console.live is None and out.getvalue() == "the result\n"  # stdout has only the result, for programs
    text = shown(err)
    assert "10 of 30 batches" in text and text.endswith("after\n") and "warning: a line that stays\n" in text
    assert err.getvalue().count("\x1b[?25l") == err.getvalue().count("\x1b[?25h")


@pytest.mark.parametrize("settings", [{"enabled": False}, {"quiet": True}])
def test_disabled_and_quiet_consoles_show_no_progress(terminals, clock, settings):
    out, err = terminals()
    console = Console(**settings)
    console.start(0, 50, 5, is_compiled=True)
    with Progress("evaluating", 30, console, "batches") as progress, console.evaluating(30) as other:
        for _ in range(30):
            clock[0] += 10
            progress(1), other(1)
    for step in range(10):
        console.step(step, 1.0, 100.0, 1.0, None)
    console.stop()
    assert out.getvalue() == err.getvalue() == ""


def test_dumb_terminal_gets_plain_lines(terminals, clock, monkeypatch):
    out, _ = terminals()
    monkeypatch.setenv("TERM", "dumb")
    console = Console()
    console.start(0, 50, 5)
    console.step(0, 1.0, 1.0, 1.0, None)
    assert out.getvalue() == "iter 0: loss 1.0000, time 1000.00ms, 1 tokens/s\n"
