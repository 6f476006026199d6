"""Recipes that are too much: refused at once, in one line with its place."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from compress.errors import RecipeError
from compress.models.spec import load_spec
from compress.recipe import load_recipe
from compress.recipe.patterns import PatternError, compiled
from compress.recipe.rules import Rule, RuleMatcher
from tests.tiny import tiny_config

HEAD = "model: m\nexport: [{container: gguf}]\n"
BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (HEAD + BOMB, "x.yaml:4: holds more than 20,000 values once its aliases are written out"),
        (HEAD + "steps: " + "[" * 5000 + "]" * 5000, "x.yaml:3: nested more than 32 levels deep"),
        (HEAD + "steps:\n" + "- {quantize: {scheme: W4A16}}\n" * 30_000, "has 900,044 bytes; at most 262,144 are read"),
        (HEAD + "steps:\n" + "- {quantize: {scheme: W4A16}}\n" * 40, "x.yaml:3: steps: expected at most 32 items"),
        (HEAD + "seed: " + "9" * 4000, "x.yaml:3: seed: a number of 4,000 characters; at most 40 are read"),
        (HEAD + "seed: 1e999", "x.yaml:3: seed: 1e999 is no finite number"),
        (HEAD + "name: " + "n" * 300, "x.yaml:3: name: a name of 300 characters; files here have at most 128"),
        (HEAD + "output: a/" + "o" * 300, "x.yaml:3: output: a file or folder name of 300 bytes; file systems take 255"),
        (HEAD + 'output: "a\\0b"', "x.yaml:3: output: holds the control character U+0000"),
        (HEAD + "calibration: {dataset: " + "d" * 5000 + "}", "dataset: a text of 5,000 characters; at most 4,096 are read"),
        ("model: m\nexport: [{container: [gguf]}]\n", "x.yaml:2: export[0].container: expected text, got a list"),
        ("model: m\nexport: [{container: {a: b}}]\n", "x.yaml:2: export[0].container: expected text, got a mapping"),
        ("model: m\nexport: [{container: gguf, name: [a]}]\n", "x.yaml:2: export[0].name: expected text, got a list"),
    ],
)  # fmt: skip
def test_too_much(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(RecipeError) as error:
        load_recipe(tmp_path / "x.yaml")
    assert any(complaint in line.replace(f"{tmp_path}/", "") for line in error.value.problems), error.value.problems
    assert len(error.value.problems) <= 51 and max(map(len, error.value.problems)) < 500


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 100, "&a [*a]", "\ud800"])
def test_overrides_have_the_same_limits(tmp_path: Path, value: str) -> None:
    (tmp_path / "x.yaml").write_text(HEAD)
    with pytest.raises(RecipeError) as error:
        load_recipe(tmp_path / "x.yaml", [f"seed={value}"])
    assert all(line.isprintable() for line in error.value.problems)


NAMES = [t.name for t in load_spec(tiny_config("qwen3_moe")).tensors()]
PATTERNS = (
    r".*self_attn\.o_proj", r"model\.layers\.(0|[3-9])\..*", r".*experts\.[0-3]\.(gate|up)_proj$", r"(?i)MODEL", r"model\.(?:layers|norm)\b",
    r"[^.]+\.layers\.\d{1,2}\.mlp", r"^lm_head", r".*\.weight\Z", r"(?P<n>m)odel", r"", r"\w+\.\S+?\.0", r"(a+)+#",
)  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_mean_what_python_means(pattern: str) -> None:
    expected = [bool(re.match(pattern, name)) for name in NAMES]
    try:
        assert [bool(compiled(pattern)(name)) for name in NAMES] == expected
    except PatternError as error:
        assert pattern.endswith("Z") and "linear time" in str(error)


@pytest.mark.parametrize(
    "pattern",
    [r"(a)\1", r"(?=x)", r"(?<!x)y", "a{,3}", "[[:alpha:]]", "(", "(" * 600, "x" * 2000, "(?>a)", "*", "a{9999}"],
)
def test_patterns_that_cannot_be_used(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "x.yaml").write_text(
        f"{HEAD}steps: [{{quantize: {{rules: [{{targets: 're:{pattern}', codec: q8_0}}]}}}}]\n"
    )
    with pytest.raises(RecipeError) as error:
        load_recipe(tmp_path / "x.yaml")
    (line,) = error.value.problems
    assert "x.yaml:3: steps[0].quantize.rules[0].targets: " in line and "regular expression" in line


def test_no_pattern_takes_exponential_time() -> None:
    matcher = RuleMatcher([Rule(targets="re:([a-z._0-9]+)+#", codec="q8_0")], 2)
    start = time.process_time()
    assert not any(matcher.match(t) for t in load_spec(tiny_config("qwen3_moe")).tensors())
    assert time.process_time() - start < 5  # Python's own engine would need years
