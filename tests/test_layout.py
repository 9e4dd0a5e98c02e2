"""The house keeps its shape: links, packages, docstrings, import rules, and a recipe and a test for every method."""

from __future__ import annotations

import ast
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import posttrain
from posttrain import registry

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("recipes", "rewards", "trainers")
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
CONTRACTS = {contract["id"]: contract for contract in PYPROJECT["tool"]["importlinter"]["contracts"]}

own_methods = [name for name, entry in registry.entries("method").items() if entry.path is not None]


def sources() -> Iterator[Path]:
    """Every Python file of the repository, once, where it lies."""
    for folder in ("posttrain", *ROOMS, "tests", "benchmarks", "docs"):
        for parent, folders, files in os.walk(ROOT / folder):
            folders[:] = [name for name in folders if name != "__pycache__"]
            yield from (Path(parent) / name for name in sorted(files) if name.endswith(".py"))


@pytest.mark.parametrize("room", ROOMS)
def test_the_room_is_linked_into_the_package(room: str) -> None:
    link = ROOT / "posttrain" / room
    mend = f"run: ln -sfn ../{room} posttrain/{room} && git add posttrain/{room}"
    assert link.is_symlink(), f"posttrain/{room} is no link any more (a checkout without symlinks?); {mend}"
    assert os.readlink(link) == f"../{room}", f"posttrain/{room} points to {os.readlink(link)}; {mend}"


def test_the_package_map_says_what_the_links_say() -> None:
    linked = {f"posttrain.{room}": room for room in ROOMS}
    assert SETUPTOOLS["package-dir"] == {"posttrain": "posttrain", **linked}


def test_the_list_of_packages_is_what_lies_on_disk() -> None:
    on_disk = {
        str(Path(parent).relative_to(ROOT)).replace(os.sep, ".")
        for parent, _, files in os.walk(ROOT / "posttrain", followlinks=True)
        if "__init__.py" in files
    }
    assert set(SETUPTOOLS["packages"]) == on_disk, "keep [tool.setuptools] packages in pyproject.toml up to date"


def test_the_version_is_the_same_in_both_places() -> None:
    assert PYPROJECT["project"]["version"] == posttrain.__version__


@pytest.mark.parametrize("method", own_methods)
def test_the_method_has_a_recipe_and_a_test(method: str) -> None:
    assert list((ROOT / "recipes" / method).glob("*.yaml")), f"write recipes/{method}/<name>.yaml for '{method}'"
    assert (ROOT / "tests" / f"test_{method}.py").is_file(), f"write tests/test_{method}.py for '{method}'"


def test_every_recipe_folder_is_a_method() -> None:
    folders = {path.name for path in (ROOT / "recipes").iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert folders - {"bases", "accelerate"} <= set(own_methods)


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_entry_introduces_itself(kind: str) -> None:
    silent = [name for name, entry in registry.entries(kind).items() if not entry.summary]
    assert not silent, f"begin the docstring of {silent} with one line that `posttrain {kind}s` can show"


def test_every_module_has_a_docstring() -> None:
    silent = [str(path.relative_to(ROOT)) for path in sources() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent, f"modules without a docstring: {silent}"


def test_nobody_imports_a_room_by_its_bare_name() -> None:
    """Ruff's banned-api says the same; this finds it also in what ruff is told to leave out."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno} imports relatively"
                names = [node.module or ""]
            bare = [name for name in names if name.partition(".")[0] in ROOMS]
            assert not bare, f"{path}:{node.lineno} imports '{bare[0]}': write posttrain.{bare[0]}"


def test_the_import_contracts_cover_every_module() -> None:
    """Layers are exhaustive and methods a wildcard; the contract on trl must list all but the seams by hand."""
    assert CONTRACTS["layers"]["exhaustive"]
    assert CONTRACTS["independent-methods"]["modules"] == ["posttrain.trainers.*"]
    modules = {
        f"posttrain.{path.stem}"
        for path in (ROOT / "posttrain").iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").is_file()) and path.stem != "__init__"
    }
    assert set(CONTRACTS["trl-behind-the-seams"]["source_modules"]) == modules - {"posttrain.seams"}
