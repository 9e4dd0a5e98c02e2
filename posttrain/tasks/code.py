"""Small functions to write: a value goes through a few steps on numbers, lists and texts, each said in English.

`solve(x)` takes an integer, a list of integers or a text, and each step takes what the one before gives. A row has a
few examples in its prompt, and other inputs as `tests`, whose outputs come from our own functions. Tests are such that
no step may be left out: every program that does all but one of them fails one. Rows are told apart by their steps, and
steps that come to the same function (keep the even numbers and then the large ones, or the other way round) fall in the
same split.

The prompts are English for a real language model; a small model over characters cannot be made for them. The reward
`code` runs what is answered, in a sandbox.

Data of others comes through the tasks `files` and `hub` with `verifier: code`, which needs the field `tests`, and may
have `solution`, a whole program that must pass (a wrong one is a bad row). Columns of well-known sets:

    MBPP        {text: prompt, test_list: tests, code: solution}
    HumanEval   {prompt: prompt, test: tests, entry_point: entry_point}, verifier_options: {entry_point: true}
    APPS        {question: prompt, input_output: tests}
    TACO        {question: prompt, input_output: tests}
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.tasks import Row, TaskOptions
from posttrain.tasks._drawn import DrawnTask

Kind = Literal["number", "list", "text"]

KINDS: dict[Kind, str] = {"number": "an integer", "list": "a list of integers", "text": "a text"}

DRY = 2000
"""Functions in a row that are no use or had all been drawn before: then they count as exhausted."""

Steps = Annotated[int, Field(ge=1, le=6)]


class Options(TaskOptions):
    """Options of the task `code`."""

    min_steps: Steps = 1
    max_steps: Steps = 3
    """Every number of steps between the two is equally likely."""
    examples: Annotated[int, Field(ge=0, le=10)] = 2
    """Inputs with their outputs in a prompt; no test has them."""
    tests: Annotated[int, Field(ge=3, le=100)] = 8
    """Inputs that an answer is tested with."""
    rows: Annotated[int, Field(gt=0)] = 1000
    """Training prompts; evaluation prompts come on top, in proportion to `eval_share`."""
    eval_share: Annotated[float, Field(ge=0, lt=1)] = 0.16
    """Share of all prompts that is held out."""
    seed: int = 0
    """Of the draw, which decides which functions are used, their order and their inputs."""
    verifier_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the reward `code` that decides correctness."""

    @model_validator(mode="after")
    def _range_of_steps(self) -> Options:
        if self.min_steps > self.max_steps:
            raise ValueError(f"min_steps {self.min_steps} exceeds max_steps {self.max_steps}: exchange them")
        return self


@dataclass(frozen=True)
class Step:
    """What is done to `x`: in English, as Python text, and as our own function, from one kind of value to another."""

    takes: Kind
    gives: Kind
    says: str
    source: str
    does: Callable[[Any], Any]


class Task(DrawnTask):
    """Functions of one to six steps."""

    name = "code"
    options: Options

    @property
    def verifier(self) -> tuple[str, dict[str, Any]]:
        """The reward `code`, with `verifier_options`."""
        return "code", dict(self.options.verifier_options)

    def demonstrations(self, rows: Sequence[Row], count: int, *, seed: int) -> list[tuple[Row, str]]:
        """Uniformly random rows, each with its program."""
        return [(row, f"```python\n{row['solution']}```") for row in random.Random(seed).choices(rows, k=count)]

    def _drawn(self) -> Iterator[tuple[str, Row]]:
        """Distinct rows, until they are exhausted, each behind what its function does."""
        draw = random.Random(self.options.seed)
        seen: set[str] = set()
        dry = 0
        while dry < DRY:
            steps = draw_steps(draw.randint(self.options.min_steps, self.options.max_steps), draw)
            key = "code:" + " | ".join([steps[0].takes, *(step.source for step in steps)])
            dry += 1
            if key in seen:
                continue
            found = self._inputs(steps, draw)
            if found is None:
                continue
            seen.add(key)
            dry = 0
            yield _behaviour(steps), self._row(key, steps, found)

    def _inputs(self, steps: Sequence[Step], draw: random.Random) -> list[Any] | None:
        """Distinct inputs, first those of the tests; None where no few of them need every step."""
        wanted = self.options.tests + self.options.examples
        for _ in range(5):
            inputs: list[Any] = []
            for _ in range(20 * wanted):
                value = draw_value(steps[0].takes, draw)
                if value not in inputs:
                    inputs.append(value)
                if len(inputs) == wanted:
                    break
            tests = inputs[: self.options.tests]
            if len(inputs) == wanted and _distinguish(steps, tests):
                return inputs
        return None

    def _row(self, key: str, steps: Sequence[Step], inputs: Sequence[Any]) -> Row:
        tests, examples = inputs[: self.options.tests], inputs[self.options.tests :]
        cases = [{"args": [value], "output": run(steps, value)} for value in tests]
        return {
            "prompt": [{"role": "user", "content": _question(steps, examples)}],
            "key": key,
            "tests": json.dumps({"function": "solve", "cases": cases}),
            "solution": "def solve(x):\n" + "".join(f"    x = {step.source}\n" for step in steps) + "    return x\n",
        }


def run(steps: Sequence[Step], value: Any) -> Any:
    """What the steps make of a value."""
    for step in steps:
        value = step.does(value)
    return value


def _behaviour(steps: Sequence[Step]) -> str:
    """What tells functions apart: the outputs of fixed inputs."""
    draw = random.Random(0)
    return f"code:{steps[0].takes} {[run(steps, draw_value(steps[0].takes, draw)) for _ in range(40)]!r}"


def _distinguish(steps: Sequence[Step], tests: Sequence[Any]) -> bool:
    """Whether outputs vary and stay small, and no step of them can be left out unseen."""
    outputs = [run(steps, value) for value in tests]
    if len({repr(output) for output in outputs}) < 3 or any(len(repr(output)) > 200 for output in outputs):
        return False
    for left_out in range(len(steps)):
        others = [*steps[:left_out], *steps[left_out + 1 :]]
        fits = all(one.gives == other.takes for one, other in itertools.pairwise(others))
        fits = fits and (not others or others[0].takes == steps[0].takes)
        if fits and [run(others, value) for value in tests] == outputs:
            return False
    return True


def _question(steps: Sequence[Step], examples: Sequence[Any]) -> str:
    said = "\n".join(f"{number}. {step.says}" for number, step in enumerate(steps, start=1))
    shown = "".join(f"solve({value!r}) returns {run(steps, value)!r}\n" for value in examples)
    return (
        f"Write a Python function solve(x), where x is {KINDS[steps[0].takes]}. It does the following, in this order, "
        f"and returns the result, {KINDS[steps[-1].gives]}:\n{said}\n"
        + (f"Examples:\n{shown}" if shown else "")
        + "Use the standard library only. End with the whole program in one ```python block."
    )


def draw_value(kind: Kind, draw: random.Random) -> Any:
    """An input: an integer of up to four digits, up to ten integers, or up to four words of letters and digits."""
    if kind == "number":
        return draw.choice([draw.randint(0, 20), draw.randint(0, 9999)])
    if kind == "list":
        return [draw.randint(-20, 20) for _ in range(draw.randint(0, 10))]
    letters = "abcdeiouxyzABEOS0123456789"
    words = ("".join(draw.choices(letters, k=draw.randint(1, 6))) for _ in range(draw.randint(0, 4)))
    return " ".join(words)


def draw_steps(count: int, draw: random.Random) -> list[Step]:
    """That many steps, each of which takes what the one before gives."""
    kind: Kind = draw.choice(["number", "list", "list", "text"])
    steps: list[Step] = []
    for _ in range(count):
        steps.append(draw.choice(_steps(kind, draw.randint(2, 6), draw.choice("aeox"))))
        kind = steps[-1].gives
    return steps


def _steps(kind: Kind, k: int, c: str) -> list[Step]:
    """Every step from a kind, for a number and a letter."""
    return {"number": _on_numbers, "list": _on_lists, "text": _on_texts}[kind](k, c)


def _on_numbers(k: int, c: str) -> list[Step]:
    return [
        Step("number", "number", f"Multiply it by {k}.", f"x * {k}", lambda x: x * k),
        Step("number", "number", f"Add {k}.", f"x + {k}", lambda x: x + k),
        Step("number", "number", "Square it.", "x ** 2", lambda x: x**2),
        Step("number", "number", f"Divide its absolute value by {k} and take the remainder.", f"abs(x) % {k}",
             lambda x: abs(x) % k),
        Step("number", "number", "Add up the digits of its absolute value.", "sum(int(d) for d in str(abs(x)))",
             lambda x: sum(map(int, str(abs(x))))),
        Step("number", "number", "Count the ones in the binary form of its absolute value.", "bin(abs(x)).count('1')",
             lambda x: abs(x).bit_count()),
        Step("number", "list", "Make the list of the digits of its absolute value, from left to right.",
             "[int(d) for d in str(abs(x))]", lambda x: list(map(int, str(abs(x))))),
        Step("number", "text", "Write its absolute value in binary, as a text without a prefix.", "bin(abs(x))[2:]",
             lambda x: f"{abs(x):b}"),
    ]  # fmt: skip


def _on_lists(k: int, c: str) -> list[Step]:
    return [
        Step("list", "list", "Keep only the even numbers.", "[v for v in x if v % 2 == 0]",
             lambda x: [v for v in x if not v & 1]),
        Step("list", "list", f"Keep only the numbers greater than {k}.", f"[v for v in x if v > {k}]",
             lambda x: [v for v in x if v > k]),
        Step("list", "list", f"Multiply every number by {k}.", f"[v * {k} for v in x]", lambda x: [k * v for v in x]),
        Step("list", "list", "Square every number.", "[v ** 2 for v in x]", lambda x: [v * v for v in x]),
        Step("list", "list", "Take the absolute value of every number.", "[abs(v) for v in x]",
             lambda x: list(map(abs, x))),
        Step("list", "list", "Reverse the list.", "x[::-1]", lambda x: list(reversed(x))),
        Step("list", "list", "Sort the list in ascending order.", "sorted(x)", lambda x: sorted(x)),
        Step("list", "list", "Sort the list in descending order.", "sorted(x, reverse=True)",
             lambda x: sorted(x)[::-1]),
        Step("list", "list", "Of equal numbers, keep only the first.", "list(dict.fromkeys(x))",
             lambda x: [v for i, v in enumerate(x) if v not in x[:i]]),
        Step("list", "list", f"Drop the first {k} numbers.", f"x[{k}:]", lambda x: x[k:]),
        Step("list", "list", f"Keep the first {k} numbers.", f"x[:{k}]", lambda x: x[:k]),
        Step("list", "list", "Replace every number by the sum of all numbers up to it, itself included.",
             "[sum(x[:i + 1]) for i in range(len(x))]", lambda x: [sum(x[: i + 1]) for i in range(len(x))]),
        Step("list", "list", "Replace the list by the differences between each number and the one before it.",
             "[b - a for a, b in zip(x, x[1:])]", lambda x: [x[i + 1] - x[i] for i in range(len(x) - 1)]),
        Step("list", "number", "Add up all numbers; an empty list gives 0.", "sum(x)", lambda x: sum(x)),
        Step("list", "number", f"Take the greatest number; an empty list gives {k}.", f"max(x, default={k})",
             lambda x: sorted(x)[-1] if x else k),
        Step("list", "number", "Count the numbers.", "len(x)", lambda x: len(x)),
        Step("list", "number", "Count the negative numbers.", "sum(v < 0 for v in x)",
             lambda x: len([v for v in x if v < 0])),
        Step("list", "text", "Write the numbers as a text, with one comma and no space between them.",
             "','.join(map(str, x))", lambda x: ",".join(f"{v}" for v in x)),
    ]  # fmt: skip


def _on_texts(k: int, c: str) -> list[Step]:
    return [
        Step("text", "text", "Reverse the text.", "x[::-1]", lambda x: "".join(reversed(x))),
        Step("text", "text", "Turn all letters into capitals.", "x.upper()", lambda x: x.upper()),
        Step("text", "text", "Turn small letters into capitals and capitals into small letters.", "x.swapcase()",
             lambda x: x.swapcase()),
        Step("text", "text", "Remove the vowels a, e, i, o, u, small and capital.",
             "''.join(v for v in x if v.lower() not in 'aeiou')",
             lambda x: x.translate(dict.fromkeys(map(ord, "aeiouAEIOU")))),
        Step("text", "text", "Keep only the digits.", "''.join(v for v in x if v in '0123456789')",
             lambda x: "".join(v for v in x if "0" <= v <= "9")),
        Step("text", "text", "Write every character twice.", "''.join(2 * v for v in x)",
             lambda x: "".join(v + v for v in x)),
        Step("text", "text", f"Keep the first {k} characters.", f"x[:{k}]", lambda x: x[:k]),
        Step("text", "text", "Put the words, which spaces separate, into reverse order, with one space between them.",
             "' '.join(x.split()[::-1])", lambda x: " ".join(reversed(x.split()))),
        Step("text", "number", "Count the characters.", "len(x)", lambda x: len(x)),
        Step("text", "number", f"Count how often the character {c} occurs.", f"x.count({c!r})", lambda x: x.count(c)),
        Step("text", "number", "Count the different characters.", "len(set(x))", lambda x: len(set(x))),
        Step("text", "list", "Make the list of the lengths of its words, which spaces separate.",
             "[len(v) for v in x.split()]", lambda x: list(map(len, x.split()))),
    ]  # fmt: skip
