"""Small models that see, with random weights, and pictures of one colour for them: what tests with images share.

They differ in how a batch holds pictures: `llava` has one row of pixels per picture; `llava_next` cuts pictures into
tiles, filled up to the largest number in the batch, and says how large each was; `qwen2_5_vl` has one row per patch, a
grid that tells them apart, and says which tokens stand for pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

from posttrain.launch.warm_start import IMAGE, character_tokenizer, small_processor, small_vision_model
from posttrain.recipe import Vision, WarmStart
from posttrain.tasks._characters import ALPHABET

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}+<image>-{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '?' if message['role'] == 'user' else '<eos>' }}{% endfor %}"
)

SHAPE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32}


@dataclass(frozen=True)
class Seeing:
    """A model on disk, and the processor that reads for it."""

    path: str
    processor: ProcessorMixin


def tiny_vision(folder: Path, family: str = "llava", *, seed: int = 0, deviation: float = 0.02) -> Seeing:
    """A model of one of the families in `folder`, with weights of this standard deviation."""
    tokenizer = character_tokenizer(ALPHABET, TEMPLATE, images=True)
    model, processor = FAMILIES[family](tokenizer)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=deviation)
    model.generation_config.suppress_tokens = None
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Seeing(str(folder), processor)


def _llava(tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, ProcessorMixin]:
    settings = WarmStart(architecture="llava", **SHAPE, layers=2, heads=2, vision=Vision(patch=4, layers=2))
    return small_vision_model(settings, tokenizer, 8, "float32"), small_processor(settings, tokenizer, 8)


def _text(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        **SHAPE,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _llava_next(tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, ProcessorMixin]:
    pinpoints = [[8, 16], [16, 8], [16, 16], [8, 24], [24, 8]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            **SHAPE, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4, projection_dim=16
        ),
        text_config=Qwen2Config(**_text(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, image_grid_pinpoints=pinpoints
    )
    processor = LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return LlavaNextForConditionalGeneration(config), processor


class StillQwen(Qwen2VLProcessor):
    """Without the video processor, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        self.image_token, self.image_token_id = IMAGE, tokenizer.convert_tokens_to_ids(IMAGE)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def _qwen(tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, ProcessorMixin]:
    config = Qwen2_5_VLConfig(
        vision_config={
            **SHAPE,
            "out_hidden_size": SHAPE["hidden_size"],
            "depth": 2,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        text_config={
            **_text(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        video_token_id=len(tokenizer) - 1,
        vision_start_token_id=tokenizer.unk_token_id,
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 32 * 32}
    )
    processor = StillQwen(image_processor=images, tokenizer=tokenizer, chat_template=TEMPLATE)
    return Qwen2_5_VLForConditionalGeneration(config), processor


Builder = Callable[[PreTrainedTokenizerFast], tuple[PreTrainedModel, ProcessorMixin]]

FAMILIES: dict[str, Builder] = {"llava": _llava, "llava_next": _llava_next, "qwen2_5_vl": _qwen}


def colour(number: int) -> Image.Image:
    """One of many pictures, each of another colour, in three sizes."""
    size = ((8, 8), (16, 8), (8, 24))[number % 3]
    return Image.new("RGB", size, (60 * number % 256, (255 - 37 * number) % 256, 91 * number % 256))
