"""Every shipped recipe on a random model of every family of Llama's kind: it runs, its artifacts reload, engines agree with what was solved.
Families that differ from another in a norm or a window alone take one recipe for each step, solver, scheme and container.

One block of 128 columns, so that every codec finds whole blocks (ggml's of 256 fall back, as they must); solvers refine
little, they have their own tests. The gate is
the proof: each artifact is decoded tensor by tensor against what was solved, and its logits compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from gguf import GGUFReader
from safetensors.torch import load_file

from compress.containers import CONTAINERS
from compress.errors import PlanError
from compress.plan import make_plan
from compress.recipe import Recipe, bundled_recipes, load_recipe
from tests.integration.delivery import SHRINKING
from tests.integration.runs import carry_out, cheap, small
from tests.proofs import proved
from tests.tiny import FAMILIES, OTHER_MIXERS, tiny_model

RECIPES = sorted(bundled_recipes())
EXPERTS_ONLY = {
    name
    for name, path in bundled_recipes().items()
    if "scheme: EXPERTS_" in path.read_text() or "prune_experts" in path.read_text()
}
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "head_dim": 32,
    "num_hidden_layers": 1,
    "num_experts": 4,
}

Models = Callable[[str, int, int], Path]


def config(family: str, layers: int, width: int) -> dict[str, int]:
    """The keys of WIDE that the family has, with so many blocks and columns; narrow models have two experts."""
    import transformers

    known = getattr(transformers, f"{FAMILIES[family][0]}Config")().to_dict()
    wide = {key: width if value == 128 else value for key, value in WIDE.items() if key in known}
    experts = {key: 2 for key in ("num_experts", "num_local_experts") if key in known and width < 128}
    return wide | experts | {"num_hidden_layers": layers}


def layers(recipe: Recipe) -> int:
    """Blocks of the model for a recipe: one can be dropped of two."""
    return 2 if recipe.step("drop_layers") else 1


def width(recipe: Recipe) -> int:
    """Columns of the model for a recipe: tiles of a trellis, which take long to search, fit into fewer."""
    quantize = recipe.step("quantize")
    return 64 if quantize and any(str(rule.codec).startswith("trellis") for rule in quantize.rules) else 128


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """One model a family, depth and width, made when first asked for."""
    folder = tmp_path_factory.mktemp("families")

    @cache
    def made(family: str, layers: int, width: int) -> Path:
        return tiny_model(family, folder / f"{family}-{layers}-{width}", **config(family, layers, width))

    return made


def features(name: str) -> set[tuple[str, str]]:
    """What a recipe uses: steps, solvers, containers."""
    recipe = load_recipe(name)
    rules = getattr(recipe.step("quantize"), "rules", ())
    return {
        *(("step", step.kind) for step in recipe.steps),
        *(("solver", str(rule.solver)) for rule in rules),
        *(("container", export.container) for export in recipe.export),
    }


def covering() -> list[str]:
    """A few recipes that use all that the bundled ones do: each adds something."""
    seen: set[tuple[str, str]] = set()
    chosen = []
    for name in RECIPES:
        if name not in EXPERTS_ONLY and features(name) - seen:
            chosen.append(name)
            seen |= features(name)
    return chosen


ALIKE = ("mistral", "qwen3")
"""Llama with a window, Qwen2 with norms on queries and keys."""
CASES = [
    (name, family)
    for family in FAMILIES
    if family not in OTHER_MIXERS
    for name in (covering() if family in ALIKE else RECIPES)
]


@pytest.mark.parametrize(("name", "family"), CASES)
def test_recipe_on_family(name: str, family: str, models: Models, tmp_path: Path) -> None:
    shipped = load_recipe(name)
    model = models(family, layers(shipped), width(shipped))
    recipe = small(name, model, tmp_path / "out", "calibration.samples=2", *cheap(name))
    dense = "moe" not in family and family != "mixtral"
    if dense and name in EXPERTS_ONLY:
        with pytest.raises(PlanError, match="experts"):
            carry_out(recipe)
        return
    card = carry_out(recipe)
    assert card.gate.passed, card.gate
    assert len(card.artifacts) == len(recipe.export)
    proved(family, "recipe", recipe=name, containers=[artifact.container for artifact in card.artifacts])
    if not SHRINKING & {step.kind for step in recipe.steps}:
        return
    plan = make_plan(recipe)
    for artifact in card.artifacts:
        planned = sum(CONTAINERS[artifact.container].tensor_bytes(t, plan.own_codec) for t in plan.tensors)
        assert stored_bytes(tmp_path / "out" / artifact.path) == pytest.approx(planned, rel=0.01)


@pytest.mark.parametrize("kinds", [["R1"], ["R2"], ["R1", "R2"]])
def test_a_stream_with_norms_behind_is_not_rotated(kinds: list[str], models: Models, tmp_path: Path) -> None:
    """The plan says why; value heads turn all the same."""
    model = models("olmo2", 2, 128)
    recipe = small("rotate-w4-g128", model, tmp_path / "out", f"steps[0].rotate.kinds={json.dumps(kinds)}")
    if "R1" not in kinds:
        assert make_plan(recipe).rotation is not None
        return
    with pytest.raises(PlanError, match=r"rotate: the norm behind the attention half .* set kinds: \[R2\]"):
        make_plan(recipe)


def stored_bytes(artifact: Path) -> int:
    """Bytes of the tensors in an artifact, read by the formats' own packages."""
    if artifact.is_file():
        return sum(int(tensor.n_bytes) for tensor in GGUFReader(artifact).tensors)
    return sum(
        t.numel() * t.element_size() for file in artifact.glob("*.safetensors") for t in load_file(file).values()
    )
