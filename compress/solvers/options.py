"""The options of every solver, without importing torch; the recipe validates `solver:` with these classes.

Adding a solver is one class here and one file `compress/solvers/<name>.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Tunable = Literal["norms", "router", "biases", "scales", "codes"]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class MethodOptions(BaseModel):
    """Base of all option classes; `name` is the method's name in YAML."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    name: str
    shrinkage: float = Field(
        1.0,
        ge=0,
        description="an expert's statistics are shrunk towards its block's pool as if the pool had seen "
        "this many tokens per input column",
    )


class SolverOptions(MethodOptions):
    """Base of the options of what chooses codes."""


class ShrinkingOptions(MethodOptions):
    """Base of the options of what leaves weights out: its target may make up for what came before."""

    drift: float = Field(0.0, ge=0, le=1, description="how far to make up for what earlier steps did to the inputs")
    residual: float = Field(0.0, ge=0, le=1, description="how far to repair the residual stream, too")
    drift_damping: float = Field(0.1, gt=0, description="ridge of that correction, as a fraction of the mean diagonal")


class RtnOptions(SolverOptions):
    """Round to nearest; the activations' second moment weighs the columns in the search for scales."""

    name: Literal["rtn"] = "rtn"
    clip: bool = Field(
        False, description="cut off each group's largest weights where that rounds better (AWQ's clip search)"
    )


class GptqOptions(SolverOptions):
    """Error feedback (GPTQ), coordinate descent on codes and scales, and compensation of drifted inputs."""

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
    """Base of the options of what chooses the weights that stay."""


class MagnitudeOptions(PrunerOptions):
    """The smallest weights of every row go; a control, which looks at no activations."""

    name: Literal["magnitude"] = "magnitude"


class WandaOptions(PrunerOptions):
    """The smallest products of a weight and the norm of its input go, row by row; the others stay as they are."""

    name: Literal["wanda"] = "wanda"


class SparseGptOptions(PrunerOptions):
    """Weights go where the others can best make up for them, and do (SparseGPT), then descent on what stays."""

    name: Literal["sparsegpt"] = "sparsegpt"
    damping: float = Field(0.01, gt=0, description="added to the gram's diagonal, as a fraction of its mean")
    block: int = Field(128, ge=1, description="columns whose mask is chosen at once, over all rows together")
    sweeps: int = Field(4, ge=0, description="passes of coordinate descent over what stays, after the feedback")
    exchange: bool = Field(True, description="let a kept and a pruned weight change places in these where that gains")
    drift: float = Field(1.0, ge=0, le=1, description="how far to make up for what earlier pruning did to the inputs")
    residual: float = Field(1.0, ge=0, le=1, description="how far to repair the residual stream, too")


class FactorizerOptions(ShrinkingOptions):
    """Base of the options of what writes a matrix as a product of two."""

    damping: float = Field(0.01, gt=0, description="added to the gram's diagonal, as a fraction of its mean")


class DictionaryOptions(FactorizerOptions):
    """Base of those whose coefficients are sparse, so that a mask is stored beside them."""

    drift: float = Field(1.0, ge=0, le=1, description="how far to make up for what earlier steps did to the inputs")
    residual: float = Field(1.0, ge=0, le=1, description="how far to repair the residual stream, too")
    k_over_s: float = Field(2.0, ge=1, description="atoms in the dictionary for every coefficient of an output")
    ridge: float = Field(1e-4, gt=0, description="of the dictionary's least squares, over the mean diagonal")


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
