"""Lazy reading of Hugging Face checkpoints: one file or many, local folder or hub id. Never pickle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CheckpointError, NoSuchModel, UnsupportedModel
from compress.files import sha256_each
from compress.models.adapter import Adapter, open_adapter
from compress.models.companions import LAYOUT, LEGAL, companions
from compress.models.draft import draft_of
from compress.models.gguf.header import is_gguf
from compress.models.gguf.source import open_source
from compress.models.identity import hub_id
from compress.models.index import INDEX, SINGLE, Entry, named_codec, read_header, read_index
from compress.models.layers.base import Slice
from compress.models.locate import no_model
from compress.models.sources import source_of
from compress.models.spec import load_spec
from compress.models.wrappers import wrapper_of
from compress.reading import read_json, shown

if TYPE_CHECKING:
    from torch import Tensor

    from compress.models.spec import ModelSpec


def same_bytes(one: Entry, other: Entry) -> bool:
    """Whether two tensors have the same type, shape and bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return len(one.lies) == len(other.lies) and all(map(_same_run, one.lies, other.lies))


def _same_run(one: tuple[Path, tuple[int, int]], other: tuple[Path, tuple[int, int]]) -> bool:
    """Whether two runs of bytes in files are the same."""
    (file, (start, stop)), (beside, (begin, end)) = one, other
    if stop - start != end - begin:
        return False
    with file.open("rb") as first, beside.open("rb") as second:
        first.seek(start)
        second.seek(begin)
        while start < stop:
            size = min(stop - start, 1 << 24)
            if first.read(size) != second.read(size):
                return False
            start += size
    return True


@dataclass(frozen=True)
class Checkpoint:
    """A model whose tensors are read one at a time.

    folder: with config.json and the tokenizer; `entries` is empty when it holds a config.json only (enough to plan, not to
    run). place: what `open` opens again, the folder or a GGUF file; notes: what to say of it. quantization: what config.json
    says of how its tensors are stored, which `config` is without; unread: why they cannot be decoded, after the model's name.
    adapter: what is merged into the tensors.
    """

    folder: Path
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]
    place: Path
    notes: tuple[str, ...] = ()
    quantization: Mapping[str, Any] = field(default_factory=dict)
    unread: str = ""
    adapter: Adapter | None = None

    @classmethod
    def open(cls, model: str | Path, *, weights: bool = True, adapter: str | Path | None = None) -> Checkpoint:
        """Open a local folder, a GGUF file or, when there is neither, a hub id (downloaded into the hub's own cache).

        weights=False reads config.json and, if there, the tensor index; it never downloads weights. adapter: a LoRA adapter's
        folder, merged into the tensors when they are read.
        Raises CheckpointError when the model, its config or its shards are missing or damaged, UnsupportedModel for a GGUF
        of another kind than those that are read.
        """
        folder, lora = Path(model), None if adapter is None else open_adapter(Path(adapter))
        if is_gguf(folder):
            source = open_source(folder)
            config = read_json(source.folder / "config.json")
            return cls(source.folder, config, source.entries, folder, source.notes)._adapted(lora)
        if folder.exists() and (why := no_model(folder)) is not None:
            raise NoSuchModel(f"{folder} is {why}")
        if not folder.is_dir():
            folder = _download(str(model), weights)
        config = read_json(folder / "config.json")
        entries: dict[str, Entry] = {}
        if (folder / SINGLE).exists():  # before an index, which may be left of an earlier save; so does transformers
            entries = read_header(folder / SINGLE)
        elif (folder / INDEX).exists():
            index = read_index(folder)
            files = sorted(set(index.values()))
            if weights or all(file.exists() for file in files):
                for file in files:
                    entries.update(read_header(file))
                lost = sorted(set(index) - set(entries))
                if lost:
                    raise CheckpointError(
                        f"{folder / INDEX} lists {shown(lost[0])} ({len(lost)} in all) but no shard holds it"
                    )
        elif weights:
            hint = (
                "; it has pickled .bin weights, convert them to safetensors first" if list(folder.glob("*.bin")) else ""
            )
            raise CheckpointError(f"{folder} has no {SINGLE} or {INDEX}{hint}")
        found = source_of(folder, config, entries)
        entries = {**found.entries, **_renamed(config, found.entries)}
        stored = entries if lora is None else lora.merged(entries)
        entries = {**stored, **_parts(found.config, stored)}
        return cls(folder, found.config, entries, folder, found.notes, found.settings, found.unread)._adapted(lora)

    def _adapted(self, adapter: Adapter | None) -> Checkpoint:
        """The same with an adapter merged into it, as far as it is not yet."""
        if adapter is None:
            return self
        entries = adapter.merged(self.entries) if self.entries else {}
        if entries:
            adapter.require(entries)
        return replace(self, entries=entries, notes=(*self.notes, adapter.note), adapter=adapter)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """Those that hold tensors, in order."""
        return tuple(sorted({file for entry in self.entries.values() for file, _ in entry.lies}))

    @property
    def deciding(self) -> tuple[Path, ...]:
        """All files that decide the tensors: the adapter's, too."""
        return self.weight_files if self.adapter is None else (*self.weight_files, *self.adapter.files)

    def load(self, name: str) -> Tensor:
        """One tensor in its own dtype. Raises CheckpointError if missing, unreadable or not finite."""
        import torch
        from safetensors import SafetensorError

        if name not in self.entries:
            raise CheckpointError(f"{self.folder} has no tensor {name}; the checkpoint does not fit its config.json")
        try:
            entry = self.entries[name]
            with entry.opened() as file:
                tensor = entry.read(name, file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {name} from {self.entries[name].file}: {error}") from None
        if tensor.is_floating_point() and tensor.element_size() < 2:
            raise CheckpointError(
                f"{name} in {entry.file.name} is stored as {entry.dtype}, without scales that say what it means"
            )
        if tensor.is_floating_point() and tensor.numel() and not all(map(torch.isfinite, torch.aminmax(tensor))):
            bad = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"{name} in {self.entries[name].file.name} holds {bad} NaN or infinite values; "
                "the checkpoint is damaged, fetch it again"
            )
        return tensor


def deciding_files(weights: Sequence[Path], folder: Path) -> list[Path]:
    """All that decides what a model makes of a text: its weight files, and configuration and tokenizer in its folder."""
    beside = [
        path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".jinja", ".model") and path.is_file()
    ]
    return [*weights, *beside]


def checksums(checkpoint: Checkpoint) -> dict[str, str]:
    """sha256 of a model's files by name: those that decide the bytes of whatever is made of it (weights, configuration, what
    a tokenizer needs), and licence, notices and card, which go along. Of a GGUF file, or the parts of one, its own."""
    folder = checkpoint.folder
    if checkpoint.place.is_file():
        return {path.name: found for path, found in sha256_each(checkpoint.deciding).items()}
    names = ("config.json", *companions(folder, (*LEGAL, *LAYOUT)))
    paths = dict.fromkeys((*checkpoint.deciding, *(folder / name for name in names)))
    adapter = () if checkpoint.adapter is None else checkpoint.adapter.files
    return {
        path.name if path in adapter else path.relative_to(folder).as_posix(): found
        for path, found in sha256_each(paths).items()
    }


def _parts(config: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Tensors of the model that the checkpoint holds in others, or under other names, as its family declares."""
    if not entries:
        return {}
    try:
        spec = load_spec(config)
    except UnsupportedModel:
        return {}
    found = {}
    branches = (branch for layer in range(spec.layers) for branch in spec.branches(layer))
    inside = [(branch.root, weight) for branch in branches for weight in branch.sublayer.weights]
    drafts = [(t.name.removesuffix(t.declared.name), t.declared) for t in draft_of(spec)]
    for root, weight in (*inside, *drafts):
        name = root + weight.name
        for part in weight.slices if name not in entries else ():
            if (whole := root + part.name) in entries:
                entry = entries[whole]
                shape = entry.shape if part.whole else weight.shape
                stored = entry.part.name if entry.part else whole
                found[name] = replace(entry, shape=shape, part=replace(part, name=stored))
    return found


def _renamed(config: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Tensors that other versions of a multimodal model's checkpoints call otherwise, under the names that they have here."""
    wrapper = wrapper_of(config)
    if wrapper is None:
        return {}
    here = ((wrapper.here(name), name) for name in entries)
    return {ours: replace(entries[name], part=Slice(name)) for ours, name in here if ours not in entries}


def _download(model: str, weights: bool) -> Path:
    """Fetch a hub snapshot, of a revision where one is given: safetensors and text files only."""
    name, revision = hub_id(model)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise NoSuchModel(f"no such model: {model} is neither a folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.txt", "*.md", "tokenizer*", "*.model", "LICENSE*", "LICENCE*", "NOTICE*"]
    wanted = [*patterns, "*.safetensors"] if weights else patterns
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub client raises many types; all mean that the model cannot be had
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NoSuchModel(
            f"no such model: {model} is not a local folder, and the hub answered: {line}; "
            "check the name, the network and, for a gated model, that you are logged in (hf auth login)"
        ) from None


def own_codec(spec: ModelSpec, checkpoint: Checkpoint) -> str:
    """The float codec of most of a checkpoint's numbers; without weights, of the type that config.json names."""
    counted: Counter[str] = Counter()
    for tensor in spec.tensors() if checkpoint.entries else ():
        entry = checkpoint.entries.get(tensor.name)
        if entry is not None and entry.codec is not None:
            counted[entry.codec] += tensor.parameters
    if counted:
        return counted.most_common(1)[0][0]
    return named_codec(checkpoint.config) or "bf16"


def checkpoint_problems(spec: ModelSpec, checkpoint: Checkpoint) -> list[str]:
    """Tensors of another shape than config.json implies; CheckpointError for the first that is not there."""
    problems = []
    for tensor in spec.tensors():
        entry = checkpoint.entries.get(tensor.name)
        if entry is None:
            raise CheckpointError(
                f"{checkpoint.folder} has no tensor {tensor.name}; the checkpoint does not fit its config.json"
            )
        if entry.codec is None:
            problems.append(
                f"{tensor.name} is stored as {shown(entry.dtype)}, without scales that say what it means; give a checkpoint in F32, "
                "F16 or BF16, or one whose config.json says how it is quantized"
            )
        if entry.shape != tensor.shape:
            problems.append(
                f"{tensor.name} is {list(entry.shape)} in the checkpoint, config.json implies {list(tensor.shape)}"
            )
    return problems
