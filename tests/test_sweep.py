"""Sweeps: what several values of a setting mean, how the runs are called, and what a grid may not vary."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from posttrain import recipe as recipes
from posttrain.cli import app
from posttrain.errors import UserError
from posttrain.launch.resolve import every_run

BASE: dict[str, Any] = {
    "name": "grid",
    "model": {"path": "nowhere"},
    "task": {"name": "countdown"},
    "method": {"name": "f_dpo", "args": {"beta": 0.5, "learning_rate": 1e-3}},
}


def with_sweep(sweep: dict[str, Any], **changes: Any) -> recipes.Recipe:
    return recipes.validate({**BASE, **changes, "sweep": sweep}, "grid.yaml")


@pytest.mark.parametrize(
    ("assignment", "values"),
    [
        ("method.args.beta=0.03,0.1, 0.3", [0.03, 0.1, 0.3]),
        ("method.args.divergence=js,reverse_kl", ["js", "reverse_kl"]),
        ("seed=0,1", [0, 1]),
        ("method.args.loss_type=[sigmoid, sft],[ipo]", [["sigmoid", "sft"], ["ipo"]]),
        (
            "method.args={divergence: js},{divergence: alpha, alpha: 0.5}",
            [{"divergence": "js"}, {"divergence": "alpha", "alpha": 0.5}],
        ),
    ],
)
def test_commas_outside_of_brackets_separate_values(assignment: str, values: list[Any]) -> None:
    assert recipes.spread([assignment]) == ([], {assignment.partition("=")[0]: values})


@pytest.mark.parametrize(
    "assignment", ["evaluation.k=[1, 4]", "name='a, b'", 'name="a, b"', "seed=1", "model.lora={r: 4, alpha: 8}"]
)
def test_one_value_stays_an_ordinary_assignment(assignment: str) -> None:
    assert recipes.spread([assignment]) == ([assignment], {})


def test_the_grid_is_the_product_and_every_run_says_what_it_is() -> None:
    recipe = with_sweep(
        {"method.args.divergence": ["js", "reverse_kl"], "method.args.beta": [0.1, 1.0], "seed": [0, 7]}
    )
    assert list(recipe.cells)[:3] == ["js-beta0.1-seed0", "js-beta0.1-seed7", "js-beta1.0-seed0"]
    assert len(recipe.cells) == 8
    assert recipe.cells["reverse_kl-beta1.0-seed7"] == {"divergence": "reverse_kl", "beta": 1.0, "seed": 7}
    runs = every_run(recipe)
    assert list(runs) == list(recipe.cells)
    run = runs["reverse_kl-beta1.0-seed7"]
    assert run.seed == 7
    assert run.method.args == {"beta": 1.0, "learning_rate": 1e-3, "divergence": "reverse_kl"}
    assert run.method.label == "reverse_kl-beta1.0-seed7"
    assert not run.sweep


def test_arguments_that_belong_together_vary_together() -> None:
    recipe = with_sweep(
        {"method.args": [{"divergence": "alpha", "alpha": 0.5}, {"divergence": "js", "match_slope": True}]}
    )
    assert recipe.cells == {
        "alpha0.5": {"divergence": "alpha", "alpha": 0.5},
        "js-match_slope": {"divergence": "js", "match_slope": True},
    }


def test_baselines_stay_beside_the_grid() -> None:
    recipe = with_sweep({"seed": [1, 2]}, baselines=[{"name": "grpo", "args": {"max_steps": 3}, "seed": 5}])
    runs = every_run(recipe)
    assert list(runs) == ["grpo", "seed1", "seed2"]
    assert [run.seed for run in runs.values()] == [5, 1, 2]


def test_methods_vary_as_baselines_do_and_over_seeds() -> None:
    """Each takes over the main arguments that its config class knows (beta is f-DPO's and GRPO's, not this alpha)."""
    recipe = with_sweep(
        {"method": [{"name": "grpo"}, {"name": "grpo", "called": "kl", "args": {"beta": 0.1}}], "seed": [0, 1]},
        method={"name": "f_dpo", "args": {"beta": 0.5, "learning_rate": 1e-3, "alpha": 0.5}},
    )
    assert recipe.cells["kl-seed1"] == {"method": "kl", "seed": 1}
    runs = every_run(recipe)
    assert list(runs) == ["grpo-seed0", "grpo-seed1", "kl-seed0", "kl-seed1"]
    assert [run.method.name for run in runs.values()] == ["grpo"] * 4
    assert runs["grpo-seed1"].method.args == {"beta": 0.5, "learning_rate": 1e-3}
    assert runs["kl-seed1"].method.args == {"beta": 0.1, "learning_rate": 1e-3}
    assert (runs["kl-seed1"].seed, runs["kl-seed1"].method.label) == (1, "kl-seed1")


@pytest.mark.parametrize(
    ("sweep", "sentence"),
    [
        ({"method": ["grpo"]}, "sweep.method lists methods as {name, prompts_per_step, args, called}, got 'grpo'"),
        (
            {"method": [{"name": "grpo", "seed": 1}]},
            "sweep.method lists methods as {name, prompts_per_step, args, called}",
        ),
        ({"method": [{"name": "grpo"}, {"name": "grpo"}]}, "two combinations of the sweep are the same"),
        ({"method": [{"name": "grpo"}], "method.args.beta": [0, 1]}, "give their arguments there, in args"),
        ({"evaluation.n": [8, 16]}, "a sweep cannot vary evaluation.n, only method, method.args and seed"),
        ({"method.beta": [0.1, 0.3]}, "a sweep cannot vary method.beta, only method, method.args and seed"),
        ({"seed": []}, "sweep.seed lists no value"),
        ({"seed": [0, -1]}, "sweep.seed lists numbers from 0"),
        ({"seed": [3, 3]}, "two combinations of the sweep are the same"),
        ({"method.args": ["js"]}, "sweep.method.args lists mappings"),
    ],
)
def test_what_a_grid_cannot_be(sweep: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence.replace("(", r"\(")):
        with_sweep(sweep)


def test_the_command_wants_several_values() -> None:
    result = CliRunner().invoke(app, ["sweep", "f_dpo/countdown3", "--set", "seed=1"])
    assert result.exit_code == 2
    assert "nothing to sweep: give a setting several values" in result.stderr


def test_the_command_hands_the_grid_to_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run(recipe: recipes.Recipe, output_dir: Any, *, resume: bool, command: str) -> None:
        seen.update(recipe=recipe, output_dir=str(output_dir), command=command)

    from posttrain.launch import pipeline

    monkeypatch.setattr(pipeline, "run", run)
    arguments = ["sweep", "f_dpo/countdown3", "--set", "method.args.beta=0.1,0.3", "--set", "seed=4"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(json.dumps(seen["recipe"].sweep)) == {"method.args.beta": [0.1, 0.3]}
    assert seen["recipe"].seed == 4
    assert seen["output_dir"] == "runs/sweep-f_dpo-countdown3"
    assert seen["command"].startswith("posttrain sweep f_dpo/countdown3 --set method.args.beta=0.1,0.3")
