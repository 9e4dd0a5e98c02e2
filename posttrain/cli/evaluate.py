"""`posttrain evaluate`: pass@k of one policy on a recipe's held-out prompts."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.console import reported
from posttrain.cli.run import RecipeArgument, SetOption, command_line, read_plain


def command(
    recipe: RecipeArgument,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="PATH",
            help="Folder of a trained policy, or its name on the hub.",
            show_default="the recipe's initial policy",
        ),
    ] = None,
    assignments: SetOption = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output-dir", metavar="DIR", help="Folder of the evaluation.", show_default="runs/evaluate-RECIPE-MODEL"
        ),
    ] = None,
) -> None:
    """Evaluate a policy on a recipe's held-out prompts: pass@k with intervals, and diversity."""
    loaded = read_plain("evaluate", recipe, assignments)
    folder = output_dir or Path("runs") / f"evaluate-{loaded.name}-{Path(model).name if model else 'base'}"
    line = command_line("evaluate", recipe, assignments, output_dir)
    policy = f" --model {shlex.quote(model)}" if model else ""
    with reported(f"interrupted; start again with: {line}{policy}"):
        from posttrain.launch import pipeline

        pipeline.run_evaluate(loaded, model, folder)
