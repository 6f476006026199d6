"""llama.cpp's mixes: our expansion against the types the library itself picks, tensor by tensor.

llama_model_quantize reads hyper-parameters and row lengths only, so the files have one row per matrix; a dry run prints
what it would do to each tensor.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace

import numpy as np
import pytest

from compress.codecs.names import ggml_fallback
from compress.models.spec import ModelSpec, load_spec
from compress.recipe.rules import RuleMatcher
from compress.recipe.schemes import GGML_SCHEMES, expand

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")

BASE = {
    "hidden_size": 256,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 32,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_experts_per_tok": 2,
}
MODELS = {
    "llama": {"model_type": "llama"},
    "llama, tied, GQA 4": {"model_type": "llama", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama, 4 layers": {"model_type": "llama", "num_hidden_layers": 4},
    "llama, 80 layers": {"model_type": "llama", "num_hidden_layers": 80},
    "llama, 80 layers, no GQA": {"model_type": "llama", "num_hidden_layers": 80, "num_key_value_heads": 4},
    "odd ffn rows": {"model_type": "llama", "intermediate_size": 288},
    "odd hidden rows": {"model_type": "qwen2", "hidden_size": 288, "head_dim": 72},
    "qwen2, 80 layers": {"model_type": "qwen2", "num_hidden_layers": 80, "num_key_value_heads": 4},
    "qwen3": {"model_type": "qwen3", "num_hidden_layers": 28},
    "mixtral, 8 experts": {"model_type": "mixtral", "num_local_experts": 8},
    "qwen3 moe, 12 experts": {"model_type": "qwen3_moe", "num_experts": 12, "tie_word_embeddings": True},
    "qwen3 moe, dense first": {"model_type": "qwen3_moe", "num_experts": 2, "mlp_only_layers": [0, 1]},
    "qwen2 moe, shared": {
        "model_type": "qwen2_moe",
        "num_experts": 60,
        "shared_expert_intermediate_size": 256,
    },
}


def rows_of(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """GGUF name -> shape with one row (1-D tensors and routers whole)."""
    rows = {}
    for tensor in spec.tensors():
        if tensor.role == "router" and len(tensor.shape) == 2:
            rows[tensor.gguf] = tensor.shape
        elif len(tensor.shape) == 2:
            rows[tensor.gguf] = (2, 2, tensor.shape[1]) if tensor.expert is not None else (2, tensor.shape[1])
        else:
            rows[tensor.gguf] = tensor.shape
    return {name: shape[1:] if shape[0] == 1 else shape for name, shape in rows.items()}


def write_f16(path, spec: ModelSpec) -> None:
    arch = spec.gguf_arch
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(spec.layers)
    writer.add_context_length(64)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(spec.vocab_size)
    if spec.experts:
        writer.add_expert_count(spec.experts)
        writer.add_expert_used_count(spec.experts_per_token)
        writer.add_expert_feed_forward_length(spec.moe_intermediate_size)
    random = np.random.default_rng(0)
    for name, shape in rows_of(spec).items():
        floats = len(shape) < 2 or "ffn_gate_inp" in name
        writer.add_tensor(name, random.standard_normal(shape).astype(np.float32 if floats else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def types_by_llama_cpp(source, scheme: str, spec: ModelSpec, *, imatrix: bool, log: list[str]) -> dict[str, str]:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{scheme}")
    params.nthread, params.dry_run = 1, True
    if imatrix:
        kept = []
        for name, shape in rows_of(spec).items():
            if len(shape) > 1:
                values = np.ones(shape[-1] * (shape[0] if len(shape) == 3 else 1), np.float32)
                kept.append((name.encode(), values))
        entry = type(params.imatrix)._type_
        entries = (entry * (len(kept) + 1))()
        for item, (name, values) in zip(entries, kept, strict=False):
            item.name, item.size = name, len(values)
            item.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    log.clear()
    assert llama_cpp.llama_model_quantize(str(source).encode(), b"", ctypes.byref(params)) == 0
    lines = re.findall(r"^\[ *\d+/ *\d+\] (\S+) .* type = +(\S+), size = [^(\n]*(?:\((\S+)\))?$", "".join(log), re.M)
    types = {name: (new or old).lower() for name, old, new in lines}
    assert types.keys() == rows_of(spec).keys()
    return types


@pytest.fixture(scope="module")
def log():
    """What llama.cpp prints, piece by piece."""
    pieces: list[str] = []
    callback = llama_cpp.llama_log_callback(lambda level, text, data: pieces.append(text.decode()))
    llama_cpp.llama_log_set(callback, ctypes.c_void_p())
    yield pieces
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), ctypes.c_void_p())


@pytest.mark.parametrize("kind", MODELS)
def test_expansion_is_llama_quantizes_own_choice(kind, tmp_path, log):
    config = {"tie_word_embeddings": False, **BASE, **MODELS[kind]}
    spec = load_spec(config)
    write_f16(tmp_path / "f16.gguf", spec)
    differences = []
    for scheme in GGML_SCHEMES:
        if spec.layers > 32 and scheme not in ("Q4_K_S", "Q4_K_M", "Q2_K", "IQ3_M"):
            continue  # what these models are here for
        # The imatrix matters to three mixes; the smallest refuse to go without.
        for imatrix in (True, False) if scheme in ("Q4_0", "IQ4_NL", "IQ4_XS") else (True,):
            theirs = types_by_llama_cpp(tmp_path / "f16.gguf", scheme, spec, imatrix=imatrix, log=log)
            matcher = RuleMatcher(expand(scheme, spec, imatrix=imatrix), spec.layers)
            for tensor in spec.tensors():
                chosen = matcher.match(tensor).codec
                chosen = ggml_fallback(chosen, tensor.shape[-1]) or chosen
                expected = theirs[tensor.gguf]
                if chosen != expected:
                    differences.append((scheme, imatrix, tensor.gguf, chosen, expected))
    assert not differences, differences[:10]


def test_the_tied_head_follows_the_output_rule():
    spec = load_spec({"model_type": "llama", **BASE, "tie_word_embeddings": False})
    for tied, expected in ((True, "q6_k"), (False, "q3_k")):
        model = replace(spec, tied=tied)
        matcher = RuleMatcher(expand("Q3_K_M", model), model.layers)
        assert matcher.match(model.tensors()[0]).codec == expected
