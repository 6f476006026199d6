"""Windows that are scored, against a plain reading of their protocol."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compress.errors import CalibrationError
from compress.text import (
    PROTOCOLS,
    Protocol,
    eval_windows,
    find_data,
    load_definition,
    load_documents,
    load_suite,
)
from compress.text import evaluation as module
from compress.text.documents import articles
from tests.unit.text.test_text import DOCUMENTS, Characters, packed


def text(ids: np.ndarray) -> str:
    return "".join(map(chr, ids))


# -------------------------------------------------------------------------------------------- windows


def test_all_windows_are_the_documents_end_to_end(jsonl: Path) -> None:
    got = eval_windows(str(jsonl), Characters(), length=16)
    stream = packed(DOCUMENTS)
    assert got.tokens.dtype == np.int32
    assert got.tokens.tolist() == [stream[i : i + 16] for i in range(0, len(stream) - 15, 16)]
    assert got.first.tolist() == [1] * len(got.tokens) and got.counts.tolist() == [15] * len(got.tokens)


@pytest.mark.parametrize("wanted", [1, 5, 13, 36])
def test_windows_are_drawn_one_of_each_equal_part(jsonl: Path, wanted: int) -> None:
    every = [tuple(row) for row in eval_windows(str(jsonl), Characters(), length=16).tokens]
    assert len(set(every)) == len(every)
    got = eval_windows(str(jsonl), Characters(), windows=wanted, length=16)
    again = eval_windows(str(jsonl), Characters(), windows=wanted, length=16)
    assert np.array_equal(got.tokens, again.tokens)
    places = [every.index(tuple(row)) for row in got.tokens]
    for part, place in enumerate(places):
        assert part * len(every) // wanted <= place < (part + 1) * len(every) // wanted


def test_a_draw_is_uniform_in_each_part_and_depends_on_the_set() -> None:
    places = np.array([module._drawn(60, 6, f"set {number}") for number in range(2000)])
    for part in range(6):
        counts = np.bincount(places[:, part] - 10 * part, minlength=10)
        assert len(counts) == 10 and counts.min() > 140 and counts.max() < 260  # 200 each, six standard errors


def test_every_window_knows_its_document(jsonl: Path) -> None:
    """The one that most of its tokens that count belong to."""
    owner = [number for number, document in enumerate(DOCUMENTS) for _ in range(len(document) + 1)]
    got = eval_windows(str(jsonl), Characters(), length=16)
    for number, document in enumerate(got.documents):
        mine = owner[16 * number + 1 : 16 * number + 16]
        assert mine.count(document) == max(mine.count(other) for other in mine)


def test_articles_of_wikitext_are_documents(demo_tokenizer) -> None:
    """Counted in the file itself: headings of the first level are between rows of a blank."""
    definition = load_definition(find_data("eval", "wikitext2"))
    (raw,), (joined,) = (load_documents(definition, as_file=as_file) for as_file in (True, False))
    titles = [
        line for before, line, behind in zip(*(raw.split("\n")[i:] for i in range(3)), strict=False)
        if before.strip() == behind.strip() == "" and line.startswith(" = ") and not line.startswith(" = =")
    ]  # fmt: skip
    assert len(titles) == 60
    for wording in (raw, joined):
        assert [wording[at:].split("\n = ")[1].split("\n")[0] for at in articles(definition, wording)] == [
            title.removeprefix(" = ") for title in titles
        ]
    got = eval_windows("wikitext2", demo_tokenizer, protocol=PROTOCOLS["llama-perplexity"])
    assert np.unique(got.documents).tolist() == list(range(60)) and (np.diff(got.documents) >= 0).all()
    for window in np.flatnonzero(np.diff(got.documents)):  # a title stands within a window of where documents change
        around = demo_tokenizer.decode(got.tokens[max(window - 1, 0) : window + 3].ravel())
        assert titles[got.documents[window + 1]] in around


def test_a_text_without_documents_is_cut_into_blocks(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_text("word " * 4000)
    got = eval_windows(str(path), Characters(), length=50)
    assert got.documents.tolist() == [(50 * i + 25) // module.BLOCK_TOKENS for i in range(len(got.tokens))]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a" * 100)
    tokenizer = Characters()
    assert text(eval_windows(str(path), tokenizer, length=10).tokens[0]) == "a" * 10
    path.write_text("b" * 101)
    assert text(eval_windows(str(path), tokenizer, length=10).tokens[0]) == "b" * 10


def test_of_a_large_text_the_beginning_is_read(jsonl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_CHARACTERS", 100)
    monkeypatch.setattr(module, "CHARACTERS_A_TOKEN", 2)
    tokenizer = Characters()
    assert len(eval_windows(str(jsonl), tokenizer, length=10).tokens) <= 12
    assert len(eval_windows(str(jsonl), tokenizer, windows=40, length=10).tokens) == 40


# ------------------------------------------------------------------------------------------ protocols


@pytest.mark.parametrize("bos", ["before", "in place", "none"])
def test_where_the_beginning_of_text_stands(jsonl: Path, bos) -> None:
    got = eval_windows(str(jsonl), Characters(bos=7), length=16, protocol=Protocol(bos=bos)).tokens
    stream = packed(DOCUMENTS)
    expected = {
        "before": [[7, *stream[15 * i : 15 * i + 15]] for i in range(len(stream) // 15)],
        "in place": [[7, *stream[max(16 * i - 1, 0) :][:15]] if i == 0 else [7, *stream[16 * i : 16 * i + 15]]
                     for i in range((len(stream) + 1) // 16)],
        "none": [stream[16 * i : 16 * i + 16] for i in range(len(stream) // 16)],
    }[bos]  # fmt: skip
    assert got.tolist() == expected


def test_a_bos_token_that_is_not_added_by_default_stays_out(jsonl: Path) -> None:
    for bos in ("before", "in place"):
        got = eval_windows(str(jsonl), Characters(bos=7, adds_bos=False), length=16, protocol=Protocol(bos=bos))
        assert 7 not in got.tokens


@pytest.mark.parametrize(("joiner", "between"), [("end of text", "\0"), ("blank line", "\n\n"), ("none", "")])
def test_what_stands_between_documents(jsonl: Path, joiner, between: str) -> None:
    got = eval_windows(str(jsonl), Characters(), length=16, protocol=Protocol(joiner=joiner))
    assert between.join(DOCUMENTS).startswith(text(got.tokens.ravel()))
    assert len(np.unique(got.documents)) > 20


@pytest.mark.parametrize("bos", [None, 7])
@pytest.mark.parametrize("stride", [1, 5, 15])
def test_with_a_stride_every_token_counts_once(jsonl: Path, stride: int, bos: int | None) -> None:
    got = eval_windows(str(jsonl), Characters(bos=bos), length=16, protocol=Protocol(stride=stride))
    counted = np.concatenate([row[first:] for row, first in zip(got.tokens, got.first, strict=True)]).tolist()
    start = 1 if bos is None else 0  # nothing predicts the very first token, unless one is put before it
    assert counted == packed(DOCUMENTS)[start : start + len(counted)]
    assert len(counted) > len(packed(DOCUMENTS)) - 16 - stride


@pytest.mark.parametrize("length", [15, 16])
def test_the_second_half_counts(jsonl: Path, length: int) -> None:
    got = eval_windows(str(jsonl), Characters(), length=length, protocol=Protocol(counted="second half"))
    assert (got.first == length // 2 + 1).all() and (got.counts == length - length // 2 - 1).all()
    with pytest.raises(CalibrationError, match="length to 3"):
        eval_windows(str(jsonl), Characters(), length=2, protocol=Protocol(counted="second half"))


def test_a_protocol_says_what_is_not_usual_of_it() -> None:
    assert [str(protocol) for protocol in PROTOCOLS.values()] == list(PROTOCOLS)
    assert str(Protocol(length=64, stride=8, joiner="none")) == "default, joiner none"


# -------------------------------------------------------------------------------------- words and bytes


@pytest.mark.parametrize("stride", [None, 7])
def test_words_and_bytes_of_all_windows_are_those_of_the_text(jsonl: Path, stride: int | None) -> None:
    got = eval_windows(str(jsonl), Characters(bos=7), length=16, protocol=Protocol(stride=stride))
    counted = int(got.counts.sum())
    spelled = text(np.array(packed(DOCUMENTS)[:counted]))
    assert got.words is not None and got.bytes is not None
    assert got.bytes.sum() == len(spelled.replace("\0", ""))
    assert got.words.sum() == len(spelled.replace("\0", " ").split())


def test_words_and_bytes_of_real_text(demo_tokenizer) -> None:
    """Of 618 windows all but their first tokens count, one in 512; characters that a window cuts are few."""
    got = eval_windows("wikipedia", demo_tokenizer)
    documents = list(load_documents(load_definition(find_data("eval", "wikipedia"))))
    assert got.words is not None and got.bytes is not None
    assert got.bytes.sum() / sum(len(document.encode()) for document in documents) == pytest.approx(
        511 / 512, abs=0.002
    )
    assert got.words.sum() / sum(len(document.split()) for document in documents) == pytest.approx(511 / 512, abs=0.002)


# ------------------------------------------------------------------------------------------------ suites


def suite(folder: Path, body: str):
    path = folder / "suite.yaml"
    path.write_text(f"name: mine\n{body}\n")
    return load_suite(str(path))


def test_a_suite_of_several_texts(tmp_path: Path) -> None:
    body = "texts:\n  wikipedia:\n  wikitext2: {windows: 3, protocol: llama-perplexity}\n"
    found = suite(tmp_path, body + "  late: {text: wikitext2, length: 64, stride: 8, joiner: none}")
    assert list(found.texts) == ["wikipedia", "wikitext2", "late"]
    assert (found.texts["wikipedia"].windows, found.texts["wikipedia"].protocol) == (None, Protocol())
    assert found.texts["wikitext2"].protocol == PROTOCOLS["llama-perplexity"]
    late = found.texts["late"]
    assert (late.text, late.protocol) == ("wikitext2", Protocol(length=64, stride=8, joiner="none"))


def test_a_suite_of_one_text_says_so_in_short(tmp_path: Path) -> None:
    short = suite(tmp_path, "text: wikipedia\nwindows: 3\nlength: 64")
    assert short == suite(tmp_path, "texts: {wikipedia: {windows: 3, length: 64}}")


BAD_SUITES = {
    r"unknown key \(did you mean 'stride'\?\)": "texts: {a: {strid: 3}}",
    "'texts.a.windows': must be at least 1": "texts: {a: {windows: 0}}",
    "'texts.a.protocol': .*'llama-perplexity'": "texts: {a: {protocol: llama}}",
    "'texts.a.stride': 600 is more than the length of 512": "texts: {a: {stride: 600}}",
    "'texts.a': expected a mapping, got 4": "texts: {a: 4}",
    "needs either 'texts', or 'text'": "tasks: {blimp: 3}",
    "needs either 'texts', or 'text' ": "text: a\nwindows: 1\nlength: 9\ntexts: {b: {}}",
    "missing length, windows": "text: a",
    "belong to each of 'texts'": "length: 64\ntexts: {a: {}}",
}


@pytest.mark.parametrize("message", BAD_SUITES)
def test_bad_suites(tmp_path: Path, message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as error:
        suite(tmp_path, BAD_SUITES[message])
    assert "\n" not in str(error.value)
