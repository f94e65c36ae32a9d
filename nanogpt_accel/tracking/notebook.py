"""A progress display for notebooks: rich's own display requires ipywidgets, this one only IPython."""

import time

from rich.progress import Progress

INTERVAL_S = 0.2  # between two updates, because a notebook stores and draws each of them
EMPTY = {"text/plain": "", "text/html": ""}


class NotebookProgress(Progress):
    """Show rich's progress display in one output of the cell. Each update replaces this output."""

    def start(self):
        from IPython.display import display

        self._output, self._last_drawn = display(EMPTY, raw=True, display_id=True), 0.0

    def update(self, task, **values):
        super().update(task, **values)
        if time.monotonic() - self._last_drawn > INTERVAL_S:
            self.refresh()

    def refresh(self):
        self._last_drawn = time.monotonic()
        self._output.update(self.make_tasks_table(self.tasks))

    def stop(self):
        if self.live.transient:
            self._output.update(EMPTY, raw=True)
        else:
            self.refresh()
