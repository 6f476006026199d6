"""What people see stays what it was, and holds what is promised at any width: nothing is cut, no figure is split."""

from __future__ import annotations

import re

import pytest
from rich.cells import cell_len

from compress.report.layout import Facts, Grid, Head, Line, Prose, broken
from tests.cards import text
from tests.golden.screens import SCREENS, WIDTHS, help_of, path_of, screens

ALL = sorted([*SCREENS, "help"])
FIGURE = re.compile(r"(?<![\w.,])[-+]?\d[\d.,]*\d%?|(?<![\w.,])\d%?")
"""A number, with what belongs to it."""


@pytest.fixture(scope="module")
def shown() -> dict[int, dict[str, str]]:
    return {width: screens(width) for width in WIDTHS}


@pytest.mark.parametrize("width", WIDTHS)
def test_screens_are_what_they_were(shown: dict[int, dict[str, str]], width: int) -> None:
    for name in ALL:
        wanted = path_of(name, width).read_text(encoding="utf-8")
        assert shown[width][name] == wanted, f"{name}: python -m tests.golden.screens writes them anew"


@pytest.mark.parametrize("width", WIDTHS)
def test_no_line_is_wider_than_the_screen_and_nothing_is_cut(shown: dict[int, dict[str, str]], width: int) -> None:
    for name, screen in shown[width].items():
        assert max(map(cell_len, screen.splitlines())) <= width, name
        assert "…" not in screen, name


@pytest.mark.parametrize("width", [50, 60, 67, 80, 100])
def test_figures_are_whole_at_any_width(width: int) -> None:
    """Every number of a narrow screen is one of the widest."""
    for name, made in SCREENS.items():
        if name in ("plan-fallbacks", "plan-large", "advise") and width not in WIDTHS:
            continue  # laid out at these only
        whole = set(FIGURE.findall(text(made(), 200 if width not in WIDTHS else 120)))
        shown = text(made(), width)
        assert set(FIGURE.findall(shown)) <= whole, name
        assert not [line for line in shown.splitlines() if re.search(r"\[-?\d[^\]]*$", line)], "an interval is split"


def test_units_and_intervals_stay_with_their_numbers() -> None:
    sentence = "it takes 1.23 GiB and 4 min 05 s, KL 0.0246 [0.0236, 0.0257], as `import compress` says"
    for width in range(20, 60):
        lines = [line.plain for line in Prose(sentence, indent=2).lines(width)]
        assert " ".join(lines) == sentence and max(map(len, lines)) <= width
        for whole in ("1.23 GiB", "4 min", "05 s", "[0.0236, 0.0257]", "`import compress`"):
            assert any(whole in line for line in lines), (width, whole)
    assert any("0.0246 [0.0236, 0.0257]" in line.plain for line in Prose(sentence).lines(30))


def test_words_that_are_wider_than_a_line_break_at_their_joints() -> None:
    word = "out/some-folder/qwen-moe-2bit-plus.gguf"
    for width in range(4, 45):
        parts = [word[start:stop] for start, stop in broken(word, width)]
        assert "".join(parts) == word and max(map(len, parts)) <= width
    assert [word[start:stop] for start, stop in broken(word, 16)] == ["out/some-folder/", "qwen-moe-2bit-", "plus.gguf"]


def test_columns_go_in_their_order_and_then_rows_become_stanzas() -> None:
    heads = (Head("name", right=False), Head("size"), Head("count", spare=2), Head("share of all", spare=1))
    grid = Grid(heads, [Line(("a-long-name", "1.23 GiB", "1,234,567", "12.3%"))])
    first = {width: text(grid, width).splitlines()[0].split() for width in (60, 30, 24, 20)}
    assert first[60] == ["name", "size", "count", "share", "of", "all"]
    assert "count" not in text(grid, 30) and "12.3%" in text(grid, 30)
    assert first[20] == ["name", "size"]
    stanza = text(grid, 18)
    assert stanza.splitlines()[0] == "a-long-name"
    for figure in ("size 1.23 GiB", "count 1,234,567", "of all 12.3%"):
        assert figure in " ".join(stanza.split()), stanza


def test_facts_stand_beside_their_names() -> None:
    lines = text(Facts((("peak", "about 1.23 GiB, whatever"), ("time", "4 min"))), 22).splitlines()
    assert lines == ["peak", "  about 1.23 GiB,", "  whatever", "time", "  4 min"]
    lines = text(Facts((("peak", "about 1.23 GiB, whatever the layers"), ("time", "4 min"))), 30).splitlines()
    assert lines == ["peak  about 1.23 GiB, whatever", "      the layers", "time  4 min"]


def test_letters_that_are_two_columns_wide() -> None:
    for width in range(2, 12):
        lines = [line.plain for line in Prose("量子化された模型 1.23 GiB", indent=0).lines(width)]
        assert max(map(cell_len, lines)) <= width and "".join(lines).replace(" ", "") == "量子化された模型1.23GiB"


@pytest.mark.parametrize("width", [24, 32, 40])
@pytest.mark.parametrize("name", ["plan", "methods", "recipes", "compare", "run"])
def test_even_a_telephone_cuts_nothing(name: str, width: int) -> None:
    shown = text(SCREENS[name](), width)
    assert max(map(cell_len, shown.splitlines())) <= width and "…" not in shown


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_both_options_help(option: str) -> None:
    assert "Usage: compress run" in help_of("run", 80, option)
