"""Throughput: how repetitions become figures, and that the engines really do what is timed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from compress.engines import timed_process, timing
from compress.engines.timed_process import Request
from compress.engines.timing import Job, time_in_turns, time_models
from compress.errors import CompressError
from compress.scoring.speed import Timing, summarise
from tests.integration.runs import carry_out, cheap, small
from tests.tiny import tiny_model


def test_medians_spreads_and_paired_ratios():
    variant = [Timing(1, 0.2, 100, 10, 500), Timing(2, 0.4, 90, 30, 700), Timing(3, 0.3, 80, 20, 600)]
    original = [Timing(2, 0.4, 50, 10, 1000), Timing(2, 0.4, 30, 10, 1400), Timing(2, 0.1, 80, 10, 1000)]
    speed = summarise(variant, original, engine="e", threads=2, prompt=8, generated=4)
    assert (speed.load.median, speed.load.low, speed.load.high) == (2, 1, 3)
    assert (speed.generation.median, speed.generation.low, speed.generation.high) == (20, 10, 30)
    assert speed.peak_bytes == 700 and speed.repetitions == 3
    ratio = speed.ratio["prompt"]  # of each turn: 2, 3, 1
    assert (ratio.median, ratio.low, ratio.high) == (2, 1, 3)
    assert summarise(variant, engine="e", threads=2, prompt=8, generated=4).ratio == {}


def test_models_take_turns_and_one_that_fails_drops_out(monkeypatch):
    seen = []

    def once(request):
        seen.append(request.files[0])
        if request.files[0] == "c":
            raise CompressError("c does not run")
        return Timing(1, 1, 1, 1, 1)

    monkeypatch.setattr(timing, "_in_own_process", once)
    jobs = {name: Job("llama.cpp", (Path(name),)) for name in ("a", "b", "c")}
    found, failed = time_in_turns(jobs, [1, 2], generated=1, repetitions=2)
    assert seen == ["a", "b", "c", "a", "b"] and failed == {"c": "c does not run"}
    assert {name: len(timings) for name, timings in found.items()} == {"a": 2, "b": 2}


def test_ratios_are_to_the_original_of_the_same_turns(monkeypatch):
    rates = {"original": 10, "variant": 30}
    monkeypatch.setattr(timing, "_in_own_process", lambda request: Timing(1, 1, rates[request.files[0]], 5, 9))
    jobs = {"variant": Job("llama.cpp", (Path("variant"),)), "lost": Job("llama.cpp", (Path("lost"),), "not installed")}
    timed = time_models(jobs, Job("transformers", (Path("original"),)), [1, 2], repetitions=2)
    assert list(timed.speeds) == ["variant"] and timed.speeds["variant"].ratio["prompt"].median == 3
    assert timed.original.ratio == {} and timed.original.engine == "transformers"
    (line,) = timed.lines("lost")
    assert timed.lines("variant") == []
    assert (line.subject, line.used, line.reason) == ("lost", "not timed", "not installed")


def test_a_real_engine_is_timed_in_a_process_of_its_own(tmp_path):
    """Rates are those of the counts of tokens: a prompt takes its tokens over its rate."""
    pytest.importorskip("llama_cpp")
    model = tiny_model("llama", tmp_path / "model", num_hidden_layers=1)
    recipe = small("gguf-q4-k-m", model, tmp_path / "out", *cheap("gguf-q4-k-m"))
    carry_out(recipe)
    job = Job("llama.cpp", (tmp_path / "out" / "model-Q4_K_M.gguf",))
    (found,) = time_in_turns({"demo": job}, list(range(1, 9)), generated=2, repetitions=1)[0]["demo"]
    assert found.load > 0 and found.first_token > 0 and found.prompt > 0 and found.generation > 0
    assert found.peak_bytes > 20 << 20


def test_an_engine_that_refuses_says_why(tmp_path):
    pytest.importorskip("llama_cpp")
    (file := tmp_path / "broken.gguf").write_bytes(b"GGUF nothing")
    _, failed = time_in_turns({"broken": Job("llama.cpp", (file,))}, [1], generated=1, repetitions=1)
    assert re.match(r"llama.cpp could not be timed on broken.gguf: .*cannot load", failed["broken"])


def test_transformers_is_timed_as_people_run_it(tmp_path):
    """In the folder's float type, with a cache: here in this process."""
    model = tiny_model("llama", tmp_path / "model")
    request = Request("transformers", [str(model / "model.safetensors")], list(range(1, 9)), 2, 1, True)
    found = Timing(**timed_process.timed(request))
    assert min(found.load, found.first_token, found.prompt, found.generation) > 0
    assert found.peak_bytes > 20 << 20
