"""How long a run will take: compress one block of every kind for real, on a share of the text, and extrapolate.

Time does not depend on the values in a block, so blocks further down are rehearsed on the activations of the first.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.decode import decode
from compress.errors import OutputError
from compress.export.text import plan_tokenizer
from compress.limits import BATCH_TOKENS
from compress.models.checkpoint import Checkpoint
from compress.models.spec import Branch, ModelSpec
from compress.plan.factors import KNAPSACK_SHARES
from compress.plan.plan import Plan
from compress.plan.tensor import PlannedTensor
from compress.recover.block import SolvedBlock, recover_block
from compress.run.collect import Site, collect, stage_groups
from compress.run.source import open_original, working_model
from compress.run.sublayer import Job, Result, compress_sublayer
from compress.run.surveys import stand_in
from compress.scoring.divergence import token_stats
from compress.solve.tensor import Outcome, solve_tensor
from compress.statistics import Statistics
from compress.streaming.activations import Activations
from compress.streaming.journal import Journal
from compress.streaming.placement import Placement
from compress.streaming.walk import BlockAt, Streams, advance, embed, walk
from compress.text import (
    Suite,
    Tokenizer,
    calibration_windows,
    eval_windows,
    is_bundled_task,
    load_suite,
    task_documents,
    task_texts,
)
from compress.weights import Loader, Packed

SHARE = 8  # an eighth of the calibration windows
KINDS = 3  # different kinds of block that are rehearsed; rarer ones are scaled by their parameters
HEAD_ROWS = 2048  # rows of embeddings or head that are solved for real
# Passes that decode every tensor while an artifact is checked: our codec's for values and logits, the reader's own.
DECODES = 3
CHECK_TOKENS = 1024  # that a file is read back with
HEAD_TOKENS = 256  # whose logits are timed


@dataclass(frozen=True)
class Rehearsal:
    """Estimated wall seconds of a run.

    forward: reading text, running blocks and gathering statistics; solve: scalings, choosing codes, recovery (all its
    epochs, which may end early); write: journal, artifacts and their integrity check; score: the recipe's suite.
    """

    forward: float
    solve: float
    write: float
    score: float

    @property
    def parts(self) -> Mapping[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def as_dict(self) -> dict[str, float]:
        return {**{name: round(seconds, 3) for name, seconds in self.parts.items()}, "total": round(self.total, 3)}


@dataclass(frozen=True)
class _Block:
    """Measured seconds of one block: `window` for every calibration window, `epoch` for every one in an epoch of
    recovery, `token` for one plain forward pass of one token, the others once."""

    window: float
    epoch: float
    token: float
    solve: float
    load: float
    store: float
    decode: float

    def scaled(self, active: float, stored: float) -> _Block:
        """A block with so many times the parameters: active for a token, and in all."""
        return _Block(
            self.window * active,
            self.epoch * stored,
            self.token * active,
            self.solve * stored,
            self.load * stored,
            self.store * stored,
            self.decode * stored,
        )


def rehearse(plan: Plan, device: str | None = None) -> Rehearsal:
    """Estimate a run by doing a little of it in a temporary folder. Raises what a run raises."""
    placement = Placement.choose(device).multiplying(plan.recipe.precision, plan.own_codec)
    checkpoint = open_original(plan)
    try:
        with tempfile.TemporaryDirectory(prefix="compress-rehearsal-") as folder, torch.inference_mode():
            return _rehearse(plan, checkpoint, Journal.open(Path(folder), plan.digest), placement)
    except OSError as error:
        raise OutputError(
            f"cannot rehearse in {tempfile.gettempdir()}: {error.strerror or error}; free some space "
            "there or set TMPDIR"
        ) from error


def _rehearse(plan: Plan, checkpoint: Checkpoint, journal: Journal, placement: Placement) -> Rehearsal:
    spec, settings, clock, load = (
        plan.spec,
        plan.recipe.calibration,
        _Clock(),
        stand_in(plan, working_model(plan, checkpoint)),
    )
    torch.ones(512, 512) @ torch.ones(512, 512)  # the first product of a process starts its threads
    streams = None
    if plan.needs_calibration:
        batch = max(1, BATCH_TOKENS // settings.length)
        count = min(settings.samples, -(-max(settings.samples // SHARE, 4) // batch) * batch)
        with clock("text"):
            ids = calibration_windows(
                settings.source,
                plan_tokenizer(plan),
                samples=count,
                length=settings.length,
                seed=plan.recipe.seed,
                max_positions=spec.max_positions,
            )
        streams = _embedded(plan, load, journal.folder, ids, placement)
    job = Job(load, plan.transforms, plan.recipe.seed, placement, original_inputs=plan.original_inputs)
    kinds = _kinds(plan)
    chosen = walk(spec, load, placement, layers=[layer for _, layer in kinds])
    with placement.observing():
        measured = {
            kind: _block(plan, block, job, journal, streams) for (kind, _), block in zip(kinds, chosen, strict=True)
        }
    blocks = [measured.get(_kind(plan, layer)) or _like(plan, layer, measured) for layer in range(spec.layers)]
    outer = sum(_outer_solve(t, load) for t in plan.tensors if t.spec.layer is None and t.method is not None)
    check = sum(DECODES * b.decode + 2 * CHECK_TOKENS * b.token for b in blocks)
    store = sum(b.store for b in blocks)
    artifacts = len(plan.recipe.export)
    score = 0.0
    if plan.recipe.score is not None:
        score = artifacts * _score(spec, load_suite(plan.recipe.score.suite), plan_tokenizer(plan), blocks)
    return Rehearsal(
        forward=clock["text"]
        + sum(
            settings.samples * (b.window + _survey_passes(plan) * settings.length * b.token) + b.load for b in blocks
        ),
        solve=outer + sum(_solves(plan) * b.solve + _recovery_windows(plan) * b.epoch for b in blocks),
        write=store + artifacts * (store + check),
        score=score,
    )


def _solves(plan: Plan) -> int:
    """How often a block is solved: a knapsack first tries every share."""
    factorize = plan.recipe.step("factorize")
    return 1 + (len(KNAPSACK_SHARES) if factorize is not None and factorize.allocation == "knapsack" else 0)


def _survey_passes(plan: Plan) -> int:
    """Plain forward passes over the text before the first block: scores, and for a new shape both streams of its repair."""
    return ("sparsity" in plan.open) + (6 if plan.structural else 0)


class _Clock:
    """Seconds by name: `with clock("solve"): ...`, `clock["solve"]`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[name] = self[name] + (time.perf_counter() - started)

    def __getitem__(self, name: str) -> float:
        return self._seconds.get(name, 0.0)


def _recovery_windows(plan: Plan) -> int:
    """Windows that pass through every block forth and back: its own epochs, those of all blocks together, and the survey
    of the original's sensitivity."""
    recover, samples = plan.recover, plan.recipe.calibration.samples
    if recover is None:
        return 0
    survey = min(recover.survey, samples) if recover.loss == "sensitivity" else 0
    return samples * (recover.epochs + recover.end_to_end) + survey


def _kind(plan: Plan, layer: int) -> Any:
    """What makes two blocks take the same time: shapes, codecs and solvers of all their tensors."""
    facts = Counter(
        (t.spec.role, t.spec.shape, t.codec, t.solver, t.pruner, t.factorizer, t.incoherence) for t in plan.block(layer)
    )
    return frozenset(facts.items())


def _kinds(plan: Plan) -> list[tuple[Any, int]]:
    """The commonest kinds of block, each with the first layer of its kind."""
    kinds = [_kind(plan, layer) for layer in range(plan.spec.layers)]
    return [(kind, kinds.index(kind)) for kind, _ in Counter(kinds).most_common(KINDS)]


def _sizes(plan: Plan, layer: int) -> tuple[float, float]:
    """Parameters of a block: those one token passes through, and all."""
    share = plan.spec.experts_per_token / max(plan.spec.experts, 1)
    block = plan.block(layer)
    return (
        sum(t.spec.parameters * (1.0 if t.spec.expert is None else share) for t in block),
        float(sum(t.spec.parameters for t in block)),
    )


def _like(plan: Plan, layer: int, measured: Mapping[Any, _Block]) -> _Block:
    """A block of a rare kind, scaled from the commonest."""
    kind, block = next(iter(measured.items()))
    model = next(n for n in range(plan.spec.layers) if _kind(plan, n) == kind)
    (active, stored), (active_model, stored_model) = _sizes(plan, layer), _sizes(plan, model)
    return block.scaled(active / active_model, stored / stored_model)


def _embedded(plan: Plan, load: Loader, folder: Path, ids: np.ndarray, placement: Placement) -> Streams:
    """The activations at the input of the first block, from the original embeddings in both streams."""
    shape = (*ids.shape, plan.spec.hidden_size)
    streams = Streams(
        Activations(folder / "in.f32", shape, placement.device),
        Activations(folder / "in-original.f32", shape, placement.device) if plan.two_streams else None,
    )
    table = load(plan.spec.embeddings)
    for stream in (streams.compressed, streams.original):
        if stream is not None:
            embed(plan.spec, table, ids, stream)
    return streams


def _block(plan: Plan, block: BlockAt, job: Job, journal: Journal, streams: Streams | None) -> _Block:
    """Compress one block as `compress run` would, its parts timed one by one."""
    planned, clock = plan.block(block.layer), _Clock()
    with clock("load"):
        for tensor in planned:
            block.load(tensor.name)
    packed: dict[str, Packed] = {}
    outcomes: dict[str, Outcome] = {}
    start = streams
    for branch in block.branches:
        tensors = [t for t in planned if t.spec.part == branch.part]
        with clock("half"):
            result = compress_sublayer(branch, tensors, streams, job)
        packed |= result.packed
        outcomes |= {name: o for name, o in result.outcomes.items() if isinstance(o, Outcome)}
        if streams is not None:
            streams = _observe(plan, branch, tensors, result, streams, clock)
    if plan.recover is not None and start is not None and streams is not None and streams.original is not None:
        floats = {name: job.placement.put(decode(part)) for name, part in packed.items() if name not in outcomes}
        solved = SolvedBlock(block, outcomes, floats, {name: packed[name].codec for name in floats})
        once = plan.recover.model_copy(update={"epochs": 1})
        with clock("recover"):
            recover_block(solved, start.compressed, streams.original, once)
    with clock("store"):
        journal.finish(f"block-{block.layer:05d}", packed, {})
    with clock("decode"):
        for part in packed.values():
            decode(part)
    windows = 1 if streams is None else streams.windows
    length = plan.recipe.calibration.length
    forwards = 1 + len(plan.transforms)  # each scaling runs the sub-layers once more to see their inputs
    return _Block(
        window=(clock["observe"] + forwards * clock["forward"] + clock["original forward"]) / windows,
        epoch=clock["recover"] / windows,
        token=clock["forward"] / (windows * length),
        solve=max(clock["half"] - clock["gather"] - clock["load"], 0.0),
        load=clock["load"],
        store=clock["store"],
        decode=clock["decode"],
    )


def _observe(
    plan: Plan, branch: Branch, tensors: Sequence[PlannedTensor], result: Result, streams: Streams, clock: _Clock
) -> Streams:
    """Gather once more what a sub-layer's solvers saw and pass it, both timed. Returns the activations behind it."""
    more = plan.recipe.calibration.samples // streams.windows
    for stage in range(branch.sublayer.stages):
        for group in stage_groups(branch, stage, tensors):
            site = Site(branch, streams, result.original, result.weights, tokens=result.tokens)
            with clock("gather"):
                collect(site, stage, group)
            # experts that are cold after this little text may not be so after all of it
            site.tokens = tuple(more * n for n in result.tokens)
            with clock("observe"):
                collect(site, stage, group)
    following = _beside(streams, branch.sublayer.half)
    with clock("forward"):
        advance(branch, result.weights, streams.compressed, following.compressed)
    if streams.original is not None and following.original is not None:
        with clock("original forward"):
            advance(branch, result.original, streams.original, following.original)
    return following


def _beside(streams: Streams, half: str) -> Streams:
    """Where the activations behind a sub-layer go."""

    def moved(stream: Activations) -> Activations:
        return Activations(stream.path.with_name(f"{half}-{stream.path.name}"), stream.shape, stream.device)

    return Streams(moved(streams.compressed), None if streams.original is None else moved(streams.original))


def _outer_solve(planned: PlannedTensor, load: Loader) -> float:
    """Seconds to solve embeddings or head, from some of their rows."""
    clock, weight = _Clock(), load(planned.name)
    rows = min(HEAD_ROWS, len(weight))
    few = replace(planned, spec=replace(planned.spec, shape=(rows, weight.shape[1])))
    statistics = None if planned.spec.input is None else Statistics(torch.eye(weight.shape[1]), None, None, 1)
    with clock("solve"):
        solve_tensor(few, weight[:rows].float(), statistics)
    return clock["solve"] * len(weight) / rows


def _requested(row: Mapping[str, Any], tokenizer: Tokenizer) -> int:
    """Tokens that the model reads for a task's document: its texts, and all but the choices with each choice."""
    choices = max((len(value) for value in row.values() if isinstance(value, list)), default=1)
    shared = sum(len(ids) for ids in tokenizer.encode_batch([text for text in row.values() if isinstance(text, str)]))
    return sum(len(ids) for ids in tokenizer.encode_batch(task_texts(row))) + (choices - 1) * shared


def _score(spec: ModelSpec, suite: Suite, tokenizer: Tokenizer, blocks: Sequence[_Block]) -> float:
    """Both models over the suite's texts and tasks; engines are taken to be as fast as our own forward pass."""
    clock = _Clock()
    text = sum(
        eval_windows(part.text, tokenizer, windows=part.windows, protocol=part.protocol).tokens.size
        for part in suite.texts.values()
    )
    tokens = text
    if suite.tasks and find_spec("lm_eval") is not None:
        with clock("imports"):  # seconds, and as cold here as in the run
            import_module("lm_eval.evaluator")
        for name, choice in suite.tasks.items():
            if is_bundled_task(name):  # of others nothing is known before they are downloaded
                rows = task_documents(name, choice.documents)
                tokens += sum(_requested(row, tokenizer) for row in rows)
    head, states = torch.ones(spec.vocab_size, spec.hidden_size), torch.ones(HEAD_TOKENS, spec.hidden_size)
    with clock("head"):
        logits = (states @ head.T).numpy()
    with clock("compare"):
        token_stats(logits, logits, np.zeros(HEAD_TOKENS, dtype=np.int64))
    passes = len(suite.texts) + bool(suite.tasks)  # of the original, whose weights are read anew in each
    return (
        clock["imports"]
        + sum(2 * tokens * b.token + passes * b.load for b in blocks)
        + (2 * tokens * clock["head"] + text * clock["compare"]) / HEAD_TOKENS
    )
