"""Verifiable rewards: one file per verifier, pure Python, no torch.

The folder is the registry: `rewards/<name>.py` defines `Options` (a pydantic model) and `Reward(Verifier)`, and
recipes name it. A verifier turns one completion and its task row into a `Verdict`; `RewardFunction` adapts it to TRL.

A verifier marked `isolated = True` judges in worker processes, which are killed at its `deadline` (`_workers`).

Rewards marked `accuracy = True` answer "is it correct?" with 1.0 or 0.0; the others shape (format, length). Both stay
separate columns, because methods that look at correctness (DPH-RL's split, pass@k) must never see shaping.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import groupby
from math import ceil, inf  # `math` itself is a verifier of this package
from time import monotonic, perf_counter
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from posttrain import registry
from posttrain.errors import UserError, did_you_mean

Status = Literal["ok", "wrong", "no_answer", "unparseable_gold", "timeout", "resource", "verifier_error", "not_judged"]
Completion = str | Sequence[Mapping[str, Any]]
OptionsT = TypeVar("OptionsT", bound=BaseModel)

Deadline = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]
"""Seconds that judging one completion may take in a worker process; an option `deadline` of an `isolated` verifier."""
DEADLINE = 5.0
"""Its default."""

FAILURES = frozenset({"unparseable_gold", "verifier_error"})
"""Statuses that are no fault of the completion."""
MAX_FAILURES = 0.5
"""Share of failures above which a run stops."""

PATIENCE = 600.0
"""Seconds that a step of training waits for workers: well below the half hour after which the other processes of a
launch take one that waits for dead."""
until: ContextVar[float] = ContextVar("until", default=inf)
"""When (monotonic seconds) workers are waited for no longer; what they have not judged by then has no verdict."""

THOUGHT = "<think>"
"""What a chat template may end a prompt with, so that the completion begins inside a thought."""
IN_THOUGHT = "completion_in_thought"
"""The column that says of every completion whether it begins so."""
_OPENING: Mapping[str, Any] = {"role": "assistant", "content": THOUGHT}

in_worker = False
"""Whether this process is such a worker."""


def completion_begins() -> None:
    """Said by a `row_first` verifier when it has done with the row; without effect outside of workers."""


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
    """One verifiable reward. Picklable; holds options and nothing else.

    A class says of itself what does not depend on options; where it does, an instance says it.

    An `isolated` verifier is built again in another process, from its class, which must lie at the top of a module, and
    its options. There, `verify` gets what the row has of `requires`, as JSON holds it.
    """

    name: ClassVar[str]
    requires: tuple[str, ...] = ()
    """Columns that a task row must have."""
    sampled: tuple[str, ...] = ()
    """What it reads beside the row, from whoever samples: `completion_ids`, the completion's tokens."""
    group_size: int = 1
    """Consecutive completions that `score` compares with one another: all answers to one prompt, and no others."""
    accuracy: bool = True
    """True when 1.0 means "correct"; False for shaping rewards."""
    isolated: ClassVar[bool] = False
    """Whether `verify` runs in worker processes, because it may hang, crash or fill the memory."""
    row_first: ClassVar[bool] = False
    """Whether `verify`, in a worker, works on the row alone until it calls `completion_begins`: a row that takes longer
    than the `deadline` is `unparseable_gold`, and the completion's own time begins at that call."""

    options: Any = None
    """What it was built with, a `RewardOptions`; None without any."""

    @property
    def column(self) -> str:
        """What its column of rewards is called: by its name, unless its options make another reward of it."""
        return self.name

    @property
    def identity(self) -> dict[str, Any]:
        """Name and options: what a store or an evaluation remembers of it."""
        return {"name": self.name, "options": self.options.model_dump(mode="json") if self.options else {}}

    @property
    def deadline(self) -> float:
        """Seconds that `verify` may take for one completion where it is `isolated`."""
        return float(getattr(self.options, "deadline", DEADLINE))

    @abstractmethod
    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """Judge one completion (plain text) against its task row. Must not raise for anything a model can write."""

    def decide(self, completion: str, row: Mapping[str, Any]) -> Verdict | None:
        """What an `isolated` verifier can say at once, without a worker; `None` where it takes `verify`.

        Called in the trainer's process, on any thread: it must be quick for whatever a model can write.
        """
        return None

    def prepare(self) -> None:  # noqa: B027 - most have nothing to prepare
        """Do what workers share, such as slow imports: called once, in the process that they are forked from."""

    def gold(self, row: Mapping[str, Any]) -> str | None:
        """A completion that must score 1.0, made from the row; `None` where no such thing exists."""
        return None

    def whole(self, completion: Completion, in_thought: bool) -> Completion:
        """A completion as it is judged: behind the `<think>` that its prompt ended with, where it did (`in_thought`).

        A verifier with the option `think_in_prompt` expects it without.
        """
        if not in_thought or getattr(self.options, "think_in_prompt", False):
            return completion
        return THOUGHT + completion if isinstance(completion, str) else [_OPENING, *completion]

    def attempt(self, completion: Completion, row: Mapping[str, Any]) -> Verdict:
        """`verify` here and now, timed; an exception is a verdict.

        Raises:
            MemoryError: in a worker, which has a verdict for it.
        """
        return cast(Verdict, self._timed(self.verify, completion, row))

    def score(self, completions: Sequence[Completion], rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """Judge a batch; never raises for a bad sample, and returns one verdict per completion, in order.

        Raises:
            UserError: the verifier is `isolated`, and its class cannot be imported by another process.
        """
        if not self.isolated or in_worker:
            return [self.attempt(completion, row) for completion, row in zip(completions, rows, strict=True)]
        decided = [self._timed(self.decide, text, row) for text, row in zip(completions, rows, strict=True)]
        left = [index for index, verdict in enumerate(decided) if verdict is None]
        judged: Iterator[Verdict] = iter(())
        if left:
            from posttrain.rewards import _workers

            texts = [text_of(completions[index]) for index in left]
            judged = iter(_workers.judge(self, texts, [rows[index] for index in left]))
        return [next(judged) if verdict is None else verdict for verdict in decided]

    @staticmethod
    def _timed(
        judge: Callable[[str, Mapping[str, Any]], Verdict | None], completion: Completion, row: Mapping[str, Any]
    ) -> Verdict | None:
        start = perf_counter()
        try:
            verdict = judge(text_of(completion), row)
        except Exception as error:  # a bad sample is data: it is counted and never stops a run
            if in_worker and isinstance(error, MemoryError):
                raise
            verdict = Verdict(None, "verifier_error", detail=f"{type(error).__name__}: {error}")
        return None if verdict is None else replace(verdict, seconds=perf_counter() - start)


def text_of(completion: Completion) -> str:
    """The text of a completion: itself, or the joined contents of its assistant messages, of parts those with text.

    Raises:
        TypeError: a content is neither text nor a list of parts.
    """
    if isinstance(completion, str):
        return completion
    return "".join(_said(message.get("content")) for message in completion if message.get("role") == "assistant")


def _said(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list | tuple):
        raise TypeError(f"a message's content is {content!r:.80}, neither text nor a list of parts")
    parts = (part.get("text") if isinstance(part, Mapping) else part for part in content)
    return "".join(_said(part) for part in parts)


def after_thinking(text: str) -> str | None:
    """The part of a completion that answers: what follows the last `</think>`, or everything where there is none.

    `None` when a `<think>` behind that was never closed: a thought that was cut off holds no answer.

    Where the chat template puts `<think>` at the end of the prompt, a completion begins inside its thought, and one
    that was cut off there has no tag at all. So training, pre-sampling and evaluation put the prompt's tag in front
    before they have it judged (`Verifier.whole`).
    """
    answer = text.rpartition("</think>")[2]
    return None if "<think>" in answer else answer


def answer_part(text: str) -> str:
    """The part of a completion that answers: of what follows its thought, what the last `<answer>...</answer>` holds.

    All of it where there are no such tags; empty when the thought was cut off.
    """
    answer = after_thinking(text) or ""
    before, closed, _ = answer.rpartition("</answer>")
    _, opened, inside = before.rpartition("<answer>")
    return inside if closed and opened else answer


def require_whole_groups(verifier: Verifier, prompts: Sequence[Any]) -> None:
    """Check that every run of equal prompts is one whole group of a verifier that compares answers.

    Args:
        verifier: says how many answers to a prompt it compares (`group_size`).
        prompts: what tells prompts apart, one per completion: their keys or themselves.

    Raises:
        UserError: a run is shorter or longer, because it spans processes or the group size is another.
    """
    size = verifier.group_size
    if size == 1:
        return
    runs = [len(list(run)) for _, run in groupby(prompts)]
    other = next((run for run in runs if run != size), None)
    if other is not None:
        raise UserError(
            f"The reward '{verifier.column}' compares {size} answers to a prompt (group_size), but was given {other} "
            "together: set group_size to num_generations, and choose per_device_train_batch_size × "
            "steps_per_generation as a multiple of it, so that no group is split between processes."
        )


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

    TRL calls it in every process with that process' whole generation batch, the answers to a prompt beside one another.
    A verifier that compares them (`group_size`) gets whole groups or an error: a process never sees another's answers.
    Prompts are told apart by the column `key`, or by themselves where the rows have none. Our trainers add the column
    `IN_THOUGHT` where prompts end with `<think>`.

    Logs a `<name>_status` column in the completions table, where <name> is the verifier's `column`, and per call (TRL
    then averages over calls and processes):

    - `rewards/<name>/failures`: share of completions with a failure of the infrastructure (`unparseable_gold`,
      `verifier_error`): no fault of the completion, and no reward;
    - `rewards/<name>/timeouts`: share that was stopped at the deadline (`timeout`);
    - `rewards/<name>/resource`: share that asked for more than it may have (`resource`);
    - `rewards/<name>/seconds_p50`, `rewards/<name>/seconds_p99`: median and 99th percentile (nearest rank) of the
      seconds that judging one completion took, waiting for a worker not included.

    Args:
        verifier: judges.
        max_failures: share of failures, over the last `WINDOW` calls, above which the run stops: a group whose
            verdicts fail teaches nothing. 1 never stops it.
        patience: seconds of a call that workers may take. A completion costs at most its deadline, but many that hang
            cost many: what is left then has no reward, and is a failure.

    Raises:
        UserError: when called, the rows lack a column, a group is not whole, or more failed than may.
    """

    WINDOW: ClassVar[int] = 8
    """Calls that failures are counted over; before so many have been made, nothing stops."""

    def __init__(self, verifier: Verifier, *, max_failures: float = MAX_FAILURES, patience: float = PATIENCE) -> None:
        self.verifier = verifier
        self.max_failures = max_failures
        self.patience = patience
        self.__name__ = verifier.column
        self._recent: deque[tuple[int, int]] = deque(maxlen=self.WINDOW)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        read = (*self.verifier.requires, *self.verifier.sampled)
        if "prompt" in read:  # TRL keeps it apart from the columns
            columns["prompt"] = prompts
        missing = [column for column in read if column not in columns]
        if missing:
            raise UserError(
                f"The reward '{self.verifier.name}' needs the data column '{missing[0]}', which the task rows lack: "
                f"they have {', '.join(sorted(columns)) or 'none'}."
            )
        require_whole_groups(self.verifier, columns.get("key", prompts))
        rows = [{name: columns[name][i] for name in read} for i in range(len(completions))]
        if IN_THOUGHT in columns:
            completions = list(map(self.verifier.whole, completions, columns[IN_THOUGHT]))
        before = until.set(monotonic() + self.patience)
        try:
            verdicts = self.verifier.score(completions, rows)
        finally:
            until.reset(before)
        if log_extra is not None:
            log_extra(f"{self.verifier.column}_status", [verdict.status for verdict in verdicts])
        if log_metric is not None and verdicts:
            for name, value in self._measured(verdicts).items():
                log_metric(f"rewards/{self.verifier.column}/{name}", value)
        self._stop_if_most_fail(verdicts)
        return [verdict.reward for verdict in verdicts]

    @staticmethod
    def _measured(verdicts: Sequence[Verdict]) -> dict[str, float]:
        seconds = sorted(verdict.seconds for verdict in verdicts)
        count = len(verdicts)
        return {
            "failures": sum(verdict.status in FAILURES for verdict in verdicts) / count,
            "timeouts": sum(verdict.status == "timeout" for verdict in verdicts) / count,
            "resource": sum(verdict.status == "resource" for verdict in verdicts) / count,
            "seconds_p50": seconds[ceil(0.5 * count) - 1],
            "seconds_p99": seconds[ceil(0.99 * count) - 1],
        }

    def _stop_if_most_fail(self, verdicts: Sequence[Verdict]) -> None:
        failed = [verdict for verdict in verdicts if verdict.status in FAILURES]
        self._recent.append((len(failed), len(verdicts)))
        failures, judged = (sum(counts) for counts in zip(*self._recent, strict=True))
        if failed and len(self._recent) == self.WINDOW and failures > self.max_failures * judged:
            raise UserError(
                f"The reward '{self.verifier.name}' failed on {failures} of the last {judged} completions, more than "
                f"max_failures = {self.max_failures:g} allows, the last time with {failed[-1].status} "
                f"({failed[-1].detail or 'no detail'}): mend that, or raise max_failures."
            )


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
