"""What the benchmarks share: contestants take turns, and are compared round by round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import TypeVar

Thing = TypeVar("Thing")


def rotated(contestants: Sequence[Thing], number: int) -> list[Thing]:
    """All contestants in the order of round `number`: each comes first in its turn."""
    first = number % len(contestants)
    return [*contestants[first:], *contestants[:first]]


def quartiles(one: Iterable[float], other: Iterable[float]) -> dict[str, float]:
    """Median and quartiles of one / other over rounds; both measured in the same round, so that its load cancels."""
    low, middle, high = statistics.quantiles((a / b for a, b in zip(one, other, strict=True)), n=4)
    return {"median": middle, "q1": low, "q3": high}


def spread(numbers: dict[str, float]) -> tuple[str, str]:
    """`quartiles` as two cells of a table."""
    return f"{numbers['median']:.3f}", f"{numbers['q1']:.3f} – {numbers['q3']:.3f}"


def timed(make: Callable[[], Thing]) -> tuple[float, Thing]:
    """Seconds, and what came out."""
    start = perf_counter()
    made = make()
    return perf_counter() - start, made
