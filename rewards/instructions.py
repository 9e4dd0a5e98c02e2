"""Instructions: an answer keeps the constraints that its prompt states, the 25 of IFEval, checked without any download.

Only what follows the last `</think>` counts, and of it only what the last `<answer>...</answer>` holds, where there is
one. Rows have IFEval's columns as they are published: `instruction_id_list`, names such as `keywords:existence`, and
`kwargs`, for each of them what it takes (`{"keywords": ["sun"]}`); entries that are null say nothing.

With `score: all` an answer is right when it keeps every constraint, IFEval's prompt-level accuracy; with `fraction` the
reward is the share that is kept, which shapes and does not decide. `mode: loose` tries the answer also without `*`,
without its first line, without its last, and all combinations, and takes for each constraint whatever keeps it.

No constraint asks for sense, so there are guards that IFEval lacks. An answer is worth nothing when it

- is empty;
- has fewer than `min_words` words (or than a constraint `less than` so many leaves room for);
- repeats itself: more than `max_repeated` of its n-grams of `GUARDED` words are repetitions.

They stop what is written for the checker alone, and cannot tell whether an answer is about its question.

Source: Zhou et al., Instruction-Following Evaluation, arXiv 2311.07911, and its published checkers. Differs:

- keywords are text, where IFEval reads them as regular expressions (published ones are plain words); a sign whose
  number is asked for (`!`, `#`) is counted, where IFEval counts a letter drawn at random instead;
- sentences are told apart by rules, where IFEval asks nltk's trained splitter: alike on prose, and different after rare
  abbreviations; signs of East Asian scripts end sentences here;
- languages are told apart by script and by frequent words, where IFEval asks langdetect, which draws at random: `zh`
  stands for every Chinese (`zh-cn`, `zh-tw`); a text of which nothing can be said keeps no demand for a language, where
  IFEval lets it pass; English in one case is whatever looks like no other language;
- words in capitals are split at white space and signs, and `DON'T` is one, where nltk makes two;
- bullets and titles are read line by line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from posttrain.errors import did_you_mean
from posttrain.rewards import RewardOptions, Verdict, Verifier, answer_part
from posttrain.rewards._scripts import SCRIPTS, language_of, likely_languages, sentences, words
from posttrain.rewards.repetition import repeated_share

GUARDED = 4
"""Words of the n-grams that the guard against repetition counts."""
YES_NO_MAYBE = ("My answer is yes.", "My answer is no.", "My answer is maybe.")

_WORD = re.compile(r"\w+")
_CAPITALS = re.compile(r"\w+(?:[-'’&.]\w+)*")
_DIVIDER = re.compile(r"\s?\*\*\*\s?")
_HIGHLIGHTS = re.compile(r"\*[^\n*]*\*"), re.compile(r"\*\*[^\n*]*\*\*")
_POSTSCRIPTS = {"P.P.S": re.compile(r"p\.\s?p\.\s?s"), "P.S.": re.compile(r"p\.\s?s\.")}
_FENCES = ("```json", "```Json", "```JSON", "```")


class Options(RewardOptions):
    """Options of the reward `instructions`."""

    score: Literal["all", "fraction"] = "all"
    """1.0 for every constraint and else 0.0, or the share of constraints."""
    mode: Literal["strict", "loose"] = "strict"
    """The answer as it is, or also without emphasis, first line and last line."""
    min_words: Annotated[int, Field(ge=1)] = 3
    """Words that an answer must have; of scripts without spaces every letter is one."""
    max_repeated: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of repeated n-grams above which an answer is worth nothing; 1 never is."""


class Reward(Verifier):
    """How many of the row's constraints the answer keeps."""

    name = "instructions"
    requires = ("instruction_id_list", "kwargs")

    def __init__(self, options: Options) -> None:
        self.options = options
        self.accuracy = options.score == "all"

    @property
    def column(self) -> str:
        """`instructions`, and `instructions_fraction` where it shapes."""
        return self.name if self.accuracy else f"{self.name}_fraction"

    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """Check every constraint; `Verdict.detail` names those that are broken, `Verdict.answer` says `kept/all`."""
        try:
            constraints = constraints_of(row["instruction_id_list"], row["kwargs"])
        except ValueError as error:
            return Verdict(None, "unparseable_gold", detail=str(error))
        text = answer_part(completion)
        if not text.strip():
            return Verdict(0.0, "no_answer")
        suspicion = self._suspicion(text, constraints)
        if suspicion is not None:
            return Verdict(0.0, "wrong", detail=f"guard: {suspicion}")
        tried = [text] if self.options.mode == "strict" else list(_variants(text))
        broken = [c.name for c in constraints if not any(c.kept_by(variant) for variant in tried if variant.strip())]
        kept = len(constraints) - len(broken)
        reward = kept / len(constraints) if self.options.score == "fraction" else float(not broken)
        detail = f"broken: {', '.join(broken)}" if broken else ""
        return Verdict(reward, "wrong" if broken else "ok", f"{kept}/{len(constraints)}", detail)

    def gold(self, row: Mapping[str, Any]) -> str | None:
        """The row's `solution`, an answer that keeps everything, where it has one."""
        solution = row.get("solution")
        return None if solution is None or not self.accuracy else str(solution)

    def _suspicion(self, text: str, constraints: Sequence[Constraint]) -> str | None:
        """Why an answer seems to be written for the checker alone."""
        said = words(text.casefold())
        wanted = min([self.options.min_words, *(c.most_words for c in constraints if c.most_words is not None)])
        if len(said) < max(1, wanted):
            return f"fewer than {max(1, wanted)} words"
        share = repeated_share(said, GUARDED)
        return f"{share:.0%} of it is repetition" if share > self.options.max_repeated else None


class Constraint(NamedTuple):
    """One thing that a prompt asks of its answer."""

    name: str
    given: dict[str, Any]

    def kept_by(self, text: str) -> bool:
        """Whether a text that is not blank keeps it."""
        return _CHECKS[self.name][0](text, **self.given)

    @property
    def most_words(self) -> int | None:
        """The greatest number of words that it allows; None where it says nothing of that."""
        if self.name != "length_constraints:number_words" or self.given["relation"] != "less than":
            return None
        return int(self.given["num_words"]) - 1


def constraints_of(names: Any, given: Any) -> list[Constraint]:
    """The constraints of a row, checked.

    Raises:
        ValueError: there are none, one is unknown, or what it takes is missing, unknown or of another kind.
    """
    if not isinstance(names, Sequence) or isinstance(names, str) or not names:
        raise ValueError(f"instruction_id_list is {names!r:.80}, no list of constraints")
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != len(names):
        raise ValueError(f"kwargs are not one mapping for each of {len(names)} constraints")
    return [_constraint(name, values) for name, values in zip(names, given, strict=True)]


def _constraint(name: Any, values: Any) -> Constraint:
    if not isinstance(name, str) or name not in _CHECKS:
        raise ValueError(f"there is no constraint {name!r:.80}{did_you_mean(str(name), _CHECKS)}".rstrip("?"))
    if values is not None and not isinstance(values, Mapping):
        raise ValueError(f"what {name} takes is {values!r:.80}, no mapping")
    said = {key: value for key, value in (values or {}).items() if value is not None}
    wanted = _CHECKS[name][1]
    for key in wanted:
        if key not in said:
            raise ValueError(f"{name} lacks {key}")
    for key, value in said.items():
        if key not in wanted:
            raise ValueError(f"{name} does not take {key}")
        if isinstance(value, float) and value.is_integer():
            said[key] = value = int(value)
        if not _KINDS[wanted[key]](value):
            raise ValueError(f"{key} of {name} is {value!r:.80}, not {wanted[key]}")
    return Constraint(name, said)


def _variants(text: str) -> Iterator[str]:
    """The text, and without its first line, its last line, or both; each also without `*`."""
    lines = text.split("\n")
    for first, last in ((0, 0), (1, 0), (0, 1), (1, 1)):
        part = "\n".join(lines[first : len(lines) - last])
        part = part.strip() if first or last else part
        yield part
        yield part.replace("*", "")


# ------------------------------------------------------------------ one function per constraint


def _holds(count: int, relation: str, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


def _existence(text: str, keywords: Sequence[str]) -> bool:
    folded = text.casefold()
    return all(keyword.strip().casefold() in folded for keyword in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _holds(text.casefold().count(keyword.strip().casefold()), relation, frequency)


def _forbidden(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _holds(text.lower().count(letter.lower()), let_relation, let_frequency)


def _language(text: str, language: str) -> bool:
    return language_of(text) == language.partition("-")[0].lower()


def _sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _holds(sentences(text), relation, num_sentences)


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    first, *middle = _DIVIDER.split(text)
    last = [middle.pop()] if middle else []
    outer = [part for part in (first, *last) if part.strip()]
    return all(part.strip() for part in middle) and len(outer) + len(middle) == num_paragraphs


def _words(text: str, num_words: int, relation: str) -> bool:
    return _holds(len(_WORD.findall(text)), relation, num_words)


def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = text.split("\n\n")
    if sum(1 for part in parts if part.strip()) != num_paragraphs or nth_paragraph > len(parts):
        return False
    begins = (parts[nth_paragraph - 1].split() or [""])[0].lstrip("'\"")
    return re.split(r"[.,?!'\"]", begins, maxsplit=1)[0].lower() == first_word.lower()


def _placeholders(text: str, num_placeholders: int) -> bool:
    count = 0
    for line in text.split("\n"):
        end = 0
        while (start := line.find("[", end)) >= 0 and (end := line.find("]", start)) >= 0:
            count += 1
    return count >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    pattern = _POSTSCRIPTS.get(marker)
    return marker.lower() in text.lower() if pattern is None else pattern.search(text.lower()) is not None


def _bullets(text: str, num_bullets: int) -> bool:
    lines = [line.lstrip() for line in text.split("\n")]
    return (
        sum(1 for line in lines if line[:1] == "-" or (line[:1] == "*" and line[1:2] not in ("", "*"))) == num_bullets
    )


def _constrained(text: str) -> bool:
    return any(option in text for option in YES_NO_MAYBE)


def _highlights(text: str, num_highlights: int) -> bool:
    found = [highlight for pattern in _HIGHLIGHTS for highlight in pattern.findall(text)]
    return sum(1 for highlight in found if highlight.strip("*").strip()) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


def _json(text: str) -> bool:
    bare = text.strip()
    for fence in _FENCES:
        bare = bare.removeprefix(fence)
    try:
        json.loads(bare.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end and line[start : end + 2].lstrip("<").rstrip(">").strip():
            return True
    return False


def _two_responses(text: str) -> bool:
    first, *middle = text.split("******")
    last = [middle.pop()] if middle else []
    outer = [part for part in (first, *last) if part.strip()]
    answers = [part.strip() for part in (*outer, *middle)]
    return all(answers) and len(answers) == 2 and answers[0] != answers[1]


def _repeats(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quoted(text: str) -> bool:
    bare = text.strip()
    return len(bare) > 1 and bare[0] == bare[-1] == '"'


def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return _holds(sum(map(str.isupper, _CAPITALS.findall(text))), capital_relation, capital_frequency)


def _english(text: str) -> bool:
    scores = likely_languages(text)
    return max(scores, key=lambda code: (scores[code], code == "en")) == "en" if scores else text.isascii()


def _capitals(text: str) -> bool:
    return text.isupper() and _english(text)


def _lowercase(text: str) -> bool:
    return text.islower() and _english(text)


def _no_comma(text: str) -> bool:
    return "," not in text


_KINDS: dict[str, Callable[[Any], bool]] = {
    "a whole number": lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
    "a number from 1 on": lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 1,
    "'less than' or 'at least'": lambda value: value in ("less than", "at least"),
    "a text": lambda value: isinstance(value, str) and bool(value.strip()),
    "one character": lambda value: isinstance(value, str) and len(value) == 1,
    "a list of texts": lambda value: (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and all(isinstance(one, str) and one.strip() for one in value)
    ),
    "a language that is known here": lambda value: (
        isinstance(value, str) and value.partition("-")[0].lower() in SCRIPTS
    ),
}
_COUNT, _RANK, _RELATION, _TEXT, _LETTER, _TEXTS, _LANGUAGE = _KINDS

_CHECKS: dict[str, tuple[Callable[..., bool], dict[str, str]]] = {
    "keywords:existence": (_existence, {"keywords": _TEXTS}),
    "keywords:frequency": (_frequency, {"keyword": _TEXT, "frequency": _COUNT, "relation": _RELATION}),
    "keywords:forbidden_words": (_forbidden, {"forbidden_words": _TEXTS}),
    "keywords:letter_frequency": (
        _letters,
        {"letter": _LETTER, "let_frequency": _COUNT, "let_relation": _RELATION},
    ),
    "language:response_language": (_language, {"language": _LANGUAGE}),
    "length_constraints:number_sentences": (_sentences, {"num_sentences": _COUNT, "relation": _RELATION}),
    "length_constraints:number_paragraphs": (_paragraphs, {"num_paragraphs": _COUNT}),
    "length_constraints:number_words": (_words, {"num_words": _COUNT, "relation": _RELATION}),
    "length_constraints:nth_paragraph_first_word": (
        _first_word,
        {"num_paragraphs": _COUNT, "nth_paragraph": _RANK, "first_word": _TEXT},
    ),
    "detectable_content:number_placeholders": (_placeholders, {"num_placeholders": _COUNT}),
    "detectable_content:postscript": (_postscript, {"postscript_marker": _TEXT}),
    "detectable_format:number_bullet_lists": (_bullets, {"num_bullets": _COUNT}),
    "detectable_format:constrained_response": (_constrained, {}),
    "detectable_format:number_highlighted_sections": (_highlights, {"num_highlights": _COUNT}),
    "detectable_format:multiple_sections": (_sections, {"section_spliter": _TEXT, "num_sections": _COUNT}),
    "detectable_format:json_format": (_json, {}),
    "detectable_format:title": (_title, {}),
    "combination:two_responses": (_two_responses, {}),
    "combination:repeat_prompt": (_repeats, {"prompt_to_repeat": _TEXT}),
    "startend:end_checker": (_ends, {"end_phrase": _TEXT}),
    "startend:quotation": (_quoted, {}),
    "change_case:capital_word_frequency": (
        _capital_words,
        {"capital_frequency": _COUNT, "capital_relation": _RELATION},
    ),
    "change_case:english_capital": (_capitals, {}),
    "change_case:english_lowercase": (_lowercase, {}),
    "punctuation:no_comma": (_no_comma, {}),
}
NAMES = tuple(_CHECKS)
"""The constraints that are known."""
