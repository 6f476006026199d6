"""Models: what they are (`spec`, `families`) and what they compute (`forward`)."""

from compress.models.spec import Family, ModelSpec, TensorSpec, known_families, load_spec, register

__all__ = ["Family", "ModelSpec", "TensorSpec", "known_families", "load_spec", "register"]
