"""The original's next-token distributions and answers on disk, so that the tenth variant costs one pass.

One folder for a model on one text: `window-00012.npz` for each window, whose members zip itself has checksums of; one file
for its answers to one set of questions. What is damaged counts as not there. Folders that were used least recently go
where all together grow over `LIMIT_BYTES`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from compress.errors import OutputError
from compress.files import cache_folder, checksum, write_synced
from compress.reading import Unreadable, parse_json
from compress.scoring.divergence import Computed, TokenStats, WindowReference, counted_rows
from compress.scoring.kept import Kept, compare, keep, kept_tokens
from compress.scoring.original import Answers
from compress.scoring.results import Fallback
from compress.scoring.tasks.outcomes import Outcomes
from compress.text import EvalWindows

LIMIT_BYTES = 4 << 30
TEXT_BYTES = 512 << 20
"""Of what is kept of one text."""
SPARE_BYTES = 2 << 30
"""Of the disk: where less would be left, nothing is kept."""
VERSION = 1
"""Of how it is kept."""
ROOM, ANSWERS = "logits", "answers"


@dataclass(frozen=True)
class Remembered(Computed):
    """An Original that computes what is not on disk yet, and keeps it there. fingerprint: of the model that `source` runs."""

    fingerprint: str

    def kept(self, windows: EvalWindows) -> int | None:
        """Tokens that are kept of every position, None where all are."""
        k = kept_tokens(int(windows.counts.sum()), self.vocab_size, TEXT_BYTES)
        return None if k == self.vocab_size else k

    def windows(self, windows: EvalWindows) -> Iterator[WindowReference]:
        """See Reference.windows."""
        k = self.kept(windows) or self.vocab_size
        store = KeptWindows(_key(self.fingerprint, windows, k, self.vocab_size))
        numbers = range(len(windows.tokens))
        missing = [number for number in numbers if not store.has(number)]
        rows = counted_rows(self.source, _some(windows, missing))
        for number in numbers:
            targets = windows.tokens[number, windows.first[number] :]
            kept = None if number in missing else store.read(number)
            if kept is None:
                row = next(rows if number in missing else counted_rows(self.source, _some(windows, [number])))
                kept = keep(row, targets, k, seed=number)
                store.write(number, kept)
            yield _Window(kept)
        store.touch()

    def answers(self, question: str, compute: Callable[[], Answers]) -> Answers:
        """See Original.answers; what is on disk is not computed."""
        key = checksum(f"{VERSION} {self.fingerprint} {question}".encode())
        path = cache_folder(ANSWERS) / f"{key}.json"
        try:
            saved = parse_json(path.read_text(encoding="utf-8"))
            outcomes = {name: Outcomes.restored(found) for name, found in saved["outcomes"].items()}
            return outcomes, [Fallback.model_validate(line) for line in saved["lines"]]
        except (OSError, Unreadable, ValueError, TypeError, KeyError, AttributeError):
            outcomes, lines = compute()
        told = {
            "outcomes": {name: found.saved() for name, found in outcomes.items()},
            "lines": [line.model_dump() for line in lines],
        }
        with contextlib.suppress(OSError, OutputError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_synced(path, json.dumps(told).encode())
        return outcomes, lines


@dataclass(frozen=True)
class _Window:
    kept: Kept

    def compare(self, logits: np.ndarray, targets: np.ndarray) -> TokenStats:
        return compare(self.kept, logits, targets)


def _some(windows: EvalWindows, numbers: Sequence[int]) -> EvalWindows:
    """Of windows those with these numbers, without what is known of their text."""
    chosen = list(numbers)
    return replace(
        windows, tokens=windows.tokens[chosen], first=windows.first[chosen], documents=windows.documents[chosen],
        words=None, bytes=None,
    )  # fmt: skip


def _key(fingerprint: str, windows: EvalWindows, k: int, vocabulary: int) -> str:
    digest = hashlib.sha256(f"{VERSION} {fingerprint} {k} {vocabulary} {windows.tokens.shape}".encode())
    digest.update(np.ascontiguousarray(windows.tokens, "<i8").tobytes())
    digest.update(np.ascontiguousarray(windows.first, "<i8").tobytes())
    return digest.hexdigest()


class KeptWindows:
    """What was kept of the windows of one text. key: sha256 (hex) of all that decides it: model, windows, tokens kept."""

    def __init__(self, key: str):
        self.folder = cache_folder(ROOM) / key
        self._refused = False

    def read(self, number: int) -> Kept | None:
        """What was kept of a window, None where there is nothing or it is damaged."""
        try:
            with self._path(number).open("rb") as file, np.load(file, allow_pickle=False) as parts:
                return Kept(**{name: parts[name] for name in parts.files})
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def write(self, number: int, kept: Kept) -> None:
        """Keep a window; a disk that refuses costs the next score a pass, not this one."""
        if self._refused:
            return
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **asdict(kept))
        try:
            if not self.folder.is_dir():
                make_room(self.folder.parent, LIMIT_BYTES)
                self.folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.folder).free < SPARE_BYTES:
                self._refused = True
                return
            write_synced(self._path(number), buffer.getvalue())
        except (OSError, OutputError):
            self._refused = True

    def has(self, number: int) -> bool:
        """Whether there is something of a window."""
        return self._path(number).is_file()

    def touch(self) -> None:
        """Mark it as used now."""
        if self.folder.is_dir():
            os.utime(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"window-{number:05d}.npz"


def make_room(root: Path, limit: int) -> None:
    """Remove the folders of `root` that were used least recently until the rest is below `limit` bytes."""
    folders = sorted((f for f in root.glob("*") if f.is_dir()), key=lambda folder: folder.stat().st_mtime, reverse=True)
    total = 0
    for folder in folders:
        total += sum(file.stat().st_size for file in folder.glob("*"))
        if total > limit:
            shutil.rmtree(folder, ignore_errors=True)
