"""Replay of stored answers: which rows an optimiser step rehearses, as a pure function of the step.

Every process holds the same store and computes the same draw, so the share of each process, and the number of tokens
that the whole step rehearses, are known everywhere without communication, and a resumed run continues exactly. Images
are looked up for those answers alone that a process has drawn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StoredAnswer:
    """One answer of the reference to one prompt.

    Attributes:
        prompt_ids: token ids of the rendered prompt.
        token_ids: token ids of the answer, the end-of-sequence token included.
        logps: log π_ref of each answer token (nats), full softmax at the rollout temperature.
        prompt_id: what the store calls the prompt.
    """

    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    logps: Sequence[float]
    prompt_id: str = ""


@dataclass(frozen=True)
class Draw:
    """What one process rehearses in one micro-batch.

    Attributes:
        answers: this process's rows; may be empty.
        tokens: answer tokens of the whole optimiser step, over all processes and micro-batches.
        images: those of each row's prompt; all empty where prompts are text alone.
    """

    answers: list[StoredAnswer]
    tokens: int
    images: list[Sequence[Any]] = field(default_factory=list)


class Replay:
    """An endless sequence of stored answers: pass after pass without replacement, each pass shuffled by its number.

    Args:
        answers: all that are stored.
        seed: of the shuffling.
        images: the images of an answer's prompt; None where prompts are text alone.
    """

    def __init__(
        self,
        answers: Sequence[StoredAnswer],
        *,
        seed: int,
        images: Callable[[StoredAnswer], Sequence[Any]] | None = None,
    ) -> None:
        if not answers:
            raise ValueError("there are no stored answers to replay.")
        self.answers = list(answers)
        self.seed = seed
        self._images = images or (lambda answer: ())
        self._orders: dict[int, list[int]] = {}

    def _order(self, cycle: int) -> list[int]:
        if cycle not in self._orders:
            order = list(range(len(self.answers)))
            random.Random(f"{self.seed}/{cycle}").shuffle(order)
            self._orders = {c: o for c, o in self._orders.items() if c >= cycle - 1}
            self._orders[cycle] = order
        return self._orders[cycle]

    def _at(self, position: int) -> StoredAnswer:
        cycle, offset = divmod(position, len(self.answers))
        return self.answers[self._order(cycle)[offset]]

    def draw(self, *, step: int, rows: int, slot: int, slots: int) -> Draw:
        """The share of `slot` in the rows of an optimiser step.

        Args:
            step: optimiser step, from 0.
            rows: rows of the whole step.
            slot: micro-batch × processes + rank.
            slots: micro-batches per step × processes. Shares differ by at most one row.

        Raises:
            ValueError: there is no such slot, which means that a step has more micro-batches than was said.
        """
        if not 0 <= slot < slots:
            raise ValueError(f"slot {slot} is none of the {slots} shares of step {step}.")
        drawn = [self._at(position) for position in range(step * rows, (step + 1) * rows)]
        mine = drawn[slot * rows // slots : (slot + 1) * rows // slots]
        return Draw(mine, sum(len(answer.token_ids) for answer in drawn), [self._images(answer) for answer in mine])
