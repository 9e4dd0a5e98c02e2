"""Format (shaping): 1.0 when the completion has its thinking and answer parts in order and none is empty, else 0.0.

The parts are read by a small state machine: the tags must come in the one order that the options ask for, and every
text between them must be of its kind. White space may stand around the parts; nothing else may, except that without a
thinking part free text may lead up to `<answer>`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import model_validator

from posttrain.rewards import RewardOptions, Verdict, Verifier

_TAG = re.compile(r"(</?(?:think|answer)>)")


class Options(RewardOptions):
    """Options of the reward `format`."""

    think: bool = True
    """Ask for `<think>...</think>`."""
    answer_tag: bool = True
    """Ask for `<answer>...</answer>` at the end; otherwise any text after `</think>` is the answer."""
    think_in_prompt: bool = False
    """The chat template puts `<think>` at the end of the prompt, so the completion starts inside the thought."""

    @model_validator(mode="after")
    def _has_effect(self) -> Options:
        if not self.think and not self.answer_tag:
            raise ValueError("think and answer_tag are both false, so there is nothing to check: set one")
        if self.think_in_prompt and not self.think:
            raise ValueError("think_in_prompt has no effect without think: set think or remove it")
        return self


class Reward(Verifier):
    """Shaping: 1.0 for a well-formed completion, else 0.0."""

    name = "format"
    accuracy = False

    def __init__(self, options: Options) -> None:
        self.options = options

    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """Check tags and texts against the order that the options ask for."""
        pieces = _TAG.split(completion)
        texts, tags = pieces[::2], pieces[1::2]
        wanted_tags, wanted_texts = self._order()
        if tags != wanted_tags:
            found = "".join(tags[:8]) or "no tags"
            return Verdict(0.0, "wrong", detail=f"found {found}, wanted {''.join(wanted_tags)}")
        for text, wanted in zip(texts, wanted_texts, strict=True):
            if wanted == "filled" and not text.strip():
                return Verdict(0.0, "wrong", detail="a part is empty")
            if wanted == "blank" and text.strip():
                return Verdict(0.0, "wrong", detail="text outside the parts")
        return Verdict(1.0, "ok")

    def _order(self) -> tuple[list[str], list[str]]:
        """The tags in order, and the kind of each text before, between and after them."""
        tags: list[str] = []
        texts: list[str] = []
        if self.options.think:
            tags += ["</think>"] if self.options.think_in_prompt else ["<think>", "</think>"]
            texts += ["filled"] if self.options.think_in_prompt else ["blank", "filled"]
        if self.options.answer_tag:
            tags += ["<answer>", "</answer>"]
            texts += ["blank" if self.options.think else "any", "filled", "blank"]
        else:
            texts += ["filled"]
        return tags, texts
