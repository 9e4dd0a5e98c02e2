"""The seam with TRL's GRPOTrainer: one trainer on which every on-policy method stands.

TRL generates, verifies and normalises; a method supplies an `objective` for rollouts, a `penalty` where a second term
is averaged in another way and, when it rehearses stored answers, a `rehearsal`. All are computed from one forward pass
per micro-batch.

Metrics logged here, each a mean over completion tokens of all processes: `entropy` (nats), `kl` (nats, only with a
reference), `clip_ratio/low_mean`, `clip_ratio/high_mean`, `clip_ratio/region_mean` (fraction of tokens). TRL's
per-sequence extremes `clip_ratio/low_min` and `clip_ratio/high_max` are left out: they cost two more collectives per
micro-batch. Everything that TRL logs while generating (rewards, lengths, …) is unchanged; with a rollout engine,
`posttrain.seams.rollout` defines `sampler/…` and `rollout/…` in place of TRL's `sampling/…`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from posttrain.errors import UserError
from posttrain.objectives.policy import (
    SAMPLER_CORRECTIONS,
    clipped_surrogate,
    importance_ratio,
    kl_k3,
    sampler_correction,
)
from posttrain.objectives.reduce import LOSS_TYPES, reduce, token_mean
from posttrain.objectives.vocabulary import Head
from posttrain.rewards import IN_THOUGHT
from posttrain.rollouts.engine import Engine
from posttrain.rollouts.replay import Draw, Replay
from posttrain.rollouts.teacher import Teacher, TeacherScores, require_effect, unpadded
from posttrain.rollouts.tokens import opens_thought
from posttrain.seams.beside_head import beside_head
from posttrain.seams.checkpoints import RenamedCheckpoints
from posttrain.seams.rollout import DEFAULT_GAP_LIMIT, Gap, Rollouts, engine_of
from posttrain.seams.sharding import RequireSharding
from posttrain.seams.vision import VISION, joined, require_processor, stored_fields

__all__ = ["GRPOConfig", "OnPolicyTrainer", "StoredTokens", "Tokens"]

Metrics = dict[str, Tensor]
"""Per-token [B, T] values by metric name; the seam averages them over the mask and all processes."""


@dataclass(frozen=True)
class Tokens:
    """What an objective sees of one micro-batch of rollouts; B answers, T tokens.

    Attributes:
        logps: log π_θ [B, T], with gradient (nats, at the rollout temperature).
        old_logps: log π_old [B, T] of the policy that generated.
        advantages: Â [B, 1], or [B, T] when a method annotates tokens.
        mask: 1 on tokens that the model wrote [B, T].
        entropy: of the next-token distribution [B, T], detached (nats).
        sampler_ratio: correction for the sampling engine, [B, T] or [B, 1]; None when it needs none. It belongs on
            the policy term only.
        extra: whatever `annotate` and `from_hidden` added, and `ref_logps` [B, T] when there is an online reference.
    """

    logps: Tensor
    old_logps: Tensor
    advantages: Tensor
    mask: Tensor
    entropy: Tensor
    sampler_ratio: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredTokens:
    """What a rehearsal sees: B stored answers (possibly none), T tokens.

    Attributes:
        logps: log π_θ [B, T], with gradient (nats).
        stored_logps: log π_ref [B, T] from the store (nats).
        mask: 1 on answer tokens [B, T].
    """

    logps: Tensor
    stored_logps: Tensor
    mask: Tensor


class OnPolicyTrainer(RenamedCheckpoints, GRPOTrainer):
    """GRPOTrainer with the loss replaced by `objective` (rollouts) and `rehearsal` (stored answers).

    With nothing overridden it is GRPO, equal to TRL in value and gradient. Options of `GRPOConfig` that the loss here
    does not honour are refused at construction.

    Answers come from the policy itself, or from a rollout engine (`rollouts`, or TRL's `use_vllm` and its options). The
    engine is given the policy before every generation, and every answer must carry the version that was asked for.
    TRL's importance-sampling correction (`vllm_importance_sampling_…`) applies to every engine; where generation and
    update are aligned, log π_old is taken from the training forward, which saves TRL's extra one.

    Args:
        model, reward_funcs, args, train_dataset, …: as `trl.GRPOTrainer`.
        rollouts: an engine that holds the same model and tokenizer; stays open.
        sampler_gap_limit: largest 99th percentile of |log π_trainer − log π_sampler| (nats per token) before the first
            update; default 0.05 in float32, 0.3 in half precision. Not checked with top_p or top_k, which make the two
            differ rightly.
        lora_sync: how LoRA reaches the engine, `merge` or `adapter`.

    Prompts may hold images, in a column `images` with a list of them per row; the model and its processor read them.

    Raises:
        ValueError: an option that would be ignored is set.
        posttrain.errors.UserError: the engine cannot do what the options ask for, or the model cannot read the images.
    """

    _tag_names = ["trl", "posttrain"]  # noqa: RUF012 - as TRL declares it
    _name = "posttrain"

    args: Any
    max_completion_length: Any
    model: Any

    replay: Replay | None = None
    replay_rows: int = 0
    """Stored rows per optimiser step, over all processes."""
    rehearsal_weight: float = 0.0
    """Factor on the token mean over a step's stored rows."""
    teacher: Teacher | None = None
    """Scores every rollout batch that `asks_teacher` wants scored, once, while TRL computes rewards."""
    teacher_options: Mapping[str, Any] = MappingProxyType({})
    """What it is asked for beside log-probs: further arguments of `Teacher.score`."""
    raw_rewards: Tensor
    """For `annotate`: the weighted sum of the rewards of each of this process's answers [B], neither centred nor
    scaled; NaN where no reward function could score the answer."""
    reward_columns: Tensor
    """For `annotate`: what each reward function says of each of this process's answers [B, functions], without its
    weight; NaN where it says nothing."""

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        *,
        rollouts: Engine | None = None,
        sampler_gap_limit: float | None = None,
        lora_sync: str = "merge",
        **kwargs: Any,
    ) -> None:
        if args is not None:
            refuse_ignored_options(args)
        wants_engine = args is not None and args.use_vllm
        if wants_engine and rollouts is not None:
            raise ValueError("use_vllm and rollouts name two engines: give one of them.")
        if wants_engine and args is not None:
            args.use_vllm = False  # TRL would start an engine of its own, which goes stale in silence on a CPU
        loading: Any = (args.model_init_kwargs if args is not None else None) or {}
        data = (train_dataset, kwargs.get("eval_dataset"))
        require_processor(model, kwargs.get("processing_class"), *data, revision=loading.get("revision"))
        super().__init__(model, reward_funcs=reward_funcs, args=args, train_dataset=train_dataset, **kwargs)
        self.args.use_vllm = wants_engine
        if self.aux_loss_enabled:
            raise ValueError(
                f"The model's router loss (router_aux_loss_coef = {self.router_aux_loss_coef}) is not part of this "
                "objective: set router_aux_loss_coef = 0."
            )
        if not any(isinstance(callback, RequireSharding) for callback in self.callback_handler.callbacks):
            self.add_callback(RequireSharding())
        self._extra_keys: tuple[str, ...] = ()
        self._in_thought: Sequence[bool] = ()
        self._window: tuple[int, int] = (-1, -1)
        self._rows: Sequence[Mapping[str, Any]] = ()
        self._scoring: Future[TeacherScores] | None = None
        if wants_engine:
            rollouts = engine_of(self.args, self.model)
        self._rollouts = Rollouts(self, rollouts, lora_sync) if rollouts is not None else None
        half = self.args.bf16 or self.args.fp16 or self.model.dtype != torch.float32
        limit = sampler_gap_limit or DEFAULT_GAP_LIMIT["half" if half else "float32"]
        truncated = (self.top_p or 1.0) < 1.0 or (self.top_k or 0) > 0
        self._gap = Gap(self.accelerator, None if truncated else limit)

    # ------------------------------------------------------------------ what a method supplies

    def annotate(self, batch: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Tensors to carry with each rollout, [B, …] in the order of `rows`; called once per generation, no gradient.

        TRL shuffles, splits and buffers them together with their rollout; the objective finds them in `tokens.extra`.
        """
        return {}

    def asks_hidden(self) -> bool:
        """Whether the objective needs `from_hidden` for the coming micro-batch."""
        return False

    def from_hidden(
        self, hidden: Tensor, head: Head, teacher_head: Head | None, inputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What the objective needs of whole next-token distributions; with gradient, in the policy's one forward.

        Args:
            hidden: the policy's last hidden states of which the rollouts' tokens are told [B, T, D].
            head: its output head.
            teacher_head: that of a teacher which gives hidden states.
            inputs: the micro-batch, what `annotate` added included.
        """
        raise NotImplementedError(f"{type(self).__name__} asks for hidden states and makes nothing of them.")

    def objective(self, tokens: Tokens) -> tuple[Tensor, Metrics]:  # type: ignore[override]  # HF keeps a search score there
        """Loss per token [B, T] of a micro-batch of rollouts, to be minimised, and metrics per token. GRPO here."""
        per_token, metrics = self.policy_gradient(tokens)
        if self.beta != 0.0:
            kl = kl_k3(tokens.logps, tokens.extra["ref_logps"])
            if self.args.use_bias_correction_kl:
                kl = kl * importance_ratio(tokens.logps, tokens.old_logps)
            per_token = per_token + self.beta * kl
            metrics["kl"] = kl
        return per_token, metrics

    def policy_gradient(self, tokens: Tokens) -> tuple[Tensor, Metrics]:
        """The clipped surrogate per token [B, T], corrected for the sampling engine, and the clip fractions."""
        ratio = importance_ratio(tokens.logps, tokens.old_logps)
        per_token = clipped_surrogate(
            ratio,
            tokens.advantages,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=self.args.delta,
        )
        if tokens.sampler_ratio is not None:
            per_token = per_token * tokens.sampler_ratio
        low = (ratio < 1.0 - self.epsilon_low) & (tokens.advantages < 0)
        high = (ratio > 1.0 + self.epsilon_high) & (tokens.advantages > 0)
        return per_token, {
            "clip_ratio/low_mean": low.float(),
            "clip_ratio/high_mean": high.float(),
            "clip_ratio/region_mean": (low | high).float(),
        }

    def penalty(self, tokens: Tokens) -> tuple[Tensor, Metrics] | None:
        """A second loss per token [B, T] of the same rollouts, and metrics per token; None here.

        Whatever `loss_type` is, it is averaged over an answer's tokens and then over the answers of a step.
        """
        return None

    def rehearsal(self, tokens: StoredTokens) -> tuple[Tensor, Metrics]:
        """Loss per token [B, T] of stored answers, to be minimised, and metrics per token."""
        raise NotImplementedError(f"{type(self).__name__} has a replay but no rehearsal objective.")

    def made(self, teacher: Teacher | Callable[[Any], Teacher]) -> Teacher:
        """A teacher as it is, or what one makes of this trainer: of its model, or split over the same processes."""
        return teacher if isinstance(teacher, Teacher) else teacher(self)

    def take_teacher(self, teacher: Teacher, loss: Callable[[Tensor], Tensor]) -> None:
        """Learn from a teacher that `loss`, of its log-probs [4, 3] on made-up answers, must react to.

        Raises:
            UserError: the loss does not, or the prompts hold images and the teacher reads text alone.
        """
        if "images" in (getattr(self.train_dataset, "column_names", None) or ()) and not teacher.reads_images:
            raise UserError(
                "The prompts hold images, and the teacher reads text alone: choose a vision-language teacher in this "
                "process, which comes with its processor."
            )
        self.teacher = teacher
        require_effect(loss, torch.linspace(-3.0, -0.5, 12).view(4, 3))

    def asks_teacher(self) -> bool:
        """Whether the coming rollout batch is scored by the teacher."""
        return self.teacher is not None

    def teacher_scores(self, batch: Mapping[str, Tensor], rows: Sequence[Mapping[str, Any]]) -> TeacherScores:
        """For `annotate`: what the teacher says of the rollouts, [B, T] as `completion_ids`, at their temperature.

        Raises:
            UserError: a log-prob is not finite, or as `Teacher.score`.
        """
        if self.teacher is None:
            raise ValueError(f"{type(self).__name__} has no teacher.")
        scoring, self._scoring = self._scoring, None
        if scoring is None:
            asked = {"temperature": self.temperature, **self.teacher_options}
            scores = self.teacher.score(*unpadded(batch), rows, **asked)
        else:
            scores = scoring.result()
        if not bool(scores.logps.isfinite().all()):
            raise UserError("The teacher's log-probs are not finite: look at its weights and its dtype.")
        return scores.fitted(batch["completion_ids"])

    # ------------------------------------------------------------------ the six methods of TRL that we stand on

    def _generate(self, prompts: Any) -> Any:
        generated: Any = super()._generate(prompts)
        tokenizer: Any = self.processing_class
        self._in_thought = [opens_thought(tokenizer, ids) for ids in generated[0]]
        if generated[6] is not None:  # TRL's None for a prompt without images among others is nothing to a processor
            generated = (*generated[:6], [images or [] for images in generated[6]], *generated[7:])
        if self.teacher is not None and self.asks_teacher():
            prompt_ids, completion_ids = generated[:2]
            asked = {"temperature": self.temperature, **self.teacher_options}
            self._scoring = self.teacher.submit(prompt_ids, completion_ids, self._rows, **asked)
        return generated

    def _generate_single_turn(self, prompt_ids: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        if self._rollouts is None:
            return super()._generate_single_turn(prompt_ids, images, *args, **kwargs)  # type: ignore[no-untyped-call]
        return self._rollouts.generate(prompt_ids)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        if any(self._in_thought):  # a column of every reward function's, as those of the rows
            inputs = [{**row, IN_THOUGHT: begun} for row, begun in zip(inputs, self._in_thought, strict=True)]
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        start = self.accelerator.process_index * len(prompts)  # TRL gathers them over all processes
        mine = rewards[start : start + len(prompts)]
        self.reward_columns = mine
        total = (mine * self.reward_weights.to(mine.device)).nansum(dim=1)
        self.raw_rewards = total.masked_fill(mine.isnan().all(dim=1), torch.nan)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = inputs
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        with torch.no_grad():
            extra = self.annotate(batch, inputs)
        taken = sorted(set(extra) & set(batch))
        if taken:
            raise ValueError(f"{type(self).__name__}.annotate returned '{taken[0]}', which TRL's batch has already.")
        self._extra_keys = tuple(extra)
        return {**batch, **extra}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        training = self.model.training
        draw = self._draw(self.replay) if training and self.replay is not None else None
        rollouts, width = inputs["completion_ids"].shape
        batch = inputs if draw is None else self._join(inputs, draw)
        columns = batch["completion_ids"].size(1)
        with self._beside_head(model, inputs, columns) as beside:
            logps, entropy, _ = self._get_per_token_logps_and_entropies(
                model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                columns,
                compute_entropy=True,
                **{key: batch[key] for key in VISION if key in batch},
            )

        tokens = self._tokens(inputs, logps[:rollouts, :width], entropy[:rollouts, :width])
        tokens = replace(tokens, extra={**tokens.extra, **beside})
        per_token, metrics = self.objective(tokens)
        accumulation = self.current_gradient_accumulation_steps if training else 1
        items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if training:  # `num_items_in_batch` spans the generation batch: rescale it to one accumulation window
            items = items * accumulation / self.args.steps_per_generation
        loss = reduce(
            per_token, tokens.mask, loss_type=self.loss_type, tokens=items, max_length=self.max_completion_length
        )
        if self.loss_type != "dapo":
            loss = loss / accumulation
        penalty = self.penalty(tokens)
        if penalty is not None:
            by_answer, more = penalty
            mean = reduce(by_answer, tokens.mask, loss_type="grpo", tokens=items, max_length=self.max_completion_length)
            loss = loss + mean / accumulation
            metrics |= more
        measured = [(name, value, tokens.mask) for name, value in {**metrics, "entropy": tokens.entropy}.items()]

        if draw is not None:
            mask = batch["completion_mask"][rollouts:]
            stored = StoredTokens(logps[rollouts:], batch["stored_logps"], mask)
            stored_per_token, stored_metrics = self.rehearsal(stored)
            # Gradients are averaged over processes, so each contributes its sum times their number.
            share = token_mean(stored_per_token, mask, draw.tokens) * self.accelerator.num_processes
            loss = loss + self.rehearsal_weight * share
            measured += [(name, value, mask) for name, value in stored_metrics.items()]

        mode = "train" if training else "eval"
        self._measure(measured, mode)
        if self._rollouts is not None:
            found = self._gap.measure(
                tokens.old_logps,
                inputs["sampling_per_token_logps"],
                tokens.mask,
                tokens.sampler_ratio,
                self._rollouts.engine.name,
            )
            for name, value in found.items():
                self._metrics[mode][name].append(value)
        return loss

    # ------------------------------------------------------------------ parts of the above

    def _old_logps(self, batch: dict[str, Any]) -> Tensor:
        """log π_old [B, T] for `annotate`, from TRL's generation where it has them, else by one more forward."""
        if "old_per_token_logps" in batch:
            known: Tensor = batch["old_per_token_logps"]
            return known
        logps: Tensor
        logps, _, _ = self._get_per_token_logps_and_entropies(
            self.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].size(1),
            batch_size=self.args.per_device_train_batch_size,
            **{key: batch[key] for key in VISION if key in batch},
        )
        return logps

    def _beside_head(
        self, model: Any, inputs: Mapping[str, Tensor], columns: int
    ) -> AbstractContextManager[dict[str, Tensor]]:
        """Inside, `from_hidden` is computed of the forward's last `columns` tokens, where it is asked for."""
        if not self.asks_hidden():
            return nullcontext({})
        rollouts, width = inputs["completion_ids"].shape

        def compute(hidden: Tensor, head: Head, teacher_head: Head | None) -> dict[str, Tensor]:
            before = hidden[:rollouts, -columns - 1 : -1][:, :width]
            return self.from_hidden(before, head, teacher_head, inputs)

        other = None if self.teacher is None else self.teacher.head
        return beside_head(self.accelerator.unwrap_model(model), compute, other)

    def _tokens(self, inputs: dict[str, Any], logps: Tensor, entropy: Tensor) -> Tokens:
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        advantages = inputs["advantages"]
        extra = {key: inputs[key] for key in self._extra_keys if key in inputs}
        if "ref_per_token_logps" in inputs:
            extra["ref_logps"] = inputs["ref_per_token_logps"]
        old_logps = inputs.get("old_per_token_logps")
        if old_logps is None:  # generation and update are aligned: π_old is π_θ
            old_logps = logps.detach()
        ratio = None
        if "sampling_per_token_logps" in inputs and self.vllm_importance_sampling_correction:
            ratio = sampler_correction(
                old_logps,
                inputs["sampling_per_token_logps"],
                mask,
                mode=self.vllm_importance_sampling_mode,
                clip_min=self.vllm_importance_sampling_clip_min,
                clip_max=self.vllm_importance_sampling_clip_max,
            )
        return Tokens(
            logps=logps,
            old_logps=old_logps,
            advantages=advantages.unsqueeze(1) if advantages.dim() == 1 else advantages,
            mask=mask,
            entropy=entropy.detach(),
            sampler_ratio=ratio,
            extra=extra,
        )

    def _draw(self, replay: Replay) -> Draw:
        """This process's stored rows for this micro-batch: a function of (step, micro-batch, rank) alone."""
        step, micro = self._window
        self._window = (self.state.global_step, micro + 1 if step == self.state.global_step else 0)
        world = self.accelerator.num_processes
        return replay.draw(
            step=self.state.global_step,
            rows=self.replay_rows,
            slot=self._window[1] * world + self.accelerator.process_index,
            slots=self.current_gradient_accumulation_steps * world,
        )

    def _join(self, inputs: dict[str, Any], draw: Draw) -> dict[str, Any]:
        """Rollouts and stored answers as one batch: prompts padded on the left, answers on the right."""
        answers = draw.answers
        width = max([inputs["completion_ids"].size(1), *(len(a.token_ids) for a in answers)])
        depth = max([inputs["prompt_ids"].size(1), *(len(a.prompt_ids) for a in answers)])
        device, pad = inputs["completion_ids"].device, self._tokenizer.pad_token_id
        rows = len(answers)
        prompt_ids = torch.full((rows, depth), pad, device=device)
        prompt_mask = torch.zeros((rows, depth), dtype=inputs["prompt_mask"].dtype, device=device)
        completion_ids = torch.full((rows, width), pad, device=device)
        completion_mask = torch.zeros((rows, width), dtype=inputs["completion_mask"].dtype, device=device)
        stored_logps = torch.zeros((rows, width), device=device)
        for row, answer in enumerate(answers):
            prompt, length = len(answer.prompt_ids), len(answer.token_ids)
            prompt_ids[row, depth - prompt :] = torch.tensor(answer.prompt_ids, device=device)
            prompt_mask[row, depth - prompt :] = 1
            completion_ids[row, :length] = torch.tensor(answer.token_ids, device=device)
            completion_mask[row, :length] = 1
            stored_logps[row, :length] = torch.tensor(answer.logps, device=device)

        def fit(tensor: Tensor, size: int, left: bool, value: int = 0) -> Tensor:
            missing = size - tensor.size(1)
            return torch.nn.functional.pad(tensor, (missing, 0) if left else (0, missing), value=value)

        return {
            "prompt_ids": torch.cat([fit(inputs["prompt_ids"], depth, True, pad), prompt_ids]),
            "prompt_mask": torch.cat([fit(inputs["prompt_mask"], depth, True), prompt_mask]),
            "completion_ids": torch.cat([fit(inputs["completion_ids"], width, False, pad), completion_ids]),
            "completion_mask": torch.cat([fit(inputs["completion_mask"], width, False), completion_mask]),
            "stored_logps": stored_logps,
            **joined(inputs, self._stored_fields(draw), [len(images) for images in draw.images], depth, width),
        }

    def _stored_fields(self, draw: Draw) -> list[Any]:
        """What the policy reads of the images of each drawn answer's prompt, on this process's device."""
        fields = (
            stored_fields(self.processing_class, images, answer.prompt_ids)
            for images, answer in zip(draw.images, draw.answers, strict=True)
        )
        return [self._prepare_input(each) for each in fields]

    def _measure(self, measured: Sequence[tuple[str, Tensor, Tensor]], mode: str) -> None:
        """Log token means over all processes, in one collective; a metric without any token is not logged."""
        for name, (total, count) in self._totals(measured).items():
            if count > 0:
                self._metrics[mode][name].append(total / count)

    def _totals(self, measured: Sequence[tuple[str, Tensor, Tensor]]) -> dict[str, tuple[float, float]]:
        """The sum and the number of tokens of each metric over all processes."""
        sums = [torch.stack([(value.detach() * mask).sum(), mask.sum().float()]) for _, value, mask in measured]
        totals = self.accelerator.reduce(torch.stack(sums), reduction="sum").tolist()
        return {name: (total, count) for (name, _, _), (total, count) in zip(measured, totals, strict=True)}


_NEUTRAL: dict[str, tuple[Any, str]] = {
    "importance_sampling_level": ("token", "ratios are per token here"),
    "top_entropy_quantile": (1.0, "tokens are not selected by entropy here"),
    "entropy_coef": (0.0, "there is no entropy bonus here"),
    "use_adaptive_entropy": (False, "there is no entropy bonus here"),
    "off_policy_mask_threshold": (None, "sequences are not masked by their off-policy KL here"),
}


def refuse_ignored_options(args: GRPOConfig) -> None:
    """Refuse what TRL would honour and our loss would not, so that no setting is ignored in silence.

    Raises:
        ValueError: the option, its value, why it has no effect, and the value to set.
    """
    if args.loss_type not in LOSS_TYPES:
        raise ValueError(
            f"loss_type = '{args.loss_type}' is not one of {', '.join(LOSS_TYPES)}: choose one of them, or use TRL's "
            "own trainer."
        )
    if args.vllm_importance_sampling_mode not in SAMPLER_CORRECTIONS:
        raise ValueError(
            f"vllm_importance_sampling_mode = '{args.vllm_importance_sampling_mode}' is not one of "
            f"{', '.join(SAMPLER_CORRECTIONS)}: choose one of them."
        )
    for name, (neutral, reason) in _NEUTRAL.items():
        value = getattr(args, name)
        if value != neutral:
            raise ValueError(f"{name} = {value!r} would be ignored, because {reason}: set it to {neutral!r}.")
