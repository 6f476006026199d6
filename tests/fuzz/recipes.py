"""Mutated recipes, overrides, suites and text sets: planned, or refused in words."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from compress.plan.make import make_plan
from compress.recipe import bundled_recipes, load_recipe
from compress.recipe.schema import STEP_KINDS, Recipe
from compress.text import data_root, load_definition, load_suite
from tests.fuzz.harness import Case, hostile, mutated, scrambled
from tests.tiny import demo_model

KEYS = (*Recipe.model_fields, *STEP_KINDS, "solver", "scheme", "rules", "ignore", "targets", "codec", "layers", "sparsity", "ratio",
        "container", "max_shard_size", "incoherence", "activations", "suite", "samples", "length", "dataset", "mix", "column", "split", "template")  # fmt: skip
WORDS = (
    b"&a ", b"*a", b"*a, *a, *a", b"<<: *a", b"!!python/object:os.system ", b"!x ", b"\t", b"\n", b": ", b"- ", b"[", b"]", b"{", b"}", b"|", b">",
    b"#", b"'", b'"', b"?", b"---", b"...", b"%YAML 9.9", b"\\", b"\0", b"\xff", b"\xef\xbb\xbf", b"null", b"1", b"9", b"re:(a+)+", b"\r",
    b"  ", b",", b"@", b"`", b"0x", b"1e9", b".inf", b"~",
)  # fmt: skip


@cache
def _texts() -> tuple[str, ...]:
    return tuple(path.read_text() for path in bundled_recipes().values())


@cache
def _models() -> tuple[str, ...]:
    """config.json of a dense model, of one with experts, of one with linear attention."""
    from tests.tiny import tiny_config

    return tuple(
        json.dumps(tiny_config(family)) for family in ("llama", "qwen3_moe", "qwen3_5_moe_text", "deepseek_v3")
    )


def _model(rng: random.Random, folder: Path) -> str:
    if rng.random() < 0.3:
        return str(demo_model())
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(rng.choice(_models()))
    return str(folder / "model")


def _planned(rng: random.Random, folder: Path, text: bytes | str, *overrides: str) -> None:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    model = _model(rng, folder) if rng.random() < 0.9 else None
    make_plan(load_recipe(path, overrides, model=model, output=str(folder / "out"))).as_dict()


def tree(rng: random.Random, folder: Path) -> None:
    """Values, keys and items of a recipe changed."""
    recipe = mutated(rng, yaml.safe_load(rng.choice(_texts())), KEYS)
    _planned(rng, folder, _dumped(rng, recipe))


def text(rng: random.Random, folder: Path) -> None:
    """Bytes of a recipe changed."""
    _planned(rng, folder, scrambled(rng, rng.choice(_texts()).encode(), WORDS))


def overrides(rng: random.Random, folder: Path) -> None:
    """`--set` with odd places and values."""
    parts = (*KEYS, "[0]", "[1]", "[99]", "[-1]", "", "x", "name", "damping")
    given = []
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = ".".join(rng.choice(parts) for _ in range(rng.choice((1, 2, 3, 4)))).replace(".[", "[")
        if rng.random() < 0.5:
            place = rng.choice(("steps[0].quantize.scheme", "steps[0].quantize.solver.damping", "export[0].container", "seed", "score",
                                "steps", "export", "export[0].name", "steps[0]", "gate.max_kld", "calibration.samples"))  # fmt: skip
        value = hostile(rng)
        given.append(f"{place}={value if isinstance(value, str) else json.dumps(value)}")
    _planned(rng, folder, rng.choice(_texts()), *given)


def bombs(rng: random.Random, folder: Path) -> None:
    """Small files that stand for large ones, and large files."""
    width, depth, count = rng.choice((2, 10, 50)), rng.choice((3, 9, 30, 3000)), rng.choice((10, 1000, 100_000))
    head = "model: m\nexport: [{container: gguf}]\n"
    aliases = "a0: &a0 [x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * width)}]\n" for i in range(1, min(depth, 40))
    )
    step = rng.choice(("quantize: {scheme: W4A16}", "rotate: {}", "prune: {sparsity: 0.5}"))
    pattern = rng.choice(
        ("(a+)+", "([a-z._0-9]+)+#", "(.*)*x", "(a|a)*" * 30, "((" * depth, "[a-z]{1,500}" * 20, ".*" * 400 + "x")
    )
    _planned(rng, folder, rng.choice((
        head + aliases,
        head + "steps: " + "[" * depth + "]" * depth,
        head + "steps: " + "{a: " * depth,
        head + "x: " + "- " * depth + "1",
        head + "steps:\n" + f"  - {step}\n" * count,
        head + "steps: [{quantize: {rules: [" + "{targets: mlp, codec: q8_0}," * count + "]}}]",
        head + f"steps: [{{quantize: {{rules: [{{targets: [{','.join([repr(f're:{pattern}')] * min(count, 300))}], codec: q8_0}}]}}}}]",
        head + "seed: " + "9" * count,
        head + "seed: 0." + "9" * count,
        head + "name: " + "n" * count,
        f"model: {'m' * count}\nexport: [{{container: gguf}}]\n",
        head + f"calibration: {{dataset: {'d/' * min(count, 3000)}}}",
        head + f"? {'[' * depth}",
        head + "".join(f"k{i}: {i}\n" for i in range(count)),
        head + "&a " * count,
        head + "x: &a {b: *a}",
        head + "!" * count,
    )))  # fmt: skip


def suites(rng: random.Random, folder: Path) -> None:
    """Suites and definitions of text sets."""
    root = data_root("eval")
    sources = (*root.glob("suites/*.yaml"), *root.glob("*.yaml"), *data_root("calibration").glob("*.yaml"))
    source = rng.choice(sorted(sources))
    path = folder / source.name
    if rng.random() < 0.5:
        path.write_bytes(scrambled(rng, source.read_bytes(), WORDS))
    else:
        names = ("files", "hub", "mix", "format", "column", "tasks", "windows")
        path.write_bytes(_dumped(rng, mutated(rng, yaml.safe_load(source.read_text()), names)))
    load_suite(str(path)) if source.parent.name == "suites" else load_definition(path)


def _dumped(rng: random.Random, value: Any) -> bytes:
    if rng.random() < 0.5:
        return json.dumps(value).encode()
    return yaml.safe_dump(value, default_flow_style=rng.choice((None, True, False))).encode(errors="surrogatepass")


def prepare() -> None:
    """Import and read what is no part of a case's time."""
    from compress.containers import gguf  # noqa: F401

    _texts(), _models()


KINDS: dict[str, Case] = {f.__name__: f for f in (tree, text, overrides, bombs, suites)}
