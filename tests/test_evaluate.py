"""Sampling, judging and storing one evaluation, with an engine that is a table of answers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from posttrain.errors import UserError
from posttrain.evaluation.evaluate import EvaluationResult, evaluate, finish, load
from posttrain.evaluation.metrics import pass_at_k
from posttrain.recipe import Evaluation
from posttrain.rewards import Verdict, Verifier
from posttrain.rollouts.engine import Prompt, Sample, SamplingParams

SETTINGS = Evaluation(n=4, k=[1, 2], resamples=200, seed=7)
ROWS = [
    {"prompt": [{"role": "user", "content": f"{i}+1"}], "key": f"sum {i}", "want": str(i + 1), "solutions": i % 3 + 1}
    for i in range(10)
]


class Killed(Exception):
    """The process dies."""


class Guesser:
    """Draws a digit near the sum from `params.seed` alone; dies at the call number `dies_at`."""

    name = "guesser"
    tokenizer = SimpleNamespace(decode=lambda ids: "no thought")

    def __init__(self, fingerprint: str = "a1", dies_at: int | None = None) -> None:
        self.fingerprint, self.dies_at = fingerprint, dies_at
        self.calls = 0

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Sample]]:
        if self.calls == self.dies_at:
            raise Killed
        self.calls += 1
        generator = np.random.default_rng(params.seed)
        groups = []
        for prompt in prompts:
            assert not isinstance(prompt, str)
            first = int(str(prompt[-1]["content"]).partition("+")[0])
            texts = [str(first + int(shift)) for shift in generator.integers(0, 3, size=params.n)]
            groups.append([sample_of(text) for text in texts])
        return groups

    def score(self, sequences: Any, *, temperature: float = 1.0) -> list[list[float]]:
        raise NotImplementedError

    def sync(self, named_parameters: Iterable[Any], version: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


class Scripted(Guesser):
    """Answers every prompt with the same texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__("5c")
        self.texts = texts

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Sample]]:
        return [[sample_of(text) for text in self.texts] for _ in prompts]


def sample_of(text: str) -> Sample:
    length = len(text) + 1
    reason = "length" if text.endswith("…") else "stop"
    return Sample([1, 2], [3] * length, [-0.5] * length, text, reason, 0)  # type: ignore[arg-type]


class Exact(Verifier):
    """Right when the text is the wanted one; `crash` is a failure of the verifier, `?` no answer."""

    name = "exact"
    requires = ("want",)

    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        judged.append((row["key"], completion))
        if completion == "crash":
            raise RuntimeError("no database")
        if completion == "?":
            return Verdict(0.0, "no_answer")
        right = completion == row["want"]
        return Verdict(float(right), "ok" if right else "wrong", completion)


judged: list[tuple[str, str]] = []


@pytest.fixture(autouse=True)
def _forget_what_was_judged() -> None:
    judged.clear()


def run(engine: Guesser, folder: Path, **changes: Any) -> EvaluationResult | None:
    arguments: dict[str, Any] = {
        "settings": SETTINGS, "max_tokens": 8, "batch_size": 8, "output_dir": folder, "label": "policy", "rows": ROWS,
        "verifier": Exact(), "task_name": "sums",
    } | changes  # fmt: skip
    return evaluate(engine, **arguments)


def finished(engine: Guesser, folder: Path, **changes: Any) -> EvaluationResult:
    result = run(engine, folder, **changes)
    assert result is not None
    return result


def test_counts_and_metrics(tmp_path: Path) -> None:
    result = finished(Guesser(), tmp_path / "e")
    table = pq.read_table(tmp_path / "e" / "samples.parquet")
    assert table["sample"].to_pylist() == [0, 1, 2, 3] * 10
    assert table["key"].to_pylist()[::4] == [row["key"] for row in ROWS]
    correct = np.array(table["correct"].to_pylist()).reshape(10, 4)
    wanted = [[text == row["want"] for text in texts] for row, texts in zip(ROWS, texts_of(table), strict=True)]
    assert correct.tolist() == wanted
    assert 0 < correct.sum() < 40

    assert result.n.tolist() == [4] * 10
    assert result.c.tolist() == correct.sum(axis=1).tolist()
    assert result.prompts[3] == "3+1"
    assert result.solutions is not None
    assert result.solutions.tolist() == [row["solutions"] for row in ROWS]
    document = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    expected = np.mean([pass_at_k(4, int(c), 2) for c in correct.sum(axis=1)])
    assert document["metrics"]["pass@2"]["value"] == pytest.approx(expected, rel=1e-12)
    assert document["metrics"]["pass@2"]["low"] < expected < document["metrics"]["pass@2"]["high"]
    assert document["statuses"] == {"ok": int(correct.sum()), "wrong": int(40 - correct.sum())}
    assert document["identity"]["model"] == "a1"
    assert not (tmp_path / "e" / "parts").exists()


def texts_of(table: Any) -> list[list[str]]:
    return np.array(table["text"].to_pylist()).reshape(10, 4).tolist()  # type: ignore[no-any-return]


def test_lengths_truncation_and_entropy_by_hand(tmp_path: Path) -> None:
    # "1": 2 tokens, right for the first row only; "22…": 4 tokens and cut off; twice "?": 2 tokens, no answer
    result = finished(Scripted(["1", "22…", "?", "?"]), tmp_path, rows=ROWS[:2])
    value = {name: metric["value"] for name, metric in result.metrics.items()}
    assert value["tokens"] == 10 / 4
    assert value["tokens_correct"] == 2.0
    assert value["tokens_wrong"] == 18 / 7
    assert value["truncated"] == 0.25
    # two different answers, the two "?" left out
    assert value["answer_entropy"] == pytest.approx(math.log(2), rel=1e-12)
    # row 0: right and wrong tie, ½; row 1: nothing right
    assert value["maj@4"] == 0.25
    assert value["distinct_correct"] == 0.5
    assert pq.read_table(tmp_path / "samples.parquet")["mean_logprob"].to_pylist() == [-0.5] * 8


def test_each_distinct_answer_is_judged_once(tmp_path: Path) -> None:
    finished(Scripted(["1", "2", "1", "1"]), tmp_path)
    assert len(judged) == len(set(judged)) == 2 * len(ROWS)


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = Guesser()
    finished(whole, tmp_path / "whole")
    assert whole.calls == 5  # 10 rows in chunks of 8 // 4

    with pytest.raises(Killed):
        run(Guesser(dies_at=3), tmp_path / "resumed")
    assert not (tmp_path / "resumed" / "evaluation.json").exists()
    second = Guesser()
    finished(second, tmp_path / "resumed")
    assert second.calls == 2
    assert same_files(tmp_path / "whole", tmp_path / "resumed")


def same_files(one: Path, other: Path) -> bool:
    return all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in ("samples.parquet", "evaluation.json")
    )


def test_two_workers_equal_one(tmp_path: Path) -> None:
    finished(Guesser(), tmp_path / "one")
    first, second = Guesser(), Guesser()
    assert run(second, tmp_path / "two", worker=(1, 2)) is None
    with pytest.raises(UserError, match=r"3 of 5 parts .* the first is number 0"):
        finish(tmp_path / "two", SETTINGS, label="policy")
    assert run(first, tmp_path / "two", worker=(0, 2)) is None
    assert (first.calls, second.calls) == (3, 2)
    finish(tmp_path / "two", SETTINGS, label="policy")
    assert same_files(tmp_path / "one", tmp_path / "two")


def test_finished_is_reused_without_sampling(tmp_path: Path) -> None:
    first = finished(Guesser(), tmp_path)
    again = Guesser(dies_at=0)
    assert finished(again, tmp_path).metrics == first.metrics
    # another k or interval needs other arithmetic, not other samples
    wider = finished(again, tmp_path, settings=SETTINGS.model_copy(update={"k": [1], "confidence": 0.5}))
    assert "pass@2" not in wider.metrics
    assert wider.metrics["pass@1"]["high"] < first.metrics["pass@1"]["high"]
    assert load(tmp_path).k == (1,)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"engine": Guesser("b2")}, "'model' is 'a1' there and 'b2' here"),
        ({"rows": ROWS[:9]}, "'data' is"),
        ({"max_tokens": 9}, "'max_tokens' is 8 there and 9 here"),
        ({"settings": SETTINGS.model_copy(update={"temperature": 0.5})}, "'temperature' is 1.0 there and 0.5 here"),
    ],
)
def test_a_stale_evaluation_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    finished(Guesser(), tmp_path / "finished")
    with pytest.raises(Killed):
        run(Guesser(dies_at=1), tmp_path / "begun")
    for folder in ("finished", "begun"):
        with pytest.raises(UserError, match=words):
            run(**{"engine": Guesser(), "folder": tmp_path / folder} | change)


def test_verdicts_that_failed_are_no_wrong_answers(tmp_path: Path) -> None:
    # three of four crash: one verdict is left, enough for pass@1 and too few for pass@2
    result = finished(Scripted(["crash", "crash", "1", "crash"]), tmp_path)
    assert result.n.tolist() == [1] * 10
    assert result.c.tolist() == [1] + [0] * 9
    assert result.statuses == {"ok": 1, "verifier_error": 30, "wrong": 9}
    assert result.metrics["pass@1"]["value"] == 0.1
    assert result.metrics["pass@1"]["dropped_problems"] == 0
    assert result.metrics["pass@2"] == {"value": None, "low": None, "high": None, "dropped_problems": 10}


def test_models_draw_independently(tmp_path: Path) -> None:
    finished(Guesser("a1"), tmp_path / "a")
    finished(Guesser("b2"), tmp_path / "b")
    texts = [pq.read_table(tmp_path / folder / "samples.parquet")["text"].to_pylist() for folder in "ab"]
    assert texts[0] != texts[1]


def test_few_answers_are_warned_about(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="n ≥ 8 is advised"):
        finished(Guesser(), tmp_path, settings=SETTINGS.model_copy(update={"k": [1, 4]}))


def test_what_cannot_be_evaluated_is_refused(tmp_path: Path) -> None:
    class Shaping(Exact):
        accuracy = False

    with pytest.raises(UserError, match="does not say whether an answer is correct"):
        run(Guesser(), tmp_path, verifier=Shaping())
    with pytest.raises(UserError, match="gave no rows"):
        run(Guesser(), tmp_path, rows=[])
    with pytest.raises(UserError, match=r"Row 1 .* lacks the column 'want'"):
        run(Guesser(), tmp_path, rows=[ROWS[0], {"prompt": "?", "key": "?"}])
    with pytest.raises(UserError, match=r"evaluation\.json is missing"):
        load(tmp_path)


def test_progress_is_a_line_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(Guesser(), tmp_path)
    assert "evaluate policy  40/40 samples" in capsys.readouterr().err
