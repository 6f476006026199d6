"""LoRA adapters of PEFT, merged into a model's tensors when they are read: W + scale B A, in float32. No torch.

A folder holds adapter_config.json and adapter_model.safetensors, whose tensors are called
`base_model.model.MODULE.lora_A.weight` [r, in] and `...lora_B.weight` [out, r]; of an embedding `...lora_embedding_A` [r, rows]
and `..._B` [columns, r]; and what was trained whole (`modules_to_save`, biases) under its own name. scale is lora_alpha / r, or
lora_alpha / sqrt(r) (rsLoRA, arXiv 2312.03732). Source: peft's tuners/lora.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationError

from compress.errors import CheckpointError, NoSuchModel, UnsupportedModel
from compress.models.config import Keys, Positive, Word
from compress.models.index import FLOAT_CODEC, Entry, part_of, read_header
from compress.reading import dotted, in_words, read_json, shown, wrong

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ROOT = "base_model.model."
_LORA = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")
_WHOLE = re.compile(r"(.+?)(?:\.modules_to_save(?:\.default)?)?\.(weight|bias)")
_MERGE = "merge it with peft (model.merge_and_unload().save_pretrained(...)) and give that folder as the model"
_TRAINS_BASE = ("pissa", "olora", "corda", "loftq")
"""Initialisations that change the model's own weights, too."""


class AdapterKeys(Keys):
    """What is read of adapter_config.json."""

    peft_type: Word
    lora_alpha: Positive = 8.0
    use_rslora: bool = False
    alpha_pattern: dict[Annotated[str, Field(max_length=256)], Positive] = Field(default_factory=dict)


_REFUSED = {
    "use_dora": "DoRA, which scales every row",
    "use_qalora": "QALoRA",
    "fan_in_fan_out": "for weights that are stored as [in, out]",
    "layer_replication": "with layers that are used several times",
    "target_parameters": "for parameters that are no linear's",
    "trainable_token_indices": "with rows of the embeddings of its own",
    "alora_invocation_tokens": "of the kind that some tokens switch on",
    "lora_bias": "with biases inside the low rank",
}
"""Options of LoRA under which a weight is not W + scale B A, in words."""


@dataclass(frozen=True)
class Merged(Entry):
    """A tensor with what an adapter adds to it.

    base: the tensor as it was; low, high: A and B, each under its name in the adapter; turned: of an embedding, whose low rank is
    stored transposed.
    """

    base: Entry = field(kw_only=True)
    low: tuple[str, Entry] = field(kw_only=True)
    high: tuple[str, Entry] = field(kw_only=True)
    scale: float = 1.0
    turned: bool = False

    @property
    def lies(self) -> tuple[tuple[Path, tuple[int, int]], ...]:
        return self.base.lies

    @property
    def bytes(self) -> int:
        return self.base.bytes

    @property
    def codec(self) -> str | None:
        return self.base.codec

    @property
    def quantized(self) -> bool:
        return self.base.quantized

    def opened(self) -> AbstractContextManager[Any]:
        return self.base.opened()

    def read(self, name: str, opened: Any) -> Tensor:
        with self.low[1].opened() as file:
            low, high = (file.get_tensor(key).float() for key, _ in (self.low, self.high))
        added = high @ low * self.scale
        own = name if self.part is None else self.part.name
        whole = self.base.read(own, opened).float() + (added.T if self.turned else added)
        return whole if self.part is None else part_of(_Held(whole), self.part)

    def matrices(self, name: str, opened: Any) -> Iterator[Tensor]:
        yield self.read(name, opened)


@dataclass(frozen=True)
class _Held:
    """A tensor as an opened file with nothing else in it."""

    tensor: Tensor

    def get_slice(self, name: str) -> Tensor:
        return self.tensor


@dataclass(frozen=True)
class Replaced(Entry):
    """A tensor that an adapter brings whole. base: the one whose place it takes; stored: its name there."""

    base: Entry = field(kw_only=True)
    stored: str = ""

    @property
    def lies(self) -> tuple[tuple[Path, tuple[int, int]], ...]:
        return self.base.lies

    def read(self, name: str, opened: Any) -> Tensor:
        whole: Tensor = opened.get_tensor(self.stored)
        return whole if self.part is None else part_of(_Held(whole), self.part)

    def matrices(self, name: str, opened: Any) -> Iterator[Tensor]:
        yield self.read(name, opened)


@dataclass(frozen=True)
class Adapter:
    """folder: where it lies; of: the model that it was trained on, "" where it does not say; tensors: what it does to each by its
    name in the model's checkpoint, `base` still to come."""

    folder: Path
    of: str
    tensors: Mapping[str, Merged | Replaced]

    @property
    def files(self) -> tuple[Path, ...]:
        return self.folder / CONFIG, self.folder / WEIGHTS

    @property
    def note(self) -> str:
        """The line about it."""
        whole = sum(isinstance(entry, Replaced) for entry in self.tensors.values())
        more = f", {whole} more are its own" if whole else ""
        count = len(self.tensors) - whole
        return f"the adapter {self.folder.absolute().name} is merged into {count} tensors in float32{more}"

    def merged(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """The tensors of a checkpoint with those of the adapter merged into them; names that are not there are left for later.

        Raises CheckpointError for tensors of other shapes."""
        found: dict[str, Entry] = dict(entries)
        for name, added in self.tensors.items():
            entry = entries.get(name)
            if entry is None or isinstance(entry, Merged | Replaced):
                continue
            if entry.shape != added.shape:
                raise CheckpointError(
                    f"the adapter {self.folder} is for a {name} of {list(added.shape)}, the model's is {list(entry.shape)}; "
                    f"{self._other}"
                )
            if isinstance(added, Merged):
                found[name] = replace(added, base=entry, file=entry.file, dtype=entry.dtype, span=entry.span)
            else:
                found[name] = replace(added, base=entry)
        return found

    def require(self, entries: Mapping[str, Entry]) -> None:
        """Raises CheckpointError where the adapter has something for a tensor that the model does not have."""
        if lost := sorted(set(self.tensors) - set(entries)):
            raise CheckpointError(
                f"the adapter {self.folder} is for {shown(lost[0])} ({len(lost)} such tensors), which the model does not have; "
                f"{self._other}"
            )

    @property
    def _other(self) -> str:
        return f"it was trained on {shown(self.of)}" if self.of else "it belongs to another model"


def open_adapter(folder: Path) -> Adapter:
    """An adapter's folder.

    Raises NoSuchModel where it is none, UnsupportedModel for kinds that are not read, CheckpointError for a damaged one.
    """
    if not (folder / CONFIG).is_file():
        raise NoSuchModel(f"no adapter at {folder}: there is no {CONFIG}; give the folder that peft saved")
    config = read_json(folder / CONFIG)
    keys = _keys(folder, config)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(
            f"{folder} has no {WEIGHTS}; save the adapter anew with peft, which writes safetensors, or {_MERGE}"
        )
    stored, tensors = read_header(folder / WEIGHTS), dict[str, Merged | Replaced]()
    for name, entry in stored.items():
        if not name.startswith(_ROOT) or entry.dtype not in FLOAT_CODEC:
            raise _unread(folder, name)
        own = name.removeprefix(_ROOT)
        if lora := _LORA.fullmatch(own):
            if lora[3] == "A":
                tensors[f"{lora[1]}.weight"] = _low_rank(folder, keys, stored, name, lora)
            elif name.replace("lora_B", "lora_A").replace("embedding_B", "embedding_A") not in stored:
                raise _unread(folder, name)
        elif "lora_" not in own and (whole := _WHOLE.fullmatch(own)):
            tensors[f"{whole[1]}.{whole[2]}"] = Replaced(
                entry.file, entry.dtype, entry.shape, span=entry.span, base=entry, stored=name
            )
        else:
            raise _unread(folder, name)
    if not tensors:
        raise CheckpointError(f"{folder / WEIGHTS} holds nothing that could be merged; fetch it again")
    of = config.get("base_model_name_or_path")
    return Adapter(folder, of if isinstance(of, str) else "", tensors)


def _keys(folder: Path, config: Mapping[str, Any]) -> AdapterKeys:
    try:
        keys = AdapterKeys.model_validate({key: value for key, value in config.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CheckpointError(f"{folder / CONFIG}: {dotted(first['loc'])}: {wrong(first)}; fetch it again") from None
    if keys.peft_type.upper() != "LORA":
        raise UnsupportedModel(
            f"{folder} is an adapter of the kind {in_words(keys.peft_type)}; LoRA is merged here, of others {_MERGE}"
        )
    for key, what in _REFUSED.items():
        if config.get(key):
            raise UnsupportedModel(f"{folder} is a LoRA adapter {what} ({key}), which is not merged here; {_MERGE}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_TRAINS_BASE):
        raise UnsupportedModel(
            f"{folder} was begun with {in_words(start)} (init_lora_weights), which changes the model's own weights, too; {_MERGE}"
        )
    return keys


def _unread(folder: Path, name: str) -> UnsupportedModel:
    return UnsupportedModel(f"{folder} holds {shown(name)}, which is not merged here; {_MERGE}")


def _low_rank(folder: Path, keys: AdapterKeys, stored: Mapping[str, Entry], name: str, lora: re.Match[str]) -> Merged:
    """What A and B of one module add. name: of A."""
    kind = f"lora_{lora[2] or ''}"
    other = name.replace(f"{kind}A", f"{kind}B")
    low, high = stored[name], stored.get(other)
    if high is None or len(low.shape) != 2 or len(high.shape) != 2 or low.shape[0] != high.shape[1] or not low.shape[0]:
        raise _unread(folder, name)
    rank = low.shape[0]
    alpha = next((value for key, value in keys.alpha_pattern.items() if _names(key, lora[1])), keys.lora_alpha)
    shape = (high.shape[0], low.shape[1])
    turned = lora[2] is not None
    return Merged(
        low.file, low.dtype, shape[::-1] if turned else shape, base=low, low=(name, low), high=(other, high),
        scale=alpha / (sqrt(rank) if keys.use_rslora else rank), turned=turned,
    )  # fmt: skip


def _names(pattern: str, module: str) -> bool:
    """Whether a key of alpha_pattern, an expression for the end of a name, means a module."""
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
    except re.error:
        return False
