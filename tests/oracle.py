"""What trainer tests share: small runs, batches as TRL's generation leaves them, and a real store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import GRPOTrainer

from posttrain.recipe import Presample
from posttrain.rewards import Verdict, Verifier
from posttrain.rollouts.presample import presample
from posttrain.rollouts.store import Store
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.tasks import Row

ROWS = [{"prompt": [{"role": "user", "content": content}]} for content in ("357=24", "169=63", "28=9", "1=1")]


def dataset(rows: list[dict[str, Any]] | None = None) -> Dataset:
    return Dataset.from_list(rows or ROWS)


def length_reward(completions: list[Any], **_: Any) -> list[float]:
    """Something that differs between answers."""
    return [float(len(completion[0]["content"]) % 3) for completion in completions]


def arguments(output_dir: Any, **changes: Any) -> dict[str, Any]:
    """GRPOConfig arguments of a small run on a CPU."""
    return {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 2,
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


def batch(trainer: GRPOTrainer, seed: int, *, beta: float, sampler: bool, ragged: bool = True) -> dict[str, Any]:
    """A batch as TRL's generation leaves it, with random content of every kind that a loss may read."""
    generator = torch.Generator().manual_seed(seed)
    rows, prompt, width = 8, 5, 6
    vocabulary = trainer.model.config.vocab_size
    lengths = torch.randint(1, width + 1, (rows,), generator=generator) if ragged else torch.full((rows,), width)
    mask = (torch.arange(width)[None, :] < lengths[:, None]).long()
    prompt_lengths = torch.randint(2, prompt + 1, (rows,), generator=generator)
    prompt_mask = (torch.arange(prompt)[None, :] >= prompt - prompt_lengths[:, None]).long()

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(rows, width, generator=generator)

    inputs = {
        "prompt_ids": torch.randint(3, vocabulary, (rows, prompt), generator=generator) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(3, vocabulary, (rows, width), generator=generator) * mask,
        "completion_mask": mask,
        "advantages": torch.randn(rows, generator=generator),
        "num_items_in_batch": mask.sum(),
    }
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([prompt_mask, mask], dim=1),
            width,
        )
    inputs["old_per_token_logps"] = logps + noise(0.3)  # ratios on both sides of the clip
    if beta:
        inputs["ref_per_token_logps"] = logps + noise(0.5)
    if sampler:  # what the engine said, and what TRL makes of it
        difference = noise(0.3)
        inputs["sampling_per_token_logps"] = inputs["old_per_token_logps"] - difference
        inputs["importance_sampling_ratio"] = (difference * mask).exp()
    return inputs


def value_and_gradient(trainer: GRPOTrainer, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Loss and flattened gradient of one micro-batch."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = [p.grad.reshape(-1) for p in trainer.model.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(gradients).clone()


class StartsWithDigit(Verifier):
    """Accepts answers that start with a digit: a random model satisfies it about every other time."""

    name = "starts_with_digit"

    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        right = completion[:1].isdigit()
        return Verdict(float(right), "ok" if right else "wrong", completion)


PROMPTS: list[Row] = [
    {"prompt": [{"role": "user", "content": f"{a}{b}{c}={a * b}"}], "key": f"{a}{b}{c}"}
    for a, b, c in ((1, 2, 3), (2, 3, 4), (3, 4, 5), (4, 5, 6), (5, 6, 7), (6, 7, 8), (7, 8, 9), (1, 3, 5), (2, 4, 6))
]


def make_store(model: str, folder: Path, *, temperature: float = 1.0, threshold: int = 2) -> Store:
    """A real store of a real model; about half of the prompts are near-perfect in the eyes of `StartsWithDigit`."""
    return presample(
        TransformersEngine.load(model, batch_size=8),
        PROMPTS,
        StartsWithDigit(),
        Presample(samples_per_prompt=4, pef_threshold=threshold, stored_per_prompt=1, seed=1),
        max_tokens=6,
        training_temperature=temperature,
        output_dir=folder,
        batch_size=8,
    )


def perturb(trainer: GRPOTrainer, scale: float = 0.05) -> None:
    """Move the policy away from the reference, so that no gradient is zero by construction."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    trainer.state.global_step = 1  # past the check of the first step
