"""Files and folders appear under their final name complete or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.errors import OutputError
from compress.files import sync

_MARGIN = 1 << 20  # metadata, directory entries


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _remove(path: Path) -> None:
    """Delete without complaint: runs while another error is on its way."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _full(target: Path, needed: int, cause: str = "") -> OutputError:
    free = _free(target.parent)
    why = f" ({cause})" if cause else ""
    return OutputError(
        f"cannot write {target}: it needs {_gigabytes(needed)} and {_gigabytes(free)} are free{why}; "
        "free some space or choose another --output"
    )


@contextmanager
def _staging(target: Path, needed: int) -> Iterator[Path]:
    """A temporary folder beside `target`, gone afterwards whatever happens; OSErrors become OutputErrors."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot create {target.parent}: {error.strerror or error}; choose another --output"
        ) from error
    if _free(target.parent) < needed + _MARGIN:
        raise _full(target, needed)
    folder = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
    try:
        folder.mkdir()
        yield folder
    except OSError as error:  # numpy's tofile raises it without an errno when the disk is full
        raise _full(target, needed, error.strerror or str(error)) from error
    finally:
        _remove(folder)


@contextmanager
def atomic_files(target: Path, needed: int) -> Iterator[Path]:
    """A folder to write `target` (or its shards) into; on success every file moves beside `target`, synced.

    `needed` is in bytes and is checked against the free space first. Existing files of the same names are replaced.
    Raises OutputError for a full or read-only disk; whatever the failure, nothing partial has a final name.
    """
    with _staging(target, needed) as folder:
        yield folder
        files = sorted(folder.iterdir())
        for file in files:
            sync(file)
        # the first shard is the one engines open: it appears last
        for file in reversed(files):
            os.replace(file, target.parent / file.name)
        sync(target.parent)


@contextmanager
def atomic_folder(target: Path, needed: int, *, replace: bool = False) -> Iterator[Path]:
    """A folder that becomes `target` on success, its files synced.

    An existing `target` must be empty unless `replace`; otherwise OutputError. See `atomic_files` for the rest.
    """
    if target.exists() and not (target.is_dir() and (replace or not any(target.iterdir()))):
        raise OutputError(f"{target} exists and is not empty; remove it or choose another --output")
    with _staging(target, needed) as folder:
        content = folder / "content"
        content.mkdir()
        yield content
        for file in sorted(content.rglob("*")):
            sync(file)
        sync(content)
        if target.exists():
            os.rename(target, folder / "replaced")
        os.rename(content, target)
        sync(target.parent)
