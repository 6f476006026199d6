"""Recipes: what is accepted, what is refused and in which words, overrides, digests, the shipped ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from compress.containers import CONTAINERS
from compress.errors import RecipeError
from compress.models.spec import load_spec
from compress.recipe import Recipe, about_recipes, bundled_recipes, load_recipe
from compress.recipe.rules import RuleMatcher
from compress.recipe.schemes import EXPERT_SCHEMES, SCHEMES, expand, scheme_kind, use_more_bits
from compress.solvers.options import GptqOptions, RtnOptions
from compress.transforms.options import SCALINGS, TransformOptions

GOOD = """\
model: some/model
calibration: {samples: 64}
steps:
  - quantize:
      solver: {name: GPTQ, damping: 5e-2}
      scheme: q4_k_m
      rules:
        - {targets: attention.o, codec: Q8_0, solver: rtn, layers: 0-3}
export:
  - container: gguf
    max_shard_size: 5GB
"""

LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 512,
    "intermediate_size": 512,
}


@pytest.fixture
def write(tmp_path):
    def _write(text: str):
        path = tmp_path / "x.yaml"
        path.write_text(text)
        return path

    return _write


def problems_of(path, *args, **options):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, *args, **options)
    assert caught.value.exit_code == 2
    assert not any("\n" in line for line in caught.value.problems)
    return [line.replace(str(path), "x.yaml") for line in caught.value.problems]


def test_defaults_and_canonical_names(write):
    recipe = load_recipe(write(GOOD))
    assert (recipe.name, recipe.output, recipe.seed) == ("x", "out/x", 0)
    assert (recipe.calibration.dataset, recipe.calibration.samples) == (None, 64)
    step = recipe.steps[0]
    assert step.kind == "quantize" and step.options is step.quantize
    assert step.quantize.solver == GptqOptions(damping=0.05)
    assert step.quantize.scheme == "Q4_K_M"
    assert step.quantize.solver_of(step.quantize.rules[0]) == RtnOptions()
    assert recipe.export[0].max_shard_size == 5_000_000_000
    assert recipe.score.suite == "quick" and recipe.gate.max_kld is None


def test_round_trip(write):
    for text in (GOOD, GOOD + "score: false\n"):
        recipe = load_recipe(write(text))
        assert Recipe.model_validate(recipe.as_dict()) == recipe


def test_no_steps_is_a_plain_conversion(write):
    recipe = load_recipe(write("model: m\nsteps: []\nexport: [{container: safetensors}]\nscore: false\n"))
    assert recipe.steps == () and recipe.score is None


def test_all_problems_at_once_with_lines(write):
    text = """\
modle: foo
seed: "3"
calibration: {samples: 1e-3, lenght: 512}
steps:
  - quantize:
      solver: {name: rtn, damping: 0.1}
      scheme: Q4KM
      rules:
        - {targets: [routed_expert.gate], codec: q4k, layers: "-4:"}
        - targets: router
          codec: q8_0
        - targets: mlp
          codec: q5_0
      ignore: [ruter]
  - distil: {}
  - quantize:
export:
  - {container: guff}
  - {container: gptq, max_shard_size: 5 gigs}
score: maybe
gate: {max_kld: -1}
seed: 4
"""
    found = problems_of(write(text))
    expected = [
        ("x.yaml:1: model: missing", "--model"),
        ("x.yaml:1: modle: unknown key 'modle'; nearest: model", ""),
        ("x.yaml:2: seed: expected a whole number, got '3'", ""),
        ("x.yaml:3: calibration.samples: expected a whole number, got 0.001", ""),
        ("x.yaml:3: calibration.lenght: unknown key 'lenght'; nearest: length", ""),
        ("x.yaml:6: steps[0].quantize.solver.damping: unknown key 'damping'", "one of: name"),
        ("x.yaml:7: steps[0].quantize.scheme: unknown scheme 'Q4KM'; nearest: Q4_K_M", ""),
        ("x.yaml:9: steps[0].quantize.rules[0].targets[0]: unknown role", "nearest: routed_experts.gate"),
        ("x.yaml:9: steps[0].quantize.rules[0].codec: unknown codec 'q4k'; nearest: q4_k", ""),
        ("x.yaml:9: steps[0].quantize.rules[0].layers: '-4:' names no layers", "last 4"),
        ("x.yaml:11: steps[0].quantize.rules[1].codec: router is never quantized", "ignore"),
        ("x.yaml:11: steps[0].quantize.rules[1].codec: container gptq (export[1]) cannot hold q8_0", "gguf"),
        ("x.yaml:13: steps[0].quantize.rules[2].codec: q5_0 exists only as", ""),
        ("x.yaml:14: steps[0].quantize.ignore[0]: unknown role 'ruter'; nearest: router", ""),
        ("x.yaml:15: steps[1].distil: unknown key 'distil'", "quantize"),
        ("x.yaml:16: steps[2]: this step says nothing", ""),
        ("x.yaml:18: export[0].container: unknown container 'guff'; nearest: gguf", ""),
        ("x.yaml:19: export[1].max_shard_size: expected a size like 5GB", ""),
        ("x.yaml:20: score: expected a mapping like {suite: quick}, or false, got 'maybe'", ""),
        ("x.yaml:21: gate.max_kld: must be more than 0, got -1", ""),
        ("x.yaml:22: seed: given twice", ""),
    ]
    for start, inside in expected:
        assert any(line.startswith(start) and inside in line for line in found), (start, found)
    assert len(found) == len(expected)
    lines = [int(line.split(":")[1]) for line in found]
    assert lines == sorted(lines)


@pytest.mark.parametrize(
    ("rule", "containers", "complaint"),
    [
        ("{targets: mlp, codec: int4-g128}", "gguf", "gguf (export[0]) cannot hold int4-g128"),
        ("{targets: mlp, codec: q4_k}", "gptq", "gptq (export[0]) cannot hold q4_k"),
        ("{targets: mlp, codec: q4_k}", "safetensors gptq", "gptq (export[1]) cannot hold q4_k"),
        ("{targets: mlp, codec: f16}", "gguf gguf", "export[1]: the same file as export[0]"),
        ("{targets: embeddings, codec: int8-row}", "gptq", "holds embeddings only as f32, f16 or bf16"),
        ("{targets: norms, codec: int8-row}", "gptq", "norms is never quantized"),
        ("{targets: 're:*bad', codec: f16}", "gguf", "not a valid regular expression"),
        ("{targets: [], codec: f16}", "gguf", "rules[0].targets: the list is empty"),
        ("{targets: mlp}", "gguf", "rules[0].codec: missing"),
        ("{targets: mlp, codec: f16, solver: gtpq}", "gguf", "unknown solver 'gtpq'; nearest: gptq"),
        ("[mlp, q4_k]", "gguf", "rules[0]: expected a mapping, got a list"),
        ("{targets: mlp, codec: int8-row, activations: int8}", "gptq", "gptq says nothing about activations; use comp"),
        ("{targets: mlp, codec: int8-row, activations: fp8}", "compress", "activations: input should be 'int8'"),
        ("{targets: mlp, codec: int4-row, incoherence: true}", "awq", "incoherence: container awq has no place"),
        ("{targets: mlp, codec: bf16, activations: int8}", "compress", "activations goes with a codec that rounds"),
        ("{targets: mlp, codec: f16, incoherence: true}", "compress", "incoherence goes with a codec that rounds"),
    ],
)
def test_one_impossible_combination(write, rule, containers, complaint):
    exports = "".join(f"  - container: {name}\n" for name in containers.split())
    found = problems_of(write(f"model: m\nsteps:\n- quantize:\n    rules:\n    - {rule}\nexport:\n{exports}"))
    assert len(found) == 1 and complaint in found[0], found


def test_scheme_and_container_disagree(write):
    text = "model: m\nsteps: [{quantize: {scheme: W4A16}}]\nexport: [{container: gguf}]\n"
    assert problems_of(write(text)) == [
        "x.yaml:2: steps[0].quantize.scheme: container gguf (export[0]) cannot hold W4A16; it holds "
        "f32, f16, bf16 and the ggml codecs; use gptq or awq or compressed-tensors or compress or safetensors"
    ]


def test_scheme_with_activations_and_container_disagree(write):
    text = "model: m\nsteps: [{quantize: {scheme: w8a8}}]\nexport: [{container: compress}, {container: awq}]\n"
    (found,) = problems_of(write(text))
    assert found.startswith("x.yaml:2: steps[0].quantize.scheme: container awq says nothing about activations")


@pytest.mark.parametrize(
    ("step", "complaint"),
    [
        ("awq: {gird: 20}", "awq.gird: unknown key 'gird'; nearest: grid"),
        ("awq: {fold: []}", "awq.fold: expected at least one item"),
        ("smooth: {fold: [ffn.inn]}", "smooth.fold[0]: input should be 'attention.in'"),
        ("smooth: {alpha: 2}", "smooth.alpha: must be at most 1, got 2"),
        ("rotate: {kinds: [R3]}", "rotate.kinds[0]: input should be 'R1' or 'R2', got 'R3'"),
        ("recover: {lr: 1}", "recover.lr: unknown key 'lr'"),
        ("awq: 5", "awq: expected a mapping, got 5"),
        ("[awq]", "steps[0]: expected a mapping, got a list"),
    ],
)
def test_wrong_options_of_the_other_steps(write, step, complaint):
    (found,) = problems_of(write(f"model: m\nsteps:\n- {step}\nexport: [{{container: compress}}]\n"))
    assert found.startswith("x.yaml:3: steps[0]") and complaint in found


def test_uniform_and_float_fit_gptq_and_anything_fits_safetensors(write):
    for codec in ("int2-g32", "int3-g64-asym", "int8-row", "bf16"):
        text = f"model: m\nsteps: [{{quantize: {{rules: [{{targets: mlp, codec: {codec}}}]}}}}]\n"
        load_recipe(write(text + "export: [{container: gptq}, {container: safetensors}]\n"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "the recipe is empty"),
        ("- a\n- b\n", "expected a mapping, got a list"),
        ("model: [m\nexport: x\n", "x.yaml:2: not valid YAML"),
        ("model: m\n\tx: 1\n", "x.yaml:2: not valid YAML"),
        ("model: &a [*a]\nexport: [{container: gguf}]\n", "contains itself"),
        ("model: !!python/object:os.system x\nexport: [{container: gguf}]\n", "have no meaning here"),
        ("model: m\nexport: []\n", "export: expected at least one item"),
        ("model: m\n", "export: missing"),
        ("model: m\nname: a/b\nexport: [{container: gguf}]\n", "name: expected a plain file name"),
        ("model: m\nname: ../b\nexport: [{container: gguf}]\n", "name: expected a plain file name"),
        ("model: m\nsteps: {quantize: {}}\nexport: [{container: gguf}]\n", "steps: expected a list"),
        ("model: 7\nexport: [{container: gguf}]\n", "model: expected text, got 7"),
        ("model: m\nseed: true\nexport: [{container: gguf}]\n", "seed: expected a whole number, got True"),
    ],
)
def test_malformed_files(write, text, complaint):
    assert any(complaint in line for line in problems_of(write(text))), problems_of(write(text))


def test_yaml_traps_are_read_as_written(write):
    """PyYAML's own rules would make these false, 90 and a string."""
    path = write("model: no\nname: 1:30\ngate: {max_kld: 1e-2}\nexport: [{container: gguf}]\n")
    assert [line for line in problems_of(path) if "name" not in line] == []
    recipe = load_recipe(path, ["name=ok"])
    assert (recipe.model, recipe.gate.max_kld) == ("no", 0.01)


def test_overrides(write):
    recipe = load_recipe(
        write(GOOD),
        ["steps[0].quantize.solver.sweeps=4", "calibration.length=32", "gate.max_kld=.5", "score=false",
         "export[1]={container: safetensors}", "steps[0].quantize.rules[0].solver.damping=0.2",
         "steps[0].quantize.rules[0].solver.name=gptq"],
        model="other",
        output="there",
    )  # fmt: skip
    assert recipe.steps[0].quantize.solver == GptqOptions(damping=0.05, sweeps=4)
    assert recipe.steps[0].quantize.rules[0].solver == GptqOptions(damping=0.2)
    assert (recipe.model, recipe.output, recipe.calibration.length) == ("other", "there", 32)
    assert recipe.gate.max_kld == 0.5 and recipe.score is None and recipe.export[1].container == "safetensors"


def test_overrides_name_themselves(write):
    found = problems_of(
        write(GOOD),
        ["calibration.samples=abc", "steps[7].quantize.scheme=Q8_0", "foo", "calibration.length=[1", "zip=3",
         "model.x=1", "steps.x=1", "steps[0].quantize.rules[0].codec=q9"],
    )  # fmt: skip
    starts = (
        "--set calibration.samples=abc: calibration.samples: expected a whole number, got 'abc'",
        "--set steps[7].quantize.scheme=Q8_0: steps[7].quantize.scheme: the list is shorter",
        "--set foo: expected key=value",
        "--set calibration.length=[1: not valid YAML",
        "--set zip=3: zip: there is no such place",
        "--set model.x=1: model.x: there is no such place",
        "--set steps.x=1: steps.x: there is no such place",
        "--set steps[0].quantize.rules[0].codec=q9: steps[0].quantize.rules[0].codec: unknown codec 'q9'",
    )
    assert len(found) == len(starts)
    assert all(any(line.startswith(start) for line in found) for start in starts), found


@pytest.mark.parametrize(
    ("short", "full"),
    [("samples=3", "calibration.samples=3"), ("steps.0.quantize.scheme=Q8_0", "steps[0].quantize.scheme=Q8_0"),
     ("scheme=Q8_0", "steps[0].quantize.scheme=Q8_0"), ("quantize.ignore=[router]", "steps[0].quantize.ignore=[router]"),
     ("max_kld=.5", "gate.max_kld=.5"), ("rules.targets=mlp", "steps[0].quantize.rules[0].targets=mlp"),
     ("seed=3", "seed=3")],
)  # fmt: skip
def test_overrides_may_be_short(write, short, full):
    """In a recipe with one step, one rule and one export, the last parts of a path are enough."""
    path = write(ONE)
    assert load_recipe(path, [short]) == load_recipe(path, [full]) != load_recipe(path)


ONE = """
model: m
steps:
  - quantize: {solver: rtn, scheme: Q4_K_M, rules: [{targets: attention, codec: q6_k}]}
export: [{container: gguf}]
"""


def test_short_overrides_that_name_several_places_or_none(write):
    (several,) = problems_of(write(ONE), ["name=x", "solver=gptq"])
    assert several == (
        "--set solver=gptq: solver may be steps[0].quantize.solver or steps[0].quantize.rules[0].solver; write one of these"
    )
    (none,) = problems_of(write(ONE), ["calibration.smaples=3"])
    assert "there is no such place in this recipe; nearest: calibration.samples, " in none


@pytest.mark.parametrize(
    ("name", "scheme", "codec", "container"),
    [("Q4_K_M", "Q4_K_M", None, "gguf"), ("q5-k-m", "Q5_K_M", None, "gguf"), ("W4A16", "W4A16", None, "gptq"),
     ("W3A16_G64", "W3A16_G64", None, "gptq"), ("W8A8", "W8A8", None, "compressed-tensors"),
     ("EXPERTS_2BIT", "EXPERTS_2BIT", None, "gguf"), ("nf4-dq", None, "nf4-dq", "bitsandbytes"), ("F16", None, "f16", "gguf"),
     ("int3-g64", None, "int3-g64", "gptq"), ("trellis3", None, "trellis3", "compress"), ("gguf", "Q4_K_M", None, "gguf"),
     ("compressed-tensors", "W4A16", None, "compressed-tensors"), ("bitsandbytes", None, "nf4-dq", "bitsandbytes")],
)  # fmt: skip
def test_a_type_is_a_recipe(name, scheme, codec, container, tmp_path):
    recipe = load_recipe(name, model=str(tmp_path / "Some Model"))
    (step,) = recipe.steps
    assert step.quantize.scheme == scheme and [rule.codec for rule in step.quantize.rules] == ([codec] if codec else [])
    assert [export.container for export in recipe.export] == [container]
    assert recipe.name.startswith("Some-Model-") and recipe.output == f"out/{recipe.name}"
    assert recipe.name.lower().endswith((scheme or codec).lower()) or name == container


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=lambda c: c.name)
def test_a_container_is_a_recipe(container):
    recipe = load_recipe(container.name, model="m")
    assert [export.container for export in recipe.export] == [container.name]
    assert recipe.steps or container.original


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_a_recipe(scheme):
    assert load_recipe(scheme.lower(), model="owner/name@main").name == f"name-{scheme}"


def test_a_type_says_what_it_lacks(tmp_path):
    with pytest.raises(RecipeError, match=r"^Q4_K_M: model: missing; name a folder.*--model$"):
        load_recipe("Q4_K_M")
    assert problems_of("Q4_KM")[0].endswith("no such file, bundled recipe or type; nearest: Q4_K_M, q4_k")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert (
        "is a model, not a recipe; compress it with: compress run Q4_K_M --model" in problems_of(tmp_path / "m.gguf")[0]
    )


def test_bundled_recipes_say_when_to_choose_them():
    found = about_recipes()
    assert [about.name for about in found] == list(bundled_recipes())
    assert all(about.when and not about.when.startswith("#") and about.containers for about in found)
    about = next(about for about in found if about.name == "gguf-mxfp4")
    assert about.when.startswith("engines with kernels for MXFP4") and about.containers == ("gguf",)


def test_digest_follows_the_output_bytes_only(write):
    base = load_recipe(write(GOOD)).digest()
    same = ["output=elsewhere", "score=false", "gate.max_kld=1", "steps[0].quantize.scheme=Q4_K_M"]
    assert all(load_recipe(write(GOOD), [text]).digest() == base for text in same)
    assert load_recipe(write("# a comment\n" + GOOD.replace("Q8_0", "q8_0"))).digest() == base
    other = ["seed=1", "model=m", "calibration.samples=65", "steps[0].quantize.solver.damping=0.06",
             "steps[0].quantize.rules[0].solver=gptq", "steps[0].quantize.ignore=[router]"]  # fmt: skip
    assert len({load_recipe(write(GOOD), [text]).digest() for text in other} | {base}) == len(other) + 1


def test_recipes_from_before_text_could_be_mixed_keep_their_digest(write):
    """Those that runs were begun with; the numbers are of that version."""
    text = "name: x\nmodel: m\ncalibration: {samples: 64}\nsteps: [{quantize: {solver: rtn, scheme: Q8_0}}]\nexport: [{container: gguf}]\n"
    old = "603fb956c4e418278d8570b8f56ea8fdb8d2418747b5c935d131ba6e788ebe47"
    novels = "6daca61c865b237f15ac316eafb14a2954ffe473d663c0fa6e12c95fe65447ad"
    assert load_recipe(write(text)).digest() == load_recipe(write(text), ["calibration.dataset=mixed"]).digest() == old
    assert load_recipe(write(text), ["calibration.dataset=novels"]).digest() == novels
    new = ["calibration.dataset=chat", "calibration.mix={chat: 1}", "calibration.mix={chat: 2}", "calibration.column=a",
           "calibration.split=test", "calibration.template=true", "calibration.template=false"]  # fmt: skip
    assert len({load_recipe(write(text), [one]).digest() for one in new} | {old}) == len(new) + 1


def test_calibration_text_is_one_source_and_ships_without_its_place(write, tmp_path):
    (mine := tmp_path / "mine.jsonl").write_text("")
    base = "model: m\nexport: [{container: gguf}]\n"

    def said(calibration, *sets):
        return load_recipe(write(f"{base}calibration: {calibration}\n"), sets).calibration

    assert said("{}").source.label == "" and said("{dataset: -}").dataset == "-"
    assert said("{}", "calibration.dataset=-").dataset == "-"
    assert said("{dataset: mixed}", "calibration.dataset=null", "calibration.mix={chat: 1}").mix == {"chat": 1}
    assert said(f"{{dataset: {mine}, column: body}}").portable() == {
        "dataset": "mine.jsonl", "column": "body", "samples": 256, "length": 512,
    }  # fmt: skip
    mix = f"{{mix: {{{mine}: .5, 'owner/set:config': 1, {tmp_path}/more/mine.jsonl: 2}}}}"
    assert said(mix).portable()["mix"] == {"mine.jsonl (1)": 0.5, "owner/set:config": 1, "mine.jsonl (3)": 2}
    for wrong, what in (
        ("{dataset: chat, mix: {chat: 1}}", "x.yaml:3: calibration: dataset and mix exclude each other"),
        ("{mix: {}}", "x.yaml:3: calibration: mix names no text"),
        ("{mix: {chat: 0}}", "x.yaml:3: calibration.mix.chat: must be more than 0"),
        ("{mix: {chat: -.inf}}", "x.yaml:3: calibration.mix.chat: -.inf is no finite number"),
        ("{mix: [chat]}", "x.yaml:3: calibration.mix: expected a mapping"),
        ("{template: 1}", "x.yaml:3: calibration.template: expected true or false"),
        ("{columns: a}", "x.yaml:3: calibration.columns: unknown key 'columns'; nearest: column"),
    ):
        (found,) = problems_of(write(f"{base}calibration: {wrong}\n"))
        assert what in found


def test_names_are_found_and_misnamed_ones_suggested(tmp_path):
    assert load_recipe("qwen-moe-2bit").name == "qwen-moe-2bit"
    assert "qwen-moe-2bit" in problems_of("qwen-moe-2bits")[0]
    assert "gguf-q4-k-m" in problems_of("recipes/gguf-q4-km.yaml")[0]
    assert "is a folder" in problems_of(tmp_path)[0]
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in problems_of(tmp_path / "b.yaml")[0]


def test_shipped_recipes():
    shipped = bundled_recipes()
    promised = {"qwen-moe-2bit", "qwen-moe-2bit-plus", "gguf-q4-k-m", "gptq-w4-g128", "rtn-w4-g128"}
    assert promised <= set(shipped)
    for name, path in shipped.items():
        assert path.read_text().startswith("# When to choose this: "), name
        assert load_recipe(path).name == name


def moe(**changes):
    sizes = {"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 256}
    sizes |= {"shared_expert_intermediate_size": 512, "tie_word_embeddings": False}
    return load_spec({**LLAMA, "model_type": "qwen2_moe", **sizes, **changes})


def codecs_of(matcher: RuleMatcher, spec, role: str) -> dict[int | None, str | None]:
    return {t.layer: (rule := matcher.match(t)) and rule.codec for t in spec.tensors() if t.role == role}


def test_moe_2bit_covers_every_tensor():
    spec = moe()
    matcher = load_recipe("qwen-moe-2bit").steps[0].quantize.matcher(spec)
    chosen = {t.role: matcher.match(t).codec for t in spec.tensors()}
    assert chosen["routed_experts.gate"] == chosen["routed_experts.up"] == "iq2_xxs"
    assert chosen["routed_experts.down"] == "q2_k" and chosen["router"] == chosen["norms"] == "f32"
    eights = ("attention.q", "shared_experts.up", "embeddings", "lm_head")
    assert {chosen[role] for role in eights} == {"q8_0"}


def test_plus_keeps_the_last_quarter():
    for count, kept in ((32, 8), (4, 1), (3, 1), (1, 1)):
        spec = moe(num_hidden_layers=count)
        matcher = load_recipe("qwen-moe-2bit-plus").steps[0].quantize.matcher(spec)
        for role, low in (("routed_experts.down", "q2_k"), ("routed_experts.up", "iq2_xxs")):
            expected = {n: "q4_k" if n >= count - kept else low for n in range(count)}
            assert codecs_of(matcher, spec, role) == expected


def test_q4_k_m_of_a_known_model():
    """Shaped as Llama-3-8B: the first and last eighth and every third layer between get Q6_K."""
    spec = load_spec(LLAMA)
    matcher = RuleMatcher(expand("Q4_K_M", spec), spec.layers)
    more = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
    assert {n for n in range(32) if use_more_bits(n, 32)} == more
    for role in ("attention.v", "mlp.down"):
        assert codecs_of(matcher, spec, role) == {n: "q6_k" if n in more else "q4_k" for n in range(32)}
    assert codecs_of(matcher, spec, "lm_head") == {None: "q6_k"}
    assert codecs_of(matcher, spec, "embeddings") == {None: "q4_k"}
    assert set(codecs_of(matcher, spec, "norms").values()) == {"f32"}


def test_every_scheme_expands_for_every_shape_of_model():
    tied = load_spec({**LLAMA, "tie_word_embeddings": True})
    for spec in (load_spec(LLAMA), moe(), moe(num_experts=8), tied):
        for scheme in (*SCHEMES, "W2A16G64", "w4a16_g32_asym"):
            if scheme in EXPERT_SCHEMES and not spec.experts:
                continue
            matcher = RuleMatcher(expand(scheme, spec), spec.layers)
            for tensor in spec.tensors():
                rule = matcher.match(tensor)
                if scheme_kind(scheme) == "ggml":
                    assert rule is not None, (scheme, tensor)
                elif tensor.role in ("lm_head", "embeddings", "router", "norms", "biases"):
                    assert rule is None
                else:
                    assert rule.codec.startswith(f"int{scheme[1]}-")


def test_import_is_light():
    code = "import sys, compress.recipe.schema; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- what files that ship know of a recipe ------------------------------------------------------


def test_files_know_a_recipe_by_names_alone(tmp_path: Path) -> None:
    """So its digest there is the same wherever model and texts lie, and no other recipe's; as read back it is the same."""
    digests = set()
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        for name in ("a.txt", "b.txt"):
            (tmp_path / folder / name).write_text("words")
        place = tmp_path / folder
        for text in (f"dataset={place / 'a.txt'}", f"mix={{{place / 'a.txt'}: 2, {place / 'b.txt'}: 1}}"):
            recipe = load_recipe(
                "gguf-q4-k-m", [f"calibration.{text}", *DROP[text[:3]]], model=str(place), output=folder
            )
            told = recipe.told("owner/name@0")
            again = load_recipe(told.portable(), output=folder)
            assert again == told and told.told("owner/name@0") == told and str(tmp_path) not in str(told)
            digests.add((text[:3], told.digest()))
    assert len(digests) == 2


DROP = {"dat": (), "mix": ("calibration.dataset=null",)}


def test_a_registered_scaling_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which `as_dict` calls by its name inside."""

    class Mine(TransformOptions):
        name: Literal["mine"] = "mine"
        strength: float = 0.5

    monkeypatch.setitem(SCALINGS, "mine", Mine)
    values = {"model": "m", "name": "x", "output": "o", "export": [{"container": "gguf"}]}
    recipe = load_recipe({**values, "steps": [{"mine": {"strength": 0.25}}, {"quantize": {"scheme": "Q4_K_M"}}]})
    again = load_recipe(recipe.as_dict())
    assert again == recipe and again.step("scaling") == Mine(strength=0.25) and again.digest() == recipe.digest()
    with pytest.raises(RecipeError, match="mine: strength"):
        load_recipe({**values, "steps": [{"scaling": {"name": "mine", "strength": "much"}}]})
    with pytest.raises(RecipeError):
        load_recipe({**values, "steps": [{"other": {"name": "mine"}}]})
