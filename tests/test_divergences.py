"""The divergences against their definitions: value, gradient, behaviour at the extremes, and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from posttrain.objectives.divergences import (
    FORMS,
    MAX_LOG_RATIO_CLAMP,
    NAMES,
    TABLE,
    Divergence,
    document,
    entry,
    js_policy_half,
    js_reference_half,
    token_divergence,
)

CLAMP = 5.0
"""The default of `log_ratio_clamp`."""

Case = tuple[str, float | None]
CASES: list[Case] = [*((name, None) for name in FORMS), ("alpha", 0.2), ("alpha", 0.5), ("alpha", 0.8)]
IDS = [name if alpha is None else f"{name}{alpha}" for name, alpha in CASES]

every_divergence = pytest.mark.parametrize(("name", "alpha"), CASES, ids=IDS)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p‖q) along the last dimension (nats)."""
    return (p * (p / q).log()).sum(-1)


def alpha_divergence(p: Tensor, q: Tensor, a: float) -> Tensor:
    """Σ q f(p/q) with the generator of the α-divergence."""
    u = p / q
    return (q * (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1))).sum(-1)


def definition(name: str, alpha: float | None, p: Tensor, q: Tensor) -> Tensor:
    """The divergence of the policy p from the reference q, from probabilities."""
    if alpha is not None:
        return alpha_divergence(p, q, alpha)
    m = (p + q) / 2
    definitions: dict[str, Callable[[], Tensor]] = {
        "forward_kl": lambda: kl(q, p),
        "reverse_kl": lambda: kl(p, q),
        "js": lambda: kl(q, m) / 2 + kl(p, m) / 2,
        "chi2": lambda: ((p - q) ** 2 / q).sum(-1),
        "hellinger": lambda: ((p.sqrt() - q.sqrt()) ** 2).sum(-1) / 2,
        "jeffreys": lambda: kl(p, q) + kl(q, p),
        "chi2_kl": lambda: ((p - q) ** 2 / q).sum(-1) / 2 + kl(p, q),
    }
    return definitions[name]()


def slope(name: str, alpha: float | None, u: Tensor) -> Tensor:
    """dl/dd with u = e^d: the table of the paper for forward_kl, js (half of it) and alpha, by hand for the others."""
    if alpha is not None:
        return (u - u ** (1 - alpha)) / alpha
    slopes: dict[str, Callable[[], Tensor]] = {
        "forward_kl": lambda: u - 1,
        "reverse_kl": lambda: u * u.log(),
        "js": lambda: u * (2 * u / (u + 1)).log() / 2,
        "chi2": lambda: 2 * u * (u - 1),
        "hellinger": lambda: (u - u.sqrt()) / 2,
        "jeffreys": lambda: u - 1 + u * u.log(),
        "chi2_kl": lambda: u * (u - 1 + u.log()),
    }
    return slopes[name]()


def categoricals(count: int = 20, outcomes: int = 7) -> tuple[Tensor, Tensor]:
    """Logits of random policies and references, [count, outcomes], float64."""
    generator = torch.Generator().manual_seed(3)
    policy, reference = (torch.randn(count, outcomes, generator=generator, dtype=torch.float64) for _ in range(2))
    return policy, reference


def gradient(name: str, alpha: float | None, d: Tensor, clamp: float = CLAMP) -> Tensor:
    """dl/dd, elementwise, by autograd."""
    d = d.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(token_divergence(name, d, alpha=alpha, log_ratio_clamp=clamp).sum(), d)
    return found


def test_every_divergence_is_a_case() -> None:
    assert {name for name, _ in CASES} == set(NAMES)


@every_divergence
def test_the_mean_under_the_reference_is_the_divergence(name: str, alpha: float | None) -> None:
    policy, reference = (logits.log_softmax(-1) for logits in categoricals())
    d = policy - reference
    assert d.max() < CLAMP, "no outcome may reach the tangent"
    mean = (reference.exp() * token_divergence(name, d, alpha=alpha)).sum(-1)
    torch.testing.assert_close(mean, definition(name, alpha, policy.exp(), reference.exp()), rtol=0, atol=1e-6)


@every_divergence
def test_the_mean_gradient_under_the_reference_is_the_divergence_s(name: str, alpha: float | None) -> None:
    logits, reference = categoricals(count=1)
    logits.requires_grad_()
    ref_logps = reference.log_softmax(-1)
    loss = (ref_logps.exp() * token_divergence(name, logits.log_softmax(-1) - ref_logps, alpha=alpha)).sum()
    wanted = definition(name, alpha, logits.softmax(-1), ref_logps.exp()).sum()
    for ours, theirs in zip(torch.autograd.grad(loss, logits), torch.autograd.grad(wanted, logits), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("alpha", "limit"), [(1 - 1e-6, "forward_kl"), (1e-6, "reverse_kl")])
def test_alpha_tends_to_the_two_kls(alpha: float, limit: str) -> None:
    d = torch.linspace(-8, 8, 101, dtype=torch.float64)
    near = token_divergence("alpha", d, alpha=alpha)
    torch.testing.assert_close(near, token_divergence(limit, d), rtol=1e-4, atol=1e-8)


@every_divergence
def test_autograd_equals_finite_differences(name: str, alpha: float | None) -> None:
    d = torch.tensor([-30.0, -12.0, -3.0, -0.4, 0.0, 0.3, 2.0, 4.9, 5.1, 30.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: token_divergence(name, x, alpha=alpha), d.requires_grad_(), eps=1e-6, rtol=1e-6, atol=1e-7
    )


@every_divergence
def test_the_slope_is_the_closed_form_up_to_the_clamp_and_constant_above(name: str, alpha: float | None) -> None:
    d = torch.linspace(-40, CLAMP, 400, dtype=torch.float64)
    torch.testing.assert_close(gradient(name, alpha, d), slope(name, alpha, d.exp()), rtol=1e-7, atol=1e-9)
    above = gradient(name, alpha, torch.tensor([5.01, 8.0, 50.0], dtype=torch.float64))
    at_clamp = slope(name, alpha, torch.tensor(CLAMP, dtype=torch.float64).exp())
    torch.testing.assert_close(above, at_clamp.expand(3), rtol=1e-12, atol=0)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_unchanged_token_has_no_value_and_no_gradient(name: str, alpha: float | None, dtype: torch.dtype) -> None:
    d = torch.zeros(3, dtype=dtype)
    assert token_divergence(name, d, alpha=alpha).tolist() == [0.0, 0.0, 0.0]
    assert gradient(name, alpha, d).tolist() == [0.0, 0.0, 0.0]


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lost_and_exploded_tokens_stay_finite_and_are_pulled_the_right_way(
    name: str, alpha: float | None, dtype: torch.dtype
) -> None:
    grid = torch.cat([torch.linspace(-200, 50, 2001), torch.linspace(-0.1, 0.1, 201), torch.tensor([CLAMP])])
    d = grid.to(dtype)
    value, pull = token_divergence(name, d, alpha=alpha), gradient(name, alpha, d)
    assert value.isfinite().all() and pull.isfinite().all()
    assert value.min() >= -2e-7, "non-negative up to rounding"
    toward = pull.float() * d.sign()
    assert toward.min() >= -2e-7, "never away from the reference, up to rounding"
    # Between where float32 resolves the gradient next to 0 and where e^d underflows next to 1.
    resolved = (d.abs() > 1e-3) & (d > -10)
    assert (toward[resolved] > 0).all()


@every_divergence
@pytest.mark.parametrize("clamp", [0.5, CLAMP, 20.0, MAX_LOG_RATIO_CLAMP])
def test_value_and_slope_are_continuous_at_the_clamp(name: str, alpha: float | None, clamp: float) -> None:
    d = torch.tensor([clamp - 1e-9, clamp, clamp + 1e-9], dtype=torch.float64)
    value = token_divergence(name, d, alpha=alpha, log_ratio_clamp=clamp)
    pull = gradient(name, alpha, d, clamp)
    torch.testing.assert_close(value, value[1].expand(3), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(pull, pull[1].expand(3), rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["forward_kl", "jeffreys"])
def test_a_lost_token_is_rescued(name: str, dtype: torch.dtype) -> None:
    assert gradient(name, None, torch.tensor([-200.0, -50.0], dtype=dtype)).tolist() == [-1.0, -1.0]


@every_divergence
@pytest.mark.parametrize("clamp", [CLAMP, MAX_LOG_RATIO_CLAMP])
def test_the_largest_clamp_is_still_finite(name: str, alpha: float | None, clamp: float) -> None:
    d = torch.linspace(-200, 50, 501)
    assert token_divergence(name, d, alpha=alpha, log_ratio_clamp=clamp).isfinite().all()
    assert gradient(name, alpha, d, clamp).isfinite().all()


@every_divergence
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 0), (2, 1, 4)])
def test_the_shape_stays(name: str, alpha: float | None, shape: tuple[int, ...]) -> None:
    assert token_divergence(name, torch.full(shape, 0.1), alpha=alpha).shape == shape


@pytest.mark.parametrize(
    ("given", "returned"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_is_computed_in_float32(given: torch.dtype, returned: torch.dtype) -> None:
    d = torch.tensor([[0.5, -2.0]], dtype=given)
    for value in (token_divergence("js", d), js_reference_half(d), js_policy_half(d, d.exp())):
        assert value.dtype == returned
    torch.testing.assert_close(token_divergence("js", d), token_divergence("js", d.to(returned)))


@pytest.mark.parametrize(
    ("name", "alpha", "clamp", "message"),
    [
        ("jsd", None, CLAMP, "unknown divergence 'jsd'; known: forward_kl"),
        ("total_variation", None, CLAMP, "'total_variation' is no objective: f' takes two values"),
        ("alpha", None, CLAMP, "needs alpha"),
        ("js", 0.5, CLAMP, "alpha = 0.5 has no effect on the divergence 'js'"),
        ("alpha", 0.0, CLAMP, "'reverse_kl'"),
        ("alpha", 1.0, CLAMP, "'forward_kl'"),
        ("alpha", -0.5, CLAMP, "strictly between 0 and 1, got -0.5"),
        ("alpha", float("nan"), CLAMP, "strictly between 0 and 1"),
        ("js", None, 0.0, "log_ratio_clamp"),
        ("js", None, -5.0, "log_ratio_clamp"),
        ("js", None, float("nan"), "log_ratio_clamp"),
        ("js", None, float("inf"), "log_ratio_clamp"),
        ("js", None, MAX_LOG_RATIO_CLAMP + 1, "log_ratio_clamp"),
    ],
)
def test_what_makes_no_sense_is_refused(name: str, alpha: float | None, clamp: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_divergence(name, torch.zeros(2), alpha=alpha, log_ratio_clamp=clamp)


# ---------------------------------------------------------------- the table: texts, terms of a vocabulary, page

log = torch.log
GENERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "u − log u − 1": lambda u: u - log(u) - 1,
    "u log u − u + 1": lambda u: u * log(u) - u + 1,
    "½ [u log u − (u + 1) log((u + 1)/2)]": lambda u: 0.5 * (u * log(u) - (u + 1) * log((u + 1) / 2)),
    "(u − 1)²": lambda u: (u - 1) ** 2,
    "½ (√u − 1)²": lambda u: 0.5 * (u.sqrt() - 1) ** 2,
    "(u − 1) log u": lambda u: (u - 1) * log(u),
    "½ (u − 1)² + u log u − u + 1": lambda u: 0.5 * (u - 1) ** 2 + u * log(u) - u + 1,
    "½ |u − 1|": lambda u: 0.5 * (u - 1).abs(),
    "(u^{1−α} − (1 − α) u − α)/(α(α − 1))": lambda u: (u**0.7 - 0.7 * u - 0.3) / (0.3 * -0.7),
}
"""Every generator as the table prints it, read by hand; α = 0.3."""

DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "1 − 1/u": lambda u: 1 - 1 / u,
    "log u": log,
    "½ log(2u/(u + 1))": lambda u: 0.5 * log(2 * u / (u + 1)),
    "2(u − 1)": lambda u: 2 * (u - 1),
    "½ (1 − 1/√u)": lambda u: 0.5 * (1 - 1 / u.sqrt()),
    "log u + 1 − 1/u": lambda u: log(u) + 1 - 1 / u,
    "u − 1 + log u": lambda u: u - 1 + log(u),
    "½ sign(u − 1)": lambda u: 0.5 * (u - 1).sign(),
    "(1 − u^{−α})/α": lambda u: (1 - u**-0.3) / 0.3,
}

TOKENS: dict[str, Callable[[Tensor], Tensor]] = {
    "e^d − 1 − d": lambda d: d.exp() - 1 - d,
    "d e^d − e^d + 1": lambda d: d * d.exp() - d.exp() + 1,
    "½ [u log(2u/(u + 1)) + log(2/(u + 1))]": lambda d: (
        0.5 * (d.exp() * log(2 * d.exp() / (d.exp() + 1)) + log(2 / (d.exp() + 1)))
    ),
    "(e^d − 1)²": lambda d: (d.exp() - 1) ** 2,
    "½ (e^{d/2} − 1)²": lambda d: 0.5 * ((d / 2).exp() - 1) ** 2,
    "d (e^d − 1)": lambda d: d * (d.exp() - 1),
    "½ (e^d − 1)² + d e^d − e^d + 1": lambda d: 0.5 * (d.exp() - 1) ** 2 + d * d.exp() - d.exp() + 1,
    "(e^{(1−α)d} − 1 − (1 − α)(e^d − 1))/(α(α − 1))": lambda d: (
        ((0.7 * d).exp() - 1 - 0.7 * (d.exp() - 1)) / (0.3 * -0.7)
    ),
}

ENTRIES = (*TABLE.values(), entry("alpha", 0.3))
every_entry = pytest.mark.parametrize("found", ENTRIES, ids=[each.name for each in ENTRIES])


@every_entry
def test_the_printed_generator_is_normalised_and_has_the_printed_slope(found: Divergence) -> None:
    u = torch.linspace(-6, 6, 60, dtype=torch.float64).exp().requires_grad_()
    f, derivative = GENERATORS[found.generator], DERIVATIVES[found.derivative]
    (slope_of_f,) = torch.autograd.grad(f(u).sum(), u)
    torch.testing.assert_close(slope_of_f, derivative(u), rtol=1e-9, atol=1e-12)
    one = torch.ones((), dtype=torch.float64)
    assert abs(f(one).item()) < 1e-15 and derivative(one).item() == 0.0


@every_entry
def test_token_form_and_score_follow_from_the_generator(found: Divergence) -> None:
    d = torch.linspace(-6, CLAMP, 120, dtype=torch.float64)
    value, derivative = GENERATORS[found.generator](d.exp()), DERIVATIVES[found.derivative](d.exp())
    if found.token is not None:
        torch.testing.assert_close(found.token.value(d), value, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(TOKENS[found.token.text](d), value, rtol=1e-9, atol=1e-13)
    if found.score is not None:
        torch.testing.assert_close(found.score.value(d), found.score.scale * derivative, rtol=1e-9, atol=1e-13)


@every_entry
def test_terms_are_the_summands_of_value_and_gradient(found: Divergence) -> None:
    lq = torch.linspace(-30, -0.01, 40, dtype=torch.float64)[:, None]
    d = torch.cat([torch.linspace(-200, 30, 231), torch.linspace(-1e-3, 1e-3, 20)]).double()
    lp = (lq + d).clamp(max=0.0)
    u, p, q = (lp - lq).exp(), lp.exp(), lq.exp()
    value, pull = found.terms(lp, lq)
    torch.testing.assert_close(value, q * GENERATORS[found.generator](u), rtol=1e-8, atol=1e-15)
    torch.testing.assert_close(pull, p * DERIVATIVES[found.derivative](u), rtol=1e-8, atol=1e-15)
    assert value.min() >= -1e-16


@every_entry
def test_terms_are_exact_in_float32_at_ratios_that_float32_cannot_hold(found: Divergence) -> None:
    # u = e^±150 and e^±2000 overflow or vanish, their products with p and q need not; float64 follows the same algebra.
    lp = torch.tensor([-150.0, -0.5, -2000.0, -1e-3, -40.0, -60.0])
    lq = torch.tensor([-0.5, -150.0, -1e-3, -2000.0, -60.0, -40.0])
    held = torch.ones(6, dtype=torch.bool) if "chi2" not in found.name else torch.tensor([1, 0, 1, 0, 1, 1]).bool()
    for ours, wanted in zip(found.terms(lp, lq), found.terms(lp.double(), lq.double()), strict=True):
        torch.testing.assert_close(ours[held].double(), wanted[held], rtol=1e-5, atol=1e-30)
        assert (ours[~held] > 3e38).all(), "χ² itself leaves float32 there"


def test_extreme_terms_by_hand() -> None:
    lp, lq = torch.tensor([-2000.0, -1e-3]), torch.tensor([-1e-3, -2000.0])
    q = math.exp(-1e-3)
    wanted = {
        "forward_kl": [q * (2000 - 1e-3) - q, q],  # q (log q − log p) + p − q
        "reverse_kl": [q, q * (2000 - 1e-3) - q],
        "js": [0.5 * q * math.log(2)] * 2,
        "hellinger": [0.5 * q] * 2,
        "jeffreys": [q * (2000 - 1e-3)] * 2,
        "total_variation": [0.5 * q] * 2,
        "alpha": [q / 0.7, q / 0.3],  # a = 0.3: −a q/(a(a − 1)) and −(1 − a) p/(a(a − 1))
    }
    for name, values in wanted.items():
        value, _ = entry(name, 0.3 if name == "alpha" else None).terms(lp, lq)
        torch.testing.assert_close(value, torch.tensor(values), rtol=1e-6, atol=0)


def test_the_page_is_what_the_table_says() -> None:
    page = (Path(__file__).parent.parent / "docs" / "divergences.md").read_text(encoding="utf-8")
    assert page == document(), "out of date: python -m posttrain.objectives.divergences > docs/divergences.md"


# ---------------------------------------------------------------- JS from its definition, half on either side


def halves(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the reference half over the reference, and of the policy half over an older policy, exact sums."""
    logps, ref_logps = logits.log_softmax(-1), reference.log_softmax(-1)
    old_logps = (logits.detach() + torch.linspace(-1, 1, logits.size(-1), dtype=logits.dtype)).log_softmax(-1)
    d, ratio = logps - ref_logps, (logps - old_logps).exp()
    on_reference = (ref_logps.exp() * js_reference_half(d)).sum(-1)
    on_rollouts = (old_logps.exp() * js_policy_half(d, ratio)).sum(-1)
    return on_reference, on_rollouts


def test_the_two_halves_add_up_to_twice_js() -> None:
    policy, reference = categoricals()
    wanted = 2 * definition("js", None, policy.softmax(-1), reference.softmax(-1))
    torch.testing.assert_close(sum(halves(policy, reference)), wanted, rtol=0, atol=1e-9)


def test_the_gradient_of_each_half_is_that_of_its_kl_to_a_mixture_that_moves_along() -> None:
    logits, reference = categoricals()
    logits.requires_grad_()
    p, q = logits.softmax(-1), reference.softmax(-1)
    m = (p + q) / 2
    on_reference, on_rollouts = halves(logits, reference)
    for estimate, exact in ((on_reference, kl(q, m)), (on_rollouts, kl(p, m))):
        (ours,) = torch.autograd.grad(estimate.sum(), logits, retain_graph=True)
        (theirs,) = torch.autograd.grad(exact.sum(), logits, retain_graph=True)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_reference_half_never_rewards_moving_away_from_a_stored_answer(dtype: torch.dtype) -> None:
    d = torch.cat([torch.linspace(-200, 50, 2001), torch.zeros(1)]).to(dtype).requires_grad_()
    value = js_reference_half(d)
    (pull,) = torch.autograd.grad(value.sum(), d)
    assert value.isfinite().all() and pull.isfinite().all()
    assert value.min() >= -2e-7 and (pull * d.sign()).min() >= -2e-7
    assert value[-1] == 0 and pull[-1] == 0
    resolved = (d.abs() > 1e-3) & (d > -10)
    assert ((pull * d.sign())[resolved] > 0).all()


@pytest.mark.parametrize("clamp", [0.5, CLAMP, MAX_LOG_RATIO_CLAMP])
def test_the_reference_half_continues_along_its_tangent(clamp: float) -> None:
    d = torch.tensor([clamp - 1e-9, clamp, clamp + 1e-9, clamp + 3], dtype=torch.float64, requires_grad=True)
    value = js_reference_half(d, log_ratio_clamp=clamp)
    (pull,) = torch.autograd.grad(value.sum(), d)
    u = torch.tensor(clamp, dtype=torch.float64).exp()
    torch.testing.assert_close(pull, (u * (u - 1) / (2 * (u + 1))).expand(4), rtol=1e-7, atol=0)
    torch.testing.assert_close(value[3], value[1] + 3 * pull[1])
    torch.testing.assert_close(value[:3], value[1].expand(3), rtol=1e-7, atol=1e-8)
