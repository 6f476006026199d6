"""What a run has finished, on disk: packed tensors per unit of work, activations, and the journal that orders them.

A unit is the embeddings, one block, the head, or what a later stage made of tensors of those. Its files are complete and synced before the journal names it, so
a run killed at any moment continues from the last named unit. Nothing here is delivered; the folder goes when the
run succeeds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import ResumeError
from compress.files import disk_errors, write_synced
from compress.weights import Packed

if TYPE_CHECKING:
    import torch

SEPARATOR = "|"  # between tensor and part in a unit's file; no checkpoint uses it in names


class Journal:
    """The work folder of one run."""

    def __init__(self, folder: Path, digest: str, units: dict[str, Any]):
        self.folder = folder
        self.digest = digest
        self.units = units
        """unit name -> its report, in the order they were finished"""
        self._where: dict[str, Path] = {}
        for unit in units:
            self._index(unit)

    @classmethod
    def open(cls, folder: Path, digest: str, *, fresh: bool = False) -> Journal:
        """Continue what `folder` holds or start anew. Raises ResumeError if it belongs to another recipe."""
        if fresh and folder.exists():
            shutil.rmtree(folder)
        path = folder / "journal.json"
        if path.exists():
            try:
                state = json.loads(path.read_text())
                if not isinstance(state["units"], dict):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                raise ResumeError(f"{path} is damaged; start over with --fresh") from None
            if state.get("digest") != digest:
                raise ResumeError(
                    f"{folder.parent} holds an unfinished run of another recipe, model or version; "
                    "finish that one, choose another --output, or discard it with --fresh"
                )
            return cls(folder, digest, state["units"])
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return cls(folder, digest, {})

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
        write_synced(self._file(unit), save(parts, metadata=meta or None))

    def name(self, reports: Mapping[str, Mapping[str, Any]]) -> None:
        """Name written units, all at once. Their tensors replace those of the same names in earlier units."""
        self.units |= {unit: dict(report) for unit, report in reports.items()}
        state = {"digest": self.digest, "units": self.units}
        write_synced(self.folder / "journal.json", json.dumps(state).encode())
        for unit in reports:
            self._index(unit)

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

    def _index(self, unit: str) -> None:
        from safetensors import safe_open

        try:
            with safe_open(self._file(unit), "pt") as file:
                self._where.update(dict.fromkeys(file.metadata() or {}, self._file(unit)))
        except Exception as error:
            raise ResumeError(f"{self._file(unit)} is missing or damaged ({error}); start over with --fresh") from None
