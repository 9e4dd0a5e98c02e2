"""Images in the batches of TRL's GRPOTrainer: whether a run can read them, and stored answers' beside the rollouts'.

TRL keeps what a processor makes of prompts with images in layouts that differ by family: `pixel_values` holds a row
per patch (Qwen, with `image_grid_thw`), per image (LLaVA, Gemma), per tile (InternVL, LFM2) or per answer (Idefics).
Its own `split_pixel_values_by_grid` tells which rows are whose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers import ProcessorMixin
from trl.trainer.utils import split_pixel_values_by_grid

from posttrain.errors import UserError
from posttrain.rollouts.engine import Images
from posttrain.rollouts.tokens import PER_TOKEN, batched, image_fields, load_processing_class

FIELDS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
"""What TRL keeps of a processor's output."""

VISION = (*FIELDS, "num_images", "num_tiles")
"""The same, and how many images and tiles each answer has, which TRL adds as lists."""


def require_processor(model: Any, processing_class: Any, *data: Any, revision: str | None = None) -> None:
    """Refuse rows with images that the policy cannot read, before its weights load.

    Args:
        model: the policy, or its path.
        processing_class: as a trainer is given it, or None.
        data: data sets, or dictionaries of them.
        revision: of a model on the hub.

    Raises:
        UserError: the model reads text alone, its processor cannot be loaded, or a column has another name than ours.
    """
    datasets = [one for given in data for one in (given.values() if isinstance(given, dict) else [given])]
    columns = {column for dataset in datasets for column in getattr(dataset, "column_names", None) or ()}
    if "image" in columns:
        raise UserError("The data have a column 'image': call it 'images', and make each row's a list of images.")
    if "images" not in columns:
        return
    path = model if isinstance(model, str) else model.config._name_or_path
    if processing_class is None:
        try:
            processing_class = load_processing_class(path, revision=revision)
        except OSError as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"The prompts hold images, and the model {path} comes without a processor that reads them: give "
                f"processing_class, or another model ({reason:.200})."
            ) from error
    if not isinstance(processing_class, ProcessorMixin):
        raise UserError(
            f"The prompts hold images, and the model {path} reads text alone: take a vision-language model with its "
            "processor."
        )


def stored_fields(processor: Any, images: Images, prompt_ids: Sequence[int]) -> Mapping[str, Tensor]:
    """What TRL would keep of a stored prompt's images, of a `ProcessorMixin`; empty where it has none.

    Raises:
        UserError: the images are not those of the prompt, or the processor makes something that TRL does not keep.
    """
    if not images:
        return {}
    fields = image_fields(processor, images, prompt_ids)
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise UserError(
            f"{type(processor).__name__} makes '{unknown[0]}' of images, which TRL's batches do not carry: take a "
            "model of another family."
        )
    return fields


def joined(
    rollouts: Mapping[str, Any], stored: Sequence[Mapping[str, Tensor]], counts: Sequence[int], depth: int, width: int
) -> dict[str, Any]:
    """Images of rollouts and then of stored answers, as TRL's forward takes them; empty where nobody has any.

    Args:
        rollouts: a micro-batch of TRL's.
        stored: `stored_fields` of each stored answer.
        counts: how many images each of them has.
        depth: tokens of the longest prompt.
        width: tokens of the longest completion.
    """
    own = _by_answer(rollouts)
    fields = [*own, *stored]
    if not any(fields):
        return {}
    batch: dict[str, Any] = batched(fields, depth)
    for name in PER_TOKEN & batch.keys():
        batch[name] = pad(batch[name], (0, width))  # no completion token stands for an image
    batch["num_images"] = [*rollouts.get("num_images", [0] * len(own)), *counts]
    # Of every family that TRL does not count otherwise, so that it need not guess from the number of rows.
    batch["num_tiles"] = [len(answer.get("pixel_values", ())) for answer in fields]
    return batch


def _by_answer(batch: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """What each answer of a micro-batch of TRL's has of `FIELDS`; of what belongs to tokens, its prompt's."""
    split = split_pixel_values_by_grid(dict(batch))
    prompts = batch["prompt_mask"].bool()
    found = []
    for row, prompt in enumerate(prompts):
        known = {name: split[name] for name in FIELDS if name in split}
        own = {n: value[row] if isinstance(value, list) else value[row : row + 1] for n, value in known.items()}
        for name in PER_TOKEN & own.keys():
            own[name] = own[name][:, : len(prompt)][:, prompt]
        found.append(own)
    return found
