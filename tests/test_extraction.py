"""Extraction losses: values and slopes by hand, what they end at, and that no log-ratio breaks them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from posttrain.objectives.extraction import (
    LOSSES,
    PER_ANSWER,
    answer_log_ratio,
    bounded_ratio,
    extraction_loss,
    implicit_cross_entropy,
    implicit_squared_error,
    sapo_gate,
    soft_gated,
    static_clip,
)
from posttrain.objectives.policy import clipped_surrogate, importance_ratio
from posttrain.objectives.reduce import reduce

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
ADVANTAGES = torch.tensor([[1.5], [-0.7], [-1.2]], dtype=torch.float64)
REWARDS = torch.tensor([[1.0], [0.0], [0.25]], dtype=torch.float64)

every_loss = pytest.mark.parametrize("name", LOSSES)
every_answer_loss = pytest.mark.parametrize("name", PER_ANSWER)


def batch() -> tuple[Tensor, Tensor]:
    """log π_θ and log π_0 [3, 5], at most 2 nats apart; float64."""
    generator = torch.Generator().manual_seed(11)
    base = -3.0 * torch.rand(3, 5, generator=generator, dtype=torch.float64)
    return base + torch.rand(3, 5, generator=generator, dtype=torch.float64) * 4.0 - 2.0, base


def loss(name: str, logps: Tensor, base: Tensor, mask: Tensor = MASK) -> Tensor:
    return extraction_loss(name, logps, base, mask, ADVANTAGES.to(logps.dtype), REWARDS.to(logps.dtype))


# ---------------------------------------------------------------- values and slopes, by hand


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.05, 4.0])
def test_the_gate_begins_with_the_slope_of_the_ratio(temperature: float) -> None:
    """f(1) = 2/τ, f'(1) = 1, half of the slope gone where σ(1 − σ) = 1/8, that is at τ (ρ − 1) = ± log(3 + √8)."""
    half = math.log(3 + math.sqrt(8)) / temperature
    ratio = torch.tensor([[1.0, 1.0 + half, 1.0 - half]], dtype=torch.float64, requires_grad=True)
    gate = sapo_gate(ratio, temperature)
    assert gate[0, 0].item() == pytest.approx(2.0 / temperature)
    (slope,) = torch.autograd.grad(gate.sum(), ratio)
    torch.testing.assert_close(slope, torch.tensor([[1.0, 0.5, 0.5]], dtype=torch.float64))


def test_sapo_starts_as_the_policy_gradient_and_narrows_on_negative_advantages() -> None:
    """At ρ = 1 the gradient of −f(ρ) Â is −Â, as that of −ρ Â; at ρ = 2 it is −Â · 2 · 4 σ(τ)(1 − σ(τ))."""
    advantages = torch.tensor([[2.0], [-2.0]], dtype=torch.float64)
    log_ratio = torch.tensor([[0.0, math.log(2.0)], [0.0, math.log(2.0)]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(soft_gated(log_ratio, advantages).sum(), log_ratio)

    def narrowed(tau: float) -> float:
        sigma = 1 / (1 + math.exp(-tau))
        return 2 * 4 * sigma * (1 - sigma)

    wanted = [[-2.0, -2.0 * narrowed(1.0)], [2.0, 2.0 * narrowed(1.05)]]
    torch.testing.assert_close(slope, torch.tensor(wanted, dtype=torch.float64))
    assert narrowed(1.05) < narrowed(1.0)


@every_loss
def test_every_policy_gradient_starts_alike(name: str) -> None:
    """At π_θ = π_0: −Â per token of sapo, is and clip; −1 of sft; −β (r − ½) of ce; −2 β Â of mse, with β = 0.1."""
    _, base = batch()
    logps = base.clone().requires_grad_()
    (slope,) = torch.autograd.grad((loss(name, logps, base)[:, :1]).sum() if name in PER_ANSWER else
                                   (loss(name, logps, base) * MASK).sum(), logps)  # fmt: skip
    per_answer = {"ce": -0.1 * (REWARDS - 0.5), "mse": -0.2 * ADVANTAGES, "sft": -torch.ones(3, 1).double()}
    torch.testing.assert_close(slope, per_answer.get(name, -ADVANTAGES) * MASK)


def test_the_ratio_goes_on_along_its_tangent() -> None:
    found = bounded_ratio(torch.tensor([[-3.0, 1.0, 2.0, 5.0]], dtype=torch.float64), log_ratio_clamp=2.0)
    e = math.e
    torch.testing.assert_close(found, torch.tensor([[e**-3, e, e**2, e**2 * 4]], dtype=torch.float64))


def test_a_clip_on_static_data_is_the_clipped_surrogate() -> None:
    logps, base = batch()
    found = static_clip(logps - base, ADVANTAGES, epsilon_low=0.2, epsilon_high=0.28, delta=3.0)
    wanted = clipped_surrogate(importance_ratio(logps, base), ADVANTAGES, epsilon_low=0.2, epsilon_high=0.28, delta=3.0)
    torch.testing.assert_close(found, wanted)


def test_cross_entropy_by_hand() -> None:
    """S = 1 + 2 over the mask, β = ½: σ(1.5) is the probability of a right answer."""
    total = answer_log_ratio(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[1, 1, 0]]))
    assert total.tolist() == [[3.0]]
    sigma = 1 / (1 + math.exp(-1.5))
    for reward, wanted in ((1.0, -math.log(sigma)), (0.0, -math.log(1 - sigma))):
        found = implicit_cross_entropy(total, torch.tensor([[reward]]), beta=0.5)
        assert found.item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("advantage", [1.5, -0.7])
def test_squared_error_ends_where_the_implicit_reward_is_the_advantage(advantage: float) -> None:
    """S = Â/β has neither loss nor slope; on either side of it the slope leads back."""
    beta = 0.25
    ends = torch.tensor([[advantage / beta]], dtype=torch.float64)
    slopes = []
    for offset in (0.0, -0.5, 0.5):
        total = (ends + offset).requires_grad_()
        found = implicit_squared_error(total, torch.tensor([[advantage]], dtype=torch.float64), beta=beta)
        (slope,) = torch.autograd.grad(found.sum(), total)
        slopes.append(slope.item())
        assert found.item() == pytest.approx((beta * offset) ** 2)
    assert slopes == pytest.approx([0.0, -2 * beta * beta * 0.5, 2 * beta * beta * 0.5])


@every_loss
def test_unlearning_turns_the_first_step_round(name: str) -> None:
    """Â → −Â and r → 1 − r: at π_θ = π_0 the gradient changes its sign; sft is told by its data instead."""
    if name == "sft":
        return
    _, base = batch()
    found = []
    for sign, rewards in ((1.0, REWARDS), (-1.0, 1.0 - REWARDS)):
        logps = base.clone().requires_grad_()
        value = extraction_loss(
            name, logps, base, MASK, sign * ADVANTAGES, rewards, temperature_positive=1.0, temperature_negative=1.0
        )
        found.append(torch.autograd.grad((value * MASK).sum(), logps)[0])
    assert found[0].abs().max() > 0.01
    torch.testing.assert_close(found[0], -found[1])


# ---------------------------------------------------------------- what every loss promises


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gap", [-100.0, 100.0])
def test_extreme_log_ratios_are_finite(name: str, dtype: torch.dtype, gap: float) -> None:
    """± 100 nats at every token: e^100 alone is no float32."""
    base = torch.full((3, 5), -1.0, dtype=dtype)
    logps = (base + gap).requires_grad_()
    value = loss(name, logps, base)
    assert value.dtype == torch.float32
    (gradient,) = torch.autograd.grad((value * MASK).sum(), logps)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


@every_answer_loss
def test_masked_positions_of_answers_do_not_matter(name: str) -> None:
    logps, base = batch()
    found = []
    for spoilt in (False, True):
        given = torch.where((MASK == 0) & spoilt, logps + 3.0, logps).requires_grad_()
        value = reduce(loss(name, given, base), MASK, loss_type="grpo", tokens=9, max_length=5)
        found.append((value.item(), torch.autograd.grad(value, given)[0]))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=0)
    assert (found[0][1][MASK == 0] == 0).all()
    assert (found[0][1][MASK == 1] != 0).all()


@every_answer_loss
def test_nan_behind_the_mask_stays_there(name: str) -> None:
    logps, base = batch()
    given = logps.masked_fill(MASK == 0, torch.nan)
    assert loss(name, given, base).isfinite().all()


@every_answer_loss
def test_one_value_per_answer_is_averaged_over_answers(name: str) -> None:
    logps, base = batch()
    total = answer_log_ratio(logps - base, MASK)
    single = {
        "ce": lambda: implicit_cross_entropy(total, REWARDS, beta=0.1),
        "mse": lambda: implicit_squared_error(total, ADVANTAGES, beta=0.1),
    }[name]()
    found = reduce(loss(name, logps, base), MASK, loss_type="grpo", tokens=9, max_length=5)
    torch.testing.assert_close(found, single.mean())


@every_answer_loss
def test_the_order_of_the_answers_does_not_matter(name: str) -> None:
    logps, base = batch()
    order = torch.tensor([2, 0, 1])
    turned = extraction_loss(name, logps[order], base[order], MASK[order], ADVANTAGES[order], REWARDS[order])
    torch.testing.assert_close(turned, loss(name, logps, base)[order])


@every_answer_loss
def test_the_gradient_of_answers_equals_finite_differences(name: str) -> None:
    logps, base = batch()
    assert torch.autograd.gradcheck(
        lambda x: loss(name, x, base), logps.requires_grad_(), eps=1e-6, rtol=1e-6, atol=1e-8
    )


@every_answer_loss
def test_answers_without_tokens_give_a_differentiable_zero(name: str) -> None:
    logps, base = batch()
    logps.requires_grad_()
    empty = torch.zeros_like(MASK)
    value = reduce(loss(name, logps, base, empty), empty, loss_type="grpo", tokens=0, max_length=5)
    value.backward()
    assert value.item() == 0.0
    assert logps.grad is not None and (logps.grad == 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "dpo"}, "unknown extract_loss 'dpo'; known: sapo, is, clip, sft, ce, mse"),
        ({"name": "ce", "beta": 0.0}, "β of the implicit reward must be positive and finite, got 0.0"),
        ({"name": "mse", "beta": math.inf}, "must be positive and finite, got inf"),
        ({"name": "is", "log_ratio_clamp": 41.0}, "log_ratio_clamp must be positive and at most 40 nats, got 41.0"),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, float], message: str) -> None:
    logps, base = batch()
    with pytest.raises(ValueError, match=message):
        extraction_loss(logps=logps, base_logps=base, mask=MASK, advantages=ADVANTAGES, rewards=REWARDS, **settings)
