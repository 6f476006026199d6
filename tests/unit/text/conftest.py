"""What tests of texts share: a file of a few documents, and the demo model's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.text import Tokenizer, data_root, load_tokenizer
from tests.unit.text.test_text import DOCUMENTS


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS), encoding="utf-8")
    return path


@pytest.fixture
def demo_tokenizer() -> Tokenizer:
    return load_tokenizer(data_root("models") / "tiny-qwen3-moe")
