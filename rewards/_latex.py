r"""How a written mathematical answer is read: all that is a function of one text.

- Where it stands: the boxes of a completion (`answers_of`, `boxes`) and of a row (`gold_of`).
- One spelling for what means the same: `normalise`. Everything below reads normalised text.
- Values: rational numbers (`number`), with one square root and π (`surd`), clock times (`clock`).
- What stands beside a value: a percent sign, a unit, a base, a modulus (`without_percent`, `without_unit`).
- Letters and relations: names (`assigned`, `named_point`, `symbols`), equations (`plain_sides`), inequalities
  (`is_inequality`, `without_builder`), conditions (`integer_range`), functions by `cases` (`cases`).
- Kinds: lists, sets, tuples and unions and their parts (`shape`); brackets and arguments (`group`, `opens`).

Whether two answers are equal, and what is too dangerous to compute, is said in `math`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NamedTuple

from posttrain.rewards import after_thinking

MAX_LENGTH = 300
"""Characters of an answer."""
MAX_SCALE = 400
r"""The exponent in `a \times 10^n` up to which it is computed exactly."""
_COMMAND = re.compile(r"\\[A-Za-z]+")
_DECIMAL = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_UPRIGHT = r"\\(?:text|textrm|mathrm|mbox|operatorname)"
_CIRCLE = r"\^(?:\\circ ?|\{\\circ\})"
_COMPARES = r"(?:[<>]|\\(?:le|ge|ne)(?![A-Za-z]))"
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


_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def gold_of(answer: Any) -> str | None:
    """The gold answer as text; `None` when no box could hold it."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return None
    text = str(answer).strip()
    found = boxes(text)
    text = found[-1].strip() if found else text
    return text if normalise(text) and fits_a_box(text) else None


def answers_of(completion: str) -> list[str]:
    """The contents of all boxes, in order; none where there is no answer."""
    text = after_thinking(completion)
    if text is None:
        return []
    answers = boxes(text)
    if not answers:
        bare = text.strip()
        return [bare] if len(bare) <= MAX_LENGTH and number(normalise(bare)) is not None else []
    return [_innermost(answer).strip() for answer in answers]


def fits_a_box(text: str) -> bool:
    """Whether its braces are balanced, so that a box around it holds all of it and nothing else."""
    return boxes(rf"\boxed{{{text}}}") == [text]


def _innermost(answer: str) -> str:
    while len(answer) <= MAX_LENGTH and (inner := boxes(answer)):
        answer = inner[-1]
    return answer


def boxes(text: str) -> list[str]:
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
_UPRIGHT_LETTER = re.compile(
    r"\\(?:text|textrm|textit|mathrm|mathit|mathsf|mbox|operatorname)"
    r"(?:\{ ?(?:([abcefi-kn-ru-zBDEGIO-RUX-Z])|(d)(?= ?\} ?[a-z])) ?\}| ([ie])(?![A-Za-z]))"
    r"|\{\\rm ([ie]) ?\}"
    rf"|(?:(?<=[-+^])|(?<=\^\{{)) ?{_UPRIGHT}\{{ ?([A-Za-z]) ?\}}"
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
_NATURAL = re.compile(r"\\log ?_ ?(?:e(?![A-Za-z])|\{ ?e ?\})")
_FULL_STOP = re.compile(r"(?<!\.)\.$")
_WORDS = re.compile(
    r"(?<=[0-9}%]) +(?!(?:and|or|mod|sin|cos|tan|cot|sec|csc|log|exp|sqrt|pi|max|gcd|lcm)\b)"
    rf"((?:[A-Za-z]{{3,}}|{'|'.join(_BARE_UNITS)})\b[A-Za-z .]*)$"
)
"""English behind a number."""
_MIXED_FACTOR = re.compile(
    r"(?<![0-9.^_}\]!])(?<!\\sqrt)([0-9]{1,9})\\frac\{([0-9]{1,9})\}\{(0*[1-9][0-9]{0,8})\}(?!\^(?!\{?\\circ))"
)


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
    text = _UPRIGHT_LETTER.sub(_letter, text)
    text = re.sub(r"(?<=[0-9])( e )(?=[-+ ]*[0-9])", r" \\cdot\1", text)  # 2e-5 is a number
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


_NUMBER = re.compile(rf"([+-]?)(?:({_DECIMAL})(?:/({_DECIMAL}))?|\\frac\{{(-?{_DECIMAL})\}}\{{(-?{_DECIMAL})\}})")
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:(?:,|\{,\}| )[0-9]{3})+(?:\.[0-9]+)?")
_MIXED = re.compile(r"([+-]?)([0-9]+)\\frac\{([0-9]+)\}\{([0-9]+)\}")
_REPEATING = re.compile(r"([+-]?)([0-9]*)\.([0-9]*)\\overline\{([0-9]+)\}")
_TIMES = r"(?:\\cdot|\\times|\*)"
_SCIENTIFIC = re.compile(
    rf"([+-]?)(?:(?:({_DECIMAL}){_TIMES})?10\^(?:\{{([+-]?[0-9]{{1,4}})\}}|([0-9])(?![0-9]))"
    rf"|({_DECIMAL})[eE]([+-]?[0-9]{{1,4}}))"
)
_PRODUCT = re.compile(
    rf"([+-]?)({_DECIMAL}|\\frac\{{{_DECIMAL}\}}\{{{_DECIMAL}\}})?{_TIMES}?"
    rf"(?:\\sqrt(?:\{{({_DECIMAL})\}}|([0-9])))?{_TIMES}?(\\pi)?"
)


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


def surd(text: str) -> tuple[Fraction, int] | None:
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
        top, end = group(text, len(r"\frac"))
        bottom, end = group(text, end)
        whole = end == len(text)
    else:
        top, _, bottom = text.rpartition("/")
        whole = bool(top) and re.fullmatch(_DECIMAL, bottom) is not None  # 1/2π may mean either
    if not whole:
        return None
    above, below = (surd(part.removeprefix("{").removesuffix("}")) for part in (top, bottom))
    if above is None or below is None or not below[0]:
        return None
    square = above[0] / below[0]
    return (-square if sign == "-" else square), above[1] - below[1] if square else 0


_PERCENT = re.compile(r"(?:\\?%|\\text\{(?:\\?%|percent(?:age)?)\}|percent(?:age)?)$")
_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|arc|log|ln|exp)")
_DEGREES = re.compile(rf"{_CIRCLE}(?:\\text\{{([CFK])\}}|([CF]))?$|(?<=[0-9])\\circ$")
_DEGREE = re.compile(rf"({_DECIMAL}){_CIRCLE}")
_MODULUS = re.compile(
    r"(?:\\pmod|\((?:\\mod|\\(?:text|mathrm|operatorname)\{mod\})(?=.*\)$))(?:\{([0-9]+)\}|([0-9]+))\)?$"
)
_BASE = re.compile(r"(?<=[0-9])_(?:\{([0-9]+|\\text\{[a-z]+\})\}|([0-9]))$")
_CURRENCY = re.compile(r"^[€£¥₹]")
_LABEL = (
    rf"{_UPRIGHT}\{{((?:[^{{}}\\/0-9]+(?:\^?[0-9])?)?(?:/[^{{}}\\/0-9]+(?:\^?[0-9])?)*)\}}"
    r"(?:\^(?:\{(-?[0-9])\}|([0-9])))?"
)
_LABELS = re.compile(rf"(?:{_LABEL})(?:(?:/|\\cdot|\\times)?(?:{_LABEL}))*$")
_ONE_LABEL = re.compile(_LABEL)
_BARE = re.compile(rf"(?<=[0-9}})])((?:square|cubic|sq)?(?:{'|'.join(_BARE_UNITS)}))(?:\^(?:\{{([23])\}}|([23])))?$")


def in_radians(text: str) -> str:
    r"""Degrees in radians where they are no unit but what a function is taken of, as in `\sin30^\circ`."""
    return _DEGREE.sub(r"(\\frac{\1\\pi}{180})", text) if _FUNCTION.search(text) else text


def without_percent(text: str) -> tuple[str, bool]:
    """The value, and whether a percent sign, or the word, stood behind it."""
    match = _PERCENT.search(text)
    return (text[: match.start()], True) if match and match.start() else (text, False)


def without_unit(text: str) -> tuple[str, str]:
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


def _value(text: str) -> str:
    """Without percent sign and unit."""
    return without_unit(without_percent(text)[0])[0]


_CLOCK = re.compile(
    rf"([0-9]{{1,2}})(?::([0-9]{{2}}))?(?:(?:{_UPRIGHT})?(?:\{{([ap])\.?m\.?\}}|([ap])\.?m\.?))?", re.IGNORECASE
)


class Time(NamedTuple):
    """A clock time as it is written."""

    hour: int
    minute: int | None
    """None where there is only an hour."""
    half: str
    """`a` or `p`; empty where it is not said."""


def clock(text: str) -> Time | None:
    """The clock time that a text is; a number of one or two digits is one, too."""
    match = _CLOCK.fullmatch(text)
    if match is None:
        return None
    hour, minute, braced, plain = match.groups()
    return Time(int(hour), int(minute) if minute else None, (braced or plain or "").casefold())


_LETTERS = re.compile("[A-Za-z]")
_VARIABLES = re.compile("(?<![A-Za-z])[A-Za-z]{1,2}(?![A-Za-z])")


def symbols(text: str) -> set[str]:
    r"""The letters that stand alone or in pairs, of which words have more; of a command its beginning, as `\s`."""
    text = _TEXT.sub(" ", text)
    commands = {command[:2] for command in _COMMAND.findall(text)}
    return commands | set("".join(_VARIABLES.findall(_COMMAND.sub(" ", text))))


_INDEX = r"(?:_(?:\{[A-Za-z0-9]+\}|[A-Za-z0-9]+))?"
_ASSIGNED = re.compile(rf"(\\?[A-Za-z]+{_INDEX}(?:'*|\^\{{-1\}})(?:\([A-Za-z]\))?)(?:=|\\equiv ?)([^=<>]+)")
_RELATION = re.compile(
    r"[=<>|]|\\(?:le|ge|ne|in|notin|mid|vert|setminus|cap|subset|mathbb|equiv|sim|approx)(?![A-Za-z])"
)
_EQUALS = re.compile("=")
_INEQUALITY = re.compile(rf"[^=]*{_COMPARES}[^=]*")
_CONDITION = re.compile(r"[|:]|\\(?:mid|vert|colon)(?![A-Za-z])")
_BUILDER = re.compile(
    rf"\\\{{[A-Za-z](?:\\in ?\\mathbb\{{R\}})?(?:{_CONDITION.pattern}) ?"
    rf"((?=[^<>]*{_COMPARES})(?:(?!\\[{{}}])[^=|:,])+)\\\}}"
)
"""The set of the real numbers that fulfil an inequality."""


def assigned(text: str) -> tuple[str, str] | None:
    """The name and the value in `x = 5`; `None` for anything else."""
    match = _ASSIGNED.fullmatch(text)
    return (match[1], match[2]) if match else None


def is_relation(text: str) -> bool:
    """Whether something is said of something, or of a set, anywhere in a text: no value is."""
    return _RELATION.search(text) is not None


def is_inequality(text: str) -> bool:
    """Whether a text compares by anything but `=`."""
    return _INEQUALITY.fullmatch(text) is not None


def plain_sides(text: str) -> list[str]:
    r"""The sides without letters of equations like `6=2\cdot3`; none where a text is no equation."""
    sides = _split(text, _EQUALS)
    return [side for side in sides if not _LETTERS.search(_COMMAND.sub("", _value(side)))] if len(sides) > 1 else []


def without_builder(text: str) -> str:
    r"""The inequality in `\{x\mid x>2\}`; any other text as it is."""
    match = _BUILDER.fullmatch(text)
    return match[1] if match else text


_WHOLE = r"\\(?:mathbb|mathbf)\{[ZN]\}|\\(?:mathbb|mathbf) ?[ZN]| ?[ZN]"
_POSITIVE = r"\^(?:\{[*+]\}|[*+])|_(?:\{(?:\+|>0|\\ge ?1)\}|\+)"
_RANGE = rf"([A-Za-z])\\in(?:{_WHOLE})(?:{_POSITIVE})?"
_FOR = r",?\\text\{,?(?:for|where|with|for(?:all|any|every|each|some)),?\}"
_RANGED = re.compile(rf"(?:(?:{_FOR}|,){_RANGE}|,?\({_RANGE}\))$")
"""A condition that a letter is an integer or a natural number, behind what it is about."""


def integer_range(text: str) -> tuple[str, str, str] | None:
    r"""What stands before a condition like `k\in\mathbb{Z}`, its letter, and its set; `None` where there is none."""
    match = _RANGED.search(text)
    if match is None or not match.start():
        return None
    positive = re.search(rf"(?:{_POSITIVE})\)?$", match[0])
    return text[: match.start()], match[1] or match[2], "N*" if positive else "Z" if "Z" in match[0] else "N"


def narrows(body: str, letter: str) -> bool:
    """Whether a condition on the letter says more of `body`: of an inequality, or an equation that is no `name =`."""
    related = any(is_relation(part) and not assigned(part) for part in _split(body, _AND))
    return related or letter not in _COMMAND.sub(" ", body)


_CASES = re.compile(r"(?:([^=&\\]+)=)?\\begin\{cases\}(.*)\\end\{cases\}")
_ROW = re.compile(r"\\\\")
_COLUMN = re.compile(r"[,;]*&(?:\\text\{,?(?:if|for|when),?\}|(?:if|for|when)(?![A-Za-z]{2}))?")


def cases(text: str) -> tuple[str, tuple[tuple[str, ...], ...]] | None:
    """The name and the branches, value and condition, of a function by `cases`; `None` where it is no such thing."""
    match = _CASES.fullmatch(text)
    if match is None:
        return None
    branches = []
    for row in _split(match[2].removesuffix(r"\\"), _ROW):
        columns = _split(row.rstrip(",;."), _COLUMN)
        if len(columns) != 2:
            return None
        branches.append(columns)
    return match[1] or "", tuple(branches)


_POINT = re.compile(r"([A-Z](?:_(?:\{[0-9]\}|[0-9]))?'*)\(")
"""A point with its name."""


def named_point(text: str) -> tuple[str, str] | None:
    """The name and the coordinates of `P(3,-4)`; a pair or triple without any digit, as `F(x,y)`, is no point."""
    match = _POINT.match(text)
    if match is None:
        return None
    coordinates = text[match.end() - 1 :]
    found = shape(coordinates)
    is_point = found.brackets == "()" and len(found.parts) in (2, 3) and r"\infty" not in coordinates
    return (match[1], coordinates) if is_point and count_digits(coordinates) else None


_AND = re.compile(r",?(?:\\text\{,?(?:and|or),?\}|(?<=[0-9)}])(?:and|or)(?=[-+0-9\\(]|[a-z][=<>\\]))|[,;]")
_OR = re.compile(r",?(?:\\text\{,?or,?\}|(?<=[0-9)}])or(?=[a-z][<>\\]))")
_COMMA = re.compile("[,;]")
_COLON = re.compile(":")
_UNION = re.compile(r"\\cup ?")
_PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])")
_MEMBER = re.compile(rf"^[A-Za-z]{_INDEX}\\in(?=[(\[]|\\\{{)")
_OPENING = re.compile(r"[(\[]|\\\{")
_CLOSING = re.compile(r"(?:[)\]]|\\\})$")
_ANGLES = re.compile(r"\\([lr])angle ?")


@dataclass(frozen=True)
class Shape:
    """A normalised answer, taken apart at its outermost commas or unions."""

    kind: Literal["one", "list", "set", "tuple", "union"]
    parts: tuple[str, ...]
    brackets: str = ""
    """Of a tuple: the two, `()` or `[)` for instance."""


def shape(text: str) -> Shape:
    """What kind of thing an answer is, and its parts."""
    text = _MEMBER.sub("", _ANGLES.sub(lambda match: "()"[match[1] == "r"], text), count=1)
    if r"\begin" in text or number(_value(text)) is not None:
        return Shape("one", (text,))
    united = _split(text, _UNION)
    if len(united) > 1:
        return Shape("union", united)
    if text == r"\emptyset":
        return Shape("set", ())
    opening = _OPENING.match(text)
    closing = _CLOSING.search(text)
    if opening and closing and opens(text) == opening.end() - 1:
        inside = text[opening.end() : closing.start()]
        parts = _split(inside, _COMMA)
        if opening[0] == r"\{" and not _CONDITION.search(inside):
            return Shape("set", _both_signs(parts) if inside else ())
        if len(parts) > 1:
            return Shape("tuple", parts, opening[0] + closing[0])
    alternatives = _split(text, _OR)
    if len(alternatives) > 1 and all(map(is_inequality, alternatives)):
        return Shape("union", alternatives)
    parts = _both_signs(_split(text, _AND))
    if len(parts) == 1 and len(ratio := _split(text, _COLON)) > 2:  # to math-verify, 2:3:5 is 2/3/5, as is 2:5:3
        return Shape("tuple", ratio, "::")
    return Shape("list", parts) if len(parts) > 1 else Shape("one", (text,))


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


def group(text: str, start: int) -> tuple[str, int]:
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


def opens(text: str) -> int | None:
    """Where the bracket that closes at the end of `text` opens; `None` when it never does."""
    depth = 0
    for position in range(len(text) - 1, -1, -1):
        depth += (text[position] in ")]}") - (text[position] in "([{")
        if not depth:
            return position
    return None


def count_digits(text: str) -> int:
    """How many digits a text has, wherever they stand."""
    return sum(character in "0123456789" for character in text)
