"""Does it fit, what would make it fit, how long: against closed forms, other plans, and a count from one context to the next."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compress.machine import Cpu, Gpu, Machine, Memory
from compress.machine.measured import Measured
from compress.plan import Plan, make_plan
from compress.plan.duration import FURTHEST, duration, runs_like, work
from compress.plan.running import Running, running
from compress.plan.verdict import Verdict, judge
from compress.recipe import load_recipe
from compress.report.plan_table import plan_table
from tests.cards import text
from tests.unit.plan.test_outline import GATED_DELTA, LATENT
from tests.unit.plan.test_plan import LARGE, SMALL, folder

GIB, MIB = 2**30, 2**20
LONG = 131072


def machine(memory: int | None, *gpus: int, limited: bool = False) -> Machine:
    cards = tuple(Gpu("a card", size, size) for size in gpus)
    return Machine(Cpu("a processor", (), 8), Memory(memory, memory, limited), cards)


def plan_of(model: Path, recipe: str = "qwen-moe-2bit", *overrides: str) -> Plan:
    return make_plan(load_recipe(recipe, overrides, model=str(model)))


def judged(plan: Plan, here: Machine, free: int = 1 << 60, **more: Any) -> Verdict:
    return judge(plan, here, free=free, **more)


def sentences(verdict: Verdict, plan: Plan, width: int = 200) -> list[str]:
    shown = text(plan_table(plan, verdict=verdict), width)
    return [" ".join(line.split()) for line in shown[shown.index("On this machine") :].splitlines()]


# -- to run it
@pytest.mark.parametrize(
    ("config", "token"),
    [
        (LARGE, 94 * 2 * 4 * 128 * 2),  # layers, keys and values, heads, channels, bytes
        (LATENT, 12 * (256 + 64) * 2),  # the latent and the part with positions
        (GATED_DELTA, 3 * 2 * 2 * 64 * 2),  # a fourth of the layers attend
    ],
    ids=["grouped", "latent", "delta"],
)
def test_a_token_of_context(tmp_path: Path, config: dict[str, Any], token: int) -> None:
    (one,) = running(plan_of(folder(tmp_path / "m", config)))
    assert one.per_1k("f16") == 1024 * token
    assert one.per_1k("q8_0") == 1024 * token // 2 * 34 // 32
    assert one.weights == plan_of(tmp_path / "m").bytes


def test_states_do_not_grow(tmp_path: Path) -> None:
    (one,) = running(plan_of(folder(tmp_path / "m", GATED_DELTA)))
    channels = 2 * 2 * 64 + 4 * 64
    assert one.cache(0, "f16") == 9 * 4 * (
        4 * 64 * 64 + 3 * channels
    )  # 9 layers, float32: states, and inputs of 4 taps


def test_the_longest_context_is_the_last_that_fits(tmp_path: Path) -> None:
    (one,) = running(plan_of(folder(tmp_path / "m", SMALL, max_position_embeddings=LONG + 100)))
    for codec in one.codecs:
        for there in range(one.weights, one.needed(LONG + 100, codec) + 2 * MIB, 3 * MIB + 12345):
            fitting = [n for n in range(256, LONG + 1, 256) if one.needed(n, codec) <= there]
            expected = LONG + 100 if one.needed(LONG + 100, codec) <= there else max(fitting, default=0)
            assert one.context(there, codec) == expected


def room_of(plan: Plan, here: Machine) -> list[tuple[str, str | None, bool | None]]:
    return [(h.running.host.name, h.room and h.room.words, h.fits) for h in judged(plan, here).held]


def test_where_it_runs(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", LARGE)  # 67.5 GiB
    gguf, both, gpus = plan_of(model), plan_of(model, "moe-2bit"), plan_of(model, "gptq-w4-g128")
    assert room_of(gguf, machine(96 * GIB)) == [("llama.cpp", "in memory", True)]
    assert room_of(gguf, machine(64 * GIB)) == [("llama.cpp", "in memory", False)]
    assert room_of(gguf, machine(64 * GIB, 80 * GIB)) == [("llama.cpp", "on the GPU", True)]
    assert room_of(gguf, machine(64 * GIB, 24 * GIB)) == [("llama.cpp", "on the GPU and in memory", True)]
    assert room_of(gguf, machine(None)) == [("llama.cpp", None, None)]
    assert room_of(both, machine(96 * GIB, 24 * GIB))[1] == ("transformers", "in memory", True)
    assert room_of(gpus, machine(512 * GIB)) == [("vLLM", None, None)]  # 125 GiB of weights
    assert room_of(gpus, machine(1 * GIB, 80 * GIB, 80 * GIB)) == [("vLLM", "on 2 GPUs", True)]
    assert room_of(gpus, machine(1 * GIB, 80 * GIB)) == [("vLLM", "on the GPU", False)]


# -- to make it
def test_what_fits_has_no_remedy(tmp_path: Path) -> None:
    plan = plan_of(folder(tmp_path / "m"))

    def never(_: Any) -> Plan:
        raise AssertionError

    verdict = judged(plan, machine(plan.peak_memory_bytes), plan.disk_bytes, replan=never)
    assert verdict.memory.fits and verdict.disk.fits
    assert verdict.missing == plan.source_bytes  # there is but a config.json
    assert judged(plan, machine(None)).memory.fits is None


@pytest.mark.parametrize(
    ("recipe", "what", "share", "settings"),
    [
        ("moe-2bit", "memory", 0.9, ("steps[1].recover.end_to_end=0",)),
        ("moe-2bit", "memory", 0.6, ("steps[1].recover.end_to_end=0",)),
        ("moe-2bit", "disk", 0.7, ("calibration.samples=128",)),
        ("moe-2bit", "disk", 0.5, ("calibration.samples=64",)),
        ("moe-2bit", "disk", 0.4, ("calibration.samples=64", "export=[{container: gguf}]")),
        ("moe-2bit", "disk", 0.1, ("calibration.samples=64", "export=[{container: gguf}]", "steps[1].recover.end_to_end=0")),
        ("qwen-moe-2bit", "memory", 0.1, None),
    ],
)  # fmt: skip
def test_a_remedy_takes_what_its_plan_says(
    tmp_path: Path, recipe: str, what: str, share: float, settings: tuple[str, ...] | None
) -> None:
    model = folder(tmp_path / "m", SMALL, vocab_size=100_000)
    plan = plan_of(model, recipe)
    whole = {"memory": plan.peak_memory_bytes, "disk": plan.disk_bytes}
    there = {**dict.fromkeys(whole, 1 << 60), what: int(share * whole[what])}
    verdict = judged(plan, machine(there["memory"]), there["disk"], replan=lambda more: plan_of(model, recipe, *more))
    need = {"memory": verdict.memory, "disk": verdict.disk}[what]
    assert need.fits is False and (need.remedy and need.remedy.settings) == settings
    if need.remedy is None:
        assert any("No setting of the recipe helps" in line for line in sentences(verdict, plan))
        return
    other = plan_of(model, recipe, *need.remedy.settings)
    assert need.remedy.needed == (other.peak_memory_bytes if what == "memory" else other.disk_bytes) < need.needed
    shown = " ".join(sentences(verdict, plan))
    assert ("With --set" in shown) == (need.remedy.needed <= there[what]) != ("; with --set" in shown)


def test_the_solvers_drift_is_what_goes_when_grams_take_the_memory(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", SMALL, hidden_size=8192, num_experts=2, moe_intermediate_size=64)
    plan = plan_of(model, "qwen-moe-2bit")
    there = machine(int(0.9 * plan.peak_memory_bytes))
    found = judged(plan, there, replan=lambda more: plan_of(model, "qwen-moe-2bit", *more)).memory.remedy
    assert found is not None and found.settings[0] == "steps[0].quantize.solver.drift=0"


# -- how long
def test_the_same_run_again_takes_as_long(tmp_path: Path) -> None:
    plan = plan_of(folder(tmp_path / "m"))
    run = Measured("some/model", "2026-11-27T01:02:03+00:00", 100.0, work(plan))
    found = duration(plan, [run])
    assert found is not None and found.low == found.high == 100.0
    assert found.source == "from a run of some/model on this machine at 2026-11-27"


def test_a_larger_run_takes_between_the_least_and_the_most(tmp_path: Path) -> None:
    """Twice the text and three times the blocks: between twice and six times as long."""
    small, run = plan_of(folder(tmp_path / "m", SMALL, vocab_size=32)), None
    run = Measured("m", "2026-11-27", 100.0, work(small))
    large = plan_of(
        folder(tmp_path / "n", SMALL, vocab_size=32, num_hidden_layers=9), "qwen-moe-2bit", "calibration.samples=512"
    )
    found = duration(large, [run])
    assert found is not None and found.source.startswith("scaled from")
    assert 290 < found.low <= 301 and 590 < found.high <= 601


def test_the_nearest_run_counts_and_far_ones_tell_nothing(tmp_path: Path) -> None:
    plan = plan_of(folder(tmp_path / "m"))
    near = Measured("near", "2026-11-27", 100.0, {kind: amount / 2 for kind, amount in work(plan).items()})
    far = Measured("far", "2026-11-27", 1.0, {kind: amount / 8 for kind, amount in work(plan).items()})
    found = duration(plan, [far, near])
    assert found is not None and found.low == found.high == 200.0 and "near" in found.source
    too_far = replace(far, work={kind: amount / (2 * FURTHEST) for kind, amount in work(plan).items()})
    other_kind = replace(near, work={"weights": 1.0})
    assert duration(plan, [too_far, other_kind]) is None and duration(plan, []) is None


def test_runs_are_alike_whatever_model_text_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    plan, here = plan_of(folder(tmp_path / "m")), machine(GIB)
    runs_like(plan, here).remember(Measured("m", "2026-11-27", 1.0, work(plan)))
    other = plan_of(
        folder(tmp_path / "n", num_hidden_layers=4), "qwen-moe-2bit", "calibration.samples=64", "output=elsewhere"
    )
    assert runs_like(other, here).known()
    for change in ("steps[0].quantize.solver=rtn", "score=false"):
        assert not runs_like(plan_of(tmp_path / "m", "qwen-moe-2bit", change), here).known()
    assert not runs_like(plan, here, "cuda:1").known()


# -- what people and programs read
def test_json_and_table(tmp_path: Path) -> None:
    plan = plan_of(folder(tmp_path / "m", LARGE))
    run = duration(plan, [Measured("m", "2026-11-27", 7200.0, work(plan))])
    verdict = judged(plan, machine(64 * GIB, limited=True), duration=run)
    told = json.loads(json.dumps(verdict.as_dict()))
    assert told["memory"]["fits"] and told["disk"]["fits"] and told["time"]["seconds"] == [7200.0, 7200.0]
    (engine,) = told["run"]
    assert engine["fits"] is False and engine["kept_bytes_per_1k_tokens"]["f16"] == 188 * MIB
    assert engine["needed"] > engine["there"] == 64 * GIB
    lines = sentences(verdict, plan)
    assert lines[1].startswith("memory to make it fits: 24.0 GiB of the 64.0 GiB that this container may take")
    assert "What fits: compress advise" in " ".join(lines)
    assert lines[-1] == "time about 2 h 00 min, from a run of m on this machine at 2026-11-27"
    fitting = sentences(judged(plan, machine(72 * GIB)), plan)[4]
    assert "fits in memory, 72.0 GiB, with " in fitting and "(q8_0)" in fitting
    for width in (60, 80, 120):
        shown = text(plan_table(plan, verdict=verdict), width).partition("On this machine")[2]
        assert max(map(len, shown.splitlines())) <= width and "compress advise" in " ".join(shown.split())


def test_running_is_judged_by_the_shortest_context_worth_having(tmp_path: Path) -> None:
    plan = plan_of(folder(tmp_path / "m", LARGE))
    (one,) = running(plan)
    assert isinstance(one, Running) and one.least == 4096
    least = one.needed(4096, "q8_0")
    assert [judged(plan, machine(there)).held[0].fits for there in (least - 1, least)] == [False, True]
