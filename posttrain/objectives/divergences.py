"""The f-divergences between a policy and a reference: one table for per-token objectives, preferences and evaluation.

With u = π_θ/π_ref and D_f = E_ref[f(u)], every generator f is normalised so that f(1) = f'(1) = 0. From it follow

- the token form l(d) = f(e^d), d = log π_θ − log π_ref, on tokens that the reference wrote: an unbiased, non-negative
  estimate, and a token on which the policy still equals the reference has zero gradient (`token_divergence`);
- the sum over a whole vocabulary, exact at any ratio (`posttrain.objectives.vocabulary`);
- the preference score s(d) = f'(e^d), up to a scale (`posttrain.objectives.preference`).

Summed over a sequence, only `forward_kl` is the divergence between the two sequence distributions (chain rule). The
others are averages, under prefixes the reference wrote, of divergences between next-token distributions.

Sources: DPH-RL, arXiv 2509.07430, for `forward_kl`, `js` and `alpha` as token forms; f-DPO, arXiv 2309.16240, for the
scores; χPO, arXiv 2407.13399, for `chi2_kl`; the generators of the others are textbook.

    python -m posttrain.objectives.divergences > docs/divergences.md
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LOG_2 = math.log(2.0)

MAX_LOG_RATIO_CLAMP = 40.0
"""Largest `log_ratio_clamp` and `edge` (nats): beyond it the slope of χ², 2e^{2d}, leaves float32."""


@dataclass(frozen=True)
class Form:
    """A function of the log-ratio d, with its slope, and its tangents beyond the region where it is exact.

    Attributes:
        text: the function, in d and u = e^d.
        value: the function, elementwise.
        slope: its derivative at a point.
    """

    text: str
    value: Callable[[Tensor], Tensor]
    slope: Callable[[float], float]

    def below(self, d: Tensor, bound: float) -> Tensor:
        """The function up to `bound` and its tangent above."""
        excess = F.relu(d - bound)  # clamp(min=0) has slope 1 at 0, so that d at the bound would count twice
        return self.value(d.clamp(max=bound)) + self.slope(bound) * excess

    def above(self, d: Tensor, bound: float) -> Tensor:
        """The function down to `bound` and its tangent below."""
        return self.value(d.clamp(min=bound)) - self.slope(bound) * F.relu(bound - d)


@dataclass(frozen=True)
class Score(Form):
    """A preference score, scale · f'(e^d): increasing, 0 at d = 0, unbounded below.

    Attributes:
        side: the linear continuation begins at d = edge · side; 0 where the score needs none.
        scale: what f' is multiplied by.
        trl: what TRL calls it, and where TRL differs.
    """

    side: float = 0.0
    scale: float = 1.0
    trl: str = "not in TRL"


Terms = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(log p, log q) → q f(p/q) and p f'(p/q), elementwise, for the policy p and the reference q."""


@dataclass(frozen=True)
class Divergence:
    """One entry of the table.

    Attributes:
        name: as recipes say it.
        generator: f(u).
        derivative: f'(u).
        divergence: what E_ref[f(u)] is.
        terms: the summands over a vocabulary, of the value and of its gradient.
        token: l(d), accurate for every d at most `log_ratio_clamp`; None where l is no objective.
        score: the preference score; None where there is none.
        reason: why `token` or `score` is None.
        limits: other entries that this one tends to or contains.
    """

    name: str
    generator: str
    derivative: str
    divergence: str
    terms: Terms
    token: Form | None
    score: Score | None
    reason: str = ""
    limits: str = ""


# ---------------------------------------------------------- sums over a vocabulary, without quotients of probabilities


def _gap(lp: Tensor, lq: Tensor) -> Tensor:
    """p − q, with small relative error also where p ≈ q."""
    d = lp - lq
    return torch.copysign(torch.maximum(lp, lq).exp() * -torch.expm1(-d.abs()), d)


def _forward_kl_terms(lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    gap = _gap(lp, lq)
    return gap - lq.exp() * (lp - lq), gap


def _reverse_kl_terms(lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    pull = lp.exp() * (lp - lq)
    return pull - _gap(lp, lq), pull


def _js_terms(lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    d = lp - lq
    pull = 0.5 * lp.exp() * (LOG_2 - F.softplus(-d))
    return pull + 0.5 * lq.exp() * (LOG_2 - F.softplus(d)), pull


def _jeffreys_terms(lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    d, gap = lp - lq, _gap(lp, lq)
    return d * gap, lp.exp() * d + gap


def _chi2_terms(lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    d = lp - lq
    away = torch.copysign(-torch.expm1(-d.abs()), d)  # (u − 1)/max(u, 1)
    return (lq + 2.0 * F.relu(d)).exp() * away.square(), 2.0 * (lp + F.relu(d)).exp() * away


def _chi2_kl_terms(lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    chi2, chi2_pull = _chi2_terms(lp, lq)
    kl, kl_pull = _reverse_kl_terms(lp, lq)
    return 0.5 * chi2 + kl, 0.5 * chi2_pull + kl_pull


def _hellinger_terms(lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    d = lp - lq
    away = -torch.expm1(-0.5 * d.abs())  # |√u − 1|/√max(u, 1)
    value = 0.5 * torch.maximum(lp, lq).exp() * away.square()
    return value, 0.5 * torch.copysign((lp + 0.5 * F.relu(-d)).exp() * away, d)


def _total_variation_terms(lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    return 0.5 * _gap(lp, lq).abs(), 0.5 * lp.exp() * (lp - lq).sign()


def _alpha_terms(a: float) -> Terms:
    def terms(lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
        d = lp - lq
        size, above = d.abs(), d > 0
        # Both are written relative to the larger of p and q, so that no exponent is positive.
        weight = torch.where(above, d.new_tensor(a), d.new_tensor(1.0 - a))
        larger = torch.maximum(lp, lq).exp()
        value = larger * (torch.expm1(-weight * size) - weight * torch.expm1(-size)) / (a * (a - 1.0))
        return value, torch.copysign((lp + a * F.relu(-d)).exp() * -torch.expm1(-a * size), d) / a

    return terms


# ---------------------------------------------------------- the table


def _js(d: Tensor) -> Tensor:
    return 0.5 * (d.exp() * (LOG_2 - F.softplus(-d)) + LOG_2 - F.softplus(d))


def _sigmoid(d: float) -> float:
    return 1.0 / (1.0 + math.exp(-d))


_ENTRIES = (
    Divergence(
        name="forward_kl",
        generator="u − log u − 1",
        derivative="1 − 1/u",
        divergence="KL(π_ref‖π_θ)",
        terms=_forward_kl_terms,
        token=Form(text="e^d − 1 − d", value=lambda d: torch.expm1(d) - d, slope=math.expm1),
        score=Score(
            text="1 − e^{−d}",
            value=lambda d: -torch.expm1(-d),
            slope=lambda d: math.exp(-d),
            side=-1.0,
            trl="`forward_kl`; unbounded e^{−d}, NaN gradient below d = −88.7",
        ),
        limits="`alpha` at 1",
    ),
    Divergence(
        name="reverse_kl",
        generator="u log u − u + 1",
        derivative="log u",
        divergence="KL(π_θ‖π_ref)",
        terms=_reverse_kl_terms,
        token=Form(
            text="d e^d − e^d + 1",
            value=lambda d: d * d.exp() - torch.expm1(d),
            slope=lambda d: d * math.exp(d),
        ),
        score=Score(text="d", value=lambda d: d, slope=lambda d: 1.0, trl="`reverse_kl`; equal"),
        limits="`alpha` at 0; the score is DPO's",
    ),
    Divergence(
        name="js",
        generator="½ [u log u − (u + 1) log((u + 1)/2)]",
        derivative="½ log(2u/(u + 1))",
        divergence="JS = ½ KL(π_ref‖m) + ½ KL(π_θ‖m), m = ½(π_θ + π_ref)",
        terms=_js_terms,
        token=Form(
            text="½ [u log(2u/(u + 1)) + log(2/(u + 1))]",
            value=_js,
            slope=lambda d: 0.5 * math.exp(d) * (LOG_2 - math.log1p(math.exp(-d))),
        ),
        score=Score(
            text="log 2 + log σ(d)",
            value=lambda d: LOG_2 + F.logsigmoid(d),
            slope=lambda d: _sigmoid(-d),
            scale=2.0,
            trl="`js_divergence`; equal",
        ),
        limits="f-DPO's generator is 2 JS",
    ),
    Divergence(
        name="chi2",
        generator="(u − 1)²",
        derivative="2(u − 1)",
        divergence="χ²(π_θ‖π_ref)",
        terms=_chi2_terms,
        token=Form(
            text="(e^d − 1)²",
            value=lambda d: torch.expm1(d).square(),
            slope=lambda d: 2.0 * math.exp(d) * math.expm1(d),
        ),
        score=None,
        reason="f'(0+) is finite, so the multiplier of π ≥ 0 need not vanish and f' is not the reward: use 'chi2_kl', "
        "its mixture with reverse KL",
        limits="2 × `alpha` at −1",
    ),
    Divergence(
        name="hellinger",
        generator="½ (√u − 1)²",
        derivative="½ (1 − 1/√u)",
        divergence="H² = ½ Σ (√π_θ − √π_ref)², in [0, 1]",
        terms=_hellinger_terms,
        token=Form(
            text="½ (e^{d/2} − 1)²",
            value=lambda d: 0.5 * torch.expm1(0.5 * d).square(),
            slope=lambda d: 0.5 * math.exp(0.5 * d) * math.expm1(0.5 * d),
        ),
        score=None,
        reason="it is 'alpha' with alpha = 0.5 and a quarter of beta: ask for that",
        limits="¼ × `alpha` at ½",
    ),
    Divergence(
        name="jeffreys",
        generator="(u − 1) log u",
        derivative="log u + 1 − 1/u",
        divergence="KL(π_θ‖π_ref) + KL(π_ref‖π_θ)",
        terms=_jeffreys_terms,
        token=Form(
            text="d (e^d − 1)",
            value=lambda d: d * torch.expm1(d),
            slope=lambda d: math.expm1(d) + d * math.exp(d),
        ),
        score=Score(
            text="d + 1 − e^{−d}",
            value=lambda d: d - torch.expm1(-d),
            slope=lambda d: 1.0 + math.exp(-d),
            side=-1.0,
        ),
        limits="`forward_kl` + `reverse_kl`",
    ),
    Divergence(
        name="chi2_kl",
        generator="½ (u − 1)² + u log u − u + 1",
        derivative="u − 1 + log u",
        divergence="½ χ²(π_θ‖π_ref) + KL(π_θ‖π_ref)",
        terms=_chi2_kl_terms,
        token=Form(
            text="½ (e^d − 1)² + d e^d − e^d + 1",
            value=lambda d: 0.5 * torch.expm1(d).square() + d * d.exp() - torch.expm1(d),
            slope=lambda d: math.exp(d) * (math.expm1(d) + d),
        ),
        score=Score(
            text="e^d − 1 + d",
            value=lambda d: torch.expm1(d) + d,
            slope=lambda d: 1.0 + math.exp(d),
            side=1.0,
        ),
        limits="½ `chi2` + `reverse_kl`; the score is χPO's",
    ),
    Divergence(
        name="total_variation",
        generator="½ |u − 1|",
        derivative="½ sign(u − 1)",
        divergence="TV = ½ Σ |π_θ − π_ref|, in [0, 1]",
        terms=_total_variation_terms,
        token=None,
        score=None,
        reason="f' takes two values: it has no inverse that a reward could be read from, and its jump at u = 1 is no "
        "slope to descend; it is measured only",
    ),
)

TABLE: dict[str, Divergence] = {entry.name: entry for entry in _ENTRIES}
"""Every divergence without a parameter, by name. `alpha` joins them through `alpha_form`."""

FORMS: dict[str, Form] = {name: entry.token for name, entry in TABLE.items() if entry.token is not None}
"""The token forms among them."""

NAMES = (*FORMS, "alpha")
"""What `token_divergence` knows."""


def alpha_score(alpha: float) -> Score:
    """The preference score of the α-divergence, for any α > 0."""
    a = alpha
    return Score(
        text="(1 − e^{−αd})/α",
        value=lambda d: -torch.expm1(-a * d) / a,
        slope=lambda d: math.exp(-a * d),
        side=-1.0 / a,
        trl="`alpha_divergence`, coefficient 1 − α, unchecked (2 is χ²); a clamp with zero gradient",
    )


def alpha_form(alpha: float) -> Divergence:
    """The α-divergence, 0 < α < 1; α → 1 is forward KL and α → 0 is reverse KL.

    Raises:
        ValueError: α lies outside (0, 1).
    """
    if not 0.0 < alpha < 1.0:
        raise ValueError(
            f"alpha must lie strictly between 0 and 1, got {alpha}: use 'forward_kl' for 1 and 'reverse_kl' for 0."
        )
    a = alpha
    return Divergence(
        name="alpha",
        generator="(u^{1−α} − (1 − α) u − α)/(α(α − 1))",
        derivative="(1 − u^{−α})/α",
        divergence="α-divergence, 0 < α < 1",
        terms=_alpha_terms(a),
        token=Form(
            text="(e^{(1−α)d} − 1 − (1 − α)(e^d − 1))/(α(α − 1))",
            value=lambda d: (torch.expm1((1.0 - a) * d) - (1.0 - a) * torch.expm1(d)) / (a * (a - 1.0)),
            slope=lambda d: (math.exp(d) - math.exp((1.0 - a) * d)) / a,
        ),
        score=alpha_score(a),
        limits="KL(π_θ‖π_ref) as α → 0, KL(π_ref‖π_θ) as α → 1",
    )


def entry(name: str, alpha: float | None = None) -> Divergence:
    """The entry of a divergence.

    Raises:
        ValueError: the name is unknown, `alpha` is missing for "alpha", or given for another divergence.
    """
    if name == "alpha":
        if alpha is None:
            raise ValueError("the divergence 'alpha' needs alpha, strictly between 0 and 1.")
        return alpha_form(alpha)
    if name not in TABLE:
        raise ValueError(f"unknown divergence '{name}'; known: {', '.join((*TABLE, 'alpha'))}.")
    if alpha is not None:
        raise ValueError(f"alpha = {alpha} has no effect on the divergence '{name}': remove it.")
    return TABLE[name]


def form(name: str, alpha: float | None = None) -> Form:
    """The token form of a divergence.

    Raises:
        ValueError: the name is unknown or has no token form, `alpha` is missing for "alpha", or given for another
            divergence.
    """
    chosen = entry(name, alpha)
    if chosen.token is None:
        raise ValueError(f"'{name}' is no objective: {chosen.reason}.")
    return chosen.token


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


def at_least_float32(values: Tensor) -> Tensor:
    """float64 stays, every other type becomes float32."""
    return values if values.dtype == torch.float64 else values.float()


def _continued(chosen: Form, log_ratio: Tensor, log_ratio_clamp: float) -> Tensor:
    """The form up to the clamp and its tangent beyond, in float32 at least."""
    if not 0.0 < log_ratio_clamp <= MAX_LOG_RATIO_CLAMP:
        raise ValueError(
            f"log_ratio_clamp must be positive and at most {MAX_LOG_RATIO_CLAMP:g} nats, got {log_ratio_clamp}."
        )
    return chosen.below(at_least_float32(log_ratio), log_ratio_clamp)


_JS_REFERENCE_HALF = Form(
    text="½ (u − 1) − log((u + 1)/2)",
    value=lambda d: LOG_2 - F.softplus(d) + 0.5 * torch.expm1(d),
    slope=lambda d: 0.5 * math.exp(d) - _sigmoid(d),
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
    return ratio * (LOG_2 - F.softplus(-at_least_float32(log_ratio)))


# ---------------------------------------------------------- docs/divergences.md


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _linear_beyond(score: Score) -> str:
    """Where the linear continuation begins, in words."""
    return "nowhere" if score.side == 0.0 else f"d {'<' if score.side < 0.0 else '>'} {'−' * (score.side < 0.0)}edge"


def document() -> str:
    """The text of docs/divergences.md, from the table."""
    entries = (*_ENTRIES, alpha_form(0.5))
    generators = [
        (f"`{each.name}`", each.divergence, each.generator, each.derivative, each.limits or "—") for each in entries
    ]
    tokens = [(f"`{each.name}`", each.token.text if each.token else f"none: {each.reason}") for each in entries]
    scores = [
        (
            f"`{each.name}`",
            each.score.text,
            f"{each.score.slope(0.0):g}",
            f"{each.score.scale:g} f'",
            "d < −edge/α" if each.name == "alpha" else _linear_beyond(each.score),
            each.score.trl,
        )
        for each in entries
        if each.score
    ]
    refused = [(f"`{each.name}`", each.reason) for each in entries if each.score is None]
    return f"""# Divergences

<!-- Generated: python -m posttrain.objectives.divergences > docs/divergences.md -->

u = π_θ/π_ref and d = log u, for the policy π_θ and the reference π_ref. A divergence is D_f = E_ref[f(u)] with
f(1) = f'(1) = 0. Values are in nats, except χ², H² and TV, which have no unit.

{_table(("name", "D_f", "f(u)", "f'(u)", "limits and relations"), generators)}

`posttrain.objectives.vocabulary` measures all of them between whole next-token distributions, with gradient.

## On tokens that the reference wrote: DPH-RL

`token_divergence` minimises l(d) = f(e^d), and its tangent above `log_ratio_clamp`. For `alpha`, 0 < α < 1.

{_table(("name", "l(d)"), tokens)}

`js` is the Jensen-Shannon divergence proper, half of what DPH-RL's released code minimises.

## On pairs of answers: f-DPO

The loss of a pair is −log σ(β s(d_w) − β s(d_l)), d summed over the answer. s is f' up to a scale: f-DPO's JS is twice
the divergence above. At equal β, training begins with a gradient in proportion to s'(0). Beyond the edge (default 8
nats) s goes on linearly, so that value and gradient are finite for |d| ≤ 10⁴.

{_table(("name", "s(d)", "s'(0)", "scale", "linear for", "TRL 1.16"), scores)}

`alpha`: α = 0 (below 10⁻⁴) is `reverse_kl`, α = 1 is `forward_kl`, α > 1 is allowed with a warning; α < 0 is refused,
for f'(0+) = 1/α is finite there.

Refused, because f' must fall to −∞ at 0 and be invertible, or because another name says the same:

{_table(("name", "why"), refused)}
"""


if __name__ == "__main__":
    print(document(), end="")
