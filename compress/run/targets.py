"""What can be scored: any GGUF file or Hugging Face folder, the artifacts of a run's folder; and what runs each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from compress.containers import Container
from compress.engines.open import OpenedModel, artifact_source, continues, file_container, file_set, open_model
from compress.engines.streamed import StreamedSource
from compress.models.companions import is_report
from compress.report import scorecard as scorecards
from compress.report.checksums import files_at_the_top
from compress.scoring.results import Fallback
from compress.scoring.source import LogitSource
from compress.streaming.placement import Placement


@dataclass(frozen=True)
class Target:
    """What is scored. opened: None for a single file, which is run as a model like `model`, the original or the model that
    the file itself describes."""

    name: str
    container: Container
    files: tuple[Path, ...]
    opened: OpenedModel | None
    model: OpenedModel
    original: OpenedModel | None

    @property
    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @property
    def bytes(self) -> int:
        """Of all files that are needed to run it; what was delivered as a folder is needed whole, but neither its card nor what
        tells of it beside its files where it was published."""
        if self.opened is None:
            return self.weight_bytes
        if self.opened.container.original:
            return self.opened.bytes
        folder = self.opened.folder
        files = [folder / name for name in files_at_the_top(folder)] or folder.rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file() and not is_report(file))


def open_original(against: str) -> OpenedModel:
    """What targets are compared with: the floats that it decodes to. Raises CheckpointError where it is missing or not what it
    should be, UnsupportedModel where it is quantized in a way that is not read."""
    return open_model(against, decoded=True)


def open_target(target: str, original: OpenedModel | None) -> Target:
    """A target. Raises CheckpointError where it is missing or not what it should be."""
    container = file_container(target)
    if container is not None:
        files = tuple(file_set(container, Path(target)))
        return Target(target, container, files, None, original or open_model(target), original)
    opened = open_model(target)
    return Target(target, opened.container, opened.files, opened, original or opened, original)


def expanded(targets: Sequence[str]) -> Iterator[str]:
    """The targets, each once, with every artifact of a run's folder in place of the folder."""
    found = (artifact for target in targets for artifact in _artifacts(target))
    return iter(dict.fromkeys(found))


def _artifacts(target: str) -> Iterator[str]:
    folder = Path(target)
    if not folder.is_dir() or (folder / "config.json").is_file() or not (folder / scorecards.FILE_NAME).is_file():
        yield target
        return
    yield from (str(folder / artifact.path) for artifact in scorecards.read(folder).artifacts)


def source_of(found: Target, fallbacks: list[Fallback], placement: Placement) -> AbstractContextManager[LogitSource]:
    """What runs the target; a line in `fallbacks` where that is not its own engine."""
    opened = found.opened
    if opened is None:
        return artifact_source(found.container, found.files, found.model.spec, found.model.parameters, fallbacks)
    if opened.container.original:
        return nullcontext(streamed(opened, "streamed weights", placement))
    return artifact_source(opened.container, opened.files, opened.spec, opened.parameters, fallbacks)


def streamed(opened: OpenedModel, name: str, placement: Placement) -> StreamedSource:
    """A dense model block by block; an engine continues text for it."""
    whole = continues(opened.folder, opened.files, opened.parameters)
    return StreamedSource(opened.spec, opened.load, name, placement, generator=whole)
