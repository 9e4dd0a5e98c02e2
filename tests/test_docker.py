"""Images and compose file say what posttrain understands; nothing here needs a Docker engine."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml

from posttrain import recipe as recipes
from posttrain.cli import app

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DEVICES = {"Dockerfile": "cuda", "Dockerfile.cpu": "cpu"}
COMPOSE = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
SERVICES: dict[str, Any] = yaml.safe_load(COMPOSE)["services"]


def _rehearse() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rehearse", DOCKER / "rehearse.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rehearse"] = module  # where dataclasses looks it up
    spec.loader.exec_module(module)
    return module


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    return list(_rehearse().instructions((DOCKER / dockerfile).read_text(encoding="utf-8")))


def all_of(dockerfile: str, instruction: str) -> list[str]:
    return [rest for name, rest in instructions(dockerfile) if name == instruction]


def variables(dockerfile: str) -> dict[str, str]:
    pairs = (pair.partition("=") for rest in all_of(dockerfile, "ENV") for pair in shlex.split(rest))
    return {name: value for name, _, value in pairs}


def filled(text: str) -> str:
    """With every ${NAME:-default} replaced by its default, as compose does when nothing is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def command(service: str) -> list[str]:
    return [filled(word) for word in SERVICES[service]["command"]]


def parsed(words: list[str]) -> dict[str, Any]:
    """The parameters that a `posttrain` command line gives its verb; parsing fails as it would on the terminal."""
    group: Any = typer.main.get_command(app)
    with group.commands[words[0]].make_context(words[0], words[1:]) as context:
        return dict(context.params)


@pytest.mark.parametrize(("dockerfile", "device"), DEVICES.items())
def test_the_image_is_installed_by_our_script_alone(dockerfile: str, device: str) -> None:
    lines = [rest for rest in all_of(dockerfile, "RUN") if "install.sh" in rest]
    assert [line.split(" && ")[0] for line in lines] == [
        f"POSTTRAIN_DEVICE={device} /opt/source/scripts/install.sh --no-editable --dependencies /opt/posttrain",
        f"POSTTRAIN_DEVICE={device} /opt/source/scripts/install.sh --no-editable /opt/posttrain",
    ]
    assert not [rest for rest in all_of(dockerfile, "RUN") if re.search(r"\b(pip|uv|conda)\d* ", rest)]
    # What pip put there is found: by the entry point, and by DeepSpeed, which looks for ninja.
    assert variables(dockerfile)["PATH"].split(":")[0] == "/opt/posttrain/bin"


@pytest.mark.parametrize("dockerfile", DEVICES)
def test_a_change_of_the_source_leaves_the_dependencies_in_place(dockerfile: str) -> None:
    lines = [f"{name} {rest}" for name, rest in instructions(dockerfile)]
    dependencies = next(index for index, line in enumerate(lines) if "--dependencies" in line)
    before = [line for line in lines[:dependencies] if line.startswith("COPY")]
    assert before == ["COPY pyproject.toml /opt/source/", "COPY scripts/install.sh /opt/source/scripts/"]


@pytest.mark.parametrize("dockerfile", DEVICES)
def test_everything_that_the_package_is_built_from_is_copied(dockerfile: str) -> None:
    copied = {source for rest in all_of(dockerfile, "COPY") for source in shlex.split(rest)[:-1]}
    project, packages = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]["package-dir"]
    wanted = {"pyproject.toml", "scripts/install.sh", project["readme"], *project["license-files"], *packages.values()}
    assert copied == wanted
    assert all((ROOT / source).exists() for source in copied)
    assert not {source.split("/")[0] for source in copied} & ignored(), "docker build would not see it"


@pytest.mark.parametrize("dockerfile", DEVICES)
def test_the_image_runs_posttrain_as_an_ordinary_user(dockerfile: str) -> None:
    assert all_of(dockerfile, "USER") == ["posttrain"]
    names = [name for name, _ in instructions(dockerfile)]
    assert "RUN" not in names[names.index("USER") :]
    assert any("useradd --uid 10001 --create-home" in rest for rest in all_of(dockerfile, "RUN"))
    assert variables(dockerfile)["HOME"] == "/home/posttrain"
    assert all_of(dockerfile, "ENTRYPOINT") == ['["posttrain"]']
    assert all_of(dockerfile, "CMD") == ['["--help"]']
    # Mount points exist and are the user's, because a new volume takes over their owner.
    made = next(rest for rest in all_of(dockerfile, "RUN") if "install -d -o posttrain" in rest)
    for volume in yaml.safe_load(all_of(dockerfile, "VOLUME")[0]):
        assert volume in made


@pytest.mark.parametrize("dockerfile", DEVICES)
def test_telemetry_is_off(dockerfile: str) -> None:
    wanted = {"HF_HUB_DISABLE_TELEMETRY": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    assert wanted.items() <= variables(dockerfile).items()


def test_the_compiler_is_of_the_cuda_version_of_the_base() -> None:
    found = re.fullmatch(r"nvidia/cuda:(\d+)\.(\d+)\.\d+-base-ubuntu24\.04", all_of("Dockerfile", "FROM")[0])
    assert found is not None
    packages = re.findall(r"(?:cuda-[a-z-]+|libcurand-dev)-(\d+)-(\d+)", " ".join(all_of("Dockerfile", "RUN")))
    assert len(packages) == 3
    assert set(packages) == {found.groups()}


def ignored() -> set[str]:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    return {line.strip() for line in lines if line.strip() and not line.startswith("#")}


def test_git_environments_and_outputs_stay_out_of_the_build() -> None:
    assert {".git", ".venv", ".venv-*", "runs", "**/__pycache__", "**/.env"} <= ignored()
    assert not [line for line in ignored() if line.startswith("!")], "an exception would let something back in"


def test_the_server_of_the_compose_file_is_a_command_that_exists() -> None:
    found = parsed(command("server"))
    assert (found["host"], found["port"]) == ("0.0.0.0", 8000)  # noqa: S104 - compared, not bound
    assert "http://127.0.0.1:8000/health" in SERVICES["server"]["healthcheck"]["test"][-1]
    assert not [name for name, service in SERVICES.items() if "ports" in service], (
        "its port gives access to the weights"
    )


def test_the_trainer_of_the_compose_file_reads_a_recipe_that_is_valid() -> None:
    found, served = parsed(command("train")), parsed(command("server"))
    recipe = recipes.load(found["recipe"], found["assignments"])
    assert found["resume"]
    assert recipe.rollout.server.url == f"http://server:{served['port']}"
    assert recipe.rollout.server.folder == "/weights"
    assert (recipe.model.path, recipe.model.dtype) == (served["model"], served["dtype"])
    assert recipe.rollout.max_tokens < served["max_model_len"]
    gpus = [filled(SERVICES[name]["environment"]["CUDA_VISIBLE_DEVICES"]).split(",") for name in ("server", "train")]
    assert len(gpus[0]) == served["tensor_parallel"]
    assert len(gpus[1]) == recipe.launch.processes
    assert not set(gpus[0]) & set(gpus[1])


@pytest.mark.parametrize("transfer", ["folder", "nccl", "auto"])
def test_every_way_of_sending_weights_is_one_that_recipes_know(transfer: str) -> None:
    found = parsed([word.replace("transfer=folder", f"transfer={transfer}") for word in command("train")])
    assert recipes.load(found["recipe"], found["assignments"]).rollout.server.transfer == transfer


def test_the_commands_of_the_page_are_understood() -> None:
    page = (DOCKER / "README.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL)).replace("\\\n", "")
    runs = re.findall(r" posttrain(?::cpu)? (run .*)", blocks)
    assert len(runs) == 3
    for line in runs:
        found = parsed(shlex.split(line))
        recipes.load(found["recipe"], found["assignments"] or ())


def test_the_comment_of_the_compose_file_names_every_variable_and_its_default() -> None:
    comment = " ".join(line.lstrip("# ") for line in COMPOSE.splitlines() if line.startswith("#"))
    used = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", COMPOSE))
    del used["IMAGE"]
    for name, default in used.items():
        assert re.search(rf"\b{name}={re.escape(default)}[ ,]", comment), f"{name}={default}"


def test_both_services_share_the_volumes_of_one_user() -> None:
    compose: dict[str, Any] = yaml.safe_load(COMPOSE)
    assert SERVICES["server"]["volumes"] == SERVICES["train"]["volumes"]
    assert {volume.split(":")[0] for volume in SERVICES["train"]["volumes"]} == set(compose["volumes"])
    assert {"/home/posttrain/.cache", "/work/runs"} < {volume.split(":")[1] for volume in SERVICES["train"]["volumes"]}
    assert "uid=10001,gid=10001" in compose["volumes"]["weights"]["driver_opts"]["o"]
    assert SERVICES["train"]["depends_on"] == {"server": {"condition": "service_healthy"}}


@pytest.mark.parametrize(
    ("arguments", "device", "sentence"),
    [
        ([], "tpu", "POSTTRAIN_DEVICE is 'tpu': set it to cuda or cpu"),
        (["--editable"], "cpu", "unknown option '--editable': there are --dev, --no-editable and --dependencies."),
    ],
)
def test_a_wrong_choice_is_refused_before_anything_is_installed(
    arguments: list[str], device: str, sentence: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "install.sh"), *arguments, str(tmp_path / "venv")],  # noqa: S607
        env={**os.environ, "POSTTRAIN_DEVICE": device},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"install: {sentence}")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("debootstrap") is None, reason="needs root and debootstrap")
def test_the_lines_of_the_cpu_image_run() -> None:
    done = subprocess.run([sys.executable, str(DOCKER / "rehearse.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "dph_rl/countdown3" in done.stdout
