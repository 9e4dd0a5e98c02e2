"""GRPO: group-relative policy optimisation, the baseline of every other method.

    L = −E[ min(r Â, clip(r, 1 − ε_low, 1 + ε_high) Â) ] + β KL(π_θ‖π_ref)

Â is the reward, centred and scaled within the group of answers to one prompt. Our seam's loss, equal to TRL's own
trainer in value and gradient; every default is TRL's (`loss_type: dapo`, `beta: 0`).

Metrics: those of `posttrain.seams.on_policy` and of TRL's GRPOTrainer.
Source: DeepSeekMath, arXiv 2402.03300. Differs: as TRL 1.16 does (no KL by default, token-mean over the batch).
"""

from __future__ import annotations

from posttrain.seams.on_policy import GRPOConfig, OnPolicyTrainer


class GRPOTrainer(OnPolicyTrainer):
    """TRL's GRPO objective on our seam. Arguments as `trl.GRPOTrainer`."""

    _name = "GRPO"


Config = GRPOConfig
Trainer = GRPOTrainer
