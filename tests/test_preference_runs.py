"""Whole runs on preference pairs: f-DPO in a sweep, on pairs of the policy's own answers and on ready-made data."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from posttrain import recipe as recipes
from posttrain.errors import UserError
from posttrain.evaluation import evaluate, measures
from posttrain.launch import pipeline
from posttrain.rollouts.pairs import PairSet
from tests.patience import eventually
from tests.processes import finish
from tests.small import BEGINNING

SMALL: dict[str, Any] = {
    **BEGINNING,
    "presample": {"samples_per_prompt": 8},
    "evaluation": {
        "prompts": 8,
        "n": 8,
        "k": [1, 4],
        "resamples": 100,
        "diversity": {"temperatures": [1.0], "n": 4},
        "divergence": {"names": ["reverse_kl", "js"], "answers": 4},
        "calibration": {},
    },
    "method": {
        "name": "f_dpo",
        "args": {
            "beta": 0.5,
            "per_device_train_batch_size": 8,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "optim": "adamw_torch",
            "warmup_steps": 0,
            "logging_steps": 1,
            "save_steps": 1,
            "report_to": [],
        },
    },
}


@pytest.fixture(scope="module", autouse=True)
def cache(own_cache: Path) -> Path:
    return own_cache


def load(changes: dict[str, Any] | None = None) -> recipes.Recipe:
    return recipes.validate({**SMALL, **(changes or {})}, "small.yaml")


CELLS = ["js-seed0", "js-seed1", "reverse_kl-seed0", "reverse_kl-seed1"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[recipes.Recipe, Path]:
    """A finished sweep and its folder."""
    out = tmp_path_factory.mktemp("swept") / "out"
    recipe = load({"sweep": {"method.args.divergence": ["js", "reverse_kl"], "seed": [0, 1]}})
    pipeline.run(recipe, out, resume=False, command="posttrain sweep small.yaml")
    return recipe, out


def test_a_sweep_shares_one_store_one_set_of_pairs_and_one_base(swept: tuple[recipes.Recipe, Path]) -> None:
    _, out = swept
    folders = {path.parent.name for path in out.glob("*/evaluation")}
    assert folders == {"base", *CELLS}
    pairs = PairSet.open(out / "pairs")
    assert pairs.counts["prompts"] == 24
    assert pairs.counts["pairs"] == pq.read_metadata(pairs.file).num_rows > 0
    comparison = json.loads((out / "comparison.json").read_text())
    assert set(comparison["runs"]) == {"base", *CELLS}
    models = {label: evaluate.load(out / label / "evaluation").identity["model"] for label in ("base", *CELLS)}
    assert len(set(models.values())) == 5


def test_every_measure_is_there_for_every_run(swept: tuple[recipes.Recipe, Path]) -> None:
    _, out = swept
    base = measures.load(out / "base" / "evaluation")
    assert {"self_bleu@T1.0", "reverse_kl", "js", "kl_per_answer", "ece_likelihood"} <= set(base)
    assert base["reverse_kl"].top.tolist() == [0.0] * 8
    for label in CELLS:
        found = measures.load(out / label / "evaluation")
        assert {*base, "preference_accuracy", "preference_margin", "ece_bradley_terry"} == set(found)
        moved = found["kl_per_answer"].estimate(resamples=10)
        assert moved is not None
        assert moved.value > 1e-4
    page = (out / "report.html").read_text()
    assert "Calibration" in page
    assert "Diversity" in page


def test_the_second_time_nothing_is_done_again(
    swept: tuple[recipes.Recipe, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.rollouts.transformers_engine import TransformersEngine
    from posttrain.trainers.f_dpo import FDPOTrainer

    recipe, out = swept

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("work was done again")

    monkeypatch.setattr(TransformersEngine, "sample", never)
    monkeypatch.setattr(TransformersEngine, "score", never)
    monkeypatch.setattr(FDPOTrainer, "train", never)
    before = (out / "comparison.json").read_bytes()
    pipeline.run(recipe, out, resume=False, command="posttrain sweep small.yaml")
    assert (out / "comparison.json").read_bytes() == before


# `posttrain`, which goes on after its first checkpoint only when it has been interrupted.
HELD = """
import time
from posttrain.seams.callbacks import CompleteCheckpoints, StopOnInterrupt
handle, on_save, asked = StopOnInterrupt._handle, CompleteCheckpoints.on_save, []
def noted(*arguments):
    asked.append(True)
    handle(*arguments)
def held(*arguments, **named):
    on_save(*arguments, **named)
    while not asked:
        time.sleep(0.05)
StopOnInterrupt._handle, CompleteCheckpoints.on_save = noted, held
from posttrain.cli import main
main()
"""


def test_training_that_was_interrupted_ends_at_the_same_weights(tmp_path: Path) -> None:
    method = json.loads(json.dumps(SMALL["method"]))
    method["args"] |= {"max_steps": 60, "save_total_limit": 1}
    evaluation = {"prompts": 4, "n": 2, "k": [1], "resamples": 10}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "method": method, "evaluation": evaluation}))
    out, whole = tmp_path / "out", tmp_path / "whole"
    command = [sys.executable, "-m", "posttrain", "run", str(path), "--output-dir", str(out)]
    stopped = [sys.executable, "-c", HELD, *command[3:]]
    with subprocess.Popen(stopped, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        checkpoints = out / "f_dpo" / "checkpoints"
        assert eventually(lambda: bool(list(checkpoints.glob("*/complete"))) or process.poll() is not None, 600)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    assert not (out / "f_dpo" / "model").exists()
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    pipeline.run(recipes.load(str(path)), whole, resume=False, command="")
    ours, theirs = (load_file(folder / "f_dpo" / "model" / "model.safetensors") for folder in (out, whole))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0)


def write_preferences(folder: Path, count: int = 40) -> Path:
    """Ready-made preferences: the sum is right in the chosen answer and one too large in the rejected one."""
    path = folder / "preferences.jsonl"
    lines = []
    for i in range(count):
        a, b = i % 7, i // 7
        prompt = [{"role": "user", "content": f"{a}+{b}=?"}]
        answers = [[{"role": "assistant", "content": str(a + b + wrong)}] for wrong in (0, 1)]
        lines.append(json.dumps({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_ready_made_preferences_need_no_verifier(tmp_path: Path, tiny_model: str) -> None:
    data = write_preferences(tmp_path)
    recipe = load(
        {
            "model": {"path": tiny_model},
            "task": {"name": "preferences", "options": {"name": str(data), "eval_share": 0.3}},
            "evaluation": {
                **SMALL["evaluation"],
                "prompts": 6,
                "n": 4,
                "k": [1],
            },
        }
    )
    out = tmp_path / "out"
    pipeline.run(recipe, out, resume=False, command="posttrain run preferences.yaml")
    assert not (out / "store").exists()
    assert not (out / "pairs").exists()
    found = measures.load(out / "f_dpo" / "evaluation")
    accuracy = found["preference_accuracy"].estimate(resamples=10)
    assert accuracy is not None
    assert 0 <= accuracy.value <= 1
    assert found["preference_accuracy"].bottom.sum() == 6
    page = (out / "report.html").read_text()
    assert "pass@" not in page
    assert "Calibration" in page


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": {"name": "grpo", "args": {"num_generations": 8}}}, "needs rewards: name them in the recipe"),
        ({"method": {"name": "dph_rl", "args": {"num_generations": 8}}}, "nothing that decides what is correct"),
    ],
)
def test_methods_that_sample_need_something_that_decides(
    tmp_path: Path, tiny_model: str, changes: dict[str, Any], sentence: str
) -> None:
    data = write_preferences(tmp_path)
    task = {"name": "preferences", "options": {"name": str(data), "eval_share": 0.3}}
    evaluation = {"prompts": 4, "n": 2, "k": [1]}
    recipe = load({"model": {"path": tiny_model}, "task": task, "evaluation": evaluation, **changes})
    with pytest.raises(UserError, match=sentence):
        pipeline.prepare(recipe)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"divergence": "chi2"}, "not admissible"),
        ({"divergence": "total_variation"}, "not admissible"),
        ({"divergence": "alpha", "alpha": -0.5}, "alpha must be"),
        ({"divergence": "js", "loss_type": ["ipo"]}, "divides by the length"),
        ({"divergence": "js", "loss_type": ["sigmoid_norm"]}, "divides by the length"),
        ({"beta": 0.0}, "beta must be a positive"),
    ],
)
def test_what_f_dpo_refuses_is_refused_before_anything_is_made(args: dict[str, Any], sentence: str) -> None:
    method = {"name": "f_dpo", "args": {**SMALL["method"]["args"], **args}}
    with pytest.raises(UserError, match=sentence):
        pipeline.prepare(load({"method": method}))


def test_two_processes_share_the_work_and_measure_the_same(tmp_path: Path, swept: tuple[recipes.Recipe, Path]) -> None:
    """Pairs and everything measured on the initial policy are those of one process; training ends and is evaluated."""
    method = json.loads(json.dumps(SMALL["method"]))
    method["args"] |= {"per_device_train_batch_size": 4, "divergence": "js"}
    path, out = tmp_path / "small.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump({**SMALL, "method": method, "launch": {"processes": 2, "config": "zero2"}}))
    command = [sys.executable, "-m", "posttrain", "run", str(path), "--output-dir", str(out)]
    finish(command, timeout=900)
    one = swept[1]
    assert pq.read_table(out / "pairs" / "pairs.parquet").equals(pq.read_table(one / "pairs" / "pairs.parquet"))
    ours, theirs = (measures.load(folder / "base" / "evaluation") for folder in (out, one))
    assert list(ours) == list(theirs)
    for name, measured in theirs.items():
        torch.testing.assert_close(torch.tensor(ours[name].top), torch.tensor(measured.top), rtol=1e-9, atol=1e-9)
    trained = measures.load(out / "f_dpo" / "evaluation")
    assert set(trained) == set(measures.load(one / "js-seed0" / "evaluation"))
    # The same seed and the same four batches of eight pairs: only rounding differs from one process.
    margins = [measured["preference_margin"] for measured in (trained, measures.load(one / "js-seed0" / "evaluation"))]
    torch.testing.assert_close(torch.tensor(margins[0].top), torch.tensor(margins[1].top), rtol=1e-3, atol=1e-4)
