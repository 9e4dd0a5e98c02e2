"""Programs per second in each sandbox of the reward `code`, and what a verdict costs through all of it.

    python -m benchmarks.sandbox [--rounds 5] [--output benchmarks/results/sandbox.json]

Tiers take turns in an order that rotates; reported are medians over rounds. Those that do not hold on the machine are
left out, and said to be. Servers and workers have begun before the clock. What else the machine does is in `load`, the
average number of processes that want a CPU.

- `program`: one after another from one process, a program that prints a line.
- `verdicts`: the reward on correct programs of the task `code` with their eight tests, by all workers; a second column
  where 1 % of the programs never end and are stopped after a second.
- `none`: no isolation, for comparison; the programs are our own.
"""

from __future__ import annotations

import argparse
import os
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.turns import rotated, timed
from posttrain import atomic, rewards, tasks
from posttrain.launch.provenance import machine
from posttrain.progress import Bar
from posttrain.rewards import _sandbox, _workers
from posttrain.versions import versions

PROGRAMS = 20
"""One after another, per turn."""
COMPLETIONS = 100
"""Of one batch."""
ENDLESS = "```python\nwhile True:\n    pass\n```"


def one_after_another(sandbox: _sandbox.Sandbox) -> float:
    """Seconds per program."""

    def run() -> None:
        for _ in range(PROGRAMS):
            sandbox.run("print('a line')", b"", 20.0)

    return timed(run)[0] / PROGRAMS


def batch(verifier: rewards.Verifier, rows: list[tasks.Row], endless: int) -> float:
    """Seconds per completion."""
    completions = [ENDLESS if number < endless else verifier.gold(row) or "" for number, row in enumerate(rows)]
    seconds, verdicts = timed(partial(verifier.score, completions, rows))
    found = [verdict.status for verdict in verdicts]
    if found.count("ok") != len(rows) - endless:
        raise RuntimeError(f"{len(rows) - endless} programs are correct, and the verdicts are {set(found)}")
    return seconds / len(rows)


def measure(rounds: int) -> dict[str, Any]:
    """All tiers, in turns."""
    probes = {tier: _sandbox.probed(tier) for tier in _sandbox.TIERS}
    tiers: list[_sandbox.Tier] = [*(tier for tier in _sandbox.TIERS if probes[tier].holds), "none"]
    rows = tasks.load("code", {"rows": COMPLETIONS}).rows("train")
    seconds: dict[str, dict[str, list[float]]] = {
        tier: {"program": [], "verdict": [], "verdict_beside_endless": []} for tier in tiers
    }
    sandboxes = {tier: _sandbox.Sandbox(tier) for tier in tiers}
    verifiers = {tier: rewards.load("code", {"sandbox": tier, "timeout": 1.0}) for tier in tiers}
    with Bar("sandboxes", (rounds + 1) * len(tiers), "turns") as bar:
        for number in range(rounds + 1):
            for tier in rotated(tiers, number):
                one = one_after_another(sandboxes[tier])
                whole = batch(verifiers[tier], rows, 0)
                beside = batch(verifiers[tier], rows, COMPLETIONS // 100)
                if number:  # round 0 warms up
                    for name, value in zip(seconds[tier], (one, whole, beside), strict=True):
                        seconds[tier][name].append(value)
                bar.advance(1)
    for sandbox in sandboxes.values():
        sandbox.close()
    return {
        "workers": _workers.size(),
        "completions": COMPLETIONS,
        "missing": {tier: probes[tier].reason for tier in _sandbox.TIERS if not probes[tier].holds},
        "tiers": {
            tier: {f"{name}_seconds": statistics.median(values) for name, values in of_tier.items()}
            for tier, of_tier in seconds.items()
        },
    }


def main() -> None:
    """Run the benchmark, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each tier (default 5)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sandbox.json"))
    options = parser.parse_args()
    before = os.getloadavg()[0]
    found = measure(options.rounds)
    load = {"before": before, "after": os.getloadavg()[0]}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_json(options.output, {**found, "load": load, "machine": machine(1), "versions": versions()})
    table = Table("tier", "ms per program", "programs/s", "verdicts/s", "verdicts/s, 1 % endless")
    for tier, of_tier in found["tiers"].items():
        one, whole, beside = of_tier.values()
        table.add_row(tier, f"{1000 * one:.0f}", f"{1 / one:.0f}", f"{1 / whole:.0f}", f"{1 / beside:.0f}")
    console = Console()
    console.print(table)
    for tier, reason in found["missing"].items():
        console.print(f"{tier} is left out: {reason}")


if __name__ == "__main__":
    main()
