"""The model a run works on: the checkpoint itself, or the checkpoint seen through a rotation."""

from __future__ import annotations

from compress.models.checkpoint import Checkpoint
from compress.plan.plan import Plan
from compress.weights import Loader


def open_original(plan: Plan) -> Checkpoint:
    """The model that a plan is about, with its adapter, where it has one."""
    return Checkpoint.open(plan.place, adapter=plan.recipe.adapter)


def working_model(plan: Plan, checkpoint: Checkpoint) -> Loader:
    """A function that gives a tensor of `plan.spec` by name, one at a time."""
    if plan.rotation is None:
        return checkpoint.load
    from compress.transforms.rotate import Rotation

    rotation = Rotation.draw(plan.original, plan.rotation)
    return lambda name: rotation.tensor(name, checkpoint.load)
