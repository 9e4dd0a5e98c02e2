"""The launch section: configurations, commands, machines, and what is refused before anything starts."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from posttrain import recipe as recipes
from posttrain.errors import UserError
from posttrain.launch import spawn
from posttrain.launch.engines import require_engine
from posttrain.launch.pipeline import prepare
from posttrain.launch.resolve import require_devices, resolve, trainer_config
from posttrain.recipe import CONFIGS, Launch, Recipe
from tests.processes import finish

RECIPE = "dph_rl/countdown3"
SHIPPED = recipes.RECIPES / "accelerate"


def recipe(*assignments: str) -> Recipe:
    return recipes.load(RECIPE, [f"launch.{assignment}" for assignment in assignments])


def own(folder: Path, **content: Any) -> str:
    """An accelerate configuration of the user's."""
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture(autouse=True)
def without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


# ------------------------------------------------------------------ what ships


def test_every_configuration_ships_and_says_how_it_is_used() -> None:
    assert {path.stem for path in SHIPPED.glob("*.yaml")} == set(CONFIGS)
    for name in CONFIGS:
        text = (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")
        assert text.startswith("# ")
        assert f"launch: {{config: {name}, processes: 8}}" in text
        assert f"accelerate launch --config_file recipes/accelerate/{name}.yaml --num_processes 8" in text
        content = yaml.safe_load(text)
        assert content["mixed_precision"] == "no"  # not false, which a bare no is
        assert "use_cpu" not in content
        assert "num_processes" not in content  # so that accelerate asks for it


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_what_ships(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(SHIPPED / f"{name}.yaml"))
    assert loaded.distributed_type.value in ("MULTI_GPU", "DEEPSPEED", "FSDP")
    assert not loaded.use_cpu
    assert loaded.num_processes == -1


def test_configurations_are_no_recipes() -> None:
    assert not [name for name in recipes.names() if "accelerate" in name]


@pytest.mark.parametrize(
    ("config", "kind"),
    [("ddp", "ddp"), ("zero1", "zero1"), ("zero2", "zero2"), ("zero3_offload", "zero3"), ("fsdp2", "fsdp2")],
)
def test_a_name_is_a_shipped_file(config: str, kind: str) -> None:
    chosen = spawn.configuration(recipe("processes=2", f"config={config}"))
    assert chosen == spawn.Configuration(SHIPPED / f"{config}.yaml", kind)


# ------------------------------------------------------------------ the command


def test_one_process_needs_no_launcher() -> None:
    assert not spawn.needs_launcher(Launch())
    assert not spawn.needs_launcher(Launch(config="ddp"))
    assert spawn.needs_launcher(Launch(config="zero3_offload"))
    assert spawn.needs_launcher(Launch(processes=2))
    assert spawn.configuration(recipe()) is None


def test_several_processes_are_ddp_by_default() -> None:
    command = spawn.accelerate_command(recipe("processes=2"), Path("out"), True, [RECIPE, "--set", "seed=1"])
    assert command[1:3] == ["-m", "posttrain.launch.launcher"]
    assert command[3:] == [
        *["--config_file", str(SHIPPED / "ddp.yaml"), "--num_processes", "2", "--num_machines", "1"],
        *["--mixed_precision", "no", "--main_process_port", "0"],
        *["-m", "posttrain.train", RECIPE, "--set", "seed=1", "--output-dir", "out", "--resume"],
    ]


def test_a_variable_that_turns_sharding_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    spawn.accelerate_command(recipe("processes=2"), Path("out"), False, [RECIPE])
    with pytest.raises(UserError, match=r"ACCELERATE_USE_CPU is set .* drops zero2 without saying so"):
        spawn.accelerate_command(recipe("processes=2", "config=zero2"), Path("out"), False, [RECIPE])


def test_machines_meet_where_the_recipe_says() -> None:
    launch = ["processes=16", "machines=2", "machine_rank=1", "main_address=10.0.0.1", "main_port=4000", "config=zero3"]
    command = spawn.accelerate_command(recipe(*launch), Path("out"), False, [RECIPE])
    where = ["--machine_rank", "1", "--main_process_ip", "10.0.0.1", "--main_process_port", "4000"]
    start = command.index("--machine_rank")
    assert command[start : start + 6] == where
    assert command[start + 6 : start + 8] == ["--deepspeed_multinode_launcher", "standard"]
    assert command[command.index("--num_machines") + 1] == "2"


def test_machines_meet_where_slurm_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[07-09]" ] && printf "node07\\nnode08\\nnode09\\n"\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    slurm = {"SLURM_NNODES": "3", "SLURM_NODEID": "2", "SLURM_JOB_NODELIST": "node[07-09]", "SLURM_JOB_ID": "1234567"}
    launch = Launch(processes=6, machines=3)
    assert spawn.rendezvous(launch, slurm) == spawn.Rendezvous(2, "node07", 24567)
    explicit = Launch(processes=6, machines=3, machine_rank=1, main_address="other", main_port=4000)
    assert spawn.rendezvous(explicit, slurm) == spawn.Rendezvous(1, "other", 4000)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"scontrol fails here: set launch\.main_address"):
        spawn.rendezvous(launch, slurm)


def test_where_machines_meet_is_not_part_of_the_stored_recipe() -> None:
    several = recipe("processes=2", "machines=2")
    placed = recipe("processes=2", "machines=2", "machine_rank=1", "main_address=a", "main_port=4000")
    assert placed.to_yaml() == several.to_yaml()
    assert placed.digest() == several.digest()


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("assignments", "sentence"),
    [
        (["config=zero4"], "there is no configuration 'zero4'; did you mean 'zero"),
        (["config=megatron"], "known: ddp, fsdp2, zero1"),
        (["processes=3", "machines=2"], "3 processes cannot be shared evenly by 2 machines"),
        (["main_port=4000"], "main_port has no effect on one machine"),
        (["processes=2", "machines=2", "machine_rank=2"], "machine_rank 2 is none of 2 machines: they count from 0"),
    ],
)
def test_what_the_section_itself_refuses(assignments: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as refusal:
        recipe(*assignments)
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("launch", "environment", "sentence"),
    [
        ({"machines": 2}, {}, "this machine has no number: give each its own"),
        ({"machines": 2, "machine_rank": 0}, {}, "the address of machine 0 is unknown"),
        ({"machines": 2}, {"SLURM_NNODES": "4"}, "2 machines (launch.machines), but Slurm has given 4"),
        ({}, {"SLURM_STEP_NUM_NODES": "2"}, "on 2 machines, but launch.machines is 1"),
    ],
)
def test_machines_that_cannot_meet_are_refused(
    launch: dict[str, Any], environment: dict[str, str], sentence: str
) -> None:
    with pytest.raises(UserError) as refusal:
        spawn.rendezvous(Launch(processes=4, **launch), environment)
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"distributed_type": "DEEPSPEED", "use_cpu": True}, "may drop DeepSpeed without saying so"),
        ({"distributed_type": "FSDP", "use_cpu": True}, "may drop FSDP without saying so"),
        ({"distributed_type": "MULTI_GPU", "num_processes": 4}, "num_processes: 4, but the recipe asks for 2"),
        ({"distributed_type": "MULTI_GPU", "num_machines": 2}, "num_machines: 2, but the recipe asks for 1"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}}, "would save policies in parts"),
        ({"distributed_type": "MULTI_CPU"}, "distributed_type: MULTI_CPU: make it MULTI_GPU, DEEPSPEED or FSDP (on"),
        ({"distributed_type": "MULTI_GPU", "mixed_precision": "bf16"}, "mixed_precision: bf16, but the recipe's"),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "/nowhere.json"}},
            "The DeepSpeed configuration /nowhere.json cannot be read",
        ),
    ],
)
def test_an_own_configuration_that_cannot_work_is_refused(
    tmp_path: Path, content: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError) as refusal:
        spawn.configuration(recipe("processes=2", f"config={own(tmp_path, **content)}"))
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_own_configuration_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml \(launch\.config\) cannot be read: No such file"):
        spawn.configuration(recipe("processes=2", "config=nowhere.yaml"))


def test_an_own_configuration_is_taken_with_its_stage(tmp_path: Path) -> None:
    content = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 1}, "mixed_precision": "no"}
    path = own(tmp_path, **content, num_processes=2)
    assert spawn.configuration(recipe("processes=2", f"config={path}")) == spawn.Configuration(Path(path), "zero1")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    require_devices(recipe("processes=4"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    require_devices(recipe("processes=4", "machines=2"))
    with pytest.raises(UserError, match=r"4 processes on this machine .*, but it has 2 GPUs"):
        require_devices(recipe("processes=4"))


@pytest.mark.parametrize(
    ("argument", "where"),
    [
        ("deepspeed={zero_optimization: {stage: 2}}", r"launch\.config"),
        ("use_cpu=true", "a machine with or without"),
        ("use_vllm=true", r"rollout\.engine"),
        ("vllm_server_port=8001", r"rollout\.server\.url"),
    ],
)
def test_what_the_launch_decides_is_no_argument_of_the_trainer(argument: str, where: str) -> None:
    with pytest.raises(UserError, match=f"is said elsewhere in a recipe: use {where}"):
        resolve(recipes.load(RECIPE, [f"method.args.{argument}"]))


# ------------------------------------------------------------------ the trainer's config in a launched process


def test_the_check_of_arguments_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that a launcher has started, too: it would meet with the wrong deadline, or wait for the others."""
    from accelerate.state import PartialState

    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}.items():
        monkeypatch.setenv(name, value)
    before = dict(PartialState._shared_state)
    resolve(recipe("processes=2", "config=zero3"))
    assert not torch.distributed.is_initialized()
    assert before == PartialState._shared_state
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"


def test_the_cpu_is_taken_where_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert trainer_config(resolve(recipe()), tmp_path).use_cpu
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert resolve(recipe()).trainer_args["use_cpu"]  # processes meet over gloo, and DeepSpeed stays on
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert not resolve(recipe()).trainer_args["use_cpu"]  # which would turn FSDP off


# ------------------------------------------------------------------ the engine


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU vLLM runs heads of any size")
@pytest.mark.parametrize("engine", ["vllm_colocate", "vllm_server"])
def test_heads_that_vllm_cannot_run_are_refused_before_a_model_is_made(engine: str) -> None:
    with pytest.raises(UserError, match=r"model that is made here have size 16, .*set model.warm_start.heads"):
        prepare(recipes.load(RECIPE, [f"rollout.engine={engine}"]))
    prepare(recipes.load(RECIPE, [f"rollout.engine={engine}", "model.warm_start.heads=2"]))
    prepare(recipes.load(RECIPE, ["rollout.engine=vllm_server", "rollout.server.url=http://gpu-node:8000"]))


def test_vllm_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"vLLM is not installed: pip install 'posttrain\[vllm"):
        require_engine(recipes.load(RECIPE, ["rollout.engine=vllm_colocate", "model.warm_start.heads=2"]))


def test_a_process_of_several_leaves_beside_threads_that_still_hold_tensors(tmp_path: Path) -> None:
    """Without `leave`, four of five such launches are aborted: threads of gloo want the lock of a dying interpreter."""
    script = tmp_path / "late.py"
    script.write_text("""
import atexit, os, pathlib, sys
import torch
import torch.distributed as dist
from posttrain.launch.spawn import leave

dist.init_process_group("gloo")
atexit.register(lambda: pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text("handlers ran"))
sys.setswitchinterval(0.1)  # seconds; what a busy machine does: the threads come late
works = [dist.all_reduce(torch.ones(1000), async_op=True) for _ in range(8)]
while works:
    works.pop(0).wait()
leave(0)
""")
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script), str(tmp_path)]
    finish([sys.executable, *command])
    assert {(tmp_path / rank).read_text() for rank in "01"} == {"handlers ran"}


def test_scripts_of_several_processes_leave_so() -> None:
    for path in Path(__file__).parent.glob("*.py"):
        text = path.read_text()
        if "destroy_process_group()\n" in text and '__name__ == "__main__"' in text:
            assert text.endswith("leave(0)\n"), path.name
