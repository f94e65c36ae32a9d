"""Push checkpoints to the Hub in the background."""

import os
import shutil
import threading
import time
from pathlib import Path

from ..utils.files import write_atomically
from .card import adapt_usage
from .transfer import create, upload


class BackgroundPush:
    """Pushes checkpoints in a thread, one at a time. If several checkpoints are waiting, only the latest is pushed.

    `push` first makes hard links to the files of a checkpoint, so that the checkpoint folder can be deleted before the
    push is complete. A failed push is not repeated, but the next checkpoint is pushed. If several pushes fail in a row,
    only the first failure causes a warning.
    """

    def __init__(self, repo, folder, warn, private=False, branch=None):
        """repo: Hub repository, created if missing. folder: the run folder. warn: function that prints a line."""
        self.repo, self.private, self.branch, self.warn = repo, private, branch, warn
        self.pushed = None  # last checkpoint that was pushed
        self._folder, self._has_warned, self._has_warned_of_card = Path(folder), False, False
        self._lock = threading.Lock()
        self._waiting = None  # (folder of links, checkpoint, message)
        self._worker = None
        self._can_retry = threading.Event()  # set when a newer checkpoint waits

    def push(self, checkpoint, message):
        """Schedule the push of a checkpoint folder, and return immediately. message: the commit message."""
        links = self._folder / f".push-{Path(checkpoint).name}-{time.monotonic_ns()}"
        try:
            for file in self._files(Path(checkpoint)):
                link = links / file.relative_to(checkpoint)
                link.parent.mkdir(parents=True, exist_ok=True)
                _link(file, link)
        except OSError as error:
            shutil.rmtree(links, ignore_errors=True)
            self._report_failure(message, error)
            return
        with self._lock:
            if self._waiting is not None:
                shutil.rmtree(self._waiting[0], ignore_errors=True)
            self._waiting = (links, Path(checkpoint), message)
            self._can_retry.set()
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, daemon=True)
                self._worker.start()

    def wait(self):
        """Wait for all pushes, but no longer than `timeout_s`, in case the Hub does not respond."""
        if (worker := self._worker) is not None:
            worker.join(self.timeout_s)

    def _work(self):
        while True:
            with self._lock:
                if self._waiting is None:
                    self._worker = None
                    return
                (links, checkpoint, message), self._waiting = self._waiting, None
            is_kept = False
            try:
                self._can_retry.clear()
                self._send(links, checkpoint, message)
                self.pushed, self._has_warned = checkpoint, False
            except OSError as error:
                self._report_failure(message, error)
                with self._lock:
                    if self.retry_s is not None and self._waiting is None:
                        self._waiting, is_kept = (links, checkpoint, message), True
                if is_kept:
                    self._can_retry.wait(self.retry_s)
            finally:
                if not is_kept:
                    shutil.rmtree(links, ignore_errors=True)

    # ---- the parts that a subclass replaces

    timeout_s = 1800  # maximum time to wait for a push at the end of a run
    retry_s = None  # seconds until a failed push is repeated, if no newer checkpoint waits; None: not repeated

    def _files(self, checkpoint):
        """Return the files to push."""
        return [file for file in checkpoint.iterdir() if file.is_file()]

    def _send(self, links, checkpoint, message):
        """Push the files in the folder `links`. Raise OSError if that fails."""
        self.repo = create(self.repo, self.private, self.branch)
        # write a new README.md, because changing the hard link would also change the file in the checkpoint
        if (readme := links / "README.md").is_file():
            card = readme.read_text(encoding="utf-8", errors="replace")
            write_atomically(readme, adapt_usage(card, True, self.repo, self.branch))
        upload(links, self.repo, message, self.branch, self._report_card)

    def _report_card(self, warning):
        if not self._has_warned_of_card:
            self._has_warned_of_card = True
            self.warn(warning)

    def _report_failure(self, message, error):
        if not self._has_warned:
            self._has_warned = True
            self.warn(f"warning: not pushed to the Hub: {message}: {error}. Later checkpoints will be pushed as usual")


def _link(file, target):
    try:
        os.link(file, target)
    except OSError:  # the file system does not support hard links
        shutil.copyfile(file, target)
