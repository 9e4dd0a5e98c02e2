"""APO: GRPO where nothing is asymmetric, the loss by hand where something is, and correctness from the verifier alone.

The weights and factors by themselves are in tests/test_asymmetry.py.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as Picture
from peft import LoraConfig
from PIL import Image
from torch import Tensor
from trl import GRPOConfig
from trl import GRPOTrainer as TRLTrainer

from posttrain import recipe as recipes
from posttrain import rewards, tasks
from posttrain.errors import UserError
from posttrain.launch.resolve import every_run, resolve
from posttrain.rewards import RewardFunction
from posttrain.seams.on_policy import Tokens
from posttrain.trainers.apo import AsymmetricPOConfig, AsymmetricPOTrainer
from tests.oracle import StartsWithDigit, arguments, batch, dataset, length_reward, value_and_gradient
from tests.processes import launch
from tests.two_asymmetric import finished, measure

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
SYMMETRIC = {"apo_dads": False, "apo_stcr": False}
MIXED = (1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0)
"""Two groups of four, with accuracies ¼ and ½."""

QUARTER, HALF = 1 - math.exp(-math.e / 4), 1 - math.exp(-math.e / 2)


def even_reward(completions: list[Any], **_: Any) -> list[float]:
    """A format: an even number of characters."""
    return [float(len(completion[0]["content"]) % 2 == 0) for completion in completions]


def build(model: str, folder: Path, **changes: Any) -> Any:
    own = {key: changes.pop(key) for key in ("peft_config", "eval_dataset") if key in changes}
    return AsymmetricPOTrainer(
        model=model,
        reward_funcs=changes.pop("reward_funcs", length_reward),
        args=AsymmetricPOConfig(**arguments(folder, **{"beta": 0.1, **changes})),
        train_dataset=dataset(),
        **own,
    )


def trl(model: str, folder: Path, **changes: Any) -> Any:
    settings = {"beta": 0.1, "use_bias_correction_kl": False, **changes}
    return TRLTrainer(
        model=model,
        reward_funcs=length_reward,
        args=GRPOConfig(**arguments(folder, **settings)),
        train_dataset=dataset(),
    )


@pytest.fixture(scope="module")
def trainer(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """With the paper's settings, but β and c of short answers; tests that need others build their own."""
    return build(tiny_model, tmp_path_factory.mktemp("apo"), stcr_base=1.5)


def annotated(trainer: Any, inputs: dict[str, Any], verdicts: tuple[float, ...] = MIXED) -> dict[str, Any]:
    """A batch with what the trainer adds to it."""
    trainer.reward_columns = torch.tensor(verdicts)[:, None]
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trainer._metrics["train"].clear()
    extra = trainer.annotate(inputs, [{}] * len(inputs["completion_ids"]))
    trainer._extra_keys = tuple(extra)
    return {**inputs, **extra}


def answers(trainer: Any, lengths: list[int], advantages: list[float], **changes: Any) -> dict[str, Any]:
    """A batch of finished answers of these lengths, as far as `annotate` reads it."""
    width = max(lengths)
    mask = (torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]).long()
    inputs = {"completion_ids": 5 * mask, "completion_mask": mask, "advantages": torch.tensor(advantages)}
    return {**finished(trainer, inputs), **changes}


def measured(trainer: Any) -> dict[str, float]:
    """What was logged last."""
    return {name: values[-1] for name, values in trainer._metrics["train"].items() if values}


# ---------------------------------------------------------------- the limits in which it is GRPO


@pytest.mark.parametrize("sampler", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_without_asymmetry_it_is_grpo(tiny_model: str, tmp_path: Path, loss_type: str, sampler: bool) -> None:
    """w = s = 1 and the KL averaged like the policy term: TRL's GRPO with β, in value and gradient."""
    ours = build(tiny_model, tmp_path, **SYMMETRIC, apo_kl_reduction="token", loss_type=loss_type)
    inputs = annotated(ours, batch(ours, seed=1, beta=0.1, sampler=sampler))
    found = []
    for each in (ours, trl(tiny_model, tmp_path, loss_type=loss_type)):
        each.current_gradient_accumulation_steps = 2
        each.use_vllm = sampler  # what decides about the ratio in TRL's loss; no engine is asked for anything
        each.vllm_importance_sampling_mode, each.vllm_importance_sampling_clip_max = "token_truncate", None
        found.append(value_and_gradient(each, inputs))
    assert found[1][1].abs().max() > 1e-3
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_where_all_lengths_are_equal_both_reductions_are_grpo(tiny_model: str, tmp_path: Path, loss_type: str) -> None:
    """As long as the longest answer, so that even dr_grpo divides by what is there."""
    ours = build(tiny_model, tmp_path, **SYMMETRIC, loss_type=loss_type)
    inputs = annotated(ours, batch(ours, seed=2, beta=0.1, sampler=False, ragged=False))
    theirs = trl(tiny_model, tmp_path, loss_type=loss_type)
    theirs.current_gradient_accumulation_steps = 1
    expected = value_and_gradient(theirs, inputs)
    torch.testing.assert_close(value_and_gradient(ours, inputs), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("accumulation", "iterations"), [(1, 1), (2, 2)])
def test_training_steps_equal_trl(tiny_model: str, tmp_path: Path, accumulation: int, iterations: int) -> None:
    """Whole optimiser steps without asymmetry, with several micro-batches and epochs: the same weights come out."""
    settings = {"gradient_accumulation_steps": accumulation, "num_iterations": iterations, "max_steps": 3}
    found = []
    for ours in (True, False):  # built one after the other, because building one seeds its rollouts
        own = {**SYMMETRIC, "apo_kl_reduction": "token", **settings}
        each = build(tiny_model, tmp_path, **own) if ours else trl(tiny_model, tmp_path, **settings)
        before = torch.cat([p.detach().reshape(-1) for p in each.model.parameters()]).clone()
        each.train()
        found.append(torch.cat([p.detach().reshape(-1) for p in each.model.parameters()]))
        assert (found[-1] - before).abs().max() > 1e-4
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- the loss by hand


def by_hand(trainer: Any, inputs: dict[str, Any], weights: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Token mean of the clipped surrogate of s Â, and β times the mean over answers of w KL_i; value and gradient."""
    mask = inputs["completion_mask"]
    trainer.model.zero_grad()
    logps, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        torch.cat([inputs["prompt_mask"], mask], dim=1),
        mask.size(1),
    )
    ratio = (logps - inputs["old_per_token_logps"]).exp()
    scaled = (factors * inputs["advantages"])[:, None]
    policy = -torch.min(ratio * scaled, ratio.clamp(0.8, 1.2) * scaled)
    if "importance_sampling_ratio" in inputs:
        policy = policy * inputs["importance_sampling_ratio"]
    gap = inputs["ref_per_token_logps"] - logps
    kl = ((gap.exp() - gap - 1) * mask).sum(dim=1) / mask.sum(dim=1)
    loss = (policy * mask).sum() / mask.sum() + 0.1 * (weights * kl).mean()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.reshape(-1) for p in trainer.model.parameters()]).clone()


@pytest.mark.parametrize("sampler", [False, True])
def test_the_loss_by_hand(trainer: Any, sampler: bool) -> None:
    """Weights f(¾) and f(½) on the correct answers; factors 2 − 1.5^(−Δ) on wrong ones with Â < 0."""
    inputs = annotated(trainer, finished(trainer, batch(trainer, seed=1, beta=0.1, sampler=sampler)))
    lengths, advantages = inputs["completion_mask"].sum(dim=1).tolist(), inputs["advantages"].tolist()
    weights = [QUARTER, 1.0, 1.0, 1.0, HALF, HALF, 1.0, 1.0]
    factors = []
    for row, (length, advantage) in enumerate(zip(lengths, advantages, strict=True)):
        mean = lengths[0] if row < 4 else (lengths[4] + lengths[5]) / 2
        scaled = MIXED[row] == 0.0 and advantage < 0 and length > mean
        factors.append(2 - 1.5 ** -(length - mean) if scaled else 1.0)
    assert len({factor for factor in factors if factor > 1.0}) >= 2
    torch.testing.assert_close(inputs["apo_weights"], torch.tensor(weights)[:, None])
    torch.testing.assert_close(inputs["apo_factors"], torch.tensor(factors)[:, None])
    trainer.vllm_importance_sampling_mode, trainer.vllm_importance_sampling_clip_max = "token_truncate", None
    found = value_and_gradient(trainer, inputs)
    expected = by_hand(trainer, inputs, torch.tensor(weights), torch.tensor(factors))
    assert expected[1].abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    symmetric = by_hand(trainer, inputs, torch.ones(8), torch.ones(8))
    assert (symmetric[1] - expected[1]).norm() > 0.05 * expected[1].norm(), "the asymmetry must matter"


def test_each_asymmetry_can_be_taken_away(tiny_model: str, tmp_path: Path, trainer: Any) -> None:
    inputs = annotated(trainer, finished(trainer, batch(trainer, seed=1, beta=0.1, sampler=False)))
    weights, factors, ones = inputs["apo_weights"][:, 0], inputs["apo_factors"][:, 0], torch.ones(8)
    for settings, expected in (
        ({"apo_stcr": False}, (weights, ones)),
        ({"apo_dads": False, "stcr_base": 1.5}, (ones, factors)),
        (SYMMETRIC, (ones, ones)),
    ):
        other = build(tiny_model, tmp_path, **settings)
        found = value_and_gradient(other, annotated(other, inputs))
        torch.testing.assert_close(found, by_hand(other, inputs, *expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(("micro", "accumulation"), [(4, 1), (4, 2), (2, 4), (2, 2)])
def test_the_kl_is_a_mean_over_the_answers_of_a_step(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, loss_type: str, micro: int, accumulation: int
) -> None:
    """However a step is cut into micro-batches, and a rollout batch of eight answers into steps; Â = 0."""
    inputs = annotated(trainer, finished(trainer, batch(trainer, seed=4, beta=0.1, sampler=False)))
    inputs["advantages"] = torch.zeros(8)
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    monkeypatch.setattr(trainer, "current_gradient_accumulation_steps", accumulation)
    monkeypatch.setattr(trainer.args, "steps_per_generation", 8 // micro)
    for first in range(0, 8, micro * accumulation):
        gradients, losses = [], []
        for start in range(first, first + micro * accumulation, micro):
            part = {key: each[start : start + micro] if each.dim() else each for key, each in inputs.items()}
            loss, gradient = value_and_gradient(trainer, part)
            losses.append(loss)
            gradients.append(gradient)
        rows = slice(first, first + micro * accumulation)
        step = {key: each[rows] if each.dim() else each for key, each in inputs.items()}
        expected = by_hand(trainer, step, step["apo_weights"][:, 0], torch.ones(micro * accumulation))
        assert expected[0] > 1e-3
        torch.testing.assert_close((sum(losses), sum(gradients)), expected, rtol=1e-4, atol=1e-6)


def test_the_token_reduction_weights_the_same_kl(tiny_model: str, tmp_path: Path) -> None:
    """β Σ w k3 over the tokens of the batch, divided by them."""
    other = build(tiny_model, tmp_path, apo_kl_reduction="token", apo_stcr=False)
    inputs = annotated(other, batch(other, seed=5, beta=0.1, sampler=False))
    tokens = other._tokens(inputs, inputs["ref_per_token_logps"] - 0.3, torch.zeros(8, 6))
    own, _ = other.objective(tokens)
    policy, _ = other.policy_gradient(tokens)
    k3 = math.exp(0.3) - 0.3 - 1
    weights = torch.tensor([[QUARTER], [1.0], [1.0], [1.0], [HALF], [HALF], [1.0], [1.0]])
    torch.testing.assert_close(own - policy, (0.1 * k3 * weights).expand(8, 6), rtol=1e-4, atol=1e-6)
    assert other.penalty(tokens) is None


def test_without_a_kl_there_is_no_reference(tiny_model: str, tmp_path: Path) -> None:
    other = build(tiny_model, tmp_path, beta=0.0, apo_dads=False, stcr_base=1.5)
    assert other.ref_model is None
    other.train()
    assert other.state.global_step == 2
    assert "kl" not in other.state.log_history[0]


# ---------------------------------------------------------------- which answers are touched


def normalised(totals: list[float]) -> Tensor:
    """Advantages of one group as the release has them: (R − mean) / (unbiased standard deviation + 1e-9)."""
    values = torch.tensor(totals)
    return (values - values.mean()) / (values.std() + 1e-9)


@pytest.fixture(scope="module")
def eights(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Our defaults and the release's choices, on groups of eight."""
    folder = tmp_path_factory.mktemp("eights")
    settings = {"num_generations": 8, "stcr_base": 1.5}
    return {
        "ours": build(tiny_model, folder, **settings),
        "release": build(tiny_model, folder, **settings, stcr_guard=False, positive_by="advantage"),
    }


@pytest.mark.parametrize("choice", ["ours", "release"])
def test_a_wrong_but_formatted_answer(eights: dict[str, Any], choice: str) -> None:
    """R = accuracy + ½ format: 1.5 once, 0.5 four times, 0 three times; p = 1/8. The four have Â = +0.126.

    Their lengths are 5, and one 7, where the correct answer has 5; the last of the others has 6, so Δ = 2 and 1.
    """
    trainer = eights[choice]
    advantages = normalised([1.5, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0])
    assert advantages[1].item() == pytest.approx(0.126, abs=5e-4)
    inputs = answers(trainer, [5, 5, 5, 5, 7, 4, 5, 6], advantages.tolist())
    inputs = annotated(trainer, inputs, (1.0,) + (0.0,) * 7)
    weight, factor = 1 - math.exp(-math.e / 8), 2 - 1.5**-2
    assert weight == pytest.approx(0.288, abs=5e-4)
    if choice == "ours":
        weights, long_one = [weight] + [1.0] * 7, 1.0
    else:
        weights, long_one = [weight] * 5 + [1.0] * 3, factor
        assert long_one * advantages[4] > advantages[4], "its length is rewarded"
    factors = [1.0] * 4 + [long_one] + [1.0] * 2 + [2 - 1.5**-1]
    torch.testing.assert_close(inputs["apo_weights"][:, 0], torch.tensor(weights))
    torch.testing.assert_close(inputs["apo_factors"][:, 0], torch.tensor(factors))


@pytest.mark.parametrize("choice", ["ours", "release"])
def test_a_correct_but_unformatted_answer(eights: dict[str, Any], choice: str) -> None:
    """R = 1 once and 1.5 seven times: all are correct, so w = 1 whoever is positive; the one has Â = −2.475.

    In a group where one answer more is wrong, p = 7/8 and it is positive by accuracy alone.
    """
    trainer = eights[choice]
    advantages = normalised([1.0] + [1.5] * 7)
    assert advantages[0].item() == pytest.approx(-2.475, abs=5e-4)
    inputs = annotated(trainer, answers(trainer, [9] + [5] * 7, advantages.tolist()), (1.0,) * 8)
    assert inputs["apo_weights"].eq(1.0).all()
    assert inputs["apo_factors"].eq(1.0).all(), "it is long, but not wrong"
    advantages = normalised([1.0] + [1.5] * 6 + [0.0])
    inputs = annotated(trainer, answers(trainer, [5] * 8, advantages.tolist()), (1.0,) * 7 + (0.0,))
    seven = 1 - math.exp(-math.e * 7 / 8)
    expected = [1.0 if choice == "release" else seven] + [seven] * 6 + [1.0]
    assert advantages[0] < 0
    torch.testing.assert_close(inputs["apo_weights"][:, 0], torch.tensor(expected))


def test_trl_normalises_the_same_way_up_to_its_epsilon(tiny_model: str, tmp_path: Path) -> None:
    """The fixture's rewards through TRL's own code, in two columns; they arrive without their weights of ½ and 1."""
    right, formatted = [1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]

    def accuracy(completions: list[Any], **_: Any) -> list[float]:
        return [float(value) for value in right]

    def shape(completions: list[Any], **_: Any) -> list[float]:
        return [float(value) for value in formatted]

    other = build(
        tiny_model,
        tmp_path,
        num_generations=8,
        reward_funcs=[shape, accuracy],
        reward_weights=[0.5, 1.0],
        accuracy_reward="accuracy",
        max_steps=1,
    )
    seen = []
    original = other._compute_loss

    def recorded(model: Any, inputs: dict[str, Any]) -> Tensor:
        seen.append(inputs)
        loss: Tensor = original(model, inputs)
        return loss

    other._compute_loss = recorded
    other.train()
    assert other.reward_columns.tolist() == [[float(f), float(r)] for f, r in zip(formatted, right, strict=True)]
    ((inputs),) = seen
    expected = normalised([1.5, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0])
    torch.testing.assert_close(inputs["advantages"].sort()[0], expected.sort()[0], rtol=1e-3, atol=1e-4)
    positive = inputs["apo_weights"][:, 0] < 1
    assert positive.sum() == 1, "and not the four with a positive advantage"
    assert inputs["advantages"][positive].item() == pytest.approx(2.1442, abs=1e-3)


@pytest.mark.parametrize("verdict", [0.0, 1.0])
def test_where_all_answers_are_alike_nothing_is_touched(trainer: Any, verdict: float) -> None:
    inputs = answers(trainer, [1, 9, 3, 5, 2, 2, 8, 1], [-1.0] * 8)
    inputs = annotated(trainer, inputs, (verdict,) * 8)
    assert inputs["apo_weights"].eq(1.0).all()
    assert inputs["apo_factors"].eq(1.0).all()
    kind, other = ("correct", "wrong") if verdict else ("wrong", "correct")
    found = measured(trainer)
    assert found[f"apo/length_{kind}"] == pytest.approx(31 / 8)
    assert f"apo/length_{other}" not in found
    assert found["stcr/touched_fraction"] == 0.0
    assert "stcr/factor_mean" not in found
    assert found["dads/effective_beta"] == pytest.approx(0.1)


def test_an_answer_without_a_verdict_is_neither_correct_nor_wrong(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Correct, wrong, none, wrong: p = 1/3. The third is the longest and has Â < 0 or > 0, and is not touched."""
    third = 1 - math.exp(-math.e / 3)
    verdicts = (1.0, 0.0, math.nan, 0.0)
    inputs = answers(trainer, [4, 3, 20, 5] * 2, [1.0, -1.0, -1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    inputs = annotated(trainer, inputs, verdicts * 2)
    expected = torch.tensor([third, 1.0, 1.0, 1.0] * 2)[:, None]
    torch.testing.assert_close(inputs["apo_weights"], expected)
    torch.testing.assert_close(inputs["apo_factors"], torch.tensor([1.0, 1.0, 1.0, 2 - 1 / 1.5] * 2)[:, None])
    assert inputs["apo_verdicts"][:, 0].tolist() == [1.0, 0.0, -1.0, 0.0] * 2
    assert measured(trainer)["apo/length_wrong"] == 4.0
    monkeypatch.setattr(trainer.args, "positive_by", "advantage")
    torch.testing.assert_close(annotated(trainer, inputs, verdicts * 2)["apo_weights"], expected)


@pytest.mark.parametrize("touched", [True, False])
def test_answers_that_were_cut_off(tiny_model: str, tmp_path: Path, touched: bool) -> None:
    """Correct with 2 tokens, correct but cut off at 6, wrong and cut off at 6, wrong with 3: the mean is 2."""
    other = build(tiny_model, tmp_path, stcr_base=1.5, stcr_truncated=touched)
    inputs = answers(other, [2, 6, 6, 3] * 2, [1.0, 1.0, -1.0, -1.0] * 2)
    for row in (1, 2, 5, 6):
        inputs["completion_ids"][row, 5] = 5
    inputs = annotated(other, inputs, (1.0, 1.0, 0.0, 0.0) * 2)
    long_one = 2 - 1.5**-4 if touched else 1.0
    expected = torch.tensor([1.0, 1.0, long_one, 2 - 1.5**-1] * 2)[:, None]
    torch.testing.assert_close(inputs["apo_factors"], expected)
    found = measured(other)
    assert (found["apo/length_correct"], found["apo/length_wrong"]) == (4.0, 4.5)
    torch.testing.assert_close(inputs["apo_weights"][:2], torch.full((2, 1), HALF)), "cut off, and correct all the same"


def test_answers_out_of_the_loss_are_in_no_length(tiny_model: str, tmp_path: Path) -> None:
    """`mask_truncated_completions` masks every token of two, a correct and a wrong one: Δ = 3 − 2."""
    other = build(tiny_model, tmp_path, stcr_base=1.5, mask_truncated_completions=True)
    inputs = answers(other, [2, 6, 3, 6] * 2, [1.0, 1.0, -1.0, -1.0] * 2)
    inputs["completion_mask"][1::2] = 0
    inputs = annotated(other, inputs, (1.0, 1.0, 0.0, 0.0) * 2)
    torch.testing.assert_close(inputs["apo_factors"], torch.tensor([1.0, 1.0, 2 - 1 / 1.5, 1.0] * 2)[:, None])
    assert (measured(other)["apo/length_correct"], measured(other)["apo/length_wrong"]) == (2.0, 3.0)
    other.train()
    assert other.state.global_step == 2


def test_tokens_of_tools_are_no_length(trainer: Any) -> None:
    """Two of six tokens are a tool's: Δ = 1 and not 3."""
    inputs = answers(trainer, [3, 3, 3, 6] * 2, [1.0, -1.0, -1.0, -1.0] * 2)
    inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["tool_mask"][3::4, 1:3] = 0
    inputs = annotated(trainer, inputs, (1.0, 0.0, 0.0, 0.0) * 2)
    torch.testing.assert_close(inputs["apo_factors"][3::4], torch.full((2, 1), 2 - 1 / 1.5))


def test_a_threshold_of_its_own(tiny_model: str, tmp_path: Path) -> None:
    """Partial credit of 0.8 is correct from 0.8."""
    other = build(tiny_model, tmp_path, correct_threshold=0.8, apo_stcr=False)
    inputs = annotated(other, answers(other, [3] * 8, [0.0] * 8), (1.0, 0.8, 0.5, 0.0) + (0.79,) * 4)
    torch.testing.assert_close(inputs["apo_weights"][:, 0], torch.tensor([HALF, HALF] + [1.0] * 6))


# ---------------------------------------------------------------- runs, processes, metrics


def test_what_is_carried_belongs_to_its_row(tiny_model: str, tmp_path: Path) -> None:
    """Through generation, shuffling and splitting: the verdict of a row is its verifier's, and so w and s follow."""
    verifier = StartsWithDigit()
    other = build(
        tiny_model,
        tmp_path,
        reward_funcs=[even_reward, RewardFunction(verifier)],
        reward_weights=[0.5, 1.0],
        gradient_accumulation_steps=2,
        max_steps=2,
        stcr_base=1.5,
    )
    original, seen = other._compute_loss, []

    def recorded(model: Any, inputs: dict[str, Any]) -> Tensor:
        texts = other.processing_class.batch_decode(inputs["completion_ids"], skip_special_tokens=True)
        verdicts = [verdict.reward for verdict in verifier.score(texts, [{}] * len(texts))]
        assert inputs["apo_verdicts"][:, 0].tolist() == verdicts
        scaled = inputs["apo_factors"] > 1
        assert not (scaled & ((inputs["apo_verdicts"] != 0) | (inputs["advantages"][:, None] >= 0))).any()
        assert not ((inputs["apo_weights"] < 1) & (inputs["apo_verdicts"] != 1)).any()
        seen.append((bool(scaled.any()), bool((inputs["apo_weights"] < 1).any())))
        loss: Tensor = original(model, inputs)
        return loss

    other._compute_loss = recorded
    other.train()
    assert len(seen) == 4
    assert any(scaled for scaled, _ in seen)
    assert any(weighted for _, weighted in seen)
    logged = other.state.log_history[1]
    for name in ("dads/effective_beta", "stcr/touched_fraction", "apo/entropy_correct", "apo/entropy_wrong", "kl"):
        assert math.isfinite(logged[name]), name
    assert "apo/verdicts" not in logged


def test_two_processes_with_a_group_across_them_are_one(tiny_model: str, tmp_path: Path) -> None:
    """One group of eight, half of it in each process: the first half knows of the correct answers of the second."""
    output = tmp_path / "two.pt"
    launch(2, ["-m", "tests.two_asymmetric", tiny_model, str(output)])
    for case, two in torch.load(output, weights_only=True).items():
        one = measure(tiny_model, tmp_path, case)
        assert (one["world"], two["world"]) == (1, 2)
        weights, factors = one["extra"]["apo_weights"][:, 0], one["extra"]["apo_factors"][:, 0]
        assert 1 - math.exp(-math.e * 2 / 7) == pytest.approx(weights.min().item())
        if case != "token":
            assert (factors[:4] > 1).any(), "longer than the correct answers, which are in the other process"
        assert one["gradient"].abs().max() > 1e-3
        torch.testing.assert_close(two["extra"], one["extra"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(two["loss"], one["loss"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(two["gradient"], one["gradient"], rtol=1e-4, atol=1e-6)
        assert set(one["metrics"]) == set(two["metrics"])
        for name, value in one["metrics"].items():
            assert two["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-7), (case, name)


def test_metrics_by_hand(trainer: Any) -> None:
    """Groups of accuracies ¼ and ½, three correct answers; β = 0.1, c = 1.5.

    Lengths of the correct ones are 4 and 2, 6; the wrong ones have 4, 5, 6 (Δ = 0, 1, 2) and 3, 5 (Δ = −1, 1), of which
    the one with 6 has Â > 0, so that two of eight answers are scaled, by 2 − 1/1.5 both.
    """
    inputs = answers(trainer, [4, 4, 5, 6, 2, 6, 3, 5], [1.0, -1.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0])
    annotated(trainer, inputs)
    found = measured(trainer)
    assert found == pytest.approx(
        {
            "dads/weight_mean": (QUARTER + 2 * HALF) / 3,
            "dads/effective_beta": 0.1 * (QUARTER + 2 * HALF + 5) / 8,
            "stcr/factor_mean": 2 - 1 / 1.5,
            "stcr/touched_fraction": 0.25,
            "apo/length_correct": 4.0,
            "apo/length_wrong": 4.6,
        }
    )


def test_entropy_is_split_by_verdict(trainer: Any) -> None:
    """Three answers, correct, wrong and without a verdict, of 2, 1 and 2 tokens."""
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]])
    logps, entropy = torch.full((3, 2), -1.0), torch.tensor([[1.0, 2.0], [4.0, 9.0], [7.0, 7.0]])
    extra = {
        "apo_weights": torch.ones(3, 1),
        "apo_factors": torch.ones(3, 1),
        "apo_verdicts": torch.tensor([[1.0], [0.0], [-1.0]]),
        "ref_logps": logps,
    }
    tokens = Tokens(logps, logps, torch.ones(3, 1), mask, entropy, extra=extra)
    _, metrics = trainer.objective(tokens)
    trainer._metrics["train"].clear()
    trainer._measure([(name, value, mask) for name, value in {**metrics, "entropy": entropy}.items()], "train")
    found = measured(trainer)
    assert (found["apo/entropy_correct"], found["apo/entropy_wrong"]) == (1.5, 4.0)
    assert found["entropy"] == pytest.approx(21 / 5)
    assert "apo/verdicts" not in found


def test_a_lora_student_has_its_base_model_as_reference(tiny_model: str, tmp_path: Path) -> None:
    """No second model; the KL is 0 before the first update and not after it; only adapters move."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=True)
    other = build(tiny_model, tmp_path, peft_config=lora, max_steps=3, learning_rate=1e-2, beta=1.0)
    assert other.ref_model is None
    before = {name: value.clone() for name, value in other.model.named_parameters()}
    other.train()
    moved = [name for name, value in other.model.named_parameters() if not torch.equal(value, before[name])]
    assert moved
    assert all("lora_" in name for name in moved)
    kls = [log["kl"] for log in other.state.log_history if "kl" in log]
    assert kls[0] == pytest.approx(0.0, abs=1e-6)
    assert kls[2] > 1e-5


def test_evaluation_has_the_same_metrics(tiny_model: str, tmp_path: Path) -> None:
    other = build(tiny_model, tmp_path, eval_dataset=dataset(), num_generations_eval=2, per_device_eval_batch_size=4)
    found = other.evaluate()
    assert math.isfinite(found["eval_loss"])
    assert found["eval_dads/effective_beta"] == pytest.approx(0.1, rel=1.0)


# ---------------------------------------------------------------- recipes


def test_the_recipe_with_pictures_has_the_batches_of_the_release() -> None:
    """128 prompts with 8 answers per rollout, in 16 optimiser steps of 64 answers on 8 devices."""
    resolved = resolve(recipes.load("apo/qwen25_vl_3b"))
    batch, args = resolved.batch, resolved.probe
    assert (batch.world, batch.prompts, batch.generations) == (8, 8, 8)
    assert batch.world * batch.per_device * batch.steps_per_generation == 128 * 8
    assert batch.steps_per_generation == 16 * batch.accumulation
    assert (args.generation_batch_size, args.num_iterations) == (1024, 1)
    assert (args.learning_rate, args.beta, args.max_grad_norm, args.temperature) == (1e-6, 1e-3, 1.0, 1.0)
    assert not args.shuffle_dataset


def test_the_recipe_with_pictures_reads_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns as in MMK12, in a folder: a picture per question, whose gold answer scores 1.0."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pictures = [Image.new("RGB", (8, 8), (40 * number, 0, 0)) for number in range(4)]
    columns = {
        "id": ["a", "b", "c", "d"],
        "image": pictures,
        "question": ["As shown, find x."] * 4,
        "answer": [r"\frac{3}{2}", "4", r"2\sqrt{5}", "7"],
        "subject": ["math"] * 4,
    }
    features = Features({name: Value("string") for name in columns} | {"image": Picture()})
    (tmp_path / "data").mkdir()
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    recipe = recipes.load("apo/qwen25_vl_3b")
    rows = tasks.load(
        recipe.task.name, {**recipe.task.options, "name": str(tmp_path / "data"), "eval_share": 0.0}
    ).rows("train")
    assert [row["key"] for row in rows] == ["a", "b", "c", "d"], "in the order of the data"
    assert [row["images"][0].tobytes() for row in rows] == [picture.tobytes() for picture in pictures]
    assert [message["role"] for message in rows[0]["prompt"]] == ["system", "user"]
    answer = r"<think>Half of 3.</think><answer>\boxed{\frac{3}{2}}</answer>"
    scores = [rewards.load(reward.name or "").score([answer], rows[:1])[0].reward for reward in recipe.rewards]
    assert scores == [1.0, 1.0]


def test_the_baseline_of_countdown_has_the_same_kl() -> None:
    runs = {label: resolve(run).probe for label, run in every_run(recipes.load("apo/countdown")).items()}
    assert set(runs) == {"grpo", "apo"}
    for name in ("beta", "use_bias_correction_kl", "loss_type", "epsilon", "learning_rate", "max_steps"):
        assert getattr(runs["grpo"], name) == getattr(runs["apo"], name), name
    assert runs["apo"].beta > 0


# ---------------------------------------------------------------- refusals


def verifier(name: str) -> RewardFunction:
    return RewardFunction(rewards.load(name))


@pytest.mark.parametrize(
    ("functions", "wanted", "column"),
    [
        ([length_reward], None, 0),
        ([even_reward, verifier("math")], None, 1),
        ([verifier("format"), verifier("countdown"), length_reward], None, 1),
        ([verifier("math"), verifier("countdown")], "countdown", 1),
        ([length_reward, even_reward], "even_reward", 1),
        (["org/reward-model"], None, 0),
    ],
)
def test_which_reward_decides(functions: list[Any], wanted: str | None, column: int) -> None:
    args = AsymmetricPOConfig("x", accuracy_reward=wanted, use_cpu=True, bf16=False)
    assert AsymmetricPOTrainer.require_rewards(args, functions) == column


@pytest.mark.parametrize(
    ("functions", "wanted", "message"),
    [
        ([length_reward, even_reward], None, "none of the rewards length_reward, even_reward decides"),
        ([verifier("math"), verifier("countdown")], None, "more than one of the rewards math, countdown"),
        ([verifier("format")], None, "none of the rewards format decides that"),
        ([], None, r"none of the rewards \(none\)"),
        ([verifier("math")], "maths", "names no reward 'maths'; did you mean 'math'"),
        ([verifier("math"), verifier("format")], "format", "'format' shapes and does not decide"),
        ([verifier("math"), verifier("math")], "math", "2 rewards are called 'math'"),
    ],
)
def test_rewards_that_leave_it_open_are_refused(functions: list[Any], wanted: str | None, message: str) -> None:
    """Before the model is loaded: there is none of that name."""
    args = AsymmetricPOConfig("x", accuracy_reward=wanted, use_cpu=True, bf16=False)
    with pytest.raises(UserError, match=message):
        AsymmetricPOTrainer(model="no such model", reward_funcs=functions, args=args, train_dataset=dataset())


def test_the_defaults_are_the_papers() -> None:
    args = AsymmetricPOConfig("x", use_cpu=True, bf16=False)
    assert (args.beta, args.epsilon, args.learning_rate, args.num_generations) == (1e-3, 0.2, 1e-6, 8)
    assert (args.loss_type, args.scale_rewards, args.use_bias_correction_kl) == ("dapo", "group", False)
    assert args.apo_kl_reduction == "sequence"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_bias_correction_kl": True}, "use_bias_correction_kl multiplies the KL"),
        ({"beta": 0.0}, r"apo_dads has no effect without a KL \(beta = 0\)"),
        ({"beta": 0.0, "apo_dads": False, "apo_kl_reduction": "token"}, "apo_kl_reduction = 'token' has no effect"),
        ({"apo_kl_reduction": "mean"}, "unknown apo_kl_reduction 'mean'; known: sequence, token"),
        ({"positive_by": "reward"}, "unknown positive_by 'reward'; known: accuracy, advantage"),
        ({"apo_dads": False, "positive_by": "advantage"}, "positive_by = 'advantage' has no effect without apo_dads"),
        ({"apo_stcr": False, "stcr_base": 1.1}, "stcr_base = 1.1 has no effect without apo_stcr"),
        ({"apo_stcr": False, "stcr_guard": False}, "stcr_guard = False has no effect without apo_stcr"),
        ({"apo_stcr": False, "stcr_truncated": False}, "stcr_truncated = False has no effect without apo_stcr"),
        ({"mask_truncated_completions": True, "stcr_truncated": False}, "which drops those answers"),
        ({"stcr_base": 1.0}, "must be larger than 1"),
        ({"correct_threshold": math.nan}, "correct_threshold must be finite"),
    ],
)
def test_settings_without_meaning_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AsymmetricPOConfig(**arguments(tmp_path, **settings))
