"""What calibrates and scores reads text as what ships does: in transformers and in llama.cpp, or nothing is computed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compress.containers._gguf_tokenizer import read_vocabulary
from compress.containers.gguf import write_vocabulary
from compress.errors import CompressError, UnsupportedModel
from compress.export.text import engine_limits, prove_tokenizer
from compress.models import load_spec
from compress.models.gguf import pretokenizers as pre_tokenizers
from compress.plan import make_plan
from compress.recipe import load_recipe
from compress.report.progress import Reporter
from compress.run import run
from compress.text import load_tokenizer
from compress.text.probes import TEXTS
from tests.tiny import tiny_config, tiny_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model("llama", tmp_path / "model")


def change(folder: Path, name: str, /, **values: Any) -> Path:
    data = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**data, **values}))
    return folder


def recipe(model: Path, *containers: str) -> Any:
    path = model.parent / "r.yaml"
    exports = ", ".join(f"{{container: {name}}}" for name in containers)
    path.write_text(
        f"name: r\nmodel: {model}\noutput: {model.parent / 'out'}\nsteps: []\nexport: [{exports}]\nscore: false\n"
    )
    return load_recipe(str(path))


def limits(model: Path, tmp_path: Path, rows: int = 4096) -> list[str]:
    """What llama.cpp cannot do as the model's tokenizer does."""
    pytest.importorskip("llama_cpp")
    from compress.engines.llama_cpp import LlamaCpp

    write_vocabulary(tmp_path / "v.gguf", model, load_spec(tiny_config("llama", vocab_size=rows)))
    with LlamaCpp(tmp_path / "v.gguf", vocabulary_only=True) as engine:
        return engine_limits(load_tokenizer(model, rows), engine, "llama.cpp")


def test_what_ships_reads_text_as_the_file_says(model: Path) -> None:
    """Under this label transformers loses the spaces; the folder that ships has one under which it does not."""
    pytest.importorskip("llama_cpp")
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    change(model, "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    oracle = Tokenizer.from_file(str(model / "tokenizer.json"))
    assert AutoTokenizer.from_pretrained(model).encode(TEXTS[0]) != oracle.encode(TEXTS[0]).ids
    card = run(recipe(model, "safetensors", "gguf"), reporter=Reporter(0))
    (line,) = (fallback for fallback in card.fallbacks if fallback.subject == "tokenizer")
    assert "LlamaTokenizerFast" in line.wanted and "PreTrainedTokenizerFast" in line.used
    checks = {check.name: check for check in card.gate.checks}
    assert checks["safetensors tokenizer"].passed and "in transformers" in checks["safetensors tokenizer"].detail
    assert (
        checks["gguf tokenizer"].passed and "it does not prepare text: 'cafe\u0301" in checks["gguf tokenizer"].detail
    )
    shipped = AutoTokenizer.from_pretrained(model.parent / "out" / "r-safetensors")
    assert [shipped.encode(text) for text in TEXTS] == [oracle.encode(text).ids for text in TEXTS]


def test_a_pre_tokenizer_that_llama_cpp_takes_otherwise_stops_the_run(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table says it is another one than it is: found by reading text, before anything is computed."""
    pytest.importorskip("llama_cpp")
    wrong = [replace(pre, name="gpt-2") if pre.name == "qwen2" else pre for pre in pre_tokenizers.PRE_TOKENIZERS]
    monkeypatch.setattr(pre_tokenizers, "PRE_TOKENIZERS", wrong)
    with pytest.raises(UnsupportedModel, match=r"llama\.cpp would read text otherwise than .* instead of") as error:
        prove_tokenizer(make_plan(recipe(model, "gguf"), weights=True))
    assert "\n" not in str(error.value)


def test_a_model_without_a_tokenizer_ships_where_no_text_is_read(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    card = run(recipe(model, "safetensors"), reporter=Reporter(0))
    assert card.gate.passed and [line.used for line in card.fallbacks] == ["random ids"]
    with pytest.raises(CompressError, match="has no tokenizer"):
        run(recipe(model, "gguf"), fresh=True, reporter=Reporter(0))


def test_flags_that_change_no_id_change_no_file(model: Path) -> None:
    plain = read_vocabulary(model, {}, 4096)
    data = json.loads((model / "tokenizer.json").read_text())
    change(model, "tokenizer.json", model={**data["model"], "byte_fallback": True, "ignore_merges": True})
    assert read_vocabulary(model, {}, 4096) == plain


def test_the_ends_are_those_that_the_tokenizer_puts(model: Path, tmp_path: Path) -> None:
    bos, text = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    special = {"<|im_start|>": {"id": "<|im_start|>", "ids": [4094], "tokens": ["<|im_start|>"]}}
    template = {"type": "TemplateProcessing", "single": [bos, text], "pair": [text, text], "special_tokens": special}
    change(model, "tokenizer.json", post_processor=template)
    change(model, "tokenizer_config.json", bos_token="<|im_start|>", add_bos_token=False)
    assert read_vocabulary(model, {}, 4096).add_bos
    assert limits(model, tmp_path) and all("does not prepare" in line for line in limits(model, tmp_path))
    change(model, "tokenizer.json", post_processor={**template, "single": [bos, bos, text]})
    assert any("cannot put the same tokens around" in line for line in limits(model, tmp_path))


def test_a_space_in_front_is_a_line(model: Path, tmp_path: Path) -> None:
    """llama.cpp puts none in front of byte-level text, whatever the file says."""
    prefix = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    change(model, "tokenizer.json", pre_tokenizer=prefix, normalizer=None)
    assert read_vocabulary(model, {}, 4096).add_space_prefix is True
    first, *_ = limits(model, tmp_path)
    assert first.startswith(f"it does not prepare text: {TEXTS[0]!r}")


def test_tokens_without_a_row_are_left_out_of_the_file(model: Path, tmp_path: Path) -> None:
    data = json.loads((model / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    change(model, "tokenizer.json", added_tokens=[*data["added_tokens"], {"id": 4096, "content": "<pad>", **flags}])
    change(model, "tokenizer_config.json", pad_token="<pad>")
    vocabulary = read_vocabulary(model, {}, 4096)
    assert "<pad>" not in vocabulary.tokens and "pad" not in vocabulary.special
    assert limits(model, tmp_path)


def test_no_two_rows_have_one_text(model: Path) -> None:
    """llama.cpp would end the process."""
    data = json.loads((model / "tokenizer.json").read_text())
    vocabulary = {text: index for text, index in data["model"]["vocab"].items() if index != 4092}
    merges = [m for m in data["model"]["merges"] if "".join(m if isinstance(m, list) else m.split(" ")) in vocabulary]
    change(
        model, "tokenizer.json", model={**data["model"], "vocab": {**vocabulary, "[PAD4096]": 4092}, "merges": merges}
    )
    with pytest.raises(UnsupportedModel, match=r"two tokens '\[PAD4096\]'"):
        read_vocabulary(model, {}, 4097)
