"""`python -m posttrain.launch.alone warm-start JSON`: one stage in a process of its own, outside any launch."""

from __future__ import annotations

import json
import sys

from posttrain import tasks
from posttrain.launch.pipeline import quiet_libraries
from posttrain.launch.set_aside import set_aside
from posttrain.launch.warm_start import warm_start
from posttrain.recipe import Task, WarmStart
from posttrain.stages import Validation


def main() -> None:
    """Make the model of the sections `warm_start`, `task` and `validation` and the dtype that are given."""
    stage, text = sys.argv[1:]
    if stage != "warm-start":
        raise SystemExit(f"unknown stage {stage}")
    quiet_libraries()
    given = json.loads(text)
    named = Task(**given["task"])
    task = tasks.load(named.name, named.options)
    if "validation" in given:
        task, _ = set_aside(task, Validation(**given["validation"]))
    warm_start(WarmStart(**given["warm_start"]), task, dtype=given["dtype"])


if __name__ == "__main__":
    main()
