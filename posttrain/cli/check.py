"""`posttrain check`: what is wrong with a recipe, or all that it says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from posttrain.cli.console import print_yaml
from posttrain.cli.run import RecipeArgument, SetOption, read

if TYPE_CHECKING:
    from posttrain.launch.resolve import BatchIdentity


def command(recipe: RecipeArgument, assignments: SetOption = None) -> None:
    """Check a recipe and its baselines, and print it with every default written out; nothing is trained.

    Keys, values and names are checked at once. The arguments of the trainer come second, because they need its
    library, which takes seconds to import. Data and models are not loaded.
    """
    loaded = read(recipe, assignments)
    from posttrain.launch.resolve import every_run, resolve

    resolved = [resolve(each) for each in every_run(loaded).values()][-1]
    if loaded.model.path is None:
        from posttrain.launch.engines import require_engine

        require_engine(loaded)
    print_yaml(loaded.to_yaml())
    if loaded.sweep:
        typer.echo(f"# a sweep of {len(loaded.cells)} runs: {', '.join(loaded.cells)}")
    typer.echo(f"# {resolved.method_class_name}: {batch_identity(resolved.batch, pairs=resolved.takes_pairs)}")


def batch_identity(batch: BatchIdentity, *, pairs: bool) -> str:
    """One optimiser step, counted in sequences from both sides, or in preference pairs."""
    processes = f"world {batch.world} × per-device {batch.per_device} × accumulation {batch.accumulation}"
    if pairs:
        return f"{processes} = {batch.prompts} pairs"
    return (
        f"{processes} = {batch.prompts} prompts × {batch.generations} generations = {batch.prompts * batch.generations}"
    )
