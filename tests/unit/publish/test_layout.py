"""Where the files of a run go in a repository, and that its scorecard stays true there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from compress.errors import CheckpointError, CompressError, GateFailed, PublishError
from compress.publish.layout import arranged, as_arranged
from compress.publish.package import Package, packaged
from compress.report.checksums import checksums, combined, files_at_the_top, verify
from compress.report.scorecard import OWN_FILES, Artifact, Base, Gate, Scorecard, read, write

REPRODUCE = '{"recipe": {}, "original": {"name": "m"}, "files": {}}'
FOLDER = ("config.json", "model.safetensors", "LICENSE", "additional_chat_templates/x.jinja")


def made(out: Path, *artifacts: str, beside: tuple[str, ...] = (), own: tuple[str, ...] = ()) -> Scorecard:
    """A run's folder with these artifacts: folders, or single files with a licence beside them."""
    cards = []
    for path in artifacts:
        names = [path, "LICENSE"] if "." in path else [f"{path}/{name}" for name in FOLDER]
        for name in names:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text("licence" if name.endswith("LICENSE") else f"content of {name}")
        files = checksums([out / name for name in names], out)
        cards.append(
            Artifact(container="x", path=path, bytes=1, bits_per_weight=4, files=files, sha256=combined(files))
        )
    for name in (*beside, *own):
        (out / name).write_text(REPRODUCE if name == "reproduce.json" else f"content of {name}")
    sums = checksums([out / name for name in beside], out)
    card = Scorecard(
        model="m", recipe="r", artifacts=tuple(cards), base=Base(bytes=1), gate=Gate(passed=True), beside=sums
    )
    write(card, out)
    return card


def sent(package: Package, folder: Path) -> Path:
    """The repository, as its files say."""
    for upload in package.uploads:
        (folder / upload.name).parent.mkdir(parents=True, exist_ok=True)
        (folder / upload.name).write_bytes(upload.read())
        assert upload.size == (folder / upload.name).stat().st_size
        assert checksums([folder / upload.name], folder) == {upload.name: upload.sha256}
    return folder


def test_single_files_keep_their_names(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(out, "m-Q4.gguf", "m-Q8.gguf", beside=("m-imatrix.gguf",), own=("README.md", "recipe.json", "reproduce.json"))
    (out / "calibration.txt").write_text("text")
    package = packaged(out)
    names = ["LICENSE", "README.md", "m-Q4.gguf", "m-Q8.gguf", "m-imatrix.gguf", "recipe.json", "reproduce.json",
             "scorecard.json"]  # fmt: skip
    assert [upload.name for upload in package.uploads] == names
    assert all(upload.data is None and upload.path == out / upload.name for upload in package.uploads)
    there = sent(package, tmp_path / "there")
    files = {"LICENSE", "m-Q4.gguf", "m-Q8.gguf", "m-imatrix.gguf"}
    assert verify(out) == {**dict.fromkeys(files, "ok"), "calibration.txt": "unexpected"}
    assert verify(there) == dict.fromkeys(files, "ok")
    (there / "m-imatrix.gguf").write_text("other")
    assert verify(there)["m-imatrix.gguf"] == "changed"


def test_the_only_folder_is_the_repository(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(out, "r-gptq", "m-Q4.gguf", own=OWN_FILES[1:])
    (out / "r-gptq" / "README.md").write_text("of the folder")
    package = packaged(out)
    places = {upload.name: upload.path.relative_to(out).as_posix() for upload in package.uploads}
    assert places == {
        **{name: f"r-gptq/{name}" for name in FOLDER}, "m-Q4.gguf": "m-Q4.gguf", "LICENSE": places["LICENSE"],
        **{name: name for name in OWN_FILES},
    }  # fmt: skip
    there = sent(package, tmp_path / "there")
    assert verify(there) == dict.fromkeys((*FOLDER, "m-Q4.gguf"), "ok")
    assert sorted(files_at_the_top(there)) == sorted(FOLDER) and files_at_the_top(out) == ()
    top, single = read(there).artifacts
    assert (top.path, single.path) == (".", "m-Q4.gguf") and top.sha256 == combined(top.files)
    assert single == read(out).artifacts[1]


def test_without_a_card_of_the_run_the_folder_has_its_own(tmp_path: Path) -> None:
    made(tmp_path, "r-gptq")
    (tmp_path / "r-gptq" / "README.md").write_text("---\nlicense: mit\n---\nof the folder")
    package = packaged(tmp_path)
    assert {upload.name: upload.path for upload in package.uploads}["README.md"] == tmp_path / "r-gptq" / "README.md"
    assert package.front_matter == "license: mit\n"


def test_a_card_that_was_delivered_gives_way_to_the_runs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(out, "r-own")
    (out / "r-own" / "README.md").write_text("of the folder")
    files = checksums([out / "r-own"], out)
    card = read(out)
    write(card.model_copy(update={"artifacts": (card.artifacts[0].model_copy(update={"files": files}),)}), out)
    assert "README.md" in verify(sent(packaged(out), tmp_path / "alone"))
    (out / "README.md").write_text("of the run")
    there = sent(packaged(out), tmp_path / "there")
    assert (there / "README.md").read_text() == "of the run"
    assert verify(there) == dict.fromkeys(FOLDER, "ok")


def test_several_folders_stay_folders(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(out, "r-gptq", "r-awq", own=("README.md",))
    (out / "r-awq" / "README.md").write_text("of the folder")
    package = packaged(out)
    names = {f"{folder}/{name}" for folder in ("r-gptq", "r-awq") for name in FOLDER}
    assert {upload.name for upload in package.uploads} == {*names, "r-awq/README.md", "README.md", "scorecard.json"}
    assert verify(sent(package, tmp_path / "there")) == dict.fromkeys(names, "ok") == verify(out)


def test_names_that_clash_keep_the_folder_a_folder(tmp_path: Path) -> None:
    card = made(tmp_path, "r-gptq", "m.gguf")
    (tmp_path / "LICENSE").write_text("another licence")
    other = card.artifacts[1].model_copy(
        update={"files": checksums([tmp_path / "m.gguf", tmp_path / "LICENSE"], tmp_path)}
    )
    card = card.model_copy(update={"artifacts": (card.artifacts[0], other)})
    places = arranged(card, ["scorecard.json"])
    assert all(source == name for source, name in places.items())
    assert as_arranged(card, places) is card


# --- what is not packed -------------------------------------------------------------------------


def test_a_scorecard_that_lies(tmp_path: Path) -> None:
    out = tmp_path / "out"
    card = made(out, "r-gptq", beside=("x.dat",))
    (tmp_path / "secret").write_text("secret")
    raw = (out / "scorecard.json").read_text()
    for there, here, words in (
        ("r-gptq/config.json", "../secret", "is not in the scorecard's folder"),
        ('"x.dat"', '"../secret"', "is not in the scorecard's folder"),
        ("r-gptq/config.json", "calibration.txt", "calibration.txt is not in r-gptq"),
    ):
        assert there in raw
        (out / "scorecard.json").write_text(raw.replace(there, here))
        with pytest.raises(CompressError, match=words):
            packaged(out)
    write(card.model_copy(update={"artifacts": ()}), out)
    with pytest.raises(CompressError, match="has no checksums"):
        packaged(out)


def test_what_lies_beside_is_held_against_its_checksum(tmp_path: Path) -> None:
    made(tmp_path, "m.gguf", beside=("x.dat",))
    (tmp_path / "x.dat").unlink()
    with pytest.raises(CheckpointError, match="x.dat is missing since it was delivered"):
        packaged(tmp_path)


def test_what_was_rejected_stays(tmp_path: Path) -> None:
    card = made(tmp_path, "m.gguf")
    rejected = card.artifacts[0].model_copy(update={"delivered": False})
    write(card.model_copy(update={"artifacts": (rejected,)}), tmp_path)
    with pytest.raises(GateFailed, match="only what has passed is published"):
        packaged(tmp_path)


def test_paths_in_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are searched at their head only; of the original's own card nothing can be new where it came from a hub."""
    out = tmp_path / "out"
    for name in ("m.gguf", "x.dat", "tensors.jsonl"):
        shutil.rmtree(out, ignore_errors=True)
        made(out, "m.gguf", beside=("x.dat",), own=("tensors.jsonl",))
        (out / name).write_bytes(b"\0\1" + str(out.resolve()).encode() + b"/model\0")
        card = read(out)
        files = checksums([out / "m.gguf", out / "LICENSE"], out)
        update = {"artifacts": (card.artifacts[0].model_copy(update={"files": files}),),
                  "beside": checksums([out / "x.dat"], out)}  # fmt: skip
        write(card.model_copy(update=update), out)
        with pytest.raises(PublishError, match=f"{name} holds a path of this machine: {out}/model"):
            packaged(out)
    monkeypatch.setattr("compress.publish.package.HEAD", 2)
    (out / "tensors.jsonl").unlink()
    packaged(out)


def test_the_originals_card(tmp_path: Path) -> None:
    card = made(tmp_path, "r-gptq")
    (tmp_path / "r-gptq" / "README-original.md").write_text(f"see {tmp_path}/models")
    artifact = card.artifacts[0].model_copy(update={"files": checksums([tmp_path / "r-gptq"], tmp_path)})
    write(card.model_copy(update={"artifacts": (artifact,)}), tmp_path)
    with pytest.raises(PublishError, match="run the recipe again"):
        packaged(tmp_path)
    write(card.model_copy(update={"artifacts": (artifact,), "model": "owner/name@" + "0" * 40}), tmp_path)
    packaged(tmp_path)
