"""What each process does in tests/test_sharding.py: two trainers, one after the other, on given rollouts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from trl import GRPOConfig

from posttrain.launch.spawn import leave
from posttrain.rollouts.fingerprint import weights_fingerprint
from posttrain.seams.on_policy import OnPolicyTrainer
from posttrain.seams.sharding import RequireSharding, active, fsdp_without_gpus, release, requested
from posttrain.trainers.dph_rl import DPHConfig, DPHTrainer
from tests.oracle import PROMPTS, arguments, dataset, length_reward

STEPS = 3

ACCUMULATION = {"grpo": 2, "dph_rl": 1}


def steps(folder: Path, model: str, store: str, world: int = 1) -> None:
    """Train GRPO and DPH-RL on `folder`/batch.pt; what they logged, what was active and weights go to `folder`."""
    whole = torch.load(folder / "batch.pt", weights_only=True)
    for name in ACCUMULATION:
        settings = arguments(
            folder / "checkpoints",
            per_device_train_batch_size=8 // world // ACCUMULATION[name],
            gradient_accumulation_steps=ACCUMULATION[name],
            max_steps=STEPS,
            learning_rate=1e-2,
            adam_epsilon=1e-3,  # so that a gradient of nothing but rounding moves nothing
            max_grad_norm=0.5,  # below the norm of most steps
            use_cpu=not (requested() or "").startswith("fsdp"),
        )
        trainer: Any
        common: dict[str, Any] = {"model": model, "reward_funcs": length_reward, "callbacks": [RequireSharding()]}
        with fsdp_without_gpus():
            if name == "grpo":
                args: GRPOConfig = GRPOConfig(**settings)
            else:
                args = DPHConfig(**settings, divergence="js", eta=5.0, replay_ratio=0.5)
        if name == "grpo":
            trainer = OnPolicyTrainer(args=args, train_dataset=dataset(PROMPTS), **common)
        else:
            trainer = DPHTrainer(args=args, train_dataset=dataset(PROMPTS), store=store, **common)
        rank = trainer.accelerator.process_index
        mine = {
            key: value if value.dim() == 0 else value[rank * 8 // world : (rank + 1) * 8 // world]
            for key, value in whole.items()
        }
        trainer._generate_and_score_completions = lambda inputs, mine=mine: dict(mine)
        trainer.train()
        result = {
            "active": active(trainer.model, trainer.optimizer),
            "optimizer": type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__,
            "processes": trainer.accelerator.num_processes,
            "held": sum(parameter.data.numel() for parameter in trainer.model.parameters()),
            "fingerprint": weights_fingerprint(trainer.model),
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        }
        trainer.save_model(str(folder / name))
        if rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(result))
        release(trainer)


def main() -> None:
    """Arguments: folder, model, store."""
    folder, model, store = sys.argv[1:]
    steps(Path(folder), model, store, world=2)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    leave(0)
