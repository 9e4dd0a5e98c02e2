"""What each of two processes does in tests/test_kdrl.py: annotate its half of a batch, and take one loss on it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from posttrain.rollouts.teacher import ModelTeacher
from posttrain.trainers.kdrl import KDRLConfig, KDRLTrainer
from tests.oracle import arguments, batch, dataset, length_reward, perturb, value_and_gradient

REWARDS = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0])
"""One group: no answer of the first half is correct, two of the second are."""

CASES: dict[str, dict[str, Any]] = {
    "response": {"kd_mask": "response", "kd_paced": True, "kd_denominator": "kept"},
    "group": {"kd_form": "advantage", "kd_mask": "group"},
    "reward": {"kd_form": "reward", "kd_paced": True},
}


def measure(model: str, teacher: ModelTeacher, folder: Path, case: str) -> dict[str, Any]:
    """Loss, gradient, metrics and annotations of the whole batch, whatever part of it this process has."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    settings = arguments(folder, num_generations=8, kd_coef=0.5, **CASES[case])
    settings["per_device_train_batch_size"] = 8 // world
    trainer = KDRLTrainer(
        model=model,
        reward_funcs=length_reward,
        args=KDRLConfig(**settings),
        train_dataset=dataset(),
        teacher=teacher,
    )
    perturb(trainer)
    trainer.current_gradient_accumulation_steps = 1
    rank = trainer.accelerator.process_index
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    whole = batch(trainer, seed=9, beta=0.0, sampler=False)
    mine = {key: value if value.dim() == 0 else value[part] for key, value in whole.items()}
    trainer.raw_rewards = REWARDS[part]
    trainer.model.train()
    with torch.no_grad():
        extra = trainer.annotate(mine, [{}] * len(mine["completion_ids"]))
    trainer._extra_keys = tuple(extra)
    loss, gradient = value_and_gradient(trainer, {**mine, **extra})
    if world > 1:
        for tensor in (loss, gradient):
            torch.distributed.all_reduce(tensor)
            tensor /= world
    return {
        "loss": loss,
        "gradient": gradient,
        "metrics": {name: values[-1] for name, values in trainer._metrics["train"].items()},
        "extra": {name: trainer.accelerator.gather(value) for name, value in extra.items()},
        "world": trainer.accelerator.num_processes,
    }


def main() -> None:
    """Arguments: student, teacher, output file."""
    model, teacher, output = sys.argv[1:]
    found = {case: measure(model, ModelTeacher.load(teacher), Path(output).parent / "runs", case) for case in CASES}
    if torch.distributed.get_rank() == 0:
        torch.save(found, output)
    torch.distributed.barrier()  # nobody leaves while another still writes
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
