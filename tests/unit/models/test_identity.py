"""Who a model is: from hub ids, the hub's cache and model cards; never from where it lies on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.models.companions import LAYOUT, LEGAL, copy_companions, left_behind
from compress.models.identity import identify

COMMIT = "9f2c1d0e" * 5


@pytest.mark.parametrize(
    ("folder", "model", "name", "version"),
    [
        ("runs/checkpoint-300", "", "checkpoint-300", "checkpoint-300"),
        (f"models--acme--tiny-moe/snapshots/{COMMIT}", "", "tiny-moe", f"acme/tiny-moe@{COMMIT}"),
        (f"models--acme--tiny-moe/snapshots/{COMMIT}", "acme/tiny-moe@main", "tiny-moe", f"acme/tiny-moe@{COMMIT}"),
        ("models--acme--a--b/snapshots/main", "", "a--b", "acme/a--b"),
        ("elsewhere", "acme/tiny-moe@v1.0", "tiny-moe", "acme/tiny-moe"),
        ("elsewhere", "/home/someone/elsewhere", "elsewhere", "elsewhere"),
    ],
)
def test_names(folder: str, model: str, name: str, version: str, tmp_path: Path) -> None:
    path = tmp_path / folder
    path.mkdir(parents=True)
    found = identify(model or str(path), path)
    assert (found.name, found.version) == (name, version)


def test_the_card_says_licence_languages_and_tags(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: acme-1\nlicense_link: LICENSE\nlanguage: [en, no]\ntags: [moe, 7]\n---\n# Hi\n"
    )
    found = identify(str(tmp_path), tmp_path)
    assert (found.license, found.license_name, found.license_link) == ("other", "acme-1", "LICENSE")
    assert found.languages == ("en", "no") and found.tags == ("moe",)


@pytest.mark.parametrize(
    "card",
    [
        "", "---\n", "---\n[1, 2]\n---\n", "---\nlicense: [a\n---\n", "---\nlicense: {a: b}\nlanguage: 3\n---\n",
        "---\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 10)}]\n" for n in range(9)) + "license: mit\n---\n",
        "---\n" + "[" * 5000 + "\n---\n", "\x00\xff---\n",
    ],
)  # fmt: skip
def test_a_damaged_card_says_nothing(card: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    found = identify(str(tmp_path), tmp_path)
    assert (found.license, found.languages, found.tags) == ("", (), ())


def test_companions_go_along_by_rule_and_without_paths(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    texts = {
        "LICENSE.txt": "MIT", "NOTICE": "n", "USE_POLICY.md": "be nice", "README.md": "card", "chat_template.jinja": "{{ x }}",
        "additional_chat_templates/tools.jinja": "{{ y }}", "tokenizer.json": "{}", "vocab.txt": "a", "config.json": "{}",
        "tokenizer_config.json": '{"name_or_path": "/home/someone/x", "eos_token": "<e>"}', "modeling_x.py": "x",
        "model.safetensors": "", "pytorch_model.bin": "", "original/params.json": "{}", ".cache/huggingface": "",
    }  # fmt: skip
    for name, text in texts.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    copy_companions(source, target, LEGAL + LAYOUT)
    got = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert got == {
        "LICENSE.txt", "NOTICE", "USE_POLICY.md", "README-original.md", "chat_template.jinja", "vocab.txt", "tokenizer.json",
        "additional_chat_templates/tools.jinja", "tokenizer_config.json",
    }  # fmt: skip
    assert "someone" not in (target / "tokenizer_config.json").read_text()
    assert "<e>" in (target / "tokenizer_config.json").read_text()
    assert (target / "README-original.md").read_text() == "card"
    assert left_behind(source) == ["modeling_x.py", "original/params.json", "pytorch_model.bin"]
