"""Preference pairs, small runs on them, and what each process does in tests/test_f_dpo.py."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch.distributed
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from posttrain.launch.spawn import leave
from posttrain.seams.sharding import active, fsdp_without_gpus, release, requested
from posttrain.trainers.f_dpo import FDPOConfig, FDPOTrainer

STEPS = 3
PAIRS = 16

VARIANTS: dict[str, dict[str, Any]] = {"full": {}, "lora": {}, "precomputed": {"precompute_ref_log_probs": True}}


def pairs() -> Dataset:
    """Pairs of sums, right and wrong, in TRL's conversational format; lengths differ within a pair and between."""
    draw, rows = random.Random(5), []
    for _ in range(PAIRS):
        a, b, c = (draw.randint(1, 9) for _ in range(3))

        def said(role: str, content: str) -> list[dict[str, str]]:
            return [{"role": role, "content": content}]

        wrong = "*".join(str(draw.randint(1, 9)) for _ in range(draw.randint(1, 4)))
        prompt = f"{a}{b}{c}={a + b * c}"
        rows.append(
            {
                "prompt": said("user", prompt),
                "chosen": said("assistant", f"{a}+{b}*{c}"),
                "rejected": said("assistant", wrong),
            }
        )
    return Dataset.from_list(rows)


def arguments(output_dir: Any, **changes: Any) -> dict[str, Any]:
    """DPOConfig arguments of a small run on a CPU."""
    return {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim_args": "eps=1e-3",  # of RMSprop: so that a gradient of nothing but rounding moves nothing
        "max_steps": STEPS,
        "beta": 0.5,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "seed": 3,
        **changes,
    }


def lora() -> LoraConfig:
    """Adapters that differ from their base from the start."""
    return LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")


def steps(folder: Path, model: str, variants: list[str], world: int = 1) -> None:
    """Train each of `variants`; what was logged, what was active and weights go to `folder`."""
    for name in variants:
        settings = arguments(
            folder / name / "unused",
            per_device_train_batch_size=8 // world,
            divergence="jeffreys",
            max_grad_norm=0.5,  # below the norm of most steps
            use_cpu=not (requested() or "").startswith("fsdp"),
            **VARIANTS[name],
        )
        with fsdp_without_gpus():
            args = FDPOConfig(**settings)
        trainer = FDPOTrainer(
            model,
            args=args,
            train_dataset=pairs(),
            processing_class=AutoTokenizer.from_pretrained(model),
            peft_config=lora() if name == "lora" else None,
        )
        trainer.train()
        result = {
            "active": active(trainer.model, trainer.optimizer),
            "processes": trainer.accelerator.num_processes,
            "held": sum(parameter.data.numel() for parameter in trainer.model.parameters()),
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        }
        trainer.save_model(str(folder / name))
        if trainer.accelerator.process_index == 0:
            (folder / f"{name}.json").write_text(json.dumps(result))
        release(trainer)


def main() -> None:
    """Arguments: folder, model, variants."""
    folder, model, *variants = sys.argv[1:]
    steps(Path(folder), model, variants, world=2)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    leave(0)
