"""`posttrain check`: what is wrong with a recipe, or all that it says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from posttrain.cli.console import print_yaml
from posttrain.cli.run import RecipeArgument, SetOption, read
from posttrain.stages import BASE, StagedRecipe, Trained

if TYPE_CHECKING:
    from posttrain.launch.resolve import BatchIdentity


def command(recipe: RecipeArgument, assignments: SetOption = None) -> None:
    """Check a recipe and its baselines or stages, and print it with every default written out; nothing is trained.

    Keys, values and names are checked at once. The arguments of the trainer come second, because they need its
    library, which takes seconds to import. Data and models are not loaded.
    """
    loaded = read(recipe, assignments)
    if isinstance(loaded, StagedRecipe):
        _check_stages(loaded)
        return
    from posttrain.launch import teaching
    from posttrain.launch.resolve import every_run, resolve

    runs = {label: resolve(each) for label, each in every_run(loaded).items()}
    teaching.check(loaded, runs)
    resolved = [*runs.values()][-1]
    if loaded.model.path is None:
        from posttrain.launch.engines import require_engine

        require_engine(loaded)
    print_yaml(loaded.to_yaml())
    if loaded.sweep:
        typer.echo(f"# a sweep of {len(loaded.cells)} runs: {', '.join(loaded.cells)}")
    counted = batch_identity(resolved.batch, pairs=resolved.takes_pairs, answers=bool(resolved.takes_answers))
    typer.echo(f"# {resolved.method_class_name}: {counted}")


def _check_stages(recipe: StagedRecipe) -> None:
    from posttrain.launch import staged, teaching
    from posttrain.launch.engines import require_engine

    resolved = staged.resolved_stages(recipe)
    lines = []
    for node in recipe.nodes.values():
        inputs = ", ".join(dict.fromkeys(node.inputs.values()))
        line = f"# {node.name}: {staged.what(node)}{f' of {inputs}' if inputs else ''}"
        if isinstance(node.stage, Trained):
            own = resolved[node.name]
            teaching.check(own.recipe, {node.name: own})
            line += f"; {batch_identity(own.batch, pairs=own.takes_pairs, answers=bool(own.takes_answers))}"
        lines.append(line)
    if recipe.model.path is None:
        require_engine(recipe.plain(recipe.nodes[BASE]))
    print_yaml(recipe.to_yaml())
    typer.echo("\n".join(lines))


def batch_identity(batch: BatchIdentity, *, pairs: bool, answers: bool = False) -> str:
    """One optimiser step, counted in sequences from both sides, or in preference pairs, or in answers to learn."""
    processes = f"world {batch.world} × per-device {batch.per_device} × accumulation {batch.accumulation}"
    if pairs or answers:
        return f"{processes} = {batch.prompts} {'pairs' if pairs else 'answers'}"
    return (
        f"{processes} = {batch.prompts} prompts × {batch.generations} generations = {batch.prompts * batch.generations}"
    )
