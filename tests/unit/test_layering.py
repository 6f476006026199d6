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
        "models.layers.base",
        *VALUES,
    ),  # models: what a block declares, as types only
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
        "codecs.stack",
        *VALUES,
    ),
    "codecs": (
        "codecs.base",
        "codecs.stack",
        "codecs.forms",
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

CONTAINERS_MAY_IMPORT = (
    "containers", "codecs", "models.spec", "models.checkpoint", "models.config", "models.layers", "models.identity",
    "models.companions", "models.gguf", "models.sources", "decode", "errors", "files", "limits", "reading", "text", "weights",
)  # fmt: skip

ORDER = (
    "errors", "limits", "reading", "weights", "products",
    "statistics", "files", "machine", "text",
    "codecs", "models",
    "solvers", "transforms", "decode",
    "streaming", "solve",
    "containers", "runtime", "plugins",
    "structured", "recipe", "catalog", "plan",
    "scoring", "report", "advise", "engines",
    "recover", "export", "publish", "run", "api", "cli",
)  # fmt: skip
"""All folders and top-level modules from the bottom to the top: a room imports from those before it only, in functions,
too. Imports for type checkers do not count. The package itself is below all: Python runs it before anything in it."""

UPWARD = {
    ("compress", "compress.runtime.hook"): "registers our folders with transformers; imports nothing of ours itself",
}
"""Imports that go up all the same, each with its reason."""

NAME_PARTS = (
    "self_attn", "linear_attn", "mlp.", ".experts", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
    "down_proj", "layernorm", "embed_tokens", "lm_head.", "model.norm", "model.layers", ".layers.", "block_sparse_moe",
    "shared_expert.", "q_norm", "k_norm",
)  # fmt: skip
SAY_NAMES = {
    "containers/awq.py": "the format leaves out modules by name, those of a layer's experts together",
    "containers/bitsandbytes.py": "transformers keeps the head and the table it is tied to by name",
    "containers/compress.py": "one line of the config stands for all layers and experts that are stored alike",
    "containers/compressed_tensors.py": "targets of the format are patterns of names",
    "runtime/loader.py": "transformers names the modules that are replaced",
}
"""Files outside `models` that say part of a tensor's or a module's name, each with its reason."""

DOTTED = {
    "scoring/results.py": "tasks with a metric of their own",
    "structured/restructure.py": "keys of its own state",
}
"""Files outside `models` that take something apart at dots, and what."""

COUNT_BLOCKS = {
    "containers/gguf.py": "the first dense one",
    "recover/sensitivity.py": "names of files",
    "run/loop.py": "units of the journal",
    "run/rehearse.py": "which are alike, and their measured seconds",
    "run/summary.py": "lines of the scorecard",
    "run/units.py": "units of the journal",
    "run/surveys.py": "a view that keeps all of them",
}
"""Files that count a model's blocks without touching a tensor, and what for; all work on blocks goes through `walk`."""

WORK = {
    "forward_block", "forward_branch", "advance", "embed", "forward", "load", "of", "weight", "weights", "solve_tensor",
    "compress_sublayer", "scale_sublayer", "repair_sublayer", "recover_block", "collect", "step_block",
}  # fmt: skip
"""What is done to a block: never in a loop that counts them."""

LONG = {"compress/containers/gguf.py": 600}
"""Files allowed more than 450 lines, and how many."""

SILENCES = {"scoring/tasks/quiet.py": {"logging"}}
"""Modules that import logging only to quieten another package's loggers."""

TORCH_FREE = (
    "compress", "compress.recipe", "compress.recipe.rules", "compress.recipe.schemes", "compress.recipe.document",
    "compress.plan", "compress.plan.tensor", "compress.plan.savings", "compress.plan.resources", "compress.plan.allocation",
    "compress.plan.factors", "compress.plan.outline", "compress.plan.running", "compress.plan.verdict",
    "compress.plan.duration", "compress.advise", "compress.advise.choose", "compress.machine", "compress.machine.measured",
    "compress.report.verdict",
    "compress.codecs", "compress.codecs.names", "compress.solvers.options", "compress.models", "compress.models.spec",
    "compress.models.checkpoint", "compress.structured.options", "compress.structured.shapes", "compress.text",
    "compress.text.probes",
    "compress.errors", "compress.weights", "compress.catalog", "compress.cli",
    "compress.containers", *(f"compress.containers.{p.stem}" for p in sorted(PACKAGE.glob("containers/[!_]*.py"))),
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


def _imported(tree: ast.AST, *, functions: bool) -> set[str]:
    """The same without what is for type checkers alone, and with or without what functions import when they run."""
    skipped: tuple[type[ast.AST], ...] = () if functions else (ast.FunctionDef, ast.AsyncFunctionDef)
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, skipped) or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
                continue
            if isinstance(child, ast.Import | ast.ImportFrom):
                found.update(_imports(ast.Module([child], [])))
            visit(child)

    visit(tree)
    return {name for name in found if name.split(".")[0] == "compress"}


def _room(module: str) -> str:
    """The folder or top-level module that a module belongs to."""
    return [*module.split("."), "compress"][1]


def _knots(arrows: dict[str, set[str]]) -> list[set[str]]:
    """Sets of nodes that reach each other."""
    reach = {node: set(targets) for node, targets in arrows.items()}
    for middle in reach:
        for targets in reach.values():
            if middle in targets:
                targets |= reach[middle]
    return [{b for b in reach if b in reach[a] and a in reach[b]} for a in reach if a in reach[a]]


def _strings(tree: ast.AST) -> list[str]:
    """All that a file says but its docstrings and other prose."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    said = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in prose]
    return [text.replace("\\", "") for text in said if isinstance(text, str) and " " not in text]


def _block_loops(tree: ast.AST) -> list[ast.AST]:
    """Loops and comprehensions over all blocks of a model, by number or by what there is one of for each."""
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For)]
    loops += [n for n in ast.walk(tree) if isinstance(n, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp)]

    def over(node: ast.AST) -> bool:
        iterables = [node.iter] if isinstance(node, ast.For) else [part.iter for part in node.generators]
        return any(".layers" in ast.unparse(it) and "range(" in ast.unparse(it) for it in iterables)

    return [node for node in loops if over(node)]


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


def test_every_room_has_its_place() -> None:
    rooms = {_room(_module(path)) for path in FILES} - {"compress"}
    assert rooms == set(ORDER) and len(ORDER) == len(set(ORDER))


def test_arrows_go_down() -> None:
    """Exceptions are used, or they go."""
    wrong, used = [], set()
    for path, tree in TREES.items():
        me = _module(path)
        for name in _imported(tree, functions=True):
            mine, other = _room(me), _room(name)
            if mine == other or other == "compress" or (mine in ORDER and ORDER.index(other) < ORDER.index(mine)):
                continue
            used.add((me, name))
            wrong += [f"{me} imports {name}"] if (me, name) not in UPWARD else []
    assert not wrong
    assert used == set(UPWARD)


def test_no_files_import_each_other() -> None:
    """Neither at once nor round a corner, when they are imported; a package runs before what is in it."""
    modules = {_module(path): tree for path, tree in TREES.items()}
    arrows: dict[str, set[str]] = {}
    for me, tree in modules.items():
        names = _imported(tree, functions=False)
        packages = {name.rpartition(".")[0] for name in names}
        arrows[me] = {n for n in names | packages if n in modules and n != me and not me.startswith(f"{n}.")}
    del arrows["compress"]
    assert not [sorted(knot) for knot in _knots(arrows)]


def test_no_folders_import_each_other() -> None:
    arrows: dict[str, set[str]] = {room: set() for room in ORDER}
    for path, tree in TREES.items():
        if (me := _room(_module(path))) in arrows:
            arrows[me] |= {_room(name) for name in _imported(tree, functions=False)} - {me, "compress"}
    assert not [sorted(knot) for knot in _knots(arrows)]


OUTSIDE_MODELS = [path for path in FILES if path.relative_to(PACKAGE).parts[0] != "models"]


def test_only_models_know_how_tensors_are_called() -> None:
    """Elsewhere no string is part of a tensor's name, so that none can be compared, matched or taken apart by one; nor is
    anything split at dots."""
    says = {_id(p) for p in OUTSIDE_MODELS if any(part in s for s in _strings(TREES[p]) for part in NAME_PARTS)}
    assert says == set(SAY_NAMES)
    dotted = {_id(p) for p in OUTSIDE_MODELS if any(_splits_at_dots(node) for node in ast.walk(TREES[p]))}
    assert dotted == set(DOTTED)


def _splits_at_dots(node: ast.AST) -> bool:
    match node:
        case ast.Call(ast.Attribute(_, "split" | "rsplit" | "partition" | "rpartition"), [ast.Constant("."), *_]):
            return True
    return False


def test_one_walk_over_the_blocks() -> None:
    """Whoever runs, solves or loads blocks one after the other gets them from `streaming.walk`."""
    loops = {_id(path): _block_loops(TREES[path]) for path in OUTSIDE_MODELS}
    assert {name for name, found in loops.items() if found} - {"streaming/walk.py"} == set(COUNT_BLOCKS)
    for name in COUNT_BLOCKS:
        for loop in loops[name]:
            called = {call.removeprefix(".") for call in _calls(loop)}
            assert not called & WORK, f"{name}:{loop.lineno} works on blocks"


def test_containers_know_nothing_of_plans_runs_and_engines() -> None:
    for path in (PACKAGE / "containers").glob("*.py"):
        inside = {name.removeprefix("compress.") for name in _imports(TREES[path]) if name.startswith("compress.")}
        wrong = {
            name
            for name in inside
            if not any(name == may or name.startswith(f"{may}.") for may in CONTAINERS_MAY_IMPORT)
        }
        assert not wrong, f"{path} imports {sorted(wrong)}"


def test_packed_tensors_are_decoded_below_containers() -> None:
    inside = {name for name in _imports(TREES[PACKAGE / "decode.py"]) if name.startswith("compress.")}
    assert {name.split(".")[1] for name in inside} == {"codecs", "transforms", "weights"}


OUTSIDE = [path for path in FILES if path.relative_to(PACKAGE).parts[0] != "containers"]


@pytest.mark.parametrize("path", OUTSIDE, ids=_id)
def test_only_a_container_knows_its_name(path: Path) -> None:
    """Nothing compares with a container's name, keeps a table by it, or imports its module: a container is a value that
    answers for itself. Our own runtime reads what the container `compress` writes, of course."""
    from compress.containers import CONTAINERS
    from compress.recipe.schema import STEP_KINDS
    from compress.solvers.options import FACTORIZERS, PRUNERS, SOLVERS

    names = {name for container in CONTAINERS.values() for name in (container.name, container.suffix) if name}
    ambiguous = {*SOLVERS, *PRUNERS, *FACTORIZERS, *STEP_KINDS, "compress"}  # the package's own name

    def literals(node: ast.AST | None) -> set[str]:
        nodes = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
        return {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)} & names

    found = []
    for node in ast.walk(TREES[path]):
        used: set[str] = set()
        if isinstance(node, ast.Compare):
            used = set().union(*(literals(side) for side in (node.left, *node.comparators)))
        elif isinstance(node, ast.Subscript):
            used = literals(node.slice)
        elif isinstance(node, ast.Dict):
            used = set().union(*(literals(key) for key in node.keys))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop"):
            used = set().union(*(literals(argument) for argument in node.args[:1]))
        elif isinstance(node, ast.MatchValue):
            used = literals(node.value)
        if used - ambiguous or (used and "container" in ast.unparse(node).lower()):
            found.append(ast.unparse(node))
    assert not found
    modules = {f"compress.containers.{file.stem}" for file in (PACKAGE / "containers").glob("*.py")}
    if path.parent.name == "runtime":
        modules.remove("compress.containers.compress")
    wrong = (_imports(TREES[path]) & modules) - {"compress.containers.base", "compress.containers.__init__"}
    assert not wrong, f"imports {sorted(wrong)}"


def test_the_runtime_needs_nothing_that_makes_models() -> None:
    below = ("codecs", "containers", "transforms", "models", "runtime", "checkpoint", "errors", "weights")
    for path in (PACKAGE / "runtime").glob("*.py"):
        inside = [name.split(".") for name in _imports(TREES[path]) if name.startswith("compress.")]
        assert not {name[1] for name in inside} - set(below), path


def test_only_cli_and_report_print_or_log() -> None:
    for path, tree in TREES.items():
        where = path.relative_to(PACKAGE).parts
        if where[0] in ("cli", "report"):
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


def test_functions_are_short_and_take_few_arguments() -> None:
    """A command's arguments are its options."""
    wrong = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = len([a for a in named if a.arg not in ("self", "cls")])
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > 60 or (count > 7 and not _id(path).startswith("cli/")):
                    wrong.append(f"{_id(path)}: {node.name} has {lines} lines and {count} arguments")
    assert not wrong
