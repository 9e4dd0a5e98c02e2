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
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from typing import Annotated, Any, Literal

from pydantic import Field

from posttrain.rewards import DEADLINE, Deadline, RewardOptions, Verdict, Verifier, after_thinking

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
MAX_SCALE = 400
r"""The exponent in `a \times 10^n` up to which it is computed exactly."""
DECIMALS = 12
"""Decimals to which math-verify compares a decimal with something else."""

_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_SCRIPT = re.compile("([⁺⁻⁰¹²³⁴-⁹]+)|([₀-₉]+)|([¼-¾⅐-⅞])")
_SYMBOLS = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ",
    "°": r"^\circ ", "√": r"\sqrt ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "\u2061": None, "\u200b": None,
})  # fmt: skip
_LAYOUT = re.compile(
    r"(?<!\\)\\[,;:! ()\[\]]|~|\\?\$|\\(?:left|right|big|Big|bigg|Bigg|displaystyle|limits|quad|qquad)(?![A-Za-z])"
)
_SPACE = re.compile(r"(\\[A-Za-z]+ (?=[A-Za-z])|[0-9] (?=[0-9]))| ")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\{([^{}\\]*)\}")
_UPRIGHT = re.compile(
    r"\\(?:text|textrm|textit|mathrm|mathit|mathsf|mbox|operatorname)"
    r"(?:\{ ?(?:([abcefi-kn-ru-zBDEGIO-RUX-Z])|(d)(?= ?\} ?[a-z])) ?\}| ([ie])(?![A-Za-z]))"
    r"|\{\\rm ([ie]) ?\}"
    r"|(?:(?<=[-+^])|(?<=\^\{)) ?\\(?:text|textrm|mathrm|mbox|operatorname)\{ ?([A-Za-z]) ?\}"
)
r"""A letter that is no unit, as `\mathrm{i}`, the d of `dx`, and any letter behind a sign, as the C of `+C`."""
_UNIT_VECTOR = re.compile(
    r"\\(?:mathbf|textbf|boldsymbol|bm|vec|hat|overrightarrow)"
    r"(?:\{ ?(?:([ijk])|\\([ij])math) ?\}| ([ijk])(?![A-Za-z])| ?\\([ij])math(?![A-Za-z]))"
    r"|\\([ij])math(?![A-Za-z])"
)
r"""A unit vector in bold or with an arrow or a hat, which is the plain letter."""
_COLON_TEXT = re.compile(r"\\(?:text|textrm|mathrm|mbox)\{ ?: ?\}|\{:\}|\\colon(?![A-Za-z]) ?(?=[0-9])")
_SPELLINGS = {
    "leq": "le", "geq": "ge", "neq": "ne", "leqslant": "le", "geqslant": "ge", "lbrace": "{", "rbrace": "}",
    "varnothing": "emptyset", "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom",
    "lvert": "vert", "rvert": "vert", "degree": "circ", "textdegree": "circ",
    "lg": "log", "bmod": "mod",
}  # fmt: skip
_SPELLED = re.compile(rf"\\({'|'.join(sorted(_SPELLINGS, key=len, reverse=True))})(?![A-Za-z])")
_ELLIPSIS = re.compile(r"\.\.\.$|\\[lc]?dots ?$")
_PRIME = re.compile(r"(?<=[A-Za-z)}'])'|\\prime(?![A-Za-z])")
_NATURAL = re.compile(r"\\log ?_ ?(?:e(?![A-Za-z])|\{ ?e ?\})")
_FULL_STOP = re.compile(r"(?<!\.)\.$")
_WORD = re.compile(r"[A-Za-z]{3,}")
_CHOICE = re.compile(r"\(([A-Z])\)")

_DECIMAL = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_NUMBER = re.compile(rf"([+-]?)(?:({_DECIMAL})(?:/({_DECIMAL}))?|\\frac\{{(-?{_DECIMAL})\}}\{{(-?{_DECIMAL})\}})")
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:(?:,|\{,\}| )[0-9]{3})+(?:\.[0-9]+)?")
_MIXED = re.compile(r"([+-]?)([0-9]+)\\frac\{([0-9]+)\}\{([0-9]+)\}")
_MIXED_FACTOR = re.compile(
    r"(?<![0-9.^_}\]!])(?<!\\sqrt)([0-9]{1,9})\\frac\{([0-9]{1,9})\}\{(0*[1-9][0-9]{0,8})\}(?!\^(?!\{?\\circ))"
)
_REPEATING = re.compile(r"([+-]?)([0-9]*)\.([0-9]*)\\overline\{([0-9]+)\}")
_SCIENTIFIC = re.compile(
    rf"([+-]?)(?:(?:({_DECIMAL})(?:\\times|\\cdot|\*))?10\^(?:\{{([+-]?[0-9]{{1,4}})\}}|([0-9])(?![0-9]))"
    rf"|({_DECIMAL})[eE]([+-]?[0-9]{{1,4}}))"
)

_TIMES = r"(?:\\cdot|\\times|\*)?"
_PRODUCT = re.compile(
    rf"([+-]?)({_DECIMAL}|\\frac\{{{_DECIMAL}\}}\{{{_DECIMAL}\}})?{_TIMES}"
    rf"(?:\\sqrt(?:\{{({_DECIMAL})\}}|([0-9])))?{_TIMES}(\\pi)?"
)

_AND = re.compile(r",?(?:\\text\{,?(?:and|or),?\}|(?<=[0-9)}])(?:and|or)(?=[-+0-9\\(]|[a-z][=<>\\]))|[,;]")
_OR = re.compile(r",?(?:\\text\{,?or,?\}|(?<=[0-9)}])or(?=[a-z][<>\\]))")
_INEQUALITY = re.compile(r"[^=]*(?:[<>]|\\(?:le|ge|ne)(?![A-Za-z]))[^=]*")
_EQUALS = re.compile("=")
_INDEX = r"(?:_(?:\{[A-Za-z0-9]+\}|[A-Za-z0-9]+))?"
_MEMBER = re.compile(rf"^[A-Za-z]{_INDEX}\\in(?=[(\[]|\\\{{)")
_ASSIGNED = re.compile(rf"(\\?[A-Za-z]+{_INDEX}(?:'*|\^\{{-1\}})(?:\([A-Za-z]\))?)(?:=|\\equiv ?)([^=<>]+)")
_RELATION = re.compile(
    r"[=<>|]|\\(?:le|ge|ne|in|notin|mid|vert|setminus|cap|subset|mathbb|equiv|sim|approx)(?![A-Za-z])"
)
_COMMA = re.compile("[,;]")
_COLON = re.compile(":")
_PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])")
_UNION = re.compile(r"\\cup ?")
_OPENING = re.compile(r"[(\[]|\\\{")
_CLOSING = re.compile(r"(?:[)\]]|\\\})$")
_ANGLES = re.compile(r"\\([lr])angle ?")
_CONDITION = re.compile(r"[|:]|\\(?:mid|vert|colon)(?![A-Za-z])")
_BUILDER = re.compile(
    rf"\\\{{[A-Za-z](?:\\in ?\\mathbb\{{R\}})?(?:{_CONDITION.pattern}) ?"
    r"((?=[^<>]*(?:[<>]|\\(?:le|ge|ne)(?![A-Za-z])))(?:(?!\\[{}])[^=|:,])+)\\\}"
)
"""The set of the real numbers that fulfil an inequality."""

_WHOLE = r"\\(?:mathbb|mathbf)\{[ZN]\}|\\(?:mathbb|mathbf) ?[ZN]| ?[ZN]"
_POSITIVE = r"\^(?:\{[*+]\}|[*+])|_(?:\{(?:\+|>0|\\ge ?1)\}|\+)"
_RANGE = rf"([A-Za-z])\\in(?:{_WHOLE})(?:{_POSITIVE})?"
_FOR = r",?\\text\{,?(?:for|where|with|for(?:all|any|every|each|some)),?\}"
_RANGED = re.compile(rf"(?:(?:{_FOR}|,){_RANGE}|,?\({_RANGE}\))$")
"""A condition that a letter is an integer or a natural number, behind what it is about."""
_POINT = re.compile(r"([A-Z](?:_(?:\{[0-9]\}|[0-9]))?'*)\(")
"""A point with its name."""
_CASES = re.compile(r"(?:([^=&\\]+)=)?\\begin\{cases\}(.*)\\end\{cases\}")
_ROW = re.compile(r"\\\\")
_COLUMN = re.compile("&")
_IF = re.compile(r"^(?:\\text\{,?(?:if|for|when),?\}|(?:if|for|when)(?![A-Za-z]{2}))")

_PERCENT = re.compile(r"(?:\\?%|\\text\{(?:\\?%|percent|percentage)\}|percent|percentage)$")
_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|arc|log|ln|exp)")
_DEGREES = re.compile(r"\^(?:\\circ ?|\{\\circ\})(?:\\text\{([CFK])\}|([CF]))?$|(?<=[0-9])\\circ$")
_DEGREE = re.compile(rf"({_DECIMAL})\^(?:\\circ ?|\{{\\circ\}})")
_MODULUS = re.compile(
    r"(?:\\pmod|\((?:\\mod|\\(?:text|mathrm|operatorname)\{mod\})(?=.*\)$))(?:\{([0-9]+)\}|([0-9]+))\)?$"
)
_BASE = re.compile(r"(?<=[0-9])_(?:\{([0-9]+|\\text\{[a-z]+\})\}|([0-9]))$")
_CLOCK = re.compile(
    r"([0-9]{1,2})(?::([0-9]{2}))?(?:(?:\\(?:text|textrm|mathrm|mbox|operatorname))?(?:\{([ap])\.?m\.?\}|([ap])\.?m\.?))?",
    re.IGNORECASE,
)
_CURRENCY = re.compile(r"^[€£¥₹]")
_LABEL = (
    r"\\(?:text|textrm|mathrm|mbox|operatorname)"
    r"\{((?:[^{}\\/0-9]+(?:\^?[0-9])?)?(?:/[^{}\\/0-9]+(?:\^?[0-9])?)*)\}"
    r"(?:\^(?:\{(-?[0-9])\}|([0-9])))?"
)
_LABELS = re.compile(rf"(?:{_LABEL})(?:(?:/|\\cdot|\\times)?(?:{_LABEL}))*$")
_ONE_LABEL = re.compile(_LABEL)
_UNITS = {
    "meter": "m metre meters metres", "centimeter": "cm centimetre centimeters centimetres",
    "millimeter": "mm millimetre millimeters millimetres", "kilometer": "km kilometre kilometers kilometres",
    "inch": "in inches", "foot": "ft feet", "yard": "yd yards", "mile": "mi miles", "gram": "g grams",
    "kilogram": "kg kilograms", "milligram": "mg milligrams", "pound": "lb lbs pounds", "ounce": "oz ounces",
    "second": "s sec secs seconds", "minute": "min mins minutes", "hour": "h hr hrs hours", "day": "days",
    "week": "weeks", "month": "months", "year": "yr yrs years", "liter": "l litre liters litres",
    "milliliter": "ml millilitre milliliters millilitres", "dollar": "dollars usd", "cent": "cents", "euro": "euros €",
    "poundsterling": "£", "yen": "¥", "rupee": "rupees ₹ rs", "degree": "degrees deg °", "radian": "rad radians",
    "unit": "units", "squareunit": "squareunits", "cubicunit": "cubicunits", "mph": "milesperhour",
    "kilometer/hour": "kmh kmph kilometersperhour",
}  # fmt: skip
_UNIT = {spelling: unit for unit, others in _UNITS.items() for spelling in [unit, *others.split()]}
# A single letter without \text may be a variable, and these mean something else.
_BARE_UNITS = sorted((u for u in _UNIT if len(u) > 1 and u not in ("in", "min", "deg", "rs")), key=len, reverse=True)
_BARE = re.compile(rf"(?<=[0-9}})])((?:square|cubic|sq)?(?:{'|'.join(_BARE_UNITS)}))(?:\^(?:\{{([23])\}}|([23])))?$")

_WORDS = re.compile(
    r"(?<=[0-9}%]) +(?!(?:and|or|mod|sin|cos|tan|cot|sec|csc|log|exp|sqrt|pi|max|gcd|lcm)\b)"
    rf"((?:[A-Za-z]{{3,}}|{'|'.join(_BARE_UNITS)})\b[A-Za-z .]*)$"
)
"""English behind a number."""

_GUARDED = re.compile(r"\\(?:sum|prod|int|iint|oint)(?![A-Za-z])")
_BINOMIAL = re.compile(r"\\[dt]?binom")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_LETTERS = re.compile("[A-Za-z]")
_VARIABLES = re.compile("(?<![A-Za-z])[A-Za-z]{1,2}(?![A-Za-z])")

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


@dataclass(frozen=True)
class _Shape:
    """A normalised answer, taken apart at its outermost commas or unions."""

    kind: Literal["one", "list", "set", "tuple", "union"]
    parts: tuple[str, ...]
    brackets: str = ""
    """Of a tuple: the two, `()` or `[)` for instance."""


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
        gold = _gold(row["answer"])
        return rf"\boxed{{{row['answer'] if gold is None else gold}}}"

    def _judge(self, completion: str, row: Mapping[str, Any], symbolic: Symbolic) -> Verdict | None:
        gold = _gold(row["answer"])
        if gold is None:
            return Verdict(None, "unparseable_gold", detail=f"the gold answer {row['answer']!r:.200}")
        answers = _extract(completion)
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
            readable = _fits_a_box(text) and refuse(gold_text) is None
            correct = self._same(gold_text, text, symbolic) if readable else False
        return None if correct is None else Verdict(float(correct), "ok" if correct else "wrong", canonical)

    def _same(self, gold: str, answer: str, symbolic: Symbolic) -> bool | None:
        """Whether two normalised answers are equal; None where `symbolic` decides and does not say."""
        if _same_text(gold, answer):
            return True
        gold, answer = (match[1] if (match := _BUILDER.fullmatch(text)) else text for text in (gold, answer))
        without_ranges = _without_ranges(gold, answer)
        if without_ranges is None:
            return False
        gold, answer = without_ranges
        branches, others = _branches(gold), _branches(answer)
        if branches and others:
            names = {name for name in (branches[0], others[0]) if name}
            same_branch = partial(self._same_branch, symbolic=symbolic)
            return (
                len(names) < 2 and len(branches[1]) == len(others[1]) and _matched(branches[1], others[1], same_branch)
            )
        gold, answer = _without_names(gold, answer)
        points = _without_point_names(gold, answer)
        if points is None:
            return False
        gold, answer = points
        whole, other = _shape(gold), _shape(answer)
        kinds = {whole.kind, other.kind}
        if kinds == {"one"}:
            parts = () if _RELATION.search(gold) else _split(answer, _EQUALS)
            values = [part for part in parts if not _LETTERS.search(_COMMAND.sub("", _value(part)))]
            if len(parts) > 1 and values:  # to math-verify, 6=5 is 5
                each = [self._same_element(gold, value, symbolic) for value in values]
                return False if False in each else None if None in each else True
            return self._same_element(gold, answer, symbolic)
        if "one" in kinds:
            one, many = (whole, other) if whole.kind == "one" else (other, whole)
            if many.kind == "set" and len(many.parts) == 1:
                return self._same(whole.parts[0], other.parts[0], symbolic)
            # A relation may describe an interval, and a symbol a set.
            return symbolic(gold, answer) if _RELATION.search(one.parts[0]) else False
        if not _comparable(whole, other):
            return False
        golds, answers = whole.parts, other.parts
        if "set" in kinds:
            golds, answers = _distinct(golds), _distinct(answers)
        if len(golds) != len(answers):
            return False
        in_order = {"strict": ("tuple", "list"), "kind": ("tuple",), "ignored": ()}[self.options.order]
        kind = "tuple" if "tuple" in kinds else whole.kind
        if "set" in kinds or kind not in in_order:
            return _matched(golds, answers, lambda one, other: self._same(one, other, symbolic))
        found: bool | None = True
        for pair in zip(golds, answers, strict=True):
            same = self._same(*pair, symbolic)
            if same is False:
                return False
            found = found and same
        return found

    def _same_branch(self, gold: str, answer: str, symbolic: Symbolic) -> bool | None:
        """Whether two branches of a function by cases have the same value under the same condition."""
        found: bool | None = True
        for pair in zip(_split(gold, _COLUMN), _split(answer, _COLUMN), strict=True):
            same = self._same(*pair, symbolic)
            if same is False:
                return False
            found = found and same
        return found

    def _same_element(self, gold: str, answer: str, symbolic: Symbolic) -> bool | None:
        times = _CLOCK.fullmatch(gold), _CLOCK.fullmatch(answer)
        if any(time and time[2] and (time[3] or time[4]) for time in times):
            return self._same_time(*times)
        gold, gold_percent = _without_percent(gold)
        answer, percent = _without_percent(answer)
        gold, gold_unit = _without_unit(gold)
        answer, unit = _without_unit(answer)
        policy = self.options.units
        if gold_unit != unit and (policy == "required" or (policy == "optional" and gold_unit and unit)):
            return False
        if gold_percent == percent:
            return self._same_value(gold, answer, symbolic)
        found = self._same_value(gold, answer, symbolic, gold_percent=gold_percent, percent=percent)
        if found or self.options.percent == "value":
            return found
        either = self._same_value(gold, answer, symbolic)
        return either if either or found is False else None

    def _same_time(self, gold: re.Match[str] | None, answer: re.Match[str] | None) -> bool:
        """Whether two clock times are the same; `a.m.` and `p.m.` are units."""
        if gold is None or answer is None:
            return False
        (hour, minute, half), (other_hour, other_minute, other_half) = (
            (int(time[1]), int(time[2] or 0), (time[3] or time[4] or "").casefold()) for time in (gold, answer)
        )
        policy = self.options.units
        if half != other_half and (policy == "required" or (policy == "optional" and half and other_half)):
            return False
        return (hour, minute) == (other_hour, other_minute)

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
        ours, theirs = _symbols(gold), _symbols(answer)
        if any(symbol.swapcase() in ours - theirs for symbol in theirs - ours):
            return False  # to math-verify, 2a is 2A
        gold_value, value = number(gold), number(answer)
        if gold_value is None or value is None:
            surds = _surd(gold), _surd(answer)
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
        if verify_now(gold_parsed, answer_parsed):
            return True
        first = gold_parsed[0], answer_parsed[0]
        if any(map(_named_i, first)):
            found = list(map(_imaginary, first))
            if None not in found and verify_now(*found):
                return True
        if self.options.rounding is None:
            return False
        gold_value, value = map(_evaluate, first)
        return gold_value is not None and value is not None and self._close(gold_value, value)


def _symbols(text: str) -> set[str]:
    r"""The letters that stand alone or in pairs, of which words have more; of a command its beginning, as `\s`."""
    text = _TEXT.sub(" ", text)
    commands = {command[:2] for command in _COMMAND.findall(text)}
    return commands | set("".join(_VARIABLES.findall(_COMMAND.sub(" ", text))))


def _undecided(gold: str, answer: str) -> None:
    """Leave it to a worker."""


def _gold(answer: Any) -> str | None:
    """The gold answer as text; `None` when no box could hold it."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return None
    text = str(answer).strip()
    boxes = _boxes(text)
    text = boxes[-1].strip() if boxes else text
    return text if normalise(text) and _fits_a_box(text) else None


def _fits_a_box(text: str) -> bool:
    return _boxes(rf"\boxed{{{text}}}") == [text]


def _extract(completion: str) -> list[str]:
    """The contents of all boxes, in order; none where there is no answer."""
    text = after_thinking(completion)
    if text is None:
        return []
    answers = _boxes(text)
    if not answers:
        bare = text.strip()
        return [bare] if len(bare) <= MAX_LENGTH and number(normalise(bare)) is not None else []
    return [_innermost(answer).strip() for answer in answers]


def _innermost(answer: str) -> str:
    while len(answer) <= MAX_LENGTH and (inner := _boxes(answer)):
        answer = inner[-1]
    return answer


def _boxes(text: str) -> list[str]:
    r"""The contents of every balanced `\boxed{}` that is in no other, in order. Linear in the text."""
    open_braces: list[int | None] = []  # where the contents of a box start; None for a plain brace
    found: list[tuple[int, int]] = []
    for match in _BRACE.finditer(text):
        token = match[0]
        if token == "{":
            open_braces.append(None)
        elif token == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None:
                while found and found[-1][0] > start:
                    found.pop()
                found.append((start, match.start()))
        elif token.startswith(r"\boxed"):
            open_braces.append(match.end())
    return [text[start:end] for start, end in found]


def normalise(text: str) -> str:
    """One spelling for what means the same: NFKC, LaTeX layout and white space without meaning removed."""
    text = _SCRIPT.sub(_unscript, text).translate(_SYMBOLS)
    text = unicodedata.normalize("NFKC", text)
    text = _FULL_STOP.sub("", " ".join(_LAYOUT.sub("", text).split()))
    whole_text = _TEXT.fullmatch(text)
    if whole_text:
        text = _FULL_STOP.sub("", whole_text[1].strip())
    text = _WORDS.sub(r"\\text{\1}", text)
    text = _SPELLED.sub(lambda match: "\\" + _SPELLINGS[match[1]], text)
    text = _NATURAL.sub(r"\\ln ", text)
    text = _COLON_TEXT.sub(":", _UNIT_VECTOR.sub(_letter, _UNIT_VECTOR.sub(_letter, text)))
    text = re.sub(r"(?<=[0-9])( e )(?=[-+ ]*[0-9])", r" \\cdot\1", _UPRIGHT.sub(_letter, text))  # 2e-5 is a number
    text = _SPACE.sub(lambda match: match[1] or "", text)
    if text.casefold() in ("allrealnumbers", "allreals"):
        return r"\mathbb{R}"
    # The braces that LaTeX lets one leave out.
    text = re.sub(r"\\(frac|binom) ?([0-9]|(?<= )[A-Za-z]|\\(?:pi|alpha|beta|theta)(?![A-Za-z])) ?", r"\\\1{\2}", text)
    text = re.sub(r"(\\(?:frac|binom)\{[^{}]*\}|\\sqrt\[[0-9A-Za-z]\])([0-9A-Za-z])", r"\1{\2}", text)
    return text if _MIXED.fullmatch(text) else _MIXED_FACTOR.sub(_unmixed, text)


def _letter(match: re.Match[str]) -> str:
    # The spaces keep it apart from a command before it.
    return f" {next(filter(None, match.groups()))} "


def _unmixed(match: re.Match[str]) -> str:
    whole, top, bottom = map(int, match.groups())
    return rf"\frac{{{whole * bottom + top}}}{{{bottom}}}"


def _unscript(match: re.Match[str]) -> str:
    # NFKC alone would turn 2² into 22 and 1½ into 11/2.
    superscript, subscript, vulgar = match.groups()
    if vulgar:
        top, _, bottom = unicodedata.normalize("NFKC", vulgar).partition("⁄")
        return rf"\frac{{{top}}}{{{bottom}}}"
    sign = "^" if superscript else "_"
    return f"{sign}{{{unicodedata.normalize('NFKC', superscript or subscript)}}}"


def _same_text(one: str, other: str) -> bool:
    """Whether two normalised texts are the same, but for the case of a word and the parentheses of a choice."""
    if one == other:
        return True
    if _WORD.fullmatch(one) and _WORD.fullmatch(other):
        return one.casefold() == other.casefold()
    return bool(_CHOICE.fullmatch(one) or _CHOICE.fullmatch(other)) and one.strip("()") == other.strip("()")


def number(text: str) -> Fraction | None:
    """The exact value of a normalised number: integer, decimal, fraction of the two, mixed, repeating, a·10^n, 1e5.

    `None` for anything else.
    """
    if len(text) > MAX_LENGTH or not text or text[0] not in "+-.0123456789\\":
        return None
    if _THOUSANDS.fullmatch(text):
        text = re.sub("[{}, ]", "", text)
    if match := _NUMBER.fullmatch(text):
        sign, whole, divisor, top, bottom = match.groups()
        denominator = Fraction(divisor or bottom or 1)
        if not denominator:
            return None
        value = Fraction(whole or top) / denominator
    elif match := _MIXED.fullmatch(text):
        sign, whole, top, bottom = match.groups()
        if not int(bottom):
            return None
        value = int(whole) + Fraction(int(top), int(bottom))
    elif match := _REPEATING.fullmatch(text):
        sign, whole, digits, repeated = match.groups()
        nines = 10 ** len(repeated) - 1
        value = Fraction(int((whole + digits) or "0") * nines + int(repeated), nines * 10 ** len(digits))
    elif match := _SCIENTIFIC.fullmatch(text):
        sign, factor, braced, plain, mantissa, power = match.groups()
        exponent = int(braced or plain or power)
        if abs(exponent) > MAX_SCALE:
            return None
        value = Fraction(factor or mantissa or 1) * Fraction(10) ** exponent
    else:
        return None
    return -value if sign == "-" else value


def _surd(text: str) -> tuple[Fraction, int] | None:
    r"""A normalised q·√r·π^k, with q and r rational, as its square, with its sign, and k: equal exactly where it is.

    `None` for anything else.
    """
    value = number(text)
    if value is not None:
        return value * abs(value), 0
    if match := _PRODUCT.fullmatch(text):
        sign, factor, braced, plain, pi = match.groups()
        if not (braced or plain or pi):
            return None
        value = number(factor or "1")
        if value is None:
            return None
        square = value * abs(value) * Fraction(braced or plain or 1)
        return (-square if sign == "-" else square), int(bool(pi and square))
    sign, text = (text[0], text[1:]) if text[:1] in ("-", "+") else ("", text)
    if text.startswith(r"\frac{"):
        top, end = _group(text, len(r"\frac"))
        bottom, end = _group(text, end)
        whole = end == len(text)
    else:
        top, _, bottom = text.rpartition("/")
        whole = bool(top) and re.fullmatch(_DECIMAL, bottom) is not None  # 1/2π may mean either
    if not whole:
        return None
    above, below = (_surd(part.removeprefix("{").removesuffix("}")) for part in (top, bottom))
    if above is None or below is None or not below[0]:
        return None
    square = above[0] / below[0]
    return (-square if sign == "-" else square), above[1] - below[1] if square else 0


def _without_names(gold: str, answer: str) -> tuple[str, str]:
    """Both without `x =`, where both have the same, or the other is no relation."""
    gold_name, name = _ASSIGNED.fullmatch(gold), _ASSIGNED.fullmatch(answer)
    if gold_name and name:
        return (gold_name[2], name[2]) if gold_name[1] == name[1] else (gold, answer)
    if gold_name and not _RELATION.search(answer):
        return gold_name[2], answer
    if name and not _RELATION.search(gold):
        return gold, name[2]
    return gold, answer


def _range(text: str) -> tuple[str, str, str] | None:
    r"""What stands before a condition like `k\in\mathbb{Z}`, its letter, and its set; `None` where there is none."""
    match = _RANGED.search(text)
    if match is None or not match.start():
        return None
    positive = re.search(rf"(?:{_POSITIVE})\)?$", match[0])
    return text[: match.start()], match[1] or match[2], "N*" if positive else "Z" if "Z" in match[0] else "N"


def _without_ranges(gold: str, answer: str) -> tuple[str, str] | None:
    r"""Both without a condition like `k\in\mathbb{Z}`; `None` where they have different ones."""
    ranges = gold_range, range_ = _range(gold), _range(answer)
    if gold_range and range_:
        return (gold_range[0], range_[0]) if gold_range[1:] == range_[1:] else None
    gold, answer = (
        found[0] if found and not _narrows(*found[:2]) else text
        for text, found in zip((gold, answer), ranges, strict=True)
    )
    return gold, answer


def _narrows(body: str, letter: str) -> bool:
    """Whether a condition on the letter says more of `body`: of an inequality, or an equation that is no `name =`."""
    related = any(_RELATION.search(part) and not _ASSIGNED.fullmatch(part) for part in _split(body, _AND))
    return related or letter not in _COMMAND.sub(" ", body)


def _branches(text: str) -> tuple[str, tuple[str, ...]] | None:
    r"""The name and the branches, as `value&condition`, of a function by `cases`; `None` where it is no such thing."""
    match = _CASES.fullmatch(text)
    if match is None:
        return None
    branches = []
    for row in _split(match[2].removesuffix(r"\\"), _ROW):
        columns = _split(row.rstrip(",;."), _COLUMN)
        if len(columns) != 2:
            return None
        branches.append(f"{columns[0].rstrip(',;')}&{_IF.sub('', columns[1])}")
    return match[1] or "", tuple(branches)


def _point(text: str) -> tuple[str, str] | None:
    """The name and the coordinates of `P(3,-4)`; a pair or triple without any digit, as `F(x,y)`, is no point."""
    match = _POINT.match(text)
    if match is None:
        return None
    coordinates = text[match.end() - 1 :]
    shape = _shape(coordinates)
    point = shape.brackets == "()" and len(shape.parts) in (2, 3) and r"\infty" not in coordinates
    return (match[1], coordinates) if point and _digits(coordinates) else None


def _without_point_names(gold: str, answer: str) -> tuple[str, str] | None:
    """Both without the name of a point, where the other has none but coordinates; `None` where the names differ."""
    gold_point, point = _point(gold), _point(answer)
    if gold_point and point:
        return (gold_point[1], point[1]) if gold_point[0] == point[0] else None
    if gold_point and _shape(answer).kind in ("tuple", "list"):
        # C(5,2) and P(5,2) may count combinations and permutations.
        counts = re.fullmatch(r"[CP]\(([0-9]{1,9}),([0-9]{1,9})\)", gold)
        return (gold if counts and int(counts[1]) >= int(counts[2]) else gold_point[1]), answer
    if point and _shape(gold).kind in ("tuple", "list"):
        return gold, point[1]
    return gold, answer


def _shape(text: str) -> _Shape:
    text = _MEMBER.sub("", _ANGLES.sub(lambda match: "()"[match[1] == "r"], text), count=1)
    if r"\begin" in text or number(_value(text)) is not None:
        return _Shape("one", (text,))
    united = _split(text, _UNION)
    if len(united) > 1:
        return _Shape("union", united)
    if text == r"\emptyset":
        return _Shape("set", ())
    opening = _OPENING.match(text)
    closing = _CLOSING.search(text)
    if opening and closing and _closes_last(text):
        inside = text[opening.end() : closing.start()]
        parts = _split(inside, _COMMA)
        if opening[0] == r"\{" and not _CONDITION.search(inside):
            return _Shape("set", _both_signs(parts) if inside else ())
        if len(parts) > 1:
            return _Shape("tuple", parts, opening[0] + closing[0])
    alternatives = _split(text, _OR)
    if len(alternatives) > 1 and all(map(_INEQUALITY.fullmatch, alternatives)):
        return _Shape("union", alternatives)
    parts = _both_signs(_split(text, _AND))
    if len(parts) == 1 and len(ratio := _split(text, _COLON)) > 2:  # to math-verify, 2:3:5 is 2/3/5, as is 2:5:3
        return _Shape("tuple", ratio, "::")
    return _Shape("list", parts) if len(parts) > 1 else _Shape("one", (text,))


def _both_signs(parts: Sequence[str]) -> tuple[str, ...]:
    r"""The parts, those with one `\pm` with `+` and with `-`."""
    found: list[str] = []
    for part in parts:
        signs = "+-" if len(_PLUS_MINUS.findall(part)) == 1 else ""
        found += [_PLUS_MINUS.sub(sign, part).removeprefix("+") for sign in signs] or [part]
    return tuple(found)


def _split(text: str, separator: re.Pattern[str]) -> tuple[str, ...]:
    """The parts between separators that are in no brackets; all of it where one part is empty."""
    parts: list[str] = []
    depth = start = position = 0
    while position < len(text):
        match = separator.match(text, position) if not depth else None
        if match:
            parts.append(text[start : match.start()])
            start = position = match.end()
            continue
        depth += (text[position] in "([{") - (text[position] in ")]}")
        position += 1
    parts.append(text[start:])
    return tuple(parts) if all(parts) and not depth else (text,)


def _closes_last(text: str) -> bool:
    """Whether the first bracket is closed by the last one."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if not depth and character in ")]}":
            return position == len(text) - 1
    return False


def _comparable(gold: _Shape, answer: _Shape) -> bool:
    """Whether two things of several parts are of kinds that can be equal."""
    if gold.kind == answer.kind:
        return gold.kind != "tuple" or len(gold.parts) > 2 or gold.brackets == answer.brackets
    if {gold.kind, answer.kind} == {"list", "set"}:
        return True
    if {gold.kind, answer.kind} == {"list", "union"}:
        return all(map(_INEQUALITY.fullmatch, gold.parts + answer.parts))
    if gold.kind == "list" and answer.kind == "tuple" and answer.brackets == "()":  # x=3,y=-2 is a point
        names = [match[1] for match in map(_ASSIGNED.fullmatch, gold.parts) if match]
        return len(set(names)) == len(gold.parts)
    return gold.kind == "tuple" and answer.kind == "list" and gold.brackets == "()"


def _distinct(parts: Sequence[str]) -> tuple[str, ...]:
    values = {number(part) or part: part for part in parts}
    return tuple(values.values())


def _matched(golds: Sequence[str], answers: Sequence[str], same: Symbolic) -> bool | None:
    """Whether the parts can be paired so that all pairs are equal."""
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


def _without_percent(text: str) -> tuple[str, bool]:
    match = _PERCENT.search(text)
    return (text[: match.start()], True) if match and match.start() else (text, False)


def _without_unit(text: str) -> tuple[str, str]:
    """The value, and the unit in one spelling; empty where there is none."""
    currency = _CURRENCY.match(text)
    if currency and len(text) > 1:
        return text[1:], _unit(currency[0], "")
    base = _BASE.search(text)
    if base:
        return text[: base.start()], f"base {base[1] or base[2]}"
    modulus = _MODULUS.search(text)
    if modulus and modulus.start():
        return text[: modulus.start()], f"mod {modulus[1] or modulus[2]}"
    degrees = _DEGREES.search(text)
    if degrees and degrees.start() and not _FUNCTION.search(text):
        return text[: degrees.start()], f"degree{degrees[1] or degrees[2] or ''}"
    labels = _LABELS.search(text)
    if labels and labels.start():
        units = [_unit(label, braced or power) for label, braced, power in _ONE_LABEL.findall(labels[0])]
        return text[: labels.start()], "/".join(units)
    bare = _BARE.search(text)
    if bare:
        return text[: bare.start()], _unit(bare[1], bare[2] or bare[3] or "")
    return text, ""


def _value(text: str) -> str:
    """Without percent sign and unit."""
    return _without_unit(_without_percent(text)[0])[0]


def _unit(label: str, power: str) -> str:
    """`squarecm`, `cm` with power 2, `m/s^2`: centimeter^2, centimeter^2, meter/second^2.

    A power is that of the last word, unless that has one of its own.
    """
    units = []
    for written in re.split(r"/|(?<=[a-z])per(?=[a-z])", label.casefold()):
        raised = re.search("[0-9]$", written)
        own = raised[0] if raised else ""
        word = re.sub(r"[^A-Za-z€£¥₹°]", "", written)
        for prefix, rank in (("square", "2"), ("sq", "2"), ("cubic", "3"), ("cu", "3")):
            rest = word.removeprefix(prefix)
            if rest != word and rest in _UNIT and rest not in ("unit", "units"):
                word, own = rest, rank
        units.append(_UNIT.get(word, word.removesuffix("s")) + (f"^{own}" if own else ""))
    return "/".join(units) + (f"^{power}" if power and not own else "")


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


@lru_cache(maxsize=1024)
def _parse(answer: str) -> list[Any]:
    """What math-verify reads in `answer`, as sympy objects; empty when it reads nothing."""
    if not _fits_a_box(answer):  # a part of an answer, cut at a brace: math-verify would read what stands before
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
    if _FUNCTION.search(answer):  # degrees are no unit there
        answer = _DEGREE.sub(r"(\\frac{\1\\pi}{180})", answer)
    parsed: list[Any] = parse(
        rf"\boxed{{{answer}}}",
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


def _evaluate(expression: Any) -> Fraction | None:
    """The value of a sympy object to 30 digits; None where it is no real number."""
    try:
        return Fraction(str(expression.evalf(30)))
    except MemoryError:
        raise
    except Exception:  # as above
        return None
