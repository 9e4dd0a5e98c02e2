"""RLAD: GRPO at α = 1, the paper's gradients at θ_old, and a teacher that cannot be dropped.

The ratio by itself is in tests/test_distillation.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import GRPOConfig
from trl import GRPOTrainer as TRLTrainer

from posttrain.errors import UserError
from posttrain.seams.on_policy import Tokens
from posttrain.trainers.rlad import RLADConfig, RLADTrainer
from tests.oracle import arguments, batch, dataset, length_reward, value_and_gradient
from tests.teachers import Shifted, other_model


def build(model: str, folder: Path, teacher: Any = None, **changes: Any) -> Any:
    return RLADTrainer(
        model=model,
        reward_funcs=length_reward,
        args=RLADConfig(**arguments(folder, **changes)),
        train_dataset=dataset(),
        teacher=teacher or Shifted(other_model(model)),
    )


@pytest.fixture
def trainer(tiny_model: str, tmp_path: Path) -> Any:
    return build(tiny_model, tmp_path)


def annotated(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch with what the trainer adds to it."""
    trainer.current_gradient_accumulation_steps = 1
    extra = trainer.annotate(inputs, [{}] * len(inputs["completion_ids"]))
    trainer._extra_keys = tuple(extra)
    return {**inputs, **extra}


def tokens(logps: Tensor, teacher_logps: Tensor, advantages: Tensor, **changes: Any) -> Tokens:
    """Answers at θ_old, all of whose tokens count."""
    extra = {"teacher_logps": teacher_logps, "teacher_mask": torch.ones_like(logps, dtype=torch.bool)}
    given: dict[str, Any] = {"old_logps": logps.detach(), "extra": extra, **changes}
    ones = torch.ones_like(logps)
    return Tokens(logps=logps, advantages=advantages, mask=ones, entropy=ones, **given)


def slopes(trainer: Any, sample: Tokens) -> Tensor:
    """What multiplies Â ∇ log π_θ, per token."""
    per_token, _ = trainer.policy_gradient(sample)
    (gradient,) = torch.autograd.grad(per_token.sum(), sample.logps)
    return -gradient / sample.advantages


# ---------------------------------------------------------------- the limits in which it is GRPO


@pytest.mark.parametrize("anchor", ["geometric", "arithmetic"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_alpha_of_one_is_grpo(tiny_model: str, tmp_path: Path, anchor: str, loss_type: str, beta: float) -> None:
    """Value and gradient of TRL's GRPO, with its clips and its reference KL."""
    ours = build(tiny_model, tmp_path, trrd_anchor=anchor, loss_type=loss_type, beta=beta)
    theirs = TRLTrainer(
        model=tiny_model,
        reward_funcs=length_reward,
        args=GRPOConfig(**arguments(tmp_path, loss_type=loss_type, beta=beta, epsilon_high=0.28)),
        train_dataset=dataset(),
    )
    inputs = annotated(ours, batch(ours, seed=1, beta=beta, sampler=False))
    theirs.current_gradient_accumulation_steps = 1
    expected = value_and_gradient(theirs, inputs)
    assert expected[1].abs().max() > 1e-3
    assert (value_and_gradient(ours, inputs)[1] - expected[1]).abs().max() > 1e-3, "at α = ½ it is not"
    ours.args.trrd_alpha = 1.0
    torch.testing.assert_close(value_and_gradient(ours, inputs), expected, rtol=1e-5, atol=1e-6)


def test_a_teacher_that_is_the_student_leaves_the_ratio_at_one(tiny_model: str, tmp_path: Path) -> None:
    """At θ_old, r = 1: the loss is that of GRPO, and so is its gradient (α + 1 − α)."""
    same: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    trainer = build(tiny_model, tmp_path, Shifted(same))
    inputs = batch(trainer, seed=2, beta=0.0, sampler=False)
    del inputs["old_per_token_logps"]
    inputs = annotated(trainer, inputs)
    found = value_and_gradient(trainer, inputs)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    for name in ("trrd/ratio_mean", "trrd/ratio_p05", "trrd/ratio_p50", "trrd/ratio_p95"):
        assert metrics[name] == pytest.approx(1.0, abs=1e-5)
    assert metrics["clip_ratio/region_mean"] == metrics["trrd/zero_gradient"] == metrics["trrd/outside"] == 0.0
    trainer.args.trrd_alpha = 1.0
    expected = value_and_gradient(trainer, inputs)
    assert expected[1].abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_tokens_without_a_teacher_have_the_ratio_of_grpo(trainer: Any) -> None:
    inputs = annotated(trainer, batch(trainer, seed=3, beta=0.0, sampler=False))
    none = {**inputs, "teacher_mask": torch.zeros_like(inputs["teacher_mask"])}
    found = value_and_gradient(trainer, none)
    trainer.args.trrd_alpha = 1.0
    torch.testing.assert_close(found, value_and_gradient(trainer, inputs), rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------- the paper's gradients


FIXTURE = [
    (-2.0, 0.303, 0.0),
    (-0.99, 0.610, 0.0),
    (-0.5, 0.779, 0.0),
    (-0.44, 0.80, 0.80),
    (0.0, 1.0, 1.0),
    (0.44, 1.25, 1.25),
    (0.49, 1.28, 1.28),
    (0.5, 0.0, 1.284),
    (0.99, 0.0, 1.64),
    (2.0, 0.0, 0.824),
]
"""d = log π_θ − log π_T, and the factor on Â ∇ log π_θ for Â > 0 and Â < 0; α = ½, c = 1, ε = 0.2 and 0.28."""


def test_gradients_at_the_old_policy_are_those_of_the_table(trainer: Any) -> None:
    for d, positive, negative in FIXTURE:
        logps = torch.tensor([[-2.0], [-2.0]], requires_grad=True)
        sample = tokens(logps, logps.detach() - d, torch.tensor([[1.0], [-1.0]]))
        assert slopes(trainer, sample)[:, 0].tolist() == pytest.approx([positive, negative], abs=6e-3), d


def test_a_straight_through_clamp_keeps_the_whole_slope(tiny_model: str, tmp_path: Path) -> None:
    """d = −2, Â > 0: r = e^{−½} = 0.607, with slope r instead of r/2."""
    trainer = build(tiny_model, tmp_path, trrd_clamp_gradient="straight_through")
    logps = torch.tensor([[-2.0]], requires_grad=True)
    found = slopes(trainer, tokens(logps, logps.detach() + 2.0, torch.tensor([[1.0]])))
    assert float(found) == pytest.approx(math.exp(-0.5), rel=1e-6)


def test_no_advantage_no_gradient(trainer: Any) -> None:
    inputs = annotated(trainer, batch(trainer, seed=4, beta=0.0, sampler=False))
    inputs["advantages"] = torch.zeros(8)
    loss, gradient = value_and_gradient(trainer, inputs)
    assert float(loss) == 0.0
    assert float(gradient.abs().max()) == 0.0
    assert trainer._metrics["train"]["trrd/zero_gradient"][-1] == 1.0


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.7])
def test_the_arithmetic_ratio_is_at_most_one_over_alpha(tiny_model: str, tmp_path: Path, alpha: float) -> None:
    """At θ_old, 1 / (α + (1 − α) π_T/π_θ); here for teachers up to 30 nats away."""
    trainer = build(tiny_model, tmp_path, trrd_anchor="arithmetic", trrd_alpha=alpha)
    gaps = torch.linspace(-30, 30, 61)[None, :]
    sample = tokens(torch.full((1, 61), -1.0), -1.0 + gaps, torch.ones(1, 1))
    _, metrics = trainer.policy_gradient(sample)
    ratio = metrics["trrd/ratio_mean"]
    torch.testing.assert_close(ratio, 1 / (alpha + (1 - alpha) * gaps.exp()), rtol=1e-4, atol=1e-12)
    assert float(ratio.max()) <= 1 / alpha * (1 + 1e-6)
    assert "trrd/outside" not in metrics


def test_gradient_equals_finite_differences(tiny_model: str, tmp_path: Path) -> None:
    """Off-policy, in float64, away from the clips' kinks."""
    generator = torch.Generator().manual_seed(5)
    for anchor in ("geometric", "arithmetic"):
        trainer = build(tiny_model, tmp_path, trrd_anchor=anchor, beta=0.0, delta=3.0)
        logps, old, teacher = (-2 * torch.rand(5, 7, generator=generator, dtype=torch.float64) for _ in range(3))
        advantages = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
        sample = tokens(logps.requires_grad_(), teacher, advantages, old_logps=old)
        (gradient,) = torch.autograd.grad(trainer.objective(sample)[0].sum(), logps)
        step = 1e-6
        up, down = (trainer.objective(replace(sample, logps=logps.detach() + h))[0] for h in (step, -step))
        torch.testing.assert_close(gradient, (up - down) / (2 * step), rtol=1e-6, atol=1e-8)
        still = trainer.objective(sample)[1]["trrd/zero_gradient"]
        assert torch.equal(still.bool(), gradient == 0), "the metric counts what autograd finds"
        assert 0 < float(still.mean()) < 1


# ---------------------------------------------------------------- the teacher, and what is measured


def test_perturbing_the_teacher_changes_loss_and_gradient(trainer: Any) -> None:
    inputs = batch(trainer, seed=6, beta=0.0, sampler=False)
    before = value_and_gradient(trainer, annotated(trainer, inputs))
    trainer.teacher.shift = 0.3
    after = value_and_gradient(trainer, annotated(trainer, inputs))
    assert abs(float(after[0] - before[0])) > 1e-4
    assert (after[1] - before[1]).norm() > 1e-2 * before[1].norm()


def test_a_teacher_without_effect_is_refused(tiny_model: str, tmp_path: Path) -> None:
    class Deaf(RLADTrainer):
        def policy_gradient(self, tokens: Tokens) -> Any:
            return super().policy_gradient(replace(tokens, extra={**tokens.extra, "teacher_logps": tokens.logps}))

    with pytest.raises(UserError, match="The teacher has no effect"):
        Deaf(
            model=tiny_model,
            reward_funcs=length_reward,
            args=RLADConfig(**arguments(tmp_path)),
            train_dataset=dataset(),
            teacher=Shifted(other_model(tiny_model)),
        )


def test_exactly_one_teacher_forward_per_rollout_batch(tiny_model: str, tmp_path: Path) -> None:
    """Two steps of two micro-batches; a run of whole steps, with finite losses."""
    teacher = Shifted(other_model(tiny_model), batch_size=64)
    forwards: list[int] = []
    teacher.model.register_forward_hook(lambda *_: forwards.append(1))
    trainer = build(tiny_model, tmp_path, teacher, gradient_accumulation_steps=2)
    trainer.train()
    assert (teacher.calls, len(forwards)) == (2, 2)
    logged = [log for log in trainer.state.log_history if "trrd/ratio_mean" in log]
    assert [log["step"] for log in logged] == [1, 2]
    assert all(math.isfinite(log["loss"]) for log in logged)


def test_metrics_by_hand(trainer: Any) -> None:
    """d = −2, −0.4, 0, 0.4 and 2 give log r = ½ clamp(d) at θ_old; once with Â = 1, once with Â = −1."""
    gaps = torch.tensor([-2.0, -0.4, 0.0, 0.4, 2.0]).expand(2, 5)
    logps = torch.full((2, 5), -3.0)
    _, metrics = trainer.policy_gradient(tokens(logps, logps - gaps, torch.tensor([[1.0], [-1.0]])))
    means = {name: float(value.mean()) for name, value in metrics.items()}
    ratios = sorted([math.exp(-0.5), math.exp(-0.2), 1.0, math.exp(0.2), math.exp(0.5)])
    assert means == pytest.approx(
        {
            "clip_ratio/low_mean": 0.1,  # d = −2 with Â < 0
            "clip_ratio/high_mean": 0.1,  # d = 2 with Â > 0
            "clip_ratio/region_mean": 0.2,
            "trrd/zero_gradient": 0.2,
            "trrd/ratio_mean": sum(ratios) / 5,
            "trrd/ratio_p05": ratios[0],  # of ten values, each twice: at 0.45 between the first two
            "trrd/ratio_p50": 1.0,
            "trrd/ratio_p95": ratios[-1],
            "trrd/log_ratio_abs": 0.96,
            "trrd/outside": 0.4,
        },
        rel=1e-5,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trrd_alpha": 1.0}, "trrd_alpha = 1 is GRPO"),
        ({"trrd_alpha": 0.0}, "alpha must lie above 0"),
        ({"trrd_clamp": 0.0}, "clamp must be positive"),
        ({"trrd_anchor": "harmonic"}, "unknown anchor 'harmonic'"),
        ({"trrd_clamp_gradient": "soft"}, "unknown clamp_gradient 'soft'"),
        ({"trrd_anchor": "arithmetic", "trrd_clamp": 2.0}, "trrd_clamp = 2.0 has no effect"),
        (
            {"trrd_anchor": "arithmetic", "trrd_clamp_gradient": "straight_through"},
            "trrd_clamp_gradient = .* no effect",
        ),
    ],
)
def test_settings_without_meaning_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RLADConfig(**arguments(tmp_path, **settings))


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    config = RLADConfig(str(tmp_path), use_cpu=True, bf16=False)
    found = (config.trrd_alpha, config.trrd_clamp, config.epsilon, config.epsilon_high, config.loss_type, config.beta)
    assert found == (0.5, 1.0, 0.2, 0.28, "grpo", 0.0)
    assert (config.scale_rewards, config.learning_rate, config.num_generations) == ("group", 1e-6, 8)
