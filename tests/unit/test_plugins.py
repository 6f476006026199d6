"""Plugins: what a file may hold, and that its bytes are part of what a journal must agree with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from compress import plugins
from compress.codecs.names import codec_info, registered
from compress.containers import CONTAINERS
from compress.errors import RecipeError
from compress.models import known_families
from compress.models.spec import TensorSpec
from compress.plan.checks import tensor_problems
from compress.plan.tensor import PlannedTensor
from compress.solvers.options import FACTORIZERS, PRUNERS, SOLVERS, RtnOptions
from compress.transforms.options import SCALINGS


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What a test loads is gone behind it."""
    before = plugins.registered()
    yield
    plugins.restore(before)


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


def test_order_does_not_matter(tmp_path: Path) -> None:
    before = plugins.registered()
    files = [written(tmp_path / f"{n}.py", f"# {n}") for n in range(4)]
    for file in files:
        plugins.load(file)
    digests = plugins.digests()
    plugins.restore(before)
    for file in reversed(files):
        plugins.load(file)
    assert plugins.digests() == digests


def test_dataclasses_work(tmp_path: Path) -> None:
    """They look their module up in sys.modules when annotations are text."""
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass C:\n    x: int = 1\n"
    )
    plugins.load(written(tmp_path / "codec.py", text))


HALF = """
from compress.codecs.names import CodecInfo, codec_info, register_info
from compress.containers import CONTAINERS, Container, register as register_container
from compress.models import Family, known_families, register as register_family
from compress.solvers import options as solvers
from compress.transforms import options as transforms
from dataclasses import replace
from typing import ClassVar, Literal

register_info(CodecInfo("own", "block", 32, 18))
assert codec_info("own").block == 32
register_container(replace(CONTAINERS["compress"], name="own"))
register_family(replace(known_families()["llama"], model_types=("own",)))
solve = prune = factorize = search = print
for name, base, register in (
    ("own-solver", solvers.SolverOptions, solvers.register),
    ("own-pruner", solvers.PrunerOptions, solvers.register),
    ("own-factorizer", solvers.FactorizerOptions, solvers.register),
    ("own-scaling", transforms.TransformOptions, transforms.register),
):
    given = {"__annotations__": {"name": str, "module": ClassVar[str]}, "name": name, "module": __name__, "__module__": __name__}
    register(type(name, (base,), given))
"""
OWN = ("own", "own-solver", "own-pruner", "own-factorizer", "own-scaling")


def known() -> set[str]:
    return {*registered(), *CONTAINERS, *known_families(), *SOLVERS, *PRUNERS, *FACTORIZERS, *SCALINGS}


def test_a_file_registers_all_kinds(tmp_path: Path) -> None:
    plugins.load(written(tmp_path / "whole.py", HALF))
    assert set(OWN) <= known()


@pytest.mark.parametrize(
    ("end", "complaint"),
    [
        ("1 / 0", r"whole.py, line \d+: ZeroDivisionError: division by zero$"),
        ("import sys\nsys.exit()", r"whole.py, line \d+: exits \(code None\); a plugin registers"),
        ("raise SystemExit(0)", r"whole.py, line \d+: exits \(code 0\)"),
        ("class Odd(BaseException): ...\nraise Odd('two\\nlines')", r"whole.py, line \d+: \S*Odd: two lines$"),
        (
            "register_info(CodecInfo('q4_k', 'block', 32, 18))",
            r"whole.py, line \d+: ValueError: there is a codec called",
        ),
        ("register_info(CodecInfo('sparse-bf16', 'block', 32, 18))", "there is a codec called sparse-bf16 already"),
        ("register_info(CodecInfo('Own', 'block', 32, 18))", "names of codecs are written in lower case"),
        ("register_family(None)", r"whole.py, line \d+: AttributeError"),
        ("class X(solvers.SolverOptions): ...\nsolvers.register(X)", "X: its name is `name: Literal"),
        ("class X(solvers.MethodOptions):\n    name: str = 'x'\nsolvers.register(X)", "x: derive its options from"),
        (
            "class X(solvers.SolverOptions):\n    name: str = 'x'\nsolvers.register(X)",
            "x: its functions are in `module",
        ),
        ("del search", "own-scaling: its module has no function search"),
    ],
)
def test_nothing_stays_of_a_file_that_fails(tmp_path: Path, end: str, complaint: str) -> None:
    before, modules = known(), set(sys.modules)
    with pytest.raises(RecipeError, match=complaint) as error:
        plugins.load(written(tmp_path / "whole.py", f"{HALF}\n{end}"))
    assert "\n" not in str(error.value)
    assert known() == before and plugins.digests() == () and set(sys.modules) == modules
    with pytest.raises(KeyError):
        codec_info("own")
    plugins.load(written(tmp_path / "whole.py", HALF))  # mended


def test_an_interruption_is_none_of_its_errors(tmp_path: Path) -> None:
    before = known()
    with pytest.raises(KeyboardInterrupt):
        plugins.load(written(tmp_path / "whole.py", f"{HALF}\nraise KeyboardInterrupt"))
    assert known() == before


@pytest.mark.parametrize("how", ["raise ValueError('no\\nway')", "raise SystemExit(0)"])
def test_what_it_does_later_is_blamed_on_it(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A command that ends inside a plugin has failed, and says where."""
    from compress import cli

    file = written(tmp_path / "later.py", f"import compress.catalog as catalog\ndef late():\n    {how}\n")
    plugins.load(file)
    late = sys.modules[f"compress_plugin_{plugins.digests()[0]}"].late
    monkeypatch.setattr("compress.catalog.as_dict", late)
    monkeypatch.setattr(sys, "argv", ["compress", "methods", "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.startswith(f"error: plugin {file}, line 3: ") and said.count("\n") == 1
    assert plugins.blamed(ValueError("ours")) is None


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("codec.py", "x = 1\ndef (:", r"codec.py, line 2: SyntaxError"),
        ("codec.py", "if x:\npass", r"codec.py, line 2: IndentationError"),
        ("codec.py", "\nimport no_such_module_anywhere", "codec.py, line 2: ModuleNotFoundError: No module"),
        ("codec.py", "x = '\0'", "SyntaxError: source code string cannot contain null bytes"),
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
    assert problem == "w: rows of 48 do not divide into own's 32 columns; ignore it"
