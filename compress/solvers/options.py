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


class RtnOptions(SolverOptions):
    """Round to nearest, weighted by the activations' second moment where the codec can use it."""

    name: Literal["rtn"] = "rtn"


class GptqOptions(SolverOptions):
    """Error feedback (GPTQ): each rounded column's error is spread over the columns still to come."""

    name: Literal["gptq"] = "gptq"
    damping: float = Field(0.01, gt=0, description="added to the gram's diagonal, as a fraction of its mean")
    act_order: bool = Field(
        True, description="solve columns by falling activation energy where the codec allows"
    )
    sweeps: int = Field(2, ge=0, description="passes of coordinate descent over the codes after the solve")
    refits: int = Field(3, ge=0, description="times the scales are solved again once the codes are known")
    shrinkage: float | None = Field(
        None,
        ge=0,
        le=1,
        description="weight of the gram's diagonal against the full gram; null: from token count",
    )
    routing_weighted: bool = Field(True, description="weight an expert's tokens by their routing probability")


SOLVERS: dict[str, type[SolverOptions]] = {"rtn": RtnOptions, "gptq": GptqOptions}
