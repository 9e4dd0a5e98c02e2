"""RLAD: distillation that RL decides about, by a trust-region ratio to old policy and teacher (TRRD).

    log r = α (log π_θ − log π_old) + (1 − α) clamp(log π_θ − log π_T, −c, c)
    J = E[ min(r Â, clip(r, 1 − ε_low, 1 + ε_high) Â) ] − β KL(π_θ‖π_ref)

GRPO with its importance ratio replaced: tokens that the teacher finds less likely than the student are not reinforced
beyond the clip, those that it finds more likely are not punished. No sign is turned, and a group whose answers all have
the same reward gets no signal at all. A token that the teacher could not score has GRPO's ratio.

`trrd_anchor: arithmetic` is our ablation, r = π_θ/(α π_old + (1 − α) π_T). The reference KL is TRL's `beta`, with its
`use_bias_correction_kl`; the paper gives no value, 0 is the default.

Metrics, each a mean over completion tokens of all processes, and those of `posttrain.seams.on_policy`, where the clip
fractions are of r: `clip_ratio/low_mean` with Â < 0 and r < 1 − ε_low, `clip_ratio/high_mean` with Â > 0 and r > 1 +
ε_high.

- `trrd/ratio_mean`: r; `trrd/ratio_p05`, `trrd/ratio_p50`, `trrd/ratio_p95`: its quantiles over the completion tokens
  of a micro-batch of one process, averaged over micro-batches and processes by their tokens.
- `trrd/log_ratio_abs`: |log π_θ − log π_T| (nats), 0 where not scored.
- `trrd/outside`: fraction with |log π_θ − log π_T| ≥ c; geometric only.
- `trrd/zero_gradient`: fraction in which the policy term has no gradient: Â = 0, clipped, or dropped by the correction
  for a sampling engine.

Source: RLAD, arXiv 2602.22495 (v2), Eq. 3-5.
Differs: nothing in the default; `arithmetic` and `straight_through` are not in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.objectives.distillation import check_trust_region, trust_region_ratio
from posttrain.objectives.policy import clipped_surrogate, importance_ratio
from posttrain.rollouts.teacher import Teacher
from posttrain.seams.on_policy import GRPOConfig, Metrics, OnPolicyTrainer, Tokens

QUANTILES = {"trrd/ratio_p05": 0.05, "trrd/ratio_p50": 0.5, "trrd/ratio_p95": 0.95}


@dataclass
class RLADConfig(GRPOConfig):
    """Settings of RLAD; the defaults are the paper's.

    Raises:
        ValueError: a setting is unknown, out of range, or would have no effect.
    """

    trrd_alpha: float = field(
        default=0.5,
        metadata={"help": "α, the old policy's weight in (0, 1); the teacher has 1 − α. Useful from 0.3 to 0.7."},
    )
    trrd_clamp: float = field(
        default=1.0, metadata={"help": "c (nats), bound on |log π_θ − log π_T|; for trrd_anchor = geometric only."}
    )
    trrd_anchor: str = field(
        default="geometric", metadata={"help": "How old policy and teacher are mixed: geometric or arithmetic."}
    )
    trrd_clamp_gradient: str = field(
        default="hard",
        metadata={"help": "Gradient outside the clamp: hard (none) or straight_through; for geometric only."},
    )
    # Where the paper departs from TRL's defaults.
    loss_type: str = field(
        default="grpo", metadata={"help": "Mean over an answer's tokens, then over answers (paper)."}
    )
    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate (paper: 1e-6)."})
    epsilon_high: float | None = field(default=0.28, metadata={"help": "Upper clip of the ratio (paper: 0.28)."})

    def __post_init__(self) -> None:
        check_trust_region(self.trrd_alpha, self.trrd_clamp, self.trrd_anchor, self.trrd_clamp_gradient)
        if self.trrd_alpha == 1.0:
            raise ValueError("trrd_alpha = 1 is GRPO, where the teacher has no effect: choose the method grpo.")
        if self.trrd_anchor == "arithmetic":
            for name, neutral in (("trrd_clamp", 1.0), ("trrd_clamp_gradient", "hard")):
                value = getattr(self, name)
                if value != neutral:
                    raise ValueError(f"{name} = {value!r} has no effect on trrd_anchor = arithmetic: remove it.")
        super().__post_init__()  # type: ignore[no-untyped-call]


class RLADTrainer(OnPolicyTrainer):
    """GRPO with a trust-region ratio to old policy and teacher.

    Args:
        model, reward_funcs, args, train_dataset, …: as `OnPolicyTrainer`; `args` is an `RLADConfig`.
        teacher: scores the rollouts; checked against the student before its weights loaded
            (`posttrain.rollouts.teacher.check_teacher`). Or a function that makes it of this trainer, as in
            `lambda trainer: ModelTeacher(trainer.model, base=True)`.

    Raises:
        ValueError: an option of the config would be ignored.
        posttrain.errors.UserError: the teacher does not reach the loss, or reads no images where the prompts hold some.
    """

    _name = "RLAD"

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: RLADConfig | None = None,
        train_dataset: Any = None,
        *,
        teacher: Teacher | Callable[[Any], Teacher],
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = RLADConfig(f"{Path(name).name}-RLAD")
        super().__init__(model, reward_funcs=reward_funcs, args=args, train_dataset=train_dataset, **kwargs)
        self.take_teacher(self.made(teacher), self._probe)

    def annotate(self, batch: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """log π_T [B, T], and where the teacher has scored."""
        scores = self.teacher_scores(batch, rows)
        return {"teacher_logps": scores.logps, "teacher_mask": scores.mask}

    def policy_gradient(self, tokens: Tokens) -> tuple[Tensor, Metrics]:
        """The clipped surrogate of the trust-region ratio per token [B, T], corrected for the sampling engine."""
        teacher_logps, scored = tokens.extra["teacher_logps"], tokens.extra["teacher_mask"]
        geometric = self.args.trrd_anchor == "geometric"
        ratio = trust_region_ratio(
            tokens.logps,
            tokens.old_logps,
            teacher_logps,
            alpha=self.args.trrd_alpha,
            clamp=self.args.trrd_clamp,
            anchor=self.args.trrd_anchor,
            clamp_gradient=self.args.trrd_clamp_gradient,
        )
        ratio = torch.where(scored, ratio, importance_ratio(tokens.logps, tokens.old_logps))
        per_token = clipped_surrogate(
            ratio,
            tokens.advantages,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=self.args.delta,
        )
        low = (ratio < 1.0 - self.epsilon_low) & (tokens.advantages < 0)
        high = (ratio > 1.0 + self.epsilon_high) & (tokens.advantages > 0)
        still = low | high | (tokens.advantages == 0)
        if self.args.delta is not None:
            still = still | ((ratio > self.args.delta) & (tokens.advantages < 0))
        if tokens.sampler_ratio is not None:
            per_token = per_token * tokens.sampler_ratio
            still = still | (tokens.sampler_ratio == 0)
        gap = torch.where(scored, (tokens.logps.detach() - teacher_logps).abs(), 0.0)
        metrics = {
            "clip_ratio/low_mean": low.float(),
            "clip_ratio/high_mean": high.float(),
            "clip_ratio/region_mean": (low | high).float(),
            "trrd/ratio_mean": ratio,
            "trrd/log_ratio_abs": gap,
            "trrd/zero_gradient": still.float(),
        }
        if geometric:
            metrics["trrd/outside"] = (scored & (gap >= self.args.trrd_clamp)).float()
        values = ratio.detach()[tokens.mask.bool()]
        for name, level in QUANTILES.items():
            found = values.quantile(level) if len(values) else values.new_zeros(())
            metrics[name] = found.expand_as(ratio)
        return per_token, metrics

    def _probe(self, teacher_logps: Tensor) -> Tensor:
        """The policy term of made-up answers, as a function of the teacher's log-probs [4, 3]."""
        logps = torch.linspace(-1.0, -2.0, teacher_logps.numel()).view_as(teacher_logps)
        extra = {"teacher_logps": teacher_logps, "teacher_mask": torch.ones_like(logps, dtype=torch.bool)}
        advantages = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
        tokens = Tokens(logps, logps, advantages, torch.ones_like(logps), torch.zeros_like(logps), extra=extra)
        per_token, _ = self.policy_gradient(tokens)
        return (per_token * torch.arange(1.0, 13.0).view_as(per_token)).sum()


Config = RLADConfig
Trainer = RLADTrainer
