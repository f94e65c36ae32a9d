"""What a run shows while it works: a live line in a terminal, plain nanoGPT-style lines in a log file."""

import atexit
import sys
import time


class Console:
    """Prints for the main process and is silent on the others.

    In a terminal `step` moves one live progress line, and `say` prints above it; elsewhere both print lines. `quiet`
    leaves warnings and what is said with `always`.
    """

    def __init__(self, enabled=True, quiet=False):
        self.enabled, self.quiet = enabled, quiet
        self.progress = None

    def start(self, first_step, last_step):
        """Begin the progress of steps first_step to last_step."""
        self.last_step = last_step
        self.began, self.began_at = time.perf_counter(), first_step
        if self.enabled and not self.quiet and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.progress = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24),
                TextColumn("{task.description}"), TimeRemainingColumn(), TextColumn("left"))
            self.task = self.progress.add_task("", total=last_step, completed=first_step)
            self.progress.start()
            atexit.register(self.stop)  # an error must not leave the terminal without its cursor

    def say(self, text="", always=False):
        """A line that stays. A warning begins with `warning:`."""
        if self.quiet and not always and not text.startswith("warning:"):
            return
        if self.progress is not None:
            self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self.enabled:
            _print(text)

    def write(self, text):
        """A piece of text without a line end, for samples that come word by word."""
        if self.enabled and not self.quiet:
            _print(text, end="")

    def step(self, step, loss, seconds, tokens_per_second, mfu, notes=()):
        """Report a step that is done. loss: nats a token; seconds: of one step; mfu: share of the peak or None."""
        mfu = (f", mfu {mfu:.2%}" if mfu is not None else "") + "".join(f", {note}" for note in notes)
        if self.progress is not None:
            self.progress.update(self.task, completed=step + 1,
                                 description=f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s{mfu}")
        elif self.enabled and not self.quiet:
            done = step + 1 - self.began_at
            left = (time.perf_counter() - self.began) / max(done, 1) * (self.last_step - step - 1)
            _print(f"iter {step}: loss {loss:.4f}, time {seconds * 1000:.2f}ms, {tokens_per_second:,.0f} tokens/s"
                   f"{mfu}, {duration(left)} left")

    def stop(self):
        """End the live line; what follows is printed below it."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def counted(number, noun):
    """1 document, 2,000 documents."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def data_size(n_bytes):
    """Bytes as MB, or as kB where that is less than one."""
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:,.1f} kB"


class TextProgress:
    """How far a text is tokenized: a live line in a terminal, elsewhere a line every few seconds.

    Args:
        what: its name. all_bytes: about the size of the whole text; None where that is not known. report: takes a line.
    """

    INTERVAL = 5  # seconds between lines

    def __init__(self, what, all_bytes, report):
        self.what, self.all_bytes, self.report = what, all_bytes, report
        self.began = self.shown = time.perf_counter()
        self.first_bytes, self.live = None, None

    def __enter__(self):
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self.live = Progress(TextColumn(self.what), BarColumn(bar_width=24), TextColumn("{task.description}"),
                                 TimeRemainingColumn(), TextColumn("left"), transient=True)
            self.task = self.live.add_task("", total=self.all_bytes)
            self.live.start()
        return self

    def __exit__(self, *error):
        if self.live is not None:
            self.live.stop()

    def __call__(self, documents, bytes, tokens):
        """Report what is written so far, by earlier attempts too."""
        if self.first_bytes is None:
            self.first_bytes, self.first_documents = bytes, documents
        now = time.perf_counter()
        if now - self.shown < (0.2 if self.live else self.INTERVAL):
            return
        self.shown, seconds = now, now - self.began
        rate = (bytes - self.first_bytes) / seconds
        text = (f"{counted(documents, 'document')} ({(documents - self.first_documents) / seconds:,.0f}/s), "
                f"{data_size(bytes)} ({data_size(rate)}/s), {counted(tokens, 'token')}")
        if self.live is not None:
            self.live.update(self.task, completed=bytes, description=text)
        else:
            if self.all_bytes and rate:
                text += f", about {duration(max(self.all_bytes - bytes, 0) / rate)} left"
            self.report(f"{self.what}: {text}")


def duration(seconds):
    """Seconds as 2:05, 1:02:05 or 3d 1:02:05."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    text = f"{hours}:{minutes:02}:{seconds:02}" if hours or days else f"{minutes}:{seconds:02}"
    return f"{days}d {text}" if days else text


def _print(text, end="\n"):
    """Print, or do without: a log file on a full disk must not end the run. (A closed pipe does, as everywhere.)"""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass
