"""A recipe: one YAML file that says what to do to which model. Parsed strictly, without torch.

`load_recipe` reports every problem of a file at once, each as `file:line: where: what; nearest: ...`. The
models below are the schema; docs/recipes.md explains it to users.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from compress.codecs.names import CONTAINERS, KIND_NAMES, activation_problem, codec_info, incoherence_problem
from compress.document import Document, Place, dotted, read_document
from compress.errors import RecipeError
from compress.schemes import expand, scheme_kind, scheme_name
from compress.solvers.options import (
    FACTORIZERS,
    PRUNERS,
    SOLVERS,
    CompotOptions,
    GptqOptions,
    RecoverOptions,
    SolverOptions,
    SparseGptOptions,
)
from compress.structure.options import DropLayersOptions, PruneExpertsOptions, PruneStructuredOptions
from compress.targets import (
    FLOAT_ROLES,
    LINEARS,
    Factorizer,
    FactorizeRule,
    Ignored,
    Pruner,
    PruneRule,
    Rule,
    RuleMatcher,
    Solver,
    Sparsity,
    covers,
    nearest,
    problem,
)
from compress.transforms.options import AwqOptions, RotateOptions, SmoothOptions

if TYPE_CHECKING:
    from compress.models.base import ModelSpec

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB|KIB|MIB|GIB|TIB)", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _size(value: Any) -> Any:
    """'5GB' or '512MiB' to bytes."""
    if not isinstance(value, str):
        return value
    if (match := _SIZE.fullmatch(value.strip())) is None:
        raise problem(f"expected a size like 5GB, 500MB or 2GiB, got {value!r}")
    unit = match[2].upper()
    return int(float(match[1]) * (1024 if "I" in unit else 1000) ** "BKMGT".index(unit[0]))


def _file_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise problem(f"expected a plain file name (letters, digits and . _ + -), got {value!r}")
    return value


def _scheme(value: str) -> str:
    try:
        return scheme_name(value)
    except ValueError as error:
        raise problem(str(error)) from None


def _container(value: str) -> str:
    if value.lower() not in CONTAINERS:
        raise problem(f"unknown container {value!r}{nearest(value, CONTAINERS)}")
    return value.lower()


FileName = Annotated[str, AfterValidator(_file_name)]


class Section(BaseModel):
    """A mapping of the recipe: unknown keys are errors, values are frozen, types are not bent ('8' is no
    number).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Calibration(Section):
    """Text the model reads while it is compressed: `samples` windows of `length` tokens from `dataset`."""

    dataset: str = "mixed"
    samples: int = Field(256, ge=1)
    length: int = Field(512, ge=2)


class Quantize(Section):
    """Choose codes for the weights that `rules`, then `scheme`, name."""

    solver: Solver = GptqOptions()
    scheme: Annotated[str, AfterValidator(_scheme)] | None = None
    rules: Annotated[tuple[Rule, ...], BeforeValidator(_tuple)] = ()
    ignore: Ignored = ()

    def expanded(self, model: ModelSpec) -> tuple[Rule, ...]:
        """The explicit rules, then those of the scheme."""
        return self.rules + (expand(self.scheme, model) if self.scheme else ())

    def matcher(self, model: ModelSpec) -> RuleMatcher:
        """Decides for each tensor of `model`; `.match(tensor)` is None for what keeps its own float type."""
        return RuleMatcher(self.expanded(model), model.layers, self.ignore)

    def solver_of(self, rule: Rule) -> SolverOptions:
        """The solver that serves `rule`: its own, or the step's."""
        return rule.solver or self.solver


class Prune(Section):
    """Set weights to zero: those that `rules`, then `sparsity` (of all linears but the head), name."""

    solver: Pruner = SparseGptOptions()
    sparsity: Sparsity | None = None
    rules: Annotated[tuple[PruneRule, ...], BeforeValidator(_tuple)] = ()
    ignore: Ignored = ()
    allocation: Literal["uniform", "outliers"] = "uniform"
    spread: float = Field(0.08, ge=0, lt=0.5)
    """With `outliers`: how far a layer's sparsity may lie from the mean."""
    joint: bool = True
    """Whether codes that gptq chooses make up for the mask (sparsegpt: are found together with it), or are those of the
    pruned weight."""

    def matcher(self, model: ModelSpec) -> RuleMatcher:
        rest = (PruneRule(targets=LINEARS, sparsity=self.sparsity),) if self.sparsity else ()
        return RuleMatcher(self.rules + rest, model.layers, self.ignore)


class Factorize(Section):
    """Write weights as products of two: those that `rules`, then `ratio` (of all linears but the head), name."""

    solver: Factorizer = CompotOptions()
    ratio: float | None = Field(None, gt=0, lt=1)
    """The share of their bytes in 16 bits, masks counted, that goes."""
    rules: Annotated[tuple[FactorizeRule, ...], BeforeValidator(_tuple)] = ()
    ignore: Ignored = ()
    allocation: Literal["uniform", "pooled", "knapsack"] = "pooled"
    low: float = Field(0.3, gt=0, le=1)
    """The least share of a matrix's bytes that may stay when the budget is shared out."""
    high: float = Field(1.0, gt=0, le=1)
    """The largest share that a factorised matrix may keep; one that would need all of them stays dense."""

    def matcher(self, model: ModelSpec) -> RuleMatcher:
        rest = (FactorizeRule(targets=LINEARS, ratio=self.ratio),) if self.ratio else ()
        return RuleMatcher(self.rules + rest, model.layers, self.ignore)


class Step(Section):
    """One step of the chain: exactly one key, its kind. A new kind of step is one more field.

    In the order in which they may follow each other: rotations of the whole model, what makes it smaller as a whole,
    scalings of a block, what makes its matrices smaller, the codes, and what is tuned once those are known.
    """

    rotate: RotateOptions | None = None
    drop_layers: DropLayersOptions | None = None
    prune_experts: PruneExpertsOptions | None = None
    prune_structured: PruneStructuredOptions | None = None
    awq: AwqOptions | None = None
    smooth: SmoothOptions | None = None
    prune: Prune | None = None
    factorize: Factorize | None = None
    quantize: Quantize | None = None
    recover: RecoverOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_kind(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {value: {}}
        if isinstance(value, dict) and len(value) != 1:
            raise problem(f"expected exactly one key, the kind of step ({', '.join(STEP_KINDS)}), got {len(value)}")
        if isinstance(value, dict) and "quantize" in value and not value["quantize"]:
            raise problem("this step says nothing; give it at least a scheme or rules")
        for kind, key in (("prune", "sparsity"), ("factorize", "ratio")):
            options = value.get(kind) if isinstance(value, dict) and kind in value else {key: None}
            if isinstance(options, dict | None) and not {key, "rules"} & set(options or ()):
                raise problem(f"this step says nothing; give it at least a {key} or rules")
        if isinstance(value, dict):
            return {kind: {} if options is None else options for kind, options in value.items()}
        return value

    @property
    def kind(self) -> str:
        """The key that is set."""
        return next(name for name in STEP_KINDS if getattr(self, name) is not None)

    @property
    def options(self) -> Any:
        """Its value."""
        return getattr(self, self.kind)


STEP_KINDS: tuple[str, ...] = tuple(Step.model_fields)


class Export(Section):
    """One artifact: its container, file name (default: the recipe's name) and shard limit in bytes."""

    container: Annotated[str, AfterValidator(_container)]
    name: FileName | None = None
    max_shard_size: Annotated[Annotated[int, Field(ge=1_000_000)] | None, BeforeValidator(_size)] = None


class Score(Section):
    """What is measured when the artifacts are written."""

    suite: str = "quick"


class Gate(Section):
    """Limits an artifact must keep to be delivered; None asks nothing."""

    max_kld: float | None = Field(None, gt=0)
    max_perplexity_ratio: float | None = Field(None, gt=0)


def _score(value: Any) -> Any:
    if isinstance(value, bool):
        return Score() if value else None
    if not isinstance(value, dict | Score):
        raise problem(f"expected a mapping like {{suite: quick}}, or false, got {_short(value)}")
    return value


class Recipe(Section):
    """A whole recipe; what `compress plan` and `compress run` work from."""

    name: FileName
    model: str
    output: str
    seed: int = Field(0, ge=0, lt=2**63)
    calibration: Calibration = Calibration()
    steps: Annotated[tuple[Step, ...], BeforeValidator(_tuple)] = ()
    export: Annotated[tuple[Export, ...], BeforeValidator(_tuple), Field(min_length=1)]
    score: Annotated[Score | None, BeforeValidator(_score)] = Score()
    gate: Gate = Gate()

    def step(self, kind: str) -> Any:
        """The options of the step of this kind, None when the recipe has none."""
        return next((step.options for step in self.steps if step.kind == kind), None)

    def as_dict(self) -> dict[str, Any]:
        """Everything, defaults filled in and names in canonical form, ready for JSON or YAML."""
        plain = self.model_dump(mode="json", exclude_none=True)
        return {**plain, "score": plain.get("score", False)}

    def digest(self) -> str:
        """sha256 (hex) of all that decides the bytes of the output; not `output`, `score` and `gate`."""
        decisive = self.model_dump(mode="json", exclude={"output", "score", "gate"})
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def load_recipe(
    path_or_name: str | Path,
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    output: str | None = None,
) -> Recipe:
    """Read a recipe file, or a bundled recipe by name, with `key=value` overrides applied in order.

    Keys are dotted paths with list indices (`steps[0].quantize.solver.damping=0.05`), values are YAML. Raises
    RecipeError with all problems.
    """
    path = _find(path_or_name)
    document = read_document(path)
    if isinstance(document.data, dict):
        document.data.setdefault("name", path.stem)
        for key, value in (("model", model), ("output", output)):
            if value is not None:
                document.put((key,), value, f"--{key} {value}")
        for text in overrides:
            document.override(text)
        if isinstance(document.data["name"], str):
            document.data.setdefault("output", f"out/{document.data['name']}")
    problems = document.problems
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        problems += [_explain(document, item) for item in error.errors(include_url=False)]
    problems += [document.at(where, what) for where, what in _impossible(document.data)]
    if problems:
        raise RecipeError(sorted(dict.fromkeys(problems), key=document.line_of))
    return recipe


def bundled_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(_recipes_folder().glob("*.yaml"))}


def _recipes_folder() -> Path:
    try:
        from compress.text import data_root
    except ImportError:
        return Path(__file__).resolve().parent.parent / "recipes"
    return Path(data_root("recipes"))


def _find(path_or_name: str | Path) -> Path:
    path = Path(path_or_name)
    if path.is_file():
        return path
    known = bundled_recipes()
    if str(path_or_name) in known:
        return known[str(path_or_name)]
    what = "is a folder, not a recipe" if path.is_dir() else "no such file or bundled recipe"
    raise RecipeError(f"{path_or_name}: {what}{nearest(path.stem, known) if known else ''}")


# --- problems in words ------------------------------------------------------------------------

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "tuple_type": "a list",
    "is_instance_of": "a solver's name or options",
}


def _explain(document: Document, error: Any) -> str:
    """One of pydantic's errors in the words of a recipe."""
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    path = _written(document.data, error["loc"])
    if kind == "extra_forbidden":
        return document.at(
            path, f"unknown key {path[-1]!r}{nearest(str(path[-1]), _keys_at(document.data, path[:-1]))}"
        )
    if kind == "missing":
        return document.at(path, _MISSING_KEYS.get(dotted(path), "missing"))
    if kind in _EXPECTED:
        return document.at(path, f"expected {_EXPECTED[kind]}, got {_short(given)}")
    if kind == "recipe":
        return document.at(path, error["msg"])
    if kind == "too_short":
        return document.at(path, "expected at least one item")
    for name, words in (("gt", "more than"), ("ge", "at least"), ("lt", "less than"), ("le", "at most")):
        if name in context:
            return document.at(path, f"must be {words} {context[name]:g}, got {_short(given)}")
    return document.at(path, f"{error['msg'][0].lower()}{error['msg'][1:]}, got {_short(given)}")


_MISSING_KEYS = {
    "model": "missing; name a folder, a hub id or a bundled model here, or pass --model",
    "export": "missing; say which container to write, e.g. export: [{container: gguf}]",
}


def _short(value: Any) -> str:
    if isinstance(value, dict | list | tuple):
        return "a mapping" if isinstance(value, dict) else "a list"
    return "nothing" if value is None else repr(value)


def _written(data: Any, loc: Place) -> Place:
    """`loc` without what pydantic adds: the index into a list written as one word, tags of unions."""
    path: list[str | int] = []
    here = data
    for position, part in enumerate(loc):
        if isinstance(here, dict) and isinstance(part, str) and (part in here or position == len(loc) - 1):
            here = here.get(part)
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
        else:
            continue
        path.append(part)
    return tuple(path)


def _keys_at(data: Any, path: Place) -> tuple[str, ...]:
    """The keys a mapping at `path` may have."""
    model: type[BaseModel] = Recipe
    for part in path:
        data = data[part]
        if part == "solver":
            model = {**SOLVERS, **PRUNERS, **FACTORIZERS}[data["name"].lower()]
        elif isinstance(part, str):
            model = next(_models_in(model.model_fields[part].annotation), model)
    return tuple(model.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _impossible(data: Any) -> Iterator[tuple[Place, str]]:
    """Combinations no model could make possible, from raw values, so that they join all other problems."""
    exports = _get(data, "export") if isinstance(_get(data, "export"), list) else []
    containers = [
        (i, name) for i, item in enumerate(exports) if (name := _lower(_get(item, "container"))) in CONTAINERS
    ]
    seen: dict[tuple[Any, Any], int] = {}
    for i, container in containers:
        first = seen.setdefault((container, _get(exports[i], "name") or _get(data, "name")), i)
        if first != i:
            yield ("export", i), f"the same file as export[{first}]; give one of them another name"
    for s, step in enumerate(_get(data, "steps") if isinstance(_get(data, "steps"), list) else []):
        at: Place = ("steps", s, "quantize")
        quantize = _get(step, "quantize")
        if isinstance(scheme := _get(quantize, "scheme"), str):
            try:
                kind = scheme_kind(scheme)
            except ValueError:
                kind = None
            for i, container in containers:
                if kind is not None and kind not in CONTAINERS[container].kinds:
                    yield (*at, "scheme"), _refusal(scheme, container, i)
                elif kind is not None and scheme_name(scheme) == "W8A8" and (why := activation_problem(container)):
                    yield (*at, "scheme"), why
        rules = _get(quantize, "rules")
        for r, rule in enumerate(rules if isinstance(rules, list) else []):
            yield from _impossible_rule(rule, (*at, "rules", r), containers)


def _impossible_rule(rule: Any, at: Place, containers: list[tuple[int, str]]) -> Iterator[tuple[Place, str]]:
    codec, targets = _get(rule, "codec"), _get(rule, "targets")
    targets = [targets] if isinstance(targets, str) else targets if isinstance(targets, list) else []
    try:
        info = codec_info(codec) if isinstance(codec, str) else None
    except KeyError:
        info = None
    if info is None or info.fallback_only or info.kind == "float":  # unknown ones are reported by the schema
        return
    for target in targets:
        if any(covers(str(target), role) for role in FLOAT_ROLES):
            yield (
                (*at, "codec"),
                f"{target} is never quantized; use f32, f16 or bf16, or list it under ignore",
            )
    for i, container in containers:
        if info.kind not in CONTAINERS[container].kinds:
            yield (*at, "codec"), _refusal(info.name, container, i)
        elif any(covers(str(target), role) for target in targets for role in CONTAINERS[container].float_roles):
            roles = ", ".join(CONTAINERS[container].float_roles)
            yield (
                (*at, "codec"),
                f"container {container} (export[{i}]) holds {roles} only as f32, f16 or bf16",
            )
        if _get(rule, "activations") and (why := activation_problem(container)):
            yield (*at, "activations"), why
        if _get(rule, "incoherence") is True and (why := incoherence_problem(container)):
            yield (*at, "incoherence"), why


def _refusal(what: str, container: str, index: int) -> str:
    holds = " and ".join(KIND_NAMES[kind] for kind in KIND_NAMES if kind in CONTAINERS[container].kinds)
    others = [name for name, info in CONTAINERS.items() if _kind(what) in info.kinds]
    refused = f"container {container} (export[{index}]) cannot hold {what}"
    return f"{refused}; it holds {holds}; use {' or '.join(others)}"


def _kind(what: str) -> str:
    try:
        return codec_info(what).kind
    except KeyError:
        return scheme_kind(what)


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value
