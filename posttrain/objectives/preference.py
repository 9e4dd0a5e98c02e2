"""Preference scores and the pairwise loss of f-DPO, for every admissible divergence.

A policy that maximises reward under β D_f(π‖π_ref) satisfies r(x, y) = β f'(u) + const(x), u = π(y|x)/π_ref(y|x) over
the whole sequence. This holds where f' is invertible with f'(0+) = −∞; the other divergences are refused with the
reason. The score is s(d) = f'(e^d) up to the scale in the table of `posttrain.objectives.divergences`, d = log u with
log-probs summed over tokens, and s(0) = 0.

Source: f-DPO, arXiv 2309.16240. Differs: beyond `edge` the scores continue linearly, for e^{−d} leaves float32 at
d = −88.7, which is an ordinary log-ratio of a sequence; a clamp would drop the gradient of a collapsed chosen answer.
"""

from __future__ import annotations

import math
import warnings

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from posttrain.objectives.divergences import (
    MAX_LOG_RATIO_CLAMP,
    TABLE,
    Score,
    alpha_score,
    at_least_float32,
)

NAMES = (*(name for name, entry in TABLE.items() if entry.score is not None), "alpha")
"""The divergences that a preference loss can be built on."""

SMALLEST_ALPHA = 1e-4
"""Below it, `alpha` is reverse KL: the two scores differ by less than ½ α d²."""


def score(
    name: str, log_ratio: Float[Tensor, "*shape"], *, alpha: float | None = None, edge: float = 8.0
) -> Float[Tensor, "*shape"]:
    """s(d) = f'(e^d) up to scale, d = log π_θ(y|x) − log π_ref(y|x), summed over tokens; nats to first order.

    Increasing, s(0) = 0, finite in value and gradient for |d| ≤ 10⁴. Exact inside the edge and linear outside, with the
    slope at the edge: for `alpha` below d = −edge/α, for `forward_kl` and `jeffreys` below d = −edge, for `chi2_kl`
    above d = edge; `reverse_kl` and `js` need no edge. Half precision is computed, and returned, in float32.

    Args:
        name: one of `NAMES`.
        log_ratio: d, any shape.
        alpha: for "alpha" only; below 1e-4 it is reverse KL, at 1 forward KL.
        edge: where the tangent takes over (nats), above 0 and at most `MAX_LOG_RATIO_CLAMP`.

    Raises:
        ValueError: unknown or inadmissible name, alpha missing, superfluous or out of range, or an edge out of range.

    Source: f-DPO, arXiv 2309.16240; `jeffreys` is derived here, `chi2_kl` is χPO's, arXiv 2407.13399.
    Differs: the linear continuation.
    """
    if not 0.0 < edge <= MAX_LOG_RATIO_CLAMP:
        raise ValueError(f"edge must be positive and at most {MAX_LOG_RATIO_CLAMP:g} nats, got {edge}.")
    chosen, d = _score_of(name, alpha), at_least_float32(log_ratio)
    if chosen.side < 0.0:
        return chosen.above(d, edge * chosen.side)
    if chosen.side > 0.0:
        return chosen.below(d, edge * chosen.side)
    return chosen.value(d)


def slope_at_one(name: str, alpha: float | None = None) -> float:
    """s'(0), the slope at u = 1: what β is divided by to start with the gradient of DPO at that β.

    Raises:
        ValueError: as `check`.
    """
    return _score_of(name, alpha).slope(0.0)


def check(name: str, alpha: float | None = None) -> None:
    """Refuse a divergence that no preference loss can be built on, and warn of α > 1.

    Raises:
        ValueError: unknown or inadmissible name, alpha missing, superfluous, or out of range.
    """
    _score_of(name, alpha)
    if alpha is not None and alpha > 1.0:
        warnings.warn(
            f"alpha = {alpha} lies beyond forward KL (1): on answers that the policy loses, its score falls like "
            "e^(alpha·|d|) down to d = −edge/alpha and linearly from there on.",
            stacklevel=2,
        )


def loss(
    chosen_log_ratio: Float[Tensor, "*shape"],
    rejected_log_ratio: Float[Tensor, "*shape"],
    name: str,
    *,
    beta: float,
    alpha: float | None = None,
    edge: float = 8.0,
) -> Float[Tensor, "*shape"]:
    """−log σ(β s(d_w) − β s(d_l)) per pair, to be minimised; nats.

    β s(d) is the implicit reward. With `reverse_kl` this is DPO.

    Args:
        chosen_log_ratio: d_w of the preferred answers, summed over tokens.
        rejected_log_ratio: d_l of the others.
        name: one of `NAMES`.
        beta: β > 0, the weight of the divergence (reward per nat).
        alpha: for "alpha" only.
        edge: as in `score`.

    Raises:
        ValueError: β is not positive and finite, or as `score`.

    Source: f-DPO, arXiv 2309.16240. Differs: the linear continuation of the scores.
    """
    if not 0.0 < beta < math.inf:
        raise ValueError(f"beta must be a positive number, got {beta}: at 0 no reward follows from the policy.")
    chosen = score(name, chosen_log_ratio, alpha=alpha, edge=edge)
    rejected = score(name, rejected_log_ratio, alpha=alpha, edge=edge)
    return -F.logsigmoid(beta * (chosen - rejected))


def _score_of(name: str, alpha: float | None) -> Score:
    if name == "alpha":
        if alpha is None:
            raise ValueError("the divergence 'alpha' needs alpha: 0 is reverse KL, 1 forward KL.")
        if not 0.0 <= alpha < math.inf:
            raise ValueError(
                f"alpha must be a finite number ≥ 0, got {alpha}: below 0, f'(0+) is finite as for 'chi2' (alpha = "
                "−1), and f' is not the reward."
            )
        if alpha < SMALLEST_ALPHA:
            name = "reverse_kl"
        elif alpha == 1.0:
            name = "forward_kl"
        else:
            return alpha_score(alpha)
    elif name not in TABLE:
        raise ValueError(f"unknown divergence '{name}'; known: {', '.join(NAMES)}.")
    elif alpha is not None:
        raise ValueError(f"alpha = {alpha} has no effect on the divergence '{name}': remove it.")
    chosen = TABLE[name]
    if chosen.score is None:
        raise ValueError(f"'{name}' is not admissible for preferences: {chosen.reason}.")
    return chosen.score
