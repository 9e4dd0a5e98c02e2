"""Repetition (shaping): a penalty for n-grams that a completion says again, from 0 (none) to `max_penalty` (all alike).

    R = max_penalty · (1 − distinct n-grams / all n-grams)          max_penalty < 0

A completion of fewer than n words has no n-gram and is not penalised. N-grams are counted exactly, in O(L log n) for L
words: numbers that stand for 2ᵏ-grams are paired into 2ᵏ⁺¹-grams.

Words are runs of letters and digits in one case; of scripts that are written without spaces (Chinese, Japanese, Thai,
Lao, Khmer, Burmese) every letter is one. Punctuation is not looked at, so a line of dashes repeats nothing. With
`unit: tokens` they are the completion's tokens (`completion_ids`), whatever they stand for.

Status: `ok` where nothing is repeated, else `wrong`. `Verdict.answer` is the share of n-grams that are repetitions.

Source: Demystifying Long Chain-of-Thought Reasoning, arXiv 2502.03373 (N-gram repetition penalty). Differs: one reward
per completion, where the paper takes P from every token of a repeated 40-gram.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from posttrain.rewards import RewardOptions, Verdict, Verifier
from posttrain.rewards._scripts import words


class Options(RewardOptions):
    """Options of the reward `repetition`."""

    n: Annotated[int, Field(ge=1, le=1000)] = 3
    """Words or tokens of an n-gram."""
    max_penalty: Annotated[float, Field(lt=0, allow_inf_nan=False)] = -1.0
    """The reward that a completion of one n-gram, said for ever, approaches."""
    unit: Literal["words", "tokens"] = "words"


class Reward(Verifier):
    """Shaping: 0 without repetition, down to `max_penalty`."""

    name = "repetition"
    accuracy = False

    def __init__(self, options: Options) -> None:
        self.options = options
        self.sampled = ("completion_ids",) if options.unit == "tokens" else ()

    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """Count the n-grams of the whole completion, its thought included."""
        units: Sequence[Hashable] = (
            words(completion.casefold()) if self.options.unit == "words" else list(row["completion_ids"])
        )
        share = repeated_share(units, self.options.n)
        return Verdict(self.options.max_penalty * share if share else 0.0, "wrong" if share else "ok", f"{share:.4f}")


def repeated_share(units: Sequence[Hashable], n: int) -> float:
    """1 − distinct n-grams / all n-grams, in [0, 1); 0 where there is no n-gram."""
    numbers = _numbered(units)
    width = 1
    while len(numbers) > 1 and width < n:
        step = min(width, n - width)  # the last two halves may overlap
        numbers = _numbered(zip(numbers, numbers[step:], strict=False))
        width += step
    return 1.0 - len(set(numbers)) / len(numbers) if width == n and numbers else 0.0


def _numbered(values: Iterable[Hashable]) -> list[int]:
    """0, 1, ... for every value, by its first occurrence."""
    known: dict[Hashable, int] = {}
    return [known.setdefault(value, len(known)) for value in values]
