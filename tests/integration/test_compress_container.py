"""The container `compress` and its runtime: folders of every family load in transformers and compute what the decoded
weights do, in a fresh process and in half precision; what goes wrong is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from compress.codecs.names import codec_info
from compress.containers import CONTAINERS
from compress.containers import compress as container
from compress.containers.base import Options, WriteRequest
from compress.containers.compress import Setting, setting_of
from compress.decode import decode
from compress.engines.streamed import StreamedSource
from compress.engines.transformers import TransformersSource
from compress.errors import CheckpointError, OutputError
from compress.models import ModelSpec, load_spec
from compress.plan.tensor import PlannedTensor
from compress.runtime.embedding import PackedEmbedding, TiedHead
from compress.runtime.linear import PackedLinear
from compress.solve.tensor import as_stored, solve_tensor
from compress.solvers.options import RtnOptions
from compress.weights import Packed
from tests.integration.containers import spec_of, token_ids, weights_of
from tests.integration.runs import carry_out
from tests.integration.runs import small as small_recipe
from tests.tiny import demo_model, tiny_model

ROOT = Path(__file__).resolve().parents[2]
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256, "num_experts": 4}
MIX = (
    "q4_k", "int4-g64", "f16", "q2_k", "e8p", "int3-g32-asym", "nf4", "trellis2", "iq2_xxs", "int2-row", "nf4-dq",
    "q8_0",
)  # fmt: skip
HYBRIDS: dict[str, dict[str, Any]] = {
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "moe"], "mamba_num_heads": 16, "n_routed_experts": 4,
        "moe_intermediate_size": 256, "moe_shared_expert_intermediate_size": 256,
    },
}  # fmt: skip
"""Experts at other places of a block, without gates, below other names than transformers'."""
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "mixtral", *HYBRIDS)


@dataclass(frozen=True)
class Written:
    """A folder with what it was made from."""

    folder: Path
    model: Path
    spec: ModelSpec
    plan: list[PlannedTensor]
    packed: dict[str, Packed]

    @property
    def dense(self) -> Callable[[str], torch.Tensor]:
        return lambda name: decode(self.packed[name])


def planned(spec: ModelSpec, codec_of: Callable[[Any, int], str | Setting]) -> list[PlannedTensor]:
    """One line a tensor: matrices as `codec_of(tensor, number)` says, the rest in f32."""
    lines, number = [], 0
    for tensor in spec.tensors():
        wanted: str | Setting = "f32"
        if len(tensor.shape) == 2 and tensor.role != "router":
            wanted, number = codec_of(tensor, number), number + 1
        setting = Setting(wanted, codec_info(wanted).kind == "vector") if isinstance(wanted, str) else wanted
        solver = None if codec_info(setting.codec).kind == "float" else RtnOptions()
        line = PlannedTensor(tensor, setting.codec, solver, 0, None, setting.incoherence, setting.activations)
        lines.append(replace(line, bytes=container.tensor_bytes(line)))
    return lines


def rounded(plan: list[PlannedTensor], model: Path) -> dict[str, Packed]:
    """The tensors of a model folder as a plan says."""
    weights = weights_of(model)
    return {
        line.name: as_stored(line, weights[line.name])
        if line.solver is None
        else solve_tensor(line, weights[line.name], None).pack()
        for line in plan
    }


def written(
    folder: Path,
    family: str,
    codec_of: Callable[[Any, int], str | Setting],
    options: Options | None = None,
    **overrides: Any,
) -> Written:
    """A tiny random model, rounded and written to `folder`/out."""
    wide = {**WIDE, **(EXPERTS if "_moe" in family else {}), **overrides}
    model = tiny_model(family, folder / "model", **wide)
    spec = spec_of(model)
    plan = planned(spec, codec_of)
    packed = rounded(plan, model)
    container.write(
        WriteRequest(
            folder / "out",
            spec,
            plan,
            packed.__getitem__,
            source=model,
            options=options or Options(),
            provenance={"a": "b"},
        )
    )
    return Written(folder / "out", model, spec, plan, packed)


def mixed(tensor: Any, number: int) -> str:
    return "q8_0" if tensor.role == "embeddings" else MIX[number % len(MIX)]


def small(family: str) -> dict[str, Any]:
    """Overrides that exercise what is special about a family at little cost."""
    if family in HYBRIDS:
        return HYBRIDS[family]
    heads = {"head_dim": 64} if "qwen3" in family else {}
    tied = {"tie_word_embeddings": True} if "qwen3" in family else {}
    return {**heads, **tied, "num_hidden_layers": 1 if family in ("qwen2_moe", "qwen3_moe", "mixtral") else 2}


def logits_of(source: Any, ids: np.ndarray) -> np.ndarray:
    return next(iter(source.logits([ids])))


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def rewrite(folder: Path, **quantization: Any) -> None:
    config = config_of(folder)
    config["quantization_config"].update(quantization)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Sharded, with every codec of the mix."""
    options = Options(max_shard_size=600_000)
    return written(tmp_path_factory.mktemp("llama"), "llama", mixed, options, attention_bias=True)


# -- whole models ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_its_decoded_weights_do(family: str, tmp_path: Path) -> None:
    made = written(tmp_path, family, mixed, **small(family))
    source = TransformersSource(made.folder)
    assert source.ignored == ()
    ids = token_ids(24)
    expected = logits_of(StreamedSource(made.spec, made.dense, "decoded"), ids)
    actual = logits_of(source, ids)
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()
    held = source.model.state_dict().keys()
    there = {"block_sparse_moe": "mlp", "backbone": "model"}
    names = [line.name for line in made.plan if line.solver is not None]
    coded = {".".join(there.get(word, word) for word in name.split(".")) for name in names}
    assert not coded & held  # nothing dense was kept
    assert all(any(name.startswith(f"{weight[:-7]}.") for name in held) for weight in coded)
    assert isinstance(source.model.get_input_embeddings(), PackedEmbedding)
    assert isinstance(source.model.get_output_embeddings(), TiedHead) == made.spec.tied
    assert not made.spec.tied or not any(name.startswith("lm_head") for name in held)


def test_the_file_is_as_small_as_planned(llama: Written) -> None:
    """Headers aside."""
    data = header = 0
    for file in llama.folder.glob("*.safetensors"):
        size = int.from_bytes(file.read_bytes()[:8], "little")
        header, data = header + 8 + size, data + file.stat().st_size - 8 - size
    assert data == sum(line.bytes for line in llama.plan)
    assert len(list(llama.folder.glob("model-*.safetensors"))) > 1


def test_open_dense_gives_the_very_values(llama: Written) -> None:
    load = container.open_dense(sorted(llama.folder.glob("*.safetensors")), llama.spec)
    for line in llama.plan:
        assert torch.equal(load(line.name), llama.dense(line.name)), line.name
    with pytest.raises(CheckpointError, match="no tensor model.none.weight"):
        load("model.none.weight")


def test_half_precision_models(llama: Written) -> None:
    """bfloat16 and float16 activations, within a few roundings of float32's logits; f32 parts stay float32."""
    from transformers import AutoModelForCausalLM

    ids = torch.from_numpy(token_ids(16))[None]
    expected = torch.from_numpy(logits_of(TransformersSource(llama.folder), ids[0].numpy()))
    for dtype, limit in ((torch.bfloat16, 0.06), (torch.float16, 0.008)):
        model = AutoModelForCausalLM.from_pretrained(llama.folder, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert {b.dtype for n, b in model.named_buffers() if n.endswith(".absmax")} <= {torch.float32, torch.uint8}
        with torch.inference_mode():
            logits = model(ids).logits[0].float()
        assert (logits - expected).abs().max() < limit * expected.abs().max()


def test_renamed_floats_get_the_wanted_dtype(tmp_path: Path) -> None:
    """Mixtral's routers, stored in float32, are the first floats of a model whose other matrices are all packed."""
    from transformers import AutoModelForCausalLM

    made = written(tmp_path, "mixtral", lambda *_: "q8_0", num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ids = torch.from_numpy(token_ids(8))[None]
    with torch.inference_mode():
        logits = model(ids).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    # tables made in inference mode serve gradients later
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    model(inputs_embeds=embedded).logits.float().sum().backward()
    assert embedded.grad.isfinite().all() and embedded.grad.abs().sum() > 0


def in_fresh_process(code: str, *arguments: str, **environment: str) -> None:
    """Run code that must not print, warn or fail."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    assert not result.stderr.strip()


def test_a_fresh_process_needs_only_the_import(llama: Written, tmp_path: Path) -> None:
    out = tmp_path / "logits.pt"
    code = """
import sys
import compress
assert not {"torch", "transformers"} & set(sys.modules)
import transformers
import torch
transformers.logging.disable_progress_bar()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
ids = torch.arange(5)[None]
with torch.inference_mode():
    torch.save(model(ids).logits, sys.argv[2])
tokens = model.generate(ids, max_new_tokens=3, do_sample=False)
assert tokens.shape == (1, 8) and tokens[0, 5] == torch.load(sys.argv[2])[0, -1].argmax()
"""
    in_fresh_process(code, str(llama.folder), str(out))
    expected = torch.from_numpy(logits_of(TransformersSource(llama.folder), np.arange(5)))
    torch.testing.assert_close(torch.load(out)[0], expected, rtol=0, atol=1e-4)


def test_the_order_of_imports_does_not_matter() -> None:
    code = """
import transformers.quantizers.auto as auto
assert "compress" not in auto.AUTO_QUANTIZER_MAPPING
import compress
from compress.runtime.hook import install
install()
assert auto.AUTO_QUANTIZER_MAPPING["compress"].__module__ == "compress.runtime.loader"
"""
    in_fresh_process(code)


def test_without_the_import_transformers_refuses_to_load(llama: Written, tmp_path: Path) -> None:
    """Each way into the folder, and the code in it where compress is not installed."""
    code = """
import sys
import transformers
transformers.logging.set_verbosity_error()
sys.modules["compress"] = None
folder = sys.argv[1]
for load in (
    transformers.AutoModelForCausalLM.from_pretrained,
    transformers.LlamaForCausalLM.from_pretrained,
    lambda folder: transformers.pipeline("text-generation", folder),
):
    try:
        load(folder)
    except ValueError as error:
        assert "`import compress` before you load them (pip install compress-llm)" in str(error), error
    else:
        raise AssertionError("loaded")
try:
    transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
except ImportError as error:
    assert "packed by compress, which is not installed: pip install compress-llm" in str(error), error
else:
    raise AssertionError("loaded")
"""
    in_fresh_process(code, str(llama.folder), HF_HOME=str(tmp_path))


def test_trusted_code_in_the_folder_does_the_import(llama: Written, tmp_path: Path) -> None:
    out = tmp_path / "logits.pt"
    code = """
import sys
import torch
import transformers
transformers.logging.disable_progress_bar()
loaded = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32", trust_remote_code=True)
model = transformers.pipeline("text-generation", sys.argv[1], dtype="float32", trust_remote_code=True).model
assert type(loaded) is type(model) is transformers.LlamaForCausalLM
with torch.inference_mode():
    torch.save([m(torch.arange(5)[None]).logits for m in (loaded, model)], sys.argv[2])
"""
    in_fresh_process(code, str(llama.folder), str(out), HF_HOME=str(tmp_path))
    expected = torch.from_numpy(logits_of(StreamedSource(llama.spec, llama.dense, "decoded"), np.arange(5)))
    for logits in torch.load(out):
        torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_the_originals_card_goes_along_and_what_it_names_does_not(tmp_path: Path) -> None:
    """The artifact's own card comes with its scores, from the run."""
    model = tiny_model("llama", tmp_path / "model", num_hidden_layers=1)
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: 'odd: [name]'\n---\n# Original\n")
    spec = load_spec({**config_of(model), "auto_map": {"AutoConfig": "theirs.C"}, "transformers_weights": "theirs.bin"})
    plan = planned(spec, lambda *_: "int4-g32")
    fetch = rounded(plan, model).__getitem__
    for name in ("compress", "safetensors"):
        CONTAINERS[name].write(WriteRequest(tmp_path / name, spec, plan, fetch, source=model))
    assert (tmp_path / "compress" / "README-original.md").read_text().endswith("# Original\n")
    assert not (tmp_path / "compress" / "README.md").exists()
    # of files that do not go along nothing is left, whatever the container
    assert not {"auto_map", "transformers_weights"} & config_of(tmp_path / "safetensors").keys()
    assert config_of(tmp_path / "compress")["auto_map"] == {"AutoConfig": "configuration_compress.CompressConfig"}


def test_saved_again_it_is_the_same_model(tmp_path: Path) -> None:
    """save_pretrained keeps bytes and names of the checkpoint: Mixtral's are renamed on loading and back on saving."""
    made = written(tmp_path, "mixtral", mixed)
    source = TransformersSource(made.folder)
    source.model.save_pretrained(tmp_path / "again")
    first, again = load_file(made.folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == again.keys()
    coded = {name for name in first if not name.endswith(("weight", "bias"))}
    assert coded and all(torch.equal(first[name], again[name]) for name in coded)
    for key in ("quantization_config", "auto_map", "transformers_weights"):
        assert config_of(made.folder)[key] == config_of(tmp_path / "again")[key]
    for folder in (made.folder, tmp_path / "again"):
        assert "install()" in (folder / "configuration_compress.py").read_text()
    with pytest.raises(OutputError, match="model.push_to_hub"):
        source.model.save_pretrained(tmp_path / "sent", push_to_hub=True)
    dense = type(source.model).from_pretrained(made.model)
    dense.save_pretrained(tmp_path / "dense")
    assert "transformers_weights" not in config_of(tmp_path / "dense") and not list((tmp_path / "dense").glob("*.py"))
    ids = token_ids(9)
    np.testing.assert_array_equal(logits_of(TransformersSource(tmp_path / "again"), ids), logits_of(source, ids))


# -- rules -------------------------------------------------------------------------------------------------------------
def test_thousands_of_experts_take_a_few_lines() -> None:
    """Every module reads its own setting back, whatever the exceptions are."""
    config = json.loads((demo_model() / "config.json").read_text())
    spec = load_spec({**config, "num_hidden_layers": 24, "num_experts": 64})
    generator = np.random.default_rng(0)

    def codec(tensor: Any, number: int) -> str:
        if tensor.layer in (0, 5) and tensor.role == "routed_experts.down":
            return "q8_0"
        if tensor.role.startswith("routed_experts"):
            return "int4-g32" if generator.random() > 0.01 else ("f16", "int2-g32", "q8_0")[number % 3]
        return "f16" if tensor.layer == 3 else "q8_0"

    plan = planned(spec, codec)
    rules = container.quantization_rules(plan)
    assert len(rules) < 100 < 4600 < len(plan)
    for line in plan:
        if len(line.spec.shape) == 2 and line.spec.role != "router":
            setting = setting_of(rules, container.module_name(line.name))
            assert (setting.codec if setting else "f16") == line.codec, line.name


def test_settings_survive_config_json(tmp_path: Path) -> None:
    def codec(tensor: Any, number: int) -> str | Setting:
        return Setting("int4-g64", incoherence=True, activations="int8") if tensor.role == "mlp.up" else "f16"

    made = written(tmp_path, "llama", codec)
    section = config_of(made.folder)["quantization_config"]
    assert section == {
        "quant_method": "compress",
        "format": 1,
        "parts": {"int4-g64": ["codes", "scales"]},
        "modules": {"model.layers.*.mlp.up_proj": {"codec": "int4-g64", "incoherence": True, "activations": "int8"}},
    }
    linear = TransformersSource(made.folder).model.get_submodule("model.layers.1.mlp.up_proj")
    assert linear.setting == Setting("int4-g64", True, "int8")


def test_experts_with_shared_signs_transform_their_input_once(tmp_path: Path) -> None:
    """Gates and ups of a block draw the same input signs; sharing the transform changes nothing but rounding."""
    codec = lambda tensor, _: "e8p" if tensor.role.startswith("routed") else "f16"  # noqa: E731
    made = written(tmp_path, "qwen2_moe", codec, num_hidden_layers=1)
    model = TransformersSource(made.folder).model
    experts = model.get_submodule("model.layers.0.mlp.experts")
    assert experts.shared is not None
    x = torch.randn(5, 256)
    index, weights = torch.tensor([[0, 3], [3, 1], [0, 1], [3, 3], [2, 0]]), torch.rand(5, 2)
    weights[3, 1] = 0
    index[3, 1] = 4  # no expert
    with torch.inference_mode():
        shared = experts(x, index, weights)
        object.__setattr__(experts, "shared", None)
        alone = experts(x, index, weights)
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-5)
    expected = torch.zeros(5, 256)
    for token in range(5):
        for slot in range(2):
            if index[token, slot] < 4:
                name = f"model.layers.0.mlp.experts.{index[token, slot]}."
                gate, up, down = (made.dense(f"{name}{leaf}_proj.weight") for leaf in ("gate", "up", "down"))
                hidden = torch.nn.functional.silu(gate @ x[token]) * (up @ x[token])
                expected[token] += weights[token, slot] * (down @ hidden)
    torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-4)


def test_8_bit_activations_inside_a_model(tmp_path: Path) -> None:
    """One layer of a loaded W8A8 model recomputed by numpy from the file's bytes and the inputs it saw."""
    made = written(tmp_path, "qwen2", lambda *_: Setting("int8-row", activations="int8"), num_hidden_layers=1)
    model = TransformersSource(made.folder).model
    seen: list[np.ndarray] = []
    name = "model.layers.0.self_attn.k_proj"
    model.get_submodule(name).register_forward_hook(lambda _, args, y: seen.extend((args[0].numpy(), y.numpy())))
    with torch.inference_mode():
        model(torch.from_numpy(token_ids(6))[None])
    x, y = seen[0][0], seen[1][0]
    file = load_file(made.folder / "model.safetensors")
    scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
    sums = np.rint(x / scale).astype(np.int64) @ (file[f"{name}.codes"].numpy().astype(np.int64) - 128).T
    expected = sums * scale * file[f"{name}.scales"].numpy().astype(np.float32).T + file[f"{name}.bias"].numpy()
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


# -- a run -------------------------------------------------------------------------------------------------------------
def test_a_recipe_delivers_such_a_folder(tmp_path: Path) -> None:
    """Calibrated, written, and loaded by transformers for its own checks."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        """
name: packed
model: any
steps:
  - quantize:
      solver: rtn
      rules:
        - {targets: embeddings, codec: q8_0}
        - {targets: attention, codec: int8-row, activations: int8}
        - {targets: routed_experts.gate, codec: e8p}
        - {targets: routed_experts, codec: int4-g64}
export: [{container: compress}]
"""
    )
    model = tiny_model(
        "qwen3_moe", tmp_path / "model", hidden_size=256, moe_intermediate_size=64, num_experts=3, num_hidden_layers=1
    )
    card = carry_out(small_recipe(recipe, model, tmp_path / "out"))
    assert card.gate.passed and [a.container for a in card.artifacts] == ["compress"]
    folder = tmp_path / "out" / "packed-compress"
    source = TransformersSource(folder)
    assert {m.setting.codec for m in source.model.modules() if isinstance(m, PackedLinear)} == {
        "int8-row", "e8p", "int4-g64",
    }  # fmt: skip
    assert json.loads((folder / "compress.json").read_text())["compress.recipe"] == "packed"


# -- what goes wrong ---------------------------------------------------------------------------------------------------
def broken(llama: Written, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(llama.folder, tmp_path / "broken"))


def refusal(folder: Path) -> str:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(), pytest.raises(CheckpointError) as caught:
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with pytest.raises(CheckpointError):
        TransformersSource(folder)
    return str(caught.value)


def test_a_newer_format_is_named(llama: Written, tmp_path: Path) -> None:
    folder = broken(llama, tmp_path)
    rewrite(folder, format=2)
    assert "format 2" in refusal(folder) and "install a newer compress" in refusal(folder)


def test_a_newer_codec_is_named(llama: Written, tmp_path: Path) -> None:
    folder = broken(llama, tmp_path)
    rewrite(folder, modules={"lm_head": {"codec": "e9p", "incoherence": True, "activations": None}})
    assert "codec 'e9p' is not known" in refusal(folder)
    rewrite(folder, modules={"lm_head": {"codec": "e8p", "sparsity": 2}})
    assert "cannot read the entry of lm_head" in refusal(folder)


def test_a_missing_shard_is_named(llama: Written, tmp_path: Path) -> None:
    folder = broken(llama, tmp_path)
    shard = sorted(folder.glob("model-00002-*"))[0]
    shard.unlink()
    assert f"{shard.name} is listed in the index but does not exist" in refusal(folder)


def test_a_missing_part_is_named(llama: Written, tmp_path: Path) -> None:
    folder = broken(llama, tmp_path)
    rewrite(folder, parts={**config_of(folder)["quantization_config"]["parts"], "q4_k": ["blocks", "extra"]})
    assert ".extra" in refusal(folder) and "lacks" in refusal(folder)


def test_plans_that_cannot_run_are_refused(tmp_path: Path) -> None:
    spec = spec_of(tiny_model("qwen2_moe", tmp_path / "m", tokenizer=False))
    with pytest.raises(OutputError, match="embeddings are looked up row by row"):
        container.check_plan(spec, planned(spec, lambda tensor, _: "e8p"))
    with pytest.raises(OutputError, match="keeps router in float"):
        lines = [PlannedTensor(t, "q8_0" if t.role == "router" else "f32", None, 0) for t in spec.tensors()]
        container.check_plan(spec, lines)
