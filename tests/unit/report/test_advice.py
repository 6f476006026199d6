"""Which one should I take: rules on hand-made rows."""

from __future__ import annotations

import pytest

from compress.report.advice import Advice, advise, occasions
from compress.report.compare import Run, compare
from tests.cards import card

MIB = 1 << 20


def advice(*variants: tuple[str, float, float], memory: float | None = None) -> Advice:
    """variants: name, MiB, KL divergence (its interval is a tenth to each side); the original has 21 MiB."""
    runs = [Run(card(name, int(size * MIB), kld)) for name, size, kld in variants]
    return advise(compare(runs), None if memory is None else int(memory * MIB))


def test_within_a_limit_the_closest_that_fits() -> None:
    told = advice(("A", 12, 0.01), ("B", 8, 0.02), ("C", 5, 0.2), memory=10)
    assert told.headline.startswith("Within 10.0 MiB") and told.picks == ("B",)
    assert "take B (8.00 MiB, 38.1% of the original, KL 0.0200 [0.0180, 0.0220])." in told.headline


def test_what_cannot_be_told_apart_is_said() -> None:
    told = advice(("A", 8, 0.0200), ("B", 7, 0.0215), ("C", 5, 0.2), memory=10)
    assert told.picks == ("A",)
    assert "; B is 1.00 MiB smaller and not distinguishable in KL (0.0215 [0.0193, 0.0237])." in told.headline
    apart = advice(("A", 8, 0.0200), ("B", 7, 0.0250), memory=10)
    assert "distinguishable" not in apart.headline


def test_nothing_fits() -> None:
    told = advice(("A", 8, 0.02), ("B", 7, 0.03), memory=2)
    assert told.headline == (
        "Within 2.00 MiB: nothing here fits; the smallest is B (7.00 MiB, 33.4% of the original, KL 0.0300 [0.0270, 0.0330])."
    )
    assert told.picks == ()


def test_without_a_limit_an_answer_a_step() -> None:
    told = advice(("A", 12, 0.001), ("B", 8, 0.02), ("C", 6, 0.05), ("D", 4, 0.3), ("E", 3.9, 0.9))
    assert told.picks == ("E",)  # all have the same perplexity
    assert [step.split(" (")[0].split(":")[0] for step in told.steps] == [
        "Closest to the original", "Under half of the original", "Under a third of the original",
        "Under a quarter of the original", "Smallest",
    ]  # fmt: skip
    assert (
        "take B" in told.steps[1] and "take C" in told.steps[2] and "take D" in told.steps[3] and "E (" in told.steps[4]
    )


def test_the_smallest_of_one_size_is_the_closest() -> None:
    told = advice(("A", 12, 0.001), ("bad", 4, 0.9), ("good", 4, 0.3))
    assert "bad" not in " ".join(told.steps) and "take good" in told.steps[1]


def test_without_a_limit_the_smallest_that_keeps_perplexity() -> None:
    from dataclasses import replace

    from compress.scoring.divergence import Interval

    def with_ratio(name: str, size: int, kld: float, high: float) -> Run:
        plain = card(name, size * MIB, kld)
        scores = replace(plain.artifacts[0].scores, perplexity_ratio=Interval(high - 0.001, high - 0.002, high))
        return Run(plain.model_copy(update={"artifacts": (plain.artifacts[0].model_copy(update={"scores": scores}),)}))

    runs = [with_ratio("A", 12, 0.001, 1.002), with_ratio("B", 8, 0.01, 1.0099), with_ratio("C", 6, 0.02, 1.0101)]
    told = advise(compare(runs))
    assert told.picks == ("B",) and "at most 1% above" in told.headline
    told = advise(compare([*runs[2:], with_ratio("D", 7, 0.01, 1.018)]))
    assert told.picks == ("C",) and "at most 2% above" in told.headline


def test_dominated_variants_are_named() -> None:
    told = advice(("A", 8, 0.02), ("Z", 9, 0.05), ("Y", 8.5, 0.021), ("C", 5, 0.2))
    assert told.dominated == (
        "Not worth taking beside A: Z (1.00 MiB more, KL 0.050 [0.045, 0.055]) is no smaller, and further from the original.",
        "Not worth taking beside A: Y (512 KiB more, KL 0.0210 [0.0189, 0.0231]) is no smaller, and no closer to it, as far as "
        "the intervals tell.",
    )


def test_a_file_for_another_engine_is_no_way_to_save() -> None:
    told = advice(("BF16", 20.99, 1e-6), ("A", 8, 0.02), ("B", 5, 0.2))
    assert "BF16" not in " ".join(told.sentences)
    assert "take BF16" in advice(("BF16", 20.99, 1e-6), ("A", 8, 0.02), memory=64).headline


def test_nothing_to_go_by() -> None:
    runs = [Run(card("x", 5, None)), Run(card("y", 4, 0.1, passed=False))]
    assert advise(compare(runs)).headline.startswith("No recommendation")
    assert advise(compare(runs)).picks == ()


@pytest.mark.parametrize("sizes", [(100, 200), (100, 100)])
def test_occasions_of_variants_that_are_equally_close(sizes: tuple[int, int]) -> None:
    comparison = compare([Run(card(f"v{n}", size, 0.1)) for n, size in enumerate(sizes)])
    told = occasions(comparison, advise(comparison))
    assert set(told) == {"v0", "v1"} and all(told.values())
    if sizes[0] < sizes[1]:
        assert told["v1"] == "rather v0: smaller, and as close"
