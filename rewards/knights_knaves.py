"""Knights and knaves: an answer that names every person once as a knight or as a knave, as the solution has it.

Only what follows the last `</think>` counts, of it only what the last `<answer>...</answer>` holds, where there is
one, and of that the last `MAX_CHARS` characters.

Form `words`. An assertion is `Alice is a knight`, `Alice is not a knave`, `Alice: knight` (also with `=`, a dash, an
arrow, `(` or a table's `|`); case, quotes, emphasis and emojis don't matter, and a question or a hedge (`if`, `maybe`,
`says`, ... before the name) asserts nothing. Assertions with nothing between them but punctuation, list numbers and
`and` are a list; what follows behind `or` can only contradict it. The answer is the last list that names everybody, in
any order, and it stands or falls with all that is asserted after it: whoever is named both ways, or is none of the
people, makes it wrong. So an answer is one assignment, however it is hedged.

Form `symbols`. The answer is what follows the last `=`, or everything: exactly one `K` or `N` per person, in order.

The text goes through a tokenizer and one pass over the tokens; nothing backtracks.

With `scale: logic_rl` the reward shapes: ±1 for the format, `<think>...</think><answer>...</answer>` as the reward
`format` reads it, and 2 for the solution, −1.5 for another one, −2 where none can be read. An answer in a bad format is
not read, so rewards are 3, −0.5, −1 and −3. Status and answer stay those of the assignment, and correctness a column of
its own: give the reward twice, with and without the scale.

Source of the scale: Logic-RL, arXiv 2502.14768. Differs: the format is checked by order and content of its parts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from posttrain.rewards import RewardOptions, Verdict, Verifier, answer_part
from posttrain.rewards import format as formats

MAX_CHARS = 4000
"""Characters of an answer that are read; eight people need about 200."""

_KINDS = {"knight": "K", "knave": "N"}
_OTHER = {"K": "N", "N": "K"}
_TOKEN = re.compile(r"[^\W_]+|[^\w\s]|_|\n")
_UNSEEN = frozenset("*_`\"'‘’“”")
_LINKS = frozenset(":=-–—→⇒>|(")
_CONNECTORS = frozenset({",", "/", "or", "and", "but"})
_HEDGES = frozenset({
    "if", "suppose", "supposing", "assume", "assuming", "whether", "unless", "either", "neither", "nor", "or", "not",
    "maybe", "perhaps", "possibly", "probably", "says", "said", "claims", "claimed",
})  # fmt: skip
_SENTENCE_ENDS = frozenset(".;:!?\n")

_FORMAT = {True: 1.0, False: -1.0}
_ANSWER = {"ok": 2.0, "wrong": -1.5, "no_answer": -2.0}


class Options(RewardOptions):
    """Options of the reward `knights_knaves`."""

    form: Literal["words", "symbols"] = "words"
    """How an answer is written: English, or one letter per person."""
    # Out of what a store or an evaluation remembers as long as they say nothing.
    scale: Literal["logic_rl"] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Logic-RL's scale of format and answer, a shaping reward; default: 1.0 for the solution and else 0.0."""
    think_in_prompt: bool = Field(default=False, exclude_if=lambda value: value is False)
    """Of the scale: the chat template puts `<think>` at the end of the prompt."""

    @model_validator(mode="after")
    def _has_effect(self) -> Options:
        if self.think_in_prompt and self.scale is None:
            raise ValueError("think_in_prompt has no effect without scale: set scale or remove it")
        if self.scale is not None and self.form == "symbols":
            raise ValueError("scale asks for tags, and answers in symbols have none: set form to words or remove it")
        return self


class Reward(Verifier):
    """1.0 when the answer is the row's `solution` (`K` or `N` for each of its `people`, in order), else 0.0.

    With a scale, what that says.
    """

    name = "knights_knaves"
    requires = ("people", "solution")

    def __init__(self, options: Options) -> None:
        self.options = options
        self.accuracy = options.scale is None
        self._format = formats.Reward(formats.Options(think_in_prompt=options.think_in_prompt))

    @property
    def column(self) -> str:
        """Its name, and behind it that of the scale."""
        return self.name if self.options.scale is None else f"{self.name}_{self.options.scale}"

    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """Judge the assignment; `Verdict.answer` is one `K` or `N` per person, in the order of `people`."""
        verdict = self._judged(completion, row)
        if self.options.scale is None or verdict.reward is None:
            return verdict
        form = self._format.verify(completion, {})
        if form.reward != 1.0:
            return replace(verdict, reward=_FORMAT[False] + _ANSWER["no_answer"], detail=f"format: {form.detail}")
        return replace(verdict, reward=_FORMAT[True] + _ANSWER[verdict.status])

    def _judged(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        people, solution = row["people"], row["solution"]
        if not _sound(people, solution):
            detail = f"people {people!r} and solution {solution!r} are not distinct names and one K or N for each"
            return Verdict(None, "unparseable_gold", detail=detail)
        text = _extract(completion)
        if self.options.form == "symbols":
            answer = "".join(text.rpartition("=")[2].split())
            if len(answer) != len(people) or not set(answer) <= set("KN"):
                return Verdict(0.0, "no_answer", detail=f"not {len(people)} letters K or N")
        else:
            try:
                answer = _last_list(_tokens(text), [_tokens(name) for name in people])
            except ValueError as error:
                return Verdict(0.0, "wrong", detail=str(error))
            if not answer:
                return Verdict(0.0, "no_answer", detail="no list that names everybody")
        return Verdict(1.0, "ok", answer) if answer == solution else Verdict(0.0, "wrong", answer)

    def gold(self, row: Mapping[str, Any]) -> str | None:
        """The solution, in the form that is asked for; None with a scale, whose best reward is no 1.0."""
        if self.options.scale is not None:
            return None
        people: Any = row.get("people")
        solution: Any = row.get("solution")
        if not _sound(people, solution):
            return None
        return str(solution) if self.options.form == "symbols" else in_words(people, solution)


def in_words(people: Sequence[str], solution: str) -> str:
    """`(1) Alice is a knight, (2) Bob is a knave`."""
    kinds = {"K": "knight", "N": "knave"}
    pairs = zip(people, solution, strict=True)
    return ", ".join(f"({i}) {name} is a {kinds[kind]}" for i, (name, kind) in enumerate(pairs, start=1))


def _sound(people: Any, solution: Any) -> bool:
    """Whether a row can be judged."""
    if not isinstance(people, list) or not people or not all(isinstance(name, str) for name in people):
        return False
    names = {tuple(_tokens(name)) for name in people}
    distinct = len(names) == len(people) and () not in names
    return distinct and isinstance(solution, str) and len(solution) == len(people) and set(solution) <= set("KN")


def _extract(completion: str) -> str:
    """The end of the text that answers."""
    return answer_part(completion)[-MAX_CHARS:]


def _tokens(text: str) -> list[str]:
    """Words, single signs and line ends, in one case, without emphasis, quotes, emojis and invisible characters."""
    plain = unicodedata.normalize("NFKC", text).casefold().replace("’", "'").replace("isn't", "is not")
    plain = "".join(c for c in plain if unicodedata.category(c) not in ("So", "Sk", "Mn", "Cf"))
    return [token for token in _TOKEN.findall(plain) if token not in _UNSEEN]


class _Assertion(NamedTuple):
    """That a person (`None`: somebody else) is of these kinds, said by the tokens from `start` to `end`."""

    person: int | None
    kinds: frozenset[str]
    start: int
    end: int
    alternative: bool = False
    """Whether it stands behind another and `or`: it contradicts that one, and completes no list."""


def _last_list(tokens: list[str], names: Sequence[list[str]]) -> str:
    """One `K` or `N` per name, by the last list that names everybody; empty when there is none.

    Raises:
        ValueError: it names somebody else, or it or what follows it names a person both ways.
    """
    lists: list[list[_Assertion]] = []
    end = 0
    for found in _assertions(tokens, names):
        if lists and all(map(_is_glue, tokens[end : found.start])):
            lists[-1].append(found)
        else:
            lists.append([found])
        end = found.end
    after: list[_Assertion] = []
    while lists:
        last = lists.pop()
        if {found.person for found in last if not found.alternative} >= set(range(len(names))):
            if any(found.person is None for found in last):
                raise ValueError("names somebody who is none of the people")
            kinds = [
                {kind for found in last + after if found.person == i for kind in found.kinds} for i in range(len(names))
            ]
            both = next((name for name, of_one in zip(names, kinds, strict=True) if len(of_one) > 1), None)
            if both is not None:
                raise ValueError(f"names {' '.join(both)} both ways")
            return "".join(kind for of_one in kinds for kind in of_one)
        after += last
    return ""


def _is_glue(token: str) -> bool:
    """Whether a list goes on across the token."""
    return token in ("and", "or") or token.isdecimal() or not (token == "?" or token.isalnum())


def _assertions(tokens: list[str], names: Sequence[list[str]]) -> Iterator[_Assertion]:
    """What the tokens assert, in order and without overlap."""
    # Longer names first, so that nobody is taken for somebody whose name begins alike.
    by_length = sorted(enumerate(names), key=lambda numbered: -len(numbered[1]))
    word_before = ""
    position = last_end = 0
    while position < len(tokens):
        token = tokens[position]
        known = next(((i, n) for i, n in by_length if tokens[position : position + len(n)] == n), None)
        person, length = (known[0], len(known[1])) if known else (None, 1)
        said = _kinds(tokens, position + length) if known or token.isalpha() else None
        if said is not None:
            kinds, end = said
            alternative = word_before == "or" and last_end > 0 and all(map(_is_glue, tokens[last_end:position]))
            if alternative or word_before not in _HEDGES:
                yield _Assertion(person, kinds, position, end, alternative)
                last_end = end
            position = end
            continue
        if token in _SENTENCE_ENDS:
            word_before = ""
        elif token.isalpha() and token != "and":  # a hedge holds across "and"
            word_before = token
        position += 1


def _kinds(tokens: list[str], position: int) -> tuple[frozenset[str], int] | None:
    """The kinds that follow a name (`is a knight`, `: knave`, `is a knight or a knave`), and where that ends."""
    after_link = _link(tokens, position)
    first = _kind(tokens, after_link) if after_link > position else None
    if first is None:
        return None
    kinds, position = {first[0]}, first[1]
    while True:  # every turn consumes tokens
        after = position
        while after < min(position + 2, len(tokens)) and tokens[after] in _CONNECTORS:
            after += 1
        more = _kind(tokens, after) if after > position else None
        if more is None:
            break
        kinds.add(more[0])
        position = more[1]
    if tokens[position : position + 1] == ["?"]:
        return None
    return frozenset(kinds), position


def _link(tokens: list[str], position: int) -> int:
    """Where a link ends that begins at `position`: `is`, one sign or an arrow of two; `position` without one."""
    if tokens[position : position + 1] == ["is"]:
        return position + 1
    end = position
    while end < min(position + 2, len(tokens)) and tokens[end] in _LINKS:
        end += 1
    return end


def _kind(tokens: list[str], position: int) -> tuple[str, int] | None:
    """`K` or `N` for `[not] [a] knight` at `position`, and where that ends."""
    negated = tokens[position : position + 1] == ["not"]
    position += negated
    position += tokens[position : position + 1] in (["a"], ["an"])
    kind = _KINDS.get(tokens[position]) if position < len(tokens) else None
    return None if kind is None else (_OTHER[kind] if negated else kind, position + 1)
