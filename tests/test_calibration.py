"""Calibration: errors by hand, from the scores of two policies on held-out pairs, and their intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from posttrain.errors import UserError
from posttrain.evaluation import calibration, measures
from posttrain.evaluation.calibration import Implied, expected_calibration_error
from posttrain.recipe import Calibration
from posttrain.rollouts.engine import Score


class Killed(Exception):
    """The process dies."""


@dataclass(frozen=True)
class Pair:
    problem: int
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]


class Scorer:
    """Gives every token of an answer the log-probability −(its id)/`scale`; dies at the call number `dies_at`."""

    name = "scorer"

    def __init__(self, scale: float, dies_at: int | None = None) -> None:
        self.scale, self.dies_at, self.calls = scale, dies_at, 0
        self.fingerprint = f"f{scale}"

    def score(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        if self.calls == self.dies_at:
            raise Killed
        self.calls += 1
        return [Score([-token / self.scale for token in answer]) for _, answer in sequences]


PAIRS = [
    Pair(0, (1,), (1, 1), (4,)),
    Pair(0, (1,), (2,), (1, 1)),
    Pair(2, (1, 2), (6,), (2, 2)),
    Pair(3, (1,), (3, 1, 2), (6, 2)),
]


def score(engine: Any, folder: Path, pairs: Sequence[Any] = PAIRS, **changes: Any) -> None:
    arguments = {"problems": 5, "batch_size": 2, "folder": folder, "label": "policy"} | changes
    calibration.measure(engine, pairs, **arguments)


def both(tmp_path: Path, implied: Implied | None, bins: int = 3) -> dict[str, measures.Measured]:
    """The measures of a policy at scale 1 whose initial policy is at scale 2: d = −(sum of ids)/2."""
    base, run = tmp_path / "base", tmp_path / "run"
    score(Scorer(2), base)
    calibration.finish(base, base, Calibration(bins=bins), None)
    score(Scorer(1), run)
    calibration.finish(run, base, Calibration(bins=bins), implied)
    return measures.load(run)


def value(measured: measures.Measured) -> float:
    estimate = measured.estimate()
    assert estimate is not None
    return estimate.value


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ------------------------------------------------------------------ the error itself


def test_ece_by_hand() -> None:
    # bins [1/2, 2/3), [2/3, 5/6), [5/6, 1]; 1/2 falls into the first, 1 into the last
    confidence = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    right = np.array([0.5, 0.0, 1.0, 1.0, 1.0, 0.0])
    # |0.5 − 1.1| + |2 − 1.5| + |1 − 1.9| = 0.6 + 0.5 + 0.9
    assert expected_calibration_error(confidence, right, 3) == pytest.approx(2.0 / 6, abs=1e-12)
    assert expected_calibration_error(confidence, right, 1) == pytest.approx(1.0 / 6, abs=1e-12)  # |3.5 − 4.5| / 6
    # an inner edge opens the upper bin: 0.75 of two bins belongs to [0.75, 1]: |0 − 0.7| + |1 − 0.75|
    assert expected_calibration_error(np.array([0.7, 0.75]), np.array([0.0, 1.0]), 2) == pytest.approx(0.95 / 2)
    assert expected_calibration_error(np.ones(3), np.ones(3), 10) == 0
    assert expected_calibration_error(np.full(3, 0.5), np.full(3, 0.5), 10) == 0


def test_ece_against_a_loop_over_bins() -> None:
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.5, 1, size=500)
    right = (generator.random(500) < 0.7).astype(float)
    wanted = 0.0
    for low in np.arange(0.5, 1, 0.05):
        inside = (confidence >= low) & (confidence < low + 0.05)
        wanted += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert expected_calibration_error(confidence, right, 10) == pytest.approx(wanted, abs=1e-12)


def test_ece_of_calibrated_choices_is_small_and_of_others_is_not() -> None:
    generator = np.random.default_rng(1)
    confidence = generator.uniform(0.5, 1, size=200_000)
    right = (generator.random(200_000) < confidence).astype(float)
    assert expected_calibration_error(confidence, right, 10) < 0.01
    # twice as sure as it is right: the mean of |c − (½ + (c − ½)/2)| over c in [½, 1] is 1/8
    humble = (generator.random(200_000) < 0.5 + (confidence - 0.5) / 2).astype(float)
    assert expected_calibration_error(confidence, humble, 10) == pytest.approx(0.125, abs=0.01)


@pytest.mark.parametrize("bad", [[0.4], [1.1], [math.nan], []])
def test_ece_refuses_what_is_no_confidence(bad: list[float]) -> None:
    with pytest.raises(ValueError, match=r"within \[0\.5, 1\]"):
        expected_calibration_error(np.array(bad), np.ones(len(bad)), 3)


# ------------------------------------------------------------------ from scores


def test_preferences_by_hand(tmp_path: Path) -> None:
    found = both(tmp_path, Implied("reverse_kl", 0.5))
    assert list(found) == ["preference_accuracy", "preference_margin", "ece_bradley_terry", "ece_likelihood"]
    # d = −(sum of ids)/2: (−1, −2) right, (−1, −1) a tie, (−3, −2) wrong, (−3, −4) right; margins 1, 0, −1, 1
    assert value(found["preference_accuracy"]) == 2.5 / 4
    assert value(found["preference_margin"]) == 0.25
    assert found["preference_margin"].bottom.tolist() == [2, 0, 1, 1, 0]
    # σ(½ · margin): sure by σ(½) = 0.62 three times, right twice, and once by ½ with right ½; all in the first bin
    sure = sigmoid(0.5)
    assert value(found["ece_bradley_terry"]) == pytest.approx(abs(2.5 - 3 * sure - 0.5) / 4, abs=1e-12)
    # mean log π: (−1, −4) → σ(3) right, (−2, −1) → σ(1) wrong, (−6, −2) → σ(4) wrong, (−2, −4) → σ(2) right
    # bins: σ(1) = 0.73 in [2/3, 5/6), the others above
    wanted = (sigmoid(1) + abs(2 - sigmoid(3) - sigmoid(4) - sigmoid(2))) / 4
    assert value(found["ece_likelihood"]) == pytest.approx(wanted, abs=1e-12)

    plot = found["ece_likelihood"].bins
    assert [(one.low, one.high, one.count) for one in plot] == [
        (0.5, pytest.approx(2 / 3), 0),
        (pytest.approx(2 / 3), pytest.approx(5 / 6), 1),
        (pytest.approx(5 / 6), 1.0, 3),
    ]
    assert math.isnan(plot[0].accuracy)
    assert plot[2].accuracy == pytest.approx(2 / 3)
    assert plot[2].confidence == pytest.approx((sigmoid(3) + sigmoid(4) + sigmoid(2)) / 3)
    assert found["ece_likelihood"].top.shape == (5, 3)
    assert "NaN" not in (tmp_path / "run" / "measures" / "calibration.json").read_text()

    initial = measures.load(tmp_path / "base")
    assert list(initial) == ["ece_likelihood"]  # no log-ratio to itself
    # half the log-odds: σ(½) = .62 wrong; σ(1) = .73 and σ(3/2) = .82 right; σ(2) = .88 wrong
    halves = sigmoid(0.5) + abs(2 - sigmoid(1) - sigmoid(1.5)) + sigmoid(2)
    assert value(initial["ece_likelihood"]) == pytest.approx(halves / 4, abs=1e-12)


def test_the_implicit_reward_is_that_of_the_runs_own_divergence(tmp_path: Path) -> None:
    # forward KL: s(d) = 1 − e^{−d}; alpha ½: s(d) = 2 (1 − e^{−d/2}); d as above
    for place, (implied, s) in enumerate(
        (
            (Implied("forward_kl", 0.1), lambda d: -math.expm1(-d)),
            (Implied("alpha", 0.3, alpha=0.5), lambda d: -2 * math.expm1(-d / 2)),
            (Implied("js", 2.0), lambda d: math.log(2) - math.log1p(math.exp(-d))),
        )
    ):
        odds = [implied.beta * (s(w) - s(v)) for w, v in ((-1, -2), (-1, -1), (-3, -2), (-3, -4))]
        confidence = np.array([sigmoid(abs(one)) for one in odds])
        right = np.array([1.0, 0.5, 0.0, 1.0])
        found = both(tmp_path / str(place), implied, bins=10)
        wanted = expected_calibration_error(confidence, right, 10)
        assert value(found["ece_bradley_terry"]) == pytest.approx(wanted, abs=1e-6)
    assert "ece_bradley_terry" not in both(tmp_path / "none", None)


def many(count: int) -> list[Pair]:
    generator = np.random.default_rng(3)
    draws = generator.integers(1, 9, size=(count, 4)).tolist()
    return [Pair(index // 2, (1,), (a, b), (c, d)) for index, (a, b, c, d) in enumerate(draws)]


def test_the_interval_of_ece_resamples_problems_and_their_bins(tmp_path: Path) -> None:
    pairs = many(120)
    score(Scorer(4), tmp_path, pairs, problems=60, batch_size=64)
    calibration.finish(tmp_path, tmp_path, Calibration(bins=5), None)
    measured = measures.load(tmp_path)["ece_likelihood"]
    odds = np.array([(sum(pair.rejected_ids) - sum(pair.chosen_ids)) / 8 for pair in pairs])
    confidence, right = 1 / (1 + np.exp(-np.abs(odds))), (np.sign(odds) + 1) / 2

    def error(drawn: Any) -> float:
        rows = np.concatenate([[2 * problem, 2 * problem + 1] for problem in drawn])
        return expected_calibration_error(confidence[rows], right[rows], 5)

    estimate = measured.estimate(resamples=4000)
    assert estimate is not None
    assert estimate.value == pytest.approx(error(range(60)), abs=1e-12)
    generator = np.random.default_rng(5)
    low, high = np.quantile([error(generator.integers(60, size=60)) for _ in range(4000)], [0.025, 0.975])
    assert estimate[1:] == pytest.approx((low, high), abs=0.01)
    assert high - low > 0.1
    assert measured.estimate() == measured.estimate()
    assert measured.difference(measured) == (0, 0, 0)


# ------------------------------------------------------------------ files


def scores(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    path = folder / "measures" / "pairs.parquet"
    return pq.read_table(path).to_pylist(), json.loads(path.with_suffix(".json").read_text())


def test_killed_scoring_continues_and_workers_share_it(tmp_path: Path) -> None:
    settings = Calibration(bins=3)
    whole, killed, shared = (tmp_path / name for name in ("whole", "killed", "shared"))
    score(Scorer(2), whole)
    calibration.finish(whole, whole, settings, None)
    assert scores(whole)[0][1] == {
        "problem": 0, "chosen_logp": -1.0, "rejected_logp": -1.0, "chosen_tokens": 1, "rejected_tokens": 2,
    }  # fmt: skip
    with pytest.raises(Killed):
        score(Scorer(2, dies_at=3), killed)
    with pytest.raises(UserError, match=r"1 of 4 parts of .* are missing"):
        calibration.finish(killed, killed, settings, None)
    again = Scorer(2)
    score(again, killed)
    calibration.finish(killed, killed, settings, None)
    assert again.calls == 1
    for rank in (1, 0):
        score(Scorer(2), shared, worker=(rank, 2))
    calibration.finish(shared, shared, settings, None)
    assert scores(killed) == scores(whole) == scores(shared)

    score(Scorer(2, dies_at=0), whole)  # nothing is scored again
    calibration.finish(whole, whole, Calibration(bins=7), None)  # other bins need no other scores
    assert len(measures.load(whole)["ece_likelihood"].bins) == 7
    with pytest.raises(UserError, match="is of another measurement"):
        score(Scorer(3), whole)
    with pytest.raises(UserError, match="is of another measurement"):
        score(Scorer(2), whole, PAIRS[:3])


def test_what_cannot_be_calibrated_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no held-out pairs"):
        score(Scorer(1), tmp_path, [])
    with pytest.raises(UserError, match="an answer without tokens"):
        score(Scorer(1), tmp_path, [Pair(0, (1,), (2,), ())])
    score(Scorer(1), tmp_path / "run")
    with pytest.raises(UserError, match="holds no scores of the initial policy"):
        calibration.finish(tmp_path / "run", tmp_path / "base", Calibration(), None)
    score(Scorer(2), tmp_path / "base", PAIRS[:2])
    calibration.finish(tmp_path / "base", tmp_path / "base", Calibration(), None)
    with pytest.raises(UserError, match="are of different pairs"):
        calibration.finish(tmp_path / "run", tmp_path / "base", Calibration(), None)
