"""Push checkpoints to the Hub in the background."""

import os
import shutil
import threading
import time
from pathlib import Path

from ..utils.files import write_atomically
from .card import adapt_usage
from .transfer import create, upload

PUSH_TIMEOUT_S = 1800  # maximum time to wait for a push at the end of a run


class BackgroundPush:
    """Pushes checkpoints in a thread, one at a time. If several checkpoints are waiting, only the latest is pushed.

    `push` makes hard links to the files of a checkpoint first, so that the checkpoint can be pruned in the meantime. If
    a push fails, the next checkpoint is pushed as usual. Repeated failures cause only one warning.
    """

    def __init__(self, repo, folder, warn, private=False, branch=None):
        """repo: Hub repository, created if it does not exist. folder: the run folder. warn: prints a line."""
        self.repo, self.private, self.branch, self.warn = repo, private, branch, warn
        self.pushed = None  # last checkpoint that was pushed
        self._folder, self._has_warned = Path(folder), False
        self._lock = threading.Lock()
        self._waiting = None  # (folder of links, checkpoint, message)
        self._worker = None

    def push(self, checkpoint, message):
        """Schedule the push of a checkpoint folder, and return immediately. message: the commit message."""
        links = self._folder / f".push-{Path(checkpoint).name}-{time.monotonic_ns()}"
        try:
            links.mkdir()
            for file in Path(checkpoint).iterdir():
                if file.is_file():
                    _link(file, links / file.name)
        except OSError as error:
            shutil.rmtree(links, ignore_errors=True)
            self._report_failure(message, error)
            return
        with self._lock:
            if self._waiting is not None:
                shutil.rmtree(self._waiting[0], ignore_errors=True)
            self._waiting = (links, Path(checkpoint), message)
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, daemon=True)
                self._worker.start()

    def wait(self):
        """Wait for all pushes, but no longer than PUSH_TIMEOUT_S, in case the Hub does not respond."""
        if (worker := self._worker) is not None:
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
                if (readme := links / "README.md").is_file():  # a link, so write a new file instead of changing it
                    card = readme.read_text(encoding="utf-8", errors="replace")
                    write_atomically(readme, adapt_usage(card, True, self.repo, self.branch))
                upload(links, self.repo, message, self.branch)
                self.pushed, self._has_warned = checkpoint, False
            except OSError as error:
                self._report_failure(message, error)
            finally:
                shutil.rmtree(links, ignore_errors=True)

    def _report_failure(self, message, error):
        if not self._has_warned:
            self._has_warned = True
            self.warn(
                f"warning: not pushed to the Hub: {message}: {error}. The push is retried with the next checkpoint"
            )


def _link(file, target):
    try:
        os.link(file, target)
    except OSError:  # the file system does not support hard links
        shutil.copyfile(file, target)
