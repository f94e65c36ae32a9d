"""Stop a run in order on all ranks: signals, consensus, lost processes."""

import math
import os
import signal
import sys
import threading
import time
from datetime import timedelta

from .launcher import world_size


def lost_process(error):
    """Why a collective operation failed, as one line, where `error` says that another process is gone or silent; else
    None."""
    import torch

    words = ("connection closed by peer", "connection reset", "broken pipe", "timed out", "timeout", "socket")
    text = str(error)
    is_lost = isinstance(error, torch.distributed.DistError) or any(word in text.lower() for word in words)
    return (text.strip().splitlines() or [type(error).__name__])[0] if is_lost and world_size() > 1 else None


class StopSignals:
    """Notes SIGTERM, SIGINT, SIGUSR1 and Windows' SIGBREAK, for the loop to stop in order; a second Ctrl-C leaves at
    once.

    with StopSignals() as signals: ...; `armed` says that there is a loop which looks at `received`. Until then all but
    SIGUSR1 end the process as always.
    """

    def __init__(self):
        self.received, self.armed, self._last, self._before = None, False, 0.0, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            # (SIGUSR1 is there under POSIX, SIGBREAK under Windows: Ctrl-Break, and what one process can send another)
            for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGBREAK"):
                if hasattr(signal, name):
                    self._before[name] = signal.signal(getattr(signal, name), self._note)
        return self

    def __exit__(self, *error):
        for name, handler in self._before.items():
            signal.signal(getattr(signal, name), handler)

    def _note(self, number, frame):
        # Ctrl-C reaches the processes of a launcher twice: from the terminal, and from the launcher
        is_second = number == signal.SIGINT and self.received and time.monotonic() - self._last > 2
        self._last = time.monotonic()
        if is_second:
            os._exit(130)
        if not self.armed and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.armed and number in (signal.SIGTERM, getattr(signal, "SIGBREAK", None)):
            sys.exit(128 + number)
        self.received = self.received or signal.Signals(number).name


class Stopper:
    """Stops a run early, by a signal or after max_hours, on all ranks after the same step.

    Args:
        signals: a StopSignals; from now on it notes signals instead of ending the process.
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
        """Return whether the run has to stop now. Call it on all ranks, once per step.

        With several ranks the answer is that of the step before: the exchange, over gloo between the CPUs, is done by
        then, so no rank waits for its device.
        """
        import torch

        if time.monotonic() > self._deadline:
            self._signals.received = self._signals.received or f"max_hours={self._max_hours:g}"
        wants_stop = self._signals.received is not None
        if self._num_processes == 1:
            return wants_stop
        before, flag = self._pending, torch.tensor([int(wants_stop)])
        self._pending = (torch.distributed.all_reduce(flag, group=self._group, async_op=True), flag)
        if before is None:
            return False
        before[0].wait()
        return bool(before[1].item())

    @property
    def reason(self):
        return self._signals.received or "a signal to another process"

    def close(self):
        """Wait for the last exchange, which the other ranks may still need."""
        if self._pending is not None:
            self._pending[0].wait()
