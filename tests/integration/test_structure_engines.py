"""Reduced models in transformers and llama.cpp: what is cut computes as what is masked, and repair brings it nearer.

Measured on random tiny models: the reduced model differs from the masked original by at most 1e-5 of the logits' standard
deviation in transformers, llama.cpp from transformers by 1e-4 (summation order).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from compress.containers import gguf
from compress.containers.base import Options, WriteRequest
from compress.engines.streamed import StreamedSource
from compress.models import ModelSpec, load_spec
from compress.models.layers.mlp import Mlp
from compress.models.layers.moe import MoE
from compress.streaming.activations import Activations
from compress.structured.options import DropLayersOptions, PruneExpertsOptions, PruneStructuredOptions
from compress.structured.restructure import Restructured, restructure
from compress.structured.shapes import Cuts, reduction_problems
from compress.structured.survey import survey
from compress.text import calibration_windows, load_tokenizer
from tests.contract.blocks import as_stored
from tests.integration.containers import fetcher, plan, reference_logits, spec_of, token_ids, weights_of
from tests.integration.test_gguf_container import gelu_by_table
from tests.tiny import FAMILIES, demo_model, tiny_config, tiny_model

SAME, ENGINE = 1e-4, 1e-3
"""Largest logit difference, in standard deviations of the logits: between two ways to write one model in transformers, and
between engines."""

DROP = DropLayersOptions(count=1, repair=False)
EXPERTS = PruneExpertsOptions(ratio=0.25, repair=False)
CHANNELS = PruneStructuredOptions(channels=0.25, repair=False)
BOTH = PruneStructuredOptions(heads=0.5, channels=0.25, repair=False)


def _most(family: str) -> tuple[None, PruneExpertsOptions | None, PruneStructuredOptions | None]:
    """As much of all that can go as the family allows, layers apart."""
    spec = load_spec(tiny_config(family))
    experts = None if reduction_problems(spec, experts=EXPERTS) else EXPERTS
    cuts = (step for step in (BOTH, CHANNELS) if not reduction_problems(spec, None, experts, step))
    return None, experts, next(cuts, None)


# biases, tied heads, an untied width, grouped and single heads come on top of the plain families
CASES: list[tuple[str, dict[str, Any], tuple[Any, Any, Any]]] = [
    *((family, {}, steps) for family in FAMILIES if any(steps := _most(family))),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, (DROP, None, BOTH)),
    ("qwen2", {"num_hidden_layers": 3, "num_key_value_heads": 4}, (DROP, None, CHANNELS)),
    ("qwen3_moe", {"num_hidden_layers": 3, "attention_bias": True}, (DROP, EXPERTS, BOTH)),
    ("qwen3_moe", {"mlp_only_layers": [1]}, (None, EXPERTS, BOTH)),
    ("qwen2_moe", {"num_hidden_layers": 3}, (DROP, EXPERTS, CHANNELS)),
    ("mixtral", {}, (None, EXPERTS, None)),
    ("nemotron_h", {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]}, (None, None, CHANNELS)),
]


def _restructured(model: Path, steps: tuple[Any, Any, Any], scratch: Path, ids: np.ndarray) -> Restructured:
    spec, weights = spec_of(model), weights_of(model)
    scratch.mkdir(exist_ok=True)
    files = lambda name: Activations(scratch / f"{name}.f32", (*ids.shape, spec.hidden_size))  # noqa: E731
    return restructure(spec, Cuts(*steps), weights.__getitem__, ids, files)


def _tensors(result: Restructured, load: Callable[[str], Tensor]) -> dict[str, Tensor]:
    return {t.name: result.view.load(t.name, load).contiguous() for t in result.spec.tensors()}


def _saved(spec: ModelSpec, tensors: dict[str, Tensor], folder: Path) -> Path:
    """A checkpoint folder with nothing but weights and config.json."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(spec.config)))
    save_file(as_stored(spec, tensors), folder / "model.safetensors", {"format": "pt"})
    return folder


def _masked_logits(
    model: Path, result: Restructured, folder: Path, ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> np.ndarray:
    """Logits of the whole original in transformers, with what goes switched off instead of cut out.

    Columns of o_proj and down_proj become zero, router logits of experts minus infinity, layers are taken out.
    """
    from transformers import AutoModelForCausalLM

    spec, weights = result.original, weights_of(model)
    silenced = {}
    for kept in result.kept:
        root, block = spec.branches(kept.layer)[0].root, spec.blocks[kept.layer]
        moe = next((sublayer for sublayer in block if isinstance(sublayer, MoE)), None)
        if heads := [g for g in range(spec.kv_heads) if g not in kept.kv_heads]:
            weights[f"{root}self_attn.o_proj.weight"].unflatten(1, (spec.kv_heads, -1))[:, heads] = 0.0
        for name, index in kept.channels.items():
            if name == "mlp":
                dense = next(sublayer for sublayer in block if isinstance(sublayer, Mlp))
                down = f"{root}{dense.prefix}{dense.leaves[-1]}.weight"
            elif name == "shared":
                down = f"{root}{moe.shared.prefix}{moe.shared.leaves[-1]}.weight"
            else:
                down = f"{root}{moe.expert.format(e=name.split('.')[1])}{moe.leaves[-1]}.weight"
            gone = sorted(set(range(weights[down].shape[1])) - set(index.tolist()))
            assert gone
            weights[down][:, gone] = 0.0
        if kept.experts:
            silenced[kept.layer] = [e for e in range(spec.experts) if e not in kept.experts]
            if moe.router.correction:  # what chooses beside the logits
                weights[root + moe.router.correction][..., silenced[kept.layer]] = -torch.inf
    whole = AutoModelForCausalLM.from_pretrained(
        _saved(spec, weights, folder), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    routers = {id(_router(whole.model.layers[n], spec.experts)): gone for n, gone in silenced.items()}
    linear = F.linear

    def silencing(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = linear(x, weight, bias)
        if id(weight) in routers:
            out[..., routers[id(weight)]] = -torch.inf
        return out

    whole.model.layers = torch.nn.ModuleList(whole.model.layers[k.layer] for k in result.kept)
    whole.config.num_hidden_layers = whole.model.config.num_hidden_layers = len(result.kept)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(F, "linear", silencing)
        return whole(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()


def _router(layer: torch.nn.Module, experts: int) -> Tensor:
    """Its weight has a row an expert."""
    gates = ("gate.weight", "gate.wg.weight", "router.weight", "router.proj.weight")
    (found,) = (w for name, w in layer.named_parameters() if name.endswith(gates) and len(w) == experts)
    return found


@pytest.mark.parametrize(("family", "config", "steps"), CASES)
def test_cut_is_masked_in_transformers_and_llama_cpp_agrees(
    family: str, config: dict[str, Any], steps: tuple[Any, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family, tmp_path / "model", tokenizer=False, **config)
    text, ids = token_ids(120, seed=5).reshape(4, 30), token_ids()
    result = _restructured(model, steps, tmp_path / "scratch", text)
    assert not result.tensors
    tensors = _tensors(result, weights_of(model).__getitem__)
    small = _saved(result.spec, tensors, tmp_path / "small")
    logits = reference_logits(small, ids)
    masked = _masked_logits(model, result, tmp_path / "masked", ids, monkeypatch)
    assert np.abs(logits - masked).max() < SAME * masked.std()
    assert np.abs(logits - reference_logits(model, ids)).max() > masked.std() / 10

    problems = gguf.check_representable(result.spec)
    if problems:
        heads_went = result.spec.heads != result.original.heads
        assert (result.spec.family.gguf.heads_fill_width and heads_went) or gguf.check_representable(result.original)
        return
    pytest.importorskip("llama_cpp")
    from compress.engines.llama_cpp import LlamaCpp

    lines = plan(result.spec, "f32")
    options = Options(tokenizer=False)
    provenance = {"compress.recipe": "test", "compress.version": "0"}
    files = gguf.write(WriteRequest(
        tmp_path / "small.gguf", result.spec, lines, fetcher(tensors, lines), source=small, options=options,
        provenance=provenance,
    ))  # fmt: skip
    monkeypatch.setattr(F, "gelu", gelu_by_table)
    logits = reference_logits(small, ids)
    with LlamaCpp(files[0], threads=1) as engine:
        assert np.abs(next(engine.logits([ids])) - logits).max() < ENGINE * logits.std()


def test_most_cases_reach_llama_cpp() -> None:
    """So that the test above cannot stop at transformers unnoticed."""
    whole = {family for family, _, (_, _, structured) in CASES if structured is None or not structured.heads}
    assert {"qwen2", "qwen2_moe", "mixtral"} <= whole
    assert {"llama", "mistral", "qwen3", "qwen3_moe"} <= {family for family, config, _ in CASES if not config}


# -- scores against transformers
def _hooked(model: Path, ids: np.ndarray) -> tuple[list[Tensor], dict[int, Tensor], dict[int, Tensor]]:
    """From transformers, float64 by token: hidden states around the layers, inputs of o_proj and of the feed-forward."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    states, attended, entered = [], {}, {}
    flat = lambda x: x.double().reshape(-1, x.shape[-1])  # noqa: E731
    for n, block in enumerate(whole.model.layers):
        block.register_forward_pre_hook(lambda _, args, kwargs: states.append(flat(args[0])), with_kwargs=True)
        block.self_attn.o_proj.register_forward_pre_hook(lambda _, args, n=n: attended.update({n: flat(args[0])}))
        block.mlp.register_forward_pre_hook(lambda _, args, n=n: entered.update({n: flat(args[0])}))
    whole.model.norm.register_forward_pre_hook(lambda _, args: states.append(flat(args[0])))
    with torch.no_grad():
        whole(torch.from_numpy(ids), use_cache=False)
    return states, attended, entered


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "qwen3_moe", "mixtral"])
def test_scores_are_those_of_transformers_activations_in_float64(family: str, tmp_path: Path) -> None:
    """Block influence, FLAP's metric, REAP's saliency, frequency and likeness, written out from their definitions."""
    model = tiny_model(family, tmp_path / "model", tokenizer=False)
    ids = token_ids(150, seed=2).reshape(5, 30)
    spec = spec_of(model)
    weights = {name: values.double() for name, values in weights_of(model).items()}
    scratch = lambda name: Activations(tmp_path / name, (*ids.shape, spec.hidden_size))  # noqa: E731
    found = survey(spec, weights_of(model).__getitem__, ids, scratch)
    states, attended, entered = _hooked(model, ids)

    def fluctuation(x: Tensor, down: Tensor, gate: Tensor | None = None) -> Tensor:
        shares = torch.ones(len(x), dtype=torch.float64) if gate is None else gate**2
        mean = (shares[:, None] * x).sum(0) / shares.sum()
        variance = (shares[:, None] * (x - mean) ** 2).sum(0) / shares.sum() * len(x) / (len(x) - 1)
        return variance * (down**2).sum(0) * shares.sum() / ids.size

    for n, own in enumerate(found):
        root, moe = f"model.layers.{n}.", spec.blocks[n][1]
        before, after = states[n], states[n + 1]
        cosine = (before * after).sum(1) / before.norm(dim=1) / after.norm(dim=1)
        assert own.influence == pytest.approx(float((1 - cosine).mean()), rel=1e-4)
        o = weights[f"{root}self_attn.o_proj.weight"]
        heads = fluctuation(attended[n], o).reshape(spec.kv_heads, -1).sum(1)
        torch.testing.assert_close(own.heads, heads, rtol=1e-3, atol=0)
        x = entered[n]

        def act(prefix: str, rows: Tensor, gate: str = "gate_proj", up: str = "up_proj") -> Tensor:
            return F.silu(rows @ weights[f"{prefix}{gate}.weight"].T) * (rows @ weights[f"{prefix}{up}.weight"].T)

        if not spec.is_sparse(n):
            expected = fluctuation(act(f"{root}mlp.", x), weights[f"{root}mlp.down_proj.weight"])
            torch.testing.assert_close(own.channels["mlp"], expected, rtol=1e-3, atol=1e-9)
            continue
        logits = x @ weights[root + moe.router.name].T
        gate_name, up_name, down_name = moe.leaves
        gates, choices = logits.softmax(1).topk(spec.experts_per_token)
        gates = gates / gates.sum(1, keepdim=True) if spec.norm_topk else gates
        for e in range(spec.experts):
            prefix = root + moe.expert.format(e=e)
            tokens = [t for t in range(len(x)) if e in choices[t].tolist()]
            gate = torch.stack([gates[t][choices[t] == e].sum() for t in tokens])
            inner, down = act(prefix, x[tokens], gate_name, up_name), weights[f"{prefix}{down_name}.weight"]
            saliency = (gate * (inner @ down.T).norm(dim=1)).mean()
            assert float(own.saliency[e]) == pytest.approx(float(saliency), rel=1e-4)
            assert float(own.frequency[e]) == pytest.approx(len(tokens) / choices.numel())
            torch.testing.assert_close(
                own.channels[f"experts.{e}"], fluctuation(inner, down, gate), rtol=1e-3, atol=1e-9
            )
        unit = logits / logits.norm(dim=0)
        torch.testing.assert_close(own.likeness, unit.T @ unit, rtol=1e-4, atol=1e-5)
        if moe.shared:
            inner, down = act(root + moe.shared.prefix, x), weights[f"{root}{moe.shared.prefix}down_proj.weight"]
            torch.testing.assert_close(own.channels["shared"], fluctuation(inner, down), rtol=1e-3, atol=1e-9)
    assert len(found) == spec.layers


# -- repair on the trained model
@pytest.fixture(scope="module")
def texts() -> tuple[np.ndarray, np.ndarray]:
    """Windows to repair on, and others."""
    windows = calibration_windows(
        "mixed", load_tokenizer(demo_model()), samples=72, length=128, seed=0, max_positions=2048
    )
    return windows[:64], windows[64:]


@pytest.fixture(scope="module")
def originals(texts: tuple[np.ndarray, np.ndarray]) -> list[tuple[np.ndarray, list[Tensor]]]:
    """Eight windows of either kind and the original's log-probabilities on them."""
    source = StreamedSource(spec_of(demo_model()), weights_of(demo_model()).__getitem__, "original")
    parts = (texts[0][:8], texts[1])
    return [(part, [torch.from_numpy(x).log_softmax(-1) for x in source.logits(list(part))]) for part in parts]


def _mean_kl(result: Restructured, load: Callable[[str], Tensor], windows: np.ndarray, original: list[Tensor]) -> float:
    reduced = StreamedSource(result.spec, lambda name: result.view.load(name, load), "reduced")
    total = 0.0
    for p, logits in zip(original, reduced.logits(list(windows)), strict=True):
        total += float((p.exp() * (p - torch.from_numpy(logits).log_softmax(-1))).sum(-1).double().mean())
    return total / len(windows)


@pytest.mark.parametrize(
    "steps",
    [
        (DropLayersOptions(count=1), None, None),
        (None, PruneExpertsOptions(ratio=0.5), None),
        (None, PruneExpertsOptions(ratio=0.5, method="frequency"), None),
        (None, PruneExpertsOptions(ratio=0.5, method="merge"), None),
        (None, None, PruneStructuredOptions()),
        (None, None, PruneStructuredOptions(heads=0.5)),
    ],
    ids=["drop", "reap", "frequency", "merge", "structured", "heads"],
)
def test_repair_brings_the_demo_model_nearer_on_text_it_has_not_seen(
    steps: tuple[Any, Any, Any],
    texts: tuple[np.ndarray, np.ndarray],
    originals: list[tuple[np.ndarray, list[Tensor]]],
    tmp_path: Path,
) -> None:
    """Mean KL divergence with repair over that without; measured 0.3 to 0.6 on windows seen and 0.5 to 0.7 on others."""
    load = weights_of(demo_model()).__getitem__
    plain = tuple(step and step.model_copy(update={"repair": False}) for step in steps)
    repaired = _restructured(demo_model(), steps, tmp_path / "a", texts[0])
    cut = _restructured(demo_model(), plain, tmp_path / "b", texts[0])
    assert repaired.tensors and repaired.reduction == cut.reduction
    for windows, original in originals:
        assert _mean_kl(repaired, load, windows, original) < 0.8 * _mean_kl(cut, load, windows, original)


def test_repaired_tensors_reach_the_checkpoint(texts: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    """transformers computes from the written folder what the view computes block by block."""
    seen, unseen = texts
    load = weights_of(demo_model()).__getitem__
    steps = (DropLayersOptions(count=1), PruneExpertsOptions(method="merge"), PruneStructuredOptions(ratio=0.2))
    result = _restructured(demo_model(), steps, tmp_path / "scratch", seen[:8])
    small = _saved(result.spec, _tensors(result, load), tmp_path / "small")
    logits = reference_logits(small, unseen[0])
    streamed = next(StreamedSource(result.spec, lambda n: result.view.load(n, load), "view").logits([unseen[0]]))
    assert np.abs(logits - streamed).max() < ENGINE * logits.std()
