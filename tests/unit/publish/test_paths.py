"""Paths of this machine are found where they are, and not where they are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.publish.paths import private_path, private_places

PLACES = ("/home/ann", "/work", "/data/runs/out")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('"model": "/home/ann/models/x"', "/home/ann/models/x"),
        ("cd /home/ann", "/home/ann"),
        ("in /home/ann.", "/home/ann."),
        (r"one\n/home/ann/two", "/home/ann/two"),
        (r'"\/home\/ann\/two"', r"\/home\/ann\/two"),
        ("file:///home/ann/x", "/home/ann/x"),
        ("=/data/runs/out:", "/data/runs/out"),
        ("/home/anna/x and /home/ann-b and /home/ann.old", None),
        ("https://hub/home/ann/x, s/home/ann, a.b/home/ann", None),
        ("home/ann, ~/ann, /data/runs/outer", None),
    ],
)
def test_places(tmp_path: Path, text: str, found: str | None) -> None:
    (tmp_path / "file").write_text(text)
    assert private_path((tmp_path / "file").read_bytes(), PLACES, own=False) == found
    assert private_path((tmp_path / "file").read_bytes(), PLACES, own=True) == found


def test_a_folder_at_the_top_says_something_in_our_own_words_only(tmp_path: Path) -> None:
    """ "/work" may be a token of the vocabulary, or part of the original's instructions."""
    (tmp_path / "file").write_text('{"/work": 17, "/work/models/x": 3}')
    assert private_path((tmp_path / "file").read_bytes(), PLACES, own=False) is None
    assert private_path((tmp_path / "file").read_bytes(), PLACES, own=True) == "/work"


def test_our_own_words_name_nothing_that_exists_here(tmp_path: Path) -> None:
    model = tmp_path / "some" / "model.v2"
    model.mkdir(parents=True)
    (tmp_path / "file").write_text(f'see /usr/bin/env, {tmp_path}/none, "{model}"')
    assert private_path((tmp_path / "file").read_bytes(), (), own=True) == str(model)
    assert private_path((tmp_path / "file").read_bytes(), (), own=False) is None
    (tmp_path / "file").write_text(f"https://example.org{model} 1/2/3 and/or a/b")
    assert private_path((tmp_path / "file").read_bytes(), (), own=True) is None


def test_which_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert set(private_places(Path("link"))) == {f"{tmp_path}/link", str(tmp_path), "/home/ann"}
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", "/")
    assert set(private_places(tmp_path)) == {str(tmp_path)}
