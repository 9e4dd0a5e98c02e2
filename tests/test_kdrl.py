"""KDRL: GRPO where β is 0, one gradient in two forms, TRL's own in a third, and a teacher that counts where it may.

The estimators, masks and schedules by themselves are in tests/test_distillation.py, the teachers in test_teacher.py,
estimators of whole distributions in test_kdrl_distributions.py.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig
from trl import GRPOTrainer as TRLTrainer

from posttrain.errors import UserError
from posttrain.rollouts.teacher import EngineTeacher, ModelTeacher, TeacherScores
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.seams.on_policy import Tokens
from posttrain.trainers.grpo import GRPOTrainer
from posttrain.trainers.kdrl import KDRLConfig, KDRLTrainer, normalised
from tests.oracle import PROMPTS, arguments, batch, dataset, length_reward, value_and_gradient
from tests.processes import launch
from tests.teachers import Shifted, other_model
from tests.two_teachers import measure


def build(model: str, folder: Path, teacher: Any = None, **changes: Any) -> Any:
    return KDRLTrainer(
        model=model,
        reward_funcs=changes.pop("reward_funcs", length_reward),
        args=KDRLConfig(**arguments(folder, **changes)),
        train_dataset=dataset(PROMPTS),
        teacher=teacher or Shifted(other_model(model)),
    )


def annotated(trainer: Any, inputs: dict[str, Any], rewards: Sequence[float] = (0.0,) * 8) -> dict[str, Any]:
    """A batch with what the trainer adds to it."""
    trainer.raw_rewards = torch.tensor(rewards)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    extra = trainer.annotate(inputs, [{}] * len(inputs["completion_ids"]))
    trainer._extra_keys = tuple(extra)
    return {**inputs, **extra}


def on_policy(trainer: Any, seed: int) -> dict[str, Any]:
    """A batch whose π_old is π_θ."""
    inputs = batch(trainer, seed=seed, beta=0.0, sampler=False)
    del inputs["old_per_token_logps"]
    return inputs


def measured(trainer: Any) -> dict[str, float]:
    """What the last loss logged."""
    return {name: values[-1] for name, values in trainer._metrics["train"].items() if values}


# ---------------------------------------------------------------- the limits in which it is something else


@pytest.mark.parametrize("form", ["loss", "advantage"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_beta_of_zero_is_grpo(tiny_model: str, tmp_path: Path, form: str, loss_type: str) -> None:
    """After its distillation β is 0, no teacher is asked, and TRL's GRPO gives the same value and gradient."""
    ours = build(tiny_model, tmp_path, kd_form=form, distil_then_rl=3, loss_type=loss_type)
    theirs = TRLTrainer(
        model=tiny_model,
        reward_funcs=length_reward,
        args=GRPOConfig(**arguments(tmp_path, loss_type=loss_type)),
        train_dataset=dataset(),
    )
    inputs = batch(ours, seed=1, beta=0.0, sampler=False)
    theirs.current_gradient_accumulation_steps = 1
    expected = value_and_gradient(theirs, inputs)
    while_distilling = value_and_gradient(ours, annotated(ours, inputs))
    assert ours.teacher.calls == 1
    assert (while_distilling[1] - expected[1]).abs().max() > 1e-3
    ours.state.global_step = 3
    found = value_and_gradient(ours, annotated(ours, inputs))
    assert ours.teacher.calls == 1
    assert expected[1].abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_loss_and_advantage_form_have_one_gradient_on_policy(tiny_model: str, tmp_path: Path) -> None:
    gradients = []
    for form in ("loss", "advantage"):
        trainer = build(tiny_model, tmp_path, kd_form=form, kd_coef=0.3, kd_mask="response", kd_log_ratio_clamp=0.3)
        inputs = annotated(trainer, on_policy(trainer, seed=2), (0.0, 1.0) * 4)
        gradients.append(value_and_gradient(trainer, inputs)[1])
        assert 0.1 < measured(trainer)["kd/mask_fraction"] < 0.9
        assert measured(trainer)["kd/log_ratio_abs"] > 0.3, "the clamp must matter"
    assert gradients[0].abs().max() > 1e-3
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-5


def test_the_two_forms_agree_to_1e_10_in_float64(tiny_model: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    logps, teacher = (-torch.rand(4, 5, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    ones = torch.ones_like(logps)
    extra = {"teacher_logps": teacher, "teacher_mask": ones.bool(), "kd_weights": ones * 0.7}
    gradients = []
    for form in ("loss", "advantage"):
        trainer = build(tiny_model, tmp_path, kd_form=form, kd_coef=0.3)
        leaf = logps.clone().requires_grad_()
        advantages = torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None]
        per_token, _ = trainer.objective(Tokens(leaf, logps, advantages, ones, ones, extra=extra))
        (gradient,) = torch.autograd.grad(per_token.sum(), leaf)
        gradients.append(gradient)
    by_hand = -(torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None] + 0.3 * 0.7 * (teacher - logps))
    torch.testing.assert_close(gradients[0], by_hand, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients[1], by_hand, rtol=1e-10, atol=1e-12)


def test_rho_k3_is_trl_with_the_teacher_as_reference(tiny_model: str, tmp_path: Path) -> None:
    """TRL's `beta` with `use_bias_correction_kl`, on the teacher's log-probs of the same tokens: value and gradient."""
    ours = build(tiny_model, tmp_path, kd_estimator="bias_corrected_k3", kd_coef=0.1)
    theirs = TRLTrainer(
        model=tiny_model,
        reward_funcs=length_reward,
        args=GRPOConfig(**arguments(tmp_path, use_bias_correction_kl=True)),
        train_dataset=dataset(),
    )
    inputs = annotated(ours, batch(ours, seed=4, beta=0.0, sampler=False))
    without = value_and_gradient(ours, {**inputs, "kd_weights": torch.zeros_like(inputs["kd_weights"])})
    found = value_and_gradient(ours, inputs)
    theirs.beta, theirs.current_gradient_accumulation_steps = 0.1, 1
    expected = value_and_gradient(theirs, {**inputs, "ref_per_token_logps": inputs["teacher_logps"]})
    assert (found[1] - without[1]).norm() > 0.01 * found[1].norm()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)


def test_bias_corrected_k3_has_the_gradient_of_k2(tiny_model: str, tmp_path: Path) -> None:
    gradients = []
    for estimator in ("k2", "bias_corrected_k3", "k3"):
        trainer = build(tiny_model, tmp_path, kd_estimator=estimator, kd_coef=0.3)
        gradients.append(value_and_gradient(trainer, annotated(trainer, on_policy(trainer, seed=5)))[1])
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-5
    assert float((gradients[0] - gradients[2]).norm() / gradients[0].norm()) > 1e-2, "k3 has the forward KL's"


def test_distillation_alone_knows_no_advantage(tiny_model: str, tmp_path: Path) -> None:
    """Â = 0, β = 1: the loss is the token mean of ½ R², whatever the advantages are."""
    trainer = build(tiny_model, tmp_path, kd_only=True)
    inputs = annotated(trainer, on_policy(trainer, seed=6))
    loss, gradient = value_and_gradient(trainer, inputs)
    other = value_and_gradient(trainer, {**inputs, "advantages": -3 * inputs["advantages"]})
    torch.testing.assert_close(other, (loss, gradient), rtol=0, atol=0)
    mask = inputs["completion_mask"]
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], mask], dim=1),
            mask.size(1),
        )
    squares = 0.5 * (inputs["teacher_logps"] - logps).square()
    assert float(loss) == pytest.approx(float((squares * mask).sum() / mask.sum()), rel=1e-5)
    assert measured(trainer)["kd/coef"] == 1.0


def test_a_teacher_that_is_the_student_adds_nothing(tiny_model: str, tmp_path: Path) -> None:
    same: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    trainer = build(tiny_model, tmp_path, Shifted(same), kd_coef=1.0)
    inputs = annotated(trainer, on_policy(trainer, seed=7))
    grpo = {**inputs, "kd_weights": torch.zeros_like(inputs["kd_weights"])}
    (loss, gradient), (plain, expected) = (value_and_gradient(trainer, each) for each in (inputs, grpo))
    assert abs(float(loss - plain)) < 1e-10
    assert float((gradient - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert measured(trainer)["kd/log_ratio_abs"] < 1e-5


# ---------------------------------------------------------------- where the teacher counts


@pytest.mark.parametrize("form", ["loss", "advantage", "reward"])
def test_perturbing_the_teacher_changes_loss_and_gradient(tiny_model: str, tmp_path: Path, form: str) -> None:
    trainer = build(tiny_model, tmp_path, kd_form=form, kd_coef=0.1)
    inputs = batch(trainer, seed=8, beta=0.0, sampler=False)
    before = value_and_gradient(trainer, annotated(trainer, inputs))
    trainer.teacher.shift = torch.linspace(-1, 1, 8)[:, None]
    after = value_and_gradient(trainer, annotated(trainer, inputs))
    assert abs(float(after[0] - before[0])) > 1e-4
    assert (after[1] - before[1]).norm() > 1e-3 * before[1].norm()


@pytest.mark.parametrize("form", ["loss", "advantage", "reward"])
@pytest.mark.parametrize(("mask", "free"), [("response", (1, 5, 6)), ("group", (4, 5, 6, 7))])
def test_masked_rows_are_insensitive_to_the_teacher(
    tiny_model: str, tmp_path: Path, form: str, mask: str, free: tuple[int, ...]
) -> None:
    """Groups of four: `response` leaves out the correct answers 1, 5 and 6; `group` all of the group with one."""
    rewards = (0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0) if mask == "response" else (0.0,) * 5 + (1.0, 1.0, 0.0)
    trainer = build(tiny_model, tmp_path, kd_form=form, kd_coef=0.1, kd_mask=mask)
    inputs = batch(trainer, seed=9, beta=0.0, sampler=False)
    before = value_and_gradient(trainer, annotated(trainer, inputs, rewards))
    shift = torch.zeros(8, 1)
    shift[list(free)] = torch.linspace(1, 3, len(free))[:, None]
    trainer.teacher.shift = shift
    torch.testing.assert_close(value_and_gradient(trainer, annotated(trainer, inputs, rewards)), before, rtol=0, atol=0)
    trainer.teacher.shift = torch.linspace(1, 3, 8)[:, None] * (shift == 0)
    assert value_and_gradient(trainer, annotated(trainer, inputs, rewards))[0] != before[0]


def test_masks_come_from_raw_rewards_not_from_advantages(tiny_model: str, tmp_path: Path) -> None:
    """All correct and all wrong both have Â = 0; only the all-wrong group is distilled."""
    trainer = build(tiny_model, tmp_path, kd_mask="group")
    inputs = batch(trainer, seed=10, beta=0.0, sampler=False, ragged=False)
    inputs["advantages"] = torch.zeros(8)
    weights = annotated(trainer, inputs, (1.0,) * 4 + (0.0,) * 4)["kd_weights"]
    assert weights.tolist() == [[0.0] * 6] * 4 + [[1.0] * 6] * 4


def test_weights_of_pass_rates_and_their_denominator(tiny_model: str, tmp_path: Path) -> None:
    """p = ¼ and p = ½ give p(1 − p) = 3/16 and ¼; divided by what is kept, their mean over tokens is 1."""
    rewards = (1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0)
    trainer = build(tiny_model, tmp_path, kd_paced=True)
    inputs = batch(trainer, seed=11, beta=0.0, sampler=False)
    mask = inputs["completion_mask"]
    weights = annotated(trainer, inputs, rewards)["kd_weights"]
    expected = torch.tensor([[3 / 16]] * 4 + [[1 / 4]] * 4) * mask
    torch.testing.assert_close(weights, expected)
    trainer.args.kd_denominator = "kept"
    kept = annotated(trainer, inputs, rewards)["kd_weights"]
    torch.testing.assert_close(kept, expected * mask.sum() / expected.sum())


def test_the_token_that_ends_an_answer_is_left_out(tiny_model: str, tmp_path: Path) -> None:
    trainer = build(tiny_model, tmp_path, kd_mask_eos=True, kd_coef=0.1)
    inputs = batch(trainer, seed=12, beta=0.0, sampler=False, ragged=False)
    inputs["completion_ids"][:, 4] = trainer.eos_token_ids[0]
    inputs["completion_mask"][:, 5] = 0
    assert annotated(trainer, inputs)["kd_weights"].tolist() == [[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]] * 8


def test_tool_tokens_are_not_distilled(tiny_model: str, tmp_path: Path) -> None:
    trainer = build(tiny_model, tmp_path)
    inputs = batch(trainer, seed=13, beta=0.0, sampler=False, ragged=False)
    inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["tool_mask"][:, 1] = 0
    assert annotated(trainer, inputs)["kd_weights"].tolist() == [[1.0, 0.0, 1.0, 1.0, 1.0, 1.0]] * 8


def test_tokens_that_the_teacher_does_not_have_are_not_distilled(tiny_model: str, tmp_path: Path) -> None:
    """The student's embedding is padded further than the teacher's: the answer counts up to such a token."""
    student: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    words = student.config.vocab_size
    student.resize_token_embeddings(words + 8)
    student.save_pretrained(tmp_path / "padded")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "padded")
    trainer = build(str(tmp_path / "padded"), tmp_path, Shifted(other_model(tiny_model)), kd_coef=0.1)
    inputs = batch(trainer, seed=14, beta=0.0, sampler=False, ragged=False)
    for name in ("prompt_ids", "completion_ids"):
        inputs[name] = inputs[name].clamp(max=words - 1)
    inputs["completion_ids"][:, 3] = words + 2
    extended = annotated(trainer, inputs)
    assert extended["kd_weights"].tolist() == [[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]] * 8
    assert math.isfinite(value_and_gradient(trainer, extended)[0])
    trainer.train()
    assert trainer.state.global_step == 2


def test_the_engines_correction_does_not_touch_the_teachers_term(tiny_model: str, tmp_path: Path) -> None:
    trainer = build(tiny_model, tmp_path, kd_coef=0.3)
    inputs = annotated(trainer, batch(trainer, seed=15, beta=0.0, sampler=True))
    nothing = {**inputs, "kd_weights": torch.zeros_like(inputs["kd_weights"])}
    trainer.vllm_importance_sampling_mode, trainer.vllm_importance_sampling_clip_max = "token_truncate", None
    plain = {key: value for key, value in inputs.items() if key != "sampling_per_token_logps"}
    kd = [
        value_and_gradient(trainer, each)[1]
        - value_and_gradient(trainer, {**each, "kd_weights": nothing["kd_weights"]})[1]
        for each in (inputs, plain)
    ]
    assert kd[0].abs().max() > 1e-3
    torch.testing.assert_close(kd[0], kd[1], rtol=1e-4, atol=1e-6)


def test_shaped_rewards_are_normalised_as_trl_does(tiny_model: str, tmp_path: Path) -> None:
    """With a teacher that is the student mean R is 0, and the shaped advantages are TRL's own of the same rollouts."""
    for scale in ("group", "batch", "none"):
        same: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        trainer = build(
            tiny_model, tmp_path, Shifted(same), kd_form="reward", scale_rewards=scale, max_steps=1, kd_coef=1e-4
        )
        seen: list[tuple[Tensor, Tensor]] = []
        original = trainer._compute_loss

        def recorded(model: Any, inputs: dict[str, Any], _seen: Any = seen, _original: Any = original) -> Tensor:
            _seen.append((inputs["kd_advantages"], inputs["advantages"]))
            loss: Tensor = _original(model, inputs)
            return loss

        trainer._compute_loss = recorded
        trainer.train()
        ((ours, theirs),) = seen
        assert theirs.abs().max() > 0.5
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_unscorable_answers_have_no_shaped_advantage() -> None:
    rewards = torch.tensor([1.0, torch.nan, 3.0, 2.0])
    expected = [-1 / 1.0001, 0.0, 1 / 1.0001, 0.0]
    assert normalised(rewards, 4, "group").tolist() == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------- schedules


def test_annealing_hits_its_floor_at_the_right_step() -> None:
    config = KDRLConfig("x", kd_schedule="annealed", use_cpu=True, bf16=False)
    assert config.coefficient(0) == 5e-3
    assert config.coefficient(79) == pytest.approx(1.05e-3)
    assert config.coefficient(80) == pytest.approx(1e-3)
    assert config.coefficient(1000) == 1e-3


def test_the_schedule_survives_resume(tiny_model: str, tmp_path: Path) -> None:
    """β falls 0.3, 0.2, 0.1, 0.1; resumed after two steps it goes on at 0.1, and the same weights come out."""
    settings = {"kd_schedule": "annealed", "kd_coef": 0.3, "kd_coef_decay": 0.1, "kd_coef_minimum": 0.1, "max_steps": 4}
    settings |= {"save_strategy": "steps", "save_steps": 2}
    whole = build(tiny_model, tmp_path / "a", **settings)
    whole.train()
    resumed = build(tiny_model, tmp_path / "a", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for trainer in (whole, resumed):
        found = {log["step"]: log["kd/coef"] for log in trainer.state.log_history if "kd/coef" in log}
        assert found == pytest.approx({1: 0.3, 2: 0.2, 3: 0.1, 4: 0.1})
    for one, two in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_exactly_one_teacher_forward_per_rollout_batch(tiny_model: str, tmp_path: Path) -> None:
    """Three steps of two micro-batches, with distillation for two of them; the policy's forwards are GRPO's."""
    teacher = Shifted(other_model(tiny_model))
    forwards: list[int] = []
    teacher.model.register_forward_hook(lambda *_: forwards.append(1))
    teacher.batch_size = 64
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_steps": 3}
    trainer = build(tiny_model, tmp_path, teacher, distil_then_rl=2, **settings)
    plain = GRPOTrainer(
        model=tiny_model,
        reward_funcs=length_reward,
        args=GRPOConfig(**arguments(tmp_path, **settings)),
        train_dataset=dataset(),
    )
    counts = []
    for each in (trainer, plain):
        calls: list[int] = []
        original = each._get_per_token_logps_and_entropies

        def counted(*args: Any, _calls: list[int] = calls, _original: Any = original, **kwargs: Any) -> Any:
            _calls.append(1)
            return _original(*args, **kwargs)

        each._get_per_token_logps_and_entropies = counted
        each.train()
        counts.append(len(calls))
    assert (teacher.calls, len(forwards)) == (2, 2)
    assert counts[0] == counts[1] == 6


def test_the_teacher_scores_while_rewards_are_computed(tiny_model: str, tmp_path: Path) -> None:
    """The reward waits for the teacher to have begun in its own thread, and the teacher for the reward."""
    begun, rewarded = threading.Event(), threading.Event()

    class Slow(Shifted):
        def score(self, *arguments: Any, **options: Any) -> TeacherScores:
            begun.set()
            assert rewarded.wait(20)
            return super().score(*arguments, **options)

    def reward(completions: list[Any], **kwargs: Any) -> list[float]:
        assert begun.wait(20)
        rewarded.set()
        return length_reward(completions, **kwargs)

    teacher = Slow(other_model(tiny_model))
    teacher.concurrent = True
    trainer = build(tiny_model, tmp_path, teacher, reward_funcs=reward, max_steps=1)
    trainer.train()
    assert teacher.calls == 1


def test_what_is_carried_is_what_the_teacher_says_of_the_row(tiny_model: str, tmp_path: Path) -> None:
    """Through generation, padding, shuffling and splitting, at a temperature other than 1."""
    trainer = build(tiny_model, tmp_path, gradient_accumulation_steps=2, max_steps=1, temperature=0.7)
    teacher = copy.deepcopy(trainer.teacher)
    original, rows = trainer._compute_loss, []

    def recorded(model: Any, inputs: dict[str, Any]) -> Tensor:
        for row in range(len(inputs["completion_ids"])):
            prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()].tolist()
            answer = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()].tolist()
            expected = teacher.score([prompt], [answer], temperature=0.7).logps[0]
            torch.testing.assert_close(inputs["teacher_logps"][row][: len(answer)], expected, rtol=1e-4, atol=1e-5)
            rows.append(len(answer))
        loss: Tensor = original(model, inputs)
        return loss

    trainer._compute_loss = recorded
    trainer.train()
    assert len(rows) == 16


def test_a_teacher_in_an_engine_gives_the_same_loss(tiny_model: str, tmp_path: Path) -> None:
    other = other_model(tiny_model)
    other.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "teacher")
    engine = EngineTeacher(TransformersEngine.load(str(tmp_path / "teacher")), other.config.vocab_size)
    found = []
    for teacher in (Shifted(other), engine):
        trainer = build(tiny_model, tmp_path, teacher, kd_coef=0.3)
        inputs = batch(trainer, seed=16, beta=0.0, sampler=False)
        found.append(value_and_gradient(trainer, annotated(trainer, inputs)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_distillation_brings_the_student_to_the_teacher(tiny_model: str, tmp_path: Path) -> None:
    """Rewards are all 0; what falls is |R| on the student's own answers."""
    trainer = build(
        tiny_model,
        tmp_path,
        kd_only=True,
        max_steps=60,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
    )
    trainer.train()
    gaps = [log["kd/log_ratio_abs"] for log in trainer.state.log_history if "kd/log_ratio_abs" in log]
    assert len(gaps) == 60
    assert sum(gaps[-5:]) < 0.5 * sum(gaps[:5])


# ---------------------------------------------------------------- metrics, processes, refusals


def test_metrics_by_hand(tiny_model: str, tmp_path: Path) -> None:
    """R = 1, −3 and 0.5 on three tokens, Â = ±2, weights 1, 1, 0, clamp 2: ratio 0.1 · (1 + 2)/3 over 2."""
    trainer = build(tiny_model, tmp_path, kd_coef=0.1, kd_log_ratio_clamp=2.0)
    logps = torch.full((1, 3), -4.0)
    extra = {
        "teacher_logps": torch.tensor([[-3.0, -7.0, -3.5]]),
        "teacher_mask": torch.ones(1, 3, dtype=torch.bool),
        "kd_weights": torch.tensor([[1.0, 1.0, 0.0]]),
    }
    mask = torch.ones(1, 3)
    tokens = Tokens(logps, logps, torch.tensor([[-2.0]]), mask, mask, extra=extra)
    _, metrics = trainer.objective(tokens)
    trainer._measure([(name, value, mask) for name, value in metrics.items()], "train")
    found = {name: value for name, value in measured(trainer).items() if name.startswith("kd/")}
    assert found == pytest.approx(
        {
            "kd/log_ratio_mean": -0.5,
            "kd/log_ratio_abs": 1.5,
            "kd/coef": 0.1,
            "kd/mask_fraction": 2 / 3,
            "kd/advantage_ratio": 0.05,
        }
    )
    _, metrics = trainer.objective(replace(tokens, advantages=torch.zeros(1, 1)))
    trainer._metrics["train"].clear()
    trainer._measure([(name, value, mask) for name, value in metrics.items()], "train")
    assert "kd/advantage_ratio" not in trainer._metrics["train"]


def test_two_processes_with_a_group_across_them_are_one(tiny_model: str, tmp_path: Path) -> None:
    """One group of eight, half of it in each process: the first half knows of the correct answers of the second."""
    other_model(tiny_model).save_pretrained(tmp_path / "teacher")
    output = tmp_path / "two.pt"
    launch(2, ["-m", "tests.two_teachers", tiny_model, str(tmp_path / "teacher"), str(output)])
    teacher = ModelTeacher.load(str(tmp_path / "teacher"), device="cpu")
    for case, two in torch.load(output, weights_only=True).items():
        one = measure(tiny_model, teacher, tmp_path, case)
        assert (one["world"], two["world"]) == (1, 2)
        weights = one["extra"]["kd_weights"]
        if case == "group":
            assert not weights.any(), "there is a correct answer, in the other process"
        elif case == "response":
            assert weights[:6].any()
            assert not weights[6:].any()
        assert one["gradient"].abs().max() > 1e-3
        torch.testing.assert_close(two["extra"], one["extra"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(two["loss"], one["loss"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(two["gradient"], one["gradient"], rtol=1e-4, atol=1e-6)
        assert set(one["metrics"]) == set(two["metrics"])
        for name, value in one["metrics"].items():
            assert two["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-7), (case, name)


def test_a_teacher_without_effect_is_refused(tiny_model: str, tmp_path: Path) -> None:
    class Deaf(KDRLTrainer):
        def objective(self, tokens: Tokens) -> Any:
            return self.policy_gradient(tokens)

    with pytest.raises(UserError, match="The teacher has no effect"):
        Deaf(
            model=tiny_model,
            reward_funcs=length_reward,
            args=KDRLConfig(**arguments(tmp_path)),
            train_dataset=dataset(),
            teacher=Shifted(other_model(tiny_model)),
        )


def test_log_probs_that_are_not_finite_stop_the_run(tiny_model: str, tmp_path: Path) -> None:
    trainer = build(tiny_model, tmp_path)
    trainer.teacher.shift = torch.nan
    with pytest.raises(UserError, match="not finite"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kd_estimator": "k1"}, "k1 = .* cannot be a loss"),
        ({"kd_estimator": "k4"}, "unknown estimator 'k4'"),
        ({"kd_form": "sum"}, "unknown kd_form 'sum'; known: loss, advantage, reward"),
        ({"kd_mask": "token"}, "unknown kd_mask 'token'"),
        ({"kd_form": "advantage", "kd_estimator": "k3"}, "kd_estimator = 'k3' has no effect"),
        ({"kd_log_ratio_clamp": 0.0}, "kd_log_ratio_clamp must be positive"),
        ({"kd_coef": 0.0}, "kd_coef must be a positive number, got 0.0"),
        ({"kd_coef_decay": 1e-4}, "no effect on kd_schedule = fixed"),
        ({"kd_schedule": "annealed", "kd_coef": 1e-4}, "cannot anneal from 0.0001 to 0.001"),
        ({"kd_only": True, "kd_coef": 0.5}, "no effect with kd_only"),
        ({"kd_only": True, "kd_form": "reward"}, "kd_only sets to 0"),
        ({"kd_only": True, "distil_then_rl": 5}, "both say how long"),
        ({"distil_then_rl": 0}, "positive number of steps"),
        ({"distil_then_rl": 5, "kd_schedule": "annealed"}, "no effect with distil_then_rl"),
        ({"kd_paced_a": 2.0}, "no effect without kd_paced"),
        ({"kd_paced": True, "kd_paced_b": -1.0}, "must be at least 0"),
        ({"kd_paced": True, "kd_mask": "group"}, "nothing would be distilled"),
        ({"kd_correct_threshold": 0.5}, "kd_correct_threshold = 0.5 has no effect"),
        ({"kd_denominator": "kept"}, "kd_denominator = 'kept' has no effect"),
        ({"kd_denominator": "kept", "kd_mask": "group", "kd_form": "reward"}, "no effect on rewards"),
        ({"beta": 0.1}, "would add a KL to the initial policy"),
        ({"kd_form": "reward", "multi_objective_aggregation": "normalize_then_sum"}, "normalises each before"),
    ],
)
def test_settings_without_meaning_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KDRLConfig(**arguments(tmp_path, **settings))
