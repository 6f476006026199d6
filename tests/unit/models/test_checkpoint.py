"""Reading checkpoints: one file or many, and every way in which they are damaged."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from compress.errors import CheckpointError, NoSuchModel
from compress.models import known_families, spec
from compress.models.checkpoint import INDEX, SINGLE, Checkpoint, checkpoint_problems, read_header
from compress.models.surplus import surplus
from tests.tiny import tiny_model

SMALL = {"vocab_size": 300, "hidden_size": 48, "bos_token_id": 1, "eos_token_id": 2, "tokenizer": False}


def _one_line(error: pytest.ExceptionInfo[CheckpointError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text and error.value.exit_code == (2 if isinstance(error.value, NoSuchModel) else 1)
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


@pytest.mark.parametrize("weights", [False, True])
def test_a_revision_is_asked_for(weights: bool, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[tuple[str, str | None, bool]] = []

    def fetch(name: str, *, revision: str | None = None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, "*.safetensors" in allow_patterns))
        return str(single)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    for model in ("acme/tiny@v1.0", "acme/tiny"):
        Checkpoint.open(model, weights=weights)
    assert asked == [("acme/tiny", "v1.0", weights), ("acme/tiny", None, weights)]


def test_both_files_and_index_are_the_file(sharded: Path) -> None:
    """An index that is left of an earlier save is not read, whatever it says; transformers does the same."""
    weights = {name: Checkpoint.open(sharded).load(name) + 1 for name in Checkpoint.open(sharded).entries}
    save_file(weights, sharded / SINGLE, metadata={"format": "pt"})
    for text in ((sharded / INDEX).read_text(), "damaged"):
        (sharded / INDEX).write_text(text)
        assert torch.equal(Checkpoint.open(sharded).load("model.norm.weight"), weights["model.norm.weight"])


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(tmp_path)
    _one_line(error, "without a config.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not valid JSON"), (b"", "not valid JSON"), (b"\xff\xfe{}", "not UTF-8"), (b"[]", "expected a mapping"),
        (b"[" * 100_000, "nested too deeply"), (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"hidden_size": 1, "hidden_size": 2}', "given twice"), (b'{"a": "\\ud800"}', "surrogates not allowed"), (b" " * (1 << 24) + b"{}", "at most 16,777,216"),
    ],
    ids=["cut", "empty", "another coding", "a list", "brackets", "digits", "two sizes", "half a character", "size"],
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


def test_tensors_under_other_names(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family whose checkpoints call tensors otherwise reads them in one piece, keeps its own name where both are there,
    and sees a wrong shape."""
    llama, names = known_families()["llama"], {"mlp.up_proj.weight": "ffn.w3.weight", "no.such.weight": "x"}
    block = lambda config, layer: tuple(part.stored_as(names) for part in llama.block(config, layer))  # noqa: E731
    monkeypatch.setitem(spec._FOUND, "llama", replace(llama, block=block))
    weights = load_file(single / SINGLE)
    up, theirs = "model.layers.0.mlp.up_proj.weight", "model.layers.0.ffn.w3.weight"
    weights[theirs] = weights.pop(up)
    save_file(weights, single / SINGLE)
    checkpoint = Checkpoint.open(single)
    assert torch.equal(checkpoint.load(up), weights[theirs])
    model = spec.load_spec(checkpoint.config)
    assert checkpoint_problems(model, checkpoint) == [] == surplus(model, checkpoint).problems
    save_file({**weights, theirs: weights[theirs][1:].clone()}, single / SINGLE)
    (problem,) = checkpoint_problems(model, Checkpoint.open(single))
    assert problem == f"{up} is [95, 48] in the checkpoint, config.json implies [96, 48]"
    save_file({**weights, up: weights[theirs].clone()}, single / SINGLE)
    assert any(theirs in line for line in surplus(model, Checkpoint.open(single)).problems)


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


def _reindex(sharded: Path, change: object) -> None:
    index = json.loads((sharded / INDEX).read_text())
    (sharded / INDEX).write_text(json.dumps(change(index) if callable(change) else change))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ([], "expected a mapping"), ({}, "weight_map: missing"), ({"weight_map": 3}, "weight_map: expected a mapping, got 3"),
        ({"weight_map": {"a": []}}, "weight_map.a: expected text, got a list"), ({"weight_map": {}}, "weight_map"),
        ({"weight_map": {"a": "../outside.safetensors"}}, "no file of its folder"),
        ({"weight_map": {"a": "x/../../outside.safetensors"}}, "no file of its folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "no file of its folder"), ({"weight_map": {"a": "a\0b"}}, "no file of its folder"),
        ({"weight_map": {"a": "x" * 300}}, "no file of its folder"), ({"weight_map": {"a": "."}}, "no file of its folder"),
        ({"weight_map": {"a": "pipe"}}, "a pipe or a device"), ({"weight_map": {"a": "folder"}}, "a folder"),
        ({"weight_map": {"a": "link"}}, "outside the folder"),
    ],
)  # fmt: skip
def test_indices_that_are_none(sharded: Path, index: object, words: str) -> None:
    os.mkfifo(sharded / "pipe")
    (sharded / "folder").mkdir()
    (sharded.parent / "outside.safetensors").write_bytes(b"")
    (sharded / "link").symlink_to("../outside.safetensors")
    _reindex(sharded, index)
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(sharded)
    _one_line(error, words)


def test_links_into_a_hub_cache_are_read(sharded: Path, tmp_path: Path) -> None:
    """The layout of huggingface_hub: snapshots of links to blobs."""
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    checkpoint = Checkpoint.open(snapshot)
    assert checkpoint.load("model.norm.weight").shape == (48,)


def _header(path: Path, change: Callable[[dict[str, dict]], object]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["model.norm.weight"].update(shape=[49]),
        lambda h: h["model.norm.weight"].update(shape=[-48]),
        lambda h: h["model.norm.weight"].update(dtype="F64"),
        lambda h: h["model.norm.weight"].update(dtype=[]),
        lambda h: h["model.norm.weight"].update(data_offsets=[0, 192]),
        lambda h: h["model.norm.weight"]["data_offsets"].reverse(),
        lambda h: h.update(extra={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}),
        lambda h: h.pop("model.norm.weight"),
    ],
    ids=["longer", "negative", "wider", "a list", "overlap", "reversed", "twice", "nobody's"],
)
def test_headers_that_do_not_describe_their_data(single: Path, change: Callable[[dict[str, dict]], object]) -> None:
    """safetensors itself is the oracle: it opens none of these either."""
    _header(single / SINGLE, change)
    with pytest.raises(SafetensorError), safe_open(single / SINGLE, "pt"):
        pass
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(single)
    _one_line(error, SINGLE, "fetch it again")


def test_what_is_no_model_is_named_for_what_it_is(tmp_path: Path) -> None:
    def refused(place: Path) -> str:
        with pytest.raises(NoSuchModel) as error:
            Checkpoint.open(place)
        assert error.value.exit_code == 2
        _one_line(error, str(place))
        return str(error.value)

    folders = {name: tmp_path / name for name in ("adapter", "files", "run", "empty")}
    for folder in folders.values():
        folder.mkdir()
    (folders["adapter"] / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    (folders["files"] / "x-Q8_0.gguf").write_bytes(b"GGUF")
    (folders["run"] / "scorecard.json").write_text("{}")
    (folders["run"] / "x-gptq").mkdir()
    (folders["run"] / "x-gptq" / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "adapter (LoRA) of owner/base" in refused(folders["adapter"])
    assert refused(folders["files"]).endswith(f"give the file: {folders['files'] / 'x-Q8_0.gguf'}")
    assert refused(folders["run"]).endswith(f"what it made is {folders['run'] / 'x-gptq'}")
    assert "without a config.json" in refused(folders["empty"])
    assert "one file of a model" in refused(tmp_path / "model.safetensors")
