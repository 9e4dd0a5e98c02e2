"""Starting several processes: a recipe as an `accelerate launch` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from posttrain.recipe import Recipe


def accelerate_command(recipe: Recipe, output_dir: Path, resume: bool, recipe_arguments: Sequence[str]) -> list[str]:
    """The command that runs `python -m posttrain.train` in `launch.processes` processes.

    Args:
        recipe: loaded, for its launch section.
        output_dir: of the run.
        resume: go on where an earlier run stopped.
        recipe_arguments: the recipe and its `--set` options as given on the command line.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(recipe.launch.processes)]
    if recipe.launch.config_file is not None:
        command += ["--config_file", recipe.launch.config_file]
    else:
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        if recipe.launch.processes > 1:
            # On a machine without GPUs too: it means torchrun, where --cpu would start one process whatever is asked.
            command.append("--multi_gpu")
    command += ["-m", "posttrain.train", *recipe_arguments, "--output-dir", str(output_dir)]
    return [*command, "--resume"] if resume else command
