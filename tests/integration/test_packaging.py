"""The wheel, built as an installer would: from the unpacked source distribution."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling")

ROOT = Path(__file__).resolve().parents[2]


def _build(source: Path, target: str, into: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(into)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = into.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    with tarfile.open(_build(ROOT, "sdist", folder / "sdist")) as sdist:
        sdist.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    return _build(source, "wheel", folder / "wheel")


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def _python(code: str, unpacked: Path, cwd: Path) -> str:
    """Run `code` where `compress` can only be the unpacked one.

    -S keeps the environment's own (editable) installation out, -P the working directory; what the wheel depends on
    comes from the plain site-packages folder.
    """
    packages = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    path = os.pathsep.join([str(unpacked), *packages])
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", code], cwd=cwd, env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compress_is_the_only_name_a_user_gets(names: set[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    (info,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops == {"compress", info}
    assert info.startswith("compress_llm-")


def test_wheel_holds_every_module(names: set[str]) -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "compress").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules


def test_wheel_holds_the_template_of_reports(names: set[str]) -> None:
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "compress" / "report" / "templates").iterdir()}
    assert templates and templates <= names


def test_wheel_holds_the_rules_of_advise(names: set[str]) -> None:
    assert {"compress/advise/rules.yaml", "compress/advise/quality.yaml"} <= names


def test_wheel_holds_the_data_with_its_licences(names: set[str]) -> None:
    data = {
        path.relative_to(ROOT).as_posix()
        for folder in ("recipes", "calibration", "eval", "models/tiny-qwen3-moe")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }
    assert len(data) > 20
    assert {name for name in names if "/_data/" in name} == {f"compress/_data/{name}" for name in data}
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in names}


def test_the_demo_is_all_there_after_installation(unpacked: Path, tmp_path: Path) -> None:
    code = """
import json, compress
from compress.plan import make_plan
from compress.recipe import load_recipe
from compress.text import data_root, find_data, load_suite
plan = make_plan(load_recipe("qwen-moe-2bit"), weights=True)
kinds = ("recipes", "calibration", "eval", "models")
print(json.dumps({
    "package": compress.__file__,
    "roots": [str(data_root(kind)) for kind in kinds],
    "set": str(find_data("calibration", "mixed")),
    "suite": load_suite("quick").name,
    "source": str(plan.source),
    "tensors": len(plan.tensors),
}))
"""
    found = json.loads(_python(code, unpacked, tmp_path))
    data = unpacked / "compress" / "_data"
    assert Path(found["package"]).parent == unpacked / "compress"
    assert [Path(root) for root in found["roots"]] == [data / k for k in ("recipes", "calibration", "eval", "models")]
    assert Path(found["set"]).parent == data / "calibration"
    assert Path(found["source"]) == data / "models" / "tiny-qwen3-moe"
    assert found["suite"] == "quick"
    assert found["tensors"] == 182


def test_the_command_starts(unpacked: Path, tmp_path: Path) -> None:
    from importlib.metadata import PathDistribution

    (info,) = unpacked.glob("*.dist-info")
    distribution = PathDistribution(info)
    (entry,) = distribution.entry_points
    assert (entry.name, entry.group) == ("compress", "console_scripts")
    code = f"import sys; sys.argv = ['compress', '--version']; from {entry.module} import {entry.attr}; {entry.attr}()"
    assert _python(code, unpacked, tmp_path).split() == ["compress", distribution.version]
