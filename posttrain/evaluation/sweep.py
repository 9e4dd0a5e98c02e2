"""What a sweep varied, and the order of its pools in a metric."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from posttrain.errors import UserError, did_you_mean
from posttrain.evaluation.compare import Comparison, Pool, compared, difference, unit_of, value_of
from posttrain.evaluation.metrics import Estimate
from posttrain.evaluation.wording import in_words, numbers


def swept(comparison: Comparison) -> dict[str, Pool]:
    """The pools that a sweep set: neither the base nor a baseline."""
    return {name: pool for name, pool in comparison.pools.items() if pool.settings}


def shared_settings(comparison: Comparison) -> list[str]:
    """The settings that every pool of the sweep has."""
    pools = list(swept(comparison).values())
    return [key for key in pools[0].settings if all(key in pool.settings for pool in pools)] if pools else []


def varied(comparison: Comparison) -> list[str]:
    """The settings that every pool of the sweep has, and that differ between some of them."""
    pools = swept(comparison).values()
    return [key for key in shared_settings(comparison) if len(distinct(pool.settings[key] for pool in pools)) > 1]


def leading(comparison: Comparison) -> str | None:
    """The setting whose values are ordered: the divergence, or the first one that the sweep varied."""
    found = varied(comparison)
    return "divergence" if "divergence" in found else next(iter(found), None)


def distinct(values: Iterable[Any]) -> list[Any]:
    """Distinct values, hashable or not, in the order of their first appearance."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


@dataclass(frozen=True)
class Ordering:
    """Pools that differ in one setting of a sweep, in the order of a metric.

    Attributes:
        metric: its name.
        at: the settings that they share.
        pools: their names, from the highest to the lowest value.
        values: of the metric, means over seeds.
        steps: paired difference of each to the next; the order of the two is significant when it excludes 0.
        words: the same in one line, in the unit of the metric: `js (34.1) > alpha 0.5 (33.4) ≈ forward_kl (33.0)`,
            where > is a significant step and ≈ is none.
    """

    metric: str
    at: dict[str, Any]
    pools: list[str]
    values: list[float]
    steps: list[Estimate]
    words: str


def ordering(comparison: Comparison, metric: str, by: str = "divergence") -> list[Ordering]:
    """The order of a metric along one setting of a sweep, for every combination of the other settings.

    A setting that only some runs have, like the α of the α-divergence, belongs to the value of `by`.

    Raises:
        UserError: the sweep did not set `by`, or no pool has such a metric.
    """
    common = shared_settings(comparison)
    if by not in common:
        raise UserError(f"The sweep did not vary '{by}'{did_you_mean(by, common)}")
    values = {
        name: estimate for name, pool in swept(comparison).items() if (estimate := value_of(pool, metric)) is not None
    }
    if not values:
        known = {metric for run in comparison.values.values() for metric in run}
        raise UserError(f"No run of the sweep has the metric '{metric}'{did_you_mean(metric, known)}")
    unit = unit_of(comparison, metric)
    at = {name: {key: comparison.settings(name)[key] for key in common if key != by} for name in values}
    found = []
    for place in distinct(at.values()):
        names = sorted((name for name in values if at[name] == place), key=lambda name: -values[name].value)
        steps = [
            step for a, b in itertools.pairwise(names) if (step := difference(comparison, metric, a, b)) is not None
        ]
        words = ""
        for name, step in itertools.zip_longest(names, steps):
            own = {key: value for key, value in comparison.settings(name).items() if key not in place}
            words += f"{in_words(own)} ({numbers(values[name], unit)[0]})"
            if step is not None:
                words += " > " if step.low > 0 else " ≈ "
        found.append(Ordering(metric, place, names, [values[name].value for name in names], steps, words))
    return found


def orderings(comparison: Comparison) -> list[Ordering]:
    """The orders along the setting that matters most, of the headline metrics; none outside a sweep over settings."""
    by = leading(comparison)
    if by is None:
        return []
    present = [
        metric
        for metric in compared(comparison)
        if any(value_of(pool, metric) is not None for pool in swept(comparison).values())
    ]
    return [one for metric in present for one in ordering(comparison, metric, by) if len(one.pools) > 1]
