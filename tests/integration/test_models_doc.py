"""docs/models.md: a row for every family, and no row claims what no test proves."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from compress import catalog
from compress.engines.transformers import TransformersSource
from compress.scoring.divergence import score
from tests.contract.blocks import NAMES
from tests.integration.runs import carry_out, cheap, small
from tests.integration.test_gguf_container import CASES as GGUF_CASES
from tests.integration.test_gguf_container import TOLERANCE
from tests.integration.test_recipes_families import CASES as RECIPE_CASES
from tests.models_matrix import DOCUMENT, HEADINGS, between, sources
from tests.proofs import proved
from tests.tiny import OTHER_MIXERS, tiny_model

TEXT = DOCUMENT.read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in between(TEXT, "matrix")[2:]]
REACH = ("Q4_K_M", "Q3_K_M", "Q2_K")


def test_every_family_has_its_row() -> None:
    assert all(len(row) == len(HEADINGS) for row in ROWS)
    assert [(row[0], row[1].replace("`", "").split(", ")) for row in ROWS] == [
        (line.name, list(line.model_types)) for line in catalog.families()
    ]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_claims_what_tests_prove(row: list[str]) -> None:
    """Of logits below the tests' own limits, and of recipes that are carried out on the family."""
    kinds = set(row[1].replace("`", "").split(", "))
    gaps = [float(found[1]) if (found := re.search(r"(\d+e-?\d+)$", cell)) else None for cell in row[2:4]]
    if gaps[0] is not None:
        assert gaps[0] <= 1e-4 and kinds & set(NAMES)
    if gaps[1] is not None:
        assert gaps[1] < 1.5 * TOLERANCE and kinds & {family for family, _ in GGUF_CASES}
    tried = {name for name, family in RECIPE_CASES if family in kinds}
    tried |= {"qwen-moe-2bit", "gptq-w4-g128"} if kinds & set(OTHER_MIXERS) else set()
    if number := re.match(r"(\d+) of the bundled ones", row[4]):
        assert 4 <= int(number[1]) <= len(tried)
    elif row[4] != "–":
        assert set(row[4].replace("`", "").split(", ")) <= tried


def test_formats_of_originals_are_those_that_are_read() -> None:
    assert between(TEXT, "sources") == sources()


@pytest.mark.parametrize("name", REACH)
def test_what_a_tiny_model_reaches(name: str, tmp_path: Path) -> None:
    """In llama.cpp, on tokens drawn at random; the document has the figures of one run, with both recipes."""
    pytest.importorskip("llama_cpp")
    from compress.engines.llama_cpp import LlamaCpp

    sizes = {
        "hidden_size": 256,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
        "num_hidden_layers": 2,
    }
    heads = {"full_attention_interval": 2, "linear_value_head_dim": 32, "linear_key_head_dim": 32, "num_experts": 4}
    model = tiny_model("qwen3_5_moe_text", tmp_path / "model", **sizes, **heads)
    sets = ("calibration.samples=4", f"steps[0].quantize.scheme={name}", *cheap("gguf-q4-k-m"))
    (artifact,) = carry_out(small("gguf-q4-k-m", model, tmp_path / "out", *sets)).artifacts
    ids = np.random.default_rng(0).integers(0, 4000, (4, 128), dtype=np.int32)
    with LlamaCpp(tmp_path / "out" / artifact.path, threads=1) as engine:
        scores, _ = score(TransformersSource(model), engine, ids)
    assert scores.kld is not None and 0 < scores.kld.mean < 4
    proved("qwen3_5_moe_text", "reach", recipe=name, bits=artifact.bits_per_weight, kld=scores.kld.mean)


def test_the_document_has_the_figures() -> None:
    rows = [re.match(r"\| `(.+)` \| ([\d.]+) \| ([\d.]+) \|", line) for line in between(TEXT, "reach")[2:]]
    found = [(row[1], float(row[2]), float(row[3])) for row in rows if row is not None]
    assert {name for name, *_ in found} == set(REACH) and len(found) == len(rows)
    assert all(bits > later[1] and gap < later[2] for (_, bits, gap), later in pairwise(found))
