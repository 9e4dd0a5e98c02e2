"""Where a run came from: versions, git state, machine, command, seeds. Stored with every run."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import posttrain
from posttrain.recipe import Common
from posttrain.versions import versions


def git_state() -> dict[str, Any] | None:
    """Commit and whether the tree has uncommitted changes; None outside a checkout of this project."""
    root = Path(posttrain.__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(  # noqa: S603 - fixed command, no shell
            ["git", "-C", str(root), *arguments],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None
        return {"commit": git("rev-parse", "HEAD"), "uncommitted_changes": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def machine(world: int) -> dict[str, Any]:
    """What the run is computed on."""
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    return {"system": platform.platform(), "cpus": os.cpu_count(), "device": device, "processes": world}


def provenance(recipe: Common, command: str, world: int) -> dict[str, Any]:
    """Everything worth knowing about where a run came from. No environment variables: they hold secrets."""
    return {
        "command": command,
        "recipe": recipe.digest(),
        "seeds": {
            "training": recipe.seed,
            "presample": recipe.presample.seed,
            "evaluation": recipe.evaluation.seed,
            "warm_start": recipe.model.warm_start.seed if recipe.model.warm_start else None,
        },
        "versions": versions(),
        "git": git_state(),
        "machine": machine(world),
    }
