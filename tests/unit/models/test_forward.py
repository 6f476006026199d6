"""Our blocks against transformers' models, in float32, for every family and option we support."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.errors import ConfigError, UnsupportedModel
from compress.models import known_families, load_spec
from compress.models.checkpoint import Checkpoint
from compress.models.forward import (
    Pooled,
    Routing,
    Taps,
    embedded,
    final_norm,
    forward_block,
    forward_branch,
    logits,
)
from compress.models.forward.moe import route
from compress.models.forward.rope import rope_tables
from compress.models.layers.moe import MoE
from compress.models.spec import ModelSpec
from tests.tiny import FAMILIES, tiny_config, tiny_model

LENGTH = 48
SMALL = {"vocab_size": 160, "hidden_size": 48, "bos_token_id": 1, "eos_token_id": 2}


def _rope(kind: str, theta: float = 1e4, **more: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


def _window(length: int, start: int, use: bool = True) -> dict[str, Any]:
    return {"use_sliding_window": use, "sliding_window": length, "max_window_layers": start}


LONGROPE = {"max_position_embeddings": 256, "rope_parameters": {
    "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "long_factor": [1.0, 2.5, 16.0],
    "short_factor": [1.0, 1.2, 2.0]}}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in FAMILIES},
    "llama, one kv head": ("llama", {"num_key_value_heads": 1}),
    "llama, no grouping, tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama, all biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, head_dim": ("llama", {"head_dim": 20}),
    "llama, theta and eps": ("llama", {**_rope("default", 5e5), "rms_norm_eps": 1e-3}),
    "llama, linear rope": ("llama", _rope("linear", factor=4.0)),
    "llama, llama3 rope": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32, "rope_theta": 1e4}}),
    "phi3, longrope": ("phi3", {**LONGROPE, "original_max_position_embeddings": 128}),
    "phi3, longrope on a long text": ("phi3", {**LONGROPE, "original_max_position_embeddings": 16}),
    "phi3, window, all of a head": ("phi3", {**_rope("default"), "sliding_window": 8}),
    "glm4_moe, without norms and biases": ("glm4_moe", {"use_qk_norm": False, "attention_bias": False}),
    "olmoe, shared keys and values": ("olmoe", {"num_key_value_heads": 2, "attention_bias": True}),
    "smollm3, window where there are no positions": ("smollm3", {
        "use_sliding_window": True, "sliding_window": 8, "attention_bias": True, "mlp_bias": True}),
    "seed_oss, all biases": ("seed_oss", {"attention_out_bias": True, "mlp_bias": True}),
    "ministral3, window, no growth": ("ministral3", {"sliding_window": 8, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.0, "original_max_position_embeddings": 16}}),
    "ernie4_5_moe, every other layer": ("ernie4_5_moe", {
        "moe_layer_start_index": 0, "moe_layer_end_index": 1, "moe_layer_interval": 2, "moe_num_shared_experts": 0}),
    "hunyuan_v1_dense, alpha": ("hunyuan_v1_dense", {**_rope("dynamic", alpha=50.0, factor=1.0), "attention_bias": True}),
    "hunyuan_v1_moe, alpha, lists": ("hunyuan_v1_moe", {**_rope("dynamic", alpha=1000.0, factor=1.0), "moe_topk": [2, 2]}),
    "deepseek_v32, few tokens chosen": ("deepseek_v32", {"index_topk": 8, "rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4, "mscale": 1.0,
        "mscale_all_dim": 1.0}}),
    "glm_moe_dsa, few tokens chosen": ("glm_moe_dsa", {"index_topk": 8, "mlp_layer_types": ["sparse", "dense", "sparse"]}),
    "exaone4, windows": ("exaone4", {"num_hidden_layers": 4, "sliding_window": 8, "layer_types": None,
                                     "sliding_window_pattern": 4}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}}),
    "qwen3, yarn with its own attention factor": ("qwen3", {"rope_parameters": {
        "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "attention_factor": 0.9,
        "beta_fast": 16, "beta_slow": 2, "rope_theta": 1e6}}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, window from the second layer": ("qwen2", _window(7, 1)),
    "qwen2, window not used": ("qwen2", _window(7, 0, use=False)),
    "qwen3, biases": ("qwen3", {"attention_bias": True}),
    "mistral, window": ("mistral", {"sliding_window": 9}),
    "mistral, window longer than the text": ("mistral", {"sliding_window": 100}),
    "mixtral, window": ("mixtral", {"sliding_window": 9}),
    "mixtral, top 1 of 3": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1}),
    "qwen2_moe, normalised": ("qwen2_moe", {"norm_topk_prob": True}),
    "qwen2_moe, no bias": ("qwen2_moe", {"qkv_bias": False}),
    "qwen2_moe, every second block sparse": ("qwen2_moe", {"decoder_sparse_step": 2}),
    "qwen2_moe, dense block": ("qwen2_moe", {"mlp_only_layers": [0]}),
    "qwen2_moe, window": ("qwen2_moe", _window(6, 1)),
    "qwen3_moe, not normalised": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen3_moe, every second block sparse": (
        "qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [3], "num_hidden_layers": 4}),
    "qwen3_moe, window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 6}),
    "qwen3_moe, all experts": ("qwen3_moe", {"num_experts_per_tok": 6}),
    "qwen3_moe, tied": ("qwen3_moe", {"tie_word_embeddings": True, "attention_bias": True}),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def _ids() -> Tensor:
    return torch.randint(0, SMALL["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(0))


def _reference(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def _load(path: Path) -> tuple[ModelSpec, dict[str, Tensor]]:
    checkpoint = Checkpoint.open(path)
    spec = load_spec(checkpoint.config)
    weights = {tensor.name: checkpoint.load(tensor.name).float() for tensor in spec.tensors()}
    for tensor in spec.tensors():
        assert tuple(weights[tensor.name].shape) == tensor.shape, tensor.name
    whole = {entry.part.name for entry in checkpoint.entries.values() if entry.part}
    left = set(checkpoint.entries) - set(weights) - whole - {"lm_head.weight"}
    assert not left, f"tensors nobody planned: {left}"
    return spec, weights


def _logits(spec: ModelSpec, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    hidden = embedded(spec, weights[spec.embeddings], ids)
    for layer in range(spec.layers):
        before = hidden.clone()
        out = forward_block(spec, layer, weights, hidden)
        assert torch.equal(before, hidden), "the input was modified"
        hidden = out
    return logits(spec, weights[spec.head], final_norm(spec, weights[spec.final_norm], hidden))


@functools.cache
def _case(name: str, folder: Path) -> Path:
    family, overrides = CASES[name]
    return tiny_model(family, folder / name.replace(" ", "-"), tokenizer=False, **{**SMALL, **overrides})


@pytest.mark.parametrize("name", CASES)
def test_blocks_give_transformers_logits(name: str, folder: Path) -> None:
    path = _case(name, folder)
    ids = _ids()
    with torch.no_grad():
        expected = _reference(path)(ids).logits
        spec, weights = _load(path)
        ours = _logits(spec, weights, ids)
    assert expected.std() > 0.1
    assert (ours - expected).abs().max() <= 2e-5 * expected.abs().max()


LEGACY = (
    "llama, linear rope", "llama, llama3 rope", "qwen2, yarn", "qwen2, window from the second layer",
    "qwen2_moe, window",
    "mistral, window", "mixtral", "qwen3_moe",
)  # fmt: skip


@pytest.mark.parametrize("name", LEGACY)
def test_configs_as_most_checkpoints_have_them(name: str, folder: Path, tmp_path: Path) -> None:
    """transformers 4 wrote `rope_theta` and `rope_scaling` (with `type`), and no `layer_types`."""
    source = _case(name, folder)
    config = json.loads((source / "config.json").read_text())
    config.pop("layer_types", None)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else {**rope, "type": rope["rope_type"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    with torch.no_grad():
        expected = _reference(tmp_path)(_ids()).logits
        ours = _logits(*_load(tmp_path), _ids())
    assert (ours - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_gemma3_as_published_configs_have_it(folder: Path, tmp_path: Path) -> None:
    """Without layer_types, positions of either kind at the top level, scaled for full layers alone."""
    source = tiny_model("gemma3_text", tmp_path / "source", num_hidden_layers=4, layer_types=None)
    config = json.loads((source / "config.json").read_text())
    for key in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
        config.pop(key, None)
    config |= {"rope_theta": 5e5, "rope_local_base_freq": 300.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    config |= {"sliding_window_pattern": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    with torch.no_grad():
        expected = _reference(tmp_path)(_ids()).logits
        ours = _logits(*_load(tmp_path), _ids())
    assert (ours - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_gemma4_as_published_configs_have_it() -> None:
    """Heads of full layers by keys of their own, which transformers writes down layer by layer."""
    written = tiny_config("gemma4_text")
    assert written.pop("per_layer_config") == {"1": {"head_dim": 32, "num_key_value_heads": 1}}
    published = written | {"global_head_dim": 32, "num_global_key_value_heads": 1}
    assert load_spec(published).tensors() == load_spec(tiny_config("gemma4_text")).tensors()


@pytest.mark.parametrize("key", ["hidden_size_per_layer_input", "num_kv_shared_layers"])
def test_gemma4_that_reads_more_than_the_stream_is_refused(key: str) -> None:
    with pytest.raises(UnsupportedModel, match=rf"{key}, E2B and E4B.* more than the residual stream"):
        load_spec(tiny_config("gemma4_text") | {key: 1})


def test_llama_has_no_window(folder: Path, tmp_path: Path) -> None:
    """Some Llama configs carry a stray sliding_window; transformers' Llama attends to everything."""
    source = _case("llama", folder)
    config = json.loads((source / "config.json").read_text()) | {"sliding_window": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    with torch.no_grad():
        expected = _reference(tmp_path)(_ids()).logits
        ours = _logits(*_load(tmp_path), _ids())
    assert (ours - expected).abs().max() <= 2e-5 * expected.abs().max()


DEFAULTS = {
    "rms_norm_eps": "norm_eps", "sliding_window": "sliding_window",
    "tie_word_embeddings": "tied", "norm_topk_prob": "norm_topk", "num_experts_per_tok": "experts_per_token",
    "moe_intermediate_size": "moe_intermediate_size",
    "shared_expert_intermediate_size": "shared_intermediate_size",
    "rope_parameters": "rope_theta",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_mean_what_transformers_means(family: str, folder: Path) -> None:
    from transformers import AutoConfig, PreTrainedConfig

    config = json.loads((_case(family, folder) / "config.json").read_text())
    config = PreTrainedConfig._decode_special_floats(config)
    wrong = {}
    for key, field in DEFAULTS.items():
        if key not in config and key != "sliding_window":
            continue
        less = {k: v for k, v in config.items() if k != key}
        if key == "num_experts_per_tok":  # as many as the family's own number can be chosen from
            less |= {name: 16 for name in ("num_experts", "num_local_experts", "n_routed_experts") if name in less}
        theirs = AutoConfig.for_model(family, **{k: v for k, v in less.items() if k != "model_type"})
        expected = getattr(theirs, key, None)
        if key == "rope_parameters":
            expected = expected.get("full_attention", expected)["rope_theta"]
        try:
            ours = getattr(load_spec(less), field)
        except (ConfigError, UnsupportedModel):
            ours = None  # as transformers, which cannot run without it
        if (ours or None) != (expected or None):
            wrong[key] = f"ours {ours}, transformers {expected}"
    assert not wrong


def test_every_family_has_a_tiny_model() -> None:
    assert set(FAMILIES) == set(known_families())


def test_a_window_changes_the_logits(folder: Path) -> None:
    """Guards the cases above: the windows are shorter than the text, so ignoring one would show."""
    for name in (
        "mistral, window",
        "qwen2, window from the second layer",
        "qwen3_moe, window",
        "qwen2_moe, window",
    ):
        spec, weights = _load(_case(name, folder))
        assert any(attention.window for attention, _ in spec.blocks)
        open_spec = load_spec({**spec.config, "sliding_window": None, "layer_types": None})
        assert not any(attention.window for attention, _ in open_spec.blocks)
        with torch.no_grad():
            a, b = _logits(spec, weights, _ids()), _logits(open_spec, weights, _ids())
        assert (a - b).abs().max() > 1e-2 * a.abs().max()


# -- the observer
def _observe(
    spec: ModelSpec,
    weights: dict[str, Tensor],
    hidden: Tensor,
    layer: int,
    until: tuple[int, int] | None = None,
    **options: Any,
) -> tuple[dict[str, tuple[Tensor, Tensor | None]], Tensor | None]:
    """What is seen of a block and its output; until: (sub-layer, stage) that ends it. options: of Taps."""
    seen: dict[str, tuple[Tensor, Tensor | None]] = {}

    def note(key: str, x: Tensor, gate: Tensor | None) -> None:
        assert key not in seen and x.dim() == 2
        seen[key] = (x.clone(), gate)

    out: Tensor | None = hidden
    with torch.no_grad():
        for branch in spec.branches(layer):
            stage = until[1] if until is not None and branch.part == until[0] else None
            out = forward_branch(branch, weights, out, Taps(note, stage, **options))
            if out is None:
                break
    return seen, out


@pytest.mark.parametrize("name", ["llama, all biases", "qwen3", "qwen2"])
def test_observer_sees_the_inputs_of_transformers_linears(name: str, folder: Path) -> None:
    path = _case(name, folder)
    model, (spec, weights) = _reference(path), _load(path)
    inputs: dict[str, Tensor] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, key=module_name: inputs.__setitem__(
                    key, args[0].detach().reshape(-1, args[0].shape[-1])
                )
            )
    with torch.no_grad():
        model(_ids())
    hidden = weights["model.embed_tokens.weight"][_ids()]
    for layer in range(spec.layers):
        seen, hidden = _observe(spec, weights, hidden, layer)
        for tensor in spec.block_tensors(layer):
            if tensor.input is not None:
                x, gate = seen[tensor.input]
                assert gate is None and x.shape[1] == tensor.shape[1]
                torch.testing.assert_close(x, inputs[tensor.name.removesuffix(".weight")], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe", "mixtral"])
def test_observer_sees_each_experts_tokens_and_routing_weights(name: str, folder: Path) -> None:
    """Rows of `experts.e.in` are the router's input at e's tokens; the block's output in transformers is
    rebuilt from what was seen."""
    path = _case(name, folder)
    model, (spec, weights) = _reference(path), _load(path)
    caught: dict[str, Tensor] = {}
    block = (
        model.model.layers[0].mlp if hasattr(model.model.layers[0], "mlp") else model.model.layers[0].block_sparse_moe
    )
    block.register_forward_hook(
        lambda _, args, out: caught.update(x=args[0], out=out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(_ids())
    routes: list[Routing] = []
    hidden = weights["model.embed_tokens.weight"][_ids()]
    seen, _ = _observe(spec, weights, hidden, 0, on_route=routes.append)
    (routing,), moe = routes, spec.blocks[0][1]
    assert isinstance(moe, MoE)
    x = caught["x"].reshape(-1, spec.hidden_size)
    torch.testing.assert_close(seen["router"][0], x, rtol=1e-4, atol=1e-4)
    out = torch.zeros_like(x)
    for e in range(spec.experts):
        tokens = (routing.experts == e).any(1).nonzero()[:, 0]
        if not len(tokens):
            assert f"experts.{e}.in" not in seen
            continue
        rows, gate = seen[f"experts.{e}.in"]
        act, gate_again = seen[f"experts.{e}.act"]
        torch.testing.assert_close(rows, x[tokens], rtol=1e-4, atol=1e-4)
        assert gate is not None and torch.equal(gate, gate_again)
        down = weights[f"model.layers.0.{moe.expert.format(e=e)}{moe.leaves[2]}.weight"]
        out.index_add_(0, tokens, gate[:, None] * (act @ down.T))
    if moe.shared:
        act = seen["shared.act"][0]
        gate = torch.sigmoid(x @ weights["model.layers.0.mlp.shared_expert_gate.weight"].T)
        out += gate * (act @ weights["model.layers.0.mlp.shared_expert.down_proj.weight"].T)
    torch.testing.assert_close(out, caught["out"].reshape(out.shape), rtol=1e-4, atol=1e-4)
    assert (routing.weights.sum(1) - 1).abs().max() < (1e-5 if spec.norm_topk else 1)
    assert ((routing.weights.sum(1) - 1).abs().max() < 1e-5) == spec.norm_topk


@pytest.mark.parametrize("name", ["qwen3", "qwen2_moe", "qwen3_moe", "mixtral"])
def test_until_stops_after_its_stage(name: str, folder: Path) -> None:
    """Stage by stage the same inputs as a full pass, and no weight of a later stage is needed."""
    spec, weights = _load(_case(name, folder))
    hidden = weights["model.embed_tokens.weight"][_ids()]
    everything, out = _observe(spec, weights, hidden, 0)
    assert out is not None
    inputs = {tensor.input for tensor in spec.block_tensors(0) if tensor.input}
    assert inputs - set(everything) <= {f"experts.{e}.{k}" for e in range(spec.experts) for k in ("in", "act")}
    at = {key: (branch.part, given.stage) for branch in spec.branches(0) for key, given in branch.inputs.items()}
    stages = sorted(set(at.values()))
    assert stages == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for stage in stages:
        needed = {
            tensor.name: weights[tensor.name]
            for tensor in spec.block_tensors(0)
            if tensor.input is None or at[tensor.input] < stage or tensor.role == "router"
        }
        seen, result = _observe(spec, needed, hidden, 0, until=stage)
        assert result is None
        known = {key for key in seen if key in inputs}
        assert known == {key for key in everything if key in inputs and at[key] <= stage}
        for key in known:
            assert torch.equal(seen[key][0], everything[key][0])


def test_given_routing_is_obeyed(folder: Path) -> None:
    spec, weights = _load(_case("qwen3_moe", folder))
    hidden = weights["model.embed_tokens.weight"][_ids()]
    tokens = hidden.shape[0] * hidden.shape[1]
    forced = Routing(torch.tensor([[1, 4]]).expand(tokens, 2), torch.tensor([[0.75, 0.25]]).expand(tokens, 2))
    seen, _ = _observe(spec, weights, hidden, 0, routing=forced)
    assert {key for key in seen if key.endswith(".in") and key.startswith("experts")} == {
        "experts.1.in",
        "experts.4.in",
    }
    assert (seen["experts.4.in"][1] == 0.25).all() and len(seen["experts.4.in"][0]) == tokens


@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral"])
def test_pooled_experts_see_everybodys_tokens(name: str, folder: Path) -> None:
    """Activations under every third token, whoever it is routed to; the block computes what it did before."""
    spec, weights = _load(_case(name, folder))
    hidden = weights["model.embed_tokens.weight"][_ids()]
    plain, out = _observe(spec, weights, hidden, 0)
    seen, again = _observe(spec, weights, hidden, 0, pooled=Pooled(frozenset({1, 3}), 3))
    assert torch.equal(out, again) and set(seen) - set(plain) == {"experts.1.act.pool", "experts.3.act.pool"}
    everybody = Routing(
        torch.full((hidden.shape[0] * hidden.shape[1], 1), 3),
        torch.ones(hidden.shape[0] * hidden.shape[1], 1),
    )
    forced, _ = _observe(spec, weights, hidden, 0, routing=everybody)
    act, gate = seen["experts.3.act.pool"]
    assert gate is None
    torch.testing.assert_close(act, forced["experts.3.act"][0][::3], rtol=1e-4, atol=1e-5)


def test_halves_make_a_block(folder: Path) -> None:
    spec, weights = _load(_case("qwen3_moe", folder))
    hidden = weights["model.embed_tokens.weight"][_ids()]
    assert torch.equal(forward_block(spec, 1, weights, hidden), _observe(spec, weights, hidden, 1)[1])


def test_routing_is_softmax_top_k(folder: Path) -> None:
    spec, _ = _load(_case("qwen2_moe", folder))
    logits = torch.randn(50, spec.experts, generator=torch.Generator().manual_seed(1))
    routing = route(spec.blocks[0][1].router, logits)
    probabilities = torch.softmax(logits.double(), 1)
    assert torch.equal(routing.experts, probabilities.argsort(1, descending=True)[:, : spec.experts_per_token])
    torch.testing.assert_close(routing.weights.double(), probabilities.gather(1, routing.experts), rtol=1e-5, atol=1e-7)


# -- refusals
def test_unknown_architecture_lists_what_is_supported() -> None:
    with pytest.raises(UnsupportedModel) as error:
        load_spec({"model_type": "qwen33"})
    assert "qwen3" in str(error.value) and all(name in str(error.value) for name in known_families())
    assert "\n" not in str(error.value) and error.value.exit_code == 2


def test_channels_that_turn_may_be_counted() -> None:
    """As MiniMax-M2's published configurations do, which say no share of a head."""
    config = tiny_config("minimax_m2", rope_parameters={"rope_type": "default", "rope_theta": 5e6})
    counted, whole = load_spec({**config, "rotary_dim": 16}), load_spec(config)
    assert [spec.blocks[0][0].rope.dim for spec in (counted, whole)] == [16, 32]


def test_layers_that_share_what_an_indexer_chose_are_refused() -> None:
    config = tiny_config("glm_moe_dsa")
    for said in ({"indexer_types": ["full", "shared", "full"]}, {"indexer_types": None, "index_topk_freq": 4}):
        with pytest.raises(UnsupportedModel, match="indexer_types"):
            load_spec({**config, **said})


def test_a_model_type_may_be_another_under_its_own_name() -> None:
    """Kimi-K2 is DeepSeek-V3, by its own account of its architecture; what ships says so."""
    config = tiny_config("deepseek_v3", n_group=1, topk_group=1)
    spec, same = load_spec({**config, "model_type": "kimi_k2"}), load_spec(config)
    assert spec == same and spec.model_type == "deepseek_v3"
    with pytest.raises(UnsupportedModel, match="kimi_k2"):
        load_spec({**config, "model_type": "kimi_k1"})


def test_options_that_would_change_the_maths_are_refused(folder: Path) -> None:
    spec, _ = _load(_case("llama", folder))
    with pytest.raises(UnsupportedModel, match="hidden_act"):
        load_spec({**spec.config, "hidden_act": "gelu"})
    with pytest.raises(UnsupportedModel, match="partial_rotary"):
        load_spec({**spec.config, "partial_rotary_factor": 0.5})
    with pytest.raises(UnsupportedModel, match="rope"):
        other = load_spec({**spec.config, "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}})
        rope_tables(other.blocks[0][0].rope, 8)
