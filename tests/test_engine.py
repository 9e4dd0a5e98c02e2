"""The transformers engine on a tiny real model: what it draws, the log-probs it reports, and its fingerprint."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from posttrain.errors import UserError
from posttrain.launch.warm_start import character_tokenizer, small_model
from posttrain.recipe import WarmStart
from posttrain.rollouts.engine import EngineError, Sample, SamplingParams
from posttrain.rollouts.fingerprint import differs, files_fingerprint, fingerprint, weights_fingerprint
from posttrain.rollouts.tokens import encode
from posttrain.rollouts.transformers_engine import TransformersEngine

EOS = 1
"""The id of `<eos>` in the character tokenizer."""


def chat(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


PROMPTS = [chat("337=24"), chat("1=1"), chat("1234567=99"), chat("12=3")]
"""Of four different lengths."""


def sharpened(tiny_model: str, *, batch_size: int = 256) -> TransformersEngine:
    """An engine of the tiny model with larger weights: random initialisation is nearly uniform over tokens."""
    engine = TransformersEngine.load(tiny_model, device="cpu", batch_size=batch_size)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
    return engine


@pytest.fixture
def engine(tiny_model: str) -> TransformersEngine:
    return sharpened(tiny_model)


@torch.no_grad()
def next_logits(engine: TransformersEngine, ids: Sequence[int]) -> Tensor:
    """Logits [V] after one unpadded sequence."""
    logits: Tensor = engine.model(input_ids=torch.tensor([list(ids)])).logits[0, -1]
    return logits


def log_probs(engine: TransformersEngine, sample: Sample, temperature: float = 1.0) -> list[float]:
    """Log-probability of every token of a sample by one plain forward pass per token."""
    found = []
    for position, token in enumerate(sample.token_ids):
        logits = next_logits(engine, [*sample.prompt_ids, *sample.token_ids[:position]])
        found.append(float((logits / temperature).log_softmax(-1)[token]))
    return found


def truncated(logits: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities [V] after temperature, then top-k, then the nucleus of what top-k left, renormalised."""
    probabilities = (logits / temperature).softmax(-1)
    order = probabilities.argsort(descending=True).tolist()
    kept = order[: top_k or len(order)]
    mass, before, nucleus = float(probabilities[kept].sum()), 0.0, []
    for token in kept:
        if before / mass >= top_p:
            break
        nucleus.append(token)
        before += float(probabilities[token])
    result = torch.zeros_like(probabilities)
    result[nucleus] = probabilities[nucleus] / probabilities[nucleus].sum()
    return result


def flat(groups: list[list[Sample]]) -> list[Sample]:
    return [sample for group in groups for sample in group]


# ---------------------------------------------------------------- sampling


def test_samples_depend_on_the_seed_alone_and_leave_the_random_state_as_it_was(engine: TransformersEngine) -> None:
    params = SamplingParams(max_tokens=8, n=3, seed=4)
    torch.manual_seed(1)
    first = engine.sample(PROMPTS, params)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert engine.sample(PROMPTS, params) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert engine.sample(PROMPTS, SamplingParams(max_tokens=8, n=3, seed=5)) != first


def test_every_prompt_has_its_n_answers_in_order(engine: TransformersEngine) -> None:
    groups = engine.sample(PROMPTS, SamplingParams(max_tokens=8, n=3))
    assert [len(group) for group in groups] == [3, 3, 3, 3]
    for prompt, group in zip(PROMPTS, groups, strict=True):
        rendered = engine.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        assert rendered == f"^{prompt[0]['content']}?"
        assert all(engine.tokenizer.decode(sample.prompt_ids) == rendered for sample in group)
    assert len({tuple(sample.token_ids) for sample in flat(groups)}) > 4, "the n answers are drawn independently"


def test_plain_text_is_a_prompt_too(engine: TransformersEngine) -> None:
    (from_text,) = engine.sample(["^337=24?"], SamplingParams(max_tokens=4))
    (from_chat,) = engine.sample([chat("337=24")], SamplingParams(max_tokens=4))
    assert from_text == from_chat


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_recorded_log_probs_are_those_of_a_forward_pass_at_the_temperature(
    engine: TransformersEngine, temperature: float
) -> None:
    samples = flat(engine.sample(PROMPTS, SamplingParams(max_tokens=6, n=2, temperature=temperature)))
    for sample in samples:
        assert sample.logprobs == pytest.approx(log_probs(engine, sample, temperature), abs=1e-5)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 0.6), (1.0, 3, 1.0), (0.7, 5, 0.8), (1.5, 0, 0.9)]
)
def test_recorded_log_probs_are_those_of_the_truncated_distribution(
    engine: TransformersEngine, temperature: float, top_k: int, top_p: float
) -> None:
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    params = SamplingParams(max_tokens=6, n=2, seed=1, **settings)  # type: ignore[arg-type]
    moved = 0.0
    for sample in flat(engine.sample(PROMPTS, params)):
        wanted = []
        for position, token in enumerate(sample.token_ids):
            logits = next_logits(engine, [*sample.prompt_ids, *sample.token_ids[:position]])
            wanted.append(float(truncated(logits, **settings)[token].log()))  # type: ignore[arg-type]
        assert sample.logprobs == pytest.approx(wanted, abs=1e-5)
        moved += sum(sample.logprobs) - sum(log_probs(engine, sample, temperature))
    assert moved > 0.1, "the truncation must have mattered"


@pytest.mark.parametrize(("temperature", "top_k"), [(0.7, 0), (1.0, 4)])
def test_the_first_token_is_drawn_from_the_softmax(engine: TransformersEngine, temperature: float, top_k: int) -> None:
    draws = 4000
    params = SamplingParams(max_tokens=1, n=draws, temperature=temperature, top_k=top_k, seed=3)
    counts = torch.zeros(len(engine.tokenizer))
    for sample in flat(engine.sample(PROMPTS[:1], params)):
        counts[sample.token_ids[0]] += 1
    logits = next_logits(engine, encode(engine.tokenizer, PROMPTS[0]))
    expected = draws * truncated(logits, temperature=temperature, top_k=top_k, top_p=1.0)
    assert counts[expected == 0].sum() == 0
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic = ((observed - wanted) ** 2 / wanted.clamp(min=1e-9)).sum()
    assert (wanted > 5).sum() >= 4, "a test of a few tokens would say nothing"
    # 42.3 is the 99.9 % quantile of χ² with 18 degrees of freedom, one less than there are tokens.
    assert statistic < 42.3


def test_the_model_s_own_generation_config_does_not_change_what_is_drawn(engine: TransformersEngine) -> None:
    params = SamplingParams(max_tokens=8, n=8)
    plain = engine.sample(PROMPTS, params)
    ids = {"eos_token_id": EOS, "pad_token_id": 0}
    for habits in (
        {"do_sample": True, "temperature": 0.2, "top_k": 2, "top_p": 0.5},
        {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1},
        {"do_sample": True, "min_p": 0.5},
        {"do_sample": True, "typical_p": 0.3},
        {"suppress_tokens": [3, 4, 5], "min_new_tokens": 6},
    ):
        own = GenerationConfig(**ids, **habits)
        engine.model.generation_config = own
        assert engine.sample(PROMPTS, params) == plain, habits
        assert engine.model.generation_config is own, "the model keeps its habits"


def test_no_token_of_a_larger_vocabulary_is_left_out() -> None:
    """`generate` keeps 50 tokens unless it is told otherwise."""
    letters = "".join(chr(0x4E00 + i) for i in range(200))
    tokenizer = character_tokenizer(letters, "{{ messages[0]['content'] }}")
    settings = WarmStart(hidden_size=32, intermediate_size=64, layers=1, heads=2)
    engine = TransformersEngine(small_model(settings, tokenizer, "float32"), tokenizer)  # type: ignore[arg-type]
    samples = flat(engine.sample([chat(letters[:3])], SamplingParams(max_tokens=1, n=2000)))
    assert len({sample.token_ids[0] for sample in samples}) > 150
    assert samples[0].logprobs == pytest.approx(log_probs(engine, samples[0]), abs=1e-5)


def test_greedy_takes_the_most_likely_token(engine: TransformersEngine) -> None:
    groups = engine.sample(PROMPTS, SamplingParams(max_tokens=6, n=2, temperature=0.0, seed=1))
    assert groups == engine.sample(PROMPTS, SamplingParams(max_tokens=6, n=2, temperature=0.0, seed=2))
    for group in groups:
        assert group[0] == group[1]
        sample = group[0]
        for position, token in enumerate(sample.token_ids):
            ids = [*sample.prompt_ids, *sample.token_ids[:position]]
            assert token == int(next_logits(engine, ids).argmax())


def test_an_answer_ends_with_one_end_of_sequence_or_at_the_limit(tiny_model: str) -> None:
    engine = TransformersEngine.load(tiny_model, device="cpu")
    samples = flat(engine.sample(PROMPTS, SamplingParams(max_tokens=12, n=16)))
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}, "the test needs both"
    assert any(len(sample.token_ids) == 1 for sample in samples) or min(len(s.token_ids) for s in samples) < 4
    for sample in samples:
        stopped = sample.finish_reason == "stop"
        assert sample.token_ids.count(EOS) == stopped
        assert (sample.token_ids[-1] == EOS) == stopped
        assert len(sample.token_ids) == len(sample.logprobs) <= 12
        assert stopped or len(sample.token_ids) == 12
        assert sample.text == engine.tokenizer.decode(sample.token_ids, skip_special_tokens=True)
        assert "<eos>" not in sample.text


def test_every_end_of_sequence_token_that_the_model_declares_ends_an_answer(tiny_model: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    equals = 16
    model.generation_config.eos_token_id = [EOS, equals]
    engine = TransformersEngine(model, AutoTokenizer.from_pretrained(tiny_model))
    samples = flat(engine.sample(PROMPTS, SamplingParams(max_tokens=12, n=16)))
    stopped = [sample for sample in samples if sample.finish_reason == "stop"]
    assert {sample.token_ids[-1] for sample in stopped} == {EOS, equals}
    assert not any({EOS, equals} & set(sample.token_ids[:-1]) for sample in samples)


def test_a_tokenizer_without_an_end_is_refused(tiny_model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="end-of-sequence"):
        TransformersEngine(AutoModelForCausalLM.from_pretrained(tiny_model), tokenizer)


# ---------------------------------------------------------------- scoring


def pairs(engine: TransformersEngine) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) ids of many lengths, an empty answer among them."""
    samples = flat(engine.sample(PROMPTS, SamplingParams(max_tokens=9, n=2)))
    cut = [(s.prompt_ids, s.token_ids[: 1 + index % 5]) for index, s in enumerate(samples)]
    return [*cut, (samples[0].prompt_ids, [])]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_score_agrees_with_one_forward_pass_per_token(engine: TransformersEngine, temperature: float) -> None:
    sequences = pairs(engine)
    scores = engine.score(sequences, temperature=temperature)
    for (prompt, answer), score in zip(sequences, scores, strict=True):
        sample = Sample(prompt, answer, [], "", "stop", 0)
        assert score.logprobs == pytest.approx(log_probs(engine, sample, temperature), abs=1e-5)


def test_score_agrees_with_what_sampling_recorded(engine: TransformersEngine) -> None:
    samples = flat(engine.sample(PROMPTS, SamplingParams(max_tokens=9, n=4)))
    scores = engine.score([(s.prompt_ids, s.token_ids) for s in samples])
    for sample, score in zip(samples, scores, strict=True):
        assert score.logprobs == pytest.approx(sample.logprobs, abs=1e-5)


def test_neighbours_in_a_batch_do_not_matter(engine: TransformersEngine) -> None:
    sequences = pairs(engine)
    together = engine.score(sequences)
    alone = [engine.score([sequence])[0] for sequence in sequences]
    engine.batch_size = 2
    by_two = engine.score(sequences)
    assert len({len(prompt) for prompt, _ in sequences}) > 2
    for one, two, three in zip(together, alone, by_two, strict=True):
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-5)
        assert one.logprobs == pytest.approx(three.logprobs, abs=1e-5)


def test_a_prompt_of_nothing_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(UserError, match="neither messages nor tokens"):
        engine.sample([[]], SamplingParams(max_tokens=4))


def test_token_ids_are_a_prompt_as_they_are(engine: TransformersEngine) -> None:
    ids = encode(engine.tokenizer, PROMPTS[0])
    params = SamplingParams(max_tokens=6, n=3, seed=5)
    assert engine.sample([ids], params) == engine.sample(PROMPTS[:1], params)


def test_nothing_to_score_is_no_error(engine: TransformersEngine) -> None:
    assert engine.score([]) == []
    assert engine.sample([], SamplingParams(max_tokens=4)) == []


def test_the_most_likely_tokens_come_with_the_score(engine: TransformersEngine) -> None:
    sequences = pairs(engine)
    plain, scores = engine.score(sequences), engine.score(sequences, temperature=0.7, top_k=3)
    assert all(score.top_ids == [] for score in plain)
    for (prompt, answer), score in zip(sequences, scores, strict=True):
        assert len(score.top_ids) == len(score.top_logprobs) == len(answer)
        for position in range(len(answer)):
            logp = torch.log_softmax(next_logits(engine, [*prompt, *answer[:position]]) / 0.7, -1)
            values, ids = logp.topk(3)
            assert score.top_ids[position] == ids.tolist()
            assert score.top_logprobs[position] == pytest.approx(values.tolist(), abs=1e-5)


@pytest.mark.parametrize("positions", [1, 3, 7, 40])
def test_long_sequences_are_scored_piece_by_piece(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, positions: int
) -> None:
    """Never more logits than `_SCORE_BYTES` has room for, and the same numbers: prompts longer and shorter than it."""
    generator = torch.Generator().manual_seed(2)
    sequences = [
        (
            torch.randint(3, 19, (p,), generator=generator).tolist(),
            torch.randint(3, 19, (a,), generator=generator).tolist(),
        )
        for p, a in ((9, 60), (2, 31), (30, 5))
    ]
    whole = engine.score(sequences, top_k=2)
    seen: list[int] = []
    forward = engine.model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        seen.append(output.logits.shape[:2].numel())
        return output

    monkeypatch.setattr("posttrain.rollouts.transformers_engine._SCORE_BYTES", positions * 4 * 19)
    monkeypatch.setattr(engine.model, "forward", watched)
    pieces = engine.score(sequences, top_k=2)
    assert max(seen) <= positions + 3 < 60, "one more per sequence in the last piece"
    for one, other in zip(whole, pieces, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert one.top_ids == other.top_ids


def test_an_empty_answer_has_an_empty_score(engine: TransformersEngine) -> None:
    assert [score.logprobs for score in engine.score([([5, 6], []), ([5], [])])] == [[], []]


# ---------------------------------------------------------------- new weights


def test_sync_takes_over_weights_and_version(tiny_model: str) -> None:
    old, new = TransformersEngine.load(tiny_model, device="cpu"), sharpened(tiny_model)
    sequences = pairs(new)
    before = old.fingerprint
    assert old.score(sequences) != new.score(sequences)
    old.sync(new.model.named_parameters(), version=7)
    assert old.score(sequences) == new.score(sequences)
    assert old.fingerprint == new.fingerprint != before
    params = SamplingParams(max_tokens=4)
    assert {sample.policy_version for sample in flat(old.sample(PROMPTS, params))} == {7}
    assert {sample.policy_version for sample in flat(new.sample(PROMPTS, params))} == {0}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda weights: {**weights, "model.z": torch.zeros(2)}, "no parameter 'model.z'"),
        (lambda weights: {k: v for k, v in weights.items() if "norm" not in k}, "norm.weight' .* did not come"),
        # Row 0 alone would be broadcast over the whole matrix.
        (
            lambda weights: {**weights, "model.embed_tokens.weight": weights["model.embed_tokens.weight"][:1]},
            r"'model.embed_tokens.weight' has shape \(1, 32\).*\(19, 32\)",
        ),
    ],
)
def test_after_a_failed_sync_the_engine_is_of_no_use_until_the_next(tiny_model: str, spoil: Any, message: str) -> None:
    engine, other = TransformersEngine.load(tiny_model, device="cpu"), sharpened(tiny_model)
    with pytest.raises((KeyError, ValueError), match=message):
        engine.sync(spoil(dict(other.model.named_parameters())).items(), version=7)
    assert engine.policy_version is None
    with pytest.raises(EngineError, match="cannot sample: a sync failed half-way"):
        engine.sample(PROMPTS, SamplingParams(max_tokens=4))
    with pytest.raises(EngineError, match="cannot score"):
        engine.score(pairs(other))
    engine.sync(other.model.named_parameters(), version=8)
    assert engine.score(pairs(other)) == other.score(pairs(other))


# ---------------------------------------------------------------- fingerprints


def test_the_fingerprint_is_that_of_the_files(tiny_model: str) -> None:
    one, two = (TransformersEngine.load(tiny_model, device="cpu") for _ in range(2))
    assert one.fingerprint == two.fingerprint == fingerprint(one.model, two.tokenizer)
    assert differs(one.fingerprint, two.fingerprint) is None
    weights, _, tokenizer = one.fingerprint.partition(".")
    assert len(weights) == len(tokenizer) == 16


def test_one_changed_weight_changes_the_fingerprint(tiny_model: str) -> None:
    engine = TransformersEngine.load(tiny_model, device="cpu")
    before = engine.fingerprint
    for parameter in engine.model.parameters():
        flat_values, kept = parameter.data.view(-1), parameter.data.view(-1)[-1].item()
        assert flat_values.numel() <= 4096, "so small a parameter is hashed whole"
        flat_values[-1] = kept + 1e-6
        changed = fingerprint(engine.model, engine.tokenizer)
        assert differs(before, changed) == "the weights"
        flat_values[-1] = kept
    assert fingerprint(engine.model, engine.tokenizer) == before


def test_a_large_parameter_is_hashed_at_evenly_spaced_values() -> None:
    module = torch.nn.Linear(3 * 4096, 2, bias=False)  # 24,576 values, every 6th of them
    before = weights_fingerprint(module)
    for position, seen in ((0, True), (6, True), (24_570, True), (7, False)):
        kept = module.weight.data.view(-1)[position].item()
        module.weight.data.view(-1)[position] = kept + 1.0
        assert (weights_fingerprint(module) != before) is seen
        module.weight.data.view(-1)[position] = kept


def test_name_shape_and_precision_are_part_of_the_fingerprint() -> None:
    module = torch.nn.Linear(4, 2, bias=False)
    torch.nn.init.ones_(module.weight)
    others = [torch.nn.Linear(2, 4, bias=False), torch.nn.Linear(4, 2, bias=False).bfloat16()]
    renamed = torch.nn.Module()
    renamed.kernel = torch.nn.Parameter(torch.ones(2, 4))
    for other in others:
        torch.nn.init.ones_(other.weight)
    found = [weights_fingerprint(one) for one in (module, *others, renamed)]
    assert len(set(found)) == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: setattr(tokenizer, "chat_template", tokenizer.chat_template + " "),
        lambda tokenizer: tokenizer.add_tokens(["&"]),
        lambda tokenizer: setattr(tokenizer, "eos_token", "?"),
    ],
    ids=["template", "vocabulary", "eos"],
)
def test_a_changed_tokenizer_changes_the_fingerprint(tiny_model: str, change: Any) -> None:
    engine = TransformersEngine.load(tiny_model, device="cpu")
    before = engine.fingerprint
    change(engine.tokenizer)
    assert differs(before, fingerprint(engine.model, engine.tokenizer)) == "the tokenizer or its chat template"


def test_weights_that_cannot_be_read_here_never_disagree() -> None:
    module = torch.nn.Linear(2, 2)
    module.weight.ds_id = 0  # as DeepSpeed marks a parameter that ZeRO-3 has partitioned
    assert weights_fingerprint(module) is None
    assert differs("unknown.a", "1234.a") is differs("1234.a", "unknown.a") is None
    assert differs("unknown.a", "unknown.b") == "the tokenizer or its chat template"


@pytest.mark.parametrize("saved", [None, ["norm"]])
def test_adapters_leave_the_fingerprint_of_the_base_model(tiny_model: str, saved: list[str] | None) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = weights_fingerprint(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", modules_to_save=saved))
    assert any("lora_A" in name for name, _ in adapted.named_parameters())
    assert weights_fingerprint(adapted, adapters=False) == before
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(1.0)
    assert weights_fingerprint(adapted, adapters=False) == before
    with torch.no_grad():
        next(p for name, p in adapted.named_parameters() if name.endswith("q_proj.base_layer.weight")).add_(1.0)
    assert weights_fingerprint(adapted, adapters=False) != before


def test_adapters_are_part_of_the_fingerprint_of_an_adapted_model(tiny_model: str) -> None:
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(r=2))
    before = weights_fingerprint(adapted)
    with torch.no_grad():
        next(p for name, p in adapted.named_parameters() if "lora_B" in name).add_(1.0)
    assert weights_fingerprint(adapted) != before


@pytest.mark.parametrize("count", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_engines_leave_nothing_behind(tiny_model: str, count: int) -> None:
    process = psutil.Process()

    def cycle() -> weakref.ref[Any]:
        made = TransformersEngine.load(tiny_model, device="cpu")
        made.sample(PROMPTS, SamplingParams(max_tokens=3))
        model = weakref.ref(made.model)
        made.close()
        made.close()
        with pytest.raises(EngineError, match="closed"):
            made.sample(PROMPTS, SamplingParams(max_tokens=3))
        return model

    def held() -> tuple[int, int, int, int]:
        shared = sum(mapping.path.startswith("/dev/shm") for mapping in process.memory_maps())  # noqa: S108
        return process.num_threads(), process.num_fds(), len(process.children()), shared

    for _ in range(3):  # what the libraries allocate once
        cycle()
    before = held()
    assert [cycle()() for _ in range(count)] == [None] * count
    assert held() == before


def test_switching_to_a_saved_policy(tiny_model: str, tmp_path: Path) -> None:
    """A whole model, and LoRA adapters, which come merged."""
    engine, other = TransformersEngine.load(tiny_model, device="cpu"), sharpened(tiny_model)
    other.model.save_pretrained(tmp_path / "whole")
    engine.switch(str(tmp_path / "whole"))
    assert engine.fingerprint == other.fingerprint and engine.policy_version == 0
    assert engine.files == files_fingerprint(str(tmp_path / "whole"))
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3)
    adapted.save_pretrained(tmp_path / "adapters")
    engine.switch(str(tmp_path / "adapters"))
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    expected = torch.log_softmax(adapted(input_ids=ids).logits, -1)[0, :-1].gather(1, ids[0, 1:, None])[2:, 0]
    assert engine.score([([3, 4, 5], [6, 7])])[0].logprobs == pytest.approx(expected.tolist(), abs=1e-5)
