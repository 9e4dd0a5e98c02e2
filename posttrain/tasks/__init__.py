"""Tasks: where prompts come from. One file per task; a task names the verifier that decides correctness.

The folder is the registry: `posttrain/tasks/<name>.py` defines `Options` (a pydantic model) and a `Task` class that
subclasses `posttrain.tasks.BaseTask`. Train and evaluation rows are disjoint by the hash of a canonical key, never by
seed alone.
"""

from __future__ import annotations

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from posttrain import registry
from posttrain.errors import UserError
from posttrain.rewards import parse_options

Split = Literal["train", "eval"]
Row = dict[str, Any]
"""One task row: `prompt` (a list of chat messages), `key` (canonical, unique within the task) and whatever the
verifier needs. Rows of an image task have `images`, too: PIL images in the order in which the prompt shows them."""


class TaskOptions(BaseModel):
    """Options of a task: strict, so that a misspelt option is an error and never a silent default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class BaseTask(ABC):
    """Rows for training and evaluation, and the verifier that judges them."""

    name: ClassVar[str]
    pairs: ClassVar[bool] = False
    """Whether the rows are preference pairs: `prompt`, `chosen`, `rejected` in TRL's formats."""
    images: bool = False
    """Whether the rows hold `images`, so that only a vision-language model reads them."""

    @property
    @abstractmethod
    def verifier(self) -> tuple[str, dict[str, Any]] | None:
        """Name and options of the reward that decides whether an answer is correct; None where nothing does."""

    @abstractmethod
    def rows(self, split: Split) -> list[Row]:
        """All rows of a split, in a fixed order that does not depend on anything but the task's options."""

    def demonstrations(self, rows: Sequence[Row], count: int, *, seed: int) -> list[tuple[Row, str]]:
        """`count` pairs of a row and a correct answer to it, for a warm start by supervised fine-tuning.

        Raises:
            UserError: the task cannot solve itself.
        """
        raise UserError(
            f"The task '{self.name}' has no solver, so it cannot make warm-start data: set model.path to a model that "
            "exists already."
        )

    @property
    def alphabet(self) -> str | None:
        """Every character that prompts and answers can hold, for a character tokenizer; `None` when unbounded."""
        return None

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template of a model that is made for this task; `None` for the default."""
        return None


def load(name: str, options: Mapping[str, Any] | None = None) -> BaseTask:
    """Build the task `name` with `options`.

    Raises:
        UserError: there is no such task, or an option is unknown or of the wrong type.
    """
    module = registry.load("task", name)
    task: BaseTask = module.Task(parse_options("task", name, module.Options, options))
    return task


def split_of(key: str, eval_share: float) -> Split:
    """The split of a row, from the hash of its canonical key alone: the same row lands in the same split for ever."""
    digest = hashlib.sha256(key.encode("utf-8")).digest()
    return "eval" if int.from_bytes(digest[:8], "big") < eval_share * 2**64 else "train"


def choose(rows: Sequence[Row], count: int | None, *, seed: int) -> list[Row]:
    """`count` rows drawn without replacement, in drawn order; all of them, in their order, when `count` is None.

    Raises:
        UserError: there are fewer rows than asked for.
    """
    if count is None or count == len(rows):
        return list(rows)
    if count > len(rows):
        raise UserError(f"The task has {len(rows)} rows in this split but {count} were asked for: ask for fewer.")
    return random.Random(seed).sample(list(rows), count)


def shown(row: Row) -> list[dict[str, Any]]:
    """The row's prompt as an engine reads it, its images among the parts of its first user message, before the text.

    A row without images has its prompt as it is. The parts are those of a transformers chat template: `{"type":
    "image", "image": …}` and `{"type": "text", "text": …}`; every content is then a list of them. TRL puts the column
    `images` in the same place.
    """
    prompt: list[dict[str, Any]] = row["prompt"]
    if not row.get("images"):
        return prompt
    messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in prompt]
    first = next(message for message in messages if message["role"] == "user")
    first["content"] = [*({"type": "image", "image": image} for image in row["images"]), *first["content"]]
    return messages


def fingerprint(rows: Sequence[Row]) -> str:
    """A hash of the rows' contents, images included, and their order (16 hex digits)."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=described).encode("utf-8"))
        digest.update(b"\n")
    return digest.hexdigest()[:16]


def described(value: Any) -> str:
    """What a row or a prompt holds beside JSON, as text: an image by its pixels."""
    if hasattr(value, "tobytes") and hasattr(value, "mode"):
        return f"{value.mode} {value.size} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return str(value)
