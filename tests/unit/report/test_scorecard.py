"""scorecard.json keeps its promised shape, survives a round trip, and the tables say what it holds."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from compress.errors import CompressError, OutputError
from compress.report.numbers import human_bytes, human_seconds
from compress.report.scorecard import (
    Artifact,
    Experts,
    Fallback,
    TaskScore,
    read,
    write,
)
from compress.report.table import scorecard_table
from compress.scoring.divergence import Interval
from tests.cards import card, full_card, scores, text


def test_minimum_shape(tmp_path):
    raw = json.loads(write(card("two-bit", 4_000_000, 0.0143), tmp_path / "scorecard.json").read_text())
    assert raw["model"] == "models/tiny" and raw["recipe"] == "two-bit"
    artifact = raw["artifacts"][0]
    assert (artifact["container"], artifact["path"], artifact["bytes"]) == ("gguf", "two-bit.gguf", 4_000_000)
    assert artifact["bits_per_weight"] == 3.12
    assert artifact["scores"]["perplexity"] == {"value": 37.4, "low": 36.4, "high": 38.4}
    assert {"mean", "low", "high", "median", "p99", "p999", "max"} == set(artifact["scores"]["kld"])
    assert {"value", "low", "high"} == set(artifact["scores"]["top1_agreement"])
    assert raw["base"]["bytes"] == 22_000_000 and raw["base"]["scores"]["perplexity"]["value"] == 36.6
    assert "kld" not in raw["base"]["scores"]
    assert raw["gate"]["passed"] is True and raw["experts"][0]["tokens"] == [5, 100, 300]
    assert raw["fallbacks"][0]["used"] == "q4_0"
    assert raw["stages"][0] == {"name": "blocks", "seconds": 61.5, "peak_bytes": 900_000_000}


def test_round_trip_by_file_and_by_folder(tmp_path):
    original = card("two-bit", 4_000_000, 0.0143, notes=("scored through decoded weights",))
    assert write(original, tmp_path) == tmp_path / "scorecard.json"
    assert read(tmp_path) == read(tmp_path / "scorecard.json") == original
    assert [path.name for path in tmp_path.iterdir()] == ["scorecard.json"]  # no temporary file is left


def test_a_destroyed_model_is_still_valid_json(tmp_path):
    ruined = replace(scores(1.0, 9.0), perplexity=Interval(math.inf, 1e300, math.inf))
    broken = card(
        "x",
        1,
        None,
        artifacts=(Artifact(container="gguf", path="x", bytes=1, bits_per_weight=2, scores=ruined),),
    )
    raw = json.loads(write(broken, tmp_path).read_text(), parse_constant=lambda name: pytest.fail(name))
    assert raw["artifacts"][0]["scores"]["perplexity"]["value"] is None
    assert read(tmp_path).artifacts[0].scores.perplexity.value == math.inf
    assert "∞" in text(scorecard_table(broken))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no scorecard at"),
        ("{", "not valid JSON"),
        ("[]", "no JSON object"),
        ("{}", "model: field required"),
        ('{"format": 99}', "upgrade"),
    ],
)
def test_unreadable_files_say_why_in_one_line(tmp_path, content, message):
    path = tmp_path / "scorecard.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CompressError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_unknown_keys_of_a_later_version_are_skipped(tmp_path):
    write(card("x", 1, 0.1), tmp_path)
    raw = json.loads((tmp_path / "scorecard.json").read_text())
    raw["energy_joules"] = 3
    (tmp_path / "scorecard.json").write_text(json.dumps(raw))
    assert read(tmp_path) == card("x", 1, 0.1)


def test_refused_write_leaves_the_old_file(tmp_path):
    with pytest.raises(OutputError, match="cannot write"):
        write(card("x", 1, 0.1), tmp_path / "missing" / "scorecard.json")


def test_terminal_table_says_everything_within_100_columns():
    tasks = {
        "blimp": TaskScore(metric="acc", value=0.65, low=0.62, high=0.68, n=1340),
        "blimp.binding": TaskScore(metric="acc", value=0.1, low=0.0, high=0.2, n=10),
        "lambada.perplexity": TaskScore(metric="word perplexity", value=1843.2, low=1200.0, high=2500.0, n=500),
    }
    change = {"value": -0.004, "low": -0.011, "high": 0.003}
    full = card("two-bit", 4_412_345, 0.0143)
    after = {**tasks, "blimp": tasks["blimp"].model_copy(update={"difference": change})}
    full = full.model_copy(
        update={
            "base": full.base.model_copy(update={"tasks": tasks}),
            "artifacts": (full.artifacts[0].model_copy(update={"tasks": after}),),
        }
    )
    shown = text(scorecard_table(full))
    for part in (
        "4,412,345", "3.12", "20.1% (1/5.0)", "36.6 [34.0, 39.4]", "37.4 [36.4, 38.4]",
        "0.0143 [0.0129, 0.0157]", "0.114 · 0.286 · 0.715", "91.0% [90.0, 92.0]", "llama.cpp",
        "BLiMP accuracy (1340)", "65.0% [62.0, 68.0]", "-0.4 points [-1.1, 0.3]", "1843 [1200, 2500]",
        "0 (90%)", "61.5 s", "858 MiB", "64.5 s",
        "a.weight: q2_k -> q4_0 (row of 96)", "Integrity gate: passed (1 of 1 checks)", "40 windows of 512",
    ):  # fmt: skip
        assert part in shown, part
    assert "binding" not in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_terminal_table_has_further_texts_flips_speed_and_how_exact_it_is():
    """At 80 columns nothing is cut."""
    plain = full_card("two-bit", 4_000_000, 0.0143)
    first = replace(scores(37.4, 0.0143), text="wikipedia", kept_tokens=2048, byte_perplexity=Interval(2.5, 2.4, 2.6))
    texts = {"wikipedia": first, "wikitext2": replace(scores(99.5, 0.05), text="wikitext2")}
    artifact = plain.artifacts[0].model_copy(update={"scores": first, "texts": texts})
    shown = text(scorecard_table(plain.model_copy(update={"artifacts": (artifact,)})), width=80)
    lines = {line[:24].strip(): line.split() for line in shown.splitlines() if line.strip()}
    assert lines["per byte"][2:] == ["–", "2.50", "[2.40,", "2.60]"]
    assert "99.5" in lines["wikitext2, perplexity"]
    assert sum("KL divergence" in line for line in shown.splitlines()) == 3  # the first text's, the second's, the unit
    assert lines["generated tokens/s"][2:] == ["40.0", "(x1.0)", "80.0", "(x2.0)"]
    assert lines["peak memory"][2:] == ["28.6", "MiB", "28.6", "MiB"]
    assert "3.0% · 1.0%" in shown and "2,048 likeliest tokens" in " ".join(shown.split()) and "…" not in shown


def test_deep_models_and_many_fallbacks_stay_short():
    deep = card(
        "x", 1, 0.1,
        experts=tuple(Experts(layer=i, tokens=tuple(range(128)), cold=(0, 1)) for i in range(94)),
        fallbacks=tuple(
            Fallback(subject=f"t{i}", wanted="q2_k", used="q4_0", reason="row of 96") for i in range(4000)
        ),
    )  # fmt: skip
    shown = text(scorecard_table(deep))
    assert "all 94 layers" in shown and "t0 and 3999 more: q2_k -> q4_0" in shown
    assert len(shown.splitlines()) < 60


def test_failed_gate_is_loud():
    shown = text(scorecard_table(card("x", 1, 0.1, passed=False)))
    assert "Integrity gate: FAILED (0 of 1 checks)" in shown and "FAIL reload: 1e-6 of 1e-4" in shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1536, "1.50 KiB"), (2**20 - 1, "1.00 MiB"), (5 * 2**40, "5.00 TiB")],
)
def test_human_bytes(count, shown):
    assert human_bytes(count) == shown


@pytest.mark.parametrize(("seconds", "shown"), [(0.31, "0.3 s"), (160.2, "2 min 40 s"), (7260, "2 h 01 min")])
def test_human_seconds(seconds, shown):
    assert human_seconds(seconds) == shown
