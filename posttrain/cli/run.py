"""`posttrain run`: one recipe, from the initial policy to the report. Also the arguments that all verbs share."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from posttrain import recipe as recipes
from posttrain import registry, rewards, tasks
from posttrain.cli.console import Command, prepare, reported
from posttrain.errors import UserError
from posttrain.launch.spawn import accelerate_command, configuration, leave, needs_launcher
from posttrain.recipe import Recipe
from posttrain.stages import StagedRecipe, Trained

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
FromOption = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="STAGE",
        help="Make this stage and all that depends on it anew; what was there is moved aside.",
        show_default=False,
    ),
]
UntilOption = Annotated[
    str | None,
    typer.Option("--until", metavar="STAGE", help="Do what this stage needs, and stop after it.", show_default=False),
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
    first: FromOption = None,
    until: UntilOption = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show the stages and how far each is, and do nothing.")] = False,
) -> None:
    """Run a recipe: make the initial policy, pre-sample, train, evaluate and compare.

    A recipe that asks for several processes, or names a launch configuration, is started through accelerate.

    A recipe of stages goes on where it was stopped, with and without --resume; only what was edited is done again.
    """
    line = command_line("run", recipe, assignments, output_dir)
    if plan:
        loaded = read(recipe, assignments)
        _require_stages(loaded, {"--plan": plan})
        if isinstance(loaded, StagedRecipe):
            from posttrain.cli.status import show_plan

            show_plan(loaded, output_dir or default_output_dir(loaded))
        return
    start(recipe, assignments, output_dir, resume, line, first=first, until=until)


def start(
    recipe: str,
    assignments: Sequence[str] | None,
    output_dir: Path | None,
    resume: bool,
    line: str,
    *,
    first: str | None = None,
    until: str | None = None,
) -> None:
    """Run a recipe in this process, or in several that accelerate starts; `line` is what the user typed."""
    loaded = read(recipe, assignments)
    _require_stages(loaded, {"--from": first, "--until": until})
    if not needs_launcher(loaded.launch):
        _run(loaded, output_dir, resume, line, first, until)
        return
    own = [recipe, *set_arguments(assignments), *_stage_arguments(first, until)]
    arguments = accelerate_command(loaded, output_dir or default_output_dir(loaded), resume, own)
    from posttrain.launch.resolve import require_devices, resolve

    if isinstance(loaded, Recipe):
        resolve(loaded)  # a mistake in method.args is one sentence here, and one traceback per process there
    else:
        from posttrain.launch.staged import resolved_stages

        resolved_stages(loaded)
    require_devices(loaded)
    with reported(_interrupted(loaded, line, until)):
        raise typer.Exit(_wait_for(arguments))


def in_process(
    recipe: RecipeArgument,
    assignments: SetOption = None,
    output_dir: OutputOption = None,
    resume: ResumeOption = False,
    first: FromOption = None,
    until: UntilOption = None,
) -> None:
    """Run a recipe in this very process, which may be one of several that a launcher started."""
    line = command_line("run", recipe, assignments, output_dir)
    loaded = read(recipe, assignments)
    _require_stages(loaded, {"--from": first, "--until": until})
    _run(loaded, output_dir, resume, line, first, until)


def _run(
    loaded: Recipe | StagedRecipe,
    output_dir: Path | None,
    resume: bool,
    line: str,
    first: str | None = None,
    until: str | None = None,
) -> None:
    # Among several processes the launcher speaks, not each of its workers.
    with reported("" if "RANK" in os.environ else _interrupted(loaded, line, until)):
        folder = output_dir or default_output_dir(loaded)
        if isinstance(loaded, Recipe):
            from posttrain.launch import pipeline

            pipeline.run(loaded, folder, resume=resume, command=line)
        else:
            from posttrain.launch import staged

            staged.run(loaded, folder, command=line, first=first, until=until)


def _interrupted(loaded: Recipe | StagedRecipe, line: str, until: str | None) -> str:
    if isinstance(loaded, Recipe):
        return f"interrupted; continue with: {line} --resume"
    return f"interrupted; continue with: {shlex.join([*shlex.split(line), *_stage_arguments(None, until)])}"


def _stage_arguments(first: str | None, until: str | None) -> list[str]:
    return [part for name, value in (("--from", first), ("--until", until)) if value for part in (name, value)]


def _require_stages(loaded: Recipe | StagedRecipe, options: Mapping[str, object]) -> None:
    """Refuse options of stages where a recipe has none.

    Raises:
        UserError: one of them is given.
    """
    given = next((name for name, value in options.items() if value), None)
    if given is not None and isinstance(loaded, Recipe):
        raise UserError(f"{given} is for recipes of stages, and '{loaded.name}' has none: leave it out.")


def main_in_process() -> None:
    """The entry point of `python -m posttrain.train`: the arguments of `posttrain run`, never another process."""
    prepare()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(cls=Command)(in_process)
    try:
        app(prog_name="python -m posttrain.train")
    except SystemExit as left:
        if "RANK" not in os.environ:
            raise
        leave(left.code if isinstance(left.code, int) else int(left.code is not None))


def read_plain(verb: str, reference: str, assignments: Sequence[str] | None) -> Recipe:
    """`read` for verbs about one method.

    Raises:
        UserError: as `read`, or the recipe is one of stages.
    """
    recipe = read(reference, assignments)
    if isinstance(recipe, StagedRecipe):
        raise UserError(
            f"posttrain {verb} takes a recipe of one method, and '{recipe.name}' has stages: run its stages with "
            "posttrain run, with --until where you want to stop."
        )
    return recipe


def read(reference: str, assignments: Sequence[str] | None) -> Recipe | StagedRecipe:
    """Load a recipe and look up what it names: all that can be checked without the trainer's library and any data.

    Raises:
        UserError: anything in it is wrong; the message names the nearest known name.
    """
    recipe = recipes.load(reference, assignments or ())
    if isinstance(recipe, Recipe):
        methods = [recipe.method.name, *(baseline.name for baseline in recipe.baselines)]
    else:
        methods = [stage.method.name for stage in recipe.stages.values() if isinstance(stage, Trained)]
    for method in methods:
        registry.entry("method", method)
    configuration(recipe)
    verifier = tasks.load(recipe.task.name, recipe.task.options).verifier
    for other in recipe.other_tasks:
        tasks.load(other.name, other.options)
    for reward in recipe.rewards:
        if reward.name is not None and (reward.options or verifier is None or reward.name != verifier[0]):
            rewards.load(reward.name, reward.options)
    return recipe


def default_output_dir(recipe: Recipe | StagedRecipe) -> Path:
    """`runs/<method>-<recipe name>`, below the working directory; a sweep and stages have folders of their own."""
    if isinstance(recipe, StagedRecipe):
        return Path("runs") / f"stages-{recipe.name}"
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
