"""How much the answers of a policy to one prompt differ, at several temperatures.

`measure` draws n answers per prompt and temperature, `finish` writes `measures/diversity.*`. At every temperature T:

    self_bleu@T          mean over the n answers of BLEU-4 against the other n − 1; 1 when all are equal
    distinct_1@T         different tokens of a prompt's n answers / all their tokens
    distinct_2@T         different pairs of adjacent tokens / all such pairs
    distinct_answers@T   different answers / n
    entropy@T            nats per token: mean of −log p of the sampled tokens

Tokens are token ids, so that every language and tokenizer can be measured: numbers of models with different tokenizers
do not compare. The end-of-sequence token counts for the entropy, as a choice of the policy, and is no part of an
answer's n-grams.

p is the distribution a token was drawn from, after temperature and top-p. E[−log p(y_t) | prefix] is its entropy, so
the sum over a sampled answer is an unbiased estimate of the entropy of whole answers, up to the length limit.

Source: the measures and settings of f-DPO, arXiv 2309.16240. Differs: token ids for words; entropy from sampled
tokens, which needs no vocabulary-sized pass.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from posttrain import tasks
from posttrain.evaluation import measures
from posttrain.recipe import Diversity

if TYPE_CHECKING:
    from posttrain.rollouts.engine import Engine, Sample

KIND = "diversity"

_TEXTS = {
    "self_bleu": ("BLEU", "BLEU-4 of an answer against the other answers to its prompt; 1 when all are equal"),
    "distinct_1": ("share", "Different tokens among all tokens of the answers to a prompt"),
    "distinct_2": ("share", "Different pairs of adjacent tokens among all pairs in the answers to a prompt"),
    "distinct_answers": ("share", "Different answers among all answers to a prompt"),
    "entropy": ("nats per token", "Entropy of the distribution that tokens are drawn from"),
}


def self_bleu(answers: Sequence[Sequence[Hashable]], order: int = 4) -> float:
    """Mean over answers of BLEU against all others: 1 when all are equal, near 0 when they share little.

    BLEU = brevity · (Π_{k ≤ order} p_k)^{1/order}. p_1 = m_1/t_1 and p_k = (m_k + 1)/(t_k + 1) above, where t_k counts
    the k-grams of the answer and m_k those of them that a reference has, each at most as often as in the reference
    that has it most. brevity = min(1, exp(1 − r/c)) for c tokens, and r those of the reference of the closest length,
    the shorter of two. An empty answer scores 1 if another one is empty, and else 0.

    For every k-gram the two largest counts over the answers are kept, so the time is linear in the k-grams of all.

    Raises:
        ValueError: there are fewer than two answers.

    Source: self-BLEU, Texygen, arXiv 1802.01886; BLEU, Papineni et al. 2002; smoothing, Lin & Och 2004. Differs:
    nothing.
    """
    if len(answers) < 2:
        raise ValueError(f"Self-BLEU compares answers with one another and needs at least 2, got {len(answers)}.")
    logs = [0.0] * len(answers)  # Σ_k log p_k
    for k in range(1, order + 1):
        counts = [_ngrams(answer, k) for answer in answers]
        most: dict[tuple[Hashable, ...], tuple[int, int, int]] = {}  # largest count, whose it is, second largest
        for index, own in enumerate(counts):
            for gram, count in own.items():
                first, holder, second = most.get(gram, (0, -1, 0))
                most[gram] = (count, index, first) if count > first else (first, holder, max(second, count))
        for index, own in enumerate(counts):
            matched = 0
            for gram, count in own.items():
                first, holder, second = most[gram]
                matched += min(count, second if holder == index else first)
            smooth = int(k > 1)
            top, bottom = matched + smooth, own.total() + smooth
            logs[index] += math.log(top / bottom) if top else -math.inf
    lengths = sorted(len(answer) for answer in answers)
    empty = lengths.count(0)
    total = 0.0
    for answer, log in zip(answers, logs, strict=True):
        length = len(answer)
        if length == 0:
            total += empty > 1
            continue
        place = bisect_left(lengths, length)
        closest = min(
            lengths[max(0, place - 1) : place] + lengths[place + 1 : place + 2], key=lambda other: abs(other - length)
        )
        total += math.exp(log / order + min(0.0, 1 - closest / length))
    return total / len(answers)


def distinct(answers: Sequence[Sequence[Hashable]], order: int) -> tuple[int, int]:
    """Different n-grams of all answers together, and the number of their n-grams: distinct-n is the quotient.

    Source: Li et al., arXiv 1510.03055. Differs: nothing.
    """
    counts: Counter[tuple[Hashable, ...]] = Counter()
    for answer in answers:
        counts.update(_ngrams(answer, order))
    return len(counts), counts.total()


def _ngrams(answer: Sequence[Hashable], order: int) -> Counter[tuple[Hashable, ...]]:
    return Counter(tuple(answer[start : start + order]) for start in range(len(answer) - order + 1))


def measure(
    engine: Engine,
    rows: Sequence[tasks.Row],
    settings: Diversity,
    *,
    max_tokens: int,
    seed: int,
    batch_size: int,
    folder: Path,
    label: str,
    worker: tuple[int, int] = (0, 1),
) -> None:
    """Sample `settings.n` answers per prompt and temperature and write the parts; then rank 0 calls `finish`.

    Args:
        rows: of the evaluation.
        max_tokens: longest answer.
        seed: of the evaluation; other samples are drawn than there.
        batch_size: answers sampled at a time.
        folder: of the evaluation.
        label: of the policy.
        worker: (rank, world); the parts are shared.

    Raises:
        UserError: `folder` holds a measurement of something else.
    """
    from posttrain.rollouts.engine import SamplingParams  # imports torch

    asked = rows[: settings.prompts]
    size = max(1, batch_size // settings.n)
    per_temperature = math.ceil(len(asked) / size)
    identity = {
        "data": tasks.fingerprint(rows),
        "problems": len(rows),
        "prompts": len(asked),
        "model": engine.fingerprint,
        "engine": engine.name,
        "temperatures": settings.temperatures,
        "top_p": settings.top_p,
        "n": settings.n,
        "max_tokens": max_tokens,
        "seed": seed,
        "prompts_per_part": size,
        "parts": per_temperature * len(settings.temperatures),
    }

    def make(index: int) -> pa.Table:
        temperature = settings.temperatures[index // per_temperature]
        start = index % per_temperature * size
        params = SamplingParams(
            max_tokens=max_tokens,
            n=settings.n,
            temperature=temperature,
            top_p=settings.top_p,
            seed=measures.seed(identity, KIND, index),
        )
        groups = engine.sample([tasks.shown(row) for row in asked[start : start + size]], params)
        records = [
            {"problem": problem, "measure": f"{name}@T{temperature}", "top": float(top), "bottom": float(bottom)}
            for problem, group in enumerate(groups, start)
            for name, (top, bottom) in _values(group).items()
        ]
        return pa.Table.from_pylist(records, schema=measures.SCHEMA)

    measures.produce(folder, KIND, identity, make, label=f"diversity {label}", worker=worker)


def finish(folder: Path) -> None:
    """Join the parts that all workers wrote.

    Raises:
        UserError: parts are missing.
    """
    measures.join(folder, KIND, _entries)


def _values(group: Sequence[Sample]) -> dict[str, tuple[float, float]]:
    """(top, bottom) of every measure for the answers to one prompt."""
    answers = [tuple(one.token_ids[:-1] if one.finish_reason == "stop" else one.token_ids) for one in group]
    return {
        "self_bleu": (self_bleu(answers), 1),
        "distinct_1": distinct(answers, 1),
        "distinct_2": distinct(answers, 2),
        "distinct_answers": (len(set(answers)), len(answers)),
        "entropy": (
            -math.fsum(logp for one in group for logp in one.logprobs),
            sum(len(one.logprobs) for one in group),
        ),
    }


def _entries(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{name}@T{temperature}": measures.described(
            unit, f"{what}: n = {identity['n']}, temperature {temperature}, top-p {identity['top_p']}."
        )
        for temperature in identity["temperatures"]
        for name, (unit, what) in _TEXTS.items()
    }
