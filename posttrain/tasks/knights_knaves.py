"""Knights and knaves: who tells the truth and who lies? Two to eight people, one statement each, one solution.

A knight says what is true and a knave what is false. A puzzle has exactly one solution, and more than one without any
of its statements: reading a part of it is never enough. Solutions are found by enumeration of all assignments.

A statement says what somebody is, joins two such by `and`, `or` or `if`, says of two people that they are of the same
kind or of different kinds, or says how many of all are knights (from three people on). The form `symbols` writes them
in one line, `A:B=C;B:!A;C:2`, answered by `KNN`: `A` is a knight, `!A` a knave; `&` and, `|` or, `>` if-then, `=` same,
`#` different, `2` exactly two knights. The form `words` is English, as in the literature.

One puzzle has many guises: other names for the same people, operands exchanged, an implication as a disjunction. Rows
are guises, each once, and all guises of a puzzle fall in the same split, so that evaluation holds no puzzle of training
in disguise. There are 44 guises of 15 puzzles with two people, and 17,653 of 940 with three.

Source: Xie et al., arXiv 2410.23123 (the puzzle); RLAD, arXiv 2602.22495 (two to eight people). Differs: no statement
is redundant, and the solution is drawn before the statements.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from posttrain.rewards.knights_knaves import in_words
from posttrain.tasks import Row, TaskOptions
from posttrain.tasks._characters import CharacterTask

LETTERS = "ABCDEFGH"
ALPHABET = LETTERS + "KN012345678!&|>=#:;^?"

NAMES = [
    "Abigail", "Alexander", "Alice", "Amelia", "Anna", "Aria", "Ava", "Benjamin", "Bob", "Carol", "Charlotte", "Chloe",
    "Daniel", "David", "Elizabeth", "Ella", "Emily", "Ethan", "Eva", "Evelyn", "Frank", "Grace", "Hannah", "Henry",
    "Isabella", "Jack", "Jackson", "Jacob", "James", "Joseph", "Laura", "Liam", "Lily", "Logan", "Lucas", "Luke",
    "Mason", "Matthew", "Mia", "Michael", "Noah", "Oliver", "Olivia", "Owen", "Penelope", "Riley", "Samuel",
    "Scarlett", "Sebastian", "Sofia", "Sophia", "Victoria", "William", "Zoe", "Zoey",
]  # fmt: skip

DRY = 2000
"""Puzzles in a row that had all been drawn before: then a number of people counts as exhausted."""


class Claim(NamedTuple):
    """What somebody says of the people 0, 1, ..."""

    sign: Literal["", "&", "|", ">", "=", "#"]
    """How two terms are joined; empty for one term, and for a number of knights, which has none."""
    terms: tuple[tuple[int, bool], ...] = ()
    """A person, and whether that one is said to be a knight; with `=` and `#` always True."""
    knights: int = 0
    """How many of all are said to be knights, where there are no terms."""


Puzzle = tuple[Claim, ...]
"""What each of the people says, in order."""

People = Annotated[int, Field(ge=2, le=8)]


class Options(TaskOptions):
    """Options of the task `knights_knaves`."""

    form: Literal["words", "symbols"] = "words"
    """English for language models, or one line for a small model over characters."""
    min_people: People = 2
    max_people: People = 8
    """Every number of people between the two is equally likely, until its puzzles are exhausted."""
    rows: Annotated[int, Field(gt=0)] = 4000
    """Training prompts; evaluation prompts come on top, in proportion to `eval_share`."""
    eval_share: Annotated[float, Field(ge=0, lt=1)] = 0.16
    """Share of all prompts that is held out."""
    seed: int = 0
    """Of the draw, which decides which puzzles are used, their order and their names."""

    @model_validator(mode="after")
    def _range_of_people(self) -> Options:
        if self.min_people > self.max_people:
            raise ValueError(f"min_people {self.min_people} exceeds max_people {self.max_people}: exchange them")
        return self


class Task(CharacterTask):
    """Knights and knaves with 2 to 8 people."""

    name = "knights_knaves"
    options: Options

    @property
    def verifier(self) -> tuple[str, dict[str, Any]]:
        """The reward `knights_knaves`, in the form of the prompts."""
        return "knights_knaves", {"form": self.options.form}

    def demonstrations(self, rows: Sequence[Row], count: int, *, seed: int) -> list[tuple[Row, str]]:
        """Uniformly random rows, each with its solution."""
        answer = in_words if self.options.form == "words" else lambda _, solution: solution
        return [(row, answer(row["people"], row["solution"])) for row in random.Random(seed).choices(rows, k=count)]

    @property
    def alphabet(self) -> str | None:
        """The letters of people and kinds, digits and signs of the form `symbols`; unbounded in `words`."""
        return ALPHABET if self.options.form == "symbols" else None

    def _drawn(self) -> Iterator[tuple[str, Row]]:
        """Distinct rows, until every number of people is exhausted, each behind its puzzle without the guise."""
        options = self.options
        draw = random.Random(options.seed)
        sizes = list(range(options.min_people, options.max_people + 1))
        seen: set[str] = set()
        while sizes:
            people = draw.choice(sizes)
            for _ in range(DRY):
                puzzle = draw_puzzle(people, draw)
                key = f"knights_knaves:{in_symbols(puzzle)}"
                if key not in seen:
                    seen.add(key)
                    yield f"knights_knaves:{canonical(puzzle)}", self._row(key, puzzle)
                    break
            else:
                sizes.remove(people)

    def _row(self, key: str, puzzle: Puzzle) -> Row:
        if self.options.form == "words":
            names = random.Random(f"{self.options.seed} {key}").sample(NAMES, len(puzzle))
            content = _question(puzzle, names)
        else:
            names = list(LETTERS[: len(puzzle)])
            content = in_symbols(puzzle)
        return {
            "prompt": [{"role": "user", "content": content}],
            "key": key,
            "people": names,
            "solution": solve(puzzle)[0],
        }


def solve(puzzle: Puzzle) -> list[str]:
    """All solutions, one `K` or `N` per person, by enumeration of all 2ⁿ assignments."""
    return _assignments(_common(_constraints(puzzle), len(puzzle)), len(puzzle))


def draw_puzzle(people: int, draw: random.Random) -> Puzzle:
    """A random puzzle with one solution, and more than one without any one of its statements.

    The solution is drawn first, uniformly, and every claim so that it fits: its shape, then one of that shape.
    """
    while True:
        solution = 1 << draw.randrange(1 << people)
        claims, constraints = [], []
        for shapes in _sayings(people):
            claim, constraint = draw.choice(draw.choice(shapes))
            while not constraint & solution:
                claim, constraint = draw.choice(draw.choice(shapes))
            claims.append(claim)
            constraints.append(constraint)
        if _common(constraints, people) == solution and all(
            _common(constraints[:i] + constraints[i + 1 :], people) != solution for i in range(people)
        ):
            return tuple(claims)


def canonical(puzzle: Puzzle) -> str:
    """The same text in symbols for all guises of a puzzle.

    The least of its texts over the orders of its people that colour refinement leaves open.
    """
    normal = [
        Claim("|", ((claim.terms[0][0], not claim.terms[0][1]), claim.terms[1])) if claim.sign == ">" else claim
        for claim in puzzle
    ]
    texts = []
    for order in _orders(normal, [0] * len(normal)):
        renamed = [Claim(c.sign, tuple(sorted((order[p], knight) for p, knight in c.terms)), c.knights) for c in normal]
        texts.append(in_symbols([claim for _, claim in sorted(zip(order, renamed, strict=True))]))
    return min(texts)


def in_symbols(puzzle: Sequence[Claim]) -> str:
    """`A:B=C;B:!A;C:2`."""
    texts = []
    for claim in puzzle:
        terms = [("" if knight else "!") + LETTERS[person] for person, knight in claim.terms]
        texts.append(claim.sign.join(terms) or str(claim.knights))
    return ";".join(f"{LETTERS[speaker]}:{text}" for speaker, text in enumerate(texts))


def _question(puzzle: Puzzle, names: Sequence[str]) -> str:
    """The puzzle in English."""
    said = "\n".join(f'{name}: "{_sentence(i, puzzle[i], names)}"' for i, name in enumerate(names))
    blanks = ", ".join(f"({i}) {name} is a ..." for i, name in enumerate(names, start=1))
    return (
        "On an island everybody is either a knight, whose statements are all true, or a knave, whose statements are "
        'all false. "Or" includes the case of both, and "if ..., then ..." is false only where the condition holds and '
        f"the consequence does not. You meet {', '.join(names[:-1])} and {names[-1]}.\n{said}\n"
        f"Who is a knight and who is a knave? End with one line of this form: {blanks}"
    )


def _sentence(speaker: int, claim: Claim, names: Sequence[str]) -> str:
    """A claim in the speaker's words."""
    # Others first: "Bob and I".
    others = [names[person] for person, _ in claim.terms if person != speaker]
    pair = " and ".join([*others, "I"][: len(claim.terms)])
    terms = [
        ("I am" if person == speaker else f"{names[person]} is") + (" a knight" if knight else " a knave")
        for person, knight in claim.terms
    ]
    numbers = {0: "none of us is a knight", 1: "exactly 1 of us is a knight", len(names): "all of us are knights"}
    text = {
        "": terms[0] if terms else numbers.get(claim.knights, f"exactly {claim.knights} of us are knights"),
        "&": " and ".join(terms),
        "|": " or ".join(terms),
        ">": f"if {', then '.join(terms)}",
        "=": f"{pair} are of the same kind",
        "#": f"{pair} are of different kinds",
    }[claim.sign]
    return text[0].upper() + text[1:]


# A set of assignments is an integer of 2ⁿ bits. Bit a stands for the assignment in which person i is a knight where bit
# i of a is set.


def _everything(people: int) -> int:
    """All assignments."""
    return (1 << (1 << people)) - 1


@lru_cache(maxsize=64)
def _where_knight(person: int, people: int) -> int:
    """The assignments in which a person is a knight."""
    return sum(1 << a for a in range(1 << people) if a >> person & 1)


def _common(constraints: Iterable[int], people: int) -> int:
    """The assignments that all constraints allow."""
    common = _everything(people)
    for constraint in constraints:
        common &= constraint
    return common


def _constraint(speaker: int, claim: Claim, people: int) -> int:
    """The assignments in which the speaker is a knight if and only if the claim is true."""
    everything = _everything(people)
    terms = [_where_knight(p, people) ^ (0 if knight else everything) for p, knight in claim.terms]
    if not terms:
        true = sum(1 << a for a in range(1 << people) if a.bit_count() == claim.knights)
    elif claim.sign == "":
        true = terms[0]
    else:
        left, right = terms
        true = {
            "&": left & right,
            "|": left | right,
            ">": everything ^ left | right,
            "=": everything ^ left ^ right,
            "#": left ^ right,
        }[claim.sign]
    return everything ^ _where_knight(speaker, people) ^ true


def _constraints(puzzle: Puzzle) -> list[int]:
    return [_constraint(speaker, claim, len(puzzle)) for speaker, claim in enumerate(puzzle)]


def _assignments(some: int, people: int) -> list[str]:
    """The members of a set of assignments, one `K` or `N` per person."""
    members = (a for a in range(1 << people) if some >> a & 1)
    return ["".join("K" if a >> person & 1 else "N" for person in range(people)) for a in members]


@lru_cache(maxsize=8)
def _sayings(people: int) -> list[list[list[tuple[Claim, int]]]]:
    """For each speaker, by shape: every claim, with its constraint."""
    pairs = list(itertools.combinations(range(people), 2))
    signs = list(itertools.product((True, False), repeat=2))
    both = [((a, x), (b, y)) for a, b in pairs for x, y in signs]
    same = [((a, True), (b, True)) for a, b in pairs]
    shapes = [
        [Claim("&", terms) for terms in both],
        [Claim("|", terms) for terms in both],
        [Claim(">", terms) for left, right in both for terms in ((left, right), (right, left))],
        [Claim("=", terms) for terms in same],
        [Claim("#", terms) for terms in same],
    ]
    if people > 2:  # of two people it would say again what `&`, `=` or `#` says
        shapes.append([Claim("", (), knights) for knights in range(people + 1)])
    sayings = []
    for speaker in range(people):
        alone = [Claim("", ((p, knight),)) for p in range(people) if p != speaker for knight in (True, False)]
        sayings.append([[(c, _constraint(speaker, c, people)) for c in shape] for shape in [alone, *shapes]])
    return sayings


def _orders(puzzle: Sequence[Claim], colours: Sequence[int]) -> Iterator[list[int]]:
    """New numbers of the people: those that refinement decides, and every choice where it leaves people alike."""
    colours = _refined(puzzle, colours)
    alike = [person for person, colour in enumerate(colours) if colours.count(colour) > 1]
    if not alike:
        yield colours
        return
    first = min(colours[person] for person in alike)
    for chosen in (person for person in alike if colours[person] == first):
        yield from _orders(puzzle, [2 * colour + (p != chosen) for p, colour in enumerate(colours)])


def _refined(puzzle: Sequence[Claim], colours: Sequence[int]) -> list[int]:
    """Colours 0, 1, ... that tell people apart by what they say and by what is said of them, until nothing changes."""
    while True:
        views = [
            (
                colours[person],
                (claim.sign, claim.knights, sorted((colours[p], knight, p == person) for p, knight in claim.terms)),
                sorted(
                    (colours[speaker], said.sign, knight)
                    for speaker, said in enumerate(puzzle)
                    for p, knight in said.terms
                    if p == person
                ),
            )
            for person, claim in enumerate(puzzle)
        ]
        distinct = [view for view, _ in itertools.groupby(sorted(views))]
        refined = [distinct.index(view) for view in views]
        if len(distinct) == len(set(colours)):
            return refined
        colours = refined
