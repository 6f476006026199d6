"""Golden hashes: the bytes of every bundled recipe's artifacts stay what they were, see `artifacts.py`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from tests.golden.artifacts import (
    CASES,
    DISTANCE_TOLERANCE,
    FILE,
    RMS_TOLERANCE,
    Case,
    artifacts,
    distance,
    fingerprint,
    platform_facts,
)

GOLDEN = json.loads(FILE.read_text())


def other_platform() -> dict[str, tuple[str | None, str]]:
    """What differs from where the hashes were taken; Python does not round floats."""
    here, there = platform_facts(), GOLDEN["platform"]
    return {k: (there.get(k), here[k]) for k in here if k != "python" and here[k] != there.get(k)}


@pytest.mark.filterwarnings("default:hashes were taken elsewhere")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_artifacts_are_what_they_were(case: Case, tmp_path: Path) -> None:
    found, wanted = artifacts(case, tmp_path), GOLDEN["cases"][case.name]
    assert set(found) == set(wanted)
    changed = [name for name in wanted if found[name]["sha256"] != wanted[name]["sha256"]]
    if not changed:
        return
    differs = other_platform()
    assert differs, f"bytes changed on the platform of the hashes: {changed}"
    warnings.warn(f"hashes were taken elsewhere {differs}: values of {changed} are compared", stacklevel=1)
    for name in changed:
        assert found[name].get("content") == wanted[name].get("content"), name
        values, golden = found[name].get("values", {}), wanted[name].get("values", {})
        assert set(values) == set(golden), name
        for tensor in golden:
            rms, apart = distance(values[tensor], golden[tensor])
            assert rms < RMS_TOLERANCE, (name, tensor, rms)
            assert apart < DISTANCE_TOLERANCE, (name, tensor, apart)


def test_every_case_has_its_hashes() -> None:
    assert {case.name for case in CASES} == set(GOLDEN["cases"])


def test_fingerprints_feel_order_sign_and_place(tmp_path: Path) -> None:
    """What the comparison on other platforms can tell from the right file, and what it lets pass."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 64, 64)).astype(np.float32)
    heads = a.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)  # RoPE's halves against its pairs

    def apart(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
        save_file({"m.0.w": np.ascontiguousarray(first), "m.1.w": np.ascontiguousarray(second)}, tmp_path / "other")
        other = (tmp_path / "other").rename(tmp_path / "other.safetensors")
        return distance(fingerprint(other)["m.#.w"], golden)

    save_file({"m.0.w": a, "m.1.w": b}, tmp_path / "right.safetensors")
    golden = fingerprint(tmp_path / "right.safetensors")["m.#.w"]
    for wrong in ((a[::-1], b[::-1]), (a.T, b.T), (-a, -b), (b, a), (heads, np.roll(b, 1, axis=0))):
        assert apart(*wrong)[1] > DISTANCE_TOLERANCE
    assert apart(1.2 * a, 1.2 * b)[0] > RMS_TOLERANCE
    noise = 0.3 * rng.standard_normal((2, 64, 64)).astype(np.float32)
    rms, moved = apart(a + noise[0], b + noise[1])
    assert rms < RMS_TOLERANCE and moved < DISTANCE_TOLERANCE
