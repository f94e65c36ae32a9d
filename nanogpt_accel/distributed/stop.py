"""Stop a run on all ranks after the same step: signals, consensus, lost processes."""

import math
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

from ..utils.text import first_line
from .launcher import world_size


def lost_process(error, timeout):
    """Return a message if an error means that another process ended or does not respond, otherwise None. timeout:
    collective_timeout, in seconds."""
    import torch

    words = ("connection closed by peer", "connection reset", "broken pipe", "timed out", "timeout", "socket")
    is_lost = isinstance(error, torch.distributed.DistError) or any(word in str(error).lower() for word in words)
    if is_lost and world_size() > 1:
        problem = f"another process of this run exited or did not respond within collective_timeout={timeout:g} s"
        return f"{problem} ({first_line(error)})"
    return None


class StopSignals:
    """Records SIGTERM, SIGINT, SIGUSR1 and Windows' SIGBREAK. A second Ctrl-C ends the process immediately.

    Use it as a context manager. Set `armed` to True when a loop starts to check `received`. Before that, SIGUSR1 ends
    the process with status 75, which means that the same command resumes the run. The other signals end the process
    as usual.
    """

    def __init__(self):
        self.received, self.armed, self._last, self._handlers = None, False, 0.0, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # other threads cannot set handlers
            for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGBREAK"):  # SIGUSR1: only POSIX; SIGBREAK: only Windows
                if hasattr(signal, name):
                    self._handlers[name] = signal.signal(getattr(signal, name), self._handle)
        return self

    def __exit__(self, *error):
        for name, handler in self._handlers.items():
            signal.signal(getattr(signal, name), handler)

    def _handle(self, number, frame):
        # processes that a launcher started receive each Ctrl-C twice: from the terminal and from the launcher
        is_second = number == signal.SIGINT and self.received and time.monotonic() - self._last > 2
        self._last = time.monotonic()
        if is_second:
            _tell("exiting now, without saving a checkpoint")
            os._exit(130)
        if not self.armed and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.armed:
            sys.exit(75 if number == getattr(signal, "SIGUSR1", None) else 128 + number)
        if not self.received:
            self.received = signal.Signals(number).name
            _tell(f"{self.received}: saving a checkpoint and stopping after this step; Ctrl-C again exits immediately")


def _tell(text):
    """Print a line on the first rank of each machine. Signal handlers call this. They cannot use print, because it is
    not reentrant."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, f"\n{text}\n".encode())


class Stopper:
    """Stops a run after a signal or after max_hours. All ranks stop after the same step.

    Args:
        signals: a StopSignals. Stopper sets signals.armed; after that, a signal no longer ends the process directly.
        max_hours: None for no limit. started: time.monotonic() when the run started.
        collective_timeout: seconds to wait for the other ranks.
    """

    def __init__(self, accelerator, signals, max_hours, started, collective_timeout=600):
        import torch

        self._signals, self._num_processes, self._pending = signals, accelerator.num_processes, None
        self._deadline = math.inf if max_hours is None else started + 3600 * max_hours
        self._max_hours = max_hours
        if self._num_processes > 1:
            self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=collective_timeout))
        signals.armed = True

    def all_ranks_agreed(self):
        """Return whether the run should stop now. Call it on all ranks, once per step.

        With several ranks, return the result of the all_reduce that was started in the previous step. The all_reduce
        runs in the background on the CPU with gloo and is usually complete after one step, so no rank has to wait.
        """
        import torch

        if time.monotonic() > self._deadline:
            self._signals.received = self._signals.received or f"max_hours={self._max_hours:g}"
        should_stop = self._signals.received is not None
        if self._num_processes == 1:
            return should_stop
        previous, flag = self._pending, torch.tensor([int(should_stop)])
        self._pending = (torch.distributed.all_reduce(flag, group=self._group, async_op=True), flag)
        if previous is None:
            return False
        previous[0].wait()
        return bool(previous[1].item())

    @property
    def reason(self):
        return self._signals.received or "a signal received by another process"

    def close(self):
        """Wait for the last all_reduce, because the other ranks may still wait for it."""
        if self._pending is not None:
            self._pending[0].wait()
