"""What the README shows runs: its Python, and every `posttrain` command is one that exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from posttrain import recipe as recipes
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
    for name in re.findall(r"(?:posttrain \w+|recipes show) ((?:dph_rl|grpo)/\w+)", text):
        assert name in recipes.names(), name


def test_links_of_the_documentation_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
