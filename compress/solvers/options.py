"""The options of every method, without importing torch: what a recipe may say, and what the method asks of a run.

Adding one here is a class in this file and a file `compress/solvers/<name>.py`; from outside, one file that calls `register`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Tunable = Literal["norms", "router", "biases", "scales", "codes"]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Asks:
    """What a method asks of the run that calls it.

    gram: it cannot do without second moments of the inputs. feedback: errors of one weight are made up for by others, so that
    its codes can make up for a mask, too. drift, residual: how far its target makes up for drifted inputs and for what
    the residual stream lags; drift_damping: ridge of that correction. shrinkage: tokens a column that an expert's pool
    weighs; damping: what it adds to the gram's diagonal, as a fraction of its mean.
    """

    gram: bool = True
    feedback: bool = False
    drift: float = 0.0
    residual: float = 0.0
    drift_damping: float = 0.1
    shrinkage: float = 0.0
    damping: float = 0.0


NOTHING = Asks(gram=False)


def solve_bytes(rows: int, columns: int) -> int:
    """About what a matrix takes while error feedback and descent solve it: grams in double precision, rows in single."""
    return columns * (60 * columns + 44 * rows)


class MethodOptions(BaseModel):
    """Base of all option classes; `name` is the method's name in YAML, `module` where its functions are."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    module: ClassVar[str] = ""
    needs_gram: ClassVar[bool] = True
    feedback: ClassVar[bool] = False
    name: str
    shrinkage: float = Field(
        1.0,
        ge=0,
        description="an expert's statistics are shrunk towards its block's pool as if the pool had seen "
        "this many tokens per input column",
    )

    @cached_property
    def asks(self) -> Asks:
        """What it asks of the run: its own options where it has them."""
        fields = Asks.__dataclass_fields__.keys() & type(self).model_fields.keys()
        return Asks(self.needs_gram, self.feedback, **{name: getattr(self, name) for name in sorted(fields)})

    @property
    def implementation(self) -> ModuleType:
        """The module with its functions."""
        return import_module(self.module or f"compress.solvers.{self.name}")


class SolverOptions(MethodOptions):
    """Base of the options of what chooses codes. stacks: its module has `solve_alike`, for several matrices at once."""

    stacks: ClassVar[bool] = False


class ShrinkingOptions(MethodOptions):
    """Base of the options of what leaves weights out: its target may make up for what came before."""

    drift: float = Field(0.0, ge=0, le=1, description="how far to make up for what earlier steps did to the inputs")
    residual: float = Field(0.0, ge=0, le=1, description="how far to repair the residual stream, too")
    drift_damping: float = Field(0.1, gt=0, description="ridge of that correction, as a fraction of the mean diagonal")


class RtnOptions(SolverOptions):
    """Round to nearest; the activations' second moment weighs the columns in the search for scales."""

    needs_gram: ClassVar[bool] = False
    name: Literal["rtn"] = "rtn"
    clip: bool = Field(
        False, description="cut off each group's largest weights where that rounds better (AWQ's clip search)"
    )


class GptqOptions(SolverOptions):
    """Error feedback (GPTQ), coordinate descent on codes and scales, and compensation of drifted inputs."""

    feedback: ClassVar[bool] = True
    stacks: ClassVar[bool] = True
    name: Literal["gptq"] = "gptq"
    damping: float = Field(0.05, gt=0, description="added to the gram's diagonal, as a fraction of its mean")
    act_order: bool = Field(
        True, description="round columns (steps of eight for lattices) by falling activation energy"
    )
    sweeps: int = Field(2, ge=0, description="passes of coordinate descent over codes and scales after the feedback")
    refits: int = Field(2, ge=0, description="passes over the scales alone before the sweeps")
    drift: float = Field(1.0, ge=0, le=1, description="how far to compensate what earlier rounding did to the inputs")
    residual: float = Field(
        1.0,
        ge=0,
        le=1,
        description="how far o_proj, dense down_proj and experts whose routing weights sum to one also repair the residual stream",
    )
    drift_damping: float = Field(0.1, gt=0, description="ridge of that correction, as a fraction of the mean diagonal")


class RecoverOptions(BaseModel):
    """Tune what a block keeps in float, once its codes are known, so that it does again what the original did."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    tune: Annotated[tuple[Tunable, ...], BeforeValidator(_tuple), Field(min_length=1)] = (
        "norms",
        "router",
        "biases",
        "scales",
        "codes",
    )
    """`scales`: the stored real numbers of every quantized tensor, its codes fixed; `codes`: tensors of six bits a weight
    or more are tuned as float and rounded again to their own scales, instead."""
    loss: Literal["sensitivity", "mse"] = Field(
        "sensitivity",
        description="squared error of the block's output as the original's next-token loss feels it, or plain",
    )
    epochs: int = Field(2, ge=1, description="passes over the calibration windows that are not held out")
    lr_floats: float = Field(0.002, gt=0, description="Adam's step for norms, router and biases, over their size")
    lr_scales: float = Field(0.005, gt=0, description="the same for scales")
    lr_codes: float = Field(0.003, gt=0, description="the same for weights that are rounded again")
    held_out: float = Field(0.125, gt=0, lt=1, description="share of the windows that decides what is kept")
    patience: int = Field(1, ge=1, description="epochs without improvement on them before a block is done")
    end_to_end: int = Field(
        1,
        ge=0,
        description="epochs in which all blocks are tuned together for the original's logits, once all are done",
    )
    survey: int = Field(32, ge=1, description="windows on which the original's sensitivity is measured")


class PrunerOptions(ShrinkingOptions):
    """Base of the options of what chooses the weights that stay.

    joint: it can choose codes together with the mask, for a solver with feedback (`prune_and_quantize`).
    """

    joint: ClassVar[bool] = False


class MagnitudeOptions(PrunerOptions):
    """The smallest weights of every row go; a control, which looks at no activations."""

    needs_gram: ClassVar[bool] = False
    name: Literal["magnitude"] = "magnitude"


class WandaOptions(PrunerOptions):
    """The smallest products of a weight and the norm of its input go, row by row; the others stay as they are."""

    name: Literal["wanda"] = "wanda"


class SparseGptOptions(PrunerOptions):
    """Weights go where the others can best make up for them, and do (SparseGPT), then descent on what stays."""

    joint: ClassVar[bool] = True
    name: Literal["sparsegpt"] = "sparsegpt"
    damping: float = Field(0.01, gt=0, description="added to the gram's diagonal, as a fraction of its mean")
    block: int = Field(128, ge=1, description="columns whose mask is chosen at once, over all rows together")
    sweeps: int = Field(4, ge=0, description="passes of coordinate descent over what stays, after the feedback")
    exchange: bool = Field(True, description="let a kept and a pruned weight change places in these where that gains")
    drift: float = Field(1.0, ge=0, le=1, description="how far to make up for what earlier pruning did to the inputs")
    residual: float = Field(1.0, ge=0, le=1, description="how far to repair the residual stream, too")


class FactorizerOptions(ShrinkingOptions):
    """Base of the options of what writes a matrix as a product of two.

    sparse: its coefficients are, so that a mask is stored beside them.
    """

    sparse: ClassVar[bool] = False

    @property
    def atoms_a_coefficient(self) -> float:
        """Atoms in the dictionary for every coefficient of an output."""
        return 1.0

    damping: float = Field(0.01, gt=0, description="added to the gram's diagonal, as a fraction of its mean")


class DictionaryOptions(FactorizerOptions):
    """Base of those whose coefficients are sparse, so that a mask is stored beside them."""

    sparse: ClassVar[bool] = True

    drift: float = Field(1.0, ge=0, le=1, description="how far to make up for what earlier steps did to the inputs")
    residual: float = Field(1.0, ge=0, le=1, description="how far to repair the residual stream, too")
    k_over_s: float = Field(2.0, ge=1, description="atoms in the dictionary for every coefficient of an output")
    ridge: float = Field(1e-4, gt=0, description="of the dictionary's least squares, over the mean diagonal")

    @property
    def atoms_a_coefficient(self) -> float:
        return self.k_over_s


class SvdOptions(FactorizerOptions):
    """Truncated singular value decomposition behind a whitening of the inputs (SVD-LLM); a control."""

    name: Literal["svd"] = "svd"


class CompotOptions(DictionaryOptions):
    """An orthogonal dictionary and sparse coefficients, in turns (COMPOT)."""

    name: Literal["compot"] = "compot"
    iterations: int = Field(20, ge=0, description="turns of thresholding and Procrustes")
    rounds: int = Field(5, ge=0, description="rounds of least squares on either side after the last thresholding")


class RocketOptions(DictionaryOptions):
    """Eigenvectors as the dictionary, coefficients by importance, then both solved again (ROCKET)."""

    name: Literal["rocket"] = "rocket"
    exponent: float = Field(0.5, ge=0, description="weight of an atom's size in the original space (lambda)")
    reactivated: float = Field(0.005, ge=0, lt=1, description="share of coefficients chosen over the whole matrix")
    rounds: int = Field(5, ge=1, description="rounds of least squares on either side; the first solves the dictionary")


SOLVERS: dict[str, type[SolverOptions]] = {"rtn": RtnOptions, "gptq": GptqOptions}
PRUNERS: dict[str, type[PrunerOptions]] = {
    "sparsegpt": SparseGptOptions,
    "wanda": WandaOptions,
    "magnitude": MagnitudeOptions,
}
FACTORIZERS: dict[str, type[FactorizerOptions]] = {"compot": CompotOptions, "rocket": RocketOptions, "svd": SvdOptions}


def register(options: type[MethodOptions]) -> None:
    """Make a method from outside known by its name: a subclass of SolverOptions, PrunerOptions or FactorizerOptions whose
    `module` has the functions of its kind. Raises ValueError when the name is taken or it is none of the three."""
    kinds: tuple[tuple[type, dict[str, Any]], ...] = (
        (SolverOptions, SOLVERS),
        (PrunerOptions, PRUNERS),
        (FactorizerOptions, FACTORIZERS),
    )
    name = options.model_fields["name"].default
    known = next((known for kind, known in kinds if issubclass(options, kind)), None)
    if known is None:
        raise ValueError(f"{name}: derive its options from SolverOptions, PrunerOptions or FactorizerOptions")
    if known.get(name, options) is not options:
        raise ValueError(f"there is a method called {name} already; give yours another name")
    known[name] = options
