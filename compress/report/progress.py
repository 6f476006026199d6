"""What a run says while it works: rich bars with time left in a terminal, dated lines elsewhere, or nothing; and how long every
stage took, over all processes of a run that was continued."""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from compress.errors import OutputError
from compress.files import write_synced
from compress.report.layout import Prose
from compress.report.numbers import human_seconds
from compress.report.scorecard import Stage

# In a log a stage says at least as often how far it is: at first, and when it has run for long.
LINE_SECONDS = (15.0, 60.0)
KEEP_SECONDS = 10.0  # so often a running stage's time is kept, so that a killed process's counts
BAR_BESIDE = 62  # columns that stand beside a bar
TIMES = "times.json"  # in the work folder


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Left(TimeRemainingColumn):
    """Time left, once there is something to go by."""

    def render(self, task: Task) -> Text:
        return Text("") if task.time_remaining is None else Text("left ") + super().render(task)


class Bars(Protocol):
    """As much of rich's Progress as a stage needs."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def add_task(self, description: str, *, total: float | None) -> TaskID: ...
    def update(self, task_id: TaskID, *, total: float, completed: float, description: str) -> None: ...


class Reporter:
    """Collects the stages of a run and shows them. `level`: 0 quiet, 1 normal, 2 verbose (every step of a stage)."""

    def __init__(self, level: int = 1, console: Console | None = None, clock: Callable[[], float] = time.monotonic):
        self.level = level
        self.console = console or Console(stderr=True)
        self.clock = clock
        self.stages: list[Stage] = []
        """Of this process."""
        self._earlier: tuple[Stage, ...] = ()
        self._times: tuple[Path, str] | None = None

    @property
    def bars(self) -> bool:
        """Whether stages are shown as bars, in a terminal."""
        return self.level > 0 and self.console.is_terminal

    @property
    def all_stages(self) -> tuple[Stage, ...]:
        """Every stage once, with its seconds in all processes of the run and the largest peak."""
        return _added((*self._earlier, *self.stages))

    def continue_times(self, folder: Path, digest: str) -> None:
        """Add the stages of earlier processes of the run whose work lies in `folder`, and keep those of this one there."""
        self._times = folder / TIMES, digest
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):  # lost times cost no run
            saved = json.loads(self._times[0].read_bytes())
            if saved["digest"] == digest:
                self._earlier = tuple(Stage.model_validate(stage) for stage in saved["stages"])

    def say(self, line: str, level: int = 1) -> None:
        """One line of text; in a log behind the time."""
        if self.level < level:
            return
        if self.console.is_terminal:
            self.console.print(Prose(line))
        else:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            self.console.print(f"{stamp} {line}", markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, *, told: bool = True) -> Iterator[StageProgress]:
        """Time a stage. Its bar pulses until the stage first says what fraction is done. told: a line says when it is done."""
        started = self.clock()
        bars = self._bars() if self.level else None
        progress = StageProgress(name, bars, self._line if bars is None or self.level > 1 else None, self.clock)
        over = threading.Event()
        heart = threading.Thread(target=self._beat, args=(over, progress, name, started, bars is None), daemon=True)
        try:
            if bars is not None:
                bars.start()
            heart.start()
            yield progress
        finally:
            over.set()
            heart.join()
            if bars is not None:
                bars.stop()
            self.stages.append(self._stage(name, started))
            self._keep(())
        if told:
            self._done(self.stages[-1])

    def _done(self, stage: Stage) -> None:
        self.say(f"{stage.name:<24} {stage.seconds:7.1f} s  peak {(stage.peak_bytes or 0) / 2**30:.2f} GiB")

    def _beat(self, over: threading.Event, progress: StageProgress, name: str, started: float, lines: bool) -> None:
        """While a stage says nothing: how long it has taken, and that for later processes."""
        kept = started
        while not over.wait(1.0):
            if lines and self.level:
                progress.tick()
            if self.clock() - kept >= KEEP_SECONDS:
                kept = self.clock()
                self._keep((self._stage(name, started),))

    def _stage(self, name: str, started: float) -> Stage:
        return Stage(name=name, seconds=round(self.clock() - started, 3), peak_bytes=peak_memory_bytes())

    def _keep(self, running: tuple[Stage, ...]) -> None:
        if self._times is None or not self._times[0].parent.is_dir():
            return
        stages = _added((*self._earlier, *self.stages, *running))
        told = {"digest": self._times[1], "stages": [stage.model_dump() for stage in stages]}
        with suppress(OSError, OutputError):
            write_synced(self._times[0], json.dumps(told).encode())

    def _bars(self) -> Bars | None:
        """What shows a stage while it runs, or None where lines do."""
        if not self.console.is_terminal:
            return None
        # rich forgets speeds after 30 s by default, and one block of a large model takes longer than that
        return Progress(
            SpinnerColumn("line"),
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=min(max(self.console.width - BAR_BESIDE, 5), 40)),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            _Left(),
            console=self.console,
            transient=True,
            speed_estimate_period=1e9,
        )

    def _line(self, line: str, due: bool) -> bool:
        """Print a line about a running stage where there is a reason to; says whether it did."""
        wanted = self.level > 1 or (self.level == 1 and due)
        if wanted:
            self.say(line)
        return wanted


def _added(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Stages of one name as one, where the first of them stood."""
    found: dict[str, Stage] = {}
    for stage in stages:
        before = found.get(stage.name)
        if before is not None:
            seconds = round(before.seconds + stage.seconds, 3)
            peak = max(before.peak_bytes or 0, stage.peak_bytes or 0) or None
            stage = Stage(name=stage.name, seconds=seconds, peak_bytes=peak)
        found[stage.name] = stage
    return tuple(found.values())


class StageProgress:
    """Handle of a running stage: call it with the finished fraction, 0 to 1, and what is being done."""

    def __init__(
        self,
        name: str,
        bars: Bars | None,
        line: Callable[[str, bool], bool] | None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._name, self._bars, self._line, self._clock = name, bars, line, clock
        self._task: TaskID | None = None if bars is None else bars.add_task(name, total=None)
        self._begun = self._started = self._said = clock()
        self._first: float | None = None
        self._done: float | None = None
        self._detail = name
        self._lock = threading.Lock()

    def __call__(self, done: float, detail: str | None = None) -> None:
        """Set the finished fraction."""
        with self._lock:
            now = self._clock()
            if self._first is None:
                self._first, self._started = done, now  # a run that continues starts late: count from there
            detail = detail or self._name
            if self._bars is not None and self._task is not None:
                self._bars.update(self._task, total=1.0, completed=done, description=detail)
            changed, self._detail, self._done = detail != self._detail, detail, done
            if changed or self._due(now):
                self._tell(now)

    def tick(self) -> None:
        """Say how long it has taken, where nothing has been said for long."""
        with self._lock:
            if self._due(now := self._clock()):
                self._tell(now)

    def _due(self, now: float) -> bool:
        often, seldom = LINE_SECONDS
        return now - self._said >= min(max((now - self._begun) / 10, often), seldom)

    def _tell(self, now: float) -> None:
        if self._line is None:
            return
        so_far = f"{human_seconds(now - self._begun)} so far"
        told = so_far if self._done is None else f"{self._done:.0%}, {so_far}{self._left(self._done, now)}"
        if self._line(f"  {self._detail}: {told}", self._due(now)):
            self._said = now

    def _left(self, done: float, now: float) -> str:
        gained = done - (self._first or 0.0)
        if gained <= 0 or done >= 1:
            return ""
        return f", about {human_seconds((now - self._started) / gained * (1 - done))} left"
