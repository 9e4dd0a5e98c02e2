"""What the character-level tasks share: alphabet, chat template, and the cut of a draw into training and evaluation.

A conversation reads `^337=24?3*7+3<eos>`: `^` opens the user's turn and `?` closes it, so the template needs no
generation prompt. The loss mask of supervised fine-tuning covers the answer and the end of the sequence.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable

from posttrain.errors import UserError
from posttrain.tasks import BaseTask, Row, Split, split_of

ALPHABET = "0123456789+-*=^?"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}^{{ message['content'] }}?"
    "{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
)


class CharacterTask(BaseTask):
    """A procedural task in that alphabet; what differs between them is the draw and its demonstrations."""

    @property
    @abstractmethod
    def _splits(self) -> dict[Split, list[Row]]:
        """The draw, cut into training and evaluation by `divide`."""

    def rows(self, split: Split) -> list[Row]:
        """The prompts of a split, in drawn order.

        Raises:
            UserError: fewer prompts exist than `rows` asks for.
        """
        return list(self._splits[split])

    @property
    def alphabet(self) -> str:
        """Digits, operators, and the signs that frame a prompt."""
        return ALPHABET

    @property
    def chat_template(self) -> str:
        """`^{prompt}?{answer}{eos}`."""
        return CHAT_TEMPLATE


def divide(
    task: str, drawn: Iterable[Row], rows: int | None, eval_share: float, *, identity: Callable[[Row], str]
) -> dict[Split, list[Row]]:
    """Cut a draw after `rows` training rows (all of it when `None`); evaluation rows are those met on the way.

    Rows of equal `identity` fall in the same split.

    Raises:
        UserError: the draw ends before there are `rows` training rows, or leaves the training split empty.
    """
    splits: dict[Split, list[Row]] = {"train": [], "eval": []}
    for row in drawn:
        if len(splits["train"]) == rows:
            break
        splits[split_of(identity(row), eval_share)].append(row)
    found = len(splits["train"])
    if found < (rows or 1):
        raise UserError(
            f"The task '{task}' has {found} training prompts with these options, but {rows or 'at least 1'} were "
            "asked for: ask for fewer rows or widen the ranges."
        )
    return splits
