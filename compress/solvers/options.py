"""The options of every solver, without importing torch; the recipe validates `solver:` with these classes.

Adding a solver is one class here and one file `compress/solvers/<name>.py`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class SolverOptions(BaseModel):
    """Base of all option classes; `name` is the solver's name in YAML."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    name: str
    shrinkage: float = Field(
        1.0,
        ge=0,
        description="an expert's statistics are shrunk towards its block's pool as if the pool had seen "
        "this many tokens per input column",
    )


class RtnOptions(SolverOptions):
    """Round to nearest; the activations' second moment weighs the columns in the search for scales."""

    name: Literal["rtn"] = "rtn"


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
    """Tune what stays in float once a block's codes are known."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    epochs: int = Field(2, ge=1)


SOLVERS: dict[str, type[SolverOptions]] = {"rtn": RtnOptions, "gptq": GptqOptions}
