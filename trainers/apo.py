"""APO: Asymmetric Policy Optimization. Right answers are held to the initial policy less, long wrong ones pushed more.

    L = L_PG(s Â) + β mean_i( w_i KL_i ),     KL_i = mean over the tokens of answer i of k3(π_θ, π_ref)

DADS (difficulty-adaptive divergence shaping): w = 1 − exp(−e p) for a correct answer in a group of accuracy p between 0
and 1, and 1 for every other. STCR (suboptimal-trajectory complexity regularisation): s = 1 + u, u = 1 − c^(−Δ), for a
wrong answer that is Δ > 0 tokens longer than the group's correct answers on average, and 1 for every other. Â is GRPO's
advantage. L_PG is averaged as `loss_type` says, by default over the tokens of the batch; the KL over the tokens of an
answer and then over answers, or with `apo_kl_reduction: token` as L_PG. With w = s = 1 the latter is GRPO with β, and
so is the former where all answers have one length.

What is correct, one reward function says (`accuracy_reward`), never the sum of rewards: in that a wrong answer may be
ahead for its format. An answer without a verdict is neither correct nor wrong: w = s = 1, and it is in no mean. An
answer that was cut off counts as correct or wrong, but its length is in no mean.

Not TRL's `apo_zero` and `apo_down`, losses of DPO: those stand for *Anchored Preference Optimization*.

Metrics, and those of `posttrain.seams.on_policy`. Over the answers of a rollout batch of all processes, logged when it
is generated; a mean over nothing is not logged:

- `dads/weight_mean`: w over the answers that DADS takes for positive.
- `dads/effective_beta`: β times the mean of w over all answers.
- `stcr/factor_mean`: s over the answers with s > 1; `stcr/touched_fraction`: their fraction of all answers.
- `apo/length_correct`, `apo/length_wrong`: tokens of correct and of wrong answers, cut off or not; those that
  `mask_truncated_completions` takes out of the loss are left out.

Over the tokens of correct and of wrong answers of a micro-batch of all processes: `apo/entropy_correct`,
`apo/entropy_wrong` (nats).

Source: View-R1, arXiv 2506.21655, and the released code where the text is silent.
Differs: STCR leaves advantages that are not negative alone (`stcr_guard: false` scales those of wrong answers too), and
positive are the correct answers (`positive_by: advantage`: those with Â > 0); the released code does the others. TRL
adds 1e-4, not 1e-9, to the standard deviation of rewards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from posttrain.errors import UserError, did_you_mean
from posttrain.objectives.asymmetry import check_base, difficulty_weight, group_accuracy, suboptimal_length_factor
from posttrain.objectives.policy import kl_k3
from posttrain.rewards import RewardFunction
from posttrain.seams.on_policy import GRPOConfig, Metrics, OnPolicyTrainer, Tokens

REDUCTIONS = ("sequence", "token")
"""How the KL is averaged."""

POSITIVE_BY = ("accuracy", "advantage")
"""What makes an answer positive."""


@dataclass
class AsymmetricPOConfig(GRPOConfig):
    """Settings of APO; the defaults are the paper's.

    Raises:
        ValueError: a setting is unknown, out of range, or would have no effect.
    """

    apo_dads: bool = field(
        default=True, metadata={"help": "Weight the KL of correct answers by the difficulty of their prompt (DADS)."}
    )
    apo_stcr: bool = field(
        default=True, metadata={"help": "Scale the advantage of wrong answers by their length (STCR)."}
    )
    apo_kl_reduction: str = field(
        default="sequence",
        metadata={
            "help": "How the KL is averaged: sequence (over the tokens of an answer, then over answers), or token (as "
            "loss_type says, like GRPO's)."
        },
    )
    positive_by: str = field(
        default="accuracy",
        metadata={
            "help": "What DADS takes for positive: accuracy (correct answers) or advantage (those with a positive one, "
            "as the released code). Where a format reward is added, a wrong answer can have a positive advantage."
        },
    )
    stcr_base: float = field(
        default=1.00001,
        metadata={
            "help": "c of STCR, larger than 1. The released value scales by 1.01 at 1,000 tokens too many; 1.001 by "
            "1.63. Choose it by the lengths of the task."
        },
    )
    stcr_guard: bool = field(
        default=True,
        metadata={
            "help": "Scale negative advantages only; off, a long wrong answer with a positive one, for its format, is "
            "reinforced more (as the released code)."
        },
    )
    stcr_truncated: bool = field(
        default=True, metadata={"help": "Scale wrong answers that were cut off, too; their length is in no mean."}
    )
    accuracy_reward: str | None = field(
        default=None,
        metadata={
            "help": "Name of the reward that decides what is correct; default the only one that does, or the only one."
        },
    )
    correct_threshold: float = field(
        default=1.0, metadata={"help": "Value of that reward, without its weight, from which an answer is correct."}
    )
    # Where the paper departs from TRL's defaults.
    beta: float = field(default=1e-3, metadata={"help": "β, weight of the KL to the initial policy (paper: 1e-3)."})
    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate (paper: 1e-6)."})
    use_bias_correction_kl: bool = field(
        default=False, metadata={"help": "Must stay off: k3 carries no importance ratio here."}
    )

    def __post_init__(self) -> None:
        for name, known in (("apo_kl_reduction", REDUCTIONS), ("positive_by", POSITIVE_BY)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"unknown {name} '{value}'; known: {', '.join(known)}.")
        check_base(self.stcr_base)
        if not math.isfinite(self.correct_threshold):
            raise ValueError(f"correct_threshold must be finite, got {self.correct_threshold}.")
        if self.use_bias_correction_kl:
            raise ValueError(
                "use_bias_correction_kl multiplies the KL with the importance ratio, which APO's does not carry: "
                "leave it off."
            )
        if self.beta == 0.0:
            if self.apo_dads:
                raise ValueError("apo_dads has no effect without a KL (beta = 0): set beta, or apo_dads = false.")
            self._require_default("without a KL (beta = 0)", "apo_kl_reduction")
        if not self.apo_dads:
            self._require_default("without apo_dads", "positive_by")
        if not self.apo_stcr:
            self._require_default("without apo_stcr", "stcr_base", "stcr_guard", "stcr_truncated")
        if self.mask_truncated_completions:
            self._require_default("with mask_truncated_completions, which drops those answers", "stcr_truncated")
        super().__post_init__()  # type: ignore[no-untyped-call]

    def _require_default(self, where: str, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name} = {value!r} has no effect {where}: remove it.")


class AsymmetricPOTrainer(OnPolicyTrainer):
    """GRPO with a KL that depends on difficulty and advantages that depend on length.

    Args:
        model, reward_funcs, args, train_dataset, …: as `OnPolicyTrainer`; `args` is an `AsymmetricPOConfig`.

    Raises:
        ValueError: an option of the config would be ignored.
        posttrain.errors.UserError: it is not clear which reward function decides what is correct.
    """

    _name = "APO"

    curves: ClassVar[dict[str, str]] = {
        "apo/length_correct": "length of correct answers, tokens",
        "apo/length_wrong": "length of wrong answers, tokens",
    }
    """Metrics that a report draws beside those of every method."""

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: AsymmetricPOConfig | None = None,
        train_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = AsymmetricPOConfig(f"{Path(name).name}-APO")
        given = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        self.accuracy_column = self.require_rewards(args, [function for function in given if function is not None])
        super().__init__(model, reward_funcs=reward_funcs, args=args, train_dataset=train_dataset, **kwargs)

    @staticmethod
    def require_rewards(args: AsymmetricPOConfig, functions: Sequence[Any]) -> int:
        """Which of the reward functions decides what is correct.

        A verifier of the registry says itself whether it does; of others the only reward does, and one that is named.

        Raises:
            posttrain.errors.UserError: none of them does, more than one might, or the one that is named shapes.
        """
        names = [_name_of(function) for function in functions]
        wanted = args.accuracy_reward
        if wanted is not None:
            found = [index for index, name in enumerate(names) if name == wanted]
            if not found:
                raise UserError(f"accuracy_reward names no reward '{wanted}'{did_you_mean(wanted, names)}")
            if len(found) > 1:
                raise UserError(f"{len(found)} rewards are called '{wanted}', as accuracy_reward says: rename one.")
            if _decides(functions[found[0]]) is False:
                raise UserError(f"The reward '{wanted}' shapes and does not decide what is correct: name another one.")
            return found[0]
        deciding = [index for index, function in enumerate(functions) if _decides(function)]
        if not deciding and len(functions) == 1 and _decides(functions[0]) is None:
            deciding = [0]
        if len(deciding) != 1:
            what = "more than one of" if deciding else "none of"
            raise UserError(
                f"APO asks one reward which answers are correct, and {what} the rewards {', '.join(names) or '(none)'} "
                "decides that: name one in accuracy_reward, or add a verifier."
            )
        return deciding[0]

    def annotate(self, batch: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Of every answer [B, 1]: w, s, and its verdict (1 correct, 0 wrong, −1 none)."""
        mask = batch["completion_mask"]
        cut = self._cut_off(batch["completion_ids"], mask)
        if "tool_mask" in batch:
            mask = mask * batch["tool_mask"]
        known = [self.reward_columns[:, self.accuracy_column], mask.sum(dim=1), cut, batch["advantages"]]
        group: Any = self.num_generations if self.model.training else self.num_generations_eval
        # Groups may span processes: the statistics of all answers are computed in each of them.
        everyone = self.accelerator.gather(torch.stack([each.float() for each in known], dim=1))
        accuracy, lengths, cuts, advantages = everyone.view(-1, group, len(known)).unbind(dim=2)
        correct, wrong = accuracy >= self.args.correct_threshold, accuracy < self.args.correct_threshold
        found = {
            "apo_weights": self._weights(correct, wrong, advantages),
            "apo_factors": self._factors(correct, wrong, advantages, lengths, cuts.bool()),
            "apo_verdicts": correct.float() - (~correct & ~wrong).float(),
        }
        taking_part = lengths > 0
        self._log_means(
            {
                "apo/length_correct": lengths[correct & taking_part],
                "apo/length_wrong": lengths[wrong & taking_part],
            }
        )
        mine = slice(self.accelerator.process_index * len(mask), (self.accelerator.process_index + 1) * len(mask))
        return {name: value.reshape(-1, 1)[mine] for name, value in found.items()}

    def objective(self, tokens: Tokens) -> tuple[Tensor, Metrics]:  # type: ignore[override]
        """GRPO on scaled advantages, per token; with `apo_kl_reduction: token` also the weighted KL."""
        scaled = replace(tokens, advantages=tokens.advantages * tokens.extra["apo_factors"])
        per_token, metrics = self.policy_gradient(scaled)
        metrics[_VERDICTS] = tokens.extra["apo_verdicts"].expand_as(per_token)
        if self.beta != 0.0 and self.args.apo_kl_reduction == "token":
            weighted, more = self._weighted_kl(tokens)
            per_token, metrics = per_token + weighted, metrics | more
        return per_token, metrics

    def penalty(self, tokens: Tokens) -> tuple[Tensor, Metrics] | None:
        """β w KL per token, to be averaged over answers; none with `apo_kl_reduction: token`."""
        if self.beta == 0.0 or self.args.apo_kl_reduction == "token":
            return None
        return self._weighted_kl(tokens)

    # ------------------------------------------------------------------ parts of the above

    def _weighted_kl(self, tokens: Tokens) -> tuple[Tensor, Metrics]:
        kl = kl_k3(tokens.logps, tokens.extra["ref_logps"])
        return self.beta * tokens.extra["apo_weights"] * kl, {"kl": kl}

    def _weights(self, correct: Tensor, wrong: Tensor, advantages: Tensor) -> Tensor:
        """w of whole groups [N, G]."""
        if not self.args.apo_dads:
            return torch.ones_like(advantages)
        positive = correct if self.args.positive_by == "accuracy" else (correct | wrong) & (advantages > 0)
        weights = torch.where(positive, difficulty_weight(group_accuracy(correct, wrong)), 1.0)
        self._log_means({"dads/weight_mean": weights[positive], "dads/effective_beta": self.beta * weights.reshape(-1)})
        return weights

    def _factors(self, correct: Tensor, wrong: Tensor, advantages: Tensor, lengths: Tensor, cut: Tensor) -> Tensor:
        """s of whole groups [N, G]."""
        if not self.args.apo_stcr:
            return torch.ones_like(advantages)
        touchable = wrong if self.args.stcr_truncated else wrong & ~cut
        if self.args.stcr_guard:
            touchable = touchable & (advantages < 0)
        factors = suboptimal_length_factor(lengths, correct & ~cut, touchable, base=self.args.stcr_base)
        touched = factors > 1.0
        self._log_means({"stcr/factor_mean": factors[touched], "stcr/touched_fraction": touched.float().reshape(-1)})
        return factors

    def _cut_off(self, completion_ids: Tensor, mask: Tensor) -> Tensor:
        """Which answers [B] were cut off before their end, or are masked because they were."""
        last = (mask.sum(dim=1, keepdim=True) - 1).clamp(min=0)
        ends = torch.tensor([*self.eos_token_ids, self._tokenizer.pad_token_id], device=mask.device)
        return ~torch.isin(completion_ids.gather(1, last), ends).squeeze(1)

    def _log_means(self, values: Mapping[str, Tensor]) -> None:
        """Log the mean of each, unless it is of nothing; the same in every process."""
        mode = "train" if self.model.training else "eval"
        for name, value in values.items():
            if len(value):
                self._metrics[mode][name].append(float(value.mean()))

    def _measure(self, measured: Sequence[tuple[str, Tensor, Tensor]], mode: str) -> None:
        known = {name: (value, mask) for name, value, mask in measured}
        verdicts, mask = known.pop(_VERDICTS)
        entropy, _ = known["entropy"]
        split = [
            ("apo/entropy_correct", entropy, mask * (verdicts == 1.0)),
            ("apo/entropy_wrong", entropy, mask * (verdicts == 0.0)),
        ]
        super()._measure([*((name, *rest) for name, rest in known.items()), *split], mode)


_VERDICTS = "apo/verdicts"
"""Between `objective` and `_measure`: whose entropy is whose."""


def _decides(function: Any) -> bool | None:
    """Whether a reward function decides what is correct; None where it does not say."""
    return function.verifier.accuracy if isinstance(function, RewardFunction) else None


def _name_of(function: Any) -> str:
    """What TRL calls a reward function, or a reward model, in its metrics."""
    if isinstance(function, torch.nn.Module):
        model: Any = function
        function = model.config._name_or_path
    if isinstance(function, str):
        return function.rpartition("/")[2]
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


Config = AsymmetricPOConfig
Trainer = AsymmetricPOTrainer
