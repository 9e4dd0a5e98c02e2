"""Arithmetic on two-digit numbers, `12+34=`: one answer each. A probe of forgetting beside countdown.

`12+34` and `34+12` are two prompts but fall in the same split, as do the two orders of a product.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from posttrain.tasks import Row, TaskOptions
from posttrain.tasks._characters import CharacterTask


class Options(TaskOptions):
    """Options of the task `arithmetic`."""

    operations: list[Literal["+", "-", "*"]] = Field(default=["+"], min_length=1)
    max_operand: Annotated[int, Field(ge=10, le=99)] = 99
    """Operands are 10 to this."""
    rows: Annotated[int, Field(gt=0)] = 1000
    """Training prompts; evaluation prompts come on top, in proportion to `eval_share`."""
    eval_share: Annotated[float, Field(ge=0, lt=1)] = 0.16
    """Share of all prompts that is held out."""
    seed: int = 0
    """Of the draw, which decides which prompts are used and their order."""

    @field_validator("operations")
    @classmethod
    def _each_once(cls, operations: list[str]) -> list[str]:
        if len(set(operations)) < len(operations):
            raise ValueError(f"{operations} names an operation twice: name each once")
        return operations


class Task(CharacterTask):
    """Sums, differences and products of two-digit numbers."""

    name = "arithmetic"
    options: Options

    @property
    def verifier(self) -> tuple[str, dict[str, Any]]:
        """The reward `math`, with its defaults."""
        return "math", {}

    def demonstrations(self, rows: Sequence[Row], count: int, *, seed: int) -> list[tuple[Row, str]]:
        """Uniformly random rows, each with its answer."""
        return [(row, row["answer"]) for row in random.Random(seed).choices(rows, k=count)]

    def _drawn(self) -> Iterator[tuple[str, Row]]:
        options = self.options
        for problem in problems(options.operations, range(10, options.max_operand + 1), options.seed):
            yield identity(self.name, *problem), _row(*problem)


def problems(operations: Sequence[str], operands: range, seed: int) -> list[tuple[int, str, int]]:
    """All problems of two operands, in an order that the seed decides."""
    found = [(a, sign, b) for sign in sorted(operations) for a in operands for b in operands]
    random.Random(seed).shuffle(found)
    return found


def result(a: int, sign: str, b: int) -> int:
    """What a problem comes to."""
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


def identity(task: str, a: int, sign: str, b: int) -> str:
    """The key of a task's problem, with the operands of a commutative operation in order."""
    first, second = (a, b) if sign == "-" else sorted((a, b))
    return f"{task}:{first}{sign}{second}"


def _row(a: int, sign: str, b: int) -> Row:
    return {
        "prompt": [{"role": "user", "content": f"{a}{sign}{b}="}],
        "key": f"arithmetic:{a}{sign}{b}",
        "answer": str(result(a, sign, b)),
    }
