"""What a run leaves on a notebook's page."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from compress.report.notebook import NotebookReporter, reporting


class Page:
    """Texts by the order in which they were put there, each replaced by later ones of its own."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.seen: list[str] = []

    def show(self, text: str) -> Any:
        place = len(self.texts)
        self.texts.append(text)
        self.seen.append(text)

        def replace(later: str) -> None:
            self.texts[place] = later
            self.seen.append(later)

        return replace


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_one_text_moves_while_it_works_and_one_line_stays() -> None:
    page, clock = Page(), Clock()
    reporter = NotebookReporter("run q4", page.show, clock)
    with reporter.stage("blocks") as progress:
        for part in range(11):
            clock.now += 2
            progress(part / 10, f"block {part} of 10")
    reporter.say("note: a table of one value")
    reporter.say("  layer 3", level=2)
    reporter.close()
    assert page.texts == ["note: a table of one value\nrun q4: 22.0 s"]
    assert [text.split()[-4:] for text in page.seen[1:3]] == [["block", "0", "of", "10"], ["block", "1", "of", "10"]]
    assert page.seen[6].startswith("run q4: " + "█" * 15 + "░" * 15) and " 50%" in page.seen[6]


def test_it_is_not_put_there_more_often_than_eyes_follow() -> None:
    page, clock = Page(), Clock()
    reporter = NotebookReporter("run", page.show, clock)
    with reporter.stage("blocks") as progress:
        for _ in range(1000):
            clock.now += 0.001
            progress(0.5)
    assert len(page.seen) <= 3


def in_notebook(monkeypatch: pytest.MonkeyPatch, page: Page) -> None:
    ipython, display = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=object())

    def put(data: dict[str, str], *, raw: bool, display_id: bool) -> Any:
        assert raw and display_id
        replace = page.show(data["text/plain"])
        return SimpleNamespace(update=lambda later, raw: replace(later["text/plain"]))

    display.display = put
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)


def test_a_kernel_is_found_and_what_stops_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    page = Page()
    in_notebook(monkeypatch, page)
    with pytest.raises(KeyboardInterrupt), reporting("run q4") as reporter, reporter.stage("blocks"):
        raise KeyboardInterrupt
    (left,) = page.texts
    assert left.startswith("run q4: stopped after ")


def test_quiet_is_quiet_everywhere(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    page = Page()
    in_notebook(monkeypatch, page)
    with reporting("run", quiet=True) as reporter, reporter.stage("blocks"):
        reporter.say("something")
    assert page.texts == [] and capfd.readouterr() == ("", "")


def test_without_a_kernel_there_are_lines(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    """Also in IPython's own console, which has none."""
    ipython = ModuleType("IPython")
    ipython.get_ipython = lambda: SimpleNamespace()
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    with reporting("run") as reporter, reporter.stage("blocks"):
        pass
    out, err = capfd.readouterr()
    assert out == "" and "blocks" in err
