"""Prompts as token ids, and the tokens that end an answer: the same for every engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from posttrain.errors import UserError
from posttrain.rollouts.engine import Prompt, TokenIds


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool
) -> list[int]:
    """Token ids of a conversation, rendered by the tokenizer's chat template."""
    rendered: Any = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
    )
    ids: list[int] = rendered["input_ids"]
    return ids


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt | TokenIds) -> list[int]:
    """Token ids of a prompt: rendered by the chat template when it is a list of messages, as they are when given.

    Raises:
        UserError: it is an empty list.
    """
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt)["input_ids"]
        return ids
    if not len(prompt):
        raise UserError("A prompt holds neither messages nor tokens: an answer has to follow something.")
    if isinstance(prompt[0], int):
        return list(prompt)  # type: ignore[arg-type]
    return chat_ids(tokenizer, prompt, add_generation_prompt=True)  # type: ignore[arg-type]


def end_ids(tokenizer: PreTrainedTokenizerBase, declared: int | Sequence[int] | None) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those that the model's generation config declares.

    Raises:
        UserError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("The tokenizer has no end-of-sequence token, so no answer could end: set eos_token.")
    listed = [declared] if isinstance(declared, int) else list(declared or [])
    return list(dict.fromkeys([tokenizer.eos_token_id, *listed]))
