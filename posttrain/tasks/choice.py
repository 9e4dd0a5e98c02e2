"""Choice: which of four numbers is a sum, a difference or a product? The wrong ones are what typical mistakes give.

A carry that is forgotten or added where there is none, the smaller digit always taken from the larger, another
operation, one factor once too often, exchanged digits, an error of one, two or a hundred: the three wrong choices of a
question are drawn from what these give for its numbers. The right one stands at every place equally often, and is the
least, the second, the third and the greatest number equally often, so that neither place nor size gives it away.

The form `words` is English, for language models. The form `symbols` is `12+34=A:46;B:36;C:56;D:47`, answered by `A`,
for a small model over characters.

A sum or product and the same one in the other order fall in the same split.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from posttrain.tasks import Row, TaskOptions
from posttrain.tasks._characters import ALPHABET, CharacterTask
from posttrain.tasks.arithmetic import identity, problems, result

LABELS = "ABCD"
_SIGNS = {"+": "+", "-": "−", "*": "×"}


class Options(TaskOptions):
    """Options of the task `choice`."""

    form: Literal["words", "symbols"] = "words"
    """English for language models, or one line for a small model over characters."""
    operations: list[Literal["+", "-", "*"]] = Field(default=["+", "-", "*"], min_length=1)
    max_operand: Annotated[int, Field(ge=20, le=99)] = 99
    """Operands are 11 to this."""
    rows: Annotated[int, Field(gt=0)] = 4000
    """Training prompts; evaluation prompts come on top, in proportion to `eval_share`."""
    eval_share: Annotated[float, Field(ge=0, lt=1)] = 0.16
    """Share of all prompts that is held out."""
    seed: int = 0
    """Of the draw, which decides which questions are used, their order and their choices."""

    @field_validator("operations")
    @classmethod
    def _each_once(cls, operations: list[str]) -> list[str]:
        if len(set(operations)) < len(operations):
            raise ValueError(f"{operations} names an operation twice: name each once")
        return operations


class Task(CharacterTask):
    """Arithmetic on two-digit numbers with four choices."""

    name = "choice"
    options: Options

    @property
    def verifier(self) -> tuple[str, dict[str, Any]]:
        """The reward `choice`, with its defaults."""
        return "choice", {}

    def demonstrations(self, rows: Sequence[Row], count: int, *, seed: int) -> list[tuple[Row, str]]:
        """Uniformly random rows, each with its answer: the label, in English after the result."""
        return [(row, self._answer(row)) for row in random.Random(seed).choices(rows, k=count)]

    @property
    def alphabet(self) -> str | None:
        """Digits, operators, labels and signs of the form `symbols`; unbounded in `words`."""
        return ALPHABET + LABELS + ":;" if self.options.form == "symbols" else None

    def _drawn(self) -> Iterator[tuple[str, Row]]:
        options = self.options
        for problem in problems(options.operations, range(11, options.max_operand + 1), options.seed):
            yield identity(self.name, *problem), self._row(*problem)

    def _row(self, a: int, sign: str, b: int) -> Row:
        key = f"choice:{a}{sign}{b}"
        draw = random.Random(f"{self.options.seed} {key}")
        right = result(a, sign, b)
        wrong = mistakes(a, sign, b)
        smaller, greater = [value for value in wrong if value < right], [value for value in wrong if value > right]
        rank = draw.randrange(len(LABELS))
        choices = [right, *draw.sample(smaller, k=rank), *draw.sample(greater, k=len(LABELS) - 1 - rank)]
        draw.shuffle(choices)
        listed = [str(choice) for choice in choices]
        if self.options.form == "symbols":
            content = f"{a}{sign}{b}=" + ";".join(f"{at}:{text}" for at, text in zip(LABELS, listed, strict=True))
        else:
            lines = "\n".join(f"{at}) {text}" for at, text in zip(LABELS, listed, strict=True))
            content = f"What is {a} {_SIGNS[sign]} {b}?\n{lines}\nAnswer with the letter of the right choice."
        return {
            "prompt": [{"role": "user", "content": content}],
            "key": key,
            "choices": listed,
            "answer": LABELS[choices.index(right)],
        }

    def _answer(self, row: Row) -> str:
        label: str = row["answer"]
        if self.options.form == "symbols":
            return label
        expression = str(row["key"]).partition(":")[2]
        spelled = f"{expression[:2]} {_SIGNS[expression[2]]} {expression[3:]}"
        return f"{spelled} = {row['choices'][LABELS.index(label)]}, so the answer is {label}."


def mistakes(a: int, sign: str, b: int) -> list[int]:
    """Typical wrong results of an operation on two-digit numbers, each once, in a fixed order.

    At least three are smaller than the right one, and three greater.
    """
    (a_tens, a_ones), (b_tens, b_ones) = divmod(a, 10), divmod(b, 10)
    right = result(a, sign, b)
    if sign == "+":
        found = [
            (a_tens + b_tens) * 10 + (a_ones + b_ones) % 10,  # the carry is forgotten
            int(f"{a_tens + b_tens}{a_ones + b_ones}"),  # or written out
            right + 10,
            right - 10,
            a - b,
        ]
    elif sign == "-":
        found = [
            abs(a_tens - b_tens) * 10 + abs(a_ones - b_ones),  # the smaller digit from the larger
            right + 10,  # the borrowed ten is not paid back
            right - 10,
            b - a,
            a + b,
        ]
    else:
        found = [
            a * b - a,
            a * b + b,
            a_tens * b_tens * 100 + a_ones * b_ones,  # tens by tens and ones by ones alone
            (a_ones * b_ones % 10)
            + 10 * (a_tens * b_ones + a_ones * b_tens)
            + 100 * a_tens * b_tens,  # no carry of ones
            a + b,
        ]
    found += [right + 1, right - 1, right + 2, right - 2, right + 100, right - 100]
    digits = str(abs(right))
    if digits[-1] != "0":  # the last two digits are exchanged
        found.append((-1 if right < 0 else 1) * int(digits[:-2] + digits[-2:][::-1]))
    return [value for value in dict.fromkeys(found) if value != right]
