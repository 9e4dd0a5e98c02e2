"""ERPD on exact policies: no network, expected rewards and KLs by enumeration of all answers.

Answers have four tokens of three words (0 plain, 1 step, 2 junk); right are those with exactly two steps and no junk.
A policy's next-token logits are a table of its own for every prompt and prefix, plus a table of positions and words
that all prompts share, which is what is trained: it generalises to held-out prompts, and cannot count steps. So π_0's
answers say "more steps", which is true near π_0 and wrong far from it, where π_0 has hardly been.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.objectives.extraction import extraction_loss
from posttrain.objectives.signals import auc, distillation_loss, rms, scaled, shaped

WORDS, LENGTH, TRAINED, PROMPTS, GROUP = 3, 4, 24, 48, 16
ANSWERS = torch.tensor(list(itertools.product(range(WORDS), repeat=LENGTH)))
RIGHT = ((ANSWERS == 1).sum(1) == 2) & ~(ANSWERS == 2).any(1)

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(log π_θ, log π_0, Â, r) of the sampled answers → a scalar."""


def prefixes() -> Tensor:
    """The number of the prefix before every token of every answer [answers, LENGTH]."""
    found, before, offset = [], torch.zeros(len(ANSWERS), dtype=torch.long), 0
    for position in range(LENGTH):
        found.append(offset + before)
        before, offset = before * WORDS + ANSWERS[:, position], offset + WORDS**position
    return torch.stack(found, dim=1)


PREFIXES = prefixes()
POSITIONS = torch.tensor([position for position in range(LENGTH) for _ in range(WORDS**position)])


@dataclass(frozen=True, eq=False)
class Point:
    """A policy on the way of a run, measured on held-out prompts: accuracy, KL(π_θ‖π_0) of whole answers (nats)."""

    table: Tensor
    accuracy: float
    kl: float
    entropy: float


class World:
    """Prompts, what π_0 answered on the first of them, and how a shared table does on the others."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(PROMPTS, len(POSITIONS), WORDS, generator=generator, dtype=torch.float64)
        self.base_logits = torch.tensor([0.0, -1.5, -1.5], dtype=torch.float64) + 0.5 * noise
        self.zero = torch.zeros(LENGTH, WORDS, dtype=torch.float64)
        self.base = self.logps(self.zero)
        drawn = torch.multinomial(self.base.sum(-1).exp(), GROUP, replacement=True, generator=generator)
        rewards = RIGHT[drawn].double()
        spread = rewards.std(dim=1, keepdim=True)
        advantages = (rewards - rewards.mean(dim=1, keepdim=True)) / (spread + 1e-4)
        mixed = torch.nonzero(spread[:TRAINED, 0] > 0).squeeze(1)
        self.prompts = mixed.repeat_interleave(GROUP)
        self.answers = drawn[mixed].reshape(-1)
        self.advantages, self.rewards = advantages[mixed].reshape(-1, 1), rewards[mixed].reshape(-1, 1)
        self.held_prompts = torch.arange(TRAINED, PROMPTS).repeat_interleave(GROUP)
        self.held_answers = drawn[TRAINED:].reshape(-1)

    def logps(self, table: Tensor) -> Tensor:
        """log π of every token of every answer to every prompt [prompts, answers, LENGTH]."""
        return (self.base_logits + table[POSITIONS]).log_softmax(-1)[:, PREFIXES, ANSWERS]

    def sampled(self, logps: Tensor) -> Tensor:
        return logps[self.prompts, self.answers]

    @torch.no_grad()
    def point(self, table: Tensor) -> Point:
        logps = self.logps(table)[TRAINED:]
        probabilities, log_ratio = logps.sum(-1).exp(), (logps - self.base[TRAINED:]).sum(-1)
        accuracy = (probabilities * RIGHT).sum(1).mean().item()
        kl = (probabilities * log_ratio).sum(1).mean().item()
        entropy = -(probabilities * logps.sum(-1)).sum(1).mean().item()
        return Point(table.clone(), accuracy, kl, entropy)

    def run(self, loss: Loss, *, steps: int = 120, rate: float = 2.0, every: int = 4) -> list[Point]:
        """Gradient descent from π_0 on the sampled answers, all of them in every step."""
        table, found = self.zero.clone().requires_grad_(), []
        base = self.sampled(self.base)
        for step in range(steps + 1):
            if step % every == 0:
                found.append(self.point(table.detach()))
            value = loss(self.sampled(self.logps(table)), base, self.advantages, self.rewards)
            (gradient,) = torch.autograd.grad(value, table)
            with torch.no_grad():
                table -= rate * gradient
        return found

    def extracted(self, name: str, sign: float = 1.0, **options: Any) -> list[Point]:
        return self.run(
            lambda logps, base, advantages, rewards: extraction_loss(
                name, logps, base, torch.ones_like(logps), sign * advantages, rewards if sign > 0 else 1.0 - rewards
            ).mean(),
            **options,
        )

    def signal(self, plus: Tensor, minus: Tensor) -> Tensor:
        """δ of every token of every answer to every prompt."""
        return self.logps(plus) - self.logps(minus)

    def auc(self, signal: Tensor) -> float:
        return auc(signal[self.held_prompts, self.held_answers].sum(1), RIGHT[self.held_answers])

    def distilled(
        self, signal: Tensor, region: str, weight: float, epsilon: float = 0.2, **options: Any
    ) -> list[Point]:
        delta = shaped(self.sampled(signal), torch.ones(len(self.prompts), LENGTH))
        bounded = scaled(delta, rms(delta, torch.ones_like(delta)).item())
        return self.run(
            lambda logps, base, *_: distillation_loss(
                logps - base,
                bounded,
                trust_region=region,
                kl_coef=weight,
                epsilon_low=epsilon,
                epsilon_high=epsilon,
            ).mean(),
            **options,
        )


SLOWLY = {"steps": 60, "rate": 0.5, "every": 1}
"""So that a KL of 0.2 lies between points that are close."""


def at_kl(points: list[Point], kl: float) -> float:
    """The accuracy at which a run first has that KL, between its points."""
    for before, after in itertools.pairwise(points):
        if before.kl <= kl <= after.kl:
            share = (kl - before.kl) / (after.kl - before.kl)
            return before.accuracy + share * (after.accuracy - before.accuracy)
    raise AssertionError(f"the run never has a KL of {kl}")


def best(points: list[Point]) -> Point:
    return max(points, key=lambda point: point.accuracy)


@pytest.fixture(scope="module", params=[0, 1])
def world(request: pytest.FixtureRequest) -> World:
    return World(request.param)


@pytest.fixture(scope="module")
def teacher(world: World) -> list[Point]:
    """Unconstrained importance weighting."""
    return world.extracted("is")


@pytest.fixture(scope="module")
def unlearned(world: World) -> Tensor:
    return world.extracted("is", sign=-1.0)[-1].table


# ---------------------------------------------------------------- what the method stands on


def test_aggressive_optimisation_gains_fast_and_collapses(teacher: list[Point]) -> None:
    """Three times the base's accuracy within the first quarter of the run, a twentieth of the base's at its end."""
    base, top, end = teacher[0], best(teacher), teacher[-1]
    assert 0.05 < base.accuracy < 0.1
    assert top.accuracy > 2.8 * base.accuracy
    assert teacher.index(top) < len(teacher) / 4
    assert end.accuracy < 0.05 * base.accuracy
    assert end.kl > 4.0 > 2.0 > top.kl
    assert end.entropy < 0.2 * base.entropy


def test_a_degenerate_policy_is_a_signal(world: World, teacher: list[Point], unlearned: Tensor) -> None:
    """Policies that hardly ever answer right rank held-out answers well, and what is distilled of them is better."""
    collapsed, base = teacher[-1], teacher[0].accuracy
    assert world.point(unlearned).accuracy < 0.05 * base
    for plus, minus, rank, gain in (
        (collapsed.table, world.zero, 0.9, 2.0),
        (collapsed.table, unlearned, 0.9, 2.0),
        (world.zero, unlearned, 0.7, 1.3),
    ):
        signal = world.signal(plus, minus)
        assert world.auc(signal) > rank
        student = world.distilled(signal, "clip", 1e-3)[-1]
        assert student.accuracy > gain * base
        assert student.kl < 0.25 * collapsed.kl


def test_a_tighter_kl_lowers_the_ceiling(world: World, teacher: list[Point], unlearned: Tensor) -> None:
    """The best accuracy of a run falls with the width of the clip and with the weight of the KL; so does its KL."""
    signal = world.signal(teacher[-1].table, world.zero)
    clipped = [world.distilled(signal, "clip", 1e-3, epsilon) for epsilon in (0.2, 0.05, 0.01)]
    penalised = [
        world.distilled(world.signal(teacher[-1].table, unlearned), "kl", weight) for weight in (1.0, 3.0, 9.0)
    ]
    for runs in (clipped, penalised):
        ceilings = [best(run).accuracy for run in runs]
        assert ceilings[0] > ceilings[1] + 0.02 > ceilings[2] + 0.04
        assert runs[0][-1].kl > runs[1][-1].kl > runs[2][-1].kl


def test_distillation_beside_early_stopping_at_equal_kl(world: World, teacher: list[Point], unlearned: Tensor) -> None:
    """At KLs from 0.05 to 0.2 nats per answer distilling π_T/π_0 is no better than stopping the extraction early, nor
    than interpolating between base and teacher; π_T/π_U is better than either, by less than 0.02.
    """
    one = world.distilled(world.signal(teacher[-1].table, world.zero), "kl", 0.3, **SLOWLY)
    two = world.distilled(world.signal(teacher[-1].table, unlearned), "kl", 0.3, **SLOWLY)
    between = [world.point(share * teacher[-1].table) for share in torch.linspace(0.0, 1.0, 101).tolist()]
    fine = world.extracted("is", **SLOWLY)
    for kl in (0.05, 0.1, 0.2):
        early, straight = at_kl(fine, kl), at_kl(between, kl)
        assert at_kl(one, kl) < early
        assert early == pytest.approx(straight, abs=0.01)
        assert early < at_kl(two, kl) < early + 0.02


# ---------------------------------------------------------------- does unlearning mirror learning?


def tabular(seed: int = 3, answers: int = 8) -> tuple[Tensor, Tensor]:
    """log π_0 over whole answers to one prompt, and their advantages, centred under π_0."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(answers, generator=generator, dtype=torch.float64).log_softmax(0)
    advantages = torch.randn(answers, generator=generator, dtype=torch.float64)
    return base, advantages - (base.exp() * advantages).sum()


def spread(values: Tensor) -> float:
    return (values.max() - values.min()).item()


def test_at_the_optimum_unlearning_mirrors_learning_up_to_a_constant() -> None:
    """π ∝ π_0 e^{±A/β}: log π_0/π_U and log π_T/π_0 are both A/β, less two constants of the prompt that differ."""
    base, advantages = tabular()
    for beta in (0.3, 1.0):
        teacher = (base + advantages / beta).log_softmax(0)
        unlearned = (base - advantages / beta).log_softmax(0)
        difference = (base - unlearned) - (teacher - base)
        assert spread(difference) < 1e-12
        assert difference.mean().item() > 0.1, "log of both partition functions, each at least 0"


def test_gradient_descent_mirrors_in_its_first_step_only() -> None:
    """−E_0[ρA]: the first steps are opposite in logits, later ones follow two policies that are no mirror."""
    base, advantages = tabular()
    gaps = []
    for steps in (1, 50):
        logits = {}
        for sign in (1.0, -1.0):
            moved = base.clone()
            for _ in range(steps):
                given = moved.clone().requires_grad_()
                ratio = (given.log_softmax(0) - base).exp()
                (slope,) = torch.autograd.grad(-(base.exp() * ratio * sign * advantages).sum(), given)
                moved = moved - 1.0 * slope
            logits[sign] = moved.log_softmax(0)
        gaps.append(spread((base - logits[-1.0]) - (logits[1.0] - base)))
    assert gaps[0] < 1e-12
    assert gaps[1] > 1.0


def test_of_token_signals_only_the_sum_mirrors() -> None:
    """The same optimum over answers of two tokens, token by token: soft values do not change sign with the reward."""
    base, advantages = (values.view(4, 2) for values in tabular())
    found = {}
    for sign in (1.0, -1.0):
        joint = (base + sign * advantages).flatten().log_softmax(0).view(4, 2)
        first = joint.logsumexp(1, keepdim=True)
        found[sign] = (first.expand(4, 2), joint - first)
    start = base.logsumexp(1, keepdim=True)
    parts = (start.expand(4, 2), base - start)
    mirrored = [(parts[i] - found[-1.0][i]) - (found[1.0][i] - parts[i]) for i in (0, 1)]
    assert spread(mirrored[0] + mirrored[1]) < 1e-12
    assert min(spread(part) for part in mirrored) > 0.05


def test_squared_error_mirrors_on_the_answers_it_saw() -> None:
    """It ends at S = ± A/β on the three answers that were drawn, and the others take what probability is left."""
    base, _ = tabular()
    drawn, beta = torch.tensor([0, 3, 5]), 1.0
    advantages = torch.tensor([[0.4], [-0.3], [-0.1]], dtype=torch.float64)
    ends = {}
    for sign in (1.0, -1.0):
        logits = base.clone().requires_grad_()

        for _ in range(400):
            value = extraction_loss(
                "mse",
                logits.log_softmax(0)[drawn, None],
                base[drawn, None],
                torch.ones(3, 1),
                sign * advantages,
                torch.zeros(3, 1, dtype=torch.float64),
                beta=beta,
            ).mean()
            (slope,) = torch.autograd.grad(value, logits)
            with torch.no_grad():
                logits -= slope
        ends[sign] = (logits.detach().log_softmax(0) - base)[drawn]
        torch.testing.assert_close(ends[sign], sign * advantages[:, 0] / beta, rtol=0, atol=1e-6)
    torch.testing.assert_close(ends[1.0], -ends[-1.0], rtol=0, atol=1e-6)
