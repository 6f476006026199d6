"""What a run says of itself where Python is typed: bars in a terminal, a line that keeps itself up to date in a notebook."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from rich.progress import TaskID

from compress.report.numbers import human_seconds
from compress.report.progress import Bars, Reporter
from compress.report.scorecard import Stage

REFRESH_SECONDS = 0.5
BAR = 30  # characters

Show = Callable[[str], Callable[[str], None]]
"""Puts a text on the page and returns what replaces it."""


@contextmanager
def reporting(what: str, quiet: bool = False) -> Iterator[Reporter]:
    """The reporter for where this runs. A notebook keeps what was said, and one line that says how long it took."""
    show = None if quiet else _notebook()
    if show is None:
        yield Reporter(0 if quiet else 1)
        return
    reporter = NotebookReporter(what, show)
    try:
        yield reporter
    except BaseException:
        reporter.close("stopped after ")
        raise
    reporter.close()


def _notebook() -> Show | None:
    """How this process's notebook shows a text; None where there is none. Imports nothing that it has not."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if getattr(shell, "kernel", None) is None:
        return None

    def show(text: str) -> Callable[[str], None]:
        from IPython.display import display

        handle = cast(Any, display({"text/plain": text}, raw=True, display_id=True))
        return lambda later: handle.update({"text/plain": later}, raw=True)

    return show


class NotebookReporter(Reporter):
    """One text of a notebook's page: while a stage runs its bar, at last the lines that were said, and the time that all took.
    Nothing of the bar is left when the page is stored."""

    def __init__(self, what: str, show: Show, clock: Callable[[], float] = time.monotonic):
        super().__init__(1, clock=clock)
        self.what, self._show, self._began = what, show, clock()
        self._replace: Callable[[str], None] | None = None
        self._said: list[str] = []

    def say(self, line: str, level: int = 1) -> None:
        if level <= self.level:
            self._said.append(line)

    def close(self, how: str = "") -> None:
        """Leave what is to be kept."""
        took = f"{self.what}: {how}{human_seconds(self.clock() - self._began)}"
        self.put("\n".join([*self._said, took]))

    def put(self, text: str) -> None:
        """Show a text in place of the last one."""
        if self._replace is None:
            self._replace = self._show(text)
        else:
            self._replace(text)

    def _done(self, stage: Stage) -> None:
        """Said at the end, of all stages together."""

    def _bars(self) -> Bars | None:
        return _Bar(self)


class _Bar:
    """A stage's bar as text. Only the thread that works calls it: what another one shows may land in another cell."""

    def __init__(self, reporter: NotebookReporter):
        self._reporter, self._name, self._shown = reporter, "", float("-inf")

    def start(self) -> None:
        self._put(self._name)

    def stop(self) -> None:
        pass

    def add_task(self, description: str, *, total: float | None) -> TaskID:
        self._name = description
        return TaskID(0)

    def update(self, task_id: TaskID, *, total: float, completed: float, description: str) -> None:
        full = round(BAR * completed / total)
        self._put(f"{'█' * full}{'░' * (BAR - full)} {completed / total:4.0%}  {description}")

    def _put(self, text: str) -> None:
        now = self._reporter.clock()
        if now - self._shown >= REFRESH_SECONDS:
            self._shown = now
            self._reporter.put(f"{self._reporter.what}: {text}")
