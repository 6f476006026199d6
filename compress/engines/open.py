"""What runs a file or folder: the engine it was written for, or the streaming forward over its decoded weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

from compress.containers import CONTAINERS, Container, Engine, original_layout
from compress.engines.streamed import StreamedSource
from compress.engines.transformers import TransformersSource, whole_model
from compress.errors import CheckpointError, NoSuchModel, UnsupportedModel
from compress.files import fingerprint
from compress.models.checkpoint import Checkpoint, checkpoint_problems, deciding_files
from compress.models.companions import companion_bytes
from compress.models.locate import model_location
from compress.models.sources import is_quantized
from compress.models.spec import ModelSpec, load_spec
from compress.reading import read_json
from compress.scoring.cache import Remembered
from compress.scoring.results import Fallback
from compress.scoring.source import Generates, LogitSource

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@runtime_checkable
class Tokenizes(Protocol):
    """An engine that has a tokenizer of its own."""

    def tokenize(self, text: str, *, special: bool = False, ends: bool | None = None) -> np.ndarray: ...


@dataclass(frozen=True)
class OpenedModel:
    """A model, its folder in Hugging Face's layout, and how its weights are read."""

    name: str
    folder: Path
    spec: ModelSpec
    container: Container
    load: Callable[[str], Tensor]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    """What to say of it, e.g. that it was quantized before."""

    @property
    def parameters(self) -> int:
        return self.spec.parameters

    @property
    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @property
    def stays_quantized(self) -> bool:
        """Whether it is a folder that transformers would compute with as it is stored."""
        return _quantized(self.folder)

    @property
    def bytes(self) -> int:
        """Of all files that are needed to run it: the weights and, in a folder, what lies beside them."""
        return self.weight_bytes + (companion_bytes(self.folder) if self.files[0].parent == self.folder else 0)


def open_model(name: str, *, decoded: bool = False) -> OpenedModel:
    """A folder of any container, GGUF file, hub id, bundled or packaged model; a dense one holds every weight in the shape
    config.json implies. A GGUF file is the model that its weights decode to; decoded: so is a quantized folder."""
    location = model_location(name)
    if Path(location).is_file() and (kind := file_container(location)) is not None and not kind.magic:
        raise CheckpointError(
            f"{name} holds weights alone; give the original, whose config.json says more, to --against"
        )
    checkpoint = Checkpoint.open(location)
    spec = load_spec(checkpoint.config)
    files = checkpoint.weight_files
    method = checkpoint.quantization.get("quant_method")
    methods = {container.quant_method: container for container in CONTAINERS.values() if container.quant_method}
    if method in methods and not decoded:
        load = methods[method].open_dense(files, spec)
        return OpenedModel(name, checkpoint.folder, spec, methods[method], load, files)
    if checkpoint.unread:
        raise UnsupportedModel(f"{name} {checkpoint.unread}")
    if problems := checkpoint_problems(spec, checkpoint):
        raise CheckpointError(f"{problems[0]}; fetch the model again")
    return OpenedModel(name, checkpoint.folder, spec, original_layout(), checkpoint.load, files, checkpoint.notes)


# -- containers that are one file --------------------------------------------------------------------------------------
def _single_files() -> list[Container]:
    return [container for container in CONTAINERS.values() if container.suffix]


def _label(container: Container) -> str:
    return container.suffix.removeprefix(".").upper()


def file_container(target: str) -> Container | None:
    """The container that `target` is meant as a file of: by its name, or by its first bytes; None for all else."""
    path = Path(target)
    for container in _single_files():
        if path.suffix == container.suffix and not path.is_dir():
            if not path.is_file():
                raise NoSuchModel(f"no {_label(container)} file at {path}; check the path")
            return container
    if not path.is_file():
        return None
    with path.open("rb") as file:
        first = file.read(max((len(container.magic) for container in _single_files()), default=0))
    return next((c for c in _single_files() if c.magic and first.startswith(c.magic)), None)


def file_set(container: Container, path: Path) -> list[Path]:
    """All files of the set that `path` belongs to. CheckpointError where one is missing."""
    files = container.files(path)
    if lost := [file for file in files if not file.is_file()]:
        raise CheckpointError(f"{lost[0]} is missing; all {len(files)} files of the set must lie together")
    return files


# -- engines -----------------------------------------------------------------------------------------------------------
@contextmanager
def artifact_source(
    container: Container, files: Sequence[Path], spec: ModelSpec, parameters: int, fallbacks: list[Fallback]
) -> Iterator[LogitSource]:
    """What runs an artifact: the container's engine where it is installed and the model fits, else its decoded weights
    and a line in `fallbacks`."""
    engine = container.engine
    if engine is None:
        yield StreamedSource(spec, container.open_dense(files, spec), "decoded weights")
        return
    if (reason := why_not(engine, parameters)) is None:
        with ENGINES[engine.name](files) as source:
            yield source
        return
    fallbacks.append(
        Fallback(
            subject=files[0].name if container.suffix else files[0].parent.name,
            wanted=f"scored by {engine.name}",
            used="scored by its decoded weights",
            reason=reason,
        )
    )
    yield StreamedSource(spec, container.open_dense(files, spec), "decoded weights")


def why_not(engine: Engine, parameters: int) -> str | None:
    """Why an engine does not run a model here, or None."""
    if find_spec(engine.package) is None:
        return f"{engine.distribution} is not installed: pip install 'compress-llm[{engine.extra}]'"
    if engine.largest is not None and 4 * parameters > engine.largest:
        return (
            f"the whole model in float32 is more than {engine.largest / 2**30:.0f} GiB; "
            "activations that an engine rounds are not rounded here"
        )
    return None


def _llama_cpp(files: Sequence[Path]) -> AbstractContextManager[LogitSource]:
    from compress.engines.llama_cpp import LlamaCpp

    return LlamaCpp(files[0])


def _llama_vocabulary(file: Path) -> AbstractContextManager[Tokenizes]:
    from compress.engines.llama_cpp import LlamaCpp

    return LlamaCpp(file, vocabulary_only=True)


def _transformers(files: Sequence[Path]) -> AbstractContextManager[LogitSource]:
    return nullcontext(TransformersSource(files[0].parent))


ENGINES: Mapping[str, Callable[[Sequence[Path]], AbstractContextManager[LogitSource]]] = {
    "llama.cpp": _llama_cpp,
    "transformers": _transformers,
}
"""By the name that a container's `engine` has: weight files, first one first -> what computes their logits."""

VOCABULARIES: Mapping[str, Callable[[Path], AbstractContextManager[Tokenizes]]] = {"llama.cpp": _llama_vocabulary}
"""By the same name: what reads text as an engine does, from a file that may hold the vocabulary alone."""


def remembered(source: StreamedSource, weights: Sequence[Path], folder: Path) -> Remembered:
    """An original that is asked once: known again by its weight files, what decides beside them in its folder, and the device."""
    return Remembered(source, f"{fingerprint(deciding_files(weights, folder))} {source.placement.device}")


def _quantized(folder: Path) -> bool:
    return is_quantized(read_json(folder / "config.json"))


def continues(folder: Path, files: Sequence[Path], parameters: int) -> Callable[[], Generates] | None:
    """What continues text for a dense model: the engine of the file that it lies in, transformers for a folder. None where
    that is not installed, the model is too large to be held whole, or transformers would leave it quantized."""
    container = file_container(str(files[0]))
    if container is None or container.engine is None:
        return None if _quantized(folder) else whole_model(folder, parameters)
    engine = container.engine
    if why_not(engine, parameters) is not None:
        return None
    return lambda: cast(Generates, ENGINES[engine.name](files).__enter__())
