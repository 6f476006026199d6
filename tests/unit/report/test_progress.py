"""What a run says of its stages, and what it keeps of their times, by a clock that is set by hand."""

from __future__ import annotations

import io
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from compress.report.progress import TIMES, Reporter, StageProgress
from compress.report.scorecard import Stage


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def log(clock: Clock, level: int = 1) -> tuple[Reporter, io.StringIO]:
    file = io.StringIO()
    return Reporter(level, Console(file=file, width=40), clock), file


def told(file: io.StringIO) -> list[str]:
    """The lines without their times."""
    lines = file.getvalue().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    return [line[20:] for line in lines]


def test_a_stage_that_says_nothing_is_not_silent() -> None:
    clock, times, lines = Clock(), [0.0], []

    def line(text: str, due: bool) -> bool:
        lines.append(text)
        times.append(clock.now)
        return due

    progress = StageProgress("head", None, line, clock)
    for second in range(1, 1200):
        clock.now = second
        progress.tick()
    gaps = [later - before for before, later in pairwise(times)]
    assert gaps[:10] == [15] * 10 and gaps == sorted(gaps) and gaps[-1] == 60
    assert lines[:2] == ["  head: 15.0 s so far", "  head: 30.0 s so far"]


def test_a_stage_says_how_far_it_is_and_what_is_left() -> None:
    clock = Clock()
    reporter, file = log(clock)
    progress = StageProgress("blocks", None, reporter._line, clock)
    progress(0.0, "block 1 of 4")
    clock.now = 10
    progress(0.25, "block 2 of 4")
    assert told(file) == []  # normal: not for every step
    clock.now = 20
    progress(0.5, "block 3 of 4")
    clock.now = 36
    progress.tick()
    assert told(file) == [
        "  block 3 of 4: 50%, 20.0 s so far, about 20.0 s left",
        "  block 3 of 4: 50%, 36.0 s so far, about 36.0 s left",
    ]


def test_verbose_says_every_step() -> None:
    clock = Clock()
    reporter, file = log(clock, 2)
    progress = StageProgress("blocks", None, reporter._line, clock)
    for number in range(3):
        progress(number / 3, f"block {number + 1} of 3")
    assert len(told(file)) == 3


def test_quiet_says_nothing_and_still_counts() -> None:
    clock = Clock()
    reporter, file = log(clock, 0)
    with reporter.stage("plan"):
        clock.now = 2.5
    assert file.getvalue() == "" and [(s.name, s.seconds) for s in reporter.stages] == [("plan", 2.5)]


def test_stages_add_up_over_processes(tmp_path: Path) -> None:
    """The second process is killed in its second stage: what it kept of that counts, too."""
    for begun, seconds in ((0.0, 5.0), (100.0, 7.0)):
        clock = Clock()
        clock.now = begun
        reporter, _ = log(clock, 0)
        reporter.continue_times(tmp_path, "digest")
        with reporter.stage("plan"):
            clock.now += seconds
    clock.now += 3
    reporter._keep((Stage(name="blocks", seconds=3.0, peak_bytes=1),))
    reporter, _ = log(clock, 0)
    reporter.continue_times(tmp_path, "digest")
    with reporter.stage("blocks"):
        clock.now += 20
    assert [(stage.name, stage.seconds) for stage in reporter.all_stages] == [("plan", 12.0), ("blocks", 23.0)]
    assert [stage.name for stage in reporter.stages] == ["blocks"]
    other, _ = log(clock, 0)
    other.continue_times(tmp_path, "another recipe's")
    assert other.all_stages == ()


def test_a_stage_that_fails_took_its_time(tmp_path: Path) -> None:
    clock = Clock()
    reporter, file = log(clock)
    reporter.continue_times(tmp_path, "digest")
    with pytest.raises(KeyboardInterrupt), reporter.stage("blocks"):
        clock.now = 4
        raise KeyboardInterrupt
    assert file.getvalue() == ""
    assert json.loads((tmp_path / TIMES).read_text())["stages"][0]["seconds"] == 4


@pytest.mark.parametrize("content", ["", "{", "[]", '{"digest": "digest"}', '{"digest": "digest", "stages": [1]}'])
def test_lost_times_stop_no_run(tmp_path: Path, content: str) -> None:
    (tmp_path / TIMES).write_text(content)
    reporter, _ = log(Clock(), 0)
    reporter.continue_times(tmp_path, "digest")
    with reporter.stage("plan"):
        pass
    assert [stage.name for stage in reporter.all_stages] == ["plan"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_bar_fits(width: int) -> None:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    with Reporter(1, console).stage("calibration text") as progress:
        progress(0.4)
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue()).replace("\r", "\n")
    assert "calibration text" in drawn and "40%" in drawn and "…" not in drawn
    assert max(map(len, drawn.splitlines())) <= width
