"""The seam with TRL's SFTTrainer: the trainer on which fine-tuning stands, and the warm start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin
from trl import SFTConfig, SFTTrainer

from posttrain.rollouts.tokens import (
    ProcessingClass,
    Rendered,
    batched,
    chat_ids,
    continuation_ids,
    render,
    tokenizer_of,
)
from posttrain.seams.callbacks import quiet
from posttrain.seams.checkpoints import RenamedCheckpoints
from posttrain.seams.sharding import RequireSharding

__all__ = ["SFTConfig", "SupervisedTrainer", "train_supervised"]


class SupervisedTrainer(RenamedCheckpoints, SFTTrainer):
    """SFTTrainer that refuses to train a model which is not split as it was asked for.

    Args:
        model, args, train_dataset, …: as `trl.SFTTrainer`. Of the columns input_ids and completion_mask, both lists of
            numbers, tokens are taken as they are, and with `completion_only_loss` those under a 0 carry no loss.
    """

    _tag_names = ["trl", "posttrain"]  # noqa: RUF012 - as TRL declares it
    _name = "posttrain"

    def __init__(self, model: Any, args: SFTConfig | None = None, **kwargs: Any) -> None:
        super().__init__(model, args=args, **kwargs)
        if not any(isinstance(callback, RequireSharding) for callback in self.callback_handler.callbacks):
            self.add_callback(RequireSharding())


class _WithImages:
    """Collates rows as another collator does, and adds the fields of their images.

    A row names the prompt whose fields are its own by number, so that an image is processed once, however often its
    prompt is demonstrated.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]], prompts: Sequence[Rendered]) -> None:
        self.collate, self.prompts = collate, prompts

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        fields = [self.prompts[row.pop("prompt_number")].fields for row in rows]
        batch = self.collate(rows)
        return {**batch, **batched(fields, batch["input_ids"].size(1))}


def train_supervised(
    model: PreTrainedModel,
    processing_class: ProcessingClass,
    conversations: Sequence[tuple[list[dict[str, Any]], str]],
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
        processing_class: of the model; a processor where prompts hold images.
        conversations: a prompt that occurs more than once is best the same object, which is rendered once.
        label: of the progress bar.

    Returns:
        The loss of the last steps (nats per token).
    """
    rows, prompts = _tokenized(processing_class, conversations)
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
        remove_unused_columns=not prompts,
    )
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer_of(processing_class)
    )
    if prompts:
        trainer.data_collator = _WithImages(trainer.data_collator, prompts)
    quiet(trainer, label, show=("loss", "mean_token_accuracy"))
    trainer.train()
    return next(float(log["loss"]) for log in reversed(trainer.state.log_history) if "loss" in log)


def _tokenized(
    processing_class: ProcessingClass, conversations: Sequence[tuple[list[dict[str, Any]], str]]
) -> tuple[list[dict[str, Any]], list[Rendered]]:
    """Rows for SFTTrainer, and the rendered prompts that their `prompt_number` counts; none where none holds images."""
    rows: list[dict[str, Any]] = []
    if not isinstance(processing_class, ProcessorMixin):
        for prompt, answer in conversations:
            prefix = chat_ids(processing_class, prompt, add_generation_prompt=True)
            messages = [*prompt, {"role": "assistant", "content": answer}]
            whole = chat_ids(processing_class, messages, add_generation_prompt=False)
            mask = [0] * len(prefix) + [1] * (len(whole) - len(prefix))
            rows.append({"input_ids": whole, "completion_mask": mask})
        return rows, []
    numbers: dict[int, int] = {}
    prompts: list[Rendered] = []
    for prompt, answer in conversations:
        if id(prompt) not in numbers:
            numbers[id(prompt)] = len(prompts)
            prompts.append(render(processing_class, prompt))
        number = numbers[id(prompt)]
        prefix = prompts[number].ids
        tail = continuation_ids(processing_class, prompt, answer)
        mask = [0] * len(prefix) + [1] * len(tail)
        rows.append({"input_ids": [*prefix, *tail], "completion_mask": mask, "prompt_number": number})
    return rows, prompts
