"""What the library gives back: tables as text, HTML, DataFrames and figures, all of the same cards."""

from __future__ import annotations

import base64
import json
import struct
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from compress.errors import CompressError, MissingExtra
from compress.report.compare import Run
from compress.report.result import Compared, Result
from tests.cards import card, full_card


class Cells(HTMLParser):
    """The rows of all tables, and that every element is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.attributes: set[str] = set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.open.append(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture
def result() -> Result:
    return Result(full_card("q4", 5_500_000, 0.1), Path("out/q4"))


@pytest.fixture
def compared() -> Compared:
    return Compared.of([Run(full_card("q4", 5_500_000, 0.1)), Run(full_card("q2 <&>", 3_000_000, 0.4))])


def test_a_result_says_where_its_files_are(result: Result) -> None:
    assert result.path == Path("out/q4/q4.gguf") and result.paths == (result.path,)
    assert result.scores is not None and result.scores.kld.mean == 0.1
    assert repr(result) == "<Result q4: 5.25 MiB, KL 0.100 [0.090, 0.110]>"
    assert "q4.gguf" in str(result) and "5.25 MiB" in str(result)


def test_html_has_the_figures_of_the_text_and_nothing_from_elsewhere(result: Result, compared: Compared) -> None:
    for shown in (result, compared):
        bundle = shown._repr_mimebundle_()
        assert bundle["text/plain"] == str(shown)
        found = Cells(bundle["text/html"])
        assert found.attributes == {"style"} and "color" not in bundle["text/html"]
        assert len({len(row) for row in found.rows}) == 1 and len(found.rows) > 2
    head, original, *variants = Cells(compared._repr_mimebundle_()["text/html"]).rows
    assert [row[0].lstrip("* ") for row in variants] == ["q4", "q2 <&>"] and original[0] == "original"
    assert [row[head.index("size")] for row in variants] == ["5.25 MiB", "2.86 MiB"]


def test_text_is_text_in_a_notebook_too(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    """rich would show it on the page by itself."""
    before = str(result)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *_: pytest.fail("shown"))
    assert str(result) == before


def test_a_comparison_says_what_to_take(compared: Compared) -> None:
    """Both keep their perplexity, so the smaller one; with a limit the closest that fits."""
    assert compared.best == "q2 <&>" and compared.advice[0].startswith("Take q2 <&>")
    assert repr(compared) == "<Compared tiny: 2 variants; take q2 <&>>"
    runs = [Run(full_card("q4", 5_500_000, 0.1)), Run(full_card("q2", 3_000_000, 0.4))]
    roomy, tight = (Compared.of(runs, memory=memory, said="so much") for memory in (6_000_000, 4_000_000))
    assert (roomy.best, tight.best) == ("q4", "q2") and tight.advice[0].startswith("Within so much")
    assert Compared.of(runs, memory=9, said="9B").best is None
    unscored = Compared.of([Run(card("a", 1, None))], skipped=["x holds no scorecard.json"])
    assert unscored.best is None and unscored.comparison.warnings == ("skipped: x holds no scorecard.json",)


def test_frames(result: Result, compared: Compared) -> None:
    pytest.importorskip("pandas")
    table = compared.to_pandas()
    assert list(table.index) == ["original", "q4", "q2 <&>"]
    assert table.loc["q4", "bytes"] == 5_500_000 and table.loc["q4", "kl_nats_mean"] == 0.1
    assert list(table.original) == [True, False, False] and table.tasks_blimp_value.notna().all()
    assert list(result.to_pandas().index) == ["original", "q4"]
    errors = result.to_pandas("errors")
    assert len(errors) == len(result.scorecard.errors) and errors.layer.isna().sum() == 1
    assert errors[errors.layer == 2].error.tolist() == pytest.approx([0.03, 0.03])
    experts = result.to_pandas("experts")
    assert experts.tokens.tolist() == [5, 100, 300] and experts.cold.tolist() == [True, False, False]


def test_a_frame_of_tensors_is_the_file_beside_the_card(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    rows = [{"name": "a", "layer": None, "expert": None}, {"name": "b", "layer": 3, "expert": 1, "error": 0.5}]
    (tmp_path / "tensors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Result(card("a", 1, None), tmp_path).to_pandas("tensors")
    assert found.name.tolist() == ["a", "b"] and found.layer[1] == 3 and found.layer.isna()[0] and found.error[1] == 0.5
    with pytest.raises(CompressError, match="it lies in the folder of a run"):
        Result(card("a", 1, None)).to_pandas("tensors")


def test_figures_are_pictures_that_a_notebook_shows(result: Result, compared: Compared) -> None:
    pytest.importorskip("matplotlib")
    before = set(sys.modules)
    for figure in (
        result.plot(),
        result.plot("experts"),
        compared.plot(),
        compared.plot("accuracy"),
        compared.plot("speed"),
    ):
        data, about = figure._repr_mimebundle_()
        picture = base64.b64decode(data["image/png"])
        width, height = struct.unpack(">II", picture[16:24])  # of a PNG's first chunk
        assert picture[:8] == b"\x89PNG\r\n\x1a\n"
        assert (width, height) == (2 * about["image/png"]["width"], 2 * about["image/png"]["height"])
    assert "matplotlib.pyplot" not in set(sys.modules) - before
    assert "KL divergence" in compared.plot().axes[0].get_ylabel()


def test_divergences_of_one_decade_are_numbers() -> None:
    """matplotlib labels ticks between powers of ten in TeX, which is not set here."""
    pytest.importorskip("matplotlib")
    figure = Compared.of([Run(full_card("a", 5_500_000, 0.0038)), Run(full_card("b", 3_000_000, 0.034))]).plot()
    figure.draw_without_rendering()
    axis = figure.axes[0].yaxis
    told = [
        label.get_text() for label in (*axis.get_majorticklabels(), *axis.get_minorticklabels()) if label.get_text()
    ]
    assert {"0.01", "0.005", "0.02"} <= {*told} and all(float(text) for text in told)


def test_what_there_is_not_is_said(result: Result, compared: Compared) -> None:
    bare = Result(card("a", 9, None, experts=()))
    for ask, why in (
        (lambda: result.plot("kl"), "use errors or experts"),
        (lambda: result.to_pandas("layers"), "use variants, errors, experts or tensors"),
        (lambda: compared.plot("size"), "use kl, accuracy, speed"),
        (lambda: bare.plot(), "nothing to draw"),
        (lambda: bare.plot("experts"), "the model has no experts"),
        (lambda: Compared.of([bare.run()]).plot(), "fewer than two variants"),
    ):
        with pytest.raises(CompressError, match=why):
            ask()


@pytest.mark.parametrize(("package", "ask"), [("pandas", "to_pandas"), ("matplotlib", "plot")])
def test_a_missing_package_is_named(
    package: str, ask: str, compared: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"{ask}\(\) needs {package}; install it with: pip install 'compress-llm"):
        getattr(compared, ask)()
