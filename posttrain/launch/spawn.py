"""Starting several processes, a recipe's launch section as an `accelerate launch` command, and leaving them. No torch.

The launch section names an accelerate configuration; what accelerate would do silently with a wrong one is refused
here, and what it has really done is asserted when training begins (`posttrain.seams.sharding`).
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from posttrain.errors import UserError
from posttrain.recipe import RECIPES, Common, Launch, is_path

DEFAULT_PORT = 29500

_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
"""`model.dtype` in accelerate's words."""


@dataclass(frozen=True)
class Configuration:
    """An accelerate configuration.

    Attributes:
        file: the YAML file.
        kind: how it splits the model: ddp, zero0 to zero3, deepspeed (stage unknown), fsdp1 or fsdp2.
    """

    file: Path
    kind: str


@dataclass(frozen=True)
class Rendezvous:
    """Where the processes of several machines meet: this machine's number, and machine 0's address and port."""

    rank: int
    address: str
    port: int


def needs_launcher(launch: Launch) -> bool:
    """Whether `posttrain run` starts other processes, or does everything itself."""
    return launch.processes > 1 or launch.config not in (None, "ddp")


def configuration(recipe: Common) -> Configuration | None:
    """The accelerate configuration of a recipe; None when one process needs none.

    Raises:
        UserError: a configuration of the user's that cannot be read, contradicts the recipe, or would be dropped or
            ignored by accelerate.
    """
    launch = recipe.launch
    if not needs_launcher(launch):
        return None
    config = launch.config or "ddp"
    if not is_path(config):
        file = RECIPES / "accelerate" / f"{config}.yaml"
        return Configuration(file, _kind(file, _read(file)))
    file = Path(config).expanduser()
    content = _read(file)
    kind = _kind(file, content)
    _refuse_contradictions(file, content, kind, recipe)
    return Configuration(file.resolve(), kind)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"The accelerate configuration {file} (launch.config) cannot be read: {error.strerror}; correct the path."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"The accelerate configuration {file} is not valid YAML: {' '.join(str(error).split())}."
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"The accelerate configuration {file} holds {type(content).__name__}: it must be a mapping.")
    return content


def _kind(file: Path, content: Mapping[str, Any]) -> str:
    """How a configuration splits the model.

    Raises:
        UserError: it starts one process only, or is for machines that we know nothing about.
    """
    distributed = str(content.get("distributed_type", "NO")).upper()
    if distributed == "MULTI_GPU":
        return "ddp"
    if distributed == "FSDP":
        return f"fsdp{(content.get('fsdp_config') or {}).get('fsdp_version', 1)}"
    if distributed == "DEEPSPEED":
        settings = content.get("deepspeed_config") or {}
        if "deepspeed_config_file" in settings:
            return _stage(Path(settings["deepspeed_config_file"]))
        return f"zero{settings.get('zero_stage', 2)}"
    wanted = "MULTI_GPU, DEEPSPEED or FSDP"
    if distributed in ("NO", "MULTI_CPU"):
        wanted += " (on machines without GPUs, too)"
    raise UserError(f"The accelerate configuration {file} has distributed_type: {distributed}: make it {wanted}.")


def _stage(file: Path) -> str:
    try:
        stage = json.loads(file.read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage")
    except OSError as error:
        raise UserError(
            f"The DeepSpeed configuration {file} cannot be read: {error.strerror}; correct the path."
        ) from None
    except ValueError:
        raise UserError(f"The DeepSpeed configuration {file} is not valid JSON: correct it.") from None
    return f"zero{stage}" if isinstance(stage, int) else "deepspeed"


def _refuse_contradictions(file: Path, content: Mapping[str, Any], kind: str, recipe: Common) -> None:
    launch = recipe.launch
    if content.get("use_cpu") and kind != "ddp":
        raise UserError(
            f"The accelerate configuration {file} has use_cpu: true, for which accelerate may drop "
            f"{'FSDP' if kind.startswith('fsdp') else 'DeepSpeed'} without saying so: remove it, a machine without "
            "GPUs needs no setting."
        )
    for key, name, value in (
        ("num_processes", "processes", launch.processes),
        ("num_machines", "machines", launch.machines),
    ):
        found = content.get(key)
        if found is not None and found != value:
            raise UserError(
                f"The accelerate configuration {file} has {key}: {found}, but the recipe asks for {value} "
                f"(launch.{name}): make the two agree."
            )
    settings = content.get("deepspeed_config") or {}
    if kind == "zero3" and "deepspeed_config_file" not in settings and not settings.get("zero3_save_16bit_model"):
        raise UserError(
            f"The accelerate configuration {file} would save policies in parts: set zero3_save_16bit_model: true in "
            "its deepspeed_config."
        )
    precision = str(content.get("mixed_precision") or "no").lower()
    if precision not in ("no", "false", _PRECISION[recipe.model.dtype]):  # a bare no is false in YAML
        raise UserError(
            f"The accelerate configuration {file} has mixed_precision: {precision}, but the recipe's model.dtype is "
            f"{recipe.model.dtype}, which decides: set mixed_precision to 'no'."
        )


def rendezvous(launch: Launch, environment: Mapping[str, str]) -> Rendezvous | None:
    """Where machines meet: as the recipe says, or else as Slurm does; None for one machine.

    Raises:
        UserError: neither says it, or they contradict each other.
    """
    if launch.machines == 1:
        steps = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
        if steps > 1:
            raise UserError(
                f"Slurm has started this command on {steps} machines, but launch.machines is 1: set launch.machines="
                f"{steps}, or start it on one of them (srun --nodes=1)."
            )
        return None
    nodes = int(environment.get("SLURM_NNODES", launch.machines))
    if nodes != launch.machines:
        raise UserError(
            f"The recipe asks for {launch.machines} machines (launch.machines), but Slurm has given {nodes}."
        )
    rank = launch.machine_rank
    if rank is None and "SLURM_NODEID" in environment:
        rank = int(environment["SLURM_NODEID"])
    if rank is None:
        raise UserError(
            f"launch.machines is {launch.machines}, but this machine has no number: give each its own, as in "
            "--set launch.machine_rank=0, or start with srun."
        )
    address = launch.main_address or _first_host(environment.get("SLURM_JOB_NODELIST"))
    if address is None:
        raise UserError(
            f"launch.machines is {launch.machines}, but the address of machine 0 is unknown: set launch.main_address, "
            "or start with srun."
        )
    port = launch.main_port
    if port is None:
        job = environment.get("SLURM_JOB_ID", "")
        port = 20000 + int(job) % 10000 if job.isdigit() else DEFAULT_PORT  # two jobs on one machine must differ
    return Rendezvous(rank, address, port)


def _first_host(nodes: str | None) -> str | None:
    """The first host of Slurm's compressed list, as in node[01-04]."""
    if nodes is None:
        return None
    try:
        done = subprocess.run(  # noqa: S603 - fixed command, no shell
            ["scontrol", "show", "hostnames", nodes],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        raise UserError(
            f"Slurm's list of machines '{nodes}' cannot be read, because scontrol fails here: set launch.main_address."
        ) from None
    return done.stdout.split()[0]


def accelerate_command(recipe: Common, output_dir: Path, resume: bool, recipe_arguments: Sequence[str]) -> list[str]:
    """The command that runs `python -m posttrain.train` in the processes of this machine.

    Args:
        recipe: loaded, for its launch section.
        output_dir: of the run.
        resume: go on where an earlier run stopped.
        recipe_arguments: the recipe and its own options as given on the command line.

    Raises:
        UserError: the launch section cannot work.
    """
    launch = recipe.launch
    chosen, meeting = configuration(recipe), rendezvous(launch, os.environ)
    if chosen is None:
        raise ValueError("one process without a configuration needs no launcher.")
    if chosen.kind != "ddp" and os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes"):
        raise UserError(
            f"ACCELERATE_USE_CPU is set in the environment, for which accelerate drops {chosen.kind} without saying "
            "so: unset it, a machine without GPUs needs no setting."
        )
    command = [sys.executable, "-m", "posttrain.launch.launcher", "--config_file", str(chosen.file)]
    command += ["--num_processes", str(launch.processes), "--num_machines", str(launch.machines)]
    # model.dtype decides; said here, because accelerate refuses the file's own beside a DeepSpeed configuration file.
    command += ["--mixed_precision", "no"]
    if meeting is not None:
        command += ["--machine_rank", str(meeting.rank)]
        command += ["--main_process_ip", meeting.address, "--main_process_port", str(meeting.port)]
        if chosen.kind.startswith(("zero", "deepspeed")):
            command += ["--deepspeed_multinode_launcher", "standard"]  # no ssh: the command is started everywhere
    else:
        command += ["--main_process_port", "0"]  # any free one: two runs on one machine must differ
    command += ["-m", "posttrain.train", *recipe_arguments, "--output-dir", str(output_dir)]
    return [*command, "--resume"] if resume else command


def leave(code: int) -> NoReturn:
    """End one process of several as `sys.exit` does, but without dismantling the interpreter.

    Threads of gloo free the tensors of the last collective after it has returned, for which they need the interpreter's
    lock. Where they come so late that the interpreter is being dismantled, Python ends them in a way that C++ answers
    with abort (`terminate called without an active exception`), and a finished run would count as failed.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
