"""Prompts as token ids, what comes of their images, and the tokens that end an answer: the same for every engine.

A model that reads images comes with a processor (tokenizer, image processor and chat template in one), any other with a
tokenizer; TRL calls both the processing class, and so do we. In the place of an image, a processor puts as many
placeholder tokens as the model has features for it, and it makes the model's further inputs: the fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils.peft_utils import find_adapter_config_file

from posttrain.errors import UserError
from posttrain.rewards import THOUGHT
from posttrain.rollouts.engine import Images, Prompt, TokenIds

ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin

PER_TOKEN = frozenset({"token_type_ids", "mm_token_type_ids"})
"""Fields that say of every token of the prompt whether it stands for an image."""


def reads_images(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration takes images beside text."""
    known = AutoModelForImageTextToText._model_mapping
    return type(config) in known and getattr(config, "vision_config", None) is not None


def model_class(path: str, *, revision: str | None = None, images: bool = True) -> Any:
    """The auto class that loads the model, or the adapters, at `path`: a causal language model, or one with images.

    Without `images`, one that can be both is the former.
    """
    adapter = find_adapter_config_file(path, revision=revision)
    if adapter is not None:
        from peft import PeftConfig

        base = PeftConfig.from_pretrained(path, revision=revision)
        path, revision = str(base.base_model_name_or_path), base.revision
    config = AutoConfig.from_pretrained(path, revision=revision)
    of_text = not images and type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForImageTextToText if reads_images(config) and not of_text else AutoModelForCausalLM


def load_processing_class(path: str, *, revision: str | None = None, images: bool = True) -> ProcessingClass:
    """The processor of a model that reads images, the tokenizer of any other, or without `images` of any at all.

    Raises:
        UserError: the processor needs a package that is not installed.
    """
    if not images or model_class(path, revision=revision) is AutoModelForCausalLM:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, revision=revision)
        return tokenizer
    try:
        processor: ProcessorMixin = AutoProcessor.from_pretrained(path, revision=revision)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"The processor of the model {path}, which reads images, cannot be loaded: {reason:.200}"
        ) from error
    return processor


def prompt_lengths(processing_class: ProcessingClass, prompts: Iterable[Prompt]) -> Iterator[int]:
    """Tokens of each prompt, placeholders of images expanded; of images of equal sizes only the first are processed."""
    placeholders: dict[tuple[Any, ...], int] = {}
    for prompt in prompts:
        images = images_of(prompt)
        if not images or not isinstance(processing_class, ProcessorMixin):
            yield len(encode(processing_class, prompt))
            continue
        unexpanded = len(processing_class.tokenizer(_text(processing_class, prompt, open_ended=True))["input_ids"])
        sizes = tuple(image.size for image in images)
        if sizes not in placeholders:
            placeholders[sizes] = len(encode(processing_class, prompt)) - unexpanded
        yield unexpanded + placeholders[sizes]


def tokenizer_of(processing_class: ProcessingClass) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or that of a processor."""
    if not isinstance(processing_class, ProcessorMixin):
        return processing_class
    tokenizer: PreTrainedTokenizerBase = processing_class.tokenizer
    return tokenizer


def opens_thought(processing_class: ProcessingClass, prompt_ids: TokenIds) -> bool:
    """Whether a rendered prompt ends with `<think>`, so that its completion begins inside a thought."""
    text: Any = tokenizer_of(processing_class).decode(list(prompt_ids[-16:]))
    ends: bool = text.rstrip().endswith(THOUGHT)
    return ends


@dataclass(frozen=True)
class Rendered:
    """A prompt as a model takes it.

    Attributes:
        ids: token ids, placeholders of images expanded.
        fields: the model's further inputs by name, as in pixel_values; empty without images.
    """

    ids: list[int]
    fields: Mapping[str, Tensor] = field(default_factory=dict)


def render(processing_class: ProcessingClass, prompt: Prompt | TokenIds) -> Rendered:
    """A prompt by the chat template when it is a list of messages; token ids as they are.

    Raises:
        UserError: it is an empty list, or holds images and the model reads text alone.
    """
    if isinstance(prompt, str):
        return Rendered(list(tokenizer_of(processing_class)(prompt)["input_ids"]))
    if not len(prompt):
        raise UserError("A prompt holds neither messages nor tokens: an answer has to follow something.")
    if isinstance(prompt[0], int):
        return Rendered(list(prompt))  # type: ignore[arg-type]
    if not isinstance(processing_class, ProcessorMixin):
        return Rendered(chat_ids(processing_class, prompt, add_generation_prompt=True))  # type: ignore[arg-type]
    processed = _processed(processing_class, prompt)  # type: ignore[arg-type]
    ids = processed["input_ids"][0].tolist()
    fields = {} if not images_of(prompt) else {name: processed[name] for name in _field_names(processed)}
    return Rendered(ids, fields)


def _processed(processor: ProcessorMixin, messages: Sequence[dict[str, Any]]) -> Mapping[str, Any]:
    """What a processor makes of one conversation, as tensors."""
    processed: Any = processor.apply_chat_template(
        _in_parts(messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    found: Mapping[str, Any] = processed
    return found


def _text(processor: ProcessorMixin, messages: Any, *, open_ended: bool) -> str:
    """A conversation as the chat template writes it, each image as one mark."""
    return processor.apply_chat_template(_in_parts(messages), add_generation_prompt=open_ended, tokenize=False)


def _in_parts(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """New messages whose contents are lists of parts: many templates of processors know nothing else."""
    return [{**message, "content": _parts(message["content"])} for message in messages]


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _field_names(processed: Mapping[str, Any]) -> list[str]:
    return [
        name
        for name, value in processed.items()
        if isinstance(value, Tensor) and name not in ("input_ids", "attention_mask")
    ]


def images_of(prompt: Prompt | TokenIds) -> list[Any]:
    """The images among the parts of a prompt's messages, in order."""
    messages = [message for message in prompt if isinstance(message, dict)] if not isinstance(prompt, str) else []
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    return [part.get("image") for parts in contents for part in parts if part.get("type") == "image"]


def image_fields(processor: ProcessorMixin, images: Images, ids: TokenIds) -> Mapping[str, Tensor]:
    """The fields of a prompt that was rendered to `ids` with these images.

    Raises:
        UserError: the ids hold another number of placeholders than the images need.
    """
    processed = _processed(processor, [{"role": "user", "content": [{"type": "image", "image": i} for i in images]}])
    placeholder = placeholder_of(processor)
    wanted, found = (sum(i == placeholder for i in tokens) for tokens in (processed["input_ids"][0].tolist(), ids))
    if wanted != found:
        raise UserError(
            f"{len(images)} images take {wanted} placeholder tokens, but the prompt's token ids hold {found}: give the "
            "images that the prompt was rendered with."
        )
    fields = {name: processed[name] for name in _field_names(processed)}
    for name in PER_TOKEN:
        if name in fields:
            fields[name] = torch.tensor(processor.create_mm_token_type_ids([list(ids)]))
    return fields


def continuation_ids(processor: ProcessorMixin, prompt: Sequence[dict[str, Any]], answer: str) -> list[int]:
    """Token ids of what a processor's chat template puts behind a prompt when `answer` answers it.

    Raises:
        UserError: the template renders the prompt otherwise once it is answered.
    """
    before = _text(processor, prompt, open_ended=True)
    whole = _text(processor, [*prompt, {"role": "assistant", "content": answer}], open_ended=False)
    if not whole.startswith(before):
        raise UserError("The chat template renders a prompt otherwise once it is answered: take another template.")
    ids: list[int] = processor.tokenizer(whole[len(before) :], add_special_tokens=False)["input_ids"]
    return ids


def placeholder_of(processor: ProcessorMixin) -> int | None:
    """The token that stands for a piece of an image; None where a processor does not say."""
    found: int | None = getattr(processor, "image_token_id", None)
    return found


def batched(rendered: Sequence[Mapping[str, Tensor]], width: int) -> dict[str, Tensor]:
    """The fields of several prompts as those of one batch, padded on the left to `width` tokens.

    What belongs to tokens is padded like them; the rest follows one another along the first dimension, smaller pieces
    filled up with zeros at their ends, as processors do themselves.
    """
    batch = {}
    for name in dict.fromkeys(name for fields in rendered for name in fields):
        if name in PER_TOKEN:
            own = [fields[name][0] if name in fields else torch.zeros(0, dtype=torch.long) for fields in rendered]
            batch[name] = torch.stack([torch.nn.functional.pad(types, (width - len(types), 0)) for types in own])
        else:
            values = [fields[name] for fields in rendered if name in fields]
            largest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
            batch[name] = torch.cat([_filled(value, largest) for value in values])
    return batch


def _filled(value: Tensor, sizes: Sequence[int]) -> Tensor:
    """Zeros at the ends of all dimensions but the first, up to `sizes`."""
    missing = [size - own for size, own in zip(sizes, value.shape[1:], strict=True)]
    return torch.nn.functional.pad(value, [end for more in reversed(missing) for end in (0, more)])


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool
) -> list[int]:
    """Token ids of a conversation, rendered by the tokenizer's chat template.

    Raises:
        UserError: it holds images.
    """
    if images_of(messages):
        raise UserError(
            "A prompt holds images, which a tokenizer cannot render: take a vision-language model, and the engine "
            "transformers."
        )
    rendered: Any = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
    )
    ids: list[int] = rendered["input_ids"]
    return ids


def encode(processing_class: ProcessingClass, prompt: Prompt | TokenIds) -> list[int]:
    """Token ids of a prompt: rendered by the chat template when it is a list of messages, as they are when given.

    Raises:
        UserError: it is an empty list, or holds images and the model reads text alone.
    """
    return render(processing_class, prompt).ids


def end_ids(tokenizer: PreTrainedTokenizerBase, declared: int | Sequence[int] | None) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those that the model's generation config declares.

    Raises:
        UserError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("The tokenizer has no end-of-sequence token, so no answer could end: set eos_token.")
    listed = [declared] if isinstance(declared, int) else list(declared or [])
    return list(dict.fromkeys([tokenizer.eos_token_id, *listed]))
