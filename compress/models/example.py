"""A model of a family that stands for all of it where none is at hand. No torch."""

from __future__ import annotations

from compress.models.spec import Family, ModelSpec, load_spec

_EXAMPLE = {
    "hidden_size": 4096, "intermediate_size": 8192, "num_hidden_layers": 12, "num_attention_heads": 32, "vocab_size": 32768,
}  # fmt: skip


def example_of(family: Family) -> ModelSpec:
    """A model of a family that stands for all of it where none is at hand: what config.json leaves out has its default."""
    return load_spec({**_EXAMPLE, **family.example, "model_type": family.model_types[0]})
