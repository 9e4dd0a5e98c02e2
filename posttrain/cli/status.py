"""`posttrain status`: how far a run is, what each of its stages took and what came out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain import recipe as recipes
from posttrain.errors import UserError
from posttrain.recipe import Recipe

if TYPE_CHECKING:
    from rich.table import Table

    from posttrain.stages import StagedRecipe

_COLOURS = {"done": "green", "started": "yellow", "changed": "yellow", "corrupt": "red", "left out": "dim"}


def command(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of the run.", show_default=False)],
) -> None:
    """Show the stages of a run: how far each is, the time it took, and a few of its numbers.

    Of a recipe without stages, what is there of each of its runs.
    """
    stored = run_dir / "recipe.yaml"
    if not stored.is_file():
        raise UserError(f"{run_dir} holds no run: name the folder that posttrain run has written to.")
    content = recipes.parse_value(stored.read_text(encoding="utf-8"))
    if (run_dir / "plan.json").is_file():
        _show(_of_stages(run_dir))
        notes = json.loads((run_dir / "plan.json").read_text(encoding="utf-8"))["notes"]
        for note in notes:
            typer.echo(note)
        return
    recipe = recipes.validate(content, str(stored))
    if not isinstance(recipe, Recipe):
        raise UserError(f"{run_dir} holds a run of stages that was never planned: start it with posttrain run.")
    _show(_of_methods(run_dir, recipe))


def show_plan(recipe: StagedRecipe, output_dir: Path) -> None:
    """Print the stages of a recipe, and how far each is in a folder; contents are compared with their hashes."""
    from posttrain.launch import manifest, pipeline, staged

    pipeline.quiet_libraries()
    table = _table("stage", "what", "from", "key", "state", "time")
    for work in staged.plan(recipe).works.values():
        inputs = ", ".join(dict.fromkeys(work.node.inputs.values()))
        row = [work.node.name, staged.what(work.node), inputs, work.key[:12]]
        if work.node.step == "base":
            table.add_row(*row, "", "")
            continue
        found = manifest.state(output_dir.resolve() / "stages", work.node.name, work.key, hashed=True)
        table.add_row(*row, _coloured(found.name, found.note), _duration(found.seconds))
    _show(table)


def _of_stages(run_dir: Path) -> Table:
    """The nodes of the latest plan. Sizes are compared, hashes are not: a run does that when it starts."""
    from posttrain.launch import manifest

    plan = json.loads((run_dir / "plan.json").read_text(encoding="utf-8"))
    table = _table("stage", "what", "from", "state", "time", "finished", "results")
    for node in plan["nodes"]:
        inputs = ", ".join(dict.fromkeys(node["inputs"].values()))
        row = [node["name"], node["what"], inputs]
        if not node["inputs"] and node["what"] == "initial policy":
            table.add_row(*row, "", "", "", "")
            continue
        found = manifest.state(run_dir.resolve() / "stages", node["name"], node["key"], hashed=False)
        name = "left out" if node["left_out"] else found.name
        table.add_row(
            *row, _coloured(name, found.note), _duration(found.seconds), found.finished[:16], _numbers(found.results)
        )
    return table


def _of_methods(run_dir: Path, recipe: Recipe) -> Table:
    """What is there of a run without stages."""
    table = _table("run", "trained", "evaluated", "results")
    labels = [baseline.label for baseline in recipe.baselines] + (list(recipe.cells) or [recipe.method.label])
    for label in ("base", *recipe.teachers, *labels):
        evaluation = run_dir / label / "evaluation" / "evaluation.json"
        trained = _done((run_dir / label / "history.json").is_file()) if label in labels else ""
        results = {}
        if evaluation.is_file():
            metrics = json.loads(evaluation.read_text(encoding="utf-8"))["metrics"]
            results = {name: entry["value"] for name, entry in metrics.items() if name.startswith("pass@")}
        table.add_row(label, trained, _done(evaluation.is_file()), _numbers(results))
    for name, file in (("store", "store/manifest.json"), ("pairs", "pairs/manifest.json"), ("report", "report.html")):
        if name == "report" or (run_dir / name).is_dir():
            table.add_row(name, "", "", "" if not (run_dir / file).is_file() else "done")
    return table


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _show(table: Table) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # a file has no edge
    console.print(table)


def _done(is_there: bool) -> str:
    return _coloured("done" if is_there else "to do")


def _coloured(state: str, note: str = "") -> str:
    from rich.markup import escape

    colour = _COLOURS.get(state)
    return (f"[{colour}]{state}[/]" if colour else state) + (f" ({escape(note)})" if note else "")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _numbers(results: Mapping[str, Any] | None) -> str:
    """A few numbers on one line; shares in percent."""
    return ", ".join(
        f"{name} {100 * value:.1f} %"
        if name.startswith("pass@")
        else f"{name} {int(value):,}"
        if float(value).is_integer()
        else f"{name} {value:.4g}"
        for name, value in (results or {}).items()
        if value is not None
    )
