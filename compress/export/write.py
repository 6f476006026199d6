"""One artifact of a plan, written from the codes that were solved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from compress import __version__
from compress.containers import CONTAINERS, Options, WriteRequest
from compress.export.text import plan_tokenizer, reads_no_text
from compress.plan.plan import Plan
from compress.recipe.schema import Export
from compress.text.agreement import shipped
from compress.weights import Packed


def write(
    plan: Plan, export: Export, packed: Callable[[str], Packed], folder: Path, progress: Callable[[float], None]
) -> list[Path]:
    """Write one container into `folder`. packed: what was solved, by name. Returns its weight files."""
    container = CONTAINERS[export.container]
    tensors = [t for t in plan.tensors if container.has_place(t.spec)]
    done = 0

    def fetch(name: str) -> Packed:
        nonlocal done
        done += 1
        progress(done / len(tensors))
        return packed(name)

    path = folder / plan.artifact_name(container, export.name)
    options = Options(max_shard_size=export.max_shard_size, scheme=plan.scheme, dtype=plan.own_codec)
    # where the tokenizer's own files lie beside the weights, transformers goes by their settings
    settings = None if container.suffix or reads_no_text(plan) else shipped(plan_tokenizer(plan)).settings
    request = WriteRequest(
        path, plan.spec, tensors, fetch, plan.source, options, provenance(plan), plan.identity, settings
    )
    return container.write(request)


def provenance(plan: Plan) -> dict[str, str]:
    """What a file says about where it comes from."""
    told = plan.told
    text = told.calibration
    read = f"{text.source.label}, {text.samples} x {text.length} tokens, seed {told.seed}"
    return {
        "compress.version": __version__,
        "compress.model": plan.identity.version,
        "compress.recipe": told.name,
        "compress.recipe_digest": told.digest(),
        "compress.calibration": read if plan.needs_calibration else "none",
    }
