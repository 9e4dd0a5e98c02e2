"""Distillation from a teacher on the student's own answers: loss, advantage and reward forms, and a ratio (TRRD).

The student π_θ wrote the tokens, the frozen teacher π_T scored them. With R = log π_T − log π_θ of a token (nats), what
is minimised decides which divergence goes down. Expected gradients, on tokens drawn from π_θ, per token:

    k1 = −R                       0: E[∇ log π_θ] = 0, so no teacher is left in it; refused as a loss
    −sg[R] log π_θ, or ρ sg[−R]   ∇KL(π_θ‖π_T): the advantage form
    k2 = ½ R²                     ∇KL(π_θ‖π_T): the same gradient on every single token
    k3 = e^R − R − 1              ∇KL(π_T‖π_θ): the *forward* KL
    ρ k3, ρ = π_θ/π_old           ∇KL(π_θ‖π_T): the same gradient on every single token
    whole vocabulary              ∇KL(π_θ‖π_T) without sampling noise

All of this is per token given its prefix: that a token also leads to prefixes where the teacher disagrees (the
reward-to-go of a sequence-level KL) is left out, as everywhere in the literature. Nothing here weights or averages:
the coefficient β, the [B, 1] weights of this module and `reduce` are multiplied in by the caller.

Sources: KDRL, arXiv 2506.02208; PACED, arXiv 2603.11178; RLAD/TRRD, arXiv 2602.22495.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor

from posttrain.objectives.divergences import MAX_LOG_RATIO_CLAMP, at_least_float32, token_divergence
from posttrain.objectives.policy import importance_ratio
from posttrain.objectives.reduce import LOSS_TYPES
from posttrain.objectives.vocabulary import (
    TOKENS_PER_TILE,
    WORDS_PER_TILE,
    Head,
    log_probs_at,
    topk_divergence,
    vocabulary_divergence,
)

LOG_RATIO_CLAMP = 10.0
"""|R| (nats) beyond which an estimator's gradient stays what it is at the clamp."""

SAMPLED_ESTIMATORS = ("k2", "k3", "bias_corrected_k3")
"""What `distillation_loss` computes, from the log-probs of the sampled tokens alone."""

ESTIMATORS = (*SAMPLED_ESTIMATORS, "full", "topk")
"""All that may be back-propagated; the last two compare distributions (`full_vocabulary`, `topk_vocabulary`)."""

MASKS = ("none", "response", "group")
"""Which answers are distilled: all, the wrong ones, or those in groups without a correct one."""

ANCHORS = ("geometric", "arithmetic")
"""How `trust_region_ratio` mixes π_old and π_T."""

CLAMP_GRADIENTS = ("hard", "straight_through")
"""What gradient the clamp of `trust_region_ratio` has outside its bounds: none, or that of the identity."""


# ---------------------------------------------------------------- estimators on sampled tokens


def check_estimator(name: str) -> None:
    """Refuse what must not be back-propagated, and what is unknown.

    Raises:
        ValueError: the name is k1, whose gradient has no teacher in it, or unknown.
    """
    if name == "k1":
        raise ValueError(
            "k1 = log π_θ − log π_T cannot be a loss: the teacher is a constant in it, and its expected gradient is 0; "
            "use k2, which has the gradient of the reverse KL, or the advantage form."
        )
    if name not in ESTIMATORS:
        raise ValueError(f"unknown estimator '{name}'; known: {', '.join(ESTIMATORS)}.")


def distillation_loss(
    estimator: str,
    logps: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"],
    teacher_logps: Float[Tensor, "B T"],
    *,
    log_ratio_clamp: float = LOG_RATIO_CLAMP,
) -> Float[Tensor, "B T"]:
    """One of `SAMPLED_ESTIMATORS` per token, to be minimised.

    Raises:
        ValueError: the estimator is k1, unknown or not one of sampled tokens, or the clamp is out of range.

    Source: KDRL, arXiv 2506.02208. Differs: as `k2`, `k3` and `bias_corrected_k3`.
    """
    check_estimator(estimator)
    if estimator == "k2":
        return k2(logps, teacher_logps, log_ratio_clamp=log_ratio_clamp)
    if estimator == "k3":
        return k3(logps, teacher_logps, log_ratio_clamp=log_ratio_clamp)
    if estimator == "bias_corrected_k3":
        return bias_corrected_k3(logps, old_logps, teacher_logps, log_ratio_clamp=log_ratio_clamp)
    raise ValueError(
        f"'{estimator}' compares next-token distributions, not log-probs of sampled tokens: call full_vocabulary or "
        "topk_vocabulary."
    )


def k1(logps: Float[Tensor, "B T"], teacher_logps: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """log π_θ − log π_T, whose mean over tokens from π_θ is KL(π_θ‖π_T); nats per token; a measure without gradient.

    Source: Schulman's k1. Differs: detached, because its gradient has expectation 0.
    """
    return -_log_ratio(logps, teacher_logps).detach()


def k2(
    logps: Float[Tensor, "B T"], teacher_logps: Float[Tensor, "B T"], *, log_ratio_clamp: float = LOG_RATIO_CLAMP
) -> Float[Tensor, "B T"]:
    """½ R², linear beyond the clamp, to be minimised; nats² per token; float32 at least.

    The slope in log π_θ is −clamp(R), on every token that of the advantage form. Inside the clamp it is `policy.kl_k2`.

    Raises:
        ValueError: the clamp is out of range.

    Source: KDRL, arXiv 2506.02208. Differs: the linear continuation. Clamping R inside the square would leave tokens
    that one of the two has lost without any gradient.
    """
    _require_clamp("log_ratio_clamp", log_ratio_clamp)
    gap = _log_ratio(logps, teacher_logps)
    return F.huber_loss(gap, torch.zeros_like(gap), reduction="none", delta=log_ratio_clamp)


def k3(
    logps: Float[Tensor, "B T"], teacher_logps: Float[Tensor, "B T"], *, log_ratio_clamp: float = LOG_RATIO_CLAMP
) -> Float[Tensor, "B T"]:
    """e^R − R − 1, on its tangent above the clamp, to be minimised; nats per token; float32 at least.

    Its value estimates KL(π_θ‖π_T), its gradient is that of KL(π_T‖π_θ), the *forward* KL. The slope in log π_θ, 1 −
    e^R, lies between 1 − e^clamp and 1: one token can outweigh 22,000 others at the default clamp.

    Raises:
        ValueError: the clamp is out of range.

    Source: Schulman's k3 with the teacher as reference, `policy.kl_k3`. Differs: the tangent above the clamp.
    """
    # E_θ[f(π_T/π_θ)] with f(u) = u − log u − 1: the token form of forward KL with the student as the one who wrote.
    return token_divergence("forward_kl", _log_ratio(logps, teacher_logps), log_ratio_clamp=log_ratio_clamp)


def bias_corrected_k3(
    logps: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"],
    teacher_logps: Float[Tensor, "B T"],
    *,
    log_ratio_clamp: float = LOG_RATIO_CLAMP,
) -> Float[Tensor, "B T"]:
    """ρ (e^R − R − 1) with a differentiable ρ = π_θ/π_old, to be minimised; nats per token; float32 at least.

    ρ k3 = π_T/π_old − ρ (R + 1), so its slope in log π_θ is exactly −ρ R; here it is −ρ clamp(R), on-policy that of
    `k2` on every token. Beyond the clamp the value is that at the clamp; the gradient is not.

    Raises:
        ValueError: the clamp is out of range.

    Source: TRL 1.16, `beta` with `use_bias_correction_kl`, the teacher in the reference's place.
    Differs: the gradient is written down instead of left to cancel. Autograd subtracts e^R from e^R, which in float32
    leaves noise beyond R ≈ 15. Clamping R first leaves ρ k3(clamp) as the slope beyond the clamp: +22,000 at 10 nats,
    where −10 is right. A tangent of k3 turns the sign there too.
    """
    gap = _clamped(logps, teacher_logps, log_ratio_clamp)
    ratio = importance_ratio(at_least_float32(logps), at_least_float32(old_logps))
    return ratio.detach() * torch.expm1(gap) - ratio * gap


def _log_ratio(logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """R, with gradient for the student."""
    return at_least_float32(teacher_logps).detach() - at_least_float32(logps)


def _clamped(logps: Tensor, teacher_logps: Tensor, clamp: float) -> Tensor:
    """clamp(R), without gradient."""
    _require_clamp("log_ratio_clamp", clamp)
    return _log_ratio(logps, teacher_logps).detach().clamp(-clamp, clamp)


def _require_clamp(name: str, clamp: float) -> None:
    if not 0.0 < clamp <= MAX_LOG_RATIO_CLAMP:
        raise ValueError(f"{name} must be positive and at most {MAX_LOG_RATIO_CLAMP:g} nats, got {clamp}.")


# ---------------------------------------------------------------- the other two forms


def teacher_advantage(
    old_logps: Float[Tensor, "B T"], teacher_logps: Float[Tensor, "B T"], *, log_ratio_clamp: float = LOG_RATIO_CLAMP
) -> Float[Tensor, "B T"]:
    """clamp(log π_T − log π_old), to be added to the advantages as Â + β w · this; nats per token; no gradient.

    On-policy the surrogate's gradient is then, on every token, that of GRPO + β w `k2`. Off-policy the two differ: this
    one is weighted and clipped with the importance ratio.

    Raises:
        ValueError: the clamp is out of range.

    Source: KDRL, arXiv 2506.02208. Differs: the clamp.
    """
    return _clamped(old_logps, teacher_logps, log_ratio_clamp)


def teacher_reward(
    old_logps: Float[Tensor, "B T"],
    teacher_logps: Float[Tensor, "B T"],
    mask: Num[Tensor, "B T"],
    *,
    log_ratio_clamp: float = LOG_RATIO_CLAMP,
) -> Float[Tensor, " B"]:
    """Mean of clamp(log π_T − log π_old) over an answer's tokens, to be added to rewards before they are normalised.

    Nats per token, no gradient; 0 for an answer without tokens. An ablation: reported to collapse.

    Raises:
        ValueError: the clamp is out of range.

    Source: KDRL, arXiv 2506.02208. Differs: the clamp.
    """
    gap = _clamped(old_logps, teacher_logps, log_ratio_clamp)
    return (gap * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


# ---------------------------------------------------------------- whole next-token distributions


def full_vocabulary(
    hidden: Float[Tensor, "N D"],
    head: Head,
    teacher_hidden: Float[Tensor, "N E"],
    teacher_head: Head,
    *,
    words: int | None = None,
    divergence: str = "reverse_kl",
    alpha: float | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, " N"]:
    """D_f(π_θ‖π_T) of next-token distributions, one per token, to be minimised; nats (χ², H², TV: 1); float32 at least.

    Exact and without clamp; neither logits [N, V] nor their gradient are ever held.

    Args:
        hidden: last hidden states of the student.
        head: its output head; whole, not sharded.
        teacher_hidden: last hidden states of the teacher, of any width.
        teacher_head: its output head.
        words: how many ids the tokenizer has, where the heads are padded to different numbers of rows: both
            distributions are then those over the first `words` ids. None compares all rows.
        divergence: any of the table; `reverse_kl` is KL(π_θ‖π_T).
        alpha: for "alpha" only.
        temperature: divides the logits of both.

    Raises:
        ValueError: `words` exceeds a head, or as `vocabulary_divergence`.
        posttrain.errors.UserError: the heads differ in size, and `words` is None.

    Source: the definition. Differs: nothing.
    """
    if words is not None:
        head, teacher_head = _first(head, words), _first(teacher_head, words)
    return vocabulary_divergence(
        hidden, head, teacher_hidden, teacher_head, divergence, alpha=alpha, temperature=temperature
    )


def _first(head: Head, words: int) -> Head:
    """A head without its padding rows."""
    if not 0 < words <= head.weight.size(0):
        raise ValueError(f"words = {words} is not between 1 and {head.weight.size(0)}, the rows of an output head.")
    bias = None if head.bias is None else head.bias[:words]
    return dataclasses.replace(head, weight=head.weight[:words], bias=bias)


@torch.no_grad()
def top_words(hidden: Float[Tensor, "N D"], head: Head, k: int) -> Int[Tensor, "N K"]:
    """The k most probable next words of each token, most probable first; logits are held one tile at a time.

    Args:
        hidden: last hidden states, of the student for `topk_vocabulary`.
        head: the output head; whole, not sharded.
        k: how many, between 1 and V.

    Raises:
        ValueError: k is out of range.
    """
    weight, bias = head.weight, head.bias
    if not 0 < k <= len(weight):
        raise ValueError(f"k = {k} is not between 1 and {len(weight)}, the words of the vocabulary.")
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    found = []
    for rows in hidden.to(dtype).split(TOKENS_PER_TILE):
        values, ids = [], []
        for start in range(0, len(weight), WORDS_PER_TILE):
            words = slice(start, start + WORDS_PER_TILE)
            with torch.autocast(rows.device.type, enabled=False):  # scale and cap keep the order, so they are left out
                logits = F.linear(rows, weight[words].to(dtype), None if bias is None else bias[words].to(dtype))
            top = logits.topk(min(k, logits.size(1)))
            values.append(top.values)
            ids.append(top.indices + start)
        found.append(torch.cat(ids, dim=1).gather(1, torch.cat(values, dim=1).topk(k).indices))
    return torch.cat(found)


def topk_vocabulary(
    logps: Float[Tensor, "N K"],
    teacher_logps: Float[Tensor, "N K"],
    *,
    tail: bool,
    divergence: str = "reverse_kl",
    alpha: float | None = None,
) -> Float[Tensor, " N"]:
    """D_f(π_θ‖π_T) over K words of each token, to be minimised; nats (χ², H²: 1); float32 at least.

    Without `tail`, both distributions are renormalised over the K words, which must then be the *student's* K most
    probable (`top_words`). With it, all other words together are one more outcome, and any K < V words will do, the
    teacher's included. A sum over the teacher's K words that is neither is not offered: its gradient is mostly that of
    the student's mass on them.

    Args:
        logps: log π_θ of the words, over the whole vocabulary (`vocabulary.log_probs_at`).
        teacher_logps: log π_T of the same words, likewise.
        tail: keep the mass of all other words, as one outcome.
        divergence: any of the table; `reverse_kl` is KL(π_θ‖π_T).
        alpha: for "alpha" only.

    Raises:
        ValueError: a single word is renormalised, to 1 whatever the models say, or as `vocabulary.topk_divergence`.

    Source: KDRL's reverse KL on a subset; `vocabulary.topk_divergence`. Differs: nothing.
    """
    if tail:
        return topk_divergence(logps, teacher_logps, divergence, alpha=alpha)
    if logps.size(1) < 2:
        raise ValueError(
            "one word, renormalised, has probability 1 under both models: give at least 2, or tail = True."
        )
    # Of renormalised distributions the tail is the same least mass in both, and adds nothing.
    both = [at_least_float32(each).log_softmax(dim=-1) for each in (logps, teacher_logps)]
    return topk_divergence(both[0], both[1], divergence, alpha=alpha)


def topk_of_student(
    hidden: Float[Tensor, "N D"],
    head: Head,
    teacher_hidden: Float[Tensor, "N E"],
    teacher_head: Head,
    k: int,
    *,
    tail: bool,
    words: int | None = None,
    divergence: str = "reverse_kl",
    alpha: float | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, " N"]:
    """`topk_vocabulary` over the student's own k most probable words, from hidden states and heads; no logits [N, V].

    Args:
        k: how many, between 1 and `words`; with all of them it is `full_vocabulary`.
        tail, divergence, alpha: as `topk_vocabulary`.
        hidden, head, teacher_hidden, teacher_head, words, temperature: as `full_vocabulary`.

    Raises:
        ValueError: k is out of range, or as `topk_vocabulary`.

    Source: as `topk_vocabulary`. Differs: nothing.
    """
    if words is not None:
        head, teacher_head = _first(head, words), _first(teacher_head, words)
    ids = top_words(hidden, head, k)
    with torch.no_grad():
        teacher_logps = log_probs_at(teacher_hidden, teacher_head, ids, temperature=temperature)
    logps = log_probs_at(hidden, head, ids, temperature=temperature)
    return topk_vocabulary(logps, teacher_logps, tail=tail, divergence=divergence, alpha=alpha)


def topk_of_teacher(
    hidden: Float[Tensor, "N D"],
    head: Head,
    ids: Int[Tensor, "N K"],
    teacher_logps: Float[Tensor, "N K"],
    *,
    divergence: str = "reverse_kl",
    alpha: float | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, " N"]:
    """`topk_vocabulary` with a tail, over words of the teacher's choice, whose log-probs are all that it gives.

    A word beyond the student's head, which can be padded less than the teacher's, is one of the others.

    Args:
        hidden: last hidden states of the student.
        head: its output head; whole, not sharded.
        ids: the words.
        teacher_logps: log π_T of them, over the teacher's whole vocabulary and at `temperature`.
        divergence, alpha: as `topk_vocabulary`.
        temperature: divides the student's logits.

    Source: as `topk_vocabulary`. Differs: nothing.
    """
    size = head.weight.size(0)
    logps = log_probs_at(hidden, head, ids.clamp(max=size - 1), temperature=temperature)
    beyond = ids >= size
    both = (each.masked_fill(beyond, _NOTHING) for each in (logps, teacher_logps))
    return topk_vocabulary(*both, tail=True, divergence=divergence, alpha=alpha)


_NOTHING = -1e4
"""The log-probability of an outcome without any mass, in float32 and float64."""


# ---------------------------------------------------------------- where and how much to distil


def annealed_coefficient(step: int, *, initial: float, decay: float, minimum: float) -> float:
    """β_t = max(β_init − δ t, β_min) after t optimiser steps; reward per nat².

    Args:
        step: t, from 0.
        initial: β_init.
        decay: δ > 0, per optimiser step.
        minimum: β_min, at least 0 and below β_init.

    Raises:
        ValueError: the values anneal nothing.

    Source: KDRL, arXiv 2506.02208 (5e-3, 5e-5 and 1e-3: the floor is reached at step 80). Differs: nothing.
    """
    if not (0.0 <= minimum < initial < math.inf and 0.0 < decay < math.inf):
        raise ValueError(
            f"cannot anneal from {initial} to {minimum} by {decay} per step: it needs 0 ≤ minimum < initial and a "
            "positive decay."
        )
    return max(initial - decay * step, minimum)


def pass_rates(rewards: Float[Tensor, " B"], *, group_size: int, correct_threshold: float) -> Float[Tensor, "B 1"]:
    """The fraction of correct answers in the group of each answer; an answer without a reward (NaN) is not correct.

    Args:
        rewards: raw, neither centred nor scaled, of *whole* groups one after the other: gathered from all processes.
        group_size: answers per prompt.
        correct_threshold: an answer is correct when its reward is at least this.

    Raises:
        ValueError: the rewards are not whole groups.
    """
    correct = _correct(rewards, group_size, correct_threshold)
    return correct.mean(dim=1, keepdim=True).expand_as(correct).reshape(-1, 1)


def distillation_mask(
    kind: str, rewards: Float[Tensor, " B"], *, group_size: int, correct_threshold: float
) -> Float[Tensor, "B 1"]:
    """1 for the answers that are distilled: `none` all, `response` the wrong ones, `group` those of all-wrong groups.

    From raw rewards, for in an all-wrong group every advantage is 0, like in an all-correct one.

    Args:
        kind: one of `MASKS`.
        rewards, group_size, correct_threshold: as `pass_rates`.

    Raises:
        ValueError: unknown kind, or the rewards are not whole groups.

    Source: KDRL, arXiv 2506.02208. Differs: nothing.
    """
    if kind not in MASKS:
        raise ValueError(f"unknown mask '{kind}'; known: {', '.join(MASKS)}.")
    correct = _correct(rewards, group_size, correct_threshold)
    if kind == "none":
        return torch.ones_like(correct).reshape(-1, 1)
    if kind == "response":
        return (1.0 - correct).reshape(-1, 1)
    return (1.0 - correct.amax(dim=1, keepdim=True)).expand_as(correct).reshape(-1, 1)


def _correct(rewards: Tensor, group_size: int, correct_threshold: float) -> Tensor:
    """1 where an answer is correct, [prompts, group_size]."""
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards are no whole number of groups of {group_size} answers.")
    return (rewards >= correct_threshold).to(rewards.dtype).reshape(-1, group_size)


def paced_weights(rates: Float[Tensor, "B 1"], *, a: float = 1.0, b: float = 1.0) -> Float[Tensor, "B 1"]:
    """w(p) = p^a (1 − p)^b of the pass rate p, a factor on the distillation term; dimensionless.

    Most where the student is at its edge: largest at p = a/(a + b), there ¼ for a = b = 1, and not normalised. With a >
    0 it is 0 in all-wrong groups, so that nothing is left of it under the mask `group`.

    Raises:
        ValueError: a or b is negative.

    Source: PACED, arXiv 2603.11178. Differs: nothing.
    """
    if not (0.0 <= a < math.inf and 0.0 <= b < math.inf):
        raise ValueError(f"the exponents of p^a (1 − p)^b must be at least 0 and finite, got a = {a} and b = {b}.")
    return rates**a * (1.0 - rates) ** b


def over_kept(weights: Float[Tensor, "B 1"], lengths: Num[Tensor, "B 1"], *, loss_type: str) -> Float[Tensor, "B 1"]:
    """Weights, scaled so that `reduce` over all answers is the weighted mean over those that are kept; 0 if none is.

    Unscaled, answers that are not distilled stay in the denominator, and β acts in proportion to how many there are.
    Give it the answers of a whole optimiser step, of all processes: then the scale is one number.

    Args:
        weights: of each answer, 0 where it is not distilled.
        lengths: its tokens.
        loss_type: as in `reduce`. `grpo` and `dr_grpo` count answers, `dapo` counts tokens, and so does `bnpo`, exactly
            where a micro-batch is a whole step.

    Raises:
        ValueError: unknown loss type.

    Source: one reading of KDRL, arXiv 2506.02208, which leaves the denominator open. Differs: nothing.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"unknown loss_type '{loss_type}'; known: {', '.join(LOSS_TYPES)}.")
    units = lengths.to(weights.dtype) if loss_type in ("bnpo", "dapo") else torch.ones_like(weights)
    kept = (weights * units).sum()
    return torch.where(kept > 0, weights * units.sum() / kept, 0.0)


# ---------------------------------------------------------------- a ratio to a mixture of old policy and teacher


def check_trust_region(alpha: float, clamp: float, anchor: str, clamp_gradient: str) -> None:
    """Refuse settings of `trust_region_ratio` that are out of range.

    Raises:
        ValueError: α lies outside (0, 1], the clamp is out of range, or the anchor or the clamp's gradient is unknown.
    """
    if not 0.0 < alpha <= 1.0:
        raise ValueError(f"alpha must lie above 0 and at most at 1, got {alpha}: 1 is GRPO, the teacher has 1 − alpha.")
    _require_clamp("clamp", clamp)
    if anchor not in ANCHORS:
        raise ValueError(f"unknown anchor '{anchor}'; known: {', '.join(ANCHORS)}.")
    if clamp_gradient not in CLAMP_GRADIENTS:
        raise ValueError(f"unknown clamp_gradient '{clamp_gradient}'; known: {', '.join(CLAMP_GRADIENTS)}.")


def trust_region_ratio(
    logps: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"],
    teacher_logps: Float[Tensor, "B T"],
    *,
    alpha: float = 0.5,
    clamp: float = 1.0,
    anchor: str = "geometric",
    clamp_gradient: str = "hard",
) -> Float[Tensor, "B T"]:
    """π_θ over a mixture of π_old and π_T, for `clipped_surrogate` in place of the importance ratio; dimensionless.

        geometric    log r = α (log π_θ − log π_old) + (1 − α) clamp(log π_θ − log π_T, −c, c)
        arithmetic   r = π_θ / (α π_old + (1 − α) π_T)

    Clipping then stops the reinforcement of tokens that the teacher finds less likely than the student does, and the
    punishment of those that it finds more likely. No sign is turned, and Â = 0 gives no signal. α = 1 is π_θ/π_old.

    On tokens from π_old neither ratio has mean 1, so neither is an importance weight there; the arithmetic one would be
    on tokens from its mixture. It is at most (π_θ/π_old)/α, which is 1/α at θ_old.

    Args:
        logps: log π_θ, with gradient.
        old_logps: of the policy that generated.
        teacher_logps: of the teacher.
        alpha: weight of π_old, above 0 and at most 1.
        clamp: c (nats); for `geometric` only.
        anchor: one of `ANCHORS`.
        clamp_gradient: one of `CLAMP_GRADIENTS`: for |log π_θ − log π_T| ≥ c the slope of r in log π_θ is α r (`hard`)
            or r (`straight_through`); for `geometric` only.

    Raises:
        ValueError: as `check_trust_region`.

    Source: RLAD, arXiv 2602.22495, Eq. 3-5. Differs: `arithmetic` and `straight_through` are not in the paper.
    """
    check_trust_region(alpha, clamp, anchor, clamp_gradient)
    logps, old_logps, teacher_logps = (at_least_float32(each) for each in (logps, old_logps, teacher_logps.detach()))
    if anchor == "arithmetic":
        log_share = math.log1p(-alpha) if alpha < 1.0 else -math.inf
        teacher_part = log_share + (teacher_logps - old_logps)
        return torch.exp(logps - old_logps - torch.logaddexp(teacher_part.new_tensor(math.log(alpha)), teacher_part))
    gap = logps - teacher_logps
    bounded = F.hardtanh(gap, -clamp, clamp)  # unlike torch.clamp, it has no slope at the bounds themselves
    if clamp_gradient == "straight_through":
        bounded = bounded.detach() + (gap - gap.detach())
    return torch.exp(alpha * (logps - old_logps) + (1.0 - alpha) * bounded)
