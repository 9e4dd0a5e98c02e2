"""A small model from nothing: character tokenizer, chat template, and a warm start on solutions that tasks generate.

For tasks whose prompts hold images it is a small LLaVA: a CLIP vision tower that cuts an image into patches, a
projector, and a Qwen2 language model in which each patch is a token. Made once and cached by the hash of everything
that determines it, in `$POSTTRAIN_CACHE` or `~/.cache/posttrain`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    set_seed,
)

from posttrain import tasks
from posttrain.errors import UserError
from posttrain.recipe import Vision, WarmStart
from posttrain.rollouts.tokens import ProcessingClass
from posttrain.seams.supervised import train_supervised
from posttrain.tasks import BaseTask, Row, fingerprint, shown

FORMAT = 1
"""Version of the procedure; part of the cache key."""

DEMONSTRATIONS = 20_000
"""Distinct (prompt, answer) pairs are drawn up to this number, and repeated over epochs beyond it."""


def cache_root() -> Path:
    """Where warm-started models are kept."""
    configured = os.environ.get("POSTTRAIN_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(configured) if configured else Path(base) / "posttrain"


IMAGE = "<image>"
"""What stands for an image in a chat template, and then for each of its patches."""


def character_tokenizer(alphabet: str, chat_template: str, *, images: bool = False) -> PreTrainedTokenizerFast:
    """One token per character of `alphabet`, and `<pad>`, `<eos>`, `<unk>`; with `images`, `<image>`, too."""
    special = ["<pad>", "<eos>", "<unk>", *([IMAGE] if images else [])]
    vocabulary = {token: index for index, token in enumerate([*special, *dict.fromkeys(alphabet)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        **({"extra_special_tokens": {"image_token": IMAGE}} if images else {}),
    )


def small_model(settings: WarmStart, tokenizer: PreTrainedTokenizerFast, dtype: str) -> PreTrainedModel:
    """A randomly initialised causal language model of the given shape, with tied embeddings."""
    config = AutoConfig.for_model(
        settings.architecture,
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        head_dim=settings.hidden_size // settings.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    set_seed(settings.seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model


def small_processor(settings: WarmStart, tokenizer: PreTrainedTokenizerFast, size: int) -> ProcessorMixin:
    """Turns an image of `size` × `size` pixels into one token per patch, and renders with the tokenizer's template."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    square = {"height": size, "width": size}
    processor: ProcessorMixin = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size=square,
            crop_size=square,
            do_center_crop=False,
            # Black is zero. CLIP's own means would give every patch the same large part, and learning would begin late.
            image_mean=[0.0] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=tokenizer,
        patch_size=_vision(settings).patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the tower's class token, which `default` leaves out again
        chat_template=tokenizer.chat_template,
    )
    return processor


def small_vision_model(
    settings: WarmStart, tokenizer: PreTrainedTokenizerFast, size: int, dtype: str
) -> PreTrainedModel:
    """A randomly initialised LLaVA of the given shape for images of `size` × `size` pixels, with tied embeddings."""
    from transformers import CLIPVisionConfig, LlavaConfig, Qwen2Config

    shape: dict[str, Any] = {
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_attention_heads": settings.heads,
        # The usual 0.02 is for widths of thousands; with it, a small tower says the same of every patch for long.
        "initializer_range": settings.hidden_size**-0.5,
    }
    placeholder: Any = tokenizer.convert_tokens_to_ids(IMAGE)
    vision = _vision(settings)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **shape, num_hidden_layers=vision.layers, image_size=size, patch_size=vision.patch
        ),
        text_config=Qwen2Config(
            **shape,
            vocab_size=len(tokenizer),
            num_hidden_layers=settings.layers,
            num_key_value_heads=settings.heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=placeholder,
        image_seq_length=(size // vision.patch) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    set_seed(settings.seed)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
    model.generation_config.suppress_tokens = [placeholder]  # an answer that holds one could not be read again
    return model


def _vision(settings: WarmStart) -> Vision:
    return settings.vision or Vision()


def require_images(settings: WarmStart, several: Sequence[BaseTask]) -> None:
    """Refuse a model that cannot read what the tasks show, or reads images where there are none.

    Raises:
        UserError: so it is, or the images cannot be cut into patches.
    """
    for task in several:
        if task.images and settings.architecture != "llava":
            raise UserError(
                f"The prompts of the task '{task.name}' hold images, which a model of the architecture "
                f"{settings.architecture} cannot read: set warm_start.architecture to llava."
            )
        if not task.images and settings.architecture == "llava":
            raise UserError(
                f"The prompts of the task '{task.name}' hold no images, so there is nothing for llava to look at: take "
                "the architecture qwen2, qwen3 or llama."
            )
    if settings.architecture == "llava":
        image_size(settings, several)


def image_size(settings: WarmStart, several: Sequence[BaseTask]) -> int:
    """Width and height of all images of the tasks, in pixels.

    Raises:
        UserError: they are not square, not of one size, or no whole number of patches wide.
    """
    sizes = {image.size for task in several for row in task.rows("train") for image in row["images"]}
    (width, height), *others = sorted(sizes)
    if others or width != height:
        raise UserError(
            f"A model that is made here reads square images of one size, but those of the task '{several[0].name}' "
            f"are {', '.join(f'{w} × {h}' for w, h in sorted(sizes)[:3])}: take a model that exists (model.path)."
        )
    if width % _vision(settings).patch:
        raise UserError(
            f"Images {width} pixels wide cannot be cut into patches of {_vision(settings).patch}: change "
            "warm_start.vision.patch."
        )
    return int(width)


def demonstrated(settings: WarmStart, task: BaseTask) -> list[BaseTask]:
    """The tasks that a warm start learns, the run's own first.

    Raises:
        UserError: a task does not exist or cannot solve itself, its alphabet is unbounded, or its chat template is
            another one.
    """
    found = [task, *(tasks.load(other.name, other.options) for other in settings.also)]
    for one in found:
        if one.alphabet is None or one.chat_template is None:
            raise UserError(
                f"The task '{one.name}' cannot make a model from nothing, because its alphabet is unbounded: "
                + ("set model.path to a model that exists already." if one is task else "leave it out of `also`.")
            )
        if one.chat_template != task.chat_template:
            raise UserError(
                f"The tasks '{task.name}' and '{one.name}' write conversations in different chat templates, and a "
                "tokenizer has one: leave the second out of `also`."
            )
        one.demonstrations(one.rows("train")[:1], 1, seed=0)  # refuses where there is no solver
    require_images(settings, found)
    return found


def alphabet_of(several: Sequence[BaseTask]) -> str:
    """The characters of all tasks: those of the first, then what others add."""
    return "".join(dict.fromkeys("".join(task.alphabet or "" for task in several)))


def identity_of(settings: WarmStart, several: Sequence[BaseTask], *, dtype: str) -> dict[str, Any]:
    """Everything that determines a warm-started model."""
    own, *others = several
    absent = {name for name, given in (("also", others), ("vision", own.images)) if not given}
    if own.images:
        settings = settings.model_copy(update={"vision": _vision(settings)})
    identity = {
        "format": FORMAT,
        "settings": settings.model_dump(exclude=absent),
        "rows": fingerprint(own.rows("train")),
        "alphabet": alphabet_of(several) if others else own.alphabet,
        "template": own.chat_template,
        "dtype": dtype,
    }
    return identity | ({"also": [fingerprint(task.rows("train")) for task in others]} if others else {})


def _demonstrations(settings: WarmStart, several: Sequence[BaseTask]) -> list[tuple[Row, str]]:
    """Pairs of a row and an answer, of each task its share; training shuffles them."""
    count = min(settings.steps * settings.batch_size, DEMONSTRATIONS)
    return [
        pair
        for task, share in zip(several, settings.shares, strict=True)
        for pair in task.demonstrations(task.rows("train"), max(1, round(share * count)), seed=settings.seed)
    ]


def _shown(pairs: Sequence[tuple[Row, str]]) -> list[tuple[list[dict[str, Any]], str]]:
    """Prompts as an engine reads them, and their answers; one prompt object per row."""
    prompts = {id(row): shown(row) for row, _ in pairs}
    return [(prompts[id(row)], answer) for row, answer in pairs]


def warm_start(settings: WarmStart, task: BaseTask, *, dtype: str) -> Path:
    """The folder of the warm-started model, made now or taken from the cache.

    Raises:
        UserError: a task of the warm start has no solver, no bounded alphabet, or another chat template.
    """
    several = demonstrated(settings, task)
    identity = identity_of(settings, several, dtype=dtype)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_root() / "warm_start" / f"{task.name}-{key}"
    if (folder / "identity.json").is_file():
        return folder

    pairs = _demonstrations(settings, several)
    tokenizer = character_tokenizer(identity["alphabet"], identity["template"], images=task.images)
    processing_class: ProcessingClass = tokenizer
    model: Any
    if task.images:
        size = image_size(settings, several)
        processing_class = small_processor(settings, tokenizer, size)
        model = small_vision_model(settings, tokenizer, size, dtype)
    else:
        model = small_model(settings, tokenizer, dtype)
    if torch.cuda.is_available():
        model = model.to("cuda")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        loss = train_supervised(
            model,
            processing_class,
            _shown(pairs),
            steps=settings.steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            seed=settings.seed,
            output_dir=scratch,
            label=f"warm start {task.name} ({sum(p.numel() for p in model.parameters()):,} parameters)",
        )
        made = scratch / "model"
        model.save_pretrained(made)
        processing_class.save_pretrained(made)
        (made / "identity.json").write_text(json.dumps({**identity, "loss": loss}, indent=2), encoding="utf-8")
        try:
            made.rename(folder)
        except OSError:  # another run finished the same model first
            if not (folder / "identity.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
