"""One place makes a folder a tokenizer: tokenizer.json as it is, whatever is said beside it, and proved before it is used."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.errors import CalibrationError, CheckpointError, MissingExtra
from compress.text import calibration_windows, eval_windows, load_tokenizer, prepends_bos
from compress.text.agreement import problem_of, shipped
from compress.text.chat import rendered
from compress.text.probes import TEXTS, probes, prove
from tests.tiny import demo_model, tiny_config

Change = Callable[[dict[str, Any]], Any]


def token(index: int, text: str, **flags: bool) -> dict[str, Any]:
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": text, **usual, **flags}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "model"
    target.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"):
        shutil.copy(demo_model() / name, target / name)
    return target


def edit(folder: Path, name: str, change: Change) -> Path:
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))
    return folder


def label(folder: Path, name: str | None, **settings: Any) -> Path:
    return edit(folder, "tokenizer_config.json", lambda s: s.update(tokenizer_class=name, **settings))


def reference(folder: Path) -> Any:
    """The oracle: the package that wrote the file."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def one_line(error: Any) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------- as it is


LABELS = [
    "LlamaTokenizerFast",
    "GPT2TokenizerFast",
    "XLNetTokenizer",
    "BertTokenizer",
    "Qwen2Tokenizer",
    "NoSuch",
    None,
]


@pytest.mark.parametrize("name", LABELS)
def test_a_label_changes_no_id_and_what_ships_is_read_alike(folder: Path, tmp_path: Path, name: str | None) -> None:
    """Four of these labels make transformers read other ids, or nothing; with the settings that ship it reads these."""
    from transformers import AutoTokenizer

    oracle = reference(folder)
    tokenizer = load_tokenizer(label(folder, name), 4096)
    for text in (*TEXTS, "<|im_start|>user\nHello<|im_end|>"):
        assert tokenizer.encode(text) == oracle.encode(text).ids
    assert prove(tokenizer) == []
    result = shipped(tokenizer)
    assert (result.departure is not None) == (name in LABELS[:4]) and result.problem is None
    if result.settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(result.settings))
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert theirs.encode(text) == oracle.encode(text).ids
    assert theirs.eos_token == "<|endoftext|>" and theirs.chat_template


def test_what_no_setting_mends_is_said(folder: Path) -> None:
    """transformers takes Qwen2's rules for every folder of that model type."""
    digits = {"type": "Digits", "individual_digits": False}
    edit(folder, "tokenizer.json", lambda d: d["pre_tokenizer"]["pretokenizers"].insert(0, digits))
    edit(folder, "config.json", lambda c: c.update(model_type="qwen2"))
    edit(folder, "tokenizer.json", lambda d: d["pre_tokenizer"]["pretokenizers"].pop(1))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("it's 12") == reference(folder).encode("it's 12").ids
    result = shipped(tokenizer)
    assert result.settings is None and result.problem == problem_of(tokenizer, folder)
    assert result.departure is not None and "instead of" in result.departure.reason


def test_what_training_left_in_the_file_is_not_applied(folder: Path) -> None:
    """Truncation and padding would cut every document; dropout splits words at random."""
    text, expected = "The river " * 50, reference(folder).encode("The river " * 50).ids
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
            "pad_token": "x"}  # fmt: skip
    edit(folder, "tokenizer.json", lambda d: d.update(truncation=cut, padding=fill))
    edit(folder, "tokenizer.json", lambda d: d["model"].update(dropout=0.9))
    assert load_tokenizer(folder).encode(text) == expected


@pytest.mark.parametrize("adds", [True, False])
def test_the_post_processor_says_what_is_put_around_a_text(folder: Path, adds: bool) -> None:
    """add_bos_token beside it does not, and is set right in what ships."""
    bos, text = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    template = {
        "type": "TemplateProcessing", "single": [bos, text] if adds else [text], "pair": [text, text],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [4094], "tokens": ["<|im_start|>"]}},
    }  # fmt: skip
    edit(folder, "tokenizer.json", lambda d: d.update(post_processor=template))
    tokenizer = load_tokenizer(label(folder, "Qwen2Tokenizer", bos_token="<|im_start|>", add_bos_token=not adds))
    assert tokenizer.bos_token_id == 4094 and prepends_bos(tokenizer) == adds
    assert tokenizer.ends == (((4094,), ()) if adds else ((), ()))
    (line,) = prove(tokenizer)
    assert str(not adds).lower() in line.wanted
    settings = shipped(tokenizer).settings
    assert settings is not None and settings["add_bos_token"] is adds


def test_special_tokens_and_templates_are_found_where_they_are_named(folder: Path) -> None:
    assert load_tokenizer(folder).eos_token_id == 4093 and len(probes(load_tokenizer(folder))) > 50
    templates = [{"name": "default", "template": "{{ messages[0].content }}"}, {"name": "tools", "template": "x"}]
    (folder / "chat_template.jinja").unlink()
    label(folder, None, chat_template=templates, eos_token={"content": "<|im_end|>"})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token_id == 4095 and list(tokenizer.files.chat_templates) == ["default", "tools"]
    assert "What is 2 + 2?" in {probe.text for probe in probes(tokenizer)}
    (folder / "tokenizer_config.json").unlink()
    edit(folder, "config.json", lambda c: c.update(eos_token_id=[4094, 4095]))
    assert load_tokenizer(folder).eos_token_id == 4094


ENDLESS = {
    "nested": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
    "large": "{{ 'x' * 10 ** 10 }}",
    "refused": "{{ raise_exception('no system prompt') }}",
    "broken": "{% if %}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_chat_templates_run_in_bounds(name: str) -> None:
    assert rendered(ENDLESS[name], {}, prompt=True) is None
    assert rendered("{{ bos_token }}{{ messages | length * 2 }}", {"bos_token": "<s>"}, prompt=True) == "<s>6"


# ---------------------------------------------------------------------------------- refused


def metaspace(data: dict[str, Any]) -> None:
    """What is left of a byte-level tokenizer that was loaded under Llama's label and saved: spaces are lost."""
    data["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    data["decoder"] = {"type": "Sequence", "decoders": [replace, {"type": "Fuse"}]}


def word_level(data: dict[str, Any]) -> None:
    data["model"] = {"type": "WordLevel", "unk_token": "<unk>", "vocab": {"<unk>": 0, "the": 1}}
    data["pre_tokenizer"], data["decoder"], data["normalizer"] = {"type": "Whitespace"}, None, None


BROKEN: dict[str, tuple[str, Change]] = {
    "loses text: 'The city.* comes back as 'Thecity": ("tokenizer.json", metaspace),
    "does not know ordinary text": ("tokenizer.json", word_level),
    "holds no tokenizer": ("tokenizer.json", dict.clear),
    "cannot be read by tokenizers": ("tokenizer.json", lambda d: d["model"]["vocab"].update(a="x")),
    "missing field `content`": ("tokenizer.json", lambda d: d["added_tokens"].append({"id": 7})),
    "does not belong to this model": ("tokenizer.json", lambda d: d["model"]["vocab"].update({"the river": 4096})),
    "bos_token is 7": ("tokenizer_config.json", lambda d: d.update(bos_token=7)),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_files_are_one_line(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        prove(load_tokenizer(edit(folder, *BROKEN[message]), 4096))
    one_line(error)


@pytest.mark.parametrize("content", ['{"model": ', "[1]", ""])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_json_is_named(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        load_tokenizer(folder)


@pytest.mark.parametrize("template", [3, [{"name": "default"}], ["x"]])
def test_templates_that_are_none(folder: Path, template: Any) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="chat_template"):
        prove(load_tokenizer(label(folder, None, chat_template=template)))


def test_no_tokenizer_is_invented(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer: neither tokenizer\.json nor") as error:
        load_tokenizer(folder)
    one_line(error)
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"vocab\.json alone do not say how text is split"):
        load_tokenizer(folder)


def test_tokens_without_a_row_matter_where_a_text_holds_them(folder: Path, tmp_path: Path) -> None:
    edit(folder, "tokenizer.json", lambda d: d["added_tokens"].append(token(4096, "<pad>")))
    tokenizer, text = load_tokenizer(folder, 4096), tmp_path / "text.txt"
    (line,) = prove(tokenizer)
    assert "'<pad>' (id 4096)" in line.wanted
    text.write_text("A house by the river. " * 40)
    assert calibration_windows(str(text), tokenizer, samples=2, length=32, seed=0).max() < 4096
    text.write_text("A house by the river. <pad> " * 40)
    for windows in (
        lambda: calibration_windows(str(text), tokenizer, samples=2, length=32, seed=0),
        lambda: eval_windows(str(text), tokenizer, windows=2, length=32),
    ):
        with pytest.raises(
            CalibrationError, match=r"'<pad>' \(id 4096\), but the model's embedding has 4096 rows"
        ) as error:
            windows()
        one_line(error)
    assert calibration_windows(str(text), load_tokenizer(folder, 4097), samples=2, length=32, seed=0).max() == 4096


def test_names_that_tokenizer_json_lacks_get_no_new_ids(folder: Path) -> None:
    """transformers would give them ids behind the vocabulary, for which the embedding has no rows."""
    (folder / "added_tokens.json").write_text('{"<tool>": 4096}')
    tokenizer = load_tokenizer(label(folder, "Qwen2Tokenizer", pad_token="<nope>"), 4096)
    (line,) = prove(tokenizer)
    assert "'<nope>' and 1 more" in line.wanted and max(tokenizer.encode("<nope><tool>")) < 4096
    settings = shipped(tokenizer).settings
    assert settings is not None and "pad_token" not in settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert problem_of(tokenizer, folder) is None


def test_text_that_is_mostly_unknown_is_refused(folder: Path, tmp_path: Path) -> None:
    def ascii_only(data: dict[str, Any]) -> None:
        data["model"] |= {"type": "WordLevel", "unk_token": "<|endoftext|>", "vocab": {"<|endoftext|>": 0, "a": 1}}
        data["pre_tokenizer"], data["decoder"] = {"type": "WhitespaceSplit"}, None

    text, tokenizer = tmp_path / "text.txt", load_tokenizer(edit(folder, "tokenizer.json", ascii_only))
    text.write_text("a a b " * 100)
    assert set(calibration_windows(str(text), tokenizer, samples=2, length=32, seed=0).ravel()) == {0, 1}
    text.write_text("a b c " * 100)
    with pytest.raises(CalibrationError, match="66% of calibration set .* does not know"):
        calibration_windows(str(text), tokenizer, samples=2, length=32, seed=0)


# ---------------------------------------------------------------------------------- SentencePiece


def test_sentencepiece_is_an_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MissingExtra, match=r"pip install 'compress-llm\[sentencepiece\]'"):
        load_tokenizer(folder)


def test_sentencepiece_gives_its_own_ids(folder: Path, tmp_path: Path) -> None:
    """Special tokens written in a text are found first; llama.cpp reads the same."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("llama_cpp")
    from compress.containers.gguf import write_vocabulary
    from compress.engines.llama_cpp import LlamaCpp
    from compress.export.text import engine_limits
    from compress.models import load_spec

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXTS for line in text.splitlines() if line.strip()), model_writer=out,
        model_type="bpe", vocab_size=600, byte_fallback=True, character_coverage=0.98, hard_vocab_limit=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    (folder / "added_tokens.json").write_text('{"<tool>": 900}')
    tokenizer = load_tokenizer(folder, 1000)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    assert prove(tokenizer) == [] and tokenizer.ends == ((1,), ())
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == oracle.encode(text)
    assert tokenizer.encode("one<tool> two</s>") == [1, *oracle.encode("one"), 900, *oracle.encode(" two"), 2]
    write_vocabulary(tmp_path / "v.gguf", folder, load_spec(tiny_config("llama", vocab_size=1000)))
    with LlamaCpp(tmp_path / "v.gguf", vocabulary_only=True) as engine:
        assert engine_limits(tokenizer, engine, "llama.cpp") == []
        assert np.array_equal(engine.tokenize("one<tool>", special=True), tokenizer.encode("one<tool>"))
    (folder / "tokenizer.model").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="no SentencePiece model"):
        load_tokenizer(folder)
