"""What runs a file or folder: the engine it was written for, or the streaming forward over its decoded weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from compress.codecs.names import CONTAINERS
from compress.containers import container_module
from compress.engines.streamed import StreamedSource
from compress.engines.transformers import TransformersSource
from compress.errors import CheckpointError, UnsupportedModel
from compress.models.checkpoint import Checkpoint, checkpoint_problems
from compress.models.locate import model_location
from compress.models.spec import ModelSpec, load_spec
from compress.report.scorecard import Fallback
from compress.scoring.source import LogitSource

if TYPE_CHECKING:
    from torch import Tensor


LOADED_BY_TRANSFORMERS = ("safetensors", "compress", "bitsandbytes", "compressed-tensors")
PACKAGES = {"bitsandbytes": ("bitsandbytes", "bnb"), "compressed-tensors": ("compressed_tensors", "ct")}
WHOLE_MODEL_BYTES = 4 * 2**30  # models up to this size in float32 are run by transformers itself


@dataclass(frozen=True)
class OpenedModel:
    """A folder in Hugging Face's layout and how its weights are read."""

    name: str
    folder: Path
    spec: ModelSpec
    container: str
    load: Callable[[str], Tensor]
    files: tuple[Path, ...]

    @property
    def parameters(self) -> int:
        return sum(tensor.parameters for tensor in self.spec.tensors())

    @property
    def bytes(self) -> int:
        """Of the weight files."""
        return sum(file.stat().st_size for file in self.files)


def open_model(name: str) -> OpenedModel:
    """A folder of any container, hub id or bundled model; a dense one holds every weight in the shape config.json
    implies."""
    location = model_location(name)
    folder = Path(location)
    if folder.is_file():
        raise CheckpointError(f"{name} is neither a GGUF file nor a Hugging Face folder; give one of these or a hub id")
    if folder.is_dir() and not (folder / "config.json").is_file() and (found := sorted(folder.glob("*.gguf"))):
        raise CheckpointError(f"{name} is a folder with a GGUF in it; give the file: {found[0]}")
    checkpoint = Checkpoint.open(location)
    spec = load_spec(checkpoint.config)
    files = tuple(sorted({entry.file for entry in checkpoint.entries.values()}))
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    if method in CONTAINERS:
        load = container_module(method).open_dense(files, spec)
        return OpenedModel(name, checkpoint.folder, spec, method, load, files)
    if method is not None:
        raise UnsupportedModel(
            f"{name} is quantized with {method}; this version scores GGUF files and folders that are dense or one of "
            + ", ".join(c for c in CONTAINERS if c not in ("gguf", "safetensors"))
        )
    if problems := checkpoint_problems(spec, checkpoint):
        raise CheckpointError(f"{problems[0]}; fetch the model again")
    return OpenedModel(name, checkpoint.folder, spec, "safetensors", checkpoint.load, files)


def is_gguf(target: str) -> bool:
    """Whether `target` is meant as a GGUF: by its name, or by its first bytes."""
    path = Path(target)
    if path.suffix == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise CheckpointError(f"no GGUF file at {path}")
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def gguf_files(path: Path) -> list[Path]:
    from compress.containers.gguf import shards

    files = shards(path)
    if lost := [file for file in files if not file.is_file()]:
        raise CheckpointError(f"{lost[0]} is missing; all {len(files)} files of the set must lie together")
    return files


def folder_source(
    container: str, files: Sequence[Path], spec: ModelSpec, parameters: int, fallbacks: list[Fallback]
) -> LogitSource:
    """What runs a folder: transformers where it loads the container and the model fits, else its decoded weights."""
    package, extra = PACKAGES.get(container, ("transformers", ""))
    if container in LOADED_BY_TRANSFORMERS and find_spec(package) is None:
        fallbacks.append(
            Fallback(
                subject=files[0].parent.name,
                wanted="scored by transformers",
                used="scored by its decoded weights",
                reason=f"{container} is not installed: pip install 'compress-llm[{extra}]'",
            )
        )
    elif container in LOADED_BY_TRANSFORMERS:
        if 4 * parameters <= WHOLE_MODEL_BYTES:
            return TransformersSource(files[0].parent)
        fallbacks.append(
            Fallback(
                subject=files[0].parent.name,
                wanted="scored by transformers",
                used="scored by its decoded weights",
                reason=f"the whole model in float32 is more than {WHOLE_MODEL_BYTES / 2**30:.0f} GiB; "
                "activations that an engine rounds are not rounded here",
            )
        )
    return StreamedSource(spec, container_module(container).open_dense(files, spec), "decoded weights")


@contextmanager
def gguf_source(path: Path, spec: ModelSpec, fallbacks: list[Fallback]) -> Iterator[LogitSource]:
    """llama.cpp running the file; without it the file's decoded weights, and a line in `fallbacks`."""
    if find_spec("llama_cpp") is not None:
        from compress.engines.llama_cpp import LlamaCpp

        with LlamaCpp(path) as source:
            yield source
        return
    from compress.containers.gguf import open_dense

    fallbacks.append(
        Fallback(
            subject=path.name,
            wanted="scored by llama.cpp",
            used="scored by its decoded weights",
            reason="llama-cpp-python is not installed: pip install 'compress-llm[llama]'",
        )
    )
    yield StreamedSource(spec, open_dense(path, spec), "decoded weights")
