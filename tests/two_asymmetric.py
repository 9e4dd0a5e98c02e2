"""What each of two processes does in tests/test_apo.py: annotate its half of a group, and take one loss on it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from posttrain.launch.spawn import leave
from posttrain.trainers.apo import AsymmetricPOConfig, AsymmetricPOTrainer
from tests.oracle import arguments, batch, dataset, length_reward, perturb, value_and_gradient

VERDICTS = torch.tensor([0.0, 0.0, torch.nan, 0.0, 0.0, 1.0, 0.0, 1.0])
"""One group: no answer of the first half is correct, two of the second are, and one has no verdict."""

CASES: dict[str, dict[str, Any]] = {
    "paper": {"stcr_base": 1.3},
    "token": {"apo_kl_reduction": "token", "apo_stcr": False, "loss_type": "dr_grpo"},
    "release": {"stcr_base": 1.3, "stcr_guard": False, "positive_by": "advantage"},
}


def finished(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The batch with an end of sequence as the last token of each answer, so that none was cut off."""
    last = inputs["completion_mask"].sum(dim=1, keepdim=True) - 1
    return {**inputs, "completion_ids": inputs["completion_ids"].scatter(1, last, trainer.eos_token_ids[0])}


def measure(model: str, folder: Path, case: str) -> dict[str, Any]:
    """Loss, gradient, metrics and annotations of the whole batch, whatever part of it this process has."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    settings = arguments(folder, num_generations=8, beta=0.2, **CASES[case])
    settings["per_device_train_batch_size"] = 8 // world
    trainer = AsymmetricPOTrainer(
        model=model, reward_funcs=length_reward, args=AsymmetricPOConfig(**settings), train_dataset=dataset()
    )
    perturb(trainer)
    trainer.current_gradient_accumulation_steps = 1
    rank = trainer.accelerator.process_index
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    whole = finished(trainer, batch(trainer, seed=9, beta=0.2, sampler=False))
    mine = {key: value if value.dim() == 0 else value[part] for key, value in whole.items()}
    trainer.reward_columns = VERDICTS[part, None]
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
    """Arguments: model, output file."""
    model, output = sys.argv[1:]
    found = {case: measure(model, Path(output).parent / "runs", case) for case in CASES}
    if torch.distributed.get_rank() == 0:
        torch.save(found, output)
    torch.distributed.barrier()  # nobody leaves while another still writes
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    leave(0)
