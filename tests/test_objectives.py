"""What every per-token objective promises, in one place; clipping, KL estimates and averaging by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from posttrain.objectives import distillation, extraction, signals
from posttrain.objectives.divergences import FORMS, js_policy_half, js_reference_half, token_divergence
from posttrain.objectives.policy import clipped_surrogate, importance_ratio, kl_k2, kl_k3
from posttrain.objectives.reduce import LOSS_TYPES, reduce, token_mean

ROWS, TOKENS = 3, 5
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logps, other_logps, advantages) → per token; the other policy is the old one or the reference."""


def surrogate(delta: float | None) -> Objective:
    return lambda logps, other, advantages: clipped_surrogate(
        importance_ratio(logps, other), advantages, epsilon_low=0.2, epsilon_high=0.28, delta=delta
    )


def divergence(name: str, alpha: float | None = None) -> Objective:
    return lambda logps, other, _: token_divergence(name, logps - other, alpha=alpha)


def distil(name: str) -> Objective:
    return lambda logps, other, _: distillation.distillation_loss(name, logps, other, other)


def trrd(anchor: str) -> Objective:
    return lambda logps, other, advantages: clipped_surrogate(
        distillation.trust_region_ratio(logps, other, other + 0.3, anchor=anchor),
        advantages,
        epsilon_low=0.2,
        epsilon_high=0.28,
    )


def extract(name: str) -> Objective:
    """Of one value per token; those of one value per answer are in tests/test_extraction.py."""
    everywhere = torch.ones(ROWS, TOKENS)
    return lambda logps, other, advantages: extraction.extraction_loss(
        name, logps, other, everywhere, advantages, (advantages > 0).double()
    )


def learn(region: str) -> Objective:
    """Signals are the other policy's log-probs, whatever they mean: they are negative, and differ by token."""
    return lambda logps, other, _: signals.distillation_loss(logps - other, other, trust_region=region, kl_coef=0.5)


OBJECTIVES: dict[str, Objective] = {
    "clipped_surrogate": surrogate(None),
    "clipped_surrogate_delta": surrogate(3.0),
    "kl_k2": lambda logps, other, _: kl_k2(logps, other),
    "kl_k3": lambda logps, other, _: kl_k3(logps, other),
    **{name: divergence(name) for name in FORMS},
    "alpha": divergence("alpha", 0.5),
    **{f"distillation_{name}": distil(name) for name in distillation.SAMPLED_ESTIMATORS},
    **{f"trrd_{anchor}": trrd(anchor) for anchor in distillation.ANCHORS},
    **{f"extract_{name}": extract(name) for name in extraction.PER_TOKEN},
    **{f"distil_{region}": learn(region) for region in signals.TRUST_REGIONS},
    "js_reference_half": lambda logps, other, _: js_reference_half(logps - other),
    "js_policy_half": lambda logps, other, _: js_policy_half(logps - other, importance_ratio(logps, other)),
}

every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
every_loss_type = pytest.mark.parametrize("loss_type", LOSS_TYPES)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """logps and other_logps [3, 5], at most 2 nats apart, and advantages [3, 1]; float64."""
    generator = torch.Generator().manual_seed(11)
    other = -3.0 * torch.rand(ROWS, TOKENS, generator=generator, dtype=torch.float64)
    gap = torch.rand(ROWS, TOKENS, generator=generator, dtype=torch.float64) * 4.0 - 2.0
    return other + gap, other, torch.tensor([[1.5], [-0.7], [-1.2]], dtype=torch.float64)


def loss_of(
    objective: Objective, loss_type: str, logps: Tensor, other: Tensor, advantages: Tensor, mask: Tensor = MASK
) -> tuple[float, Tensor]:
    """The reduced loss and its gradient with respect to logps."""
    logps = logps.detach().clone().requires_grad_()
    loss = reduce(objective(logps, other, advantages), mask, loss_type=loss_type, tokens=9, max_length=TOKENS)
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss.item(), gradient


@every_objective
@every_loss_type
def test_masked_positions_do_not_matter(objective: Objective, loss_type: str) -> None:
    logps, other, advantages = batch()
    value, gradient = loss_of(objective, loss_type, logps, other, advantages)
    masked = MASK == 0
    spoilt = torch.where(masked, logps + 3.0, logps), torch.where(masked, other - 7.0, other)
    spoilt_value, spoilt_gradient = loss_of(objective, loss_type, *spoilt, advantages)
    assert spoilt_value == value
    torch.testing.assert_close(spoilt_gradient, gradient, rtol=0, atol=0)
    assert (gradient[masked] == 0).all()
    assert (gradient[~masked] != 0).any()


@every_objective
@every_loss_type
def test_the_order_of_the_rows_does_not_matter(objective: Objective, loss_type: str) -> None:
    logps, other, advantages = batch()
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        objective(logps[order], other[order], advantages[order]), objective(logps, other, advantages)[order]
    )
    value, gradient = loss_of(objective, loss_type, logps, other, advantages)
    permuted = loss_of(objective, loss_type, logps[order], other[order], advantages[order], MASK[order])
    assert permuted[0] == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(permuted[1], gradient[order])


@every_objective
def test_the_gradient_equals_finite_differences(objective: Objective) -> None:
    logps, other, advantages = batch()
    assert torch.autograd.gradcheck(
        lambda x: objective(x, other, advantages), logps.requires_grad_(), eps=1e-6, rtol=1e-6, atol=1e-8
    )


@every_objective
@every_loss_type
@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.float32])
def test_a_batch_without_tokens_gives_a_differentiable_zero(
    objective: Objective, loss_type: str, mask_dtype: torch.dtype
) -> None:
    logps, other, advantages = batch()
    logps.requires_grad_()
    mask = torch.zeros(ROWS, TOKENS, dtype=mask_dtype)
    loss = reduce(objective(logps, other, advantages), mask, loss_type=loss_type, tokens=0, max_length=TOKENS)
    loss.backward()
    assert loss.item() == 0.0
    assert logps.grad is not None and (logps.grad == 0).all()


@every_objective
def test_a_value_per_token_comes_out(objective: Objective) -> None:
    assert objective(*batch()).shape == (ROWS, TOKENS)


def test_annotated_shapes_are_executed() -> None:
    with pytest.raises(TypeCheckError):
        kl_k2(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(TypeCheckError):
        clipped_surrogate(torch.ones(2, 3), torch.ones(2), epsilon_low=0.2, epsilon_high=0.2)


# ---------------------------------------------------------------- clipping, by hand


@pytest.mark.parametrize(
    ("ratio", "advantage", "delta", "loss", "slope"),
    [
        (2.0, 1.0, None, -1.2, 0.0),  # clipped at 1 + 0.2
        (2.0, -1.0, None, 2.0, 1.0),  # the minimum keeps the worse of the two: never clipped from above
        (2.0, -1.0, 1.5, 1.5, 0.0),  # dual clip
        (2.0, 1.0, 1.5, -1.2, 0.0),  # which leaves good tokens alone
        (0.5, 1.0, None, -0.5, -1.0),  # never clipped from below
        (0.5, -1.0, None, 0.7, 0.0),  # clipped at 1 − 0.3
        (1.0, 2.5, None, -2.5, -2.5),  # on policy: −Â r
        (1.1, -2.0, 3.0, 2.2, 2.0),
    ],
)
def test_clipping(ratio: float, advantage: float, delta: float | None, loss: float, slope: float) -> None:
    ratios = torch.full((2, 3), ratio, dtype=torch.float64, requires_grad=True)
    advantages = torch.full((2, 1), advantage, dtype=torch.float64)
    found = clipped_surrogate(ratios, advantages, epsilon_low=0.3, epsilon_high=0.2, delta=delta)
    torch.testing.assert_close(found, torch.full((2, 3), loss, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(found.sum(), ratios)
    torch.testing.assert_close(gradient, torch.full((2, 3), slope, dtype=torch.float64))


def test_advantages_per_token() -> None:
    ratio = torch.tensor([[1.0, 2.0, 2.0]])
    found = clipped_surrogate(ratio, torch.tensor([[1.0, 1.0, -1.0]]), epsilon_low=0.2, epsilon_high=0.2)
    torch.testing.assert_close(found, torch.tensor([[-1.0, -1.2, 2.0]]))


def test_the_importance_ratio() -> None:
    ratio = importance_ratio(torch.tensor([[0.5, 0.2]]).log(), torch.tensor([[0.25, 0.8]]).log())
    torch.testing.assert_close(ratio, torch.tensor([[2.0, 0.25]]))


# ---------------------------------------------------------------- KL estimates on tokens drawn from the policy


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p‖q) (nats)."""
    return (p * (p / q).log()).sum()


def reverse(p: Tensor, q: Tensor) -> Tensor:
    """KL(π_θ‖π_ref)."""
    return kl(p, q)


def forward(p: Tensor, q: Tensor) -> Tensor:
    """KL(π_ref‖π_θ)."""
    return kl(q, p)


@pytest.mark.parametrize(
    ("estimate", "has_the_gradient_of"),
    [
        pytest.param(lambda lp, old, ref: importance_ratio(lp, old) * (lp - ref), reverse, id="ratio_k1"),
        pytest.param(lambda lp, old, ref: kl_k2(lp, ref), reverse, id="k2"),
        pytest.param(lambda lp, old, ref: kl_k3(lp, ref), forward, id="k3"),
        pytest.param(lambda lp, old, ref: importance_ratio(lp, old) * kl_k3(lp, ref), reverse, id="ratio_k3"),
    ],
)
def test_the_expected_gradients_of_the_estimates(
    estimate: Callable[[Tensor, Tensor, Tensor], Tensor], has_the_gradient_of: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Every outcome is one token, weighted with its probability: exact sums, no sampling."""
    logits = torch.tensor([[0.3, -1.0, 0.8, 0.1]], dtype=torch.float64, requires_grad=True)
    ref_logps = torch.tensor([[-0.5, 0.4, 0.2, 1.0]], dtype=torch.float64).log_softmax(-1)
    logps = logits.log_softmax(-1)
    sampled_from = logps.detach()
    mean = (sampled_from.exp() * estimate(logps, sampled_from, ref_logps)).sum()
    (ours,) = torch.autograd.grad(mean, logits)
    (wanted,) = torch.autograd.grad(has_the_gradient_of(logits.softmax(-1), ref_logps.exp()), logits)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)


def test_k3_estimates_the_reverse_kl_without_bias_and_k2_to_second_order() -> None:
    ref_logps = torch.tensor([[-0.5, 0.4, 0.2, 1.0]], dtype=torch.float64).log_softmax(-1)
    logps = torch.tensor([[0.3, -1.0, 0.8, 0.1]], dtype=torch.float64).log_softmax(-1)
    exact = reverse(logps.exp(), ref_logps.exp())
    torch.testing.assert_close((logps.exp() * kl_k3(logps, ref_logps)).sum(), exact)
    close = (ref_logps + 0.01 * (logps - ref_logps)).log_softmax(-1)
    second_order = (close.exp() * kl_k2(close, ref_logps)).sum()
    torch.testing.assert_close(second_order, reverse(close.exp(), ref_logps.exp()), rtol=0.01, atol=0)


# ---------------------------------------------------------------- averaging, by hand

PER_TOKEN = torch.tensor([[1.0, 2.0, 4.0], [10.0, 20.0, 40.0]])
SIX = torch.tensor([[1, 1, 1], [1, 0, 0]])
"""Row 0: 1 + 2 + 4 = 7 over 3 tokens. Row 1: 10 over 1 token. In all 17 over 4 tokens in 2 rows."""


@pytest.mark.parametrize(
    ("loss_type", "wanted"),
    [
        ("grpo", (7 / 3 + 10) / 2),
        ("bnpo", 17 / 4),
        ("dr_grpo", 17 / (2 * 5)),  # max_length 5
        ("dapo", 17 / 8),  # tokens 8
    ],
)
@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.float32])
def test_reduce(loss_type: str, wanted: float, mask_dtype: torch.dtype) -> None:
    for tokens in (8, 8.0, torch.tensor(8), torch.tensor(8.0)):
        loss = reduce(PER_TOKEN, SIX.to(mask_dtype), loss_type=loss_type, tokens=tokens, max_length=5)
        assert loss.item() == pytest.approx(wanted, rel=1e-6)


def test_a_row_without_tokens_counts_as_zero_in_grpo() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])  # (1 + 2) / 2 and nothing, over 2 rows
    assert reduce(PER_TOKEN, mask, loss_type="grpo", tokens=8, max_length=5).item() == pytest.approx(0.75)


def test_an_unknown_loss_type_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown loss_type 'gspo'; known: grpo, bnpo, dr_grpo, dapo"):
        reduce(PER_TOKEN, SIX, loss_type="gspo", tokens=8, max_length=5)


def test_micro_batches_of_any_size_add_up_to_the_token_mean_of_the_step() -> None:
    whole = token_mean(PER_TOKEN, SIX, 4)
    parts = sum(token_mean(PER_TOKEN[row : row + 1], SIX[row : row + 1], 4) for row in range(2))
    torch.testing.assert_close(parts, whole)
    assert whole.item() == 17 / 4


def test_no_rows_at_all_are_a_differentiable_zero() -> None:
    per_token = torch.zeros(0, 3, requires_grad=True)
    loss = token_mean(per_token, torch.zeros(0, 3), 4)
    loss.backward()
    assert loss.item() == 0.0
