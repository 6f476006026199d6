"""Heads that predict further tokens: they go along in every container that has a place for them, rounded by the rule `mtp` alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress.containers import CONTAINERS
from compress.engines.transformers import TransformersSource
from compress.models import load_spec
from compress.models.checkpoint import SINGLE, Checkpoint
from compress.models.draft import draft_of
from compress.plan import make_plan
from tests.integration.runs import carry_out, small
from tests.tiny import tiny_model, with_tensors

HIDDEN = 64


def _draft() -> dict[str, torch.Tensor]:
    """The draft layer of a dense Qwen3.5, as its checkpoints have it."""
    generator = torch.Generator().manual_seed(7)
    shapes = {
        "fc.weight": (HIDDEN, 2 * HIDDEN), "pre_fc_norm_embedding.weight": (HIDDEN,), "pre_fc_norm_hidden.weight": (HIDDEN,),
        "norm.weight": (HIDDEN,), "layers.0.input_layernorm.weight": (HIDDEN,),
        "layers.0.post_attention_layernorm.weight": (HIDDEN,), "layers.0.self_attn.q_proj.weight": (256, HIDDEN),
        "layers.0.self_attn.k_proj.weight": (64, HIDDEN), "layers.0.self_attn.v_proj.weight": (64, HIDDEN),
        "layers.0.self_attn.o_proj.weight": (HIDDEN, 128), "layers.0.self_attn.q_norm.weight": (32,),
        "layers.0.self_attn.k_norm.weight": (32,), "layers.0.mlp.gate_proj.weight": (96, HIDDEN),
        "layers.0.mlp.up_proj.weight": (96, HIDDEN), "layers.0.mlp.down_proj.weight": (HIDDEN, 96),
    }  # fmt: skip
    return {f"mtp.{n}": torch.randn(s, generator=generator).to(torch.bfloat16) for n, s in shapes.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model("qwen3_5_text", tmp_path_factory.mktemp("mtp") / "model", dtype="bfloat16")
    return with_tensors(folder, _draft())


def _made(model: Path, output: Path, container: str, rules: str) -> tuple[Path, dict[str, torch.Tensor]]:
    sets = (f"steps=[{{quantize: {{rules: [{rules}], solver: rtn}}}}]", f"export=[{{container: {container}}}]")
    recipe = small("gptq-w4-g128", model, output, *sets)
    card = carry_out(recipe)
    assert card.gate.passed, card.gate
    folder = output / card.artifacts[0].path
    return folder, load_file(folder / SINGLE)


DECODER = "{targets: [attention], codec: int4-g32}"
FOLDERS = {
    "gptq": "int4-g32", "compressed-tensors": "int4-g32", "awq": "int4-g32-asym", "bitsandbytes": "nf4", "compress": "e8p",
    "safetensors": "int3-g32",
}  # fmt: skip


def test_every_folder_is_tried() -> None:
    assert set(FOLDERS) == {name for name, container in CONTAINERS.items() if not container.suffix}


@pytest.mark.parametrize("container", sorted(FOLDERS))
def test_unnamed_it_is_unchanged(container: str, model: Path, tmp_path: Path) -> None:
    """In each folder, which transformers still loads; and named it has the rule's codes, rounded to nearest."""
    codec = FOLDERS[container]
    rule = DECODER.replace("int4-g32", codec)
    folder, stored = _made(model, tmp_path / "floats", container, rule)
    assert all(torch.equal(stored[name], values) for name, values in _draft().items())
    if CONTAINERS[container].engine is not None:
        assert not [name for name in TransformersSource(folder).ignored if not name.startswith("mtp.")]
    spec = load_spec(Checkpoint.open(folder).config)
    assert {name for name in stored if name.startswith("mtp.")} == set(_draft()) and spec.layers == 4


@pytest.mark.parametrize("container", ["compressed-tensors", "gptq", "compress"])
def test_the_rule_rounds_its_matrices_to_nearest(container: str, model: Path, tmp_path: Path) -> None:
    rules = f"{DECODER}, {{targets: mtp, codec: int8-g32}}"
    sets = (f"steps=[{{quantize: {{rules: [{rules}], solver: gptq}}}}]", f"export=[{{container: {container}}}]")
    plan = make_plan(small("gptq-w4-g128", model, tmp_path / "out", *sets))
    coded = {t.name: t for t in plan.tensors if t.spec.role == "mtp"}
    assert len(coded) == 8 and all(t.codec == "int8-g32" and t.label == "rtn" for t in coded.values())
    card = carry_out(plan.recipe)
    assert card.gate.passed, card.gate
    folder = tmp_path / "out" / card.artifacts[0].path
    spec = make_plan(plan.recipe).spec
    load = CONTAINERS[container].open_dense(folder, spec)
    for name, values in _draft().items():
        gap = float((load(name) - values.float()).norm() / values.float().norm())
        assert 1e-4 < gap < 1e-2 if name in coded else gap == 0, (name, gap)
    assert any("MTP (15 tensors" in note and "as the recipe rounds it" in note for note in card.notes)


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ("{prune_structured: {ratio: 0.25}}", "prune_structured give config.json other sizes than it has"),
        ("{rotate: {kinds: [R1]}}", "rotate turns the stream that it reads"),
    ],
)
def test_it_is_left_out_of_another_decoder_with_the_reason(steps: str, why: str, model: Path, tmp_path: Path) -> None:
    sets = f"steps=[{steps}, {{quantize: {{rules: [{DECODER}]}}}}]"
    plan = make_plan(small("gptq-w4-g128", model, tmp_path / "out", sets))
    assert any(line.startswith("MTP (15 tensors") and line.endswith(f"is left out: {why}") for line in plan.warnings)
    assert not [t for t in plan.tensors if t.name.startswith("mtp.")]


# -- llama.cpp, which reads the layer behind the last block
def _draft_of(family: str, folder: Path, *, fused: bool = False) -> dict[str, torch.Tensor]:
    """Random values for all that the family declares of its draft layer; fused: experts as published checkpoints have them."""
    generator = torch.Generator().manual_seed(5)
    spec = load_spec(Checkpoint.open(folder).config)
    made = {t.name: torch.randn(t.shape, generator=generator) * 0.1 for t in draft_of(spec)}
    if not fused:
        return made
    front = "mtp.layers.0.mlp.experts."
    each = {
        part: [made.pop(f"{front}{e}.{part}_proj.weight") for e in range(spec.experts)]
        for part in ("gate", "up", "down")
    }
    both = [torch.cat(pair) for pair in zip(each["gate"], each["up"], strict=True)]
    return made | {f"{front}gate_up_proj": torch.stack(both), f"{front}down_proj": torch.stack(each["down"])}


@pytest.mark.parametrize(
    ("family", "fused"), [("qwen3_5_text", False), ("qwen3_5_moe_text", True), ("qwen3_next", False)]
)
def test_llama_cpp_loads_it_behind_the_last_block(family: str, fused: bool, tmp_path: Path) -> None:
    """It refuses files with tensors that it does not know; the gate compares its logits and every tensor read back."""
    from gguf import GGUFReader

    model = tiny_model(family, tmp_path / "model")
    with_tensors(model, _draft_of(family, model, fused=fused))
    rules = "[{targets: [attention], codec: q8_0}, {targets: mtp, codec: q8_0}]"
    sets = (f"steps=[{{quantize: {{rules: {rules}, solver: rtn}}}}]", "export=[{container: gguf}]")
    card = carry_out(small("gguf-q4-k-m", model, tmp_path / "out", *sets))
    assert card.gate.passed, card.gate
    reader = GGUFReader(tmp_path / "out" / card.artifacts[0].path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    arch = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    assert reader.fields[f"{arch}.nextn_predict_layers"].contents() == 1
    assert reader.fields[f"{arch}.block_count"].contents() == 5
    assert {name for name in stored if name.startswith("blk.4.nextn.")} == {
        f"blk.4.nextn.{part}.weight" for part in ("eh_proj", "enorm", "hnorm", "shared_head_norm")
    }
    assert stored["blk.4.nextn.eh_proj.weight"].tensor_type.name == "Q8_0"
    again = Checkpoint.open(tmp_path / "out" / card.artifacts[0].path)
    assert load_spec(again.config).layers == 4
