"""A lock holds against other processes and other runs of this one, dies with its holder, and leaves nothing behind."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compress.errors import OutputError
from compress.files import locked, sha256, sha256_each, write_synced

ROOT = Path(__file__).resolve().parents[2]

HOLD = """
import sys
from pathlib import Path
from compress.files import locked
with locked(Path(sys.argv[1]), Path("out")):
    print("held", flush=True)
    sys.stdin.read()
"""
# Counts, with the lock held, in a file whose folder comes and goes with it: without the lock counts are lost.
COUNT = """
import sys, time
from pathlib import Path
from compress.errors import OutputError
from compress.files import locked
lock, total = Path(sys.argv[1]), Path(sys.argv[2])
done = 0
while done < 20:
    try:
        with locked(lock, Path("out")):
            seen = int(total.read_text() or 0)
            time.sleep(0.001)
            total.write_text(str(seen + 1))
            done += 1
    except OutputError:
        pass
"""


def start(code: str, *arguments: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_holder_is_named_and_its_death_frees_the_lock(tmp_path: Path) -> None:
    file = tmp_path / "new" / ".work" / "lock"
    holder = start(HOLD, file)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(OutputError, match=f"out is in use by process {holder.pid};"), locked(file, Path("out")):
        pytest.fail("two hold it")
    holder.kill()
    holder.communicate()
    assert file.exists()  # a stale file, which locks nothing
    with locked(file, Path("out")):
        assert file.read_text() == f"{os.getpid()}\n"
    assert not file.parent.exists() and file.parent.parent.exists()  # what was there before stays


def test_a_second_run_of_the_same_process_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "new" / ".work" / "lock"
    with locked(file, tmp_path):
        with pytest.raises(OutputError, match=f"in use by process {os.getpid()};"), locked(file, tmp_path):
            pytest.fail("two hold it")
        assert file.exists()
    assert not list(tmp_path.iterdir())


def test_folders_that_something_came_into_stay(tmp_path: Path) -> None:
    with locked(tmp_path / "out" / ".work" / "lock", tmp_path):
        (tmp_path / "out" / "result").write_text("")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["result"]


def test_an_error_frees_the_lock(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), locked(tmp_path / "out" / "lock", tmp_path):
            raise KeyError


def test_no_two_processes_hold_it_while_it_is_made_and_removed(tmp_path: Path) -> None:
    total = tmp_path / "total"
    total.write_text("")
    counters = [start(COUNT, tmp_path / "out" / ".work" / "lock", total) for _ in range(3)]
    assert [counter.communicate(timeout=60) and counter.returncode for counter in counters] == [0, 0, 0]
    assert total.read_text() == "60"
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["total"]


def test_a_disk_that_cannot_be_written_gives_the_ordinary_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(OutputError, match=r"cannot write .*Read-only file system"),
        locked(tmp_path / "o/lock", tmp_path),
    ):
        pytest.fail("held")


def test_checksums_are_those_of_the_standard(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    paths[0].write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    write_synced(paths[1], bytes(3_000_001))
    assert sha256(paths[0]) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_each(paths) == {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}
