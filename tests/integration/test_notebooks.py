"""notebooks/: each in small on a cut model, and what is stored of the full ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.pages import ROOT
from tests.integration.runs import carry_out, demo_blocks, small

FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))
NUMBERS = {"samples": 4, "length": 64, "windows": 6}
SHOWN = {
    "01-quickstart": ["[text/html, text/plain] models/tiny-qwen3-moe", "The city of London", "2-bit experts", "[image/png"],
}


def cells(file: Path, kind: str) -> list[dict[str, Any]]:
    found = json.loads(file.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]
