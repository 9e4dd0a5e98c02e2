"""GRPO on our seam learns; that it equals TRL's own trainer is tests/test_on_policy.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain import registry
from posttrain.trainers.grpo import GRPOTrainer
from tests.oracle import arguments, dataset


def starts_with_five(completions: list[Any], **_: Any) -> list[float]:
    return [float(completion[0]["content"][:1] == "5") for completion in completions]


def test_reward_rises(tiny_model: str, tmp_path: Path) -> None:
    """A random model starts with 5 once in 19 times; after 120 steps it does so most of the time."""
    module = registry.load("method", "grpo")
    config = module.Config(**arguments(tmp_path, max_steps=120, per_device_train_batch_size=64, num_generations=16))
    trainer = module.Trainer(model=tiny_model, reward_funcs=starts_with_five, args=config, train_dataset=dataset())
    assert isinstance(trainer, GRPOTrainer)
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert sum(rewards[:5]) / 5 < 0.2
    assert sum(rewards[-5:]) / 5 > 0.6
