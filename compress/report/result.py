"""What the library gives back: values that a console, a notebook, pandas and matplotlib can show."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType

from compress.errors import CompressError
from compress.plan.plan import Plan
from compress.report.advice import Advice, advise
from compress.report.compare import Comparison, Row, Run, compare
from compress.report.compare_table import CompareTable
from compress.report.frames import errors_frame, experts_frame, tensors_frame, variants_frame
from compress.report.heat import error_figure, expert_figure
from compress.report.html import comparison_html, plan_html, scorecard_html
from compress.report.layout import Prose
from compress.report.numbers import human_bytes, interval
from compress.report.plan_table import plan_table
from compress.report.plots import size_figure
from compress.report.scorecard import Scorecard
from compress.report.table import scorecard_table
from compress.scoring.divergence import Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT_WIDTH = 100  # columns of a result as text


class Shown:
    """`print` and rich show a table, notebooks one in HTML."""

    def __rich__(self) -> RenderableType:
        raise NotImplementedError

    def _html(self) -> str:
        raise NotImplementedError

    def __str__(self) -> str:
        # in a notebook rich would put the table on the page as well
        console = Console(width=TEXT_WIDTH, file=io.StringIO(), record=True, force_jupyter=False)
        console.print(self)
        return console.export_text().rstrip("\n")

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": self._html()}


@dataclass(frozen=True, repr=False)
class Result(Shown):
    """What one run made, or one model scored: its scorecard, and the folder that its paths are relative to."""

    scorecard: Scorecard
    folder: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """Of all artifacts: files, or folders."""
        return tuple((self.folder or Path()) / artifact.path for artifact in self.scorecard.artifacts)

    @property
    def path(self) -> Path:
        """Of the first artifact."""
        return self.paths[0]

    @property
    def scores(self) -> Scores | None:
        """Of the first artifact on the suite's first text; None where nothing was scored."""
        return self.scorecard.artifacts[0].scores

    def to_pandas(self, what: str = "variants") -> Any:
        """A DataFrame. what: variants (a row for the original and each artifact), errors (a layer and role), experts (an expert
        of a layer), tensors (a tensor; of runs only).

        Raises MissingExtra without pandas, CompressError for other names.
        """
        if what == "variants":
            return variants_frame(compare([self.run()]))
        if what == "errors":
            return errors_frame(self.scorecard)
        if what == "experts":
            return experts_frame(self.scorecard)
        if what == "tensors":
            return tensors_frame(self.folder)
        raise CompressError(f"there is no table of {what!r}; use variants, errors, experts or tensors")

    def plot(self, what: str = "errors") -> Figure:
        """A heat map. what: errors (of every role and layer), experts (the tokens that each saw in calibration).

        Raises MissingExtra without matplotlib, CompressError for other names and where there is nothing to draw.
        """
        if what not in ("errors", "experts"):
            raise CompressError(f"there is no plot of {what!r}; use errors or experts")
        found = error_figure(self.scorecard) if what == "errors" else expert_figure(self.scorecard)
        if found is None:
            why = "no layer was solved on calibration text" if what == "errors" else "the model has no experts"
            raise CompressError(f"there is nothing to draw: {why}, or the model was scored only")
        return found

    def run(self, label: str = "") -> Run:
        """As a comparison takes it."""
        return Run(self.scorecard, label, "" if self.folder is None else self.folder.name)

    def __rich__(self) -> RenderableType:
        return Group(scorecard_table(self.scorecard), *(Prose(str(path)) for path in self.paths))

    def _html(self) -> str:
        return scorecard_html(self.scorecard, list(map(str, self.paths)))

    def __repr__(self) -> str:
        rows = compare([self.run()]).variants
        told = [f"{human_bytes(row.bytes)}" + (f", KL {interval(row.kld)}" if row.kld else "") for row in rows]
        return f"<Result {self.scorecard.recipe}: {'; '.join(told)}>"


@dataclass(frozen=True, repr=False)
class Compared(Shown):
    """Variants side by side, and which to take."""

    comparison: Comparison
    advised: Advice

    @classmethod
    def of(
        cls, runs: Sequence[Run], *, memory: int | None = None, said: str = "", skipped: Sequence[str] = ()
    ) -> Compared:
        """Of runs. memory: bytes that the model may take, said: as its owner put that; skipped: lines about what is no run."""
        found = compare(runs)
        advice = advise(found, memory, said)
        warnings = (*found.warnings, *(f"skipped: {line}" for line in skipped))
        return cls(Comparison(found.model, found.rows, warnings), advice)

    @property
    def rows(self) -> tuple[Row, ...]:
        """Originals, then variants, the largest first."""
        return self.comparison.rows

    @property
    def best(self) -> str | None:
        """The name of the variant to take; None where nothing was scored, or nothing fits."""
        return next(iter(self.advised.picks), None)

    @property
    def advice(self) -> tuple[str, ...]:
        """Which to take, in sentences."""
        return self.advised.sentences

    def to_pandas(self) -> Any:
        """A DataFrame with a row a variant. Raises MissingExtra without pandas."""
        return variants_frame(self.comparison)

    def plot(self, what: str = "kl") -> Figure:
        """Size against what was measured: kl, accuracy (of tasks) or speed, with 95% intervals.

        Raises MissingExtra without matplotlib, CompressError where fewer than two variants have it.
        """
        return size_figure(self.comparison, what)

    def __rich__(self) -> RenderableType:
        return CompareTable(self.comparison, self.advised)

    def _html(self) -> str:
        return comparison_html(self.comparison, self.advised)

    def __repr__(self) -> str:
        count = len(self.comparison.variants)
        best = f"; take {self.best}" if self.best else ""
        return f"<Compared {self.comparison.model}: {count} variant{'' if count == 1 else 's'}{best}>"


@dataclass(frozen=True, repr=False)
class ShownPlan(Plan, Shown):
    """A plan that shows itself."""

    @classmethod
    def of(cls, plan: Plan) -> ShownPlan:
        """The same plan."""
        return cls(**{field.name: getattr(plan, field.name) for field in fields(plan)})

    def __rich__(self) -> RenderableType:
        return plan_table(self)

    def _html(self) -> str:
        return plan_html(self)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {human_bytes(size)}" for name, size in self.artifact_bytes.items())
        return f"<Plan {self.recipe.name} of {self.recipe.model}: {sizes}>"
