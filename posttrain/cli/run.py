"""`posttrain run`: one recipe, from the initial policy to the report. Also the arguments that all verbs share."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from posttrain import recipe as recipes
from posttrain import registry, rewards, tasks
from posttrain.cli.console import Command, prepare, reported
from posttrain.launch.spawn import accelerate_command, configuration, needs_launcher
from posttrain.recipe import Recipe

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, or the name of one that ships with posttrain (see posttrain recipes).",
        show_default=False,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one value of the recipe, as in --set method.args.eta=0.1; may be repeated. Values are YAML.",
        show_default=False,
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output-dir",
        metavar="DIR",
        help="Where everything is written.",
        show_default="runs/METHOD-RECIPE",
    ),
]
ResumeOption = Annotated[
    bool,
    typer.Option("--resume", help="Go on where an earlier run in the same folder stopped; a new one starts afresh."),
]


def command(
    recipe: RecipeArgument,
    assignments: SetOption = None,
    output_dir: OutputOption = None,
    resume: ResumeOption = False,
) -> None:
    """Run a recipe: make the initial policy, pre-sample, train, evaluate and compare.

    A recipe that asks for several processes, or names a launch configuration, is started through accelerate.
    """
    start(recipe, assignments, output_dir, resume, command_line("run", recipe, assignments, output_dir))


def start(recipe: str, assignments: Sequence[str] | None, output_dir: Path | None, resume: bool, line: str) -> None:
    """Run a recipe in this process, or in several that accelerate starts; `line` is what the user typed."""
    loaded = read(recipe, assignments)
    if not needs_launcher(loaded.launch):
        _run(loaded, output_dir, resume, line)
        return
    arguments = accelerate_command(
        loaded, output_dir or default_output_dir(loaded), resume, [recipe, *set_arguments(assignments)]
    )
    from posttrain.launch.resolve import require_devices, resolve

    resolve(loaded)  # a mistake in method.args is one sentence here, and one traceback per process there
    require_devices(loaded)
    with reported(f"interrupted; continue with: {line} --resume"):
        raise typer.Exit(_wait_for(arguments))


def in_process(
    recipe: RecipeArgument,
    assignments: SetOption = None,
    output_dir: OutputOption = None,
    resume: ResumeOption = False,
) -> None:
    """Run a recipe in this very process, which may be one of several that a launcher started."""
    _run(read(recipe, assignments), output_dir, resume, command_line("run", recipe, assignments, output_dir))


def _run(loaded: Recipe, output_dir: Path | None, resume: bool, line: str) -> None:
    # Among several processes the launcher speaks, not each of its workers.
    with reported("" if "RANK" in os.environ else f"interrupted; continue with: {line} --resume"):
        from posttrain.launch import pipeline

        pipeline.run(loaded, output_dir or default_output_dir(loaded), resume=resume, command=line)


def main_in_process() -> None:
    """The entry point of `python -m posttrain.train`: the arguments of `posttrain run`, never another process."""
    prepare()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(cls=Command)(in_process)
    app(prog_name="python -m posttrain.train")


def read(reference: str, assignments: Sequence[str] | None) -> Recipe:
    """Load a recipe and look up what it names: all that can be checked without the trainer's library and any data.

    Raises:
        UserError: anything in it is wrong; the message names the nearest known name.
    """
    recipe = recipes.load(reference, assignments or ())
    for method in (recipe.method.name, *(baseline.name for baseline in recipe.baselines)):
        registry.entry("method", method)
    configuration(recipe)
    verifier = tasks.load(recipe.task.name, recipe.task.options).verifier
    for other in recipe.other_tasks:
        tasks.load(other.name, other.options)
    for reward in recipe.rewards:
        if reward.name is not None and (reward.options or verifier is None or reward.name != verifier[0]):
            rewards.load(reward.name, reward.options)
    return recipe


def default_output_dir(recipe: Recipe) -> Path:
    """`runs/<method>-<recipe name>`, below the working directory; a sweep has a folder of its own."""
    return Path("runs") / f"{'sweep-' if recipe.sweep else ''}{recipe.method.name}-{recipe.name}"


def command_line(verb: str, recipe: str, assignments: Sequence[str] | None, output_dir: Path | None) -> str:
    """The shell command that repeats this call."""
    folder = [] if output_dir is None else ["--output-dir", str(output_dir)]
    return shlex.join(["posttrain", verb, recipe, *set_arguments(assignments), *folder])


def set_arguments(assignments: Sequence[str] | None) -> list[str]:
    return [part for assignment in assignments or () for part in ("--set", assignment)]


def _wait_for(arguments: Sequence[str]) -> int:
    """Run a launcher and return its exit code; on Ctrl-C, which it receives too, wait until its workers are gone."""
    with subprocess.Popen(arguments) as process:  # noqa: S603 - our own launcher, no shell
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
