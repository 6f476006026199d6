"""Architecture families: one table per file; `base` reads configs, `decoder` runs blocks."""

from compress.models.base import Family, ModelSpec, TensorSpec, families, load_spec

__all__ = ["Family", "ModelSpec", "TensorSpec", "families", "load_spec"]
