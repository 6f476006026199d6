"""Every bundled recipe carried out: what it delivers, whether engines agree, and that its bytes stay what they were.

For the hashes see `artifacts.py`. A case is carried out once for all three, most of them on the demo model cut to its
first block and four experts.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.errors import GateFailed
from compress.models import load_spec
from compress.models.checkpoint import Checkpoint
from tests.golden import artifacts as golden
from tests.golden.artifacts import (
    CASES,
    EXPERTS,
    FILE,
    OUTPUTS,
    VALUES,
    Case,
    Gap,
    Outcome,
    artifacts,
    carry_out,
    changes,
    distance,
    fingerprint,
    gaps,
    outputs,
    platform_facts,
)
from tests.integration.delivery import check_bits, check_delivery, prove_gguf
from tests.integration.runs import demo_blocks

GOLDEN = json.loads(FILE.read_text())


def other_platform() -> dict[str, tuple[str | None, str]]:
    """What differs from where the hashes were taken; Python does not round floats."""
    here, there = platform_facts(), GOLDEN["platform"]
    return {k: (there.get(k), here[k]) for k in here if k != "python" and here[k] != there.get(k)}


DESCRIBED = {"gguf-q4-k-m", "rtn-w4-g128"}
"""Cases whose description and fingerprints are held against the file although the bytes are the same."""


@pytest.mark.filterwarnings("default:hashes were taken elsewhere")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_recipe_is_delivered_and_its_artifacts_are_what_they_were(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = carry_out(case, tmp_path)
    monkeypatch.chdir(tmp_path)
    check_delivery(outcome.plan, outcome.card)
    if not case.family:
        check_bits(outcome.plan, outcome.card)
        if [export.container for export in outcome.plan.recipe.export] == ["gguf"]:
            (gguf,) = outcome.files.values()
            prove_gguf(gguf, outcome.plan.spec, tmp_path)
    require_same(outcome)


def require_same(outcome: Outcome) -> None:
    """The bytes of the artifacts are what they were; on another platform, as nearly as it rounds."""
    case, wanted, differs = outcome.case, GOLDEN["cases"][outcome.case.name], other_platform()
    same = outcome.sha256 == {name: entry["sha256"] for name, entry in wanted.items()}
    if same and case.name not in DESCRIBED:
        return
    found = artifacts(outcome)
    if same and not differs:
        assert found == wanted
        return
    assert set(found) == set(wanted)
    if not (changed := list(changes(case, found, wanted))):
        return
    assert differs, f"bytes changed on the platform of the hashes: {changed}"
    warnings.warn(f"hashes were taken elsewhere {differs}: fingerprints are compared, {changed}", stacklevel=1)
    for name in wanted:
        assert found[name]["content"] == wanted[name]["content"], name
        assert not [str(gap) for gap in gaps(case.tolerances, found[name], wanted[name]) if not gap.share < 1], name


def test_every_case_has_its_hashes() -> None:
    assert {case.name for case in CASES} == set(GOLDEN["cases"])


# What the comparison on other platforms can tell from the right file, and what it lets pass.


def test_values_feel_order_sign_and_place() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 64, 64))
    heads = a.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)  # RoPE's halves against its pairs
    limit = VALUES["matrices"]

    def apart(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
        wanted, found = (fingerprint([("m.0.w", x), ("m.1.w", y)])["m.#.w"] for x, y in ((a, b), (first, second)))
        return distance(found, wanted)

    for wrong in ((a[::-1], b[::-1]), (a.T, b.T), (-a, -b), (b, a), (heads, np.roll(b, 1, axis=0))):
        assert apart(*wrong)[1] > limit.distance
    assert apart(1.1 * a, 1.1 * b)[0] > limit.rms
    rms, moved = apart(*(np.sqrt(0.75) * w + 0.5 * rng.standard_normal(w.shape) for w in (a, b)))  # as 2 bits do
    assert rms < limit.rms and moved < limit.distance


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "sign": lambda w: -w,
    "rows": lambda w: w.roll(1, 0),
    "columns": lambda w: w.roll(1, 1),
}


def test_outputs_feel_every_matrix(tmp_path: Path) -> None:
    """Every kind of matrix of the model that most recipes run on; noise as 4 bits leave it passes."""
    checkpoint = Checkpoint.open(demo_blocks(tmp_path / "demo", 1, EXPERTS))
    spec, generator = load_spec(checkpoint.config), torch.Generator().manual_seed(0)
    weights = {tensor.name: checkpoint.load(tensor.name).float() for tensor in spec.tensors()}
    windows = np.random.default_rng(0).integers(0, spec.vocab_size, (2, 64))

    def computed(changed: Mapping[str, Tensor]) -> dict[str, dict[str, list[float]]]:
        return {"outputs": fingerprint(outputs(spec, {**weights, **changed}.__getitem__, windows))}

    def farthest(changed: Mapping[str, Tensor]) -> Gap:
        return gaps(OUTPUTS, computed(changed), right)[0]

    right = computed({})
    matrices = {name: w for name, w in weights.items() if w.dim() == 2}
    kinds = {name.split(".")[-2] for name in matrices}
    assert len(kinds) == 9  # embeddings, q, k, v, o, router, gate, up, down
    for kind in sorted(kinds):
        for what, wrong in WRONG.items():
            gap = farthest({name: wrong(w) for name, w in matrices.items() if name.split(".")[-2] == kind})
            assert gap.share > 1, (kind, what, str(gap))
    noise = {n: w + 0.1 * w.std() * torch.randn(w.shape, generator=generator) for n, w in matrices.items()}
    assert 0 < farthest(noise).share < 0.5


def test_a_case_that_fails_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = CASES[:3]
    entry = {"sha256": "new", "content": "same"}

    def run(case: Case, folder: Path) -> Case:
        if case is first:
            raise GateFailed("too far")
        return case

    file = tmp_path / "artifacts.json"
    here = {
        "platform": platform_facts(),
        "cases": {c.name: {"config.json": {**entry, "sha256": c.name}} for c in CASES},
    }
    elsewhere = {**here, "platform": {**here["platform"], "processor": "another"}}
    for name, value in (("FILE", file), ("CASES", (first, second, third)), ("carry_out", run)):
        monkeypatch.setattr(golden, name, value)
    monkeypatch.setattr(golden, "artifacts", lambda outcome: {"config.json": entry})
    for before, kept in ((here, first.name), (elsewhere, None)):  # hashes of two platforms are never mixed
        file.write_text(json.dumps(before))
        assert golden.main([]) == 1
        cases = json.loads(file.read_text())["cases"]
        assert cases[second.name] == cases[third.name] == {"config.json": entry}
        assert (cases[first.name]["config.json"]["sha256"] if first.name in cases else None) == kept
    assert "FAILED, too far" in (out := capsys.readouterr().out) and "config.json: bytes only" in out
    file.write_text(json.dumps(elsewhere))
    with pytest.raises(SystemExit, match="another platform"):
        golden.main([second.name])
