"""What is calibrated on is never scored on: no shared article, no shared run of 13 words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import pytest

from compress.scoring.tasks.find import bundled_tasks
from compress.text import data_root, find_data, load_definition, load_documents, task_documents, task_texts, text_set
from compress.text.documents import Reading, read_documents
from compress.text.talks import Speaker

WORD = re.compile(r"[^\W_]+")  # letters and digits: case, punctuation and WikiText's " @-@ " do not count
GRAM = 13
CALIBRATION = ("wikipedia", "novels", "chat")
EVALUATION = ("wikipedia", "wikitext2")


def grams(text: str) -> Iterator[int]:
    words = WORD.findall(text.lower())
    for start in range(len(words) - GRAM + 1):
        yield hash(tuple(words[start : start + GRAM]))


def all_grams(texts: Iterable[str]) -> set[int]:
    return {gram for text in texts for gram in grams(text)}


def evaluation_texts() -> Iterator[str]:
    for name in EVALUATION:
        yield from load_documents(load_definition(find_data("eval", name)))
    for name in bundled_tasks():
        for row in task_documents(name):
            yield " ".join(text for text in row.values() if isinstance(text, str))
            yield from task_texts(row)


def test_grams_see_through_case_and_punctuation():
    plain = "one two three four five six seven eight nine ten eleven twelve thirteen"
    marked = "... One two, THREE-four five @-@ six (seven) eight nine ten; eleven 'twelve' thirteen!"
    assert all_grams([plain]) == all_grams([marked])
    assert len(all_grams([plain])) == 1
    assert not all_grams([plain.removesuffix(" thirteen")])


def test_no_run_of_words_is_in_calibration_and_evaluation():
    scored = all_grams(evaluation_texts())
    assert len(scored) > 300_000
    for name in CALIBRATION:
        for document in read_documents(text_set(name), Reading(Speaker())):
            shared = sum(gram in scored for gram in grams(document.text))
            assert shared == 0, f"{name}: {shared} runs of {GRAM} words are scored too, in {document.text[:60]!r}"


def test_talks_repeat_nothing_of_the_articles_and_novels():
    """What `mixed-chat` mixes is not the same text twice."""
    others = all_grams(
        d for name in ("wikipedia", "novels") for d in load_documents(load_definition(find_data("calibration", name)))
    )
    talks = task_rows("calibration", "chat")
    told = [message["content"] for talk in talks for message in talk["messages"]]
    assert not sum(gram in others for text in told for gram in grams(text))
    openings = [talk["messages"][0]["content"] for talk in talks if "title" not in talk]
    assert len({opening[:40] for opening in openings}) == len(openings) > 100


def test_no_article_is_in_calibration_and_evaluation():
    calibration = {row["title"] for row in task_rows("calibration")}
    calibration |= {row["title"] for row in task_rows("calibration", "chat") if "title" in row}
    evaluation = {row["title"] for row in task_rows("eval")}
    assert len(calibration) > 300 and len(evaluation) > 150
    assert not calibration & evaluation


def task_rows(kind: str, name: str = "wikipedia") -> list[dict]:
    import json
    import lzma

    with lzma.open(data_root(kind) / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize("kind", ["calibration", "eval"])
def test_every_set_says_whose_it_is(kind):
    readme = (data_root(kind) / "README.md").read_text(encoding="utf-8")
    definitions = sorted(data_root(kind).glob("*.yaml"))
    assert definitions
    for path in definitions:
        definition = load_definition(path)
        assert definition.name == path.stem
        assert definition.description and definition.licence and definition.attribution
        assert f"`{definition.name}`" in readme, f"{kind}/README.md does not mention {definition.name}"
        for file in definition.files:
            assert file.is_file()
    shipped = {file.name for file in data_root(kind).iterdir() if file.name.endswith((".xz", ".jsonl", ".txt"))}
    defined = {file.name for path in definitions for file in load_definition(path).files}
    assert shipped == defined, "a file without a definition has no attribution"


def test_the_demo_model_carries_its_attribution():
    card = (data_root("models") / "tiny-qwen3-moe" / "README.md").read_text(encoding="utf-8")
    assert "CC BY-SA" in card and "Wikipedia" in card
