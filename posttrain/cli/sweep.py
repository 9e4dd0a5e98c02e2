"""`posttrain sweep`: one recipe over a grid of settings, in one comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from posttrain import recipe as recipes
from posttrain.cli.console import reported
from posttrain.cli.run import RecipeArgument, ResumeOption, command_line, read_plain, start
from posttrain.errors import UserError

EXAMPLES = """Examples

[cyan]posttrain sweep f_dpo/countdown3 --set method.args.beta=0.03,0.1,0.3[/]
[cyan]posttrain sweep f_dpo/countdown3 --set method.args.divergence=reverse_kl,js --set seed=0,1,2[/]

Settings that belong together are one value in braces:

[cyan]posttrain sweep f_dpo/countdown3 --set 'method.args={divergence: js},{divergence: alpha, alpha: 0.5}'[/]
"""


def command(
    recipe: RecipeArgument,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE[,VALUE…]",
            help="Change one value of the recipe; several values, separated by commas, span the grid. May be repeated.",
            show_default=False,
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output-dir",
            metavar="DIR",
            help="Where everything is written.",
            show_default="runs/sweep-METHOD-RECIPE",
        ),
    ] = None,
    resume: ResumeOption = False,
) -> None:
    """Train one method with every combination of settings, and compare them all.

    The grid may vary arguments of the method (method.args.NAME) and the seed.

    Model, data, pre-sampled answers and held-out problems are shared by all.

    Runs that differ in the seed only are pooled. Nothing finished is done twice.
    """
    with reported():
        single, several = recipes.spread(assignments or ())
        if several:
            single.append(f"sweep={json.dumps(several)}")
        if not read_plain("sweep", recipe, single).sweep:
            raise UserError(
                "There is nothing to sweep: give a setting several values, as in --set method.args.beta=0.03,0.1,0.3."
            )
    start(recipe, single, output_dir, resume, command_line("sweep", recipe, assignments, output_dir))
