"""What each of two processes does in tests/test_distributed.py: train on an engine's answers, or watch one engine fail.

Arguments: model, output file, `agree` or `fail`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from trl import GRPOConfig

from posttrain.launch.spawn import leave
from posttrain.rollouts.engine import EngineError, Sample, SamplingParams
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.trainers.grpo import GRPOTrainer
from tests.oracle import arguments, dataset, length_reward


class Offset(TransformersEngine):
    """Log-probs off by a tenth of a nat in the first process and three tenths in the second."""

    rank = 0

    def sample(self, prompts: Sequence[Any], params: SamplingParams) -> list[list[Sample]]:
        drawn = super().sample(prompts, params)
        for group in drawn:
            for sample in group:
                sample.logprobs[:] = [lp - 0.1 - 0.2 * self.rank for lp in sample.logprobs]
        return drawn


class Dying(TransformersEngine):
    """Dies in the second process at the second step."""

    rank = 0

    def sample(self, prompts: Sequence[Any], params: SamplingParams) -> list[list[Sample]]:
        if self.rank == 1 and self.policy_version == 1:
            raise EngineError("out of breath")
        return super().sample(prompts, params)


def main() -> None:
    """See above."""
    model, output, what = sys.argv[1:]
    engine = (Offset if what == "agree" else Dying).load(model, device="cpu")
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=length_reward,
        args=GRPOConfig(**arguments(Path(output).parent, per_device_train_batch_size=4, max_steps=3)),
        train_dataset=dataset(),
        rollouts=engine,
        sampler_gap_limit=1.0,
    )
    engine.rank = trainer.accelerator.process_index
    assert trainer.accelerator.num_processes == 2
    said = ""
    try:
        trainer.train()
    except EngineError as error:
        said = str(error)
    everyone: list[Any] = [None, None]
    weights = torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])
    torch.distributed.all_gather_object(everyone, (said, trainer.state.global_step, weights))
    if engine.rank == 0:
        torch.save({"everyone": everyone, "history": trainer.state.log_history}, output)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    leave(0)
