"""What streams through a run: how much is alive at once, and that the statistics are those of the real models.

The oracle of the statistics is transformers: the original checkpoint and the finished compressed weights, both run
whole, with hooks on the inputs of their linears, summed in float64.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.engines.streamed import StreamedSource
from compress.models import load_spec
from compress.models.checkpoint import Checkpoint
from compress.plan import make_plan
from compress.recipe import Recipe
from compress.report.scorecard import read
from compress.run import load_calibration, run, sublayer
from compress.run.collect import Site
from compress.solve.together import Task
from compress.statistics import Moments, Statistics
from compress.streaming import activations as files
from compress.streaming.activations import Activations
from tests.integration.runs import as_model, carry_out, kept, sha256, small, spec_of, text_file
from tests.tiny import demo_model, tiny_model

RECIPE = "gguf-q4-k-m"
FILE = "model-Q4_K_M.gguf"


class Live:
    """Bytes of tensors that were handed out and are still referenced, and their peak."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def watch(self, tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self._gone, size)
        return tensor

    def _gone(self, size: int) -> None:
        self.now -= size


# --- weights and activations that are alive at once ----------------------------------------


def run_and_watch(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Live, Live]:
    """Names in the order they were read; live weights; live activations."""
    order, weights, activations = list[str](), Live(), Live()
    load, read_windows = Checkpoint.load, Activations.read

    def watched(self: Checkpoint, name: str) -> torch.Tensor:
        order.append(name)
        return weights.watch(load(self, name))

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "load", watched)
        patch.setattr(Activations, "read", lambda self, *span: activations.watch(read_windows(self, *span)))
        carry_out(recipe)
    return order, weights, activations


def test_weights_are_read_lazily_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of execution, every tensor once (embeddings once a stream); never more than one block alive,
    however many there are."""
    peaks = {}
    for layers in (1, 3):
        model = tiny_model("qwen3_moe", tmp_path / f"model-{layers}", num_hidden_layers=layers)
        spec = spec_of(model)
        recipe = small(RECIPE, model, tmp_path / f"out-{layers}", "steps[0].quantize.solver.sweeps=0")
        order, weights, _ = run_and_watch(recipe, monkeypatch)
        assert sorted(dict.fromkeys(order)) == sorted(t.name for t in spec.tensors())
        assert {n for n in order if order.count(n) > 1} <= {"model.embed_tokens.weight"}
        places = [int(n.split(".")[2]) if ".layers." in n else (-1 if "embed" in n else layers) for n in order]
        assert places == sorted(places)
        largest = max(
            max(4 * sum(t.parameters for t in spec.block_tensors(layer)) for layer in range(layers)),
            4 * (spec.vocab_size + 1) * spec.hidden_size,  # the head and the norm before it
        )
        assert weights.peak <= largest
        peaks[layers] = weights.peak
    assert peaks[1] == peaks[3]


def test_activations_in_memory_do_not_grow_with_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch of each model and the one that replaces it, whether 8 windows or 16 go through."""
    model = tiny_model("llama", tmp_path / "model")
    monkeypatch.setattr(files, "BATCH_TOKENS", 128)  # two windows
    peaks = {}
    for samples in (8, 16):
        recipe = small(RECIPE, model, tmp_path / f"out-{samples}", f"calibration.samples={samples}")
        _, _, activations = run_and_watch(recipe, monkeypatch)
        peaks[samples] = activations.peak
    assert peaks[8] == peaks[16]
    assert 0 < peaks[8] <= 3 * 128 * 64 * 4


def test_result_does_not_depend_on_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same moments up to summation order, whatever number of windows goes through at once."""
    model = tiny_model("qwen3_moe", tmp_path / "model", num_hidden_layers=1)
    found = []
    for tokens in (64, 4096):
        with monkeypatch.context() as patch:
            patch.setattr(files, "BATCH_TOKENS", tokens)
            seen = collected(small(RECIPE, model, tmp_path / f"out-{tokens}"), patch)
        found.append(seen[0, 0, 0]["attention.in"])
    assert found[0].tokens == found[1].tokens
    assert torch.allclose(found[0].gram, found[1].gram, rtol=1e-5, atol=1e-5 * float(found[0].gram.abs().max()))


def test_scoring_leaves_the_callers_autograd_alone() -> None:
    """Two sources read in turn, as scoring does: torch's inference mode must not outlive a step of either."""
    checkpoint = Checkpoint.open(demo_model())
    source = StreamedSource(load_spec(checkpoint.config), checkpoint.load, "original")
    for _ in zip(*(source.logits([np.arange(4)] * 2) for _ in range(2)), strict=True):
        assert not torch.is_inference_mode_enabled()
    assert not torch.is_inference_mode_enabled()


# --- statistics -------------------------------------------------------------------------------


Place = tuple[int, int, int]
"""(layer, sub-layer, stage)"""


def collected(recipe: Recipe, patch: pytest.MonkeyPatch, **options: Any) -> dict[Place, dict[str, Moments]]:
    """Run, keeping what every stage of every sub-layer collected."""
    seen: dict[Place, dict[str, Moments]] = {}
    collect = sublayer.collect

    def keep(site: Site, stage: int, group: Any, *rest: Any) -> dict[str, Moments]:
        seen[site.branch.layer, site.branch.part, stage] = found = collect(site, stage, group)
        return found

    patch.setattr(sublayer, "collect", keep)
    run(recipe, **options)
    return seen


def inputs_of(folder: Path, windows: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """Per layer, {input key: [tokens, n] float64} of a dense transformers model over all windows."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    modules = {"attention.in": "self_attn.q_proj", "attention.out": "self_attn.o_proj",
               "mlp.in": "mlp.gate_proj", "mlp.act": "mlp.down_proj"}  # fmt: skip
    seen: list[dict[str, torch.Tensor]] = [{} for _ in model.model.layers]
    for layer, block in enumerate(model.model.layers):
        for key, name in modules.items():
            block.get_submodule(name).register_forward_pre_hook(
                lambda _, args, layer=layer, key=key: seen[layer].__setitem__(key, args[0])
            )
    with torch.no_grad():
        model(torch.from_numpy(windows).long())
    for inputs in seen:
        yield {key: x.reshape(-1, x.shape[-1]).double().numpy() for key, x in inputs.items()}


def near(found: torch.Tensor, wanted: np.ndarray, tolerance: float) -> bool:
    return float(np.abs(found.double().numpy() - wanted).max()) <= tolerance * float(np.abs(wanted).max())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_moments_are_those_of_transformers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gram = sum x x^T of the compressed model's inputs, drift = sum (x0 - x) x^T against the original's, each input
    as it is when all earlier stages are compressed (later ones do not matter to it)."""
    model = tiny_model(family, tmp_path / "model")
    recipe = small(RECIPE, model, tmp_path / "out")
    with monkeypatch.context() as patch:
        seen = collected(recipe, patch, keep_work=True)
    windows = load_calibration(make_plan(recipe))
    assert windows.shape == (4, 64)
    compressed = list(inputs_of(as_model(kept(recipe), model, tmp_path / "compressed"), windows))
    original = list(inputs_of(model, windows))
    checked = 0
    places = {"attention.in": (0, 0), "attention.out": (0, 1), "mlp.in": (1, 0), "mlp.act": (1, 1)}
    for (layer, *place), moments in seen.items():
        for key, found in moments.items():
            x, x0 = compressed[layer][key], original[layer][key]
            assert places[key] == tuple(place) and found.tokens == 4 * 64
            assert near(found.gram, x.T @ x, 1e-4), (layer, key)
            assert found.drift is not None
            if layer == 0 and key == "attention.in":
                assert float(found.drift.abs().max()) > 0  # the embeddings are quantized, too
            assert near(found.drift, (x0 - x).T @ x, 1e-3), (layer, key)
            checked += 1
    assert checked == 2 * 4


# --- experts -------------------------------------------------------------------------------

COLD = 3


@pytest.fixture
def lopsided(tmp_path: Path) -> Path:
    """A model whose first block never chooses expert COLD: all embeddings share a direction that it rejects."""
    from safetensors.torch import load_file, save_file

    model = tiny_model("qwen3_moe", tmp_path / "lopsided", num_hidden_layers=2)
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"] += 3.0
    weights["model.layers.0.mlp.gate.weight"][COLD] = -2.0
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    return model


def routed(folder: Path, windows: np.ndarray) -> list[list[int]]:
    """Tokens per expert of every layer by transformers' router logits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(windows).long(), output_router_logits=True).router_logits
    chosen = [layer.topk(model.config.num_experts_per_tok, dim=-1).indices.flatten() for layer in logits]
    return [torch.bincount(c, minlength=model.config.num_experts).tolist() for c in chosen]


def test_expert_that_sees_no_token(lopsided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small(RECIPE, lopsided, tmp_path / "out")
    given: dict[str, Statistics] = {}
    solve = sublayer.solve_together

    def noting(problems: Sequence[Sequence[Task]], seed: int = 0) -> Any:
        tasks = chain.from_iterable(problems)
        given.update({task.planned.name: task.statistics for task in tasks if task.statistics is not None})
        return solve(problems, seed)

    with monkeypatch.context() as patch:
        patch.setattr(sublayer, "solve_together", noting)
        seen = collected(recipe, patch, keep_work=True)
    windows = load_calibration(make_plan(recipe))
    counts = routed(as_model(kept(recipe), lopsided, tmp_path / "compressed"), windows)
    assert counts[0][COLD] == 0 and sum(counts[0]) == 2 * windows.size

    card = read(tmp_path / "out")
    assert [list(e.tokens) for e in card.experts] == counts
    assert COLD in card.experts[0].cold and card.experts[0].borrowed[COLD] == 1.0
    entry = next(f for f in card.fallbacks if f.subject == f"block 0 expert {COLD}")
    assert "100%" in entry.used and "0 calibration tokens" in entry.reason
    raw = json.loads((tmp_path / "out" / "scorecard.json").read_text())
    assert COLD in raw["experts"][0]["cold"] and raw["fallbacks"]

    # its gate and up projections are solved against the mean over all tokens of the block
    root = f"model.layers.0.mlp.experts.{COLD}."
    pool = seen[0, 1, 0]["router"]
    assert pool.tokens == windows.size
    for leaf in ("gate_proj", "up_proj"):
        statistics = given[f"{root}{leaf}.weight"]
        assert statistics.tokens == 0 and statistics.borrowed == 1.0
        assert torch.allclose(statistics.gram, pool.gram / pool.tokens, rtol=1e-5, atol=1e-7)
    # and its down projection against what its own (compressed) gate and up make of everybody's tokens
    act = seen[0, 1, 1][f"experts.{COLD}.act.pool"]
    assert act.tokens > 0
    statistics = given[f"{root}down_proj.weight"]
    assert torch.allclose(statistics.gram, act.gram / act.tokens, rtol=1e-5, atol=1e-7)
    assert float(statistics.gram.diagonal().min()) > 0
    # others borrow in proportion to how little they saw
    share = card.experts[0].borrowed
    order = sorted(range(len(share)), key=lambda e: counts[0][e])
    assert [share[e] for e in order] == sorted(share, reverse=True)


@pytest.mark.parametrize("solver", ["gptq", "rtn"])
def test_expert_without_tokens_borrows_even_without_shrinkage(
    solver: str, lopsided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gram of zeros would be damped into the identity in silence."""
    recipe = small(RECIPE, lopsided, tmp_path / "out", f"steps[0].quantize.solver={{name: {solver}, shrinkage: 0.0}}")
    given: dict[str, Statistics] = {}
    solve = sublayer.solve_together

    def noting(problems: Sequence[Sequence[Task]], seed: int = 0) -> Any:
        tasks = chain.from_iterable(problems)
        given.update({task.planned.name: task.statistics for task in tasks if task.statistics is not None})
        return solve(problems, seed)

    monkeypatch.setattr(sublayer, "solve_together", noting)
    carry_out(recipe)
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        statistics = given[f"model.layers.0.mlp.experts.{COLD}.{leaf}.weight"]
        assert float(statistics.gram.diagonal().min()) > 0 and statistics.borrowed == 1.0


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_token_counts_of_other_families(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, tmp_path / "model", num_hidden_layers=1)
    recipe = small(RECIPE, model, tmp_path / "out")
    card = run(recipe, keep_work=True)
    # the router's input depends on the compressed attention; the checkpoint's own names make the folder loadable
    folder = as_model(kept(recipe), model, tmp_path / "compressed")
    assert [list(e.tokens) for e in card.experts] == routed(folder, load_calibration(make_plan(recipe)))


# --- determinism --------------------------------------------------------------------------


def test_two_runs_give_identical_bytes(tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe", tmp_path / "model")
    for name in ("a", "b"):
        carry_out(small(RECIPE, model, tmp_path / name))
    assert sha256(tmp_path / "a" / FILE) == sha256(tmp_path / "b" / FILE)


def test_seed_decides_the_text(tmp_path: Path) -> None:
    """Another seed takes other documents first."""
    model = tiny_model("llama", tmp_path / "model", num_hidden_layers=1)
    documents = tmp_path / "text.jsonl"
    lines = (tmp_path / "calibration.txt", *(tmp_path / f"{n}.txt" for n in range(5)))
    documents.write_text("".join(f'{{"text": "{text_file(p, 100, n).read_text()}"}}\n' for n, p in enumerate(lines)))
    sets = (f"calibration.dataset={documents}", "calibration.samples=2")
    windows = [
        load_calibration(make_plan(small(RECIPE, model, tmp_path / "out", *sets, f"seed={seed}"))) for seed in (0, 0, 1)
    ]
    assert np.array_equal(windows[0], windows[1]) and not np.array_equal(windows[0], windows[2])
