"""What of a run goes where in a repository. Pure: from the scorecard and the names of what lies beside it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from compress.files import checksum
from compress.report.checksums import TOP, combined
from compress.report.scorecard import CARD_FILE, Artifact, Scorecard


@dataclass(frozen=True)
class Upload:
    """One file of a repository. name: there; path: here; size: bytes; sha256: hex, of what is sent; data: what is sent
    in place of the file's bytes."""

    name: str
    path: Path
    size: int
    sha256: str
    data: bytes | None = None

    @classmethod
    def of_bytes(cls, name: str, path: Path, data: bytes) -> Upload:
        """What is sent in place of a file's bytes."""
        return cls(name, path, len(data), checksum(data), data)

    def read(self, most: int = -1) -> bytes:
        """What is sent, or the first bytes of it."""
        if self.data is not None:
            return self.data if most < 0 else self.data[:most]
        with self.path.open("rb") as file:
            return file.read(most)


def arranged(card: Scorecard, there: Collection[str]) -> dict[str, str]:
    """Where every file goes: its path from the run's folder -> its path in the repository.

    there: what lies in the folder that no checksum is of and that may go, as what the run says of itself and the README.md of artifacts. A run's only
    folder goes to the top, so that the repository's id is the model's name for engines; the run's own card stays above the
    folder's. Of several, and where names would clash, each stays a folder.
    """
    names = [*card.files, *card.beside, *there]
    plain = {name: name for name in names}
    folders = [artifact for artifact in card.artifacts if artifact.is_folder]
    if len(folders) != 1:
        return plain
    inside = f"{folders[0].path}/"
    risen = {name: name.removeprefix(inside) for name in names}
    if CARD_FILE in there:
        risen.pop(inside + CARD_FILE, None)
    return plain if _clash(risen, card.everything) else risen


def _clash(places: Mapping[str, str], sha256: Mapping[str, str]) -> bool:
    """Whether two files that are not alike would have one name."""
    first: dict[str, str] = {}
    for source, name in places.items():
        other = first.setdefault(name, source)
        if other != source and (source not in sha256 or sha256[source] != sha256.get(other)):
            return True
    return False


def as_arranged(card: Scorecard, places: Mapping[str, str]) -> Scorecard:
    """The scorecard that is true of the repository: paths there, and checksums over them; what has given way to the run's own
    card is no file of an artifact any more."""
    if all(source == name for source, name in places.items()):
        return card
    artifacts = tuple(_artifact_as_arranged(artifact, places) for artifact in card.artifacts)
    return card.model_copy(update={"artifacts": artifacts})


def _artifact_as_arranged(artifact: Artifact, places: Mapping[str, str]) -> Artifact:
    files = {places[name]: found for name, found in artifact.files.items() if name in places}
    path = TOP if artifact.is_folder else places[artifact.path]
    return artifact.model_copy(update={"path": path, "files": files, "sha256": combined(files)})
