"""End-to-end recovery: gradients against one graph and against transformers, figures against the bytes that ship, and
its promises: never worse, the same bytes after a kill, off when switched off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.codecs import block_codec
from compress.decode import decode
from compress.models.checkpoint import Checkpoint
from compress.models.forward import forward_block, rms_norm
from compress.plan import Plan, make_plan
from compress.recipe import load_recipe
from compress.recover import end_to_end as stage
from compress.recover.end_to_end import CHANGE, Compressed, Original
from compress.recover.parameters import BETAS, TunedScales
from compress.report.progress import Reporter
from compress.run import compress_model, load_calibration, run
from compress.run import recover as caller
from compress.run.source import working_model
from compress.solve.files import load_outcomes, save_outcomes
from compress.solve.tensor import Outcome, Solved
from compress.solvers import rtn
from compress.solvers.options import RtnOptions
from compress.streaming.journal import Journal
from compress.transforms.incoherence import Incoherence
from tests.integration.runs import text_file, without_times
from tests.tiny import tiny_model

RECIPE = """
calibration: {samples: 16, length: 32}
steps:
  - quantize: {solver: {name: rtn}, rules: [{targets: [routed_experts, mlp], codec: CODEC},
                                             {targets: [attention], codec: q8_0}, {targets: [router, norms], codec: f32}]}
  - recover: {loss: mse, epochs: 1}
export: [{container: safetensors}]
score: false
"""
CODECS = [
    "q8_0",
    "q2_k",
    "iq2_xxs",
    "q5_1",
    "int4-g32-asym",
    "int8-row",
    "nf4",
    "nf4-dq",
    "fp4",
    "mxfp4",
    "e8p",
    "trellis2",
]
EXACT = {"atol": 1e-6, "rtol": 1e-3}


def _plan(folder: Path, family: str = "qwen3_moe", codec: str = "q4_0", *sets: str, **model: object) -> Plan:
    """A plan of the recipe above on a tiny random model."""
    (folder / "recovered.yaml").write_text(RECIPE.replace("CODEC", codec))
    text = text_file(folder / "text.txt", words=2000)
    place = tiny_model(family, folder / "model", **model)
    recipe = load_recipe(
        folder / "recovered.yaml",
        [f"calibration.dataset={text}", *sets],
        model=str(place),
        output=str(folder / "out"),
    )
    return make_plan(recipe, weights=True)


def _carry_out(plan: Plan, folder: Path) -> Journal:
    journal = Journal.open(folder, plan.digest)
    with torch.inference_mode():
        compress_model(plan, Checkpoint.open(plan.source), journal, Reporter(0))
    return journal


def _report(journal: Journal) -> Mapping:
    return journal.units["recovered"]["recovered"]


def _whole(spec: object, dense: Callable[[str], Tensor], ids: np.ndarray) -> Tensor:
    """Log-probabilities of the whole model in one graph, [windows, length, vocabulary]."""
    hidden = dense("model.embed_tokens.weight")[torch.from_numpy(ids).long()]
    for layer in range(spec.layers):
        hidden = forward_block(spec, layer, {t.name: dense(t.name) for t in spec.block_tensors(layer)}, hidden)
    head = dense("model.embed_tokens.weight" if spec.tied else "lm_head.weight")
    return (rms_norm(hidden, dense("model.norm.weight"), spec.norm_eps) @ head.T).log_softmax(-1)


def _divergence(plan: Plan, dense: Callable[[str], Tensor], windows: slice) -> float:
    """Mean KL divergence from the original on some calibration windows."""
    ids = load_calibration(plan)[windows]
    load = working_model(plan, Checkpoint.open(plan.source))
    p, q = _whole(plan.spec, lambda n: load(n).float(), ids).double(), _whole(plan.spec, dense, ids).double()
    return float((p.exp() * (p - q)).sum(-1).mean())


# -- one step ----------------------------------------------------------------------------------------------------------


def _stopped(plan: Plan, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Journal, stage._Run]:
    """A run that has come to this stage, and the stage about to take its first step."""
    held: list[tuple] = []
    with monkeypatch.context() as patch:
        patch.setattr(caller, "finetune", lambda *a, **k: held.append(a) or (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            _carry_out(plan, folder)
    model, original, options, scratch, *_ = held[0]
    assert isinstance(model, Compressed) and isinstance(original, Original)
    with torch.inference_mode(False):
        made = stage._Run(model, original, options, scratch, model.inputs.shape[0] - 2)
        made.held_out_divergence(stored=False)
    return Journal.open(folder, plan.digest), made


def _gradients(made: stage._Run, picks: list[int]) -> dict[str, Tensor]:
    """Gradient of every tuned tensor's first parameter, from Adam's first mean."""
    made.step(picks, 0, 0.0)
    out = {}
    for block in made.model.blocks():
        tuned, _, optimizer = made.read(block)
        assert not made.states[block.layer][CHANGE].any()  # a step of size zero
        assert all(len(t.steps) == 1 for t in tuned.values())
        for name, (mean, _) in zip(tuned, optimizer.moments, strict=True):
            out[name] = mean / (1 - BETAS[0])
    out["model.norm.weight"] = made.norm_optimizer.moments[0][0] / (1 - BETAS[0])
    return out


def _expected(name: str, gradient: Tensor, value: Tensor, journal: Journal) -> Tensor:
    """The chain rule by hand: floats and finely rounded weights move in units of their size, q4_0's 32 weights share a
    factor."""
    if journal.fetch(name).codec == "q4_0":
        return (gradient * value).reshape(len(value), -1, 32).sum(-1)
    return gradient * value.square().mean().sqrt()


def test_a_streamed_step_has_the_gradient_of_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "LOGIT_VALUES", 4096 * 7)  # logits in uneven pieces
    plan = _plan(tmp_path)
    journal, made = _stopped(plan, tmp_path / "work", monkeypatch)
    picks = [3, 9, 4]
    leaves = {t.name: decode(journal.fetch(t.name)).requires_grad_() for t in plan.tensors}
    ids, load = load_calibration(plan)[picks], Checkpoint.open(plan.source).load
    with torch.no_grad():
        p = _whole(plan.spec, lambda n: load(n).float(), ids)
    (p.exp() * (p - _whole(plan.spec, leaves.__getitem__, ids))).sum(-1).mean().backward()
    found = _gradients(made, picks)
    assert len(found) == len([t for t in plan.tensors if t.spec.layer is not None]) + 1
    for name, gradient in found.items():
        whole = leaves[name].grad if leaves[name].grad is not None else torch.zeros_like(leaves[name])
        torch.testing.assert_close(gradient, _expected(name, whole, leaves[name].detach(), journal), **EXACT)


def test_a_dense_family_has_the_gradient_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    plan = _plan(tmp_path, "llama")
    journal, made = _stopped(plan, tmp_path / "work", monkeypatch)
    model, original = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model") for _ in range(2))
    own = dict(model.named_parameters())
    with torch.no_grad():
        for t in plan.tensors:
            own[t.name].copy_(decode(journal.fetch(t.name)))
        ids = torch.from_numpy(load_calibration(plan)[[0, 5]]).long()
        p = original(ids).logits.log_softmax(-1)
    F.kl_div(model(ids).logits.log_softmax(-1), p, log_target=True, reduction="sum").div(ids.numel()).backward()
    for name, gradient in _gradients(made, [0, 5]).items():
        torch.testing.assert_close(
            gradient, _expected(name, own[name].grad, own[name].detach(), journal), atol=1e-5, rtol=1e-2
        )


# -- what is kept ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "codec", "sets", "model"),
    [
        ("qwen3_moe", "q4_0", (), {}),
        ("qwen3_moe", "nf4-dq", (), {"tie_word_embeddings": True, "moe_intermediate_size": 64}),
        ("llama", "int4-g32-asym", (), {}),
    ],
)  # fmt: skip
def test_reported_divergences_are_those_of_the_bytes(
    tmp_path: Path, family: str, codec: str, sets: tuple[str, ...], model: dict
) -> None:
    plan = _plan(tmp_path, family, codec, *sets, "steps[1].recover.end_to_end=2", **model)
    journal = _carry_out(plan, tmp_path / "work")
    report = _report(journal)
    assert report["kept"] and report["after"] < report["before"]
    own = {k: v for k, v in journal.units.items() if not k.startswith("recovered")}
    blockwise = Journal(journal.folder, plan.digest, own)
    for told, shipped in (("before", blockwise), ("after", Journal.open(journal.folder, plan.digest))):
        measured = _divergence(plan, lambda n, j=shipped: decode(j.fetch(n)), slice(14, 16))
        assert report[told] == pytest.approx(measured, rel=1e-3)
    moved = [t.name for t in plan.tensors if not _same(journal, blockwise, t.name)]
    assert "model.norm.weight" in moved and any("down_proj" in name for name in moved)
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & set(moved)
    left = {p.name for p in journal.folder.iterdir()}
    assert not any(name.startswith(("outcomes", "recover-", "original", "activations")) for name in left)


def _same(one: Journal, two: Journal, name: str) -> bool:
    first, second = one.fetch(name), two.fetch(name)
    return all(torch.equal(first.parts[part], second.parts[part]) for part in first.parts)


def test_a_rotated_model_is_tuned_for_its_own_original(tmp_path: Path) -> None:
    """A tied model, untied by its rotation: the logits are those of the model before it."""
    plan = _plan(tmp_path, "qwen3", "q4_0", tie_word_embeddings=True)
    recipe = tmp_path / "recovered.yaml"
    recipe.write_text(recipe.read_text().replace("steps:\n", "steps:\n  - rotate: {}\n"))
    rotated = make_plan(
        load_recipe(recipe, [f"calibration.dataset={tmp_path / 'text.txt'}"], model=plan.recipe.model), weights=True
    )
    assert not rotated.spec.tied
    journal = _carry_out(rotated, tmp_path / "work")
    report = _report(journal)
    ids, load = load_calibration(plan)[14:], Checkpoint.open(plan.source).load
    p = _whole(plan.spec, lambda n: load(n).float(), ids).double()
    q = _whole(rotated.spec, lambda n: decode(journal.fetch(n)), ids).double()
    assert report["kept"]
    assert report["after"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_a_model_that_gets_worse_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the scorecard says so; the blocks' own recovery is as always."""
    plan = _plan(tmp_path)
    descend = stage._descend

    def far_off(made: stage._Run, *rest: object) -> object:
        made.options = made.options.model_copy(update={"lr_floats": 5.0, "lr_scales": 5.0, "lr_codes": 5.0})
        return descend(made, *rest)

    monkeypatch.setattr(stage, "_descend", far_off)
    card = run(plan.recipe, keep_work=True)
    journal = Journal.open(tmp_path / "out" / ".work", plan.digest)
    report = _report(journal)
    assert not report["kept"] and report["reason"] and report["after"] >= report["before"]
    told = [f for f in card.fallbacks if f.wanted == "end-to-end recovery"]
    assert len(told) == 1 and told[0].reason == report["reason"]
    assert set(journal.units) == {"inspected", "embeddings", "block-00000", "block-00001", "head", "recovered"}
    off = _carry_out(make_plan(_with(plan, 0), weights=True), tmp_path / "off")
    assert all(_same(journal, off, t.name) for t in plan.tensors)


def _with(plan: Plan, epochs: int) -> object:
    """The plan's recipe with another number of epochs."""
    text = plan.recipe.calibration.dataset
    sets = [f"calibration.dataset={text}", f"steps[1].recover.end_to_end={epochs}"]
    return load_recipe(Path(plan.source).parent / "recovered.yaml", sets, model=str(plan.source))


def test_switched_off_it_leaves_no_trace(tmp_path: Path) -> None:
    plan = _plan(tmp_path, "qwen3_moe", "q4_0", "steps[1].recover.end_to_end=0")
    journal = _carry_out(plan, tmp_path / "work")
    assert "recovered" not in journal
    assert {p.suffix for p in journal.folder.iterdir()} == {".json", ".safetensors"}
    assert not list(journal.folder.glob("outcomes*"))


def test_a_stage_killed_at_any_moment_comes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = _plan(tmp_path)
    largest = [0]
    write = Journal.write

    def watched(self: Journal, *rest: object) -> None:
        write(self, *rest)
        largest[0] = max(largest[0], sum(p.stat().st_size for p in self.folder.iterdir()))

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", watched)
        whole = _carry_out(plan, tmp_path / "whole")
    assert _report(whole)["kept"] and largest[0] < plan.disk_bytes

    def killed(method: str, unit: str) -> None:
        plain = getattr(Journal, method)

        def at(self: Journal, units: object, *rest: object) -> None:
            if unit in units if isinstance(units, dict) else unit == units:
                raise KeyboardInterrupt
            plain(self, units, *rest)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Journal, method, at)
            _carry_out(plan, tmp_path / "killed")

    killed("name", "head")
    killed("write", "recovered-00001")
    killed("name", "recovered")
    resumed = _carry_out(plan, tmp_path / "killed")
    assert without_times(resumed) == without_times(whole)
    assert all(_same(whole, resumed, t.name) for t in plan.tensors)


def test_artifacts_hold_what_the_last_stage_left(tmp_path: Path) -> None:
    """The journal's later unit wins wherever tensors are read."""
    from safetensors.torch import load_file

    plan = _plan(tmp_path)
    card = run(plan.recipe, keep_work=True)
    assert card.gate.passed and "recover" in [s.name for s in card.stages]
    journal = Journal.open(tmp_path / "out" / ".work", plan.digest)
    shipped = {}
    for file in (tmp_path / "out" / card.artifacts[0].path).glob("*.safetensors"):
        shipped |= load_file(file)
    own = {k: v for k, v in journal.units.items() if not k.startswith("recovered")}
    blockwise = Journal(journal.folder, plan.digest, own)
    for name in ("model.norm.weight", "model.layers.1.mlp.experts.0.down_proj.weight"):
        assert torch.equal(shipped[name].float(), decode(journal.fetch(name)))
        assert not torch.equal(shipped[name].float(), decode(blockwise.fetch(name)))


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("incoherent", [False, True])
def test_solved_tensors_come_back_from_disk(tmp_path: Path, name: str, incoherent: bool) -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    signs = Incoherence.draw(16, 256, 1, 2) if incoherent else None
    solution = rtn.solve(weight, None, block_codec(name, 256), RtnOptions())
    outcome = Outcome(solution, signs, Solved("x", name, "rtn", solution.error, tokens=5))
    save_outcomes(tmp_path / "file", {"x": outcome, "y": replace(outcome, incoherence=None)})
    loaded = load_outcomes(tmp_path / "file")
    assert list(loaded) == ["x", "y"] and loaded["x"].report == outcome.report
    assert torch.equal(loaded["x"].solution.units, solution.units)
    one, two = outcome.pack(), loaded["x"].pack()
    assert list(one.parts) == list(two.parts)
    assert all(torch.equal(one.parts[part], two.parts[part]) for part in one.parts)
    assert torch.equal(decode(two), decode(one))


@pytest.mark.parametrize(
    "name", ["q2_k", "iq2_xxs", "iq1_s", "iq1_m", "q3_k", "q4_1", "int4-g32-asym", "nf4-dq", "e8p"]
)
def test_what_is_tuned_is_what_is_stored(name: str) -> None:
    """Scales that start at zero stand for the bytes, and moved ones for those that will be stored."""
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    solution = rtn.solve(weight, None, block_codec(name, 256), RtnOptions())
    outcome = Outcome(solution, None, Solved("x", name, "rtn", solution.error))
    tuned, before = TunedScales(outcome, 0.01), decode(outcome.pack())
    torch.testing.assert_close(tuned.dense().detach(), before, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        for parameter, _ in tuned.steps:
            parameter += 0.25
    stored = decode(tuned.stored().pack())
    assert (tuned.dense().detach() - stored).norm() < 0.01 * (stored - before).norm()


def test_memory_and_disk_count_it(tmp_path: Path) -> None:
    few, many = (_plan(_made(tmp_path / str(n)), num_hidden_layers=n) for n in (2, 4))
    without = make_plan(_with(few, 0))
    assert few.peak_memory_bytes == many.peak_memory_bytes > without.peak_memory_bytes
    assert without.disk_bytes < few.disk_bytes < many.disk_bytes


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
