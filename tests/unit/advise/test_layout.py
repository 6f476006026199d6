"""What llama.cpp puts where: counted tensor by tensor, after its own rules, for every number of layers and experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compress.advise.layout import Layout, Stack, flags, lay_out
from compress.containers import CONTAINERS
from compress.machine import Cpu, Gpu, Machine, Memory
from compress.plan import Plan, make_plan
from compress.plan.running import Running, running
from compress.recipe import load_recipe
from tests.unit.plan.test_outline import GATED_DELTA, LATENT
from tests.unit.plan.test_plan import SMALL, folder

GIB = 2**30
DENSE = {**{k: v for k, v in SMALL.items() if "expert" not in k and k != "norm_topk_prob"}, "model_type": "qwen3",
         "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 12, "tie_word_embeddings": True}  # fmt: skip
MODELS = {
    "mixture": {**SMALL, "num_hidden_layers": 12},
    "dense": DENSE,
    "latent": LATENT,
    "delta": GATED_DELTA,
}
TOKENS, CODEC = 2048, "f16"


def stack_of(where: Path, config: dict[str, Any]) -> tuple[Plan, Running, Stack]:
    plan = make_plan(load_recipe("gguf-q4-k-m", model=str(folder(where / "m", config))))
    (one,) = running(plan)
    return plan, one, Stack.of(plan, CONTAINERS["gguf"], one, TOKENS, CODEC)


def counted(plan: Plan, one: Running, on_gpu: int, experts_off: int) -> tuple[int, int]:
    """Bytes on the GPU and in main memory with -ngl on_gpu + 1 and -ncmoe experts_off."""
    spec, gpu, memory = plan.spec, 0, one.host.process
    first = spec.layers - on_gpu
    for t in plan.tensors:
        layer = t.spec.layer
        there = (
            layer >= first and not (t.spec.expert is not None and layer < experts_off)
            if layer is not None
            else on_gpu > 0
        )
        if t.spec.name == spec.embeddings:
            memory += t.bytes
            gpu += t.bytes if spec.tied and on_gpu else 0
        elif there:
            gpu += t.bytes
        else:
            memory += t.bytes
    for layer, block in enumerate(spec.blocks):
        past = sum(one.host.past_bytes(sublayer.past(), TOKENS, CODEC) for sublayer in block)
        gpu, memory = (gpu + past, memory) if layer >= first else (gpu, memory + past)
    computing = one.computing(TOKENS)
    return (gpu + computing, memory) if on_gpu else (0, memory + computing)


@pytest.mark.parametrize("name", MODELS)
def test_every_layout_is_counted_tensor_by_tensor(tmp_path: Path, name: str) -> None:
    plan, one, stack = stack_of(tmp_path, MODELS[name])
    layouts = list(stack.splits())
    assert len(layouts) == len(set(layouts))
    for layout in layouts:
        assert (layout.gpu, layout.memory) == counted(plan, one, layout.on_gpu, layout.experts_off)
    sizes = [layout.gpu for layout in layouts]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 0
    assert layouts[0].whole and not any(layout.whole for layout in layouts[1:])
    if plan.spec.experts:
        assert {layout.experts_off for layout in layouts} == set(range(plan.spec.layers + 1))
    else:
        assert {layout.on_gpu for layout in layouts} == set(range(plan.spec.layers + 1))
        assert not any(layout.experts_off for layout in layouts)


@pytest.mark.parametrize("name", MODELS)
def test_as_much_as_there_is_room_for(tmp_path: Path, name: str) -> None:
    """Every layout that takes more of the GPU is too large for it."""
    _, one, stack = stack_of(tmp_path, MODELS[name])
    sizes = [layout.gpu for layout in stack.splits()]
    for room in {*sizes, *(size - 1 for size in sizes if size)}:
        card = room + one.host.spare
        here = Machine(Cpu("", (), 1), Memory(1 << 50, 1 << 50), (Gpu("", card, card),))
        found = lay_out(stack, one.host, here)
        assert found is not None and found.gpu <= room
        assert all(size > room for size in sizes if size > found.gpu)
        short = replace(here, memory=Memory(found.memory - 1, found.memory - 1))
        assert lay_out(stack, one.host, short) is None


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout(36, 36, 0, GIB, GIB), ["-ngl 37"]),
        (Layout(48, 48, 12, GIB, GIB), ["-ngl 49", "-ncmoe 12"]),
        (Layout(48, 40, 48, GIB, GIB), ["-ngl 41", "-ncmoe 48"]),
        (Layout(36, 20, 0, GIB, GIB), ["-ngl 21"]),
        (Layout(36, 0, 0, 0, GIB), ["-ngl 0"]),
    ],
)
def test_flags_and_their_sentences(layout: Layout, expected: list[str]) -> None:
    found = list(flags(layout))
    assert [flag for flag, _ in found] == expected
    assert all(why and "\n" not in why for _, why in found)
