"""The weights of a policy as an inference engine wants them: whole, without adapters, under their checkpoint names."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.errors import UserError

Gather = Callable[[Sequence[Tensor]], AbstractContextManager[list[Tensor]]]
"""Makes parameters whole that are partitioned over processes; the tensors are valid inside the context."""


@contextmanager
def _already_whole(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    yield [parameter.detach() for parameter in parameters]


def full_weights(model: Any, gather: Gather = _already_whole) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a model, one at a time: `(checkpoint name, tensor)`, a tied one once.

    LoRA is merged on the way, W + Σ s·B·A, in float32 and rounded once to W's dtype; the model itself is not touched.
    (TRL merges in place and subtracts again afterwards, which in bfloat16 moves the base weights a little each time.)

    Args:
        model: a transformers model, or a peft model around one; unwrapped from DDP and DeepSpeed.
        gather: collective where parameters are partitioned; then every process must exhaust the iterator.

    Raises:
        UserError: adapters that are not plain LoRA, or that adapt one of two tied weights, so that merging would change
            the other one too.
    """
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if any(part.startswith("lora_") for part in parts) or "original_module" in parts:
            continue
        layer = model.get_submodule(name.rpartition(".base_layer.")[0]) if "base_layer" in parts else None
        factors = _factors(layer, name) if layer is not None and parts[-1] == "weight" else []
        if factors and uses[id(parameter)] > 1:
            raise UserError(
                f"There is an adapter on '{checkpoint_name(name)}', which is tied to another weight that has none: "
                "leave the embedding out of model.lora.target_modules."
            )
        with gather([parameter, *(tensor for _, pair in factors for tensor in pair)]) as (weight, *tensors):
            if factors:
                merged = weight.float()
                for index, (scale, _) in enumerate(factors):
                    a, b = tensors[2 * index : 2 * index + 2]
                    change = b.float() @ a.float()
                    merged = merged + scale * (change.T if _transposed(layer) else change)
                weight = merged.to(weight.dtype)
            yield checkpoint_name(name), weight


def checkpoint_name(name: str) -> str:
    """The name under which a parameter is saved: without what peft and gradient checkpointing put around it."""
    for wrapper in ("_checkpoint_wrapped_module.", "modules_to_save.default."):
        name = name.replace(wrapper, "")
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _transposed(layer: Any) -> bool:
    """Whether B·A has the shape of Wᵀ: embeddings, and layers that keep their weight transposed (GPT-2)."""
    return bool(getattr(layer, "lora_embedding_A", None)) or bool(getattr(layer, "fan_in_fan_out", False))


def _factors(layer: Any, name: str) -> list[tuple[float, tuple[Tensor, Tensor]]]:
    """`(scale, (A, B))` of every active adapter on a layer; ΔW = scale · B @ A."""
    found = []
    for adapter in layer.active_adapters:
        if getattr(layer, "use_dora", {}).get(adapter) or getattr(layer, "lora_bias", {}).get(adapter):
            raise UserError(f"The adapter on '{name}' is not plain LoRA (DoRA, or a bias): it cannot be merged here.")
        if adapter in getattr(layer, "lora_embedding_A", {}):
            pair = (layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter])
        elif adapter in getattr(layer, "lora_A", {}):
            pair = (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)
        else:
            continue
        if any(tensor.dim() != 2 and tensor.numel() for tensor in pair):
            raise UserError(f"The adapter on '{name}' is of a convolution: it cannot be merged here.")
        found.append((float(layer.scaling[adapter]), pair))
    return found


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Inside, `from_pretrained` gives every process a whole model, even where a trainer's would be split.

    As long as a trainer's config for ZeRO-3 is alive anywhere, transformers partitions whatever it loads; and where
    FSDP loads sparingly, all processes but the first get empty weights.
    """
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    sparingly = os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference
        if sparingly is not None:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = sparingly


def saved_weights(path: str) -> Iterator[tuple[str, Tensor]]:
    """The weights in a folder of safetensors files, or of LoRA adapters merged into their base, one at a time.

    Raises:
        UserError: the folder holds neither.
    """
    folder = Path(path)
    if (folder / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        with loaded_whole():
            model = AutoPeftModelForCausalLM.from_pretrained(path, dtype="auto")
        yield from full_weights(model)
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path} holds no safetensors files and no adapters: name the folder of a saved policy.")
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 - not a mapping
                yield name, content.get_tensor(name)


def loaded_weights(path: str) -> Iterator[tuple[str, Tensor]]:
    """The weights at a path under the names that transformers gives them, which can differ from those in the files."""
    from posttrain.rollouts.tokens import model_class

    with loaded_whole():
        model = model_class(path).from_pretrained(path, dtype="auto")
    yield from full_weights(model)


def saved_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in a folder of safetensors files, from their headers; empty for other paths."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else []:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 - not a mapping
                shapes[name] = tuple(content.get_slice(name).get_shape())
    return shapes


def checked(
    named: Iterator[tuple[str, Tensor]], shapes: dict[str, tuple[int, ...]], dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """`named` as it is, at `dtype` when given, with an error instead of anything missing, unknown or misshapen.

    Args:
        shapes: what the engine's model has, by checkpoint name; empty means that it is not known.

    Raises:
        KeyError: a parameter that the model does not have; after the last one, one that did not come.
        ValueError: another shape.
    """
    seen = set()
    for name, tensor in named:
        if shapes and name not in shapes:
            raise KeyError(f"the engine's model has no parameter '{name}'.")
        if shapes and tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"'{name}' has shape {tuple(tensor.shape)}, but the engine's model has {shapes[name]}.")
        seen.add(name)
        yield name, tensor if dtype is None else tensor.to(dtype)
    missing = sorted(set(shapes) - seen)
    if missing:
        raise KeyError(f"the parameter '{missing[0]}' ({len(missing)} in all) of the engine's model did not come.")
