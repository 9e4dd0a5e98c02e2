"""Policies as linear combinations of others: θ = Σ w_k θ_k, tensor by tensor in float32, rounded once."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from posttrain.errors import UserError
from posttrain.rollouts.vllm_common import local_folder
from posttrain.rollouts.weights import saved_weights


def merge(weights: Sequence[tuple[str, float]], output_dir: Path, *, dtype: str, revision: str | None = None) -> None:
    """Write Σ w_k θ_k as a model folder, with tokenizer and configuration of the first model.

    A tied weight is saved once and stays tied. One file of the first model is in memory at a time, and one tensor of
    each other.

    Args:
        weights: the folder of each model, or its name on the hub, with its w_k.
        output_dir: where the model is written; it must not exist.
        dtype: what the result is rounded to.
        revision: of models on the hub.

    Raises:
        UserError: the models do not have the same weights, in name and shape.
    """
    from safetensors.torch import save_file

    folders = [Path(local_folder(path, None if Path(path).is_dir() else revision)) for path, _ in weights]
    first, *others = folders
    if (first / "adapter_config.json").is_file():
        raise UserError(f"{first} holds adapters and no model of its own: merge them into their base first.")
    tables = [_Weights(folder) for folder in others]
    scratch = output_dir.with_name(f".{output_dir.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(first, scratch, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "history.json", ".*"))
    seen: set[str] = set()
    own, *factors = (weight for _, weight in weights)
    for file in sorted(first.glob("*.safetensors")):
        merged: dict[str, Tensor] = {}
        for name, tensor in _read(file).items():
            seen.add(name)
            total = own * tensor.float()
            for factor, table in zip(factors, tables, strict=True):
                total = total + factor * table.take(name, tensor, first)
            merged[name] = total.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        save_file(merged, scratch / file.name, metadata={"format": "pt"})
    for table in tables:
        table.require_no_more(seen, first)
    scratch.rename(output_dir)


def whole(adapters: Path, output_dir: Path) -> None:
    """Write adapters merged into their base as a model folder, with the tokenizer that lies beside them."""
    from peft import PeftConfig
    from safetensors.torch import save_file

    base = PeftConfig.from_pretrained(str(adapters)).base_model_name_or_path
    folder = Path(local_folder(str(base)))
    scratch = output_dir.with_name(f".{output_dir.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    left_out = ("*.safetensors*", "*.bin", "adapter_config.json", "README.md", ".*")
    shutil.copytree(folder, scratch, ignore=shutil.ignore_patterns(*left_out))
    shutil.copytree(adapters, scratch, ignore=shutil.ignore_patterns(*left_out), dirs_exist_ok=True)
    named = {name: tensor.contiguous() for name, tensor in saved_weights(str(adapters))}
    save_file(named, scratch / "model.safetensors", metadata={"format": "pt"})
    scratch.rename(output_dir)


class _Weights:
    """The tensors of a model folder by name, read when they are needed."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.folder = folder
        self.files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as content:
                self.files.update(dict.fromkeys(content.keys(), file))

    def take(self, name: str, like: Tensor, first: Path) -> Tensor:
        """One tensor in float32.

        Raises:
            UserError: there is none of that name and shape.
        """
        from safetensors import safe_open

        if name not in self.files:
            raise UserError(
                f"{self.folder} has no weight '{name}', which {first} has: models of other architectures, or tied in "
                "other places, cannot be merged."
            )
        with safe_open(self.files[name], framework="pt") as content:
            tensor: Tensor = content.get_tensor(name)
        if tensor.shape != like.shape:
            raise UserError(
                f"The weight '{name}' has the shape {tuple(tensor.shape)} in {self.folder} and {tuple(like.shape)} in "
                f"{first}: models of other shapes cannot be merged."
            )
        return tensor.float()

    def require_no_more(self, seen: set[str], first: Path) -> None:
        """Refuse weights that the first model lacks.

        Raises:
            UserError: there are some.
        """
        more = sorted(set(self.files) - seen)
        if more:
            raise UserError(
                f"{self.folder} has the weight '{more[0]}', which {first} has not: models of other architectures, or "
                "tied in other places, cannot be merged."
            )


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)
