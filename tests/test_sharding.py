"""DeepSpeed and FSDP for real, in two processes on CPUs: they are on, compute what one process does, and resume."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from posttrain import recipe as recipes
from posttrain.errors import UserError
from posttrain.evaluation import evaluate
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.rollouts.weights import loaded_whole
from posttrain.seams.on_policy import GRPOConfig, OnPolicyTrainer
from posttrain.seams.sharding import RequireSharding, requested
from tests.oracle import arguments, batch, dataset, length_reward, make_store
from tests.processes import finish as run
from tests.sharded_steps import ACCUMULATION, STEPS, steps
from tests.test_pipeline import write


def partitioning(folder: Path) -> Path:
    """ZeRO-3 that partitions even the smallest parameter; by default those below 100,000 elements stay whole."""
    settings = {
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    (folder / "deepspeed.json").write_text(json.dumps(settings))
    path = folder / "partitioning.yaml"
    content = {"deepspeed_config_file": str(folder / "deepspeed.json"), "zero3_init_flag": True}
    path.write_text(yaml.safe_dump({"distributed_type": "DEEPSPEED", "deepspeed_config": content}))
    return path


def launcher(config: Path) -> list[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2"]
    return [*command, "--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no"]


@pytest.fixture(scope="module")
def alone(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What one process computes, and the store that it used."""
    folder = tmp_path_factory.mktemp("alone")
    store = str(make_store(tiny_model, folder / "store").path)
    args = GRPOConfig(**arguments(folder / "unused"))
    trainer = OnPolicyTrainer(tiny_model, reward_funcs=length_reward, args=args, train_dataset=dataset())
    torch.save(batch(trainer, seed=9, beta=0.0, sampler=False), folder / "batch.pt")
    steps(folder, tiny_model, store)
    return folder, store


@pytest.mark.parametrize(
    ("config", "kind", "optimizer"),
    [
        ("ddp", "ddp", "AdamW"),
        ("zero2", "zero2", "DeepSpeedZeroOptimizer"),
        ("partitioning", "zero3", "DeepSpeedZeroOptimizer_Stage3"),
        ("fsdp2", "fsdp2", "AdamW"),
        pytest.param("zero1", "zero1", "DeepSpeedZeroOptimizer", marks=pytest.mark.slow),
        pytest.param("zero3", "zero3", "DeepSpeedZeroOptimizer_Stage3", marks=pytest.mark.slow),
        pytest.param("zero3_offload", "zero3", "DeepSpeedZeroOptimizer_Stage3", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one_does(
    alone: tuple[Path, str], tiny_model: str, tmp_path: Path, config: str, kind: str, optimizer: str
) -> None:
    """Same rollouts, same stored answers: loss, gradient norm, metrics and weights of GRPO and DPH-RL are the same."""
    one, store = alone
    shutil.copy(one / "batch.pt", tmp_path)
    file = partitioning(tmp_path) if config == "partitioning" else recipes.RECIPES / "accelerate" / f"{config}.yaml"
    run([*launcher(file), "-m", "tests.sharded_steps", str(tmp_path), tiny_model, store])
    for method in ("grpo", "dph_rl"):
        wanted, found = (json.loads((folder / f"{method}.json").read_text()) for folder in (one, tmp_path))
        assert (found["active"], found["optimizer"], found["processes"]) == (kind, optimizer, 2)
        # Whole weights are fingerprinted, others are unknown, and split ones take half of the memory.
        assert (found["fingerprint"] is None) == (kind in ("zero3", "fsdp2"))
        if config == "partitioning":
            assert found["held"] == 0
        _require_equal(wanted["log"], found["log"], method)
        before, first, second = (_weights(folder) for folder in (Path(tiny_model), one / method, tmp_path / method))
        assert max((first[name] - before[name]).abs().max() for name in first) > 1e-3
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def _require_equal(wanted: list[dict[str, Any]], found: list[dict[str, Any]], method: str) -> None:
    assert len(wanted) == len(found) == STEPS
    assert any(entry["grad_norm"] > 0.5 for entry in wanted)  # clipped
    if method == "dph_rl":
        assert wanted[-1]["pef/divergence"] > 1e-4
    for one, two in zip(wanted, found, strict=True):
        assert set(one) == set(two)
        # Metrics are means over micro-batches, which hold other tokens when two processes share them.
        same = {"loss", "grad_norm", "learning_rate"} if ACCUMULATION[method] > 1 else set(one) - {"step_time"}
        for name in same:
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), name


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """As transformers loads them; nothing may be missing, empty or new."""
    model, information = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not information["missing_keys"] and not information["unexpected_keys"]
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_a_whole_run_under_zero3_and_its_resumption(tmp_path: Path) -> None:
    """GRPO and DPH-RL one after the other in the same processes, on partitioned weights, evaluated in between."""
    recipe, config = write(tmp_path), partitioning(tmp_path)
    settings = [f"launch.config={config}", "launch.processes=2", "method.args.per_device_train_batch_size=4"]
    job = [str(recipe), "--output-dir", str(tmp_path / "out"), "--resume"]
    for setting in [*settings, "method.args.save_total_limit=3"]:
        job += ["--set", setting]
    environment = {"POSTTRAIN_CACHE": str(tmp_path / "cache")}
    run([sys.executable, "-m", "posttrain", "run", *job], **environment)
    out = tmp_path / "out"
    assert (out / "report.html").is_file()
    results = {label: evaluate.load(out / label / "evaluation") for label in ("base", "grpo", "dph_rl")}
    assert len({result.identity["model"] for result in results.values()}) == 3
    for label in ("grpo", "dph_rl"):
        engine = TransformersEngine.load(str(out / label / "model"))
        assert engine.fingerprint == results[label].identity["model"]  # what was evaluated was whole
        weights = load_file(out / label / "model" / "model.safetensors")
        assert all(tensor.numel() > 0 for tensor in weights.values())
        assert list(out.glob(f"{label}/checkpoints/checkpoint-3/global_step3/*_rank_1_*optim_states.pt"))

    # As if it had been interrupted after the second step of DPH-RL.
    uninterrupted = load_file(out / "dph_rl/model/model.safetensors")
    for folder in ("dph_rl/model", "dph_rl/evaluation", "dph_rl/checkpoints/checkpoint-3"):
        shutil.rmtree(out / folder)
    (out / "dph_rl/history.json").unlink()
    (out / "report.html").unlink()
    run([*launcher(config), "-m", "posttrain.train", *job], **environment)  # by hand: the same job
    history = json.loads((out / "dph_rl/history.json").read_text())
    assert [entry["step"] for entry in history if "reward" in entry] == [1, 2, 3]
    for name, value in load_file(out / "dph_rl/model/model.safetensors").items():
        torch.testing.assert_close(value, uninterrupted[name], rtol=0, atol=1e-6)
    assert (out / "report.html").is_file()


# ------------------------------------------------------------------ without other processes


def test_what_is_asked_for_is_read_from_the_environment_or_the_arguments(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert requested() is None
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        patch.setenv("FSDP_VERSION", "2")
        assert requested() == "fsdp2"
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        patch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
        assert requested() == "zero3"
        partitioning(tmp_path)
        patch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "deepspeed.json"))
        assert requested() == "zero3"
    args = GRPOConfig(**arguments(tmp_path))
    assert requested(args) is None
    args.deepspeed = {"zero_optimization": {"stage": 1}}
    assert requested(args) == "zero1"


@pytest.mark.parametrize(
    ("asked", "environment", "cause"),
    [
        (
            "zero3",
            {"ACCELERATE_USE_CPU": "True"},
            r"zero3 was asked for, but ddp is active: ACCELERATE_USE_CPU turns it off",
        ),
        ("zero2", {}, r"zero2 was asked for, but ddp is active: start it with `posttrain run`"),
        ("fsdp2", {"ACCELERATE_USE_FSDP": "true"}, r"accelerate knows FSDP on GPUs only"),
        (None, {"WORLD_SIZE": "2"}, r"2 processes were started, but each trains by itself \(accelerate sees 1\)"),
    ],
)
def test_what_is_not_active_stops_the_run_when_training_begins(
    tiny_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: str | None,
    environment: dict[str, str],
    cause: str,
) -> None:
    args = GRPOConfig(**arguments(tmp_path))
    trainer = OnPolicyTrainer(
        tiny_model,
        reward_funcs=length_reward,
        args=args,
        train_dataset=dataset(),
        callbacks=[RequireSharding(asked)],
    )
    trainer.callback_handler.callbacks.insert(0, _Environment(monkeypatch, environment))
    with pytest.raises(UserError, match=cause):
        trainer.train()
    assert trainer.state.global_step == 0


class _Environment:
    """Sets variables when training begins: earlier, accelerate would act on them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
        self.monkeypatch, self.variables = monkeypatch, variables

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        for name, value in self.variables.items():
            self.monkeypatch.setenv(name, value)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def test_engines_are_whole_while_a_partitioning_config_is_alive(tiny_model: str) -> None:
    from transformers.integrations import deepspeed

    config = deepspeed.HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    try:
        assert deepspeed.is_deepspeed_zero3_enabled()
        with loaded_whole():
            assert not deepspeed.is_deepspeed_zero3_enabled()
        assert deepspeed.is_deepspeed_zero3_enabled()
        engine = TransformersEngine.load(tiny_model)
        assert not any(hasattr(parameter, "ds_id") for parameter in engine.model.parameters())
    finally:
        del config
        deepspeed.unset_hf_deepspeed_config()
