"""Policy-gradient terms on rollouts: the clipped surrogate, and penalties that keep the policy near a reference."""

from __future__ import annotations

import torch
from jaxtyping import Float
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
