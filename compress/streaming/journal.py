"""What a run has finished, on disk: packed tensors per unit of work, activations, and the journal that orders them.

A unit is the embeddings, one block, the head, or what a later stage made of tensors of those. Its files are complete and
synced before the journal names it, so a run killed at any moment continues from the last named unit. The journal holds the
checksum of every file that the rest of the run reads, and its own. Nothing here is delivered; the folder goes when the run
succeeds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import ResumeError
from compress.files import checksum, disk_errors, sha256_each, sync, write_synced
from compress.weights import Packed

if TYPE_CHECKING:
    import torch

SEPARATOR = "|"  # between tensor and part in a unit's file; no checkpoint uses it in names
WORK = ".work"  # the work folder, in the output folder
JOURNAL, LOCK = "journal.json", "lock"  # of the files in a work folder


class OtherRun(ResumeError):
    """A work folder that belongs to another recipe, model or version."""


class Journal:
    """The work folder of one run."""

    def __init__(
        self,
        folder: Path,
        digest: str,
        units: dict[str, Any],
        files: Mapping[str, str] | None = None,
        inputs: Mapping[str, str] | None = None,
    ):
        self.folder = folder
        self.digest = digest
        self.units = units
        """unit name -> its report, in the order they were finished"""
        self.files = dict(files or {})
        """name -> sha256 of every file that the rest of the run reads"""
        self.inputs = dict(inputs or {})
        """what the units were made from, beside what the digest stands for -> sha256"""
        self._gone: set[str] = set()
        self._where: dict[str, Path] = {}
        for unit in units:
            self._index(unit)

    @classmethod
    def open(cls, folder: Path, digest: str, *, fresh: bool = False) -> Journal:
        """Continue what `folder` holds or start anew; the digest is on disk at once.

        Raises OtherRun if the folder belongs to another recipe, ResumeError if any file that the run goes on from is not what it
        was when the journal named it.
        """
        if fresh:
            discard(folder)
        path = folder / JOURNAL
        if not path.exists():
            journal = cls(folder, digest, {})
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            journal._save()
            return journal
        state = _read(path)
        if state["digest"] != digest:
            raise OtherRun(
                f"{folder.parent} holds an unfinished run of another recipe, model or version; "
                "finish that one, choose another --output, or discard it with --fresh"
            )
        _compare(folder, state["files"])
        return cls(folder, digest, state["units"], state["files"], state["inputs"])

    def agree(self, what: str, content: bytes) -> None:
        """Note something that units are made from, or hold it against the note. Raises ResumeError where it has changed
        since the first of them."""
        found = checksum(content)
        if what not in self.inputs or not self.units:
            self.inputs[what] = found
            self._save()
        elif self.inputs[what] != found:
            raise ResumeError(
                f"the {what} is not what the unfinished run in {self.folder.parent} was begun with; "
                "bring the old one back, choose another --output, or start over with --fresh"
            )

    def finish(self, unit: str, tensors: Mapping[str, Packed], report: Mapping[str, Any]) -> None:
        """Make a unit durable: its tensors, then its line in the journal."""
        self.write(unit, tensors)
        self.name({unit: report})

    def write(self, unit: str, tensors: Mapping[str, Packed]) -> None:
        """The tensors of a unit, which count for nothing until the journal names it."""
        from safetensors.torch import save

        parts: dict[str, torch.Tensor] = {}
        meta: dict[str, str] = {}
        for name, packed in tensors.items():
            meta[name] = json.dumps({"codec": packed.codec, "shape": list(packed.shape), "parts": list(packed.parts)})
            for part, tensor in packed.parts.items():
                parts[f"{name}{SEPARATOR}{part}"] = tensor.contiguous()
        data, path = save(parts, metadata=meta or None), self._file(unit)
        write_synced(path, data)
        self.files[path.name] = checksum(data)

    def keep(self, *paths: Path) -> None:
        """Files of this folder, as they are now, that the run reads behind the next unit that is named."""
        self.files |= {path.name: found for path, found in sha256_each(paths).items()}

    def release(self, *paths: Path) -> None:
        """Files that nobody reads any more behind the next unit that is named: they go then."""
        self._gone |= {path.name for path in paths}

    def name(self, reports: Mapping[str, Mapping[str, Any]]) -> None:
        """Name written units, all at once. Their tensors replace those of the same names in earlier units."""
        self.units |= {unit: dict(report) for unit, report in reports.items()}
        for gone in self._gone:
            self.files.pop(gone, None)
        self._save()
        for unit in reports:
            self._index(unit)
        while self._gone:
            (self.folder / self._gone.pop()).unlink(missing_ok=True)

    def fetch(self, name: str) -> Packed:
        """One tensor of a finished unit."""
        from safetensors import safe_open

        with safe_open(self._where[name], "pt") as file:
            facts = json.loads(file.metadata()[name])
            parts = {part: file.get_tensor(f"{name}{SEPARATOR}{part}") for part in facts["parts"]}
        return Packed(facts["codec"], tuple(facts["shape"]), parts)

    def __contains__(self, unit: str) -> bool:
        return unit in self.units

    def _file(self, unit: str) -> Path:
        return self.folder / f"{unit}.safetensors"

    def _save(self) -> None:
        state = {"digest": self.digest, "inputs": self.inputs, "files": self.files, "units": self.units}
        text = json.dumps(state)
        write_synced(self.folder / JOURNAL, f'{{"sha256": "{checksum(text.encode())}", {text[1:]}'.encode())

    def _index(self, unit: str) -> None:
        from safetensors import safe_open

        try:
            with safe_open(self._file(unit), "pt") as file:
                self._where.update(dict.fromkeys(file.metadata() or {}, self._file(unit)))
        except Exception as error:
            raise ResumeError(f"{self._file(unit)} is missing or damaged ({error}); start over with --fresh") from None


def discard(folder: Path) -> None:
    """Empty a work folder but for its lock. The journal goes first: wherever this is cut short, what is left counts for
    nothing."""
    if not folder.exists():
        return
    with disk_errors(folder):
        (folder / JOURNAL).unlink(missing_ok=True)
        sync(folder)
        left = [path for path in folder.iterdir() if path.name != LOCK]
    for path in left:
        with suppress(OSError):  # in use, on a network disk: without a journal it does no harm
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _read(path: Path) -> dict[str, Any]:
    """A journal's state. Raises ResumeError unless it is what was written."""
    try:
        state = json.loads(path.read_bytes())
        if state.pop("sha256") != checksum(json.dumps(state).encode()):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ResumeError(f"{path} is damaged or of another version; start over with --fresh") from None
    return state


def _compare(folder: Path, files: Mapping[str, str]) -> None:
    """Raises ResumeError naming the first file that is not what it was."""
    paths = {folder / name: wanted for name, wanted in files.items()}
    for path in paths:
        if not path.is_file():
            raise ResumeError(f"{path} is missing, and the unfinished run goes on from it; start over with --fresh")
    for path, found in sha256_each(paths).items():
        if found != paths[path]:
            raise ResumeError(
                f"{path} is damaged: it is not what the unfinished run wrote (its sha256 differs); "
                "start over with --fresh"
            )
