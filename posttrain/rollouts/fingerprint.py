"""Fingerprints of a policy: cheap hashes by which a store or an evaluation recognises the model that it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel, ProcessorMixin

from posttrain.rollouts.tokens import ProcessingClass, tokenizer_of

_SAMPLED = 4096
"""Values hashed per parameter. Any training step moves all of them, and an 8B model is hashed in seconds."""

_BLOCKS, _BLOCK_BYTES = 64, 4096
"""How much of a weight file is read for its fingerprint."""


class WeightsDigest:
    """Hash of names, shapes, dtypes and evenly spaced values of parameters, added one at a time in any order."""

    def __init__(self) -> None:
        self._contents: dict[str, bytes] = {}

    def add(self, name: str, parameter: torch.Tensor) -> None:
        """Take one parameter, whole."""
        flat = parameter.detach().reshape(-1)
        stride = max(1, flat.numel() // _SAMPLED)
        values = flat[::stride].to(device="cpu", dtype=torch.float64)
        header = f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode()
        self._contents[name] = header + values.numpy().tobytes()

    def hexdigest(self) -> str:
        """16 hex digits."""
        digest = hashlib.sha256()
        for _, content in sorted(self._contents.items()):
            digest.update(content)
        return digest.hexdigest()[:16]


def weights_fingerprint(model: torch.nn.Module, *, adapters: bool = True) -> str | None:
    """`WeightsDigest` of a model's parameters (16 hex digits).

    With `adapters=False`, what LoRA has added (modules saved with it, too) is left out, and names are those of the bare
    model: the fingerprint is the base model's. `None` where parameters are partitioned over processes (ZeRO-3, FSDP)
    and cannot be read here.
    """
    digest = WeightsDigest()
    for name, parameter in model.named_parameters() if adapters else _base_parameters(model):
        if hasattr(parameter, "ds_id") or type(parameter.data) is not torch.Tensor:
            return None
        digest.add(name, parameter)
    return digest.hexdigest()


def _base_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if not any(part.startswith("lora_") or part == "modules_to_save" for part in parts):
            # peft keeps the base model's own layers under these names, below its adapters and its trained copies.
            bare = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")
            yield bare, parameter


def files_fingerprint(path: str) -> str | None:
    """Hash of a model folder's configuration and of evenly spaced blocks of its weight files (16 hex digits).

    Known without loading the model, so that a wrong one is refused early. None for anything but a folder with
    safetensors files: names on the hub are recognised by their weights alone.
    """
    files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else []
    if not files:
        return None
    digest = hashlib.sha256()
    for config in sorted(Path(path).glob("*config.json")):  # of the model or of an adapter, which names its base
        digest.update(config.read_bytes())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}{size}".encode())
        with file.open("rb") as content:
            for block in range(_BLOCKS):
                content.seek(block * size // _BLOCKS)
                digest.update(content.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(processing_class: ProcessingClass) -> str:
    """Hash of the token→id map, the special tokens and the chat template (16 hex digits)."""
    tokenizer = tokenizer_of(processing_class)
    content = {
        "vocabulary": tokenizer.get_vocab(),
        "eos": tokenizer.eos_token_id,
        "template": processing_class.chat_template,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()[:16]


def images_fingerprint(processor: ProcessorMixin) -> str:
    """Hash of what decides which pixels and how many placeholders an image becomes (16 hex digits).

    Equal before and after the processor was saved. Names of classes are left out: they differ with the packages that
    are installed.
    """
    saved = json.loads(processor.to_json_string())
    parts = {name: part for name, part in saved.items() if isinstance(part, dict) and name != "tokenizer"}
    own = {name: value for name, value in saved.items() if isinstance(value, int | float | str)}
    settings = {
        name: {key: value for key, value in part.items() if not key.endswith(("_type", "_class"))}
        for name, part in {**parts, "processor": own}.items()
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode("utf-8")).hexdigest()[:16]


def fingerprint(model: PreTrainedModel, processing_class: ProcessingClass, *, adapters: bool = True) -> str:
    """Weights and tokenizer as one string, `<weights>.<tokenizer>`; `unknown` stands for partitioned weights.

    With a processor `<weights>.<tokenizer>.<images>`.
    """
    parts = [weights_fingerprint(model, adapters=adapters) or "unknown", tokenizer_fingerprint(processing_class)]
    if isinstance(processing_class, ProcessorMixin):
        parts.append(images_fingerprint(processing_class))
    return ".".join(parts)


def differs(one: str, other: str) -> str | None:
    """What two fingerprints disagree on, in the plural; None where they don't.

    That is `the weights`, `the tokenizer or its chat template`, or `the settings of images`, which count where both
    know them: a text-only run of a model that reads images may have loaded its tokenizer alone.
    """
    (weights, tokenizer, *images), (other_weights, other_tokenizer, *other_images) = one.split("."), other.split(".")
    if tokenizer != other_tokenizer:
        return "the tokenizer or its chat template"
    if images and other_images and images != other_images:
        return "the settings of images"
    if weights != other_weights and "unknown" not in (weights, other_weights):
        return "the weights"
    return None
