"""Policy-gradient terms on rollouts: the clipped surrogate, and penalties that keep the policy near a reference."""

from __future__ import annotations

import torch
from jaxtyping import Float, Num
from torch import Tensor


def importance_ratio(logps: Float[Tensor, "B T"], old_logps: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """π_θ/π_old per token. Source: PPO, arXiv 1707.06347. Differs: nothing."""
    return torch.exp(logps - old_logps)


def clipped_surrogate(
    ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B 1"] | Float[Tensor, "B T"],
    *,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None = None,
) -> Float[Tensor, "B T"]:
    """−min(r Â, clip(r, 1 − ε_low, 1 + ε_high) Â), to be minimised; reward units.

    `delta` bounds r from above before the minimum is taken ("dual clip"): without it a bad token whose ratio explodes
    has an unbounded loss. With delta ≥ 1 + ε_high it matters for Â < 0 only.
    Source: PPO, arXiv 1707.06347, Eq. 7; clip-higher from DAPO, arXiv 2503.14476; dual clip, arXiv 1912.09729.
    Differs: nothing.
    """
    clipped = torch.clamp(ratio, 1.0 - epsilon_low, 1.0 + epsilon_high)
    bounded = ratio if delta is None else torch.clamp(ratio, max=delta)
    return -torch.min(bounded * advantages, clipped * advantages)


def kl_k2(logps: Float[Tensor, "B T"], ref_logps: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """½ (log π_θ − log π_ref)², to be minimised; nats² per token.

    On tokens drawn from π_θ its gradient is that of the *reverse* KL(π_θ‖π_ref) per token, given the prefix.
    Source: Schulman's k2; gradient shown in KDRL, arXiv 2506.02208. Differs: nothing.
    """
    return 0.5 * (logps - ref_logps).square()


def kl_k3(logps: Float[Tensor, "B T"], ref_logps: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """e^R − R − 1 with R = log π_ref − log π_θ, to be minimised; nats per token.

    On tokens drawn from π_θ its *value* estimates KL(π_θ‖π_ref), but its gradient is that of KL(π_ref‖π_θ), the
    forward KL; multiplied by a differentiable importance ratio it is that of the reverse KL.
    Source: Schulman's k3, as in GRPO, arXiv 2402.03300, Eq. 4. Differs: nothing.
    """
    difference = ref_logps - logps
    return torch.exp(difference) - difference - 1.0


SAMPLER_CORRECTIONS = ("sequence_mask", "sequence_truncate", "token_mask", "token_truncate")
"""How `sampler_correction` may bound the ratio, and over what."""


def sampler_correction(
    old_logps: Float[Tensor, "B T"],
    sampler_logps: Float[Tensor, "B T"],
    mask: Num[Tensor, "B T"],
    *,
    mode: str,
    clip_min: float | None,
    clip_max: float | None,
) -> Float[Tensor, "B T"] | Float[Tensor, "B 1"]:
    """π_old/π_sampler, a factor on the policy term for answers that another engine drew; dimensionless, no gradient.

    Per token, or with `sequence_*` the product over an answer. Outside [clip_min, clip_max] it is clamped
    (`*_truncate`) or 0 (`*_mask`, the answer or token is dropped). Where the engine gave no log-prob (NaN), 1.

    Raises:
        ValueError: unknown mode.
    Source: truncated importance sampling, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"
    (Yao et al. 2025), masked variants as in TRL 1.16. Differs: nothing.
    """
    if mode not in SAMPLER_CORRECTIONS:
        raise ValueError(f"unknown sampler correction '{mode}'; known: {', '.join(SAMPLER_CORRECTIONS)}.")
    difference = torch.nan_to_num((old_logps - sampler_logps) * mask, nan=0.0)
    if mode.startswith("sequence"):
        difference = difference.sum(dim=1, keepdim=True)
    ratio = torch.exp(difference).detach()
    if mode.endswith("truncate"):
        return ratio if clip_min is None and clip_max is None else torch.clamp(ratio, min=clip_min, max=clip_max)
    low = -torch.inf if clip_min is None else clip_min
    high = torch.inf if clip_max is None else clip_max
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)
