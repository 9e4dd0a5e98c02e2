"""Verifiable rewards: one file per verifier, pure Python, no torch.

The folder is the registry: `rewards/<name>.py` defines `Options` (a pydantic model) and `Reward(Verifier)`, and
recipes name it. A verifier turns one completion and its task row into a `Verdict`; `RewardFunction` adapts it to TRL.

Rewards marked `accuracy = True` answer "is it correct?" with 1.0 or 0.0; the others shape (format, length). Both stay
separate columns, because methods that look at correctness (DPH-RL's split, pass@k) must never see shaping.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from posttrain import registry
from posttrain.errors import UserError, did_you_mean

Status = Literal["ok", "wrong", "no_answer", "unparseable_gold", "timeout", "resource", "verifier_error", "not_judged"]
Completion = str | Sequence[Mapping[str, Any]]
OptionsT = TypeVar("OptionsT", bound=BaseModel)


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of one completion.

    `ok`, `wrong` and `no_answer` carry a reward; `timeout` and `resource` caused by the completion are 0.0;
    `unparseable_gold` and `verifier_error` are `None`, because a failure of the infrastructure must never look like a
    wrong answer; so is `not_judged`, where nothing decides what is correct.
    """

    reward: float | None
    status: Status
    answer: str | None = None
    detail: str = ""
    seconds: float = 0.0


class RewardOptions(BaseModel):
    """Options of a verifier: strict, so that a misspelt option is an error and never a silent default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Verifier(ABC):
    """One verifiable reward. Picklable; holds options and nothing else."""

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    """Columns that a task row must have."""
    accuracy: ClassVar[bool] = True
    """True when 1.0 means "correct"; False for shaping rewards."""

    options: Any = None
    """What it was built with, a `RewardOptions`; None without any."""

    @property
    def identity(self) -> dict[str, Any]:
        """Name and options: what a store or an evaluation remembers of it."""
        return {"name": self.name, "options": self.options.model_dump(mode="json") if self.options else {}}

    @abstractmethod
    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """Judge one completion (plain text) against its task row. Must not raise for anything a model can write."""

    def gold(self, row: Mapping[str, Any]) -> str | None:
        """A completion that must score 1.0, made from the row; `None` where no such thing exists."""
        return None

    def score(self, completions: Sequence[Completion], rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """Judge a batch; never raises for a bad sample, and returns one verdict per completion, in order."""
        verdicts = []
        for completion, row in zip(completions, rows, strict=True):
            start = perf_counter()
            try:
                verdict = self.verify(text_of(completion), row)
            except Exception as error:  # a bad sample is data: it is counted and never stops a run
                verdict = Verdict(None, "verifier_error", detail=f"{type(error).__name__}: {error}")
            verdicts.append(replace(verdict, seconds=perf_counter() - start))
        return verdicts


def text_of(completion: Completion) -> str:
    """The text of a completion: itself, or the joined contents of its assistant messages."""
    if isinstance(completion, str):
        return completion
    return "".join(str(message.get("content") or "") for message in completion if message.get("role") == "assistant")


def after_thinking(text: str) -> str | None:
    """The part of a completion that answers: what follows the last `</think>`, or everything where there is none.

    `None` when `<think>` was opened and never closed: a thought that was cut off holds no answer.
    """
    _, closed, answer = text.rpartition("</think>")
    return None if not closed and "<think>" in text else answer


def load(name: str, options: Mapping[str, Any] | None = None) -> Verifier:
    """Build the verifier `name` with `options`.

    Raises:
        UserError: there is no such reward, or an option is unknown or of the wrong type.
    """
    module = registry.load("reward", name)
    verifier: Verifier = module.Reward(parse_options("reward", name, module.Options, options))
    return verifier


def parse_options(kind: str, name: str, options_class: type[OptionsT], options: Mapping[str, Any] | None) -> OptionsT:
    """Check the options of a registered entry (`kind` is "reward" or "task") against its options class.

    Raises:
        UserError: an option is unknown (the nearest known one is named), missing or of the wrong type or value.
    """
    given = dict(options or {})
    for key in given:
        if key not in options_class.model_fields:
            raise UserError(f"The {kind} '{name}' has no option '{key}'{did_you_mean(key, options_class.model_fields)}")
    try:
        return options_class(**given)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        where = ".".join(str(part) for part in first["loc"])
        if not where:
            raise UserError(f"The {kind} '{name}': {message}.") from None
        if first["type"] == "missing":
            raise UserError(f"The {kind} '{name}' needs the option '{where}': add it.") from None
        raise UserError(f"The option '{where}' of the {kind} '{name}' is wrong: {message}.") from None


class RewardFunction:
    """A verifier in the form TRL calls: `(prompts, completions, **columns) -> list[float | None]`.

    Logs, per call: `rewards/<name>/failures`, the share of verdicts without a reward (fraction of completions), and a
    `status` column per completion in the completions table.
    """

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier
        self.__name__ = verifier.name

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        missing = [column for column in self.verifier.requires if column not in columns]
        if missing:
            raise UserError(
                f"The reward '{self.verifier.name}' needs the data column '{missing[0]}', which the task rows lack: "
                f"they have {', '.join(sorted(columns)) or 'none'}."
            )
        rows = [{name: columns[name][i] for name in self.verifier.requires} for i in range(len(completions))]
        verdicts = self.verifier.score(completions, rows)
        if log_extra is not None:
            log_extra(f"{self.verifier.name}_status", [verdict.status for verdict in verdicts])
        if log_metric is not None and verdicts:
            failures = sum(verdict.reward is None for verdict in verdicts) / len(verdicts)
            log_metric(f"rewards/{self.verifier.name}/failures", failures)
        return [verdict.reward for verdict in verdicts]


def load_function(reference: str) -> Callable[..., list[float | None]]:
    """Import a user's own TRL reward function by `module:function`.

    Raises:
        UserError: the reference has no colon, or the module or the function does not exist.
    """
    module_name, colon, function_name = reference.partition(":")
    if not colon:
        raise UserError(f"'{reference}' is no reward function: write it as module:function.")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"The reward function '{reference}' cannot be imported: {error}.") from None
    if not callable(function):
        raise UserError(f"'{reference}' is a {type(function).__name__}, not a function: name a callable.")
    return function  # type: ignore[no-any-return]
