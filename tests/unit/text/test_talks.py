"""Talks in a model's own chat template: the ids that transformers gives, and a line for whatever is done otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from compress.errors import CalibrationError
from compress.text import TextSource, Tokenizer, calibration_text, load_tokenizer
from compress.text.chat import rendered
from tests.tiny import demo_model

TALKS = [
    [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is <4>, & \"four\"."}],
    [{"role": "system", "content": "Be  terse."}, {"role": "user", "content": "Grüße, 世界\n"},
     {"role": "assistant", "content": " Hello."}, {"role": "user", "content": "Bye"}],
]  # fmt: skip
TEMPLATES = {
    "turns": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}",
    "a first token": "{{ eos_token }}{% for m in messages %}<|im_start|>{{ m.role }}|{{ m.content | trim }}<|im_end|>{% endfor %}",
    "tools and generation": (
        "{% if tools is not none %}TOOLS{% endif %}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}<|im_start|>{{ m | tojson }}{% endif %}{% endfor %}"
    ),
    "a namespace and counted turns": (
        "{% set ns = namespace(n=0) %}{% for i in range(messages | length) %}{% set ns.n = ns.n + 1 %}"
        "<|im_start|>{{ ns.n }}{{ messages[i].content }}<|im_end|>{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    ),
}
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


def tokenizer(folder: Path, template: str | None) -> Tokenizer:
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model() / name, folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in TALKS * 10))
    return path


def ids_of(
    text: str, tokenizer: Tokenizer, count: int, template: bool | None = None
) -> tuple[list[int], tuple[str, ...]]:
    found = calibration_text(TextSource(text, template=template), tokenizer, samples=1, length=count, seed=0)
    return found.ids.ravel().tolist(), found.lines


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_talk_has_the_ids_that_transformers_gives(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = tokenizer(tmp_path / "t", TEMPLATES[name])
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "t")
    for number, talk in enumerate(TALKS):
        expected = oracle.apply_chat_template(talk, tokenize=True, return_dict=False)
        end = [] if oracle.eos_token_id in expected else [oracle.eos_token_id]
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps({"messages": talk}))
        found, lines = ids_of(str(path), ours, len(expected) + len(end))
        assert found == [*expected, *end] and not lines
        start = oracle.convert_tokens_to_ids("<|im_start|>")
        marked = [m for m in talk if name != "tools and generation" or m["role"] != "assistant"]
        assert found.count(start) == len(marked)  # one id each, not the letters of it


def test_without_a_template_talks_are_joined_and_a_line_says_so(talks: Path, tmp_path: Path) -> None:
    plain = tokenizer(tmp_path / "t", None)
    found, (line,) = ids_of(str(talks), plain, 200)
    assert "no chat template" in line and "talks are joined as 'role: text'" in line
    texts = {"\n".join(f"{m['role']}: {m['content']}" for m in talk) for talk in TALKS}
    first = plain.decode(found).split("<|endoftext|>")
    assert set(first[:-1]) <= texts and len(first) > 3
    with pytest.raises(
        CalibrationError, match=r"calibration\.template is true, but the tokenizer has no chat template"
    ):
        ids_of(str(talks), plain, 200, True)


def test_a_template_can_be_left_out(talks: Path, tmp_path: Path) -> None:
    written, asked = tokenizer(tmp_path / "a", TEMPLATES["turns"]), tokenizer(tmp_path / "b", None)
    plain, lines = ids_of(str(talks), written, 200, False)
    assert not lines and plain == ids_of(str(talks), asked, 200)[0]
    assert plain != ids_of(str(talks), written, 200, True)[0] == ids_of(str(talks), written, 200)[0]


def test_a_refused_system_message_is_folded_and_counted(talks: Path, tmp_path: Path) -> None:
    found, (line,) = ids_of(str(talks), (own := tokenizer(tmp_path / "t", NO_SYSTEM)), 600)
    assert "8 of 16 talks have it in the user's first one" in line  # as many as were read
    assert "<|im_start|>user\nBe  terse.\n\nGrüße, 世界\n<|im_end|>" in own.decode(found)


def test_a_template_that_refuses_everything_is_counted(talks: Path, tmp_path: Path) -> None:
    broken = tokenizer(tmp_path / "t", "{{ raise_exception('no') }}")
    plain, (line,) = ids_of(str(talks), broken, 600)
    assert "refuses 20 of 20 talks" in line and plain == ids_of(str(talks), broken, 600, False)[0]


def test_template_true_of_texts_says_that_it_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The river runs through the town. " * 50)
    _, (line,) = ids_of(str(tmp_path / "a.txt"), tokenizer(tmp_path / "t", TEMPLATES["turns"]), 64, True)
    assert "changes nothing" in line


def test_a_template_counts_anew_for_every_talk() -> None:
    """Compiled once, bounded each time."""
    template = "{% for i in range(60000) %}{% endfor %}{{ messages[0].content }}"
    assert [rendered(template, {}, prompt=False) for _ in range(3)] == ["What is 2 + 2?"] * 3
    assert rendered("{% for i in range(60000) %}{% endfor %}" * 2, {}, prompt=False) is None


# --------------------------------------------------------------------------------------------- what ships


def test_the_default_for_talks_fills_what_recipes_ask_for(tmp_path: Path) -> None:
    """256 windows of 512 with talks to the end; four times as many go on without them, and say so."""
    own = tokenizer(tmp_path / "t", TEMPLATES["turns"])
    start = own.vocabulary["<|im_start|>"]
    text = calibration_text("mixed-chat", own, samples=256, length=512, seed=0)
    assert text.ids.shape == (256, 512) and not text.lines
    quarters = (np.sum(part == start) for part in np.split(text.ids, 4))
    assert min(quarters) > 40
    more = calibration_text("mixed-chat", own, samples=1024, length=512, seed=0)
    assert np.array_equal(more.ids[:256], text.ids)
    assert more.lines == ("'chat' of 'mixed-chat' has no more text: the other parts go on alone",)


def test_progress_is_told_as_tokens_come(talks: Path, tmp_path: Path) -> None:
    told: list[tuple[float, str]] = []
    own = tokenizer(tmp_path / "t", TEMPLATES["turns"])
    calibration_text(str(talks), own, samples=4, length=100, seed=0, progress=lambda *said: told.append(said))
    done = [fraction for fraction, _ in told]
    assert done == sorted(done) and 0 < done[0] < 0.5 and done[-1] == 1.0
    assert {what for _, what in told} == {"tokens of talks.jsonl"}
