"""The command line: one file per verb. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

from typing import Annotated

import typer

import posttrain
from posttrain.cli import check, doctor, evaluate, pairs, presample, run, score, serve, serve_rewards, status, sweep
from posttrain.cli.console import Group, prepare
from posttrain.cli.listing import listing, recipe_listing

EXAMPLES = """Examples

[cyan]posttrain recipes[/]                                    what can be run
[cyan]posttrain check dph_rl/countdown3[/]                    all that it says
[cyan]posttrain run dph_rl/countdown3[/]                      train and compare
[cyan]posttrain run dph_rl/countdown3 --set seed=1[/]         change a value
[cyan]posttrain methods show dph_rl[/]                        equation and settings
"""

app = typer.Typer(
    name="posttrain",
    cls=Group,
    help="RL post-training of language models on top of Hugging Face TRL: a recipe in, a compared policy out.",
    epilog=EXAMPLES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

TRAIN = "Train and measure"
LOOK = "Look around"

app.command("run", rich_help_panel=TRAIN)(run.command)
app.command("sweep", rich_help_panel=TRAIN, epilog=sweep.EXAMPLES)(sweep.command)
app.command("status", rich_help_panel=TRAIN)(status.command)
app.command("check", rich_help_panel=TRAIN)(check.command)
app.command("presample", rich_help_panel=TRAIN)(presample.command)
app.command("pairs", rich_help_panel=TRAIN, epilog=pairs.EXAMPLES)(pairs.command)
app.command("evaluate", rich_help_panel=TRAIN)(evaluate.command)
app.command("score", rich_help_panel=TRAIN, epilog=score.EXAMPLES)(score.command)
app.command("serve", rich_help_panel=TRAIN, epilog=serve.EXAMPLES)(serve.command)
app.command("serve-rewards", rich_help_panel=TRAIN, epilog=serve_rewards.EXAMPLES)(serve_rewards.command)
app.add_typer(recipe_listing(), name="recipes", help="List the recipes; show NAME prints one.", rich_help_panel=LOOK)
app.add_typer(listing("method"), name="methods", help="List the methods; show NAME explains one.", rich_help_panel=LOOK)
app.add_typer(listing("reward"), name="rewards", help="List the rewards; show NAME explains one.", rich_help_panel=LOOK)
app.add_typer(listing("task"), name="tasks", help="List the tasks; show NAME explains one.", rich_help_panel=LOOK)
app.add_typer(doctor.app, name="doctor", help="What this machine can do, and what it lacks.", rich_help_panel=LOOK)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"posttrain {posttrain.__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The `posttrain` command."""
    prepare()
    app(prog_name="posttrain")
