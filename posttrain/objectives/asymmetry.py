"""Right and wrong answers of one group treated differently: weights on a divergence, factors on advantages.

Everything here is per answer, on whole groups: N prompts with G answers each, from all processes. An answer without a
verdict is neither right nor wrong.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def group_accuracy(correct: Bool[Tensor, "N G"], wrong: Bool[Tensor, "N G"]) -> Float[Tensor, "N 1"]:
    """The fraction of correct answers among those with a verdict; NaN where there is none."""
    right = correct.float().sum(dim=1, keepdim=True)
    return right / (right + wrong.float().sum(dim=1, keepdim=True))


def difficulty_weight(accuracy: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """f(d) = 1 − exp(−e (1 − d)) with d = 1 − accuracy, a factor on the divergence of correct answers; dimensionless.

    The harder the prompt, the weaker the pull on its correct answers: 0.29 where one of eight is correct, 0.91 where
    seven are. f(0) = f(1) = 1 by definition; 1 too where the accuracy is not known (NaN).
    Source: DADS of APO, arXiv 2506.21655. Differs: nothing.
    """
    mixed = (accuracy > 0.0) & (accuracy < 1.0)
    return torch.where(mixed, -torch.expm1(-math.e * accuracy), 1.0)


def suboptimal_length_factor(
    lengths: Float[Tensor, "N G"],
    correct: Bool[Tensor, "N G"],
    wrong: Bool[Tensor, "N G"],
    *,
    base: float,
) -> Float[Tensor, "N G"]:
    """1 + u with u = 1 − base^(−Δ) for Δ = L − L̄⁺ > 0, a factor on the advantages of long wrong answers; dimensionless.

    L̄⁺ is the mean length of the group's `correct` answers; all others have a factor of 1: those that are not `wrong`,
    those that are not longer, and groups without a correct one. Between 1 and 2, and 1 + Δ ln base as long as that is
    small.

    Args:
        lengths: tokens of each answer.
        correct: the answers whose lengths are averaged; leave out those that were cut off, which have no length.
        wrong: the answers that may be touched.
        base: c, larger than 1; half of the way to 2 is gone at Δ = ln 2 / ln c tokens.

    Raises:
        ValueError: the base is not larger than 1, with which no length would count, or shorter answers.
    Source: STCR of APO, arXiv 2506.21655. Differs: nothing.
    """
    check_base(base)
    right = correct.to(lengths.dtype)
    mean = (lengths * right).sum(dim=1, keepdim=True) / right.sum(dim=1, keepdim=True).clamp(min=1.0)
    excess = (lengths - mean).clamp(min=0.0)
    touched = wrong & correct.any(dim=1, keepdim=True)
    return torch.where(touched, 1.0 - torch.expm1(-excess * math.log(base)), 1.0)


def check_base(base: float) -> None:
    """Refuse a base of `suboptimal_length_factor` that is not larger than 1.

    Raises:
        ValueError: it is not, or is not finite.
    """
    if not 1.0 < base < math.inf:
        raise ValueError(f"the base of the length factor must be larger than 1 and finite, got {base}.")
