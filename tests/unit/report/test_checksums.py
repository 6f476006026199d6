"""What was delivered is told from what lies there now: per file, for a whole run, an artifact, or one file of it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from compress.errors import CheckpointError, CompressError
from compress.report.checksums import checksums, combined, require_unchanged, verify
from compress.report.scorecard import Artifact, Base, Gate, Scorecard, read, write

FOLDER = ("r-gptq/config.json", "r-gptq/model.safetensors", "r-gptq/sub/extra.txt")
SHARDS = ("r-00001-of-00002.gguf", "r-00002-of-00002.gguf")


def artifact(path: str, files: dict[str, str]) -> Artifact:
    return Artifact(
        container="x", path=path, bytes=1, bits_per_weight=4, sha256=combined(files) if files else None, files=files
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A finished run's folder: an artifact that is a folder, one of two files, and what a run leaves beside them."""
    out = tmp_path / "out"
    for name in (*FOLDER, *SHARDS, ".work/journal.json", "recipe.json", "tensors.jsonl"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(f"content of {name}")
    artifacts = (
        artifact("r-gptq", checksums([out / "r-gptq"], out)),
        artifact(SHARDS[0], checksums([out / name for name in SHARDS], out)),
    )
    write(Scorecard(model="m", recipe="r", artifacts=artifacts, base=Base(bytes=1), gate=Gate(passed=True)), out)
    return out


def test_checksums_are_what_sha256sum_prints(out: Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum")
    for made in read(out).artifacts:
        listed = subprocess.run(["sha256sum", *sorted(made.files)], cwd=out, capture_output=True, check=True).stdout
        assert {line.split()[1]: line.split()[0] for line in listed.decode().splitlines()} == made.files
        assert made.sha256 == hashlib.sha256(listed).hexdigest()
    one = checksums([out / FOLDER[0]], out)
    assert combined(one) == hashlib.sha256((out / FOLDER[0]).read_bytes()).hexdigest()


def test_every_kind_of_difference_is_told(out: Path) -> None:
    everything = dict.fromkeys((*FOLDER, *SHARDS), "ok")
    assert verify(out) == verify(out / "scorecard.json") == everything
    data = bytearray((out / FOLDER[1]).read_bytes())
    data[3] ^= 1
    (out / FOLDER[1]).write_bytes(data)
    (out / SHARDS[1]).unlink()
    (out / "r-gptq" / "new.bin").write_text("")
    (out / "stray").symlink_to(out / "nowhere")
    assert verify(out) == everything | {
        FOLDER[1]: "changed", SHARDS[1]: "missing", "r-gptq/new.bin": "unexpected", "stray": "unexpected"
    }  # fmt: skip


@pytest.mark.parametrize("target", ["r-gptq", "r-gptq/", "r-gptq/model.safetensors", SHARDS[0], SHARDS[1]])
def test_an_artifact_alone(out: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (out / "elsewhere").write_text("")  # none of the artifact's
    wanted = FOLDER if target.startswith("r-gptq") else SHARDS
    monkeypatch.chdir(out)
    assert verify(out / target) == verify(target) == dict.fromkeys(wanted, "ok")
    require_unchanged(target)
    (out / wanted[-1]).write_text("other")
    assert verify(target) == {**dict.fromkeys(wanted, "ok"), wanted[-1]: "changed"}
    with pytest.raises(CheckpointError, match=f"{wanted[-1]} has changed since it was delivered"):
        require_unchanged(target)


@pytest.mark.parametrize(
    ("target", "message"),
    [("nothing", "there is no"), ("alone", "no scorecard.json in or above"), ("old", "holds no checksums"),
     ("ruined", "not valid JSON"), ("outside", "is not in the scorecard's folder")],
)  # fmt: skip
def test_without_a_scorecard_that_can_be_compared_with(out: Path, target: str, message: str) -> None:
    for name in ("alone", "old", "ruined", "outside"):
        (out.parent / name).mkdir()
    write(read(out).model_copy(update={"artifacts": (artifact("a.gguf", {}),)}), out.parent / "old")
    (out.parent / "old" / "a.gguf").write_text("")
    (out.parent / "ruined" / "scorecard.json").write_text("{")
    card = (out / "scorecard.json").read_text()
    (out.parent / "outside" / "scorecard.json").write_text(card.replace("r-gptq/config.json", "../secret"))
    with pytest.raises(CompressError, match=message) as caught:
        verify(out.parent / target)
    assert "\n" not in str(caught.value)
    assert read(out.parent / "old").artifacts[0].sha256 is None  # and tables still show such a card


def test_what_no_scorecard_names_is_not_compared(out: Path) -> None:
    """A note says so where there is a scorecard that might have been one to compare with."""
    moved = out.parent / "moved"
    shutil.move(out / "r-gptq", moved)
    (moved / "config.json").write_text("other")
    assert require_unchanged(moved) is None and require_unchanged("org/model") is None
    (out.parent / "scorecard.json").write_text("{")
    assert "not valid JSON" in (require_unchanged(moved) or "")
