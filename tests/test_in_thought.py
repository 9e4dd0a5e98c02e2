"""Where a chat template ends prompts with `<think>`, completions are judged behind it, whoever draws them."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from trl import GRPOConfig
from typer.testing import CliRunner

from posttrain import rewards
from posttrain.cli import app
from posttrain.evaluation.evaluate import evaluate
from posttrain.launch.warm_start import character_tokenizer, small_model
from posttrain.recipe import Evaluation, Presample, WarmStart
from posttrain.rewards import IN_THOUGHT, RewardFunction, Verdict, Verifier
from posttrain.rollouts.presample import presample
from posttrain.rollouts.tokens import encode, opens_thought
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.trainers.grpo import GRPOTrainer
from tests.oracle import ROWS as PROMPTS
from tests.oracle import arguments, dataset

ROWS = [{**row, "key": str(number)} for number, row in enumerate(PROMPTS)]
CUT = "Let me see, \\boxed{5}, or"
DONE = "Let me see.</think>\\boxed{5}"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}A:"


class Listener(Verifier):
    """Remembers what it was given, and says of everything that it is right."""

    name = "listener"

    def __init__(self) -> None:
        self.given: list[str] = []

    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        self.given.append(completion)
        return Verdict(1.0, "ok")


def model(folder: Path, ending: str) -> str:
    tokenizer = character_tokenizer(string.printable, TEMPLATE + ending)
    small_model(WarmStart(hidden_size=32, intermediate_size=64, layers=2, heads=2, seed=0), tokenizer, "float32")\
        .save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose chat template opens a thought."""
    return model(tmp_path_factory.mktemp("thinking"), "<think>\n")


@pytest.mark.parametrize(("completion", "reward"), [(CUT, 0.0), (DONE, 1.0)])
@pytest.mark.parametrize("conversational", [False, True])
def test_a_thought_that_was_cut_off_holds_no_answer(completion: str, reward: float, conversational: bool) -> None:
    said = [{"role": "assistant", "content": completion}] if conversational else completion
    function = RewardFunction(rewards.load("math"))
    assert function(["p"], [said], answer=["5"], **{IN_THOUGHT: [True]}) == [reward]
    assert function(["p"], [said], answer=["5"], **{IN_THOUGHT: [False]}) == [1.0]
    assert function(["p"], [said], answer=["5"]) == [1.0]


def test_a_format_that_expects_the_tag_in_the_prompt_is_spared_it() -> None:
    texts = ["a</think>\n<answer>b</answer>", "<think>a</think>\n<answer>b</answer>"]
    for options, expected in (({"think_in_prompt": True}, [1.0, 0.0]), ({}, [1.0, 0.0])):
        format_ = RewardFunction(rewards.load("format", options))
        assert format_(["p"] * 2, texts, **{IN_THOUGHT: [True] * 2}) == expected
    assert RewardFunction(rewards.load("format"))(["p"] * 2, texts, **{IN_THOUGHT: [False] * 2}) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("ending", "opens"),
    [("<think>", True), ("<think>\n", True), ("<think>\n\n</think>\n\n", False), ("", False), ("<think> x", False)],
)
def test_the_rendered_prompt_decides(ending: str, opens: bool) -> None:
    tokenizer = character_tokenizer(string.printable, TEMPLATE + ending)
    assert opens_thought(tokenizer, encode(tokenizer, [{"role": "user", "content": "1+1"}])) is opens


def test_pre_sampling_and_evaluation_judge_behind_the_tag(thinking: str, tmp_path: Path) -> None:
    engine = TransformersEngine.load(thinking, device="cpu")
    listener = Listener()
    settings = Presample(samples_per_prompt=2, pef_threshold=2, stored_per_prompt=2)
    store = presample(
        engine, rows=ROWS, verifier=listener, settings=settings, max_tokens=6, training_temperature=1.0,
        output_dir=tmp_path / "store", batch_size=4,
    )  # fmt: skip
    assert len(listener.given) == 16, "two of each of four prompts, and two fresh ones"
    assert all(text.startswith("<think>") for text in listener.given)
    assert store.counts["pef"] == 4
    listener.given.clear()
    evaluate(
        engine, "digits", ROWS, listener, Evaluation(n=4, k=[1]), max_tokens=6, batch_size=4,
        output_dir=tmp_path / "evaluation", label="base",
    )  # fmt: skip
    assert listener.given and all(text.startswith("<think>") for text in listener.given)


def test_training_tells_every_reward_function(thinking: str, tiny_model: str, tmp_path: Path) -> None:
    columns: list[Any] = []

    def own(completions: list[Any], **given: Any) -> list[float]:
        columns.append(given.get(IN_THOUGHT))
        assert all(not completion[0]["content"].startswith("<think>") for completion in completions)
        return [float(len(completion[0]["content"]) % 3) for completion in completions]

    listener = Listener()
    for path in (thinking, tiny_model):
        trainer = GRPOTrainer(
            model=path,
            reward_funcs=[own, RewardFunction(listener)],
            args=GRPOConfig(**arguments(tmp_path, max_steps=1)),
            train_dataset=dataset(),
            processing_class=AutoTokenizer.from_pretrained(path),
        )
        trainer.train()
    assert columns == [[True] * 8, None]
    assert [text.startswith("<think>") for text in listener.given] == [True] * 8 + [False] * 8


def test_score_is_told(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps({"completion": text, "answer": "5"}) + "\n" for text in (CUT, DONE)))
    for options, expected in (([], [1.0, 1.0]), (["--in-thought"], [0.0, 1.0])):
        done = CliRunner().invoke(app, ["score", "--reward", "math", "--input", str(file), *options])
        assert done.exit_code == 0, done.output
        assert [json.loads(line)["reward"] for line in done.stdout.splitlines()] == expected
