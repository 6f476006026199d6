"""Files on disk: whole or not at all, and errors that name the folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.errors import OutputError


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """OSErrors (no space, no permission) as one line that names the folder and the fix."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another --output"
        ) from error


def write_synced(path: Path, data: bytes) -> None:
    """Write under a temporary name, sync, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
