"""What the README shows runs: its Python, and every `posttrain` command is one that exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from posttrain import recipe as recipes
from posttrain import tasks
from posttrain.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS)
def test_python_of_the_readme_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    namespace: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), namespace)  # noqa: S102 - our own documentation
    assert namespace["trainer"].state.global_step > 0  # type: ignore[attr-defined]


def test_there_is_a_library_example() -> None:
    assert any("DPHTrainer(" in block for block in BLOCKS)


def test_commands_of_the_readme_exist() -> None:
    text = "\n".join(re.findall(r"```(?:sh|console)?\n(.*?)```", README, flags=re.DOTALL))
    verbs = set(re.findall(r"^posttrain ([a-z]+)", text, flags=re.MULTILINE))
    assert {"run", "check", "presample", "evaluate"} <= verbs
    for verb in sorted(verbs):
        assert CliRunner().invoke(app, [verb, "--help"]).exit_code == 0, verb
    for name in re.findall(r"(?:posttrain \w+|recipes show) ((?:apo|dph_rl|f_dpg|f_dpo|grpo|kdrl|rlad|sft)/\w+)", text):
        assert name in recipes.names(), name


def yaml_of_the_readme(name: str) -> str:
    """The recipe that the README shows under a file name."""
    (found,) = (
        text for text in re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL) if text.startswith(f"# {name}")
    )
    return str(found)


def test_preference_recipe_of_the_readme_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.launch.resolve import resolve

    monkeypatch.chdir(tmp_path)
    (tmp_path / "preferences.yaml").write_text(yaml_of_the_readme("preferences.yaml"))
    recipe = recipes.load("preferences.yaml")
    resolved = resolve(recipe)
    assert resolved.takes_pairs
    assert resolved.batch.prompts == 64
    assert tasks.load(recipe.task.name, recipe.task.options).pairs


def test_recipe_of_the_readme_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.launch.resolve import every_run, resolve

    monkeypatch.chdir(tmp_path)
    problems = [{"question": f"What is {n} + {n}?", "solution": str(2 * n)} for n in range(100)]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, problems)))
    (tmp_path / "my_task.yaml").write_text(yaml_of_the_readme("my_task.yaml"))
    recipe = recipes.load("my_task.yaml")
    batches = [resolve(each).batch for each in every_run(recipe).values()]
    assert [batch.prompts for batch in batches] == [32, 32]
    task = tasks.load(recipe.task.name, recipe.task.options)
    assert len(task.rows("train")) + len(task.rows("eval")) == 100


def test_links_of_the_documentation_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
