"""ERPD as stages: rollouts are scored once, signals are checked on held-out prompts, and a run can be interrupted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest

from posttrain import recipe as recipes
from posttrain.errors import UserError
from posttrain.launch import manifest, pipeline, staged
from posttrain.objectives.signals import SIGNALS
from posttrain.rollouts.static import Logps, Signals, Validation
from posttrain.seams.callbacks import StopOnInterrupt
from posttrain.stages import Scored, StagedRecipe
from tests.small import BEGINNING, WARM_START

ARGS: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_steps": 1,
    "report_to": [],
}


def erpd(**args: Any) -> dict[str, Any]:
    return {"name": "erpd", "args": {**ARGS, "max_steps": 4, **args}}


SMALL: dict[str, Any] = {
    **BEGINNING,
    "model": {"warm_start": {**WARM_START, "steps": 200}},
    "task": {"name": "countdown", "options": {"rows": 100, "eval_share": 0.2}},
    "presample": {"samples_per_prompt": 8, "top_p": 1.0},
    "evaluation": {"prompts": 4, "n": 4, "k": [1], "resamples": 10},
    "validation": {"prompts": 40},
    "stages": {
        "drawn": {"do": "presample"},
        "checked": {"do": "presample", "prompts": "validation"},
        "extract": {"method": erpd(), "rollouts": "drawn"},
        "unlearned": {"method": erpd(unlearn=True), "rollouts": "drawn", "evaluate": False},
        "signal": {
            "do": "score",
            "rollouts": "drawn",
            "held_out": "checked",
            "teacher": "extract",
            "unlearned": "unlearned",
            "signal": "teacher_unlearned",
        },
        "distil": {"method": erpd(phase="distil"), "rollouts": "drawn", "signal": "signal"},
    },
}


def load(stages: Mapping[str, Any] | None = None, **sections: Any) -> StagedRecipe:
    """The small recipe with other stages, and keys of stages as `signal__teacher=None` (left out) or a value."""
    content = deepcopy(SMALL)
    content["stages"] |= stages or {}
    for path, value in sections.items():
        name, _, key = path.partition("__")
        if not key:
            content[name] = value
        elif value is None:
            del content["stages"][name][key]
        else:
            content["stages"][name][key] = value
    found = recipes.validate(content, "small.yaml")
    assert isinstance(found, StagedRecipe)
    return found


def run(recipe: StagedRecipe, out: Path, **options: Any) -> None:
    staged.run(recipe, out, command="posttrain run small.yaml", **options)


def folder(out: Path, name: str) -> Path:
    (found,) = (path.parent for path in (out / "stages").glob(f"{name}-????????????/manifest.json"))
    return found


def contents(out: Path) -> dict[str, str]:
    """The hash of every finished output by the stage's name."""
    return {
        path.parent.name[:-13]: json.loads(path.read_text())["content"]
        for path in (out / "stages").glob("*-????????????/manifest.json")
    }


@pytest.fixture(scope="module", autouse=True)
def cache(own_cache: Path) -> Path:
    return own_cache


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The output folder of a finished run, however its signal ranks."""
    out = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("posttrain.rollouts.static.require_valid", lambda *_: None)
        run(load(), out)
    return out


# ------------------------------------------------------------------ what a recipe may say


def test_signals_are_those_of_the_objectives() -> None:
    assert get_args(Scored.model_fields["signal"].annotation) == ("auto", *SIGNALS)


def test_every_policy_scores_every_answer_once() -> None:
    recipe = load()
    scored = {name: node.inputs for name, node in recipe.nodes.items() if node.step == "log_probs"}
    assert scored == {
        f"score-{policy}-on-{store}": {"model": policy, "rollouts": store}
        for policy in ("base", "extract", "unlearned")
        for store in ("drawn", "checked")
    }
    for name in ("extract", "unlearned", "distil"):
        assert recipe.nodes[name].inputs["base on rollouts"] == "score-base-on-drawn"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"signal__teacher": None}, "the signal 'teacher_unlearned' takes teacher: name it"),
        ({"signal__signal": "teacher_base"}, "unlearned has no effect on the signal 'teacher_base': remove it"),
        ({"signal__signal": "auto"}, "the signal 'auto' takes teacher_answers: name it"),
        ({"signal__signal": "mixed"}, "stages.signal.signal"),
        ({"signal__held_out": "drawn"}, "stages.signal.held_out takes answers to validation prompts"),
        ({"extract__rollouts": "checked"}, "stages.extract.rollouts takes answers to training prompts"),
        ({"validation": None}, "stages.checked.prompts needs prompts that are set aside: add validation"),
        ({"distil__model": "extract"}, "stages.distil.rollouts holds answers of 'base'"),
        ({"distil__signal": "drawn"}, "stages.distil.signal takes a signal, and 'drawn' gives pre-sampled answers"),
    ],
)
def test_mistakes_are_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        load(**changes)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"distil__signal": None}, "the method 'erpd' learns from a signal, in this phase: name where they are from"),
        ({"distil__method": erpd()}, "signal has no effect on the method 'erpd': remove it"),
        ({"extract__rollouts": None}, "learns from pre-sampled answers of the policy that it starts from"),
    ],
)
def test_a_phase_takes_what_it_learns_from(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        staged.plan(load(**changes))


def test_a_run_without_stages_is_refused(tmp_path: Path) -> None:
    content = {name: value for name, value in SMALL.items() if name not in ("stages", "validation")}
    recipe = recipes.validate({**content, "method": erpd()}, "plain.yaml")
    with pytest.raises(UserError, match="learns from fixed rollouts, which stages make"):
        pipeline.run(recipe, tmp_path / "out", resume=False, command="test")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"extract__method": erpd(kl_target=0.5)}, {"extract", "signal", "distil"}),
        ({"unlearned__method": erpd(unlearn=True, max_steps=3)}, {"unlearned", "signal", "distil"}),
        ({"distil__method": erpd(phase="distil", dead_zone=0.1)}, {"distil"}),
        ({"checked__samples_per_prompt": 4}, {"checked", "signal", "distil"}),
    ],
)
def test_an_edit_changes_the_keys_of_what_depends_on_it(change: dict[str, Any], changed: set[str]) -> None:
    before, after = staged.plan(load()), staged.plan(load(**change))
    stages = {name for name in before.works if before.works[name].key != after.works[name].key}
    assert stages & set(SMALL["stages"]) == changed


# ------------------------------------------------------------------ a run


def test_signals_are_differences_of_what_was_scored(finished: Path) -> None:
    """log π_T − log π_U in half precision, of the answers that were learned and of the held-out ones."""
    for store, place in (("drawn", "signals"), ("checked", "held_out")):
        teacher, unlearned = (
            pq.read_table(Logps.open(folder(finished, f"score-{policy}-on-{store}") / "logps").path / "logps.parquet")
            for policy in ("extract", "unlearned")
        )
        signals = Signals.open(folder(finished, "signal") / place)
        found = pq.read_table(signals.path / "signals.parquet")["signals"].combine_chunks()
        one, other = (table["logps"].combine_chunks() for table in (teacher, unlearned))
        assert found.value_lengths().equals(one.value_lengths())
        wanted = one.flatten().to_numpy() - other.flatten().to_numpy()
        np.testing.assert_allclose(found.flatten().to_numpy(), wanted, rtol=1e-3, atol=1e-6)
        assert np.abs(wanted).max() > 0.1


def test_the_held_out_answers_are_to_prompts_that_nobody_learns(finished: Path) -> None:
    prompts = [
        set(pq.read_table(folder(finished, name) / "store/prompts.parquet")["prompt_id"].to_pylist())
        for name in ("drawn", "checked")
    ]
    assert not prompts[0] & prompts[1] and len(prompts[1]) == 40


def test_the_trainings_start_at_their_log_probs_and_move(finished: Path) -> None:
    for name in ("extract", "unlearned", "distil"):
        history = json.loads((folder(finished, name) / "history.json").read_text())
        moved = [entry["kl/forward"] for entry in history if "kl/forward" in entry]
        assert len(moved) == 4 and abs(moved[0]) < 1e-6 < 1e-4 < moved[-1]


def test_status_and_report_have_what_came_out(finished: Path) -> None:
    said = json.loads((folder(finished, "signal") / "signal.json").read_text())
    assert said["signal"] == "teacher_unlearned" and said["terms"] == [["teacher", "unlearned", 1.0]]
    results = json.loads((folder(finished, "signal") / "manifest.json").read_text())["results"]
    assert results["auc"] == said["validation"]["auc"] and results["rms"] > 0
    assert (finished / "report.html").is_file()
    comparison = json.loads((finished / "comparison.json").read_text())
    assert {"base", "extract", "distil"} <= set(json.dumps(comparison).replace('"', " ").split())


def test_interrupted_at_every_stage_and_inside_every_training_it_ends_the_same(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, agree, stopped = manifest.write, StopOnInterrupt.on_step_end, set[str]()

    def interrupt(folder: Path, **rest: Any) -> dict[str, Any]:
        if folder.name not in stopped:
            stopped.add(folder.name)
            raise KeyboardInterrupt
        return written(folder, **rest)

    def ask(self: StopOnInterrupt, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 2 and args.output_dir not in stopped:
            stopped.add(args.output_dir)
            self._asked = True
        agree(self, args, state, control, **rest)

    monkeypatch.setattr(manifest, "write", interrupt)
    monkeypatch.setattr(StopOnInterrupt, "on_step_end", ask)
    monkeypatch.setattr("posttrain.rollouts.static.require_valid", lambda *_: None)
    out, tries = tmp_path / "out", 0
    while True:
        tries += 1
        try:
            run(load(), out)
        except KeyboardInterrupt:
            continue
        break
    assert tries == len(contents(finished)) + 3 + 1
    assert contents(out) == contents(finished)


def test_a_signal_that_ranks_the_wrong_way_stops_the_run(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backwards(*_: Any) -> Validation:
        return Validation(0.4, 0.3, 0.5, 0.4, right=10, wrong=10, prompts=8)

    monkeypatch.setattr("posttrain.rollouts.static.validate", backwards)
    with pytest.raises(UserError, match="ranks right answers below wrong ones") as error:
        run(load(), tmp_path / "out", until="distil")
    assert "teacher_base, base_unlearned, or a mix" in str(error.value)
    assert "distil" not in contents(tmp_path / "out")


@pytest.mark.parametrize(
    ("gain", "unlearned", "chosen"),
    [(0.5, True, "teacher_base"), (0.0, True, "teacher_unlearned")],
)
def test_auto_decides_by_the_accuracy_of_the_teacher(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, gain: float, unlearned: bool, chosen: str
) -> None:
    """Accuracies of the base, and those of a teacher that is better by `gain` on every prompt, or no better."""
    from posttrain.rollouts import static

    asked: list[dict[str, float]] = []

    def known(answers: Any) -> dict[str, float]:
        asked.append({name: 0.25 + gain * bool(asked) for name in answers.table["prompt_id"].to_pylist()})
        return asked[-1]

    monkeypatch.setattr(static, "accuracies", known)
    monkeypatch.setattr(static, "require_valid", lambda *_: None)
    answered = {"do": "presample", "prompts": "validation", "model": "extract"}
    stages = {name: SMALL["stages"][name] for name in ("drawn", "checked", "extract", "unlearned")}
    content = {
        **deepcopy(SMALL),
        "stages": {
            **stages,
            "answered": answered,
            "signal": {**SMALL["stages"]["signal"], "signal": "auto", "teacher_answers": "answered"},
        },
    }
    recipe = recipes.validate(content, "small.yaml")
    assert isinstance(recipe, StagedRecipe)
    run(recipe, tmp_path / "out", until="signal")
    assert json.loads((folder(tmp_path / "out", "signal") / "signal.json").read_text())["signal"] == chosen
    assert len(asked) == 2


def test_a_mix_weighs_several_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.rollouts.static.require_valid", lambda *_: None)
    mix = {
        "do": "score",
        "rollouts": "drawn",
        "held_out": "checked",
        "signal": "mix",
        "teachers": {"extract": 1.0, "unlearned": -0.5},
    }
    out = tmp_path / "out"
    run(load({"signal": mix}), out, until="signal")

    def read(name: str) -> np.ndarray:
        table = pq.read_table(folder(out, f"score-{name}-on-drawn") / "logps/logps.parquet")
        return table["logps"].combine_chunks().flatten().to_numpy().astype(float)

    one, other = read("extract") - read("base"), read("unlearned") - read("base")
    wanted = one / np.sqrt((one**2).mean()) - 0.5 * other / np.sqrt((other**2).mean())
    found = pq.read_table(folder(out, "signal") / "signals/signals.parquet")["signals"].combine_chunks()
    np.testing.assert_allclose(found.flatten().to_numpy(), wanted, rtol=2e-3, atol=2e-3)
