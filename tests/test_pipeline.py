"""The whole job on a model of 20,000 parameters: stages, what they leave behind, resuming, and what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain import recipe as recipes
from posttrain.errors import UserError
from posttrain.evaluation import evaluate
from posttrain.launch import pipeline
from posttrain.launch.warm_start import warm_start
from posttrain.rollouts.store import Store
from tests.patience import eventually
from tests.small import BEGINNING

SMALL: dict[str, Any] = {
    **BEGINNING,
    "presample": {"samples_per_prompt": 4, "pef_threshold": 2, "stored_per_prompt": 1},
    "evaluation": {"prompts": 8, "n": 8, "k": [1, 4], "resamples": 100},
    "method": {
        "name": "dph_rl",
        "prompts_per_step": 2,
        "args": {
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "save_steps": 1,
            "logging_steps": 1,
            "report_to": [],
        },
    },
}


@pytest.fixture(scope="module", autouse=True)
def cache(own_cache: Path) -> Path:
    return own_cache


def write(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """The small recipe as a file, with GRPO beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "baselines": [{"name": "grpo"}], **(changes or {})}))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Path, Path]:
    """A finished run: the recipe's path and the output folder."""
    folder = tmp_path_factory.mktemp("finished")
    path = write(folder)
    pipeline.run(recipes.load(str(path)), folder / "out", resume=False, command="posttrain run small.yaml")
    return path, folder / "out"


def test_run_leaves_everything_behind(finished: tuple[Path, Path]) -> None:
    _, out = finished
    recipe = recipes.validate(recipes.parse_value((out / "recipe.yaml").read_text()), "stored")
    assert recipe.method.name == "dph_rl"
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["versions"]["trl"].startswith("1.16")
    assert provenance["seeds"] == {"training": 0, "presample": 0, "evaluation": 1234, "warm_start": 0}
    assert provenance["command"] == "posttrain run small.yaml"
    store = Store.open(out / "store")
    assert store.counts["prompts"] == 24
    assert store.counts["pef"] + store.counts["explore"] == 24
    for label in ("base", "grpo", "dph_rl"):
        result = evaluate.load(out / label / "evaluation")
        assert result.n.tolist() == [8] * 8
    for label in ("grpo", "dph_rl"):
        history = json.loads((out / label / "history.json").read_text())
        assert sum("reward" in entry for entry in history) == 3
        assert (out / label / "model" / "model.safetensors").is_file()
    comparison = json.loads((out / "comparison.json").read_text())
    assert set(comparison["runs"]) == {"base", "grpo", "dph_rl"}
    page = (out / "report.html").read_text()
    assert "dph_rl" in page
    assert "posttrain run small.yaml" in page
    assert not list(out.rglob("*.tmp"))


def test_trained_policies_differ_from_the_base_and_from_each_other(finished: tuple[Path, Path]) -> None:
    _, out = finished
    models = {
        label: evaluate.load(out / label / "evaluation").identity["model"] for label in ("base", "grpo", "dph_rl")
    }
    assert len(set(models.values())) == 3


def test_second_run_reuses_everything(finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = finished
    stamps = {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")}
    stamps |= {file: file.stat().st_mtime_ns for file in out.rglob("*.parquet")}
    from posttrain.rollouts.transformers_engine import TransformersEngine

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing may be sampled again")

    monkeypatch.setattr(TransformersEngine, "sample", fail)
    pipeline.run(recipes.load(str(path)), out, resume=True, command="posttrain run small.yaml")
    assert stamps == {file: file.stat().st_mtime_ns for file in stamps}


def test_folder_of_another_recipe_is_refused(finished: tuple[Path, Path]) -> None:
    path, out = finished
    other = recipes.load(str(path), ["method.args.max_steps=4"])
    with pytest.raises(UserError, match=r"'method\.args\.max_steps' is 3 there and 4 here"):
        pipeline.run(other, out, resume=True, command="")


def test_folder_that_holds_something_else_is_refused(tmp_path: Path, finished: tuple[Path, Path]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        pipeline.run(recipes.load(str(finished[0])), tmp_path, resume=False, command="")
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("assignments", "sentence"),
    [
        (["method.args.lerning_rate=1e-3"], "no argument 'lerning_rate'; did you mean 'learning_rate'"),
        (["method.args.learning_rate=fast"], "method.args.learning_rate must be float, found 'fast'"),
        (["method.args.temperature=0.5"], "said elsewhere in a recipe: use rollout.temperature"),
        (["method.args.eta=-1"], "eta must be a finite number"),
        (["method.args.loss_type=cispo"], "loss_type = 'cispo'"),
        (["method.prompts_per_step=3"], "is no multiple of world"),
        (["method.prompts_per_step=2", "method.args.gradient_accumulation_steps=4"], "contradicts prompts_per_step"),
        (["method.prompts_per_step=null", "method.args.num_generations=3"], "cannot hold whole groups"),
        (["task.name=countdwn"], "There is no task 'countdwn'; did you mean 'countdown'"),
        (["task.options.numbrs=3"], "no option 'numbrs'; did you mean 'numbers'"),
        (["rewards=[{name: math}]"], "does not support the reward 'math'"),
        (["rewards=[{function: nowhere:reward}]"], "cannot be imported"),
        (["evaluation.prompts=5000"], "5000 were asked for"),
        (["presample.pef_threshold=9"], "exceeds samples_per_prompt"),
        (["evaluation.k=[1, 16]"], "k = 16 exceeds n = 8"),
        (["model={warm_start: null, path: ./nowhere}"], "The model './nowhere' cannot be read"),
        (["method.name=dph"], "There is no method 'dph'; did you mean 'dph_rl'"),
    ],
)
def test_mistakes_are_one_sentence_before_any_weights(
    tmp_path: Path, assignments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(pipeline, "initial_policy", fail)
    path = write(tmp_path)
    with pytest.raises(UserError) as error:
        pipeline.run(recipes.load(str(path), assignments), tmp_path / "out", resume=False, command="")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("content", "sentence"), [(None, "problems.jsonl"), ("", "has no training rows")])
def test_missing_and_empty_data_are_one_sentence(tmp_path: Path, content: str | None, sentence: str) -> None:
    data = tmp_path / "problems.jsonl"
    if content is not None:
        data.write_text(content)
    options = {"train": str(data), "fields": {"question": "prompt", "solution": "answer"}, "verifier": "math"}
    path = write(tmp_path, {"task": {"name": "files", "options": options}})
    with pytest.raises(UserError, match=sentence):
        pipeline.run(recipes.load(str(path)), tmp_path / "out", resume=False, command="")
    assert not (tmp_path / "out").exists()


def test_a_reward_that_compares_other_groups_is_refused_before_anything(tmp_path: Path) -> None:
    options = {"shape": "group_relative", "group_size": 8, "verifier": "countdown"}
    path = write(tmp_path, {"rewards": [{"name": "countdown"}, {"name": "length", "options": options}]})
    with pytest.raises(UserError, match=r"compares 8 answers to a prompt .* draws 4 .*: make the two agree"):
        pipeline.prepare(recipes.load(str(path)))


@pytest.mark.parametrize(
    "options", [{"max_tokens": 9, "cache": 4}, {"shape": "cosine", "max_tokens": 20, "verifier": "countdown"}]
)
def test_a_reward_for_longer_answers_is_refused_before_anything(tmp_path: Path, options: dict[str, Any]) -> None:
    """Answers end at rollout.max_tokens = 8: the penalty would never be whole, and the cosine never low."""
    path = write(tmp_path, {"rewards": [{"name": "countdown"}, {"name": "length", "options": options}]})
    with pytest.raises(
        UserError, match=r"for answers of up to \d+ tokens \(max_tokens\), .* end at 8 \(rollout\.max_tok"
    ):
        pipeline.prepare(recipes.load(str(path)))
    agreed = {"rewards": [{"name": "countdown"}, {"name": "length", "options": {**options, "max_tokens": 8}}]}
    pipeline.prepare(recipes.load(str(write(tmp_path, agreed))))


def test_store_without_anything_to_rehearse_is_refused_before_training(tmp_path: Path) -> None:
    path = write(tmp_path)
    recipe = recipes.load(str(path), ["model.warm_start.steps=2"])
    with pytest.raises(UserError, match="holds no near-perfect prompt to rehearse: lower pef_threshold"):
        pipeline.run(recipe, tmp_path / "out", resume=False, command="")
    assert not (tmp_path / "out" / "grpo").exists()


def test_interrupted_training_resumes(tmp_path: Path, cache: Path, finished: tuple[Path, Path]) -> None:
    """Ctrl-C while training: exit code 130, a checkpoint, and the same command with --resume goes on from there."""
    long = json.loads(json.dumps(SMALL["method"]))
    long["args"] |= {"max_steps": 2000, "save_total_limit": 1}
    path = write(tmp_path, {"baselines": [], "method": long})
    out = tmp_path / "out"
    command = [sys.executable, "-m", "posttrain", "run", str(path), "--output-dir", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        events = out / "dph_rl" / "checkpoints"
        assert eventually(lambda: bool(list(events.glob("*/complete"))) or process.poll() is not None, 600)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    assert "--resume" in stderr
    saved = sorted(events.glob("checkpoint-*/complete"))
    assert len(saved) == 1
    step = int(saved[0].parent.name.rpartition("-")[2])
    assert 0 < step < 2000
    refused = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert refused.returncode == 2
    assert "add --resume" in refused.stderr

    state = json.loads((saved[0].parent / "trainer_state.json").read_text())
    assert state["global_step"] == step
    # Make the end near, so that the test is short: the recipe that is stored decides.
    for file in (path, out / "recipe.yaml"):
        content = yaml.safe_load(file.read_text())
        content["method"]["args"]["max_steps"] = step + 2
        file.write_text(yaml.safe_dump(content, sort_keys=False))
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    history = json.loads((out / "dph_rl" / "history.json").read_text())
    steps = [entry["step"] for entry in history if "reward" in entry]
    assert steps == list(range(1, step + 3))


def test_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    from posttrain.seams.callbacks import CompleteCheckpoints

    for step, complete in ((2, True), (10, True), (12, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if complete:
            (folder / CompleteCheckpoints.MARKER).touch()
    assert CompleteCheckpoints.latest(tmp_path) == str(tmp_path / "checkpoint-10")
    assert CompleteCheckpoints.latest(tmp_path / "nothing") is None


def test_warm_start_is_cached_by_content(finished: tuple[Path, Path], cache: Path) -> None:
    recipe = recipes.load(str(finished[0]))
    assert recipe.model.warm_start is not None
    from posttrain import tasks

    task = tasks.load(recipe.task.name, recipe.task.options)
    made = warm_start(recipe.model.warm_start, task, dtype="float32")
    assert made.parent == cache / "warm_start"
    before = (made / "model.safetensors").stat().st_mtime_ns
    assert warm_start(recipe.model.warm_start, task, dtype="float32") == made
    assert (made / "model.safetensors").stat().st_mtime_ns == before
    other = recipe.model.warm_start.model_copy(update={"seed": 1, "steps": 2})
    assert warm_start(other, task, dtype="float32") != made


def test_lora_run_is_evaluated_with_its_adapter(tmp_path: Path, finished: tuple[Path, Path]) -> None:
    path = write(tmp_path, {"baselines": []})
    recipe = recipes.load(str(path), ["model.lora={r: 4, alpha: 8}", "method.args.learning_rate=5e-3"])
    pipeline.run(recipe, tmp_path / "out", resume=False, command="")
    assert (tmp_path / "out" / "dph_rl" / "model" / "adapter_config.json").is_file()
    base, trained = (evaluate.load(tmp_path / "out" / label / "evaluation") for label in ("base", "dph_rl"))
    assert base.identity["model"] != trained.identity["model"]
