"""Whole runs with a teacher: made and trained by the run, or named; checked before anything slow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain import recipe as recipes
from posttrain.errors import UserError
from posttrain.evaluation import evaluate
from posttrain.launch import pipeline
from tests import small

WARM_START = {**small.WARM_START, "steps": 150}
ARGS: dict[str, Any] = {
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": [],
}
SMALL: dict[str, Any] = {
    **small.BEGINNING,
    "model": {"warm_start": WARM_START},
    "evaluation": {"prompts": 4, "n": 4, "k": [1, 2], "resamples": 50},
    "method": {"name": "kdrl", "prompts_per_step": 2, "args": {**ARGS, "kd_coef": 0.5}},
    "teacher": {
        "warm_start": {**WARM_START, "hidden_size": 48},
        "method": {"name": "grpo", "prompts_per_step": 2, "args": ARGS},
    },
    "baselines": [{"name": "rlad"}],
}


@pytest.fixture(scope="module", autouse=True)
def cache(own_cache: Path) -> Path:
    return own_cache


def load(changes: dict[str, Any] | None = None) -> recipes.Recipe:
    content = {key: value for key, value in {**SMALL, **(changes or {})}.items() if value is not None}
    return recipes.validate(content, "small.yaml")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: None) -> Path:
    """The folder of a finished run."""
    out: Path = tmp_path_factory.mktemp("taught") / "out"
    pipeline.run(load(), out, resume=False, command="posttrain run small.yaml")
    return out


def test_the_run_makes_its_teacher_and_measures_it_beside_the_others(finished: Path) -> None:
    config = json.loads((finished / "teacher" / "model" / "config.json").read_text())
    assert config["hidden_size"] == 48
    models = {
        label: evaluate.load(finished / label / "evaluation").identity["model"]
        for label in ("base", "teacher", "rlad", "kdrl")
    }
    assert len(set(models.values())) == 4
    comparison = json.loads((finished / "comparison.json").read_text())
    assert list(comparison["runs"]) == ["base", "teacher", "rlad", "kdrl"]
    assert "teacher" in (finished / "report.html").read_text()


def test_both_methods_hear_the_teacher(finished: Path) -> None:
    (kdrl, *_) = json.loads((finished / "kdrl" / "history.json").read_text())
    assert kdrl["kd/coef"] == 0.5
    assert kdrl["kd/log_ratio_abs"] > 0.01
    rlad = json.loads((finished / "rlad" / "history.json").read_text())
    assert any(name.startswith("trrd/") for name in rlad[0])


def test_the_teacher_is_not_made_twice(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.seams.on_policy import OnPolicyTrainer

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("trained again")

    monkeypatch.setattr(OnPolicyTrainer, "train", never)
    pipeline.run(load(), finished, resume=False, command="posttrain run small.yaml")


def test_a_teacher_of_another_tokenizer_is_refused_before_anything_is_evaluated(
    tmp_path: Path, tiny_model: str, finished: Path
) -> None:
    folder = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["7-5"])
    tokenizer.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    out = tmp_path / "out"
    with pytest.raises(UserError, match="has another tokenizer than the student"):
        pipeline.run(load({"teacher": {"path": str(folder)}}), out, resume=False, command="")
    assert not (out / "base").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"teacher": None}, "'rlad' distils and needs a teacher: add the section teacher"),
        ({"method": {"name": "grpo", "args": ARGS}, "baselines": None}, "No run learns from the teacher"),
        ({"teacher": {"path": "nowhere/at-all"}}, "The model 'nowhere/at-all' cannot be read"),
        (
            {"teacher": {"warm_start": WARM_START, "method": {"name": "f_dpo"}}},
            "teacher.method 'f_dpo' needs more than prompts",
        ),
        (
            {"teacher": {"warm_start": WARM_START, "method": {"name": "grpo", "args": {"betta": 1}}}},
            "no argument 'betta'",
        ),
    ],
)
def test_what_a_teacher_cannot_be(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        pipeline.prepare(load(changes))


@pytest.mark.parametrize(
    ("teacher", "sentence"),
    [
        ({}, "name exactly one source"),
        ({"path": "a", "warm_start": WARM_START}, "name exactly one source"),
        ({"path": "a", "method": {"name": "grpo"}}, "method trains a teacher that is made here"),
        ({"warm_start": WARM_START, "revision": "main"}, "revision has no effect"),
    ],
)
def test_the_section_says_one_thing(teacher: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load({"teacher": teacher})
