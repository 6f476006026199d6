"""What a run takes: peak memory and disk, from a plan alone. No torch, no weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.codecs.names import codec_info
from compress.limits import BATCH_TOKENS, CODES_FROM_BITS, LOGIT_VALUES, MOMENTS_BYTES, RUNTIME_BYTES
from compress.machine import threads
from compress.models.companions import companion_bytes
from compress.plan.tensor import PlannedTensor, moments_bytes
from compress.solvers.options import solve_bytes

if TYPE_CHECKING:
    from compress.plan.plan import Plan

LOGITS_BYTES = 6 * 4 * LOGIT_VALUES  # of both models, their logarithms and gradients


def disk_bytes(plan: Plan) -> int:
    """Work folder (packed blocks; activations of both models at three places; what recovery keeps) and one copy of
    every artifact with all that lies beside its weights."""
    work = sum(n * (t.spec.parameters if codec_info(t.codec).kind == "uniform" else t.bytes) for t, n in plan.counted)
    beside = companion_bytes(plan.source)
    out = sum(plan.file_bytes[e.container] + beside for e in plan.recipe.export)
    if plan.structural:  # matrices that are no mere selections of the original's
        work += sum(2 * n * t.spec.parameters for t, n in plan.counted if t.spec.role.endswith((".o", ".down")))
    return work + out + 6 * plan.activation_bytes + _recovery_disk_bytes(plan)


def _recovery_disk_bytes(plan: Plan) -> int:
    """Sensitivities and the passes that measure them; for end-to-end recovery every block's codes apart from their
    scales, parameters with Adam's moments, tensors that will replace others, and a batch at every block's input."""
    recover, spec, text = plan.recover, plan.spec, plan.recipe.calibration
    if recover is None or not plan.needs_calibration:
        return 0
    token = 4 * spec.hidden_size
    survey = min(recover.survey, text.samples) * text.length * token
    survey = (spec.layers + 2) * survey + spec.layers * spec.hidden_size * token if recover.loss != "mse" else 0
    if not recover.end_to_end:
        return survey
    inside = [(t, count) for t, count in plan.counted if t.spec.layer is not None]
    outcomes = sum(count * _outcome_bytes(t) for t, count in inside)
    state = sum(16 * count * _tuned_parameters(t, recover.tune) for t, count in inside)
    batch = (spec.layers + 1) * max(BATCH_TOKENS, text.length) * token
    codes = sum(count * t.bytes for t, count in inside)
    return survey + outcomes + state + codes + batch + 2 * plan.activation_bytes


def peak_memory_bytes(plan: Plan) -> int:
    """Runtime + the largest block in float32, original and decoded + the grams of its hungriest stage + a batch
    of activations + the embedding or head. Recovery: the block's codes, a copy for autograd, codes times scales,
    dense weights and their gradients, parameters and what Adam keeps; end to end also both heads. Independent of
    the number of blocks."""
    spec, kinds = plan.spec, plan.outline.kinds
    blocks = [sum(t.spec.parameters for t in block) * 4 for block in kinds]
    grams = 0
    for block in kinds:
        stages: dict[bool, dict[str, int]] = {True: {}, False: {}}
        for t in block:
            if t.method is not None and t.spec.input is not None:
                stages[t.spec.input.endswith("act")][t.spec.input] = moments_bytes(spec, t)
        for sizes in stages.values():
            grams = max(grams, min(sum(sizes.values()), max(MOMENTS_BYTES, *sizes.values(), 0)))
    widest = max((t.spec.parameters for block in kinds for t in block if len(t.spec.shape) == 2), default=0)
    solve = max(widest * 4 * 12, threads() * max((_solve_bytes(t) for block in kinds for t in block), default=0))
    if plan.structural:  # the original's blocks are surveyed whole, and repaired with new values beside them
        whole = [sum(sublayer.parameters for sublayer in block) * 4 for block in plan.turned.blocks]
        blocks.append(max(whole) * 3 // 2)
    batch = BATCH_TOKENS * 4 * (6 * spec.hidden_size + 4 * max(spec.intermediate_size, spec.moe_intermediate_size))
    head = spec.vocab_size * spec.hidden_size * 4 * 3
    largest, recovery = max(blocks, default=0), 0
    if plan.recover is not None and plan.needs_calibration:
        tune = plan.recover.tune
        tuned = max((sum(16 * _tuned_parameters(t, tune) for t in block) for block in kinds), default=0)
        heads = 2 * spec.vocab_size * spec.hidden_size * 4 + LOGITS_BYTES if plan.recover.end_to_end else 0
        recovery = 5 * largest + tuned + 3 * batch + heads  # autograd keeps what a block computes on the way
    return RUNTIME_BYTES + max(2 * largest + grams + solve + batch, head + batch, recovery)


def _solve_bytes(planned: PlannedTensor) -> int:
    """Of one of the experts that are solved beside each other."""
    inside = planned.solver is not None and planned.spec.expert is not None
    return solve_bytes(planned.spec.shape[0], planned.spec.shape[-1]) if inside else 0


def _tuned_parameters(planned: PlannedTensor, tune: Sequence[str]) -> int:
    """About how many parameters recovery gives a tensor of a block: all of what is stored as float or rounded finely
    enough to be rounded again, else one for every stored scale, of which formats have one for 32 weights or fewer."""
    size = planned.spec.parameters
    if planned.solver is None:
        return size if planned.spec.role in tune else 0
    if planned.plain != planned:
        return 0
    if "codes" in tune and 8 * planned.bytes >= CODES_FROM_BITS * size:
        return size
    return size // 32 if "scales" in tune else 0


def _outcome_bytes(planned: PlannedTensor) -> int:
    """About what the solved tensor takes with codes and scales apart: small integers a byte, other levels more."""
    if planned.solver is None:
        return 0
    return planned.spec.parameters * (2 if codec_info(planned.codec).kind in ("ggml", "uniform") else 5)
