"""`posttrain pairs`: preference pairs of the initial policy's own answers, before any training."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.console import reported
from posttrain.cli.run import RecipeArgument, SetOption, command_line, default_output_dir, read_plain

EXAMPLES = """Examples

[cyan]posttrain pairs f_dpo/countdown3[/]                              as the recipe says
[cyan]posttrain pairs f_dpo/countdown3 --set pairs.per_prompt=2[/]     fewer of each prompt
[cyan]posttrain pairs f_dpo/countdown3 --set pairs.choose=length_matched --store runs/store --output-dir runs/matched[/]
"""


def command(
    recipe: RecipeArgument,
    assignments: SetOption = None,
    store: Annotated[
        Path | None,
        typer.Option(
            "--store",
            metavar="DIR",
            help="The pre-sampled answers; drawn first where there are none.",
            show_default="runs/METHOD-RECIPE/store",
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output-dir", metavar="DIR", help="Folder of the pairs.", show_default="runs/METHOD-RECIPE/pairs"
        ),
    ] = None,
) -> None:
    """Pair right answers of the initial policy with wrong ones to the same prompt (data for DPO and its kin).

    posttrain run does this by itself; here it can be done ahead, and looked at.

    Other pairs of the same answers: --set pairs.choose=… with the same --store and another --output-dir.

    Says what became of every prompt and prints the folder; its pairs.parquet is in TRL's preference format.
    """
    loaded = read_plain("pairs", recipe, assignments)
    line = command_line("pairs", recipe, assignments, output_dir)
    if store is not None:
        line += f" --store {shlex.quote(str(store))}"
    with reported(f"interrupted; continue with: {line}"):
        from posttrain.launch import pipeline

        folder = default_output_dir(loaded)
        typer.echo(pipeline.run_pairs(loaded, store or folder / "store", output_dir or folder / "pairs"))
