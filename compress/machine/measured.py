"""What finished runs took on this machine, kept so that plans can say how long the next one will take. No torch."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from compress.errors import OutputError
from compress.files import cache_folder, checksum, write_synced
from compress.machine.facts import Machine
from compress.reading import Unreadable, parse_json, read_text

ROOM = "runs"
VERSION = 1
"""Of what is kept; runs of another one are not read."""
RECORD_BYTES = 1 << 16


@dataclass(frozen=True)
class Measured:
    """One finished run: of which model, when (ISO 8601), its wall seconds in all, and the work it was, by kind."""

    model: str
    date: str
    seconds: float
    work: Mapping[str, float]


@dataclass(frozen=True)
class Runs:
    """Runs that took the same steps on the same processor, with as many threads, on the same kind of device.

    method: what tells one chain of steps from another.
    """

    machine: Machine
    threads: int
    device: str
    method: str

    @property
    def folder(self) -> Path:
        facts = (VERSION, self.machine.cpu.model, self.machine.cpu.features, self.threads, self.device, self.method)
        return cache_folder(ROOM) / checksum(repr(facts).encode())[:32]

    def remember(self, run: Measured) -> None:
        """Keep a run in the place of an earlier one of the same model; a disk that refuses costs an estimate, not the run."""
        path = self.folder / f"{checksum(run.model.encode())[:32]}.json"
        with contextlib.suppress(OSError, OutputError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_synced(path, json.dumps(asdict(run)).encode())

    def known(self) -> tuple[Measured, ...]:
        """All that is kept; what is damaged counts as not there."""
        return tuple(run for path in sorted(self.folder.glob("*.json")) if (run := _read(path)) is not None)


def _read(path: Path) -> Measured | None:
    try:
        data = parse_json(read_text(path, RECORD_BYTES))
        work = {str(kind): float(amount) for kind, amount in data["work"].items()}
        run = Measured(str(data["model"]), str(data["date"]), float(data["seconds"]), work)
    except (OSError, Unreadable, ValueError, TypeError, KeyError, AttributeError):
        return None
    amounts = (run.seconds, *work.values())
    return run if work and all(0 < amount < math.inf for amount in amounts) else None
