"""What a run delivers, held against its recipe and plan; GGUFs are proved by transformers and llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from compress.containers import gguf as gguf_container
from compress.models.spec import ModelSpec
from compress.plan.plan import Plan
from compress.recipe import Recipe
from compress.report.scorecard import Scorecard, read
from tests.integration.containers import reference_logits
from tests.integration.runs import TOLD, as_model, final_names, kl

ENGINE_KL = 0.02
"""llama.cpp rounds activations to 8 bits and random models amplify it: medians measured are 0.001 to 0.009 nats; a
wrong RoPE base gives 0.09 to 2."""
SHRINKING = {"prune", "factorize", "drop_layers", "prune_experts", "prune_structured"}
"""Steps whose savings are in the files' bytes."""


def check_delivery(plan: Plan, card: Scorecard) -> None:
    """The gate has passed; files have the names they should and no others, and are as large as planned."""
    recipe, output = plan.recipe, Path(plan.recipe.output)
    assert card.gate.passed, card.gate
    model = Path(recipe.model)
    names = [artifact_name(recipe, model, export.container) for export in recipe.export]
    single = any(export.container == "gguf" for export in recipe.export)
    beside = {"README-original.md"} if single and (model / "README.md").exists() else set()
    assert final_names(output) == {*names, *beside, *TOLD}
    saved = read(output)
    assert saved.gate.passed
    assert [artifact.path for artifact in card.artifacts] == [artifact.path for artifact in saved.artifacts] == names
    for artifact in card.artifacts:
        path = output / artifact.path
        files = [path] if path.is_file() else list(path.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        if path.is_file():
            assert artifact.bytes == size
        if artifact.container in ("compress", "safetensors", "gguf"):
            assert size == pytest.approx(plan.file_bytes[artifact.container], rel=0.01)


def check_bits(plan: Plan, card: Scorecard) -> None:
    """Bits a weight of the original, the demo model cut to a block of four experts: half of it are embeddings, which stay
    float unless a rule says otherwise, and of which a rotation makes two."""
    recipe, embeddings = plan.recipe, next(t for t in plan.tensors if t.spec.role == "embeddings")
    kinds = {step.kind for step in recipe.steps}
    limit = {"int8": 13, "rota": 20}.get(recipe.name[:4], 8 if embeddings.codec == "q8_0" else 11)
    if kinds & SHRINKING and "quantize" not in kinds:
        limit = 15
    found = [artifact.bits_per_weight for artifact in card.artifacts]
    assert max(found) < limit, found


def artifact_name(recipe: Recipe, model: Path, container: str) -> str:
    """The name of an artifact: of a GGUF by the model and its only scheme, where that says all."""
    if container != "gguf":
        return f"{recipe.name}-{container}"
    quantize, pruned = recipe.step("quantize"), recipe.step("prune_experts")
    scheme = None if quantize is None or quantize.rules or pruned else quantize.scheme
    return f"{model.name}-{scheme}.gguf" if scheme else f"{recipe.name}.gguf"


def ids_of(count: int = 48) -> np.ndarray:
    """Token ids [count]."""
    return np.random.default_rng(1).integers(0, 4000, count)


def prove_gguf(path: Path, spec: ModelSpec, work: Path) -> None:
    """llama.cpp computes what transformers computes with the decoded weights, and writes text."""
    (work / "left").mkdir()
    (work / "left" / "config.json").write_text(json.dumps(spec.config))
    decoded = gguf_container.load_dense(path, spec)
    assert all(torch.isfinite(w).all() for w in decoded.values())
    if not spec.tied:  # tied models have one tensor for both ends
        assert "lm_head.weight" in decoded
    expected = reference_logits(as_model(decoded, work / "left", work / "decoded"), ids_of())
    pytest.importorskip("llama_cpp")
    from compress.engines.llama_cpp import LlamaCpp

    with LlamaCpp(path, threads=1) as engine:
        found = next(engine.logits([ids_of()]))
        engine.generate("The house", max_tokens=2)
    distance = kl(expected, found)
    assert distance < ENGINE_KL
    assert distance < 0.5 * kl(expected, np.roll(found, 1, axis=0))  # an engine that ignores the text would not pass
