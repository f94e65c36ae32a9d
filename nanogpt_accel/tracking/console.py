"""Console output: live lines in a terminal, nanoGPT-style lines in a log file."""

import atexit
import os
import sys
import time
from contextlib import contextmanager

from ..utils.text import counted, data_size, duration


class Console:
    """Prints for the main process and is silent on the others.

    In a terminal `step` moves one live progress line, and `say` prints above it; elsewhere both print lines. `quiet`
    leaves warnings and what is said with `always`. A console can stand where a function is asked for that takes a line.

    stderr: where stdout belongs to what the command is asked for.
    """

    def __init__(self, enabled=True, quiet=False, stderr=False):
        self.enabled, self.quiet, self.stderr = enabled, quiet, stderr
        self.is_heard = enabled and not quiet
        self.live = None  # rich's display, while there are live lines

    def __call__(self, text):
        self.say(text)

    def say(self, text="", always=False):
        """A line that stays. A warning begins with `warning:`."""
        if self.quiet and not always and not text.startswith("warning:"):
            return
        if self.live is not None:
            self.live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self.enabled:
            self._print(text)

    def write(self, text):
        """A piece of text without a line end, for samples that come word by word."""
        if self.is_heard:
            self._print(text, end="")

    # ---- training

    def start(self, first_step, last_step, eval_interval, is_compiled=False):
        """Begin the progress of steps first_step to last_step.

        eval_interval: steps between evaluations. is_compiled: whether torch.compile makes the first step a long one.
        """
        self.first_step, self.last_step, self.eval_interval = first_step, last_step, eval_interval
        self.is_compiled = is_compiled
        self.began, self.reported, self.is_estimated = time.perf_counter(), None, False
        self.counted, self.seconds, self.evaluation_seconds = 0, 0.0, 0.0  # steps after the first report, their time
        self.line = self.open_line("step", last_step, first_step, f"{first_step:,}/{last_step:,}", stays=True)
        if is_compiled:
            self.say("compiling: the first step takes a while")

    def step(self, step, loss, seconds, tokens_per_second, mfu, notes=()):
        """Report a step that is done. loss: nats a token; seconds: of one step; mfu: share of the peak or None."""
        done, gone, left = step + 1, time.perf_counter() - self.began, ""
        if self.reported is not None:  # the first report is no measure of speed: it has all that is done once
            self.counted += done - self.reported
            self.seconds += seconds * (done - self.reported)
            left = f", {duration(self._left(done))} left" if done < self.last_step else ""
        elif self.is_compiled:
            self.say(f"compiled: step {step} was done after {duration(gone)}")
        self.reported = done
        if self.counted >= 5 and not self.is_estimated:
            self.is_estimated = True
            if gone + self._left(done) >= 60:
                self.say(
                    f"time: about {duration(gone + self._left(done))} in all"
                    + (f" from step {self.first_step:,} on" if self.first_step else "")
                )
        speed = f"{tokens_per_second:,.0f} tokens/s" + (f", mfu {mfu:.2%}" if mfu is not None else "")
        notes = "".join(f", {note}" for note in notes)
        if self.live is not None:  # what a narrow terminal cuts off comes last
            self.live.update(
                self.line,
                completed=done,
                description=f"{done:,}/{self.last_step:,}, loss {loss:.4f}{left}, {speed}{notes}",
            )
        elif self.is_heard:
            self._print(f"iter {step}: loss {loss:.4f}, time {seconds * 1000:.2f}ms, {speed}{notes}{left}")

    @contextmanager
    def evaluating(self, n_batches):
        """The Progress of an evaluation in a run, whose time counts for those to come."""
        began = time.perf_counter()
        with Progress("evaluating", n_batches, self, "batches", interval=60) as progress:
            yield progress
        now, measured = time.perf_counter(), progress.done - (progress.first or 0)  # without a batch that compiles
        self.evaluation_seconds = (now - progress.began) / measured * n_batches if measured else now - began

    def stop(self):
        """End the live lines; what follows is printed below them."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _left(self, done):
        """Seconds that the rest takes: the steps as long as those before, each evaluation as long as the last one."""
        evaluations = self.last_step // self.eval_interval - (done - 1) // self.eval_interval
        evaluations += self.last_step % self.eval_interval > 0  # the run ends with one
        return (self.last_step - done) * self.seconds / self.counted + evaluations * self.evaluation_seconds

    # ---- live lines

    def open_line(self, what, total, done=0, text="", stays=False):
        """Begin a live line below those that are there: its number, or None where there is no terminal to show it.

        total: None where it is not known. stays: whether the terminal keeps its last state, if it is the first line.
        """
        is_terminal = (sys.stderr if self.stderr else sys.stdout).isatty() and os.environ.get("TERM") != "dumb"
        if not (self.is_heard and is_terminal):
            return None
        if self.live is None:
            from rich.console import Console as Terminal
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Display

            self.live = Display(
                TextColumn("{task.fields[what]}"),
                BarColumn(bar_width=16),
                TextColumn("{task.description}", markup=False),
                console=Terminal(stderr=self.stderr),
                redirect_stdout=not self.stderr,
                transient=not stays,
            )
            self.live.start()
            atexit.register(self.stop)  # an error must not leave the terminal without its cursor
        return self.live.add_task(text, total=total, completed=done, what=what)

    def close_line(self, line):
        """Take a live line away; rich's display ends with the last one."""
        if self.live is not None:
            self.live.remove_task(line)
            if not self.live.tasks:
                self.stop()

    def _print(self, text, end="\n"):
        """Print, or do without: a log file on a full disk must not end the run. (A closed pipe does, as everywhere.)"""
        try:
            print(text, end=end, flush=True, file=sys.stderr if self.stderr else sys.stdout)
        except BrokenPipeError:
            raise
        except UnicodeEncodeError:  # a log of Windows may be in an encoding that has not all characters
            self._print(text.encode("ascii", "replace").decode(), end)
        except OSError:
            pass


class Progress:
    """How far work is that can be counted: a live line in a terminal, elsewhere a line every few seconds.

        with Progress("evaluating", 300, console, "batches") as progress:
            progress(20)  # so many more are done

    Args:
        what: the work's name. total: how much there is; None where that is not known. noun: what is counted, plural.
        report: a Console, or a function that takes a line.
        interval: seconds between lines.
    """

    def __init__(self, what, total, report, noun="", interval=5):
        self.what, self.total, self.report, self.noun, self.interval = what, total, report, noun, interval
        self.done, self.first, self.line = 0, None, None
        self.shown = self.began = time.perf_counter()

    def __enter__(self):
        if isinstance(self.report, Console):
            self.line = self.report.open_line(self.what, self.total)
        return self

    def __exit__(self, *error):
        if self.line is not None:
            self.report.close_line(self.line)

    def __call__(self, more):
        """Report that so much more is done."""
        self.done += more
        self._show()

    def _show(self):
        now = time.perf_counter()
        if self.first is None:  # what was done before it is no measure of speed: an earlier attempt, or what comes once
            self.first, self.began = self.done, now
        if now - self.shown < (0.2 if self.line is not None else self.interval):
            return
        self.shown, seconds = now, now - self.began
        rate = (self.done - self.first) / seconds if seconds else 0
        text = self._text(seconds, rate)
        if self.total and rate:
            text += f", about {duration(max(self.total - self.done, 0) / rate)} left"
        if self.line is not None:
            self.report.live.update(self.line, completed=self.done, description=text)
        else:
            self.report(f"{self.what}: {text}")

    def _text(self, seconds, rate):
        return f"{self.done:,} of {self.total:,} {self.noun}"


class TextProgress(Progress):
    """How far a text is tokenized.

    Args:
        what: its name. all_bytes: about the size of the whole text; None where that is not known. report: as above.
    """

    def __init__(self, what, all_bytes, report):
        super().__init__(what, all_bytes, report)

    def __call__(self, documents, bytes, tokens):
        """Report what is written so far, by earlier attempts too."""
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
