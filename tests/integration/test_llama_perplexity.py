"""Our numbers under the protocol `llama-perplexity` are what that tool computes of the same files and text.

The tool is not part of llama-cpp-python. What it does (tools/perplexity of llama.cpp) is done here with llama-cpp-python's
own class and nothing of ours; its own code, built against the same library, differed from that by a relative 2e-5 (it keeps keys
and values in half precision).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from compress.containers import gguf
from compress.containers.base import WriteRequest
from compress.engines.llama_cpp import LlamaCpp
from compress.engines.open import open_model
from compress.engines.streamed import StreamedSource
from compress.models.checkpoint import Checkpoint
from compress.plan import make_plan
from compress.scoring.divergence import score
from compress.text import PROTOCOLS, eval_windows, load_tokenizer
from compress.weights import Packed
from tests.integration.runs import text_file
from tests.integration.test_tokenizers import recipe
from tests.tiny import tiny_model

CONTEXT = 32


def begins_with(model: Path, token: str) -> None:
    """The tokenizer puts a token before every text."""
    path = model / "tokenizer.json"
    data = json.loads(path.read_text())
    index = next(entry["id"] for entry in data["added_tokens"] if entry["content"] == token)
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }
    path.write_text(json.dumps(data))
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token": token, "add_bos_token": True}))


def rows_of_the_tool(file: Path, text: Path) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities float64 [n, V] and the tokens behind them [n]: chunks of n_ctx tokens; the vocabulary's
    beginning-of-text token in place of the first of each, if it adds one; rows from n_ctx / 2 to n_ctx - 2 of each chunk."""
    from llama_cpp import Llama

    llama = Llama(str(file), n_ctx=CONTEXT, logits_all=True, type_k=0, type_v=0, verbose=False)
    content = text.read_bytes()
    tokens = llama.tokenize(content.removesuffix(b"\n"), add_bos=True, special=False)
    adds_bos = tokens[0] == llama.token_bos() and llama.tokenize(b"a", add_bos=True)[0] == llama.token_bos()
    found, behind = [], []
    for chunk in range(len(tokens) // CONTEXT):
        own = tokens[chunk * CONTEXT : (chunk + 1) * CONTEXT]
        llama.reset()
        llama.eval([llama.token_bos(), *own[1:]] if adds_bos else own)
        for row in range(CONTEXT // 2, CONTEXT - 1):
            found.append(log_softmax(llama.scores[row].astype(np.float64)))
            behind.append(own[row + 1])
    llama.close()
    return np.array(found), np.array(behind)


def as_the_tool_does(file: Path, text: Path) -> tuple[float, int]:
    """Perplexity, and the tokens it is over."""
    rows, behind = rows_of_the_tool(file, text)
    return math.exp(-rows[np.arange(len(behind)), behind].mean()), len(behind)


def written(model: Path, file: Path, noise: float = 0.0) -> Path:
    """The model as a GGUF file of float32, its matrices off by noise relative to their spread."""
    plan = make_plan(recipe(model, "gguf"), weights=True)
    checkpoint, rng = Checkpoint.open(model), torch.Generator().manual_seed(0)

    def fetch(name: str) -> Packed:
        weight = checkpoint.load(name).float()
        if weight.dim() == 2 and noise:
            weight = weight + noise * weight.std() * torch.randn(weight.shape, generator=rng)
        return Packed("f32", tuple(weight.shape), {"values": weight})

    tensors = [type(t)(t.spec, "f32", None, 0) for t in plan.tensors]
    return gguf.write(WriteRequest(file, plan.spec, tensors, fetch, source=model))[0]


@pytest.mark.parametrize("bos", [False, True])
def test_equals_the_tool_on_the_same_file(tmp_path: Path, bos: bool) -> None:
    pytest.importorskip("llama_cpp")
    model = tiny_model("llama", tmp_path / "model")
    if bos:
        begins_with(model, "<|endoftext|>")
    file = written(model, tmp_path / "m.gguf")
    text = text_file(tmp_path / "words.txt", words=700)
    text.write_text(f"\n{text.read_text()}\n\n")
    windows = eval_windows(str(text), load_tokenizer(model), length=CONTEXT, protocol=PROTOCOLS["llama-perplexity"])
    with LlamaCpp(file) as source:
        scores, _ = score(None, source, windows)
    perplexity, count = as_the_tool_does(file, text)
    assert scores.perplexity.value == pytest.approx(perplexity, rel=1e-5)
    assert (scores.tokens, scores.protocol, scores.stride) == (count, "llama-perplexity", CONTEXT)
    plain = eval_windows(str(text), load_tokenizer(model), length=CONTEXT)
    with LlamaCpp(file) as source:
        assert abs(score(None, source, plain)[0].perplexity.value / perplexity - 1) > 1e-4


def test_divergence_equals_the_tools_statistic(tmp_path: Path) -> None:
    """llama-perplexity --kl-divergence: the mean over the same rows of sum p (log p - log q), and how often both rank the
    same token first. The original is our own forward pass over its file, here the tool's."""
    pytest.importorskip("llama_cpp")
    model = tiny_model("llama", tmp_path / "model")
    base, variant = written(model, tmp_path / "base.gguf"), written(model, tmp_path / "variant.gguf", noise=0.1)
    text = text_file(tmp_path / "words.txt", words=700)
    windows = eval_windows(str(text), load_tokenizer(model), length=CONTEXT, protocol=PROTOCOLS["llama-perplexity"])
    opened = open_model(str(base))
    with LlamaCpp(variant) as source:
        scores, _ = score(StreamedSource(opened.spec, opened.load, "original"), source, windows)
    (p, _), (q, _) = rows_of_the_tool(base, text), rows_of_the_tool(variant, text)
    assert scores.kld is not None and scores.top1_agreement is not None
    assert scores.kld.mean == pytest.approx((np.exp(p) * (p - q)).sum(axis=1).mean(), rel=1e-3)
    assert scores.kld.mean > 1e-3
    assert scores.top1_agreement.value == pytest.approx((p.argmax(1) == q.argmax(1)).mean(), abs=2e-3)
