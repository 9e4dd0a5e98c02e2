"""Countdown: an arithmetic expression that uses every given number once and equals the target.

The answer is what the last `<answer>...</answer>` holds, or else the last line that is not empty; a trailing
`= target` is dropped. Only what follows the last `</think>` counts, and with a `separator` only what follows that.

Grammar: non-negative integers, `+ - * /`, parentheses; no unary minus. Values are exact fractions. Nothing is ever
evaluated as code: the text goes through a tokenizer and a shunting-yard of our own.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

from pydantic import Field, model_validator

from posttrain.rewards import RewardOptions, Verdict, Verifier, after_thinking

MAX_TOKENS = 64
MAX_DIGITS = 18
"""Digits of one integer in an answer."""

_TOKEN = re.compile(r"\s*([0-9]+|[-+*/()])")
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_WRITTEN = frozenset("0123456789+-*/()= \t\n\r")
_LEVELS = {
    "standard": {"+": 1, "-": 1, "*": 2, "/": 2},
    "left_to_right": {"+": 1, "-": 1, "*": 1, "/": 1},
}


class Options(RewardOptions):
    """Options of the reward `countdown`."""

    precedence: Literal["left_to_right", "standard"] = "standard"
    """How an expression is read: with the usual precedence and parentheses, or strictly left to right without them."""
    # Out of what a store or an evaluation remembers as long as it says nothing.
    separator: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """Between attempts, as in `3*5+7,3*7+3`: only what follows the last one is judged. Default: one attempt."""

    @model_validator(mode="after")
    def _separator_is_no_expression(self) -> Options:
        if self.separator is not None and (not self.separator or set(self.separator) & _WRITTEN):
            raise ValueError(
                f"separator {self.separator!r} is empty or part of what expressions are written in: choose other "
                "characters, such as ','"
            )
        return self


class Reward(Verifier):
    """1.0 when the expression uses exactly the row's `numbers` and equals its `target`, else 0.0."""

    name = "countdown"
    requires = ("numbers", "target")

    def __init__(self, options: Options) -> None:
        self.options = options

    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """Judge the expression; `Verdict.answer` is its text without white space and leading zeros."""
        numbers, target = row["numbers"], row["target"]
        if not numbers or not all(isinstance(n, int) for n in (*numbers, target)):
            detail = f"numbers {numbers!r} and target {target!r} are not all integers"
            return Verdict(None, "unparseable_gold", detail=detail)
        text = _extract(completion, target, self.options.separator)
        if not text:
            return Verdict(0.0, "no_answer")
        try:
            tokens = _tokenize(text)
            # Checked before anything is computed: it bounds the size of every intermediate value.
            if sorted(int(token) for token in tokens if token.isdigit()) != sorted(numbers):
                return Verdict(0.0, "wrong", "".join(tokens), "the numbers are not the given ones, each once")
            value = _evaluate(tokens, self.options.precedence)
        except ZeroDivisionError:
            return Verdict(0.0, "wrong", "".join(tokens), "a division by zero")
        except ValueError as error:
            return Verdict(0.0, "wrong", detail=str(error))
        if value != target:
            return Verdict(0.0, "wrong", "".join(tokens), f"it equals {value}")
        return Verdict(1.0, "ok", "".join(tokens))

    def gold(self, row: Mapping[str, Any]) -> str | None:
        """The row's `solution`, where it has one."""
        solution = row.get("solution")
        return None if solution is None else str(solution)


def _extract(completion: str, target: int, separator: str | None) -> str:
    """The text of the answer, empty when there is none."""
    text = after_thinking(completion) or ""
    before, closed, _ = text.rpartition("</answer>")
    _, opened, inside = before.rpartition("<answer>")
    if not (closed and opened):
        inside = (text.strip().splitlines() or [""])[-1]
    if separator is not None:
        inside = inside.rpartition(separator)[2]
    expression, equals, result = inside.rpartition("=")
    return (expression if equals and result.strip() == str(target) else inside).strip()


def _tokenize(text: str) -> list[str]:
    """Integers (leading zeros removed), operators and parentheses.

    Raises:
        ValueError: another character, a number that is too long, or too many tokens.
    """
    tokens: list[str] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(f"no expression at character {position}")
        token = match[1]
        if len(token) > MAX_DIGITS:
            raise ValueError(f"a number of more than {MAX_DIGITS} digits")
        if len(tokens) == MAX_TOKENS:
            raise ValueError(f"more than {MAX_TOKENS} tokens")
        tokens.append(str(int(token)) if token.isdigit() else token)
        position = match.end()
    return tokens


def _evaluate(tokens: Sequence[str], precedence: Literal["left_to_right", "standard"]) -> Fraction:
    """The exact value, by Dijkstra's shunting-yard.

    Raises:
        ValueError: not an expression.
        ZeroDivisionError: a division by zero.
    """
    levels = _LEVELS[precedence]
    values: list[Fraction] = []
    pending: list[str] = []
    operand_next = True

    def reduce_while(level: int) -> None:
        while pending and levels.get(pending[-1], 0) >= level:
            right, left = values.pop(), values.pop()
            values.append(_OPERATORS[pending.pop()](left, right))

    for token in tokens:
        if token in "()" and precedence == "left_to_right":
            raise ValueError("parentheses, but the expression is read strictly left to right")
        if operand_next != (token == "(" or token.isdigit()):
            raise ValueError(f"'{token}' in the wrong place")
        if token.isdigit():
            values.append(Fraction(int(token)))
            operand_next = False
        elif token == "(":
            pending.append(token)
        elif token == ")":
            reduce_while(1)
            if not pending:
                raise ValueError("')' without '('")
            pending.pop()
        else:
            reduce_while(levels[token])
            pending.append(token)
            operand_next = True
    if operand_next:
        raise ValueError("the expression is incomplete")
    reduce_while(1)
    if pending:
        raise ValueError("'(' without ')'")
    return values[0]
