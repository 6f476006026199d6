"""A ladder: the files are those of single runs that see the original's inputs, the importance matrix is what the original
multiplies, one scorecard tells of all, and a killed one continues to the same bytes."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from compress.errors import NoSuchModel, RecipeError
from compress.plan import make_plan
from compress.recipe import load_recipe
from compress.recipe.ladder import Ladder, load_ladder
from compress.report import scorecard as scorecards
from compress.report.checksums import verify
from compress.report.progress import Reporter
from compress.run import ladder as ladder_module
from compress.run import load_calibration, run, run_ladder
from compress.run.reproduce import Here, reproduce
from tests.integration.runs import SMALL, demo_blocks, final_names, sha256, text_file
from tests.tiny import tiny_model

TYPES = ("Q8_0", "Q4_0", "IQ4_NL")


SOLVER = ("sweeps=1", "refits=1")  # which a type that only rounds has not


def _sets(folder: Path, solver: tuple[str, ...] = SOLVER) -> tuple[str, ...]:
    return (*SMALL, f"calibration.dataset={text_file(folder / 'text.txt')}", *solver)


def _ladder(model: Path, folder: Path, types: tuple[str, ...] = TYPES, solver: tuple[str, ...] = SOLVER) -> Ladder:
    return load_ladder(types, _sets(folder, solver), model=str(model), output=str(folder / "ladder"))


@pytest.mark.parametrize("kind", ["llama", "demo"])
def test_every_file_is_that_of_a_run_of_its_own(kind: str, tmp_path: Path) -> None:
    model = demo_blocks(tmp_path / "model", 1) if kind == "demo" else tiny_model(kind, tmp_path / "model")
    types = ("Q8_0", "Q4_0") if kind == "demo" else ("f16", *TYPES)  # one that reads no text comes first
    solver = () if "f16" in types else SOLVER
    card = run_ladder(_ladder(model, tmp_path, types, solver))
    assert [artifact.variant for artifact in card.artifacts] == list(types)
    for artifact in card.artifacts:
        sets = ("inputs=original", *_sets(tmp_path, solver))
        alone = load_recipe(artifact.variant, sets, model=str(model), output=str(tmp_path / artifact.variant))
        single = run(alone)
        assert artifact.path == single.artifacts[0].path
        assert artifact.sha256 == single.artifacts[0].sha256
    assert card.calibration["samples"] == 4
    assert set(verify(tmp_path / "ladder").values()) == {"ok"}


def _seen(model: Path, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Sums of squares of what every module of transformers' model multiplies, by its name."""
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    sums: dict[str, np.ndarray] = {}

    def note(name: str):
        def see(module, inputs) -> None:
            x = inputs[0].detach().double().reshape(-1, inputs[0].shape[-1])
            sums[name] = sums.get(name, 0) + x.square().sum(0).numpy()

        return see

    for name, module in loaded.named_modules():
        if name.endswith(("_proj", ".mlp")):
            module.register_forward_pre_hook(note(name))
    with torch.no_grad():
        for start in range(0, len(ids), 2):
            loaded(torch.from_numpy(ids[start : start + 2]).long())
    return sums


def _read_dat(path: Path) -> tuple[dict[str, tuple[int, np.ndarray]], int, str]:
    """The older format by its description: entries of calls and values by name, windows, data set."""
    data, at, entries = path.read_bytes(), 0, {}

    def take(kind: str, count: int = 1) -> tuple:
        nonlocal at
        found = struct.unpack_from(f"<{count}{kind}", data, at)
        at += struct.calcsize(f"<{count}{kind}")
        return found

    for _ in range(take("i")[0]):
        name = b"".join(take("c", take("i")[0])).decode()
        calls, size = take("i", 2)
        entries[name] = (calls, np.array(take("f", size)))
    chunks, size = take("i", 2)
    dataset = b"".join(take("c", size)).decode()
    assert at == len(data)
    return entries, chunks, dataset


def test_the_importance_matrix_is_what_the_original_multiplies(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model")
    ladder = _ladder(model, tmp_path, ("Q4_0", "Q8_0"))
    card = run_ladder(ladder)
    older, newer = (tmp_path / "ladder" / name for name in sorted(card.beside))
    assert (older.name, newer.name) == ("model-imatrix.dat", "model-imatrix.gguf")
    ids = load_calibration(make_plan(ladder.recipes["Q4_0"]))
    seen = _seen(model, ids)
    reader = gguf.GGUFReader(newer)
    keys = {
        name: reader.fields[name].contents() for name in reader.fields if "." in name and not name.startswith("GGUF")
    }
    assert keys == {
        "general.type": "imatrix",
        "imatrix.datasets": ["text.txt"],
        "imatrix.chunk_count": len(ids),
        "imatrix.chunk_size": ids.shape[1],
    }
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    entries, chunks, dataset = _read_dat(older)
    assert (chunks, dataset) == (len(ids), "text.txt")
    leaves = {
        "attn_q": "self_attn.q_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for layer in range(2):
        for ours, theirs in leaves.items():
            name, wanted = f"blk.{layer}.{ours}.weight", seen[f"model.layers.{layer}.{theirs}"]
            np.testing.assert_allclose(found[f"{name}.in_sum2"][0], wanted, rtol=2e-4)
            assert found[f"{name}.counts"].tolist() == [[ids.size]]
            calls, values = entries[name]
            np.testing.assert_allclose(values / calls, wanted / ids.size, rtol=2e-4)


def test_experts_stand_stacked_with_the_tokens_each_saw(tmp_path: Path) -> None:
    model = demo_blocks(tmp_path / "model", 1)
    ladder = _ladder(model, tmp_path, ("Q8_0",), (*SOLVER, "precision=float32"))  # as the sums here are made
    card = run_ladder(ladder)
    ids = load_calibration(make_plan(ladder.recipes["Q8_0"]))
    chosen = json.loads((model / "config.json").read_text())["num_experts_per_tok"]
    found = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "ladder" / max(card.beside)).tensors}
    counts = found["blk.0.ffn_gate_exps.weight.counts"][:, 0]
    assert counts.tolist() == list(card.experts[0].tokens)
    assert counts.sum() == chosen * ids.size
    each = found["blk.0.ffn_gate_exps.weight.in_sum2"]  # a token's input goes to as many experts as it chooses
    np.testing.assert_allclose(each.sum(0), chosen * _seen(model, ids)["model.layers.0.mlp"], rtol=2e-4)
    assert found["blk.0.ffn_down_exps.weight.in_sum2"].shape[0] == len(counts)


def test_a_killed_one_continues_to_the_same_bytes_and_a_finished_one_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", tmp_path / "model")
    whole = run_ladder(_ladder(model, tmp_path))
    other = load_ladder(TYPES, _sets(tmp_path), model=str(model), output=str(tmp_path / "other"))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ladder_module, "_head", killed)
        with pytest.raises(KeyboardInterrupt):
            run_ladder(other)
    assert final_names(tmp_path / "other") == set()
    embedded = []
    monkeypatch.setattr(ladder_module, "_embeddings", lambda *_: embedded.append(1))
    card = run_ladder(other)
    assert not embedded
    assert card.files == whole.files
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "other").iterdir()}
    assert run_ladder(other) == card
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "other").iterdir()} == before
    assert sha256(tmp_path / "other" / next(iter(card.beside))) == next(iter(card.beside.values()))


def test_a_ladder_is_reproduced_to_the_byte(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model")
    sets = _sets(tmp_path)
    run_ladder(_ladder(model, tmp_path))
    text = next(setting for setting in sets if "dataset" in setting)
    here = Here(str(model), (text,), str(tmp_path / "again"))
    compared = reproduce(str(tmp_path / "ladder"), here, Reporter(0))
    assert set(compared.files.values()) == {"same"}
    assert len(compared.files) == len(TYPES) + 2
    with pytest.raises(NoSuchModel, match="--model"):
        reproduce(str(tmp_path / "ladder"), Here(None, (text,), str(tmp_path / "third")), Reporter(0))


def test_one_scorecard_tells_of_all(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model")
    ladder = _ladder(model, tmp_path, ("Q8_0", "Q4_K_M"))
    card = scorecards.read(tmp_path / "ladder") if run_ladder(ladder) else None
    assert card is not None
    assert card.recipe == ladder.name == "model-GGUF"
    assert {error.variant for error in card.errors} == {"Q8_0", "Q4_K_M"}
    assert {check.name.partition(":")[0] for check in card.gate.checks} == {"Q8_0", "Q4_K_M"}
    assert card.fallbacks
    assert all(line.subject.startswith("Q4_K_M: ") for line in card.fallbacks if line.wanted != "own statistics")
    told = json.loads((tmp_path / "ladder" / scorecards.RECIPE_FILE).read_text())
    assert list(told["ladder"]) == ["Q8_0", "Q4_K_M"]
    assert str(tmp_path) not in json.dumps(told)
    card_text = (tmp_path / "ladder" / "README.md").read_text()
    assert all(f"`{artifact.path}`" in card_text for artifact in card.artifacts)
    records = [json.loads(line) for line in (tmp_path / "ladder" / scorecards.TENSORS_FILE).read_text().splitlines()]
    assert {record["variant"] for record in records} == {"Q8_0", "Q4_K_M"}


@pytest.mark.parametrize(
    ("types", "word"),
    [
        (("Q4_K_M", "q4_k_m"), "twice"),
        (("Q4_K_N",), "no type"),
        (("qwen-moe-2bit",), "no type"),
        (("",), "no type"),
        ((), "no type is named"),
    ],
)
def test_what_is_no_type_is_said(types: tuple[str, ...], word: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=word):
        load_ladder(types, model=str(tiny_model("llama", tmp_path / "model")))
