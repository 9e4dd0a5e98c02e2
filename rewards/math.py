r"""Mathematics: the last `\boxed{}` equals the gold answer, decided exactly where possible and else by math-verify.

The answer is the last balanced `\boxed{}` after the last `</think>`. Without a box, a completion that is nothing but a
number counts as its answer.

1. Both sides are normalised (NFKC, LaTeX spellings, white space) and compared as text, ignoring case in words.
2. Tuples, intervals, sets, unions and lists are taken apart, and their elements compared: sets and lists in any order
   (a list with repeats counted), everything else in order. `2 \pm 3` is the list `5, -1`. A list may stand for a set,
   and for a tuple in the same order, a tuple for a list only where that gives names (`x=3, y=-2`); a set is no tuple;
   brackets of a pair must agree, those of longer tuples need not. `\{x \mid x > 2\}` is the inequality in it. The
   branches of `cases` are compared in any order, each value with its condition. The name of a point and a condition
   like `k \in \mathbb{Z}` may be missing on one side but must not differ.
3. Two plain numbers (integers, decimals, fractions of them, mixed numbers, repeating decimals, `a \times 10^n`, `1e5`),
   and their products and quotients with one square root and π, are compared exactly; so 0.333 is not 1/3. A number
   directly before a fraction of two integers is a mixed number, also in `2\frac{3}{4}x`. Clock times with `a.m.` or
   `p.m.` are compared by hour and minute; without, `4:30` is a ratio.
4. Every other pair goes to math-verify in a worker process that is killed at the `deadline`, with both sides in a
   `\boxed{}`: without one it reads `2\pi` as 2. There a decimal equals what it agrees with to 12 decimals. Of equations
   like `6=2\cdot3`, every side without letters counts; `2a` is not `2A`, `f'` not `f`, and `0.3...` not 0.3.

`percent`, `units`, `boxes`, `rounding` and `order` say what counts as the same; see `Options`.

A static guard stands before step 4: what it refuses is wrong, with the status `resource`, in microseconds. The rest
that is hard for sympy, such as `(x+y+z+1)^{99}`, costs its deadline and a worker, and nobody else.

What is read from one text alone lies in `_latex`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache, partial
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from posttrain.rewards import DEADLINE, Deadline, RewardOptions, Verdict, Verifier
from posttrain.rewards._latex import (
    MAX_LENGTH,
    Shape,
    Time,
    answers_of,
    assigned,
    cases,
    clock,
    count_digits,
    fits_a_box,
    gold_of,
    group,
    in_radians,
    integer_range,
    is_inequality,
    is_relation,
    named_point,
    narrows,
    normalise,
    number,
    opens,
    plain_sides,
    shape,
    surd,
    symbols,
    without_builder,
    without_percent,
    without_unit,
)

MAX_RUN = 60
"""Consecutive digits."""
MAX_NESTING = 20
"""Brackets inside one another."""
MAX_EXPONENT_DIGITS = 5
"""Digits of an exponent, those of exponents that multiply with it included: so that it is below 10^5."""
MAX_FACTORIAL_DIGITS = 4
r"""Digits under a factorial, and in each argument of `\binom`."""
DECIMALS = 12
"""Decimals to which math-verify compares a decimal with something else."""


_WORD = re.compile(r"[A-Za-z]{3,}")
_CHOICE = re.compile(r"\(([A-Z])\)")
_ELLIPSIS = re.compile(r"\.\.\.$|\\[lc]?dots ?$")
_PRIME = re.compile(r"(?<=[A-Za-z)}'])'|\\prime(?![A-Za-z])")


_GUARDED = re.compile(r"\\(?:sum|prod|int|iint|oint)(?![A-Za-z])")
_BINOMIAL = re.compile(r"\\[dt]?binom")


_TYPICAL = (
    r"\frac{1}{2}", r"2\sqrt{3}", r"x^2+2x+1", r"(x-1)(x+2)", r"\frac{\sqrt{2}}{2}", r"2\pi", "x=5",
    r"y=\frac{1}{2}x-3", r"x\ge5", r"(-\infty,3)", r"\{1,2\}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
    r"\log_2{3}", r"e^{-x}", r"\sin{x}", "3+4i", r"2^{10}", r"\text{no}", r"10!", "0.5x",
)  # fmt: skip
"""Answers of many kinds: reading them once builds tables of the parser that workers then share."""


class Options(RewardOptions):
    """Options of the reward `math`."""

    percent: Literal["either", "value"] = "either"
    r"""`50\%` is 0.5; with `either` it is 50, too, because questions ask "what percent" and golds drop the sign."""
    units: Literal["optional", "required", "ignored"] = "optional"
    r"""A unit behind a number, a base (`101_2`), a modulus or a currency other than `$`, which is never seen: it may be
    missing on one side but must not differ, or must be the same on both, or is never looked at. Nothing is converted.
    """
    boxes: Literal["last", "reject"] = "last"
    """Of several boxes the last one counts, or a completion whose boxes differ is wrong."""
    rounding: Annotated[int, Field(ge=1, le=12)] | None = None
    """Significant digits: a number also equals the gold number when it is off by at most half a unit of the gold's
    digit of that rank, as 0.333 is 1/3 with 3. Default: only exact values are equal."""
    order: Literal["kind", "ignored", "strict"] = "kind"
    """Tuples are ordered, sets and lists are not; or nothing is ordered; or all but sets is."""
    deadline: Deadline = DEADLINE
    """Seconds for one completion, from when a worker begins it; then the worker is killed, and the reward is 0."""


PartT = TypeVar("PartT")
Symbolic = Callable[[str, str], bool | None]
"""Whether two normalised answers are equal, gold first; None where that is left to a worker."""


class Reward(Verifier):
    """1.0 when the final answer equals the row's `answer`, else 0.0.

    A gold answer that is empty, no text or number, or unbalanced, so that no box can hold it, is `unparseable_gold`.
    One that math-verify cannot read is compared as text.
    """

    name = "math"
    requires = ("answer",)
    isolated = True

    def __init__(self, options: Options) -> None:
        self.options = options

    def prepare(self) -> None:
        """Import math-verify, and have it read and compare answers of many kinds."""
        for answer in _TYPICAL:
            self._symbolic("(x+1)^2", answer)

    def decide(self, completion: str, row: Mapping[str, Any]) -> Verdict | None:
        """Everything but what math-verify is needed for."""
        return self._judge(completion, row, _undecided)

    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """Judge the final answer; `Verdict.answer` is its exact value or else its normalised text."""
        verdict = self._judge(completion, row, self._symbolic)
        assert verdict is not None  # noqa: S101 - math-verify always has an answer
        return verdict

    def gold(self, row: Mapping[str, Any]) -> str | None:
        """The row's `answer` in a box."""
        gold = gold_of(row["answer"])
        return rf"\boxed{{{row['answer'] if gold is None else gold}}}"

    def _judge(self, completion: str, row: Mapping[str, Any], symbolic: Symbolic) -> Verdict | None:
        gold = gold_of(row["answer"])
        if gold is None:
            return Verdict(None, "unparseable_gold", detail=f"the gold answer {row['answer']!r:.200}")
        answers = answers_of(completion)
        if not answers or not answers[-1]:
            return Verdict(0.0, "no_answer")
        answer = answers[-1]
        if self.options.boxes == "reject":
            last, *others = dict.fromkeys(other[: MAX_LENGTH + 1] for other in reversed(answers))
            if any(normalise(other) != normalise(last) for other in others):
                return Verdict(0.0, "wrong", detail="several boxes that differ")
        if len(answer) > MAX_LENGTH:
            if answer == gold:
                return Verdict(1.0, "ok", answer)
            return Verdict(0.0, "resource", detail=f"more than {MAX_LENGTH} characters")
        text, gold_text = normalise(answer), normalise(gold)
        value = number(text)
        canonical = text if value is None else str(value)
        correct = self._same(gold_text, text, _undecided)
        if correct is None:
            refusal = refuse(text)
            if refusal is not None:
                return Verdict(0.0, "resource", detail=refusal)
            # NFKC makes braces of their look-alikes, which must not open a second box. The gold passes the guard as
            # well: a row that would hang the comparison is compared as text alone.
            readable = fits_a_box(text) and refuse(gold_text) is None
            correct = self._same(gold_text, text, symbolic) if readable else False
        return None if correct is None else Verdict(float(correct), "ok" if correct else "wrong", canonical)

    def _same(self, gold: str, answer: str, symbolic: Symbolic) -> bool | None:
        """Whether two normalised answers are equal; None where `symbolic` decides and does not say."""
        if _same_text(gold, answer):
            return True
        gold, answer = without_builder(gold), without_builder(answer)
        without_ranges = _without_ranges(gold, answer)
        if without_ranges is None:
            return False
        gold, answer = without_ranges
        by_cases, others = cases(gold), cases(answer)
        if by_cases and others:
            (name, branches), (other_name, other_branches) = by_cases, others
            if name and other_name and name != other_name:
                return False
            return _matched(branches, other_branches, partial(self._same_in_order, symbolic=symbolic))
        gold, answer = _without_names(gold, answer)
        points = _without_point_names(gold, answer)
        if points is None:
            return False
        gold, answer = points
        whole, other = shape(gold), shape(answer)
        kinds = {whole.kind, other.kind}
        if kinds == {"one"}:
            values = [] if is_relation(gold) else plain_sides(answer)
            if values:  # to math-verify, 6=5 is 5
                return _every([self._same_element(gold, value, symbolic) for value in values])
            return self._same_element(gold, answer, symbolic)
        if "one" in kinds:
            one, many = (whole, other) if whole.kind == "one" else (other, whole)
            if many.kind == "set" and len(many.parts) == 1:
                return self._same(whole.parts[0], other.parts[0], symbolic)
            # A relation may describe an interval, and a symbol a set.
            return symbolic(gold, answer) if is_relation(one.parts[0]) else False
        if not _comparable(whole, other):
            return False
        golds, answers = whole.parts, other.parts
        if "set" in kinds:
            golds, answers = _distinct(golds), _distinct(answers)
        in_order = {"strict": ("tuple", "list"), "kind": ("tuple",), "ignored": ()}[self.options.order]
        kind = "tuple" if "tuple" in kinds else whole.kind
        if "set" in kinds or kind not in in_order:
            return _matched(golds, answers, partial(self._same, symbolic=symbolic))
        return len(golds) == len(answers) and self._same_in_order(golds, answers, symbolic)

    def _same_in_order(self, golds: Sequence[str], answers: Sequence[str], symbolic: Symbolic) -> bool | None:
        """Whether the parts are equal one by one; a branch of `cases` has two, its value and its condition."""
        return _every(self._same(gold, answer, symbolic) for gold, answer in zip(golds, answers, strict=True))

    def _same_element(self, gold: str, answer: str, symbolic: Symbolic) -> bool | None:
        times = clock(gold), clock(answer)
        if any(time and time.minute is not None and time.half for time in times):
            return self._same_time(*times)
        gold, gold_percent = without_percent(gold)
        answer, percent = without_percent(answer)
        gold, gold_unit = without_unit(gold)
        answer, unit = without_unit(answer)
        if self._units_differ(gold_unit, unit):
            return False
        if gold_percent == percent:
            return self._same_value(gold, answer, symbolic)
        found = self._same_value(gold, answer, symbolic, gold_percent=gold_percent, percent=percent)
        if found or self.options.percent == "value":
            return found
        either = self._same_value(gold, answer, symbolic)
        return either if either or found is False else None

    def _same_time(self, gold: Time | None, answer: Time | None) -> bool:
        """Whether two clock times are the same; `a.m.` and `p.m.` are units."""
        if gold is None or answer is None or self._units_differ(gold.half, answer.half):
            return False
        return (gold.hour, gold.minute or 0) == (answer.hour, answer.minute or 0)

    def _units_differ(self, gold: str, answer: str) -> bool:
        """Whether units, empty where there are none, differ as the options forbid."""
        policy = self.options.units
        return gold != answer and (policy == "required" or (policy == "optional" and gold != "" and answer != ""))

    def _same_value(
        self, gold: str, answer: str, symbolic: Symbolic, *, gold_percent: bool = False, percent: bool = False
    ) -> bool | None:
        if gold_percent == percent and _same_text(gold, answer):
            return True
        letters = gold.strip("()"), answer.strip("()")
        if all(len(each) == 1 and not each.isdigit() for each in letters):
            return letters[0] == letters[1]  # to math-verify, a is A
        if bool(_ELLIPSIS.search(gold)) != bool(_ELLIPSIS.search(answer)):
            return False  # to math-verify, 0.333... is 0.333
        if len(_PRIME.findall(gold)) != len(_PRIME.findall(answer)):
            return False  # to math-verify, f' is f
        ours, theirs = symbols(gold), symbols(answer)
        if any(symbol.swapcase() in ours - theirs for symbol in theirs - ours):
            return False  # to math-verify, 2a is 2A
        gold_value, value = number(gold), number(answer)
        if gold_value is None or value is None:
            surds = surd(gold), surd(answer)
            if surds[0] and surds[1] and gold_percent == percent and self.options.rounding is None:
                return surds[0] == surds[1]
            hundredth = r"\frac{%s}{100}"
            return symbolic(hundredth % gold if gold_percent else gold, hundredth % answer if percent else answer)
        return self._close(gold_value / 100 if gold_percent else gold_value, value / 100 if percent else value)

    def _close(self, gold: Fraction, value: Fraction) -> bool:
        """Whether a number is the gold number, or would be after the rounding that the options allow."""
        if value == gold or self.options.rounding is None or not gold:
            return value == gold
        rank = len(str(abs(gold.numerator))) - len(str(gold.denominator))
        rank -= abs(gold) < Fraction(10) ** rank  # of the first digit
        return bool(abs(value - gold) <= Fraction(10) ** (rank - self.options.rounding + 1) / 2)

    def _symbolic(self, gold: str, answer: str) -> bool:
        """Whether math-verify finds two normalised answers equal."""
        from math_verify import verify

        verify_now = partial(verify, float_rounding=DECIMALS, allow_set_relation_comp=True, timeout_seconds=None)
        gold_parsed, answer_parsed = _parse(gold), _parse(answer)
        if not gold_parsed or not answer_parsed:
            return False
        first = gold_parsed[0], answer_parsed[0]
        if any(map(_boundless, first)) and all(map(_is_value, first)):  # to math-verify, infinity may be any number
            values = list(map(_worked_out, first))
            if any(map(_boundless, values)):
                return bool(values[0] == values[1])
        if verify_now(gold_parsed, answer_parsed):
            return True
        if any(map(_named_i, first)):
            found = list(map(_imaginary, first))
            if None not in found and verify_now(*found):
                return True
        if self.options.rounding is None:
            return False
        gold_value, value = map(_evaluate, first)
        return gold_value is not None and value is not None and self._close(gold_value, value)


def _undecided(gold: str, answer: str) -> None:
    """Leave it to a worker."""


def _same_text(one: str, other: str) -> bool:
    """Whether two normalised texts are the same, but for the case of a word and the parentheses of a choice."""
    if one == other:
        return True
    if _WORD.fullmatch(one) and _WORD.fullmatch(other):
        return one.casefold() == other.casefold()
    return bool(_CHOICE.fullmatch(one) or _CHOICE.fullmatch(other)) and one.strip("()") == other.strip("()")


def _without_names(gold: str, answer: str) -> tuple[str, str]:
    """Both without `x =`, where both have the same, or the other is no relation."""
    gold_named, named = assigned(gold), assigned(answer)
    if gold_named and named:
        return (gold_named[1], named[1]) if gold_named[0] == named[0] else (gold, answer)
    if gold_named and not is_relation(answer):
        return gold_named[1], answer
    if named and not is_relation(gold):
        return gold, named[1]
    return gold, answer


def _without_ranges(gold: str, answer: str) -> tuple[str, str] | None:
    r"""Both without a condition like `k\in\mathbb{Z}`; `None` where they have different ones."""
    ranges = gold_range, range_ = integer_range(gold), integer_range(answer)
    if gold_range and range_:
        return (gold_range[0], range_[0]) if gold_range[1:] == range_[1:] else None
    gold, answer = (
        found[0] if found and not narrows(*found[:2]) else text
        for text, found in zip((gold, answer), ranges, strict=True)
    )
    return gold, answer


def _without_point_names(gold: str, answer: str) -> tuple[str, str] | None:
    """Both without the name of a point, where the other has none but coordinates; `None` where the names differ."""
    gold_point, point = named_point(gold), named_point(answer)
    if gold_point and point:
        return (gold_point[1], point[1]) if gold_point[0] == point[0] else None
    if gold_point and shape(answer).kind in ("tuple", "list"):
        # C(5,2) and P(5,2) may count combinations and permutations.
        counts = re.fullmatch(r"[CP]\(([0-9]{1,9}),([0-9]{1,9})\)", gold)
        return (gold if counts and int(counts[1]) >= int(counts[2]) else gold_point[1]), answer
    if point and shape(gold).kind in ("tuple", "list"):
        return gold, point[1]
    return gold, answer


def _comparable(gold: Shape, answer: Shape) -> bool:
    """Whether two things of several parts are of kinds that can be equal."""
    if gold.kind == answer.kind:
        return gold.kind != "tuple" or len(gold.parts) > 2 or gold.brackets == answer.brackets
    if {gold.kind, answer.kind} == {"list", "set"}:
        return True
    if {gold.kind, answer.kind} == {"list", "union"}:
        return all(map(is_inequality, gold.parts + answer.parts))
    if gold.kind == "list" and answer.kind == "tuple" and answer.brackets == "()":  # x=3,y=-2 is a point
        names = {found[0] for found in map(assigned, gold.parts) if found}
        return len(names) == len(gold.parts)
    return gold.kind == "tuple" and answer.kind == "list" and gold.brackets == "()"


def _distinct(parts: Sequence[str]) -> tuple[str, ...]:
    values = {number(part) or part: part for part in parts}
    return tuple(values.values())


def _every(found: Iterable[bool | None]) -> bool | None:
    """Whether all are true: False from the first that is not, else None where one is undecided."""
    undecided = False
    for each in found:
        if each is False:
            return False
        undecided = undecided or each is None
    return None if undecided else True


def _matched(
    golds: Sequence[PartT], answers: Sequence[PartT], same: Callable[[PartT, PartT], bool | None]
) -> bool | None:
    """Whether the parts can be paired so that all pairs are equal."""
    if len(golds) != len(answers):
        return False
    left = list(answers)
    found: bool | None = True
    for gold in golds:
        undecided = False
        for index, answer in enumerate(left):
            equal = same(gold, answer)
            if equal:
                del left[index]
                break
            undecided = undecided or equal is None
        else:
            if not undecided:
                return False
            found = None
    return found


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
        top, end = group(text, match.end())
        bottom, _ = group(text, end)
        if any(count_digits(part) > MAX_FACTORIAL_DIGITS or set("^!") & set(part) for part in (top, bottom)):
            return f"a binomial coefficient of more than {MAX_FACTORIAL_DIGITS} digits"
    return _refuse_factorial(text) or _refuse_powers(text)


def _refuse_factorial(text: str) -> str | None:
    for match in re.finditer(r"!(?!=)", text):
        before = text[: match.start()]
        if before.endswith(("!", ")", "]", "}")):
            before = before[opens(before) or 0 :]
            # Anything that grows under the factorial is refused; (2n+1)! is not.
            if before.startswith("!") or set("^!") & set(before) or count_digits(before) > MAX_FACTORIAL_DIGITS:
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
            exponent, position = group(text, position)
            if text[position : position + 1] == "^" or set("^!") & set(exponent):
                return "a power tower"
            weight = count_digits(exponent) + (weights[-1] if grouped else 0)
            if weight > MAX_EXPONENT_DIGITS:
                return f"an exponent of more than {MAX_EXPONENT_DIGITS} digits"
            weights[-1] = max(weights[-1], weight)
    return None


@lru_cache(maxsize=1024)
def _parse(answer: str) -> list[Any]:
    """What math-verify reads in `answer`, as sympy objects; empty when it reads nothing."""
    if not fits_a_box(answer):  # a part of an answer, cut at a brace: math-verify would read what stands before
        return []
    from latex2sympy2_extended import NormalizationConfig  # type: ignore[import-untyped]
    from math_verify import LatexExtractionConfig, parse

    # Both modules warn that there is no deadline: the worker has one.
    for module in ("parser", "grader"):
        logging.getLogger(f"math_verify.{module}").setLevel(logging.ERROR)
    # Boxes only: the extraction of plain expressions would hand model text to sympy's parse_expr, which evaluates it.
    # Units are dealt with above: math-verify takes the t of 2t for one.
    only_boxes = LatexExtractionConfig(
        boxed_match_priority=0,
        try_extract_without_anchor=False,
        normalization_config=NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="last"),
    )
    parsed: list[Any] = parse(
        rf"\boxed{{{in_radians(answer)}}}",
        extraction_config=[only_boxes],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    return parsed


def _named_i(expression: Any) -> list[Any]:
    """The symbols i in what math-verify read, which takes none for the imaginary unit."""
    return [symbol for symbol in getattr(expression, "free_symbols", ()) if symbol.name == "i"]


def _imaginary(expression: Any) -> Any:
    """What math-verify read, with the imaginary unit for i; None where that means nothing, as in `i<3`."""
    from sympy import I  # type: ignore[import-untyped]

    try:
        return expression.subs({symbol: I for symbol in _named_i(expression)}, simultaneous=True).doit()
    except MemoryError:
        raise
    except Exception:  # whatever sympy says of a model's text: a completion must not choose to go unjudged
        return None


def _is_value(expression: Any) -> bool:
    """Whether a sympy object is no set, relation or the like."""
    from sympy import Expr

    return isinstance(expression, Expr)


def _boundless(expression: Any) -> bool:
    """Whether a sympy object holds an infinity, or what has no value."""
    from sympy import Basic, nan, oo, zoo

    return isinstance(expression, Basic) and expression.has(oo, -oo, zoo, nan)


def _worked_out(expression: Any) -> Any:
    """What a sympy object comes to; itself where sympy cannot say."""
    try:
        return expression.doit()
    except MemoryError:
        raise
    except Exception:  # as above
        return expression


def _evaluate(expression: Any) -> Fraction | None:
    """The value of a sympy object to 30 digits; None where it is no real number."""
    try:
        return Fraction(str(expression.evalf(30)))
    except MemoryError:
        raise
    except Exception:  # as above
        return None
