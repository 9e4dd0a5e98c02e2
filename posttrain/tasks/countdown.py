"""Countdown on digits: combine every number once, read strictly left to right, to reach the target. Many solutions.

The prompt `337=24` lists the digits in order and the target; `3*7+3` answers it. Operators are `+ - *`, there is no
precedence and there are no parentheses. Prompts are the distinct pairs of a multiset of digits
and a target that some expression reaches.

With `attempts`, an answer may try: `3*5+7,3*7+3` stands for `3*7+3`, for what follows the last comma is judged. A warm
start then shows solutions after up to that many wrong expressions, so that answers differ in length, wrong ones too.

They are drawn as if by drawing expressions uniformly at random and keeping each new prompt, so prompts with many
solutions tend to come first, and a smaller `rows` is a prefix of a larger one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.tasks import Row, Split, TaskOptions
from posttrain.tasks._characters import ALPHABET, CharacterTask
from posttrain.tasks._drawn import divide

SEPARATOR = ","
"""Between attempts; no character of `ALPHABET`, all of which prompts and expressions use already."""

Prompt = tuple[tuple[int, ...], int]
"""The sorted numbers and the target."""

Digit = Annotated[int, Field(ge=0, le=9)]


class Options(TaskOptions):
    """Options of the task `countdown`."""

    numbers: Literal[3, 4] = 3
    """Digits per prompt."""
    min_digit: Digit = 1
    max_digit: Digit = 9
    max_target: Annotated[int, Field(ge=1)] = 99
    """Targets are 1 to this."""
    rows: Annotated[int, Field(gt=0)] | None = None
    """Training prompts; default all of them for 3 numbers and 4,000 for 4. Evaluation prompts come on top, in
    proportion to `eval_share`."""
    eval_share: Annotated[float, Field(ge=0, lt=1)] = 0.16
    """Share of all prompts that is held out."""
    attempts: Annotated[int, Field(ge=0)] = 0
    """Most wrong expressions before the solution in a demonstration; their number is drawn uniformly."""
    seed: int = 0
    """Of the draw, which decides the order of the prompts and, with `rows`, which of them are used."""

    @model_validator(mode="after")
    def _range_of_digits(self) -> Options:
        if self.min_digit > self.max_digit:
            raise ValueError(f"min_digit {self.min_digit} exceeds max_digit {self.max_digit}: exchange them")
        return self


class Task(CharacterTask):
    """Countdown with 3 or 4 digits."""

    name = "countdown"
    options: Options

    @property
    def verifier(self) -> tuple[str, dict[str, Any]]:
        """The reward `countdown`, read left to right, of the last attempt."""
        options = {"precedence": "left_to_right"}
        return "countdown", {**options, "separator": SEPARATOR} if self.options.attempts else options

    @property
    def alphabet(self) -> str:
        """Digits, operators, the signs that frame a prompt, and with `attempts` their separator."""
        return ALPHABET + SEPARATOR if self.options.attempts else ALPHABET

    def demonstrations(self, rows: Sequence[Row], count: int, *, seed: int) -> list[tuple[Row, str]]:
        """Uniformly random rows, each with a uniformly random solution, with `attempts` after wrong expressions."""
        draw = random.Random(seed)
        chosen = draw.choices(rows, k=count)
        return [(row, self._demonstration(row, draw)) for row in chosen]

    def _demonstration(self, row: Row, draw: random.Random) -> str:
        solutions = self._solutions[tuple(row["numbers"]), row["target"]]
        solution = draw.choice(solutions)
        if not self.options.attempts:
            return solution
        tried = [_wrong(row["numbers"], solutions, draw) for _ in range(draw.randint(0, self.options.attempts))]
        return SEPARATOR.join([*tried, solution])

    @property
    def _solutions(self) -> Mapping[Prompt, list[str]]:
        options = self.options
        return solve(options.numbers, options.min_digit, options.max_digit, options.max_target)

    @cached_property
    def _splits(self) -> dict[Split, list[Row]]:
        options = self.options
        wanted = 4000 if options.rows is None and options.numbers == 4 else options.rows
        return divide(self.name, self._drawn(), wanted, options.eval_share)

    def _drawn(self) -> Iterator[tuple[str, Row]]:
        solutions, draw = self._solutions, random.Random(self.options.seed)
        # Waiting times at rates equal to the numbers of solutions: their order is that of first hits by expressions.
        drawn = sorted(solutions, key=lambda prompt: draw.expovariate(len(solutions[prompt])))
        for prompt in drawn:
            row = _row(prompt, solutions[prompt])
            if self.options.attempts:  # in the rows, because by their fingerprint warm starts are told apart
                row["attempts"] = self.options.attempts
            yield row["key"], row


def _wrong(numbers: Sequence[int], solutions: Sequence[str], draw: random.Random) -> str:
    """An expression that uses every number once and misses the target, uniformly among those that do."""
    while True:
        first, *others = draw.sample(numbers, k=len(numbers))
        text = str(first) + "".join(draw.choice("+-*") + str(number) for number in others)
        if text not in solutions:
            return text


def _row(prompt: Prompt, solutions: Sequence[str]) -> Row:
    numbers, target = prompt
    content = f"{''.join(map(str, numbers))}={target}"
    return {
        "prompt": [{"role": "user", "content": content}],
        "key": f"countdown:{content}",
        "numbers": list(numbers),
        "target": target,
        "solutions": len(solutions),
        "solution": solutions[0],
    }


@lru_cache(maxsize=4)
def solve(numbers: int, min_digit: int, max_digit: int, max_target: int) -> Mapping[Prompt, list[str]]:
    """Every prompt that has a solution, with all its solutions, both in a fixed order."""
    digits = range(min_digit, max_digit + 1)
    partial: list[tuple[tuple[int, ...], int, str]] = [((digit,), digit, str(digit)) for digit in digits]
    for _ in range(numbers - 1):
        partial = [
            ((*used, digit), result, text + sign + str(digit))
            for used, value, text in partial
            for digit in digits
            for sign, result in (("+", value + digit), ("-", value - digit), ("*", value * digit))
        ]
    found: dict[Prompt, list[str]] = {}
    for used, value, text in partial:
        if 1 <= value <= max_target:
            found.setdefault((tuple(sorted(used)), value), []).append(text)
    return dict(sorted(found.items()))
