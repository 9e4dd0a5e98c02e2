"""What policies do problem by problem, and the mean over those that differ only in their seed.

A number of a pool is the mean over its seeds, and its intervals and paired differences resample problems after that
mean was taken within each problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from posttrain.evaluation import metrics
from posttrain.evaluation.evaluate import EvaluationResult
from posttrain.evaluation.measures import Measured
from posttrain.evaluation.metrics import Estimate, Floats

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class PerProblem:
    """A metric that is a mean over problems of these values; the same calls as `measures.Measured`."""

    values: Floats

    def estimate(self, **bootstrap: Any) -> Estimate:
        """As `metrics.bootstrap_interval`."""
        return metrics.bootstrap_interval(self.values, **bootstrap)

    def difference(self, base: PerProblem, **bootstrap: Any) -> Estimate:
        """As `metrics.paired_difference`, self − base."""
        return metrics.paired_difference(self.values, base.values, **bootstrap)


Metric = PerProblem | Measured


def paired(a: Metric, b: Metric, bootstrap: Mapping[str, Any]) -> Estimate | None:
    """a − b on the same problems; None if either measured nothing."""
    if isinstance(a, PerProblem) and isinstance(b, PerProblem):
        return a.difference(b, **bootstrap)
    if isinstance(a, Measured) and isinstance(b, Measured):
        return a.difference(b, **bootstrap)
    raise TypeError("Two metrics of one name are of one kind.")


def pooled(metric: Sequence[Metric]) -> Metric:
    """One metric of several seeds as one whose value is the mean of theirs, problem by problem.

    Σ top / Σ bottom of each seed is scaled to a denominator of 1 and summed; the bins of calibration errors stand side
    by side, so that errors of opposite sign do not cancel between seeds.
    """
    first = metric[0]
    if len(metric) == 1:
        return first
    if isinstance(first, PerProblem):
        return PerProblem(np.mean([one.values for one in metric if isinstance(one, PerProblem)], axis=0))
    seeds = [one for one in metric if isinstance(one, Measured)]
    totals = [one.bottom.sum() for one in seeds]
    if min(totals) <= 0:
        return replace(first, bottom=np.zeros_like(first.bottom), bins=())
    tops = [one.top / total for one, total in zip(seeds, totals, strict=True)]
    return replace(
        first,
        top=np.concatenate(tops, axis=1) if first.top.ndim == 2 else np.sum(tops, axis=0),
        bottom=np.sum([one.bottom / total for one, total in zip(seeds, totals, strict=True)], axis=0),
        bins=(),
    )


@dataclass(frozen=True, eq=False)
class Policy:
    """What one evaluation says per problem, or the mean over the evaluations of a pool.

    Attributes:
        results: the evaluations.
        solved: pass@k of every problem by k, NaN where a run has too few verdicts.
        metrics: pass@1, pass@(largest k), distinct_correct and the further measures.
    """

    results: list[EvaluationResult]
    solved: dict[int, Floats]
    metrics: dict[str, Metric]

    def sum(self, name: str) -> Floats:
        """A count per problem, summed over the evaluations."""
        total: Floats = np.sum([getattr(result, name) for result in self.results], axis=0, dtype=np.float64)
        return total

    def minus(self, base: Policy, bootstrap: Mapping[str, Any]) -> dict[str, Estimate]:
        """Paired differences to the base, by metric; without those that either did not measure."""
        differences = {
            name: paired(metric, base.metrics[name], bootstrap)
            for name, metric in self.metrics.items()
            if name in base.metrics
        }
        return {name: estimate for name, estimate in differences.items() if estimate is not None}


def policy(
    result: EvaluationResult,
    ks: Sequence[int],
    enough: Mapping[int, Mask],
    draws: int,
    measures: Mapping[str, Measured],
) -> Policy:
    """The policy of one evaluation.

    Args:
        result: the evaluation.
        ks: headline k, increasing; empty without a verifier.
        enough: by k, the problems that have k verdicts in every run.
        draws: answers that `distinct_correct` is rarefied to.
        measures: further measures by name.
    """
    solved = {k: _solved(result, k, mask) for k, mask in enough.items()}
    found: dict[str, Metric] = {f"pass@{k}": PerProblem(solved[k][enough[k]]) for k in extremes(ks)}
    if ks:
        kept = np.flatnonzero(enough[ks[-1]])
        found["distinct_correct"] = PerProblem(
            metrics.distinct_correct([result.answers[i] for i in kept], [result.correct[i] for i in kept], draws)
        )
    return Policy([result], solved, found | dict(measures))


def mean(policies: Sequence[Policy]) -> Policy:
    """The pool of some policies; metrics that only some of them have are left out."""
    first = policies[0]
    if len(policies) == 1:
        return first
    return Policy(
        results=[result for policy in policies for result in policy.results],
        solved={k: np.mean([policy.solved[k] for policy in policies], axis=0) for k in first.solved},
        metrics={
            name: pooled([policy.metrics[name] for policy in policies])
            for name in first.metrics
            if all(name in policy.metrics for policy in policies)
        },
    )


def extremes(ks: Sequence[int]) -> list[int]:
    """1 and the largest k: accuracy, and what the policy can still find."""
    return sorted({1, ks[-1]}) if ks else []


def _solved(result: EvaluationResult, k: int, mask: Mask) -> Floats:
    values = np.full(len(mask), np.nan)
    values[mask] = metrics.pass_at_k(result.n[mask], result.c[mask], k)
    return values
