"""Trainers: one file per method. The file's name is the method's name in recipes.

Each file defines `Config` (a subclass of TRL's config) and `Trainer`; the class names of every method can also be
imported from here (`from posttrain.trainers import DPHTrainer`), which loads that method's file only.
"""

from __future__ import annotations

import ast
from typing import Any

from posttrain import registry


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        for method in registry.entries("method").values():
            if method.path is None:
                continue
            tree = ast.parse(method.path.read_text(encoding="utf-8"))
            if any(isinstance(node, ast.ClassDef) and node.name == name for node in tree.body):
                return getattr(registry.load("method", method.name), name)
    raise AttributeError(f"module 'posttrain.trainers' has no attribute '{name}'")
