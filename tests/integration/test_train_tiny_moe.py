"""The training script, run from its command line, on a text small enough to be learned in a few steps."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import sys
from pathlib import Path

import pytest

from compress.text import data_root

SCRIPT = Path(__file__).parents[2] / "models" / "train_tiny_moe.py"
TEXT = "The quick brown fox jumps over the lazy dog; 17 dogs don't mind.\n\n"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_tiny_moe", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(script, tmp_path_factory):
    import torch

    folder = tmp_path_factory.mktemp("trained")
    (folder / "train.txt").write_text(TEXT * 300)
    (folder / "heldout.jsonl").write_text(json.dumps({"text": TEXT * 20}) + "\n")
    options = {
        "text": folder / "train.txt",
        "heldout": folder / "heldout.jsonl",
        "output": folder / "model",
        "steps": 8,
        "lr": 1e-3,
        "warmup": 2,
        "batch": 2,
        "length": 48,
        "evaluate-every": 4,
        "heldout-windows": 2,
        "threads": 1,
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    printed = io.StringIO()
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        script.main()
    torch.set_num_threads(threads)
    return folder / "model", printed.getvalue()


def test_the_held_out_loss_falls(trained):
    losses = [float(value) for value in re.findall(r"held-out ([0-9.]+)", trained[1])]
    assert len(losses) == 3  # before, after 4 and after 8 steps
    assert losses[-1] < losses[0] - 1


def test_the_result_is_like_the_shipped_model(trained):
    import torch
    from safetensors import safe_open
    from transformers import AutoTokenizer

    shipped = data_root("models") / "tiny-qwen3-moe"

    def tensors(folder: Path) -> dict[str, tuple[str, list[int]]]:
        with safe_open(folder / "model.safetensors", "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}

    def config(folder: Path) -> dict:
        loaded = json.loads((folder / "config.json").read_text())
        # The vocabulary follows the text; the others are the transformers version's own.
        for key in (
            "vocab_size",
            "transformers_version",
            "num_local_experts",
            "bos_token_id",
            "eos_token_id",
        ):
            loaded.pop(key, None)
        return loaded

    ours, theirs = tensors(trained[0]), tensors(shipped)
    embedding = "model.embed_tokens.weight"
    assert ours.pop(embedding)[1][1] == theirs.pop(embedding)[1][1]
    assert ours == theirs
    ours, theirs = config(trained[0]), config(shipped)
    assert ours.pop("pad_token_id") == len(AutoTokenizer.from_pretrained(trained[0])) - 3
    theirs.pop("pad_token_id")
    assert ours == theirs
    assert torch.bfloat16 == getattr(torch, ours["dtype"])


def test_the_tokenizer_cuts_like_the_shipped_one(trained):
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(trained[0])
    shipped = AutoTokenizer.from_pretrained(data_root("models") / "tiny-qwen3-moe")
    text = "Don't  panic: 42 naïve\n\n\tcafés!\r\n  e\u0301 "
    for part in ("normalizer", "pre_tokenizer"):
        mine, theirs = (getattr(t.backend_tokenizer, part) for t in (ours, shipped))
        cut = "pre_tokenize_str" if part == "pre_tokenizer" else "normalize_str"
        assert getattr(mine, cut)(text) == getattr(theirs, cut)(text)
    assert ours.decode(ours(text).input_ids) == shipped.decode(shipped(text).input_ids)
    turns = [{"role": "user", "content": "hello"}]
    render = {"tokenize": False, "add_generation_prompt": True}
    assert ours.apply_chat_template(turns, **render) == shipped.apply_chat_template(turns, **render)
    assert ours.bos_token_id is None and ours.model_max_length == shipped.model_max_length


def test_learning_rate_at_its_landmarks(script):
    rates = [script.learning_rate(step, 1000, 3e-3, 200) for step in range(1001)]
    assert rates[0] == pytest.approx(3e-3 / 200) and rates[199] == pytest.approx(3e-3)
    assert rates[600] == pytest.approx(3e-3 * (0.05 + 0.95 / 2))  # half way down the cosine
    assert rates[1000] == pytest.approx(3e-3 * 0.05)
    assert rates[:200] == sorted(rates[:200]) and rates[200:] == sorted(rates[200:], reverse=True)


def test_batches_lose_and_repeat_nothing(script):
    import numpy as np

    pieces = [np.arange(start, start + size) for start, size in [(0, 5), (5, 1), (6, 30), (36, 2), (38, 40)]]
    stream = script.batches(iter(pieces), batch=2, length=6)
    taken = [next(stream) for _ in range(6)]
    assert all(tokens.shape == (2, 6) for tokens in taken)
    assert [token for tokens in taken for token in tokens.flatten().tolist()] == list(range(72))


def test_a_folder_in_use_is_left_alone(trained, script, monkeypatch):
    before = sorted(path.name for path in trained[0].iterdir())
    files = ["--text", "none.txt", "--heldout", "none.txt", "--output", str(trained[0])]
    monkeypatch.setattr(sys, "argv", ["train_tiny_moe.py", *files])
    with pytest.raises(SystemExit, match="is not empty"):
        script.main()
    assert sorted(path.name for path in trained[0].iterdir()) == before
