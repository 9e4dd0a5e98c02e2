"""The second pass over a recipe: the trainer's arguments, checked against the trainer's own config class.

Importing a trainer imports TRL (seconds), so the schema pass (`posttrain.recipe`) comes first. Nothing here loads
weights.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from posttrain import registry
from posttrain.errors import UserError, did_you_mean
from posttrain.launch.workers import launched
from posttrain.recipe import Baseline, Common, Method, Model, Recipe
from posttrain.seams.sharding import fsdp_without_gpus, requested

OWNED = {
    "output_dir": "--output-dir",
    "seed": "seed",
    "temperature": "rollout.temperature",
    "max_completion_length": "rollout.max_tokens",
    "model_init_kwargs": "model.dtype and model.revision",
    "reward_weights": "rewards[].weight",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "deepspeed": "launch.config",
    "fsdp": "launch.config",
    "fsdp_config": "launch.config",
    "use_vllm": "rollout.engine",
    "vllm_mode": "rollout.engine",
    "vllm_model_impl": "rollout.engine",
    "vllm_enable_sleep_mode": "rollout.vllm.sleep",
    "vllm_gpu_memory_utilization": "rollout.vllm.gpu_memory_utilization",
    "vllm_max_model_length": "rollout.vllm.max_model_len",
    "vllm_tensor_parallel_size": "rollout.vllm.tensor_parallel",
    "vllm_group_port": "rollout.server",
    "vllm_server_base_url": "rollout.server.url",
    "vllm_server_host": "rollout.server.url",
    "vllm_server_port": "rollout.server.url",
    "vllm_server_timeout": "rollout.server.start_timeout",
    "use_cpu": "a machine with or without GPUs (a CPU is taken where there is none)",
    "trust_remote_code": "a model whose code ships with transformers (remote code is never run)",
}
"""Trainer arguments that the recipe says elsewhere, and where."""


@dataclass(frozen=True)
class BatchIdentity:
    """world × per_device × accumulation = prompts × generations: one optimiser step, counted in both ways."""

    world: int
    per_device: int
    accumulation: int
    steps_per_generation: int
    generations: int
    prompts: int


@dataclass(frozen=True)
class Resolved:
    """A recipe whose method exists and accepts its arguments.

    Attributes:
        recipe: as loaded.
        trainer_args: what the config class is built with, `output_dir` excepted.
        batch: the batch identity of one optimiser step.
        config_class, trainer_class: of the method.
        probe: the config as one process that stands for all would build it.
    """

    recipe: Recipe
    trainer_args: dict[str, Any]
    batch: BatchIdentity
    config_class: type[Any]
    trainer_class: type[Any]
    probe: Any

    @property
    def method_class_name(self) -> str:
        """Name of the trainer class."""
        return self.trainer_class.__name__

    @property
    def takes_store(self) -> bool:
        """Whether the trainer works from a store of pre-sampled answers."""
        return "store" in inspect.signature(self.trainer_class.__init__).parameters

    @property
    def takes_teacher(self) -> bool:
        """Whether the trainer learns from a teacher."""
        asks = "teacher" in inspect.signature(self.trainer_class.__init__).parameters
        return asks or self.takes_answers == "teacher"

    @property
    def takes_pairs(self) -> bool:
        """Whether the trainer learns from preference pairs, and neither samples nor verifies."""
        return bool(getattr(self.trainer_class, "takes_pairs", False))

    @property
    def takes_static(self) -> bool:
        """Whether the trainer learns from fixed rollouts, and neither samples nor verifies."""
        return bool(getattr(self.trainer_class, "takes_static", False))

    @property
    def takes_signal(self) -> bool:
        """Whether it learns what a signal says of their tokens."""
        return self.takes_static and getattr(self.probe, "phase", None) == "distil"

    @property
    def samples(self) -> bool:
        """Whether the trainer draws answers and has them judged; false where all that it learns from is there."""
        return not (self.takes_pairs or self.takes_static or self.takes_answers)

    @property
    def takes_answers(self) -> str | None:
        """Whose verified answers the trainer is fine-tuned on, teacher or policy; None where it learns otherwise."""
        return getattr(self.probe, "answers_of", None)


def every_run(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe of every run, by label: the baselines, then the main one, or the combinations of the sweep.

    A baseline is the recipe itself with another method, whose arguments are those of the main method that its config
    class knows, under its own.
    """
    found = {}

    def add(label: str, method: Method, seed: int | None) -> None:
        update = {"method": method, "seed": recipe.seed if seed is None else seed, "baselines": [], "sweep": {}}
        found[label] = recipe.model_copy(update=update)

    for baseline in recipe.baselines:
        add(baseline.label, _beside(recipe.method, baseline), baseline.seed)
    for label, settings in recipe.cells.items():
        args = {name: value for name, value in settings.items() if name not in ("seed", "method")}
        method = recipe.method
        if "method" in settings:
            method = _beside(method, recipe.swept_methods[settings["method"]])
        update = {"args": {**method.args, **args}, "called": label}
        add(label, method.model_copy(update=update), settings.get("seed"))
    return found if recipe.sweep else {**found, recipe.method.label: recipe}


def _beside(method: Method, other: Baseline) -> Method:
    """Another method, with those arguments of `method` that its config class knows under its own."""
    known = {field.name for field in dataclasses.fields(registry.load("method", other.name).Config)}
    shared = {name: value for name, value in method.args.items() if name in known}
    update: dict[str, Any] = {"name": other.name, "args": {**shared, **other.args}, "called": other.called}
    if other.prompts_per_step is not None:
        update["prompts_per_step"] = other.prompts_per_step
    return method.model_copy(update=update)


def resolve(recipe: Recipe) -> Resolved:
    """Check a recipe's method and its arguments.

    Raises:
        UserError: no such method; an unknown, misplaced or mistyped argument; an impossible batch identity; or a value
            that the trainer's config refuses.
    """
    module = registry.load("method", recipe.method.name)
    config_class, trainer_class = module.Config, module.Trainer
    given = _checked(recipe.method.args, config_class, recipe.method.name)
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    merged = {**defaults, **given}
    batch = _batch_identity(recipe, merged)
    on_gpu = torch.cuda.is_available()
    of_rollouts = {
        "temperature": recipe.rollout.temperature,
        "max_completion_length": recipe.rollout.max_tokens,
        "reward_weights": [reward.weight for reward in recipe.rewards] or [1.0],
    }
    trainer_args = {
        "report_to": ["tensorboard"],
        "logging_steps": 10,
        "save_total_limit": 1,
        "gradient_checkpointing": on_gpu,
        "dataloader_pin_memory": on_gpu,
        "ddp_find_unused_parameters": False,  # every parameter of a dense model is in the loss: do not search
        **given,
        **{name: value for name, value in of_rollouts.items() if name in defaults},
        "gradient_accumulation_steps": batch.accumulation,
        "seed": recipe.seed,
        "model_init_kwargs": {"dtype": recipe.model.dtype, "revision": recipe.model.revision},
        "bf16": recipe.model.dtype == "bfloat16" and on_gpu,
        "fp16": recipe.model.dtype == "float16" and on_gpu,
        # Without GPUs this makes processes meet over gloo; DeepSpeed, which the environment turns on, it leaves on.
        # FSDP it would turn off; `trainer_config` knows another way.
        "use_cpu": not on_gpu and requested() not in ("fsdp1", "fsdp2"),
    }
    probe = _probe(config_class, trainer_args, batch, recipe.method.name)
    return Resolved(recipe, trainer_args, batch, config_class, trainer_class, probe)


def _checked(args: dict[str, Any], config_class: type[Any], method: str) -> dict[str, Any]:
    """The arguments, each known and of the type that the config class declares."""
    known = {field.name for field in dataclasses.fields(config_class) if field.init}
    hints = typing.get_type_hints(config_class)
    checked = {}
    for name, value in args.items():
        if name in OWNED:
            raise UserError(f"method.args.{name} is said elsewhere in a recipe: use {OWNED[name]}.")
        if name not in known:
            raise UserError(f"The method '{method}' has no argument '{name}'{did_you_mean(name, known)}")
        try:
            adapter = TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True))
            checked[name] = adapter.validate_python(value, strict=True)
        except ValidationError as error:
            wanted = getattr(hints[name], "__name__", None) or str(hints[name])
            if _is_enum_value(hints[name], value):
                checked[name] = value
                continue
            raise UserError(
                f"method.args.{name} must be {wanted.replace('typing.', '')}, found {value!r} "
                f"({type(value).__name__}): {error.errors()[0]['msg'].lower()}."
            ) from None
    return checked


def _is_enum_value(hint: Any, value: Any) -> bool:
    """Config classes declare enums (`lr_scheduler_type`) and accept their values as strings."""
    import enum

    candidates = [hint, *typing.get_args(hint)]
    return any(
        isinstance(candidate, type) and issubclass(candidate, enum.Enum) and value in {m.value for m in candidate}
        for candidate in candidates
    )


def _batch_identity(recipe: Recipe, merged: dict[str, Any]) -> BatchIdentity:
    world, per_device = recipe.launch.processes, merged["per_device_train_batch_size"]
    generations = merged.get("num_generations", 1)  # a method on pairs or answers counts them one by one
    accumulation = merged["gradient_accumulation_steps"]
    wanted = recipe.method.prompts_per_step
    if wanted is not None:
        answers = wanted * generations
        derived, rest = divmod(answers, world * per_device)
        if rest or derived == 0:
            raise UserError(
                f"method.prompts_per_step × generations = {wanted} × {generations} = {answers} is no multiple of world "
                f"× per-device = {world} × {per_device} = {world * per_device}: change one of them."
            )
        if "gradient_accumulation_steps" in recipe.method.args and derived != accumulation:
            raise UserError(
                f"gradient_accumulation_steps = {accumulation} contradicts prompts_per_step = {wanted}, which needs "
                f"{derived}: give one of the two."
            )
        accumulation = derived
    answers = world * per_device * accumulation
    if answers % generations:
        divisor = math.gcd(answers, generations)
        raise UserError(
            f"world × per-device × accumulation = {world} × {per_device} × {accumulation} = {answers} sequences cannot "
            f"hold whole groups of num_generations = {generations}: make {answers} a multiple of {generations} (for "
            f"instance gradient_accumulation_steps = {accumulation * generations // divisor})."
        )
    steps = merged.get("steps_per_generation") or accumulation
    if merged.get("generation_batch_size"):
        steps = merged["generation_batch_size"] // (world * per_device)
    return BatchIdentity(world, per_device, accumulation, steps, generations, answers // generations)


def _probe(config_class: type[Any], trainer_args: dict[str, Any], batch: BatchIdentity, method: str) -> Any:
    """Build the config once, as one process that stands for all, so that its own checks speak now."""
    probe = {
        **trainer_args,
        "output_dir": "unused",
        "report_to": [],
        "per_device_train_batch_size": batch.per_device * batch.world,
        "use_cpu": True,
    }
    try:
        with _alone():
            config = config_class(**probe)
    except (ValueError, TypeError) as error:
        sentence = " ".join(str(error).split())
        raise UserError(f"The method '{method}' refuses its arguments: {sentence}") from None
    from posttrain.seams.on_policy import GRPOConfig, refuse_ignored_options

    try:
        if isinstance(config, GRPOConfig):
            refuse_ignored_options(config)
    except ValueError as error:
        raise UserError(f"The method '{method}' refuses its arguments: {error}") from None
    return config


def require_devices(recipe: Common) -> None:
    """Refuse more processes than this machine has GPUs, unless it has none and all run on the CPU.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    here, gpus = recipe.launch.processes // recipe.launch.machines, torch.cuda.device_count()
    if 0 < gpus < here:
        raise UserError(
            f"The recipe asks for {here} processes on this machine (launch.processes), but it has {gpus} GPUs: each "
            "process needs its own."
        )


@contextmanager
def _alone() -> Iterator[None]:
    """Inside, this process looks as if no launcher had started it: what is built joins neither others nor DeepSpeed."""
    from accelerate.state import AcceleratorState, PartialState

    before = dict(PartialState._shared_state)
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if launched(name)}
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        os.environ.update(hidden)
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._shared_state.update(before)


def require_readable(model: Model) -> None:
    """Read a model's configuration, which is small, so that a wrong name is known before anything is made.

    Raises:
        UserError: there is no such model.
    """
    if model.path is None:
        return
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model.path, revision=model.revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise UserError(
            f"The model '{model.path}' cannot be read ({reason}): model.path must be a folder with a config.json, or a "
            "name on the Hugging Face hub."
        ) from None


def trainer_config(resolved: Resolved, output_dir: Path) -> Any:
    """The trainer's config for a run in `output_dir`."""
    with fsdp_without_gpus():
        return resolved.config_class(output_dir=str(output_dir), **resolved.trainer_args)
