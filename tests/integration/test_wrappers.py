"""Multimodal models: the language model is compressed, the other parts go along as they are, transformers' own class loads both.

The oracles are transformers' logits and the bytes of the checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress.engines.transformers import TransformersSource
from compress.errors import ConfigError, PlanError
from compress.models import load_spec
from compress.models.checkpoint import SINGLE, Checkpoint
from compress.models.surplus import surplus
from compress.models.wrappers import WRAPPERS
from compress.plan import make_plan
from tests.contract.blocks import logits
from tests.integration.runs import carry_out, cheap, small
from tests.tiny import WRAPPED, tiny_wrapped

SIZES = {
    "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128,
    "num_hidden_layers": 2, "full_attention_interval": 2, "num_experts": 4,
}  # fmt: skip
NAMES = ("qwen3_5", "qwen3_5_moe")
IDS = torch.randint(0, 4000, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wrapped(request.param, tmp_path_factory.mktemp(request.param) / "model", dtype="bfloat16", **SIZES)


@pytest.mark.parametrize("name", sorted(WRAPPED))
def test_logits_are_transformers(name: str, tmp_path: Path) -> None:
    """Of the whole class, and every tensor of the file is known: in the decoder or beside it."""
    model = tiny_wrapped(name, tmp_path / "model")
    whole = TransformersSource(model)
    checkpoint = Checkpoint.open(model)
    spec = load_spec(checkpoint.config)
    weights = {t.name: checkpoint.load(t.name).float() for t in spec.tensors()}
    with torch.no_grad():
        theirs, ours = whole.model(IDS).logits, logits(spec, weights, IDS)
    assert theirs.std() > 0.1 and (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    found = surplus(spec, checkpoint)
    assert whole.ignored == () and not found.problems and not found.left
    assert {t.beside.split(".")[-1] for t in found.beside} <= {
        "visual", "vision_tower", "embed_vision", "multi_modal_projector", "vision_model",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_what_was_renamed_loads_again(name: str, tmp_path: Path) -> None:
    """transformers saves these under the names of an earlier version; what ships has today's, and its gate loads it."""
    model = tiny_wrapped(name, tmp_path / "model")
    sets = ("steps=[{quantize: {rules: [{targets: [attention, mlp], codec: int4-g32}], solver: rtn}}]",)
    card = carry_out(small("quip-2bit", model, tmp_path / "out", *sets))
    assert card.gate.passed, card.gate
    stored, made = load_file(model / SINGLE), load_file(tmp_path / "out" / card.artifacts[0].path / SINGLE)
    others = {key: values for key, values in stored.items() if not key.startswith("language_model.")}
    assert others and all(torch.equal(made[WRAPPERS[name].here(key)], values) for key, values in others.items())


@pytest.mark.parametrize("name", ["gptq-w4-g128", "quip-2bit"])
def test_other_parts_go_along_byte_for_byte(name: str, model: Path, tmp_path: Path) -> None:
    recipe = small(name, model, tmp_path / "out", "calibration.samples=2", *cheap(name))
    plan, card = make_plan(recipe), carry_out(recipe)
    assert card.gate.passed, card.gate
    stored, made = load_file(model / SINGLE), load_file(tmp_path / "out" / card.artifacts[0].path / SINGLE)
    others = {key for key in stored if ".language_model." not in key and key != "lm_head.weight"}
    assert others and all(made[key].dtype == stored[key].dtype for key in others)
    assert all(torch.equal(made[key].view(torch.uint8), stored[key].view(torch.uint8)) for key in others)
    assert any("goes along" in note and "as it is" in note and "model.visual" in note for note in card.notes)
    config = json.loads((tmp_path / "out" / card.artifacts[0].path / "config.json").read_text())
    original = json.loads((model / "config.json").read_text())
    assert config["text_config"] == original["text_config"] and config["vision_config"] == original["vision_config"]
    assert plan.parameters == sum(t.numel() for t in stored.values())


@pytest.mark.parametrize("name", ["int4-g32", "nf4"])
def test_their_engines_leave_the_other_parts_alone(name: str, model: Path, tmp_path: Path) -> None:
    """What transformers loads computes what was solved: no module outside the language model is taken for a quantized one."""
    container = {"int4-g32": "compressed-tensors", "nf4": "bitsandbytes"}[name]
    rule = f"{{targets: [attention, mlp, shared_experts], codec: {name}}}"
    if name == "int4-g32":
        rule = rule.replace("mlp", "mlp, routed_experts")
    sets = (f"steps=[{{quantize: {{rules: [{rule}], solver: rtn}}}}]", f"export=[{{container: {container}}}]")
    card = carry_out(small("gptq-w4-g128", model, tmp_path / "out", *sets))
    assert card.gate.passed, card.gate
    folder = tmp_path / "out" / card.artifacts[0].path
    loaded = TransformersSource(folder).model
    assert f'AutoModelForImageTextToText.from_pretrained("{folder.name}")' in (folder.parent / "README.md").read_text()
    visual = dict(loaded.model.visual.named_parameters())
    stored = load_file(model / SINGLE)
    assert visual and all(torch.equal(p, stored[f"model.visual.{n}"].float()) for n, p in visual.items())


def test_gguf_holds_the_language_model_alone(model: Path, tmp_path: Path) -> None:
    recipe = small("gguf-q4-k-m", model, tmp_path / "out", "calibration.samples=2")
    plan, card = make_plan(recipe), carry_out(recipe)
    assert card.gate.passed, card.gate
    assert any("model.visual" in note and "left out of gguf" in note for note in card.notes)
    inside = load_spec(Checkpoint.open(model).config)
    weights = card.artifacts[0].bytes * 8 / card.artifacts[0].bits_per_weight
    assert weights == pytest.approx(inside.parameters, rel=1e-3) and plan.original_parameters > inside.parameters


def test_the_language_models_class_loads_our_container(model: Path, tmp_path: Path) -> None:
    """AutoModelForCausalLM makes a text model of the folder; its modules have other names than the file's."""
    import transformers

    sets = ("steps=[{quantize: {rules: [{targets: [attention, mlp, routed_experts], codec: int4-g32}], solver: rtn}}]",)
    card = carry_out(small("quip-2bit", model, tmp_path / "out", *sets))
    folder = tmp_path / "out" / card.artifacts[0].path
    whole = TransformersSource(folder)
    alone = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(alone).__name__.endswith("ForCausalLM")
    with torch.no_grad():
        torch.testing.assert_close(alone(IDS).logits, whole.model(IDS).logits)


def test_rotations_of_the_stream_are_refused_with_the_reason(model: Path, tmp_path: Path) -> None:
    steps = "steps=[{rotate: {kinds: [R1]}}, {quantize: {scheme: W4A16_G32}}]"
    with pytest.raises(
        PlanError, match="the other parts of .*ForConditionalGeneration write to the stream that R1 turns"
    ):
        make_plan(small("gptq-w4-g128", model, tmp_path / "out", steps))
    make_plan(
        small("gguf-q4-k-m", model, tmp_path / "out", "steps=[{rotate: {kinds: [R1]}}, {quantize: {scheme: Q4_K_M}}]")
    )


def test_a_plan_from_config_json_alone_says_so(model: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text((model / "config.json").read_text())
    plan = make_plan(small("gptq-w4-g128", tmp_path / "model", tmp_path / "out", "calibration.length=64"))
    assert any("parts around its language model go along in gptq as they are" in line for line in plan.warnings)


# -- config.json and names
def test_names_of_other_versions_are_read(tmp_path: Path) -> None:
    """Wrappers of LLaVA's kind have had two layouts; both are the same tensors here."""
    wrapper = WRAPPERS["gemma3"]
    there = {"language_model.model.layers.0.mlp.up_proj.weight": "model.language_model.layers.0.mlp.up_proj.weight",
             "language_model.lm_head.weight": "lm_head.weight",
             "vision_tower.vision_model.post_layernorm.bias": "model.vision_tower.vision_model.post_layernorm.bias",
             "multi_modal_projector.linear_1.weight": "model.multi_modal_projector.linear_1.weight"}  # fmt: skip
    assert {name: wrapper.here(name) for name in there} == there
    assert {name: wrapper.here(name) for name in there.values()} == {name: name for name in there.values()}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"text_config": None}, "text_config: expected the language model's own keys"),
        ({"architectures": ["Qwen3_5ForTokenClassification"]}, "is no class of model_type"),
    ],
)
def test_wrong_configs_are_told(change: dict[str, object], told: str, model: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        load_spec({**json.loads((model / "config.json").read_text()), **change})


def test_the_head_is_tied_as_the_wrapper_says(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    inside = {**config["text_config"], "tie_word_embeddings": True}
    assert not load_spec({**config, "text_config": inside}).tied
    tied = load_spec({**config, "tie_word_embeddings": True})
    assert tied.tied and "lm_head.weight" not in tied.by_name
    assert tied.untied().config_json["tie_word_embeddings"] is False
