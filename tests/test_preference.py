"""Preference scores and the pairwise loss against f', TRL's formulas and their own promises."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.objectives.preference import NAMES, check, loss, score, slope_at_one

EDGE = 8.0
"""The default of `edge`."""

Case = tuple[str, float | None]
CASES: list[Case] = [
    *((name, None) for name in ("reverse_kl", "forward_kl", "js", "jeffreys", "chi2_kl")),
    *(("alpha", alpha) for alpha in (0.0, 1e-4, 0.2, 0.5, 1.0, 2.5)),
]
IDS = [name if alpha is None else f"{name}{alpha:g}" for name, alpha in CASES]

every_score = pytest.mark.parametrize(("name", "alpha"), CASES, ids=IDS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])


def generator(name: str, alpha: float | None, u: Tensor) -> Tensor:
    """f(u) of f-DPO, as the paper and textbooks write it: no care for f(1) or f'(1); JS is twice JS."""
    if alpha is not None and 0.0 < alpha != 1.0:
        return (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1))
    name = {0.0: "reverse_kl", 1.0: "forward_kl"}.get(alpha, name) if alpha is not None else name
    generators: dict[str, Callable[[], Tensor]] = {
        "reverse_kl": lambda: u * u.log(),
        "forward_kl": lambda: -u.log(),
        "js": lambda: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
        "jeffreys": lambda: (u - 1) * u.log(),
        "chi2_kl": lambda: (u - 1) ** 2 / 2 + u * u.log(),
    }
    return generators[name]()


def edge_of(name: str, alpha: float | None, edge: float = EDGE) -> float | None:
    """Where the linear continuation begins."""
    if name == "alpha":
        return None if alpha is None or alpha < 1e-4 else -edge / alpha
    return {"forward_kl": -edge, "jeffreys": -edge, "chi2_kl": edge}.get(name)


def slope(name: str, alpha: float | None, d: Tensor, edge: float = EDGE) -> Tensor:
    """ds/dd, elementwise, by autograd."""
    d = d.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(score(name, d, alpha=alpha, edge=edge).sum(), d)
    return found


def test_every_score_is_a_case() -> None:
    assert {name for name, _ in CASES} == set(NAMES)


@every_score
def test_the_score_is_the_slope_of_the_generator_up_to_its_constant(name: str, alpha: float | None) -> None:
    reach = 3.0 if alpha == 2.5 else 7.5  # inside the edge, 8/2.5 = 3.2 for the former
    u = torch.linspace(-reach, reach, 301, dtype=torch.float64).exp().requires_grad_()
    (derivative,) = torch.autograd.grad(generator(name, alpha, u).sum(), u)
    one = torch.ones((), dtype=torch.float64, requires_grad=True)
    (constant,) = torch.autograd.grad(generator(name, alpha, one), one)
    tolerance = 5e-3 if alpha == 1e-4 else 1e-9  # f divides by α(α − 1), and float64 by nearly 0 there
    torch.testing.assert_close(
        score(name, u.detach().log(), alpha=alpha), derivative - constant, rtol=tolerance * 10, atol=tolerance
    )


@every_score
def test_gradients_equal_finite_differences(name: str, alpha: float | None) -> None:
    grid = [-60.0, -20.0, -8.5, -7.5, -3.3, -3.1, -0.4, 0.0, 0.3, 2.0, 7.5, 8.5, 60.0]
    d = torch.tensor(grid, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: score(name, x, alpha=alpha), d, eps=1e-6, rtol=1e-6, atol=1e-6)


@every_score
@every_dtype
def test_an_untrained_answer_scores_zero_with_the_slope_at_one(
    name: str, alpha: float | None, dtype: torch.dtype
) -> None:
    d = torch.zeros(3, dtype=dtype)
    wanted = {"js": 0.5, "jeffreys": 2.0, "chi2_kl": 2.0}.get(name, 1.0)
    assert score(name, d, alpha=alpha).tolist() == [0.0] * 3
    assert slope(name, alpha, d).tolist() == [wanted] * 3
    assert slope_at_one(name, alpha) == wanted


@every_score
@every_dtype
def test_scores_are_finite_and_increase_to_the_end(name: str, alpha: float | None, dtype: torch.dtype) -> None:
    grid = torch.cat([torch.linspace(-1e4, 1e4, 4001), torch.linspace(-100, 100, 8001), torch.linspace(-1, 1, 2001)])
    if (edge := edge_of(name, alpha)) is not None:
        grid = torch.cat([grid, edge + torch.linspace(-0.1, 0.1, 201)])
    d = grid.to(dtype).sort().values
    value, pull = score(name, d, alpha=alpha), slope(name, alpha, d)
    assert value.isfinite().all() and pull.isfinite().all()
    # Not below by more than a rounding of the function; the slope never has the wrong sign.
    step, size = value.diff().double(), value[1:].abs().double()
    assert (step >= -2 * torch.finfo(value.dtype).eps * (1 + size)).all()
    assert pull.min() >= 0
    # Strictly, wherever float32 tells neighbours of 1 from 1: JS and forward KL flatten above d = 16.
    assert (pull[(d < 10 / max(1.0, alpha or 1.0))] > 0).all()


@pytest.mark.parametrize(("name", "alpha"), [case for case in CASES if edge_of(*case) is not None])
@pytest.mark.parametrize("edge", [0.5, EDGE, 40.0])
def test_value_and_slope_are_continuous_at_the_edge_and_the_slope_is_constant_beyond(
    name: str, alpha: float | None, edge: float
) -> None:
    at = edge_of(name, alpha, edge)
    assert at is not None
    outward = math.copysign(1.0, at)
    d = torch.tensor([at - 1e-9, at, at + 1e-9, at + 3 * outward, at + 700 * outward], dtype=torch.float64)
    value, pull = score(name, d, alpha=alpha, edge=edge), slope(name, alpha, d, edge)
    torch.testing.assert_close(value[:3], value[1].expand(3), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(pull, pull[1].expand(5), rtol=1e-7, atol=0)
    torch.testing.assert_close(value[3:], value[1] + (d[3:] - at) * pull[1], rtol=1e-12, atol=0)
    # The slope itself, by hand: e^edge, plus 1 for the mixtures with reverse KL.
    wanted = math.exp(edge) + (1.0 if name in ("jeffreys", "chi2_kl") else 0.0)
    torch.testing.assert_close(pull[1].item(), wanted, rtol=1e-7, atol=0)


def test_a_collapsed_chosen_answer_is_pulled_back_with_the_slope_of_the_edge() -> None:
    d = torch.tensor([-1e4, -100.0])
    assert slope("forward_kl", None, d).tolist() == pytest.approx([math.exp(8)] * 2)
    assert slope("alpha", 0.5, d).tolist() == pytest.approx([math.exp(8)] * 2)
    assert slope("reverse_kl", None, d).tolist() == [1.0, 1.0]
    assert slope("js", None, d).tolist() == [1.0, 1.0]  # σ(−d)


def test_alpha_contains_both_kls_and_tends_to_them() -> None:
    d = torch.linspace(-7, 7, 201, dtype=torch.float64)
    assert torch.equal(score("alpha", d, alpha=0.0), d)
    assert torch.equal(score("alpha", d, alpha=9.9e-5), d)
    assert torch.equal(score("alpha", d, alpha=1.0), score("forward_kl", d))
    gap = (score("alpha", d, alpha=1e-4) - d).abs()  # ½ α d² to first order
    assert (gap <= 0.51 * 1e-4 * d.square()).all()
    torch.testing.assert_close(score("alpha", d, alpha=1 - 1e-9), score("forward_kl", d), rtol=1e-6, atol=0)
    torch.testing.assert_close(score("alpha", d, alpha=1 + 1e-9), score("forward_kl", d), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("given", "returned"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
@every_score
def test_half_precision_is_computed_in_float32(
    name: str, alpha: float | None, given: torch.dtype, returned: torch.dtype
) -> None:
    d = torch.tensor([[0.5, -2.0, 30.0]], dtype=given)
    found = score(name, d, alpha=alpha)
    assert found.dtype == returned and found.shape == (1, 3)
    assert torch.equal(found, score(name, d.to(returned), alpha=alpha))
    assert loss(d, -d, name, beta=0.1, alpha=alpha).dtype == returned


# ---------------------------------------------------------------- the loss


def pairs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Log-ratios of 40 pairs, at most a few nats."""
    source = torch.Generator().manual_seed(5)
    chosen, rejected = 1.5 * torch.randn(2, 40, generator=source, dtype=torch.float64)
    return chosen.to(dtype), rejected.to(dtype)


TRL: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda d, _: d,
    "forward_kl": lambda d, _: 1 - torch.exp(-d),
    "js": lambda d, _: math.log(2) + F.logsigmoid(d),
    "alpha": lambda d, coef: (torch.exp((coef - 1) * d) - 1) / (coef - 1),
}
"""Scores of TRL 1.16's DPOTrainer, inside its clamp; its coefficient is 1 − α."""


@pytest.mark.parametrize(
    ("name", "alpha"), [("reverse_kl", None), ("forward_kl", None), ("js", None), ("alpha", 0.3), ("alpha", 0.8)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_loss_is_trl_s(name: str, alpha: float | None, dtype: torch.dtype) -> None:
    found = []
    for ours in (True, False):
        chosen, rejected = (each.requires_grad_() for each in pairs(dtype))
        if ours:
            value = loss(chosen, rejected, name, beta=0.7, alpha=alpha)
        else:
            delta = TRL[name](chosen, 1 - (alpha or 0)) - TRL[name](rejected, 1 - (alpha or 0))
            value = -F.logsigmoid(0.7 * delta)
        found.append((value, *torch.autograd.grad(value.sum(), (chosen, rejected))))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_where_trl_s_forward_kl_breaks_ours_goes_on() -> None:
    gradients = []
    for of in (TRL["forward_kl"], lambda d, _: score("forward_kl", d)):
        chosen, rejected = torch.tensor([-200.0]).requires_grad_(), torch.tensor([-100.0]).requires_grad_()
        value = -F.logsigmoid(0.1 * (of(chosen, 0.0) - of(rejected, 0.0)))
        gradients.append(torch.stack(torch.autograd.grad(value.sum(), (chosen, rejected))))
    assert gradients[0].isnan().any()
    wanted = 0.1 * math.exp(8)  # σ(−βΔ) = 1 for the wrong order, times β times the slope at the edge
    torch.testing.assert_close(gradients[1][:, 0], torch.tensor([-wanted, wanted]))


def test_the_loss_by_hand() -> None:
    # β = ½, reverse KL: Δ = 2 − (−2) = 4, −log σ(2) = log(1 + e^−2) = 0.126928
    assert loss(torch.tensor([2.0]), torch.tensor([-2.0]), "reverse_kl", beta=0.5).item() == pytest.approx(0.126928)
    # JS at d = ±log 3: s = log(2·3/4) = log 1.5 and log(2/(1 + 3)) = log 0.5, Δ = log 3, −log σ(log 3) = log(4/3)
    d = torch.tensor([math.log(3)])
    assert loss(d, -d, "js", beta=1.0).item() == pytest.approx(math.log(4 / 3))


@every_score
def test_a_pair_that_nothing_tells_apart_costs_log_2_and_is_pulled_apart_evenly(name: str, alpha: float | None) -> None:
    chosen, rejected = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    value = loss(chosen, rejected, name, beta=0.3, alpha=alpha)
    up, down = torch.autograd.grad(value.sum(), (chosen, rejected))
    half = 0.5 * 0.3 * slope_at_one(name, alpha)  # σ(0) β s'(0)
    torch.testing.assert_close(value.detach(), torch.full((2,), math.log(2)))
    torch.testing.assert_close(up, torch.full((2,), -half))
    torch.testing.assert_close(down, torch.full((2,), half))


@every_score
def test_pairs_do_not_touch_one_another_and_swapping_one_mirrors_it(name: str, alpha: float | None) -> None:
    chosen, rejected = pairs()
    value = loss(chosen, rejected, name, beta=0.4, alpha=alpha)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(loss(chosen[order], rejected[order], name, beta=0.4, alpha=alpha), value[order])
    # −log σ(−x) + log σ(x) = x: the two losses differ by the margin of implicit rewards.
    margin = 0.4 * (score(name, chosen, alpha=alpha) - score(name, rejected, alpha=alpha))
    torch.testing.assert_close(loss(rejected, chosen, name, beta=0.4, alpha=alpha) - value, margin)


@every_score
def test_gradients_of_the_loss_equal_finite_differences(name: str, alpha: float | None) -> None:
    chosen, rejected = (each[:12].requires_grad_() for each in pairs())
    assert torch.autograd.gradcheck(lambda w, r: loss(w, r, name, beta=0.2, alpha=alpha), (chosen, rejected))


@every_score
@every_dtype
def test_the_loss_is_finite_however_far_the_policy_went(name: str, alpha: float | None, dtype: torch.dtype) -> None:
    far = torch.tensor([-1e4, -90.0, -8.0, 0.0, 8.0, 90.0, 1e4], dtype=dtype)
    chosen, rejected = (each.flatten().requires_grad_() for each in torch.meshgrid(far, far, indexing="ij"))
    value = loss(chosen, rejected, name, beta=1.0, alpha=alpha)
    gradients = torch.autograd.grad(value.sum(), (chosen, rejected))
    assert value.isfinite().all() and value.min() >= 0
    assert gradients[0].isfinite().all() and gradients[0].max() <= 0
    assert gradients[1].isfinite().all() and gradients[1].min() >= 0


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "alpha", "message"),
    [
        ("chi2", None, "'chi2' is not admissible for preferences: f'\\(0\\+\\) is finite.*use 'chi2_kl'"),
        ("total_variation", None, "'total_variation' is not admissible for preferences: f' takes two values"),
        ("hellinger", None, "it is 'alpha' with alpha = 0.5 and a quarter of beta"),
        ("jsd", None, "unknown divergence 'jsd'; known: forward_kl, reverse_kl, js, jeffreys, chi2_kl, alpha"),
        ("alpha", None, "needs alpha"),
        ("js", 0.5, "alpha = 0.5 has no effect on the divergence 'js'"),
        ("chi2", 0.5, "alpha = 0.5 has no effect on the divergence 'chi2'"),
        ("alpha", -0.5, "a finite number ≥ 0, got -0.5: below 0, f'\\(0\\+\\) is finite"),
        ("alpha", math.nan, "a finite number ≥ 0, got nan"),
        ("alpha", math.inf, "a finite number ≥ 0, got inf"),
    ],
)
def test_what_is_not_admissible_is_refused_with_the_reason(name: str, alpha: float | None, message: str) -> None:
    for ask in (
        lambda: check(name, alpha),
        lambda: slope_at_one(name, alpha),
        lambda: score(name, torch.zeros(2), alpha=alpha),
        lambda: loss(torch.zeros(2), torch.zeros(2), name, beta=1.0, alpha=alpha),
    ):
        with pytest.raises(ValueError, match=message):
            ask()


def test_hellinger_is_what_its_refusal_says() -> None:
    d = torch.linspace(-10, 10, 101, dtype=torch.float64)
    hellinger = 0.5 * (1 - (-d / 2).exp())  # f' of ½(√u − 1)²
    torch.testing.assert_close(hellinger, 0.25 * score("alpha", d, alpha=0.5))


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan, math.inf])
def test_beta_must_be_positive(beta: float) -> None:
    with pytest.raises(ValueError, match="beta must be a positive number"):
        loss(torch.zeros(1), torch.zeros(1), "js", beta=beta)


@pytest.mark.parametrize("edge", [0.0, -8.0, 41.0, math.nan, math.inf])
def test_the_edge_must_be_in_range(edge: float) -> None:
    with pytest.raises(ValueError, match="edge must be positive and at most 40 nats"):
        score("forward_kl", torch.zeros(1), edge=edge)


def test_only_alpha_beyond_forward_kl_warns_and_only_where_it_is_checked() -> None:
    with pytest.warns(UserWarning, match="alpha = 1.5 lies beyond forward KL"):
        check("alpha", 1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, alpha in (("alpha", 1.0), ("alpha", 0.0), ("js", None)):
            check(name, alpha)
        score("alpha", torch.zeros(1), alpha=1.5)
