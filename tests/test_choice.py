"""Multiple choice: how answers are read (with logic and format, in a corpus), and the task with typical mistakes."""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import registry, rewards, tasks
from posttrain.errors import UserError
from posttrain.rewards import Verdict
from posttrain.tasks import Split
from posttrain.tasks.choice import LABELS, mistakes

CORPUS = Path(__file__).parent / "corpora" / "parsers.jsonl"
CASES: list[dict[str, Any]] = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]
FOUR = {"choices": ["46", "36", "56", "Tuesday"], "answer": "A"}
SPLITS: tuple[Split, ...] = ("train", "eval")


def judged(completion: str, row: dict[str, Any] = FOUR, **options: Any) -> Verdict:
    return rewards.load("choice", options).score([completion], [row])[0]


@pytest.mark.parametrize("name", ["choice", "format", "knights_knaves"])
def test_the_corpus_of_parser_cases(name: str) -> None:
    assert len(CASES) >= 100
    cases = [case for case in CASES if case["reward"] == name]
    assert len(cases) >= 16
    for case in cases:
        (found,) = rewards.load(name, case["options"]).score([case["completion"]], [case["row"]])
        assert (found.reward, found.status, found.answer) == (case["value"], case["status"], case["answer"]), case


class TestReward:
    def test_an_ambiguous_answer_is_at_fault_itself(self) -> None:
        """0.0 and not None: a sample that TRL skips would be better than a wrong answer, and naming two would pay."""
        found = judged("The answer is A or C.")
        assert (found.reward, found.status, found.detail) == (0.0, "no_answer", "contradictory: A, C")
        assert judged("The answer is C.").reward == 0.0

    @pytest.mark.parametrize("label", ["A", "B", "C", "D"])
    def test_gold_is_correct_and_every_other_label_is_wrong(self, label: str) -> None:
        verifier = rewards.load("choice")
        row = {**FOUR, "answer": label}
        gold = verifier.gold(row)
        assert gold == label and verifier.verify(gold, row) == Verdict(1.0, "ok", label)
        for other in set("ABCD") - {label}:
            assert verifier.verify(other, row) == Verdict(0.0, "wrong", other)

    def test_gold_of_an_unusable_row_is_none(self) -> None:
        assert rewards.load("choice").gold({"choices": ["1", "2"], "answer": "E"}) is None

    def test_two_choices_of_the_same_text_are_told_apart_by_label_alone(self) -> None:
        row = {"choices": ["5", "5", "6"], "answer": "B"}
        assert judged("5", row).status == "no_answer"
        assert judged("B) 5", row).status == "no_answer"  # the line is no lone label, and its text names two choices
        assert judged("The answer is B) 5", row).reward == 1.0

    def test_columns_depend_on_the_options(self) -> None:
        assert rewards.load("choice").requires == ("choices", "answer")
        assert rewards.load("choice", {"letters": 4}).requires == ("answer",)
        copy = pickle.loads(pickle.dumps(rewards.load("choice", {"letters": 4})))  # noqa: S301 - our own bytes
        assert copy.requires == ("answer",) and copy.accuracy

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"letters": 4, "accept_text": True}, "accept_text has no effect with letters"),
            ({"letters": 1}, "The option 'letters' of the reward 'choice' is wrong"),
            ({"letter": 4}, "did you mean 'letters'?"),
        ],
    )
    def test_mistakes_in_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError) as error:
            rewards.load("choice", options)
        assert message in str(error.value)

    @settings(deadline=None)
    @given(st.text(alphabet="ABCDabcd()[]{}\\$.,:;!? \n*answerisboxedoptin46", max_size=120))
    def test_no_text_makes_it_fail(self, text: str) -> None:
        found = judged(text)
        assert found.reward in (0.0, 1.0) and found.status in ("ok", "wrong", "no_answer")
        assert (found.reward == 1.0) == (found.answer == "A")


class TestTask:
    @pytest.mark.parametrize("form", ["words", "symbols"])
    def test_rows_gold_and_demonstrations(self, form: str) -> None:
        task = tasks.load("choice", {"form": form, "rows": 400})
        verifier = rewards.load(*task.verifier)  # type: ignore[misc]
        rows = [*task.rows("train"), *task.rows("eval")]
        assert len({row["key"] for row in rows}) == len(rows)
        for row in rows:
            gold = verifier.gold(row)
            assert gold is not None and verifier.verify(gold, row) == Verdict(1.0, "ok", row["answer"])
            assert len(set(row["choices"])) == 4
            a, sign, b = re.fullmatch(r"choice:(\d+)([-+*])(\d+)", row["key"]).groups()  # type: ignore[union-attr]
            right = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
            assert row["choices"][LABELS.index(row["answer"])] == str(right)
            assert verifier.verify(row["prompt"][0]["content"], row).status == "no_answer"
        pairs = task.demonstrations(task.rows("train"), 200, seed=0)
        assert pairs == task.demonstrations(task.rows("train"), 200, seed=0)
        assert [verifier.verify(answer, row).reward for row, answer in pairs] == [1.0] * 200

    def test_what_a_row_looks_like(self) -> None:
        task = tasks.load("choice", {"form": "symbols"})
        row = task.rows("train")[0]
        listed = ";".join(f"{at}:{text}" for at, text in zip("ABCD", row["choices"], strict=True))
        assert row["prompt"][0]["content"] == f"{row['key'].removeprefix('choice:')}={listed}"
        words = tasks.load("choice").rows("train")[0]
        assert (words["key"], words["choices"], words["answer"]) == (row["key"], row["choices"], row["answer"])
        assert words["prompt"][0]["content"].startswith("What is ")

    def test_the_right_answer_is_given_away_by_neither_place_nor_size(self) -> None:
        """Of 4,000 rows a quarter each: 1,000, with a standard deviation of 27."""
        rows = tasks.load("choice", {"rows": 4000}).rows("train")
        values = [[int(text) for text in row["choices"]] for row in rows]
        places = [LABELS.index(row["answer"]) for row in rows]
        ranks = Counter(sorted(four).index(four[place]) for four, place in zip(values, places, strict=True))
        for counts in (Counter(places), ranks):
            assert all(counts[i] == pytest.approx(1000, abs=135) for i in range(4))

    @pytest.mark.parametrize(
        ("a", "sign", "b", "typical"),
        [
            (27, "+", 35, {52, 512, 72, 61}),  # 62: no carry, carry written out, carry twice, one too few
            (52, "-", 27, {35, -25, 79, 26}),  # 25: smaller digit from the larger, exchanged, added, one too many
            (12, "*", 34, {396, 442, 308, 46}),  # 408: 12·33, 13·34, 10·30 + 2·4, added
        ],
    )
    def test_typical_mistakes(self, a: int, sign: str, b: int, typical: set[int]) -> None:
        found = mistakes(a, sign, b)
        assert typical <= set(found)

    def test_every_question_has_enough_mistakes_on_both_sides(self) -> None:
        for sign in "+-*":
            for a in range(11, 100):
                for b in range(11, 100):
                    right = {"+": a + b, "-": a - b, "*": a * b}[sign]
                    found = mistakes(a, sign, b)
                    assert right not in found and len(set(found)) == len(found)
                    assert min(sum(x < right for x in found), sum(x > right for x in found)) >= 3

    def test_both_orders_of_a_sum_fall_in_the_same_split(self) -> None:
        splits: dict[str, set[Split]] = {}
        task = tasks.load("choice", {"operations": ["+", "*"], "max_operand": 30, "rows": 600})
        for split in SPLITS:
            for row in task.rows(split):
                a, sign, b = re.fullmatch(r"choice:(\d+)([+*])(\d+)", row["key"]).groups()  # type: ignore[union-attr]
                splits.setdefault(f"{min(a, b)}{sign}{max(a, b)}", set()).add(split)
        assert all(len(found) == 1 for found in splits.values())
        assert len({split for found in splits.values() for split in found}) == 2

    def test_the_alphabet_covers_prompts_and_answers(self) -> None:
        task = tasks.load("choice", {"form": "symbols"})
        text = "".join(row["prompt"][0]["content"] + row["answer"] for row in task.rows("train"))
        assert task.alphabet is not None and len(set(task.alphabet)) == len(task.alphabet)
        assert set(text) == set(task.alphabet) - set("^?")
        assert tasks.load("choice").alphabet is None

    def test_determinism_and_exhaustion(self) -> None:
        few = tasks.load("choice", {"rows": 50})
        assert few.rows("train") == tasks.load("choice", {"rows": 200}).rows("train")[:50]
        assert few.rows("train") != tasks.load("choice", {"rows": 50, "seed": 1}).rows("train")
        with pytest.raises(UserError, match="The task 'choice' has 100 training prompts"):  # (20 − 11 + 1)²
            tasks.load("choice", {"operations": ["-"], "max_operand": 20, "eval_share": 0.0, "rows": 101}).rows("train")

    def test_it_is_listed_with_a_summary(self) -> None:
        for kind in ("reward", "task"):
            assert registry.entry(kind, "choice").summary.startswith("Choice: ")
