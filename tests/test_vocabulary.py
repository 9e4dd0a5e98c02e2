"""Divergences over whole vocabularies against the naive form: value, gradient, memory, models and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from posttrain.errors import UserError
from posttrain.objectives.divergences import TABLE
from posttrain.objectives.vocabulary import (
    Head,
    log_probs_at,
    model_divergences,
    topk_divergence,
    vocabulary_divergence,
    with_tail,
)

Case = tuple[str, float | None]
CASES: list[Case] = [*((name, None) for name in TABLE), ("alpha", 0.2), ("alpha", 0.8)]
IDS = [name if alpha is None else f"{name}{alpha}" for name, alpha in CASES]
every_divergence = pytest.mark.parametrize(("name", "alpha"), CASES, ids=IDS)

HEADS: dict[str, dict[str, Any]] = {"plain": {}, "scaled": {"scale": 0.3}, "capped": {"scale": 1.5, "softcap": 4.0}}
every_head = pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)

TILES = {"tokens_per_tile": 3, "words_per_tile": 10}
"""Neither divides 7 tokens or 43 words."""


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def definition(name: str, alpha: float | None, p: Tensor, q: Tensor) -> Tensor:
    """The divergence of the policy p from the reference q, from probabilities; autograd gives its gradient."""
    if alpha is not None:
        return (1 - (p ** (1 - alpha) * q**alpha).sum(-1)) / (alpha * (1 - alpha))
    m = (p + q) / 2
    definitions: dict[str, Callable[[], Tensor]] = {
        "forward_kl": lambda: kl(q, p),
        "reverse_kl": lambda: kl(p, q),
        "js": lambda: kl(q, m) / 2 + kl(p, m) / 2,
        "chi2": lambda: ((p - q) ** 2 / q).sum(-1),
        "hellinger": lambda: 1 - (p * q).sqrt().sum(-1),
        "jeffreys": lambda: kl(p, q) + kl(q, p),
        "chi2_kl": lambda: ((p - q) ** 2 / q).sum(-1) / 2 + kl(p, q),
        "total_variation": lambda: (p - q).abs().sum(-1) / 2,
    }
    return definitions[name]()


def logits_of(hidden: Tensor, head: Head, temperature: float = 1.0) -> Tensor:
    """All of them, [N, V]."""
    logits = hidden @ head.weight.T * head.scale + (0.0 if head.bias is None else head.bias * head.scale)
    return (logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)) / temperature


def two(
    dtype: torch.dtype = torch.float64, *, tokens: int = 7, words: int = 43, spread: float = 0.5, **options: Any
) -> tuple[Tensor, Head, Tensor, Head]:
    """Hidden states and heads of a policy (width 6, with gradient, bias) and of a reference (width 4, plain)."""
    source = torch.Generator().manual_seed(17)

    def draw(*shape: int) -> Tensor:
        return spread * torch.randn(*shape, generator=source, dtype=torch.float64).to(dtype)

    head = Head(draw(words, 6).requires_grad_(), draw(words).requires_grad_(), **options)
    return draw(tokens, 6).requires_grad_(), head, draw(tokens, 4), Head(draw(words, 4))


def with_gradients(value: Tensor, hidden: Tensor, head: Head) -> tuple[Tensor, ...]:
    """The value, and gradients of a weighted sum of it for hidden states, weight and bias."""
    weights = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view_as(value)
    assert head.bias is not None
    return value.detach(), *torch.autograd.grad((weights * value).sum(), (hidden, head.weight, head.bias))


@every_divergence
@every_head
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_value_and_gradient_are_those_of_the_naive_form_in_float64(
    name: str, alpha: float | None, options: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    hidden, head, ref_hidden, ref_head = two(dtype, **options)
    value = vocabulary_divergence(hidden, head, ref_hidden, ref_head, name, alpha=alpha, temperature=0.7, **TILES)
    assert value.dtype == dtype
    ours = with_gradients(value, hidden, head)
    # The same numbers, in float64.
    assert head.bias is not None
    exact, weight, bias = (each.detach().double().requires_grad_() for each in (hidden, head.weight, head.bias))
    exact_head = Head(weight, bias, **options)
    p = logits_of(exact, exact_head, 0.7).softmax(-1)
    q = logits_of(ref_hidden.double(), Head(ref_head.weight.double()), 0.7).softmax(-1)
    theirs = with_gradients(definition(name, alpha, p, q), exact, exact_head)
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=tolerance, atol=tolerance)


@every_divergence
def test_a_large_vocabulary_loses_no_digits(name: str, alpha: float | None) -> None:
    hidden, head, ref_hidden, ref_head = two(torch.float32, tokens=3, words=152_064, spread=1.0)
    value = vocabulary_divergence(hidden, head, ref_hidden, ref_head, name, alpha=alpha)
    ours = with_gradients(value, hidden, head)
    assert head.bias is not None
    exact, weight, bias = (each.detach().double().requires_grad_() for each in (hidden, head.weight, head.bias))
    p = logits_of(exact, Head(weight, bias)).softmax(-1)
    q = logits_of(ref_hidden.double(), Head(ref_head.weight.double())).softmax(-1)
    theirs = with_gradients(definition(name, alpha, p, q), exact, Head(weight, bias))
    for mine, wanted in zip(ours, theirs, strict=True):
        # Relative to the largest entry: a gradient for 152,064 words has entries of every size.
        torch.testing.assert_close(mine.double() / wanted.abs().max(), wanted / wanted.abs().max(), rtol=0, atol=1e-5)


@every_divergence
def test_gradients_equal_finite_differences(name: str, alpha: float | None) -> None:
    hidden, head, ref_hidden, ref_head = two(tokens=3, words=11, spread=0.6)
    assert torch.autograd.gradcheck(
        lambda h, w, b: vocabulary_divergence(
            h, Head(w, b, 1.3, 5.0), ref_hidden, ref_head, name, alpha=alpha, tokens_per_tile=2, words_per_tile=4
        ),
        (hidden, head.weight, head.bias),
    )


@every_divergence
def test_ratios_that_float32_cannot_hold_are_exact(name: str, alpha: float | None) -> None:
    # Two words of log-odds ±L: p = (σ(L), σ(−L)), q the same or the other way round; L = 60, far beyond the 1e-7 of
    # float32, and u = e^±60. Computed in float32, and by the definition in float64.
    hidden, weight = torch.tensor([[60.0], [-60.0], [60.0]]), torch.tensor([[0.5], [-0.5]])
    ref_hidden = torch.tensor([[60.0], [60.0], [-60.0]]) / (2.0 if "chi2" in name else 1.0)
    value = vocabulary_divergence(hidden, Head(weight), ref_hidden, Head(weight), name, alpha=alpha)
    p, q = ((each @ weight.T).double().softmax(-1) for each in (hidden, ref_hidden))
    torch.testing.assert_close(value.double(), definition(name, alpha, p, q), rtol=1e-5, atol=1e-7)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_models_have_no_divergence_and_no_gradient(name: str, alpha: float | None, dtype: torch.dtype) -> None:
    hidden, head, _, _ = two(dtype, spread=2.0)
    found = vocabulary_divergence(hidden, head, hidden.detach(), head, name, alpha=alpha, **TILES)
    value, *gradients = with_gradients(found, hidden, head)
    assert value.dtype == torch.float32 and value.tolist() == [0.0] * 7
    assert all(gradient.dtype == dtype and gradient.abs().max() == 0 for gradient in gradients)


@pytest.mark.parametrize("name", ["reverse_kl", "js"])
def test_half_precision_rounds_logits_like_the_model_and_no_more(name: str) -> None:
    hidden, head, ref_hidden, ref_head = two(torch.bfloat16)
    value = vocabulary_divergence(hidden, head, ref_hidden, ref_head, name, **TILES)
    assert head.bias is not None
    logits = nn.functional.linear(hidden, head.weight, head.bias).double()
    wanted = definition(name, None, logits.softmax(-1), (ref_hidden @ ref_head.weight.T).double().softmax(-1))
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6)


def test_only_what_is_trained_gets_a_gradient() -> None:
    hidden, head, ref_hidden, ref_head = two()
    ref_hidden.requires_grad_()
    ref_head.weight.requires_grad_()
    frozen = Head(head.weight.detach())
    value = vocabulary_divergence(hidden, frozen, ref_hidden, ref_head, "js")
    grads = torch.autograd.grad(value.sum(), (hidden, ref_hidden, ref_head.weight), allow_unused=True)
    assert grads[0] is not None and grads[1] is None and grads[2] is None


def test_autocast_changes_nothing() -> None:
    hidden, head, ref_hidden, ref_head = two(torch.float32)
    plain = with_gradients(vocabulary_divergence(hidden, head, ref_hidden, ref_head, "js", **TILES), hidden, head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = vocabulary_divergence(hidden, head, ref_hidden, ref_head, "js", **TILES)
        assert all(map(torch.equal, plain, with_gradients(value, hidden, head)))


def test_tokens_neither_mix_nor_depend_on_tiles() -> None:
    hidden, head, ref_hidden, ref_head = two()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(2))
    value = vocabulary_divergence(hidden, head, ref_hidden, ref_head, "js")
    again = vocabulary_divergence(hidden[order], head, ref_hidden[order], ref_head, "js", **TILES)
    torch.testing.assert_close(again, value[order], rtol=1e-12, atol=0)
    assert vocabulary_divergence(hidden[:0], head, ref_hidden[:0], ref_head, "js").shape == (0,)


# ---------------------------------------------------------------- memory


class Bytes(TorchDispatchMode):
    """Peak of the bytes of storages that were allocated inside and are alive, counted at every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: WeakSet[Any] = WeakSet()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = set(map(id, storages((args, kwargs))))
        result = func(*args, **(kwargs or {}))
        self.alive.update(storage for storage in storages(result) if id(storage) not in given)
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.alive))
        return result


def storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak(value: Callable[[], Tensor], *inputs: Tensor) -> int:
    """Bytes beyond the inputs at the worst moment of a forward and a backward pass, all gradients included."""
    with Bytes() as counter:
        torch.autograd.grad(value().sum(), inputs)
    return counter.peak


def test_the_counter_counts() -> None:
    ones = torch.ones(1000, requires_grad=True)
    # exp (4000 bytes, kept) → sum (4) → backward: one (4), and 4000 for exp's gradient; expanding 1 takes nothing.
    assert 8000 <= peak(lambda: ones.exp().sum(), ones) <= 8016


@pytest.mark.parametrize("name", ["reverse_kl", "alpha"])  # those whose naive form is the thriftiest
def test_memory_is_a_sixth_of_the_naive_form_at_the_vocabulary_of_qwen(name: str) -> None:
    """Live bytes of tensors made by forward and backward, the head's gradient (19 MB in either) counted, inputs not."""
    alpha, words = (0.5 if name == "alpha" else None), 152_064
    source = torch.Generator().manual_seed(0)
    hidden, ref_hidden = torch.randn(2, 128, 32, generator=source).unbind()
    weight, ref_weight = 0.1 * torch.randn(2, words, 32, generator=source)
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

    def naive() -> Tensor:
        lp, lq = (hidden @ weight.T).log_softmax(-1), (ref_hidden @ ref_weight.T).log_softmax(-1)
        if name == "reverse_kl":
            return (lp.exp() * (lp - lq)).sum(-1)
        return 4.0 * (1.0 - (0.5 * (lp + lq)).exp().sum(-1))

    def tiled() -> Tensor:
        return vocabulary_divergence(hidden, Head(weight), ref_hidden, Head(ref_weight), name, alpha=alpha)

    ours, theirs = peak(tiled, hidden, weight), peak(naive, hidden, weight)
    assert ours <= theirs / 6, f"{ours / 2**20:.0f} of {theirs / 2**20:.0f} MiB"


# ---------------------------------------------------------------- some words, and all the others as one


@every_head
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_log_probs_at_words_are_those_of_the_softmax(
    options: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    hidden, head, _, _ = two(dtype, **options)
    ids = torch.randint(0, 43, (7, 5), generator=torch.Generator().manual_seed(1))
    ids[:, 1] = ids[:, 0]  # a word that is asked for twice counts twice
    ours = with_gradients(log_probs_at(hidden, head, ids, temperature=0.7, **TILES), hidden, head)
    theirs = with_gradients(logits_of(hidden, head, 0.7).log_softmax(-1).gather(1, ids), hidden, head)
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=tolerance)


def both_at(ids: Tensor, spread: float = 0.5) -> tuple[Tensor, Tensor, tuple[Tensor, Head, Tensor, Head]]:
    hidden, head, ref_hidden, ref_head = given = two(spread=spread)
    return log_probs_at(hidden, head, ids, **TILES), log_probs_at(ref_hidden, ref_head, ids, **TILES), given


@every_divergence
def test_all_words_but_one_and_the_rest_are_the_whole_vocabulary(name: str, alpha: float | None) -> None:
    # One word is left, so the tail is that word; a different one per token.
    ids = torch.stack([torch.arange(43)[torch.arange(43) != 5 * row] for row in range(7)])
    logps, ref_logps, (hidden, head, ref_hidden, ref_head) = both_at(ids)
    ours = with_gradients(topk_divergence(logps, ref_logps, name, alpha=alpha), hidden, head)
    whole = vocabulary_divergence(hidden, head, ref_hidden, ref_head, name, alpha=alpha)
    for mine, wanted in zip(ours, with_gradients(whole, hidden, head), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-11)


@every_divergence
def test_more_words_see_more_and_never_more_than_there_is(name: str, alpha: float | None) -> None:
    hidden, head, ref_hidden, ref_head = two(spread=1.0)
    order = logits_of(hidden, head).argsort(dim=-1, descending=True)
    last = torch.zeros(7, dtype=torch.float64)
    whole = vocabulary_divergence(hidden, head, ref_hidden, ref_head, name, alpha=alpha).detach()
    for k in (1, 2, 5, 20, 42):
        logps, ref_logps, _ = both_at(order[:, :k], spread=1.0)
        found = topk_divergence(logps, ref_logps, name, alpha=alpha).detach()
        assert (found >= last - 1e-8).all() and (found <= whole * (1 + 1e-8) + 1e-8).all(), "1 − Σ p rounds"
        last = found


def test_a_tail_by_hand() -> None:
    # p = (½, ¼ | ¼), q = (¼, ¼ | ½): KL(p‖q) = ½ log 2 − ¼ log 2 = ¼ log 2
    logps, ref_logps = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.25]]).log()
    assert topk_divergence(logps, ref_logps, "reverse_kl").item() == pytest.approx(0.25 * math.log(2))
    assert topk_divergence(logps, ref_logps, "total_variation").item() == pytest.approx(0.25)
    torch.testing.assert_close(with_tail(logps), torch.tensor([[0.5, 0.25, 0.25]]).log())


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_words_that_hold_all_the_mass_leave_a_finite_tail(name: str, alpha: float | None, dtype: torch.dtype) -> None:
    # All of it, all of it and a rounding more, all but little, and none: log p from 0 to −80.
    rows = [[0.0, -80.0], [0.0, -15.0], [math.log(0.5)] * 2, [-1e-6, -30.0], [-80.0, -80.0], [-1.0, -2.0]]
    logps, ref_logps = torch.tensor(rows).to(dtype).requires_grad_(), torch.tensor(rows[::-1]).to(dtype)
    value = topk_divergence(logps, ref_logps, name, alpha=alpha)
    (gradient,) = torch.autograd.grad(value.sum(), logps)
    assert value.isfinite().all() and gradient.isfinite().all()
    assert (value >= -1e-6).all()
    same = topk_divergence(logps, logps.detach(), name, alpha=alpha)
    assert same.tolist() == [0.0] * 6


def test_gradient_of_the_tail_equals_finite_differences() -> None:
    logps = torch.tensor([[0.4, 0.3], [0.9, 0.0999], [1e-4, 1e-3]], dtype=torch.float64).log().requires_grad_()
    ref_logps = torch.tensor([[0.1, 0.3], [0.5, 0.2], [0.3, 1e-5]], dtype=torch.float64).log()
    assert torch.autograd.gradcheck(lambda x: topk_divergence(x, ref_logps, "js"), logps, eps=1e-8, atol=1e-5)


# ---------------------------------------------------------------- models

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2} | {
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
MODELS: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "qwen2_tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=64)),
    "gemma2_capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=2.0)),
    "cohere_scaled": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
    "granite_scaled": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0)),
}


def model_of(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return MODELS[kind]().eval()


def sequences() -> tuple[Tensor, Tensor]:
    """[3, 9], the second and third padded on the right."""
    input_ids = torch.randint(3, 61, (3, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(input_ids)
    mask[1, 6:] = 0
    mask[2, 2:] = 0
    return input_ids, mask


def from_logits(model: Any, ref_model: Any, name: str, alpha: float | None, temperature: float = 1.0) -> Tensor:
    """[B, T−1], from both models' own logits, zero at padding."""
    input_ids, mask = sequences()
    with torch.no_grad():
        p, q = (
            (each(input_ids=input_ids, attention_mask=mask).logits[:, :-1].double() / temperature).softmax(-1)
            for each in (model, ref_model)
        )
    return definition(name, alpha, p, q) * mask[:, 1:]


@pytest.mark.parametrize("kind", MODELS)
def test_models_are_compared_by_their_own_logits(kind: str) -> None:
    model, ref_model = model_of(kind, 0), model_of("qwen2", 1)
    names = [*TABLE, "alpha"]
    found = model_divergences(model, ref_model, *sequences(), names, alpha=0.3, temperature=0.8)
    assert list(found) == names
    for name in names:
        wanted = from_logits(model, ref_model, name, 0.3 if name == "alpha" else None, 0.8)
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-4, atol=1e-5)
        assert (found[name][1, 5:] == 0).all() and (found[name][2, 1:] == 0).all()


def test_logits_of_whole_sequences_are_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ref_model = model_of("qwen2", 0), model_of("qwen2", 1)
    seen: list[int] = []
    for each in (model, ref_model):
        each.lm_head.register_forward_hook(lambda _, __, output: seen.append(output[..., 0].numel()))
    model_divergences(model, ref_model, *sequences(), ["js"])
    assert seen == [1, 1], "one token per model, to hold the head to the model's own logits"


def test_adapters_are_part_of_the_policy() -> None:
    from peft import LoraConfig, get_peft_model

    base = model_of("qwen2")
    for targets in (["q_proj", "v_proj"], ["q_proj", "lm_head"]):
        config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        torch.manual_seed(3)
        policy = get_peft_model(model_of("qwen2"), config).eval()
        if "lm_head" in targets:
            with pytest.raises(UserError, match="Qwen2ForCausalLM makes its logits in a way that is not known here"):
                model_divergences(policy, base, *sequences(), ["reverse_kl"])
            policy = policy.merge_and_unload()
        found = model_divergences(policy, base, *sequences(), ["reverse_kl"])["reverse_kl"]
        assert found.max() > 1e-3
        torch.testing.assert_close(found.double(), from_logits(policy, base, "reverse_kl", None), rtol=1e-4, atol=1e-5)


def test_a_head_that_is_not_known_is_refused() -> None:
    class Shifted(Qwen2ForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.01
            return output

    torch.manual_seed(0)
    with pytest.raises(UserError, match="Shifted makes its logits in a way that is not known here"):
        model_divergences(Shifted(Qwen2Config(**SMALL)).eval(), model_of("qwen2"), *sequences(), ["js"])


def test_what_makes_no_sense_is_refused() -> None:
    model, other = model_of("qwen2"), Qwen2ForCausalLM(Qwen2Config(**SMALL | {"vocab_size": 64})).eval()
    with pytest.raises(UserError, match="the policy's vocabulary has 61 words and the reference's 64"):
        model_divergences(model, other, *sequences(), ["js"])
    with pytest.raises(UserError, match="training mode"):
        model_divergences(model, model_of("qwen2").train(), *sequences(), ["js"])
    with pytest.raises(ValueError, match="unknown divergence 'jsd'"):
        model_divergences(model, model, *sequences(), ["jsd"])
    with pytest.raises(ValueError, match=r"alpha = 0\.5 has no effect on js, chi2"):
        model_divergences(model, model, *sequences(), ["js", "chi2"], alpha=0.5)
    hidden, head, ref_hidden, ref_head = two()
    with pytest.raises(ValueError, match="needs alpha"):
        vocabulary_divergence(hidden, head, ref_hidden, ref_head, "alpha")
    with pytest.raises(UserError, match="vocabulary has 43 words and the reference's 42"):
        vocabulary_divergence(hidden, head, ref_hidden, Head(ref_head.weight[:42]), "js")
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be a positive number"):
            vocabulary_divergence(hidden, head, ref_hidden, ref_head, "js", temperature=temperature)
    for word in (-1, 43):
        with pytest.raises(ValueError, match=f"ids lie between .*{word}.*: the vocabulary has 43 words"):
            log_probs_at(hidden, head, torch.full((7, 1), word))
