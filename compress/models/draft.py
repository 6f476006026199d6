"""Layers that predict a further token (multi-token prediction), as families declare them beside the decoder. No torch."""

from __future__ import annotations

from compress.models.spec import MTP, ModelSpec, TensorSpec

ROLE = "mtp"
"""The role of their matrices."""
_OWN = ("norms", "biases", "router", "small")


def draft_of(spec: ModelSpec) -> tuple[TensorSpec, ...]:
    """The tensors of a model's draft layer; none where its family declares none. No text is calibrated on it: its matrices have no
    inputs."""
    if spec.family.draft is None:
        return ()
    made = spec.family.draft(spec.read)
    inside = ((made.root, weight) for sublayer in made.block for weight in sublayer.weights)
    return tuple(
        TensorSpec(
            root + weight.name,
            weight.shape,
            weight.role if weight.role in _OWN else ROLE,
            None,
            weight.expert,
            f"blk.{spec.layers}.{weight.gguf}",
            None,
            declared=weight,
            beside=MTP,
        )
        for root, weight in (*inside, *(("", weight) for weight in made.others))
    )
