"""The command line: every command on a small real run, what it prints where, and its exit codes.

Bad input to `compress run` is in test_bad_input.py.
"""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

from compress.errors import GateFailed
from compress.report.scorecard import Scorecard, read
from tests.integration.runs import Compress, carry_out, small
from tests.tiny import demo_model, tiny_model

ROOT = Path(__file__).resolve().parents[2]
DATED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*)")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
RECIPE = """
model: nowhere
steps:
  - quantize: {{solver: rtn, scheme: {scheme}}}
export: [{{container: {container}}}]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a suite of two short windows, and a finished run of it to GGUF and one to GPTQ, scored on that suite."""
    place = tmp_path_factory.mktemp("cli")
    tiny_model("llama", place / "model", hidden_size=128, intermediate_size=128, dtype="bfloat16")
    (place / "suite.yaml").write_text("{name: two, text: wikipedia, windows: 2, length: 96}\n")
    for container, scheme in (("gguf", "Q4_K_M"), ("gptq", "W4A16")):
        (place / f"{container}.yaml").write_text(RECIPE.format(container=container, scheme=scheme))
        carry_out(small(place / f"{container}.yaml", place / "model", place / container,
                        f"score={{suite: {place / 'suite.yaml'}}}"))  # fmt: skip
    return place


# --- usage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["--version"], 0), (["run", "--help"], 0), (["-h"], 0), (["-V"], 0), (["run", "-h"], 0), ([], 2), (["run"], 2), (["foo"], 2), (["compare"], 2),
     (["plan", "--bogus", "x"], 2), (["generate", "file.gguf", "text", "--tokens", "0"], 2)],
)  # fmt: skip
def test_usage(compress: Compress, arguments: list[str], code: int) -> None:
    found, out, err = compress(*arguments)
    assert found == code
    assert "Traceback" not in out + err and "\x1b" not in out + err
    assert (out if code == 0 else out + err).strip()
    if code == 2 and arguments:
        assert not out and "Error:" in err


def test_version(compress: Compress) -> None:
    assert re.fullmatch(r"compress \d+\.\d+\S*\n", compress("--version")[1])
    assert compress("-V") == compress("--version")


@pytest.mark.parametrize(
    ("words", "expected"), [("compress ru", "run"), ("compress run qwen-moe-2bit-p", "qwen-moe-2bit-plus")]
)
def test_completion(compress: Compress, monkeypatch: pytest.MonkeyPatch, words: str, expected: str) -> None:
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    monkeypatch.setenv("_COMPRESS_COMPLETE", "complete_bash")
    code, out, _ = compress()
    assert (code, out.split()) == (0, [expected])


@pytest.mark.skipif(not hasattr(signal, "SIGTERM"), reason="no SIGTERM here")
@pytest.mark.parametrize(
    ("number", "code", "words"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "SIGTERM")]
)
def test_a_run_that_is_told_to_stop_says_how_to_go_on_and_does(
    place: Path, tmp_path: Path, number: int, code: int, words: str
) -> None:
    """A process of its own, told so in the middle of its work; the same command then ends what it began."""
    command = [sys.executable, "-m", "compress.cli", *arguments(place, tmp_path / "out", "--verbose")]
    many = ["--set", "calibration.samples=64", "--set", "calibration.length=256"]
    with subprocess.Popen([*command, *many], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "block 1 of 2" in line)
        process.send_signal(number)
        last = [line, *process.stderr][-1]
    assert process.returncode == code
    assert last.startswith("error: ") and words in last and "the same command continues" in last
    assert "Traceback" not in last and not (tmp_path / "out" / ".checking").exists()
    again = subprocess.run([*command, *many], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, check=True)
    assert "continuing: " in again.stderr and "Integrity gate: passed" in again.stdout


def test_unforeseen_operating_system_errors_are_one_line(
    compress: Compress, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/somewhere")

    monkeypatch.setattr("compress.report.scorecard.read", refuse)
    (tmp_path / "scorecard.json").write_text("{}")
    assert compress("compare", str(tmp_path)) == (1, "", "error: /somewhere: Permission denied; check the path, its permissions "
                                               "and the free space\n")  # fmt: skip


def test_all_problems_of_a_recipe_get_a_line_each(compress: Compress) -> None:
    code, out, err = compress("plan", "qwen-moe-2bit", "--set", "seed=x", "--set", "calibration.lenght=5")
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: --set ") for line in lines)
    assert "nearest: calibration.length" in err


# --- plan ---------------------------------------------------------------------------------------


def test_plan_of_the_demo_model(compress: Compress) -> None:
    code, out, err = compress("plan", "qwen-moe-2bit")
    assert (code, err) == (0, "")
    assert "\x1b" not in out and max(map(len, out.splitlines())) <= 100
    assert "Qwen3MoeForCausalLM" in out and "iq2_xxs" in out and "routed_experts.down" in out


def test_plan_with_a_rehearsal(compress: Compress, place: Path) -> None:
    sets = ["--set", "calibration.samples=64", "--set", "calibration.length=64"]
    code, out, _ = compress("plan", "gguf-q4-k-m", "--model", place / "model", "--json", "--rehearse", *sets)
    assert code == 0
    facts = json.loads(out)["estimated_seconds"]
    parts = [facts[name] for name in ("forward", "solve", "write", "score")]
    assert all(part > 0 for part in parts)
    assert facts["total"] == pytest.approx(sum(parts), abs=0.01)
    assert not (ROOT / "out" / "gguf-q4-k-m").exists()  # nothing is written where a run would write


def test_rehearsal_needs_weights(compress: Compress, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((demo_model() / "config.json").read_text())
    code, _, err = compress("plan", "qwen-moe-2bit", "--model", tmp_path, "--rehearse")
    assert code == 1 and "no model.safetensors" in err


def test_a_plan_ends_with_a_verdict(
    compress: Compress, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the time it speaks where the same steps were taken on this machine before."""
    sets = ["--set", f"score={{suite: {place / 'suite.yaml'}}}", "--set", "calibration.samples=4"]
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    assert compress("run", place / "gguf.yaml", "--model", place / "model", "--output", tmp_path / "out", *sets)[0] == 0
    code, out, _ = compress("plan", place / "gguf.yaml", "--model", place / "model", *sets)
    assert code == 0
    last = out[out.index("On this machine") :]
    assert "memory to make it  " in last and "disk to make it" in last and "to run it in llama.cpp" in last
    assert re.search(r" time about .* from a run of model on this machine at 20", " ".join(last.split()))
    told = json.loads(compress("plan", place / "gguf.yaml", "--model", place / "model", "--json", *sets)[1])["verdict"]
    assert told["memory"]["fits"] is True and told["missing_bytes"] == 0 and "run of model" in told["time"]["source"]
    assert told["run"][0]["context"]["f16"] > 0
    other = json.loads(compress("plan", "gguf-ternary", "--model", place / "model", "--json")[1])["verdict"]
    assert other["time"] is None


# --- advise -------------------------------------------------------------------------------------


def test_advice(compress: Compress) -> None:
    code, out, err = compress("advise", "models/tiny-qwen3-moe", "--memory", "8GB", "--vram", "0", "--use", "code")
    assert (code, err) == (0, "")
    assert "compress run Q8_0 --model models/tiny-qwen3-moe" in out and "llama-server -m " in out and "-c 2048" in out
    assert (
        "no GPU with memory" in " ".join(out.split()) and "Calibrate on code" in out
    )  # a processor's name may be long
    told = json.loads(compress("advise", "models/tiny-qwen3-moe", "--memory", "8GB", "--vram", "4GB", "--json")[1])
    assert told["proposals"][0]["flags"][0]["flag"] == "-ngl 5"  # four layers and the head
    assert told["machine"]["memory"]["total"] == 8 * 10**9


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(("--memory", "much"), "expected a size like 8GB"), (("--vram", "-1"), "expected a size"), (("--use", "war"), "chat, code, long")],
)  # fmt: skip
def test_advice_for_what_is_none(compress: Compress, arguments: tuple[str, str], expected: str) -> None:
    code, out, err = compress("advise", "models/tiny-qwen3-moe", *arguments)
    assert (code, out) == (2, "") and expected in " ".join(err.replace("│", " ").split())


def test_advice_about_no_model(compress: Compress) -> None:
    code, out, err = compress("advise", "nowhere")
    assert code == compress("plan", "Q4_K_M", "--model", "nowhere")[0] > 0 and not out
    assert err.startswith("error: no such model: nowhere")


# --- run ----------------------------------------------------------------------------------------


def arguments(place: Path, output: Path, *more: str) -> list[str]:
    return ["run", str(place / "gguf.yaml"), "--model", str(place / "model"), "--output", str(output), "--set",
            "calibration.samples=4", "--set", "calibration.length=64", "--set", "score=false", *more]  # fmt: skip


def test_run_prints_lines_when_not_a_terminal(compress: Compress, place: Path, tmp_path: Path) -> None:
    code, out, err = compress(*arguments(place, tmp_path / "out"))
    assert code == 0
    assert out.splitlines()[-1] == str(tmp_path / "out" / "model-Q4_K_M.gguf")
    assert "Integrity gate: passed" in out
    lines = [DATED.fullmatch(line) for line in err.splitlines()]
    assert all(lines), "every line of a log begins with its time"
    told = [line[1] for line in lines if line is not None]
    stages = [line.split("  ")[0] for line in told if " peak " in line]
    assert stages == [stage.name for stage in read(tmp_path / "out").stages]
    assert told[0].startswith("recipe gguf, model ") and stages[0] == "start"
    assert "\x1b" not in out + err and "\r" not in out + err


def test_verbose_names_every_block(compress: Compress, place: Path, tmp_path: Path) -> None:
    _, _, err = compress(*arguments(place, tmp_path / "out", "--verbose"))
    assert re.search(r"^\S+ \S+   block 2 of 2: \d+%", err, re.MULTILINE)


def test_bars_in_a_terminal_show_time_left_and_vanish(
    compress: Compress, monkeypatch: pytest.MonkeyPatch, place: Path, tmp_path: Path
) -> None:
    read_end, terminal = pty.openpty()
    raw: list[bytes] = []

    def read_all() -> None:
        with suppress(OSError):  # Linux's end of file on a terminal
            while data := os.read(read_end, 65536):
                raw.append(data)

    reader = Thread(target=read_all)
    reader.start()
    with monkeypatch.context() as patch, open(terminal, "w", encoding="utf-8") as stderr:
        patch.setattr(sys, "stderr", stderr)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "100")
        code, table, _ = compress(*arguments(place, tmp_path / "out"))
    reader.join(timeout=60)
    os.close(read_end)
    assert code == 0
    assert "\x1b" not in table  # standard output is no terminal
    drawn = b"".join(raw).decode()
    assert re.search(r"block 2 of 2 .*\d+%.*left.*\d:\d\d:\d\d", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn))
    kept = _screen(drawn)
    stages = [line.split("  ")[0] for line in kept if " peak " in line]
    assert stages == [stage.name for stage in read(tmp_path / "out").stages]
    assert kept[0].startswith("recipe gguf, model ")
    notes = [line for line in kept[1:] if line and " peak " not in line]
    assert all(line.startswith(("note: ", "  ", str(tmp_path)[:8])) for line in notes), notes


def _screen(drawn: str) -> list[str]:
    """What stays on a terminal: cursor up, erase line, carriage return and newline are all that rich uses here."""
    lines, row, column = [""], 0, 0
    for piece in re.finditer(r"\x1b\[(\??[0-9;]*)([a-zA-Z])|\r|\n|[^\x1b\r\n]+", drawn):
        text = piece[0]
        if text == "\r":
            column = 0
        elif text == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif piece[2] == "A":
            row -= int(piece[1] or 1)
        elif piece[2] == "K":
            lines[row] = ""
        elif not piece[2]:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
    return [line.rstrip() for line in lines]


# --- score --------------------------------------------------------------------------------------


def score(compress: Compress, place: Path, target: Path, *more: object) -> dict:
    code, out, err = compress("score", target, "--suite", place / "suite.yaml", "--json", *more)
    assert code == 0, err
    assert err == ""
    return json.loads(out)


@pytest.mark.parametrize("container", ["gguf", "gptq"])
def test_score_repeats_what_the_run_measured(compress: Compress, place: Path, container: str) -> None:
    if container == "gguf":
        pytest.importorskip("llama_cpp")
    run = read(place / container)
    found = score(compress, place, place / container / run.artifacts[0].path, "--against", place / "model")
    expected = json.loads(run.to_json())
    (artifact,), (wanted,) = found["artifacts"], expected["artifacts"]
    assert artifact["container"] == container
    for key in ("bytes", "bits_per_weight", "ratio"):
        assert artifact[key] == wanted[key]
    assert artifact["scores"]["text_digest"] == wanted["scores"]["text_digest"]
    assert wanted["texts"] == {"wikipedia": wanted["scores"]}
    assert expected["base"]["texts"] == {"wikipedia": expected["base"]["scores"]}
    for name in ("perplexity", "kld", "top1_agreement", "perplexity_ratio"):
        assert artifact["scores"][name] == pytest.approx(wanted["scores"][name], rel=1e-5)
    assert found["base"]["bytes"] == expected["base"]["bytes"]
    before, base = found["base"]["scores"], expected["base"]["scores"]
    assert before["perplexity"] == pytest.approx(base["perplexity"], rel=1e-5)
    assert before["engine"] == base["engine"] == "original" and before["tokenizer"] == base["tokenizer"]
    assert found["gate"]["passed"] and not found["fallbacks"]


def test_score_against_itself_is_no_divergence(compress: Compress, place: Path) -> None:
    scores = score(compress, place, place / "model", "--against", place / "model")["artifacts"][0]["scores"]
    assert scores["kld"]["mean"] == scores["kld"]["max"] == 0
    assert scores["top1_agreement"]["value"] == scores["perplexity_ratio"]["value"] == 1


def test_score_alone_is_the_perplexity_of_transformers(compress: Compress, place: Path) -> None:
    from transformers import AutoModelForCausalLM

    from compress.text import eval_windows, load_tokenizer

    found = score(compress, place, place / "model")
    assert found["base"]["bytes"] is None and found["base"]["scores"] is None
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    windows = eval_windows("wikipedia", load_tokenizer(place / "model"), windows=2, length=96).tokens
    with torch.inference_mode():
        losses = [float(model(ids[None], labels=ids[None]).loss) for ids in torch.from_numpy(windows).long()]
    scores = found["artifacts"][0]["scores"]
    assert scores["perplexity"]["value"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    assert "kld" not in scores


def test_score_table_without_an_original(compress: Compress, place: Path) -> None:
    code, out, err = compress("score", place / "model", "--suite", place / "suite.yaml", "--quiet")
    assert (code, err) == (0, "")
    assert "perplexity" in out and "share of original" not in out and "ratio to original" not in out


def test_score_without_llama_cpp_says_so(compress: Compress, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import compress.engines.open as target

    real = target.find_spec
    monkeypatch.setattr(target, "find_spec", lambda name: None if name == "llama_cpp" else real(name))
    found = score(compress, place, place / "gguf" / "model-Q4_K_M.gguf", "--against", place / "model")
    assert found["artifacts"][0]["scores"]["engine"] == "decoded weights"
    assert [f["used"] for f in found["fallbacks"]] == ["scored by its decoded weights"]
    run = read(place / "gguf").artifacts[0].scores
    assert run is not None and run.kld is not None
    # llama.cpp rounds activations to 8 bits, so only about the same
    assert found["artifacts"][0]["scores"]["kld"]["mean"] == pytest.approx(run.kld.mean, rel=0.2)


def test_score_of_the_bundled_model_by_name(compress: Compress, place: Path, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    found = score(compress, place, Path("models/tiny-qwen3-moe"))
    assert found["model"] == "models/tiny-qwen3-moe"
    assert found["artifacts"][0]["bits_per_weight"] == pytest.approx(16, rel=0.01)


def test_score_of_a_file_alone_reads_its_own_tokenizer(compress: Compress, place: Path) -> None:
    gguf = place / "gguf" / "model-Q4_K_M.gguf"
    alone = score(compress, place, gguf)["artifacts"][0]["scores"]
    beside = score(compress, place, gguf, "--against", place / "model")["artifacts"][0]["scores"]
    assert "kld" not in alone and alone["perplexity"] == beside["perplexity"]
    assert alone["text_digest"] == beside["text_digest"]


def test_score_of_runs_is_one_table_and_a_scorecard_each(compress: Compress, place: Path, tmp_path: Path) -> None:
    """A run's folder stands for its artifacts; what is written compares as runs do."""
    folders = [place / "gguf", place / "gptq"]
    suite = ["--suite", place / "suite.yaml"]
    code, out, err = compress("score", *folders, "--against", place / "model", *suite, "--output", tmp_path / "cards")
    assert code == 0, err
    files = ["gptq-gptq.json", "model-Q4_K_M.json"]
    assert sorted(file.name for file in (tmp_path / "cards").iterdir()) == files
    assert "model-Q4_K_M" in out and "gptq" in out
    both = [score(compress, place, folder, "--against", place / "model") for folder in folders]
    for file, card in zip(reversed(files), both, strict=True):
        assert read(tmp_path / "cards" / file).artifacts[0].scores == read_scores(card)
    code, listed, err = compress("score", *folders, "--against", place / "model", *suite, "--json")
    assert code == 0 and [card["artifacts"][0]["path"] for card in json.loads(listed)] == [
        card["artifacts"][0]["path"] for card in both
    ]
    code, compared, _ = compress("compare", *sorted((tmp_path / "cards").iterdir()), "--json")
    assert code == 0 and len(json.loads(compared)["rows"]) == 3  # with the original


def test_one_of_several_that_cannot_be_scored_does_not_stop_the_others(
    compress: Compress, place: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    (broken := tmp_path / "broken.gguf").write_bytes((place / "gguf" / "model-Q4_K_M.gguf").read_bytes()[:-64])
    code, out, _ = compress(
        "score", broken, place / "gptq", "--against", place / "model", "--suite", place / "suite.yaml", "--json"
    )
    assert code == GateFailed.exit_code
    lost, found = json.loads(out)
    assert lost["gate"]["passed"] is False and "llama.cpp" in lost["gate"]["checks"][0]["detail"]
    assert found["gate"]["passed"] is True and found["artifacts"][0]["scores"]["kld"]["mean"] > 0


def read_scores(card: dict) -> object:
    return Scorecard.model_validate(card).artifacts[0].scores


def bad_targets(place: Path, folder: Path) -> dict[str, tuple[list[object], str]]:
    """What was asked for, and what the one line must say."""
    gguf, model = place / "gguf" / "model-Q4_K_M.gguf", place / "model"
    (folder / "cut.gguf").write_bytes(gguf.read_bytes()[:4000])
    (folder / "notes.txt").write_text("nothing")
    (folder / "part-00001-of-00002.gguf").write_bytes(gguf.read_bytes())
    other = folder / "hqq"
    other.mkdir()
    for file in model.iterdir():
        (other / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    (other / "config.json").unlink()
    (other / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "hqq"}}))
    against = ["--against", model]
    return {
        "missing": ([folder / "none.gguf", *against], "no GGUF file"),
        "no model": (["nowhere"], "no such model"),
        "truncated": ([folder / "cut.gguf", *against], "llama.cpp cannot load"),
        "folder of files": ([folder, *against], f"give the file: {folder / 'cut.gguf'}"),
        "other file": ([folder / "notes.txt", *against], "neither a GGUF file nor"),
        "lost shard": ([folder / "part-00001-of-00002.gguf", *against], "part-00002-of-00002.gguf is missing"),
        "quantized original": ([gguf, "--against", other], "already quantized (hqq)"),
        "other quantizer": ([other, *against], "already quantized (hqq)"),
        "suite": ([model, "--suite", "quik"], "did you mean 'quick'"),
    }


@pytest.mark.parametrize(
    "case", ["missing", "no model", "truncated", "folder of files", "other file", "lost shard",
             "quantized original", "other quantizer", "suite"],
)  # fmt: skip
def test_score_of_bad_targets(compress: Compress, place: Path, tmp_path: Path, case: str) -> None:
    if case == "truncated":
        pytest.importorskip("llama_cpp")
    given, line = bad_targets(place, tmp_path)[case]
    suite = [] if "--suite" in given else ["--suite", place / "suite.yaml"]
    code, out, err = compress("score", *given, *suite, "--quiet")
    assert code in (1, 2) and out == ""
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    assert line in err


def test_windows_beyond_the_models_limit(compress: Compress, place: Path, tmp_path: Path) -> None:
    (tmp_path / "long.yaml").write_text("{name: long, text: wikipedia, windows: 1, length: 1024}\n")
    code, _, err = compress("score", place / "model", "--suite", tmp_path / "long.yaml", "--quiet")
    assert code == 1 and "1024" in err and "512" in err


def test_scores_that_are_not_finite_fail_the_gate(compress: Compress, place: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    import compress.scoring.divergence as divergence

    monkeypatch.setattr(divergence, "token_nll", lambda logits, targets: np.full(len(logits), 1e4))
    code, out, _ = compress("score", place / "model", "--suite", place / "suite.yaml", "--json")
    assert code == GateFailed.exit_code
    assert json.loads(out)["gate"]["passed"] is False


# --- generate, compare --------------------------------------------------------------------------


def test_generate_is_greedy_and_repeats_the_prompt(compress: Compress, place: Path) -> None:
    llama_cpp = pytest.importorskip("compress.engines.llama_cpp")
    pytest.importorskip("llama_cpp")
    file = place / "gguf" / "model-Q4_K_M.gguf"
    code, out, err = compress("generate", file, "The river", "--tokens", 5)
    assert (code, err) == (0, "")
    assert out.startswith("The river")
    with llama_cpp.LlamaCpp(file) as model:  # one token at a time from the logits
        tokens = list(model.tokenize("The river", special=True))
        start = len(tokens)
        for _ in range(5):
            tokens.append(int(next(iter(model.logits([np.array(tokens)])))[-1].argmax()))
        assert out == f"The river{model.detokenize(tokens[start:])}\n"


@pytest.mark.parametrize(
    ("file", "prompt", "line"), [("none.gguf", "hello", "no GGUF file"), ("gguf.gguf", "", "empty")]
)
def test_generate_refuses(compress: Compress, place: Path, file: str, prompt: str, line: str) -> None:
    pytest.importorskip("llama_cpp")
    code, out, err = compress("generate", place / "gguf" / file, prompt)
    assert (code, out) == (2 if file == "none.gguf" else 1, "") and len(err.splitlines()) == 1 and line in err


@pytest.mark.parametrize(
    "arguments",
    [("score", "none.gguf"), ("chat", "none.gguf"), ("compare", "nowhere"), ("verify", "nowhere"), ("advise", "nowhere"),
     ("score", "tiny-qwen3-moe", "--suite", "nowhere"), ("plan", "Q4_K_M", "--model", "tiny-qwen3-moe", "--set", "suite=nowhere"),
     ("plan", "Q4_K_M", "--model", "tiny-qwen3-moe", "--set", "dataset=nowhere"), ("plan", "nowhere"),
     ("plan", "Q4_K_M", "--model", "tiny-qwen3-moe", "--device", "gpu")],
)  # fmt: skip
def test_what_is_not_there_cannot_work(compress: Compress, arguments: tuple[str, ...]) -> None:
    """Files, names and options alike: exit code 2, as the README says."""
    code, out, err = compress(*arguments)
    assert (code, out) == (2, "") and "Traceback" not in err and arguments[-1].split("=")[-1] in err


def test_compare_shows_every_run(compress: Compress, place: Path) -> None:
    code, out, err = compress("compare", place / "gguf", place / "gptq" / "scorecard.json")
    assert (code, err) == (0, "")
    assert "gguf" in out and "gptq" in out and "original" in out
    code, out, err = compress("compare", place / "gguf", place / "gptq", "--markdown")
    assert (code, err) == (0, "")
    assert sum(line.startswith("|") for line in out.splitlines()) == 2 + 2 + 1


def test_compare_takes_scores_of_a_lone_model(compress: Compress, place: Path, tmp_path: Path) -> None:
    (tmp_path / "scorecard.json").write_text(json.dumps(score(compress, place, place / "model")))
    code, out, _ = compress("compare", tmp_path, place / "gguf")
    assert code == 0 and "safetensors" in out


def test_compare_writes_what_it_is_asked_for(compress: Compress, place: Path, tmp_path: Path) -> None:
    runs = (f"Four bits={place / 'gguf'}", place / "gptq")
    code, out, err = compress(
        "compare", *runs, "--md", tmp_path / "t.md", "--csv", tmp_path / "t.csv", "--memory", "1GB"
    )
    assert code == 0 and "Four bits" in out and "Within 1GB of file size" in out
    assert err.splitlines() == [f"wrote {tmp_path / 't.md'}", f"wrote {tmp_path / 't.csv'}"]
    assert compress("compare", *runs, "--memory", "1GB", "--md", "-") == (0, (tmp_path / "t.md").read_text(), "")
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 1 + 3
    code, out, err = compress("compare", *runs, "--json")
    assert (code, err) == (0, "") and json.loads(out)["rows"][0]["name"] == "original"


def test_compare_skips_runs_that_are_not_finished(compress: Compress, place: Path, tmp_path: Path) -> None:
    (tmp_path / "begun" / ".work").mkdir(parents=True)
    code, out, err = compress("compare", place / "gguf", tmp_path / "begun")
    assert code == 0 and "gguf" in out
    assert err == f"skipped: {tmp_path / 'begun'} holds an unfinished run\n"
    code, out, err = compress("compare", tmp_path / "begun")
    assert (code, out) == (1, "") and err.startswith("error: ") and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--memory", "much"], 2, "expected a size like 4GB"),
        (["--memory", "0GB"], 2, "expected a size like 4GB"),
        (["--json", "--csv", "-"], 2, "only one"),
        (["--picture", "-"], 1, "ends in .png or .svg"),
        (["--md", "no/such/folder/t.md"], 1, "cannot write"),
    ],
)
def test_compare_refuses_options(compress: Compress, place: Path, arguments: list[str], code: int, line: str) -> None:
    found, _, err = compress("compare", place / "gguf", place / "gptq", *arguments)
    assert found == code and line in err


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model": 1}', '{"format": 99}'])
def test_compare_refuses(compress: Compress, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "scorecard.json").write_text(content)
    code, out, err = compress("compare", tmp_path)
    assert (code, out) == (1, "") and err.startswith("error: ") and len(err.splitlines()) == 1
