"""Console output: live lines in a terminal or notebook, nanoGPT-style lines in a log file."""

import atexit
import multiprocessing
import os
import sys
import threading
import time
from contextlib import contextmanager, suppress

from ..utils.text import counted, data_size, duration, one_line, printable

LINES_INTERVAL_S = 0.1  # printing above a live line takes a millisecond, so fast steps are printed together


class Console:
    """Print on the main process only.

    In a terminal, a live line shows the progress, and other lines appear above it. In a notebook, one output of the
    cell shows the progress, and steps are not printed. Otherwise, everything is printed as lines.

    enabled: whether this is the main process. quiet: print only warnings and lines with always=True.
    stderr: print to stderr, to keep stdout for results.
    """

    def __init__(self, enabled=True, quiet=False, stderr=False):
        self.enabled, self.quiet, self.stderr = enabled, quiet, stderr
        self.is_verbose = enabled and not quiet
        stream = sys.stderr if stderr else sys.stdout
        self.is_notebook = is_notebook()
        self.is_terminal = not self.is_notebook and is_terminal(stream)
        # on Windows, the encoding of a log file lacks some characters, which are printed as question marks
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self.live = None  # rich's progress display, if there are live lines
        self._waiting, self._lines_printed = "", 0.0  # text to print before the next text; when steps were last printed
        self._lock = threading.RLock()  # checkpoints are saved and pushed by threads, which also print

    def say(self, text="", always=False):
        """Print a line. If `quiet` is set, only print warnings (`warning: ...`) and lines with always=True."""
        if self.enabled and (always or not self.quiet or text.startswith("warning:")):
            self._print(text)

    __call__ = say  # so that a Console can be passed as a function that prints a line

    def write(self, text):
        """Print text without a newline, for samples that are generated token by token. Outside of a terminal, keep the
        text and print it together with the next line, because a notebook shows each print as a separate output."""
        if self.is_verbose and self.is_terminal:
            self._print(text, end="")
        elif self.is_verbose:
            with self._lock:
                self._waiting += text

    @contextmanager
    def optional(self, problem):
        """Print an exception of the `with` block as a warning, because an optional result must not end a run."""
        try:
            yield
        except Exception as error:
            self._print_waiting()  # for example, the tokens of a sample before the error
            self.say(f"warning: {problem} ({one_line(error)})")

    # ---- training

    def start(self, first_step, last_step, eval_interval, is_compiled=False):
        """Start the progress display for the steps from first_step to last_step.

        eval_interval: steps between evaluations. is_compiled: whether the first step includes compilation time.
        """
        self.first_step, self.last_step, self.eval_interval = first_step, last_step, eval_interval
        self.is_compiled, self.is_total_printed = is_compiled, False
        self.start_time, self.last_report = time.perf_counter(), None
        self.timed_steps, self.seconds, self.evaluation_seconds = 0, 0.0, 0.0  # excluding the first report
        self.line = self.open_line("step", last_step, first_step, f"{first_step:,}/{last_step:,}", stays=True)
        if is_compiled:
            self.say("compiling: the first step takes a while")

    def step(self, step, loss, seconds, tokens_per_second, mfu, notes=()):
        """Report a finished step. loss: nats per token. seconds: time per step. notes: appended to the line."""
        done, elapsed, left = step + 1, time.perf_counter() - self.start_time, ""
        if self.last_report is not None:  # the time of the first report includes compilation and allocation
            self.timed_steps += done - self.last_report
            self.seconds += seconds * (done - self.last_report)
            left = f", {duration(self._remaining(done))} left" if done < self.last_step else ""
        elif self.is_compiled:
            self.say(f"compiled: step {step} finished after {duration(elapsed)}")
        self.last_report = done
        if self.timed_steps >= 5 and not self.is_total_printed:
            self.is_total_printed = True
            total = elapsed + self._remaining(done)
            if total >= 60:
                first = f" since step {self.first_step:,}" if self.first_step else ""
                self.say(f"time: about {duration(total)} in total{first}")
        speed = f"{tokens_per_second:,.0f} tokens/s" + (f", mfu {mfu:.2%}" if mfu is not None else "")
        speed += "".join(f", {note}" for note in notes)
        line = f"iter {step}: loss {loss:.4f}, time {seconds * 1000:.2f}ms, {speed}"
        if self.live is None:
            self.say(line + left)
            return
        # narrow terminals cut off the live line, so the least important numbers come last
        text = f"{done:,}/{self.last_step:,}, loss {loss:.4f}{left}, {speed}"
        self.update_line(self.line, done, text)
        if self.is_terminal:
            with self._lock:
                self._waiting += line + "\n"
            if time.monotonic() - self._lines_printed > LINES_INTERVAL_S:
                self._lines_printed = time.monotonic()
                self._print_waiting()

    @contextmanager
    def evaluating(self, n_batches):
        """Yield a Progress for an evaluation. Measure the evaluation's duration, to estimate the remaining time."""
        start_time = time.perf_counter()
        with Progress("evaluating", n_batches, self, "batches", interval=60) as progress:
            yield progress
        now, timed_batches = time.perf_counter(), progress.done - (progress.first or 0)
        self.evaluation_seconds = now - start_time
        if timed_batches:  # exclude the first batch, which may include compilation time
            self.evaluation_seconds = (now - progress.start_time) / timed_batches * n_batches

    def stop(self):
        """Stop the live display. Later lines are printed below it."""
        self._print_waiting()
        live, self.live = self.live, None
        if live is not None:
            with suppress(OSError):  # the terminal was closed
                live.stop()

    def _remaining(self, done):
        """Return the estimated seconds for the remaining steps and evaluations. done: number of finished steps."""
        evaluations = self.last_step // self.eval_interval - (done - 1) // self.eval_interval
        evaluations += self.last_step % self.eval_interval > 0  # the model is always evaluated after the last step
        return (self.last_step - done) * self.seconds / self.timed_steps + evaluations * self.evaluation_seconds

    # ---- live lines

    def open_line(self, name, total, done=0, text="", stays=False):
        """Add a live line below the existing live lines. Return its id, or None if live lines cannot be shown.

        total: number of items, None if unknown. done: finished items. text: printed after the bar.
        stays: keep the live lines visible after the display stops. Only used for the first live line of a display.
        """
        if not (self.is_verbose and (self.is_terminal or self.is_notebook)):
            return None
        try:
            if self.live is None:
                self.live = open_display(self.is_notebook, self.stderr, stays)
                self.live.start()
                atexit.register(self.stop)  # so that the cursor is visible again after an error
            return self.live.add_task(text, total=total, completed=done, name=name)
        except OSError:  # the terminal was closed
            self.stop()
            return None

    def update_line(self, line, done, text):
        """Set the number of finished items of a live line and the text after its bar."""
        if self.live is not None:  # None if the terminal was closed
            self.live.update(line, completed=done, description=text)

    def close_line(self, line):
        """Remove a live line. Stop the display when no live line remains."""
        if self.live is not None:
            self.live.remove_task(line)
            if not self.live.tasks:
                self.stop()

    # ---- printing

    def _print_waiting(self):
        with self._lock:
            if self._waiting:
                text, self._waiting = self._waiting.removesuffix("\n"), ""
                self._print(text)

    def _print(self, text, end="\n"):
        """Print text. Ignore errors such as a full disk, so that the run continues, but raise a BrokenPipeError."""
        with self._lock:
            text = printable(self._waiting + text).encode(self._encoding, "replace").decode(self._encoding)
            self._waiting = ""
            try:
                if self.is_terminal and end:
                    print_wrapped(text, self.live.console if self.live is not None else None, self.stderr)
                else:
                    print(text, end=end, flush=True, file=sys.stderr if self.stderr else sys.stdout)
            except BrokenPipeError:
                raise
            except OSError:
                if self.is_terminal:  # the terminal was closed, for example because the connection was lost
                    self.is_terminal = False
                    self.stop()


def is_terminal(stream):
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def is_notebook():
    """Return whether this process is the kernel of a notebook."""
    # the ranks of notebook_launcher are child processes of the kernel
    if "IPython" not in sys.modules or multiprocessing.parent_process() is not None:
        return False
    from rich.console import Console as Terminal

    return Terminal().is_jupyter


def open_display(in_notebook, stderr, stays):
    """Return a rich progress display, which is not started yet. stays: keep it visible after it is stopped."""
    from rich.console import Console as Terminal
    from rich.progress import BarColumn, TextColumn

    if in_notebook:
        from .notebook import NotebookProgress as Display
    else:
        from rich.progress import Progress as Display
    columns = TextColumn("{task.fields[name]}"), BarColumn(16), TextColumn("{task.description}", markup=False)
    return Display(*columns, console=Terminal(stderr=stderr), redirect_stdout=not stderr, transient=not stays)


def print_wrapped(text, terminal=None, stderr=False):
    """Print text to a terminal, with line breaks between words.

    Indented lines are not wrapped: they are commands, and a command that is copied must not contain a line break.
    terminal: the rich Console of the live display, or None.
    """
    from rich.console import Console as Terminal
    from rich.text import Text

    terminal = terminal or Terminal(stderr=stderr)
    for line in text.split("\n"):
        terminal.print(Text(line), soft_wrap=line.startswith(" "))


class Progress:
    """Show the progress of a task: a live line in a terminal, otherwise a new line every few seconds.

        with Progress("evaluating", 300, console, "batches") as progress:
            progress(20)  # 20 more batches

    total: number of items, None if unknown. report: a Console, or a function that prints a line. noun: name of the
    items in the text, such as "batches". interval: seconds between lines.
    """

    def __init__(self, name, total, report, noun="", interval=5):
        self.name, self.total, self.report, self.noun, self.interval = name, total, report, noun, interval
        self.done, self.first, self.line = 0, None, None
        self.last_shown = self.start_time = time.perf_counter()

    def __enter__(self):
        if isinstance(self.report, Console):
            self.line = self.report.open_line(self.name, self.total)
        return self

    def __exit__(self, *error):
        if self.line is not None:
            self.report.close_line(self.line)

    def __call__(self, count):
        """Report that `count` more items are done."""
        self.done += count
        self._show()

    def _show(self):
        now = time.perf_counter()
        if self.first is None:  # excluded from the speed, because it may include warm-up or an earlier attempt
            self.first, self.start_time = self.done, now
        if now - self.last_shown < (0.2 if self.line is not None else self.interval):
            return
        self.last_shown, seconds = now, now - self.start_time
        rate = (self.done - self.first) / seconds if seconds else 0
        text = self._text(seconds, rate)
        if self.total and rate:
            text += f", about {duration(max(self.total - self.done, 0) / rate)} left"
        if self.line is not None:
            self.report.update_line(self.line, self.done, text)
        else:
            self.report(f"{self.name}: {text}")

    def _text(self, seconds, rate):
        return f"{self.done:,} of {self.total:,} {self.noun}"


class TextProgress(Progress):
    """Show the progress of tokenization. total: approximate size of the text in bytes, None if unknown."""

    def __call__(self, documents, bytes, tokens):
        """Report the total documents, bytes and tokens so far, including those of interrupted attempts."""
        if self.first is None:
            self.first_documents = documents
        self.documents, self.done, self.tokens = documents, bytes, tokens
        self._show()

    def _text(self, seconds, rate):
        documents_rate = (self.documents - self.first_documents) / seconds if seconds else 0
        return (
            f"{counted(self.documents, 'document')} ({documents_rate:,.0f}/s), "
            f"{data_size(self.done)} ({data_size(rate)}/s), {counted(self.tokens, 'token')}"
        )
