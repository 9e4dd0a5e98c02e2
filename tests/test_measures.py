"""Measures beside an evaluation: diversity and divergence by hand, their files, intervals and interruptions."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from posttrain import atomic
from posttrain.errors import UserError
from posttrain.evaluation import divergence, diversity, measures
from posttrain.evaluation.measures import Measured
from posttrain.evaluation.metrics import bootstrap_interval, paired_difference
from posttrain.recipe import Divergence, Diversity
from posttrain.rollouts.engine import Sample, SamplingParams

ROWS = [{"prompt": [{"role": "user", "content": f"{i}+1"}], "key": f"sum {i}"} for i in range(7)]


class Killed(Exception):
    """The process dies."""


class Speaker:
    """Draws answers of 0 to 5 tokens from `params` alone; dies at the call number `dies_at`."""

    name = "speaker"

    def __init__(self, fingerprint: str = "a1", dies_at: int | None = None) -> None:
        self.fingerprint, self.dies_at, self.calls = fingerprint, dies_at, 0

    def sample(self, prompts: Sequence[Any], params: SamplingParams) -> list[list[Sample]]:
        if self.calls == self.dies_at:
            raise Killed
        self.calls += 1
        generator = np.random.default_rng(params.seed)
        return [[self._answer(generator, params.temperature) for _ in range(params.n)] for _ in prompts]

    def _answer(self, generator: np.random.Generator, temperature: float) -> Sample:
        ids = generator.integers(0, round(10 * temperature), size=generator.integers(0, 6)).tolist()
        return sample_of([*ids, 99], generator.uniform(-2, 0, size=len(ids) + 1).tolist())


class Scripted(Speaker):
    """Gives the same answers to every prompt."""

    def __init__(self, answers: Sequence[Sample]) -> None:
        super().__init__()
        self.answers = answers

    def sample(self, prompts: Sequence[Any], params: SamplingParams) -> list[list[Sample]]:
        return [list(self.answers) for _ in prompts]


def sample_of(token_ids: list[int], logprobs: list[float], finish_reason: Any = "stop") -> Sample:
    return Sample([1], token_ids, logprobs, "", finish_reason, 0)


SETTINGS = Diversity(temperatures=[0.6, 1.0], n=3, prompts=5)


def speak(engine: Any, folder: Path, settings: Diversity = SETTINGS, **changes: Any) -> None:
    arguments = {"max_tokens": 8, "seed": 7, "batch_size": 6, "folder": folder, "label": "policy"} | changes
    diversity.measure(engine, ROWS, settings, **arguments)


# ------------------------------------------------------------------ n-grams


def naive_bleu(answer: list[int], others: list[list[int]]) -> float:
    """BLEU-4 by its definition, every reference looked at anew."""
    if not answer:
        return float([] in others)
    product = 1.0
    for k in (1, 2, 3, 4):
        own = Counter(tuple(answer[i : i + k]) for i in range(len(answer) - k + 1))
        matched = 0
        for gram, count in own.items():
            matched += min(count, max(sum(tuple(o[i : i + k]) == gram for i in range(len(o) - k + 1)) for o in others))
        smooth = 0 if k == 1 else 1
        product *= (matched + smooth) / (own.total() + smooth)
    closest = sorted((abs(len(other) - len(answer)), len(other)) for other in others)[0][1]
    return product**0.25 * min(1.0, math.exp(1 - closest / len(answer)))


@pytest.mark.parametrize("seed", range(30))
def test_self_bleu_equals_its_definition(seed: int) -> None:
    generator = np.random.default_rng(seed)
    answers = [generator.integers(0, 3, size=size).tolist() for size in generator.integers(0, 12, size=7)]
    wanted = [naive_bleu(answer, answers[:i] + answers[i + 1 :]) for i, answer in enumerate(answers)]
    assert diversity.self_bleu(answers) == pytest.approx(np.mean(wanted), abs=1e-12)


def test_self_bleu_by_hand() -> None:
    assert diversity.self_bleu([[1, 2, 3, 4, 5]] * 4) == pytest.approx(1.0, abs=1e-12)
    assert diversity.self_bleu([[1], [1]]) == 1.0  # no pair of tokens, and still equal
    assert diversity.self_bleu([[], []]) == 1.0
    assert diversity.self_bleu([[], [1, 2]]) == 0.0
    assert diversity.self_bleu([[1, 2], [3, 4]]) == 0.0
    # a a b against a b: p1 = 2/3 (a once), p2 = (1 + 1)/(2 + 1), p3 = 1/2, p4 = 1; longer, so no brevity penalty
    # a b against a a b: p1 = 1, p2 = 1, p3 = p4 = 1; brevity e^{1 − 3/2}
    wanted = ((2 / 3 * 2 / 3 * 1 / 2) ** 0.25 + math.exp(-0.5)) / 2
    assert diversity.self_bleu([["a", "a", "b"], ["a", "b"]]) == pytest.approx(wanted, abs=1e-12)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        diversity.self_bleu([[1]])


def test_distinct_by_hand() -> None:
    answers = [[1, 2, 1], [1, 2], [3]]
    assert diversity.distinct(answers, 1) == (3, 6)
    assert diversity.distinct(answers, 2) == (2, 3)  # 12, 21, 12
    assert diversity.distinct([[1], []], 2) == (0, 0)


# ------------------------------------------------------------------ diversity


def test_diversity_by_hand(tmp_path: Path) -> None:
    answers = [
        sample_of([5, 6, 99], [-1.0, -0.5, -0.25]),
        sample_of([5, 6, 99], [-1.0, -0.5, -0.25]),
        sample_of([5, 7], [-2.0, -3.0], "length"),  # cut off: its last token is part of it
    ]
    speak(Scripted(answers), tmp_path)
    diversity.finish(tmp_path)
    found = measures.load(tmp_path)
    names = ["self_bleu", "distinct_1", "distinct_2", "distinct_answers", "entropy"]
    assert list(found) == [f"{name}@T{temperature}" for temperature in (0.6, 1.0) for name in names]
    values = {name: found[f"{name}@T1.0"].estimate() for name in names}
    # 5 6 against 5 6 is 1; 5 7 against 5 6: p1 = 1/2, p2 = 1/2, p3 = p4 = 1
    wanted = {
        "self_bleu": (2 + 0.25**0.25) / 3,
        "distinct_1": 3 / 6,
        "distinct_2": 2 / 3,
        "distinct_answers": 2 / 3,
        "entropy": (1.75 + 1.75 + 5.0) / 8,
    }
    assert {name: value.value for name, value in values.items() if value} == pytest.approx(wanted, abs=1e-12)
    entropy = found["entropy@T1.0"]
    assert (entropy.kind, entropy.unit) == ("diversity", "nats per token")
    assert entropy.description.endswith("n = 3, temperature 1.0, top-p 0.95.")
    assert entropy.bottom.tolist() == [8, 8, 8, 8, 8, 0, 0]  # five of seven prompts were asked


def tables(folder: Path, kind: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    path = folder / "measures" / f"{kind}.parquet"
    return pq.read_table(path).to_pylist(), json.loads(path.with_suffix(".json").read_text())


def test_a_killed_measurement_continues_and_workers_share_it(tmp_path: Path) -> None:
    whole = Speaker()
    speak(whole, tmp_path / "whole")
    diversity.finish(tmp_path / "whole")
    assert whole.calls == 6  # two temperatures, five prompts in chunks of two
    assert not (tmp_path / "whole" / "measures" / "diversity").exists()

    with pytest.raises(Killed):
        speak(Speaker(dies_at=4), tmp_path / "killed")
    with pytest.raises(UserError, match=r"2 of 6 parts of .* are missing, the first is number 4: measure again"):
        diversity.finish(tmp_path / "killed")
    assert measures.load(tmp_path / "killed") == {}
    again = Speaker()
    speak(again, tmp_path / "killed")
    diversity.finish(tmp_path / "killed")
    assert again.calls == 2
    assert tables(tmp_path / "killed", "diversity") == tables(tmp_path / "whole", "diversity")

    for rank in (1, 0):
        speak(Speaker(), tmp_path / "shared", worker=(rank, 2))
    diversity.finish(tmp_path / "shared")
    assert tables(tmp_path / "shared", "diversity") == tables(tmp_path / "whole", "diversity")

    idle = Speaker(dies_at=0)
    speak(idle, tmp_path / "whole")
    diversity.finish(tmp_path / "whole")
    for change in ({"seed": 8}, {"settings": Diversity(n=4)}, {"engine": Speaker("b2")}):
        with pytest.raises(UserError, match=r"is of another measurement .* to measure again"):
            speak(**({"engine": Speaker(), "folder": tmp_path / "whole"} | change))


def test_every_part_and_model_has_its_own_samples() -> None:
    one = {"seed": 7, "model": "a1"}
    seeds = [measures.seed(one, kind, index) for kind in ("diversity", "divergence") for index in range(3)]
    seeds.append(measures.seed(one | {"model": "b2"}, "diversity", 0))
    assert len(set(seeds)) == 7


def test_nothing_measured_is_nothing_loaded(tmp_path: Path) -> None:
    assert measures.load(tmp_path) == {}
    with pytest.raises(UserError, match="holds no diversity to finish"):
        diversity.finish(tmp_path)
    speak(Speaker(), tmp_path)
    diversity.finish(tmp_path)
    (tmp_path / "measures" / "diversity.parquet").unlink()
    with pytest.raises(UserError, match=r"diversity\.parquet is missing or damaged"):
        measures.load(tmp_path)


def truncated(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """The distribution after temperature and top-p, in float64."""
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    ordered, places = probabilities.sort(descending=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
    return torch.zeros_like(probabilities).scatter(-1, places, ordered / ordered.sum(-1, keepdim=True))


def test_entropy_is_that_of_the_policy(tiny_model: str, tmp_path: Path) -> None:
    from posttrain.rollouts.tokens import encode
    from posttrain.rollouts.transformers_engine import TransformersEngine

    engine = TransformersEngine.load(other_model(tiny_model, tmp_path / "moved"), batch_size=2000)  # far from uniform
    settings = Diversity(temperatures=[1.4], n=6000, top_p=0.9)
    row = {"prompt": [{"role": "user", "content": "3 5 7 = 24"}], "key": "k"}
    diversity.measure(engine, [row], settings, max_tokens=2, seed=3, batch_size=2000, folder=tmp_path, label="tiny")
    diversity.finish(tmp_path)
    entropy = measures.load(tmp_path)["entropy@T1.4"]

    # answers of at most two tokens: H(first) + Σ over first tokens that do not end it of p · H(second | first)
    prompt = encode(engine.tokenizer, row["prompt"])
    with torch.no_grad():
        first = truncated(engine.model(torch.tensor([prompt])).logits[0, -1], 1.4, 0.9)
        whole = torch.tensor([[*prompt, token] for token in range(len(first))])
        second = truncated(engine.model(whole).logits[:, -1], 1.4, 0.9)
    goes_on = first.clone()
    goes_on[engine.tokenizer.eos_token_id] = 0
    exact = torch.special.entr(first).sum() + goes_on @ torch.special.entr(second).sum(dim=1)
    logs = torch.cat([first, second.reshape(-1)]).clamp_min(1e-300).log()
    spread = 2 * float((logs.square() * torch.cat([first, (goes_on[:, None] * second).reshape(-1)])).sum().sqrt())
    assert abs(entropy.top[0] / 6000 - float(exact)) < 4 * spread / math.sqrt(6000)
    assert entropy.bottom[0] / 6000 == pytest.approx(1 + float(goes_on.sum()), abs=0.03)
    assert 4 * spread / math.sqrt(6000) < 0.1 * float(exact)


# ------------------------------------------------------------------ intervals


def measured(top: Any, bottom: Any) -> Measured:
    return Measured("m", "diversity", "share", "A share.", np.array(top, float), np.array(bottom, float))


def test_estimates_and_differences() -> None:
    generator = np.random.default_rng(0)
    top, other = generator.normal(2, 1, size=400), generator.normal(2, 1, size=400)
    ones = np.ones(400)
    estimate, wanted = measured(top, ones).estimate(), bootstrap_interval(top)
    assert estimate is not None
    assert estimate.value == pytest.approx(wanted.value, rel=1e-12)
    assert estimate[1:] == pytest.approx(wanted[1:], abs=0.02)  # other draws, the same 0.05 from the mean

    noise = 0.01 * other
    difference = measured(top + noise, ones).difference(measured(top, ones))
    assert difference is not None
    exact = paired_difference(top + noise, top)
    assert difference.value == pytest.approx(exact.value, rel=1e-9)
    assert difference[1:] == pytest.approx(exact[1:], abs=2e-4)  # paired: what the problems share cancels

    # problems that were not measured are as if they were not there
    padded = measured(np.append(top, [0, 0]), np.append(ones, [0, 0])).estimate()
    assert padded == estimate
    ratio = measured([1, 4], [1, 3]).estimate()
    assert ratio is not None
    assert (ratio.value, ratio.low, ratio.high) == (1.25, 1.0, 4 / 3)  # Σ/Σ; the resamples are 1/1, 5/4 and 4/3
    assert measured([0, 0], [0, 0]).estimate() is None
    assert measured([1, 1], [1, 1]).difference(measured([0, 0], [0, 0])) is None
    with pytest.raises(ValueError, match="400 problems here and 2 there"):
        measured(top, ones).difference(measured([1, 1], [1, 1]))


# ------------------------------------------------------------------ divergence


def other_model(tiny_model: str, folder: Path) -> str:
    """The tiny model with every weight moved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return str(folder)


TEXTS = [["3+5*7", "1-2", "9"], ["4*4", "", "7-5-3+1"], ["2", "2*2", "8+8"]]


def token_ids(tokenizer: Any, text: str, number: int) -> list[int]:
    """Tokens of an answer; the second sample of each problem is cut off."""
    ids: list[int] = tokenizer.convert_tokens_to_ids(list(text))
    return ids if number == 1 else [*ids, tokenizer.eos_token_id]


def evaluated(folder: Path, fingerprint: str, model: str) -> Path:
    """A finished evaluation as far as divergences look at it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    records = [
        {"problem": problem, "sample": number, "token_ids": token_ids(tokenizer, text, number)}
        for problem, texts in enumerate(TEXTS)
        for number, text in enumerate(texts)
    ]
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(records), folder / "samples.parquet")
    atomic.write_json(folder / "evaluation.json", {"identity": {"model": fingerprint, "n": 3}})
    return folder


def naive(model: Any, initial: Any, prompt: list[int], answer: list[int]) -> dict[str, list[float]]:
    """Divergences at every answer token from whole softmaxes in float64."""
    with torch.no_grad():
        ids = torch.tensor([prompt + answer])
        logs = [torch.log_softmax(m(ids).logits[0].double(), dim=-1)[len(prompt) - 1 : -1] for m in (model, initial)]
    log_p, log_q = logs
    p, q = log_p.exp(), log_q.exp()
    m = (p + q) / 2
    return {
        "reverse_kl": (p * (log_p - log_q)).sum(-1).tolist(),
        "forward_kl": (q * (log_q - log_p)).sum(-1).tolist(),
        "js": (0.5 * (p * (log_p - m.log()) + q * (log_q - m.log()))).sum(-1).tolist(),
    }


SOME = Divergence(answers=2)


def apart(model: str, initial: str, folder: Path, initial_folder: Path, **changes: Any) -> None:
    arguments: dict[str, Any] = {"dtype": "float32", "label": "policy", "settings": SOME} | changes
    divergence.measure(model, initial, ROWS[:3], folder=folder, initial_folder=initial_folder, **arguments)


def test_divergences_equal_whole_softmaxes(tiny_model: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from posttrain.rollouts.tokens import chat_ids

    moved = other_model(tiny_model, tmp_path / "moved")
    base, run = evaluated(tmp_path / "base", "a1", tiny_model), evaluated(tmp_path / "run", "b2", tiny_model)
    apart(moved, tiny_model, run, base)
    divergence.finish(run)
    found = measures.load(run)
    assert list(found) == ["reverse_kl", "forward_kl", "js", "kl_per_answer"]

    policy: Any = AutoModelForCausalLM.from_pretrained(moved).double()
    initial: Any = AutoModelForCausalLM.from_pretrained(tiny_model).double()
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    for problem, texts in enumerate(TEXTS):
        sums = {"reverse_kl": 0.0, "forward_kl": 0.0, "js": 0.0}
        tokens = 0
        for number, text in enumerate(texts[:2]):
            prompt = chat_ids(tokenizer, ROWS[problem]["prompt"], add_generation_prompt=True)
            answer = token_ids(tokenizer, text, number)
            tokens += len(answer)
            for name, values in naive(policy, initial, prompt, answer).items() if answer else ():
                sums[name] += math.fsum(values)
        for name, total in sums.items():
            assert found[name].top[problem] == pytest.approx(total, rel=1e-4)
            assert found[name].bottom[problem] == tokens
        assert found["kl_per_answer"].top[problem] == found["reverse_kl"].top[problem]
        assert found["kl_per_answer"].bottom[problem] == 2
    estimate = found["reverse_kl"].estimate()
    assert estimate is not None
    assert estimate.value > 0.01
    assert found["js"].unit == "nats per token"
    assert "½ KL(π_ref‖m)" in found["js"].description


def test_divergence_of_adapters_is_that_of_the_merged_policy(tiny_model: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(2)
    adapted: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    adapted.save_pretrained(tmp_path / "adapters")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    base = evaluated(tmp_path / "base", "a1", tiny_model)
    values = {}
    for name in ("adapters", "merged"):
        run = evaluated(tmp_path / name / "evaluation", "b2", tiny_model)
        apart(str(tmp_path / name), tiny_model, run, base)
        divergence.finish(run)
        values[name] = measures.load(run)["forward_kl"].top
    assert values["adapters"] == pytest.approx(values["merged"], rel=1e-4)
    assert values["adapters"].min() > 1e-3


def test_the_initial_policy_is_at_distance_zero_without_being_loaded(tiny_model: str, tmp_path: Path) -> None:
    base = evaluated(tmp_path / "base", "a1", tiny_model)
    apart("/nowhere", tiny_model, base, base)
    divergence.finish(base)
    found = measures.load(base)
    assert found["js"].top.tolist() == [0, 0, 0]
    assert found["js"].bottom.tolist() == [6 + 3, 4 + 0, 2 + 3]  # characters, and an end where it was not cut off
    estimate = found["kl_per_answer"].estimate()
    assert estimate == (0, 0, 0)


def test_a_killed_divergence_continues(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = other_model(tiny_model, tmp_path / "moved")
    base = evaluated(tmp_path / "base", "a1", tiny_model)
    monkeypatch.setattr(divergence, "_ANSWERS", 2)  # one problem per part
    whole, killed, shared = (evaluated(tmp_path / name, "b2", tiny_model) for name in ("whole", "killed", "shared"))
    apart(moved, tiny_model, whole, base)
    divergence.finish(whole)

    sums, calls = divergence.sum_over_answers, []

    def dies(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return sums(*arguments)

    monkeypatch.setattr(divergence, "sum_over_answers", dies)
    with pytest.raises(Killed):
        apart(moved, tiny_model, killed, base)
    apart(moved, tiny_model, killed, base)
    divergence.finish(killed)
    assert len(calls) == 4  # one part, death, and the two that were missing
    for rank in (1, 0):
        apart(moved, tiny_model, shared, base, worker=(rank, 2))
    divergence.finish(shared)
    assert tables(killed, "divergence") == tables(whole, "divergence") == tables(shared, "divergence")
    with pytest.raises(UserError, match=r"another measurement \('answers' is 2 there and 1 here\)"):
        apart(moved, tiny_model, whole, base, settings=Divergence(answers=1))


def test_kl_per_answer_is_the_divergence_of_whole_answers(tiny_model: str, tmp_path: Path) -> None:
    """Σ_y π(y) Σ_t KL_t(y) = Σ_y π(y) log π(y)/π_ref(y), over all answers of at most two tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy: Any = AutoModelForCausalLM.from_pretrained(other_model(tiny_model, tmp_path / "moved")).eval()
    initial: Any = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    prompt = [3, 4, 5]
    vocabulary, end = policy.config.vocab_size, AutoTokenizer.from_pretrained(tiny_model).eos_token_id
    answers = [[end]] + [[a, b] for a in range(vocabulary) if a != end for b in range(vocabulary)]

    def log_probabilities(model: Any) -> torch.Tensor:
        with torch.no_grad():
            ids = torch.tensor([[*prompt, token] for token in range(vocabulary)])
            steps = torch.log_softmax(model(ids).logits[:, -2:].double(), dim=-1)
        return torch.stack([steps[0, 0, y[0]] + (steps[y[0], 1, y[1]] if len(y) == 2 else 0) for y in answers])

    log_p, log_q = log_probabilities(policy), log_probabilities(initial)
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-6)
    exact = float((log_p.exp() * (log_p - log_q)).sum())
    sums = divergence.sum_over_answers(policy, initial, [(prompt, y) for y in answers], ["reverse_kl"])
    assert float(log_p.exp() @ torch.from_numpy(sums["reverse_kl"])) == pytest.approx(exact, rel=1e-5)
    assert exact > 0.01


def test_what_cannot_be_measured_is_refused(tiny_model: str, tmp_path: Path) -> None:
    base = evaluated(tmp_path / "base", "a1", tiny_model)
    with pytest.raises(UserError, match=r"'renyi' in evaluation.divergence.names is none that we know: choose from"):
        apart(tiny_model, tiny_model, base, base, settings=Divergence(names=["renyi"]))
    with pytest.raises(UserError, match=r"'alpha' .* has a parameter that cannot be set there"):
        apart(tiny_model, tiny_model, base, base, settings=Divergence(names=["alpha"]))
    with pytest.raises(UserError, match="holds no finished evaluation"):
        apart(tiny_model, tiny_model, tmp_path / "none", base)
