"""The weights and factors of APO by hand: the paper's fixtures, groups without a right or a wrong answer, limits."""

from __future__ import annotations

import math

import pytest
import torch
from jaxtyping import TypeCheckError

from posttrain.objectives.asymmetry import difficulty_weight, group_accuracy, suboptimal_length_factor

YES, NO = torch.tensor([[True]]), torch.tensor([[False]])


def factor(excess: float, base: float) -> float:
    """Of one wrong answer beside one correct answer of 100 tokens."""
    lengths = torch.tensor([[100.0, 100.0 + excess]], dtype=torch.float64)
    correct = torch.tensor([[True, False]])
    first, second = suboptimal_length_factor(lengths, correct, ~correct, base=base)[0].tolist()
    assert first == 1.0
    return float(second)


# ---------------------------------------------------------------- how weakly correct answers are held


@pytest.mark.parametrize(
    ("correct", "weight"), [(1, 0.288), (2, 0.493), (3, 0.639), (4, 0.743), (5, 0.817), (6, 0.870), (7, 0.907)]
)
def test_the_weight_of_k_correct_answers_of_eight(correct: int, weight: float) -> None:
    """1 − exp(−e k/8); the numbers are the paper's."""
    accuracy = torch.tensor([correct / 8])
    assert difficulty_weight(accuracy).item() == pytest.approx(1 - math.exp(-math.e * correct / 8))
    assert difficulty_weight(accuracy).item() == pytest.approx(weight, abs=5e-4)


def test_where_all_or_none_are_correct_the_weight_is_one() -> None:
    accuracy = torch.tensor([[0.0, 1.0], [torch.nan, 0.5]])
    expected = [[1.0, 1.0], [1.0, 1 - math.exp(-math.e / 2)]]
    torch.testing.assert_close(difficulty_weight(accuracy), torch.tensor(expected))


def test_a_tiny_accuracy_keeps_its_digits() -> None:
    """1 − exp(−e p) = e p − (e p)²/2 + …, of which a difference from 1 would leave nothing in float32."""
    assert difficulty_weight(torch.tensor([1e-9])).item() == pytest.approx(math.e * 1e-9, rel=1e-6)


def test_accuracy_is_of_the_answers_with_a_verdict() -> None:
    """2 of 4; 1 of 2, two without a verdict; 0 of 3; nothing known."""
    correct = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]).bool()
    wrong = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    found = group_accuracy(correct, wrong)
    torch.testing.assert_close(found, torch.tensor([[0.5], [0.5], [0.0], [torch.nan]]), equal_nan=True)


# ---------------------------------------------------------------- how hard long wrong answers are pushed


@pytest.mark.parametrize(("base", "expected"), [(1.00001, 1.010), (1.0001, 1.095), (1.001, 1.632), (1.01, 2.000)])
def test_the_factor_at_a_thousand_tokens_too_many(base: float, expected: float) -> None:
    """2 − c^(−1000); the numbers are the paper's."""
    assert factor(1000.0, base) == pytest.approx(2 - base**-1000, rel=1e-9)
    assert factor(1000.0, base) == pytest.approx(expected, abs=5e-4)


def test_half_of_the_way_is_gone_where_it_says() -> None:
    assert factor(math.log(2) / math.log(1.05), 1.05) == pytest.approx(1.5)


def test_the_factor_is_bounded_and_safe_at_its_ends() -> None:
    """Δ = 10⁶ at c = 10 is 10^(−10⁶) = 0; Δ = 1 at c = 1 + 10⁻¹² is 1 + 10⁻¹²."""
    assert factor(1e6, 10.0) == 2.0
    assert factor(1.0, 1 + 1e-12) - 1 == pytest.approx(1e-12, rel=1e-3)
    for excess in (0.0, -1e-9, -100.0):
        assert factor(excess, 1.1) == 1.0


def test_only_longer_wrong_answers_of_a_group_with_a_correct_one_are_touched() -> None:
    """c = 2. The correct answers of the first group have 4 and 8 tokens, 6 on average: Δ = 2 gives 2 − ¼, Δ = 1 gives
    2 − ½. In the second nobody is correct; in the third all are; in the fourth the long one has no verdict."""
    lengths = torch.tensor([[4.0, 8.0, 8.0, 7.0], [1.0, 5.0, 9.0, 3.0], [1.0, 5.0, 9.0, 3.0], [2.0, 9.0, 1.0, 3.0]])
    correct = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    wrong = ~correct
    wrong[3, 1] = False
    expected = [[1.0, 1.0, 1.75, 1.5], [1.0] * 4, [1.0] * 4, [1.0, 1.0, 1.0, 1.5]]
    found = suboptimal_length_factor(lengths, correct, wrong, base=2.0)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_what_is_left_out_of_the_mean_neither_moves_it_nor_is_touched() -> None:
    """A correct answer that was cut off at 100 tokens counts in neither mask: the mean stays 4, and Δ = 1."""
    lengths = torch.tensor([[4.0, 100.0, 5.0]])
    correct, wrong = torch.tensor([[True, False, False]]), torch.tensor([[False, False, True]])
    found = suboptimal_length_factor(lengths, correct, wrong, base=2.0)
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0, 1.5]]))


def test_the_order_of_groups_and_answers_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 50, (5, 8), generator=generator).float()
    correct = torch.rand(5, 8, generator=generator) < 0.4
    found = suboptimal_length_factor(lengths, correct, ~correct, base=1.1)
    groups, answers = torch.randperm(5, generator=generator), torch.randperm(8, generator=generator)
    moved = suboptimal_length_factor(
        lengths[groups][:, answers], correct[groups][:, answers], ~correct[groups][:, answers], base=1.1
    )
    torch.testing.assert_close(moved, found[groups][:, answers])
    assert (found > 1).any()
    assert (found[~correct] == 1).any()


@pytest.mark.parametrize("base", [1.0, 0.9, -2.0, math.inf, math.nan])
def test_a_base_that_is_not_larger_than_one_is_refused(base: float) -> None:
    with pytest.raises(ValueError, match="must be larger than 1 and finite"):
        suboptimal_length_factor(torch.ones(1, 1), YES, NO, base=base)


def test_shapes_are_executed() -> None:
    with pytest.raises(TypeCheckError):
        suboptimal_length_factor(torch.ones(1, 2), YES, NO, base=1.1)
