"""What the procedural tasks share: the cut of a draw into training and evaluation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Protocol

from posttrain.errors import UserError
from posttrain.tasks import BaseTask, Row, Split, split_of


class CutOptions(Protocol):
    """The options that a draw is cut by; each task says what they mean for it."""

    @property
    def rows(self) -> int | None:
        """Training rows; all that are drawn when None."""

    @property
    def eval_share(self) -> float:
        """Share of all identities that is held out."""


class DrawnTask(BaseTask):
    """A procedural task; what differs between them is the draw and its demonstrations."""

    def __init__(self, options: CutOptions) -> None:
        self.options = options

    @abstractmethod
    def _drawn(self) -> Iterator[tuple[str, Row]]:
        """Distinct rows, in drawn order, each behind its identity: those of an equal one fall in the same split."""

    def rows(self, split: Split) -> list[Row]:
        """The prompts of a split, in drawn order.

        Raises:
            UserError: fewer prompts exist than `rows` asks for.
        """
        return list(self._splits[split])

    @cached_property
    def _splits(self) -> dict[Split, list[Row]]:
        return divide(self.name, self._drawn(), self.options.rows, self.options.eval_share)


def divide(task: str, drawn: Iterable[tuple[str, Row]], rows: int | None, eval_share: float) -> dict[Split, list[Row]]:
    """Cut a draw after `rows` training rows (all of it when `None`); evaluation rows are those met on the way.

    Each row comes behind its identity; rows of an equal one fall in the same split.

    Raises:
        UserError: the draw ends before there are `rows` training rows, or leaves the training split empty.
    """
    splits: dict[Split, list[Row]] = {"train": [], "eval": []}
    for identity, row in drawn:
        if len(splits["train"]) == rows:
            break
        splits[split_of(identity, eval_share)].append(row)
    found = len(splits["train"])
    if found < (rows or 1):
        raise UserError(
            f"The task '{task}' has {found} training prompts with these options, but {rows or 'at least 1'} were "
            "asked for: ask for fewer rows or widen the ranges."
        )
    return splits
