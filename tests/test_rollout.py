"""The seam between a trainer and a rollout engine: equality with TRL, versions, the gap, and failures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from trl import GRPOConfig
from trl import GRPOTrainer as TRLTrainer

from posttrain.errors import UserError
from posttrain.objectives.policy import SAMPLER_CORRECTIONS, sampler_correction
from posttrain.rollouts.engine import EngineError, Prompt, Sample, SamplingParams, TokenIds
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.seams.rollout import Rollouts
from posttrain.trainers.grpo import GRPOTrainer
from tests.oracle import arguments, dataset, length_reward


class Biased(TransformersEngine):
    """Reports log-probs that are off by as much as `off` says of a position, as an engine in another precision would.

    `unknown` positions get NaN, which vLLM returns where it has no log-prob.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.off: Any = lambda position: 0.0
        self.synced: list[int] = []

    def sample(self, prompts: Sequence[Prompt | TokenIds], params: SamplingParams) -> list[list[Sample]]:
        return [
            [dataclasses.replace(s, logprobs=[lp + self.off(i) for i, lp in enumerate(s.logprobs)]) for s in of_prompt]
            for of_prompt in super().sample(prompts, params)
        ]

    def sync(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.synced.append(version)
        super().sync(named_parameters, version)


class Stale(Biased):
    """Claims to have taken new weights over, and keeps the old ones: what a silent bug does."""

    def sync(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        list(named_parameters)
        self.policy_version = version


class ForTRL:
    """Our engine in the place of TRL's own vLLM, so that TRL's code sees the very same answers."""

    def __init__(self, trainer: Any, engine: Any) -> None:
        self.rollouts = Rollouts(trainer, engine)

    def sync_weights(self) -> None:
        pass  # `generate` does

    def generate(self, prompts: list[list[int]], **_: Any) -> Any:
        ids, logps = self.rollouts.generate(prompts)
        return None, ids, [[[lp] for lp in row] for row in logps], None


def ours(model: str, folder: Path, engine: Any, *, gap: float | None = 100.0, **changes: Any) -> GRPOTrainer:
    return GRPOTrainer(
        model=model,
        reward_funcs=length_reward,
        args=GRPOConfig(**arguments(folder, **changes)),
        train_dataset=dataset(),
        rollouts=engine,
        sampler_gap_limit=gap,
    )


def theirs(model: str, folder: Path, engine: Any, **changes: Any) -> TRLTrainer:
    trainer = TRLTrainer(
        model=model,
        reward_funcs=length_reward,
        args=GRPOConfig(**arguments(folder, **changes)),
        train_dataset=dataset(),
    )
    trainer.use_vllm = True
    trainer._last_loaded_step = -1
    trainer.vllm_generation = ForTRL(trainer, engine)
    return trainer


def wave(position: int) -> float:
    """Differences on both sides of every bound that the tests set."""
    return 0.4 * math.sin(3.0 * position + 1.0)


def flat(trainer: Any) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()]).clone()


@pytest.mark.parametrize("mode", SAMPLER_CORRECTIONS)
def test_training_on_an_engines_answers_equals_trl(tiny_model: str, tmp_path: Path, mode: str) -> None:
    """Whole steps with TRL's correction in each of its modes: the same weights and the same metrics come out."""
    settings = {
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_max": 1.25,
        "vllm_importance_sampling_clip_min": 0.8,
        "max_steps": 3,
        "gradient_accumulation_steps": 1 if mode.startswith("token") else 2,
    }
    results = []
    for build in (ours, theirs):
        engine = Biased.load(tiny_model, device="cpu")
        engine.off = wave
        trainer = build(tiny_model, tmp_path, engine, **settings)
        trainer.train()
        assert engine.synced == [0, 1, 2]
        results.append((flat(trainer), trainer.state.log_history))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    mine, trl = (history[0] for _, history in results)
    assert mine["sampler/gap_max"] == pytest.approx(trl["sampling/sampling_logp_difference/max"], rel=1e-4)
    if mode.startswith("token"):
        assert mine["sampler/ratio_mean"] == pytest.approx(trl["sampling/importance_sampling_ratio/mean"], rel=1e-4)

    plain = Biased.load(tiny_model, device="cpu")
    plain.off = wave
    without = ours(tiny_model, tmp_path, plain, **settings, vllm_importance_sampling_correction=False)
    without.train()
    assert (flat(without) - results[0][0]).abs().max() > 1e-5, "the correction changes nothing here"


def test_an_update_that_is_not_aligned_equals_trl(tiny_model: str, tmp_path: Path) -> None:
    """Two epochs over the answers: log π_old is no longer that of the forward pass."""
    results = []
    for build in (ours, theirs):
        engine = Biased.load(tiny_model, device="cpu")
        engine.off = wave
        trainer = build(tiny_model, tmp_path, engine, num_iterations=2, max_steps=4)
        trainer.train()
        assert engine.synced == [0, 2]
        results.append(flat(trainer))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_aligned_steps_need_one_forward_where_trl_needs_two(tiny_model: str, tmp_path: Path) -> None:
    counts = []
    for build in (ours, theirs):
        trainer = build(tiny_model, tmp_path, Biased.load(tiny_model, device="cpu"))
        original, calls = trainer._get_per_token_logps_and_entropies, []

        def counted(*args: Any, _calls: list[int] = calls, _original: Any = original, **kwargs: Any) -> Any:
            _calls.append(1)
            return _original(*args, **kwargs)

        trainer._get_per_token_logps_and_entropies = counted
        trainer.train()
        counts.append(len(calls))
    assert counts == [2, 4]


# ---------------------------------------------------------------- the correction itself


def test_the_correction_by_hand() -> None:
    """Two answers of three tokens; the second is one token long. Differences ln 2, −ln 2, ln 4; ln 3."""
    old = torch.log(torch.tensor([[0.2, 0.1, 0.4], [0.3, 0.5, 0.5]]))
    sampler = torch.log(torch.tensor([[0.1, 0.2, 0.1], [0.1, 0.1, 0.1]]))
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    inside = {"mask": mask, "clip_min": 0.75, "clip_max": 3.5}
    close = torch.testing.assert_close
    token = sampler_correction(old, sampler, mode="token_truncate", **inside)
    close(token, torch.tensor([[2.0, 0.75, 3.5], [3.0, 1.0, 1.0]]))
    token = sampler_correction(old, sampler, mode="token_mask", **inside)
    close(token, torch.tensor([[2.0, 0.0, 0.0], [3.0, 1.0, 1.0]]))
    close(sampler_correction(old, sampler, mode="sequence_truncate", **inside), torch.tensor([[3.5], [3.0]]))
    close(sampler_correction(old, sampler, mode="sequence_mask", **inside), torch.tensor([[0.0], [3.0]]))
    unbounded = {"mask": mask, "clip_min": None, "clip_max": None}
    for mode in SAMPLER_CORRECTIONS:
        found = sampler_correction(old, sampler, mode=mode, **unbounded)
        close(found[:, 0], torch.tensor([2.0, 3.0]) if "token" in mode else torch.tensor([4.0, 3.0]))
    with pytest.raises(ValueError, match="unknown sampler correction 'none'"):
        sampler_correction(old, sampler, mode="none", **unbounded)


def test_an_unknown_log_prob_is_not_corrected() -> None:
    nan = float("nan")
    old, mask = torch.tensor([[-1.0, -1.0]], requires_grad=True), torch.ones(1, 2)
    ratio = sampler_correction(old, torch.tensor([[nan, -2.0]]), mask, mode="token_mask", clip_min=None, clip_max=None)
    torch.testing.assert_close(ratio, torch.tensor([[1.0, math.e]]))
    assert not ratio.requires_grad


# ---------------------------------------------------------------- staleness


def test_the_gap_is_logged_before_any_correction(tiny_model: str, tmp_path: Path) -> None:
    engine = Biased.load(tiny_model, device="cpu")
    engine.off = lambda position: 1.5 if position == 0 else -0.25
    trainer = ours(tiny_model, tmp_path, engine, vllm_importance_sampling_clip_max=1.01)
    trainer.train()
    logged = trainer.state.log_history[0]
    lengths = logged["completions/mean_length"]
    assert logged["sampler/gap_max"] == pytest.approx(1.5, abs=1e-4)
    assert logged["sampler/gap_mean"] == pytest.approx((1.5 + 0.25 * (lengths - 1)) / lengths, rel=1e-4)
    assert pytest.approx(logged["sampler/gap_p99"], abs=1e-4) == 1.5, "one token in six at most is the 99th percentile"
    assert logged["sampler/unknown"] == 0.0
    assert logged["rollout/sync_seconds"] > 0 < logged["rollout/tokens_per_second"]


def test_exact_engines_have_no_gap(tiny_model: str, tmp_path: Path) -> None:
    trainer = ours(tiny_model, tmp_path, TransformersEngine.load(tiny_model, device="cpu"), gap=None, max_steps=3)
    trainer.train()
    for entry in trainer.state.log_history[:3]:
        assert entry["sampler/gap_max"] < 1e-5
        assert entry["sampler/ratio_mean"] == pytest.approx(1.0, abs=1e-5)


def test_log_probs_that_an_engine_does_not_know_are_counted(tiny_model: str, tmp_path: Path) -> None:
    engine = Biased.load(tiny_model, device="cpu")
    engine.off = lambda position: float("nan") if position == 0 else 0.0
    trainer = ours(tiny_model, tmp_path, engine)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["sampler/unknown"] == pytest.approx(1.0 / entry["completions/mean_length"], rel=1e-5)
    assert entry["sampler/gap_max"] < 1e-5 and math.isfinite(entry["loss"])


def test_a_stale_engine_is_found_before_the_first_update(tiny_model: str, tmp_path: Path) -> None:
    trainer = ours(tiny_model, tmp_path, Stale.load(tiny_model, device="cpu"), gap=None)
    with torch.no_grad():
        for parameter in trainer.model.parameters():  # what an earlier run has learned, after resuming
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    before = flat(trainer)
    with pytest.raises(EngineError, match=r"differ by .* nats per token .* more than sampler_gap_limit = 0.05"):
        trainer.train()
    assert torch.equal(flat(trainer), before)


def test_truncated_sampling_differs_rightly_and_is_not_checked(tiny_model: str, tmp_path: Path) -> None:
    engine = TransformersEngine.load(tiny_model, device="cpu")
    trainer = ours(tiny_model, tmp_path, engine, gap=None, top_p=0.5)
    trainer.train()
    assert trainer.state.log_history[0]["sampler/gap_p99"] > 0.05


def test_answers_of_another_version_are_an_error(tiny_model: str, tmp_path: Path) -> None:
    class Late(TransformersEngine):
        def sync(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
            super().sync(named_parameters, max(0, version - 1))

    trainer = ours(tiny_model, tmp_path, Late.load(tiny_model, device="cpu"))
    with pytest.raises(EngineError, match="answers of policy version 0, but 8 of version 1 were asked for"):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("lora", [False, True])
def test_the_engine_has_the_trainers_weights_after_three_steps(tiny_model: str, tmp_path: Path, lora: bool) -> None:
    engine = TransformersEngine.load(tiny_model, device="cpu")
    trainer = GRPOTrainer(
        model=tiny_model,
        reward_funcs=length_reward,
        args=GRPOConfig(**arguments(tmp_path, max_steps=3, learning_rate=1e-2)),
        train_dataset=dataset(),
        rollouts=engine,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    )
    trainer.train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 19, (64, 12), generator=generator)
    before = [score.logprobs for score in engine.score([(row[:4], row[4:]) for row in ids.tolist()])]
    trainer._rollouts._sync(3)
    after = [score.logprobs for score in engine.score([(row[:4], row[4:]) for row in ids.tolist()])]
    with torch.no_grad():
        logps = torch.log_softmax(trainer.model.eval()(input_ids=ids).logits, -1)[:, 3:-1]
    expected = logps.gather(2, ids[:, 4:, None])[..., 0]
    assert (torch.tensor(before) - expected).abs().max() > 1e-3, "the last update moved nothing"
    torch.testing.assert_close(torch.tensor(after), expected, rtol=0, atol=1e-5)


def test_the_same_seed_gives_the_same_run(tiny_model: str, tmp_path: Path) -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        trainer = ours(tiny_model, tmp_path, TransformersEngine.load(tiny_model, device="cpu"))
        torch.manual_seed(len(runs))  # whatever else has drawn random numbers
        trainer.train()
        runs.append(flat(trainer))
    torch.testing.assert_close(*runs, rtol=0, atol=1e-6)  # one other token, and they differ by 1e-3


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_p": 0.1}, "min_p = 0.1 is not known to a rollout engine"),
        ({"repetition_penalty": 1.2}, "repetition_penalty = 1.2 is not known"),
        ({"generation_kwargs": {"seed": 1}}, "generation_kwargs do not reach"),
        ({"use_vllm": True}, "use_vllm and rollouts name two engines"),
        ({"vllm_importance_sampling_mode": "tokens"}, "vllm_importance_sampling_mode = 'tokens' is not one of"),
    ],
)
def test_what_an_engine_would_ignore_is_refused(
    tiny_model: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    engine = TransformersEngine.load(tiny_model, device="cpu")
    with pytest.raises((UserError, ValueError), match=message):
        ours(tiny_model, tmp_path, engine, **changes)


def test_adapters_need_an_engine_and_a_model_that_have_them(tiny_model: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model": tiny_model,
        "reward_funcs": length_reward,
        "args": GRPOConfig(**arguments(tmp_path)),
        "train_dataset": dataset(),
        "rollouts": TransformersEngine.load(tiny_model, device="cpu"),
        "lora_sync": "adapter",
    }
    with pytest.raises(UserError, match="lora_sync = adapter needs a LoRA model"):
        GRPOTrainer(**settings)
    trainer = GRPOTrainer(**settings, peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match="whole weights only: set lora_sync = merge"):
        trainer.train()
