"""Reading checkpoints: one file or many, and every way in which they are damaged."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import CheckpointError
from compress.models.checkpoint import INDEX, SINGLE, Checkpoint, read_header
from tests.tiny import tiny_model

SMALL = {"vocab_size": 300, "hidden_size": 48, "bos_token_id": 1, "eos_token_id": 2, "tokenizer": False}


def _one_line(error: pytest.ExceptionInfo[CheckpointError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text and error.value.exit_code == 1
    for word in words:
        assert word in text, text


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return tiny_model("llama", tmp_path / "single", **SMALL)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tiny_model("llama", tmp_path / "sharded", max_shard_size="100KB", **SMALL)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def test_sharded_is_single(single: Path, sharded: Path) -> None:
    one, many = Checkpoint.open(single), Checkpoint.open(str(sharded))
    stored = load_file(single / SINGLE)
    assert set(one.entries) == set(many.entries) == set(stored)
    for name, expected in stored.items():
        assert name in one and name in many
        for checkpoint in (one, many):
            tensor = checkpoint.load(name)
            assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
            assert checkpoint.entries[name].shape == tuple(expected.shape)
    assert one.config == many.config == json.loads((single / "config.json").read_text())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tensors_keep_their_type(dtype: str, tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path, dtype=dtype, **SMALL)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.load("model.norm.weight").dtype == getattr(torch, dtype)
    assert checkpoint.entries["model.norm.weight"].dtype == {"bfloat16": "BF16", "float16": "F16"}[dtype]


def test_no_such_folder(tmp_path: Path) -> None:
    for name in (tmp_path / "absent", "./absent", "no-such-model", "a/b/c"):
        with pytest.raises(CheckpointError) as error:
            Checkpoint.open(name)
        _one_line(error, "no such model", str(name).removeprefix("./"))


def test_unreachable_hub_id_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> None:
        raise OSError("401 Client Error.\nRepository not found.\nCheck the name.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open("nobody/nothing")
    _one_line(error, "nobody/nothing", "401 Client Error")


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(tmp_path)
    _one_line(error, "config.json", "does not exist")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not valid JSON"), (b"", "not valid JSON"), (b"\xff\xfe{}", "not UTF-8"), (b"[]", "expected a mapping"),
        (b"[" * 100_000, "nested too deeply"), (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"hidden_size": 1, "hidden_size": 2}', "given twice"), (b" " * (1 << 24) + b"{}", "at most 16,777,216"),
    ],
    ids=["cut", "empty", "another coding", "a list", "brackets", "digits", "two sizes", "size"],
)  # fmt: skip
def test_damaged_config(single: Path, content: bytes, words: str) -> None:
    (single / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(single)
    _one_line(error, "config.json", words, "fetch it again")


@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_truncated_data(single: Path, keep: float) -> None:
    path = single / SINGLE
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(single)
    _one_line(error, SINGLE, "truncated", "fetch it again")


@pytest.mark.parametrize("size", [0, 5, 8, 100])
def test_truncated_header(single: Path, size: int) -> None:
    path = single / SINGLE
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(single)
    _one_line(error, SINGLE)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2) + b"xx" + bytes(64),
        struct.pack("<Q", 2) + b"[]" + bytes(64),
        struct.pack("<Q", 2**62) + bytes(64),
        struct.pack("<Q", 13) + b'{"a":{"b":1}}' + bytes(64),
        b"<!doctype html><html>not found</html>",
    ],
    ids=["not json", "a list", "endless header", "no offsets", "a web page"],
)
def test_not_a_safetensors_file(single: Path, content: bytes) -> None:
    (single / SINGLE).write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(single)
    _one_line(error, SINGLE)


def test_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(sharded)
    _one_line(error, shard.name, "missing shard")


def test_planning_needs_no_shards(sharded: Path) -> None:
    for shard in sharded.glob("model-*.safetensors"):
        shard.unlink()
    assert Checkpoint.open(sharded, weights=False).entries == {}
    (sharded / INDEX).unlink()
    assert Checkpoint.open(sharded, weights=False).config["model_type"] == "llama"


def test_index_lists_a_tensor_no_shard_holds(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.layers.7.absent.weight"] = next(iter(index["weight_map"].values()))
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(sharded)
    _one_line(error, "model.layers.7.absent.weight", INDEX)


def test_bin_weights_are_never_unpickled(single: Path) -> None:
    (single / SINGLE).unlink()
    (single / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(single)
    _one_line(error, ".bin", "convert")


def test_folder_without_weights(single: Path) -> None:
    (single / SINGLE).unlink()
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(single)
    _one_line(error, SINGLE)
    assert Checkpoint.open(single, weights=False).entries == {}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights(single: Path, bad: float) -> None:
    tensors = load_file(single / SINGLE)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = tensors[name][4, 6] = bad
    save_file(tensors, single / SINGLE)
    checkpoint = Checkpoint.open(single)
    assert torch.isfinite(checkpoint.load("model.norm.weight")).all()
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(name)
    _one_line(error, name, " 2 ")


def test_absent_tensor(single: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(single).load("model.layers.9.mlp.up_proj.weight")
    _one_line(error, "model.layers.9.mlp.up_proj.weight")


def test_file_that_vanishes_after_opening(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    (single / SINGLE).unlink()
    with pytest.raises(CheckpointError) as error:
        checkpoint.load("model.norm.weight")
    _one_line(error, "model.norm.weight")


def test_header_says_what_numpy_reads(tmp_path: Path) -> None:
    from safetensors.numpy import save_file as save_numpy

    arrays = {
        "a": np.zeros((2, 3), np.float32),
        "b": np.zeros(5, np.int64),
        "empty": np.zeros((0, 4), np.float16),
    }
    save_numpy(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    entries = read_header(tmp_path / "x.safetensors")
    assert {name: entry.shape for name, entry in entries.items()} == {n: a.shape for n, a in arrays.items()}
