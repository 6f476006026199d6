"""The whole of it: look at the original, decide what goes, let what stays make up for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.models.spec import ModelSpec
from compress.streaming.placement import CPU, Placement
from compress.streaming.walk import Scratch
from compress.structured.decide import decide
from compress.structured.options import PruneStructuredOptions, StructureOptions
from compress.structured.repair import Repair, repair_model
from compress.structured.scores import Expert, adopters, merged
from compress.structured.shapes import Cuts, Reduction, reduced
from compress.structured.survey import LayerScores, survey
from compress.structured.view import KeptLayer, StructureView
from compress.weights import Loader

_CHANNELS = "channels."  # before the keys of a state's index lists


@dataclass(frozen=True, eq=False)
class Restructured:
    """A reduced model: `view.load` gives its tensors.

    kept: what each layer keeps of which of the original's; tensors: those that are no mere selections, by their names in
    the reduced model, in the original's float types; report: for people, of JSON's types only.
    """

    original: ModelSpec
    reduction: Reduction
    kept: tuple[KeptLayer, ...]
    tensors: Mapping[str, Tensor]
    report: Mapping[str, Any]

    @cached_property
    def spec(self) -> ModelSpec:
        return reduced(self.original, self.reduction)

    @cached_property
    def view(self) -> StructureView:
        return StructureView(self.kept, self.tensors, self.original, self.spec)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything but `original`, as tensors by name and as JSON; `restore` reads it."""
        channels = {
            f"{_CHANNELS}{n}.{name}": index.to(torch.int32)
            for n, kept in enumerate(self.kept)
            for name, index in kept.channels.items()
        }
        facts = {
            "reduction": asdict(self.reduction),
            "kept": [{"layer": k.layer, "experts": k.experts, "kv_heads": k.kv_heads} for k in self.kept],
            "report": dict(self.report),
        }
        return {**self.tensors, **channels}, facts

    @classmethod
    def restore(cls, original: ModelSpec, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Restructured:
        """What `state` gave, with the same original."""
        channels: list[dict[str, Tensor]] = [{} for _ in facts["kept"]]
        for key, index in tensors.items():
            if key.startswith(_CHANNELS):
                n, name = key.removeprefix(_CHANNELS).split(".", 1)
                channels[int(n)][name] = index.long()
        kept = tuple(
            KeptLayer(k["layer"], tuple(k["experts"]), tuple(k["kv_heads"]), channels[n])
            for n, k in enumerate(facts["kept"])
        )
        others = {name: values for name, values in tensors.items() if not name.startswith(_CHANNELS)}
        return cls(original, Reduction(**facts["reduction"]), kept, others, facts["report"])


def restructure(
    original: ModelSpec,
    cuts: Cuts,
    load: Loader,
    ids: np.ndarray,
    scratch: Scratch,
    progress: Callable[[float], None] = lambda fraction: None,
    placement: Placement = CPU,
) -> Restructured:
    """Carry out all cuts together.

    load(name) gives a tensor of `original`; ids: [windows, length], calibration text; scratch(name): activation files of
    the ids' shape, deleted when done. Everything is scored on the original in one pass; a second one repairs if any step
    asks for it, with the largest damping asked for. Deterministic. Raises NumericalError for activations that are not
    finite.
    """
    experts = cuts.experts
    asked = [step for step in (cuts.drop, experts, cuts.structured) if step is not None]
    damping = max((step.damping for step in asked if step.repair), default=None)
    part = 1.0 if damping is None else 0.5
    scores = survey(original, load, ids, scratch, lambda fraction: progress(part * fraction), placement)
    reduction, kept = decide(original, scores, cuts)
    view = StructureView(kept, {}, original, reduced(original, reduction))
    tensors: dict[str, Tensor] = {}
    if experts is not None and experts.method == "merge":
        tensors = merged_experts(view, scores, load)
        view = StructureView(kept, tensors, original, view.spec)
    repairs: Sequence[Mapping[str, Repair]] = ()
    if damping is not None:
        second = lambda f: progress(part + part * f)  # noqa: E731
        repaired, repairs = repair_model(view, load, ids, scratch, damping, second, placement)
        tensors |= repaired
    return Restructured(original, reduction, kept, tensors, _report(asked, scores, kept, repairs))


def merged_experts(view: StructureView, scores: Sequence[LayerScores], load: Loader) -> dict[str, Tensor]:
    """Kept experts with those that go averaged into them, each into the one whose router logits are most like its own,
    weighted by how often each is chosen (after MC-SMoE, arXiv 2310.01334, which routes the tokens of both to the result;
    here the router loses the rows of experts that go).

    By name in the reduced model, in the original's float types.
    """
    out: dict[str, Tensor] = {}
    for n, kept in enumerate(view.kept):
        if not kept.experts:
            continue
        originals, reduced = _experts(view.original, kept.layer), _experts(view.spec, n)
        likeness, frequency = scores[kept.layer].likeness, scores[kept.layer].frequency
        for e, others in adopters(likeness, kept.experts).items():
            if not others:
                continue
            family = [_matrices(load, originals[i]) for i in (e, *others)]
            whole = merged(
                [(gate.float(), up.float(), down.float()) for gate, up, down in family], frequency[[e, *others]]
            )
            channels = kept.channels.get(f"experts.{e}", slice(None))
            parts = (whole[0][channels], whole[1][channels], whole[2][:, channels])
            for name, part, like in zip(reduced[kept.experts.index(e)], parts, family[0], strict=True):
                out[name] = part.to(like.dtype).contiguous()
    return out


def _matrices(load: Loader, names: Sequence[str]) -> Expert:
    gate, up, down = (load(name) for name in names)
    return gate, up, down


def _experts(spec: ModelSpec, layer: int) -> dict[int, list[str]]:
    """Names of every routed expert's gate, up and down."""
    found: dict[int, list[str]] = {}
    for tensor in spec.block_tensors(layer):
        if tensor.expert is not None:
            found.setdefault(tensor.expert, []).append(tensor.name)
    return found


def _report(
    asked: Sequence[StructureOptions],
    scores: Sequence[LayerScores],
    kept: Sequence[KeptLayer],
    repairs: Sequence[Mapping[str, Repair]],
) -> dict[str, Any]:
    """What was measured and what was decided. Layers and experts are the original's."""
    stay = {k.layer for k in kept}
    report: dict[str, Any] = {
        "influence": [s.influence for s in scores],
        "dropped_layers": [n for n in range(len(scores)) if n not in stay],
        "layers": [],
    }
    pruned_heads = any(isinstance(step, PruneStructuredOptions) for step in asked)
    for n, k in enumerate(kept):
        own = scores[k.layer]
        entry: dict[str, Any] = {"layer": k.layer}
        if k.experts:
            entry |= {
                "experts": list(k.experts),
                "saliency": own.saliency.tolist(),
                "frequency": own.frequency.tolist(),
            }
        if pruned_heads:
            entry |= {"kv_heads": list(k.kv_heads), "head_scores": own.heads.tolist()}
        if repairs:
            entry["repair"] = {half: repair.report for half, repair in repairs[n].items()}
        report["layers"].append(entry)
    return report
