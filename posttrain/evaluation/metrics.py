"""Estimators of what a policy solves, and their intervals.

Letters: a problem has n judged answers, c of them correct; k answers are what a user would draw. Every estimator is
per problem; `bootstrap_interval`, `paired_difference` and `ratio_interval` turn values per problem into one number
with an interval.

The intervals resample problems. A value per problem already carries the noise of the answers drawn for it, so they
cover both sources: which problems were asked and which answers were drawn. They do not cover what another training
seed would have given.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.float64]

_BLOCK = 2_000_000
"""Resampled problems held in memory at once."""


class Estimate(NamedTuple):
    """A number and the ends of its interval, in the unit of the number."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """True when the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


@overload
def pass_at_k(n: int, c: int, k: int) -> float: ...
@overload
def pass_at_k(n: Counts, c: Counts, k: int) -> Floats: ...
def pass_at_k(n: int | Counts, c: int | Counts, k: int) -> float | Floats:
    """Probability that at least one of k answers is correct: 1 − C(n−c, k) / C(n, k).

    Unbiased for 1 − (1 − p)^k where each answer is correct with probability p; k = 1 is avg@n. The binomials are
    integers and are divided once, so the result is the correctly rounded quotient.

    Raises:
        ValueError: a count is no integer, c is not within [0, n], or k is not within [1, n].

    Source: Chen et al., arXiv 2107.03374, Eq. 1. Differs: exact integers in place of its product form.
    """
    return _share_of_subsets(lambda total, right: math.comb(total, k) - math.comb(total - right, k), n, c, k)


@overload
def pass_pow_k(n: int, c: int, k: int) -> float: ...
@overload
def pass_pow_k(n: Counts, c: Counts, k: int) -> Floats: ...
def pass_pow_k(n: int | Counts, c: int | Counts, k: int) -> float | Floats:
    """pass^k, the probability that all of k answers are correct: C(c, k) / C(n, k); unbiased for p^k.

    Raises:
        ValueError: as for `pass_at_k`.

    Source: τ-bench, arXiv 2406.12045. Differs: nothing.
    """
    return _share_of_subsets(lambda _, right: math.comb(right, k), n, c, k)


def _share_of_subsets(
    favourable: Callable[[int, int], int], n: int | Counts, c: int | Counts, k: int
) -> float | Floats:
    """favourable(n, c) / C(n, k) for every pair, computed once per distinct pair."""
    total, right = np.broadcast_arrays(np.asarray(n), np.asarray(c))
    for name, counts in (("n", total), ("c", right)):
        if not np.issubdtype(counts.dtype, np.integer):
            raise ValueError(f"{name} counts answers and must be an integer, got {counts.dtype}.")
    if np.any(right < 0) or np.any(right > total):
        worst = int(np.flatnonzero((right < 0) | (right > total))[0])
        raise ValueError(f"c must lie within [0, n], got c = {right.flat[worst]} of n = {total.flat[worst]}.")
    if k < 1 or np.any(total < k):
        fewest = int(total.min(initial=k))
        raise ValueError(f"k must lie within [1, n], got k = {k} with n = {fewest}: draw more answers or lower k.")
    pairs, where = np.unique(np.stack([total.ravel(), right.ravel()], axis=1), axis=0, return_inverse=True)
    shares = np.array([favourable(a, b) / math.comb(a, k) for a, b in pairs.tolist()], dtype=np.float64)
    result = shares[where.reshape(-1)].reshape(total.shape)
    return float(result) if result.ndim == 0 else result


def distinct_correct(
    answers: Sequence[Sequence[Hashable]], correct: Sequence[Sequence[bool]], draws: int | None = None
) -> Floats:
    """Expected number of distinct correct answers among `draws` answers to each problem; all of them by default.

    Rarefaction: Σ over distinct correct answers j of 1 − C(n − m_j, draws) / C(n, draws), where m_j of the n answers
    are j. It makes problems and runs with unequal n comparable.

    Raises:
        ValueError: a problem has fewer than `draws` answers.

    Source: Hurlbert, Ecology 52 (1971) 577–586. Differs: wrong answers are drawn but not counted.
    """
    values = []
    for given, right in zip(answers, correct, strict=True):
        counts = Counter(answer for answer, is_right in zip(given, right, strict=True) if is_right)
        if draws is None:
            values.append(float(len(counts)))
        elif draws > len(given):
            raise ValueError(f"{draws} draws were asked for but a problem has {len(given)} answers: draw fewer.")
        else:
            values.append(math.fsum(pass_at_k(len(given), count, draws) for count in counts.values()))
    return np.array(values, dtype=np.float64)


def majority(answers: Sequence[Sequence[Hashable | None]], correct: Sequence[Sequence[bool]]) -> Floats:
    """maj@n: probability that the most frequent answer to each problem is correct; 0 where nobody votes.

    None never votes; ties are broken by expectation. An answer that was judged both ways counts by its share.

    Source: self-consistency, arXiv 2203.11171. Differs: ties by expectation.
    """
    values = []
    for given, right in zip(answers, correct, strict=True):
        votes: Counter[Hashable] = Counter()
        hits: Counter[Hashable] = Counter()
        for answer, is_right in zip(given, right, strict=True):
            if answer is not None:
                votes[answer] += 1
                hits[answer] += bool(is_right)
        most = max(votes.values(), default=0)
        leaders = [answer for answer, count in votes.items() if count == most]
        values.append(math.fsum(hits[answer] / most for answer in leaders) / len(leaders) if leaders else 0.0)
    return np.array(values, dtype=np.float64)


def answer_entropy(answers: Sequence[Sequence[Hashable | None]]) -> Floats:
    """Entropy of the empirical distribution of answers to each problem, in nats; None is no answer and is left out.

    The plug-in estimate −Σ (m_j/n) log (m_j/n), biased downwards: compare it at equal n only. 0 without any answer.
    """
    values = []
    for given in answers:
        counts = Counter(answer for answer in given if answer is not None)
        total = counts.total()
        values.append(-math.fsum(m / total * math.log(m / total) for m in counts.values()))
    return np.abs(np.array(values, dtype=np.float64))  # −0.0 of a certain answer prints badly


def bootstrap_interval(
    values: npt.ArrayLike, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """Mean over problems of a value per problem, with the percentile bootstrap interval over problems.

    One seed draws the same problems for every call with as many problems.

    Raises:
        ValueError: there is no problem, or a value is not finite.
    """
    numbers = np.asarray(values, dtype=np.float64)
    estimate = ratio_interval(numbers, np.ones_like(numbers), resamples=resamples, confidence=confidence, seed=seed)
    if estimate is None:
        raise ValueError("A mean over no problems was asked for: give at least one value.")
    return estimate


def paired_difference(
    a: npt.ArrayLike, b: npt.ArrayLike, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """Mean of a − b over the same problems, with its bootstrap interval: what problems share cancels.

    Raises:
        ValueError: a and b have unequal lengths, or as for `bootstrap_interval`.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"Paired values must be of the same problems, got {first.shape} and {second.shape}.")
    return bootstrap_interval(first - second, resamples=resamples, confidence=confidence, seed=seed)


def ratio_interval(
    numerator: npt.ArrayLike,
    denominator: npt.ArrayLike,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate | None:
    """Σ numerator / Σ denominator over problems, with the percentile bootstrap interval; None when Σ denominator ≤ 0.

    Resamples whose denominator vanishes say nothing of the ratio and are left out of the percentiles.

    Raises:
        ValueError: the two have unequal lengths, or a value is not finite.
    """
    top, bottom = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    if top.shape != bottom.shape or top.ndim != 1:
        raise ValueError(f"A value per problem is wanted on both sides, got shapes {top.shape} and {bottom.shape}.")
    if not (np.isfinite(top).all() and np.isfinite(bottom).all()):
        raise ValueError("A value per problem is not finite: leave that problem out before averaging.")
    if bottom.sum() <= 0:
        return None
    generator = np.random.default_rng(seed)
    ratios = np.full(resamples, np.nan)
    rows = max(1, _BLOCK // len(top))
    for start in range(0, resamples, rows):
        drawn = generator.integers(len(top), size=(min(rows, resamples - start), len(top)))
        below = bottom[drawn].sum(axis=1)
        np.divide(top[drawn].sum(axis=1), below, out=ratios[start : start + rows], where=below > 0)
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(ratios, [tail, 1 - tail])
    return Estimate(float(top.sum() / bottom.sum()), float(low), float(high))


def retention(
    base: Floats, now: Floats, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Estimate | None:
    """P(solved@k now | solved@k at the start) = Σ base·now / Σ base, from pass@k per problem; None when Σ base is 0.

    A problem is drawn uniformly, then k answers of either policy independently. Both factors are unbiased, and so is
    their product as long as the two policies' answers were drawn independently of each other: a policy against its
    own answers needs `self_retention`.
    """
    return ratio_interval(base * now, base, resamples=resamples, confidence=confidence, seed=seed)


def gain(
    base: Floats, now: Floats, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Estimate | None:
    """P(solved@k now | unsolved@k at the start) = Σ (1 − base)·now / Σ (1 − base); None when the denominator is 0.

    Same draws, same condition as `retention`.
    """
    return ratio_interval((1 - base) * now, 1 - base, resamples=resamples, confidence=confidence, seed=seed)


def self_retention(
    n: Counts, c: Counts, k: int, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Estimate | None:
    """Retention of a policy by itself, in two disjoint draws of k: what `retention` would be if nothing had changed.

    P(both draws solve) = 2 pass@k − pass@2k, since P(neither) = 1 − pass@2k.

    Raises:
        ValueError: a problem has n < 2k.
    """
    once = pass_at_k(n, c, k)
    both = 2 * once - pass_at_k(n, c, 2 * k)
    return ratio_interval(both, once, resamples=resamples, confidence=confidence, seed=seed)
