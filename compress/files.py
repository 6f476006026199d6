"""Files on disk: whole or not at all, their checksums, a lock on a folder, and errors that name the folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from compress.errors import OutputError

_TRIES, _PAUSE = 100, 0.01  # while another process makes or removes the lock file: a second


@contextmanager
def disk_errors(path: Path, fix: str = "choose another --output") -> Iterator[None]:
    """OSErrors (no space, no permission) as one line that names the folder and the fix."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; free some space or {fix}") from error


# -- whole or not at all -----------------------------------------------------------------------------------------------
@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """A file under a temporary name that takes `path` once all is written and synced; gone if anything fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_synced(path: Path, data: bytes) -> None:
    """Write under a temporary name, sync, rename."""
    with writing(path) as file:
        file.write(data)


def sync(path: Path) -> None:
    """Make a file, or what was renamed in a folder or removed from it, outlive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


CACHE = "COMPRESS_CACHE"
"""The environment's name for the folder of what can be made again."""


def cache_folder(kind: str) -> Path:
    """Where what is kept of a kind lies: in COMPRESS_CACHE, else in the user's cache folder."""
    named = os.environ.get(CACHE)
    usual = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(named) if named else Path(usual) / "compress") / kind


def kept_folder(folder: Path, files: Callable[[], Mapping[str, bytes]]) -> Path:
    """A cached folder with these files, made in one step where it is not there or is not what was made; their names are
    relative. Its checksums lie beside them."""
    if _is_kept(folder):
        return folder
    wanted = files()
    with disk_errors(folder.parent, f"name another folder in {CACHE}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name[:64]}-", dir=folder.parent))
        try:
            for name, data in wanted.items():
                (temporary / name).parent.mkdir(exist_ok=True)
                (temporary / name).write_bytes(data)
            sums = {name: checksum(data) for name, data in wanted.items()}
            (temporary / _SUMS).write_text(json.dumps(sums), encoding="utf-8")
            temporary.chmod(0o755)
            _replace_folder(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


_SUMS = ".sha256.json"


def _is_kept(folder: Path) -> bool:
    """Whether a folder has the files of its checksums and no others."""
    try:
        sums = json.loads((folder / _SUMS).read_bytes())
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        return names - {_SUMS} == set(sums) and all(sha256(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError, TypeError):
        return False


def _replace_folder(source: Path, target: Path) -> None:
    """Give a folder its name; another process that made the same one in the meantime is as good."""
    try:
        os.rename(source, target)
    except OSError:
        if _is_kept(target):
            return
        shutil.rmtree(target)
        os.rename(source, target)


# -- checksums ---------------------------------------------------------------------------------------------------------
def sha256(path: Path) -> str:
    """sha256 (hex) of a file, read in pieces; about a second for a gigabyte."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(data: bytes) -> str:
    """sha256 (hex) of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_each(paths: Iterable[Path]) -> dict[Path, str]:
    """The same of several files, side by side: hashing leaves Python's lock alone."""
    paths = list(paths)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(paths, pool.map(sha256, paths), strict=True))


def fingerprint(paths: Iterable[Path]) -> str:
    """sha256 (hex) that changes when one of these files does, by their paths, sizes and times: nothing is read."""
    facts = [(str(path.resolve()), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in sorted(paths)]
    return checksum(repr(facts).encode())


# -- one process a folder ----------------------------------------------------------------------------------------------
@contextmanager
def locked(file: Path, subject: Path) -> Iterator[None]:
    """Hold `subject` for this process alone, by a lock on `file`, whose folders are made and, where nothing else has come
    into them, removed again.

    The system frees the lock of a process that dies, however it dies; a file that one left behind locks nothing. The file
    holds the holder's process id and goes with the lock. Raises OutputError naming the holder of a lock that is taken, and
    for a disk that cannot be written or has no locks.
    """
    made = [folder for folder in file.parents if not folder.exists()]
    with disk_errors(file.parent):
        handle = _lock(file, subject)
    try:
        with disk_errors(file):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        try:
            file.unlink(missing_ok=True)  # before it is free: whoever gets it then finds that it is no longer the file
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # children that were forked have the handle, too
            os.close(handle)
        _remove_empty(sorted({file.parent, *made}, reverse=True))


def _lock(file: Path, subject: Path) -> int:
    """A handle of the locked file, which surely is the one that has the name."""
    holder = ""
    for _ in range(_TRIES):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # its folder went with the lock of another process
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(handle, file):
                return handle
            os.close(handle)
        except BlockingIOError:
            holder = os.pread(handle, 32, 0).decode(errors="replace").strip()
            os.close(handle)
            if _runs(holder):
                break
            time.sleep(_PAUSE)  # it is about to write its number, or to go
        except OSError:
            os.close(handle)
            raise
    who = f"process {holder}" if holder else "another process"
    raise OutputError(f"{subject} is in use by {who}; wait for its end, or choose another --output")


def _is(handle: int, file: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _runs(holder: str) -> bool:
    """Whether a process of this number is on this machine."""
    try:
        os.kill(int(holder), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except OSError:  # another user's
        pass
    return True


def _remove_empty(folders: Iterable[Path]) -> None:
    """From the innermost outwards, as far as they are empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
