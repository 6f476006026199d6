"""A recipe: one YAML file that says what to do to which model. Parsed strictly, without torch.

`load_recipe` reports every problem of a file at once, each as `file:line: where: what; nearest: ...`. The
models below are the schema; docs/recipes.md explains it to users.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)

from compress.containers import CONTAINERS, Container
from compress.limits import MOST_EXPORTS, MOST_PARTS, MOST_RULES, MOST_STEPS, NAME_LENGTH
from compress.reading import in_words, path_problem
from compress.recipe.rules import (
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
    nearest,
    problem,
)
from compress.recipe.schemes import expand, scheme_name
from compress.solvers.options import (
    CompotOptions,
    GptqOptions,
    RecoverOptions,
    SolverOptions,
    SparseGptOptions,
)
from compress.structured.options import DropLayersOptions, PruneExpertsOptions, PruneStructuredOptions
from compress.text.sources import BASE_TEXT, TextSource, told
from compress.transforms.options import SCALINGS, AwqOptions, RotateOptions, SmoothOptions, TransformOptions

if TYPE_CHECKING:
    from compress.models.spec import ModelSpec

_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*(B|KB|MB|GB|TB|KIB|MIB|GIB|TIB)", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _dash(value: Any) -> Any:
    """'-' stands for standard input; without quotes it is YAML's for a list of nothing."""
    return "-" if value == [None] else value


def _size(value: Any) -> Any:
    """'5GB' or '512MiB' to bytes."""
    if not isinstance(value, str):
        return value
    if (count := byte_count(value)) is None:
        raise problem(f"expected a size like 5GB, 500MB or 2GiB, got {in_words(value)}")
    return count


def byte_count(text: str) -> int | None:
    """'5GB' or '512MiB' to bytes; None for what is no size."""
    if (match := _SIZE.fullmatch(text.strip())) is None:
        return None
    unit = match[2].upper()
    return int(float(match[1]) * (1024 if "I" in unit else 1000) ** "BKMGT".index(unit[0]))


def _file_name(value: str) -> str:
    if len(value) > NAME_LENGTH:
        raise problem(f"a name of {len(value):,} characters; files here have at most {NAME_LENGTH}")
    if not _NAME.fullmatch(value):
        raise problem(f"expected a plain file name (letters, digits and . _ + -), got {in_words(value)}")
    return value


def _place(value: str) -> str:
    if why := path_problem(value):
        raise problem(why)
    return value


def _scheme(value: str) -> str:
    try:
        return scheme_name(value)
    except ValueError as error:
        raise problem(str(error)) from None


def _container(value: str) -> str:
    if value.lower() not in CONTAINERS:
        raise problem(f"unknown container {in_words(value)}{nearest(value, CONTAINERS)}")
    return value.lower()


FileName = Annotated[str, AfterValidator(_file_name)]
Location = Annotated[str, AfterValidator(_place)]
"""A path, or a name that may be one."""


class Section(BaseModel):
    """A mapping of the recipe: unknown keys are errors, values are frozen, types are not bent ('8' is no
    number).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Calibration(Section):
    """Text the model reads while it is compressed: `samples` windows of `length` tokens from `dataset` or `mix`.

    dataset: a set's name, a file, a folder, "-" for standard input or a set of the hub (owner/name, owner/name:config); mix:
    several of these by weight; neither: what goes with the model's tokenizer.
    """

    dataset: Annotated[Location | None, BeforeValidator(_dash)] = None
    mix: (
        Annotated[dict[Location, Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(max_length=MOST_PARTS)]
        | None
    ) = None
    column: Location | None = None
    """What of a row holds the text, where its keys do not tell."""
    split: Location | None = None
    """Of a set of the hub; train by default."""
    template: bool | None = None
    """Whether talks are written in the model's chat template; by default where it has one."""
    samples: int = Field(256, ge=1)
    length: int = Field(512, ge=2)

    @model_validator(mode="after")
    def _one_source(self) -> Calibration:
        if self.dataset is not None and self.mix is not None:
            raise problem(
                "dataset and mix exclude each other; drop one (--set calibration.dataset=null drops the recipe's)"
            )
        if self.mix is not None and not self.mix:
            raise problem("mix names no text; give weights, e.g. mix: {chat: 1, wikipedia: 2}")
        return self

    @property
    def source(self) -> TextSource:
        """Which text that is."""
        return TextSource(self.dataset, self.mix or {}, self.column, self.split, self.template)

    @property
    def told(self) -> Calibration:
        """The same as files that ship know it: of the user's own text the name alone."""
        if self.mix is not None:
            names = [told(name) for name in self.mix]
            twice = {name for name in names if names.count(name) > 1}
            unique = [f"{name} ({n})" if name in twice else name for n, name in enumerate(names, start=1)]
            return self.model_copy(update={"mix": dict(zip(unique, self.mix.values(), strict=True))})
        return self if self.dataset is None else self.model_copy(update={"dataset": told(self.dataset)})

    def portable(self) -> dict[str, Any]:
        """What `told` says, ready for JSON."""
        return self.told.model_dump(mode="json", exclude_none=True)


_LATER = ("inputs", "strict")
"""Keys of a quantize step that first recipes did not have."""


class Quantize(Section):
    """Choose codes for the weights that `rules`, then `scheme`, name."""

    solver: Solver = GptqOptions()
    scheme: Annotated[str, AfterValidator(_scheme)] | None = None
    rules: Annotated[tuple[Rule, ...], BeforeValidator(_tuple), Field(max_length=MOST_RULES)] = ()
    ignore: Ignored = ()
    inputs: Literal["compressed", "original"] = "compressed"
    """Whose inputs solvers see: what the compressed layers before a weight give it, so that it makes up for them; or the
    original's, which are the same for every type that a model is compressed to."""
    strict: bool = False
    """Whether rows that a codec's blocks or groups do not divide are an error; else the largest smaller group that divides
    them, or what llama.cpp stores instead, stands in, and the plan and the report say so."""

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
    rules: Annotated[tuple[PruneRule, ...], BeforeValidator(_tuple), Field(max_length=MOST_RULES)] = ()
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
    rules: Annotated[tuple[FactorizeRule, ...], BeforeValidator(_tuple), Field(max_length=MOST_RULES)] = ()
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
    scaling: SerializeAsAny[TransformOptions] | None = None
    """A registered one, under its own name in YAML."""
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
            given = {kind: {} if options is None else options for kind, options in value.items()}
            return dict(_registered(kind, options) for kind, options in given.items())
        return value

    @property
    def kind(self) -> str:
        """The key that is set."""
        return next(name for name in STEP_ORDER if getattr(self, name) is not None)

    @property
    def options(self) -> Any:
        """Its value."""
        return getattr(self, self.kind)


STEP_ORDER: tuple[str, ...] = tuple(Step.model_fields)
STEP_KINDS: tuple[str, ...] = tuple(kind for kind in STEP_ORDER if kind != "scaling")
"""What a recipe calls them; registered scalings come on top."""


def _registered(kind: str, options: Any) -> tuple[str, Any]:
    """A step from outside as the value that it is, all others as they are; under its own name, or as `as_dict` says it."""
    name = str(options.get("name")) if kind == "scaling" and isinstance(options, dict) else kind
    if name in STEP_KINDS or name not in SCALINGS:
        return kind, options
    try:
        return "scaling", SCALINGS[name].model_validate(options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise problem(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


class Export(Section):
    """One artifact: its container, file name (default: the recipe's name) and shard limit in bytes."""

    container: Annotated[str, AfterValidator(_container)]
    name: FileName | None = None
    max_shard_size: Annotated[Annotated[int, Field(ge=1_000_000)] | None, BeforeValidator(_size)] = None


class Score(Section):
    """What is measured when the artifacts are written: a suite and, if asked for, how fast engines run them.

    base: the model that artifacts are compared with, where that is not the one that is compressed: what it was quantized from.
    """

    suite: Location = "quick"
    base: Location | None = None
    speed: bool = False


class Gate(Section):
    """Limits an artifact must keep to be delivered; None asks nothing."""

    max_kld: float | None = Field(None, gt=0)
    max_perplexity_ratio: float | None = Field(None, gt=0)


def _score(value: Any) -> Any:
    if isinstance(value, bool):
        return Score() if value else None
    if not isinstance(value, dict | Score):
        raise problem(f"expected a mapping like {{suite: quick}}, or false, got {in_words(value)}")
    return value


class Recipe(Section):
    """A whole recipe; what `compress plan` and `compress run` work from."""

    name: FileName
    model: Location
    output: Location
    adapter: Location | None = None
    """A LoRA adapter's folder, merged into the model before anything else."""
    seed: int = Field(0, ge=0, lt=2**63)
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Of the products that calibration text passes through: bf16 rounds their factors and sums in float32; auto does so where the
    checkpoint is of that type and the machine has units for it."""
    calibration: Calibration = Calibration()
    steps: Annotated[tuple[Step, ...], BeforeValidator(_tuple), Field(max_length=MOST_STEPS)] = ()
    export: Annotated[tuple[Export, ...], BeforeValidator(_tuple), Field(min_length=1, max_length=MOST_EXPORTS)]
    score: Annotated[Score | None, BeforeValidator(_score)] = Score()
    gate: Gate = Gate()

    def step(self, kind: str) -> Any:
        """The options of the step of this kind, None when the recipe has none."""
        return next((step.options for step in self.steps if step.kind == kind), None)

    @property
    def containers(self) -> tuple[Container, ...]:
        """Those of the exports, each once, in their order."""
        return tuple(CONTAINERS[name] for name in dict.fromkeys(export.container for export in self.export))

    def as_dict(self) -> dict[str, Any]:
        """Everything, defaults filled in and names in canonical form, ready for JSON or YAML."""
        plain = self.model_dump(mode="json", exclude_none=True)
        return {**plain, "score": plain.get("score", False)}

    def told(self, model: str) -> Recipe:
        """The same as files that ship know it: the model under this name, text files without where they lie. Its digest is
        the same on every machine."""
        adapter = None if self.adapter is None else told(self.adapter)
        return self.model_copy(update={"model": model, "adapter": adapter, "calibration": self.calibration.told})

    def portable(self) -> dict[str, Any]:
        """The same for files that ship: no output folder, and of text files their names alone."""
        plain = self.as_dict()
        plain["calibration"] = self.calibration.portable()
        if self.adapter is not None:
            plain["adapter"] = told(self.adapter)
        if self.score is not None:
            plain["score"]["suite"] = Path(self.score.suite).name
            if self.score.base is not None:
                plain["score"]["base"] = told(self.score.base)
        return {key: value for key, value in plain.items() if key != "output"}

    def digest(self) -> str:
        """sha256 (hex) of all that decides the bytes of the output; not `output`, `score` and `gate`."""
        decisive = self.model_dump(mode="json", exclude={"output", "score", "gate"})
        if self.adapter is None:
            del decisive["adapter"]
        if self.precision == "auto":
            del decisive["precision"]
        for step in decisive["steps"]:  # recipes without one keep the digest they had before there were any
            if step["scaling"] is None:
                del step["scaling"]
            quantize = step.get("quantize") or {}
            for key in _LATER:
                if quantize.get(key) == Quantize.model_fields[key].default:
                    del quantize[key]
        text = {key: value for key, value in decisive["calibration"].items() if value is not None}
        decisive["calibration"] = text if "mix" in text else {"dataset": BASE_TEXT, **text}  # as above
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
