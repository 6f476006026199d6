"""What scores compare with where that is not the model that is compressed: the one that it was quantized from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compress.errors import CheckpointError, PlanError, UnsupportedModel
from compress.models.checkpoint import Checkpoint, checkpoint_problems
from compress.models.companions import companion_bytes
from compress.models.identity import identify
from compress.models.locate import model_location
from compress.models.spec import ModelSpec, load_spec
from compress.reading import shortened
from compress.text import Tokenizer, has_tokenizer, load_tokenizer
from compress.text.probes import TEXTS


@dataclass(frozen=True)
class Reference:
    """name: with its commit, where that is known; place: what `Checkpoint.open` opens; weight_bytes: of its weight files."""

    name: str
    spec: ModelSpec
    place: Path
    folder: Path
    weight_bytes: int
    notes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Of all files that are needed to run it."""
        return self.weight_bytes + (0 if self.place.is_file() else companion_bytes(self.folder))


def open_reference(base: str, compressed: ModelSpec, *, weights: bool) -> Reference:
    """A recipe's `score.base` as what a model is compared with, whose vocabulary it has to have.

    Raises PlanError where the two cannot be compared, and what opening a model raises.
    """
    location = model_location(base)
    checkpoint = Checkpoint.open(location, weights=weights)
    if checkpoint.unread:
        raise UnsupportedModel(f"{base} {checkpoint.unread}")
    spec = load_spec(checkpoint.config)
    problems = checkpoint_problems(spec, checkpoint) if checkpoint.entries else []
    if spec.vocab_size != compressed.vocab_size:
        problems.append(
            f"score.base: {base} has a vocabulary of {spec.vocab_size:,}, the model one of {compressed.vocab_size:,}; "
            "give the model that it was made from"
        )
    if problems:
        raise PlanError(shortened(problems))
    size = sum(file.stat().st_size for file in checkpoint.weight_files) or 2 * spec.parameters
    name = identify(location, checkpoint.folder).version
    return Reference(name, spec, checkpoint.place, checkpoint.folder, size, checkpoint.notes)


def require_same_ids(reference: Reference, tokenizer: Tokenizer) -> None:
    """Raises CheckpointError where the tokenizer of a reference makes other ids of text than the model's."""
    if not has_tokenizer(reference.folder):
        return
    other = load_tokenizer(reference.folder, reference.spec.vocab_size)
    ours, theirs = tokenizer.encode_batch(TEXTS), other.encode_batch(TEXTS)
    if differs := [text for text, one, two in zip(TEXTS, ours, theirs, strict=True) if one != two]:
        raise CheckpointError(
            f"score.base: {reference.name} has another tokenizer than the model: {differs[0]!r} has other ids; give the model "
            "that it was made from"
        )
