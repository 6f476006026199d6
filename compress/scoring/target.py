"""What runs an artifact, and `compress score`: any GGUF file or Hugging Face folder, alone or against its original."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from compress import __version__
from compress.checkpoint import Checkpoint
from compress.codecs.names import CONTAINERS
from compress.errors import CheckpointError, UnsupportedModel
from compress.legal import checkpoint_problems
from compress.models.base import ModelSpec, load_spec
from compress.plan import container_module, model_location
from compress.report.progress import Reporter
from compress.report.scorecard import Artifact, Base, Check, Fallback, Gate, Scorecard
from compress.scoring.measure import measure
from compress.scoring.sources import LogitSource, TransformersSource
from compress.scoring.streamed import StreamedSource
from compress.text import load_suite, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

LOADED_BY_TRANSFORMERS = ("safetensors", "compress", "bitsandbytes", "compressed-tensors")
PACKAGES = {"bitsandbytes": ("bitsandbytes", "bnb"), "compressed-tensors": ("compressed_tensors", "ct")}
WHOLE_MODEL_BYTES = 4 * 2**30  # models up to this size in float32 are run by transformers itself


def score_target(target: str, against: str | None, suite: str, reporter: Reporter) -> Scorecard:
    """Score `target` on a suite and, when `against` names the original, say how far the two are apart.

    target: a GGUF file (or the first of a split set), a folder of any container, a hub id or a bundled model. against: a
    dense folder, hub id or bundled model; a GGUF needs it for its tokenizer. Without it, perplexity and task accuracy
    only. The gate passes when the scores are finite.

    Raises CheckpointError (no such target, not one of these kinds, damaged, another vocabulary), UnsupportedModel,
    CalibrationError (no such suite) and NumericalError (logits that are not finite).
    """
    chosen = load_suite(suite)
    with reporter.stage("open"):
        is_gguf = _is_gguf(target)
        if is_gguf and against is None:
            raise CheckpointError(
                f"scoring {target} needs the original's tokenizer; add --against ORIGINAL (its folder or hub id)"
            )
        original = None if against is None else _open_model(against)
        if original is not None and original.container != "safetensors":
            raise CheckpointError(f"{against} is itself quantized; give the original to --against")
        opened = None if is_gguf else _open_model(target)
        model = original or opened
        assert model is not None
        tokenizer = load_tokenizer(model.folder)
        files = _gguf_files(Path(target)) if opened is None else opened.files
    fallbacks: list[Fallback] = []
    with _source(target, opened, model, fallbacks) as source, reporter.stage("score") as progress:
        reference = None if original is None else StreamedSource(original.spec, original.load, "original")
        measured = measure(
            source,
            reference,
            chosen,
            tokenizer,
            label=Path(model.name).name,
            max_positions=model.spec.max_positions,
            progress=progress,
        )
    weight_bytes = sum(file.stat().st_size for file in files)
    size = weight_bytes if opened is None else sum(f.stat().st_size for f in opened.folder.rglob("*") if f.is_file())
    perplexity = measured.scores.perplexity.value
    finite = Check(name="perplexity", passed=isfinite(perplexity), detail=f"{perplexity:.4g}")
    base = Base(bytes=None)
    if original is not None:
        base = Base(
            bytes=original.bytes,
            bits_per_weight=8 * original.bytes / original.parameters,
            parameters=original.parameters,
            scores=measured.base_scores,
            tasks=measured.base_tasks,
        )
    artifact = Artifact(
        container="gguf" if opened is None else opened.container,
        path=target,
        bytes=size,
        bits_per_weight=round(8 * weight_bytes / model.parameters, 4),
        ratio=None if original is None else weight_bytes / original.bytes,
        scores=measured.scores,
        tasks=measured.tasks,
    )
    return Scorecard(
        model=model.name,
        recipe=Path(target).name,
        artifacts=(artifact,),
        base=base,
        fallbacks=(*fallbacks, *measured.fallbacks),
        gate=Gate(passed=finite.passed, checks=(finite,)),
        stages=tuple(reporter.stages),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={"compress": __version__},
    )


@dataclass(frozen=True)
class _Model:
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


def _open_model(name: str) -> _Model:
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
        return _Model(name, checkpoint.folder, spec, method, load, files)
    if method is not None:
        raise UnsupportedModel(
            f"{name} is quantized with {method}; this version scores GGUF files and folders that are dense or one of "
            + ", ".join(c for c in CONTAINERS if c not in ("gguf", "safetensors"))
        )
    if problems := checkpoint_problems(spec, checkpoint):
        raise CheckpointError(f"{problems[0]}; fetch the model again")
    return _Model(name, checkpoint.folder, spec, "safetensors", checkpoint.load, files)


def _is_gguf(target: str) -> bool:
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


def _gguf_files(path: Path) -> list[Path]:
    from compress.containers.gguf import shards

    files = shards(path)
    if lost := [file for file in files if not file.is_file()]:
        raise CheckpointError(f"{lost[0]} is missing; all {len(files)} files of the set must lie together")
    return files


@contextmanager
def _source(target: str, opened: _Model | None, model: _Model, fallbacks: list[Fallback]) -> Iterator[LogitSource]:
    """What runs the target."""
    if opened is None:
        with gguf_source(Path(target), model.spec, fallbacks) as source:
            yield source
    elif opened.container == "safetensors":
        yield StreamedSource(opened.spec, opened.load, "streamed weights")
    else:
        yield folder_source(opened.container, opened.files, opened.spec, opened.parameters, fallbacks)


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
        from compress.scoring.llama_cpp import LlamaCpp

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
