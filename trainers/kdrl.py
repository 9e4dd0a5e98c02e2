"""KDRL: knowledge distillation and RL in one objective, on the student's own answers.

    J = J_GRPO − β · E[ w · ½ R² ],     R = log π_T − log π_θ

The frozen teacher π_T scores what the student wrote, once per rollout batch. ½ R² is k2: per token given its prefix its
gradient is that of the reverse KL(π_θ‖π_T); that a token leads to prefixes where the teacher disagrees is left out.
Per-answer weights w come from raw rewards of whole groups. There is no KL to the initial policy.

`kd_estimator` replaces ½ R² by another estimate from the sampled token (k3, bias_corrected_k3), or by a divergence
between the two next-token distributions: `full`, exact over the vocabulary, in any direction (`kd_divergence`), or
`topk`, over the student's K most probable words. These two come from the last hidden states of the student's one
forward and of the teacher's, [B, T, width] each, through both output heads at the rollout temperature; logits [B, T, V]
never exist. An engine that teaches gives no hidden states, but its own K most probable words: with it, `topk` is over
those.

`kd_form` says where the teacher enters: `loss` as above; `advantage`, Â + β w R with R at π_old, the same gradient
on-policy, but weighted and clipped with the importance ratio; `reward`, r + β w mean R before rewards are normalised
(reported to collapse). The correction for a sampling engine acts on the policy term alone, so on `loss` it does not.

Baselines on the same code: `kd_only` (on-policy distillation: Â = 0, β = 1; with `full`, by whole distributions) and
`distil_then_rl` (that for S steps, then GRPO without a teacher forward).

Metrics, each a mean over completion tokens of all processes, and those of `posttrain.seams.on_policy`:

- `kd/log_ratio_mean`, `kd/log_ratio_abs`: R and |R| (nats), before the clamp and without weights; 0 where not scored.
- `kd/coef`: β of this step; nothing else is logged where it is 0.
- `kd/mask_fraction`: fraction of completion tokens with w > 0.
- `kd/advantage_ratio`: β E[w |R|] / E|Â|, R clamped, Â GRPO's own advantage; not logged where all Â are 0.
- `kd/divergence`: of whole distributions (nats; χ², H²: 1), over tokens with w > 0 alone; only with `full` and `topk`.

Source: KDRL, arXiv 2506.02208; weights, PACED, arXiv 2603.11178.
Differs: R is clamped (`posttrain.objectives.distillation`), a divergence is not; the paper leaves the denominator under
a mask open, and has no estimator but k2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.errors import UserError
from posttrain.objectives.distillation import (
    LOG_RATIO_CLAMP,
    MASKS,
    SAMPLED_ESTIMATORS,
    annealed_coefficient,
    check_estimator,
    distillation_loss,
    distillation_mask,
    full_vocabulary,
    over_kept,
    paced_weights,
    pass_rates,
    teacher_advantage,
    teacher_reward,
    topk_of_student,
    topk_of_teacher,
)
from posttrain.objectives.divergences import MAX_LOG_RATIO_CLAMP, form
from posttrain.objectives.vocabulary import Head
from posttrain.rollouts.teacher import Teacher
from posttrain.seams.on_policy import GRPOConfig, Metrics, OnPolicyTrainer, Tokens
from posttrain.seams.sharding import requested

FORMS = ("loss", "advantage", "reward")
"""Where the teacher enters."""

SCHEDULES = ("fixed", "annealed")
"""How β goes over the optimiser steps."""

FIXED_COEFFICIENT = 2e-3
"""β of the schedule `fixed` (reward per nat²)."""

TOPK = 64
"""K of the estimator `topk`."""

ANNEALING = {"initial": 5e-3, "decay": 5e-5, "minimum": 1e-3}
"""β of the schedule `annealed`: where it starts, what each optimiser step takes off, where it stops."""


@dataclass
class KDRLConfig(GRPOConfig):
    """Settings of KDRL; the defaults are the paper's.

    Raises:
        ValueError: a setting is unknown, out of range, or would have no effect.
    """

    kd_form: str = field(
        default="loss",
        metadata={"help": "Where the teacher enters: loss, advantage (same gradient on-policy) or reward (ablation)."},
    )
    kd_estimator: str = field(
        default="k2",
        metadata={
            "help": "What is minimised in the loss form, from the sampled tokens: k2 or bias_corrected_k3 (gradient of "
            "the reverse KL), or k3 (of the forward KL); from whole distributions: full, or topk."
        },
    )
    kd_divergence: str = field(
        default="reverse_kl",
        metadata={
            "help": "D_f(π_θ‖π_T) of full and topk: reverse_kl (KL(π_θ‖π_T)), forward_kl (KL(π_T‖π_θ)), js, or another "
            "of the table with a token form."
        },
    )
    kd_divergence_alpha: float | None = field(
        default=None, metadata={"help": "α of kd_divergence = alpha, strictly between 0 and 1."}
    )
    kd_topk: int = field(default=TOPK, metadata={"help": "K of topk: words per token."})
    kd_topk_tail: bool = field(
        default=True,
        metadata={"help": "All other words are one more outcome of topk; false renormalises over the K words."},
    )
    kd_schedule: str = field(default="fixed", metadata={"help": "fixed (kd_coef) or annealed (max(β − δ·t, minimum))."})
    kd_coef: float | None = field(
        default=None,
        metadata={
            "help": f"β (reward per nat²), at the first step where it is annealed; default {FIXED_COEFFICIENT:g}, "
            f"annealed {ANNEALING['initial']:g}. It depends on the task: sweep it."
        },
    )
    kd_coef_decay: float | None = field(
        default=None, metadata={"help": f"δ per optimiser step, annealed only; default {ANNEALING['decay']:g}."}
    )
    kd_coef_minimum: float | None = field(
        default=None, metadata={"help": f"Floor of β, annealed only; default {ANNEALING['minimum']:g}."}
    )
    kd_only: bool = field(default=False, metadata={"help": "Distillation alone: advantages are 0 and β is 1."})
    distil_then_rl: int | None = field(
        default=None, metadata={"help": "Optimiser steps of distillation alone, after which the teacher is gone."}
    )
    kd_mask: str = field(
        default="none",
        metadata={"help": "What is distilled: none masks nothing, response wrong answers, group all-wrong groups."},
    )
    kd_denominator: str = field(
        default="all",
        metadata={
            "help": "What the weighted teacher term is divided by: all, as the policy term, or kept, the weights of "
            "the rollout batch, so that β does not act in proportion to how much is distilled."
        },
    )
    kd_correct_threshold: float = field(
        default=1.0, metadata={"help": "Reward from which an answer is correct; for kd_mask and kd_paced."}
    )
    kd_paced: bool = field(
        default=False, metadata={"help": "Weight the teacher by p^a (1 − p)^b of the group's pass rate p (PACED)."}
    )
    kd_paced_a: float = field(default=1.0, metadata={"help": "a of kd_paced."})
    kd_paced_b: float = field(default=1.0, metadata={"help": "b of kd_paced."})
    kd_mask_eos: bool = field(
        default=False,
        metadata={"help": "Leave out the token that ends an answer, for a teacher that ends otherwise."},
    )
    kd_log_ratio_clamp: float = field(
        default=LOG_RATIO_CLAMP, metadata={"help": "|R| (nats) beyond which the slope stays what it is there."}
    )
    # Where the paper departs from TRL's defaults.
    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate (paper: 1e-6, constant)."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning-rate schedule (paper: constant)."})

    def __post_init__(self) -> None:
        check_estimator(self.kd_estimator)
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"unknown {name} '{value}'; known: {', '.join(known)}.")
        if self.kd_form != "loss" and self.kd_estimator != "k2":
            raise ValueError(
                f"kd_estimator = '{self.kd_estimator}' has no effect on kd_form = {self.kd_form}, whose gradient is "
                "that of k2: remove it."
            )
        if not 0.0 < self.kd_log_ratio_clamp <= MAX_LOG_RATIO_CLAMP:
            raise ValueError(
                f"kd_log_ratio_clamp must be positive and at most {MAX_LOG_RATIO_CLAMP:g}, got "
                f"{self.kd_log_ratio_clamp}."
            )
        self._check_distributions()
        self._check_weights()
        self._check_schedule()
        if self.beta != 0.0:
            raise ValueError(
                f"beta = {self.beta} would add a KL to the initial policy, which KDRL does not have: leave it at 0 and "
                "set kd_coef."
            )
        if self.kd_form == "reward" and self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"kd_form = reward adds the teacher to the sum of rewards, and multi_objective_aggregation = "
                f"'{self.multi_objective_aggregation}' normalises each before: set it to 'sum_then_normalize'."
            )
        super().__post_init__()  # type: ignore[no-untyped-call]

    @property
    def compares_distributions(self) -> bool:
        """Whether the estimator needs more than log-probs of the sampled tokens."""
        return self.kd_estimator not in SAMPLED_ESTIMATORS

    def _check_distributions(self) -> None:
        form(self.kd_divergence, self.kd_divergence_alpha)
        neutral: dict[str, Any] = {}
        if self.compares_distributions:
            neutral["kd_log_ratio_clamp"] = LOG_RATIO_CLAMP
        else:
            neutral["kd_divergence"] = "reverse_kl"
        if self.kd_estimator != "topk":
            neutral |= {"kd_topk": TOPK, "kd_topk_tail": True}
        for name, value in neutral.items():
            found = getattr(self, name)
            if found != value:
                raise ValueError(f"{name} = {found!r} has no effect on kd_estimator = {self.kd_estimator}: remove it.")
        least = 1 if self.kd_topk_tail else 2
        if self.kd_topk < least:
            raise ValueError(
                f"kd_topk must be at least {least}, got {self.kd_topk}: one word, renormalised, has probability 1 "
                "under both models."
            )

    def _check_weights(self) -> None:
        paced_weights(torch.ones(1, 1), a=self.kd_paced_a, b=self.kd_paced_b)
        if not self.kd_paced and (self.kd_paced_a, self.kd_paced_b) != (1.0, 1.0):
            raise ValueError("kd_paced_a and kd_paced_b have no effect without kd_paced: set it, or remove them.")
        if self.kd_paced and self.kd_mask == "group" and self.kd_paced_a > 0.0:
            raise ValueError(
                "kd_paced is 0 where no answer is correct, and kd_mask = group leaves nothing else, so nothing would "
                "be distilled: set kd_paced_a = 0 or another mask."
            )
        if not math.isfinite(self.kd_correct_threshold):
            raise ValueError(f"kd_correct_threshold must be finite, got {self.kd_correct_threshold}.")
        if self.kd_mask == "none" and not self.kd_paced:
            for name, neutral in (("kd_correct_threshold", 1.0), ("kd_denominator", "all")):
                value = getattr(self, name)
                if value != neutral:
                    raise ValueError(f"{name} = {value!r} has no effect without kd_mask or kd_paced: remove it.")
        if self.kd_denominator == "kept" and self.kd_form == "reward":
            raise ValueError("kd_denominator = kept has no effect on rewards, which are normalised: leave it at all.")

    def _check_schedule(self) -> None:
        alone = "kd_only" if self.kd_only else None if self.distil_then_rl is None else "distil_then_rl"
        if self.kd_only and self.distil_then_rl is not None:
            raise ValueError("kd_only and distil_then_rl both say how long to distil alone: give one of them.")
        if self.distil_then_rl is not None and self.distil_then_rl < 1:
            raise ValueError(f"distil_then_rl must be a positive number of steps, got {self.distil_then_rl}.")
        if alone is not None:
            if self.kd_form == "reward":
                raise ValueError(
                    f"kd_form = reward has no part without advantages, which {alone} sets to 0: change one."
                )
            if self.kd_schedule != "fixed" or self.kd_coef is not None:
                raise ValueError(f"kd_schedule and kd_coef have no effect with {alone}, where β is 1: remove them.")
        if self.kd_schedule == "fixed":
            if self.kd_coef is not None and not 0.0 < self.kd_coef < math.inf:
                raise ValueError(
                    f"kd_coef must be a positive number, got {self.kd_coef}: without the teacher, choose the method "
                    "grpo."
                )
            if self.kd_coef_decay is not None or self.kd_coef_minimum is not None:
                raise ValueError(
                    "kd_coef_decay and kd_coef_minimum have no effect on kd_schedule = fixed: choose annealed, or "
                    "remove them."
                )
        else:
            self.coefficient(0)

    def distils_alone(self, step: int) -> bool:
        """Whether the advantages are set to 0 after `step` optimiser steps."""
        return self.kd_only or (self.distil_then_rl is not None and step < self.distil_then_rl)

    def coefficient(self, step: int) -> float:
        """β after `step` optimiser steps; a function of the step alone, so a resumed run goes on with it.

        Raises:
            ValueError: the values anneal nothing.
        """
        if self.distils_alone(step):
            return 1.0
        if self.distil_then_rl is not None:
            return 0.0
        if self.kd_schedule == "fixed":
            return FIXED_COEFFICIENT if self.kd_coef is None else self.kd_coef
        given = {"initial": self.kd_coef, "decay": self.kd_coef_decay, "minimum": self.kd_coef_minimum}
        return annealed_coefficient(
            step, **{name: ANNEALING[name] if value is None else value for name, value in given.items()}
        )


_CHOICES = {
    "kd_form": FORMS,
    "kd_schedule": SCHEDULES,
    "kd_mask": MASKS,
    "kd_denominator": ("all", "kept"),
}


class KDRLTrainer(OnPolicyTrainer):
    """GRPO and distillation from a teacher in one loss.

    Args:
        model, reward_funcs, args, train_dataset, …: as `OnPolicyTrainer`; `args` is a `KDRLConfig`.
        teacher: scores the rollouts; checked against the student before its weights loaded
            (`posttrain.rollouts.teacher.check_teacher`). Or a function that makes it of this trainer, as in
            `lambda trainer: ModelTeacher(trainer.model, base=True)`.

    Raises:
        ValueError: an option of the config would be ignored or is out of range.
        posttrain.errors.UserError: the teacher does not reach the loss, cannot give what the estimator needs, or reads
            no images where the prompts hold some.
    """

    _name = "KDRL"

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: KDRLConfig | None = None,
        train_dataset: Any = None,
        *,
        teacher: Teacher | Callable[[Any], Teacher],
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = KDRLConfig(f"{Path(name).name}-KDRL")
        super().__init__(model, reward_funcs=reward_funcs, args=args, train_dataset=train_dataset, **kwargs)
        self._words: int | None = None
        teacher = self.made(teacher)
        if args.compares_distributions:
            self._prepare_distributions(teacher)
        self.take_teacher(teacher, self._probe)

    def asks_teacher(self) -> bool:
        """As long as β is not 0."""
        return bool(self.args.coefficient(self.state.global_step) > 0.0)

    def asks_hidden(self) -> bool:
        """Where β is not 0 and the estimator compares distributions."""
        return self.args.compares_distributions and self.asks_teacher()

    def from_hidden(
        self, hidden: Tensor, head: Head, teacher_head: Head | None, inputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """D_f(π_θ‖π_T) of the tokens that are distilled [B, T]; 0 of the others."""
        kept = inputs["kd_weights"] > 0
        told = {name: inputs[name][kept] for name in _TOLD if name in inputs}
        value = self._divergence(hidden[kept], head, teacher_head, told)
        return {"kd_divergence": value.new_zeros(kept.shape).masked_scatter(kept, value)}

    def annotate(self, batch: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """log π_T, where it is known, and the weights w, all [B, T]; in the reward form also the advantages [B].

        What an estimator of distributions needs is with them: the teacher's hidden states [B, T, E], or its words.
        """
        if not self.asks_teacher():
            return {}
        scores = self.teacher_scores(batch, rows)
        mask = batch["completion_mask"]
        if "tool_mask" in batch:
            mask = mask * batch["tool_mask"]
        group: Any = self.num_generations if self.model.training else self.num_generations_eval
        # Groups may span processes: the weights of all answers are computed in each of them.
        rewards = self.accelerator.gather(self.raw_rewards.float())
        lengths = self.accelerator.gather(mask.sum(dim=1, keepdim=True))
        start = self.accelerator.process_index * len(mask)
        mine = slice(start, start + len(mask))
        distilled = mask.bool() & scores.mask
        if self.args.kd_mask_eos:
            ends = torch.tensor(self.eos_token_ids, device=mask.device)
            distilled = distilled & ~torch.isin(batch["completion_ids"], ends)
        weights = self._answer_weights(rewards, lengths, group)[mine] * distilled
        extra = {"teacher_logps": scores.logps, "teacher_mask": scores.mask, "kd_weights": weights}
        if scores.hidden is not None:
            extra["teacher_hidden"] = scores.hidden
        elif self.args.compares_distributions:
            extra |= {"teacher_top_ids": scores.top_ids, "teacher_top_logps": scores.top_logps}
        if self.args.kd_form == "reward":
            shaping = self.accelerator.gather(self._shaping(self._old_logps(batch), scores.logps, weights))
            extra["kd_advantages"] = normalised(rewards + shaping, group, self.scale_rewards)[mine]
        return extra

    def objective(self, tokens: Tokens) -> tuple[Tensor, Metrics]:  # type: ignore[override]
        """GRPO and β times the teacher's term, per token."""
        step = self.state.global_step
        coefficient = self.args.coefficient(step)
        if coefficient == 0.0:
            return self.policy_gradient(tokens)
        teacher_logps, weights = tokens.extra["teacher_logps"], tokens.extra["kd_weights"]
        bound = self.args.kd_log_ratio_clamp
        own = torch.zeros_like(tokens.advantages) if self.args.distils_alone(step) else tokens.advantages
        if self.args.kd_form == "advantage":
            own = own + coefficient * weights * teacher_advantage(
                tokens.old_logps, teacher_logps, log_ratio_clamp=bound
            )
        elif self.args.kd_form == "reward":
            own = tokens.extra["kd_advantages"].unsqueeze(1)
        per_token, metrics = self.policy_gradient(replace(tokens, advantages=own))
        if self.args.kd_form == "loss":
            if self.args.compares_distributions:
                kd = tokens.extra["kd_divergence"]
                metrics[_DIVERGENCE] = kd.detach()
            else:
                kd = distillation_loss(
                    self.args.kd_estimator, tokens.logps, tokens.old_logps, teacher_logps, log_ratio_clamp=bound
                )
            per_token = per_token + coefficient * weights * kd
        gap = torch.where(tokens.extra["teacher_mask"], teacher_logps - tokens.logps.detach(), 0.0)
        metrics |= {
            "kd/log_ratio_mean": gap,
            "kd/log_ratio_abs": gap.abs(),
            "kd/coef": torch.full_like(gap, coefficient),
            "kd/mask_fraction": (weights > 0).float(),
            "kd/advantage_ratio": coefficient * weights * gap.abs().clamp(max=bound),
            _ADVANTAGE: tokens.advantages.abs().expand_as(gap),
        }
        return per_token, metrics

    # ------------------------------------------------------------------ parts of the above

    def _prepare_distributions(self, teacher: Teacher) -> None:
        """What the teacher is asked for, and over which words; refuses what cannot be compared."""
        if requested(self.args) == "fsdp1":
            raise ValueError(
                f"kd_estimator = {self.args.kd_estimator} needs whole output heads, which FSDP 1 keeps in parts: "
                "launch with ddp, fsdp2 or DeepSpeed."
            )
        if teacher.head is None:
            self._prepare_words(teacher)
            return
        if teacher.head.layer.weight.is_meta:
            raise UserError(
                "The teacher's output head is offloaded, and whole distributions need it in every step: keep it on a "
                "device (device_map)."
            )
        learned = {id(parameter) for parameter in self.model.parameters() if parameter.requires_grad}
        if id(teacher.head.layer.weight) in learned and self._updates > 1:
            raise ValueError(
                f"The teacher's output head is the student's own and is trained, and each rollout batch serves "
                f"{self._updates} updates, so it would not be the head that scored: set num_iterations = 1 and "
                "steps_per_generation = gradient_accumulation_steps."
            )
        self.teacher_options = {"hidden": True}
        own, other = (_rows(layer) for layer in (self._student().get_output_embeddings(), teacher.head.layer))
        if own != other:
            self._words = max(self._tokenizer.get_vocab().values()) + 1
        size = self._words or own
        if self.args.kd_estimator == "topk" and self.args.kd_topk > size:
            raise ValueError(f"kd_topk = {self.args.kd_topk} exceeds the {size} words of the vocabulary: lower it.")

    def _prepare_words(self, teacher: Teacher) -> None:
        given = f"{type(teacher).__name__} gives no hidden states, only log-probs of its own most probable words"
        if self.args.kd_estimator == "full":
            raise UserError(f"{given}: take kd_estimator = topk, or a teacher in this process.")
        if not self.args.kd_topk_tail:
            raise UserError(
                f"{given}, over which a renormalised divergence has no use: leave kd_topk_tail at true, or take a "
                "teacher in this process."
            )
        self.teacher_options = {"top_k": self.args.kd_topk}

    @property
    def _updates(self) -> int:
        """Optimiser steps per rollout batch."""
        return int(self.num_iterations * self.args.steps_per_generation // self.args.gradient_accumulation_steps)

    def _student(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def _divergence(self, hidden: Tensor, head: Head, teacher_head: Head | None, told: Mapping[str, Tensor]) -> Tensor:
        """D_f(π_θ‖π_T) [N] of N tokens, from the student's hidden states [N, D] and what the teacher told of them."""
        measure: dict[str, Any] = {
            "divergence": self.args.kd_divergence,
            "alpha": self.args.kd_divergence_alpha,
            "temperature": self.temperature,
        }
        if teacher_head is None:
            return topk_of_teacher(hidden, head, told["teacher_top_ids"], told["teacher_top_logps"], **measure)
        both = (hidden, head, told["teacher_hidden"], teacher_head)
        if self.args.kd_estimator == "full":
            return full_vocabulary(*both, words=self._words, **measure)
        k, tail = self.args.kd_topk, self.args.kd_topk_tail
        return topk_of_student(*both, k, tail=tail, words=self._words, **measure)

    def _answer_weights(self, rewards: Tensor, lengths: Tensor, group: int) -> Tensor:
        """w [N, 1] of all answers, from their raw rewards [N] and lengths [N, 1]."""
        known: dict[str, Any] = {"group_size": group, "correct_threshold": self.args.kd_correct_threshold}
        weights = distillation_mask(self.args.kd_mask, rewards, **known)
        if self.args.kd_paced:
            rates = pass_rates(rewards, **known)
            weights = weights * paced_weights(rates, a=self.args.kd_paced_a, b=self.args.kd_paced_b)
        if self.args.kd_denominator == "kept":
            weights = over_kept(weights, lengths, loss_type=self.loss_type)
        return weights

    def _shaping(self, old_logps: Tensor, teacher_logps: Tensor, weights: Tensor) -> Tensor:
        """β w mean R of each answer [B], over the tokens that are distilled; β of the step that generates."""
        mean = teacher_reward(
            old_logps, teacher_logps, (weights > 0).float(), log_ratio_clamp=self.args.kd_log_ratio_clamp
        )
        coefficient: float = self.args.coefficient(self.state.global_step)
        return coefficient * weights.amax(dim=1) * mean

    def _probe(self, teacher_logps: Tensor) -> Tensor:
        """The loss of a made-up group of four answers, as a function of the teacher's log-probs [4, 3]."""
        logps = torch.linspace(-1.0, -2.0, teacher_logps.numel()).view_as(teacher_logps)
        weights = torch.ones_like(logps)
        extra = {"teacher_logps": teacher_logps, "teacher_mask": weights > 0, "kd_weights": weights}
        if self.args.compares_distributions:
            extra |= self._probe_distributions(teacher_logps, weights)
        if self.args.kd_form == "reward":
            rewards = torch.zeros(4) + self._shaping(logps, teacher_logps, weights)
            extra["kd_advantages"] = normalised(rewards, 4, self.scale_rewards)
        tokens = Tokens(logps, logps, torch.ones(4, 1), weights, torch.zeros_like(logps), extra=extra)
        per_token, _ = self.objective(tokens)
        return (per_token * torch.arange(1.0, 13.0).view_as(per_token)).sum()

    def _probe_distributions(self, teacher_logps: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """The divergence of the group: the log-probs are the teacher's hidden states, of width 1, or make its words."""
        words = max(self.args.kd_topk, self._words or 0) + 1
        rows = torch.linspace(-1.0, 1.0, words)[:, None]
        student, teacher = torch.zeros(4, 3, 1), teacher_logps[..., None]
        inputs = {"kd_weights": weights}
        if self.teacher_options.get("hidden"):
            return self.from_hidden(student, Head(rows), Head(rows), {**inputs, "teacher_hidden": teacher})
        top_logps = (teacher * rows[: self.args.kd_topk, 0]).log_softmax(dim=-1) - 1.0
        top_ids = torch.arange(self.args.kd_topk).expand(4, 3, -1)
        inputs |= {"teacher_top_ids": top_ids, "teacher_top_logps": top_logps}
        return self.from_hidden(student, Head(rows), None, inputs)

    def _measure(self, measured: Sequence[tuple[str, Tensor, Tensor]], mode: str) -> None:
        super()._measure(measured, mode)
        metrics = self._metrics[mode]
        divergence = metrics.pop(_DIVERGENCE, [])
        if divergence and metrics["kd/mask_fraction"][-1] > 0.0:
            metrics["kd/divergence"].append(divergence[-1] / metrics["kd/mask_fraction"][-1])
        advantage = metrics.pop(_ADVANTAGE, [])
        if not advantage:
            return
        size = metrics["kd/advantage_ratio"].pop()
        if advantage[-1] > 0.0:
            metrics["kd/advantage_ratio"].append(size / advantage[-1])
        if not metrics["kd/advantage_ratio"]:
            del metrics["kd/advantage_ratio"]


_ADVANTAGE = "kd/advantage_abs"
"""Between `objective` and `_measure`: the denominator of a metric."""

_DIVERGENCE = "kd/divergence_sum"
"""Likewise: the numerator of a metric, over all completion tokens."""

_TOLD = ("teacher_hidden", "teacher_top_ids", "teacher_top_logps")
"""What `annotate` keeps of the teacher for an estimator of distributions."""


def _rows(layer: Any) -> int:
    """Words of an output head, also where ZeRO-3 has split its weights."""
    return int(getattr(layer.weight, "ds_shape", layer.weight.shape)[0])


def normalised(rewards: Tensor, group: int, scale: str) -> Tensor:
    """Advantages [N] of rewards [N] of whole groups, 0 for NaN, as in TRL 1.16 with this `scale_rewards`."""
    grouped = rewards.view(-1, group)
    centred = grouped - grouped.nanmean(dim=1, keepdim=True)
    if scale != "none":
        pool = grouped if scale == "group" else grouped.view(1, -1)
        count = (~pool.isnan()).sum(dim=1, keepdim=True)
        squares = (pool - pool.nanmean(dim=1, keepdim=True)).square().nansum(dim=1, keepdim=True)
        centred = centred / ((squares / (count - 1).clamp(min=1)).sqrt() + 1e-4)
    return torch.nan_to_num(centred.reshape(-1), nan=0.0)


Config = KDRLConfig
Trainer = KDRLTrainer
