"""Plugins: what a file may hold, and that its bytes are part of what a journal must agree with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from compress import plugins
from compress.containers import CONTAINERS
from compress.errors import RecipeError
from compress.models.spec import TensorSpec
from compress.plan.checks import tensor_problems
from compress.plan.tensor import PlannedTensor
from compress.solvers.options import RtnOptions


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test loads is gone behind it."""
    monkeypatch.setattr(plugins, "_loaded", {})
    monkeypatch.setattr("compress.codecs.names._REGISTERED", {})


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_files_of_one_name_both_count(tmp_path: Path) -> None:
    first, second = (written(tmp_path / place / "codec.py", f"# {place}") for place in ("a", "b"))
    plugins.load(first)
    before = plugins.digests()
    plugins.load(second)
    assert len(before) == 1 and len(plugins.digests()) == 2 and set(before) < set(plugins.digests())
    plugins.load(written(tmp_path / "c" / "another.py", "# a"))  # the same bytes
    assert len(plugins.digests()) == 2


def test_order_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [written(tmp_path / f"{n}.py", f"# {n}") for n in range(4)]
    for file in files:
        plugins.load(file)
    digests = plugins.digests()
    monkeypatch.setattr(plugins, "_loaded", {})
    for file in reversed(files):
        plugins.load(file)
    assert plugins.digests() == digests


def test_dataclasses_work(tmp_path: Path) -> None:
    """They look their module up in sys.modules when annotations are text."""
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass C:\n    x: int = 1\n"
    )
    plugins.load(written(tmp_path / "codec.py", text))


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("codec.py", "def (:", "SyntaxError"),
        ("codec.py", "import no_such_module_anywhere", "ModuleNotFoundError"),
        ("codec.txt", "x = 1", "not a Python file"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    modules = set(sys.modules)
    with pytest.raises(RecipeError, match=complaint) as error:
        plugins.load(written(tmp_path / name, text))
    assert "\n" not in str(error.value)
    assert plugins.digests() == () and set(sys.modules) == modules


def test_rows_that_do_not_divide_into_its_blocks(tmp_path: Path) -> None:
    text = (
        "from compress.codecs.names import CodecInfo, register_info\nregister_info(CodecInfo('own', 'block', 32, 18))"
    )
    plugins.load(written(tmp_path / "codec.py", text))
    spec = TensorSpec("w", (8, 48), "mlp.up", 0, None, "w", "mlp.in")
    (problem,) = tensor_problems(PlannedTensor(spec, "own", RtnOptions(), 0), [CONTAINERS["compress"]])
    assert str(problem) == "w: rows of 48 do not divide into own's 32 columns"
