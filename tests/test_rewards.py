"""Verifiers: what is correct, what is not, and what an adversarial completion cannot do."""

from __future__ import annotations

import itertools
import json
import pickle
import sys
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import registry, rewards
from posttrain.errors import UserError
from posttrain.rewards import RewardFunction, Verdict, Verifier, _workers, after_thinking, math, text_of
from posttrain.rewards.countdown import MAX_TOKENS
from tests.patience import patient, worked
from tests.processes import finish

STANDARD = rewards.load("countdown")
LEFT_TO_RIGHT = rewards.load("countdown", {"precedence": "left_to_right"})
MATH = rewards.load("math")
MATH_SLOWLY = rewards.load("math", {"deadline": 60.0})
CORPORA = Path(__file__).parent / "corpora"
PAIRS = [json.loads(line) for line in (CORPORA / "math_pairs.jsonl").read_text(encoding="utf-8").splitlines()]
MATH_ATTACKS = [
    "".join(text * times for text, times in json.loads(line)["parts"])
    for line in (CORPORA / "math_attacks.jsonl").read_text(encoding="utf-8").splitlines()
]

ATTACKS = [
    "__import__('os')._exit(1)",
    "9**9**9",
    "9^{9^9}",
    "9^9^9",
    "5^{5^{5^{5^5}}}",
    "(9^{99999})^{99999}",
    "(10^9)!",
    "((9!)!)!",
    "99999!",
    r"\binom{20000}{10000}",
    r"\binom{10^9}{5\cdot10^8}",
    r"\gcd(10^{1000000},7)",
    r"\sum_{k=1}^{99999}\frac{1}{k^3}",
    "(" * 2000 + "1" + ")" * 2000,
    "(" * 140 + "1" + ")" * 140,
    r"\left(" * 40,
    "9" * 200_000,
    "9" * 290,
    "9" * 61 + "x",
    r"\{" + ",".join(map(str, range(3000))) + r"\}",
    "1\x002",
    "\x00",
    "\ud800",
    "\u0301" * 200_000,
    "\ufdfa" * 299,
    "1e999999999",
    "1/0",
    "^" * 290,
    "!" * 290,
    "\\" * 290,
    r"\boxed{" * 30_000,
    r"\boxed{" * 30_000 + "}" * 30_000,
    "<answer>" * 30_000,
    "=" * 200_000,
]


@pytest.fixture(scope="module", autouse=True)
def _patient() -> Iterator[None]:
    """Hold to its deadline what is an attack, and nothing that a busy machine leaves waiting."""
    attacks = {text for attack in MATH_ATTACKS for text in (attack, rf"\boxed{{{attack}}}")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_workers, "_Judgement", patient(attacks.__contains__))
        MATH.score([r"\boxed{x+1}"], [{"answer": "5"}])  # which begins the processes
        yield


def verdict(verifier: Verifier, completion: str, **row: Any) -> Verdict:
    return verifier.score([completion], [row])[0]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: ascii(attack[:24]))
@pytest.mark.parametrize(
    ("verifier", "row"),
    [(STANDARD, {"numbers": [9, 9, 9], "target": 5}), (MATH, {"answer": "5"})],
    ids=["countdown", "math"],
)
def test_an_attack_scores_zero_at_once(verifier: Verifier, row: dict[str, Any], attack: str) -> None:
    start = worked()
    for completion in (attack, rf"\boxed{{{attack}}}", f"<answer>{attack}</answer>"):
        found = verdict(verifier, completion, **row)
        assert found.reward == 0.0, found
    assert worked() - start < 3 * 2.0


@pytest.mark.parametrize("name", ["countdown", "format", "math"])
def test_rewards_are_listed_with_a_summary_and_survive_pickling(name: str) -> None:
    verifier = rewards.load(name)
    assert registry.entry("reward", name).summary.lower().startswith(name)
    copy = pickle.loads(pickle.dumps(RewardFunction(verifier)))  # noqa: S301 - our own bytes
    assert copy.verifier.name == name == copy.__name__


class TestCountdown:
    @pytest.mark.parametrize(
        ("expression", "target"),
        [
            ("3+5*7", 38),  # 3 + 35
            ("(3+5)*7", 56),  # 8 · 7
            ("7-5-3", -1),  # (7 − 5) − 3
            ("7-(5-3)", 5),  # 7 − 2
            ("3*(7+5)", 36),
            ("((3))+5+7", 15),
            (" 3 +\t5 + 7 ", 15),
            ("5*7-3 = 32", 32),
        ],
    )
    def test_standard_precedence(self, expression: str, target: int) -> None:
        assert verdict(STANDARD, expression, numbers=[3, 5, 7], target=target).reward == 1.0
        assert verdict(STANDARD, expression, numbers=[3, 5, 7], target=target + 1).reward == 0.0

    def test_left_to_right_ignores_precedence(self) -> None:
        row = {"numbers": [3, 5, 7], "target": 56}  # (3 + 5) · 7, where standard precedence gives 38
        assert verdict(LEFT_TO_RIGHT, "3+5*7", **row).reward == 1.0
        assert verdict(STANDARD, "3+5*7", **row).reward == 0.0
        assert verdict(LEFT_TO_RIGHT, "(3+5)*7", **row).status == "wrong"

    @pytest.mark.parametrize(
        ("completion", "reward", "status"),
        [
            ("7+5*3,3+5*7", 1.0, "ok"),
            ("3+5*7,7+5*3", 0.0, "wrong"),  # right before, but not at last
            ("3+5*7", 1.0, "ok"),
            ("7+5*3,3+5*7=56", 1.0, "ok"),
            ("7+5*3=56,3+5*7", 1.0, "ok"),  # what stands before is not read at all
            ("(((,3+5*7", 1.0, "ok"),
            ("3+5*7,", 0.0, "no_answer"),
            (",", 0.0, "no_answer"),
            ("3+5,*7", 0.0, "wrong"),
            ("3+5*7;7+5*3", 0.0, "wrong"),
            ("<answer>7+5*3,3+5*7</answer>", 1.0, "ok"),
            ("9" * 200_000 + ",3+5*7", 1.0, "ok"),
        ],
    )
    def test_of_several_attempts_the_last_is_judged(self, completion: str, reward: float, status: str) -> None:
        """(3 + 5) · 7 = 56, and (7 + 5) · 3 = 36."""
        verifier = rewards.load("countdown", {"precedence": "left_to_right", "separator": ","})
        found = verdict(verifier, completion, numbers=[3, 5, 7], target=56)
        assert (found.reward, found.status) == (reward, status)
        assert reward == 0.0 or found.answer == "3+5*7"

    def test_without_a_separator_there_is_one_attempt(self) -> None:
        assert verdict(LEFT_TO_RIGHT, "7+5*3,3+5*7", numbers=[3, 5, 7], target=56).status == "wrong"

    def test_division_is_exact(self) -> None:
        # 8 / (3 − 8/3) = 8 / (1/3) = 24, which floating point misses
        assert verdict(STANDARD, "8/(3-8/3)", numbers=[3, 3, 8, 8], target=24).reward == 1.0
        assert verdict(STANDARD, "7/2", numbers=[2, 7], target=3).reward == 0.0

    def test_division_by_zero_is_wrong(self) -> None:
        found = verdict(STANDARD, "7/(5-5)", numbers=[5, 5, 7], target=1)
        assert (found.reward, found.status, found.detail) == (0.0, "wrong", "a division by zero")

    @pytest.mark.parametrize("expression", ["3+5", "3+5+7+7", "3+3+5", "35+7", "3+5+70", "15", "3+5+7+0"])
    def test_the_numbers_must_be_the_given_ones(self, expression: str) -> None:
        total = sum(int(part) for part in expression.split("+"))
        assert verdict(STANDARD, expression, numbers=[3, 5, 7], target=total).status == "wrong"

    @pytest.mark.parametrize(
        "text",
        ["-3+5+7", "3+-5+7", "+3+5+7", "3+5+", "3 5 7", "3+5(7)", "(3+5+7", "3+5+7)", "()3+5+7", "3+5*", "3++5+7",
         "3+5+7=15=15", "3.0+5+7", "3+5+7 # done", "٣+5+7", "３+5+7", "3×5×7", "Answer: 3+5+7", "=15"],
    )  # fmt: skip
    def test_what_is_no_expression_is_wrong(self, text: str) -> None:
        found = verdict(STANDARD, text, numbers=[3, 5, 7], target=15)
        assert found.reward == 0.0
        assert found.status == ("no_answer" if text == "=15" else "wrong")

    def test_at_most_64_tokens(self) -> None:
        # 32 ones and 31 signs are 63 tokens; a pair of parentheses makes 65
        sum_of_ones = "+".join(["1"] * 32)
        row = {"numbers": [1] * 32, "target": 32}
        assert MAX_TOKENS == 64
        assert verdict(STANDARD, sum_of_ones, **row).reward == 1.0
        assert verdict(STANDARD, f"({sum_of_ones})", **row).detail == "more than 64 tokens"

    @pytest.mark.parametrize(
        ("completion", "answer"),
        [
            ("3+5+7", "3+5+7"),
            ("let me see\n3*5*7\n\n 3 + 5 + 7 = 15 \n", "3+5+7"),
            ("<answer>3*5*7</answer> no: <answer>\n7+5+3\n</answer> done", "7+5+3"),
            ("<think><answer>3*5*7</answer></think>\n03+5+7", "3+5+7"),
        ],
    )
    def test_where_the_answer_is_read(self, completion: str, answer: str) -> None:
        found = verdict(STANDARD, completion, numbers=[7, 5, 3], target=15)
        assert (found.reward, found.status, found.answer) == (1.0, "ok", answer)

    @pytest.mark.parametrize("completion", ["", " \n ", "<answer> </answer>", "<think>\n3+5+7"])
    def test_no_answer(self, completion: str) -> None:
        found = verdict(STANDARD, completion, numbers=[3, 5, 7], target=15)
        assert (found.reward, found.status) == (0.0, "no_answer")

    @pytest.mark.parametrize("row", [{"numbers": [], "target": 1}, {"numbers": ["3"], "target": 3}])
    def test_a_malformed_row_has_no_reward(self, row: dict[str, Any]) -> None:
        found = verdict(STANDARD, "3", **row)
        assert (found.reward, found.status) == (None, "unparseable_gold")

    def test_gold_is_the_solution_where_there_is_one(self) -> None:
        assert STANDARD.gold({"numbers": [3], "target": 3, "solution": "3"}) == "3"
        assert STANDARD.gold({"numbers": [3], "target": 3}) is None

    @settings(deadline=None)
    @given(st.data())
    def test_agrees_with_a_fold_over_fractions(self, data: st.DataObject) -> None:
        numbers = data.draw(st.lists(st.integers(0, 20), min_size=2, max_size=6))
        signs = data.draw(st.lists(st.sampled_from("+-*/"), min_size=len(numbers) - 1, max_size=len(numbers) - 1))
        value = Fraction(numbers[0])
        defined = True
        for sign, right in zip(signs, numbers[1:], strict=True):
            if sign == "/":
                defined = defined and right != 0
                value /= right or 1
            else:
                value = {"+": value + right, "-": value - right, "*": value * right}[sign]
        text = "".join(itertools.chain.from_iterable(zip(map(str, numbers), [*signs, ""], strict=True)))
        target = int(value)  # truncated: a value that is no integer must be wrong
        correct = defined and value == target
        assert verdict(LEFT_TO_RIGHT, text, numbers=numbers, target=target).reward == float(correct)


class TestMath:
    @pytest.mark.parametrize(
        ("gold", "answer"),
        [
            ("46", "46"),
            ("46", "046"),
            ("1000", "1,000"),
            ("1{,}000", "1000"),
            ("1/2", r"\dfrac12"),
            (r"\frac{1}{2}", "0.50"),
            ("-3/4", r"\frac{-3}{4}"),
            (r"\frac{3}{-4}", "-.75"),
            ("1½", r"1\frac{1}{2}"),
            ("4", "2²"),
            ("x^{-1}", "x⁻¹"),
            ("-5", "−5"),
            ("5", "x = 5"),
            ("5", "$5$."),
            ("5", r"5\text{ cm}"),
            (r"2\pi", r"2 \pi"),
            (r"3 \times 10^8", "300000000"),
            (r"\sqrt{8}", r"2\sqrt{2}"),
            ("(1,2]", r"\left(1, 2\right]"),
            (r"\{1,2\}", r"\{2, 1\}"),
            (r"(-\infty, 3) \cup (5, \infty)", "(-∞,3)∪(5,∞)"),
            (r"\text{Tuesday}", "tuesday"),
            ("(C)", "C"),
            ("x^2+2x+1", "(x+1)^2"),
            (r"\cos\theta\sin\theta", r"\sin \theta \cos \theta"),
            (r"\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
            ("10!", "3628800"),
            (r"\binom{5}{2}", "10"),
            (r"The answer is $\boxed{7}$.", "7"),
        ],
    )
    def test_equal(self, gold: str, answer: str) -> None:
        assert verdict(MATH, rf"So \boxed{{{answer}}}.", answer=gold).reward == 1.0
        assert verdict(MATH, MATH.gold({"answer": gold}) or "", answer=gold).reward == 1.0

    @pytest.mark.parametrize(
        ("gold", "answer"),
        [
            (r"2\pi", "2"),  # what TRL's parser makes of the gold
            (r"3 \times 10^8", "10^8"),
            ("22", "2²"),
            ("11/2", "1½"),
            ("12", "1 2"),
            ("1/3", "0.333"),
            (r"\sqrt{8}", r"2\sqrt{3}"),
            ("(1,2]", "[1,2]"),
            ("(1,2)", "(2,1)"),
            ("2^{2024}", "2^{2025}"),
            (r"\text{Tuesday}", "Wednesday"),
            ("5", "5, 7"),
            ("5", r"5 \text{ or } 7"),
            ("5", "7｝ ＼boxed｛5"),
            ("x^2+2x+1", "(x+1)^3"),
        ],
    )
    def test_different(self, gold: str, answer: str) -> None:
        found = verdict(MATH, rf"\boxed{{{answer}}}", answer=gold)
        assert (found.reward, found.status) == (0.0, "wrong")

    @pytest.mark.parametrize(
        ("completion", "answer"),
        [
            (r"\boxed{1} or \boxed{5}", "5"),
            (r"\boxed{5}, or \boxed{4", "5"),
            (r"\boxed {5}", "5"),
            (r"} \boxed{\boxed{5}} {", "5"),
            (r"<think>\boxed{1}</think> \boxed{5}", "5"),
            (r"\boxed{\frac{10}{2}}", "5"),
            ("5", "5"),
            ("<think>2+3</think>\n5\n", "5"),
        ],
    )
    def test_where_the_answer_is_read(self, completion: str, answer: str) -> None:
        found = verdict(MATH, completion, answer="5")
        assert (found.reward, found.answer) == (1.0, answer)

    @pytest.mark.parametrize(
        "completion", ["", "the answer is 5", r"\boxed{}", r"\boxed{5", r"<think>\boxed{5}", r"\boxed{1}</think>"]
    )
    def test_no_answer(self, completion: str) -> None:
        found = verdict(MATH, completion, answer="5")
        assert (found.reward, found.status) == (0.0, "no_answer")

    @pytest.mark.parametrize("gold", ["", "  ", "$.$", r"\frac{1}{", "1}{2", None, True, ["5"]])
    def test_unparseable_gold_has_no_reward(self, gold: Any) -> None:
        found = verdict(MATH, r"\boxed{5}", answer=gold)
        assert (found.reward, found.status) == (None, "unparseable_gold")

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            ("9^{9^9}", "tower"),
            ("9^ {9 ^9}", "tower"),
            ("x^{100000}", "exponent"),
            ("x^{99999}", None),
            ("(x^{999})^{999}", "exponent"),
            ("(x^2+1)^{10}", None),
            ("10000!", "factorial"),
            ("9999!", None),
            ("(2n+1)!", None),
            ("(10^3)!", "factorial"),
            ("a != b", None),
            (r"\binom{9999}{10}", None),
            (r"\binom{10000}{10}", "binomial"),
            ("1" * 60 + "x", None),
            ("1" * 61 + "x", "consecutive digits"),
            ("(" * 20 + "x" + ")" * 20, None),
            ("(" * 21 + "x" + ")" * 21, "nested"),
            (r"\int_0^1 x dx", "integral"),
        ],
    )
    def test_the_guard(self, answer: str, reason: str | None) -> None:
        refusal = math.refuse(math.normalise(answer))
        assert (refusal is None) if reason is None else (refusal is not None and reason in refusal)

    def test_a_guarded_answer_is_counted_apart(self) -> None:
        found = verdict(MATH, r"\boxed{9^{9^9}}", answer="5")
        assert (found.reward, found.status) == (0.0, "resource")

    def test_a_gold_that_the_guard_refuses_is_compared_as_text(self) -> None:
        assert verdict(MATH, r"\boxed{9^{9^{9}}}", answer="9^{9^{9}}").reward == 1.0
        assert verdict(MATH, r"\boxed{x+1}", answer="9^{9^{9}}").status == "wrong"
        long_gold = "+".join(["x"] * 200)
        assert verdict(MATH, rf"\boxed{{{long_gold}}}", answer=long_gold).reward == 1.0

    def test_the_corpus(self) -> None:
        """Every pair as expected, and every gold answer correct itself, in one call."""
        assert len(PAIRS) >= 150 and sum(pair["hard"] for pair in PAIRS) >= 96
        rows = [{"answer": pair["gold"]} for pair in PAIRS]
        answers = [rf"So it is $\boxed{{{pair['answer']}}}$." for pair in PAIRS]
        found = MATH_SLOWLY.score(answers, rows)
        mistakes = [
            (pair["gold"], pair["answer"], verdict.status)
            for pair, verdict in zip(PAIRS, found, strict=True)
            if verdict.reward != float(pair["equal"])
        ]
        assert not mistakes
        golds = MATH.score([MATH.gold(row) or "" for row in rows], rows)
        assert {verdict.status for verdict in golds} == {"ok"}

    @pytest.mark.parametrize("options", [{}, {"rounding": 3, "units": "ignored", "order": "ignored"}])
    def test_no_answer_chooses_to_go_unjudged(self, options: dict[str, Any]) -> None:
        """Sympy raises where the imaginary unit is compared; a completion without a reward would be spared a zero."""
        answers = ["i<3", "i>x", r"\max(i,3)", r"\min(i,x)", r"i\ge i", r"i\cdot\infty<5", r"\lfloor i x\rfloor"]
        golds = ["5", "x<3", "2i", r"\{1,2\}", r"(-\infty,4)", r"\begin{pmatrix}i&1\end{pmatrix}"]
        pairs = list(itertools.product(answers, golds))
        found = rewards.load("math", {**options, "deadline": 60.0}).score(
            [rf"\boxed{{{answer}}}" for answer, _ in pairs], [{"answer": gold} for _, gold in pairs]
        )
        assert {(verdict.reward, verdict.status) for verdict in found} == {(0.0, "wrong")}

    def test_no_attack_is_executed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)  # the workers' folder as well
        attacks = [attack for attack in MATH_ATTACKS if any(word in attack for word in ("evil", "open(", "import"))]
        assert len(attacks) >= 6
        attacks += [rf"\boxed{{{attack}}}" for attack in attacks]
        assert {found.reward for found in MATH.score(attacks, [{"answer": "5"}] * len(attacks))} == {0.0}
        assert not list(tmp_path.iterdir())

    def test_the_trainers_process_never_imports_what_reads_model_text(self) -> None:
        program = (
            "import sys; from posttrain import rewards\n"
            "if __name__ == '__main__':\n"
            "    found = rewards.load('math').score(['\\\\boxed{x+1}', 'y'], [{'answer': '1+x'}] * 2)\n"
            "    assert [each.reward for each in found] == [1.0, 0.0]\n"
            "    assert not {'sympy', 'math_verify', 'antlr4', 'torch'} & set(sys.modules)"
        )
        finish([sys.executable, "-c", program])

    def test_a_gold_answer_may_be_a_float(self) -> None:
        for gold, answer in ((1e-07, r"10^{-7}"), (1e22, r"10^{22}"), (2.5e-5, "0.000025"), (0.5, r"\frac12")):
            assert verdict(MATH, rf"\boxed{{{answer}}}", answer=gold).reward == 1.0

    @pytest.mark.parametrize("boxes", ["last", "reject"])
    def test_boxes_by_the_thousand(self, boxes: str) -> None:
        verifier = rewards.load("math", {"boxes": boxes})
        start = worked()
        for completion, status in (
            (r"\boxed{}" * 10_000, "no_answer"),
            (r"\boxed{6}" * 10_000, "wrong"),
            (r"\boxed{5}" * 9_999 + r"\boxed{6}", "wrong"),
            (r"\boxed{6}" * 9_999 + r"\boxed{5}", "wrong" if boxes == "reject" else "ok"),
            (r"\boxed{" * 10_000 + "6" + "}" * 10_000, "resource"),
            (r"\boxed{5}</think>" * 3_000, "no_answer"),
            (r"\boxed{5}" + "<think>" * 10_000, "no_answer"),
            ("\\" * 100_000 + r"boxed{5}", "no_answer"),
            (r"\boxed{5" + "{" * 10_000, "no_answer"),
            (r"\boxed\{5\}", "no_answer"),
            (r"\fbox{5}", "no_answer"),
        ):
            assert verdict(verifier, completion, answer="5").status == status, completion[:40]
        assert worked() - start < 5.0

    def test_attacks_of_the_corpus_cost_nobody_else_the_verdict(self) -> None:
        assert len(MATH_ATTACKS) >= 64
        verifier = rewards.load("math", {"deadline": 1.0})
        correct, wrong = (r"\boxed{(x+1)^2}", "x^2+2x+1"), (r"\boxed{x^2}", "2x")
        pairs = [
            pair for attack in MATH_ATTACKS for pair in ((rf"\boxed{{{attack}}}", "5"), correct, (attack, "5"), wrong)
        ]
        found = verifier.score([answer for answer, _ in pairs], [{"answer": gold} for _, gold in pairs])
        assert {verdict.reward for verdict in found[::2]} == {0.0}
        assert {verdict.reward for verdict in found[1::4]} == {1.0}
        assert {verdict.reward for verdict in found[3::4]} == {0.0}
        assert {verdict.status for verdict in found[3::4]} == {"wrong"}
        assert "timeout" in {verdict.status for verdict in found}  # some pass the guard
        assert {verdict.seconds for verdict in found if verdict.status == "timeout"} == {1.0}

    @pytest.mark.parametrize(
        ("options", "gold", "answer", "default", "expected"),
        [
            ({"percent": "value"}, r"50\%", "50", 1, 0),
            ({"percent": "value"}, r"50\%", "0.5", 1, 1),
            ({"percent": "value"}, "50", r"50\%", 1, 0),
            ({"percent": "value"}, r"50\%", r"50\%", 1, 1),
            ({"percent": "value"}, r"\sqrt{2}\%", r"\frac{\sqrt{2}}{100}", 1, 1),
            ({"units": "required"}, r"5\text{ cm}", "5", 1, 0),
            ({"units": "required"}, "5", r"5\text{ cm}", 1, 0),
            ({"units": "required"}, r"5\text{ cm}", "5 centimeters", 1, 1),
            ({"units": "required"}, r"5\text{ cm}^2", r"5\text{ sq cm}", 1, 1),
            ({"units": "required"}, r"5\text{ m/s}", "5 meters per second", 1, 1),
            ({"units": "ignored"}, r"5\text{ cm}", r"5\text{ m}", 0, 1),
            ({"units": "ignored"}, "101_2", "101_3", 0, 1),
            ({"units": "required"}, r"4:30\text{ PM}", "4:30", 1, 0),
            ({"units": "required"}, r"4:30\text{ PM}", r"4:30\text{ p.m.}", 1, 1),
            ({"units": "ignored"}, r"4:30\text{ PM}", r"4:30\text{ a.m.}", 0, 1),
            ({"units": "ignored"}, r"4:30\text{ PM}", r"2:15\text{ p.m.}", 0, 0),
            ({"units": "ignored"}, r"3\mathrm{i}", "3", 0, 0),
            ({"units": "ignored"}, "€5", "£5", 0, 1),
            ({"boxes": "reject"}, "5", r"5} or \boxed{5", 1, 1),
            ({"boxes": "reject"}, "5", r"5.} or \boxed{ 5 ", 1, 1),
            ({"boxes": "reject"}, "5", r"6} or \boxed{5", 1, 0),
            ({"boxes": "reject"}, "5", r"\boxed{5}", 1, 1),
            ({"rounding": 3}, "1/3", "0.333", 0, 1),
            ({"rounding": 3}, "1/3", "0.33", 0, 0),  # off by 0.0033, and half a unit of the third digit is 0.0005
            ({"rounding": 3}, r"\pi", "3.14", 0, 1),
            ({"rounding": 3}, r"\pi", "3.15", 0, 0),
            ({"rounding": 3}, r"\sqrt{2}", "1.41", 0, 1),
            ({"rounding": 2}, "1234", "1180", 0, 0),  # half a unit of the second digit is 50
            ({"rounding": 2}, "1234", "1190", 0, 1),
            ({"rounding": 2}, "0", "0.0001", 0, 0),
            ({"rounding": 2}, "x", "y", 0, 0),
            ({"rounding": 4}, r"\frac{1+\sqrt5}{2}", "1.618", 0, 1),
            ({"order": "ignored"}, "(1,2)", "(2,1)", 0, 1),
            ({"order": "ignored"}, "(1,2)", "(2,2)", 0, 0),
            ({"order": "strict"}, "1,2", "2,1", 1, 0),
            ({"order": "strict"}, r"\{1,2\}", r"\{2,1\}", 1, 1),
            ({"order": "strict"}, "1,2", r"\{2,1\}", 1, 1),
        ],
    )
    def test_policies(self, options: dict[str, Any], gold: str, answer: str, default: int, expected: int) -> None:
        completion = rf"\boxed{{{answer}}}"
        assert verdict(MATH_SLOWLY, completion, answer=gold).reward == float(default)
        found = verdict(rewards.load("math", {**options, "deadline": 60.0}), completion, answer=gold)
        assert found.reward == float(expected)

    def test_boxes_in_the_thought_are_no_answers(self) -> None:
        verifier = rewards.load("math", {"boxes": "reject"})
        assert verdict(verifier, r"<think>\boxed{6}</think>\boxed{5}", answer="5").reward == 1.0
        found = verdict(verifier, r"\boxed{6} \boxed{5}", answer="5")
        assert (found.status, found.detail) == ("wrong", "several boxes that differ")

    def test_what_is_exact_needs_no_worker(self) -> None:
        for gold, answer, expected in [
            ("46", "47", 0.0),
            (r"\sqrt{8}", r"2\sqrt{2}", 1.0),
            (r"\frac{\sqrt{6}}{2}", r"\sqrt{\frac{3}{2}}", None),
            (r"\frac{3\sqrt{2}}{2}", r"\frac{3}{\sqrt{2}}", 1.0),
            (r"2\pi", r"\frac{4}{2}\pi", 1.0),
            (r"\frac{32\pi}{3}", r"10\frac{2}{3}\pi", 1.0),
            (r"\frac{20\pi}{3}", r"10\frac{2}{3}\pi", 0.0),
            (r"4:30\text{ p.m.}", r"2:15\text{ p.m.}", 0.0),
            (r"(3,-4)", r"P(3,-4)", 1.0),
            (r"2\pi", r"2\sqrt{2}", 0.0),
            (r"-\sqrt{2}", r"\sqrt{2}", 0.0),
            (r"0\pi", "0", 1.0),
            (r"\pi/2", r"\frac{\pi}{2}", 1.0),
            (r"1/2\pi", r"\frac{\pi}{2}", None),  # may mean either
            (r"\{1, \frac12\}", r"0.5, 1", 1.0),
            (r"\{1, 2\}", r"1, 2, 3", 0.0),
            ("5", "x+1", None),
        ]:
            found = MATH.decide(rf"\boxed{{{answer}}}", {"answer": gold})
            assert (found and found.reward) == expected, (gold, answer)

    def test_works_off_the_main_thread(self) -> None:
        found: list[Verdict] = []
        thread = threading.Thread(target=lambda: found.append(verdict(MATH, r"\boxed{y(y+1)}", answer="y^2+y")))
        thread.start()
        thread.join()
        assert found[0].reward == 1.0

    @settings(deadline=None)
    @given(st.integers(-(10**6), 10**6), st.integers(1, 10**6))
    def test_fractions_are_compared_exactly(self, top: int, bottom: int) -> None:
        answer = rf"\boxed{{\frac{{{2 * top}}}{{{2 * bottom}}}}}"
        assert verdict(MATH, answer, answer=f"{top}/{bottom}").reward == 1.0
        assert verdict(MATH, answer, answer=f"{top}/{bottom + 1}").reward == float(top == 0)

    @settings(deadline=None)
    @given(st.text(max_size=120))
    def test_no_text_makes_it_fail(self, text: str) -> None:
        assert verdict(MATH, text, answer="5").reward in (0.0, 1.0)
        assert verdict(STANDARD, text, numbers=[3, 5], target=8).reward in (0.0, 1.0)


class TestFormat:
    @pytest.mark.parametrize(
        ("options", "good", "bad"),
        [
            (
                {},
                ["<think>a</think><answer>b</answer>", " \n<think>a</think>\n\n<answer>b</answer>\n"],
                [
                    "",
                    "<think></think><answer>b</answer>",
                    "<think>a</think><answer> </answer>",
                    "x<think>a</think><answer>b</answer>",
                    "<think>a</think>x<answer>b</answer>",
                    "<think>a</think><answer>b</answer>x",
                    "<think>a<answer>b</answer></think>",
                    "<think>a</think><think>a</think><answer>b</answer>",
                    "<answer>b</answer><think>a</think>",
                    "a</think><answer>b</answer>",
                    "<think>a</think><answer>b",
                    "<think>a</think>b",
                ],
            ),
            (
                {"think_in_prompt": True},
                ["a</think><answer>b</answer>"],
                ["</think><answer>b</answer>", "<think>a</think><answer>b</answer>"],
            ),
            ({"answer_tag": False}, ["<think>a</think> b"], ["<think>a</think> ", "b", "<think>a</think><answer>b"]),
            (
                {"think": False},
                ["<answer>b</answer>", "because\n<answer>b</answer>"],
                ["<answer></answer>", "<answer>b</answer> because", "<think>a</think><answer>b</answer>"],
            ),
        ],
    )
    def test_parts_in_order_and_not_empty(self, options: dict[str, bool], good: list[str], bad: list[str]) -> None:
        verifier = rewards.load("format", options)
        assert [found.reward for found in verifier.score(good, [{}] * len(good))] == [1.0] * len(good)
        assert [found.reward for found in verifier.score(bad, [{}] * len(bad))] == [0.0] * len(bad)

    def test_it_shapes_and_does_not_judge(self) -> None:
        assert not rewards.load("format").accuracy
        assert STANDARD.accuracy and MATH.accuracy

    @pytest.mark.parametrize(
        ("options", "reason"),
        [({"think": False, "answer_tag": False}, "nothing to check"),
         ({"think": False, "think_in_prompt": True}, "think_in_prompt has no effect")],
    )  # fmt: skip
    def test_options_without_effect_are_refused(self, options: dict[str, bool], reason: str) -> None:
        with pytest.raises(UserError, match=f"The reward 'format'.*{reason}"):
            rewards.load("format", options)


class TestContract:
    def test_a_completion_is_text_or_messages(self) -> None:
        messages: list[dict[str, Any]] = [
            {"role": "assistant", "content": "3+"},
            {"role": "tool", "content": "9"},
            {"role": "assistant", "content": None},
            {"role": "assistant", "content": "5"},
        ]
        assert text_of(messages) == text_of("3+5") == "3+5"
        assert STANDARD.score([messages], [{"numbers": [3, 5], "target": 8}])[0].reward == 1.0

    def test_of_a_message_in_parts_the_text_counts(self) -> None:
        parts = [{"type": "image"}, {"type": "text", "text": r"\boxed"}, "{", {"type": "text", "text": "5}"}]
        assert text_of([{"role": "assistant", "content": parts}]) == r"\boxed{5}"
        assert text_of([{"role": "assistant", "content": []}, {"role": "assistant"}]) == text_of([]) == ""

    @pytest.mark.parametrize("name", ["math", "sql", "countdown", "choice", "knights_knaves", "format", "exact"])
    def test_strange_completions_cost_nobody_else_the_verdict(self, name: str) -> None:
        """A model's silence is wrong; what no model can have said is a failure of the infrastructure."""
        rows: dict[str, tuple[str, dict[str, Any]]] = {
            "math": ("x+1", {"answer": "1+x"}),
            "sql": ("SELECT 1", {"db": "nowhere", "answer": "SELECT 1"}),
            "countdown": ("3+5", {"numbers": [3, 5], "target": 8}),
            "choice": ("A", {"choices": ["1", "2"], "answer": "A"}),
            "knights_knaves": ("A: knight", {"people": ["A"], "solution": "K"}),
            "format": ("<think>a</think><answer>b</answer>", {}),
            "exact": ("5", {"answer": "5"}),
        }
        good, row = rows[name]
        good = rf"\boxed{{{good}}}" if name == "math" else good
        silent: list[Any] = [
            "",
            [],
            [{"role": "assistant", "content": None}],
            [{"role": "assistant", "content": [{"type": "image"}]}],
            [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
            [{"role": "tool", "content": good}, {"role": "user", "content": good}, {"content": good}],
        ]
        broken: list[Any] = [None, 5, [None], ["text"], [[]], b"text", [{"role": "assistant", "content": 5}]]
        batch = [each for strange in silent + broken for each in (strange, good)]
        found = rewards.load(name).score(batch, [row] * len(batch))
        usual = found[1]
        assert usual.reward == (None if name == "sql" else 1.0)
        assert [(each.reward, each.status) for each in found[1::2]] == [(usual.reward, usual.status)] * len(batch[1::2])
        assert {each.reward for each in found[: 2 * len(silent) : 2]} == ({None} if name == "sql" else {0.0})
        assert {(each.reward, each.status) for each in found[2 * len(silent) :: 2]} == {(None, "verifier_error")}

    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            ("a", "a"),
            ("<think>a</think>b", "b"),
            ("a</think>b</think>c", "c"),
            ("<think>a", None),
            ("<think>a</think><think>b", None),
            ("<think>a</think>b<think>", None),
        ],
    )
    def test_after_thinking(self, text: str, answer: str | None) -> None:
        assert after_thinking(text) == answer

    def test_a_verifier_that_fails_has_no_reward_and_stops_nothing(self) -> None:
        class Broken(Verifier):
            name = "broken"

            def verify(self, completion: str, row: Any) -> Verdict:
                if completion == "bad":
                    raise RecursionError("too deep")
                return Verdict(1.0, "ok")

        for verifier in (Broken(), MATH):
            (found,) = verifier.score([["no message"]], [{"answer": "5"}])  # type: ignore[list-item]
            assert (found.reward, found.status) == (None, "verifier_error")
        first, second = Broken().score(["bad", "good"], [{}, {}])
        assert (first.reward, first.status, first.detail) == (None, "verifier_error", "RecursionError: too deep")
        assert (second.reward, second.status) == (1.0, "ok")

    def test_trl_protocol(self) -> None:
        extra: dict[str, list[Any]] = {}
        metrics: dict[str, float] = {}
        function = RewardFunction(MATH)
        found = function(
            prompts=[None] * 4,
            completions=[[{"role": "assistant", "content": text}] for text in ("5", r"\boxed{6}", "", "5")],
            answer=["5", "5", "5", ""],
            completion_ids=[[1]] * 4,
            trainer_state=None,
            log_extra=extra.__setitem__,
            log_metric=metrics.__setitem__,
        )
        assert found == [1.0, 0.0, 0.0, None]
        assert extra == {"math_status": ["ok", "wrong", "no_answer", "unparseable_gold"]}
        assert metrics.pop("rewards/math/seconds_p50") <= metrics.pop("rewards/math/seconds_p99") < 5.0
        assert metrics == {"rewards/math/failures": 0.25, "rewards/math/timeouts": 0.0, "rewards/math/resource": 0.0}
        assert function([None], ["5"], answer=["5"]) == [1.0]

    def test_a_missing_column_is_named(self) -> None:
        with pytest.raises(UserError, match=r"The reward 'math' needs the data column 'answer'.*they have target"):
            RewardFunction(MATH)([None], ["5"], target=[5])

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("maths", {}, "There is no reward 'maths'; did you mean 'math'?"),
            ("countdown", {"precedenc": "standard"}, "no option 'precedenc'; did you mean 'precedence'?"),
            ("countdown", {"precedence": "rtl"}, "The option 'precedence' of the reward 'countdown' is wrong"),
            ("countdown", {"separator": "="}, "separator '=' is empty or part of what expressions are written in"),
            ("countdown", {"separator": ""}, "separator '' is empty or part"),
            ("format", {"think": 1}, "The option 'think' of the reward 'format' is wrong"),
        ],
    )
    def test_mistakes_name_the_nearest_option(self, name: str, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError) as error:
            rewards.load(name, options)
        assert message in str(error.value)

    def test_own_functions(self) -> None:
        assert rewards.load_function("math:floor")(2.5) == 2  # type: ignore[comparison-overlap]
        for reference, message in [
            ("math.floor", "write it as module:function"),
            ("math:flor", "cannot be imported"),
            ("no_such_module:f", "cannot be imported"),
            ("math:pi", "is a float, not a function"),
        ]:
            with pytest.raises(UserError, match=message):
                rewards.load_function(reference)
