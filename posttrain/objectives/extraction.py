"""Losses that extract what fixed rollouts say about right and wrong, with little or nothing that holds them back.

d = log π_θ − log π_0 per token, π_0 the policy that drew the answers: the anchor stays π_0 however often answers are
seen. S = Σ d over an answer's tokens is its log-ratio, β S its implicit reward.

| name | minimised | one value per | bounded |
|---|---|---|---|
| `sapo` | −f(ρ) Â, ρ = e^d, f(ρ) = 4/τ · σ(τ (ρ − 1)) | token | softly, above |
| `is` | −ρ Â | token | no |
| `clip` | −min(ρ Â, clip(ρ, 1 − ε_low, 1 + ε_high) Â), a baseline | token | yes |
| `sft` | −log π_θ, on answers of one verdict only | token | no |
| `ce` | −r log σ(β S) − (1 − r) log σ(−β S) | answer | softly, both ways |
| `mse` | (β S − Â)² | answer | ends at β S = Â |

*Unlearning*, which makes a policy that serves as a reference, is the same loss with Â → −Â and r → 1 − r; for `sft`
it is the cross entropy on wrong answers in place of right ones.

Sourced from ERPD, arXiv 2605.25582: that sapo and ce make strong teachers, mse and an unlearned reference weak ones.
Reconstructed, for its equations were not available to us: every form here but `sapo` (arXiv 2511.20347) and `clip`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor

from posttrain.objectives.divergences import MAX_LOG_RATIO_CLAMP, Form, at_least_float32
from posttrain.objectives.policy import clipped_surrogate

PER_TOKEN = ("sapo", "is", "clip", "sft")
"""Losses with a value for every token, which `reduce` averages as `loss_type` says."""

PER_ANSWER = ("ce", "mse")
"""Losses with one value for an answer, to be averaged over answers."""

LOSSES = (*PER_TOKEN, *PER_ANSWER)

_RATIO = Form(text="u", value=torch.exp, slope=math.exp)


def bounded_ratio(log_ratio: Float[Tensor, "*S"], *, log_ratio_clamp: float = 10.0) -> Float[Tensor, "*S"]:
    """ρ = e^d up to `log_ratio_clamp` (nats) and its tangent above, so that no ratio leaves float32; dimensionless.

    Half precision is computed, and returned, in float32.

    Raises:
        ValueError: the clamp is not above 0 and at most `MAX_LOG_RATIO_CLAMP`.
    Source: the importance ratio. Differs: the tangent, with which a token far above π_0 keeps a slope of e^clamp.
    """
    check_clamp(log_ratio_clamp)
    return _RATIO.below(at_least_float32(log_ratio), log_ratio_clamp)


def sapo_gate(
    ratio: Float[Tensor, "B T"], temperature: float | Float[Tensor, "B 1"] | Float[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """f(ρ) = 4/τ · σ(τ (ρ − 1)): slope 1 at ρ = 1, falling to 0 on both sides; dimensionless.

    The larger τ, the narrower the region in which a token still counts.
    Source: SAPO, arXiv 2511.20347. Differs: nothing.
    """
    return 4.0 / temperature * torch.sigmoid(temperature * (ratio - 1.0))


def soft_gated(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B 1"],
    *,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
) -> Float[Tensor, "B T"]:
    """−f(ρ) Â, to be minimised; reward units. τ is `temperature_positive` where Â > 0, else `temperature_negative`.

    The ratio is held at e^40, where the gate has been flat for long: value and gradient are what they are without that.
    Source: SAPO, arXiv 2511.20347; its temperatures are the defaults. Differs: nothing.
    """
    ratio = at_least_float32(log_ratio).clamp(max=MAX_LOG_RATIO_CLAMP).exp()
    temperature = torch.where(advantages > 0, temperature_positive, temperature_negative).to(ratio.dtype)
    return -sapo_gate(ratio, temperature) * advantages


def importance_weighted(
    log_ratio: Float[Tensor, "B T"], advantages: Float[Tensor, "B 1"], *, log_ratio_clamp: float = 10.0
) -> Float[Tensor, "B T"]:
    """−ρ Â, to be minimised; reward units. The policy gradient on π_0's answers, without any trust region.

    Raises:
        ValueError: as `bounded_ratio`.
    Source: reconstructed. Differs: the tangent above `log_ratio_clamp` (nats).
    """
    return -bounded_ratio(log_ratio, log_ratio_clamp=log_ratio_clamp) * advantages


def static_clip(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B 1"] | Float[Tensor, "B T"],
    *,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None = None,
    log_ratio_clamp: float = 10.0,
) -> Float[Tensor, "B T"]:
    """`clipped_surrogate` with ρ = π_θ/π_0, to be minimised; reward units.

    Raises:
        ValueError: as `bounded_ratio`.
    Source: PPO, arXiv 1707.06347, Eq. 7. Differs: π_old is π_0 for ever; the tangent above `log_ratio_clamp` (nats).
    """
    ratio = bounded_ratio(log_ratio, log_ratio_clamp=log_ratio_clamp)
    return clipped_surrogate(
        ratio, advantages.to(ratio.dtype), epsilon_low=epsilon_low, epsilon_high=epsilon_high, delta=delta
    )


def answer_log_ratio(log_ratio: Float[Tensor, "B T"], mask: Num[Tensor, "B T"]) -> Float[Tensor, "B 1"]:
    """S = Σ d over an answer's tokens; nats per answer, in float32 at least. Source: the chain rule."""
    return at_least_float32(log_ratio).masked_fill(mask == 0, 0.0).sum(dim=1, keepdim=True)


def implicit_cross_entropy(
    answer_log_ratios: Float[Tensor, "B 1"], rewards: Float[Tensor, "B 1"], *, beta: float
) -> Float[Tensor, "B 1"]:
    """−r log σ(β S) − (1 − r) log σ(−β S), to be minimised; nats per answer. The policy as a classifier of its answers.

    Args:
        answer_log_ratios: S (nats).
        rewards: r between 0 and 1.
        beta: β > 0 (reward per nat).

    Raises:
        ValueError: β is not positive and finite.
    Source: reconstructed. Differs: not known.
    """
    check_beta(beta)
    scores = beta * at_least_float32(answer_log_ratios)
    return -(rewards * F.logsigmoid(scores) + (1.0 - rewards) * F.logsigmoid(-scores))


def implicit_squared_error(
    answer_log_ratios: Float[Tensor, "B 1"], advantages: Float[Tensor, "B 1"], *, beta: float
) -> Float[Tensor, "B 1"]:
    """(β S − Â)², to be minimised; reward units². Ends by itself: no gradient where β S = Â.

    Raises:
        ValueError: β is not positive and finite.
    Source: reconstructed. Differs: not known.
    """
    check_beta(beta)
    return (beta * at_least_float32(answer_log_ratios) - advantages).square()


def extraction_loss(
    name: str,
    logps: Float[Tensor, "B T"],
    base_logps: Float[Tensor, "B T"],
    mask: Num[Tensor, "B T"],
    advantages: Float[Tensor, "B 1"],
    rewards: Float[Tensor, "B 1"],
    *,
    beta: float = 0.1,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    log_ratio_clamp: float = 10.0,
) -> Float[Tensor, "B T"]:
    """One of `LOSSES` for every token, to be minimised; one of `PER_ANSWER` is the same at all tokens of an answer.

    Averaged over an answer's tokens and then over answers (`loss_type: grpo`), the latter is the mean over answers.
    `sft` reads neither advantages nor rewards: which answers it is given decides what is learned.

    Args:
        name: of the loss.
        logps: log π_θ, with gradient (nats).
        base_logps: log π_0 (nats).
        mask: 1 on the answers' tokens.
        advantages: Â, negated to unlearn.
        rewards: r between 0 and 1, `1 − r` to unlearn.

    Raises:
        ValueError: there is no such loss, or as the loss itself.
    """
    log_ratio = logps - base_logps
    if name == "sapo":
        return soft_gated(
            log_ratio,
            advantages,
            temperature_positive=temperature_positive,
            temperature_negative=temperature_negative,
        )
    if name == "is":
        return importance_weighted(log_ratio, advantages, log_ratio_clamp=log_ratio_clamp)
    if name == "clip":
        return static_clip(
            log_ratio,
            advantages,
            epsilon_low=epsilon_low,
            epsilon_high=epsilon_high,
            delta=delta,
            log_ratio_clamp=log_ratio_clamp,
        )
    if name == "sft":
        return -at_least_float32(logps)
    if name not in PER_ANSWER:
        raise ValueError(f"unknown extract_loss '{name}'; known: {', '.join(LOSSES)}.")
    total = answer_log_ratio(log_ratio, mask)
    if name == "ce":
        return implicit_cross_entropy(total, rewards, beta=beta).expand_as(log_ratio)
    return implicit_squared_error(total, advantages, beta=beta).expand_as(log_ratio)


def check_clamp(log_ratio_clamp: float) -> None:
    """Refuse a clamp of `bounded_ratio` that is not above 0 and at most `MAX_LOG_RATIO_CLAMP`.

    Raises:
        ValueError: it is not.
    """
    if not 0.0 < log_ratio_clamp <= MAX_LOG_RATIO_CLAMP:
        raise ValueError(
            f"log_ratio_clamp must be positive and at most {MAX_LOG_RATIO_CLAMP:g} nats, got {log_ratio_clamp}."
        )


def check_beta(beta: float) -> None:
    """Refuse a β of the implicit reward that is not positive and finite.

    Raises:
        ValueError: it is not.
    """
    if not 0.0 < beta < math.inf:
        raise ValueError(f"β of the implicit reward must be positive and finite, got {beta}.")
