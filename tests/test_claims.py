"""The claim of `make run`, for three seeds: GRPO gains accuracy and loses diversity, DPH-RL keeps most of both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain import recipe as recipes
from posttrain.launch import pipeline


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_diversity_collapses_under_grpo_and_is_kept_by_dph(seed: int, tmp_path: Path) -> None:
    recipe = recipes.load("dph_rl/countdown3", [f"seed={seed}"])
    pipeline.run(recipe, tmp_path / "run", resume=False, command="")
    runs = json.loads((tmp_path / "run" / "comparison.json").read_text(encoding="utf-8"))["runs"]

    def solved(run: str, k: int) -> float:
        return 100 * float(runs[run]["pass_at_k"][str(k)]["value"])

    def distinct(run: str) -> float:
        return float(runs[run]["distinct_correct"]["value"])

    assert solved("grpo", 1) >= solved("base", 1) + 3
    assert solved("grpo", 64) <= solved("base", 64) - 10
    assert solved("dph_rl", 64) >= solved("grpo", 64) + 5
    assert solved("dph_rl", 1) >= solved("base", 1) + 2
    assert distinct("base") > distinct("dph_rl") > distinct("grpo")
