"""docs/walkthroughs.md, executed: the commands as they stand, on a small model under the names that they say.

A line that the page shows has to come out, numbers aside; `...` stands for any. `python -m tests.integration.test_walkthroughs FOLDER`
prints what the commands say in a folder, for the page to be written anew.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.pages import ROOT, write_block
from tests.integration.runs import carry_out, demo_blocks, small

PAGE = (ROOT / "docs" / "walkthroughs.md").read_text(encoding="utf-8")
PROGRAM = f'PYTHONPATH="{ROOT}" OMP_NUM_THREADS=1 COLUMNS=80 exec "{sys.executable}" -m compress.cli "$@"\n'
FEWER = '[ "$1" = run ] && shift && set -- run --set score.suite="$HOME/bin/few.yaml" "$@"\n'
SUITE = "{name: few, text: wikipedia, windows: 6, length: 96, tasks: {blimp: 67}}"
TALK = {"messages": [{"role": "user", "content": "Tell me of the {}."},
                     {"role": "assistant", "content": "The {} stands by the river, and in the evening one hears it."}]}  # fmt: skip
WORDS = "house bridge mill tower garden harbour station chapel library theatre market museum".split()  # noqa: SIM905


def walks() -> dict[str, list[tuple[str, list[str]]]]:
    """Of every walk its commands, each with the lines that are shown behind it."""
    found: dict[str, list[tuple[str, list[str]]]] = {}
    for part in PAGE.split("<!-- walk: ")[1:]:
        name, _, text = part.partition(" -->")
        blocks = re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        found[name] = list(_commands("".join(blocks)))
    return found


def _commands(text: str) -> Iterator[tuple[str, list[str]]]:
    command, shown = "", list[str]()
    for line in text.splitlines():
        if line.startswith("$ "):
            if command:
                yield command, shown
            command, shown = line[2:], []
        elif line.startswith("> ") and not shown:
            command += f"\n{line[2:]}"
        else:
            shown.append(line)
    yield command, shown


def prepare(folder: Path, first: str = "") -> None:
    """The command, behind lines that come first, and the files that the page speaks of."""
    (folder / "bin").mkdir(parents=True)
    program = folder / "bin" / "compress"
    program.write_text(f"#!/bin/sh\n{first}{PROGRAM}")
    program.chmod(0o755)
    (folder / "talks.jsonl").write_text("".join(f"{json.dumps(TALK).replace('{}', word)}\n" for word in WORDS * 12))
    write_block("extending.md", "python solver", folder / "mine.py")
    (folder / "worst.py").write_text(re.findall(r"`worst.py`:\n\n```python\n(.*?)```", PAGE, re.DOTALL)[0])


def make_small(folder: Path) -> None:
    """The demo model's first blocks stand for both models of the page, and few windows for its suite."""
    (folder / "bin" / "few.yaml").write_text(SUITE)
    demo_blocks(folder / "tiny-qwen3-moe", 2, experts=4)
    recipe = folder / "bin" / "dense.yaml"
    recipe.write_text("{name: dense, model: m, steps: [], export: [{container: gguf}]}")
    (file,) = carry_out(small(recipe, folder / "tiny-qwen3-moe", folder / "bin" / "dense")).artifacts
    shutil.copy(folder / "bin" / "dense" / file.path, folder / "SmolLM2-135M-Instruct.Q4_1.gguf")


def executed(commands: list[tuple[str, list[str]]], folder: Path) -> Iterator[tuple[str, list[str]]]:
    """One shell for all of a walk; what each command said, both streams together."""
    mark = "=== behind command"
    script = "".join(f"{command}\nprintf '\\n{mark} {number}\\n'\n" for number, (command, _) in enumerate(commands))
    environment = {
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(folder),
        "LC_ALL": "C.UTF-8",
    }
    done = subprocess.run(
        ["bash", "-c", f"exec 2>&1\n{script}"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    for (command, _), said in zip(commands, re.split(rf"\n{mark} \d+\n", done.stdout), strict=False):
        yield command, said.splitlines()


def plain(line: str) -> str:
    """A line without its numbers, units and spacing."""
    line = re.sub(r"\b(KiB|MiB|GiB|B|s|ms|min|h)\b", "", re.sub(r"\d[\d,.:e-]*%?", "#", line))
    return " ".join(re.sub(r"(# ?)+", "# ", line.replace("─", "")).split())


@pytest.mark.parametrize("walk", walks())
def test_a_walk(walk: str, tmp_path: Path) -> None:
    prepare(tmp_path, FEWER)
    make_small(tmp_path)
    commands = walks()[walk]
    said = list(executed(commands, tmp_path))
    assert len(said) == len(commands), said[-1]
    assert sum(line not in ("", "...") for _, shown in commands for line in shown) >= 4, "the page shows too little"
    for (command, shown), (_, lines) in zip(commands, said, strict=True):
        left = [plain(line) for line in lines]
        assert not any("Traceback" in line for line in left), lines
        for line in (plain(line) for line in shown if line.strip() not in ("", "...")):
            assert line in left, f"{command}\nsays\n{chr(10).join(lines)}\nbut not: {line}"
            del left[: left.index(line) + 1]


if __name__ == "__main__":
    place = Path(sys.argv[1]).resolve()
    prepare(place)
    for name in sys.argv[2:] or walks():
        print(f"<!-- walk: {name} -->")
        for asked, answer in executed(walks()[name], place):
            first, *more = asked.splitlines()
            print("\n".join([f"$ {first}", *(f"> {line}" for line in more), *answer]), flush=True)
