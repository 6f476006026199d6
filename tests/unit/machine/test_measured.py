"""Finished runs are remembered by machine and method, and damage counts as nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from compress.machine import Cpu, Machine, Memory
from compress.machine.measured import Measured, Runs

MACHINE = Machine(Cpu("a processor", ("avx2",), 8), Memory(1, 1))
RUN = Measured("a/model", "2026-11-27T02:03:04+00:00", 61.5, {"weights": 1e9, "text": 2e12})


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runs:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    return Runs(MACHINE, 8, "cpu", "a method")


def test_what_was_kept_is_known(runs: Runs) -> None:
    assert runs.known() == ()
    runs.remember(RUN)
    later = replace(RUN, model="b/model", seconds=5.0)
    runs.remember(later)
    runs.remember(replace(RUN, seconds=60.0))  # in the place of the first
    assert sorted(runs.known(), key=lambda run: run.model) == [replace(RUN, seconds=60.0), later]


def test_other_machines_threads_devices_and_methods_know_nothing(runs: Runs) -> None:
    runs.remember(RUN)
    others = (
        replace(runs, threads=4),
        replace(runs, device="cuda"),
        replace(runs, method="another"),
        replace(runs, machine=replace(MACHINE, cpu=replace(MACHINE.cpu, model="another"))),
    )
    assert all(other.known() == () for other in others)
    assert replace(runs, machine=replace(MACHINE, memory=Memory(2, 1))).known() == (RUN,)  # memory does not compute


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": 1, "seconds": "x"}', "\xff", '{"model": "m", "date": "d", "seconds": -1, "work": {"a": 1}}',
                                  '{"model": "m", "date": "d", "seconds": 1, "work": {"a": 0}}'])  # fmt: skip
def test_damage_is_nothing(runs: Runs, text: str) -> None:
    runs.remember(RUN)
    (file,) = runs.folder.glob("*.json")
    file.write_text(text, encoding="latin-1")
    assert runs.known() == ()


def test_a_disk_that_refuses_costs_nothing_else(runs: Runs) -> None:
    runs.folder.parent.parent.mkdir(exist_ok=True)
    runs.folder.parent.write_text("in the way")
    runs.remember(RUN)
    assert runs.known() == ()
