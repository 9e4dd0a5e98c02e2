"""The engine that needs nothing but transformers: batched `generate`, on a CPU or a GPU."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from posttrain.errors import UserError
from posttrain.rollouts.engine import Prompt, Sample, SamplingParams
from posttrain.rollouts.fingerprint import files_fingerprint, fingerprint

_SCORE_BYTES = 2**29
"""Upper bound of the logits that `score` holds at a time."""


class _Recorder(LogitsProcessor):
    """Remembers the log-probability of every sampled token; last in the chain, so it sees what is drawn from.

    `generate` can return all logits, [tokens, B, V], which for a real vocabulary is gigabytes: this keeps one step.
    """

    def __init__(self) -> None:
        self.previous: Tensor | None = None
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids)
        self.previous = torch.log_softmax(scores.float(), dim=-1)
        return scores

    def _take(self, input_ids: Tensor) -> None:
        if self.previous is not None:
            self.logps.append(self.previous.gather(1, input_ids[:, -1:]))

    def finish(self, sequences: Tensor) -> Tensor:
        """Log-probs [B, tokens] of everything that was generated."""
        self._take(sequences)
        self.previous = None
        return torch.cat(self.logps, dim=1)


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool
) -> list[int]:
    """Token ids of a conversation, rendered by the tokenizer's chat template."""
    rendered: Any = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
    )
    ids: list[int] = rendered["input_ids"]
    return ids


class TransformersEngine:
    """Sampling and scoring with a transformers model in this process.

    Samples depend on (weights, prompts, params, batch_size) alone: the global random state is left as it was.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; needs an end-of-sequence token.
        batch_size: sequences per `generate` call.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 256) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("The tokenizer has no end-of-sequence token, so no answer could end: set eos_token.")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.policy_version = 0
        self.files: str | None = None
        declared = model.generation_config.eos_token_id if model.generation_config is not None else None
        listed = [declared] if isinstance(declared, int) else list(declared or [])
        self._eos_ids = list(dict.fromkeys([tokenizer.eos_token_id, *listed]))
        self._pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    @classmethod
    def load(
        cls,
        path: str,
        *,
        dtype: str = "float32",
        revision: str | None = None,
        batch_size: int = 256,
        device: str | None = None,
    ) -> TransformersEngine:
        """The engine of a model on disk or on the hub; on this process's GPU when there is one."""
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
        model: Any = AutoModelForCausalLM.from_pretrained(path, revision=revision, dtype=getattr(torch, dtype))
        own_gpu = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        target = device or (own_gpu if torch.cuda.is_available() else "cpu")
        engine = cls(model.to(target), tokenizer, batch_size=batch_size)
        engine.files = files_fingerprint(path)
        return engine

    @cached_property
    def fingerprint(self) -> str:
        """Hash of weights, tokenizer and chat template."""
        return fingerprint(self.model, self.tokenizer)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, rendered by the chat template when it is a list of messages."""
        if isinstance(prompt, str):
            ids: list[int] = self.tokenizer(prompt)["input_ids"]
            return ids
        return chat_ids(self.tokenizer, prompt, add_generation_prompt=True)

    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Sample]]:
        """`params.n` samples for each prompt, in order."""
        encoded = [self.encode(prompt) for prompt in prompts]
        repeated = [ids for ids in encoded for _ in range(params.n)]
        samples: list[Sample] = []
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(params.seed)
            for start in range(0, len(repeated), self.batch_size):
                samples += self._generate(repeated[start : start + self.batch_size], params)
        return [samples[i * params.n : (i + 1) * params.n] for i in range(len(prompts))]

    def _generate(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[Sample]:
        input_ids, attention_mask = self._pad_left(prompts)
        recorder = _Recorder()
        # `generate` fills what it is not told from the model's own config (min_p, no_repeat_ngram_size, …), which would
        # warp once more what the chain here has warped and recorded.
        habits, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            sequences = self.model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                logits_processor=LogitsProcessorList([*_warpers(params), recorder]),
                do_sample=params.temperature > 0,
                top_k=0,  # 50 otherwise
                max_new_tokens=params.max_tokens,
                eos_token_id=self._eos_ids,
                pad_token_id=self._pad_id,
                disable_compile=True,
            )
        finally:
            self.model.generation_config = habits
        answers = sequences[:, input_ids.size(1) :]
        logps = recorder.finish(sequences)
        ended = torch.isin(answers, torch.tensor(self._eos_ids, device=answers.device))
        has_end = ended.any(dim=1)
        lengths = torch.where(has_end, ended.int().argmax(dim=1) + 1, answers.size(1))
        texts = self.tokenizer.batch_decode(
            [row[:length] for row, length in zip(answers.tolist(), lengths.tolist(), strict=True)],
            skip_special_tokens=True,
        )
        return [
            Sample(
                prompt_ids=list(prompt),
                token_ids=row[:length],
                logprobs=row_logps[:length],
                text=text,
                finish_reason="stop" if stopped else "length",
                policy_version=self.policy_version,
            )
            for prompt, row, row_logps, length, stopped, text in zip(
                prompts, answers.tolist(), logps.tolist(), lengths.tolist(), has_end.tolist(), texts, strict=True
            )
        ]

    @torch.no_grad()
    def score(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], *, temperature: float = 1.0
    ) -> list[list[float]]:
        """Log-probability (nats) of each answer token of `(prompt_ids, answer_ids)`, full softmax at `temperature`."""
        scores: list[list[float]] = []
        vocabulary = self.model.get_output_embeddings().weight.size(0)
        longest = max((len(answer) for _, answer in sequences), default=1)
        rows = max(1, min(self.batch_size, _SCORE_BYTES // (4 * vocabulary * max(1, longest))))
        for start in range(0, len(sequences), rows):
            chunk = sequences[start : start + rows]
            width = max(len(answer) for _, answer in chunk)
            prompt_ids, prompt_mask = self._pad_left([prompt for prompt, _ in chunk])
            answer_ids = torch.full((len(chunk), width), self._pad_id, device=prompt_ids.device)
            for row, (_, answer) in enumerate(chunk):
                answer_ids[row, : len(answer)] = torch.tensor(list(answer), device=prompt_ids.device)
            lengths = torch.tensor([len(answer) for _, answer in chunk], device=prompt_ids.device)
            answer_mask = (torch.arange(width, device=prompt_ids.device) < lengths[:, None]).long()
            logits = self.model(
                input_ids=torch.cat([prompt_ids, answer_ids], dim=1),
                attention_mask=torch.cat([prompt_mask, answer_mask], dim=1),
                logits_to_keep=width + 1,
            ).logits[:, :-1]
            logps = torch.log_softmax(logits.float() / temperature, dim=-1).gather(2, answer_ids[:, :, None])[:, :, 0]
            scores += [row[: len(answer)] for row, (_, answer) in zip(logps.tolist(), chunk, strict=True)]
        return scores

    def sync(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy weights into this engine's model.

        Raises:
            KeyError: a name that the model does not have.
            ValueError: a tensor of another shape. Nothing is changed before all names and shapes are known to fit.
        """
        own = dict(self.model.named_parameters())
        incoming = dict(named_parameters)
        unknown = sorted(set(incoming) - set(own))
        if unknown:
            raise KeyError(f"the engine's model has no parameter '{unknown[0]}'.")
        for name, value in incoming.items():
            if value.shape != own[name].shape:  # copy_ would broadcast it in silence
                raise ValueError(
                    f"'{name}' has shape {tuple(value.shape)}, but the engine's model has {tuple(own[name].shape)}."
                )
        with torch.no_grad():
            for name, value in incoming.items():
                own[name].copy_(value)
        self.policy_version = version
        self.files = None
        self.__dict__.pop("fingerprint", None)

    def close(self) -> None:
        """Free the model."""
        del self.model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _pad_left(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        width = max(len(ids) for ids in prompts)
        input_ids = torch.full((len(prompts), width), self._pad_id, device=self.model.device)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(prompts):
            input_ids[row, width - len(ids) :] = torch.tensor(list(ids), device=self.model.device)
            attention_mask[row, width - len(ids) :] = 1
        return input_ids, attention_mask


def _warpers(params: SamplingParams) -> list[LogitsProcessor]:
    chain: list[LogitsProcessor] = []
    if params.temperature not in (0.0, 1.0):
        chain.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k > 0:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        chain.append(TopPLogitsWarper(params.top_p))
    return chain
