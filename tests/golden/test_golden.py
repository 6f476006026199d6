"""Golden hashes: the bytes of every bundled recipe's artifacts stay what they were, see `artifacts.py`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from tests.golden.artifacts import CASES, FILE, TOLERANCE, Case, artifacts, platform_facts

GOLDEN = json.loads(FILE.read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_artifacts_are_what_they_were(case: Case, tmp_path: Path) -> None:
    found, wanted = artifacts(case, tmp_path), GOLDEN["cases"][case.name]
    assert set(found) == set(wanted)
    if platform_facts() == GOLDEN["platform"]:
        changed = [name for name in wanted if found[name]["sha256"] != wanted[name]["sha256"]]
        assert not changed
        return
    warnings.warn(f"hashes are of {GOLDEN['platform']}, this is {platform_facts()}: values are compared", stacklevel=1)
    for name, entry in wanted.items():
        for tensor, values in entry.get("values", {}).items():
            assert found[name]["values"][tensor] == pytest.approx(values, rel=TOLERANCE, abs=1e-6), (name, tensor)


def test_every_case_has_its_hashes() -> None:
    assert {case.name for case in CASES} == set(GOLDEN["cases"])


def test_a_fingerprint_feels_order_and_sign(tmp_path: Path) -> None:
    """What the comparison on other platforms can tell from the right file."""
    from safetensors.numpy import save_file

    from tests.golden.artifacts import fingerprint

    values = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32) + 0.5
    prints = []
    for name, other in (("a", values), ("b", values.T.copy()), ("c", -np.abs(values)), ("d", values * 1.1)):
        save_file({"w": other}, tmp_path / f"{name}.safetensors")
        prints.append(fingerprint(tmp_path / f"{name}.safetensors")["w"])
    assert all(other != pytest.approx(prints[0], rel=TOLERANCE) for other in prints[1:])
