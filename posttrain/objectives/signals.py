"""Token advantages from log-ratios of policies, what is made of them, and learning from them under a trust region.

For the optimum of reward minus β times a KL to π_0, β log π*/π_0 at a token is that token's advantage. So the log-ratio
of a policy that was optimised far, δ = log π_T − log π_0, supervises every token, whether or not that policy writes
well. Of other pairs of policies:

| signal | δ at a token | for |
|---|---|---|
| `teacher_base` | log π_T − log π_0 | a strong teacher |
| `teacher_unlearned` | log π_T − log π_U | a weak one: the drift that both share cancels |
| `base_unlearned` | log π_0 − log π_U | only a policy that went wrong: what it moved towards is bad |
| `mix` | Σ w_k δ^(k) / rms_k | several teachers |

Made of δ, in this order: end tokens left out, answers centred, contradictions of the verdict left out (each of them
optional, one answer at a time, `shaped`); then divided by the rms of a batch, small values left out, large ones cut
(`scaled`).

Sourced from ERPD, arXiv 2605.25582: that token-level log-ratios are distilled into the base policy under a trust
region, with an unlearned policy as another reference. Reconstructed: the equations, the transforms and their order, and
the trust regions; that log-ratios are advantages is a standard identity of KL-regularised optimisation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from posttrain.objectives.divergences import at_least_float32, token_divergence
from posttrain.objectives.extraction import bounded_ratio, static_clip

PAIRS = {
    "teacher_base": ("teacher", "base"),
    "teacher_unlearned": ("teacher", "unlearned"),
    "base_unlearned": ("base", "unlearned"),
}
"""Signals of two policies: whose log-probs, minus whose."""

SIGNALS = (*PAIRS, "mix")

SCALES = ("batch", "data", "none")
"""Over what the rms is taken that a signal is divided by; none leaves it in nats."""

TRUST_REGIONS = ("clip", "kl")

DIVERGENCES = ("forward_kl", "reverse_kl")
"""Penalties of the clip's trust region, as `token_divergence` names them."""

NOISE = 1e-4
"""Log-ratios (nats) up to which a policy has not moved: what one and the same model differs by between two batches."""


# ---------------------------------------------------------------- what a signal is


def log_ratio_signal(
    logps: Float[Tensor, "B T"], reference_logps: Float[Tensor, "B T"], mask: Num[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """δ = log π − log π_ref on the mask and 0 elsewhere; nats per token. Source: reconstructed."""
    return (logps - reference_logps).masked_fill(mask == 0, 0.0)


def rms(signals: Float[Tensor, "B T"], mask: Num[Tensor, "B T"]) -> Float[Tensor, ""]:
    """√(Σ δ² / tokens) over the mask, zeros included, in float64; 0 of no tokens."""
    square = signals.double().masked_fill(mask == 0, 0.0).square().sum()
    return (square / (mask != 0).sum().clamp(min=1)).sqrt()


def mixed(
    signals: Sequence[Float[Tensor, "B T"]], weights: Sequence[float], scales: Sequence[float]
) -> Float[Tensor, "B T"]:
    """Σ w_k δ^(k) / rms_k: every signal as loud as its weight says; dimensionless. One whose rms is 0 is silent.

    Raises:
        ValueError: there are none, or not as many weights and scales as signals.
    Source: reconstructed.
    """
    if not signals or not len(signals) == len(weights) == len(scales):
        raise ValueError(f"{len(signals)} signals to mix come with {len(weights)} weights and {len(scales)} scales.")
    total = torch.zeros_like(signals[0])
    for signal, weight, scale in zip(signals, weights, scales, strict=True):
        if scale > 0.0:
            total = total + weight * signal / scale
    return total


# ---------------------------------------------------------------- what is made of one


def shaped(
    signals: Float[Tensor, "B T"],
    mask: Num[Tensor, "B T"],
    *,
    correct: Bool[Tensor, "B 1"] | None = None,
    ends: Bool[Tensor, "B T"] | None = None,
    centre: bool = False,
) -> Float[Tensor, "B T"]:
    """The transforms that look at one answer at a time, in their order; nats per token, 0 outside the mask.

    Args:
        signals: δ, finite on the mask.
        mask: 1 on answer tokens.
        correct: verdicts, to leave out (0) what contradicts them: δ < 0 in a right answer, δ > 0 in a wrong one.
        ends: end-of-sequence tokens, to leave them out (0).
        centre: subtract from an answer the mean over its tokens, those left out before not among them.
    """
    counted = mask != 0
    if ends is not None:
        counted = counted & ~ends
    found = at_least_float32(signals).masked_fill(~counted, 0.0)
    if centre:
        mean = found.sum(dim=1, keepdim=True) / counted.sum(dim=1, keepdim=True).clamp(min=1)
        found = (found - mean).masked_fill(~counted, 0.0)
    if correct is not None:
        found = found.masked_fill(torch.where(correct, found < 0, found > 0), 0.0)
    return found


def scaled(
    signals: Float[Tensor, "B T"], scale: float, *, dead_zone: float = 0.0, bound: float | None = 3.0
) -> Float[Tensor, "B T"]:
    """δ / scale, 0 where that is smaller than `dead_zone`, and cut to ± `bound`; in units of the scale.

    With a scale of 0, which only a signal of zeros has, it is zeros. The dead zone is a hard one: what lies beyond it
    keeps its size.
    """
    if not scale > 0.0:
        return torch.zeros_like(signals)
    found = signals / scale
    if dead_zone > 0.0:
        found = found.masked_fill(found.abs() < dead_zone, 0.0)
    return found if bound is None else found.clamp(-bound, bound)


# ---------------------------------------------------------------- whether one is worth learning from


def auc(scores: Float[Tensor, " N"], correct: Bool[Tensor, " N"]) -> float:
    """The probability that a right answer has a higher score than a wrong one, ties counting ½; NaN without either.

    Source: the Mann-Whitney statistic, exactly, from ranks. Differs: nothing.
    """
    right = int(correct.sum())
    wrong = len(correct) - right
    if not right or not wrong:
        return float("nan")
    _, places, counts = scores.double().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks = (last - (counts.double() - 1.0) / 2.0)[places]  # the mean rank of equal scores, from 1
    above = float(ranks[correct].sum()) - right * (right + 1) / 2.0
    return above / (right * wrong)


def within_groups_auc(
    scores: Float[Tensor, " N"],
    correct: Bool[Tensor, " N"],
    groups: Int[Tensor, " N"],
) -> float:
    """`auc` over pairs of answers to one prompt only, so that easy and hard prompts are not told apart by it.

    Groups weigh as many as they have pairs; NaN where there is no pair.
    """
    above, pairs = 0.0, 0
    order = groups.argsort(stable=True)
    for part in order.split(groups[order].unique_consecutive(return_counts=True)[1].tolist()):
        right = int(correct[part].sum())
        count = right * (len(part) - right)
        if count:
            above, pairs = above + count * auc(scores[part], correct[part]), pairs + count
    return above / pairs if pairs else float("nan")


# ---------------------------------------------------------------- learning from one


def beyond_noise(log_ratio: Float[Tensor, "*S"], noise: float = NOISE) -> Float[Tensor, "*S"]:
    """d where |d| > `noise` (nats), else 0 without a gradient: a penalty on it does not answer to arithmetic."""
    return torch.where(log_ratio.abs() > noise, log_ratio, 0.0)


def distillation_loss(
    log_ratio: Float[Tensor, "B T"],
    signals: Float[Tensor, "B T"],
    *,
    trust_region: str,
    kl_coef: float,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    divergence: str = "forward_kl",
    log_ratio_clamp: float = 10.0,
) -> Float[Tensor, "B T"]:
    """Learn token advantages on π_0's answers near π_0, to be minimised; units of the signal.

    - `clip`: −min(ρ δ, clip(ρ, 1 − ε_low, 1 + ε_high) δ) + c D(d), D by default k3 of π_0's tokens, ρ − 1 − log ρ.
    - `kl`: −ρ δ + λ (ρ log ρ − ρ + 1). Of every next-token distribution after a prefix of π_0's, exactly the expected
      signal minus λ KL(π_θ‖π_0), up to noise: its optimum is π_0 e^{δ/λ} normalised there. For δ = log π_T − log π_0
      and λ = 1 that is π_T; for other λ it is π_0 (π_T/π_0)^{1/λ} normalised token by token, and of whole answers only
      where the normalisers of all prefixes are equal.

    A signal of 0 at a policy that has not moved (`NOISE`) has no gradient at all.

    Args:
        log_ratio: d = log π_θ − log π_0, with gradient (nats).
        signals: δ, however scaled.
        trust_region: one of `TRUST_REGIONS`.
        kl_coef: c or λ (units of the signal per nat).
        divergence: D of `clip`, one of `DIVERGENCES`; `kl` has the reverse one, which has that optimum.

    Raises:
        ValueError: no such trust region or divergence, or as `bounded_ratio`.
    Source: reconstructed; ERPD, arXiv 2605.25582, says that there is a trust region. Differs: not known.
    """
    if trust_region not in TRUST_REGIONS:
        raise ValueError(f"unknown trust_region '{trust_region}'; known: {', '.join(TRUST_REGIONS)}.")
    if divergence not in DIVERGENCES:
        raise ValueError(f"unknown kl_divergence '{divergence}'; known: {', '.join(DIVERGENCES)}.")
    if trust_region == "clip":
        gain = -static_clip(
            log_ratio, signals, epsilon_low=epsilon_low, epsilon_high=epsilon_high, log_ratio_clamp=log_ratio_clamp
        )
    else:
        gain, divergence = bounded_ratio(log_ratio, log_ratio_clamp=log_ratio_clamp) * signals, "reverse_kl"
    if kl_coef == 0.0:
        return -gain
    distance = token_divergence(divergence, beyond_noise(log_ratio), log_ratio_clamp=log_ratio_clamp)
    return kl_coef * distance - gain
