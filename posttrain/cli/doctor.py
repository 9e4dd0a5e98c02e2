"""`posttrain doctor`: what this machine can do, and what it lacks."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from posttrain.rewards._sandbox import Probe

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _main() -> None:
    pass


@app.command("sandbox")
def sandbox(
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Attack every kind of isolation that the reward code can run programs in; exit with 1 when none holds."""
    from posttrain.rewards import _sandbox

    probes = [_sandbox.probe(tier) for tier in _sandbox.TIERS]
    taken = next((found.tier for found in probes if found.holds), None)
    if as_json:
        typer.echo(json.dumps({"taken": taken, "tiers": [_described(found) for found in probes]}, indent=2))
    else:
        _print(probes, taken)
    if taken is None:
        raise typer.Exit(1)


def _described(found: Probe) -> dict[str, Any]:
    from posttrain.rewards._sandbox import REMEDIES

    return {
        "tier": found.tier,
        "holds": found.holds,
        "reason": found.reason,
        "would_take": None if found.holds else REMEDIES[found.tier],
        "seconds_per_program": found.seconds,
        "attacks": {attack.name: {"held": attack.held, "found": attack.found} for attack in found.attacks},
    }


def _print(probes: list[Probe], taken: str | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from posttrain.rewards._sandbox import ATTACKS, REMEDIES

    console = Console()
    user = "root" if os.geteuid() == 0 else f"user {os.geteuid()}"
    table = Table(title=f"Sandboxes on this machine, as {user}", title_justify="left")
    for heading in ("tier", "holds", "per program", "why not, and what would give it"):
        table.add_column(heading)
    for found in probes:
        seconds = "" if found.seconds is None else f"{1000 * found.seconds:.0f} ms"
        why = "" if found.holds else f"{found.reason}; {REMEDIES[found.tier]}"
        mark = "[green]yes[/]" if found.holds else "[red]no[/]"
        table.add_row(found.tier + (" (taken)" if found.tier == taken else ""), mark, seconds, escape(why))
    console.print(table)
    attacks = Table(title="What a program tried", title_justify="left")
    attacks.add_column("attack")
    for found in probes:
        attacks.add_column(found.tier)
    by_tier = [{attack.name: attack for attack in found.attacks} for found in probes]
    for attack in ATTACKS:
        tested = [results.get(attack.name) for results in by_tier]
        cells = ["" if one is None else f"[{'green' if one.held else 'red'}]{escape(one.found)}[/]" for one in tested]
        attacks.add_row(attack.name, *cells)
    console.print(attacks)
    if taken is None:
        console.print("No sandbox holds: the reward code runs nothing here, unless [bold]sandbox: none[/] is named.")
