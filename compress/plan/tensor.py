"""One tensor of a plan: by which methods it shrinks, in which codec it ships, how many bytes that takes. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from compress.codecs.names import codec_info, ggml_fallback, smaller_group, sparse_name, stored_bytes
from compress.containers import Container, packed_layout
from compress.models.spec import ModelSpec, TensorSpec
from compress.plan.factors import factor_sizes
from compress.recipe.rules import FactorizeRule, PruneRule, Rule
from compress.recipe.schema import Factorize, Prune, Quantize
from compress.solvers.options import (
    NOTHING,
    Asks,
    FactorizerOptions,
    PrunerOptions,
    RtnOptions,
    SolverOptions,
)
from compress.weights import Pattern


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor and what becomes of it. `method` is None where values are stored as they are."""

    spec: TensorSpec
    codec: str
    solver: SolverOptions | None
    bytes: int
    wanted: str | None = None
    """The codec the recipe asked for, when rows do not divide into its blocks."""
    incoherence: bool = False
    """Whether the codes are those of the weight between two randomised Hadamard transforms."""
    activations: str | None = None
    """How an engine rounds the inputs of this linear ("int8": each token by its largest value)."""
    values: str = ""
    """The codec of the numbers in a sparse or factored tensor; `codec` itself for all others."""
    pruner: PrunerOptions | None = None
    pattern: Pattern | None = None
    """Which weights may stay; with `pruner`."""
    joint: bool = False
    """Whether codes may be chosen together with the mask, or to make up for it."""
    factorizer: FactorizerOptions | None = None
    factors: tuple[int, int] | None = None
    """Atoms of the dictionary and coefficients an output keeps; with `factorizer`."""
    ordered: bool = False
    """Whether it is solved and stored in the container's order of columns instead of the checkpoint's."""
    unfactored: bool = False
    """Whether a step would factorise it, but not into anything smaller."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def method(self) -> SolverOptions | PrunerOptions | FactorizerOptions | None:
        """Whose statistics are collected: what approximates the weight first."""
        if self.factorizer is not None:
            return self.factorizer
        if self.pruner is not None and (not self.compensates or self.pruner.joint):
            return self.pruner
        return self.solver

    @property
    def asks(self) -> Asks:
        """What its method asks of the run."""
        return NOTHING if self.method is None else self.method.asks

    @property
    def compensates(self) -> bool:
        """Whether codes make up for the mask, as only error feedback can: then they approximate the weight, else what the
        pruner left of it."""
        return self.joint and self.solver is not None and self.solver.feedback

    @property
    def label(self) -> str | None:
        """The methods by name: `sparsegpt+gptq`."""
        names = [m.name for m in (self.factorizer, self.pruner, self.solver) if m is not None]
        return "+".join(names) or None

    @property
    def taken_apart(self) -> bool:
        """Whether a container may store it as more than choices of its rows."""
        return any(not piece.exact for piece in self.spec.declared.pieces)

    @property
    def why(self) -> str:
        """Why it is not stored in the codec that the recipe asked for."""
        if self.taken_apart:
            return "the file stores it in pieces, some of them transposed, which only floats can be"
        columns, info = self.spec.shape[-1], codec_info(self.wanted or self.codec)
        if info.kind != "uniform":
            return f"rows of {columns} do not divide into {self.wanted} blocks"
        if columns % info.block == 0:
            return f"rows of others, whose groups have to be as long, do not divide into groups of {info.block}"
        return f"rows of {columns} do not divide into groups of {info.block}"

    def same_work(self, other: PlannedTensor) -> bool:
        """Whether both become the same, whatever codec each was to have."""
        return self.name == other.name and replace(self, wanted=None) == replace(other, wanted=None)

    @property
    def kept(self) -> int | None:
        """Values that a sparse tensor, or the coefficients of a factored one, store."""
        rows, columns = (1, *self.spec.shape)[-2:]
        if self.factors is not None:
            return rows * self.factors[1]
        return None if self.pattern is None else self.pattern.kept(rows, columns)

    @property
    def plain(self) -> PlannedTensor:
        """The same without pruning or factors: what is left is the codec."""
        if self.pruner is None and self.factorizer is None:
            return self
        return replace(self, codec=self.values, pruner=None, pattern=None, factorizer=None, factors=None)


@dataclass(frozen=True)
class Rules:
    """The rules of a recipe that decide about one tensor, and the steps they belong to."""

    quantize: tuple[Quantize, Rule] | None = None
    prune: tuple[Prune, PruneRule] | None = None
    factorize: tuple[Factorize, FactorizeRule] | None = None


def planned_tensor(
    spec: ModelSpec,
    tensor: TensorSpec,
    codec: str,
    rules: Rules,
    containers: Sequence[Container],
    beside: Iterable[int] = (),
) -> PlannedTensor:
    """What becomes of one tensor, its bytes still to be counted. codec: of its numbers; beside: columns of the tensors whose
    groups have to be as long as its own."""
    if len(tensor.shape) == 1 and not tensor.carried:
        codec = precise_float(containers) or codec
    wanted = None
    lenient = rules.quantize is not None and not rules.quantize[0].strict
    if lenient and (replacement := fallback(codec, tensor.shape[-1], beside)):
        wanted, codec = codec, replacement
    info = codec_info(codec)
    out = PlannedTensor(tensor, codec, None, 0, wanted, values=codec)
    if rules.quantize is not None and info.kind != "float":
        step, rule = rules.quantize
        solver = step.solver_of(rule)
        if tensor.input is None and not surveys_head(spec, tensor, codec):
            solver = RtnOptions()  # rows that are looked up have no input statistics to solve against
        incoherence = info.kind == "vector" if rule.incoherence is None else rule.incoherence
        out = replace(out, solver=solver, incoherence=incoherence, activations=rule.activations)
    if rules.prune is not None:
        prune, line = rules.prune
        return pruned(replace(out, pruner=prune.solver, joint=prune.joint), line.sparsity, containers)
    if rules.factorize is not None:
        factorize, division = rules.factorize
        return factored(replace(out, factorizer=factorize.solver), 1 - division.ratio)
    return out


def fallback(codec: str, columns: int, beside: Iterable[int] = ()) -> str | None:
    """What stands in for a codec whose blocks do not divide rows of so many columns: what llama.cpp stores instead, or the same
    integers in smaller groups. None where it fits, or nothing does."""
    info = codec_info(codec)
    if info.kind == "uniform" and info.block and any(n % info.block for n in (columns, *beside)):
        return smaller_group(codec, (columns, *beside))
    return ggml_fallback(codec, columns)


def in_pieces(planned: PlannedTensor, own: str, containers: Iterable[Container]) -> PlannedTensor:
    """As a container stores it that takes tensors apart: solved in its order of columns, since blocks follow them, and left
    in the checkpoint's own float type where a piece is more than a choice of rows."""
    if not any(c.pieces for c in containers) or planned.solver is None:
        return planned
    if planned.taken_apart:
        wanted = planned.wanted or planned.codec
        return PlannedTensor(planned.spec, own, None, 0, wanted, values=own)
    return replace(planned, ordered=planned.spec.column_order is not None)


def codes_container(containers: Sequence[Container]) -> Container:
    """The first container that stores codes; our own where a recipe only writes decoded values."""
    return next((c for c in containers if not c.dense), packed_layout())


def packed_bytes(planned: PlannedTensor, containers: Sequence[Container], own: str) -> int:
    """Bytes of one tensor in the first container that stores codes, with everything needed to read it back."""
    container = codes_container(containers)
    if not container.has_place(planned.spec):
        container = next((c for c in containers if c.has_place(planned.spec)), container)
    if not container.takes(planned.codec):  # its `check_plan` will say why
        return 0
    return container.tensor_bytes(planned, own)


def pruned(planned: PlannedTensor, pattern: Pattern, containers: Iterable[Container]) -> PlannedTensor:
    """With another mask: a sparse codec where every container has one for these values, else zeros like other values."""
    sparse = all("sparse" in container.kinds for container in containers) and holds_zero(planned.values)
    codec = sparse_name(planned.values, pattern) if sparse else planned.values
    return replace(planned, pattern=pattern, codec=codec)


def precise_float(containers: Iterable[Container]) -> str | None:
    """The float codec that an engine of these containers wants norms, biases and routers in, or None."""
    return next((c.precise_float for c in containers if c.precise_float is not None), None)


def factored(planned: PlannedTensor, share: float) -> PlannedTensor:
    """As the largest factors that take `share` of the bytes of the 16-bit matrix; dense where none are smaller."""
    (rows, columns), options = planned.spec.shape, planned.factorizer
    assert options is not None
    sparse, sizes = options.sparse, sizes_at((rows, columns), options, share)
    if sizes is None:
        return replace(planned, codec=planned.values, factorizer=None, factors=None, unfactored=True)
    info = codec_info(planned.values)
    second = f"int{info.bits}-row" if info.kind == "uniform" else planned.values
    codec = f"factors({planned.values},{f'sparse-{second}' if sparse else second})"
    return replace(planned, codec=codec, factors=sizes)


def sizes_at(shape: tuple[int, int], options: FactorizerOptions, share: float) -> tuple[int, int] | None:
    """Atoms and coefficients an output that take `share` of the bytes of a 16-bit matrix; None where nothing fits."""
    return factor_sizes(*shape, share, options.atoms_a_coefficient, options.sparse)


def holds_zero(codec: str) -> bool:
    """Whether a codec stores an exact zero beside any other value, so that weights can be pruned in it."""
    return codec_info(codec).kind in ("float", "uniform")


def repairs_residual(planned: PlannedTensor) -> bool:
    """Whether this linear's target also makes up for the lag of the residual stream it is added to.

    Only where it alone stands for all that is added: o_proj, a dense down_proj, or a routed expert whose routing weights
    sum to one. Others would repair the same lag several times over.
    """
    return bool(planned.asks.residual) and planned.spec.declared.alone


def surveys_head(spec: ModelSpec, tensor: TensorSpec, codec: str) -> bool:
    """Whether a tied embedding is solved as the head it also is, which takes a survey pass over the original.

    Not worth the pass from 8 bits up.
    """
    return (
        spec.tied and tensor.name == spec.embeddings and 8 * stored_bytes(codec, tensor.shape) < 8 * tensor.parameters
    )


def moments_bytes(spec: ModelSpec, planned: PlannedTensor) -> int:
    """Memory of the statistics behind one solved tensor, float32."""
    n = planned.spec.shape[-1]
    squares = 1 + bool(planned.asks.drift)
    return 4 * n * (squares * n + (spec.hidden_size if repairs_residual(planned) else 0))
