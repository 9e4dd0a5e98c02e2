r"""Mathematics: the last `\boxed{}` equals the gold answer, decided exactly where possible and else by math-verify.

The answer is the last balanced `\boxed{}` after the last `</think>`. Without a box, a completion that is nothing but a
number counts as its answer.

1. Both sides are normalised (NFKC, LaTeX spellings, white space) and compared as text, ignoring case in words.
2. Two plain numbers (integers, decimals, fractions of them) are compared exactly; so 0.333 is not 1/3.
3. Everything else goes to math-verify, with both sides in a `\boxed{}`: without one it reads `2\pi` as 2.

A static guard stands before step 3: what it refuses is wrong, with the status `resource`. math-verify runs in the
calling process and thread without a deadline, because its own timeouts are signals, which exist on the main thread
only and cannot interrupt a long integer operation. So an answer that passes the guard and is hard for sympy, such as
`(x+y+z+1)^{99}`, holds the caller for as long as sympy needs.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

from posttrain.rewards import RewardOptions, Verdict, Verifier, after_thinking

MAX_LENGTH = 300
"""Characters of an answer."""
MAX_RUN = 60
"""Consecutive digits."""
MAX_NESTING = 20
"""Brackets inside one another."""
MAX_EXPONENT_DIGITS = 5
"""Digits of an exponent, those of exponents that multiply with it included: so that it is below 10^5."""
MAX_FACTORIAL_DIGITS = 4
r"""Digits under a factorial, and in each argument of `\binom`."""

_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_SCRIPT = re.compile("([⁺⁻⁰¹²³⁴-⁹]+)|([₀-₉]+)|([¼-¾⅐-⅞])")
_SYMBOLS = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "°": r"^\circ ",
})  # fmt: skip
_LAYOUT = re.compile(r"(?<!\\)\\[,;:! ()\[\]]|~|\\?\$|\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])")
_SPACE = re.compile(r"(\\[A-Za-z]+ (?=[A-Za-z])|[0-9] (?=[0-9]))| ")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\{([^{}\\]*)\}")
_WORD = re.compile(r"[A-Za-z]{3,}")
_DECIMAL = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_NUMBER = re.compile(rf"([+-]?)(?:({_DECIMAL})(?:/({_DECIMAL}))?|\\frac\{{(-?{_DECIMAL})\}}\{{(-?{_DECIMAL})\}})")
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+(?:\.[0-9]+)?")
_GUARDED = re.compile(r"\\(?:sum|prod|int|iint|oint)(?![A-Za-z])")
_BINOMIAL = re.compile(r"\\[dt]?binom")
_COMMAND = re.compile(r"\\[A-Za-z]+")


class Options(RewardOptions):
    """The reward `math` has no options."""


class Reward(Verifier):
    """1.0 when the final answer equals the row's `answer`, else 0.0.

    A gold answer that is empty, no text or number, or unbalanced, so that no box can hold it, is `unparseable_gold`.
    One that math-verify cannot read is compared as text.
    """

    name = "math"
    requires = ("answer",)

    def __init__(self, options: Options) -> None:
        self.options = options

    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """Judge the final answer; `Verdict.answer` is its exact value or else its normalised text."""
        gold = _gold(row["answer"])
        if gold is None:
            return Verdict(None, "unparseable_gold", detail=f"the gold answer {row['answer']!r:.200}")
        answer = _extract(completion)
        if answer is None:
            return Verdict(0.0, "no_answer")
        if len(answer) > MAX_LENGTH:
            if answer == gold:
                return Verdict(1.0, "ok", answer)
            return Verdict(0.0, "resource", detail=f"more than {MAX_LENGTH} characters")
        text, gold_text = normalise(answer), normalise(gold)
        value, gold_value = number(text), number(gold_text)
        canonical = text if value is None else str(value)
        if text == gold_text or (_WORD.fullmatch(text) and text.casefold() == gold_text.casefold()):
            return Verdict(1.0, "ok", canonical)
        if value is not None and gold_value is not None:
            return Verdict(float(value == gold_value), "ok" if value == gold_value else "wrong", canonical)
        refusal = refuse(text)
        if refusal is not None:
            return Verdict(0.0, "resource", detail=refusal)
        # NFKC makes braces of their look-alikes, which must not open a second box. The gold passes the guard as well: a
        # row that would hang the comparison is compared as text alone.
        correct = _fits_a_box(text) and refuse(gold_text) is None and _equal(gold_text, text)
        return Verdict(float(correct), "ok" if correct else "wrong", canonical)

    def gold(self, row: Mapping[str, Any]) -> str | None:
        """The row's `answer` in a box."""
        gold = _gold(row["answer"])
        return rf"\boxed{{{row['answer'] if gold is None else gold}}}"


def _gold(answer: Any) -> str | None:
    """The gold answer as text; `None` when no box could hold it."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return None
    text = str(answer).strip()
    box = last_box(text)
    text = text if box is None else box.strip()
    return text if normalise(text) and _fits_a_box(text) else None


def _fits_a_box(text: str) -> bool:
    return last_box(rf"\boxed{{{text}}}") == text


def _extract(completion: str) -> str | None:
    text = after_thinking(completion)
    if text is None:
        return None
    answer = last_box(text)
    if answer is None:
        bare = text.strip()
        return bare if len(bare) <= MAX_LENGTH and number(normalise(bare)) is not None else None
    while len(answer) <= MAX_LENGTH and (inner := last_box(answer)) is not None:
        answer = inner
    return answer.strip() or None


def last_box(text: str) -> str | None:
    r"""The contents of the balanced `\boxed{}` that closes last; `None` where there is none. Linear in the text."""
    open_braces: list[int | None] = []  # where the contents of a box start; None for a plain brace
    found: tuple[int, int] | None = None
    for match in _BRACE.finditer(text):
        token = match[0]
        if token == "{":
            open_braces.append(None)
        elif token == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None:
                found = (start, match.start())
        elif token.startswith(r"\boxed"):
            open_braces.append(match.end())
    return None if found is None else text[found[0] : found[1]]


def normalise(text: str) -> str:
    """One spelling for what means the same: NFKC, LaTeX layout and white space without meaning removed."""
    text = _SCRIPT.sub(_unscript, text).translate(_SYMBOLS)
    text = unicodedata.normalize("NFKC", text)
    text = " ".join(_LAYOUT.sub("", text).split()).rstrip(".")
    whole_text = _TEXT.fullmatch(text)
    if whole_text:
        text = whole_text[1]
    text = _SPACE.sub(lambda match: match[1] or "", text)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\frac([0-9])", r"\\frac{\1}", text)
    return re.sub(r"(\\frac\{[^{}]*\})([0-9])", r"\1{\2}", text)


def _unscript(match: re.Match[str]) -> str:
    # NFKC alone would turn 2² into 22 and 1½ into 11/2.
    superscript, subscript, vulgar = match.groups()
    if vulgar:
        top, _, bottom = unicodedata.normalize("NFKC", vulgar).partition("⁄")
        return rf"\frac{{{top}}}{{{bottom}}}"
    sign = "^" if superscript else "_"
    return f"{sign}{{{unicodedata.normalize('NFKC', superscript or subscript)}}}"


def number(text: str) -> Fraction | None:
    """The exact value of a normalised integer, decimal or fraction of the two; `None` for anything else."""
    if len(text) > MAX_LENGTH:
        return None
    if _THOUSANDS.fullmatch(text):
        text = re.sub("[{},]", "", text)
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, whole, divisor, top, bottom = match.groups()
    denominator = Fraction(divisor or bottom or 1)
    if not denominator:
        return None
    value = Fraction(whole or top) / denominator
    return -value if sign == "-" else value


def refuse(text: str) -> str | None:
    """Why a normalised answer is too dangerous for sympy; `None` when it is not, as far as can be seen at a glance."""
    if len(text) > MAX_LENGTH:
        return f"more than {MAX_LENGTH} characters"
    if re.search(rf"[0-9]{{{MAX_RUN + 1}}}", text):
        return f"more than {MAX_RUN} consecutive digits"
    if _GUARDED.search(text):
        return "a sum, product or integral left to compute"
    text = text.replace(r"\{", "(").replace(r"\}", ")")
    for match in _BINOMIAL.finditer(text):
        top, end = _group(text, match.end())
        bottom, _ = _group(text, end)
        if any(_digits(part) > MAX_FACTORIAL_DIGITS or set("^!") & set(part) for part in (top, bottom)):
            return f"a binomial coefficient of more than {MAX_FACTORIAL_DIGITS} digits"
    return _refuse_factorial(text) or _refuse_powers(text)


def _refuse_factorial(text: str) -> str | None:
    for match in re.finditer(r"!(?!=)", text):
        before = text[: match.start()]
        if before.endswith(("!", ")", "]", "}")):
            before = before[_opening(before) :]
            # Anything that grows under the factorial is refused; (2n+1)! is not.
            if before.startswith("!") or set("^!") & set(before) or _digits(before) > MAX_FACTORIAL_DIGITS:
                return "a factorial of more than a plain number"
        elif len(before) - len(before.rstrip("0123456789.")) > MAX_FACTORIAL_DIGITS:
            return f"a factorial of more than {MAX_FACTORIAL_DIGITS} digits"
    return None


def _refuse_powers(text: str) -> str | None:
    # Digits of the largest exponent so far, per open bracket: (9^{999})^{999} counts six.
    weights = [0]
    position = 0
    while position < len(text):
        character = text[position]
        position += 1
        if character in "([{":
            weights.append(0)
            if len(weights) > MAX_NESTING + 1:
                return f"more than {MAX_NESTING} nested brackets"
        elif character in ")]}" and len(weights) > 1:
            weights[-2:] = [max(weights[-2:])]
        elif character == "^":
            grouped = position >= 2 and text[position - 2] in ")]}"
            exponent, position = _group(text, position)
            if text[position : position + 1] == "^" or set("^!") & set(exponent):
                return "a power tower"
            weight = _digits(exponent) + (weights[-1] if grouped else 0)
            if weight > MAX_EXPONENT_DIGITS:
                return f"an exponent of more than {MAX_EXPONENT_DIGITS} digits"
            weights[-1] = max(weights[-1], weight)
    return None


def _group(text: str, start: int) -> tuple[str, int]:
    """The LaTeX argument at `start` (a braced group, a command or one character) and the position behind it."""
    if text[start : start + 1] != "{":
        command = _COMMAND.match(text, start)
        end = command.end() if command else min(start + 1, len(text))
        return text[start:end], end
    depth = 0
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if not depth:
            return text[start : position + 1], position + 1
    return text[start:], len(text)


def _opening(text: str) -> int:
    """Where the bracket that closes at the end of `text` opens; 0 when it never does."""
    depth = 0
    for position in range(len(text) - 1, -1, -1):
        depth += 1 if text[position] in ")]}" else -1 if text[position] in "([{" else 0
        if not depth:
            return position
    return 0


def _digits(text: str) -> int:
    return sum(character in "0123456789" for character in text)


def _equal(gold: str, answer: str) -> bool:
    """Whether math-verify finds two normalised answers equal."""
    from math_verify import verify

    gold_parsed, answer_parsed = _parse(gold), _parse(answer)
    if not gold_parsed or not answer_parsed:
        return False
    return bool(verify(gold_parsed, answer_parsed, timeout_seconds=None))


@lru_cache(maxsize=1024)
def _parse(answer: str) -> list[Any]:
    """What math-verify reads in `answer`, as sympy objects; empty when it reads nothing."""
    from math_verify import LatexExtractionConfig, parse

    # Both modules warn that there is no deadline, which the docstring above says.
    for module in ("parser", "grader"):
        logging.getLogger(f"math_verify.{module}").setLevel(logging.ERROR)
    # Boxes only: the extraction of plain expressions would hand model text to sympy's parse_expr, which evaluates it.
    only_boxes = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    parsed: list[Any] = parse(
        rf"\boxed{{{answer}}}",
        extraction_config=[only_boxes],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    return parsed
