"""What each of two processes does in tests/test_kdrl.py and tests/test_kdrl_distributions.py.

They annotate their halves of a batch and take one loss on it; or they train on it for a few steps, split as the
launcher's configuration says.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from posttrain.launch.spawn import leave
from posttrain.rollouts.teacher import ModelTeacher
from posttrain.seams.sharding import RequireSharding, active, fsdp_without_gpus, requested
from posttrain.trainers.kdrl import KDRLConfig, KDRLTrainer
from tests.oracle import arguments, batch, dataset, length_reward, perturb, value_and_gradient

REWARDS = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0])
"""One group: no answer of the first half is correct, two of the second are."""

CASES: dict[str, dict[str, Any]] = {
    "response": {"kd_mask": "response", "kd_paced": True, "kd_denominator": "kept"},
    "group": {"kd_form": "advantage", "kd_mask": "group"},
    "reward": {"kd_form": "reward", "kd_paced": True},
    "full": {"kd_estimator": "full", "kd_divergence": "js", "kd_mask": "response"},
    "topk": {"kd_estimator": "topk", "kd_topk": 5, "kd_paced": True, "kd_denominator": "kept"},
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


def train(model: str, teacher: ModelTeacher, folder: Path, world: int = 1) -> None:
    """Three steps of `full` on `folder`/batch.pt, half of it per process; what they logged and weights go to
    `folder`/trained."""
    settings = arguments(
        folder / "checkpoints",
        num_generations=8,
        per_device_train_batch_size=8 // world,
        max_steps=3,
        learning_rate=1e-2,
        adam_epsilon=1e-3,  # so that a gradient of nothing but rounding moves nothing
        use_cpu=not (requested() or "").startswith("fsdp"),
        kd_estimator="full",
        kd_divergence="forward_kl",
        kd_coef=5.0,
    )
    with fsdp_without_gpus():
        args = KDRLConfig(**settings)
    trainer: Any = KDRLTrainer(model, length_reward, args, dataset(), teacher=teacher, callbacks=[RequireSharding()])
    rank = trainer.accelerator.process_index
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    whole = torch.load(folder / "batch.pt", weights_only=True)
    mine = {key: value if value.dim() == 0 else value[part] for key, value in whole.items()}

    def generated(inputs: Any) -> dict[str, Any]:
        trainer.raw_rewards = REWARDS[part]
        with torch.no_grad():
            extra = trainer.annotate(mine, [{}] * len(mine["completion_ids"]))
        trainer._extra_keys = tuple(extra)
        return {**mine, **extra}

    trainer._generate_and_score_completions = generated
    trainer.train()
    trainer.save_model(str(folder / "trained"))
    if rank == 0:
        result = {
            "active": active(trainer.model, trainer.optimizer),
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        }
        (folder / "trained.json").write_text(json.dumps(result))


def main() -> None:
    """Arguments: student, teacher, output file; or a folder to train in."""
    model, teacher, output = sys.argv[1:]
    if Path(output).is_dir():
        train(model, ModelTeacher.load(teacher), Path(output), world=2)
        torch.distributed.destroy_process_group()
        return
    found = {case: measure(model, ModelTeacher.load(teacher), Path(output).parent / "runs", case) for case in CASES}
    if torch.distributed.get_rank() == 0:
        torch.save(found, output)
    torch.distributed.barrier()  # nobody leaves while another still writes
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    leave(0)
