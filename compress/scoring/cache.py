"""What is kept of the original between scores: its next-token distributions and its answers, so that the tenth variant costs
one pass.

One folder for a model on one text: `window-00012.npz` for each window, whose members zip itself has checksums of. What is
damaged counts as not there. Folders that were used least recently go where all together grow over `LIMIT_BYTES`.
"""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

from compress.errors import OutputError
from compress.files import cache_folder, write_synced
from compress.scoring.kept import Kept

LIMIT_BYTES = 4 << 30
ROOM = "logits"


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
            write_synced(self._path(number), buffer.getvalue())
        except (OSError, OutputError):
            self._refused = True

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
