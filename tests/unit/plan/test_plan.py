"""Plans against closed forms: bytes, parameters, fallbacks, and everything that dies before a run starts."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from compress.codecs.names import codec_info
from compress.errors import CalibrationError, CheckpointError, PlanError, RecipeError, UnsupportedModel
from compress.plan import Plan, make_plan
from compress.recipe import load_recipe
from compress.report.plan_table import plan_table
from compress.run.rehearse import Rehearsal

ROOT = Path(__file__).resolve().parents[3]
SMALL = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 1024, "num_experts": 5,
    "num_experts_per_tok": 2, "moe_intermediate_size": 256, "vocab_size": 1000, "max_position_embeddings": 2048,
    "norm_topk_prob": True, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
# Qwen3-235B-A22B as published
LARGE = {
    **SMALL, "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4,
    "head_dim": 128, "intermediate_size": 12288, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536, "vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1e6,
}  # fmt: skip


def folder(where: Path, base: dict[str, Any] = SMALL, **changes: Any) -> Path:
    """A model folder with nothing but a config.json."""
    where.mkdir(exist_ok=True)
    (where / "config.json").write_text(json.dumps({**base, **changes}))
    return where


def plan_of(model: Path, recipe: str = "qwen-moe-2bit", *overrides: str) -> Plan:
    return make_plan(load_recipe(recipe, overrides, model=str(model)))


def qwen3_moe_parameters(c: dict[str, Any]) -> int:
    """From the architecture's definition: attention, two norms and two head norms, router, experts a layer."""
    h, d, e, i = c["hidden_size"], c["head_dim"], c["num_experts"], c["moe_intermediate_size"]
    attention = 2 * h * c["num_attention_heads"] * d + 2 * h * c["num_key_value_heads"] * d
    layer = attention + 2 * h + 2 * d + e * h + 3 * e * h * i
    return c["num_hidden_layers"] * layer + h + 2 * c["vocab_size"] * h


def test_bytes_of_every_role(tmp_path: Path) -> None:
    # ggml blocks: iq2_xxs 66 bytes and q2_k 84 bytes a 256 columns, q8_0 34 bytes a 32
    plan = plan_of(folder(tmp_path / "m"))
    layers, experts, h, i, q, kv, vocab = 3, 5, 512, 256, 4 * 64, 2 * 64, 1000
    expected = {
        "embeddings": vocab * h * 34 // 32,
        "lm_head": vocab * h * 34 // 32,
        "attention.q": layers * q * h * 34 // 32,
        "attention.k": layers * kv * h * 34 // 32,
        "attention.v": layers * kv * h * 34 // 32,
        "attention.o": layers * h * q * 34 // 32,
        "router": layers * experts * h * 4,
        "norms": (layers * (2 * h + 2 * 64) + h) * 4,
        "routed_experts.gate": layers * experts * i * (h // 256) * 66,
        "routed_experts.up": layers * experts * i * (h // 256) * 66,
        "routed_experts.down": layers * experts * h * (i // 256) * 84,
    }
    counted: Counter[str] = Counter()
    for tensor in plan.tensors:
        counted[tensor.spec.role] += tensor.bytes
    assert counted == expected
    assert plan.bytes == sum(expected.values())
    assert plan.parameters == qwen3_moe_parameters(SMALL)
    assert plan.bytes + plan.beside_tensors == plan.file_bytes["gguf"] and plan.beside_tensors < 0.01 * plan.bytes
    assert plan.bits_per_weight == 8 * plan.file_bytes["gguf"] / qwen3_moe_parameters(SMALL)
    assert plan.source_bytes == 2 * plan.parameters  # no weights there: counted as 16 bits each
    assert plan.fallbacks == () and plan.warnings == ()


def test_bytes_of_a_uniform_codec(tmp_path: Path) -> None:
    # GPTQ's layout of int4-g128: 4-bit codes, a float16 scale and a 4-bit zero a group, an int32 index a column
    plan = plan_of(folder(tmp_path / "m"), "gptq-w4-g128")
    q = plan.by_name["model.layers.0.self_attn.q_proj.weight"]
    rows, columns, groups = 256, 512, 4
    assert q.codec == "int4-g128"
    assert q.bytes == rows * columns // 2 + groups * rows * 2 + groups * rows // 2 + columns * 4


def recipe_file(where: Path, steps: str, *containers: str) -> str:
    exports = "".join(f"  - container: {name}\n" for name in containers)
    where.write_text(f"model: m\nsteps: {steps}\nexport:\n{exports}")
    return str(where)


def test_bytes_are_those_of_the_container(tmp_path: Path) -> None:
    """attention.q is [256, 512]: what each format stores beside the codes, see the containers' docstrings."""
    steps = "[{quantize: {rules: [{targets: [attention, routed_experts], codec: %s}]}}]"
    rows, columns, groups, name = 256, 512, 4, "model.layers.0.self_attn.q_proj.weight"

    def size(codec: str, *containers: str) -> int:
        recipe = recipe_file(tmp_path / "r.yaml", steps % codec, *containers)
        return plan_of(folder(tmp_path / "m"), recipe).by_name[name].bytes

    codes, scales, zeros = rows * columns // 2, 2 * groups * rows, groups * rows // 2
    assert size("int4-g128", "gptq") == codes + scales + zeros + 4 * columns  # indices of groups
    assert size("int4-g128", "awq") == codes + scales + zeros
    assert size("int4-g128", "compressed-tensors") == codes + scales + 16  # the shape
    assert size("int4-g128", "compress") == size("int4-g128", "safetensors", "compress") == codes + scales
    assert size("int4-g128-asym", "compress") == codes + scales + zeros
    assert size("e8p", "compress") == rows * columns // 4 + 2 * rows + (rows + columns) // 8
    assert size("e8p, incoherence: false", "compress") == rows * columns // 4 + 2 * rows
    assert size("q4_k, incoherence: true", "compress") == rows * columns * 9 // 16 + (rows + columns) // 8


@pytest.mark.parametrize(
    ("codec", "container", "complaint"),
    [
        ("int8-row", "awq", "hold int4 in groups"),
        ("int4-row", "awq", "hold int4 in groups"),
        ("int3-g128", "compressed-tensors", "read int4 and int8"),
    ],
)
def test_codecs_of_a_kind_that_a_container_does_not_hold(
    codec: str, container: str, complaint: str, tmp_path: Path
) -> None:
    steps = f"[{{quantize: {{rules: [{{targets: [attention, routed_experts], codec: {codec}}}]}}}}]"
    with pytest.raises(PlanError, match=complaint):
        plan_of(folder(tmp_path / "m"), recipe_file(tmp_path / "r.yaml", steps, container))


@pytest.mark.parametrize(
    ("steps", "complaint"),
    [
        ("[awq]", "steps: awq scales for what quantize rounds"),
        ("[smooth]", "steps: smooth scales for what quantize rounds"),
        ("[{quantize: {scheme: W4A16}}, awq]", "write them as awq, quantize"),
        ("[awq, awq, {quantize: {scheme: W4A16}}]", "more than one awq step"),
        (
            "[{quantize: {rules: [{targets: embeddings, codec: int8-row, activations: int8}]}}]",
            "model.embed_tokens.weight: embeddings are looked up and have no inputs",
        ),
        (
            "[{quantize: {rules: [{targets: embeddings, codec: int8-row, incoherence: true}]}}]",
            "embeddings are looked up row by row and cannot be coded between Hadamard transforms; use incoherence: false",
        ),
    ],
)
def test_steps_and_rules_that_would_do_nothing_or_wrong(tmp_path: Path, steps: str, complaint: str) -> None:
    recipe = recipe_file(tmp_path / "r.yaml", steps, "compress")
    with pytest.raises(PlanError) as error:
        plan_of(folder(tmp_path / "m"), recipe)
    assert len(error.value.problems) == 1 and complaint in error.value.problems[0]


def test_rows_that_do_not_divide_fall_back_as_in_llama_cpp(tmp_path: Path) -> None:
    # llama-quant.cpp, tensor_type_fallback: iq2_xxs -> iq4_nl, q2_k -> q4_0; 32 divides both row lengths, 256 neither
    plan = plan_of(folder(tmp_path / "m", hidden_size=320, moe_intermediate_size=96))
    gate = plan.by_name["model.layers.1.mlp.experts.4.gate_proj.weight"]
    down = plan.by_name["model.layers.1.mlp.experts.4.down_proj.weight"]
    assert (gate.wanted, gate.codec, gate.bytes) == ("iq2_xxs", "iq4_nl", 96 * 320 * 18 // 32)
    assert (down.wanted, down.codec, down.bytes) == ("q2_k", "q4_0", 320 * 96 * 18 // 32)
    assert len(plan.fallbacks) == 3 * 5 * 3
    assert plan.warnings == ()
    assert [(e.role, e.tensors, e.wanted, e.used) for e in plan.exchanges] == [
        ("routed_experts.gate", 15, "iq2_xxs", "iq4_nl"),
        ("routed_experts.up", 15, "iq2_xxs", "iq4_nl"),
        ("routed_experts.down", 15, "q2_k", "q4_0"),
    ]


CURE = re.compile(r"--set '([^']+)'")


@pytest.mark.parametrize(
    ("recipe", "overrides", "changes"),
    [
        ("qwen-moe-2bit", (), {"hidden_size": 320, "moe_intermediate_size": 96}),
        (
            "gguf-q4-k-m",
            (),
            {"hidden_size": 320, "moe_intermediate_size": 96},
        ),  # q4_k falls to q5_0, which none may name
        ("gguf-q4-k-m", ("steps[0].quantize.scheme=Q5_K_S",), {"moe_intermediate_size": 40}),  # not even 32 divide
        ("gptq-w4-g128", (), {"hidden_size": 320, "moe_intermediate_size": 96}),
        ("awq-w4-g128", (), {"hidden_size": 320, "moe_intermediate_size": 96}),
    ],
)
def test_what_cures_a_fallback_does(
    tmp_path: Path, recipe: str, overrides: tuple[str, ...], changes: dict[str, Any]
) -> None:
    model = folder(tmp_path / "m", **changes)
    plan = plan_of(model, recipe, *overrides)
    assert len({(e.role, e.used) for e in plan.exchanges}) == len(plan.exchanges) > 0
    assert sum(e.tensors for e in plan.exchanges) == len(plan.fallbacks)
    cures = dict.fromkeys(found for e in plan.exchanges for found in CURE.findall(e.cure))
    cured = plan_of(model, recipe, *overrides, *cures)
    assert cures and not cured.exchanges and not cured.fallbacks
    assert {t.name: t.codec for t in cured.tensors if t.name not in {f.name for f in plan.fallbacks}} == {
        t.name: t.codec for t in plan.tensors if t.wanted is None
    }, "all others are as they were"


@pytest.mark.parametrize(
    ("recipe", "changes", "groups"),
    [
        # what an engine multiplies together has one group: gate, up and down of all experts
        ("gptq-w4-g128", {"moe_intermediate_size": 96}, {"attention": 128, "routed_experts": 32}),
        ("gptq-w4-g128", {"moe_intermediate_size": 192}, {"attention": 128, "routed_experts": 64}),
        ("gptq-w4-g128", {"hidden_size": 320}, {"attention.q": 64, "attention.o": 128, "routed_experts": 64}),
        # a file has one
        ("awq-w4-g128", {"hidden_size": 320}, {"attention": 64, "routed_experts": 64}),
        ("rtn-w4-g128", {}, {"attention": 128, "routed_experts": 128}),
    ],
)
def test_rows_that_a_group_does_not_divide_get_the_largest_that_does(
    tmp_path: Path, recipe: str, changes: dict[str, Any], groups: dict[str, int]
) -> None:
    model = folder(tmp_path / "m", **{"hidden_size": 256, "moe_intermediate_size": 256, **changes})
    plan = plan_of(model, recipe)
    for role, group in groups.items():
        found = {
            codec_info(t.codec).block for t in plan.tensors if t.spec.role.startswith(role) and len(t.spec.shape) == 2
        }
        assert found == {group}, role
    told = {e.role: (e.tensors, e.wanted, e.used) for e in plan.exchanges}
    fallen = [t for t in plan.tensors if codec_info(t.codec).block not in (128, 1)]
    assert sum(count for count, _, _ in told.values()) == len(fallen) and set(told) == {t.spec.role for t in fallen}
    if fallen:
        with pytest.raises(PlanError, match="do not divide into groups of 128"):
            plan_of(model, recipe, f"steps[{len(plan.recipe.steps) - 1}].quantize.strict=true")


def test_strict_refuses_what_llama_cpp_would_store_instead(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", hidden_size=320)
    strict = "steps[0].quantize.strict=true"
    with pytest.raises(PlanError) as caught:
        plan_of(model, "gguf-q4-k-m", strict)
    assert all("rows of 320 do not divide into q" in line for line in caught.value.problems)
    cures = dict.fromkeys(found for line in caught.value.problems for found in CURE.findall(line))
    assert cures and "ignore" not in " ".join(cures)


@pytest.mark.parametrize(
    ("overrides", "width", "option"),
    [
        (("steps[0].quantize.strict=true",), 96, "scheme=W4A16_G32"),
        (("steps[0].quantize.strict=true", "steps[0].quantize.scheme=W3A16_ASYM"), 192, "scheme=W3A16_G64_ASYM"),
        (("export=[{container: compress}]",), 200, "rules=[{targets: routed_experts.down, codec: int4-row}]"),
        (
            (
                "steps[0].quantize.strict=true",
                "steps[0].quantize.scheme=",
                "steps[0].quantize.rules=[{targets: routed_experts, codec: int4-g128}]",
            ),
            96, "rules[0].codec=int4-g32",
        ),
    ],
)  # fmt: skip
def test_rows_that_no_group_divides_are_one_line_a_role_with_what_cures_them(
    tmp_path: Path, overrides: tuple[str, ...], width: int, option: str
) -> None:
    model = folder(tmp_path / "m", moe_intermediate_size=width)
    with pytest.raises(PlanError) as caught:
        plan_of(model, "gptq-w4-g128", *overrides)
    (line,) = caught.value.problems
    assert line.startswith("routed_experts.down (15 tensors, first model.layers.0.mlp.experts.0.down_proj.weight): ")
    assert f"rows of {width} do not divide into groups of 128" in line
    (cure,) = CURE.findall(line)
    assert cure == f"steps[0].quantize.{option}"
    assert plan_of(model, "gptq-w4-g128", *overrides, cure).fallbacks == ()


def test_rows_that_not_even_32_divides_stay_float(tmp_path: Path) -> None:
    plan = plan_of(folder(tmp_path / "m", hidden_size=328, moe_intermediate_size=96))
    q = plan.by_name["model.layers.0.self_attn.q_proj.weight"]
    assert (q.wanted, q.codec, q.bytes) == ("q8_0", "f16", 256 * 328 * 2)


def test_235b_has_the_published_size(tmp_path: Path) -> None:
    plan = plan_of(folder(tmp_path / "m", LARGE))
    assert plan.parameters == qwen3_moe_parameters(LARGE)
    assert plan.parameters == pytest.approx(235.09e9, rel=1e-3)
    assert len(plan.tensors) == 94 * (9 + 3 * 128) + 3
    assert plan.bits_per_weight < 2.5
    # one block, its statistics and the head, never the model
    assert plan.peak_memory_bytes < 40e9 < plan.bytes


def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path: Path) -> None:
    few, many = (plan_of(folder(tmp_path / f"{n}", LARGE, num_hidden_layers=n)) for n in (2, 8))
    assert few.peak_memory_bytes == many.peak_memory_bytes
    assert few.disk_bytes < many.disk_bytes


def test_235b_json_from_the_command_line_needs_no_torch(tmp_path: Path) -> None:
    model = str(folder(tmp_path / "m", LARGE))
    code = (
        "import sys\n"
        f"sys.argv = ['compress', 'plan', 'qwen-moe-2bit', '--model', {model!r}, '--json']\n"
        "from compress.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'scipy', 'datasets', 'llama_cpp'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["parameters"] == sum(_size(t["shape"]) for t in facts["tensors"]) == qwen3_moe_parameters(LARGE)
    assert facts["bytes"] == sum(t["bytes"] for t in facts["tensors"])
    first = facts["tensors"][1]
    assert set(first) >= {"name", "shape", "role", "layer", "steps", "solver", "codec", "bytes"}


def _size(shape: list[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def test_all_problems_at_once(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", max_position_embeddings=256, norm_topk_prob=False)
    with pytest.raises(PlanError) as caught:
        plan_of(model, "qwen-moe-2bit", "calibration.length=300")
    problems = caught.value.problems
    assert len(problems) == 3
    assert any("calibration.length 300" in p and "256" in p for p in problems)
    assert any("suite quick" in p and "512" in p for p in problems)
    assert any(p.startswith("gguf:") and "normalis" in p for p in problems)


def test_uniform_groups_that_do_not_divide_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        plan_of(
            folder(tmp_path / "m", num_hidden_layers=1, num_experts=2, moe_intermediate_size=96),
            "gptq-w4-g128",
            "steps[0].quantize.strict=true",
        )
    (line,) = caught.value.problems
    assert "2 tensors" in line and "down_proj" in line and "96" in line and "W4A16_G32" in line


def test_gguf_cannot_hold_uniform_codecs(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gguf.*cannot hold.*int4-g128"):
        plan_of(folder(tmp_path / "m"), "qwen-moe-2bit", "steps[0].quantize.rules[0].codec=int4-g128")


def test_unknown_architecture_lists_what_is_supported(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="qwen9_moe") as caught:
        plan_of(folder(tmp_path / "m", model_type="qwen9_moe"))
    for supported in ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"):
        assert supported in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_or_damaged_config(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(CheckpointError, match="without a config.json"):
        plan_of(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "qwen3_moe",')
    with pytest.raises(CheckpointError, match="not valid JSON"):
        plan_of(tmp_path / "m")


def test_config_alone_plans_but_does_not_run(tmp_path: Path) -> None:
    recipe = load_recipe("qwen-moe-2bit", model=str(folder(tmp_path / "m")))
    assert make_plan(recipe).tensors
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        make_plan(recipe, weights=True)


def test_no_such_calibration_set(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="did you mean"):
        plan_of(folder(tmp_path / "m"), "qwen-moe-2bit", "calibration.dataset=wikipedai")


def test_rules_that_match_nothing_are_told(tmp_path: Path) -> None:
    plan = plan_of(folder(tmp_path / "m"), "qwen-moe-2bit",
                   "steps[0].quantize.rules[0]={targets: shared_experts, codec: q4_k}")  # fmt: skip
    assert any("matches no tensor" in line and "shared_experts" in line for line in plan.warnings)


def test_digest_follows_what_decides_the_bytes(tmp_path: Path) -> None:
    model = folder(tmp_path / "m")
    plan = plan_of(model)
    assert plan.digest == plan_of(model, "qwen-moe-2bit", "score=false").digest
    assert plan.digest != plan_of(model, "qwen-moe-2bit", "seed=1").digest
    assert plan.digest != plan_of(folder(tmp_path / "n", rope_theta=5e5)).digest


def _printed(plan: Plan, estimate: Rehearsal | None = None) -> str:
    console = Console(width=100, file=io.StringIO())
    console.print(plan_table(plan, estimate))
    return console.file.getvalue()


@pytest.mark.parametrize("config", [SMALL, LARGE], ids=["small", "235b"])
def test_table_fits_and_adds_up(tmp_path: Path, config: dict[str, Any]) -> None:
    plan = plan_of(folder(tmp_path / "m", config))
    text = _printed(plan, Rehearsal(forward=60.0, solve=30.0, write=6.0, score=4.0))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100 and "…" not in text
    roles = {t.spec.role for t in plan.tensors}
    rows = {words[0]: words for words in map(str.split, lines) if words and words[0] in roles}
    assert set(rows) == roles
    parameters = {role: int(row[4].replace(",", "")) for role, row in rows.items()}
    assert sum(parameters.values()) == plan.parameters
    assert "1 min 40 s" in text and "forward 60.0 s" in text


def test_table_names_fallbacks_and_warnings(tmp_path: Path) -> None:
    plan = plan_of(folder(tmp_path / "m", hidden_size=320, moe_intermediate_size=96))
    text = _printed(plan)
    assert "iq2_xxs -> iq4_nl" in text and "rows of 320" in text
    assert text.count("rows of 320") == 2 and "Note" not in text  # once a role
    assert "--set 'steps[0].quantize.rules[1].codec=q4_0'" in text
    assert "time" not in text
