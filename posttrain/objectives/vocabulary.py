"""f-divergences over whole vocabularies, from hidden states and output heads, without building logits [N, V].

For N tokens and a vocabulary of V words, the value and its gradient need log p and log q at every word once more than
memory can hold. They are made tile by tile: once for the two normalisers, once for the sums, and once for the gradient

    D = Σ_v q_v f(p_v/q_v),     ∂D/∂logits_v = p_v (f'(u_v) − Σ_w p_w f'(u_w)),     u = p/q,

so that memory holds one tile of tokens × words, whatever N and V are. Every summand has a closed form in log p and
log q (`posttrain.objectives.divergences`) that is exact at any ratio: nothing is clamped. Sums are in float32 (float64
for float64 input); χ² and its mixture are infinite there where their value exceeds 3·10³⁸.

Letters: N tokens, V words of the vocabulary, D and E widths of the two models, K words per token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain.errors import UserError
from posttrain.objectives.divergences import LOG_2, Divergence, at_least_float32, entry

TOKENS_PER_TILE = 1024
WORDS_PER_TILE = 4096
"""A tile is 16 MiB in float32, of which about ten are alive at a time."""


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states: logits = cap · tanh(scale · (W h + b) / cap), the cap where there is one.

    Attributes:
        weight: W, one row per word.
        bias: b.
        scale: 1 for most models; Cohere's `logit_scale`, Granite's 1 / `logits_scaling`.
        softcap: Gemma's `final_logit_softcapping`.
    """

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class HeadLayer:
    """An output head in its model, where training changes its weights and sharding takes them apart.

    Attributes:
        layer: the module.
        scale, softcap: as `Head`.
    """

    layer: Any
    scale: float = 1.0
    softcap: float | None = None

    def head(self) -> Head:
        """As it is now; its weights must be whole."""
        return Head(self.layer.weight, getattr(self.layer, "bias", None), self.scale, self.softcap)


class _Distributions:
    """Next-token distributions of N tokens, seen through tiles."""

    def __init__(self, hidden: Tensor, head: Head, temperature: float, tile: tuple[int, int]) -> None:
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"temperature must be a positive number, got {temperature}.")
        self.hidden, self.head, self.temperature, self.tile = hidden, head, temperature, tile
        self.dtype = torch.promote_types(hidden.dtype, head.weight.dtype)

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """(tokens, words), all tokens of the same words in a row."""
        (tokens, words), (count, size) = self.tile, (self.hidden.size(0), self.head.weight.size(0))
        for word, token in itertools.product(range(0, size, words), range(0, count, tokens)):
            yield slice(token, token + tokens), slice(word, word + words)

    def logits(self, tokens: slice, words: slice) -> Tensor:
        head = self.head
        bias = None if head.bias is None else head.bias[words].to(self.dtype)
        with torch.autocast(self.hidden.device.type, enabled=False):  # the backward pass does not run under it either
            raw = F.linear(self.hidden[tokens].to(self.dtype), head.weight[words].to(self.dtype), bias)
        logits = at_least_float32(raw) * head.scale
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        return logits / self.temperature

    def normalise(self) -> None:
        """Largest logit and log Σ exp(logit − largest), [N, 1] each: apart, no digits of likely words get lost."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        top = self.hidden.new_full((self.hidden.size(0), 1), -torch.inf, dtype=dtype)
        total = torch.zeros_like(top)
        for tokens, words in self.tiles():
            logits = self.logits(tokens, words)
            higher = torch.maximum(top[tokens], logits.amax(dim=-1, keepdim=True))
            here = (logits - higher).exp().sum(dim=-1, keepdim=True)
            total[tokens] = total[tokens] * (top[tokens] - higher).exp() + here
            top[tokens] = higher
        self.top, self.log_total = top, total.log()

    def logps(self, tokens: slice, words: slice) -> Tensor:
        return self.logits(tokens, words) - self.top[tokens] - self.log_total[tokens]

    def pull_back(
        self, gradient: Callable[[Tensor, slice, slice], Tensor], needed: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Gradients for hidden, weight and bias, of those that are needed.

        Args:
            gradient: (log-probs of a tile, its tokens, its words) → gradient for its logits.
            needed: for hidden, weight, bias.
        """
        head, dtype = self.head, self.top.dtype
        for_hidden = torch.zeros_like(self.hidden, dtype=dtype) if needed[0] else None
        for_weight = torch.zeros_like(head.weight) if needed[1] else None
        for_bias = torch.zeros_like(head.bias) if needed[2] and head.bias is not None else None
        for words, group in itertools.groupby(self.tiles(), key=lambda tile: tile[1]):
            weight = head.weight[words].to(self.dtype)
            of_weight, of_bias = torch.zeros_like(weight, dtype=dtype), weight.new_zeros(len(weight), dtype=dtype)
            for tokens, _ in group:
                logits = self.logits(tokens, words)
                pull = gradient(logits - self.top[tokens] - self.log_total[tokens], tokens, words)
                pull *= head.scale / self.temperature
                if head.softcap is not None:
                    pull *= 1.0 - (logits * (self.temperature / head.softcap)).square()
                of_bias += pull.sum(dim=0)
                pull = pull.to(self.dtype)
                with torch.autocast(self.hidden.device.type, enabled=False):
                    if for_hidden is not None:
                        for_hidden[tokens] += pull @ weight
                    if for_weight is not None:
                        of_weight += pull.T @ self.hidden[tokens].to(self.dtype)
            if for_weight is not None:
                for_weight[words] = of_weight.to(for_weight.dtype)
            if for_bias is not None:
                for_bias[words] = of_bias.to(for_bias.dtype)
        return None if for_hidden is None else for_hidden.to(self.hidden.dtype), for_weight, for_bias


def _sums(policy: _Distributions, reference: _Distributions, entries: Sequence[Divergence]) -> tuple[Tensor, Tensor]:
    """Σ_v q f(p/q) and Σ_v p f'(p/q) of several divergences, [divergences, N] each, in one pass."""
    values, pulls = policy.top.new_zeros(2, len(entries), policy.hidden.size(0))
    for tokens, words in policy.tiles():
        logps, ref_logps = policy.logps(tokens, words), reference.logps(tokens, words)
        for row, each in enumerate(entries):
            value, pull = each.terms(logps, ref_logps)
            values[row, tokens] += value.sum(dim=-1)
            pulls[row, tokens] += pull.sum(dim=-1)
    return values, pulls


class _VocabularyDivergence(torch.autograd.Function):
    """Σ_v q f(p/q) per token; gradients for hidden, weight and bias, which `policy` holds too."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        policy: _Distributions,
        reference: _Distributions,
        chosen: Divergence,
    ) -> Tensor:
        policy.normalise()
        reference.normalise()
        values, means = _sums(policy, reference, [chosen])
        ctx.save_for_backward(hidden, weight, bias, reference.hidden, reference.head.weight, reference.head.bias)
        ctx.policy, ctx.reference, ctx.chosen, ctx.mean = policy, reference, chosen, means[0][:, None]
        return values[0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # refuses tensors that were written to since
        reference: _Distributions = ctx.reference
        chosen: Divergence = ctx.chosen
        mean: Tensor = ctx.mean

        def gradient(logps: Tensor, tokens: slice, words: slice) -> Tensor:
            _, pull = chosen.terms(logps, reference.logps(tokens, words))
            return grad[tokens, None] * (pull - logps.exp() * mean[tokens])

        return (*ctx.policy.pull_back(gradient, ctx.needs_input_grad[:3]), None, None, None)


class _LogProbsAt(torch.autograd.Function):
    """Log-probs of the words `ids`; gradients for hidden, weight and bias, which `policy` holds too."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, policy: _Distributions, ids: Tensor
    ) -> Tensor:
        policy.normalise()
        found = policy.top.new_zeros(ids.shape)
        for tokens, words in policy.tiles():
            logps = policy.logps(tokens, words)
            inside, place = _places(ids[tokens], words)
            found[tokens] += logps.gather(1, place).masked_fill(~inside, 0.0)
        ctx.save_for_backward(hidden, weight, bias, ids)
        ctx.policy = policy
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids = ctx.saved_tensors[-1]
        total = grad.sum(dim=-1, keepdim=True)

        def gradient(logps: Tensor, tokens: slice, words: slice) -> Tensor:
            inside, place = _places(ids[tokens], words)
            return (-total[tokens] * logps.exp()).scatter_add_(1, place, grad[tokens].masked_fill(~inside, 0.0))

        return (*ctx.policy.pull_back(gradient, ctx.needs_input_grad[:3]), None, None)


def _places(ids: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Which ids lie in a tile, and their columns there (0 for the others)."""
    inside = (ids >= words.start) & (ids < words.stop)
    return inside, (ids - words.start).masked_fill(~inside, 0)


class _Summands(torch.autograd.Function):
    """q f(p/q) elementwise in log p and log q; gradient for log p."""

    @staticmethod
    def forward(ctx: Any, logps: Tensor, ref_logps: Tensor, chosen: Divergence) -> Tensor:
        value, pull = chosen.terms(logps, ref_logps)
        ctx.save_for_backward(pull)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (pull,) = ctx.saved_tensors
        return grad * pull, None, None


def vocabulary_divergence(
    hidden: Float[Tensor, "N D"],
    head: Head,
    ref_hidden: Float[Tensor, "N E"],
    ref_head: Head,
    name: str,
    *,
    alpha: float | None = None,
    temperature: float = 1.0,
    tokens_per_tile: int = TOKENS_PER_TILE,
    words_per_tile: int = WORDS_PER_TILE,
) -> Float[Tensor, " N"]:
    """D_f(π_θ‖π_ref) of next-token distributions, one per token; to be minimised; nats (χ², H², TV: 1); float32.

    Gradients go to `hidden`, to the policy's head weight and to its bias; none to the reference. What autograd keeps is
    the inputs and five numbers per token; the backward pass makes the logits again.

    Args:
        hidden: last hidden states of the policy.
        head: its output head; whole, not sharded.
        ref_hidden: last hidden states of the reference, of any width.
        ref_head: its output head, over the same words.
        name: any divergence of the table, `total_variation` included.
        alpha: for "alpha" only, strictly between 0 and 1.
        temperature: divides the logits of both.
        tokens_per_tile: tokens that are scored at a time.
        words_per_tile: words that are scored at a time.

    Raises:
        ValueError: unknown name, alpha missing, superfluous or out of range, or a temperature that is not positive.
        UserError: the vocabularies differ in size.

    Source: the definition. Differs: nothing.
    """
    chosen = entry(name, alpha)
    _same_words(head, ref_head)
    tile = (tokens_per_tile, words_per_tile)
    policy = _Distributions(hidden, head, temperature, tile)
    reference = _Distributions(ref_hidden, ref_head, temperature, tile)
    value: Tensor = _VocabularyDivergence.apply(hidden, head.weight, head.bias, policy, reference, chosen)  # type: ignore[no-untyped-call]
    return value


def log_probs_at(
    hidden: Float[Tensor, "N D"],
    head: Head,
    ids: Int[Tensor, "N K"],
    *,
    temperature: float = 1.0,
    tokens_per_tile: int = TOKENS_PER_TILE,
    words_per_tile: int = WORDS_PER_TILE,
) -> Float[Tensor, "N K"]:
    """log softmax(logits / temperature) at K words of each token; nats; float32.

    Gradients go to `hidden` and to the head's weight and bias.

    Args:
        hidden: last hidden states.
        head: the output head; whole, not sharded.
        ids: words, each below V.
        temperature: divides the logits.
        tokens_per_tile: tokens that are scored at a time.
        words_per_tile: words that are scored at a time.

    Raises:
        ValueError: a word is not in the vocabulary, or the temperature is not positive.

    Source: the definition. Differs: nothing.
    """
    size = head.weight.size(0)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise ValueError(f"ids lie between {int(ids.min())} and {int(ids.max())}: the vocabulary has {size} words.")
    policy = _Distributions(hidden, head, temperature, (tokens_per_tile, words_per_tile))
    logps: Tensor = _LogProbsAt.apply(hidden, head.weight, head.bias, policy, ids)  # type: ignore[no-untyped-call]
    return logps


def topk_divergence(
    logps: Float[Tensor, "N K"], ref_logps: Float[Tensor, "N K"], name: str, *, alpha: float | None = None
) -> Float[Tensor, " N"]:
    """D_f of the two distributions over K + 1 outcomes, K words and all the others as one; nats (χ², H², TV: 1).

    A lower bound of the divergence over the whole vocabulary (data processing), equal to it at K = V − 1. The two
    log-probs of a column belong to the same word, and the K words of a row differ; which ones they are is the caller's
    choice. The mass of the others is 1 − Σ p, so it is known to the rounding of `logps` only (1e-7 in float32), and is
    taken to be at least that. Gradients go to `logps`; none to the reference.

    Raises:
        ValueError: unknown name, alpha missing, superfluous or out of range.

    Source: the data-processing inequality. Differs: nothing.
    """
    chosen = entry(name, alpha)
    both = [with_tail(at_least_float32(each)) for each in (logps, ref_logps)]
    summands: Tensor = _Summands.apply(both[0], both[1], chosen)  # type: ignore[no-untyped-call]
    return summands.sum(dim=-1)


def with_tail(logps: Float[Tensor, "N K"]) -> Float[Tensor, "N K+1"]:
    """Append log(1 − Σ p), the log-probability of all other words, at least log of the type's precision."""
    total = logps.logsumexp(dim=-1, keepdim=True).clamp(max=-torch.finfo(logps.dtype).eps)
    # log(1 − e^x) in the form that keeps its digits; each is fed only where it is finite, or its gradient would be NaN.
    near = torch.log(-torch.expm1(total.clamp(min=-LOG_2)))
    far = torch.log1p(-total.clamp(max=-LOG_2).exp())
    return torch.cat([logps, torch.where(total > -LOG_2, near, far)], dim=-1)


@torch.no_grad()
def model_divergences(
    model: Any,
    ref_model: Any,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Tensor,
    names: Sequence[str],
    *,
    alpha: float | None = None,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """D_f(π_θ‖π_ref) at every position of given sequences, several f from one pass; no gradient.

    Args:
        model: the policy π_θ, a causal language model of transformers or one that PEFT wraps, in evaluation mode.
        ref_model: the reference π_ref, likewise, over the same vocabulary; may differ in everything else.
        input_ids: sequences.
        attention_mask: [B, T], 1 at tokens and 0 at padding.
        names: divergences of the table.
        alpha: for "alpha" among them, strictly between 0 and 1.
        temperature: divides the logits of both.

    Returns:
        By name, [B, T−1] in nats (χ², H², TV: 1): entry t compares the distributions of token t + 1 given the tokens up
        to t, and is 0 where one of the two is padding.

    Raises:
        ValueError: unknown name, alpha missing, superfluous or out of range, or a temperature that is not positive.
        UserError: a model is in training mode or makes its logits in a way that is not known here, or the vocabularies
            differ in size.
    """
    if alpha is not None and "alpha" not in names:
        raise ValueError(f"alpha = {alpha} has no effect on {', '.join(names)}: remove it.")
    entries = [entry(name, alpha if name == "alpha" else None) for name in names]
    heads = [_head(each, input_ids) for each in (model, ref_model)]
    _same_words(*heads)
    kept = (attention_mask[:, 1:] * attention_mask[:, :-1]).bool()
    policy, reference = (
        _Distributions(
            _hidden(each, input_ids, attention_mask)[:, :-1][kept], head, temperature, (TOKENS_PER_TILE, WORDS_PER_TILE)
        )
        for each, head in zip((model, ref_model), heads, strict=True)
    )
    policy.normalise()
    reference.normalise()
    values, _ = _sums(policy, reference, entries)
    return {
        name: value.new_zeros(kept.shape).masked_scatter(kept, value) for name, value in zip(names, values, strict=True)
    }


def _same_words(head: Head, ref_head: Head) -> None:
    if (size := head.weight.size(0)) != (ref_size := ref_head.weight.size(0)):
        raise UserError(
            f"the policy's vocabulary has {size} words and the reference's {ref_size}: a divergence between "
            "them needs two models with one tokenizer and heads of one size."
        )


def _causal(model: Any) -> Any:
    """The model that PEFT wraps, adapters included, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _hidden(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """What the head is applied to, [B, T, D]."""
    body = _causal(model).base_model
    hidden: Tensor = body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    return hidden


def head_factors(config: Any) -> tuple[float, float | None]:
    """By what a model multiplies the output of its head, and its soft cap, from its text configuration."""
    if config.model_type == "hyperclovax":
        scale = config.logits_scaling
    elif getattr(config, "logits_scaling", None) is not None:
        scale = 1.0 / config.logits_scaling
    else:
        scales = (getattr(config, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"))
        scale = next((value for value in scales if value is not None), 1.0)
    return float(scale), getattr(config, "final_logit_softcapping", None)


def _head(model: Any, input_ids: Tensor) -> Head:
    """The output head of a model, held to the model's own logits on one token.

    Raises:
        UserError: the model is in training mode, or its logits are not what the head makes of its hidden states.
    """
    if model.training:
        raise UserError("the model is in training mode, where dropout changes what it says: call model.eval() first.")
    layer = _causal(model).get_output_embeddings()
    head = Head(layer.weight, layer.bias, *head_factors(model.config.get_text_config()))
    one = input_ids[:1, :1]
    wanted = at_least_float32(model(input_ids=one, use_cache=False).logits[0, -1:])
    found = _Distributions(_hidden(model, one)[0], head, 1.0, (1, 1)).logits(slice(None), slice(None))
    # A few roundings of the type it computes in; exact for most models.
    tolerance = max(8 * torch.finfo(layer.weight.dtype).eps, 1e-4) * float(wanted.abs().max())
    if found.shape != wanted.shape or not float((found - wanted).abs().max()) <= tolerance:
        raise UserError(
            f"{type(_causal(model)).__name__} makes its logits in a way that is not known here (its output head on its "
            "last hidden states gives others): measure divergences on a model with a plain, scaled or capped head."
        )
    return head
