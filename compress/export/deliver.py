"""From finished codes to delivered artifacts: write, read back, score, pass the gate, rename; the order of things.

Nothing gets its final name before every check has passed; what fails lies in `rejected/`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from compress.containers import CONTAINERS
from compress.decode import decode
from compress.engines.open import artifact_source, continues, remembered
from compress.engines.streamed import StreamedSource
from compress.engines.timing import Job, speed_prompt, time_models
from compress.errors import CalibrationError, CompressError, MissingExtra, OutputError
from compress.export.gate import limits, measured
from compress.export.text import plan_tokenizer, prove_tokenizer, require_suite
from compress.export.verify import Compared, check, check_windows
from compress.export.write import write
from compress.models.checkpoint import Checkpoint
from compress.models.companions import LEGAL, copy_companions
from compress.plan.plan import Plan
from compress.recipe.schema import Export
from compress.report import scorecard as scorecards
from compress.report.checksums import checksums, combined
from compress.report.progress import Reporter
from compress.report.scorecard import Artifact, Check
from compress.scoring.divergence import Scores
from compress.scoring.original import Original
from compress.scoring.results import Fallback, Speed, TaskScore
from compress.scoring.source import LogitSource
from compress.streaming.placement import CPU, Placement
from compress.text import load_suite

if TYPE_CHECKING:
    from torch import Tensor

    from compress.weights import Packed


@dataclass
class Delivery:
    """What came of the exports."""

    artifacts: list[Artifact] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    base_scores: Scores | None = None
    base_tasks: dict[str, TaskScore] = field(default_factory=dict)
    base_texts: dict[str, Scores] = field(default_factory=dict)
    base_speed: Speed | None = None
    doubts: list[str] = field(default_factory=list)
    """What speaks against the original."""
    strict: bool = False
    """Whether that fails the gate."""

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


@dataclass(frozen=True)
class Product:
    """A plan and what was solved for it. fetch: one packed tensor by name; variant: what tells it from others that ship
    together."""

    plan: Plan
    fetch: Callable[[str], Packed]
    variant: str | None = None

    def dense(self, name: str) -> Tensor:
        """One tensor, decoded."""
        return decode(self.fetch(name))


@dataclass(frozen=True)
class _Written:
    """An artifact in the staging folder; roots: its files there, or the folder they lie in, then what lies beside a single
    file; sha256: of all that ships, by path from the staging folder."""

    product: Product
    export: Export
    files: list[Path]
    roots: list[Path]
    sha256: Mapping[str, str]

    @property
    def name(self) -> str:
        """What stages and checks call it."""
        return self.product.variant or self.export.container


def require_texts(plan: Plan, reporter: Reporter) -> list[Fallback]:
    """Read the texts that checks and scores will want and prove what makes ids of them, so that what is wrong with either
    stops the run before the work, not after. Returns what deserves a line, and says it.

    Raises CalibrationError, and what `prove_tokenizer` raises.
    """
    for container in plan.recipe.containers:
        container.require(plan.source, plan.spec)
    lines = prove_tokenizer(plan)
    for line in lines:
        reporter.say(f"note: {line.subject}: {line.wanted} -> {line.used} ({line.reason})")
    if plan.recipe.score is not None:
        require_suite(plan)
    elif not plan.needs_calibration:  # else the calibration itself reads it
        check_windows(plan)
    return lines


def deliver(
    products: Sequence[Product],
    checkpoint: Checkpoint,
    output: Path,
    reporter: Reporter,
    placement: Placement = CPU,
    result: Delivery | None = None,
) -> Delivery:
    """Write and prove every artifact of every plan, all of one model and scored alike. result: what is known before, see
    Delivery."""
    result = result or Delivery()
    staging = output / ".checking"
    shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(output / "rejected", ignore_errors=True)
    written: list[_Written] = []
    plan = products[0].plan
    try:
        for product in products:
            for export in product.plan.recipe.export:
                written.append(_written(product, export, staging, reporter))
        compared = checkpoint if plan.base is None else Checkpoint.open(plan.base.place)
        spec = plan.compared.spec
        whole = None
        if compared.adapter is None:
            whole = continues(compared.folder, compared.weight_files, spec.parameters)
        source = StreamedSource(spec, compared.load, "original", placement, generator=whole)
        original = remembered(source, compared.deciding, compared.folder)
        for one in written:
            memory = StreamedSource(one.product.plan.spec, one.product.dense, "in-memory compressed model", placement)
            result.artifacts.append(_proved(one, original, memory, result, reporter))
        if plan.recipe.score is not None and plan.recipe.score.speed and result.passed:
            _time(plan, compared, written, result, reporter)
        result.checks += [
            Check(name="original", passed=False, detail=doubt) for doubt in result.doubts if result.strict
        ]
        _rename(written, output, result)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return result


def _written(product: Product, export: Export, staging: Path, reporter: Reporter) -> _Written:
    """One artifact in the staging folder."""
    plan = product.plan
    with reporter.stage(f"write {product.variant or export.container}") as progress:
        files = write(plan, export, product.fetch, staging, progress)
        roots = _roots(files, staging)
        if CONTAINERS[export.container].suffix:
            roots += copy_companions(plan.source, staging, LEGAL)
        return _Written(product, export, files, roots, checksums(roots, staging))


def _proved(
    written: _Written, original: Original, memory: LogitSource, result: Delivery, reporter: Reporter
) -> Artifact:
    """An artifact with its scores; what was checked on the way, and the original's scores, go into `result`."""
    plan, export, files = written.product.plan, written.export, written.files
    artifact, checks = described(written), list[Check]()
    container = CONTAINERS[export.container]
    try:
        with ExitStack() as held:
            with reporter.stage(f"check {written.name}") as progress:
                source = held.enter_context(
                    artifact_source(container, files, plan.spec, plan.parameters, result.fallbacks)
                )
                checks += check(plan, export, files, written.product.fetch, Compared(source, memory), progress)
            if plan.recipe.score is not None:
                with reporter.stage(f"score {written.name}") as progress:
                    found = measured(plan, source, original, progress)
                result.base_scores = result.base_scores or found.base_scores
                result.base_tasks = result.base_tasks or found.base_tasks
                result.base_texts = result.base_texts or found.base_texts
                result.fallbacks += (line for line in found.fallbacks if line not in result.fallbacks)
                result.doubts = result.doubts or found.doubts
                artifact = artifact.model_copy(
                    update={"scores": found.scores, "tasks": found.tasks, "texts": found.texts}
                )
                checks += limits(plan, artifact)
    except (CalibrationError, MissingExtra, OutputError):
        raise  # nothing the artifact can help
    except CompressError as error:  # the engine refuses the file, or its logits are not finite
        checks.append(Check(name=f"{container.name} in its engine", passed=False, detail=str(error)))
    if written.product.variant is not None:
        checks = [check.model_copy(update={"name": f"{written.name}: {check.name}"}) for check in checks]
    result.checks += checks
    return artifact


def _time(plan: Plan, compared: Checkpoint, written: Sequence[_Written], result: Delivery, reporter: Reporter) -> None:
    """Add the throughput of every artifact, in turns with each other and the original, to `result`."""
    assert plan.recipe.score is not None
    jobs = {
        f"{number} {one.name}": Job.of(CONTAINERS[one.export.container], one.files, one.product.plan.parameters)
        for number, one in enumerate(written)
    }
    original = Job.of_original(compared.weight_files, plan.compared.spec.parameters)
    prompt = speed_prompt(load_suite(plan.recipe.score.suite), plan_tokenizer(plan), plan.spec.max_positions)
    with reporter.stage("speed") as progress:
        timed = time_models(jobs, original, prompt, progress=lambda done, total: progress(done / total))
    result.artifacts = [
        artifact.model_copy(update={"speed": timed.speeds.get(name)})
        for artifact, name in zip(result.artifacts, jobs, strict=True)
    ]
    result.base_speed = timed.original
    result.fallbacks += timed.lines(*jobs)


def described(written: _Written) -> Artifact:
    """Bytes and bits per weight of an artifact, before any score. A single file runs without what lies beside it."""
    staging, plan = written.roots[0].parent, written.product.plan
    weight_bytes = sum(f.stat().st_size for f in written.files)
    single = bool(CONTAINERS[written.export.container].suffix)
    shipped = weight_bytes if single else sum((staging / name).stat().st_size for name in written.sha256)
    return Artifact(
        container=written.export.container,
        path=written.roots[0].name,
        bytes=shipped,
        bits_per_weight=round(8 * weight_bytes / plan.weights_in(CONTAINERS[written.export.container]), 4),
        variant=written.product.variant,
        ratio=shipped / plan.compared.bytes,
        sha256=combined(written.sha256),
        files=dict(written.sha256),
    )


def _rename(written: Sequence[_Written], output: Path, result: Delivery) -> None:
    """Give every artifact its final name, in `rejected/` if any check has failed; those of an earlier run go."""
    _retire(output)
    target = output if result.passed else output / "rejected"
    target.mkdir(exist_ok=True)
    for path in dict.fromkeys(root for one in written for root in one.roots):  # two files may share a licence
        if not result.passed:
            _remove(output / path.name)  # an earlier run's, with the very bytes that were just rejected
        _move(path, target / path.name)
    if not result.passed:
        result.artifacts = [_rejected(a) for a in result.artifacts]


def _retire(output: Path) -> None:
    """Remove what an earlier run delivered here and what tells of it, its scorecard last: they would no longer be true of
    this folder."""
    gone = [scorecards.REPRODUCE_FILE, scorecards.CARD_FILE]
    with suppress(CompressError):  # none, or nothing that could be read
        earlier = scorecards.read(output)
        gone += [*earlier.cards, *earlier.files, *earlier.beside]
    for name in gone:
        path = output / name
        path.unlink(missing_ok=True)
        if path.parent != output and path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()
    (output / scorecards.FILE_NAME).unlink(missing_ok=True)


def _rejected(artifact: Artifact) -> Artifact:
    """The same where it now lies."""
    files = {f"rejected/{name}": found for name, found in artifact.files.items()}
    sha256 = combined(files)
    return artifact.model_copy(
        update={"path": f"rejected/{artifact.path}", "delivered": False, "files": files, "sha256": sha256}
    )


def _roots(files: Sequence[Path], staging: Path) -> list[Path]:
    """The entries of the staging folder that make up an artifact: its files, or the folder they lie in."""
    return sorted({staging / file.relative_to(staging).parts[0] for file in files})


def _move(path: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(path, target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
