"""The options of the steps that change a model's shape, without importing torch; a recipe's steps are validated with
these classes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

DEFAULT_RATIO = 0.25


class StructureOptions(BaseModel):
    """Base of the steps that leave a smaller model of the same architecture."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    repair: bool = Field(
        True,
        description="let o_proj and down_proj make up for what went, by least squares, as far as the other inputs can",
    )
    damping: float = Field(0.1, gt=0, description="ridge of that least squares, as a fraction of the mean diagonal")


class DropLayersOptions(StructureOptions):
    """Leave out the blocks that turn the residual stream least (ShortGPT)."""

    count: int | None = Field(None, ge=1, description="blocks that go; or give ratio")
    ratio: float | None = Field(
        DEFAULT_RATIO, gt=0, lt=1, description="share of the blocks that go, rounded; or give count"
    )

    @model_validator(mode="before")
    @classmethod
    def _count_stands_alone(cls, data: Any) -> Any:
        return _without_default_ratio(data, "count")

    @model_validator(mode="after")
    def _one_of_both(self) -> DropLayersOptions:
        if (self.count is None) == (self.ratio is None):
            raise ValueError("give either count or ratio")
        return self


class PruneExpertsOptions(StructureOptions):
    """Leave out routed experts, the same number in every block."""

    ratio: float = Field(DEFAULT_RATIO, gt=0, lt=1, description="share of every block's experts that go, rounded")
    method: Literal["reap", "frequency", "merge"] = Field(
        "reap",
        description="reap: those that add least to the tokens they see go; frequency: those that see the fewest tokens; "
        "merge: the same, averaged into the kept one whose router logits are most alike",
    )


class PruneStructuredOptions(StructureOptions):
    """Leave out attention heads, in whole groups of one key-value head, and feed-forward channels (FLAP).

    Every block keeps the same numbers, because a stock checkpoint has one of each.
    """

    ratio: float | None = Field(
        DEFAULT_RATIO,
        gt=0,
        lt=1,
        description="share of the blocks' matrices that goes; scores over the whole model split it between heads and "
        "channels; or give heads and channels",
    )
    heads: float | None = Field(
        None, ge=0, lt=1, description="share of every block's key-value groups that go, rounded"
    )
    channels: float | None = Field(None, ge=0, lt=1, description="share of every feed-forward's channels that go")
    multiple_of: int | None = Field(
        None,
        ge=1,
        description="keep a multiple of so many channels; by default the largest power of two that divides "
        "the width, up to 256 and a 64th of it, 8 at least",
    )

    @model_validator(mode="before")
    @classmethod
    def _shares_stand_alone(cls, data: Any) -> Any:
        return _without_default_ratio(data, "heads", "channels")

    @model_validator(mode="after")
    def _ratio_or_shares(self) -> PruneStructuredOptions:
        if (self.ratio is None) == (self.heads is None and self.channels is None):
            raise ValueError("give either ratio or heads and channels")
        return self


def _without_default_ratio(data: Any, *others: str) -> Any:
    """The ratio's default is for those who name nothing else."""
    if isinstance(data, dict) and any(data.get(key) is not None for key in others):
        return {"ratio": None, **data}
    return data
