"""Versions and machine in a scorecard."""

from __future__ import annotations

import platform

import torch
import transformers

from compress import __version__
from compress.report.provenance import PACKAGES, machine, versions


def test_versions_are_those_of_the_packages() -> None:
    found = versions()
    assert found["compress"] == __version__
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["transformers"] == transformers.__version__
    assert set(found) <= {"compress", *PACKAGES}


def test_the_machine_is_this_one() -> None:
    found = machine("cuda:1")
    assert found["device"] == "cuda:1" and found["python"] == platform.python_version()
    assert 1 <= found["threads"] <= found["cores"] and found["cpu"]
    assert "/" not in str(found)
