"""Plans of pruning, factorisation and smaller models: bytes in closed form, what is saved where, what is refused and why."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from compress.errors import PlanError, RecipeError
from compress.plan import Plan, make_plan
from compress.recipe import load_recipe
from compress.report.plan_table import plan_table
from compress.weights import Pattern
from tests.unit.plan.test_plan import LARGE, SMALL, folder, plan_of

DENSE = {
    **{k: v for k, v in SMALL.items() if "expert" not in k},
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
}
QWEN2 = {
    **DENSE,
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "head_dim": None,
    "num_attention_heads": 8,
}


def planned(model: Path, steps: str, containers: str = "compress", **more: str) -> Plan:
    exports = ", ".join(f"{{container: {c}}}" for c in containers.split())
    sets = [f"steps={steps}", f"export=[{exports}]", "score=false", *(f"{k}={v}" for k, v in more.items())]
    return plan_of(model, "gptq-w4-g128", *sets)


def printed(plan: Plan) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(plan_table(plan))
    return console.file.getvalue()


def bytes_of(plan: Plan, role: str) -> int:
    return sum(t.bytes for t in plan.tensors if t.spec.role == role)


def problems(model: Path, steps: str, containers: str = "compress") -> str:
    with pytest.raises(PlanError) as error:
        planned(model, steps, containers)
    return str(error.value)


def test_masks_and_values_are_counted(tmp_path: Path) -> None:
    model = folder(tmp_path / "m")
    q, k = 256 * 512 * 3, 128 * 512 * 3
    half = planned(model, "[{prune: {sparsity: 0.5}}]")
    assert bytes_of(half, "attention.q") * 8 == q * (1 + 8)
    rules = "{targets: attention.k, sparsity: 4:8}, {targets: attention.v, sparsity: 0.25}"
    mixed = planned(model, f"[{{prune: {{sparsity: 2:4, rules: [{rules}], ignore: attention.o}}}}]")
    assert bytes_of(mixed, "attention.q") * 8 == q * (0.75 + 8)
    assert bytes_of(mixed, "attention.k") * 8 == k * (0.875 + 8)
    assert bytes_of(mixed, "attention.v") * 8 == k * (1 + 12)
    assert bytes_of(mixed, "attention.o") * 8 == q * 16
    assert bytes_of(mixed, "lm_head") == bytes_of(half, "lm_head") == 1000 * 512 * 2, (
        "heads are left alone unless named"
    )
    coded = planned(model, "[{prune: {sparsity: 0.5}}, {quantize: {scheme: W4A16}}]")
    assert bytes_of(coded, "attention.q") * 8 == q * (1 + 2 + 16 / 128)


def test_factors_meet_their_share_of_bytes(tmp_path: Path) -> None:
    model = folder(tmp_path / "m")
    for solver, ratio in (("compot", 0.2), ("rocket", 0.4), ("svd", 0.3)):
        plan = planned(model, f"[{{factorize: {{solver: {solver}, ratio: {ratio}, allocation: uniform}}}}]")
        for tensor in plan.tensors:
            if tensor.factors is not None:
                (m, n), (k, s) = tensor.spec.shape, tensor.factors
                mask = 0 if solver == "svd" else m * -(-k // 8)
                assert tensor.bytes == 2 * k * n + 2 * m * s + mask
                assert (1 - ratio) * 0.97 * 2 * m * n < tensor.bytes <= (1 - ratio) * 2 * m * n
        assert sum(t.factors is not None for t in plan.tensors) == 3 * (4 + 15)


def test_a_large_mixture_of_experts_plans_at_once(tmp_path: Path) -> None:
    """235 billion weights, 94 layers of 128 experts: a quarter of the experts is a quarter of their bytes."""
    model = folder(tmp_path / "m", LARGE)
    whole = planned(model, "[{quantize: {scheme: EXPERTS_2BIT}}]", "gguf")
    cut = planned(model, "[{prune_experts: {ratio: 0.25}}, {quantize: {scheme: EXPERTS_2BIT}}]", "gguf")
    for role in ("routed_experts.gate", "routed_experts.down", "router"):
        assert bytes_of(cut, role) * 4 == bytes_of(whole, role) * 3
    (saving,) = cut.savings
    assert (saving.before, saving.after) == (whole.bytes, cut.bytes)
    assert cut.bits_per_weight == 8 * cut.file_bytes["gguf"] / whole.parameters, "weights of the original"
    assert cut.bits_per_weight == pytest.approx(8 * cut.bytes / whole.parameters, rel=1e-4)


def test_structured_pruning_counts_heads_and_channels(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", DENSE)
    plan = planned(model, "[{prune_structured: {heads: 0.5, channels: 0.25}}]", "safetensors gguf")
    assert bytes_of(plan, "attention.q") == 3 * 128 * 512 * 2 and bytes_of(plan, "attention.k") == 3 * 64 * 512 * 2
    assert bytes_of(plan, "mlp.down") == 3 * 768 * 512 * 2
    assert plan.spec.config["num_attention_heads"] == 2 and plan.spec.config["head_dim"] == 64
    both = planned(model, "[{drop_layers: {count: 1}}, {prune_structured: {ratio: 0.25}}]", "safetensors gguf")
    assert [(s.step, s.container) for s in both.savings] == [
        (step, container) for step in ("drop_layers", "prune_structured") for container in ("safetensors", "gguf")
    ]
    first, _, second, _ = both.savings
    assert first.after == second.before and both.savings[-1].after == both.bytes


@pytest.mark.parametrize("container", ["gptq", "compressed-tensors", "safetensors", "gguf"])
def test_a_container_without_masks_saves_nothing_and_says_so(container: str, tmp_path: Path) -> None:
    steps = "[{prune: {sparsity: 0.5}}]" if container in ("safetensors", "gguf") else (
        "[{prune: {sparsity: 0.5}}, {quantize: {scheme: W4A16}}]"
    )  # fmt: skip
    plan = planned(folder(tmp_path / "m"), steps, container)
    (saving,) = plan.savings
    assert saving.nothing and saving.before == saving.after
    assert any(line.startswith(f"prune saves nothing in {container}") for line in plan.warnings)
    if container == "compressed-tensors":
        assert "no longer loaded" in saving.note
    assert "nothing" in printed(plan)


def test_one_container_without_masks_takes_them_from_all(tmp_path: Path) -> None:
    """The same codes go into every export, so the plan says what the other one costs."""
    plan = planned(folder(tmp_path / "m"), "[{prune: {sparsity: 0.5}}]", "compress gguf")
    assert {t.codec for t in plan.tensors if t.pattern is not None} == {"bf16"}
    assert sum("saves nothing" in line for line in plan.warnings) == 2


def test_a_plan_says_who_runs_what_it_saves(tmp_path: Path) -> None:
    plan = planned(folder(tmp_path / "m"), "[{factorize: {ratio: 0.2}}]")
    text = printed(plan)
    assert "transformers after `import compress`" in text and "of the multiplications" in text.replace("\n", " ")
    assert "decided by" in text and "survey" in text
    facts = json.loads(json.dumps(plan.as_dict()))
    assert facts["savings"][0]["after"] < facts["savings"][0]["before"] and not facts["savings"][0]["nothing"]


def test_experts_ranked_by_one_source(tmp_path: Path) -> None:
    model = folder(tmp_path / "m")
    narrow = planned(model, "[{prune_experts: {}}]", "safetensors", **{"calibration.dataset": "wikipedia"})
    assert any("one source" in line for line in narrow.warnings)
    assert not any("one source" in line for line in planned(model, "[{prune_experts: {}}]", "safetensors").warnings)


@pytest.mark.parametrize(
    ("steps", "container", "words"),
    [
        ("[{prune: {sparsity: 0.5}}, {quantize: {scheme: Q4_K_M}}]", "gguf", "goes with neither masks nor factors"),
        ("[{factorize: {ratio: 0.2}}]", "gguf", "gguf holds no factors; use compress or safetensors"),
        ("[{prune: {sparsity: 0.5}}, {factorize: {ratio: 0.2}}]", "compress", "prune and factorize both name it"),
        ("[{prune: {rules: [{targets: embeddings, sparsity: 0.5}]}}]", "compress", "embeddings are looked up"),
        ("[{prune: {sparsity: 3:7}}]", "compress", "do not divide into groups of 7"),
        ("[{quantize: {scheme: W4A16}}, {prune: {sparsity: 0.5}}]", "compress", "write them as prune, quantize"),
        ("[{prune_structured: {}}, {rotate: {}}]", "gguf", "write them as rotate, prune_structured"),
        ("[{drop_layers: {count: 3}}]", "gguf", "keep at least one"),
        ("[{prune_experts: {ratio: 0.8}}]", "gguf", "experts"),
        ("[{prune: {sparsity: 2:4, allocation: outliers}}]", "compress", "2:4 is fixed"),
        ("[{prune: {sparsity: 0.5, spread: 0.2}}]", "compress", "spread goes with allocation: outliers"),
        ("[{factorize: {ratio: 0.2}}, {quantize: {scheme: W8A8}}]", "compress", "inputs of factors are not rounded"),
        (
            "[{factorize: {ratio: 0.8}}]",
            "compress",
            "keeps 0.2 of the bytes, allocation: pooled gives a matrix 0.3 to 1",
        ),
        ("[{factorize: {ratio: 0.1, high: 0.8}}]", "compress", "0.3 to 0.8; change the ratio, low or high"),
        ("[{factorize: {ratio: 0.75, allocation: knapsack}}]", "compress", "0.3 or more"),
        ("[{factorize: {ratio: 0.2, allocation: uniform, low: 0.5}}]", "compress", "guards of allocation: pooled"),
        ("[{prune_structured: {ratio: 0.25, multiple_of: 1}}]", "safetensors", "in multiples of 8 only"),
        (
            "[{prune: {sparsity: 0.5}}, {quantize: {rules: [{targets: attention, codec: int4-g128, incoherence: true}]}}]",
            "compress",
            "masks have no meaning",
        ),
    ],
)
def test_chains_that_cannot_work_are_refused_before_any_work(
    steps: str, container: str, words: str, tmp_path: Path
) -> None:
    assert words in problems(folder(tmp_path / "m"), steps, container)


def test_experts_of_a_dense_model(tmp_path: Path) -> None:
    assert "no routed experts" in problems(folder(tmp_path / "m", DENSE), "[{prune_experts: {}}]", "gguf")


def test_llama_cpp_ties_heads_of_qwen2_to_the_width(tmp_path: Path) -> None:
    """There channels alone pay for the ratio, and the plan says so; other containers lose heads, too."""
    model = folder(tmp_path / "m", QWEN2)
    plan = planned(model, "[{prune_structured: {ratio: 0.25}}]", "gguf")
    assert plan.spec.heads == plan.original.heads
    assert any("heads stay" in line for line in plan.warnings)
    free = planned(model, "[{prune_structured: {ratio: 0.25}}]", "safetensors")
    blocks = [
        sum(t.spec.parameters for t in p.tensors if len(t.spec.shape) == 2 and t.spec.layer is not None)
        for p in (plan, free)
    ]
    whole = sum(t.parameters for t in plan.original.tensors() if len(t.shape) == 2 and t.layer is not None)
    assert blocks[0] == pytest.approx(0.75 * whole, rel=0.03), "channels go by 64 of 1,024"
    assert blocks[1] == pytest.approx(0.75 * whole, rel=0.03)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("steps=[{prune: {}}]", "give it at least a sparsity or rules"),
        ("steps=[{factorize: {solver: svd}}]", "give it at least a ratio or rules"),
        ("steps=[{prune: {sparsity: 1.5}}]", "expected a share between 0 and 1"),
        ("steps=[{prune: {sparsity: 4:4}}]", "0 < n < m"),
        ("steps=[{prune: {sparsity: 95:96}}]", "0 < n < m <= 16"),
        ("steps=[{prune: {sparsity: 8:16}}]", "256 ways to choose"),
        ("steps=[{prune: 0.5}]", "expected a mapping"),
        ("steps=[{factorize: true}]", "expected a mapping"),
        ("steps=[{factorize: {ratio: 0.2, low: 0}}]", "must be more than 0"),
        ("steps=[{prune: {sparsity: 0.5, solver: sparsgpt}}]", "nearest: sparsegpt"),
        ("steps=[{prune: {sparsity: 0.5, solver: {name: wanda, sweeps: 2}}}]", "unknown key 'sweeps'"),
        ("steps=[{quantize: {rules: [{targets: attention, codec: sparse-bf16}]}}]", "name bf16 and the step"),
        ("steps=[{drop_layers: {count: 1, ratio: 0.5}}]", "either count or ratio"),
    ],
)
def test_recipes_that_are_wrong(setting: str, words: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("gptq-w4-g128", ["export=[{container: compress}]", setting])
    assert words in str(error.value)


def test_a_survey_settles_sizes_and_the_sum_stays(tmp_path: Path) -> None:
    plan = planned(folder(tmp_path / "m"), "[{prune: {sparsity: 0.5, allocation: outliers}}]")
    assert plan.open == ("sparsity",)
    names = [t.name for t in plan.tensors if t.pattern is not None]
    patterns = {name: Pattern(0.4 if ".0." in name else 0.55) for name in names if ".layers.2." not in name}
    settled = plan.settled(patterns, {})
    assert settled.by_name[names[0]].pattern == patterns[names[0]]
    assert settled.bytes != plan.bytes and settled.by_name[names[-1]] == plan.by_name[names[-1]]


def test_one_line_for_what_many_tensors_share(tmp_path: Path) -> None:
    """With the name that the recipe gave, not llama.cpp's fallbacks."""
    text = problems(
        folder(tmp_path / "m", hidden_size=480), "[{prune: {sparsity: 0.5}}, {quantize: {scheme: Q4_K_S}}]", "gguf"
    )
    assert all(line.startswith("prune: ") for line in text.splitlines()) and "q5_0" not in text
    assert len(text.splitlines()) <= 3


def test_only_shapes_that_can_be_stored_are_left_to_the_survey(tmp_path: Path) -> None:
    """Channels in groups of 64 for int4-g64: 240 of 256 would not divide, 192 do."""
    dense = {**DENSE, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "intermediate_size": 1024}
    model = folder(tmp_path / "m", dense, num_attention_heads=8, num_key_value_heads=4, head_dim=16)
    whole = planned(model, "[{prune_structured: {ratio: 0.25}}]")
    coded = planned(
        model,
        "[{prune_structured: {ratio: 0.25, multiple_of: 8}}, {quantize: {rules: [{targets: mlp, codec: int4-row}]}}]",
    )
    assert set(coded.shapes) and len(whole.shapes) >= 1
    grouped = (
        "[{prune_structured: {ratio: 0.25, multiple_of: 16}}, {quantize: {rules: [{targets: mlp, codec: int4-g32}]}}]"
    )
    for shape in planned(model, grouped).shapes:
        assert shape.intermediate % 32 == 0


def test_recipes_round_trip(tmp_path: Path) -> None:
    """What recipe.json holds is the recipe that was run."""
    recipe = load_recipe("sparsegpt-2-4", ["steps[0].prune.rules=[{targets: attention.o, sparsity: 0.123456789}]"])
    path = tmp_path / "again.json"
    path.write_text(json.dumps(recipe.as_dict()))
    again = load_recipe(path)
    assert again == recipe and again.digest() == recipe.digest()
    assert make_plan(again).bytes == make_plan(recipe).bytes
