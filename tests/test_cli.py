"""The command line: what it prints, how it refuses, and what it must not import."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import posttrain
import posttrain.launch
from posttrain import recipe as recipes
from posttrain import registry
from posttrain.cli import app, run
from posttrain.cli.check import batch_identity
from posttrain.cli.listing import settings_of
from posttrain.errors import UserError

HEAVY = ("torch", "transformers", "trl", "datasets", "accelerate", "vllm", "numpy", "pyarrow", "sympy")
RECIPE = "dph_rl/countdown3"


def call(*arguments: str) -> Result:
    """Run `posttrain` in this process."""
    return CliRunner().invoke(app, list(arguments))


def plain(text: str) -> str:
    """Help text without frames, colours and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A stand-in for the job, which takes minutes; `calls` records how it was called."""
    calls: list[tuple[Any, ...]] = []

    def record(name: str, result: object = None) -> Callable[..., Any]:
        def function(recipe: recipes.Recipe, *arguments: Any, **options: Any) -> Any:
            calls.append((name, recipe.name, *arguments, options))
            return result

        return function

    stand_in = types.SimpleNamespace(
        calls=calls,
        run=record("run"),
        run_presample=record("run_presample", Path("the/store")),
        run_evaluate=record("run_evaluate"),
    )
    monkeypatch.setitem(sys.modules, "posttrain.launch.pipeline", stand_in)
    monkeypatch.setattr(posttrain.launch, "pipeline", stand_in, raising=False)
    return stand_in


# ------------------------------------------------------------------ help and listings


def test_the_help_teaches_by_example() -> None:
    text = plain(call("--help").stdout)
    for verb in ("run", "sweep", "check", "presample", "pairs", "evaluate", "recipes", "methods", "rewards", "tasks"):
        assert f" {verb} " in text
    assert "posttrain run dph_rl/countdown3" in text
    assert recipes.find("dph_rl/countdown3").is_file()  # the example exists


@pytest.mark.parametrize("verb", ["run", "sweep", "check", "presample", "pairs", "evaluate"])
def test_every_verb_explains_its_arguments(verb: str) -> None:
    text = plain(call(verb, "--help").stdout)
    assert "RECIPE" in text
    assert "--set" in text


def test_the_version() -> None:
    assert call("--version").stdout == f"posttrain {posttrain.__version__}\n"


@pytest.mark.parametrize("kind", registry.KINDS)
def test_a_list_shows_every_entry_with_its_summary(kind: str) -> None:
    lines = call(f"{kind}s").stdout.splitlines()
    for line, (name, entry) in zip(lines, registry.entries(kind).items(), strict=True):
        assert line.split(maxsplit=1) == [name, entry.summary]


def test_the_list_of_recipes_shows_what_each_is() -> None:
    result = call("recipes")
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(recipes.names())
    assert all(len(line.split()) > 1 for line in result.stdout.splitlines())


def test_a_recipe_is_shown_as_it_was_written() -> None:
    assert call("recipes", "show", RECIPE).stdout == recipes.names()[RECIPE].read_text(encoding="utf-8")


def test_a_method_is_shown_with_the_settings_that_it_adds_or_changes() -> None:
    text = call("methods", "show", "dph_rl").stdout
    assert "L = L_exp(D_exp) + η · L_pef(D_pef)" in text
    assert "DPHConfig adds or changes, over GRPOConfig:" in text
    assert "eta: float = 0.2\n      η, the weight of L_pef" in text


def test_brackets_in_a_docstring_are_no_markup() -> None:
    """`[B, T]` must not vanish as if it were a rich style."""
    for kind in registry.KINDS:
        for name, entry in registry.entries(kind).items():
            assert entry.doc in call(f"{kind}s", "show", name).stdout


def test_settings_are_read_from_any_way_of_writing_a_field(tmp_path: Path) -> None:
    path = tmp_path / "made_up.py"
    path.write_text(
        '"""Made up."""\n'
        "class Options(RewardOptions):\n"
        '    """Options."""\n'
        "    name: ClassVar[str] = 'hidden'\n"
        "    plain: int = 3\n"
        '    """An\n    int."""\n'
        "    bounded: float = Field(0.5, gt=0)\n"
        "    required: str = Field(min_length=1)\n"
        "    made: list[int] = Field(default_factory=list)\n"
        "    told: int = field(default=1, metadata={'help': 'Told ' 'twice.'})\n"
        "    bare: bool\n"
    )
    (settings,) = settings_of(registry.Entry("reward", "made_up", "made_up", path))
    assert [(field.name, field.type, field.default, field.help) for field in settings.fields] == [
        ("plain", "int", " = 3", "An int."),
        ("bounded", "float", " = 0.5", ""),
        ("required", "str", "", ""),
        ("made", "list[int]", " = []", ""),
        ("told", "int", " = 1", "Told twice."),
        ("bare", "bool", "", ""),
    ]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("files", ["fields", "verifier", "verifier_options", "on_bad_row", "system", "prompt_template", "eval_share",
                   "train", "eval"]),
        ("arithmetic", ["operations", "max_operand", "rows", "eval_share", "seed"]),
    ],
)  # fmt: skip
def test_all_options_of_a_task_are_shown_those_of_its_bases_too(name: str, options: list[str]) -> None:
    (settings,) = settings_of(registry.entry("task", name))
    module = registry.load("task", name)
    assert [field.name for field in settings.fields] == options == list(module.Options.model_fields)


def test_options_that_are_an_option_are_shown_as_well() -> None:
    options, executor = settings_of(registry.entry("reward", "code"))
    assert (options.title, executor.title) == ("Options:", "Executor:")
    assert "url" in [field.name for field in executor.fields]


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("run", "dph_rl/countdwn3"), "did you mean 'dph_rl/countdown3'?"),
        (("check", RECIPE, "--set", "rollout.max_token=9"), "did you mean 'max_tokens'?"),
        (("run", RECIPE, "--set", "method.name=dph"), "There is no method 'dph'; did you mean 'dph_rl'?"),
        (("run", RECIPE, "--set", "task.options.number=4"), "has no option 'number'; did you mean 'numbers'?"),
        (("check", RECIPE, "--set", "rewards=[{name: coutdown}]"), "did you mean 'countdown'?"),
        (("rewards", "show", "maths"), "did you mean 'math'?"),
        (("recipes", "show", "nothing"), "There is no recipe 'nothing'"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments: tuple[str, ...], sentence: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


def test_any_other_exception_keeps_its_traceback(
    pipeline: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(pipeline, "run", fail)
    assert repr(call("run", RECIPE).exception) == "RuntimeError('a bug')"


def test_an_error_inside_the_job_is_one_sentence_too(
    pipeline: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise UserError("The folder [x] holds another run.")

    monkeypatch.setattr(pipeline, "run", refuse)
    result = call("run", RECIPE)
    assert (result.exit_code, result.stderr) == (2, "error: The folder [x] holds another run.\n")


def test_our_warning_is_a_sentence_and_a_librarys_keeps_its_place() -> None:
    script = """
import warnings
from posttrain import errors
from posttrain.cli import console

console.prepare()
warnings.warn_explicit("pass@2 is noisy.", UserWarning, errors.__file__, 7)
warnings.warn_explicit("of theirs", UserWarning, warnings.__file__, 7)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    ours, *theirs = done.stderr.splitlines()
    assert ours == "warning: pass@2 is noisy."
    assert theirs[0].endswith("warnings.py:7: UserWarning: of theirs")


def test_ctrl_c_says_how_to_go_on(pipeline: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupt)
    result = call("run", RECIPE, "--set", "name=a b", "--output-dir", "here")
    assert result.exit_code == 130
    assert f"continue with: posttrain run {RECIPE} --set 'name=a b' --output-dir here --resume" in result.stderr


# ------------------------------------------------------------------ what reaches the job


def test_run_hands_over_folder_resume_and_command(pipeline: types.SimpleNamespace) -> None:
    assert call("run", RECIPE, "--set", "seed=1", "--resume").exit_code == 0
    options = {"resume": True, "command": f"posttrain run {RECIPE} --set seed=1"}
    assert pipeline.calls == [("run", "countdown3", Path("runs/dph_rl-countdown3"), options)]


def test_presample_prints_the_store(pipeline: types.SimpleNamespace) -> None:
    assert call("presample", RECIPE).stdout == "the/store\n"
    assert pipeline.calls == [("run_presample", "countdown3", Path("runs/dph_rl-countdown3/store"), {})]


def test_evaluate_takes_a_model(pipeline: types.SimpleNamespace) -> None:
    assert call("evaluate", RECIPE, "--model", "some/policy").exit_code == 0
    assert call("evaluate", RECIPE, "--output-dir", "out").exit_code == 0
    assert pipeline.calls == [
        ("run_evaluate", "countdown3", "some/policy", Path("runs/evaluate-countdown3-policy"), {}),
        ("run_evaluate", "countdown3", None, Path("out"), {}),
    ]


def test_several_processes_go_through_the_launcher(
    pipeline: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CLI checks the recipe, starts the launcher with the recipe's own arguments and passes its exit code on."""
    given: list[Any] = []

    def accelerate_command(recipe: recipes.Recipe, *arguments: Any) -> list[str]:
        given.extend((recipe.launch.processes, *arguments))
        return [sys.executable, "-c", "raise SystemExit(7)"]

    resolve = types.SimpleNamespace(
        resolve=lambda recipe: given.append("resolved"), require_devices=lambda recipe: given.append("devices")
    )
    monkeypatch.setitem(sys.modules, "posttrain.launch.resolve", resolve)
    monkeypatch.setattr(run, "accelerate_command", accelerate_command)
    assert call("run", RECIPE, "--set", "launch.processes=2").exit_code == 7
    repeated = [RECIPE, "--set", "launch.processes=2"]
    assert given == [2, Path("runs/dph_rl-countdown3"), False, repeated, "resolved", "devices"]
    assert pipeline.calls == []


def test_a_launched_process_never_launches_another(
    pipeline: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["posttrain.train", RECIPE, "--set", "launch.processes=2", "--output-dir", "out"])
    with pytest.raises(SystemExit) as end:
        run.main_in_process()
    assert end.value.code == 0
    command = f"posttrain run {RECIPE} --set launch.processes=2 --output-dir out"
    assert pipeline.calls == [("run", "countdown3", Path("out"), {"resume": False, "command": command})]


def test_check_prints_the_whole_recipe_and_the_batch_identity() -> None:
    result = call("check", RECIPE, "--set", "seed=7")
    assert result.exit_code == 0, result.stderr
    assert recipes.parse_value(result.stdout)["seed"] == 7  # what is printed is a recipe itself
    assert recipes.parse_value(result.stdout)["presample"]["samples_per_prompt"] == 8
    assert result.stdout.splitlines()[-1] == (
        "# DPHTrainer: world 1 × per-device 192 × accumulation 2 = 24 prompts × 16 generations = 384"
    )


def test_the_batch_identity_counts_both_ways() -> None:
    batch = types.SimpleNamespace(world=2, per_device=4, accumulation=3, generations=8, prompts=3)
    assert batch_identity(batch, pairs=False) == (  # type: ignore[arg-type]
        "world 2 × per-device 4 × accumulation 3 = 3 prompts × 8 generations = 24"
    )
    batch.prompts, batch.generations = 24, 1
    assert batch_identity(batch, pairs=True) == "world 2 × per-device 4 × accumulation 3 = 24 pairs"  # type: ignore[arg-type]


def test_check_refuses_an_argument_that_the_trainer_lacks() -> None:
    result = call("check", RECIPE, "--set", "method.args.etta=0.1")
    assert result.exit_code == 2
    assert "has no argument 'etta'; did you mean 'eta'?" in result.stderr


# ------------------------------------------------------------------ as a process


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["methods"],
        ["methods", "show", "dph_rl"],
        ["rewards"],
        ["tasks", "show", "countdown"],
        ["recipes"],
        ["check", RECIPE, "--set", "sed=1"],
        ["check", "dph_rl/llama31_8b_math", "--set", "method.name=none"],
    ],
    ids=" ".join,
)
def test_looking_around_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from posttrain.cli import main\n"
        f"sys.argv = ['posttrain', *{arguments!r}]\n"
        "try:\n    main()\n"
        "finally:\n"
        f"    print('HEAVY', *sorted(set(sys.modules) & set({HEAVY!r})))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == (2 if "check" in arguments else 0), done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY"


def test_exit_code_and_stderr_of_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", "check", "nothing"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"error: There is no recipe 'nothing'.*\n", done.stderr)
