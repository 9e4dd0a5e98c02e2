"""From tokens to a scalar: the only place that averages. Two components are two calls, each with its own mask."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")


def token_mean(
    per_token: Float[Tensor, "B T"],
    mask: Int[Tensor, "B T"] | Float[Tensor, "B T"],
    tokens: Float[Tensor, ""] | Int[Tensor, ""] | float | int,
) -> Float[Tensor, ""]:
    """Σ mask · per_token / tokens; a batch without any token gives a differentiable zero."""
    total = (per_token * mask).sum()
    return total / (tokens.clamp(min=1.0) if isinstance(tokens, Tensor) else max(float(tokens), 1.0))


def reduce(
    per_token: Float[Tensor, "B T"],
    mask: Int[Tensor, "B T"] | Float[Tensor, "B T"],
    *,
    loss_type: str,
    tokens: Float[Tensor, ""] | Int[Tensor, ""] | float | int,
    max_length: int,
) -> Float[Tensor, ""]:
    """One micro-batch's loss, averaged as TRL does.

    - `grpo`: mean over a sequence's tokens, then over sequences. Long wrong answers are punished less per token.
    - `bnpo`: mean over the tokens of this micro-batch.
    - `dr_grpo`: sum over tokens, divided by sequences × `max_length`: no length bias.
    - `dapo`: sum over tokens, divided by `tokens`, the tokens of one optimiser step per process and micro-batch share.

    Raises:
        ValueError: unknown loss type.

    Source: TRL 1.16 GRPOTrainer (GRPO arXiv 2402.03300; Dr. GRPO 2503.20783; DAPO 2503.14476). Differs: nothing.
    """
    if loss_type == "grpo":
        return ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    if loss_type == "bnpo":
        return token_mean(per_token, mask, mask.sum())
    if loss_type == "dr_grpo":
        return (per_token * mask).sum() / (per_token.size(0) * max_length)
    if loss_type == "dapo":
        return token_mean(per_token, mask, tokens)
    raise ValueError(f"unknown loss_type '{loss_type}'; known: {', '.join(LOSS_TYPES)}.")
