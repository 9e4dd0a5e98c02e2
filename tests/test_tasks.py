"""Tasks: rows that solve, splits that stay apart, and what happens to bad data."""

from __future__ import annotations

import itertools
import json
import pickle
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import registry, rewards, tasks
from posttrain.errors import UserError
from posttrain.tasks import Row, Split, choose, fingerprint, split_of
from posttrain.tasks._characters import ALPHABET, CHAT_TEMPLATE
from posttrain.tasks.countdown import solve

SPLITS: tuple[Split, ...] = ("train", "eval")
PROCEDURAL: list[tuple[str, dict[str, Any]]] = [
    ("countdown", {}),
    ("countdown", {"numbers": 4, "rows": 200}),
    ("countdown", {"attempts": 3}),
    ("arithmetic", {"operations": ["+", "-", "*"]}),
]


def scores(task: tasks.BaseTask, answers: list[str], rows: list[Row]) -> list[float | None]:
    return [verdict.reward for verdict in rewards.load(*task.verifier).score(answers, rows)]


@pytest.mark.parametrize(
    "name", ["arithmetic", "code", "countdown", "files", "hub", "knights_knaves", "preferences", "text2sql"]
)
def test_tasks_are_listed_with_a_summary(name: str) -> None:
    assert len(registry.entry("task", name).summary) > 20


def test_files_with_an_underscore_are_no_tasks() -> None:
    assert not [name for name in registry.entries("task") if name.startswith("_")]


class TestContract:
    def test_the_split_of_a_key_never_changes(self) -> None:
        # The first 8 bytes of sha256("countdown:357=24") are 0.705 of their range.
        splits = [split_of("countdown:357=24", share) for share in (0.0, 0.70, 0.71, 1.0)]
        assert splits == ["train", "train", "eval", "eval"]

    @given(st.text(), st.floats(0, 1), st.floats(0, 1))
    def test_a_larger_share_only_moves_rows_to_evaluation(self, key: str, first: float, second: float) -> None:
        low, high = sorted((first, second))
        assert split_of(key, low) == "train" or split_of(key, high) == "eval"

    def test_choose(self) -> None:
        rows: list[Row] = [{"key": str(i)} for i in range(10)]
        assert choose(rows, None, seed=0) == rows
        drawn = choose(rows, 4, seed=0)
        assert drawn == choose(rows, 4, seed=0) != choose(rows, 4, seed=1)
        assert len({row["key"] for row in drawn}) == 4
        with pytest.raises(UserError, match="has 10 rows in this split but 11 were asked for"):
            choose(rows, 11, seed=0)

    def test_a_fingerprint_knows_contents_and_order(self) -> None:
        first, second = {"key": "a"}, {"key": "b"}
        found = {fingerprint(rows) for rows in ([], [first], [first, second], [second, first], [first, first])}
        assert len(found) == 5
        assert fingerprint([{"a": 1, "b": 2}]) == fingerprint([{"b": 2, "a": 1}])

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("countdwn", {}, "There is no task 'countdwn'; did you mean 'countdown'?"),
            ("countdown", {"number": 3}, "The task 'countdown' has no option 'number'; did you mean 'numbers'?"),
            ("countdown", {"numbers": 5}, "The option 'numbers' of the task 'countdown' is wrong"),
            ("countdown", {"min_digit": 8, "max_digit": 3}, "min_digit 8 exceeds max_digit 3"),
            ("countdown", {"attempts": -1}, "The option 'attempts' of the task 'countdown' is wrong"),
            ("arithmetic", {"operations": ["+", "+"]}, "names an operation twice"),
            ("files", {"fields": {}, "verifier": "math"}, "The task 'files' needs the option 'train'"),
        ],
    )
    def test_mistakes_in_options(self, name: str, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError) as error:
            tasks.load(name, options)
        assert message in str(error.value)


@pytest.mark.parametrize(("name", "options"), PROCEDURAL)
class TestProcedural:
    def test_splits_are_disjoint_and_keys_unique(self, name: str, options: dict[str, Any]) -> None:
        task = tasks.load(name, options)
        keys = [row["key"] for split in SPLITS for row in task.rows(split)]
        assert len(set(keys)) == len(keys)

    def test_the_same_options_give_the_same_rows(self, name: str, options: dict[str, Any]) -> None:
        rows = tasks.load(name, options).rows("train")
        assert rows == tasks.load(name, options).rows("train")
        assert rows != tasks.load(name, {**options, "seed": 1}).rows("train")

    def test_every_demonstration_is_correct(self, name: str, options: dict[str, Any]) -> None:
        task = tasks.load(name, options)
        train = task.rows("train")

        @settings(max_examples=20, deadline=None)
        @given(st.integers(0, 2**31))
        def check(seed: int) -> None:
            pairs = task.demonstrations(train, 20, seed=seed)
            assert len(pairs) == 20
            assert pairs == task.demonstrations(train, 20, seed=seed)
            assert scores(task, [answer for _, answer in pairs], [row for row, _ in pairs]) == [1.0] * 20

        check()

    def test_the_alphabet_covers_prompts_and_answers(self, name: str, options: dict[str, Any]) -> None:
        task = tasks.load(name, options)
        text = "".join(
            row["prompt"][0]["content"] + s for row, s in task.demonstrations(task.rows("train"), 500, seed=0)
        )
        assert task.alphabet is not None
        assert set(text) <= set(task.alphabet) - set("^?")
        assert len(task.alphabet) == len(set(task.alphabet)) == 16 + ("attempts" in options)

    def test_it_pickles(self, name: str, options: dict[str, Any]) -> None:
        task = tasks.load(name, options)
        assert pickle.loads(pickle.dumps(task)).rows("eval") == task.rows("eval")  # noqa: S301 - our own bytes


class TestCountdown:
    def test_three_digits_give_1860_prompts(self) -> None:
        task = tasks.load("countdown")
        train, evaluation = task.rows("train"), task.rows("eval")
        assert len(train) + len(evaluation) == 1860
        assert 280 <= len(evaluation) <= 320

    def test_four_digits_give_19240_prompts_with_at_most_46_solutions(self) -> None:
        solutions = solve(4, 1, 9, 99)
        assert len(solutions) == 19240
        assert max(map(len, solutions.values())) == 46

    def test_the_default_with_four_digits(self) -> None:
        start = time.thread_time()  # which other work on the machine does not move
        task = tasks.load("countdown", {"numbers": 4})
        train, evaluation = task.rows("train"), task.rows("eval")
        assert time.thread_time() - start < 5  # seconds
        assert len(train) == 4000
        assert len(evaluation) == pytest.approx(4000 * 0.16 / 0.84, rel=0.1)
        # Uniformly drawn prompts would have a median of 3.
        assert 7 <= statistics.median(row["solutions"] for row in train) <= 9

    def test_a_row(self) -> None:
        task = tasks.load("countdown")
        rows = {row["key"]: row for split in SPLITS for row in task.rows(split)}
        row = rows["countdown:126=12"]
        by_hand = sorted(
            f"{a}{p}{b}{q}{c}"
            for a, b, c in itertools.permutations((1, 2, 6))
            for p, q in itertools.product("+-*", repeat=2)
            if apply(q, apply(p, a, b), c) == 12
        )
        assert row["prompt"] == [{"role": "user", "content": "126=12"}]
        assert (row["numbers"], row["target"], row["solutions"]) == ([1, 2, 6], 12, len(by_hand))
        assert row["solution"] in by_hand
        drawn = {solution for _, solution in task.demonstrations([row], 500, seed=0)}
        assert sorted(drawn) == by_hand

    def test_models_and_stores_of_one_attempt_stay_what_they_are(self) -> None:
        """What their caches are found by: rows, demonstrations, alphabet and verifier."""
        task = tasks.load("countdown")
        train = task.rows("train")
        shown = [{"a": answer} for _, answer in task.demonstrations(train, 500, seed=0)]
        found = [fingerprint(rows) for rows in (train, task.rows("eval"), shown)]
        assert found == ["b5b6f10b520fba48", "86ebe3cc027e78ae", "7aea021886ea8e46"]
        assert task.alphabet == ALPHABET == "0123456789+-*=^?"
        assert task.verifier is not None
        identity = {"name": "countdown", "options": {"precedence": "left_to_right"}}
        assert rewards.load(*task.verifier).identity == identity

    def test_attempts_are_wrong_before_the_last(self) -> None:
        task = tasks.load("countdown", {"attempts": 3})
        pairs = task.demonstrations(task.rows("train"), 2000, seed=0)
        counts = Counter(answer.count(",") for _, answer in pairs)
        assert set(counts) == {0, 1, 2, 3}
        assert all(count == pytest.approx(500, abs=80) for count in counts.values()), "uniform, four deviations wide"
        one = rewards.load("countdown", {"precedence": "left_to_right"})
        for row, answer in pairs[:300]:
            *tried, last = answer.split(",")
            assert [verdict.reward for verdict in one.score([*tried, last], [row] * (len(tried) + 1))] == [
                *([0.0] * len(tried)),
                1.0,
            ]
            for attempt in tried:
                assert sorted(int(digit) for digit in attempt[::2]) == row["numbers"], "the numbers, each once"

    def test_attempts_leave_prompts_alone_and_change_what_caches_are_found_by(self) -> None:
        one, two, three = (tasks.load("countdown", {"attempts": count}) for count in (0, 2, 3))
        keys = [[row["key"] for row in task.rows("train")] for task in (one, two, three)]
        assert keys[0] == keys[1] == keys[2]
        assert len({fingerprint(task.rows("train")) for task in (one, two, three)}) == 3
        assert two.alphabet == three.alphabet == ALPHABET + ","

    @settings(max_examples=50, deadline=None)
    @given(st.sampled_from(sorted(solve(3, 1, 9, 99)) + sorted(solve(4, 1, 9, 99))))
    def test_every_solution_is_correct_and_listed_once(self, prompt: tuple[tuple[int, ...], int]) -> None:
        numbers, target = prompt
        solutions = solve(len(numbers), 1, 9, 99)[prompt]
        row = {"numbers": list(numbers), "target": target}
        verdicts = rewards.load("countdown", {"precedence": "left_to_right"}).score(solutions, [row] * len(solutions))
        assert {verdict.reward for verdict in verdicts} == {1.0}
        assert len({verdict.answer for verdict in verdicts}) == len(solutions)

    def test_fewer_rows_are_a_prefix(self) -> None:
        few, many = (tasks.load("countdown", {"numbers": 4, "rows": rows}) for rows in (100, 300))
        assert few.rows("train") == many.rows("train")[:100]
        assert few.rows("eval") == many.rows("eval")[: len(few.rows("eval"))]

    def test_a_row_keeps_its_split_under_every_seed(self) -> None:
        first, second = (tasks.load("countdown", {"seed": seed}) for seed in (0, 1))
        assert {row["key"] for row in first.rows("eval")} == {row["key"] for row in second.rows("eval")}

    def test_exhaustion_names_what_exists(self) -> None:
        existing = len(tasks.load("countdown").rows("train"))
        assert len(tasks.load("countdown", {"rows": existing}).rows("train")) == existing
        with pytest.raises(UserError, match=f"has {existing} training prompts.*but {existing + 1} were asked for"):
            tasks.load("countdown", {"rows": existing + 1}).rows("train")

    def test_nothing_held_out(self) -> None:
        task = tasks.load("countdown", {"eval_share": 0.0})
        assert (len(task.rows("train")), task.rows("eval")) == (1860, [])


class TestArithmetic:
    def test_rows(self) -> None:
        task = tasks.load("arithmetic", {"rows": 300, "operations": ["+", "-", "*"], "max_operand": 30})
        train = task.rows("train")
        assert len(train) == 300
        signs = set()
        for row in train:
            content = row["prompt"][0]["content"]
            a, sign, b, equals = int(content[:2]), content[2], int(content[3:5]), content[5:]
            assert 10 <= a <= 30 and 10 <= b <= 30 and equals == "="
            assert row["answer"] == str(apply(sign, a, b))
            signs.add(sign)
        assert signs == set("+-*")

    def test_both_orders_of_a_sum_fall_in_the_same_split(self) -> None:
        task = tasks.load("arithmetic", {"max_operand": 20, "rows": 90})
        train, evaluation = (
            {frozenset(row["key"].partition(":")[2].split("+")) for row in task.rows(split)} for split in SPLITS
        )
        assert train and evaluation
        assert not train & evaluation

    def test_exhaustion(self) -> None:
        # 11 · 11 sums of operands from 10 to 20, some of them held out
        with pytest.raises(UserError, match=r"The task 'arithmetic' has 1[01]\d training prompts"):
            tasks.load("arithmetic", {"max_operand": 20, "rows": 121}).rows("train")

    def test_a_wrong_sum_is_wrong(self) -> None:
        task = tasks.load("arithmetic")
        row = task.rows("eval")[0]
        assert scores(task, [row["answer"], row["answer"] + "0", ""], [row] * 3) == [1.0, 0.0, 0.0]


def test_the_chat_template_frames_prompts_and_marks_answers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    render: Any = render_jinja_template  # its annotations name a string for what is a list
    user = {"role": "user", "content": "337=24"}
    assistant = {"role": "assistant", "content": "3*7+3"}
    for prompt_only in (False, True):
        texts, _ = render([[user]], chat_template=CHAT_TEMPLATE, add_generation_prompt=prompt_only, eos_token="<eos>")
        assert texts == ["^337=24?"]
    (text,), ((mask,),) = render(
        [[user, assistant]], chat_template=CHAT_TEMPLATE, return_assistant_tokens_mask=True, eos_token="<eos>"
    )
    assert text == "^337=24?3*7+3<eos>"
    assert text[slice(*mask)] == "3*7+3<eos>"


def apply(sign: str, left: int, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[sign]


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def questions(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"What is {i}+1?", "gold": str(i + 1), "source": "us"} for i in range(start, start + count)]


FIELDS = {"question": "prompt", "gold": "answer"}


def load_files(train: str, **options: Any) -> tasks.BaseTask:
    return tasks.load("files", {"train": train, "fields": FIELDS, "verifier": "math", **options})


class TestFiles:
    @pytest.fixture
    def data(self, tmp_path: Path) -> str:
        return write(tmp_path / "train.jsonl", [*questions(40), "\n"])

    def test_rows_and_verifier(self, data: str) -> None:
        task = load_files(data)
        rows = task.rows("train") + task.rows("eval")
        assert task.verifier == ("math", {})
        assert len(rows) == 40 and len(task.rows("eval")) > 0
        row = next(row for row in rows if row["answer"] == "1")
        assert row == {
            "prompt": [{"role": "user", "content": "What is 0+1?"}],
            "answer": "1",
            "key": row["key"],
        }
        assert all(split_of(row["key"], 0.1) == "eval" for row in task.rows("eval"))

    def test_parquet_gives_the_same_rows(self, data: str, tmp_path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        path = tmp_path / "train.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(questions(40)), path)
        assert fingerprint(load_files(str(path)).rows("train")) == fingerprint(load_files(data).rows("train"))

    def test_the_key_ignores_case_space_and_the_system_message(self, tmp_path: Path) -> None:
        first = write(tmp_path / "a.jsonl", [{"question": "What  is 1+1?", "gold": "2"}])
        second = write(tmp_path / "b.jsonl", [{"question": " what is\u00a01+1? ", "gold": "2"}])
        keys = [
            load_files(first, eval_share=0.0).rows("train")[0]["key"],
            load_files(second, eval_share=0.0, system="Be brief.").rows("train")[0]["key"],
        ]
        assert keys[0] == keys[1]

    def test_a_key_of_ones_own(self, tmp_path: Path) -> None:
        data = write(tmp_path / "a.jsonl", [{"question": "1+1?", "gold": 2, "id": 17}])
        task = load_files(data, fields={**FIELDS, "id": "key"}, eval_share=0.0)
        assert task.rows("train")[0]["key"] == "17"

    def test_system_and_template(self, data: str) -> None:
        task = load_files(data, system="Be brief.", prompt_template=r"{prompt} Write \boxed{{}}.")
        assert task.rows("train")[0]["prompt"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": r"What is 0+1? Write \boxed{}."},
        ]

    def test_a_template_can_make_the_prompt(self, tmp_path: Path) -> None:
        data = write(tmp_path / "a.jsonl", [{"nums": [3, 5, 7], "target": 15}])
        task = tasks.load(
            "files",
            {
                "train": data,
                "fields": {"nums": "numbers", "target": "target"},
                "verifier": "countdown",
                "prompt_template": "Reach {target} with {numbers}.",
                "eval_share": 0.0,
            },
        )
        (row,) = task.rows("train")
        assert row["prompt"][0]["content"] == "Reach 15 with [3, 5, 7]."
        assert scores(task, ["3+5+7", "3*5"], [row, row]) == [1.0, 0.0]

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{prompt.__class__}", "no plain field name"),
            ("{prompt[0]}", "no plain field name"),
            ("{}", "no plain field name"),
            ("{prompt!r}", "no plain field name"),
            ("{prompt:>10}", "no plain field name"),
            ("{prompts}", "there is no field 'prompts'; did you mean 'prompt'"),
            ("{prompt", "expected '}'"),
            ("Solve it.", "holds no field"),
        ],
    )
    def test_templates_take_plain_names_only(self, data: str, template: str, message: str) -> None:
        with pytest.raises(UserError, match="The prompt_template of the task 'files' is wrong") as error:
            load_files(data, prompt_template=template)
        assert message in str(error.value)

    def test_messages_as_prompts(self, tmp_path: Path) -> None:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?", "name": "me"}]
        data = write(tmp_path / "a.jsonl", [{"question": messages, "gold": "2"}])
        (row,) = load_files(data, eval_share=0.0).rows("train")
        assert row["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
        with pytest.raises(UserError, match="line 1: the prompt has a system message"):
            load_files(data, eval_share=0.0, system="Be verbose.").rows("train")

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ("{'question': 1}\n", "line 2: not valid JSON"),
            ("[" * 100_000 + "\n", "line 2: not valid JSON"),
            ("[1]\n", "line 2: a list, not a JSON object"),
            ({"questions": "1+1?", "gold": "2"}, "line 2: there is no column 'question'; did you mean 'questions'"),
            ({"question": "1+1?"}, "line 2: there is no column 'gold'"),
            ({"question": "1+1?", "gold": None}, "line 2: the field 'answer' is empty"),
            ({"question": "1+1?", "gold": r"\frac{1}{"}, "line 2: the gold answer"),
            ({"question": "1+1?", "gold": ["2"]}, "scores None with the reward 'math' instead of 1.0"),
            ({"question": " ", "gold": "2"}, "line 2: the prompt is empty"),
            ({"question": None, "gold": "2"}, "line 2: the prompt is None"),
            ({"question": [], "gold": "2"}, "line 2: the prompt is []"),
            ({"question": [{"role": "user"}], "gold": "2"}, "line 2: the prompt holds {'role': 'user'}"),
            ({"question": ["hi"], "gold": "2"}, "line 2: the prompt holds 'hi'"),
            ({"question": "\ud800", "gold": "2"}, "line 2: 'utf-8' codec"),
        ],
        ids=lambda value: ascii(value)[:40],
    )
    def test_bad_rows_are_located_or_skipped(self, tmp_path: Path, bad: Any, message: str) -> None:
        good = questions(2)
        data = write(tmp_path / "train.jsonl", [good[0], bad, good[1]])
        with pytest.raises(UserError) as error:
            load_files(data, eval_share=0.0).rows("train")
        assert f"{data}, " in str(error.value) and message in str(error.value)
        with pytest.warns(UserWarning, match="bad rows skipped: 1, the first at .*line 2"):
            rows = load_files(data, eval_share=0.0, on_bad_row="skip").rows("train")
        assert [row["answer"] for row in rows] == ["1", "2"]

    def test_a_line_that_is_no_utf8(self, tmp_path: Path) -> None:
        path = tmp_path / "train.jsonl"
        path.write_bytes(b'{"question": "\xff", "gold": "2"}\n')
        with pytest.raises(UserError, match="line 1: not valid JSON"):
            load_files(str(path)).rows("train")

    def test_a_solution_that_does_not_solve(self, tmp_path: Path) -> None:
        fields = {name: name for name in ("prompt", "numbers", "target", "solution")}
        row = {"prompt": "go", "numbers": [3, 5], "target": 8, "solution": "3*5"}
        data = write(tmp_path / "train.jsonl", [row])
        with pytest.raises(UserError, match=r"line 1: the gold answer '3\*5' scores 0.0.*wrong: it equals 15"):
            load_files(data, fields=fields, verifier="countdown").rows("train")

    def test_a_row_that_the_verifier_cannot_judge(self, tmp_path: Path) -> None:
        fields = {name: name for name in ("prompt", "numbers", "target")}
        data = write(tmp_path / "train.jsonl", [{"prompt": "go", "numbers": "3 5", "target": 8}])
        with pytest.raises(UserError, match="line 1: the reward 'countdown' cannot judge the row"):
            load_files(data, fields=fields, verifier="countdown").rows("train")

    def test_duplicates_are_dropped_and_counted(self, tmp_path: Path) -> None:
        data = write(tmp_path / "train.jsonl", [*questions(5), *questions(2)])
        task = load_files(data, eval_share=0.0)
        with pytest.warns(UserWarning, match="dropped because their key had occurred before: 2"):
            assert len(task.rows("train")) == 5

    def test_a_file_for_evaluation_keeps_what_occurs_in_both(self, tmp_path: Path) -> None:
        train = write(tmp_path / "train.jsonl", questions(5))
        evaluation = write(tmp_path / "eval.jsonl", questions(3, start=4))
        task = load_files(train, eval=evaluation)
        with pytest.warns(UserWarning, match="key had occurred before: 1"):
            assert [row["answer"] for row in task.rows("train")] == ["1", "2", "3", "4"]
        assert [row["answer"] for row in task.rows("eval")] == ["5", "6", "7"]

    def test_no_rows(self, tmp_path: Path) -> None:
        empty = write(tmp_path / "empty.jsonl", ["\n"])
        with pytest.raises(UserError, match="has no training rows"):
            load_files(empty).rows("train")
        some = write(tmp_path / "some.jsonl", questions(3))
        with pytest.raises(UserError, match="has no evaluation rows beside 3 training rows"):
            load_files(some, eval=empty).rows("train")
        bad = write(tmp_path / "bad.jsonl", ["no\n"])
        with pytest.raises(UserError, match=r"has no training rows \(bad rows skipped: 1, the first at .*line 1"):
            load_files(bad, on_bad_row="skip").rows("train")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"fields": {"question": "prompt"}}, "maps no column to the field 'answer', which the reward 'math' needs"),
            ({"fields": {"gold": "answer"}}, "maps no column to the field 'prompt'"),
            ({"fields": {"a": "prompt", "b": "prompt"}}, "fills the field 'prompt' from two columns"),
            ({"verifier": "meth"}, "There is no reward 'meth'; did you mean 'math'?"),
            ({"verifier": "format"}, "shapes and does not decide"),
            ({"verifier_options": {"per_cent": True}}, "The reward 'math' has no option 'per_cent'"),
            ({"train": "nowhere.jsonl"}, "finds no file 'nowhere.jsonl'"),
            ({"train": "train.csv"}, "reads .jsonl and .parquet, not 'train.csv'"),
            ({"eval": "x.jsonl", "eval_share": 0.2}, "eval_share has no effect"),
        ],
    )
    def test_mistakes_are_refused_at_construction(self, data: str, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError) as error:
            load_files(**{"train": data, **options})
        assert message in str(error.value)

    def test_a_broken_parquet_file(self, tmp_path: Path) -> None:
        path = tmp_path / "train.parquet"
        path.write_bytes(b"no parquet")
        with pytest.raises(UserError, match="cannot be read as Parquet"):
            load_files(str(path)).rows("train")

    def test_it_cannot_solve_itself(self, data: str) -> None:
        task = load_files(data)
        with pytest.raises(UserError, match="The task 'files' has no solver"):
            task.demonstrations(task.rows("train"), 1, seed=0)
        assert task.alphabet is None and task.chat_template is None


class TestHub:
    OPTIONS = {"name": "some/data", "fields": FIELDS, "verifier": "math"}  # noqa: RUF012

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
        import datasets

        calls: list[tuple[Any, ...]] = []

        def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> datasets.Dataset:
            calls.append((name, config, split, revision))
            if split == "nowhere":
                raise ValueError("Unknown split 'nowhere'.\nMore.")
            return datasets.Dataset.from_list(questions(20, start=0 if split == "train" else 100))

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    def test_one_split(self, asked: list[tuple[Any, ...]]) -> None:
        task = tasks.load("hub", {**self.OPTIONS, "eval_share": 0.3, "config": "main", "revision": "abc"})
        assert asked == []  # nothing is loaded before rows are asked for
        assert len(task.rows("train")) + len(task.rows("eval")) == 20
        assert asked == [("some/data", "main", "train", "abc")]

    def test_two_splits(self, asked: list[tuple[Any, ...]]) -> None:
        task = tasks.load("hub", {**self.OPTIONS, "eval_split": "test"})
        assert (len(task.rows("train")), len(task.rows("eval"))) == (20, 20)
        assert task.rows("eval")[0]["answer"] == "101"
        assert [call[2] for call in asked] == ["test", "train"]

    def test_mistakes(self, asked: list[tuple[Any, ...]]) -> None:
        with pytest.raises(UserError, match=r"\[nowhere\] cannot be loaded .ValueError: Unknown split 'nowhere'\): "):
            tasks.load("hub", {**self.OPTIONS, "train_split": "nowhere"}).rows("train")
        with pytest.raises(UserError, match=r"some/data \[train\], row 1: there is no column 'query'"):
            tasks.load("hub", {**self.OPTIONS, "fields": {"query": "prompt", "gold": "answer"}}).rows("train")
        with pytest.raises(UserError, match="eval_share has no effect"):
            tasks.load("hub", {**self.OPTIONS, "eval_split": "test", "eval_share": 0.2})

    def test_a_folder_is_loaded_for_real(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        folder = tmp_path / "data"
        folder.mkdir()
        write(folder / "train.jsonl", questions(30))
        task = tasks.load("hub", {**self.OPTIONS, "name": str(folder)})
        assert len(task.rows("train")) + len(task.rows("eval")) == 30


def test_the_images_of_a_row_stand_before_the_text_of_its_first_user_message() -> None:
    from PIL import Image
    from trl.data_utils import prepare_multimodal_messages

    images = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    prompt = [{"role": "system", "content": "Count."}, {"role": "user", "content": "How many?"}]
    row = {"prompt": prompt, "images": images, "key": "a"}
    assert tasks.shown(row) == prepare_multimodal_messages(prompt, images=images)
    assert tasks.shown({"prompt": prompt, "key": "a"}) is prompt
    assert prompt[1]["content"] == "How many?"


def test_rows_with_other_pixels_have_another_fingerprint() -> None:
    from PIL import Image

    def row(colour: str) -> dict[str, Any]:
        return {"prompt": [], "key": "a", "images": [Image.new("RGB", (4, 4), colour)]}

    assert tasks.fingerprint([row("red")]) == tasks.fingerprint([row("red")]) != tasks.fingerprint([row("blue")])
