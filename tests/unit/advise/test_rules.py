"""The rules of compress advise are data: against the recipes they name and the tables their figures are copied from."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest
from pydantic import ValidationError

from compress.advise.rules import Facts, Rules, When, quality, rules
from compress.machine import Cpu, Gpu, Machine, Memory
from compress.machine.parse import FEATURES
from compress.models import load_spec
from compress.models.checkpoint import Checkpoint
from compress.recipe.load import bundled_recipes
from compress.recipe.schemes import SCHEMES
from tests.tiny import demo_model
from tests.unit.advise.test_layout import DENSE
from tests.unit.plan.test_plan import SMALL

BENCHMARKS = (Path(__file__).resolve().parents[3] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
ROW = re.compile(r"\| ([\w-]+) \|.*?\| (\d\.\d{5}) \| (\d\.\d{5}) to (\d\.\d{5}) \|")


def table(mark: str) -> dict[str, tuple[float, ...]]:
    """Label -> KL divergence and the ends of its interval, of one of the marked tables."""
    (section,) = re.findall(rf"<!-- {mark} -->(.*?)<!-- /{mark} -->", BENCHMARKS, re.DOTALL)
    return {row[1]: tuple(map(float, row.groups()[1:])) for row in ROW.finditer(section)}


def test_measured_figures_are_those_of_the_benchmarks() -> None:
    for one in quality().measured:
        assert one.kl and one.kl.items() <= table(one.table).items()
        assert all(low <= kl <= high for kl, low, high in one.kl.values())
        assert f"{one.parameters // 10**6} million parameters" in one.of


def test_the_demo_model_has_so_many_parameters() -> None:
    spec = load_spec(Checkpoint.open(demo_model()).config)
    assert {one.parameters for one in quality().measured if "demo" in one.of} == {spec.parameters}


def test_every_candidate_is_a_recipe_or_a_scheme_and_every_figure_is_of_a_candidate() -> None:
    names = [candidate.recipe for candidate in rules().candidates]
    assert set(names) <= {*bundled_recipes(), *SCHEMES}
    assert {name for one in quality().measured for name in one.kl} <= set(names)


def test_the_best_stand_first() -> None:
    """Nowhere is a candidate surely further from the original than one behind it, where both were measured alike."""
    order = [candidate.recipe for candidate in rules().candidates]
    for one in quality().measured:
        measured = [name for name in order if name in one.kl]
        wrong = [(a, b) for a, b in combinations(measured, 2) if one.kl[a][1] > one.kl[b][2]]
        assert wrong == []


def test_sentences_are_sentences() -> None:
    for candidate in rules().candidates:
        assert candidate.why[0].isupper() and candidate.why.endswith(".") and "\n" not in candidate.why
    assert set(rules().uses) == {"chat", "code", "long"}
    contexts = [rules().uses[name].context for name in ("chat", "code", "long")]
    assert contexts == sorted(contexts)


@pytest.mark.parametrize(
    ("features", "gpus", "config", "expected"),
    [
        (("avx2",), (), SMALL, Facts(gpu=False, mixture=True, tables=True)),
        (("asimddp",), (), DENSE, Facts(gpu=False, mixture=False, tables=True)),
        (("avx",), (), DENSE, Facts(gpu=False, mixture=False, tables=False)),
        ((), (Gpu("a card", 1, 1),), DENSE, Facts(gpu=True, mixture=False, tables=True)),
    ],
)
def test_facts(features: tuple[str, ...], gpus: tuple[Gpu, ...], config: dict, expected: Facts) -> None:
    machine = Machine(Cpu("", features, 1), Memory(None, None), gpus)
    assert Facts.of(load_spec(config), machine, rules()) == expected


def test_features_are_those_that_are_read() -> None:
    assert set(rules().tables) <= set(FEATURES)


def test_conditions_hold_for_what_they_name() -> None:
    facts = Facts(gpu=False, mixture=True, tables=False)
    assert When().holds(facts) and When(mixture=True).holds(facts) and When(gpu=False, tables=False).holds(facts)
    assert not When(gpu=True).holds(facts) and not When(mixture=True, tables=True).holds(facts)


@pytest.mark.parametrize(
    "change",
    [
        {"candidates": []},
        {"candidates": [{"recipe": "a", "why": "b"}, {"recipe": "a", "why": "c"}]},
        {"candidates": [{"recipe": "a", "why": "b", "when": {"moon": "full"}}]},
        {"propose": {"most": 3, "step": 1.5}},
    ],
)
def test_rules_that_are_none(change: dict) -> None:
    with pytest.raises(ValidationError):
        Rules.model_validate({**rules().model_dump(), **change})
