"""compress publish, with the hub's real client against a hub on loopback: what arrives is what was delivered, opens and scores
the same; what breaks off goes on; what should stay here stays here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compress.errors import CheckpointError
from compress.publish.package import packaged
from compress.report.checksums import verify
from compress.report.progress import Reporter
from compress.report.scorecard import OWN_FILES, read, write
from compress.run.score import Settings, score_targets
from tests.hub_server import TOKEN, Hub, hub_on_loopback
from tests.integration.runs import Compress, carry_out, sha256, small
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
model: nowhere
steps:
  - quantize: {{solver: rtn, scheme: {scheme}}}
export: [{{container: {container}}}]
"""
CARD = "---\nlicense: mit\ntags: [gguf]\n---\n# Tiny\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a licence and a card, a suite of two short windows, and runs of it to a GGUF and to a folder."""
    place = tmp_path_factory.mktemp("publish")
    model = tiny_model("llama", place / "model", hidden_size=128, intermediate_size=128, dtype="bfloat16")
    (model / "README.md").write_text("---\nlicense: mit\n---\n# The original\n")
    (model / "LICENSE").write_text("MIT, and so on\n")
    (place / "suite.yaml").write_text("{name: two, text: wikipedia, windows: 2, length: 96}\n")
    for container, scheme in (("gguf", "Q4_K_M"), ("compress", "Q4_K_M")):
        (place / f"{container}.yaml").write_text(RECIPE.format(container=container, scheme=scheme))
        carry_out(
            small(place / f"{container}.yaml", model, place / container, f"score={{suite: {place / 'suite.yaml'}}}")
        )
    return place


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a run with a model card."""

    def copied(container: str) -> Path:
        folder = tmp_path / container
        shutil.copytree(place / container, folder)
        (folder / "README.md").write_text(CARD)
        return folder

    return copied


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that the client of this process talks to, with a token that it knows; nothing waits before it tries again."""
    from huggingface_hub.utils import close_session

    with hub_on_loopback() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
        monkeypatch.setattr("compress.publish.hub.PAUSES", (0.0, 0.0))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        yield hub
        close_session()


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """Of a process of its own that talks to a hub."""
    told = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "NO_PROXY": "127.0.0.1",
    }
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **told, **more}


def fetched(repo: str, folder: Path, revision: str | None = None) -> Path:
    """A snapshot as the client makes one: links to blobs."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, revision=revision, cache_dir=folder / "cache"))


def files(folder: Path) -> dict[str, str]:
    """sha256 by path of all files in a folder, but the hub's own."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: sha256(path) for name, path in found.items() if name != ".gitattributes"}


def own(folder: Path) -> dict[str, str]:
    """Those of them that tell of the run."""
    return {name: found for name, found in files(folder).items() if name in OWN_FILES}


def one_line(err: str) -> str:
    """The only line of an error."""
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err and err.rstrip().endswith(line)
    return line


# --- there and back -----------------------------------------------------------------------------


def test_a_gguf_arrives_as_it_was_delivered(
    compress: Compress, hub: Hub, run: Any, place: Path, tmp_path: Path
) -> None:
    folder = run("gguf")
    (folder / "calibration.txt").write_text("secret")  # whatever else lies there is nobody's business
    (folder / "scratch").mkdir()
    (folder / "scratch" / "x.gguf").write_bytes(b"GGUF")
    code, out, err = compress("publish", folder, "me/tiny")
    assert (code, out) == (0, f"{hub.url}/me/tiny\n") and "Traceback" not in err
    there = fetched("me/tiny", tmp_path)
    names = {"model-Q4_K_M.gguf", "LICENSE", "README-original.md", *own(folder)}
    assert set(files(there)) == names >= {"README.md", "scorecard.json", "recipe.json", "tensors.jsonl"}
    assert files(there) == {name: found for name, found in files(folder).items() if name in names}
    assert set(verify(there).values()) == {"ok"}
    card = read(folder)
    (scored,) = score_targets([str(there)], str(place / "model"), Settings(str(place / "suite.yaml")), Reporter(0))
    assert scored.artifacts[0].scores == card.artifacts[0].scores
    assert scored.artifacts[0].bytes == card.artifacts[0].bytes
    repo = hub.repos["me/tiny"]
    assert not repo.private and len(repo.commits) == 2, "the hub's own first commit, and ours"
    assert repo.messages[-1].startswith("gguf of model, by compress ")
    assert repo.files()["model-Q4_K_M.gguf"].lfs and not repo.files()["README.md"].lfs


OPEN = """
import compress, torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("me/tiny"), AutoTokenizer.from_pretrained("me/tiny")
with torch.no_grad():
    logits = model(torch.tensor([tokenizer("The house").input_ids])).logits
assert torch.isfinite(logits).all()
print(snapshot_download("me/tiny"))
"""


def test_a_folder_is_the_repository(hub: Hub, run: Any, place: Path, tmp_path: Path) -> None:
    """In processes of their own, as people do it: HF_ENDPOINT says where, the repository's id is the model's name."""
    folder, home = run("compress"), tmp_path / "home"
    publish = [sys.executable, "-m", "compress.cli", "publish", str(folder), "me/tiny", "--quiet", "--private"]
    done = subprocess.run(publish, capture_output=True, text=True, env=environment(hub, home), cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{hub.url}/me/tiny\n", "")
    assert hub.repos["me/tiny"].private
    done = subprocess.run([sys.executable, "-c", OPEN], capture_output=True, text=True, env=environment(hub, home))
    assert done.returncode == 0, done.stderr
    there, inside = Path(done.stdout.strip()), folder / "compress-compress"
    wanted, found = {**files(inside), **own(folder)}, files(there)
    assert found.pop("scorecard.json") != wanted.pop("scorecard.json"), "its paths are those of the repository"
    assert found == wanted
    shipped = {name: found for name, found in files(inside).items() if name != "README.md"}
    assert verify(there) == dict.fromkeys(shipped, "ok")
    ours, card = read(folder), read(there)
    (mine,), (theirs,) = ours.artifacts, card.artifacts
    assert theirs.path == "." and theirs.files == shipped
    same = {"path", "files", "sha256"}
    assert theirs.model_dump(exclude=same) == mine.model_dump(exclude=same)
    assert card.model_dump(exclude={"artifacts"}) == ours.model_dump(exclude={"artifacts"})
    (scored,) = score_targets([str(there)], str(place / "model"), Settings(str(place / "suite.yaml")), Reporter(0))
    assert scored.artifacts[0].scores == mine.scores
    assert scored.artifacts[0].bytes == sum((there / name).stat().st_size for name in shipped)
    with (there / "config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(CheckpointError, match="config.json has changed since it was delivered"):
        score_targets([str(there)], None, Settings(str(place / "suite.yaml")), Reporter(0))


def test_the_second_time_there_is_nothing_to_do_and_then_only_what_changed(
    compress: Compress, hub: Hub, run: Any
) -> None:
    folder = run("gguf")
    assert compress("publish", folder, "me/tiny")[0] == 0
    head = hub.repos["me/tiny"].branches["main"]
    hub.forget()
    code, out, err = compress("publish", folder, "me/tiny")
    assert (code, out) == (0, f"{hub.url}/me/tiny\n") and "already published" in err
    assert not hub.puts and not [line for line in hub.requests if line.startswith("POST")]
    assert hub.repos["me/tiny"].branches["main"] == head
    (folder / "README.md").write_text(CARD + "More.\n")
    code, out, _ = compress("publish", folder, "me/tiny", "--json", "--message", "a better card")
    told = json.loads(out)
    assert code == 0 and told["sent"] == ["README.md"] and not hub.puts
    assert told["commit"] == hub.repos["me/tiny"].branches["main"] != head
    assert hub.repos["me/tiny"].messages[-1] == "a better card"


def test_what_others_put_there_stays_and_is_named(compress: Compress, hub: Hub, run: Any, place: Path) -> None:
    assert compress("publish", run("compress"), "me/tiny")[0] == 0
    code, _, err = compress("publish", run("gguf"), "me/tiny")
    assert code == 0 and "more files of me/tiny are not this run's and stay: chat_template.jinja, " in err
    assert {"config.json", "model.safetensors", "model-Q4_K_M.gguf"} <= set(hub.repos["me/tiny"].files())


def test_a_branch_is_made_and_the_main_one_left_alone(compress: Compress, hub: Hub, run: Any, tmp_path: Path) -> None:
    folder = run("gguf")
    code, out, _ = compress("publish", folder, "me/tiny", "--revision", "v2")
    assert (code, out) == (0, f"{hub.url}/me/tiny/tree/v2\n")
    repo = hub.repos["me/tiny"]
    assert set(repo.files("main")) == {".gitattributes"} and "model-Q4_K_M.gguf" in repo.files("v2")
    assert set(verify(fetched("me/tiny", tmp_path, "v2")).values()) == {"ok"}
    assert "already published" in compress("publish", folder, "me/tiny", "--revision", "v2")[2]


def test_the_runs_card_is_of_the_repository(
    compress: Compress, hub: Hub, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says what people are to type; and the run can be carried out again from what lies there."""
    folder = place / "compress"
    assert compress("publish", folder, "me/tiny")[0] == 0
    there = fetched("me/tiny", tmp_path)
    here, card = (folder / "README.md").read_text(), (there / "README.md").read_text()
    assert "me/tiny" not in here and 'from_pretrained("me/tiny")' in card and "compress-compress" not in card
    assert "compress reproduce me/tiny" in card
    assert set(verify(there).values()) == {"ok"}
    told = json.loads(compress("publish", folder, "me/tiny", "--json")[1])
    assert told["sent"] == []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    lies = ["--model", place / "model", "--set", f"calibration.dataset={place / 'calibration.txt'}"]
    code, out, err = compress("reproduce", "me/tiny", *lies, "--output", tmp_path / "again", "--json")
    assert code == 0 and json.loads(out)["same"], err


# --- what breaks --------------------------------------------------------------------------------


def two_ggufs(folder: Path) -> Path:
    """A run of two GGUF files, the second of which is the first with other bytes at its end."""
    card = read(folder)
    (first,) = card.artifacts
    other = folder / "other.gguf"
    other.write_bytes((folder / first.path).read_bytes() + bytes(range(256)) * 4096)
    update = {"path": other.name, "files": {other.name: sha256(other)}, "sha256": sha256(other), "scores": None}
    write(card.model_copy(update={"artifacts": (first, first.model_copy(update=update))}), folder)
    return folder


def test_a_connection_that_breaks_once_is_tried_again(compress: Compress, hub: Hub, run: Any, tmp_path: Path) -> None:
    folder = two_ggufs(run("gguf"))
    hub.cut = {1: 300_000}
    hub.answers = [("/tree/", 503), ("/commit/", 429)]
    code, out, err = compress("publish", folder, "me/tiny")
    assert (code, out) == (0, f"{hub.url}/me/tiny\n")
    assert "the hub answered 503; trying again" in err and "the hub answered 429; trying again" in err
    objects = list(folder.glob("*.gguf"))
    assert len(hub.puts) == 3 and hub.received == sum(file.stat().st_size for file in objects)
    assert len(hub.repos["me/tiny"].commits) == 2
    assert set(verify(fetched("me/tiny", tmp_path)).values()) == {"ok"}


def test_a_connection_that_stays_broken_is_one_error_and_the_same_command_continues(
    compress: Compress, hub: Hub, run: Any, tmp_path: Path
) -> None:
    folder = two_ggufs(run("gguf"))
    first, second = sha256(folder / "model-Q4_K_M.gguf"), sha256(folder / "other.gguf")
    hub.cut, hub.every = {0: 1 << 40}, 300_000  # the first file arrives, then nothing
    code, out, err = compress("publish", folder, "me/tiny")
    assert (code, out) == (1, "")
    assert "the same command continues" in one_line(err)
    assert hub.puts[0] == first and set(hub.puts[1:]) == {second} and set(hub.objects) == {first}
    assert set(hub.repos["me/tiny"].files()) == {".gitattributes"}, "nothing of it is to be seen"
    hub.every = None
    hub.forget()
    assert compress("publish", folder, "me/tiny")[:2] == (0, f"{hub.url}/me/tiny\n")
    assert hub.puts == [second] and hub.received == (folder / "other.gguf").stat().st_size
    assert set(verify(fetched("me/tiny", tmp_path)).values()) == {"ok"}


def test_a_process_that_is_stopped_in_the_middle_continues(hub: Hub, run: Any, tmp_path: Path) -> None:
    folder = two_ggufs(run("gguf"))
    publish = [sys.executable, "-m", "compress.cli", "publish", str(folder), "me/tiny"]
    hub.stall = 1
    with subprocess.Popen(
        publish, stderr=subprocess.PIPE, text=True, env=environment(hub, tmp_path), cwd=ROOT
    ) as process:
        assert hub.stalled.wait(60)
        process.terminate()
        assert process.stderr is not None
        last = process.stderr.readlines()[-1]
    hub.freed.set()
    assert process.returncode == 143 and "the same command continues" in last
    assert set(hub.repos["me/tiny"].files()) == {".gitattributes"} and len(hub.objects) == 1
    hub.stall = None
    hub.forget()
    done = subprocess.run(publish, capture_output=True, text=True, env=environment(hub, tmp_path), cwd=ROOT)
    assert done.returncode == 0 and hub.puts == [sha256(folder / "other.gguf")]


def test_a_hub_that_falls_silent_is_asked_again(
    compress: Compress, hub: Hub, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.publish.hub.PATIENCE", (5.0, 0.5, 0.5, 5.0))
    hub.stall = 0
    assert compress("publish", run("gguf"), "me/tiny")[0] == 0
    hub.freed.set()
    assert len(hub.puts) == 2 and "model-Q4_K_M.gguf" in hub.repos["me/tiny"].files()


def test_a_commit_whose_answer_is_lost_is_not_made_twice(compress: Compress, hub: Hub, run: Any) -> None:
    hub.lost, hub.warnings = "/commit/", ("no such licence",)
    code, out, err = compress("publish", run("gguf"), "me/tiny")
    assert (code, out) == (0, f"{hub.url}/me/tiny\n") and "trying again" in err
    assert len(hub.repos["me/tiny"].commits) == 2 and len(hub.puts) == 1
    assert "note: Warnings while validating metadata in README.md: - no such licence" in err


def test_large_files_in_parts(compress: Compress, hub: Hub, run: Any, tmp_path: Path) -> None:
    hub.part_size, hub.cut = 500_000, {1: 100_000}
    assert compress("publish", run("gguf"), "me/tiny")[0] == 0
    assert len(hub.puts) == 4, "three parts, one of them twice"
    assert set(verify(fetched("me/tiny", tmp_path)).values()) == {"ok"}


@pytest.mark.parametrize("token", ["", "hf_wrong"])
def test_nobody_in_particular_publishes_nothing(
    compress: Compress, hub: Hub, run: Any, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    code, out, err = compress("publish", run("gguf"), "me/tiny")
    line = one_line(err)
    assert (code, out) == (1, "") and "(401)" in line and "hf auth login" in line and "HF_TOKEN" in line
    assert not hub.repos and not hub.puts and (not token or token not in err)


def test_who_may_not_write_is_told(compress: Compress, hub: Hub, run: Any) -> None:
    hub.forbidden = True
    code, _, err = compress("publish", run("gguf"), "them/tiny")
    assert code == 1 and "does not let you write to them/tiny (403)" in one_line(err)


def test_a_hub_that_is_not_there_and_one_that_is_not_asked(
    compress: Compress, hub: Hub, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run("gguf")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    code, _, err = compress("publish", folder, "me/tiny")
    assert code == 1 and "http://127.0.0.1:1: the connection to the hub broke off" in one_line(err)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = compress("publish", folder, "me/tiny")
    assert code == 1 and "HF_HUB_OFFLINE is set" in one_line(err)


def test_a_public_repository_does_not_get_what_is_private(compress: Compress, hub: Hub, run: Any) -> None:
    folder = run("gguf")
    assert compress("publish", folder, "me/tiny")[0] == 0
    hub.forget()
    code, _, err = compress("publish", folder, "me/tiny", "--private", "--revision", "secret")
    assert code == 1 and "me/tiny is there already, and public" in one_line(err)
    assert not [line for line in hub.requests if line.startswith(("POST", "PUT"))]


def test_what_the_repository_ignores_is_missed(compress: Compress, hub: Hub, run: Any) -> None:
    hub.ignored = ("tensors.jsonl",)
    code, _, err = compress("publish", run("gguf"), "me/tiny")
    assert code == 1 and "tensors.jsonl is not in commit" in one_line(err) and ".gitignore" in err


def test_where_the_hub_speaks_xet_files_go_by_their_paths(hub: Hub, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own part of it cannot be had on loopback."""
    from huggingface_hub import HfApi

    from compress.publish import hub as talk

    pytest.importorskip("hf_xet")
    given: list[Any] = []
    monkeypatch.setattr(HfApi, "preupload_lfs_files", lambda self, repo, additions, **options: given.extend(additions))
    monkeypatch.setattr(HfApi, "create_commit", lambda self, *arguments, **options: pytest.fail("not yet"))
    hub.answers = [("xet-write-token", 200)]
    package = packaged(run("gguf"))
    with pytest.raises(pytest.fail.Exception, match="not yet"):
        talk.publish(package.uploads, talk.Destination("me/tiny"), "m", Reporter(0))
    assert [addition.path_or_fileobj for addition in given] == [str(package.folder / "model-Q4_K_M.gguf")]


# --- what is not published ----------------------------------------------------------------------


def test_a_dry_run_asks_nobody(compress: Compress, hub: Hub, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    folder = run("compress")
    code, out, err = compress("publish", folder, "me/tiny", "--dry-run", "--private", "--revision", "v2")
    assert (code, err) == (0, "")
    for told in ("me/tiny (private)", "v2", "model.safetensors", "tags: [gguf]", "Nothing was sent"):
        assert told in out
    told = json.loads(compress("publish", folder, "me/tiny", "--dry-run", "--json")[1])
    assert {file["name"] for file in told["files"]} == {*files(folder / "compress-compress"), *own(folder)}
    assert told["bytes"] == sum(file["bytes"] for file in told["files"])
    assert told["front_matter"] == "license: mit\ntags: [gguf]\n" and told["revision"] == "main"
    assert hub.requests == [] and str(folder) not in out


def failed(folder: Path) -> None:
    card = read(folder)
    checks = tuple(check.model_copy(update={"passed": False}) for check in card.gate.checks[:1])
    gate = card.gate.model_copy(update={"passed": False, "checks": checks})
    write(card.model_copy(update={"gate": gate}), folder)


def changed(folder: Path) -> None:
    with (folder / "model-Q4_K_M.gguf").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


def unfinished(folder: Path) -> None:
    (folder / "scorecard.json").unlink()
    (folder / ".work").mkdir()


def empty(folder: Path) -> None:
    (folder / "scorecard.json").unlink()


def at_home(folder: Path) -> None:
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["calibration"]["dataset"] = f"{os.environ['HOME']}/texts/private.txt"
    (folder / "recipe.json").write_text(json.dumps(recipe))


def elsewhere(folder: Path) -> None:
    """A path that is neither the user's nor the run's, but is one of this machine."""
    model = folder.parent / "somewhere" / "original"
    model.mkdir(parents=True)
    (folder / "README.md").write_text(f"---\nbase_model: {model}\n---\n# Tiny\n")


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [(failed, 3, "did not pass its gate"), (changed, 1, "model-Q4_K_M.gguf has changed since it was delivered"),
     (unfinished, 2, "holds an unfinished run"), (empty, 2, "holds no scorecard.json"),
     (at_home, 1, "recipe.json holds a path of this machine: {home}/texts/private.txt"),
     (elsewhere, 1, "README.md holds a path of this machine: {place}/somewhere/original")],
)  # fmt: skip
def test_what_is_not_fit_is_refused_before_anybody_is_asked(
    compress: Compress, hub: Hub, run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    spoil: Callable[[Path], None], code: int, words: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = run("gguf")
    spoil(folder)
    for more in ((), ("--dry-run",)):
        found, out, err = compress("publish", folder, "me/tiny", *more)
        assert (found, out) == (code, "")
        assert words.format(home=tmp_path / "home", place=tmp_path) in one_line(err)
    assert hub.requests == []


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "me/ti ny", "me/a--b", "me/tiny.git", "../x"])
def test_what_is_no_repository(compress: Compress, hub: Hub, run: Any, repo: str) -> None:
    code, out, err = compress("publish", run("gguf"), repo)
    assert (code, out) == (2, "") and repo in one_line(err) and "owner/name" in err
    assert hub.requests == []
