"""SFT on verified answers: fine-tuning on what a teacher, or the policy itself, answered correctly.

    L = −Σ log π_θ(y_t | x, y_<t) / Σ |y|,     sums over the answers y of a batch and their tokens, in nats per token

Whose answers: `answers_of: teacher` is sequence-level distillation, the SFT baseline beside which KDRL and RLAD are
judged; `answers_of: policy` is rejection-sampling fine-tuning on the initial policy's own.

Answers are drawn before training as the section `presample` says, `samples_per_prompt` for every training prompt, and
judged by the task's verifier. Kept are correct ones that ended by themselves, each once per prompt unless `repeated`
ones are kept, at most `per_prompt` of them (`posttrain.rollouts.answers`). They are trained on as the token ids that
were drawn, the end of sequence included; prompts carry no loss. A batch counts answers, not prompts.

Compared at equal rollouts: N steps of a method with P prompts of G generations each draw N·P·G answers, so
`presample.samples_per_prompt` = N·P·G / (number of training prompts).

Metrics: TRL's, among them `loss` (as above), `mean_token_accuracy` (fraction of answer tokens that are the likeliest)
and `entropy` (nats, mean over answer tokens).
Source: the baseline of KDRL, arXiv 2506.02208; sequence-level distillation, arXiv 1606.07947; rejection-sampling
fine-tuning, arXiv 2308.01825. Differs: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.seams.supervised import SFTConfig, SupervisedTrainer

SOURCES = ("teacher", "policy")
"""Whose answers there are to learn from."""

REPEATED = ("drop", "keep")
"""What becomes of answers that consist of the same tokens."""

_GIVEN = {
    "completion_only_loss": (True, "prompts carry no loss"),
    "assistant_only_loss": (False, "the answer is all that the assistant says"),
    "eos_token": (None, "answers end as they were drawn"),
    "chat_template_path": (None, "prompts are those that were answered"),
    "dataset_text_field": ("text", "answers are token ids"),
}
"""Options of TRL that contradict the data or would do nothing to it."""


@dataclass
class VerifiedSFTConfig(SFTConfig):
    """Settings of SFT on verified answers; where it says nothing else, TRL's defaults.

    Raises:
        ValueError: a setting is unknown, out of range, or would have no effect.
    """

    answers_of: str = field(
        default="teacher",
        metadata={"help": "Whose answers: teacher (distillation) or policy (rejection-sampling fine-tuning)."},
    )
    repeated: str = field(
        default="drop",
        metadata={
            "help": "Answers to one prompt of equal tokens: drop (one stands for all) or keep (in the proportions in "
            "which they were drawn)."
        },
    )
    per_prompt: int | None = field(
        default=None,
        metadata={"help": "At most so many answers of one prompt, drawn at random by the seed; default all of them."},
    )
    completion_only_loss: bool | None = field(default=True, metadata={"help": "Prompts carry no loss."})
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest prompt and answer together, in tokens: longer ones are left out, for an answer that is "
            "cut has no end to learn. Default any; packing fills sequences of this length."
        },
    )

    def __post_init__(self) -> None:
        if self.answers_of not in SOURCES:
            raise ValueError(f"unknown answers_of '{self.answers_of}'; known: {', '.join(SOURCES)}.")
        if self.repeated not in REPEATED:
            raise ValueError(f"unknown repeated '{self.repeated}'; known: {', '.join(REPEATED)}.")
        for name in ("per_prompt", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        for name, (wanted, reason) in _GIVEN.items():
            value = getattr(self, name)
            if value != wanted:
                raise ValueError(f"{name} = {value!r}, but {reason}: leave it at {wanted!r}.")
        if self.packing and self.packing_strategy == "wrapped":
            raise ValueError("packing_strategy = 'wrapped' parts answers from their prompts: choose 'bfd'.")
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.loss_type not in ("nll", "dft"):
            raise ValueError(f"unknown loss_type '{self.loss_type}'; known: nll, dft (arXiv 2508.05629).")


class VerifiedSFTTrainer(SupervisedTrainer):
    """Fine-tuning on verified answers.

    Args:
        model, train_dataset, eval_dataset, processing_class, peft_config, …: as `trl.SFTTrainer`; the data are those of
            `posttrain.rollouts.answers.from_store`, or in TRL's prompt-completion format.
        args: a `VerifiedSFTConfig`.
    """

    _name = "SFT"

    def __init__(self, model: Any, args: VerifiedSFTConfig | None = None, **kwargs: Any) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = VerifiedSFTConfig(f"{Path(name).name}-SFT")
        super().__init__(model, args=args, **kwargs)


Config = VerifiedSFTConfig
Trainer = VerifiedSFTTrainer
