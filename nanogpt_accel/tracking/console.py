"""Console output: live lines in a terminal, nanoGPT-style lines in a log file."""

import atexit
import os
import sys
import time
from contextlib import contextmanager

from ..utils.text import counted, data_size, duration


class Console:
    """Print on the main process only.

    In a terminal, `step` updates a live progress line, and `say` prints above that line. Otherwise, both print lines.

    enabled: whether this is the main process. quiet: print only warnings and lines with always=True.
    stderr: print to stderr, to keep stdout for results.
    """

    def __init__(self, enabled=True, quiet=False, stderr=False):
        self.enabled, self.quiet, self.stderr = enabled, quiet, stderr
        self.is_verbose = enabled and not quiet
        self.live = None  # rich's progress display, if there are live lines

    def say(self, text="", always=False):
        """Print a line. If `quiet` is set, only print warnings (`warning: ...`) and lines with always=True."""
        if self.quiet and not always and not text.startswith("warning:"):
            return
        if self.live is not None:
            self.live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self.enabled:
            self._print(text)

    __call__ = say  # so that a Console can be passed as a function that prints a line

    def write(self, text):
        """Print text without a newline, for samples that are printed token by token."""
        if self.is_verbose:
            self._print(text, end="")

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
        """Report a finished step. loss: nats per token. seconds: per step. notes: texts at the end of the line."""
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
        if self.live is not None:  # narrow terminals cut off the line, so the least important numbers come last
            text = f"{done:,}/{self.last_step:,}, loss {loss:.4f}{left}, {speed}"
            self.live.update(self.line, completed=done, description=text)
        elif self.is_verbose:
            self._print(f"iter {step}: loss {loss:.4f}, time {seconds * 1000:.2f}ms, {speed}{left}")

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
        if self.live is not None:
            self.live.stop()
            self.live = None

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
        is_terminal = (sys.stderr if self.stderr else sys.stdout).isatty() and os.environ.get("TERM") != "dumb"
        is_terminal = is_terminal or self.live is not None  # its replacement of sys.stdout has no isatty before rich 15
        if not (self.is_verbose and is_terminal):
            return None
        if self.live is None:
            from rich.console import Console as Terminal
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Display

            terminal, bar = Terminal(stderr=self.stderr), BarColumn(bar_width=16)
            columns = TextColumn("{task.fields[name]}"), bar, TextColumn("{task.description}", markup=False)
            self.live = Display(*columns, console=terminal, redirect_stdout=not self.stderr, transient=not stays)
            self.live.start()
            atexit.register(self.stop)  # so that the cursor is visible again after an error
        return self.live.add_task(text, total=total, completed=done, name=name)

    def close_line(self, line):
        """Remove a live line. Stop the display when no live line remains."""
        if self.live is not None:
            self.live.remove_task(line)
            if not self.live.tasks:
                self.stop()

    def _print(self, text, end="\n"):
        """Print text. Ignore errors such as a full disk, so that the run continues, but raise a BrokenPipeError."""
        try:
            print(text, end=end, flush=True, file=sys.stderr if self.stderr else sys.stdout)
        except BrokenPipeError:
            raise
        except UnicodeEncodeError:  # on Windows, the encoding of a log file may not include all characters
            self._print(text.encode("ascii", "replace").decode(), end)
        except OSError:
            pass


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
            self.report.live.update(self.line, completed=self.done, description=text)
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
