"""Push checkpoints to the Hub while the run continues."""

import os
import shutil
import threading
import time
from pathlib import Path

from .transfer import create, upload

PUSH_TIMEOUT_S = 1800  # seconds that the end of a run waits for a push


class BackgroundPush:
    """Pushes checkpoints while the run goes on: one at a time, and where several wait, the newest.

    The files are linked aside at once, so that a checkpoint may be pruned while it is on its way. What fails is
    reported in one line, once until a push succeeds, and done with: the next checkpoint tries again.
    """

    def __init__(self, repo, folder, warn, private=False, branch=None):
        """repo: on the Hub, made where it is missing. folder: of the run; the links stand in it. warn: takes a line."""
        self.repo, self.private, self.branch, self.warn = repo, private, branch, warn
        self.pushed = None  # the checkpoint that the Hub holds now, as far as this process knows
        self._folder, self._is_warned = Path(folder), False
        self._lock = threading.Lock()
        self._waiting = None  # (folder of links, checkpoint, message)
        self._worker = None

    def push(self, checkpoint, message):
        """Push a checkpoint folder as soon as the one before it is through; returns at once."""
        links = self._folder / f".push-{Path(checkpoint).name}-{time.monotonic_ns()}"
        try:
            links.mkdir()
            for file in Path(checkpoint).iterdir():
                if file.is_file():
                    _link(file, links / file.name)
        except OSError as error:
            shutil.rmtree(links, ignore_errors=True)
            self._fail(message, error)
            return
        with self._lock:
            if self._waiting is not None:
                shutil.rmtree(self._waiting[0], ignore_errors=True)
            self._waiting = (links, Path(checkpoint), message)
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, daemon=True)
                self._worker.start()

    def wait(self):
        """Return when nothing is on its way any more; at the latest after PATIENCE, for a Hub that is silent."""
        worker = self._worker
        if worker is not None:
            worker.join(PUSH_TIMEOUT_S)

    def _work(self):
        while True:
            with self._lock:
                if self._waiting is None:
                    self._worker = None
                    return
                (links, checkpoint, message), self._waiting = self._waiting, None
            try:
                self.repo = create(self.repo, self.private, self.branch)
                upload(links, self.repo, message, self.branch)
                self.pushed, self._is_warned = checkpoint, False
            except OSError as error:
                self._fail(message, error)
            finally:
                shutil.rmtree(links, ignore_errors=True)

    def _fail(self, message, error):
        if self._is_warned:
            return
        self._is_warned = True
        self.warn(f"warning: not pushed, the next checkpoint tries again: {message}: {error}")


def _link(file, place):
    try:
        os.link(file, place)
    except OSError:  # a file system without hard links
        shutil.copyfile(file, place)
