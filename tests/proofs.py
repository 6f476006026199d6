"""What tests have proved of families of models, noted where COMPRESS_PROOFS names a file: `python -m tests.models_matrix` makes
docs/models.md of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VARIABLE = "COMPRESS_PROOFS"


def proved(family: str, what: str, **figures: Any) -> None:
    """Note one proof, as a line of JSON. family: its model type; what: "logits", "llama.cpp", "recipe" or "reach"."""
    if path := os.environ.get(VARIABLE):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"family": family, "what": what, **figures}) + "\n")


def noted(path: Path) -> list[Mapping[str, Any]]:
    """All that was noted in a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
