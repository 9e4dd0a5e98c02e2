"""ERPD: Extreme Region Policy Distillation. Optimise far off-policy for a scorer, then distil what it says, near home.

Two phases on one fixed set of rollouts of π_0, the policy that training starts from. With d = log π_θ − log π_0 of a
token, ρ = e^d, Â the group-normalised advantage of an answer and r its reward:

    extract    L = one of sapo, is, ce, sft, mse, clip (`posttrain.objectives.extraction`), for many epochs, without KL
    distil     L = −min(ρ δ̂, clip(ρ, 1 − ε, 1 + ε) δ̂) + c (ρ − 1 − log ρ)       trust_region: clip
               L = −ρ δ̂ + λ (ρ log ρ − ρ + 1)                                   trust_region: kl

δ̂ is a token's log-ratio of two policies, δ = log π_T − log π_0 for example, scaled (`posttrain.objectives.signals`):
for the optimum of reward minus a KL it is that token's advantage. What is extracted is a scorer and may have collapsed;
the product is what is distilled, from π_0 again. Signals are made before, with one policy in memory at a time
(`posttrain.rollouts.static`). In both phases only the policy that learns is in memory, and a batch is one forward.

Sourced (the abstract of the paper, its authors' model cards and readers' notes): the two phases; a fixed set of
rollouts (1,000 prompts × 16); weak or no constraint in the first, a trust region in the second; token-level log-ratios
as supervision; SAPO or CE for strong teachers, MSE with an unlearned policy as reference for weak ones; several rounds,
each anchored to the policy that it starts from. SAPO's gate and its temperatures are sourced from SAPO's own paper.
Reconstructed, because the equations were not available to us: everything else, namely the forms of `is`, `ce`, `sft`
and `mse`, Â → −Â for unlearning, all transforms of the signal, both trust regions, and every default below that is not
called the paper's. Where readings differ, there is a setting.

Where the KL is measured. The data are π_0's, so a mean over them is an expectation under π_0, as far as all answers to
a prompt were kept: of prompts that are sometimes right and sometimes wrong. Per token, in nats:

- `kl/forward`: ρ − 1 − log ρ; estimates KL(π_0‖π_θ), the *forward* KL. `kl_target` is compared with it.
- `kl/forward_k1`: −log ρ; the same expectation with more variance, and negative at times.
- `kl/reverse`: ρ log ρ − ρ + 1; estimates KL(π_θ‖π_0) of the next token *after prefixes that π_0 wrote*. The KL of what
  π_θ itself writes, which a report of a policy calls KL, needs samples of π_θ: no mean over these data is it. A policy
  that has found a region π_0 never wrote has a small one here.

Above `log_ratio_clamp` nats the three go on along their tangents. All metrics of a step are of the policy before its
update, means over its tokens in all processes:

- `log_ratio/right`, `log_ratio/wrong`: d over the tokens of right and of wrong answers (nats).
- `clip_ratio/signal`: of the tokens with δ̂ ≠ 0, or Â ≠ 0 when extracting, the fraction whose ratio is clipped; with
  trust_region clip or extract_loss clip. `clip_fraction_stop` is compared with it.
- `signal/mean`, `signal/size`, `signal/zero`: mean of δ̂, of |δ̂|, and the fraction of tokens with δ̂ = 0; distil only.
- `entropy` (nats), and `stop/<metric>`: which target ended the run, and its value (`posttrain.seams.static`).

Source: ERPD, arXiv 2605.25582; SAPO, arXiv 2511.20347. Differs: not known in detail, see above. An rms over the answers
of an optimiser step in all processes, never of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from posttrain.errors import UserError
from posttrain.objectives.divergences import token_divergence
from posttrain.objectives.extraction import LOSSES, PER_ANSWER, check_beta, check_clamp, extraction_loss
from posttrain.objectives.signals import DIVERGENCES, SCALES, TRUST_REGIONS, distillation_loss, scaled, shaped
from posttrain.seams.on_policy import Metrics, Tokens
from posttrain.seams.static import StaticConfig, StaticTrainer, require_columns

PHASES = ("extract", "distil")

KL_COEF = {"clip": 1e-3, "kl": 1.0}
"""What `kl_coef` is unless it is set."""


@dataclass
class ERPDConfig(StaticConfig):
    """Settings of both phases of ERPD. Defaults are ours, reconstructed, unless their help says whose they are.

    Raises:
        ValueError: a setting is unknown, out of range, or would have no effect.
    """

    phase: str = field(
        default="extract", metadata={"help": "extract (optimise far for a scorer) or distil (learn from its signal)."}
    )
    # extract
    extract_loss: str = field(
        default="sapo", metadata={"help": "sapo, is, ce, sft, mse, or clip (a baseline). Paper: sapo or ce, or mse."}
    )
    unlearn: bool = field(
        default=False,
        metadata={"help": "Train the other way, with −Â and 1 − r (sft: on wrong answers), for a reference."},
    )
    implicit_beta: float = field(
        default=0.1, metadata={"help": "β of the implicit reward β Σ d of an answer (reward per nat), for ce and mse."}
    )
    kl_target: float | None = field(
        default=None,
        metadata={"help": "Stop and save once kl/forward (nats per token) of a step has reached this; both phases."},
    )
    # distil
    trust_region: str = field(default="clip", metadata={"help": "clip (with a small KL) or kl (nothing is clipped)."})
    kl_coef: float | None = field(
        default=None,
        metadata={"help": "c of clip, default 1e-3, or λ of kl, default 1 (units of the scaled signal per nat)."},
    )
    kl_divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "Penalty of clip on π_0's tokens: forward_kl (k3, ρ − 1 − log ρ) or reverse_kl (ρ log ρ − ρ + 1)."
        },
    )
    signal_scale: str = field(
        default="batch",
        metadata={"help": "Divide δ by its rms over a step's answers (batch), over all (data), or leave it (none)."},
    )
    signal_clip: float | None = field(
        default=3.0, metadata={"help": "Cut the scaled signal to ± this; null for no cut."}
    )
    dead_zone: float = field(default=0.0, metadata={"help": "Scaled signals smaller than this are 0."})
    verifier_gate: bool = field(
        default=False, metadata={"help": "Leave out tokens whose signal contradicts the answer's verdict."}
    )
    centre: bool = field(default=False, metadata={"help": "Subtract from an answer's signal its mean over tokens."})
    mask_end: bool = field(default=False, metadata={"help": "Leave out the signal of end-of-sequence tokens."})
    clip_fraction_stop: float | None = field(
        default=0.9,
        metadata={
            "help": "With trust_region clip: stop and save once clip_ratio/signal has reached this; null for never."
        },
    )
    log_ratio_clamp: float = field(
        default=10.0,
        metadata={"help": "Log-ratio (nats) above which ratios and divergences go on along their tangents."},
    )
    num_train_epochs: float = field(default=8.0, metadata={"help": "Passes over the rollouts."})
    sapo_temperature_pos: float = field(default=1.0, metadata={"help": "τ of sapo where Â > 0 (SAPO's paper: 1.0)."})
    sapo_temperature_neg: float = field(default=1.05, metadata={"help": "τ of sapo elsewhere (SAPO's paper: 1.05)."})

    def __post_init__(self) -> None:
        self._check_values()
        if self.phase == "extract":
            self._require_default(
                "in phase extract",
                "trust_region",
                "kl_coef",
                "kl_divergence",
                "signal_scale",
                "signal_clip",
                "dead_zone",
                "verifier_gate",
                "centre",
                "mask_end",
                "clip_fraction_stop",
            )
            loss = f"with extract_loss {self.extract_loss}"
            if self.extract_loss not in PER_ANSWER:
                self._require_default(loss, "implicit_beta")
            else:
                self._require_default(f"{loss}, which is averaged over answers", "loss_type")
            if self.extract_loss != "sapo":
                self._require_default(loss, "sapo_temperature_pos", "sapo_temperature_neg")
            if self.extract_loss != "clip":
                self._require_default(loss, "epsilon", "epsilon_high", "delta")
        else:
            self._require_default(
                "in phase distil",
                "extract_loss",
                "unlearn",
                "implicit_beta",
                "delta",
                "sapo_temperature_pos",
                "sapo_temperature_neg",
            )
            if self.trust_region == "kl":
                self._require_default(
                    "with trust_region kl", "kl_divergence", "clip_fraction_stop", "epsilon", "epsilon_high"
                )
        super().__post_init__()

    def _check_values(self) -> None:
        known = {
            "phase": PHASES,
            "extract_loss": LOSSES,
            "trust_region": TRUST_REGIONS,
            "kl_divergence": DIVERGENCES,
            "signal_scale": SCALES,
        }
        for name, values in known.items():
            value = getattr(self, name)
            if value not in values:
                raise ValueError(f"unknown {name} '{value}'; known: {', '.join(values)}.")
        check_beta(self.implicit_beta)
        check_clamp(self.log_ratio_clamp)
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}.")
        for name in ("kl_target", "signal_clip"):
            value = getattr(self, name)
            if value is not None and not value > 0.0:
                raise ValueError(f"{name} must be positive, got {value}: leave it out for none.")
        if self.clip_fraction_stop is not None and not 0.0 < self.clip_fraction_stop <= 1.0:
            raise ValueError(f"clip_fraction_stop is a fraction above 0, got {self.clip_fraction_stop}.")
        if not 0.0 <= self.dead_zone < math.inf:
            raise ValueError(f"dead_zone must be finite and not negative, got {self.dead_zone}.")
        if self.signal_clip is not None and self.dead_zone > self.signal_clip:
            raise ValueError(
                f"dead_zone = {self.dead_zone} is larger than signal_clip = {self.signal_clip}: lower one of them."
            )
        if self.kl_coef is not None and not 0.0 <= self.kl_coef < math.inf:
            raise ValueError(f"kl_coef must be finite and not negative, got {self.kl_coef}.")
        if self.trust_region == "kl" and self.kl_coef == 0.0:
            raise ValueError("trust_region kl without a KL (kl_coef = 0) is none: set kl_coef.")

    def _require_default(self, where: str, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name} = {value!r} has no effect {where}: remove it.")

    @property
    def kl_weight(self) -> float:
        """c or λ."""
        return KL_COEF[self.trust_region] if self.kl_coef is None else self.kl_coef


class ERPDTrainer(StaticTrainer):
    """Either phase of ERPD on fixed rollouts.

    Args:
        model: π_0, in both phases.
        args: an `ERPDConfig`.
        train_dataset: rows of `posttrain.rollouts.static` with log π_0, and in phase distil with a signal.
        processing_class, callbacks, peft_config, …: as `StaticTrainer`.

    Raises:
        ValueError: an option of the config would be ignored.
        posttrain.errors.UserError: the data lack what the phase needs, or belong to another model.
    """

    _name = "ERPD"

    curves: ClassVar[dict[str, str]] = {
        "kl/forward": "KL(π₀‖π_θ) on π₀'s answers, nats per token",
        "log_ratio/right": "log-ratio of right answers, nats per token",
        "log_ratio/wrong": "log-ratio of wrong answers, nats per token",
    }
    """Metrics that a report draws beside those of every method."""

    def __init__(self, model: Any, args: ERPDConfig | None = None, train_dataset: Any = None, **kwargs: Any) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = ERPDConfig(f"{Path(name).name}-ERPD")
        self.further_columns = ("correct", "signals") if args.phase == "distil" else ("correct",)
        require_columns(train_dataset, self.further_columns)
        train_dataset = _learned(args, train_dataset)
        super().__init__(model, args=args, train_dataset=train_dataset, **kwargs)
        self._squares = self._summed_squares() if args.phase == "distil" and args.signal_scale != "none" else None

    def token_advantages(self, batch: dict[str, Tensor]) -> Tensor:
        """Â [B], negated to unlearn; or δ̂ [B, T]."""
        if self.args.phase == "extract":
            return -batch["advantages"] if self.args.unlearn else batch["advantages"]
        found = scaled(self._shaped(batch), self._scale(), dead_zone=self.args.dead_zone, bound=self.args.signal_clip)
        del batch["signals"]
        return found

    def objective(self, tokens: Tokens) -> tuple[Tensor, Metrics]:  # type: ignore[override]
        """The loss per token; of `ce` and `mse`, which have one per answer (`penalty`), nothing but the metrics."""
        args, log_ratio = self.args, tokens.logps - tokens.old_logps
        if args.phase == "extract":
            per_answer = args.extract_loss in PER_ANSWER
            per_token = torch.zeros_like(tokens.logps) if per_answer else self._extraction(tokens)
        else:
            per_token = distillation_loss(
                log_ratio,
                tokens.advantages,
                trust_region=args.trust_region,
                kl_coef=args.kl_weight,
                epsilon_low=self.epsilon_low,
                epsilon_high=self.epsilon_high,
                divergence=args.kl_divergence,
                log_ratio_clamp=args.log_ratio_clamp,
            )
        return per_token, self._metrics_of(tokens, log_ratio.detach())

    def penalty(self, tokens: Tokens) -> tuple[Tensor, Metrics] | None:
        """`ce` or `mse`, to be averaged over answers."""
        if self.args.phase == "extract" and self.args.extract_loss in PER_ANSWER:
            return self._extraction(tokens), {}
        return None

    def targets(self, means: Mapping[str, float]) -> str | None:
        """`kl/forward` at `kl_target`, or `clip_ratio/signal` at `clip_fraction_stop` in phase distil."""
        limits = {"kl/forward": self.args.kl_target}
        if self.args.phase == "distil" and self.args.trust_region == "clip":
            limits["clip_ratio/signal"] = self.args.clip_fraction_stop
        for name, limit in limits.items():
            if limit is not None and means.get(name, -math.inf) >= limit:
                return name
        return None

    # ------------------------------------------------------------------ parts of the above

    def _extraction(self, tokens: Tokens) -> Tensor:
        args, rewards = self.args, tokens.extra["rewards"]
        return extraction_loss(
            args.extract_loss,
            tokens.logps,
            tokens.old_logps,
            tokens.mask,
            tokens.advantages,
            1.0 - rewards if args.unlearn else rewards,
            beta=args.implicit_beta,
            temperature_positive=args.sapo_temperature_pos,
            temperature_negative=args.sapo_temperature_neg,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=args.delta,
            log_ratio_clamp=args.log_ratio_clamp,
        )

    def _metrics_of(self, tokens: Tokens, log_ratio: Tensor) -> Metrics:
        args, correct = self.args, tokens.extra["correct"]
        clamp = args.log_ratio_clamp
        found = {
            "kl/forward": token_divergence("forward_kl", log_ratio, log_ratio_clamp=clamp),
            "kl/forward_k1": -log_ratio,
            "kl/reverse": token_divergence("reverse_kl", log_ratio, log_ratio_clamp=clamp),
            "log_ratio/right": log_ratio.masked_fill(~correct, torch.nan),
            "log_ratio/wrong": log_ratio.masked_fill(correct, torch.nan),
        }
        advantages = tokens.advantages.expand_as(log_ratio)
        if args.phase == "distil":
            found |= {
                "signal/mean": advantages,
                "signal/size": advantages.abs(),
                "signal/zero": (advantages == 0).float(),
            }
        if (args.trust_region if args.phase == "distil" else args.extract_loss) == "clip":
            ratio = log_ratio.clamp(max=clamp).exp()
            low = (ratio < 1.0 - self.epsilon_low) & (advantages < 0)
            high = (ratio > 1.0 + self.epsilon_high) & (advantages > 0)
            found["clip_ratio/signal"] = (low | high).float().masked_fill(advantages == 0, torch.nan)
        return found

    def _shaped(self, batch: Mapping[str, Tensor]) -> Tensor:
        args, ids = self.args, batch["completion_ids"]
        ends = torch.isin(ids, torch.tensor(self.eos_token_ids, device=ids.device)) if args.mask_end else None
        correct = batch["correct"] if args.verifier_gate else None
        return shaped(batch["signals"], batch["completion_mask"], correct=correct, ends=ends, centre=args.centre)

    def _summed_squares(self) -> Tensor:
        """Σ δ² of every answer, of signals shaped but not scaled, in float64: rms of any step follow from it."""
        found = []
        data: Any = self.train_dataset
        rows = data.select_columns(["completion_ids", "signals", "correct", *_UNREAD])
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            count = len(chunk["completion_ids"])
            batch = self._collate([{name: values[place] for name, values in chunk.items()} for place in range(count)])
            found.append(self._shaped(batch).double().square().sum(dim=1))
        squares = torch.cat(found)
        if not bool(squares.isfinite().all()):
            raise UserError("The signals of some answers are not finite: score them again.")
        return squares

    def _scale(self) -> float:
        """What δ is divided by in the coming micro-batch; the same in all micro-batches and processes of a step."""
        if self._squares is None:
            return 1.0
        whole = self.args.signal_scale == "data"
        places = slice(None) if whole else self._order.of_step(self.state.global_step)
        return math.sqrt(float(self._squares[places].sum() / self._lengths[places].sum()))


_CHUNK = 256
"""Answers whose signals are read at a time."""

_UNREAD = ("prompt_ids", "rewards", "advantages", "old_logps")
"""Columns that a micro-batch consists of, too."""


def _learned(args: ERPDConfig, rows: Any) -> Any:
    """The answers that take part: of `sft` those of one verdict, of all other losses all.

    Raises:
        posttrain.errors.UserError: there are none, or `ce` has a reward that is no probability.
    """
    if args.phase == "extract" and args.extract_loss == "sft":
        places = [place for place, right in enumerate(rows["correct"]) if bool(right) != args.unlearn]
        if not places:
            raise UserError(f"There is no {'wrong' if args.unlearn else 'right'} answer to fine-tune on.")
        return rows.select(places)
    if args.phase == "extract" and args.extract_loss == "ce":
        outside = [reward for reward in rows["rewards"] if not 0.0 <= reward <= 1.0]
        if outside:
            raise UserError(
                f"extract_loss ce takes rewards from 0 to 1, and one is {outside[0]:g}: choose another loss."
            )
    return rows


Config = ERPDConfig
Trainer = ERPDTrainer
