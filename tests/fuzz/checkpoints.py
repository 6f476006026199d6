"""Mutated model folders: config.json, index, headers, and what is no file: planned and read, or refused in words."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from compress.containers.base import WriteRequest
from compress.models import known_families, load_spec
from compress.models.checkpoint import Checkpoint
from compress.models.gguf.header import read_header
from compress.models.index import INDEX, SINGLE
from compress.plan.make import make_plan
from compress.recipe.schema import Recipe
from tests.fuzz.harness import Case, hostile, mutated, scrambled
from tests.tiny import FAMILIES, tiny_config, tiny_model

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "bos_token_id": 1, "eos_token_id": 2}
WEIGHTED = ("llama", "qwen3_moe", "deepseek_v3")
WORDS = (b"{", b"}", b"[", b"]", b":", b",", b'"', b"\\", b"\\ud800", b"null", b"NaN", b"Infinity", b"-", b"1e999", b"0", b"9", b"\0", b"\xff",
         b'"a":', b'"__metadata__":', b"true", b"//", b"\n")  # fmt: skip
STEPS: tuple[list[Any], ...] = (
    [], [{"quantize": {"scheme": "W4A16G32"}}], [{"rotate": {}}], [{"drop_layers": {"count": 1}}], [{"prune": {"sparsity": 0.5}}],
    [{"prune_experts": {}}], [{"prune_structured": {"ratio": 0.2}}], [{"quantize": {"scheme": "Q4_K_M"}}], [{"factorize": {"ratio": 0.3}}],
)  # fmt: skip
KEYS = tuple(sorted({key for family in known_families().values() for key in family.config.model_fields}))


@cache
def _config(family: str) -> str:
    return json.dumps(tiny_config(family))


@cache
def _weights(family: str, sharded: bool) -> Path:
    """A tiny model, made once."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    sizes = SMALL if family == "llama" else {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    return tiny_model(family, folder / "model", tokenizer=False, max_shard_size="20KB" if sharded else "1GB", **sizes)


@cache
def _whole() -> Path:
    """A tiny model with its tokenizer, made once."""
    return tiny_model("qwen3_moe", Path(tempfile.mkdtemp(prefix="fuzz-")) / "model", num_experts=4)


def _read(rng: random.Random, model: Path, *, weights: bool) -> None:
    """What a plan reads of a model and, with weights, what a run does."""
    container = rng.choice(("gguf", "safetensors", "compress"))
    fields = {"name": "x", "model": str(model), "output": str(model.parent / "out"), "steps": rng.choice(STEPS), "score": False,
              "calibration": {"length": 16}, "export": [{"container": container}]}  # fmt: skip
    make_plan(Recipe.model_validate(fields), weights=weights).as_dict()
    if weights:
        checkpoint = Checkpoint.open(model)
        for name in load_spec(checkpoint.config).by_name:
            checkpoint.load(name)


def _of_config(rng: random.Random, folder: Path, change: Callable[[str], bytes]) -> None:
    (folder / "config.json").write_bytes(change(_config(rng.choice(sorted(FAMILIES)))))
    _read(rng, folder, weights=False)


def config(rng: random.Random, folder: Path) -> None:
    """Values and keys of config.json changed."""
    _of_config(rng, folder, lambda text: json.dumps(mutated(rng, json.loads(text), KEYS)).encode())


def keys(rng: random.Random, folder: Path) -> None:
    """One key that is read set to something else."""

    def change(text: str) -> bytes:
        return json.dumps({**json.loads(text), rng.choice(KEYS): hostile(rng)}).encode()

    _of_config(rng, folder, change)


def text(rng: random.Random, folder: Path) -> None:
    """Bytes of config.json changed."""
    _of_config(rng, folder, lambda text: scrambled(rng, text.encode(), WORDS))


def index(rng: random.Random, folder: Path) -> None:
    """The index changed, or its bytes."""
    model = _copy(rng, folder, sharded=True)
    path = model / INDEX
    if rng.random() < 0.3:
        path.write_bytes(scrambled(rng, path.read_bytes(), WORDS))
    else:
        path.write_text(json.dumps(mutated(rng, json.loads(path.read_text()), ("weight_map", "metadata"))))
    _read(rng, model, weights=True)


def header(rng: random.Random, folder: Path) -> None:
    """The header of a file changed, its bytes, or its length."""
    model = _copy(rng, folder, sharded=False)
    path = model / SINGLE
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    head, rest = data[8 : 8 + length], data[8 + length :]
    do = rng.random()
    if do < 0.5:
        head = json.dumps(mutated(rng, json.loads(head), ("__metadata__", "dtype", "shape", "data_offsets"))).encode()
    elif do < 0.8:
        head = scrambled(rng, head, WORDS)
    size = len(head) if do < 0.9 else rng.choice((0, 1, 7, 8, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))
    path.write_bytes(struct.pack("<Q", size) + head + rest[: rng.choice((None, None, None, -1, 0, 100))])
    _read(rng, model, weights=True)


def files(rng: random.Random, folder: Path) -> None:
    """A pipe, a device, a folder, a link, something empty or large where a file was."""
    model = _copy(rng, folder, sharded=rng.random() < 0.5)
    path = rng.choice(sorted(file for file in model.iterdir()))
    path.unlink()
    do = rng.randrange(8)
    if do == 0:
        os.mkfifo(path)
    elif do == 1:
        path.mkdir()
    elif do == 2:
        path.symlink_to(
            rng.choice(("/dev/zero", "/dev/null", "/", path.name, "../nowhere", "/proc/self/mem", "/etc/passwd"))
        )
    elif do == 3:
        path.write_bytes(b"")
    elif do == 4:
        path.write_bytes(rng.randbytes(1000))
    elif do == 5:
        with path.open("wb") as file:
            file.truncate(rng.choice((2**25, 2**33)))
    elif do == 6:
        path.write_bytes(b"[" * 300_000)
    _read(rng, model, weights=True)


@cache
def _gguf(family: str) -> Path:
    """A tiny model's file with its tokenizer, made once."""
    from compress.containers.gguf import write
    from tests.integration.containers import fetcher, plan, spec_of, weights_of

    sizes = {"num_hidden_layers": 2, "tie_word_embeddings": True}
    model = tiny_model(family, Path(tempfile.mkdtemp(prefix="fuzz-")) / "model", **sizes)
    lines = plan(spec_of(model))
    return write(WriteRequest(model / "m.gguf", spec_of(model), lines, fetcher(weights_of(model), lines), model))[0]


def gguf(rng: random.Random, folder: Path) -> None:
    """A GGUF file's metadata changed, its bytes, or its length."""
    base, path = _gguf(rng.choice(("llama", "qwen3_moe"))), folder / "m.gguf"
    data = base.read_bytes()
    do = rng.random()
    if do < 0.6:
        head, values = _fields(base)
        values = mutated(rng, {k: v for k, v in values.items() if do > 0.3 or not isinstance(v, list)}, tuple(values))
        start = min(tensor.span[0] for tensor in read_header(base).tensors.values())
        data = _with_fields(data, head, values, start)
    elif do < 0.9:
        at = rng.choice((24, 2000, 150_000))
        data = scrambled(rng, data[:at], (b"\0", b"\xff", b"\xff" * 8, b"GGUF", struct.pack("<Q", 2**40))) + data[at:]
    else:
        data = data[: rng.randrange(len(data))]
    path.write_bytes(data)
    _read(rng, path, weights=True)


@cache
def _fields(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The list of a file's tensors, and its metadata without the long lists."""
    header = read_header(path)
    infos = b"".join(
        struct.pack("<Q", len(name)) + name.encode() + struct.pack(f"<I{len(t.shape)}Q", len(t.shape), *t.shape[::-1])
        + struct.pack("<IQ", GGMLQuantizationType[t.type], t.span[0] - min(o.span[0] for o in header.tensors.values()))
        for name, t in header.tensors.items()
    )  # fmt: skip
    return struct.pack("<Q", len(header.tensors)) + infos, dict(header.fields)


def _with_fields(data: bytes, head: bytes, values: Any, start: int) -> bytes:
    """The file with other metadata, as far as GGUF can say them."""
    pairs = [(k, v) for k, v in values.items() if isinstance(k, str)] if isinstance(values, dict) else []
    packed = [key for pair in pairs if (key := _pair(*pair)) is not None]
    out = b"GGUF" + struct.pack("<I", 3) + head[:8] + struct.pack("<Q", len(packed)) + b"".join(packed) + head[8:]
    return out + bytes(-len(out) % 32) + data[start:]


def _pair(key: str, value: Any) -> bytes | None:
    kinds = {bool: (7, "?"), int: (11, "q"), float: (12, "d")}
    name = struct.pack("<Q", len(key.encode(errors="replace"))) + key.encode(errors="replace")

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode(errors="replace"))) + value.encode(errors="replace")

    try:
        if isinstance(value, str):
            return name + struct.pack("<I", 8) + text(value)
        if type(value) in kinds:
            return name + struct.pack(f"<I{kinds[type(value)][1]}", kinds[type(value)][0], value)
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            return name + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        if isinstance(value, list) and len({type(one) for one in value}) == 1 and type(value[0]) in kinds:
            kind, form = kinds[type(value[0])]
            return name + struct.pack(f"<IIQ{len(value)}{form}", 9, kind, len(value), *value)
    except struct.error:  # a number of more than 64 bits
        pass
    return None


def _copy(rng: random.Random, folder: Path, *, sharded: bool) -> Path:
    source = _weights(rng.choice(WEIGHTED), sharded)
    return shutil.copytree(source, folder / "model")


@cache
def _coded() -> tuple[tuple[dict[str, Any], dict[str, Any]], ...]:
    """A matrix in every quantized format: what config.json says, and its tensors."""
    import torch

    words, small = torch.zeros(8, 32, dtype=torch.int32), torch.zeros(32, 32, dtype=torch.uint8)
    state = torch.tensor(
        list(json.dumps({"blocksize": 64, "shape": [32, 64], "nested_blocksize": 256, "nested_offset": 0.5}).encode())
    )
    named = {"m.weight_scale": torch.ones(32, 2), "m.weight_shape": torch.tensor([32, 64])}
    return (
        ({"quant_method": "fp8", "weight_block_size": [16, 16]},
         {"m.weight": torch.zeros(32, 64).to(torch.float8_e4m3fn), "m.weight_scale_inv": torch.ones(2, 4)}),
        ({"quant_method": "mxfp4"},
         {"m_blocks": torch.zeros(2, 32, 2, 16, dtype=torch.uint8), "m_scales": torch.zeros(2, 32, 2, dtype=torch.uint8)}),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"},
         {"m.qweight": words, "m.qzeros": words[:2, :4], "m.scales": torch.ones(2, 32), "m.g_idx": torch.arange(64) // 32}),
        ({"quant_method": "awq", "version": "gemm"},
         {"m.qweight": words.reshape(64, 4), "m.qzeros": words[:2, :4], "m.scales": torch.ones(2, 32)}),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"format": None}}},
         {"m.weight_packed": words.reshape(32, 8), "m.weight_zero_point": words[:4, :2], **named}),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
         {"m.weight_packed": small, "m.weight_scale": torch.ones(32, 4).to(torch.float8_e4m3fn), "m.weight_global_scale": torch.ones(1)}),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True},
         {"m.weight": small.reshape(-1, 1), "m.weight.absmax": torch.zeros(32, dtype=torch.uint8), "m.weight.quant_map": torch.ones(16),
          "m.weight.nested_absmax": torch.ones(1), "m.weight.nested_quant_map": torch.ones(256),
          "m.weight.quant_state.bitsandbytes__nf4": state.to(torch.uint8)}),
        ({"quant_method": "bitsandbytes"}, {"m.weight": torch.zeros(32, 64, dtype=torch.int8), "m.SCB": torch.ones(32)}),
        ({"quant_method": "modelopt"},
         {"m.weight": small, "m.weight_scale": torch.ones(32, 4).to(torch.float8_e4m3fn), "m.weight_scale_2": torch.ones(())}),
    )  # fmt: skip


def quantized(rng: random.Random, folder: Path) -> None:
    """What config.json says of a quantized matrix changed, or one of its parts: gone, of another type or shape, other bytes."""
    import torch
    from safetensors.torch import save_file

    settings, tensors = rng.choice(_coded())
    found = dict(tensors)
    if rng.random() < 0.4:
        settings = mutated(rng, json.loads(json.dumps(settings)), tuple(settings))
    else:
        name = rng.choice(sorted(found))
        part, do = found[name], rng.randrange(6)
        kinds = (torch.int32, torch.uint8, torch.float32, torch.int8, torch.int64, torch.float8_e4m3fn, torch.bool)
        if do == 0:
            del found[name]
        elif do == 1:
            found[name] = part.float().to(rng.choice(kinds))
        elif do == 2:
            found[name] = part.reshape(rng.choice(((-1,), (1, *part.shape), (*part.shape, 1), (-1, 1))))
        elif do == 3:
            found[name] = part[: rng.randrange(len(part))] if part.dim() else part[None]
        elif do == 4:
            found[name] = torch.cat((part, part)) if part.dim() else part.repeat(3)
        else:
            bytes_of = part.contiguous().reshape(-1).view(torch.uint8).numel()
            found[name] = torch.frombuffer(bytearray(rng.randbytes(bytes_of)), dtype=part.dtype).reshape(part.shape)
    save_file({name: part.contiguous().clone() for name, part in found.items()}, folder / SINGLE)
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    checkpoint = Checkpoint.open(folder)
    for name in checkpoint.entries:
        checkpoint.load(name)


@cache
def _lora() -> tuple[dict[str, Any], dict[str, Any]]:
    import torch

    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    settings = {"peft_type": "LORA", "lora_alpha": 16, "r": 2, "use_rslora": False, "alpha_pattern": {"q_proj": 2}}
    return settings, {f"{name}A.weight": torch.ones(2, 32), f"{name}B.weight": torch.ones(32, 2)}


def adapter(rng: random.Random, folder: Path) -> None:
    """What adapter_config.json says changed, or names and shapes of its tensors."""
    from safetensors.torch import save_file

    settings, tensors = _lora()
    if rng.random() < 0.6:
        settings = mutated(
            rng,
            json.loads(json.dumps(settings)),
            (*settings, "use_dora", "init_lora_weights", "base_model_name_or_path"),
        )
    else:
        name = rng.choice(sorted(tensors))
        part = tensors[name]
        other = rng.choice(
            (name, name.replace("lora_", ""), name.replace("layers.0", "layers.9"), name.replace("_A", "_C"), "x")
        )
        tensors = {
            **{n: t for n, t in tensors.items() if n != name},
            other: rng.choice((part, part.T, part[:0], part.half(), part.int())),
        }
    save_file({name: part.contiguous().clone() for name, part in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    checkpoint = Checkpoint.open(_weights("llama", False), adapter=folder)
    for name in checkpoint.entries:
        checkpoint.load(name)


def run(rng: random.Random, folder: Path) -> None:
    """A whole run without steps on a model whose config.json, index or header is changed where a plan may not look."""
    from compress.run import run as run_recipe

    model = shutil.copytree(_whole(), folder / "model")
    path = model / "config.json"
    path.write_text(json.dumps(mutated(rng, json.loads(path.read_text()), KEYS)))
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    fields = {"name": "x", "model": str(model), "output": str(folder / "out"), "steps": [], "score": False,
              "calibration": {"length": 16, "samples": 2, "dataset": str(folder / "text.txt")}, "export": [{"container": "safetensors"}]}  # fmt: skip
    run_recipe(Recipe.model_validate(fields))


def prepare() -> None:
    """Import and make what is no part of a case's time."""
    import safetensors  # noqa: F401
    import torch  # noqa: F401

    for family in FAMILIES:
        _config(family)
    _gguf("llama"), _gguf("qwen3_moe"), _coded(), _lora()
    for family in WEIGHTED:
        _weights(family, True), _weights(family, False)
    _whole()


KINDS: dict[str, Case] = {f.__name__: f for f in (config, keys, text, index, header, files, gguf, quantized, adapter)}
