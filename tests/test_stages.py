"""Recipes of stages: what they may say, what outputs depend on, and runs that are edited, damaged and interrupted."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from posttrain import recipe as recipes
from posttrain import tasks
from posttrain.cli import app
from posttrain.errors import UserError
from posttrain.launch import manifest, merging, pipeline, staged
from posttrain.launch.set_aside import set_aside
from posttrain.launch.staged import Plan
from posttrain.launch.workers import Workers
from posttrain.rollouts.store import prompt_id
from posttrain.seams.callbacks import StopOnInterrupt
from posttrain.stages import StagedRecipe, Validation
from tests.processes import finish
from tests.small import BEGINNING

ARGS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "save_steps": 1,
    "logging_steps": 1,
    "report_to": [],
}

SMALL: dict[str, Any] = {
    **BEGINNING,
    "presample": {"samples_per_prompt": 8, "pef_threshold": 2},
    "evaluation": {"prompts": 4, "n": 4, "k": [1], "resamples": 10},
    "stages": {
        "draw": {"do": "presample"},
        "pair": {"do": "pairs", "store": "draw"},
        "prefer": {"method": {"name": "f_dpo", "args": ARGS}, "pairs": "pair"},
        "distil": {
            "method": {
                "name": "kdrl",
                "prompts_per_step": 4,
                "args": {**ARGS, "kd_only": True, "num_generations": 4},
            },
            "teacher": {"stage": "prefer"},
        },
        "soup": {"do": "merge", "models": {"prefer": 0.5, "distil": 0.5}, "evaluate": False},
        "look": {"do": "evaluate", "models": ["base", "soup"], "n": 8, "k": [1, 4]},
    },
}

Change = Callable[[dict[str, Any]], object]


def load(*changes: Change, source: dict[str, Any] = SMALL) -> StagedRecipe:
    """The small recipe, changed."""
    content = deepcopy(source)
    for change in changes:
        change(content)
    found = recipes.validate(content, "small.yaml")
    assert isinstance(found, StagedRecipe)
    return found


def stage(name: str, **values: Any) -> Change:
    """Change keys of a stage, as `method__args__beta`."""

    def change(content: dict[str, Any]) -> None:
        for path, value in values.items():
            *parents, last = path.split("__")
            section = content["stages"][name]
            for parent in parents:
                section = section[parent]
            section[last] = value

    return change


def write(path: Path, *changes: Change, source: dict[str, Any] = SMALL) -> Path:
    """The recipe as a file."""
    content = deepcopy(source)
    for change in changes:
        change(content)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def contents(out: Path) -> dict[str, str]:
    """The hash of every finished output by the stage's name."""
    found = {}
    for path in sorted((out / "stages").glob("*-????????????/manifest.json")):
        found[path.parent.name[:-13]] = json.loads(path.read_text())["content"]
    return found


def run(recipe: StagedRecipe, out: Path, **options: Any) -> None:
    staged.run(recipe, out, command="posttrain run small.yaml", **options)


@pytest.fixture(scope="module", autouse=True)
def cache(own_cache: Path) -> Path:
    return own_cache


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The output folder of a finished run."""
    out = tmp_path_factory.mktemp("finished") / "out"
    run(load(), out)
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A finished run that a test may edit."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.fixture(scope="module")
def planned(cache: Path) -> Plan:
    return staged.plan(load())


# ------------------------------------------------------------------ what a recipe may say


def test_a_stage_with_a_method_trains_it_and_inherits_what_it_leaves_open() -> None:
    recipe = load(stage("draw", temperature=0.7))
    prefer, draw, look = (recipe.stages[name] for name in ("prefer", "draw", "look"))
    assert prefer.do == "train"
    assert (draw.samples_per_prompt, draw.temperature, draw.top_p) == (8, 0.7, 0.95)  # type: ignore[union-attr]
    assert (look.prompts, look.n, look.resamples) == (4, 8, 10)  # type: ignore[union-attr]


def test_the_resolved_recipe_is_a_recipe() -> None:
    recipe = load()
    assert recipes.validate(recipes.parse_value(recipe.to_yaml()), "resolved") == recipe


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (stage("prefer", modle="x"), "unknown key 'stages.prefer.modle'; did you mean 'model'?"),
        (stage("prefer", method__nam="x"), "unknown key 'stages.prefer.method.nam'; did you mean 'name'?"),
        (stage("distil", teacher={"stag": "x"}), "unknown key 'stages.distil.teacher.stag'; did you mean 'stage'?"),
        (stage("draw", tempratur=1.0), "unknown key 'stages.draw.tempratur'; did you mean 'temperature'?"),
        (lambda c: c["presample"].update(sed=1), "unknown key 'presample.sed'; did you mean 'seed'?"),
        (stage("draw", do="presampel"), "stages.draw.do: there is no step 'presampel'; did you mean 'presample'?"),
        (lambda c: c["stages"].update(more={}), "stages.more says neither what to do (do) nor which method to train"),
        (lambda c: c["stages"]["pair"].pop("store"), "the key 'stages.pair.store' is missing"),
        (stage("pair", store="drw"), "stages.pair.store names 'drw', which is no earlier stage; did you mean 'draw'"),
        (stage("pair", store="prefer"), "stages.pair.store names 'prefer', which comes later"),
        (stage("distil", model="pair"), "stages.distil.model takes a policy, and 'pair' gives preference pairs"),
        (stage("distil", teacher={"stage": "draw"}), "stages.distil.teacher.stage takes a policy, and 'draw' gives"),
        (stage("distil", teacher={"warm_start": {}}), "warm_start makes a teacher here, and a recipe of stages makes"),
        (stage("distil", teacher={"base": True}), "stages.distil: teacher.base is the base of a LoRA student"),
        (stage("prefer", method__called="x"), "method.called has no effect"),
        (stage("soup", models={"prefer": 0.5, "distil": 0.6}), "the weights add up to 1.1 and not to 1"),
        (stage("soup", models={"prefer": 1.0, "distil": 0.0}), "the weight of 'distil' is 0"),
        (stage("look", k=[16]), "k = 16 exceeds n = 8"),
        (stage("look", models=["soup"], calibration={}), "calibration is measured from base: add base to models"),
        (lambda c: c.update(method={"name": "grpo"}), "a recipe has one of the two: remove method, or stages"),
        (lambda c: c["stages"].update(policy={"do": "warm_start"}), "a stage cannot be called 'policy'"),
        (lambda c: c["stages"].update({"look-soup": {"do": "warm_start"}}), "are called 'look-soup': rename one"),
        (lambda c: c["stages"].update({"a.b": {"do": "warm_start"}}), "should match pattern"),
        (lambda c: c.update(rounds={"repeat": 2, "next": "pair"}), "rounds.next names 'pair', which is no stage that"),
        (lambda c: c.update(rounds={"repeat": 1, "next": "soup"}), "rounds.repeat: input should be greater than or"),
        (lambda c: c.update(rounds={"repeat": 2, "next": "soup", "accept": True}), "add validation: {prompts: …}"),
        (lambda c: c.update(validation={"prompts": 2}), "set rounds.accept, or presample its prompts, or remove it"),
    ],
)
def test_mistakes_are_one_sentence_that_names_the_key(change: Change, sentence: str) -> None:
    with pytest.raises(UserError) as refusal:
        load(change)
    assert str(refusal.value).startswith("small.yaml: ")
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_method_rehearses_answers_of_the_policy_that_it_starts_from() -> None:
    late = {"method": {"name": "dph_rl", "args": ARGS}, "model": "prefer", "store": "draw"}
    with pytest.raises(UserError, match=r"stages\.late\.store holds answers of 'base', and .* from, 'prefer'"):
        load(lambda c: c["stages"].update(late=late))


def test_policies_of_several_origins_are_not_merged() -> None:
    other = {"other": {"do": "warm_start"}, "mix": {"do": "merge", "models": {"base": 0.5, "other": 0.5}}}
    with pytest.raises(UserError, match="come from base and other, models of their own"):
        load(lambda c: c["stages"].update(other))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (stage("prefer", method__args={**ARGS, "bta": 1.0}), "stages.prefer: The method 'f_dpo' has no argument 'bta'"),
        (
            lambda c: c["stages"]["prefer"].pop("pairs"),
            "stages.prefer: the method 'f_dpo' learns from preference pairs",
        ),
        (lambda c: c["stages"]["distil"].pop("teacher"), "stages.distil: the method 'kdrl' learns from a teacher"),
        (stage("distil", store="draw"), "stages.distil: store has no effect on the method 'kdrl'"),
        (
            stage("prefer", method={"name": "sft", "args": ARGS}),
            "stages.prefer: the method 'sft' learns from pre-sampl",
        ),
        (stage("look", prompts=5000), "stages.look: The task has"),
    ],
)
def test_a_mistake_in_any_stage_is_known_before_the_first(
    change: Change, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(pipeline, "initial_policy", fail)
    with pytest.raises(UserError) as refusal:
        run(load(change), tmp_path / "out")
    assert sentence in str(refusal.value)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ the graph


def test_rounds_repeat_what_depends_on_the_policy_and_nothing_else() -> None:
    recipe = load(
        lambda c: c["stages"].update(big={"do": "warm_start"}),
        lambda c: c.update(rounds={"repeat": 2, "next": "distil"}),
    )
    nodes = recipe.nodes
    assert [name for name in nodes if name.startswith(("draw", "big", "base"))] == ["base", "draw-1", "big", "draw-2"]
    assert nodes["draw-1"].inputs == {"model": "base"}
    assert nodes["draw-2"].inputs == {"model": "distil-1"}
    assert nodes["distil-2"].inputs == {"model": "distil-1", "teacher": "prefer-2"}
    assert [name for name in nodes if name.startswith("evaluate-")] == [
        "evaluate-base",
        "evaluate-prefer-1",
        "evaluate-distil-1",
        "evaluate-prefer-2",
        "evaluate-distil-2",
    ]


def test_until_needs_no_more_than_a_stage_stands_on(planned: Plan) -> None:
    assert planned.needed("pair") == ["base", "draw", "pair"]
    assert planned.needed("look-base") == ["base", "look-base"]
    assert set(planned.dependants("distil")) == {"distil", "soup", "look-soup", "evaluate-distil"}
    with pytest.raises(UserError, match="has no stage 'distill'; did you mean 'distil'"):
        planned.find("distill", last=True)


# ------------------------------------------------------------------ what outputs depend on

ALL = ("base", "draw", "pair", "prefer", "distil", "soup", "look-base", "look-soup")
EVALUATED = ("evaluate-base", "evaluate-prefer", "evaluate-distil")


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (stage("draw", temperature=0.9), ["draw"]),
        (stage("pair", per_prompt=2), ["pair"]),
        (stage("prefer", method__args={**ARGS, "beta": 0.5}), ["prefer"]),
        (stage("prefer", seed=1), ["prefer"]),
        (stage("distil", method__args={**SMALL["stages"]["distil"]["method"]["args"], "max_steps": 4}), ["distil"]),
        (stage("distil", teacher={"stage": "prefer", "batch_size": 2}), []),  # how it is computed, not what
        (stage("soup", models={"prefer": 0.25, "distil": 0.75}), ["soup"]),
        (stage("look", n=16), ["look-base", "look-soup"]),
        (lambda c: c["evaluation"].update(n=8), EVALUATED),
        (lambda c: c["evaluation"].update(seed=3), [*EVALUATED, "look-base", "look-soup"]),
        (lambda c: c["model"]["warm_start"].update(seed=1), ["base"]),
        (lambda c: c["rollout"].update(temperature=0.9), ["draw", "distil"]),
        (lambda c: c.update(seed=1), ["prefer", "distil"]),
        (lambda c: c["presample"].update(samples_per_prompt=16), ["draw"]),
        (lambda c: c["pairs"].update(seed=1) if "pairs" in c else c.update(pairs={"seed": 1}), ["pair"]),
        (lambda c: c.update(launch={"processes": 2}), ["prefer", "distil"]),
        (lambda c: c.update(rewards=[{"name": "countdown"}]), ["distil"]),
        (lambda c: c.update(name="renamed"), []),
    ],
)
def test_an_edit_changes_the_keys_of_what_depends_on_it_alone(planned: Plan, change: Change, first: list[str]) -> None:
    edited = staged.plan(load(change))
    changed = {name for name, work in edited.works.items() if work.key != planned.works[name].key}
    assert changed == {name for begin in first for name in planned.dependants(begin)}


def test_names_are_no_part_of_keys(planned: Plan) -> None:
    content = yaml.safe_load(yaml.safe_dump(SMALL, sort_keys=False).replace("prefer", "better"))
    renamed = staged.plan(load(source=content))
    assert renamed.works["better"].key == planned.works["prefer"].key
    assert renamed.works["soup"].key == planned.works["soup"].key


# ------------------------------------------------------------------ runs


def test_a_run_leaves_outputs_with_manifests_and_a_report(finished: Path) -> None:
    recipe = load()
    assert recipes.validate(recipes.parse_value((finished / "recipe.yaml").read_text()), "stored") == recipe
    assert set(contents(finished)) == {*ALL, *EVALUATED} - {"base"}
    (folder,) = (finished / "stages").glob("distil-*")
    made = json.loads((folder / "manifest.json").read_text())
    assert (made["step"], set(made["inputs"])) == ("train", {"model", "teacher"})
    assert made["inputs"]["teacher"]["stage"] == "prefer"
    assert made["results"]["steps"] == 3
    assert {"model/model.safetensors", "history.json"} <= set(made["files"])
    assert not [name for name in made["files"] if name.startswith("checkpoints")]
    comparison = json.loads((finished / "comparison.json").read_text())
    assert list(comparison["runs"]) == ["base", "prefer", "distil"]
    look = json.loads((finished / "comparison-look.json").read_text())
    assert (list(look["runs"]), look["n"]) == (["base", "soup"], 8)
    page = (finished / "report.html").read_text()
    assert "distil" in page
    assert "posttrain run small.yaml" in page


def test_a_stage_computes_what_a_plain_run_does(finished: Path, tmp_path: Path) -> None:
    """Same pairs, same method, same seed: the same weights, bit for bit."""
    content = {name: value for name, value in SMALL.items() if name != "stages"}
    plain = recipes.validate({**content, "method": SMALL["stages"]["prefer"]["method"]}, "plain")
    assert isinstance(plain, recipes.Recipe)
    pipeline.run(plain, tmp_path / "out", resume=False, command="")
    (folder,) = (finished / "stages").glob("prefer-*")
    ours, theirs = (load_file(f / "model/model.safetensors") for f in (folder, tmp_path / "out" / "f_dpo"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    same = [(finished / "stages").glob("pair-*/pairs/pairs.parquet"), (tmp_path / "out").glob("pairs/pairs.parquet")]
    one, other = (next(iter(files)).read_bytes() for files in same)
    assert one == other


def test_nothing_finished_is_done_twice(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged, "_RUN", {})  # a step that is asked for is a KeyError
    run(load(), copy)
    # Renamed, a stage still finds its output; and going back to the old name does, too.
    content = yaml.safe_load(yaml.safe_dump(SMALL, sort_keys=False).replace("prefer", "better"))
    run(load(source=content), copy)
    run(load(), copy)


def test_what_was_edited_is_done_again_with_what_depends_on_it(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    watched = {name: watching(step, done) for name, step in staged._RUN.items()}
    monkeypatch.setattr(staged, "_RUN", watched)
    run(load(stage("soup", models={"prefer": 0.25, "distil": 0.75})), copy)
    assert done == ["soup", "look-soup"]
    done.clear()
    run(load(), copy)  # the old outputs are still there
    assert done == []


def watching(step: Any, done: list[str]) -> Any:
    """A step that notes the nodes that it does."""

    def watched(running: Any, work: Any, folder: Path) -> Any:
        done.append(work.node.name)
        return step(running, work, folder)

    return watched


def test_damaged_outputs_are_found_by_their_hashes_and_made_again(
    copy: Path, finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def file(pattern: str) -> Path:
        (found,) = (copy / "stages").glob(pattern)
        return found

    altered, cut, lost = (
        file("pair-*/pairs/pairs.parquet"),
        file("prefer-*/model/model.safetensors"),
        file("evaluate-base-*/evaluation/samples.parquet"),
    )
    content = bytearray(altered.read_bytes())
    content[len(content) // 2] ^= 1
    altered.write_bytes(content)
    size = cut.stat().st_size
    cut.write_bytes(cut.read_bytes()[:-8])
    lost.unlink()
    done: list[str] = []
    monkeypatch.setattr(staged, "_RUN", {name: watching(step, done) for name, step in staged._RUN.items()})
    run(load(), copy)
    assert done == ["pair", "prefer", "evaluate-base"]
    told = " ".join(capsys.readouterr().err.split())
    assert "The output of 'pair' is damaged (pairs/pairs.parquet was altered), so it is made again" in told
    assert f"'prefer' is damaged (model/model.safetensors has {size - 8:,} bytes and not {size:,})" in told
    assert "'evaluate-base' is damaged (evaluation/samples.parquet is missing)" in told
    assert contents(copy) == contents(finished)
    assert len(list((copy / "stages").glob("*.corrupt-1"))) == 3


def test_what_read_another_output_is_made_again(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU an output that is made again may come out otherwise: here it is replaced by hand."""
    (soup,) = (copy / "stages").glob("soup-*")
    made = json.loads((soup / "manifest.json").read_text())
    made["content"] = "0" * 16
    (soup / "manifest.json").write_text(json.dumps(made))
    done: list[str] = []
    monkeypatch.setattr(staged, "_RUN", {name: watching(step, done) for name, step in staged._RUN.items()})
    run(load(), copy)
    assert done == ["look-soup"]
    assert "'soup' came out otherwise than before, so 'look-soup' is made again" in " ".join(
        capsys.readouterr().err.split()
    )


def test_interrupted_at_the_end_of_every_stage_it_ends_the_same(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each output is made but its manifest is not written; the next run takes it up there."""
    written, stopped = manifest.write, set[str]()

    def interrupt(folder: Path, **rest: Any) -> dict[str, Any]:
        if folder.name not in stopped:
            stopped.add(folder.name)
            raise KeyboardInterrupt
        return written(folder, **rest)

    monkeypatch.setattr(manifest, "write", interrupt)
    out = tmp_path / "out"
    while True:
        try:
            run(load(), out)
        except KeyboardInterrupt:
            continue
        break
    assert len(stopped) == len(contents(finished)) == 10
    assert contents(out) == contents(finished)
    assert not list(out.rglob(manifest.UNFINISHED))


def test_interrupted_inside_every_training_it_ends_the_same(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the second of three steps: a checkpoint is left, and the weights are the same bit for bit."""
    agree, stopped = StopOnInterrupt.on_step_end, set[str]()

    def ask(self: StopOnInterrupt, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 2 and args.output_dir not in stopped:
            stopped.add(args.output_dir)
            self._asked = True
        agree(self, args, state, control, **rest)

    monkeypatch.setattr(StopOnInterrupt, "on_step_end", ask)
    out = tmp_path / "out"
    for name in ("prefer", "distil"):
        with pytest.raises(KeyboardInterrupt):
            run(load(), out, until="soup")
        (folder,) = (out / "stages").glob(f"{name}-*")
        assert (folder / "checkpoints/checkpoint-2/complete").is_file()
        assert not (folder / "manifest.json").exists()
    run(load(), out, until="soup")
    assert len(stopped) == 2
    assert contents(out) == {name: contents(finished)[name] for name in ("draw", "pair", "prefer", "distil", "soup")}
    assert not (out / "report.html").exists()


def test_an_unfinished_output_of_other_inputs_begins_again(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(load(), out, until="draw")
    recipe = load()
    key = staged.plan(recipe).works["pair"].key
    folder = manifest.place(out / "stages", "pair", key)
    manifest.begin(folder, {"store": "another"}, 3.0)
    run(recipe, out, until="pair")
    assert "What 'pair' is made of has changed since it was begun" in " ".join(capsys.readouterr().err.split())
    assert contents(out)["pair"] == contents(finished)["pair"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("name: x\nmethod: {name: grpo}\n", "holds a run of a recipe without stages"), (None, "and holds no run")],
)
def test_a_folder_of_something_else_is_refused(tmp_path: Path, content: str | None, sentence: str) -> None:
    (tmp_path / ("notes.txt" if content is None else "recipe.yaml")).write_text(content or "mine")
    with pytest.raises(UserError, match=sentence):
        run(load(), tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


# ------------------------------------------------------------------ rounds


@pytest.fixture(scope="module")
def base(finished: Path) -> dict[str, Any]:
    """The warm start of the finished run as a model that exists: it has learned what rounds set aside."""
    return {"path": pipeline.initial_policy(staged.plan(load()).works["base"].job, Workers())}


def halving(policy: float, base: float) -> dict[str, Any]:
    """Rounds without training: each mixes the round's policy with the base."""
    mix = {"do": "merge", "models": {"policy": policy, "base": base}, "total": policy + base}
    return {
        **{name: SMALL[name] for name in ("name", "model", "task", "rollout", "evaluation")},
        "stages": {"mix": mix},
        "rounds": {"repeat": 3, "next": "mix", "accept": True},
        "validation": {"prompts": 6, "n": 8},
    }


def test_a_policy_that_solves_as_much_is_accepted(tmp_path: Path, base: dict[str, Any]) -> None:
    """½ θ + ½ θ = θ exactly: the same policy, the same answers, so not below."""
    run(load(lambda c: c.update(model=base), source=halving(0.5, 0.5)), tmp_path / "out")
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    assert not [node["name"] for node in plan["nodes"] if node["left_out"]]
    assert list(json.loads((tmp_path / "out/comparison.json").read_text())["runs"]) == [
        "base",
        "mix-1",
        "mix-2",
        "mix-3",
    ]


def test_a_policy_that_solves_less_is_refused_and_the_run_stops(
    tmp_path: Path, base: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """½ θ − ½ θ = 0: every token is as likely as any other, which solves nothing."""
    run(load(lambda c: c.update(model=base), source=halving(0.5, -0.5)), tmp_path / "out")
    note = "Round 1 is not accepted: 'mix-1' solves 0.0 % of the validation prompts at once, and 'base'"
    assert note in " ".join(capsys.readouterr().err.split())
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    left = [node["name"] for node in plan["nodes"] if node["left_out"]]
    assert left == ["mix-2", "validate-mix-2", "mix-3", "evaluate-mix-2", "evaluate-mix-3"]
    assert list(json.loads((tmp_path / "out/comparison.json").read_text())["runs"]) == ["base", "mix-1"]
    assert "rounds 2 to 3 are not run" in (tmp_path / "out/report.html").read_text()


def test_validation_prompts_are_neither_trained_on_nor_evaluated() -> None:
    plan = staged.plan(load(source=halving(0.5, 0.5)))
    validated, evaluated = (plan.works[name].job for name in ("validate-base", "evaluate-base"))
    decided = {prompt_id(row["prompt"]) for row in validated.eval_rows}
    assert len(decided) == 6
    for rows in (evaluated.eval_rows, *(work.job.train_rows for work in plan.works.values())):
        assert not decided & {prompt_id(row["prompt"]) for row in rows}
    assert not decided & {prompt_id(row["prompt"]) for row in validated.task.rows("train")}  # what warm starts learn
    whole = tasks.load("countdown", SMALL["task"]["options"])
    assert len(whole.rows("train")) == len(validated.train_rows) + 6
    again = set_aside(whole, Validation(prompts=6))[1]
    assert again == validated.eval_rows
    assert set_aside(whole, Validation(prompts=6, seed=1))[1] != again
    with pytest.raises(UserError, match="which leaves none to train on"):
        set_aside(whole, Validation(prompts=24))


# ------------------------------------------------------------------ merging


def saved(folder: Path, **weights: torch.Tensor) -> str:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"made": folder.name}))
    return str(folder)


def test_weights_are_added_in_float32_and_rounded_once(tmp_path: Path) -> None:
    """bfloat16 has 8 bits: 1 + 2⁻⁸ would be rounded to 1 at once, and again; 1 + 2⁻⁸ + 2⁻⁸ = 1 + 2⁻⁷ it can hold."""
    half = 2.0**-8
    rows = {"one": [1.0, 2.0], "two": [half, 4.0], "three": [half, -6.0]}
    one, two, three = (saved(tmp_path / name, w=torch.tensor(row, dtype=torch.bfloat16)) for name, row in rows.items())
    merging.merge([(one, 1.0), (two, 1.0), (three, 1.0)], tmp_path / "sum", dtype="bfloat16")
    found = load_file(tmp_path / "sum/model.safetensors")["w"]
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [1.0 + 2 * half, 0.0]
    merging.merge([(one, -1.0), (two, 2.0)], tmp_path / "beyond", dtype="float32")
    assert load_file(tmp_path / "beyond/model.safetensors")["w"].tolist() == [2 * half - 1.0, 6.0]
    assert json.loads((tmp_path / "sum/config.json").read_text()) == {"made": "one"}


def test_models_that_do_not_fit_are_not_merged(tmp_path: Path) -> None:
    one = saved(tmp_path / "one", w=torch.zeros(2), head=torch.zeros(2))
    tied, wide = saved(tmp_path / "tied", w=torch.zeros(2)), saved(tmp_path / "wide", w=torch.zeros(3))
    for first, second, sentence in (
        (one, tied, "has no weight 'head', which"),
        (tied, one, "has the weight 'head', which"),
        (tied, wide, r"has the shape \(3,\) in .* and \(2,\) in"),
    ):
        with pytest.raises(UserError, match=sentence):
            merging.merge([(first, 0.5), (second, 0.5)], tmp_path / "out", dtype="float32")
        assert not (tmp_path / "out").exists()


def test_the_merged_policy_is_the_mean_and_stays_tied(finished: Path) -> None:
    from transformers import AutoModelForCausalLM

    one, two, mean = (next((finished / "stages").glob(f"{name}-*/model")) for name in ("prefer", "distil", "soup"))
    first, second, found = (load_file(folder / "model.safetensors") for folder in (one, two, mean))
    for name, tensor in found.items():
        assert torch.equal(tensor, 0.5 * first[name] + 0.5 * second[name]), name
    assert any(not torch.equal(first[name], second[name]) for name in found)
    model = AutoModelForCausalLM.from_pretrained(mean)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "lm_head.weight" not in found


def test_stages_of_adapters_start_from_what_was_merged(tmp_path: Path) -> None:
    """W' = W + s·B·A of the first stage is what the second one adapts."""
    again = {"method": SMALL["stages"]["prefer"]["method"], "pairs": "pair", "model": "prefer", "evaluate": False}
    recipe = load(
        lambda c: c["model"].update(lora={"r": 4, "alpha": 8}),
        lambda c: c["stages"].update({name: c["stages"][name] for name in ("draw", "pair", "prefer")}, again=again),
        lambda c: [c["stages"].pop(name) for name in ("distil", "soup", "look")],
    )
    out = tmp_path / "out"
    run(recipe, out, until="again")
    (first,), (second,) = ((out / "stages").glob(f"{name}-*") for name in ("prefer", "again"))
    base = load_file(next(Path(recipe_cache()).glob("countdown-*")) / "model.safetensors")
    adapters = load_file(first / "model/adapter_model.safetensors")
    whole = load_file(first / "whole/model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapters[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
    torch.testing.assert_close(whole[f"{name}.weight"], base[f"{name}.weight"] + 2.0 * b @ a, rtol=0, atol=1e-7)
    assert b.abs().max() > 0
    config = json.loads((second / "model/adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == (first / "whole").resolve()


def recipe_cache() -> str:
    from posttrain.launch.warm_start import cache_root

    return str(cache_root() / "warm_start")


# ------------------------------------------------------------------ the command line


def plain(text: str) -> str:
    """Terminal output without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_plan_shows_how_far_every_stage_is_and_does_nothing(copy: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "small.yaml", stage("soup", models={"prefer": 0.25, "distil": 0.75}))
    (damaged,) = (copy / "stages").glob("draw-*/store/samples.parquet")
    damaged.write_bytes(b"")
    before = {file: file.stat().st_mtime_ns for file in copy.rglob("*")}
    shown = call("run", str(path), "--plan", "--output-dir", str(copy))
    assert shown.exit_code == 0, shown.output
    states = {line.split()[0]: line for line in shown.stdout.splitlines() if "│" in line}
    assert "corrupt (store/samples.parquet has 0 bytes" in states["draw"]
    assert "done" in states["pair"]
    assert "changed" in states["soup"]
    assert "changed" in states["look-soup"]
    assert before == {file: file.stat().st_mtime_ns for file in copy.rglob("*")}
    empty = call("run", str(path), "--plan", "--output-dir", str(tmp_path / "none"))
    assert empty.stdout.count("to do") == 10
    assert not (tmp_path / "none").exists()


def test_from_and_until_and_status(copy: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "small.yaml")
    stamps = {file.parent.name: file.stat().st_mtime_ns for file in copy.glob("stages/*/manifest.json")}
    done = call("run", str(path), "--output-dir", str(copy), "--from", "pair", "--until", "prefer")
    assert done.exit_code == 0, done.output
    again = {file.parent.name: file.stat().st_mtime_ns for file in copy.glob("stages/*/manifest.json")}
    made = {name[:-13] for name, stamp in again.items() if stamps.get(name) not in (None, stamp)}
    assert made == {"pair", "prefer"}
    shown = call("status", str(copy))
    assert shown.exit_code == 0, shown.output
    states = {line.split("│")[0].strip(): line for line in shown.stdout.splitlines() if "│" in line}
    assert "done" in states["prefer"]
    assert "steps 3, loss" in states["prefer"]
    assert "to do" in states["distil"]  # it depends on what was made anew
    assert "pass@1" in states["evaluate-base"]


def test_options_of_stages_are_refused_elsewhere() -> None:
    for option in (["--plan"], ["--from", "x"], ["--until", "x"]):
        refused = call("run", "grpo/countdown3", *option)
        assert refused.exit_code == 2
        assert f"{option[0]} is for recipes of stages, and 'countdown3' has none" in refused.stderr
    for verb in ("presample", "pairs", "evaluate", "sweep"):
        refused = call(verb, "f_dpo/countdown3_iterated")
        assert refused.exit_code == 2
        assert "takes a recipe of one method, and 'countdown3_iterated' has stages" in refused.stderr


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(staged, "run", interrupt)
    result = call("run", "f_dpo/countdown3_iterated", "--from", "pair", "--until", "prefer")
    assert result.exit_code == 130
    assert "continue with: posttrain run f_dpo/countdown3_iterated --until prefer\n" in result.stderr


def test_check_shows_the_stages_and_resolves_every_method() -> None:
    shown = call("check", "kdrl/countdown3_paced", "--set", "stages.reverse.method.args.max_steps=7")
    assert shown.exit_code == 0, shown.output
    content = recipes.parse_value(shown.stdout)
    assert content["stages"]["reverse"]["method"]["args"]["max_steps"] == 7
    assert "# reverse: train kdrl of forward, teacher; world 1 × per-device 192" in shown.stdout
    refused = call("check", "kdrl/countdown3_paced", "--set", "stages.reverse.method.args.max_step=7")
    assert "has no argument 'max_step'; did you mean 'max_steps'?" in refused.stderr


def test_status_of_a_plain_run_says_what_is_there(tmp_path: Path) -> None:
    recipe = recipes.load("dph_rl/countdown3")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    (tmp_path / "grpo").mkdir()
    (tmp_path / "grpo/history.json").write_text("[]")
    shown = call("status", str(tmp_path)).stdout
    states = {line.split("│")[0].strip(): line for line in shown.splitlines() if "│" in line}
    assert "done" in states["grpo"]
    assert "done" not in states["dph_rl"]
    assert "holds no run" in call("status", str(tmp_path / "grpo")).stderr


# ------------------------------------------------------------------ the documentation

PAGE = (Path(__file__).parent.parent / "docs" / "stages.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL))
def test_recipes_of_the_documentation_can_be_planned(text: str, tmp_path: Path) -> None:
    path = tmp_path / text.split()[1]
    path.write_text(text.replace("../recipes", str(recipes.RECIPES)))
    recipe = recipes.load(str(path))
    assert isinstance(recipe, StagedRecipe)
    assert staged.plan(recipe).works


def test_commands_of_the_documentation_exist() -> None:
    (text,) = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    for verb in set(re.findall(r"^posttrain (\w+)", text, flags=re.MULTILINE)):
        shown = plain(call(verb, "--help").stdout)
        for option in re.findall(rf"posttrain {verb} .*?(--\w[\w-]*)", text):
            assert option in shown


@pytest.mark.parametrize("name", [name for name in recipes.names() if "stages" in recipes.read(recipes.names()[name])])
def test_every_recipe_of_stages_can_be_planned(name: str) -> None:
    recipe = recipes.load(name)
    assert isinstance(recipe, StagedRecipe)
    trained = {name for name, node in recipe.nodes.items() if node.step == "train"}
    assert set(staged.resolved_stages(recipe)) == trained
    if recipe.task.name == "hub":  # whose rows are not at hand
        return
    plan = staged.plan(recipe)
    assert len({work.key for work in plan.works.values()}) == len(plan.works)


# ------------------------------------------------------------------ several processes


@pytest.mark.slow
def test_two_processes_plan_the_same_and_draw_the_same(tmp_path: Path, finished: Path) -> None:
    path = write(tmp_path / "small.yaml")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "posttrain", "run", str(path), "--output-dir", str(out)]
    finish([*command, "--set", "launch.processes=2"])
    found, wanted = contents(out), contents(finished)
    assert set(found) == set(wanted)
    for name in ("draw", "pair", "look-base", "evaluate-base"):
        assert found[name] == wanted[name], name
