"""DPH-RL: diversity-preserving hybrid RL. Reward where the policy still errs, rehearsal where it was good already.

    L = L_exp(D_exp) + η · L_pef(D_pef),     L_pef = E_ref[ l(log π_θ − log π_ref) ]

L_exp is the clipped surrogate on exploration prompts, without any KL. L_pef is an f-divergence to the initial policy
on *stored* answers to prompts that it solves already; they are never rolled out again, carry no reward, and their
log-probs come from the store. So there is no reference model in memory and no reference forward in training.

η multiplies the token mean over the stored rows of an optimiser step (`eta_scaling: direct`). The released code
averages micro-batches, so that its η acts as η · (stored rows / rollouts): `eta_scaling: paper` reproduces that, so
that published values transfer. For JS they double, because the released code minimises 2·JS: its headline η of 0.2 is
`eta: 0.4` with `eta_scaling: paper` here.

Baselines on the same code and data: `none` (no L_pef), and with an online reference, `js_definition`, `reverse_kl`
and `reverse_kl_k3`. The released "reverse KL" back-propagates k3 on rollouts, whose gradient is the *forward* KL's;
ours is k2, and `reverse_kl_k3` reproduces the release. `js_definition` takes π_ref's half of JS from stored answers
and π_θ's half from rollouts, so its halves see different prompts (D_pef and D_exp).

Metrics, each a mean over tokens of all processes: `pef/divergence` (L_pef in nats, over stored tokens),
`pef/log_ratio` (log π_θ − log π_ref, nats, over stored tokens), `pef/log_ratio_abs` (its absolute value),
`kl` (nats, over rollout tokens; baselines with an online reference only), and those of `posttrain.seams.on_policy`.
Source: "The Choice of Divergence", arXiv 2509.07430 (ICLR 2026), and the released code where the text is silent.
Differs: the token mean spans the whole optimiser step, not a micro-batch; stored rows are spread over all processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from posttrain.errors import UserError
from posttrain.objectives.divergences import (
    MAX_LOG_RATIO_CLAMP,
    NAMES,
    form,
    js_policy_half,
    js_reference_half,
    token_divergence,
)
from posttrain.objectives.policy import importance_ratio, kl_k2, kl_k3
from posttrain.rollouts.fingerprint import differs, fingerprint
from posttrain.rollouts.replay import Replay, StoredAnswer
from posttrain.rollouts.store import Store, prompt_id
from posttrain.seams.on_policy import GRPOConfig, Metrics, OnPolicyTrainer, StoredTokens, Tokens
from posttrain.seams.vision import stored_fields
from posttrain.tasks import shown

ONLINE_REFERENCE = ("js_definition", "reverse_kl", "reverse_kl_k3")
"""Divergences that are computed on rollouts and need the reference model in memory."""

WITHOUT_STORE = ("none", "reverse_kl", "reverse_kl_k3")
"""Divergences that rehearse nothing; with a store they train on its exploration prompts all the same."""

DIVERGENCES = (*(name for name in NAMES if name != "reverse_kl"), "none", *ONLINE_REFERENCE)


@dataclass
class DPHConfig(GRPOConfig):
    """Settings of DPH-RL; the defaults are the paper's.

    Raises:
        ValueError: a setting is unknown, out of range, or would have no effect.
    """

    divergence: str = field(
        default="js",
        metadata={
            "help": "What is minimised on stored answers: forward_kl, js, alpha, chi2, hellinger, jeffreys or "
            "chi2_kl; none; or with an online reference, js_definition, reverse_kl (k2) or reverse_kl_k3 (the released "
            "baseline)."
        },
    )
    alpha: float | None = field(
        default=None, metadata={"help": "Order of the α-divergence, in (0, 1); for divergence = alpha only."}
    )
    eta: float = field(default=0.2, metadata={"help": "η, the weight of L_pef (dimensionless)."})
    eta_scaling: str = field(
        default="direct",
        metadata={
            "help": "direct: η times the token mean over stored rows; paper: η · (stored rows / rollouts) times it, as "
            "in the released code, so that published values transfer."
        },
    )
    replay_ratio: float = field(
        default=0.125,
        metadata={"help": "Stored rows per rollout, over an optimiser step (paper: 256 to 128 × 16 rollouts)."},
    )
    log_ratio_clamp: float = field(
        default=5.0, metadata={"help": "Log-ratio (nats) above which a divergence continues along its tangent."}
    )
    reference_tolerance: float = field(
        default=0.05,
        metadata={
            "help": "Largest mean |log π_θ − log π_ref| (nats per token) on stored answers before the first update; "
            "more means that the store belongs to another model, dtype or temperature, and stops the run."
        },
    )
    # Where the paper departs from TRL's defaults.
    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate (paper: 1e-6, constant)."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning-rate schedule (paper: constant)."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay (paper: 0.01)."})
    num_generations: int | None = field(default=16, metadata={"help": "Answers per prompt, G (paper: 16)."})
    epsilon_high: float | None = field(default=0.28, metadata={"help": "Upper clip of the ratio (paper: 0.28)."})
    delta: float | None = field(default=3.0, metadata={"help": "Dual clip of the ratio for Â < 0 (paper: 3.0)."})

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"unknown divergence '{self.divergence}'; known: {', '.join(DIVERGENCES)}.")
        if self.divergence in NAMES and self.divergence not in ONLINE_REFERENCE:
            form(self.divergence, self.alpha)
        elif self.alpha is not None:
            raise ValueError(f"alpha = {self.alpha} has no effect on the divergence '{self.divergence}': remove it.")
        if self.eta_scaling not in ("direct", "paper"):
            raise ValueError(f"unknown eta_scaling '{self.eta_scaling}'; known: direct, paper.")
        if not 0.0 <= self.eta < math.inf:
            raise ValueError(f"eta must be a finite number ≥ 0, got {self.eta}.")
        if not 0.0 < self.replay_ratio < math.inf:
            raise ValueError(
                f"replay_ratio must be a positive number, got {self.replay_ratio}: to rehearse nothing, set divergence "
                "= none."
            )
        if not 0.0 < self.log_ratio_clamp <= MAX_LOG_RATIO_CLAMP:
            raise ValueError(
                f"log_ratio_clamp must be positive and at most {MAX_LOG_RATIO_CLAMP:g}, got {self.log_ratio_clamp}."
            )
        if not self.reference_tolerance > 0.0:
            raise ValueError(f"reference_tolerance must be positive, got {self.reference_tolerance}.")
        # TRL keeps a reference model exactly when beta is not zero, so beta carries η where one is needed.
        wanted = self.eta if self.divergence in ONLINE_REFERENCE else 0.0
        if self.beta not in (0.0, wanted):
            raise ValueError(
                f"beta = {self.beta} would add a second KL to DPH-RL: leave it at 0 and set eta and divergence instead."
            )
        self.beta = wanted
        super().__post_init__()  # type: ignore[no-untyped-call]

    @property
    def rehearses(self) -> bool:
        """Whether stored answers take part in the loss."""
        return self.divergence not in WITHOUT_STORE and self.eta > 0


class DPHTrainer(OnPolicyTrainer):
    """DPH-RL on a store of pre-sampled answers.

    Args:
        model, reward_funcs, train_dataset, …: as `trl.GRPOTrainer`. `train_dataset` holds all prompts; those that the
            store found near-perfect are taken out of it here.
        args: a `DPHConfig`.
        store: the pre-sampled answers of this very model (`posttrain presample`, or
            `posttrain.rollouts.presample.presample`), opened or as a path. Optional for `none`, `reverse_kl` and
            `reverse_kl_k3`, which then train on all prompts.

    Raises:
        ValueError: an option of the config would be ignored.
        posttrain.errors.UserError: the store is missing, has nothing to rehearse, or belongs to another model,
            tokenizer, temperature or data set.
    """

    _name = "DPH-RL"

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: DPHConfig | None = None,
        train_dataset: Any = None,
        *,
        store: Store | str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = DPHConfig(f"{Path(name).name}-DPH")
        opened = Store.open(store) if isinstance(store, str | Path) else store
        self.require_store(args, opened)
        rows = train_dataset
        if opened is not None:
            if isinstance(model, str):
                opened.require_files(model)
            explored = opened.exploration(_prompts(rows))
            train_dataset = rows.select(explored)
        super().__init__(model, reward_funcs=reward_funcs, args=args, train_dataset=train_dataset, **kwargs)
        if opened is not None:
            _require_model(opened, self.model, self.processing_class)
            if args.rehearses:
                self._prepare_replay(opened, rows, explored)

    @staticmethod
    def require_store(args: DPHConfig, store: Store | None) -> None:
        """Refuse a store, or its absence, with which `args` cannot train; before any weights are needed.

        Raises:
            posttrain.errors.UserError: there is none, it is of another temperature, or has nothing to rehearse.
        """
        if store is None:
            if args.divergence not in WITHOUT_STORE:
                raise UserError(
                    f"The divergence '{args.divergence}' rehearses stored answers: pass store=… (make one with "
                    "`posttrain presample`)."
                )
            return
        found = store.identity["training_temperature"]
        if not math.isclose(found, args.temperature):
            raise UserError(
                f"The store {store.path} holds log-probs at temperature {found:g}, but the run trains at "
                f"{args.temperature:g}: presample again or change the temperature."
            )
        if args.rehearses and not store.counts["stored_answers"]:
            raise UserError(
                f"The store {store.path} holds no near-perfect prompt to rehearse: lower pef_threshold, or set "
                "divergence = none."
            )

    def _prepare_replay(self, store: Store, rows: Any, explored: Sequence[int]) -> None:
        args = self.args
        rollouts = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
        self.replay_rows = max(1, round(args.replay_ratio * rollouts))
        images = StoredImages(store, rows, explored) if "images" in rows.column_names else None
        self.replay = Replay(store.answers, seed=args.seed, images=images)
        if images is not None:
            shows = next((answer for answer in store.answers if images(answer)), None)
            if shows is not None:  # refuses what cannot be rehearsed
                stored_fields(self.processing_class, images(shows), shows.prompt_ids)
        scale = self.replay_rows / rollouts if args.eta_scaling == "paper" else 1.0
        self.rehearsal_weight = args.eta * scale

    def objective(self, tokens: Tokens) -> tuple[Tensor, Metrics]:  # type: ignore[override]
        """L_exp: GRPO without a KL; the baselines with an online reference add theirs here."""
        kind = self.args.divergence
        per_token, metrics = self.policy_gradient(tokens)
        if kind not in ONLINE_REFERENCE or self.args.eta == 0:
            return per_token, metrics
        ref_logps = tokens.extra["ref_logps"]
        if kind == "reverse_kl":
            penalty = kl_k2(tokens.logps, ref_logps)
        elif kind == "reverse_kl_k3":
            penalty = kl_k3(tokens.logps, ref_logps)
        else:
            ratio = importance_ratio(tokens.logps, tokens.old_logps)
            penalty = 0.5 * js_policy_half(tokens.logps - ref_logps, ratio)
        metrics["kl"] = tokens.logps - ref_logps
        return per_token + self.args.eta * penalty, metrics

    def rehearsal(self, tokens: StoredTokens) -> tuple[Tensor, Metrics]:
        """L_pef: the divergence on stored answers, per token."""
        log_ratio = tokens.logps - tokens.stored_logps
        if self.args.divergence == "js_definition":
            per_token = 0.5 * js_reference_half(log_ratio, log_ratio_clamp=self.args.log_ratio_clamp)
        else:
            per_token = token_divergence(
                self.args.divergence,
                log_ratio,
                alpha=self.args.alpha,
                log_ratio_clamp=self.args.log_ratio_clamp,
            )
        return per_token, {
            "pef/divergence": per_token,
            "pef/log_ratio": log_ratio,
            "pef/log_ratio_abs": log_ratio.abs(),
        }

    def _measure(self, measured: Any, mode: str) -> None:
        super()._measure(measured, mode)
        gaps = self._metrics["train"].get("pef/log_ratio_abs")
        if self.state.global_step == 0 and gaps and gaps[-1] > self.args.reference_tolerance:
            raise UserError(
                f"Before the first update the policy differs from the store by {gaps[-1]:.3g} nats per token, more "
                f"than reference_tolerance = {self.args.reference_tolerance:g}: the store belongs to another model, "
                "dtype or temperature; presample again."
            )


class StoredImages:
    """The images of stored answers' prompts, read from their training rows when they are asked for.

    Args:
        store: holds the answers.
        rows: the data set, with a column `images`.
        explored: indices of the rows that are explored online, and so rehearse nothing.

    Raises:
        UserError: the prompt of a stored answer is not among the rows.
    """

    def __init__(self, store: Store, rows: Any, explored: Sequence[int]) -> None:
        self._rows = rows
        others = set(range(len(rows))) - set(explored)
        self._places = {prompt_id(shown(rows[index])): index for index in others}
        missing = {answer.prompt_id for answer in store.answers} - set(self._places)
        if missing:
            raise UserError(
                f"The store {store.path} rehearses {len(missing)} prompts that are not in the training data, so their "
                "images are not known: train on the data that were presampled."
            )

    def __call__(self, answer: StoredAnswer) -> Sequence[Any]:
        """The PIL images of the answer's prompt."""
        return self._rows[self._places[answer.prompt_id]]["images"] or ()


def _prompts(rows: Any) -> Iterable[Any]:
    """The prompts of a data set as the store knows them; images are decoded one row at a time."""
    if "images" not in rows.column_names:
        return list(rows["prompt"])
    return (shown(row) for row in rows.select_columns(["prompt", "images"]))


def _require_model(store: Store, model: PreTrainedModel, processing_class: Any) -> None:
    """Refuse a store that another model, tokenizer, chat template or image processor made."""
    what = differs(store.identity["model"], fingerprint(model, processing_class, adapters=False))
    if what is not None:
        raise UserError(
            f"The store {store.path} was made by another model: {what} differ from this run's; presample again with "
            "this model."
        )


Config = DPHConfig
Trainer = DPHTrainer
