"""Recipes: the schema, bases, overrides and the sentences that mistakes earn; and every recipe that we ship."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from posttrain import recipe as recipes
from posttrain import registry
from posttrain.errors import UserError
from posttrain.stages import Node, StagedRecipe, Trained

MINIMAL = """
name: minimal
model: {path: some/model}
task: {name: countdown}
method: {name: grpo}
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a recipe file into a folder of its own and return its path."""

    def _write(text: str, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def complaint(path: Path, *assignments: str) -> str:
    """The sentence with which a recipe is refused."""
    with pytest.raises(UserError) as refusal:
        recipes.load(str(path), assignments)
    return str(refusal.value)


# ------------------------------------------------------------------ YAML


def test_floats_are_read_as_yaml_1_2_does() -> None:
    assert recipes.parse_value("1e-6") == 1e-6
    assert recipes.parse_value("-2.5E+3") == -2500.0
    assert recipes.parse_value("1e3") == 1000.0
    assert recipes.parse_value(".5") == 0.5
    assert math.isinf(recipes.parse_value(".inf"))


def test_what_looks_like_a_number_but_is_none_stays_what_it_is() -> None:
    assert recipes.parse_value("7") == 7
    assert isinstance(recipes.parse_value("7"), int)
    assert recipes.parse_value("1.2.3") == "1.2.3"
    assert recipes.parse_value("e5") == "e5"
    assert recipes.parse_value("[1, 4]") == [1, 4]


def test_a_key_that_is_written_twice_is_refused(write: Write) -> None:
    assert "the key 'name' is written twice" in complaint(write(MINIMAL + "name: again\n"))


def test_broken_yaml_is_one_sentence(write: Write) -> None:
    message = complaint(write("name: [unclosed"))
    assert "is not valid YAML" in message
    assert "\n" not in message


def test_a_recipe_must_be_a_mapping(write: Write) -> None:
    assert "holds list, but a recipe is a mapping" in complaint(write("- name\n"))


# ------------------------------------------------------------------ schema


def test_the_defaults_stand_in_one_place(write: Write) -> None:
    recipe = recipes.load(str(write(MINIMAL)))
    assert (recipe.seed, recipe.presample.samples_per_prompt, recipe.evaluation.n) == (0, 8, 128)
    assert recipe.launch.processes == 1


@pytest.mark.parametrize(
    ("line", "key", "nearest"),
    [
        ("evalution: {}", "evalution", "evaluation"),
        ("rollout: {max_token: 8}", "rollout.max_token", "max_tokens"),
        ("presample: {pef_treshold: 4}", "presample.pef_treshold", "pef_threshold"),
        ("rewards: [{nam: countdown}]", "rewards.0.nam", "name"),
    ],
)
def test_an_unknown_key_earns_the_nearest_known_one(write: Write, line: str, key: str, nearest: str) -> None:
    message = complaint(write(MINIMAL + line))
    assert f"unknown key '{key}'" in message
    assert f"did you mean '{nearest}'?" in message


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("seed: '7'", "seed: input should be a valid integer, found '7'"),
        ("rollout: {max_tokens: 0}", "rollout.max_tokens: input should be greater than 0, found 0"),
        ("evaluation: {n: 8, k: [1, 16]}", "k = 16 exceeds n = 8"),
        ("evaluation: {k: [4, 1]}", "k must increase without repeats"),
        ("presample: {pef_threshold: 9}", "pef_threshold 9 exceeds samples_per_prompt 8"),
        ("rewards: [{}]", "give either name"),
        ("rewards: [{function: 'a:b', options: {c: 1}}]", "a function takes none"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(write: Write, line: str, sentence: str) -> None:
    assert sentence in complaint(write(MINIMAL + line))


@pytest.mark.parametrize("assignment", ["model.path=null", "model.warm_start={}"])
def test_a_model_has_exactly_one_source(write: Write, assignment: str) -> None:
    assert "name exactly one source" in complaint(write(MINIMAL), assignment)


def test_a_missing_section_is_named(write: Write) -> None:
    assert "the key 'task' is missing" in complaint(write(MINIMAL.replace("task: {name: countdown}", "")))


# ------------------------------------------------------------------ extends


def test_a_recipe_lies_over_its_base_mapping_by_mapping(write: Write) -> None:
    base = MINIMAL.replace("{name: grpo}", "{name: grpo, args: {beta: 0.1, max_steps: 3}}")
    write(base + "evaluation: {n: 64, k: [1, 2]}", "base.yaml")
    path = write("extends: base.yaml\nname: above\nevaluation: {k: [1]}\nmethod: {args: {beta: 0.2}}")
    recipe = recipes.load(str(path))
    assert recipe.name == "above"
    assert (recipe.evaluation.n, recipe.evaluation.k) == (64, [1])  # a list is replaced
    assert recipe.method.args == {"beta": 0.2, "max_steps": 3}  # a mapping is merged


def test_of_several_bases_the_later_ones_prevail(write: Write) -> None:
    write(MINIMAL, "first.yaml")
    write("evaluation: {n: 8, k: [2]}\nseed: 3", "second.yaml")
    write("evaluation: {k: [4]}", "third.yaml")
    recipe = recipes.load(str(write("extends: [first.yaml, second.yaml, third.yaml]\nname: above")))
    assert (recipe.name, recipe.seed, recipe.evaluation.n, recipe.evaluation.k) == ("above", 3, 8, [4])
    assert "must be a path, or a list of them, got {'a': 1}" in complaint(write("extends: {a: 1}"))
    assert "must be a path, or a list of them, got [1]" in complaint(write("extends: [1]"))


def test_a_circle_of_bases_is_refused_by_name(write: Write) -> None:
    write("extends: recipe.yaml", "base.yaml")
    assert "extends itself through recipe.yaml -> base.yaml" in complaint(write("extends: base.yaml"))


def test_a_missing_base_is_refused_with_the_file_that_asks_for_it(write: Write) -> None:
    message = complaint(write("extends: nowhere.yaml"))
    assert "nowhere.yaml, which recipe.yaml extends" in message


def test_two_runs_of_one_name_are_refused(write: Write) -> None:
    with pytest.raises(UserError, match="two runs are called 'grpo': give the baseline another name"):
        recipes.load(str(write(MINIMAL + "baselines: [{name: grpo}]")))
    recipe = recipes.load(str(write(MINIMAL + "baselines: [{name: grpo, called: grpo-2}]")))
    assert [baseline.label for baseline in recipe.baselines] == ["grpo-2"]


def test_baselines_take_over_the_arguments_that_they_know() -> None:
    from posttrain.launch.resolve import every_run

    runs = every_run(recipes.load("dph_rl/countdown3", ["method.args.max_steps=7"]))
    assert list(runs) == ["grpo", "dph_rl"]
    assert runs["grpo"].method.args["max_steps"] == 7
    assert "eta" not in runs["grpo"].method.args
    assert runs["grpo"].model == runs["dph_rl"].model


# ------------------------------------------------------------------ --set


def test_an_override_reaches_any_depth_and_creates_sections(write: Write) -> None:
    recipe = recipes.load(str(write(MINIMAL)), ["method.args.learning_rate=1e-6", "evaluation.k=[1, 8]", "name=other"])
    assert recipe.method.args == {"learning_rate": 1e-6}
    assert (recipe.evaluation.k, recipe.name) == ([1, 8], "other")


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("seed", "--set takes a.b=value, got 'seed'"),
        ("a..b=1", "--set takes a.b=value"),
        ("name.first=x", "'name' is a value, not a section"),
        ("sed=1", "did you mean 'seed'?"),
        ("name=[1", "is no YAML value"),
    ],
)
def test_a_wrong_override_is_refused(write: Write, assignment: str, sentence: str) -> None:
    assert sentence in complaint(write(MINIMAL), assignment)


# ------------------------------------------------------------------ names and digests


def test_a_recipe_is_found_by_path_and_by_name() -> None:
    path = recipes.names()["dph_rl/countdown3"]
    assert recipes.find("dph_rl/countdown3") == path
    assert recipes.find("recipes/dph_rl/countdown3.yaml").samefile(path)
    with pytest.raises(UserError, match="did you mean 'dph_rl/countdown3'"):
        recipes.find("dph_rl/countdwn3")


def test_the_digest_follows_the_content(write: Write) -> None:
    path = str(write(MINIMAL))
    assert recipes.load(path).digest() == recipes.load(path).digest()
    assert recipes.load(path).digest() != recipes.load(path, ["seed=1"]).digest()


def test_the_resolved_recipe_is_a_recipe(write: Write) -> None:
    recipe = recipes.load(str(write(MINIMAL)), ["method.args.learning_rate=1e-6"])
    assert recipes.load(str(write(recipe.to_yaml(), "resolved.yaml"))) == recipe


# ------------------------------------------------------------------ the recipes that we ship


def trained(recipe: StagedRecipe) -> list[Node]:
    """The nodes that train."""
    return [node for node in recipe.nodes.values() if isinstance(node.stage, Trained)]


def methods_of(recipe: recipes.Recipe | StagedRecipe) -> list[recipes.Method | recipes.Baseline]:
    """Whatever a recipe trains."""
    if isinstance(recipe, StagedRecipe):
        return [stage.method for stage in recipe.stages.values() if isinstance(stage, Trained)]
    return [recipe.method, *recipe.baselines]


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_opens_with_its_command_and_what_it_is(name: str) -> None:
    command, summary, *_ = recipes.names()[name].read_text(encoding="utf-8").splitlines()
    assert command == f"# posttrain run recipes/{name}.yaml"
    assert summary.startswith("# ")


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_is_valid_and_names_what_exists(name: str) -> None:
    recipe = recipes.load(name)
    methods = [method.name for method in methods_of(recipe)]
    assert name.partition("/")[0] in methods
    registry.entry("task", recipe.task.name)
    for reward in recipe.rewards:
        if reward.name is not None:
            registry.entry("reward", reward.name)
    for method in methods:
        registry.entry("method", method)


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_says_only_what_departs_from_the_schema(name: str) -> None:
    """A default is written in one place, its class; what a recipe repeats would not follow a change there."""
    recipe = recipes.load(name)
    for section in ("presample", "rollout", "evaluation", "launch"):
        chosen = getattr(recipe, section)
        stated = recipes.read(recipes.names()[name]).get(section, {})
        repeated = [key for key in stated if getattr(type(chosen)(), key) == getattr(chosen, key)]
        assert not repeated, f"{section}: {repeated} are the defaults"


def test_twins_differ_in_their_method_alone() -> None:
    for size in ("countdown3", "countdown4"):
        dph = yaml.safe_load(recipes.load(f"dph_rl/{size}").to_yaml())
        grpo = yaml.safe_load(recipes.load(f"grpo/{size}").to_yaml())
        own = {key: dph["method"]["args"].pop(key) for key in ("divergence", "eta")}
        assert own["divergence"] == "forward_kl"
        assert [baseline["name"] for baseline in dph.pop("baselines")] == ["grpo"]
        assert grpo.pop("baselines") == []
        assert dph["method"].pop("name") != grpo["method"].pop("name")
        assert dph == grpo


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_passes_the_second_check(name: str) -> None:
    """What `posttrain check` does after the schema: the arguments against the trainer's own config class."""
    from posttrain.launch.resolve import resolve

    recipe = recipes.load(name)
    several = [recipe] if isinstance(recipe, recipes.Recipe) else [recipe.plain(node) for node in trained(recipe)]
    for each in several:
        batch = resolve(each).batch
        assert batch.world * batch.per_device * batch.accumulation == batch.prompts * batch.generations


def test_recipes_can_be_copied_out_and_run_from_elsewhere(tmp_path: Path) -> None:
    shutil.copytree(recipes.RECIPES, tmp_path / "copy", symlinks=False)
    copied = tmp_path / "copy" / "dph_rl" / "countdown3.yaml"
    assert recipes.load(str(copied)).method == recipes.load("dph_rl/countdown3").method
