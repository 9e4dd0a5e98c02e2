"""Per-token f-divergences between a policy and a reference, estimated on tokens the reference wrote.

With u = π_θ/π_ref and D_f = E_ref[f(u)], every form below is l(d) = f(e^d), d = log π_θ − log π_ref, with f normalised
so that f(1) = f'(1) = 0: the value is an unbiased, non-negative estimate, and a token on which the policy still equals
the reference has zero gradient.

Summed over a sequence, only `forward_kl` is the divergence between the two sequence distributions (chain rule). The
others are averages, under prefixes the reference wrote, of divergences between next-token distributions.

Sources: DPH-RL, arXiv 2509.07430, for `forward_kl`, `js` and `alpha`; the generators of the others are textbook.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LOG_2 = math.log(2.0)

MAX_LOG_RATIO_CLAMP = 40.0
"""Largest `log_ratio_clamp` (nats): beyond it the slope of χ², 2e^{2d}, leaves float32."""


@dataclass(frozen=True)
class TokenForm:
    """One divergence.

    Attributes:
        value: l(d), elementwise, accurate for every d at most `log_ratio_clamp`.
        slope: dl/dd at a point, for the tangent that continues l beyond the clamp.
        divergence: what E_ref[l] is.
        generator: f(u).
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[float], float]
    divergence: str
    generator: str


def _js(d: Tensor) -> Tensor:
    return 0.5 * (d.exp() * (LOG_2 - F.softplus(-d)) + LOG_2 - F.softplus(d))


FORMS: dict[str, TokenForm] = {
    "forward_kl": TokenForm(
        value=lambda d: torch.expm1(d) - d,
        slope=math.expm1,
        divergence="KL(π_ref‖π_θ)",
        generator="u − log u − 1",
    ),
    "reverse_kl": TokenForm(
        value=lambda d: d * d.exp() - torch.expm1(d),
        slope=lambda d: d * math.exp(d),
        divergence="KL(π_θ‖π_ref)",
        generator="u log u − u + 1",
    ),
    "js": TokenForm(
        value=_js,
        slope=lambda d: 0.5 * math.exp(d) * (LOG_2 - math.log1p(math.exp(-d))),
        divergence="JS = ½ KL(π_ref‖m) + ½ KL(π_θ‖m), m = ½(π_θ + π_ref)",
        generator="½ [u log u − (u + 1) log((u + 1)/2)]",
    ),
    "chi2": TokenForm(
        value=lambda d: torch.expm1(d).square(),
        slope=lambda d: 2.0 * math.exp(d) * math.expm1(d),
        divergence="χ²(π_θ‖π_ref)",
        generator="(u − 1)²",
    ),
    "hellinger": TokenForm(
        value=lambda d: 0.5 * torch.expm1(0.5 * d).square(),
        slope=lambda d: 0.5 * math.exp(0.5 * d) * math.expm1(0.5 * d),
        divergence="H² = ½ Σ (√π_θ − √π_ref)², in [0, 1]",
        generator="½ (√u − 1)²",
    ),
    "jeffreys": TokenForm(
        value=lambda d: d * torch.expm1(d),
        slope=lambda d: math.expm1(d) + d * math.exp(d),
        divergence="KL(π_θ‖π_ref) + KL(π_ref‖π_θ)",
        generator="(u − 1) log u",
    ),
}
"""Every divergence without a parameter, by name. `alpha` joins them through `alpha_form`."""

NAMES = (*FORMS, "alpha")


def alpha_form(alpha: float) -> TokenForm:
    """The α-divergence, 0 < α < 1; α → 1 is forward KL and α → 0 is reverse KL.

    Raises:
        ValueError: α lies outside (0, 1).
    """
    if not 0.0 < alpha < 1.0:
        raise ValueError(
            f"alpha must lie strictly between 0 and 1, got {alpha}: use 'forward_kl' for 1 and 'reverse_kl' for 0."
        )
    a = alpha
    return TokenForm(
        value=lambda d: (torch.expm1((1.0 - a) * d) - (1.0 - a) * torch.expm1(d)) / (a * (a - 1.0)),
        slope=lambda d: (math.exp(d) - math.exp((1.0 - a) * d)) / a,
        divergence="α-divergence: KL(π_ref‖π_θ) as α → 1, KL(π_θ‖π_ref) as α → 0",
        generator="(u^(1−α) − (1−α) u − α) / (α(α−1))",
    )


def form(name: str, alpha: float | None = None) -> TokenForm:
    """The form of a divergence.

    Raises:
        ValueError: the name is unknown, `alpha` is missing for "alpha", or given for another divergence.
    """
    if name == "alpha":
        if alpha is None:
            raise ValueError("the divergence 'alpha' needs alpha, strictly between 0 and 1.")
        return alpha_form(alpha)
    if name not in FORMS:
        raise ValueError(f"unknown divergence '{name}'; known: {', '.join(NAMES)}.")
    if alpha is not None:
        raise ValueError(f"alpha = {alpha} has no effect on the divergence '{name}': remove it.")
    return FORMS[name]


def token_divergence(
    name: str,
    log_ratio: Float[Tensor, "*shape"],
    *,
    alpha: float | None = None,
    log_ratio_clamp: float = 5.0,
) -> Float[Tensor, "*shape"]:
    """l(d) for tokens drawn from the reference, d = log π_θ − log π_ref; to be minimised; nats per token (χ², H²: 1).

    Half-precision input is computed, and returned, in float32. Above `log_ratio_clamp` (nats) l continues along its
    tangent, so the gradient is bounded by its value at the clamp and keeps its sign; below, every form is exact, so a
    token that the policy has lost (d ≪ 0) is still pulled back by forward KL and Jeffreys with slope −1.

    Args:
        name: one of `NAMES`.
        log_ratio: d, any shape.
        alpha: for "alpha" only, strictly between 0 and 1.
        log_ratio_clamp: where the tangent takes over, above 0 and at most `MAX_LOG_RATIO_CLAMP`.

    Raises:
        ValueError: unknown name, alpha missing, superfluous or out of range, or a clamp that is out of range.

    Source: DPH-RL, arXiv 2509.07430, Sec. 3; stable forms derived here.
    Differs: `js` is the Jensen-Shannon divergence proper, half of what the released code minimises. The released code
    clamps the *value* of forward KL at 10, which drops the gradient of tokens below d ≈ −11; a clamp of d inside exp
    alone would leave −d as the only gradient above it and push such tokens further up; the tangent does neither.
    """
    return _continued(form(name, alpha), log_ratio, log_ratio_clamp)


def _continued(chosen: TokenForm, log_ratio: Tensor, log_ratio_clamp: float) -> Tensor:
    """The form up to the clamp and its tangent beyond, in float32 at least."""
    if not 0.0 < log_ratio_clamp <= MAX_LOG_RATIO_CLAMP:
        raise ValueError(
            f"log_ratio_clamp must be positive and at most {MAX_LOG_RATIO_CLAMP:g} nats, got {log_ratio_clamp}."
        )
    d = log_ratio if log_ratio.dtype == torch.float64 else log_ratio.float()
    excess = F.relu(d - log_ratio_clamp)  # clamp(min=0) has slope 1 at 0, so that d at the clamp would count twice
    return chosen.value(d.clamp(max=log_ratio_clamp)) + chosen.slope(log_ratio_clamp) * excess


_JS_REFERENCE_HALF = TokenForm(
    value=lambda d: LOG_2 - F.softplus(d) + 0.5 * torch.expm1(d),
    slope=lambda d: 0.5 * math.exp(d) - 1.0 / (1.0 + math.exp(-d)),
    divergence="KL(π_ref‖m), m = ½(π_θ + π_ref)",
    generator="½ (u − 1) − log((u + 1)/2)",
)


def js_reference_half(log_ratio: Float[Tensor, "*shape"], *, log_ratio_clamp: float = 5.0) -> Float[Tensor, "*shape"]:
    """log(π_ref/m) + ½(u − 1) on tokens drawn from the reference, m = ½(π_θ + π_ref); mean KL(π_ref‖m); nats.

    The second term has mean zero under π_ref. It makes the estimate non-negative with zero gradient at u = 1; without
    it, minimising over a *finite* set of stored answers drives their likelihood up without bound.
    Source: the definition of JS. Differs: the control variate, and the tangent beyond `log_ratio_clamp` (nats).
    """
    return _continued(_JS_REFERENCE_HALF, log_ratio, log_ratio_clamp)


def js_policy_half(log_ratio: Float[Tensor, "*shape"], ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """π_θ/π_old · log(π_θ/m) on tokens drawn from π_old; its mean there is KL(π_θ‖m); nats.

    `ratio` must carry the gradient of π_θ: it supplies the score term, without which the gradient is biased.
    Source: the definition of JS, importance-weighted. Differs: nothing.
    """
    d = log_ratio if log_ratio.dtype == torch.float64 else log_ratio.float()
    return ratio * (LOG_2 - F.softplus(-d))
