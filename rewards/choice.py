r"""Choice: an answer to a multiple-choice question names the label of the right choice, and no other.

Only what follows the last `</think>` counts, of it only what the last `<answer>...</answer>` holds, where there is
one, and of that the last `MAX_CHARS` characters. There the first of these that says anything is the answer:

1. the last `\boxed{}` that is closed: `\boxed{C}`, `\boxed{\text{(C)}}`, or the text of a choice, `\boxed{42}`;
2. every `answer is C` (`answer: C`, `the right choice is option (C)`, `I choose C`, `C is correct`), and `answer is`
   before the text of a choice;
3. a lone label: a line that is one (`C`, `**(C)**`) or has its choice behind it (`C) 42`), or `(C)` anywhere; or else a
   last line that is the text of a choice.

A box, being the last word, overrules what stands before it. Within 2 and within 3, and within one box, labels that
differ contradict each other: `The answer is A or B` answers nothing. Such an answer is `no_answer` with 0.0 and never
None: it is the completion that is at fault, and a policy that is spared a wrong answer by naming two would learn to.

A row's `choices` is a list of texts, labelled A, B, C, ..., or `{"text": [...], "label": [...]}`, the form of ARC and
CommonsenseQA. Its `answer` is a label, or the index of a choice, counted from 0, as in MMLU. Labels are one letter or
one whole number each.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import Field, model_validator

from posttrain.rewards import RewardOptions, Verdict, Verifier, answer_part

MAX_CHARS = 4000
"""Characters of an answer that are read, the last ones."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_BRACE = re.compile(r"\\boxed\s{0,9}\{|[{}]")
_TOKEN = re.compile(r"\n|[0-9]+(?:[.,][0-9]+)*|[^\W_]+|[^\w\s]|_")
_COMMANDS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|boxed|bf|rm)(?![A-Za-z])|\\(?=[()\[\]$ ,;!])")
_UNSEEN = frozenset("*_`\"'‘’“”${}~#")
_SUBJECTS = frozenset({"answer", "choice", "option"})
_VERBS = frozenset({"choose", "pick", "select"})
_LINKS = frozenset({"is", ":", "=", "be", "are"})
_STOPS = _LINKS | frozenset(".;!?\n")
_BEFORE = frozenset(
    {"option", "choice", "letter", "either", "clearly", "therefore", "thus", "definitely", "(", "[", "-"}
)
_JOINS = frozenset({"or", "and", ",", "/", "&", "+", "|", "maybe", "possibly", "perhaps", "alternatively"})
_NEGATIONS = frozenset({"not", "never", "cannot", "t"})  # the t of don't, whose apostrophe is unseen
_RIGHT = frozenset({("is", how) for how in ("correct", "right")} | {("is", "the", how) for how in ("correct", "right")})
_CLOSING = frozenset(")].:,;!\n-–—|")
_WITHIN = 8
"""Words between `answer` and `is`, at most."""


class Options(RewardOptions):
    """Options of the reward `choice`."""

    letters: Annotated[int, Field(ge=2, le=26)] | None = None
    """The labels of every row are the first so many letters, and rows need no column `choices`."""
    accept_text: bool = True
    """The text of a choice stands for its label, where no label is named and only one choice reads so."""

    @model_validator(mode="after")
    def _has_effect(self) -> Options:
        if self.letters is not None and "accept_text" in self.model_fields_set and self.accept_text:
            raise ValueError("accept_text has no effect with letters, which gives choices no text: remove it")
        return self


class Reward(Verifier):
    """1.0 when the answer names the row's `answer`, else 0.0."""

    name = "choice"

    def __init__(self, options: Options) -> None:
        self.options = options
        self.requires = ("answer",) if options.letters is not None else ("choices", "answer")

    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """Judge the choice; `Verdict.answer` is its label."""
        try:
            choices = _choices(row, self.options)
            gold = choices.gold(row["answer"])
        except ValueError as error:
            return Verdict(None, "unparseable_gold", detail=str(error))
        named = _named(answer_part(completion)[-MAX_CHARS:], choices)
        if named is None:
            return Verdict(0.0, "no_answer", detail="no choice is named")
        if len(named) != 1:
            detail = f"contradictory: {', '.join(named)}" if named else "what is boxed is none of the choices"
            return Verdict(0.0, "no_answer" if named else "wrong", detail=detail)
        return Verdict(1.0, "ok", gold) if named == [gold] else Verdict(0.0, "wrong", named[0])

    def gold(self, row: Mapping[str, Any]) -> str | None:
        """The label of the right choice; None where the row names none."""
        try:
            return _choices(row, self.options).gold(row["answer"])
        except ValueError:
            return None


class _Choices(NamedTuple):
    """Labels as they are written, and the tokens of their texts, none where those don't count."""

    labels: list[str]
    texts: list[list[str]]

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(map(len, self.texts), default=0)

    def gold(self, answer: Any) -> str:
        """The label that a row's `answer` means.

        Raises:
            ValueError: none.
        """
        if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(self.labels):
            return self.labels[answer]
        label = answer.strip() if isinstance(answer, str) else None
        if label not in self.labels:
            raise ValueError(f"the answer {answer!r:.80} is none of the labels {', '.join(self.labels)}, nor an index")
        return label

    def label(self, token: str, following: str = ".") -> str | None:
        """The label that a token is. A small letter is one only before a sign: `a prime number` names no choice."""
        if token in self.labels:
            return token
        other = token.upper() if token.islower() else token.lower()
        return other if len(token) == 1 and other in self.labels and following in _CLOSING else None

    def of_text(self, tokens: Sequence[str]) -> str | None:
        """The label of the only choice that reads so."""
        wanted = _bare(tokens)
        found = [label for label, text in zip(self.labels, self.texts, strict=False) if text == wanted]
        return found[0] if wanted and len(found) == 1 else None


def _choices(row: Mapping[str, Any], options: Options) -> _Choices:
    """The choices of a row.

    Raises:
        ValueError: they are not at least two, or their labels are not letters or whole numbers, each once.
    """
    if options.letters is not None:
        return _Choices(list(LETTERS[: options.letters]), [])
    given: Any = row["choices"]
    if isinstance(given, Mapping):
        texts, labels = given.get("text"), given.get("label")
    else:
        texts, labels = given, None
    if not isinstance(texts, Sequence) or isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"choices {given!r:.80} are no list of texts")
    if labels is None:
        labels = list(LETTERS[: len(texts)])
    if not isinstance(labels, Sequence) or len(labels) != len(texts) or len(texts) < 2 or len(set(labels)) < len(texts):
        raise ValueError(f"choices {given!r:.80} are not at least two with a label each")
    if not all(isinstance(one, str) and re.fullmatch(r"[A-Za-z]|[0-9]{1,3}", one) for one in labels):
        raise ValueError(f"the labels {labels!r:.80} are not one letter or one whole number each")
    return _Choices(list(labels), [_bare(_tokens(text)) for text in texts] if options.accept_text else [])


def _tokens(text: str) -> list[str]:
    """Words, numbers, signs and line ends, in NFKC and without markup."""
    plain = _COMMANDS.sub(" ", unicodedata.normalize("NFKC", text))
    return [token for token in _TOKEN.findall(plain) if token not in _UNSEEN]


def _bare(tokens: Sequence[str]) -> list[str]:
    """Tokens in one case, without line ends and full stops around them."""
    start, end = 0, len(tokens)
    while start < end and tokens[start] in ("\n", "."):
        start += 1
    while start < end and tokens[end - 1] in ("\n", "."):
        end -= 1
    return [token.casefold() for token in tokens[start:end]]


def _named(text: str, choices: _Choices) -> list[str] | None:
    """The labels that an answer names, each once; empty where a box names something else, None where nothing does."""
    box = _last_box(text)
    if box is not None:
        tokens = _tokens(box)
        label = choices.of_text(tokens)
        found, end = _labels_at(tokens, 0, choices)
        if found:  # whatever stands between them, a second label contradicts, unless it is a word of a text: vitamin C
            rest = range(_past_text(tokens, end, found[-1], choices), len(tokens))
            found += [tokens[i] for i in rest if tokens[i] in choices.labels and _begins(tokens[i - 1], choices)]
        return _once(found or ([label] if label else [])) if _bare(tokens) else None
    tokens = _tokens(text)
    named = _once(_stated(tokens, choices)) or _once(_lone(tokens, choices))
    if named:
        return named
    last = next((line for line in reversed(_lines(tokens)) if line), [])
    label = choices.of_text(last)
    return None if label is None else [label]


def _once(labels: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(labels))


def _lines(tokens: Sequence[str]) -> list[list[str]]:
    lines: list[list[str]] = [[]]
    for token in tokens:
        if token == "\n":
            lines.append([])
        else:
            lines[-1].append(token)
    return lines


def _last_box(text: str) -> str | None:
    r"""What the last `\boxed{}` to be closed holds, in one pass."""
    opened: list[tuple[int, bool]] = []
    found = None
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            opened.append((brace.end(), brace[0] != "{"))
        elif opened:
            start, boxed = opened.pop()
            if boxed:
                found = text[start : brace.start()]
    return found


def _labels_at(tokens: Sequence[str], position: int, choices: _Choices) -> tuple[list[str], int]:
    """The labels that stand at `position`, joined by `or`, `and` or commas, and where they end."""
    while position < len(tokens) and (tokens[position].casefold() in _BEFORE or tokens[position] == "\n"):
        position += 1
    labels: list[str] = []
    end = position
    while position < len(tokens):
        following = tokens[position + 1] if position + 1 < len(tokens) else "\n"
        label = choices.label(tokens[position], following)
        if label is None:
            break
        labels.append(label)
        end = position + 1
        position = _past_text(tokens, end, label, choices)
        joined = position < len(tokens) and tokens[position] in choices.labels
        while position < len(tokens) and (tokens[position].casefold() in _JOINS or tokens[position] in "()[]"):
            joined = joined or tokens[position].casefold() in _JOINS
            position += 1
        if not joined:
            break
    return labels, end


def _past_text(tokens: Sequence[str], position: int, label: str, choices: _Choices) -> int:
    """Where the text of a label ends that stands at `position`, as in `A (46)`; `position` where it does not."""
    text = choices.texts[choices.labels.index(label)] if choices.texts else []
    start = position
    while start < min(position + 2, len(tokens)) and (tokens[start] in _CLOSING or tokens[start] in "([="):
        start += 1
    end = start + len(text)
    return end if text and _bare(tokens[start:end]) == text else position


def _begins(before: str, choices: _Choices) -> bool:
    """Whether a label may follow: behind a sign, another label or a word that joins."""
    return not before.isalnum() or before in choices.labels or before.casefold() in _JOINS


def _stated(tokens: Sequence[str], choices: _Choices) -> Iterator[str]:
    """The labels of everything that says what the answer is."""
    words = [token.casefold() for token in tokens]
    for i, word in enumerate(words):
        if word in _VERBS:
            if not _NEGATIONS & set(words[max(0, i - 2) : i]):
                yield from _labels_at(tokens, i + 1, choices)[0]
        elif word in _SUBJECTS:
            labels, end = _labels_at(tokens, i + 1, choices)
            if word == "answer" and labels and words[end : end + 1] in ([], ["\n"]):
                yield from labels
                continue
            link = next((j for j in range(i + 1, min(i + 2 + _WITHIN, len(words))) if words[j] in _STOPS), None)
            if link is not None and words[link] in _LINKS:
                yield from _said(tokens, link + 1, choices)
        behind = tuple(words[i + 1 : i + 4])
        if tokens[i] in choices.labels and (behind in _RIGHT or behind[:2] in _RIGHT):
            yield tokens[i]


def _said(tokens: Sequence[str], position: int, choices: _Choices) -> list[str]:
    """What follows `answer is`: labels, or else the text of a choice up to the end of the sentence or line."""
    while position < len(tokens) and (tokens[position] in _LINKS or tokens[position] == "\n"):
        position += 1
    labels, _ = _labels_at(tokens, position, choices)
    if labels:
        return labels
    reach = tokens[position : position + choices.longest + 2]
    for ends in ({"\n"}, {"\n", ".", ",", ";"}):
        end = next((j for j, token in enumerate(reach) if token in ends), len(reach))
        label = choices.of_text(reach[:end])
        if label is not None:
            return [label]
    return []


def _lone(tokens: Sequence[str], choices: _Choices) -> Iterator[str]:
    """Labels that are lines, that begin a line with their own choice behind them, or that stand in parentheses."""
    for line in _lines(tokens):
        start = 0
        while start < len(line) and line[start] in "([-":
            start += 1
        label = choices.label(line[start], (line[start + 1 : start + 2] or ["\n"])[0]) if start < len(line) else None
        if label is not None:
            end = start + 1
            while end < len(line) and line[end] in _CLOSING and choices.of_text(line[end:]) != label:
                end += 1  # a sign may belong to the text, as a minus does
            if end == len(line) or choices.of_text(line[end:]) == label:
                yield label
                continue
        for i in range(len(line) - 2):
            if line[i] == "(" and line[i + 2] == ")" and line[i + 1] in choices.labels:
                yield line[i + 1]
