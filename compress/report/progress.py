"""What a run says while it works: rich bars with time left in a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from compress.report.numbers import human_seconds
from compress.report.scorecard import Stage

LINE_SECONDS = 60.0  # in a log, a long stage says at least this often how far it is


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Left(TimeRemainingColumn):
    """Time left, once there is something to go by."""

    def render(self, task: Task) -> Text:
        return Text("") if task.time_remaining is None else Text("left ") + super().render(task)


class Reporter:
    """Collects the stages of a run and shows them. `level`: 0 quiet, 1 normal, 2 verbose (every step of a stage)."""

    def __init__(self, level: int = 1, console: Console | None = None):
        self.level = level
        self.console = console or Console(stderr=True)
        self.stages: list[Stage] = []

    def say(self, line: str, level: int = 1) -> None:
        """One line of text, in terminals and logs alike."""
        if self.level >= level:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[StageProgress]:
        """Time a stage. Its bar pulses until the stage first says what fraction is done."""
        started = time.monotonic()
        bars = None
        if self.level and self.console.is_terminal:
            # rich forgets speeds after 30 s by default, and one block of a large model takes longer than that
            bars = Progress(
                TextColumn("{task.description:<24}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                _Left(),
                console=self.console,
                transient=True,
                speed_estimate_period=1e9,
            )
        try:
            if bars is not None:
                bars.start()
            yield StageProgress(name, bars, self._line if bars is None or self.level > 1 else None)
        finally:
            if bars is not None:
                bars.stop()
        seconds = time.monotonic() - started
        self.stages.append(Stage(name=name, seconds=round(seconds, 3), peak_bytes=peak_memory_bytes()))
        self.say(f"{name:<24} {seconds:7.1f} s  peak {peak_memory_bytes() / 2**30:.2f} GiB")

    def _line(self, line: str, due: bool) -> bool:
        """Print a line about a running stage where there is a reason to; says whether it did."""
        wanted = self.level > 1 or (self.level == 1 and due)
        if wanted:
            self.say(line)
        return wanted


class StageProgress:
    """Handle of a running stage: call it with the finished fraction, 0 to 1, and what is being done."""

    def __init__(self, name: str, bars: Progress | None, line: Callable[[str, bool], bool] | None):
        self._name, self._bars, self._line = name, bars, line
        self._task: TaskID | None = None if bars is None else bars.add_task(name, total=None)
        self._started = self._said = time.monotonic()
        self._first: float | None = None
        self._detail = name

    def __call__(self, done: float, detail: str | None = None) -> None:
        """Set the finished fraction."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._started = done, now  # a run that continues starts late: count from there
        detail = detail or self._name
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, total=1.0, completed=done, description=detail)
        if self._line is not None:
            changed, due = detail != self._detail, now - self._said >= LINE_SECONDS
            if (changed or due) and self._line(f"  {detail}: {done:.0%}{self._left(done, now)}", due):
                self._said = now
        self._detail = detail

    def _left(self, done: float, now: float) -> str:
        gained = done - (self._first or 0.0)
        if gained <= 0 or done >= 1:
            return ""
        return f", about {human_seconds((now - self._started) / gained * (1 - done))} left"
