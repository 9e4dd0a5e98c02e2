"""Knights and knaves: puzzles against a brute force of their text, splits, and what counts as an answer."""

from __future__ import annotations

import itertools
import pickle
import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import registry, rewards, tasks
from posttrain.errors import UserError
from posttrain.rewards import RewardFunction, Verdict, knights_knaves
from posttrain.rewards.knights_knaves import MAX_CHARS, in_words
from posttrain.tasks import Row, Split
from posttrain.tasks.knights_knaves import NAMES, Claim, _sayings, _sentence, canonical, draw_puzzle, in_symbols, solve

SPLITS: tuple[Split, ...] = ("train", "eval")
WORDS = rewards.load("knights_knaves")
SYMBOLS = rewards.load("knights_knaves", {"form": "symbols"})
Assignment = dict[str, bool]


def load(**options: Any) -> tasks.BaseTask:
    return tasks.load("knights_knaves", options)


def symbols(people: int, rows: int, **options: Any) -> tasks.BaseTask:
    return load(form="symbols", min_people=people, max_people=people, rows=rows, **options)


def contents(rows: list[Row]) -> list[str]:
    return [row["prompt"][0]["content"] for row in rows]


def true(claim: str, knight: Assignment) -> bool:
    """Whether a claim in symbols is true, read from its text alone."""
    if claim.isdigit():
        return sum(knight.values()) == int(claim)
    term = re.fullmatch(r"(!?)([A-H])(?:([&|>=#])(!?)([A-H]))?", claim)
    assert term is not None, claim
    left = knight[term[2]] != bool(term[1])
    if term[3] is None:
        return left
    right = knight[term[5]] != bool(term[4])
    return {
        "&": left and right,
        "|": left or right,
        ">": right if left else True,
        "=": left == right,
        "#": left != right,
    }[term[3]]


def brute_force(text: str, *, without: str = "") -> list[str]:
    """All solutions of a puzzle in symbols; the statement of the person `without` is left out."""
    statements = [statement.split(":") for statement in text.split(";")]
    people = [speaker for speaker, _ in statements]
    assert people == list("ABCDEFGH"[: len(people)])
    solutions = []
    for kinds in itertools.product("KN", repeat=len(people)):
        knight = {person: kind == "K" for person, kind in zip(people, kinds, strict=True)}
        if all(true(claim, knight) == knight[speaker] for speaker, claim in statements if speaker != without):
            solutions.append("".join(kinds))
    return solutions


def meaning(text: str) -> tuple[tuple[bool, ...], ...]:
    """The truth tables of all claims, in the order of people that makes them least: equal for guises of one puzzle."""
    claims = [statement.split(":")[1] for statement in text.split(";")]
    people = "ABCDEFGH"[: len(claims)]
    tables = []
    for order in itertools.permutations(range(len(claims))):
        worlds = [
            {people[order[i]]: value for i, value in enumerate(values)}
            for values in itertools.product((False, True), repeat=len(claims))
        ]
        tables.append(tuple(tuple(true(claims[order[i]], world) for world in worlds) for i in range(len(claims))))
    return min(tables)


class TestPuzzles:
    @pytest.mark.parametrize(("people", "count"), [(2, 30), (3, 300), (4, 300), (5, 200), (6, 100), (7, 40), (8, 20)])
    def test_one_solution_and_no_statement_to_spare(self, people: int, count: int) -> None:
        rows = symbols(people, count).rows("train")
        assert len(set(contents(rows))) == count
        for row, text in zip(rows, contents(rows), strict=True):
            assert brute_force(text) == [row["solution"]]
            assert all(len(brute_force(text, without=speaker)) > 1 for speaker in row["people"])

    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def test_the_solver_agrees_with_brute_force(self, data: st.DataObject) -> None:
        people = data.draw(st.integers(2, 5))
        puzzle = tuple(data.draw(st.sampled_from(data.draw(st.sampled_from(shapes))))[0] for shapes in _sayings(people))
        assert sorted(solve(puzzle)) == brute_force(in_symbols(puzzle))

    def test_a_puzzle_by_hand(self) -> None:
        # A: "we are of different kinds": if A were a knight, B would be a knave. B: "A is a knave": then a lie, as it
        # must be. If A were a knave, both would be knaves and B's words true. So A is the knight and B the knave.
        puzzle = (Claim("#", ((0, True), (1, True))), Claim("", ((0, False),)))
        assert in_symbols(puzzle) == "A:A#B;B:!A"
        assert solve(puzzle) == ["KN"]

    @pytest.mark.parametrize("people", [2, 3])
    def test_every_guise_of_few_people(self, people: int) -> None:
        # Constraints are sets of assignments as bits, so their intersection is a bitwise and.
        guises: Counter[str] = Counter()
        for said in itertools.product(*(list(itertools.chain(*shapes)) for shapes in _sayings(people))):
            sets = [constraint for _, constraint in said]
            rest = [-1] * people  # the intersection of all but one
            for i, j in itertools.product(range(people), repeat=2):
                rest[i] &= sets[j] if i != j else -1
            if (rest[0] & sets[0]).bit_count() == 1 and all(one.bit_count() > 1 for one in rest):
                guises[canonical(tuple(claim for claim, _ in said))] += 1
        assert (guises.total(), len(guises)) == {2: (44, 15), 3: (17653, 940)}[people]

    @pytest.mark.parametrize(("people", "count"), [(2, 44), (3, 1500), (4, 400)])
    def test_canonical_texts_are_equal_exactly_where_the_meaning_is(self, people: int, count: int) -> None:
        draw = random.Random(0)
        pairs = set()
        for _ in range(count):
            puzzle = draw_puzzle(people, draw)
            pairs.add((canonical(puzzle), meaning(in_symbols(puzzle))))
        assert len({text for text, _ in pairs}) == len({tables for _, tables in pairs}) == len(pairs)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(2, 8), st.integers(0, 2**31))
    def test_guises_of_a_puzzle_have_one_canonical_text(self, people: int, seed: int) -> None:
        draw = random.Random(seed)
        puzzle = draw_puzzle(people, draw)
        order = draw.sample(range(people), people)
        renamed = []
        for claim in puzzle:
            terms = [(order[person], knight) for person, knight in claim.terms]
            if claim.sign == "|" and draw.random() < 0.5:
                claim = claim._replace(sign=">")  # x|y as !x>y
                terms[0] = (terms[0][0], not terms[0][1])
            elif claim.sign == ">" and draw.random() < 0.5:  # x>y as !y>!x
                terms = [(person, not knight) for person, knight in reversed(terms)]
            elif claim.sign != ">":
                draw.shuffle(terms)
            renamed.append(claim._replace(terms=tuple(terms)))
        guise = tuple(renamed[order.index(person)] for person in range(people))
        assert canonical(guise) == canonical(puzzle)
        solution, disguised = solve(puzzle)[0], solve(guise)[0]
        assert [disguised[order[person]] for person in range(people)] == list(solution)

    def test_a_symmetric_puzzle_has_a_canonical_text(self) -> None:
        # Two circles in which everybody calls the next a knave: refinement leaves all six people alike.
        circles = [tuple(Claim("", ((p, False),)) for p in order) for order in ([1, 2, 0, 4, 5, 3], [3, 4, 1, 5, 2, 0])]
        one = tuple(Claim("", ((p, False),)) for p in [1, 2, 3, 4, 5, 0])
        assert canonical(circles[0]) == canonical(circles[1]) != canonical(one)


class TestTask:
    def test_it_is_listed_with_a_summary(self) -> None:
        assert registry.entry("task", "knights_knaves").summary.startswith("Knights and knaves: ")
        assert registry.entry("reward", "knights_knaves").summary.startswith("Knights and knaves: ")

    def test_the_first_rows_never_change(self) -> None:
        assert contents(symbols(3, 4).rows("train")) == [
            "A:A#C;B:2;C:A=B",
            "A:A=C;B:!C>!A;C:A#C",
            "A:!C;B:A;C:!A&B",
            "A:A=C;B:A=B;C:B",
        ]

    @pytest.mark.parametrize("form", ["words", "symbols"])
    def test_determinism(self, form: str) -> None:
        few, many = load(form=form, rows=50), load(form=form, rows=200)
        assert few.rows("train") == load(form=form, rows=50).rows("train") == many.rows("train")[:50]
        assert few.rows("eval") == many.rows("eval")[: len(few.rows("eval"))]
        assert few.rows("train") != load(form=form, rows=50, seed=1).rows("train")
        copy = pickle.loads(pickle.dumps(few))  # noqa: S301 - our own bytes
        assert copy.rows("eval") == few.rows("eval")

    def test_both_forms_hold_the_same_puzzles(self) -> None:
        for split in SPLITS:
            words, short = load(rows=300).rows(split), load(rows=300, form="symbols").rows(split)
            assert [(row["key"], row["solution"]) for row in words] == [(row["key"], row["solution"]) for row in short]
            assert [row["key"] for row in short] == [f"knights_knaves:{text}" for text in contents(short)]

    def test_splits_are_disjoint_in_substance(self) -> None:
        # 600 rows of three people are many guises of at most 940 puzzles.
        task = symbols(3, 600)
        train, evaluation = (contents(task.rows(split)) for split in SPLITS)
        assert len({*train, *evaluation}) == len(train) + len(evaluation)
        meanings = [{meaning(text) for text in texts} for texts in (train, evaluation)]
        assert len(meanings[0]) < 500
        assert not meanings[0] & meanings[1]
        assert len(evaluation) == pytest.approx(600 * 0.16 / 0.84, rel=0.4)

    def test_a_row_keeps_its_split_under_every_seed(self) -> None:
        split_of = {row["key"]: split for split in SPLITS for row in symbols(2, 30).rows(split)}
        other = {row["key"]: split for split in SPLITS for row in symbols(2, 30, seed=1).rows(split)}
        common = split_of.keys() & other.keys()
        assert len(common) > 20
        assert all(split_of[key] == other[key] for key in common)

    def test_exhaustion_names_what_exists(self) -> None:
        assert len(symbols(2, 44, eval_share=0.0).rows("train")) == 44
        with pytest.raises(UserError, match="has 44 training prompts with these options, but 45 were asked for"):
            symbols(2, 45, eval_share=0.0).rows("train")

    def test_an_exhausted_number_of_people_leaves_the_rest_to_the_others(self) -> None:
        rows = load(form="symbols", max_people=3, rows=200, eval_share=0.0).rows("train")
        sizes = Counter(len(row["people"]) for row in rows)
        assert sizes == {2: 44, 3: 156}

    def test_numbers_of_people_are_equally_likely(self) -> None:
        rows = load(form="symbols", min_people=4, rows=1000).rows("train")
        sizes = Counter(len(row["people"]) for row in rows)
        assert set(sizes) == {4, 5, 6, 7, 8}
        assert all(count == pytest.approx(200, rel=0.25) for count in sizes.values())

    def test_no_solution_is_a_good_guess(self) -> None:
        solutions = Counter(row["solution"] for row in symbols(4, 1000).rows("train"))
        assert len(solutions) == 16
        assert max(solutions.values()) < 100  # of 1,000; 62.5 if all were equally likely

    @pytest.mark.parametrize("form", ["words", "symbols"])
    def test_gold_and_demonstrations_are_correct(self, form: str) -> None:
        task = load(form=form, rows=300)
        assert task.verifier is not None
        verifier = rewards.load(*task.verifier)
        for row in task.rows("train") + task.rows("eval"):
            gold = verifier.gold(row)
            assert gold is not None and verifier.verify(gold, row) == Verdict(1.0, "ok", row["solution"])
        pairs = task.demonstrations(task.rows("train"), 300, seed=0)
        assert pairs == task.demonstrations(task.rows("train"), 300, seed=0)
        assert pairs != task.demonstrations(task.rows("train"), 300, seed=1)
        assert [verifier.verify(answer, row).reward for row, answer in pairs] == [1.0] * 300

    def test_the_alphabet_covers_prompts_and_answers(self) -> None:
        task = load(form="symbols", rows=1000)
        text = "".join(row["prompt"][0]["content"] + row["solution"] for row in task.rows("train"))
        assert task.alphabet is not None and len(set(task.alphabet)) == len(task.alphabet)
        assert set(text) == set(task.alphabet) - set("^?")
        assert task.chat_template == tasks.load("countdown").chat_template
        assert load().alphabet is None and load().chat_template is None

    @pytest.mark.parametrize(
        ("claim", "sentence"),
        [
            (Claim("", ((1, True),)), "Bob is a knight"),
            (Claim("", ((2, False),)), "Carol is a knave"),
            (Claim("&", ((0, False), (1, True))), "I am a knave and Bob is a knight"),
            (Claim("|", ((1, True), (2, False))), "Bob is a knight or Carol is a knave"),
            (Claim(">", ((2, False), (0, True))), "If Carol is a knave, then I am a knight"),
            (Claim("=", ((1, True), (2, True))), "Bob and Carol are of the same kind"),
            (Claim("#", ((0, True), (2, True))), "Carol and I are of different kinds"),
            (Claim("", (), 0), "None of us is a knight"),
            (Claim("", (), 1), "Exactly 1 of us is a knight"),
            (Claim("", (), 2), "Exactly 2 of us are knights"),
            (Claim("", (), 3), "All of us are knights"),
        ],
    )
    def test_sentences(self, claim: Claim, sentence: str) -> None:
        assert _sentence(0, claim, ["Alice", "Bob", "Carol"]) == sentence

    def test_a_question_quotes_everybody_and_answers_nothing(self) -> None:
        for row in load(rows=100).rows("train"):
            text = row["prompt"][0]["content"]
            assert len(set(row["people"])) == len(row["people"]) and set(row["people"]) <= set(NAMES)
            assert re.findall(r"^(\w+): \"[A-Z][^\"]+\"$", text, re.MULTILINE) == row["people"]
            assert text.endswith(", ".join(f"({i}) {name} is a ..." for i, name in enumerate(row["people"], start=1)))
            assert WORDS.verify(text, row).status == "no_answer"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"min_people": 5, "max_people": 4}, "min_people 5 exceeds max_people 4"),
            ({"max_people": 9}, "The option 'max_people' of the task 'knights_knaves' is wrong"),
            ({"min_people": 1}, "The option 'min_people' of the task 'knights_knaves' is wrong"),
            ({"form": "word"}, "The option 'form' of the task 'knights_knaves' is wrong"),
            ({"people": 3}, "has no option 'people'"),
            ({"rows": 0}, "The option 'rows'"),
        ],
    )
    def test_mistakes_in_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError) as error:
            load(**options)
        assert message in str(error.value)


TWO = {"people": ["Alice", "Bob"], "solution": "KN"}
THREE = {"people": ["Alice", "Bob", "Carol"], "solution": "KNN"}
GOLD = "(1) Alice is a knight, (2) Bob is a knave"


def judged(completion: str, row: dict[str, Any] = TWO) -> tuple[float | None, str, str | None]:
    (found,) = WORDS.score([completion], [row])
    return found.reward, found.status, found.answer


class TestWords:
    @pytest.mark.parametrize(
        "completion",
        [
            GOLD,
            GOLD.upper(),
            f"{GOLD}.",
            f"<think>Alice is a knave, Bob is a knave</think>\n{GOLD}",
            f"<think>a</think><answer>{GOLD}</answer>",
            f"<answer>Alice is a knave, Bob is a knave</answer> no, <answer>\n{GOLD}\n</answer> Alice is a knave",
            "1. Alice is a Knight.\n2. Bob is a Knave.\n",
            "- Alice: knight\n- Bob: knave",
            "* **Alice**: *Knight*\n\n* **Bob**: *Knave*",
            "**(1) Alice is a knight, (2) Bob is a knave**",
            "(1) **Alice** is a **knight**, (2) __Bob__ is a `knave`",
            "### Answer\n(1) Alice is a knight\n(2) Bob is a knave",
            "✅ Alice is a knight 🗡️, ❌ Bob 🃏 is a knave! 🎉🎉",
            "\u200bAl\u200bice is a knight; Bob\u00a0is\u2003a kn\u00adave",
            "Ａｌｉｃｅ is a ｋｎｉｇｈｔ, Bob is a knave",
            "Alice = knight, Bob = knave",
            "Alice → knight; Bob → knave",
            "Alice -> knight; Bob => knave",
            "Alice – knight, Bob — knave",
            "Alice (knight) and Bob (knave)",
            "| Alice | knight |\n| Bob | knave |",
            '{"Alice": "knight", "Bob": "knave"}',
            "Alice is a knight and Bob is a knave",
            "Alice is not a knave, Bob is not a knight",
            "Alice isn't a knave, Bob isn’t a knight",
            "(2) Bob is a knave, (1) Alice is a knight",  # the order does not matter
            "(7) Alice is a knight, (7) Bob is a knave",  # nor do the numbers
            "Alice is a knight, Alice is a knight, Bob is a knave",
            f"{GOLD}\n{GOLD}",
            f"{GOLD}. So Alice is a knight and Bob lies.",
            "Alice is a knight, not a knave, and Bob is a knave and not a knight",
            "Suppose Alice is a knave. Then Bob is a knight.\nContradiction! " + GOLD,
            f"First try: Alice is a knave, Bob is a knave. That fails. So: {GOLD}",
            f"{GOLD}. If Alice is a knave and Bob is a knight, that contradicts itself.",
            f"{GOLD}, because Bob says Alice is a knave",
            f"{GOLD}. Is Alice is a knave? No.",
            f"Zed is a knight. But: {GOLD}",
            r"\boxed{" + GOLD + "}",
            "x" * 100_000 + "\n" + GOLD,
        ],
    )
    def test_correct(self, completion: str) -> None:
        assert judged(completion) == (1.0, "ok", "KN")

    @pytest.mark.parametrize(
        ("completion", "answer"),
        [
            ("(1) Alice is a knave, (2) Bob is a knave", "NN"),
            ("(1) Bob is a knight, (2) Alice is a knave", "NK"),  # right kinds, wrong people
            ("Alice is not a knight, Bob is a knave", "NN"),
            (f"{GOLD}. No: (1) Alice is a knave, (2) Bob is a knight", "NK"),  # the last one counts
            ("Alice is a knight or a knave, Bob is a knave", None),
            ("Alice is a knight/knave, Bob is a knave", None),
            ("Alice: knight, knave; Bob: knave", None),
            ("Alice is a knight and a knave, Bob is a knave and/or knight", None),
            ("Alice is a knight and not a knight, Bob is a knave", None),
            ("Alice is a knight, Alice is a knave, Bob is a knave", None),
            ("Alice is a knight\nAlice is a knave\nBob is a knave", None),
            ("(1) Alice is a knave, (2) Bob is a knave\n(1) Alice is a knight, (2) Bob is a knave", None),
            (f"{GOLD}. Wait, Alice is a knave.", None),
            (f"{GOLD}. Then again Bob is a knight or a knave.", None),
            (f"{GOLD}, (3) Zed is a knave", None),  # a person too many
            ("Zed: knight, Alice: knight, Bob: knave", None),
        ],
    )
    def test_wrong(self, completion: str, answer: str | None) -> None:
        assert judged(completion) == (0.0, "wrong", answer)

    @pytest.mark.parametrize(
        "completion",
        [
            "",
            " \n ",
            "KN",
            "Alice is a knight",
            "Alice is a knight, Bob",
            "Bob is a knave, Bob is a knave",
            "Alice is a knight. I think that Bob must be a knave.",
            "Alice and Bob are knights",
            "Alice is a knight, so Bob is a knave",  # not a list
            "If Alice is a knight, Bob is a knave",
            "Suppose Alice is a knight and Bob is a knave",
            "Either Alice is a knight or Bob is a knave",
            "Maybe Alice is a knight, Bob is a knave",
            "Alice might be a knight, Bob is a knave",
            "Alice is a knight? Bob is a knave?",
            "Alice says Bob is a knave. Bob says Alice is a knight",
            'Alice: "Bob is a knave"\nBob: "Alice is a knight"',
            "Alice != knight, Bob != knave",
            "Alicea is a knight, Bob is a knave",
            "Alice is a knightly, Bob is a knave",
            "Alice is a knight, Вob is a knave",  # the first letter is Cyrillic
            f"<think>{GOLD}",
            f"<think>{GOLD}</think>",
            f"<answer></answer>{GOLD}<answer></answer>",
            f"{GOLD}{'x' * 100_000}",  # beyond what is read
            "\ud800",
            "\x00",
        ],
    )
    def test_no_answer(self, completion: str) -> None:
        assert judged(completion) == (0.0, "no_answer", None)

    def test_names_of_several_words_and_names_that_begin_alike(self) -> None:
        row = {"people": ["Mary", "Mary Ann", "José", "O'Neil"], "solution": "KNNK"}
        answer = "Mary is a knight, mary ann is a knave, Jose\u0301: knave, O’Neil: knight"
        assert judged(answer, row) == (1.0, "ok", "KNNK")
        assert judged(answer.replace("mary ann", "Mary"), row)[1] == "no_answer"

    @pytest.mark.parametrize("size", [2, 3, 8])
    def test_every_assignment_is_read_as_itself(self, size: int) -> None:
        people = NAMES[:size]
        for kinds in map("".join, itertools.product("KN", repeat=size)):
            for solution in ("K" * size, kinds):
                row = {"people": people, "solution": solution}
                assert judged(in_words(people, kinds), row)[::2] == (float(kinds == solution), kinds)

    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def test_no_text_of_such_pieces_makes_it_fail_or_is_read_two_ways(self, data: st.DataObject) -> None:
        pieces = st.sampled_from(
            ["Alice", "Bob", "Carol", "Zed", " is ", " a ", "knight", "knave", "not ", " or ", " and ", "if ", ", ",
             "?", ":", "\n", "(1) ", "**", "<think>", "</think>", "<answer>", "</answer>", "🎉", ". ",
             "Alice is a knight", "Bob is a knave", "Carol: knave", "Alice is a knave"]
        )  # fmt: skip
        text = "".join(data.draw(st.lists(pieces, max_size=30)))
        kinds = map("".join, itertools.product("KN", repeat=3))
        found = [WORDS.verify(text, {**THREE, "solution": solution}) for solution in kinds]
        assert {verdict.status for verdict in found} <= {"ok", "wrong", "no_answer"}
        assert sum(verdict.reward or 0.0 for verdict in found) <= 1.0

    @settings(max_examples=200, deadline=None)
    @given(st.text(max_size=200))
    def test_no_text_makes_it_fail(self, text: str) -> None:
        for verifier in (WORDS, SYMBOLS):
            assert verifier.score([text, f"{text}{GOLD}{text}"], [TWO, TWO])[0].reward in (0.0, 1.0)

    @pytest.mark.parametrize(
        "piece",
        ["x", "\n", " ", "Alice ", "Alice is a ", "Alice is a knight, ", "Alice is a knight or ", "knight, ", ": ", "(",
         "knight is a ", "a: knight? ", "Alice: knight or knave? ", "*", "\u0301", "\ufdfa", "🎉", "<answer>", "not "],
    )  # fmt: skip
    def test_the_work_on_100_kb_is_bounded(self, piece: str, monkeypatch: pytest.MonkeyPatch) -> None:
        # At most MAX_CHARS characters are tokenised, and each token is looked at a few times.
        calls: Counter[str] = Counter()
        read = 0

        def counted(name: str) -> None:
            inner: Callable[..., Any] = getattr(knights_knaves, name)

            def count(*arguments: Any) -> Any:
                calls[name] += 1
                return inner(*arguments)

            monkeypatch.setattr(knights_knaves, name, count)

        for name in ("_kinds", "_kind", "_link", "_is_glue"):
            counted(name)
        tokenise = knights_knaves._tokens

        def count_characters(text: str) -> list[str]:
            nonlocal read
            read = max(read, len(text))
            return tokenise(text)

        monkeypatch.setattr(knights_knaves, "_tokens", count_characters)
        text = piece * (100_000 // len(piece))
        assert WORDS.verify(text, TWO).reward == 0.0
        assert read == MAX_CHARS
        assert sum(calls.values()) <= 6 * max(MAX_CHARS, len(tokenise(text[-MAX_CHARS:])))


class TestSymbols:
    @pytest.mark.parametrize(
        ("completion", "expected"),
        [
            ("KNN", (1.0, "ok", "KNN")),
            (" K N N \n", (1.0, "ok", "KNN")),
            ("NNN=KNN", (1.0, "ok", "KNN")),
            ("<think>NNN</think>KNN", (1.0, "ok", "KNN")),
            ("<answer>KNN</answer>", (1.0, "ok", "KNN")),
            ("NNK", (0.0, "wrong", "NNK")),
            ("KNN=NNK", (0.0, "wrong", "NNK")),
            ("", (0.0, "no_answer", None)),
            ("KN", (0.0, "no_answer", None)),
            ("KNNK", (0.0, "no_answer", None)),
            ("KNN,KNN", (0.0, "no_answer", None)),
            ("KNX", (0.0, "no_answer", None)),
            ("knn", (0.0, "no_answer", None)),
            ("KNN=", (0.0, "no_answer", None)),
            ("<think>KNN", (0.0, "no_answer", None)),
            ("KNN" * 40_000, (0.0, "no_answer", None)),
            (GOLD, (0.0, "no_answer", None)),
        ],
    )
    def test_verdicts(self, completion: str, expected: tuple[float, str, str | None]) -> None:
        (found,) = SYMBOLS.score([completion], [{"people": ["A", "B", "C"], "solution": "KNN"}])
        assert (found.reward, found.status, found.answer) == expected


@pytest.mark.parametrize("verifier", [WORDS, SYMBOLS], ids=["words", "symbols"])
class TestRows:
    @pytest.mark.parametrize(
        ("people", "solution"),
        [
            ([], ""),
            (["Alice"], "KN"),
            (["Alice", "Bob"], "KX"),
            (["Alice", "Bob"], None),
            (["Alice", "Bob"], [True, False]),
            (["Alice", "alice"], "KN"),
            (["Alice", "**"], "KN"),
            (["Alice", 3], "KN"),
            ("AB", "KN"),
            (None, "KN"),
        ],
    )
    def test_a_malformed_row_has_no_reward(self, verifier: rewards.Verifier, people: Any, solution: Any) -> None:
        row = {"people": people, "solution": solution}
        (found,) = verifier.score([GOLD], [row])
        assert (found.reward, found.status) == (None, "unparseable_gold")
        assert verifier.gold(row) is None

    def test_gold_without_columns(self, verifier: rewards.Verifier) -> None:
        assert verifier.gold({"prompt": "x"}) is None

    def test_through_the_reward_function(self, verifier: rewards.Verifier) -> None:
        function = pickle.loads(pickle.dumps(RewardFunction(verifier)))  # noqa: S301 - our own bytes
        golds = [str(verifier.gold(TWO)), str(verifier.gold(TWO | {"solution": "NN"}))]
        columns = {"people": [TWO["people"]] * 2, "solution": ["KN"] * 2}
        assert function(prompts=["", ""], completions=golds, **columns) == [1.0, 0.0]
