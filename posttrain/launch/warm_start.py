"""A small model from nothing: character tokenizer, chat template, and a warm start on solutions the task generates.

Made once and cached by the hash of everything that determines it, in `$POSTTRAIN_CACHE` or `~/.cache/posttrain`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, set_seed

from posttrain.errors import UserError
from posttrain.recipe import WarmStart
from posttrain.seams.supervised import train_supervised
from posttrain.tasks import BaseTask, fingerprint

FORMAT = 1
"""Version of the procedure; part of the cache key."""

DEMONSTRATIONS = 20_000
"""Distinct (prompt, answer) pairs are drawn up to this number, and repeated over epochs beyond it."""


def cache_root() -> Path:
    """Where warm-started models are kept."""
    configured = os.environ.get("POSTTRAIN_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(configured) if configured else Path(base) / "posttrain"


def character_tokenizer(alphabet: str, chat_template: str) -> PreTrainedTokenizerFast:
    """One token per character of `alphabet`, and `<pad>`, `<eos>`, `<unk>`."""
    special = ["<pad>", "<eos>", "<unk>"]
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


def warm_start(settings: WarmStart, task: BaseTask, *, dtype: str) -> Path:
    """The folder of the warm-started model, made now or taken from the cache.

    Raises:
        UserError: the task has no solver or no bounded alphabet.
    """
    if task.alphabet is None or task.chat_template is None:
        raise UserError(
            f"The task '{task.name}' cannot make a model from nothing, because its alphabet is unbounded: set "
            "model.path to a model that exists already."
        )
    rows = task.rows("train")
    identity = {
        "format": FORMAT,
        "settings": settings.model_dump(),
        "rows": fingerprint(rows),
        "alphabet": task.alphabet,
        "template": task.chat_template,
        "dtype": dtype,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_root() / "warm_start" / f"{task.name}-{key}"
    if (folder / "identity.json").is_file():
        return folder

    count = min(settings.steps * settings.batch_size, DEMONSTRATIONS)
    pairs = task.demonstrations(rows, count, seed=settings.seed)
    tokenizer = character_tokenizer(task.alphabet, task.chat_template)
    model: Any = small_model(settings, tokenizer, dtype)
    if torch.cuda.is_available():
        model = model.to("cuda")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        loss = train_supervised(
            model,
            tokenizer,
            [(row["prompt"], answer) for row, answer in pairs],
            steps=settings.steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            seed=settings.seed,
            output_dir=scratch,
            label=f"warm start {task.name} ({sum(p.numel() for p in model.parameters()):,} parameters)",
        )
        made = scratch / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / "identity.json").write_text(json.dumps({**identity, "loss": loss}, indent=2), encoding="utf-8")
        try:
            made.rename(folder)
        except OSError:  # another run finished the same model first
            if not (folder / "identity.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
