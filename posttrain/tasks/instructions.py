"""Instructions: a short text about something, under one to three constraints that are checked: a procedural IFEval.

A prompt names a subject and constraints of different families (keywords, length, form, case, ends, commas), in words of
our own; the row names them as IFEval does, and the reward `instructions` checks them. Constraints that could not be
kept together are never asked for together. Eighteen of the 25 occur; those about languages, JSON, sections, first
words, fixed answers, two answers and repeated prompts do not.

Every row has a `solution`, built from a bank of sentences until it keeps its constraints: what a warm start learns
from. It is correct and no literature.

Prompts and solutions are written in `alphabet`, letters, digits and signs without `^` and `?`, so that a small model
over characters can be made for this task, too; with prompts of about 150 characters and answers of about 250 it needs
far more than one for `countdown` does.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from posttrain import rewards
from posttrain.tasks import Row, TaskOptions
from posttrain.tasks._characters import CharacterTask

ALPHABET = string.ascii_letters + string.digits + " .,:!\"'*<>[]()-\n^?"

SUBJECTS = [
    "a day at the sea", "a storm in the mountains", "a market in the morning", "a long journey by train",
    "a garden in spring", "a library at night", "a village in winter", "the first snow", "an old bridge",
    "a walk in the forest", "a birthday in summer", "a harbour in the fog", "a school on the hill",
    "a night in the city", "a farm near the river", "a visit to the museum",
]  # fmt: skip
_ACTORS = [
    "old man", "young teacher", "fisherman", "baker", "little girl", "traveller", "painter", "gardener", "doctor",
    "student", "musician", "neighbour",
]  # fmt: skip
_ACTIONS = [
    "waits for the boat", "tells a story", "opens the window", "carries a basket", "looks at the clouds",
    "sings a quiet song", "reads a letter", "walks along the road", "repairs the roof", "finds a golden key",
    "plants a small tree", "remembers the summer", "greets the morning", "counts the stars", "writes down a dream",
]  # fmt: skip
_PLACES = [
    "near the river", "behind the house", "under the bridge", "in the garden", "beside the fire", "at the market",
    "on the hill", "by the gate", "in the library", "after the rain",
]  # fmt: skip
_KEYWORDS = ["river", "garden", "letter", "morning", "bridge", "story", "fire", "window", "summer", "basket"]
_ENDINGS = ["That is all.", "The rest is silence.", "And so the day ends.", "Nobody knows more."]
_FILLERS = ["address", "name", "date", "place", "time", "number"]

MAX_SENTENCES = 60
"""Sentences that a solution may need."""


class _Ask(NamedTuple):
    """A constraint as it is drawn: how a prompt says it, IFEval's name for it, and what that takes."""

    said: str
    name: str
    given: dict[str, Any]


class Options(TaskOptions):
    """Options of the task `instructions`."""

    min_constraints: Annotated[int, Field(ge=1, le=3)] = 1
    max_constraints: Annotated[int, Field(ge=1, le=3)] = 3
    """Every number of constraints between the two is equally likely."""
    rows: Annotated[int, Field(gt=0, le=100_000)] = 2000
    """Training prompts; evaluation prompts come on top, in proportion to `eval_share`."""
    eval_share: Annotated[float, Field(ge=0, lt=1)] = 0.16
    """Share of all prompts that is held out."""
    seed: int = 0
    """Of the draw, which decides subjects, constraints and solutions."""

    @model_validator(mode="after")
    def _range_of_constraints(self) -> Options:
        if self.min_constraints > self.max_constraints:
            raise ValueError(
                f"min_constraints {self.min_constraints} exceeds max_constraints {self.max_constraints}: exchange them"
            )
        return self


class Task(CharacterTask):
    """Texts under verifiable constraints."""

    name = "instructions"
    options: Options

    @property
    def verifier(self) -> tuple[str, dict[str, Any]]:
        """The reward `instructions`, with its defaults."""
        return "instructions", {}

    def demonstrations(self, rows: Sequence[Row], count: int, *, seed: int) -> list[tuple[Row, str]]:
        """Uniformly random rows, each with its solution."""
        return [(row, row["solution"]) for row in random.Random(seed).choices(rows, k=count)]

    @property
    def alphabet(self) -> str:
        """Letters, digits, white space and the signs that occur."""
        return ALPHABET

    def _drawn(self) -> Iterator[tuple[str, Row]]:
        options = self.options
        draw = random.Random(options.seed)
        keys: set[str] = set()
        misses = 0
        while misses < 1000:
            subject = draw.choice(SUBJECTS)
            families = draw.sample(_FAMILIES, k=draw.randint(options.min_constraints, options.max_constraints))
            asked = [draw.choice(family)(draw) for family in families]
            names = [ask.name for ask in asked]
            given = [ask.given for ask in asked]
            # In whatever order: the same constraints on the same subject are one row.
            key = f"instructions:{subject}:{json.dumps(sorted(zip(names, map(_sorted, given), strict=True)))}"
            if key in keys:
                misses += 1
                continue
            misses = 0
            keys.add(key)
            row = {
                "prompt": [{"role": "user", "content": _prompt(subject, asked)}],
                "key": key,
                "instruction_id_list": names,
                "kwargs": given,
                "solution": solve(asked, random.Random(f"{options.seed} {key}")),
            }
            yield key, row


def solve(asked: Sequence[_Ask], draw: random.Random) -> str:
    """An answer that keeps all constraints, with as few sentences as it takes, checked by the reward itself.

    Raises:
        AssertionError: none of up to `MAX_SENTENCES` sentences does.
    """
    verifier = rewards.load("instructions")
    row = {"instruction_id_list": [ask.name for ask in asked], "kwargs": [ask.given for ask in asked]}
    forbidden = [word for ask in asked for word in ask.given.get("forbidden_words", [])]
    actions = [action for action in _ACTIONS if not any(word in action for word in forbidden)]
    places = [place for place in _PLACES if not any(word in place for word in forbidden)]
    sentences = _sentences(actions, places, draw)
    for count in range(2, MAX_SENTENCES + 1):
        text = _written(sentences[:count], {ask.name: ask.given for ask in asked}, actions)
        if verifier.verify(text, row).reward == 1.0:
            return text
    raise AssertionError(f"no solution for {row}")


def _sorted(given: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(given.items())


def _prompt(subject: str, asked: Sequence[_Ask]) -> str:
    return " ".join([f"Write a short text about {subject}.", *(ask.said for ask in asked)])


def _sentences(actions: Sequence[str], places: Sequence[str], draw: random.Random) -> list[str]:
    """`MAX_SENTENCES` different sentences."""
    found: dict[str, None] = {}
    while len(found) < MAX_SENTENCES:
        found[f"The {draw.choice(_ACTORS)} {draw.choice(actions)} {draw.choice(places)}."] = None
    return list(found)


def _written(sentences: Sequence[str], asked: dict[str, dict[str, Any]], actions: Sequence[str]) -> str:
    """Sentences put into the form that the constraints ask for; how many it takes, the caller finds out."""
    body = list(sentences)
    missing = asked.get("keywords:existence", {}).get("keywords", [])
    repeated = asked.get("keywords:frequency", {})
    if repeated.get("relation") == "at least":
        missing = [repeated["keyword"]] * repeated["frequency"]
    # Names before the word keep the sentences different from one another.
    body += [f"The {_ACTORS[i]} thinks of the {keyword}." for i, keyword in enumerate(missing)]
    capitals = asked.get("change_case:capital_word_frequency", {})
    if capitals.get("capital_relation") == "at least":
        shouted = capitals["capital_frequency"]
        body = [_shout(sentence) if i < shouted else sentence for i, sentence in enumerate(body)]
    highlights = asked.get("detectable_format:number_highlighted_sections", {}).get("num_highlights", 0)
    body = [f"*{sentence[:-1]}*." if i < highlights else sentence for i, sentence in enumerate(body)]
    placeholders = asked.get("detectable_content:number_placeholders", {}).get("num_placeholders", 0)
    if placeholders:
        body.append(f"Please add {' and '.join(f'[{filler}]' for filler in _FILLERS[:placeholders])}.")
    paragraphs = asked.get("length_constraints:number_paragraphs", {}).get("num_paragraphs", 1)
    parts = [" ".join(body[start::paragraphs]) for start in range(paragraphs)]
    text = "\n***\n".join(parts)
    if "detectable_format:title" in asked:
        text = f"<<A short text>>\n{text}"
    bullets = asked.get("detectable_format:number_bullet_lists", {}).get("num_bullets", 0)
    text = "\n".join([text, *(f"* The {_ACTORS[i]} {actions[i]}." for i in range(bullets))])
    if "detectable_content:postscript" in asked:
        text += f"\n{asked['detectable_content:postscript']['postscript_marker']} The {_ACTORS[-1]} says goodbye."
    if "startend:end_checker" in asked:
        text += f"\n{asked['startend:end_checker']['end_phrase']}"
    if "change_case:english_capital" in asked:
        text = text.upper()
    if "change_case:english_lowercase" in asked:
        text = text.lower()
    return f'"{text}"' if "startend:quotation" in asked else text


def _shout(sentence: str) -> str:
    first, second, rest = sentence.split(" ", 2)
    return f"{first} {second.upper()} {rest}"


# ------------------------------------------------------------------ constraints by family: at most one of each


def _existence(draw: random.Random) -> _Ask:
    words = draw.sample(_KEYWORDS, k=draw.randint(1, 3))
    listed = " and ".join(f'"{word}"' for word in words)
    return _Ask(
        f"Use {'the word' if len(words) == 1 else 'the words'} {listed}.", "keywords:existence", {"keywords": words}
    )


def _frequency(draw: random.Random) -> _Ask:
    word, times = draw.choice(_KEYWORDS), draw.randint(2, 4)
    return _Ask(
        f'Use the word "{word}" at least {times} times.',
        "keywords:frequency",
        {"keyword": word, "frequency": times, "relation": "at least"},
    )


def _forbidden(draw: random.Random) -> _Ask:
    words = draw.sample(_KEYWORDS, k=draw.randint(1, 3))
    listed = " or ".join(f'"{word}"' for word in words)
    return _Ask(f"Never use {listed}.", "keywords:forbidden_words", {"forbidden_words": words})


def _letters(draw: random.Random) -> _Ask:
    letter, times = draw.choice("aehrt"), draw.randint(5, 12)
    return _Ask(
        f"The letter {letter} must occur at least {times} times.",
        "keywords:letter_frequency",
        {"letter": letter, "let_frequency": times, "let_relation": "at least"},
    )


def _number_of_sentences(draw: random.Random) -> _Ask:
    relation: Literal["at least", "less than"] = draw.choice(["at least", "less than"])
    count = draw.randint(3, 8) if relation == "at least" else draw.randint(14, 18)
    return _Ask(
        f"Write {relation} {count} sentences.",
        "length_constraints:number_sentences",
        {"num_sentences": count, "relation": relation},
    )


def _number_of_words(draw: random.Random) -> _Ask:
    relation: Literal["at least", "less than"] = draw.choice(["at least", "less than"])
    count = draw.randrange(30, 91, 5) if relation == "at least" else draw.randrange(90, 151, 10)
    return _Ask(
        f"Write {relation} {count} words.",
        "length_constraints:number_words",
        {"num_words": count, "relation": relation},
    )


def _number_of_paragraphs(draw: random.Random) -> _Ask:
    count = draw.randint(2, 4)
    return _Ask(
        f"Write {count} paragraphs with a line of three asterisks between them: ***",
        "length_constraints:number_paragraphs",
        {"num_paragraphs": count},
    )


def _bullets(draw: random.Random) -> _Ask:
    count = draw.randint(2, 5)
    return _Ask(
        f"Have exactly {count} bullet points that begin with an asterisk, as in * this one.",
        "detectable_format:number_bullet_lists",
        {"num_bullets": count},
    )


def _highlights(draw: random.Random) -> _Ask:
    count = draw.randint(1, 2)
    return _Ask(
        f"Highlight at least {count} of its parts, as in *this part*.",
        "detectable_format:number_highlighted_sections",
        {"num_highlights": count},
    )


def _title(draw: random.Random) -> _Ask:
    return _Ask("Give it a title in double angles, as in <<title>>.", "detectable_format:title", {})


def _placeholders(draw: random.Random) -> _Ask:
    count = draw.randint(2, 6)
    return _Ask(
        f"Leave at least {count} placeholders in square brackets, such as [address].",
        "detectable_content:number_placeholders",
        {"num_placeholders": count},
    )


def _postscript(draw: random.Random) -> _Ask:
    marker = draw.choice(["P.S.", "P.P.S"])
    return _Ask(
        f"Add a postscript that begins with {marker}", "detectable_content:postscript", {"postscript_marker": marker}
    )


def _capital_words(draw: random.Random) -> _Ask:
    count = draw.randint(1, 4)
    return _Ask(
        f"Write at least {count} words in capital letters.",
        "change_case:capital_word_frequency",
        {"capital_frequency": count, "capital_relation": "at least"},
    )


def _capitals(draw: random.Random) -> _Ask:
    return _Ask("Write in English and in capital letters only.", "change_case:english_capital", {})


def _lowercase(draw: random.Random) -> _Ask:
    return _Ask("Write in English and in small letters only.", "change_case:english_lowercase", {})


def _ending(draw: random.Random) -> _Ask:
    phrase = draw.choice(_ENDINGS)
    return _Ask(f"End with exactly these words: {phrase}", "startend:end_checker", {"end_phrase": phrase})


def _quotation(draw: random.Random) -> _Ask:
    return _Ask("Put the whole text in double quotation marks.", "startend:quotation", {})


def _no_comma(draw: random.Random) -> _Ask:
    return _Ask("Use no comma.", "punctuation:no_comma", {})


_FAMILIES = [
    [_existence, _frequency, _forbidden, _letters],
    [_number_of_sentences, _number_of_words, _number_of_paragraphs],
    [_bullets, _highlights, _title, _placeholders, _postscript],
    [_capital_words, _capitals, _lowercase],
    [_ending, _quotation],
    [_no_comma],
]
