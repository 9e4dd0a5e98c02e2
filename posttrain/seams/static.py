"""The seam for fixed rollouts: `OnPolicyTrainer` without sampling, whose batches are rows of a data set.

A row holds the tokens of a prompt and of an answer, its advantage and reward, and log π_0 of its tokens, π_0 the policy
that drew them. That is what log π_old is in every step of every epoch, so ratios are anchored to π_0 and no reference
model is in memory. There is one forward per micro-batch, no reward function and no generation.

An epoch passes over the data in an order that is a function of (seed, epoch) alone, cut to whole optimiser steps: the
rest of it, other answers each time, is left out. A step consists of the same answers for any number of processes that
share it, and so does a run that was resumed.

Metrics: `entropy` and those of the objective, means over the tokens of an optimiser step in all processes, before its
update; a value of NaN is in no mean. `stop/<target>`: the value at which a target stopped the run; absent otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import pyarrow.compute
import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import IntervalStrategy, TrainerCallback

from posttrain.errors import UserError
from posttrain.seams.on_policy import GRPOConfig, OnPolicyTrainer, Tokens

__all__ = ["EpochOrder", "StaticConfig", "StaticTrainer"]

COLUMNS = ("prompt_ids", "completion_ids", "rewards", "advantages", "old_logps", "temperature")
"""What a row must have; `posttrain.rollouts.static` makes it."""

PER_TOKEN = ("old_logps", "signals")
"""Columns with a number for every answer token."""

_NO_ROLLOUTS = (
    "num_generations_eval",
    "generation_batch_size",
    "num_iterations",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "generation_kwargs",
    "chat_template_kwargs",
    "cache_implementation",
    "use_vllm",
    "vllm_importance_sampling_correction",
    "use_transformers_continuous_batching",
    "scale_rewards",
    "multi_objective_aggregation",
    "mask_truncated_completions",
    "max_tool_calling_iterations",
    "sync_ref_model",
    "log_completions",
    "use_bias_correction_kl",
    "pad_to_multiple_of",
)
"""Options of GRPOConfig about what is not done here."""


@dataclass
class StaticConfig(GRPOConfig):
    """Settings of training on fixed rollouts; those of sampling and of a reference must stay as `GRPOConfig` has them.

    A batch counts answers. `temperature` must be that of the log-probs in the data, `max_completion_length` is read by
    `loss_type: dr_grpo` alone.

    Raises:
        ValueError: a setting would have no effect.
    """

    num_generations: int | None = field(
        default=1, metadata={"help": "Must stay 1: a batch counts answers, which are there already."}
    )
    reference_tolerance: float = field(
        default=0.05,
        metadata={
            "help": "Largest mean |log π_θ − log π_0| (nats per token) on the first micro-batch, before any update; "
            "more means that the log-probs belong to another model or dtype, and stops the run."
        },
    )

    def __post_init__(self) -> None:
        for name in _NO_ROLLOUTS:
            self._refuse(name, GRPOConfig.__dataclass_fields__[name].default, "answers are not sampled here")
        self._refuse("num_generations", 1, "a batch counts answers")
        self._refuse("ignore_data_skip", False, "a resumed run goes on where it was in the order of the answers")
        self._refuse("beta", 0.0, "log π_0 is in the data and no reference is loaded")
        if self.steps_per_generation not in (None, self.gradient_accumulation_steps):
            raise ValueError(
                f"steps_per_generation = {self.steps_per_generation} would have no effect, because answers are not "
                "sampled here: remove it."
            )
        if not self.reference_tolerance > 0.0:
            raise ValueError(f"reference_tolerance must be positive, got {self.reference_tolerance}.")
        own = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if own < 2:
            raise ValueError(
                "per_device_train_batch_size × gradient_accumulation_steps = 1: a step takes at least two answers per "
                "process, so raise one of them."
            )
        self.num_generations = own  # TRL wants groups, of two at least, that divide the batch
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.num_generations = 1
        if self.eval_strategy != "no":
            raise ValueError(
                f"eval_strategy = '{IntervalStrategy(self.eval_strategy).value}' has nothing to evaluate on fixed "
                "rollouts: set it to 'no' and evaluate the saved policy."
            )

    def _refuse(self, name: str, neutral: Any, reason: str) -> None:
        value = getattr(self, name)
        if value != neutral:
            raise ValueError(f"{name} = {value!r} would have no effect, because {reason}: leave it at {neutral!r}.")


class EpochOrder(Sampler[int]):
    """The places of an epoch's answers in the data: a function of (seed, epoch), cut to whole optimiser steps.

    Args:
        count: answers in the data.
        step: answers in an optimiser step, over all processes.
        seed: of the order; None leaves the data as they are.
    """

    def __init__(self, count: int, step: int, seed: int | None) -> None:
        self.count, self.step, self.seed = count, step, seed
        self.epoch = 0
        if count < step:
            raise UserError(
                f"There are {count} answers to train on and an optimiser step takes {step}: lower the batch, or take "
                "more answers."
            )

    def __len__(self) -> int:
        return self.count // self.step * self.step

    @property
    def steps(self) -> int:
        """Optimiser steps in an epoch."""
        return self.count // self.step

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that `iter` gives."""
        self.epoch = epoch

    def places(self, epoch: int) -> Tensor:
        """The order of an epoch."""
        if self.seed is None:
            return torch.arange(len(self))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.count, generator=generator)[: len(self)]

    def of_step(self, global_step: int) -> Tensor:
        """The places of the answers of an optimiser step, counted from 0 over all epochs."""
        epoch, step = divmod(global_step, self.steps)
        return self.places(epoch)[step * self.step : (step + 1) * self.step]

    def __iter__(self) -> Iterator[int]:
        yield from self.places(self.epoch).tolist()


class StaticTrainer(OnPolicyTrainer):
    """Trains on fixed rollouts with log π_0 from the data as log π_old.

    A method supplies `objective` and `penalty` as on `OnPolicyTrainer`, and may supply `targets`, on which training
    stops. The objective finds the rewards of the answers [B, 1] in `tokens.extra["rewards"]`, whether they are right
    [B, 1] in `correct` if the data say so.

    Args:
        model, processing_class, callbacks, peft_config, …: as `OnPolicyTrainer`.
        args: a `StaticConfig`.
        train_dataset: rows of `posttrain.rollouts.static`: `COLUMNS`, and what `further_columns` names.

    Raises:
        ValueError: an option would be ignored, or something is given that belongs to sampling.
        posttrain.errors.UserError: the data lack a column, are too few, or belong to another model or temperature.
    """

    takes_static = True

    further_columns: tuple[str, ...] = ()
    """Columns of the data that a method needs beside `COLUMNS`."""

    def __init__(self, model: Any, args: StaticConfig, train_dataset: Any = None, **kwargs: Any) -> None:
        for name in ("reward_funcs", "eval_dataset", "rollouts", "sampler_gap_limit", "tools", "environment_factory"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} has no effect on fixed rollouts, which are neither sampled nor judged again.")
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        require_columns(train_dataset, (*COLUMNS, *self.further_columns))
        found = train_dataset.unique("temperature")
        if not all(math.isclose(each, args.temperature) for each in found):
            raise UserError(
                f"log π_0 in the data is at temperature {found[0]:g} and training at {args.temperature:g}: score at "
                "the temperature of training."
            )
        args.reward_weights = None  # of verdicts, which are in the data: every recipe has some
        self._lengths = _lengths(train_dataset, "completion_ids")
        self._order = EpochOrder(
            len(train_dataset),
            args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            args.seed if args.shuffle_dataset else None,
        )
        super().__init__(model, reward_funcs=_judge, args=args, train_dataset=train_dataset, **kwargs)
        self.data_collator = self._collate
        self._extra_keys = ("rewards", "correct")
        self._step_totals: dict[str, tuple[float, float]] = {}
        self._checked = False
        self.add_callback(_StopAtTargets(self))

    # ------------------------------------------------------------------ what a method supplies

    def targets(self, means: Mapping[str, float]) -> str | None:
        """The name of the target that a finished optimiser step has reached, one of `means`; None to go on.

        Args:
            means: of the step's per-token metrics over all its tokens, as they were before its update.
        """
        return None

    def token_advantages(self, batch: dict[str, Tensor]) -> Tensor:
        """Â of a micro-batch, [B] or [B, T]."""
        return batch["advantages"]

    # ------------------------------------------------------------------ the methods of TRL and transformers overridden

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: Any = [*COLUMNS, "correct", *self.further_columns]

    def get_train_dataloader(self) -> Any:
        """Micro-batches, where TRL loads a whole generation batch for each of them."""
        rows: Any = self.train_dataset
        return self._get_dataloader(
            dataset=rows,
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=lambda _: self._order,
            is_training=True,
        )

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        batch: Any = self._prepare_input(generation_batch)
        batch["advantages"] = self.token_advantages(batch)
        # Of the whole step and all processes, as TRL counts those of a generation batch.
        tokens = int(self._lengths[self._order.of_step(self.state.global_step)].sum())
        batch["num_items_in_batch"] = torch.tensor(tokens, device=batch["completion_ids"].device)
        return batch

    def _generate_and_score_completions(self, inputs: Any) -> NoReturn:
        raise ValueError(f"{type(self).__name__} trains on fixed rollouts and samples none.")

    def _tokens(self, inputs: dict[str, Any], logps: Tensor, entropy: Tensor) -> Tokens:
        tokens = super()._tokens(inputs, logps, entropy)
        if not self._checked and self.state.global_step == 0:
            gap = (tokens.logps.detach() - tokens.old_logps).abs() * tokens.mask
            total, count = self.accelerator.reduce(torch.stack([gap.sum(), tokens.mask.sum().float()])).tolist()
            if not total <= self.args.reference_tolerance * count:
                raise UserError(
                    f"Before the first update the policy differs from log π_0 in the data by {total / count:.3g} nats "
                    f"per token, more than reference_tolerance = {self.args.reference_tolerance:g}: they belong to "
                    "another model or dtype; score this one."
                )
        self._checked = True
        return tokens

    def _measure(self, measured: Sequence[tuple[str, Tensor, Tensor]], mode: str) -> None:
        counted = [(name, value.nan_to_num(nan=0.0), mask * ~value.isnan()) for name, value, mask in measured]
        for name, (total, count) in self._totals(counted).items():
            before = self._step_totals.get(name, (0.0, 0.0))
            self._step_totals[name] = (before[0] + total, before[1] + count)

    def _init_training_state(
        self, max_steps: Any, num_update_steps_per_epoch: Any, num_train_epochs: Any, *rest: Any
    ) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *rest)
        return (num_train_epochs, 0) if self.stopped() is not None else (epochs, batches)

    # ------------------------------------------------------------------ parts of the above

    def stopped(self) -> tuple[str, float] | None:
        """The target that stopped this run, here or before it was resumed, and its value; None if none did."""
        for entry in self.state.log_history:
            for name, value in entry.items():
                if name.startswith(_STOP):
                    return name.removeprefix(_STOP), float(value)
        return None

    def _collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A micro-batch: prompts padded on the left, answers on the right."""
        depth = max(len(row["prompt_ids"]) for row in rows)
        width = max(len(row["completion_ids"]) for row in rows)
        pad = self._tokenizer.pad_token_id
        batch = {
            "prompt_ids": torch.full((len(rows), depth), pad),
            "prompt_mask": torch.zeros((len(rows), depth), dtype=torch.long),
            "completion_ids": torch.full((len(rows), width), pad),
            "completion_mask": torch.zeros((len(rows), width), dtype=torch.long),
        }
        per_token = [name for name in PER_TOKEN if name in rows[0]]
        batch |= {name: torch.zeros((len(rows), width)) for name in per_token}
        for place, row in enumerate(rows):
            prompt, length = len(row["prompt_ids"]), len(row["completion_ids"])
            batch["prompt_ids"][place, depth - prompt :] = torch.as_tensor(row["prompt_ids"])
            batch["prompt_mask"][place, depth - prompt :] = 1
            batch["completion_ids"][place, :length] = torch.as_tensor(row["completion_ids"])
            batch["completion_mask"][place, :length] = 1
            for name in per_token:
                batch[name][place, :length] = torch.as_tensor(row[name], dtype=torch.float32)
        batch["old_per_token_logps"] = batch.pop("old_logps")
        batch["advantages"] = torch.tensor([row["advantages"] for row in rows], dtype=torch.float32)
        batch["rewards"] = torch.tensor([[row["rewards"]] for row in rows], dtype=torch.float32)
        if "correct" in rows[0]:
            batch["correct"] = torch.tensor([[bool(row["correct"])] for row in rows])
        return batch


def require_columns(rows: Any, columns: Sequence[str]) -> None:
    """Refuse a data set that lacks a column, or whose log-probs or signals are not as long as the answers.

    Raises:
        posttrain.errors.UserError: it does, or it is not the ordinary kind that has a length.
    """
    known = getattr(rows, "column_names", None)
    if known is None or not hasattr(rows, "__len__"):
        raise UserError("Fixed rollouts come as a data set of known length: make it with posttrain.rollouts.static.")
    missing = [name for name in columns if name not in known]
    if missing:
        raise UserError(
            f"The fixed rollouts have no column '{missing[0]}' ({', '.join(known)}): make them with "
            "posttrain.rollouts.static."
        )
    for name in PER_TOKEN:
        if name in columns:
            wrong = int((_lengths(rows, "completion_ids") != _lengths(rows, name)).sum())
            if wrong:
                raise UserError(f"Of {wrong} answers, '{name}' is not as long as the answer: score these answers.")


def _lengths(rows: Any, name: str) -> Tensor:
    """How many numbers every row has in a column of lists; none of them becomes a Python object."""
    column = rows.select_columns([name]).with_format("arrow")[:][name]
    return torch.from_numpy(pyarrow.compute.list_value_length(column).to_numpy().astype("int64"))


class _StopAtTargets(TrainerCallback):
    """Asks the trainer for its targets when a step has ended; saves and stops at the first that is reached."""

    def __init__(self, trainer: StaticTrainer) -> None:
        self._trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._step_totals.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        totals = self._trainer._step_totals
        means = {name: total / count for name, (total, count) in totals.items() if count > 0}
        for name, value in means.items():  # logged here, so that micro-batches weigh as many as they have tokens
            self._trainer._metrics["train"][name].append(value)
        reached = self._trainer.targets(means)
        if reached is None:
            return
        self._trainer._metrics["train"][_STOP + reached].append(means[reached])
        control.should_log = control.should_save = control.should_training_stop = True
        if state.is_world_process_zero:
            print(f"Stopped after step {state.global_step}: {reached} = {means[reached]:.4g}.", flush=True)


_STOP = "stop/"


def _judge(**_: Any) -> NoReturn:
    """Stands where TRL insists on a reward function."""
    raise ValueError("Fixed rollouts carry their rewards; nothing is judged in training.")
