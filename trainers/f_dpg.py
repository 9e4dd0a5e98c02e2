"""f-DPG: a policy gradient that minimises any f-divergence to an explicit target distribution.

    p(y|x) = π_ref(y|x) φ(x, y)/Z_x,     ∇L = −E_π[ A(y) ∇ log π_θ(y|x) ],     A = −f'(π_θ/p) − baseline

φ = 1[r = 1] (`filter`: the initial policy, given that the verifier accepts) or e^{r/β} (`tilt`: the optimum of RLHF
with a KL of weight β). Where GRPO maximises a reward and so puts all its mass on a few right answers, f-DPG stops at p,
which keeps the proportions that the initial policy has among them. π is over whole answers, at the rollout temperature;
log-probs are summed over the tokens that the model wrote.

Z_x = E_ref[φ] is estimated from the G answers of every visit, mean of φ π_ref/π_old, and averaged over a prompt's
visits with weights m^age (`z_momentum` m). For a filter Z_x is a probability, so the average is capped at 1. A prompt
for which no answer had a positive weight so far has no target, and moves nothing. The averages belong to a checkpoint:
a resumed run continues with them.

The baseline is the mean over the *other* answers to the prompt, which leaves the expected gradient as it is. The loss
is −A π_θ/π_old per token, summed over an answer (`loss_type: dr_grpo`: ∇ log π_θ(y|x) is a sum, so whatever divides by
a length is refused); it is the equation's, divided by `max_completion_length`. TRL's clip stays on: on fresh answers
the ratio is 1 and it does nothing, and on answers that are used again it bounds the step as in PPO.

Costs: the reference model in memory and a forward of it per generation, and one more forward of the policy where TRL
has no log π_old (fresh answers).

Metrics, per generation, over all processes: `target/z` (Z_x, mean over prompts with a target), `target/undefined`
(share of prompts without one), `target/pseudo_reward` (−f'(t), mean over scored answers to prompts with a target; for
`reverse_kl` −KL(π_θ‖p) in nats), `kl` (log π_θ − log π_ref, nats, mean over tokens), and those of
`posttrain.seams.on_policy`. TRL's `reward` is the raw reward.
Source: "Aligning Language Models with Preferences through f-divergence Minimization", arXiv 2302.08215 (ICML 2023).
Differs: one Z per prompt, not for all; a leave-one-out baseline per prompt, not a running one over all answers;
pseudo-rewards continue linearly beyond e^8 (`posttrain.objectives.targets`); Z uses the trainer's log-probs also for
answers of a rollout engine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.errors import UserError
from posttrain.objectives.targets import (
    check,
    decayed_log_sum,
    leave_one_out,
    log_partition,
    log_weight,
    pseudo_reward,
)
from posttrain.seams.on_policy import GRPOConfig, Metrics, OnPolicyTrainer, Tokens
from posttrain.tasks import fingerprint

_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "loss_type": (("dr_grpo",), "the log-probs of an answer are summed, and the others divide by numbers of tokens"),
    "scale_rewards": (("none", False), "rewards define the target and are not scaled"),
    "multi_objective_aggregation": (("sum_then_normalize",), "rewards define the target and are not normalised"),
    "mask_truncated_completions": ((False,), "an answer without log-probs has no ratio to the target"),
    "sync_ref_model": ((False,), "the target is made of the initial policy"),
    "use_bias_correction_kl": ((True,), "there is no KL in the loss"),
    "top_p": ((1.0,), "Z_x is estimated from answers of the whole policy"),
    "top_k": ((0, None), "Z_x is estimated from answers of the whole policy"),
    "min_p": ((None, 0.0), "Z_x is estimated from answers of the whole policy"),
    "repetition_penalty": ((1.0,), "Z_x is estimated from answers of the policy as it is"),
}
"""Options of GRPO that would have no effect, or a wrong one: the values that are accepted, and why."""


@dataclass
class FDPGConfig(GRPOConfig):
    """Settings of f-DPG. `beta` is not one of them: it is 0 or unset, and TRL finds in it that a reference is needed.

    Raises:
        ValueError: a setting is unknown, out of range, or would have no effect.
    """

    divergence: str = field(
        default="js",
        metadata={
            "help": "D_f: forward_kl, js, alpha, total_variation or chi2_forward; with target = tilt also reverse_kl, "
            "chi2, jeffreys or chi2_kl, which are infinite on answers that a filter excludes."
        },
    )
    alpha: float | None = field(
        default=None,
        metadata={"help": "Order of the α-divergence: 0 is reverse KL, 1 forward KL; for divergence = alpha only."},
    )
    target: str = field(
        default="filter",
        metadata={"help": "filter: π_ref given reward 1; tilt: π_ref · exp(reward/target_beta), normalised."},
    )
    target_beta: float | None = field(
        default=None, metadata={"help": "β of the tilt (reward per nat); for target = tilt only, which needs it."}
    )
    z_momentum: float = field(
        default=0.9,
        metadata={
            "help": "Weight of a prompt's last estimate of Z against its newest, in [0, 1]; 1 is the plain mean of all "
            "visits, 0 the newest alone. Z does not move, but its estimates get better as the policy nears the target."
        },
    )
    # Where the equation departs from TRL's defaults.
    loss_type: str = field(default="dr_grpo", metadata={"help": "Sum over an answer's tokens; nothing else is f-DPG."})
    scale_rewards: str = field(default="none", metadata={"help": "Rewards define the target and are not scaled."})

    def __post_init__(self) -> None:
        check(self.divergence, self.target, self.alpha)
        if self.target == "tilt":
            if self.target_beta is None or not 0.0 < self.target_beta < math.inf:
                raise ValueError(f"target = tilt needs a positive target_beta, got {self.target_beta}.")
        elif self.target_beta is not None:
            raise ValueError(f"target_beta = {self.target_beta} has no effect on target = {self.target}: remove it.")
        if not 0.0 <= self.z_momentum <= 1.0:
            raise ValueError(f"z_momentum must lie between 0 and 1, got {self.z_momentum}.")
        for name, (accepted, reason) in _FIXED.items():
            value = getattr(self, name)
            if value not in accepted:
                raise ValueError(f"{name} = {value!r} is not f-DPG, because {reason}: set it to {accepted[0]!r}.")
        # TRL keeps a reference model exactly when beta is not zero.
        wanted = 1.0 if self.target_beta is None else self.target_beta
        if self.beta not in (0.0, wanted):
            raise ValueError(
                f"beta = {self.beta} would be ignored, because f-DPG has no KL in its loss: leave it at 0, and set "
                "target = tilt and target_beta for a target that keeps near the reference."
            )
        self.beta = wanted
        super().__post_init__()  # type: ignore[no-untyped-call]


class Partition:
    """Z_x of every prompt that was visited: the mean of its visits' estimates, with weight momentum^age.

    Args:
        momentum: in [0, 1].
    """

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self._sums: dict[int, tuple[float, float]] = {}
        """By prompt, log Σ momentum^age Ẑ and Σ momentum^age."""

    def visit(self, prompt: int, log_z: float) -> float:
        """Take in an estimate of log Z_x, unless it is NaN, and return the average; −∞ where it is zero or unknown."""
        log_sum, weight = self._sums.get(prompt, (-math.inf, 0.0))
        if not math.isnan(log_z):
            log_sum = decayed_log_sum(log_sum, log_z, self.momentum)
            weight = self.momentum * weight + 1.0
            self._sums[prompt] = (log_sum, weight)
        return log_sum - math.log(weight) if weight else -math.inf

    def save(self, path: Path) -> None:
        """Write all averages to a file."""
        sums = torch.tensor(list(self._sums.values()), dtype=torch.float64).reshape(-1, 2)
        torch.save({"prompts": torch.tensor(list(self._sums), dtype=torch.int64), "sums": sums}, path)

    def load(self, path: Path) -> None:
        """Take over the averages of a file."""
        found = torch.load(path, weights_only=True)
        pairs = zip(found["prompts"].tolist(), found["sums"].tolist(), strict=True)
        self._sums = {prompt: (log_sum, weight) for prompt, (log_sum, weight) in pairs}


class FDPGTrainer(OnPolicyTrainer):
    """f-DPG on rollouts. Arguments as `OnPolicyTrainer`; `args` is an `FDPGConfig`.

    Raises:
        ValueError: an option of the config would be ignored.
        posttrain.errors.UserError: a run is resumed from a checkpoint without averages of Z.
    """

    _name = "f-DPG"
    _Z_FILE = "f_dpg_z.pt"

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: FDPGConfig | None = None,
        train_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = FDPGConfig(f"{Path(name).name}-f-DPG")
        super().__init__(model, reward_funcs=reward_funcs, args=args, train_dataset=train_dataset, **kwargs)
        self.partition = Partition(args.z_momentum)

    def annotate(self, batch: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Each answer's advantage [B]: its pseudo-reward minus the others' mean, 0 where it has none."""
        training = self.model.training
        mask = batch["completion_mask"]
        if "tool_mask" in batch:
            mask = mask * batch["tool_mask"]
        log_ratio = ((self._old_logps(batch) - batch["ref_per_token_logps"]).float() * mask).sum(dim=1)
        # Groups may span processes: from here on every process computes the same for all answers.
        answers = self.accelerator.gather(torch.stack([log_ratio, self.raw_rewards.to(log_ratio)], dim=1))
        prompts = self.accelerator.gather(_fingerprints(batch["prompt_ids"], batch["prompt_mask"], rows))
        group = self.num_generations if training else self.num_generations_eval
        log_ratio, rewards = answers.view(-1, group, 2).unbind(dim=2)
        counted = ~rewards.isnan()
        log_weights = log_weight(self.args.target, rewards, beta=self.args.target_beta)
        log_z = log_partition(log_ratio, log_weights, counted)
        if training:
            visits = zip(prompts.view(-1, group)[:, 0].tolist(), log_z.tolist(), strict=True)
            log_z = torch.tensor([self.partition.visit(*visit) for visit in visits]).to(log_z)
        if self.args.target == "filter":
            log_z = log_z.clamp(max=0.0)

        defined = log_z > -torch.inf
        counted = counted & defined[:, None]
        log_t = torch.where(counted, log_ratio + log_z[:, None] - log_weights, 0.0)
        rewards = pseudo_reward(self.args.divergence, log_t, alpha=self.args.alpha)
        advantages = leave_one_out(rewards, counted).reshape(-1)

        metrics = self._metrics["train" if training else "eval"]
        metrics["target/undefined"].append(1.0 - defined.float().mean().item())
        if counted.any():
            metrics["target/z"].append(log_z[defined].exp().mean().item())
            metrics["target/pseudo_reward"].append(rewards[counted].mean().item())
        self._show(advantages)
        start = self.accelerator.process_index * len(rows)
        return {"target_advantages": advantages[start : start + len(rows)]}

    def objective(self, tokens: Tokens) -> tuple[Tensor, Metrics]:  # type: ignore[override]
        """−A π_θ/π_old per token, clipped, with the advantages of `annotate`."""
        advantages = tokens.extra["target_advantages"].unsqueeze(1)
        per_token, metrics = self.policy_gradient(replace(tokens, advantages=advantages))
        metrics["kl"] = tokens.logps - tokens.extra["ref_logps"]
        return per_token, metrics

    def _show(self, advantages: Tensor) -> None:
        """Put what trains in the place of TRL's advantages in its table of completions."""
        shown: Any = self._logs["advantages"]
        for _ in range(min(len(shown), len(advantages))):
            shown.pop()
        shown.extend(advantages.tolist())

    # ------------------------------------------------------------------ the averages of Z are part of a checkpoint

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[no-untyped-call]
        if self.args.should_save:
            self.partition.save(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / self._Z_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[no-untyped-call]
        if checkpoint is None:
            return
        path = Path(checkpoint) / self._Z_FILE
        if not path.is_file():
            raise UserError(
                f"The checkpoint {checkpoint} has no averages of Z ({self._Z_FILE}): it belongs to another method; "
                "train from the beginning."
            )
        self.partition.load(path)


def _fingerprints(prompt_ids: Tensor, prompt_mask: Tensor, rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """A number per prompt [B], int64, that depends on its tokens and images alone and not on its padding."""
    numbers = []
    for ids, kept, row in zip(prompt_ids, prompt_mask.bool(), rows, strict=True):
        content = repr(ids[kept].tolist())
        if row.get("images"):
            content += fingerprint([{"images": row["images"]}])
        digest = hashlib.sha256(content.encode()).digest()
        numbers.append(int.from_bytes(digest[:8], "big", signed=True))
    return torch.tensor(numbers, dtype=torch.int64, device=prompt_ids.device)


Config = FDPGConfig
Trainer = FDPGTrainer
