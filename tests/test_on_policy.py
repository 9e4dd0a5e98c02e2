"""The seam: GRPO's objective on it equals TRL's own trainer, and nothing that it ignores passes in silence."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import GRPOConfig
from trl import GRPOTrainer as TRLTrainer

from posttrain.seams.on_policy import OnPolicyTrainer, Tokens
from posttrain.trainers.grpo import GRPOTrainer
from tests.oracle import arguments, batch, dataset, length_reward, value_and_gradient

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")


def build(kind: type[TRLTrainer], model: str, folder: Path, **changes: Any) -> TRLTrainer:
    return kind(
        model=model,
        reward_funcs=length_reward,
        args=GRPOConfig(**arguments(folder, **changes)),
        train_dataset=dataset(),
    )


@pytest.fixture(scope="module")
def pairs(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Ours and TRL's trainer with the same weights, by the value of beta (which decides about the reference)."""
    folder = tmp_path_factory.mktemp("pairs")
    return {
        beta: (build(GRPOTrainer, tiny_model, folder, beta=beta), build(TRLTrainer, tiny_model, folder, beta=beta))
        for beta in (0.0, 0.1)
    }


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("sampler", [False, True])
def test_value_and_gradient_equal_trl(pairs: Any, loss_type: str, beta: float, sampler: bool) -> None:
    ours, theirs = pairs[beta]
    inputs = batch(ours, seed=1, beta=beta, sampler=sampler)
    results = []
    for trainer in (ours, theirs):
        trainer.loss_type = loss_type
        trainer.current_gradient_accumulation_steps = 2
        trainer.use_vllm = sampler  # what decides about the ratio in TRL's loss; no engine is asked for anything
        trainer.vllm_importance_sampling_mode = "token_truncate"  # of no bounds, in ours: TRL is given the ratio itself
        trainer.vllm_importance_sampling_clip_max = None
        results.append(value_and_gradient(trainer, inputs))
        trainer.use_vllm = False
    (our_loss, our_gradient), (their_loss, their_gradient) = results
    assert their_gradient.abs().max() > 1e-3
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "setting", [{"delta": 1.1}, {"use_bias_correction_kl": False}, {"epsilon_high": 0.4}], ids=lambda s: next(iter(s))
)
def test_options_that_we_honour_equal_trl(pairs: Any, setting: dict[str, Any]) -> None:
    ours, theirs = pairs[0.1]
    inputs = batch(ours, seed=2, beta=0.1, sampler=False)
    plain = value_and_gradient(ours, inputs)[0]
    (name, value), results = next(iter(setting.items())), []
    for trainer in (ours, theirs):
        owner = trainer if name == "epsilon_high" else trainer.args
        before = getattr(owner, name)
        setattr(owner, name, value)
        results.append(value_and_gradient(trainer, inputs))
        setattr(owner, name, before)
    assert not torch.isclose(results[0][0], plain), "the option changes nothing in this batch: the test says nothing"
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_tool_tokens_are_masked_as_in_trl(pairs: Any) -> None:
    ours, theirs = pairs[0.0]
    inputs = batch(ours, seed=3, beta=0.0, sampler=False)
    inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["tool_mask"][:, 1] = 0
    torch.testing.assert_close(
        value_and_gradient(ours, inputs), value_and_gradient(theirs, inputs), rtol=1e-5, atol=1e-6
    )


def test_shared_metrics_equal_trl(pairs: Any) -> None:
    ours, theirs = pairs[0.1]
    inputs = batch(ours, seed=4, beta=0.1, sampler=False)
    logged = []
    for trainer in (ours, theirs):
        trainer._metrics["train"].clear()
        value_and_gradient(trainer, inputs)
        logged.append({name: values[-1] for name, values in trainer._metrics["train"].items()})
        trainer._metrics["train"].clear()
    mine, trl = logged
    assert set(trl) - set(mine) == {"clip_ratio/low_min", "clip_ratio/high_max"}
    assert mine["clip_ratio/region_mean"] > 0
    for name, value in mine.items():
        assert value == pytest.approx(trl[name], rel=1e-5), name


@pytest.mark.parametrize(("accumulation", "iterations"), [(1, 1), (2, 2)])
def test_training_steps_equal_trl(tiny_model: str, tmp_path: Path, accumulation: int, iterations: int) -> None:
    """Whole optimiser steps, generation included: the same weights come out, with several micro-batches and epochs."""
    weights = []
    for kind in (GRPOTrainer, TRLTrainer):
        trainer = build(
            kind,
            tiny_model,
            tmp_path,
            gradient_accumulation_steps=accumulation,
            num_iterations=iterations,
            max_steps=3,
            beta=0.05,
        )
        before = torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()]).clone()
        trainer.train()
        after = torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])
        assert (after - before).abs().max() > 1e-4
        weights.append(after)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


def test_one_forward_per_micro_batch(tiny_model: str, tmp_path: Path) -> None:
    """No hidden second forward: a step costs one forward of the policy beside generation, as in TRL."""
    counts = {}
    for kind in (GRPOTrainer, TRLTrainer):
        trainer = build(kind, tiny_model, tmp_path)
        calls = []
        original = trainer._get_per_token_logps_and_entropies

        def counted(*args: Any, _calls: list[int] = calls, _original: Any = original, **kwargs: Any) -> Any:
            _calls.append(1)
            return _original(*args, **kwargs)

        trainer._get_per_token_logps_and_entropies = counted
        trainer.train()
        counts[kind] = len(calls)
    assert counts[GRPOTrainer] == counts[TRLTrainer] == 2


class Annotating(OnPolicyTrainer):
    """Carries the content of each prompt with its rollout, as a number."""

    def annotate(self, batch: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        assert not torch.is_grad_enabled()
        first = [int(row["prompt"][0]["content"][0]) for row in rows]
        return {"digit": torch.tensor(first)}

    def objective(self, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen.append(tokens.extra["digit"])
        return super().objective(tokens)


def test_annotations_stay_with_their_row(tiny_model: str, tmp_path: Path) -> None:
    """TRL shuffles and splits; what `annotate` adds must arrive with its own prompt."""
    trainer = build(Annotating, tiny_model, tmp_path, gradient_accumulation_steps=2, max_steps=1)
    trainer.seen = []
    pairs: list[tuple[int, int]] = []
    original = trainer._compute_loss

    def recorded(model: Any, inputs: dict[str, Any]) -> Tensor:
        loss: Tensor = original(model, inputs)
        decoded = trainer._tokenizer.batch_decode(inputs["prompt_ids"], skip_special_tokens=True)
        pairs.extend(zip([int(text[1]) for text in decoded], trainer.seen[-1].tolist(), strict=True))
        return loss

    trainer._compute_loss = recorded
    trainer.train()
    assert len(pairs) == 16
    assert len({digit for digit, _ in pairs}) > 1
    assert all(digit == annotated for digit, annotated in pairs)


def test_annotation_must_not_overwrite(tiny_model: str, tmp_path: Path) -> None:
    class Overwriting(OnPolicyTrainer):
        def annotate(self, batch: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
            return {"advantages": torch.zeros(len(rows))}

    with pytest.raises(ValueError, match="annotate returned 'advantages'"):
        build(Overwriting, tiny_model, tmp_path).train()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("loss_type", "cispo"),
        ("loss_type", "sapo"),
        ("importance_sampling_level", "sequence"),
        ("top_entropy_quantile", 0.2),
        ("entropy_coef", 0.01),
        ("use_adaptive_entropy", True),
        ("off_policy_mask_threshold", 0.5),
    ],
)
def test_ignored_options_are_refused(tiny_model: str, tmp_path: Path, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=option):
        build(GRPOTrainer, tiny_model, tmp_path, **{option: value})


FINGERPRINTS = {
    "__init__": "18f01b7a46c9544b",
    "_calculate_rewards": "736ae29b083840b5",
    "_compute_loss": "80295546bbdbf6f7",
    "_generate": "2a27fdf8f5e6f356",
    "_generate_and_score_completions": "1fa48922792dcd5c",
    "_generate_single_turn": "e0f02e4fc094cefd",
    "_get_per_token_logps_and_entropies": "ea73c3909275851d",
    "_prepare_inputs": "f824e7fb07147956",
    "compute_loss": "a2d6ef8bd29c3e26",
    "log": "1e7772819cc8cf09",
    "training_step": "9e18632f7dd8e8d8",
}


@pytest.mark.parametrize("method", FINGERPRINTS)
def test_trl_has_not_changed_under_us(method: str) -> None:
    source = inspect.getsource(getattr(TRLTrainer, method))
    found = hashlib.sha256(source.encode()).hexdigest()[:16]
    assert found == FINGERPRINTS[method], (
        f"TRL's GRPOTrainer.{method} has changed: re-read it, run the oracle tests, then record {found} here."
    )


def test_every_grpo_option_is_accounted_for() -> None:
    """New options of GRPOConfig: decide whether our loss honours them, refuses them, or never meets them."""
    known = Path(__file__).with_name("grpo_options.txt").read_text(encoding="utf-8").split()
    found = sorted(name for name in GRPOConfig.__annotations__)
    assert found == known, f"changed: {sorted(set(found) ^ set(known))}"
