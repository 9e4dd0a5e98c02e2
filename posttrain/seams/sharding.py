"""What was asked for is what trains: DeepSpeed and FSDP are dropped by accelerate without a word in several situations.

`RequireSharding` looks at the real objects when training begins. `fsdp_without_gpus` lets FSDP run where accelerate
would drop it.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from transformers import TrainerCallback

from posttrain.errors import UserError

if TYPE_CHECKING:
    from posttrain.rollouts.teacher import ModelTeacher


def _on_cpu(storage: Any, location: str) -> Any:
    return storage if location.startswith("cpu:") else None


# Several processes without GPUs compute on "cpu:0", where torch cannot load the optimiser of a checkpoint to.
torch.serialization.register_package(100, lambda storage: None, _on_cpu)


def requested(args: Any = None) -> str | None:
    """What a launcher's environment, or else the trainer's arguments, ask for.

    Returns:
        zero0 to zero3, deepspeed (stage unknown), fsdp1, fsdp2, or None.
    """
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        return _stage(file) if file else f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    if _flag("ACCELERATE_USE_FSDP"):
        return f"fsdp{os.environ.get('FSDP_VERSION', '1')}"
    if getattr(args, "deepspeed", None):
        return _stage(args.deepspeed)
    if getattr(args, "fsdp", None):
        return f"fsdp{(args.fsdp_config or {}).get('version', 2)}"
    return None


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


def _stage(config: Any) -> str:
    content = config if isinstance(config, dict) else json.loads(Path(config).read_text(encoding="utf-8"))
    stage = content.get("zero_optimization", {}).get("stage")
    return f"zero{stage}" if isinstance(stage, int) else "deepspeed"


@contextmanager
def fsdp_without_gpus() -> Iterator[None]:
    """Inside, a trainer's config that is built where FSDP is asked for and no GPU is gets FSDP over gloo.

    Accelerate 1.15 knows FSDP beside GPUs only: elsewhere it finds no backend, and every process trains by itself.
    """
    if torch.cuda.is_available() or not _flag("ACCELERATE_USE_FSDP"):
        yield
        return
    # As one of several GPU processes whose device has been chosen already: the CPU.
    original = PartialState._prepare_backend

    def gloo(self: Any, *_: Any, **__: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = gloo
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    try:
        yield
    finally:
        PartialState._prepare_backend = original
        del os.environ["ACCELERATE_TORCH_DEVICE"]


class RequireSharding(TrainerCallback):
    """Stops a run, when training begins, whose model is not split as it was asked for, or could not be saved whole.

    Args:
        asked: ddp, zero0 to zero3, fsdp1 or fsdp2; default what `requested` finds.

    Raises:
        posttrain.errors.UserError: something else is active; the message names it and the likely cause. Or the
            configuration would save a policy in parts, which nothing here can load.
    """

    def __init__(self, asked: str | None = None) -> None:
        self.asked = asked

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        asked = self.asked or requested(args)
        found = active(model, optimizer)
        if asked is not None and found != asked and not (asked == "deepspeed" and found.startswith("zero")):
            raise UserError(f"{asked} was asked for, but {found} is active{_cause(asked, found, args)}.")
        started, seen = int(os.environ.get("WORLD_SIZE", "1")), AcceleratorState().num_processes
        if started != seen:
            raise UserError(
                f"{started} processes were started, but each trains by itself (accelerate sees {seen}): on a machine "
                "without GPUs set use_cpu=True in the trainer's arguments."
            )
        _require_whole_saves(found)


def active(model: Any, optimizer: Any) -> str:
    """How a prepared model is really split, from its parameters and its optimiser; `part of …` when only some are.

    Returns:
        ddp (whole copies, one process included), zero0 to zero3, fsdp1 or fsdp2.
    """
    parameters = list(model.parameters())
    partitioned = [hasattr(parameter, "ds_id") for parameter in parameters]
    if any(partitioned):
        return "zero3" if all(partitioned) and _is_deepspeed(optimizer) else "part of zero3"
    sharded = [hasattr(parameter, "full_tensor") for parameter in parameters]
    if any(sharded):
        return "fsdp2" if all(sharded) else "part of fsdp2"
    kind = AcceleratorState().distributed_type
    if _is_deepspeed(optimizer):
        inner = getattr(optimizer, "optimizer", optimizer)
        if not type(inner).__module__.startswith("deepspeed.runtime.zero"):
            # The only one that holds bfloat16 weights at stage 1 is not among DeepSpeed's ZeRO optimisers.
            return "zero1" if type(inner).__name__ == "BF16_Optimizer" else "zero0"
        return "zero2" if getattr(inner, "partition_gradients", False) else "zero1"
    if kind == DistributedType.DEEPSPEED:
        return "zero0"
    if kind == DistributedType.FSDP:
        return "fsdp1"
    return "ddp"


def _require_whole_saves(found: str) -> None:
    state = AcceleratorState()
    if found == "zero3":
        settings = state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        if not settings.get("stage3_gather_16bit_weights_on_model_save"):
            raise UserError(
                "This ZeRO-3 configuration would save the policy in parts: set zero3_save_16bit_model: true in it (or "
                "stage3_gather_16bit_weights_on_model_save in a DeepSpeed file)."
            )
    elif found.startswith("fsdp") and "FULL_STATE_DICT" not in str(state.fsdp_plugin.state_dict_type):
        raise UserError(
            "This FSDP configuration would save the policy in parts: set fsdp_state_dict_type: FULL_STATE_DICT in it."
        )


def partitioned_teacher(
    path: str, accelerator: Any, *, dtype: str, revision: str | None = None, batch_size: int = 8
) -> ModelTeacher:
    """A frozen teacher that is split over the processes of a ZeRO-3 launch, from the moment that it is loaded.

    Args:
        path: a folder, or a name on the hub.
        accelerator: of the trainer, which must be alive: whatever is loaded beside it is split.
        dtype: of its weights; DeepSpeed computes in that of the policy.
        revision: of a model on the hub.
        batch_size: sequences per forward, the same in every process.

    Raises:
        posttrain.errors.UserError: the launch is not by ZeRO-3.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        raise UserError("A teacher is split over processes by ZeRO-3 alone: launch with zero3, or remove sharded.")
    from transformers import ProcessorMixin
    from trl.models import prepare_deepspeed

    from posttrain.rollouts.teacher import ModelTeacher
    from posttrain.rollouts.tokens import load_processing_class, model_class

    model = model_class(path, revision=revision).from_pretrained(path, revision=revision, dtype=getattr(torch, dtype))
    found = load_processing_class(path, revision=revision)
    processor = found if isinstance(found, ProcessorMixin) else None
    teacher = ModelTeacher(model.eval().requires_grad_(False), batch_size=batch_size, processor=processor)
    teacher.model = prepare_deepspeed(model, accelerator)
    return teacher


def release(trainer: Any) -> None:
    """Free what a finished trainer holds on this process: its model, optimiser state and DeepSpeed engine."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    trainer.accelerator.free_memory()
    unset_hf_deepspeed_config()  # or whatever is loaded next, outside any trainer, would be partitioned
    teacher: Any = getattr(trainer, "teacher", None)
    while hasattr(teacher, "teacher"):  # what another prompt is put around
        teacher = teacher.teacher
    for model, optimizer in ((trainer.model, trainer.optimizer), (getattr(teacher, "model", None), None)):
        if model is not None and any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            _empty(model, optimizer)
    parts = ("model", "model_wrapped", "deepspeed", "optimizer", "lr_scheduler", "ref_model", "_precompute_engine")
    for name in (*parts, "teacher"):
        setattr(trainer, name, None)
    trainer.callback_handler.model = trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _empty(model: Any, optimizer: Any) -> None:
    """Drop the tensors of a ZeRO-3 model: hooks on its gradients keep it and its engine alive for good."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if _is_deepspeed(optimizer):
        inner.optimizer.state.clear()
        inner.optimizer.param_groups.clear()
        vars(inner).clear()
    for parameter in model.parameters():
        parameter.grad = None
        for tensor in (parameter, getattr(parameter, "ds_tensor", None)):
            if tensor is not None:
                tensor.data = tensor.data.new_empty(0)


def _is_deepspeed(optimizer: Any) -> bool:
    inner = getattr(optimizer, "optimizer", optimizer)
    return type(inner).__module__.startswith("deepspeed.")


def _cause(asked: str, found: str, args: Any) -> str:
    if _flag("ACCELERATE_USE_CPU"):
        return ": ACCELERATE_USE_CPU turns it off, so unset it"
    if found != "ddp":
        return ": start it with the accelerate configuration that the recipe names (launch.config)"
    if asked.startswith("fsdp") and not torch.cuda.is_available():
        return (
            ": accelerate knows FSDP on GPUs only, so build the trainer's arguments inside "
            "posttrain.seams.sharding.fsdp_without_gpus(), with use_cpu=False"
        )
    if not (_flag("ACCELERATE_USE_DEEPSPEED") or _flag("ACCELERATE_USE_FSDP")):
        return ": start it with `posttrain run`, or with accelerate launch --config_file"
    if args.use_cpu:
        return ": use_cpu=True in the trainer's arguments may have turned it off"
    return ""
