"""Distillation terms: whose gradient each estimator has, three forms, masks and weights, and TRRD's ratio by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.errors import UserError
from posttrain.objectives.distillation import (
    ANCHORS,
    SAMPLED_ESTIMATORS,
    annealed_coefficient,
    bias_corrected_k3,
    check_estimator,
    distillation_loss,
    distillation_mask,
    full_vocabulary,
    k1,
    k2,
    k3,
    over_kept,
    paced_weights,
    pass_rates,
    teacher_advantage,
    teacher_reward,
    top_words,
    topk_of_student,
    topk_of_teacher,
    topk_vocabulary,
    trust_region_ratio,
)
from posttrain.objectives.policy import clipped_surrogate, importance_ratio, kl_k2, kl_k3
from posttrain.objectives.reduce import LOSS_TYPES, reduce
from posttrain.objectives.vocabulary import Head, log_probs_at

Estimate = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logps, old_logps, teacher_logps) → per token."""

every_estimator = pytest.mark.parametrize("estimator", SAMPLED_ESTIMATORS)
every_anchor = pytest.mark.parametrize("anchor", ANCHORS)


def gradient_of(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Of the sum of what the function gives."""
    at = at.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(at).sum(), at)
    return gradient


def tokens(seed: int = 3, dtype: torch.dtype = torch.float64, spread: float = 4.0) -> tuple[Tensor, Tensor]:
    """logps and teacher_logps [4, 6], at most `spread` nats apart."""
    generator = torch.Generator().manual_seed(seed)
    logps = -5.0 - 3.0 * torch.rand(4, 6, generator=generator, dtype=torch.float64)
    gap = spread * (2.0 * torch.rand(4, 6, generator=generator, dtype=torch.float64) - 1.0)
    return logps.to(dtype), (logps + gap).to(dtype)


# ---------------------------------------------------------------- the gradient table


def zero(p: Tensor, q: Tensor) -> Tensor:
    return 0.0 * p.sum()


def reverse(p: Tensor, q: Tensor) -> Tensor:
    """KL(π_θ‖π_T)."""
    return (p * (p / q).log()).sum()


def forward(p: Tensor, q: Tensor) -> Tensor:
    """KL(π_T‖π_θ)."""
    return (q * (q / p).log()).sum()


TABLE: dict[str, tuple[Estimate, Callable[[Tensor, Tensor], Tensor]]] = {
    "k1": (lambda lp, old, t: lp - t, zero),
    "score_function": (lambda lp, old, t: -teacher_advantage(old, t) * lp, reverse),
    "advantage_form": (lambda lp, old, t: -importance_ratio(lp, old) * teacher_advantage(old, t), reverse),
    "ratio_k1": (lambda lp, old, t: importance_ratio(lp, old) * (lp - t), reverse),
    "k2": (lambda lp, old, t: distillation_loss("k2", lp, old, t), reverse),
    "k3": (lambda lp, old, t: distillation_loss("k3", lp, old, t), forward),
    "bias_corrected_k3": (lambda lp, old, t: distillation_loss("bias_corrected_k3", lp, old, t), reverse),
}

LOGITS = torch.tensor([[0.3, -1.0, 0.8, 0.1, 2.0, -0.4]], dtype=torch.float64)
TEACHER_LOGITS = torch.tensor([[-0.5, 0.4, 0.2, 1.0, -1.5, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(("estimate", "target"), TABLE.values(), ids=TABLE)
def test_the_gradient_table(estimate: Estimate, target: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Every outcome once, weighted with its probability as a constant: exact expectations."""
    teacher_logps = TEACHER_LOGITS.log_softmax(-1)

    def expected(logits: Tensor) -> Tensor:
        logps = logits.log_softmax(-1)
        old_logps = logps.detach()
        return old_logps.exp() * estimate(logps, old_logps, teacher_logps)

    wanted = gradient_of(lambda logits: target(logits.softmax(-1), teacher_logps.exp()), LOGITS)
    torch.testing.assert_close(gradient_of(expected, LOGITS), wanted, rtol=0, atol=1e-12)
    other = gradient_of(
        lambda logits: (forward if target is reverse else reverse)(logits.softmax(-1), teacher_logps.exp()), LOGITS
    )
    assert (other - wanted).abs().max() > 0.1  # and the rows of the table can be told apart


def test_the_expected_gradient_of_full_vocabulary_is_that_of_the_reverse_kl() -> None:
    """A head that is the identity makes the hidden states logits."""
    head = Head(torch.eye(6, dtype=torch.float64))
    ours = gradient_of(lambda hidden: full_vocabulary(hidden, head, TEACHER_LOGITS, head), LOGITS)
    wanted = gradient_of(lambda logits: reverse(logits.softmax(-1), TEACHER_LOGITS.softmax(-1)), LOGITS)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_k2_and_the_advantage_form_agree_on_every_token(dtype: torch.dtype, rtol: float) -> None:
    """Beyond the clamp of 10 nats too."""
    logps, teacher_logps = tokens(dtype=dtype, spread=25.0)
    advantage = teacher_advantage(logps, teacher_logps)
    assert (advantage.abs() == 10.0).any()
    by_loss = gradient_of(lambda lp: k2(lp, teacher_logps), logps)
    by_advantage = gradient_of(lambda lp: -importance_ratio(lp, logps) * advantage, logps)
    torch.testing.assert_close(by_loss, by_advantage, rtol=rtol, atol=0)
    by_ratio = gradient_of(lambda lp: bias_corrected_k3(lp, logps, teacher_logps), logps)
    torch.testing.assert_close(by_ratio, by_loss, rtol=rtol, atol=0)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_advantage_form_have_one_gradient_on_policy(loss_type: str, dtype: torch.dtype, bound: float) -> None:
    """Of the whole objective, through a softmax, with a mask of answers; relative to the largest entry."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(4, 6, 11, generator=generator, dtype=torch.float64).to(dtype)
    ids = torch.randint(11, (4, 6, 1), generator=generator)
    teacher_logps = torch.randn(4, 6, 11, generator=generator, dtype=torch.float64).to(dtype).log_softmax(-1)
    teacher_logps = teacher_logps.gather(2, ids).squeeze(2)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
    advantages = torch.tensor([[0.5], [-1.5], [0.0], [1.0]], dtype=dtype)
    weight = 0.3 * torch.tensor([[1.0], [1.0], [1.0], [0.0]], dtype=dtype)

    def loss(logits: Tensor, as_advantage: bool) -> Tensor:
        logps = logits.log_softmax(-1).gather(2, ids).squeeze(2)
        old_logps = logps.detach()
        shaped = advantages + weight * teacher_advantage(old_logps, teacher_logps) if as_advantage else advantages
        per_token = clipped_surrogate(importance_ratio(logps, old_logps), shaped, epsilon_low=0.2, epsilon_high=0.2)
        if not as_advantage:
            per_token = per_token + weight * k2(logps, teacher_logps)
        return reduce(per_token, mask, loss_type=loss_type, tokens=13, max_length=6)

    by_loss = gradient_of(lambda x: loss(x, False), logits)
    by_advantage = gradient_of(lambda x: loss(x, True), logits)
    assert (by_loss - by_advantage).abs().max() < bound * by_loss.abs().max()


def test_bias_corrected_k3_is_what_trl_computes_with_the_teacher_in_the_reference_slot() -> None:
    """Off-policy too: per_token_kl = exp(ref − lp) − (ref − lp) − 1, times coef_1 = exp(lp − old), by autograd."""
    logps, teacher_logps = tokens()
    old_logps = logps + 0.3 * torch.linspace(-1.0, 1.0, 24, dtype=torch.float64).reshape(4, 6)

    def trl(lp: Tensor) -> Tensor:
        return (torch.exp(teacher_logps - lp) - (teacher_logps - lp) - 1) * torch.exp(lp - old_logps)

    torch.testing.assert_close(bias_corrected_k3(logps, old_logps, teacher_logps), trl(logps), rtol=1e-12, atol=1e-12)
    ours = gradient_of(lambda lp: bias_corrected_k3(lp, old_logps, teacher_logps), logps)
    torch.testing.assert_close(ours, gradient_of(trl, logps), rtol=1e-11, atol=1e-11)


def test_bias_corrected_k3_keeps_its_digits_in_float32_and_its_direction_beyond_the_clamp() -> None:
    """On-policy the slope is −clamp(R). As a product it is noise at 18 nats, and clamping R turns its direction."""
    logps = torch.full((1, 5), -20.0)
    teacher_logps = logps + torch.tensor([[-18.0, -0.01, 0.01, 9.0, 18.0]])
    ours = gradient_of(lambda lp: bias_corrected_k3(lp, logps, teacher_logps, log_ratio_clamp=20.0), logps)
    torch.testing.assert_close(ours, logps - teacher_logps, rtol=1e-6, atol=0)

    def product(lp: Tensor, clamp: float) -> Tensor:
        r = (teacher_logps - lp).clamp(-clamp, clamp)
        return importance_ratio(lp, logps) * (r.exp() - r - 1.0)

    naive = gradient_of(lambda lp: product(lp, 20.0), logps)
    assert (naive - ours)[0, -1].abs() > 1.0
    clamped = gradient_of(lambda lp: bias_corrected_k3(lp, logps, teacher_logps), logps)
    torch.testing.assert_close(clamped[0], torch.tensor([10.0, 0.01, -0.01, -9.0, -10.0]), rtol=1e-4, atol=0)
    # e^10 − 11 = 22015: descent would push down a token that the teacher prefers by 18 nats
    assert gradient_of(lambda lp: product(lp, 10.0), logps)[0, -1].item() == pytest.approx(math.exp(10) - 11, rel=1e-4)


# ---------------------------------------------------------------- values, continuation, precision


def test_inside_the_clamp_they_are_the_estimates_of_the_policy_module() -> None:
    logps, teacher_logps = tokens()
    torch.testing.assert_close(k1(logps, teacher_logps), logps - teacher_logps)
    torch.testing.assert_close(k2(logps, teacher_logps), kl_k2(logps, teacher_logps))
    torch.testing.assert_close(k3(logps, teacher_logps), kl_k3(logps, teacher_logps))
    torch.testing.assert_close(bias_corrected_k3(logps, logps, teacher_logps), kl_k3(logps, teacher_logps))


def test_beyond_the_clamp_by_hand() -> None:
    """R = 5, −5 and 1 at a clamp of 2."""
    logps = torch.full((1, 3), -9.0, dtype=torch.float64)
    teacher_logps = logps + torch.tensor([[5.0, -5.0, 1.0]], dtype=torch.float64)
    e = math.exp

    def check(function: Callable[[Tensor], Tensor], values: list[float], slopes: list[float]) -> None:
        torch.testing.assert_close(function(logps)[0], torch.tensor(values, dtype=torch.float64))
        torch.testing.assert_close(gradient_of(function, logps)[0], torch.tensor(slopes, dtype=torch.float64))

    # ½ 2² + 2 · 3 = 8 on both sides
    check(lambda lp: k2(lp, teacher_logps, log_ratio_clamp=2.0), [8.0, 8.0, 0.5], [-2.0, 2.0, -1.0])
    # the tangent at 2: e² − 3 + 3 (e² − 1) = 4 e² − 6; below, k3 is its own tangent: e^−5 + 4
    check(
        lambda lp: k3(lp, teacher_logps, log_ratio_clamp=2.0),
        [4 * e(2) - 6, e(-5) + 4, e(1) - 2],
        [1 - e(2), 1 - e(-5), 1 - e(1)],
    )
    # on-policy: k3 at the clamp, and the slopes of k2
    check(
        lambda lp: bias_corrected_k3(lp, logps, teacher_logps, log_ratio_clamp=2.0),
        [e(2) - 3, e(-2) + 1, e(1) - 2],
        [-2.0, 2.0, -1.0],
    )


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_gradient_equals_finite_differences_on_both_sides_of_the_clamp(estimator: str) -> None:
    logps, teacher_logps = tokens()
    assert ((logps - teacher_logps).abs() > 2.0).any()
    assert torch.autograd.gradcheck(
        lambda lp: distillation_loss(estimator, lp, logps.detach(), teacher_logps, log_ratio_clamp=2.0),
        logps.requires_grad_(),
        eps=1e-6,
        rtol=1e-6,
        atol=1e-7,
    )


def test_the_gradient_of_bias_corrected_k3_equals_finite_differences_inside_the_clamp() -> None:
    logps, teacher_logps = tokens()
    old_logps = logps.detach() + 0.2
    assert torch.autograd.gradcheck(
        lambda lp: bias_corrected_k3(lp, old_logps, teacher_logps),
        logps.requires_grad_(),
        eps=1e-6,
        rtol=1e-6,
        atol=1e-6,
    )


@every_estimator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gap", [-1e4, -100.0, 100.0, 1e4])
def test_estimators_are_finite_and_point_to_the_teacher(estimator: str, dtype: torch.dtype, gap: float) -> None:
    ends = (0.0, -gap) if gap > 0 else (gap, 0.0)
    teacher_logps, logps = torch.tensor([[ends[0]]], dtype=dtype), torch.tensor([[ends[1]]], dtype=dtype)
    logps.requires_grad_()
    value = distillation_loss(estimator, logps, logps.detach(), teacher_logps)
    (gradient,) = torch.autograd.grad(value.sum(), logps)
    assert value.dtype == torch.float32
    assert value.isfinite().all() and value.item() > 0
    wanted = {"k3": 1.0 if gap < 0 else 1.0 - math.exp(10.0)}.get(estimator, math.copysign(10.0, -gap))
    assert gradient.item() == pytest.approx(wanted, rel=4e-3)  # 8 bits of bfloat16


@every_estimator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_teacher_that_equals_the_student_adds_exactly_nothing(estimator: str, dtype: torch.dtype) -> None:
    logps, _ = tokens(dtype=dtype)
    assert (distillation_loss(estimator, logps, logps, logps.clone()) == 0).all()
    assert (gradient_of(lambda lp: distillation_loss(estimator, lp, logps, logps.clone()), logps) == 0).all()
    assert (teacher_advantage(logps, logps) == 0).all()
    assert (teacher_reward(logps, logps, torch.ones_like(logps)) == 0).all()


@every_estimator
def test_perturbing_the_teacher_moves_every_token(estimator: str) -> None:
    """No gradient reaches the teacher, though."""
    logps, teacher_logps = tokens()
    teacher_logps.requires_grad_()
    moved = distillation_loss(estimator, logps, logps, teacher_logps + 0.1)
    assert not moved.requires_grad
    assert ((moved - distillation_loss(estimator, logps, logps, teacher_logps)).abs() > 1e-3).all()


def test_k1_as_a_loss_is_refused() -> None:
    logps, teacher_logps = tokens()
    with pytest.raises(ValueError, match=r"k1 .* cannot be a loss: the teacher is a constant in it.*use k2"):
        distillation_loss("k1", logps, logps, teacher_logps)
    assert not k1(logps.requires_grad_(), teacher_logps).requires_grad


def test_other_refusals() -> None:
    logps, teacher_logps = tokens()
    with pytest.raises(ValueError, match="unknown estimator 'k4'; known: k2, k3, bias_corrected_k3, full, topk"):
        check_estimator("k4")
    with pytest.raises(ValueError, match=r"'topk' compares next-token distributions.*topk_vocabulary"):
        distillation_loss("topk", logps, logps, teacher_logps)
    for estimator in SAMPLED_ESTIMATORS:
        for clamp in (0.0, -1.0, 41.0, math.nan):
            with pytest.raises(ValueError, match="log_ratio_clamp must be positive and at most 40 nats"):
                distillation_loss(estimator, logps, logps, teacher_logps, log_ratio_clamp=clamp)
    with pytest.raises(ValueError, match="log_ratio_clamp must be positive"):
        teacher_advantage(logps, teacher_logps, log_ratio_clamp=0.0)


def test_the_reward_form_by_hand() -> None:
    """Row 0: (1 + 3)/2 = 2. Row 1: (10 − 2 + 1)/3 = 3, 12 clamped to 10. Row 2 has no tokens."""
    old_logps = torch.full((3, 3), -13.0)
    gap = torch.tensor([[1.0, 3.0, 99.0], [12.0, -2.0, 1.0], [5.0, 5.0, 5.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    torch.testing.assert_close(teacher_reward(old_logps, old_logps + gap, mask), torch.tensor([2.0, 3.0, 0.0]))


# ---------------------------------------------------------------- whole distributions


def two_models(student_words: int = 43, teacher_words: int = 43) -> tuple[Tensor, Head, Tensor, Head]:
    """Hidden states of 7 tokens and heads of student (width 5) and teacher (width 8)."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student = Head(0.6 * normal(student_words, 5), normal(student_words))
    return normal(7, 5), student, normal(7, 8), Head(0.6 * normal(teacher_words, 8))


def logps_of(hidden: Tensor, head: Head, temperature: float = 1.0) -> Tensor:
    """Over the vocabulary, [N, V]."""
    bias = 0.0 if head.bias is None else head.bias
    return ((hidden @ head.weight.T + bias) / temperature).log_softmax(-1)


def test_full_vocabulary_over_the_words_that_both_heads_have() -> None:
    """128 rows against 136, 120 ids in the tokenizer: as if both heads had 120 rows, and none is trained beyond."""
    hidden, head, teacher_hidden, teacher_head = two_models(128, 136)
    weight = head.weight.requires_grad_()

    def naive(weight: Tensor) -> Tensor:
        assert head.bias is not None
        logps = logps_of(hidden, Head(weight[:120], head.bias[:120]), 0.7)
        teacher_logps = logps_of(teacher_hidden, Head(teacher_head.weight[:120]), 0.7)
        return (logps.exp() * (logps - teacher_logps)).sum(-1)

    found = full_vocabulary(hidden, head, teacher_hidden, teacher_head, words=120, temperature=0.7)
    torch.testing.assert_close(found, naive(weight))
    (gradient,) = torch.autograd.grad(found.sum(), weight)
    torch.testing.assert_close(gradient, gradient_of(naive, weight))
    assert (gradient[120:] == 0).all() and (gradient[:120] != 0).all()
    with pytest.raises(UserError, match="the policy's vocabulary has 128 words and the reference's 136"):
        full_vocabulary(hidden, head, teacher_hidden, teacher_head)
    with pytest.raises(ValueError, match="words = 129 is not between 1 and 128"):
        full_vocabulary(hidden, head, teacher_hidden, teacher_head, words=129)


def test_full_vocabulary_knows_the_whole_table() -> None:
    hidden, head, teacher_hidden, teacher_head = two_models()
    p, q = logps_of(hidden, head).exp(), logps_of(teacher_hidden, teacher_head).exp()
    m = (p + q) / 2
    js = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    torch.testing.assert_close(full_vocabulary(hidden, head, teacher_hidden, teacher_head, divergence="js"), js)
    forward_kl = full_vocabulary(hidden, head, teacher_hidden, teacher_head, divergence="forward_kl")
    torch.testing.assert_close(forward_kl, (q * (q / p).log()).sum(-1))


def test_top_words_are_those_of_the_whole_logits() -> None:
    """3 tiles of words and 2 of tokens."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(1030, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9000, 4, generator=generator, dtype=torch.float64)
    head = Head(weight, torch.randn(9000, generator=generator, dtype=torch.float64), scale=0.3, softcap=4.0)
    assert head.bias is not None
    assert torch.equal(top_words(hidden, head, 5), (hidden @ weight.T + head.bias).topk(5).indices)
    assert top_words(hidden[:1], Head(weight[:7]), 7).sort().values.tolist() == [list(range(7))]
    for k in (0, 9001):
        with pytest.raises(ValueError, match=f"k = {k} is not between 1 and 9000"):
            top_words(hidden, head, k)


def test_topk_is_the_reverse_kl_of_the_renormalised_distributions() -> None:
    hidden, head, teacher_hidden, teacher_head = two_models()
    ids = top_words(hidden, head, 6)
    teacher_logps = log_probs_at(teacher_hidden, teacher_head, ids)

    def naive(hidden: Tensor) -> Tensor:
        p = logps_of(hidden, head).exp().gather(1, ids)
        q = teacher_logps.exp()
        p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
        return (p * (p / q).log()).sum(-1)

    def ours(hidden: Tensor) -> Tensor:
        return topk_vocabulary(log_probs_at(hidden, head, ids), teacher_logps, tail=False)

    torch.testing.assert_close(ours(hidden), naive(hidden), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient_of(ours, hidden), gradient_of(naive, hidden), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tail", [False, True])
def test_topk_with_all_words_or_all_but_one_is_full_vocabulary(tail: bool) -> None:
    hidden, head, teacher_hidden, teacher_head = two_models()
    ids = top_words(hidden, head, 42 if tail else 43)
    found = topk_vocabulary(log_probs_at(hidden, head, ids), log_probs_at(teacher_hidden, teacher_head, ids), tail=tail)
    torch.testing.assert_close(found, full_vocabulary(hidden, head, teacher_hidden, teacher_head), rtol=1e-9, atol=0)


def test_topk_in_float32_at_any_ratio_and_between_equals() -> None:
    logps = torch.tensor([[-0.7, -1.4, -2.0], [0.0, -30.0, -1e4]], requires_grad=True)
    teacher_logps = torch.tensor([[-1e4, -0.1, -3.0], [-1e4, -1e4, -1e-3]])
    for tail in (False, True):
        value = topk_vocabulary(logps, teacher_logps, tail=tail)
        (gradient,) = torch.autograd.grad(value.sum(), logps)
        assert value.isfinite().all() and gradient.isfinite().all()
        assert value[1].item() == pytest.approx(1e4, rel=1e-3)
        assert (topk_vocabulary(logps, logps.detach(), tail=tail) == 0).all()
        same = gradient_of(lambda lp: topk_vocabulary(lp, logps.detach(), tail=tail), logps)  # noqa: B023
        assert (same == 0).all()
    with pytest.raises(ValueError, match=r"one word, renormalised.*at least 2, or tail = True"):
        topk_vocabulary(logps[:, :1], teacher_logps[:, :1], tail=False)


@pytest.mark.parametrize("tail", [False, True])
def test_topk_of_the_student_from_hidden_states(tail: bool) -> None:
    """Its six best of the 41 words that the tokenizer has, at temperature 0.7; no gradient reaches the teacher."""
    hidden, head, teacher_hidden, teacher_head = two_models(43, 47)
    student, teacher = head.weight.requires_grad_(), teacher_head.weight.requires_grad_()
    assert head.bias is not None
    logps = logps_of(hidden, Head(student[:41], head.bias[:41]), 0.7)
    teacher_logps = logps_of(teacher_hidden, Head(teacher[:41]), 0.7).detach()
    ids = logps.topk(6, dim=-1).indices
    wanted = topk_vocabulary(logps.gather(1, ids), teacher_logps.gather(1, ids), tail=tail, divergence="js")
    found = topk_of_student(
        hidden, head, teacher_hidden, teacher_head, 6, tail=tail, words=41, divergence="js", temperature=0.7
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(each.sum(), [student, teacher], allow_unused=True) for each in (found, wanted)]
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=0, atol=1e-12)
    assert gradients[0][1] is None


def test_topk_of_the_teacher_by_hand() -> None:
    """p = 1/2, 1/4, 1/4 and q = 1/8, 1/8, with 1/4 on a word that the student lacks: that joins the other 1/2.

    Forward KL over first, second and others: ⅛ log(⅛ / ½) + ⅛ log(⅛ / ¼) + ¾ log(¾ / ¼).
    """
    head = Head(torch.tensor([[0.5], [0.25], [0.25]], dtype=torch.float64).log())
    hidden = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[3, 0, 1]])
    teacher_logps = torch.tensor([[0.25, 0.125, 0.125]], dtype=torch.float64).log()
    found = topk_of_teacher(hidden, head, ids, teacher_logps, divergence="forward_kl")
    wanted = (math.log(1 / 4) + math.log(1 / 2)) / 8 + 0.75 * math.log(3)
    assert found.item() == pytest.approx(wanted, abs=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    # −Σ q ∂log p/∂h, with log p_i = h w_i − log Σ e^{h w}: −Σ q_i w_i + Σ p_i w_i; the others' weight is the third's
    w = [math.log(0.5), math.log(0.25), math.log(0.25)]
    assert gradient.item() == pytest.approx(0.5 * w[0] + 0.5 * w[1] - (w[0] / 8 + w[1] / 8 + 0.75 * w[2]), abs=1e-12)


def test_which_topk_terms_have_the_direction_of_the_reverse_kl() -> None:
    """3 of 7 words: the cosine to the exact gradient, in logits. Un-normalised, the teacher's words point away."""
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.0, -0.5, -1.0, -1.5]], dtype=torch.float64)
    teacher_logps = torch.tensor([[0.0, 2.0, 1.0, 1.5, -1.0, -0.5, -2.0]], dtype=torch.float64).log_softmax(-1)
    students, teachers = logits.topk(3).indices, teacher_logps.topk(3).indices
    exact = gradient_of(lambda x: reverse(x.softmax(-1), teacher_logps.exp()), logits)

    def cosine(ids: Tensor, term: Callable[[Tensor, Tensor], Tensor]) -> float:
        taken = teacher_logps.gather(1, ids)
        found = gradient_of(lambda x: term(x.log_softmax(-1).gather(1, ids), taken), logits)
        return float(F.cosine_similarity(found, exact).item())

    def plain(lp: Tensor, t: Tensor) -> Tensor:
        return (lp.exp() * (lp - t)).sum(-1)

    def renormalised(lp: Tensor, t: Tensor) -> Tensor:
        return topk_vocabulary(lp, t, tail=False)

    def with_tail(lp: Tensor, t: Tensor) -> Tensor:
        return topk_vocabulary(lp, t, tail=True)

    assert cosine(teachers, plain) == pytest.approx(-0.748, abs=1e-3)
    assert cosine(teachers, renormalised) == pytest.approx(0.055, abs=1e-3)
    assert cosine(students, renormalised) == pytest.approx(0.971, abs=1e-3)
    assert cosine(students, with_tail) == pytest.approx(0.995, abs=1e-3)
    assert cosine(teachers, with_tail) == pytest.approx(0.988, abs=1e-3)


# ---------------------------------------------------------------- where and how much


REWARDS = torch.tensor([1.0, 0.0, 0.2, 1.0, 0.0, 0.5, 0.0, math.nan, 1.0, 1.0, 1.0, 1.0])
"""Three groups of four: half right, all wrong (one not scored), all right; at a threshold of 1."""


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).unsqueeze(1)


def test_masks_and_pass_rates_by_hand() -> None:
    def mask(kind: str, threshold: float = 1.0) -> list[float]:
        found = distillation_mask(kind, REWARDS, group_size=4, correct_threshold=threshold)
        assert found.shape == (12, 1)
        return [float(each) for each in found]

    assert mask("none") == [1.0] * 12
    assert mask("response") == [0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0]
    assert mask("group") == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]
    assert mask("response", 0.5) == [0, 1, 1, 0, 1, 0, 1, 1, 0, 0, 0, 0]
    assert mask("group", 0.5) == [0] * 12
    rates = pass_rates(REWARDS, group_size=4, correct_threshold=1.0)
    assert torch.equal(rates, column(*[0.5] * 4, *[0.0] * 4, *[1.0] * 4))
    with pytest.raises(ValueError, match="unknown mask 'prompt'; known: none, response, group"):
        distillation_mask("prompt", REWARDS, group_size=4, correct_threshold=1.0)
    with pytest.raises(ValueError, match="12 rewards are no whole number of groups of 5 answers"):
        pass_rates(REWARDS, group_size=5, correct_threshold=1.0)


def test_paced_weights_by_hand() -> None:
    rates = column(0.0, 0.25, 0.5, 0.75, 1.0)
    torch.testing.assert_close(paced_weights(rates), column(0.0, 3 / 16, 1 / 4, 3 / 16, 0.0))
    torch.testing.assert_close(paced_weights(rates, a=0.0, b=2.0), column(1.0, 9 / 16, 1 / 4, 1 / 16, 0.0))
    torch.testing.assert_close(paced_weights(rates, a=2.0, b=1.0), column(0.0, 3 / 64, 1 / 8, 9 / 64, 0.0))
    with pytest.raises(ValueError, match=r"at least 0 and finite, got a = -1\.0 and b = 1\.0"):
        paced_weights(rates, a=-1.0)


@pytest.mark.parametrize("kind", ["response", "group"])
@every_estimator
def test_masked_rows_are_insensitive_to_the_teacher(kind: str, estimator: str) -> None:
    """Value and gradient, bit for bit; every other row moves."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    weights = distillation_mask(kind, rewards, group_size=2, correct_threshold=1.0)
    logps, teacher_logps = tokens()

    def rows(teacher_logps: Tensor) -> tuple[Tensor, Tensor]:
        def loss(lp: Tensor) -> Tensor:
            return weights * distillation_loss(estimator, lp, logps, teacher_logps)

        return loss(logps), gradient_of(loss, logps)

    for before, after in zip(rows(teacher_logps), rows(teacher_logps + 0.5), strict=True):
        for row, weight in enumerate(weights):
            same = before[row] == after[row]
            assert same.all() if weight == 0 else not same.any()
    assert weights.flatten().tolist() == ([0, 1, 1, 1] if kind == "response" else [0, 0, 1, 1])


@pytest.mark.parametrize(
    ("loss_type", "wanted"),
    [
        ("grpo", (3.0 + 7.0) / 2),  # mean of the two kept rows' means
        ("bnpo", (3.0 + 7.0 * 3) / 4),  # over the 4 tokens of the kept rows
        ("dapo", (3.0 + 7.0 * 3) / 4),
        ("dr_grpo", (3.0 + 7.0 * 3) / (2 * 5)),  # two kept rows of at most 5 tokens
    ],
)
def test_over_kept_leaves_the_masked_answers_out_of_the_denominator(loss_type: str, wanted: float) -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]])
    per_token = column(100.0, 3.0, 100.0, 7.0).expand(4, 4)
    lengths = mask.sum(dim=1, keepdim=True)
    weights = over_kept(column(0, 1, 0, 1), lengths, loss_type=loss_type)
    found = reduce(weights * per_token, mask, loss_type=loss_type, tokens=mask.sum(), max_length=5)
    assert found.item() == pytest.approx(wanted, rel=1e-6)


def test_over_kept_at_its_ends() -> None:
    lengths = torch.tensor([[4], [1]])
    for loss_type in LOSS_TYPES:
        assert torch.equal(over_kept(column(1, 1), lengths, loss_type=loss_type), column(1, 1))
        assert torch.equal(over_kept(column(0, 0), lengths, loss_type=loss_type), column(0, 0))
    with pytest.raises(ValueError, match="unknown loss_type 'gspo'; known: grpo, bnpo, dr_grpo, dapo"):
        over_kept(column(1, 1), lengths, loss_type="gspo")


def test_annealing_reaches_its_floor_at_step_80() -> None:
    """(5e-3 − 1e-3)/5e-5 = 80."""

    def beta(step: int) -> float:
        return annealed_coefficient(step, initial=5e-3, decay=5e-5, minimum=1e-3)

    assert [beta(step) for step in (0, 1, 40)] == pytest.approx([5e-3, 4.95e-3, 3e-3], rel=1e-12)
    assert beta(79) == pytest.approx(1.05e-3, rel=1e-12)
    assert beta(80) == pytest.approx(1e-3, rel=1e-12)
    assert beta(81) == beta(10_000) == 1e-3
    for initial, decay, minimum in ((1e-3, 5e-5, 5e-3), (1e-3, 0.0, 0.0), (1e-3, 5e-5, -1.0), (math.nan, 5e-5, 0.0)):
        with pytest.raises(ValueError, match="cannot anneal from"):
            annealed_coefficient(0, initial=initial, decay=decay, minimum=minimum)


# ---------------------------------------------------------------- TRRD


def trrd(logps: Tensor, old_logps: Tensor, teacher_logps: Tensor, advantages: Tensor, **options: object) -> Tensor:
    """The paper's surrogate: ε = 0.20 and 0.28."""
    ratio = trust_region_ratio(logps, old_logps, teacher_logps, **options)  # type: ignore[arg-type]
    return clipped_surrogate(ratio, advantages, epsilon_low=0.2, epsilon_high=0.28)


@pytest.mark.parametrize(
    ("d", "good", "bad"),
    [
        # d = log π_θ/π_T; r = e^{d/2} to |d| = 1, there e^{±1/2}; its slope is r inside and r/2 outside
        (-5.0, 0.303, 0.0),  # 0.6065/2; 0.6065 < 0.8 is clipped for Â < 0
        (-1.0, 0.303, 0.0),
        (-0.99, 0.610, 0.0),
        (-0.5, 0.779, 0.0),
        (-0.44, 0.803, 0.803),
        (0.0, 1.0, 1.0),
        (0.44, 1.246, 1.246),
        (0.49, 1.278, 1.278),
        (0.5, 0.0, 1.284),  # 1.284 > 1.28 is clipped for Â > 0
        (0.99, 0.0, 1.640),
        (1.01, 0.0, 0.824),  # 1.6487/2
        (5.0, 0.0, 0.824),
    ],
)
def test_the_trrd_fixture(d: float, good: float, bad: float) -> None:
    """The factor on Â ∇ log π_θ at θ_old, α = ½, c = 1."""
    old_logps = torch.full((1, 1), -2.0, dtype=torch.float64)
    for advantage, wanted in ((1.0, good), (-1.0, bad), (3.0, good), (-3.0, bad)):
        advantages = torch.full((1, 1), advantage, dtype=torch.float64)
        slope = gradient_of(lambda lp: trrd(lp, old_logps, old_logps - d, advantages), old_logps)  # noqa: B023
        assert -slope.item() / advantage == pytest.approx(wanted, abs=6e-4)


@pytest.mark.parametrize(("d", "good", "bad"), [(-5.0, 0.6065, 0.0), (0.3, 1.1618, 1.1618), (5.0, 0.0, 1.6487)])
def test_straight_through_keeps_the_slope_outside_the_clamp(d: float, good: float, bad: float) -> None:
    old_logps = torch.full((1, 1), -2.0, dtype=torch.float64)
    for advantage, wanted in ((1.0, good), (-1.0, bad)):
        advantages = torch.full((1, 1), advantage, dtype=torch.float64)

        def loss(lp: Tensor, how: str) -> Tensor:
            return trrd(lp, old_logps, old_logps - d, advantages, clamp_gradient=how)  # noqa: B023

        slope = gradient_of(lambda lp: loss(lp, "straight_through"), old_logps)
        assert -slope.item() / advantage == pytest.approx(wanted, abs=1e-4)
        assert torch.equal(loss(old_logps, "straight_through"), loss(old_logps, "hard"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clamp_gradient", ["hard", "straight_through"])
@every_anchor
def test_alpha_one_is_grpo_exactly(anchor: str, clamp_gradient: str, dtype: torch.dtype) -> None:
    """Bit for bit, off-policy, value and gradient, whatever the teacher says."""
    logps, teacher_logps = tokens(dtype=dtype, spread=1e3)
    old_logps = logps + 0.4 * torch.linspace(-1.0, 1.0, 24, dtype=dtype).reshape(4, 6)
    advantages = torch.tensor([[1.0], [-1.0], [0.5], [-2.0]], dtype=dtype)

    def ours(lp: Tensor) -> Tensor:
        return trrd(lp, old_logps, teacher_logps, advantages, alpha=1.0, anchor=anchor, clamp_gradient=clamp_gradient)

    def grpo(lp: Tensor) -> Tensor:
        return clipped_surrogate(importance_ratio(lp, old_logps), advantages, epsilon_low=0.2, epsilon_high=0.28)

    assert torch.equal(ours(logps), grpo(logps))
    assert torch.equal(gradient_of(ours, logps), gradient_of(grpo, logps))
    assert (gradient_of(grpo, logps) == 0).any()  # some are clipped


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.7, 1.0])
@every_anchor
def test_a_teacher_that_equals_the_student_at_theta_old_gives_the_ratio_one(anchor: str, alpha: float) -> None:
    for dtype, atol in ((torch.float64, 1e-15), (torch.float32, 1.2e-7)):
        logps, _ = tokens(dtype=dtype)
        ratio = trust_region_ratio(logps, logps, logps.clone(), alpha=alpha, anchor=anchor)
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=0.0 if anchor == "geometric" else atol)


@every_anchor
def test_no_advantage_gives_no_gradient(anchor: str) -> None:
    logps, teacher_logps = tokens()
    nothing = torch.zeros(4, 1, dtype=torch.float64)
    assert (gradient_of(lambda lp: trrd(lp, logps, teacher_logps, nothing, anchor=anchor), logps) == 0).all()


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_the_arithmetic_ratio_is_at_most_one_over_alpha(alpha: float) -> None:
    """At θ_old; off-policy at most π_θ/π_old over α."""
    logps, teacher_logps = tokens(spread=1e3)
    ratio = trust_region_ratio(logps, logps, teacher_logps, alpha=alpha, anchor="arithmetic")
    assert ratio.max() <= (1.0 + 1e-12) / alpha and ratio.max() > 0.999 / alpha
    moved = trust_region_ratio(logps + 0.5, logps, teacher_logps, alpha=alpha, anchor="arithmetic")
    assert moved.max() <= (1.0 + 1e-12) * math.exp(0.5) / alpha and moved.max() > 1.0 / alpha


def test_the_arithmetic_ratio_by_hand_and_its_mean_under_its_mixture() -> None:
    p, old, teacher = (
        torch.tensor([each], dtype=torch.float64) for each in ([0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.1, 0.1, 0.8])
    )
    ratio = trust_region_ratio(p.log(), old.log(), teacher.log(), alpha=0.75, anchor="arithmetic")
    mixture = torch.tensor([[0.325, 0.325, 0.35]], dtype=torch.float64)  # ¾ · 0.4 + ¼ · 0.1, …
    torch.testing.assert_close(ratio, p / mixture)
    assert (mixture * ratio).sum().item() == pytest.approx(1.0)
    slope = gradient_of(lambda lp: trust_region_ratio(lp, old.log(), teacher.log(), anchor="arithmetic"), p.log())
    torch.testing.assert_close(slope, p / (0.5 * old + 0.5 * teacher))


def test_the_geometric_ratio_by_hand() -> None:
    """log r = 0.7 · 0.2 + 0.3 · 0.5 inside, 0.7 · 0.2 + 0.3 · 2 at a clamp of 2."""
    logps = torch.tensor([[-1.0, -1.0]], dtype=torch.float64)
    teacher_logps = torch.tensor([[-1.5, -9.0]], dtype=torch.float64)
    ratio = trust_region_ratio(logps, logps - 0.2, teacher_logps, alpha=0.7, clamp=2.0)
    torch.testing.assert_close(ratio.log(), torch.tensor([[0.29, 0.74]], dtype=torch.float64))


@every_anchor
def test_perturbing_the_teacher_moves_the_ratio(anchor: str) -> None:
    """No gradient reaches the teacher, though."""
    logps, teacher_logps = tokens(spread=0.8)
    teacher_logps.requires_grad_()
    before = trust_region_ratio(logps, logps, teacher_logps, anchor=anchor)
    after = trust_region_ratio(logps, logps, teacher_logps + 0.1, anchor=anchor)
    assert not after.requires_grad
    assert (before - after > 0.01).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clamp_gradient", ["hard", "straight_through"])
@every_anchor
def test_the_ratio_is_finite_at_any_distance_of_the_teacher(
    anchor: str, clamp_gradient: str, dtype: torch.dtype
) -> None:
    logps = torch.tensor([[0.0, -1e4, -30.0]], dtype=dtype)
    teacher_logps = torch.tensor([[-1e4, 0.0, -1e4]], dtype=dtype)
    old_logps = logps + torch.tensor([[0.0, 0.0, 1.0]], dtype=dtype)
    ratio = trust_region_ratio(logps, old_logps, teacher_logps, anchor=anchor, clamp_gradient=clamp_gradient)
    assert ratio.dtype == torch.float32 and ratio.isfinite().all()
    slope = gradient_of(
        lambda lp: trust_region_ratio(lp, old_logps, teacher_logps, anchor=anchor, clamp_gradient=clamp_gradient),
        logps,
    )
    assert slope.isfinite().all()
    # geometric: e^{±½} and e^{−½} · e^{½} = 1; arithmetic: 1/α, 0 and e^−1/α
    wanted = [math.exp(0.5), math.exp(-0.5), 1.0] if anchor == "geometric" else [2.0, 0.0, 2.0 * math.exp(-1.0)]
    torch.testing.assert_close(ratio[0], torch.tensor(wanted), rtol=1e-5, atol=0)
    share = 0.5 if anchor == "geometric" and clamp_gradient == "hard" else 1.0
    torch.testing.assert_close(slope.float()[0], share * torch.tensor(wanted), rtol=4e-3, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha must lie above 0 and at most at 1, got 0.0"),
        ({"alpha": 1.1}, "alpha must lie above 0 and at most at 1, got 1.1"),
        ({"clamp": 0.0}, "clamp must be positive and at most 40 nats, got 0.0"),
        ({"anchor": "harmonic"}, "unknown anchor 'harmonic'; known: geometric, arithmetic"),
        ({"clamp_gradient": "soft"}, "unknown clamp_gradient 'soft'; known: hard, straight_through"),
    ],
)
def test_settings_of_the_ratio_that_are_refused(options: dict[str, object], message: str) -> None:
    logps, teacher_logps = tokens()
    with pytest.raises(ValueError, match=message):
        trust_region_ratio(logps, logps, teacher_logps, **options)  # type: ignore[arg-type]
