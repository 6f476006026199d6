"""What the tests of pages share: the code blocks of a page, and the command line in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def block(page: str, fence: str) -> str:
    """The one code block of docs/`page` that opens with ```fence."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (found,) = re.findall(rf"^```{fence}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return found


def write_block(page: str, fence: str, file: Path, **words: object) -> Path:
    """The block as a file; words: what stands for words in it."""
    text = block(page, fence)
    for word, meant in words.items():
        text = text.replace(word, str(meant))
    file.write_text(text, encoding="utf-8")
    return file


def compress(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "compress.cli", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def sets(*overrides: str) -> list[str]:
    """Options that override a recipe's keys."""
    return [part for override in overrides for part in ("--set", override)]
