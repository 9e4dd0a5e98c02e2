"""Exact answers: the text of a completion is the row's `answer`, but for case, white space and a final full stop.

Only what follows the last `</think>` counts, of it only what the last `<answer>...</answer>` holds, where there is
one, and of that only what follows the last `after`, where the option names a mark and the text has it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from posttrain.rewards import RewardOptions, Verdict, Verifier, answer_part

MAX_CHARS = 4000
"""Characters of an answer that are read, the last ones."""


class Options(RewardOptions):
    """Options of the reward `exact`."""

    after: Annotated[str, Field(min_length=1)] | None = None
    """The answer is what follows the last of these marks, as in `=` or `####`; a text without one is the answer."""
    ignore_case: bool = True


class Reward(Verifier):
    """1.0 when the answer's text equals the row's `answer`, a text or a whole number, else 0.0."""

    name = "exact"
    requires = ("answer",)

    def __init__(self, options: Options) -> None:
        self.options = options

    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """Judge the text; `Verdict.answer` is what was compared."""
        wanted = row["answer"]
        if isinstance(wanted, bool) or not isinstance(wanted, str | int):
            return Verdict(
                None, "unparseable_gold", detail=f"the answer is {wanted!r:.80}, neither text nor an integer"
            )
        gold = self._normalised(str(wanted))
        if not gold:
            return Verdict(None, "unparseable_gold", detail="the answer is empty")
        found = self._normalised(self._extract(completion))
        if not found:
            return Verdict(0.0, "no_answer")
        return Verdict(1.0, "ok", found) if found == gold else Verdict(0.0, "wrong", found)

    def gold(self, row: Mapping[str, Any]) -> str | None:
        """The row's `answer`, after the mark where there is one."""
        return None if row["answer"] is None else f"{self.options.after or ''}{row['answer']}"

    def _extract(self, completion: str) -> str:
        answer = answer_part(completion)
        return (answer.rpartition(self.options.after)[2] if self.options.after else answer)[-MAX_CHARS:]

    def _normalised(self, text: str) -> str:
        """In NFKC, white space as single spaces, without a final full stop; case by the option."""
        words = " ".join(unicodedata.normalize("NFKC", text).split()).removesuffix(".").rstrip()
        return words.casefold() if self.options.ignore_case else words
