"""docs/extending.md, executed: a codec, a solver, a transform, a container and a family, one file each, in one run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import plugins
from compress.engines.open import open_model
from compress.engines.streamed import StreamedSource
from tests.integration.containers import reference_logits, token_ids
from tests.integration.pages import sets, write_block
from tests.integration.runs import SMALL, command, text_file
from tests.tiny import tiny_model

PAGE = "extending.md"
KINDS = ("codec", "solver", "scaling", "container", "family")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A folder with the page's files, a Llama, and the same weights as the page's family calls them."""
    for kind in KINDS:
        write_block(PAGE, f"python {kind}", tmp_path / f"{kind}.py")
    llama = tiny_model("llama", tmp_path / "llama", hidden_size=128, intermediate_size=128)
    toy = tiny_model("llama", tmp_path / "toy", hidden_size=128, intermediate_size=128)
    config = json.loads((toy / "config.json").read_text())
    (toy / "config.json").write_text(json.dumps({**config, "model_type": "toy", "architectures": ["ToyForCausalLM"]}))
    theirs = {
        "input_layernorm": "norm_1", "self_attn.q_proj": "attn.wq", "self_attn.k_proj": "attn.wk", "self_attn.v_proj": "attn.wv",
        "self_attn.o_proj": "attn.wo", "post_attention_layernorm": "norm_2", "mlp.gate_proj": "ffn.w1", "mlp.up_proj": "ffn.w3",
        "mlp.down_proj": "ffn.w2",
    }  # fmt: skip
    weights = load_file(llama / "model.safetensors")
    for key in weights:  # columns of one size get many, as those of trained models have: what a scaling evens out
        uneven = torch.logspace(-1, 1, 128)
        if key.endswith("layernorm.weight"):
            weights[key] = weights[key] * uneven
        elif key.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            weights[key] = weights[key] / uneven
    save_file(weights, llama / "model.safetensors", {"format": "pt"})
    for ours, name in theirs.items():
        weights = {key.replace(f".{ours}.", f".{name}."): tensor for key, tensor in weights.items()}
    assert sum(".layers." in key and any(f".{name}." in key for name in theirs.values()) for key in weights) == 18
    save_file(weights, toy / "model.safetensors", {"format": "pt"})
    write_block(PAGE, "yaml", tmp_path / "recipe.yaml", MODEL=toy)
    text_file(tmp_path / "text.txt")
    return tmp_path


@pytest.fixture
def compress(
    page: Path, forget_plugins: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> Run:
    """A command that starts from nothing, as in a process of its own, with some of the page's files."""

    def run(*arguments: str, kinds: tuple[str, ...] = KINDS) -> tuple[int, str, str]:
        forget_plugins()
        given = [part for kind in kinds for part in ("--plugin", str(page / f"{kind}.py"))]
        return command(monkeypatch, capfd, *arguments, *given)

    return run


def test_the_page(page: Path, compress: Run) -> None:
    small = sets(*SMALL, f"calibration.dataset={page / 'text.txt'}")
    recipe, out = str(page / "recipe.yaml"), page / "out"
    code, planned, err = compress("plan", recipe, *small, "--json")
    assert code == 0, err
    plan = json.loads(planned)
    coded = [tensor for tensor in plan["tensors"] if tensor["codec"] == "sign-g32"]
    assert len(coded) == 14 and {tensor["solver"] for tensor in coded} == {"plain"}
    code, said, err = compress("run", recipe, *small, "--output", str(out))
    assert code == 0, err + said
    card = json.loads((out / "scorecard.json").read_text())
    assert card["gate"]["passed"] and card["artifacts"][0]["container"] == "npz"
    arrays, weights = np.load(out / "extended.npz"), load_file(page / "llama" / "model.safetensors")
    assert set(arrays) == set(weights) == {tensor["name"] for tensor in plan["tensors"]}
    for tensor in coded:
        blocks = arrays[tensor["name"]].reshape(-1, 32)
        assert all(len(np.unique(np.abs(block))) == 1 for block in blocks[:8])  # a sign, and one scale for 32
        assert (np.sign(blocks) == np.sign(weights[tensor["name"]].numpy().reshape(-1, 32))).all()
    norm = "model.layers.0.input_layernorm.weight"
    assert not np.allclose(arrays[norm], weights[norm].numpy()), "the transform scaled nothing"
    assert (out / "extended.npz").stat().st_size == pytest.approx(plan["file_bytes"]["npz"], rel=0.01)


def test_score_opens_its_file_beside_the_original(page: Path, compress: Run) -> None:
    small = sets(*SMALL, f"calibration.dataset={page / 'text.txt'}")
    assert compress("run", str(page / "recipe.yaml"), *small, "--output", str(page / "out"))[0] == 0
    (page / "suite.yaml").write_text("{name: few, text: wikipedia, windows: 2, length: 64}\n")
    given = ("score", str(page / "out"), "--suite", str(page / "suite.yaml"), "--json")
    code, said, err = compress(*given, "--against", str(page / "toy"))
    assert code == 0, err
    (artifact,) = json.loads(said)["artifacts"]
    assert artifact["container"] == "npz" and artifact["scores"]["kld"]["mean"] > 0
    code, _, err = compress(*given)
    assert code != 0 and "holds weights alone; give the original" in err


def test_the_family_computes_what_llama_does_and_llama_cpp_runs_it(page: Path, compress: Run) -> None:
    plugins.load(page / "family.py")
    opened = open_model(str(page / "toy"))
    ids = token_ids(24)
    (logits,) = StreamedSource(opened.spec, opened.load, "toy").logits([ids])
    np.testing.assert_allclose(logits, reference_logits(page / "llama", ids), rtol=1e-4, atol=1e-4)
    pytest.importorskip("llama_cpp")
    small = sets(*SMALL, f"calibration.dataset={page / 'text.txt'}")
    given = ("run", "gguf-q4-k-m", "--model", str(page / "toy"), "--output", str(page / "out"), *small)
    code, said, err = compress(*given, kinds=("family",))
    assert code == 0, err + said
    assert "between llama.cpp and the in-memory model" in " ".join(said.split())


def test_what_is_registered_is_a_name_like_any_other(page: Path, compress: Run) -> None:
    listed = json.loads(compress("methods", "--json")[1])
    assert {"plain"} <= {entry["name"] for entry in listed["solvers"]} and "npz" in listed["containers"]
    assert "mean" in {entry["name"] for entry in listed["steps"]} and "sign-g32" in {
        c["name"] for c in listed["codecs"]
    }
    for kind, name in (
        ("codec", "sign-g32"), ("solver", "plain"), ("scaling", "mean"), ("container", "npz"), ("family", "toy"),
    ):  # fmt: skip
        others = tuple(other for other in KINDS if other != kind)
        code, _, err = compress("plan", str(page / "recipe.yaml"), kinds=others)
        assert code == 2 and f"{name!r}" in err.replace("unknown step mean", "'mean'") and "Traceback" not in err, err


def test_a_plugin_that_fails_in_a_run_is_a_line(page: Path, compress: Run) -> None:
    file = page / "solver.py"
    file.write_text(file.read_text().replace("    grid, unit =", "    raise SystemExit(0)\n    grid, unit ="))
    line = 1 + file.read_text().splitlines().index("    raise SystemExit(0)")
    small = sets(*SMALL, f"calibration.dataset={page / 'text.txt'}")
    code, _, err = compress("run", str(page / "recipe.yaml"), *small, "--output", str(page / "out"), "--quiet")
    assert (
        code == 1
        and err == f"error: plugin {file}, line {line}: exits (code 0); a plugin registers what it has and returns\n"
    )
    assert not (page / "out" / "scorecard.json").exists()
