"""What sub-layers say that engines keep of past tokens: against llama.cpp's own account and the tensors of transformers' cache."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.containers import CONTAINERS, Host
from compress.containers._hosts import LLAMA, WHOLE
from compress.models.spec import ModelSpec
from compress.plan.running import Running, kept, runner
from tests.contract.blocks import NAMES, SMALL, Families
from tests.integration.containers import spec_of
from tests.integration.test_gguf_container import write
from tests.tiny import FOR_LLAMA_CPP, tiny_model

CONTEXT, MIB = 65536, 2**20


def running(spec: ModelSpec, host: Host) -> Running:
    return runner(spec, CONTAINERS["gguf"], host, 0)


# -- llama.cpp
@pytest.fixture(scope="module")
def said() -> Iterator[Any]:
    """A function that opens a GGUF file with a context and returns what llama.cpp says of it, None where it refuses."""
    pytest.importorskip("llama_cpp")
    from compress.engines.llama_api import GGML_TYPES, llama_api, log

    api, lines = llama_api(), []
    callback = api.llama_log_callback(lambda level, text, _: lines.append(text.decode()))
    api.llama_log_set(callback, None)

    def ask(file: Path, codec: str, tokens: int) -> str | None:
        params = api.llama_model_default_params()
        params.n_gpu_layers, params.use_extra_bufts = 0, False
        model = api.llama_model_load_from_file(os.fsencode(file), params)
        lines.clear()
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = tokens, LLAMA.batch, LLAMA.batch
        settings.type_k = settings.type_v = GGML_TYPES[codec]
        settings.swa_full = False  # as its programs have it
        context = api.llama_init_from_model(model, settings)
        if context:
            api.llama_free(context)
        api.llama_model_free(model)
        return "".join(lines) if context else None

    yield ask
    own = api.llama_log_callback(log)
    vars(api)["_compress_log_callback"] = own
    api.llama_log_set(own, None)


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_allocates_what_was_counted(families: Families, said: Any, tmp_path: Path, name: str) -> None:
    """Caches to the kilobyte; room to compute, which is estimated, not much more than it takes."""
    spec, _, folder = families(name)
    if name in FOR_LLAMA_CPP:
        folder = tiny_model(name, tmp_path / "model", tokenizer=False, **SMALL, **FOR_LLAMA_CPP[name])
        spec = spec_of(folder)
    one = running(spec, LLAMA)
    (file,) = write(folder, tmp_path / "m.gguf")
    for codec, tokens in (("f16", 4096), ("f16", CONTEXT), ("q8_0", CONTEXT)):
        account = said(file, codec, tokens)
        assert (account is not None) == (codec in one.codecs), codec
        if account is None:
            continue
        sizes = re.findall(r"llama_(?:kv_cache|memory_recurrent): size = +([\d.]+) MiB", account)
        assert sum(map(float, sizes)) == pytest.approx(one.cache(tokens, codec) / MIB, abs=0.006 * len(sizes))
        (computing,) = re.findall(r"compute buffer size = +([\d.]+) MiB", account)
        assert (
            float(computing) <= one.computing(tokens) / MIB + 0.5
            and one.computing(tokens) / MIB <= 1.3 * float(computing) + 1
        )


# -- transformers
def values(cache: Any) -> tuple[int, int]:
    """Numbers in the tensors of a cache: keys and values, and states."""
    found = [(name, held) for layer in cache.layers for name, held in vars(layer).items()]
    tokens = sum(held.numel() for name, held in found if name in ("keys", "values", "indexer_keys"))
    states = [held for name, held in found if name in ("conv_states", "recurrent_states")]
    return tokens, sum(state.numel() for held in states for state in held.values() if state is not None)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_keeps_what_was_counted(families: Families, name: str) -> None:
    spec, _, folder = families(name)
    tokens, states = values(_cache(folder))
    windows = [(past, count) for past, count in kept(spec) if past.window and past.window <= 40]
    tokens += sum(past.token * count for past, count in windows)  # of each it keeps one less than it looks back at
    assert 2 * tokens == running(spec, WHOLE).cache(40, "f16") - running(spec, WHOLE).cache(0, "f16")
    counted = sum(count * past.state for past, count in kept(spec))
    channels = [w.shape[0] for block in spec.blocks for s in block for w in s.weights if len(w.shape) == 3]
    assert states == counted + sum(channels)  # of each it keeps one input more than llama.cpp, and than anybody needs


def _cache(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(40)[None] % SMALL["vocab_size"], use_cache=True).past_key_values


def test_a_full_window_grows_no_more(tmp_path: Path) -> None:
    """transformers drops what lies behind it, but for one token less than it looks back at; llama.cpp's Llama keeps all."""
    import json

    from compress.models import load_spec

    folder = tiny_model("mistral", tmp_path, tokenizer=False, sliding_window=16, **SMALL)
    spec = load_spec(json.loads((folder / "config.json").read_text()))
    tokens, _ = values(_cache(folder))
    one = running(spec, WHOLE)
    assert one.cache(40, "f16") == one.cache(16, "f16") == 2 * tokens * 16 // 15
    assert running(spec, LLAMA).cache(40, "f16") == 40 * running(spec, LLAMA).cache(1, "f16")


def test_every_container_that_an_engine_scores_says_what_that_takes() -> None:
    for container in CONTAINERS.values():
        if container.engine is not None:
            assert container.engine.name in {host.name for host in container.hosts}
