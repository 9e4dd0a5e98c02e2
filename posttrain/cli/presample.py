"""`posttrain presample`: the store of verified answers of the initial policy, before any training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.console import reported
from posttrain.cli.run import RecipeArgument, SetOption, command_line, default_output_dir, read_plain


def command(
    recipe: RecipeArgument,
    assignments: SetOption = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output-dir", metavar="DIR", help="Folder of the store.", show_default="runs/METHOD-RECIPE/store"
        ),
    ] = None,
) -> None:
    """Draw answers of the initial policy, verify them and split the prompts (phase 1 of DPH-RL).

    posttrain run does this by itself; here it can be done ahead, and looked at. Prints the folder of the store.
    """
    loaded = read_plain("presample", recipe, assignments)
    line = command_line("presample", recipe, assignments, output_dir)
    with reported(f"interrupted; continue with: {line}"):
        from posttrain.launch import pipeline

        typer.echo(pipeline.run_presample(loaded, output_dir or default_output_dir(loaded) / "store"))
