"""The front door: names that users import from `compress`, what they cost, and that sub-packages do not hide them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import compress

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = {
    "Compared", "Plan", "Recipe", "Result", "Scorecard", "compare", "ladder", "load_recipe", "plan", "register_codec", "run",
    "score",
}  # fmt: skip


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_public_names_are_these() -> None:
    assert set(compress.__all__) == PUBLIC and set(dir(compress)) >= PUBLIC


def test_they_are_what_their_modules_define() -> None:
    from compress import api
    from compress.recipe import Recipe, load_recipe

    assert (compress.run, compress.plan, compress.score, compress.compare) == (
        api.run,
        api.plan,
        api.score,
        api.compare,
    )
    assert compress.load_recipe is load_recipe and compress.Recipe is Recipe
    assert callable(compress.register_codec) and compress.Scorecard.__name__ == "Scorecard"


def test_sub_packages_of_the_same_name_do_not_hide_them() -> None:
    code = "import compress.run, compress.plan, compress.recipe; import compress; print(callable(compress.run), callable(compress.plan))"
    assert python(code).split() == ["True", "True"]


def test_importing_the_package_brings_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'pydantic', 'gguf'} & set(sys.modules)"
    assert python(f"import compress, sys; print({heavy})").strip() == "set()"
    heavy = "{'torch', 'transformers'} & set(sys.modules)"
    assert python(f"import compress, sys; compress.load_recipe, compress.plan; print({heavy})").strip() == "set()"


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(compress, "quantise")
