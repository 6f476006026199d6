"""gpt-oss as the hub has it, its experts in MXFP4: read as transformers decodes them, and shipped again without a change."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.models import load_spec
from compress.models.checkpoint import Checkpoint
from compress.plan import make_plan
from tests.integration.containers import read_gguf
from tests.integration.runs import carry_out, small
from tests.tiny import tiny_model

LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def encoded(stacked: Tensor) -> tuple[Tensor, Tensor]:
    """[experts, in, out] -> blocks uint8 [experts, out, in / 32, 16] and scales uint8 [experts, out, in / 32]; low nibbles are
    the even columns."""
    groups = stacked.mT.unflatten(-1, (-1, 32))
    exponent = (groups.abs().amax(-1) / 6).log2().ceil()
    sized = groups / 2.0 ** exponent[..., None]
    codes = (sized.abs()[..., None] - LEVELS).abs().argmin(-1) + 8 * (sized < 0)
    pairs = codes.unflatten(-1, (-1, 2)).to(torch.uint8)
    return pairs[..., 0] | pairs[..., 1] << 4, (exponent + 127).to(torch.uint8)


def as_on_the_hub(model: Path, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The same with coded experts, and what transformers makes of them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored, values = load_file(model / "model.safetensors"), {}
    for name in [n for n in stored if n.endswith(("gate_up_proj", "down_proj"))]:
        blocks, scales = encoded(stored.pop(name))
        stored |= {f"{name}_blocks": blocks.contiguous(), f"{name}_scales": scales.contiguous()}
        values[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    folder.mkdir()
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return folder, values


def test_its_values_are_read_and_shipped_as_they_are(tmp_path: Path) -> None:
    model, values = as_on_the_hub(tiny_model("gpt_oss", tmp_path / "float"), tmp_path / "gpt-oss")
    checkpoint = Checkpoint.open(model)
    spec = load_spec(checkpoint.config)
    expected = {}
    for tensor in (t for t in spec.tensors() if t.role.startswith("routed_experts.")):
        prefix = f"model.layers.{tensor.layer}.mlp.experts."
        both, down = values[f"{prefix}gate_up_proj"][tensor.expert], values[f"{prefix}down_proj"][tensor.expert]
        part = {"gate": both[:, 0::2], "up": both[:, 1::2], "down": down}[tensor.role.split(".")[1]].T
        assert torch.equal(checkpoint.load(tensor.name).float(), part), tensor.name
        expected.setdefault(tensor.gguf, []).append(part)
    export, steps = "export=[{container: gguf}]", "steps=[{quantize: {solver: rtn, scheme: MXFP4_MOE}}]"
    recipe = small("gguf-q4-k-m", model, tmp_path / "out", export, steps, "calibration.samples=2")
    assert {t.codec for t in make_plan(recipe).tensors if t.spec.role.startswith("routed_experts.")} == {"mxfp4"}
    card = carry_out(recipe)
    assert card.gate.passed, card.gate
    (file,) = (tmp_path / "out").glob("*.gguf")
    found = {name: (kind, numbers) for name, kind, _, numbers in read_gguf(file)[1] if name in expected}
    assert found.keys() == expected.keys()
    for name, (kind, numbers) in found.items():
        assert kind == "mxfp4" and np.array_equal(numbers, torch.stack(expected[name]).numpy()), name
