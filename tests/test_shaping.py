"""Rewards that shape: length in three shapes, repetition, language; groups; and what no text can do to a verifier."""

from __future__ import annotations

import importlib.util
import json
import math
import pickle
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import registry, rewards
from posttrain.errors import UserError
from posttrain.rewards import RewardFunction, Verdict, answer_part, require_whole_groups
from posttrain.rewards.instructions import NAMES
from posttrain.rewards.language import prose
from posttrain.rewards.length import cosine, group_relative, overlong
from posttrain.rewards.repetition import repeated_share
from tests.processes import launch

OVERLONG = {"max_tokens": 20, "cache": 4}
COSINE = {"shape": "cosine", "max_tokens": 100, "verifier": "exact"}
GROUP = {"shape": "group_relative", "group_size": 4, "verifier": "exact"}


def ids(*counts: int) -> list[list[int]]:
    return [[7] * count for count in counts]


def of_trl(name: str) -> Any:
    """A reward function of TRL, read from its file: importing TRL takes seconds."""
    package = importlib.util.find_spec("trl")
    assert package is not None and package.origin is not None
    path = Path(package.origin).parent / "rewards" / "other_rewards.py"
    spec = importlib.util.spec_from_file_location("trl_other_rewards", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def scored(verifier: Any, answers: Sequence[str], counts: Sequence[int], gold: str = "5") -> list[Verdict]:
    rows = [{"answer": gold, "completion_ids": tokens} for tokens in ids(*counts)]
    found: list[Verdict] = verifier.score(answers, rows)
    return found


class TestOverlong:
    def test_by_hand(self) -> None:
        """0 up to 20 − 4 = 16 tokens, then a quarter less each, and −1 from 20 on."""
        expected = {0: 0.0, 16: 0.0, 17: -0.25, 18: -0.5, 19: -0.75, 20: -1.0, 21: -1.0, 500: -1.0}
        found = scored(rewards.load("length", OVERLONG), ["x"] * 8, list(expected))
        assert [verdict.reward for verdict in found] == list(expected.values())
        assert [verdict.status for verdict in found] == ["ok"] * 2 + ["wrong"] * 6
        assert [verdict.answer for verdict in found] == [str(count) for count in expected]

    def test_the_values_of_dapo(self) -> None:
        """Expected length 16,384 and a cache of 4,096: at 18,432 half of the cache is used."""
        assert overlong(16384, 20480, 4096) == 0.0
        assert overlong(18432, 20480, 4096) == -0.5
        assert math.copysign(1.0, overlong(1, 20480, 4096)) == 1.0  # no −0

    def test_agrees_with_trl(self) -> None:
        """TRL's function, for all lengths up to beyond the limit; read from its file, which imports nothing."""
        penalty = of_trl("get_soft_overlong_punishment")(max_completion_len=300, soft_punish_cache=70)
        counts = list(range(0, 330))
        ours = scored(rewards.load("length", {"max_tokens": 300, "cache": 70}), ["x"] * len(counts), counts)
        assert [v.reward for v in ours] == pytest.approx(penalty(completion_ids=ids(*counts)))

    def test_a_cache_may_be_all_and_no_more(self) -> None:
        assert scored(rewards.load("length", {"max_tokens": 4, "cache": 4}), ["x"], [1])[0].reward == -0.25
        with pytest.raises(UserError, match="cache 5 exceeds max_tokens 4: make it smaller"):
            rewards.load("length", {"max_tokens": 4, "cache": 5})


class TestCosine:
    def test_by_hand(self) -> None:
        """½ (1 + cos) is 1, ½ (1 + √½), ½ and ½ (1 − √½) at 0, a quarter, half and three quarters of the way."""
        high, low = 0.5 * (1 + math.sqrt(0.5)), 0.5 * (1 - math.sqrt(0.5))
        right = scored(rewards.load("length", COSINE), ["5"] * 5, [0, 25, 50, 75, 100])
        assert [v.reward for v in right] == pytest.approx([2.0, 1 + high, 1.5, 1 + low, -10.0])
        wrong = scored(rewards.load("length", COSINE), ["6"] * 5, [0, 25, 50, 75, 101])
        assert [v.reward for v in wrong] == pytest.approx([-10.0, -10 * high, -5.0, -10 * low, -10.0])

    def test_the_defaults_are_those_of_the_authors(self) -> None:
        """Their script for section 4.2: correct 2 to 1, wrong −10 to 0, exceeding −10."""
        options = rewards.load("length", COSINE).options
        assert (options.correct_short, options.correct_long) == (2.0, 1.0)
        assert (options.wrong_short, options.wrong_long, options.exceeding) == (-10.0, 0.0, -10.0)

    def test_right_falls_and_wrong_rises_with_length(self) -> None:
        right = [cosine(n, 100, short=2.0, long=1.0) for n in range(100)]
        wrong = [cosine(n, 100, short=-10.0, long=0.0) for n in range(100)]
        assert right == sorted(right, reverse=True) and wrong == sorted(wrong)
        assert min(right) > max(wrong)

    def test_what_was_not_judged_has_no_reward_and_its_status(self) -> None:
        found = scored(rewards.load("length", COSINE), ["5", "", "6"], [3, 3, 3], gold="")
        assert [(v.reward, v.status) for v in found] == [(None, "unparseable_gold")] * 3
        found = scored(rewards.load("length", COSINE), ["5", "", "6"], [50, 50, 50])
        assert [(v.reward, v.status) for v in found] == [
            (pytest.approx(1.5), "ok"),
            (pytest.approx(-5.0), "no_answer"),
            (pytest.approx(-5.0), "wrong"),
        ]

    def test_an_isolated_judge_judges_in_its_workers(self) -> None:
        verifier = rewards.load("length", {**COSINE, "verifier": "math", "verifier_options": {"deadline": 60.0}})
        found = scored(verifier, [r"\boxed{(x+1)^2}", r"\boxed{9^{9^9}}"], [50, 50], gold="x^2+2x+1")
        assert [v.reward for v in found] == pytest.approx([1.5, -5.0])
        assert [v.status for v in found] == ["ok", "resource"]


class TestGroupRelative:
    def test_by_hand(self) -> None:
        """Lengths 2, 4, 6, 10: λ = ½ − (n − 2)/8 = ½, ¼, 0, −½; wrong answers get at most 0."""
        found = scored(rewards.load("length", GROUP), ["5", "6", "5", "6"], [2, 4, 6, 10])
        assert [v.reward for v in found] == [0.5, 0.0, 0.0, -0.5]
        found = scored(rewards.load("length", GROUP), ["6", "5", "6", "5"], [2, 4, 6, 10])
        assert [v.reward for v in found] == [0.0, 0.25, 0.0, -0.5]

    def test_equal_lengths_are_worth_nothing(self) -> None:
        found = scored(rewards.load("length", GROUP), ["5", "6", "5", ""], [3, 3, 3, 3])
        assert [v.reward for v in found] == [0.0] * 4

    def test_every_group_is_compared_with_itself(self) -> None:
        """Lengths of the second group are ten times those of the first, and make no difference."""
        found = scored(rewards.load("length", GROUP), ["5"] * 8, [1, 2, 3, 5, 10, 20, 30, 50])
        assert [v.reward for v in found[:4]] == [v.reward for v in found[4:]] == [0.5, 0.25, 0.0, -0.5]

    @given(st.lists(st.integers(0, 1000), min_size=1, max_size=8), st.data())
    def test_bounds_and_order(self, group: list[int], data: st.DataObject) -> None:
        first, second = sorted(data.draw(st.tuples(st.sampled_from(group), st.sampled_from(group))))
        for right in (True, False):
            low, high = (group_relative(count, group, right=right) for count in (second, first))
            assert -0.5 <= low <= high <= (0.5 if right else 0.0)

    @pytest.mark.parametrize(
        ("keys", "reason"),
        [
            (["a", "a", "b", "b"], "but was given 2 together"),  # half of each: the other half is in another process
            (["a"] * 8, "but was given 8 together"),  # num_generations = 8: half groups would be compared
            (["a", "b", "a", "b"], "but was given 1 together"),
            (["a"] * 4 + ["b"] * 2, "but was given 2 together"),
        ],
    )
    def test_a_group_that_is_not_whole_is_refused(self, keys: list[str], reason: str) -> None:
        function = RewardFunction(rewards.load("length", GROUP))
        columns = {"answer": ["5"] * len(keys), "completion_ids": ids(*range(len(keys)))}
        for by in ({"key": keys, "prompts": [None] * len(keys)}, {"prompts": keys}):
            with pytest.raises(UserError, match=f"compares 4 answers to a prompt.*{reason}.*num_generations"):
                function(completions=["5"] * len(keys), **columns, **by)

    def test_whole_groups_as_trl_gives_them(self) -> None:
        """Two prompts in this process, whole: the answers to one stand beside one another."""
        metrics: dict[str, float] = {}
        extra: dict[str, list[Any]] = {}
        function = RewardFunction(rewards.load("length", GROUP))
        found = function(
            prompts=[[{"role": "user", "content": text}] for text in "aaaabbbb"],
            completions=[[{"role": "assistant", "content": text}] for text in "56565555"],
            completion_ids=ids(2, 4, 6, 10, 1, 1, 1, 1),
            answer=["5"] * 8,
            trainer_state=None,
            log_extra=extra.__setitem__,
            log_metric=metrics.__setitem__,
        )
        assert found == [0.5, 0.0, 0.0, -0.5, 0.0, 0.0, 0.0, 0.0]
        assert function.__name__ == "length_group_relative"
        assert extra == {"length_group_relative_status": ["ok", "wrong", "ok", "wrong"] + ["ok"] * 4}
        assert metrics["rewards/length_group_relative/failures"] == 0.0

    def test_processes_that_hold_whole_groups_agree_with_one_that_holds_all(self) -> None:
        """What makes refusing enough: a group's rewards do not depend on what stands beside it."""
        verifier = rewards.load("length", GROUP)
        draw = random.Random(0)
        answers, counts = [draw.choice("56") for _ in range(32)], [draw.randint(1, 50) for _ in range(32)]
        whole = [v.reward for v in scored(verifier, answers, counts)]
        ranks = [scored(verifier, answers[i : i + 8], counts[i : i + 8]) for i in range(0, 32, 8)]
        assert [v.reward for rank in ranks for v in rank] == whole

    @pytest.mark.slow
    def test_two_processes_under_trl(self, tiny_model: str, tmp_path: Path) -> None:
        """Groups of 4: two whole ones in each process train; two processes with half a group each refuse, both."""
        for answers, said in ((8, ""), (2, "compares 4 answers to a prompt (group_size), but was given 2 together")):
            output = tmp_path / f"{answers}.json"
            launch(2, ["-m", "tests.two_groups", tiny_model, str(output), str(answers), "4"])
            found = json.loads(output.read_text())
            assert all(said in each and bool(each) == bool(said) for each in found["everyone"])
            assert len(found["history"]) == (0 if said else 1)

    def test_without_groups_anything_goes(self) -> None:
        require_whole_groups(rewards.load("exact"), ["a", "b", "a", "a"])
        with pytest.raises(UserError, match="6 completions are no whole number of groups"):
            scored(rewards.load("length", GROUP), ["5"] * 6, [1] * 6)


class TestLengthOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "the shape overlong needs max_tokens: add it"),
            ({"max_tokens": 4}, "the shape overlong needs cache"),
            ({"shape": "cosine", "max_tokens": 4}, "the shape cosine needs verifier"),
            ({"shape": "group_relative", "verifier": "exact"}, "the shape group_relative needs group_size"),
            ({**OVERLONG, "exceeding": -1.0}, "exceeding has no effect on the shape overlong: remove it"),
            ({**COSINE, "cache": 1}, "cache has no effect on the shape cosine"),
            ({**GROUP, "max_tokens": 9}, "max_tokens has no effect on the shape group_relative"),
            ({**GROUP, "group_size": 1}, "The option 'group_size' of the reward 'length' is wrong"),
            ({**OVERLONG, "cache": 0}, "The option 'cache' of the reward 'length' is wrong"),
            ({**COSINE, "correct_short": math.inf}, "The option 'correct_short'"),
            ({**COSINE, "verifier": "exakt"}, "did you mean 'exact'?"),
            ({**COSINE, "verifier": "format"}, "asks 'format' which answers are right, but that shapes"),
            ({**COSINE, "verifier_options": {"aftr": "="}}, "The reward 'exact' has no option 'aftr'"),
        ],
    )
    def test_mistakes(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError) as error:
            rewards.load("length", options)
        assert message in str(error.value)

    def test_tokens_come_from_whoever_samples(self) -> None:
        verifier = rewards.load("length", OVERLONG)
        assert (verifier.requires, verifier.sampled, verifier.accuracy) == ((), ("completion_ids",), False)
        with pytest.raises(UserError, match="needs the data column 'completion_ids'"):
            RewardFunction(verifier)([None], ["x"])
        (found,) = verifier.score(["x"], [{"completion_ids": None}])
        assert (found.reward, found.status) == (None, "verifier_error")
        assert RewardFunction(verifier)([None], ["x"], completion_ids=ids(18)) == [-0.5]

    def test_shapes_are_columns_of_their_own(self) -> None:
        names = [rewards.load("length", options).column for options in (OVERLONG, COSINE, GROUP)]
        assert names == ["length_overlong", "length_cosine", "length_group_relative"]


class TestRepetition:
    @pytest.mark.parametrize(
        ("text", "n", "reward"),
        [
            ("a b c a b c", 3, -0.25),  # abc bca cab abc: 3 distinct of 4
            ("A b, c! a B c?", 3, -0.25),  # neither case nor signs matter
            ("ha ha ha ha", 1, -0.75),
            ("ha ha ha ha", 3, -0.5),
            ("all words differ here", 1, 0.0),
            ("too short", 3, 0.0),
            ("", 3, 0.0),
            ("你好你好你", 2, -0.5),  # 你好 好你 你好 好你
        ],
    )
    def test_by_hand(self, text: str, n: int, reward: float) -> None:
        (found,) = rewards.load("repetition", {"n": n}).score([text], [{}])
        assert found.reward == reward
        assert found.status == ("ok" if reward == 0.0 else "wrong")

    def test_the_penalty_scales(self) -> None:
        (found,) = rewards.load("repetition", {"max_penalty": -0.2}).score(["a b c a b c"], [{}])
        assert (found.reward, found.answer) == (pytest.approx(-0.05), "0.2500")
        with pytest.raises(UserError, match="The option 'max_penalty'"):
            rewards.load("repetition", {"max_penalty": 0.5})

    def test_tokens(self) -> None:
        verifier = rewards.load("repetition", {"unit": "tokens", "n": 2})
        assert verifier.sampled == ("completion_ids",)
        (found,) = verifier.score(["nothing alike"], [{"completion_ids": [4, 5, 4, 5]}])  # 45 54 45
        assert found.reward == pytest.approx(-1 / 3)

    def test_tokens_agree_with_trl(self) -> None:
        draw = random.Random(0)
        texts = [[draw.randint(0, 3) for _ in range(draw.randint(0, 60))] for _ in range(200)]
        for n in (1, 3, 7):
            ours = rewards.load("repetition", {"unit": "tokens", "n": n, "max_penalty": -0.7})
            found = ours.score(["x"] * len(texts), [{"completion_ids": tokens} for tokens in texts])
            theirs = of_trl("get_repetition_penalty_reward")(ngram_size=n, max_penalty=-0.7)(completion_ids=texts)
            assert [v.reward for v in found] == pytest.approx(theirs)

    @given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 12))
    def test_agrees_with_a_set_of_tuples(self, units: list[int], n: int) -> None:
        grams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
        assert repeated_share(units, n) == (1 - len(set(grams)) / len(grams) if grams else 0.0)


class TestLanguage:
    @pytest.mark.parametrize(
        ("text", "language", "share"),
        [
            ("Hello, world 123!", "en", 1.0),
            ("Hello 世界", "en", 5 / 7),
            ("Hello 世界", "zh", 2 / 7),
            ("世界はきれい", "ja", 1.0),
            ("Привет all", "ru", 6 / 9),
            ("<think>世界</think>Hi", "en", 0.5),  # the thought counts
            ("so $世界$, $$世$$, \\(世\\), \\[世\\] and \\boxed{世}", "en", 1.0),
            ("so `世` and ```世\n世``` and https://a.b/世", "en", 1.0),
            ("$5 for 世", "en", 0.75),  # what is opened and never closed stays: f, o, r against 世
            ("世 \\frac \\alpha", "zh", 1.0),
            ("Ｈｉ", "en", 1.0),
        ],
    )
    def test_by_hand(self, text: str, language: str, share: float) -> None:
        (found,) = rewards.load("language", {"language": language}).score([text], [{}])
        assert found.reward == pytest.approx(share)
        assert found.status == ("ok" if share == 1.0 else "wrong")

    @pytest.mark.parametrize("text", ["", "123", "$x$", "`code`", "\\boxed{x}"])
    def test_no_letters_no_reward(self, text: str) -> None:
        (found,) = rewards.load("language", {"language": "en"}).score([text], [{}])
        assert (found.reward, found.status) == (0.0, "no_answer")

    def test_a_threshold_makes_it_one_or_nothing(self) -> None:
        verifier = rewards.load("language", {"language": "en", "threshold": 0.75})
        assert [v.reward for v in verifier.score(["Hello 世", "Hey 世", "Hi 世"], [{}] * 3)] == [
            1.0,
            1.0,
            0.0,
        ]  # 5/6 3/4 2/3

    def test_each_row_may_have_its_own(self) -> None:
        verifier = rewards.load("language")
        assert verifier.requires == ("language",)
        found = verifier.score(["Hi", "Hi", "Hi"], [{"language": code} for code in ("en", "zh", "xx")])
        assert [v.reward for v in found] == [1.0, 0.0, None]
        assert found[2].status == "unparseable_gold"
        with pytest.raises(UserError, match="there is no language 'english'"):
            rewards.load("language", {"language": "english"})

    def test_prose(self) -> None:
        assert prose("a `b` c $d$ e") == "a   c   e"
        assert prose("a $b") == "a b"


class TestLogicScale:
    def test_accuracy_stays_a_column_of_its_own(self) -> None:
        plain = rewards.load("knights_knaves")
        scaled = rewards.load("knights_knaves", {"scale": "logic_rl"})
        assert (plain.accuracy, scaled.accuracy) == (True, False)
        assert (RewardFunction(plain).__name__, RewardFunction(scaled).__name__) == (
            "knights_knaves",
            "knights_knaves_logic_rl",
        )
        assert plain.identity == {"name": "knights_knaves", "options": {"form": "words"}}  # stores stay what they are
        assert scaled.identity["options"] == {"form": "words", "scale": "logic_rl"}
        row = {"people": ["Alice", "Bob"], "solution": "KN"}
        assert scaled.gold(row) is None and plain.gold(row) is not None
        found = scaled.verify("x", {**row, "solution": "K"})
        assert (found.reward, found.status) == (None, "unparseable_gold")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"think_in_prompt": True}, "think_in_prompt has no effect without scale"),
            ({"scale": "logic_rl", "form": "symbols"}, "answers in symbols have none"),
            ({"scale": "logic"}, "The option 'scale' of the reward 'knights_knaves' is wrong"),
        ],
    )
    def test_mistakes(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError) as error:
            rewards.load("knights_knaves", options)
        assert message in str(error.value)


ROW: dict[str, Any] = {
    "answer": "A",
    "choices": ["46", "36", "56"],
    "people": ["Alice", "Bob"],
    "solution": "KN",
    "language": "en",
    "numbers": [3, 5],
    "target": 8,
    "completion_ids": [1, 2, 3],
    "instruction_id_list": [name for name in NAMES if name != "language:response_language"],
    "kwargs": [
        {
            "keywords:existence": {"keywords": ["a+", "b"]},
            "keywords:frequency": {"keyword": "aa", "frequency": 2, "relation": "at least"},
            "keywords:forbidden_words": {"forbidden_words": ["a", "("]},
            "keywords:letter_frequency": {"letter": "a", "let_frequency": 3, "let_relation": "less than"},
            "length_constraints:number_sentences": {"num_sentences": 3, "relation": "less than"},
            "length_constraints:number_paragraphs": {"num_paragraphs": 3},
            "length_constraints:number_words": {"num_words": 9, "relation": "at least"},
            "length_constraints:nth_paragraph_first_word": {
                "num_paragraphs": 2,
                "nth_paragraph": 2,
                "first_word": "a",
            },
            "detectable_content:number_placeholders": {"num_placeholders": 3},
            "detectable_content:postscript": {"postscript_marker": "P.S."},
            "detectable_format:number_bullet_lists": {"num_bullets": 3},
            "detectable_format:number_highlighted_sections": {"num_highlights": 3},
            "detectable_format:multiple_sections": {"section_spliter": "Section", "num_sections": 2},
            "combination:repeat_prompt": {"prompt_to_repeat": "aaa"},
            "startend:end_checker": {"end_phrase": "a"},
            "change_case:capital_word_frequency": {"capital_frequency": 3, "capital_relation": "at least"},
        }.get(name, {})
        for name in NAMES
        if name != "language:response_language"
    ],
}
PURE: list[tuple[str, dict[str, Any]]] = [
    ("choice", {}),
    ("choice", {"letters": 4}),
    ("exact", {}),
    ("format", {}),
    ("format", {"think": False}),
    ("instructions", {"mode": "loose", "score": "fraction", "max_repeated": 1.0}),
    ("knights_knaves", {}),
    ("knights_knaves", {"scale": "logic_rl"}),
    ("language", {"language": "en"}),
    ("length", OVERLONG),
    ("length", {**COSINE, "verifier": "choice"}),
    ("repetition", {}),
    ("repetition", {"n": 40}),
]
PIECES = [
    "a", "a ", ".", ". ", ".x", "\n", "\n\n", "[", "[]", "*", "* ", "***", "<<", ">>", "<<>>", "`", "```", "\\(", "$",
    "\\boxed{", "{", "}", "answer is ", "answer is A ", "option ", "choose ", "(", "(A)", "A or ", "A\n", "\ud800",
    "\u0000", "́", "ﷺ", "9", "世", "。", "A", "-", "'", "a-", ".\"", "<answer>", "</answer>", "<think>", "</think>",
    "https://", "e.g.", "p.", "Section ", "Alice is ", "is a knight, ", "Alice is a knight, Bob is a knave. ", "not ",
    "\U0001f600", "P.S.", "******", "\u202e", ";",
]  # fmt: skip

LONG = [
    "a ",
    ".",
    ".x",
    "\n",
    "[",
    "*",
    "<<",
    "`",
    "\\(",
    "\\boxed{",
    "answer is ",
    "\ud800",
    "\u0301",
    "世",
    "Alice is ",
    "(",
]
"""Those that patterns could begin with everywhere."""


@pytest.mark.parametrize(("name", "options"), PURE, ids=lambda value: value if isinstance(value, str) else "")
class TestNoVerifierFails:
    @settings(deadline=None, max_examples=40)
    @given(st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=30).map("".join))
    def test_on_any_text(self, name: str, options: dict[str, Any], text: str) -> None:
        verifier = rewards.load(name, options)
        (found,) = verifier.score([text], [ROW])
        assert found.reward is not None and math.isfinite(found.reward)
        assert found.status in ("ok", "wrong", "no_answer")
        assert replace(verifier.score([text], [ROW])[0], seconds=found.seconds) == found

    def test_on_200_000_characters(self, name: str, options: dict[str, Any]) -> None:
        """Pieces repeated; whatever is quadratic would take minutes here."""
        verifier = rewards.load(name, options)
        for piece in LONG:
            text = piece * (200_000 // len(piece)) + "x"
            start = time.thread_time()  # which other work on the machine does not move
            (found,) = verifier.score([text], [ROW])
            assert found.status in ("ok", "wrong", "no_answer"), (piece, found)
            assert time.thread_time() - start < 8.0, piece

    def test_work_grows_in_proportion(self, name: str, options: dict[str, Any]) -> None:
        """Twice the text is at most about twice the calls of Python functions, C's own included."""
        verifier = rewards.load(name, options)

        def calls(text: str) -> int:
            count = 0

            def tick(*_: Any) -> None:
                nonlocal count
                count += 1

            sys.setprofile(tick)
            try:
                verifier.verify(text, ROW)
            finally:
                sys.setprofile(None)
            return count

        for piece in LONG:
            few, many = (piece * (size // len(piece)) for size in (1500, 3000))
            calls(many)  # caches are warm from here on
            assert calls(many) <= 2.5 * calls(few) + 200, piece

    def test_listed_and_picklable(self, name: str, options: dict[str, Any]) -> None:
        verifier = rewards.load(name, options)
        assert len(registry.entry("reward", name).summary) > 20
        copy = pickle.loads(pickle.dumps(RewardFunction(verifier)))  # noqa: S301 - our own bytes
        assert copy.__name__ == verifier.column and copy.verifier.identity == verifier.identity
        first, second = (replace(one.verify("A", ROW), seconds=0.0) for one in (copy.verifier, verifier))
        assert first == second


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a", "a"),
        ("<think>a</think>b", "b"),
        ("<think>a", ""),
        ("a</think>b", "b"),  # the prompt ends in <think>
        ("a", "a"),  # there, a thought that was cut off: nothing tells it from an answer
        ("a <answer>b</answer> c <answer>d</answer> e", "d"),
        ("<answer>b", "<answer>b"),
        ("<think><answer>a</answer></think>b", "b"),
    ],
)
def test_answer_part(text: str, part: str) -> None:
    assert answer_part(text) == part
