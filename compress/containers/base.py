"""What a container is: one frozen value that answers whatever the rest of the package asks about a file format.

A container module ends with `CONTAINER = Container(...)`; the registry in this folder's `__init__` finds it. Nothing
here or in a container module imports torch before a tensor is written or read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from compress.codecs.names import CodecInfo, codec_info
from compress.containers._hosts import Host
from compress.containers._uses import Use
from compress.models.identity import Identity, identify

if TYPE_CHECKING:
    from torch import Tensor

    from compress.models.spec import ModelSpec, TensorSpec
    from compress.weights import Packed

Files = Path | Iterable[Path]
"""An artifact as it is opened: its folder or (first) file, or the weight files that `write` returned."""

DECODE_TOLERANCE = 1e-5
"""Relative to a tensor's largest value: the file's reader and our decoder do the same float32 arithmetic, in another
order."""
ROUNDED_TOLERANCE = 2**-8
"""The same where decoded values were rounded to a 16-bit float, whose mantissa has eight bits (bfloat16)."""


class PlannedTensor(Protocol):
    """One line of a plan: what containers read of it. `compress.plan.tensor.PlannedTensor` says what each means."""

    @property
    def spec(self) -> TensorSpec: ...
    @property
    def codec(self) -> str: ...
    @property
    def wanted(self) -> str | None: ...
    @property
    def incoherence(self) -> bool: ...
    @property
    def activations(self) -> str | None: ...
    @property
    def kept(self) -> int | None: ...
    @property
    def factors(self) -> tuple[int, int] | None: ...


Counted = Sequence[tuple[PlannedTensor, int]]
"""Tensors of a plan, each with how many it stands for."""


@dataclass(frozen=True)
class Options:
    """What a run knows and a container may use.

    max_shard_size: in bytes, None: the container's own limit; replace: an existing folder; scheme: the recipe's name for
    the mixture of codecs; dtype: f32, f16 or bf16, what dense containers round to; tokenizer: False leaves it out of a file
    that would hold one.
    """

    max_shard_size: int | None = None
    replace: bool = False
    scheme: str | None = None
    dtype: str = "bf16"
    tokenizer: bool = True


@dataclass(frozen=True)
class WriteRequest:
    """One artifact to be written.

    path: its file or folder; fetch: packed tensors by checkpoint name, called in file order, one in memory at a time;
    source: the model folder with the tokenizer; provenance: lines about where it comes from, stored as they are; of:
    the original, by default as its folder tells; tokenizer_settings: tokenizer_config.json where it has to be another than
    the model folder's.
    """

    path: Path
    spec: ModelSpec
    tensors: Sequence[PlannedTensor]
    fetch: Callable[[str], Packed]
    source: Path
    options: Options = Options()
    provenance: Mapping[str, str] = field(default_factory=dict)
    of: Identity | None = None
    tokenizer_settings: Mapping[str, Any] | None = None

    @property
    def identity(self) -> Identity:
        """Who the original is."""
        return self.of or identify(str(self.source), Path(self.source))


@dataclass(frozen=True)
class Engine:
    """What runs an artifact to score it.

    name: a key of `compress.engines.open.ENGINES`; package: the module that must be importable, called `distribution`
    by pip, which `extra` of ours brings; largest: bytes of float32 weights up to which it is given a model.
    """

    name: str
    package: str
    distribution: str
    extra: str = ""
    largest: int | None = None


LLAMA_CPP = Engine("llama.cpp", "llama_cpp", "llama-cpp-python", "llama")
TRANSFORMERS = Engine("transformers", "transformers", "transformers", largest=4 * 2**30)


def folder_of(path: Files) -> Path:
    """The folder of an artifact, given as itself or as its weight files."""
    return Path(path) if isinstance(path, (str, Path)) else Path(next(iter(path))).parent


def _any_codec(info: CodecInfo) -> bool:
    return True


def _no_reasons(spec: ModelSpec) -> list[str]:
    return []


def _no_reason(spec: ModelSpec) -> str | None:
    return None


def _no_complaint(spec: ModelSpec, tensors: Sequence[PlannedTensor]) -> None:
    return None


def _a_place(tensor: TensorSpec) -> str | None:
    return None


def _no_entry(planned: PlannedTensor) -> int:
    return 0


def _no_copies(source: Path) -> int:
    return 0


def _one_file(path: Path) -> list[Path]:
    return [path]


def _no_requirements(source: Path, spec: ModelSpec) -> None:
    return None


def _as_stored(tensors: Counted) -> str:
    return "stored without what goes"


@dataclass(frozen=True, kw_only=True)
class Container:
    """One format that ships: what it holds, how it is counted, written, read back and run."""

    name: str
    """As recipes, plans and scorecards call it; lower case."""
    engines: str
    """Who runs it, in words."""
    kinds: frozenset[str]
    """Kinds of codec that it holds."""
    write: Callable[[WriteRequest], list[Path]]
    """Write an artifact and return its weight files in order. OutputError for a plan that the format cannot hold, a
    full disk, or a folder that holds something else; nothing partial ever has a final name."""
    open_dense: Callable[[Files, ModelSpec], Callable[[str], Tensor]]
    """A function that decodes one tensor by its checkpoint name to float32, not by inverting the writer.
    CheckpointError for what is missing, misshapen or of a layout that is not read."""
    tensor_bytes: Callable[[PlannedTensor, str], int]
    """Bytes of one tensor in the file; the second argument is the checkpoint's own float codec."""

    rank: int = 100
    """Place in lists."""
    usual: str | None = None
    """The bundled recipe, scheme or codec that people mean who name it alone; "" for the model as it is."""
    holds: Callable[[CodecInfo], bool] = _any_codec
    """Which codecs of its kinds it holds."""
    float_roles: tuple[str, ...] = ()
    """Roles that it can only hold as floats."""
    incoherence: bool = False
    """Whether it has a place for the signs of the Hadamard transforms, or decodes them away."""
    activations: bool = False
    """Whether it can say that an engine rounds the inputs of a linear."""
    dense: bool = False
    """Whether it holds decoded values, rounded to the checkpoint's own float type."""
    precise_float: str | None = None
    """The float codec that its engine computes norms, biases and routers in: 1-D tensors are stored so whatever a rule
    says, routers where no rule names them."""

    one_group: bool = False
    """Whether all that share scales in a file do so in groups of one length."""

    no_place: Callable[[TensorSpec], str | None] = _a_place
    """Why it has no place for a tensor that is no part of the decoder (`TensorSpec.beside`), or None."""
    pieces: bool = False
    """Whether it takes tensors apart and orders them as sub-layers declare, see `models.layers.views.Piece`."""

    check_plan: Callable[[ModelSpec, Sequence[PlannedTensor]], None] = _no_complaint
    """Raises OutputError for a plan the format or its engines cannot hold, before anything is computed. A plan shows it one
    block of each kind, a run all of them."""
    unrepresentable: Callable[[ModelSpec], list[str]] = _no_reasons
    """Why its engine would refuse a model or compute something else."""
    caveats: Callable[[ModelSpec], list[str]] = _no_reasons
    """What its engine computes differently on long texts only."""
    heads_stay: Callable[[ModelSpec], str | None] = _no_reason
    """Why no attention head of a model can go, or None."""
    require: Callable[[Path, ModelSpec], None] = _no_requirements
    """Reads from the model folder what `write` will want, so that a run stops before the work, not after."""
    write_vocabulary: Callable[[Path, Path, ModelSpec], None] | None = None
    """Writes a file (first argument) that holds the tokenizer of a model folder (second) alone, for the engine to be tried
    on; None where the tokenizer's own files lie beside the weights."""

    masks: str | None = None
    """Why masks and factors save nothing in it; None where it stores them."""
    mask_row_bytes: int = 0
    """Bytes that its engine keeps for every row of a masked matrix at run time, and once more for its end."""
    shrunk: Callable[[Counted], str] = _as_stored
    """How its engine computes with masks and factors, in words."""

    suffix: str = ""
    """Of a container that is one file; empty for a folder."""
    magic: bytes = b""
    """The first bytes of such a file."""
    files: Callable[[Path], list[Path]] = _one_file
    """All files of the set that one (its first) belongs to, whether they exist or not."""
    quant_method: str = ""
    """What config.json calls it in a folder; empty where that says nothing."""
    original: bool = False
    """Whether it is the layout of original checkpoints."""
    entry_bytes: Callable[[PlannedTensor], int] = _no_entry
    """About what the weight files hold of a tensor beside its bytes: its name, and what else stands in their headers."""
    copied_bytes: Callable[[Path], int] = _no_copies
    """About what the weight files hold of a model folder beside its tensors."""

    tolerance: float = DECODE_TOLERANCE
    """How far decoded values may lie from what was solved, relative to a tensor's largest."""
    inventory: Callable[[Sequence[Path], ModelSpec], Mapping[str, str]] | None = None
    """Codecs as the file names them, by checkpoint name; None where it does not name them tensor by tensor."""
    engine: Engine | None = None
    """What runs it for scores; None: nothing here, its decoded weights are scored."""

    hosts: tuple[Host, ...] = ()
    """Engines whose memory for an artifact is known, the usual one first."""

    library: str = ""
    """What the hub calls the library that reads it, for model cards."""
    uses: tuple[Use, ...] = ()
    """How people run an artifact, the usual way first, for model cards."""

    def takes(self, codec: str) -> bool:
        """Whether it holds a codec."""
        info = codec_info(codec)
        return info.kind in self.kinds and self.holds(info)

    def has_place(self, tensor: TensorSpec) -> bool:
        """Whether a tensor ships in it: all of the decoder, and of what stands beside that what it has a place for."""
        return not tensor.beside or self.no_place(tensor) is None

    def file_name(self, recipe: str, name: str | None = None, mixture: str | None = None) -> str:
        """Of an artifact's file or folder. name: the one that the recipe's export gives it; mixture: model and scheme, as
        single files are called where a scheme says all about them."""
        if self.suffix:
            return f"{name or mixture or recipe}{self.suffix}"
        return name or f"{recipe}-{self.name}"

    def bytes_of(self, tensors: Counted, own: str) -> int:
        """Bytes of tensors in the file. own: the checkpoint's float codec."""
        return sum(count * self.tensor_bytes(t, own) for t, count in tensors if self.has_place(t.spec))

    def file_bytes(self, tensors: Counted, own: str, source: Path) -> int:
        """About the bytes of the weight files. own: the checkpoint's float codec; source: the model folder."""
        return self.bytes_of(tensors, own) + self.beside_bytes(tensors, source)

    def beside_bytes(self, tensors: Counted, source: Path) -> int:
        """About what the weight files hold beside tensors: their names, and what is copied of the model folder."""
        named = sum(count * self.entry_bytes(t) for t, count in tensors if self.has_place(t.spec))
        return named + self.copied_bytes(source)
