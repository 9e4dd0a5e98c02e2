"""f-DPO: direct preference optimisation under any admissible f-divergence.

    L = −E log σ( β s(d_w) − β s(d_l) ),     d = log π_θ(y|x) − log π_ref(y|x),     s(d) = f'(e^d) − f'(1)

w is the chosen and l the rejected answer; log-probs are summed over it. The reward that a policy implies is β s(d), up
to a constant of the prompt. Which divergence is asked for decides how far the policy spreads: reverse KL is DPO and
seeks modes, forward KL and α near 1 cover mass, JS lies between. Admissible is an f whose f' falls to −∞ at 0 and can
be inverted; χ², total variation and Hellinger are not, and are refused.

Divergences differ in the slope s'(0) with which training begins: ½ for JS, 2 for jeffreys and chi2_kl, 1 for the
others. `match_slope` divides β by it, so that all begin with reverse KL's gradient; docs compare both ways.

From TRL's DPOTrainer it differs thus. Its divergences are TRL's `f_divergence_type` where that is sound (equal in
value and gradient), jeffreys and chi2_kl come in addition. forward_kl and alpha continue linearly where TRL's
overflow (NaN) or are clamped (no gradient). alpha is the paper's a: TRL's coefficient is 1 − a. Every refusal comes at
construction. With reverse_kl all of TRL's losses (`loss_type: ipo`, …) remain, as they are.

Metrics: `loss` (nats per pair, mean over pairs), and over pairs of all processes `rewards/chosen`, `rewards/rejected`
(means of β s(d), dimensionless), `rewards/margins` (mean difference) and `rewards/accuracies` (fraction of pairs with
a positive one), β after `match_slope`; the others are TRL's.
Source: "Beyond Reverse KL", arXiv 2309.16240 (ICLR 2024). Differs: linear continuation; jeffreys and chi2_kl (mixed,
χPO, arXiv 2407.13399) are not in it; `match_slope`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from posttrain.objectives.divergences import MAX_LOG_RATIO_CLAMP
from posttrain.objectives.preference import check, loss, score, slope_at_one
from posttrain.seams.preference import DPOConfig, PreferenceTrainer, beyond_sigmoid


@dataclass
class FDPOConfig(DPOConfig):
    """Settings of f-DPO; the defaults are the paper's, except for its batch of 64 pairs, which machines decide on.

    Raises:
        ValueError: a setting is unknown, out of range, or would have no effect.
    """

    divergence: str = field(
        default="reverse_kl",
        metadata={"help": "D_f(π_θ‖π_ref): reverse_kl (DPO), forward_kl, js, alpha, jeffreys or chi2_kl."},
    )
    alpha: float | None = field(
        default=None,
        metadata={
            "help": "Order a of the α-divergence, for divergence = alpha only: 0 is reverse KL, 1 forward KL; 1 − a in "
            "TRL's f_alpha_divergence_coef."
        },
    )
    match_slope: bool = field(
        default=False,
        metadata={
            "help": "Divide β by the score's slope at u = 1, so that every divergence begins with reverse KL's "
            "gradient: 2β for js, β/2 for jeffreys and chi2_kl; the others have slope 1 and stay as they are."
        },
    )
    edge: float = field(
        default=8.0,
        metadata={
            "help": "Exponent at which a score that grows exponentially goes on linearly: |d| = edge nats, edge / a "
            "for alpha. reverse_kl and js need none."
        },
    )
    # The paper's settings, where TRL's defaults are others.
    beta: float = field(default=0.1, metadata={"help": "β, the weight of the divergence (paper: 0.1)."})
    optim: str = field(default="rmsprop", metadata={"help": "Optimiser (paper: RMSprop)."})
    learning_rate: float = field(default=5e-7, metadata={"help": "Peak learning rate (paper: 5e-7)."})
    lr_scheduler_type: str = field(
        default="constant_with_warmup", metadata={"help": "Learning-rate schedule (paper: constant after warm-up)."}
    )
    warmup_steps: float = field(default=150, metadata={"help": "Steps of linear warm-up (paper: 150)."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the pairs (paper: 1)."})

    def __post_init__(self) -> None:
        check(self.divergence, self.alpha)
        if not 0.0 < self.beta < math.inf:
            raise ValueError(f"beta must be a positive finite number, got {self.beta}.")
        if not 0.0 < self.edge <= MAX_LOG_RATIO_CLAMP:
            raise ValueError(f"edge must be positive and at most {MAX_LOG_RATIO_CLAMP:g}, got {self.edge}.")
        if self.f_divergence_type != "reverse_kl":
            raise ValueError(
                f"f_divergence_type = '{self.f_divergence_type}' is TRL's setting and would be ignored: set divergence "
                "(js for js_divergence, alpha for alpha_divergence) instead."
            )
        if self.f_alpha_divergence_coef != 0.5:
            raise ValueError(
                f"f_alpha_divergence_coef = {self.f_alpha_divergence_coef} is TRL's setting and would be ignored: set "
                f"alpha = {1.0 - self.f_alpha_divergence_coef:g} instead, because TRL's coefficient is 1 − alpha."
            )
        super().__post_init__()  # type: ignore[no-untyped-call]
        other = beyond_sigmoid(self)
        if other is not None and self.divergence != "reverse_kl":
            raise ValueError(f"The objective of divergence = '{self.divergence}' is not defined with {other}.")

    @property
    def score_beta(self) -> float:
        """The β that multiplies the score: `beta`, or with `match_slope` `beta` over the score's slope at u = 1."""
        return self.beta / slope_at_one(self.divergence, self.alpha) if self.match_slope else self.beta


class FDPOTrainer(PreferenceTrainer):
    """f-DPO on preference pairs.

    Args:
        model, ref_model, train_dataset, eval_dataset, processing_class, peft_config, …: as `trl.DPOTrainer`; data sets
            also as token ids (`PreferenceTrainer`).
        args: an `FDPOConfig`.
    """

    _name = "f-DPO"

    def __init__(self, model: Any, ref_model: Any = None, args: FDPOConfig | None = None, **kwargs: Any) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = FDPOConfig(f"{Path(name).name}-f-DPO")
        super().__init__(model, ref_model=ref_model, args=args, **kwargs)

    def objective(  # type: ignore[override]
        self, chosen_log_ratios: Tensor, rejected_log_ratios: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """softplus(−β (s(d_w) − s(d_l))) per pair, and the implicit rewards β s(d_w) and β s(d_l)."""
        name, alpha, edge, beta = self.args.divergence, self.args.alpha, self.args.edge, self.args.score_beta
        per_pair = loss(chosen_log_ratios, rejected_log_ratios, name, beta=beta, alpha=alpha, edge=edge)
        chosen, rejected = (
            beta * score(name, log_ratios, alpha=alpha, edge=edge)
            for log_ratios in (chosen_log_ratios, rejected_log_ratios)
        )
        return per_pair, chosen, rejected


Config = FDPOConfig
Trainer = FDPOTrainer
