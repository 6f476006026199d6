"""What a run says while it works: rich bars with time left in a terminal, a line a stage elsewhere, or nothing."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from compress.report.scorecard import Stage


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Reporter:
    """Collects the stages of a run and shows them. `level`: 0 quiet, 1 normal, 2 verbose."""

    def __init__(self, level: int = 1, console: Console | None = None):
        self.level = level
        self.console = console or Console(stderr=True)
        self.stages: list[Stage] = []

    def say(self, line: str, level: int = 1) -> None:
        """One line of text, in terminals and logs alike."""
        if self.level >= level:
            self.console.print(line, markup=False, highlight=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[StageProgress]:
        """Time a stage. Its bar shows a fraction between 0 and 1."""
        started = time.monotonic()
        bars = None
        if self.level and self.console.is_terminal:
            bars = Progress(TextColumn("{task.description:<24}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
                            TextColumn("left"), TimeRemainingColumn(), console=self.console, transient=True)
        try:
            if bars is not None:
                bars.start()
                yield StageProgress(bars, bars.add_task(name, total=1.0))
            else:
                yield StageProgress(None, None)
        finally:
            if bars is not None:
                bars.stop()
        seconds = time.monotonic() - started
        self.stages.append(Stage(name=name, seconds=round(seconds, 3), peak_bytes=peak_memory_bytes()))
        self.say(f"{name:<24} {seconds:7.1f} s  peak {peak_memory_bytes() / 2**30:.2f} GiB")


class StageProgress:
    """Handle of a running stage."""

    def __init__(self, bars: Progress | None, task: object):
        self._bars, self._task = bars, task

    def __call__(self, done: float, detail: str | None = None) -> None:
        """Set the finished fraction."""
        if self._bars is not None:
            self._bars.update(self._task, completed=done, **({"description": detail} if detail else {}))

    def count(self, done: int, total: int) -> None:
        """The same from a count."""
        self(done / max(total, 1))
