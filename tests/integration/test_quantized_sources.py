"""Models that are quantized already, compressed: what they decode to is the original of a run.

The oracles are what our own runs kept of the folders they wrote, and the floats that FP8 was made from here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.engines.open import open_model
from compress.engines.speech import open_speaker
from compress.engines.streamed import StreamedSource
from compress.errors import PlanError, UnsupportedModel
from compress.models.checkpoint import Checkpoint, checkpoint_problems, own_codec
from compress.models.surplus import Surplus, surplus
from compress.plan import make_plan
from compress.recipe import load_recipe
from compress.report.compare import same_original
from tests.integration.containers import token_ids
from tests.integration.runs import carry_out, command, kept, sha256, small, spec_of
from tests.tiny import tiny_model, tiny_wrapped

ENGINES = {"gptq": "gptq-w4-g128", "awq": "awq-w4-g128", "compressed-tensors": "W4A16", "bitsandbytes": "nf4-dq"}
ROUTED = "model.layers.0.mlp.experts"
WIDE = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 4096}


def fp8(model: Path, folder: Path, block: int = 32) -> Path:
    """A folder as transformers saves FP8: matrices of the blocks in float8, scales of `block` x `block`, in bfloat16 the rest."""
    shutil.copytree(model, folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(model / "model.safetensors").items():
        inside = "layers" in name or "visual.blocks" in name
        if weight.dim() != 2 or not inside or name.endswith("mlp.gate.weight"):
            tensors[name] = weight.bfloat16()
            continue
        rows, columns = weight.shape
        padded = torch.nn.functional.pad(weight.float(), (0, -columns % block, 0, -rows % block))
        blocks = padded.unflatten(0, (-1, block)).unflatten(2, (-1, block))
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        tensors[name] = codes.flatten(2).flatten(0, 1)[:rows, :columns].contiguous()
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "dynamic"}
    return marked(folder, quantization_config=settings, dtype="bfloat16")


def suite(folder: Path) -> Path:
    (path := folder / "suite.yaml").write_text("{name: small, text: wikipedia, windows: 2, length: 64}\n")
    return path


def marked(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize("container", ENGINES)
def test_our_own_folders_decode_to_what_was_solved(container: str, tmp_path: Path) -> None:
    model = tiny_model("qwen2", tmp_path / "model", **WIDE)
    recipe = small(ENGINES[container], model, tmp_path / "out", f"export=[{{container: {container}}}]")
    card = carry_out(recipe, keep_work=True)
    folder = tmp_path / "out" / card.artifacts[0].path
    checkpoint, solved = Checkpoint.open(folder), kept(recipe)
    spec = spec_of(model)
    assert checkpoint_problems(spec, checkpoint) == [] and surplus(spec, checkpoint) == Surplus()
    assert sum(entry.quantized for entry in checkpoint.entries.values()) == 7
    for name, values in solved.items():
        assert torch.equal(checkpoint.load(name).float(), values), name
    plan = make_plan(recipe.model_copy(update={"model": str(folder)}))
    assert any("already quantized" in line and "7 tensors" in line for line in plan.warnings)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    model = tiny_model("qwen3_moe", folder / "model", num_experts=4, num_hidden_layers=1, intermediate_size=80)
    return fp8(model, folder / "Tiny-FP8")


def test_an_fp8_folder_is_compressed(moe: Path, tmp_path: Path) -> None:
    """What decodes is the original; its type and its settings do not ship."""
    recipe = small("gptq-w4-g128", moe, tmp_path / "out", "scheme=W4A16_G32", f"score.suite={suite(tmp_path)}")
    plan = make_plan(recipe)
    assert plan.own_codec == "bf16" and own_codec(plan.original, Checkpoint.open(moe)) == "bf16"
    card = carry_out(recipe)
    assert card.gate.passed and any("already quantized (" in note and "FP8" in note for note in card.notes)
    config = json.loads((tmp_path / "out" / card.artifacts[0].path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq" and config["dtype"] == "bfloat16"
    assert card.artifacts[0].scores.kld.mean > 0


def test_logits_are_those_of_transformers(moe: Path) -> None:
    """Which reads the folder by itself, and decodes it to floats."""
    import transformers

    decoded = transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=(32, 32))
    model = transformers.AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32, quantization_config=decoded)
    ids, opened = token_ids(), open_model(str(moe))
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids[None])).logits[0].numpy()
    (found,) = StreamedSource(opened.spec, opened.load, "decoded").logits([ids])
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_dense_results_say_nothing_of_the_source(moe: Path, tmp_path: Path) -> None:
    recipe = small(
        "gptq-w4-g128", moe, tmp_path / "out", "steps=[]", "score=false", "export=[{container: safetensors}]"
    )
    carry_out(recipe)
    (folder,) = (path.parent for path in (tmp_path / "out").glob("*/config.json"))
    config, found = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    original = Checkpoint.open(moe)
    assert set(found) == set(original.entries)
    for name, values in found.items():
        assert values.dtype == torch.bfloat16 and torch.equal(values, original.load(name).bfloat16()), name
    assert not any(name.endswith("_scale_inv") for name in found)


def test_parts_beside_the_language_model_may_be_quantized_too(tmp_path: Path) -> None:
    """They go along as what they decode to."""
    sizes = {"num_hidden_layers": 2, "full_attention_interval": 2, "intermediate_size": 64}
    folder = fp8(tiny_wrapped("qwen3_5", tmp_path / "model", dtype="bfloat16", **sizes), tmp_path / "fp8")
    checkpoint = Checkpoint.open(folder)
    coded = [name for name, entry in checkpoint.entries.items() if entry.quantized]
    assert any(".visual." in name for name in coded) and any(".language_model." in name for name in coded)
    carry_out(small("gptq-w4-g128", folder, tmp_path / "out", "steps=[]", "export=[{container: safetensors}]"))
    (made,) = (path.parent for path in (tmp_path / "out").glob("*/config.json"))
    found = load_file(made / "model.safetensors")
    assert set(found) == set(checkpoint.entries) and "quantization_config" not in (made / "config.json").read_text()
    for name, values in found.items():
        assert values.dtype == torch.bfloat16 and torch.equal(values, checkpoint.load(name).bfloat16()), name


def test_a_model_that_only_decodes_is_talked_to_by_its_decoded_weights(moe: Path) -> None:
    with open_speaker(str(moe), 64) as speaker:
        assert any("decoded weights, no cache" in note for note in speaker.notes)


def test_experts_that_are_stacked_are_read_one_by_one(tmp_path: Path) -> None:
    """FP8 as transformers saves it: gate and up of all experts in one tensor, scales beside it."""
    model = tiny_model("qwen3_5_moe_text", tmp_path / "model", num_experts=4, num_hidden_layers=1)
    spec, tensors = spec_of(model), load_file(model / "model.safetensors")
    each = [[tensors.pop(f"{ROUTED}.{e}.{part}_proj.weight") for part in ("gate", "up", "down")] for e in range(4)]
    coded, decoded = dict(tensors), dict(tensors)
    for name, stack in {
        "gate_up_proj": torch.stack([torch.cat((gate, up)) for gate, up, _ in each]),
        "down_proj": torch.stack([down for _, _, down in each]),
    }.items():
        values, scale = stack.to(torch.float8_e4m3fn), torch.rand(4, 2, 1) + 0.5
        coded |= {f"{ROUTED}.{name}": values, f"{ROUTED}.{name}_scale_inv": scale}
        decoded[f"{ROUTED}.{name}"] = values.float() * scale.repeat_interleave(values.shape[1] // 2, 1)
    shutil.copytree(model, tmp_path / "fp8")
    save_file(coded, tmp_path / "fp8" / "model.safetensors", {"format": "pt"})
    save_file(decoded, model / "model.safetensors", {"format": "pt"})
    marked(tmp_path / "fp8", quantization_config={"quant_method": "fp8"})
    fused, plain = Checkpoint.open(tmp_path / "fp8"), Checkpoint.open(model)
    assert checkpoint_problems(spec, fused) == [] and surplus(spec, fused) == Surplus()
    assert all(torch.equal(fused.load(t.name), plain.load(t.name)) for t in spec.tensors())
    expert = fused.entries[f"{ROUTED}.3.up_proj.weight"]
    assert expert.quantized and expert.part is not None and expert.shape == (32, 64)


# -- the original beside it --------------------------------------------------------------------------------------------
def test_scores_compare_with_the_original_where_there_is_one(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """A dense copy of FP8 is as far from the model before it as `compress score` says, and nothing from the FP8 itself."""
    original = moe.parent / "model"
    recipe = small("gptq-w4-g128", moe, tmp_path / "out", "steps=[]", "export=[{container: safetensors}]")
    recipe = load_recipe(recipe, [f"score.suite={suite(tmp_path)}"], base=str(original))
    plan = make_plan(recipe)
    assert plan.base is not None and "scores compare with model" in plan.warnings
    card = carry_out(recipe)
    assert card.base.model == "model" and card.base.bytes == plan.base.bytes > plan.original_bytes
    assert card.artifacts[0].ratio == card.artifacts[0].bytes / card.base.bytes
    assert "scores compare with model" in card.notes and str(original.parent) not in card.to_json()
    folder = tmp_path / "out" / card.artifacts[0].path
    given = ("--against", str(original), "--suite", str(suite(tmp_path)), "--json")
    code, out, _ = command(monkeypatch, capfd, "score", str(folder), *given)
    apart = json.loads(out)["artifacts"][0]["scores"]["kld"]["mean"]
    assert code == 0 and card.artifacts[0].scores.kld.mean == pytest.approx(apart, rel=1e-6) and apart > 1e-3
    direct = card.model_copy(update={"model": "model", "base": card.base.model_copy(update={"model": None})})
    assert same_original(card, direct)  # one that was made of the original itself
    again = carry_out(recipe.model_copy(update={"score": recipe.score.model_copy(update={"base": None})}))
    assert again.artifacts[0].scores.kld.mean < apart / 10 and again.base.model is None
    assert any("--base MODEL" in note for note in again.notes) and not same_original(card, again)


def test_a_base_that_cannot_be_compared_is_refused_before_the_work(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    recipe = small("gptq-w4-g128", moe, tmp_path / "out", "scheme=W4A16_G32", f"score.suite={suite(tmp_path)}")
    smaller = tiny_model(
        "llama", tmp_path / "smaller", vocab_size=4000, num_hidden_layers=1, bos_token_id=1, eos_token_id=1
    )
    with pytest.raises(PlanError, match="vocabulary of 4,000, the model one of 4,096"):
        make_plan(load_recipe(recipe, base=str(smaller)))
    shutil.copytree(moe.parent / "model", tmp_path / "renamed")
    path = tmp_path / "renamed" / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["t"] = vocabulary["t"], vocabulary["a"]
    path.write_text(json.dumps(data))
    given = ("--model", str(moe), "--output", str(tmp_path / "out"), "--base", str(tmp_path / "renamed"))
    for verb in ("plan", "run"):
        code, _, error = command(monkeypatch, capfd, verb, "gptq-w4-g128", "--set", "scheme=W4A16_G32", *given)
        assert code == 1 and "another tokenizer than the model" in error, error
    assert not (tmp_path / "out" / "scorecard.json").exists()


@pytest.mark.parametrize("method", ["hqq", "compress", None])
def test_methods_that_are_not_read_are_refused_by_name(method: str | None, moe: Path, tmp_path: Path) -> None:
    shutil.copytree(moe, tmp_path / "model")
    marked(tmp_path / "model", quantization_config={"quant_method": method} if method else {"bits": 4})
    with pytest.raises(
        UnsupportedModel, match=f"already quantized \\({method or 'by a method'}.*not read; read are auto-round, awq"
    ):
        make_plan(small("gptq-w4-g128", tmp_path / "model", tmp_path / "out"))


def test_a_quantized_source_is_an_original_to_score_against(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """A folder held against itself: as far apart as nothing, and said to be quantized."""
    code, out, _ = command(
        monkeypatch, capfd, "score", str(moe), "--against", str(moe), "--suite", str(suite(tmp_path)), "--json"
    )
    card = json.loads(out)
    assert code == 0 and card["artifacts"][0]["scores"]["kld"]["mean"] == pytest.approx(0, abs=1e-6)
    assert any("already quantized" in note for note in card["notes"])


def test_a_run_with_an_adapter_is_one_on_the_merged_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The same bytes; files that ship know the adapter by its name."""
    model = tiny_model("llama", tmp_path / "model", num_hidden_layers=1)
    name, lora = "model.layers.0.self_attn.v_proj", tmp_path / "my-lora"
    low, high = torch.randn(4, 64) / 8, torch.randn(32, 4) / 8
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    tensors = {f"base_model.model.{name}.lora_A.weight": low, f"base_model.model.{name}.lora_B.weight": high}
    save_file(tensors, lora / "adapter_model.safetensors")
    shutil.copytree(model, tmp_path / "merged")
    weights = load_file(model / "model.safetensors")
    weights[f"{name}.weight"] = weights[f"{name}.weight"] + high @ low * 2.0
    save_file(weights, tmp_path / "merged" / "model.safetensors", {"format": "pt"})

    def artifact(folder: Path, *more: str) -> Path:
        given = ("--set", "scheme=W4A16_G32", "--set", "score=false", "--set", "samples=2", "--set", "length=32", *more)
        code, _, error = command(monkeypatch, capfd, "run", "gptq-w4-g128", "--output", str(folder), "--quiet", *given)
        assert code == 0, error
        return next(folder.glob("*/model.safetensors"))

    ours = artifact(tmp_path / "a", "--model", str(model), "--adapter", str(lora))
    plain = artifact(tmp_path / "b", "--model", str(tmp_path / "merged"))
    assert sha256(ours) == sha256(plain) != sha256(artifact(tmp_path / "c", "--model", str(model)))
    recipe = json.loads((tmp_path / "a" / "recipe.json").read_text())
    assert recipe["adapter"] == "my-lora" and str(tmp_path) not in json.dumps(recipe)
    made = json.loads((tmp_path / "a" / "reproduce.json").read_text())
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(made["original"]["files"])
    again = ("reproduce", str(tmp_path / "a"), "--model", str(model), "--output", str(tmp_path / "again"), "--quiet")
    code, _, error = command(monkeypatch, capfd, *again)
    assert code == 2 and "with --set adapter=..." in error
    code, _, error = command(monkeypatch, capfd, *again, "--set", f"adapter={lora}")
    assert code == 0, error
    notes = json.loads((tmp_path / "a" / "scorecard.json").read_text())["notes"]
    assert any("the adapter my-lora is merged into 1 tensors" in note for note in notes)
    code, _, error = command(monkeypatch, capfd, "plan", "gptq-w4-g128", "--model", str(lora))
    assert code == 2 and "give its model, and this folder with --adapter" in error
