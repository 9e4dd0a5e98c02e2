"""`python -m posttrain.launch.alone warm-start RECIPE_YAML`: one stage in a process of its own, outside any launch."""

from __future__ import annotations

import sys

from posttrain import recipe as recipes
from posttrain import tasks
from posttrain.launch.pipeline import quiet_libraries
from posttrain.launch.warm_start import warm_start
from posttrain.recipe import WarmStart


def main() -> None:
    """Make the warm-started model of the recipe given as YAML text."""
    stage, text = sys.argv[1:]
    if stage != "warm-start":
        raise SystemExit(f"unknown stage {stage}")
    quiet_libraries()
    recipe = recipes.validate(recipes.parse_value(text), "recipe")
    settings = recipe.model.warm_start or WarmStart()
    warm_start(settings, tasks.load(recipe.task.name, recipe.task.options), dtype=recipe.model.dtype)


if __name__ == "__main__":
    main()
