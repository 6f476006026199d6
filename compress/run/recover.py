"""The end-to-end stage of recovery as a unit of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compress.decode import decode
from compress.plan.plan import Plan
from compress.recover.end_to_end import Compressed, Original, finetune
from compress.solve.files import load_outcomes
from compress.streaming.activations import Activations, mapped
from compress.streaming.journal import Journal
from compress.streaming.walk import embed
from compress.weights import Packed

if TYPE_CHECKING:
    import numpy as np

    from compress.run.units import Run


RECOVERED = "recovered"  # the journal's unit for all this; what moved in block 3 is the unit `recovered-00003`


def tunes_end_to_end(plan: Plan) -> bool:
    """Whether a run has this stage."""
    return plan.recover is not None and plan.recover.end_to_end > 0 and plan.needs_calibration


def outcomes_file(journal: Journal, layer: int) -> Path:
    """Where a block's solved tensors wait for this stage."""
    return journal.folder / f"outcomes-{layer:05d}.safetensors"


def recover_end_to_end(run: Run, ids: np.ndarray, states: Activations, progress: Callable[[float], None]) -> None:
    """The stage of a run: what moved replaces the tensors of the blocks' own units, all at once, and files that only
    this stage reads go.

    ids: [windows, length]; states: the original's, at the output of the last block. A run that is killed before the
    journal names the unit repeats it from the start.
    """
    plan, journal, spec, recover = run.plan, run.journal, run.plan.spec, run.plan.recover
    assert recover is not None
    # parameters and their moments lie in mapped files, which only the CPU computes with
    inputs = Activations(journal.folder / "recover-inputs.f32", states.shape)
    states = Activations(states.path, states.shape)
    moved: dict[str, dict] = {}

    def write(layer: int, tensors: Mapping[str, Packed]) -> None:
        moved[f"{RECOVERED}-{layer:05d}"] = {}
        journal.write(f"{RECOVERED}-{layer:05d}", tensors)

    with torch.inference_mode(False):  # autograd meets these
        table = decode(journal.fetch(spec.embeddings))
        embed(spec, table, ids, inputs)
        head = table if spec.tied else decode(journal.fetch(spec.head))
        model = Compressed(
            spec, journal.fetch, lambda layer: load_outcomes(outcomes_file(journal, layer)), head, inputs
        )
        original = Original(states, run.load(spec.final_norm).float(), run.load(spec.head).float())
    result = finetune(
        model,
        original,
        recover,
        lambda name, *shape: mapped(journal.folder / f"recover-{name}.f32", *shape),
        write,
        progress,
        seed=plan.recipe.seed,
    )
    journal.write(RECOVERED, {} if result.norm is None else {spec.final_norm: result.norm})
    for pattern in ("recover-*.f32", "outcomes-*.safetensors"):
        journal.release(*journal.folder.glob(pattern))
    journal.release(states.path)
    journal.name(moved | {RECOVERED: {"recovered": result.report}})
