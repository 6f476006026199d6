"""The dependency rule, read from syntax trees: who imports whom, who prints, what starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "compress"
FILES = sorted(PACKAGE.rglob("*.py"))

PURE = ("transforms", "solvers", "codecs")
"""Pure functions on tensors: no files, no output, no choice of devices, no other layer."""

VALUES = ("statistics", "weights", "errors")
PURE_MAY_IMPORT = {
    "transforms": (
        "transforms.base",
        "transforms.options",
        "transforms.hadamard",
        "models.spec",
        *VALUES,
    ),  # models.spec: which tensors a block has, as types only
    "solvers": (
        "solvers.base",
        "solvers.options",
        "solvers.feedback",
        "solvers.descent",
        "solvers.quantize",
        "solvers.masks",
        "solvers.whitening",
        "solvers.dictionary",
        "codecs.base",
        "codecs.grid",
        "codecs.scales",
        *VALUES,
    ),
    "codecs": (
        "codecs.base",
        "codecs.scales",
        "codecs.grid",
        "codecs.refit",
        "codecs.bits",
        "codecs.lattice",
        "codecs.names",
        "codecs.packing",
        "codecs.lookup",
        "codecs.tables",
        *VALUES,
    ),
}

SAME_FORMAT = {
    ("compress.codecs.q5_1", "compress.codecs.q5_0"),  # the fifth bits
    ("compress.codecs.iq4_xs", "compress.codecs.iq4_nl"),  # the sixteen levels
    ("compress.codecs.iq1_m", "compress.codecs.iq1_s"),  # the shift
    ("compress.codecs.q4_1", "compress.codecs.q5_1"),  # a scale and a minimum per block
    ("compress.codecs.tq1_0", "compress.codecs.tq2_0"),  # the three levels
    ("compress.codecs.fp4", "compress.codecs.nf4"),  # the block
    ("compress.codecs", "compress.codecs.float"),  # the package's own look-up
    ("compress.codecs", "compress.codecs.uniform"),
    ("compress.codecs", "compress.codecs.sparse"),
    ("compress.codecs", "compress.codecs.factors"),
}
"""Imports between two files of one folder that share a table, each with its reason."""

LOWER = ("codecs", "solvers", "transforms", "models", "containers")
UPPER = ("compress.cli", "compress.run", "compress.plan", "compress.report")

LONG = {"compress/containers/gguf.py": 600}
"""Files allowed more than 450 lines, and how many."""

SILENCES = {"scoring/tasks.py": {"logging"}}
"""Modules that import logging only to quieten another package's loggers."""

TORCH_FREE = (
    "compress", "compress.recipe", "compress.recipe.rules", "compress.recipe.schemes", "compress.recipe.document",
    "compress.plan", "compress.plan.tensor", "compress.plan.savings", "compress.plan.resources", "compress.plan.allocation",
    "compress.codecs", "compress.codecs.names", "compress.solvers.options", "compress.models", "compress.models.spec",
    "compress.models.checkpoint", "compress.structured.options", "compress.structured.shapes", "compress.text",
    "compress.errors", "compress.weights", "compress.catalog", "compress.cli",
)  # fmt: skip


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _imports(tree: ast.AST) -> set[str]:
    """Dotted names of everything imported anywhere in a file, functions and type checking included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            # `from package import module` imports package.module
            for alias in node.names:
                inner = ROOT.joinpath(*node.module.split("."), alias.name)
                found.add(
                    f"{node.module}.{alias.name}"
                    if inner.with_suffix(".py").exists() or inner.is_dir()
                    else node.module
                )
    return found


def _calls(tree: ast.AST) -> set[str]:
    """Names of the functions called by their bare name, and of all methods as `.name`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                names.add(node.func.id)
            elif isinstance(node.func, ast.Attribute):
                names.add(f".{node.func.attr}")
    return names


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
PURE_FILES = [path for path in FILES if path.relative_to(PACKAGE).parts[0] in PURE]
LOWER_FILES = [path for path in FILES if path.relative_to(PACKAGE).parts[0] in LOWER]


def _id(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", PURE_FILES, ids=_id)
def test_pure_layers_import_only_what_lies_below(path: Path) -> None:
    layer, me = path.relative_to(PACKAGE).parts[0], _module(path)
    inside = {name for name in _imports(TREES[path]) if name.split(".")[0] == "compress"} - {me}
    wrong = {
        name
        for name in inside
        if name.removeprefix("compress.") not in PURE_MAY_IMPORT[layer] and (me, name) not in SAME_FORMAT
    }
    assert not wrong, f"{me} imports {sorted(wrong)}"


def test_no_exception_outlives_its_reason() -> None:
    used = {(_module(path), name) for path in PURE_FILES for name in _imports(TREES[path])}
    assert used >= SAME_FORMAT
    for layer, allowed in PURE_MAY_IMPORT.items():
        inside = {name for me, name in used if me.startswith(f"compress.{layer}")}
        assert {f"compress.{name}" for name in allowed if name not in VALUES} <= inside


@pytest.mark.parametrize("path", PURE_FILES, ids=_id)
def test_pure_layers_do_not_touch_the_world(path: Path) -> None:
    calls, imports = _calls(TREES[path]), _imports(TREES[path])
    talk = {"open", "print", "input", "exec", "eval", ".open", ".cuda", ".is_available", ".manual_seed"}
    talk |= {".write_text", ".write_bytes", ".read_text", ".read_bytes"}
    assert not calls & talk, f"calls {sorted(calls & talk)}"
    world = {
        "logging",
        "os",
        "sys",
        "io",
        "pathlib",
        "random",
        "rich",
        "typer",
        "warnings",
        "time",
        "transformers",
    }
    outside = {name.split(".")[0] for name in imports} & world
    assert not outside, f"imports {sorted(outside)}"


@pytest.mark.parametrize("path", LOWER_FILES, ids=_id)
def test_lower_layers_know_nothing_of_the_upper_ones(path: Path) -> None:
    wrong = {name for name in _imports(TREES[path]) if name.startswith(UPPER)}
    assert not wrong


def test_the_runtime_needs_nothing_that_makes_models() -> None:
    below = ("codecs", "containers", "transforms", "models", "runtime", "checkpoint", "errors", "weights")
    for path in (PACKAGE / "runtime").glob("*.py"):
        inside = [name.split(".") for name in _imports(TREES[path]) if name.startswith("compress.")]
        assert not {name[1] for name in inside} - set(below), path


def test_only_cli_and_report_print_or_log() -> None:
    for path, tree in TREES.items():
        where = path.relative_to(PACKAGE).parts
        if where[0] in ("cli.py", "report"):
            continue
        assert "print" not in _calls(tree), path
        loud = {name.split(".")[0] for name in _imports(tree)} & {"logging", "rich", "typer"}
        assert not loud - SILENCES.get(_id(path), set()), f"{path} imports {loud}"


def test_no_file_is_too_long_to_read() -> None:
    for path in FILES:
        name, lines = str(path.relative_to(ROOT)), len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= LONG.get(name, 450), f"{name} has {lines} lines"
    assert all((ROOT / name).exists() for name in LONG)


def test_every_module_postpones_annotations_and_says_what_it_is() -> None:
    for path, tree in TREES.items():
        if not tree.body:
            continue
        assert ast.get_docstring(tree), f"{path} has no docstring"
        if any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in tree.body):
            assert "annotations" in ast.unparse(tree), f"{path} lacks from __future__ import annotations"


@pytest.mark.parametrize("modules", [TORCH_FREE])
def test_planning_starts_without_heavy_packages(modules: tuple[str, ...]) -> None:
    present = [name for name in modules if ROOT.joinpath(*name.split(".")).with_suffix(".py").exists()
               or ROOT.joinpath(*name.split("."), "__init__.py").exists()]  # fmt: skip
    code = (
        "import importlib, sys\n"
        f"for name in {present!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'transformers', 'llama_cpp', 'lm_eval', 'datasets'} & set(sys.modules)\n"
        "    assert not heavy, (name, heavy)\n"
        "from compress.models import known_families\n"
        "assert known_families() and 'torch' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_nothing_unpickles() -> None:
    for path, tree in TREES.items():
        assert not {name.split(".")[0] for name in _imports(tree)} & {"pickle", "marshal", "shelve"}, path
        assert ast.unparse(tree).count("torch.load(") == 0, path
