"""f-DPG: the pseudo-rewards are those of the divergences, Z is right and shared, and training arrives at the target."""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor
from trl import GRPOTrainer as TRLTrainer

from posttrain.errors import UserError
from posttrain.launch.spawn import leave
from posttrain.objectives.targets import (
    NAMES,
    check,
    decayed_log_sum,
    leave_one_out,
    log_partition,
    log_weight,
    pseudo_reward,
)
from posttrain.trainers.f_dpg import FDPGConfig, FDPGTrainer, Partition
from tests.oracle import PROMPTS, arguments, batch, dataset, length_reward, perturb, value_and_gradient
from tests.processes import launch

# Generators f(u), u = π/p, in the scale of the pseudo-rewards, written independently of the package.
GENERATORS: dict[tuple[str, float | None], Callable[[Tensor], Tensor]] = {
    ("forward_kl", None): lambda u: -u.log(),
    ("reverse_kl", None): lambda u: u * u.log(),
    ("js", None): lambda u: u * (2 * u / (1 + u)).log() + (2 / (1 + u)).log(),
    ("total_variation", None): lambda u: 0.5 * (u - 1).abs(),
    ("chi2", None): lambda u: (u - 1) ** 2,
    ("chi2_forward", None): lambda u: (u - 1) ** 2 / u,
    ("jeffreys", None): lambda u: (u - 1) * u.log(),
    ("chi2_kl", None): lambda u: 0.5 * (u - 1) ** 2 + u * u.log(),
    ("alpha", 0.5): lambda u: (u**0.5 - 0.5 * u - 0.5) / (0.5 * (0.5 - 1)),
    ("alpha", 0.25): lambda u: (u**0.75 - 0.75 * u - 0.25) / (0.25 * (0.25 - 1)),
}
FILTERABLE = {"forward_kl", "js", "total_variation", "chi2_forward", "alpha"}
every_generator = pytest.mark.parametrize(("name", "alpha"), GENERATORS, ids=lambda value: str(value))


def test_every_divergence_is_tested() -> None:
    assert {name for name, _ in GENERATORS} == set(NAMES)


# ------------------------------------------------------------------ pseudo-rewards


@every_generator
def test_pseudo_reward_is_minus_the_derivative_of_the_generator(name: str, alpha: float | None) -> None:
    d = torch.linspace(-3.9, 7.9, 60, dtype=torch.float64)  # inside every edge
    u = d.exp().requires_grad_()
    at_one = torch.ones((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(GENERATORS[name, alpha](u).sum(), u)
    (zero,) = torch.autograd.grad(GENERATORS[name, alpha](at_one), at_one)
    torch.testing.assert_close(pseudo_reward(name, d, alpha=alpha), zero - slope, rtol=1e-9, atol=1e-9)


def test_pseudo_rewards_of_the_paper() -> None:
    """π = 0.2: p = 0.6 gives p/π = 3; p = 0.1 gives p/π = ½."""
    log_t = torch.tensor([0.2 / 0.6, 0.2 / 0.1], dtype=torch.float64).log()
    expected = {
        "forward_kl": [3 - 1, 0.5 - 1],
        "reverse_kl": [math.log(3), math.log(0.5)],
        "total_variation": [0.5, -0.5],
        "js": [math.log(0.8 / 0.4), math.log(0.3 / 0.4)],
        "chi2_forward": [9 - 1, 0.25 - 1],
        "chi2": [2 * (1 - 1 / 3), 2 * (1 - 2)],
    }
    for name, values in expected.items():
        found = pseudo_reward(name, log_t)
        torch.testing.assert_close(found, torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "alpha", "limit"),
    [
        ("forward_kl", None, -1.0),
        ("js", None, -math.log(2)),
        ("total_variation", None, -0.5),
        ("chi2_forward", None, -1.0),
        ("alpha", 0.5, -2.0),
        ("alpha", 1.0, -1.0),
    ],
)
def test_excluded_answers_get_the_limit(name: str, alpha: float | None, limit: float) -> None:
    log_t = torch.tensor([torch.inf, 200.0], dtype=torch.float64)
    found = pseudo_reward(name, log_t, alpha=alpha)
    assert found[0].item() == pytest.approx(limit, abs=1e-12)
    assert found[1].item() == pytest.approx(limit, abs=1e-12), "as far out the limit is reached"


@every_generator
def test_pseudo_rewards_are_finite_monotone_and_without_a_jump(name: str, alpha: float | None) -> None:
    d = torch.linspace(-1e4, 1e4, 20_001)
    found = pseudo_reward(name, d, alpha=alpha)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert (found.diff() <= 0).all()
    edges = torch.tensor([-16.0, -32.0, -8.0, -4.0, 8.0], dtype=torch.float64)
    below, above = (pseudo_reward(name, edges + step, alpha=alpha) for step in (-1e-9, 1e-9))
    torch.testing.assert_close(below, above, rtol=1e-7, atol=1e-7)


def test_half_precision_is_computed_in_float32() -> None:
    found = pseudo_reward("chi2_forward", torch.tensor([-1e4, 0.5], dtype=torch.bfloat16))
    # Beyond −4 the tangent: −f' = e^8 − 1 + 2 e^8 (1e4 − 4); bfloat16 holds 1e4 as 9984.
    assert found[0].item() == pytest.approx(math.exp(8) - 1 + 2 * math.exp(8) * (9984 - 4), rel=1e-6)
    assert found[1].item() == pytest.approx(math.exp(-1) - 1, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "alpha", "target"),
    [(*key, target) for key in GENERATORS for target in ("filter", "tilt") if target == "tilt" or key[0] in FILTERABLE],
)
def test_expected_gradient_is_that_of_the_divergence(name: str, alpha: float | None, target: str) -> None:
    """Over 7 answers, everything enumerated: Σ π (−f'(t) − b) ∇log π = −∇D_f(π‖p), for any constant b."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    ref = torch.softmax(torch.randn(7, generator=generator, dtype=torch.float64), 0)
    rewards = torch.tensor([1.0, 0.0, 0.25, 1.0, 0.0, 1.0, 0.5], dtype=torch.float64)
    phi = (rewards == 1).double() if target == "filter" else (rewards / 0.7).exp()
    z = (ref * phi).sum()
    p, present = ref * phi / z, phi > 0

    logps = torch.log_softmax(logits, 0)
    # D_f = Σ p f(π/p), and f'(∞) π where p = 0.
    f = GENERATORS[name, alpha]
    divergence = (p[present] * f(logps.exp()[present] / p[present])).sum()
    if not present.all():
        far = torch.tensor(1e60, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(f(far), far)
        divergence = divergence + slope * logps.exp()[~present].sum()
    (wanted,) = torch.autograd.grad(divergence, logits, retain_graph=True)

    log_weights = log_weight(target, rewards, beta=0.7 if target == "tilt" else None)
    log_t = logps.detach() - ref.log() + z.log() - log_weights
    reward = pseudo_reward(name, log_t, alpha=alpha)
    (found,) = torch.autograd.grad((logps.exp().detach() * (reward - 3.7) * logps).sum(), logits)
    assert wanted.abs().max() > 1e-2
    torch.testing.assert_close(found, -wanted, rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------ Z and the baseline


def test_weights_of_both_targets() -> None:
    rewards = torch.tensor([1.0, 0.9999999, 0.999, 0.0, 1.1])
    assert log_weight("filter", rewards).exp().tolist() == [1, 1, 0, 0, 0]
    torch.testing.assert_close(log_weight("tilt", rewards, beta=0.5), 2 * rewards)


def test_estimate_of_z_is_unbiased() -> None:
    """All 4² = 16 groups of two answers from π, weighted by their probability: the mean is Σ π_ref φ, exactly."""
    policy = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    ref = torch.tensor([0.4, 0.1, 0.2, 0.3], dtype=torch.float64)
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    first, second = torch.cartesian_prod(torch.arange(4), torch.arange(4)).unbind(1)
    groups = torch.stack([first, second], dim=1)  # [16, 2]
    for target, beta, z in (("filter", None, 0.6), ("tilt", 2.0, 0.6 * math.exp(0.5) + 0.4)):
        estimates = log_partition(
            (policy.log() - ref.log())[groups],
            log_weight(target, rewards, beta=beta)[groups],
            torch.ones(16, 2, dtype=torch.bool),
        ).exp()
        mean = (policy[first] * policy[second] * estimates).sum()
        assert mean.item() == pytest.approx(z, rel=1e-12)
        assert estimates.std() > 0.1


def test_unscored_answers_are_left_out_of_z() -> None:
    log_ratio = torch.tensor([[0.0, 5.0, 0.0], [1.0, 1.0, 1.0]]).double()
    counted = torch.tensor([[True, False, True], [False, False, False]])
    log_weights = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]]).double()
    found = log_partition(log_ratio, log_weights, counted)
    assert found[0].exp().item() == pytest.approx(0.5)  # one of two is right, at ratio 1
    assert found[1].isnan()


def test_moving_average_by_hand() -> None:
    average = Partition(0.9)
    assert average.visit(7, math.log(0.4)) == pytest.approx(math.log(0.4)), "the first visit is its own estimate"
    assert math.exp(average.visit(7, -math.inf)) == pytest.approx(0.36 / 1.9)  # (.9 × .4 + 0)/(.9 + 1)
    assert math.exp(average.visit(7, math.log(0.2))) == pytest.approx((0.81 * 0.4 + 0.2) / 2.71)
    assert math.exp(average.visit(7, math.nan)) == pytest.approx(0.524 / 2.71), "nothing scored: nothing learned"
    assert average.visit(8, -math.inf) == -math.inf
    assert average.visit(9, math.nan) == -math.inf
    plain, newest = Partition(1.0), Partition(0.0)
    for value in (0.1, 0.2, 0.6):
        last = plain.visit(1, math.log(value)), newest.visit(1, math.log(value))
    assert [math.exp(value) for value in last] == pytest.approx([0.3, 0.6])
    assert decayed_log_sum(2000.0, 1000.0, 0.5) == pytest.approx(2000.0 + math.log(0.5)), "beyond the range of exp"


def test_averages_survive_a_file_exactly(tmp_path: Path) -> None:
    average, again = Partition(0.9), Partition(0.9)
    for prompt, value in ((-(2**63), 0.3), (5, 0.123456789), (5, 0.7), (6, -math.inf)):
        average.visit(prompt, value)
    average.save(tmp_path / "z.pt")
    again.load(tmp_path / "z.pt")
    assert again._sums == average._sums
    assert len(again._sums) == 3


def test_baseline_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 6.0], [1.0, 9.0, 3.0], [4.0, 9.0, 9.0]])
    counted = torch.tensor([[True, True, True], [True, False, True], [True, False, False]])
    # 1 − (2 + 6)/2 = −3, 2 − 3.5 = −1.5, 6 − 1.5 = 4.5; 1 − 3 and 3 − 1; a single answer has no others
    expected = torch.tensor([[-3.0, -1.5, 4.5], [-2.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(leave_one_out(values, counted), expected)


# ------------------------------------------------------------------ the trainer


def build(model: str, folder: Path, rewards: Any = length_reward, rows: Any = PROMPTS, **changes: Any) -> FDPGTrainer:
    return FDPGTrainer(
        model=model,
        reward_funcs=rewards,
        args=FDPGConfig(**arguments(folder, **changes)),
        train_dataset=dataset(rows),
    )


def annotated(trainer: FDPGTrainer, inputs: dict[str, Any], rewards: list[float], group: int) -> dict[str, Any]:
    """The batch with prompts repeated as in groups, and the advantages."""
    for key in ("prompt_ids", "prompt_mask"):
        inputs[key] = inputs[key][::group].repeat_interleave(group, dim=0)
    trainer.model.train()
    trainer.raw_rewards = torch.tensor(rewards)
    with torch.no_grad():
        extra = trainer.annotate(inputs, [{}] * len(rewards))
    trainer._extra_keys = tuple(extra)
    return {**inputs, **extra}


def test_advantages_and_loss_by_hand(tiny_model: str, tmp_path: Path) -> None:
    """Two groups of four; an unscored answer, and a group without a right one; the gradient is Σ A ∇ log π(y)/(B L)."""
    trainer = build(tiny_model, tmp_path, divergence="forward_kl")
    assert trainer.ref_model is not None
    perturb(trainer)
    trainer.current_gradient_accumulation_steps = 1
    inputs = batch(trainer, seed=5, beta=1.0, sampler=False)
    inputs["old_per_token_logps"] = inputs["old_per_token_logps"].detach()
    nan = math.nan
    inputs = annotated(trainer, inputs, [1.0, 0.0, 1.0, nan, 0.0, 0.0, 0.5, 0.0], 4)

    mask = inputs["completion_mask"]
    log_ratio = ((inputs["old_per_token_logps"] - inputs["ref_per_token_logps"]) * mask).sum(1)[:4].double()
    weight = (-log_ratio).exp()
    z = min((weight[0] + weight[2]).item() / 3, 1.0)
    rewards = torch.stack([weight[0] / z - 1, torch.tensor(-1.0).double(), weight[2] / z - 1])  # p/π − 1
    expected = torch.zeros(8)
    expected[[0, 1, 2]] = ((3 * rewards - rewards.sum()) / 2).float()
    torch.testing.assert_close(inputs["target_advantages"], expected, rtol=1e-4, atol=1e-5)
    metrics = trainer._metrics["train"]
    assert metrics["target/undefined"] == [0.5]
    assert metrics["target/z"] == [pytest.approx(z, rel=1e-4)]
    assert metrics["target/pseudo_reward"] == [pytest.approx(rewards.mean().item(), rel=1e-4)]

    del inputs["old_per_token_logps"]  # on-policy: ratio 1
    _, gradient = value_and_gradient(trainer, inputs)
    trainer.model.zero_grad()
    logps, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        torch.cat([inputs["prompt_mask"], mask], dim=1),
        mask.size(1),
    )
    (-(expected * (logps * mask).sum(1)).sum() / (8 * trainer.max_completion_length)).backward()
    wanted = torch.cat([p.grad.reshape(-1) for p in trainer.model.parameters() if p.grad is not None])
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-5)


def test_second_visit_of_a_prompt_averages_z(tiny_model: str, tmp_path: Path) -> None:
    trainer = build(tiny_model, tmp_path, divergence="js", z_momentum=0.5)
    inputs = batch(trainer, seed=5, beta=1.0, sampler=False)
    inputs["ref_per_token_logps"] = inputs["old_per_token_logps"].clone()  # ratios 1: Z is the share of right answers
    for rewards in ([1.0, 0, 0, 0] * 2, [1.0, 1, 1, 0, 0, 0, 0, 0], [math.nan] * 8):
        found = annotated(trainer, dict(inputs), rewards, 4)
    # (½ ¼ + ¾)/1.5 and (½ ¼ + 0)/1.5; the third visit has nothing to add
    assert trainer._metrics["train"]["target/z"] == [pytest.approx(0.25), pytest.approx((7 / 12 + 1 / 12) / 2)]
    assert found["target_advantages"].abs().max() == 0


def test_prompts_are_told_apart_by_tokens_and_not_by_padding(tiny_model: str, tmp_path: Path) -> None:
    from posttrain.trainers.f_dpg import _fingerprints

    ids = torch.tensor([[0, 5, 6], [9, 5, 6], [4, 5, 6]])
    mask = torch.tensor([[0, 1, 1], [0, 1, 1], [1, 1, 1]])
    one, two, three = _fingerprints(ids, mask, [{}] * 3).tolist()
    assert one == two != three
    assert _fingerprints(torch.tensor([[5, 6]]), torch.ones(1, 2), [{}]).item() == one


def is_one_of_three(completions: list[Any], **_: Any) -> list[float]:
    return [float(completion[0]["content"] in ("3", "5", "*")) for completion in completions]


@pytest.mark.parametrize(("divergence", "target"), [("forward_kl", "filter"), ("js", "filter"), ("reverse_kl", "tilt")])
def test_training_arrives_at_the_target(tiny_model: str, tmp_path: Path, divergence: str, target: str) -> None:
    """Answers of one token, so that p is known exactly: KL(p‖π) falls to a 500th, and Z is estimated to 5 %."""
    tilt = {"target_beta": 0.3} if target == "tilt" else {}
    trainer = build(
        tiny_model,
        tmp_path,
        is_one_of_three,
        PROMPTS[:1] * 2,
        divergence=divergence,
        target=target,
        **tilt,
        max_completion_length=1,
        max_steps=60,
        num_generations=64,
        per_device_train_batch_size=128,
        learning_rate=5e-3,
        logging_steps=20,
        z_momentum=1.0,
    )
    prompt = trainer._tokenizer.apply_chat_template(PROMPTS[0]["prompt"], add_generation_prompt=True, return_dict=False)
    ids = torch.tensor([prompt])

    def logps() -> Tensor:
        with torch.no_grad():
            return torch.log_softmax(trainer.model(input_ids=ids).logits[0, -1].double(), 0)

    texts = [trainer._tokenizer.decode([token], skip_special_tokens=True) for token in range(len(logps()))]
    rewards = torch.tensor(is_one_of_three([[{"content": text}] for text in texts])).double()
    assert rewards.sum() == 3
    weighted = logps() + log_weight(target, rewards, **({"beta": 0.3} if tilt else {}))
    log_z = torch.logsumexp(weighted, 0)
    p = (weighted - log_z).exp()

    def distance() -> float:
        present = p > 0
        return (p[present] * (p[present].log() - logps()[present])).sum().item()

    before = distance()
    trainer.train()
    assert before > 0.5
    assert distance() < before / 500
    mean = next(log["target/z"] for log in reversed(trainer.state.log_history) if "target/z" in log)
    assert mean == pytest.approx(log_z.exp().item(), rel=0.05)


def test_resumed_run_continues_as_the_uninterrupted_one(tiny_model: str, tmp_path: Path) -> None:
    """The second half sees the first half's averages of Z: two prompts, again and again within one epoch."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "target": "tilt", "target_beta": 1.0}
    settings |= {"divergence": "reverse_kl", "learning_rate": 5e-3, "z_momentum": 1.0}
    rows = PROMPTS[:2] * 4
    whole = build(tiny_model, tmp_path / "whole", rows=rows, **settings)
    whole.train()
    again = build(tiny_model, tmp_path / "again", rows=rows, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again.state.global_step == 4
    assert [weight for _, weight in whole.partition._sums.values()] == [4.0, 4.0], "all visits count"
    for prompt, found in again.partition._sums.items():
        assert found == pytest.approx(whole.partition._sums[prompt], rel=1e-6)
    for (name, one), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6), name

    (tmp_path / "whole" / "checkpoint-2" / FDPGTrainer._Z_FILE).unlink()
    with pytest.raises(UserError, match="has no averages of Z"):
        build(tiny_model, tmp_path / "third", rows=rows, **settings).train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")
        )


def test_raw_rewards_are_those_of_the_functions(tiny_model: str, tmp_path: Path) -> None:
    """Weighted, neither centred nor scaled; an answer that no function scores is NaN, one that some score is not."""

    def rows(completions: list[Any], **_: Any) -> list[float | None]:
        return [None if i % 4 == 3 else float(i) for i in range(len(completions))]

    def others(completions: list[Any], **_: Any) -> list[float | None]:
        return [None if i % 2 else 10.0 for i in range(len(completions))]

    trainer = build(tiny_model, tmp_path, [rows, others], reward_weights=[2.0, 0.5], max_steps=1)
    trainer.train()
    expected = torch.tensor([5.0, 2.0, 9.0, math.nan, 13.0, 10.0, 17.0, math.nan])
    torch.testing.assert_close(trainer.raw_rewards, expected, equal_nan=True)


def test_one_more_forward_on_fresh_answers_only(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {}
    for iterations in (1, 2):
        trainer = build(tiny_model, tmp_path, max_steps=2, num_iterations=iterations)
        calls: list[Any] = []
        original = trainer._get_per_token_logps_and_entropies

        def counted(model: Any, *args: Any, _calls: list[Any] = calls, _original: Any = original, **kwargs: Any) -> Any:
            _calls.append(model)
            return _original(model, *args, **kwargs)

        monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", counted)
        trainer.train()
        references = sum(model is trainer.ref_model for model in calls)
        counts[iterations] = (len(calls) - references, references)
    # Two generations: old, loss and reference each. One generation for two updates: TRL's old, two losses, a reference.
    assert counts == {1: (4, 2), 2: (3, 1)}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"divergence": "reverse_kl"}, "'reverse_kl' from a filter is infinite.*target = tilt"),
    ({"divergence": "chi2"}, "'chi2' from a filter is infinite"),
    ({"divergence": "jeffreys"}, "'jeffreys' from a filter is infinite"),
    ({"divergence": "chi2_kl"}, "'chi2_kl' from a filter is infinite"),
    ({"divergence": "alpha", "alpha": 1e-5}, "'alpha = 1e-05' from a filter is infinite"),
    ({"divergence": "alpha"}, "needs alpha"),
    ({"divergence": "total_variation", "alpha": 0.5}, "no effect on the divergence 'total_variation'"),
    ({"divergence": "forward_kl", "alpha": 0.5}, "no effect on the divergence 'forward_kl'"),
    ({"divergence": "hellinger"}, "unknown divergence 'hellinger'"),
    ({"target": "sharp"}, "unknown target 'sharp'; known: filter, tilt"),
    ({"target": "tilt"}, "needs a positive target_beta, got None"),
    ({"target": "tilt", "target_beta": 0.0}, r"needs a positive target_beta, got 0\.0"),
    ({"target_beta": 0.1}, "target_beta = 0.1 has no effect on target = filter"),
    ({"beta": 0.1}, r"beta = 0\.1 would be ignored"),
    ({"z_momentum": 1.1}, "z_momentum must lie between 0 and 1"),
    ({"loss_type": "grpo"}, "loss_type = 'grpo' is not f-DPG, because the log-probs of an answer are summed"),
    ({"loss_type": "dapo"}, "loss_type = 'dapo' is not f-DPG"),
    ({"scale_rewards": "group"}, "scale_rewards = 'group' is not f-DPG"),
    ({"mask_truncated_completions": True}, "mask_truncated_completions = True is not f-DPG"),
    ({"sync_ref_model": True}, "sync_ref_model = True is not f-DPG"),
    ({"top_p": 0.9}, r"top_p = 0\.9 is not f-DPG"),
    ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation"),
]


@pytest.mark.parametrize(("settings", "sentence"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_work_is_refused_at_construction(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        FDPGConfig(**arguments(tmp_path, **settings))


def test_what_a_filter_refuses_a_tilt_takes(tmp_path: Path) -> None:
    for name in ("reverse_kl", "chi2", "jeffreys", "chi2_kl"):
        config = FDPGConfig(**arguments(tmp_path, divergence=name, target="tilt", target_beta=0.2))
        assert config.beta == 0.2
        assert FDPGConfig(**{**arguments(tmp_path), **vars_of(config)}).beta == 0.2, "a copy is accepted"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check("alpha", "filter", 2.0)
    assert "beyond forward KL" in str(caught[0].message)


def vars_of(config: FDPGConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("divergence", "target", "target_beta", "beta", "loss_type")}


FINGERPRINTS = {
    "_save_checkpoint": "ec91bde123649111",
    "_load_optimizer_and_scheduler": "5c1772becdfd7fdb",
}


@pytest.mark.parametrize("method", FINGERPRINTS)
def test_trl_has_not_changed_under_us(method: str) -> None:
    found = hashlib.sha256(inspect.getsource(getattr(TRLTrainer, method)).encode()).hexdigest()[:16]
    assert found == FINGERPRINTS[method], f"TRL's GRPOTrainer.{method} has changed: re-read it, then record {found}."


# ------------------------------------------------------------------ two processes


def main(model: str, output: str) -> None:
    """What each process does: two visits of one group of eight answers, and the gradient of the loss on them."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rows = 8 // world
    trainer = build(
        model, Path(output).parent, divergence="js", num_generations=8, per_device_train_batch_size=rows, z_momentum=0.5
    )
    perturb(trainer)
    trainer.current_gradient_accumulation_steps = 1
    mine = slice(trainer.accelerator.process_index * rows, (trainer.accelerator.process_index + 1) * rows)
    whole = batch(trainer, seed=9, beta=1.0, sampler=False)
    local = {key: value if value.dim() == 0 else value[mine] for key, value in whole.items()}
    for key in ("prompt_ids", "prompt_mask"):
        local[key] = whole[key][:1].expand(rows, -1)
    del local["old_per_token_logps"]
    for rewards in ([1.0, 0, 0, 0, 1, 0, math.nan, 0], [0.0, 0, 0, 0, 0, 1, 1, 0]):
        inputs = annotated(trainer, dict(local), torch.tensor(rewards)[mine].tolist(), 1)
    loss, gradient = value_and_gradient(trainer, inputs)
    advantages = trainer.accelerator.gather(inputs["target_advantages"])
    sums = torch.tensor(next(iter(trainer.partition._sums.values())), dtype=torch.float64)
    tables = trainer.accelerator.gather(sums[None])
    if world > 1:
        for tensor in (loss, gradient):
            torch.distributed.all_reduce(tensor)
            tensor /= world
    if trainer.accelerator.is_main_process:
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        found = {"loss": loss, "gradient": gradient, "advantages": advantages, "tables": tables, "metrics": metrics}
        torch.save(found, output)
    if world > 1:
        torch.distributed.barrier()  # nobody leaves while another still writes
        torch.distributed.destroy_process_group()


def test_a_group_across_two_processes_is_one_group(tiny_model: str, tmp_path: Path) -> None:
    main(tiny_model, str(tmp_path / "1.pt"))
    launch(2, ["-m", "tests.test_f_dpg", tiny_model, str(tmp_path / "2.pt")])
    one, two = (torch.load(tmp_path / f"{processes}.pt", weights_only=True) for processes in (1, 2))
    assert (one["tables"].shape, two["tables"].shape) == ((1, 2), (2, 2))
    assert torch.equal(two["tables"][0], two["tables"][1]), "both processes hold the same averages"
    torch.testing.assert_close(two["tables"][:1], one["tables"], rtol=1e-5, atol=1e-6)
    assert one["advantages"].abs().max() > 0.1
    assert one["gradient"].abs().max() > 1e-3
    for name in ("loss", "gradient", "advantages"):
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
    assert set(one["metrics"]) == set(two["metrics"])
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
