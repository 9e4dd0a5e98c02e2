"""What each of two processes does in tests/test_distributed.py: one loss on its half of a batch, gradients averaged."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed

from posttrain.launch.spawn import leave
from posttrain.trainers.dph_rl import DPHConfig, DPHTrainer
from tests.oracle import PROMPTS, arguments, batch, dataset, length_reward, perturb, value_and_gradient


def main() -> None:
    """Arguments: model, store, output file, loss type."""
    model, store, output, loss_type = sys.argv[1:]
    world = int(os.environ.get("WORLD_SIZE", "1"))
    settings = arguments(Path(output).parent, divergence="js", eta=0.7, replay_ratio=0.5, loss_type=loss_type)
    settings["per_device_train_batch_size"] = 8 // world
    trainer = DPHTrainer(
        model=model,
        reward_funcs=length_reward,
        args=DPHConfig(**settings),
        train_dataset=dataset(PROMPTS),
        store=store,
    )
    perturb(trainer)
    trainer.current_gradient_accumulation_steps = 1
    rank = trainer.accelerator.process_index
    whole = batch(trainer, seed=9, beta=0.0, sampler=False)
    mine = {
        key: value if value.dim() == 0 else value[rank * 8 // world : (rank + 1) * 8 // world]
        for key, value in whole.items()
    }
    loss, gradient = value_and_gradient(trainer, mine)
    if world > 1:
        for tensor in (loss, gradient):
            torch.distributed.all_reduce(tensor)
            tensor /= world
    if rank == 0:
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        world = trainer.accelerator.num_processes
        torch.save({"loss": loss, "gradient": gradient, "metrics": metrics, "world": world}, output)
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    leave(0)
