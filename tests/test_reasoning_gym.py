"""The task `reasoning_gym`: what is asked of the package, with a stand-in for it, and with it where it is installed."""

from __future__ import annotations

import sys
from collections import Counter
from types import ModuleType
from typing import Any

import pytest

from posttrain import rewards, tasks
from posttrain.errors import UserError
from posttrain.tasks import fingerprint


class Base:
    """As the package's ProceduralDataset."""

    def __init__(self, seed: int, size: int, values: int = 50) -> None:
        assert values > 0, "values must be positive"
        self.seed, self.size, self.values = seed, size, values

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        raise AssertionError("a scorer was called")

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert 0 <= index < self.size
        print("....")
        value = (self.seed + index) % self.values
        return {
            "question": f"{type(self).__name__}: {value} + 1?",
            "answer": str(value + 1) if value else "",
            "metadata": {},
        }


class Sums(Base):
    pass


class More(Base):
    pass


class Puzzle(Base):
    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        return float(eval(answer) == 5)  # noqa: S307 - what the package does; never called


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {"sums": Sums, "more": More, "puzzle": Puzzle}

    def create_dataset(name: str, **settings: Any) -> Base:
        return kinds[name](**settings)

    for name, holds in (
        ("reasoning_gym", {}),
        (
            "reasoning_gym.factory",
            {"DATASETS": {n: (k, None) for n, k in kinds.items()}, "create_dataset": create_dataset},
        ),
        ("reasoning_gym.dataset", {"ProceduralDataset": Base}),
    ):
        module = ModuleType(name)
        module.__dict__.update(holds)
        monkeypatch.setitem(sys.modules, name, module)


def load(datasets: Any, **options: Any) -> tasks.BaseTask:
    return tasks.load("reasoning_gym", {"datasets": datasets, **options})


@pytest.mark.usefixtures("package")
def test_data_sets_take_turns_and_no_question_comes_twice(capsys: pytest.CaptureFixture[str]) -> None:
    task = load({"sums": {"values": 400}, "more": {"values": 10}}, rows=60, eval_share=0.3)
    train, held_out = task.rows("train"), task.rows("eval")
    both = Counter(row["dataset"] for row in train + held_out)
    assert both["more"] == 9  # of ten questions one has no answer
    assert len(train) == 60 and both["sums"] == len(train) + len(held_out) - 9
    keys = [row["key"] for row in train + held_out]
    assert len(set(keys)) == len(keys)
    assert train[0]["prompt"][0]["content"].endswith("between <answer> and </answer>, and nothing else there.")
    assert load({"sums": {"values": 400}, "more": {"values": 10}}, rows=30, eval_share=0.3).rows("train") == train[:30]
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("package")
def test_an_answer_is_compared_to_the_letter_and_no_scorer_is_called() -> None:
    task = load({"sums": {}}, rows=5)
    assert task.verifier is not None
    verifier = rewards.load(*task.verifier)
    row = task.rows("train")[0]
    for text, reward in (
        (f"So <answer> {row['answer']} </answer>.", 1.0),
        ("<answer>__import__('os')</answer>", 0.0),
        ("", 0.0),
    ):
        assert verifier.score([text], [row])[0].reward == reward


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("datasets", "options", "reason"),
    [
        ({}, {}, "datasets"),
        ({"sum": {}}, {}, "no data set 'sum'; did you mean 'sums'"),
        ({"puzzle": {}}, {}, r"'puzzle' have many right answers.*: take one of more, sums\."),
        ({"sums": {"values": 0}}, {}, "does not take the settings .*values must be positive"),
        ({"sums": {"high": 3}}, {}, "does not take the settings .*unexpected keyword"),
        ({"sums": {}}, {"rows": 100}, "has 37 training prompts with these options, but 100 were asked for"),
    ],
)
def test_what_cannot_work_is_refused(datasets: Any, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        load(datasets, **options).rows("train")


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"not installed \(reasoning_gym.*\): pip install 'posttrain\[reasoning-gym\]'"):
        load({"gcd": {}})


def test_the_package_itself() -> None:
    pytest.importorskip("reasoning_gym")
    names = ["gcd", "base_conversion", "caesar_cipher", "acre", "syllogism", "rotate_matrix", "string_splitting"]
    task = load({name: {} for name in names}, rows=140)
    train = task.rows("train")
    assert {row["dataset"] for row in train} == set(names)
    assert task.verifier is not None
    verifier = rewards.load(*task.verifier)
    found = verifier.score([f"<answer>{row['answer']}</answer>" for row in train], train)
    assert {verdict.reward for verdict in found} == {1.0}
    assert fingerprint(load({name: {} for name in names}, rows=140).rows("train")) == fingerprint(train)
    with pytest.raises(UserError, match="many right answers"):
        load({"countdown": {}})
    with pytest.raises(UserError, match="does not take the settings"):
        load({"gcd": {"foo": 1}})
