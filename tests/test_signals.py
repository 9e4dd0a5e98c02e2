"""Signals: differences and transforms by hand, the AUC against all pairs, and distillation's optimum and silence."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from posttrain.objectives.divergences import token_divergence
from posttrain.objectives.policy import clipped_surrogate, importance_ratio
from posttrain.objectives.signals import (
    DIVERGENCES,
    NOISE,
    PAIRS,
    SIGNALS,
    TRUST_REGIONS,
    auc,
    beyond_noise,
    distillation_loss,
    log_ratio_signal,
    mixed,
    rms,
    scaled,
    shaped,
    within_groups_auc,
)

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
DELTA = torch.tensor([[3.0, -1.0, 4.0, 99.0], [-2.0, 6.0, 99.0, 99.0]])


def test_a_signal_is_a_difference_on_the_mask() -> None:
    assert (*PAIRS, "mix") == SIGNALS
    logps = {"teacher": torch.tensor([[-1.0, -4.0]]), "base": torch.tensor([[-2.0, -1.0]])}
    logps["unlearned"] = torch.tensor([[-5.0, -1.5]])
    mask = torch.tensor([[1, 1]])
    found = {name: log_ratio_signal(logps[plus], logps[minus], mask).tolist() for name, (plus, minus) in PAIRS.items()}
    assert found == {"teacher_base": [[1.0, -3.0]], "teacher_unlearned": [[4.0, -2.5]], "base_unlearned": [[3.0, 0.5]]}
    assert log_ratio_signal(logps["teacher"], logps["base"], torch.tensor([[1, 0]])).tolist() == [[1.0, 0.0]]


def test_teacher_unlearned_is_the_sum_of_the_other_two() -> None:
    """So drift that a teacher and its unlearned twin share is not in it, and is twice in no other one."""
    generator = torch.Generator().manual_seed(1)
    teacher, base, unlearned = -torch.rand(3, 2, 4, generator=generator)
    found = log_ratio_signal(teacher, unlearned, MASK)
    torch.testing.assert_close(
        found, log_ratio_signal(teacher, base, MASK) + log_ratio_signal(base, unlearned, MASK), rtol=0, atol=1e-6
    )


def test_rms_counts_the_mask_alone() -> None:
    """√((9 + 1 + 16 + 4 + 36) / 5)."""
    assert rms(DELTA, MASK).item() == pytest.approx(math.sqrt(66 / 5))
    assert rms(DELTA, torch.zeros_like(MASK)).item() == 0.0


def test_a_mix_weighs_signals_of_one_loudness() -> None:
    """½ · 3/2 + 2 · 10/40; a signal that is silent everywhere takes no part."""
    one, other, silent = torch.tensor([[3.0]]), torch.tensor([[10.0]]), torch.tensor([[0.0]])
    assert mixed([one, other, silent], [0.5, 2.0, 1.0], [2.0, 40.0, 0.0]).item() == pytest.approx(1.25)
    with pytest.raises(ValueError, match="2 signals to mix come with 1 weights and 2 scales"):
        mixed([one, other], [1.0], [1.0, 1.0])


def test_transforms_of_one_answer_by_hand() -> None:
    """Means of the answers: 2 and 2."""
    assert shaped(DELTA, MASK).tolist() == [[3, -1, 4, 0], [-2, 6, 0, 0]]
    assert shaped(DELTA, MASK, centre=True).tolist() == [[1, -3, 2, 0], [-4, 4, 0, 0]]
    correct = torch.tensor([[True], [False]])
    assert shaped(DELTA, MASK, correct=correct).tolist() == [[3, 0, 4, 0], [-2, 0, 0, 0]]
    ends = torch.tensor([[False, False, True, True], [False, True, True, True]])
    assert shaped(DELTA, MASK, ends=ends).tolist() == [[3, -1, 0, 0], [-2, 0, 0, 0]]


def test_transforms_of_one_answer_have_an_order() -> None:
    """Ends are in no mean (1 and −2 then); the gate looks at what is left after centring: +2, −2 and 0."""
    correct = torch.tensor([[True], [False]])
    ends = torch.tensor([[False, False, True, True], [False, True, True, True]])
    assert shaped(DELTA, MASK, ends=ends, centre=True).tolist() == [[2, -2, 0, 0], [0, 0, 0, 0]]
    assert shaped(DELTA, MASK, correct=correct, ends=ends, centre=True).tolist() == [[2, 0, 0, 0], [0, 0, 0, 0]]


def test_half_precision_is_worked_out_in_float32() -> None:
    found = shaped(DELTA.half(), MASK, centre=True)
    assert found.dtype == torch.float32
    assert found.tolist() == [[1, -3, 2, 0], [-4, 4, 0, 0]]


def test_scaling_by_hand() -> None:
    """Halved: 1.5, −0.5, 2 and −1, 3; a dead zone of 1 drops the second, what lies on its edge stays; cut at 2."""
    delta = shaped(DELTA, MASK)
    assert scaled(delta, 2.0, bound=None).tolist() == [[1.5, -0.5, 2, 0], [-1, 3, 0, 0]]
    assert scaled(delta, 2.0, dead_zone=1.0, bound=2.0).tolist() == [[1.5, 0, 2, 0], [-1, 2, 0, 0]]
    assert scaled(10 * delta, 1.0).tolist() == [[3, -3, 3, 0], [-3, 3, 0, 0]]


def test_a_signal_of_zeros_stays_one() -> None:
    zeros = torch.zeros(2, 4)
    assert torch.equal(scaled(zeros, rms(zeros, MASK).item()), zeros)


# ---------------------------------------------------------------- the AUC


def test_auc_is_the_fraction_of_pairs() -> None:
    """Against all pairs, with many ties."""
    generator = torch.Generator().manual_seed(5)
    for levels in (3, 10, 1000):
        scores = torch.randint(levels, (60,), generator=generator).float()
        correct = torch.rand(60, generator=generator) < 0.4
        pairs = scores[correct][:, None] - scores[~correct][None, :]
        wanted = ((pairs > 0).double() + 0.5 * (pairs == 0).double()).mean().item()
        assert auc(scores, correct) == pytest.approx(wanted, abs=1e-12)
        assert auc(-scores, correct) == pytest.approx(1.0 - wanted, abs=1e-12)


def test_auc_at_its_ends() -> None:
    correct = torch.tensor([True, True, False])
    assert auc(torch.tensor([2.0, 3.0, 1.0]), correct) == 1.0
    assert auc(torch.tensor([0.0, 0.5, 1.0]), correct) == 0.0
    assert auc(torch.zeros(3), correct) == 0.5
    assert math.isnan(auc(torch.zeros(3), torch.ones(3, dtype=torch.bool)))


def test_auc_within_groups_leaves_difficulty_out() -> None:
    """Scores that know the prompt alone rank nothing within one; that of one pair and of two weighs 1 and 2."""
    groups = torch.tensor([7, 3, 7, 3, 3, 9])
    correct = torch.tensor([True, False, True, False, True, True])
    assert auc(groups.float(), correct) > 0.5
    assert math.isnan(within_groups_auc(groups.float(), torch.ones(6, dtype=torch.bool), groups))
    assert within_groups_auc(groups.float(), correct, groups) == 0.5
    scores = torch.tensor([1.0, 0.0, 0.0, 2.0, 1.0, 5.0])
    both = torch.tensor([True, False, False, False, True, True])  # group 7: 1 > 0; group 3: 1 > 0 and 1 < 2
    assert within_groups_auc(scores, both, groups) == pytest.approx((1 + 2 * 0.5) / 3)


# ---------------------------------------------------------------- learning from a signal


def next_token(*logits: float) -> Tensor:
    """log-probs of one next-token distribution [1, V]."""
    return torch.tensor([logits], dtype=torch.float64).log_softmax(-1)


@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0])
def test_the_optimum_of_the_kl_region_is_the_tilted_policy(weight: float) -> None:
    """Every outcome weighted with its probability under π_0: the gradient vanishes at π_0 e^{δ/λ}/Z, and only there."""
    base, delta = next_token(0.3, -1.0, 0.8, 0.1), torch.tensor([[0.5, -0.4, 0.1, 0.9]], dtype=torch.float64)

    def slope(logits: Tensor) -> Tensor:
        logits = logits.clone().requires_grad_()
        per_token = distillation_loss(logits.log_softmax(-1) - base, delta, trust_region="kl", kl_coef=weight)
        return torch.autograd.grad((base.exp() * per_token).sum(), logits)[0]

    optimum = base + delta / weight
    torch.testing.assert_close(slope(optimum), torch.zeros(1, 4, dtype=torch.float64), rtol=0, atol=1e-12)
    assert slope(base).abs().max() > 0.01


def test_with_a_weight_of_one_the_optimum_is_the_teacher() -> None:
    """Descent from π_0 on π_0's own tokens ends at π_T."""
    base, teacher = next_token(0.3, -1.0, 0.8, 0.1), next_token(1.0, 0.2, -0.5, 0.4)
    logits = base.clone().requires_grad_()
    for _ in range(300):
        log_ratio = logits.log_softmax(-1) - base
        per_token = distillation_loss(log_ratio, teacher - base, trust_region="kl", kl_coef=1.0)
        (slope,) = torch.autograd.grad((base.exp() * per_token).sum(), logits)
        with torch.no_grad():
            logits -= slope
    torch.testing.assert_close(logits.log_softmax(-1), teacher, rtol=0, atol=1e-4)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_clip_is_the_clipped_surrogate_and_a_divergence(divergence: str) -> None:
    generator = torch.Generator().manual_seed(2)
    base, logps, delta = -torch.rand(3, 2, 4, generator=generator, dtype=torch.float64)
    found = distillation_loss(
        logps - base, delta, trust_region="clip", kl_coef=0.3, epsilon_high=0.28, divergence=divergence
    )
    surrogate = clipped_surrogate(importance_ratio(logps, base), delta, epsilon_low=0.2, epsilon_high=0.28)
    torch.testing.assert_close(found, surrogate + 0.3 * token_divergence(divergence, logps - base))


def test_the_penalty_of_the_clip_is_k3_of_what_the_base_drew() -> None:
    """ρ − 1 − log ρ with ρ = 2, at a token without a signal; the mean over π_0's tokens is KL(π_0‖π_θ)."""
    found = distillation_loss(torch.tensor([[math.log(2.0)]]), torch.zeros(1, 1), trust_region="clip", kl_coef=1.0)
    assert found.item() == pytest.approx(1.0 - math.log(2.0), rel=1e-6)
    base, moved = next_token(0.3, -1.0, 0.8), next_token(1.0, 0.2, -0.5)
    per_token = distillation_loss(moved - base, torch.zeros(1, 3).double(), trust_region="clip", kl_coef=1.0)
    torch.testing.assert_close((base.exp() * per_token).sum(), (base.exp() * (base - moved)).sum())


@pytest.mark.parametrize("region", TRUST_REGIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_signal_has_no_gradient_where_nothing_moved(region: str, dtype: torch.dtype) -> None:
    """Also where two forwards of one model differ in the last digits, from which Adam would make steps of full size."""
    log_ratio = torch.tensor([[0.0, 3e-7, -5e-6, 9e-5]]).to(dtype).requires_grad_()
    found = distillation_loss(log_ratio, torch.zeros(1, 4).to(dtype), trust_region=region, kl_coef=1.0)
    (gradient,) = torch.autograd.grad(found.sum(), log_ratio)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    moved = torch.tensor([[2 * NOISE]], requires_grad=True)
    found = distillation_loss(moved, torch.zeros(1, 1), trust_region=region, kl_coef=1.0)
    assert torch.autograd.grad(found.sum(), moved)[0].item() > 0


def test_noise_is_let_through_whole_or_not_at_all() -> None:
    assert beyond_noise(torch.tensor([1e-5, -1e-5, 1e-3, -2.0])).tolist() == pytest.approx([0.0, 0.0, 1e-3, -2.0])


@pytest.mark.parametrize("region", TRUST_REGIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gap", [-100.0, 100.0])
def test_extreme_log_ratios_are_finite(region: str, dtype: torch.dtype, gap: float) -> None:
    log_ratio = torch.full((1, 2), gap, dtype=dtype, requires_grad=True)
    signals = torch.tensor([[3.0, -3.0]], dtype=dtype)
    found = distillation_loss(log_ratio, signals, trust_region=region, kl_coef=1.0)
    (gradient,) = torch.autograd.grad(found.sum(), log_ratio)
    assert found.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trust_region": "ball"}, "unknown trust_region 'ball'; known: clip, kl"),
        ({"trust_region": "clip", "divergence": "js"}, "unknown kl_divergence 'js'; known: forward_kl, reverse_kl"),
    ],
)
def test_unknown_names_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distillation_loss(torch.zeros(1, 1), torch.zeros(1, 1), kl_coef=1.0, **settings)
