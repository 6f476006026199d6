"""The same rows in a terminal of any width, as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import replace

import pytest

from compress.report.advice import advise
from compress.report.compare import Run, compare
from compress.report.compare_data import as_dict, to_csv, to_json
from compress.report.compare_table import CompareTable, compare_markdown
from compress.report.scorecard import Artifact
from tests.cards import card, full_card, scores, text

LONG = "a-variant-with-a-name-that-goes-on-and-on-q4-k-m-imatrix"
CARDS = [
    full_card("two-bit", 4_400_000, 0.0258),
    full_card("four-bit", 8_000_000, 0.00123),
    full_card("[red]markup[/red]", 9_000_000, 0.0000456),
    card("unscored", 7_000_000, None),
    card("elsewhere", 6_000_000, 0.1, model="models/another"),
]


def shown(cards, width: int) -> str:
    comparison = compare([Run(c) for c in cards])
    return text(CompareTable(comparison, advise(comparison)), width)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_nothing_is_cut_at_any_width(width: int) -> None:
    lines = shown(CARDS, width)
    assert max(map(len, lines.splitlines())) <= width
    assert "…" not in lines
    for whole in (
        "0.0258 [0.0232, 0.0284]", "0.00123 [0.00111, 0.00135]", "4.56e-05 [4.10e-05, 5.02e-05]", "37.4 [36.4, 38.4]",
        "60.0% -2.0 [-5.0, 1.0]", "-3.0 +1.0", "x2.00 [1.80, 2.20]", "28.6 MiB", "20.0%", "[red]markup[/red]",
    ):  # fmt: skip
        assert whole in lines, whole
    for row in ("two-bit", "four-bit", "original tiny", "unscored", "elsewhere"):
        assert any(row in line for line in lines.splitlines())


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_long_name_is_folded(width: int) -> None:
    lines = shown([full_card(LONG, 4_400_000, 0.0258), card("b", 5, 0.1)], width)
    assert max(map(len, lines.splitlines())) <= width and "…" not in lines
    assert "0.0258 [0.0232, 0.0284]" in lines
    parts = [re.split(r" {2,}", line.strip(" *"))[0] for line in lines.splitlines()]
    start = next(number for number, part in enumerate(parts) if part and LONG.startswith(part))
    assert "".join(parts[start : start + 5]).startswith(LONG)


def test_wide_terminals_need_one_block() -> None:
    blocks = {width: shown(CARDS[:1], width).count("two-bit  ") for width in (60, 120, 400)}
    assert blocks[60] > blocks[120] > blocks[400] == 1


def test_markdown_is_a_well_formed_table() -> None:
    comparison = compare([Run(card("a|b", 5, 0.1)), Run(card("<c>", 7, 0.01))])
    markdown = compare_markdown(comparison, advise(comparison))
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3 and len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert table[2].startswith("|  | original | – | 21.0 MiB | 100.0% |")
    assert table[4].startswith("| \\* | a\\|b | gguf | 5 B |") and "| \\<c\\> |" in table[3]
    assert "- " in markdown.splitlines()[6] and markdown.endswith("\n")


def test_json_and_csv_hold_the_same_numbers() -> None:
    comparison = compare([Run(c) for c in CARDS])
    told = json.loads(to_json(comparison, advise(comparison)))
    assert told == json.loads(json.dumps(as_dict(comparison, advise(comparison))))
    rows = list(csv.DictReader(io.StringIO(to_csv(comparison))))
    assert (
        [row["name"] for row in rows] == [row["name"] for row in told["rows"]] == [row.name for row in comparison.rows]
    )

    def flat(value: dict, path: str = "") -> dict:
        out = {}
        for key, item in value.items():
            out |= flat(item, f"{path}{key}_") if isinstance(item, dict) else {path + key: item}
        return {key: item for key, item in out.items() if item is not None}

    for row, whole in zip(rows, told["rows"], strict=True):
        wanted = {key: str(int(item) if isinstance(item, bool) else item) for key, item in flat(whole).items()}
        assert {key: item for key, item in row.items() if item} == wanted


def test_json_says_what_scorecards_say() -> None:
    comparison = compare([Run(c) for c in CARDS])
    rows = {row["name"]: row for row in as_dict(comparison, advise(comparison))["rows"]}
    two = rows["two-bit"]
    assert two["bytes"] == 4_400_000 and two["share"] == pytest.approx(0.2) and two["comparable"] is True
    assert (two["kl_nats"]["mean"], two["kl_nats"]["p999"]) == (0.0258, 0.0258 * 20)
    assert two["tasks"]["blimp"]["change"] == pytest.approx({"value": -0.02, "low": -0.05, "high": 0.01})
    assert two["tasks"]["blimp"]["lost"]["value"] == pytest.approx(0.03)
    assert "blimp.island_effects" in two["tasks"]
    assert two["speed"]["generation_tokens_per_second"]["median"] == 80
    assert two["speed"]["ratio"]["generation"]["median"] == 2.0
    assert rows["elsewhere"]["comparable"] is False
    assert rows["unscored"]["perplexity"] is None


def test_numbers_that_are_not_finite_are_null() -> None:
    ruined = replace(scores(1.0, 9.0), perplexity=replace(scores(1, 1).perplexity, value=math.inf, high=math.inf))
    artifact = Artifact(container="gguf", path="x", bytes=1, bits_per_weight=2, scores=ruined)
    comparison = compare([Run(card("x", 1, None, artifacts=(artifact,)))])
    raw = json.loads(to_json(comparison, advise(comparison)), parse_constant=lambda name: pytest.fail(name))
    assert raw["rows"][1]["perplexity"]["value"] is None
    assert "inf" not in to_csv(comparison)
