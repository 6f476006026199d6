"""What goes wrong is told in one line with a fix and the right exit code, and leaves nothing under a final name.

Every case goes through the command line in this process; only Ctrl-C has a process of its own.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import GateFailed, NumericalError, OutputError
from compress.report.scorecard import read
from compress.run import WORK
from compress.streaming.activations import ActivationWriter
from tests.integration.runs import JUDGED, SMALL, TOLD, carry_out, command, final_names, names, sha256, small, text_file
from tests.tiny import tiny_model

RECIPE = "gguf-q4-k-m"
FILE = "model-Q4_K_M.gguf"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    """A sound model that a test may damage."""
    return shutil.copytree(good, tmp_path / "model")


class Bench:
    """The command line on a model, with small settings."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
        self.output = folder / "out"
        self.text = text_file(folder / "calibration.txt")
        self._monkeypatch, self._capfd = monkeypatch, capfd

    def arguments(self, model: Path | str, *sets: str, recipe: str | Path = RECIPE) -> list[str]:
        given = [*SMALL, f"calibration.dataset={self.text}", *sets]
        return ["run", str(recipe), "--model", str(model), "--output", str(self.output), "--quiet",
                *(part for pair in given for part in ("--set", pair))]  # fmt: skip

    def forget(self) -> None:
        """Drop what a library has printed so far."""
        self._capfd.readouterr()

    def run(self, model: Path | str, *sets: str, recipe: str | Path = RECIPE) -> tuple[int, str]:
        """(exit code, stderr)."""
        code, _, stderr = command(self._monkeypatch, self._capfd, *self.arguments(model, *sets, recipe=recipe))
        return code, stderr

    def fails(self, model: Path | str, *sets: str, recipe: str | Path = RECIPE, code: int = 1) -> str:
        """The one line of a failing run that must leave nothing delivered."""
        found, stderr = self.run(model, *sets, recipe=recipe)
        lines = stderr.strip().splitlines()
        assert found == code, stderr
        assert len(lines) == 1 and lines[0].startswith("error: "), stderr
        assert not final_names(self.output)
        return lines[0]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Bench:
    capfd.readouterr()
    return Bench(tmp_path, monkeypatch, capfd)


def edit(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Rewrite the weights of a folder."""
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file({k: v.contiguous() for k, v in weights.items()}, model / "model.safetensors", {"format": "pt"})
    return model


def reconfigure(model: Path, **changes: Any) -> Path:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return model


# --- the model -------------------------------------------------------------------------------


def test_no_such_model(bench: Bench, tmp_path: Path) -> None:
    assert "no such model" in bench.fails(tmp_path / "nowhere", code=2)
    assert not bench.output.exists()


def test_folder_without_config(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in bench.fails(tmp_path / "empty", code=2)


def test_missing_tensor(bench: Bench, model: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    assert name in bench.fails(edit(model, lambda w: w.pop(name)))
    assert not bench.output.exists()


def test_tensor_of_another_shape(bench: Bench, model: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    line = bench.fails(edit(model, lambda w: w.update({name: w[name][:, :-1]})), code=2)
    assert name in line and "[96, 63]" in line and "[96, 64]" in line


def test_truncated_weights(bench: Bench, model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    line = bench.fails(model)
    assert "truncated" in line and "model.safetensors" in line
    assert not bench.output.exists()


def test_weights_that_are_no_safetensors(bench: Bench, model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\x80\x04" + b"pickle" * 100)
    assert "model.safetensors" in bench.fails(model)


def test_missing_shard(bench: Bench, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "sharded", max_shard_size="1MB")
    shard = sorted(model.glob("model-*.safetensors"))[0]
    shard.unlink()
    bench.forget()
    assert shard.name in bench.fails(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite(bench: Bench, model: Path, value: float) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    line = bench.fails(edit(model, lambda w: w[name].view(-1)[7:9].fill_(value)))
    assert name in line and " 2 " in line


def test_unknown_architecture(bench: Bench, model: Path) -> None:
    line = bench.fails(reconfigure(model, model_type="lama"), code=2)
    assert "'lama'" in line and "nearest: llama" in line and "qwen3_moe" in line


def test_config_that_is_no_json(bench: Bench, model: Path) -> None:
    (model / "config.json").write_text("{")
    assert "config.json" in bench.fails(model)


def test_model_without_tokenizer(bench: Bench, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    assert "tokenizer" in bench.fails(model)


# --- recipe and text -------------------------------------------------------------------------------


def test_wrong_recipe_key(bench: Bench, model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: x\ncalibraton: {samples: 3}\nexport: [{container: gguf}]\n")
    line = bench.fails(model, recipe=recipe, code=2)
    assert "mine.yaml:2" in line and "calibration" in line
    assert not bench.output.exists()


def test_wrong_set_key(bench: Bench, model: Path) -> None:
    line = bench.fails(model, "calibration.sample=4", code=2)
    assert "--set calibration.sample=4" in line and "samples" in line


def test_no_such_recipe(bench: Bench, model: Path) -> None:
    assert "gguf-q4-k-m" in bench.fails(model, recipe="gguf-q4km", code=2)


def test_no_such_calibration_set(bench: Bench, model: Path) -> None:
    line = bench.fails(model, "calibration.dataset=wikipedie", code=2)
    assert "wikipedie" in line and "'wikipedia'" in line
    assert not bench.output.exists()


def test_no_such_suite(bench: Bench, model: Path) -> None:
    assert "quick" in bench.fails(model, "score={suite: quik}", code=2)
    assert not bench.output.exists()


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_empty_calibration_text(bench: Bench, model: Path, tmp_path: Path, content: str) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(content)
    line = bench.fails(model, f"calibration.dataset={empty}")
    assert "empty.txt" in line and "no text" in line


def test_too_little_calibration_text(bench: Bench, model: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A house by the river. " * 5)
    line = bench.fails(model, f"calibration.dataset={short}")
    assert "short.txt" in line and "length" in line


def test_text_just_long_enough(bench: Bench, model: Path, tmp_path: Path) -> None:
    """The checks at the end take no more text than the run was given."""
    from compress.text import load_tokenizer

    text = bench.text.read_text()
    ids = load_tokenizer(model).encode(text, add_special_tokens=False)[: 4 * 64 + 4]
    exact = tmp_path / "exact.txt"
    exact.write_text(load_tokenizer(model).decode(ids))
    code, stderr = bench.run(model, f"calibration.dataset={exact}")
    assert code == 0, stderr


def test_windows_longer_than_the_model_allows(bench: Bench, model: Path) -> None:
    line = bench.fails(model, "calibration.length=1024", code=2)
    assert "1024" in line and "512" in line
    assert not bench.output.exists()


def test_text_of_the_suite_is_missed_before_the_work(bench: Bench, model: Path, tmp_path: Path) -> None:
    """A suite whose text cannot be had stops the run before anything is computed."""
    suite = tmp_path / "suite.yaml"
    suite.write_text("{name: mine, text: wikipedie, windows: 2, length: 64}\n")
    assert "wikipedie" in bench.fails(model, f"score={{suite: {suite}}}", code=2)
    assert "block-00000.safetensors" not in names(bench.output / WORK)


def test_limits_without_scores_are_refused(bench: Bench, model: Path) -> None:
    """A limit that is never measured would pass in silence."""
    assert "gate" in bench.fails(model, "gate.max_kld=0.1", code=2)


# --- numbers -------------------------------------------------------------------------------


def test_block_that_overflows(bench: Bench, model: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    line = bench.fails(edit(model, lambda w: w[name].mul_(1e38 / w[name].abs().max())))
    assert "block 1" in line and "sample 0" in line


def test_overflow_names_the_sample(bench: Bench, tmp_path: Path) -> None:
    """One token, in one sample only, brings the residual stream beyond float32."""
    from compress.text import calibration_windows, load_tokenizer

    model = tiny_model("llama", tmp_path / "model", attention_bias=True, hidden_size=128, intermediate_size=128)
    windows = calibration_windows(str(bench.text), load_tokenizer(model), samples=4, length=64, seed=0)
    seen_before = set(windows[:2].ravel()) | set(windows[3].ravel())
    token = next(int(t) for t in windows[2] if t not in seen_before)

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.embed_tokens.weight"][token, 5] = 3e38
        weights["model.layers.0.self_attn.o_proj.bias"][5] = 3e38

    bench.forget()
    line = bench.fails(edit(model, spoil), recipe="gptq-w4-g128")
    assert "block 0" in line and "sample 2" in line


def test_activations_whose_squares_overflow(bench: Bench, model: Path) -> None:
    """Finite activations of 1e25 have no float32 gram: told, never solved against."""
    name = "model.layers.0.post_attention_layernorm.weight"
    line = bench.fails(edit(model, lambda w: w[name].mul_(1e25)))
    assert "mlp.in" in line and "block 0" in line and "sample" in line


def test_original_that_overflows_alone(bench: Bench, model: Path) -> None:
    """Scales in half precision cannot hold such a weight, so only the original's activations explode."""
    name = "model.layers.0.mlp.up_proj.weight"
    line = bench.fails(edit(model, lambda w: w[name].mul_(1e33)))
    assert "mlp.act" in line and "block 0" in line and "sample" in line


def test_sum_of_finite_activations_may_overflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values near float32's limit are no error as long as each is finite."""
    from compress.streaming import walk
    from compress.streaming.activations import Activations

    shape = (2, 3, 4)
    source, target = (Activations(tmp_path / name, shape) for name in ("in", "out"))
    with source.writing() as out:
        out.append(torch.full(shape, 3e38))
    monkeypatch.setattr(walk, "forward_branch", lambda branch, weights, hidden: hidden)
    walk.advance(None, {}, source, target)  # type: ignore[arg-type]
    assert torch.equal(target.read(0, 2), torch.full(shape, 3e38))


# --- disk and folders -------------------------------------------------------------------------------


def test_no_space_at_the_start(bench: Bench, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1 << 40, used=1 << 40, free=1000))
    line = bench.fails(model)
    assert "free" in line and "--output" in line
    assert not names(bench.output)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def numpy_full(*_: object, **__: object) -> None:
    raise OSError("16384 requested and 0 written")  # what tofile says, without an errno


@pytest.mark.parametrize(
    ("where", "failure"),
    [("unit", full), ("activations", numpy_full), ("container", numpy_full), ("container", full), ("scorecard", full)],
    ids=["unit", "activations", "container", "container, errno", "scorecard"],
)
def test_disk_fills_up(
    where: str, failure: Callable, bench: Bench, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, nothing delivered, and the same command continues when there is room again."""
    import gguf

    with monkeypatch.context() as patch:
        if where == "activations":
            patch.setattr(ActivationWriter, "append", failure)
        elif where == "container":
            patch.setattr(gguf.GGUFWriter, "write_tensor_data", failure)
        else:
            sync, target = os.fsync, {"unit": ".block-00001.", "scorecard": ".scorecard."}[where]

            def fsync(handle: int) -> None:
                link = Path(f"/proc/self/fd/{handle}")
                opened = link.readlink().name if link.exists() else target
                failure() if opened.startswith(target) else sync(handle)

            patch.setattr(os, "fsync", fsync)
        code, stderr = bench.run(model)
    assert code == 1 and len(stderr.strip().splitlines()) == 1, stderr
    assert "cannot write" in stderr and "--output" in stderr
    assert final_names(bench.output) == ({FILE} if where == "scorecard" else set())
    assert not [n for n in names(bench.output / WORK) if n.endswith(".tmp")]
    code, stderr = bench.run(model)
    assert code == 0, stderr
    assert final_names(bench.output) == {FILE, *TOLD}


def test_output_is_a_file(bench: Bench, model: Path) -> None:
    bench.output.write_text("mine")
    code, stderr = bench.run(model)
    assert code == 1 and len(stderr.strip().splitlines()) == 1
    assert "is a file" in stderr and "--output" in stderr
    assert bench.output.read_text() == "mine"


def test_output_below_a_file(bench: Bench, model: Path) -> None:
    bench.output.write_text("mine")
    bench.output = bench.output / "deeper"
    assert "--output" in bench.fails(model)


def test_output_holds_something_else(bench: Bench, model: Path) -> None:
    bench.output.mkdir()
    (bench.output / "thesis.txt").write_text("mine")
    code, stderr = bench.run(model)
    assert code == 1 and len(stderr.strip().splitlines()) == 1
    assert "thesis.txt" in stderr and "--output" in stderr
    assert names(bench.output) == {"thesis.txt"}


def test_output_holds_a_finished_run_of_another_recipe(bench: Bench, model: Path) -> None:
    """Its figures would be overwritten beside its files: refused, unless told to."""
    assert bench.run(model)[0] == 0
    before = {name: sha256(bench.output / name) for name in names(bench.output)}
    code, stderr = bench.run(model, recipe="qwen-moe-2bit")
    assert code == 1 and len(stderr.strip().splitlines()) == 1
    assert "another" in stderr and "--fresh" in stderr
    assert {name: sha256(bench.output / name) for name in names(bench.output)} == before


# --- the gate -------------------------------------------------------------------------------


@pytest.fixture
def suite(tmp_path: Path) -> str:
    path = tmp_path / "suite.yaml"
    path.write_text("{name: few, text: wikipedia, windows: 2, length: 64}\n")
    return f"score={{suite: {path}}}"


def test_limit_that_is_not_kept(bench: Bench, model: Path, suite: str) -> None:
    code, stderr = bench.run(model, suite, "gate.max_kld=1e-9")
    assert code == 3 and len(stderr.strip().splitlines()) == 1
    assert "KL divergence" in stderr and "1e-09" in stderr and "rejected" in stderr
    assert final_names(bench.output) == {"rejected", *JUDGED}
    assert names(bench.output / "rejected") == {FILE}
    card = read(bench.output)
    assert not card.gate.passed
    assert [a.path for a in card.artifacts] == [f"rejected/{FILE}"] and not card.artifacts[0].delivered
    assert (bench.output / card.artifacts[0].path).is_file()
    # with a limit it keeps, the same folder holds the file and no trace of the rejection
    assert bench.run(model, suite, "gate.max_kld=100.0")[0] == 0
    assert final_names(bench.output) == {FILE, *TOLD}
    assert read(bench.output).gate.passed


def test_rejection_after_a_delivery(bench: Bench, model: Path, suite: str) -> None:
    """The file of an earlier run does not stay under its final name beside a scorecard that rejects it."""
    assert bench.run(model, suite)[0] == 0
    assert bench.run(model, suite, "gate.max_perplexity_ratio=1e-9")[0] == 3
    assert final_names(bench.output) == {"rejected", *JUDGED}


def test_file_that_decodes_to_something_else(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One flipped bit in the written file is seen by the independent reader."""
    from compress.export import deliver

    write = deliver.write

    def damaged(*arguments: Any) -> list[Path]:
        files = write(*arguments)
        data = bytearray(files[0].read_bytes())
        data[len(data) // 2] ^= 0x40
        files[0].write_bytes(data)
        return files

    monkeypatch.setattr(deliver, "write", damaged)
    with pytest.raises(GateFailed, match="gguf tensors"):
        carry_out(small(RECIPE, good, tmp_path / "out"))
    assert final_names(tmp_path / "out") == {"rejected", *JUDGED}


def test_file_that_the_engine_refuses(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the engine says, it is the gate that fails, and the file is there to be looked at."""
    pytest.importorskip("llama_cpp")
    from compress.export import deliver

    write = deliver.write

    def renamed(*arguments: Any) -> list[Path]:
        files = write(*arguments)
        head, key, rest = files[0].read_bytes().partition(b"general.architecture")
        files[0].write_bytes(head + key + rest.replace(b"llama", b"lamma", 1))
        return files

    monkeypatch.setattr(deliver, "write", renamed)
    with pytest.raises(GateFailed, match="lamma"):
        carry_out(small(RECIPE, good, tmp_path / "out"))
    assert final_names(tmp_path / "out") == {"rejected", *JUDGED}


def test_library_raises_what_the_command_line_prints(good: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError):
        carry_out(small(RECIPE, good, tmp_path / "out"))
    assert NumericalError.exit_code == OutputError.exit_code == 1 and GateFailed.exit_code == 3


# --- Ctrl-C -------------------------------------------------------------------------------

_INTERRUPTED = """
import signal, time, torch
signal.alarm(120)  # rather fail than hang
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background inherit that it is ignored
torch.set_num_threads(1)
from compress.streaming.journal import Journal
finish = Journal.finish
def slow(self, unit, *rest):
    finish(self, unit, *rest)
    if unit == "block-00000":
        print("now", flush=True)
        time.sleep(60)
Journal.finish = slow
from compress.cli import main
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT")
def test_ctrl_c(bench: Bench, good: Path, tmp_path: Path) -> None:
    arguments = bench.arguments(good)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", _INTERRUPTED, *arguments], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=environment)  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "now"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    lines = stderr.strip().splitlines()
    assert len(lines) == 1 and "same command" in lines[0], stderr
    assert names(bench.output) == {WORK}
    assert bench.run(good)[0] == 0
    whole = carry_out(small(RECIPE, good, tmp_path / "whole"))
    assert whole.gate.passed
    assert sha256(bench.output / FILE) == sha256(tmp_path / "whole" / FILE)
