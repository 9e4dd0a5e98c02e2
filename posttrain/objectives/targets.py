"""Explicit target distributions and the pseudo-rewards that lead a policy to them, for every f-divergence.

A target is p(y|x) = π_ref(y|x) φ(x, y)/Z_x with Z_x = E_ref[φ]. For u = π_θ/p over whole answers,

    ∇D_f(π_θ‖p) = E_π[f'(u) ∇ log π_θ],

so −f'(u) is the reward of a policy gradient that minimises D_f(π_θ‖p). Everything here is per answer, log-probs summed
over its tokens, in nats; no gradient flows through any of it.

Source: f-DPG, arXiv 2302.08215, Theorem 1.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posttrain.objectives import preference
from posttrain.objectives.divergences import LOG_2, Score, at_least_float32

TARGETS = ("filter", "tilt")
"""The reference given that the verifier accepts, and the reference tilted by the reward."""

EDGE = 8.0
"""Where a pseudo-reward that grows with p/π_θ or π_θ/p continues linearly (nats), as preference scores do."""

_OWN: dict[str, Score] = {
    "chi2": Score(text="2(e^d − 1)", value=lambda d: 2.0 * torch.expm1(d), slope=lambda d: 2.0 * math.exp(d), side=1.0),
    "chi2_forward": Score(
        text="1 − e^{−2d}", value=lambda d: -torch.expm1(-2.0 * d), slope=lambda d: 2.0 * math.exp(-2.0 * d), side=-0.5
    ),
    "total_variation": Score(text="½ sign(d)", value=lambda d: 0.5 * d.sign(), slope=lambda d: 0.0),
}
"""f'(e^d) where no preference score exists: here f' need not be invertible."""

NAMES = (*preference.NAMES, *_OWN)
"""The divergences that a policy can be led by; `chi2_forward` is χ²(p‖π_θ), and `chi2` is χ²(π_θ‖p)."""

_BOUNDED = {"forward_kl": 1.0, "js": LOG_2, "chi2_forward": 1.0, "total_variation": 0.5}
"""f'(∞), in the scale of the score, where it is finite; for `alpha` it is 1/α."""


def check(name: str, target: str, alpha: float | None = None) -> None:
    """Refuse a divergence that is unknown, or infinite wherever the policy gives answers that the target excludes.

    Raises:
        ValueError: unknown name or target, alpha missing, superfluous or out of range, or f'(∞) = ∞ with `filter`.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target '{target}'; known: {', '.join(TARGETS)}.")
    if name not in NAMES:
        raise ValueError(f"unknown divergence '{name}'; known: {', '.join(NAMES)}.")
    if name not in _OWN:
        preference.check(name, alpha)
    elif alpha is not None:
        raise ValueError(f"alpha = {alpha} has no effect on the divergence '{name}': remove it.")
    if target == "filter" and math.isinf(_at_infinity(name, alpha)):
        named = name if alpha is None else f"alpha = {alpha:g}"
        raise ValueError(
            f"the divergence '{named}' from a filter is infinite, because the policy gives wrong answers a probability "
            f"and the filter none: set target = tilt, or divergence to one of {', '.join((*_BOUNDED, 'alpha'))}."
        )


def _at_infinity(name: str, alpha: float | None) -> float:
    if name == "alpha":
        return 1.0 / alpha if alpha is not None and alpha >= preference.SMALLEST_ALPHA else math.inf
    return _BOUNDED.get(name, math.inf)


def log_weight(target: str, rewards: Float[Tensor, "*shape"], *, beta: float | None = None) -> Float[Tensor, "*shape"]:
    """log φ of each answer (nats): 0 or −∞ for `filter`, φ = 1[r = 1]; r/β for `tilt`, φ = e^{r/β}.

    Args:
        target: one of `TARGETS`.
        rewards: r of each answer; for `filter` 1 (to 1e-6) is right, and anything else is wrong.
        beta: β > 0 of `tilt` (reward per nat).

    Raises:
        ValueError: unknown target, or beta missing or superfluous.

    Source: f-DPG, arXiv 2302.08215 (binary preferences, and the target that is implicit in RLHF).
    Differs: nothing.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target '{target}'; known: {', '.join(TARGETS)}.")
    if (beta is None) != (target == "filter"):
        raise ValueError(f"beta = {beta} does not go with target = {target}: tilt needs one, filter has none.")
    if beta is not None:
        return rewards / beta
    right = (rewards - 1.0).abs() <= 1e-6
    return torch.where(right, 0.0, -torch.inf).to(rewards.dtype)


def log_partition(
    log_ratio: Float[Tensor, "P G"], log_weights: Float[Tensor, "P G"], counted: Bool[Tensor, "P G"]
) -> Float[Tensor, " P"]:
    """log of the mean of π_ref/π_old φ over a prompt's G answers, which π_old drew: an unbiased estimate of Z_x.

    −∞ where no weight is positive, and NaN where no answer counts.

    Args:
        log_ratio: log π_old(y|x) − log π_ref(y|x) (nats).
        log_weights: log φ.
        counted: answers that could be scored; the others are left out of the mean.
    Source: importance sampling, as in f-DPG, arXiv 2302.08215. Differs: per prompt.
    """
    weights = torch.where(counted, log_weights - log_ratio, -torch.inf)
    return torch.logsumexp(weights, dim=1) - counted.sum(dim=1).to(weights.dtype).log()


def decayed_log_sum(log_sum: float, log_value: float, momentum: float) -> float:
    """log(m e^{log_sum} + e^{log_value}); −∞ stands for 0."""
    kept = log_sum + math.log(momentum) if momentum > 0.0 else -math.inf
    return float(np.logaddexp(kept, log_value))


def pseudo_reward(name: str, log_t: Float[Tensor, "*shape"], *, alpha: float | None = None) -> Float[Tensor, "*shape"]:
    """−f'(t) up to a constant, t = π_θ(y|x)/p(y|x) over the whole answer; to be maximised.

    Decreasing in t, 0 at t = 1. At log t = +∞, an answer that the target excludes, it is the limit −f'(∞). Where it
    grows like r^a or r^−a, r = p/π_θ, it is exact to a |log t| = `EDGE` and linear beyond; finite for |log t| ≤ 10⁴.

        forward_kl KL(p‖π_θ): r − 1                reverse_kl KL(π_θ‖p): log r
        chi2_forward χ²(p‖π_θ): r² − 1             chi2 χ²(π_θ‖p): 2 (1 − 1/r)
        js 2 JS: log(½ (1 + r))                    total_variation: ½ sign(log r)
        alpha: (r^α − 1)/α                         jeffreys, chi2_kl: as their scores

    Args:
        name: one of `NAMES`.
        log_t: log π_θ − log p (nats), any shape, or +∞.
        alpha: for "alpha" only.

    Raises:
        ValueError: unknown name, alpha missing, superfluous or out of range.

    Source: f-DPG, arXiv 2302.08215. Differs: the linear continuation, constants that make it 0 at t = 1, and
    that `alpha`, `jeffreys` and `chi2_kl` are added.
    """
    d = at_least_float32(log_t)
    absent = d == torch.inf
    inside = torch.where(absent, 0.0, d)
    if name in _OWN:
        own = _OWN[name]
        bound = EDGE * own.side
        scores = own.value(inside) if not own.side else (own.below if own.side > 0 else own.above)(inside, bound)
    else:
        scores = preference.score(name, inside, alpha=alpha, edge=EDGE)
    return -torch.where(absent, _at_infinity(name, alpha), scores)


def leave_one_out(values: Float[Tensor, "P G"], counted: Bool[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Each answer's value minus the mean of the *other* counted answers to its prompt; 0 where there is none.

    The baseline of an answer does not depend on that answer, so that the policy gradient's expectation is unchanged.
    Source: RLOO, arXiv 2402.14740. Differs: nothing.
    """
    held = torch.where(counted, values, 0.0)
    number = counted.sum(dim=1, keepdim=True)
    centred = (number * held - held.sum(dim=1, keepdim=True)) / (number - 1).clamp(min=1)
    return torch.where(counted, centred, 0.0)
