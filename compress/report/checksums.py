"""Files held against the checksums of a scorecard: what a run delivered, and whether that is what lies there now."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from compress.errors import CheckpointError, CompressError, NoSuchRun
from compress.files import sha256_each
from compress.report.scorecard import FILE_NAME, Artifact, Scorecard, read

OK, CHANGED, MISSING, UNEXPECTED = "ok", "changed", "missing", "unexpected"
TOP = "."
"""The path of an artifact whose files lie beside the scorecard, as a run's only folder does where it is published."""


def checksums(paths: Iterable[Path], base: Path) -> dict[str, str]:
    """sha256 of some files and of all that lies in some folders, by path from `base`, sorted."""
    files = sorted(file for path in paths for file in _entries(path) if file.is_file())
    return {_name(file, base): found for file, found in sha256_each(files).items()}


def combined(files: Mapping[str, str]) -> str:
    """One checksum for an artifact: a single file's own, else that of the lines which `sha256sum` prints of its files,
    sorted by path."""
    if len(files) == 1:
        return next(iter(files.values()))
    return hashlib.sha256("".join(f"{files[name]}  {name}\n" for name in sorted(files)).encode()).hexdigest()


def statuses(files: Mapping[str, str], base: Path) -> dict[str, str]:
    """OK, CHANGED or MISSING of every file. files: path from `base` -> sha256."""
    there = {base / name: name for name in files if (base / name).is_file()}
    found = {there[path]: digest for path, digest in sha256_each(there).items()}
    return {name: MISSING if name not in found else OK if found[name] == files[name] else CHANGED for name in files}


def sentence(path: Path, status: str) -> str:
    """How errors begin that tell of a CHANGED or MISSING file."""
    return f"{path} {'is missing' if status == MISSING else 'has changed'} since it was delivered"


def verify(target: str | Path) -> dict[str, str]:
    """Recompute the checksums of all that a run's folder holds, or of one artifact in it: the status of every file by its
    path from the scorecard's folder, files that nobody delivered among them.

    Raises CompressError without a scorecard that names the target, or with one that holds no checksums.
    """
    target = Path(target)
    if target.name == FILE_NAME:
        target = target.parent
    if not os.path.lexists(target):
        raise NoSuchRun(f"there is no {target}; give a finished run's folder or an artifact in it")
    if (target / FILE_NAME).is_file():
        card = read(target)
        file, wanted, told, root = target / FILE_NAME, card.everything if card.files else {}, card.told, target
    elif (named := _named(target)) is not None:
        file, card, artifact = named
        wanted, told, root = artifact.files, card.told, file.parent / artifact.path
    else:
        raise CompressError(
            f"no {FILE_NAME} in or above {target} tells of it; give a finished run's folder or an artifact in it"
        )
    if not wanted:
        raise CompressError(
            f"{file} holds no checksums: an earlier version wrote it; run the recipe again with --fresh"
        )
    base = file.parent
    found = {_name(path, base) for path in _entries(root) if not _internal(path.relative_to(base))}
    surplus = found - set(wanted) - set(told)
    return dict(sorted({**statuses(wanted, base), **dict.fromkeys(surplus, UNEXPECTED)}.items()))


def require_unchanged(target: str | Path) -> str | None:
    """Raises CheckpointError where a scorecard beside a file or folder names it and its bytes are not those that were
    delivered. Returns a note where there is such a scorecard and nothing to compare with."""
    target = Path(target)
    if not os.path.lexists(target):
        return None
    try:
        named = _named(target)
    except CompressError as error:
        return f"{target} was not held against the scorecard beside it: {error}"
    if named is None:
        return None
    file, _, artifact = named
    if not artifact.files:
        return f"{target} was not held against {file}, which has no checksums"
    for name, status in statuses(artifact.files, file.parent).items():
        if status != OK:
            raise CheckpointError(
                f"{sentence(file.parent / name, status)} ({file} has its checksum); "
                f"run the recipe again with --fresh, or move the {FILE_NAME} away to score it as it is"
            )
    return None


def files_at_the_top(folder: Path) -> tuple[str, ...]:
    """The files of the artifact that a folder is itself, with its scorecard among them, as it is published; none where there
    is no such artifact."""
    try:
        artifacts = read(folder).artifacts if (folder / FILE_NAME).is_file() else ()
    except CompressError:
        return ()
    return next((tuple(artifact.files) for artifact in artifacts if artifact.path == TOP), ())


def _named(target: Path) -> tuple[Path, Scorecard, Artifact] | None:
    """The nearest scorecard above a file or folder, its file before it, and which of its artifacts that is, or is part of."""
    for path in (Path(os.path.abspath(target)), target.resolve()):
        folders = (path, *path.parents)  # an artifact that was published alone lies beside its scorecard
        if (folder := next((folder for folder in folders if (folder / FILE_NAME).is_file()), None)) is None:
            continue
        card = read(folder)
        for artifact in card.artifacts:
            places = [folder / artifact.path, *(folder / name for name in artifact.files)]
            if any(path == place or path in place.parents for place in places):
                return folder / FILE_NAME, card, artifact
    return None


def _entries(path: Path) -> Iterator[Path]:
    """A file itself; all in a folder that is no folder."""
    if not path.is_dir():
        yield path
        return
    yield from (entry for entry in path.rglob("*") if entry.is_symlink() or not entry.is_dir())


def _internal(path: Path) -> bool:
    """Whether a path from a run's folder serves one that goes on."""
    return path.parts[0].startswith(".")


def _name(path: Path, base: Path) -> str:
    return path.relative_to(base).as_posix()
