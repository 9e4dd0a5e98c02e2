"""The seam with TRL's SFTTrainer: the warm start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from posttrain.rollouts.tokens import chat_ids
from posttrain.seams.callbacks import quiet


def train_supervised(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[tuple[list[dict[str, Any]], str]],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    output_dir: Path,
    label: str,
) -> float:
    """Train `model` in place on (prompt messages, answer) pairs, loss on the answers only.

    AdamW, cosine schedule with 5 % warm-up, one process.

    Args:
        label: of the progress bar.

    Returns:
        The loss of the last steps (nats per token).
    """
    rows = []
    for prompt, answer in conversations:
        prefix = chat_ids(tokenizer, prompt, add_generation_prompt=True)
        messages = [*prompt, {"role": "assistant", "content": answer}]
        whole = chat_ids(tokenizer, messages, add_generation_prompt=False)
        mask = [0] * len(prefix) + [1] * (len(whole) - len(prefix))
        rows.append({"input_ids": whole, "completion_mask": mask})
    on_gpu = model.device.type == "cuda"
    args = SFTConfig(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        weight_decay=0.0,
        logging_steps=max(1, steps // 50),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not on_gpu,
        bf16=False,
        gradient_checkpointing=False,
        completion_only_loss=True,
        max_length=None,
        seed=seed,
        dataloader_pin_memory=on_gpu,
    )
    trainer = SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    quiet(trainer, label, show=("loss", "mean_token_accuracy"))
    trainer.train()
    return next(float(log["loss"]) for log in reversed(trainer.state.log_history) if "loss" in log)
