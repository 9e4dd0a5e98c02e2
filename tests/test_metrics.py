"""The estimators of posttrain.evaluation.metrics against hand arithmetic, enumeration and exact fractions."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from posttrain.evaluation.metrics import (
    answer_entropy,
    bootstrap_interval,
    distinct_correct,
    gain,
    majority,
    paired_difference,
    pass_at_k,
    pass_pow_k,
    ratio_interval,
    retention,
    self_retention,
)


def test_pass_at_k_by_hand() -> None:
    # n = 4, c = 2, k = 2: of the 6 pairs one holds no correct answer
    assert pass_at_k(4, 2, 2) == 5 / 6
    # the plug-in 1 − (1 − c/n)^k would say 0.75
    assert pass_at_k(4, 2, 2) != pytest.approx(0.75, abs=0.05)
    assert pass_pow_k(4, 2, 2) == 1 / 6


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_against_every_subset(n: int) -> None:
    for c in range(n + 1):
        answers = [i < c for i in range(n)]
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(answers, k))
            assert pass_at_k(n, c, k) == sum(any(s) for s in subsets) / len(subsets)
            assert pass_pow_k(n, c, k) == sum(all(s) for s in subsets) / len(subsets)


@pytest.mark.parametrize(
    ("n", "c", "k"), [(1024, 1, 1), (1024, 3, 64), (4096, 2, 512), (2000, 900, 2), (5000, 1, 4999)]
)
def test_large_n_to_full_precision(n: int, c: int, k: int) -> None:
    missed = Fraction(1)
    for i in range(n - c + 1, n + 1):
        missed *= 1 - Fraction(k, i)
    exact = 1 - missed
    assert abs(Fraction(pass_at_k(n, c, k)) / exact - 1) < Fraction(1, 10**15)


def test_arrays_agree_with_scalars() -> None:
    n, c = np.array([8, 8, 9, 8]), np.array([0, 3, 3, 8])
    assert pass_at_k(n, c, 4).tolist() == [pass_at_k(int(a), int(b), 4) for a, b in zip(n, c, strict=True)]
    assert pass_at_k(n, c, 4)[[0, 3]].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("n", "c", "k", "words"),
    [
        (4, 1, 5, r"k = 5 with n = 4"),
        (4, 1, 0, r"k = 0"),
        (4, 5, 1, r"c = 5 of n = 4"),
        (4, -1, 1, r"c = -1"),
        (4, 0.5, 1, r"must be an integer"),
    ],
)
def test_impossible_counts_are_refused(n: int, c: int, k: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pass_at_k(n, c, k)


def test_unbiased_where_the_plug_in_is_not() -> None:
    p, n, k = 0.1, 8, 4
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    mean = sum(w * pass_at_k(n, c, k) for c, w in enumerate(weights))
    assert mean == pytest.approx(1 - (1 - p) ** k, rel=1e-12)


def test_distinct_correct_against_every_subset() -> None:
    answers, correct = ["a", "a", "a", "b", "c", "x"], [True, True, True, True, True, False]
    for draws in range(1, 7):
        subsets = list(itertools.combinations(range(6), draws))
        mean = sum(len({answers[i] for i in s if correct[i]}) for s in subsets) / len(subsets)
        assert distinct_correct([answers], [correct], draws)[0] == pytest.approx(mean, rel=1e-14)
    assert distinct_correct([answers], [correct]).tolist() == [3.0]
    with pytest.raises(ValueError, match="7 draws"):
        distinct_correct([answers], [correct], 7)


def test_majority() -> None:
    votes = [["1", "1", "2", None, None, None], ["1", "2"], [None, None], ["1", "2", "2"]]
    right = [[True, True, False, False, False, False], [True, False], [False, False], [True, False, False]]
    # None outnumbers but never votes; a tie of right and wrong is worth ½; nobody votes: 0; the wrong answer leads: 0
    assert majority(votes, right).tolist() == [1.0, 0.5, 0.0, 0.0]


def test_answer_entropy() -> None:
    # ¼, ¾ and a None that does not count; one certain answer; none at all
    expected = [-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)), 0.0, 0.0]
    assert answer_entropy([["a", "b", "b", "b", None], ["a", "a"], [None]]) == pytest.approx(expected, rel=1e-14)


def test_bootstrap_covers_the_truth() -> None:
    generator = np.random.default_rng(5)
    # 400 surveys of 60 problems, p ~ Beta(½, ½) with mean ½, 8 answers each: 95 % nominal, ±2.5 points of simulation
    hits = 0
    for survey in range(400):
        solved = generator.binomial(8, generator.beta(0.5, 0.5, size=60)) / 8
        estimate = bootstrap_interval(solved, resamples=400, seed=survey)
        hits += estimate.low <= 0.5 <= estimate.high
    assert 0.915 <= hits / 400 <= 0.975


def test_bootstrap_width_is_that_of_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(size=500)
    estimate = bootstrap_interval(values, resamples=4000, confidence=0.9, seed=1)
    assert estimate.value == pytest.approx(values.mean(), rel=1e-12)
    # 2 · 1.645 · σ/√n
    assert estimate.high - estimate.low == pytest.approx(2 * 1.645 * values.std() / np.sqrt(500), rel=0.06)
    assert estimate == bootstrap_interval(values, resamples=4000, confidence=0.9, seed=1)
    assert estimate != bootstrap_interval(values, resamples=4000, confidence=0.9, seed=2)


def test_blocks_of_resamples_are_all_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.evaluation.metrics._BLOCK", 7 * 50)
    values = np.random.default_rng(0).normal(size=50)
    blocked = bootstrap_interval(values, resamples=1000, seed=1)
    # 1,000 = 142 · 7 + 6: a block that was left empty would show as NaN ratios and a changed width
    assert blocked.high - blocked.low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(50), rel=0.12)


def test_pairing_narrows_the_interval() -> None:
    generator = np.random.default_rng(2)
    difficulty = generator.uniform(size=200)
    before, after = difficulty + generator.normal(0, 0.05, 200), difficulty + 0.02 + generator.normal(0, 0.05, 200)
    paired = paired_difference(after, before, seed=3)
    left, right = bootstrap_interval(after, seed=3), bootstrap_interval(before, seed=4)
    unpaired = math.hypot(left.high - left.low, right.high - right.low)
    assert paired.value == pytest.approx(float(after.mean() - before.mean()), rel=1e-9)
    # σ of the difference: 0.05·√2 against √(2·(1/12 + 0.05²)) = 0.41, a factor of about 6
    assert paired.high - paired.low < unpaired / 4
    assert paired.excludes_zero
    assert not paired_difference(before, before, seed=3).excludes_zero
    with pytest.raises(ValueError, match="same problems"):
        paired_difference(after, before[:-1])


def test_means_over_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no problems"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="not finite"):
        bootstrap_interval([0.5, float("nan")])


def test_retention_and_gain_by_hand() -> None:
    base, now = np.array([1.0, 0.5, 0.0]), np.array([0.5, 1.0, 0.25])
    kept, won = retention(base, now), gain(base, now)
    assert kept is not None
    assert won is not None
    # (1·½ + ½·1 + 0) / 1.5 and (0 + ½·1 + 1·¼) / 1.5
    assert kept.value == pytest.approx(2 / 3, rel=1e-15)
    assert won.value == pytest.approx(1 / 2, rel=1e-15)
    assert kept.low < kept.value < kept.high
    assert retention(np.zeros(3), now) is None
    assert gain(np.ones(3), now) is None


def test_ratio_leaves_out_resamples_without_a_denominator() -> None:
    # one problem of three was solved at the start: (2/3)³ = 30 % of the resamples miss it, the others all say ½
    kept = retention(np.array([1.0, 0.0, 0.0]), np.array([0.5, 1.0, 1.0]))
    assert kept == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="both sides"):
        ratio_interval([1.0], [1.0, 2.0])


def test_self_retention_is_that_of_two_disjoint_draws() -> None:
    n, c, k = 6, 2, 2
    answers = [i < c for i in range(n)]
    both = once = 0
    for first in itertools.combinations(range(n), k):
        for second in itertools.combinations([i for i in range(n) if i not in first], k):
            once += any(answers[i] for i in first)
            both += any(answers[i] for i in first) and any(answers[i] for i in second)
    estimate = self_retention(np.array([n]), np.array([c]), k)
    assert estimate is not None
    assert estimate.value == pytest.approx(both / once, rel=1e-14)
    # the same answers twice would claim more
    assert estimate.value < pass_at_k(n, c, k)
    with pytest.raises(ValueError, match="k = 4 with n = 3"):
        self_retention(np.array([3]), np.array([1]), 2)
