"""Rows of several runs: what they hold, in what order, under which names, and which compare with which."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from compress.report.advice import advise
from compress.report.compare import Run, accuracies, accuracy_change, compare, model_name, without_paths
from compress.report.compare_table import CompareTable
from compress.report.scorecard import Artifact, Base
from compress.report.table import scorecard_table
from tests.cards import card, full_card, scores, task, text


def names(cards) -> list[str]:
    return [row.name for row in compare([Run(c) for c in cards]).rows]


def test_the_original_comes_first_then_the_largest() -> None:
    rows = compare([Run(card("small", 3_000_000, 0.5)), Run(card("large", 9_000_000, 0.01))]).rows
    assert [(row.name, row.original) for row in rows] == [("original", True), ("large", False), ("small", False)]
    original, large, _ = rows
    assert (original.bytes, original.share, original.kld, original.scores.perplexity.value) == (
        22_000_000,
        1,
        None,
        36.6,
    )
    assert large.share == pytest.approx(9 / 22)
    assert (large.kld.value, large.kld.low, large.kld.high) == pytest.approx((0.01, 0.009, 0.011))


def test_a_share_is_of_bytes_wherever_it_is_shown() -> None:
    """Old cards have a ratio of weight bytes alone."""
    plain = card("x", 5_500_000, 0.1)
    old = plain.model_copy(update={"artifacts": (plain.artifacts[0].model_copy(update={"ratio": 0.2}),)})
    comparison = compare([Run(old)])
    assert "25.0%" in text(scorecard_table(old))
    assert "25.0%" in text(CompareTable(comparison, advise(comparison)))


def test_the_front_is_what_nothing_beats_in_both() -> None:
    cards = [
        card("large-good", 9, 0.01),
        card("small-bad", 3, 0.50),
        card("middle", 5, 0.10),
        card("dominated", 6, 0.20),
        card("unscored", 1, None),
        card("broken", 2, 0.001, passed=False),  # neither on the front nor a rival
    ]
    comparison = compare([Run(c) for c in cards])
    assert [row.name for row in comparison.variants if row.on_front] == ["large-good", "middle", "small-bad"]
    assert [row.name for row in comparison.variants if row.failed] == ["broken"]
    assert {row.name for row in comparison.comparable} == {"large-good", "middle", "dominated", "small-bad"}
    assert comparison.warnings == ()  # one that was not scored is of the same original


def test_rows_of_another_text_are_marked_and_no_rivals() -> None:
    other = card("b", 1, 0.1, artifacts=(Artifact(container="gguf", path="o", bytes=1, bits_per_weight=1,
                                                  scores=scores(37, 0.001, "f" * 16)),))  # fmt: skip
    comparison = compare([Run(card("a", 5, 0.1)), Run(other), Run(card("c", 4, 0.2))])
    assert [(row.name, row.mark) for row in comparison.variants] == [("a", ""), ("c", ""), ("b", "†")]
    assert all(row.on_front for row in comparison.variants)
    (warning,) = comparison.warnings
    assert warning.startswith("† 1 variant is scored on another text") and "f" * 16 in warning
    shown = text(CompareTable(comparison, advise(comparison)))
    assert shown.index("† 1 variant is") < shown.index("size")


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "models/another"},
        {"base": Base(bytes=23_000_000, bits_per_weight=16)},
        {"artifacts": (Artifact(container="gguf", path="o", bytes=1, bits_per_weight=1,
                                scores=replace(scores(37, 0.1), base_perplexity=scores(40, 0).perplexity)),)},
    ],
)  # fmt: skip
def test_another_original_is_said_and_has_its_own_row(changes) -> None:
    comparison = compare([Run(card("a", 5, 0.1)), Run(card("b", 4, 0.1)), Run(card("c", 3, 0.1, **changes))])
    assert [row.mark for row in comparison.variants] == ["", "", "†"]
    assert [row.mark for row in comparison.originals] == ["", "†"]
    assert "another original" in comparison.warnings[0]


def test_a_model_scored_on_its_own_compares_by_perplexity() -> None:
    lone = card("lone", 5, 0.1, base=Base(bytes=None))
    lone = lone.model_copy(update={"artifacts": (lone.artifacts[0].model_copy(
        update={"scores": replace(scores(37, 0.1), kld=None, base_perplexity=None, perplexity_ratio=None)}),)})  # fmt: skip
    comparison = compare([Run(lone), Run(card("a", 4, 0.1))])
    assert comparison.warnings == () and len(comparison.originals) == 1
    row = next(row for row in comparison.variants if row.name == "lone")
    assert row.share is None and row.kld is None and not row.on_front and row.scores.perplexity.value == 37
    assert compare([Run(lone)]).originals == ()


def test_names_tell_rows_apart() -> None:
    two = card("r", 5, 0.1)
    two = two.model_copy(
        update={"artifacts": (two.artifacts[0], two.artifacts[0].model_copy(update={"container": "compress"}))}
    )
    assert names([two]) == ["original", "r (compress)", "r (gguf)"]
    assert {row.name for row in compare([Run(card("r", 5, 0.1), folder="a"), Run(card("r", 4, 0.1), folder="b")]).variants} == {
        "r (a)", "r (b)",
    }  # fmt: skip
    assert names([card("r", 5, 0.1), card("r", 4, 0.1), card("r", 3, 0.1)]) == ["original", "r #1", "r #2", "r #3"]
    assert [row.name for row in compare([Run(card("r", 5, 0.1), label="Q4")]).variants] == ["Q4"]


def test_mean_change_of_accuracy() -> None:
    """Halves of intervals add in squares: 3 and 4 give 5, over two tasks 2.5."""
    one = card("x", 5, 0.1)
    tasks = {"a": task(0.6, -0.02, half=0.03), "b": task(0.3, -0.04, half=0.04), "b.detail": task(0.3, 0.5)}
    one = one.model_copy(update={"artifacts": (one.artifacts[0].model_copy(update={"tasks": tasks}),)})
    comparison = compare([Run(one)])
    assert accuracies(comparison) == ("a", "b")
    change = accuracy_change(comparison.variants[0], ("a", "b"))
    assert (change.value, change.low, change.high) == pytest.approx((-0.03, -0.055, -0.005))
    assert accuracy_change(comparison.variants[0], ("a", "c")) is None


def test_speed_is_shown_as_a_multiple_of_the_same_run() -> None:
    comparison = compare([Run(full_card("x", 5_000_000, 0.1))])
    shown = text(CompareTable(comparison, advise(comparison)), 200)
    assert "80.0 x2.00 [1.80, 2.20]" in shown and "28.6 MiB" in shown and "was timed in" not in shown
    plain = full_card("x", 5_000_000, 0.1)
    slow = plain.base.speed.model_copy(update={"engine": "transformers"})
    other = compare([Run(plain.model_copy(update={"base": plain.base.model_copy(update={"speed": slow})}))])
    assert "The original was timed in transformers, the variants in llama.cpp" in text(
        CompareTable(other, advise(other)), 200
    )


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("/home/jane doe/models/x-1b/", "x-1b"), ("models/tiny", "tiny"), ("../x", "x"), ("owner/name", "owner/name"),
        ("C:\\Users\\jane\\x", "x"), ("owner/name@0123456789abcdef", "owner/name@0123456"), ("a/b/c", "c"),
    ],
)  # fmt: skip
def test_models_are_called_by_name(model: str, name: str) -> None:
    assert model_name(model) == name


def test_no_path_is_left_in_a_line() -> None:
    line = "/data/jane doe/m.gguf and /srv/models/x differ: 4/5 checks, nats/token, see https://host/a/b, ~/out/y.bin"
    assert without_paths(line, "/data/jane doe/m.gguf") == (
        "m.gguf and x differ: 4/5 checks, nats/token, see https://host/a/b, y.bin"
    )


def test_infinite_perplexity_breaks_nothing() -> None:
    ruined = card("x", 1, None, artifacts=(Artifact(container="gguf", path="x", bytes=1, bits_per_weight=2, scores=replace(
        scores(1.0, 9.0), perplexity=replace(scores(1, 1).perplexity, value=math.inf, high=math.inf))),))  # fmt: skip
    comparison = compare([Run(ruined)])
    assert "∞" in text(CompareTable(comparison, advise(comparison)))


def test_artifacts_of_one_container_are_called_by_their_variant() -> None:
    """Under a label behind it; one that is alone keeps the run's name."""
    plain = card("ladder", 9, 0.1)
    artifact = plain.artifacts[0]
    several = [artifact.model_copy(update={"variant": v, "path": f"{v}.gguf"}) for v in ("Q8_0", "Q4_K_M")]
    other = artifact.model_copy(update={"container": "gptq", "variant": "W4A16"})
    ladder = plain.model_copy(update={"artifacts": (*several, other)})
    assert set(names([ladder])) == {"original", "Q8_0", "Q4_K_M", "ladder"}
    labelled = compare([Run(ladder, "mine")]).variants
    assert {row.name for row in labelled} == {"mine Q8_0", "mine Q4_K_M", "mine"}
    one = plain.model_copy(update={"artifacts": (several[0],)})
    assert set(names([one])) == {"original", "ladder"}
    twice = compare([Run(ladder, folder="a"), Run(ladder, folder="b")]).variants
    assert {row.name for row in twice if "Q8" in row.name} == {"Q8_0 (a)", "Q8_0 (b)"}
