"""What each of two processes does in tests/test_shaping.py: one step with rewards that compare answers to a prompt.

Arguments: model, output file, answers per process, number of generations.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed
from trl import GRPOConfig

from posttrain import rewards
from posttrain.errors import UserError
from posttrain.launch.spawn import leave
from posttrain.rewards import RewardFunction
from posttrain.trainers.grpo import GRPOTrainer
from tests.oracle import PROMPTS, arguments, dataset


def main() -> None:
    """See above."""
    model, output, answers, generations = sys.argv[1:]
    size = int(generations)
    options = {"shape": "group_relative", "group_size": size, "verifier": "exact"}
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=RewardFunction(rewards.load("length", options)),
        args=GRPOConfig(
            **arguments(
                Path(output).parent, per_device_train_batch_size=int(answers), num_generations=size, max_steps=1
            )
        ),
        train_dataset=dataset([{**row, "answer": "5"} for row in PROMPTS]),
    )
    assert trainer.accelerator.num_processes == 2
    said = ""
    try:
        trainer.train()
    except UserError as error:
        said = str(error)
    everyone: list[Any] = [None, None]
    torch.distributed.all_gather_object(everyone, said)
    if trainer.accelerator.process_index == 0:
        history = [entry for entry in trainer.state.log_history if "rewards/length_group_relative/mean" in entry]
        Path(output).write_text(json.dumps({"everyone": everyone, "history": history}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    leave(0)
