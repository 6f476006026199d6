"""Pruned and factorised models end to end: files as small as planned, packed while they run, logits of what was solved.

What is solved is decoded from the journal and computed by transformers as a dense model; the artifact is loaded by
transformers with `import compress` in another process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from compress.containers._refusal import SETTINGS
from compress.models.checkpoint import Checkpoint
from compress.plan import make_plan
from compress.recipe import Recipe
from compress.run import run
from tests.integration.containers import reference_logits
from tests.integration.runs import as_model, carry_out, kept, small
from tests.tiny import tiny_model

CHAINS = {
    "prune": "[{prune: {solver: sparsegpt, sparsity: 0.5}}]",
    "prune n:m, some layers": "[{prune: {solver: wanda, rules: [{targets: routed_experts, sparsity: 2:4, layers: first 1}, "
    "{targets: attention, sparsity: 0.3}]}}]",
    "prune by outliers": "[{prune: {solver: sparsegpt, sparsity: 0.6, allocation: outliers}}]",
    "prune and quantize": "[{prune: {sparsity: 0.5}}, {quantize: {scheme: W4A16G32}}]",
    "prune, then quantize": "[{prune: {sparsity: 4:8, joint: false}}, {quantize: {scheme: W3A16G32_ASYM}}]",
    "prune with the head": "[{prune: {solver: magnitude, rules: [{targets: lm_head, sparsity: 0.25}]}}]",
    "awq, prune, round": "[{awq: {grid: 4}}, {prune: {solver: wanda, sparsity: 0.5}}, "
    "{quantize: {solver: rtn, scheme: W4A16G32}}]",
    "rotate and prune": "[{rotate: {}}, {prune: {sparsity: 0.5}}]",
    "compot": "[{factorize: {solver: compot, ratio: 0.2}}]",
    "rocket": "[{factorize: {solver: rocket, ratio: 0.3, allocation: knapsack}}]",
    "rocket with the head": "[{factorize: {solver: rocket, allocation: knapsack, ratio: 0.2, rules: [{targets: lm_head, ratio: 0.3}]}}]",
    "prune the head by outliers": "[{prune: {allocation: outliers, rules: [{targets: lm_head, sparsity: 0.5}]}}]",
    "dropped, then recovered": "[{drop_layers: {count: 1}}, {quantize: {scheme: W8A16}}, {recover: {end_to_end: 1, epochs: 1}}]",
    "svd": "[{factorize: {solver: svd, ratio: 0.4, allocation: uniform}}]",
    "compot and quantize": "[{factorize: {solver: compot, ratio: 0.3}}, {quantize: {scheme: W8A16G32}}]",
    "experts, then compot": "[{prune_experts: {}}, {factorize: {solver: compot, ratio: 0.2}}]",
    "fewer channels, sparse": "[{prune_structured: {channels: 0.25}}, {prune: {sparsity: 0.5}}]",
    "pruned, then recovered": "[{prune: {rules: [{targets: attention, sparsity: 0.5}]}}, "
    "{quantize: {rules: [{targets: routed_experts, codec: int4-g32}]}}, {recover: {end_to_end: 0, epochs: 1}}]",
}

LOAD = """
import json, sys
import numpy as np, torch
import compress
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for line in sys.stdin:
    folder, ids, target = json.loads(line)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(np.load(ids))[None]).logits[0]
    np.save(target, logits.numpy())
    held = [*model.buffers(), *model.parameters()]
    print(sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in held}.values()), flush=True)
"""
Loader = Callable[[Path, np.ndarray, Path], tuple[np.ndarray, int]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen3_moe", tmp_path_factory.mktemp("shrinking") / "model", num_experts=4)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    """Logits and bytes of tensors of an artifact, in a process that knows of it what `import compress` tells: one for all
    artifacts, since most of what it does is importing."""
    log = tmp_path_factory.mktemp("loader") / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", LOAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None

    def load(folder: Path, ids: np.ndarray, work: Path) -> tuple[np.ndarray, int]:
        assert process.poll() is None, log.read_text()
        np.save(work / "ids.npy", ids)
        print(
            json.dumps([str(folder), str(work / "ids.npy"), str(work / "logits.npy")]), file=process.stdin, flush=True
        )
        answer = process.stdout.readline()
        assert answer, log.read_text()
        return np.load(work / "logits.npy"), int(answer)

    yield load
    process.communicate(timeout=60)


def as_solved(recipe: Recipe, model: Path, work: Path) -> Path:
    """A dense folder of what the run solved, with the config that was written."""
    artifact = next((Path(recipe.output)).glob(f"{recipe.name}-*"))
    config = json.loads((artifact / "config.json").read_text())
    for packed in ("quantization_config", *SETTINGS):
        config.pop(packed, None)
    (work / "config").mkdir()
    (work / "config" / "config.json").write_text(json.dumps(config))
    return as_model(kept(recipe), work / "config", work / "solved")


@pytest.mark.parametrize("chain", CHAINS)
def test_chain(chain: str, model: Path, loaded: Loader, tmp_path: Path) -> None:
    recipe = small("wanda-50", model, tmp_path / "out", f"steps={CHAINS[chain]}", "name=chain")
    card = run(recipe, keep_work=True)
    assert card.gate.passed, card.gate
    folder, ids = tmp_path / "out" / "chain-compress", np.random.default_rng(1).integers(0, 4000, 40)
    logits, held = loaded(folder, ids, tmp_path)
    expected = reference_logits(as_solved(recipe, model, tmp_path), ids)
    assert np.abs(logits - expected).max() < 1e-3 * np.abs(expected).max()
    stored = sum(t.numel() * t.element_size() for t in load_file(folder / "model.safetensors").values())
    assert stored == pytest.approx(make_plan(recipe).bytes, rel=0.01)
    assert held < 1.05 * stored + 4096, "weights were expanded when they were loaded"


@pytest.mark.parametrize("step", ["{prune: {solver: wanda, sparsity: 0.5}}", "{factorize: {ratio: 0.3}}"])
def test_dense_export_holds_the_same_values(step: str, model: Path, tmp_path: Path) -> None:
    recipe = small(
        "wanda-50", model, tmp_path / "out", f"steps=[{step}]", "export=[{container: safetensors}]", "name=chain"
    )
    card = run(recipe, keep_work=True)
    assert any("saves nothing in safetensors" in note for note in card.notes)
    stored = Checkpoint.open(tmp_path / "out" / "chain-safetensors")
    solved = kept(recipe)
    for name, values in solved.items():
        assert torch.equal(stored.load(name).float(), values), name


def test_a_killed_survey_is_not_done_twice(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped behind its structure and allocation, a run goes on with both, to the same bytes."""
    from compress.run import surveys, units

    chain = "steps=[{prune_experts: {}}, {factorize: {solver: compot, ratio: 0.2}}]"
    whole, cut = (small("wanda-50", model, tmp_path / name, chain, "name=chain") for name in ("whole", "cut"))
    carry_out(whole)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(units, "_block", killed)
        with pytest.raises(KeyboardInterrupt):
            carry_out(cut)

    def again(*_: object, **__: object) -> None:
        raise AssertionError("surveyed twice")

    monkeypatch.setattr(surveys, "restructure", again)
    monkeypatch.setattr(surveys, "_shares", again)
    carry_out(cut)
    files = [tmp_path / name / "chain-compress" / "model.safetensors" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
