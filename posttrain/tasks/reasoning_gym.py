"""Reasoning Gym: questions that the package reasoning-gym generates, where they have one right answer each.

An optional extra, `pip install 'posttrain[reasoning-gym]'`, and a generator only: the reward `exact` compares an answer
in `<answer>` tags with the generated one, letter by letter. No scorer of the package ever sees what a model has written
(some of them execute it), there is no partial credit, and so a guess scores nothing but what it is worth. Data sets
whose questions have many right answers need such a scorer and are refused by name; 33 of the 106 of version 0.1.25 do
not: `gcd`, `base_conversion`, `caesar_cipher`, `syllogism`, `list_functions`, `modulo_grid`, ...

Questions of the data sets alternate, while they last. Equal questions fall in the same split.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Annotated, Any

from pydantic import Field

from posttrain.errors import UserError, did_you_mean
from posttrain.rewards import load
from posttrain.tasks import Row, TaskOptions
from posttrain.tasks._drawn import DrawnTask

BLOCK = 200
"""Questions that are generated at a time: some data sets make all of them at once."""
DRY = 400
"""Questions in a row that bring nothing new, after which a data set is exhausted."""


class Options(TaskOptions):
    """Options of the task `reasoning_gym`."""

    datasets: dict[str, dict[str, Any]] = Field(min_length=1)
    """Data sets of the package, each with its settings, as in {gcd: {max_value: 500}, lcm: {}}."""
    rows: Annotated[int, Field(gt=0)] = 4000
    """Training prompts; evaluation prompts come on top, in proportion to `eval_share`."""
    eval_share: Annotated[float, Field(ge=0, lt=1)] = 0.16
    """Share of all prompts that is held out."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the first question; the next one's is one more."""


class Task(DrawnTask):
    """Questions of Reasoning Gym.

    Raises:
        UserError: the package is not installed, a data set does not exist, takes no such settings, or has questions
            with many right answers.
    """

    name = "reasoning_gym"
    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._factory = _package("factory")
        plain = _package("dataset").ProceduralDataset.score_answer
        kinds: Mapping[str, tuple[Any, Any]] = self._factory.DATASETS
        for name in options.datasets:
            if name not in kinds:
                raise UserError(f"Reasoning Gym has no data set '{name}'{did_you_mean(name, kinds)}")
            if kinds[name][0].score_answer is not plain:
                known = sorted(other for other, (kind, _) in kinds.items() if kind.score_answer is plain)
                raise UserError(
                    f"Questions of Reasoning Gym's data set '{name}' have many right answers, which only a scorer of "
                    f"the package can tell, and those do not see what models write: take one of {', '.join(known)}."
                )
            self._block(name, 0)

    @property
    def verifier(self) -> tuple[str, dict[str, Any]]:
        """The reward `exact`, to the letter."""
        return "exact", {"ignore_case": False}

    def _block(self, name: str, number: int) -> Any:
        """So many questions of a data set, generated when they are looked at."""
        settings = self.options.datasets[name]
        try:
            return self._factory.create_dataset(name, seed=self.options.seed + number * BLOCK, size=BLOCK, **settings)
        except (AssertionError, TypeError, ValueError) as error:
            raise UserError(
                f"Reasoning Gym's data set '{name}' does not take the settings {settings} ({error}): correct them."
            ) from None

    def _drawn(self) -> Iterator[tuple[str, Row]]:
        """Distinct questions of the data sets in turn."""
        exact = load(*self.verifier)
        seen: set[str] = set()
        sources = {name: self._entries(name) for name in self.options.datasets}
        while sources:
            for name in list(sources):
                for _ in range(DRY):
                    question, answer = next(sources[name])
                    row = _row(name, question, answer)
                    if row["key"] in seen or exact.attempt(exact.gold(row) or "", row).reward != 1.0:
                        continue
                    seen.add(row["key"])
                    yield row["key"], row
                    break
                else:
                    del sources[name]

    def _entries(self, name: str) -> Iterator[tuple[str, str]]:
        """All questions of a data set with their answers, without end."""
        number = 0
        while True:
            block = self._block(name, number)
            for index in range(BLOCK):
                with contextlib.redirect_stdout(io.StringIO()):  # one of them prints dots
                    entry = block[index]
                yield str(entry["question"]), str(entry["answer"])
            number += 1


def _row(name: str, question: str, answer: str) -> Row:
    content = f"{question}\n\nGive your final answer between <answer> and </answer>, and nothing else there."
    digest = hashlib.sha256(question.encode("utf-8", "replace")).hexdigest()[:16]
    prompt = [{"role": "user", "content": content}]
    return {"prompt": prompt, "key": f"reasoning_gym:{name}:{digest}", "answer": answer, "dataset": name}


def _package(module: str) -> ModuleType:
    """A module of the package.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(f"reasoning_gym.{module}")
    except ModuleNotFoundError as error:
        raise UserError(
            f"The task 'reasoning_gym' needs a package that is not installed ({error.name}): pip install "
            "'posttrain[reasoning-gym]'."
        ) from None
